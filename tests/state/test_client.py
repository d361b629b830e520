"""The Redis client and the event loop's link, with either parser of `redis`: sending, receiving, and failures."""

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
from tinytown.state.endpoints import Cluster, Login, RedisServer, Tls
from tinytown.state.link import Link, PendingCommand

from ..certificates import Authority, Pair
from ..support import PATIENCE, REPOSITORY, Place, environment, make_town, until


class HiredisParser(VerbatimErrors, _HiredisParser):
    """The parser that the extra `fast` installs."""


class PythonParser(VerbatimErrors, _RESP2Parser):
    """The parser of an installation without that extra."""


@pytest.fixture(params=[HiredisParser, PythonParser])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each parser in turn; all connections of the test use it."""
    monkeypatch.setattr(endpoints, 'ReplyParser', request.param)
    return request.param


class Peer:
    """A server that the test plays by hand. With `papers`, its certificate and key, it speaks TLS."""

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
        """Opens a connection to itself and accepts it."""
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(self.accept)
            connection = (server or self.server).open(PATIENCE)
            self.sock = accepted.result()
        return connection

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
            pass  # the client does not trust us, and reports that
        return self._opened.enter_context(sock)

    def has_another(self) -> bool:
        """Whether a connection waits that was not accepted."""
        return bool(select.select([self._listener], [], [], 0.1)[0])

    def close(self) -> None:
        self._listener.close()
        self._opened.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def receive(connection: RedisConnection) -> Any:
    """Waits for the next reply."""
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
def test_replies_are_read_in_pieces_of_any_size(peer: Peer, size: int) -> None:
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
def test_a_large_reply_in_many_pieces_is_read_whole_blocking_or_not(peer: Peer) -> None:
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
def test_an_error_reply_has_its_kind_alone_or_inside_an_array_and_is_read_once(peer: Peer) -> None:
    connection = peer.meet()
    errors = [
        'NOSCRIPT No matching script.',
        'LOADING soon',
        'WRONGPASS no',
        'ERR max number of clients reached',
        '\ufffd x',
    ]
    peer.sock.sendall(''.join(f'-{each}\r\n' for each in errors).encode().replace('\ufffd'.encode(), b'\xff'))
    peer.sock.sendall(b'*2\r\n-OOM full\r\n:1\r\n+OK\r\n')
    found = [receive(connection) for _ in errors]
    assert [(type(each), str(each), each.kind) for each in found] == [
        (ErrorReply, each, each.split()[0]) for each in errors
    ]
    (inside, number), after = receive(connection), receive(connection)
    assert (inside.kind, number, after) == ('OOM', 1, b'OK')


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize(
    'raw', [b'HTTP/1.1 400 Bad Request\r\n', b'$abc\r\n', b'*\r\n', b'$99999999999999999999999\r\n', b'*1\r\n' * 5000]
)
def test_a_peer_that_does_not_speak_the_protocol_of_redis_is_unavailable(peer: Peer, raw: bytes) -> None:
    connection = peer.meet()
    peer.sock.sendall(raw)
    with pytest.raises(Unavailable, match='something other than its protocol'):
        receive(connection)
    connection = peer.meet()
    peer.sock.sendall(raw)
    with pytest.raises(Unavailable, match=r'something other than its protocol.*; whether the change was made is not'):
        connection.request(pack(['PING']))
    assert connection.is_stale()


@pytest.mark.parametrize(
    'serializer', [HiredisRespSerializer(), PythonRespSerializer(6000, Encoder('utf-8', 'strict', False).encode)]
)
def test_a_packed_command_counts_bytes_and_not_characters(serializer: Any) -> None:
    expected = b'*4\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$3\r\n\xff\r\n\r\n$2\r\n-5\r\n'
    assert b''.join(serializer.pack('SET', 'ä', b'\xff\r\n', -5)) == expected == pack(['SET', 'ä', b'\xff\r\n', -5])
    assert b''.join(serializer.pack('A', 'x' * 20_000)) == b'*2\r\n$1\r\nA\r\n$20000\r\n' + b'x' * 20_000 + b'\r\n'
    with pytest.raises(UnicodeEncodeError):
        serializer.pack('SET', '\ud800')


@pytest.mark.parametrize(
    ('error', 'status', 'phrase'),
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
def test_an_error_reply_becomes_the_error_that_a_caller_can_act_on(error: str, status: int, phrase: str) -> None:
    raised = as_town_error(ErrorReply(error))
    assert raised.status == status
    assert phrase in raised.detail
    assert (raised.retry_after is not None) == (status == 503)


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.usefixtures('parser')
def test_a_timeout_closes_the_connection_so_that_a_late_reply_answers_no_other_command(ground: Place) -> None:
    connection = ground.store.endpoint.open()
    with pytest.raises(Unavailable, match=r'did not answer within 0\.05 s; whether the change was made is not known'):
        connection.request(pack(['BLPOP', 'nothing', 1]), 0.05)
    assert connection.is_stale()


@pytest.mark.usefixtures('parser')
def test_a_connection_that_has_ended_does_not_reconnect_by_itself(peer: Peer) -> None:
    connection = peer.meet()
    peer.sock.close()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r'went away: .*; whether the change was made is not known'):
            connection.request(pack(['INCR', 'n']))
        assert connection.is_stale()
    assert not peer.has_another()


@pytest.mark.usefixtures('parser')
def test_an_idle_connection_is_stale_after_its_server_closed_it_or_sent_something(peer: Peer) -> None:
    actions: list[Callable[[], None]] = [lambda: peer.sock.close(), lambda: peer.sock.sendall(b'+OK\r\n')]
    for act in actions:
        connection = peer.meet()
        assert not connection.is_stale()
        act()
        until(connection.is_stale)


def test_a_connection_sends_nothing_by_itself(peer: Peer) -> None:
    with closing(peer.meet()):
        assert not select.select([peer.sock], [], [], 0.1)[0]


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize(
    ('reply', 'message'), [(b'', 'did not complete the handshake: '), (b'-LOADING x\r\n', 'is loading its data')]
)
def test_the_error_for_a_handshake_that_fails_does_not_contain_the_password(
    peer: Peer, reply: bytes, message: str
) -> None:
    def answer() -> bytes:
        with peer.accept() as sock:
            request = sock.recv(1000)
            sock.sendall(reply)
        return request

    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(answer)
        with pytest.raises(Unavailable, match=message) as caught:
            replace(peer.server, login=Login('me', 'a-long-secret')).open()
        assert b'a-long-secret' in request.result()
    assert 'secret' not in caught.value.detail


@pytest.mark.usefixtures('parser')
@pytest.mark.parametrize('raw', [b'HTTP/1.1 400 Bad Request\r\n', b':x\r\n', b'$abc\r\n', b'*1\r\n' * 5000])
def test_a_handshake_with_a_peer_that_does_not_speak_the_protocol_of_redis_is_unavailable(
    peer: Peer, raw: bytes
) -> None:
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(lambda: peer.accept().sendall(raw))
        with pytest.raises(Unavailable, match='did not complete the handshake: '):
            replace(peer.server, db=1).open(PATIENCE)
        accepted.result()


def test_a_node_of_a_cluster_that_ends_the_connection_during_the_search_for_the_slot_has_changed_nothing(
    peer: Peer,
) -> None:
    def hang_up() -> None:
        with peer.accept() as sock:
            assert b'EXISTS' in sock.recv(1000)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(hang_up)
        with pytest.raises(Unavailable, match=r'holds slot 6918: did not answer: connection closed$'):
            Cluster([('127.0.0.1', peer.port)], RedisServer(), 'tt:{test}:town').open(PATIENCE)
        ended.result()


@pytest.fixture
def papers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A server's certificate from an authority that this machine trusts."""
    authority = Authority(directory / 'machine')
    monkeypatch.setenv('SSL_CERT_FILE', str(authority.path))
    return authority.sign('redis')


def test_with_an_authority_of_its_own_a_town_does_not_trust_those_of_the_machine(directory: Path, papers: Pair) -> None:
    peer = Peer(papers)
    peer.meet().close()
    ours = Tls(Authority(directory / 'ours').path, None, None, True)
    with pytest.raises(Unavailable, match='shows a certificate that is not trusted'):
        peer.meet(replace(peer.server, tls=ours))
    peer.close()


# ---------------------------------------------------------------------------------------------------- the link


class Loop:
    """An event loop that runs nothing but a link to a peer."""

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
        """Accepts the connection that the link opens, and attaches it."""
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
        """One turn of the loop: waits until the socket is ready, and calls the link."""
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
    loop = Loop(peer)
    yield loop
    loop.link.close()
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


def test_replies_that_were_read_ahead_are_delivered_without_another_event(loop: Loop) -> None:
    large = b'$100000\r\n%b\r\n' % (b'x' * 100_000)
    loop.submit(*[pack(['GET', 'x'])] * 20)
    loop.link.flush()
    sender = threading.Thread(target=loop.peer.sock.sendall, args=(large * 20,))
    sender.start()
    while len(loop.answers) < 20:
        loop.turn()
    sender.join()
    assert loop.answers == [b'x' * 100_000] * 20


def test_a_server_that_does_not_read_never_blocks_the_loop_and_gets_everything_once_it_reads(loop: Loop) -> None:
    commands = [pack(['SET', number, bytes([number]) * 100_000]) for number in range(100)]
    longest = 0.0
    for data in commands:
        loop.submit(data)
        began = time.monotonic()
        loop.link.flush()
        longest = max(longest, time.monotonic() - began)
    assert loop.wants_write
    assert longest < 0.9, 'flush blocked until the socket took more'
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


def test_a_command_whose_reply_was_lost_has_an_unknown_outcome_and_is_not_sent_again(loop: Loop) -> None:
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


def test_a_command_that_was_not_sent_yet_when_the_connection_ended_has_changed_nothing(loop: Loop) -> None:
    loop.submit(pack(['INCR', 'n']))
    loop.link.flush()
    loop.peer.sock.recv(1000)
    loop.submit(pack(['INCR', 'n']), pack(['INCR', 'n']))
    loop.peer.sock.close()
    while loop.sock:
        loop.link.on_readable()
    outcomes = [answer.detail.rpartition('; ')[2] for answer in loop.answers]
    assert outcomes == ['whether the change was made is not known', 'nothing was changed', 'nothing was changed']


def test_a_callback_that_fails_neither_stops_the_link_nor_costs_other_commands_their_replies(loop: Loop) -> None:
    def fail(reply: Any) -> None:
        raise ValueError(reply)

    failing, echo = PendingCommand(pack(['PING']), None, fail), pack(['ECHO', 'x'])
    loop.link.submit(failing)
    loop.submit(echo)
    loop.link.flush()
    loop.peer.sock.sendall(b'+PONG\r\n+x\r\n')
    while not loop.answers:
        loop.turn()
    loop.link.submit(failing)
    loop.submit(echo)
    loop.link.flush()
    loop.peer.sock.close()
    while loop.sock:
        loop.turn()
    assert loop.answers[0] == b'x'
    assert loop.answers[1].detail.endswith('; whether the change was made is not known')
    loop.meet()
    loop.submit(echo)
    loop.link.flush()
    assert loop.peer.sock.recv(1000) == echo


def test_a_reply_without_a_command_ends_the_connection_before_it_answers_another_command(loop: Loop) -> None:
    loop.peer.sock.sendall(b':1\r\n')
    while loop.sock:
        loop.turn()
    loop.submit(pack(['GET', 'x']))
    assert loop.answers[0].detail == 'Redis is away; nothing was changed'


def test_a_reply_without_a_command_in_the_packet_of_an_earlier_reply_answers_no_other_command(loop: Loop) -> None:
    def proceed(reply: Any) -> None:
        loop.answers.append(reply)
        loop.submit(pack(['GET', 'y']))

    loop.link.submit(PendingCommand(pack(['GET', 'x']), None, proceed))
    loop.link.flush()
    assert loop.peer.sock.recv(1000) == pack(['GET', 'x'])
    loop.peer.sock.sendall(b':1\r\n:666\r\n')
    while loop.sock:
        loop.turn()
    assert loop.answers[0] == 1
    assert loop.answers[1].detail.startswith('Redis went away: it sent a reply that no command was waiting for')


# ------------------------------------------------------------------------------------------------ without the extra


def test_a_town_works_without_hiredis(directory: Path) -> None:
    (directory / 'without').mkdir()
    (directory / 'without' / 'hiredis.py').write_text('raise ImportError')
    path = os.pathsep.join([str(directory / 'without'), str(REPOSITORY)])
    code = 'from tinytown.state.client import ReplyParser; print(ReplyParser.__mro__[2].__name__)'
    env = environment(PYTHONPATH=path)
    output = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert output == '_RESP2Parser\n'
    place = make_town(directory / 'town')
    try:
        assert place.tt('backlog', 'add', 'x', PYTHONPATH=path).returncode == 0
        hall = place.hall(PYTHONPATH=path)
        assert hall.post('/v1/backlog', {'description': 'x' * 60_000}).status == 201
        assert hall.get('/v1/backlog').json['count'] == 2
    finally:
        place.close()
