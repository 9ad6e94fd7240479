"""`make bench`: the worker beside the pipeline of the tutorials, on the same servers, in one run.

Everything is the real thing: embedded Kafka, Valkey and PostgreSQL in a folder of its own, a trained model, the traffic
of the simulated town, and `fraud stream` and `fraud simulate` as processes. What is counted is compared with the log.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg2
from kafka import KafkaAdminClient

from fraud_nb import __version__
from fraud_nb.adapters.feed import KafkaFeed, remembered_partition
from fraud_nb.adapters.kafka_bus import TRANSACTIONS, create_topics, murmur2_partitions, topic_ends
from fraud_nb.adapters.ports import Outgoing, Unavailable
from fraud_nb.adapters.postgres import LogOverview, LogReader, migrate
from fraud_nb.adapters.servers import Addresses, ServerError
from fraud_nb.apps.demo import Running, fraud_command, start
from fraud_nb.apps.parts import say, say_over
from fraud_nb.decision.bundle import TrainingWindow
from fraud_nb.decision.policy import Policy
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.windows import DAY_MS
from fraud_nb.learning.dataset import final_split, fold_history, targets
from fraud_nb.learning.simulate import World
from fraud_nb.learning.train import Recipe, alert_policy, bundle_of, fit, score
from fraud_nb.operations.backfill import purchases_of, simulated_past
from fraud_nb.operations.produce import Message, Sent, going_on, produce, shop_town
from tests.bench.naive import ANSWERS, TABLE, TOPIC
from tests.bench.state import MIB
from tests.conftest import running_servers

ROOT = Path(__file__).parents[2]
PARTITIONS = 4
TRAFFIC_SEED, TRAINING_SEED = 1, 2  # the model has not seen the town it judges
ALERT_SHARE = 0.01  # so that reasons are paid for as often as in life
NAIVE_CEILING = 1_000  # transactions per second; so many are preloaded, that its topic does not run dry
STUCK_S = 120  # overdue
AT_LEAST: Mapping[str, float] = {"tx_per_s": 8_000, "ratio": 50}
AT_MOST: Mapping[str, float] = {"p99_ms_at_1000": 40, "worker_full_rss_mib": 1_024}


class BenchFailed(RuntimeError):
    """A part did not do what is measured: which, and its last words."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    transactions: int = 200_000  # preloaded for the worker
    naive_seconds: float = 60
    rates: tuple[int, ...] = (200, 1_000)  # transactions per second, open loop
    open_loop_seconds: float = 30  # at each rate, after the worker has warmed up
    customers: int = 5_000  # of the traffic
    training_customers: int = 1_000  # of the model's own town, 90 days
    state_customers: int = 100_000


QUICK = Sizes(5_000, 5, (200, 1_000), 5, 1_000, 300, 10_000)
RECIPE = Recipe(rounds=120, learning_rate=0.1)  # as `fraud retrain --quick`


class Bench(NamedTuple):
    """Where it happens."""

    home: Path
    found: Addresses
    model: Path
    sizes: Sizes

    @property
    def environment(self) -> dict[str, str]:
        """For the processes; nothing of the caller's settings gets in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
        return kept | {"FRAUD_HOME": str(self.home)}


def train(customers: int, recipe: Recipe, path: Path) -> None:
    """A model of a town, with an alert budget; without test and gate."""
    past = simulated_past(World(customers=customers, days=90, seed=TRAINING_SEED))
    history = fold_history(purchases_of(past))
    times, horizon_ms = history.events["event_time"], 14 * DAY_MS
    now_ms = int(times.max())
    split = final_split(times, now_ms, horizon_ms, calibration_days=14, warmup_days=14)
    learned, later = split.train, split.calibration
    fitted = fit(
        recipe, FEATURE_NAMES,
        history.vectors[learned], targets(history, learned, now_ms), None,
        history.vectors[later], targets(history, later, now_ms),
    )  # fmt: skip
    _, probabilities = score(fitted, history.vectors[later])
    policy = alert_policy(probabilities, history.events["amount"][later], ALERT_SHARE, Policy())
    window = TrainingWindow(split.train_start_ms, split.mature_ms)
    path.write_bytes(bundle_of(fitted, history.vectors[later[:16]], policy, window, horizon_ms, __version__, {}))


def first_purchases(messages: Iterable[Message], count: int) -> Iterator[Message]:
    """So many purchases, and the labels between them."""
    for message in messages:
        if message.topic == TRANSACTIONS:
            if count == 0:
                return
            count -= 1
        yield message


def preload(bench: Bench, count: int, topic: str) -> None:
    """Put the town's first purchases on a topic."""
    world = shop_town(bench.sizes.customers, TRAFFIC_SEED)
    messages = first_purchases(going_on(world, None, lambda unsent: None), count)
    if topic != TRANSACTIONS:
        messages = (message for message in messages if message.topic == TRANSACTIONS)

    def report(sent: Sent) -> None:
        say_over(f"preload: {sent.transactions:,} of {count:,}")

    with closing(KafkaFeed(bench.found.kafka, remembered_partition(murmur2_partitions, PARTITIONS))) as feed:

        def send(record: Outgoing) -> None:
            feed.send(record._replace(topic=topic) if record.topic == TRANSACTIONS else record)

        produce(messages, send, time.monotonic, time.sleep, time.time_ns, None, None, lambda: False, report)
        feed.flush()


def last_json(bench: Bench, module: str, *words: str) -> dict[str, Any]:
    """Run one of our modules as a process; the JSON object of its last line."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *words]
    # Threads that wait for their share of one row should not burn the core that the servers need meanwhile.
    environment = bench.environment | {"OMP_WAIT_POLICY": "passive"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if finished.returncode:
        raise BenchFailed(f"{module}: ended with {finished.returncode}; its words are above")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def measure_naive(bench: Bench) -> dict[str, Any]:
    """Transactions per second, one record at a time."""
    count = min(bench.sizes.transactions, int(NAIVE_CEILING * bench.sizes.naive_seconds))
    with closing(KafkaAdminClient(bootstrap_servers=bench.found.kafka)) as admin:
        admin.create_topics(
            {name: {"num_partitions": PARTITIONS, "replication_factor": 1} for name in (TOPIC, ANSWERS)}
        )
    preload(bench, count, TOPIC)
    with closing(psycopg2.connect(bench.found.postgres)) as database, database.cursor() as cursor:
        cursor.execute(TABLE)
        database.commit()
        measured = last_json(bench, "naive", str(bench.model), str(bench.sizes.naive_seconds))
        cursor.execute("SELECT count(*) FROM naive_decisions")
        (logged,) = cursor.fetchone()
    if logged != measured["decided"] or logged < 2:
        raise BenchFailed(f"naive: {measured['decided']} decided, {logged} of them in its table")
    return {
        "naive_transactions": logged,
        "naive_tx_per_s": (logged - 1) / measured["seconds"],  # from the first commit to the last
    }


def require_counted(bench: Bench, before: int, stopped: Mapping[str, Any], expected: int) -> None:
    """Raises BenchFailed unless the log has what the worker counts, and all of it."""
    logged = LogOverview(bench.found.postgres).tally().decisions - before
    if not logged == stopped["decided"] == expected:
        raise BenchFailed(f"stream: {expected} sent, {stopped['decided']} decided, {logged} in the log")


class Moment(NamedTuple):
    """How far the worker was."""

    at_s: float
    decided: int
    cpu_s: float


@contextmanager
def stream(bench: Bench, *words: str) -> Iterator[Running]:
    """`fraud stream` at work, ended at the latest when the block ends."""
    command = fraud_command("stream", "--model", str(bench.model), *words)
    worker = start(command, bench.environment, bench.home / "bench.log")
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.stop(10)


def require_moving(worker: Running, due_s: float, doing: str) -> None:
    """Raises BenchFailed when the worker has failed, or something is long overdue."""
    if worker.process.poll() or time.monotonic() - due_s > STUCK_S:
        raise BenchFailed(f"stream, {doing}: ended or stuck; its last words: {worker.last_words or 'none'}")


def last_status(worker: Running) -> dict[str, Any]:
    """What the worker said when it stopped."""
    if worker.listener is not None:
        worker.listener.join(10)
    if worker.process.returncode or "stopped" not in worker.said:
        raise BenchFailed(f"stream: ended with {worker.process.returncode}: {worker.last_words or 'no words'}")
    return worker.said["stopped"]


def wait_ready(worker: Running) -> None:
    """Until it has claimed its partitions."""
    due_s = time.monotonic()
    while "ready" not in worker.said:
        require_moving(worker, due_s, "getting ready")
        time.sleep(0.05)


def wait_drained(bench: Bench, worker: Running) -> None:
    """Until everything that was sent is decided."""
    due_s, reader = time.monotonic(), LogReader(bench.found.postgres)
    while reader.progress() != topic_ends(bench.found.kafka, TRANSACTIONS):
        require_moving(worker, due_s, "deciding the rest")
        time.sleep(0.2)


@contextmanager
def sending(bench: Bench, rate: float) -> Iterator[Running]:
    """`fraud simulate` at a rate that does not bend, while the block runs."""
    town = ("--customers", str(bench.sizes.customers), "--seed", str(TRAFFIC_SEED))
    command = fraud_command("simulate", "--rate", str(rate), *town)
    sender = start(command, bench.environment, bench.home / "bench.log")
    try:
        yield sender
    finally:
        sender.stop(10)


def told_by(sender: Running) -> tuple[int, float]:  # transactions sent, and the worst delay of one, in seconds
    """What the sender says when it has stopped."""
    told = re.search(r"sent ([\d,]+) transactions .* at most ([\d.]+) s late", sender.last_words)
    if told is None:
        raise BenchFailed(f"simulate: {sender.last_words or 'no words'}")
    return int(told[1].replace(",", "")), float(told[2])


def require_verified(bench: Bench, share: float) -> str:
    """What `fraud verify` says of everything so far; raises BenchFailed with the first difference."""
    command = fraud_command("verify", "--model", str(bench.model), "--sample", str(share))
    finished = subprocess.run(command, env=bench.environment, stderr=subprocess.PIPE, text=True)
    told = [line for line in finished.stderr.splitlines() if line.startswith("verify: ")] or [finished.stderr[-200:]]
    if finished.returncode:
        raise BenchFailed(told[0])
    return told[0].removeprefix("verify: ")


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def stages_of(port: int) -> dict[str, float]:
    """Seconds spent by stage, as the worker tells Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
        told = re.findall(r'^fraud_stage_seconds_total\{stage="(\w+)"\} (\S+)$', answer.read().decode(), re.MULTILINE)
    return {stage: float(seconds) for stage, seconds in told}


def measure_drain(bench: Bench) -> dict[str, Any]:
    """Transactions per second, and what each costs, with everything on and the topic full."""
    count, reader = bench.sizes.transactions, LogReader(bench.found.postgres)
    preload(bench, count, TRANSACTIONS)
    seen, peak = [Moment(time.monotonic(), 0, 0.0)], 0
    spent: dict[str, float] = {}
    port = free_port()
    with stream(bench, "--until-idle", "3", "--metrics-port", str(port)) as worker:
        process = psutil.Process(worker.process.pid)
        while worker.process.poll() is None:
            decided = sum(reader.progress().values())
            with suppress(psutil.Error):  # it may end at any moment
                cpu, peak = process.cpu_times(), max(peak, process.memory_info().rss)
                if decided != seen[-1].decided:
                    seen.append(Moment(time.monotonic(), decided, cpu.user + cpu.system))
                    say_over(f"drain: {decided:,} of {count:,}")
            if decided == count:
                with suppress(OSError):
                    spent = stages_of(port)
            require_moving(worker, seen[-1].at_s, "draining")
            time.sleep(0.02)
    stopped = last_status(worker)
    require_counted(bench, 0, stopped, count)
    if len(seen) < 3:
        raise BenchFailed("transactions: too few to be timed; take more")
    first, last = seen[1], seen[-1]  # the first commit has start-up and compilation before it
    return {
        "transactions": count,
        "tx_per_s": (last.decided - first.decided) / (last.at_s - first.at_s),
        "alert_share": 1 - stopped["outcomes"]["approve"] / count,
        "cpu_us": 1e6 * (last.cpu_s - first.cpu_s) / (last.decided - first.decided),
        "stage_us": {stage: 1e6 * seconds / count for stage, seconds in spent.items()},
        "worker_rss_mib": peak / MIB,
    }


def warm_window(
    worker: Running,
    seconds: float,  # between two statuses
    enough: float,  # decisions until the worker is warm
) -> dict[str, Any]:
    """The first status that tells only of a worker that is warm."""
    due_s, warm_at = time.monotonic() + 4 * seconds, None
    while True:
        require_moving(worker, due_s, "open loop")
        status = worker.said.get("status", {"decided": 0})
        if warm_at is None and status["decided"] >= enough:
            warm_at = status["time"]
        elif warm_at is not None and status["time"] != warm_at:
            return status
        time.sleep(0.05)


def measure_latency(bench: Bench, rate: int) -> dict[str, Any]:
    """Decision latency at a rate that does not bend: from the sender's clock to the commit."""
    seconds, log = bench.sizes.open_loop_seconds, LogOverview(bench.found.postgres)
    before = log.tally().decisions
    with stream(bench, "--status-every", str(seconds)) as worker:
        wait_ready(worker)
        with sending(bench, rate) as sender:
            window = warm_window(worker, seconds, rate * seconds / 2)
        wait_drained(bench, worker)
        worker.stop(10)
    sent, late_s = told_by(sender)
    require_counted(bench, before, last_status(worker), sent)
    return {
        f"p50_ms_at_{rate}": window["p50_ms"],
        f"p99_ms_at_{rate}": window["p99_ms"],
        f"tx_per_s_at_{rate}": window["tx_per_s"],
        f"late_ms_at_{rate}": 1e3 * late_s,
    }


def measure_state(bench: Bench) -> dict[str, Any]:
    """Memory of the profiles of many customers."""
    measured = last_json(bench, "state", str(bench.sizes.state_customers))
    return {
        "state_customers": bench.sizes.state_customers,
        "state_rss_mib": measured["after_mib"],
        "state_added_mib": measured["after_mib"] - measured["before_mib"],
    }


def measure(bench: Bench) -> dict[str, Any]:
    """Everything, one after the other; raises BenchFailed, and what servers raise."""
    sizes = bench.sizes
    create_topics(bench.found.kafka, PARTITIONS)
    migrate(bench.found.postgres, PARTITIONS)
    say(f"[3/6] one record at a time, {sizes.naive_seconds:g} s")
    result: dict[str, Any] = {"rates": list(sizes.rates), **measure_naive(bench)}
    say(f"[4/6] the worker, draining {sizes.transactions:,} transactions")
    result |= measure_drain(bench)
    for rate in sizes.rates:
        say(f"[5/6] the worker at {rate:,} transactions per second, twice {sizes.open_loop_seconds:g} s")
        result |= measure_latency(bench, rate)
    say(f"[6/6] memory of {sizes.state_customers:,} customers")
    result |= measure_state(bench)
    result["ratio"] = result["tx_per_s"] / result["naive_tx_per_s"]
    result["worker_full_rss_mib"] = result["worker_rss_mib"] + result["state_added_mib"]
    return result


def verdict(
    result: Mapping[str, Any],
    name: str,
    at_least: Mapping[str, float] = AT_LEAST,
    at_most: Mapping[str, float] = AT_MOST,
) -> str:
    """The goal, and whether it was met; nothing where there is none."""
    if name not in {**at_least, **at_most}:
        return ""
    met = result[name] >= at_least[name] if name in at_least else result[name] <= at_most[name]
    goal = f"at least {at_least[name]:,}" if name in at_least else f"at most {at_most[name]:,}"
    return f"{'met' if met else 'MISSED'}: {goal}"


def aligned(rows: Iterable[tuple[str, str, str]]) -> str:
    """What, how much, and whether that is enough."""
    return "\n".join(f"{what:36}{figure:>16}   {judged}".rstrip() for what, figure, judged in rows)


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    speed, memory, time_ms, cost = "{:,.0f} tx/s", "{:,.0f} MiB", "{:,.1f} ms", "{:.1f} us/tx"
    rows = [
        ("one record at a time", "naive_tx_per_s", speed),
        ("the worker, draining", "tx_per_s", speed),
        ("  times as fast", "ratio", "{:.1f}"),
        ("  alerts, explained", "alert_share", "{:.2%}"),
        ("  CPU of the worker", "cpu_us", cost),
        *((f"    {stage}, by the clock", stage, cost) for stage in result["stage_us"]),
    ]
    for rate in result["rates"]:
        rows += [
            (f"the worker at {rate:,} tx/s; measured", f"tx_per_s_at_{rate}", speed),
            ("  from sender to commit, p50", f"p50_ms_at_{rate}", time_ms),
            ("  p99", f"p99_ms_at_{rate}", time_ms),
            ("  worst delay of the sender", f"late_ms_at_{rate}", time_ms),
        ]
    rows += [
        ("memory of the worker, draining", "worker_rss_mib", memory),
        (f"  {result['state_customers']:,} customers add", "state_added_mib", memory),
        ("  both", "worker_full_rss_mib", memory),
    ]
    flat = {**result, **result["stage_us"]}
    return aligned((what, form.format(flat[name]), verdict(result, name)) for what, name, form in rows)


def rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    """Fit for reading."""
    return {
        name: rounded(value) if isinstance(value, dict) else round(value, 4) if isinstance(value, float) else value
        for name, value in result.items()
    }


def report(result: Mapping[str, Any]) -> str:
    """The table, and as its last line one JSON object."""
    return f"{table(result)}\n{json.dumps(rounded(result))}\n"


def sizes_of(words: Sequence[str]) -> Sizes:
    """What the command line asks for; exits with 2 on anything else."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; goals mean nothing")
    parser.add_argument("--transactions", type=int, metavar="N", help="preloaded for the worker (default: 200000)")
    parser.add_argument("--naive-seconds", type=float, metavar="S", help="one record at a time (default: 60)")
    parser.add_argument("--open-loop-seconds", type=float, metavar="S", help="at each rate (default: 30)")
    parser.add_argument("--customers", type=int, metavar="N", help="of the traffic (default: 5000)")
    asked = vars(parser.parse_args(words))
    sizes = QUICK if asked.pop("quick") else Sizes()
    wrong = [name for name, value in asked.items() if value is not None and not value > 0]
    if wrong:
        parser.error(f"--{wrong[0].replace('_', '-')}: above 0")
    return replace(sizes, **{name: value for name, value in asked.items() if value is not None})


def on_servers(
    name: str,  # of the tool
    steps: int,  # that it tells, these two among them
    sizes: Sizes,
    measure: Callable[[Bench], dict[str, Any]],
) -> dict[str, Any] | None:  # None: a part failed, and it was said which
    """Measure on servers of our own, with a model; all of it is gone afterwards."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are stopped then, too
    try:
        say(f"[1/{steps}] servers: Kafka, Valkey, PostgreSQL")
        with contextmanager(running_servers)() as running:
            bench = Bench(running.home, running.addresses, running.home / "model.bundle", sizes)
            say(f"[2/{steps}] model")
            train(sizes.training_customers, RECIPE, bench.model)
            return measure(bench)
    except (BenchFailed, ServerError, Unavailable, OSError) as error:
        say(f"{name}: {error}")
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
    return None


def main(words: Sequence[str] | None = None) -> int:
    """0: measured, whatever the goals say; 1: a part failed; 2: wrong usage."""
    sizes = sizes_of(sys.argv[1:] if words is None else words)
    result = on_servers("bench", 6, sizes, measure)
    if result is None:
        return 1
    sys.stdout.write(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
