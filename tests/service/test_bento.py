"""The built bento on real servers: in an empty directory, without the repository and without MLflow."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from fraud_nb.adapters.kafka_bus import create_topics
from fraud_nb.adapters.ledger import Ledger
from fraud_nb.adapters.postgres import migrate
from tests.conftest import Running
from tests.e2e.stream_kit import MAIN, fraud, small_model
from tests.faults.corpus import Corpus, check_over_http
from tests.service.bento_kit import Box, Served, serve, serving, unpack
from tests.service.service_kit import CANARY, JSON, KEY, SEED, ask, full, patiently, wait_until

pytestmark = pytest.mark.timeout(600)


@dataclass
class Shop:
    """Servers with a champion, a worker, and the bento."""

    settings: dict[str, str]
    ledger: Ledger
    box: Box
    folder: Path

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log."""
        with psycopg2.connect(self.settings["FRAUD_POSTGRES"]) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    def promote(self, rounds: int) -> int:
        """A model of so many trees becomes the champion; its number."""
        bundle = small_model(self.folder / f"{rounds}.bundle", rounds).read_bytes()
        return self.ledger.promote(self.ledger.add(bundle, {"auc": 0.9}), "test", "test", {}).model_version


@pytest.fixture(scope="module")
def shop(private_servers: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    found, folder = private_servers.addresses, tmp_path_factory.mktemp("bento")
    create_topics(found.kafka, 4)
    migrate(found.postgres, 4)
    settings = {"FRAUD_HOME": str(folder / "home"), "FRAUD_KAFKA": found.kafka, "FRAUD_REDIS": found.redis}
    settings["FRAUD_POSTGRES"] = found.postgres
    refused = fraud(settings, "bento")
    assert refused.returncode == 1 and "the ledger has no champion" in refused.stderr
    ledger = Ledger(found.postgres)
    box = Box(folder, {}, "")
    shop = Shop(settings, ledger, box, folder)
    assert shop.promote(20) == 1
    store = {"BENTOML_HOME": str(folder / "builder")}
    built = fraud({**settings, **store}, "bento", "--out", str(folder / "fraud.bento"), timeout_s=300)
    assert built.returncode == 0, built.stderr
    shop.box = unpack(folder / "fraud.bento", built.stdout.split()[-1], folder)
    command = [sys.executable, "-c", MAIN, "stream", "--status-every", "60"]
    worker = subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: shop.rows("SELECT min(epoch) FROM progress") == [(1,)], "the worker has all partitions")
        yield shop
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)


@pytest.fixture(scope="module")
def served(shop: Shop) -> Iterator[Served]:
    with serving(shop.box, shop.settings) as service:
        yield service
        text = service.log.read_text()
    assert CANARY not in text and "Traceback" not in text, text


def predict(port: int, purchase: Any) -> Any:
    """The answer's JSON."""
    told = patiently(port, purchase if isinstance(purchase, bytes) else json.dumps(purchase).encode())
    assert told.status == 200, told.body
    return told.json


def test_the_seed_contract(shop: Shop, served: Served) -> None:
    answer = predict(served.port, SEED)
    assert answer["transaction_id"] == "TEST123" and 0 < answer["probability"] < 1
    assert answer["decision"] in ("approve", "challenge", "review", "decline")
    assert (answer["features"], answer["recorded"], answer["model_version"]) == ("stateless", True, 1)
    assert all(0 < reason["share"] <= 1 and reason["text"] for reason in answer["reasons"])
    assert shop.rows("SELECT origin, outcome FROM decisions WHERE transaction_id = 'TEST123'") == [
        ("http-stateless", answer["decision"])
    ]


def test_a_full_purchase_is_decided_recorded_and_learned(shop: Shop, served: Served) -> None:
    wait_until(lambda: predict(served.port, full(f"warm-{time.time_ns()}"))["features"] == "live", "profiles are read")
    purchase = full("full", customer_id="grace", device_id="phone-7", latitude=52.52, longitude=13.405)
    answer = predict(served.port, purchase)
    assert answer["recorded"] and answer["features"] == "live"
    query = "SELECT origin, \"offset\" IS NOT NULL FROM decisions WHERE transaction_id = 't-full'"
    wait_until(lambda: shop.rows(query) == [("http", True)], "the worker has met it")
    again = predict(served.port, purchase)
    assert again | {"latency_ms": 0} == answer | {"latency_ms": 0}
    assert ask(served.port, "GET", "/decisions/t-full").json == {
        name: value for name, value in answer.items() if name != "latency_ms"
    }
    conflict = ask(served.port, "POST", "/predict", json.dumps({**purchase, "amount": 99}))
    assert (conflict.status, conflict.json["error"]) == (409, "conflict")
    assert ask(served.port, "GET", "/decisions/nobody").status == 404


def test_a_batch_on_real_servers(shop: Shop, served: Served) -> None:
    bodies = [full(f"batch-{number}", customer_id=f"customer {number % 40}") for number in range(300)]
    bodies[7:9] = [{"amount": -1}, bodies[6]]
    replies = ask(served.port, "POST", "/predict/batch", json.dumps(bodies)).json
    assert Counter(reply.get("status", 200) for reply in replies) == {200: 299, 400: 1}
    assert replies[8] | {"latency_ms": 0} == replies[6] | {"latency_ms": 0}
    assert shop.rows("SELECT count(*) FROM decisions WHERE transaction_id LIKE 't-batch-%'") == [(298,)]


def test_nothing_of_bentoml_can_be_reached(served: Served) -> None:
    for path in ("/docs.json", "/schema.json", "/healthz", "/static_content/index.html", "/assets/x"):
        assert ask(served.port, "GET", path).status == 404
    page = ask(served.port, "GET", "/")
    assert page.status == 200 and b"<script" not in page.body
    (listening,) = {
        each.laddr.ip
        for child in psutil.Process(served.process.pid).children()
        for each in child.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == served.port
    }
    assert listening == "127.0.0.1"


def test_health_and_metrics(served: Served) -> None:
    health = ask(served.port, "GET", "/health").json
    assert (health["status"], health["postgres"], health["redis"], health["kafka"]) == ("ok", True, True, True)
    metrics = ask(served.port, "GET", "/metrics").body.decode()
    assert 'fraud_http_requests_total{route="/predict",status="200"}' in metrics
    assert "process_resident_memory_bytes" in metrics


def test_every_class_of_bad_input_is_answered(served: Served) -> None:
    classes = Corpus("bento", time.time_ns() // 1_000_000).classes()
    for each in classes:
        check_over_http(each, lambda body: patiently(served.port, body))
    assert len(classes) == 64


def test_values_are_in_no_log(served: Served) -> None:
    """The service's whole output is searched when it has ended."""
    ask(served.port, "GET", f"/decisions/{CANARY}?card={CANARY}")
    ask(served.port, "POST", "/predict", SEED.replace(b"37.7749", CANARY.encode()), {**JSON, "X-Card": CANARY})
    ask(served.port, "POST", "/predict", SEED, {"Content-Type": CANARY})
    ask(served.port, "PUT", f"/{CANARY}", CANARY)
    predict(served.port, full(CANARY))


def test_a_new_champion_without_a_restart(shop: Shop, served: Served) -> None:
    before, number = ask(served.port, "GET", "/health").json["model_version"], shop.promote(7)
    assert number == before + 1
    wait_until(lambda: ask(served.port, "GET", "/health").json["model_version"] == number, "the new model judges")
    assert predict(served.port, full("new-model"))["model_version"] == number


def test_open_to_others_only_with_a_key(shop: Shop) -> None:
    refused = serve(shop.box, shop.settings, "0.0.0.0")
    assert refused.process.wait(90) == 1
    said = refused.log.read_text()
    assert "fraud: FRAUD_API_KEY: set it, or listen on 127.0.0.1" in said and "Traceback" not in said
    with serving(shop.box, {**shop.settings, "FRAUD_API_KEY": KEY}, "0.0.0.0") as service:
        assert ask(service.port, "POST", "/predict", SEED).status == 401
        assert ask(service.port, "POST", "/predict", SEED, {**JSON, "X-API-Key": KEY}).status == 200
        named = {**JSON, "X-API-Key": KEY, "Host": "evil.example"}
        assert ask(service.port, "POST", "/predict", SEED, named).status == 421
    assert KEY not in service.log.read_text()


def test_a_wrong_setting_is_one_line(shop: Shop) -> None:
    refused = serve(shop.box, {**shop.settings, "FRAUD_PARTITION": "4"})
    assert refused.process.wait(90) == 1
    said = refused.log.read_text()
    assert "fraud: FRAUD_PARTITION: no such setting" in said and "Traceback" not in said


def test_the_bundled_model_judges_while_the_ledger_is_away(shop: Shop) -> None:
    """Nothing is recorded, and it says so; the number is the one the ledger gave the model."""
    away = {**shop.settings, "FRAUD_POSTGRES": "postgresql://fraud@127.0.0.1:1/fraud"}
    with serving(shop.box, away) as service:
        health = ask(service.port, "GET", "/health").json
        assert (health["status"], health["postgres"], health["model_version"]) == ("degraded", False, 1)
        answer = predict(service.port, full("advice"))
        assert (answer["recorded"], answer["model_version"]) == (False, 1)
        assert ask(service.port, "GET", "/decisions/t-advice").status == 503


class Asker(threading.Thread):
    """Asks on one connection until it is closed, and keeps what it was told."""

    def __init__(self, port: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.port, self.told, self.slow, self.statuses = port, list[str](), set[str](), Counter[int]()

    def run(self) -> None:
        connection, number = HTTPConnection("127.0.0.1", self.port, timeout=60), 0
        try:
            while True:
                number += 1
                body = json.dumps(full(f"{self.name}-{number}", customer_id=self.name))
                connection.request("POST", "/predict", body, JSON)
                response = connection.getresponse()
                answer = json.loads(response.read())
                self.statuses[response.status] += 1
                if response.status == 200:
                    self.told.append(answer["transaction_id"])
                elif answer["error"] == "too_slow":  # a busy machine
                    self.slow.add(f"t-{self.name}-{number}")
                if response.getheader("Connection") == "close":
                    return
        except (OSError, HTTPException):  # the connection was closed between two questions
            return


def test_sigterm_finishes_what_was_accepted(shop: Shop) -> None:
    """Sixteen ask without a pause: what was decided was told, what was told is in the log, and nothing failed."""
    with serving(shop.box, shop.settings) as service:
        askers = [Asker(service.port, f"term{number}") for number in range(16)]
        for asker in askers:
            asker.start()
        wait_until(lambda: all(len(asker.told) >= 5 for asker in askers), "all are being answered")
        service.stop()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda asker: asker.join(60), askers))
    statuses = sum((asker.statuses for asker in askers), Counter[int]())
    slow = set().union(*(asker.slow for asker in askers))
    assert statuses == {200: statuses[200], **({503: len(slow)} if slow else {})} and statuses[200] > 80, statuses
    told = [ident for asker in askers for ident in asker.told]
    logged = [
        ident for (ident,) in shop.rows("SELECT transaction_id FROM decisions WHERE transaction_id LIKE 't-term%'")
    ]
    assert len(set(told)) == len(told) and set(told) <= set(logged) and set(logged) - set(told) <= slow
    assert "Completed cleanup hook" in service.log.read_text()
