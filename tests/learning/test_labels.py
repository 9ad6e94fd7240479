"""Labels as of a moment, against the plain definition."""

import random

import numpy as np
import pytest

from fraud_nb.domain.schema import Label
from fraud_nb.learning.labels import claims_as_of, delays_days, is_fraud_as_of, mature_before

DAY = 86_400_000


def some_labels(seed: int, count: int = 60) -> list[Label]:
    """Labels about few transactions at few times, so that equal times and overturned claims abound."""
    chance = random.Random(seed)
    return [Label(f"t{chance.randrange(8)}", chance.random() < 0.5, chance.randrange(10)) for _ in range(count)]


def known(labels: list[Label], as_of_ms: int) -> dict[str, bool]:
    """Told in order of time, later words overwrite; sorting is stable."""
    told = sorted((label for label in labels if label.label_time <= as_of_ms), key=lambda label: label.label_time)
    return {label.transaction_id: label.is_fraud for label in told}


@pytest.mark.parametrize("seed", range(20))
def test_newest_word_counts_and_the_future_does_not(seed: int) -> None:
    labels = some_labels(seed)
    for as_of_ms in range(-1, 11):
        assert claims_as_of(labels, as_of_ms) == known(labels, as_of_ms)


def test_any_iterable_and_silence_is_genuine() -> None:
    labels = some_labels(1)
    ids = ["t3", "never heard of", "t0", "t3"]
    expected = [known(labels, 5).get(name, False) for name in ids]
    assert is_fraud_as_of(ids, iter(labels), 5).tolist() == expected
    assert is_fraud_as_of([], labels, 5).dtype == np.bool_


def test_delay_is_that_of_the_first_claim() -> None:
    labels = [
        Label("a", True, 9 * DAY),
        Label("a", True, 3 * DAY),  # earlier, delivered later
        Label("a", False, 2 * DAY),  # not a claim
        Label("b", False, 5 * DAY),
        Label("c", True, 12 * DAY),
        Label("elsewhere", True, 4 * DAY),
    ]
    delays = delays_days(["a", "b", "c"], np.array([1, 1, 11], np.int64) * DAY, labels)
    assert delays.tolist() == [1.0, 2.0]
    assert delays_days([], np.zeros(0, np.int64), labels).tolist() == []


def test_mature_means_known() -> None:
    """A claim exactly one horizon late is known for the youngest mature purchase, not yet for the next."""
    horizon, as_of_ms = 30 * DAY, 100 * DAY
    youngest = mature_before(as_of_ms, horizon) - 1
    claims = [Label("mature", True, youngest + horizon), Label("young", True, youngest + 2 + horizon)]
    assert is_fraud_as_of(["mature", "young"], claims, as_of_ms).tolist() == [True, False]


def test_refuses_a_negative_horizon() -> None:
    with pytest.raises(ValueError, match="horizon_ms"):
        mature_before(0, -1)
