"""Renders answers as text for people: aligned tables, sentences, colours. Functions take an answer and return text.

Start with `format_answer`; `_RENDERERS` at the end maps each operation to its renderer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..console import UNSAFE, clean
from ..core.agent_logs import MAX_PAGE_BYTES
from ..host.processes import this_host
from ..model import CONDUCTOR_ID

JsonObject = dict[str, Any]

_COLOURS: Final = {
    'Idle': 32, 'Working': 36, 'Starting': 36, 'Paused': 33, 'Draining': 33, 'Error': 31, 'Stopped': 2, 'Cold': 2,
    'completed': 32, 'running': 36, 'assigned': 36, 'failed': 31, 'cancelled': 2, 'pending': 33,
}  # fmt: skip
_ANSI: Final = re.compile(r'\x1b\[[0-9]*m')
_PIECES: Final = re.compile(r'\x1b\[[0-9]*m|.', re.S)  # colour codes and characters
_MAX_CELL: Final = 72  # columns


def format_answer(operation: str, answer: JsonObject, colour: bool) -> str:
    """The text for the answer of an operation. With `colour`, states are coloured."""
    text = _RENDERERS.get(operation, _fields)(cleaned(answer))
    if answer.get('next_cursor'):
        text += f'\n\nThere is more; add  --cursor {clean(answer["next_cursor"])}'
    return text if colour else _ANSI.sub('', text)


def cleaned(value: Any) -> Any:
    """An answer whose strings hold nothing that steers a terminal (`console.clean`)."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return {name: cleaned(item) for name, item in value.items()} if isinstance(value, dict) else value


def as_json(answer: Any, ascii_only: bool) -> str:
    """An answer as JSON on one line. Characters that would steer a terminal are escaped."""
    text = json.dumps(answer, ensure_ascii=ascii_only)
    return UNSAFE.sub(lambda match: f'\\u{ord(match.group()):04x}', text)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 task`, `2 tasks`."""
    return f'{number} {noun}' + ('' if number == 1 else 's')


def table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str, whole: bool = False) -> str:
    """Rows in aligned columns under a head; `empty` if there are no rows. Long cells are cut, unless `whole`."""
    if not rows:
        return empty
    lines = [list(head), *([_one_line(cell, whole) for cell in row] for row in rows)]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(head))]
    return '\n'.join(
        '  '.join(cell + ' ' * (widths[i] - _width(cell)) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def _width(text: str) -> int:
    """The number of terminal columns that a text takes."""
    text = _ANSI.sub('', text)
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ('Mn', 'Me', 'Cf'):
        return 0
    return 2 if unicodedata.east_asian_width(character) in 'WF' else 1


def _one_line(text: str, whole: bool = False) -> str:
    line = ' '.join(text.split())
    if whole or _width(line) <= _MAX_CELL:
        return line
    line = line[:_MAX_CELL]
    while _width(line) >= _MAX_CELL:
        line = line[:-1]
    return line + '…'


def cut(text: str, columns: int, pad: bool = False) -> str:
    """A line cut to `columns`, and with `pad` filled up with spaces. Colour codes take no columns."""
    if (width := _width(text)) <= columns:
        return text + ' ' * (columns - width) if pad else text
    kept, room, codes = [], columns - 1, False
    for piece in _PIECES.findall(text):
        width = _width(piece)
        if width > room:
            break
        kept.append(piece)
        room -= width
        codes |= piece[0] == '\x1b'
    return ''.join(kept) + ('\x1b[0m' if codes else '') + '…' + (' ' * room if pad else '')


def state(name: str) -> str:
    """The name of a state in its colour."""
    code = _COLOURS.get(name)
    return f'\x1b[{code}m{name}\x1b[0m' if code else name


def _fields(answer: JsonObject) -> str:
    width = max((len(name) for name in answer), default=0)
    indent = '\n' + ' ' * (width + 2)
    return '\n'.join(
        f'{name.ljust(width)}  {_value(name, value)}'.replace('\n', indent).rstrip() for name, value in answer.items()
    )


def _value(name: str, value: Any) -> str:
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, str):
        return state(value) if name == 'state' else value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ', '.join(value) or '-'
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def elsewhere(agent: JsonObject) -> str:
    """The host that an agent runs on; '' if that is this host."""
    host: str = agent.get('host') or ''
    return host if host != this_host() else ''


def _agents(answer: JsonObject) -> str:
    hosts = any(map(elsewhere, answer['agents']))
    rows = [
        [
            agent['name'],
            state(agent['state']),
            *([agent['host'] or '-'] if hosts else []),
            agent['cli'],
            agent['role_id'] or '-',
            str(agent['rounds_completed']),
            str(agent['tasks_completed']),
            str(agent['inbox_len']) + (f' +{agent["urgent_len"]} urgent' if agent['urgent_len'] else ''),
            agent['current_scope'] or _hindrance(agent) or '-',
        ]
        for agent in answer['agents']
    ]
    head = ('AGENT', 'STATE', *(['HOST'] if hosts else []), 'CLI', 'ROLE', 'ROUNDS', 'DONE', 'INBOX', 'NOW')
    return table(head, rows, 'No agents. Start one:  tt spawn NAME')


def _hindrance(agent: JsonObject) -> str:
    """Why an agent is in Error, or why and until when it has paused itself; '' for neither."""
    note, until = agent.get('trouble') or '', agent.get('resumes_at')
    return f'until {until[11:16]} UTC: {note}' if until else note


def _hosts(answer: JsonObject) -> str:
    rows = [
        [
            h['host'] + (' (this one)' if h['here'] else ''),
            '\x1b[31msilent\x1b[0m' if h['silent'] else 'live',
            str(h['townhalls']),
            str(h['agents']),
            h['heard_at'] or 'never',
            ', '.join(h['urls']) or '-',
        ]
        for h in answer['hosts']
    ]
    head = ('HOST', 'STATE', 'TOWNHALLS', 'AGENTS', 'LAST SEEN', 'URL')
    return table(head, rows, 'No townhall has been seen. Start one:  tt start')


def _status(answer: JsonObject) -> str:
    parts = [f'{answer["name"]}  {answer["root"]}  {answer["redis_url"]}', _agents(answer)]
    if 'tasks' in answer:
        parts.append('Tasks: ' + ', '.join(f'{count} {name}' for name, count in answer['tasks'].items()))
        parts.append(_event_table(answer['recent_events']))
    return '\n\n'.join(parts)


def _event_table(events: Sequence[JsonObject]) -> str:
    rows = [
        [e['at'], e['type'], e.get('agent_name') or '-', e.get('task_id') or '-', e.get('why') or '-'] for e in events
    ]
    return table(('AT', 'EVENT', 'AGENT', 'TASK', 'WHY'), rows, 'No events.')


def _events(answer: JsonObject) -> str:
    text = _event_table(answer['events'])
    if answer.get('gap'):
        text = f'Some earlier events are no longer kept.\n\n{text}'
    return f'{text}\n\nThere is more; add  --after {answer["next_after"]}' if answer.get('more') else text


def event_line(event: JsonObject) -> str:
    """The line of an event, or of a gap between events, in a feed."""
    if event['type'] == 'gap':
        return '--- some events are no longer kept ---'
    event = cleaned(event)
    agent, task = event.get('agent_name') or '-', event.get('task_id') or event.get('message_id') or '-'
    why = f'  {_one_line(event["why"])}' if event.get('why') else ''
    return f'{event["at"]}  {event["type"]:20}  {agent:16}  {task}{why}'


def _log_text(answer: JsonObject) -> str:
    text: str = answer['text']
    return text.rstrip('\n') or f'{answer["agent"]} has printed nothing yet.'


def _tasks(answer: JsonObject) -> str:
    rows = [
        [t['task_id'], state(t['state']), t['agent_name'] or '-', str(t['attempt']), t['description']]
        for t in answer['tasks']
    ]
    return table(('TASK', 'STATE', 'AGENT', 'ATTEMPT', 'DESCRIPTION'), rows, 'No tasks.')


def _pending(answer: JsonObject) -> str:
    rows = [[t['task_id'], t['agent_name'], t['description']] for t in answer['tasks']]
    return table(('TASK', 'AGENT', 'DESCRIPTION'), rows, 'No task waits in an inbox.')


def _backlog(answer: JsonObject) -> str:
    rows = [[t['task_id'], ', '.join(t['tags']) or '-', t['description']] for t in answer['backlog']]
    return table(('TASK', 'TAGS', 'DESCRIPTION'), rows, 'The backlog is empty.')


def _inbox(answer: JsonObject) -> str:
    summary = f'{answer["agent"]}: {counted(answer["total"], "message")}, {answer["urgent"]} urgent'
    rows = [[m['id'], _sender(m['from']), m['type'], m['summary']] for m in answer['messages']]
    return f'{summary}\n\n{table(("ID", "FROM", "TYPE", "TEXT"), rows, "", whole=True)}' if rows else summary


def _sender(agent_id: str) -> str:
    """A short name of a sender. Commands take the start of an agent's id like the whole id."""
    return 'conductor' if agent_id in (CONDUCTOR_ID, '') else agent_id[:8]


def _history(answer: JsonObject) -> str:
    rows = [
        [
            e['at'],
            _took(e.get('secs')),
            e['type'],
            e.get('agent_name') or '-',
            str(e.get('attempt', '-')),
            e.get('by', '-'),
            e.get('why', '-'),
        ]
        for e in answer['history']
    ]
    changes = table(('AT', 'AFTER', 'CHANGE', 'AGENT', 'ATTEMPT', 'BY', 'WHY'), rows, 'No history.')
    runs = [
        [str(r['attempt']), r['agent_name'], _took(r['secs']), state(r['outcome']), _log(r)] for r in answer['attempts']
    ]
    return f'{changes}\n\n{table(("ATTEMPT", "AGENT", "TOOK", "OUTCOME", "OUTPUT"), runs, "")}'.strip()


def _took(seconds: float | None) -> str:
    """A short text for a duration."""
    if seconds is None:
        return '-'
    if seconds < 60:
        return f'{seconds:.3g} s' if seconds < 10 else f'{seconds:.0f} s'
    minutes, rest = divmod(int(seconds), 60)
    return f'{minutes} min {rest} s' if minutes < 60 else f'{minutes // 60} h {minutes % 60} min'


def _log(run: JsonObject) -> str:
    """The command that shows the output of an attempt."""
    if run['log_from'] is None:
        return '-'
    length = '' if run['log_to'] is None else f' --limit {min(max(run["log_to"] - run["log_from"], 1), MAX_PAGE_BYTES)}'
    return f'tt logs {run["agent_name"]} --offset {run["log_from"]}{length}'


def _dead_letters(answer: JsonObject) -> str:
    rows = [
        [d['id'], d['kind'], d['agent_name'] or '-', str(d['attempts']), d['why'] or '-', d['text']]
        for d in answer['dead_letters']
    ]
    return table(('ID', 'KIND', 'AGENT', 'ATTEMPTS', 'WHY', 'TEXT'), rows, 'No dead letters.')


def _orphans(answer: JsonObject) -> str:
    rows = [[o['task_id'], o['state'], o['assigned_to'], o['reason']] for o in answer['orphans']]
    done = {'list': '', 'to_backlog': 'returned to the backlog', 'cancel': 'cancelled', 'delete': 'deleted'}
    result = f'\n\n{counted(answer["count"], "task")} {how}.' if rows and (how := done.get(answer['action'])) else ''
    return table(('TASK', 'STATE', 'AGENT', 'REASON'), rows, 'No orphaned tasks.') + result


def _result(answer: JsonObject) -> str:
    return _fields(answer['task']) if answer['task'] else f'{answer["agent"]} has finished no task yet.'


def _sentence(template: str) -> Callable[[JsonObject], str]:
    """A renderer that fills the fields of an answer into a template."""
    return lambda answer: template.format(**{name: _value(name, value) for name, value in answer.items()})


def _counts(template: str, **nouns: str) -> Callable[[JsonObject], str]:
    """A renderer that fills counts into a template, each with its noun, and appends the names in `agents`, if any."""

    def fill(answer: JsonObject) -> str:
        text = template.format(**answer | {name: counted(answer[name], noun) for name, noun in nouns.items()})
        names = answer.get('agents')
        return f'{text}: {", ".join(names)}.' if isinstance(names, list) and names else f'{text}.'

    return fill


def _pruned(answer: JsonObject) -> str:
    text = _counts('Removed {removed}', removed='agent')(answer)
    left = answer.get('left')
    return f'{text}\nNot removed, because their hosts are silent (tt hosts): {", ".join(left)}.' if left else text


_RENDERERS: Final[dict[str, Callable[[JsonObject], str]]] = {
    'town.get_status': _status,
    'town.list_hosts': _hosts,
    'town.reset': _counts('Removed {agents} and {tasks}', agents='agent', tasks='task'),
    'agent.list': _agents,
    'agent.spawn': _sentence('{name} runs {cli} ({agent_id}).'),
    'agent.get_result': _result,
    'agent.kill': _sentence('{agent} is {status}.'),
    'agent.restart': _sentence('{agent} is {status}.'),
    'agent.interrupt': _sentence('{agent} is {status}.'),
    'agent.resume': _sentence('{agent} is {status}.'),
    'agent.close': _sentence('{agent} is {status}.'),
    'agent.wait': _sentence('{agent} is {state}.'),
    'agent.prune': _pruned,
    'agent.inbox': _inbox,
    'agent.ack': _counts('Cleared {removed} from the mailbox of {agent}', removed='message'),
    'task.assign': _sentence('Task {task_id} waits in the inbox of {agent_name}.'),
    'task.list_pending': _pending,
    'task.list': _tasks,
    'task.complete': _sentence('Task {task_id} is {state}.'),
    'task.fail': _sentence('Task {task_id} is {state}.'),
    'task.cancel': _sentence('Task {task_id} is {state}.'),
    'task.retry': _sentence('Task {task_id} is {state}.'),
    'task.release': _sentence('Task {task_id} is {state}.'),
    'task.history': _history,
    'deadletter.list': _dead_letters,
    'deadletter.retry': _sentence('The {kind} {id} is {status}.'),
    'deadletter.drop': _sentence('The {kind} {id} is {status}.'),
    'events.list': _events,
    'events.latest': _events,
    'agent.logs': _log_text,
    'backlog.list': _backlog,
    'backlog.add': _sentence('Task {task_id} is in the backlog.'),
    'backlog.claim': _sentence('Task {task_id} waits in the inbox of {agent_name}.'),
    'backlog.assign_all': _counts('Assigned {assigned}', assigned='task'),
    'backlog.remove': _sentence('Task {task_id} is removed.'),
    'message.send': _sentence('Message {message_id} sent to {to_agent}.'),
    'recovery.recover_agents': _counts('Checked {checked}, recovered {recovered}', checked='agent'),
    'recovery.reclaim_tasks': _counts('Moved {reclaimed} to {destination}', reclaimed='task'),
    'recovery.orphan_tasks': _orphans,
}
