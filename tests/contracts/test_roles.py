"""The roles of PostgreSQL: whoever logs in with a role's password has exactly the rights its work needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest

from fraud_nb.adapters.ledger import Ledger, LedgerReader
from fraud_nb.adapters.ports import StoreUnavailable
from fraud_nb.adapters.postgres import MIGRATIONS, ROLES, LogReader, PostgresLog, SchemaMismatch, let_in, migrate
from tests.conftest import own_database

PASSWORDS = {role: f"pass'word @:/%ü of {role}" for role in ROLES}
# Besides this, and one column of decisions, nobody changes anything.
INSERTS = {
    "fraud_writer": {
        "decisions", "dead_letters", "repeats", "feature_sets", "labels", "label_dead_letters", "shared_versions",
        "progress", "gaps", "topics",
    },
    "fraud_reader": set(),
    "fraud_promoter": {"models", "promotions", "runs"},
    "fraud_analyst": {"verdicts"},
}  # fmt: skip
UPDATES = {"fraud_writer": {"progress", "label_progress"}, "fraud_promoter": {"runs"}}


@pytest.fixture(scope="module")
def owner(servers: Any) -> Iterator[str]:
    with own_database(servers.postgres, "roles_test") as dsn:
        migrate(dsn, 1)
        let_in(dsn, PASSWORDS)
        yield dsn


def login(owner: str, role: str, password: str) -> str:
    return psycopg2.extensions.make_dsn(owner, user=role, password=password)


def allowed(dsn: str, statement: str) -> bool:
    """Whether the server lets this user do that; it is not done."""
    connection = psycopg2.connect(dsn)
    try:
        connection.cursor().execute(statement)
    except psycopg2.errors.InsufficientPrivilege:
        return False
    finally:
        connection.close()
    return True


def last_columns(owner: str) -> dict[str, str]:
    """A column of each table that a statement may name: the first may be one that nobody can set."""
    with psycopg2.connect(owner) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT table_name, (array_agg(column_name ORDER BY ordinal_position DESC))[1] "
            "FROM information_schema.columns WHERE table_schema = 'public' GROUP BY 1"
        )
        return dict(cursor.fetchall())


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_the_rights_of_its_work_and_no_other(owner: str, role: str) -> None:
    dsn, columns = login(owner, role, PASSWORDS[role]), last_columns(owner)
    assert {"decisions", "verdicts", "promotions"} < set(columns)

    def may(statement: str) -> set[str]:
        return {
            table for table, column in columns.items() if allowed(dsn, statement.format(table=table, column=column))
        }

    assert may("SELECT {column} FROM {table} LIMIT 0") == set(columns), "to look is part of every work"
    assert may("INSERT INTO {table} ({column}) SELECT {column} FROM {table} WHERE false") == INSERTS[role]
    assert may("UPDATE {table} SET {column} = {column} WHERE false") == UPDATES.get(role, set())
    assert may("DELETE FROM {table} WHERE false") == set()
    assert may("TRUNCATE {table}") == set()
    assert not allowed(dsn, "CREATE TABLE mine (number integer)")
    assert allowed(dsn, 'UPDATE decisions SET "offset" = 1 WHERE false') == (role == "fraud_writer")
    assert not allowed(dsn, "UPDATE decisions SET outcome = 'approve' WHERE false")


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_become_the_reader_and_nobody_else(owner: str, role: str) -> None:
    dsn = login(owner, role, PASSWORDS[role])
    assert {other for other in ROLES if allowed(dsn, f"SET ROLE {other}")} == {role, "fraud_reader"}


@pytest.mark.parametrize("password", ["", "wrong"])
def test_no_login_without_the_password(owner: str, password: str) -> None:
    for role in ROLES:
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(login(owner, role, password))


def test_a_process_opens_what_its_login_may(owner: str) -> None:
    writer, promoter = (login(owner, role, PASSWORDS[role]) for role in ("fraud_writer", "fraud_promoter"))
    assert PostgresLog(writer).progress() == LogReader(writer).progress() == {0: 0}
    assert LedgerReader(writer).champion() is None
    assert Ledger(promoter).models() == []
    for opening in (lambda: Ledger(writer), lambda: PostgresLog(promoter)):
        with pytest.raises(StoreUnavailable):
            opening()


def test_migrating_again_changes_nothing_and_a_new_password_replaces_the_old(owner: str) -> None:
    old = login(owner, "fraud_reader", PASSWORDS["fraud_reader"])
    assert migrate(owner, 1) == len(MIGRATIONS)
    assert allowed(old, "SELECT 1")
    let_in(owner, {"fraud_reader": "another"})
    try:
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(old)
        assert allowed(login(owner, "fraud_reader", "another"), "SELECT 1")
        assert allowed(login(owner, "fraud_writer", PASSWORDS["fraud_writer"]), "SELECT 1")
    finally:
        let_in(owner, PASSWORDS)


def test_no_log_of_the_server_holds_a_password(owner: str) -> None:
    """Also where it writes down every statement."""
    let_in(psycopg2.extensions.make_dsn(owner, options="-c log_statement=all"), PASSWORDS)
    with psycopg2.connect(owner) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW data_directory")
        written = (Path(cursor.fetchone()[0]).parent / "log").read_text(errors="replace")
    assert "ALTER ROLE fraud_analyst LOGIN PASSWORD 'SCRAM-SHA-256$" in written
    assert "of fraud_analyst" not in written and "pass'" not in written


def test_only_the_owner_migrates(owner: str) -> None:
    writer = login(owner, "fraud_writer", PASSWORDS["fraud_writer"])
    for change in (lambda: migrate(writer, 1), lambda: let_in(writer, {"fraud_reader": "mine now"})):
        with pytest.raises(StoreUnavailable, match="does not own the schema"):
            change()
    with pytest.raises(StoreUnavailable, match="owner cannot connect") as refused:
        migrate(login(owner, "fraud", "hunter2"), 1)
    assert "hunter2" not in str(refused.value)


def test_a_schema_of_tomorrow_is_left_alone(servers: Any) -> None:
    with own_database(servers.postgres, "tomorrow_test") as dsn:
        migrate(dsn, 1)
        with psycopg2.connect(dsn) as connection:
            connection.cursor().execute("INSERT INTO schema_version VALUES (99)")
        connection.close()
        with pytest.raises(SchemaMismatch, match="newer than this program"):
            migrate(dsn, 1)
