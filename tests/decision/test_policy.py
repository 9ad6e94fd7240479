"""The cheapest answer wins, and more suspicion never makes us kinder."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraud_nb.decision.policy import (
    OUTCOMES,
    InvalidPolicy,
    Policy,
    capacity_price,
    count_alerts,
    decide,
    decide_all,
    expected_costs,
    policy_from_dict,
    policy_to_dict,
)
from fraud_nb.domain.money import MISSING_AMOUNT
from fraud_nb.domain.schema import Outcome

shares = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
money = st.integers(0, 20_000)
policies = st.builds(
    Policy,
    chargeback_fee_minor=money,
    loss_share=shares,
    margin_share=shares,
    false_decline_minor=money,
    review_cost_minor=money,
    review_catch_rate=shares,
    challenge_cost_minor=money,
    challenge_abandon_rate=shares,
    challenge_catch_rate=shares,
    alert_price_minor=money,
    may_decline=st.booleans(),
    missing_amount_minor=money,
)
amounts = st.integers(MISSING_AMOUNT, 1_000_000)
probabilities = st.integers(0, 1_000).map(lambda thousandths: thousandths / 1_000)
GRID = np.arange(0, 1_001) / 1_000


def slow_costs(probability: float, amount: int, policy: Policy) -> dict[Outcome, float]:
    """The table of the notebook, spelled out once more."""
    known = policy.missing_amount_minor if amount < 0 else amount
    loss = policy.loss_share * known + policy.chargeback_fee_minor
    margin = policy.margin_share * known
    genuine = 1 - probability
    costs = {
        Outcome.APPROVE: probability * loss,
        Outcome.CHALLENGE: probability * (1 - policy.challenge_catch_rate) * loss
        + genuine * policy.challenge_abandon_rate * margin
        + policy.challenge_cost_minor
        + policy.alert_price_minor,
        Outcome.REVIEW: probability * (1 - policy.review_catch_rate) * loss
        + policy.review_cost_minor
        + policy.alert_price_minor,
        Outcome.DECLINE: genuine * (margin + policy.false_decline_minor),
    }
    if not policy.may_decline:
        del costs[Outcome.DECLINE]
    return costs


@given(probabilities, amounts, policies)
def test_the_cheapest_outcome_wins(probability: float, amount: int, policy: Policy) -> None:
    costs = slow_costs(probability, amount, policy)
    outcome = decide(probability, None if amount < 0 else amount, policy)
    assert costs[outcome] <= min(costs.values()) + 1e-6


@given(amounts, policies)
@settings(max_examples=60)
def test_more_suspicion_is_never_kinder(amount: int, policy: Policy) -> None:
    outcomes = decide_all(GRID, np.full(len(GRID), amount), policy)
    approved = [outcome is Outcome.APPROVE for outcome in outcomes]
    declined = [outcome is Outcome.DECLINE for outcome in outcomes]
    assert approved == sorted(approved, reverse=True)
    assert declined == sorted(declined)


@given(amounts, policies)
@settings(max_examples=60)
def test_the_least_cost_is_the_lower_edge_of_straight_lines(amount: int, policy: Policy) -> None:
    least = expected_costs(GRID, np.full(len(GRID), amount), policy).min(axis=1)
    assert (np.diff(least, 2) <= 1e-6).all()  # concave


@given(policies)
def test_a_policy_survives_the_manifest(policy: Policy) -> None:
    assert policy_from_dict(msgspec.json.decode(msgspec.json.encode(policy_to_dict(policy)))) == policy


@given(policies, st.integers(0, 130), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_the_capacity_price_is_the_lowest_that_keeps_to_it(policy: Policy, alerts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability, amount = rng.random(100) ** 3, rng.integers(-1, 100_000, 100)
    price = capacity_price(probability, amount, policy, alerts)

    def alerts_at(price: int) -> int:
        return count_alerts(probability, amount, msgspec.structs.replace(policy, alert_price_minor=price))

    assert alerts_at(price) <= alerts
    assert price == 0 or alerts_at(price - 1) > alerts


def test_nonsense_is_refused() -> None:
    for fields in ({"loss_share": 2}, {"version": 0}, {"review_cost_minor": -1}, {"unknown": 1}, {"loss_share": "x"}):
        with pytest.raises(InvalidPolicy):
            policy_from_dict(fields)
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            decide(probability, 100, Policy())
    assert len(OUTCOMES) == len(Outcome)
