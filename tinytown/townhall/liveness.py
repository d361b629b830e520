"""How a townhall fares, and how whoever runs it as a service comes to know.

A server is *ready* when it listens and Redis has answered it, and *alive* for as long as its loop turns and Redis
answers: a PING goes through the very loop and the very connection that requests take. Of several processes each tells
its parent, on a pipe; the parent tells the service manager what is true of all, and kills one whose loop stands still.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any, Final, Protocol

from ..host.sd_notify import Notifier
from ..http.replies import Loop
from ..state.store import Command

_START_TICK_SECS: Final = 0.05
_TICK_SECS: Final = 1.0
READY: Final = 1
TURNED: Final = 2
ALIVE: Final = 3  # what a child tells, one byte after its number


class Teller(Protocol):
    """Whoever is to know."""

    def ready(self) -> None: ...
    def turned(self) -> None: ...
    def alive(self) -> None: ...
    def stopping(self) -> None: ...


class WatchedServer(Loop, Protocol):
    """What is watched."""

    draining: bool


class LivenessMonitor(threading.Thread):
    """Has a server show that it lives, once a second until `close`. The first sign is that it is ready."""

    def __init__(self, server: WatchedServer, teller: Teller) -> None:
        super().__init__(name='vitals', daemon=True)
        self._server = server
        self._teller = teller
        self._is_ready = self._asks = False
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_TICK_SECS if self._is_ready else _START_TICK_SECS):
            self._server.call_soon(self._look)

    def close(self) -> None:
        """Ends it; the server has been told to stop."""
        self._over.set()
        self.join()
        self._teller.stopping()

    def _look(self) -> None:
        """On the loop's thread: that it is called is the proof that the loop turns."""
        if self._server.draining:
            self._teller.stopping()
            return
        self._teller.turned()
        if not self._asks:
            self._asks = True
            self._server.drive(_ping(), self._answered)

    def _answered(self, _pong: bytes | None, error: Exception | None) -> None:
        self._asks = False
        if error or self._server.draining:
            return
        if not self._is_ready:
            self._is_ready = True
            self._teller.ready()
        self._teller.alive()


def _ping() -> Generator[Command, Any, bytes]:
    return bytes((yield Command(None, ('PING',))))


class Single:
    """One process speaks to the service manager itself; `status` is what it shows of it."""

    def __init__(self, notifier: Notifier, status: str) -> None:
        self._notifier = notifier
        self._status = status

    def ready(self) -> None:
        self._notifier.ready(self._status)

    def turned(self) -> None:
        pass  # by itself that is no sign for the manager: Redis must answer, too

    def alive(self) -> None:
        self._notifier.alive()

    def stopping(self) -> None:
        self._notifier.stopping()


class Child:
    """One of several processes: it tells its parent."""

    def __init__(self, number: int, pipe: int) -> None:
        self._number = number
        self._pipe = pipe

    def ready(self) -> None:
        self._tell(READY)

    def turned(self) -> None:
        self._tell(TURNED)

    def alive(self) -> None:
        self._tell(ALIVE)

    def stopping(self) -> None:
        pass  # the parent knows: it has told us

    def _tell(self, sign: int) -> None:
        with suppress(OSError):  # a pipe that is full has signs enough, and one without a reader no parent
            os.write(self._pipe, bytes((self._number, sign)))


class ChildStatus:
    """The parent's view of `count` processes that serve. Without a service manager (`notifier`) it stays empty."""

    def __init__(self, count: int, notifier: Notifier, status: str) -> None:
        self._count = count
        self._notifier = notifier
        self._status = status
        self.descriptor, self._write_end = os.pipe()  # as long as the process lives
        for end in (self.descriptor, self._write_end):
            os.set_blocking(end, False)
        self.patience = notifier.watchdog_secs / 2
        self.tick_ms = 1000 if notifier else None  # how often someone is to look
        self._turned: dict[int, float] = {}
        self._ready: set[int] = set()
        self._alive: set[int] = set()

    def child(self, number: int) -> Child:
        return Child(number, self._write_end)

    def begin(self, number: int, now: float) -> None:
        """A process begins: from now on it is expected to tell."""
        self._turned[number] = now
        self._alive.discard(number)

    def end(self, number: int) -> None:
        """One has ended."""
        self._turned.pop(number, None)
        self._alive.discard(number)

    def read(self, now: float) -> None:
        """Takes in what the processes tell. The manager hears what is true of all of them."""
        with suppress(BlockingIOError):
            while data := os.read(self.descriptor, 4096):  # an even number of bytes: pairs are written whole
                for number, sign in zip(data[::2], data[1::2], strict=True):
                    self._take(number, sign, now)

    def _take(self, number: int, sign: int, now: float) -> None:
        if sign == TURNED:
            self._turned[number] = now
            return
        known = self._ready if sign == READY else self._alive
        was_all = len(known) == self._count
        known.add(number)
        if len(known) < self._count:
            return
        if known is self._alive:
            self._notifier.alive()
            self._alive = set()
        elif not was_all:
            self._notifier.ready(self._status)

    def hung(self, now: float) -> list[int]:
        """The processes whose loop has not turned for half of the manager's patience."""
        if not self.patience:
            return []
        return [number for number, last in self._turned.items() if now - last > self.patience]

    def stopping(self) -> None:
        self._notifier.stopping()
