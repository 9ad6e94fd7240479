"""What the stream tests share: a small model, a hostile stream of records, and a worker as a process."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xgboost as xgb
from kafka import KafkaProducer

from fraud_nb.adapters.kafka_bus import DEAD_LETTERS, PREDICTIONS, TRANSACTIONS, murmur2_partitions
from fraud_nb.adapters.ports import Record
from fraud_nb.decision.bundle import TrainingWindow, pack
from fraud_nb.decision.policy import Policy, policy_to_dict
from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import Transaction, encode
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.features.fold import fold
from fraud_nb.features.profile import Profiles
from fraud_nb.features.windows import DAY_MS, MINUTE_MS, events_of
from fraud_nb.pipeline.verify import Bus

NOON = 1_672_574_400_000  # 2023-01-01: 20 minutes a purchase, and 60,000 of them, still lie in the past
CUSTOMERS = 40
MAIN = "import sys; from fraud_nb.apps.cli import main; sys.exit(main())"
SHOPS = ("books", "shoes", "wine\\bar", 'qu"ote', "tür")


def purchase(rng: random.Random, number: int, now: int, customers: int = CUSTOMERS) -> Transaction:
    """A purchase of one of the customers, sometimes late, sometimes without the optional fields."""
    late = rng.choice((0, 0, 0, 0, MINUTE_MS, DAY_MS, 40 * DAY_MS, 100 * DAY_MS))
    told = rng.random() < 0.8
    return Transaction(
        f"t{number:06d}",
        f"customer {rng.randrange(customers)}",
        now - late,
        rng.choice((0, 1, rng.randrange(100, 20_000), 10**9)),
        rng.choice(("EUR", "EUR", "EUR", "JPY")),  # no rate for JPY: the amount is missing
        merchant_id=rng.choice(SHOPS) if told else None,
        device_id=f"phone {rng.randrange(9)}" if told else None,
        category=rng.choice(("media", "fashion")) if told else None,
        latitude_e6=rng.randrange(40_000_000, 60_000_000) if told else None,
        longitude_e6=rng.randrange(-10_000_000, 20_000_000) if told else None,
    )


def bus_of(
    records: Sequence[Record],  # of all topics, each of them in order
) -> Bus:
    """Topics that are published to the end, for `verify`."""

    def on(topic: str) -> Callable[[int], list[Record]]:
        return lambda partition: [each for each in records if (each.topic, each.partition) == (topic, partition)]

    letters = [each for each in records if each.topic == DEAD_LETTERS]
    return Bus(dict.fromkeys(range(256), 1 << 62), on(TRANSACTIONS), on(PREDICTIONS), letters)


def small_model(path: Path, rounds: int = 20) -> Path:
    """A bundle trained on a few thousand random purchases with a rule behind the label."""
    rng = random.Random(7)
    purchases = [purchase(rng, number, NOON + number * MINUTE_MS) for number in range(4_000)]
    vectors = fold(Profiles(), [each.customer_id for each in purchases], events_of(purchases, Rates()))
    amounts = np.nan_to_num(vectors[:, FEATURE_NAMES.index("amount")])
    frauds = (amounts > 15_000).astype(np.float32)
    rows = xgb.DMatrix(vectors, frauds, feature_names=list(FEATURE_NAMES), nthread=1)
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 3, "base_score": 0.5, "nthread": 1}, rows, rounds)
    path.write_bytes(
        pack(
            booster,
            FEATURE_NAMES,
            vectors[:8],
            calibrator=((-8.0, 0.0005), (0.0, 0.2), (8.0, 0.9)),
            policy=policy_to_dict(Policy()),
            training=TrainingWindow(NOON, NOON + DAY_MS),
            label_horizon_ms=7 * DAY_MS,
            code_version="test",
        )
    )
    return path


def hostile_stream(
    rng: random.Random,
    first: int,  # number of the first purchase; chunks continue each other
    count: int,
) -> list[tuple[int, bytes, bytes | None]]:  # (partition of four, key, value)
    """Purchases in rough order of time with duplicates, conflicts, poison and strangers between them."""
    records: list[tuple[int, bytes, bytes | None]] = []
    for number in range(first, first + count):
        each = purchase(rng, number, NOON + number * 20 * MINUTE_MS)
        key, value = each.customer_id.encode(), encode(each)
        home = int(murmur2_partitions([key], 4)[0])
        records.append((home, key, value))
        kind = rng.random()
        if kind < 0.05:
            records.append((home, key, value))  # a duplicate
        elif kind < 0.08:
            records.append(
                (home, key, value.replace(b'"currency":"EUR"', b'"currency":"USD"'))
            )  # conflict or duplicate
        elif kind < 0.12:
            poison = rng.choice(
                (b"", b"{", b"[]", b"\xff\xfe", None, value.replace(b'"amount":', b'"amount":-1'), b"{}")
            )
            records.append((home, key, poison))
        elif kind < 0.14:
            stranger = value.replace(each.transaction_id.encode(), f"s{number:06d}".encode())
            records.append(((home + 1) % 4, key, stranger))  # in another customer's partition
    return records


def hostile_labels(
    rng: random.Random,
    purchases: int,  # so many there are by now
    count: int,
) -> list[tuple[int, bytes, bytes | None]]:
    """Claims and corrections, some of them twice, some about no purchase, some that are known only much later."""
    labels: list[tuple[int, bytes, bytes | None]] = []
    for _ in range(count):
        number = rng.randrange(int(1.1 * purchases))
        known = NOON + number * 20 * MINUTE_MS + rng.choice((0, MINUTE_MS, DAY_MS, 30 * DAY_MS))
        label = {"transaction_id": f"t{number:06d}", "is_fraud": rng.random() < 0.8, "label_time": known}
        labels += [(0, b"", json.dumps(label).encode())] * rng.choice((1, 1, 2))
    return labels


def produce(kafka: str, records: list[tuple[int, bytes, bytes | None]], topic: str = TRANSACTIONS) -> None:
    """Put the records on a topic, in order."""
    producer = KafkaProducer(bootstrap_servers=kafka, linger_ms=5)
    for partition, key, value in records:
        producer.send(topic, key=key, value=value, partition=partition)
    producer.flush()
    producer.close()


def fraud(
    environment: Mapping[str, str],  # FRAUD_ variables
    *words: str,
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line as a process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
