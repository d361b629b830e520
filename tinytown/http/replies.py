"""How a request may be answered: at once, by a step, slowly, later, or by an answer that goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from ..state.store import Command
from .http1 import Request, Response

T = TypeVar('T')
Done = Callable[[T | None, Exception | None], None]  # is given what a step gave, or raised

HEARTBEAT_SECS: Final = 15.0
_ASK_SECS: Final = 0.5  # between two times that it is proven who reads

ResponseStep = Generator[Command, Any, Response]


@dataclass(frozen=True, slots=True)
class Slow:
    """A step that works on processes, hashes or waits: it runs on a thread of its own.

    One that only `waits`, or reads, is turned away before others are.
    """

    step: ResponseStep
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that waits for something to happen: `start(stream)` sees to it that `stream.answer` is called.

    After `seconds` it is answered with `otherwise()`.
    """

    start: Callable[[Stream], None]
    otherwise: Callable[[], Response]
    seconds: float


Answer = Response | ResponseStep | Slow | Later


class Carrier(Protocol):
    """What a stream needs of its connection. `has_unsent` says whether the client has yet to take something."""

    stream: Stream | None

    @property
    def has_unsent(self) -> bool: ...
    def feed(self, data: bytes) -> None: ...
    def end_stream(self, data: bytes) -> None: ...
    def end_wait(self, response: Response) -> None: ...
    def close(self) -> None: ...


class Loop(Protocol):
    """What it needs of the server."""

    def call_soon(self, what: Callable[[], None]) -> None: ...
    def drive(
        self, step: Generator[Command, Any, T], done: Done[T], slow: bool = False, waits: bool = False
    ) -> None: ...
    def failed(self, request: Request, error: Exception) -> Response: ...


class Stream:
    """An answer that goes on or comes later. Everything but `call_soon` belongs to the loop's thread.

    `on_close` is called once, when it has ended for whatever reason: it was closed or answered, the client went away or
    did not read, the server stops. What is sent after that goes nowhere.
    """

    __slots__ = ('_asked', '_connection', '_next', '_server', '_spoke', 'on_close', 'request', 'response')

    def __init__(self, connection: Carrier, server: Loop, request: Request, response: Response | Later) -> None:
        self.request = request
        self.response = response
        self.on_close: Callable[[], None] = lambda: None
        self._next: Callable[[], None] | None = None
        self._connection = connection
        self._server = server
        self._spoke = self._asked = time.monotonic()

    @property
    def is_open(self) -> bool:
        return self._connection.stream is self

    def send(self, data: bytes) -> None:
        """Sends data as the client takes it. One that leaves too much of it is cut off, to come back and resume."""
        if data and self.is_open:
            self._spoke = time.monotonic()
            self._connection.feed(self._chunk(data))

    def _chunk(self, data: bytes) -> bytes:
        return b'%x\r\n%b\r\n' % (len(data), data) if self.request.minor else data

    @property
    def is_behind(self) -> bool:
        """Whether the client has yet to take some of what was sent."""
        return self._connection.has_unsent

    def when_taken(self, what: Callable[[], None]) -> None:
        """Calls `what` when the client has taken all that was sent, which may be at once. Never after the end."""
        if self.is_behind:
            self._next = what
        elif self.is_open:
            what()

    def taken(self) -> None:
        """All that was sent is taken."""
        what, self._next = self._next, None
        if what:
            self._safely(what)

    def ended(self) -> None:
        """It has ended, for whatever reason."""
        self._safely(self.on_close)

    def _safely(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as e:  # a fault of ours must not end the server
            self._server.failed(self.request, e)
            self._connection.close()

    def close(self) -> None:
        """Ends an answer that goes on."""
        if self.is_open:
            self._connection.end_stream(b'0\r\n\r\n' if self.request.minor else b'')

    def answer(self, response: Response) -> None:
        """Gives an answer that was to come later."""
        if self.is_open:
            self._connection.end_wait(response)

    def fail(self, error: Exception) -> None:
        """Answers what was to come later with what went wrong."""
        self.answer(self._server.failed(self.request, error))

    def call_soon(self, what: Callable[[], None]) -> None:
        """Has the loop's thread do something. Any thread may call."""
        self._server.call_soon(what)

    def run(self, step: Generator[Command, Any, T], done: Done[T], slow: bool = False, waits: bool = False) -> None:
        """Runs a step, and calls `done` on the loop's thread: (what it gave, None) or (None, what it raised)."""
        self._server.drive(step, done, slow, waits)

    def ask_again(self, now: float) -> None:
        """Has it proven again, now and then, who reads: a key may have been revoked, or have expired."""
        if self.request.ask_again and now - self._asked >= _ASK_SECS:
            self._asked = now
            self.request.ask_again(self)

    def refuse(self, error: Exception) -> None:
        """Ends it for a client who may read no more: what was not taken yet is not sent."""
        if isinstance(self.response, Later):
            self.fail(error)
        elif self.is_open and self.is_behind:
            self._connection.close()
        else:
            self.close()

    def expire(self, now: float) -> None:
        """Sends a heartbeat if it has been silent; answers if the time to wait is over."""
        response = self.response
        if isinstance(response, Later):
            if now > self.request.deadline:
                self.answer(response.otherwise())
        elif response.heartbeat and now - self._spoke >= HEARTBEAT_SECS:
            self.send(response.heartbeat)

    def finish(self) -> None:
        """The server stops: says so, and ends."""
        if isinstance(self.response, Later):
            self.answer(self.response.otherwise())
        else:
            self.send(self.response.farewell)
            self.close()
