"""What the worker does when it dies, is overtaken, or is told something twice; the log is real, the rest is doubled."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.ports import BusUnavailable, Fenced, StoreUnavailable
from fraud_nb.adapters.postgres import HistoryLoader, Logged
from fraud_nb.decision.judge import Model
from fraud_nb.domain.schema import encode, payload_hash
from tests.contracts.worker_kit import (
    ADA,
    HOME,
    PARTITIONS,
    Rehearsal,
    at,
    buy,
    differences,
    failing_once,
    feature,
    hired,
    purchase,
    rows,
    send,
    told,
    work,
)


def test_a_batch_of_everything(worker: Rehearsal) -> None:
    """Repeats, conflicts, poison and a purchase that is late by more than is remembered."""
    send(worker, purchase(0), purchase(0), purchase(0, "another shop"))
    worker.source.append(b"{", ADA, HOME)
    send(worker, purchase(200_000), purchase(1), purchase(200_001))
    work(worker)
    assert told(worker) == at(0, 4, 5, 6) and told(worker, "dead-letters") == at(3)
    assert worker.counts.repeats == 2 and differences(worker) == []


@pytest.mark.parametrize(
    ("port", "name", "error"),
    [
        ("store", "save", StoreUnavailable("Redis: away")),
        ("sink", "publish", BusUnavailable("Kafka: away")),
        ("sink", "publish", Fenced("somebody else")),
    ],
)
def test_what_is_committed_is_told_once_and_never_decided_again(
    worker: Rehearsal, port: str, name: str, error: Exception
) -> None:
    """The worker fails behind its commit; also where dead letters and repeats are among what it committed."""
    buy(worker, 0, 3)
    work(worker)
    buy(worker, 3, 6)
    worker.source.append(b"{", ADA, HOME)
    send(worker, purchase(2))
    failing_once(getattr(worker, port), name, error)
    with pytest.raises(type(error)):
        work(worker)
    assert worker.log.progress()[HOME] == 8 and told(worker) == at(0, 1, 2)
    work(worker)
    buy(worker, 6, 8)
    work(worker)
    assert told(worker) == at(0, 1, 2, 3, 4, 5, 8, 9) and told(worker, "dead-letters") == at(6)
    assert worker.counts.decided == 8 and differences(worker) == []
    assert worker.store.watermark(HOME) == worker.source.committed(HOME) == 10


def test_a_worker_without_room_decides_the_same(worker: Rehearsal) -> None:
    """Everybody is forgotten before every batch, and whoever buys is loaded again; two customers of two partitions."""
    worker.room, worker.batch_size = 0, 4
    loaded, load = list[str](), worker.store.load

    def count_loads(partition: int, owners: Sequence[str]) -> tuple[int | None, list[bytes | None]]:
        loaded.extend(owners)
        return load(partition, owners)

    worker.store.load = count_loads  # type: ignore[method-assign]
    (elsewhere,) = murmur2_partitions([b"eve"], PARTITIONS).tolist()
    assert elsewhere != HOME
    for first in range(0, 8, 2):
        for number in (first, first + 1):
            send(worker, purchase(number))
            other = replace(purchase(number), transaction_id=f"e{number}", customer_id="eve")
            worker.source.append(encode(other), b"eve", elsewhere, timestamp_ms=other.event_time)
        work(worker)
    assert loaded.count("ada") == loaded.count("eve") == 4, "once for each batch"
    assert len(worker.profiles.rows("ada")) == len(worker.profiles.rows("eve")) == 8 and differences(worker) == []


def test_who_was_overtaken_changes_nothing(worker: Rehearsal, postgres: str, model: Model) -> None:
    """A zombie has decided in its head when another one takes over, without a new commit of that one."""
    buy(worker, 0, 4)
    work(worker)
    buy(worker, 4, 6)
    other = hired(postgres, model)
    before = worker.log.progress(), dict(worker.store.profiles), list(worker.sink.published)
    with pytest.raises(Fenced):
        work(worker)
    assert before == (worker.log.progress(), worker.store.profiles, worker.sink.published)
    other.log.close()


def test_after_a_rebalance_it_claims_again(worker: Rehearsal) -> None:
    buy(worker, 0, 3)
    work(worker)
    epochs = {partition: claim.epoch for partition, claim in worker.claims.items()}
    worker.source.rebalance(range(PARTITIONS))
    buy(worker, 3, 5)
    work(worker)
    assert {partition: claim.epoch - epochs[partition] for partition, claim in worker.claims.items()} == dict.fromkeys(
        range(PARTITIONS), 1
    )
    assert told(worker) == at(*range(5)) and differences(worker) == []


def test_a_store_that_is_behind_is_brought_up_to_the_log(worker: Rehearsal) -> None:
    buy(worker, 0, 3)
    work(worker)
    older = worker.store.watermarks.copy(), worker.store.profiles.copy()
    buy(worker, 3, 7)
    work(worker)
    worker.store.watermarks, worker.store.profiles = older
    worker.source.rebalance(range(PARTITIONS))
    work(worker)
    assert worker.store.watermark(HOME) == 7 and differences(worker) == []
    buy(worker, 7, 9)
    work(worker)
    assert feature(rows(worker)[-1], "customer_count_1h") == 8 and differences(worker) == []


@pytest.mark.parametrize("stays_idle", [False, True])
def test_history_put_under_an_idle_worker_is_learned(worker: Rehearsal, postgres: str, stays_idle: bool) -> None:
    """With the next purchase; and before there is one, for those who ask over HTTP."""
    work(worker)
    history = [purchase(number) for number in range(3)]
    past = [
        Logged(HOME, each - 3, tx, tx.amount_minor, payload_hash(tx), 0, None, "backfill")
        for each, tx in enumerate(history)
    ]
    HistoryLoader(postgres).load([(row, []) for row in past])
    if not stays_idle:
        send(worker, purchase(3))
    with pytest.raises(Fenced):
        work(worker)
    if stays_idle:
        work(worker)
        assert (HOME, "ada") in worker.store.profiles and differences(worker) == []
        send(worker, purchase(3))
    work(worker)
    assert feature(rows(worker)[-1], "customer_count_1h") == 3 and differences(worker) == []
