"""PostgreSQL alone: the desk needs no other server."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import quiet


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """DSN of the owner; where the others would be, nothing listens, so they are not started."""
    from fraud_nb.adapters.servers import down, up

    with tempfile.TemporaryDirectory(prefix="fraud-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        home.chmod(0o755)
        try:
            yield up(home, quiet, kafka="127.0.0.1:1", redis="redis://127.0.0.1:1").postgres
        finally:
            down(home, quiet)
