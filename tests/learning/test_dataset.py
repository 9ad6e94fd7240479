"""History against the oracle, and splits against their definition."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from fraud_nb.domain.money import MISSING_AMOUNT
from fraud_nb.domain.schema import Label, Transaction
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import EVENT
from fraud_nb.learning import dataset
from fraud_nb.learning.dataset import (
    History,
    Labelled,
    TooLittleHistory,
    final_split,
    fold_history,
    present_ms,
    split_by_time,
    targets,
    thin_negatives,
)
from fraud_nb.learning.simulate import World, labelled, simulate
from tests.parity.oracle import Bought, Oracle, TileOracle, bits, by_name

DAY = 86_400_000
Times = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def purchases() -> list[Labelled]:
    return [each for chunk in simulate(World(customers=60, days=40, fraud_rate=0.03)) for each in labelled(chunk)]


@pytest.fixture(scope="module")
def history(purchases: list[Labelled]) -> History:
    return fold_history(purchases)


def bought(transaction: Transaction, labels: Sequence[Label]) -> Bought:
    """A purchase in euros as the oracle sees it."""
    names = zip("md", (transaction.merchant_id, transaction.device_id), strict=True)
    merchant, device = (None if name is None else f"{kind}:{name}" for kind, name in names)
    claims = tuple((label.label_time, label.is_fraud) for label in labels)
    return Bought(transaction.event_time, transaction.amount_minor, (merchant, device), claims)


def test_history_equals_oracle(history: History, purchases: list[Labelled]) -> None:
    assert history.transaction_ids == [purchase.transaction_id for purchase, _ in purchases]
    assert history.customers == [purchase.customer_id for purchase, _ in purchases]
    assert history.events["event_time"].tolist() == [purchase.event_time for purchase, _ in purchases]
    oracle, shared, names = Oracle(), TileOracle(), EVENT.names or ()
    for each, event, vector in zip(purchases, history.events.tolist(), history.vectors, strict=True):
        customer, row, seen = each[0].customer_id, dict(zip(names, event, strict=True)), bought(*each)
        found = {name: bits(float(value)) for name, value in zip(FEATURE_NAMES, vector, strict=True)}
        assert found == by_name(FEATURE_NAMES, oracle.features(customer, row, shared.told(seen)))
        oracle.accept(customer, row)
        shared.accept(seen)


def test_history_knows_of_frauds(history: History) -> None:
    """Enough of them that the oracle has something to compare."""
    shared = [name for name in FEATURE_NAMES if name.startswith(("merchant_", "device_", "amount_to_merchant_"))]
    above_zero = (history.vectors[:, [FEATURE_NAMES.index(name) for name in shared]] > 0).sum(axis=0)
    assert len(shared) == 24 and above_zero.min() >= 10


def test_labels_by_the_time_they_became_known(history: History, purchases: list[Labelled]) -> None:
    """All of them, each once; of one moment in the order they came in."""
    told = [label for _, labels in purchases for label in labels]
    assert len(told) > 20
    assert history.labels == sorted(told, key=lambda label: label.label_time)
    twice = [
        (purchase, [Label(purchase.transaction_id, flag, 5) for flag in (True, False)]) for purchase, _ in purchases[:9]
    ]
    assert [label.is_fraud for label in fold_history(twice).labels] == [True, False] * 9


def test_chunks_make_no_difference(
    history: History, purchases: list[Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "CHUNK", 97)
    done: list[int] = []
    again = fold_history(iter(purchases), report=done.append)
    assert again.vectors.tobytes() == history.vectors.tobytes() and again.events.tobytes() == history.events.tobytes()
    assert again.customers == history.customers and again.labels == history.labels
    assert done[-1] == len(purchases) and {after - before for before, after in pairwise(done[:-1])} == {97}


def test_first_of_an_id_wins(history: History, purchases: list[Labelled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CHUNK", 97)  # twins fall into other chunks
    twins = [(msgspec.structs.replace(purchase, amount_minor=1), ()) for purchase, _ in purchases]
    again = fold_history([*purchases[:300], *twins[:300], *purchases[300:]])
    assert again.transaction_ids == history.transaction_ids and again.labels == history.labels
    assert again.vectors.tobytes() == history.vectors.tobytes()


def test_amount_without_a_rate_is_missing(purchases: list[Labelled]) -> None:
    events = fold_history([(msgspec.structs.replace(purchases[0][0], currency="SEK"), [])]).events
    assert events["amount"].tolist() == [MISSING_AMOUNT]


def test_empty_history() -> None:
    empty = fold_history([])
    assert empty.vectors.shape == (0, len(FEATURE_NAMES)) and len(empty.events) == 0 and empty.labels == []


@pytest.fixture(scope="module")
def hours() -> Times:
    """A purchase on each hour of 100 days, in no order."""
    return np.random.default_rng(1).permutation(np.arange(100 * 24, dtype=np.int64) * (DAY // 24))


def spans(times: Times, split: dataset.Split) -> list[tuple[float, float]]:
    """First hour and the hour after the last, in days, of each part; every hour between them is there."""
    found = []
    for rows in (split.train, split.calibration, split.test):
        part = np.sort(times[rows])
        assert (np.diff(part) == DAY // 24).all() and (np.diff(rows) > 0).all()
        found.append((part[0] / DAY, part[-1] / DAY + 1 / 24) if len(part) else (0.0, 0.0))
    return found


def test_split_by_hand(hours: Times) -> None:
    split = split_by_time(hours, 100 * DAY, 20 * DAY, test_days=10, calibration_days=5, warmup_days=3)
    assert spans(hours, split) == [(3, pytest.approx(45)), (45, pytest.approx(50)), (70, pytest.approx(80))]
    moments = {name: getattr(split, name) / DAY for name in split.__slots__ if name.endswith("_ms")}
    assert moments == {
        "train_start_ms": 3,
        "calibration_start_ms": 45,
        "mature_ms": 50,
        "trained_at_ms": 70,
        "test_start_ms": 70,
        "test_end_ms": 80,
        "tested_at_ms": 100,
    }


def test_train_days_is_a_limit_and_warmup_another(hours: Times) -> None:
    def first_day(train_days: int | None, warmup_days: int) -> float:
        split = split_by_time(hours, 100 * DAY, 20 * DAY, 10, 5, train_days, warmup_days)
        assert spans(hours, split)[0][0] == split.train_start_ms / DAY
        return split.train_start_ms / DAY

    assert first_day(15, 3) == 30
    assert first_day(15, 33) == 33
    assert first_day(1000, 3) == first_day(None, 3) == 3


def test_final_split_by_hand(hours: Times) -> None:
    split = final_split(hours, 100 * DAY, 20 * DAY, calibration_days=5, train_days=30)
    assert spans(hours, split) == [(45, pytest.approx(75)), (75, pytest.approx(80)), (0, 0)]
    assert split.trained_at_ms == split.tested_at_ms == split.test_start_ms == split.test_end_ms == 100 * DAY


@pytest.mark.parametrize(
    ("as_of_days", "horizon_days", "test_days", "warmup_days", "part"),
    [
        (100, 20, 10, 45, "train: the history begins 0.0 days too late"),
        (100, 40, 20, 5, "train: the history begins 10.0 days too late"),
        (100, 60, 10, 0, "train: the history begins 35.0 days too late"),
        (140, 20, 10, 0, "test: no purchase"),
        (190, 20, 10, 0, "calibration: no purchase"),
    ],
)
def test_too_little_history(
    hours: Times, as_of_days: int, horizon_days: int, test_days: int, warmup_days: int, part: str
) -> None:
    with pytest.raises(TooLittleHistory, match=part):
        split_by_time(hours, as_of_days * DAY, horizon_days * DAY, test_days, 5, None, warmup_days)


def test_no_history_at_all() -> None:
    with pytest.raises(TooLittleHistory, match="empty"):
        final_split(np.zeros(0, np.int64), 100 * DAY, 20 * DAY, 5)
    with pytest.raises(TooLittleHistory, match="empty"):
        present_ms(np.zeros(0, np.int64))


def test_a_stray_does_not_move_the_present(hours: Times) -> None:
    """A purchase dated next year, and the training still finds its test days."""
    strayed = np.append(hours, hours.max() + 365 * DAY)
    assert hours.max() - 3 * 3_600_000 <= present_ms(strayed) <= hours.max()
    assert len(split_by_time(strayed, present_ms(strayed), 20 * DAY, 10, 5).test) > 0


@pytest.mark.parametrize(
    ("name", "value"), [("test_days", 0), ("calibration_days", 0), ("train_days", 0), ("warmup_days", -1)]
)
def test_refuses_senseless_days(hours: Times, name: str, value: int) -> None:
    days = {"test_days": 10, "calibration_days": 5, "train_days": 20, "warmup_days": 0} | {name: value}
    with pytest.raises(ValueError, match=name):
        split_by_time(hours, 100 * DAY, 20 * DAY, **days)


def test_targets_follow_rows_and_moment(history: History) -> None:
    rows = np.array([7, 2, 9])
    labels = [Label(history.transaction_ids[2], True, 100), Label(history.transaction_ids[9], True, 200)]
    claimed = replace(history, labels=labels)
    assert targets(claimed, rows, 100).tolist() == [False, True, False]
    assert targets(claimed, rows, 200).tolist() == [False, True, True]


def test_thinning_keeps_frauds_and_the_rate() -> None:
    rows = np.arange(40_000, 60_000)
    is_fraud = rows % 100 == 0
    kept, weights = thin_negatives(rows, is_fraud, 0.12, seed=3)
    assert set(rows[is_fraud]) <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    genuine = kept % 100 != 0
    assert weights[~genuine].tolist() == [1.0] * 200
    assert np.unique(weights[genuine]).tolist() == [np.float32(1 / 0.12)]
    spread = 4 * np.sqrt(19_800 * 0.12 * 0.88)  # four standard deviations
    assert genuine.sum() == pytest.approx(19_800 * 0.12, abs=spread)
    assert thin_negatives(rows, is_fraud, 0.12, seed=3)[0].tolist() == kept.tolist()
    assert thin_negatives(rows, is_fraud, 0.12, seed=4)[0].tolist() != kept.tolist()
    everything, ones = thin_negatives(rows, is_fraud, 1.0, seed=3)
    assert everything.tolist() == rows.tolist() and set(ones.tolist()) == {1.0}


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_senseless_shares(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        thin_negatives(np.arange(3), np.zeros(3, np.bool_), keep, seed=1)
