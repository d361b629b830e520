"""Real MCP clients, each with packages of its own, over each transport that it has: one round with the demo agent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..support import REPOSITORY, Place, environment
from . import tools

SERVER = (sys.executable, str(REPOSITORY / 'townhall.py'))
CLIENTS = REPOSITORY / 'tests' / 'clients'
MODES = {'auto': '2026-07-28', 'legacy': '2025-11-25', '2026-07-28': '2026-07-28'}


def run(*command: str, home: Path) -> str:
    """What a client prints. It must end well."""
    done = subprocess.run(
        command, env=environment(HOME=str(home)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def place_of(place: Place, transport: str) -> str:
    """Where a client finds a town over a transport."""
    if transport == 'stdio':
        return str(place.root)
    return f'http://127.0.0.1:{place.hall("mcp-http").port}/{"sse" if transport == "sse" else "mcp"}'


def check(found: dict[str, Any], revision: str) -> None:
    assert found['revision'] == revision
    assert found['tools'] > 30
    assert (found['state'], found['agent'], found['killed']) == ('completed', 'backend', 'stopped')
    assert 'backend is an agent of the town test' in found['prompt']
    assert found['refused'] == "No agent 'worker-99'. Agents: backend. Use agent_list."


@pytest.mark.parametrize(
    ('transport', 'mode'),
    [*((transport, mode) for transport in ('stdio', 'http') for mode in MODES), ('sse', 'legacy')],
)
def test_the_official_sdk_version_2(place: Place, tmp_path: Path, transport: str, mode: str) -> None:
    binary = tools.python('mcp2', 'mcp >= 2.3, < 3')
    where = place_of(place, transport)
    found = json.loads(run(str(binary), str(CLIENTS / 'mcp2.py'), transport, where, mode, *SERVER, home=tmp_path))
    check(found, MODES[mode])
    assert found['progress']
    assert found.get('changed') == ('ResourceUpdated' if MODES[mode] == '2026-07-28' else None)


@pytest.mark.parametrize('transport', ['stdio', 'http', 'sse'])
def test_the_official_sdk_version_1(place: Place, tmp_path: Path, transport: str) -> None:
    binary = tools.python('mcp1', 'mcp == 1.30.*')
    where = place_of(place, transport)
    found = json.loads(run(str(binary), str(CLIENTS / 'mcp1.py'), transport, where, *SERVER, home=tmp_path))
    check(found, '2025-11-25')
    assert found['updated'], 'it was told that the agents have changed'


def test_fastmcp(place: Place, tmp_path: Path) -> None:
    command = str(tools.python('fastmcp', 'fastmcp >= 4, < 5').with_name('fastmcp'))
    url = place_of(place, 'http')

    def call(target: str, *arguments: str) -> Any:
        return json.loads(run(command, 'call', url, target, *arguments, '--json', home=tmp_path))

    assert len(json.loads(run(command, 'list', url, '--json', home=tmp_path))['tools']) > 30
    call('agent_spawn', 'name=backend')
    task = call('task_assign', 'agent=backend', 'task=write a haiku')['structured_content']['task_id']
    place.await_end(task)
    assert call('task_get', f'task_id={task}')['structured_content']['state'] == 'completed'
    assert json.loads(call('tinytown://agents/backend')[0]['text'])['tasks_completed'] == 1
    prompt = call('agent.role_hint', '--prompt', 'agent_name=backend')
    assert 'backend is an agent' in prompt['messages'][0]['content']['text']


@pytest.mark.parametrize('transport', ['stdio', 'http'])
def test_inspector_finds_no_fault_with_the_tools(place: Place, tmp_path: Path, transport: str) -> None:
    launcher = tools.npm('@modelcontextprotocol/inspector', '2.12.0') / 'clients' / 'launcher' / 'build' / 'index.js'
    server = (*SERVER, 'mcp-stdio', '--town', str(place.root))
    target = server if transport == 'stdio' else (place_of(place, 'http'), '--transport', 'http')

    def inspect(method: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = (str(tools.node()), str(launcher), '--cli', *target, '--method', method, *arguments)
        env = environment(HOME=str(tmp_path))
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)

    linted = inspect('tools/list', '--strict')
    assert len(json.loads(linted.stdout)['tools']) > 30
    assert 'warning' not in linted.stderr.lower().replace('0 warnings', ''), linted.stderr
    inspect('tools/call', '--tool-name', 'agent_spawn', '--tool-arg', 'name=backend')
    called = inspect('tools/call', '--tool-name', 'task_assign', '--tool-arg', 'agent=backend', 'task=write a haiku')
    place.await_end(json.loads(called.stdout)['structuredContent']['task_id'])
    read = json.loads(inspect('resources/read', '--uri', 'tinytown://agents/backend').stdout)
    assert json.loads(read['contents'][0]['text'])['tasks_completed'] == 1
    prompt = inspect('prompts/get', '--prompt-name', 'conductor.startup_context')
    assert 'backend' in json.loads(prompt.stdout)['messages'][0]['content']['text']
