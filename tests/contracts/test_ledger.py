"""The ledger on a real PostgreSQL: what is let in, what is live, and that nothing written is ever changed."""

import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest

from fraud_nb.adapters import ledger as module
from fraud_nb.adapters.ledger import (
    CHAMPION,
    Ledger,
    LedgerReader,
    NoSuchModel,
    NothingToRollBackTo,
    Promotion,
    standing,
    validate_bundle,
)
from fraud_nb.adapters.postgres import migrate
from fraud_nb.decision.bundle import BundleError, _unzip, _zip, sha256_of
from fraud_nb.pipeline.champion import Champion, Shelf
from tests.conftest import own_database
from tests.e2e.stream_kit import small_model

Manifest = dict[str, Any]
Tree = dict[str, Any]


class Open(NamedTuple):
    """An empty ledger."""

    dsn: str
    ledger: Ledger
    reader: LedgerReader


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_model(tmp_path_factory.mktemp("model") / "model.bundle").read_bytes()


@pytest.fixture
def opened(servers: Any) -> Iterator[Open]:
    with own_database(servers.postgres, "ledger_test") as dsn:
        migrate(dsn, 1)
        yield Open(dsn, Ledger(dsn), LedgerReader(dsn))


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any bytes are a bundle, where something else is tested."""
    monkeypatch.setattr(module, "validate_bundle", lambda content, sha256: None)


PROMOTED = (
    "INSERT INTO promotions (role, model_version, who, why, evidence) VALUES ('champion', {}, 'eve', 'x', '{{}}')"
)


def inserted(dsn: str, statement: str) -> int:
    """The number of the new row, which the database's owner writes past all checks."""
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(f"{statement} RETURNING *")
        return int(cursor.fetchone()[0])


def forged(
    content: bytes,
    change_manifest: Callable[[Manifest], object] = lambda manifest: None,
    change_tree: Callable[[Tree], object] = lambda tree: None,
) -> bytes:
    """A bundle made wrong on purpose: every hash and the seal fit."""
    files = _unzip(content)
    model = msgspec.json.decode(files["model.json"])
    change_tree(model["learner"]["gradient_booster"]["model"]["trees"][0])
    files["model.json"] = msgspec.json.encode(model)
    manifest = msgspec.json.decode(files["manifest.json"])
    manifest["files"]["model.json"] = sha256_of(files["model.json"])
    change_manifest(manifest)
    return _zip(files | {"manifest.json": msgspec.json.encode(manifest)})


def test_a_good_bundle_goes_in_and_comes_out(opened: Open, content: bytes) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    version = opened.ledger.add(content, {"auc": 0.93}, "run")
    assert opened.ledger.add(content, {"auc": 0.5}) == version, "the same bytes are the same model"
    assert opened.reader.bundle(version) == (content, sha256_of(content))
    (model,) = opened.reader.models()
    assert (model.version, model.sha256, model.metrics, model.run_id) == (
        version,
        sha256_of(content),
        {"auc": 0.93},
        "run",
    )
    assert before < model.added_at < before + timedelta(minutes=2)
    with pytest.raises(NoSuchModel, match="model 77"):
        opened.reader.bundle(77)


def test_a_bad_bundle_leaves_nothing_behind(opened: Open, content: bytes) -> None:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    with pytest.raises(BundleError, match="cut short or changed"):
        opened.ledger.add(bytes(flipped), {})
    with pytest.raises(ValueError, match="auc"):
        opened.ledger.add(content, {"auc": float("nan")})
    assert opened.reader.models() == []


def test_other_bytes_than_named_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="wrong hash"):
        validate_bundle(content[:-1], sha256_of(content))


def test_a_policy_that_makes_no_sense_is_refused(content: bytes) -> None:
    senseless = forged(content, lambda manifest: manifest["policy"].update(review_catch_rate=2))
    with pytest.raises(BundleError, match="review_catch_rate"):
        validate_bundle(senseless, sha256_of(senseless))


def test_a_model_that_crashes_xgboost_is_refused(content: bytes) -> None:
    def branch_to_nowhere(tree: Tree) -> None:
        tree["left_children"][0] = tree["right_children"][0] = 2**30

    crashing = forged(content, change_tree=branch_to_nowhere)
    with pytest.raises(BundleError, match="crashed a process"):
        validate_bundle(crashing, sha256_of(crashing))


def test_a_check_that_hangs_or_does_not_run_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK", "while True: pass")
    with pytest.raises(BundleError, match="within 0.2 s"):
        validate_bundle(b"", "", 0.2)
    monkeypatch.setattr(module, "_CHECK", "import no_such_package")
    with pytest.raises(BundleError, match="did not run.*no_such_package"):
        validate_bundle(b"", "")


@pytest.mark.usefixtures("trusting")
def test_promotions_and_rollbacks(opened: Open) -> None:
    ledger, reader = opened.ledger, opened.reader
    one, two, three = (ledger.add(bytes([number]), {}) for number in (1, 2, 3))
    assert reader.champion() is None
    with pytest.raises(NothingToRollBackTo):
        ledger.rollback("ada", "too early")
    first = ledger.promote(one, "ada", "first", {"auc": [0.91, 0.95]})
    assert reader.champion() == first
    assert (first.role, first.model_version, first.who, first.why) == (CHAMPION, one, "ada", "first")
    assert first.evidence == {"auc": [0.91, 0.95]}
    assert ledger.promote(one, "bob", "again", {}) == first, "to promote the champion changes nothing"
    with pytest.raises(NothingToRollBackTo):
        ledger.rollback("ada", "only one")
    ledger.promote(two, "ada", "better", {})
    third = ledger.promote(three, "ada", "better still", {})
    back = ledger.rollback("bob", "alerts doubled")
    assert (back.model_version, back.who, back.evidence) == (two, "bob", {"undoes": third.promotion})
    assert reader.champion() == back
    assert ledger.rollback("bob", "no better").model_version == one
    with pytest.raises(NothingToRollBackTo):
        ledger.rollback("bob", "what now")
    ledger.promote(three, "ada", "repaired", {})
    assert ledger.rollback("bob", "not at all").model_version == one
    told = [(each.model_version, each.who) for each in reader.promotions()]
    assert told == [(1, "ada"), (2, "ada"), (3, "ada"), (2, "bob"), (1, "bob"), (3, "ada"), (1, "bob")]


@pytest.mark.usefixtures("trusting")
def test_a_promotion_without_model_author_or_reason_is_refused(opened: Open) -> None:
    version = opened.ledger.add(b"model", {})
    with pytest.raises(NoSuchModel, match="model 99"):
        opened.ledger.promote(99, "ada", "why not", {})
    for who, why in (("", "better"), ("ada", "  ")):
        with pytest.raises(ValueError, match="its author and its reason"):
            opened.ledger.promote(version, who, why, {})
    with pytest.raises(ValueError, match="undoes"):
        opened.ledger.promote(version, "ada", "better", {"undoes": 1})
    assert opened.reader.promotions() == []
    assert opened.ledger.promote(version, "ada", "still works after refusals", {}).model_version == version


@pytest.mark.usefixtures("trusting")
def test_rollbacks_at_the_same_moment_undo_one_each(opened: Open) -> None:
    for number in range(6):
        opened.ledger.promote(opened.ledger.add(bytes([number]), {}), "ada", "next", {})
    people = [Ledger(opened.dsn) for _ in range(4)]
    at_once = [threading.Thread(target=person.rollback, args=("bob", "panic")) for person in people]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    promotions = opened.reader.promotions()
    assert len(promotions) == 10
    assert [each.model_version for each in standing(promotions)] == [1, 2]


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("role", ["fraud_promoter", "fraud_writer", "fraud_reader"])
def test_nobody_changes_what_is_written(opened: Open, role: str) -> None:
    opened.ledger.promote(opened.ledger.add(b"model", {}), "ada", "first", {})
    connection = psycopg2.connect(opened.dsn, options=f"-c role={role}")
    connection.autocommit = True
    forbidden = [
        "UPDATE models SET bundle = 'x'",
        "DELETE FROM models",
        "UPDATE promotions SET who = 'x'",
        "DELETE FROM promotions",
        "TRUNCATE models, promotions",
    ]
    if role != "fraud_promoter":
        forbidden.append(
            "INSERT INTO promotions (role, model_version, who, why, evidence) VALUES ('champion', 1, 'x', 'x', '{}')"
        )
        forbidden.append("INSERT INTO models (sha256, bundle, metrics) VALUES ('x', 'x', '{}')")
    for statement in forbidden:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            connection.cursor().execute(statement)
    connection.close()


def test_who_starts_under_a_broken_promotion_takes_the_last_good_one(opened: Open, tmp_path: Path) -> None:
    dsn, ledger, reader = opened
    first, second, third = (
        ledger.add(small_model(tmp_path / f"{rounds}.bundle", rounds).read_bytes(), {}) for rounds in (2, 3, 4)
    )
    broken = inserted(dsn, "INSERT INTO models (sha256, bundle, metrics) VALUES ('x', 'rubbish', '{}')")
    ledger.promote(first, "ada", "good", {})
    ledger.promote(second, "ada", "good, and taken back", {})
    ledger.rollback("ada", "too many declines")
    for _ in range(2):  # nobody but us could: `promote` knows only what was let in
        refused = inserted(dsn, PROMOTED.format(broken))
    said: list[str] = []
    champion = Champion(Shelf(reader), said.append)
    working = champion.current(None, 0)
    assert working is not None and working.version == first, "what was rolled back does not come back"
    assert champion.refused == refused and f"promotion {refused} refused" in said[0]
    assert said[1:] == [f"promotion 1, model {first}, is the last good one and judges"]
    assert champion.current(working, 2) is working and len(said) == 2, "told once"
    ledger.promote(third, "ada", "good", {})
    newest = champion.current(working, 4)
    assert newest is not None and (newest.version, champion.refused) == (third, None)
    refused = inserted(dsn, PROMOTED.format(broken))
    assert champion.current(newest, 6) is newest and champion.refused == refused
    ledger.rollback("ada", "broken")
    assert champion.current(newest, 8) is newest and champion.refused is None, "it is the champion again"


def test_where_no_promotion_can_be_served_there_is_no_model(opened: Open) -> None:
    for content in ("rubbish", "more rubbish"):
        model = inserted(
            opened.dsn, f"INSERT INTO models (sha256, bundle, metrics) VALUES ('{content}', '{content}', '{{}}')"
        )
        inserted(opened.dsn, PROMOTED.format(model))
    said: list[str] = []
    assert Champion(Shelf(opened.reader), said.append).current(None, 0) is None
    assert [line.partition(":")[0] for line in said] == ["promotion 2 refused", "promotion 1 refused"]


def test_standing_is_a_stack() -> None:
    """Against the plain way to say it: promote pushes, roll back pops."""
    rng = random.Random(3)
    for _ in range(200):
        rows: list[Promotion] = []
        stack: list[tuple[int, int]] = []  # (promotion, model)
        for number in range(1, 21):
            if len(stack) > 1 and rng.random() < 0.5:
                undone, _ = stack.pop()
                model, evidence = stack[-1][1], {"undoes": undone}
            else:
                model, evidence = rng.randrange(5), {}
                stack.append((number, model))
            rows.append(Promotion(number, CHAMPION, model, datetime(2026, 1, 1, tzinfo=UTC), "ada", "test", evidence))
            assert [(each.promotion, each.model_version) for each in standing(rows)] == stack
            assert rows[-1].model_version == standing(rows)[-1].model_version, "the newest row is the champion's"
