"""What `tt` shows a person: answers as aligned text. Pure: an answer in, text out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

Answer = dict[str, Any]

_COLOURS: Final = {
    'Idle': 32, 'Working': 36, 'Starting': 36, 'Paused': 33, 'Draining': 33, 'Error': 31, 'Stopped': 2, 'Cold': 2,
    'completed': 32, 'running': 36, 'assigned': 36, 'failed': 31, 'cancelled': 2, 'pending': 33,
}  # fmt: skip
_ANSI: Final = re.compile(r'\x1b\[[0-9]*m')
_CONTROLS: Final = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f]')


def render(operation: str, answer: Answer, colour: bool) -> str:
    """The text for an operation's answer; colour marks states."""
    text = _RENDERERS.get(operation, _fields)(answer)
    return text if colour else _ANSI.sub('', text)


def clean(text: str) -> str:
    """A text from elsewhere, without what would steer a terminal."""
    return _CONTROLS.sub('\ufffd', text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    """Rows under a head, columns aligned; `empty` if there are none."""
    if not rows:
        return empty
    cells = [[_one_line(cell) for cell in row] for row in rows]
    lines = [list(head), *cells]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(head))]
    return '\n'.join(
        '  '.join(cell + ' ' * (widths[i] - _width(cell)) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def _width(text: str) -> int:
    return len(_ANSI.sub('', text))


def _one_line(text: str, most: int = 72) -> str:
    line = ' '.join(text.split())
    return line if _width(line) <= most else line[: most - 1] + '…'


def state(name: str) -> str:
    code = _COLOURS.get(name)
    return f'\x1b[{code}m{name}\x1b[0m' if code else name


def _fields(answer: Answer) -> str:
    width = max((len(name) for name in answer), default=0)
    return '\n'.join(f'{name.ljust(width)}  {_value(name, value)}' for name, value in answer.items())


def _value(name: str, value: Any) -> str:
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, str):
        return state(value) if name == 'state' else clean(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ', '.join(map(clean, value)) or '-'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def _agents(answer: Answer) -> str:
    rows = [
        [
            agent['name'],
            state(agent['state']),
            agent['cli'],
            agent['role_id'] or '-',
            str(agent['rounds_completed']),
            str(agent['tasks_completed']),
            f'{agent["inbox_len"]}' + (f' +{agent["urgent_len"]} urgent' if agent['urgent_len'] else ''),
            clean(agent['current_scope'] or '-'),
        ]
        for agent in answer['agents']
    ]
    head = ('AGENT', 'STATE', 'CLI', 'ROLE', 'ROUNDS', 'DONE', 'INBOX', 'NOW')
    return table(head, rows, 'No agents. Start one:  tt spawn NAME')


def _status(answer: Answer) -> str:
    parts = [f'{clean(answer["name"])}  {clean(answer["root"])}  {answer["redis_url"]}', _agents(answer)]
    if 'tasks' in answer:
        counts = ', '.join(f'{count} {name}' for name, count in answer['tasks'].items())
        parts.append(f'Tasks: {counts}')
        events = [
            [e['at'], e['type'], e.get('agent_name', '-'), e.get('task_id', '-')] for e in answer['recent_events']
        ]
        parts.append(table(('AT', 'EVENT', 'AGENT', 'TASK'), events, 'No events.'))
    return '\n\n'.join(parts)


def _tasks(answer: Answer) -> str:
    rows = [
        [t['task_id'], state(t['state']), t['agent_name'] or '-', str(t['attempt']), clean(t['description'])]
        for t in answer['tasks']
    ]
    return table(('TASK', 'STATE', 'AGENT', 'ATTEMPT', 'DESCRIPTION'), rows, 'No tasks.')


def _pending(answer: Answer) -> str:
    rows = [[t['task_id'], t['agent_name'], clean(t['description'])] for t in answer['tasks']]
    return table(('TASK', 'AGENT', 'DESCRIPTION'), rows, 'No task waits in an inbox.')


def _backlog(answer: Answer) -> str:
    rows = [[t['task_id'], ','.join(map(clean, t['tags'])) or '-', clean(t['description'])] for t in answer['backlog']]
    return table(('TASK', 'TAGS', 'DESCRIPTION'), rows, 'The backlog is empty.')


def _inbox(answer: Answer) -> str:
    said = f'{answer["agent"]}: {answer["total"]} messages, {answer["urgent"]} urgent'
    rows = [[m['id'], m['type'], clean(m['summary'])] for m in answer['messages']]
    return f'{said}\n\n{table(("ID", "TYPE", "TEXT"), rows, "")}' if rows else said


def _orphans(answer: Answer) -> str:
    rows = [[o['task_id'], o['state'], o['assigned_to'], o['reason']] for o in answer['orphans']]
    return table(('TASK', 'STATE', 'AGENT', 'REASON'), rows, 'No orphaned tasks.')


def _said(template: str) -> Callable[[Answer], str]:
    """A renderer that fills an answer into a sentence."""
    return lambda answer: template.format(**{name: _value('', value) for name, value in answer.items()})


def _finished(answer: Answer) -> str:
    return f'Task {answer["task_id"]} is {state(answer["state"])}.'


def _reclaimed(answer: Answer) -> str:
    return f'{answer["reclaimed"]} tasks moved to {answer["destination"]}.'


_RENDERERS: Final[dict[str, Callable[[Answer], str]]] = {
    'town.get_status': _status,
    'town.reset': _said('Removed {agents} agents and {tasks} tasks.'),
    'agent.list': _agents,
    'agent.spawn': _said('{name} runs {cli} ({agent_id}).'),
    'agent.kill': _said('{agent} is {status}.'),
    'agent.restart': _said('{agent} is {status}.'),
    'agent.interrupt': _said('{agent} is {status}.'),
    'agent.resume': _said('{agent} is {status}.'),
    'agent.close': _said('{agent} is {status}.'),
    'agent.wait': _said('{agent} is {state}.'),
    'agent.prune': _said('Removed {removed} agents: {agents}.'),
    'agent.inbox': _inbox,
    'agent.ack': _said('{removed} messages cleared from the mailbox of {agent}.'),
    'task.assign': _said('Task {task_id} waits in the inbox of {agent_name}.'),
    'task.list_pending': _pending,
    'task.list': _tasks,
    'task.complete': _finished,
    'task.fail': _finished,
    'task.cancel': _finished,
    'task.retry': _finished,
    'backlog.list': _backlog,
    'backlog.add': _said('Task {task_id} is in the backlog.'),
    'backlog.claim': _said('Task {task_id} waits in the inbox of {agent_name}.'),
    'backlog.assign_all': _said('{assigned} tasks assigned.'),
    'backlog.remove': _said('Task {task_id} is removed.'),
    'message.send': _said('Message {message_id} sent to {to_agent}.'),
    'recovery.recover_agents': _said('{checked} agents checked, {recovered} recovered: {agents}.'),
    'recovery.reclaim_tasks': _reclaimed,
    'recovery.orphan_tasks': _orphans,
}
