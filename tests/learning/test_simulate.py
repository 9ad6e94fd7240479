"""Gates of the simulator: ordered, repeatable, and neither trivial nor hopeless for a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import xgboost
from sklearn.metrics import average_precision_score, roc_auc_score

from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.dataset import fold_history
from fraud_nb.learning.simulate import (
    CATEGORIES,
    FRIENDLY,
    GENUINE,
    SCENARIOS,
    Drift,
    World,
    chunk_of,
    labelled,
    labels,
    populate,
    simulate,
    transactions,
)

WORLD = World(customers=2_000, days=120)
WARM_UP, TRAIN_END, TEST_START = 20, 83, 90  # days; a week between, in which labels ripen
Table = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class History:
    """A whole world: one row = one transaction."""

    rows: npt.NDArray[np.void]
    truth: npt.NDArray[np.void]
    day: npt.NDArray[np.int64]
    features: Table
    stateless: Table  # amount, hour, weekday, category, place


@pytest.fixture(scope="module")
def history() -> History:
    chunks = list(simulate(WORLD))
    rows, truth = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("rows", "truth"))
    features = fold_history(purchase for chunk in chunks for purchase in labelled(chunk)).vectors
    place = np.column_stack([rows["category"], rows["latitude_e6"], rows["longitude_e6"]])
    stateless = np.hstack([features[:, :3], place.astype(np.float32)])
    return History(rows, truth, (rows["event_time"] - WORLD.start_ms) // DAY_MS, features, stateless)


def probabilities(history: History, columns: Table) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """A model's probabilities for the last part of the world, and which rows those are."""
    train = (history.day >= WARM_UP) & (history.day < TRAIN_END)
    test = history.day >= TEST_START
    model = xgboost.XGBClassifier(
        n_estimators=200,
        max_depth=4,
        learning_rate=0.06,
        min_child_weight=1,
        subsample=0.8,
        colsample_bytree=0.5,
        base_score=0.5,
        max_bin=1024,
        n_jobs=1,
        random_state=0,
    ).fit(columns[train], history.truth["is_fraud"][train])
    return model.predict_proba(columns[test])[:, 1], test


def auc(is_fraud: Sequence[bool], values: Table) -> float:
    """How well one column separates, in either direction; missing comes first."""
    area = float(roc_auc_score(is_fraud, np.nan_to_num(values, nan=-1.0)))
    return max(area, 1 - area)


def test_same_seed_same_bytes_and_any_day_alone() -> None:
    world = replace(WORLD, customers=300, days=12)
    first, second = list(simulate(world)), list(simulate(world))
    assert [chunk.rows.tobytes() + chunk.truth.tobytes() for chunk in first] == [
        chunk.rows.tobytes() + chunk.truth.tobytes() for chunk in second
    ]
    assert chunk_of(world, populate(world), 9).rows.tobytes() == first[9].rows.tobytes()


def test_in_order_of_time(history: History) -> None:
    assert (np.diff(history.rows["event_time"]) >= 0).all()
    assert history.day.min() == 0 and history.day.max() == WORLD.days - 1


def test_fraud_rate_and_mix(history: History) -> None:
    fraud = history.truth[history.truth["is_fraud"]]
    assert len(fraud) / len(history.truth) == pytest.approx(WORLD.fraud_rate, rel=0.15)
    assert 0.08 <= (fraud["scenario"] == FRIENDLY).mean() <= 0.16
    assert set(fraud["scenario"]) == set(range(len(SCENARIOS)))


def test_label_delays(history: History) -> None:
    fraud = history.truth["is_fraud"]
    known = history.truth["label_time"] >= 0
    delay = (history.truth["label_time"] - history.rows["event_time"])[fraud & known] / DAY_MS
    assert 0.55 <= (delay <= 7).mean() <= 0.65
    assert delay.min() > 0 and delay.max() <= 60
    assert 0.04 <= 1 - known[fraud].mean() <= 0.10
    assert known[~fraud].mean() == pytest.approx(0.0001, rel=0.4)


def test_domain_types_hide_the_truth() -> None:
    chunk = chunk_of(WORLD, populate(WORLD), 5)
    day, claims = transactions(chunk), labels(chunk)
    assert len({transaction.transaction_id for transaction in day}) == len(day)
    assert {transaction.category for transaction in day} <= {name for name, *_ in CATEGORIES}
    assert {claim.transaction_id for claim in claims} <= {transaction.transaction_id for transaction in day}
    assert [claim.label_time for claim in claims] == sorted(claim.label_time for claim in claims)


def test_drift_schedule() -> None:
    changes = (Drift(0, "bust_out", 0.0), Drift(20, "bust_out", 5.0), Drift(20, "friendly", 0.0))
    bust_out = [scenario.name for scenario in SCENARIOS].index("bust_out")
    chunks = list(simulate(replace(WORLD, days=40, drift=changes)))
    early, late = (np.concatenate([chunk.truth["scenario"] for chunk in part]) for part in (chunks[:20], chunks[20:]))
    assert (early == bust_out).sum() == 0 and (late == bust_out).sum() > 20
    assert (early == FRIENDLY).sum() > 0 and (late == FRIENDLY).sum() == 0


def test_stateless_fields_are_not_enough(history: History) -> None:
    probability, test = probabilities(history, history.stateless)
    is_fraud = history.truth["is_fraud"][test]
    assert 0.60 <= auc(is_fraud, probability) <= 0.80
    assert average_precision_score(is_fraud, probability) < 0.25


def test_no_single_feature_gives_the_thief_away(history: History) -> None:
    late = history.day >= WARM_UP
    areas = {
        name: auc(history.truth["is_fraud"][late], history.features[late, column])
        for column, name in enumerate(FEATURE_NAMES)
    }
    assert {name: area for name, area in areas.items() if area > 0.85} == {}


def test_history_finds_most_but_not_all(history: History) -> None:
    probability, test = probabilities(history, history.features)
    is_fraud, scenario = history.truth["is_fraud"][test], history.truth["scenario"][test]
    assert 0.90 <= auc(is_fraud, probability) <= 0.95
    assert average_precision_score(is_fraud, probability) > 0.30
    regretted = (scenario == FRIENDLY) | (scenario == GENUINE)
    stolen = scenario != FRIENDLY
    friendly = auc(scenario[regretted] == FRIENDLY, probability[regretted])
    assert friendly < 0.80 < auc(is_fraud[stolen], probability[stolen])
