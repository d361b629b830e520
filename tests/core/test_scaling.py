"""The endpoints for machines: each recommendation of /api/scaling, and the state of the dispatcher in /ready."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tinytown.core import stats
from tinytown.state.store import Command

from ..ground import Puppet, enlist, redis
from ..support import Hall, Place, make_town, read_all, redis_pid, status_of

MAX_AGENTS = 3
NAMES = (
    'town timestamp queue_depth pending_tasks in_flight_tasks active_agents cold_agents desired_agents max_agents '
    'scaling_recommendation'
)


@pytest.fixture(scope='module')
def soil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = make_town(tmp_path_factory.mktemp('s'), max_agents=MAX_AGENTS, agent={'idle_timeout_secs': 300})
    made.hall()
    yield made
    made.store.call(Command(None, ('FLUSHALL',)))
    made.close()


def ago(puppet: Puppet, field: str, seconds: float) -> None:
    """Sets a time in an agent's record to `seconds` ago."""
    key = puppet.place.store.prefix + f'agent:{puppet.id}'.encode()
    now = redis(puppet.place, 'TIME')
    redis(puppet.place, 'HSET', key, field, str(int(now[0]) * 1000 - int(seconds * 1000)))


def busy(place: Place, name: str) -> Puppet:
    """An agent that has taken a task."""
    puppet = enlist(place, name)
    place.do('task.assign', agent=name, task='x')
    puppet.take()
    return puppet


def idle(place: Place, name: str, seconds: float = 0) -> Puppet:
    """An agent that has been idle for `seconds`."""
    puppet = enlist(place, name)
    ago(puppet, 'idle', seconds)
    return puppet


def scaling(place: Place) -> dict[str, Any]:
    answer = place.halls[0].get('/api/scaling')
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    assert ' '.join(found) == NAMES
    assert found['queue_depth'] == found['pending_tasks'] + found['in_flight_tasks']
    assert (found['town'], found['max_agents']) == ('test', MAX_AGENTS)
    return found


def numbers(place: Place) -> tuple[Any, ...]:
    """(pending, in flight, active, desired, recommendation)."""
    found = scaling(place)
    names = ('pending_tasks', 'in_flight_tasks', 'active_agents', 'desired_agents', 'scaling_recommendation')
    return tuple(found[name] for name in names)


# ------------------------------------------------------------------------------------------------------------ scaling


def test_scale_up_is_recommended_if_there_is_more_work_than_agents(ground: Place) -> None:
    ground.do('backlog.add', description='a')
    assert numbers(ground) == (1, 0, 0, 1, 'scale_up')
    enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='b')
    assert numbers(ground) == (2, 0, 1, 2, 'scale_up')


def test_the_desired_number_of_agents_is_at_most_max_agents(ground: Place) -> None:
    for number in range(MAX_AGENTS + 2):
        ground.do('backlog.add', description=str(number))
    assert numbers(ground) == (MAX_AGENTS + 2, 0, 0, MAX_AGENTS, 'scale_up')
    for number in range(MAX_AGENTS):
        enlist(ground, f'a{number}')
    assert numbers(ground) == (MAX_AGENTS + 2, 0, MAX_AGENTS, MAX_AGENTS, 'steady')


def test_no_change_is_recommended_if_every_agent_has_work(ground: Place) -> None:
    busy(ground, 'a')
    assert numbers(ground) == (0, 1, 1, 1, 'steady')


def test_scale_down_is_recommended_if_agents_are_idle_and_no_task_waits(ground: Place) -> None:
    busy(ground, 'a')
    idle(ground, 'b', 1000)
    assert numbers(ground) == (0, 1, 2, 1, 'scale_down')
    ground.do('task.assign', agent='a', task='next')
    enlist(ground, 'c')
    assert numbers(ground) == (1, 1, 3, 2, 'steady'), 'any of them may get the waiting task'


def test_scale_to_zero_is_recommended_when_all_agents_have_been_idle_for_the_timeout(ground: Place) -> None:
    idle(ground, 'a', 301)
    later = idle(ground, 'b', 200)
    assert numbers(ground) == (0, 0, 2, 0, 'scale_down')
    ago(later, 'idle', 300)
    assert numbers(ground) == (0, 0, 2, 0, 'scale_to_zero')


def test_scale_to_zero_is_recommended_for_a_town_without_agents_and_work(ground: Place) -> None:
    assert numbers(ground) == (0, 0, 0, 0, 'scale_to_zero')
    idle(ground, 'a').depart()
    ground.do('backlog.remove', task_id=ground.do('backlog.add', description='x')['task_id'])
    assert numbers(ground) == (0, 0, 0, 0, 'scale_to_zero')


def test_an_agent_that_is_paused_or_reads_its_messages_is_not_idle(ground: Place) -> None:
    idle(ground, 'a', 1000)
    ground.do('agent.interrupt', agent='a')
    assert numbers(ground) == (0, 0, 1, 0, 'scale_down')
    reader = idle(ground, 'b', 1000)
    ground.do('message.send', to='b', message='why?', kind='query')
    assert reader.pickup()[0] == b'work'
    ground.do('agent.resume', agent='a')
    assert numbers(ground) == (0, 0, 2, 0, 'scale_down')
    reader.round_done()
    assert numbers(ground) == (0, 0, 2, 0, 'scale_down'), 'it has been idle only since its round'


def test_the_timestamp_of_a_recommendation_is_the_time_of_redis(ground: Place) -> None:
    given = datetime.fromisoformat(scaling(ground)['timestamp'])
    seconds = int(redis(ground, 'TIME')[0])
    assert re.fullmatch(r'.+\.\d{3}Z', scaling(ground)['timestamp'])
    assert abs((given - datetime.fromtimestamp(seconds, UTC)).total_seconds()) < 5


def test_a_recommendation_takes_one_round_trip(ground: Place) -> None:
    step = stats.scaling(ground.town)
    reply = ground.store.call(next(step))
    with pytest.raises(StopIteration):
        step.send(reply)


# -------------------------------------------------------------------------------------------------------------- ready


def ready(place: Place) -> dict[str, Any]:
    answer = place.halls[0].get('/ready')
    assert (answer.status, answer.json['status'], answer.json['redis']) == (200, 'ready', 'connected')
    found: dict[str, Any] = answer.json
    return found


def test_readiness_reports_the_town_and_its_durability(ground: Place) -> None:
    found = ready(ground)
    assert 0 < found.pop('redis_latency_ms') < 1000
    expected = {'status': 'ready', 'redis': 'connected', 'dispatcher': 'idle', 'town': 'test', 'durability': 'always'}
    assert found == expected | {'draining': False}


def test_the_dispatcher_is_idle_without_work_and_running_while_workers_send_heartbeats(ground: Place) -> None:
    ground.do('backlog.add', description='unassigned')
    enlist(ground, 'a')
    assert ready(ground)['dispatcher'] == 'idle'
    ground.do('task.assign', agent='a', task='x')
    assert ready(ground)['dispatcher'] == 'running'


def test_the_dispatcher_is_stalled_when_no_worker_sent_a_heartbeat_for_a_lease(ground: Place) -> None:
    quiet = busy(ground, 'a')
    ago(quiet, 'beat', 61)
    assert ready(ground)['dispatcher'] == 'stalled'
    other = enlist(ground, 'b')
    assert ready(ground)['dispatcher'] == 'running', 'one of them sends heartbeats'
    ago(other, 'beat', 61)
    assert ready(ground)['dispatcher'] == 'stalled'
    quiet.beat()
    assert ready(ground)['dispatcher'] == 'running'


def test_the_dispatcher_is_stalled_when_tasks_wait_for_agents_that_do_not_run(ground: Place) -> None:
    puppet = enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='x')
    puppet.depart()
    assert ready(ground)['dispatcher'] == 'stalled'
    enlist(ground, 'b', hello=False)
    assert ready(ground)['dispatcher'] == 'running', 'a worker is starting'


def test_a_draining_townhall_is_not_ready(hall: Hall) -> None:
    with hall.connect() as sock:
        sock.sendall(b'GET /ready HTTP/1.1\r\nHost: localhost\r\n')
        assert hall.get('/ready').json['draining'] is False
        hall.process.send_signal(signal.SIGTERM)
        while True:  # until it accepts no more connections
            try:
                hall.connect().close()
            except OSError:
                break
        sock.sendall(b'\r\n')
        answer = read_all(sock)
    assert status_of(answer) == 503
    assert b'"status":"not_ready"' in answer
    assert b'"draining":true' in answer


def test_scaling_without_redis_is_refused_and_the_dispatcher_is_unknown(place: Place, hall: Hall) -> None:
    server = redis_pid(place)
    os.kill(server, signal.SIGSTOP)
    try:
        answer = hall.get('/api/scaling')
        found = hall.get('/ready').json
    finally:
        os.kill(server, signal.SIGCONT)
    assert (answer.status, answer.headers['content-type']) == (503, 'application/problem+json')
    assert 'retry-after' in answer.headers
    assert (found['dispatcher'], 'redis_latency_ms' in found) == ('unknown', False)
