"""Where a fault is played: real servers behind proxies, a seeded hostile stream, workers as processes."""

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import psycopg2
import redis
from kafka import KafkaProducer

from fraud_nb.adapters import servers as embedded
from fraud_nb.adapters.kafka_bus import (
    DEAD_LETTERS,
    LABELS,
    PREDICTIONS,
    TRANSACTIONS,
    TopicEnds,
    committed_offsets,
    create_topics,
    read_topic,
    topic_ends,
)
from fraud_nb.adapters.ports import SHARED, Record
from fraud_nb.adapters.postgres import migrate
from fraud_nb.adapters.servers import Addresses, find, servers, up
from fraud_nb.apps.cli import main
from fraud_nb.features.catalogue import FEATURE_NAMES
from tests.conftest import quiet, running_servers
from tests.e2e.stream_kit import MAIN, hostile_labels, hostile_stream, produce
from tests.faults.proxy import Proxy
from tests.faults.truth import Found, Truth, check, found_in_log, label_in

PARTITIONS = 4
PATIENCE_S = 150.0  # overdue, on two busy cores
KAFKA, REDIS, POSTGRES = 0, 1, 2  # as `servers` lists them
PIECE, PIECES_APART_S, TRICKLE_S = 50, 0.03, 1.0  # purchases sent together, so that a worker meets many batches
# A worker's clock; libfaketime, which shifts that of a whole process, breaks the waiting of kafka-python (EINVAL).
SKEWED = """
import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() + {skew_s}, lambda: now_ns() + {skew_s} * 10**9
"""


class NotRun(Exception):
    """This machine cannot play the fault: why."""


def until(holds: Callable[[], object], what: str, deadline_s: float = PATIENCE_S) -> None:
    """Wait for it; an AssertionError says what did not come."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:.0f} s"
        time.sleep(0.05)


@dataclass
class Worker:
    """A `fraud stream` of ours."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self, words: str) -> bool:
        """Whether its log has these words."""
        return words in self.log.read_text(errors="replace")

    def restarts(self) -> int:
        """Returns to the claim, as its last status says."""
        return max([int(each) for each in re.findall(r'"restarts": (\d+)', self.log.read_text())], default=0)

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        self.process.send_signal(number)

    def wait_for_end(self, deadline_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(deadline_s)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


@dataclass
class Stage:
    """The servers, what was sent, and who works."""

    home: Path
    direct: Addresses
    proxies: tuple[Proxy, Proxy, Proxy]  # in front of KAFKA, REDIS and POSTGRES
    environment: dict[str, str]  # of a worker: it sees the proxies only
    model: Path
    rng: random.Random  # of the fault
    stream: random.Random  # of what is sent: in a thread of its own, so that a seed plays the same again
    size: int  # purchases that one flow sends
    purchases: int = 0
    sent: int = 0
    settled_s: float = 0.0  # how long it took, after the fault, until all was dealt with
    workers: list[Worker] = field(default_factory=list)
    gaps: list[tuple[int, int, int]] = field(default_factory=list)  # that there must be
    kept: list[Record] = field(default_factory=list)  # of the topic, from before something was taken from it
    follows_ledger: bool = False  # which has the models; else workers are given the one
    is_set_back: bool = False  # the log: what readers were told first may differ from what it says now

    def with_model(self) -> list[str]:
        """Options of a command that needs models."""
        return [] if self.follows_ledger else ["--model", str(self.model)]

    def start(self, failpoint: str = "", skew_s: int = 0) -> Worker:
        """A worker; it need not be ready yet."""
        log = self.home / f"worker-{len(self.workers)}.log"
        command = [sys.executable, "-c", SKEWED.format(skew_s=skew_s) + MAIN, "stream", "--status-every", "0.2"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
        crash = {"FRAUD_FAILPOINT": failpoint} if failpoint else {}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *self.with_model()],
                env={**kept, **self.environment, **crash},
                stderr=file,
                stdout=subprocess.DEVNULL,
            )
        self.workers.append(Worker(process, log))
        return self.workers[-1]

    def ready(self, skew_s: int = 0) -> Worker:
        """A worker that has claimed its partitions."""
        worker = self.start(skew_s=skew_s)
        until(lambda: worker.said('"ready"') or worker.process.poll() is not None, "a worker is ready")
        assert worker.process.poll() is None, worker.last_words()
        return worker

    @contextlib.contextmanager
    def flow(self) -> Iterator[None]:
        """The hostile stream flows while the block runs, and until `size` purchases are sent."""
        ended, raised = threading.Event(), list[BaseException]()
        thread = threading.Thread(target=self._send, args=(ended, raised), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(PATIENCE_S)
        assert not thread.is_alive() and not raised, f"the sender: {raised or 'stuck'}"

    def _send(self, ended: threading.Event, raised: list[BaseException]) -> None:
        try:
            producer = KafkaProducer(bootstrap_servers=self.direct.kafka, linger_ms=5)
            futures, enough = [], self.purchases + self.size
            while self.purchases < enough or not ended.is_set():
                chunk = hostile_stream(self.stream, self.purchases, PIECE)
                self.purchases += PIECE
                labels = hostile_labels(self.stream, self.purchases, PIECE // 5)
                for topic, records in ((TRANSACTIONS, chunk), (LABELS, labels)):
                    for partition, key, value in records:
                        futures.append(producer.send(topic, key=key, value=value, partition=partition))
                self.sent += len(chunk)
                time.sleep(PIECES_APART_S if self.purchases < enough else TRICKLE_S)
            for future in futures:
                future.get(PATIENCE_S)
            producer.close()
        except BaseException as error:  # handed to whoever waits for us
            raised.append(error)

    def also_send(self, records: Sequence[tuple[int, bytes, bytes | None]]) -> None:
        """Records beside the flow."""
        produce(self.direct.kafka, list(records))
        self.sent += len(records)

    def kill_server(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        """It is down until `servers_up`."""
        server = servers(self.home)[number]
        pid = find(server)
        assert pid is not None, f"{server.name} does not run"
        os.kill(pid, how)
        until(lambda: find(server) is None, f"{server.name} is gone")

    def servers_up(self) -> None:
        """Whatever is down comes back, with its data."""
        up(self.home, quiet)

    def rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Ask the log, as its owner."""
        with contextlib.closing(psycopg2.connect(self.direct.postgres, connect_timeout=5)) as connection:
            with connection, connection.cursor() as cursor:
                cursor.execute(query, values)
                return cursor.fetchall()

    @property
    def redis(self) -> Any:
        """A client of our own."""
        return redis.Redis.from_url(self.direct.redis, socket_timeout=10)

    def decided(self) -> int:
        """How far all partitions have come."""
        return int(self.rows("SELECT sum(next_offset) FROM progress")[0][0])

    def standing(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """Where the topic ends, how far the log is, and how far is published."""
        ends = TopicEnds(self.direct.kafka, TRANSACTIONS, 10)()
        progress = dict(self.rows("SELECT partition, next_offset FROM progress"))
        return ends, progress, committed_offsets(self.direct.kafka, TRANSACTIONS)

    def is_hidden(self) -> bool:
        """Whether a transaction is open: a read-committed reader does not see what comes after its first record."""
        written = topic_ends(self.direct.kafka, PREDICTIONS, "read_uncommitted")
        return written != topic_ends(self.direct.kafka, PREDICTIONS)

    def is_settled(self) -> bool:
        """Whether everything that was sent is dealt with, and everything that follows from it, too."""
        ends, progress, committed = self.standing()
        store = self.redis
        stored = {part: int(store.get(f"fraud:{{{part}}}:offset") or 0) for part in range(PARTITIONS)}
        if not ends == progress == committed == stored or self.is_hidden():
            return False
        ((labels, version),) = self.rows(
            "SELECT next_offset, (SELECT max(version) FROM shared_versions) FROM label_progress"
        )
        shared = int(store.get(f"fraud:{{{SHARED}}}:offset") or 0)
        return bool(labels == TopicEnds(self.direct.kafka, LABELS, 10)()[0] and shared == (version or 0))

    def settle(self) -> None:
        """Let a healthy worker finish, and end all workers in good order."""
        begin = time.monotonic()
        if all(worker.process.poll() is not None for worker in self.workers):
            self.start()

        def done() -> bool:
            living = [worker for worker in self.workers if worker.process.poll() is None]
            assert living, f"the last worker ended: {self.workers[-1].last_words()}"
            return self.is_settled()

        until(done, "all is dealt with")
        self.settled_s = time.monotonic() - begin
        self.stop()

    def stop(self) -> None:
        """End all workers in good order; one that is still starting may not know yet what that is."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.send(signal.SIGTERM)
                good = (0,) if worker.said('"ready"') else (0, -signal.SIGTERM)
                assert worker.wait_for_end() in good, worker.last_words()

    def check(self) -> None:
        """`fraud verify`, and the seven invariants from the topics alone."""
        said = io.StringIO()
        environment = self.environment | {
            "FRAUD_KAFKA": self.direct.kafka,
            "FRAUD_REDIS": self.direct.redis,
            "FRAUD_POSTGRES": self.direct.postgres,
        }
        with contextlib.redirect_stderr(said):
            code = main(["verify", *self.with_model()], environment)
        assert code == 0 and "verify: 0 mismatches" in said.getvalue(), said.getvalue()
        truth = self.truth()
        gone = sum(stop - start for _, start, stop in self.gaps)
        assert len(truth.ids) + len(truth.dead) + len(truth.repeats) + gone == self.sent, "the topic lost records"
        check(truth, self.found(), self.gaps, not self.is_set_back, seed=self.rng.randrange(1 << 30))

    def keep(self) -> None:
        """Remember what the topic holds: some of it will be gone."""
        self.kept = read_topic(self.direct.kafka, TRANSACTIONS)

    def truth(self) -> Truth:
        """What the topics say there must be."""
        truth = Truth()
        records = {(each.partition, each.offset): each for each in read_topic(self.direct.kafka, TRANSACTIONS)}
        gone = {(part, offset) for part, start, stop in self.gaps for offset in range(start, stop)}
        for each in self.kept:
            if (each.partition, each.offset) not in gone:
                records.setdefault((each.partition, each.offset), each)
        for _, record in sorted(records.items()):
            truth.learn(record, PARTITIONS)
        truth.claims = [label_in(record.value) for record in read_topic(self.direct.kafka, LABELS)]
        return truth

    def found(self) -> Found:
        """What the system says there is."""
        ends, _, committed = self.standing()
        store, watermarks, profiles = self.redis, {}, {}
        for partition in range(PARTITIONS):
            prefix = f"fraud:{{{partition}}}:"
            watermarks[partition] = int(store.get(prefix + "offset") or 0)
            keys = sorted(store.scan_iter(f"{prefix}c:*", 1_000))
            for key, content in zip(keys, store.mget(keys) if keys else [], strict=True):
                profiles[partition, key.decode().removeprefix(f"{prefix}c:")] = content
        return Found(
            **found_in_log(self.rows),
            feature_names=FEATURE_NAMES,
            committed=committed,
            ends=ends,
            predictions=read_topic(self.direct.kafka, PREDICTIONS),
            letters=read_topic(self.direct.kafka, DEAD_LETTERS),
            watermarks=watermarks,
            profiles=profiles,
        )


def moved(address: str, port: int) -> str:
    """The same address at the proxy's port."""
    parts = urlsplit(address)
    login, _, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()


def free_port() -> int:
    """One that is free, above those of `servers` and below those from which the kernel gives."""
    return next(port for port in random.sample(range(30_100, 32_700), 100) if embedded.is_free(port))


def with_listener(configuration: str, port: int, advertised: int) -> str:
    """Kafka tells its clients where to go: those who come through the proxy must be told the proxy."""
    return (
        configuration.replace("\nlisteners=", f"\nlisteners=PROXIED://127.0.0.1:{port},")
        .replace("advertised.listeners=", f"advertised.listeners=PROXIED://127.0.0.1:{advertised},")
        .replace("CONTROLLER:PLAINTEXT,", "CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT,")
    )


@contextlib.contextmanager
def stage(model: Path, seed: str, size: int) -> Iterator[Stage]:
    """Servers, proxies, topics and schema, fresh; all of it is gone afterwards."""
    proxies = Proxy(), Proxy(), Proxy()
    behind = free_port()
    configuration = with_listener(embedded.KAFKA_CONFIGURATION, behind, proxies[KAFKA].port)
    patched = patch.object(embedded, "KAFKA_CONFIGURATION", configuration)
    with patched, contextlib.contextmanager(running_servers)() as running:
        direct = running.addresses
        for proxy, port in zip(
            proxies, (behind, urlsplit(direct.redis).port, urlsplit(direct.postgres).port), strict=True
        ):
            proxy.upstream = port
        create_topics(direct.kafka, PARTITIONS)
        migrate(direct.postgres, PARTITIONS)
        environment = {
            "FRAUD_HOME": str(running.home / "worker"),
            "FRAUD_KAFKA": f"127.0.0.1:{proxies[KAFKA].port}",
            "FRAUD_REDIS": moved(direct.redis, proxies[REDIS].port),
            "FRAUD_POSTGRES": moved(direct.postgres, proxies[POSTGRES].port),
        }
        made = Stage(
            running.home,
            direct,
            proxies,
            environment,
            model,
            random.Random(seed),
            random.Random(f"{seed}:stream"),
            size,
        )
        try:
            yield made
        finally:
            for worker in made.workers:
                worker.process.kill()
                worker.process.wait()
            for proxy in proxies:
                proxy.close()
