"""Gates of the simulated town: hard for the right reasons, neither trivial nor hopeless for a model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import xgboost as xgb
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fraud_nb.decision.bundle import margins_of
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.dataset import Labelled, Split, fold_history, split_by_time, targets, thin_negatives
from fraud_nb.learning.metrics import auc, average_precision, recall_at_fpr
from fraud_nb.learning.simulate import FRIENDLY, World, labelled, simulate
from fraud_nb.learning.train import Recipe, parameters_of

WORLD = World(days=150)  # 2,000 customers, 3 frauds in 1,000 purchases
END_MS = WORLD.start_ms + WORLD.days * DAY_MS
ALL_CLAIMS_MS = END_MS + 60 * DAY_MS  # none comes later
HORIZON_MS = 14 * DAY_MS
STATELESS = ("amount", "hour", "weekday", "category", "latitude", "longitude")
RECIPE = Recipe(rounds=200, learning_rate=0.07, threads=1)
pytestmark = pytest.mark.timeout(600)  # the town is folded twice, within the first test
Bools = npt.NDArray[np.bool_]
Table = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Town:
    """A whole world; one row = one purchase."""

    vectors: Table
    at_once: Table  # the same, if every claim were known in the moment of its purchase
    stateless: Table  # columns as in STATELESS
    truth: npt.NDArray[np.void]  # dtype simulate.TRUTH
    claimed: Bools  # in the end, rightly or not: what a bank can measure
    known: Bools  # claimed by the beginning of the test
    split: Split

    @property
    def learned(self) -> npt.NDArray[np.intp]:
        return np.concatenate([self.split.train, self.split.calibration])


def without_delay(purchases: Iterable[Labelled]) -> Iterator[Labelled]:
    for purchase, claims in purchases:
        yield purchase, [msgspec.structs.replace(claim, label_time=purchase.event_time) for claim in claims]


@pytest.fixture(scope="module")
def town() -> Town:
    chunks = list(simulate(WORLD))
    purchases = [each for chunk in chunks for each in labelled(chunk)]
    history, at_once = fold_history(purchases), fold_history(without_delay(purchases)).vectors
    rows, truth = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("rows", "truth"))
    times, everything = history.events["event_time"], np.arange(len(rows))
    split = split_by_time(times, END_MS + HORIZON_MS, HORIZON_MS, test_days=40, calibration_days=1, warmup_days=20)
    place = np.column_stack([rows["category"], rows["latitude_e6"], rows["longitude_e6"]])
    return Town(
        history.vectors,
        at_once,
        np.hstack([history.vectors[:, :3], place.astype(np.float32)]),
        truth,
        targets(history, everything, ALL_CLAIMS_MS),
        targets(history, everything, split.trained_at_ms),
        split,
    )


def trees(town: Town, columns: Table) -> npt.NDArray[np.float64]:
    """Margins of the test rows, of a model that knows what was known at their beginning."""
    rows, weights = thin_negatives(town.learned, town.known[town.learned], keep=0.25, seed=1)
    matrix = xgb.QuantileDMatrix(
        columns[rows], town.known[rows], weight=weights, max_bin=RECIPE.max_bin, nthread=RECIPE.threads
    )
    booster = xgb.train(parameters_of(RECIPE), matrix, RECIPE.rounds)
    return margins_of(booster, columns[town.split.test]).astype(np.float64)


@pytest.fixture(scope="module")
def margins(town: Town) -> npt.NDArray[np.float64]:
    return trees(town, town.vectors)


def test_share_of_fraud(town: Town) -> None:
    assert 0.002 <= town.truth["is_fraud"].mean() <= 0.005


def test_some_claims_nobody_can_foresee(town: Town) -> None:
    """The customer's own purchase, disputed later, and honest mistakes."""
    genuine_behaviour = ~town.truth["is_fraud"] | (town.truth["scenario"] == FRIENDLY)
    assert 0.15 <= genuine_behaviour[town.claimed].mean() <= 0.25


def test_the_purchase_alone_is_not_enough(town: Town) -> None:
    is_fraud, found = town.claimed[town.split.test], trees(town, town.stateless)
    assert 0.60 <= auc(found, is_fraud) <= 0.80
    assert average_precision(found, is_fraud) < 0.25


def test_no_single_column_gives_the_thief_away(town: Town) -> None:
    late = np.arange(town.split.train[0], len(town.claimed))
    columns = (*zip(FEATURE_NAMES, town.vectors.T, strict=True), *zip(STATELESS, town.stateless.T, strict=True))
    areas = {
        name: auc(np.nan_to_num(column[late], nan=-1.0).astype(np.float64), town.claimed[late])
        for name, column in columns
    }
    assert {name: area for name, area in areas.items() if not 0.15 <= area <= 0.85} == {}


def test_history_finds_most_but_not_all(town: Town, margins: npt.NDArray[np.float64]) -> None:
    is_fraud = town.claimed[town.split.test]
    assert 0.90 <= auc(margins, is_fraud) <= 0.95
    assert 0.45 <= average_precision(margins, is_fraud) <= 0.70
    assert 0.60 <= recall_at_fpr(margins, is_fraud, 0.01) <= 0.80


def test_friendly_fraud_stays_hidden(town: Town, margins: npt.NDArray[np.float64]) -> None:
    truth = town.truth[town.split.test]
    friendly = truth["scenario"] == FRIENDLY
    rest, stolen = friendly | ~truth["is_fraud"], ~friendly
    assert auc(margins[rest], friendly[rest]) < 0.85 < 0.95 < auc(margins[stolen], truth["is_fraud"][stolen])


def test_straight_lines_are_not_enough(town: Town, margins: npt.NDArray[np.float64]) -> None:
    """A logistic regression, scaled and with gaps filled, is clearly worse than trees."""
    rows, weights = thin_negatives(town.learned, town.known[town.learned], keep=0.25, seed=1)
    line = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(max_iter=200))
    line.fit(town.vectors[rows].astype(np.float64), town.known[rows], logisticregression__sample_weight=weights)
    found, is_fraud = (
        line.decision_function(town.vectors[town.split.test].astype(np.float64)),
        town.claimed[town.split.test],
    )
    assert average_precision(found, is_fraud) < average_precision(margins, is_fraud) - 0.05


def test_the_label_delay_costs_something(town: Town, margins: npt.NDArray[np.float64]) -> None:
    """Whoever measures without it is told too much."""
    is_fraud = town.claimed[town.split.test]
    assert average_precision(trees(town, town.at_once), is_fraud) > average_precision(margins, is_fraud) + 0.05
