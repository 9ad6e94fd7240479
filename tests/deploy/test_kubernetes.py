"""deploy/kubernetes: of the right form, true to the code, and closed."""

import json
import re
from typing import Any

import kubernetes_validate
import pytest

from fraud_nb.apps.schedule import GRACE_S, jobs_of
from fraud_nb.domain.config import Settings
from tests.deploy.kit import (
    ROOT,
    SECRET,
    Document,
    check_command,
    compose,
    documents,
    filled_in,
    manifests,
    pod_of,
    started,
)
from tests.deploy.test_compose import last

FOLDER = ROOT / "deploy/kubernetes"
MANIFESTS = manifests()
PODS = {each["metadata"]["name"]: pod["spec"] for each in MANIFESTS if (pod := pod_of(each)) is not None}
SETTINGS = next(each["data"] for each in MANIFESTS if each["kind"] == "ConfigMap")
KUSTOMIZATION = documents(FOLDER / "kustomization.yaml")[0]
COMMENT = (FOLDER / "kustomization.yaml").read_text(encoding="utf-8")
each_pod = pytest.mark.parametrize("name", PODS)


def name_of(manifest: Document) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def container_of(name: str) -> Document:
    (container,) = PODS[name]["containers"]
    return dict(container)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=name_of)
def test_manifest_has_the_form_of_its_kind(manifest: Document) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomization_lists_every_file() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(
        {path.name for path in FOLDER.iterdir()} - {"kustomization.yaml"}
    )
    assert len({name_of(each) for each in MANIFESTS}) == len(MANIFESTS)


def test_images_are_those_of_compose() -> None:
    used = {container_of(name)["image"] for name in PODS}
    here = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in KUSTOMIZATION["images"]}
    assert used == set(here)
    assert set(here.values()) <= {each["image"] for each in started(filled_in()).values()}


@each_pod
def test_every_command_is_one_of_ours(name: str) -> None:
    container = container_of(name)
    assert "command" not in container
    if container["image"] == "fraud-nb":
        check_command(container["args"])
    else:
        assert "args" not in container, "the image says it"


@each_pod
def test_settings_are_known_and_usable(name: str) -> None:
    secrets: dict[str, str] = {"redis-url": "redis://:secret@valkey:6379/0"}
    environment = dict(SETTINGS)
    for variable in container_of(name)["env"]:
        source = variable.get("valueFrom", {}).get("secretKeyRef", {})
        environment[variable["name"]] = variable.get("value") or secrets.get(source["key"], "0123456789abcdef")
    Settings.from_env(environment)


def test_nothing_that_compose_passes_on_is_missing() -> None:
    with_password = {"FRAUD_REDIS"}  # in the Secret
    assert set(compose()["x-places"]) <= set(SETTINGS) | with_password


def test_secrets_are_named_and_never_held() -> None:
    assert not [each for each in MANIFESTS if each["kind"] == "Secret"]
    assert not [key for key in SETTINGS if SECRET.search(key)]
    keys = set()
    for name in PODS:
        for variable in container_of(name)["env"]:
            if SECRET.search(variable["name"]) or "valueFrom" in variable:
                source = variable["valueFrom"]["secretKeyRef"]
                assert source["name"] == "fraud", f"{name}: {variable['name']}"
                keys.add(source["key"])
    assert keys == set(re.findall(r"--from-literal=([\w-]+)=", COMMENT)), "the comment says how to make the Secret"


@each_pod
def test_each_pod_is_restricted(name: str) -> None:
    pod, container = PODS[name], container_of(name)
    assert pod["serviceAccountName"] == "fraud" and pod["automountServiceAccountToken"] is False
    user, group = (int(number) for number in last("worker", "USER").split(":"))
    said = pod["securityContext"]
    assert said["runAsNonRoot"] is True and (said["runAsUser"], said["runAsGroup"]) == (user, group)
    assert said["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_the_account_has_no_token() -> None:
    (account,) = (each for each in MANIFESTS if each["kind"] == "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def by_kind(kind: str) -> list[Any]:
    return [each for each in MANIFESTS if each["kind"] == kind]


def test_jobs_are_due_when_the_scheduler_would_start_them_and_a_failure_stays() -> None:
    plans = {each["metadata"]["name"]: each["spec"] for each in by_kind("CronJob")}
    jobs = {job.name: job for job in jobs_of(Settings())}
    assert set(plans) == set(jobs)
    for name, plan in plans.items():
        assert (plan["schedule"], plan["timeZone"]) == (jobs[name].cron, "Etc/UTC")
        assert (plan["concurrencyPolicy"], plan["startingDeadlineSeconds"]) == ("Forbid", GRACE_S)
        assert plan["jobTemplate"]["spec"]["backoffLimit"] == 0 and PODS[name]["restartPolicy"] == "Never"
    look_back, limit_s = jobs["verify"], plans["verify"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert container_of("verify")["args"] == list(look_back.words) and limit_s == look_back.timeout_s


def test_who_only_looks_may_not_write() -> None:
    users = {each["name"]: each.get("value") for each in container_of("verify")["env"]}
    assert users["PGUSER"] == "fraud_reader"


def ports_of(name: str) -> set[int]:
    return {port["containerPort"] for port in container_of(name).get("ports", [])}


def test_services_and_budgets_find_their_pods() -> None:
    for each in by_kind("Service"):
        assert {port["targetPort"] for port in each["spec"]["ports"]} == ports_of(each["spec"]["selector"]["app"])
    for each in by_kind("PodDisruptionBudget"):
        assert each["spec"]["selector"]["matchLabels"]["app"] in PODS
    budgets = {each["metadata"]["name"] for each in by_kind("PodDisruptionBudget")}
    assert budgets == {each["metadata"]["name"] for each in by_kind("Deployment") if each["spec"]["replicas"] > 1}


@pytest.mark.parametrize("name", [each["metadata"]["name"] for each in by_kind("Deployment")])
def test_deployments_are_probed_where_they_answer(name: str) -> None:
    container = container_of(name)
    assert "startupProbe" in container and "livenessProbe" in container
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("httpGet", "tcpSocket"):
            if how in container.get(kind, {}):
                assert container[kind][how]["port"] in ports_of(name)


def test_nothing_gets_in_but_where_it_is_named() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in by_kind("NetworkPolicy")}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for spec in policies.values():
        app = spec["podSelector"].get("matchLabels", {}).get("app")
        for rule in spec.get("ingress", []):
            assert {port["port"] for port in rule["ports"]} == ports_of(app)
    asked = json.dumps(policies["to-servers"])
    assert all(f'"port": {SETTINGS[name].rpartition(":")[2]}' in asked for name in ("FRAUD_KAFKA", "FRAUD_MLFLOW_URI"))
