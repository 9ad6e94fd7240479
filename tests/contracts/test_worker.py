"""What the worker does when it dies, is overtaken, or is told something twice; the log is real, the rest is doubled."""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.memory import MemorySink, MemorySource
from fraud_nb.adapters.ports import BusUnavailable, Fenced, Outgoing, StoreUnavailable, Unavailable
from fraud_nb.adapters.postgres import AnswerLog, HistoryLoader, LabelLog, Logged
from fraud_nb.decision.judge import Model
from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import Label, encode, payload_hash
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.pipeline.intake import Intake, take_in
from fraud_nb.pipeline.predict import (
    Answer,
    Bench,
    IdConflict,
    Link,
    Outbox,
    Predictor,
    Watch,
)
from tests.conftest import tampering
from tests.contracts.worker_kit import (
    ADA,
    HOME,
    PARTITIONS,
    Rehearsal,
    at,
    buy,
    differences,
    hired,
    purchase,
    send,
    told,
    work,
)
from tests.e2e.stream_kit import NOON


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


def test_history_put_under_an_idle_worker_is_learned(worker: Rehearsal, postgres: str) -> None:
    work(worker)
    history = [purchase(number) for number in range(3)]
    past = [
        Logged(HOME, each - 3, tx, tx.amount_minor, payload_hash(tx), 0, None, "backfill")
        for each, tx in enumerate(history)
    ]
    HistoryLoader(postgres).load([(row, []) for row in past])
    send(worker, purchase(3))
    with pytest.raises(Fenced):
        work(worker)
    work(worker)
    assert feature(rows(worker)[-1], "customer_count_1h") == 3 and differences(worker) == []


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
        self.watch = Watch(log, store, ends, self.outbox, PARTITIONS)
        bench = Bench(store, self.watch.freshness, PARTITIONS, murmur2_partitions, Rates())
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


def labels_of(count: int, source: MemorySource) -> None:
    for number in range(count):
        label = Label(f"t{number}", True, NOON + number, "chargeback")
        source.append(msgspec.json.encode(label), timestamp_ms=NOON + number)


def offsets_of_labels(postgres: str) -> list[tuple[int, int]]:
    """Number and offset of each label."""
    with tampering(postgres) as cursor:
        cursor.execute('SELECT label_seq, "offset" FROM labels ORDER BY label_seq')
        return list(cursor.fetchall())


def intake_on(source: MemorySource, postgres: str) -> Intake:
    made = Intake(source, MemorySink(source), LabelLog(postgres))
    take_in(made)
    return made


def test_labels_are_numbered_once(postgres: str) -> None:
    """The one who takes them in fails behind its commit, and begins again."""
    source = MemorySource(topic="labels")
    intake = intake_on(source, postgres)
    labels_of(3, source)
    source.append(b"{", timestamp_ms=NOON)
    failing_once(intake.sink, "publish", BusUnavailable("Kafka: away"))
    with pytest.raises(BusUnavailable):
        take_in(intake)
    labels_of(1, source)
    while take_in(intake) or take_in(intake):
        pass
    assert offsets_of_labels(postgres) == [(1, 0), (2, 1), (3, 2), (4, 4)]
    letters = intake.sink.published  # type: ignore[attr-defined]
    assert [dict(each.headers)["source"] for each in letters] == [b"labels:3"] and source.committed(0) == 5


def test_labels_that_a_log_forgot_are_taken_in_again(postgres: str) -> None:
    source = MemorySource(topic="labels")
    intake = intake_on(source, postgres)
    labels_of(3, source)
    assert take_in(intake) == 3
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE label_progress SET next_offset = 1, next_seq = 2")
        cursor.execute("DELETE FROM labels WHERE label_seq > 1")
    source.rebalance([0])
    take_in(intake)
    assert take_in(intake) == 2
    assert offsets_of_labels(postgres) == [(1, 0), (2, 1), (3, 2)]


def test_who_was_overtaken_numbers_no_label(postgres: str) -> None:
    source = MemorySource(topic="labels")
    intake, other = intake_on(source, postgres), LabelLog(postgres)
    labels_of(2, source)
    other.claim()
    with pytest.raises(Fenced):
        take_in(intake)
    assert offsets_of_labels(postgres) == []
