"""The scheduler: its nights on a clock of our own and a real PostgreSQL, and its processes as they are."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from fraud_nb.adapters.kafka_bus import murmur2_partitions
from fraud_nb.adapters.ledger import LedgerReader, Run, RunLog, RunReader, Taken
from fraud_nb.adapters.ports import StoreUnavailable
from fraud_nb.adapters.postgres import HistoryLoader, migrate
from fraud_nb.apps.schedule import (
    GATE,
    GRACE_S,
    RETRY_S,
    Job,
    JobCollector,
    Process,
    Scheduler,
    due_after,
    jobs_of,
    look_after,
    run_now,
    run_when_due,
    start_job,
    stop,
    take_turn,
    timetable,
)
from fraud_nb.domain.config import Settings
from fraud_nb.domain.money import Rates
from fraud_nb.learning.simulate import World
from fraud_nb.operations.backfill import backfill, simulated_past
from tests.conftest import own_database
from tests.e2e.stream_kit import MAIN, fraud

ROOT = Path(__file__).parents[2]
EVENING = datetime(2026, 11, 27, 20, tzinfo=UTC)
NIGHT_S = 7 * 3600  # from the evening to three o'clock
ALONE = ("--history", "simulated", "-p", "release=false")  # a retrain that needs no servers and takes a while


@pytest.fixture
def dsn(servers: Any) -> Iterator[str]:
    with own_database(servers.postgres, "schedule_test") as dsn:
        migrate(dsn, 1)
        yield dsn


def wait_until(holds: Callable[[], Any], what: str, deadline_s: float = 90) -> Any:
    until = time.monotonic() + deadline_s
    while not (found := holds()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return found


# The nights


@dataclass
class Play:
    """A process that does as the test says."""

    code: int | None = None
    is_stopped: bool = False

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.is_stopped = True


@dataclass
class Stage:
    """A scheduler on a clock that stands still until it is moved."""

    scheduler: Scheduler
    job: Job
    log: list[logging.LogRecord]
    moment: datetime = EVENING
    plays: list[Play] = field(default_factory=list)  # that were started
    notes: dict[str, Any] = field(default_factory=dict)  # what the next process leaves behind
    words: list[str] = field(default_factory=list)  # of the last one
    refuses: bool = False

    def start(self, words: Sequence[str], log: Path) -> Process:
        if self.refuses:
            raise OSError(12, "Cannot allocate memory")
        log.parent.mkdir(parents=True)
        log.write_text(self.notes.get("says", ""))
        if "error" in self.notes:
            name, text = self.notes["error"]
            cell = {"outputs": [{"output_type": "error", "ename": name, "evalue": text}]}
            log.with_suffix(".ipynb").write_text(json.dumps({"cells": [cell]}))
        if "model" in self.notes:
            (log.parent / "result.json").write_text(json.dumps({"model_version": self.notes["model"]}))
        self.words = list(words)
        self.plays.append(Play())
        return self.plays[-1]

    def later(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        take_turn(self.scheduler)

    def end(self, code: int) -> None:
        """The process that runs ends now."""
        self.plays[-1].code = code
        take_turn(self.scheduler)

    def rows(self) -> list[tuple[int, str, str | None]]:
        """Attempt, outcome and error, oldest first."""
        return [(run.attempt, run.outcome, run.error) for run in reversed(self.scheduler.runs.history(20))]

    def told(self, level: int) -> list[Mapping[str, Any]]:
        return [record.fields for record in self.log if record.levelno == level]  # type: ignore[attr-defined]

    def counted(self, outcome: str) -> float:
        samples = [sample for metric in JobCollector(self.scheduler.books).collect() for sample in metric.samples]
        (value,) = (sample.value for sample in samples if sample.labels == {"job": "retrain", "outcome": outcome})
        return float(value)


@pytest.fixture
def stage(dsn: str, tmp_path: Path) -> Iterator[Stage]:
    logger, records = logging.getLogger("fraud.test_schedule"), []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    job, _ = jobs_of(Settings(retrain_timeout_s=600))
    runs = RunLog(dsn)
    stage = Stage(
        Scheduler(runs, tmp_path, lambda *told: stage.start(*told), lambda: stage.moment,
                  lambda: stage.moment.timestamp(), logger), job, records,
    )  # fmt: skip
    runs.lead()
    look_after(stage.scheduler, job, due_after(job.trigger, EVENING))
    yield stage
    runs.close()
    logger.removeHandler(handler)


def test_a_night_that_ends_well(stage: Stage) -> None:
    stage.notes = {"model": 7}
    stage.later(NIGHT_S - 1)
    assert stage.rows() == []
    stage.later(1)
    assert stage.rows() == [(1, "running", None)]
    stage.later(60)
    stage.end(0)
    (run,) = stage.scheduler.runs.history(5)
    assert (run.outcome, run.model_version, run.error) == ("done", 7, None)
    assert stage.words[:2] == ["retrain", "--promote"] and "who=fraud schedule" in stage.words
    assert f"why=scheduled, run {run.run}" in stage.words
    assert stage.counted("done") == 1 and not stage.told(logging.ERROR)
    assert stage.scheduler.books.successes["retrain"] == stage.moment.timestamp()
    stage.later(24 * 3600 - 60)
    assert stage.rows()[1:] == [(1, "running", None)], "the next night"


def test_a_failure_is_loud_and_tried_once_more(stage: Stage) -> None:
    stage.notes = {"error": ("KeyError", "customer 17")}
    stage.later(NIGHT_S)
    stage.end(1)
    assert stage.rows() == [(1, "failed", "KeyError in the notebook")]
    stage.later(RETRY_S - 1)
    assert len(stage.plays) == 1
    stage.later(1)
    stage.end(1)
    stage.later(10 * RETRY_S)
    assert [row[:2] for row in stage.rows()] == [(1, "failed"), (2, "failed")]
    first, second = stage.told(logging.ERROR)
    assert (first["job"], first["outcome"], second["attempt"]) == ("retrain", "failed", 2)
    assert first["notebook"].endswith("retrain.ipynb") and Path(first["notebook"]).exists()
    assert stage.counted("failed") == 2 and "customer 17" not in str(stage.told(logging.ERROR))


def test_a_second_attempt_may_do_well(stage: Stage) -> None:
    stage.notes = {"says": "fraud: postgres: no connection\n"}
    stage.later(NIGHT_S)
    stage.end(1)
    stage.later(RETRY_S)
    stage.end(0)
    assert stage.rows() == [(1, "failed", "postgres: no connection"), (2, "done", None)]


@pytest.mark.parametrize(
    ("code", "notes", "error"),
    [
        (1, {"error": (GATE, "auc is 0.870, at least 0.9 is required")}, "auc is 0.870, at least 0.9 is required"),
        (2, {"says": "fraud: dys: no such parameter; did you mean days?\n"}, "dys: no such parameter"),
    ],
    ids=["gate", "wrong option"],
)
def test_what_cannot_change_is_not_tried_again(stage: Stage, code: int, notes: dict[str, Any], error: str) -> None:
    stage.notes = notes
    stage.later(NIGHT_S)
    stage.end(code)
    stage.later(10 * RETRY_S)
    ((attempt, outcome, told),) = stage.rows()
    assert (attempt, outcome) == (1, "failed") and told is not None and error in told
    assert len(stage.told(logging.ERROR)) == 1


def test_a_process_that_cannot_be_started_has_failed(stage: Stage) -> None:
    stage.refuses = True
    stage.later(NIGHT_S)
    stage.later(0)
    assert stage.rows() == [(1, "failed", "not started: Cannot allocate memory")]
    stage.refuses = False
    stage.later(RETRY_S)
    stage.end(-signal.SIGKILL)
    assert stage.rows()[1:] == [(2, "failed", "ended by SIGKILL")]


def test_a_trigger_during_a_run_is_skipped(stage: Stage) -> None:
    stage.scheduler.slots[0].job = replace(stage.job, timeout_s=10**6)
    stage.later(NIGHT_S)
    stage.later(24 * 3600)
    assert [row[:2] for row in stage.rows()] == [(1, "running"), (1, "skipped")]
    assert stage.counted("skipped") == 1 and len(stage.plays) == 1
    assert stage.told(logging.ERROR)[0]["outcome"] == "skipped"


def test_a_job_that_runs_elsewhere_is_skipped(stage: Stage, dsn: str) -> None:
    by_hand = RunLog(dsn)
    by_hand.start("retrain", 1)
    stage.scheduler.runs.lead()  # a scheduler that starts now does not take it for lost
    stage.later(NIGHT_S)
    by_hand.close()
    assert stage.rows() == [(1, "running", None), (1, "skipped", "it runs elsewhere")] and not stage.plays


def test_too_long_is_ended_and_not_tried_again(stage: Stage) -> None:
    stage.later(NIGHT_S)
    stage.later(600)
    assert not stage.plays[0].is_stopped
    stage.later(1)
    stage.later(10 * RETRY_S)
    assert stage.plays[0].is_stopped and stage.rows() == [(1, "timed out", "longer than 600 s")]
    assert stage.counted("timed out") == 1 and stage.told(logging.ERROR)[0]["outcome"] == "timed out"


def test_nights_that_were_missed_are_one_skipped_row(stage: Stage) -> None:
    """A machine that slept for three nights, and woke up long after the last of them."""
    stage.later(NIGHT_S + 3 * 24 * 3600 + GRACE_S + 1)
    assert [row[:2] for row in stage.rows()] == [(1, "skipped")] and not stage.plays
    stage.later(24 * 3600 - GRACE_S)
    assert [row[:2] for row in stage.rows()] == [(1, "skipped"), (1, "running")]


def end_connections(dsn: str) -> None:
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    connection.close()


def test_a_broken_connection_costs_a_turn_and_no_lock(stage: Stage, dsn: str) -> None:
    stage.later(NIGHT_S)
    end_connections(dsn)
    stage.end(0)
    assert len(stage.told(logging.ERROR)) == 1, "the database was away, told once"
    assert stage.rows() == [(1, "done", None)]
    with pytest.raises(Taken):
        RunLog(dsn).lead()
    assert RunLog(dsn).start("retrain", 1) is not None, "the job's lock was given back"


def test_a_database_that_is_away_puts_the_run_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str, attempt: int) -> int:
        raise StoreUnavailable("postgres: no connection")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(stage.scheduler.runs, "start", away)
        stage.later(NIGHT_S)
        stage.later(GRACE_S / 2)
        assert stage.rows() == [] and len(stage.told(logging.ERROR)) == 1
    stage.later(1)
    assert stage.rows() == [(1, "running", None)]


def test_who_was_taken_over_ends_its_job(stage: Stage, dsn: str) -> None:
    successors: list[RunLog] = []

    def pause(seconds: float) -> None:
        if not successors:
            end_connections(dsn)
            successors.append(RunLog(dsn))
            successors[0].lead()

    stage.moment += timedelta(seconds=NIGHT_S)
    with pytest.raises(Taken):
        run_when_due(stage.scheduler, (), lambda: False, pause)
    assert stage.plays[0].is_stopped
    assert [(run.outcome, run.error) for run in successors[0].history(5)] == [("lost", "whoever ran it is gone")]
    successors[0].close()


def test_being_told_to_stop_ends_the_job(stage: Stage) -> None:
    stage.later(NIGHT_S)
    stop(stage.scheduler)
    assert stage.plays[0].is_stopped and stage.rows() == [(1, "lost", "the scheduler was told to stop")]
    assert stage.counted("lost") == 1


def test_a_run_by_hand_retries_and_tells_how_it_went(stage: Stage, dsn: str) -> None:
    stage.scheduler.slots.clear()
    codes = [1, 0]

    def pause(seconds: float) -> None:
        stage.moment += timedelta(seconds=RETRY_S / 2)
        if stage.plays and stage.plays[-1].code is None:
            stage.plays[-1].code = codes.pop(0)

    assert run_now(stage.scheduler, stage.job, lambda: False, pause)
    assert [row[:2] for row in stage.rows()] == [(1, "failed"), (2, "done")]
    lines = list(timetable([stage.job], RunReader(dsn), EVENING))
    assert len(lines) == 1
    assert lines[0].startswith("retrain  0 3 * * *  next 2026-11-28 03:00 UTC  last done ")


# The processes


@dataclass
class Command:
    """`fraud schedule` as a process, its words in a file."""

    environment: dict[str, str]
    folder: Path

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
        with (self.folder / "said.log").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-c", MAIN, "schedule", *words], env=kept | self.environment, stderr=said
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "said.log").read_text()


@pytest.fixture
def command(servers: Any, dsn: str, tmp_path: Path) -> Command:
    return Command(
        {
            "FRAUD_HOME": str(tmp_path / "home"),
            "FRAUD_KAFKA": servers.kafka,
            "FRAUD_REDIS": servers.redis,
            "FRAUD_POSTGRES": dsn,
            "FRAUD_RETRAIN_CRON": "off",
            "FRAUD_VERIFY_CRON": "off",
            "FRAUD_PARTITIONS": "1",
            "PYTHONPATH": str(ROOT),
        },
        tmp_path,
    )


def family_of(process: int, folder: Path) -> list[psutil.Process]:
    """The retrain, its kernel, and whatever else there is, once the kernel has executed a cell."""

    def family() -> list[psutil.Process]:
        found = psutil.Process(process).children(recursive=True)
        kernels = [each for each in found if "ipykernel_launcher" in " ".join(each.cmdline())]
        executed = any('execution_count": 1' in path.read_text() for path in folder.glob("**/retrain.ipynb"))
        return found if kernels and executed else []

    found: list[psutil.Process] = wait_until(family, "no kernel at work")
    assert len({os.getsid(each.pid) for each in found}) > 1, (
        "the kernel left the command's session: signals must follow"
    )
    return found


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_the_timeout_ends_the_kernel_too(dsn: str, tmp_path: Path) -> None:
    now_s = [0.0]
    job = Job("retrain", ("retrain", *ALONE), "off", None, 600)
    runs = RunLog(dsn)
    scheduler = Scheduler(
        runs, tmp_path, start_job, lambda: EVENING, lambda: now_s[0], logging.getLogger("fraud.test_schedule")
    )  # fmt: skip
    look_after(scheduler, job, EVENING)
    take_turn(scheduler)
    family = family_of(os.getpid(), tmp_path)
    now_s[0] = 601.0
    take_turn(scheduler)
    assert_gone(family)
    run = runs.last("retrain")
    assert run is not None and run.outcome == "timed out" and run.notebook is not None
    runs.close()


def test_sigterm_ends_the_job_and_a_killed_scheduler_is_found_out(command: Command, dsn: str) -> None:
    """First asked to end, then killed: either way nothing is left running, and the rows say what happened."""
    command.environment["FRAUD_RETRAIN_OPTIONS"] = " ".join(ALONE)
    home, reader = Path(command.environment["FRAUD_HOME"]), RunReader(dsn)
    for number, code in ((signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)):
        process = command.begin("--run", "retrain")
        last = wait_until(lambda: (run := reader.last("retrain")) and run.outcome == "running" and run, command.said())
        family = family_of(process.pid, next((home / "runs").glob(f"*_{last.run}")).parent)
        process.send_signal(number)
        assert process.wait(60) == code, command.said()
        assert_gone(family)
    killed, stopped = reader.history(5)
    assert (stopped.outcome, stopped.error) == ("lost", "the scheduler was told to stop")
    assert killed.outcome == "running", "nobody has looked"
    runs = RunLog(dsn)
    wait_until(lambda: runs.lead() or True, "the lock of a dead process is free")
    lost: Run | None = reader.last("retrain")
    assert lost is not None and (lost.outcome, lost.error) == ("lost", "whoever ran it is gone")


def test_there_is_one_scheduler(command: Command) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = command.begin("--metrics-port", str(port))
    try:
        wait_until(lambda: '"event": "ready"' in command.said(), "not ready")
        second = fraud(command.environment, "schedule")
        assert second.returncode == 1 and "another scheduler is at work" in second.stderr
        listed = fraud(command.environment, "schedule", "--list")
        assert listed.returncode == 0
        assert listed.stdout == "".join(f"{job}  off  not scheduled  never run\n" for job in ("retrain", "verify"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert 'fraud_job_runs_total{job="retrain",outcome="failed"} 0.0' in answer.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, command.said()


@pytest.mark.parametrize(
    ("variables", "words", "told"),
    [
        ({"FRAUD_RETRAIN_CRON": "3 o'clock"}, (), "FRAUD_RETRAIN_CRON: write five fields of cron"),
        ({"FRAUD_RETRAIN_CRON": "0 3 * * 1"}, ("--list",), "such as 0 3 * * mon-fri; or off"),
        ({"FRAUD_RETRAIN_OPTIONS": "--quik"}, (), "FRAUD_RETRAIN_OPTIONS: write options that fraud retrain has"),
        ({"FRAUD_RETRAIN_OPTIONS": "-p 'why"}, (), "FRAUD_RETRAIN_OPTIONS: close the quotation"),
        ({"FRAUD_RETRAIN_TIMEOUT_S": "1 h"}, (), "FRAUD_RETRAIN_TIMEOUT_S: write whole seconds"),
        ({}, ("--run", "retrian"), "invalid choice: 'retrian' (choose from"),
    ],
)
def test_wrong_usage_exits_2(tmp_path: Path, variables: dict[str, str], words: tuple[str, ...], told: str) -> None:
    done = fraud({"FRAUD_HOME": str(tmp_path), **variables}, "schedule", *words)
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()), "nothing was started"


@pytest.mark.timeout(600)
def test_a_scheduled_retrain_makes_a_champion(command: Command, dsn: str) -> None:
    """The real thing once: from the log's own history to the ledger's newest row."""
    world = World(customers=900, days=110)
    backfill(
        HistoryLoader(dsn), lambda: simulated_past(world), 1, murmur2_partitions, Rates("EUR"), lambda *how_far: None
    )  # fmt: skip
    options = "--quick -p min_auc=0.5 -p min_average_precision=0.01 -p min_recall=0.05"
    command.environment["FRAUD_RETRAIN_OPTIONS"] = options
    process = command.begin("--run", "retrain")
    assert process.wait(540) == 0, command.said()
    last, champion = RunReader(dsn).last("retrain"), LedgerReader(dsn).champion()
    assert last is not None and champion is not None
    assert (last.outcome, last.attempt, last.model_version) == ("done", 1, champion.model_version)
    assert (champion.who, champion.why) == ("fraud schedule", f"scheduled, run {last.run}")
    assert last.notebook is not None and "passed" in Path(last.notebook).read_text()
    ended = json.loads(command.said().splitlines()[-1])
    assert (ended["event"], ended["outcome"], ended["notebook"]) == ("ended", "done", last.notebook)
