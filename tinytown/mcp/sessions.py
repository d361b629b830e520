"""Legacy MCP sessions over HTTP: the subscriptions of a client, and the stream that carries its notifications.

A session id is random. `issue` only makes the id; the session itself is created when a request first uses the id. A
session belongs to the principal that created it, and never authenticates a request. Sessions are not shared between
worker processes. Used by `streamable_http`.
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from typing import Final

from ..errors import NotFound
from ..http.replies import Stream
from ..model import Json
from .jsonrpc import encode_message
from .protocol import Session

IDLE_SECS: Final = 3600.0  # a session without a stream ends after so long without a request
MAX_SESSIONS: Final = 1024  # limit for open sessions, and for remembered ids of ended ones; the least used go first
_ID: Final = re.compile(r'[0-9a-f]{32}')


class HttpSession:
    """One session and its stream, if it has one. Only `session.send` may be called outside the event loop's thread."""

    def __init__(self, id: str, owner: str) -> None:
        self.id = id
        self.owner = owner
        self.session = Session(self._send)
        self.stream: Stream | None = None
        self.used = time.monotonic()

    def attach(self, stream: Stream) -> None:
        """Sends notifications to this stream from now on, and closes the previous one."""
        old, self.stream = self.stream, stream
        if old:
            old.close()

    def detach(self, stream: Stream) -> None:
        if self.stream is stream:
            self.stream = None

    def _send(self, message: Json) -> None:
        stream, data = self.stream, b'event: message\ndata: %b\n\n' % encode_message(message)
        if stream:
            stream.call_soon(lambda: stream.send(data))

    def end(self) -> None:
        """Ends the subscriptions, running requests and stream of the session."""
        self.session.end()
        stream, self.stream = self.stream, None
        if stream:
            stream.close()


class Sessions:
    """The sessions of this worker process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, HttpSession] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def issue(self) -> str:
        """A random id for a session, which the first request with this id creates."""
        return os.urandom(16).hex()

    def open(self, owner: str) -> HttpSession:
        """Creates a session."""
        return self.find(self.issue(), owner)

    def find(self, id: str, owner: str) -> HttpSession:
        """The session with this id, created if the id is new.

        `owner` is the name of the calling principal. Raises NotFound if the session has ended or has another owner.
        """
        session = self._open.get(id)
        if session is None:
            if id in self._ended or not _ID.fullmatch(id):
                raise _unknown()
            session = self._open[id] = HttpSession(id, owner)
            self._make_room()
        if session.owner != owner:
            raise _unknown()
        self._open.move_to_end(id)
        session.used = time.monotonic()
        return session

    def _make_room(self) -> None:
        """Ends idle sessions. If too many are left, ends the least recently used, preferably one without a stream."""
        stale = time.monotonic() - IDLE_SECS
        for session in [session for session in self._open.values() if session.used < stale and session.stream is None]:
            self.end(session)
        if len(self._open) > MAX_SESSIONS:
            idle = next((session for session in self._open.values() if session.stream is None), None)
            self.end(idle or next(iter(self._open.values())))

    def end(self, session: HttpSession) -> None:
        """Ends a session: from now on its id is refused."""
        if self._open.pop(session.id, None) is None:
            return
        self._ended[session.id] = None
        if len(self._ended) > MAX_SESSIONS:
            self._ended.popitem(last=False)
        session.end()


def _unknown() -> NotFound:
    return NotFound('there is no such session; start a new one with initialize', code='no-such-session')
