"""Liveness of townhall processes: when they are ready, whether they hang, and how the service manager learns of it.

A server is *ready* when it listens and Redis has answered it. It is *alive* while its event loop turns and Redis
answers: the check sends a PING through the same loop and connection that requests use.

`process` starts one `LivenessMonitor` in each server process. A single process reports to the service manager itself
(`Single`). With several processes, each child reports to the parent over a pipe (`Child`). The parent (`prefork`) reads
the pipe with `ChildStatus`: it notifies the service manager once all children are ready or alive, and kills a child
whose loop hangs.
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
# A child writes two bytes to the pipe: its number, and one of these signs.
READY: Final = 1
TURNED: Final = 2
ALIVE: Final = 3


class Reporter(Protocol):
    """Receives the signs of one server process."""

    def ready(self) -> None:
        """The server is ready; called once."""

    def turned(self) -> None:
        """The event loop turned. Redis may be away."""

    def alive(self) -> None:
        """The event loop turned, and Redis answered a PING."""

    def stopping(self) -> None:
        """The server drains, or has stopped; may be called repeatedly."""


class WatchedServer(Loop, Protocol):
    """The server that a `LivenessMonitor` checks."""

    draining: bool


class LivenessMonitor(threading.Thread):
    """Checks a server once a second until `close`, and passes the results to `reporter`."""

    def __init__(self, server: WatchedServer, reporter: Reporter) -> None:
        super().__init__(name='liveness', daemon=True)
        self._server = server
        self._reporter = reporter
        self._is_ready = self._is_asking = False
        self._closed = threading.Event()

    def run(self) -> None:
        while not self._closed.wait(_TICK_SECS if self._is_ready else _START_TICK_SECS):
            self._server.call_soon(self._check)

    def close(self) -> None:
        """Ends the checks, once the server has stopped."""
        self._closed.set()
        self.join()
        self._reporter.stopping()

    def _check(self) -> None:
        """Runs on the event loop's thread, so that being called at all proves that the loop turns."""
        if self._server.draining:
            self._reporter.stopping()
            return
        self._reporter.turned()
        if not self._is_asking:
            self._is_asking = True
            self._server.drive(_ping(), self._answered)

    def _answered(self, _pong: bytes | None, error: Exception | None) -> None:
        self._is_asking = False
        if error or self._server.draining:
            return
        if not self._is_ready:
            self._is_ready = True
            self._reporter.ready()
        self._reporter.alive()


def _ping() -> Generator[Command, Any, bytes]:
    return bytes((yield Command(None, ('PING',))))


class Single:
    """Reports a single process directly to the service manager, which shows `status`."""

    def __init__(self, notifier: Notifier, status: str) -> None:
        self._notifier = notifier
        self._status = status

    def ready(self) -> None:
        self._notifier.ready(self._status)

    def turned(self) -> None:
        pass  # the service manager's watchdog also requires that Redis answers

    def alive(self) -> None:
        self._notifier.alive()

    def stopping(self) -> None:
        self._notifier.stopping()


class Child:
    """Reports one of several processes to their parent: `pipe` is the writing end of the parent's pipe."""

    def __init__(self, number: int, pipe: int) -> None:
        self._number = number
        self._pipe = pipe

    def ready(self) -> None:
        self._write(READY)

    def turned(self) -> None:
        self._write(TURNED)

    def alive(self) -> None:
        self._write(ALIVE)

    def stopping(self) -> None:
        pass  # the parent knows: it sent the signal

    def _write(self, sign: int) -> None:
        with suppress(OSError):  # a full pipe holds enough signs; a pipe without a reader has no parent
            os.write(self._pipe, bytes((self._number, sign)))


class ChildStatus:
    """The parent's view of its `count` child processes, which it reports to the service manager as one.

    Without a service manager (a false `notifier`) the children report nothing, and none is found hung.
    """

    def __init__(self, count: int, notifier: Notifier, status: str) -> None:
        self._count = count
        self._notifier = notifier
        self._status = status
        self.descriptor, self._write_end = os.pipe()  # never closed: they are needed as long as the process lives
        for end in (self.descriptor, self._write_end):
            os.set_blocking(end, False)
        self.hang_secs = notifier.watchdog_secs / 2  # a loop that stands still for longer hangs; 0: never
        self.tick_ms = 1000 if notifier else None  # how often the parent should call `read` and `hung`
        self._turned: dict[int, float] = {}
        self._ready: set[int] = set()
        self._alive: set[int] = set()

    def child(self, number: int) -> Child:
        """The reporter for the child process of this number."""
        return Child(number, self._write_end)

    def begin(self, number: int, now: float) -> None:
        """A child process was started. From now on its loop must turn."""
        self._turned[number] = now
        self._alive.discard(number)

    def end(self, number: int) -> None:
        """A child process ended."""
        self._turned.pop(number, None)
        self._alive.discard(number)

    def read(self, now: float) -> None:
        """Reads the signs from the pipe. Notifies the service manager when all children are ready, or all alive."""
        with suppress(BlockingIOError):
            while data := os.read(self.descriptor, 4096):  # an even number of bytes: pairs are written whole
                for number, sign in zip(data[::2], data[1::2], strict=True):
                    self._record(number, sign, now)

    def _record(self, number: int, sign: int, now: float) -> None:
        if sign == TURNED:
            self._turned[number] = now
            return
        children = self._ready if sign == READY else self._alive
        were_all = len(children) == self._count
        children.add(number)
        if len(children) < self._count:
            return
        if children is self._alive:
            self._notifier.alive()
            self._alive = set()
        elif not were_all:
            self._notifier.ready(self._status)

    def hung(self, now: float) -> list[int]:
        """The numbers of the children whose loop has not turned for half of the watchdog's time."""
        if not self.hang_secs:
            return []
        return [number for number, last in self._turned.items() if now - last > self.hang_secs]

    def stopping(self) -> None:
        self._notifier.stopping()
