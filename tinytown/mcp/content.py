"""What a model reads over MCP beside tools: instructions, resources, prompts. Pure: takes data, gives data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote

from ..model import Json
from ..state.event_feed import Event

INSTRUCTIONS: Final = (
    'This server runs a town of AI coding agents. Begin with town_get_status: it tells who is working on what. '
    'agent_spawn starts an agent, task_assign gives it work that is tracked to its end, task_get and agent_wait tell '
    'how it goes, agent_get_result what came of it. Work that any agent may do goes to the backlog (backlog_add). '
    'Name an agent by its name and a task by its task_id in every call.'
)

# By the code of an error.
_NEXT_STEPS: Final = {
    'ambiguous-agent': 'Use agent_list to see names and ids.',
    'agent-not-accepting': 'Use agent_restart, or backlog_add to leave the task to any agent.',
    'agent-live': 'Use agent_kill first.',
    'name-taken': 'Use agent_list to see the names in use.',
    'max-agents': 'Use agent_list, and agent_kill for one that is not needed.',
    'bad-transition': 'Use agent_list to see the states.',
    'task-not-found': 'Use task_list to find its task_id.',
    'task-not-pending': 'Use backlog_list to see what waits there.',
    'task-not-running': 'Use task_get to see where it is.',
    'task-not-failed': 'Use task_get to see where it is.',
    'task-finished': 'Use task_get to see its result.',
    'stale-attempt': 'Another attempt holds the task now: drop this one, or use task_get to look.',
    'no-dead-letter': 'Use deadletter_list.',
    'insufficient-scope': 'Ask the people who run the town for a key with that scope.',
    'redis-unavailable': 'The outcome is not known: look with town_get_status before you try again.',
    'force-needed': 'Do so only if the people who run the town asked for it.',
}


def next_steps(code: str) -> list[str]:
    """What to do after an error of that code."""
    return [_NEXT_STEPS[code]] if code in _NEXT_STEPS else []


_JSON: Final = {'mimeType': 'application/json'}
RESOURCES: Final[list[Json]] = [
    {
        'uri': 'tinytown://town/current',
        'name': 'town',
        'title': 'The town',
        'description': 'The town and its agents, as town_get_status tells it',
        **_JSON,
    },
    {
        'uri': 'tinytown://agents',
        'name': 'agents',
        'title': 'Agents',
        'description': 'All agents with their state, current task and inbox',
        **_JSON,
    },
    {
        'uri': 'tinytown://backlog',
        'name': 'backlog',
        'title': 'Backlog',
        'description': 'The tasks that wait for someone to claim them, oldest first',
        **_JSON,
    },
]
TEMPLATES: Final[list[Json]] = [
    {
        'uriTemplate': 'tinytown://agents/{agent_name}',
        'name': 'agent',
        'title': 'An agent',
        'description': 'One agent: state, process, current task, what waits in its inbox',
        **_JSON,
    },
    {
        'uriTemplate': 'tinytown://tasks/{task_id}',
        'name': 'task',
        'title': 'A task',
        'description': 'One task: where it is, its attempt, its result or error',
        **_JSON,
    },
]
PROMPTS: Final[list[Json]] = [
    {
        'name': 'conductor.startup_context',
        'title': 'Conductor: startup context',
        'description': 'What a conductor of the town should know before it begins: agents, tasks, backlog, how to act',
    },
    {
        'name': 'agent.role_hint',
        'title': 'Agent: role hint',
        'description': 'What an agent is for, and the backlog entries that fit it',
        'arguments': [
            {'name': 'agent_name', 'title': 'Agent', 'description': 'Name of the agent', 'required': True},
            {'name': 'tags', 'title': 'Tags', 'description': 'Words to match, comma separated', 'required': False},
        ],
    },
]

_PLAIN: Final = {
    'tinytown://town/current': 'town.get_status',
    'tinytown://agents': 'agent.list',
    'tinytown://backlog': 'backlog.list',
}
_ONE: Final = re.compile(r'tinytown://(agents|tasks)/([^/?#]+)')


def parse_resource_uri(uri: str) -> tuple[str, Json] | None:
    """The operation and arguments that a resource stands for."""
    if uri in _PLAIN:
        return _PLAIN[uri], {}
    match = _ONE.fullmatch(uri)
    if not match:
        return None
    name = unquote(match[2])
    return ('agent.get', {'agent': name}) if match[1] == 'agents' else ('task.get', {'task_id': name})


def touched(events: Iterable[Event]) -> set[str] | None:
    """The resources that events have changed; None: any of them."""
    found: set[str] = set()
    for event in events:
        if event.is_gap:
            return None
        fields = event.fields
        if fields['type'] == 'town.reset':
            return None
        found |= {'tinytown://town/current', 'tinytown://agents'}
        for ref in (fields.get('agent_name'), fields.get('agent_id')):
            if ref:
                found.add(f'tinytown://agents/{quote(ref)}')
        if 'task_id' in fields:
            found |= {f'tinytown://tasks/{fields["task_id"]}', 'tinytown://backlog'}
    return found


def knows(ref: Json) -> bool:
    """Whether this is a reference (completion/complete) to a prompt or template that there is."""
    if ref.get('type') == 'ref/prompt':
        return any(prompt['name'] == ref.get('name') for prompt in PROMPTS)
    known = [template['uriTemplate'] for template in TEMPLATES] + [resource['uri'] for resource in RESOURCES]
    return ref.get('type') == 'ref/resource' and ref.get('uri') in known


# ------------------------------------------------------------------------------------------------------------ prompts


def startup_context(status: Json, backlog: Json) -> str:
    """Where the town stands, and how to conduct it."""
    counts = ', '.join(f'{count} {state}' for state, count in status['tasks'].items() if count) or 'none'
    parts = [
        f'You conduct the town {status["name"]}: you plan, give work to agents, and look after what comes of it.',
        '## Agents\n\n' + ('\n'.join(_agent_line(agent) for agent in status['agents']) or 'None yet; use agent_spawn.'),
        f'## Tasks\n\n{counts}',
        _backlog_part(backlog['backlog'], backlog['count']),
        '## How to act\n\n'
        'Give one agent a task with task_assign; leave work for anyone with backlog_add; ask with message_send. '
        'Look with town_get_status, wait with agent_wait, read what came of it with agent_get_result. '
        'A task that failed for good is in deadletter_list.',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def role_hint(town: str, agent: Json, tags: Sequence[str], backlog: Json) -> str:
    """What an agent is for, and what waits for someone like it."""
    words = {word.lower() for word in (*tags, agent['role_id'] or '') if word}
    fitting = [task for task in backlog['backlog'] if words & {tag.lower() for tag in task['tags']}]
    role = f'a {agent["role_id"]}' if agent['role_id'] else 'an agent'
    parts = [
        f'{agent["name"]} is {role} of the town {town}.\n\n{_agent_line(agent)}',
        _backlog_part(fitting, len(fitting)) if fitting else 'Nothing in the backlog has tags that fit it.',
        'Give it one of these with backlog_claim, or a task of its own with task_assign.',
    ]
    return '\n\n'.join(parts) + '\n'


def _agent_line(agent: Json) -> str:
    doing = f', on task {agent["current_task"]}: {agent["current_scope"]}' if agent['current_task'] else ''
    waiting = agent['inbox_len'] + agent['urgent_len']
    role = f' ({agent["role_id"]})' if agent['role_id'] else ''
    return f'- {agent["name"]}{role}: {agent["state"]}{doing}; {waiting} in its inbox; runs {agent["cli"]}'


def _backlog_part(tasks: Sequence[dict[str, Any]], count: int) -> str:
    lines = []
    for task in tasks:
        tags = f' [{", ".join(task["tags"])}]' if task['tags'] else ''
        lines.append(f'- {task["task_id"]}{tags}: {" ".join(task["description"].split())[:200]}')
    more = f'\n- and {count - len(tasks)} more: backlog_list' if count > len(tasks) else ''
    return f'## Backlog\n\n{chr(10).join(lines) or "Empty."}{more}'
