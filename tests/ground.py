"""Helpers for tests that play an agent's worker (`Puppet`), and the invariants of a town's state (`check`)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinytown.core.agents import enlist as enlist_step
from tinytown.core.town import Call, Town
from tinytown.host.processes import Identity
from tinytown.model import CONDUCTOR_ID, LIVE, new_id
from tinytown.state.client import Part
from tinytown.state.store import Command, text

from .support import OPERATOR, Place

STATES = ('pending', 'assigned', 'running', 'completed', 'failed', 'cancelled')
DELIVERIES = 3  # of one message, before it becomes a dead letter
ELSEWHERE = Identity('host', 'boot', 7, '1')  # a process on another host; its verdict is unknown here


def redis(place: Place, *parts: Part) -> Any:
    """Runs a plain Redis command. Returns its reply."""
    return place.store.call(Command(None, parts))


def pipeline(place: Place, commands: Sequence[Command]) -> list[Any]:
    """Sends commands in one write, so that several run in the same millisecond. Returns their results."""
    connection = place.store.endpoint.open(timeout=20)
    try:
        sent = {command.script: command for command in reversed(commands)}  # the first use of a script sends its text
        packed = [each.pack(place.store, whole=sent[each.script] is each) for each in commands]
        connection.redis.send_packed_command(packed)
        return [command.result(connection.redis.read_response(True)) for command in commands]
    finally:
        connection.close()


@dataclass
class Puppet:
    """An agent whose worker the test plays: the methods call the scripts that a worker calls."""

    place: Place
    id: str
    name: str
    instance: str

    def hello(self, process: Identity = ELSEWHERE) -> None:
        """Starts the worker, as that process."""
        hello = self.place.store.hello(self.id, self.instance, process.host, process.boot, process.pid, process.start)
        self.place.store.call(hello)

    def pickup(self, most: int = 100) -> list[Any]:
        reply: list[Any] = self.place.store.call(self.place.store.pickup(self.id, self.instance, most, DELIVERIES))
        return reply

    def take(self) -> tuple[str, int]:
        """Takes the next task. Returns its id and attempt."""
        reply = self.pickup()
        assert reply[0] == b'work', reply
        assert reply[1], 'a round without a task'
        return text(reply[1][0]), reply[1][1]

    def beat(self, *held: Part) -> list[str]:
        """Sends a heartbeat that holds tasks (task, attempt, …). Returns those that the agent has lost."""
        return [text(task) for task in self.place.store.call(self._beat(held))[1]]

    def _beat(self, held: Iterable[Part]) -> Command:
        return self.place.store.beat(self.id, self.instance, held)

    def finish(self, task: str, attempt: int | str, outcome: str = 'completed') -> list[str]:
        reply = self.place.store.call(self.place.store.finish(task, str(attempt), outcome, '"done"', 'null'))
        return [text(each) for each in reply]

    def round_done(self, *entries: str) -> None:
        self.place.store.call(self.place.store.round_done(self.id, self.instance, entries))

    def depart(self, state: str = 'Stopped', to: str = 'backlog') -> list[str]:
        reply = self.place.store.call(self.place.store.depart(self.id, self.instance, state, 'test', to))
        return [text(each) for each in reply[0]]

    def revive(self, instance: str) -> None:
        """Starts a new worker for an agent whose worker has ended."""
        self.place.store.call(self.place.store.restarting(self.id, 100, instance))
        self.instance = instance
        self.hello()

    def dies(self, again: int = 0, why: str = 'its process died', pauses: Iterable[int] = (0,)) -> None:
        """Records that the worker's process died. The agent is restarted unless it crashed more than `again` times."""
        self.place.store.call(self.place.store.died(self.id, self.instance, why, pauses, again))

    def die_of(self, task: str) -> str:
        """Dies in each attempt of a task until the task is a dead letter, and then runs again. Returns the task."""
        while self.take()[0] == task:
            self.dies(9, 'it was poison')
            self.revive(new_id())
            if self.place.do('task.get', task_id=task)['dead_letter']:
                return task
            self.place.store.call(self.place.store.due(task))
        raise AssertionError(f'{self.name} took another task')

    def becomes(self, process: Identity) -> None:
        """Changes the agent's record: its worker is that process."""
        fields = ('host', process.host, 'boot', process.boot, 'pid', process.pid, 'start', process.start)
        redis(self.place, 'HSET', self.place.store.prefix + f'agent:{self.id}'.encode(), *fields)

    def is_started_by(self, process: Identity) -> None:
        """Changes the agent's record: that process is starting its worker."""
        redis(self.place, 'HSET', self.place.store.prefix + f'agent:{self.id}'.encode(), 'starter', process.line)

    def messages(self) -> list[str]:
        """Picks up a round. Returns the texts of its messages."""
        return [json.loads(message[3])['summary'] for message in self.pickup()[2]]

    def again(self) -> Puppet:
        """The agent's present worker, if the agent was restarted since."""
        key = self.place.store.prefix + f'agent:{self.id}'.encode()
        return Puppet(self.place, self.id, self.name, text(redis(self.place, 'HGET', key, 'instance')))

    def show(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.place.do('agent.get', agent=self.id)
        return shown


def enlist(place: Place, name: str, hello: bool = True) -> Puppet:
    """Creates an agent. With `hello` its worker runs."""
    puppet = Puppet(place, '', name, '')

    def start(_town: Town, agent_id: str, _name: str, instance: str) -> None:
        puppet.id, puppet.instance = agent_id, instance
        if hello:
            puppet.hello()

    place.store.run(enlist_step(Call(place.town, OPERATOR), name, None, None, None, None, None, start))
    return puppet


# -------------------------------------------------------------------------------------------------------- invariants

_READ = {
    b'hash': ('HGETALL',),
    b'zset': ('ZRANGE', 0, -1, 'WITHSCORES'),
    b'set': ('SMEMBERS',),
    b'stream': ('XRANGE', '-', '+'),
    b'list': ('LLEN',),
}


def snapshot(place: Place) -> dict[str, Any]:
    """Every key of the town except its events, without the prefix of the town.

    A hash becomes a dict, a sorted set {member: score}, a set a set, a stream [(id, fields)], a list its length.
    """
    prefix = text(place.store.prefix)
    keys = [key for key in redis(place, 'KEYS', prefix.replace('[', '\\[') + '*') if not key.endswith(b':events')]
    kinds = pipeline(place, [Command(None, ('TYPE', key)) for key in keys])
    reads = [(_READ[kind][0], key, *_READ[kind][1:]) for key, kind in zip(keys, kinds, strict=True)]
    replies = pipeline(place, [Command(None, read) for read in reads])
    return {
        text(key).removeprefix(prefix): _plain(kind, reply)
        for key, kind, reply in zip(keys, kinds, replies, strict=True)
    }


def _plain(kind: bytes, reply: Any) -> Any:
    if kind in (b'hash', b'zset'):
        parts = [text(part) for part in reply]
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if kind == b'set':
        return {text(part) for part in reply}
    if kind == b'stream':
        return [(text(entry), [text(part) for part in fields]) for entry, fields in reply]
    return reply


def check(place: Place) -> dict[str, Any]:
    """Asserts that a town's indexes, inboxes, leases and rendered records agree. Returns the checked snapshot."""
    state = snapshot(place)
    tasks = {key[5:]: value for key, value in state.items() if key.startswith('task:') and key.count(':') == 1}
    agents = {key[6:]: value for key, value in state.items() if key.startswith('agent:') and key.count(':') == 1}
    _check_task_indexes(state, tasks)
    _check_agent_indexes(state, agents)
    _check_inboxes(state, tasks, agents)
    for task_id, task in tasks.items():
        _check_task(task_id, task)
    for agent_id, agent in agents.items():
        _check_agent(agent_id, agent, tasks)
    return state


def _check_task_indexes(state: dict[str, Any], tasks: dict[str, Any]) -> None:
    expected: dict[str, dict[str, str]] = defaultdict(dict)
    for task_id, task in tasks.items():
        keys = ['tasks', f'tasks:{task["state"]}']
        if task['agent']:
            keys += [f'agent:{task["agent"]}:tasks', f'agent:{task["agent"]}:tasks:{task["state"]}']
        for key in keys:
            expected[key][task_id] = task['born']
    indexes = {key: value for key, value in state.items() if key.startswith('tasks') or ':tasks' in key}
    assert indexes == expected
    logs = {key[5:-4] for key in state if key.startswith('task:') and key.endswith(':log')}
    assert logs == set(tasks)
    ended: dict[str, int] = defaultdict(int)
    for task in tasks.values():
        ended[task['state']] += task['ended'] != ''
    assert state.get('ended', {}) == {task_id: task['ended'] for task_id, task in tasks.items() if task['ended']}
    letters = {key[5:] for key in state if key.startswith('dead:')}
    assert set(state.get('dead', {})) == letters | {task_id for task_id, task in tasks.items() if task['dead'] == '1'}
    totals = state.get('totals', {})
    dead = {'failed': int(totals.get('task.dead_lettered', 0))}  # a dead letter's state is failed; it has its own total
    assert all(int(totals.get(f'task.{end}', 0)) + dead.get(end, 0) >= count for end, count in ended.items())


def _check_agent_indexes(state: dict[str, Any], agents: dict[str, Any]) -> None:
    births = {agent_id: agent['born'] for agent_id, agent in agents.items()}
    assert state.get('agents', {}) == births
    assert state.get('ids', {}) == dict.fromkeys(agents, '0')
    assert state.get('names', {}) == {agent['name'].lower(): agent_id for agent_id, agent in agents.items()}
    assert state.get('live', {}) == {each: births[each] for each in agents if agents[each]['state'] in LIVE}


def _check_inboxes(state: dict[str, Any], tasks: dict[str, Any], agents: dict[str, Any]) -> None:
    boxes = {key.split(':')[1] for key, entries in state.items() if key.startswith('inbox:') and entries}
    assert boxes <= {*agents, CONDUCTOR_ID}
    queued = sorted(
        (key.split(':')[1], entry, fields[1])
        for key, entries in state.items()
        if key.startswith('inbox:') and key.endswith(':t')
        for entry, fields in entries
    )
    held = {task_id: task for task_id, task in tasks.items() if task['state'] in ('assigned', 'running')}
    delayed = {task_id for task_id, task in held.items() if not task['entry']}
    assert set(state.get('delayed', {})) == delayed
    assert all(held[task_id]['state'] == 'assigned' for task_id in delayed)
    in_streams = sorted((task['agent'], task['entry'], task_id) for task_id, task in held.items() if task['entry'])
    assert queued == in_streams
    running = {task_id for task_id, task in tasks.items() if task['state'] == 'running'}
    assert set(state.get('leases', {})) == running
    taken = {key.split(':')[1]: value for key, value in state.items() if re.fullmatch('agent:[^:]+:running', key)}
    assert {(agent, task) for agent, held_tasks in taken.items() for task in held_tasks} == {
        (tasks[task]['agent'], task) for task in running
    }
    for agent, held_tasks in taken.items():
        assert len(held_tasks) == 1, f'{agent} runs {held_tasks}'
        assert agents[agent]['state'] in LIVE


def _check_task(task_id: str, task: dict[str, str]) -> None:
    shown = json.loads(task['j'] + ',"tags":' + task['tags'] + task['m'])
    assert shown['task_id'] == task_id
    assert shown['state'] == task['state']
    assert (shown['agent_id'], shown['agent_name']) == (task['agent'] or None, task['name'] or None)
    assert shown['attempt'] == int(task['attempt'])
    assert (shown['result'], shown['error']) == (json.loads(task['result']), json.loads(task['error']))
    assert shown['dead_letter'] == (task['dead'] == '1')
    for field, name in (('born', 'created_at'), ('started', 'started_at'), ('ended', 'ended_at')):
        assert bool(task[field]) == bool(shown[name])
    assert bool(task['ended']) == (task['state'] in ('completed', 'failed', 'cancelled'))
    if task['state'] == 'pending':
        assert (task['agent'], task['name'], task['entry'], task['started']) == ('', '', '', '')
    if task['state'] in ('assigned', 'running'):
        assert task['agent']
        assert bool(task['started']) == (task['state'] == 'running')


def _check_agent(agent_id: str, agent: dict[str, str], tasks: dict[str, Any]) -> None:
    shown = json.loads(agent['j'] + agent['m'] + '}')
    assert (shown['id'], shown['name'], shown['state']) == (agent_id, agent['name'], agent['state'])
    counts = {'rounds_completed': 'rounds', 'tasks_completed': 'done', 'restarts': 'restarts'}
    assert all(shown[name] == int(agent[field]) for name, field in counts.items())
    assert (shown['pid'] or '') == (int(agent['pid']) if agent['pid'] else '')
    assert (shown['current_task'] or '') == agent['task']
    assert bool(agent['instance']) == (agent['state'] in LIVE)
    if agent['task']:
        task = tasks[agent['task']]
        assert (task['state'], task['agent']) == ('running', agent_id)
        assert shown['current_scope'] == json.loads(task['brief'])
