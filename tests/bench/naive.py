"""The pipeline of the tutorials, one record at a time: what the worker is measured beside.

It is kept fair: the same model with the same number of columns, a primary key and one commit per record, records from
the client's batches, no flush. And it is spared work: no features of places, habits and sprees, no reasons, no fencing.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg2
import redis
from kafka import KafkaConsumer, KafkaProducer
from xgboost import XGBClassifier

from fraud_nb.adapters.servers import addresses_of
from fraud_nb.apps.parts import say, say_over
from fraud_nb.decision.bundle import unpack
from fraud_nb.domain.config import Settings
from fraud_nb.features.catalogue import EXTREME_WINDOWS, FEATURE_NAMES, MEAN_WINDOWS, VARIETY_WINDOWS, WINDOWS
from fraud_nb.features.windows import DAY_MS, HORIZON_MS

TOPIC, ANSWERS = "naive-transactions", "naive-predictions"
TABLE = """
    CREATE TABLE IF NOT EXISTS naive_decisions (
        transaction_id text PRIMARY KEY, customer_id text, event_time bigint, amount numeric, currency text,
        merchant_id text, device_id text, category text, features jsonb, probability double precision, outcome text)
"""
INSERT = "INSERT INTO naive_decisions VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
IDLE_MS = 3_000  # the topic is read to its end


def features_of(
    purchase: dict[str, Any],  # as it came
    history: list[dict[str, Any]],  # the customer's earlier purchases, oldest first
) -> dict[str, float]:
    """One row for the model; what a tutorial would not compute is 0."""
    now_ms, amount = purchase["event_time"], round(100 * purchase["amount"])
    moment = datetime.fromtimestamp(now_ms / 1e3, UTC)
    row = defaultdict(float, amount=amount, hour=moment.hour, weekday=moment.weekday(), is_night=moment.hour < 6)
    for label, length_ms in WINDOWS:
        amounts = [each["amount"] for each in history if each["event_time"] > now_ms - length_ms]
        row[f"customer_count_{label}"], row[f"customer_sum_{label}"] = len(amounts), 100 * sum(amounts)
    for label, length_ms in MEAN_WINDOWS:
        amounts = [each["amount"] for each in history if each["event_time"] > now_ms - length_ms] + [purchase["amount"]]
        row[f"customer_mean_{label}"] = 100 * sum(amounts) / len(amounts)
    for label, length_ms in EXTREME_WINDOWS:
        amounts = [each["amount"] for each in history if each["event_time"] > now_ms - length_ms]
        row[f"customer_max_{label}"] = 100 * max(amounts, default=0)
    for label, length_ms in VARIETY_WINDOWS:
        recent = [each for each in history if each["event_time"] > now_ms - length_ms]
        row[f"customer_merchants_{label}"] = len({each["merchant_id"] for each in recent if "merchant_id" in each})
        row[f"customer_devices_{label}"] = len({each["device_id"] for each in recent if "device_id" in each})
    if history:
        row["seconds_since_last"] = (now_ms - history[-1]["event_time"]) / 1e3
        row["history_days"] = (now_ms - history[0]["event_time"]) / DAY_MS
    row["history_count"] = len(history)
    return {name: float(row[name]) for name in FEATURE_NAMES}


def history_of(
    store: Any,  # a Redis client
    message: str,
    purchase: dict[str, Any],
) -> list[dict[str, Any]]:
    """The customer's earlier purchases; this one is put behind them. Four round trips."""
    key, now_ms = f"naive:{purchase['customer_id']}", purchase["event_time"]
    earlier = store.zrangebyscore(key, now_ms - HORIZON_MS, now_ms)
    store.zadd(key, {message: now_ms})
    store.zremrangebyscore(key, "-inf", now_ms - HORIZON_MS)
    store.expire(key, HORIZON_MS // 1_000)
    return [json.loads(each) for each in earlier]


def classifier_of(model: Path) -> XGBClassifier:
    """The bundle's trees as scikit-learn knows them."""
    classifier = XGBClassifier()
    classifier.load_model(bytearray(unpack(model.read_bytes(), None).booster.save_raw(raw_format="json")))
    return classifier


def run(settings: Settings, model: Path, seconds: float) -> dict[str, float]:
    """Decide until the time is up or the topic is at its end; timed from the first commit to the last."""
    found = addresses_of(settings, say)
    classifier, store = classifier_of(model), redis.Redis.from_url(found.redis)
    consumer = KafkaConsumer(
        TOPIC, bootstrap_servers=found.kafka, group_id="naive", auto_offset_reset="earliest",
        consumer_timeout_ms=IDLE_MS,
    )  # fmt: skip
    producer = KafkaProducer(bootstrap_servers=found.kafka)
    database = psycopg2.connect(found.postgres)
    cursor = database.cursor()
    decided, begun_s, ended_s = 0, math.inf, math.inf
    for record in consumer:
        message = record.value.decode()
        purchase = json.loads(message)
        row = features_of(purchase, history_of(store, message, purchase))
        probability = float(classifier.predict_proba(pd.DataFrame([row]))[0, 1])
        outcome = "review" if probability > 0.5 else "approve"
        told = ("merchant_id", "device_id", "category")
        known = [purchase[name] for name in ("transaction_id", "customer_id", "event_time", "amount", "currency")]
        known += [purchase.get(name) for name in told]
        cursor.execute(INSERT, (*known, json.dumps(row), probability, outcome))
        database.commit()
        answer = {"transaction_id": purchase["transaction_id"], "probability": probability, "outcome": outcome}
        producer.send(ANSWERS, json.dumps(answer).encode(), record.key)
        decided, ended_s = decided + 1, time.monotonic()
        begun_s = min(begun_s, ended_s)
        if decided % 100 == 0:
            say_over(f"one record at a time: {decided:,} decided")
        if ended_s - begun_s >= seconds:
            break
    producer.flush()
    consumer.close()
    return {"decided": decided, "seconds": ended_s - begun_s}


def main() -> int:
    """For a process of its own; the last line is one JSON object."""
    arguments = argparse.ArgumentParser(description="One record at a time.")
    arguments.add_argument("model", type=Path)
    arguments.add_argument("seconds", type=float)
    asked = arguments.parse_args()
    sys.stdout.write(json.dumps(run(Settings.from_env(os.environ), asked.model, asked.seconds)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
