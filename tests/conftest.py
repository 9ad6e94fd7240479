"""Fixtures shared by all tests."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import psycopg2.extensions
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: two run at a time, and it takes as long as all others together."""
    items.sort(key=lambda item: item.path.name != "test_stream.py")


def quiet(_progress: str) -> None:
    """Nobody watches."""


class Running(NamedTuple):
    """Servers that answer, and where they live."""

    home: Path
    addresses: Any  # `.kafka`, `.redis`, `.postgres`


def running_servers(**elsewhere: str) -> Iterator[Running]:
    """Real Kafka, Valkey and PostgreSQL on loopback, without those that are said to be elsewhere."""
    from fraud_nb.adapters.servers import down, up

    # Not pytest's own folder: as root, PostgreSQL runs as `nobody`, who may not enter that one.
    with tempfile.TemporaryDirectory(prefix="fraud-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        home.chmod(0o755)
        try:
            yield Running(home, up(home, quiet, **elsewhere))
        finally:
            down(home, quiet)


def postgres_alone() -> Iterator[str]:
    """DSN of the owner; where the other servers would be, nothing listens, so they are not started."""
    with contextmanager(running_servers)(kafka="127.0.0.1:1", redis="redis://127.0.0.1:1") as running:
        yield running.addresses.postgres


@pytest.fixture(scope="session")
def servers() -> Iterator[Any]:
    """Addresses of servers that all tests share: leave room for others."""
    with contextmanager(running_servers)() as running:
        yield running.addresses


@contextmanager
def own_database(
    postgres: str,  # DSN of the owner
    name: str,
) -> Iterator[str]:
    """The DSN of a new database, which goes again: nothing can be removed from a log or a ledger."""
    owner = psycopg2.connect(postgres)
    owner.autocommit = True
    owner.cursor().execute(f"CREATE DATABASE {name}")
    try:
        yield psycopg2.extensions.make_dsn(postgres, dbname=name)
    finally:
        owner.cursor().execute(f"DROP DATABASE {name} WITH (FORCE)")
        owner.close()


@contextmanager
def tampering(postgres: str) -> Iterator[psycopg2.extensions.cursor]:
    """Change what nobody may change: as the owner, and with the triggers off."""
    options = "-c session_replication_role=replica"
    with psycopg2.connect(postgres, options=options) as connection, connection.cursor() as cursor:
        yield cursor
    connection.close()


private_servers = pytest.fixture(scope="module", name="private_servers")(running_servers)  # a test module's own
