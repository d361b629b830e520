"""REST: parsing of bodies and queries, problem documents, origins and hosts, and an unavailable Redis."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ..support import PATIENCE, Hall, Place, Reply, make_town, redis_pid


@pytest.fixture(scope='module')
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for all tests of this module that do not disturb Redis."""
    place = make_town(tmp_path_factory.mktemp('rest'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(place.root))
        yield place
        place.close()


@pytest.fixture(scope='module')
def rest(shared: Place) -> Hall:
    return shared.hall()


def assert_problem(answer: Reply, status: int, code: str) -> None:
    """Asserts that an answer is a complete problem document (RFC 9457)."""
    document = answer.json
    assert (answer.status, document['code']) == (status, code), document
    assert answer.headers['content-type'] == 'application/problem+json'
    assert document.keys() - {'errors'} == {'type', 'title', 'status', 'detail', 'code', 'request_id'}
    assert document['type'] == f'https://tinytown.dev/errors/{status}'
    assert document['status'] == status
    assert document['title']
    assert document['detail']
    assert document['request_id'] == answer.headers['x-request-id']


# ------------------------------------------------------------------------------------------------------------ bodies


def task(value: bytes) -> bytes:
    return b'{"description": %b}' % value


NOT_JSON = {
    'NaN': task(b'NaN'),
    'Infinity': task(b'Infinity'),
    'minus Infinity': task(b'-Infinity'),
    '1e400': task(b'1e400'),
    '-1e400': task(b'-1e400'),
    '5,000 digits': task(b'9' * 5000),
    '21 digits': b'{"description": "a", "limit": 100000000000000000000}',
    'a name twice': b'{"description": "a", "description": "b"}',
    'a name twice, escaped': b'{"description": "a", "d\\u0065scription": "b"}',
    'a name twice, deep': b'{"description": [{"a": 1, "a": 1}]}',
    'depth 33': task(b'[' * 32 + b']' * 32),
    'depth 33 of objects': task(b'{"a":' * 32 + b'1' + b'}' * 32),
    'depth 33 after a string': b'{"a": "\\"", "description": ' + b'[' * 32 + b']' * 32 + b'}',
    'endless depth': b'[' * 500_000,
    'endless depth of objects': b'{"a":' * 200_000,
    'lone surrogate': task(b'"\\ud800"'),
    'surrogates in the wrong order': task(b'"\\udc00\\ud800"'),
    'lone surrogate in a name': b'{"\\uDFFF": 1}',
    'invalid UTF-8': task(b'"\xff"'),
    'overlong UTF-8': task(b'"\xc0\xaf"'),
    'surrogate in UTF-8': task(b'"\xed\xa0\x80"'),
    'BOM': b'\xef\xbb\xbf' + task(b'"a"'),
    'UTF-16': task(b'"a"').decode().encode('utf-16'),
    'UTF-16 without BOM': task(b'"a"').decode().encode('utf-16-le'),
    'UTF-32': task(b'"a"').decode().encode('utf-32'),
    'garbage behind': task(b'"a"') + b'x',
    'two documents': task(b'"a"') * 2,
    'NUL behind': task(b'"a"') + b'\0',
    'cut off': b'{"description": "a',
    'only space': b'  \r\n',
    'comment': b'{"description": "a" /* b */}',
    'single quotes': b"{'description': 'a'}",
    'trailing comma': b'{"description": "a",}',
    'bare word': b'{description: "a"}',
    'raw line break in a text': task(b'"a\nb"'),
    'raw NUL in a text': task(b'"a\0b"'),
    'bad escape': task(b'"\\x41"'),
    'leading zero': b'{"description": "a", "limit": 01}',
    'a form': b'description=a',
}


@pytest.mark.parametrize('body', NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_body_that_is_not_strict_json_is_refused(shared: Place, rest: Hall, body: bytes) -> None:
    before = shared.do('backlog.list')['count']
    assert_problem(rest.post('/v1/backlog', body), 400, 'malformed-json')
    assert shared.do('backlog.list')['count'] == before


@pytest.mark.parametrize(
    ('path', 'body', 'pointers'),
    [
        ('/v1/backlog', [], ['']),
        ('/v1/backlog', None, ['/description']),
        ('/v1/backlog', b'null', ['']),
        ('/v1/backlog', b'"a"', ['']),
        ('/v1/backlog', {}, ['/description']),
        ('/v1/backlog', {'description': 1}, ['/description']),
        ('/v1/backlog', {'description': True}, ['/description']),
        ('/v1/backlog', {'description': ''}, ['/description']),
        ('/v1/backlog', {'description': 'a' * 65537}, ['/description']),
        ('/v1/backlog', {'description': 'a\0b'}, ['/description']),
        ('/v1/backlog', {'description': 'a', 'descriptions': 'a'}, ['/descriptions']),
        ('/v1/backlog', {'description': 'a', 'a/b~c': 1}, ['/a~1b~0c']),
        ('/v1/backlog', {'description': 'a', 'tags': ['ok', 2, 'ok', '']}, ['/tags/1', '/tags/3']),
        ('/v1/backlog', b'{"description": "a", "deep": ' + b'[' * 31 + b']' * 31 + b'}', ['/deep']),
        ('/v1/agents/conductor/inbox', {'limit': True}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': 1.5}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': '1'}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': 0}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': 501}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': 10**19}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'limit': -(10**19)}, ['/limit']),
        ('/v1/agents/conductor/inbox', {'agent': 'conductor'}, ['/agent']),
        ('/v1/agents/conductor/inbox', {'agent': None}, ['/agent']),
        ('/v1/messages/send', {'to': 'x', 'message': 'm', 'kind': 'Task', 'urgent': 1}, ['/kind', '/urgent']),
    ],
)  # fmt: skip
def test_invalid_arguments_are_422_with_a_pointer_for_every_error(
    shared: Place, rest: Hall, path: str, body: Any, pointers: list[str]
) -> None:
    before = shared.do('backlog.list')['count']
    answer = rest.post(path, body)
    assert_problem(answer, 422, 'invalid')
    assert [error['pointer'] for error in answer.json['errors']] == pointers
    assert all(error['detail'] for error in answer.json['errors'])
    assert shared.do('backlog.list')['count'] == before


@pytest.mark.parametrize(
    'text',
    [
        '[' * 5000,
        '{"a":[',
        '\\" ]}',
        'ünï 😀 \U0010ffff',
        "'; DROP TABLE x; $(reboot) `id`",
        'a\tb\nc\r\n',
        'a\u2028\x85',
    ],
)
def test_a_text_is_stored_unchanged(shared: Place, rest: Hall, text: str) -> None:
    added = rest.post('/v1/backlog', {'description': text})
    assert added.status == 201
    assert added.json['description'] == text
    assert shared.do('task.get', task_id=added.json['task_id'])['description'] == text
    assert rest.get(f'/v1/tasks/{added.json["task_id"]}').json['description'] == text


HOSTILE = {
    'a name twice at the end of many': b'{' + b''.join(b'"%d":0,' % i for i in range(90_000)) + b'"x":0,"x":0}',
    'many unknown names': b'{' + b','.join(b'"%d":0' % i for i in range(90_000)) + b'}',
    'brackets and a long text': b'[' * 33 + b'"' + b'a' * 1_000_000,
    'brackets and many escapes': b'[' * 33 + b'"' + b'\\"' * 500_000,
    'many brackets': b'[],' * 340_000,
    'many numbers': b'[' + b'1.5,' * 250_000 + b'1]',
    'a long number': b'[0.' + b'1' * 1_000_000 + b']',
}


@pytest.mark.parametrize('body', HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_body_costs_little_time_and_gets_a_short_answer(rest: Hall, body: bytes) -> None:
    began = rest.cpu_secs()
    answer = rest.post('/v1/backlog', body)
    assert answer.status in (400, 422)
    assert len(answer.body) < 16384
    assert rest.cpu_secs() - began < 2


@pytest.mark.parametrize(
    'kind',
    [
        *(
            '',
            'text/plain',
            'application/x-www-form-urlencoded',
            'multipart/form-data; boundary=x',
            'application/jsonp',
            '\xa0application/json',
        ),
        *('application/json; charset=latin-1', 'application/json; charset=utf-16', 'application/problem+json', 'json'),
    ],
)
def test_the_content_type_of_a_body_must_be_json(shared: Place, rest: Hall, kind: str) -> None:
    before = shared.do('backlog.list')['count']
    assert_problem(rest.post('/v1/backlog', task(b'"a"'), Content_Type=kind), 415, 'unsupported-media-type')
    assert shared.do('backlog.list')['count'] == before


@pytest.mark.parametrize(
    'kind', ['application/json', 'Application/JSON;charset=UTF-8', 'application/json; charset="utf-8"']
)
def test_the_content_type_of_json_may_be_written_in_several_ways(rest: Hall, kind: str) -> None:
    assert rest.post('/v1/backlog', task(b'"a"'), Content_Type=kind).status == 201


def test_an_empty_body_needs_no_content_type_and_counts_as_an_empty_object(rest: Hall) -> None:
    assert rest.request('POST', '/v1/agents/conductor/inbox').status == 200
    assert rest.post('/v1/recover', b'', Content_Type='text/plain').status == 200


# ----------------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(
    ('query', 'status', 'code'),
    [
        *(('limit=1', 200, ''), ('limit=500', 200, ''), ('', 200, ''), ('&', 200, '')),
        *((f'limit={value}', 422, 'invalid') for value in ('0', '501', '-1', '1.0', 'x', '', 'true')),
        *((f'limit={value}', 422, 'invalid') for value in ('%D9%A3', '1e1', '+1', '9' * 99)),
        *((query, 422, 'invalid') for query in ('limits=1', 'Limit=1', 'cursor=%00', 'cursor=')),
        *((query, 400, 'bad-request') for query in ('limit=1&limit=1', 'cursor=%ff', 'a&' * 65)),
    ],
)  # fmt: skip
def test_a_query_is_as_strict_as_a_body(rest: Hall, query: str, status: int, code: str) -> None:
    answer = rest.get(f'/v1/tasks?{query}')
    assert answer.status == status, answer.body
    if status != 200:
        assert_problem(answer, status, code)
    if status == 422:
        assert [error['pointer'] for error in answer.json['errors']] == [f'/{query.partition("=")[0]}']


def test_a_boolean_in_a_query_may_be_written_in_several_ways(rest: Hall) -> None:
    for query in ('deep', 'deep=1', 'deep=true', 'deep=TRUE', 'deep=yes'):
        assert 'tasks' in rest.get(f'/v1/status?{query}').json
    for query in ('deep=0', 'deep=false', 'deep=no'):
        assert 'tasks' not in rest.get(f'/v1/status?{query}').json
    assert_problem(rest.get('/v1/status?deep=perhaps'), 422, 'invalid')


def test_arguments_are_accepted_only_where_the_method_has_them(rest: Hall) -> None:
    assert_problem(rest.post('/v1/backlog?description=a', {'description': 'a'}), 422, 'query-not-taken')
    assert_problem(rest.request('GET', '/v1/status', {'deep': True}), 400, 'body-not-taken')
    assert_problem(rest.get('/v1/agents/conductor/inbox?agent=x'), 422, 'invalid')
    assert rest.get('/v1/agents/conductor/inbox?limit=5').json['agent'] == 'conductor'


# ----------------------------------------------------------------------------------------------------------- problems


MISSING = '/v1/tasks/00000000-0000-4000-8000-000000000000'


@pytest.mark.parametrize(
    ('method', 'path', 'body', 'status', 'code'),
    [
        ('GET', '/nowhere', None, 404, 'no-such-path'),
        ('GET', '/v1', None, 404, 'no-such-path'),
        ('GET', '/v1/status/', None, 404, 'no-such-path'),
        ('GET', '/V1/status', None, 404, 'no-such-path'),
        ('GET', '/v1/agents/worker-99', None, 404, 'agent-not-found'),
        ('GET', MISSING, None, 404, 'task-not-found'),
        ('PUT', '/v1/status', None, 405, 'method-not-allowed'),
        ('DELETE', '/v1/agents/x', None, 405, 'method-not-allowed'),
        ('POST', f'{MISSING}/complete', {}, 404, 'task-not-found'),
        ('POST', '/v1/agents', {'name': 'conductor'}, 422, 'invalid'),
        ('GET', '/v1/agents/a%20b', None, 422, 'invalid'),
    ],
)
def test_every_error_is_a_problem_document(
    rest: Hall, method: str, path: str, body: Any, status: int, code: str
) -> None:
    assert_problem(rest.request(method, path, body), status, code)


def test_the_error_for_an_unknown_agent_names_it(rest: Hall) -> None:
    assert rest.get('/v1/agents/worker-99').json['detail'] == "Agent 'worker-99' not found"


def test_a_valid_request_id_is_kept_and_any_other_is_replaced(rest: Hall) -> None:
    for sent in ('abc', 'A.b_c-1', 'x' * 128):
        assert rest.get('/health', X_Request_ID=sent).headers['x-request-id'] == sent
        assert rest.get('/nowhere', X_Request_ID=sent).json['request_id'] == sent
        assert rest.post('/v1/backlog', b'{', X_Request_ID=sent).json['request_id'] == sent
    new = {
        rest.get('/health', X_Request_ID=sent).headers['x-request-id']
        for sent in ('', ' ', 'a b', 'x' * 129, 'a;b', '<script>', 'ü', '"', '%0d%0a')
    }
    new |= {rest.get('/health').headers['x-request-id'], rest.get('/health').headers['x-request-id']}
    assert len(new) == 11
    assert all(len(request_id) == 16 and request_id.isalnum() for request_id in new)


@pytest.mark.parametrize('key', ['', ' ', 'a b', 'x' * 256, 'ü'])
def test_an_idempotency_key_must_be_printable_ascii(rest: Hall, key: str) -> None:
    assert_problem(rest.post('/v1/backlog', {'description': 'a'}, Idempotency_Key=key), 400, 'bad-request')


def test_an_error_of_redis_is_a_500_problem(place: Place, hall: Hall) -> None:
    from tinytown.state.store import Command

    place.store.call(Command(None, ('SET', place.store.prefix + b'tasks', 'not a set')))
    assert_problem(hall.get('/v1/tasks'), 500, 'redis-error')
    assert hall.get('/v1/agents').status == 200


# ---------------------------------------------------------------------------------------------------- who may call


def test_a_page_of_another_origin_is_refused(rest: Hall) -> None:
    ours = f'127.0.0.1:{rest.port}'
    for origin in (
        'http://evil.example',
        'null',
        f'http://localhost:{rest.port}',
        'http://127.0.0.1',
        f'ftp://{ours}',
        '',
    ):
        assert_problem(rest.get('/v1/status', Origin=origin), 403, 'foreign-origin')
        assert_problem(rest.post('/v1/backlog', {'description': 'a'}, Origin=origin), 403, 'foreign-origin')
        assert rest.request('OPTIONS', '/v1/backlog', Origin=origin).status == 403
    for origin in (f'http://{ours}', f'https://{ours}'):
        answer = rest.get('/v1/status', Origin=origin)
        assert answer.status == 200
        assert 'access-control-allow-origin' not in answer.headers


def test_a_foreign_host_name_is_refused(rest: Hall) -> None:
    assert_problem(rest.get('/v1/status', Host='evil.example'), 421, 'misdirected-request')
    assert_problem(rest.get('/health', Host='evil.example'), 421, 'misdirected-request')


def test_without_authentication_credentials_are_ignored(rest: Hall) -> None:
    answer = rest.get('/v1/status', Authorization='Bearer anything')
    assert answer.status == 200
    assert 'www-authenticate' not in answer.headers


def test_a_read_only_server_changes_nothing(shared: Place) -> None:
    reader = shared.hall('--read-only')
    before = shared.do('backlog.list')
    for path, body in (
        ('/v1/backlog', {'description': 'a'}),
        ('/v1/agents', {'name': 'a', 'cli': 'demo'}),
        ('/v1/messages/send', {'to': 'conductor', 'message': 'm'}),
        ('/v1/town/reset', {}),
        ('/v1/recover', {}),
    ):
        assert_problem(reader.post(path, body), 403, 'insufficient-scope')
    assert_problem(reader.request('DELETE', f'/v1/backlog/{MISSING[10:]}'), 403, 'insufficient-scope')
    assert reader.get('/v1/status').status == 200
    assert reader.post('/v1/agents/conductor/inbox', {}).status == 200
    assert shared.do('backlog.list') == before


# ---------------------------------------------------------------------------------------------- Redis is unavailable


def await_status(hall: Hall, path: str, status: int, within: float) -> None:
    """Repeats a GET until the answer has this status."""
    deadline = time.monotonic() + within
    while (answer := hall.get(path)).status != status:
        assert time.monotonic() < deadline, answer.body


def assert_unavailable(answer: Reply) -> None:
    assert_problem(answer, 503, 'redis-unavailable')
    assert int(answer.headers['retry-after']) >= 1


def test_a_killed_redis_is_restarted_with_all_acknowledged_changes(place: Place, hall: Hall) -> None:
    added = hall.post('/v1/backlog', {'description': 'survives'})
    assert added.status == 201
    os.kill(redis_pid(place), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        answer = hall.get('/v1/backlog')
        assert time.monotonic() - began < 5
        if answer.status == 200:
            break
        assert_unavailable(answer)
        assert time.monotonic() < deadline
    assert [task['task_id'] for task in answer.json['backlog']] == [added.json['task_id']]
    assert hall.post('/v1/backlog', {'description': 'goes on'}).status == 201
    assert hall.process.poll() is None


def test_a_hanging_redis_costs_one_timeout_and_does_not_delay_health(place: Place, hall: Hall) -> None:
    assert hall.get('/v1/status').status == 200
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        first = hall.post('/v1/backlog', {'description': 'perhaps'})
        assert time.monotonic() - began < 5
        assert_unavailable(first)
        assert 'not known' in first.json['detail']
        began = time.monotonic()
        for _ in range(10):
            assert_unavailable(hall.get('/v1/status'))
            assert hall.get('/health').status == 200
            ready = hall.get('/ready')
            assert (ready.status, ready.json['redis'], ready.json['status']) == (503, 'disconnected', 'not_ready')
            assert ready.headers['retry-after'] == '1'
            assert hall.get('/metrics').status == 503
        assert time.monotonic() - began < 8, 'every request waits for a timeout of its own'
        began = time.monotonic()
        assert_unavailable(hall.post('/v1/agents', {'name': 'late', 'cli': 'demo'}))
        assert time.monotonic() - began < 6
    finally:
        os.kill(pid, signal.SIGCONT)
    await_status(hall, '/ready', 200, within=8)
    assert hall.get('/v1/status').status == 200
    assert hall.process.poll() is None


def test_a_request_that_waits_for_redis_does_not_delay_health(place: Place) -> None:
    hall = place.hall(TINYTOWN_TOWNHALL_ACCESS_LOG='text')
    assert hall.get('/v1/status').status == 200
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    try:
        with hall.connect() as waiting:
            waiting.sendall(
                b'GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: waits\r\n\r\n'
            )
            assert hall.get('/health', X_Request_ID='passes').status == 200
            os.kill(pid, signal.SIGCONT)
            assert waiting.recv(65536).startswith(b'HTTP/1.1 ')  # 503 if all this took more than a second
    finally:
        os.kill(pid, signal.SIGCONT)
    answered = [line.split()[-1] for line in hall.said(r'ms waits\n').splitlines() if 'ms ' in line]
    assert answered[-2:] == ['passes', 'waits']
