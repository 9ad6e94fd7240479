"""Every feature has words, and the strongest come first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fraud_nb.decision.reasons import PHRASES, reasons, words
from fraud_nb.features.catalogue import FEATURE_NAMES

WIDTH = len(FEATURE_NAMES)


def test_every_feature_has_words() -> None:
    assert set(PHRASES) == set(FEATURE_NAMES)


@pytest.mark.parametrize("name", FEATURE_NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, 5.0, 13.7, 123_456.0, float("nan")])
def test_words_are_words(name: str, value: float) -> None:
    text = words(name, value, "EUR")
    assert text and "{" not in text and "nan" not in text and "None" not in text and text == text.strip()
    assert "_" not in text  # words, not feature names


@pytest.mark.parametrize(
    ("name", "value", "currency", "text"),
    [
        ("customer_count_1h", 7, "EUR", "7 purchases in the last hour"),
        ("customer_count_1h", 1, "EUR", "1 purchase in the last hour"),
        ("customer_sum_24h", 123_450, "EUR", "1234.50 EUR spent in the last 24 hours"),
        ("amount", 1_500, "JPY", "an amount of 1500 JPY"),
        ("amount", float("nan"), "EUR", "the amount in the base currency is not told"),
        ("amount_to_median", 13, "EUR", "13 times the customer's usual amount"),
        ("same_device_count", 0, "EUR", "a device the customer has never used"),
        ("same_device_count", float("nan"), "EUR", "the device is not told"),
        ("is_night", 1, "EUR", "between midnight and 6 UTC"),
        ("seconds_since_last", 40, "EUR", "40 seconds after the last purchase"),
        ("weekday", 0, "EUR", "on a Monday"),
    ],
)
def test_words(name: str, value: float, currency: str, text: str) -> None:
    assert words(name, value, currency) == text


@given(st.lists(st.floats(-5, 5, width=32), min_size=WIDTH + 1, max_size=WIDTH + 1))
def test_strongest_first_and_only_towards_fraud(pushes: list[float]) -> None:
    vectors = np.zeros((1, WIDTH), np.float32)
    (found,) = reasons(vectors, np.array([pushes], np.float32), "EUR")
    positive = sorted((push for push in pushes[:-1] if push > 0), reverse=True)
    assert len(found) == min(3, len(positive))
    shares = [push / sum(positive) for push in positive[:3]]
    assert [reason.share for reason in found] == pytest.approx(shares, rel=1e-9)
    assert all(reason.code.lower() in FEATURE_NAMES for reason in found)


def test_names_pick_the_columns() -> None:
    vectors = np.zeros((2, WIDTH), np.float32)
    vectors[:, FEATURE_NAMES.index("customer_count_1h")] = [7, 2]
    found = reasons(vectors, np.array([[1, 0], [-1, 0]], np.float32), "EUR", ("customer_count_1h",))
    assert [[reason.text for reason in row] for row in found] == [["7 purchases in the last hour"], []]
    with pytest.raises(ValueError, match="shape"):
        reasons(vectors, np.zeros((2, 5), np.float32), "EUR")
