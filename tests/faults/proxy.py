"""A TCP proxy between a worker and one of its servers, with which a test breaks the wire."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

Trigger = Callable[[bytes], bool]  # whether a request, as it came from the client, is the one
Trouble = Literal["reset", "swallow", "half", "torn"]  # what becomes of the reply to it
CHUNK = 65_536


def commits_decisions() -> Trigger:
    """PostgreSQL: the COMMIT of a transaction in which decisions were copied."""
    copied = False

    def is_it(request: bytes) -> bool:
        nonlocal copied
        copied = copied or b"COPY decisions" in request
        if b"COMMIT\0" not in request:
            return False
        found, copied = copied, False
        return found

    return is_it


def asks(key: int) -> Callable[[], Trigger]:
    """Kafka: a request with this key, such as 0, produce, 1, fetch, or 26, the end of a transaction."""
    wanted = struct.pack("!h", key)
    return lambda: lambda request: request[4:6] == wanted


class Wire:
    """One connection through the proxy; each direction has a thread that copies it."""

    def __init__(self, proxy: "Proxy", client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.trouble: Trouble | None = None  # of the next reply
        self.looking: tuple[object, Trigger] | None = None  # for what is armed, on this connection
        for copy in (self.requests, self.replies):
            threading.Thread(target=copy, daemon=True).start()

    def requests(self) -> None:
        """From the client to the server; every request goes through."""
        try:
            while chunk := self.client.recv(CHUNK):
                if self.trouble is None:
                    self.trouble = self.proxy.trouble_for(self, chunk)
                self.server.sendall(chunk)
        except OSError:
            pass
        self.end()

    def replies(self) -> None:
        """From the server to the client, where trouble waits."""
        try:
            while chunk := self.server.recv(CHUNK):
                time.sleep(self.proxy.lag_s)
                if self.trouble is None and not self.proxy.is_deaf:
                    self.client.sendall(chunk)
                    continue
                if self.trouble in ("half", "torn"):
                    self.client.sendall(chunk[: len(chunk) // 2])
                if self.trouble in ("reset", "half"):
                    return self.reset()
                self.trouble = "swallow"  # of this connection: whatever else is answered
        except OSError:
            pass
        if self.trouble != "swallow":  # else the client does not even learn that the server has given up
            self.end()

    def reset(self) -> None:
        """Both ends learn at once that this is over: RST, not FIN."""
        for end in (self.client, self.server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end()
        self.client.close()
        self.server.close()

    def end(self) -> None:
        """Close in good order; `close` alone does not wake a thread that reads."""
        for end in (self.client, self.server):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Proxy:
    """Listens on a port of its own and passes everything on, until told otherwise."""

    def __init__(self, upstream: int | None = None) -> None:
        self.upstream = upstream  # port on loopback; may be told later
        self.lag_s = 0.0  # before each piece of a reply
        self.is_deaf = False  # no reply comes through, on any connection
        self.struck = threading.Event()  # the trouble that was armed has happened
        self._armed: tuple[Callable[[], Trigger], Trouble] | None = None
        self._count = 0
        self._lock = threading.Lock()
        self._wires: list[Wire] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.upstream or 0), timeout=5)
            except OSError:  # nobody there: as if we were not there either
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._wires.append(Wire(self, client, server))

    def arm(self, trigger: Callable[[], Trigger], trouble: Trouble, count: int = 1) -> None:
        """The reply to the `count`-th request of the kind meets trouble, once; each connection has a trigger."""
        with self._lock:
            self.struck.clear()
            self._armed, self._count = (trigger, trouble), count

    def trouble_for(self, wire: Wire, request: bytes) -> Trouble | None:
        """Whether it is this request, asked once for each."""
        with self._lock:
            if self._armed is None:
                return None
            if wire.looking is None or wire.looking[0] is not self._armed:
                wire.looking = self._armed, self._armed[0]()
            if not wire.looking[1](request):
                return None
            self._count -= 1
            if self._count:
                return None
            (_, trouble), self._armed = self._armed, None
            self.struck.set()
            return trouble

    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        wires, self._wires = self._wires, []
        for wire in wires:
            try:
                wire.reset()
            except OSError:  # it ended by itself
                pass

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
        self.cut()
