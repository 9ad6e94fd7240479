"""The guarantee on real servers: kill -9 at every named point, lose Redis, run three workers; one decision each."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pytest
import redis

from fraud_nb.adapters.kafka_bus import DEAD_LETTERS, LABELS, create_topics, read_topic
from fraud_nb.adapters.postgres import migrate
from fraud_nb.adapters.servers import find, servers, up
from fraud_nb.domain.schema import InvalidTransaction, decode
from fraud_nb.features.tiles import COUNT_24H, FRAUDS_60D, WIDTH
from tests.conftest import quiet, tampering
from tests.e2e.stream_kit import MAIN, fraud, hostile_labels, hostile_stream, produce, small_model

FAILPOINTS = ("claimed", "rolled-forward", "version-closed", "decided", "committed", "saved", "published")


@dataclass
class System:
    """The servers, the model, and every record that was produced so far."""

    home: Path  # of the servers
    environment: dict[str, str]
    kafka: str
    redis: str
    postgres: str
    model: str
    rng: random.Random
    records: list[tuple[int, bytes, bytes | None]] = field(default_factory=list)
    purchases: int = 0

    def send(self, count: int) -> None:
        """Produce the next chunk of the hostile stream."""
        chunk = hostile_stream(self.rng, self.purchases, count)
        self.purchases += count
        self.records += chunk
        produce(self.kafka, chunk)
        produce(self.kafka, hostile_labels(self.rng, self.purchases, count // 5), LABELS)

    def stream(self, failpoint: str = "") -> int:
        """Run a worker until it is idle or dies."""
        environment = self.environment | ({"FRAUD_FAILPOINT": failpoint} if failpoint else {})
        done = fraud(environment, "stream", "--model", self.model, "--until-idle", "1")
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log."""
        with psycopg2.connect(self.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    def check(self) -> None:
        """Every valid id decided once, everything else accounted for, and nothing differs from a recomputation."""
        ids, dead = expected(self.records)
        logged = [ident for (ident,) in self.rows("SELECT transaction_id FROM decisions")]
        assert len(logged) == len(set(logged))
        assert set(logged) == ids
        assert self.rows("SELECT count(*) FROM dead_letters") == [(dead,)]
        assert self.rows("SELECT sum(next_offset) FROM progress") == [(len(self.records),)]
        assert self.rows("SELECT count(*) FROM repeats") == [(len(self.records) - dead - len(ids),)]
        letters = read_topic(self.kafka, DEAD_LETTERS)
        sources = [dict(letter.headers)["source"] for letter in letters]
        assert len(sources) == len(set(sources)) == dead
        done = fraud(self.environment, "verify", "--model", self.model)
        assert done.returncode == 0, done.stderr
        assert f"0 mismatches in {len(ids)} decisions" in done.stderr


def expected(records: list[tuple[int, bytes, bytes | None]]) -> tuple[set[str], int]:
    """Ids that must be decided, and the number of dead letters, straight from what was produced."""
    ids: set[str] = set()
    dead = 0
    for _, _, value in records:
        try:
            ident = decode(value).transaction_id
        except InvalidTransaction:
            dead += 1
            continue
        if ident.startswith("s"):  # the kit's strangers lie in a wrong partition
            dead += 1
        else:
            ids.add(ident)
    return ids, dead


@pytest.fixture(scope="module")
def system(private_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Topics, schema, model, and a first chunk, on servers of our own: every record is accounted for."""
    addresses = private_servers.addresses
    create_topics(addresses.kafka, 4)
    migrate(addresses.postgres, 4)
    folder = tmp_path_factory.mktemp("stream")
    environment = {
        "FRAUD_HOME": str(folder / "home"),
        "FRAUD_KAFKA": addresses.kafka,
        "FRAUD_REDIS": addresses.redis,
        "FRAUD_POSTGRES": addresses.postgres,
    }
    model = small_model(folder / "model.bundle")
    found = System(
        private_servers.home,
        environment,
        addresses.kafka,
        addresses.redis,
        addresses.postgres,
        str(model),
        random.Random(11),
    )
    found.send(1_500)
    yield found


def test_a_clean_run(system: System) -> None:
    assert system.stream() == 0
    system.check()
    outcomes = {outcome for (outcome,) in system.rows("SELECT DISTINCT outcome FROM decisions")}
    assert len(outcomes) > 1, "the model must tell purchases apart, or this proves little"
    reasons = system.rows("SELECT count(*) FROM decisions WHERE outcome <> 'approve' AND reasons = '[]'")
    assert reasons == [(0,)]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_kill_9(system: System, failpoint: str) -> None:
    system.send(300)
    assert system.stream(failpoint) == -signal.SIGKILL
    assert system.stream() == 0
    system.check()


@pytest.mark.parametrize("failpoint", ["", "wiped", "rolling", "building"])
def test_redis_is_lost(system: System, failpoint: str) -> None:
    system.send(100)
    redis.Redis.from_url(system.redis).flushall()
    if failpoint:
        assert system.stream(failpoint) == -signal.SIGKILL
    assert system.stream() == 0
    system.check()


def test_three_workers_and_a_zombie(system: System) -> None:
    """One of three is stopped for longer than its session lasts, and then goes on."""
    command = [sys.executable, "-c", MAIN, "stream", "--model", system.model, "--until-idle", "12"]
    environment = {**os.environ, **system.environment}
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    system.send(1_000)
    workers[0].send_signal(signal.SIGSTOP)
    system.send(500)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            workers[0].wait(8)
        workers[0].send_signal(signal.SIGCONT)
        system.send(200)
        for worker in workers:
            _, said = worker.communicate(timeout=90)
            assert worker.returncode == 0, said
    finally:
        for worker in workers:
            worker.kill()
    assert system.stream() == 0
    system.check()


@pytest.mark.parametrize("number", [0, 1, 2], ids=["kafka", "valkey", "postgres"])
def test_a_server_is_killed_and_comes_back(system: System, number: int) -> None:
    """The worker waits, claims again, and loses nothing."""
    command = [sys.executable, "-c", MAIN, "stream", "--model", system.model, "--until-idle", "10"]
    environment = {**os.environ, **system.environment}
    claims = system.rows("SELECT sum(epoch) FROM progress")
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while worker.poll() is None and system.rows("SELECT sum(epoch) FROM progress") == claims:
            time.sleep(0.1)  # a worker that cannot reach its servers when it starts says so and ends
        system.send(3_000)
        pid = find(servers(system.home)[number])
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        up(system.home, quiet)
        system.send(300)
        _, said = worker.communicate(timeout=120)
    finally:
        worker.kill()
    assert worker.returncode == 0, said
    assert system.stream() == 0
    system.check()


def test_parity_on_fifty_thousand(system: System) -> None:
    """Three workers share the load, then one finishes; every feature byte and score equals a fold over the log."""
    system.send(50_000)
    command = [sys.executable, "-c", MAIN, "stream", "--model", system.model, "--until-idle", "4"]
    environment = {**os.environ, **system.environment}
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        _, said = worker.communicate(timeout=200)
        assert worker.returncode == 0, said
    system.send(2_000)
    assert system.stream() == 0
    system.check()
    rows = system.rows("SELECT shared_version, shared FROM decisions")
    told = np.frombuffer(b"".join(bytes(shared) for _, shared in rows), "<i8").reshape(len(rows), WIDTH)
    assert len({version for version, _ in rows}) > 10, (
        "versions must move on while the stream runs, or this proves little"
    )
    assert (told[:, FRAUDS_60D] > 0).any() and (told[:, COUNT_24H] > 10).any()


def test_verify_names_what_a_decision_should_have_been_told(system: System) -> None:
    """One integer more than there was: the features that follow from it, and the integer itself."""
    ident = "SELECT transaction_id FROM decisions WHERE shared_version > 0 AND merchant_id IS NOT NULL LIMIT 1"
    ((ident, partition, offset),) = system.rows(
        f'SELECT transaction_id, partition, "offset" FROM decisions WHERE transaction_id = ({ident})'
    )
    flip = "UPDATE decisions SET shared = set_byte(shared, 0, get_byte(shared, 0) # 1) WHERE transaction_id = %s"
    with tampering(system.postgres) as cursor:
        cursor.execute(flip, (ident,))
    done = fraud(system.environment, "verify", "--model", system.model)
    assert done.returncode == 1
    assert f"features differs at partition {partition}, offset {offset}" in done.stderr
    assert "verify: 2 mismatches" in done.stderr
    with tampering(system.postgres) as cursor:
        cursor.execute(flip, (ident,))


def test_verify_names_the_first_difference(system: System) -> None:
    """A single flipped bit in a stored vector is found."""
    ((partition, offset),) = system.rows("SELECT partition, \"offset\" FROM decisions WHERE transaction_id = 't000042'")
    flip = "UPDATE decisions SET features = set_byte(features, 9, get_byte(features, 9) # 1)"
    flip += " WHERE transaction_id = 't000042'"
    with tampering(system.postgres) as cursor:
        cursor.execute(flip)
    done = fraud(system.environment, "verify", "--model", system.model)
    assert done.returncode == 1
    assert f"features differs at partition {partition}, offset {offset}" in done.stderr
    with tampering(system.postgres) as cursor:
        cursor.execute(flip)


@pytest.mark.parametrize(
    ("table", "tamper", "undo", "stages"),
    [
        ("dead_letters", "partition = partition + 100", "partition = partition - 100", {"lost", "dead-letters"}),
        ("repeats", "partition = partition + 100", "partition = partition - 100", {"lost"}),
        ("decisions", *["payload_hash = set_byte(payload_hash, 0, get_byte(payload_hash, 0) # 1)"] * 2, {"payload"}),
    ],
)
def test_verify_accounts_for_every_record(system: System, table: str, tamper: str, undo: str, stages: set[str]) -> None:
    """A record that the log does not know, or knows otherwise."""
    ((place, partition, offset),) = system.rows(
        f'SELECT ctid::text, partition, "offset" FROM {table} WHERE "offset" >= 0 ORDER BY "offset" LIMIT 1'
    )
    with tampering(system.postgres) as cursor:
        cursor.execute(f"UPDATE {table} SET {tamper} WHERE ctid = %s::tid RETURNING ctid::text", (place,))
        ((moved,),) = cursor.fetchall()
    done = fraud(system.environment, "verify", "--model", system.model, "--sample", "0")
    with tampering(system.postgres) as cursor:
        cursor.execute(f"UPDATE {table} SET {undo} WHERE ctid = %s::tid", (moved,))
    assert done.returncode == 1
    assert any(f"{stage} differs at partition {partition}, offset {offset}" in done.stderr for stage in stages)
    assert f"verify: {len(stages)} mismatches" in done.stderr


def test_verify_beside_a_worker(system: System, tmp_path: Path) -> None:
    """A log that grows while it is recomputed."""
    command = [sys.executable, "-c", MAIN, "stream", "--model", system.model, "--until-idle", "10"]
    worker = subprocess.Popen(command, env={**os.environ, **system.environment}, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()

    def sell() -> None:
        while not ended.is_set():
            system.send(100)
            ended.wait(0.2)

    before = system.rows("SELECT sum(next_offset) FROM progress")
    seller = threading.Thread(target=sell)
    seller.start()
    try:
        while system.rows("SELECT sum(next_offset) FROM progress") == before:
            time.sleep(0.1)
        words = ("verify", "--model", system.model, "--sample", "0.1", "--output", str(tmp_path))
        done = fraud(system.environment, *words)
    finally:
        ended.set()
        seller.join()
    _, said = worker.communicate(timeout=90)
    assert worker.returncode == 0, said
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "result.json").read_text())
    assert counted["mismatches"] == 0 and 0 < counted["judged"] < counted["decisions"] / 5
    assert system.rows("SELECT count(*) FROM decisions")[0][0] > counted["decisions"], "the log has grown meanwhile"
    system.check()


def test_the_writer_cannot_rewrite_history(system: System) -> None:
    with psycopg2.connect(system.postgres, options="-c role=fraud_writer") as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("UPDATE decisions SET outcome = 'approve'")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["produce"],
        ["backfill", "x.csv"],
        ["model"],
        ["nonsense"],
        ["simulate", "--rate", "0"],
        ["produce", "x.csv", "--map", "m", "--from", "yesterday"],
    ],
)
def test_wrong_usage_exits_2(words: list[str]) -> None:
    assert fraud({}, *words).returncode == 2


def test_a_mistyped_setting_exits_2() -> None:
    done = fraud({"FRAUD_KAFKAA": "x"}, "down")
    assert done.returncode == 2 and "FRAUD_KAFKAA" in done.stderr


def test_a_missing_model_exits_1(tmp_path: Path) -> None:
    done = fraud({"FRAUD_HOME": str(tmp_path)}, "stream", "--model", str(tmp_path / "none"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
