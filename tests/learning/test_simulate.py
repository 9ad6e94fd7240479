"""The simulated town is ordered and repeatable, and its claims come when they should."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.simulate import (
    CATEGORIES,
    FRIENDLY,
    SCENARIOS,
    Drift,
    World,
    chunk_of,
    labels,
    populate,
    simulate,
    transactions,
)

WORLD = World(customers=2_000, days=120)


@dataclass(frozen=True, slots=True)
class History:
    """A whole world: one row = one transaction."""

    rows: npt.NDArray[np.void]
    truth: npt.NDArray[np.void]


@pytest.fixture(scope="module")
def history() -> History:
    chunks = list(simulate(WORLD))
    return History(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("rows", "truth")))


def test_same_seed_same_bytes_and_any_day_alone() -> None:
    world = replace(WORLD, customers=300, days=12)
    first, second = list(simulate(world)), list(simulate(world))
    assert [chunk.rows.tobytes() + chunk.truth.tobytes() for chunk in first] == [
        chunk.rows.tobytes() + chunk.truth.tobytes() for chunk in second
    ]
    assert chunk_of(world, populate(world), 9).rows.tobytes() == first[9].rows.tobytes()


def test_in_order_of_time(history: History) -> None:
    assert (np.diff(history.rows["event_time"]) >= 0).all()
    days = (history.rows["event_time"] - WORLD.start_ms) // DAY_MS
    assert days[0] == 0 and days[-1] == WORLD.days - 1


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
