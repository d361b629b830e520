"""What Townhall offers over MCP, made from the operations table: tools, resources, prompts, completion, changes.

No tool is written by hand: its name, schemas and help are its row's. Every call goes through the door.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Final

from .. import __version__
from ..core.dispatch import CallLimits, call, encode_answer
from ..core.operations import BY_NAME, OPERATIONS, Op
from ..core.town import Town
from ..errors import TownError, UsageError
from ..model import READ, Json, Principal
from ..state import event_feed
from ..state.event_feed import Event, EventFeed
from ..state.store import Step
from . import content
from .jsonrpc import INVALID_PARAMS, NO_RESOURCE, Fault
from .protocol import Ask, Cancel, Manner, Notify

# Further names for an operation with some of its arguments given.
PRESETS: Final[dict[str, tuple[str, Json]]] = {'agent.list_open': ('agent.list', {'open': True})}

# What a row does not say. A change that is not here is shown as destructive and not to be repeated.
ADDITIVE: Final = frozenset(
    {'agent.spawn', 'agent.interrupt', 'agent.resume', 'agent.close', 'task.assign', 'task.complete', 'task.fail'}
    | {'task.release', 'task.retry', 'backlog.add', 'backlog.claim', 'backlog.assign_all', 'deadletter.retry'}
    | {'message.send', 'recovery.recover_agents', 'recovery.reclaim_tasks'}
)
REPEATABLE: Final = frozenset(
    {'town.reset', 'agent.prune', 'agent.kill', 'agent.interrupt', 'agent.resume', 'agent.close', 'agent.ack'}
    | {'task.complete', 'task.fail', 'task.release', 'task.cancel', 'task.retry', 'backlog.claim', 'backlog.remove'}
    | {'deadletter.retry', 'deadletter.drop', 'recovery.recover_agents', 'recovery.reclaim_tasks'}
    | {'recovery.orphan_tasks'}
)
# They set coding CLIs to work, whose reach does not end with the town.
OPEN_WORLD: Final = frozenset(
    {'agent.spawn', 'agent.restart', 'agent.resume', 'task.assign', 'backlog.claim', 'backlog.assign_all'}
    | {'message.send'}
)
_NAMES: Final = (*BY_NAME, *PRESETS)
_MOST_NAMED: Final = 20  # agents that an error names
_SLICE_SECS: Final = 1  # between two signs of progress


def offered_as(name: str) -> str:
    """The name of an operation in `tools/list`; some clients refuse a whole list over one dot."""
    return name.replace('.', '_')


@cache
def tools() -> dict[str, Json]:
    """Every tool by its operation's (or preset's) name. Made when first asked for: 40 schemas take 15 ms."""
    named = {op.name: _tool(op.name, op, {}) for op in OPERATIONS}
    return named | {name: _tool(name, BY_NAME[of], given) for name, (of, given) in PRESETS.items()}


def _tool(name: str, op: Op, given: Json) -> Json:
    schema = op.input | {
        'properties': {key: value for key, value in op.input['properties'].items() if key not in given}
    }
    return {
        'name': offered_as(name),
        'title': title(name),
        'description': _description(op, given),
        'inputSchema': schema,
        'outputSchema': _portable(op.output),
        'annotations': {
            'title': title(name),
            'readOnlyHint': not op.changes,
            'destructiveHint': op.changes and op.name not in ADDITIVE,
            'idempotentHint': not op.changes or op.name in REPEATABLE,
            'openWorldHint': op.name in OPEN_WORLD,
        },
    }


def _portable(schema: Any) -> Any:
    """A schema without lists of types, which some clients can't express: a branch each, in their place."""
    if isinstance(schema, list):
        return [_portable(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if not isinstance(schema.get('type'), list):
        return {name: _portable(value) for name, value in schema.items()}
    rest = {name: _portable(value) for name, value in schema.items() if name not in ('type', 'enum')}
    branches = []
    for kind in schema['type']:
        values = [value for value in schema.get('enum', ()) if (value is None) == (kind == 'null')]
        branches.append({'type': kind} | ({'enum': values} if values and kind != 'null' else {}))
    shared = {name: rest.pop(name) for name in ('description', 'default') if name in rest}
    branches[0] |= rest
    return {'anyOf': branches, **shared}


def title(name: str) -> str:
    """A name for people: `Agent: list open`."""
    group, _, verb = name.partition('.')
    return f'{group.capitalize()}: {verb.replace("_", " ")}'


def _description(op: Op, given: Json) -> str:
    paragraphs = inspect.cleandoc(op.function.__doc__ or '').split('\n\n')
    text = '\n\n'.join(' '.join(paragraph.split()) for paragraph in paragraphs)
    fixed = ', '.join(f'{name}={json.dumps(value)}' for name, value in given.items())
    return f'{text}\n\nThis is {offered_as(op.name)} with {fixed}.' if fixed else text


def _selected(names: Iterable[str]) -> frozenset[str]:
    """The tools of the setting, which takes either spelling. Raises UsageError."""
    known = {offered_as(name): name for name in _NAMES}
    chosen = set()
    for name in names:
        if offered_as(name) not in known:
            near = _nearest(offered_as(name), known, 1)
            mend = f'did you mean {near[0]}?' if near else 'docs/mcp.md lists them'
            raise UsageError(f'townhall.mcp.tools: there is no tool {name!r}; {mend}')
        chosen.add(known[offered_as(name)])
    return frozenset(chosen or _NAMES)


def _nearest(name: str, known: Iterable[str], most: int, cutoff: float = 0.6) -> list[str]:
    import difflib  # late, as it is seldom needed

    return difflib.get_close_matches(name, known, most, cutoff)


class Catalog:
    """A town over MCP. `town` gives it, opened when it is first needed. Raises UsageError for a tool that is none."""

    page = 100

    def __init__(
        self, town: Callable[[], Town], changes: EventFeed | None, only: Iterable[str], read_only: bool
    ) -> None:
        self._town = town
        self._changes = changes
        selected = _selected(only)
        self._offered = [
            name for name in _NAMES if name in selected and not (read_only and _operation(name)[0].changes)
        ]
        self._by_name = {offered_as(name): name for name in self._offered}
        self.info: Json = {'name': 'townhall', 'title': 'Townhall', 'version': __version__}
        self.instructions = content.INSTRUCTIONS
        self.capabilities: Json = {
            'tools': {},
            'resources': {'subscribe': True} if changes else {},
            'prompts': {},
            'completions': {},
        }

    # ------------------------------------------------------------------------------------------------------- tools

    def tools(self, by: Principal) -> list[Json]:
        """Those that the caller may call."""
        return [tools()[name] for name in self._offered if by.may(_operation(name)[0].scope)]

    def _find(self, tool: str) -> str:
        name = tool if tool in self._offered else self._by_name.get(tool)
        if name is None:
            near = _nearest(offered_as(tool[:100]), self._by_name, 3, 0.5)
            raise Fault(
                INVALID_PARAMS, f'there is no tool {tool[:100]!r}' + (f'; near: {", ".join(near)}' if near else '')
            )
        return name

    def manner(self, ask: Ask, tool: str) -> Manner:
        name = self._by_name.get(tool, tool)
        if name not in self._offered:
            return 'quick'
        op = _operation(name)[0]
        if not op.slow or not ask.by.may(op.scope):
            return 'quick'
        return 'stream' if op.name == 'agent.wait' else 'slow'

    def call(self, ask: Ask, tool: str, arguments: Json) -> Step[Json]:
        """Through the door. What it refuses is a result that says what to do next, not a protocol error."""
        op, given = _operation(self._find(tool))
        try:
            if op.name == 'agent.wait':
                answer = yield from self._wait(ask, op, arguments)
            else:
                answer = yield from call(self._town(), ask.by, op, _with(arguments, given), gate=ask.gate)
        except TownError as e:
            ask.refused = e
            text = yield from self._teach(ask, e, op)
            return {'content': [{'type': 'text', 'text': text}], 'isError': True}
        data = encode_answer(answer)
        return {
            'content': [{'type': 'text', 'text': data.decode()}],
            'structuredContent': json.loads(data) if isinstance(answer, bytes) else answer,
            'isError': False,
        }

    def _wait(self, ask: Ask, op: Op, arguments: Json) -> Step[Any]:
        """Waits a second at a time, so that it can tell how far it is and be cancelled."""
        total = arguments.get('timeout', op.parameters['timeout'].schema['default'])
        if not isinstance(total, int) or isinstance(total, bool) or not 0 < total <= 25:
            return (yield from call(self._town(), ask.by, op, arguments, gate=ask.gate))
        began = time.monotonic()
        gate = ask.gate
        while True:
            left = total - (time.monotonic() - began)
            piece = max(min(_SLICE_SECS, round(left)), 0)
            answer = yield from call(self._town(), ask.by, op, arguments | {'timeout': piece}, gate=gate)
            gate = None  # it counts as one call
            passed = time.monotonic() - began
            if answer['done'] or passed >= total or ask.cancelled:
                return answer
            ask.progress(round(passed, 3), total, f'{answer["agent"]} is {answer["state"]}')

    def _teach(self, ask: Ask, error: TownError, op: Op) -> Step[str]:
        """What was wrong, what is expected, and the next step."""
        lines = [error.detail]
        if error.errors and len(error.errors) > 1:
            lines = [f'{each["pointer"]}: {each["detail"]}.' for each in error.errors]
        if error.code == 'agent-not-found' and ask.by.may(READ):
            names = yield from self._agents(ask.by, _MOST_NAMED)
            lines[0] = lines[0].replace(' not found', '. ').replace('Agent ', 'No agent ', 1).strip()
            lines.append(
                f'Agents: {", ".join(names)}. Use agent_list.' if names else 'There are none: use agent_spawn.'
            )
        if error.status == 422:
            required = ', '.join(op.input.get('required', ())) or 'nothing'
            lines.append(f'{offered_as(op.name)} takes {", ".join(op.parameters) or "nothing"}; required: {required}.')
        return ' '.join([line if line.endswith('.') else f'{line}.' for line in lines] + content.next_steps(error.code))

    def _agents(self, by: Principal, most: int, all: bool = False) -> Step[list[str]]:
        page = yield from self._ask(by, 'agent.list', {'limit': most})
        names = [str(agent['name']) for agent in page['agents']]
        return names + (['…'] if 'next_cursor' in page and not all else [])

    # --------------------------------------------------------------------------------------------------- resources

    def resources(self, by: Principal) -> list[Json]:
        return content.RESOURCES if by.may(READ) else []

    def templates(self, by: Principal) -> list[Json]:
        return content.TEMPLATES if by.may(READ) else []

    def read(self, ask: Ask, uri: str) -> Step[list[Json]]:
        found = content.parse_resource_uri(uri)
        if found is None:
            raise _no_resource(uri)
        name, arguments = found
        try:
            answer = yield from call(self._town(), ask.by, BY_NAME[name], arguments, gate=ask.gate)
        except TownError as e:
            if e.status in (404, 422):
                raise _no_resource(uri, e.detail) from None
            ask.refused = e
            raise
        return [{'uri': uri, 'mimeType': 'application/json', 'text': encode_answer(answer).decode()}]

    def honoured(self, by: Principal, wanted: Json) -> Json:
        uris = [uri for uri in wanted.get('resourceSubscriptions', ()) if content.parse_resource_uri(uri)]
        return {'resourceSubscriptions': uris} if uris and self._changes and by.may(READ) else {}

    def position(self) -> Step[str]:
        events, position = yield from event_feed.page(self._town().store, '$', 1)
        assert not events
        return position

    def watch(self, position: str, wanted: Json, tell: Notify) -> Cancel:
        uris = wanted.get('resourceSubscriptions', [])
        if not uris or not self._changes:
            return lambda: None

        def deliver(events: list[Event]) -> None:
            touched = content.touched(events)
            for uri in uris:
                if touched is None or uri in touched:
                    tell('notifications/resources/updated', {'uri': uri})

        return self._changes.subscribe(position, deliver) or self._changes.join(deliver)

    # ----------------------------------------------------------------------------------------- prompts, completion

    def prompts(self, by: Principal) -> list[Json]:
        return content.PROMPTS if by.may(READ) else []

    def prompt(self, ask: Ask, name: str, arguments: dict[str, str]) -> Step[Json]:
        listed = next((prompt for prompt in content.PROMPTS if prompt['name'] == name), None)
        if listed is None:
            known = ', '.join(prompt['name'] for prompt in content.PROMPTS)
            raise Fault(INVALID_PARAMS, f'there is no prompt {name[:100]!r}; there are {known}')
        missing = [
            each['name'] for each in listed.get('arguments', ()) if each['required'] and each['name'] not in arguments
        ]
        if missing:
            raise Fault(INVALID_PARAMS, f'{name}: the argument {missing[0]} is missing')
        write = self._startup if name == 'conductor.startup_context' else self._hint
        try:
            text = yield from write(ask, arguments)
        except TownError as e:
            ask.refused = e
            raise Fault(INVALID_PARAMS, (yield from self._teach(ask, e, BY_NAME['agent.get']))) from None
        return {
            'description': listed['description'],
            'messages': [{'role': 'user', 'content': {'type': 'text', 'text': text}}],
        }

    def _startup(self, ask: Ask, _arguments: dict[str, str]) -> Step[str]:
        status = yield from self._ask(ask.by, 'town.get_status', {'deep': True, 'limit': 100}, ask.gate)
        waiting = yield from self._ask(ask.by, 'backlog.list', {'limit': 20})
        return content.startup_context(status, waiting)

    def _hint(self, ask: Ask, arguments: dict[str, str]) -> Step[str]:
        agent = yield from self._ask(ask.by, 'agent.get', {'agent': arguments['agent_name']}, ask.gate)
        waiting = yield from self._ask(ask.by, 'backlog.list', {'limit': 100})
        tags = [tag.strip() for tag in arguments.get('tags', '').split(',') if tag.strip()]
        return content.role_hint(self._town().name, agent, tags, waiting)

    def _ask(self, by: Principal, name: str, arguments: Json, gate: CallLimits | None = None) -> Step[Json]:
        found: Json = json.loads(
            encode_answer((yield from call(self._town(), by, BY_NAME[name], arguments, gate=gate)))
        )
        return found

    def complete(self, ask: Ask, ref: Json, argument: str, value: str) -> Step[list[str]]:
        """Names of agents and ids of tasks, by their start."""
        if not content.knows(ref):
            raise Fault(INVALID_PARAMS, f'there is no {json.dumps(ref)[:200]} to complete')
        if not ask.by.may(READ) or argument not in ('agent_name', 'task_id'):
            return []
        if argument == 'agent_name':
            names = yield from self._agents(ask.by, 500, all=True)
        else:
            names = [task['task_id'] for task in (yield from self._ask(ask.by, 'task.list', {}))['tasks']]
        return [name for name in names if name.lower().startswith(value.lower())]


@cache
def _operation(name: str) -> tuple[Op, Json]:
    """The row of a tool, and the arguments that are given with its name."""
    of, given = PRESETS.get(name, (name, {}))
    return BY_NAME[of], given


def _with(arguments: Json, given: Json) -> Json:
    taken = next((name for name in given if name in arguments), None)
    if taken:
        raise Fault(INVALID_PARAMS, f'{taken} is not an argument of this tool')
    return arguments | given


def _no_resource(uri: str, why: str = '') -> Fault:
    if not re.match(r'tinytown://', uri):
        why = 'the resources of this server begin with tinytown://'
    return Fault(NO_RESOURCE, f'there is no resource {uri[:200]!r}' + (f': {why}' if why else ''), {'uri': uri})
