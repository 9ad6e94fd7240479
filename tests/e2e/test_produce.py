"""The producer: pace against a fake clock, labels at their time against a sort, and a real broker at the end."""

import math
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.partitioner.default import murmur2

from fraud_nb.adapters import feed as feed_module
from fraud_nb.adapters.feed import KafkaFeed, remembered_partition
from fraud_nb.adapters.kafka_bus import LABELS, TRANSACTIONS, murmur2_partitions, read_topic
from fraud_nb.adapters.ports import BusUnavailable, Outgoing
from fraud_nb.domain.schema import Label, decode, decode_label
from fraud_nb.features.windows import DAY_MS, HOUR_MS
from fraud_nb.learning.simulate import World, labels, simulate, transactions
from fraud_nb.operations.files import Columns, FileMap, Labels, MappedBatch, Time, rows_of
from fraud_nb.operations.produce import Message, Purchase, Sent, due_time, produce, recorded, simulated, with_labels

START = 1_600_000_000_000


class FakeTime:
    """A clock that moves when somebody pauses, or when a send takes its time."""

    def __init__(self, rng: random.Random, longest_send_s: float) -> None:
        self.rng, self.longest_send_s, self.now = rng, longest_send_s, 1e6
        self.begun_at: list[float] = []
        self.records: list[Outgoing] = []

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        assert 0 < seconds <= 0.2
        self.now += seconds + self.rng.uniform(0, 0.003)  # a real sleep takes longer than asked for

    def send(self, record: Outgoing) -> None:
        self.begun_at.append(self.now - 1e6)
        self.records.append(record)
        self.now += self.rng.uniform(0, self.longest_send_s)


def payment(number: int, event_time_ms: int) -> Message:
    return Message(event_time_ms, TRANSACTIONS, b"ada", str(number).encode())


def send_all(
    fake: FakeTime, messages: Any, rate: float | None, speed: float | None, reports: list[Sent] | None = None
) -> Sent:
    told: list[Sent] = [] if reports is None else reports
    return produce(messages, fake.send, fake.clock, fake.pause, lambda: 2**61, rate, speed, lambda: False, told.append)


def test_the_rate_neither_drifts_nor_skips() -> None:
    fake, reports = FakeTime(random.Random(1), 0.004), list[Sent]()
    sent = send_all(fake, (payment(number, START) for number in range(5000)), 200.0, None, reports)
    assert [record.value for record in fake.records] == [str(number).encode() for number in range(5000)]
    lateness = [begun - number / 200 for number, begun in enumerate(fake.begun_at)]
    assert min(lateness) > -1e-6 and max(lateness) < 0.01  # never early; what is late does not add up
    assert sent.transactions == 5000 and abs(sent.seconds - 25) < 0.02 and sent.late_s < 0.02
    assert 20 <= len(reports) <= 25 and reports == sorted(reports)


def test_a_slow_bus_is_not_waited_for_and_its_lateness_is_told() -> None:
    fake = FakeTime(random.Random(2), 0.02)  # 10 ms each on average, 5 ms are due
    sent = send_all(fake, (payment(number, START) for number in range(1000)), 200.0, None)
    assert sent.transactions == 1000 and sent.seconds == pytest.approx(10, rel=0.1)
    assert sent.late_s == pytest.approx(sent.seconds - 999 / 200, abs=0.05)


def test_speed_keeps_the_gaps_and_forgives_disorder() -> None:
    hours = [0, 1, 5, 3, 6, 6]  # one row out of order
    fake = FakeTime(random.Random(3), 0.0)
    sent = send_all(fake, [payment(number, START + hour * HOUR_MS) for number, hour in enumerate(hours)], None, 3600.0)
    assert fake.begun_at == pytest.approx([0, 1, 5, 5, 6, 6], abs=0.01)
    assert sent.late_s < 0.01


def test_labels_ride_along_with_the_rate() -> None:
    stream = [payment(0, START), Message(START, LABELS, b"t0", b"{}"), payment(1, START)]
    fake = FakeTime(random.Random(4), 0.0)
    sent = send_all(fake, stream, 10.0, None)
    assert fake.begun_at == pytest.approx([0, 0.1, 0.1], abs=0.01) and (sent.transactions, sent.labels) == (2, 1)
    assert [record.partition for record in fake.records] == [None, 0, None]
    assert all(record.headers == (("sent_ns", str(2**61).encode()),) for record in fake.records)


def test_without_a_pace_nothing_waits_and_nothing_is_late() -> None:
    fake = FakeTime(random.Random(5), 0.001)
    sent = send_all(fake, [payment(number, START + number * DAY_MS) for number in range(100)], None, None)
    assert sent.seconds < 0.1 and sent.late_s == 0.0


def test_nothing_to_send() -> None:
    assert send_all(FakeTime(random.Random(6), 0.0), [], 5.0, None) == Sent(0, 0, 0.0, 0.0)


def test_the_clock_starts_when_the_first_message_is_there() -> None:
    fake = FakeTime(random.Random(7), 0.0)

    def slow_to_begin() -> Iterator[Message]:
        fake.now += 30  # populating a town
        yield payment(0, START)

    assert send_all(fake, slow_to_begin(), 5.0, None).late_s < 0.01


@pytest.mark.parametrize(
    ("rate", "speed"), [(1.0, 1.0), (0.0, None), (-1.0, None), (math.nan, None), (None, 0.0), (None, math.inf)]
)
def test_a_pace_that_is_none(rate: float | None, speed: float | None) -> None:
    with pytest.raises(ValueError, match="rate|speed"):
        due_time(rate, speed)


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_labels_come_when_they_become_known(seed: int, flush: bool) -> None:
    """Against a slow definition: before each purchase, every known label that has not been sent, by time."""
    rng = random.Random(seed)
    purchases: list[Purchase] = []
    for number in range(300):
        moment = START + number * HOUR_MS - rng.choice((0, 0, 0, 5 * HOUR_MS))
        delay = rng.choice((0, HOUR_MS, DAY_MS, 20 * DAY_MS))
        label = Label(f"t{number}", True, moment + delay) if rng.random() < 0.5 else None
        purchases.append((payment(number, moment), label))
    earlier = [Label(f"e{number}", True, START + rng.randrange(30) * DAY_MS) for number in range(20)]
    expected: list[str] = []
    known, newest = list(earlier), 0
    for message, label in purchases:
        newest = max(newest, message.event_time_ms)
        ripe = sorted((each for each in known if each.label_time <= newest), key=lambda each: each.label_time)
        expected += [each.transaction_id for each in ripe] + [message.value.decode()]
        known = [each for each in known if each.label_time > newest] + ([] if label is None else [label])
    left: list[int] = []
    told = list(with_labels(purchases, left.append, earlier, flush))
    if flush:
        expected += [each.transaction_id for each in sorted(known, key=lambda each: each.label_time)]
    assert [decode_label(m.value).transaction_id if m.topic == LABELS else m.value.decode() for m in told] == expected
    assert left == [0 if flush else len(known)] and known
    assert all(
        message.key == decode_label(message.value).transaction_id.encode()
        for message in told
        if message.topic == LABELS
    )


def test_a_town_from_the_middle_tells_what_the_whole_town_tells() -> None:
    world, left = World(customers=150, days=75, fraud_rate=0.02), list[int]()
    chunks = list(simulate(world))
    told = list(simulated(world, 60, 75, left.append))
    paid = [decode(message.value) for message in told if message.topic == TRANSACTIONS]
    assert paid == [each for chunk in chunks[60:] for each in transactions(chunk)]
    newest, first = paid[-1].event_time, world.start_ms + 60 * DAY_MS
    claims = [label for chunk in chunks for label in labels(chunk) if label.label_time >= first]
    heard = [decode_label(message.value) for message in told if message.topic == LABELS]
    assert {each.transaction_id for each in heard} == {
        each.transaction_id for each in claims if each.label_time <= newest
    }
    assert left == [len(claims) - len(heard)] and len(heard) > 10 and left[0] > 10
    times = [message.event_time_ms for message in told]
    assert times == sorted(times)
    alone = [message for message in simulated(world, 60, 75, left.append, earlier_days=0) if message.topic == LABELS]
    assert 0 < len(alone) < len(heard)


def test_a_town_may_never_end() -> None:
    endless = simulated(World(customers=20, days=1), 0, None, lambda _: None, earlier_days=0)
    assert [next(endless) for _ in range(200)][-1].event_time_ms > World().start_ms + DAY_MS


def test_a_file_on_a_real_broker(servers: Any, tmp_path: Path) -> None:
    """Everything arrives once, in order, in the customer's partition, with the moment of sending."""
    path, rows = tmp_path / "table.csv", 3000
    lines = (f"t{row},customer {row % 50},{START + row * HOUR_MS},1.50,{row % 10 // 9}" for row in range(rows))
    path.write_text("id,who,when,paid,fraud\n" + "\n".join(lines) + "\nx,,1,1,0\n")
    columns = Columns(transaction_id="id", customer_id="who", event_time="when", amount="paid")
    mapped = FileMap(columns=columns, time=Time("ms"), labels=Labels(column="fraud", delay_days=7))
    topics = {name: f"{name}-{uuid.uuid4().hex[:8]}" for name in (TRANSACTIONS, LABELS)}
    admin = KafkaAdminClient(bootstrap_servers=servers.kafka)
    admin.create_topics(
        {topics[TRANSACTIONS]: {"num_partitions": 4}, topics[LABELS]: {"num_partitions": 1}}, wait_for_metadata=True
    )
    admin.close()
    feed, batches, left = (
        KafkaFeed(servers.kafka, remembered_partition(murmur2_partitions, 4)),
        list[MappedBatch](),
        list[int](),
    )
    stream = with_labels(recorded(rows_of(path, mapped), batches.append), left.append)
    began_ns = time.time_ns()
    sent = produce(
        stream, lambda record: feed.send(record._replace(topic=topics[record.topic])),
        time.monotonic, time.sleep, time.time_ns, 2000.0, None, lambda: False, lambda _: None,
    )  # fmt: skip
    feed.flush()
    feed.close()
    assert [len(batch.refusals) for batch in batches] == [1]
    assert sent.transactions == rows and sent.labels + left[0] == rows // 10
    assert sent.seconds > 0.99 * rows / 2000, "not faster than asked; a busy machine may be slower"
    arrived = read_topic(servers.kafka, topics[TRANSACTIONS])
    assert sorted(decode(each.value).event_time for each in arrived) == [START + row * HOUR_MS for row in range(rows)]
    for each in arrived:
        assert each.key == decode(each.value).customer_id.encode()
        assert each.partition == (murmur2(each.key) & 0x7FFFFFFF) % 4
        assert began_ns < int(dict(each.headers)["sent_ns"]) < time.time_ns()
    for partition in range(4):
        times = [decode(each.value).event_time for each in arrived if each.partition == partition]
        assert times == sorted(times) and times
    claimed = [decode_label(each.value) for each in read_topic(servers.kafka, topics[LABELS])]
    assert [each.transaction_id for each in claimed] == [f"t{row}" for row in range(9, rows, 10)][: sent.labels]


def test_the_feed_bounds_what_is_under_way(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "UNDER_WAY", 10)
    topic = f"bounded-{uuid.uuid4().hex[:8]}"
    admin = KafkaAdminClient(bootstrap_servers=servers.kafka)
    admin.create_topics({topic: {"num_partitions": 1}}, wait_for_metadata=True)
    admin.close()
    feed = KafkaFeed(servers.kafka, lambda key: 0)
    for number in range(200):
        feed.send(Outgoing(topic, None, None, str(number).encode()))
    feed.flush()
    assert [each.value for each in read_topic(servers.kafka, topic)] == [str(number).encode() for number in range(200)]
    feed.send(Outgoing(topic, 0, None, b"x" * (3 << 19)))  # larger than the topic accepts, as the broker says later
    with pytest.raises(BusUnavailable, match="TooLarge"):
        feed.flush()
    with pytest.raises(BusUnavailable):
        feed.send(Outgoing(topic, 0, None, b"no more"))
    feed.close()


def test_a_bus_that_is_not_there() -> None:
    with pytest.raises(BusUnavailable, match="connect"):
        KafkaFeed("127.0.0.1:1", lambda key: 0, deadline_s=0.2)
