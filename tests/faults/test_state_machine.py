"""Hypothesis writes plays: what is sent, who works, who is killed, sleeps or wakes, and what is lost, in any order.

After each play everybody finishes, and then neither `fraud verify` nor a recount from the topics may find anything; at
every step, no decision has changed or gone. STATE_MACHINE_PLAYS=2000 plays so many, of which those of CI come first; a
play that fails is made shorter and then printed.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from fraud_nb.adapters.kafka_bus import PREDICTIONS, murmur2_partitions
from fraud_nb.adapters.ports import SHARED
from fraud_nb.adapters.postgres import HistoryLoader, migrate
from fraud_nb.apps.parts import model_in
from fraud_nb.decision.judge import Model
from fraud_nb.domain.money import Rates
from fraud_nb.domain.schema import Transaction, encode
from fraud_nb.features.windows import DAY_MS, MINUTE_MS
from fraud_nb.operations.backfill import Past, count_history, number_history
from fraud_nb.pipeline.verify import verify
from tests.conftest import own_database, postgres_alone
from tests.e2e.stream_kit import NOON, hostile_labels, purchase, small_model
from tests.faults.crew import PARTITIONS, Crew, Ledgers, LogCopy, Plug, StoreCopy, Trap
from tests.faults.plays import POISON
from tests.faults.truth import Truth, check, label_in, source_of

PLAYS = int(os.environ.get("STATE_MACHINE_PLAYS", "100"))
SCENES = 25  # of a play, at most
ROUNDS = 30  # in which everybody must have finished
SIZE, CUSTOMERS = 3, 16  # more than are in one batch: a batch that is taken back alone must be noticed
members, places = st.integers(0, SIZE - 1), st.integers(0, 40)


class Work(NamedTuple):
    """Somebody takes some turns, and perhaps does not come to their end."""

    who: int
    what: str
    turns: int
    batch_size: int  # records
    trap: Trap | None


def works(*what: str, passes: int) -> st.SearchStrategy[Work]:
    """Turns of these kinds; a trap is one of so many failpoints on the way."""
    traps = [Trap(at, kills) for at in range(1, passes + 1) for kills in (True, False)]
    sizes = st.sampled_from(range(1, 9))
    return st.builds(Work, members, st.sampled_from(what), sizes, sizes, st.sampled_from([None, None, *traps]))


somebody_works = st.none() | works("decide", passes=12) | works("share", "take_labels_in", passes=2)


def scene(**arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A rule: some purchases come, then this happens, then somebody works."""

    def decorate(happens: Callable[..., None]) -> Any:
        @wraps(happens)
        def play(machine: "Machine", bought: int, work: Work | None, **drawn: Any) -> None:
            machine.buy(bought)
            happens(machine, **drawn)
            point = machine.crew.work(*work) if work is not None else ""
            if point and work and currently_in_test_context():
                note(f"# at {point}, {'killed' if work.trap and work.trap.kills else 'asleep'}:")

        return rule(bought=st.sampled_from(range(4)), work=somebody_works, **arguments)(play)

    return decorate


class World(NamedTuple):
    """What all plays share."""

    ledgers: Ledgers
    empty: LogCopy
    models: tuple[Model, Model]
    plug: Plug

    def play(self) -> "Machine":
        """A new one, on an empty log."""
        self.ledgers.restore(self.empty)
        return Machine(self)


class Machine(RuleBasedStateMachine):
    """One play."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.ledgers, self.models = world.ledgers, world.models
        self.by_version = {model.version: model for model in world.models}
        self.crew = Crew(world.ledgers, world.plug, self.models[0], SIZE)
        self.truth, self.number, self.sent = Truth(), 0, list[Transaction]()
        self.decided: dict[str, str] = {}  # id: its row in the log
        self.history = 0  # purchases from before going live
        self.stores, self.logs = list[StoreCopy](), list[LogCopy]()
        self.is_set_back = False  # the log: readers may have been told otherwise

    @initialize(seed=st.integers(0, 999), is_claimed=st.booleans(), history=st.sampled_from(range(7)))
    def begin(self, seed: int, is_claimed: bool, history: int) -> None:
        """With history or without; the workers may already be there when it is loaded."""
        self.rng = random.Random(seed)
        if is_claimed:
            for who in range(SIZE):
                self.crew.work(who, "decide", 1, 1)
        self.stores.append(self.crew.store_copy())
        if history:
            self.load(history)
        self.logs.append(self.ledgers.copy())

    # What is sent

    def next_purchase(self) -> Transaction:
        self.number += 1
        return purchase(self.rng, self.number, NOON + self.number * 20 * MINUTE_MS, CUSTOMERS)

    def send(self, customer: str, value: bytes | None, now: int | None = None, away: int = 0) -> None:
        """Onto the topic, `away` from where the customer belongs."""
        key, topic = customer.encode(), self.crew.transactions
        partition = int(murmur2_partitions([key], PARTITIONS)[0] + away) % PARTITIONS
        topic.append(value, key, partition, timestamp_ms=NOON + self.number * 20 * MINUTE_MS if now is None else now)
        self.truth.learn(topic.records[partition][-1], PARTITIONS)

    def buy(self, count: int) -> None:
        """Half of these come late; some are claimed to be fraud, or will be."""
        for _ in range(count):
            each = self.next_purchase()
            self.send(each.customer_id, encode(each))
            self.sent.append(each)
            if self.rng.random() < 0.3:
                self.claim()

    @scene()
    def nothing_else(self) -> None:
        pass

    @precondition(lambda self: self.sent)
    @scene(place=places, is_changed=st.booleans())
    def send_again(self, place: int, is_changed: bool) -> None:
        each = self.sent[-1 - place % len(self.sent)]
        self.send(each.customer_id, encode(replace(each, amount_minor=each.amount_minor + 1) if is_changed else each))

    @scene(kind=st.sampled_from(("poison", "astray", "early")))
    def send_bad(self, kind: str) -> None:
        each = self.next_purchase()
        value, now = encode(each), each.event_time
        if kind == "poison":
            value = self.rng.choice(POISON)
        self.send(each.customer_id, value, now - 6 * MINUTE_MS if kind == "early" else now, int(kind == "astray"))

    def claim(self) -> None:
        """A label, perhaps twice, of any purchase there is or may be soon."""
        for _, key, value in hostile_labels(self.rng, self.number + 1, 1):
            self.truth.claims.append(label_in(value))
            self.crew.labels.append(value, key, timestamp_ms=NOON + 10_000 * DAY_MS)

    def load(self, count: int) -> None:
        """History, from before going live."""
        past = [Past(replace(self.next_purchase(), transaction_id=f"h{number}"), ()) for number in range(count)]
        counted = count_history(past, PARTITIONS, murmur2_partitions)
        rows = list(number_history(past, counted, PARTITIONS, murmur2_partitions, Rates()))
        with closing(HistoryLoader(self.ledgers.dsn)) as loader:
            loader.load(rows)
        for row, _ in rows:
            self.truth.learn_history((row.partition, row.offset), encode(row.transaction))
        self.history, self.logs = count, []

    @precondition(lambda self: not self.history and not self.is_set_back and not any(self.crew.standing().progress))
    @scene(count=st.sampled_from(range(1, 7)))
    def load_history(self, count: int) -> None:
        """Under the feet of those who may be in the middle of their first decisions."""
        self.load(count)
        self.logs.append(self.ledgers.copy())

    # Who works

    @scene(batch_size=st.integers(1, 8))
    def everybody_works(self, batch_size: int) -> None:
        self.crew.all_work(2, batch_size)

    @precondition(lambda self: self.crew.sleepers())
    @scene(place=places)
    def wake(self, place: int) -> None:
        sleepers = self.crew.sleepers()
        self.crew.wake(sleepers[place % len(sleepers)])

    @precondition(lambda self: self.crew.sleepers())
    @scene()
    def expel(self) -> None:
        self.crew.expel()

    @scene(who=members)
    def kill(self, who: int) -> None:
        self.crew.kill(who)

    @scene(owners=st.lists(members, min_size=PARTITIONS, max_size=PARTITIONS), labels_owner=members)
    def regroup(self, owners: list[int], labels_owner: int) -> None:
        """Whoever sleeps keeps his claims, and knows nothing of it."""
        self.crew.regroup(owners, labels_owner)

    @scene(who=members, version=st.integers(0, 1))
    def exchange_model(self, who: int, version: int) -> None:
        self.crew.members[who].worker.model = self.models[version]

    # What is lost

    @scene(partitions=st.sets(st.integers(SHARED, PARTITIONS - 1), min_size=1))
    def lose_store(self, partitions: set[int]) -> None:
        for partition in partitions:
            self.crew.store.wipe(partition)

    @precondition(lambda self: len(self.stores) < 4 and not self.crew.standing().tiles_are_ahead())
    @scene()
    def copy_store(self) -> None:
        """Not of tiles that a log has told which was set back since: their number will mean others."""
        self.stores.append(self.crew.store_copy())

    @precondition(lambda self: self.stores)
    @scene(place=places)
    def set_store_back(self, place: int) -> None:
        self.crew.set_store_back(self.stores[place % len(self.stores)])

    @precondition(lambda self: len(self.logs) < 3)
    @scene()
    def copy_log(self) -> None:
        self.logs.append(self.ledgers.copy())

    @scene(place=places)
    def set_log_back(self, place: int) -> None:
        """As the runbook says: nobody works meanwhile. Copies of the store are of another log now."""
        for who in range(SIZE):
            self.crew.kill(who)
        del self.logs[place % len(self.logs) + 1 :]
        self.ledgers.restore(self.logs[-1])
        self.stores.clear()
        self.decided, self.is_set_back = self.rows(), True

    # What must hold

    def rows(self) -> dict[str, str]:
        return dict(self.ledgers.rows("SELECT transaction_id, md5(decisions::text) FROM decisions"))

    @invariant()
    def nothing_decided_changes(self) -> None:
        before, self.decided = self.decided, self.rows()
        assert before.items() <= self.decided.items(), "a decision was changed or lost"

    @invariant()
    def nothing_is_told_twice(self) -> None:
        told = [source_of(each) for each in self.crew.on_topic(PREDICTIONS)]
        assert len(set(told)) == len(told), "a decision was published twice"

    def teardown(self) -> None:
        """Who sleeps is missed, and wakes when others have gone on; then nothing is missing, doubled or otherwise."""
        if self.crew.sleepers():
            self.crew.expel()
            self.buy(8)
            self.crew.all_work(3, 100)
        self.crew.finish(ROUNDS)
        check(self.truth, self.crew.found(), same_words=not self.is_set_back)
        verdict = verify(self.ledgers.reader, self.crew.store, self.crew.bus(), self.by_version.__getitem__)
        assert not verdict.differences and verdict.decisions == len(self.truth.ids) - self.history, verdict


alone = pytest.fixture(scope="module", name="alone")(postgres_alone)


@pytest.fixture(scope="module")
def world(alone: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("models")
    models = model_in(small_model(folder / "a.bundle", 3)), model_in(small_model(folder / "b.bundle", 9))
    with own_database(alone, "state_machine") as dsn:
        migrate(dsn, PARTITIONS)
        ledgers, plug = Ledgers(dsn), Plug()
        with plug.plugged():
            yield World(ledgers, ledgers.copy(), models, plug)
        ledgers.close()


@pytest.mark.timeout(3_600)  # a failure is made shorter first
def test_whatever_happens_nothing_is_lost_changed_or_told_twice(world: World) -> None:
    given = settings(
        max_examples=PLAYS,
        stateful_step_count=SCENES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(world.play, settings=given)  # type: ignore[arg-type]
    assert len(world.plug.pulled) >= 20, f"too few ways to die and to sleep: {sorted(world.plug.pulled)}"


def test_versions_that_the_log_has_lost_are_told_to_nobody(world: World) -> None:
    """Found by the machine: whoever came before the owner of partition 0 was told by tiles of the log that was lost."""
    play = world.play()
    play.begin(seed=5, is_claimed=False, history=0)
    for bought in (6, 0):
        play.everybody_works(bought=bought, work=None, batch_size=100)
    play.copy_log(bought=0, work=None)
    for _ in range(3):
        play.everybody_works(bought=3, work=None, batch_size=100)
    play.set_log_back(bought=6, work=Work(1, "decide", 3, 100, None), place=1)
    play.teardown()


def test_a_store_from_before_the_history_is_not_believed(world: World) -> None:
    """Its watermark of 0 says that nothing is live, and nothing about what was loaded since."""
    play = world.play()
    play.begin(seed=5, is_claimed=True, history=6)
    for _ in range(4):
        play.everybody_works(bought=3, work=None, batch_size=100)
    play.set_store_back(bought=6, work=None, place=0)
    play.teardown()


@pytest.mark.parametrize("passes", range(1, 6))
def test_a_sleeper_who_wakes_when_others_have_gone_on_changes_nothing(world: World, passes: int) -> None:
    """At every step of a batch, the one between the commit and the store among them."""
    play = world.play()
    play.begin(seed=5, is_claimed=True, history=0)
    play.nothing_else(bought=12, work=Work(0, "decide", 3, 1, Trap(passes, kills=False)))
    play.expel(bought=12, work=None)
    play.everybody_works(bought=12, work=None, batch_size=100)
    play.everybody_works(bought=0, work=None, batch_size=100)
    play.wake(bought=0, work=None, place=0)
    play.teardown()
