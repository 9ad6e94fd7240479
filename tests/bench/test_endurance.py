"""Soak and recovery in small: they count what the log has, and tell growth and outages as they are."""

import json
from contextlib import contextmanager

import numpy as np
import pytest

from fraud_nb.adapters.postgres import LogOverview
from tests.bench import recovery, soak
from tests.bench.bench import Bench, BenchFailed, Sizes
from tests.conftest import Running, private_servers, running_servers  # noqa: F401 (fixtures)
from tests.e2e.stream_kit import small_model

FEW = Sizes(transactions=2_000, rates=(100,), customers=100)


def bench_on(running: Running) -> Bench:
    """A small model on these servers."""
    return Bench(running.home, running.addresses, small_model(running.home / "model.bundle"), FEW)


def test_recovery_waits_for_the_successors(private_servers: Running) -> None:  # noqa: F811
    bench = bench_on(private_servers)
    result = recovery.measure(bench)
    assert result["in_log"] == LogOverview(bench.found.postgres).tally().decisions > FEW.transactions
    assert result["verified"].startswith(f"0 mismatches in {result['in_log']} decisions, ")
    # Their claims come before their decisions, so no outage is nothing; how long it was is not for a test to say.
    assert min(result["standby_s"], result["restart_s"], result["redis_s"]) > 0
    *rows, verified, last = recovery.report(result).splitlines()
    assert len(rows) == 4 and verified == result["verified"] and json.loads(last)["logged"] == FEW.transactions


def test_soak_decides_what_was_sent() -> None:
    with contextmanager(running_servers)() as running:
        bench = bench_on(running)
        result = soak.soaked(12)(bench)
        tally = LogOverview(bench.found.postgres).tally()
    assert (result["sent"], result["history"]) == (tally.decisions, tally.history)
    assert set(result["memory"]) == {"worker", "sender", "kafka", "valkey", "postgres"}
    assert all(told["mib"] > 0 for told in result["memory"].values())
    assert result["disk_mib_per_million"]["postgres"] > 0 and result["p50_ms"] <= result["worst_p99_ms"]
    *rows, verified, last = soak.report(result).splitlines()
    assert len(rows) == 7 + 5 + 3 + 2 and verified.startswith("0 mismatches in ")
    assert json.loads(last)["sent"] == result["sent"]


def test_growth_in_the_second_half_is_told_from_warming_up() -> None:
    def looked(at_s: float, mib: float, behind: int = 0) -> soak.Look:
        status = {"time": at_s, "p50_ms": 5.0, "p99_ms": 9.0}
        return soak.Look(at_s, {"worker": mib}, int(100 * at_s), behind, status)

    warming = [looked(at_s, 100 + min(at_s, 50), behind=900 if at_s < 50 else 50) for at_s in range(101)]
    flat = soak.told_of(warming, 100)
    assert flat["memory"]["worker"] == pytest.approx(
        {"mib": 150, "warming_mib": 50, "mib_per_h": 0, "error_mib_per_h": 0}, abs=1e-6
    )
    assert (flat["lag_s"], flat["kept_up"]) == (0.5, 1.0)
    leaking = soak.told_of([looked(at_s, 100 + at_s / 36) for at_s in range(101)], 100)
    assert leaking["worker_mib_per_h"] == pytest.approx(100)
    assert soak.verdict(leaking, "worker_mib_per_h", {}, soak.AT_MOST).startswith("MISSED")
    with pytest.raises(BenchFailed, match="no latencies"):
        soak.told_of([look._replace(status={}) for look in warming], 100)


def test_an_uncertain_slope_says_so() -> None:
    at_s = np.arange(0.0, 600, 5)
    noise = np.random.default_rng(1).normal(0, 2, len(at_s))
    growth, error = soak.slope(at_s, 500 + at_s / 36 + noise)
    assert abs(growth - 100) < 3 * error < 30


@pytest.mark.parametrize("words", [["--rate", "0"], ["--customers", "-1"], ["--quick"]])
@pytest.mark.parametrize("tool", [soak.main, recovery.main])
def test_wrong_usage_is_2(tool: object, words: list[str]) -> None:
    assert callable(tool)
    with pytest.raises(SystemExit) as ended:
        tool(words)
    assert ended.value.code == 2
