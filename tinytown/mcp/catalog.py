"""The catalog of a town over MCP: tools, resources, prompts, completion, notifications of changes.

No tool is written by hand: its name, schemas and description come from its row in the table of operations
(`core.operations`). Every call runs through `dispatch.call`, as in REST. `protocol` asks the catalog; `content` holds
its texts.
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
from .jsonrpc import INVALID_PARAMS, RESOURCE_NOT_FOUND, Fault
from .protocol import Cancel, McpRequest, Notify, RunMode

# Additional tools: an operation with some arguments fixed.
PRESETS: Final[dict[str, tuple[str, Json]]] = {'agent.list_open': ('agent.list', {'open': True})}

# Hints for clients that a row does not hold. Any other change is listed as destructive and not idempotent.
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
# These make a coding CLI work, and it can reach things outside the town.
OPEN_WORLD: Final = frozenset(
    {'agent.spawn', 'agent.restart', 'agent.resume', 'task.assign', 'backlog.claim', 'backlog.assign_all'}
    | {'message.send'}
)
_NAMES: Final = (*BY_NAME, *PRESETS)
_MAX_NAMES: Final = 20  # how many agents an error message lists
_PROGRESS_SECS: Final = 1  # between two progress notifications


def offered_as(name: str) -> str:
    """The tool name of an operation. Without the dot: some clients reject the whole list for one name with a dot."""
    return name.replace('.', '_')


@cache
def tools() -> dict[str, Json]:
    """Every tool, by the name of its operation or preset. Built on first use: 40 schemas take 15 ms."""
    by_name = {op.name: _tool(op.name, op, {}) for op in OPERATIONS}
    return by_name | {name: _tool(name, BY_NAME[operation], fixed) for name, (operation, fixed) in PRESETS.items()}


def _tool(name: str, op: Op, fixed: Json) -> Json:
    schema = op.input | {
        'properties': {key: value for key, value in op.input['properties'].items() if key not in fixed}
    }
    return {
        'name': offered_as(name),
        'title': title(name),
        'description': _description(op, fixed),
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
    """Replaces lists of types in a schema by `anyOf` with a branch for each, because some clients reject such lists."""
    if isinstance(schema, list):
        return [_portable(item) for item in schema]
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
    """A title for people: `Agent: list open`."""
    group, _, verb = name.partition('.')
    return f'{group.capitalize()}: {verb.replace("_", " ")}'


def _description(op: Op, fixed: Json) -> str:
    paragraphs = inspect.cleandoc(op.function.__doc__ or '').split('\n\n')
    text = '\n\n'.join(' '.join(paragraph.split()) for paragraph in paragraphs)
    arguments = ', '.join(f'{name}={json.dumps(value)}' for name, value in fixed.items())
    return f'{text}\n\nThis is {offered_as(op.name)} with {arguments}.' if arguments else text


def _selected(names: Iterable[str]) -> frozenset[str]:
    """The operations selected by the setting townhall.mcp.tools, by tool name or by operation name; all if it is empty.

    Raises UsageError.
    """
    known = {offered_as(name): name for name in _NAMES}
    chosen = set()
    for name in names:
        if offered_as(name) not in known:
            near = _nearest(offered_as(name), known, 1)
            mend = f'did you mean {near[0]}?' if near else 'docs/mcp.md lists them'
            raise UsageError(f'townhall.mcp.tools: there is no tool {name!r}; {mend}')
        chosen.add(known[offered_as(name)])
    return frozenset(chosen or _NAMES)


def _nearest(name: str, known: Iterable[str], limit: int, cutoff: float = 0.6) -> list[str]:
    import difflib  # late: rarely needed

    return difflib.get_close_matches(name, known, limit, cutoff)


class Catalog:
    """What one town offers over MCP.

    `town` returns the town; it may open it on the first call. Without a `feed` there are no subscriptions. `only`
    limits the tools to these names, `read_only` to those that change nothing. Raises UsageError for an unknown tool.
    """

    page = 100

    def __init__(self, town: Callable[[], Town], feed: EventFeed | None, only: Iterable[str], read_only: bool) -> None:
        self._town = town
        self._feed = feed
        selected = _selected(only)
        self._offered = [
            name for name in _NAMES if name in selected and not (read_only and _operation(name)[0].changes)
        ]
        self._by_name = {offered_as(name): name for name in self._offered}
        self.info: Json = {'name': 'townhall', 'title': 'Townhall', 'version': __version__}
        self.instructions = content.INSTRUCTIONS
        self.capabilities: Json = {
            'tools': {},
            'resources': {'subscribe': True} if feed else {},
            'prompts': {},
            'completions': {},
        }

    # ------------------------------------------------------------------------------------------------------- tools

    def tools(self, by: Principal) -> list[Json]:
        """The tools that the caller may call."""
        return [tools()[name] for name in self._offered if by.may(_operation(name)[0].scope)]

    def _find(self, tool: str) -> str:
        name = tool if tool in self._offered else self._by_name.get(tool)
        if name is None:
            near = _nearest(offered_as(tool[:100]), self._by_name, 3, 0.5)
            mend = f'; similar names: {", ".join(near)}' if near else ''
            raise Fault(INVALID_PARAMS, f'there is no tool {tool[:100]!r}{mend}')
        return name

    def run_mode(self, request: McpRequest, tool: str) -> RunMode:
        name = self._by_name.get(tool, tool)
        if name not in self._offered:
            return 'quick'
        op = _operation(name)[0]
        if not op.slow or not request.by.may(op.scope):
            return 'quick'
        return 'stream' if op.name == 'agent.wait' else 'slow'

    def call(self, request: McpRequest, tool: str, arguments: Json) -> Step[Json]:
        """Calls an operation. A refusal is a result with a text for the model, not a protocol error."""
        op, fixed = _operation(self._find(tool))
        try:
            if op.name == 'agent.wait':
                answer = yield from self._wait(request, op, arguments)
            else:
                answer = yield from call(self._town(), request.by, op, _with(arguments, fixed), limits=request.limits)
        except TownError as e:
            request.refusal = e
            text = yield from self._explain(request, e, op)
            return {'content': [{'type': 'text', 'text': text}], 'isError': True}
        data = encode_answer(answer)
        return {
            'content': [{'type': 'text', 'text': data.decode()}],
            'structuredContent': json.loads(data) if isinstance(answer, bytes) else answer,
            'isError': False,
        }

    def _wait(self, request: McpRequest, op: Op, arguments: Json) -> Step[Any]:
        """Runs agent.wait in slices of a second, to report progress and to notice a cancellation in between."""
        total = arguments.get('timeout', op.parameters['timeout'].schema['default'])
        if not isinstance(total, int) or isinstance(total, bool) or not 0 < total <= 25:
            return (yield from call(self._town(), request.by, op, arguments, limits=request.limits))
        start = time.monotonic()
        limits = request.limits
        while True:
            left = total - (time.monotonic() - start)
            slice_secs = max(min(_PROGRESS_SECS, round(left)), 0)
            answer = yield from call(self._town(), request.by, op, arguments | {'timeout': slice_secs}, limits=limits)
            limits = None  # the whole wait counts as one call
            elapsed = time.monotonic() - start
            if answer['done'] or elapsed >= total or request.cancelled:
                return answer
            request.progress(round(elapsed, 3), total, f'{answer["agent"]} is {answer["state"]}')

    def _explain(self, request: McpRequest, error: TownError, op: Op) -> Step[str]:
        """An error as a text for a model: what was wrong, which arguments the tool takes, what to do next."""
        lines = [error.detail]
        if error.errors and len(error.errors) > 1:
            lines = [f'{entry["pointer"]}: {entry["detail"]}.' for entry in error.errors]
        if error.code == 'agent-not-found' and request.by.may(READ):
            names = yield from self._agents(request.by, _MAX_NAMES)
            lines[0] = lines[0].replace(' not found', '. ').replace('Agent ', 'No agent ', 1).strip()
            lines.append(
                f'Agents: {", ".join(names)}. Use agent_list.' if names else 'There are none: use agent_spawn.'
            )
        if error.status == 422:
            required = ', '.join(op.input.get('required', ())) or 'nothing'
            lines.append(f'{offered_as(op.name)} takes {", ".join(op.parameters) or "nothing"}; required: {required}.')
        return ' '.join([line if line.endswith('.') else f'{line}.' for line in lines] + content.next_steps(error.code))

    def _agents(self, by: Principal, limit: int) -> Step[list[str]]:
        """The names of at most `limit` agents, then '…' if there are more."""
        page = yield from self._query(by, 'agent.list', {'limit': limit})
        names = [str(agent['name']) for agent in page['agents']]
        return names + (['…'] if 'next_cursor' in page else [])

    # --------------------------------------------------------------------------------------------------- resources

    def resources(self, by: Principal) -> list[Json]:
        return content.RESOURCES if by.may(READ) else []

    def templates(self, by: Principal) -> list[Json]:
        return content.TEMPLATES if by.may(READ) else []

    def read(self, request: McpRequest, uri: str) -> Step[list[Json]]:
        parsed = content.parse_resource_uri(uri)
        if parsed is None:
            raise _no_resource(uri)
        name, arguments = parsed
        try:
            answer = yield from call(self._town(), request.by, BY_NAME[name], arguments, limits=request.limits)
        except TownError as e:
            if e.status in (404, 422):
                raise _no_resource(uri, e.detail) from None
            request.refusal = e
            raise
        return [{'uri': uri, 'mimeType': 'application/json', 'text': encode_answer(answer).decode()}]

    def granted(self, by: Principal, wanted: Json) -> Json:
        uris = [uri for uri in wanted.get('resourceSubscriptions', ()) if content.parse_resource_uri(uri)]
        return {'resourceSubscriptions': uris} if uris and self._feed and by.may(READ) else {}

    def position(self) -> Step[str]:
        events, position = yield from event_feed.page(self._town().store, '$', 1)
        assert not events
        return position

    def watch(self, position: str, wanted: Json, notify: Notify) -> Cancel:
        uris = wanted.get('resourceSubscriptions', [])
        if not uris or not self._feed:
            return lambda: None

        def deliver(events: list[Event]) -> None:
            changed = content.changed_resources(events)
            for uri in uris:
                if changed is None or uri in changed:
                    notify('notifications/resources/updated', {'uri': uri})

        return self._feed.subscribe(position, deliver) or self._feed.join(deliver)

    # ----------------------------------------------------------------------------------------- prompts, completion

    def prompts(self, by: Principal) -> list[Json]:
        return content.PROMPTS if by.may(READ) else []

    def prompt(self, request: McpRequest, name: str, arguments: dict[str, str]) -> Step[Json]:
        prompt = next((prompt for prompt in content.PROMPTS if prompt['name'] == name), None)
        if prompt is None:
            known = ', '.join(prompt['name'] for prompt in content.PROMPTS)
            raise Fault(INVALID_PARAMS, f'there is no prompt {name[:100]!r}; the prompts are {known}')
        required = [argument['name'] for argument in prompt.get('arguments', ()) if argument['required']]
        missing = [argument for argument in required if argument not in arguments]
        if missing:
            raise Fault(INVALID_PARAMS, f'{name}: the argument {missing[0]} is missing')
        write = self._startup_context if name == 'conductor.startup_context' else self._role_hint
        try:
            text = yield from write(request, arguments)
        except TownError as e:
            request.refusal = e
            raise Fault(INVALID_PARAMS, (yield from self._explain(request, e, BY_NAME['agent.get']))) from None
        return {
            'description': prompt['description'],
            'messages': [{'role': 'user', 'content': {'type': 'text', 'text': text}}],
        }

    def _startup_context(self, request: McpRequest, _arguments: dict[str, str]) -> Step[str]:
        status = yield from self._query(request.by, 'town.get_status', {'deep': True, 'limit': 100}, request.limits)
        backlog = yield from self._query(request.by, 'backlog.list', {'limit': 20})
        return content.startup_context(status, backlog)

    def _role_hint(self, request: McpRequest, arguments: dict[str, str]) -> Step[str]:
        agent = yield from self._query(request.by, 'agent.get', {'agent': arguments['agent_name']}, request.limits)
        backlog = yield from self._query(request.by, 'backlog.list', {'limit': 100})
        tags = [tag.strip() for tag in arguments.get('tags', '').split(',') if tag.strip()]
        return content.role_hint(self._town().name, agent, tags, backlog)

    def _query(self, by: Principal, name: str, arguments: Json, limits: CallLimits | None = None) -> Step[Json]:
        """The answer of an operation. Without `limits` the call is not counted: one request counts once."""
        answer = yield from call(self._town(), by, BY_NAME[name], arguments, limits=limits)
        parsed: Json = json.loads(encode_answer(answer))
        return parsed

    def complete(self, request: McpRequest, ref: Json, argument: str, value: str) -> Step[list[str]]:
        """Completes names of agents and ids of tasks, ignoring case."""
        if not content.knows(ref):
            raise Fault(INVALID_PARAMS, f'{json.dumps(ref)[:200]} is not a prompt or resource of this server')
        if not request.by.may(READ) or argument not in ('agent_name', 'task_id'):
            return []
        if argument == 'agent_name':
            agents = yield from self._query(request.by, 'agent.list', {'limit': 500})
            names = [agent['name'] for agent in agents['agents']]
        else:
            tasks = yield from self._query(request.by, 'task.list', {})
            names = [task['task_id'] for task in tasks['tasks']]
        return [name for name in names if name.lower().startswith(value.lower())]


@cache
def _operation(name: str) -> tuple[Op, Json]:
    """The operation of a tool, and the arguments that its preset fixes."""
    operation, fixed = PRESETS.get(name, (name, {}))
    return BY_NAME[operation], fixed


def _with(arguments: Json, fixed: Json) -> Json:
    """The arguments with those that a preset fixes. Raises Fault if the caller sent one of them."""
    conflict = next((name for name in fixed if name in arguments), None)
    if conflict:
        raise Fault(INVALID_PARAMS, f'{conflict} is not an argument of this tool')
    return arguments | fixed


def _no_resource(uri: str, why: str = '') -> Fault:
    if not re.match(r'tinytown://', uri):
        why = 'the resources of this server start with tinytown://'
    return Fault(RESOURCE_NOT_FOUND, f'there is no resource {uri[:200]!r}' + (f': {why}' if why else ''), {'uri': uri})
