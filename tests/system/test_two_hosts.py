"""Two hosts and a Redis, each with a network and a host name of its own, joined by cables that can be pulled.

A host is a process that holds its namespaces; the test enters them to act there. Needs root and the `ip` of iproute2.
`-s` shows the numbers, which docs/hosts.md tells.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest

from tinytown.host import managed_redis
from tinytown.host.processes import this_host

from ..support import PATIENCE, Hall, Reply, make_town, shell_cli
from ..worker.test_worker import await_exit

_KINDS: Final = ('net', 'uts')
_SECRET: Final = 'of-the-country'
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
WHERE: Final = shell_cli('hostname')
GATED: Final = shell_cli('until [ -e gate ]; do sleep 0.05; done; hostname')


class Network:
    """A host's namespaces, for as long as it is not closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        script = f'hostname {name} && ip link set lo up && echo up && exec cat'
        self._holder = subprocess.Popen(
            ['unshare', '--net', '--uts', 'sh', '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b'up\n'

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Has this thread, and the processes that it starts, be there."""
        with ExitStack() as back:
            for kind in _KINDS:
                back.callback(_enter, os.open(f'/proc/thread-self/ns/{kind}', os.O_RDONLY))
            for kind in _KINDS:
                _enter(os.open(f'/proc/{self._holder.pid}/ns/{kind}', os.O_RDONLY))
            yield

    def ip(self, *words: str) -> None:
        with self.inside():
            subprocess.run(['ip', *words], check=True)

    def cable(self, other: Network, net: str) -> None:
        """Joins it (address .2, end `eth0`) with another one (.1, end `to-NAME`)."""
        pid = str(other._holder.pid)
        self.ip('link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', f'to-{self.name}', 'netns', pid)
        for network, end, address in ((self, 'eth0', f'{net}.2'), (other, f'to-{self.name}', f'{net}.1')):
            network.ip('address', 'add', f'{address}/24', 'dev', end)
            network.ip('link', 'set', end, 'up')

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


def _enter(namespace: int) -> None:
    try:
        if _LIBC.setns(namespace, 0):
            raise OSError(ctypes.get_errno(), 'setns')
    finally:
        os.close(namespace)


class Host:
    """A network with a town's directory and a townhall."""

    def __init__(self, network: Network, root: Path, redis: str) -> None:
        self.network = network
        self.name = network.name
        self.place = make_town(
            root,
            redis={'url': f'redis://:{_SECRET}@{redis}:6379'},
            agent={'lease_secs': 6},
            agent_clis={'where': WHERE, 'gated': GATED},
        )
        self.hall: Hall

    def open(self) -> None:
        with self.network.inside():
            self.hall = self.place.hall()

    def ask(self, method: str, path: str, body: Any = None) -> Reply:
        with self.network.inside():
            return self.hall.request(method, path, body)

    def tt(self, *words: str) -> Any:
        with self.network.inside():
            return self.place.tt_json(*words)

    def await_log(self, agent: str, said: str) -> None:
        until(lambda: said in self.place.log(agent))


def until(what: Callable[[], Any]) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, 'it is not so'
        select.select([], [], [], 0.05)


class Country:
    """A Redis, and two hosts that reach it and not each other."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.hub, a, b = (self._network(stack, name) for name in ('hub', 'alpha', 'beta'))
        a.cable(self.hub, '10.77.1')
        b.cable(self.hub, '10.77.2')
        server = managed_redis.find_server()
        with self.hub.inside():
            redis = subprocess.Popen(
                [server, '--bind', '*', '--requirepass', _SECRET, '--save', '', '--appendonly', 'yes',
                 '--appendfsync', 'always', '--maxmemory-policy', 'noeviction', '--dir', directory],
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        stack.callback(redis.wait)
        stack.callback(redis.terminate)
        self.alpha = Host(a, directory / 'alpha', '10.77.1.1')
        self.beta = Host(b, directory / 'beta', '10.77.2.1')
        stack.callback(self._stop)
        with a.inside():
            until(lambda: self.alpha.place.tt('status', check=False).returncode == 0)
            self.place = self.alpha.place
        self.beta.tt('init', '--join')
        self.alpha.open()
        self.beta.open()

    @staticmethod
    def _network(stack: ExitStack, name: str) -> Network:
        made = Network(name)
        stack.callback(made.close)
        return made

    def cut_off(self, host: Host, off: bool = True) -> None:
        """Pulls the cable of a host, or puts it back."""
        self.hub.ip('link', 'set', f'to-{host.name}', 'down' if off else 'up')

    def _stop(self) -> None:
        self.cut_off(self.beta, off=False)
        for host in (self.beta, self.alpha):
            with host.network.inside():
                host.place.close()


def seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event['at']).timestamp()


@pytest.fixture(scope='module')
def country(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Country]:
    with ExitStack() as stack:
        yield Country(tmp_path_factory.mktemp('c'), stack)


@pytest.fixture
def town(country: Country) -> Iterator[Country]:
    """The hosts, with nothing in the town; the test is on `alpha`, and looks at the town's state from there."""
    assert this_host(), 'this process keeps the name that it knows its host by'
    with country.alpha.network.inside():
        yield country
        country.cut_off(country.beta, off=False)
        country.alpha.tt('reset', '--force')
    for host in (country.alpha, country.beta):
        (host.place.root / 'gate').unlink(missing_ok=True)


def spawn(town: Country, name: str, host: Host, cli: str) -> int:
    """Has `alpha` spawn an agent on a host. The pid of its worker."""
    reply = town.alpha.ask('POST', '/v1/agents', {'name': name, 'cli': cli, 'host': host.name})
    assert reply.status == 201, reply
    shown = town.place.do('agent.get', agent=name)
    assert shown['host'] == host.name
    return int(shown['pid'])


def give(town: Country, agent: str) -> str:
    task: str = town.alpha.ask('POST', '/v1/tasks/assign', {'agent': agent, 'task': 'work'}).json['task_id']
    return task


def silence_of(town: Country, host: Host) -> bool:
    listed = town.alpha.ask('GET', '/v1/hosts').json['hosts']
    return bool({each['host']: each['silent'] for each in listed}[host.name])


def test_an_agent_is_started_given_work_and_killed_from_another_host(town: Country) -> None:
    starts, waits, kills = [], [], []
    for i in range(10):
        began = time.monotonic()
        pid = spawn(town, f'w{i}', town.beta, 'where')
        starts.append(time.monotonic() - began)
        task = give(town, f'w{i}')
        assert town.place.await_end(task)['result'] == 'beta'
        events = {event['type']: event for event in town.place.history() if event.get('task_id') == task}
        waits.append(seconds(events['task.started']) - seconds(events['task.assigned']))
        began = time.monotonic()
        assert town.alpha.ask('POST', f'/v1/agents/w{i}/kill').status == 200
        kills.append(time.monotonic() - began)
        await_exit(pid)
    tell = {'spawned': starts, 'picked up': waits, 'killed': kills}
    print('\n', {what: f'{statistics.median(took) * 1000:.0f} ms' for what, took in tell.items()})
    assert statistics.median(waits) < 0.4, 'a worker that asked each second would take half of one'


def test_a_host_that_is_cut_off_loses_its_task_and_what_it_says_of_it_later_changes_nothing(town: Country) -> None:
    spawn(town, 'far', town.beta, 'gated')
    spawn(town, 'near', town.alpha, 'where')
    task = give(town, 'far')
    town.place.await_event('task.started', task_id=task)
    town.cut_off(town.beta)
    cut = time.monotonic()
    assert town.beta.ask('GET', '/v1/status').status == 503
    moved = town.place.await_event('task.requeued', task_id=task)
    print(f'\nthe task moved {time.monotonic() - cut:.1f} s after the cut')
    assert moved['why'] == 'its holder was not heard of for a lease'
    until(lambda: silence_of(town, town.beta))
    refused = town.alpha.ask('POST', '/v1/agents', {'name': 'more', 'cli': 'where', 'host': 'beta'})
    assert (refused.status, refused.json['code']) == (503, 'host-silent')
    assert town.alpha.ask('POST', f'/v1/backlog/{task}/claim', {'agent': 'near'}).status == 200
    assert town.place.await_end(task)['result'] == 'alpha'
    (town.beta.place.root / 'gate').touch()
    town.beta.await_log('far', 'waiting for Redis')
    town.cut_off(town.beta, off=False)
    healed = time.monotonic()
    town.beta.await_log('far', f'task {task}: report refused: Attempt 1')
    print(f'its report was refused {time.monotonic() - healed:.1f} s after it was healed')
    done = town.place.do('task.get', task_id=task)
    assert (done['state'], done['result'], done['attempt']) == ('completed', 'alpha', 2)
    assert town.place.await_end(give(town, 'far'))['result'] == 'beta'
    assert [event['task_id'] for event in town.place.history() if event['type'] == 'task.completed'].count(task) == 1


def test_a_worker_outlives_the_townhall_of_its_host_and_the_next_one_stops_it(town: Country) -> None:
    pid = spawn(town, 'far', town.beta, 'gated')
    town.beta.hall.kill()
    town.place.await_event('task.started', task_id=give(town, 'far'))
    until(lambda: silence_of(town, town.beta))
    refused = town.alpha.ask('POST', '/v1/agents/far/kill')
    assert (refused.status, refused.json['code']) == (503, 'host-silent')
    began = time.monotonic()
    town.beta.open()
    town.place.await_event('agent.stopped', agent_name='far', why='killed')
    print(f'\nstopped {time.monotonic() - began:.1f} s after its townhall was started again')
    await_exit(pid)


def test_only_the_host_that_has_it_finds_a_worker_dead(town: Country) -> None:
    pid = spawn(town, 'far', town.beta, 'gated')
    task = give(town, 'far')
    town.place.await_event('task.started', task_id=task)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert town.alpha.ask('POST', '/v1/recover').json['recovered'] == 0
    assert town.place.await_event('task.requeued', task_id=task)['why'] == 'its process died'
    print(f'\nfound {time.monotonic() - began:.1f} s after it was killed')
    until(lambda: town.place.do('agent.get', agent='far')['state'] == 'Error')
