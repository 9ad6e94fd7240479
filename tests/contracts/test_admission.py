"""Who is let in, what is a repeat, and what is said about it: no server is needed for that."""

import time

import msgspec

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.ports import Record
from fraud_nb.domain.schema import Label, Transaction, encode, payload_hash
from fraud_nb.pipeline.champion import Champion, Shelf
from fraud_nb.pipeline.intake import admit_labels
from fraud_nb.pipeline.stream import FUTURE_MS, admit, split_repeats
from tests.contracts.worker_kit import ADA, HOME, PARTITIONS, purchase

THEN = 1_700_000_000_000  # a broker's clock, long ago


def record(value: bytes, offset: int = 0, partition: int = HOME) -> Record:
    return Record("transactions", partition, offset, THEN, ADA, value)


def refusals(*records: Record) -> list[tuple[int, str, str]]:
    """Offset, field and reason."""
    _, refused = admit(records, "EUR", PARTITIONS, murmur2_partitions)
    return [(each.offset, error.field, error.reason) for each, error in refused]


def at(event_time: int) -> bytes:
    return encode(Transaction(f"at {event_time}", "ada", event_time, 100, "EUR"))


def test_the_future_begins_at_the_brokers_clock() -> None:
    """Whatever this machine's clock says, which has gone on since."""
    assert THEN + FUTURE_MS + 1 < time.time() * 1e3
    assert refusals(record(at(THEN + FUTURE_MS)), record(at(THEN + FUTURE_MS + 1), 1)) == [
        (1, "event_time", "in_the_future")
    ]
    times = (THEN + FUTURE_MS, THEN + FUTURE_MS + 1)
    labels = [record(msgspec.json.encode(Label("t", True, known)), place) for place, known in enumerate(times)]
    admitted, refused = admit_labels(labels)
    assert [offset for _, offset in admitted] == [0]
    assert [(each.offset, error.field, error.reason) for each, error in refused] == [(1, "label_time", "in_the_future")]


def test_who_is_in_a_strangers_partition_is_refused_in_its_place() -> None:
    away = (HOME + 1) % PARTITIONS
    records = [record(b"{", 0, away), record(at(THEN), 1, away), record(at(THEN - 1), 2), record(b"", 3, away)]
    admitted, _ = admit(records, "EUR", PARTITIONS, murmur2_partitions)
    assert [each.offset for each, _ in admitted] == [2]
    assert refusals(*records) == [
        (0, "message", "not_json"), (1, "customer_id", "wrong_partition"), (3, "message", "empty"),
    ]  # fmt: skip


def test_an_id_is_learned_once() -> None:
    one, other = purchase(1), purchase(1, "another shop")
    digest = payload_hash(one)

    def split(*transactions: Transaction, **known: tuple[bytes, bool]) -> tuple[list[int], list[tuple[int, bool]]]:
        """Offsets of those to learn; offsets of the repeats, and whether their payload is the same."""
        records = [(record(b"", offset), each) for offset, each in enumerate(transactions)]
        arrivals, repeats = split_repeats(records, known)
        return [each.record.offset for each in arrivals], [(each.offset, each.same_payload) for each in repeats]

    assert split(one, purchase(2), one, other) == ([0, 1], [(2, True), (3, False)]), "within a batch"
    assert split(one, other, t1=(digest, False)) == ([], [(0, True), (1, False)]), "decided before"
    assert split(other, one, one, t1=(digest, True)) == ([1], [(0, False), (2, True)]), "asked about over HTTP"


class Rubbish:
    """A ledger whose newest promotion names a model that cannot be opened."""

    def champion(self) -> object:
        return type("Promotion", (), {"promotion": 7, "model_version": 2})

    def bundle(self, version: int) -> tuple[bytes, str]:
        return b"rubbish", "0" * 64


def test_the_last_good_model_stays() -> None:
    said: list[str] = []
    champion = Champion(Shelf(Rubbish()), said.append)  # type: ignore[arg-type]
    working = type("Model", (), {"version": 1})()
    for second in range(0, 10, 2):
        assert champion.current(working, second) is working
    assert len(said) == 1 and "promotion 7 refused" in said[0]
