"""HTTP/1.1 in bytes: refusals, framing, connections, deadlines, limits, start and shutdown of the server."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tinytown.core.operations import OPERATIONS
from tinytown.errors import BadRequest
from tinytown.http import http1
from tinytown.http.http1 import Request, Response
from tinytown.model import new_id

from ..ground import Puppet, enlist
from ..raw import (
    GET,
    HOST,
    add,
    answers,
    await_descriptors,
    backlog,
    connections,
    descriptors,
    post,
    read_answer,
    timed,
)
from ..support import PATIENCE, REPOSITORY, Hall, Place, environment, make_town, read_all, shell_cli, status_of

SMUGGLED = add('smuggled')


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for the tests of this file; they change nothing or clean up."""
    root = tmp_path_factory.mktemp('http')
    stubborn = shell_cli(f'trap "" TERM; echo > {root}/is-stubborn; sleep 60')
    made = make_town(root, agent_clis={'stubborn': stubborn})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(made.root))
        yield made
        made.close()


@pytest.fixture(scope='module')
def hall(place: Place) -> Hall:
    return place.hall()


@pytest.fixture(scope='module')
def brief(place: Place) -> Hall:
    """A townhall of the same town with the shortest deadlines."""
    limits = {'HEAD_SECS': '1', 'BODY_SECS': '1', 'WRITE_SECS': '1', 'IDLE_SECS': '2'}
    named = {f'TINYTOWN_TOWNHALL_LIMITS_{name}': value for name, value in limits.items()}
    return place.hall(TINYTOWN_TOWNHALL_REQUEST_TIMEOUT_MS='1000', **named)


@pytest.fixture(scope='module')
def page(place: Place) -> bytes:
    """A request whose answer has over PAGE bytes, so that a few answers fill the buffers of a socket."""
    task = place.do('backlog.add', description='€' * 65536)
    return b'GET /v1/tasks/%b HTTP/1.1\r\n' % task['task_id'].encode() + HOST + b'\r\n'


PAGE = 3 * 65536


# ------------------------------------------------------------------------------------------------------- refusals


def head(*lines: bytes) -> bytes:
    return b'\r\n'.join([b'POST /v1/backlog HTTP/1.1', b'Host: localhost', *lines, b'', b''])


REFUSED = {
    # framing
    'length and chunked': (400, head(b'Content-Length: 5', b'Transfer-Encoding: chunked') + b'0\r\n\r\n'),
    'chunked and length': (400, head(b'Transfer-Encoding: chunked', b'Content-Length: 5') + b'0\r\n\r\n'),
    'chunked': (411, head(b'Transfer-Encoding: chunked') + b'0\r\n\r\n'),
    'chunked in capitals': (411, head(b'Transfer-Encoding: CHUNKED') + b'0\r\n\r\n'),
    'gzip coding': (501, head(b'Transfer-Encoding: gzip')),
    'gzip and chunked': (501, head(b'Transfer-Encoding: gzip, chunked') + b'0\r\n\r\n'),
    'nearly chunked': (501, head(b'Transfer-Encoding: xchunked')),
    'empty coding': (501, head(b'Transfer-Encoding:')),
    'two codings': (400, head(b'Transfer-Encoding: chunked', b'Transfer-Encoding: identity') + b'0\r\n\r\n'),
    'two lengths': (400, head(b'Content-Length: 0', b'Content-Length: 5')),
    'the same length twice': (400, head(b'Content-Length: 0', b'content-length: 0')),
    'list of lengths': (400, head(b'Content-Length: 0, 0')),
    'plus': (400, head(b'Content-Length: +0')),
    'minus': (400, head(b'Content-Length: -1')),
    'underscore': (400, head(b'Content-Length: 1_0')),
    'hexadecimal': (400, head(b'Content-Length: 0x0')),
    'no-break space': (400, head(b'Content-Length: \xa00')),
    'digits of another script': (400, head('Content-Length: ٣'.encode())),
    'empty length': (400, head(b'Content-Length: ')),
    '16 digits': (400, head(b'Content-Length: 0000000000000000')),
    '2^62': (400, head(b'Content-Length: 4611686018427387904')),
    'body over the cap': (413, head(b'Content-Length: 1048577')),
    'body far over the cap': (413, head(b'Content-Length: 999999999999999')),
    # lines and fields
    'bare LF after the request line': (400, b'GET /health HTTP/1.1\nHost: localhost\r\n\r\n'),
    'bare LF after a field': (400, b'GET /health HTTP/1.1\r\nHost: localhost\n\r\n'),
    'bare LF only': (400, b'GET /health HTTP/1.1\nHost: localhost\n\n'),
    'bare CR in a value': (400, head(b'X: a\rContent-Length: 0')),
    'bare CR before CRLF': (400, head(b'X: a\r')),
    'NUL in a value': (400, head(b'X: a\0b')),
    'control in a value': (400, head(b'X: a\x1bb')),
    'DEL in a value': (400, head(b'X: a\x7f')),
    'NUL in a name': (400, head(b'X\0: a')),
    'folding with a space': (400, head(b'X: a', b' b')),
    'folding with a tab': (400, head(b'X: a', b'\tContent-Length: 0')),
    'space before the first name': (400, b'GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n'),
    'space before the colon': (400, head(b'Content-Length : 0')),
    'no colon': (400, head(b'nonsense')),
    'no name': (400, head(b': a')),
    'high byte in a name': (400, head(b'X\xe9: a')),
    'two empty lines first': (400, b'\r\n\r\n' + GET),
    'LF first': (400, b'\n' + GET),
    # hosts
    'two Hosts': (400, b'GET /health HTTP/1.1\r\n' + HOST + HOST + b'\r\n'),
    # the request line
    'HTTP/0.9': (400, b'GET /health\r\n\r\n'),
    'HTTP/1.2': (400, b'GET /health HTTP/1.2\r\n' + HOST + b'\r\n'),
    'HTTP/1.10': (400, b'GET /health HTTP/1.10\r\n' + HOST + b'\r\n'),
    'HTTP/2.0': (505, b'GET /health HTTP/2.0\r\n' + HOST + b'\r\n'),
    'the preface of HTTP/2': (505, b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'),
    'http in small letters': (400, b'GET /health http/1.1\r\n' + HOST + b'\r\n'),
    'two spaces': (400, b'GET  /health HTTP/1.1\r\n' + HOST + b'\r\n'),
    'tabs': (400, b'GET\t/health\tHTTP/1.1\r\n' + HOST + b'\r\n'),
    'space at the end': (400, b'GET /health HTTP/1.1 \r\n' + HOST + b'\r\n'),
    'odd method': (400, b'G(T /health HTTP/1.1\r\n' + HOST + b'\r\n'),
    'endless method': (400, b'G' * 33 + b' /health HTTP/1.1\r\n' + HOST + b'\r\n'),
    'absolute form': (400, b'GET http://localhost/health HTTP/1.1\r\n' + HOST + b'\r\n'),
    'authority form': (400, b'CONNECT localhost:80 HTTP/1.1\r\n' + HOST + b'\r\n'),
    'asterisk form': (400, b'OPTIONS * HTTP/1.1\r\n' + HOST + b'\r\n'),
    'no slash': (400, b'GET health HTTP/1.1\r\n' + HOST + b'\r\n'),
    'raw high byte': (400, b'GET /h\xe9alth HTTP/1.1\r\n' + HOST + b'\r\n'),
    'TLS': (400, b'\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n'),
    # expectations and sizes
    'other expectation': (417, head(b'Expect: a-pony', b'Content-Length: 0')),
    'long request line': (414, b'GET /' + b'a' * 8192 + b' HTTP/1.1\r\n' + HOST + b'\r\n'),
    'long field': (431, head(b'X: ' + b'a' * 8190)),
    'endless request line': (414, b'GET /' + b'a' * 9000),
    'endless field': (431, b'GET /health HTTP/1.1\r\nX: ' + b'a' * 9000),
    'large head': (431, head(*[b'X-%d: ' % i + b'a' * 4000 for i in range(5)])),
    '65 fields': (431, head(*[b'X-%d: a' % i for i in range(64)])),
}  # fmt: skip
AMBIGUOUS = """
    //health /v1//town /./health /v1/../health /v1/.. /%2e%2e/health /v1/%2E /%00 /v1%2fstatus /v1%2Fstatus
    /%5chealth /\\health /%zz /%1 /% /%ff /%c0%ae%c0%ae/health /health%0d%0aX:1 /%7f
"""
REFUSED |= {f'path {path}': (400, GET.replace(b'/health', path.encode())) for path in AMBIGUOUS.split()}


@pytest.mark.parametrize(('status', 'data'), REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_request_is_refused_once_and_bytes_after_it_are_never_executed(
    hall: Hall, status: int, data: bytes
) -> None:
    [answer] = answers(hall.talk(data + SMUGGLED, finish=False))
    assert answer.status == status
    assert answer.headers['connection'] == 'close'
    assert answer.headers['content-type'] == 'application/problem+json'
    assert answer.json['status'] == status
    assert answer.json['request_id'] == answer.headers['x-request-id']
    assert 'smuggled' not in backlog(hall)


@pytest.mark.parametrize(
    ('status', 'first'),
    [
        (404, post(SMUGGLED, path=b'/nowhere')),
        (405, post(SMUGGLED, path=b'/v1/status')),
        (415, post(SMUGGLED).replace(b'application/json', b'text/plain', 1)),
        (400, post(SMUGGLED)),
        (403, post(SMUGGLED, b'Origin: http://evil.example')),
        (400, post(SMUGGLED).replace(b'Host: localhost', b'X-Host: localhost', 1)),
        (421, post(SMUGGLED).replace(b'Host: localhost', b'Host: evil.example', 1)),
        (400, post(SMUGGLED).replace(b'POST', b'GET', 1)),
    ],
)
def test_the_body_of_a_refused_request_is_skipped(hall: Hall, status: int, first: bytes) -> None:
    found = answers(hall.talk(first + GET))
    assert [answer.status for answer in found] == [status, 200]
    assert 'smuggled' not in backlog(hall)


def test_a_request_refused_by_its_head_is_answered_before_its_body_arrives(hall: Hall) -> None:
    whole = post(SMUGGLED, path=b'/nowhere')
    [answer] = answers(hall.talk(whole[: -len(SMUGGLED)], finish=False))
    assert (answer.status, answer.headers['connection']) == (404, 'close')


def test_a_head_of_exactly_the_largest_size_is_accepted(hall: Hall) -> None:
    line = b'GET /health?%b HTTP/1.1' % (b'a' * 8170)
    fields = [b'X-%d: a' % i for i in range(63)]
    whole = b'\r\n'.join([b'GET /health HTTP/1.1', b'Host: localhost', b'X: %b' % (b'a' * 8189), b'Y: ', b''])
    for request in (
        line + b'\r\n' + HOST + b'\r\n',
        b'\r\n'.join([b'GET /health HTTP/1.1', b'Host: localhost', *fields, b'', b'']),
        whole.replace(b'Y: ', b'Y: ' + b'a' * (16384 + 2 - len(whole))) + b'\r\n',
    ):
        assert status_of(hall.talk(request)) == 200


ROUTES = [(op.method, op.path) for op in OPERATIONS] + [('GET', path) for path in ('/health', '/ready', '/metrics')]
WRONG_ON_EVERY_ROUTE = {
    (400, b'Transfer-Encoding: chunked\r\nContent-Length: 0'),
    (411, b'Transfer-Encoding: chunked'),
    (501, b'Transfer-Encoding: gzip'),
    (400, b'Content-Length: +0'),
    (400, b'Content-Length: 0\r\nContent-Length: 0'),
    (413, b'Content-Length: 1048577'),
    (400, b'Host: localhost'),
    (400, b'X : a'),
    (403, b'Origin: http://evil.example'),
    (417, b'Expect: a-pony'),
}


@pytest.mark.parametrize(('method', 'path'), ROUTES)
def test_every_route_is_as_strict(hall: Hall, place: Place, method: str, path: str) -> None:
    line = f'{method} {re.sub("{.*?}", "x", path)} HTTP/1.1\r\n'.encode()
    before = place.store.call(place.store.last_event())
    for status, fields in WRONG_ON_EVERY_ROUTE:
        found = answers(hall.talk(line + HOST + fields + b'\r\n\r\n'))
        assert [answer.status for answer in found] == [status], fields
    assert status_of(hall.talk(line + b'Host: evil.example\r\n\r\n')) == 421
    assert status_of(hall.talk(line + b'\r\n')) == 400
    if method == 'POST':
        typed = b'Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}'
        assert status_of(hall.talk(line + HOST + typed)) == 415
    assert place.store.call(place.store.last_event()) == before


def test_a_bad_line_is_answered_before_the_head_is_complete(hall: Hall) -> None:
    assert status_of(hall.talk(b'GET /health HTTP/1.1\r\nHost: localhost\nX', finish=False)) == 400


def test_a_client_that_is_still_sending_receives_its_refusal(hall: Hall) -> None:
    with hall.connect() as sock:
        sock.sendall(head(b'Content-Length: 2000000'))
        for _ in range(20):
            sock.sendall(b'x' * 100_000)
        assert status_of(read_all(sock)) == 413


def test_a_request_that_is_cut_off_anywhere_does_nothing(hall: Hall) -> None:
    whole = add('cut off')
    for cut in range(len(whole)):
        assert hall.talk(whole[:cut]) == b''
    assert 'cut off' not in backlog(hall)
    assert status_of(hall.talk(whole)) == 201
    assert 'cut off' in backlog(hall)


def test_a_request_may_arrive_byte_by_byte(hall: Hall) -> None:
    with hall.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in add('drop by drop'):
            sock.send(bytes([byte]))
        assert read_answer(sock).status == 201


HOSTS = {
    200: ['localhost', 'LOCALHOST:8787', 'localhost.', '127.0.0.1', '10.1.2.3:80', '[::1]:80', '[::1]'],
    421: ['evil.example', 'localhost.evil.example', '127.0.0.1.nip.io', 'xlocalhost', '1.2.3', '2130706433'],
    400: ['', 'a b', 'user@localhost', 'localhost:http', 'localhost/', 'localhost,localhost', 'localhost:1:2'],
}


@pytest.mark.parametrize(('status', 'host'), [(status, host) for status, hosts in HOSTS.items() for host in hosts])
def test_only_an_ip_address_or_an_allowed_name_is_accepted_as_host(hall: Hall, status: int, host: str) -> None:
    assert status_of(hall.talk(b'GET /health HTTP/1.1\r\nHost: %b\r\n\r\n' % host.encode())) == status


def test_a_configured_host_name_is_accepted(place: Place) -> None:
    named = place.hall(TINYTOWN_TOWNHALL_ALLOWED_HOSTS='Town.Example')
    assert named.get('/health', Host='town.example:8787').status == 200
    assert named.get('/health', Host='other.example').status == 421


REPEATED = b'GET /v1/status?x=%%41 HTTP/1.1\r\nHost: a%bX-B: c '


@pytest.mark.parametrize(
    'more',
    [
        b'',
        b'Authorization: Bearer tt_1',
        b'authorization:Bearer tt_1 \t',
        b'X-API-KEY: tt_1',
        b'Cookie: a=b',
        b'Cookie: a=b\r\nCookie: c=d',
        b'Mcp-Session-Id: 1\r\nAuthorization: Bearer tt_1',
        b'Authorizations: x',
        b'Cookie:',
    ],
)
def test_a_head_is_parsed_alike_with_and_without_the_cache(more: bytes) -> None:
    head = REPEATED % (b'\r\n' + more + b'\r\n' if more else b'\r\n')
    long = http1.parse_head(head + b'\r\nPad: ' + b'x' * 1024)  # too long for the cache
    assert len(long.fields.pop(b'pad')) == 1024  # type: ignore[attr-defined]
    assert http1.parse_head(head) == http1.parse_head(head) == long


@pytest.mark.parametrize(
    'more',
    [
        b'Authorization: Bearer tt_1\r\nauthorization: Bearer tt_2',
        b'X-API-Key: a\r\nX-API-Key: a',
        b'Authorization : Bearer tt_1',
        b'Authorization: Bearer \x00',
        b'Cookie: a\nAuthorization: Bearer tt_1',
        b' Authorization: Bearer tt_1',
    ],
)
def test_a_malformed_credential_is_refused_even_if_the_rest_of_the_head_is_cached(more: bytes) -> None:
    http1.parse_head(REPEATED % b'\r\n')
    http1.parse_head(REPEATED % b'\r\nAuthorization: Bearer tt_1\r\n')
    with pytest.raises(BadRequest):
        http1.parse_head(REPEATED % (b'\r\n' + more + b'\r\n'))


def test_the_cache_of_heads_contains_no_credentials() -> None:
    before = http1._cached_head.cache_info().misses
    http1.parse_head(b'POST /messages?session_id=1 HTTP/1.1\r\nHost: a')
    for key in (b'tt_1', b'tt_2', b'tt_3'):
        http1.parse_head(b'GET /v1/remembered HTTP/1.1\r\nAuthorization: Bearer %b\r\nHost: a' % key)
    assert http1._cached_head.cache_info().misses == before + 1


def test_a_response_header_can_not_inject_a_line() -> None:
    request = Request('GET', '/', '', 1, {}, id='1')
    for name, value in (
        ('X', 'a\r\nSet-Cookie: b'),
        ('X', 'a\nb'),
        ('X\r\nY', 'a'),
        ('X:', 'a'),
        ('X', 'ä'),
        ('', 'a'),
    ):
        with pytest.raises(ValueError):
            http1.render_response(Response(headers=((name, value),)), request, False)


# -------------------------------------------------------------------------------------------------------- answers


def test_pipelined_requests_are_answered_in_order(hall: Hall) -> None:
    wanted, sent = [], b''
    for i in range(50):
        sent += add(f'n{i}', b'X-Request-ID: add-%d' % i) + GET
        sent += b'GET /v1/status?wrong=%d HTTP/1.1\r\n' % i + HOST + b'X-Request-ID: wrong-%d\r\n\r\n' % i
        wanted += [201, 200, 422]
    found = answers(hall.talk(sent))
    assert [answer.status for answer in found] == wanted
    assert [answer.headers['x-request-id'] for answer in found[::3]] == [f'add-{i}' for i in range(50)]
    assert [answer.headers['x-request-id'] for answer in found[2::3]] == [f'wrong-{i}' for i in range(50)]


def test_a_thousand_wrong_pipelined_requests_get_an_error_each(hall: Hall) -> None:
    found = answers(hall.talk((b'GET /v1/status?a=1 HTTP/1.1\r\n' + HOST + b'\r\n') * 1000))
    assert [answer.status for answer in found] == [422] * 1000


def test_a_connection_stays_open_until_the_client_sends_close(hall: Hall) -> None:
    with hall.connect() as sock:
        for connection in (b'', b'Connection: keep-alive\r\n', b'Connection: disclosed\r\n'):
            sock.sendall(b'GET /health HTTP/1.1\r\n' + HOST + connection + b'\r\n')
            assert 'connection' not in read_answer(sock).headers
        sock.sendall(b'\r\n' + GET)  # the empty line that some old clients send after a body
        assert read_answer(sock).status == 200
        sock.sendall(b'GET /health HTTP/1.1\r\n' + HOST + b'Connection: foo, Close\r\n\r\n' + SMUGGLED)
        [last] = answers(read_all(sock))
        assert (last.status, last.headers['connection']) == (200, 'close')
    assert 'smuggled' not in backlog(hall)


def test_http_1_0_is_closed_after_one_answer_unless_the_client_asks_to_keep_it(hall: Hall) -> None:
    [answer] = answers(hall.talk(b'GET /health HTTP/1.0\r\n\r\n', finish=False))
    assert (answer.status, answer.headers['connection']) == (200, 'close')
    with hall.connect() as sock:
        for _ in range(2):
            sock.sendall(b'GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n')
            assert read_answer(sock).headers['connection'] == 'keep-alive'
        sock.sendall(b'GET /health HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n' + GET)
        assert len(answers(read_all(sock))) == 1


def test_a_client_that_has_finished_sending_gets_all_its_answers(hall: Hall, place: Place) -> None:
    place.do('agent.spawn', name='patient', cli='demo')
    wait = post(b'{"timeout":1}', path=b'/v1/agents/patient/wait')
    found = answers(hall.talk(add('early') + wait + GET + GET[:-2], finish=True))
    assert [answer.status for answer in found] == [201, 200, 200]
    assert found[1].json['done'] is False


def test_head_is_get_without_a_body(hall: Hall) -> None:
    shown = hall.get('/v1/town')
    raw = hall.talk(b'HEAD /v1/town HTTP/1.1\r\n' + HOST + b'\r\n' + GET.replace(b'GET', b'HEAD'))
    first, second = answers(raw, to_head=True)
    assert (first.status, first.headers['content-length']) == (200, str(len(shown.body)))
    assert second.status == 200
    [missing] = answers(hall.talk(b'HEAD /nowhere HTTP/1.1\r\n' + HOST + b'\r\n'), to_head=True)
    assert missing.status == 404
    for wrong in (b'Content-Length: x\r\n', b'nonsense\r\n', b'X: a\n'):
        refused = hall.talk(b'HEAD /health HTTP/1.1\r\n' + HOST + wrong + b'\r\n')
        assert [answer.status for answer in answers(refused, to_head=True)] == [400]


@pytest.mark.parametrize(
    ('path', 'allowed'),
    [
        ('/health', 'GET, HEAD, OPTIONS'),
        ('/v1/backlog', 'GET, HEAD, OPTIONS, POST'),
        ('/v1/agents/x/inbox', 'GET, HEAD, OPTIONS, POST'),
        ('/v1/agents/prune', 'GET, HEAD, OPTIONS, POST'),
        ('/v1/tasks/assign', 'GET, HEAD, OPTIONS, POST'),
    ],
)
def test_options_and_405_name_the_methods_of_a_path(hall: Hall, path: str, allowed: str) -> None:
    options = hall.request('OPTIONS', path)
    assert (options.status, options.headers['allow'], options.body) == (204, allowed, b'')
    for method in ('PUT', 'PATCH', 'TRACE', 'get', 'BREW'):
        wrong = hall.request(method, path)
        assert (wrong.status, wrong.headers['allow']) == (405, allowed)
        assert wrong.json['code'] == 'method-not-allowed'
    assert hall.request('OPTIONS', '/nowhere').status == 404


def test_an_agent_may_have_a_name_that_is_also_a_path_of_the_api(hall: Hall) -> None:
    assert hall.get('/v1/agents/prune').json['detail'] == "Agent 'prune' not found"


def test_no_answer_reveals_the_server_software(hall: Hall) -> None:
    for answer in (hall.get('/health'), hall.get('/nowhere'), answers(hall.talk(b'nonsense\r\n\r\n'))[0]):
        assert 'server' not in answer.headers
        assert b'Python' not in answer.body
        assert answer.headers['cache-control'] == 'no-store'
        assert answer.headers['x-content-type-options'] == 'nosniff'
        assert 'date' in answer.headers


def test_a_client_that_expects_100_continue_gets_it(hall: Hall) -> None:
    whole = add('asked', b'Expect: 100-Continue')
    at = whole.index(b'\r\n\r\n') + 4
    with hall.connect() as sock:
        sock.sendall(whole[:at])
        assert sock.recv(65536) == b'HTTP/1.1 100 Continue\r\n\r\n'
        sock.sendall(whole[at:])
        assert read_answer(sock).status == 201
        sock.sendall(whole)
        assert read_answer(sock).status == 201  # its body is here already, so there is no 100


@pytest.mark.parametrize(
    ('status', 'line'),
    [(413, b'Content-Length: 9999999'), (404, b'Content-Length: 5'), (403, b'Content-Length: 5\r\nOrigin: null')],
)
def test_a_client_that_expects_100_continue_is_refused_before_it_sends_the_body(
    hall: Hall, status: int, line: bytes
) -> None:
    path = b'/nowhere' if status == 404 else b'/v1/backlog'
    whole = b'POST %b HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n%b\r\n\r\n' % (path, line)
    assert status_of(hall.talk(whole, finish=False)) == status


def test_large_answers_reach_a_slow_reader(hall: Hall, page: bytes) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((hall.address, hall.port))
        sock.sendall(page * 30)
        assert hall.get('/health').status == 200
        sock.shutdown(socket.SHUT_WR)
        found = answers(read_all(sock))
    assert [answer.status for answer in found] == [200] * 30
    assert {answer.json['description'] for answer in found} == {'€' * 65536}


# ------------------------------------------------------------------------------------------------------- deadlines


def drip(hall: Hall, start: bytes) -> bytes:
    """Sends `start`, then a byte every 0.1 s until the server answers."""
    with hall.connect() as sock:
        sock.sendall(start)
        for _ in range(200):
            if select.select([sock], [], [], 0.1)[0]:
                break
            sock.send(b'a')
        return read_all(sock)


def test_a_head_that_arrives_too_slowly_is_answered_408(brief: Hall) -> None:
    raw, took = timed(drip, brief, b'GET /health HTTP/1.1\r\nX: ')
    [answer] = answers(raw)
    assert (answer.status, answer.json['code'], answer.headers['connection']) == (408, 'request-timeout', 'close')
    assert 0.9 < took < 8


def test_a_body_that_arrives_too_slowly_is_answered_408_and_not_executed(brief: Hall) -> None:
    raw, took = timed(
        drip, brief, head(b'Content-Type: application/json', b'Content-Length: 999') + b'{"description":"'
    )
    assert status_of(raw) == 408
    assert 0.9 < took < 8
    assert not [text for text in backlog(brief) if text.startswith('aa')]


def test_a_body_that_stalls_is_answered_408(brief: Hall) -> None:
    raw, took = timed(brief.talk, SMUGGLED[:-1], False)
    assert status_of(raw) == 408
    assert 0.9 < took < 8
    assert 'smuggled' not in backlog(brief)


def test_a_connection_that_sends_nothing_is_closed_without_an_answer(brief: Hall) -> None:
    raw, took = timed(brief.talk, b'', False)
    assert raw == b''
    assert 0.9 < took < 8


def test_a_connection_that_idles_after_an_answer_is_closed(brief: Hall) -> None:
    raw, took = timed(brief.talk, GET, False)
    assert [answer.status for answer in answers(raw)] == [200]
    assert 1.9 < took < 9


def test_a_client_that_does_not_read_is_cut_off(brief: Hall, page: bytes) -> None:
    await_descriptors(brief, 1)
    before = descriptors(brief)
    with brief.connect() as sock:
        sock.sendall(page * 100)
        deadline = time.monotonic() + PATIENCE
        while descriptors(brief) == before:
            assert time.monotonic() < deadline
        await_descriptors(brief, before)
        assert len(read_all(sock)) < 100 * PAGE


def test_an_operation_past_its_deadline_is_answered_503_with_unknown_outcome(brief: Hall, place: Place) -> None:
    os.mkfifo(place.root / 'is-stubborn')
    begun = os.open(place.root / 'is-stubborn', os.O_RDONLY | os.O_NONBLOCK)
    place.do('agent.spawn', name='stubborn', cli='stubborn')
    place.do('task.assign', agent='stubborn', task='hold on')
    assert select.select([begun], [], [], PATIENCE)[0]
    os.close(begun)
    answer, took = timed(lambda: brief.post('/v1/agents/stubborn/kill'))
    assert (answer.status, answer.json['code'], answer.headers['connection']) == (503, 'timeout', 'close')
    assert int(answer.headers['retry-after']) >= 1
    assert 'not known' in answer.json['detail']
    assert 0.9 < took < 5
    place.do('agent.kill', agent='stubborn', force=True)


# ---------------------------------------------------------------------------------------------------------- limits


def test_connections_over_the_limit_get_a_503_with_retry_after(place: Place) -> None:
    small = place.hall(TINYTOWN_TOWNHALL_LIMITS_CONNECTIONS='20')
    before = descriptors(small)
    with connections(small, 20) as held:
        for sock in held:
            sock.sendall(GET)
            assert read_answer(sock).status == 200
        for _ in range(10):
            [answer] = answers(small.talk(GET, finish=False))
            assert (answer.status, answer.json['code']) == (503, 'too-many-connections')
            assert answer.headers['retry-after'] == '1'
        held[0].sendall(GET)
        assert read_answer(held[0]).status == 200  # an accepted connection is served
    await_descriptors(small, before)


def test_a_burst_of_400_connections_is_served(hall: Hall) -> None:
    before = descriptors(hall)
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(400)]
        for sock in socks:
            sock.setblocking(False)
            assert sock.connect_ex((hall.address, hall.port)) in (0, errno.EINPROGRESS)
        for sock in socks:
            sock.settimeout(PATIENCE)
            sock.sendall(GET)
        assert [read_answer(sock).status for sock in socks] == [200] * 400
    await_descriptors(hall, before)


def test_idle_connections_do_not_slow_a_new_client_even_with_few_descriptors(place: Place) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        crowded = place.hall()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with connections(crowded, 300) as held:
        for sock in held:
            sock.sendall(GET)
        assert [read_answer(sock).status for sock in held] == [200] * 300
        answer, took = timed(lambda: crowded.get('/v1/status'))
        assert answer.status == 200
        assert took < 5
        deadline = time.monotonic() + PATIENCE
        while (
            len(os.listdir(f'/proc/{crowded.process.pid}/task')) != 3
        ):  # the event loop, the supervisor, the host orders
            assert time.monotonic() < deadline, 'it has a thread for each connection'


def test_a_server_out_of_descriptors_serves_its_connections_and_recovers(place: Place) -> None:
    starved = place.hall('--read-only')  # without a supervisor, which would open descriptors of its own
    with starved.connect() as inside:
        inside.sendall(b'GET /v1/status HTTP/1.1\r\n' + HOST + b'\r\n')
        assert read_answer(inside).status == 200
        usual = descriptors(starved)
        most = len(os.listdir(f'/proc/{starved.process.pid}/fd')) + 5
        resource.prlimit(starved.process.pid, resource.RLIMIT_NOFILE, (most, most))
        with connections(starved, 20) as outside:
            for sock in outside:
                sock.sendall(GET)
            assert [read_answer(sock).status for sock in outside[:5]] == [200] * 5
            for _ in range(3):
                inside.sendall(b'GET /v1/status HTTP/1.1\r\n' + HOST + b'\r\n')
                assert read_answer(inside).status == 200
            for sock in outside[:15]:
                sock.close()
            assert [read_answer(sock).status for sock in outside[15:]] == [200] * 5
        await_descriptors(starved, usual)


def test_clients_that_disconnect_leave_nothing_behind(hall: Hall, page: bytes) -> None:
    assert hall.get('/health').status == 200
    before = descriptors(hall)
    wait = post(b'{"timeout":0}', path=b'/v1/agents/nobody/wait')
    for data in (b'', GET[:9], SMUGGLED[:-1], GET * 30, page * 30, wait, b'nonsense\r\n\r\n'):
        for _ in range(10):
            with hall.connect() as sock:
                sock.sendall(data)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))  # a reset
    await_descriptors(hall, before)
    assert 'smuggled' not in backlog(hall)


# ---------------------------------------------------------------------------------------------- start and shutdown


@pytest.fixture
def idler(place: Place) -> Iterator[Puppet]:
    """An agent that stays until the test makes it depart."""
    made = enlist(place, f'idler-{new_id()[:8]}')
    yield made
    if made.show()['state'] != 'Stopped':
        made.depart()


def begin_wait(hall: Hall, idler: Puppet, seconds: int = 20) -> socket.socket:
    """A connection with a slow request, which waits until the agent departs or for `seconds`."""
    sock = hall.connect()
    sock.sendall(post(b'{"timeout":%d}' % seconds, path=f'/v1/agents/{idler.name}/wait'.encode()))
    for _ in range(2):  # when the second is answered, the server has read the request above
        assert hall.get('/health').status == 200
    return sock


def await_refusal(hall: Hall) -> None:
    """Waits until the server accepts no more connections."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            hall.connect().close()
        except (ConnectionRefusedError, ConnectionResetError):
            return
    raise AssertionError('it still listens')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_under_way_finish_and_refuses_new_connections(
    place: Place, idler: Puppet, number: signal.Signals
) -> None:
    ending = place.hall()
    with ending.connect() as idle, ending.connect() as arrived, begin_wait(ending, idler) as slow:
        idle.sendall(GET)
        assert read_answer(idle).status == 200
        arrived.sendall(GET)
        ending.process.send_signal(number)
        await_refusal(ending)
        assert read_all(idle) == b''
        [answer] = answers(read_all(arrived))
        assert answer.status == 200
        idler.depart()
        [answer] = answers(read_all(slow))
        assert (answer.status, answer.headers['connection']) == (200, 'close')
        assert answer.json['done'] is True
    assert ending.process.wait(PATIENCE) == 0


def test_requests_that_arrived_before_the_signal_are_answered(place: Place) -> None:
    ending = place.hall()
    assert ending.get('/v1/status').status == 200
    ending.process.send_signal(signal.SIGSTOP)
    assert os.waitid(os.P_PID, ending.process.pid, os.WSTOPPED)
    with connections(ending, 10) as socks:
        for sock in socks:
            sock.sendall(add('just in time'))
        ending.process.send_signal(signal.SIGTERM)
        ending.process.send_signal(signal.SIGCONT)
        assert [status_of(read_all(sock)) for sock in socks] == [201] * 10
    assert ending.process.wait(PATIENCE) == 0
    assert [task['description'] for task in place.do('backlog.list')['backlog']].count('just in time') == 10


def test_a_second_signal_ends_the_server_at_once_and_clients_hear_that_the_outcome_is_unknown(
    place: Place, idler: Puppet
) -> None:
    ending = place.hall(TINYTOWN_TOWNHALL_LIMITS_DRAIN_SECS='60')
    with begin_wait(ending, idler) as slow:
        ending.process.terminate()
        await_refusal(ending)
        assert ending.process.poll() is None
        ending.process.terminate()
        ending.process.wait(10)
        said = read_all(slow)
        assert status_of(said) == 503
        assert b'not known' in said


def townhall(place: Place, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), *flags]
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_port_in_use_prints_one_line_and_exits_2(place: Place, hall: Hall) -> None:
    done = townhall(place, '--port', str(hall.port))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f':{hall.port}' in done.stderr
    assert 'townhall.rest_port' in done.stderr


@pytest.mark.parametrize('address', ['0.0.0.0', '::', '192.0.2.1', 'example.com', ''])  # noqa: S104
def test_an_address_that_other_machines_can_reach_is_not_served_without_authentication(
    place: Place, address: str
) -> None:
    done = townhall(place, '--bind', address, '--port', '0')
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert '--bind' in done.stderr


def ended_log(hall: Hall) -> list[str]:
    """Stops a server and returns the lines of its log."""
    hall.process.terminate()
    assert hall.process.wait(PATIENCE) == 0
    hall.kill()
    return hall.log_file.read_text().splitlines()


def test_the_access_log_has_one_line_a_request(place: Place) -> None:
    logged = place.hall(TINYTOWN_TOWNHALL_ACCESS_LOG='text')
    logged.get('/v1/town', X_Request_ID='first')
    logged.get('/a%20200%201ms%20forged%C2%85', X_Request_ID='second')
    logged.talk(b'nonsense\r\n\r\n')
    lines = [line for line in ended_log(logged) if 'ms ' in line]
    assert re.fullmatch(r'\S+Z 127\.0\.0\.1 GET /v1/town 200 [\d.]+ms first', lines[0])
    assert re.fullmatch(r'\S+Z 127\.0\.0\.1 GET /a%20200%201ms%20forged%C2%85 404 [\d.]+ms second', lines[1])
    assert re.fullmatch(r'\S+Z 127\.0\.0\.1 - - 400 [\d.]+ms [0-9a-f]{16}', lines[2])
    assert len(lines) == 3


def test_the_access_log_may_be_json_or_off(place: Place) -> None:
    logged = place.hall(TINYTOWN_TOWNHALL_ACCESS_LOG='json')
    logged.get('/v1/town', X_Request_ID='first')
    [line] = [json.loads(line) for line in ended_log(logged) if line.startswith('{')]
    about = {'request_id', 'peer', 'principal', 'method', 'path', 'status', 'ms', 'bytes'}
    assert line.keys() == {'time', 'level', 'part', 'message'} | about
    assert (line['request_id'], line['method'], line['path'], line['status']) == ('first', 'GET', '/v1/town', 200)
    silent = place.hall(TINYTOWN_TOWNHALL_ACCESS_LOG='off')
    silent.get('/v1/town')
    assert not [line for line in ended_log(silent) if '/v1/town' in line]


def test_a_log_that_can_not_be_written_does_not_stop_the_server(place: Place) -> None:
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), '--port', '0']
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rsplit(b':', 1)[1])
        process.stderr.close()
        for _ in range(2):
            with socket.create_connection(('127.0.0.1', port), timeout=PATIENCE) as sock:
                sock.sendall(GET)
                assert read_answer(sock).status == 200
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_the_server_works_without_epoll(place: Place, idler: Puppet, page: bytes, tmp_path: Path) -> None:
    (tmp_path / 'sitecustomize.py').write_text('import select\ndel select.epoll\n')
    plain = place.hall(PYTHONPATH=f'{tmp_path}:{REPOSITORY}')
    with begin_wait(plain, idler, 1) as slow:
        found = answers(plain.talk(page * 30 + GET + GET[:-2]))
        assert [answer.status for answer in found] == [200] * 31
        assert read_answer(slow).status == 200
        plain.process.terminate()
        assert read_all(slow) == b''
    assert plain.process.wait(PATIENCE) == 0


BROKEN = """
import sys
from pathlib import Path
from tinytown.http.replies import Slow
from tinytown.http.http1 import Peer, Response
from tinytown.http.listener import open_listeners
from tinytown.core.town import open_town
from tinytown.http.server import Server

class Broken:
    def meet(self, sock, address):
        return Peer(address[0])
    def refused(self, request, error):
        pass
    def begin(self, request):
        if request.path == '/begin':
            raise ZeroDivisionError('secret')
    def handle(self, request):
        if request.path == '/handle':
            raise ZeroDivisionError('secret')
        if request.path == '/header':
            return Response(headers=(('X', 'a\\r\\nY: b'),))
        return Slow(self.steps(request)) if request.path == '/slow' else self.steps(request)
    def steps(self, request):
        if request.path != '/fine':
            yield store.ping()
            raise ZeroDivisionError('secret')
        return Response(200, b'{}')

town = open_town(Path(sys.argv[1]))
store = town.store
[listener] = open_listeners('127.0.0.1', 0)
server = Server(listener, Broken(), store, town.config.townhall)
print(listener.server_address[1], flush=True)
server.serve()
"""


def test_a_bug_in_the_server_is_a_500_that_reveals_only_the_request_id(place: Place) -> None:
    argv = [sys.executable, '-c', BROKEN, str(place.root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for path in ('begin', 'handle', 'header', 'steps', 'slow'):
            with socket.create_connection(('127.0.0.1', port), timeout=PATIENCE) as sock:
                sock.sendall(
                    b'GET /%b HTTP/1.1\r\n' % path.encode() + HOST + b'X-Request-ID: it-%b\r\n\r\n' % path.encode()
                )
                answer = read_answer(sock)
            assert (answer.status, answer.json['code'], answer.json['request_id']) == (500, 'internal', f'it-{path}')
            assert b'secret' not in answer.body
        with socket.create_connection(('127.0.0.1', port), timeout=PATIENCE) as sock:
            sock.sendall(GET.replace(b'health', b'fine'))
            assert read_answer(sock).status == 200
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    for path in ('begin', 'handle', 'header', 'steps', 'slow'):
        assert said.count(f'request it-{path} failed') == 1
