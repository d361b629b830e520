"""The MCP catalog of a town: tools, resources, prompts, completion, and error texts that tell a model what to do."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import jsonschema
import pytest

from tinytown.core.operations import BY_NAME, OPERATIONS
from tinytown.mcp import catalog, content
from tinytown.mcp.catalog import ADDITIVE, OPEN_WORLD, PRESETS, REPEATABLE, Catalog
from tinytown.mcp.jsonrpc import LEGACY
from tinytown.mcp.protocol import McpRequest, McpServer
from tinytown.model import ALL_SCOPES, MANAGE, READ, WRITE, Json, Principal, Scope
from tinytown.state.event_feed import Event, EventFeed

from ..support import OPERATOR, REPOSITORY, Place

GOLDEN = REPOSITORY / 'tests' / 'golden' / 'tools.json'
TOOLS = {tool['name']: tool for tool in catalog.tools().values()}


class Client:
    """A client that calls the MCP server directly, without a transport."""

    def __init__(self, place: Place, by: Principal = OPERATOR) -> None:
        self.place = place
        self.by = by
        self.catalog = Catalog(lambda: place.town, EventFeed(place.store), (), False)
        self.mcp = McpServer(self.catalog)

    def read(self, method: str, params: Json) -> McpRequest:
        message = {'jsonrpc': '2.0', 'id': 1, 'method': method, 'params': params}
        ask = self.mcp.read(message, self.by, lambda _message: None, revision=LEGACY[0])
        assert ask
        return ask

    def ask(self, method: str, **params: Any) -> Json:
        reply = self.place.store.run(self.mcp.run(self.read(method, params)))
        assert reply
        return reply

    def call(self, tool: str, **arguments: Any) -> Json:
        result: Json = self.ask('tools/call', name=tool, arguments=arguments)['result']
        return result

    def text(self, tool: str, **arguments: Any) -> str:
        """The text of a result that must be an error."""
        result = self.call(tool, **arguments)
        assert result['isError']
        assert 'structuredContent' not in result
        [content] = result['content']
        text: str = content['text']
        return text

    def complete(self, argument: str, value: str, **ref: str) -> list[str]:
        reply = self.ask('completion/complete', ref=ref, argument={'name': argument, 'value': value})
        values: list[str] = reply['result']['completion']['values']
        return values


@pytest.fixture
def client(ground: Place) -> Client:
    return Client(ground)


def test_the_tools_list_matches_the_golden_file() -> None:
    """To accept an intended change: GOLDEN=1 make test."""
    text = json.dumps(list(catalog.tools().values()), indent=1, ensure_ascii=False) + '\n'
    if os.environ.get('GOLDEN'):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_every_operation_is_a_tool_and_every_tool_of_the_contract_is_there() -> None:
    assert {op.name.replace('.', '_') for op in OPERATIONS} <= set(TOOLS)
    contract = """
        town.get_status agent.list agent.inbox agent.spawn agent.kill agent.restart agent.prune
        agent.interrupt agent.resume agent.close agent.wait agent.list_open agent.get_result
        task.list_pending task.assign task.complete message.send backlog.list backlog.add backlog.claim
        backlog.assign_all backlog.remove recovery.recover_agents recovery.reclaim_tasks
    """
    assert {name.replace('.', '_') for name in contract.split()} <= set(TOOLS)


@pytest.mark.parametrize('name', TOOLS)
def test_a_tool_definition_suits_every_client(name: str) -> None:
    tool = TOOLS[name]
    assert re.fullmatch(r'[a-zA-Z0-9_-]{1,64}', name)
    assert tool['title']
    assert len(tool['description']) > 20
    for schema in (tool['inputSchema'], tool['outputSchema']):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema['type'] == 'object'
        assert not {'anyOf', 'oneOf', 'allOf'} & set(schema)
    assert tool['inputSchema']['additionalProperties'] is False
    properties = tool['inputSchema']['properties'].values()
    assert all(schema.get('description') for schema in properties), 'an argument without a description'
    hints = {'readOnlyHint', 'destructiveHint', 'idempotentHint', 'openWorldHint'}
    assert {key: type(value) for key, value in tool['annotations'].items() if key != 'title'} == dict.fromkeys(
        hints, bool
    )
    assert not (tool['annotations']['readOnlyHint'] and tool['annotations']['destructiveHint'])


def test_hints_and_presets_name_existing_operations() -> None:
    changes = {op.name for op in OPERATIONS if op.changes}
    assert changes >= ADDITIVE
    assert changes >= REPEATABLE
    assert changes >= OPEN_WORLD
    assert all(name in BY_NAME and set(fixed) <= set(BY_NAME[name].parameters) for name, fixed in PRESETS.values())
    assert not set(PRESETS) & set(BY_NAME)


@pytest.mark.parametrize('scopes', [(), (READ,), (READ, WRITE), (MANAGE,), tuple(ALL_SCOPES)])
def test_the_lists_hold_what_the_caller_may_use(ground: Place, scopes: tuple[Scope, ...]) -> None:
    by = Principal('someone', frozenset(scopes))
    client = Client(ground, by)
    listed = {tool['name'] for tool in client.ask('tools/list')['result']['tools']}
    for op in OPERATIONS:
        assert (op.name.replace('.', '_') in listed) == by.may(op.scope)
    for method, key in (('resources/list', 'resources'), ('prompts/list', 'prompts')):
        assert bool(client.ask(method)['result'][key]) == by.may(READ)


def test_a_result_fits_its_schema_and_is_repeated_as_text(client: Client) -> None:
    task = client.call('backlog_add', description='one', tags=['x'])['structuredContent']['task_id']
    client.call('deadletter_list')
    calls: dict[str, Json] = {
        'town_get': {},
        'town_get_status': {'deep': True},
        'agent_list': {},
        'agent_list_open': {'limit': 3},
        'task_list': {},
        'task_get': {'task_id': task},
        'task_history': {'task_id': task},
        'backlog_list': {},
        'agent_inbox': {'agent': 'conductor'},
        'recovery_orphan_tasks': {},
        'agent_prune': {},
    }
    for tool, arguments in calls.items():
        result = client.call(tool, **arguments)
        assert not result['isError'], result
        assert json.loads(result['content'][0]['text']) == result['structuredContent']
        jsonschema.validate(result['structuredContent'], TOOLS[tool]['outputSchema'])


def test_a_dotted_name_calls_the_same_tool(client: Client) -> None:
    assert client.call('town.get') == client.call('town_get')
    assert client.ask('tools/call', name='town-get')['error']['message'].endswith(
        'similar names: town_get, town_reset, town_get_status'
    )


def add_agents(client: Client, *names: str) -> None:
    for name in names:
        head = json.dumps({'id': name * 36, 'name': name, 'role_id': 'reviewer' if name == 'r' else None})[:-1]
        head += ',"nickname":null,"parent_agent_id":null,"spawn_mode":"fresh","cli":"demo"'
        agent = f'{name * 8}-0000-4000-8000-000000000000'
        client.place.store.call(client.place.store.register(agent, name, head, 100, 0, agent))


def test_the_error_for_an_unknown_agent_lists_the_existing_ones(client: Client) -> None:
    text = client.text('task_assign', agent='worker-99', task='x')
    assert text == "No agent 'worker-99'. There are none: use agent_spawn."
    add_agents(client, 'a', 'b')
    text = client.text('task_assign', agent='worker-99', task='x')
    assert text == "No agent 'worker-99'. Agents: a, b. Use agent_list."


def test_the_error_for_an_unknown_agent_lists_at_most_twenty(client: Client) -> None:
    add_agents(client, *'0123456789abcdefghijklmnop')
    assert re.search(r'Agents: (\w, ){20}…\. Use agent_list\.', client.text('agent_get', agent='worker-99'))


@pytest.mark.parametrize(
    ('tool', 'arguments', 'expected'),
    [
        ('task_get', {'task_id': '0' * 8 + '-0000-4000-8000-' + '0' * 12}, 'Use task_list to find its task_id.'),
        ('task_get', {'task_id': 'x'}, "/task_id: 'x' does not fit: a UUID in lower case. task_get takes task_id"),
        (
            'task_assign',
            {},
            '/agent: agent is missing. /task: task is missing. task_assign takes agent, task; required',
        ),
        ('agent_list', {'limit': 0}, '/limit: 0 is not between 1 and 500.'),
        ('town_reset', {}, 'give force to do it. Use force only if the people who run the town asked for it.'),
        ('agent_kill', {'agent': 'conductor'}, 'mailbox for people'),
        ('agent_wait', {'agent': 'nobody', 'timeout': 99}, '/timeout: 99 is not between 0 and 25.'),
        ('deadletter_drop', {'id': '0' * 8 + '-0000-4000-8000-' + '0' * 12}, 'Use deadletter_list.'),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_to_do_next(
    client: Client, tool: str, arguments: Json, expected: str
) -> None:
    assert expected in client.text(tool, **arguments)


def test_an_argument_that_a_preset_fixes_is_refused(client: Client) -> None:
    assert client.ask('tools/call', name='agent_list_open', arguments={'open': False})['error']['code'] == -32602


def test_a_call_without_the_scope_is_refused(ground: Place) -> None:
    client = Client(ground, Principal('reader', frozenset({READ})))
    assert "backlog.add needs the scope town.write; 'reader' has town.read" in client.text(
        'backlog_add', description='x'
    )
    nobody = Client(ground, Principal('nobody', frozenset()))
    for method, params in (
        ('resources/read', {'uri': 'tinytown://agents'}),
        ('prompts/get', {'name': 'conductor.startup_context'}),
    ):
        ask = nobody.read(method, params)
        reply = ground.store.run(nobody.mcp.run(ask))
        assert reply
        assert 'town.read' in reply['error']['message']
        assert ask.refusal
        assert ask.refusal.code == 'insufficient-scope'


@pytest.mark.parametrize(
    ('uri', 'operation'),
    [
        ('tinytown://town/current', 'town.get_status'),
        ('tinytown://agents', 'agent.list'),
        ('tinytown://backlog', 'backlog.list'),
    ],
)
def test_a_resource_holds_the_answer_of_its_operation(client: Client, uri: str, operation: str) -> None:
    client.call('backlog_add', description='one')
    [content] = client.ask('resources/read', uri=uri)['result']['contents']
    assert (content['uri'], content['mimeType']) == (uri, 'application/json')
    assert json.loads(content['text']) == client.place.do(operation)


@pytest.mark.parametrize(
    'uri',
    [
        'tinytown://agents/nobody',
        'tinytown://tasks/x',
        'tinytown://agents/',
        'tinytown://agents/a/b',
        'file:///etc',
        '',
    ],
)
def test_the_error_for_an_unknown_resource_names_it(client: Client, uri: str) -> None:
    error = client.ask('resources/read', uri=uri)['error']
    assert (error['code'], error['data']) == (-32002, {'uri': uri})


def test_the_prompts_show_agents_tasks_and_the_matching_backlog(client: Client) -> None:
    add_agents(client, 'r')
    client.call('backlog_add', description='look at the\nchange', tags=['Reviewer'])
    client.call('backlog_add', description='write docs', tags=['docs'])
    reply = client.ask('prompts/get', name='agent.role_hint', arguments={'agent_name': 'r'})
    text = reply['result']['messages'][0]['content']['text']
    assert 'r is a reviewer of the town test.' in text
    assert 'look at the change' in text
    assert 'write docs' not in text
    tagged = {'agent_name': 'r', 'tags': 'docs, none'}
    reply = client.ask('prompts/get', name='agent.role_hint', arguments=tagged)
    assert 'write docs' in reply['result']['messages'][0]['content']['text']
    text = client.ask('prompts/get', name='conductor.startup_context')['result']['messages'][0]['content']['text']
    assert '- r (reviewer): Starting; 0 in its inbox; runs demo' in text
    assert 'write docs' in text
    assert '2 pending' in text


@pytest.mark.parametrize(
    ('name', 'arguments', 'expected'),
    [
        ('nothing', {}, 'there is no prompt'),
        ('agent.role_hint', {}, 'agent_name is missing'),
        ('agent.role_hint', {'agent_name': 'nobody'}, "No agent 'nobody'."),
    ],
)
def test_a_refused_prompt_says_why(client: Client, name: str, arguments: Json, expected: str) -> None:
    error = client.ask('prompts/get', name=name, arguments=arguments)['error']
    assert expected in error['message']


AGENT = {'type': 'ref/resource', 'uri': 'tinytown://agents/{agent_name}'}
TASK = {'type': 'ref/resource', 'uri': 'tinytown://tasks/{task_id}'}


def test_names_of_agents_and_ids_of_tasks_are_completed(client: Client) -> None:
    add_agents(client, 'a', 'b')
    task = client.call('backlog_add', description='one')['structuredContent']['task_id']
    prompt = {'type': 'ref/prompt', 'name': 'agent.role_hint'}
    for ref in (AGENT, prompt):
        assert client.complete('agent_name', '', **ref) == ['a', 'b']
        assert client.complete('agent_name', 'A', **ref) == ['a']
    assert client.complete('task_id', task[:3], **TASK) == [task]
    assert client.complete('task_id', 'zz', **TASK) == []
    assert client.complete('tags', '', **prompt) == []


@pytest.mark.parametrize('ref', [{}, {'type': 'ref/prompt', 'name': 'no'}, {'type': 'ref/resource', 'uri': 'file:///'}])
def test_completion_refuses_an_unknown_reference(client: Client, ref: Json) -> None:
    reply = client.ask('completion/complete', ref=ref, argument={'name': 'agent_name', 'value': ''})
    assert reply['error']['code'] == -32602


def event(**fields: str) -> Event:
    return Event('1-1', json.dumps({'id': '1-1', **fields}).encode())


def test_an_event_changes_the_resources_of_its_agent_and_task() -> None:
    always = {'tinytown://town/current', 'tinytown://agents'}
    assert content.changed_resources([event(type='agent.idle', agent_id='i', agent_name='a')]) == always | {
        'tinytown://agents/a',
        'tinytown://agents/i',
    }
    assert content.changed_resources([event(type='task.created', task_id='t')]) == always | {
        'tinytown://backlog',
        'tinytown://tasks/t',
    }
    assert content.changed_resources([event(type='town.reset')]) is None
    assert content.changed_resources([Event('1-1')]) is None


def test_a_catalog_without_a_feed_offers_no_subscriptions(ground: Place) -> None:
    without_feed = Catalog(lambda: ground.town, None, (), False)
    assert without_feed.capabilities['resources'] == {}
    assert without_feed.granted(OPERATOR, {'resourceSubscriptions': ['tinytown://agents']}) == {}
