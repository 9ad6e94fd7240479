"""Asked over HTTP, on real servers: the same features and scores as the stream, one decision each, whatever is away."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psycopg2
import pytest
import redis

from fraud_nb.adapters.kafka_bus import PREDICTIONS, TRANSACTIONS, create_topics, read_topic
from fraud_nb.adapters.ports import Unavailable
from fraud_nb.adapters.postgres import LogOverview, migrate
from fraud_nb.adapters.servers import Addresses, find, servers, up
from fraud_nb.apps.parts import model_in, open_predictor
from fraud_nb.domain.config import Settings
from fraud_nb.domain.schema import Outcome, StatelessRequest, Transaction, encode
from fraud_nb.features.windows import HOUR_MS, MINUTE_MS
from fraud_nb.pipeline.predict import Answer, IdConflict, Predictor
from tests.conftest import quiet
from tests.e2e.stream_kit import MAIN, NOON, fraud, produce, purchase, small_model

KAFKA, VALKEY, POSTGRES = range(3)  # as `servers` lists them


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Shop:
    """The servers, a worker, and a predictor in this process."""

    home: Path
    addresses: Addresses
    environment: dict[str, str]
    model: Path
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    number: int = 0

    def purchases(self, count: int) -> list[Transaction]:
        """The next ones, in rough order of time."""
        self.number += count
        return [
            purchase(self.rng, number, NOON + number * 20 * MINUTE_MS)
            for number in range(self.number - count, self.number)
        ]

    def send(self, purchases: list[Transaction], predictor: Predictor) -> None:
        """Over the topic, where they belong."""
        keys = [each.customer_id.encode() for each in purchases]
        homes = predictor.bench.partitioner(keys, 4).tolist()
        records = [(home, key, encode(each)) for home, key, each in zip(homes, keys, purchases, strict=True)]
        produce(self.addresses.kafka, records)

    @contextmanager
    def worker(self, idle_s: int = 3) -> Iterator[subprocess.Popen[str]]:
        """A worker at work; at the end it has nothing left to do."""
        command = [sys.executable, "-c", MAIN, "stream", "--model", str(self.model), "--until-idle", str(idle_s)]
        worker = subprocess.Popen(command, env={**os.environ, **self.environment}, stderr=subprocess.PIPE, text=True)
        try:
            yield worker
            _, said = worker.communicate(timeout=90)
            assert worker.returncode == 0, said
        finally:
            worker.kill()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log."""
        with psycopg2.connect(self.addresses.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    @contextmanager
    def without(self, number: int, kill: signal.Signals = signal.SIGKILL) -> Iterator[None]:
        """One of the servers is gone for a while."""
        pid = find(servers(self.home)[number])
        assert pid is not None
        os.kill(pid, kill)
        wait_until(lambda: find(servers(self.home)[number]) is None)
        try:
            yield
        finally:
            up(self.home, quiet)

    def features(self, ident: str) -> dict[str, float]:
        """What a decision was made from, by name."""
        row = LogOverview(self.addresses.postgres).find(ident)
        assert row is not None and row.judgement is not None
        index = dict(self.rows("SELECT feature_set, features FROM feature_sets"))
        names = [name for name, _ in json.loads(index[row.judgement.feature_set])]
        return dict(zip(names, np.frombuffer(row.judgement.features, "<f4").tolist(), strict=True))

    def check(self) -> None:
        """Every decision recomputed; every placed one published once."""
        done = fraud(self.environment, "verify", "--model", str(self.model))
        assert done.returncode == 0, done.stderr
        ((placed,),) = self.rows('SELECT count(*) FROM decisions WHERE "offset" >= 0')
        ids = [record.key for record in read_topic(self.addresses.kafka, PREDICTIONS)]
        assert len(ids) == len(set(ids)) == placed


@pytest.fixture(scope="module")
def shop(private_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    found = private_servers.addresses
    create_topics(found.kafka, 4)
    migrate(found.postgres, 4)
    folder = tmp_path_factory.mktemp("predict")
    environment = {"FRAUD_HOME": str(folder), "FRAUD_KAFKA": found.kafka, "FRAUD_REDIS": found.redis}
    environment |= {"FRAUD_POSTGRES": found.postgres}
    return Shop(private_servers.home, found, environment, small_model(folder / "model.bundle"))


@pytest.fixture
def predictor(shop: Shop) -> Iterator[Predictor]:
    """Opened as the service opens it, swept once a second."""
    opened = open_predictor(Settings(), shop.addresses, model_in(shop.model))
    opened.sweep(now_ms())
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(1):
            opened.sweep(now_ms())

    thread = threading.Thread(target=sweep)
    thread.start()
    yield opened
    ended.set()
    thread.join()
    opened.close()


def one(predictor: Predictor, request: Transaction | StatelessRequest) -> Answer:
    (answer,) = predictor.predict([request], now_ms())
    assert isinstance(answer, Answer)
    return answer


def test_both_ways_in_at_once(shop: Shop, predictor: Predictor) -> None:
    """A third over HTTP, a third over the topic, a third both ways at once: one decision each, all recomputed."""
    answers: dict[str, Answer] = {}
    with shop.worker() as worker:
        for _ in range(40):
            purchases = shop.purchases(30)
            sender = threading.Thread(target=shop.send, args=(purchases[:20], predictor))
            sender.start()
            for start in range(10, 30, 4):
                asked = purchases[start : start + 4]
                for request, answer in zip(asked, predictor.predict(asked, now_ms()), strict=True):
                    assert isinstance(answer, Answer) and answer.recorded
                    answers[request.transaction_id] = answer
            sender.join()
        assert worker.poll() is None
    stored = dict(shop.rows("SELECT transaction_id, probability FROM decisions"))
    assert len(stored) == shop.number and all(stored[ident] == answer.probability for ident, answer in answers.items())
    assert shop.rows('SELECT count(*) FROM decisions WHERE "offset" IS NULL') == [(0,)]
    origins = dict(shop.rows("SELECT origin, count(*) FROM decisions GROUP BY 1"))
    assert min(origins["http"], origins["stream"]) > shop.number / 4, "both ways must win often, or this proves little"
    assert shop.rows("SELECT count(*) FROM repeats WHERE NOT same_payload") == [(0,)]
    shop.check()


def test_asked_again(shop: Shop, predictor: Predictor) -> None:
    (request,) = shop.purchases(1)
    first = one(predictor, request)
    assert predictor.predict([request, request], now_ms()) == [first, first]
    other = Transaction(request.transaction_id, "somebody else", request.event_time, 1, "EUR")
    (conflict,) = predictor.predict([other], now_ms())
    assert isinstance(conflict, IdConflict)
    assert predictor.find(request.transaction_id) == first
    assert predictor.find("nothing like it") is None
    twice = shop.purchases(1)[0]
    changed = Transaction(twice.transaction_id, "somebody else", twice.event_time, 1, "EUR")
    answer, conflict = predictor.predict([twice, changed], now_ms())  # in one batch
    assert isinstance(answer, Answer) and isinstance(conflict, IdConflict)


def test_both_callers_get_the_one_decision(shop: Shop, predictor: Predictor) -> None:
    """HTTP first, the stream first, and both at once; each of them more than once, as impatient shops do."""
    noon = NOON + 8_000 * HOUR_MS
    purchases = [Transaction(f"race {number}", "racer", noon + number, 2_000, "EUR", "books") for number in range(90)]
    http_first, stream_first, at_once = purchases[:30], purchases[30:60], purchases[60:]
    with shop.worker(idle_s=5) as worker:
        said = [one(predictor, each) for each in http_first]
        shop.send(http_first * 2, predictor)
        shop.send(stream_first * 2, predictor)
        decided = "SELECT count(*) FROM decisions WHERE transaction_id LIKE 'race %' AND origin = 'stream'"
        wait_until(lambda: shop.rows(decided) == [(30,)])
        said += [one(predictor, each) for each in stream_first]
        sender = threading.Thread(target=shop.send, args=(at_once * 2, predictor))
        sender.start()
        said += [one(predictor, each) for each in at_once]
        sender.join()
        assert worker.poll() is None
    assert said == [one(predictor, each) for each in purchases], "asked again: the same answer"
    assert all(answer.recorded for answer in said)
    assert {answer.features for answer in said[30:60]} == {"stream"} and "stream" not in {
        each.features for each in said[:30]
    }
    told = {record.key: json.loads(record.value or b"") for record in read_topic(shop.addresses.kafka, PREDICTIONS)}
    for answer in said:
        heard = told[answer.transaction_id.encode()]
        assert (heard["probability"], heard["outcome"]) == (answer.probability, answer.decision)
        assert heard["reasons"] == [msgspec.to_builtins(reason) for reason in answer.reasons]
    again = "SELECT bool_and(same_payload) FROM repeats WHERE transaction_id LIKE 'race %'"
    assert shop.rows(again) == [(True,)]
    after = Transaction("race over", "racer", noon + 1_000, 2_000, "EUR", "books")
    one(predictor, after)
    with shop.worker():
        pass
    assert shop.features("race over")["customer_count_1h"] == 90, "each was learned once"
    shop.check()


def test_the_second_purchase_sees_the_first(shop: Shop, predictor: Predictor) -> None:
    customer, noon = "in a hurry", NOON + 9_000 * HOUR_MS
    with shop.worker() as worker:
        for number in range(5):
            request = Transaction(f"hurry {number}", customer, noon + number, 1_000, "EUR", "books")
            one(predictor, request)
            placed = f"SELECT \"offset\" FROM decisions WHERE transaction_id = 'hurry {number}'"
            wait_until(lambda query=placed: shop.rows(query)[0][0] is not None)  # type: ignore[misc]
            home = int(predictor.bench.partitioner([customer.encode()], 4)[0])
            with predictor.bench.store.use() as store:
                offset = shop.rows(placed)[0][0]
                wait_until(lambda: (store.watermark(home) or 0) > offset)  # noqa: B023
        assert worker.poll() is None
    counts = [shop.features(f"hurry {number}")["customer_count_1h"] for number in range(5)]
    assert counts[1:] == [1, 2, 3, 4]
    assert counts[0] == 0 or np.isnan(counts[0])  # cold where nobody of its partition was ever learned
    shop.check()


def test_stateless(shop: Shop, predictor: Predictor) -> None:
    asked = StatelessRequest("TEST123", 150_000, "EUR", "online_retail", None, 2, 3, 37_774_900, -122_419_400)
    answer = one(predictor, asked)
    assert (answer.features, answer.recorded) == ("stateless", True)
    assert one(predictor, asked) == answer == predictor.find("TEST123")
    done = fraud(shop.environment, "replay", "TEST123", "--model", str(shop.model))
    assert done.returncode == 0 and "the request named no customer" in done.stderr
    shop.check()


def test_too_many_declines_are_reviewed(shop: Shop) -> None:
    """The cap is one for service and worker; what it changed is in the log, and can be made again."""
    moment, settings = now_ms(), Settings(declines_per_minute=3)
    dear = [StatelessRequest(f"dear {number}", 150_000, "EUR", "online_retail", None, 2, 3) for number in range(6)]
    first, second = (open_predictor(settings, shop.addresses, model_in(shop.model)) for _ in range(2))
    assert first.bench.breaker.declined == {}, "an overview of this minute would hold what other tests declined"
    answers = [each for each in first.predict(dear[:5], moment) if isinstance(each, Answer)]
    assert [answer.decision for answer in answers] == [Outcome.DECLINE] * 3 + [Outcome.REVIEW] * 2
    assert first.predict(dear[:5], moment) == answers, "asked again: the same answer"
    second.sweep(moment)
    assert second.bench.breaker.held_back == 2
    assert one(second, dear[5]).decision is Outcome.REVIEW, "the other process knows what the first one declined"
    first.close()
    second.close()
    purchases = shop.purchases(300)
    capped = replace(shop, environment=shop.environment | {"FRAUD_DECLINES_PER_MINUTE": "3"})
    shop.send(purchases, first)
    with capped.worker():
        pass
    ids = "'" + "', '".join(each.transaction_id for each in purchases) + "'"
    mine = f"FROM decisions WHERE transaction_id IN ({ids})"
    by_minute = shop.rows(f"SELECT count(*) FILTER (WHERE outcome = 'decline') {mine} GROUP BY record_time / 60000")
    assert all(declined <= 3 for (declined,) in by_minute)
    ((held_back,),) = shop.rows(f"SELECT min(transaction_id) {mine} AND held_back")
    assert held_back is not None
    done = fraud(shop.environment, "replay", held_back, "--model", str(shop.model))
    assert done.returncode == 0, done.stderr
    shop.check()


def test_replay_of_what_was_asked(shop: Shop) -> None:
    idents = shop.rows("SELECT transaction_id FROM decisions WHERE origin = 'http' ORDER BY random() LIMIT 5")
    for (ident,) in idents:
        done = fraud(shop.environment, "replay", ident, "--model", str(shop.model))
        assert done.returncode == 0 and "decided over HTTP" in done.stderr


def test_without_redis(shop: Shop, predictor: Predictor) -> None:
    before = shop.purchases(3)
    with shop.without(VALKEY):
        answers = [one(predictor, each) for each in before]
        assert {answer.features for answer in answers} == {"cold"} and all(answer.recorded for answer in answers)
        predictor.sweep(now_ms())
        assert predictor.health().status == "degraded" and not predictor.health().redis
    with shop.worker():
        pass
    wait_until(lambda: one(predictor, shop.purchases(1)[0]).features == "live")
    with shop.worker():
        pass
    shop.check()


def test_without_kafka(shop: Shop, predictor: Predictor) -> None:
    """Recorded, and published when Kafka is back."""
    purchases = shop.purchases(5)
    with shop.without(KAFKA):
        assert all(one(predictor, each).recorded for each in purchases)
        wait_until(lambda: not predictor.health().kafka)
    waiting = 'SELECT count(*) FROM decisions WHERE "offset" IS NULL AND partition IS NOT NULL'
    with shop.worker(idle_s=15):
        wait_until(lambda: shop.rows(waiting) == [(0,)])
    shop.check()


def test_without_postgres(shop: Shop, predictor: Predictor) -> None:
    """Advice, which travels with the transaction and is stored beside the worker's decision."""
    purchases = shop.purchases(5)
    with shop.without(POSTGRES):
        answers = [one(predictor, each) for each in purchases]
        assert not any(answer.recorded for answer in answers)
        bare = one(predictor, StatelessRequest("advice", 100, "EUR"))
        assert not bare.recorded
        with pytest.raises(Unavailable):
            predictor.find("advice")
    with shop.worker():
        pass
    advised = "SELECT transaction_id, advice::json ->> 'outcome' FROM decisions WHERE advice IS NOT NULL"
    stored = dict(shop.rows(advised))
    assert stored == {answer.transaction_id: answer.decision.value for answer in answers}
    wait_until(lambda: one(predictor, shop.purchases(1)[0]).recorded)
    with shop.worker():
        pass
    shop.check()


def test_without_postgres_and_kafka(shop: Shop, predictor: Predictor) -> None:
    with shop.without(KAFKA), shop.without(POSTGRES):
        with pytest.raises(Unavailable):
            predictor.predict(shop.purchases(1), now_ms())
        wait_until(lambda: predictor.health().status == "down")


def test_a_service_that_died_before_it_published(shop: Shop, predictor: Predictor) -> None:
    """The next one sweeps up what it left."""
    left = open_predictor(Settings(), shop.addresses, model_in(shop.model))
    left.outbox.post = lambda *a, **k: None  # type: ignore[method-assign, assignment]  # it died here
    (request,) = shop.purchases(1)
    answer = one(left, request)
    with shop.worker(idle_s=15):
        query = f"SELECT \"offset\" IS NOT NULL FROM decisions WHERE transaction_id = '{request.transaction_id}'"
        wait_until(lambda: shop.rows(query) == [(True,)])
    assert predictor.find(request.transaction_id) == answer
    topic = [record for record in read_topic(shop.addresses.kafka, TRANSACTIONS) if record.value == encode(request)]
    assert len(topic) == 1
    shop.check()


def test_what_was_not_there_is_missing(shop: Shop, predictor: Predictor) -> None:
    """Redis is empty, and no worker has built the profiles again: cold, never zero."""
    redis.Redis.from_url(shop.addresses.redis).flushall()
    answer = one(predictor, shop.purchases(1)[0])
    assert answer.features == "cold" and answer.decision in Outcome
    with shop.worker():
        pass
    shop.check()
