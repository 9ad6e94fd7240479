"""Labels are numbered once, whatever happens to those who take them in; the log is real, the bus is doubled."""

import msgspec
import pytest

from fraud_nb.adapters.memory import MemorySink, MemorySource
from fraud_nb.adapters.ports import BusUnavailable, Fenced
from fraud_nb.adapters.postgres import LabelLog
from fraud_nb.domain.schema import Label
from fraud_nb.pipeline.intake import Intake, take_in
from tests.conftest import tampering
from tests.contracts.worker_kit import failing_once
from tests.e2e.stream_kit import NOON


def labels_of(count: int, source: MemorySource) -> None:
    for number in range(count):
        label = Label(f"t{number}", True, NOON + number, "chargeback")
        source.append(msgspec.json.encode(label), timestamp_ms=NOON + number)


def offsets_of_labels(postgres: str) -> list[tuple[int, int]]:
    """Number and offset of each label."""
    with tampering(postgres) as cursor:
        cursor.execute('SELECT label_seq, "offset" FROM labels ORDER BY label_seq')
        return list(cursor.fetchall())


def intake_on(source: MemorySource, postgres: str) -> Intake:
    made = Intake(source, MemorySink(source), LabelLog(postgres))
    take_in(made)
    return made


def test_labels_are_numbered_once(postgres: str) -> None:
    """The one who takes them in fails behind its commit, and begins again."""
    source = MemorySource(topic="labels")
    intake = intake_on(source, postgres)
    labels_of(3, source)
    source.append(b"{", timestamp_ms=NOON)
    failing_once(intake.sink, "publish", BusUnavailable("Kafka: away"))
    with pytest.raises(BusUnavailable):
        take_in(intake)
    labels_of(1, source)
    while take_in(intake) or take_in(intake):
        pass
    assert offsets_of_labels(postgres) == [(1, 0), (2, 1), (3, 2), (4, 4)]
    letters = intake.sink.published  # type: ignore[attr-defined]
    assert [dict(each.headers)["source"] for each in letters] == [b"labels:3"] and source.committed(0) == 5


def test_labels_that_a_log_forgot_are_taken_in_again(postgres: str) -> None:
    source = MemorySource(topic="labels")
    intake = intake_on(source, postgres)
    labels_of(3, source)
    assert take_in(intake) == 3
    with tampering(postgres) as cursor:
        cursor.execute("UPDATE label_progress SET next_offset = 1, next_seq = 2")
        cursor.execute("DELETE FROM labels WHERE label_seq > 1")
    source.rebalance([0])
    take_in(intake)
    assert take_in(intake) == 2
    assert offsets_of_labels(postgres) == [(1, 0), (2, 1), (3, 2)]


def test_who_was_overtaken_numbers_no_label(postgres: str) -> None:
    source = MemorySource(topic="labels")
    intake, other = intake_on(source, postgres), LabelLog(postgres)
    labels_of(2, source)
    other.claim()
    with pytest.raises(Fenced):
        take_in(intake)
    assert offsets_of_labels(postgres) == []
