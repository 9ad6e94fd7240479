"""The seven invariants, from what the topics hold, and with nothing of the worker's: neither decoder nor fold."""

import json
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
from kafka.partitioner.default import murmur2

from fraud_nb.adapters.ports import Record
from fraud_nb.features.profile import Profiles
from tests.parity.oracle import (
    ABSENT,
    MINUTE,
    NO_AMOUNT,
    NO_PLACE,
    READINGS,
    RECORD,
    UNKNOWN,
    Oracle,
    Row,
    Seen,
    bits,
    is_claimed,
    readings,
    record,
)

Place = tuple[int, int]  # partition and offset


@dataclass
class Purchase:
    """A transaction at the place of its first record."""

    customer: str
    merchant: str | None
    device: str | None
    event: Row


@dataclass
class Truth:
    """What there must be, from the records of the topics `transactions` and `labels`."""

    purchases: dict[Place, Purchase] = field(default_factory=dict)
    ids: dict[str, Place] = field(default_factory=dict)
    dead: dict[Place, bytes | None] = field(default_factory=dict)
    repeats: set[Place] = field(default_factory=set)
    claims: list[tuple[str, int, bool] | None] = field(default_factory=list)  # by offset; None: no label
    _numbers: dict[str, int] = field(default_factory=dict)

    def learn_history(self, place: Place, value: bytes) -> None:
        """A purchase from before going live, which nobody decides."""
        said = transaction_in(value)
        assert said is not None and place[1] < 0
        self._accept(place, said)

    def learn(self, record: Record, partitions: int) -> None:
        """The next record of a partition; `partitions`: of its topic, one of which is its customer's."""
        place = record.partition, record.offset
        home = (murmur2(record.key or b"") & 0x7FFFFFFF) % partitions
        said = transaction_in(record.value)
        if said is None or record.partition != home or said["event_time"] > record.timestamp_ms + 5 * MINUTE:
            self.dead[place] = record.value
        elif said["transaction_id"] in self.ids:
            self.repeats.add(place)
        else:
            self._accept(place, said)

    def _accept(self, place: Place, said: Mapping[str, Any]) -> None:
        self.ids[said["transaction_id"]] = place
        merchant, device = said.get("merchant_id"), said.get("device_id")
        self.purchases[place] = Purchase(said["customer_id"], merchant, device, self._event(said))

    def _number(self, name: str | None) -> int:
        """Any number will do that no other name has: features compare names for being the same."""
        return ABSENT if name is None else self._numbers.setdefault(name, len(self._numbers) + 1)

    def _event(self, said: Mapping[str, Any]) -> Row:
        known = said.get("currency") == "EUR"
        minor = int((said["amount"] * 100).to_integral_value(ROUND_HALF_EVEN))
        place = [round(said[name] * 1_000_000) if name in said else NO_PLACE for name in ("latitude", "longitude")]
        return {
            "event_time": said["event_time"],
            "amount": minor if known else NO_AMOUNT,
            "merchant": self._number(said.get("merchant_id")),
            "device": self._number(said.get("device_id")),
            "category": self._number(said.get("category")),
            "latitude": place[0],
            "longitude": place[1],
        }


def transaction_in(value: bytes | None) -> Mapping[str, Any] | None:
    """What the kit's senders meant; None: it was meant as poison."""
    try:
        said = json.loads(value or b"", parse_float=Decimal, parse_int=Decimal)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not {"transaction_id", "amount"} <= said.keys() or said["amount"] < 0:
        return None
    return said | {"event_time": int(said["event_time"])}


def label_in(value: bytes | None) -> tuple[str, int, bool]:
    """Transaction, when it became known, and what."""
    said = json.loads(value or b"")
    return said["transaction_id"], said["label_time"], said["is_fraud"]


@dataclass
class Found:
    """What the system says: rows and stores, as they are."""

    decisions: Sequence[tuple[Any, ...]]  # id, partition, offset, features, outcome, shared version, shared
    feature_names: Sequence[str]
    dead_letters: Sequence[Place]
    repeats: Sequence[Place]
    progress: Mapping[int, int]
    versions: Mapping[int, tuple[Sequence[int], int, int]]  # progress, labels and clock of each shared version
    labels: int  # rows
    gaps: Sequence[tuple[int, int, int]]  # partition, from, to
    committed: Mapping[int, int]  # by the group
    ends: Mapping[int, int]  # of topic `transactions`
    predictions: Sequence[Record]
    letters: Sequence[Record]
    watermarks: Mapping[int, int | None]  # of Redis
    profiles: Mapping[tuple[int, str], bytes]  # of Redis, by partition and customer


def found_in_log(rows: Callable[[str], list[tuple[Any, ...]]]) -> dict[str, Any]:
    """The fields of Found that the log answers; `rows` asks it."""
    versions = rows("SELECT version, progress, label_seq, clock FROM shared_versions")
    return {
        "decisions": rows(
            'SELECT transaction_id, partition, "offset", features, outcome, shared_version, shared FROM decisions'
        ),
        "dead_letters": rows('SELECT partition, "offset" FROM dead_letters'),
        "repeats": rows('SELECT partition, "offset" FROM repeats'),
        "progress": dict(rows("SELECT partition, next_offset FROM progress")),
        "versions": {version: (ends, labels, clock) for version, ends, labels, clock in versions},
        "labels": rows("SELECT count(*) FROM labels")[0][0],
        "gaps": rows("SELECT partition, start, stop FROM gaps ORDER BY 1, 2"),
    }


def source_of(record: Record) -> str:
    """Where the record came from that this one is about."""
    return dict(record.headers)["source"].decode()


def check(
    truth: Truth,
    found: Found,
    gaps: Iterable[tuple[int, int, int]] = (),
    same_words: bool = True,  # readers of the topic were told what the log says now
    told: int = 60,  # decisions for which what shops and devices said is counted again
    seed: int = 0,  # which ones
) -> None:
    """All seven; raises AssertionError that names the first one that does not hold."""
    places = {(partition, offset): ident for ident, partition, offset, *_ in found.decisions}
    assert places == {place: ident for ident, place in truth.ids.items()}, differing(
        "1 ids", places, {place: ident for ident, place in truth.ids.items()}
    )
    assert sorted(found.repeats) == sorted(truth.repeats), "1 repeats"
    oracle = check_features(truth, found)
    check_topics(truth, found, same_words)
    check_state(truth, found, oracle)
    assert found.progress == found.ends, f"6 progress {found.progress}, the log ends at {found.ends}"
    assert found.committed == found.ends, f"6 published {found.committed}, the log ends at {found.ends}"
    assert found.labels == sum(claim is not None for claim in truth.claims), "6 labels"
    assert list(found.gaps) == list(gaps), f"7 gaps: {found.gaps}"
    check_told(truth, found, random.Random(seed), told)


def differing(what: str, found: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> str:
    """How two of them differ, in few words."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    return f"{what}: {len(missing)} missing {missing[:3]}, {len(extra)} too many {extra[:3]}, of {len(wanted)}"


def check_features(truth: Truth, found: Found) -> Oracle:
    """Invariant 2: every stored vector, column by column."""
    stored = {(row[1], row[2]): (bytes(row[3]), row[6]) for row in found.decisions if row[2] >= 0}
    oracle = Oracle()
    for place in sorted(truth.purchases):
        purchase = truth.purchases[place]
        if place[1] >= 0:
            vector, shared = stored[place]
            said = [int(each) for each in np.frombuffer(bytes(shared), "<i8")]
            expected = oracle.features(purchase.customer, purchase.event, said)
            values = struct.unpack(f"<{len(vector) // 4}f", vector)
            for name, value in zip(found.feature_names, values, strict=True):
                assert bits(value) == bits(expected[name]), f"2 features: {name} at {place}"
        oracle.accept(purchase.customer, purchase.event)
    return oracle


def check_topics(truth: Truth, found: Found, same_words: bool) -> None:
    """Invariants 3 and 4: each decision once and in order, each dead letter once and as it came."""
    outcomes = {(row[1], row[2]): row[4] for row in found.decisions if row[2] >= 0}
    wanted = [(f"{part}:{offset}", outcomes[part, offset]) for part, offset in sorted(outcomes)]
    published = sorted(found.predictions, key=lambda record: (record.partition, record.offset))
    told = [(source_of(each), json.loads(each.value or b"")["outcome"]) for each in published]
    assert [source for source, _ in told] == [source for source, _ in wanted], "3 topic"
    assert told == wanted or not same_words, "3 outcomes on the topic"
    assert sorted(found.dead_letters) == sorted(truth.dead), differing(
        "4 dead letters", dict.fromkeys(found.dead_letters), truth.dead
    )
    letters = [(source_of(each), each.value) for each in found.letters if not source_of(each).startswith("labels")]
    expected = [(f"{part}:{offset}", value) for (part, offset), value in truth.dead.items()]
    assert sorted(letters, key=str) == sorted(expected, key=str), "4 letters of the topic"


def check_state(truth: Truth, found: Found, oracle: Oracle) -> None:
    """Invariant 5: what Redis remembers of every customer, read with the product's codec."""
    assert found.watermarks == found.progress, f"5 watermarks {found.watermarks}, progress {found.progress}"
    homes = {purchase.customer: partition for (partition, _), purchase in truth.purchases.items()}
    assert found.profiles.keys() == {(home, customer) for customer, home in homes.items()}, "5 state: other customers"
    names: dict[int, int] = {}
    for (_, customer), content in found.profiles.items():
        profiles = Profiles()
        profiles.slots([customer])
        profiles.load([customer], [content])
        kept, wanted = profiles.rows(customer), oracle.state(customer)
        assert len(kept) == len(wanted), f"5 state: {customer} has {len(kept)} events, not {len(wanted)}"
        for row, event in zip(kept, wanted, strict=True):
            for name, value in event.items():
                if name in ("merchant", "device", "category"):  # hashes there, numbers here: the same name is the same
                    value = names.setdefault(value, int(row[name])) if value != ABSENT else ABSENT
                assert int(row[name]) == value, f"5 state: {name} of {customer}"


def check_told(truth: Truth, found: Found, rng: random.Random, sample: int) -> None:
    """And what shops and devices told a decision: recounted for some of them, from their version's rows and labels."""
    rows = [row for row in found.decisions if row[5]]
    for row in rng.sample(rows, min(sample, len(rows))):
        purchase = truth.purchases[row[1], row[2]]
        progress, labels, clock = found.versions[row[5]]
        told, time = [], purchase.event["event_time"]
        for owner, name in (("merchant", purchase.merchant), ("device", purchase.device)):
            seen = None if name is None else seen_by(truth, owner, name, progress, labels, clock)
            told += [UNKNOWN] * len(READINGS) if seen is None else readings(seen, time)
        shop = purchase.merchant
        of_shop = [] if shop is None else seen_by(truth, "merchant", shop, progress, labels, clock)
        told += [UNKNOWN] * len(RECORD) if shop is None else record(of_shop, time)
        assert [int(each) for each in np.frombuffer(bytes(row[6]), "<i8")] == told, f"2 told at {row[1:3]}"


def seen_by(
    truth: Truth,
    kind: str,
    name: str,
    progress: Sequence[int],
    labels: int,
    clock: int,
) -> list[Seen]:
    """What an owner had seen as of a version."""
    claimed: dict[str, list[tuple[int, bool]]] = {}
    for ident, known, is_fraud in [claim for claim in truth.claims if claim is not None][:labels]:
        if known <= clock:
            claimed.setdefault(ident, []).append((known, is_fraud))
    seen: list[Seen] = []
    for ident, (partition, offset) in truth.ids.items():
        each = truth.purchases[partition, offset]
        if getattr(each, kind) == name and offset < progress[partition]:
            event = each.event
            seen.append((event["event_time"], event["amount"], is_claimed(claimed.get(ident, []))))
    return seen
