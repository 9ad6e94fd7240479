"""One seed of the faults that tests/e2e does not play; `make faults` plays all of them, at many seeds."""

from pathlib import Path

import pytest

from tests.e2e.stream_kit import small_model
from tests.faults.plays import PLAYS
from tests.faults.run import play
from tests.faults.stage import NotRun

SHORT = (2, 3, 8, 11, 12, 14, 18, 19, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("faults") / "model.bundle")


def test_all_faults_are_in_the_table() -> None:
    assert sorted(PLAYS) == list(range(1, 25))


@pytest.mark.parametrize("number", SHORT, ids=lambda number: PLAYS[number].title)
def test_a_fault_is_survived(number: int, model: Path) -> None:
    try:
        play(PLAYS[number], 0, model, size=400)
    except NotRun as why:
        pytest.skip(str(why))
