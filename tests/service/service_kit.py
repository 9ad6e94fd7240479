"""What the service tests share: a predictor without servers, a service over it on a real socket, and ways to ask."""

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import uvicorn

from fraud_nb.adapters.ports import Unavailable
from fraud_nb.apps.metrics import JsonLines
from fraud_nb.apps.service import Running
from fraud_nb.domain.config import Settings
from fraud_nb.domain.schema import Outcome, Reason, Transaction
from fraud_nb.pipeline.champion import Champion
from fraud_nb.pipeline.predict import Answer, Health, IdConflict, Request
from tests.faults.corpus import CANARY

KEY = "a key of the tests".replace(" ", "-")
SEED = (
    b'{"transaction_id":"TEST123","amount":1500.00,"category":"online_retail","hour":2,"day_of_week":3,'
    b'"latitude":37.7749,"longitude":-122.4194}'
)
JSON = {"Content-Type": "application/json"}


def full(number: object, **more: object) -> dict[str, Any]:
    """A purchase of a customer, now."""
    purchase = {"transaction_id": f"t-{number}", "customer_id": "ada", "amount": 12.5, "merchant_id": "books"}
    return {**purchase, "event_time": time.time_ns() // 1_000_000, **more}


@dataclass
class Double:
    """A predictor that remembers, and whose servers come and go as a test wishes."""

    model: Any = field(default_factory=lambda: SimpleNamespace(version=1))
    decided: dict[str, tuple[Request, Answer]] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    may_go: threading.Event = field(default_factory=threading.Event)
    status: str = "ok"
    recorded: bool = True
    breaks_on: str = ""  # an id on which it fails as nobody expects
    swept: int = 0
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.may_go.set()

    def predict(self, requests: Sequence[Request], now_ms: int) -> list[Answer | IdConflict]:
        self.groups.append(len(requests))
        assert self.may_go.wait(30)
        if self.status == "down":
            raise Unavailable(f"postgres: no connection to {CANARY}")
        if any(each.transaction_id == self.breaks_on for each in requests):
            raise ZeroDivisionError(CANARY)
        return [self._one(each) for each in requests]

    def _one(self, request: Request) -> Answer | IdConflict:
        known = self.decided.get(request.transaction_id)
        if known is not None:
            return known[1] if known[0] == request else IdConflict(request.transaction_id)
        kind = "live" if isinstance(request, Transaction) else "stateless"
        reasons = (Reason("AMOUNT", "an amount of 1500.00 EUR", 0.7),)
        answer = Answer(
            request.transaction_id, 0.25, Outcome.REVIEW, reasons, self.model.version, 1, 7, kind, self.recorded
        )
        self.decided[request.transaction_id] = (request, answer)
        return answer

    def find(self, transaction_id: str) -> Answer | None:
        if self.status == "down":
            raise Unavailable("postgres: no connection")
        known = self.decided.get(transaction_id)
        return None if known is None else known[1]

    def health(self) -> Health:
        up = self.status == "ok"
        return Health(self.status, up, True, self.status != "down", self.model.version, 40 if up else None, 0)  # type: ignore[arg-type]

    def sweep(self, now_ms: int) -> int:
        self.swept += 1
        return 0

    def close(self) -> None:
        self.is_closed = True


class Told(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | str | Any = None,  # bytes as they are; a generator of bytes goes out in chunks
    headers: dict[str, str] | None = None,
    timeout_s: float = 30,
) -> Told:
    """One question on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path, body, JSON if headers is None else headers)
        response = connection.getresponse()
        return Told(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def patiently(port: int, body: bytes | None) -> Told:
    """What `/predict` answers; a busy machine may be too slow, and is asked again, with the same id, as it says."""
    for _ in range(20):
        told = ask(port, "POST", "/predict", body)
        if told.status != 503:
            break
    return told


def raw(port: int, request: bytes) -> bytes:
    """What comes back for these bytes, until the other side closes or has said all."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
        return b"".join(parts)


def wait_until(holds: Callable[[], object], what: str, deadline_s: float = 60) -> None:
    """Ask until it is so."""
    until = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < until, f"not within {deadline_s} s: {what}"
        time.sleep(0.05)


class Lines(logging.Handler):
    """Log lines as they would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass
class House:
    """A running service over a double."""

    port: int
    double: Double
    lines: list[str]
    champion: list[Any]  # what the ledger says is live; empty: it is away
    running: Running
    server: uvicorn.Server

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Told:
        return ask(self.port, method, path, body, headers)

    def predict(self, purchase: Any, headers: dict[str, str] | None = None) -> Told:
        return self.ask("POST", "/predict", purchase if isinstance(purchase, bytes) else json.dumps(purchase), headers)


class Followed(Champion):
    """A champion that a test names."""

    def __init__(self, named: list[Any]) -> None:
        self.named, self.refused = named, None

    def current(self, working: Any, now_s: float) -> Any:
        return self.named[-1] if self.named else working


@contextmanager
def house(settings: Settings | None = None, predictor: Any = None) -> Iterator[House]:
    """The door, the teller and their threads, on a free port; over a double, unless there is a real predictor."""
    log, lines = logging.Logger("fraud"), Lines()
    log.addHandler(lines)
    double, champion = Double(), list[Any]()

    def open_champion() -> Champion:
        if not champion:
            raise Unavailable("postgres: no connection")
        return Followed(champion)

    running = Running(settings or Settings(), predictor or double, open_champion, log)
    server = uvicorn.Server(uvicorn.Config(running.door, lifespan="off", log_config=None, access_log=False))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server listens")
    try:
        yield House(listener.getsockname()[1], double, lines.lines, champion, running, server)
    finally:
        double.may_go.set()
        server.should_exit = True
        thread.join(30)
        running.close()
        assert double.is_closed or predictor is not None
