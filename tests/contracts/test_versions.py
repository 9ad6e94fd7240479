"""Shared versions on a real PostgreSQL: what is within each, and tiles that do not depend on which were made."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from fraud_nb.adapters.memory import MemoryStateStore
from fraud_nb.adapters.ports import SHARED, Fenced
from fraud_nb.adapters.postgres import (
    _CLOSE,
    _LABELS_BETWEEN,
    Batch,
    Claim,
    HistoryLoader,
    Judgement,
    LabelBatch,
    LabelLog,
    Logged,
    PostgresLog,
    SharedRow,
    SharedVersion,
    VersionLog,
    bounds_of,
    migrate,
    nothing_yet,
)
from fraud_nb.domain.schema import Label, Outcome, Transaction
from fraud_nb.features.tiles import FRAUDS_60D, READINGS, UNKNOWN
from fraud_nb.features.windows import DAY_MS, HOUR_MS
from fraud_nb.pipeline.sharing import Sharing, build, building, close_version, told_now
from tests.conftest import own_database
from tests.e2e.stream_kit import NOON
from tests.parity.oracle import is_claimed, readings

PARTITIONS = 2


class Shop:
    """A log of two partitions that fills by hand, and the double of Redis."""

    def __init__(self, dsn: str) -> None:
        self.log, self.labels, self.versions = PostgresLog(dsn), LabelLog(dsn), VersionLog(dsn)
        self.sharing = Sharing(self.versions, MemoryStateStore(), PARTITIONS)
        self.claims = self.log.claim(range(PARTITIONS))
        self.dsn, self.sold = dsn, 0

    def sell(self, partition: int, time: int, merchant: str | None = "gold", amount: int = 500) -> str:
        """One row of the log; its id."""
        ident, claim = f"t{self.sold}", self.claims[partition]
        self.sold += 1
        purchase = Transaction(ident, "ada", time, amount, "EUR", merchant)
        row = judged(Logged(partition, claim.next_offset, purchase, amount, b"", time, None))
        self.log.commit(Batch([row], [], [], {partition: (claim, claim.next_offset + 1)}))
        self.claims[partition] = Claim(claim.epoch, claim.next_offset + 1)
        return ident

    def tell(self, *labels: Label) -> None:
        """Labels, in the order they come in."""
        claim = self.labels.claim()
        numbered = [(label, claim.next_offset + number) for number, label in enumerate(labels)]
        self.labels.commit(LabelBatch(numbered, [], claim, claim.next_offset + len(labels)))

    def close(self) -> int:
        """A version, if anything has moved."""
        return close_version(self.sharing, self.claims[0].epoch)

    def tiles(self) -> dict[tuple[int, str], bytes]:
        """All of them, as the store holds them."""
        store = self.sharing.store
        assert isinstance(store, MemoryStateStore)
        return dict(store.profiles)

    def rebuilt(self, version: SharedVersion) -> dict[tuple[int, str], bytes]:
        """The same version, from the log alone."""
        again = replace(self.sharing, store=MemoryStateStore())
        build(again, version, epoch=7)
        assert again.store.watermark(SHARED) == version.version
        assert isinstance(again.store, MemoryStateStore)
        return dict(again.store.profiles)

    def check(self) -> None:
        """The tiles are those of the newest version, made from the log alone."""
        newest = self.versions.newest()
        assert newest is not None and self.tiles() == self.rebuilt(newest)


def judged(row: Logged) -> Logged:
    """The row with some judgement; which one plays no part here."""
    return row._replace(judgement=Judgement("set", b"", 0.0, Outcome.APPROVE, (), 1, 1, 0, b""))


@pytest.fixture
def dsn(servers: Any) -> Iterator[str]:
    with own_database(servers.postgres, "versions_test") as own:
        migrate(own, PARTITIONS)
        yield own


@pytest.fixture
def shop(dsn: str) -> Shop:
    return Shop(dsn)


def frauds_of(shop: Shop, time: int) -> int:
    """Known frauds of sixty days at the shop, as a purchase is told."""
    _, found = told_now(shop.sharing.store, [Transaction("q", "cy", time, 1, "EUR", "gold")])
    return int(found[0, FRAUDS_60D])


def test_nothing_to_look_at_is_no_version(shop: Shop) -> None:
    assert shop.close() == 0 and shop.versions.newest() is None
    shop.tell(Label("t-unknown", True, NOON))
    assert shop.close() == 0, "history may still be put under an empty log"


def test_versions_count_up_and_only_when_something_moves(shop: Shop) -> None:
    shop.sell(0, NOON)
    assert [shop.close(), shop.close()] == [1, 1]
    shop.sell(1, NOON - DAY_MS)
    assert shop.close() == 2
    assert shop.versions.newest() == SharedVersion(2, (1, 1), 0, NOON), "the clock never goes back"
    assert shop.versions.at(1) == SharedVersion(1, (1, 0), 0, NOON)
    assert shop.versions.at(3) is None
    assert shop.log.shared_versions() == [shop.versions.at(1), shop.versions.at(2)]


def test_two_who_close_the_same_version(shop: Shop, dsn: str) -> None:
    shop.sell(0, NOON)
    last = nothing_yet(PARTITIONS)
    assert shop.versions.close_next(last) is not None
    with pytest.raises(Fenced, match="version 1"):
        VersionLog(dsn).close_next(last)


def test_rows_between_are_those_of_all_partitions_page_by_page(shop: Shop) -> None:
    for number in range(5):
        shop.sell(number % 2, NOON + number, merchant=f"m{number}")
    shop.close()
    older = shop.versions.at(1)
    for number in range(5, 12):
        shop.sell(number % 2, NOON + number, merchant=f"m{number}")
    shop.close()
    newer = shop.versions.at(2)
    assert older is not None and newer is not None
    pages = list(shop.versions.rows_between(older, newer, page=2))
    assert max(len(page) for page in pages) == 2
    found = {row.merchant_id for page in pages for row in page}
    assert found == {f"m{number}" for number in range(5, 12)}
    everything = [row for page in shop.versions.rows_between(nothing_yet(PARTITIONS), newer, 100) for row in page]
    assert len(everything) == 12 and SharedRow("m0", None, NOON, 500) in everything


def test_history_is_within_the_first_version(shop: Shop, dsn: str) -> None:
    rows = [
        (
            Logged(
                0,
                number - 3,
                Transaction(f"h{number}", "ada", NOON + number, 100, "EUR", "gold"),
                100,
                b"",
                0,
                None,
                "backfill",
            ),
            [],
        )
        for number in range(3)
    ]
    HistoryLoader(dsn).load(rows)
    assert shop.close() == 1
    _, found = told_now(shop.sharing.store, [Transaction("q", "cy", NOON + 9, 1, "EUR", "gold")])
    assert found[0, :5].tolist() == [3, 3, 3, 3, 300]


def test_a_label_counts_when_the_log_has_reached_its_time(shop: Shop) -> None:
    ident = shop.sell(0, NOON)
    shop.tell(Label(ident, True, NOON + DAY_MS))
    shop.close()
    assert frauds_of(shop, NOON + HOUR_MS) == 0, "it is in the log, but nobody knows it yet"
    shop.sell(1, NOON + DAY_MS - 1, merchant=None)
    shop.close()
    assert frauds_of(shop, NOON + DAY_MS - 1) == 0
    shop.sell(1, NOON + DAY_MS, merchant=None)
    shop.close()
    assert frauds_of(shop, NOON + DAY_MS) == 1


def test_a_label_may_come_before_its_purchase(shop: Shop) -> None:
    shop.sell(0, NOON)
    shop.tell(Label("t1", True, NOON))
    assert shop.close() == 1 and frauds_of(shop, NOON) == 0
    assert shop.sell(1, NOON + 1) == "t1"
    assert shop.close() == 2 and frauds_of(shop, NOON) == 1


def test_a_fraud_counts_once_and_a_correction_takes_it_back(shop: Shop) -> None:
    ident = shop.sell(0, NOON)
    shop.close()
    found = []
    for label in (
        Label(ident, True, NOON, "analyst"),
        Label(ident, True, NOON, "chargeback"),
        Label(ident, False, NOON, "analyst"),
        Label(ident, True, NOON - 1, "customer"),  # came late, but is older than the correction
        Label(ident, True, NOON, "chargeback"),
    ):
        shop.tell(label)
        shop.close()
        found.append(frauds_of(shop, NOON))
    assert found == [1, 1, 0, 0, 1]


def history_by_hand(shop: Shop) -> Iterator[None]:
    """Three months of two shops, with late purchases, claims, corrections, and a label without a purchase."""
    for day in range(90):
        time = NOON + day * DAY_MS
        first = shop.sell(day % 2, time, amount=100 * day)
        shop.sell((day + 1) % 2, time - (day % 7) * 9 * HOUR_MS, merchant="wine" if day % 3 else None)
        if day % 5 == 0:
            shop.tell(Label(first, True, time + (day % 20) * HOUR_MS), Label(f"unknown {day}", True, time))
        if day % 15 == 0:
            shop.tell(Label(first, False, time + 3 * DAY_MS, "analyst"))
        yield


def test_tiles_are_those_of_the_log_whichever_versions_were_made(shop: Shop) -> None:
    for day, _ in enumerate(history_by_hand(shop)):
        if day % 4 == 0 or day == 89:
            shop.close()
            if day % 12 == 0 or day == 89:
                shop.check()
    assert shop.sharing.store.watermark(SHARED) == 24


def test_versions_that_were_closed_while_redis_was_away_are_caught_up(shop: Shop) -> None:
    days = history_by_hand(shop)
    next(days)
    shop.close()
    before = dict(shop.tiles())
    for _ in days:
        version = shop.versions.close_next(shop.versions.newest() or nothing_yet(PARTITIONS))
    assert version is not None and version.version == 90
    assert shop.tiles() == before and shop.sharing.store.watermark(SHARED) == 1
    assert shop.close() == 90
    assert shop.tiles() == shop.rebuilt(version)


def test_tiles_that_are_being_built_are_read_by_nobody(shop: Shop) -> None:
    shop.sell(0, NOON)
    shop.close()
    store = shop.sharing.store
    asked = [Transaction("q", "cy", NOON, 1, "EUR", "gold")]
    assert told_now(store, asked)[0] == 1
    store.save({SHARED: (1, building(3, 0))}, {})
    version, found = told_now(store, asked)
    assert version == 0 and (found == UNKNOWN).all()


@pytest.mark.parametrize("left", [None, -5, 99])
def test_lost_or_foreign_tiles_are_built_anew(shop: Shop, left: int | None) -> None:
    for _ in history_by_hand(shop):
        pass
    store = shop.sharing.store
    if left is not None:
        store.save({SHARED: (None, left)}, {(SHARED, "m:gold"): b"\x01nonsense", (SHARED, "m:never"): b"\x01"})
    if left != 99:
        version, found = told_now(store, [Transaction("q", "cy", NOON, 1, "EUR", "gold")])
        assert version == 0 and (found == UNKNOWN).all(), "missing, never zero"
    assert shop.close() == 1
    shop.check()


def test_tiles_of_a_log_that_had_come_further_are_not_believed(shop: Shop) -> None:
    """PostgreSQL was set back by one version, and the next one gets its number."""
    shop.sell(0, NOON)
    assert shop.close() == 1
    shop.sharing.store.save({SHARED: (1, 2)}, {(SHARED, "m:gold"): b"\x01", (SHARED, "m:lost"): b"\x01"})
    shop.sell(1, NOON)
    assert shop.close() == 2
    shop.check()


def test_tiles_of_another_codec_are_missing_and_then_built_anew(shop: Shop) -> None:
    shop.sell(0, NOON)
    assert shop.close() == 1
    shop.sharing.store.save({SHARED: (1, 1)}, {(SHARED, "m:gold"): b"\x07 of another day"})
    version, found = told_now(shop.sharing.store, [Transaction("q", "cy", NOON, 1, "EUR", "gold")])
    assert version == 0 and (found == UNKNOWN).all()
    shop.sell(1, NOON)
    with pytest.raises(Fenced, match="other code"):
        shop.close()
    assert shop.close() == 2
    shop.check()


def test_a_builder_who_was_overtaken_is_fenced(shop: Shop) -> None:
    for _ in history_by_hand(shop):
        pass
    shop.close()
    newest = shop.versions.newest()
    assert newest is not None

    class Overtaken(MemoryStateStore):
        def save(self, watermarks: Any, profiles: Any) -> None:
            if watermarks[SHARED][0] == building(3, 0):
                self.watermarks[SHARED] = building(4, 0)  # another one has begun
            super().save(watermarks, profiles)

    class Exchanged(MemoryStateStore):
        def load(self, partition: int, owners: Any) -> Any:
            watermark, found = super().load(partition, owners)
            return building(4, 0) if watermark == building(3, 0) else watermark, found

    for store in (Overtaken(), Exchanged()):
        with pytest.raises(Fenced):
            build(replace(shop.sharing, store=store), newest, epoch=3)


def test_readings_equal_the_oracle(shop: Shop) -> None:
    for _ in history_by_hand(shop):
        pass
    shop.close()
    with psycopg2.connect(shop.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT transaction_id, event_time, merchant_id, amount_base FROM decisions")
        bought = cursor.fetchall()
    clock, claims = max(time for _, time, _, _ in bought), dict[str, list[tuple[int, bool]]]()
    for label in shop.log.labels():
        if label.label_time <= clock:
            claims.setdefault(label.transaction_id, []).append((label.label_time, label.is_fraud))
    now = NOON + 89 * DAY_MS
    _, found = told_now(
        shop.sharing.store, [Transaction("q", "cy", now, 1, "EUR", name) for name in ("gold", "wine", "new")]
    )
    for name, told in zip(("gold", "wine", "new"), found, strict=True):
        seen = [
            (time, amount, is_claimed(claims.get(ident, []))) for ident, time, shop, amount in bought if shop == name
        ]
        assert told[: len(READINGS)].tolist() == readings(seen, now)


def test_a_look_reads_what_is_new_and_not_the_whole_log(shop: Shop) -> None:
    """The planner must find the rows by partition and offset: a scan of the log every second would eat the machine."""
    for partition in range(PARTITIONS):
        claim = shop.claims[partition]
        rows = [
            judged(
                Logged(partition, number, Transaction(f"{partition}-{number}", "ada", NOON, 1, "EUR"), 1, b"", 0, None)
            )
            for number in range(10_000)
        ]
        shop.log.commit(Batch(rows, [], [], {partition: (claim, len(rows))}))
    with psycopg2.connect(shop.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("ANALYZE")
        older, newer = SharedVersion(1, (9_900, 9_900), 0, NOON), SharedVersion(2, (10_000, 10_000), 0, NOON)
        for query, values in (
            (_CLOSE, older._asdict() | {"version": 2, "progress": list(older.progress)}),
            (_LABELS_BETWEEN, bounds_of(older, newer)),
        ):
            cursor.execute("EXPLAIN " + query, values)
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert "decisions_partition_offset_key" in plan and "Seq Scan on decisions" not in plan, plan
