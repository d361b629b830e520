"""An event loop's connection to Redis. It never blocks the loop, and it reconnects by itself.

`http.server` submits the commands of its requests here. The commands that are ready together share one write and, on
the server, one fsync. A command that may have been executed is never sent again. Only NOSCRIPT and MOVED, which mean
that Redis did not execute the command, lead to a second send.
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
from .client import NOT_PRIMARY, NOT_YET, TIMEOUT, ErrorReply, RedisConnection, unavailable
from .endpoints import Endpoint

logger = logging.getLogger('tinytown.state')


class PendingCommand:
    """A packed command and the callback `done` for its reply. `fallback` packs what to send after NOSCRIPT."""

    __slots__ = ('data', 'done', 'fallback', 'sent_at')

    def __init__(self, data: bytes, fallback: Callable[[], bytes] | None, done: Callable[[Any], None]) -> None:
        self.data = data
        self.fallback = fallback
        self.done = done
        self.sent_at = 0.0

    def finish(self, reply: Any) -> None:
        """Calls `done`. An exception in it is a bug of ours; it is logged, and the other commands get their replies."""
        try:
            self.done(reply)
        except Exception as e:
            logger.error(f'internal error: {e!r}', exc_info=e)


class Link:
    """A Redis connection that an event loop owns. Call every method except `close` on the loop's thread.

    When the connection fails or a reply is overdue, all pending commands fail with Unavailable. So does every new
    command, at once, until a reconnect thread has opened a connection that answers PING.

    When the server replies that it does not accept writes (NOT_PRIMARY), the link leaves it as soon as the commands
    already sent are answered. Meanwhile it holds new commands, and those answered with MOVED. It sends them to the
    next server, or refuses them after TIMEOUT.

    `call_soon(f)` runs f on the loop's thread. `watch(sock or None, want_write)` sets what the loop polls for this
    link. `prepare` runs on the reconnect thread before each attempt, and may start a Redis that has died.
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
        self._pending: deque[PendingCommand] = deque()  # in the order of their replies; the last ones may be unsent
        self._held: deque[PendingCommand] = deque()  # for the next server, while `_is_leaving`
        self._is_leaving = False
        self._unsent: list[bytes] = []  # for the next `flush`
        self._blocked = b''  # what the socket did not take at the last `flush`
        self._closed = threading.Event()
        self._last_warning = ''

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is outstanding."""
        return bool(self._pending)

    @property
    def _awaits_reply(self) -> bool:
        """Whether a reply is due. The commands for the next `flush` are not waiting for one yet."""
        return len(self._pending) > len(self._unsent)

    @property
    def unsent(self) -> int:
        """How many commands the next `flush` will send."""
        return len(self._unsent)

    def submit(self, command: PendingCommand) -> None:
        """Queues a command for `flush`. Its `done` gets the reply, an ErrorReply or an Unavailable."""
        command.sent_at = time.monotonic()
        if self._is_leaving:
            self._held.append(command)
            return
        if self._connection is None:
            command.finish(unavailable('is away; nothing was changed'))
            return
        self._pending.append(command)
        self._unsent.append(command.data)

    def refuse_unsent(self, error: TownError) -> None:
        """Discards the commands queued since the last `flush`, and passes the error to their callbacks."""
        count = len(self._unsent)
        self._unsent.clear()
        refused = [self._pending.pop() for _ in range(count)]
        for command in reversed(refused):
            command.finish(error)

    def flush(self) -> None:
        """Sends all queued commands in one write. Keeps what the socket does not take until it is writable again."""
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
        """Passes every complete reply to its callback.

        It reads until nothing is left: bytes that the parser has read ahead would not make the socket readable again.
        A reply that no command waits for ends the connection, before it can answer the next command.
        """
        connection = self._connection
        if connection is None:
            return
        try:
            # `is_stale` costs a sixth of `receive`, and notices that the server closed.
            while self._awaits_reply or connection.is_stale():
                reply = connection.receive()
                if reply is NOT_YET:
                    break
                self._answer(self._next_pending(), reply)
        except Unavailable as e:
            self.drop(e.detail.removeprefix('Redis '))
        if self._is_leaving and not self._pending:
            self.drop('does not accept writes for this town; looking for the server that does')

    def _next_pending(self) -> PendingCommand:
        if not self._awaits_reply:
            raise unavailable('went away: it sent a reply that no command was waiting for')
        return self._pending.popleft()

    def _answer(self, command: PendingCommand, reply: Any) -> None:
        if isinstance(reply, ErrorReply):
            if reply.kind == 'NOSCRIPT' and command.fallback:
                command.data, command.fallback = command.fallback(), None
                self.submit(command)
                return
            if reply.kind in NOT_PRIMARY:
                self._is_leaving = True
            if reply.kind == 'MOVED':
                self.submit(command)  # Redis did not execute it
                return
        command.finish(reply)

    def expire(self, now: float) -> None:
        """Drops the connection if the oldest pending command is overdue. Refuses commands that were held too long."""
        if self._pending and now - self._pending[0].sent_at > TIMEOUT:
            self.drop(f'did not answer within {TIMEOUT:g} s')
        if self._held and now - self._held[0].sent_at > TIMEOUT:
            self._resubmit()

    def _resubmit(self) -> None:
        """Submits the held commands again; without a connection, this refuses them."""
        self._is_leaving = False
        held, self._held = self._held, deque()
        for command in held:
            self.submit(command)

    def drop(self, why: str) -> None:
        """Closes the connection, fails all pending commands, and starts to reconnect.

        The outcome of the commands that were sent is unknown. Those queued since the last `flush` have changed nothing.
        """
        if self._connection is None:
            return
        self._watch(None, False)
        self._connection.close()
        self._connection = None
        self._blocked = b''
        pending, self._pending = self._pending, deque()
        sent = len(pending) - len(self._unsent)
        self._unsent.clear()
        for number, command in enumerate(pending):
            outcome = 'whether the change was made is not known' if number < sent else 'nothing was changed'
            command.finish(unavailable(f'{why}; {outcome}'))
        self._warn(why)
        self.reconnect()

    def reconnect(self) -> None:
        """Starts a thread that tries until it has a connection, or until `close`."""
        threading.Thread(target=self._connect, name='redis-connect', daemon=True).start()

    def _connect(self) -> None:
        while not self._closed.is_set():
            try:
                self._prepare()
                connection = self._endpoint.open()
                connection.ask('PING')
                self._call_soon(partial(self._attach, connection))
                return
            except Exception as e:  # whatever went wrong, the thread must keep trying
                self._warn(str(e))
            self._closed.wait(0.2)

    def _warn(self, why: str) -> None:
        """Logs why there is no connection, unless the last warning was the same."""
        if why != self._last_warning:
            self._last_warning = why
            logger.warning(why)

    def _attach(self, connection: RedisConnection) -> None:
        if self._closed.is_set():
            connection.close()
            return
        logger.log(logging.INFO if self._last_warning else logging.DEBUG, 'connected')
        self._last_warning = ''
        self._connection = connection
        self._watch(connection.sock, False)
        self._resubmit()

    def close(self) -> None:
        self._closed.set()
        if self._connection is not None:
            self._connection.close()
