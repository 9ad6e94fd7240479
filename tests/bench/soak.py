"""`make bench OF=soak`: minutes at a steady rate, and what has grown by then.

A town of fixed size with its past in the log, so that profiles are as long as they get; then its purchases, at a rate
that does not bend. Every few seconds: the memory of each process and how far the worker is behind. At the end:
everything that was sent is decided, `fraud verify` agrees, and the log tells how much room a million decisions take.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import psycopg2
import redis

from fraud_nb.adapters.kafka_bus import TRANSACTIONS, TopicEnds, create_topics, murmur2_partitions
from fraud_nb.adapters.postgres import HistoryLoader, LogReader, migrate
from fraud_nb.adapters.servers import find, servers
from fraud_nb.apps.demo import Running
from fraud_nb.apps.parts import say, say_over
from fraud_nb.domain.money import Rates
from fraud_nb.operations.backfill import backfill, simulated_past
from fraud_nb.operations.produce import shop_town
from tests.bench.bench import (
    PARTITIONS,
    TRAFFIC_SEED,
    Bench,
    BenchFailed,
    Sizes,
    aligned,
    last_status,
    on_servers,
    require_counted,
    require_moving,
    require_verified,
    rounded,
    sending,
    stream,
    told_by,
    verdict,
    wait_drained,
    wait_ready,
)
from tests.bench.state import MIB

LOOKS = 240  # at the processes, in all
JUDGED_AGAIN = 0.05  # share of the decisions, by `fraud verify` at the end; features are compared for all
AT_MOST = {"worker_mib_per_h": 30, "lag_s": 5}  # in the second half; 30 MiB/h are 5 MiB in ten minutes
AT_LEAST = {"kept_up": 0.99}  # of what the rate asks for
Floats = npt.NDArray[np.float64]


class Look(NamedTuple):
    """One look at everything that runs."""

    at_s: float  # since the first
    memory_mib: dict[str, float]  # by process
    decided: int  # transactions
    behind: int  # sent and not decided
    status: Mapping[str, Any]  # the worker's newest


def memory_mib(pid: int) -> float:
    """What a process and its children hold, memory that they share once, where the kernel tells."""
    total = 0
    for process in (whole := psutil.Process(pid), *whole.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.NoSuchProcess:  # a connection was closed
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / MIB


def size_mib(folder: Path) -> float:
    """What the files of a folder take on the disk."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += 512 * file.lstat().st_blocks
        except FileNotFoundError:  # servers tidy up
            continue
    return total / MIB


def disk_mib(bench: Bench) -> dict[str, float]:
    """Where the decisions and what follows from them lie; the log without what PostgreSQL keeps for a crash."""
    with closing(psycopg2.connect(bench.found.postgres)) as log, log.cursor() as cursor:
        cursor.execute("SELECT pg_database_size(current_database())")
        tables = int(cursor.fetchone()[0]) / MIB
    return {"postgres": tables, "valkey": size_mib(bench.home / "valkey"), "kafka": size_mib(bench.home / "kafka")}


def profiles_in(bench: Bench) -> tuple[int, float]:
    """Keys of the store, and MiB of all its data."""
    with closing(redis.Redis.from_url(bench.found.redis)) as store:
        return int(store.dbsize()), int(store.info("memory")["used_memory_dataset"]) / MIB


def slope(at_s: Floats, values: Floats) -> tuple[float, float]:
    """Growth an hour by least squares, and its standard error."""
    hours = (at_s - at_s.mean()) / 3_600
    spread = float(hours @ hours)
    growth = float(hours @ values) / spread
    rest = values - values.mean() - growth * hours
    return growth, float(np.sqrt(rest @ rest / max(1, len(values) - 2) / spread))


def load_past(bench: Bench) -> int:
    """The town's history, so that nobody's profile grows for want of a past; how many purchases it has."""
    world = shop_town(bench.sizes.customers, TRAFFIC_SEED)

    def report(done: int, total: int) -> None:
        say_over(f"history: {done:,} of {total:,}")

    with closing(HistoryLoader(bench.found.postgres)) as loader:
        return backfill(loader, lambda: simulated_past(world), PARTITIONS, murmur2_partitions, Rates(), report)


def wait_moved(bench: Bench, worker: Running) -> None:
    """Until the town is built, and the first of its purchases are decided."""
    begun_s, reader = time.monotonic(), LogReader(bench.found.postgres)
    while not any(reader.progress().values()):
        require_moving(worker, begun_s, "waiting for the sender")
        time.sleep(0.2)


def watch(bench: Bench, worker: Running, sender: Running, seconds: float) -> list[Look]:
    """Look at everything until the time is over; raises BenchFailed."""
    pids = {"worker": worker.process.pid, "sender": sender.process.pid}
    pids |= {server.name: find(server) or 0 for server in servers(bench.home)}
    ends, reader = TopicEnds(bench.found.kafka, TRANSACTIONS), LogReader(bench.found.postgres)
    begun_s, looks = time.monotonic(), list[Look]()
    while (at_s := time.monotonic() - begun_s) < seconds:
        decided = sum(reader.progress().values())
        behind = sum(ends().values()) - decided
        memory = {name: memory_mib(pid) for name, pid in pids.items()}
        looks.append(Look(at_s, memory, decided, behind, worker.said.get("status", {})))
        say_over(f"soak: {at_s:,.0f} of {seconds:,.0f} s, worker {memory['worker']:,.0f} MiB, {behind:,} behind")
        for running in (worker, sender):
            require_moving(running, time.monotonic(), "soaking")
        time.sleep(max(0.0, seconds / LOOKS - (time.monotonic() - begun_s - at_s)))
    return looks


def told_of(looks: Sequence[Look], rate: float) -> dict[str, Any]:
    """What the looks say of the second half, and how much was added in the first, while caches became warm."""
    middle = len(looks) // 2
    second = looks[middle:]
    at_s = np.array([look.at_s for look in second])
    kept_up = (looks[-1].decided - looks[0].decided) / (looks[-1].at_s - looks[0].at_s) / rate
    behind_s = max(look.behind for look in second) / rate
    result: dict[str, Any] = {"kept_up": kept_up, "lag_s": behind_s, "memory": {}}
    for name in looks[0].memory_mib:
        growth, error = slope(at_s, np.array([look.memory_mib[name] for look in second]))
        held = [looks[place].memory_mib[name] for place in (0, middle, -1)]
        result["memory"][name] = {
            "mib": held[2], "warming_mib": held[1] - held[0], "mib_per_h": growth, "error_mib_per_h": error
        }  # fmt: skip
    statuses = {look.status["time"]: look.status for look in second if look.status.get("p50_ms") is not None}.values()
    if not statuses:
        raise BenchFailed("soak: the worker told no latencies; take more minutes")
    result["p50_ms"] = float(np.median([each["p50_ms"] for each in statuses]))
    result["p99_ms"] = float(np.median([each["p99_ms"] for each in statuses]))
    result["worst_p99_ms"] = max(each["p99_ms"] for each in statuses)
    return result | {"worker_mib_per_h": result["memory"]["worker"]["mib_per_h"]}


def soaked(seconds: float) -> Callable[[Bench], dict[str, Any]]:
    """What is done on the servers."""

    def measure(bench: Bench) -> dict[str, Any]:
        (rate,) = bench.sizes.rates
        create_topics(bench.found.kafka, PARTITIONS)
        migrate(bench.found.postgres, PARTITIONS)
        say(f"[3/5] the past of {bench.sizes.customers:,} customers")
        result: dict[str, Any] = {"seconds": seconds, "history": load_past(bench), "customers": bench.sizes.customers}
        say(f"[4/5] {seconds:,.0f} s at {rate:,} transactions per second")
        with stream(bench, "--status-every", str(seconds / LOOKS * 4)) as worker:
            wait_ready(worker)
            disk, (keys, dataset_mib) = disk_mib(bench), profiles_in(bench)
            with sending(bench, rate) as sender:
                wait_moved(bench, worker)
                looks = watch(bench, worker, sender, seconds)
            result |= told_of(looks, rate)
            wait_drained(bench, worker)
            worker.stop(10)
        sent, _ = told_by(sender)
        require_counted(bench, 0, last_status(worker), sent)
        result |= {"sent": sent, "rate": rate}
        grown = {name: (mib - disk[name]) / sent * 1e6 for name, mib in disk_mib(bench).items()}
        keys_now, mib_now = profiles_in(bench)
        result |= {"disk_mib_per_million": grown, "new_keys": keys_now - keys, "store_added_mib": mib_now - dataset_mib}
        say("[5/5] fraud verify")
        return result | {"verified": require_verified(bench, JUDGED_AGAIN)}

    return measure


def report(result: Mapping[str, Any]) -> str:
    """The table, and as its last line one JSON object."""

    def row(what: str, form: str, name: str) -> tuple[str, str, str]:
        return what, form.format(result[name]), verdict(result, name, AT_LEAST, AT_MOST)

    rows = [
        row("sent, and decided", "{:,}", "sent"),
        row("  of what the rate asks for", "{:.1%}", "kept_up"),
        row("from sender to commit, p50", "{:,.1f} ms", "p50_ms"),
        row("  p99", "{:,.1f} ms", "p99_ms"),
        row("  p99 of the worst moment", "{:,.1f} ms", "worst_p99_ms"),
        row("furthest behind, second half", "{:,.1f} s", "lag_s"),
        row("the worker grows, second half", "{:+,.1f} MiB/h", "worker_mib_per_h"),
    ]
    for name, told in result["memory"].items():
        growth = f"first half {told['warming_mib']:+,.1f} MiB, then {told['mib_per_h']:+,.1f}"
        rows.append(
            (f"memory of the {name}", f"{told['mib']:,.0f} MiB", f"{growth} ± {told['error_mib_per_h']:,.1f} MiB/h")
        )
    for name, grown in result["disk_mib_per_million"].items():
        rows.append((f"disk for a million, {name}", f"{grown:,.0f} MiB", ""))
    rows += [
        row("keys new in the store", "{:,}", "new_keys"),
        row("  its data grew by", "{:,.1f} MiB", "store_added_mib"),
    ]
    return f"{aligned(rows)}\n{result['verified']}\n{json.dumps(rounded(result))}\n"


def asked_for(words: Sequence[str]) -> tuple[float, Sizes]:
    """What the command line asks for; exits with 2 on anything else."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, metavar="M", help="of steady traffic (default: 20)")
    parser.add_argument("--rate", type=int, default=1_000, metavar="R", help="transactions per second (default: 1000)")
    parser.add_argument("--customers", type=int, default=5_000, metavar="N", help="of the town (default: 5000)")
    asked = parser.parse_args(words)
    if wrong := next((name for name, value in vars(asked).items() if not 0 < value < float("inf")), None):
        parser.error(f"--{wrong}: above 0")
    return 60 * asked.minutes, Sizes(rates=(asked.rate,), customers=asked.customers)


def main(words: Sequence[str] | None = None) -> int:
    """0: flat, and nothing is late; 1: not, or a part failed; 2: wrong usage."""
    seconds, sizes = asked_for(sys.argv[1:] if words is None else words)
    result = on_servers("soak", 5, sizes, soaked(seconds))
    if result is None:
        return 1
    sys.stdout.write(report(result))
    return int(any(verdict(result, name, AT_LEAST, AT_MOST).startswith("MISSED") for name in (*AT_LEAST, *AT_MOST)))


if __name__ == "__main__":
    sys.exit(main())
