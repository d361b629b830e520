"""The MCP server over the conformance fixture's catalog: both generations, envelopes, errors, lists, cancellation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinytown.mcp import jsonrpc as codes
from tinytown.mcp.jsonrpc import LEGACY, META_PREFIX, MODERN, Fault
from tinytown.mcp.protocol import Session
from tinytown.model import ALL_SCOPES, Json, Principal

from ..mcp_fixture import Fixture, FixtureMcp

BY = Principal('tester', ALL_SCOPES)
META = {f'{META_PREFIX}protocolVersion': MODERN, f'{META_PREFIX}clientCapabilities': {}}


class Client:
    """A client that calls the MCP server directly. `notifications` are all messages that are not replies."""

    def __init__(self) -> None:
        self.notifications: list[Json] = []
        self.session = Session(self.notifications.append)
        self.fixture = Fixture()
        self.mcp = FixtureMcp(self.fixture)

    def say(self, message: Any) -> Json | None:
        """The reply to a message."""
        try:
            request = self.mcp.read(message, BY, self.notifications.append, self.session)
        except Fault as e:
            return codes.error_reply(e)
        if request is None:
            return None
        step = self.mcp.run(request)
        with pytest.raises(StopIteration) as end:
            next(step)
        reply: Json | None = end.value.value
        return reply

    def ask(self, method: str, params: Json | None = None, modern: bool = False, id: Any = 1) -> Json:
        params = dict(params or {})
        if modern:
            params['_meta'] = {**META, **params.get('_meta', {})}
        reply = self.say({'jsonrpc': '2.0', 'id': id, 'method': method, 'params': params})
        assert reply is not None
        return reply


@pytest.fixture
def client() -> Client:
    return Client()


def request(method: str, **params: Any) -> Json:
    return {'jsonrpc': '2.0', 'id': 2, 'method': method, 'params': params}


def code_of(reply: Json | None) -> int:
    assert reply is not None
    code: int = reply['error']['code']
    return code


@pytest.mark.parametrize(
    ('message', 'code', 'id'),
    [
        ([], codes.INVALID_REQUEST, None),
        ('text', codes.INVALID_REQUEST, None),
        ({}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '1.0', 'id': 1, 'method': 'ping'}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '2.0', 'id': None, 'method': 'ping'}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '2.0', 'id': True, 'method': 'ping'}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '2.0', 'id': 1.5, 'method': 'ping'}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '2.0', 'id': {}, 'method': 'ping'}, codes.INVALID_REQUEST, None),
        ({'jsonrpc': '2.0', 'id': 1}, codes.INVALID_REQUEST, 1),
        ({'jsonrpc': '2.0', 'id': 1, 'method': 7}, codes.INVALID_REQUEST, 1),
        ({'jsonrpc': '2.0', 'id': 1, 'method': 'ping', 'params': []}, codes.INVALID_PARAMS, 1),
        ({'jsonrpc': '2.0', 'id': 'a', 'method': 'nothing'}, codes.METHOD_NOT_FOUND, 'a'),
        (request('tools/call'), codes.INVALID_PARAMS, 2),
        (request('tools/call', name='no'), codes.INVALID_PARAMS, 2),
        (request('tools/call', name='test_simple_text', arguments=[]), codes.INVALID_PARAMS, 2),
        (request('logging/setLevel', level='loud'), codes.INVALID_PARAMS, 2),
        (request('initialize'), codes.INVALID_PARAMS, 2),
        (request('resources/read', uri=7), codes.INVALID_PARAMS, 2),
        (request('prompts/get', name='x', arguments={'a': 1}), codes.INVALID_PARAMS, 2),
    ],
)
def test_an_invalid_message_is_answered_with_the_right_code(client: Client, message: Any, code: int, id: Any) -> None:
    reply = client.say(message)
    assert code_of(reply) == code
    assert reply is not None
    assert reply.get('id') == id


@pytest.mark.parametrize(
    'message',
    [
        {'jsonrpc': '2.0', 'method': 'notifications/initialized'},
        {'jsonrpc': '2.0', 'method': 'notifications/whatever', 'params': {'x': 1}},
        {'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': 99}},
        {'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': {}}},
        {'jsonrpc': '2.0', 'id': 'stranger', 'result': {}},
        {'jsonrpc': '2.0', 'id': 4, 'error': {'code': 1, 'message': 'no'}},
    ],
)
def test_notifications_and_responses_are_never_answered(client: Client, message: Json) -> None:
    assert client.say(message) is None
    assert client.notifications == []


@pytest.mark.parametrize('wanted', [*LEGACY, MODERN, '1999-01-01'])
def test_initialize_echoes_a_legacy_revision_and_answers_others_with_the_newest(client: Client, wanted: str) -> None:
    result = client.ask('initialize', {'protocolVersion': wanted, 'capabilities': {}})['result']
    assert result['protocolVersion'] == (wanted if wanted in LEGACY else LEGACY[0])
    assert set(result) == {'protocolVersion', 'capabilities', 'serverInfo', 'instructions'}


def test_ping_and_lists_are_answered_before_initialize(client: Client) -> None:
    assert client.ask('ping')['result'] == {}
    assert client.ask('tools/list')['result']['tools']


@pytest.mark.parametrize('missing', sorted(META))
def test_a_modern_request_without_its_metadata_is_refused(client: Client, missing: str) -> None:
    meta = {name: value for name, value in META.items() if name != missing}
    reply = client.ask('server/discover', {'_meta': meta})
    assert code_of(reply) == codes.INVALID_PARAMS
    assert missing in reply['error']['message']


@pytest.mark.parametrize('version', ['2025-11-25', '2027-01-01', ''])
def test_a_request_of_an_unsupported_revision_gets_the_supported_ones(client: Client, version: str) -> None:
    reply = client.ask('tools/list', {'_meta': META | {f'{META_PREFIX}protocolVersion': version}})
    assert code_of(reply) == codes.UNSUPPORTED_VERSION
    assert reply['error']['data'] == {'supported': [MODERN], 'requested': version}


@pytest.mark.parametrize(
    'method',
    ['initialize', 'ping', 'logging/setLevel', 'resources/subscribe', 'resources/unsubscribe', 'unknown/method'],
)
def test_the_modern_protocol_lacks_the_legacy_methods(client: Client, method: str) -> None:
    assert code_of(client.ask(method, modern=True)) == codes.METHOD_NOT_FOUND


CALLS: list[tuple[str, Json]] = [
    ('tools/list', {}),
    ('resources/list', {}),
    ('resources/templates/list', {}),
    ('prompts/list', {}),
    ('resources/read', {'uri': 'test://static-text'}),
    ('tools/call', {'name': 'test_simple_text'}),
    ('prompts/get', {'name': 'test_simple_prompt'}),
    ('completion/complete', {'ref': {'type': 'ref/prompt', 'name': 'x'}, 'argument': {'name': 'a', 'value': 'par'}}),
]


@pytest.mark.parametrize(('method', 'params'), CALLS)
def test_the_generations_differ_only_in_the_envelope(client: Client, method: str, params: Json) -> None:
    legacy = client.ask(method, params)['result']
    modern = client.ask(method, params, modern=True)['result']
    assert modern.pop('resultType') == 'complete'
    assert modern.pop('_meta')[f'{META_PREFIX}serverInfo'] == client.fixture.info
    cacheable = method.endswith('/list') or method == 'resources/read'
    assert ('ttlMs' in modern, 'cacheScope' in modern) == (cacheable, cacheable)
    if cacheable:
        assert isinstance(modern.pop('ttlMs'), int)
        assert modern.pop('cacheScope') == 'private'
    assert modern == legacy


def test_discover_returns_revisions_capabilities_and_instructions(client: Client) -> None:
    result = client.ask('server/discover', modern=True)['result']
    assert result['supportedVersions'] == [MODERN]
    assert result['capabilities'] == client.fixture.capabilities
    assert result['instructions']
    assert result['cacheScope'] == 'public'


def test_an_unknown_resource_has_the_error_code_of_its_generation(client: Client) -> None:
    wanted = {'uri': 'test://nowhere'}
    legacy, modern = client.ask('resources/read', wanted), client.ask('resources/read', wanted, modern=True)
    assert (code_of(legacy), code_of(modern)) == (codes.RESOURCE_NOT_FOUND, codes.INVALID_PARAMS)
    assert legacy['error']['data'] == modern['error']['data'] == wanted


def test_the_pages_of_a_list_join_to_the_whole_list(client: Client) -> None:
    whole = client.ask('tools/list')['result']['tools']
    client.fixture.page = 7
    joined, cursor = [], None
    while True:
        result = client.ask('tools/list', {'cursor': cursor} if cursor else {})['result']
        assert 0 < len(result['tools']) <= 7
        joined += result['tools']
        cursor = result.get('nextCursor')
        if cursor is None:
            break
    assert joined == whole


@pytest.mark.parametrize('cursor', ['', 'x', '7', 'bzA=', 'bzk5OTk=', 'b-1', 7, [], 'é'])
def test_a_made_up_cursor_is_refused(client: Client, cursor: Any) -> None:
    assert code_of(client.ask('tools/list', {'cursor': cursor})) == codes.INVALID_PARAMS


@pytest.mark.parametrize(('token', 'count'), [('t', 3), (0, 3), (None, 0), (True, 0)])
def test_progress_is_sent_only_to_a_request_with_a_token(client: Client, token: Any, count: int) -> None:
    meta = {} if token is None else {'_meta': {'progressToken': token}}
    client.ask('tools/call', {'name': 'test_tool_with_progress', **meta})
    assert [message['params']['progress'] for message in client.notifications] == [0, 50, 100][:count]
    assert all(message['params']['progressToken'] == token for message in client.notifications)


def test_a_cancelled_request_gets_no_reply(client: Client) -> None:
    mcp_request = client.mcp.read(
        {'jsonrpc': '2.0', 'id': 5, 'method': 'tools/call', 'params': {'name': 'test_tool_with_progress'}},
        BY,
        client.notifications.append,
        client.session,
    )
    assert mcp_request
    client.session.running[5] = mcp_request
    assert client.say({'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': 5}}) is None
    with pytest.raises(StopIteration) as end:
        next(client.mcp.run(mcp_request))
    assert end.value.value is None
    assert client.notifications == []


def test_a_subscription_is_acknowledged_first_and_gets_only_what_it_asked_for(client: Client) -> None:
    wanted = {'notifications': {'toolsListChanged': True, 'promptsListChanged': False}}
    mcp_request = client.mcp.read(
        {'jsonrpc': '2.0', 'id': 'sub', 'method': 'subscriptions/listen', 'params': {**wanted, '_meta': META}},
        BY,
        client.notifications.append,
    )
    assert mcp_request
    assert client.mcp.run_mode(mcp_request) == 'listen'
    with pytest.raises(StopIteration) as end:
        next(client.mcp.run(mcp_request))
    assert end.value.value is None
    client.fixture.changed('prompts')
    client.fixture.changed('tools')
    mcp_request.cancel()
    client.fixture.changed('tools')
    tag = {'_meta': {f'{META_PREFIX}subscriptionId': 'sub'}}
    acknowledged = {'notifications': {'toolsListChanged': True}} | tag
    assert [(message['method'], message['params']) for message in client.notifications] == [
        ('notifications/subscriptions/acknowledged', acknowledged),
        ('notifications/tools/list_changed', tag),
    ]
    assert client.mcp.listen_result(mcp_request)['result']['_meta'][f'{META_PREFIX}subscriptionId'] == 'sub'


@pytest.mark.parametrize('uris', ['test://a', [7], ['test://a'] * 101])
def test_a_subscription_to_anything_but_uris_is_refused(client: Client, uris: Any) -> None:
    wanted = {'notifications': {'resourceSubscriptions': uris}}
    assert code_of(client.ask('subscriptions/listen', wanted, modern=True)) == codes.INVALID_PARAMS


def test_an_exception_is_an_internal_error_and_does_not_end_the_server(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = client.ask('prompts/get', {'name': 'test_prompt_with_arguments'})
    assert code_of(reply) == codes.INTERNAL_ERROR
    assert 'arg1' not in json.dumps(reply)
    log = capsys.readouterr().err
    assert f'mcp: request {reply["error"]["data"]["request_id"]} failed' in log
    assert 'KeyError' in log
    assert client.ask('ping')['result'] == {}


@pytest.mark.parametrize('data', [b'{', b'\xff', b'[' * 100_000, b'{"a": NaN}', b'9' * 5000, b''])
def test_invalid_json_is_a_parse_error(data: bytes) -> None:
    with pytest.raises(Fault) as error:
        codes.decode(data)
    assert error.value.code == codes.PARSE_ERROR


def test_an_encoded_message_is_one_line() -> None:
    data = codes.encode_message({'text': 'a\nb\u2028\ud800é'})
    assert b'\n' not in data
    assert json.loads(data)['text'].startswith('a\nb')
