"""Fixtures of the contracts: a log of one's own, and a worker on it."""

from collections.abc import Iterator

import pytest

from fraud_nb.adapters.postgres import migrate
from fraud_nb.apps.parts import model_in
from fraud_nb.decision.judge import Model
from tests.conftest import own_database, postgres_alone
from tests.contracts.worker_kit import PARTITIONS, Rehearsal, hired
from tests.e2e.stream_kit import small_model

alone = pytest.fixture(scope="session", name="alone")(postgres_alone)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small one."""
    return model_in(small_model(tmp_path_factory.mktemp("model") / "model.bundle", rounds=3))


@pytest.fixture
def postgres(alone: str) -> Iterator[str]:
    """DSN of the owner of an empty log."""
    with own_database(alone, "contracts") as dsn:
        migrate(dsn, PARTITIONS)
        yield dsn


@pytest.fixture
def worker(postgres: str, model: Model) -> Iterator[Rehearsal]:
    """At work on that log."""
    made = hired(postgres, model)
    yield made
    made.log.close()
    made.overview.close()
