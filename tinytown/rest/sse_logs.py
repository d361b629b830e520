"""An agent's log over HTTP as it grows: server-sent events, each a part of it, with the offset after it as its id.

One thread looks at all logs that are followed, four times a second; the loop's thread only sends.
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
from .sse_events import RETRY, Door, last_event_id, page_response, stream_response, wants_stream

LOOK_SECS: Final = 0.25
_NOBODY: Final = Principal('', frozenset({READ}))  # the door has let the caller in


class LogStreams:
    """GET /v1/agents/{agent}/logs in its two forms."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._watch = Watch()

    def answer(self, request: Request, op: Op) -> Answer:
        """A page, or a stream that begins with it. It reads files, and so is never for the loop's thread."""
        return Slow((self._open if wants_stream(request) else self._page)(request, op), waits=True)

    def _page(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._door.read(request, op)
        return page_response((yield from self._door.ask(request, op, arguments)))

    def _open(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._door.read(request, op)
        resumed = last_event_id(request, op.parameters['offset'])
        if resumed is not None:
            arguments = {'agent': arguments['agent'], 'offset': resumed}
        page: LogPage = yield from self._door.ask(request, op, arguments)
        reader = yield from open_log(Call(self._door.town, _NOBODY), arguments['agent'])

        def start(stream: Stream) -> None:
            follower = LogFollower(stream, reader, page['next_offset'], self._watch.wake)
            stream.on_close = lambda: self._watch.leave(follower)
            stream.send(RETRY + frames(page))
            self._watch.join(follower)

        return stream_response(start)


def frames(page: LogPage) -> bytes:
    """A page as events: `log`, after `gap` or `truncated` where something is missing."""
    told = b''
    for name in ('gap', 'truncated'):
        if page.get(name):
            told += f'event: {name}\ndata: {{"type":"{name}","offset":{page["offset"]}}}\n\n'.encode()
    part: dict[str, Any] = {'offset': page['offset'], 'next_offset': page['next_offset'], 'text': page['text']}
    return told + b'id: %d\nevent: log\ndata: %b\n\n' % (page['next_offset'], encode_answer(part))


class LogFollower:
    """One client, and how far it has read a log."""

    def __init__(self, stream: Stream, reader: LogReader, offset: int, wake: Callable[[], None]) -> None:
        self._stream = stream
        self._reader = reader
        self._offset = offset
        self._wake = wake
        self._seen = (-1, -1)
        self._is_ready = True  # it has taken what it was sent; set on the loop's thread, unset on the other

    def look(self) -> None:
        """Sends what has come. On the thread that looks at the logs."""
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


class Watch:
    """The thread that looks at the logs, while there are followers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followers: set[LogFollower] = set()
        self._is_wanted = threading.Event()
        self._runs = False

    def join(self, follower: LogFollower) -> None:
        """Follows, until `leave`."""
        with self._lock:
            self._followers.add(follower)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name='logs', daemon=True).start()

    def leave(self, follower: LogFollower) -> None:
        with self._lock:
            self._followers.discard(follower)

    def wake(self) -> None:
        """Has it look at once: someone can take more."""
        self._is_wanted.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                followers = list(self._followers)
                self._runs = bool(followers)
            if not followers:
                return
            for follower in followers:
                with suppress(OSError):  # out of descriptors, say: it looks again
                    follower.look()
            self._is_wanted.wait(LOOK_SECS)
            self._is_wanted.clear()
