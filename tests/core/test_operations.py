"""The table of operations: rows, schemas, dispatch, idempotency and paging; and what the operations do to a town."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from tinytown.core.dispatch import call, encode_answer
from tinytown.core.operations import BY_NAME, OPERATIONS, Op
from tinytown.errors import Conflict, Forbidden, Invalid, NotFound, TownError
from tinytown.model import ADMIN, CONDUCTOR_ID, MANAGE, READ, WRITE, Principal, Scope, new_id
from tinytown.state.store import Command, Step, text

from ..ground import Puppet, check, enlist, pipeline, redis, snapshot
from ..support import OPERATOR, Place

# --------------------------------------------------------------------------------------------------------- the table

# method, path, scope and status of the published REST API
CONTRACT = """
GET /v1/town town.read 200
GET /v1/status town.read 200
GET /v1/agents town.read 200
POST /v1/agents agent.manage 201
GET /v1/agents/{agent} town.read 200
GET /v1/agents/{agent}/result town.read 200
POST /v1/agents/{agent}/kill agent.manage 200
POST /v1/agents/{agent}/restart agent.manage 200
POST /v1/agents/{agent}/interrupt agent.manage 200
POST /v1/agents/{agent}/resume agent.manage 200
POST /v1/agents/{agent}/close agent.manage 200
POST /v1/agents/{agent}/wait town.read 200
POST /v1/agents/prune agent.manage 200
GET /v1/agents/{agent}/inbox town.read 200
POST /v1/agents/{agent}/inbox town.read 200
POST /v1/agents/{agent}/inbox/ack town.write 200
POST /v1/tasks/assign town.write 201
GET /v1/tasks/pending town.read 200
GET /v1/tasks town.read 200
GET /v1/tasks/{task_id} town.read 200
POST /v1/tasks/{task_id}/complete town.write 200
POST /v1/tasks/{task_id}/fail town.write 200
POST /v1/tasks/{task_id}/cancel town.write 200
POST /v1/tasks/{task_id}/retry town.write 200
GET /v1/backlog town.read 200
POST /v1/backlog town.write 201
POST /v1/backlog/{task_id}/claim town.write 200
POST /v1/backlog/assign-all town.write 200
DELETE /v1/backlog/{task_id} town.write 200
POST /v1/messages/send town.write 201
POST /v1/recover agent.manage 200
POST /v1/reclaim agent.manage 200
POST /v1/reclaim/orphan-tasks agent.manage 200
""".strip().splitlines()

every_row = pytest.mark.parametrize('op', OPERATIONS, ids=[op.name for op in OPERATIONS])


@pytest.mark.parametrize('line', CONTRACT)
def test_every_line_of_the_contract_has_a_row(line: str) -> None:
    method, path, scope, status = line.split()
    row = next(op for op in OPERATIONS if op.path == path and method in (op.method, op.also))
    assert (row.scope, row.status) == (scope, int(status))


def test_no_two_rows_share_a_name_a_command_or_a_route() -> None:
    routes = [(method, op.path) for op in OPERATIONS for method in (op.method, op.also) if method]
    for column in ([op.name for op in OPERATIONS], [op.cli for op in OPERATIONS], routes):
        assert [each for each, count in Counter(column).items() if count > 1] == []


@every_row
def test_a_row_is_complete(op: Op) -> None:
    assert op.summary.endswith(('.', ':')) or ': ' in op.summary
    assert 10 < len(op.summary) < 200
    assert op.scope in get_args(Scope)
    assert op.method in ('GET', 'POST', 'DELETE')
    assert (op.scope == READ) or op.method != 'GET'
    assert set(op.placeholders) <= {name for name, parameter in op.parameters.items() if parameter.required}
    assert op.path.count('{') == len(op.placeholders)


@every_row
def test_the_schemas_of_a_row_are_valid_and_its_defaults_fit(op: Op) -> None:
    Draft202012Validator.check_schema(op.input)
    Draft202012Validator.check_schema(op.output)
    assert op.output['type'] == 'object'
    assert op.output['required']
    assert 'next_cursor' not in op.output['required']
    for name, schema in op.input['properties'].items():
        assert schema.get('description') or schema['type'] == 'boolean' or 'enum' in schema, name
        if 'default' in schema:
            Draft202012Validator(schema).validate(schema['default'])


# ----------------------------------------------------------------------------------- real answers against the schemas


def closed(schema: Any) -> Any:
    """A schema that refuses fields it does not name. Events are exempt, because their fields depend on their type."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(each) for name, each in schema.items()}
    is_event = {'id', 'type', 'at'} == set(inner.get('properties', ()))
    return inner | ({'additionalProperties': False} if 'properties' in inner and not is_event else {})


def watched(step: Step[Any], trips: list[Command]) -> Step[Any]:
    """Runs a step and appends its commands to `trips`."""
    try:
        command = next(step)
        while True:
            trips.append(command)
            try:
                reply = yield command
            except TownError as e:
                command = step.throw(e)
            else:
                command = step.send(reply)
    except StopIteration as end:
        return end.value


class Scene:
    """Runs operations on a town. Checks every answer against its schema, and counts the round trips."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.done: set[str] = set()

    def __call__(self, name: str, /, **arguments: Any) -> Any:
        op, store = BY_NAME[name], self.place.store
        named = {key.rstrip('_'): value for key, value in arguments.items()}
        trips: list[Command] = []
        answer = json.loads(encode_answer(store.run(watched(call(self.place.town, OPERATOR, op, named), trips))))
        if not op.slow:
            assert len(trips) <= 1, f'{name} took {len(trips)} round trips'
        assert {each.by for each in trips if each.script} <= {OPERATOR.name}, f'{name} did not name the caller'
        schema = closed(op.output)
        Draft202012Validator(schema).validate(answer)
        for missing in op.output['required']:
            rest = {key: value for key, value in answer.items() if key != missing}
            assert not Draft202012Validator(schema).is_valid(rest), f'{name} may leave out {missing}'
        self.done.add(name)
        return answer


def test_the_answer_of_every_operation_has_the_shape_that_its_row_publishes(place: Place) -> None:
    scene = Scene(place)
    assert set(scene('town.get')) == {'name', 'root', 'redis_url'}
    assert scene('town.list_hosts') == {'hosts': [], 'count': 0}
    spawned = scene('agent.spawn', name='backend', cli='demo', role_id='worker', nickname='Bo')
    assert set(spawned) == {'agent_id', 'name', 'cli', 'role_id', 'nickname', 'parent_agent_id'}
    child = scene('agent.spawn', name='child', parent_agent_id='backend')
    assert child['parent_agent_id'] == spawned['agent_id']
    assert child['cli'] == 'demo'
    task = scene('task.assign', agent='backend', task='hello')
    assert task == {'task_id': task['task_id'], 'agent_id': spawned['agent_id'], 'agent_name': 'backend'}
    place.await_end(task['task_id'])
    assert scene('task.get', task_id=task['task_id'])['state'] == 'completed'
    assert scene('agent.get_result', agent='backend')['task']['task_id'] == task['task_id']
    assert scene('agent.get_result', agent='child') == {'agent': 'child', 'task': None}
    assert scene('agent.interrupt', agent='child') == {'status': 'paused', 'agent': 'child'}
    held = scene('task.assign', agent='child', task='later')['task_id']
    listed = scene('task.list_pending')
    assert listed == {
        'tasks': [{'task_id': held, 'description': 'later', 'agent_id': child['agent_id'], 'agent_name': 'child'}],
        'count': 1,
    }
    sent = scene('message.send', to='child', message='what?', from_='backend', kind='query', urgent=True)
    assert sent == {'message_id': sent['message_id'], 'to_agent': 'child', 'urgent': True}
    box = scene('agent.inbox', agent='child')
    assert (box['agent'], box['total'], box['urgent']) == ('child', 1, 1)
    assert box['messages'] == [
        {'id': sent['message_id'], 'from': spawned['agent_id'], 'type': 'query', 'summary': 'what?'},
        {'id': held, 'from': box['messages'][1]['from'], 'type': 'task_assign', 'summary': 'later'},
    ]
    assert scene('agent.ack', agent='child', ids=[sent['message_id']]) == {'agent': 'child', 'removed': 1}
    added = [scene('backlog.add', description=f'd{i}', tags=['x'])['task_id'] for i in range(4)]
    assert scene('backlog.list', limit=1)['backlog'] == [{'task_id': added[0], 'description': 'd0', 'tags': ['x']}]
    assert scene('backlog.remove', task_id=added[0]) == {'removed': True, 'task_id': added[0]}
    assert scene('backlog.claim', task_id=added[1], agent='child')['agent_name'] == 'child'
    assert scene('task.complete', task_id=added[1], result='by hand') == {'task_id': added[1], 'state': 'completed'}
    assert scene('task.fail', task_id=added[2], error='no') == {'task_id': added[2], 'state': 'failed'}
    assert scene('task.retry', task_id=added[2]) == {'task_id': added[2], 'state': 'pending'}
    assert scene('task.cancel', task_id=added[3]) == {'task_id': added[3], 'state': 'cancelled'}
    assert scene('backlog.assign_all', agent='child') == {'assigned': 1, 'tasks': [added[2]]}
    changes = scene('task.history', task_id=task['task_id'])['history']
    assert [each['type'] for each in changes] == ['task.created', 'task.assigned', 'task.started', 'task.completed']
    assert [each.get('by') for each in changes] == ['operator', 'operator', 'backend', 'backend']
    page = scene('events.list', task=task['task_id'], limit=2)
    assert [each['type'] for each in page['events']] == ['task.created', 'task.assigned']
    assert (page['next_after'], page['more']) == (page['events'][-1]['id'], True)
    assert scene('events.latest', agent='backend', limit=1)['events'][0]['type'] == 'task.completed'
    log = scene('agent.logs', agent='backend')
    assert (log['agent'], log['offset'], log['next_offset']) == ('backend', 0, log['size'])
    assert 'demo: done: hello' in log['text']
    puppet = enlist(place, 'puppet')
    held_by_puppet = scene('task.assign', agent='puppet', task='hold')['task_id']
    assert puppet.take() == (held_by_puppet, 1)
    assert scene('task.release', task_id=held_by_puppet, attempt=1) == {'task_id': held_by_puppet, 'state': 'pending'}
    letters = [puppet.die_of(scene('task.assign', agent='puppet', task=f'poison {i}')['task_id']) for i in range(2)]
    listed = scene('deadletter.list')
    assert listed['count'] == 2
    assert listed['dead_letters'][0] | {'died_at': ''} == {
        'id': letters[0],
        'kind': 'task',
        'agent_name': 'puppet',
        'text': 'poison 0',
        'attempts': 3,
        'why': 'given up after attempt 3: it was poison',
        'died_at': '',
    }
    assert scene('deadletter.retry', id=letters[0]) == {'id': letters[0], 'kind': 'task', 'status': 'retried'}
    assert scene('deadletter.drop', id=letters[1]) == {'id': letters[1], 'kind': 'task', 'status': 'dropped'}
    puppet.depart()
    assert scene('task.list')['count'] == 8
    agent = scene('agent.get', agent='backend')
    assert scene('agent.list')['agents'][0].keys() == agent.keys()
    assert scene('agent.list', open=True)['count'] == 2
    status = scene('town.get_status')
    assert set(status) == {'name', 'root', 'redis_url', 'agent_count', 'agents'}
    deep = scene('town.get_status', deep=True)
    assert deep['tasks']['assigned'] == 2
    assert deep['recent_events'][0]['id'] > deep['recent_events'][1]['id']
    assert scene('agent.restart', agent='backend') == {'status': 'restarted', 'agent': 'backend'}
    assert scene('agent.close', agent='backend')['status'] == 'draining'
    assert scene('agent.wait', agent='backend') == {'agent': 'backend', 'state': 'Stopped', 'done': True}
    assert scene('agent.kill', agent='child', force=True) == {'status': 'stopped', 'agent': 'child'}
    orphans = scene('recovery.orphan_tasks')
    assert {each['reason'] for each in orphans['orphans']} == {'agent_terminal'}
    assert {each['task_id'] for each in orphans['orphans']} == {held, added[2]}
    assert scene('recovery.reclaim_tasks', to_backlog=True) == {'reclaimed': 2, 'destination': 'backlog'}
    assert scene('recovery.recover_agents') == {'checked': 3, 'recovered': 0, 'agents': []}
    assert scene('agent.prune') == {'removed': 3, 'agents': ['backend', 'child', 'puppet']}
    scene('agent.spawn', name='resumed')
    scene('agent.interrupt', agent='resumed')
    assert scene('agent.resume', agent='resumed')['status'] == 'idle'
    assert scene('town.reset', force=True) == {'agents': 1, 'tasks': 8}
    assert scene.done == set(BY_NAME)
    check(place)


# ---------------------------------------------------------------------------------------------------------- dispatch


@every_row
def test_a_caller_without_the_scope_of_a_row_is_refused_before_anything_else(ground: Place, op: Op) -> None:
    for scope in (READ, WRITE, MANAGE):
        caller = Principal('someone', frozenset({scope}))
        with pytest.raises(Forbidden if scope != op.scope else Invalid) as caught:
            ground.do(op.name, by=caller, no_such_argument=1)
        if scope != op.scope:
            assert f'needs the scope {op.scope}' in caught.value.detail
    with pytest.raises(Invalid):
        ground.do(op.name, by=Principal('root', frozenset({ADMIN})), no_such_argument=1)


def test_an_event_and_the_history_of_a_task_name_the_caller(ground: Place) -> None:
    agent = enlist(ground, 'a')
    by = Principal('key-7', frozenset({WRITE}), agent.id, 'a')
    task = ground.do('task.assign', by=by, agent='a', task='x')['task_id']
    ground.do('task.cancel', by=Principal('key "8"', frozenset({WRITE})), task_id=task)
    log = [
        json.loads(line) for line in redis(ground, 'LRANGE', ground.store.prefix + f'task:{task}:log'.encode(), 0, -1)
    ]
    assert [(each['type'], each['by']) for each in log] == [
        ('task.created', 'a'),
        ('task.assigned', 'a'),
        ('task.cancelled', 'key "8"'),
    ]
    assert [{k: v for k, v in each.items() if k != 'id'} for each in ground.history()[-3:]] == log


# ----------------------------------------------------------------------------------------------------- naming agents


def test_an_agent_is_found_by_its_name_in_any_case_its_id_or_a_unique_start_of_the_id(ground: Place) -> None:
    agent = enlist(ground, 'Backend')
    for ref in ('Backend', 'BACKEND', 'backend', agent.id, agent.id[:4], agent.id[:13]):
        assert ground.do('agent.get', agent=ref)['id'] == agent.id


@pytest.mark.parametrize('ref', ['nobody', 'abc', '00000000', 'Back'])
def test_an_unknown_agent_is_not_found(ground: Place, ref: str) -> None:
    enlist(ground, 'Backend')
    with pytest.raises(NotFound, match=f"Agent '{ref}' not found"):
        ground.do('agent.get', agent=ref)


def test_a_start_of_two_ids_is_ambiguous_and_three_characters_are_too_few(ground: Place) -> None:
    ids = ['abcd1111' + new_id()[8:], 'abcd2222' + new_id()[8:]]
    for number, agent_id in enumerate(ids):
        head = f'{{"id":"{agent_id}","name":"n{number}","cli":"demo"'
        ground.store.call(ground.store.register(agent_id, f'n{number}', head, 9, 0, new_id()))
    with pytest.raises(Conflict) as caught:
        ground.do('agent.interrupt', agent='abcd')
    assert caught.value.code == 'ambiguous-agent'
    with pytest.raises(NotFound):
        ground.do('agent.interrupt', agent='abc')
    assert ground.do('agent.interrupt', agent='abcd2')['agent'] == 'n1'


@pytest.mark.parametrize('ref', ['conductor', 'Supervisor', '00000000-0000-0000-0000-000000000001'])
def test_the_conductor_is_a_mailbox_and_not_an_agent(ground: Place, ref: str) -> None:
    ground.do('message.send', to=ref, message='help')
    assert ground.do('agent.inbox', agent=ref)['messages'][0]['summary'] == 'help'
    for operation in ('agent.get', 'agent.kill', 'agent.close', 'agent.restart'):
        with pytest.raises(Conflict) as caught:
            ground.do(operation, agent=ref)
        assert caught.value.code == 'not-a-worker'
    with pytest.raises(TownError):
        ground.do('task.assign', agent=ref, task='x')
    if ref != ref.strip('0123456789-'):
        return
    with pytest.raises(Invalid):
        ground.do('agent.spawn', name=ref)


def test_agent_names_are_unique_regardless_of_case(ground: Place) -> None:
    enlist(ground, 'Backend')
    with pytest.raises(Conflict) as caught:
        enlist(ground, 'bACKEND')
    assert caught.value.code == 'name-taken'
    assert ground.do('agent.list')['count'] == 1
    check(ground)


def test_only_live_agents_count_against_the_limit(ground: Place) -> None:
    def register(name: str, most: int = 2) -> str:
        agent_id = new_id()
        head = f'{{"id":"{agent_id}","name":"{name}","cli":"demo"'
        ground.store.call(ground.store.register(agent_id, name, head, most, 0, new_id()))
        return agent_id

    first = register('a')
    register('b')
    with pytest.raises(Conflict) as caught:
        register('c')
    assert caught.value.code == 'max-agents'
    ground.store.call(ground.store.depart(first, '', 'Stopped', 'test', 'backlog'))
    register('c')
    with pytest.raises(Conflict) as caught:
        ground.store.call(ground.store.restarting('a', 2, new_id()))
    assert caught.value.code == 'max-agents'
    check(ground)


# ------------------------------------------------------------------------------------------------ assigning, claiming

GIVING: dict[str, Callable[[Place, str, str], Any]] = {
    'task.assign': lambda place, agent, _task: place.do('task.assign', agent=agent, task='new'),
    'backlog.claim': lambda place, agent, task: place.do('backlog.claim', agent=agent, task_id=task),
    'backlog.assign_all': lambda place, agent, _task: place.do('backlog.assign_all', agent=agent),
    'recovery.reclaim_tasks': lambda place, agent, _task: place.do('recovery.reclaim_tasks', to=agent),
}


@pytest.mark.parametrize('operation', GIVING)
@pytest.mark.parametrize('state', ['unknown', 'Stopped', 'Error', 'Draining'])
def test_work_for_an_agent_that_does_not_accept_it_is_refused_and_nothing_moves(
    ground: Place, operation: str, state: str
) -> None:
    stopped = enlist(ground, 'at-rest')
    ground.do('task.assign', agent='at-rest', task='left behind')
    stopped.depart()
    agent = enlist(ground, 'a')
    if state == 'Draining':
        ground.do('agent.close', agent='a')
    elif state != 'unknown':
        agent.depart(state)
    task = ground.do('backlog.add', description='x')['task_id']
    before = snapshot(ground)
    with pytest.raises(NotFound if state == 'unknown' else Conflict) as caught:
        GIVING[operation](ground, 'worker-99' if state == 'unknown' else 'a', task)
    if state == 'unknown':
        assert caught.value.detail == "Agent 'worker-99' not found"
    else:
        assert caught.value.code == 'agent-not-accepting'
        assert f"'a' is {state}" in caught.value.detail
    assert snapshot(ground) == before


def test_a_task_outside_the_backlog_cannot_be_claimed_or_removed(ground: Place) -> None:
    enlist(ground, 'a')
    enlist(ground, 'b')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    claimer: dict[str, Any] = {'agent': 'b'}
    for operation, more in (('backlog.claim', claimer), ('backlog.remove', {})):
        with pytest.raises(Conflict) as caught:
            ground.do(operation, task_id=task, **more)
        assert caught.value.code == 'task-not-pending'
        with pytest.raises(NotFound):
            ground.do(operation, task_id=new_id(), **more)
    assert ground.do('task.get', task_id=task)['agent_name'] == 'a'


def test_of_many_claimers_exactly_one_gets_each_task(ground: Place) -> None:
    agents = [enlist(ground, f'a{number}') for number in range(32)]
    tasks = [ground.do('backlog.add', description=f't{number}')['task_id'] for number in range(50)]
    barrier = threading.Barrier(32)

    def claim(agent: Puppet) -> list[tuple[str, str]]:
        mine = random.Random(agent.name).sample(tasks, len(tasks))
        won = []
        barrier.wait()
        for task in mine:
            try:
                won.append((task, ground.do('backlog.claim', task_id=task, agent=agent.name)['agent_id']))
            except Conflict as e:
                assert e.code == 'task-not-pending'  # noqa: PT017
        ground.store.close()
        return won

    with ThreadPoolExecutor(32) as pool:
        won = [each for found in pool.map(claim, agents) for each in found]
    assert sorted(task for task, _ in won) == sorted(tasks)
    for task, agent_id in won:
        assert ground.do('task.get', task_id=task)['agent_id'] == agent_id
    check(ground)


def test_assign_all_assigns_the_oldest_tasks_first_at_most_two_hundred_a_call(ground: Place) -> None:
    agent = enlist(ground, 'a')
    heads = [(new_id(), number) for number in range(230)]
    pipeline(
        ground,
        [
            ground.store.backlog_add((task, f'{{"task_id":"{task}","description":"{n}"', '"d"', '[]', agent.id, 3))
            for task, n in heads
        ],
    )
    given = ground.do('backlog.assign_all', agent='a')
    assert given == {'assigned': 200, 'tasks': [task for task, _ in heads[:200]]}
    assert ground.do('backlog.assign_all', agent='a')['assigned'] == 30
    assert ground.do('backlog.assign_all', agent='a') == {'assigned': 0, 'tasks': []}
    assert agent.take() == (heads[0][0], 1)
    check(ground)


# --------------------------------------------------------------------------------------------------------- finishing


def running(place: Place) -> tuple[Puppet, str]:
    agent = enlist(place, 'a')
    task = place.do('task.assign', agent='a', task='x')['task_id']
    assert agent.take() == (task, 1)
    return agent, task


@pytest.mark.parametrize('verb', ['complete', 'fail'])
def test_a_repeated_report_of_an_attempt_is_accepted_and_counts_once(ground: Place, verb: str) -> None:
    agent, task = running(ground)
    first = ground.do(f'task.{verb}', task_id=task, attempt=1)
    ended = ground.do('task.get', task_id=task)
    assert ground.do(f'task.{verb}', task_id=task, attempt=1) == first
    assert ground.do('task.get', task_id=task) == ended
    assert agent.show()['tasks_completed'] == (verb == 'complete')
    kinds = Counter(event['type'] for event in ground.history())
    assert kinds[f'task.{first["state"]}'] == 1
    other = 'fail' if verb == 'complete' else 'complete'
    with pytest.raises(Conflict) as caught:
        ground.do(f'task.{other}', task_id=task, attempt=1)
    assert caught.value.code == 'task-finished'
    check(ground)


@pytest.mark.parametrize('attempt', [2, 99])
def test_a_report_of_an_attempt_other_than_the_current_one_changes_nothing(ground: Place, attempt: int) -> None:
    _, task = running(ground)
    before = snapshot(ground)
    with pytest.raises(Conflict) as caught:
        ground.do('task.complete', task_id=task, attempt=attempt)
    assert caught.value.code == 'stale-attempt'
    assert snapshot(ground) == before


def test_an_attempt_that_lost_its_task_is_stale_before_and_after_the_next_attempt(ground: Place) -> None:
    agent, task = running(ground)
    agent.depart(to='inbox')
    with pytest.raises(Conflict) as caught:
        agent.finish(task, 1)
    assert caught.value.code == 'stale-attempt'
    agent.revive(new_id())
    assert agent.take() == (task, 2)
    with pytest.raises(Conflict):
        agent.finish(task, 1)
    assert agent.finish(task, 2) == ['done', 'completed']
    check(ground)


@pytest.mark.parametrize('prepare', ['pending', 'assigned', 'running'])
@pytest.mark.parametrize('verb', ['complete', 'fail', 'cancel'])
def test_an_operator_can_end_a_task_in_any_unfinished_state(ground: Place, prepare: str, verb: str) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('backlog.add', description='x')['task_id']
    if prepare != 'pending':
        ground.do('backlog.claim', task_id=task, agent='a')
    if prepare == 'running':
        agent.take()
    ended = ground.do(f'task.{verb}', task_id=task)['state']
    assert ground.do('task.get', task_id=task)['ended_at']
    assert ground.do('agent.inbox', agent='a')['total'] == 0
    last = ground.history()[-1]
    assert last['type'] == f'task.{ended}'
    assert last.get('why') == (None if verb == 'cancel' else 'operator override')
    for again in ('complete', 'fail', 'cancel'):
        with pytest.raises(Conflict) as caught:
            ground.do(f'task.{again}', task_id=task)
        assert caught.value.code == 'task-finished'
    check(ground)


def test_a_report_of_a_cancelled_attempt_is_refused(ground: Place) -> None:
    agent, task = running(ground)
    ground.do('task.cancel', task_id=task)
    with pytest.raises(Conflict) as caught:
        agent.finish(task, 1)
    assert caught.value.code == 'task-finished'
    assert ground.do('task.get', task_id=task)['state'] == 'cancelled'


@pytest.mark.parametrize('verb', ['fail', 'cancel'])
def test_the_attempt_number_of_a_retried_task_goes_on_rising(ground: Place, verb: str) -> None:
    agent, task = running(ground)
    ground.do(f'task.{verb}', task_id=task)
    assert ground.do('task.retry', task_id=task)['state'] == 'pending'
    fresh = ground.do('task.get', task_id=task)
    assert [fresh[name] for name in ('attempt', 'agent_id', 'result', 'error', 'started_at', 'ended_at')] == [1] + [
        None
    ] * 5
    agent.round_done()
    ground.do('backlog.claim', task_id=task, agent='a')
    assert agent.take() == (task, 2)
    key = ground.store.prefix + f'task:{task}'.encode()
    assert int(redis(ground, 'HGET', key, 'max')) == 1 + ground.town.config.agent.max_attempts
    check(ground)


@pytest.mark.parametrize('state', ['pending', 'assigned', 'running', 'completed'])
def test_only_a_failed_or_cancelled_task_can_be_retried(ground: Place, state: str) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('backlog.add', description='x')['task_id']
    if state != 'pending':
        ground.do('backlog.claim', task_id=task, agent='a')
    if state in ('running', 'completed'):
        agent.take()
    if state == 'completed':
        agent.finish(task, 1)
    with pytest.raises(Conflict) as caught:
        ground.do('task.retry', task_id=task)
    assert caught.value.code == 'task-not-failed'
    assert ground.do('task.get', task_id=task)['state'] == state


@pytest.mark.parametrize('verb', ['get', 'complete', 'fail', 'cancel', 'retry'])
def test_an_unknown_task_is_not_found(ground: Place, verb: str) -> None:
    task = new_id()
    with pytest.raises(NotFound, match=f"Task '{task}' not found"):
        ground.do(f'task.{verb}', task_id=task)


@pytest.mark.parametrize(
    'content',
    ['"; DROP', 'a\\b\n\t"quoted" / \u2028 ä 🎉', '{"json": [1, null]}', ']]} --', "$(rm -rf /) `x` 'y'", '%s %d'],
)
def test_text_comes_back_as_it_was_given(ground: Place, content: str) -> None:
    agent = enlist(ground, 'a')
    first = ground.do('task.assign', agent='a', task=content)['task_id']
    ground.do('message.send', to='a', message=content)
    assert ground.do('agent.inbox', agent='a')['messages'][0]['summary'] == content
    agent.take()
    assert ground.do('agent.get', agent='a')['current_scope'] == content.split('\n')[0]
    ground.do('task.fail', task_id=first, error=content)
    tag = content.replace(',', '').replace('\n', '').replace('\t', '')[:63]
    second = ground.do('backlog.add', description=content, tags=[tag])['task_id']
    listed = {task['task_id']: task for task in ground.do('task.list')['tasks']}
    assert (listed[first]['description'], listed[first]['error'], listed[second]['tags']) == (content, content, [tag])
    assert ground.do('backlog.list')['backlog'][0]['description'] == content


# ---------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize('to', ['', 'b'])
def test_reclaim_moves_the_queued_work_of_a_stopped_agent(ground: Place, to: str) -> None:
    a, b = enlist(ground, 'a'), enlist(ground, 'b')
    tasks = [ground.do('task.assign', agent='a', task=f't{i}')['task_id'] for i in range(3)]
    ground.do('message.send', to='a', message='m')
    ground.do('message.send', to='a', message='u', urgent=True)
    assert ground.do('recovery.reclaim_tasks')['reclaimed'] == 0  # a is live
    a.depart()
    arguments: dict[str, Any] = {'to': 'B'} if to else {}
    moved = ground.do('recovery.reclaim_tasks', **arguments)
    assert moved == {'reclaimed': 3, 'destination': to or 'backlog'}
    if to:
        box = ground.do('agent.inbox', agent='b')
        assert [each['summary'] for each in box['messages']] == ['u', 'm', 't0', 't1', 't2']
        assert ground.do('agent.inbox', agent='a')['messages'] == []
        assert b.take() == (tasks[0], 1)
    else:
        assert [each['task_id'] for each in ground.do('backlog.list')['backlog']] == tasks
        assert len(ground.do('agent.inbox', agent='a')['messages']) == 2
    check(ground)


def test_reclaim_from_a_live_agent_or_to_two_places_is_refused(ground: Place) -> None:
    enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='x')
    for arguments in ({'from_': 'a'}, {'to': 'a', 'to_backlog': True}):
        with pytest.raises(Conflict):
            ground.do('recovery.reclaim_tasks', **arguments)
    assert ground.do('agent.inbox', agent='a')['total'] == 1


@pytest.mark.parametrize('action', ['list', 'to_backlog', 'cancel', 'delete'])
def test_orphans_are_listed_requeued_cancelled_or_deleted(ground: Place, action: str) -> None:
    gone, rests, lives = enlist(ground, 'gone'), enlist(ground, 'rests'), enlist(ground, 'lives')
    of_gone, of_rests, of_lives = (
        ground.do('task.assign', agent=agent.id, task='x')['task_id'] for agent in (gone, rests, lives)
    )
    rests.depart()
    prefix = text(ground.store.prefix)
    redis(ground, 'DEL', f'{prefix}agent:{gone.id}')  # damage that no operation causes
    for key in ('ids', 'agents', 'live'):
        redis(ground, 'ZREM', prefix + key, gone.id)
    redis(ground, 'HDEL', f'{prefix}names', 'gone')
    found = ground.do('recovery.orphan_tasks', action=action)
    assert (found['action'], found['count']) == (action, 2)
    reasons = {each['task_id']: (each['assigned_to'], each['reason']) for each in found['orphans']}
    assert reasons == {of_gone: (gone.id, 'agent_missing'), of_rests: (rests.id, 'agent_terminal')}
    expected = {'list': 'assigned', 'to_backlog': 'pending', 'cancel': 'cancelled', 'delete': None}[action]
    states = {task['task_id']: task['state'] for task in ground.do('task.list')['tasks']}
    assert states == {of_lives: 'assigned'} | ({of_gone: expected, of_rests: expected} if expected else {})
    if action == 'list':
        ground.do('task.complete', task_id=of_gone)  # finishes the task without creating a record of its agent
        ground.do('recovery.orphan_tasks', action='to_backlog')
    check(ground)


def test_reset_leaves_nothing_but_the_town_and_its_event_ids_go_on_rising(ground: Place) -> None:
    agent, _ = running(ground)
    for number in range(5):
        ground.do('task.assign', agent='a', task=f't{number}')
        ground.do('backlog.add', description=f'b{number}')
    ground.do('message.send', to='conductor', message='x')
    with pytest.raises(Conflict) as caught:
        ground.do('town.reset')
    assert caught.value.code == 'force-needed'
    agent.depart()
    last = ground.history()[-1]['id']
    assert ground.do('town.reset', agents_only=True, force=True) == {'agents': 1, 'tasks': 0}
    assert ground.do('backlog.list')['count'] == 11
    check(ground)
    assert ground.do('town.reset', force=True) == {'agents': 0, 'tasks': 11}
    assert set(snapshot(ground)) == {'town'}
    history = ground.history()
    assert [event['type'] for event in history] == ['town.reset']
    stream = redis(ground, 'XINFO', 'STREAM', ground.store.prefix + b'events')
    assert int(stream[stream.index(b'entries-added') + 1]) > 20  # the stream was not deleted, so its ids can't go back
    assert history[0]['id'] > last


@pytest.mark.parametrize('by', ['ids', 'all'])
def test_messages_are_removed_by_id_or_all_at_once_and_tasks_stay(ground: Place, by: str) -> None:
    enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='stays')
    ids = [new_id() for _ in range(130)]
    pipeline(
        ground,
        [
            ground.store.send('a', '', 'un'[number % 2], each, f'","type":"task","summary":"{number}"}}', 'task')
            for number, each in enumerate(ids)
        ],
    )
    arguments: dict[str, Any] = {'ids': [*ids[3::10], ids[3], new_id()]} if by == 'ids' else {'all': True}
    assert ground.do('agent.ack', agent='a', **arguments) == {'agent': 'a', 'removed': 13 if by == 'ids' else 130}
    left = {each['id'] for each in ground.do('agent.inbox', agent='a')['messages'] if each['type'] == 'task'}
    assert left == (set(ids) - set(ids[3::10]) if by == 'ids' else set())
    assert ground.do('agent.inbox', agent='a')['messages'][-1]['summary'] == 'stays'
    wrongs: list[dict[str, Any]] = [{}, {'ids': ids[:1], 'all': True}, {'ids': []}]
    for wrong in wrongs:
        with pytest.raises(Invalid):
            ground.do('agent.ack', agent='a', **wrong)


# ------------------------------------------------------------------------------------------------------- idempotency


def test_many_requests_with_one_key_have_one_effect_and_one_answer(ground: Place) -> None:
    enlist(ground, 'a')
    barrier = threading.Barrier(20)

    def ask(_: int) -> Any:
        barrier.wait()
        answer = ground.do('task.assign', agent='a', task='once', key='k1')
        ground.store.close()
        return answer

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert answers == [answers[0]] * 20
    assert ground.do('task.list')['count'] == 1
    assert ground.do('agent.inbox', agent='a')['total'] == 1
    check(ground)


def test_an_idempotency_key_belongs_to_one_request_caller_and_operation(ground: Place) -> None:
    enlist(ground, 'a')
    first = ground.do('task.assign', agent='a', task='x', key='k:1')
    with pytest.raises(Invalid) as caught:
        ground.do('task.assign', agent='a', task='y', key='k:1')
    assert caught.value.code == 'idempotency-mismatch'
    assert "'k:1'" in caught.value.detail
    someone = Principal('someone', frozenset({WRITE}))
    assert ground.do('task.assign', by=someone, agent='a', task='x', key='k:1') != first
    ground.do('backlog.add', description='x', key='k:1')
    assert ground.do('task.list')['count'] == 3


def test_callers_with_separators_in_their_names_do_not_share_idempotency_keys(ground: Place) -> None:
    scopes = frozenset({WRITE})
    for name, key in (('a', 'backlog.add:k'), ('a:backlog.add', 'k'), ('a backlog.add', 'k')):
        ground.do('backlog.add', by=Principal(name, scopes), description='x', key=key)
    assert ground.do('backlog.list')['count'] == 3


ANSWERS: dict[str, dict[str, Any]] = {
    'backlog.assign_all': {'agent': 'a'},
    'recovery.orphan_tasks': {'action': 'list'},
    'message.send': {'to': 'a', 'message': 'ä "quoted" \\'},
    'backlog.add': {'description': 'x', 'tags': []},
    'agent.ack': {'agent': 'a', 'all': True},
    'agent.interrupt': {'agent': 'a'},
    'recovery.reclaim_tasks': {},
}


@pytest.mark.parametrize('operation', ANSWERS)
def test_a_repeated_request_gets_the_first_answer_for_a_day(ground: Place, operation: str) -> None:
    enlist(ground, 'a')
    first = ground.do(operation, key='k', **ANSWERS[operation])
    before = snapshot(ground)
    assert ground.do(operation, key='k', **ANSWERS[operation]) == first
    assert snapshot(ground) == before
    (record,) = (key for key in before if key.startswith('idem:'))
    assert 86_000 < redis(ground, 'TTL', text(ground.store.prefix) + record) <= 86_400


def test_a_failed_request_leaves_its_idempotency_key_free(ground: Place) -> None:
    for _ in range(2):
        with pytest.raises(NotFound):
            ground.do('task.assign', agent='late', task='x', key='k')
    enlist(ground, 'late')
    assert ground.do('task.assign', agent='late', task='x', key='k')['agent_name'] == 'late'


def test_a_read_ignores_the_idempotency_key(ground: Place) -> None:
    assert ground.do('backlog.list', key='k')['count'] == 0
    ground.do('backlog.add', description='x')
    assert ground.do('backlog.list', key='k')['count'] == 1
    assert not [key for key in snapshot(ground) if key.startswith('idem:')]


def started(place: Place, **arguments: Any) -> Any:
    """A slow operation that has reserved its key but not begun its work, and its next command."""
    step = call(place.town, OPERATOR, BY_NAME['recovery.reclaim_tasks'], arguments, 'k')
    return step, step.send(place.store.call(next(step)))


def test_a_repeated_slow_operation_is_in_progress_until_the_first_one_has_ended(ground: Place) -> None:
    enlist(ground, 'a')
    step, command = started(ground, to='a')
    with pytest.raises(Conflict) as caught:
        ground.do('recovery.reclaim_tasks', to='a', key='k')
    assert (caught.value.code, caught.value.retry_after) == ('in-progress', 1)
    with pytest.raises(Invalid) as mismatch:
        ground.do('recovery.reclaim_tasks', key='k')
    assert mismatch.value.code == 'idempotency-mismatch'
    first = _finish(ground, step, command)
    assert ground.do('recovery.reclaim_tasks', to='a', key='k') == first == {'reclaimed': 0, 'destination': 'a'}


def _finish(place: Place, step: Any, command: Command) -> Any:
    """Runs a started step to its end, and returns the answer."""
    try:
        while True:
            command = step.send(place.store.call(command))
    except StopIteration as end:
        return json.loads(encode_answer(end.value))


def test_a_failed_slow_operation_frees_its_key(ground: Place) -> None:
    with pytest.raises(NotFound):
        ground.do('recovery.reclaim_tasks', to='late', key='k')
    enlist(ground, 'late')
    assert ground.do('recovery.reclaim_tasks', to='late', key='k')['destination'] == 'late'


def test_a_crashed_slow_operation_frees_its_key(ground: Place) -> None:
    step, _ = started(ground)
    settle = step.throw(ZeroDivisionError('a fault'))
    with pytest.raises(ZeroDivisionError):
        step.send(ground.store.call(settle))
    assert ground.do('recovery.reclaim_tasks', key='k')['reclaimed'] == 0


# ------------------------------------------------------------------------------------------------------------ paging


def many_agents(place: Place) -> list[str]:
    agents = [new_id() for _ in range(12)]
    pipeline(
        place,
        [
            place.store.register(each, f'n{i}', json.dumps({'id': each, 'name': f'n{i}'})[:-1], 50, 0, new_id())
            for i, each in enumerate(agents)
        ],
    )
    return agents


def many_tasks(place: Place, agent: str = '', size: int = 1, count: int = 12) -> list[str]:
    ids = [new_id() for _ in range(count)]
    records = [(each, f'{{"task_id":"{each}","description":"{"d" * size}"', '"d"', '[]', new_id(), 3) for each in ids]
    pipeline(place, [place.store.assign(agent, each) if agent else place.store.backlog_add(each) for each in records])
    return ids


def many_messages(place: Place, size: int = 1, count: int = 12) -> list[str]:
    enlist(place, 'a')
    ids = [new_id() for _ in range(count)]
    sends = [
        place.store.send('a', '', 'un'[i >= count // 2], each, f'","type":"task","summary":"{"m" * size}"}}', 'task')
        for i, each in enumerate(ids)
    ]
    pipeline(place, sends)
    return ids


def assigned_tasks(place: Place) -> list[str]:
    enlist(place, 'a')
    return many_tasks(place, 'a')


def _leave(place: Place, agent: str) -> None:
    place.store.call(place.store.depart(agent, '', 'Stopped', 'test', 'backlog'))


def _remove(place: Place, agent: str) -> None:
    _leave(place, agent)
    place.store.call(place.store.remove(agent))


def _cancel(place: Place, task: str) -> None:
    place.do('task.cancel', task_id=task)


def _delete(place: Place, task: str) -> None:
    place.do('backlog.remove', task_id=task)


def _ack(place: Place, message: str) -> None:
    place.do('agent.ack', agent='a', ids=[message])


# For each list: the operation, its arguments, the field of the items, the field of an item's id, a function that
# creates twelve items in order, and a function that removes an item from the list.
LISTS: dict[str, tuple[str, dict[str, Any], str, str, Callable[[Place], list[str]], Callable[[Place, str], None]]] = {
    'agents': ('agent.list', {}, 'agents', 'id', many_agents, _remove),
    'status': ('town.get_status', {}, 'agents', 'id', many_agents, _remove),
    'tasks': ('task.list', {}, 'tasks', 'task_id', many_tasks, _delete),
    'in one state': ('task.list', {'state': 'pending'}, 'tasks', 'task_id', many_tasks, _cancel),
    'assigned': ('task.list', {'state': 'assigned'}, 'tasks', 'task_id', assigned_tasks, _cancel),
    'of an agent in one state': (
        'task.list',
        {'agent': 'A', 'state': 'assigned'},
        'tasks',
        'task_id',
        assigned_tasks,
        _cancel,
    ),
    'pending': ('task.list_pending', {}, 'tasks', 'task_id', assigned_tasks, _cancel),
    'backlog': ('backlog.list', {}, 'backlog', 'task_id', many_tasks, _delete),
    'inbox': ('agent.inbox', {'agent': 'a'}, 'messages', 'id', many_messages, _ack),
    'inbox of tasks': ('agent.inbox', {'agent': 'a'}, 'messages', 'id', assigned_tasks, _cancel),
}
every_list = pytest.mark.parametrize('which', LISTS)


def walk(place: Place, which: str, limit: int, between: Callable[[list[str]], None] = lambda _ids: None) -> list[str]:
    """The ids of all pages. Calls `between` with the ids of each page before it requests the next one."""
    operation, arguments, items, key, *_ = LISTS[which]
    found: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        page = place.do(operation, limit=limit, **arguments, **cursor)
        ids = [item[key] for item in page[items]]
        assert len(ids) <= limit
        found += ids
        if 'next_cursor' not in page:
            return found
        assert ids, 'only the last page may be empty'
        cursor = {'cursor': page['next_cursor']}
        between(ids)


@every_list
@pytest.mark.parametrize('limit', [1, 5, 6, 12, 500])
def test_pages_give_each_item_once_and_in_order(ground: Place, which: str, limit: int) -> None:
    operation, arguments, _, _, make, _ = LISTS[which]
    made = make(ground)
    assert walk(ground, which, limit) == (made[::-1] if operation == 'task.list' else made)
    page = ground.do(operation, limit=1, **arguments)
    counted = page.get('count', page.get('agent_count', page.get('total', 0) + page.get('urgent', 0)))
    assert counted == 12


def test_pages_of_live_agents_leave_out_stopped_ones(ground: Place) -> None:
    made = many_agents(ground)
    for agent in made[::3]:
        _leave(ground, agent)
    live = [agent for agent in made if agent not in made[::3]]
    found, cursor = [], ''
    while True:
        count, following, agents = ground.store.call(ground.store.agents_open(3, cursor))
        assert count == len(live)
        found += [each['id'] for each in json.loads(b'[' + agents + b']')]
        if not (cursor := text(following)):
            break
    assert found == live


@every_list
def test_items_removed_between_pages_hide_no_others(ground: Place, which: str) -> None:
    make, vanish = LISTS[which][4:]
    made = set(make(ground))
    vanished: set[str] = set()

    def between(ids: list[str]) -> None:
        for each in (ids[0], ids[-1]):  # the last one is the item in the cursor
            vanish(ground, each)
            vanished.add(each)

    found = walk(ground, which, 4, between)
    assert len(found) == len(set(found))
    assert set(found) == made
    assert vanished < made


def test_an_inbox_page_continues_after_a_lane_that_was_emptied_meanwhile(ground: Place) -> None:
    enlist(ground, 'a')
    for i in range(2):
        ground.do('message.send', to='a', message=f'urgent {i}', urgent=True)
    ground.do('message.send', to='a', message='calm')
    task = ground.do('task.assign', agent='a', task='work')['task_id']
    first = ground.do('agent.inbox', agent='a', limit=1)
    redis(ground, 'DEL', ground.store.prefix + f'inbox:{ground.do("agent.get", agent="a")["id"]}:u'.encode())
    rest = ground.do('agent.inbox', agent='a', cursor=first['next_cursor'])
    assert [message['summary'] for message in rest['messages']] == ['calm', 'work']
    assert (rest['messages'][1]['id'], rest['total'], rest['urgent']) == (task, 2, 0)


def test_tasks_of_an_agent_stay_listed_when_they_are_finished(ground: Place) -> None:
    made = assigned_tasks(ground)
    for task in made[:6]:
        ground.do('task.complete', task_id=task)
    listed = ground.do('task.list', agent='a', limit=500)
    assert ([task['task_id'] for task in listed['tasks']], listed['count']) == (made[::-1], 12)
    assert ground.do('task.list', agent='a', state='completed')['count'] == 6
    assert ground.do('task.list', agent='a', state='failed') == {'tasks': [], 'count': 0}
    with pytest.raises(NotFound):
        ground.do('task.list', agent='nobody')


@pytest.mark.parametrize('which', ['tasks', 'backlog', 'inbox'])
def test_a_page_is_bounded_to_about_a_mebibyte(ground: Place, which: str) -> None:
    make = many_messages if which == 'inbox' else many_tasks
    made = make(ground, size=60_000, count=40)
    operation, arguments, items, *_ = LISTS[which]
    page = ground.do(operation, **arguments)
    assert 900_000 < len(json.dumps(page)) < 1_200_000
    assert 'next_cursor' in page
    assert len(page[items]) < 40
    assert sorted(walk(ground, which, 500)) == sorted(made)


@pytest.mark.parametrize(
    'operation', ['agent.list', 'task.list', 'task.list_pending', 'backlog.list', 'town.get_status']
)
@pytest.mark.parametrize('cursor', ['x', '5', '1-1', 'n-1-1', '9' * 20 + '_' + CONDUCTOR_ID])
def test_an_invalid_cursor_is_refused(ground: Place, operation: str, cursor: str) -> None:
    with pytest.raises(Invalid) as caught:
        ground.do(operation, cursor=cursor)
    assert caught.value.errors
    assert caught.value.errors[0]['pointer'] == '/cursor'


@pytest.mark.parametrize('cursor', ['x', 'n', 'n-1', 'x-1-1', 'n-99999999999999999999-0', '1_' + CONDUCTOR_ID])
def test_an_invalid_inbox_cursor_is_refused(ground: Place, cursor: str) -> None:
    with pytest.raises(Invalid):
        ground.do('agent.inbox', agent='conductor', cursor=cursor)


# -------------------------------------------------------------------------------------------------------------- cost


def cost(place: Place, operation: str, **arguments: Any) -> tuple[int, int]:
    """The number of round trips of an operation, and of commands that Redis ran for it."""
    redis(place, 'CONFIG', 'RESETSTAT')
    place.do(operation, **arguments)
    stats = text(redis(place, 'INFO', 'commandstats'))
    calls = {
        line.split(':')[0]: int(line.split('calls=')[1].split(',')[0])
        for line in stats.splitlines()
        if 'calls=' in line
    }
    scripts = calls.pop('cmdstat_evalsha', 0) + calls.pop('cmdstat_eval', 0)
    calls.pop('cmdstat_config|resetstat', None)
    return scripts, sum(calls.values())


@pytest.mark.parametrize(
    ('operation', 'arguments'),
    [
        ('agent.list', {}),
        ('town.get_status', {'deep': True}),
        ('task.list', {'limit': 50}),
        ('backlog.list', {}),
        ('task.list_pending', {}),
    ],
)
def test_a_list_is_one_round_trip_and_its_cost_does_not_grow_with_the_history(
    ground: Place, operation: str, arguments: dict[str, Any]
) -> None:
    agents = [new_id() for _ in range(100)]
    pipeline(
        ground,
        [
            ground.store.register(each, f'n{i}', json.dumps({'id': each, 'name': f'n{i}'})[:-1], 100, 0, new_id())
            for i, each in enumerate(agents)
        ],
    )
    many_tasks(ground, count=50)
    ground.do(operation, **arguments)  # so that Redis knows the script
    before = cost(ground, operation, **arguments)
    assert before[0] == 1
    for _ in range(3):
        ended = many_tasks(ground, 'n0', count=100)
        pipeline(ground, [ground.store.finish(each, '', 'completed', 'null', 'null') for each in ended])
    assert cost(ground, operation, **arguments) == before
