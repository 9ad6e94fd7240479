"""What the worker does where log, topic or bus are not as it left them; the log is real, the bus is a double."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest

from fraud_nb.adapters import kafka_bus
from fraud_nb.adapters.kafka_bus import KafkaSource, create_topics, murmur2_partitions, topic_id
from fraud_nb.adapters.memory import MemorySink, MemorySource, MemoryStateStore
from fraud_nb.adapters.ports import BusUnavailable, Fenced, OffsetGap, StoreUnavailable
from fraud_nb.adapters.postgres import LogReader, OtherTopic, PostgresLog, migrate
from fraud_nb.adapters.redis_store import RedisStateStore
from fraud_nb.apps.parts import model_in
from fraud_nb.domain.schema import Transaction, encode
from fraud_nb.pipeline.stream import Worker, step
from tests.conftest import own_database, tampering
from tests.e2e.stream_kit import NOON, produce, small_model
from tests.faults.proxy import Proxy

ADA, HOME = b"ada", int(murmur2_partitions([b"ada"], 4)[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_in(small_model(Path(tmp_path_factory.mktemp("model")) / "model.bundle", rounds=3))


@pytest.fixture
def postgres(servers: Any) -> Iterator[str]:
    with own_database(servers.postgres, "setbacks") as dsn:
        migrate(dsn, 4)
        yield dsn


@pytest.fixture
def worker(postgres: str, model: Any) -> Iterator[Worker]:
    source = MemorySource(4)
    made = Worker(source, MemorySink(source), MemoryStateStore(), PostgresLog(postgres), model, 4)
    step(made, 0)
    yield made
    made.log.close()


def buy(worker: Worker, first: int, stop: int, shop: str = "books") -> None:
    """Purchases of one customer, one a minute."""
    for number in range(first, stop):
        each = Transaction(f"t{number}", "ada", NOON + number * 60_000, 1_000, "EUR", shop)
        worker.source.append(encode(each), ADA, HOME, timestamp_ms=each.event_time)  # type: ignore[attr-defined]


def work(worker: Worker) -> None:
    """Until there is nothing more to do."""
    while step(worker, 0) or step(worker, 0):  # one turn may go into a claim
        pass


def told(worker: Worker) -> list[str]:
    """Ids on the topic of predictions, in order."""
    return [record.key.decode() for record in worker.sink.published if record.topic == "predictions"]  # type: ignore[attr-defined]


def test_a_row_that_the_log_refuses_is_a_dead_letter_and_the_others_are_decided(worker: Worker, postgres: str) -> None:
    with tampering(postgres) as cursor:
        cursor.execute("ALTER TABLE decisions ADD CHECK (merchant_id <> 'cursed')")
    buy(worker, 0, 5)
    buy(worker, 5, 6, "cursed")
    buy(worker, 6, 12)
    work(worker)
    rows = [row for page in worker.log.read(HOME, 0, 99) for row in page]
    assert [row.offset for row in rows] == [*range(5), *range(6, 12)]
    assert worker.log.read_dead_letters(HOME, 0, 99) == [(5, "transaction", "not_storable")]
    assert told(worker) == [f"t{number}" for number in range(12) if number != 5]


def test_records_that_retention_took_are_noted_as_a_gap(worker: Worker, postgres: str) -> None:
    buy(worker, 0, 3)
    work(worker)
    buy(worker, 3, 10)
    worker.source.trim(HOME, 7)  # type: ignore[attr-defined]
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("SELECT partition, start, stop FROM gaps")
        assert cursor.fetchall() == [(HOME, 3, 7)]
    assert told(worker) == ["t0", "t1", "t2", "t7", "t8", "t9"] and worker.counts.gone == 4
    assert worker.store.watermark(HOME) == worker.log.progress()[HOME] == worker.source.committed(HOME) == 10


def test_a_log_that_ends_before_our_place_is_another_log(worker: Worker, postgres: str) -> None:
    buy(worker, 0, 3)
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE progress SET next_offset = 8 WHERE partition = %s", (HOME,))
    worker.source.rebalance(range(4))  # type: ignore[attr-defined]
    worker.source.offsets[HOME] = 8  # type: ignore[attr-defined]
    with pytest.raises(OffsetGap, match="made anew"):
        work(worker)


def test_a_log_that_was_set_back_decides_again_and_tells_nobody_twice(worker: Worker, postgres: str) -> None:
    buy(worker, 0, 6)
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE progress SET next_offset = 2 WHERE partition = %s", (HOME,))
        cursor.execute('DELETE FROM decisions WHERE "offset" >= 2')
    worker.source.rebalance(range(4))  # type: ignore[attr-defined]
    buy(worker, 6, 9)
    work(worker)
    assert told(worker) == [f"t{number}" for number in range(9)]
    assert [row.offset for page in worker.log.read(HOME, 0, 99) for row in page] == list(range(9))
    assert worker.store.watermark(HOME) == worker.source.committed(HOME) == 9


def test_a_store_that_lost_its_content_is_noticed_though_nothing_comes(worker: Worker) -> None:
    buy(worker, 0, 3)
    work(worker)
    worker.store.wipe(HOME)
    with pytest.raises(Fenced):
        step(worker, 0)
    work(worker)
    assert worker.store.watermark(HOME) == 3 and worker.counts.decided == 3


def test_a_log_knows_its_topic(postgres: str) -> None:
    log = PostgresLog(postgres)
    log.check_topic("transactions", "one")
    log.check_topic("transactions", "one")
    with pytest.raises(OtherTopic, match="made anew"):
        log.check_topic("transactions", "another")
    log.close()


def test_a_sleeping_client_keeps_no_lock_for_long(postgres: str) -> None:
    log = PostgresLog(postgres)
    with log._transaction() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchone() == ("10s",)
    log.close()


def port_of(address: str) -> int:
    return int(address.rpartition("@")[2].partition("/")[0].rpartition(":")[2])


def test_nobody_waits_for_a_silent_server(servers: Any, postgres: str) -> None:
    """It is there, and takes whatever it is told; only its replies do not come."""
    wires = Proxy(port_of(servers.postgres)), Proxy(port_of(servers.redis))
    log = LogReader(psycopg2.extensions.make_dsn(postgres, port=wires[0].port), patience_s=1)
    store = RedisStateStore(servers.redis.replace(f":{wires[1].upstream}/", f":{wires[1].port}/"), 0.5)
    for wire in wires:
        wire.is_deaf = True
    with pytest.raises(StoreUnavailable, match="postgres"):
        log.progress()
    with pytest.raises(StoreUnavailable, match="Redis"):
        store.watermark(0)
    for wire in wires:
        wire.is_deaf = False
    assert len(log.progress()) == 4 and store.watermark(99) is None
    log.close()
    store.close()
    for wire in wires:
        wire.close()


def test_a_consumer_that_brings_nothing_is_exchanged(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create_topics(servers.kafka, 4)
    assert len(topic_id(servers.kafka, "transactions")) == 36
    source = KafkaSource(servers.kafka, group="stalls")
    while not source.assigned():
        source.poll(0.2, 1)
    generation, first = source.generation(), kafka_bus.topic_ends(servers.kafka, "transactions")[0]
    source.seek(0, first)
    produce(servers.kafka, [(0, ADA, b"{}")])
    monkeypatch.setattr(kafka_bus, "STALL_S", 0.5)
    monkeypatch.setattr(source._consumer, "poll", lambda *words, **named: {})
    with pytest.raises(BusUnavailable, match="joined the group anew"):
        while True:
            source.poll(0.05, 1)
    monkeypatch.setattr(kafka_bus, "STALL_S", 60)
    while not source.assigned():
        source.poll(0.2, 1)
    assert source.generation() > generation
    source.seek(0, first)
    while not (found := source.poll(0.5, 10)):
        pass
    assert found[0].offset == first
    source.close()
