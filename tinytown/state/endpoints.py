"""Endpoints: parses `redis.url`, finds the one server that accepts the town's writes, and opens connections to it.

Start with `endpoint_of`. Its result is one of three endpoints, which `store` and `link` open:

- `RedisServer`: the server that the URL names.
- `Sentinels`: the master that sentinels name.
- `Cluster`: the node of a Redis Cluster that holds the town. All keys of a town have one hash tag, so they are in one
  slot, and one connection is enough.

Every `open` looks for the server anew, so after a failover it is enough to reconnect. It also reads passwords and
certificates anew, so they can be replaced while a town is open.
"""

from __future__ import annotations

import binascii
import os
import re
import socket
import ssl
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote

from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.retry import Retry

from ..errors import TownError, UsageError
from ..settings import RedisSettings
from .client import TIMEOUT, ErrorReply, RedisConnection, ReplyParser, as_town_error, cause_of, unavailable

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_SLOTS: Final = 16384
_WATCH_SECS: Final = 0.25  # between two questions to a sentinel which server is the master
_MOVES: Final = 5  # redirections to follow in a row
_MAX_SECRET: Final = 65_536  # characters of a password file
_READ_SIZE: Final = 1 << 16
_ASK_SECS: Final = 0.5  # to connect to a sentinel, and for its reply; then the next sentinel is asked

T = TypeVar('T')
HostPort = tuple[str, int]  # host and port

FORMS: Final = (
    'redis://[user:password@]host[:port][/db], unix://[user:password@]/path[?db=1], '
    'redis+sentinel://[user:password@]host[:port],host[:port]/master[/db] or '
    'redis+cluster://[user:password@]host[:port],host[:port]; with TLS rediss://, rediss+sentinel:// or '
    'rediss+cluster://'
)
_URL: Final = re.compile(
    r'(?P<scheme>unix|rediss?(?:\+(?:sentinel|cluster))?)://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^/?#]*)'
    r'(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?'
)
_LABEL: Final = '[A-Za-z0-9_-]{1,63}'  # of a host name (RFC 1035, 2.3.4); Python refuses to look up a longer one
_ADDRESS: Final = r'\[[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}\]'  # IPv6; the dots are those of ::ffff:1.2.3.4
_HOST: Final = re.compile(rf'({_ADDRESS}|{_LABEL}(?:\.{_LABEL})*\.?)(?::([0-9]{{1,5}}))?')


# ----------------------------------------------------------------------------------------------- one server


@dataclass(frozen=True)
class Login(CredentialProvider):
    """The user and password for a server. A password in a `file` is read anew for each connection.

    `settings` names the settings that these values come from, for messages.
    """

    user: str = ''
    password: str = field(default='', repr=False)
    file: Path | None = None
    settings: str = field(default='redis.url and redis.password_file', compare=False)

    @property
    def is_needed(self) -> bool:
        """Whether we have a password to send."""
        return bool(self.password or self.file)

    def get_credentials(self) -> tuple[str, ...]:  # type: ignore[override]
        """The arguments of AUTH; none without a password. Raises Unavailable if the file can't be read."""
        password = self.password
        if self.file:
            try:
                password = read_secret(self.file)
            except (OSError, ValueError) as e:
                raise unavailable(f"can't be used: the password file {self.file} can't be read: {e}") from None
        if not password:
            return ()
        return (self.user, password) if self.user else (password,)


def read_secret(file: Path) -> str:
    """The content of a password file, without the end of its line.

    Raises OSError if it can't be read, and ValueError if it is not a regular file or if other users may change it.
    """
    # Without O_NONBLOCK, opening a named pipe would block until somebody writes.
    with open(file, encoding='utf-8', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as opened:
        mode = os.fstat(opened.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError('it is not a regular file')
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f'other users may change it; run  chmod go-w {file}')
        return opened.read(_MAX_SECRET).rstrip('\r\n')


@dataclass(frozen=True)
class Tls:
    """The certificates for TLS, as PEM files: `ca` verifies the server, `cert` and `key` are ours.

    Without `ca`, the authorities that this machine trusts verify the server.
    """

    ca: Path | None
    cert: Path | None
    key: Path | None
    check_hostname: bool

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.ca, self.cert, self.key) if file]

    def context(self) -> ssl.SSLContext:
        """A context for TLS 1.2 or newer. Raises OSError (ssl.SSLError is one) or ValueError."""
        for file in self.files:
            with open(file, 'rb'):
                pass  # raises an OSError that names the file; the one of `ssl` does not
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.check_hostname
        if self.ca:
            context.load_verify_locations(self.ca)
        else:
            context.load_default_certs()
        if self.cert:
            context.load_cert_chain(self.cert, self.key, password='')  # for an encrypted key: fail, don't prompt
        return context


class _TlsConnection(SSLConnection):
    """Uses our context. The one of `redis` trusts the machine's authorities in addition to the configured one."""

    def __init__(self, context: ssl.SSLContext, **settings: Any) -> None:
        super().__init__(**settings)
        self._context = context

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        return self._context.wrap_socket(sock, server_hostname=self.host)


class _UnixConnection(UnixDomainSocketConnection):
    """Adds host and port: `redis` reads both when it counts an error, but sets neither for a unix socket."""

    host = 'localhost'
    port = 0


class Endpoint(Protocol):
    """A way to the Redis server that accepts the town's writes."""

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """Finds the server and connects to it, with `timeout` in seconds.

        Raises Unavailable, or TownError if the server answers the handshake with an unexpected error.
        """


@dataclass(frozen=True)
class RedisServer:
    """One server, at a host and port, or at the `path` of a unix socket."""

    path: str = ''
    host: str = ''
    port: int = _PORT
    login: Login = Login()
    db: int = 0
    tls: Tls | None = None

    @property
    def name(self) -> str:
        return self.path or (f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}')

    @property
    def peer(self) -> str:
        """Our user and the server, for messages."""
        return f'{self.login.user}@{self.name}' if self.login.user else self.name

    def at(self, place: HostPort) -> RedisServer:
        """A server at another host and port, with the same login, database and TLS."""
        return replace(self, host=place[0], port=place[1])

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """As `Endpoint.open`: connects, does the TLS handshake, authenticates and selects the database."""
        connection = self._prepare(timeout)
        try:
            connection.connect()
        except BaseException as e:
            connection.disconnect()
            if isinstance(e, TownError) or not isinstance(e, Exception):
                raise
            raise unavailable(self._explain(e)) from None  # e is a UnicodeError if a sentinel names an impossible host
        return RedisConnection(connection, self.peer)

    def _prepare(self, timeout: float) -> AbstractConnection:
        """An unconnected connection, which never repeats a command and sends nothing by itself.

        Raises Unavailable if a file with certificates can't be used.
        """
        settings: dict[str, Any] = {
            'db': self.db,
            'credential_provider': self.login,
            'socket_timeout': timeout,
            'socket_connect_timeout': timeout,
            'socket_read_size': _READ_SIZE,
            'encoding_errors': 'replace',  # for error replies; nothing else is decoded
            'parser_class': ReplyParser,
            'protocol': 2,
            'driver_info': None,
            'retry': Retry(NoBackoff(), 0),
            'redis_connect_func': self._greet,
        }
        if self.path:
            return _UnixConnection(self.path, **settings)  # type: ignore[no-untyped-call]
        settings |= {'host': self.host, 'port': self.port}
        if not self.tls:
            return Connection(**settings)
        try:
            return _TlsConnection(self.tls.context(), **settings)
        except (OSError, ValueError) as e:
            files = ', '.join(map(str, self.tls.files)) or 'of this machine'
            raise unavailable(f"can't be used: the certificates {files} can't be read: {e}") from None

    def _greet(self, connection: AbstractConnection) -> None:
        """The handshake with Redis: authenticates and selects the database. Raises TownError."""
        try:
            connection.on_connect()
            if self.tls and not self.login.is_needed:
                _ping(connection)  # with TLS 1.3 a server rejects our certificate only after the TLS handshake
        except ErrorReply as e:
            raise as_town_error(e, self.peer, login=self.login.settings) from None
        except TownError:  # the password file can't be read
            raise
        except Exception as e:  # for bytes that are not RESP the parser may raise anything
            raise unavailable(f'at {self.name} did not complete the handshake: {cause_of(e)}{self._hint}') from None

    def _explain(self, error: Exception) -> str:
        """Why the connection could not be opened, and the mend."""
        e = error.__context__
        if untrusted := getattr(e, 'verify_message', ''):
            mend = 'set redis.tls_ca_path to a file with the certificate of its authority'
            if 'mismatch' in untrusted:
                mend = 'use a host name that its certificate contains, or set redis.tls_check_hostname = false'
            return f'at {self.name} shows a certificate that is not trusted: {untrusted.rstrip(".")}; {mend}'
        if isinstance(e, TimeoutError) and 'handshake' in str(e):
            mend = 'if it speaks no TLS, write redis instead of rediss in redis.url'
            return f'at {self.name} does not answer to TLS; {mend}'
        if isinstance(e, ssl.SSLError) and e.reason:
            return f'at {self.name} broke off the TLS handshake: {e.reason}{self._hint}'
        return f'is not there: {self.name}: {getattr(e, "strerror", None) or cause_of(error)}'

    @property
    def _hint(self) -> str:
        return '; it may want a client certificate: set redis.tls_cert_path' if self.tls and not self.tls.cert else ''


def _ping(connection: AbstractConnection) -> None:
    connection.send_command('PING')
    with suppress(ErrorReply):
        connection.read_response()


# ------------------------------------------------------------------------------------------- sentinels and clusters


@dataclass
class Sentinels:
    """The master that sentinels name. The sentinel that answered last is asked first.

    A master that was demoted, or cut off from the network, may accept writes for some seconds before it notices. Those
    writes are lost. Therefore, while there are connections, a thread keeps asking for the current master, and cuts
    connections to any other server.
    """

    places: list[HostPort]  # of the sentinels
    sentinel: RedisServer  # how to connect to a sentinel; its host and port come from `places`
    master: str  # the name by which the sentinels know it
    server: RedisServer  # how to connect to the master; the sentinels name its host and port
    _opened: list[tuple[weakref.ref[RedisConnection], HostPort]] = field(default_factory=list)
    _watched_by: int = 0  # the process id of the thread that watches: a forked process needs its own

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """As `Endpoint.open`. The server must confirm with ROLE that it is a master."""
        connection, place = self._first(partial(self._open_master, timeout))
        self._opened.append((weakref.ref(connection), place))
        self._start_watch()
        return connection

    def _first(self, ask: Callable[[RedisConnection], T]) -> T:
        """Calls `ask` with a connection to each sentinel until one succeeds. Raises Unavailable if none does."""
        faults = []
        for place in list(self.places):
            try:
                sentinel = self.sentinel.at(place).open(_ASK_SECS)
                result = ask(sentinel)
            except TownError as e:
                faults.append(f'sentinel {place[0]}:{place[1]}: {e.detail}')
                continue
            self.places = [place, *(other for other in self.places if other != place)]
            return result
        raise unavailable(f'has no master {self.master} that can be reached. {"; ".join(faults)}')

    def _open_master(self, timeout: float, sentinel: RedisConnection) -> tuple[RedisConnection, HostPort]:
        place = self._master_of(sentinel)
        sentinel.close()
        server = self.server.at(place)
        connection = server.open(timeout)
        role = connection.ask('ROLE')[0]
        if role == b'master':
            return connection, place
        connection.close()
        raise unavailable(f'at {server.name} is named as the master, but says that it is not one ({role.decode()})')

    def _master_of(self, sentinel: RedisConnection) -> HostPort:
        reply = sentinel.answer('SENTINEL', 'get-master-addr-by-name', self.master, timeout=_ASK_SECS)
        if isinstance(reply, ErrorReply):
            sentinel.close()
            raise as_town_error(reply, sentinel.peer, login=self.sentinel.login.settings)
        if reply is None:
            sentinel.close()
            raise unavailable(f'master {self.master} is not known there; see SENTINEL MASTERS')
        try:
            host, port = reply
            return host.decode(), int(port)
        except (AttributeError, TypeError, ValueError):
            sentinel.close()
            raise unavailable(f'master {self.master} has no host and port there, but {reply!r}') from None

    def _start_watch(self) -> None:
        """Starts the thread that watches, if there are connections and this process has no such thread."""
        if self._opened and self._watched_by != os.getpid():
            self._watched_by = os.getpid()
            threading.Thread(target=self._watch, name='sentinels', daemon=True).start()

    def _watch(self) -> None:
        sentinel = place = None
        try:
            while self._has_connections():
                time.sleep(_WATCH_SECS)
                try:
                    # `open` may have changed to another sentinel: one that is cut off may name a dead master for ever.
                    if sentinel is None or place != self.places[0]:
                        sentinel, place = self._first(lambda connection: connection), self.places[0]
                    self._cut_all_but(self._master_of(sentinel))
                except TownError:
                    sentinel = None
        finally:
            if sentinel:
                sentinel.close()
            self._watched_by = 0
            self._start_watch()  # if `open` has just left a connection to this thread, or if a bug of ours ended it

    def _has_connections(self) -> bool:
        """Whether a connection is open. Forgets those that are not."""
        for entry in list(self._opened):
            connection = entry[0]()
            if connection is None or connection.sock is None:
                with suppress(ValueError):  # two `open` at once may have started two threads
                    self._opened.remove(entry)
        return bool(self._opened)

    def _cut_all_but(self, master: HostPort) -> None:
        for reference, place in list(self._opened):
            connection = reference()
            if connection and place != master:
                with suppress(OSError):
                    connection.cut()


@dataclass
class Cluster:
    """The node of a Redis Cluster that holds the slot of a key. The node that held it last is asked first."""

    places: list[HostPort]  # of the nodes that the URL names
    server: RedisServer  # how to connect to a node
    key: str
    last: HostPort | None = None

    @property
    def slot(self) -> int:
        """The slot of the key: CRC16 (XMODEM) of its hash tag, as the Redis Cluster specification defines it."""
        tag = re.sub(r'.*?\{([^}]+)\}.*', r'\1', self.key)
        return binascii.crc_hqx(tag.encode(), 0) % _SLOTS

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """As `Endpoint.open`, to the node that holds the slot."""
        faults = []
        for place in [self.last, *self.places] if self.last else self.places:
            try:
                connection, self.last = self._follow(place, timeout)
            except TownError as e:
                faults.append(e.detail.removeprefix('Redis '))
            else:
                return connection
        raise unavailable(f'has no node that can be reached and holds slot {self.slot}: {"; ".join(faults)}')

    def _follow(self, place: HostPort, timeout: float) -> tuple[RedisConnection, HostPort]:
        """Connects to the node at `place`, and from there to the one that holds the slot: others answer MOVED."""
        for _ in range(_MOVES):
            connection = self.server.at(place).open(timeout)
            reply = connection.answer('EXISTS', self.key, timeout=timeout)
            if not isinstance(reply, ErrorReply) or reply.kind in ('ASK', 'TRYAGAIN'):  # still the slot's owner
                return connection, place
            connection.close()
            if reply.kind != 'MOVED':
                raise as_town_error(reply)
            host, _, port = str(reply).split(' ')[2].rpartition(':')
            place = (host.strip('[]') or place[0], int(port))  # an empty host means: the same host, another port
        raise unavailable(f'redirects us from node to node for slot {self.slot}; see CLUSTER NODES')


# ------------------------------------------------------------------------------------------------ settings and URL


def endpoint_of(settings: RedisSettings, key: str, root: Path) -> Endpoint:
    """The endpoint that the settings describe.

    `key` is any key of the town: in a Cluster it determines the slot. Relative paths start from `root`. Raises
    UsageError, which names the part that is wrong and never shows a password.
    """
    url = read_url(settings.url)
    login = _login(url.user, url.password, settings, root)
    server = RedisServer(path=url.path, login=login, db=url.db, tls=_tls(url.is_tls, settings, root))
    if url.kind == 'sentinel':
        file = _secret_file('sentinel_password_file', settings, root)
        sentinel_login = Login(settings.sentinel_user, '', file, 'redis.sentinel_user and redis.sentinel_password_file')
        return Sentinels(url.places, RedisServer(login=sentinel_login, tls=server.tls), url.master, server)
    if url.kind == 'cluster':
        return Cluster(url.places, server, key)
    return server if url.path else server.at(url.places[0])


class Url(NamedTuple):
    """A parsed `redis.url`. `kind` is 'sentinel', 'cluster' or ''. It has a `path` for a unix socket, else `places`."""

    kind: str
    is_tls: bool
    user: str
    password: str
    places: list[HostPort]
    path: str
    master: str
    db: int


def read_url(url: str) -> Url:
    """Parses a `redis.url`, without the other settings. Raises UsageError, which names the part that is wrong."""
    parts = _split(url)
    query, path = _query(parts['query']), unquote(parts['path'])
    scheme, _, kind = parts['scheme'].partition('+')
    user, _, password = parts['login'].partition(':')
    user, password = unquote(user) or query.get('username', ''), unquote(password) or query.get('password', '')
    db = _number(query.get('db', ''))
    if scheme == 'unix':
        if parts['hosts'] or len(path) < 2:
            raise _wrong('the path of the socket is missing; write unix:///run/redis.sock')
        return Url('', False, user, password, [], path, '', db)
    places = list(_places(parts['hosts'], _SENTINEL_PORT if kind == 'sentinel' else _PORT))
    if not kind and len(places) > 1:
        raise _wrong('it names several hosts; write redis+sentinel:// or redis+cluster://')
    master, db = _master_and_db(path, kind, db)
    return Url(kind, scheme == 'rediss', user, password, places, '', master, db)


def _master_and_db(path: str, kind: str, db: int) -> tuple[str, int]:
    """The name of the master and the number of the database in a path. `db` is the default for the latter."""
    words = path.strip('/').split('/')
    master = words.pop(0) if kind == 'sentinel' else ''
    if kind == 'sentinel' and not master:
        raise _wrong('the name of the master is missing; write it after the sentinels: …:26379/mymaster')
    db = (_number(words.pop(0)) if words else 0) or db
    if words:
        raise _wrong(f'there is too much after the host{"s and the master" if master else ""}')
    if kind == 'cluster' and db:
        raise _wrong('a Cluster has only database 0; leave the number out')
    return master, db


_ENCODED: Final = '; in a user or password write %40 for @, %2F for /, %3F for ?, %23 for # and %25 for %'


def _wrong(problem: str) -> UsageError:
    return UsageError(f'redis.url: {problem}. Write one of {FORMS}')


def _split(url: str) -> dict[str, str]:
    """The parts of a URL: scheme, login, hosts, path, query; '' for a missing one."""
    match = _URL.fullmatch(url)
    if not match:
        raise _wrong("it can't be read" + (_ENCODED if '@' in url else ''))
    parts = match.groupdict(default='')
    if parts['scheme'] != 'unix' and '@' in parts['path'] + parts['query']:
        raise _wrong('there is an @ after the host' + _ENCODED)
    return parts


def _query(text: str) -> dict[str, str]:
    query = dict(parse_qsl(text, keep_blank_values=True))
    unknown = sorted(query.keys() - {'db', 'username', 'password'})
    if unknown:
        raise _wrong(f'?{unknown[0]}= is not known; for TLS use redis.tls_ca_path and the other redis.tls_ settings')
    return query


def _login(user: str, password: str, settings: RedisSettings, root: Path) -> Login:
    if user and not password and not settings.password_file:
        raise _wrong('there is a user but no password; add :password, or set redis.password_file')
    if password and settings.password_file:
        raise UsageError('redis.password_file is set, but redis.url holds a password, too; remove one of them')
    return Login(user, password, _secret_file('password_file', settings, root))


def _file(name: str, settings: RedisSettings, root: Path) -> Path | None:
    """The file that a setting names, or None. Raises UsageError if it can't be read."""
    value = getattr(settings, name)
    if not value:
        return None
    file = root / Path(value).expanduser()
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a named pipe would block until somebody writes
            raise UsageError(f'redis.{name}: {file} is not a regular file')
        with open(file, 'rb'):
            return file
    except OSError as e:
        raise UsageError(f'redis.{name}: {file}: {e.strerror}') from None


def _secret_file(name: str, settings: RedisSettings, root: Path) -> Path | None:
    """As `_file`, for a password. Raises UsageError also if other users may change the file."""
    file = _file(name, settings, root)
    if file:
        try:
            read_secret(file)
        except (OSError, ValueError) as e:
            raise UsageError(f'redis.{name}: {file}: {e}') from None
    return file


def _tls(is_wanted: bool, settings: RedisSettings, root: Path) -> Tls | None:
    ca, cert, key = [_file(name, settings, root) for name in ('tls_ca_path', 'tls_cert_path', 'tls_key_path')]
    if not is_wanted:
        if ca or cert or key:
            raise UsageError('redis.tls_… is set, but redis.url is without TLS; write rediss instead of redis')
        return None
    if key and not cert:
        raise UsageError('redis.tls_key_path is set without redis.tls_cert_path; set both, or neither')
    tls = Tls(ca, cert, key, settings.tls_check_hostname)
    try:
        tls.context()
    except (OSError, ValueError) as e:
        names = ', '.join(map(str, tls.files))
        raise UsageError(
            f'redis.tls_…: {names}: not certificates in PEM, or the key does not belong to the certificate: {e}'
        ) from e
    return tls


def _number(text: str) -> int:
    """The number of a database; 0 if there is none."""
    if not re.fullmatch(r'[0-9]{0,5}', text):
        raise _wrong('the database is not a number')
    return int(text or 0)


def _places(text: str, port: int) -> Iterator[HostPort]:
    """The hosts and ports in a comma-separated list; `port` is the default."""
    for number, host in enumerate(text.split(','), 1):
        match = _HOST.fullmatch(host)
        if not match or not 0 < int(match[2] or port) < 65536:
            raise _wrong(f'host {number} is missing, or not a name with a port from 1 to 65535')
        yield match[1].strip('[]'), int(match[2] or port)
