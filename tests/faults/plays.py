"""The 24 faults: how each is brought about, and what else than the invariants must hold."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.proxy import asks, commits_decisions
from tests.faults.stage import KAFKA, POSTGRES, REDIS, Stage, until

STEPS = ("decoded", "decided", "committing", "committed", "saved", "publishing", "published", "version-closed")
RECOVERY = ("claimed", "rolled-forward", "publishing-again", "wiped", "rolling", "building")
END_OF_TRANSACTION = 26  # Kafka's number for that request
END_OF_SESSION_S = 6.0  # of a worker in the group


@dataclass(frozen=True)
class Play:
    """One fault."""

    number: int
    title: str
    play: Callable[[Stage], None]
    is_thorough: bool  # at every seed; else at three of them


PLAYS: dict[int, Play] = {}


def fault(
    number: int, title: str, thorough: bool = False
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Put the function into the table."""

    def register(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        PLAYS[number] = Play(number, title, play, thorough)
        return play

    return register


def killed(stage: Stage, failpoint: str, deadline_s: float = 60) -> None:
    """A worker that must die at this point."""
    assert stage.start(failpoint).wait_for_end(deadline_s) == -signal.SIGKILL, stage.workers[-1].last_words()


@fault(1, "worker killed at a step", thorough=True)
def worker_killed(stage: Stage) -> None:
    with stage.flow():
        for step in stage.rng.sample(STEPS, 2):
            killed(stage, f"{step}:{stage.rng.randint(1, 4)}")
        stage.ready()
    stage.settle()


@fault(2, "worker killed while it recovers", thorough=True)
def recovery_killed(stage: Stage) -> None:
    with stage.flow():
        killed(stage, f"{stage.rng.choice(('committed', 'saved', 'publishing'))}:{stage.rng.randint(2, 4)}")
        for step in stage.rng.sample(RECOVERY, 2):
            if step in ("wiped", "rolling", "building"):
                stage.redis.flushall()
            if step == "publishing-again":
                killed(stage, "committed")
            killed(stage, step)
    stage.settle()


@fault(3, "zombie: asleep for longer than its session lasts, then awake", thorough=True)
def zombie(stage: Stage) -> None:
    step = stage.rng.choice(("decided", "committing", "committed", "saved", "publishing"))
    with stage.flow():
        asleep = stage.start(f"{step}:{stage.rng.randint(1, 4)}:stop")
        until(lambda: is_asleep(asleep.process.pid), "the worker is asleep")
        stage.ready()
    until(stage.is_settled, "the other one took over")
    asleep.send(signal.SIGCONT)
    until(lambda: asleep.restarts() > 0, "the one that slept finds out")
    with stage.flow():
        pass
    stage.settle()


def is_asleep(pid: int) -> bool:
    """Whether the process is stopped."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(") ")[2].startswith("T")


@fault(5, "Redis killed under load", thorough=True)
def redis_killed(stage: Stage) -> None:
    a_server_killed(stage, REDIS)


@fault(10, "PostgreSQL killed under load", thorough=True)
def postgres_killed(stage: Stage) -> None:
    a_server_killed(stage, POSTGRES)


@fault(16, "Kafka killed under load, or its connections reset", thorough=True)
def kafka_killed(stage: Stage) -> None:
    if stage.rng.random() < 0.5:
        return a_server_killed(stage, KAFKA)
    stage.ready()
    with stage.flow():
        for _ in range(3):
            some_way(stage)
            stage.proxies[KAFKA].cut()
    stage.settle()


def some_way(stage: Stage, deadline_s: float = 60) -> None:
    """Let the workers come some way further."""
    goal = stage.decided() + stage.rng.randint(50, stage.size // 4)
    until(lambda: stage.decided() >= goal, "the worker goes on", deadline_s)


def a_server_killed(stage: Stage, number: int) -> None:
    """It is killed while a worker works, and comes back."""
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.kill_server(number)
        stage.servers_up()
    stage.settle()


@fault(7, "Redis emptied")
def redis_emptied(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.redis.flushall()
    stage.settle()


@fault(11, "PostgreSQL commits, and its reply is lost", thorough=True)
def commit_reply_lost(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.proxies[POSTGRES].arm(commits_decisions, "reset", stage.rng.randint(1, 9))
        until(stage.proxies[POSTGRES].struck.is_set, "a commit without a reply")
    stage.settle()


@fault(18, "Kafka commits a publish, and its reply is lost", thorough=True)
def publish_reply_lost(stage: Stage) -> None:
    stage.ready()
    with stage.flow():
        some_way(stage)
        stage.proxies[KAFKA].arm(asks(END_OF_TRANSACTION), stage.rng.choice(("reset", "swallow")), 2)
        until(stage.proxies[KAFKA].struck.is_set, "a publish without a reply")
    stage.settle()
