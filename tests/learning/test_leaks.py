"""Two alarms for features that know too much: labels that mean nothing must teach nothing, and a jump is a leak."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import xgboost as xgb

from fraud_nb.decision.bundle import margins_of
from fraud_nb.decision.policy import Policy
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.dataset import History, Labelled, Split, fold_history, split_by_time, targets, thin_negatives
from fraud_nb.learning.metrics import average_precision, bootstrap, measure
from fraud_nb.learning.simulate import World, labelled, simulate
from fraud_nb.learning.train import Recipe, fit, gate, parameters_of, score

WORLD = World(customers=400, days=100, fraud_rate=0.01)
END_MS = WORLD.start_ms + WORLD.days * DAY_MS
ALL_CLAIMS_MS = END_MS + 60 * DAY_MS  # none comes later
HORIZON_MS = 14 * DAY_MS
RECIPE = Recipe(rounds=60, learning_rate=0.1, threads=1)
PERMUTATIONS = 5
Truth = npt.NDArray[np.bool_]
Days = Sequence[Sequence[Labelled]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says about the last days, and what was claimed about them in the end."""

    measured: dict[str, float]
    low: float  # the lower end of its average precision


def split_of(history: History) -> Split:
    """Train as of the first test day, with what was known then."""
    times = history.events["event_time"]
    return split_by_time(times, END_MS + HORIZON_MS, HORIZON_MS, test_days=25, calibration_days=12, warmup_days=10)


def answer(history: History) -> Answer:
    """A model as the job `retrain` makes it, and its figures."""
    split = split_of(history)
    parts = [
        (history.vectors[rows], targets(history, rows, split.trained_at_ms))
        for rows in (split.train, split.calibration)
    ]
    fitted = fit(RECIPE, FEATURE_NAMES, *parts[0], None, *parts[1])
    _, probabilities = score(fitted, history.vectors[split.test])
    is_fraud = targets(history, split.test, ALL_CLAIMS_MS)
    events, buyers = history.events[split.test], [history.customers[row] for row in split.test.tolist()]
    days = events["event_time"] // DAY_MS
    measured = measure(probabilities, is_fraud, events["amount"], buyers, days, Policy())
    return Answer(measured, bootstrap(probabilities, is_fraud, days, seed=1, rounds=50)["average_precision"][0])


def precision(history: History) -> tuple[float, Truth]:
    """Average precision of the order alone (labels by lot cannot be calibrated), and the truth of the test."""
    split = split_of(history)
    rows = np.concatenate([split.train, split.calibration])
    rows, weights = thin_negatives(rows, targets(history, rows, split.trained_at_ms), keep=0.25, seed=1)
    known = targets(history, rows, split.trained_at_ms)
    matrix = xgb.QuantileDMatrix(
        history.vectors[rows], known, weight=weights, max_bin=RECIPE.max_bin, nthread=RECIPE.threads
    )
    booster = xgb.train(parameters_of(RECIPE), matrix, RECIPE.rounds)
    is_fraud = targets(history, split.test, ALL_CLAIMS_MS)
    return average_precision(margins_of(booster, history.vectors[split.test]).astype(np.float64), is_fraud), is_fraud


def about(purchase: Labelled, source: Labelled) -> Labelled:
    """The claims of another purchase, as if they were about this one: after the same delay."""
    (mine, _), (other, claims) = purchase, source
    later = mine.event_time - other.event_time
    return mine, [
        msgspec.structs.replace(claim, transaction_id=mine.transaction_id, label_time=claim.label_time + later)
        for claim in claims
    ]


def permuted(days: Days, seed: int) -> Iterator[Labelled]:
    """As many claims on each day, about purchases drawn by lot."""
    rng = np.random.default_rng(seed)
    for day in days:
        yield from (about(each, day[source]) for each, source in zip(day, rng.permutation(len(day)), strict=True))


def with_column(history: History, values: npt.NDArray[np.float32]) -> History:
    """The history with one column exchanged for another."""
    vectors = history.vectors.copy()
    vectors[:, FEATURE_NAMES.index("merchant_frauds_14d")] = values
    return replace(history, vectors=vectors)


def in_the_end(history: History) -> Truth:
    """All that was ever claimed."""
    return targets(history, np.arange(len(history.events)), ALL_CLAIMS_MS)


def frauds_of_the_day(history: History, owners: Sequence[object]) -> npt.NDArray[np.float32]:
    """What a careless `groupby` on the finished table gives: frauds of the same owner on the same day."""
    _, owner = np.unique(np.asarray(owners), return_inverse=True)
    _, group = np.unique([owner, history.events["event_time"] // DAY_MS], axis=1, return_inverse=True)
    return np.bincount(group, in_the_end(history))[group].astype(np.float32)


@pytest.fixture(scope="module")
def days() -> Days:
    return [labelled(chunk) for chunk in simulate(WORLD)]


@pytest.fixture(scope="module")
def history(days: Days) -> History:
    return fold_history(each for day in days for each in day)


@pytest.fixture(scope="module")
def drawn_by_lot(days: Days) -> list[History]:
    """Tiles that read labels are folded from the permuted ones."""
    return [fold_history(permuted(days, seed)) for seed in range(PERMUTATIONS)]


@pytest.fixture(scope="module")
def honest(history: History) -> Answer:
    return answer(history)


def allowed(is_fraud: Truth) -> float:
    """Three standard errors of the mean average precision of orders without any sense."""
    rng = np.random.default_rng(0)
    luck = [average_precision(rng.random(len(is_fraud)), is_fraud) for _ in range(200)]
    return 3 * float(np.std(luck)) / PERMUTATIONS**0.5


def test_permuting_moves_claims_and_nothing_else(days: Days) -> None:
    before, after = [each for day in days for each in day], list(permuted(days, 1))
    assert [purchase for purchase, _ in before] == [purchase for purchase, _ in after]
    assert all(claim.transaction_id == purchase.transaction_id for purchase, claims in after for claim in claims)
    delays = [
        sorted(claim.label_time - purchase.event_time for purchase, claims in told for claim in claims)
        for told in (before, after)
    ]
    assert delays[0] == delays[1]
    stayed = sum(bool(mine) and bool(other) for (_, mine), (_, other) in zip(before, after, strict=True))
    assert stayed < 0.05 * len(delays[0])


def test_labels_drawn_by_lot_teach_nothing(drawn_by_lot: list[History], history: History) -> None:
    answers = [precision(each) for each in drawn_by_lot]
    is_fraud = answers[0][1]
    found, base = float(np.mean([value for value, _ in answers])), float(is_fraud.mean())
    assert all(truth.sum() == is_fraud.sum() for _, truth in answers), "claims leave their day"
    assert abs(found - base) <= allowed(is_fraud), f"average precision {found:.4f}, share of fraud {base:.4f}: a leak"
    assert precision(history)[0] > 20 * base, "the labels of the town do teach something"


def test_a_row_that_knows_its_own_label_is_found_so(drawn_by_lot: list[History]) -> None:
    """The alarm above works: with this column it rings at the first permutation."""
    history = drawn_by_lot[0]
    peeking = with_column(history, frauds_of_the_day(history, history.events["merchant"]))
    found, is_fraud = precision(peeking)
    assert found > is_fraud.mean() + 10 * allowed(is_fraud)


def test_a_label_known_too_early_trips_the_gate(history: History, honest: Answer) -> None:
    """The row's own label is left out, so that permuting could not see it; those of the hours around it are there."""
    others = frauds_of_the_day(history, history.customers) - in_the_end(history)
    peeking = answer(with_column(history, others))
    refusals = gate(peeking.measured, honest.measured, champion_low=honest.low)
    assert any("average_precision" in reason and "leak until disproved" in reason for reason in refusals), refusals


def test_a_column_that_contains_the_answer_trips_the_gate_without_a_champion(history: History, honest: Answer) -> None:
    magic = answer(with_column(history, frauds_of_the_day(history, history.events["merchant"])))
    assert any("auc" in reason and "leak until disproved" in reason for reason in gate(magic.measured, None))
    assert not any("leak" in reason for reason in gate(honest.measured, None))
