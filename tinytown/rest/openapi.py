"""Builds the OpenAPI 3.1 document from the table of operations: every request that is accepted, every possible answer.

Start with `document`; `health` serves it. The operation ids that were published once never change, because clients are
generated from them. The authentication part follows the configuration of the townhall that serves the document.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from functools import cache
from http import HTTPStatus
from typing import Any, Final, Literal, NotRequired, TypedDict

from .. import __version__
from ..core.dead_letters import DeadLetter
from ..core.operations import OPERATIONS, Op
from ..core.stats import Dispatcher, Scaling
from ..core.task_history import Change
from ..core.town import TownEvent
from ..errors import TownError
from ..model import Agent, Assigned, Json, Task
from ..schema import json_schema
from .metrics import CONTENT_TYPE
from .sse_events import WAIT

_JSON: Final = 'application/json'
_PROBLEM: Final = 'application/problem+json'
_HTML: Final = 'text/html; charset=utf-8'
_EVENTS: Final = 'text/event-stream'

# ------------------------------------------------------------------------------------------------------------ shapes


class Health(TypedDict):
    status: Literal['ok']
    uptime_secs: int


class Readiness(TypedDict):
    status: Literal['ready', 'not_ready']
    redis: Literal['connected', 'disconnected']
    redis_latency_ms: NotRequired[float]
    dispatcher: Dispatcher
    detail: NotRequired[str]
    keys: NotRequired[Literal['old']]
    town: str
    durability: Literal['always', 'everysec', 'none', 'unknown']
    draining: bool


class Place(TypedDict):
    pointer: str
    detail: str


class Problem(TypedDict):
    """RFC 9457. `code` is for programs, `detail` for people; `errors` points at invalid arguments (RFC 6901)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: NotRequired[list[Place]]


_SHAPES: Final = {
    shape.__name__: json_schema(shape)
    for shape in (Agent, Task, Assigned, Change, DeadLetter, TownEvent, Health, Readiness, Scaling, Problem)
}
_ERRORS: Final = {kind.status: kind.__name__ for kind in TownError.__subclasses__()}


def _with_refs(value: Any) -> Any:
    """Replaces every part of a schema that equals a component by a reference to it."""
    for name, shape in _SHAPES.items():
        if value == shape:
            return {'$ref': f'#/components/schemas/{name}'}
    if isinstance(value, dict):
        return {key: _with_refs(item) for key, item in value.items()}
    return [_with_refs(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------- operations

_IDS: Final = {
    'town.get': 'getTown',
    'town.get_status': 'getStatus',
    'agent.list': 'listAgents',
    'agent.spawn': 'spawnAgent',
    'agent.kill': 'killAgent',
    'agent.restart': 'restartAgent',
    'agent.prune': 'pruneAgents',
    'task.assign': 'assignTask',
    'task.list_pending': 'listPendingTasks',
    'backlog.list': 'listBacklog',
    'backlog.add': 'addToBacklog',
    'backlog.claim': 'claimBacklogTask',
    'backlog.assign_all': 'assignAllBacklog',
    'backlog.remove': 'removeBacklogTask',
    'message.send': 'sendMessage',
    'recovery.recover_agents': 'recover',
    'recovery.reclaim_tasks': 'reclaim',
}  # published; the ids of other operations follow from their names
_REFERENCES: Final = frozenset(
    {'agent', 'to', 'from', 'parent_agent_id', 'task_id', 'id'}
)  # arguments that name a record, so the answer may be 404


# Operations that are also served as server-sent events, if Accept asks for them → the additional parameters of the
# route.
_STREAMS: Final[dict[str, Json]] = {
    'events.list': {name: parameter.schema for name, parameter in WAIT.items()},
    'agent.logs': {},
}


def operation_id(op: Op, method: str) -> str:
    """The operation id: the name of the method in a generated client."""
    if op.also:
        return f'getInbox{method.capitalize()}'
    group, _, verb = op.name.partition('.')
    return _IDS.get(op.name, group + ''.join(word.capitalize() for word in verb.split('_')))


def _operation(op: Op, method: str, mode: str) -> Json:
    group = op.name.partition('.')[0].capitalize()
    takes_body = method == 'POST'
    inputs = op.input['properties']
    arguments = [name for name in inputs if name not in op.placeholders]
    operation: Json = {
        'operationId': operation_id(op, method),
        'tags': [group],
        'summary': op.summary.split('. ')[0].split('; ')[0].rstrip('.'),
        'description': _description(op),
        'x-scope': op.scope,
        'parameters': [_parameter(name, inputs[name], 'path') for name in op.placeholders],
        'responses': {str(op.status): _answer(op.output)} | _errors(_failures(op, method, mode)),
    }
    if takes_body and arguments:
        operation['requestBody'] = _body(op, arguments)
    elif not takes_body:
        operation['parameters'] += [_parameter(name, inputs[name], 'query', op) for name in arguments]
    if op.name in _STREAMS:
        operation['parameters'] += [_parameter(name, schema, 'query') for name, schema in _STREAMS[op.name].items()]
        operation['parameters'] += [{'$ref': '#/components/parameters/LastEventId'}]
        operation['responses'][str(op.status)]['content'][_EVENTS] = {'schema': {'type': 'string'}}
    operation['parameters'] += [{'$ref': '#/components/parameters/RequestId'}]
    if takes_body and op.changes:
        operation['parameters'] += [{'$ref': '#/components/parameters/IdempotencyKey'}]
    return operation | _security(op.scope, mode)


def _description(op: Op) -> str:
    paragraphs = inspect.cleandoc(op.function.__doc__ or '').split('\n\n')
    return '\n\n'.join([' '.join(paragraph.split()) for paragraph in paragraphs] + [f'Needs the scope `{op.scope}`.'])


def _parameter(name: str, schema: Json, place: str, op: Op | None = None) -> Json:
    required = place == 'path' or (op is not None and op.parameters[name].required)
    schema = dict(schema)
    parameter: Json = {'name': name, 'in': place, 'required': required, 'description': schema.pop('description', name)}
    if schema['type'] == 'array':
        parameter |= {'style': 'form', 'explode': False}  # a,b
    if schema['type'] == 'boolean':
        parameter |= {'allowEmptyValue': True}  # ?deep
    return parameter | {'schema': schema}


def _body(op: Op, names: Iterable[str]) -> Json:
    """The request body of an operation. Optional arguments may also be null."""
    properties, required = {}, []
    for name in names:
        parameter = op.parameters[name]
        properties[name] = parameter.schema if parameter.required else _nullable(parameter.schema)
        required += [name] if parameter.required else []
    schema: Json = {'type': 'object', 'properties': properties, 'additionalProperties': False}
    schema |= {'required': required} if required else {}
    return {'required': bool(required), 'content': {_JSON: {'schema': schema}}}


def _nullable(schema: Json) -> Json:
    wider = schema | {'type': [schema['type'], 'null']}
    return wider | {'enum': [*schema['enum'], None]} if 'enum' in schema else wider


def _failures(op: Op, method: str, mode: str) -> set[int]:
    """The error statuses of an operation. Errors that any request may get are under `default` in the document."""
    refers = bool(_REFERENCES & set(op.parameters))
    statuses = {400, 403, 422, 429, 500, 503}
    statuses |= {401} if mode != 'none' else set()
    statuses |= {404, 409} if refers else set()
    statuses |= {409} if op.changes else set()
    return statuses | ({413, 415} if method == 'POST' else set())


def _errors(statuses: Iterable[int]) -> Json:
    known = {str(status): {'$ref': f'#/components/responses/{_ERRORS[status]}'} for status in sorted(statuses)}
    return known | {'default': {'$ref': '#/components/responses/Other'}}


def _security(scope: str, mode: str) -> Json:
    if mode == 'none':
        return {}
    schemes = ('bearer', 'apiKey') if mode == 'api_key' else ('bearer',)
    return {'security': [{scheme: [scope]} for scheme in schemes]}


def _answer(schema: Json, content_type: str = _JSON, description: str = 'Done') -> Json:
    header = {'X-Request-ID': {'$ref': '#/components/headers/RequestId'}}
    content = {content_type: {'schema': _with_refs(schema)}}
    return {'description': description, 'headers': header, 'content': content}


# --------------------------------------------------------------------------------------------------------- components


def _components(mode: str) -> Json:
    components: Json = {
        'schemas': {name: _component(shape) for name, shape in _SHAPES.items()},
        'parameters': {'RequestId': _REQUEST_ID, 'IdempotencyKey': _IDEMPOTENCY_KEY, 'LastEventId': _LAST_EVENT_ID},
        'headers': {
            'RequestId': {'description': 'The id that the request sent, or a new one', 'schema': {'type': 'string'}}
        },
        'responses': {name: _problem(HTTPStatus(status).phrase, status) for status, name in _ERRORS.items()}
        | {'Other': _problem('An error that any request may get (unknown path, wrong method, malformed HTTP)', 0)},
    }
    bearer = {'type': 'http', 'scheme': 'bearer'}
    if mode == 'api_key':
        key = {'type': 'apiKey', 'in': 'header', 'name': 'X-API-Key'}
        components['securitySchemes'] = {'bearer': bearer, 'apiKey': key}
    elif mode == 'oidc':
        components['securitySchemes'] = {'bearer': bearer | {'bearerFormat': 'JWT'}}
    return components


def _component(shape: Json) -> Json:
    """A component, with references to the other components."""
    return {key: _with_refs(item) for key, item in shape.items()}


_REQUEST_ID: Final = {
    'name': 'X-Request-ID',
    'in': 'header',
    'description': 'Identifies the request in the log, the audit and the answer. At most 128 letters, digits, ., _ and '
    '-; any other value is replaced by a new id',
    'schema': {'type': 'string'},
}
_IDEMPOTENCY_KEY: Final = {
    'name': 'Idempotency-Key',
    'in': 'header',
    'description': 'For 24 hours, a repeated request with the same key gets the first answer and changes nothing',
    'schema': {'type': 'string', 'pattern': r'^[\x21-\x7e]{1,255}$'},
}
_LAST_EVENT_ID: Final = {
    'name': 'Last-Event-ID',
    'in': 'header',
    'description': 'With Accept: text/event-stream, the id of the last event that the client received; the stream '
    'continues after it',
    'schema': {'type': 'string'},
}
_TEXT_HEADER: Final = {'schema': {'type': 'string'}}
_HEADERS: Final[dict[int, Json]] = {
    401: {'WWW-Authenticate': _TEXT_HEADER},
    405: {'Allow': _TEXT_HEADER},
    429: {'Retry-After': {'description': 'Seconds', 'schema': {'type': 'integer'}}},
    503: {'Retry-After': {'description': 'Seconds', 'schema': {'type': 'integer'}}},
}


def _problem(description: str, status: int) -> Json:
    answer = _answer(_SHAPES['Problem'], _PROBLEM, description)
    answer['headers'] |= _HEADERS.get(status, {})
    return answer


# --------------------------------------------------------------------------------------------------------- other routes


def _plain(name: str, summary: str, description: str, responses: Json) -> Json:
    return {
        'operationId': name,
        'tags': ['Probes'],
        'summary': summary,
        'description': description,
        'parameters': [{'$ref': '#/components/parameters/RequestId'}],
        'responses': responses | _errors(()),
    }


def _probes(mode: str, metrics_scope: str) -> Json:
    health = {'200': _answer(_SHAPES['Health'])}
    readiness = _SHAPES['Readiness']
    ready = {'200': _answer(readiness, description='Ready'), '503': _answer(readiness, description='Not ready')}
    text = {'type': 'string'}
    metrics = {'200': _answer(text, CONTENT_TYPE), '503': _answer(text, CONTENT_TYPE, 'Redis does not answer')}
    guarded = _security(metrics_scope, mode) | _failing_guard(mode) if metrics_scope else {}
    scaling = {'200': _answer(_SHAPES['Scaling'])} | {'503': _errors([503])['503']}
    document = {'200': _answer({'type': 'object'})}
    page = {'200': _answer(text, _HTML)}
    routes = {
        '/': ('dashboard', 'Show the dashboard', _DASHBOARD, page),
        '/health': ('healthzCheck', 'Check that the process serves requests', _HEALTH, health),
        '/healthz': ('healthCheck', 'The same as /health', _HEALTH, health),
        '/ready': ('readyzCheck', 'Check whether operations can be served', _READY, ready),
        '/readyz': ('readinessCheck', 'The same as /ready', _READY, ready),
        '/metrics': ('metrics', 'Show metrics', 'Prometheus text format 0.0.4.', metrics),
        '/api/scaling': ('scalingSignal', 'Recommend how many agents the town needs', _SCALING, scaling),
        '/openapi.json': (
            'openapi',
            'Show this document',
            'The document changes only with the configuration.',
            document,
        ),
    }
    paths: Json = {path: {'get': _plain(*route)} for path, route in routes.items()}
    for path, answers in (('/metrics', metrics), ('/api/scaling', scaling)):
        for key, value in guarded.items():
            paths[path]['get'][key] = value if key != 'responses' else answers | value
    return paths


def _failing_guard(mode: str) -> Json:
    return {'responses': _errors({403, 429} | ({401} if mode != 'none' else set()))}


_DASHBOARD: Final = 'The page itself needs no key. It fetches its data with the key that the user enters.'
_HEALTH: Final = 'Does not depend on Redis or any other service.'
_READY: Final = (
    'dispatcher is idle if no agent has a task, and stalled if an agent has one but no worker has reported for the '
    'length of a lease. durability says how safe an acknowledged change is: always, everysec or none.'
)
_SCALING: Final = (
    'pending_tasks wait in the backlog or in an inbox, in_flight_tasks are running, queue_depth is the sum of both. '
    'desired_agents is the smaller of queue_depth and max_agents. scale_up: more agents are desired than active. '
    'scale_to_zero: no agent is desired, and all active agents have been idle for agent.idle_timeout_secs. '
    'scale_down: fewer agents are desired than active, and no task is pending.'
)


def _mcp(mode: str) -> Json:
    """The endpoint of the Model Context Protocol, whose own specification describes the messages."""
    anything: Json = {'content': {_JSON: {'schema': {}}, _EVENTS: {'schema': {}}, _PROBLEM: {'schema': {}}}}
    methods = (('post', 'Send a message'), ('get', 'Listen to notifications'), ('delete', 'End a session'))
    paths: Json = {}
    for method, summary in methods:
        paths[method] = {
            'operationId': f'mcp{method.capitalize()}',
            'tags': ['MCP'],
            'summary': f'{summary} (Model Context Protocol)',
            'responses': {'default': {'description': 'As specified by the protocol'} | anything},
        } | ({} if mode == 'none' else {'security': _security('', mode)['security']})
    paths['post']['requestBody'] = {'required': True, 'content': {_JSON: {'schema': {'type': ['object', 'array']}}}}
    return {'/mcp': paths}


# ----------------------------------------------------------------------------------------------------------- document


def document(mode: str, metrics_scope: str) -> Json:
    """The document for an authentication mode and a scope that metrics need ('' if they need none)."""
    paths = _probes(mode, metrics_scope)
    for op in OPERATIONS:
        for method in filter(None, (op.method, op.also)):
            paths.setdefault(op.path, {})[method.lower()] = _operation(op, method, mode)
    return {
        'openapi': '3.1.0',
        'info': {'title': 'Townhall', 'version': __version__, 'description': _ABOUT, 'license': {'name': 'MIT'}},
        'servers': [{'url': '/'}],
        'paths': paths | _mcp(mode),
        'components': _components(mode),
    }


_ABOUT: Final = (
    'The control plane of a town of AI coding agents. Name an agent by its name, its id, or a unique prefix of the id. '
    'Lists take `limit` and `cursor`; if there are more items, the answer has a `next_cursor`. Errors are problem '
    'documents (RFC 9457) with a stable `code`.'
)


@cache
def document_bytes(mode: str, metrics_scope: str) -> bytes:
    """The document as JSON."""
    return json.dumps(document(mode, metrics_scope), ensure_ascii=False, separators=(',', ':')).encode()
