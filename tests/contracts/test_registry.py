"""MLflow on a local store: a run is what was logged, and the alias goes where the ledger points."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fraud_nb.adapters.registry import (
    MODEL_FOLDER,
    NotRegistered,
    RegistryUnavailable,
    artifact_root,
    attach,
    log_run,
    mirror,
    register,
)

BUNDLE = bytes(range(256)) * 40


class Registry:
    """A store in a folder, and MLflow's own view of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/home/mlflow.db"
        self.bundle = folder / "model.bundle"
        self.bundle.write_bytes(BUNDLE)

    def run(self, **changes: Any) -> str:
        given: dict[str, Any] = {
            "params": {"arm": "none", "rounds": 300},
            "metrics": {"auc": 0.93, "ece": float("nan")},
            "tags": {"history": "simulated"},
            "artifacts": {MODEL_FOLDER: self.bundle},
            "intervals": {"auc": (0.91, 0.95)},
        }
        return log_run(self.uri, "fraud", **given | changes)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri, self.uri)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


def test_a_run_is_what_was_logged(registry: Registry) -> None:
    run_id = registry.run()
    run = registry.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"arm": "none", "rounds": "300"}
    assert run.data.metrics == {"auc": 0.93, "auc.low": 0.91, "auc.high": 0.95}
    assert run.data.tags["history"] == "simulated"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(registry.folder / "home" / "mlruns")


def test_a_version_gives_the_bundle_back(registry: Registry, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts

    run_id = registry.run()
    version = registry.client.get_model_version("fraud", str(register(registry.uri, run_id, 3)))
    assert (version.run_id, version.tags) == (run_id, {"ledger_version": "3"})
    found = download_artifacts(version.source, dst_path=str(tmp_path), tracking_uri=registry.uri)
    assert (Path(found) / "model.bundle").read_bytes() == BUNDLE


def test_to_register_twice_changes_nothing(registry: Registry) -> None:
    first = register(registry.uri, registry.run(), 4)
    assert register(registry.uri, registry.run(), 4) == first
    assert register(registry.uri, registry.run(), 40) != first


def test_the_alias_follows_the_ledger(registry: Registry) -> None:
    versions = {number: register(registry.uri, registry.run(), number) for number in (12, 11)}
    for number in (11, 12, 11):
        assert mirror(registry.uri, "fraud", "champion", number) == versions[number]
        assert int(registry.client.get_model_version_by_alias("fraud", "champion").version) == versions[number]
    with pytest.raises(NotRegistered, match="model 99"):
        mirror(registry.uri, "fraud", "champion", 99)
    assert int(registry.client.get_model_version_by_alias("fraud", "champion").version) == versions[11]


def test_the_model_card_comes_later(registry: Registry, tmp_path: Path) -> None:
    run_id = registry.run()
    card = tmp_path / "retrain.ipynb"
    card.write_bytes(b"{}")
    attach(registry.uri, run_id, card)
    assert {found.path for found in registry.client.list_artifacts(run_id)} == {MODEL_FOLDER, "retrain.ipynb"}


def test_errors_have_one_name(registry: Registry) -> None:
    with pytest.raises(RegistryUnavailable, match="RESOURCE_DOES_NOT_EXIST.*FRAUD_MLFLOW_URI"):
        attach(registry.uri, "0" * 32, registry.bundle)
    with pytest.raises(RegistryUnavailable, match="FRAUD_MLFLOW_URI"):
        mirror("http://127.0.0.1:9", "fraud", "champion", 1)


def test_relative_homes_stay_where_they_were_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert artifact_root("sqlite:///.fraud/mlflow.db") == f"file://{tmp_path}/.fraud/mlruns"


def test_a_fresh_store_is_silent_and_nobody_is_called(tmp_path: Path) -> None:
    """In a process that may not resolve a name: no chatter, no call home, nothing beside the store."""
    work = f"""
import socket
def refuse(*address, **options):
    open({str(tmp_path / "called")!r}, "a").write(str(address))
    raise OSError("no network here")
socket.getaddrinfo = refuse
from fraud_nb.adapters.registry import log_run, register
log_run("sqlite:///home/mlflow.db", "fraud", {{}}, {{"auc": 0.9}}, {{}}, {{}})
"""
    outside_ci = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", work], cwd=tmp_path, env=outside_ci, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
