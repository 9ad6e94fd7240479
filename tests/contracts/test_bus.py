"""The contract of Source and Sink, on the doubles and on a real broker."""

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, MemberToRemove
from kafka.partitioner.default import murmur2

from fraud_nb.adapters import kafka_bus
from fraud_nb.adapters.kafka_bus import (
    LARGEST_RECORD,
    KafkaSink,
    KafkaSource,
    RecordTooLarge,
    WrongPartitionCount,
    create_topics,
    murmur2_partitions,
    read_topic,
)
from fraud_nb.adapters.memory import MemorySink, MemorySource
from fraud_nb.adapters.ports import BusUnavailable, Fenced, Headers, OffsetGap, Outgoing, Record, Sink, Source
from fraud_nb.adapters.servers import Addresses
from fraud_nb.apps import parts
from fraud_nb.apps.parts import open_bus

PARTITIONS = 2


class Bus(Protocol):
    """A source, a sink, and what a test does behind their backs."""

    @property
    def source(self) -> Source: ...
    @property
    def sink(self) -> Sink: ...
    def append(self, partition: int, values: Sequence[bytes]) -> None: ...
    def trim(self, partition: int, offset: int) -> None: ...
    def expel(self) -> None: ...
    def published(self) -> list[bytes | None]: ...
    def close(self) -> None: ...


class MemoryBus:
    def __init__(self) -> None:
        self.source = self._source = MemorySource(PARTITIONS)
        self.sink = self._sink = MemorySink(self._source)

    def append(self, partition: int, values: Sequence[bytes]) -> None:
        for value in values:
            self._source.append(value, b"ada", partition, (("trace", b"1"),))

    def trim(self, partition: int, offset: int) -> None:
        self._source.trim(partition, offset)

    def expel(self) -> None:
        self._source.rebalance(range(PARTITIONS))

    def published(self) -> list[bytes | None]:
        return [record.value for record in self._sink.published]

    def close(self) -> None:
        self.source.close()


class KafkaBus:
    def __init__(self, bootstrap: str) -> None:
        suffix = uuid.uuid4().hex[:8]
        self.bootstrap, self.group, self.worker = bootstrap, f"group-{suffix}", f"worker-{suffix}"
        self.topic, self.output, self.names = f"in-{suffix}", f"predictions-{suffix}", count()
        self.admin = KafkaAdminClient(bootstrap_servers=bootstrap)
        counts = {self.topic: {"num_partitions": PARTITIONS}, self.output: {"num_partitions": 1}}
        self.admin.create_topics(counts, wait_for_metadata=True)
        self.producer = KafkaProducer(bootstrap_servers=bootstrap)
        self.source = self.member = KafkaSource(bootstrap, self.group, self.topic)
        self.sink = KafkaSink(bootstrap, self.member, draw=self.name)

    def name(self) -> str:
        return f"{self.worker}-{next(self.names)}"

    def append(self, partition: int, values: Sequence[bytes]) -> None:
        for value in values:
            self.producer.send(self.topic, value, b"ada", [("trace", b"1")], partition)
        self.producer.flush()

    def trim(self, partition: int, offset: int) -> None:
        self.admin.delete_records({TopicPartition(self.topic, partition): offset})

    def expel(self) -> None:
        identity = self.member.standing().identity
        assert identity is not None
        self.admin.remove_group_members(self.group, [MemberToRemove(member_id=identity.member_id)])

    def published(self) -> list[bytes | None]:
        reader = KafkaConsumer(
            bootstrap_servers=self.bootstrap, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        place = TopicPartition(self.output, 0)
        reader.assign([place])
        values: list[bytes | None] = []
        end, deadline = reader.end_offsets([place])[place], time.monotonic() + 10
        while reader.position(place) < end and time.monotonic() < deadline:
            values += [record.value for records in reader.poll(100).values() for record in records]
        reader.close()
        return values

    def close(self) -> None:
        self.sink.close()
        self.source.close()
        self.producer.close()
        self.admin.close()


@pytest.fixture(params=["memory", "kafka"])
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    chosen: Bus = MemoryBus() if request.param == "memory" else KafkaBus(request.getfixturevalue("servers").kafka)
    yield chosen
    chosen.close()


def read(bus: Bus, count: int, seconds: float = 15) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + seconds
    while len(records) < count and time.monotonic() < deadline:
        records += bus.source.poll(0.2, count - len(records))
    return records


def join(bus: Bus, after: int = -1) -> None:
    """Poll until a new generation owns all partitions; no record may come meanwhile."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert bus.source.poll(0.2, 100) == []
        if bus.source.generation() != after and len(bus.source.assigned()) == PARTITIONS:
            return
    raise AssertionError("no partitions were assigned")


def outgoing(bus: Bus, *values: bytes) -> list[Outgoing]:
    topic = bus.output if isinstance(bus, KafkaBus) else "predictions"
    return [Outgoing(topic, None, b"ada", value, (("reason", b"none"),)) for value in values]


def test_nothing_before_seek(bus: Bus) -> None:
    bus.append(0, [b"0", b"1", b"2"])
    bus.append(1, [b"0"])
    join(bus)
    assert read(bus, 1, seconds=1) == []
    bus.source.seek(0, 1)
    records = read(bus, 2)
    assert [(record.partition, record.offset, record.value) for record in records] == [(0, 1, b"1"), (0, 2, b"2")]
    assert records[0].key == b"ada" and records[0].headers == (("trace", b"1"),)
    assert read(bus, 1, seconds=1) == []  # partition 1 was not sought
    bus.source.seek(0, 0)
    assert [record.offset for record in read(bus, 3)] == [0, 1, 2]


def test_max_records(bus: Bus) -> None:
    bus.append(0, [b"%d" % number for number in range(50)])
    join(bus)
    bus.source.seek(0, 0)
    offsets: list[int] = []
    while len(offsets) < 50:
        records = bus.source.poll(1, 7)
        assert len(records) <= 7
        offsets += [record.offset for record in records]
    assert offsets == list(range(50))


def test_published_with_offsets(bus: Bus) -> None:
    bus.append(0, [b"0", b"1"])
    join(bus)
    assert (bus.source.committed(0), bus.source.committed(1)) == (0, 0)
    bus.sink.publish(outgoing(bus, b"a", b"b"), {0: 2}, bus.source.generation())
    assert (bus.source.committed(0), bus.source.committed(1)) == (2, 0)
    bus.sink.publish(outgoing(bus, b"c"), {0: 2, 1: 0}, bus.source.generation())
    bus.sink.publish([], {0: 1}, bus.source.generation())
    assert bus.published() == [b"a", b"b", b"c"]
    assert (bus.source.committed(0), bus.source.committed(1)) == (1, 0)


def test_expelled_member_is_fenced_and_begins_again(bus: Bus) -> None:
    bus.append(0, [b"0", b"1"])
    join(bus)
    bus.source.seek(0, 0)
    assert len(read(bus, 2)) == 2
    generation = bus.source.generation()
    bus.sink.publish(outgoing(bus, b"before"), {0: 1}, bus.source.generation())
    bus.expel()
    with pytest.raises(Fenced):
        bus.sink.publish(outgoing(bus, b"zombie"), {0: 2}, generation)
    join(bus, after=generation)
    with pytest.raises(Fenced):
        bus.sink.publish(outgoing(bus, b"decided under the old generation"), {0: 2}, generation)
    assert bus.source.committed(0) == 1
    bus.source.seek(0, 1)
    assert [record.offset for record in read(bus, 1)] == [1]
    bus.sink.publish(outgoing(bus, b"after"), {0: 2}, bus.source.generation())
    assert bus.published() == [b"before", b"after"]
    assert bus.source.committed(0) == 2


def test_foreign_partition_is_refused(bus: Bus) -> None:
    with pytest.raises(Fenced):
        bus.source.seek(0, 0)  # nothing is owned before the first poll
    join(bus)
    with pytest.raises(Fenced):
        bus.source.seek(9, 0)
    with pytest.raises(Fenced):
        bus.sink.publish(outgoing(bus, b"a"), {9: 1}, bus.source.generation())
    assert bus.published() == []


def test_gaps_are_errors(bus: Bus) -> None:
    bus.append(0, [b"0", b"1", b"2", b"3"])
    join(bus)
    bus.trim(0, 3)
    with pytest.raises(OffsetGap) as gone:
        bus.source.seek(0, 1)
    assert (gone.value.partition, gone.value.wanted, gone.value.available) == (0, 1, 3)
    with pytest.raises(OffsetGap) as anew:
        bus.source.seek(0, 9)
    assert anew.value.available == 4
    bus.source.seek(0, 3)
    assert [record.offset for record in read(bus, 1)] == [3]


def test_retention_overtakes_a_reader(bus: Bus) -> None:
    bus.append(0, [b"0"])
    join(bus)
    bus.source.seek(0, 0)
    assert len(read(bus, 1)) == 1
    # Records between two polls may be fetched already; so go back, and cut before the next poll.
    bus.source.seek(0, 0)
    bus.append(0, [b"1"])
    bus.trim(0, 2)
    with pytest.raises(OffsetGap):
        read(bus, 1, seconds=5)


def test_whole_batches_carry_what_send_carries(servers: Any) -> None:
    bus = KafkaBus(servers.kafka)
    join(bus)
    rng = np.random.default_rng(5)
    sent: list[tuple[bytes, bytes | None, Headers]] = [
        (b"ada", None, ()),
        (b"", b"", (("a", b""), ("\u00fc", b"\xff"))),
    ]
    sent += [(b"k%d" % number, rng.bytes(int(rng.integers(9_000))), (("n", b"%d" % number),)) for number in range(300)]
    bus.sink.publish(
        [Outgoing(bus.output, 0, *record) for record in sent], {0: 0}, bus.source.generation()
    )  # in whole batches
    bus.sink.publish(
        [Outgoing(bus.output, None, *record) for record in sent], {0: 0}, bus.source.generation()
    )  # one by one
    found = read_topic(servers.kafka, bus.output)
    assert [(record.key, record.value, record.headers) for record in found] == [*sent, *sent]
    for size in (LARGEST_RECORD + 1, 3 * LARGEST_RECORD):  # refused by the broker, and by the client
        with pytest.raises(RecordTooLarge):
            bus.sink.publish(
                [Outgoing(bus.output, 0, b"ada", value) for value in (b"small", b"x" * size)],
                {0: 1},
                bus.source.generation(),
            )
    assert bus.source.committed(0) == 0
    assert len(read_topic(servers.kafka, bus.output)) == 2 * len(sent)
    bus.close()


def test_an_interrupted_publish_hides_nothing(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction left open would keep what others publish later from every read-committed reader."""
    bus = KafkaBus(servers.kafka)
    join(bus)
    bus.sink.publish([], {0: 0}, bus.source.generation())
    asleep = KafkaSink(servers.kafka, bus.member, deadline_s=1.0)
    woken = threading.Event()
    monkeypatch.setattr(kafka_bus, "failpoint", lambda name: woken.wait(10))
    with pytest.raises(BusUnavailable):
        asleep.publish(outgoing(bus, b"half"), {0: 1}, bus.source.generation())
    bus.producer.send(bus.output, key=b"ada", value=b"later").get(10)
    assert bus.published() == [b"later"]
    woken.set()
    monkeypatch.undo()
    asleep.publish(outgoing(bus, b"once more"), {0: 1}, bus.source.generation())
    assert bus.published() == [b"later", b"once more"] and bus.source.committed(0) == 1
    asleep.close()
    bus.close()


def test_who_is_fenced_begins_again_under_another_name(servers: Any) -> None:
    bus = KafkaBus(servers.kafka)
    join(bus)
    bus.sink.publish(outgoing(bus, b"first"), {0: 0}, bus.source.generation())
    second = KafkaSink(servers.kafka, bus.member, draw=lambda: f"{bus.worker}-0")
    with pytest.raises(Fenced):
        bus.sink.publish(outgoing(bus, b"zombie"), {0: 0}, bus.source.generation())
    for sink, value in ((second, b"second"), (bus.sink, b"awake"), (second, b"third")):
        sink.publish(outgoing(bus, value), {0: 0}, bus.source.generation())
    assert bus.published() == [b"first", b"second", b"awake", b"third"]
    second.close()
    bus.close()


def test_what_a_dead_member_left_open_is_ended_by_its_successor(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody is told the group's offsets until its time is up."""
    bus = KafkaBus(servers.kafka)
    join(bus)
    bus.sink.publish([], {0: 1}, bus.source.generation())
    sleeper = KafkaSink(servers.kafka, bus.member, deadline_s=60)
    is_open, woken = threading.Event(), threading.Event()

    def sleep(name: str) -> None:
        is_open.set()
        woken.wait(60)

    monkeypatch.setattr(kafka_bus, "failpoint", sleep)
    words = outgoing(bus, b"half"), {0: 2}, bus.source.generation()
    refused = list[Fenced]()

    def publish() -> None:
        try:
            sleeper.publish(*words)
        except Fenced as error:
            refused.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    assert is_open.wait(10)
    monkeypatch.undo()
    assert bus.source.committed(0) == 1
    bus.sink.publish(outgoing(bus, b"whole"), {0: 2}, bus.source.generation())
    woken.set()
    thread.join(30)
    assert refused and bus.published() == [b"whole"]
    sleeper.publish(outgoing(bus, b"awake"), {0: 3}, bus.source.generation())
    assert bus.published() == [b"whole", b"awake"] and bus.source.committed(0) == 3
    sleeper.close()
    bus.close()


@pytest.mark.parametrize("is_settled_at_once", [True, False])
def test_a_publish_without_an_answer_is_settled_before_the_next(
    servers: Any, monkeypatch: pytest.MonkeyPatch, is_settled_at_once: bool
) -> None:
    """Nobody knows what became of it: whoever asks for the committed offsets now must get an answer that stays."""
    bus = KafkaBus(servers.kafka)
    join(bus)
    commit = KafkaProducer.commit_transaction

    def without_an_answer(producer: KafkaProducer) -> None:
        raise kafka_bus.kafka_errors.KafkaTimeoutError

    monkeypatch.setattr(KafkaProducer, "commit_transaction", without_an_answer)
    start = bus.sink.start
    if not is_settled_at_once:
        monkeypatch.setattr(bus.sink, "start", lambda: without_an_answer(bus.producer))
    with pytest.raises(BusUnavailable, match="read the committed offsets"):
        bus.sink.publish(outgoing(bus, b"open"), {0: 1}, bus.source.generation())
    monkeypatch.setattr(KafkaProducer, "commit_transaction", commit)
    if not is_settled_at_once:
        monkeypatch.setattr(bus.sink, "start", start)
        with pytest.raises(Fenced, match="settled now"):
            bus.sink.publish(outgoing(bus, b"too early"), {0: 1}, bus.source.generation())
    assert bus.source.committed(0) == 0
    bus.sink.publish(outgoing(bus, b"again"), {0: 1}, bus.source.generation())
    assert bus.published() == [b"again"] and bus.source.committed(0) == 1
    bus.close()


def test_what_was_aborted_is_read_by_nobody(servers: Any) -> None:
    """Neither a shop's own transaction by the worker, nor one of ours by those who verify."""
    bus = KafkaBus(servers.kafka)
    producer = KafkaProducer(bootstrap_servers=servers.kafka, transactional_id=f"shop-{bus.worker}")
    producer.init_transactions()
    for value, end in ((b"taken back", producer.abort_transaction), (b"meant", producer.commit_transaction)):
        producer.begin_transaction()
        for topic in (bus.topic, bus.output):
            producer.send(topic, value, partition=0).get(10)
        end()
    producer.close()
    join(bus)
    bus.source.seek(0, 0)
    assert [record.value for record in read(bus, 1)] == [b"meant"]
    assert [record.value for record in read_topic(servers.kafka, bus.output)] == [b"meant"]
    bus.close()


def test_two_members_share_and_take_over(servers: Any) -> None:
    bus = KafkaBus(servers.kafka)
    join(bus)
    other = KafkaSource(servers.kafka, bus.group, bus.topic)
    deadline = time.monotonic() + 20
    while (len(bus.source.assigned()), len(other.assigned())) != (1, 1) and time.monotonic() < deadline:
        bus.source.poll(0.1, 10)
        other.poll(0.1, 10)
    assert bus.source.assigned() | other.assigned() == {0, 1}
    generation = bus.source.generation()
    other.close()
    join(bus, after=generation)
    bus.close()


def test_a_session_is_as_long_as_the_broker_wants(servers: Any) -> None:
    bus = KafkaBus(servers.kafka)
    bus.source.close()
    bus.source = bus.member = KafkaSource(servers.kafka, bus.group, bus.topic, session_timeout_ms=1_000)
    join(bus)
    (group,) = bus.admin.describe_groups([bus.group]).values()
    assert len(group["members"]) == 1
    bus.close()


def make_own_topics(bootstrap: str, patch: pytest.MonkeyPatch, partitions: int, **options: int) -> dict[str, str]:
    """The four topics under names of their own, by the name of the constant: others use this broker, too."""
    topics = {
        name: f"{name.lower()}-{uuid.uuid4().hex[:8]}"
        for name in ("TRANSACTIONS", "LABELS", "PREDICTIONS", "DEAD_LETTERS")
    }
    for name, topic in topics.items():
        for module in (kafka_bus, parts):
            patch.setattr(module, name, topic)
    create_topics(bootstrap, partitions, **options)
    return topics


def test_topics_are_made_once(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = make_own_topics(servers.kafka, monkeypatch, 3)
    create_topics(servers.kafka, 3)
    with pytest.raises(WrongPartitionCount, match="has 3 partitions, 4 are wanted"):
        create_topics(servers.kafka, 4)
    producer = KafkaProducer(bootstrap_servers=servers.kafka)
    sent = producer.send(topics["TRANSACTIONS"], b"x", timestamp_ms=1_000).get(10)
    producer.close()
    assert sent.timestamp > 1_600_000_000_000  # the broker's clock, whatever the sender says


def test_verification_waits_for_what_a_killed_worker_left_open(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = make_own_topics(servers.kafka, monkeypatch, 4)
    killed = KafkaProducer(
        bootstrap_servers=servers.kafka, transactional_id=f"killed-{uuid.uuid4().hex}", transaction_timeout_ms=2_000
    )
    killed.init_transactions()
    killed.begin_transaction()
    another = KafkaProducer(bootstrap_servers=servers.kafka)
    for producer, value in ((killed, b"half"), (another, b"whole")):
        producer.send(topics["PREDICTIONS"], value, partition=0).get(10)
    assert read_topic(servers.kafka, topics["PREDICTIONS"]) == [], "it is behind a transaction that nobody ends"
    found, told = Addresses(servers.kafka, "", ""), list[str]()
    with pytest.raises(BusUnavailable, match=f"topic {topics['PREDICTIONS']}: a transaction is still open after 0.1 s"):
        open_bus(found, told.append, deadline_s=0.1)
    assert [record.value for record in open_bus(found, told.append).predictions(0)] == [b"whole"]
    assert [line.partition(",")[0] for line in told] == 2 * [
        f"Kafka: topic {topics['PREDICTIONS']}: waiting for a transaction that is open"
    ]
    open_bus(found, told.append)
    assert len(told) == 2, "nothing is open now"
    for producer in (killed, another):
        producer.close(timeout=0)


def test_topics_are_kept_longer_than_the_log(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = make_own_topics(servers.kafka, monkeypatch, 1, keep_days=100)
    admin = KafkaAdminClient(bootstrap_servers=servers.kafka)
    (found,) = admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics.values()]
    ).values()
    admin.close()
    kept = {name: int(found[topic]["retention.ms"]["value"]) for name, topic in topics.items()}
    as_the_log = 130 * 86_400_000
    assert kept == dict.fromkeys(topics, as_the_log) | {"LABELS": -1}


def test_no_broker_is_unavailable() -> None:
    with pytest.raises(BusUnavailable):
        create_topics("127.0.0.1:1", 1, deadline_s=0.2)


def test_an_answer_that_does_not_come_in_time_is_no_answer() -> None:
    never = threading.Event()
    try:
        with pytest.raises(kafka_bus.kafka_errors.KafkaTimeoutError):
            kafka_bus.within_deadline(lambda: never.wait(60) and None, 0.1)
    finally:
        never.set()


def test_partitioner_is_kafkas() -> None:
    rng = np.random.default_rng(3)
    keys = [rng.bytes(int(length)) for length in rng.integers(0, 70, 2_000)]
    for partitions in (1, 4, 7, 256):
        expected = [(murmur2(key) & 0x7FFFFFFF) % partitions for key in keys]
        assert murmur2_partitions(keys, partitions).tolist() == expected
