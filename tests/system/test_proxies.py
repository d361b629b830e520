"""Townhall behind nginx and HAProxy, which keep their connections to it: what one client sends is that client's own."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from ..raw import HOST, Load, add, answers, post, read_answer, texts
from ..support import PATIENCE, Hall, Place, Service, make_town, read_all
from . import proxies

KILL = post(b'{"force":true}', path=b'/v1/agents/victim/kill')
PROXIES: dict[str, Callable[..., proxies.Proxy]] = {
    'nginx': proxies.nginx,
    'nginx, streaming': lambda directory, *halls: proxies.nginx(directory, *halls, streams=True),
    'haproxy': proxies.haproxy,
}
_ids = itertools.count()


@pytest.fixture(scope='module')
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for all tests of this file that leave its townhall running, with an agent that none of them kills."""
    made = make_town(tmp_path_factory.mktemp('system'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(made.root))
        made.do('agent.spawn', name='victim', cli='demo')
        yield made
        made.close()


@pytest.fixture(scope='module')
def behind(town: Place) -> Hall:
    """The townhall behind the proxies."""
    return town.hall()


@pytest.fixture(scope='module')
def started(behind: Hall, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """The ways to a townhall: without and with a proxy."""
    made = {name: start(tmp_path_factory.mktemp('proxy'), behind) for name, start in PROXIES.items()}
    yield {'direct': behind, **made}
    for proxy in made.values():
        proxy.close()


@pytest.fixture(params=['direct', *PROXIES])
def front(request: pytest.FixtureRequest, started: dict[str, Service]) -> Service:
    return started[request.param]


@pytest.fixture(params=list(PROXIES))
def proxy(request: pytest.FixtureRequest, started: dict[str, Service]) -> Service:
    return started[request.param]


def ask(front: Service, sock: socket.socket | None = None) -> None:
    """A good request, on a connection of its own or that one, which must get its own answer."""
    mine = f'mine-{next(_ids)}'
    path = f'/v1/agents/{mine}'
    if sock is None:
        answer = front.get(path, X_Request_ID=mine)
    else:
        sock.sendall(b'GET %b HTTP/1.1\r\n' % path.encode() + HOST + b'X-Request-ID: %b\r\n\r\n' % mine.encode())
        answer = read_answer(sock)
    assert (answer.status, answer.headers['x-request-id']) == (404, mine)
    assert answer.json['detail'] == f"Agent '{mine}' not found"


def killed(town: Place) -> bool:
    state = town.do('agent.get', agent='victim')['state']
    return state in ('Stopped', 'Error') or any(event['type'] == 'agent.killed' for event in town.history())


# -------------------------------------------------------------------------------------------- a body is only a body


def with_head(*lines: bytes) -> bytes:
    """A POST of a kill whose head has these lines, and the right length where they have none."""
    length = (
        [] if any(b'ontent-' in line or b'ncoding' in line for line in lines) else [b'Content-Length: %d' % len(KILL)]
    )
    hosts = [] if any(line.startswith(b'Host') for line in lines) else [b'Host: localhost']
    return b'\r\n'.join([b'POST /v1/backlog HTTP/1.1', *hosts, *lines, *length, b'', KILL])


LENGTH = b'Content-Length: %d' % len(KILL)
JSON = b'Content-Type: application/json'
CHUNKS = b'%x\r\n%b\r\n0\r\n\r\n' % (len(KILL), KILL)
CHUNKED = b'Transfer-Encoding: chunked'

CLOSE = b'\r\nConnection: close\r\n'

# What a townhall answers, and what is sent; a proxy may refuse it itself.
ATTACKS = {
    'as JSON': (400, post(KILL)),
    'to a path that is not there': (404, post(KILL, path=b'/nowhere')),
    'to a path that is only read': (405, post(KILL, path=b'/v1/status')),
    'with another method': (405, post(KILL).replace(b'POST', b'PUT', 1)),
    'as text': (415, post(KILL).replace(b'application/json', b'text/plain', 1)),
    'without a type': (415, with_head()),
    'under a foreign name': (421, with_head(b'Host: evil.example')),
    'from a foreign page': (403, with_head(b'Origin: http://evil.example')),
    'with a GET': (400, post(KILL, path=b'/v1/status').replace(b'POST', b'GET', 1)),
    'with an OPTIONS': (204, post(KILL).replace(b'POST', b'OPTIONS', 1)),
    'over the cap': (413, with_head(b'Content-Length: %d' % (len(KILL) * 9000)).replace(KILL, KILL * 9000)),
    'chunked': (411, with_head(JSON, CHUNKED).replace(KILL, CHUNKS)),
    'chunked in another case': (411, with_head(JSON, b'transfer-encoding: Chunked').replace(KILL, CHUNKS)),
    'chunked and with a length': (400, with_head(JSON, LENGTH, CHUNKED).replace(KILL, b'0\r\n\r\n' + KILL)),
    'a length of 0, and chunked': (400, with_head(JSON, b'Content-Length: 0', CHUNKED).replace(KILL, CHUNKS)),
    'with a coding that is not known': (400, with_head(JSON, LENGTH, b'Transfer-Encoding: xchunked')),
    'with a coding behind a tab': (400, with_head(JSON, LENGTH, b'Transfer-Encoding:\tchunked\x0b')),
    'with a space before the colon': (400, with_head(JSON, LENGTH, b'Transfer-Encoding : chunked')),
    'with a folded field': (400, with_head(JSON, LENGTH, b'X: a', b' Transfer-Encoding: chunked')),
    'with two lengths': (400, with_head(JSON, LENGTH, b'Content-Length: 0')),
    'with the same length twice': (400, with_head(JSON, LENGTH, LENGTH)),
    'with a length and a sign': (400, with_head(JSON, LENGTH.replace(b': ', b': +'))),
    'with a bare LF': (400, with_head(JSON, LENGTH).replace(b'localhost\r\n', b'localhost\n', 1)),
    'with its length named as a hop': (400, with_head(JSON, LENGTH, b'Connection: keep-alive, Content-Length')),
    'with an expectation': (400, with_head(JSON, LENGTH, b'Expect: 100-continue')),
    'with another expectation': (417, with_head(JSON, LENGTH, b'Expect: a-pony')),
    'of HTTP/1.0': (400, with_head(JSON, LENGTH).replace(b'HTTP/1.1', b'HTTP/1.0', 1)),
    'asking for another protocol': (400, with_head(JSON, LENGTH, b'Connection: upgrade', b'Upgrade: h2c')),
}  # fmt: skip
OWN_REFUSALS = {400, 405, 411, 413, 417, 501}  # of a proxy, or of what it made of the request


def send(front: Service, data: bytes, waits: bool) -> bytes:
    """What comes back; if it waits, the body is sent when its head has been read, or answered."""
    at = data.index(b'\r\n\r\n') + 4 if waits else len(data)
    with front.connect() as sock:
        sock.sendall(data[:at])
        if waits:
            select.select([sock], [], [], 0.03)
            with suppress(ConnectionResetError, BrokenPipeError):  # it is answered, and closed
                sock.sendall(data[at:])
        return read_all(sock).removeprefix(b'HTTP/1.1 100 Continue\r\n\r\n')


@pytest.mark.parametrize('waits', [False, True], ids=['at once', 'the body later'])
@pytest.mark.parametrize(('status', 'attack'), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_request_in_a_body_is_never_executed_and_answered_no_more_than_once(
    town: Place, front: Service, status: int, attack: bytes, waits: bool
) -> None:
    with front.connect() as other:
        ask(front, other)
        after = b'GET /v1/town HTTP/1.1\r\n' + HOST + b'X-Request-ID: after\r\nConnection: close\r\n\r\n'
        found = answers(send(front, attack + after, waits))
        allowed = {status} if isinstance(front, Hall) else {status, *OWN_REFUSALS}
        assert found[0].status in allowed
        assert [answer.status for answer in found[1:]] in ([], [200])
        assert [answer.headers['x-request-id'] for answer in found[1:]] in ([], ['after'])
        for _ in range(3):
            ask(front)
        ask(front, other)
    assert not killed(town)


def test_refused_requests_do_not_shift_the_answers_of_others_on_the_same_connections(
    town: Place, front: Service
) -> None:
    stop = threading.Event()
    given = [data for _, data in ATTACKS.values() if b'Connection' not in data]

    def attack() -> int:
        count = 0
        for data in itertools.cycle(given):
            if stop.is_set() and count >= len(given):
                break
            answers(send(front, data.replace(b'\r\n', CLOSE, 1), waits=bool(count % 2)))
            count += 1
        return count

    def work() -> None:
        with front.connect() as sock:
            for _ in range(60):
                ask(front, sock)
                ask(front)

    with ThreadPoolExecutor(8) as pool:
        attackers = [pool.submit(attack) for _ in range(3)]
        workers = [pool.submit(work) for _ in range(5)]
        try:
            for worker in workers:
                worker.result(6 * PATIENCE)
        finally:
            stop.set()
        assert sum(attacker.result(6 * PATIENCE) for attacker in attackers) >= 3 * len(given)
    assert not killed(town)


# ------------------------------------------------------------------------------------------------- keeping alive


def test_many_clients_share_a_connection_to_townhall(proxy: Service, behind: Hall) -> None:
    before = proxies.upstream(behind)
    used = set()
    for _ in range(30):
        ask(proxy)
        used |= proxies.upstream(behind)
    assert len(used - before) <= 1
    with proxy.connect() as sock:
        for _ in range(30):
            ask(proxy, sock)
        assert len(proxies.upstream(behind) - before) <= 1


@pytest.mark.parametrize(
    ('status', 'attack'), [ATTACKS[name] for name in ('as JSON', 'to a path that is not there', 'as text')]
)
def test_a_request_that_is_refused_and_read_whole_keeps_the_connection(
    started: dict[str, Service], behind: Hall, status: int, attack: bytes
) -> None:
    front = started['haproxy']
    ask(front)
    before = proxies.upstream(behind)
    for _ in range(10):
        assert answers(front.talk(attack.replace(b'\r\n', CLOSE, 1), finish=False))[0].status == status
        ask(front)
    assert proxies.upstream(behind) & before


def test_head_through_a_proxy_has_no_body(front: Service) -> None:
    full = front.get('/v1/town')
    with front.connect() as sock:
        for path, status in (('/v1/town', 200), ('/nowhere', 404), ('/v1/town', 200)):
            sock.sendall(b'HEAD %b HTTP/1.1\r\n' % path.encode() + HOST + b'\r\n')
            raw = b''
            while b'\r\n\r\n' not in raw:
                raw += sock.recv(65536)
            [answer] = answers(raw, to_head=True)
            assert answer.status == status
            if status == 200:
                assert int(answer.headers['content-length']) == len(full.body)
            ask(front, sock)


def test_a_client_that_asks_first_is_told_to_go_on_and_is_served(front: Service) -> None:
    whole = add('asked first', b'Expect: 100-continue')
    at = whole.index(b'\r\n\r\n') + 4
    with front.connect() as sock:
        for _ in range(3):
            sock.sendall(whole[:at])
            assert sock.recv(65536) == b'HTTP/1.1 100 Continue\r\n\r\n'
            sock.sendall(whole[at:])
            answer = read_answer(sock)
            assert (answer.status, answer.json['description']) == (201, 'asked first')
            ask(front, sock)


def test_large_bodies_and_answers_pass_whole(front: Service) -> None:
    text = 'ä€😀' * 21845  # as many characters as a description may have
    added = front.post('/v1/backlog', {'description': text})
    assert (added.status, added.json['description']) == (201, text)
    assert front.get(f'/v1/tasks/{added.json["task_id"]}').json['description'] == text
    padded = b'{"description":"padded"' + b' ' * ((1 << 20) - 24) + b'}'
    assert len(padded) == 1 << 20
    assert front.post('/v1/backlog', padded).status == 201
    for size in ((1 << 20) + 1, 10 << 20):
        with suppress(ConnectionResetError, BrokenPipeError):  # of a proxy that does not wait for the rest
            assert front.post('/v1/backlog', b'x' * size).status == 413
    ask(front)


# ------------------------------------------------------------------------------------------------- the end of a hall


@pytest.mark.parametrize(
    'start', [proxies.nginx, lambda *given: proxies.haproxy(*given, most=8)], ids=['nginx', 'haproxy']
)
def test_a_townhall_that_drains_behind_a_proxy_has_done_what_was_acknowledged_and_nothing_else(
    place: Place, tmp_path: Path, start: Callable[..., proxies.Proxy]
) -> None:
    hall = place.hall()
    proxy = start(tmp_path, hall)
    try:
        load = Load(proxy, 16)
        load.await_flow(300)
        hall.process.terminate()
        assert hall.process.wait(PATIENCE) == 0
        load.stop()
    finally:
        proxy.close()
    assert load.broken == []
    assert set(load.statuses.values()) <= {201, 502, 503, 0}  # HAProxy closes, where a client may try again
    assert sorted(texts(place)) == sorted(load.acknowledged)


def test_a_townhall_that_drains_beside_another_is_not_noticed_by_those_who_read(place: Place, tmp_path: Path) -> None:
    first, second = place.hall(), place.hall()
    proxy = proxies.nginx(tmp_path, first, second)
    statuses: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            statuses.append(proxy.get('/v1/status').status)

    try:
        with ThreadPoolExecutor(8) as pool:
            lookers = [pool.submit(look) for _ in range(8)]

            def more(count: int) -> None:
                wanted = len(statuses) + count
                while len(statuses) < wanted and not any(looker.done() for looker in lookers):
                    stop.wait(0.01)

            try:
                more(100)
                first.process.terminate()
                assert first.process.wait(PATIENCE) == 0
                more(100)
            finally:
                stop.set()
            for looker in lookers:
                looker.result(2 * PATIENCE)
    finally:
        proxy.close()
    assert set(statuses) == {200}
