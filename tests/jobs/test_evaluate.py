"""`fraud evaluate` on files of other people: their names, their mistakes, and their answers."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fraud_nb.learning.simulate import World
from fraud_nb.operations.backfill import simulated_past, write_past
from fraud_nb.operations.evaluate import delayed, read_dataset
from fraud_nb.operations.files import FileMap, InvalidMap, own_map, read_map
from tests.e2e.stream_kit import fraud

ROOT = Path(__file__).parents[2]
WORLD = World(customers=300, days=45, seed=4, fraud_rate=0.03)  # from 2025-01-01
WEEKS = ("--test-from", "2025-01-29", "--test-to", "2025-02-12", "--train-days", "all", "--features", "base")
LATE = ("--test-from", "2025-01-09", "--test-to", "2025-01-16")  # later than 2,000 purchases
MAP = """\
[columns]
transaction_id = "Beleg"
customer_id = "Kunde"
merchant_id = "Kasse"
event_time = "Zeitpunkt"
amount = "Betrag"

[time]
unit = "ms"

[csv]
delimiter = ";"

[labels]
column = "Betrug"
delay_days = 7

[answers]
column = "Masche"
"""
Row = dict[str, str]
Change = Callable[[list[Row]], object]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of a simulated town, with German names."""
    path = tmp_path_factory.mktemp("town") / "town.csv"
    write_past(simulated_past(WORLD), path)
    names = {"transaction_id": "Beleg", "customer_id": "Kunde", "merchant_id": "Kasse", "event_time": "Zeitpunkt"}
    with path.open() as file:
        return [
            {
                **{german: row[ours] for ours, german in names.items()},
                "Betrag": row["amount"],
                "Betrug": row["is_fraud"] or "0",
                "Masche": "" if row["is_fraud"] != "1" else ("teuer" if float(row["amount"]) > 50 else "billig"),
            }
            for row in csv.DictReader(file)
        ]


def write(folder: Path, rows: list[Row], text: str = MAP) -> tuple[str, ...]:
    """The words that name the file and its map."""
    with (folder / "shop.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=";")
        table.writeheader()
        table.writerows(rows)
    (folder / "shop.toml").write_text(text)
    return ("--data", str(folder / "shop.csv"), "--map", str(folder / "shop.toml"))


def evaluate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return fraud({"FRAUD_HOME": str(folder), "PYTHONPATH": str(ROOT)}, "evaluate", *words, timeout_s=280)


def test_json_is_one_object_and_its_numbers_are_plausible(tmp_path: Path, town: list[Row]) -> None:
    done = evaluate(tmp_path, *write(tmp_path, town), *WEEKS, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["train_days"], found["delay_days"], found["features"], found["imbalance"]) == (
        "all",
        7,
        "base",
        "none",
    )
    assert [week["from"] for week in found["weeks"]] == ["2025-01-29", "2025-02-05"]
    mean, interval = found["mean"], found["interval"]
    assert 0.5 < mean["auc"] < 0.985 and mean["average_precision"] > 2 * mean["frauds"] / mean["transactions"]
    assert interval["auc"][0] < mean["auc"] < interval["auc"][1]
    assert 0 <= mean["card_precision_100"] <= mean["card_precision_100_max"]
    assert {name for name in mean if name.startswith("recall_at_fpr_1pct_")} == {
        "recall_at_fpr_1pct_teuer",
        "recall_at_fpr_1pct_billig",
    }
    assert not (tmp_path / "kafka").exists(), "an evaluation needs no servers"


def test_a_person_gets_a_table(tmp_path: Path, town: list[Row]) -> None:
    words = write(tmp_path, town)
    week = ("--test-from", "2025-01-29", "--test-to", "2025-02-05", "--features", "base", "--imbalance", "weight")
    done = evaluate(tmp_path, *words, *week)
    assert done.returncode == 0, done.stderr
    for told in (
        "average precision",
        "card precision at 100",
        "recall at 0.1 % FPR",
        "mean p / base",
        "recall of teuer",
    ):
        assert told in done.stdout
    assert "trained on 7 days that end 7 days before each; base features, imbalance: class_weight" in done.stdout


def test_the_answer_is_never_a_feature(tmp_path: Path, town: list[Row]) -> None:
    """Whatever the answer column says, vectors and labels stay the same, to the byte."""
    told = read_dataset(Path(write(tmp_path, town)[1]), read_map(tmp_path / "shop.toml"))
    lies = [row | {"Masche": str(number % 7)} for number, row in enumerate(town)]
    other = read_dataset(Path(write(tmp_path, lies)[1]), read_map(tmp_path / "shop.toml"))
    assert told.history.vectors.tobytes() == other.history.vectors.tobytes()
    assert told.history.labels == other.history.labels and told.kinds != other.kinds
    assert other.kinds is not None and {kind for kind in other.kinds if kind} <= set("0123456")
    write(tmp_path, town, MAP.replace('amount = "Betrag"', 'amount = "Betrag"\ncategory = "Masche"'))
    with pytest.raises(InvalidMap, match="answers.column: also in"):
        read_map(tmp_path / "shop.toml")


def double(rows: list[Row]) -> None:
    rows[5:5] = [rows[4], rows[4]]


def swap(rows: list[Row]) -> None:
    rows[10], rows[400] = rows[400], rows[10]


def spoil(rows: list[Row]) -> None:
    rows[7] = rows[7] | {"Betrag": "viel"}


def rename(rows: list[Row]) -> None:
    rows[:] = [{("Kundin" if name == "Kunde" else name): cell for name, cell in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (double, "refused 2: transaction_id: duplicate (keep one row of each id); line 7, 8"),
        (swap, "event_time: out_of_order (sort the file by event_time); line 13, 14, 15, ..."),
        (spoil, "refused 1: amount: not_a_number"),
        (rename, "no column Kunde; did you mean Kundin?"),
    ],
)
def test_a_file_that_will_not_do_exits_1(tmp_path: Path, town: list[Row], change: Change, told: str) -> None:
    rows = list(town[:1_000])
    change(rows)
    done = evaluate(tmp_path, *write(tmp_path, rows), *WEEKS)
    assert (done.returncode, done.stdout) == (1, "") and told in done.stderr
    assert "viel" not in done.stderr, "an error never shows a value"


@pytest.mark.parametrize(
    ("text", "words", "code", "told"),
    [
        (MAP.partition("[labels]")[0], WEEKS, 2, "labels: missing; add the column"),
        (MAP, ("--test-from", "2025-02-12", "--test-to", "2025-01-29"), 2, "--test-to: later than --test-from"),
        (MAP, (*WEEKS, "--train-days", "0"), 2, "a number of days, such as 7, or all"),
        (MAP, ("--test-from", "2025-01-03", "--test-to", "2025-01-10"), 1, "train: no purchase in week 1; test later"),
        (MAP, (*LATE, "--delay-days", "1"), 1, "test: no purchase in week 1"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, town: list[Row], text: str, words: tuple[str, ...], code: int, told: str
) -> None:
    done = evaluate(tmp_path, *write(tmp_path, town[:2_000], text), *words)
    assert (done.returncode, done.stdout) == (code, "") and told in done.stderr


def test_a_file_with_our_names_needs_no_map(tmp_path: Path) -> None:
    write_past(simulated_past(World(customers=60, days=20, seed=4, fraud_rate=0.03)), tmp_path / "own.csv")
    text = (tmp_path / "own.csv").read_text().replace("known_at", "label_time", 1)
    (tmp_path / "own.csv").write_text(text)
    dataset = read_dataset(tmp_path / "own.csv", own_map(tmp_path / "own.csv"))
    mapped = read_dataset(tmp_path / "own.csv", read_map_of(tmp_path))
    assert dataset.history.vectors.tobytes() == mapped.history.vectors.tobytes()
    assert dataset.history.labels == mapped.history.labels != []


def read_map_of(folder: Path) -> FileMap:
    """The map that `write_past` wrote, for the renamed column."""
    path = folder / "own.toml"
    path.write_text(path.read_text().replace("known_at", "label_time"))
    return read_map(path)


def test_the_delay_that_was_asked_for(tmp_path: Path, town: list[Row]) -> None:
    """It moves labels that have no time of their own; a column of times has the last word."""
    write(tmp_path, town[:10])
    shop = read_map(tmp_path / "shop.toml")
    slower, days = delayed(shop, 21)
    assert slower.labels is not None and slower.labels.delay_days == days == 21
    assert delayed(shop, None) == (shop, 7)
    (tmp_path / "timed.toml").write_text(MAP.replace("delay_days = 7", 'time = "Zeitpunkt"'))
    timed = read_map(tmp_path / "timed.toml")
    assert delayed(timed, 3) == (timed, 3) and delayed(timed, None) == (timed, 7)
