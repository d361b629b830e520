"""The OpenAPI 3.1 document, made from the operations table: what a client may send, and every answer it may get.

Names that clients are generated from stay as the original published them. What the document says of callers follows the
configuration, so that it is true of the townhall that serves it.
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
    """RFC 9457. `code` tells programs what `detail` tells people; `errors` points at what is invalid (RFC 6901)."""

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


def _referring(value: Any) -> Any:
    """A schema with references where it says what a component says."""
    for name, shape in _SHAPES.items():
        if value == shape:
            return {'$ref': f'#/components/schemas/{name}'}
    if isinstance(value, dict):
        return {key: _referring(each) for key, each in value.items()}
    return [_referring(each) for each in value] if isinstance(value, list) else value


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
}  # as published
_NAMES_OTHERS: Final = frozenset(
    {'agent', 'to', 'from', 'parent_agent_id', 'task_id', 'id'}
)  # arguments that may be 404


# What is served as server-sent events too, where Accept asks for them; and what it takes beside its own arguments.
_STREAMS: Final[dict[str, Json]] = {
    'events.list': {name: parameter.schema for name, parameter in WAIT.items()},
    'agent.logs': {},
}


def operation_id(op: Op, method: str) -> str:
    """The name of a method in a generated client."""
    if op.also:
        return f'getInbox{method.capitalize()}'
    group, _, verb = op.name.partition('.')
    return _IDS.get(op.name, group + ''.join(word.capitalize() for word in verb.split('_')))


def _operation(op: Op, method: str, mode: str) -> Json:
    group = op.name.partition('.')[0].capitalize()
    takes_body = method == 'POST'
    inputs = op.input['properties']
    named = [name for name in inputs if name not in op.placeholders]
    found: Json = {
        'operationId': operation_id(op, method),
        'tags': [group],
        'summary': op.summary.split('. ')[0].split('; ')[0].rstrip('.'),
        'description': _described(op),
        'x-scope': op.scope,
        'parameters': [_parameter(name, inputs[name], 'path') for name in op.placeholders],
        'responses': {str(op.status): _answer(op.output)} | _errors(_failures(op, method, mode)),
    }
    if takes_body and named:
        found['requestBody'] = _body(op, named)
    elif not takes_body:
        found['parameters'] += [_parameter(name, inputs[name], 'query', op) for name in named]
    if op.name in _STREAMS:
        found['parameters'] += [_parameter(name, schema, 'query') for name, schema in _STREAMS[op.name].items()]
        found['parameters'] += [{'$ref': '#/components/parameters/LastEventId'}]
        found['responses'][str(op.status)]['content'][_EVENTS] = {'schema': {'type': 'string'}}
    found['parameters'] += [{'$ref': '#/components/parameters/RequestId'}]
    if takes_body and op.changes:
        found['parameters'] += [{'$ref': '#/components/parameters/IdempotencyKey'}]
    return found | _security(op.scope, mode)


def _described(op: Op) -> str:
    paragraphs = inspect.cleandoc(op.function.__doc__ or '').split('\n\n')
    return '\n\n'.join([' '.join(paragraph.split()) for paragraph in paragraphs] + [f'Needs the scope `{op.scope}`.'])


def _parameter(name: str, schema: Json, place: str, op: Op | None = None) -> Json:
    required = place == 'path' or (op is not None and op.parameters[name].required)
    schema = dict(schema)
    found: Json = {'name': name, 'in': place, 'required': required, 'description': schema.pop('description', name)}
    if schema['type'] == 'array':
        found |= {'style': 'form', 'explode': False}  # a,b
    if schema['type'] == 'boolean':
        found |= {'allowEmptyValue': True}  # ?deep
    return found | {'schema': schema}


def _body(op: Op, names: Iterable[str]) -> Json:
    """The body of a request. What may be left out may be null as well."""
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
    """What an operation may answer but success. What may meet any request is under `default`."""
    refers = bool(_NAMES_OTHERS & set(op.parameters))
    found = {400, 403, 422, 429, 500, 503}
    found |= {401} if mode != 'none' else set()
    found |= {404, 409} if refers else set()
    found |= {409} if op.changes else set()
    return found | ({413, 415} if method == 'POST' else set())


def _errors(statuses: Iterable[int]) -> Json:
    known = {str(status): {'$ref': f'#/components/responses/{_ERRORS[status]}'} for status in sorted(statuses)}
    return known | {'default': {'$ref': '#/components/responses/Other'}}


def _security(scope: str, mode: str) -> Json:
    if mode == 'none':
        return {}
    schemes = ('bearer', 'apiKey') if mode == 'api_key' else ('bearer',)
    return {'security': [{scheme: [scope]} for scheme in schemes]}


def _answer(schema: Json, content_type: str = _JSON, what: str = 'Done') -> Json:
    header = {'X-Request-ID': {'$ref': '#/components/headers/RequestId'}}
    return {'description': what, 'headers': header, 'content': {content_type: {'schema': _referring(schema)}}}


# --------------------------------------------------------------------------------------------------------- components


def _components(mode: str) -> Json:
    components: Json = {
        'schemas': {name: _inside(shape) for name, shape in _SHAPES.items()},
        'parameters': {'RequestId': _REQUEST_ID, 'IdempotencyKey': _IDEMPOTENCY_KEY, 'LastEventId': _LAST_EVENT_ID},
        'headers': {'RequestId': {'description': 'The one that was sent, or a new one', 'schema': {'type': 'string'}}},
        'responses': {name: _problem(HTTPStatus(status).phrase, status) for status, name in _ERRORS.items()}
        | {'Other': _problem('What may be wrong with any request (a path, a method, HTTP itself)', 0)},
    }
    bearer = {'type': 'http', 'scheme': 'bearer'}
    if mode == 'api_key':
        key = {'type': 'apiKey', 'in': 'header', 'name': 'X-API-Key'}
        components['securitySchemes'] = {'bearer': bearer, 'apiKey': key}
    elif mode == 'oidc':
        components['securitySchemes'] = {'bearer': bearer | {'bearerFormat': 'JWT'}}
    return components


def _inside(shape: Json) -> Json:
    """A component, referring to the others."""
    return {key: _referring(each) for key, each in shape.items()}


_REQUEST_ID: Final = {
    'name': 'X-Request-ID',
    'in': 'header',
    'description': 'Stands in the log, in the audit and in the answer: letters, digits, ., _ and -, 128 at most; '
    'any other is replaced',
    'schema': {'type': 'string'},
}
_IDEMPOTENCY_KEY: Final = {
    'name': 'Idempotency-Key',
    'in': 'header',
    'description': 'A request that is repeated with its key gets the first answer and changes nothing, for 24 hours',
    'schema': {'type': 'string', 'pattern': r'^[\x21-\x7e]{1,255}$'},
}
_LAST_EVENT_ID: Final = {
    'name': 'Last-Event-ID',
    'in': 'header',
    'description': 'With Accept: text/event-stream, the id of the last event that was received; the stream goes on '
    'after it',
    'schema': {'type': 'string'},
}
_TEXT_HEADER: Final = {'schema': {'type': 'string'}}
_HEADERS: Final[dict[int, Json]] = {
    401: {'WWW-Authenticate': _TEXT_HEADER},
    405: {'Allow': _TEXT_HEADER},
    429: {'Retry-After': {'description': 'Seconds', 'schema': {'type': 'integer'}}},
    503: {'Retry-After': {'description': 'Seconds', 'schema': {'type': 'integer'}}},
}


def _problem(what: str, status: int) -> Json:
    answer = _answer(_SHAPES['Problem'], _PROBLEM, what)
    answer['headers'] |= _HEADERS.get(status, {})
    return answer


# ------------------------------------------------------------------------------------------- what is served beside them


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
    ready = {'200': _answer(readiness, what='Ready'), '503': _answer(readiness, what='Not ready')}
    text = {'type': 'string'}
    metrics = {'200': _answer(text, CONTENT_TYPE), '503': _answer(text, CONTENT_TYPE, 'Redis does not answer')}
    guarded = _security(metrics_scope, mode) | _failing_guard(mode) if metrics_scope else {}
    scaling = {'200': _answer(_SHAPES['Scaling'])} | {'503': _errors([503])['503']}
    document = {'200': _answer({'type': 'object'})}
    page = {'200': _answer(text, _HTML)}
    found = {
        '/': ('dashboard', 'Show the dashboard', 'What it shows it asks for with the key that it is given.', page),
        '/health': ('healthzCheck', 'Say that the process serves', 'It asks nobody else.', health),
        '/healthz': ('healthCheck', 'The same as /health', 'It asks nobody else.', health),
        '/ready': ('readyzCheck', 'Say whether requests can be served', _READY, ready),
        '/readyz': ('readinessCheck', 'The same as /ready', _READY, ready),
        '/metrics': ('metrics', 'Show metrics', 'Prometheus text 0.0.4.', metrics),
        '/api/scaling': ('scalingSignal', 'Say how many agents the town could use', _SCALING, scaling),
        '/openapi.json': ('openapi', 'Show this document', 'It is made once.', document),
    }
    paths: Json = {path: {'get': _plain(*described)} for path, described in found.items()}
    for path, answers in (('/metrics', metrics), ('/api/scaling', scaling)):
        for key, value in guarded.items():
            paths[path]['get'][key] = value if key != 'responses' else answers | value
    return paths


def _failing_guard(mode: str) -> Json:
    return {'responses': _errors({403, 429} | ({401} if mode != 'none' else set()))}


_READY: Final = (
    'dispatcher is idle where no task is with an agent, stalled where one is and no worker was heard of for a lease. '
    'durability tells how safe an acknowledged change is: always, everysec or none.'
)
_SCALING: Final = (
    'pending_tasks wait in the backlog or in an inbox, in_flight_tasks run, queue_depth is their sum, desired_agents '
    'the lesser of that and max_agents. scale_up: more are desired than are active. scale_to_zero: none is desired, '
    'and all that are active have been idle for agent.idle_timeout_secs. scale_down: fewer are desired than are '
    'active, and nothing is pending.'
)


def _mcp(mode: str) -> Json:
    """The endpoint of the Model Context Protocol. What is said there is described by that protocol."""
    anything: Json = {'content': {_JSON: {'schema': {}}, _EVENTS: {'schema': {}}, _PROBLEM: {'schema': {}}}}
    named = (('post', 'Send a message'), ('get', 'Listen to what is told unasked'), ('delete', 'End a session'))
    paths: Json = {}
    for method, summary in named:
        paths[method] = {
            'operationId': f'mcp{method.capitalize()}',
            'tags': ['MCP'],
            'summary': f'{summary} (Model Context Protocol)',
            'responses': {'default': {'description': 'As that protocol says'} | anything},
        } | ({} if mode == 'none' else {'security': _security('', mode)['security']})
    paths['post']['requestBody'] = {'required': True, 'content': {_JSON: {'schema': {'type': ['object', 'array']}}}}
    return {'/mcp': paths}


# ----------------------------------------------------------------------------------------------------------- document


def document(mode: str, metrics_scope: str) -> Json:
    """The document for an authentication mode and the scope that metrics need ('' for none)."""
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
    'The control plane of a town of AI coding agents. An agent is meant by its name, its id, or a unique start of the '
    'id. Lists take `limit` and `cursor`, and give `next_cursor` where there is more. Errors are problem documents '
    '(RFC 9457) with a stable `code`.'
)


@cache
def document_bytes(mode: str, metrics_scope: str) -> bytes:
    """The document as JSON."""
    return json.dumps(document(mode, metrics_scope), ensure_ascii=False, separators=(',', ':')).encode()
