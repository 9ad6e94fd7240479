"""A worker whose log is real and whose bus and store are doubles, and what it did."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.memory import MemorySink, MemorySource, MemoryStateStore
from fraud_nb.adapters.ports import Outgoing, Record
from fraud_nb.adapters.postgres import Logged, LogOverview, PostgresLog
from fraud_nb.decision.judge import Model
from fraud_nb.domain.schema import Transaction, encode
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.pipeline.stream import Worker, step
from fraud_nb.pipeline.verify import Difference, Verdict, verify
from tests.e2e.stream_kit import NOON, bus_of

ADA, PARTITIONS = b"ada", 4
HOME = int(murmur2_partitions([ADA], PARTITIONS)[0])


class Rehearsal(Worker):
    """The worker, with its doubles under their own types."""

    source: MemorySource
    sink: MemorySink
    store: MemoryStateStore
    overview: LogOverview


def hired(postgres: str, model: Model) -> Rehearsal:
    """A worker that has claimed everything."""
    source = MemorySource(PARTITIONS)
    made = Rehearsal(source, MemorySink(source), MemoryStateStore(), PostgresLog(postgres), model, PARTITIONS)
    made.overview = LogOverview(postgres)
    step(made, 0)
    return made


def purchase(number: int, shop: str = "books") -> Transaction:
    """One of ada's, one a minute."""
    return Transaction(f"t{number}", "ada", NOON + number * 60_000, 1_000 + number, "EUR", shop)


def send(worker: Rehearsal, *purchases: Transaction) -> None:
    """Onto the topic, each at its own time."""
    for each in purchases:
        worker.source.append(encode(each), ADA, HOME, timestamp_ms=each.event_time)


def buy(worker: Rehearsal, first: int, stop: int) -> None:
    """Ada's purchases from one number to another."""
    send(worker, *map(purchase, range(first, stop)))


def work(worker: Rehearsal) -> None:
    """Until there is nothing more to do."""
    while step(worker, 0) or step(worker, 0):  # one turn may go into a claim
        pass


def told(worker: Rehearsal, topic: str = "predictions") -> list[str]:
    """Where the records came from that a topic tells of, in order."""
    return [dict(record.headers)["source"].decode() for record in worker.sink.published if record.topic == topic]


def at(*offsets: int) -> list[str]:
    """These places in ada's partition, as a topic names them."""
    return [f"{HOME}:{offset}" for offset in offsets]


def verified(
    worker: Rehearsal,
    published: Iterable[Outgoing] | None = None,  # what is on the topics, if not what the sink was given
    share: float = 1.0,  # of the decisions that are judged again
) -> Verdict:
    """What a recomputation from the log finds."""
    told = [
        Record(each.topic, each.partition or 0, place, 0, each.key, each.value, each.headers)
        for place, each in enumerate(worker.sink.published if published is None else published)
    ]
    sent = [record for records in worker.source.records for record in records]
    return verify(worker.overview, worker.store, bus_of([*sent, *told]), lambda _: worker.model, share=share)


def differences(worker: Rehearsal, published: Iterable[Outgoing] | None = None) -> list[Difference]:
    """What is not as the log says."""
    return list(verified(worker, published).differences)


def feature(row: Logged, name: str) -> float:
    """One of those that a decision was made from."""
    assert row.judgement is not None
    return float(np.frombuffer(row.judgement.features, np.float32)[FEATURE_NAMES.index(name)])


def rows(worker: Rehearsal) -> list[Logged]:
    """Ada's, by offset."""
    return [row for page in worker.log.read(HOME, -99, 99) for row in page]


def failing_once(port: Any, name: str, error: Exception) -> None:
    """The next call of this method fails before it does anything."""
    method = getattr(port, name)

    def fail(*words: Any) -> None:
        setattr(port, name, method)
        raise error

    setattr(port, name, fail)
