"""What the worker does where log, topic or bus are not as it left them; the log is real, the bus is a double."""

import threading
import time
from typing import Any

import psycopg2.extensions
import pytest

from fraud_nb.adapters import kafka_bus
from fraud_nb.adapters.kafka_bus import KafkaSource, create_topics, topic_id
from fraud_nb.adapters.ports import BusUnavailable, Fenced, OffsetGap, StoreUnavailable
from fraud_nb.adapters.postgres import LogReader, OtherTopic, PostgresLog
from fraud_nb.adapters.redis_store import RedisStateStore
from fraud_nb.adapters.servers import Addresses
from fraud_nb.apps.parts import open_worker
from fraud_nb.decision.judge import Model
from fraud_nb.domain.config import Settings
from fraud_nb.pipeline.stream import step
from tests.conftest import tampering
from tests.contracts.worker_kit import (
    ADA,
    HOME,
    PARTITIONS,
    Rehearsal,
    at,
    buy,
    differences,
    purchase,
    send,
    told,
    work,
)
from tests.e2e.stream_kit import produce
from tests.faults.proxy import Proxy


def test_a_row_that_the_log_refuses_is_a_dead_letter_and_the_others_are_decided(
    worker: Rehearsal, postgres: str
) -> None:
    with tampering(postgres) as cursor:
        cursor.execute("ALTER TABLE decisions ADD CHECK (merchant_id <> 'cursed')")
    buy(worker, 0, 5)
    send(worker, purchase(5, "cursed"))
    buy(worker, 6, 12)
    work(worker)
    rows = [row for page in worker.log.read(HOME, 0, 99) for row in page]
    assert [row.offset for row in rows] == [*range(5), *range(6, 12)]
    assert worker.log.read_dead_letters(HOME, 0, 99) == [(5, "transaction", "not_storable")]
    assert told(worker) == at(*range(5), *range(6, 12)) and told(worker, "dead-letters") == at(5)
    assert differences(worker) == []


def test_records_that_retention_took_are_noted_as_a_gap(worker: Rehearsal, postgres: str) -> None:
    buy(worker, 0, 3)
    work(worker)
    buy(worker, 3, 10)
    worker.source.trim(HOME, 7)
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("SELECT partition, start, stop FROM gaps")
        assert cursor.fetchall() == [(HOME, 3, 7)]
    assert told(worker) == at(0, 1, 2, 7, 8, 9) and worker.counts.gone == 4
    assert worker.store.watermark(HOME) == worker.log.progress()[HOME] == worker.source.committed(HOME) == 10


def test_a_log_that_ends_before_our_place_is_another_log(worker: Rehearsal, postgres: str) -> None:
    buy(worker, 0, 3)
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE progress SET next_offset = 8 WHERE partition = %s", (HOME,))
    worker.source.rebalance(range(PARTITIONS))
    worker.source.offsets[HOME] = 8
    with pytest.raises(OffsetGap, match="made anew"):
        work(worker)


def test_a_log_that_was_set_back_decides_again_and_tells_nobody_twice(worker: Rehearsal, postgres: str) -> None:
    buy(worker, 0, 6)
    work(worker)
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE progress SET next_offset = 2 WHERE partition = %s", (HOME,))
        cursor.execute('DELETE FROM decisions WHERE "offset" >= 2')
    worker.source.rebalance(range(PARTITIONS))
    buy(worker, 6, 9)
    work(worker)
    assert told(worker) == at(*range(9)) and differences(worker) == []
    assert [row.offset for page in worker.log.read(HOME, 0, 99) for row in page] == list(range(9))
    assert worker.store.watermark(HOME) == worker.source.committed(HOME) == 9


def test_a_store_that_lost_its_content_is_noticed_though_nothing_comes(worker: Rehearsal) -> None:
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


def test_no_worker_starts_on_another_topic(servers: Any, postgres: str, model: Model) -> None:
    create_topics(servers.kafka, PARTITIONS)
    log = PostgresLog(postgres)
    log.check_topic("transactions", "one that had the same name")
    log.close()
    with pytest.raises(OtherTopic, match="made anew"):
        open_worker(Settings(), Addresses(servers.kafka, servers.redis, postgres), model)


def test_a_sleeping_client_keeps_no_lock_for_long(postgres: str) -> None:
    log = PostgresLog(postgres)
    with log._transaction() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchone() == ("10s",)
    log.close()


def port_of(address: str) -> int:
    return int(address.rpartition("@")[2].partition("/")[0].rpartition(":")[2])


def test_nobody_waits_for_a_silent_server(servers: Any, alone: str, postgres: str) -> None:
    """It is there, and takes whatever it is told; only its replies do not come."""
    wires = Proxy(port_of(alone)), Proxy(port_of(servers.redis))
    log = LogReader(psycopg2.extensions.make_dsn(postgres, port=wires[0].port), patience_s=1)
    store = RedisStateStore(servers.redis.replace(f":{wires[1].upstream}/", f":{wires[1].port}/"), 0.5)
    rescue = threading.Timer(60, lambda: [wire.cut() for wire in wires])
    rescue.start()
    for wire in wires:
        wire.is_deaf = True
    with pytest.raises(StoreUnavailable, match="postgres"):
        log.progress()
    with pytest.raises(StoreUnavailable, match="Redis"):
        store.watermark(0)
    assert rescue.is_alive(), "they would be waiting still"
    rescue.cancel()
    for wire in wires:
        wire.is_deaf = False
    assert len(log.progress()) == 4 and store.watermark(99) is None
    log.close()
    store.close()
    for wire in wires:
        wire.close()


def test_a_consumer_that_brings_nothing_is_exchanged(servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create_topics(servers.kafka, PARTITIONS)
    assert len(topic_id(servers.kafka, "transactions")) == 36
    source = KafkaSource(servers.kafka, group="stalls")
    while not source.assigned():
        source.poll(0.2, 1)
    generation, first = source.generation(), kafka_bus.topic_ends(servers.kafka, "transactions")[0]
    source.seek(0, first)
    produce(servers.kafka, [(0, ADA, b"{}")])
    monkeypatch.setattr(kafka_bus, "STALL_S", 0.5)
    monkeypatch.setattr(source._consumer, "poll", lambda *words, **named: {})
    enough_s = time.monotonic() + 60
    with pytest.raises(BusUnavailable, match="joined the group anew"):
        while time.monotonic() < enough_s:
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
