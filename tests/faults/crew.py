"""Workers in one process that are killed, or fall asleep, in the middle of a turn.

Bus and store are doubles, which keep the contracts of the real ones (tests/contracts); the log is a real PostgreSQL.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import psycopg2
from greenlet import getcurrent, greenlet
from psycopg2.extras import execute_values

from fraud_nb.adapters import postgres
from fraud_nb.adapters.kafka_bus import DEAD_LETTERS, LABELS, PREDICTIONS, TRANSACTIONS
from fraud_nb.adapters.memory import MemorySink, MemorySource, MemoryStateStore
from fraud_nb.adapters.ports import SHARED, Fenced, Outgoing, Record, Unavailable
from fraud_nb.adapters.postgres import (
    Accepted,
    AlreadyDecided,
    LabelLog,
    Logged,
    LogOverview,
    PostgresLog,
    VersionLog,
)
from fraud_nb.apps.work import share
from fraud_nb.decision.judge import Model
from fraud_nb.features.catalogue import FEATURE_NAMES
from fraud_nb.pipeline import intake, sharing, stream
from fraud_nb.pipeline.intake import Intake, take_in
from fraud_nb.pipeline.sharing import Sharing
from fraud_nb.pipeline.stream import Worker, step
from fraud_nb.pipeline.verify import Bus
from tests.e2e.stream_kit import bus_of
from tests.faults.truth import Found, found_in_log

PARTITIONS = 4
SMALL_PAGE = 3  # rows: what is read page by page can be left between two of them
TABLES = (
    "decisions", "progress", "dead_letters", "repeats", "feature_sets", "labels", "label_progress",
    "label_dead_letters", "shared_versions", "gaps",
)  # fmt: skip
Rows = list[tuple[Any, ...]]
LogCopy = Mapping[str, Rows]  # by table
StoreCopy = tuple[dict[int, int], dict[tuple[int, str], bytes]]  # watermarks and profiles


class Killed(BaseException):
    """The process ends here; nobody catches it."""


class Trap(NamedTuple):
    """Where a turn ends otherwise than by itself."""

    passes: int  # at which of the failpoints on its way, counted from 1
    kills: bool  # else the turn falls asleep there


@dataclass
class Plug:
    """Stands in for `failpoint` in all modules that have one."""

    trap: Trap | None = None
    pulled: Counter[tuple[str, bool]] = field(default_factory=Counter)  # where, and whether it killed
    last: str = ""  # where the last one was pulled

    def __call__(self, name: str) -> None:
        """Die here, or fall asleep, if the trap says so."""
        if self.trap is None:
            return
        passes, kills = self.trap
        if passes > 1 or (name == "committing" and not kills):  # there it holds locks, for which others would wait
            self.trap = Trap(passes - 1, kills)
            return
        self.trap, self.last = None, name
        self.pulled[name, kills] += 1
        if kills:
            raise Killed(name)
        getcurrent().parent.switch()

    @contextmanager
    def plugged(self) -> Iterator[None]:
        """Every failpoint asks us meanwhile, and pages are small."""
        with ExitStack() as patches:
            for module in (stream, sharing, intake, postgres):
                patches.enter_context(patch.object(module, "failpoint", self))
            patches.enter_context(patch.object(sharing, "PAGE", SMALL_PAGE))
            yield


class PagedLog(PostgresLog):
    """Reads small pages, whatever it is told."""

    def read(self, partition: int, start: int, stop: int, page: int = SMALL_PAGE) -> Iterator[list[Logged]]:
        """Rows in order of offset, page by page."""
        return super().read(partition, start, stop, SMALL_PAGE)

    def read_accepted(self, partition: int, start: int, stop: int, page: int = SMALL_PAGE) -> Iterator[list[Accepted]]:
        """The same rows, likewise."""
        return super().read_accepted(partition, start, stop, SMALL_PAGE)


class Ledgers:
    """The log: one connection of each kind, since its users take turns and none sleeps within a transaction."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.decisions, self.versions, self.labels = PagedLog(dsn), VersionLog(dsn), LabelLog(dsn)
        self.reader = LogOverview(dsn)
        self._owner = psycopg2.connect(dsn, options="-c session_replication_role=replica")  # may change anything

    def rows(self, query: str) -> Rows:
        """Ask as the owner."""
        with self._owner, self._owner.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def copy(self) -> LogCopy:
        """As a dump has it."""
        return {table: self.rows(f"TABLE {table}") for table in TABLES}

    def restore(self, copy: LogCopy) -> None:
        """Exactly what was copied, and nothing since."""
        with self._owner, self._owner.cursor() as cursor:
            for table, rows in copy.items():
                cursor.execute(f"DELETE FROM {table}")
                execute_values(cursor, f"INSERT INTO {table} VALUES %s", rows)

    def close(self) -> None:
        """Let go of all connections."""
        for session in (self.decisions, self.versions, self.labels, self.reader, self._owner):
            session.close()


@dataclass(eq=False)
class Member:
    """What a process of `fraud stream` holds: it decides, closes shared versions, and takes labels in."""

    worker: Worker
    intake: Intake
    asleep: greenlet | None = None  # in the middle of a turn; the whole process is

    def work(self, what: str, turns: int, batch_size: int) -> None:
        """Some turns of one of its threads; after these errors the next one begins anew."""
        self.worker.batch_size = batch_size
        for _ in range(turns):
            with suppress(Fenced, AlreadyDecided, Unavailable):
                if what == "decide":
                    step(self.worker, 0)
                elif what == "share":
                    share(self.worker, lambda _: None)
                else:
                    take_in(self.intake)


class Standing(NamedTuple):
    """How far everything is, partition by partition."""

    ends: list[int]  # of the topic
    progress: list[int]  # of the log
    committed: list[int]  # by the group: published
    watermarks: list[int]  # of the store
    labels: tuple[int, int, int]  # end, progress, committed
    versions: tuple[int, int]  # in the log, in the store

    def tiles_are_ahead(self) -> bool:
        """Whether the store has a shared version that the log does not have."""
        return self.versions[1] > self.versions[0]

    def is_done(self) -> bool:
        """Whether nothing is behind."""
        is_even = self.ends == self.progress == self.committed == self.watermarks
        return is_even and len({*self.labels}) == 1 and self.versions[0] == self.versions[1]


def member_of(topic: MemorySource) -> MemorySource:
    """One more member of the topic's group, to whom nothing is granted yet."""
    source = MemorySource(len(topic.records), topic.topic)
    source.records, source.start, source.offsets = topic.records, topic.start, topic.offsets
    source.rebalance(())
    return source


class Crew:
    """A group of workers with their bus, their store and their log."""

    def __init__(self, ledgers: Ledgers, plug: Plug, model: Model, size: int) -> None:
        self.ledgers, self._plug, self._model = ledgers, plug, model
        self.transactions, self.labels = MemorySource(PARTITIONS, TRANSACTIONS), MemorySource(1, LABELS)
        self.store, self.published = MemoryStateStore(), list[Outgoing]()
        self.members = [self._hired() for _ in range(size)]
        self.regroup([part % size for part in range(PARTITIONS)], 0)

    def _hired(self) -> Member:
        decides, takes_labels = member_of(self.transactions), member_of(self.labels)
        sinks = MemorySink(decides), MemorySink(takes_labels)
        for sink in sinks:
            sink.published = self.published
        log = self.ledgers
        worker = Worker(
            decides, sinks[0], self.store, log.decisions, self._model, PARTITIONS,
            sharing=Sharing(log.versions, self.store, PARTITIONS),
        )  # fmt: skip
        return Member(worker, Intake(takes_labels, sinks[1], log.labels))

    def store_copy(self) -> StoreCopy:
        """All that the store holds."""
        return dict(self.store.watermarks), dict(self.store.profiles)

    def set_store_back(self, copy: StoreCopy) -> None:
        """As it was when it was copied."""
        watermarks, profiles = copy
        self.store.watermarks, self.store.profiles = dict(watermarks), dict(profiles)

    def regroup(self, owners: Sequence[int], labels_owner: int) -> None:
        """The group moves on; each member notices in its next poll."""
        self._owners, self._labels_owner = list(owners), labels_owner
        for number, member in enumerate(self.members):
            member.worker.source.rebalance(part for part, owner in enumerate(owners) if owner == number)  # type: ignore[attr-defined]
            member.intake.source.rebalance([0] if labels_owner == number else [])  # type: ignore[attr-defined]

    def kill(self, number: int) -> None:
        """Its process ends, wherever it is; another one starts and joins the group in its place."""
        self.members[number] = self._hired()
        self.regroup(self._owners, self._labels_owner)

    def work(self, number: int, what: str, turns: int, batch_size: int, trap: Trap | None = None) -> str:
        """Let a member work until it is done, killed or asleep, and say at which failpoint; a sleeper does nothing."""
        member, self._plug.last = self.members[number], ""
        if member.asleep is None:
            self._plug.trap = trap
            self._go_on(number, greenlet(member.work), what, turns, batch_size)
            self._plug.trap = None
        return self._plug.last

    def all_work(self, turns: int, batch_size: int) -> None:
        """Everybody who does not sleep takes turns at everything."""
        for number in range(len(self.members)):
            for what, times in (("decide", turns), ("take_labels_in", 2), ("share", 1)):
                self.work(number, what, times, batch_size)

    def expel(self) -> None:
        """The group misses those who sleep, and gives what they have to somebody else; they know nothing of it."""
        awake = [number for number in range(len(self.members)) if number not in self.sleepers()] or [0]
        owners = [owner if owner in awake else awake[part % len(awake)] for part, owner in enumerate(self._owners)]
        self.regroup(owners, self._labels_owner if self._labels_owner in awake else awake[-1])

    def sleepers(self) -> list[int]:
        """Members that sleep."""
        return [number for number, member in enumerate(self.members) if member.asleep is not None]

    def wake(self, number: int) -> None:
        """Let a member that sleeps go on where it was."""
        member = self.members[number]
        if member.asleep is not None:
            sleeper, member.asleep = member.asleep, None
            self._go_on(number, sleeper)

    def _go_on(self, number: int, work: greenlet, *words: object) -> None:
        try:
            work.switch(*words)
            self.members[number].asleep = None if work.dead else work
        except Killed:
            self.kill(number)

    def finish(self, rounds: int) -> None:
        """Everybody wakes and works, until there is nothing more to do."""
        before = None
        for _ in range(rounds):
            for number in range(len(self.members)):
                self.wake(number)
            self.all_work(3, 100)
            now = self.standing()
            if now == before and now.is_done():
                return
            before = now
        raise AssertionError(f"after {rounds} rounds still not done: {before}")

    def standing(self) -> Standing:
        """How far everything is."""
        progress = dict(self.ledgers.rows("SELECT partition, next_offset FROM progress"))
        ((labels, version),) = self.ledgers.rows(
            "SELECT next_offset, (SELECT coalesce(max(version), 0) FROM shared_versions) FROM label_progress"
        )
        return Standing(
            [len(records) for records in self.transactions.records],
            [progress[part] for part in range(PARTITIONS)],
            [self.transactions.committed(part) for part in range(PARTITIONS)],
            [self.store.watermark(part) or 0 for part in range(PARTITIONS)],
            (len(self.labels.records[0]), labels, self.labels.committed(0)),
            (version, self.store.watermark(SHARED) or 0),
        )

    def on_topic(self, topic: str) -> list[Record]:
        """What a reader finds there."""
        return [
            Record(topic, each.partition or 0, place, 0, each.key, each.value, each.headers)
            for place, each in enumerate(self.published)
            if each.topic == topic
        ]

    def bus(self) -> Bus:
        """The topics, for `fraud verify`."""
        sent = [record for records in self.transactions.records for record in records]
        return bus_of([*sent, *self.on_topic(PREDICTIONS), *self.on_topic(DEAD_LETTERS)])

    def found(self) -> Found:
        """What the system says there is."""
        standing = self.standing()
        return Found(
            **found_in_log(self.ledgers.rows),
            feature_names=FEATURE_NAMES,
            committed=dict(enumerate(standing.committed)),
            ends=dict(enumerate(standing.ends)),
            predictions=self.on_topic(PREDICTIONS),
            letters=self.on_topic(DEAD_LETTERS),
            watermarks=dict(enumerate(standing.watermarks)),
            profiles={key: content for key, content in self.store.profiles.items() if key[0] != SHARED},
        )
