"""The 24 faults: how each is brought about, and what else than the invariants must hold."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg2
import psycopg2.extensions
from kafka import KafkaAdminClient, TopicPartition
from msgspec.structs import replace

from fraud_nb.adapters.kafka_bus import TRANSACTIONS, create_topics, murmur2_partitions, read_topic
from fraud_nb.adapters.ledger import Ledger
from fraud_nb.adapters.servers import servers
from fraud_nb.domain.schema import encode
from tests.e2e.stream_kit import NOON, purchase, small_model
from tests.faults.proxy import Trouble, asks, commits_decisions
from tests.faults.stage import KAFKA, PIECE, POSTGRES, REDIS, NotRun, Stage, until

STEPS = ("decoded", "decided", "committing", "committed", "saved", "publishing", "published", "version-closed")
RECOVERY = ("claimed", "rolled-forward", "publishing-again", "wiped", "rolling", "building")
FETCH, END_OF_TRANSACTION = 1, 26  # Kafka's numbers for these requests
POISON = (
    b"",
    b"\0",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"[]",
    b"null",
    b'{"transaction_id":',
    b"{}{}",
    b"1" * 5_000,
    None,
)


@dataclass(frozen=True)
class Play:
    """One fault."""

    number: int
    title: str
    play: Callable[[Stage], None]
    is_thorough: bool  # at every seed; else at three of them
    checks: bool  # at the end everything must be as if nothing had happened


PLAYS: dict[int, Play] = {}
Plays = Callable[[Stage], None]


def fault(number: int, title: str, *, thorough: bool = False, checks: bool = True) -> Callable[[Plays], Plays]:
    """Put the function into the table."""

    def register(play: Plays) -> Plays:
        PLAYS[number] = Play(number, title, play, thorough, checks)
        return play

    return register


def killed(stage: Stage, failpoint: str) -> None:
    """A worker that must die at this point."""
    assert stage.start(failpoint).wait_for_end() == -signal.SIGKILL, stage.workers[-1].last_words()


def is_asleep(pid: int) -> bool:
    """Whether the process is stopped."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(") ")[2].startswith("T")


def some_way(stage: Stage) -> None:
    """Let the workers come some way further."""
    goal = stage.decided() + stage.rng.randint(PIECE, max(PIECE, stage.size // 4))
    until(lambda: stage.decided() >= goal, "the worker goes on")


def a_server_killed(stage: Stage, number: int) -> None:
    """It is killed while a worker works, and comes back."""
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.kill_server(number)
        stage.servers_up()
    stage.settle()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own in this new folder."""
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        raise NotRun("no right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def all_connections(postgres: str) -> Iterator[psycopg2.extensions.connection]:
    """As many as the server gives."""
    with suppress(psycopg2.OperationalError):
        while True:
            yield psycopg2.connect(postgres, connect_timeout=5)


def poison(stage: Stage) -> tuple[int, bytes, bytes | None]:
    """A record that nobody can read, anywhere."""
    return stage.rng.randrange(4), b"anybody", stage.rng.choice(POISON)


@fault(1, "worker killed at a step", thorough=True)
def worker_killed(stage: Stage) -> None:
    with stage.flow():
        for step in stage.rng.sample(STEPS, 2):
            killed(stage, f"{step}:{stage.rng.randint(1, 4)}")
        stage.ready()
    stage.settle()


@fault(2, "worker killed while it recovers", thorough=True)
def recovery_killed(stage: Stage) -> None:
    with stage.flow():
        killed(stage, f"{stage.rng.choice(('committed', 'saved', 'publishing'))}:{stage.rng.randint(2, 4)}")
        for step in stage.rng.sample(RECOVERY, 2):
            if step in ("wiped", "rolling", "building"):
                stage.redis.flushall()
            if step == "publishing-again":
                killed(stage, "committed")
            killed(stage, step)
    stage.settle()


@fault(3, "zombie: asleep for longer than its session lasts, then awake", thorough=True)
def zombie(stage: Stage) -> None:
    step = stage.rng.choice(("decided", "committing", "committed", "wiping", "saved", "publishing"))
    with stage.flow():  # there are five wipes: of four partitions, and of what they share
        asleep = stage.start(f"{step}:{stage.rng.randint(1, 5 if step == 'wiping' else 4)}:stop")
        until(lambda: is_asleep(asleep.process.pid), "the worker is asleep")
        other = stage.ready()
    until(stage.is_settled, "the other one took over")
    asleep.send(signal.SIGCONT)
    until(lambda: asleep.restarts() > 0, "the one that slept finds out")
    other.send(signal.SIGTERM)
    assert other.wait_for_end() == 0, other.last_words()
    with stage.flow():  # for the one that slept
        pass
    stage.settle()


@fault(4, "rebalance storm: workers come and go", thorough=True)
def rebalance_storm(stage: Stage) -> None:
    with stage.flow():
        for _ in range(5):
            stage.start()
            time.sleep(stage.rng.uniform(1, 4))
            living = [worker for worker in stage.workers if worker.process.poll() is None]
            if len(living) > 1:
                gone = stage.rng.choice(living)
                gone.send(stage.rng.choice((signal.SIGKILL, signal.SIGTERM)))
    stage.settle()


@fault(5, "Redis killed under load", thorough=True)
def redis_killed(stage: Stage) -> None:
    a_server_killed(stage, REDIS)


@fault(6, "Redis loses the end of its file", thorough=True)
def redis_torn(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.kill_server(REDIS)
        (file,) = (servers(stage.home)[REDIS].data / "appendonlydir").glob("*.incr.aof")
        os.truncate(file, int(file.stat().st_size * stage.rng.uniform(0.3, 1)))
        stage.servers_up()
    stage.settle()


@fault(7, "Redis emptied")
def redis_emptied(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.redis.flushall()
    stage.settle()


@fault(8, "Redis full")
def redis_full(stage: Stage) -> None:
    worker = stage.ready()
    with stage.flow():
        some_way(stage)
        stage.redis.config_set("maxmemory", stage.redis.info("memory")["used_memory"])
        until(lambda: worker.said("decisions: Redis: full"), "the worker says that Redis is full")
        reached = stage.decided()
        time.sleep(2)
        assert stage.decided() == reached, "decisions without the profiles they need"
        stage.redis.config_set("maxmemory", "2gb")
    stage.settle()


@fault(9, "Redis slow, then silent")
def redis_silent(stage: Stage) -> None:
    worker, wire = stage.ready(), stage.proxies[REDIS]
    with stage.flow():
        some_way(stage)
        wire.lag_s = stage.rng.uniform(0.05, 0.5)
        time.sleep(3)
        wire.lag_s, wire.is_deaf = 0.0, True
        until(lambda: worker.said("decisions: Redis: TimeoutError"), "the deadline passes")
        wire.is_deaf = False
    stage.settle()


@fault(10, "PostgreSQL killed under load", thorough=True)
def postgres_killed(stage: Stage) -> None:
    a_server_killed(stage, POSTGRES)


@fault(11, "PostgreSQL commits, and its reply is lost", thorough=True)
def commit_reply_lost(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.proxies[POSTGRES].arm(commits_decisions, "reset", stage.rng.randint(1, 9))
        until(stage.proxies[POSTGRES].struck.is_set, "a commit without a reply")
    stage.settle()


@fault(12, "PostgreSQL silent", thorough=True)
def postgres_silent(stage: Stage) -> None:
    worker, wire = stage.ready(), stage.proxies[POSTGRES]
    with stage.flow():
        some_way(stage)
        wire.is_deaf = True
        until(lambda: worker.said("decisions: postgres"), "the deadline passes")
        wire.is_deaf = False
    stage.settle()


@fault(13, "PostgreSQL's disk full")
def postgres_disk_full(stage: Stage) -> None:
    data = servers(stage.home)[POSTGRES].data
    aside, worker = data.with_name("data.aside"), None
    stage.kill_server(POSTGRES, signal.SIGINT)
    data.rename(aside)
    with small_disk(data, 40 + sum(file.stat().st_size for file in aside.rglob("*") if file.is_file()) // 1_000_000):
        subprocess.run(["cp", "-a", f"{aside}/.", str(data)], check=True)
        stage.servers_up()
        worker = stage.ready()
        with stage.flow():
            some_way(stage)
            ballast = data / "ballast"
            with suppress(OSError), ballast.open("wb") as file:  # the log writes, too, and may be faster
                file.write(bytes(max(0, shutil.disk_usage(data).free - 100_000)))
            until(lambda: worker.said("decisions: postgres"), "the log cannot be written")
            ballast.unlink()
            time.sleep(1)
            stage.servers_up()
        stage.settle()
        stage.check()
        stage.kill_server(POSTGRES, signal.SIGINT)
        subprocess.run(["cp", "-a", f"{data}/.", str(aside)], check=True)
    data.rmdir()
    aside.rename(data)
    stage.servers_up()


@fault(14, "PostgreSQL restored from an older copy")
def postgres_set_back(stage: Stage) -> None:
    data = servers(stage.home)[POSTGRES].data
    copy = data.with_name("data.copy")
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.kill_server(POSTGRES, signal.SIGINT)
        subprocess.run(["cp", "-a", str(data), str(copy)], check=True)
        stage.servers_up()
    until(stage.is_settled, "it goes on")
    with stage.flow():
        stage.kill_server(POSTGRES, signal.SIGINT)
        shutil.rmtree(data)
        copy.rename(data)
        stage.servers_up()
    stage.is_set_back = True
    stage.settle()


@fault(15, "PostgreSQL: rows locked, sessions ended, no connection left")
def postgres_contended(stage: Stage) -> None:
    worker = stage.ready()
    with stage.flow(), closing(psycopg2.connect(stage.direct.postgres)) as other, other.cursor() as cursor:
        some_way(stage)
        cursor.execute("SELECT FROM progress WHERE partition = %s FOR UPDATE", (stage.rng.randrange(4),))
        time.sleep(2)
        other.rollback()
        cursor.execute("LOCK TABLE decisions IN ACCESS EXCLUSIVE MODE")
        time.sleep(2)
        other.rollback()
        others = list(all_connections(stage.direct.postgres))
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query <> ''"
        )
        other.rollback()
        until(lambda: worker.said("decisions: postgres"), "the worker finds out")
        for connection in others:
            connection.close()
    assert worker.restarts() < 50
    stage.settle()


@fault(16, "Kafka killed under load, or its connections reset", thorough=True)
def kafka_killed(stage: Stage) -> None:
    if stage.rng.random() < 0.5:
        return a_server_killed(stage, KAFKA)
    stage.ready()
    with stage.flow():
        for _ in range(3):
            some_way(stage)
            stage.proxies[KAFKA].cut()
    stage.settle()


@fault(17, "Kafka: half an answer, then nothing or the end", thorough=True)
def kafka_half_answers(stage: Stage) -> None:
    stage.ready()
    wire = stage.proxies[KAFKA]
    troubles: list[Trouble] = ["half", "torn"]
    with stage.flow():
        for trouble in troubles:
            some_way(stage)
            wire.arm(asks(stage.rng.choice((FETCH, END_OF_TRANSACTION))), trouble, stage.rng.randint(1, 3))
            until(wire.struck.is_set, "half an answer")
            some_way(stage)  # nobody helps: the worker's own deadlines must
        wire.is_deaf = True
        time.sleep(stage.rng.uniform(1, 15))
        wire.is_deaf = False
        some_way(stage)
    stage.settle()


@fault(18, "Kafka commits a publish, and its reply is lost", thorough=True)
def publish_reply_lost(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.proxies[KAFKA].arm(asks(END_OF_TRANSACTION), stage.rng.choice(("reset", "swallow")), 2)
        until(stage.proxies[KAFKA].struck.is_set, "a publish without a reply")
    stage.settle()


@fault(19, "retention overtakes the worker")
def retention(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
    stage.settle()
    with stage.flow():
        pass
    stage.keep()
    ends, progress, _ = stage.standing()
    cut = {part: stage.rng.randint(progress[part] + 1, ends[part]) for part in stage.rng.sample(range(4), 2)}
    admin = KafkaAdminClient(bootstrap_servers=stage.direct.kafka)
    admin.delete_records({TopicPartition(TRANSACTIONS, part): offset for part, offset in cut.items()})
    admin.close()
    stage.gaps = sorted((part, progress[part], offset) for part, offset in cut.items())
    stage.settle()


@fault(20, "topic made anew, with more records than before", checks=False)
def topic_made_anew(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        pass
    stage.settle()
    stage.check()
    decided = stage.rows("SELECT count(*) FROM decisions")
    admin = KafkaAdminClient(bootstrap_servers=stage.direct.kafka)
    admin.delete_topics([TRANSACTIONS])
    until(lambda: TRANSACTIONS not in admin.list_topics(), "the topic is gone")
    admin.close()
    create_topics(stage.direct.kafka, 4)
    with stage.flow():
        pass
    with stage.flow():
        pass
    worker = stage.start()
    assert worker.wait_for_end() == 1 and worker.said("was made anew"), worker.last_words()
    assert stage.rows("SELECT count(*) FROM decisions") == decided


@fault(21, "poison flood: one record in ten")
def poison_flood(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        for _ in range(stage.size // PIECE):
            stage.also_send([poison(stage) for _ in range(PIECE // 8)])
    stage.settle()


@fault(22, "everything once more, from the future, and on a machine with another date", thorough=True)
def wrong_clocks(stage: Stage) -> None:
    stage.ready(skew_s=stage.rng.choice((-1, 1)) * stage.rng.randint(60, 400 * 86_400))
    with stage.flow():
        some_way(stage)
    early = read_topic(stage.direct.kafka, TRANSACTIONS)
    again = [(each.partition, each.key or b"", each.value) for each in early[: len(early) // 3]]
    tomorrow = int(time.time() * 1e3) + 86_400_000
    stage.rng.shuffle(again)
    future = replace(purchase(stage.rng, 0, tomorrow + 200 * 86_400_000), transaction_id="from the future")
    home = int(murmur2_partitions([future.customer_id.encode()], 4)[0])
    stage.also_send([*again, (home, future.customer_id.encode(), encode(future))])
    stage.settle()


@fault(23, "models: corrupt, not there, exchanged under load; a worker starts under a broken one")
def models(stage: Stage) -> None:
    ledger, stage.follows_ledger = Ledger(stage.direct.postgres), True
    first = ledger.add(stage.model.read_bytes(), {})
    second = ledger.add(small_model(stage.home / "second.bundle", rounds=5).read_bytes(), {})
    damaged = bytearray(stage.model.read_bytes())
    damaged[stage.rng.randrange(len(damaged))] ^= 1 << stage.rng.randrange(8)
    ((broken,),) = stage.rows(
        "INSERT INTO models (sha256, bundle, metrics) VALUES (%s, %s, '{}') RETURNING model_version",
        ("0" * 64, bytes(damaged)),
    )
    ledger.promote(first, "test", "first", {})
    worker = stage.ready()
    with stage.flow():
        some_way(stage)
        stage.rows(
            "INSERT INTO promotions (role, model_version, who, why, evidence) "
            "VALUES ('champion', %s, 'test', 'broken', '{}') RETURNING promotion",
            (broken,),
        )
        until(lambda: worker.said("refused"), "the broken model is refused")
        some_way(stage)
        worker.send(signal.SIGKILL)
        worker = stage.ready()  # who starts now has no model of its own
        assert worker.said(f"model {first}, is the last good one and judges"), worker.last_words()
        some_way(stage)
        ledger.promote(second, "test", "second", {})
        until(lambda: worker.said(f'"model_version": {second}'), "the second model is at work")
        some_way(stage)
    stage.settle()
    versions = {version for (version,) in stage.rows("SELECT DISTINCT model_version FROM decisions")}
    assert versions == {first, second}, versions


@fault(24, "one customer buys without end, and more comes than can be done")
def hot_key(stage: Stage) -> None:
    hot, now = b"hot", NOON
    home = int(murmur2_partitions([hot], 4)[0])
    with stage.flow():
        for part in range(3):
            some = []
            for number in range(part * 400, part * 400 + 400):  # more than are remembered
                each = purchase(stage.rng, number, now + number * 60_000)
                some.append((home, hot, encode(replace(each, transaction_id=f"hot{number}", customer_id="hot"))))
            stage.also_send(some)
    worker = stage.ready()
    until(stage.is_settled, "the lag drains")
    assert psutil.Process(worker.process.pid).memory_info().rss < 1 << 30
    stage.settle()
