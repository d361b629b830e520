"""The OpenAPI document: it is valid, it matches the server, and clients of the published API still work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from tinytown.core.operations import OPERATIONS, Op
from tinytown.model import ADMIN, READ
from tinytown.rest import openapi
from tinytown.rest.health import ROUTES
from tinytown.rest.sse_events import WAIT

from ..ground import enlist
from ..support import Hall, Place, Reply, make_town

MODES = ('none', 'api_key', 'oidc')
NOBODY = '00000000-0000-4000-8000-000000000000'


def document(mode: str = 'none', metrics_scope: str = '') -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(openapi.document_bytes(mode, metrics_scope))
    return parsed


DOCUMENT = document()
DOCUMENTED = {
    operation['operationId']: (method, path, operation)
    for path, item in DOCUMENT['paths'].items()
    for method, operation in item.items()
}


def resolved(value: Any) -> Any:
    """A part of the document with all references replaced."""
    if isinstance(value, dict) and '$ref' in value:
        target: Any = DOCUMENT
        for part in value['$ref'].removeprefix('#/').split('/'):
            target = target[part]
        return resolved(target)
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    return [resolved(item) for item in value] if isinstance(value, list) else value


def answer_of(operation: dict[str, Any], status: int) -> dict[str, Any]:
    responses = operation['responses']
    answer: dict[str, Any] = resolved(responses.get(str(status), responses['default']))
    return answer


def parameters_of(operation: dict[str, Any], place: str) -> dict[str, dict[str, Any]]:
    parameters = resolved(operation.get('parameters', []))
    return {parameter['name']: parameter for parameter in parameters if parameter['in'] == place}


def body_of(operation: dict[str, Any]) -> dict[str, Any]:
    """The schema of a request's body; without a body a schema without properties."""
    content = operation.get('requestBody', {}).get('content', {})
    schema: dict[str, Any] = resolved(content.get('application/json', {}).get('schema', {'properties': {}}))
    return schema


# ------------------------------------------------------------------------------------------------------ the document


@pytest.mark.parametrize(('mode', 'metrics_scope'), [('none', ''), ('api_key', READ), ('oidc', '')])
def test_the_document_is_valid_openapi(mode: str, metrics_scope: str) -> None:
    assert not list(OpenAPIV31SpecValidator(document(mode, metrics_scope)).iter_errors())


def test_every_operation_has_a_unique_id_and_a_summary() -> None:
    assert len(DOCUMENTED) == sum(map(len, DOCUMENT['paths'].values())), 'two operations share an id'
    for method, path, operation in DOCUMENTED.values():
        assert re.fullmatch('[a-z][A-Za-z]+', operation['operationId'])
        assert operation['summary']
        assert set(re.findall(r'\{(\w+)\}', path)) == set(parameters_of(operation, 'path')), (method, path)


@pytest.mark.parametrize('op', OPERATIONS, ids=lambda op: op.name)
def test_every_operation_is_documented_with_its_arguments_and_answer(op: Op) -> None:
    for method in filter(None, (op.method, op.also)):
        operation = DOCUMENT['paths'][op.path][method.lower()]
        given = {place: parameters_of(operation, place) for place in ('path', 'query', 'header')}
        body = body_of(operation)
        own = set(given['query']) - set(WAIT) if op.name == 'events.list' else set(given['query'])
        assert set(given['path']) | own | set(body['properties']) == set(op.parameters)
        required = {name for name, parameter in op.parameters.items() if parameter.required}
        in_query = {name for name, parameter in given['query'].items() if parameter['required']}
        assert set(op.placeholders) | in_query | set(body.get('required', ())) == required
        assert ('requestBody' in operation) == (method == 'POST' and bool(set(op.parameters) - set(op.placeholders)))
        assert ('Idempotency-Key' in given['header']) == (method == 'POST' and op.changes)
        assert 'X-Request-ID' in given['header']
        success = resolved(operation['responses'][str(op.status)])
        assert success['content']['application/json']['schema'] == op.output
        assert operation['x-scope'] == op.scope


def test_every_documented_error_is_a_problem_document_with_a_code() -> None:
    for _, path, operation in DOCUMENTED.values():
        for status in operation['responses']:
            if path != '/mcp' and (status.startswith('4') or status == 'default'):
                content = answer_of(operation, int(status) if status.isdigit() else 0)['content']
                assert list(content) == ['application/problem+json']
                assert {'status', 'detail', 'code', 'request_id'} <= set(
                    content['application/problem+json']['schema']['required']
                )


@pytest.mark.parametrize('mode', MODES)
def test_the_security_schemes_follow_the_authentication_mode(mode: str) -> None:
    parsed = document(mode)
    schemes = {'none': set(), 'api_key': {'bearer', 'apiKey'}, 'oidc': {'bearer'}}[mode]
    assert set(parsed['components'].get('securitySchemes', {})) == schemes
    for op in OPERATIONS:
        operation = parsed['paths'][op.path][op.method.lower()]
        assert operation.get('security', []) == [{scheme: [op.scope]} for scheme in sorted(schemes, reverse=True)]
        assert ('401' in operation['responses']) == (mode != 'none')
    for path in ROUTES:
        assert 'security' not in parsed['paths'][path]['get']
    if schemes:
        assert document(mode, ADMIN)['paths']['/metrics']['get']['security'][0] == {'bearer': [ADMIN]}


def test_optional_fields_of_a_body_may_be_null() -> None:
    spawn = body_of(DOCUMENTED['spawnAgent'][2])
    assert spawn['properties']['cli']['type'] == ['string', 'null']
    assert spawn['properties']['name']['type'] == 'string'
    kinds = body_of(DOCUMENTED['sendMessage'][2])['properties']['kind']
    assert kinds['enum'] == ['task', 'query', 'info', 'ack', None]


# -------------------------------------------------------------------------------------------------------------- served


class Client:
    """Calls a townhall, and validates every answer by the document."""

    def __init__(self, hall: Hall) -> None:
        self.hall = hall
        self.met: set[tuple[str, int]] = set()

    def __call__(self, name: str, status: int, body: Any = None, query: str = '', **values: str) -> Any:
        method, path, operation = DOCUMENTED[name]
        for placeholder, value in values.items():
            path = path.replace(f'{{{placeholder}}}', value)
        answer = self.hall.request(method.upper(), path + query, body)
        assert answer.status == status, answer.body
        self.met.add((name, status))
        return self.check(operation, answer)

    def check(self, operation: dict[str, Any], answer: Reply) -> Any:
        documented = answer_of(operation, answer.status)
        kind = answer.headers['content-type']
        assert {name.lower() for name in documented.get('headers', {})} <= set(answer.headers)
        schema = documented['content'][kind]['schema']
        if schema == {'type': 'string'}:
            return answer.body.decode()
        body = answer.json
        Draft202012Validator(strict(schema)).validate(body)
        return body


def strict(schema: Any) -> Any:
    """Makes a schema refuse additional properties, except in events, which may have more."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    stricter = {key: strict(item) for key, item in schema.items()}
    if 'properties' in stricter and set(stricter['properties']) != {'id', 'type', 'at'}:
        stricter['additionalProperties'] = False
    return stricter


@pytest.fixture(scope='module')
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = make_town(
        tmp_path_factory.mktemp('o'), max_agents=4, agent={'max_attempts': 1}, agent_clis={'sleep': 'sleep 60'}
    )
    yield place
    place.close()


def test_the_document_lists_exactly_the_served_paths(town: Place) -> None:
    assert set(DOCUMENT['paths']) == {op.path for op in OPERATIONS} | set(ROUTES) | {'/', '/mcp'}
    hall = town.hall()
    for path, item in DOCUMENT['paths'].items():
        answer = hall.request('OPTIONS', re.sub(r'\{\w+\}', NOBODY, path))
        served = set(answer.headers['allow'].lower().split(', ')) - {'head', 'options'}
        # These paths also match a template: GET /v1/agents/prune shows an agent named prune.
        if path not in ('/v1/agents/prune', '/v1/tasks/assign', '/v1/backlog/assign-all'):
            assert served == set(item)
        assert served >= set(item)


def test_the_answers_of_all_operations_fit_the_document(town: Place) -> None:
    call = Client(town.hall())
    _probe(call)
    _spawn(call)
    _work(town, call)
    _give_up(town, call)
    _talk(call)
    _refuse(call)
    _end(call)
    met = {name for name, status in call.met if status < 400}
    assert set(DOCUMENTED) - met == {name for name in DOCUMENTED if name.startswith('mcp')}


def _probe(call: Client) -> None:
    for name in (
        'healthCheck',
        'healthzCheck',
        'readinessCheck',
        'readyzCheck',
        'metrics',
        'scalingSignal',
        'dashboard',
    ):
        call(name, 200)
    assert call('openapi', 200) == DOCUMENT
    call('getTown', 200)
    call('townListHosts', 200)
    call('getStatus', 200)


def _spawn(call: Client) -> None:
    call('spawnAgent', 201, {'name': 'a', 'role_id': 'worker', 'nickname': 'Ä', 'max_rounds': 0})
    call('spawnAgent', 201, {'name': 'b', 'cli': 'sleep', 'parent_agent_id': 'a'})
    call('listAgents', 200, query='?limit=1&open=true')
    call('agentGet', 200, agent='a')
    call('agentGetResult', 200, agent='a')
    call('agentInterrupt', 200, agent='a')
    call('agentResume', 200, agent='a')
    call('agentWait', 200, {'timeout': 0}, agent='a')


def _work(town: Place, call: Client) -> None:
    done = call('assignTask', 201, {'agent': 'a', 'task': 'write'})['task_id']
    town.await_end(done)
    call('taskGet', 200, task_id=done)
    call('taskHistory', 200, task_id=done)
    call('agentGetResult', 200, agent='a')
    call('agentLogs', 200, agent='a')
    call('taskList', 200, query='?state=completed&agent=a&limit=1')
    running, queued, third, fourth = (
        call('assignTask', 201, {'agent': 'b', 'task': text})['task_id']
        for text in ('sleep', 'next', 'third', 'fourth')
    )
    town.await_event('task.started', task_id=running)
    call('listPendingTasks', 200, query='?limit=1')
    call('getStatus', 200, query='?deep=true')
    call('taskRelease', 200, {'attempt': 1}, task_id=running)
    call('taskComplete', 200, {'result': None}, task_id=queued)
    call('taskFail', 200, {'error': 'no'}, task_id=third)
    call('taskCancel', 200, task_id=fourth)
    call('taskRetry', 200, task_id=fourth)
    call('listBacklog', 200)
    added = call('addToBacklog', 201, {'description': 'x', 'tags': ['t']})['task_id']
    call('removeBacklogTask', 200, task_id=added)
    claimed = call('addToBacklog', 201, {'description': 'x'})['task_id']
    call('claimBacklogTask', 200, {'agent': 'a'}, task_id=claimed)
    call('assignAllBacklog', 200, {'agent': 'a'})


def _give_up(town: Place, call: Client) -> None:
    for verb in ('Retry', 'Drop'):
        puppet = enlist(town, f'dies-{verb}')
        lost = call('assignTask', 201, {'agent': puppet.name, 'task': 'x'})['task_id']
        puppet.take()
        puppet.dies()
        call('deadletterList', 200)
        call(f'deadletter{verb}', 200, id=lost)


def _talk(call: Client) -> None:
    call('sendMessage', 201, {'to': 'conductor', 'message': 'hello', 'kind': 'info', 'urgent': True})
    call('getInboxGet', 200, agent='conductor')
    call('getInboxPost', 200, {'limit': 1}, agent='conductor')
    call('agentAck', 200, {'all': True}, agent='conductor')
    call('eventsList', 200, query='?limit=500&type=task,message')
    call('eventsLatest', 200)


def _refuse(call: Client) -> None:
    call('agentGet', 404, agent='nobody')
    call('taskGet', 404, task_id=NOBODY)
    call('taskGet', 422, task_id='x')
    call('taskList', 422, query='?limit=0')
    call('taskList', 400, query='?limit=1&limit=1')
    call('spawnAgent', 409, {'name': 'A'})
    call('spawnAgent', 422, {'name': '-', 'cli': 3})
    call('spawnAgent', 400, b'{')
    call('sendMessage', 404, {'to': 'nobody', 'message': 'x'})
    call('deadletterRetry', 404, id=NOBODY)
    call('townReset', 409, {})
    operation = DOCUMENTED['addToBacklog'][2]
    text = call.hall.request('POST', '/v1/backlog', b'x', Content_Type='text/plain')
    assert text.status == 415
    call.check(operation, text)
    large = call.hall.post('/v1/backlog', {'description': 'x' * 1_100_000})
    assert large.status == 413
    call.check(operation, large)
    call.check(operation, call.hall.request('PUT', '/v1/backlog'))
    call.check(DOCUMENTED['getTown'][2], call.hall.get('/v1/town', Host='evil.example'))


def _end(call: Client) -> None:
    call('agentClose', 200, agent='a')
    call('killAgent', 200, {'force': True}, agent='b')
    call('restartAgent', 200, agent='b')
    call('recover', 200)
    call('reclaim', 200, {'to_backlog': True})
    call('recoveryOrphanTasks', 200, {'action': 'list'})
    call('killAgent', 200, {}, agent='b')
    call('pruneAgents', 200, {'all': True})
    call('townReset', 200, {'force': True})


# ----------------------------------------------------------------------------------------------------------- published

TEXT, WHOLE, FLAG, NUMBER, TEXTS = 'string', 'integer', 'boolean', 'number', ['string']
ACTED = {'status': TEXT, 'agent': TEXT}
ASSIGNED = {'task_id': TEXT, 'agent_id': TEXT, 'agent_name': TEXT}
AGENT = {'id': TEXT, 'name': TEXT, 'cli': TEXT, 'state': TEXT, 'rounds_completed': WHOLE, 'tasks_completed': WHOLE}
AGENT |= {'inbox_len': WHOLE, 'urgent_len': WHOLE}
INFO = {'name': TEXT, 'root': TEXT, 'redis_url': TEXT}
INBOX: dict[str, Any] = {'agent': TEXT, 'total': WHOLE, 'urgent': WHOLE}
INBOX |= {'messages': [{'id': TEXT, 'from': TEXT, 'type': TEXT, 'summary': TEXT}]}
PENDING = {'task_id': TEXT, 'description': TEXT, 'agent_id': TEXT, 'agent_name': TEXT}
SENDING = {'to': TEXT, 'message': TEXT, 'from': TEXT, 'kind': TEXT, 'urgent': FLAG}
READY = {'status': TEXT, 'redis': TEXT, 'dispatcher': TEXT, 'town': TEXT}
SCALING = dict.fromkeys(('town', 'timestamp', 'scaling_recommendation'), TEXT)
SCALING |= dict.fromkeys(('queue_depth', 'pending_tasks', 'in_flight_tasks', 'active_agents', 'cold_agents'), WHOLE)
SCALING |= dict.fromkeys(('desired_agents', 'max_agents'), WHOLE)

# The published API, from which clients were generated: operation id, method, path, required arguments, all arguments,
# status, answer.
PUBLISHED: list[tuple[str, str, str, list[str], dict[str, Any], int, dict[str, Any]]] = [
    ('healthCheck', 'get', '/healthz', [], {}, 200, {'status': TEXT}),
    ('readinessCheck', 'get', '/readyz', [], {}, 200, READY),
    ('scalingSignal', 'get', '/api/scaling', [], {}, 200, SCALING),
    ('getTown', 'get', '/v1/town', [], {}, 200, INFO),
    ('getStatus', 'get', '/v1/status', [], {'deep': FLAG}, 200, INFO | {'agent_count': WHOLE, 'agents': [AGENT]}),
    ('listAgents', 'get', '/v1/agents', [], {}, 200, {'agents': [AGENT], 'count': WHOLE}),
    ('spawnAgent', 'post', '/v1/agents', ['name'], {'name': TEXT, 'cli': TEXT}, 201,
     {'agent_id': TEXT, 'name': TEXT, 'cli': TEXT}),
    ('killAgent', 'post', '/v1/agents/{agent}/kill', [], {}, 200, ACTED),
    ('restartAgent', 'post', '/v1/agents/{agent}/restart', [], {}, 200, ACTED),
    ('pruneAgents', 'post', '/v1/agents/prune', [], {'all': FLAG}, 200, {'removed': WHOLE, 'agents': TEXTS}),
    ('assignTask', 'post', '/v1/tasks/assign', ['agent', 'task'], {'agent': TEXT, 'task': TEXT}, 201, ASSIGNED),
    ('listPendingTasks', 'get', '/v1/tasks/pending', [], {}, 200, {'tasks': [PENDING], 'count': WHOLE}),
    ('listBacklog', 'get', '/v1/backlog', [], {}, 200,
     {'backlog': [{'task_id': TEXT, 'description': TEXT, 'tags': TEXTS}], 'count': WHOLE}),
    ('addToBacklog', 'post', '/v1/backlog', ['description'], {'description': TEXT, 'tags': TEXTS}, 201,
     {'task_id': TEXT, 'description': TEXT}),
    ('claimBacklogTask', 'post', '/v1/backlog/{task_id}/claim', ['agent'], {'agent': TEXT}, 200, ASSIGNED),
    ('assignAllBacklog', 'post', '/v1/backlog/assign-all', ['agent'], {'agent': TEXT}, 200,
     {'assigned': WHOLE, 'tasks': TEXTS}),
    ('removeBacklogTask', 'delete', '/v1/backlog/{task_id}', [], {}, 200, {'removed': FLAG, 'task_id': TEXT}),
    ('sendMessage', 'post', '/v1/messages/send', ['to', 'message'], SENDING, 201,
     {'message_id': TEXT, 'to_agent': TEXT, 'urgent': FLAG}),
    ('getInboxGet', 'get', '/v1/agents/{agent}/inbox', [], {}, 200, INBOX),
    ('getInboxPost', 'post', '/v1/agents/{agent}/inbox', [], {}, 200, INBOX),
    ('recover', 'post', '/v1/recover', [], {}, 200, {'checked': WHOLE, 'recovered': WHOLE, 'agents': TEXTS}),
    ('reclaim', 'post', '/v1/reclaim', [], {'to_backlog': FLAG, 'to': TEXT, 'from': TEXT}, 200,
     {'reclaimed': WHOLE, 'destination': TEXT}),
]  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'method', 'path', 'required', 'sent', 'status', 'answer'), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_a_client_of_the_published_api_still_works(
    name: str, method: str, path: str, required: list[str], sent: dict[str, Any], status: int, answer: dict[str, Any]
) -> None:
    ours_method, ours_path, operation = DOCUMENTED[name]
    assert (ours_method, ours_path) == (method, path)
    query, body = parameters_of(operation, 'query'), body_of(operation)
    assert set(body.get('required', ())) | {field for field in query if query[field]['required']} <= set(required)
    accepted = body['properties'] | {field: query[field]['schema'] for field in query}
    for field, kind in sent.items():
        assert fits(kind, accepted[field]), field
    schema = answer_of(operation, status)['content']['application/json']['schema']
    assert fits(answer, schema), schema


def fits(kind: Any, schema: dict[str, Any]) -> bool:
    """Whether a schema promises what a client expects: a type, [items], or {name: …}. It may promise more."""
    if isinstance(kind, list):
        return 'array' in schema['type'] and fits(kind[0], schema['items'])
    if isinstance(kind, dict):
        properties = schema['properties']
        return set(kind) <= set(schema['required']) and all(fits(item, properties[name]) for name, item in kind.items())
    return kind == schema['type'] or kind in schema['type']
