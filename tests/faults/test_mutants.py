"""The mutants still fit the package, and whoever tries them tells dead from alive; `make mutants` tries them all."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.mutants import FAILED, Trial, code, mutated, tried
from tests.faults.mutations import MUTANTS, Mutant, harmless, mutant
from tests.faults.notes import Notes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("each", MUTANTS, ids=lambda each: each.title)
def test_a_patch_fits_once_and_compiles(each: Mutant) -> None:
    text = (ROOT / "fraud_nb" / each.file).read_text()
    changed = mutated(text, each)
    assert changed != text
    compile(changed, each.file, "exec")


def test_every_mutant_has_a_name_and_tests_that_exist() -> None:
    assert max(Counter(each.title for each in MUTANTS).values()) == 1
    for test in {test for each in MUTANTS for test in each.tests}:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), f"{test} is gone; choose another"


TOY = "def least(numbers: list[int]) -> int:\n    return min(numbers)\n"
TOY_TEST = """
import os
import time
import pytest
from fraud_nb.toy import least

def test_least():
    assert least([2, 1, 3]) == 1

def test_one():
    assert least([1]) == 1

@pytest.fixture
def number():
    return least([1, 2]) // least([1, 1])

def test_of_a_fixture(number):
    assert number == 1

def test_waiting():
    time.sleep(30 if least([1, 2]) == 2 else 0)

def test_ending():
    if least([1, 2]) == 2:
        os._exit(3)
"""
MAX = ("toy.py", "min(numbers)", "max(numbers)")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository with one module and its tests."""
    for name, text in (
        ("fraud_nb/__init__.py", ""),
        ("fraud_nb/toy.py", TOY),
        ("tests/test_toy.py", TOY_TEST),
        ("pyproject.toml", ""),
        (".gitignore", "left\n__pycache__\n"),
        ("left", "not copied"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def test_killed_survived_and_neither(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    least, one = (f"tests/test_toy.py::{name}" for name in ("test_least", "test_one"))
    table = (
        mutant("greatest", "everything", *MAX, least),
        mutant("not seen", "everything", *MAX, one),
        mutant("cannot be imported", "everything", "toy.py", "min(numbers)", "min(numbers", least),
        mutant("no such test", "everything", *MAX, "tests/test_toy.py::test_nothing"),
        harmless("sorted first", "the least is the least", "toy.py", "min(numbers)", "sorted(numbers)[0]", least),
        harmless("said to be harmless", "it is not", *MAX, least),
    )
    (toy / "left").unlink()
    trial = Trial(toy, Notes(toy / "left" / "results.jsonl"))
    assert trial.run(table, []) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "killed 1/4"
    words = [result["outcome"].partition(" ")[0] for result in trial.notes]
    assert words == ["killed", "survived", "exit", "not", "survived", "killed"]
    assert (toy / "fraud_nb" / "toy.py").read_text() == TOY
    assert Trial(toy, trial.notes).run(table[:1], []) == 0 and len(list(trial.notes)) == len(table), "noted"
    assert Trial(toy, trial.notes).run(table, [5]) == 0 and len(list(trial.notes)) == len(table) + 1, "asked for"
    assert capsys.readouterr().out.splitlines()[-1] == "killed 0/0"


def test_what_takes_too_long_is_no_proof_and_a_broken_fixture_neither(toy: Path) -> None:
    (toy / "fraud_nb" / "toy.py").write_text(TOY.replace("min(numbers)", "max(numbers)"))
    assert tried(toy, ["tests/test_toy.py::test_waiting"], seconds=5).word == "no end within 5 s"
    assert tried(toy, ["tests/test_toy.py::test_ending"]).word.startswith("exit code 3 and no test")
    (toy / "fraud_nb" / "toy.py").write_text(TOY.replace("min(numbers)", "0"))
    assert tried(toy, ["tests/test_toy.py::test_of_a_fixture"]).word.startswith(f"exit code {FAILED} and no test")


def test_a_patch_that_does_not_fit_is_said() -> None:
    for old in ("max(numbers)", "numbers"):
        with pytest.raises(ValueError, match="not once"):
            mutated(TOY, mutant("greatest", "everything", "toy.py", old, ""))


def test_a_result_is_of_this_code_and_these_tests() -> None:
    one = MUTANTS[0]
    assert code(one, ROOT) == code(one, ROOT) != code(MUTANTS[1], ROOT)
