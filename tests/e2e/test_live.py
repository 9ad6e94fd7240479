"""A shop goes live: history first, then labels, a second model, a broken one; on real servers, through the commands."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psycopg2
import pytest
import redis
from kafka import KafkaProducer

from fraud_nb.adapters.kafka_bus import DEAD_LETTERS, LABELS, create_topics, murmur2_partitions, read_topic
from fraud_nb.adapters.ledger import Ledger, LedgerReader
from fraud_nb.adapters.postgres import LogOverview, LogReader, migrate
from fraud_nb.decision.bundle import unpack
from fraud_nb.domain.schema import Label, encode
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import MINUTE_MS
from fraud_nb.pipeline.champion import Shelf
from fraud_nb.pipeline.replay import replay
from tests.conftest import tampering
from tests.e2e.stream_kit import MAIN, NOON, fraud, produce, purchase, small_model

ROOT = Path(__file__).parents[2]


@dataclass
class Shop:
    """Servers, environment and what was sent so far."""

    environment: dict[str, str]
    kafka: str
    postgres: str
    folder: Path
    rng: random.Random
    sent: int = 0

    def send(self, count: int) -> None:
        """The next purchases onto the bus."""
        records = []
        for number in range(self.sent, self.sent + count):
            each = purchase(self.rng, number, NOON + number * 20 * MINUTE_MS)
            key = each.customer_id.encode()
            records.append((int(murmur2_partitions([key], 4)[0]), key, encode(each)))
        self.sent += count
        produce(self.kafka, records)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log."""
        with psycopg2.connect(self.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    def stream(self, *more: str, failpoint: str = "", code: Path = ROOT) -> subprocess.Popen[str]:
        """A worker that follows the ledger."""
        command = [sys.executable, "-c", MAIN, "stream", "--status-every", "0.2", *more]
        crash = {"FRAUD_FAILPOINT": failpoint} if failpoint else {}
        return subprocess.Popen(
            command, env={**os.environ, **self.environment, **crash}, cwd=code, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def wait_for(self, query: str, expected: object, deadline_s: float = 40) -> None:
        """Ask until the answer is this."""
        until = time.monotonic() + deadline_s
        while (found := self.rows(query)[0][0]) != expected:
            assert time.monotonic() < until, f"{query}: {found}, not {expected}"
            time.sleep(0.1)

    def verify(self, decisions: int) -> None:
        """Everything recomputed, each row by its own model."""
        done = fraud(self.environment, "verify")
        assert done.returncode == 0, done.stderr
        assert f"0 mismatches in {decisions} decisions" in done.stderr


@pytest.fixture(scope="module")
def shop(private_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    addresses, folder = private_servers.addresses, tmp_path_factory.mktemp("live")
    create_topics(addresses.kafka, 4)
    migrate(addresses.postgres, 4)
    environment = {
        "FRAUD_HOME": str(folder / "home"),
        "FRAUD_KAFKA": addresses.kafka,
        "FRAUD_REDIS": addresses.redis,
        "FRAUD_POSTGRES": addresses.postgres,
    }
    yield Shop(environment, addresses.kafka, addresses.postgres, folder, random.Random(3))


MAP = """
[columns]
transaction_id = "id"
customer_id = "card"
event_time = "at"
amount = "amount"
[time]
unit = "ms"
[labels]
column = "fraud"
delay_days = 3.0
"""


def history_csv(folder: Path) -> tuple[Path, Path]:
    """600 purchases of the kit's customers in the two months before NOON; 20 frauds, one row nobody can read."""
    lines = ["id,card,at,amount,fraud"]
    for number in range(600):
        moment = NOON - (600 - number) * 140 * MINUTE_MS
        lines.append(f"h{number},customer {number % 40},{moment},{number % 90}.50,{int(number % 30 == 0)}")
    lines += ["h601,customer 1,yesterday,1.00,0", lines[5]]  # and one id twice
    path, mapped = folder / "history.csv", folder / "map.toml"
    path.write_text("\n".join(lines))
    mapped.write_text(MAP)
    return path, mapped


def test_no_champion_is_said_in_one_line(shop: Shop) -> None:
    done = fraud(shop.environment, "stream")
    assert done.returncode == 1
    assert "the ledger has no champion" in done.stderr


def test_history_is_loaded_under_a_worker_that_already_runs(shop: Shop) -> None:
    """The idle worker has seen empty windows; it must not decide on them."""
    model = small_model(shop.folder / "first.bundle")
    ledger = Ledger(shop.postgres)
    assert ledger.promote(ledger.add(model.read_bytes(), {"auc": 0.9}), "test", "first", {}).model_version == 1
    path, mapped = history_csv(shop.folder)
    worker = shop.stream()
    try:
        shop.wait_for("SELECT min(epoch) FROM progress", 1)
        time.sleep(1)  # it is idle now, and Redis says offset 0
        done = fraud(shop.environment, "backfill", str(path), "--map", str(mapped))
        assert done.returncode == 0, done.stderr
        assert "600 transactions are history now" in done.stderr and "event_time: " in done.stderr
        shop.send(300)
        shop.wait_for("SELECT count(*) FROM decisions WHERE origin = 'stream'", 300)
    finally:
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=20)
    assert worker.returncode == 0, said
    assert shop.rows('SELECT count(*), min("offset") < -1, max("offset") FROM decisions WHERE "offset" < 0') == [
        (600, True, -1)
    ]
    assert shop.rows("SELECT count(*) FROM labels") == [(20,)]
    log, warm = LogReader(shop.postgres), 0
    for partition in range(4):
        for page in log.read(partition, 0, 10_000):
            warm += sum(row.judgement is not None for row in page)
    assert warm == 300
    shop.verify(300)


def test_history_is_refused_once_live(shop: Shop) -> None:
    path, mapped = history_csv(shop.folder)
    done = fraud(shop.environment, "backfill", str(path), "--map", str(mapped))
    assert done.returncode == 1 and "has live transactions" in done.stderr
    assert shop.rows("SELECT count(*) FROM decisions") == [(900,)]


@pytest.mark.parametrize("failpoint", ["", "labels-committed"])
def test_labels_are_numbered_once(shop: Shop, failpoint: str) -> None:
    """With duplicates, poison and a label of the future among them, and a crash between commit and publish."""
    before = shop.rows("SELECT count(*) FROM labels")[0][0]
    dead = shop.rows("SELECT count(*) FROM label_dead_letters")[0][0]
    producer = KafkaProducer(bootstrap_servers=shop.kafka)
    for number in range(50):
        label = Label(f"t{number:06d}", number % 2 == 0, NOON + number, "analyst")
        producer.send(LABELS, msgspec.json.encode(label), partition=0)
    for poison in (b"{", b"", b'{"transaction_id":"t1","is_fraud":1,"label_time":5}'):
        producer.send(LABELS, poison, partition=0)
    future = Label("t000001", True, int(time.time() * 1000) + 3_600_000)
    producer.send(LABELS, msgspec.json.encode(future), partition=0)
    producer.flush()
    if failpoint:
        assert shop.stream("--until-idle", "8", failpoint=failpoint).wait(60) == -signal.SIGKILL
    worker = shop.stream()
    try:
        shop.wait_for("SELECT count(*) FROM labels", before + 50)
        shop.wait_for("SELECT count(*) FROM label_dead_letters", dead + 4)
        until = time.monotonic() + 20
        while (letters := [dict(each.headers) for each in read_topic(shop.kafka, DEAD_LETTERS)]) and (
            len(letters) < dead + 4 and time.monotonic() < until
        ):
            time.sleep(0.2)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=20)
    assert shop.rows("SELECT min(label_seq), max(label_seq), count(*) FROM labels") == [(1, before + 50, before + 50)]
    sources = [letter["source"] for letter in letters if letter["source"].startswith(b"labels:")]
    assert len(sources) == len(set(sources)) == dead + 4


def test_a_promotion_arrives_while_the_worker_runs(shop: Shop) -> None:
    """And both models' rows are verified by the model that made them; a broken promotion changes nothing."""
    port = 20_000 + os.getpid() % 10_000
    worker = shop.stream("--metrics-port", str(port))
    try:
        shop.send(100)
        shop.wait_for("SELECT count(*) FROM decisions WHERE origin = 'stream'", 400)
        ledger = Ledger(shop.postgres)
        second = ledger.add(small_model(shop.folder / "second.bundle", rounds=7).read_bytes(), {"auc": 0.91})
        ledger.promote(second, "test", "better", {})
        time.sleep(2.5)
        shop.send(100)
        shop.wait_for(f"SELECT count(*) FROM decisions WHERE model_version = {second}", 100)
        with psycopg2.connect(shop.postgres) as connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO models (sha256, bundle, metrics) VALUES ('0', 'rubbish', '{}') RETURNING 1")
        ledger.promote(second + 1, "test", "a mistake", {})
        time.sleep(2.5)
        shop.send(50)
        shop.wait_for(f"SELECT count(*) FROM decisions WHERE model_version = {second}", 150)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            metrics = answer.read().decode()
        done = fraud(shop.environment, "model", "rollback", "--who", "test", "--why", "it was a mistake")
        assert done.returncode == 0 and f"model {second} is the champion again" in done.stderr
    finally:
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=20)
    assert worker.returncode == 0, said
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert sum("refused" in event["event"] for event in events) == 1
    assert events[-1]["event"] == "stopped" and events[-1]["decided"] == 250
    assert f"fraud_model_version {float(second)}" in metrics
    assert 'fraud_decisions_total{outcome="approve"}' in metrics and "customer" not in metrics + said
    shop.verify(550)


def test_redis_is_emptied_under_a_running_worker(shop: Shop) -> None:
    """It has no customer in memory yet, and must not take those of an empty store for new ones."""
    worker = shop.stream()
    try:
        for line in worker.stderr or ():
            if '"ready"' in line:
                break
        redis.Redis.from_url(shop.environment["FRAUD_REDIS"]).flushall()
        shop.send(200)
        shop.wait_for("SELECT count(*) FROM decisions WHERE origin = 'stream'", 750)
    finally:
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=20)
    assert worker.returncode == 0, said
    assert json.loads(said.splitlines()[-1])["restarts"] >= 1
    shop.verify(750)


def test_the_ledger_is_told_from_the_command_line(shop: Shop) -> None:
    listed = fraud(shop.environment, "model", "list")
    assert listed.returncode == 0 and listed.stdout.count("champion") == 1
    unknown = fraud(shop.environment, "model", "promote", "77")
    assert unknown.returncode == 1 and "model 77: not in the ledger" in unknown.stderr
    assert unpack(*Ledger(shop.postgres).bundle(1)).names
    checked = fraud(shop.environment, "check")
    assert checked.returncode == 0 and checked.stderr.count(": ok") == 4


def test_a_decision_is_made_again(shop: Shop) -> None:
    """Identical for both models; a changed feature and a changed probability are named; history has no decision."""
    ids = [ident for (ident,) in shop.rows("SELECT transaction_id FROM decisions WHERE outcome IS NOT NULL")]
    shelf = Shelf(LedgerReader(shop.postgres))
    for ident in random.Random(5).sample(ids, 60):
        assert replay(LogOverview(shop.postgres), shelf.model, ident, "EUR").stage is None
    told = fraud(shop.environment, "replay", ids[0])
    assert told.returncode == 0 and "replay: identical" in told.stderr
    assert not re.search(r"customer \d", told.stderr), "no identifier of a person"
    for change, stage in (
        ("features = set_byte(features, 9, get_byte(features, 9) # 1)", "features differs"),
        ("probability = probability + 1e-9", "probability differs"),
    ):
        with tampering(shop.postgres) as cursor:
            cursor.execute("CREATE TEMP TABLE kept AS SELECT * FROM decisions WHERE transaction_id = %s", (ids[0],))
            cursor.execute(f"UPDATE decisions SET {change} WHERE transaction_id = %s", (ids[0],))
            cursor.connection.commit()
            told = fraud(shop.environment, "replay", ids[0])
            assert told.returncode == 1 and stage in told.stderr
            cursor.execute(
                "UPDATE decisions SET features = kept.features, probability = kept.probability FROM kept "
                "WHERE decisions.transaction_id = kept.transaction_id"
            )
    for ident, words in (("h1", "never decided"), ("nobody", "no transaction with this id")):
        none = fraud(shop.environment, "replay", ident)
        assert none.returncode == 1 and words in none.stderr


def test_live_decisions_are_measured(shop: Shop) -> None:
    done = fraud(shop.environment | {"PYTHONPATH": str(ROOT)}, "backtest")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["decisions"] == 750 and result["frauds"] == 25
    assert result["average_precision"] == result["average_precision_again"]


def older_code(folder: Path) -> Path:
    """This code, before the features of devices were added."""
    shutil.copytree(ROOT / "fraud_nb", folder / "fraud_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name, now, then in (
        ("catalogue.py", "MERCHANT_RECORD, DEVICE,", "MERCHANT_RECORD,"),
        ("fold.py", "_end(DEVICE, _DEVICE) != len", "_end(MERCHANT_RECORD, _RECORD) != len"),
        ("fold.py", "    fill_device(purchase, told[_TOLD:OWNED], out[_DEVICE:])\n", ""),
    ):
        path = folder / "fraud_nb" / "features" / name
        text = path.read_text()
        assert text.count(now) == 1
        path.write_text(text.replace(now, then))
    return folder


def test_features_are_added_and_older_decisions_stay_what_they_were(shop: Shop) -> None:
    """An older worker and its model, then today's code with that model, then a model that knows the new features."""
    older = older_code(shop.folder / "older")
    bundle = shop.folder / "older.bundle"
    train = (
        f"from pathlib import Path; from tests.e2e.stream_kit import small_model; small_model(Path({str(bundle)!r}))"
    )
    subprocess.run(
        [sys.executable, "-c", train], cwd=older, env={**os.environ, "PYTHONPATH": f"{older}:{ROOT}"}, check=True
    )  # fmt: skip
    assert {"device_count_1h", *unpack(bundle.read_bytes(), None).names} <= set(FEATURE_NAMES)
    assert "device_count_1h" not in unpack(bundle.read_bytes(), None).names
    ledger = Ledger(shop.postgres)
    with_less = ledger.add(bundle.read_bytes(), {"auc": 0.9})
    ledger.promote(with_less, "test", "before devices", {})
    by_model = "SELECT count(*) FROM decisions WHERE model_version = "
    worker = shop.stream(code=older)
    try:
        shop.send(100)
        shop.wait_for(f"{by_model}{with_less}", 100)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=20)
    worker = shop.stream()
    try:
        shop.send(50)
        shop.wait_for(f"{by_model}{with_less}", 150)
        with_all = ledger.add(small_model(shop.folder / "third.bundle", rounds=9).read_bytes(), {"auc": 0.92})
        ledger.promote(with_all, "test", "with devices", {})
        time.sleep(2.5)
        shop.send(50)
        shop.wait_for(f"{by_model}{with_all}", 50)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=20)
    widths = shop.rows(f"SELECT DISTINCT length(features) FROM decisions WHERE model_version = {with_less} ORDER BY 1")
    assert [width for (width,) in widths] == [4 * (len(FEATURE_NAMES) - 4), 4 * len(FEATURE_NAMES)]
    shop.verify(950)
    first = f"SELECT transaction_id FROM decisions WHERE model_version = {with_less} ORDER BY record_time LIMIT 1"
    ((ident,),) = shop.rows(first)
    told = fraud(shop.environment, "replay", ident)
    assert told.returncode == 0 and "replay: identical" in told.stderr and "earlier events" in told.stderr


def test_a_retrain_is_measured_beside_the_champion(shop: Shop) -> None:
    """On the same days; the kit's model knows nothing of them, and so large a gain over a champion is not believed."""
    environment = shop.environment | {"PYTHONPATH": str(ROOT)}
    words = ("--quick", "--history", "simulated", "--promote", "-p", "customers=1200", "-p", "min_auc=0.5")
    done = fraud(environment, "retrain", *words, timeout_s=240)
    assert done.returncode == 1 and "a surprising gain is a leak until disproved" in done.stderr
    (run,) = (shop.folder / "home" / "runs").glob("retrain_*")
    assert "the champion on the same days: average precision" in (run / "retrain.ipynb").read_text()
