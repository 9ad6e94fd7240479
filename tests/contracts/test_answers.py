"""What is asked over HTTP beside a worker: decided, placed and learned once; the log is real, the rest is doubled."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.ports import Outgoing, Unavailable
from fraud_nb.adapters.postgres import AnswerLog
from fraud_nb.decision.breaker import Breaker
from fraud_nb.decision.judge import Model
from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import encode
from fraud_nb.pipeline.predict import Answer, Bench, IdConflict, Link, Outbox, Predictor, Watch
from tests.contracts.worker_kit import (
    HOME,
    PARTITIONS,
    Rehearsal,
    at,
    buy,
    differences,
    feature,
    purchase,
    rows,
    send,
    told,
    work,
)


class Counter:
    """A clerk who keeps what was handed over."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []

    def send(self, record: Outgoing, arrived: Any = None) -> None:
        self.sent.append(record)

    def flush(self) -> None:
        """All of it is acknowledged."""


class Service:
    """The second way in, beside the worker; the log and the topic may be away."""

    def __init__(self, worker: Rehearsal, postgres: str, model: Model) -> None:
        self.clock_s, self.counter, self.away = 0.0, Counter(), set[str]()
        log, store = self.link(lambda: AnswerLog(postgres), "log"), self.link(lambda: worker.store)
        self.outbox = Outbox(self.link(lambda: self.counter, "topic"))
        ends = self.link(lambda: lambda: {part: len(each) for part, each in enumerate(worker.source.records)})
        self.watch = Watch(log, store, ends, self.outbox, PARTITIONS, Breaker())
        bench = Bench(store, self.watch.freshness, PARTITIONS, murmur2_partitions, Rates(), Breaker())
        self.predictor = Predictor(log, log, bench, self.outbox, self.watch, model)

    def link(self, connect: Any, name: str = "") -> Any:
        def connected() -> Any:
            if name in self.away:
                raise Unavailable(f"{name}: away")
            return connect()

        return Link(connected, lambda: self.clock_s)

    def ask(self, number: int, shop: str = "books") -> Answer | IdConflict:
        """About one of ada's purchases, at its own time."""
        asked = purchase(number, shop)
        (answer,) = self.predictor.predict([asked], asked.event_time)
        return answer

    def handed_over(self) -> list[Outgoing]:
        """What went to the topic since the last look."""
        self.outbox.post([], 0).result()
        found, self.counter.sent = self.counter.sent, []
        return found


@pytest.fixture
def service(worker: Rehearsal, postgres: str, model: Model) -> Iterator[Service]:
    made = Service(worker, postgres, model)
    yield made
    made.predictor.close()


def test_what_was_asked_is_placed_and_learned_once(worker: Rehearsal, service: Service) -> None:
    buy(worker, 0, 2)
    work(worker)
    service.watch.sweep(purchase(2).event_time)
    said = service.ask(2)
    assert isinstance(said, Answer) and said.features == "live"
    send(worker, purchase(2), purchase(3), purchase(2), purchase(2, "another shop"))
    work(worker)
    assert worker.counts.decided == 3 and worker.counts.placed == 1 and worker.counts.repeats == 2
    assert [row.origin for row in rows(worker)] == ["stream", "stream", "http", "stream"]
    assert [feature(row, "customer_count_1h") for row in rows(worker)] == [0, 1, 2, 3]
    assert told(worker) == at(0, 1, 2, 3) and differences(worker) == []
    assert service.ask(2) == said, "asked again: the same answer"


def test_the_first_decision_stands_whoever_made_it(worker: Rehearsal, service: Service) -> None:
    first = service.ask(0)
    assert isinstance(service.ask(0, "another shop"), IdConflict)
    send(worker, purchase(0, "another shop"), purchase(0))
    buy(worker, 1, 2)
    work(worker)
    assert service.ask(0) == first and told(worker) == at(1, 2)
    decided = service.ask(1)
    assert isinstance(decided, Answer) and decided.features == "stream"
    assert differences(worker) == []


def test_what_cannot_be_read_is_missing_and_never_zero(worker: Rehearsal, service: Service, postgres: str) -> None:
    buy(worker, 0, 2)
    work(worker)
    worker.store.wipe(HOME)
    said = service.ask(2)
    assert isinstance(said, Answer) and said.features == "cold"
    assert np.isnan(feature(AnswerLog(postgres).stored(["t2"])["t2"], "customer_count_1h"))


def test_what_is_behind_says_so(worker: Rehearsal, service: Service) -> None:
    """For more than five seconds, or as far as anybody knows."""
    buy(worker, 0, 2)
    work(worker)

    def features_at(number: int) -> str:
        said = service.ask(number)
        assert isinstance(said, Answer)
        return said.features

    assert features_at(50) == "stale", "nobody has looked"
    service.watch.sweep(purchase(51).event_time)
    assert features_at(51) == "live"
    buy(worker, 2, 3)
    for second in (-8, -4, 0):
        service.watch.sweep(purchase(52).event_time + second * 1_000)
    assert features_at(52) == "stale", "the worker has not dealt with the third for eight seconds"


def test_what_the_topic_never_got_is_handed_over_again(worker: Rehearsal, service: Service) -> None:
    """By the next service too, which posted nothing itself."""
    service.ask(0)
    (first,) = service.handed_over()
    service.outbox.posted.clear()
    assert service.predictor.sweep(purchase(0).event_time + 60_000) == 1
    assert service.handed_over() == [first] and first.value == encode(purchase(0))


def test_what_is_not_in_the_log_is_advice(worker: Rehearsal, service: Service) -> None:
    """It travels with the purchase, and the worker keeps it beside its own decision; nobody to take it: no answer."""
    service.away.add("log")
    said = service.ask(0)
    assert isinstance(said, Answer) and not said.recorded
    (sent,) = service.handed_over()
    worker.source.append(sent.value, sent.key, sent.partition or 0, sent.headers, purchase(0).event_time)
    work(worker)
    (row,) = rows(worker)
    assert row.origin == "stream" and row.advice is not None and said.decision.value in row.advice
    assert worker.counts.advised == 1 and differences(worker) == []
    service.away.add("topic")
    service.clock_s += 10
    service.outbox.clerk = service.link(lambda: service.counter, "topic")
    with pytest.raises(Unavailable, match="topic"):
        service.ask(1)
