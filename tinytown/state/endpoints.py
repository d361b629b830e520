"""Where a town's Redis is: what `redis.url` says, and how the one server is found that may be written to.

That is the server itself, or the master that sentinels name, or the node of a Cluster that holds the town: all its
keys have one hash tag, so it lives in one slot, and one connection serves it. Each new connection begins with a new
look, so after a failover it is enough to connect again. Passwords and certificates are read then, too: they may be
replaced while a town is open.
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

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.retry import Retry

from ..errors import TownError, UsageError
from ..settings import RedisSettings
from .client import TIMEOUT, ErrorReply, RedisConnection, ReplyParser, as_town_error, cause_of, gone, pack

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_SLOTS: Final = 16384
_WATCH_SECS: Final = 0.25
_MOVES: Final = 5  # redirections in a row that are followed
_MOST_SECRET: Final = 65_536
_READ_SIZE: Final = 1 << 16
_ASK_SECS: Final = 0.5  # for a sentinel: the next one may know more

T = TypeVar('T')
Place = tuple[str, int]

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
_HOST: Final = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?')


# ----------------------------------------------------------------------------------------------- one server


@dataclass(frozen=True)
class Login(CredentialProvider):
    """Who we are to a server. A `file` holds the password, and is read at each connection.

    `settings` are those that say all this.
    """

    user: str = ''
    password: str = field(default='', repr=False)
    file: Path | None = None
    settings: str = field(default='redis.url and redis.password_file', compare=False)

    @property
    def is_needed(self) -> bool:
        """Whether there is a password to be told."""
        return bool(self.password or self.file)

    def get_credentials(self) -> tuple[str, ...]:  # type: ignore[override]
        """What AUTH is given; nothing where there is no password. Raises Unavailable."""
        password = self.password
        if self.file:
            try:
                password = read_secret(self.file)
            except (OSError, ValueError) as e:
                raise gone(f"can't be asked: the password in {self.file} can't be read: {e}") from None
        if not password:
            return ()
        return (self.user, password) if self.user else (password,)


def read_secret(file: Path) -> str:
    """What a file of one line holds. Raises OSError, ValueError where it is none, or where others may change it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for somebody to write
    with open(descriptor, encoding='utf-8') as opened:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError('this is no regular file')
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f'other users may change it; run  chmod go-w {file}')
        return opened.read(_MOST_SECRET).rstrip('\r\n')


@dataclass(frozen=True)
class Tls:
    """What a server is known by, and what we show it: files in PEM; without a `ca` the machine's authorities count."""

    ca: Path | None
    cert: Path | None
    key: Path | None
    check_hostname: bool

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer. Raises OSError (ssl.SSLError is one)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.check_hostname
        if self.ca:
            context.load_verify_locations(self.ca)
        else:
            context.load_default_certs()
        if self.cert:
            context.load_cert_chain(self.cert, self.key, password='')  # an encrypted key is an error, and no question
        return context


class _TlsConnection(SSLConnection):
    """With a context of ours: that of `redis` trusts the machine's authorities beside the one that is named."""

    def __init__(self, tls: Tls, **settings: Any) -> None:
        super().__init__(**settings)
        self._tls = tls

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        return self._tls.context().wrap_socket(sock, server_hostname=self.host)


class _UnixConnection(UnixDomainSocketConnection):
    """With the host and the port that `redis` reads when it counts a fault, and forgets to give to it."""

    host = 'localhost'
    port = 0


class Endpoint(Protocol):
    """Where a Redis is that may be written to."""

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """A connection to it, looked for anew. Raises Unavailable, or TownError where it does not want us."""


@dataclass(frozen=True)
class RedisServer:
    """One server, at a path or at a host and port."""

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
    def about(self) -> str:
        """Who we are and where, for messages."""
        return f'{self.login.user}@{self.name}' if self.login.user else self.name

    def at(self, place: Place) -> RedisServer:
        """A server elsewhere that is spoken to in the same way."""
        return replace(self, host=place[0], port=place[1])

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """A connection that may be used. Raises Unavailable, TownError where the server does not want us."""
        connection = self._prepare(timeout)
        try:
            connection.connect()
        except redis.RedisError as e:
            raise gone(self._why_not(e)) from None
        except BaseException:
            connection.disconnect()
            raise
        return RedisConnection(connection, self.about)

    def _prepare(self, timeout: float) -> AbstractConnection:
        """A connection that is still to be made. It never repeats a command, and says nothing of its own accord."""
        settings: dict[str, Any] = {
            'db': self.db,
            'credential_provider': self.login,
            'socket_timeout': timeout,
            'socket_connect_timeout': timeout,
            'socket_read_size': _READ_SIZE,
            'encoding_errors': 'replace',  # of error replies; nothing else is decoded
            'parser_class': ReplyParser,
            'protocol': 2,
            'driver_info': None,
            'retry': Retry(NoBackoff(), 0),
            'redis_connect_func': self._greet,
        }
        if self.path:
            return _UnixConnection(self.path, **settings)  # type: ignore[no-untyped-call]
        settings |= {'host': self.host, 'port': self.port}
        return _TlsConnection(self.tls, **settings) if self.tls else Connection(**settings)

    def _greet(self, connection: AbstractConnection) -> None:
        """Says who we are and which database we want. Raises TownError."""
        try:
            connection.on_connect()
            if self.tls and not self.login.is_needed:
                _ping(connection)  # a client certificate that is not wanted is refused at the first read
        except ErrorReply as e:
            raise as_town_error(e, self.about, login=self.login.settings) from None
        except redis.RedisError as e:
            raise gone(f'at {self.name} let us not in: Redis did not answer: {cause_of(e)}{self._hint}') from None

    def _why_not(self, error: redis.RedisError) -> str:
        """Why there is no connection, and the mend."""
        e = error.__context__
        if untrusted := getattr(e, 'verify_message', ''):
            mend = 'name a file with the certificate of its authority in redis.tls_ca_path'
            if 'mismatch' in untrusted:
                mend = 'write a host that its certificate names, or set redis.tls_check_hostname = false'
            return f'at {self.name} shows a certificate that is not trusted: {untrusted.rstrip(".")}; {mend}'
        if isinstance(e, TimeoutError) and 'handshake' in str(e):
            return f'at {self.name} does not answer to TLS; without TLS write redis in the place of rediss in redis.url'
        if handshake := getattr(e, 'reason', ''):  # of an ssl.SSLError
            return f'at {self.name} broke off the handshake of TLS: {handshake}{self._hint}'
        return f'is not there: {self.name}: {getattr(e, "strerror", None) or cause_of(error)}'

    @property
    def _hint(self) -> str:
        return '; it may want a certificate: set redis.tls_cert_path' if self.tls and not self.tls.cert else ''


def _ping(connection: AbstractConnection) -> None:
    connection.send_command('PING')
    with suppress(ErrorReply):
        connection.read_response()


# ------------------------------------------------------------------------------------------- sentinels and clusters


@dataclass
class Sentinels:
    """The master that sentinels name. Who is asked first is who answered last.

    A master that was demoted, or cut off, may take writes for seconds before it learns of that, and they are lost. So
    as long as there are connections a thread asks who is the master now, and ends those to any other.
    """

    places: list[Place]
    sentinel: RedisServer  # how they are spoken to
    master: str
    server: RedisServer  # how the master is
    _opened: list[tuple[weakref.ref[RedisConnection], Place]] = field(default_factory=list)
    _watched_by: int = 0  # the process that has the thread: a forked one has it not

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """A connection to the master, which says itself that it is one. Raises Unavailable."""
        connection, place = self._first(partial(self._open_master, timeout))
        self._opened.append((weakref.ref(connection), place))
        if self._watched_by != os.getpid():
            self._watched_by = os.getpid()
            threading.Thread(target=self._watch, name='sentinels', daemon=True).start()
        return connection

    def _first(self, ask: Callable[[RedisConnection], T]) -> T:
        """What is asked of the first sentinel that knows an answer."""
        faults = []
        for place in list(self.places):
            try:
                sentinel = self.sentinel.at(place).open(_ASK_SECS)
                found = ask(sentinel)
            except TownError as e:
                faults.append(f'sentinel {place[0]}:{place[1]}: {e.detail}')
                continue
            self.places = [place, *(each for each in self.places if each != place)]
            return found
        raise gone(f'has no master {self.master} that can be reached. {"; ".join(faults)}')

    def _open_master(self, timeout: float, sentinel: RedisConnection) -> tuple[RedisConnection, Place]:
        place = self._master_of(sentinel)
        sentinel.close()
        where = self.server.at(place)
        connection = where.open(timeout)
        role = connection.ask('ROLE')[0]
        if role == b'master':
            return connection, place
        connection.close()
        raise gone(f'at {where.name} is named as the master, and says that it is none ({role.decode()})')

    def _master_of(self, sentinel: RedisConnection) -> Place:
        found = sentinel.answer('SENTINEL', 'get-master-addr-by-name', self.master, timeout=_ASK_SECS)
        if isinstance(found, ErrorReply):
            sentinel.close()
            raise as_town_error(found, sentinel.about, login=self.sentinel.login.settings)
        if found is None:
            sentinel.close()
            raise gone(f'master {self.master} is not known there; see SENTINEL MASTERS')
        return found[0].decode(), int(found[1])

    def _watch(self) -> None:
        sentinel = place = None
        while True:
            time.sleep(_WATCH_SECS)
            try:
                if sentinel is None or place != self.places[0]:  # one that was cut off may name a dead master for ever
                    sentinel, place = self._first(lambda connection: connection), self.places[0]
                self._leave_all_but(self._master_of(sentinel))
            except TownError:
                sentinel = None

    def _leave_all_but(self, master: Place) -> None:
        for entry in list(self._opened):
            connection = entry[0]()
            if connection is None or connection.sock is None:
                with suppress(ValueError):  # two threads may have been started
                    self._opened.remove(entry)
            elif entry[1] != master:
                with suppress(OSError):
                    connection.cut()


@dataclass
class Cluster:
    """The node of a Cluster that holds the slot of a key. Who is asked first is who held it last."""

    places: list[Place]
    server: RedisServer
    key: str
    last: Place | None = None

    @property
    def slot(self) -> int:
        """CRC16 (XMODEM) of what stands within the key's braces, as the Cluster specification has it."""
        tag = re.sub(r'.*?\{([^}]+)\}.*', r'\1', self.key)
        return binascii.crc_hqx(tag.encode(), 0) % _SLOTS

    def open(self, timeout: float = TIMEOUT) -> RedisConnection:
        """A connection to the node that holds the slot. Raises Unavailable."""
        faults = []
        for place in [self.last, *self.places] if self.last else self.places:
            try:
                connection, self.last = self._follow(place, timeout)
            except TownError as e:
                faults.append(e.detail.removeprefix('Redis '))
            else:
                return connection
        raise gone(f'has no node that can be reached and holds slot {self.slot}: {"; ".join(faults)}')

    def _follow(self, place: Place, timeout: float) -> tuple[RedisConnection, Place]:
        """From a node to the one that holds the slot: any other one answers MOVED."""
        for _ in range(_MOVES):
            connection = self.server.at(place).open(timeout)
            reply = connection.request(pack(['EXISTS', self.key]), timeout)
            if not isinstance(reply, ErrorReply) or reply.kind in ('ASK', 'TRYAGAIN'):  # being moved, it still has it
                return connection, place
            connection.close()
            if reply.kind != 'MOVED':
                raise as_town_error(reply)
            host, _, port = str(reply).split(' ')[2].rpartition(':')
            place = (host.strip('[]') or place[0], int(port))  # without a host it is the same one's other port
        raise gone(f'sends us from node to node for slot {self.slot}; see CLUSTER NODES')


# ------------------------------------------------------------------------------------------------ what the URL says


def endpoint_of(settings: RedisSettings, key: str, root: Path) -> Endpoint:
    """Where the settings say that Redis is. `key` is one of the town's, and paths are taken from `root`.

    Raises UsageError that names the part that is wrong, and never shows a password.
    """
    url = read_url(settings.url)
    login = _login(url.user, url.password, settings, root)
    server = RedisServer(path=url.path, login=login, db=url.db, tls=_tls(url.is_tls, settings, root))
    if url.kind == 'sentinel':
        file = _secret_file('sentinel_password_file', settings, root)
        ours = Login(settings.sentinel_user, '', file, 'redis.sentinel_user and redis.sentinel_password_file')
        return Sentinels(url.places, RedisServer(login=ours, tls=server.tls), url.master, server)
    if url.kind == 'cluster':
        return Cluster(url.places, server, key)
    return server if url.path else server.at(url.places[0])


class Url(NamedTuple):
    """What a URL says. `kind` is sentinel, cluster or nothing; a unix socket has a path, and else there are places."""

    kind: str
    is_tls: bool
    user: str
    password: str
    places: list[Place]
    path: str
    master: str
    db: int


def read_url(url: str) -> Url:
    """What a `redis.url` says by itself. Raises UsageError that names the part that is wrong."""
    found = _split(url)
    query, path = _query(found['query']), unquote(found['path'])
    scheme, _, kind = found['scheme'].partition('+')
    user, _, password = found['login'].partition(':')
    user, password = unquote(user) or query.get('username', ''), unquote(password) or query.get('password', '')
    db = _number(query.get('db', ''))
    if scheme == 'unix':
        if found['hosts'] or len(path) < 2:
            raise _wrong('the path of the socket is missing; write unix:///run/redis.sock')
        return Url('', False, user, password, [], path, '', db)
    places = list(_places(found['hosts'], _SENTINEL_PORT if kind == 'sentinel' else _PORT))
    if not kind and len(places) > 1:
        raise _wrong('it names several hosts; write redis+sentinel:// or redis+cluster://')
    master, db = _behind_hosts(path, kind, db)
    return Url(kind, scheme == 'rediss', user, password, places, '', master, db)


def _behind_hosts(path: str, kind: str, db: int) -> tuple[str, int]:
    """The master and the database that a path names, which else is `db`."""
    words = path.strip('/').split('/')
    master = words.pop(0) if kind == 'sentinel' else ''
    if kind == 'sentinel' and not master:
        raise _wrong('the name of the master is missing; write it behind the sentinels: …:26379/mymaster')
    db = (_number(words.pop(0)) if words else 0) or db
    if words:
        raise _wrong(f'there is too much behind the host{"s and the master" if master else ""}')
    if kind == 'cluster' and db:
        raise _wrong('a Cluster has no other database than 0; leave the number out')
    return master, db


_ENCODED: Final = '; in a user or password write %40 for @, %2F for /, %3F for ?, %23 for # and %25 for %'


def _wrong(what: str) -> UsageError:
    return UsageError(f'redis.url: {what}. It is one of {FORMS}')


def _split(url: str) -> dict[str, str]:
    """The parts of a URL: scheme, login, hosts, path, query; '' for what is not there."""
    found = _URL.fullmatch(url)
    if not found:
        raise _wrong('it can not be read' + (_ENCODED if '@' in url else ''))
    parts = found.groupdict(default='')
    if parts['scheme'] != 'unix' and '@' in parts['path'] + parts['query']:
        raise _wrong('there is an @ behind the host' + _ENCODED)
    return parts


def _query(text: str) -> dict[str, str]:
    found = dict(parse_qsl(text, keep_blank_values=True))
    unknown = sorted(found.keys() - {'db', 'username', 'password'})
    if unknown:
        raise _wrong(f'?{unknown[0]}= is not known; TLS is set by redis.tls_ca_path and those beside it')
    return found


def _login(user: str, password: str, settings: RedisSettings, root: Path) -> Login:
    if user and not password and not settings.password_file:
        raise _wrong('there is a user and no password; add :password, or set redis.password_file')
    if password and settings.password_file:
        raise UsageError('redis.password_file is set, and redis.url holds a password; remove one of them')
    return Login(user, password, _secret_file('password_file', settings, root))


def _file(name: str, settings: RedisSettings, root: Path) -> Path | None:
    """The file that a setting names, which must be one that can be read."""
    given = getattr(settings, name)
    if not given:
        return None
    file = root / Path(given).expanduser()
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # to open a named pipe would wait for somebody to write
            raise UsageError(f'redis.{name}: {file} is no regular file')
        with open(file, 'rb'):
            return file
    except OSError as e:
        raise UsageError(f'redis.{name}: {file}: {e.strerror}') from None


def _secret_file(name: str, settings: RedisSettings, root: Path) -> Path | None:
    """The same for one that holds a password, which nobody else may change."""
    file = _file(name, settings, root)
    if file:
        try:
            read_secret(file)
        except (OSError, ValueError) as e:
            raise UsageError(f'redis.{name}: {file}: {e}') from None
    return file


def _tls(is_wanted: bool, settings: RedisSettings, root: Path) -> Tls | None:
    ca, cert, key = files = [_file(name, settings, root) for name in ('tls_ca_path', 'tls_cert_path', 'tls_key_path')]
    if not is_wanted:
        if any(files):
            raise UsageError('redis.tls_… is set, and redis.url is not one of TLS; write rediss in the place of redis')
        return None
    if key and not cert:
        raise UsageError('redis.tls_key_path is set without redis.tls_cert_path; set both, or none')
    tls = Tls(ca, cert, key, settings.tls_check_hostname)
    try:
        tls.context()
    except (OSError, ValueError) as e:
        names = ', '.join(str(each) for each in files if each)
        raise UsageError(
            f'redis.tls_…: {names}: these are no certificates in PEM, or the key is not theirs: {e}'
        ) from e
    return tls


def _number(text: str) -> int:
    """The number of a database; 0 for none."""
    if not re.fullmatch(r'[0-9]{0,5}', text):
        raise _wrong('the database is not a number')
    return int(text or 0)


def _places(text: str, port: int) -> Iterator[Place]:
    for number, each in enumerate(text.split(','), 1):
        found = _HOST.fullmatch(each)
        if not found or not 0 < int(found[2] or port) < 65536:
            raise _wrong(f'host {number} is missing, or not a name with a port from 1 to 65535')
        yield found[1].strip('[]'), int(found[2] or port)
