"""The benchmark in small: it counts what the log has, tells it in full, and its rival gets real features."""

import json
from collections import defaultdict
from contextlib import closing
from typing import Any

import numpy as np
import psycopg2
import pytest

from fraud_nb.adapters.kafka_bus import TRANSACTIONS, topic_ends
from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import encode
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.fold import fold
from fraud_nb.features.profile import Profiles
from fraud_nb.features.windows import events_of
from fraud_nb.learning.simulate import World, simulate, transactions
from fraud_nb.learning.train import Recipe
from tests.bench import state
from tests.bench.bench import Bench, BenchFailed, Sizes, main, measure, report, require_counted, train, verdict
from tests.bench.naive import features_of
from tests.conftest import Running, private_servers  # noqa: F401 (a fixture)

TINY = Sizes(
    transactions=5_000, naive_seconds=1, rates=(1_000,), open_loop_seconds=1, customers=300, state_customers=1_000
)  # fmt: skip
# Columns the rival leaves out.
SPARED = (
    "distance_", "speed_", "amount_to", "amount_in", "customer_outliers", "customer_spree", "spree_",
    "same_", "merchant_", "device_",
)  # fmt: skip


def test_counts_what_the_log_has(private_servers: Running) -> None:  # noqa: F811
    home, found = private_servers
    bench = Bench(home, found, home / "model.bundle", TINY)
    train(200, Recipe(rounds=20, learning_rate=0.3, threads=1), bench.model)
    result = measure(bench)
    with closing(psycopg2.connect(found.postgres)) as database, database.cursor() as cursor:
        cursor.execute("SELECT count(*), count(*) FILTER (WHERE outcome <> 'approve') FROM decisions")
        decided, alerts = cursor.fetchone()
        cursor.execute("SELECT count(*) FROM naive_decisions JOIN decisions USING (transaction_id)")
        (shared,) = cursor.fetchone()
    assert decided == sum(topic_ends(found.kafka, TRANSACTIONS).values()) > TINY.transactions, "and nothing is left"
    assert result["naive_transactions"] == shared, "both judge the same traffic"
    assert 0 < result["alert_share"] * TINY.transactions <= alerts
    assert result["ratio"] == pytest.approx(result["tx_per_s"] / result["naive_tx_per_s"])
    with pytest.raises(BenchFailed, match=f"{decided + 1} decided, {decided} in the log"):
        require_counted(bench, 0, {"decided": decided + 1}, decided + 1)

    *rows, last = report(result).splitlines()
    told = json.loads(last)
    wanted = ("tx_per_s", "naive_tx_per_s", "ratio", "p50_ms_at_1000", "p99_ms_at_1000", "tx_per_s_at_1000", "cpu_us")
    memory = ("worker_rss_mib", "state_rss_mib", "state_added_mib", "worker_full_rss_mib")
    assert [name for name in (*wanted, *memory) if not told[name] > 0] == []
    assert set(told["stage_us"]) == {"decode", "known", "recall", "share", "fold", "judge", "commit", "save", "publish"}
    assert sum(told["stage_us"].values()) > 0
    assert told["p50_ms_at_1000"] <= told["p99_ms_at_1000"]
    assert len(rows) == 5 + len(told["stage_us"]) + 4 + 3
    assert rows[1].startswith("the worker, draining ") and f" {result['tx_per_s']:,.0f} tx/s " in rows[1]


def test_its_rival_gets_real_features() -> None:
    purchases = [each for chunk in simulate(World(customers=30, days=40, seed=3)) for each in transactions(chunk)]
    streamed = fold(Profiles(), [each.customer_id for each in purchases], events_of(purchases, Rates()))
    histories: dict[str, list[Any]] = defaultdict(list)
    rows = []
    for each in purchases:
        message = json.loads(encode(each))
        rows.append(list(features_of(message, histories[each.customer_id]).values()))
        histories[each.customer_id].append(message)
    same = [place for place, name in enumerate(FEATURE_NAMES) if not name.startswith(SPARED)]
    assert np.allclose(np.nan_to_num(streamed[:, same]), np.array(rows)[:, same], rtol=1e-4)
    assert len(same) >= 27


def test_state_is_what_it_says() -> None:
    profiles = Profiles()
    state.fill(profiles, 70)
    assert [len(profiles.rows(f"c{number:07d}")) for number in (0, 69)] == [state.KEPT_EVENTS] * 2


def test_goals() -> None:
    result = {"tx_per_s": 8_000.0, "ratio": 49.9, "p99_ms_at_1000": 40.0, "worker_full_rss_mib": 1_025.0, "cpu_us": 1.0}
    assert [verdict(result, name)[:3] for name in result] == ["met", "MIS", "met", "MIS", ""]


@pytest.mark.parametrize("words", [["--transactions", "0"], ["--naive-seconds", "nan"], ["--fast"]])
def test_wrong_usage_is_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
