"""The supervisor: first with a clock that the test sets and workers that the test plays, then with real ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tinytown.core.town import Town
from tinytown.errors import Conflict, TownError, Unavailable
from tinytown.host.processes import Identity, identify, this_boot, this_host
from tinytown.model import new_id
from tinytown.worker.supervisor import GAP_SECS, TAKE_OVER_SECS, Supervisor

from ..ground import ELSEWHERE, Puppet, check, enlist, redis, snapshot
from ..support import PATIENCE, Hall, Place, make_town, redis_pid, shell_cli
from .test_worker import GATE, Gate, await_exit, give, spawn, when, worker_pid

LEASE, PAUSES = 60, [1, 5, 25]  # the defaults, in seconds
DAY = 86_400_000


def gone() -> Identity:
    """The identity of a process that has ended."""
    with subprocess.Popen(['cat'], stdin=subprocess.PIPE) as process:
        return identify(process.pid)


class Watch:
    """A supervisor whose clock stands still until the test lets time pass.

    `starts` are the times at which it started a worker. `start` plays that worker; by default it says hello.
    """

    def __init__(self, place: Place, start: Callable[[Puppet], None] | None = None, **agent: Any) -> None:
        self.now = 1000.0
        self.place = place
        self.starts: list[float] = []
        self._start = start or Puppet.hello
        config = place.town.config
        town = Town(place.root, config.but(agent=config.agent.but(**agent)), place.store)
        self.supervisor = Supervisor(town, lambda: self.now, self.start)
        self.supervisor.tick(self.now)

    def start(self, _town: Town, agent_id: str, name: str, instance: str) -> None:
        self.starts.append(self.now)
        self._start(Puppet(self.place, agent_id, name, instance))

    def passes(self, seconds: float, doing: Callable[[], object] = lambda: None, step: float = 1) -> None:
        """Lets time pass. The supervisor looks every `step` seconds; `doing` is called before each look."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + step, end)
            doing()
            self.look()

    def look(self) -> None:
        """One look of the supervisor. Waits for the threads that it starts."""
        self.supervisor.tick(self.now)
        for thread in threading.enumerate():
            if thread.name.startswith('supervisor-'):
                thread.join()

    def until(self, condition: Callable[[], object], most: float = 100) -> float:
        """Lets time pass, a second at a time, until a condition is true. Returns the seconds."""
        began = self.now
        while not condition():
            assert self.now - began < most, f'the condition is not true after {most} s'
            self.passes(1)
        return self.now - began


@pytest.fixture
def hall(ground: Place) -> Iterator[Hall]:
    """A townhall of this town. Its supervisor stays passive, because a supervisor of the test is in charge."""
    Watch(ground)
    started = ground.hall()
    yield started
    started.kill()


@pytest.fixture
def a(ground: Place) -> Puppet:
    return enlist(ground, 'a')


def assign(place: Place, name: str = 'a') -> str:
    task_id: str = place.do('task.assign', agent=name, task='work')['task_id']
    return task_id


def held(agent: Puppet) -> str:
    """Assigns a task to an agent, which starts to run it."""
    task_id = assign(agent.place, agent.name)
    assert agent.take() == (task_id, 1)
    return task_id


def task(place: Place, task_id: str) -> dict[str, Any]:
    found: dict[str, Any] = place.do('task.get', task_id=task_id)
    return found


def state(place: Place, task_id: str) -> str:
    return str(task(place, task_id)['state'])


def kept(place: Place) -> dict[str, Any]:
    """The state of a town, without the keys that every townhall writes once a second."""
    return {key: value for key, value in snapshot(place).items() if not key.startswith(('caretaker', 'host'))}


def history(place: Place, task_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = place.do('task.history', task_id=task_id)['history']
    return found


# ----------------------------------------------------------------------------------------------------------- leases


def test_the_task_of_a_silent_holder_is_freed_after_the_lease_and_not_before(ground: Place, a: Puppet) -> None:
    watch, task_id = Watch(ground), held(a)
    watch.passes(LEASE)
    assert state(ground, task_id) == 'running'
    watch.passes(2)
    assert state(ground, task_id) == 'pending'
    last = history(ground, task_id)[-1]
    assert last.pop('secs') >= 0  # for how long it was running
    assert last | {'at': ''} == {
        'type': 'task.requeued',
        'at': '',
        'task_id': task_id,
        'agent_id': a.id,
        'agent_name': 'a',
        'attempt': 1,
        'why': 'its holder was not heard of for a lease',
        'by': 'caretaker',
    }
    assert a.beat(task_id, 1) == [task_id]
    check(ground)


def test_a_holder_that_sends_heartbeats_keeps_its_task(ground: Place, a: Puppet) -> None:
    watch, task_id = Watch(ground), held(a)
    for _ in range(10):
        watch.passes(LEASE - 1, step=3)
        a.beat(task_id, 1)
    assert state(ground, task_id) == 'running'


def test_a_task_that_no_worker_has_taken_has_no_lease(ground: Place, a: Puppet) -> None:
    watch, queued = Watch(ground), assign(ground)
    waiting = ground.do('backlog.add', description='x')['task_id']
    watch.passes(20 * LEASE, step=3)
    assert (state(ground, queued), state(ground, waiting)) == ('assigned', 'pending')
    assert a.take() == (queued, 1)


@pytest.mark.parametrize('shift', [DAY, -DAY])
@pytest.mark.parametrize('beats', [True, False])
def test_setting_the_clock_by_a_day_expires_no_lease_and_extends_none(
    ground: Place, a: Puppet, shift: int, beats: bool
) -> None:
    watch, task_id = Watch(ground), held(a)
    prefix = ground.store.prefix.decode()
    now = int(time.time() * 1000) + shift

    def set_clock() -> None:
        redis(ground, 'HSET', f'{prefix}agent:{a.id}', 'beat', now, 'idle', now, 'born', now * 1000)
        redis(ground, 'HSET', f'{prefix}task:{task_id}', 'started', now, 'born', now * 1000)
        if beats:
            a.beat(task_id, 1)

    watch.passes(LEASE, set_clock)
    assert state(ground, task_id) == 'running'
    watch.passes(2, set_clock)
    assert state(ground, task_id) == ('running' if beats else 'pending')


def test_only_silence_that_the_supervisor_has_observed_counts(ground: Place, a: Puppet) -> None:
    unborn = enlist(ground, 'b', hello=False)
    watch, task_id = Watch(ground), held(a)
    watch.passes(LEASE - 10)
    watch.now += 3600  # its process was stopped, or Redis was unreachable
    watch.look()
    assert state(ground, task_id) == 'running'
    watch.passes(GAP_SECS)
    a.beat(task_id, 1)
    watch.passes(LEASE - 1)
    assert (state(ground, task_id), unborn.show()['state']) == ('running', 'Error')
    watch.passes(3)
    assert state(ground, task_id) == 'pending'


def test_the_silence_of_one_attempt_does_not_count_for_the_next(ground: Place, a: Puppet) -> None:
    b = enlist(ground, 'b')
    watch, task_id = Watch(ground), held(a)
    a.beat(task_id, 1)
    watch.until(lambda: state(ground, task_id) == 'pending')
    ground.do('backlog.claim', task_id=task_id, agent='b')
    assert b.take() == (task_id, 2)
    b.beat(task_id, 2)  # as often as the previous holder
    watch.passes(LEASE - 1)
    assert state(ground, task_id) == 'running'


@pytest.mark.parametrize('outcome', ['complete', 'fail', 'release'])
def test_a_report_that_comes_after_the_lease_is_a_stale_attempt_and_changes_nothing(
    ground: Place, hall: Hall, a: Puppet, outcome: str
) -> None:
    b = enlist(ground, 'b')
    watch, task_id = Watch(ground), held(a)

    def report() -> None:
        before = kept(ground)
        reply = hall.post(f'/v1/tasks/{task_id}/{outcome}', {'attempt': 1})
        assert (reply.status, reply.json['code']) == (409, 'stale-attempt')
        assert kept(ground) == before

    watch.until(lambda: state(ground, task_id) == 'pending')
    report()
    ground.do('backlog.claim', task_id=task_id, agent='b')
    report()
    assert b.take() == (task_id, 2)
    report()
    assert b.finish(task_id, 2) == ['done', 'completed']
    report()


def test_pauses_between_attempts_grow_and_after_the_last_a_task_is_a_dead_letter(ground: Place, a: Puppet) -> None:
    """The agent sends heartbeats, but none for the task, so the task returns to the same inbox."""
    watch, task_id = Watch(ground, max_attempts=3), held(a)
    waited = []
    for attempt in (1, 2):
        watch.passes(LEASE + 1, a.beat, step=0.5)
        found = task(ground, task_id)
        assert (found['state'], found['agent_name'], found['attempt']) == ('assigned', 'a', attempt)
        began = watch.now
        while (reply := a.pickup())[0] == b'rest':
            watch.passes(0.5, a.beat)
        waited.append(watch.now - began)
        assert reply[1][1] == attempt + 1
    assert waited == [pytest.approx(pause, abs=1) for pause in PAUSES[:2]]
    assert [each['pause'] for each in history(ground, task_id) if 'pause' in each] == PAUSES[:2]
    watch.passes(LEASE + 1, a.beat)
    found = task(ground, task_id)
    assert (found['state'], found['dead_letter'], found['attempt']) == ('failed', True, 3)
    assert found['error'] == 'given up after attempt 3: its holder was not heard of for a lease'
    event = ground.history()[-1]
    assert (event['type'], event['task_id'], event['attempt']) == ('task.dead_lettered', task_id, 3)
    with pytest.raises(Conflict):
        a.finish(task_id, 3)
    check(ground)


# ----------------------------------------------------------------------------------------------------- dead workers

REUSED = Identity(this_host(), this_boot(), os.getpid(), '1')  # a pid that another process has now


@pytest.mark.parametrize(
    'process',
    [gone(), REUSED, Identity(this_host(), 'another boot', os.getpid(), '1')],
    ids=['gone', 'its pid was reused', 'the machine was rebooted'],
)
def test_what_a_dead_worker_held_is_freed_at_once(ground: Place, a: Puppet, process: Identity) -> None:
    watch, task_id = Watch(ground), held(a)
    a.becomes(process)
    watch.look()
    assert (a.show()['state'], a.show()['pid']) == ('Error', None)
    assert state(ground, task_id) == 'pending'
    assert (history(ground, task_id)[-1]['why'], history(ground, task_id)[-1]['by']) == (
        'its process died',
        'caretaker',
    )
    check(ground)


@pytest.mark.parametrize(
    'process',
    [
        ELSEWHERE,
        Identity('elsewhere', this_boot(), gone().pid, '1'),
        identify(os.getpid()),
        Identity(this_host(), this_boot(), gone().pid, ''),
    ],
    ids=['another host', 'this boot id on another host', 'alive', 'without a start time'],
)
def test_a_worker_that_is_not_provably_dead_keeps_its_lease(ground: Place, a: Puppet, process: Identity) -> None:
    watch, task_id = Watch(ground), held(a)
    a.becomes(process)
    watch.passes(LEASE - 1)
    assert (a.show()['state'], state(ground, task_id)) == ('Working', 'running')


def test_a_worker_in_another_container_of_this_host_counts_as_dead_after_a_lease_of_silence(
    ground: Place, a: Puppet
) -> None:
    watch, task_id = Watch(ground), held(a)
    a.becomes(Identity(this_host(), f'{this_boot()}1', gone().pid, '1'))
    watch.passes(LEASE - 1)
    assert (a.show()['state'], state(ground, task_id)) == ('Working', 'running')
    watch.passes(2)
    assert (a.show()['state'], state(ground, task_id)) == ('Error', 'pending')


def test_a_worker_that_does_not_start_in_time_is_given_up_and_its_late_hello_is_refused(ground: Place) -> None:
    late = enlist(ground, 'late', hello=False)
    queued = assign(ground, 'late')
    watch = Watch(ground)
    watch.passes(29)
    assert late.show()['state'] == 'Starting'
    watch.passes(3)
    assert (late.show()['state'], state(ground, queued)) == ('Error', 'assigned')
    with pytest.raises(Conflict):
        late.hello()
    ground.do('agent.prune')
    assert state(ground, queued) == 'pending'


def test_a_start_is_given_up_at_once_if_its_starter_died_before_the_worker_ran(ground: Place) -> None:
    agent = enlist(ground, 'a', hello=False)
    watch = Watch(ground)
    watch.passes(5)
    assert agent.show()['state'] == 'Starting'  # its starter, this process, is alive
    agent.is_started_by(gone())
    watch.passes(1)
    assert agent.show()['state'] == 'Error'


def test_a_start_is_not_given_up_while_the_worker_runs_even_if_its_starter_died(ground: Place) -> None:
    agent = enlist(ground, 'a', hello=False)
    agent.is_started_by(gone())
    with subprocess.Popen(['cat'], stdin=subprocess.PIPE, env={'TINYTOWN_INSTANCE': agent.instance}) as process:
        watch = Watch(ground)
        watch.passes(5)
        assert agent.show()['state'] == 'Starting'
        process.kill()
    watch.passes(1)
    assert agent.show()['state'] == 'Error'


def test_the_supervisor_leaves_a_draining_agent_alone_for_half_a_minute(ground: Place, a: Puppet) -> None:
    watch, task_id = Watch(ground, restart='on-failure'), held(a)
    a.becomes(gone())
    ground.do('agent.close', agent='a')
    watch.passes(29)
    assert (a.show()['state'], state(ground, task_id)) == ('Draining', 'running')
    watch.passes(3)
    assert (a.show()['state'], state(ground, task_id)) == ('Stopped', 'pending')
    watch.passes(60)
    assert watch.starts == []
    check(ground)


def test_an_agent_that_is_closed_just_before_its_death_is_recorded_is_not_restarted(ground: Place, a: Puppet) -> None:
    task_id = held(a)
    a.becomes(gone())
    ground.do('agent.close', agent='a')  # after the supervisor's look, and before it records the death
    a.dies(again=5)
    assert (a.show()['state'], state(ground, task_id)) == ('Stopped', 'pending')
    watch = Watch(ground, restart='on-failure')
    watch.passes(60)
    assert watch.starts == []


@pytest.mark.parametrize('way', ['kill', 'its killer died', 'its lease ends first'])
def test_stopping_an_agent_never_makes_its_task_a_dead_letter(ground: Place, a: Puppet, way: str) -> None:
    task_id = held(a)
    for _ in range(2):
        a.depart(to='inbox')
        a.revive(new_id())
        a.take()
    assert task(ground, task_id)['attempt'] == 3
    watch = Watch(ground)
    if way != 'its lease ends first':
        a.becomes(gone())
    if way == 'kill':
        ground.do('agent.kill', agent='a')
    else:
        ground.do('agent.close', agent='a')
        watch.passes(LEASE + 2)
    found = task(ground, task_id)
    assert (found['state'], found['attempt'], found['dead_letter']) == ('pending', 3, False)
    check(ground)


def test_a_delayed_task_returns_to_the_backlog_when_its_agent_is_closed(ground: Place, a: Puppet) -> None:
    watch, task_id = Watch(ground), held(a)
    watch.until(lambda: state(ground, task_id) == 'assigned' or a.beat())
    ground.do('agent.close', agent='a')
    watch.passes(3)
    assert state(ground, task_id) == 'pending'
    check(ground)


# --------------------------------------------------------------------------------------------------------- restarts


def revived(agent: Puppet) -> None:
    """Plays a restarted worker that dies at once."""
    agent.becomes(gone())


def test_a_crashed_agent_is_restarted_with_growing_backoff_up_to_its_cap(ground: Place, a: Puppet) -> None:
    watch = Watch(ground, revived, restart='on-failure', restart_cap=4)
    began = watch.now
    a.becomes(gone())
    watch.passes(200)
    gaps = [later - before for before, later in zip([began, *watch.starts], watch.starts, strict=False)]
    assert gaps == [pytest.approx(pause, abs=2.5) for pause in [*PAUSES, PAUSES[-1]]]
    assert (a.show()['state'], a.show()['restarts']) == ('Error', 4)
    assert len([event for event in ground.history() if event['type'] == 'agent.error']) == 5


def test_a_completed_task_resets_the_count_of_crashes(ground: Place, a: Puppet) -> None:
    def once_more(agent: Puppet) -> None:
        agent.hello()
        agent.finish(*agent.take())
        agent.becomes(gone())

    watch = Watch(ground, once_more, restart='on-failure', restart_cap=1)
    for _ in range(5):
        assign(ground)
    a.becomes(gone())
    watch.passes(40)
    assert len(watch.starts) == 6  # one for each task, and one more that finds no task
    assert max(b - a for a, b in zip(watch.starts, watch.starts[1:], strict=False)) < PAUSES[1]


def test_the_task_of_a_restarted_agent_stays_in_its_inbox(ground: Place, a: Puppet) -> None:
    watch, task_id = Watch(ground, restart='on-failure'), held(a)
    a.becomes(gone())
    watch.passes(5)
    [agent] = ground.do('agent.list', open=True)['agents']
    found = task(ground, task_id)
    assert (agent['restarts'], found['state'], found['agent_name']) == (1, 'assigned', 'a')
    assert a.again().take() == (task_id, 2)
    kinds = [(each['type'], each.get('by')) for each in history(ground, task_id)[3:]]
    assert kinds == [('task.requeued', 'caretaker'), ('task.assigned', 'caretaker'), ('task.started', 'a')]
    check(ground)


def test_a_crashed_agent_that_is_killed_is_not_restarted(ground: Place, a: Puppet) -> None:
    watch = Watch(ground, restart='on-failure')
    a.becomes(gone())
    watch.look()
    assert a.show()['state'] == 'Error'
    assert ground.do('agent.kill', agent='a') == {'status': 'stopped', 'agent': 'a'}
    watch.passes(60)
    assert watch.starts == []
    assert a.show()['state'] == 'Stopped'


@pytest.mark.parametrize('fault', [Unavailable('no CLI'), OSError('no more processes'), ZeroDivisionError()])
def test_a_failed_restart_counts_as_a_crash_and_the_last_one_frees_the_tasks(
    ground: Place, a: Puppet, fault: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Puppet) -> None:
        raise fault

    watch, task_id = Watch(ground, fail, restart='on-failure', restart_cap=3), held(a)
    never_taken = assign(ground)
    a.becomes(gone())
    watch.passes(120)
    assert len(watch.starts) == 3
    assert (a.show()['state'], state(ground, task_id)) == ('Error', 'pending')
    assert state(ground, never_taken) == 'assigned'
    assert capsys.readouterr().err.count(str(fault) or 'ZeroDivisionError') >= 1
    assert task(ground, task_id)['attempt'] == 1
    check(ground)


def test_a_restart_waits_while_the_town_has_max_agents_and_this_is_logged_once(
    ground: Place, a: Puppet, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ground.town.config
    watch = Watch(ground, restart='on-failure')
    watch.supervisor.town = Town(ground.root, watch.supervisor.town.config.but(max_agents=1), ground.store)
    assert config.max_agents > 1
    a.becomes(gone())
    watch.look()
    b = enlist(ground, 'b')
    watch.passes(30)
    assert a.show()['state'] == 'Error'
    b.depart()
    watch.passes(2)
    assert a.show()['state'] == 'Idle'
    assert capsys.readouterr().err.count('max_agents') == 1


# ----------------------------------------------------------------------------------------------------- dead letters


def test_dead_letters_are_listed_retried_and_dropped_over_rest_and_by_tt(ground: Place, hall: Hall, a: Puppet) -> None:
    first, second = (a.die_of(assign(ground)) for _ in range(2))
    page = hall.get('/v1/deadletter').json
    assert [letter['id'] for letter in page['dead_letters']] == [first, second]
    assert {letter['kind'] for letter in page['dead_letters']} == {'task'}
    listed = ground.tt('deadletter', 'list').stdout
    assert first in listed
    assert 'it was poison' in listed
    assert hall.post(f'/v1/deadletter/{first}/retry').json == {'id': first, 'kind': 'task', 'status': 'retried'}
    assert state(ground, first) == 'pending'
    assert hall.post(f'/v1/deadletter/{first}/retry').status == 404
    ground.tt('deadletter', 'drop', second)
    assert (state(ground, second), task(ground, second)['dead_letter']) == ('failed', False)
    assert ground.tt('deadletter', 'list').stdout == 'No dead letters.\n'
    ground.do('backlog.claim', task_id=first, agent='a')
    assert a.take() == (first, 4)
    a.dies(9)
    a.revive(new_id())
    ground.store.call(ground.store.due(first))
    assert a.die_of(first) == first  # a retried task has three more attempts
    assert task(ground, first)['attempt'] == 6
    check(ground)


def test_messages_are_redelivered_in_order_urgent_first_and_after_three_attempts_become_dead_letters(
    ground: Place, hall: Hall, a: Puppet
) -> None:
    for number in range(2):
        ground.do('message.send', to='a', message=f'n{number}', kind='query')
        ground.do('message.send', to='a', message=f'u{number}', kind='query', urgent=True)

    def summaries() -> list[str]:
        return [letter['text'] for letter in hall.get('/v1/deadletter').json['dead_letters']]

    for _ in range(3):
        assert a.messages() == ['u0', 'u1', 'n0', 'n1']
        a.hello()
    assert a.pickup()[:2] == [b'rest', b'Idle']
    assert sorted(summaries()) == ['n0', 'n1', 'u0', 'u1']
    letters = {letter['text']: letter for letter in hall.get('/v1/deadletter').json['dead_letters']}
    assert {(each['kind'], each['attempts'], each['agent_name']) for each in letters.values()} == {('message', 3, 'a')}
    for summary in ('n1', 'u1', 'u0'):
        assert hall.post(f'/v1/deadletter/{letters[summary]["id"]}/retry').json['kind'] == 'message'
    assert hall.post(f'/v1/deadletter/{letters["n0"]["id"]}/drop').json['kind'] == 'message'
    assert summaries() == []
    assert a.messages() == ['u1', 'u0', 'n1']
    kinds = [event['type'] for event in ground.history()]
    assert (kinds.count('message.dead_lettered'), kinds.count('message.retried')) == (4, 3)
    check(ground)


def test_tasks_past_their_retention_are_deleted_and_no_others(ground: Place, a: Puppet) -> None:
    watch = Watch(ground)
    prefix = ground.store.prefix.decode()
    long_ago = int(time.time() * 1000) - 31 * DAY

    def old(task_id: str) -> str:
        redis(ground, 'HSET', f'{prefix}task:{task_id}', 'ended', long_ago)
        redis(ground, 'ZADD', f'{prefix}ended', long_ago, task_id)
        return task_id

    letter = old(a.die_of(assign(ground)))
    finished, recent = assign(ground), assign(ground)
    for _ in (finished, recent):
        a.finish(*a.take())
        a.round_done()
    assert state(ground, old(finished)) == 'completed'
    running, queued = held(a), assign(ground)
    waiting = ground.do('backlog.add', description='x')['task_id']
    watch.passes(31)
    left = {each['task_id'] for each in ground.do('task.list')['tasks']}
    assert left == {recent, running, queued, waiting}
    assert ground.do('deadletter.list')['count'] == 0
    assert letter not in left
    check(ground)


def test_one_look_deletes_a_limited_number_of_old_tasks(ground: Place) -> None:
    watch = Watch(ground)
    for _ in range(250):
        ground.do('task.cancel', task_id=ground.do('backlog.add', description='x')['task_id'])
    ended = ground.store.prefix + b'ended'
    for task_id in redis(ground, 'ZRANGE', ended, 0, -1):
        redis(ground, 'ZADD', ended, 1, task_id)
    watch.until(lambda: ground.do('task.list', limit=1)['count'] < 250)
    assert ground.do('task.list', limit=1)['count'] == 50
    watch.passes(1)
    assert ground.do('task.list', limit=1)['count'] == 0


# ------------------------------------------------------------------------------------------------ many supervisors


def test_one_of_two_supervisors_acts_and_the_other_takes_over_when_it_falls_silent(ground: Place, a: Puppet) -> None:
    first, second = Watch(ground), Watch(ground)
    for _ in range(20):
        first.passes(1)
        second.passes(1)
    a.becomes(gone())
    second.look()
    assert a.show()['state'] == 'Idle'
    first.look()
    assert a.show()['state'] == 'Error'
    a.revive(new_id())
    a.becomes(gone())
    second.passes(TAKE_OVER_SECS - 1)
    assert a.show()['state'] == 'Idle'
    second.passes(2)
    assert a.show()['state'] == 'Error'
    a.revive(new_id())
    a.becomes(gone())
    first.look()  # it continues, but is no longer in charge
    assert a.show()['state'] == 'Idle'
    assert len([event for event in ground.history() if event['type'] == 'agent.error']) == 2


def test_no_exception_ends_a_supervisor_and_another_takes_over_at_once_when_it_is_closed(
    ground: Place, a: Puppet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('tinytown.worker.supervisor.TICK_SECS', 0.01)
    ticked = threading.Event()
    faults = iter([0.0, ValueError('an unforeseen fault'), TownError('a foreseen one')])

    def clock() -> float:
        fault = next(faults, None)
        if isinstance(fault, Exception):
            raise fault
        if fault is None:
            ticked.set()
        return time.monotonic()

    first = Supervisor(ground.town, clock)
    first.start()
    assert ticked.wait(PATIENCE)
    first.close()
    assert 'an unforeseen fault' in capsys.readouterr().err
    a.becomes(gone())
    Watch(ground).look()
    assert a.show()['state'] == 'Error'


# ------------------------------------------------------------------------------------------- real workers, real deaths

RUN = shell_cli('sed -n "s/^RUN //p" >script.$$; exec sh script.$$ </dev/null')  # a task's text is a script
HANG_ONCE = f'if [ $TINYTOWN_ATTEMPT = 1 ]; then echo $$ >up; read word <never; else {GATE}; fi'


@pytest.fixture
def place(directory: Path) -> Iterator[Place]:
    """A town with short leases whose agents are restarted."""
    made = make_town(
        directory,
        agent={'lease_secs': 6, 'restart': 'on-failure', 'retry_backoff_secs': [0]},
        agent_clis={'runs': RUN},
    )
    yield made
    made.close()


@pytest.fixture
def gate(place: Place) -> Iterator[Gate]:
    made = Gate(place.root)
    yield made
    made.close()


def kill(pid: int) -> float:
    """Kills a process. Returns the time."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def kinds(place: Place, *wanted: str) -> list[str]:
    """The types of the town's events in order, limited to the wanted ones."""
    return [event['type'] for event in place.history() if event['type'] in wanted]


def await_truth(function: Callable[[], object], name: str) -> Any:
    """Calls a function until it returns something true. Returns that. The function may raise until then."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError, TownError):
            if result := function():
                return result
        assert time.monotonic() < deadline, f'waited in vain for {name}'


def test_with_two_townhalls_a_killed_workers_task_is_done_once_more_by_its_restarted_agent(
    place: Place, gate: Gate
) -> None:
    halls = [place.hall(), place.hall()]
    worker = spawn(place)
    task_id = give(place, f'echo $TINYTOWN_ATTEMPT >>runs; setsid sh -c "echo \\$\\$ >up; exec sleep 500" & {GATE}')
    left = {gate.pid(), gate.pid()}
    killed = kill(worker)
    requeued = place.await_event('task.requeued')
    took = time.monotonic() - killed
    assert took < 10, f'requeued {took:.2f} s after the death of its worker'
    for pid in left:
        await_exit(pid)
    assert worker_pid(place) != worker
    for _ in left:
        gate.pid()
    gate.go('by the second')
    found = place.await_end(task_id)
    assert (found['state'], found['attempt'], found['result']) == ('completed', 2, 'by the second')
    assert (place.root / 'runs').read_text() == '1\n2\n'
    assert kinds(place, 'agent.error', 'task.requeued', 'agent.restarting', 'task.started', 'task.completed') == [
        'task.started',
        'task.requeued',
        'agent.error',
        'agent.restarting',
        'task.started',
        'task.completed',
    ]
    assert [hall.get('/v1/status').status for hall in halls] == [200, 200]
    changes = halls[0].get(f'/v1/tasks/{task_id}/history').json['history']
    assert [(each['type'], each.get('attempt'), each.get('by')) for each in changes] == [
        ('task.created', None, 'operator'),
        ('task.assigned', None, 'operator'),
        ('task.started', 1, 'w'),
        ('task.requeued', 1, 'caretaker'),
        ('task.assigned', None, 'caretaker'),
        ('task.started', 2, 'w'),
        ('task.completed', 2, 'w'),
    ]
    assert changes[3] == {name: value for name, value in requeued.items() if name != 'id'} | {
        'secs': changes[3]['secs']
    }
    assert changes[3]['why'] == 'its process died'
    why = place.tt('task', 'why', task_id).stdout
    assert len(why.splitlines()) == 12  # a heading and seven changes; a blank line, a heading and two attempts
    for words in (r'task.requeued +w +1 +caretaker +its process died', r'task.completed +w +2 +w', changes[3]['at']):
        assert re.search(words, why)


def test_a_worker_that_hangs_loses_its_task_after_the_lease_and_its_late_report_is_refused(
    place: Place, gate: Gate
) -> None:
    place.hall()
    workers = {name: spawn(place, name) for name in ('hangs', 'ends')}
    hangs = give(place, HANG_ONCE, 'hangs')
    cli = gate.pid()
    ends = give(place, GATE, 'ends')
    gate.pid()
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
    gate.go('too late')
    spawn(place, 'other')
    for name, task_id in (('hangs', hangs), ('ends', ends)):
        requeued = place.await_event('task.requeued', task_id=task_id)
        assert requeued['why'] == 'its holder was not heard of for a lease'
        last = place.do('agent.get', agent=name)['last_heartbeat']
        took = when(requeued) - datetime.fromisoformat(last).timestamp()
        assert 5 < took < 15, f'requeued {took:.2f} s after its worker was last heard of'
        assert state(place, task_id) == 'pending'
        assert {agent['name'] for agent in place.do('agent.list', open=True)['agents']} == {'hangs', 'ends', 'other'}
    for task_id in (hangs, ends):
        place.do('backlog.claim', task_id=task_id, agent='other')
        gate.pid()
        gate.go('by the other')
    for pid in workers.values():
        os.kill(pid, signal.SIGCONT)
    await_exit(cli)
    for task_id in (hangs, ends):
        found = place.await_end(task_id)
        assert (found['state'], found['attempt'], found['agent_name']) == ('completed', 2, 'other')
        assert found['result'] == 'by the other'
    for name in workers:
        assert place.await_end(give(place, 'true', name))['state'] == 'completed'
        assert re.search('its task is no longer ours|report refused: Attempt 1 of task', place.log(name))
    assert kinds(place, 'task.completed', 'agent.error') == ['task.completed'] * 4


def test_workers_continue_without_a_townhall_and_the_next_one_supervises_them(place: Place, gate: Gate) -> None:
    hall = place.hall()
    record = place.store.prefix + b'caretaker'
    first = await_truth(lambda: redis(place, 'HGET', record, 'token'), 'a supervisor')
    spawn(place)
    killed = spawn(place, 'dies')
    working = give(place, GATE)
    gate.pid()
    lost = give(place, HANG_ONCE, 'dies')
    cli = gate.pid()
    hall.kill()
    gate.go('without a townhall')
    assert place.await_end(working)['result'] == 'without a townhall'
    kill(killed)
    assert redis(place, 'HGET', record, 'token') == first
    place.hall()
    began = time.monotonic()
    place.await_event('agent.error', agent_name='dies')
    took = time.monotonic() - began
    assert took < 15, f'freed {took:.2f} s after the start of a townhall'
    await_exit(cli)
    gate.pid()
    gate.go('again')
    assert place.await_end(lost)['attempt'] == 2
    assert place.do('agent.get', agent='w')['restarts'] == 0


def test_a_killed_redis_is_back_within_seconds_and_has_all_that_was_acknowledged(place: Place, gate: Gate) -> None:
    hall = place.hall()
    spawn(place)
    working = give(place, GATE)
    gate.pid()
    acknowledged = {hall.post('/v1/backlog', {'description': f'{i}'}).json['task_id'] for i in range(20)}
    server = redis_pid(place)
    killed = kill(server)
    gate.go('while Redis was away')
    await_truth(lambda: hall.post('/v1/backlog', {'description': 'x'}).status == 201, 'a Redis')
    took = time.monotonic() - killed
    assert took < 10, f'ready {took:.2f} s after the death of Redis'
    assert redis_pid(place) != server
    found = place.await_end(working)
    assert (found['state'], found['attempt'], found['result']) == ('completed', 1, 'while Redis was away')
    assert acknowledged <= {each['task_id'] for each in hall.get('/v1/backlog').json['backlog']}
    assert kinds(place, 'task.completed', 'task.requeued') == ['task.completed']


def test_a_killed_workers_report_on_disk_is_delivered_and_its_task_is_not_run_again(place: Place, gate: Gate) -> None:
    worker = spawn(place)
    task_id = give(place, f'echo ran >>runs; {GATE}')
    gate.pid()
    spool = place.root / '.tt' / 'agents' / f'{place.do("agent.get", agent="w")["id"]}.spool'
    server = redis_pid(place)
    kill(server)
    await_exit(server)
    gate.go('kept')
    await_truth(lambda: list(spool.glob('*.json')), 'a report on disk')
    kill(worker)
    await_exit(worker)
    place.hall()
    found = await_truth(lambda: place.await_end(task_id), 'an end')
    assert (found['state'], found['attempt'], found['result']) == ('completed', 1, 'kept')
    assert history(place, task_id)[-1]['by'] == 'caretaker'
    await_truth(lambda: place.do('agent.get', agent='w')['state'] == 'Idle', 'a restart')
    assert place.await_end(give(place, 'true'))['state'] == 'completed'
    assert (place.root / 'runs').read_text() == 'ran\n'
    await_truth(lambda: not list(spool.glob('*.json')), 'an empty spool')
