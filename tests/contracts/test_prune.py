"""`fraud prune` on a real PostgreSQL: two logs live the same 500 days, one is pruned, and both go on alike."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from itertools import count
from random import Random

import numpy as np
import psycopg2.extensions
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_nb.adapters import postgres as adapter
from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.memory import MemoryStateStore
from fraud_nb.adapters.ports import SHARED, Fenced, StoreUnavailable
from fraud_nb.adapters.postgres import (
    Batch,
    LabelBatch,
    LabelLog,
    Logged,
    LogPruner,
    PostgresLog,
    SharedVersion,
    VersionLog,
    let_in,
    migrate,
)
from fraud_nb.decision.judge import Model
from fraud_nb.domain.schema import Label, Transaction, encode
from fraud_nb.features.profile import Profiles
from fraud_nb.features.windows import DAY_MS, HOUR_MS
from fraud_nb.learning.dataset import History, fold_history
from fraud_nb.operations.backfill import logged_past, purchases_of
from fraud_nb.pipeline.prune import Pruned, prune
from fraud_nb.pipeline.replay import NothingToReplay, replay
from fraud_nb.pipeline.sharing import Sharing, build, close_version
from fraud_nb.pipeline.stream import events_of_rows
from fraud_nb.pipeline.verify import PrunedMeanwhile
from tests.conftest import own_database, tampering
from tests.contracts.test_answers import Service
from tests.contracts.test_versions import judged
from tests.contracts.worker_kit import PARTITIONS, Rehearsal, hired, verified, work
from tests.e2e.stream_kit import NOON, fraud

DAYS, CUT = 500, 300


def moment(day: float) -> datetime:
    return datetime.fromtimestamp((NOON + day * DAY_MS) / 1e3, UTC)


class Life:
    """A worker, a service and whoever closes versions, on one log; everything bears the date of its own day."""

    def __init__(self, dsn: str, model: Model) -> None:
        self.dsn, self.worker = dsn, hired(dsn, model)
        self.sharing = self.worker.sharing = Sharing(VersionLog(dsn), self.worker.store, PARTITIONS)
        self.service = Service(self.worker, dsn, model)
        self.labels, self.pruner, self.rng = LabelLog(dsn), LogPruner(dsn), Random(5)

    def send(self, purchase: Transaction, day: float) -> None:
        key = purchase.customer_id.encode()
        home = int(murmur2_partitions([key], PARTITIONS)[0])
        self.worker.source.append(encode(purchase), key, home, timestamp_ms=NOON + int(day * DAY_MS))

    def ask(self, purchase: Transaction) -> None:
        self.service.predictor.predict([purchase], purchase.event_time)

    def tell(self, label: Label) -> None:
        claim = self.labels.claim()
        self.labels.commit(LabelBatch([(label, claim.next_offset)], [], claim, claim.next_offset + 1))

    def close(self, day: float) -> None:
        """Decide what is there, and close a version."""
        work(self.worker)
        version = close_version(self.sharing, self.worker.claims[0].epoch)
        with tampering(self.dsn) as cursor:
            dated = "UPDATE shared_versions SET closed_at = %s WHERE version = %s"
            cursor.execute(dated, (moment(day), version))

    def buy(self, first: int, stop: int) -> None:
        """A purchase a day and a half, some of them late; eve, her shop and her phone are seen no more after day 40."""
        for number in range(first, stop):
            day, early = number / 1.5, number < 60
            late = self.rng.choice((0, 0, 0, 0, 0, 3, 80, 120))
            shop, phone = self.rng.choice(("books", "shoes", None)), self.rng.choice(("p1", "p2", None))
            who = self.rng.choice(("ada", "bob", "cy", "dee"))
            if early and number % 3 == 0:
                who, shop, phone = "eve", "antiques", "brick"
            bought = NOON + int((day - late) * DAY_MS) + number
            self.send(Transaction(f"t{number}", who, bought, 100 + number % 77, "EUR", shop, phone), day)
            if number % 7 == 0:
                self.tell(Label(f"t{number}", True, bought + 20 * DAY_MS, "chargeback"))
            if number % 15 == 14:
                self.close(day)

    def live(self) -> None:
        """Five hundred days, with all that can happen on the way."""
        self.buy(0, 150)
        self.send(Transaction("t3", "eve", NOON + 2 * DAY_MS + 3, 103, "EUR", "antiques", "brick"), 101)  # repeats
        self.worker.source.append(b"{", b"ada", 0, timestamp_ms=NOON + 101 * DAY_MS)
        self.ask(Transaction("never sent", "ada", NOON + 101 * DAY_MS, 900, "EUR", "books"))
        self.buy(150, int(CUT * 1.5) - 5)
        asked = Transaction("asked", "bob", NOON + 296 * DAY_MS, 901, "EUR", "shoes", "p1")
        self.ask(asked)
        self.close(297)
        self.send(asked, 298)
        self.buy(int(CUT * 1.5) - 5, int(DAYS * 1.5))
        self.close(DAYS)

    def go_on(self) -> None:
        """Eve comes back, to her shop, and things happen to those who have been there all the time."""
        self.send(Transaction("back", "eve", NOON + DAYS * DAY_MS, 5, "EUR", "antiques", "brick"), DAYS)
        self.tell(Label("t0", True, NOON + DAYS * DAY_MS, "chargeback"))
        self.buy(int(DAYS * 1.5), int(DAYS * 1.5) + 60)
        self.send(Transaction("again", "eve", NOON + (DAYS + 20) * DAY_MS, 5, "EUR", "antiques", "p1"), DAYS + 20)
        self.close(DAYS + 40)

    def rows(self) -> dict[str, Logged]:
        pages = (page for place in range(PARTITIONS) for page in self.worker.log.read(place, 0, 10_000))
        return {row.transaction.transaction_id: row for page in pages for row in page}

    def state(self) -> dict[tuple[int, str], bytes]:
        return dict(self.worker.store.profiles)

    def rebuilt(self) -> dict[tuple[int, str], bytes]:
        """Profiles and tiles after Redis has lost everything."""
        for partition in (*range(PARTITIONS), SHARED):
            self.worker.store.wipe(partition)
        with suppress(Fenced):
            work(self.worker)
        work(self.worker)
        close_version(self.sharing, self.worker.claims[0].epoch)
        return self.state()

    def prune(self, is_rehearsal: bool = False) -> Pruned:
        return prune(self.pruner, moment(CUT), is_rehearsal)

    def history(self) -> History:
        return fold_history(purchases_of(logged_past(self.worker.log)))


@pytest.fixture
def lives(alone: str, model: Model) -> Iterator[tuple[Life, Life]]:
    """The same life in two logs."""
    with ExitStack() as stack:
        both = []
        for name in ("prune_one", "prune_twin"):
            dsn = stack.enter_context(own_database(alone, name))
            migrate(dsn, PARTITIONS)
            both.append(life := Life(dsn, model))
            stack.callback(life.service.predictor.close)
            life.live()
        yield both[0], both[1]


def test_nobody_can_tell_that_a_log_was_pruned(lives: tuple[Life, Life]) -> None:
    life, twin = lives
    assert verified(life.worker).differences == () and life.state() == twin.state()
    before = life.rows()
    promised = life.prune(is_rehearsal=True)
    assert life.rows() == before and promised.gone > 250 and promised.never_met == 1
    with ThreadPoolExecutor(1) as beside:  # a worker that goes on deciding
        pruning = beside.submit(life.prune)
        life.go_on()
        assert pruning.result() == promised
    twin.go_on()
    after, whole = life.rows(), twin.rows()
    floor = life.worker.log.floor()
    assert floor.version == promised.version > 1
    gone = whole.keys() - after.keys()
    assert len(gone) == promised.gone and all(after[ident] == whole[ident] for ident in after)
    assert all(whole[ident].offset < floor.progress[whole[ident].partition] for ident in gone)
    assert {ident for ident, row in after.items() if row.transaction.customer_id == "eve"} > {"back", "again"}
    verdict = verified(life.worker)
    assert verdict.differences == () and verdict.is_whole
    assert 0 < verdict.kept and verdict.decisions + verdict.kept == len(after)
    assert verified(twin.worker).differences == ()
    assert life.state() == life.rebuilt() == twin.state()
    assert life.prune().gone == 0


def test_what_is_below_the_floor_is_no_example_and_no_evidence(lives: tuple[Life, Life]) -> None:
    life, twin = lives
    life.prune()
    start_ms = life.worker.log.floor().clock + 1
    examples, whole = life.history().since(start_ms), twin.history().since(start_ms)
    assert examples.transaction_ids == whole.transaction_ids and examples.labels == whole.labels
    assert np.array_equal(examples.vectors, whole.vectors, equal_nan=True)
    rows = life.rows()
    kept = min((row for row in rows.values()), key=lambda row: row.record_time)
    with pytest.raises(NothingToReplay, match="FRAUD_KEEP_DAYS"):
        replay(life.worker.overview, lambda _: life.worker.model, kept.transaction.transaction_id, "EUR")
    with pytest.raises(NothingToReplay, match="FRAUD_KEEP_DAYS"):
        replay(life.worker.overview, lambda _: life.worker.model, "asked", "EUR")
    newest = max(rows.values(), key=lambda row: row.record_time).transaction.transaction_id
    assert replay(life.worker.overview, lambda _: life.worker.model, newest, "EUR").stage is None


def test_killed_at_any_step_and_begun_again(lives: tuple[Life, Life], monkeypatch: pytest.MonkeyPatch) -> None:
    life, twin = lives

    class Killed(Exception):
        pass

    for number in count(1):
        steps = iter(range(1, number + 1))

        def die(_name: str, steps: Iterator[int] = steps, last: int = number) -> None:
            if next(steps) == last:
                raise Killed

        monkeypatch.setattr(adapter, "failpoint", die)
        with suppress(Killed):
            life.prune()
            break
        monkeypatch.undo()
        assert verified(life.worker, share=0).differences == ()
    monkeypatch.undo()
    assert number > 8 and life.prune().gone == 0
    life.go_on()
    twin.go_on()
    assert verified(life.worker).differences == () and life.rebuilt() == twin.state()


def test_what_a_person_has_looked_at_stays(lives: tuple[Life, Life]) -> None:
    life, twin = lives
    for each in lives:
        with tampering(each.dsn) as cursor:
            cursor.execute("INSERT INTO verdicts (transaction_id, says, note, analyst) VALUES ('t1', 'fraud', '', 'a')")
    life.prune()
    assert "t1" in life.rows() and "t2" not in life.rows()
    for each in lives:
        each.go_on()
    assert verified(life.worker).differences == () and life.rebuilt() == twin.state()


def test_an_id_that_went_is_a_new_one(lives: tuple[Life, Life]) -> None:
    life, _ = lives
    (first,) = (row.transaction for ident, row in life.rows().items() if ident == "t1")
    life.prune()
    decided = life.worker.counts.decided
    life.send(first, DAYS)
    life.close(DAYS + 1)
    assert life.worker.counts.decided == decided + 1 and verified(life.worker).differences == ()


def test_a_floor_that_rises_while_we_look_is_said(lives: tuple[Life, Life], monkeypatch: pytest.MonkeyPatch) -> None:
    life, _ = lives
    labels = life.worker.overview.labels

    def pruned_meanwhile() -> list[Label]:
        life.prune()
        return labels()

    monkeypatch.setattr(life.worker.overview, "labels", pruned_meanwhile)
    with pytest.raises(PrunedMeanwhile, match="again"):
        verified(life.worker, share=0)


def test_only_the_owner_prunes(lives: tuple[Life, Life]) -> None:
    life, _ = lives
    let_in(life.dsn, {"fraud_writer": "secret of the tests"})
    writer = LogPruner(psycopg2.extensions.make_dsn(life.dsn, user="fraud_writer", password="secret of the tests"))
    before = life.rows()
    with pytest.raises(StoreUnavailable, match="own"):
        prune(writer, moment(CUT), is_rehearsal=False)
    writer.close()
    assert life.rows() == before and life.worker.log.floor().version == 0


def test_a_young_log_has_nothing_to_prune(worker: Rehearsal, postgres: str) -> None:
    pruner = LogPruner(postgres)
    pruned = prune(pruner, pruner.days_ago(400), is_rehearsal=False)
    assert (pruned.version, pruned.gone, pruned.kept, pruned.never_met) == (0, 0, 0, 0)
    assert pruned.growth.bytes_per_million is None
    pruner.close()


def test_the_command(postgres: str) -> None:
    done = fraud({"FRAUD_POSTGRES": postgres}, "prune", "--dry-run")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and (told["version"], told["gone"], told["decisions"]) == (0, 0, 0)
    assert told["bytes"]["decisions"] > 0 and told["bytes_per_million"] is None
    assert fraud({"FRAUD_POSTGRES": postgres, "FRAUD_KEEP_DAYS": "99"}, "prune").returncode == 2


class Rules:
    """A log that is filled at random, again and again."""

    def __init__(self, dsn: str) -> None:
        self.dsn, self.log, self.pruner, self.versions = dsn, PostgresLog(dsn), LogPruner(dsn), VersionLog(dsn)

    def fill(self, rows: list[Logged], floor: SharedVersion) -> None:
        with tampering(self.dsn) as cursor:
            cursor.execute("TRUNCATE decisions, shared_versions, verdicts CASCADE")
            cursor.execute("UPDATE progress SET next_offset = 0")
            cursor.execute(
                "INSERT INTO shared_versions VALUES (%s, %s, 0, %s, '2020-01-01')",
                (floor.version, list(floor.progress), floor.clock),
            )
        claims = self.log.claim(range(PARTITIONS))
        self.log.commit(Batch(rows, [], [], {place: (claim, 10_000) for place, claim in claims.items()}))

    def rows(self) -> list[Logged]:
        return [row for place in range(PARTITIONS) for page in self.log.read(place, 0, 10_000) for row in page]

    def tiles(self, version: SharedVersion) -> dict[tuple[int, str], bytes]:
        store = MemoryStateStore()
        build(Sharing(self.versions, store, PARTITIONS), version, epoch=1)
        return store.profiles


@pytest.fixture
def rules(postgres: str) -> Iterator[Rules]:
    made = Rules(postgres)
    yield made
    for session in (made.log, made.pruner, made.versions):
        session.close()


def profiles_of(rows: list[Logged]) -> dict[str, bytes]:
    """Folded in order of partition and offset."""
    profiles = Profiles()
    profiles.learn([row.transaction.customer_id for row in rows], events_of_rows(rows))
    return {name: profiles.dump(name) for name in profiles.slot_of}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 32),
    number=st.integers(2, 120) | st.integers(2_100, 2_600),  # the second fills profiles of 1,024
    days=st.sampled_from((5, 95, 400)),
    late_days=st.sampled_from((0, 30, 200)),
    shops=st.integers(1, 6),
)
def test_a_fold_of_what_is_kept_is_a_fold_of_everything(
    rules: Rules, seed: int, number: int, days: int, late_days: int, shops: int
) -> None:
    rng = Random(seed)
    offsets, rows = [0] * PARTITIONS, list[Logged]()
    floor_at, ends = rng.randrange(number), [0] * PARTITIONS
    for place in range(number):
        if place == floor_at:
            ends = list(offsets)
        who = rng.randrange(2)
        time = NOON + place * days * DAY_MS // number - rng.choice((0, 0, rng.randrange(late_days * 24 + 1) * HOUR_MS))
        shop = rng.choice((None, *(f"shop {each}" for each in range(shops))))
        paid = Transaction(f"t{place}", f"customer {who}", time, place % 50, "EUR", shop, rng.choice((None, "phone")))
        rows.append(judged(Logged(who, offsets[who], paid, place % 50, b"", time, None)))
        offsets[who] += 1
    floor = SharedVersion(2, tuple(ends), 0, NOON)
    newest = SharedVersion(3, tuple(offsets), 0, NOON)
    rules.fill(rows, floor)
    everything, tiles = rules.rows(), [rules.tiles(version) for version in (floor, newest)]
    pruned = prune(rules.pruner, datetime(2021, 1, 1, tzinfo=UTC), is_rehearsal=False)
    kept = rules.rows()
    assert len(everything) - len(kept) == pruned.gone
    below = [row for row in everything if row.offset < ends[row.partition]]
    assert profiles_of(below) == profiles_of([row for row in kept if row.offset < ends[row.partition]])
    assert profiles_of(everything) == profiles_of(kept)
    assert tiles == [rules.tiles(version) for version in (floor, newest)]
