"""Several hosts: two directories on this machine that go by different names and share one Redis."""

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

LEASE = 15  # longer than it takes to prove a death, and heartbeats are as rare as they may be
HELD = shell_cli('echo held; sleep 100')
LEFT = 'Left as they are, on hosts that are silent (tt hosts): w.'
WHERE = shell_cli('echo "$PWD $TINYTOWN_HOST"')


class Country:
    """Host `a`, whose Redis it is, and host `b`, each with a directory and a townhall of its own."""

    def __init__(self, directory: Path) -> None:
        agent = {'lease_secs': LEASE}
        self.a = make_town(directory / 'a', host='a', max_agents=50, agent=agent, agent_clis={'held': HELD})
        assert self.a.town
        self.b = self.host('b')
        self.halls = {'a': self.a.hall()}
        until(lambda: redis(self.a, 'HGET', self.a.store.prefix + b'caretaker', 'token'))  # it looks after the town
        self.halls['b'] = self.b.hall()

    def host(self, name: str) -> Place:
        """The directory of a further host, joined; it knows a coding CLI that `a` does not."""
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
    """Has this process be on the host of that name."""
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
    """Host `a`, on which this process is; afterwards the town holds nothing."""
    with named('a'):
        yield country.a
        country.a.do('town.reset', force=True)


@pytest.fixture
def b(country: Country) -> Iterator[Hall]:
    """The townhall of host `b`, which serves again afterwards."""
    yield country.halls['b']
    if country.halls['b'].process.poll() is not None:
        country.halls['b'] = country.b.hall()


@pytest.fixture
def played(ground: Place) -> hosts.Presence:
    """A townhall on host `far` that is heard of, and is the test."""
    return heard_of(ground, hosts.Presence('far', new_id(), 'the place', ''))


def heard_of(place: Place, presence: hosts.Presence) -> hosts.Presence:
    """A townhall that says it is there, and that is not silent while the test lasts."""
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
    """Ends a townhall in good order."""
    hall.process.terminate()
    hall.process.wait()


def running(a: Place, name: str = 'w', host: str = 'b') -> tuple[str, int]:
    """An agent on a host that runs a task and does not end it: the task, and the pid of its worker."""
    a.do('agent.spawn', name=name, cli='held', host=host)
    task: str = a.do('task.assign', agent=name, task='hold this')['task_id']
    a.await_event('task.started', task_id=task)
    return task, worker_pid(a, name)


# ------------------------------------------------------------------------------------------------------------- start


def test_an_agent_is_started_on_the_host_that_is_named_and_works_there(country: Country, a: Place) -> None:
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


def test_agents_are_shown_with_their_host_where_it_is_not_this_one(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w')
    assert 'HOST' not in format_answer('agent.list', a.do('agent.list'), False)
    a.do('agent.spawn', name='far', host='b')
    assert 'HOST' in a.tt('status').stdout
    assert '- (on b)' in a.tt('top').stdout
    assert 'w' in country.b.tt('list').stdout


@pytest.mark.parametrize(
    ('host', 'cli', 'status', 'code', 'said'),
    [
        ('nowhere', 'demo', 409, 'host-unknown', 'known hosts: '),
        ('b', 'broken-name', 503, 'spawn-failed', 'broken-name'),
    ],
)
def test_what_can_not_be_started_there_is_not_registered(
    country: Country, a: Place, host: str, cli: str, status: int, code: str, said: str
) -> None:
    reply = country.halls['a'].post('/v1/agents', {'name': 'w', 'cli': cli, 'host': host})
    assert (reply.status, reply.json['code']) == (status, code)
    assert said in reply.json['detail']
    assert problem(a, 'agent.get', agent='w').status == 404
    assert 'agent.started' not in [event['type'] for event in a.history()]  # or a caretaker would start it again


def test_a_host_whose_townhall_has_ended_is_silent_and_nothing_is_registered(a: Place, b: Hall) -> None:
    end(b)
    assert hosts_of(a)['b']['silent'] is True
    wrong = problem(a, 'agent.spawn', name='w', host='b')
    assert (wrong.status, wrong.code) == (503, 'host-silent')
    assert problem(a, 'agent.get', agent='w').status == 404


def test_of_several_townhalls_on_a_host_one_starts_an_agent(country: Country, a: Place) -> None:
    second = country.b.hall()
    names = [f'w{i}' for i in range(6)]
    for name in names:
        a.do('agent.spawn', name=name, host='b')
    assert hosts_of(a)['b']['townhalls'] == 2
    assert [country.b.log(name).count(' is up (pid') for name in names] == [1] * 6
    end(second)


def test_a_worker_in_the_foreground_takes_its_agent_to_the_host_that_it_runs_on(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', max_rounds=1)
    a.do('agent.interrupt', agent='w')
    task = a.do('task.assign', agent='w', task='for later')['task_id']
    a.do('agent.kill', agent='w')
    assert a.do('agent.get', agent='w')['host'] == 'a'
    assert country.b.tt('worker', 'w').returncode == 0
    assert a.do('task.get', task_id=task)['state'] == 'completed'
    assert a.do('agent.get', agent='w')['host'] == 'b'


def test_a_restart_is_where_the_agent_was_or_where_it_is_sent(country: Country, a: Place) -> None:
    a.do('agent.spawn', name='w', host='b')
    before = worker_pid(a)
    assert a.do('agent.restart', agent='w')['status'] == 'restarted'
    await_exit(before)
    assert a.do('agent.get', agent='w')['host'] == 'b'
    assert country.halls['b'].post('/v1/agents/w/restart', {'host': 'a'}).status == 200
    assert a.do('agent.get', agent='w')['host'] == 'a'
    assert ' is up (pid' in a.log('w')


def test_an_agent_that_is_forgotten_leaves_no_files_on_its_host(country: Country, a: Place) -> None:
    agent = a.do('agent.spawn', name='w', host='b')['agent_id']
    a.do('agent.kill', agent='w')
    kept = country.b.root / '.tt' / 'agents'
    assert list(kept.glob(f'{agent}.*'))
    assert a.do('agent.prune')['agents'] == ['w']
    a.do('agent.spawn', name='next', host='b')  # orders are taken in their order
    until(lambda: not list(kept.glob(f'{agent}.*')))


# -------------------------------------------------------------------------------------------------------------- stop


def test_kill_ends_an_agent_elsewhere_and_its_task_is_back_in_the_backlog(country: Country, a: Place) -> None:
    task, pid = running(a)
    reply = country.halls['a'].post('/v1/agents/w/kill', {'force': True})
    assert (reply.status, reply.json) == (200, {'status': 'stopped', 'agent': 'w'})
    await_exit(pid)
    assert a.do('task.get', task_id=task)['state'] == 'pending'
    last = next(e for e in reversed(a.history()) if e['type'] == 'agent.stopped')
    assert (last['by'], last['why']) == ('local', 'killed')
    check(a)


def test_an_agent_on_a_silent_host_is_stopped_when_that_is_back(country: Country, a: Place, b: Hall) -> None:
    task, pid = running(a)
    end(b)
    assert a.tt('prune', '--all').stdout.splitlines()[1:] == [LEFT]
    assert a.do('agent.get', agent='w')['state'] == 'Working', 'nothing was touched'
    wrong = problem(a, 'agent.kill', agent='w')
    assert (wrong.status, wrong.code) == (503, 'host-silent')
    assert 'tt kill w --force' in wrong.detail
    assert a.do('agent.get', agent='w')['state'] == 'Draining'
    assert identify(pid).start, 'it runs still'
    findings = json.loads(a.tt('doctor', '--json', check=False).stdout)['findings']
    found = {each['kind']: each['what'] for each in findings}
    assert "host 'b' has 1 live agents" in found['silent host']
    back = country.b.hall()
    a.await_event('agent.stopped', agent_name='w')
    await_exit(pid)
    assert a.do('task.get', task_id=task)['state'] == 'pending'
    end(back)


def test_an_idle_agent_ends_by_itself_where_no_townhall_is_that_could_stop_it(
    a: Place, b: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, '_GOODBYE_SECS', PATIENCE)
    a.do('agent.spawn', name='w', host='b')
    pid = worker_pid(a)
    end(b)
    assert a.do('agent.kill', agent='w') == {'status': 'stopped', 'agent': 'w'}
    await_exit(pid)


def test_an_agent_that_is_given_up_can_do_nothing_more_and_ends(a: Place, b: Hall) -> None:
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
def test_tt_stop_ends_the_workers_of_its_directory_alone_whatever_the_host_is_called(
    country: Country, a: Place, called: str
) -> None:
    a.do('agent.spawn', name='here')
    a.do('agent.spawn', name='there', host='b')
    stopped = country.b.tt_json('stop', TINYTOWN_HOST=called)
    assert country.halls['b'].process.wait(PATIENCE) == 0
    assert (stopped['agents'], stopped['townhalls']) == (['there'], 1)
    assert a.do('agent.get', agent='here')['state'] == 'Idle'


def test_a_townhall_that_can_not_be_stopped_is_not_forgotten(ground: Place) -> None:
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
    assert running_townhalls(ground.root) == [], 'nobody holds its lock: it died'
    assert not file.exists()


def test_tt_stop_ends_what_the_redis_of_now_does_not_tell_of(directory: Path) -> None:
    place = make_town(directory)
    hall = place.hall()
    place.do('agent.spawn', name='w')
    pid = worker_pid(place)
    try:
        place.tt('config', 'redis.url', 'redis://127.0.0.1:1')
        done = place.tt('stop', '--redis', check=False)
        assert done.returncode == 1
        said = 'Stopped 1 townhall, 0 workers, 1 worker that its Redis has not been told of and Redis.'
        assert done.stdout.splitlines()[0] == said
        assert '127.0.0.1:1' in done.stdout.splitlines()[1]
        assert hall.process.wait(PATIENCE) == 0
        await_exit(pid)
    finally:
        place.tt('config', 'redis.url', '')
        place.close()


# ----------------------------------------------------------------------------------------------------- who looks after


ANOTHER = f'{this_boot()}1'  # another container on this machine


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Has a file be locked as by a process that lives."""
    with open(file, 'rb') as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def beside(ground: Place) -> tuple[str, Path]:
    """An agent whose worker is in another container of this host: its task, and the note of its process."""
    puppet = enlist(ground, 'w')
    process = replace(identify(os.getpid()), boot=ANOTHER, start='1')
    puppet.becomes(process)
    task: str = ground.do('task.assign', agent='w', task='hold this')['task_id']
    assert puppet.take()[0] == task
    note = ground.root / '.tt' / 'agents' / f'{puppet.id}.process'
    note.write_text(f'{puppet.instance} {process.line}')
    return task, note


def test_a_worker_in_another_container_is_dead_when_its_lock_is_free_and_not_before(ground: Place) -> None:
    task, note = beside(ground)
    with locked(note):
        assert ground.do('recovery.recover_agents')['recovered'] == 0
        assert 'dead worker' not in ground.tt('doctor', check=False).stdout
        for refused in (problem(ground, 'agent.kill', agent='w'), problem(ground, 'agent.restart', agent='w')):
            assert refused.code == 'other-host'
            assert 'another container' in refused.detail
        assert ground.do('agent.get', agent='w')['state'] == 'Working', 'nothing was touched'
    assert ground.do('recovery.recover_agents')['agents'] == ['w']
    assert ground.do('task.get', task_id=task)['state'] == 'pending'


def test_a_worker_in_another_container_can_be_given_up(ground: Place) -> None:
    task, note = beside(ground)
    with locked(note):
        assert ground.do('agent.kill', agent='w', force=True)['status'] == 'stopped'
    assert 'given up' in ground.do('task.history', task_id=task)['history'][-1]['why']


def test_of_a_worker_that_left_no_note_a_lease_of_silence_has_to_tell(ground: Place) -> None:
    task, note = beside(ground)
    note.unlink()
    assert ground.do('recovery.recover_agents')['recovered'] == 0
    waits: list[float] = []
    call = Call(ground.town, OPERATOR)
    beat = ground.store.beat(*enlisted(ground), ())

    def once(_: float) -> None:
        select.select([], [], [], 0.01)  # so long that its age grows, by the clock of Redis
        ground.store.call(beat)

    ground.store.run(recovery.outwait(call, 'w', once))
    assert ground.do('task.get', task_id=task)['state'] == 'running', 'it was heard of'

    def silent(seconds: float) -> None:
        waits.append(seconds)
        select.select([], [], [], 0.002)

    ground.store.run(recovery.outwait(call, 'w', silent))
    assert sum(waits) > ground.town.config.agent.lease_secs
    assert ground.do('task.get', task_id=task)['state'] == 'pending'


def test_each_host_looks_after_its_own_processes(a: Place) -> None:
    """The caretaker of the town is that of `a`, which came first; only `b` can tell that a worker there is dead."""
    task, pid = running(a)
    os.kill(pid, signal.SIGKILL)
    requeued = a.await_event('task.requeued', task_id=task)
    assert requeued['why'] == 'its process died'
    a.await_event('agent.restarting', agent_name='w')  # as the settings of `b` have it
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
    assert wrong.json['detail'] == "The log of 'w' is on host 'b'; ask there", 'a loopback address is no use elsewhere'
    assert ' is up (pid' in country.halls['b'].get('/v1/agents/w/logs').json['text']


def test_who_has_a_log_is_said_where_it_can_be_reached(ground: Place) -> None:
    heard_of(ground, hosts.Presence('far', new_id(), 'the place', 'http://192.0.2.7:8787'))
    enlist(ground, 'w').hello(replace(ELSEWHERE, host='far'))
    wrong = problem(ground, 'agent.logs', agent='w')
    assert wrong.detail == "The log of 'w' is on host 'far'; ask its townhall:  tt --url http://192.0.2.7:8787"


def enlisted(place: Place) -> tuple[str, str]:
    """The id and instance of the agent `w`."""
    found = place.store.run(agents.look_up(Call(place.town, OPERATOR), 'w'))
    return found.id, found.instance


# ------------------------------------------------------------------------------------------------------------ orders


class Watch:
    """A steward whose workers the test plays, on the host of `presence`."""

    def __init__(self, place: Place, presence: hosts.Presence) -> None:
        self.place = place
        self.started: list[str] = []
        self.steward = HostOrders(place.town, presence, self.start)

    def start(self, _town: Town, agent_id: str, name: str, instance: str) -> None:
        self.started.append(name)
        Puppet(self.place, agent_id, name, instance).hello(ELSEWHERE)


def register(place: Place, name: str, within: int) -> tuple[str, str]:
    """An agent that host `far` is to start within so many ms: its id, and the order."""
    agent, instance = new_id(), new_id()
    head = f'{{"id":"{agent}","name":"{name}","role_id":null'
    where = ('far', within, 60_000)
    reply = place.store.call(place.store.register(agent, name, head, 9, 0, instance, 'x', where))
    return agent, text(reply[1])


def answers(place: Place, order: str) -> dict[str, str]:
    """What is said to have come of an order."""
    reply = place.store.call(place.store.entries(f'host:far:answer:{order}', '0-0', 20_000))
    return next(hosts.fields(reply))[1]


def look(watch: Watch) -> None:
    """One look, and all that follows from it."""
    watch.steward.take_orders(10)
    for thread in threading.enumerate():
        if thread.name.startswith('host-orders-'):
            thread.join()


def test_an_order_that_nobody_takes_is_withdrawn(ground: Place, played: hosts.Presence) -> None:
    config = ground.town.config
    hurried = config.but(townhall=config.townhall.but(request_timeout_ms=1200))
    call = Call(Town(ground.root, hurried, ground.store), OPERATOR)
    with pytest.raises(TownError) as raised:
        ground.store.run(agents.spawn(call, name='w', host=played.host))
    assert (raised.value.status, raised.value.code) == (503, 'host-silent')
    assert problem(ground, 'agent.get', agent='w').status == 404
    assert redis(ground, 'XLEN', ground.store.prefix + b'host:far:orders') == 0
    check(ground)


def test_who_is_left_unsure_of_a_start_is_told_the_id_of_the_agent(ground: Place, played: hosts.Presence) -> None:
    config = ground.town.config
    hurried = config.but(townhall=config.townhall.but(request_timeout_ms=1500))

    def taken(spawning: Step[Any]) -> Step[Any]:
        """Spawns, and has the townhall there take the order as soon as there is one."""
        command = next(spawning)
        while True:
            reply = yield command
            if orders := list(hosts.fields(ground.store.call(hosts.orders(ground.store, 'far', 1)))):
                ground.store.call(hosts.take_order(ground.store, played, orders[0][0], ELSEWHERE.line))
            command = spawning.send(reply)

    call = Call(Town(ground.root, hurried, ground.store), OPERATOR)
    with pytest.raises(TownError) as raised:
        ground.store.run(taken(agents.spawn(call, name='w', host='far')))
    assert (raised.value.status, raised.value.code) == (503, 'host-unsure')
    assert f"'w' ({enlisted(ground)[0]})" in raised.value.detail


def test_an_order_is_carried_out_once_and_what_came_of_it_is_told(ground: Place, played: hosts.Presence) -> None:
    agent, order = register(ground, 'w', 60_000)
    first, second = Watch(ground, played), Watch(ground, played)
    look(first)
    look(second)
    assert (first.started, second.started) == (['w'], [])
    assert answers(ground, order)['code'] == ''
    assert ground.do('agent.get', agent=agent)['state'] == 'Idle'


def test_an_order_to_start_that_comes_too_late_starts_nothing(ground: Place, played: hosts.Presence) -> None:
    agent, order = register(ground, 'w', -1)
    watch = Watch(ground, played)
    look(watch)
    assert watch.started == []
    assert answers(ground, order)['code'] == 'order-late'
    assert problem(ground, 'agent.get', agent=agent).status == 404


def test_what_was_killed_before_it_was_started_is_not_started(ground: Place, played: hosts.Presence) -> None:
    agent, order = register(ground, 'w', 60_000)
    stopping = ground.store.run(agents.look_up(Call(ground.town, OPERATOR), agent))
    ground.store.call(ground.store.stop_there(agent, stopping.instance, 'far', 'killed', 0, 'backlog', 60_000))
    watch = Watch(ground, replace(played, host='far'))
    with named('far'):
        look(watch)
    assert watch.started == []
    assert answers(ground, order)['code'] == 'stale-instance'
    assert ground.do('agent.get', agent=agent)['state'] == 'Stopped'


def test_a_townhall_that_is_not_there_takes_no_order(ground: Place, played: hosts.Presence) -> None:
    register(ground, 'w', 60_000)
    ground.store.call(played.gone(ground.store))
    watch = Watch(ground, played)
    look(watch)
    assert watch.started == []
    assert redis(ground, 'XLEN', ground.store.prefix + b'host:far:orders') == 1


# ------------------------------------------------------------------------------------------------------------- names


def test_a_host_s_name_is_used_in_one_place_at_a_time(ground: Place) -> None:
    other = heard_of(ground, hosts.Presence(this_host(), new_id(), 'another place', ''))
    waits: list[float] = []
    with pytest.raises(UsageError, match=r'another place.*TINYTOWN_HOST'):
        hosts.arrive(ground.town, '', waits.append)
    assert sum(waits) > hosts.SILENCE_SECS, 'it could have been one that died'
    ground.store.call(other.gone(ground.store))
    assert hosts.arrive(ground.town, '', waits.append).host == this_host()


def test_what_goes_by_the_name_of_another_place_frees_nothing(ground: Place) -> None:
    enlist(ground, 'w').becomes(replace(identify(os.getpid()), start='1'))
    other = heard_of(ground, hosts.Presence(this_host(), new_id(), 'another place', ''))
    assert problem(ground, 'recovery.recover_agents').code == 'host-name-taken'
    assert 'TINYTOWN_HOST' in ground.tt('doctor', '--fix', check=False).stdout
    ground.store.call(other.gone(ground.store))
    assert ground.do('recovery.recover_agents')['agents'] == ['w']


def test_a_name_is_free_when_whoever_had_it_has_fallen_silent(ground: Place) -> None:
    key = ground.store.prefix + f'host:{this_host()}'.encode()
    redis(ground, 'HSET', key, 'dead', '{"heard":"1","place":"another place","url":""}')
    hosts.arrive(ground.town, '')
    assert redis(ground, 'HEXISTS', key, 'dead') == 0


def test_a_host_that_was_not_heard_of_for_a_week_is_forgotten(ground: Place) -> None:
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
    assert (made.root / 'tinytown.toml').stat().st_mode & 0o077 == 0, 'there may be a password in it'


@pytest.mark.parametrize(
    ('words', 'status', 'said'),
    [
        (('--name', 'other', '--redis-url', 'URL'), 1, "no town 'other'"),
        (('--name', 'test'), 2, 'redis.url is not set'),
        (('--name', 'test', '--redis-url', 'URL', '--host', 'a'), 1, 'goes by the name of this host'),
        (('--name', 'test', '--redis-url', 'URL', '--host', 'a b'), 2, '--host'),
    ],
)
def test_what_can_not_be_joined_leaves_no_town_behind(
    country: Country, directory: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    url = f'unix://{country.a.root}/.tt/redis.sock'
    done = Place(directory).tt('init', '--join', *(word.replace('URL', url) for word in words), check=False)
    assert done.returncode == status
    assert said in done.stderr
    assert not (directory / 'tinytown.toml').exists()


def test_a_worker_in_the_foreground_is_not_sent_elsewhere(country: Country) -> None:
    done = country.b.tt('spawn', 'w', '--foreground', '--host', 'a', check=False)
    assert (done.returncode, '--host' in done.stderr) == (2, True)
