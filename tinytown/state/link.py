"""The connection of an event loop to Redis: it never waits, and many requests share one write.

It pipelines the commands of all requests that are ready together, so that they share one write and, on the server, one
fsync. It never sends a command again that may have been executed; one that was answered with MOVED was not.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import TownError, Unavailable
from .client import NOT_PRIMARY, NOT_YET, TIMEOUT, ErrorReply, RedisConnection, gone
from .endpoints import Endpoint

logger = logging.getLogger('tinytown.state')


class PendingCommand:
    """A packed command on its way, and who waits for its reply. `fallback` is what to send after NOSCRIPT."""

    __slots__ = ('data', 'done', 'fallback', 'sent_at')

    def __init__(self, data: bytes, fallback: Callable[[], bytes] | None, done: Callable[[Any], None]) -> None:
        self.data = data
        self.fallback = fallback
        self.done = done
        self.sent_at = 0.0


class Link:
    """A connection that an event loop owns. Every method but `close` is called on the loop's thread.

    After one timeout everything is answered at once with Unavailable until `reconnect`, on a thread of its own, has
    made a connection that answers PING. A server that says that it takes no writes is left once it has answered what it
    was sent; what comes meanwhile, or was MOVED, is held for the right one, and refused after TIMEOUT.

    `call_soon(f)` runs f on the loop's thread; `watch(sock or None, want_write)` tells the loop what to poll; `prepare`
    may start a server that has died.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        call_soon: Callable[[Callable[[], None]], None],
        watch: Callable[[socket.socket | None, bool], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._call_soon = call_soon
        self._watch = watch
        self._prepare = prepare
        self._connection: RedisConnection | None = None
        self._pending: deque[PendingCommand] = deque()
        self._held: deque[PendingCommand] = deque()
        self._leaves = False
        self._unsent: list[bytes] = []
        self._blocked = b''
        self._closed = threading.Event()
        self._said = ''

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is due."""
        return bool(self._pending)

    @property
    def unsent(self) -> int:
        """How many commands wait for `flush`."""
        return len(self._unsent)

    def submit(self, command: PendingCommand) -> None:
        """Queues a command; `flush` sends. The reply, an ErrorReply or an Unavailable goes to its `done`."""
        command.sent_at = time.monotonic()
        if self._leaves:
            self._held.append(command)
            return
        if self._connection is None:
            command.done(gone('is away; nothing was changed'))
            return
        self._pending.append(command)
        self._unsent.append(command.data)

    def refuse_unsent(self, error: TownError) -> None:
        """Takes back what was queued since the last `flush`, and gives the error to those who wait for it."""
        count = len(self._unsent)
        self._unsent.clear()
        refused = [self._pending.pop() for _ in range(count)]
        for command in reversed(refused):
            command.done(error)

    def flush(self) -> None:
        """Sends what was queued, in one write. What the socket does not take is sent when it takes more."""
        if self._connection is None or not (self._unsent or self._blocked):
            return
        data = self._blocked + b''.join(self._unsent)
        self._unsent.clear()
        was_blocked = bool(self._blocked)
        try:
            sent = self._connection.send_some(data)
        except OSError as e:
            self.drop(f'went away: {e}')
            return
        self._blocked = data[sent:]
        if bool(self._blocked) != was_blocked:
            self._watch(self._connection.sock, bool(self._blocked))

    def on_readable(self) -> None:
        """Hands replies to those who wait, until no more is here: the loop is not told again of what was read ahead."""
        connection = self._connection
        if connection is None:
            return
        try:
            reply = connection.receive()  # where nothing is due it tells that the server has closed
            while reply is not NOT_YET:
                self._answer(self._next_pending(), reply)
                reply = connection.receive() if self._pending else NOT_YET
        except Unavailable as e:
            self.drop(e.detail.removeprefix('Redis '))
        if self._leaves and not self._pending:
            self.drop('is not the one to ask')

    def _next_pending(self) -> PendingCommand:
        if not self._pending:
            raise gone('went away: it said something that nobody had asked for')
        return self._pending.popleft()

    def _answer(self, command: PendingCommand, reply: Any) -> None:
        if isinstance(reply, ErrorReply):
            if reply.kind == 'NOSCRIPT' and command.fallback:
                command.data, command.fallback = command.fallback(), None
                self.submit(command)
                return
            if reply.kind in NOT_PRIMARY:
                self._leaves = True
            if reply.kind == 'MOVED':
                self.submit(command)  # it was not executed
                return
        command.done(reply)

    def expire(self, now: float) -> None:
        """Gives up when the oldest command has waited for TIMEOUT."""
        if self._pending and now - self._pending[0].sent_at > TIMEOUT:
            self.drop(f'did not answer within {TIMEOUT:g} s')
        if self._held and now - self._held[0].sent_at > TIMEOUT:
            self._resubmit()

    def _resubmit(self) -> None:
        """Sends what was held, or refuses it where there is still no connection."""
        self._leaves = False
        held, self._held = self._held, deque()
        for command in held:
            self.submit(command)

    def drop(self, why: str) -> None:
        """Ends the connection, tells all who wait that their outcome is unknown, and begins to reconnect."""
        if self._connection is None:
            return
        self._watch(None, False)
        self._connection.close()
        self._connection = None
        self._blocked = b''
        self._unsent.clear()
        waiting, self._pending = self._pending, deque()
        for command in waiting:
            command.done(gone(f'{why}; whether the change was made is not known'))
        self._say(why)
        self.reconnect()

    def reconnect(self) -> None:
        """Tries, on a thread of its own, until there is a connection."""
        threading.Thread(target=self._connect, name='redis-connect', daemon=True).start()

    def _connect(self) -> None:
        while not self._closed.is_set():
            try:
                self._prepare()
                connection = self._endpoint.open()
                connection.ask('PING')
                self._call_soon(partial(self._attach, connection))
                return
            except Exception as e:  # whatever it is, the link must come back
                self._say(str(e))
            self._closed.wait(0.2)

    def _say(self, what: str) -> None:
        """Notes why there is no connection, when that changes."""
        if what != self._said:
            self._said = what
            logger.warning(what)

    def _attach(self, connection: RedisConnection) -> None:
        if self._closed.is_set():
            connection.close()
            return
        logger.log(logging.INFO if self._said else logging.DEBUG, 'connected')
        self._said = ''
        self._connection = connection
        self._watch(connection.sock, False)
        self._resubmit()

    def close(self) -> None:
        self._closed.set()
        if self._connection is not None:
            self._connection.close()
