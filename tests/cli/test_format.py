"""Text for people: columns align, states are coloured, and nothing in an answer steers the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from typing import Any

import pytest

from tinytown.cli.format import as_json, format_answer, table
from tinytown.console import clean
from tinytown.core.operations import OPERATIONS
from tinytown.model import CONDUCTOR_ID

from ..support import Place, environment

HOSTILE = 'a\x1b[2J\x1b]0;title\x07\x9b31m\x7f\r\x00\x08\u202e\u2066\u2028\udc80z'
AGENT = {
    'id': 'i', 'name': 'backend', 'nickname': None, 'role_id': None, 'cli': 'demo', 'state': 'Idle',
    'rounds_completed': 1, 'tasks_completed': 2, 'inbox_len': 3, 'urgent_len': 1, 'current_scope': None,
}  # fmt: skip
TASK = {'task_id': 't', 'description': 'd', 'tags': ['x'], 'state': 'running', 'agent_name': 'a', 'attempt': 1}


def test_columns_align_under_their_heads() -> None:
    rows = [['a', 'bb', 'c'], ['日本', 'é', 'd'], ['e\u0301', 'longer', 'x  \n y']]
    lines = table(('ONE', 'TWO', 'THREE'), rows, 'nothing').splitlines()
    assert len(lines) == 4
    starts = {columns(line[: re.search(r'\S+( y)?$', line).start()]) for line in lines}  # type: ignore[union-attr]
    assert len(starts) == 1
    assert not any(line.endswith(' ') for line in lines)
    assert table(('ONE',), [], 'nothing') == 'nothing'


def columns(text: str) -> int:
    """The number of terminal columns that a text takes."""
    wide = sum(unicodedata.east_asian_width(character) == 'W' for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


@pytest.mark.parametrize('text', ['x' * 500, '日' * 500, 'é' * 500])
def test_a_long_cell_is_cut_to_72_columns(text: str) -> None:
    cell = table(('TEXT',), [[text]], '').splitlines()[1]
    assert cell.endswith('…')
    assert 71 <= columns(cell) <= 72


def test_states_are_coloured_only_if_colour_is_wanted() -> None:
    answer = {'agents': [AGENT, AGENT | {'state': 'Error', 'name': 'b'}], 'count': 2}
    plain, coloured = format_answer('agent.list', answer, False), format_answer('agent.list', answer, True)
    assert re.sub(r'\x1b\[\d+m', '', coloured) == plain
    assert re.findall(r'\x1b\[(\d+)m(\w+)\x1b\[0m', coloured) == [('32', 'Idle'), ('31', 'Error')]
    assert '\x1b' not in plain


def example(schema: dict[str, Any], text: str) -> Any:
    """A value that fits a JSON Schema, with `text` for every string."""
    kind = schema.get('type')
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == 'object':
        properties = schema.get('properties', {'x': {'type': 'string'}})
        return {name: example(value, text) for name, value in properties.items()}
    if kind == 'array':
        return [example(schema['items'], text)] * 2
    return {'string': text, 'integer': 7, 'number': 1.5, 'boolean': True}.get(str(kind))


@pytest.mark.parametrize('op', OPERATIONS, ids=lambda op: op.name)
def test_hostile_text_in_an_answer_does_not_steer_the_terminal(op: Any) -> None:
    answer = example(op.output, HOSTILE)
    for shown in (
        format_answer(op.name, answer, False),
        re.sub(r'\x1b\[\d+m', '', format_answer(op.name, answer, True)),
    ):
        assert shown.strip()
        assert not [c for c in shown if c != '\n' and unicodedata.category(c)[0] == 'C'], repr(shown)
    text = as_json(answer, ascii_only=False)
    assert json.loads(text) == answer
    assert not [c for c in text if unicodedata.category(c)[0] == 'C']


@pytest.mark.parametrize('op', OPERATIONS, ids=lambda op: op.name)
def test_an_empty_answer_of_every_operation_is_shown_as_text(op: Any) -> None:
    empty = {
        name: None if 'null' in each['type'] else {'array': [], 'integer': 0, 'object': {}}.get(each['type'], 'x')
        for name, each in op.output['properties'].items()
        if name != 'next_cursor'
    }
    shown = format_answer(op.name, empty, False)
    assert shown
    assert '{' not in shown.replace('{}', '')
    assert ': .' not in shown


def test_clean_keeps_plain_text_and_replaces_control_characters() -> None:
    assert clean('Größe\t日本 🚀\n') == 'Größe\t日本 🚀\n'
    assert clean(HOSTILE).strip('az').count('\ufffd') == 12


def test_counts_agree_with_their_nouns() -> None:
    assert format_answer('agent.prune', {'removed': 1, 'agents': ['a']}, False) == 'Removed 1 agent: a.'
    assert format_answer('agent.prune', {'removed': 2, 'agents': ['a', 'b']}, False) == 'Removed 2 agents: a, b.'
    assert format_answer('town.reset', {'agents': 1, 'tasks': 0}, False) == 'Removed 1 agent and 0 tasks.'
    reclaimed = {'reclaimed': 1, 'destination': 'backlog'}
    assert format_answer('recovery.reclaim_tasks', reclaimed, False) == 'Moved 1 task to backlog.'


def test_an_inbox_shows_whole_messages_and_their_senders() -> None:
    sender = '1234abcd-0000-4000-8000-000000000000'
    messages = [
        {'id': 'm1', 'from': sender, 'type': 'query', 'summary': 'x' * 100},
        {'id': 'm2', 'from': CONDUCTOR_ID, 'type': 'info', 'summary': 'a\nb'},
    ]
    shown = format_answer('agent.inbox', {'agent': 'a', 'total': 2, 'urgent': 0, 'messages': messages}, False)
    assert shown == (
        'a: 2 messages, 0 urgent\n\nID  FROM       TYPE   TEXT\n'
        f'm1  1234abcd   query  {"x" * 100}\nm2  conductor  info   a b'
    )


def test_further_lines_of_a_text_are_indented_to_its_first() -> None:
    shown = format_answer('task.get', TASK | {'description': 'one\ntwo', 'result': None, 'dead_letter': False}, False)
    assert 'description  one\n             two\n' in shown
    assert 'dead_letter  no' in shown
    assert 'tags         x\n' in shown


@pytest.mark.parametrize(('no_color', 'terminal', 'colour'), [('', True, True), ('1', True, False), ('', False, False)])
def test_a_terminal_gets_colour_unless_no_color_is_set(
    place: Place, no_color: str, terminal: bool, colour: bool
) -> None:
    task = place.do('backlog.add', description='\x85\x9b2Jx')['task_id']
    reader, writer = pty.openpty() if terminal else os.pipe()
    env = environment(**({'NO_COLOR': no_color} if no_color else {}))
    argv = [sys.executable, '-m', 'tinytown.cli', 'task', 'list']
    done = subprocess.run(argv, cwd=place.root, env=env, stdout=writer, stderr=subprocess.PIPE, check=False)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b'')
    assert task in shown
    assert ('\x1b[33mpending\x1b[0m' in shown) == colour
    assert ('\x1b' in shown) == colour
    assert '\x9b' not in shown
