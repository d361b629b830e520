"""Several hosts: two town directories on this machine that have different host names and share one Redis."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinytown.cli.format import format_answer
from tinytown.core import agents, hosts, recovery
from tinytown.core.town import Call, Town
from tinytown.errors import TownError, UsageError
from tinytown.host.processes import identify, name_host, this_boot, this_host
from tinytown.host.townhalls import running_townhalls
from tinytown.model import new_id
from tinytown.state.store import Step, text
from tinytown.worker.host_orders import HostOrders

from ..ground import ELSEWHERE, Puppet, check, enlist, redis
from ..support import OPERATOR, PATIENCE, Hall, Place, make_town, shell_cli, until
from ..worker.test_worker import await_exit, worker_pid

LEASE = 15  # long enough that a death is proven before the lease ends
HELD = shell_cli('echo held; sleep 100')
LEFT = 'Not removed, because their hosts are silent (tt hosts): w.'
WHERE = shell_cli('echo "$PWD $TINYTOWN_HOST"')


class Country:
    """Host `a`, which runs the Redis, and host `b`. Each has its own directory and townhall."""

    def __init__(self, directory: Path) -> None:
        agent = {'lease_secs': LEASE}
        self.a = make_town(directory / 'a', host='a', max_agents=50, agent=agent, agent_clis={'held': HELD})
        assert self.a.town
        self.b = self.host('b')
        self.halls = {'a': self.a.hall()}
        until(lambda: redis(self.a, 'HGET', self.a.store.prefix + b'caretaker', 'token'))  # `a` supervises the town
        self.halls['b'] = self.b.hall()

    def host(self, name: str) -> Place:
        """Joins another host and returns its directory. It has a coding CLI that `a` does not have."""
        url = f'unix://{self.a.root}/.tt/redis.sock'
        made = make_town(
            self.a.root.parent / name,
            host=name,
            redis={'url': url},
            agent={'lease_secs': LEASE, 'restart': 'on-failure', 'retry_backoff_secs': [0]},
            agent_clis={'held': HELD, 'where': WHERE, 'broken': '/no/such/program'},
        )
        made.tt('init', '--join')
        return made

    def close(self) -> None:
        for place in (self.b, self.a):
            place.close()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Gives this process the host name `name` for the duration of the block."""
    name_host(name)
    try:
        yield
    finally:
        name_host('')


@pytest.fixture(scope='module')
def country(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Country]:
    with named('a'):
        made = Country(tmp_path_factory.mktemp('h'))
    yield made
    made.close()


@pytest.fixture
def a(country: Country) -> Iterator[Place]:
    """Host `a`, where this process runs. The town is emptied afterwards."""
    with named('a'):
        yield country.a
        country.a.do('town.reset', force=True)


@pytest.fixture
def b(country: Country) -> Iterator[Hall]:
    """The townhall of host `b`. It is started again afterwards if the test stopped it."""
    yield country.halls['b']
    if country.halls['b'].process.poll() is not None:
        country.halls['b'] = country.b.hall()


@pytest.fixture
def far(ground: Place) -> hosts.Presence:
    """A live townhall on host `far`, played by the test."""
    return stay_alive(ground, hosts.Presence('far', new_id(), 'the place', ''))


def stay_alive(place: Place, presence: hosts.Presence) -> hosts.Presence:
    """Registers a townhall with a heartbeat in the future, so that it is not silent during the test."""
    place.store.call(presence.here(place.store))
    key = place.store.prefix + f'host:{presence.host}'.encode()
    later = f'{(time.time() + 3600) * 1000:.0f}'
    record = json.loads(redis(place, 'HGET', key, presence.token)) | {'heard': later}
    redis(place, 'HSET', key, presence.token, json.dumps(record))
    redis(place, 'ZADD', place.store.prefix + b'hosts', later, presence.host)
    return presence


def hosts_of(place: Place) -> dict[str, Any]:
    return {each['host']: each for each in place.do('town.list_hosts')['hosts']}


def problem(place: Place, operation: str, **arguments: Any) -> TownError:
    with pytest.raises(TownError) as raised:
        place.do(operation, **arguments)
    return raised.value


def end(hall: Hall) -> None:
    """Stops a townhall with SIGTERM."""
    hall.process.terminate()
    hall.process.wait()


def running(a: Place, name: str = 'w', host: str = 'b') -> tuple[str, int]:
    """Starts an agent that runs a task without finishing it. Returns the task id and the pid of the worker."""
    a.do('agent.spawn', name=name, cli='held', host=host)
    task: str = a.do('task.assign', agent=name, task='hold this')['task_id']
    a.await_event('task.started', task_id=task)
    return task, worker_pid(a, name)


# ------------------------------------------------------------------------------------------------------------- start


def test_spawn_with_a_host_starts_the_agent_there(country: Country, a: Place) -> None:
    reply = country.halls['a'].post('/v1/agents', {'name': 'w', 'cli': 'where', 'host': 'b'})
    assert reply.status == 201
    shown = a.do('agent.get', agent='w')
    assert (shown['host'], shown['state']) == ('b', 'Idle')
    done = a.await_end(a.do('task.assign', agent='w', task='say where you are')['task_id'])
    assert done['result'] == f'{country.b.root} b'
    assert (country.b.root / '.tt' / 'logs' / 'w.log').exists()
    assert not (a.root / '.tt' / 'logs' / 'w.log').exists()


def test_the_hosts_of_a_town_are_listed_with_their_townhalls_and_agents(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', host='b')
    found = country.halls['a'].get('/v1/hosts').json
    assert found['count'] == 2
    here, there = found['hosts']
    assert (here['host'], here['here'], here['silent'], here['agents']) == ('a', True, False, 0)
    assert (there['host'], there['here'], there['silent'], there['agents']) == ('b', False, False, 1)
    assert there['urls'] == [f'http://127.0.0.1:{country.halls["b"].port}']
    assert there['townhalls'] == 1
    assert 'a (this one)' in a.tt('hosts').stdout
    assert country.b.tt_json('hosts')['hosts'][1]['here'] is True


def test_agents_on_another_host_are_shown_with_their_host(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w')
    assert 'HOST' not in format_answer('agent.list', a.do('agent.list'), False)
    a.do('agent.spawn', name='far', host='b')
    assert 'HOST' in a.tt('status').stdout
    assert '- (on b)' in a.tt('top').stdout
    assert 'w' in country.b.tt('list').stdout


@pytest.mark.parametrize(
    ('host', 'cli', 'status', 'code', 'message'),
    [
        ('nowhere', 'demo', 409, 'host-unknown', 'known hosts: '),
        ('b', 'broken-name', 503, 'spawn-failed', 'broken-name'),
    ],
)
def test_a_failed_start_on_another_host_registers_no_agent(
    country: Country, a: Place, host: str, cli: str, status: int, code: str, message: str
) -> None:
    reply = country.halls['a'].post('/v1/agents', {'name': 'w', 'cli': cli, 'host': host})
    assert (reply.status, reply.json['code']) == (status, code)
    assert message in reply.json['detail']
    assert problem(a, 'agent.get', agent='w').status == 404
    assert 'agent.started' not in [event['type'] for event in a.history()]  # else the supervisor would start it again


def test_spawn_on_a_silent_host_is_refused_and_registers_nothing(a: Place, b: Hall) -> None:
    end(b)
    assert hosts_of(a)['b']['silent'] is True
    wrong = problem(a, 'agent.spawn', name='w', host='b')
    assert (wrong.status, wrong.code) == (503, 'host-silent')
    assert problem(a, 'agent.get', agent='w').status == 404


def test_exactly_one_of_several_townhalls_on_a_host_starts_an_agent(country: Country, a: Place) -> None:
    second = country.b.hall()
    names = [f'w{i}' for i in range(6)]
    for name in names:
        a.do('agent.spawn', name=name, host='b')
    assert hosts_of(a)['b']['townhalls'] == 2
    assert [country.b.log(name).count(' is up (pid') for name in names] == [1] * 6
    end(second)


def test_a_foreground_worker_moves_its_agent_to_its_own_host(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', max_rounds=1)
    a.do('agent.interrupt', agent='w')
    task = a.do('task.assign', agent='w', task='for later')['task_id']
    a.do('agent.kill', agent='w')
    assert a.do('agent.get', agent='w')['host'] == 'a'
    assert country.b.tt('worker', 'w').returncode == 0
    assert a.do('task.get', task_id=task)['state'] == 'completed'
    assert a.do('agent.get', agent='w')['host'] == 'b'


def test_a_restarted_agent_stays_on_its_host_or_moves_to_the_given_one(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', host='b')
    before = worker_pid(a)
    assert a.do('agent.restart', agent='w')['status'] == 'restarted'
    await_exit(before)
    assert a.do('agent.get', agent='w')['host'] == 'b'
    assert country.halls['b'].post('/v1/agents/w/restart', {'host': 'a'}).status == 200
    assert a.do('agent.get', agent='w')['host'] == 'a'
    assert ' is up (pid' in a.log('w')


def test_prune_removes_the_files_of_an_agent_on_another_host(country: Country, a: Place) -> None:
    agent = a.do('agent.spawn', name='w', host='b')['agent_id']
    a.do('agent.kill', agent='w')
    kept = country.b.root / '.tt' / 'agents'
    assert list(kept.glob(f'{agent}.*'))
    assert a.do('agent.prune')['agents'] == ['w']
    a.do('agent.spawn', name='next', host='b')  # orders are taken in sequence
    until(lambda: not list(kept.glob(f'{agent}.*')))


# -------------------------------------------------------------------------------------------------------------- stop


def test_kill_stops_an_agent_on_another_host_and_requeues_its_task(country: Country, a: Place) -> None:
    task, pid = running(a)
    reply = country.halls['a'].post('/v1/agents/w/kill', {'force': True})
    assert (reply.status, reply.json) == (200, {'status': 'stopped', 'agent': 'w'})
    await_exit(pid)
    assert a.do('task.get', task_id=task)['state'] == 'pending'
    last = next(e for e in reversed(a.history()) if e['type'] == 'agent.stopped')
    assert (last['by'], last['why']) == ('local', 'killed')
    check(a)


def test_an_agent_on_a_silent_host_is_stopped_when_the_host_is_back(country: Country, a: Place, b: Hall) -> None:
    task, pid = running(a)
    end(b)
    assert a.tt('prune', '--all').stdout.splitlines()[1:] == [LEFT]
    assert a.do('agent.get', agent='w')['state'] == 'Working', 'nothing was touched'
    wrong = problem(a, 'agent.kill', agent='w')
    assert (wrong.status, wrong.code) == (503, 'host-silent')
    assert 'tt kill w --force' in wrong.detail
    assert a.do('agent.get', agent='w')['state'] == 'Draining'
    assert identify(pid).start, 'its process is still running'
    findings = json.loads(a.tt('doctor', '--json', check=False).stdout)['findings']
    found = {each['kind']: each['what'] for each in findings}
    assert "host 'b' has 1 live agents" in found['silent host']
    back = country.b.hall()
    a.await_event('agent.stopped', agent_name='w')
    await_exit(pid)
    assert a.do('task.get', task_id=task)['state'] == 'pending'
    end(back)


def test_an_idle_agent_on_a_silent_host_exits_by_itself_when_it_is_killed(
    a: Place, b: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, '_EXIT_SECS', PATIENCE)
    a.do('agent.spawn', name='w', host='b')
    pid = worker_pid(a)
    end(b)
    assert a.do('agent.kill', agent='w') == {'status': 'stopped', 'agent': 'w'}
    await_exit(pid)


def test_an_abandoned_agent_loses_its_tasks_and_its_worker_exits(a: Place, b: Hall) -> None:
    task, pid = running(a)
    queued = a.do('task.assign', agent='w', task='next')['task_id']
    end(b)
    assert a.do('agent.kill', agent='w', force=True)['status'] == 'stopped'
    assert a.do('task.get', task_id=task)['state'] == 'pending'
    assert a.do('recovery.reclaim_tasks', from_='w')['reclaimed'] == 1
    assert a.do('task.get', task_id=queued)['state'] == 'pending'
    await_exit(pid)  # its next heartbeat is refused
    assert a.do('agent.restart', agent='w', host='a')['status'] == 'restarted'
    check(a)


@pytest.mark.usefixtures('b')
@pytest.mark.parametrize('called', ['b', 'a', 'renamed'])
def test_tt_stop_stops_only_the_workers_of_its_directory_whatever_the_host_is_called(
    country: Country, a: Place, called: str
) -> None:
    a.do('agent.spawn', name='here')
    a.do('agent.spawn', name='there', host='b')
    stopped = country.b.tt_json('stop', TINYTOWN_HOST=called)
    assert country.halls['b'].process.wait(PATIENCE) == 0
    assert (stopped['agents'], stopped['townhalls']) == (['there'], 1)
    assert a.do('agent.get', agent='here')['state'] == 'Idle'


def test_tt_stop_keeps_the_record_of_a_townhall_that_it_cannot_stop(ground: Place) -> None:
    file = ground.root / '.tt' / 'run' / 'townhall-7.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({'host': 'h', 'boot': ANOTHER, 'pid': 7, 'start': '1', 'url': 'http://there'}))
    with locked(file):
        left = running_townhalls(ground.root)
        done = ground.tt('stop', check=False)
    assert (done.returncode, [each[0] for each in left]) == (1, [file])
    assert done.stdout.splitlines()[0] == 'Stopped 0 townhalls and 0 workers.'
    assert 'http://there (process 7) could not be stopped: it is in another container' in done.stdout
    assert file.exists()
    assert running_townhalls(ground.root) == [], 'its lock is free, so it is dead'
    assert not file.exists()


def test_tt_stop_stops_processes_that_the_configured_redis_does_not_know(directory: Path) -> None:
    place = make_town(directory)
    hall = place.hall()
    place.do('agent.spawn', name='w')
    pid = worker_pid(place)
    try:
        place.tt('config', 'redis.url', 'redis://127.0.0.1:1')
        done = place.tt('stop', '--redis', check=False)
        assert done.returncode == 1
        line = 'Stopped 1 townhall, 0 workers, 1 worker without a record in Redis and Redis.'
        assert done.stdout.splitlines()[0] == line
        assert '127.0.0.1:1' in done.stdout.splitlines()[1]
        assert hall.process.wait(PATIENCE) == 0
        await_exit(pid)
    finally:
        place.tt('config', 'redis.url', '')
        place.close()


# -------------------------------------------------------------------------------------------------------- supervision


ANOTHER = f'{this_boot()}1'  # another container on this machine


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Locks a file, as its live process would."""
    with open(file, 'rb') as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def worker_in_another_container(ground: Place) -> tuple[str, Path]:
    """Registers an agent with such a worker. Returns the id of its running task and the file that notes its process."""
    puppet = enlist(ground, 'w')
    process = replace(identify(os.getpid()), boot=ANOTHER, start='1')
    puppet.becomes(process)
    task: str = ground.do('task.assign', agent='w', task='hold this')['task_id']
    assert puppet.take()[0] == task
    note = ground.root / '.tt' / 'agents' / f'{puppet.id}.process'
    note.write_text(f'{puppet.instance} {process.line}')
    return task, note


def test_a_worker_in_another_container_is_dead_only_when_its_lock_is_free(ground: Place) -> None:
    task, note = worker_in_another_container(ground)
    with locked(note):
        assert ground.do('recovery.recover_agents')['recovered'] == 0
        assert 'dead worker' not in ground.tt('doctor', check=False).stdout
        for refused in (problem(ground, 'agent.kill', agent='w'), problem(ground, 'agent.restart', agent='w')):
            assert refused.code == 'other-host'
            assert 'another container' in refused.detail
        assert ground.do('agent.get', agent='w')['state'] == 'Working', 'nothing was touched'
    assert ground.do('recovery.recover_agents')['agents'] == ['w']
    assert ground.do('task.get', task_id=task)['state'] == 'pending'


def test_a_worker_in_another_container_can_be_abandoned(ground: Place) -> None:
    task, note = worker_in_another_container(ground)
    with locked(note):
        assert ground.do('agent.kill', agent='w', force=True)['status'] == 'stopped'
    assert 'abandoned' in ground.do('task.history', task_id=task)['history'][-1]['why']


def test_a_worker_without_a_process_note_is_freed_after_a_lease_of_silence(ground: Place) -> None:
    task, note = worker_in_another_container(ground)
    note.unlink()
    assert ground.do('recovery.recover_agents')['recovered'] == 0
    waits: list[float] = []
    call = Call(ground.town, OPERATOR)
    heartbeat = ground.store.beat(*enlisted(ground), ())

    def send_heartbeat(_: float) -> None:
        select.select([], [], [], 0.01)  # long enough for the age to grow by Redis' clock
        ground.store.call(heartbeat)

    ground.store.run(recovery.free_if_silent(call, 'w', send_heartbeat))
    assert ground.do('task.get', task_id=task)['state'] == 'running', 'it sent a heartbeat'

    def stay_silent(seconds: float) -> None:
        waits.append(seconds)
        select.select([], [], [], 0.002)

    ground.store.run(recovery.free_if_silent(call, 'w', stay_silent))
    assert sum(waits) > ground.town.config.agent.lease_secs
    assert ground.do('task.get', task_id=task)['state'] == 'pending'


def test_each_host_supervises_its_own_processes(a: Place) -> None:
    """Host `a` supervises the town because it came first, but only `b` can prove that a worker there is dead."""
    task, pid = running(a)
    os.kill(pid, signal.SIGKILL)
    requeued = a.await_event('task.requeued', task_id=task)
    assert requeued['why'] == 'its process died'
    a.await_event('agent.restarting', agent_name='w')  # because `b` has agent.restart = on-failure
    a.await_event('task.started', task_id=task, attempt=2)
    shown = a.do('agent.get', agent='w')
    assert (shown['host'], shown['restarts']) == ('b', 1)
    assert shown['pid'] != pid
    assert redis(a, 'HGET', a.store.prefix + b'caretaker', 'token') != redis(
        a, 'HGET', a.store.prefix + b'caretaker:b', 'token'
    )


def test_a_log_is_read_on_the_host_that_has_it(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', host='b')
    wrong = country.halls['a'].get('/v1/agents/w/logs')
    assert (wrong.status, wrong.json['code']) == (409, 'other-host')
    assert wrong.json['detail'] == "The log of 'w' is on host 'b'; ask there", (
        'a loopback URL is useless on other hosts'
    )
    assert ' is up (pid' in country.halls['b'].get('/v1/agents/w/logs').json['text']


def test_the_refusal_of_a_log_on_another_host_names_a_reachable_url(ground: Place) -> None:
    stay_alive(ground, hosts.Presence('far', new_id(), 'the place', 'http://192.0.2.7:8787'))
    enlist(ground, 'w').hello(replace(ELSEWHERE, host='far'))
    wrong = problem(ground, 'agent.logs', agent='w')
    assert wrong.detail == "The log of 'w' is on host 'far'; ask its townhall:  tt --url http://192.0.2.7:8787"


def enlisted(place: Place) -> tuple[str, str]:
    """The id and instance of the agent `w`."""
    found = place.store.run(agents.look_up(Call(place.town, OPERATOR), 'w'))
    return found.id, found.instance


# ------------------------------------------------------------------------------------------------------------ orders


class FakeTownhall:
    """Takes the orders of the host of `presence`. The test plays the workers that it starts."""

    def __init__(self, place: Place, presence: hosts.Presence) -> None:
        self.place = place
        self.started: list[str] = []
        self.orders = HostOrders(place.town, presence, self.start)

    def start(self, _town: Town, agent_id: str, name: str, instance: str) -> None:
        self.started.append(name)
        Puppet(self.place, agent_id, name, instance).hello(ELSEWHERE)


def register(place: Place, name: str, within: int) -> tuple[str, str]:
    """Registers an agent for host `far` to start within `within` ms. Returns the agent id and the order."""
    agent, instance = new_id(), new_id()
    head = f'{{"id":"{agent}","name":"{name}","role_id":null'
    where = ('far', within, 60_000)
    reply = place.store.call(place.store.register(agent, name, head, 9, 0, instance, 'x', where))
    return agent, text(reply[1])


def result_of(place: Place, order: str) -> dict[str, str]:
    """The reported result of an order."""
    reply = place.store.call(place.store.entries(f'host:far:answer:{order}', '0-0', 20_000))
    return next(hosts.fields(reply))[1]


def take_orders(townhall: FakeTownhall) -> None:
    """Takes the orders that are there, and waits until they are carried out."""
    townhall.orders.take_orders(10)
    for thread in threading.enumerate():
        if thread.name.startswith('host-orders-'):
            thread.join()


def test_an_order_that_nobody_takes_is_withdrawn(ground: Place, far: hosts.Presence) -> None:
    config = ground.town.config
    hurried = config.but(townhall=config.townhall.but(request_timeout_ms=1200))
    call = Call(Town(ground.root, hurried, ground.store), OPERATOR)
    with pytest.raises(TownError) as raised:
        ground.store.run(agents.spawn(call, name='w', host=far.host))
    assert (raised.value.status, raised.value.code) == (503, 'host-silent')
    assert problem(ground, 'agent.get', agent='w').status == 404
    assert redis(ground, 'XLEN', ground.store.prefix + b'host:far:orders') == 0
    check(ground)


def test_the_error_for_a_start_of_unknown_result_has_the_agents_id(ground: Place, far: hosts.Presence) -> None:
    config = ground.town.config
    hurried = config.but(townhall=config.townhall.but(request_timeout_ms=1500))

    def taken(spawning: Step[Any]) -> Step[Any]:
        """Spawns; the townhall there takes the order as soon as there is one, but never reports a result."""
        command = next(spawning)
        while True:
            reply = yield command
            if orders := list(hosts.fields(ground.store.call(hosts.orders(ground.store, 'far', 1)))):
                ground.store.call(hosts.take_order(ground.store, far, orders[0][0], ELSEWHERE.line))
            command = spawning.send(reply)

    call = Call(Town(ground.root, hurried, ground.store), OPERATOR)
    with pytest.raises(TownError) as raised:
        ground.store.run(taken(agents.spawn(call, name='w', host='far')))
    assert (raised.value.status, raised.value.code) == (503, 'host-unsure')
    assert f"'w' ({enlisted(ground)[0]})" in raised.value.detail


def test_an_order_is_carried_out_once_and_its_result_is_reported(ground: Place, far: hosts.Presence) -> None:
    agent, order = register(ground, 'w', 60_000)
    first, second = FakeTownhall(ground, far), FakeTownhall(ground, far)
    take_orders(first)
    take_orders(second)
    assert (first.started, second.started) == (['w'], [])
    assert result_of(ground, order)['code'] == ''
    assert ground.do('agent.get', agent=agent)['state'] == 'Idle'


def test_an_order_to_start_that_comes_too_late_starts_nothing(ground: Place, far: hosts.Presence) -> None:
    agent, order = register(ground, 'w', -1)
    townhall = FakeTownhall(ground, far)
    take_orders(townhall)
    assert townhall.started == []
    assert result_of(ground, order)['code'] == 'order-late'
    assert problem(ground, 'agent.get', agent=agent).status == 404


def test_an_agent_that_was_killed_before_its_start_is_not_started(ground: Place, far: hosts.Presence) -> None:
    agent, order = register(ground, 'w', 60_000)
    stopping = ground.store.run(agents.look_up(Call(ground.town, OPERATOR), agent))
    ground.store.call(ground.store.stop_there(agent, stopping.instance, 'far', 'killed', 0, 'backlog', 60_000))
    townhall = FakeTownhall(ground, replace(far, host='far'))
    with named('far'):
        take_orders(townhall)
    assert townhall.started == []
    assert result_of(ground, order)['code'] == 'stale-instance'
    assert ground.do('agent.get', agent=agent)['state'] == 'Stopped'


def test_a_townhall_that_has_ended_takes_no_order(ground: Place, far: hosts.Presence) -> None:
    register(ground, 'w', 60_000)
    ground.store.call(far.gone(ground.store))
    townhall = FakeTownhall(ground, far)
    take_orders(townhall)
    assert townhall.started == []
    assert redis(ground, 'XLEN', ground.store.prefix + b'host:far:orders') == 1


# ------------------------------------------------------------------------------------------------------------- names


def test_a_host_name_is_used_in_one_place_at_a_time(ground: Place) -> None:
    other = stay_alive(ground, hosts.Presence(this_host(), new_id(), 'another place', ''))
    waits: list[float] = []
    with pytest.raises(UsageError, match=r'another place.*TINYTOWN_HOST'):
        hosts.arrive(ground.town, '', waits.append)
    assert sum(waits) > hosts.SILENCE_SECS, 'the other townhall could have been a dead one'
    ground.store.call(other.gone(ground.store))
    assert hosts.arrive(ground.town, '', waits.append).host == this_host()


def test_recover_is_refused_if_another_place_uses_the_host_name(ground: Place) -> None:
    enlist(ground, 'w').becomes(replace(identify(os.getpid()), start='1'))
    other = stay_alive(ground, hosts.Presence(this_host(), new_id(), 'another place', ''))
    assert problem(ground, 'recovery.recover_agents').code == 'host-name-taken'
    assert 'TINYTOWN_HOST' in ground.tt('doctor', '--fix', check=False).stdout
    ground.store.call(other.gone(ground.store))
    assert ground.do('recovery.recover_agents')['agents'] == ['w']


def test_a_host_name_is_free_again_when_its_townhall_is_silent(ground: Place) -> None:
    key = ground.store.prefix + f'host:{this_host()}'.encode()
    redis(ground, 'HSET', key, 'dead', '{"heard":"1","place":"another place","url":""}')
    hosts.arrive(ground.town, '')
    assert redis(ground, 'HEXISTS', key, 'dead') == 0


def test_a_host_without_a_heartbeat_for_a_week_is_forgotten(ground: Place) -> None:
    redis(ground, 'ZADD', ground.store.prefix + b'hosts', 1, 'old')
    redis(ground, 'XADD', ground.store.prefix + b'host:old:orders', '*', 'verb', 'forget')
    hosts.arrive(ground.town, '')
    assert set(hosts_of(ground)) == {this_host()}
    assert redis(ground, 'KEYS', '*old*') == []


def test_a_directory_joins_a_town_whose_redis_it_names(country: Country, directory: Path) -> None:
    url = f'unix://{country.a.root}/.tt/redis.sock'
    stranger = make_town(directory / 'new', redis={'url': url}, host='c')
    refused = stranger.tt('status', check=False)
    assert refused.returncode == 1
    assert 'tt init --join' in refused.stderr
    joined = stranger.tt_json('init', '--join')
    assert joined == {'name': 'test', 'root': str(stranger.root), 'host': 'c'}
    assert stranger.tt_json('status')['name'] == 'test'
    made = Place(directory / 'made')
    made.root.mkdir()
    words = ('init', '--join', '--name', 'test', '--redis-url', url, '--host', 'd')
    assert made.tt_json(*words)['host'] == 'd'
    assert (made.root / 'tinytown.toml').stat().st_mode & 0o077 == 0, 'it may contain a password'


@pytest.mark.parametrize(
    ('words', 'status', 'message'),
    [
        (('--name', 'other', '--redis-url', 'URL'), 1, "no town 'other'"),
        (('--name', 'test'), 2, 'redis.url is not set'),
        (('--name', 'test', '--redis-url', 'URL', '--host', 'a'), 1, 'uses the name of this host'),
        (('--name', 'test', '--redis-url', 'URL', '--host', 'a b'), 2, '--host'),
    ],
)
def test_a_refused_join_leaves_no_town_behind(
    country: Country, directory: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    url = f'unix://{country.a.root}/.tt/redis.sock'
    done = Place(directory).tt('init', '--join', *(word.replace('URL', url) for word in words), check=False)
    assert done.returncode == status
    assert message in done.stderr
    assert not (directory / 'tinytown.toml').exists()


def test_a_foreground_spawn_on_another_host_is_refused(country: Country) -> None:
    done = country.b.tt('spawn', 'w', '--foreground', '--host', 'a', check=False)
    assert (done.returncode, '--host' in done.stderr) == (2, True)
