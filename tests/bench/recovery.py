"""`make bench OF=recovery`: how long nothing is decided after a worker was killed, and after Redis has lost everything.

A log with many decisions, made by a worker from the topic; then, while purchases flow, the plug is pulled. What is
timed is what a shop sees: from the fault to the first prediction, in every partition that was hit, of whoever claimed
the partition after it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import psycopg2
import psycopg2.extensions
import redis
from kafka import KafkaConsumer, TopicPartition

from fraud_nb.adapters.kafka_bus import PREDICTIONS, TRANSACTIONS, create_topics
from fraud_nb.adapters.postgres import Claim, LogOverview, migrate
from fraud_nb.apps.demo import Running
from fraud_nb.apps.parts import say
from tests.bench.bench import (
    PARTITIONS,
    STUCK_S,
    Bench,
    BenchFailed,
    Sizes,
    aligned,
    on_servers,
    preload,
    require_moving,
    require_verified,
    rounded,
    sending,
    stream,
    verdict,
    wait_drained,
    wait_ready,
)

EVERYWHERE = frozenset(range(PARTITIONS))
SEEN_WITHIN_S = 0.02  # how exact the times are
JUDGED_AGAIN = 0.05  # share of the decisions, by `fraud verify` at the end; features are compared for all
AT_MOST = {"standby_s": 5.0, "redis_s_per_million": 30.0}


@contextmanager
def shop(bench: Bench) -> Iterator[KafkaConsumer]:
    """Somebody who waits for predictions, and has read all there are."""
    reader = KafkaConsumer(
        bootstrap_servers=bench.found.kafka, group_id=None, enable_auto_commit=False, isolation_level="read_committed"
    )
    try:
        places = [TopicPartition(PREDICTIONS, partition) for partition in range(PARTITIONS)]
        reader.assign(places)
        reader.seek_to_end()
        for place in places:
            reader.position(place)  # else the end is looked up later, behind what we wait for
        yield reader
    finally:
        reader.close(autocommit=False)


def claims_in(log: psycopg2.extensions.connection) -> dict[int, Claim]:
    """Who may decide, partition by partition, and how far the log is."""
    with log, log.cursor() as cursor:
        cursor.execute("SELECT partition, epoch, next_offset FROM progress")
        return {partition: Claim(*claim) for partition, *claim in cursor.fetchall()}


def settled_claims(log: psycopg2.extensions.connection) -> dict[int, Claim]:
    """The claims, once everybody decides under the claim of a second ago; raises BenchFailed."""
    begun_s, before = time.monotonic(), claims_in(log)
    while time.monotonic() - begun_s < STUCK_S:
        time.sleep(1)
        now = claims_in(log)
        pairs = [(before[partition], now[partition]) for partition in before]
        if all(was.epoch == claim.epoch and was.next_offset < claim.next_offset for was, claim in pairs):
            return now
        before = now
    raise BenchFailed("stream: not every partition is decided; is the rate too low?")


def outage_s(
    bench: Bench,
    pull: Callable[[], Running],  # the plug; who must go on then
    hit: frozenset[int] = EVERYWHERE,  # partitions
) -> float:
    """From the fault until the last of these partitions is decided again, as a shop sees it."""
    with shop(bench) as reader, closing(psycopg2.connect(bench.found.postgres)) as log:
        before = settled_claims(log)
        begun_s = time.monotonic()
        worker = pull()
        claimed: dict[int, int] = {}  # offsets from which on somebody else decides
        seen_s: dict[int, float] = {}
        while not hit <= seen_s.keys():
            for partition, claim in claims_in(log).items():
                if claim.epoch > before[partition].epoch:
                    claimed.setdefault(partition, claim.next_offset)
            for place, records in reader.poll(timeout_ms=int(1e3 * SEEN_WITHIN_S)).items():
                for record in records:
                    _, offset = dict(record.headers)["source"].split(b":")
                    if int(offset) >= claimed.get(place.partition, sys.maxsize):
                        seen_s.setdefault(place.partition, time.monotonic())
            require_moving(worker, begun_s, "recovering")
        return max(seen_s[partition] for partition in hit) - begun_s


def killed(worker: Running, successor: Callable[[], Running]) -> Callable[[], Running]:
    """The plug of a worker."""

    def pull() -> Running:
        worker.process.kill()
        worker.process.wait()
        return successor()

    return pull


def emptied(bench: Bench, worker: Running) -> Callable[[], Running]:
    """The plug of what Redis remembers."""

    def pull() -> Running:
        with closing(redis.Redis.from_url(bench.found.redis)) as store:
            store.flushall()
        return worker

    return pull


def measure(bench: Bench) -> dict[str, Any]:
    """Fill the log, and pull one plug after the other; raises BenchFailed, and what servers raise."""
    logged, (rate,) = bench.sizes.transactions, bench.sizes.rates
    create_topics(bench.found.kafka, PARTITIONS)
    migrate(bench.found.postgres, PARTITIONS)
    result: dict[str, Any] = {"logged": logged, "customers": bench.sizes.customers, "tx_per_s": rate}
    say(f"[3/5] a log of {logged:,} decisions")
    preload(bench, logged, TRANSACTIONS)
    with ExitStack() as staff:

        def hired() -> Running:
            crew.append(staff.enter_context(stream(bench)))
            return crew[-1]

        crew: list[Running] = []
        wait_drained(bench, hired())
        say(f"[4/5] plugs are pulled, at {rate:,} transactions per second")
        with sending(bench, rate):
            wait_ready(hired())
            dead = EVERYWHERE - set(crew[1].said["ready"]["partitions"])
            result["standby_s"] = outage_s(bench, killed(crew[0], lambda: crew[1]), dead)
            result["restart_s"] = outage_s(bench, killed(crew[1], hired))
            result["redis_s"] = outage_s(bench, emptied(bench, crew[2]))
        wait_drained(bench, crew[2])
        crew[2].stop(10)
    say("[5/5] fraud verify")
    result["verified"] = require_verified(bench, JUDGED_AGAIN)
    in_log = LogOverview(bench.found.postgres).tally().decisions
    return result | {"redis_s_per_million": 1e6 * result["redis_s"] / in_log, "in_log": in_log}


def report(result: Mapping[str, Any]) -> str:
    """The table, and as its last line one JSON object."""
    rows = (
        ("a worker killed, another one there", "standby_s", "{:.1f} s"),
        ("the only worker killed and restarted", "restart_s", "{:.1f} s"),
        (f"Redis lost, {result['in_log']:,} logged", "redis_s", "{:.1f} s"),
        ("  for each million logged", "redis_s_per_million", "{:.1f} s"),
    )
    table = aligned((what, form.format(result[name]), verdict(result, name, {}, AT_MOST)) for what, name, form in rows)
    return f"{table}\n{result['verified']}\n{json.dumps(rounded(result))}\n"


def sizes_of(words: Sequence[str]) -> Sizes:
    """What the command line asks for; exits with 2 on anything else."""
    parser = argparse.ArgumentParser(prog="recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--logged", type=int, default=1_000_000, metavar="N", help="decisions (default: 1000000)")
    parser.add_argument("--rate", type=int, default=500, metavar="R", help="transactions per second (default: 500)")
    parser.add_argument("--customers", type=int, default=5_000, metavar="N", help="of the traffic (default: 5000)")
    asked = parser.parse_args(words)
    if wrong := next((name for name, value in vars(asked).items() if value <= 0), None):
        parser.error(f"--{wrong}: above 0")
    return Sizes(transactions=asked.logged, rates=(asked.rate,), customers=asked.customers)


def main(words: Sequence[str] | None = None) -> int:
    """0: fast enough; 1: not, or a part failed; 2: wrong usage."""
    result = on_servers("recovery", 5, sizes_of(sys.argv[1:] if words is None else words), measure)
    if result is None:
        return 1
    sys.stdout.write(report(result))
    return int(any(verdict(result, name, {}, AT_MOST).startswith("MISSED") for name in AT_MOST))


if __name__ == "__main__":
    sys.exit(main())
