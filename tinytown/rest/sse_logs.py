"""An agent's log over HTTP: as a page, or as server-sent events while it grows.

Start with `LogStreams`, which `app` calls for GET /v1/agents/{agent}/logs. Each event holds a part of the log; its id
is the offset after that part. One thread (`LogWatcher`) checks all followed logs four times a second. The event loop's
thread never reads a file, it only sends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from ..core.agent_logs import MAX_PAGE_BYTES, LogPage, LogReader, open_log
from ..core.dispatch import encode_answer
from ..core.operations import Op
from ..core.town import Call
from ..http.http1 import Request, Response
from ..http.replies import Answer, Slow, Stream
from ..model import READ, Principal
from ..state.store import Step
from .sse_events import RETRY, Dispatch, last_event_id, page_response, stream_response, wants_stream

LOOK_SECS: Final = 0.25
_READER: Final = Principal('', frozenset({READ}))  # the page before it has checked the caller's scope


class LogStreams:
    """GET /v1/agents/{agent}/logs in its two forms: page and stream."""

    def __init__(self, app: Dispatch) -> None:
        self._app = app
        self._watcher = LogWatcher()

    def answer(self, request: Request, op: Op) -> Answer:
        """A page, or a stream that begins with one. It reads files, so it never runs on the event loop."""
        return Slow((self._open if wants_stream(request) else self._page)(request, op), waits=True)

    def _page(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._app.read(request, op)
        return page_response((yield from self._app.dispatch(request, op, arguments)))

    def _open(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._app.read(request, op)
        resumed = last_event_id(request, op.parameters['offset'])
        if resumed is not None:
            arguments = {'agent': arguments['agent'], 'offset': resumed}
        page: LogPage = yield from self._app.dispatch(request, op, arguments)
        reader = yield from open_log(Call(self._app.town, _READER), arguments['agent'])

        def start(stream: Stream) -> None:
            follower = LogFollower(stream, reader, page['next_offset'], self._watcher.wake)
            stream.on_close = lambda: self._watcher.leave(follower)
            stream.send(RETRY + frames(page))
            self._watcher.join(follower)

        return stream_response(start)


def frames(page: LogPage) -> bytes:
    """A page as server-sent events: `log`, and before it `gap` or `truncated` if something is missing."""
    data = b''
    for name in ('gap', 'truncated'):
        if page.get(name):
            data += f'event: {name}\ndata: {{"type":"{name}","offset":{page["offset"]}}}\n\n'.encode()
    part: dict[str, Any] = {'offset': page['offset'], 'next_offset': page['next_offset'], 'text': page['text']}
    return data + b'id: %d\nevent: log\ndata: %b\n\n' % (page['next_offset'], encode_answer(part))


class LogFollower:
    """One client that follows a log, and the offset it has reached."""

    def __init__(self, stream: Stream, reader: LogReader, offset: int, wake: Callable[[], None]) -> None:
        self._stream = stream
        self._reader = reader
        self._offset = offset
        self._wake = wake
        self._seen = (-1, -1)  # the version of the log up to which all is sent; (-1, -1): more is to be sent
        self._is_ready = True  # the client has read all data; set by the event loop's thread, cleared by the watcher's

    def look(self) -> None:
        """Sends what was added to the log. Runs on the watcher's thread."""
        if not self._is_ready:
            return
        seen = self._reader.version()
        if seen == self._seen:
            return
        page = self._reader.page(self._offset, MAX_PAGE_BYTES)
        self._seen = seen if page['next_offset'] == page['size'] else (-1, -1)
        if page['next_offset'] != self._offset:
            self._offset = page['next_offset']
            self._is_ready = False
            data = frames(page)
            self._stream.call_soon(lambda: self._send(data))

    def _send(self, data: bytes) -> None:
        self._stream.send(data)
        self._stream.when_taken(self._taken)

    def _taken(self) -> None:
        self._is_ready = True
        if self._seen == (-1, -1):
            self._wake()


class LogWatcher:
    """The thread that checks the followed logs. It runs only while there are followers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followers: set[LogFollower] = set()
        self._is_wanted = threading.Event()
        self._runs = False

    def join(self, follower: LogFollower) -> None:
        """Adds a follower, until `leave`."""
        with self._lock:
            self._followers.add(follower)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name='logs', daemon=True).start()

    def leave(self, follower: LogFollower) -> None:
        with self._lock:
            self._followers.discard(follower)

    def wake(self) -> None:
        """Checks the logs now, because a client is ready for more."""
        self._is_wanted.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                followers = list(self._followers)
                self._runs = bool(followers)
            if not followers:
                return
            for follower in followers:
                with suppress(OSError):  # for example out of file descriptors: the next round tries again
                    follower.look()
            self._is_wanted.wait(LOOK_SECS)
            self._is_wanted.clear()
