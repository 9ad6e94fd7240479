"""`make bench-quality`: detection quality on the Fraud Detection Handbook's payments, beside the book's own tables.

The data are for evaluation only and never shipped. The test weeks are looked at five times in the life of this project:
each is a line of docs/test_fold_looks.md. Looking again with the same code is no new look. FOLDS=validation costs none.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from fraud_nb.apps.parts import say, say_over
from fraud_nb.features.catalogue import BASE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.dataset import targets
from fraud_nb.learning.imbalance import Arm
from fraud_nb.learning.metrics import auc, average_precision, card_precision
from fraud_nb.learning.prequential import Fold, TrackRecord, Yardstick, gain, prequential, weekly_folds
from fraud_nb.learning.train import Bools, Floats, Recipe, columns_of
from fraud_nb.operations.backtest import moment_ms
from fraud_nb.operations.evaluate import Dataset, Question, evaluate, planned, read_dataset
from fraud_nb.operations.files import read_map

ROOT = Path(__file__).parents[2]
LOOKS, FIGURES = ROOT / "docs" / "test_fold_looks.md", ROOT / "docs" / "handbook_benchmark.json"
MOST_LOOKS = 5
DATA = "handbook_sim_dev_*.parquet"
HOW_TO_GET = f"""\
no {DATA} in ../shared/data, so there is nothing to measure. To get it:
  git clone https://github.com/Fraud-Detection-Handbook/simulated-data-raw
and write its daily pickles (they need pandas<2), in order of time and with their columns, into one Parquet file.
Its licence is not stated: keep the file out of every repository."""
WEEKS = {"test": ("2018-08-08", "2018-09-05"), "validation": ("2018-07-04", "2018-08-01")}
DELAY_DAYS = 7.0
HEADLINE = ("auc", "average_precision", "card_precision_100")
LAST_LINE = {name: name for name in HEADLINE} | {"recall_at_fpr_1pct": "recall_at_1pct_fpr", "ece": "ece"}

# What the book prints for its test weeks: AUC, average precision, card precision at 100.
BOOK_WEEK = {  # chapter 3, trained on 2018-07-25 to 07-31
    "logistic regression": (0.871, 0.606, 0.291),
    "decision tree of depth 2": (0.763, 0.496, 0.241),
    "decision tree": (0.788, 0.309, 0.243),
    "random forest": (0.867, 0.658, 0.287),
    "XGBoost, defaults": (0.862, 0.639, 0.273),
}
BOOK_TUNED = (0.869, 0.687, 0.303)  # chapter 5, XGBoost, mean of the four test weeks
ARMS: Mapping[str, tuple[str, int | None, Arm]] = {  # features, days learned from, imbalance
    "base, one week": ("base", 7, "none"),
    "base, one week, class weight": ("base", 7, "class_weight"),
    "base, one week, SMOTE": ("base", 7, "smote"),
    "base, one week, SMOTE-ENN": ("base", 7, "smote_enn"),
    "base, all days": ("base", None, "none"),
    "full, one week": ("full", 7, "none"),
    "full, one week, class weight": ("full", 7, "class_weight"),
    "full, one week, SMOTE": ("full", 7, "smote"),
    "full, all days": ("full", None, "none"),
}
BASE, FULL = "base, one week", "full, all days"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a number of the full model should be; on the test weeks."""

    floor: float
    target: float
    moonshot: float
    alarm: float | None  # beyond it: a leak until disproved


GOALS = {
    "auc": Goal(0.880, 0.888, 0.890, 0.92),
    "average_precision": Goal(0.745, 0.759, 0.770, 0.82),
    "card_precision_100": Goal(0.308, 0.311, 0.315, 0.37),
    "recall_at_fpr_1pct": Goal(0.755, 0.764, 0.770, 0.85),
    "recall_at_alerts_0_5pct": Goal(0.68, 0.694, 0.70, None),
    "precision_at_alerts_0_5pct": Goal(0.94, 0.959, 0.965, None),
    "ece": Goal(0.0015, 0.001, 0.001, None),
}


def find_data(folder: Path = ROOT.parent / "shared" / "data") -> Path | None:
    """The newest file of the data, if it is there."""
    return max(folder.glob(DATA), default=None)


def fingerprint() -> str:
    """Of all code that can change a figure: a look is a look with this code."""
    folders = ("domain", "features", "decision", "learning")
    files = [path for name in folders for path in sorted((ROOT / "fraud_nb" / name).glob("*.py"))]
    files += [ROOT / "fraud_nb" / "operations" / name for name in ("files.py", "evaluate.py")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]


def commit() -> str:
    """The commit, for a reader; empty without git."""
    git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def looked_with(log: Path) -> list[str]:
    """The fingerprint of each look so far."""
    return re.findall(r"^\| \d+ \|.*\| `(\w{12})` \|$", log.read_text(encoding="utf-8"), re.MULTILINE)


def look_line(number: int, record: Mapping[str, Mapping[str, float]], code: str) -> str:
    """A line of the log."""
    cells = [f"{record[part][name]:.4f}" for part in ("full", "base") for name in LAST_LINE.values()]
    return f"| {number} | {datetime.now(UTC):%Y-%m-%d} | {commit()} | " + " | ".join(cells) + f" | `{code}` |\n"


def classical(dataset: Dataset, fold: Fold) -> dict[str, dict[str, float]]:
    """The book's simple models on our base features, one week."""
    truth = targets(dataset.history, fold.train, fold.trained_at_ms)
    told = targets(dataset.history, fold.test, np.iinfo(np.int64).max)
    train, test = (columns_of(BASE_NAMES, dataset.history.vectors[rows]) for rows in (fold.train, fold.test))
    days = dataset.history.events["event_time"][fold.test] // DAY_MS
    buyers = [dataset.history.customers[row] for row in fold.test.tolist()]
    found = {}
    for name, model in (
        ("logistic regression", LogisticRegression(random_state=0)),
        ("decision tree of depth 2", DecisionTreeClassifier(max_depth=2, random_state=0)),
        ("decision tree", DecisionTreeClassifier(random_state=0)),
        ("random forest", RandomForestClassifier(random_state=0, n_jobs=2)),
    ):
        pipeline = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            scores = pipeline.fit(train, truth).predict_proba(test)[:, 1]
        found[name] = measured(scores, told, buyers, days)
    return found


def measured(scores: Floats, truth: Bools, buyers: Sequence[str], days: np.ndarray[Any, Any]) -> dict[str, float]:
    """The book's three numbers."""
    cards, _ = card_precision(scores, truth, buyers, days)
    return dict(zip(HEADLINE, (auc(scores, truth), average_precision(scores, truth), cards), strict=True))


def book_models(dataset: Dataset, folds: Sequence[Fold]) -> dict[str, dict[str, float]]:
    """All models of the book's third chapter, in its one test week."""
    trees = Recipe(rounds=100, depth=6, learning_rate=0.3, min_child_weight=1.0, subsample=1.0, colsample=1.0)
    boosted = prequential(dataset.history, folds[:1], trees, BASE_NAMES, yardstick=Yardstick(rounds=1)).mean
    return classical(dataset, folds[0]) | {"XGBoost, defaults": {name: boosted[name] for name in HEADLINE}}


def knowable(dataset: Dataset, record: TrackRecord) -> dict[str, float]:
    """The share of the frauds that left a trace before they happened, roughly; the rest is luck.

    Scenario 2: at a shop whose first fraud of the attack is not a week old, no label is known yet. Scenario 3: an
    amount below twice what the customer usually pays looks like any other. The scenario is the answer: nothing else
    reads it.
    """
    history, kinds = dataset.history, dataset.kinds or []
    usual = columns_of(("amount_to_median",), history.vectors)[:, 0]
    tested = {row for week in record.weeks for row in week.fold.test[week.is_fraud].tolist()}
    attacked: dict[int, int] = {}  # shop -> when its present attack began
    newest: dict[int, int] = {}  # shop -> its newest fraud
    young = plain = 0
    for row in (row for row, kind in enumerate(kinds) if kind):
        shop, at = int(history.events["merchant"][row]), int(history.events["event_time"][row])
        if kinds[row] == "2":
            if at - newest.get(shop, 0) > 14 * DAY_MS:
                attacked[shop] = at
            newest[shop] = at
            young += row in tested and at - attacked[shop] < DELAY_DAYS * DAY_MS
        elif kinds[row] == "3":
            plain += row in tested and not usual[row] >= 2
    shares = {"attack younger than its labels": young / len(tested), "amount like any other": plain / len(tested)}
    return {"knowable": 1 - sum(shares.values())} | shares


def run(dataset: Dataset, folds_name: str, arms: Sequence[str]) -> dict[str, Any]:
    """Every arm, week by week; what is kept of it."""
    start, stop = (moment_ms(day, 0) for day in WEEKS[folds_name])
    records: dict[str, TrackRecord] = {}
    kept: dict[str, Any] = {}
    for name in arms:
        features, days, arm = ARMS[name]
        began = time.monotonic()
        plan = planned(dataset, start, stop, days, DELAY_DAYS)
        records[name] = evaluate(dataset, Question(plan, features, arm), report=progress_of(name)).record
        record = records[name]
        kept[name] = {"mean": record.mean, "sd": record.spread, "interval": record.intervals()}
        kept[name]["weeks"] = [week.measured for week in record.weeks]
        say(f"{name}: {time.monotonic() - began:.0f} s")
    against = {name: gain(records[BASE], records[name]) for name in records if BASE in records and name != BASE}
    folds = weekly_folds(dataset.history, planned(dataset, start, stop, 7, DELAY_DAYS))
    say("the book's models")
    return {
        "folds": folds_name,
        "commit": commit(),
        "code": fingerprint(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "arms": kept,
        "over_base": against,
        "models": book_models(dataset, folds),
        "book": {"week": BOOK_WEEK, "tuned": BOOK_TUNED},
        "knowable": knowable(dataset, next(iter(records.values()))),
    }


def progress_of(what: str) -> Any:
    """Shows the week, on a terminal."""
    return lambda done, total: say_over(f"{what}: week {done} of {total}")


def table(found: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    lines = [f"{'':30s}{'floor':>8s}{'target':>8s}{'moonshot':>9s}{'alarm':>7s} {'ours':>9s}   95 % of drawn days"]
    full = found["arms"][FULL]
    for name, goal in GOALS.items():
        low, high = full["interval"][name]
        alarm = "" if goal.alarm is None else f"{goal.alarm:g}"
        goals = f"{goal.floor:8g}{goal.target:8g}{goal.moonshot:9g}{alarm:>7s}"
        lines.append(f"{name:30s}{goals} {full['mean'][name]:9.4f}   {low:.4f} to {high:.4f}")
    lines += ["", f"{'':30s}{'AUC':>8s}{'AP':>8s}{'CP@100':>8s}{'ECE':>9s}{'mean p/base':>12s}"]
    for name, arm in found["arms"].items():
        mean = arm["mean"]
        cells = "".join(f"{mean[each]:8.3f}" for each in HEADLINE)
        lines.append(f"{name:30s}{cells}{mean['ece']:9.4f}{mean['mean_over_base']:12.2f}")
    cells = "".join(f"{value:8.3f}" for value in BOOK_TUNED)
    lines += [f"{'the book, tuned, test weeks':30s}{cells}", "", f"{'first week: ours | the book':30s}"]
    for name, mine in found["models"].items():
        ours, theirs = ("".join(f"{value:8.3f}" for value in each) for each in (mine.values(), BOOK_WEEK[name]))
        lines.append(f"{name:30s}{ours}  |{theirs}")
    share = found["knowable"]["knowable"]
    lines += [
        "",
        f"{share:.1%} of the frauds left a trace before they happened; who finds many more has seen the answer.",
    ]
    return lines


def alarms(mean: Mapping[str, float]) -> list[str]:
    """Numbers too good to be true."""
    return [
        f"{name} is {mean[name]:.4f}, above {goal.alarm:g}: a leak until disproved"
        for name, goal in GOALS.items()
        if goal.alarm is not None and mean[name] > goal.alarm
    ]


def last_line(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Our two headlines, in the names of the issue."""
    return {
        part: {theirs: round(found["arms"][arm]["mean"][ours], 5) for ours, theirs in LAST_LINE.items()}
        for part, arm in (("full", FULL), ("base", BASE))
    }


def rounded(value: Any) -> Any:
    """Five digits are enough for a file; what is undefined is null."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 5)
    return value


def main(words: Sequence[str] | None = None) -> int:
    """The command; 1 above an alarm, or when the looks are used up."""
    options = argparse.ArgumentParser(prog="make bench-quality", description=__doc__)
    options.add_argument("--folds", choices=tuple(WEEKS), default=os.environ.get("FOLDS") or "test")
    options.add_argument("--data", type=Path, default=find_data())
    asked = options.parse_args(words)
    if asked.data is None:
        say(HOW_TO_GET)
        return 0
    code, looks = fingerprint(), looked_with(LOOKS)
    number = looks.index(code) + 1 if code in looks else len(looks) + 1
    if asked.folds == "test" and number > MOST_LOOKS:
        say(f"bench-quality: {MOST_LOOKS} looks are used up ({LOOKS.name}); develop with FOLDS=validation")
        return 1
    file_map = read_map(ROOT / "tests" / "handbook.toml")
    stop = moment_ms(WEEKS[asked.folds][1], 0)
    dataset = read_dataset(asked.data, file_map, stop, report=lambda rows: say_over(f"{rows:,} purchases folded"))
    found = run(dataset, asked.folds, tuple(ARMS))
    summary = last_line(found)
    if asked.folds == "test":
        say(f"look {number} of at most {MOST_LOOKS}" + (", again" if code in looks else ""))
        if code not in looks:
            with LOOKS.open("a", encoding="utf-8") as log:
                log.write(look_line(number, summary, code))
    FIGURES.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    for line in table(found):
        sys.stdout.write(line + "\n")
    reasons = alarms(found["arms"][FULL]["mean"])
    for reason in reasons:
        say(f"ALARM: {reason}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    say(f"{peak:.1f} GiB of memory at most")
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
