"""The Redis client: one connection of the `redis` package, for synchronous callers and for an event loop.

Start with `RedisConnection`. `endpoints` opens it; `store` uses it synchronously, and `link` from an event loop.

`redis.connection.Connection` speaks the protocol. The class above it, `redis.Redis`, is not used: it costs 45 µs a
call, and by default it repeats writes whose reply was lost. This module never sends a command twice, and never reopens
a connection that has ended.
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

TIMEOUT: Final = 1.0  # seconds to connect, and to wait for a reply
_CLOSED: Final = 'connection closed'
NOT_YET: Final = object()  # no complete reply has arrived
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Part: TypeAlias = bytes | str | int


class ErrorReply(redis.ResponseError):
    """An error reply, verbatim. `kind` is its first word: NOSCRIPT, OOM, LOADING, WRONGTYPE, …"""

    @property
    def kind(self) -> str:
        return str(self).split(' ', 1)[0]


class VerbatimErrors:
    """A mixin for the parsers of `redis`: every error reply becomes an ErrorReply.

    Without it, `redis` drops the first word and treats LOADING and WRONGPASS as the end of the connection. Its Python
    parser then reads such a reply twice: the second time as the answer to the next command.
    """

    @classmethod
    def parse_error(cls, response: str) -> ErrorReply:
        return ErrorReply(response)


class ReplyParser(VerbatimErrors, DefaultParser):  # type: ignore[valid-type, misc]
    """The `hiredis` parser if that package is installed, else the one in Python."""


# ---------------------------------------------------------------------------------------------------- error replies

# Error replies that mean "not now" rather than "wrong". Redis has not executed the command.
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

# The ones that mean "this server does not accept the town's writes": connect anew to find the server that does.
NOT_PRIMARY: Final = frozenset({'MOVED', 'READONLY', 'UNBLOCKED', 'CLUSTERDOWN', 'MASTERDOWN'})

# In the reply to an unknown command, the arguments follow these words: after AUTH, that is the password.
_ARGUMENTS: Final = ', with args beginning with:'

_FORBIDDEN: Final = re.compile(r'NOPERM|ERR .*(?:user executing the script|ACL failure)')


def as_town_error(
    error: ErrorReply, peer: str = '', keys: str = 'tt:{TOWN}:', login: str = 'redis.url and redis.password_file'
) -> TownError:
    """The error to raise for an error reply.

    The message has the text of the reply, without the arguments of our command, which may be secret. If Redis has
    refused us, it names `peer` (our user and the server, `user@host:port`), the prefix of the `keys` we need, and the
    settings that hold the user and password (`login`).
    """
    at = f' at {peer}' if peer else ''
    answer = str(error).partition(_ARGUMENTS)[0]
    if error.kind in _NOT_NOW:
        return Unavailable(f'Nothing was changed: {_NOT_NOW[error.kind]}', code='redis-unavailable', retry_after=1)
    mend = ''
    if error.kind in ('NOAUTH', 'WRONGPASS'):
        mend = f'set the right user and password in {login}'
    elif _FORBIDDEN.match(answer):
        mend = f'our user needs access to the keys ~{keys}* and to the commands that docs/redis.md lists'
    if mend:
        detail = f'Redis{at} refused us: {answer.rstrip(".")}; {mend}'
        return Unavailable(detail, code='redis-unavailable', retry_after=5)
    return TownError(f'Redis{at} answered: {answer}', code='redis-error')


def unavailable(problem: str) -> Unavailable:
    """The error for a connection that could not be opened, or that failed. `problem` continues the word "Redis"."""
    return Unavailable(f'Redis {problem}', code='redis-unavailable', retry_after=1)


def cause_of(error: BaseException) -> str:
    """Why a connection ended: the operating system's error if `redis` has wrapped one, else the text of `error`."""
    if isinstance(error, redis.RedisError) and isinstance(error.__context__, OSError):
        return str(error.__context__)
    return _CLOSED if str(error) == 'Connection closed by server.' else str(error).rstrip('.')


def _failure(error: BaseException, problem: str = 'went away') -> str:
    """Describes a connection that failed while a reply was due: `problem`, unless the peer does not speak RESP."""
    if not isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        problem = 'spoke something other than its protocol'
    return f'{problem}: {cause_of(error)}'


# ------------------------------------------------------------------------------------------------------- connections

_PACKER: Final = Connection()  # never connected; it only packs commands


def pack(parts: Sequence[Part]) -> bytes:
    """A command as the bytes that Redis reads."""
    return b''.join(_PACKER.pack_command(*parts))


class RedisConnection:
    """An open connection that has passed its handshake. One thread at a time may use it; any thread may `cut` it."""

    def __init__(self, connection: AbstractConnection, peer: str = '') -> None:
        self.redis = connection
        self.peer = peer  # our user and the server, for messages

    @property
    def sock(self) -> socket.socket | None:
        """The socket, which `redis` keeps in a private attribute; None once the connection is closed."""
        sock: socket.socket | None = self.redis._sock
        return sock

    # For synchronous callers

    def request(self, data: bytes, timeout: float = TIMEOUT) -> Any:
        """Sends a packed command and returns the reply. An error reply is returned too, as an ErrorReply.

        Waits up to `timeout` seconds for each piece of the reply. Raises Unavailable if the reply does not arrive: the
        outcome is then unknown.
        """
        try:
            return self._exchange(data, timeout)
        except redis.TimeoutError:
            problem = f'did not answer within {timeout:g} s'
        except Exception as e:  # for bytes that are not RESP the parser may raise anything
            problem = _failure(e)
        raise unavailable(f'{problem}; whether the change was made is not known')

    def ask(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """Sends a command that changes nothing and returns the reply.

        Raises Unavailable; for an error reply it closes the connection and raises TownError.
        """
        reply = self.answer(*parts, timeout=timeout)
        if isinstance(reply, ErrorReply):
            self.close()
            raise as_town_error(reply, self.peer)
        return reply

    def answer(self, *parts: Part, timeout: float = TIMEOUT) -> Any:
        """As `ask`, but returns an error reply too, as an ErrorReply. Raises Unavailable."""
        try:
            return self._exchange(pack(parts), timeout)
        except Exception as e:  # as in `request`
            raise unavailable(_failure(e, 'did not answer')) from None

    def _exchange(self, data: bytes, timeout: float) -> Any:
        if not self.redis.is_connected:  # `redis` would reconnect, perhaps to a server that we have left
            raise ConnectionResetError(_CLOSED)
        self.redis.send_packed_command([data])
        try:
            return self.redis.read_response(True, timeout=timeout)
        except ErrorReply as reply:
            return reply

    def is_stale(self) -> bool:
        """Whether this idle connection can't be used: the server has closed it, or has sent something unasked."""
        try:
            return not self.redis.is_connected or self.redis.can_read(0)
        except redis.RedisError:
            return True

    # For an event loop: these never wait

    def send_some(self, data: bytes) -> int:
        """Sends as many bytes as the socket takes now, and returns how many. Raises OSError.

        The next call must begin with the bytes that were not sent: TLS may have encrypted them already.
        """
        assert self.sock
        self.sock.settimeout(0)  # `redis` restores its own timeout after each read
        try:
            return self.sock.send(data)
        except _WOULD_BLOCK:
            return 0

    def receive(self) -> Any:
        """The next reply (it may be an ErrorReply) if all of it has arrived, else `NOT_YET`. Raises Unavailable."""
        try:
            return self.redis.read_response(True, timeout=0, disconnect_on_error=False)
        except ErrorReply as reply:
            return reply
        except redis.TimeoutError:
            return NOT_YET
        except Exception as e:  # as in `request`
            raise unavailable(_failure(e)) from None

    # For other threads

    def cut(self) -> None:
        """Shuts the socket down. The thread that uses it sees a connection that the server closed. Raises OSError."""
        if sock := self.sock:
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket.shutdown is not safe from a second thread

    def close(self) -> None:
        self.redis.disconnect()
