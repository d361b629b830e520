"""One connection to Redis with either parser of `redis`: what is sent, what is read, and how it ends."""

from __future__ import annotations

import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from redis._parsers import Encoder, _HiredisParser, _RESP2Parser
from redis.connection import HiredisRespSerializer, PythonRespSerializer

from tinytown.errors import Unavailable
from tinytown.state import endpoints
from tinytown.state.client import NOT_YET, ErrorReply, RedisConnection, VerbatimErrors, as_town_error, pack
from tinytown.state.endpoints import Login, RedisServer, Tls
from tinytown.state.link import Link, PendingCommand

from ..certificates import Authority, Pair
from ..support import PATIENCE, REPOSITORY, Place, environment, make_town, until


class HiredisParser(VerbatimErrors, _HiredisParser):
    """That of the extra `fast`."""


class PythonParser(VerbatimErrors, _RESP2Parser):
    """That of an installation without it."""


@pytest.fixture(params=[HiredisParser, PythonParser])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Connections read with it."""
    monkeypatch.setattr(endpoints, 'ReplyParser', request.param)
    return request.param


class Peer:
    """The other side of a connection, played by the test: with `papers` behind TLS."""

    def __init__(self, papers: Pair | None = None) -> None:
        self._listener = socket.create_server(('127.0.0.1', 0))
        self._papers = papers
        self._opened = ExitStack()
        tls = Tls(None, None, None, True) if papers else None
        self.server = RedisServer(host='localhost' if tls else '127.0.0.1', port=self.port, tls=tls)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def meet(self, server: RedisServer | None = None) -> RedisConnection:
        """A connection to it."""
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(self.accept)
            opened = (server or self.server).open(PATIENCE)
            self.sock = accepted.result()
        return opened

    def accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        if not self._papers:
            return self._opened.enter_context(sock)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._papers.cert, self._papers.key)
        try:
            sock = context.wrap_socket(sock, server_side=True)
            assert b'PING' in sock.recv(1000)
            sock.sendall(b'+PONG\r\n')
        except ssl.SSLError:
            pass  # it is not trusted, which the other side tells
        return self._opened.enter_context(sock)

    def has_another(self) -> bool:
        """Whether there was one more connection than were accepted."""
        return bool(select.select([self._listener], [], [], 0.1)[0])

    def close(self) -> None:
        self._listener.close()
        self._opened.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def receive(connection: RedisConnection) -> Any:
    """The next reply, waited for."""
    assert connection.sock
    while (reply := connection.receive()) is NOT_YET:
        assert select.select([connection.sock], [], [], PATIENCE)[0], 'no reply came'
    return reply


REPLIES: list[tuple[bytes, Any]] = [
    (b'+OK\r\n', b'OK'),
    (b'+\r\n', b''),
    (b':0\r\n', 0),
    (b':-42\r\n', -42),
    (b':9223372036854775807\r\n', 2**63 - 1),
    (b'$0\r\n\r\n', b''),
    (b'$-1\r\n', None),
    (b'$4\r\na\r\nb\r\n', b'a\r\nb'),
    (b'*0\r\n', []),
    (b'*-1\r\n', None),
    (b'*3\r\n:1\r\n$1\r\nx\r\n*2\r\n$-1\r\n*1\r\n+in\r\n', [1, b'x', [None, [b'in']]]),
    (b'*2\r\n*1\r\n*2\r\n*0\r\n$-1\r\n:5\r\n', [[[[], None]], 5]),
    (b'$200000\r\n' + b'x' * 200_000 + b'\r\n', b'x' * 200_000),
]


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize('size', [1, 2, 7, 5000, 1 << 20])
def test_replies_are_read_however_they_are_cut(peer: Peer, size: int) -> None:
    replies = [(raw, reply) for raw, reply in REPLIES if size > 1000 or len(raw) < 1000] * 2
    stream = b''.join(raw for raw, _ in replies)
    connection, found = peer.meet(), []
    peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, len(stream), size):
        peer.sock.sendall(stream[at : at + size])
        while (reply := connection.receive()) is not NOT_YET:
            found.append(reply)
    while len(found) < len(replies):
        found.append(receive(connection))
    assert found == [reply for _, reply in replies]


@pytest.mark.usefixtures('parser')
def test_a_large_reply_in_many_pieces_is_read_whole_without_and_with_waiting(peer: Peer) -> None:
    reply = b'*2000\r\n' + b'*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nf\r\n$1000\r\n%b\r\n' % (b'x' * 1000) * 2000
    connection = peer.meet()
    reads: list[Callable[[], Any]] = [
        lambda: receive(connection),
        lambda: connection.request(pack(['PING']), PATIENCE),
    ]
    for read in reads:
        sender = threading.Thread(target=peer.sock.sendall, args=(reply,))
        sender.start()
        assert read() == [[b'1-0', [b'f', b'x' * 1000]]] * 2000
        sender.join()


@pytest.mark.usefixtures('parser')
def test_an_error_reply_tells_its_kind_alone_or_inside_an_array_and_is_read_once(peer: Peer) -> None:
    connection = peer.meet()
    said = [
        'NOSCRIPT No matching script.',
        'LOADING soon',
        'WRONGPASS no',
        'ERR max number of clients reached',
        '\ufffd x',
    ]
    peer.sock.sendall(''.join(f'-{each}\r\n' for each in said).encode().replace('\ufffd'.encode(), b'\xff'))
    peer.sock.sendall(b'*2\r\n-OOM full\r\n:1\r\n+OK\r\n')
    found = [receive(connection) for _ in said]
    assert [(type(each), str(each), each.kind) for each in found] == [
        (ErrorReply, each, each.split()[0]) for each in said
    ]
    (inside, number), after = receive(connection), receive(connection)
    assert (inside.kind, number, after) == ('OOM', 1, b'OK')


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize(
    'raw', [b'HTTP/1.1 400 Bad Request\r\n', b'$abc\r\n', b'*\r\n', b'$99999999999999999999999\r\n', b'*1\r\n' * 5000]
)
def test_what_is_not_the_protocol_of_redis_is_unavailable(peer: Peer, raw: bytes) -> None:
    connection = peer.meet()
    peer.sock.sendall(raw)
    with pytest.raises(Unavailable, match='something else than its protocol'):
        receive(connection)
    connection = peer.meet()
    peer.sock.sendall(raw)
    with pytest.raises(Unavailable, match=r'something else than its protocol.*; whether the change was made is not'):
        connection.request(pack(['PING']))
    assert connection.is_stale()


@pytest.mark.parametrize(
    'serializer', [HiredisRespSerializer(), PythonRespSerializer(6000, Encoder('utf-8', 'strict', False).encode)]
)
def test_a_command_is_packed_by_bytes_and_not_by_characters(serializer: Any) -> None:
    expected = b'*4\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$3\r\n\xff\r\n\r\n$2\r\n-5\r\n'
    assert b''.join(serializer.pack('SET', 'ä', b'\xff\r\n', -5)) == expected == pack(['SET', 'ä', b'\xff\r\n', -5])
    assert b''.join(serializer.pack('A', 'x' * 20_000)) == b'*2\r\n$1\r\nA\r\n$20000\r\n' + b'x' * 20_000 + b'\r\n'
    with pytest.raises(UnicodeEncodeError):
        serializer.pack('SET', '\ud800')


@pytest.mark.parametrize(
    ('said', 'status', 'phrase'),
    [
        ('LOADING Redis is loading the dataset in memory', 503, 'Nothing was changed'),
        ("OOM command not allowed when used memory > 'maxmemory'.", 503, 'out of memory'),
        ('MISCONF Errors writing to the AOF file', 503, 'disk'),
        ("READONLY You can't write against a read only replica.", 503, 'replica'),
        ('NOAUTH Authentication required.', 503, 'refused us'),
        ("ERR The user executing the script can't run this command or subcommand", 503, 'docs/redis.md lists'),
        ('WRONGTYPE Operation against a key', 500, 'WRONGTYPE'),
    ],
)
def test_an_error_of_redis_is_told_as_what_it_means_for_the_caller(said: str, status: int, phrase: str) -> None:
    error = as_town_error(ErrorReply(said))
    assert error.status == status
    assert phrase in error.detail
    assert (error.retry_after is not None) == (status == 503)


# ----------------------------------------------------------------------------------------------------------- its end


@pytest.mark.usefixtures('parser')
def test_a_connection_is_closed_after_a_timeout_so_that_a_late_reply_meets_no_other_command(ground: Place) -> None:
    connection = ground.store.endpoint.open()
    with pytest.raises(Unavailable, match=r'did not answer within 0\.05 s; whether the change was made is not known'):
        connection.request(pack(['BLPOP', 'nothing', 1]), 0.05)
    assert connection.is_stale()


@pytest.mark.usefixtures('parser')
def test_a_connection_that_has_ended_is_not_made_again_by_itself(peer: Peer) -> None:
    connection = peer.meet()
    peer.sock.close()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r'went away: .*; whether the change was made is not known'):
            connection.request(pack(['INCR', 'n']))
        assert connection.is_stale()
    assert not peer.has_another()


@pytest.mark.usefixtures('parser')
def test_an_idle_connection_is_stale_when_its_server_closed_it_or_said_something(peer: Peer) -> None:
    deeds: list[Callable[[], None]] = [lambda: peer.sock.close(), lambda: peer.sock.sendall(b'+OK\r\n')]
    for deed in deeds:
        connection = peer.meet()
        assert not connection.is_stale()
        deed()
        until(connection.is_stale)


def test_a_connection_says_nothing_of_its_own_accord(peer: Peer) -> None:
    with closing(peer.meet()):
        assert not select.select([peer.sock], [], [], 0.1)[0]


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize(
    ('said', 'told'), [(b'', 'let us not in: Redis did not answer: '), (b'-LOADING x\r\n', 'is loading its data')]
)
def test_a_server_that_closes_or_refuses_at_the_greeting_is_told_without_the_password(
    peer: Peer, said: bytes, told: str
) -> None:
    def greet() -> bytes:
        with peer.accept() as sock:
            heard = sock.recv(1000)
            sock.sendall(said)
        return heard

    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(greet)
        with pytest.raises(Unavailable, match=told) as caught:
            replace(peer.server, login=Login('me', 'a-long-secret')).open()
        assert b'a-long-secret' in heard.result()
    assert 'secret' not in caught.value.detail


@pytest.fixture
def papers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A server's, of an authority that this machine trusts."""
    authority = Authority(directory / 'machine')
    monkeypatch.setenv('SSL_CERT_FILE', str(authority.path))
    return authority.sign('redis')


def test_an_authority_of_the_machine_is_not_trusted_beside_the_one_that_is_named(directory: Path, papers: Pair) -> None:
    peer = Peer(papers)
    peer.meet().close()
    named = Tls(Authority(directory / 'ours').path, None, None, True)
    with pytest.raises(Unavailable, match='shows a certificate that is not trusted'):
        peer.meet(replace(peer.server, tls=named))
    peer.close()


# ---------------------------------------------------------------------------------------------------- an event loop's


class Loop:
    """A loop with nothing in it but a link to a peer."""

    def __init__(self, peer: Peer) -> None:
        self.wants_write = False
        self.sock: socket.socket | None = None
        self._soon: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.answers: list[Any] = []
        self.peer = peer
        self.link = Link(peer.server, self._soon.put, self._watch)

        self.link.reconnect()
        self.meet()

    def meet(self) -> None:
        """Takes the connection that the link is making."""
        self.peer.sock = self.peer.accept()
        assert b'PING' in self.peer.sock.recv(1000)
        self.peer.sock.sendall(b'+PONG\r\n')
        self._soon.get(timeout=PATIENCE)()

    def _watch(self, sock: socket.socket | None, wants_write: bool) -> None:
        self.sock, self.wants_write = sock, wants_write

    def submit(self, *commands: bytes) -> None:
        for data in commands:
            self.link.submit(PendingCommand(data, None, self.answers.append))

    def turn(self) -> None:
        """Waits for the socket as `epoll` does, and lets the link do its part."""
        assert self.sock
        write = [self.sock] if self.wants_write else []
        readable, writable, _ = select.select([self.sock], write, [], PATIENCE)
        assert readable or writable, 'nothing came'
        if readable:
            self.link.on_readable()
        self.link.flush()


@pytest.fixture(params=['plain', 'TLS'])
def loop(request: pytest.FixtureRequest, parser: Any) -> Iterator[Loop]:  # noqa: ARG001
    peer = Peer(request.getfixturevalue('papers') if request.param == 'TLS' else None)
    made = Loop(peer)
    yield made
    made.link.close()
    for thread in threading.enumerate():
        if thread.name == 'redis-connect':  # SSLContext.wrap_socket leaks a socket that is reset before its handshake
            thread.join()
    peer.close()


def test_commands_that_are_ready_together_share_one_write_and_are_answered_in_order(loop: Loop) -> None:
    commands = [pack(['ECHO', number]) for number in range(100)]
    loop.submit(*commands)
    loop.link.flush()
    assert loop.peer.sock.recv(1 << 16) == b''.join(commands)
    replies = b''.join(b':%d\r\n' % number for number in range(100))
    for at in range(0, len(replies), 5):
        loop.peer.sock.sendall(replies[at : at + 5])
        loop.turn()
    while len(loop.answers) < 100:
        loop.turn()
    assert loop.answers == list(range(100))


def test_what_was_read_ahead_of_the_loop_is_not_forgotten(loop: Loop) -> None:
    large = b'$100000\r\n%b\r\n' % (b'x' * 100_000)
    loop.submit(*[pack(['GET', 'x'])] * 20)
    loop.link.flush()
    sender = threading.Thread(target=loop.peer.sock.sendall, args=(large * 20,))
    sender.start()
    while len(loop.answers) < 20:
        loop.turn()
    sender.join()
    assert loop.answers == [b'x' * 100_000] * 20


def test_a_server_that_does_not_read_never_holds_up_the_loop_and_gets_all_of_it_when_it_does(loop: Loop) -> None:
    commands = [pack(['SET', number, bytes([number]) * 100_000]) for number in range(100)]
    longest = 0.0
    for data in commands:
        loop.submit(data)
        began = time.monotonic()
        loop.link.flush()
        longest = max(longest, time.monotonic() - began)
    assert loop.wants_write
    assert longest < 0.9, 'it waited until the socket took more'
    expected = b''.join(commands)

    def read() -> bytes:
        found = bytearray()
        while len(found) < len(expected):
            found += loop.peer.sock.recv(1 << 20)
        return bytes(found)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(read)
        while loop.wants_write:
            loop.turn()
        assert found.result() == expected
    loop.peer.sock.sendall(b'+OK\r\n' * 100)
    while len(loop.answers) < 100:
        loop.turn()
    assert loop.answers == [b'OK'] * 100


def test_what_was_sent_when_the_connection_ended_has_an_unknown_outcome_and_is_not_sent_again(loop: Loop) -> None:
    loop.submit(pack(['INCR', 'n']), pack(['INCR', 'n']))
    loop.link.flush()
    loop.peer.sock.recv(1000)
    loop.peer.sock.sendall(b':1\r\n')
    loop.peer.sock.close()
    while loop.sock:
        loop.turn()
    assert loop.answers[0] == 1
    assert loop.answers[1].detail.startswith('Redis went away: ')
    assert loop.answers[1].detail.endswith('; whether the change was made is not known')
    loop.submit(pack(['INCR', 'n']))
    assert loop.answers[2].detail == 'Redis is away; nothing was changed'
    loop.meet()
    loop.submit(pack(['ECHO', 'x']))
    loop.link.flush()
    assert loop.peer.sock.recv(1000) == pack(['ECHO', 'x'])


def test_a_reply_that_nobody_waits_for_ends_the_connection_before_it_meets_another_command(loop: Loop) -> None:
    loop.peer.sock.sendall(b':1\r\n')
    while loop.sock:
        loop.turn()
    loop.submit(pack(['GET', 'x']))
    assert loop.answers[0].detail == 'Redis is away; nothing was changed'


# ------------------------------------------------------------------------------------------------ without the extra


def test_a_town_works_without_hiredis(directory: Path) -> None:
    (directory / 'without').mkdir()
    (directory / 'without' / 'hiredis.py').write_text('raise ImportError')
    path = os.pathsep.join([str(directory / 'without'), str(REPOSITORY)])
    code = 'from tinytown.state.client import ReplyParser; print(ReplyParser.__mro__[2].__name__)'
    env = environment(PYTHONPATH=path)
    said = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert said == '_RESP2Parser\n'
    place = make_town(directory / 'town')
    try:
        assert place.tt('backlog', 'add', 'x', PYTHONPATH=path).returncode == 0
        hall = place.hall(PYTHONPATH=path)
        assert hall.post('/v1/backlog', {'description': 'x' * 60_000}).status == 201
        assert hall.get('/v1/backlog').json['count'] == 2
    finally:
        place.close()
