"""PostgreSQL alone: the desk needs no other server."""

import pytest

from tests.conftest import postgres_alone

postgres = pytest.fixture(scope="session", name="postgres")(postgres_alone)
