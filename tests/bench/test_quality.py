"""The quality benchmark in small: looks are counted, alarms ring, the last line is one object."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bench import quality

NAMES = ("auc", "average_precision", "card_precision_100", "recall_at_1pct_fpr", "ece")


def figures(**changed: float) -> dict[str, Any]:
    """What `run` would give, with every number at its target."""
    mean = {name: goal.target for name, goal in quality.GOALS.items()} | {"mean_over_base": 1.0} | changed
    arm = {"mean": mean, "interval": {name: (value, value) for name, value in mean.items()}}
    return {
        "arms": {quality.BASE: arm, quality.FULL: arm},
        "models": {name: dict(zip(quality.HEADLINE, row, strict=True)) for name, row in quality.BOOK_WEEK.items()},
        "knowable": {"knowable": 0.73},
    }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No data are read and nothing is trained; the log and the figures are of this test."""
    log = tmp_path / "looks.md"
    log.write_text("| look |\n|---|\n")
    state: dict[str, Any] = {"log": log, "found": figures(), "code": "0" * 12}
    monkeypatch.setattr(quality, "LOOKS", log)
    monkeypatch.setattr(quality, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(quality, "fingerprint", lambda: state["code"])
    monkeypatch.setattr(quality, "read_dataset", lambda *_, **__: None)
    monkeypatch.setattr(quality, "run", lambda *_: state["found"])
    return state


def test_the_last_line_is_one_object(bench: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["--data", "x", "--folds", "test"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told) == {"full", "base"} and tuple(told["full"]) == tuple(told["base"]) == NAMES
    assert told["full"]["recall_at_1pct_fpr"] == 0.764


def test_looks_are_counted_and_end(bench: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for look in range(1, quality.MOST_LOOKS + 1):
        bench["code"] = f"{look:012x}"
        assert quality.main(["--data", "x", "--folds", "test"]) == 0
        assert f"look {look} of at most 5\n" in capsys.readouterr().err
        assert quality.main(["--data", "x", "--folds", "test"]) == 0
        assert f"look {look} of at most 5, again" in capsys.readouterr().err
    assert len(quality.looked_with(bench["log"])) == 5
    bench["code"] = "f" * 12
    assert quality.main(["--data", "x", "--folds", "test"]) == 1
    assert "5 looks are used up" in capsys.readouterr().err
    assert quality.main(["--data", "x", "--folds", "validation"]) == 0, "the earlier weeks are free"
    assert len(quality.looked_with(bench["log"])) == 5


@pytest.mark.parametrize(("name", "value"), [("auc", 0.93), ("average_precision", 0.83), ("card_precision_100", 0.38)])
def test_too_good_is_an_alarm(
    bench: dict[str, Any], name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    bench["found"] = figures(**{name: value})
    assert quality.main(["--data", "x", "--folds", "test"]) == 1
    assert f"ALARM: {name} is {value:.4f}" in capsys.readouterr().err


def test_without_data_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.find_data(tmp_path) is None
    monkeypatch.setattr(quality, "find_data", lambda: None)
    assert quality.main([]) == 0
    assert "simulated-data-raw" in capsys.readouterr().err


def test_the_log_of_looks_is_in_order() -> None:
    looks = quality.looked_with(quality.LOOKS)
    assert len(looks) == len(set(looks)) <= quality.MOST_LOOKS


def test_every_arm_on_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `run`, with the book's column names, on random payments of which some are frauds."""
    rng, rows = np.random.default_rng(5), 4_000
    moments = np.sort(rng.integers(0, 40 * 86_400, rows)) + 1_528_000_000  # 2018-06-03 on
    fraud = rng.random(rows) < 0.06
    amounts = np.round(rng.lognormal(3.5, 0.6, rows) * np.where(fraud, 4, 1), 2)
    columns = {
        "TRANSACTION_ID": np.arange(rows),
        "TX_DATETIME": pa.array(moments * 1_000_000, pa.timestamp("us")),
        "CUSTOMER_ID": rng.integers(0, 150, rows),
        "TERMINAL_ID": rng.integers(0, 60, rows),
        "TX_AMOUNT": amounts,
        "TX_FRAUD": fraud.astype(np.int8),
        "TX_FRAUD_SCENARIO": (fraud * rng.integers(1, 4, rows)).astype(np.int8),
    }
    pq.write_table(pa.table(columns), tmp_path / "handbook_sim_dev_x.parquet")
    monkeypatch.setitem(quality.WEEKS, "validation", ("2018-06-26", "2018-07-10"))
    data = quality.find_data(tmp_path)
    assert data is not None
    dataset = quality.read_dataset(data, quality.read_map(quality.ROOT / "tests" / "handbook.toml"))
    found = quality.run(dataset, "validation", (quality.BASE, "base, one week, class weight"))
    assert set(found["models"]) == set(quality.BOOK_WEEK)
    assert found["over_base"]["base, one week, class weight"]["auc"][1] < 1
    known = found["knowable"]
    assert 0 < known["knowable"] < 1 and sum(known.values()) == pytest.approx(1)
    assert known["attack younger than its labels"] > 0 and known["amount like any other"] >= 0
    json.dumps(quality.rounded(found), allow_nan=False)
