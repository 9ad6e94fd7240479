"""What the tests of the desk share: a PostgreSQL of their own, a shop whose log fills up, and a browser."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psycopg2

from fraud_nb.adapters.desk import Seen
from fraud_nb.adapters.postgres import Batch, Claim, Judgement, LabelBatch, LabelLog, Logged, PostgresLog, migrate
from fraud_nb.apps.dashboard import NOTEBOOK, dashboard_command, dashboard_environment
from fraud_nb.decision.reasons import words
from fraud_nb.domain.schema import Label, Outcome, Reason, Transaction
from fraud_nb.features.catalogue import FEATURE_NAMES, feature_set
from fraud_nb.learning.simulate import CATEGORIES, CITIES
from tests.e2e.stream_kit import MAIN

PARTITIONS = 4
NAMES = ("amount_to_median", "same_device_count", "customer_count_1h", "distance_from_usual", "merchant_frauds_14d")
VALUES = ((13.4, 4.2, 31.0), (0.0,), (7.0, 4.0), (870_000.0, 41_000.0), (1.0, 3.0))
Answer = TypeVar("Answer")


def until(ask: Callable[[], Answer], wanted: Callable[[Answer], bool], deadline_s: float = 60) -> Answer:
    """Ask until the answer is as wanted."""
    end = time.monotonic() + deadline_s
    while not wanted(answer := ask()):
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s; the last answer was {answer!r}"
        time.sleep(0.05)
    return answer


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Shop:
    """A log that fills up, without a stream: rows go in by the adapters that the worker uses."""

    def __init__(self, dsn: str, seed: int = 7) -> None:
        self.dsn, self.rng, self.sold = dsn, random.Random(seed), 0
        self.log, self.labels = PostgresLog(dsn), LabelLog(dsn)
        self.claims = self.log.claim(range(PARTITIONS))
        self.feature_set, table = feature_set()
        self.log.register_features(self.feature_set, table)

    def purchase(self, recorded_ms: int, **given: Any) -> Logged:
        """A decided purchase; its partition and offset are not yet right."""
        rng = self.rng
        number, customer = self.sold, int(300 * rng.random() ** 2)
        self.sold += 1
        category, _, median, spread = rng.choices(CATEGORIES, [weight for _, weight, _, _ in CATEGORIES])[0]
        bad = given.pop("bad", rng.random() < 0.012)
        amount = max(100, int(100 * median * rng.lognormvariate(1.3 if bad else 0, spread)))
        north, east = CITIES[customer % len(CITIES)]
        facts = {
            "transaction_id": f"t-{number:06d}", "customer_id": f"customer-{customer}", "event_time": recorded_ms - 40,
            "amount_minor": amount, "currency": "EUR", "merchant_id": f"{category}-{rng.randrange(40)}",
            "device_id": f"phone-{customer}", "category": category,
            "latitude_e6": int(1e6 * rng.gauss(north, 0.2)), "longitude_e6": int(1e6 * rng.gauss(east, 0.3)),
        }  # fmt: skip
        transaction = Transaction(**(facts | given))
        return Logged(
            0, 0, transaction, transaction.amount_minor, bytes(32), recorded_ms, self.judgement(transaction, bad)
        )

    def judgement(self, transaction: Transaction, bad: bool) -> Judgement:
        rng = self.rng
        probability = rng.betavariate(2, 4) if bad else min(0.03, rng.expovariate(1) ** 2 * 0.0012)
        outcome = Outcome.APPROVE
        if bad:
            outcome = Outcome.DECLINE if probability > 0.6 else rng.choice((Outcome.REVIEW, Outcome.CHALLENGE))
        vector = np.full(len(FEATURE_NAMES), np.nan, np.float32)
        vector[FEATURE_NAMES.index("amount")] = transaction.amount_minor
        because = []
        for place, part in zip(rng.sample(range(len(NAMES)), 3), (0.46, 0.27, 0.11), strict=True):
            value = rng.choice(VALUES[place])
            vector[FEATURE_NAMES.index(NAMES[place])] = value
            share = part * rng.uniform(0.8, 1.1)
            because.append(Reason(NAMES[place].upper(), words(NAMES[place], value, "EUR"), share))
        why = tuple(because) if bad else ()
        return Judgement(self.feature_set, vector.tobytes(), probability, outcome, why, 3, 1, 0, b"")

    def sell(self, *rows: Logged) -> list[str]:
        """Commit purchases, each in the partition of its customer; their ids."""
        placed: dict[int, list[Logged]] = {}
        for row in rows:
            partition = sum((row.transaction.customer_id or "").encode()) % PARTITIONS
            offset = self.claims[partition].next_offset + len(placed.setdefault(partition, []))
            placed[partition].append(row._replace(partition=partition, offset=offset))
        ends = {at: self.claims[at].next_offset + len(mine) for at, mine in placed.items()}
        decided = [row for mine in placed.values() for row in mine]
        self.log.commit(Batch(decided, [], [], {at: (self.claims[at], end) for at, end in ends.items()}))
        self.claims.update({at: Claim(self.claims[at].epoch, end) for at, end in ends.items()})
        return [row.transaction.transaction_id for row in rows]

    def trade(self, count: int, seconds: float = 110) -> list[str]:
        """Purchases spread over the last seconds, the newest now."""
        end, step = now_ms(), 1_000 * seconds / count
        return self.sell(*[self.purchase(int(end - step * (count - 1 - number))) for number in range(count)])

    def tell(self, *labels: Label) -> None:
        """Labels, in the order they come in."""
        claim = self.labels.claim()
        numbered = [(label, claim.next_offset + number) for number, label in enumerate(labels)]
        self.labels.commit(LabelBatch(numbered, [], claim, claim.next_offset + len(labels)))

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask, or change, as the owner."""
        with psycopg2.connect(self.dsn) as connection, connection.cursor() as cursor:
            cursor.execute(query, values or None)
            return cursor.fetchall() if cursor.description else []


def shop_in(dsn: str) -> Shop:
    """A shop with an empty log."""
    migrate(dsn, PARTITIONS)
    return Shop(dsn)


# ---- Voila and its browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CALM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str:
    """Where it is; raises AssertionError with the remedy."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert found, "the desk's tests drive a browser: apt-get install chromium (or put google-chrome on PATH)"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """A running Voila."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}/"

    def kernels(self) -> list[int]:
        """Process ids of the kernels."""
        told = subprocess.run(["pgrep", "-P", str(self.process.pid), "-f", "ipykernel"], capture_output=True, text=True)
        return [int(line) for line in told.stdout.split()]

    def rss_mb(self, pid: int) -> float:
        """Memory of a process."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def serving(dsn: str, notebook: Path = NOTEBOOK, pool: int = 1, quiet_s: int = 45, **settings: str) -> Iterator[Site]:
    """The desk on a free port: by `fraud dashboard`, or by its Voila where something is to be different."""
    with tempfile.TemporaryDirectory(prefix="fraud-desk-") as folder:
        port, log = free_port(), Path(folder) / "voila.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
        others = {"FRAUD_KAFKA": "127.0.0.1:1", "FRAUD_REDIS": "redis://127.0.0.1:1"}  # given, so never started
        environment = dashboard_environment(kept | others | settings, dsn)
        command = [sys.executable, "-c", MAIN, "dashboard", "--port", str(port)]
        if (notebook, pool, quiet_s) != (NOTEBOOK, 1, 45):
            command = dashboard_command(port, notebook, pool, quiet_s)
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            site = Site(process, port, log)
            wait_until_ready(site, pool)
            yield site
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(site: Site, pool: int) -> None:
    """It listens, and its pool of kernels is filled."""

    def ready() -> str:
        said = site.log.read_text(errors="replace")
        assert site.process.poll() is None, said
        with socket.socket() as probe:
            probe.settimeout(1)
            listening = probe.connect_ex(("127.0.0.1", site.port)) == 0
        return "ready" if listening and (pool == 0 or "Kernel pool of" in said) else said[-400:]

    until(ready, lambda said: said == "ready", 120)


def look_until_even(reader: Any, page: int = 200_000) -> Any:
    """Look until everything is counted."""
    look = reader.look(Seen(), page)
    while look.behind:
        look = reader.look(look.seen, page)
    return look
