"""MCP over HTTP: statuses and headers, both generations, streams, sessions, the older transport, keys and scopes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinytown.core.operations import OPERATIONS
from tinytown.mcp import jsonrpc as codes
from tinytown.mcp.jsonrpc import BATCHING, LEGACY, META_PREFIX, MODERN
from tinytown.model import Json

from ..ground import enlist
from ..mcp_client import CLIENT, META, Http, events, since
from ..support import Hall, Place, make_town


@pytest.fixture(scope='module')
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for this module, with an agent `a` that the test itself plays."""
    place = make_town(tmp_path_factory.mktemp('m'))
    agent = enlist(place, 'a')
    yield place
    agent.depart()
    place.close()


@pytest.fixture(scope='module')
def served(town: Place) -> Hall:
    """A `townhall mcp-http` for `town`."""
    return town.hall('mcp-http')


@pytest.fixture
def modern(served: Hall) -> Http:
    return Http(served)


@pytest.fixture
def legacy(served: Hall) -> Http:
    """A legacy client in a session of its own."""
    client = Http(served, LEGACY[0])
    reply = client.post('initialize', {'protocolVersion': LEGACY[0], 'capabilities': {}, 'clientInfo': CLIENT})
    client.headers['Mcp-Session-Id'] = reply.headers['mcp-session-id']
    return client


# ------------------------------------------------------------------------------------------------ statuses, headers


@pytest.mark.parametrize(
    ('headers', 'status', 'code'),
    [
        ({}, 200, None),
        ({'mcp_protocol_version': ''}, 400, codes.HEADER_MISMATCH),
        ({'mcp_protocol_version': '2025-11-25'}, 400, codes.HEADER_MISMATCH),
        ({'mcp_protocol_version': '2099-01-01'}, 400, codes.HEADER_MISMATCH),
        ({'mcp_method': ''}, 400, codes.HEADER_MISMATCH),
        ({'mcp_method': 'TOOLS/CALL'}, 400, codes.HEADER_MISMATCH),
        ({'mcp_name': ''}, 400, codes.HEADER_MISMATCH),
        ({'mcp_name': 'town_get_status'}, 400, codes.HEADER_MISMATCH),
        ({'mcp_name': '  town_get  '}, 200, None),
        ({'mcp_name': '=?base64?dG93bl9nZXQ=?='}, 200, None),
        ({'mcp_name': '=?base64?dG93bl9nZXQ?='}, 400, codes.HEADER_MISMATCH),
        ({'mcp_name': '=?base64?/////w==?='}, 400, codes.HEADER_MISMATCH),
        ({'content_type': 'text/plain'}, 415, codes.INVALID_REQUEST),
        ({'content_type': 'application/json; charset=utf-8'}, 200, None),
        ({'accept': 'text/html'}, 406, codes.INVALID_REQUEST),
        ({'accept': 'text/event-stream'}, 406, codes.INVALID_REQUEST),
        ({'accept': 'application/json;q=0'}, 406, codes.INVALID_REQUEST),
        ({'accept': '*/*'}, 200, None),
        ({'accept': ''}, 200, None),
        ({'mcp_session_id': 'whatever'}, 200, None),
        ({'origin': 'null'}, 403, None),
        ({'origin': 'http://evil.example'}, 403, None),
        ({'host': 'evil.example'}, 421, None),
    ],
)
def test_the_headers_of_a_modern_request_are_checked(
    modern: Http, headers: dict[str, str], status: int, code: int | None
) -> None:
    reply = modern.post('tools/call', {'name': 'town_get'}, **headers)
    assert reply.status == status, reply
    if code:
        assert (reply.json['error']['code'], reply.json.get('id')) in ((code, 1), (code, None))


@pytest.mark.parametrize(
    ('method', 'params', 'status', 'code'),
    [
        ('server/discover', {}, 200, None),
        ('initialize', {}, 404, codes.METHOD_NOT_FOUND),
        ('nothing/there', {}, 404, codes.METHOD_NOT_FOUND),
        ('tools/call', {'name': 'nothing'}, 400, codes.INVALID_PARAMS),
        ('tools/call', {'name': 'agent_get', 'arguments': {'agent': 'nobody'}}, 200, None),
        ('resources/read', {'uri': 'tinytown://agents/nobody'}, 400, codes.INVALID_PARAMS),
        ('tools/list', {'cursor': 'x'}, 400, codes.INVALID_PARAMS),
        ('tools/list', {'_meta': {f'{META_PREFIX}clientCapabilities': None}}, 400, codes.INVALID_PARAMS),
    ],
)
def test_a_modern_error_has_its_http_status(
    modern: Http, method: str, params: Json, status: int, code: int | None
) -> None:
    reply = modern.post(method, params)
    assert (reply.status, reply.json.get('error', {}).get('code')) == (status, code)


def test_an_unknown_revision_gets_the_supported_ones(modern: Http) -> None:
    params = {'_meta': META | {f'{META_PREFIX}protocolVersion': '2099-01-01'}}
    reply = modern.post('server/discover', params, mcp_protocol_version='2099-01-01')
    assert (reply.status, reply.json['error']['code']) == (400, codes.UNSUPPORTED_VERSION)
    assert reply.json['error']['data']['supported'] == [MODERN]


@pytest.mark.parametrize(
    ('method', 'params', 'headers', 'status', 'code'),
    [
        ('ping', {}, {}, 200, None),
        ('ping', {}, {'mcp_protocol_version': ''}, 200, None),
        ('ping', {}, {'mcp_protocol_version': '1999-01-01'}, 400, codes.UNSUPPORTED_VERSION),
        ('ping', {}, {'mcp_session_id': 'f' * 31}, 404, None),
        ('nothing/there', {}, {}, 200, codes.METHOD_NOT_FOUND),
        ('tools/call', {'name': 'nothing'}, {}, 200, codes.INVALID_PARAMS),
        ('resources/read', {'uri': 'tinytown://tasks/x'}, {}, 200, codes.RESOURCE_NOT_FOUND),
        ('server/discover', {}, {}, 400, codes.INVALID_PARAMS),
    ],
)
def test_most_legacy_errors_have_status_200(
    legacy: Http, method: str, params: Json, headers: dict[str, str], status: int, code: int | None
) -> None:
    reply = legacy.post(method, params, **headers)
    assert (reply.status, reply.json.get('error', {}).get('code') if 'error' in reply.json else None) == (status, code)


@pytest.mark.parametrize(
    ('body', 'status', 'code'),
    [
        (b'', 400, codes.PARSE_ERROR),
        (b'{', 400, codes.PARSE_ERROR),
        (b'7', 400, codes.INVALID_REQUEST),
        (b'[]', 400, codes.INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":"notifications/initialized"}', 202, None),
        (b'{"jsonrpc":"2.0","id":"x","result":{}}', 202, None),
    ],
)
def test_a_body_is_one_message(legacy: Http, body: bytes, status: int, code: int | None) -> None:
    reply = legacy.hall.request('POST', '/mcp', body, **legacy.head('', {}))
    assert reply.status == status
    if code:
        assert reply.json['error']['code'] == code
    else:
        assert reply.body == b''


@pytest.mark.parametrize(
    ('revision', 'status'), [('', 200), (BATCHING, 200), ('2025-06-18', 400), ('2025-11-25', 400), (MODERN, 400)]
)
def test_an_array_is_accepted_only_in_the_revision_that_has_them(served: Hall, revision: str, status: int) -> None:
    batch = [
        {'jsonrpc': '2.0', 'id': 1, 'method': 'ping'},
        {'jsonrpc': '2.0', 'method': 'notifications/initialized'},
        {'jsonrpc': '2.0', 'id': 2, 'method': 'tools/call', 'params': {'name': 'agent_wait', 'arguments': WAIT}},
        {'jsonrpc': '2.0', 'id': 3, 'method': 'nothing'},
        {'jsonrpc': '2.0', 'id': 4, 'method': 'subscriptions/listen', 'params': {'_meta': META}},
    ]
    reply = served.post('/mcp', batch, **({'MCP-Protocol-Version': revision} if revision else {}))
    assert reply.status == status
    if status == 200:
        assert [each['id'] for each in reply.json] == [1, 2, 3, 4]
        assert reply.json[3]['error']['code'] == codes.INVALID_REQUEST
        assert reply.json[1]['result']['structuredContent']['state'] == 'Idle'
    only = served.post(
        '/mcp', [{'jsonrpc': '2.0', 'method': 'notifications/initialized'}], MCP_Protocol_Version=BATCHING
    )
    assert (only.status, only.body) == (202, b'')


WAIT = {'agent': 'a', 'timeout': 0}


@pytest.mark.parametrize('method', ['GET', 'DELETE'])
@pytest.mark.parametrize('headers', [{}, {'mcp_session_id': '0' * 32, 'mcp_protocol_version': MODERN}])
def test_get_and_delete_need_a_legacy_session(served: Hall, method: str, headers: dict[str, str]) -> None:
    reply = served.request(method, '/mcp', **headers)
    assert (reply.status, reply.headers['allow']) == (405, 'OPTIONS, POST')


def test_the_rest_port_serves_mcp_but_the_mcp_port_serves_no_rest(town: Place, served: Hall) -> None:
    assert Http(town.hall()).call('town_get')['structuredContent']['name'] == 'test'
    assert served.get('/v1/status').status == 404
    for path in ('/health', '/ready', '/metrics'):
        assert served.get(path).status == 200


# ------------------------------------------------------------------------------------------------ tools and streams


def test_a_client_spawns_an_agent_assigns_a_task_and_is_notified(place: Place) -> None:
    client = Http(place.hall('mcp-http'))
    assert not client.call('agent_spawn', name='backend')['isError']
    wanted = {'notifications': {'resourceSubscriptions': ['tinytown://agents/backend', 'file:///x']}}
    with client.stream('subscriptions/listen', wanted, id='s') as stream:
        tag = {f'{META_PREFIX}subscriptionId': 's'}
        granted = {'resourceSubscriptions': ['tinytown://agents/backend']}
        assert stream.message()['params'] == {'notifications': granted, '_meta': tag}
        task = client.call('task_assign', agent='backend', task='write a haiku')['structuredContent']['task_id']
        updated = stream.message()
        assert updated['method'] == 'notifications/resources/updated'
        assert updated['params'] == {'uri': 'tinytown://agents/backend', '_meta': tag}
        assert place.await_end(task)['state'] == 'completed'
    read = client.post('resources/read', {'uri': f'tinytown://tasks/{task}'})
    [content] = read.json['result']['contents']
    assert json.loads(content['text'])['state'] == 'completed'
    assert client.call('agent_kill', agent='backend')['structuredContent']['status'] == 'stopped'


def test_waiting_for_an_agent_reports_progress(modern: Http) -> None:
    params = {'name': 'agent_wait', 'arguments': {'agent': 'a', 'timeout': 2}, '_meta': {'progressToken': 7}}
    with modern.stream('tools/call', params) as stream:
        *notifications, reply = stream.messages()
    assert reply['result']['structuredContent'] == {'agent': 'a', 'state': 'Idle', 'done': False}
    assert reply['result']['resultType'] == 'complete'
    progress = [message['params'] for message in notifications]
    assert progress
    assert all((each['progressToken'], each['total']) == (7, 2) for each in progress)
    assert [each['progress'] for each in progress] == sorted({each['progress'] for each in progress})


def test_a_client_without_event_streams_gets_only_the_answer(modern: Http) -> None:
    reply = modern.post('tools/call', {'name': 'agent_wait', 'arguments': WAIT}, accept='application/json')
    assert reply.json['result']['structuredContent']['done'] is False
    wanted = {'notifications': {'resourceSubscriptions': ['tinytown://agents']}}
    assert modern.post('subscriptions/listen', wanted, accept='application/json').status == 406


def test_closing_the_stream_cancels_a_modern_request(town: Place) -> None:
    hall = town.hall('mcp-http')
    params = {'name': 'agent_wait', 'arguments': {'agent': 'a', 'timeout': 25}, '_meta': {'progressToken': 7}}
    with Http(hall).stream('tools/call', params) as stream:
        stream.message()
    began = time.monotonic()
    hall.process.terminate()
    assert hall.process.wait(20) == 0
    assert since(began) < 9, 'the server waited for a cancelled request'


def test_a_stopping_server_ends_a_subscription_with_a_result(town: Place) -> None:
    hall = town.hall('mcp-http')
    with Http(hall).stream('subscriptions/listen', {'notifications': {}}, id='x') as stream:
        assert stream.message()['params']['notifications'] == {}
        hall.process.terminate()
        [last] = stream.messages()
    assert (last['id'], last['result']['resultType']) == ('x', 'complete')
    assert last['result']['_meta'][f'{META_PREFIX}subscriptionId'] == 'x'


def test_an_invalid_subscription_is_answered_with_an_error(modern: Http) -> None:
    with modern.stream('subscriptions/listen', {'notifications': {'resourceSubscriptions': 7}}) as stream:
        [reply] = stream.messages()
    assert reply['error']['code'] == codes.INVALID_PARAMS


# ----------------------------------------------------------------------------------------------------------- sessions


def test_a_legacy_session_is_notified_of_its_subscriptions(town: Place, legacy: Http) -> None:
    head = legacy.head('', {})
    with events(legacy.hall, 'GET', '/mcp', head) as stream:
        assert legacy.post('resources/subscribe', {'uri': 'tinytown://backlog'}).json['result'] == {}
        town.do('backlog.add', description='one')
        assert stream.message() == {
            'jsonrpc': '2.0',
            'method': 'notifications/resources/updated',
            'params': {'uri': 'tinytown://backlog'},
        }
        assert legacy.post('resources/unsubscribe', {'uri': 'tinytown://backlog'}).json['result'] == {}
        assert legacy.post('resources/subscribe', {'uri': 'tinytown://town/current'}).json['result'] == {}
        town.do('backlog.add', description='two')
        assert stream.message()['params'] == {'uri': 'tinytown://town/current'}
        with events(legacy.hall, 'GET', '/mcp', head) as newer:
            assert stream.messages() == [], 'the older stream ends'
            town.do('backlog.add', description='three')
            assert newer.message()['params'] == {'uri': 'tinytown://town/current'}


@pytest.mark.parametrize('uri', ['file:///etc', 'tinytown://agents/a/b'])
def test_a_subscription_to_an_unknown_resource_is_refused(legacy: Http, uri: str) -> None:
    assert legacy.post('resources/subscribe', {'uri': uri}).json['error']['code'] == codes.RESOURCE_NOT_FOUND


def test_a_subscription_without_a_session_is_refused(served: Hall) -> None:
    reply = Http(served, LEGACY[0]).post('resources/subscribe', {'uri': 'tinytown://agents'})
    assert (reply.status, reply.json['error']['code']) == (400, codes.INVALID_REQUEST)


def test_an_ended_session_is_refused(legacy: Http) -> None:
    head = legacy.head('', {})
    assert legacy.post('ping').status == 200
    assert legacy.hall.request('DELETE', '/mcp', **head).status == 204
    for reply in (legacy.post('ping'), legacy.hall.request('GET', '/mcp', **head)):
        assert (reply.status, reply.json['code']) == (404, 'no-such-session')


def test_a_request_with_an_unknown_session_is_served(served: Hall) -> None:
    """The session may date from before a restart of the server. Only subscriptions depend on it."""
    assert Http(served, LEGACY[0], Mcp_Session_Id='0' * 32).post('tools/list').status == 200


def test_a_notification_cancels_a_wait_in_a_legacy_session(legacy: Http) -> None:
    params = {'name': 'agent_wait', 'arguments': {'agent': 'a', 'timeout': 25}, '_meta': {'progressToken': 7}}
    with legacy.stream('tools/call', params, id='w') as stream:
        assert stream.message()['method'] == 'notifications/progress'
        note = {'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': 'w'}}
        assert legacy.hall.request('POST', '/mcp', json.dumps(note).encode(), **legacy.head('', {})).status == 202
        assert [each for each in stream.messages() if 'id' in each] == []


# ------------------------------------------------------------------------------------------- HTTP+SSE (2024-11-05)


def test_the_older_transport_answers_on_its_stream(town: Place, served: Hall) -> None:
    with events(served, 'GET', '/sse', {'Accept': 'text/event-stream'}) as stream:
        event = stream.next()
        assert event
        name, endpoint = event
        assert name == 'endpoint'
        assert endpoint.startswith('/messages?session_id=')

        def ask(method: str, id: Any, **params: Any) -> int:
            return served.post(endpoint, {'jsonrpc': '2.0', 'id': id, 'method': method, 'params': params}).status

        assert ask('initialize', 1, protocolVersion='2024-11-05', capabilities={}, clientInfo=CLIENT) == 202
        assert stream.message()['result']['protocolVersion'] == '2024-11-05'
        assert served.post(endpoint, {'jsonrpc': '2.0', 'method': 'notifications/initialized'}).status == 202
        assert ask('tools/call', 2, name='town_get') == 202
        assert stream.message()['result']['structuredContent']['name'] == 'test'
        assert ask('tools/call', 3, name='agent_wait', arguments=WAIT) == 202
        assert stream.message()['result']['structuredContent']['done'] is False
        assert ask('resources/subscribe', 4, uri='tinytown://backlog') == 202
        assert stream.message()['result'] == {}
        town.do('backlog.add', description='one')
        assert stream.message()['params'] == {'uri': 'tinytown://backlog'}
        assert served.post(endpoint, b'{', content_type='application/json').status == 400
        assert served.post(endpoint, {'jsonrpc': '2.0', 'id': 5, 'method': 7}).status == 202
        assert stream.message()['error']['code'] == codes.INVALID_REQUEST
    assert served.post('/messages?session_id=' + '0' * 32, {}).status == 404
    assert served.post('/messages', {}).status == 404


# ----------------------------------------------------------------------------------------------------- keys and scopes


def test_a_call_without_the_scope_is_403_names_the_scope_and_is_audited(directory: Path) -> None:
    place = make_town(directory)
    keys = {
        scope: place.tt_json('key', 'create', '--write', '--scopes', scope)['key']
        for scope in ('town.read', 'town.write', 'agent.manage', 'admin')
    }
    hall = place.hall('mcp-http')
    try:
        assert Http(hall).post('tools/list').status == 401
        assert Http(hall, Authorization='Bearer nonsense').post('server/discover').status == 401
        for scope, key in keys.items():
            client = Http(hall, Authorization=f'Bearer {key}')
            listed = {tool['name'] for tool in client.post('tools/list').json['result']['tools']}
            for op in OPERATIONS:
                name = op.name.replace('.', '_')
                allowed = scope in (op.scope, 'admin')
                assert (name in listed) == allowed
                arguments = {'no such argument': 1}
                reply = client.post('tools/call', {'name': name, 'arguments': arguments}, accept='application/json')
                assert reply.status == (200 if allowed else 403), (scope, op.name)
                if not allowed:
                    challenge = reply.headers['www-authenticate']
                    assert challenge == f'Bearer error="insufficient_scope", scope="{op.scope}"'
                    assert op.scope in reply.json['error']['message']
                else:
                    assert reply.json['result']['isError']
        audit = (place.root / '.tt' / 'audit.denied.jsonl').read_text()
        assert audit.count('insufficient-scope') == sum(
            scope not in (op.scope, 'admin') for scope in keys for op in OPERATIONS
        )
    finally:
        place.close()


def test_a_session_belongs_to_the_principal_that_created_it(directory: Path) -> None:
    place = make_town(directory)
    one, other = (place.tt_json('key', 'create', '--write', '--scopes', 'town.read')['key'] for _ in range(2))
    hall = place.hall('mcp-http')
    try:
        ours = Http(hall, LEGACY[0], Authorization=f'Bearer {one}', Mcp_Session_Id='a' * 32)
        assert ours.post('resources/subscribe', {'uri': 'tinytown://agents'}).status == 200
        theirs = Http(hall, LEGACY[0], Authorization=f'Bearer {other}', Mcp_Session_Id='a' * 32)
        assert theirs.post('ping').status == 404
    finally:
        place.close()


def test_read_only_lists_only_tools_that_read_and_refuses_the_others(town: Place) -> None:
    client = Http(town.hall('mcp-http', '--read-only'))
    assert all(each['annotations']['readOnlyHint'] for each in client.post('tools/list').json['result']['tools'])
    assert client.post('tools/call', {'name': 'backlog_add', 'arguments': {'description': 'x'}}).status == 403


def test_requests_and_tool_calls_share_a_rate_limit(directory: Path) -> None:
    limits = {'requests_per_minute': 4, 'burst_size': 4, 'mutating_requests_per_minute': 1}
    place = make_town(directory, townhall__rate_limit=limits)
    client = Http(place.hall('mcp-http'))
    try:
        assert [client.post('tools/list').status for _ in range(2)] == [200, 200]
        read = {'name': 'town_get'}
        assert [client.post('tools/call', read).status for _ in range(3)] == [200, 200, 429]
        limited = client.post('server/discover')
        assert limited.status == 429
        assert int(limited.headers['retry-after']) > 0
        change = {'name': 'backlog_add', 'arguments': {'description': 'x'}}
        replies = [client.post('tools/call', change) for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 429]
        assert int(replies[1].headers['retry-after']) > 0
        assert 'try again in' in replies[1].json['error']['message']
    finally:
        place.close()


def test_with_several_processes_there_are_subscriptions_but_no_sessions(place: Place) -> None:
    hall = place.hall('mcp-http', '--workers', '2')
    begun = Http(hall, LEGACY[0]).post('initialize', {'protocolVersion': LEGACY[0], 'capabilities': {}})
    assert begun.status == 200
    assert 'mcp-session-id' not in begun.headers
    assert begun.json['result']['capabilities']['resources'] == {}
    asked = Http(hall, LEGACY[0]).post('resources/subscribe', {'uri': 'tinytown://backlog'})
    assert 'a server with several worker processes has none' in asked.json['error']['message']
    assert hall.get('/sse').status == 404
    wanted = {'notifications': {'resourceSubscriptions': ['tinytown://backlog']}}
    with Http(hall).stream('subscriptions/listen', wanted) as stream:
        stream.message()
        place.do('backlog.add', description='one')
        assert stream.message()['params']['uri'] == 'tinytown://backlog'
