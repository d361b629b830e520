"""The ways to answer a request.

An application returns one of these for a request: a `Response`; a step, which yields Redis commands and returns a
`Response`; a `Slow` step, which runs on a thread; or `Later`, for an answer that waits for an event. A `Response` with
a `stream` function stays open until it is closed. `Stream` is the handle of such an open answer, and of a `Later` one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from ..state.store import Command
from .http1 import Request, Response

T = TypeVar('T')
Done = Callable[[T | None, Exception | None], None]  # a callback with the result of a step, or its exception

HEARTBEAT_SECS: Final = 15.0
_REAUTHENTICATE_SECS: Final = 0.5  # between two checks of a stream's credential

ResponseStep = Generator[Command, Any, Response]


@dataclass(frozen=True, slots=True)
class Slow:
    """A step that starts processes, hashes or waits, and therefore runs on its own thread.

    When threads run short, steps that only wait or read (`waits`) are refused before others.
    """

    step: ResponseStep
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that waits for an event: `start(stream)` arranges that `stream.answer` is called when it happens.

    After `seconds` without an answer, or if the server stops, the answer is `otherwise()`.
    """

    start: Callable[[Stream], None]
    otherwise: Callable[[], Response]
    seconds: float


Answer = Response | ResponseStep | Slow | Later


class Carrier(Protocol):
    """What a stream needs of its connection. `has_unsent`: whether bytes wait for the client to read."""

    stream: Stream | None

    @property
    def has_unsent(self) -> bool: ...
    def feed(self, data: bytes) -> None: ...
    def end_stream(self, data: bytes) -> None: ...
    def end_wait(self, response: Response) -> None: ...
    def close(self) -> None: ...


class Loop(Protocol):
    """What a stream needs of the server."""

    def call_soon(self, what: Callable[[], None]) -> None: ...
    def drive(
        self, step: Generator[Command, Any, T], done: Done[T], slow: bool = False, waits: bool = False
    ) -> None: ...
    def failed(self, request: Request, error: Exception) -> Response: ...


class Stream:
    """An open answer: a stream, or one that comes later. Only `call_soon` may be called from other threads.

    `on_close` is called once, however the stream ends: it was closed or answered, the client went away or was too slow,
    or the server stops. Data sent after that is dropped.
    """

    __slots__ = ('_authenticated', '_connection', '_next', '_sent', '_server', 'on_close', 'request', 'response')

    def __init__(self, connection: Carrier, server: Loop, request: Request, response: Response | Later) -> None:
        self.request = request
        self.response = response
        self.on_close: Callable[[], None] = lambda: None
        self._next: Callable[[], None] | None = None  # the callback of `when_taken`
        self._connection = connection
        self._server = server
        self._sent = self._authenticated = time.monotonic()  # when it last did

    @property
    def is_open(self) -> bool:
        return self._connection.stream is self

    def send(self, data: bytes) -> None:
        """Sends data. If too much waits for a slow client, closes the connection; the client can resume later."""
        if data and self.is_open:
            self._sent = time.monotonic()
            self._connection.feed(self._chunk(data))

    def _chunk(self, data: bytes) -> bytes:
        return b'%x\r\n%b\r\n' % (len(data), data) if self.request.minor else data

    @property
    def is_behind(self) -> bool:
        """Whether sent data still waits for the client to read."""
        return self._connection.has_unsent

    def when_taken(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the client has read all sent data (at once if nothing waits), unless it ends before."""
        if self.is_behind:
            self._next = callback
        elif self.is_open:
            callback()

    def taken(self) -> None:
        """The connection calls this when no sent data waits any longer."""
        callback, self._next = self._next, None
        if callback:
            self._safely(callback)

    def ended(self) -> None:
        """The connection calls this when the stream has ended, for whatever reason."""
        self._safely(self.on_close)

    def _safely(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as e:  # a bug must not end the server
            self._server.failed(self.request, e)
            self._connection.close()

    def close(self) -> None:
        """Ends a stream."""
        if self.is_open:
            self._connection.end_stream(b'0\r\n\r\n' if self.request.minor else b'')

    def answer(self, response: Response) -> None:
        """Sends an answer that was to come later."""
        if self.is_open:
            self._connection.end_wait(response)

    def fail(self, error: Exception) -> None:
        """Sends an error as the answer that was to come later."""
        self.answer(self._server.failed(self.request, error))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the event loop's thread. Any thread may call this."""
        self._server.call_soon(callback)

    def run(self, step: Generator[Command, Any, T], done: Done[T], slow: bool = False, waits: bool = False) -> None:
        """Runs a step, then calls `done` on the loop's thread with (result, None) or (None, exception).

        `slow` and `waits` are as in `Slow`.
        """
        self._server.drive(step, done, slow, waits)

    def reauthenticate(self, now: float) -> None:
        """Checks the credential again every _REAUTHENTICATE_SECS: it may have expired or been revoked."""
        if self.request.reauthenticate and now - self._authenticated >= _REAUTHENTICATE_SECS:
            self._authenticated = now
            self.request.reauthenticate(self)

    def refuse(self, error: Exception) -> None:
        """Ends it because its client may no longer read. Data that still waits is not sent."""
        if isinstance(self.response, Later):
            self.fail(error)
        elif self.is_open and self.is_behind:
            self._connection.close()
        else:
            self.close()

    def expire(self, now: float) -> None:
        """Sends a heartbeat if the stream was silent; sends the answer that was to come later if its time is over."""
        response = self.response
        if isinstance(response, Later):
            if now > self.request.deadline:
                self.answer(response.otherwise())
        elif response.heartbeat and now - self._sent >= HEARTBEAT_SECS:
            self.send(response.heartbeat)

    def finish(self) -> None:
        """Ends it because the server stops, with `otherwise()` or the farewell."""
        if isinstance(self.response, Later):
            self.answer(self.response.otherwise())
        else:
            self.send(self.response.farewell)
            self.close()
