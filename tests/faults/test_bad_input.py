"""The 64 classes of bad input on real servers: each is answered, none stops what is good, no value gets out."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder

from fraud_nb.adapters.kafka_bus import (
    DEAD_LETTERS,
    LARGEST_RECORD,
    PREDICTIONS,
    TRANSACTIONS,
    create_topics,
    read_topic,
)
from fraud_nb.adapters.ports import Record
from fraud_nb.adapters.postgres import migrate
from fraud_nb.apps.parts import model_in, open_predictor
from fraud_nb.domain.config import Settings
from tests.conftest import Running
from tests.e2e.stream_kit import MAIN, fraud, small_model
from tests.faults.corpus import (
    CANARY,
    DECIDED,
    PARTITIONS,
    REPEAT,
    TEXTS,
    UNSENT,
    Corpus,
    Example,
    Refusal,
    check_over_http,
    home_of,
    purchase,
)
from tests.service.bento_kit import free_port
from tests.service.service_kit import House, ask, house, patiently, wait_until

pytestmark = pytest.mark.timeout(600)
CARDS = (CANARY, "4111111111111111")  # over the stream, over HTTP


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Place(NamedTuple):
    """Where the broker put a record."""

    partition: int
    offset: int


@dataclass
class Shop:
    """Servers, a worker that runs all the time, and the real service."""

    addresses: Any
    environment: Mapping[str, str]
    model: Path
    worker: subprocess.Popen[bytes]
    said: Path  # by the worker
    metrics_port: int
    service: House
    sender: KafkaProducer
    sent: dict[Place, Example] = field(default_factory=dict)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log."""
        with psycopg2.connect(self.addresses.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    def send(self, example: Example) -> Place | None:
        """Onto the topic; None: the broker does not take it."""
        key = example.customer.encode()
        partition = (home_of(example.customer) + example.steps_astray) % PARTITIONS
        try:
            found = self.sender.send(TRANSACTIONS, value=example.body, key=key, partition=partition).get(30)
        except kafka_errors.MessageSizeTooLargeError:
            return None
        self.sent[Place(found.partition, found.offset)] = example
        return Place(found.partition, found.offset)

    def send_batch(self, packed: int, records: Sequence[tuple[Example, list[tuple[str, bytes | None]]]]) -> None:
        """Records with headers in one batch, packed as no client of this kind packs them."""
        place, queue = TopicPartition(TRANSACTIONS, home_of("ada")), self.sender._accumulator
        built = MemoryRecordsBuilder(2, packed, 1 << 20)
        for example, headers in records:
            built.append(None, example.customer.encode(), example.body, headers)
        batch = ProducerBatch(place, built)
        with queue._tp_lock(place):
            queue._batches[place].append(batch)
            queue._incomplete.add(batch)
        self.sender._sender.wakeup()
        self.sender.flush(30)
        first, *_ = batch.produce_future.value
        self.sent |= {Place(place.partition, first + number): each for number, (each, _) in enumerate(records)}

    def catch_up(self) -> None:
        """Wait until the worker has dealt with all that was sent."""

        def is_done() -> bool:
            assert self.worker.poll() is None, self.said.read_text()
            reached = dict(self.rows("SELECT partition, next_offset FROM progress"))
            return all(reached[place.partition] > place.offset for place in self.sent)

        wait_until(is_done, f"the worker is at the end of the topic: {self.said}", 90)

    def answers(self) -> dict[Place, tuple[str, ...]]:
        """What the log says about each place."""
        found: dict[Place, tuple[str, ...]] = {}
        for query in (
            "SELECT partition, \"offset\", 'decided', transaction_id FROM decisions WHERE origin = 'stream'",
            'SELECT partition, "offset", field, reason FROM dead_letters',
            "SELECT partition, \"offset\", CASE WHEN same_payload THEN 'repeat' ELSE 'conflict' END, transaction_id"
            " FROM repeats",
        ):
            for partition, offset, *said in self.rows(query):
                assert Place(partition, offset) not in found
                found[Place(partition, offset)] = tuple(said)
        return found

    def letters(self) -> dict[Place, Record]:
        """The dead letters on their topic, by the place of what was refused; each is there once."""
        letters = read_topic(self.addresses.kafka, DEAD_LETTERS)
        found = {Place(*map(int, dict(each.headers)["source"].split(b":"))): each for each in letters}
        assert len(found) == len(letters)
        return found

    def check_letters(self) -> None:
        """Topic and table have the same, and the topic has the bytes as they came."""
        refused = {place: each for place, each in self.sent.items() if isinstance(each.stream, Refusal)}
        wait_until(lambda: set(self.letters()) == set(refused), "all dead letters are on their topic")
        for place, letter in self.letters().items():
            example, headers = refused[place], dict(letter.headers)
            came = example.body, example.customer.encode()
            assert (letter.value, letter.key) == ((None, None) if "left_out" in headers else came)
            assert ("left_out" in headers) == (len(example.body or b"") > LARGEST_RECORD)
            assert (headers["field"].decode(), headers["reason"].decode()) == example.stream[:2]


@pytest.fixture(scope="module")
def shop(private_servers: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    found, folder = private_servers.addresses, tmp_path_factory.mktemp("bad")
    create_topics(found.kafka, PARTITIONS)
    migrate(found.postgres, PARTITIONS)
    environment = {"FRAUD_HOME": str(folder), "FRAUD_KAFKA": found.kafka, "FRAUD_REDIS": found.redis}
    environment["FRAUD_POSTGRES"] = found.postgres
    model, said, port = small_model(folder / "model.bundle"), folder / "worker.log", free_port()
    sender = KafkaProducer(bootstrap_servers=found.kafka, max_request_size=20_000_000, enable_idempotence=False)
    predictor = open_predictor(Settings(), found, model_in(model))
    predictor.warm_up(now_ms())
    command = [sys.executable, "-c", MAIN, "stream", "--model", str(model), "--metrics-port", str(port)]
    with said.open("wb") as out:
        worker = subprocess.Popen([*command, "--status-every", "1"], env={**os.environ, **environment}, stderr=out)
    try:
        with house(predictor=predictor) as service:
            yield Shop(found, environment, model, worker, said, port, service, sender)
    finally:
        sender.close()
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)


def in_the_log(example: Example) -> tuple[str, ...]:
    """What must be there about it."""
    expected = example.stream
    return expected[:2] if isinstance(expected, Refusal) else (expected, example.ident)


def test_the_stream_answers_every_class(shop: Shop) -> None:
    """All of them, with good purchases between them."""
    classes = Corpus("stream", now_ms()).classes()
    places: list[list[Place | None]] = []
    for number, each in enumerate(classes):
        places.append([shop.send(example) for example in each.examples])
        ident = f"good-{number}"
        good = purchase(ident, now_ms(), customer_id='"grace"', merchant_id='"books"')
        assert shop.send(Example(good, DECIDED, DECIDED, ident, "grace"))
    shop.catch_up()
    answers, answered = shop.answers(), 0
    for each, there in zip(classes, places, strict=True):
        for example, place in zip(each.examples, there, strict=True):
            said = (UNSENT, example.ident) if place is None else answers.get(place)
            assert said == in_the_log(example), each
        answered += 1
    assert f"{answered}/{len(classes)} classes answered" == "64/64 classes answered"
    assert answers == {place: in_the_log(example) for place, example in shop.sent.items()}
    shop.check_letters()


def test_http_answers_every_class(shop: Shop) -> None:
    classes, answered = Corpus("http", now_ms()).classes(), 0
    for each in classes:
        check_over_http(each, lambda body: patiently(shop.service.port, body))
        answered += 1
    assert f"{answered}/{len(classes)} classes answered" == "64/64 classes answered"
    count = sum(example.http == DECIDED for each in classes for example in each.examples)
    placed = "SELECT count(*) FROM decisions WHERE origin = 'http' AND \"offset\" IS NOT NULL"
    wait_until(lambda: shop.rows(placed) == [(count,)], "the worker has learned what was decided over HTTP")
    assert shop.rows("SELECT count(*) FROM decisions WHERE origin = 'http'") == [(count,)]


def test_a_record_may_be_packed_in_any_way(shop: Shop) -> None:
    """Whatever the compression, whatever is in the headers: names in Latin-1, no values, our own names misused."""

    class Latin(str):
        def encode(self, *_: str) -> bytes:
            return str.encode(self, "latin-1")

    headers: list[tuple[str, bytes | None]] = [
        (Latin("größe"), b"42"), ("sent_ns", None), ("sent_ns", b"-1"), ("sent_ns", "١٢".encode()), ("advice", None),
        ("advice", b"{}"), ("advice", b"\xff"), ("source", b"0:0"), ("", b""), ("sent_ns", b"9" * 19),
    ]  # fmt: skip
    for packed, name in enumerate(("not", "gzip", "snappy", "lz4", "zstd")):
        good = Example(purchase(f"packed-{name}", now_ms()), DECIDED, DECIDED, f"packed-{name}")
        poison = Example(b"{", Refusal("message", "not_json"), "", f"poison-{name}")
        shop.send_batch(packed, [(good, headers), (poison, headers), (good._replace(stream=REPEAT), [])])
    shop.catch_up()
    answers = shop.answers()
    assert {place: answers.get(place) for place in shop.sent} == {
        place: in_the_log(example) for place, example in shop.sent.items()
    }
    shop.check_letters()


def test_a_record_may_be_larger_than_any_dead_letter(shop: Shop) -> None:
    """Where somebody else made the topic, it may accept more than ours do: then the letter says where the record is."""
    admin = KafkaAdminClient(bootstrap_servers=shop.addresses.kafka)
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, TRANSACTIONS, {"max.message.bytes": "4000000"})])
    admin.close()
    large = Example(b"x" * 3_000_000, Refusal("message", "too_large"), "", "large")
    wait_until(lambda: shop.send(large), "the broker takes it")
    shop.catch_up()
    shop.check_letters()


def test_a_card_number_is_kept_where_the_shop_put_it_and_nowhere_else(shop: Shop) -> None:
    """As any text, in place of any name, as key, header, query and path."""
    for number, name in enumerate(TEXTS):
        for bad in ("\\n", "\\u0000", "x" * 64):
            body = purchase(f"bad-{number}", now_ms(), **{name: f'"{CANARY}{bad}"'})
            shop.send(Example(body, Refusal(name, "bad_text"), "", ""))
            told = patiently(shop.service.port, body)
            assert (told.status, told.json["field"], told.json["error"]) == (400, name, "bad_text")
            assert CANARY.encode() not in told.body
        for card, send in zip(CARDS, (shop.send, lambda each: patiently(shop.service.port, each.body)), strict=True):
            ident = card if name == "transaction_id" else f"card-{card[:4]}-{number}"
            customer = card if name == "customer_id" else "ada"
            body = purchase(ident, now_ms(), **{"merchant_id": None, name: f'"{card}"'})
            send(Example(body, DECIDED, DECIDED, ident, customer))
    keyed = Example(purchase("keyed", now_ms()), Refusal("customer_id", "wrong_partition"), "", "", CANARY)
    shop.send(keyed._replace(steps_astray=home_of("ada") + 1 - home_of(CANARY)))
    for card in CARDS:
        assert shop.service.ask("GET", f"/decisions/{card}?card={card}").json["transaction_id"] == card
        assert (
            shop.service.ask("PUT", f"/{card}", card, {"X-Card": card, card: card, "Content-Type": card}).status == 404
        )
        assert shop.service.ask("POST", "/predict", card, {"Content-Type": card}).status == 415
    shop.catch_up()
    shop.check_letters()


def test_nothing_of_it_got_out_and_all_of_it_is_right(shop: Shop) -> None:
    """No card number in any log line, metric or row of refusals; every decision recomputed; the worker still works."""
    sink = shop.rows("SELECT dead_letters::text FROM dead_letters")
    pages = [ask(shop.metrics_port, "GET", "/metrics").body.decode(), shop.service.ask("GET", "/metrics").body.decode()]
    texts = [shop.said.read_text(), *shop.service.lines, *pages, *(text for (text,) in sink)]
    assert shop.worker.poll() is None and len(sink) > 100 and '"status"' in texts[0]
    assert f"fraud_dead_letters_total {len(sink)}.0" in pages[0]
    found = [text for text in texts if any(card in text for card in CARDS)]
    assert not found
    assert not any(word in texts[0] for word in ("Traceback", '"level": "error"'))
    done = fraud(shop.environment, "verify", "--model", str(shop.model))
    assert done.returncode == 0 and "0 mismatches" in done.stderr, done.stderr
    idents = [record.key for record in read_topic(shop.addresses.kafka, PREDICTIONS)]
    assert len(idents) == len(set(idents)) and shop.rows("SELECT count(*) FROM decisions") == [(len(idents),)]
