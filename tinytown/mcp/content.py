"""The texts of the MCP catalog apart from tools: instructions, next steps after errors, resources, prompts.

Pure functions of data that `catalog` fetches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote

from ..model import Json
from ..state.event_feed import Event

INSTRUCTIONS: Final = (
    'This server runs a town of AI coding agents. Start with town_get_status: it shows which agent works on what. '
    'agent_spawn starts an agent. task_assign gives an agent a task, and the town tracks the task until it ends. '
    'task_get and agent_wait show the progress, agent_get_result shows the result. Put work that any agent may do into '
    'the backlog (backlog_add). In every call, name an agent by its name and a task by its task_id.'
)

# By error code.
_NEXT_STEPS: Final = {
    'ambiguous-agent': 'Use agent_list to see names and ids.',
    'agent-not-accepting': 'Use agent_restart, or backlog_add so that any agent can take the task.',
    'agent-live': 'Use agent_kill first.',
    'name-taken': 'Use agent_list to see the names in use.',
    'max-agents': 'Use agent_list, then agent_kill for an agent that is not needed.',
    'bad-transition': 'Use agent_list to see the states.',
    'task-not-found': 'Use task_list to find its task_id.',
    'task-not-pending': 'Use backlog_list to see which tasks wait there.',
    'task-not-running': 'Use task_get to see its state.',
    'task-not-failed': 'Use task_get to see its state.',
    'task-finished': 'Use task_get to see its result.',
    'stale-attempt': 'Another attempt holds the task now: give up this attempt. task_get shows the current one.',
    'no-dead-letter': 'Use deadletter_list.',
    'insufficient-scope': 'Ask the people who run the town for a key with that scope.',
    'redis-unavailable': 'The outcome is unknown: check with town_get_status before you try again.',
    'force-needed': 'Use force only if the people who run the town asked for it.',
}


def next_steps(code: str) -> list[str]:
    """What to do after an error with this code: one sentence, or none."""
    return [_NEXT_STEPS[code]] if code in _NEXT_STEPS else []


_JSON: Final = {'mimeType': 'application/json'}
RESOURCES: Final[list[Json]] = [
    {
        'uri': 'tinytown://town/current',
        'name': 'town',
        'title': 'The town',
        'description': 'The town and its agents, as town_get_status shows them',
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
        'description': 'One agent: state, process, current task, length of its inbox',
        **_JSON,
    },
    {
        'uriTemplate': 'tinytown://tasks/{task_id}',
        'name': 'task',
        'title': 'A task',
        'description': 'One task: state, agent, attempt, result or error',
        **_JSON,
    },
]
PROMPTS: Final[list[Json]] = [
    {
        'name': 'conductor.startup_context',
        'title': 'Conductor: startup context',
        'description': 'What a conductor of the town needs to know at the start: agents, tasks, backlog, how to act',
    },
    {
        'name': 'agent.role_hint',
        'title': 'Agent: role hint',
        'description': 'The role of an agent, and the tasks of the backlog that match it',
        'arguments': [
            {'name': 'agent_name', 'title': 'Agent', 'description': 'Name of the agent', 'required': True},
            {'name': 'tags', 'title': 'Tags', 'description': 'Tags to match, comma separated', 'required': False},
        ],
    },
]

_OPERATIONS: Final = {
    'tinytown://town/current': 'town.get_status',
    'tinytown://agents': 'agent.list',
    'tinytown://backlog': 'backlog.list',
}
_TEMPLATE_URI: Final = re.compile(r'tinytown://(agents|tasks)/([^/?#]+)')


def parse_resource_uri(uri: str) -> tuple[str, Json] | None:
    """The operation that answers for a resource, and its arguments; None if the URI is not a resource."""
    if uri in _OPERATIONS:
        return _OPERATIONS[uri], {}
    match = _TEMPLATE_URI.fullmatch(uri)
    if not match:
        return None
    name = unquote(match[2])
    return ('agent.get', {'agent': name}) if match[1] == 'agents' else ('task.get', {'task_id': name})


def changed_resources(events: Iterable[Event]) -> set[str] | None:
    """The URIs of the resources that events have changed; None if any resource may have changed."""
    uris: set[str] = set()
    for event in events:
        if event.is_gap:
            return None
        fields = event.fields
        if fields['type'] == 'town.reset':
            return None
        uris |= {'tinytown://town/current', 'tinytown://agents'}
        for ref in (fields.get('agent_name'), fields.get('agent_id')):
            if ref:
                uris.add(f'tinytown://agents/{quote(ref)}')
        if 'task_id' in fields:
            uris |= {f'tinytown://tasks/{fields["task_id"]}', 'tinytown://backlog'}
    return uris


def knows(ref: Json) -> bool:
    """Whether a reference of `completion/complete` names an existing prompt, template or resource."""
    if ref.get('type') == 'ref/prompt':
        return any(prompt['name'] == ref.get('name') for prompt in PROMPTS)
    known = [template['uriTemplate'] for template in TEMPLATES] + [resource['uri'] for resource in RESOURCES]
    return ref.get('type') == 'ref/resource' and ref.get('uri') in known


# ------------------------------------------------------------------------------------------------------------ prompts


def startup_context(status: Json, backlog: Json) -> str:
    """The text of the prompt `conductor.startup_context`: the state of the town, and how to run it."""
    counts = ', '.join(f'{count} {state}' for state, count in status['tasks'].items() if count) or 'none'
    parts = [
        f'You conduct the town {status["name"]}: you plan, give work to agents, and check their results.',
        '## Agents\n\n' + ('\n'.join(_agent_line(agent) for agent in status['agents']) or 'None yet; use agent_spawn.'),
        f'## Tasks\n\n{counts}',
        _backlog_part(backlog['backlog'], backlog['count']),
        '## How to act\n\n'
        'Give one agent a task with task_assign; add work for any agent with backlog_add; ask questions with '
        'message_send. Check the state with town_get_status, wait with agent_wait, read results with agent_get_result. '
        'deadletter_list lists the tasks that failed for good.',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def role_hint(town: str, agent: Json, tags: Sequence[str], backlog: Json) -> str:
    """The text of the prompt `agent.role_hint`: the role of an agent, and the backlog's tasks with matching tags."""
    words = {word.lower() for word in (*tags, agent['role_id'] or '') if word}
    matching = [task for task in backlog['backlog'] if words & {tag.lower() for tag in task['tags']}]
    role = f'a {agent["role_id"]}' if agent['role_id'] else 'an agent'
    parts = [
        f'{agent["name"]} is {role} of the town {town}.\n\n{_agent_line(agent)}',
        _backlog_part(matching, len(matching)) if matching else 'No task in the backlog has a matching tag.',
        'Give it one of these with backlog_claim, or a new task with task_assign.',
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
