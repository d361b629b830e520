"""The Redis protocol (RESP2) on a socket: pack, read, and two ways to wait for replies.

It is spoken here because the usual client costs 45 µs of wrappers a call and by default repeats writes whose reply was
lost. Nothing here sends a command again that may have been executed; one that was answered with MOVED was not.

`Wire` is one connection used synchronously, `Link` one that an event loop feeds: it pipelines the commands of all
requests that are ready together, so that they share one write and, on the server, one fsync. An `Address` makes
connections, and finds out where to: `UnixSocket`, and those in `whereabouts.py`.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from ..errors import TownError, Unavailable

logger = logging.getLogger('tinytown.state')

TIMEOUT: Final = 1.0  # seconds for a connection, and for a reply
_MORE: Final = object()  # the reader has no whole reply yet
_HEAD: Final = re.compile(rb'([$:*])(-?[0-9]{1,19})\r\n')  # of a bulk string, an integer, an array
_TEXTS: Final = frozenset({str, int})

Part = bytes | str | int


class RedisError(Exception):
    """An error reply. `kind` is its first word: NOSCRIPT, OOM, LOADING, WRONGTYPE, …"""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.kind = text.split(' ', 1)[0]


# Error replies that say "not now" and not "wrong": nothing was done.
_NOT_NOW: Final = {
    'LOADING': 'Redis is loading its data',
    'OOM': 'Redis is out of memory; raise maxmemory or free some',
    'MISCONF': "Redis can't write to its disk",
    'READONLY': 'Redis is a read-only replica',
    'MASTERDOWN': 'Redis is a replica that lost its master',
    'CLUSTERDOWN': 'the Redis cluster is down',
    'BUSY': 'Redis is busy with a script',
    'TRYAGAIN': 'the Redis cluster is moving the town to another node',
    'ASK': 'the Redis cluster is moving the town to another node',
    'MOVED': 'the Redis cluster has moved the town to another node',
    'UNBLOCKED': 'Redis became a replica',
    'NOREPLICAS': 'Redis has too few replicas',
}

# Those of them by which a server says that it is not, or no more, the one to ask.
ASTRAY: Final = frozenset({'MOVED', 'READONLY', 'UNBLOCKED', 'CLUSTERDOWN', 'MASTERDOWN'})


_FORBIDDEN: Final = re.compile(r'NOPERM|ERR .*(?:user executing the script|ACL failure)')


def as_town_error(
    error: RedisError, about: str = '', keys: str = 'tt:{TOWN}:', login: str = 'redis.url and redis.password_file'
) -> TownError:
    """What a caller is told of an error reply.

    For one that refuses us, `about` is who we are and where (`user@host:port`), `keys` how the keys begin that we need,
    and `login` the settings that name user and password.
    """
    at = f' at {about}' if about else ''
    if error.kind in _NOT_NOW:
        return Unavailable(f'Nothing was changed: {_NOT_NOW[error.kind]}', code='redis-unavailable', retry_after=1)
    mend = ''
    if error.kind in ('NOAUTH', 'WRONGPASS'):
        mend = f'set the right user and password in {login}'
    elif _FORBIDDEN.match(str(error)):
        mend = f'our user needs the keys ~{keys}* and the commands that docs/redis.md lists'
    if mend:
        told = f'Redis{at} refused us: {str(error).rstrip(".")}; {mend}'
        return Unavailable(told, code='redis-unavailable', retry_after=5)
    return TownError(f'Redis{at} answered: {error}', code='redis-error')


def gone(what: str) -> Unavailable:
    """The error for a connection that could not be made or used: the outcome of a command that was sent is unknown."""
    return Unavailable(f'Redis {what}', code='redis-unavailable', retry_after=1)


def pack(parts: Sequence[Part]) -> bytes:
    """A command as an array of bulk strings."""
    return b'*%d\r\n%b' % (len(parts), bulks(parts))


def bulks(parts: Sequence[Part]) -> bytes:
    """The bulk strings of a command, without the number of them before it."""
    if _TEXTS.issuperset(map(type, parts)):
        text = ''.join([f'${len(part)}\r\n{part}\r\n' for part in map(str, parts)])
        if text.isascii():  # then a character is a byte, and this is half as dear
            return text.encode()
    found = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b''.join([b'$%d\r\n%b\r\n' % (len(part), part) for part in found])


class Reader:
    """Takes bytes as they arrive and gives whole replies: int, bytes, None, list, RedisError."""

    def __init__(self) -> None:
        self._buffer = b''
        self._at = 0
        self._begun: list[tuple[list[Any], int]] = []  # arrays whose rest is not here yet, the innermost first

    def feed(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data  # mostly whole replies come, and none is left

    def next(self) -> Any:
        """The next whole reply, or `_MORE`."""
        reply = self._go_on() if self._begun else self._read()
        if self._at == len(self._buffer):
            self._buffer, self._at = b'', 0
        elif self._at > 1 << 16:
            self._buffer, self._at = self._buffer[self._at :], 0
        return reply

    def _read(self) -> Any:
        """The next reply or item of one, or `_MORE`."""
        buffer = self._buffer
        head = _HEAD.match(buffer, self._at)
        if head is None:
            return self._read_line()
        kind, number = head[1], int(head[2])
        start = head.end()
        if kind == b'$' and number >= 0:
            end = start + number
            if len(buffer) < end + 2:
                return _MORE
            self._at = end + 2
            return buffer[start:end]
        self._at = start
        if kind == b':':
            return number
        return self._read_items([], number) if number >= 0 else None

    def _read_items(self, items: list[Any], count: int) -> Any:
        """Fills an array up. What is here of one is read once, however many pieces it comes in."""
        while len(items) < count:
            item = self._read()
            if item is _MORE:
                self._begun.append((items, count))
                return _MORE
            items.append(item)
        return items

    def _go_on(self) -> Any:
        """The reply of which a part was read."""
        begun, self._begun = self._begun, []
        inner: Any = _MORE
        for level, (items, count) in enumerate(begun):
            if level:
                items.append(inner)
            inner = self._read_items(items, count)
            if inner is _MORE:
                self._begun += begun[level + 1 :]
                return _MORE
        return inner

    def _read_line(self) -> Any:
        """What is no number of something: a status, an error, or a line that is not here yet."""
        buffer, at = self._buffer, self._at
        end = buffer.find(b'\r\n', at)
        if end < 0:
            return _MORE
        kind, line = buffer[at], buffer[at + 1 : end]
        self._at = end + 2
        if kind == 0x2B:  # +
            return line
        if kind == 0x2D:  # -
            return RedisError(line.decode('utf-8', 'replace'))
        raise gone(f'spoke something else than its protocol ({buffer[at : at + 40]!r})')


class Address(Protocol):
    """Where a Redis is that may be written to."""

    def open(self, timeout: float = TIMEOUT) -> Wire:
        """A connection to it, looked for anew. Raises Unavailable, or TownError where it does not want us."""


class Wire:
    """One connection, over a connected socket. Not for two threads at once."""

    def __init__(self, sock: socket.socket, about: str = '') -> None:
        self.sock = sock
        self.about = about  # who we are and where, for messages
        self.reader = Reader()

    def request(self, data: bytes, timeout: float = TIMEOUT) -> Any:
        """Sends a packed command and gives its reply, within `timeout` seconds. Raises Unavailable: outcome unknown."""
        try:
            return self._exchange(data, timeout)
        except TimeoutError:
            raise gone(f'did not answer within {timeout:g} s; whether the change was made is not known') from None
        except OSError as e:
            raise gone(f'went away: {e}; whether the change was made is not known') from None

    def ask(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """The reply to a command that changes nothing. Raises Unavailable, and TownError for an error reply."""
        reply = self.answer(*parts, timeout=timeout)
        if isinstance(reply, RedisError):
            self.close()
            raise as_town_error(reply, self.about)
        return reply

    def answer(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """The reply to a command that changes nothing, a RedisError, too. Raises Unavailable."""
        try:
            return self._exchange(pack(parts), timeout)
        except OSError as e:
            raise gone(f'did not answer: {e}') from None

    def _exchange(self, data: bytes, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        try:
            self.sock.settimeout(timeout)
            self.sock.sendall(data)
            while (reply := self.reader.next()) is _MORE:
                self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
                received = self.sock.recv(65536)
                if not received:
                    raise ConnectionResetError('connection closed')
                self.reader.feed(received)
        except BaseException:
            self.close()
            raise
        return reply

    def is_stale(self) -> bool:
        """Whether the server has closed an idle connection (it was restarted, say)."""
        if self.sock.fileno() < 0:
            return True
        idle = select.poll()  # select.select() takes no descriptor above 1023
        idle.register(self.sock, select.POLLIN)
        return bool(idle.poll(0))

    def close(self) -> None:
        self.sock.close()

    def __del__(self) -> None:  # a thread's connection goes with the thread
        self.close()


class UnixSocket:
    """A server at a path that lets in whoever may open it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self, timeout: float = TIMEOUT) -> Wire:
        """A connection. Raises Unavailable."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout)
            sock.connect(self.path)
        except OSError as e:
            sock.close()
            raise gone(f'is not there: {self.path}: {e.strerror or e}') from None
        return Wire(sock)


class Request:
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
    made a connection that answers PING. A server that says that it is not the one to ask is left once it has answered
    what it was sent; what comes meanwhile, or was MOVED, is held for the right one, and refused after TIMEOUT.

    `call_soon(f)` runs f on the loop's thread; `watch(sock or None, want_write)` tells the loop what to poll; `prepare`
    may start a server that has died.
    """

    def __init__(
        self,
        address: Address,
        call_soon: Callable[[Callable[[], None]], None],
        watch: Callable[[socket.socket | None, bool], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._call_soon = call_soon
        self._watch = watch
        self._prepare = prepare
        self._wire: Wire | None = None
        self._pending: deque[Request] = deque()
        self._held: deque[Request] = deque()
        self._is_astray = False
        self._unsent: list[bytes] = []
        self._blocked = b''
        self._closed = threading.Event()
        self._said = ''

    @property
    def is_up(self) -> bool:
        return self._wire is not None

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is due."""
        return bool(self._pending)

    @property
    def unsent(self) -> int:
        """How many commands wait for `flush`."""
        return len(self._unsent)

    def submit(self, request: Request) -> None:
        """Queues a command; `flush` sends. The reply, a RedisError or an Unavailable goes to its `done`."""
        request.sent_at = time.monotonic()
        if self._is_astray:
            self._held.append(request)
            return
        if self._wire is None:
            request.done(gone('is away; nothing was changed'))
            return
        self._pending.append(request)
        self._unsent.append(request.data)

    def refuse_unsent(self, error: TownError) -> None:
        """Takes back what was queued since the last `flush`, and gives the error to those who wait for it."""
        count = len(self._unsent)
        self._unsent.clear()
        refused = [self._pending.pop() for _ in range(count)]
        for request in reversed(refused):
            request.done(error)

    def flush(self) -> None:
        """Sends what was queued, in one write."""
        if self._wire is None or not (self._unsent or self._blocked):
            return
        data = self._blocked + b''.join(self._unsent)
        self._unsent.clear()
        was_blocked = bool(self._blocked)
        try:
            sent = self._wire.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as e:
            self.drop(f'went away: {e}')
            return
        self._blocked = data[sent:]
        if bool(self._blocked) != was_blocked:
            self._watch(self._wire.sock, bool(self._blocked))

    def on_readable(self) -> None:
        """Hands replies to those who wait."""
        wire = self._wire
        if wire is None:
            return
        try:
            data = wire.sock.recv(1 << 18)
            if not data:
                raise ConnectionResetError('connection closed')
            wire.reader.feed(data)
            while self._pending and (reply := wire.reader.next()) is not _MORE:
                self._answer(self._pending.popleft(), reply)
            if self._is_astray and not self._pending:
                self.drop('is not the one to ask')
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, Unavailable) as e:
            self.drop(f'went away: {e}')

    def _answer(self, request: Request, reply: Any) -> None:
        if isinstance(reply, RedisError):
            if reply.kind == 'NOSCRIPT' and request.fallback:
                request.data, request.fallback = request.fallback(), None
                self.submit(request)
                return
            if reply.kind in ASTRAY:
                self._is_astray = True
            if reply.kind == 'MOVED':
                self.submit(request)  # it was not executed
                return
        request.done(reply)

    def expire(self, now: float) -> None:
        """Gives up when the oldest command has waited for TIMEOUT."""
        if self._pending and now - self._pending[0].sent_at > TIMEOUT:
            self.drop(f'did not answer within {TIMEOUT:g} s')
        if self._held and now - self._held[0].sent_at > TIMEOUT:
            self._resubmit()

    def _resubmit(self) -> None:
        """Sends what was held, or refuses it where there is still no connection."""
        self._is_astray = False
        held, self._held = self._held, deque()
        for request in held:
            self.submit(request)

    def drop(self, why: str) -> None:
        """Ends the connection, tells all who wait that their outcome is unknown, and begins to reconnect."""
        if self._wire is None:
            return
        self._watch(None, False)
        self._wire.close()
        self._wire = None
        self._blocked = b''
        self._unsent.clear()
        waiting, self._pending = self._pending, deque()
        for request in waiting:
            request.done(gone(f'{why}; whether the change was made is not known'))
        self._say(why)
        self.reconnect()

    def reconnect(self) -> None:
        """Tries, on a thread of its own, until there is a connection."""
        threading.Thread(target=self._connect, name='redis-connect', daemon=True).start()

    def _connect(self) -> None:
        while not self._closed.is_set():
            try:
                self._prepare()
                wire = self._address.open()
                wire.ask('PING')
                self._call_soon(partial(self._attach, wire))
                return
            except Exception as e:  # whatever it is, the link must come back
                self._say(str(e))
            self._closed.wait(0.2)

    def _say(self, what: str) -> None:
        """Notes why there is no connection, when that changes."""
        if what != self._said:
            self._said = what
            logger.warning(what)

    def _attach(self, wire: Wire) -> None:
        if self._closed.is_set():
            wire.close()
            return
        wire.sock.setblocking(False)
        logger.log(logging.INFO if self._said else logging.DEBUG, 'connected')
        self._said = ''
        self._wire = wire
        self._watch(wire.sock, False)
        self._resubmit()

    def close(self) -> None:
        self._closed.set()
        if self._wire is not None:
            self._wire.close()
