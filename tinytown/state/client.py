"""The client of Redis: one connection of the `redis` package, used synchronously or by an event loop.

`redis.connection.Connection` speaks the protocol. `redis.Redis` above it is not used: it costs 45 µs a call, and by
default repeats writes whose reply was lost. Nothing here sends a command again, and what has ended stays ended.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import redis
from redis.connection import AbstractConnection, Connection, DefaultParser

from ..errors import TownError, Unavailable

TIMEOUT: Final = 1.0  # seconds for a connection, and for a reply
_CLOSED: Final = 'connection closed'
NOT_YET: Final = object()  # no whole reply is here
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Part: TypeAlias = bytes | str | int


class ErrorReply(redis.ResponseError):
    """An error reply as the server wrote it. `kind` is its first word: NOSCRIPT, OOM, LOADING, WRONGTYPE, …"""

    @property
    def kind(self) -> str:
        return str(self).split(' ', 1)[0]


class VerbatimErrors:
    """For a parser of `redis`: each error reply is an ErrorReply.

    By itself `redis` leaves out the first word, and takes LOADING and WRONGPASS for the end of the connection; its
    parser in Python then reads such a reply twice, and the second time as the answer to another command.
    """

    @classmethod
    def parse_error(cls, response: str) -> ErrorReply:
        return ErrorReply(response)


class ReplyParser(VerbatimErrors, DefaultParser):  # type: ignore[valid-type, misc]
    """The parser of `hiredis` where that is installed, else the one in Python."""


# ---------------------------------------------------------------------------------------------------- error replies

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

# Those of them by which a server says that it does not, or no longer, take the town's writes.
NOT_PRIMARY: Final = frozenset({'MOVED', 'READONLY', 'UNBLOCKED', 'CLUSTERDOWN', 'MASTERDOWN'})

_FORBIDDEN: Final = re.compile(r'NOPERM|ERR .*(?:user executing the script|ACL failure)')


def as_town_error(
    error: ErrorReply, about: str = '', keys: str = 'tt:{TOWN}:', login: str = 'redis.url and redis.password_file'
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


def cause_of(error: BaseException) -> str:
    """Why a connection ended, as the system says it where `redis` wraps what the system said."""
    if isinstance(error, redis.RedisError) and isinstance(error.__context__, OSError):
        return str(error.__context__)
    return _CLOSED if str(error) == 'Connection closed by server.' else str(error).rstrip('.')


def _ending(error: BaseException, what: str = 'went away') -> str:
    """How a connection ended on which a reply was due: `what`, unless the other side is no Redis."""
    if not isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        what = 'spoke something else than its protocol'
    return f'{what}: {cause_of(error)}'


# ------------------------------------------------------------------------------------------------------- connections

_PACKER: Final = Connection()  # never connected: it packs


def pack(parts: Sequence[Part]) -> bytes:
    """A command as bytes for Redis."""
    return b''.join(_PACKER.pack_command(*parts))


class RedisConnection:
    """A connection that is open and may be used. Not for two threads at once."""

    def __init__(self, connection: AbstractConnection, about: str = '') -> None:
        self.redis = connection
        self.about = about  # who we are and where, for messages

    @property
    def sock(self) -> socket.socket | None:
        """Its socket, which the package keeps to itself; None when it is closed."""
        found: socket.socket | None = self.redis._sock
        return found

    # Synchronously

    def request(self, data: bytes, timeout: float = TIMEOUT) -> Any:
        """Sends a packed command and gives its reply, an ErrorReply, too.

        It may take `timeout` seconds until something of the reply comes. Raises Unavailable: the outcome is unknown.
        """
        try:
            return self._exchange(data, timeout)
        except redis.TimeoutError:
            raise gone(f'did not answer within {timeout:g} s; whether the change was made is not known') from None
        except Exception as e:  # the parser raises anything for bytes that it can't read
            raise gone(f'{_ending(e)}; whether the change was made is not known') from None

    def ask(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """The reply to a command that changes nothing. Raises Unavailable, and TownError for an error reply."""
        reply = self.answer(*parts, timeout=timeout)
        if isinstance(reply, ErrorReply):
            self.close()
            raise as_town_error(reply, self.about)
        return reply

    def answer(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """The reply to a command that changes nothing, an ErrorReply, too. Raises Unavailable."""
        try:
            return self._exchange(pack(parts), timeout)
        except Exception as e:  # as above
            raise gone(_ending(e, 'did not answer')) from None

    def _exchange(self, data: bytes, timeout: float) -> Any:
        if not self.redis.is_connected:  # else it would connect by itself, and to a server that was left
            raise ConnectionResetError(_CLOSED)
        self.redis.send_packed_command([data])
        try:
            return self.redis.read_response(True, timeout=timeout)
        except ErrorReply as reply:
            return reply

    def is_stale(self) -> bool:
        """Whether the server has closed an idle connection (it was restarted, say)."""
        try:
            return not self.redis.is_connected or self.redis.can_read(0)
        except redis.RedisError:
            return True

    # By an event loop, without waiting

    def send_some(self, data: bytes) -> int:
        """Sends what can be sent now, and says how many bytes that were. Raises OSError.

        Behind TLS, data that was not sent must be given again, at the beginning: it may be half on its way.
        """
        assert self.sock
        self.sock.settimeout(0)  # `redis` sets a timeout after each of its reads
        try:
            return self.sock.send(data)
        except _WOULD_BLOCK:
            return 0

    def receive(self) -> Any:
        """The next reply if all of it is here, an ErrorReply, too; else `NOT_YET`. Raises Unavailable."""
        try:
            return self.redis.read_response(True, timeout=0, disconnect_on_error=False)
        except ErrorReply as reply:
            return reply
        except redis.TimeoutError:
            return NOT_YET
        except Exception as e:  # as above
            raise gone(_ending(e)) from None

    # By another thread

    def cut(self) -> None:
        """Ends it: whoever uses it finds it closed by the server, as it were. Any thread may call. Raises OSError."""
        if sock := self.sock:
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # and not that of TLS, which is not for two threads

    def close(self) -> None:
        self.redis.disconnect()
