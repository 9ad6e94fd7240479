"""The guide's own cell and diffs, in a copy of the repository: exported, held to the oracle, trained, and served."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fraud_nb.decision.bundle import BundleError, unpack
from tests.e2e.stream_kit import small_model

ROOT = Path(__file__).parents[2]
GUIDE = json.loads((ROOT / "nbs" / "guides" / "first_feature.ipynb").read_text())
NAMES = ("purchases_in_new_shops_24h", "purchases_on_new_devices_24h", "device_known_hours")

WORKER = """
import sys
from pathlib import Path

import numpy as np

from fraud_nb.decision.bundle import unpack
from fraud_nb.decision.reasons import reasons
from fraud_nb.decision.scorer import Scorer
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.fold import fold
from fraud_nb.features.profile import Profiles
from tests.e2e.stream_kit import small_model
from tests.parity.oracle import Oracle
from tests.parity.test_fold_oracle import busy_stream, check_vector, customers_of, events_of

older, newer = map(Path, sys.argv[1:])
stream, oracle = busy_stream(1, 400), Oracle()
vectors = fold(Profiles(), customers_of(stream), events_of(stream))
for (customer, event), vector in zip(stream, vectors, strict=True):
    check_vector(oracle, customer, event, vector)
    oracle.accept(customer, event)
kept = Scorer(unpack(older.read_bytes(), None)).score(vectors)
assert np.isfinite(kept.probability).all(), "an older model is valid under newer code"
bundle = unpack(small_model(newer).read_bytes(), None)
assert set(NAMES) <= set(bundle.names)
scorer = Scorer(bundle)
assert np.isfinite(scorer.score(vectors[-1:]).probability).all()
pushes = np.zeros((1, len(FEATURE_NAMES) + 1), np.float32)
pushes[0, [FEATURE_NAMES.index(name) for name in NAMES]] = 1
(told,) = reasons(vectors[-1:], pushes, "EUR")
assert [reason.code for reason in told] == [name.upper() for name in NAMES], told
"""


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def hunks() -> Iterator[tuple[str, str, str]]:
    """File, text before and text after, of every change the guide asks for."""
    text = "\n".join(text_of(cell) for cell in GUIDE["cells"] if cell["cell_type"] == "markdown")
    for name, body in re.findall(r"```diff\n--- (\S+)\n(.*?)\n```", text, flags=re.DOTALL):
        for hunk in body.split("\n@@\n"):
            lines = [(line[:1] or " ", line[1:]) for line in hunk.split("\n")]
            yield (name, *("\n".join(line for mark, line in lines if mark != gone) for gone in "+-"))


def replaced(text: str, old: str, new: str, name: str) -> str:
    assert text.count(old) == 1, (
        f"first_feature.ipynb: {name} has no such place any more; bring the guide up to date: {old}"
    )
    return text.replace(old, new)


def apply(copy: Path, name: str, old: str, new: str) -> None:
    """Make one change, in a text or in the only cell that has such a place."""
    path = copy / name
    if path.suffix != ".ipynb":
        path.write_text(replaced(path.read_text(), f"{old}\n", f"{new}\n", name))
        return
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and f"{old}\n" in f"{text_of(cell)}\n"]
    (cell,) = cells or pytest.fail(
        f"first_feature.ipynb: {name} has no such place any more; bring it up to date: {old}"
    )
    cell["source"] = replaced(f"{text_of(cell)}\n", f"{old}\n", f"{new}\n", name).rstrip("\n")
    path.write_text(json.dumps(notebook))


def add_family(copy: Path) -> None:
    """The guide's cell, as a cell of the catalogue."""
    (source,) = (text_of(cell) for cell in GUIDE["cells"] if "NEWNESS = Family(" in text_of(cell))
    path = copy / "nbs" / "13_catalogue.ipynb"
    notebook = json.loads(path.read_text())
    (place,) = (place for place, cell in enumerate(notebook["cells"]) if text_of(cell).startswith("## The shop"))
    cell = {"cell_type": "code", "id": "0f17a001", "metadata": {}, "outputs": [], "execution_count": None}
    notebook["cells"].insert(place, cell | {"source": f"#| export\n{source}"})
    path.write_text(json.dumps(notebook))


def run(copy: Path, *command: str) -> None:
    """In the copy, with its package."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def test_the_guides_feature_goes_all_the_way(tmp_path: Path) -> None:
    copy, older, newer = tmp_path / "copy", small_model(tmp_path / "older.bundle"), tmp_path / "newer.bundle"
    for part in ("nbs", "fraud_nb", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / part, copy)
    changes = list(hunks())
    assert {name for name, _, _ in changes} == {
        "nbs/13_catalogue.ipynb", "nbs/14_fold.ipynb", "nbs/22_reasons.ipynb", "tests/parity/oracle.py"
    }  # fmt: skip
    add_family(copy)
    for change in changes:
        apply(copy, *change)
    programs = Path(sys.executable).parent
    run(
        copy,
        str(programs / "ruff"),
        "check",
        "--quiet",
        "nbs/13_catalogue.ipynb",
        "nbs/14_fold.ipynb",
        "nbs/22_reasons.ipynb",
    )
    run(copy, str(programs / "nbdev_export"))
    run(copy, sys.executable, "-c", f"NAMES = {NAMES!r}\n{WORKER}", str(older), str(newer))
    with pytest.raises(BundleError, match=NAMES[0]):  # a worker that has not been restarted
        unpack(newer.read_bytes(), None)
