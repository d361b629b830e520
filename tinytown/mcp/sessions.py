"""Legacy sessions over HTTP: what a client subscribed to, and the stream on which it hears of it.

The id of a session is random and says nothing; a session is made when its id is first used. It belongs to whoever made
it, and authenticates nobody. One process has its sessions for itself.
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

IDLE_SECS: Final = 3600.0  # after which an unused session without a stream ends
MAX_SESSIONS: Final = 1024  # sessions, and as many that have ended; the longest unused give way
_ID: Final = re.compile(r'[0-9a-f]{32}')


class Open:
    """One session, and its stream if there is one. Everything but `session.send` belongs to the loop's thread."""

    def __init__(self, id: str, owner: str) -> None:
        self.id = id
        self.owner = owner
        self.session = Session(self._send)
        self.stream: Stream | None = None
        self.used = time.monotonic()

    def attach(self, stream: Stream) -> None:
        """Has what is sent go there; an older stream is closed."""
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
        """Ends its subscriptions, what is under way in it, and its stream."""
        self.session.end()
        stream, self.stream = self.stream, None
        if stream:
            stream.close()


class Sessions:
    """The sessions of this process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def issue(self) -> str:
        """An id for a new session."""
        return os.urandom(16).hex()

    def open(self, owner: str) -> Open:
        """A new session."""
        return self.find(self.issue(), owner)

    def find(self, id: str, owner: str) -> Open:
        """The session of that id. Raises NotFound for one that has ended, or is another's."""
        found = self._open.get(id)
        if found is None:
            if id in self._ended or not _ID.fullmatch(id):
                raise _unknown()
            found = self._open[id] = Open(id, owner)
            self._make_room()
        if found.owner != owner:
            raise _unknown()
        self._open.move_to_end(id)
        found.used = time.monotonic()
        return found

    def _make_room(self) -> None:
        """Drops what has not been used for long; of too many the longest unused, those with a stream last."""
        stale = time.monotonic() - IDLE_SECS
        for each in [each for each in self._open.values() if each.used < stale and each.stream is None]:
            self.end(each)
        if len(self._open) > MAX_SESSIONS:
            idle = next((each for each in self._open.values() if each.stream is None), None)
            self.end(idle or next(iter(self._open.values())))

    def end(self, found: Open) -> None:
        """Ends a session: from now on its id is refused."""
        if self._open.pop(found.id, None) is None:
            return
        self._ended[found.id] = None
        if len(self._ended) > MAX_SESSIONS:
            self._ended.popitem(last=False)
        found.end()


def _unknown() -> NotFound:
    return NotFound('there is no such session; begin anew with initialize', code='no-such-session')
