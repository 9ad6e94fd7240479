"""The retrain notebook, run by papermill as a person or a scheduler would."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from fraud_nb.apps.schedule import GATE, error_in
from fraud_nb.decision.bundle import unpack
from fraud_nb.operations.jobs import InvalidParameter, checked_values, parameters_of
from tests.e2e.stream_kit import fraud

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "nbs" / "jobs" / "retrain.ipynb"


def retrain(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Without servers: from a simulated history, kept out of the ledger."""
    alone = ("retrain", "--quick", "--history", "simulated", "-p", "release=false")
    return fraud({"FRAUD_HOME": str(home), "PYTHONPATH": str(ROOT)}, *alone, *words, timeout_s=240)


def run_of(home: Path) -> Path:
    (folder,) = (home / "runs").iterdir()
    return folder


def test_the_quick_preset_passes_its_gate(tmp_path: Path) -> None:
    done = retrain(tmp_path)
    assert done.returncode == 0, done.stderr
    folder = run_of(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["auc"] > 0.90 and metrics["average_precision"] > 50 * metrics["frauds"] / metrics["transactions"]
    assert metrics["auc"] < 0.985, "a surprising gain is a leak until disproved"
    bundle = unpack((folder / "model.bundle").read_bytes(), None)
    assert bundle.manifest.metrics == metrics
    card = json.loads((folder / "retrain.ipynb").read_text())
    assert all(cell.get("execution_count") for cell in card["cells"] if cell["cell_type"] == "code")
    injected = [cell for cell in card["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert len(injected) == 1, "papermill did not find the cell tagged `parameters`"


def test_a_failed_gate_exits_1_and_keeps_no_model(tmp_path: Path) -> None:
    done = retrain(tmp_path, "-p", "customers=500", "-p", "days=100", "-p", "min_auc=0.999")
    assert done.returncode == 1
    assert re.search(r"GateFailed: .*auc is 0\.\d+, at least 0\.999 is required", done.stderr), done.stderr
    assert [path.name for path in run_of(tmp_path).iterdir()] == ["retrain.ipynb"]
    found = error_in(run_of(tmp_path) / "retrain.ipynb")
    assert found is not None and found[0] == GATE and found[1] in done.stderr, "the schedule tells a gate from a fault"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-p", "dys=100"), "dys: no such parameter; did you mean days?"),
        (("-p", "days=many"), "days: a value of type int is needed, such as 120"),
        (("-p", "promote=1"), "promote: a value of type bool is needed"),
    ],
)
def test_a_wrong_parameter_exits_2(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = retrain(tmp_path, *words)
    assert done.returncode == 2 and told in done.stderr
    assert not (tmp_path / "runs").exists()


def test_every_parameter_has_a_type_a_default_and_a_comment() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    for line in source.splitlines():
        assert re.fullmatch(r"\w+: (bool|int|float|str) = \S.*  # \S.*", line), line
    assert len(parameters_of(NOTEBOOK)) == len(source.splitlines())


def test_values_keep_their_text() -> None:
    assert checked_values({"why": "x"}, {"why": "0123 = a"}) == {"why": "0123 = a"}
    with pytest.raises(InvalidParameter, match="seed"):
        checked_values({"seed": 1}, {"seed": "__import__('os')"})
