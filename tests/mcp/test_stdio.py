"""`townhall mcp-stdio` as a child process of a client, over real pipes. Every message is validated by the schema."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinytown.mcp import jsonrpc as codes
from tinytown.mcp.jsonrpc import BATCHING, LEGACY, META_PREFIX, MODERN
from tinytown.model import new_id

from ..mcp_client import CLIENT, META, Stdio, since, stdio
from ..support import PATIENCE, REPOSITORY, Place, environment, make_town


@pytest.fixture
def client(ground: Place) -> Iterator[Stdio]:
    """A client of the town `ground`, with an agent `a`."""
    add_agent(ground, 'a')
    with stdio(ground.root) as started:
        yield started


@pytest.mark.parametrize('modern', [False, True])
def test_a_client_spawns_an_agent_assigns_a_task_and_is_notified(place: Place, modern: bool) -> None:
    with stdio(place.root) as client:
        if not modern:
            client.initialize()
        assert client.call('town_get_status', modern)['structuredContent']['agents'] == []
        spawned = client.call('agent.spawn', modern, name='backend')
        assert not spawned['isError'], spawned
        if modern:
            wanted = {'notifications': {'resourceSubscriptions': ['tinytown://tasks/none', 'tinytown://agents']}}
            client.start('subscriptions/listen', wanted, modern)
            client.await_notification('notifications/subscriptions/acknowledged')
        else:
            assert client.ask('resources/subscribe', {'uri': 'tinytown://agents'})['result'] == {}
        assigned = client.call('task_assign', modern, agent='backend', task='write a haiku')['structuredContent']
        updated = client.await_notification('notifications/resources/updated', uri='tinytown://agents')
        assert (f'{META_PREFIX}subscriptionId' in updated['params'].get('_meta', {})) == modern
        place.await_end(assigned['task_id'])
        read = client.ask('resources/read', {'uri': f'tinytown://tasks/{assigned["task_id"]}'}, modern)['result']
        [content] = read['contents']
        assert json.loads(content['text'])['result'] == 'demo: done: write a haiku'
        prompt = client.ask('prompts/get', {'name': 'conductor.startup_context'}, modern)['result']
        assert 'backend' in prompt['messages'][0]['content']['text']
        assert client.call('agent_kill', modern, agent='backend')['structuredContent']['status'] == 'stopped'
        status, rest = client.finish()
        assert status == 0
        assert all(json.loads(line) for line in rest.splitlines())


@pytest.mark.parametrize('revision', [*LEGACY, MODERN])
def test_every_answer_fits_the_schema_of_its_revision(client: Stdio, revision: str) -> None:
    """`Stdio.receive` validates each line."""
    modern = revision == MODERN
    if not modern:
        assert client.initialize(revision)['result']['protocolVersion'] == revision
        assert client.ask('ping')['result'] == {}
        assert client.ask('resources/subscribe', {'uri': 'tinytown://backlog'})['result'] == {}
        assert client.ask('resources/unsubscribe', {'uri': 'tinytown://backlog'})['result'] == {}
    else:
        assert client.ask('server/discover', modern=True)['result']['supportedVersions'] == [MODERN]
    for method in ('tools/list', 'resources/list', 'resources/templates/list', 'prompts/list'):
        assert 'result' in client.ask(method, modern=modern)
    assert 'result' in client.ask('resources/read', {'uri': 'tinytown://agents'}, modern)
    ref = {'type': 'ref/resource', 'uri': 'tinytown://agents/{agent_name}'}
    wanted = {'ref': ref, 'argument': {'name': 'agent_name', 'value': ''}}
    assert client.ask('completion/complete', wanted, modern)['result']['completion']['values'] == ['a']
    assert client.call('town_get', modern)['structuredContent']['name'] == 'test'
    assert client.call('agent_get', modern, agent='nobody')['isError']
    error = client.ask('resources/read', {'uri': 'tinytown://agents/nobody'}, modern)['error']
    assert (error['code'], error['data']) == (
        codes.INVALID_PARAMS if modern else codes.RESOURCE_NOT_FOUND,
        {'uri': 'tinytown://agents/nobody'},
    )


def test_invalid_lines_are_answered_and_do_not_end_the_server(client: Stdio) -> None:
    cases: list[tuple[bytes, int]] = [
        (b'{', codes.PARSE_ERROR),
        (b'\xff\xfe', codes.PARSE_ERROR),
        (b'[]', codes.INVALID_REQUEST),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', codes.INVALID_REQUEST),
        (b'7', codes.INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","id":1}', codes.INVALID_REQUEST),
        (b'x' * (1 << 21), codes.INVALID_REQUEST),
        (b'[' * 200_000, codes.PARSE_ERROR),
    ]
    for line, code in cases:
        client.send(b'', b'   ', line)
        assert client.receive()['error']['code'] == code, line[:40]
    assert client.ask('ping')['result'] == {}


@pytest.mark.parametrize(
    ('before', 'after', 'id'),
    [
        ('{"jsonrpc":"2.0","id":7,"method":"', '"}', 7),
        ('{"method":"', '","jsonrpc":"2.0","id":"x-7"}', 'x-7'),
        ('{"method":"', '", "id": 7, "jsonrpc": "2.0"}', 7),
        ('{"method":"\\"id\\":7,', '"}', None),
        ('"', '"', None),
    ],
)
def test_an_overlong_line_is_refused_with_its_id(client: Stdio, before: str, after: str, id: int | str | None) -> None:
    client.send((before + 'x' * 3_000_000 + after).encode())
    answer = client.receive()
    assert (answer.get('id'), 'longer than 1048576 bytes' in answer['error']['message']) == (id, True)
    assert client.ask('ping')['result'] == {}


@pytest.mark.parametrize('revision', LEGACY)
def test_an_array_of_messages_is_accepted_only_in_the_revision_that_has_them(client: Stdio, revision: str) -> None:
    client.initialize(revision)
    client.send(
        [
            {'jsonrpc': '2.0', 'id': 'a', 'method': 'ping'},
            {'jsonrpc': '2.0', 'method': 'notifications/initialized'},
            {'jsonrpc': '2.0', 'id': 'b', 'method': 'tools/call', 'params': {'name': 'town_get'}},
            {'jsonrpc': '2.0', 'id': 'c', 'method': 'nothing'},
            {'jsonrpc': '2.0', 'id': 'd', 'method': 'tools/list', 'params': {'_meta': META}},
            7,
        ]
    )
    reply = client.receive()
    if revision == BATCHING:
        assert [each.get('id') for each in reply] == ['a', 'b', 'c', 'd', None]
        assert reply[1]['result']['structuredContent']['name'] == 'test'
        assert reply[3]['error']['code'] == codes.INVALID_REQUEST
        client.send([{'jsonrpc': '2.0', 'method': 'notifications/initialized'}])  # gets no answer
    else:
        assert reply['error']['code'] == codes.INVALID_REQUEST
    assert client.ask('ping')['result'] == {}


def test_every_request_is_answered_before_the_server_ends_with_its_input(ground: Place) -> None:
    lines = [{'jsonrpc': '2.0', 'id': i, 'method': 'tools/call', 'params': {'name': 'town_get'}} for i in range(20)]
    done = run(ground.root, *lines)
    assert [json.loads(line)['id'] for line in done.stdout.splitlines()] == list(range(20))
    assert done.returncode == 0
    assert done.stderr == b''


def run(root: Path, *lines: Any, **more: str) -> subprocess.CompletedProcess[bytes]:
    """Writes all lines at once, without a final newline, and waits until the process ends."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / 'townhall.py'), 'mcp-stdio', '--town', str(root)],
        input='\n'.join(map(json.dumps, lines)).encode(),
        env=environment(**more),
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_the_client_configuration_in_the_readme_works_as_pasted(place: Place) -> None:
    [block] = re.findall(r'^```json\n(\{"mcpServers".*)\n```', (REPOSITORY / 'README.md').read_text(), re.M)
    server = json.loads(block)['mcpServers']['townhall']
    assert server['command'] == 'townhall'
    arguments = [str(place.root) if argument.startswith('/') else argument for argument in server['args']]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / 'townhall.py'), *arguments],
        input=b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"town_get"}}\n',
        env=environment(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)['result']['structuredContent']['name'] == 'test'


def test_without_a_town_the_server_ends_with_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, b'')
    assert b'tt init' in done.stderr
    assert done.stderr.count(b'\n') == 1


def test_sigterm_ends_the_server(ground: Place) -> None:
    with stdio(ground.root) as client:
        client.initialize()
        client.process.send_signal(signal.SIGTERM)
        assert client.process.wait(PATIENCE) == 0


def test_a_wait_reports_progress_and_does_not_block_other_requests(client: Stdio) -> None:
    client.initialize()
    wait = {'name': 'agent_wait', 'arguments': {'agent': 'a', 'timeout': 2}, '_meta': {'progressToken': 'p'}}
    number = client.start('tools/call', wait)
    assert client.ask('ping')['result'] == {}
    reply = client.answer_to(number)
    assert reply['result']['structuredContent']['done'] is False
    progress = [note['params'] for note in client.notifications if note['method'] == 'notifications/progress']
    assert progress
    assert [each['progress'] for each in progress] == sorted({each['progress'] for each in progress})
    assert progress[0]['progressToken'] == 'p'
    assert progress[0]['total'] == 2


def add_agent(place: Place, name: str) -> str:
    """Registers an agent without a process, which stays in the state Starting. Returns its id."""
    agent = new_id()
    record = {'id': agent, 'name': name, 'nickname': None, 'role_id': None, 'parent_agent_id': None}
    head = json.dumps(record | {'spawn_mode': 'fresh', 'cli': 'demo'})[:-1]
    place.store.call(place.store.register(agent, name, head, 10, 0, new_id()))
    return agent


def test_a_cancelled_wait_gets_no_reply(client: Stdio) -> None:
    client.initialize()
    began = time.monotonic()
    number = client.start('tools/call', {'name': 'agent_wait', 'arguments': {'agent': 'a', 'timeout': 25}})
    client.send({'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': number}})
    status, rest = client.finish()
    assert (status, rest) == (0, b'')
    assert since(began) < 20


def test_a_subscription_ends_when_it_is_cancelled(client: Stdio, ground: Place) -> None:
    wanted = {'notifications': {'resourceSubscriptions': ['tinytown://backlog'], 'toolsListChanged': True}}
    number = client.start('subscriptions/listen', wanted, modern=True)
    acknowledged = client.await_notification('notifications/subscriptions/acknowledged')
    assert acknowledged['params']['notifications'] == {'resourceSubscriptions': ['tinytown://backlog']}
    ground.do('backlog.add', description='one')
    client.await_notification('notifications/resources/updated', uri='tinytown://backlog')
    client.send({'jsonrpc': '2.0', 'method': 'notifications/cancelled', 'params': {'requestId': number}})
    client.ask('tools/list', modern=True)  # the server has read the cancellation before it answers this
    ground.do('backlog.add', description='two')
    status, rest = client.finish()
    assert (status, rest) == (0, b'')


def test_stray_output_goes_to_stderr(ground: Place) -> None:
    code = (
        'import os, sys; from pathlib import Path; from tinytown.mcp import stdio, catalog\n'
        'def tools(self, by):\n    print("stray"); os.system("echo child"); return []\n'
        'catalog.Catalog.tools = tools\n'
        'sys.exit(stdio.serve(Path(sys.argv[1]), {}))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(ground.root)],
        input=b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}\n',
        env=environment(),
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)['result'] == {'tools': []}
    assert sorted(done.stderr.split()) == [b'child', b'stray']


def test_read_only_lists_only_tools_that_read_and_refuses_the_others(ground: Place) -> None:
    with stdio(ground.root, '--read-only') as client:
        tools = client.ask('tools/list')['result']['tools']
        assert tools
        assert all(tool['annotations']['readOnlyHint'] for tool in tools)
        refused = client.call('backlog_add', description='x')
        assert refused['isError']
        assert 'town.write' in refused['content'][0]['text']


@pytest.mark.parametrize('tools', [['task.assign', 'agent_list'], ['task_assign', 'agent.list']])
def test_a_setting_limits_the_tools(directory: Path, tools: list[str]) -> None:
    place = make_town(directory, townhall__mcp={'tools': tools})
    with stdio(place.root) as client:
        offered = client.ask('tools/list')['result']['tools']
        assert sorted(tool['name'] for tool in offered) == ['agent_list', 'task_assign']
        assert client.ask('tools/call', {'name': 'backlog_add'})['error']['code'] == codes.INVALID_PARAMS


def test_a_setting_leaves_out_every_tool_that_changes_something(directory: Path) -> None:
    place = make_town(directory, townhall__mcp={'read_only': True})
    with stdio(place.root) as client:
        assert all(tool['annotations']['readOnlyHint'] for tool in client.ask('tools/list')['result']['tools'])
        assert client.ask('tools/call', {'name': 'backlog_add'})['error']['code'] == codes.INVALID_PARAMS


def test_an_unknown_tool_in_the_setting_is_a_usage_error(directory: Path) -> None:
    done = run(make_town(directory, townhall__mcp={'tools': ['task_asign']}).root)
    assert done.returncode == 2
    assert b"townhall.mcp.tools: there is no tool 'task_asign'; did you mean task_assign?" in done.stderr


def test_a_client_inside_a_run_acts_as_its_agent(ground: Place) -> None:
    agent = add_agent(ground, 'inner')
    with stdio(ground.root, TINYTOWN_AGENT_ID=agent, TINYTOWN_AGENT_NAME='inner') as client:
        sent = client.call('message_send', to='conductor', message='hello', kind='info')
        assert not sent['isError'], sent
    [message] = ground.do('agent.inbox', agent='conductor')['messages']
    assert message['from'] == agent
    assert ground.history()[-1]['by'] == 'inner'


def test_the_town_is_opened_by_the_first_request_that_needs_it(directory: Path) -> None:
    place = make_town(directory)
    with stdio(place.root) as client:
        client.initialize()
        assert client.ask('tools/list')['result']['tools']
        assert not (place.root / '.tt').exists()
        assert client.call('town_get')['structuredContent']['name'] == 'test'
        assert (place.root / '.tt').exists()
    place.close()


def test_discover_and_initialize_are_answered_in_any_order(client: Stdio) -> None:
    """A client of both generations tries discover first and then sends initialize."""
    params = {'_meta': META, 'clientInfo': CLIENT}
    assert 'result' in client.ask('server/discover', params, modern=True)
    assert client.initialize()['result']['protocolVersion'] == LEGACY[0]
    assert client.call('town_get', modern=True)['resultType'] == 'complete'
    assert 'resultType' not in client.call('town_get')


def test_a_worker_does_not_inherit_the_pipes_of_the_client(place: Place) -> None:
    with stdio(place.root) as client:
        client.call('agent_spawn', name='a')
        pid = place.do('agent.get', agent='a')['pid']
        assert client.process.stdout
        ours = os.fstat(client.process.stdout.fileno()).st_ino
        held = set()
        for file in Path(f'/proc/{pid}/fd').iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                held.add(file.stat().st_ino)
        assert held
        assert ours not in held


def test_the_server_ends_when_its_output_is_closed(ground: Place) -> None:
    with stdio(ground.root) as client:
        client.initialize()
        assert client.process.stdout
        client.process.stdout.close()
        client.send(*[{'jsonrpc': '2.0', 'id': i, 'method': 'tools/list'} for i in range(2)])
        assert client.process.wait(PATIENCE) == 0
        assert client.process.stderr
        assert client.process.stderr.read() == b''
