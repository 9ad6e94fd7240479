"""The desk's questions to a real PostgreSQL: nothing lost, nothing twice, nothing scanned; and what verdicts become."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import pytest

from fraud_nb.adapters import desk as module
from fraud_nb.adapters.desk import CaseReader, DeskReader, InvalidVerdict, Look, Seen, VerdictLog
from fraud_nb.adapters.postgres import Fenced, HistoryLoader, LabelBatch, LabelLog, Logged
from fraud_nb.domain.schema import Label, Transaction
from fraud_nb.pipeline.intake import Intake, take_in
from tests.conftest import own_database
from tests.desk.desk_kit import Shop, look_until_even, now_ms, shop_in

ROOT = Path(__file__).parents[2]
NOON = 1_767_268_800_000


@pytest.fixture
def shop(postgres: str) -> Iterator[Shop]:
    with own_database(postgres, "desk_test") as dsn:
        yield shop_in(dsn)


@pytest.fixture
def reader(shop: Shop) -> DeskReader:
    return DeskReader(shop.dsn)


def asked_over_http(
    shop: Shop, ident: str, outcome: str = "approve", customer: str | None = "ada", **more: Any
) -> None:
    """A decision as the service makes it: without an offset."""
    facts: dict[str, Any] = {
        "transaction_id": ident, "customer_id": customer, "partition": None if customer is None else 1,
        "origin": "http-stateless" if customer is None else "http", "event_time": now_ms(), "record_time": now_ms(),
        "amount_minor": 900, "currency": "EUR", "amount_base": 900, "payload_hash": b"", "feature_set": "",
        "features": b"", "probability": 0.4, "outcome": outcome, "reasons": "[]",
        "model_version": 3, "policy_version": 1,
    }  # fmt: skip
    facts |= more
    names = ", ".join(facts)
    shop.rows(f"INSERT INTO decisions ({names}) VALUES ({', '.join(['%s'] * len(facts))})", *facts.values())


def learned(shop: Shop, ident: str, partition: int = 1) -> None:
    """The worker meets a decision of the service: offset and progress move together."""
    shop.rows(
        "WITH moved AS (UPDATE progress SET next_offset = next_offset + 1 WHERE partition = %s RETURNING next_offset) "
        'UPDATE decisions SET "offset" = (SELECT next_offset - 1 FROM moved) WHERE transaction_id = %s',
        partition,
        ident,
    )


# ---- counting


def truth(shop: Shop) -> dict[str, int]:
    """Counted the slow way."""
    return dict(shop.rows("SELECT outcome, count(*) FROM decisions WHERE origin <> 'backfill' GROUP BY 1"))  # type: ignore[arg-type]


def consistent(look: Look) -> Look:
    """All four ways of counting agree."""
    counts = look.counts
    assert counts.outcomes.total() == counts.categories.total() == counts.scores.total() == counts.decided
    assert counts.alerts.total() == counts.score_alerts.total() == counts.alerted
    return look


def test_an_empty_log(reader: DeskReader) -> None:
    look = reader.look(Seen())
    assert look.counts.decided == 0 and look.alerts == [] and look.places == [] and look.model_version is None


@pytest.mark.parametrize("page", [7, 1_000_000])
def test_every_row_is_counted_once_however_the_looks_fall(shop: Shop, reader: DeskReader, page: int) -> None:
    seen = Seen()
    for count in (0, 1, 50, 3, 120):
        if count:
            shop.trade(count)
        look = reader.look(seen, page)
        seen = look.seen
        while look.behind:
            look = consistent(reader.look(seen, page))
            seen = look.seen
        assert dict(look.counts.outcomes) == truth(shop)
    assert consistent(reader.look(seen)).counts == look.counts, "nothing new: nothing changes"
    assert look.counts.seconds.total() == 174, "all of it is of the last two minutes"


def test_history_is_not_counted(shop: Shop, reader: DeskReader) -> None:
    old = Logged(0, -1, Transaction("h-1", "ada", NOON, 100, "EUR"), 100, b"", NOON, None, "backfill")
    HistoryLoader(shop.dsn).load([(old, [Label("h-1", True, NOON)])])
    look = reader.look(Seen())
    assert look.counts.decided == 0 and look.seen.frauds == 0 and look.seen.label_seq == 1


def test_a_decision_of_the_service_is_counted_once_before_and_after_it_gets_its_offset(
    shop: Shop, reader: DeskReader
) -> None:
    asked_over_http(shop, "q-1", "review")
    first = consistent(reader.look(Seen()))
    assert (first.counts.decided, first.under_way.decided) == (1, 1)
    learned(shop, "q-1")
    second = consistent(reader.look(first.seen))
    assert (second.counts.decided, second.under_way.decided) == (1, 0)
    assert consistent(reader.look(second.seen)).counts.decided == 1
    assert [alert.transaction_id for alert in second.alerts] == ["q-1"]


def test_requests_without_a_customer_are_counted_once(
    shop: Shop, reader: DeskReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = now_ms()
    for number, age_ms in enumerate((5_000_000, 61_000, 59_000, 0)):
        asked_over_http(shop, f"s-{number}", customer=None, record_time=now - age_ms)
    first = consistent(reader.look(Seen()))
    assert (first.counts.decided, first.under_way.decided) == (4, 2)
    asked_over_http(shop, "s-late", customer=None, record_time=now - 30_000)  # committed after a later one was seen
    second = consistent(reader.look(first.seen))
    assert (second.counts.decided, second.under_way.decided) == (5, 3)
    monkeypatch.setattr(module, "SETTLED_MS", -1)  # as if a minute had passed
    third = consistent(reader.look(second.seen))
    assert (third.counts.decided, third.under_way.decided) == (5, 0)
    assert consistent(reader.look(third.seen)).counts.decided == 5


def test_confirmed_frauds_follow_the_newest_label(shop: Shop, reader: DeskReader) -> None:
    good, bad = shop.sell(shop.purchase(NOON, bad=False), shop.purchase(NOON, bad=True))
    found, seen = [], Seen()
    for labels in (
        [Label(good, True, NOON), Label(bad, True, NOON)],
        [Label(bad, False, NOON + 1)],
        [Label(bad, True, NOON)],  # came late, and is older than the correction
        [Label(bad, True, NOON + 1), Label("unknown", True, NOON)],
        [],
    ):
        shop.tell(*labels)
        seen = reader.look(seen).seen
        found.append((seen.frauds, seen.caught))
    assert found == [(2, 1), (1, 0), (1, 0), (2, 1), (2, 1)]
    assert (look_until_even(reader).seen.frauds, look_until_even(reader).seen.caught) == (2, 1)


# ---- what is shown


def test_alerts_are_ordered_by_what_they_may_cost_and_those_with_a_verdict_come_last(
    shop: Shop, reader: DeskReader
) -> None:
    ids = shop.sell(
        *[shop.purchase(now_ms(), bad=True, amount_minor=amount, transaction_id=f"a-{amount}") for amount in (1, 900)]
    )
    VerdictLog(shop.dsn).give(ids[1], "fraud", "", "ada")
    first, last = reader.look(Seen()).alerts
    assert (first.transaction_id, first.verdict) == (ids[0], None)
    assert (last.transaction_id, last.verdict, last.analyst) == (ids[1], "fraud", "ada")
    VerdictLog(shop.dsn).give(ids[1], "undo", "", "bob")
    assert [alert.verdict for alert in reader.look(Seen()).alerts] == [None, None]


def test_a_case_holds_all_that_made_it(shop: Shop) -> None:
    shop.sell(*[shop.purchase(NOON + day, customer_id="ada", bad=False) for day in range(5)])
    (ident,) = shop.sell(shop.purchase(NOON + 9, customer_id="ada", bad=True))
    shop.sell(shop.purchase(NOON + 20, customer_id="ada"), shop.purchase(NOON, customer_id="bob"))
    case = CaseReader(shop.dsn).case(ident)
    assert case is not None
    assert [each.transaction_id for each in case.before][0] == ident and len(case.before) == 6, "nothing later"
    assert len(case.alert.reasons) == 3 and case.model_version == 3
    names = [name for name, _ in json.loads(shop.rows("SELECT features FROM feature_sets")[0][0])]
    assert [name for name, _ in case.features] == names and all(len(packed) == 4 for _, packed in case.features)
    assert CaseReader(shop.dsn).case("never") is None
    asked_over_http(shop, "s-1", customer=None)
    stateless = CaseReader(shop.dsn).case("s-1")
    assert stateless is not None and stateless.before == [] and stateless.alert.customer_id is None


def test_a_look_never_scans_the_log(shop: Shop, reader: DeskReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second for every open tab: whatever a tick asks must find its rows by an index."""
    for _ in range(10):
        shop.trade(3_000)
    for number in range(20):
        asked_over_http(shop, f"s-{number}", customer=None)
        asked_over_http(shop, f"q-{number}")
    shop.tell(*[Label(f"t-{number:06d}", True, NOON) for number in range(0, 30_000, 10)])
    seen = look_until_even(reader).seen
    shop.rows("ANALYZE")
    fresh = shop.trade(200)
    shop.tell(Label(fresh[0], True, NOON))
    plans: list[str] = []

    def explained(cursor: Any, query: str, values: Any) -> list[tuple[Any, ...]]:
        cursor.execute("EXPLAIN " + query, values)
        plans.append(query + "\n".join(line for (line,) in cursor.fetchall()))
        cursor.execute(query, values)
        return list(cursor.fetchall())

    monkeypatch.setattr(module, "_asked", explained)
    reader.look(seen)
    assert len(plans) == 7
    for plan in plans:
        assert "Seq Scan on decisions" not in plan and "Seq Scan on labels" not in plan, plan


# ---- verdicts


def test_verdicts_are_kept_in_order_and_an_undo_needs_one_that_stands(shop: Shop) -> None:
    (ident,) = shop.sell(shop.purchase(NOON))
    log = VerdictLog(shop.dsn)
    with pytest.raises(InvalidVerdict, match="no verdict stands"):
        log.give(ident, "undo", "", "ada")
    given = [log.give(ident, says, note, "ada") for says, note in (("fraud", "x'; --"), ("undo", ""), ("genuine", "ü"))]
    assert log.of(ident) == given and [each.note for each in given] == ["x'; --", "", "ü"]
    log.give(ident, "undo", "", "ada")
    with pytest.raises(InvalidVerdict, match="no verdict stands"):
        log.give(ident, "undo", "", "ada")
    with pytest.raises(InvalidVerdict, match="no such decision"):
        log.give("never", "fraud", "", "ada")
    with pytest.raises(InvalidVerdict, match="analyst"):
        log.give(ident, "fraud", "", "")


@pytest.mark.parametrize("role", ["fraud_analyst", "fraud_reader"])
def test_the_desks_roles_change_nothing_that_is_written(shop: Shop, role: str) -> None:
    (ident,) = shop.sell(shop.purchase(NOON))
    VerdictLog(shop.dsn).give(ident, "fraud", "", "ada")
    forbidden = [
        "UPDATE decisions SET outcome = 'approve'", 'UPDATE decisions SET "offset" = 7', "DELETE FROM decisions",
        "UPDATE verdicts SET says = 'genuine'", "DELETE FROM verdicts", "TRUNCATE verdicts",
        "INSERT INTO labels (label_seq, transaction_id, is_fraud, label_time, source) VALUES (9, 't', true, 1, 'rule')",
        "UPDATE progress SET epoch = 9", "UPDATE label_progress SET epoch = 9",
    ]  # fmt: skip
    if role == "fraud_reader":
        forbidden.append(
            f"INSERT INTO verdicts (transaction_id, says, note, analyst) VALUES ('{ident}', 'fraud', '', 'x')"
        )
    connection = psycopg2.connect(shop.dsn, options=f"-c role={role}")
    connection.autocommit = True
    for statement in forbidden:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            connection.cursor().execute(statement)
    connection.close()


# ---- verdicts become labels


@dataclass
class NoTopic:
    """The topic of labels, on which nothing comes; and the sink beside it."""

    taken_over: list[int] = field(default_factory=lambda: [1])

    def poll(self, timeout_s: float, max_records: int) -> list[Any]:
        return []

    def generation(self) -> int:
        return self.taken_over[-1]

    def assigned(self) -> frozenset[int]:
        return frozenset((0,))

    def committed(self, partition: int) -> int:
        return 0

    def seek(self, partition: int, offset: int) -> None:
        """There is nothing to seek in."""

    def publish(self, *_: Any) -> None:
        raise AssertionError("a verdict is nothing to publish")

    def close(self) -> None:
        """There is nothing to close."""


def intake_of(shop: Shop) -> Intake:
    topic = NoTopic()
    return Intake(topic, topic, LabelLog(shop.dsn))


def labels(shop: Shop) -> list[tuple[Any, ...]]:
    return shop.rows("SELECT transaction_id, is_fraud, label_time, source, verdict FROM labels ORDER BY label_seq")


def test_a_verdict_becomes_a_label_in_the_next_turn(shop: Shop) -> None:
    (ident,) = shop.sell(shop.purchase(NOON, event_time=NOON))
    intake = intake_of(shop)
    assert take_in(intake) == 0 and labels(shop) == []
    given = VerdictLog(shop.dsn).give(ident, "fraud", "", "ada")
    take_in(intake)
    take_in(intake)
    assert labels(shop) == [(ident, True, NOON, "analyst", given.verdict)] and intake.labels == 1


def test_now_is_the_logs_newest_moment_and_never_the_hosts(shop: Shop) -> None:
    early, late = shop.sell(shop.purchase(NOON, event_time=NOON), shop.purchase(NOON, event_time=NOON + 9_000))
    shop.rows("INSERT INTO shared_versions VALUES (1, '{0,0,0,0}', 0, %s)", NOON + 5_000)
    log, intake = VerdictLog(shop.dsn), intake_of(shop)
    take_in(intake)
    log.give(early, "fraud", "", "ada")
    log.give(late, "genuine", "", "ada")
    take_in(intake)
    assert [row[:3] for row in labels(shop)] == [(early, True, NOON + 5_000), (late, False, NOON + 9_000)]


@pytest.mark.parametrize(
    ("before", "said", "expected"),
    [
        ([], ["fraud", "undo"], [True, False]),
        ([True], ["genuine", "undo"], [True, False, True]),
        ([True, False], ["fraud", "genuine", "undo", "undo"], [True, False, True, False, True, False]),
        ([], ["fraud", "fraud", "undo", "genuine", "undo"], [True, True, True, False, True]),
    ],
)
def test_an_undo_brings_back_what_stood_before(
    shop: Shop, before: list[bool], said: list[str], expected: list[bool]
) -> None:
    (ident,) = shop.sell(shop.purchase(NOON, event_time=NOON))
    shop.tell(*[Label(ident, is_fraud, NOON) for is_fraud in before])
    log = VerdictLog(shop.dsn)
    for says in said:
        log.give(ident, says, "", "ada")
    intake = intake_of(shop)
    for _ in range(2):
        take_in(intake)
    assert [is_fraud for _, is_fraud, *_ in labels(shop)] == expected


def test_an_undo_leaves_a_chargeback_that_came_meanwhile(shop: Shop) -> None:
    (ident,) = shop.sell(shop.purchase(NOON, event_time=NOON))
    log, taker = VerdictLog(shop.dsn), LabelLog(shop.dsn)
    log.give(ident, "genuine", "", "ada")
    claim = taker.claim()
    taker.commit(LabelBatch([], [], claim, 0))
    shop.tell(Label(ident, True, NOON))
    log.give(ident, "undo", "", "ada")
    taker = LabelLog(shop.dsn)
    taker.commit(LabelBatch([], [], taker.claim(), 1))
    assert [is_fraud for _, is_fraud, *_ in labels(shop)] == [False, True, True]


DIES = """
import os, signal, sys
from fraud_nb.adapters import postgres
take = postgres._take_verdicts
def die(cursor):
    take(cursor)
    os.kill(os.getpid(), signal.SIGKILL)
postgres._take_verdicts = die
log = postgres.LabelLog(sys.argv[1])
log.commit(postgres.LabelBatch([], [], log.claim(), 0))
"""
DIES_AFTER = """
import sys
from fraud_nb.pipeline.intake import take_in
from tests.desk.test_desk import Intake, LabelLog, NoTopic
intake = Intake(NoTopic(), NoTopic(), LabelLog(sys.argv[1]))
take_in(intake)
take_in(intake)
"""


@pytest.mark.parametrize(("program", "failpoint", "taken"), [(DIES, "", 0), (DIES_AFTER, "labels-committed", 5)])
def test_no_verdict_is_lost_or_taken_twice_when_the_taker_is_killed(
    shop: Shop, program: str, failpoint: str, taken: int
) -> None:
    ids = shop.sell(*[shop.purchase(NOON, transaction_id=f"v-{number}", bad=True) for number in range(9)])
    log, zombie = VerdictLog(shop.dsn), LabelLog(shop.dsn)
    old = zombie.claim()
    for ident in ids[:5]:
        log.give(ident, "fraud", "", "ada")
    environment = {**os.environ, "FRAUD_FAILPOINT": failpoint, "PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", program, shop.dsn], env=environment, timeout=60)
    assert died.returncode == -signal.SIGKILL and len(labels(shop)) == taken
    successor = LabelLog(shop.dsn)
    claim = successor.claim()
    with pytest.raises(Fenced):
        zombie.commit(LabelBatch([], [], old, 0))
    assert successor.commit(LabelBatch([], [], claim, 0)) == 5 - taken and not successor.verdicts_wait()
    for ident in ids[5:]:
        log.give(ident, "genuine", "", "bob")
    assert successor.verdicts_wait()
    assert [successor.commit(LabelBatch([], [], claim, 0)) for _ in range(2)] == [4, 0]
    assert [ident for ident, *_ in labels(shop)] == ids


def test_a_verdict_that_was_committed_out_of_order_is_not_forgotten(shop: Shop) -> None:
    first, second = shop.sell(*[shop.purchase(NOON, transaction_id=f"o-{number}", bad=True) for number in range(2)])
    slow = psycopg2.connect(shop.dsn)
    slow.cursor().execute(
        "INSERT INTO verdicts (transaction_id, says, note, analyst) VALUES (%s, 'fraud', '', 'ada')", (first,)
    )
    VerdictLog(shop.dsn).give(second, "fraud", "", "bob")
    taker = LabelLog(shop.dsn)
    claim = taker.claim()
    assert taker.commit(LabelBatch([], [], claim, 0)) == 1
    slow.commit()
    slow.close()
    assert taker.commit(LabelBatch([], [], claim, 0)) == 1
    assert [ident for ident, *_ in labels(shop)] == [second, first]
