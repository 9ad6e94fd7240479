"""The contract of the decision log: one commit point, fenced; whoever comes second changes nothing."""

from collections.abc import Iterator
from typing import NamedTuple

import psycopg2
import psycopg2.errors
import pytest

from fraud_nb.adapters.ports import Fenced
from fraud_nb.adapters.postgres import (
    NOT_YET,
    AlreadyDecided,
    AlreadyLive,
    AnswerLog,
    Batch,
    Claim,
    DeadLetter,
    HistoryLoader,
    Judgement,
    LabelBatch,
    LabelLog,
    Logged,
    Place,
    PostgresLog,
    Repeat,
    SchemaMismatch,
)
from fraud_nb.domain.schema import Label, Outcome, payload_hash
from tests.contracts.worker_kit import HOME, purchase
from tests.e2e.stream_kit import NOON

JUDGEMENT = Judgement("set", b"", 0.0, Outcome.APPROVE, (), 1, 1, 0, b"")


class Two(NamedTuple):
    """Two who write to the same log."""

    dsn: str
    one: PostgresLog
    other: PostgresLog


@pytest.fixture
def two(postgres: str) -> Iterator[Two]:
    made = Two(postgres, PostgresLog(postgres), PostgresLog(postgres))
    yield made
    made.one.close()
    made.other.close()


def decided(number: int, offset: int) -> Logged:
    each = purchase(number)
    return Logged(HOME, offset, each, each.amount_minor, payload_hash(each), NOON, JUDGEMENT)


def asked(number: int) -> Logged:
    return decided(number, NOT_YET)._replace(origin="http", state_version=0)


def batch(claim: Claim, *rows: Logged, stop: int = 1, places: tuple[Place, ...] = ()) -> Batch:
    """With a dead letter and a repeat at its first offset."""
    start = claim.next_offset
    letters = [DeadLetter(HOME, start, "message", "not_json", b"")]
    return Batch(rows, letters, [Repeat(HOME, start, "t", True)], {HOME: (claim, stop)}, places)


def contents(log: PostgresLog) -> tuple[list[int], int, int, int]:
    """Offsets of the rows, dead letters, repeats and progress."""
    rows, progress = [row.offset for page in log.read(HOME, -99, 99) for row in page], log.progress()
    with log._transaction() as cursor:
        cursor.execute("SELECT (SELECT count(*) FROM dead_letters), (SELECT count(*) FROM repeats)")
        return (rows, *cursor.fetchone(), progress[HOME])


def test_a_claim_fences_the_one_before(two: Two) -> None:
    """Also when nothing was committed in between: the offset alone would not tell them apart."""
    (first,), (second,) = (log.claim([HOME]).values() for log in (two.one, two.other))
    assert (second.epoch, second.next_offset) == (first.epoch + 1, first.next_offset)
    with pytest.raises(Fenced):
        two.one.commit(batch(first, decided(0, 0)))
    with pytest.raises(Fenced):
        two.one.skip(HOME, first, 9)
    assert contents(two.one) == ([], 0, 0, 0)
    two.other.commit(batch(second, decided(0, 0)))
    assert contents(two.one) == ([0], 1, 1, 1)


def test_nobody_commits_from_a_place_that_is_behind(two: Two) -> None:
    (claim,) = two.one.claim([HOME]).values()
    two.one.commit(batch(claim, decided(0, 0), stop=5))
    with pytest.raises(Fenced):
        two.one.commit(Batch([], [], [], {HOME: (claim, 1)}))
    assert two.one.progress()[HOME] == 5


def test_all_or_nothing(two: Two) -> None:
    """A row under an id that another one has decided takes the whole batch with it."""
    claims = two.one.claim([HOME, 1 - HOME])
    two.one.commit(batch(claims[HOME], decided(0, 0)))
    before, again = contents(two.one), Claim(claims[HOME].epoch, 1)
    with pytest.raises(AlreadyDecided):
        two.one.commit(batch(again, decided(1, 1), decided(0, 2), stop=3))
    assert contents(two.one) == before and two.one.known(["t0", "t1"]).keys() == {"t0"}


def test_what_is_known_of_an_id(two: Two) -> None:
    (claim,) = two.one.claim([HOME]).values()
    two.one.commit(batch(claim, decided(0, 0)))
    AnswerLog(two.dsn).commit([asked(1)])
    assert two.one.known(["t0", "t1", "t2"]) == {
        "t0": (payload_hash(purchase(0)), False),
        "t1": (payload_hash(purchase(1)), True),
    }


def test_a_decision_gets_its_place_once(two: Two) -> None:
    """Neither the worker nor its role can give it another one."""
    AnswerLog(two.dsn).commit([asked(0)])
    (claim,) = two.one.claim([HOME]).values()
    two.one.commit(batch(claim, places=(Place(HOME, 0, "t0"),)))
    with pytest.raises(AlreadyDecided):
        two.one.commit(batch(Claim(claim.epoch, 1), stop=2, places=(Place(HOME, 1, "t0"),)))
    assert contents(two.one) == ([0], 1, 1, 1)
    with psycopg2.connect(two.dsn, options="-c role=fraud_writer") as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.errors.RaiseException, match="its offset once"):
            cursor.execute('UPDATE decisions SET "offset" = 7')
    connection.close()


def test_the_service_cannot_decide_again(two: Two) -> None:
    (claim,) = two.one.claim([HOME]).values()
    two.one.commit(batch(claim, decided(0, 0)))
    with pytest.raises(AlreadyDecided):
        AnswerLog(two.dsn).commit([asked(1), asked(0)])
    assert two.one.known(["t1"]) == {}


def test_history_goes_in_first_and_fences_whoever_claimed_before(two: Two) -> None:
    past = decided(0, -1)._replace(judgement=None, origin="backfill")
    (claim,) = two.one.claim([HOME]).values()
    HistoryLoader(two.dsn).load([(past, [])])
    with pytest.raises(Fenced):
        two.one.commit(batch(claim, decided(1, 0)))
    (claim,) = two.one.claim([HOME]).values()
    two.one.commit(batch(claim, decided(1, 0)))
    more = past._replace(transaction=purchase(2), offset=-2)
    with pytest.raises(AlreadyLive, match="live transactions"):
        HistoryLoader(two.dsn).load([(more, [])])
    assert contents(two.one)[0] == [-1, 0]


def test_labels_are_numbered_by_one(two: Two) -> None:
    one, other = LabelLog(two.dsn), LabelLog(two.dsn)
    first, second = one.claim(), other.claim()
    label = Label("t0", True, NOON)
    with pytest.raises(Fenced):
        one.commit(LabelBatch([(label, 0)], [], first, 1))
    other.commit(LabelBatch([(label, 0)], [], second, 1))
    with pytest.raises(Fenced):
        other.commit(LabelBatch([], [], second, 0))
    assert two.one.labels() == [label]


def test_another_schema_is_refused(two: Two) -> None:
    with psycopg2.connect(two.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE schema_version SET version = version + 1")
    connection.close()
    with pytest.raises(SchemaMismatch, match="fraud migrate"):
        PostgresLog(two.dsn)
