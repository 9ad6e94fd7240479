"""Weekly folds against their definition, the known-robbed rule against a slow twin, and no label before its time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fraud_nb.domain.schema import Label
from fraud_nb.features.catalogue import BASE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning import prequential as module
from fraud_nb.learning.dataset import History, TooLittleHistory, fold_history, targets
from fraud_nb.learning.prequential import (
    Fold,
    Plan,
    TrackRecord,
    Yardstick,
    gain,
    known_as_robbed,
    mean_of,
    prequential,
    refit,
    reports_of,
    weekly_folds,
)
from fraud_nb.learning.simulate import World, labelled, simulate
from fraud_nb.learning.train import OWN_WORD, CalibrationError, Recipe, score

WORLD = World(customers=250, days=60, seed=11, fraud_rate=0.02)
START = WORLD.start_ms
PLAN = Plan(START + 35 * DAY_MS, START + 52 * DAY_MS, train_days=14)  # two weeks, and three days
QUICK = Recipe(rounds=8, learning_rate=0.3, depth=3, threads=1)


@pytest.fixture(scope="module")
def history() -> History:
    return fold_history(each for chunk in simulate(WORLD) for each in labelled(chunk))


@pytest.fixture(scope="module")
def folds(history: History) -> list[Fold]:
    return weekly_folds(history, PLAN)


@pytest.fixture(scope="module")
def tested(history: History, folds: list[Fold]) -> TrackRecord:
    kinds = ["even" if len(name) % 2 else "odd" for name in history.transaction_ids]
    return prequential(history, folds, QUICK, BASE_NAMES, yardstick=Yardstick(kinds=kinds, rounds=40))


def handbook_pool(history: History, start: int, stop: int, reported_from: int) -> list[int]:
    """Rows of a test week as the book's get_train_test_set keeps them, day by day, with reports at their own time."""
    times, kept = history.events["event_time"], []
    owner = dict(zip(history.transaction_ids, history.customers, strict=True))
    for morning in range(start, stop, DAY_MS):
        known = {
            owner[label.transaction_id]
            for label in history.labels
            if label.is_fraud and reported_from <= label.label_time < morning
        }
        rows = np.flatnonzero((times >= morning) & (times < min(morning + DAY_MS, stop)))
        kept += [row for row in rows.tolist() if history.customers[row] not in known]
    return kept


def test_weeks_and_windows(history: History, folds: list[Fold]) -> None:
    times = history.events["event_time"]
    assert [fold.trained_at_ms for fold in folds] == [START + day * DAY_MS for day in (35, 42, 49)]
    for fold in folds:
        end = fold.trained_at_ms - 7 * DAY_MS
        assert fold.train.tolist() == np.flatnonzero((times >= end - 14 * DAY_MS) & (times < end)).tolist()
    assert times[folds[-1].test].max() < PLAN.test_to_ms


def test_known_customers_leave_the_test(history: History, folds: list[Fold]) -> None:
    left = 0
    for fold in folds:
        start, stop = fold.trained_at_ms, min(fold.trained_at_ms + 7 * DAY_MS, PLAN.test_to_ms)
        assert fold.test.tolist() == handbook_pool(history, start, stop, start - 7 * DAY_MS)
        everybody = (history.events["event_time"] >= start) & (history.events["event_time"] < stop)
        left += int(everybody.sum()) - len(fold.test)
    assert left > 50, "nobody left: the rule was not tried"


def test_the_test_does_not_depend_on_the_training(history: History, folds: list[Fold]) -> None:
    for days in (3, None):
        others = weekly_folds(history, replace(PLAN, train_days=days, warmup_days=5))
        assert [other.test.tolist() for other in others] == [fold.test.tolist() for fold in folds]
    first = int(
        history.events["event_time"][weekly_folds(history, replace(PLAN, train_days=None, warmup_days=5))[0].train[0]]
    )
    assert START + 5 * DAY_MS <= first < START + 6 * DAY_MS


def test_a_report_counts_from_the_next_morning() -> None:
    """Of a purchase at each hour of two days; reported at noon of the first."""
    hours = np.arange(48)
    events = np.zeros(48, [("event_time", np.int64)])
    events["event_time"] = START + hours * 3_600_000
    history = History([str(hour) for hour in hours], ["ada"] * 48, events, np.zeros((48, 0), np.float32), [])
    noon = [("ada", START + 12 * 3_600_000)]
    assert known_as_robbed(history, hours, noon, START, START).tolist() == [False] * 24 + [True] * 24
    midnight = [("ada", START + DAY_MS)]
    assert not known_as_robbed(history, hours, midnight, START, START).any(), "at midnight the day has begun"
    assert not known_as_robbed(history, hours, noon, START + DAY_MS, START).any(), "forgotten"


def test_no_label_before_its_time(history: History, folds: list[Fold]) -> None:
    """Whatever becomes known after a week has begun changes nothing about its model."""
    fold = folds[0]
    late = [
        Label(label.transaction_id, not label.is_fraud, label.label_time, label.source)
        if label.label_time > fold.trained_at_ms
        else label
        for label in history.labels
    ]
    assert late != history.labels
    _, before = score(refit(history, fold, QUICK, BASE_NAMES), history.vectors[fold.test])
    _, after = score(refit(replace(history, labels=late), fold, QUICK, BASE_NAMES), history.vectors[fold.test])
    assert before.tobytes() == after.tobytes()


def test_the_test_reads_all_labels(history: History, tested: TrackRecord) -> None:
    latest = history.labels[-1].label_time
    for week in tested.weeks:
        assert week.is_fraud.tolist() == targets(history, week.fold.test, latest).tolist()


def test_drawing_every_day_once_is_the_result(
    history: History, tested: TrackRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weighted path gives what `measure` gives."""
    monkeypatch.setattr(module, "day_draws", lambda days, seed, rounds: np.ones((1, days), np.int64))
    kinds = ["even" if len(name) % 2 else "odd" for name in history.transaction_ids]
    (once,) = module.redrawn(history, tested.weeks, Yardstick(kinds=kinds))
    assert once == pytest.approx({name: tested.mean[name] for name in once})
    assert {"auc", "ece", "card_precision_100", "recall_at_fpr_1pct_odd", "saved_minor_per_1000"} <= set(once)


def test_mean_spread_and_interval(tested: TrackRecord) -> None:
    values = [week.measured["average_precision"] for week in tested.weeks]
    assert tested.mean["average_precision"] == pytest.approx(np.mean(values))
    assert tested.spread["average_precision"] == pytest.approx(np.std(values, ddof=1))
    low, high = tested.intervals()["average_precision"]
    assert 0 <= low < tested.mean["average_precision"] < high <= 1


def test_a_recipe_has_nothing_over_itself(tested: TrackRecord) -> None:
    for name, (difference, low, high) in gain(tested, tested).items():
        assert (difference == low == high == 0) or np.isnan(difference), name
    with pytest.raises(ValueError, match="other purchases"):
        gain(tested, replace(tested, weeks=tested.weeks[::-1]))


def test_mean_of_what_is_defined() -> None:
    assert mean_of([{"a": 1.0, "b": np.nan}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize("arm", ["class_weight", "smote"])
def test_other_arms_are_calibrated_without_losing_days(history: History, folds: list[Fold], arm: str) -> None:
    fitted = refit(history, folds[0], replace(QUICK, arm=arm, fraud_ratio=0.3), BASE_NAMES)  # type: ignore[arg-type]
    _, probabilities = score(fitted, history.vectors[folds[0].train])
    truth = targets(history, folds[0].train, folds[0].trained_at_ms)
    assert 0.5 < probabilities.mean() / truth.mean() < 2
    one_day = replace(folds[0], train=folds[0].train[: int(len(truth) / 20)])
    with pytest.raises(CalibrationError, match="train_days: 2 or more"):
        refit(history, one_day, replace(QUICK, arm=arm, fraud_ratio=0.3), BASE_NAMES)  # type: ignore[arg-type]


def test_who_keeps_its_own_word(history: History, folds: list[Fold]) -> None:
    """Fourteen days do; all days take turns."""
    (everything, *_) = weekly_folds(history, replace(PLAN, train_days=None, test_from_ms=START + 49 * DAY_MS))
    assert refit(history, folds[0], QUICK, BASE_NAMES).knots == OWN_WORD
    assert refit(history, everything, QUICK, BASE_NAMES).knots != OWN_WORD


def test_thinned_rows_keep_the_odds(history: History, folds: list[Fold]) -> None:
    fitted = refit(history, folds[1], QUICK, BASE_NAMES, keep_negatives=0.3)
    _, probabilities = score(fitted, history.vectors[folds[1].test])
    whole, _ = measured_mean(history, folds[1])
    assert probabilities.mean() == pytest.approx(whole, rel=0.5)


def measured_mean(history: History, fold: Fold) -> tuple[float, Sequence[float]]:
    _, probabilities = score(refit(history, fold, QUICK, BASE_NAMES), history.vectors[fold.test])
    return float(probabilities.mean()), probabilities.tolist()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"test_from_ms": START + 5 * DAY_MS}, "train: no purchase in week 1; test later weeks"),
        ({"test_to_ms": START + 70 * DAY_MS}, "test: no purchase in week 5; does the history reach"),
    ],
)
def test_too_little_history_says_what_to_do(history: History, changed: dict[str, int], told: str) -> None:
    with pytest.raises(TooLittleHistory, match=told):
        weekly_folds(history, replace(PLAN, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [{"test_to_ms": START}, {"train_days": 0}, {"delay_days": -1}, {"week_days": 0}])
def test_a_plan_that_makes_no_sense(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        replace(PLAN, **changed)  # type: ignore[arg-type]


def test_reports_are_of_customers_and_in_order(history: History) -> None:
    reports = reports_of(history)
    assert [at for _, at in reports] == sorted(at for _, at in reports)
    assert len(reports) == sum(label.is_fraud for label in history.labels) > 50
