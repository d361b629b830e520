"""The scripts as a worker uses them, connections, and a fuzz test that checks the invariants of the state."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tinytown import config
from tinytown.core import hosts
from tinytown.core.town import Town, open_town
from tinytown.errors import REFUSALS, Conflict, NotFound, TownError, Unavailable
from tinytown.host import managed_redis
from tinytown.model import CONDUCTOR_ID, lua_sets, new_id
from tinytown.state import store
from tinytown.state.client import ErrorReply
from tinytown.state.endpoints import Endpoint, RedisServer, endpoint_of
from tinytown.state.store import Store, scripts, text

from ..ground import STATES, Puppet, check, enlist, pipeline, redis, snapshot
from ..support import PATIENCE, REPOSITORY, Hall, Place, make_town, redis_pid

LUA = (REPOSITORY / 'tinytown' / 'state' / 'scripts.lua').read_text()


# ---------------------------------------------------------------------------------------------------------- the text


def test_every_refusal_of_a_script_has_a_message_and_every_message_a_script() -> None:
    used = set(re.findall(r"refuse\('([a-z-]+)'", LUA + store._WRAP))
    assert used == set(REFUSALS)


def test_a_refusal_passes_as_many_details_as_its_message_uses() -> None:
    for code, details in re.findall(r"refuse\('([a-z-]+)'((?:, ?[^()]+(?:\([^()]*\))?)*)\)", LUA + store._WRAP):
        named = {int(number) for number in re.findall(r'\{(\d)\}', REFUSALS[code][1])}
        given = len(re.sub(r'\([^()]*\)', '', details).split(',')) - 1
        assert given > max(named), code


@pytest.mark.parametrize('word', ['KEYS', 'SCAN', 'HSCAN', 'SSCAN', 'ZSCAN', 'FLUSHALL', 'FLUSHDB'])
def test_no_command_scans_or_empties_the_whole_redis(word: str) -> None:
    for file in (REPOSITORY / 'tinytown').rglob('*'):
        if file.suffix in ('.lua', '.py'):
            assert not re.search(rf"""['"]{word}['"]""", file.read_text()), file.name


def test_redis_loads_every_script_under_the_digest_that_we_compute(ground: Place) -> None:
    for script in scripts().values():
        assert redis(ground, 'SCRIPT', 'LOAD', script.text) == script.digest, script.name


def test_no_script_writes_a_global() -> None:
    declared = re.compile(r'local function (\w+)|(?:local|for) (?!function)([\w, ]+)|(?<=\()([\w, .]*)(?=\))')
    assigned = re.compile(r'(?:^|;|\bthen\b|\bdo\b|\belse\b)\s*(?!local |for )(\w+(?:, *\w+)*) *=(?!=)', re.M)
    for script in scripts().values():
        lines = re.sub(r'--.*', '', script.text.decode())
        names = {name.strip() for found in declared.findall(lines) for each in found for name in each.split(',')}
        written = {name.strip() for each in assigned.findall(lines) for name in each.split(',')}
        assert written <= names, script.name
        assert not re.search(r'^\s*function ', lines, re.M), script.name


def test_a_script_contains_exactly_the_parts_of_the_prelude_that_it_uses_and_before_their_first_use() -> None:
    source = files('tinytown.state').joinpath('scripts.lua').read_text()
    prelude = source.partition('-- @prelude\n')[2].partition('-- @script')[0]
    names = set(re.findall(r'^local (?:function )?(\w+)', lua_sets() + prelude, re.M))
    assert {'LIVE', 'P', 'NOW', 'refuse', 'iso', 'set_task', 'page'} <= names
    for script in scripts().values():
        lines = script.text.decode()
        assert '--' not in lines
        head = lines.partition('\nlocal function body()')[0]
        declared = {found[1]: found.start(1) for found in re.finditer(r'^local (?:function )?(\w+)', head, re.M)}
        mentioned: dict[str, list[int]] = {}
        for found in re.finditer(r'\w+', lines):
            if found[0] in names:
                mentioned.setdefault(found[0], []).append(found.start())
        assert {name: places[0] for name, places in mentioned.items()} == declared, script.name
        assert all(len(places) > 1 for places in mentioned.values()), script.name


def test_every_verb_of_the_store_names_a_script_and_every_script_has_a_verb() -> None:
    source = ''.join(Path(file).read_text() for file in (store.__file__, hosts.__file__))
    assert set(re.findall(r"_(?:script|command)\(\s*'(\w+)'", source)) == set(scripts())


# ------------------------------------------------------------------------------------------------------------ rounds


def test_taking_a_task_counts_an_attempt_and_finishing_it_frees_the_agent(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='work')['task_id']
    assert agent.take() == (task, 1)
    shown = agent.show()
    assert (shown['state'], shown['current_task'], shown['current_scope']) == ('Working', task, 'work')
    check(ground)
    assert agent.finish(task, 1) == ['done', 'completed']
    agent.round_done()
    shown = agent.show()
    assert (shown['state'], shown['current_task'], shown['tasks_completed'], shown['rounds_completed']) == (
        'Idle',
        None,
        1,
        1,
    )
    assert shown['inbox_len'] == 0
    assert ground.do('agent.get_result', agent='a')['task']['result'] == 'done'
    check(ground)


def test_a_pickup_repeated_after_a_lost_reply_gives_the_same_attempt(ground: Place) -> None:
    agent = enlist(ground, 'a')
    for text_ in ('first', 'second'):
        ground.do('task.assign', agent='a', task=text_)
    taken = agent.take()
    assert agent.take() == taken
    assert ground.do('task.get', task_id=taken[0])['attempt'] == 1
    check(ground)


def test_a_round_has_all_messages_urgent_ones_first_and_at_most_one_task(ground: Place) -> None:
    agent = enlist(ground, 'a')
    for number in range(3):
        ground.do('message.send', to='a', message=f'n{number}', kind='info')
        ground.do('message.send', to='a', message=f'u{number}', kind='query', urgent=True)
        ground.do('task.assign', agent='a', task=f't{number}')
    _, task, messages, _ = agent.pickup()
    summaries = [json.loads(message[3])['summary'] for message in messages]
    assert summaries == ['u0', 'u1', 'u2', 'n0', 'n1', 'n2']
    agent.finish(text(task[0]), task[1])
    agent.round_done(*(text(part) for message in messages for part in message[:2]))
    assert ground.do('agent.inbox', agent='a')['total'] == 2
    assert len(agent.pickup()[2]) == 0
    check(ground)


@pytest.mark.parametrize('kind', ['info', 'ack'])
def test_messages_of_kind_info_or_ack_alone_start_no_round_and_wait_for_the_next(ground: Place, kind: str) -> None:
    agent = enlist(ground, 'a')
    ground.do('message.send', to='a', message='by the way', kind=kind)
    rest = agent.pickup()
    assert rest[:2] == [b'rest', b'Idle']
    assert rest[3] != b'0-0'
    assert ground.do('agent.inbox', agent='a')['total'] == 1
    ground.do('message.send', to='a', message='what?', kind='query')
    found = agent.pickup()
    assert found[:2] == [b'work', None]
    assert [message[2] for message in found[2]] == [kind.encode(), b'query']


def test_info_messages_that_would_hide_a_query_start_a_round(ground: Place) -> None:
    agent = enlist(ground, 'a')
    for _ in range(3):
        ground.do('message.send', to='a', message='by the way', kind='info')
    ground.do('message.send', to='a', message='what?', kind='query')
    found = agent.pickup(most=3)
    assert found[0] == b'work'
    agent.round_done(*(text(part) for message in found[2] for part in message[:2]))
    assert [message[2] for message in agent.pickup(most=3)[2]] == [b'query']


def test_an_inbox_entry_without_a_task_of_this_agent_is_dropped(ground: Place) -> None:
    a, b = enlist(ground, 'a'), enlist(ground, 'b')
    elsewhere = ground.do('task.assign', agent='b', task='for b')['task_id']
    box = ground.store.prefix + f'inbox:{a.id}:t'.encode()
    for stray in (new_id(), elsewhere):
        redis(ground, 'XADD', box, '*', 't', stray)
    assert {each['id'] for each in ground.do('agent.inbox', agent='a')['messages']} >= {elsewhere}
    task = ground.do('task.assign', agent='a', task='for a')['task_id']
    assert a.take() == (task, 1)
    assert b.take() == (elsewhere, 1)
    check(ground)


@pytest.mark.parametrize('way', ['reclaim', 'remove'])
def test_a_stray_inbox_entry_takes_no_task_from_another_agent(ground: Place, way: str) -> None:
    a, b = enlist(ground, 'a'), enlist(ground, 'b')
    task = ground.do('task.assign', agent='b', task='for b')['task_id']
    redis(ground, 'XADD', ground.store.prefix + f'inbox:{a.id}:t'.encode(), '*', 't', task)
    a.depart()
    if way == 'reclaim':
        ground.do('recovery.reclaim_tasks')
    else:
        ground.store.call(ground.store.remove(a.id))
    assert ground.do('task.get', task_id=task)['agent_id'] == b.id
    check(ground)


def test_a_round_gets_the_backlog_in_brief(ground: Place) -> None:
    agent = enlist(ground, 'a')
    waiting = ground.do('backlog.add', description='x' * 60_000, tags=['big', 'one'])['task_id']
    for _ in range(60):
        ground.do('backlog.add', description='y' * 60_000)
    ground.do('task.assign', agent='a', task='now')
    backlog = json.loads(agent.pickup()[3])
    assert len(backlog) == 50
    assert backlog[0] | {'description': ''} == {'task_id': waiting, 'description': '', 'tags': ['big', 'one']}
    assert all(len(each['description']) == 160 for each in backlog)


@pytest.mark.parametrize('verb', ['interrupt', 'close'])
def test_a_paused_or_draining_agent_takes_no_new_task_but_keeps_its_current_one(ground: Place, verb: str) -> None:
    agent = enlist(ground, 'a')
    for text_ in ('first', 'second'):
        ground.do('task.assign', agent='a', task=text_)
    taken = agent.take()
    ground.do(f'agent.{verb}', agent='a')
    assert agent.take() == taken
    agent.finish(*taken)
    agent.round_done()
    rest = agent.pickup()
    assert rest == [b'rest', b'Paused' if verb == 'interrupt' else b'Draining', b'0-0', b'0-0']
    assert agent.show()['inbox_len'] == 1
    check(ground)


# -------------------------------------------------------------------------------------------------------- heartbeats


def test_a_heartbeat_reports_a_task_as_lost_that_was_cancelled_requeued_or_deleted(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    assert agent.beat(task, 0) == [task]  # assigned, but not taken
    assert agent.take() == (task, 1)
    assert agent.beat(task, 1) == []
    assert agent.beat(task, 2, new_id(), 1) != []
    ground.do('task.cancel', task_id=task)
    assert agent.beat(task, 1) == [task]
    ground.do('task.retry', task_id=task)
    assert agent.beat(task, 1) == [task]
    ground.do('backlog.remove', task_id=task)
    assert agent.beat(task, 1) == [task]


def test_a_heartbeat_does_not_report_a_task_as_lost_that_was_finished_under_the_same_attempt(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    agent.take()
    ground.do('task.complete', task_id=task, attempt=1)
    assert agent.beat(task, 1) == []
    assert agent.finish(task, 1) == ['already', 'completed']
    check(ground)


def test_a_heartbeat_counts_only_for_the_task_that_it_names(ground: Place) -> None:
    agent = enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='x')
    task, attempt = agent.take()
    leases = ground.store.prefix + b'leases'
    before = int(redis(ground, 'ZSCORE', leases, task))
    agent.beat(task, attempt)
    agent.beat()
    assert int(redis(ground, 'ZSCORE', leases, task)) == before + 1


# ----------------------------------------------------------------------------------------------------------- fencing

WORKER_CALLS: dict[str, Callable[[Puppet], Any]] = {
    'hello': lambda agent: agent.hello(),
    'pickup': lambda agent: agent.pickup(),
    'beat': lambda agent: agent.beat(),
    'round_done': lambda agent: agent.round_done(),
    'depart': lambda agent: agent.depart(),
}


@pytest.mark.parametrize('script', WORKER_CALLS)
def test_an_older_process_is_refused_and_changes_nothing(ground: Place, script: str) -> None:
    agent = enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='x')
    old = Puppet(ground, agent.id, 'a', agent.instance)
    agent.depart(to='inbox')
    agent.revive(new_id())
    agent.take()
    before = snapshot(ground)
    with pytest.raises(Conflict) as caught:
        WORKER_CALLS[script](old)
    assert caught.value.code == 'stale-instance'
    assert snapshot(ground) == before


def test_hello_queues_the_task_of_the_previous_process_again_in_its_old_place(ground: Place) -> None:
    agent = enlist(ground, 'a')
    first = ground.do('task.assign', agent='a', task='first')['task_id']
    ground.do('task.assign', agent='a', task='second')
    agent.take()
    agent.hello()
    assert ground.do('task.get', task_id=first)['state'] == 'assigned'
    check(ground)
    assert agent.take() == (first, 2)
    with pytest.raises(Conflict) as caught:
        agent.finish(first, 1)
    assert caught.value.code == 'stale-attempt'


@pytest.mark.parametrize(('to', 'state', 'holder'), [('inbox', 'assigned', 'a'), ('backlog', 'pending', None)])
def test_the_task_of_a_departed_process_goes_to_the_inbox_or_to_the_backlog(
    ground: Place, to: str, state: str, holder: str | None
) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    agent.take()
    assert agent.depart('Error', to) == [task]
    found = ground.do('task.get', task_id=task)
    assert (found['state'], found['agent_name'], found['attempt']) == (state, holder, 1)
    assert (agent.show()['state'], agent.show()['pid']) == ('Error', None)
    assert [event['state'] for event in [agent.show()]] == ['Error']
    check(ground)


def test_removing_an_agent_loses_neither_its_tasks_nor_its_messages(ground: Place) -> None:
    agent = enlist(ground, 'a')
    tasks = [ground.do('task.assign', agent='a', task=f't{i}')['task_id'] for i in range(3)]
    sends = [
        ground.store.send('a', '', 'n', new_id(), f'","type":"task","summary":"{i}"}}', 'task') for i in range(250)
    ]
    pipeline(ground, sends)
    ground.do('message.send', to='a', message='soon', urgent=True)
    agent.take()
    with pytest.raises(Conflict):
        ground.store.call(ground.store.remove(agent.id))
    agent.depart(to='inbox')
    ground.store.call(ground.store.remove(agent.id))
    assert [each['task_id'] for each in ground.do('backlog.list')['backlog']] == tasks
    box = ground.do('agent.inbox', agent='conductor')
    assert (box['urgent'], box['total']) == (1, 250)
    assert [each['summary'] for each in box['messages']] == ['soon', *map(str, range(250))]
    assert not [key for key in check(ground) if agent.id in key]
    enlist(ground, 'a')  # the name is free again


def test_a_doorbell_rings_for_a_message_a_task_and_a_change_of_state(ground: Place) -> None:
    agent = enlist(ground, 'a')
    lanes = {'c': '0-0', 't': '0-0', 'u': '0-0', 'n': '0-0'}

    def rings() -> bool:
        return ground.store.call(ground.store.doorbell(agent.id, lanes, 1)) is not None

    assert not rings()
    calls: list[tuple[str, dict[str, Any]]] = [
        ('agent.interrupt', {'agent': 'a'}),
        ('task.assign', {'agent': 'a', 'task': 'x'}),
        ('message.send', {'to': 'a', 'message': 'x'}),
    ]
    for operation, arguments in calls:
        ground.do(operation, **arguments)
        assert rings()
        redis(ground, 'DEL', *(ground.store.prefix + f'inbox:{agent.id}:{lane}'.encode() for lane in lanes))


def test_steering_an_agent_whose_worker_does_not_listen_does_not_grow_its_control_lane(ground: Place) -> None:
    agent = enlist(ground, 'a')
    for _ in range(5):
        ground.do('agent.interrupt', agent='a')
        ground.do('agent.resume', agent='a')
    assert redis(ground, 'XLEN', ground.store.prefix + f'inbox:{agent.id}:c'.encode()) == 1


# -------------------------------------------------------------------------------------------------------------- fuzz


class Fuzz:
    """Random operations and worker calls, valid and invalid ones, from one seed."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.puppets: list[Puppet] = []
        self.ids: list[str] = [new_id()]
        self.names = [f'agent-{number}' for number in range(12)]
        self.refused: set[str] = set()

    def turn(self) -> None:
        act = self.random.choices(list(self.acts()), weights=list(self.acts().values()))[0]
        try:
            act()
        except (Conflict, NotFound) as e:
            self.refused.add(e.code)

    def acts(self) -> dict[Callable[[], object], int]:
        return {
            self.spawn: 6,
            self.assign: 8,
            self.add: 6,
            self.claim: 6,
            self.operate: 12,
            self.steer: 2,
            self.send: 4,
            self.work: 40,
            self.depart: 5,
            self.recover: 2,
            self.die: 6,
            self.care: 8,
            self.settle: 6,
        }

    def name(self) -> str:
        return self.random.choice(self.names)

    def task(self) -> str:
        return self.random.choice(self.ids[-60:])

    def puppet(self) -> Puppet:
        puppet = self.random.choice(self.puppets)
        if self.random.random() < 0.1:
            return Puppet(self.place, puppet.id, puppet.name, new_id())  # an older process of the agent
        return puppet

    def spawn(self) -> None:
        name, place = self.name(), self.place
        at_rest = [each for each in self.puppets if each.name == name]
        if at_rest and self.random.random() < 0.7:
            instance = new_id()
            place.store.call(place.store.restarting(name, 8, instance))
            at_rest[-1].instance = instance
            at_rest[-1].hello()
        else:
            self.puppets.append(enlist(place, name, hello=self.random.random() < 0.9))

    def assign(self) -> None:
        self.ids.append(self.place.do('task.assign', agent=self.name(), task='assigned')['task_id'])

    def add(self) -> None:
        self.place.store.call(self.place.store.backlog_add(self.new(self.random.randint(1, 3))))

    def new(self, attempts: int) -> tuple[str | int, ...]:
        """The arguments of new_task for a task with that limit of attempts."""
        self.ids.append(new_id())
        return (self.ids[-1], f'{{"task_id":"{self.ids[-1]}","description":"added"', '"added"', '[]', '', attempts)

    def claim(self) -> None:
        if self.random.random() < 0.1:
            self.place.store.call(self.place.store.assign_all(self.name(), 5))
        else:
            self.place.do('backlog.claim', task_id=self.task(), agent=self.name())

    def operate(self) -> None:
        operations = ['complete', 'fail', 'release', 'cancel', 'retry', 'retry', 'cancel', 'remove']
        operation = self.random.choice(operations)
        more: dict[str, Any] = {}
        if operation in ('complete', 'fail', 'release') and self.random.random() < 0.5:
            more = {'attempt': self.random.randint(1, 3)}
        group = 'backlog' if operation == 'remove' else 'task'
        self.place.do(f'{group}.{operation}', task_id=self.task(), **more)

    def steer(self) -> None:
        self.place.do(f'agent.{self.random.choice(["interrupt", "resume", "close"])}', agent=self.name())

    def send(self) -> None:
        kind = self.random.choice(['task', 'query', 'info', 'ack'])
        to = self.random.choice([*self.names, 'conductor'])
        self.place.do('message.send', to=to, message='x', kind=kind, urgent=self.random.random() < 0.3)
        if self.random.random() < 0.2:
            self.place.do('agent.ack', agent=to, all=True)

    def work(self) -> None:
        puppet, chance = self.puppet(), self.random.random()
        if chance < 0.1:
            puppet.hello()
        found = puppet.pickup(self.random.choice([1, 100]))
        if found[0] == b'rest':
            return
        task, attempt = (text(found[1][0]), found[1][1]) if found[1] else (self.task(), 1)
        if chance < 0.4:
            attempt += self.random.choice([-1, 0, 0, 0, 1])
            puppet.beat(task, attempt)
            return
        outcome = self.random.choice(['completed', 'completed', 'failed'])
        if chance < 0.9:
            puppet.finish(task, attempt, outcome)
        if chance < 0.6:
            puppet.finish(task, attempt, outcome)
        if chance < 0.8:
            puppet.round_done(*(text(part) for message in found[2] for part in message[:2]))

    def depart(self) -> None:
        puppet = self.puppet()
        puppet.depart(self.random.choice(['Stopped', 'Error']), self.random.choice(['inbox', 'backlog']))
        if self.random.random() < 0.3:
            self.place.store.call(self.place.store.remove(puppet.id))
            self.puppets = [each for each in self.puppets if each.id != puppet.id]

    def die(self) -> None:
        puppet = self.puppet()
        self.place.store.call(self.place.store.assign(puppet.name, self.new(1)))
        puppet.pickup()
        puppet.dies(self.random.choice([0, 1, 99]), pauses=self.random.choice([(), (0,), (1, 5, 25)]))

    def care(self) -> None:
        """Acts like a supervisor, on a view of the town that may be out of date."""
        store = self.place.store
        _, leases, delayed, crashed = store.call(store.liveness())
        for task, attempt, beats, _ in leases:
            if self.random.random() < 0.2:
                seen = self.random.choice([text(beats), text(beats), '99'])
                to = self.random.choice(['inbox', 'backlog'])
                store.call(store.expire(text(task), text(attempt), seen, to, (1, 5)))
        for task, _ in delayed:
            if self.random.random() < 0.5:
                store.call(store.due(text(task)))
        for agent, *_ in crashed:
            puppet = next(each for each in self.puppets if each.id == text(agent))
            if self.random.random() < 0.5:
                puppet.revive(new_id())

    def settle(self) -> None:
        store = self.place.store
        for letter in self.place.do('deadletter.list')['dead_letters']:
            if self.random.random() < 0.7:
                self.place.do(f'deadletter.{self.random.choice(["retry", "drop"])}', id=letter['id'])
        if self.random.random() < 0.1:
            store.call(store.forget(0, self.random.choice([1, 200])))
        else:
            self.place.do('deadletter.retry', id=self.task())

    def recover(self) -> None:
        if self.random.random() < 0.5:
            action = self.random.choice(['to_backlog', 'cancel', 'delete', 'list'])
            self.place.do('recovery.orphan_tasks', action=action)
        else:
            to: dict[str, Any] = self.random.choice([{}, {'to': self.name()}])
            self.place.do('recovery.reclaim_tasks', **to)


def test_no_sequence_of_calls_breaks_an_invariant(ground: Place) -> None:
    seed = int(os.environ.get('FUZZ_SEED') or random.randrange(1 << 32))
    fuzz, attempts = Fuzz(ground, seed), dict[str, int]()
    for _ in range(4):
        fuzz.puppets.append(enlist(ground, fuzz.names[len(fuzz.puppets)]))
    refused = {'stale-instance', 'stale-attempt', 'task-finished', 'task-not-pending', 'agent-not-found'}
    refused |= {'no-dead-letter', 'task-not-running'}
    wanted = {'task.dead_lettered', 'message.dead_lettered', 'task.retried', 'message.retried', 'task.dropped'}
    wanted |= {'message.dropped', 'agent.error'}
    happened = set[str]()
    for step in range(1, 12_001):
        try:
            fuzz.turn()
            if step % 50 == 0:
                state = check(ground)
                now = {key: int(task['attempt']) for key, task in state.items() if re.fullmatch('task:[^:]+', key)}
                assert all(now[task] >= attempts[task] for task in now if task in attempts), 'an attempt went down'
                attempts = now
                happened |= {event['type'] for event in ground.history()}
                if step >= 3000 and fuzz.refused >= refused and happened >= wanted:
                    break
        except (AssertionError, TownError, ErrorReply) as e:
            e.add_note(f'after {step} operations; again with  FUZZ_SEED={seed}')
            raise
    assert fuzz.refused >= refused
    assert happened >= wanted
    counts = ground.do('town.get_status', deep=True)['tasks']
    assert counts == {state: ground.do('task.list', state=state, limit=1)['count'] for state in STATES}


def test_the_checker_detects_every_kind_of_damage(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    agent.take()
    check(ground)
    prefix = text(ground.store.prefix)
    for command in (
        ('ZREM', f'{prefix}leases', task),
        ('ZREM', f'{prefix}tasks:running', task),
        ('HSET', f'{prefix}task:{task}', 'state', 'failed'),
        ('SREM', f'{prefix}agent:{agent.id}:running', task),
        ('DEL', f'{prefix}inbox:{agent.id}:t'),
        ('HSET', f'{prefix}agent:{agent.id}', 'state', 'Stopped'),
        ('ZADD', f'{prefix}live', '5', new_id()),
        ('HSET', f'{prefix}agent:{agent.id}', 'done', '9'),
        ('DEL', f'{prefix}names'),
    ):
        key = command[1]
        kept = redis(ground, 'DUMP', key)
        redis(ground, *command)
        with pytest.raises(AssertionError):
            check(ground)
        redis(ground, 'RESTORE', key, 0, kept, 'REPLACE')
        check(ground)


# ------------------------------------------------------------------------------------------------------- connections


def test_a_script_that_redis_forgot_is_sent_again_as_text(ground: Place) -> None:
    task = ground.do('backlog.add', description='x')['task_id']
    redis(ground, 'SCRIPT', 'FLUSH')
    assert ground.do('task.get', task_id=task)['state'] == 'pending'
    redis(ground, 'SCRIPT', 'FLUSH')
    ground.do('backlog.add', description='y', key='k')
    assert ground.do('backlog.list')['count'] == 2


def test_a_townhall_continues_after_redis_forgot_the_scripts(place: Place, hall: Hall) -> None:
    assert hall.post('/v1/backlog', {'description': 'x'}).status == 201
    redis(place, 'SCRIPT', 'FLUSH')
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: hall.post('/v1/backlog', {'description': 'x'}).status, range(8)))
    assert answers == [201] * 8
    assert hall.get('/v1/backlog').json['count'] == 9


@contextmanager
def stopped(place: Place) -> Iterator[None]:
    """Redis does not answer inside this context."""
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_redis_that_hangs_is_unavailable_after_one_timeout_and_usable_afterwards(ground: Place) -> None:
    with stopped(ground):
        for _ in range(2):  # on the open connection, and on a new one
            began = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                ground.do('town.get_status')
            assert time.monotonic() - began < 4
            assert (caught.value.retry_after, caught.value.code) == (1, 'redis-unavailable')
            assert 'not known' in caught.value.detail
    assert ground.do('town.get_status')['agent_count'] == 0


def test_a_killed_redis_is_unavailable_at_once_and_a_restarted_one_is_used_without_an_error(place: Place) -> None:
    task = place.do('backlog.add', description='survives')['task_id']
    gone = os.pidfd_open(redis_pid(place))
    signal.pidfd_send_signal(gone, signal.SIGKILL)
    assert select.select([gone], [], [], PATIENCE)[0]
    os.close(gone)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            place.do('town.get_status')
        assert time.monotonic() - began < 1
    managed_redis.ensure(place.root, place.town.config)
    assert place.do('task.get', task_id=task)['state'] == 'pending'
    assert managed_redis.stop_redis(place.root)
    managed_redis.ensure(place.root, place.town.config)
    assert place.do('task.get', task_id=task)['state'] == 'pending'  # the idle connection was replaced


@contextmanager
def cutter(place: Place) -> Iterator[tuple[Endpoint, list[bytes]]]:
    """A proxy to the town's Redis that loses every reply: its endpoint, and the commands that it has forwarded."""
    seen: list[bytes] = []
    with socket.create_server(('127.0.0.1', 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, socket.socket(socket.AF_UNIX) as behind:
                    behind.connect(str(managed_redis.socket_path(place.root)))
                    if command := client.recv(1 << 20):
                        seen.append(command)
                        behind.sendall(command)
                        behind.recv(1 << 20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield RedisServer(host='127.0.0.1', port=server.getsockname()[1]), seen
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_write_whose_reply_was_lost_is_not_sent_again(ground: Place) -> None:
    pipeline(ground, [ground.store.backlog_add((new_id(), '{"task_id":"t","description":"d"', '"d"', '[]', '', 3))])
    ground.do('backlog.add', description='so that the script is known')
    with cutter(ground) as (endpoint, seen):
        through = Store(endpoint, ground.town.name)
        command = through.backlog_add((new_id(), '{"task_id":"t","description":"d"', '"d"', '[]', CONDUCTOR_ID, 3))
        with pytest.raises(Unavailable, match='whether the change was made is not known'):
            through.call(command)
        assert len(seen) == 1
    assert ground.do('backlog.list')['count'] == 3


def test_a_connection_works_with_more_descriptors_than_select_supports(ground: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with ExitStack() as held:
            for _ in range(1100):
                held.enter_context(open(os.devnull))
            ground.store.close()
            for _ in range(2):
                ground.do('town.get_status')
            ground.store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_share_a_store_and_each_has_its_own_connection(ground: Place) -> None:
    answers: list[int] = []

    def ask() -> None:
        for _ in range(20):
            answers.append(ground.do('backlog.add', description=threading.current_thread().name) is not None)
        ground.store.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == ground.do('backlog.list')['count'] == 160


# -------------------------------------------------------------------------------------------------------------- town


def test_opening_a_new_town_many_times_at_once_creates_one_town(directory: Path) -> None:
    place = make_town(directory)
    barrier, errors = threading.Barrier(8), []

    def enter() -> None:
        barrier.wait()
        try:
            open_town(directory).store.close()
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert not list((directory / '.tt').glob('town-id.*'))
    finally:
        place.close()


def test_a_second_town_with_the_same_name_is_refused(ground: Place) -> None:
    with pytest.raises(Conflict) as caught:
        ground.store.call(ground.store.open(new_id()))
    assert caught.value.code == 'town-name-taken'


@pytest.mark.parametrize(
    ('url', 'shown'),
    [
        ('redis://:secret@db:6379/1', 'redis://:***@db:6379/1'),
        ('rediss://user:secret@db', 'rediss://user:***@db'),
        ('unix:///run/redis.sock?db=1&password=secret', 'unix:///run/redis.sock?db=1&password=***'),
        ('rediss://db?password=secret&db=2', 'rediss://db?password=***&db=2'),
        ('redis+sentinel://me:secret@a:1,b:2/main', 'redis+sentinel://me:***@a:1,b:2/main'),
        ('redis://db:6379', 'redis://db:6379'),
        ('redis://a@b:s[cr]t@db', 'redis://a@b:***@db'),
        ('unix://:s[cret@/run/redis@main.sock', 'unix://:***@/run/redis@main.sock'),
    ],
)
def test_the_shown_url_of_redis_hides_its_password(tmp_path: Path, url: str, shown: str) -> None:
    make_town(tmp_path, redis={'url': url})
    loaded = config.load(tmp_path)
    town = Town(tmp_path, loaded, Store(endpoint_of(loaded.redis, 'key', tmp_path), loaded.name))
    assert town.redis_url == shown


def test_a_name_that_looks_like_an_id_is_refused_in_upper_case_too(ground: Place) -> None:
    agent = enlist(ground, 'a')
    with pytest.raises(TownError) as caught:
        enlist(ground, agent.id.upper())
    assert caught.value.status == 422
    assert {each['id'] for each in ground.do('agent.list')['agents']} == {agent.id}
