"""Metrics against scikit-learn, brute force and the plain definition."""

from itertools import permutations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from fraud_nb.decision.policy import OUTCOMES, Policy, decide, expected_costs
from fraud_nb.domain.schema import Outcome
from fraud_nb.learning.metrics import (
    at_alert_budget,
    auc,
    average_precision,
    bootstrap,
    brier,
    card_precision,
    ece,
    mean_over_base,
    measure,
    ranking,
    recall_at_fpr,
    saved_minor,
    value_caught,
)

Reals = npt.NDArray[np.float64]
Truth = npt.NDArray[np.bool_]
NAMES = {
    "average_precision",
    "auc",
    "recall_at_fpr_0_1pct",
    "recall_at_fpr_1pct",
    "recall_at_fpr_5pct",
    "recall_at_alerts_0_1pct",
    "recall_at_alerts_0_5pct",
    "recall_at_alerts_1pct",
    "precision_at_alerts_0_1pct",
    "precision_at_alerts_0_5pct",
    "precision_at_alerts_1pct",
    "fpr_at_alerts_0_1pct",
    "fpr_at_alerts_0_5pct",
    "fpr_at_alerts_1pct",
    "card_precision_100",
    "card_precision_100_max",
    "value_caught_at_alerts_0_5pct",
    "brier",
    "ece",
    "mean_over_base",
    "alert_rate",
    "policy_recall",
    "policy_fpr",
    "saved_minor_per_1000",
    "transactions",
    "frauds",
}


def sample(seed: int, rows: int = 3_000, decimals: int = 2) -> tuple[Reals, Truth, Reals]:
    """Scores, most of them in ties; truth; and whole weights with many zeros."""
    rng = np.random.default_rng(seed)
    is_fraud = rng.random(rows) < 0.03
    scores = np.round(rng.normal(0.0, 1.0, rows) + 1.5 * is_fraud, decimals)
    return scores, is_fraud, rng.poisson(1.0, rows).astype(np.float64)


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("seed", range(4))
def test_ranking_equals_sklearn(seed: int, decimals: int) -> None:
    scores, is_fraud, weights = sample(seed, decimals=decimals)
    for weight in (None, weights):
        assert average_precision(scores, is_fraud, weight) == pytest.approx(
            average_precision_score(is_fraud, scores, sample_weight=weight), abs=1e-12
        )
        assert auc(scores, is_fraud, weight) == pytest.approx(
            roc_auc_score(is_fraud, scores, sample_weight=weight), abs=1e-12
        )
        rates, recalls, _ = roc_curve(is_fraud, scores, sample_weight=weight, drop_intermediate=False)
        for rate in (0.0, 0.001, 0.01, 0.05, rates[len(rates) // 2], 1.0):
            assert recall_at_fpr(scores, is_fraud, rate, weight) == pytest.approx(recalls[rates <= rate + 1e-12].max())


def test_weights_are_repeated_rows() -> None:
    scores, is_fraud, weights = sample(9)
    repeated = np.repeat(np.arange(len(scores)), weights.astype(int))
    assert ranking(scores, is_fraud, weights) == pytest.approx(ranking(scores[repeated], is_fraud[repeated]))


def test_recall_at_fpr_holds_the_rate_exactly() -> None:
    """29 of 100 genuine rows are 29 %, though 0.29 * 100 is a little less than 29 in floating point."""
    scores = np.append(np.arange(100, 0, -1.0), 71.5)  # the fraud stands below 29 genuine rows
    is_fraud = np.append(np.zeros(100, np.bool_), True)
    assert recall_at_fpr(scores, is_fraud, 0.29) == 1.0
    assert recall_at_fpr(scores, is_fraud, 0.28) == 0.0


def test_alert_budget_is_the_mean_over_orders_of_ties() -> None:
    scores = np.array([3.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    is_fraud = np.array([False, True, True, False, False, True])
    amounts = np.array([500, 700, -1, 300, 200, 100], np.int64)
    orders = [[0, *middle, 5] for middle in permutations((1, 2, 3, 4))]
    for alerts in range(1, 7):
        looked_at = [order[:alerts] for order in orders]
        caught = np.mean([is_fraud[rows].sum() for rows in looked_at])
        value = np.mean([amounts[rows][is_fraud[rows]].clip(min=0).sum() for rows in looked_at])
        expected = (caught / 3, caught / alerts, (alerts - caught) / 3)
        assert at_alert_budget(scores, is_fraud, alerts / 6) == pytest.approx(expected)
        assert value_caught(scores, is_fraud, amounts, alerts / 6) == pytest.approx(value / 800)


def handbook(scores: Reals, is_fraud: Truth, customers: list[str], days: npt.NDArray[np.int64], top: int) -> float:
    """Card precision as the Fraud Detection Handbook words it, in loops: detected cards leave."""
    precisions: list[float] = []
    detected: set[str] = set()
    for day in sorted(set(days.tolist())):
        highest: dict[str, float] = {}
        robbed = set()
        for row in np.flatnonzero(days == day).tolist():
            if customers[row] in detected:
                continue
            highest[customers[row]] = max(scores[row], highest.get(customers[row], -np.inf))
            if is_fraud[row]:
                robbed.add(customers[row])
        listed = sorted(highest, key=lambda customer: -highest[customer])[:top]
        precisions.append(len(robbed.intersection(listed)) / top)
        detected |= robbed.intersection(listed)
    return float(np.mean(precisions))


@pytest.mark.parametrize("top", [1, 20, 100])
def test_card_precision(top: int) -> None:
    scores, is_fraud, _ = sample(5, decimals=15)
    rng = np.random.default_rng(5)
    days, customers = rng.integers(0, 12, 3_000), [f"c{number}" for number in rng.integers(0, 150, 3_000)]
    value, ceiling = card_precision(scores, is_fraud, customers, days, top)
    assert value == pytest.approx(handbook(scores, is_fraud, customers, days, top))
    assert ceiling == pytest.approx(card_precision(is_fraud.astype(np.float64), is_fraud, customers, days, top)[0])


def test_brier_and_mean_over_base() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.random(1_000)
    is_fraud = rng.random(1_000) < probabilities
    assert brier(probabilities, is_fraud) == pytest.approx(brier_score_loss(is_fraud, probabilities))
    assert mean_over_base(probabilities / 4, is_fraud) == pytest.approx(probabilities.mean() / 4 / is_fraud.mean())


def test_ece_by_bins() -> None:
    rng = np.random.default_rng(3)
    probabilities = rng.beta(0.3, 3.0, 1_500)
    is_fraud = rng.random(1_500) < np.sqrt(probabilities)
    bins = np.argsort(probabilities).reshape(15, 100)
    gaps = np.abs(probabilities[bins].mean(axis=1) - is_fraud[bins].mean(axis=1))
    assert ece(probabilities, is_fraud) == pytest.approx(gaps.mean())


def test_ece_of_equal_probabilities_does_not_depend_on_the_order() -> None:
    is_fraud = np.arange(1_000) < 50
    assert ece(np.full(1_000, 0.05), is_fraud) == pytest.approx(0.0)
    assert ece(np.full(1_000, 0.25), is_fraud) == pytest.approx(0.2)


@pytest.mark.parametrize("policy", [Policy(), Policy(alert_price_minor=2_000), Policy(may_decline=False)])
def test_saved_is_the_sum_over_decisions(policy: Policy) -> None:
    rng = np.random.default_rng(4)
    probabilities = rng.beta(0.2, 1.0, 300)
    is_fraud = rng.random(300) < probabilities
    amounts = np.where(rng.random(300) < 0.1, -1, rng.integers(0, 200_000, 300))
    paid, saved = msgspec.structs.replace(policy, alert_price_minor=0), 0.0
    for probability, amount, fraud in zip(probabilities.tolist(), amounts.tolist(), is_fraud.tolist(), strict=True):
        outcome = decide(probability, None if amount < 0 else amount, policy)
        costs = expected_costs(np.array([float(fraud)]), np.array([amount]), paid)[0]
        saved += costs[0] - costs[OUTCOMES.index(outcome)]
    assert saved_minor(probabilities, amounts, is_fraud, policy) == pytest.approx(saved)


def test_saved_by_hand() -> None:
    """A fraud of 100 EUR reviewed: nine tenths of amount and fee stay, the review costs 3 EUR. A coffee is approved."""
    probabilities, amounts = np.array([0.3, 0.0001]), np.array([10_000, 300])
    assert decide(0.3, 10_000, Policy()) is Outcome.REVIEW
    saved = saved_minor(probabilities, amounts, np.array([True, False]), Policy())
    assert saved == pytest.approx(0.9 * (10_000 + 1_500) - 300)


def test_perfect_probabilities_save_most() -> None:
    rng = np.random.default_rng(6)
    probabilities = rng.beta(0.2, 3.0, 2_000)
    is_fraud, amounts = rng.random(2_000) < probabilities, rng.integers(100, 50_000, 2_000)
    saved = [
        saved_minor(guess, amounts, is_fraud, Policy())
        for guess in (is_fraud.astype(np.float64), probabilities, rng.permutation(probabilities), np.zeros(2_000))
    ]
    assert saved[0] > saved[1] > saved[2] and saved[3] == 0.0


def measured(rows: int, is_fraud: Truth) -> dict[str, float]:
    rng = np.random.default_rng(8)
    customers = [f"c{number}" for number in rng.integers(0, 40, rows)]
    return measure(
        rng.random(rows), is_fraud, rng.integers(100, 9_000, rows), customers, rng.integers(0, 3, rows), Policy()
    )


def test_measure_names_and_policy_rates() -> None:
    is_fraud = np.arange(400) % 10 == 0
    found = measured(400, is_fraud)
    assert set(found) == NAMES and not np.isnan(list(found.values())).any()
    assert found["transactions"] == 400 and found["frauds"] == 40
    alerts = found["policy_recall"] * 40 + found["policy_fpr"] * 360
    assert found["alert_rate"] == pytest.approx(alerts / 400)


@pytest.mark.parametrize("rows", [0, 400])
def test_undefined_is_nan(rows: int) -> None:
    none, every = measured(rows, np.zeros(rows, np.bool_)), measured(rows, np.ones(rows, np.bool_))
    for name in ("average_precision", "auc", "recall_at_fpr_1pct", "recall_at_alerts_1pct", "policy_recall"):
        assert np.isnan(none[name]), name
    for name in ("auc", "recall_at_fpr_1pct", "fpr_at_alerts_1pct", "policy_fpr"):
        assert np.isnan(every[name]), name
    assert set(none) == NAMES


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_refuses_scores_that_are_no_numbers(score: float) -> None:
    with pytest.raises(ValueError, match="scores"):
        average_precision(np.array([0.1, score]), np.array([True, False]))


def test_bootstrap_equals_drawing_rows() -> None:
    """The same days, drawn as rows and measured by scikit-learn."""
    scores, is_fraud, _ = sample(7, rows=1_200)
    days = np.random.default_rng(7).integers(0, 15, 1_200)
    draws = np.random.default_rng(11).multinomial(15, np.full(15, 1 / 15), 60)
    precisions, areas = [], []
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(days == day) for day in range(15) for _ in range(draw[day])])
        precisions.append(average_precision_score(is_fraud[rows], scores[rows]))
        areas.append(roc_auc_score(is_fraud[rows], scores[rows]))
    intervals = bootstrap(scores, is_fraud, days, seed=11, rounds=60)
    assert intervals["average_precision"] == pytest.approx(tuple(np.quantile(precisions, (0.025, 0.975))))
    assert intervals["auc"] == pytest.approx(tuple(np.quantile(areas, (0.025, 0.975))))
    assert set(intervals) == set(ranking(scores, is_fraud))


def test_bootstrap_sees_that_frauds_come_in_days() -> None:
    """Each day has its own difficulty: days drawn whole spread wider than rows drawn one by one."""
    rng = np.random.default_rng(12)
    days = np.repeat(np.arange(20), 200)
    is_fraud = rng.random(4_000) < 0.05
    scores = rng.normal(0, 1, 4_000) + is_fraud * rng.normal(1.5, 1.5, 20)[days]
    by_day, by_row = (bootstrap(scores, is_fraud, block, 1, 100)["auc"] for block in (days, np.arange(4_000)))
    assert by_day[1] - by_day[0] > 1.5 * (by_row[1] - by_row[0])
    assert by_day[0] < auc(scores, is_fraud) < by_day[1]


def test_bootstrap_without_frauds() -> None:
    intervals = bootstrap(np.arange(10.0), np.zeros(10, np.bool_), np.arange(10) // 2, seed=1, rounds=5)
    assert np.isnan(intervals["auc"]).all()
    assert intervals["fpr_at_alerts_1pct"] == pytest.approx((0.01, 0.01))
