"""What version 0.1.0 has left behind goes on: its towns, its units, and its processes that still run.

`recorded/record.py` tells what was recorded, and how. All is opened from outside, by commands, over HTTP and on
sockets, as it stands on machines: nothing here knows a module by more than the name by which 0.1.0 calls it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .recorded.resp import Refused, Talk
from .support import PATIENCE, REPOSITORY, Hall, Place, Reply, environment, free_port, make_town, until

RECORDS = REPOSITORY / 'tests' / 'recorded' / '0.1.0'
INSTANCE = '7d0c8f0a-54cf-4d0f-9a5b-0d8f8f2b7c11'
AGENT = '0f6f3c52-8a57-4a0c-8f6e-5b1f0f7f1f22'


def recorded(name: str) -> Any:
    return json.loads((RECORDS / f'{name}.json').read_text())


def filled(text: str, root: Path) -> str:
    """A recorded text as it would stand on this machine."""
    for mark, value in (('@ROOT@', str(root)), ('@PYTHON@', sys.executable), ('@CODE@', str(REPOSITORY))):
        text = text.replace(mark, value)
    return text


# ---------------------------------------------------------------------------------------------------------- the town

KNOWN = recorded('known')
AGENTS, TASKS = KNOWN['agents'], KNOWN['tasks']
ADMIN = {'X_API_Key': KNOWN['keys']['admin']}


@pytest.fixture
def old(directory: Path) -> Iterator[Place]:
    """The recorded town, in a directory of this machine: it was cut off from power, and nothing of it runs."""
    subprocess.run(['tar', '-xzf', RECORDS / 'town.tar.gz', '-C', directory], check=True)
    for file in directory.rglob('*'):
        if file.is_file() and (data := file.read_bytes()) and b'@' in data and 'appendonly' not in file.name:
            file.write_text(filled(data.decode(), directory))
    place = Place(directory)
    yield place
    place.close()


def lacks(before: Any, now: Any, where: str = '') -> list[str]:
    """What an answer lacks, or has otherwise, of what an earlier one had. It may have more."""
    if isinstance(before, dict) and isinstance(now, dict):
        gone = [f'{where}/{name} is gone' for name in before if name not in now]
        return gone + [
            each for name in before if name in now for each in lacks(before[name], now[name], f'{where}/{name}')
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            each
            for n, (old, new) in enumerate(zip(before, now, strict=True))
            for each in lacks(old, new, f'{where}/{n}')
        ]
    return [] if before == now else [f'{where}: {before!r} is {now!r}']


def test_all_that_was_told_of_an_old_town_is_told_still(old: Place) -> None:
    hall = old.hall('--read-only')
    told = json.loads(filled(json.dumps(recorded('answers')), old.root))
    for path, before in told.items():
        reply = hall.get(path, **ADMIN)
        assert reply.status == 200, (path, reply)
        assert lacks(before, reply.json) == [], path
    metrics = re.findall(r'^# TYPE (\S+ \S+)', hall.get('/metrics', **ADMIN).body.decode(), re.M)
    assert set((RECORDS / 'metrics.txt').read_text().splitlines()) <= set(metrics)
    assert lacks(recorded('settings'), old.tt_json('config')) == []


def test_who_was_known_to_an_old_town_is_known_still(old: Place) -> None:
    hall = old.hall('--read-only')
    reader = {'X_API_Key': KNOWN['keys']['reader']}
    assert hall.get('/v1/status').status == 401
    assert hall.get('/v1/status', **reader).status == 200
    denials = old.root / '.tt' / 'audit.denied.jsonl'
    before = denials.read_text()
    assert hall.post('/v1/agents', {'name': 'x'}, **reader).json['code'] == 'insufficient-scope'
    assert denials.read_text().startswith(before + '{')
    token = (old.root / '.tt' / 'agents' / f'{AGENTS["idle"]}.token').read_text().strip()
    assert hall.get('/v1/agents/idle/inbox', Authorization=f'Bearer {token}').status == 200
    gone = (old.root / '.tt' / 'agents' / f'{AGENTS["waits"]}.token').read_text().strip()
    assert hall.get('/v1/agents/idle/inbox', Authorization=f'Bearer {gone}').status == 401, 'its process has died'


class Caller:
    """Someone who asks a townhall with the key of the recorded town."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def get(self, path: str) -> Any:
        reply = self._hall.get(f'/v1/{path}', **ADMIN)
        assert reply.status == 200, reply
        return reply.json

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self._hall.post(f'/v1/{path}', body, **ADMIN, **headers)

    def await_end(self, task: str) -> Any:
        """A task, once it has ended."""
        until(lambda: self.get(f'tasks/{task}')['state'] in ('completed', 'failed', 'cancelled'))
        return self.get(f'tasks/{task}')

    def changes(self, task: str) -> list[str]:
        return [change['type'].removeprefix('task.') for change in self.get(f'tasks/{task}/history')['history']]


def test_an_old_town_goes_on_where_its_power_was_cut(old: Place) -> None:
    before = (old.root / '.tt' / 'audit.jsonl').read_text()
    hall = old.hall()
    caller = Caller(hall)
    reported = caller.await_end(TASKS['reported'])
    assert (reported['state'], reported['attempt']) == ('completed', 1), 'it was done, and is not done again'
    assert reported['result'] == 'it is told'
    assert caller.changes(TASKS['reported']) == ['created', 'assigned', 'started', 'completed']
    assert not list((old.root / '.tt' / 'agents').glob('*.spool/*'))
    cut = caller.await_end(TASKS['running'])
    assert (cut['state'], cut['attempt'], cut['result']) == ('completed', 2, 'it is done after all')
    assert caller.changes(TASKS['running']) == [
        'created',
        'assigned',
        'started',
        'requeued',
        'assigned',
        'started',
        'completed',
    ]
    for name in ('assigned', 'claimed'):
        assert caller.await_end(TASKS[name])['state'] == 'completed'
    states = {agent['name']: agent['state'] for agent in caller.get('agents')['agents']}
    assert (states['stopped'], states['broken'], states['far']) == ('Stopped', 'Error', 'Idle')
    assert caller.get(f'tasks/{TASKS["delayed"]}')['state'] == 'assigned', 'its pause of a day is not over'
    _go_on_asking(caller)
    after = (old.root / '.tt' / 'audit.jsonl').read_text()
    assert after.startswith(before)
    assert '"operation":"agent.spawn"' in after.removeprefix(before)
    _go_on_by_command(old, hall)


def _go_on_asking(caller: Caller) -> None:
    """What is asked of an old town over HTTP."""
    for asked in KNOWN['requests']:
        path = asked['path'].removeprefix('/v1/')
        again = caller.post(path, asked['body'], Idempotency_Key=asked['key'])
        assert (again.status, again.json) == (asked['status'], asked['answer']), 'it is not done twice'
        other = caller.post(path, asked['body'] | {'agent': 'idle'}, Idempotency_Key=asked['key'])
        assert other.status >= 400
    assert caller.post('agents', {'name': 'fresh'}).status == 201
    task = caller.post('tasks/assign', {'agent': 'fresh', 'task': 'a new one'}).json['task_id']
    assert caller.await_end(task)['result'] == 'demo: done: a new one'
    assert caller.post('agents/stopped/restart').status == 200
    assert caller.await_end(TASKS['left'])['result'] == 'demo: done: left in the inbox of one who stopped'
    assert caller.post(f'deadletter/{TASKS["dead"]}/retry').status == 200
    assert caller.changes(TASKS['dead'])[-2:] == ['dead_lettered', 'retried']
    for task in (TASKS['tagged'], TASKS['dead']):
        assert caller.post(f'backlog/{task}/claim', {'agent': 'fresh'}).status == 200
        assert caller.await_end(task)['state'] == 'completed'
    assert 'demo: done: water the plants' in json.dumps(caller.get('agents/idle/logs'))


def _go_on_by_command(old: Place, hall: Hall) -> None:
    """What is done to an old town at its machine."""
    file = old.root / 'tinytown.toml'
    before = file.read_text().splitlines()
    old.tt('config', 'max_agents', '21')
    assert file.read_text().splitlines() == [
        'max_agents = 21' if line == 'max_agents = 20' else line for line in before
    ]
    hall.said('taken up again')
    [note] = [json.loads(each.read_text()) for each in (old.root / '.tt' / 'run').glob('townhall-*.json')]
    assert note['pid'] == hall.process.pid, 'the one of old is dead and forgotten'
    assert {'host', 'boot', 'pid', 'start', 'url'} <= note.keys(), 'by which a tt of old finds it'
    assert {key['id'] for key in old.tt_json('key', 'list')['keys']} == {key[3:11] for key in KNOWN['keys'].values()}
    stopped = old.tt_json('stop', '--redis')
    assert (stopped['townhalls'], stopped['left'], stopped['redis']) == (1, [], True)
    assert {'busy', 'fresh', 'idle', 'paused', 'reporter', 'stopped'} <= set(stopped['agents'])
    assert hall.process.wait(PATIENCE) == 0
    with pytest.raises(OSError, match=r'No such file|refused'):
        Talk(old.root / '.tt' / 'redis.sock')


def test_what_an_old_worker_runs_is_where_it_was(old: Place) -> None:
    run = {'TINYTOWN_TOWN': str(old.root), 'TINYTOWN_AGENT_ID': AGENTS['idle'], 'TINYTOWN_AGENT_NAME': 'idle'}
    tt = [str(old.root / '.tt' / 'bin' / 'tt')]
    assert 'paint the door' in _said([*tt, 'pending'], '', **run)
    _said([*tt, 'send', 'conductor', 'from within'], '', **run)
    last = json.loads(_said([*tt, 'inbox', 'conductor', '--json'], '', **run))['messages'][-1]
    assert (last['from'], last['summary']) == (AGENTS['idle'], 'from within')
    prompt = (old.root / '.tt' / 'agents' / f'{AGENTS["idle"]}.prompt').read_text()
    for demo in (['-I', str(REPOSITORY / 'tinytown' / 'demo.py')], ['-P', '-m', 'tinytown.demo']):
        assert _said([sys.executable, *demo], prompt) == 'demo: done: water the plants\n'


def _said(argv: list[str], told: str, **more: str) -> str:
    done = subprocess.run(argv, env=environment(**more), input=told, cwd='/', capture_output=True, text=True,
                          timeout=PATIENCE, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- workers


class OldWorker:
    """A worker of 0.1.0 that lives on, as Redis hears it: what it says was recorded, with the texts of its scripts."""

    def __init__(self, place: Place, **named: str) -> None:
        record = recorded('conversation')
        self._commands, self._scripts = record['commands'], record['scripts']
        self._named = {'town': 'tt:{test}:', 'agent': AGENT, 'instance': INSTANCE, 'starter': ''} | named
        self._redis = place.root / '.tt' / 'redis.sock'

    def say(self, name: str, number: int = 0, **named: str) -> list[Any]:
        """What is answered to the command of that name and number among those: what follows the 1 of a success."""
        words = [each['words'] for each in self._commands if each['name'] == name][number]
        for mark, value in (self._named | named).items():
            words = [word.replace(f'<{mark}>', value) for word in words]
        with Talk(self._redis) as redis:
            if name not in self._scripts:
                return redis.ask(*words) or []
            script = self._scripts[name].encode()
            try:
                reply = redis.ask('EVALSHA', hashlib.sha1(script).hexdigest(), 1, *words)  # noqa: S324
            except Refused as e:
                if not str(e).startswith('NOSCRIPT'):
                    raise
                reply = redis.ask('EVAL', script, 1, *words)
        assert reply[0] == 1, reply
        rest: list[Any] = reply[1:]
        return rest


FAR = {'host': 'far', 'boot': 'b1d4-of-another-machine@@', 'pid': '7', 'start': '1'}


def test_a_worker_of_old_is_registered_works_and_departs_among_what_is_new(place: Place, hall: Hall) -> None:
    worker = OldWorker(place, **FAR)
    assert worker.say('register')[0] == AGENT.encode()
    agent_id, _, record, state, instance, *_ = worker.say('agent')
    assert (agent_id, json.loads(record)['cli'], state, instance) == (
        AGENT.encode(),
        'demo',
        b'Starting',
        INSTANCE.encode(),
    )
    assert worker.say('hello') == [b'0'], 'as many rounds as it likes'
    assert worker.say('pickup')[:2] == [b'rest', b'Idle']
    shown = hall.get('/v1/agents/talker').json
    assert (shown['id'], shown['state'], shown['host'], shown['pid']) == (AGENT, 'Idle', 'far', 7)
    assert hall.post('/v1/agents/talker/interrupt').status == 200
    [(bell, [_])] = worker.say('XREAD')
    assert bell.endswith(b':c')
    assert worker.say('pickup', 1)[:2] == [b'rest', b'Paused']
    asked = {'to': 'talker', 'message': 'what is the time?', 'kind': 'query'}
    assert hall.post('/v1/messages/send', asked).status == 201
    task = hall.post('/v1/tasks/assign', {'agent': 'talker', 'task': 'say it'}).json['task_id']
    assert hall.post('/v1/agents/talker/resume').status == 200
    assert len(worker.say('XREAD')) == 3, 'of what controls it, of tasks, of messages'
    what, (taken, attempt, head, tags), [(lane, entry, kind, letter)], backlog = worker.say('pickup', 2)
    assert (what, taken, attempt, lane, kind, tags, backlog) == (
        b'work',
        task.encode(),
        1,
        b'n',
        b'query',
        b'[]',
        b'[]',
    )
    assert json.loads(head + b'}')['description'] == 'say it'
    assert json.loads(letter)['summary'] == 'what is the time?'
    its = {'task': task, 'entry': entry.decode()}
    assert worker.say('beat', 2, **its) == [b'Working', []], 'it has not lost its task'
    assert hall.get(f'/v1/tasks/{task}').json['state'] == 'running'
    assert worker.say('finish', **its) == [b'done', b'completed']
    assert worker.say('finish', **its) == [b'already', b'completed']
    assert worker.say('round_done', **its) == [b'Idle', 1]
    assert hall.get(f'/v1/tasks/{task}').json['result'] == 'demo: done: say it'
    assert hall.get('/v1/agents/talker/inbox').json['total'] == 0
    assert hall.post('/v1/agents/talker/close').status == 200
    assert worker.say('pickup', 4)[:2] == [b'rest', b'Draining']
    assert worker.say('depart') == [[]], 'it leaves nothing behind'
    shown = hall.get('/v1/agents/talker').json
    assert (shown['state'], shown['rounds_completed'], shown['tasks_completed']) == ('Stopped', 1, 1)
    kinds = [event['type'] for event in hall.get('/v1/events?limit=500').json['events']]
    ours = ['agent.registered', 'agent.started', 'task.started', 'task.completed', 'agent.stopped']
    assert [kind for kind in kinds if kind in ours] == ours


def test_a_worker_of_old_loses_what_was_taken_from_it(place: Place, hall: Hall) -> None:
    worker = OldWorker(place, **FAR)
    for name in ('register', 'agent', 'hello', 'pickup'):
        worker.say(name)
    task = hall.post('/v1/tasks/assign', {'agent': 'talker', 'task': 'say it'}).json['task_id']
    worker.say('pickup', 2)
    assert hall.post(f'/v1/tasks/{task}/cancel').status == 200
    assert worker.say('beat', 2, task=task) == [b'Working', [task.encode()]]
    assert hall.post('/v1/agents/talker/kill', {'force': True}).status == 200
    with pytest.raises(AssertionError, match='stale-instance'):
        worker.say('pickup', 2)


# ------------------------------------------------------------------------------------- processes that start processes


@pytest.fixture
def here(directory: Path) -> Iterator[Place]:
    """A town whose host has a name, by which processes of old know it, too."""
    made = make_town(directory, host='here')
    yield made
    made.close()


def settings() -> dict[str, Any]:
    """The settings of a town as a process of 0.1.0 tells them to another."""
    told: dict[str, Any] = recorded('processes')['charter']['settings']
    return told | {'name': 'test', 'host': 'here', 'default_cli': 'demo'}


def order(place: Place) -> dict[str, Any]:
    """What a process of 0.1.0 has its town's keeper start."""
    text = json.dumps(recorded('processes')['order']).replace('<agent>', AGENT).replace('<instance>', INSTANCE)
    told: dict[str, Any] = json.loads(filled(text, place.root))
    return told


def start(told: dict[str, Any], descriptors: list[int]) -> int:
    """Starts a process as 0.1.0 does, itself or as the keeper."""
    with open(told['log'], 'ab') as log:
        process = subprocess.Popen(
            [str(descriptors[0]) if word == '{fd}' else word for word in told['argv']],
            cwd=told['cwd'],
            env=environment(**told['env']) | {'TINYTOWN_INSTANCE': told['mark']},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=descriptors,
        )
    threading.Thread(target=process.wait, daemon=True).start()
    return process.pid


def have_started(told: dict[str, Any], descriptors: list[int]) -> int:
    """Has the keeper of a town start a process, as 0.1.0 asks it to."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(f'{told["cwd"]}/.tt/run/keeper.sock')
        socket.send_fds(sock, [json.dumps(told).encode()], descriptors)
        sock.shutdown(socket.SHUT_WR)
        answer = json.loads(read_all(sock))
    assert 'pid' in answer, answer
    return int(answer['pid'])


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


@pytest.mark.parametrize('by_keeper', [False, True])
def test_a_townhall_of_old_that_still_runs_starts_workers(here: Place, by_keeper: bool) -> None:
    with ExitStack() as stack:
        if by_keeper:
            keeper = Manager(here.root, unit('user', 'tinytown-recorded.service', here.root))
            stack.callback(keeper.kill)
            stack.callback(keeper.stop)
        hall = here.hall()
        OldWorker(here, host='here').say('register')
        ours, its = socket.socketpair()
        with ours, its:
            pid = (have_started if by_keeper else start)(order(here), [its.fileno()])
            its.close()
            ours.settimeout(PATIENCE)
            charter = {'root': str(here.root), 'agent_id': AGENT, 'instance': INSTANCE, 'settings': settings()}
            ours.sendall(json.dumps(charter).encode())
            ours.shutdown(socket.SHUT_WR)
            assert ours.recv(4096) == b'ok'
        shown = hall.get('/v1/agents/talker').json
        assert (shown['state'], shown['pid']) == ('Idle', pid)
        task = hall.post('/v1/tasks/assign', {'agent': 'talker', 'task': 'say it'}).json['task_id']
        assert here.await_end(task)['result'] == 'demo: done: say it'
        assert hall.post('/v1/agents/talker/kill').status == 200
        assert not Path(f'/proc/{pid}/exe').exists()


def test_a_keeper_of_old_that_still_runs_is_asked_as_it_expects(here: Place) -> None:
    asked: list[dict[str, Any]] = []

    def keep() -> None:
        client, _ = listener.accept()
        with client:
            data, descriptors, _, _ = socket.recv_fds(client, 65536, 8)
            asked.append(json.loads(data + read_all(client)))
            client.sendall(json.dumps({'pid': start(asked[0], descriptors)}).encode())
            for each in descriptors:
                os.close(each)

    _ = here.town  # its Redis runs already
    (here.root / '.tt' / 'run').mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.root / '.tt' / 'run' / 'keeper.sock'))
        listener.listen()
        thread = threading.Thread(target=keep)
        thread.start()
        here.tt('spawn', 'ordered')
        thread.join(PATIENCE)
    assert asked[0].keys() == recorded('processes')['order'].keys()
    assert here.tt_json('show', 'ordered')['state'] == 'Idle'


def test_a_keeper_of_old_that_ends_has_its_town_brought_to_a_standstill(here: Place) -> None:
    here.tt('spawn', 'one')
    pid = here.tt_json('show', 'one')['pid']
    _said([sys.executable, '-P', '-m', 'tinytown.standstill', str(here.root)], json.dumps(settings()))
    assert not Path(f'/proc/{pid}/exe').exists()
    with pytest.raises(OSError, match=r'No such file|refused'):
        Talk(here.root / '.tt' / 'redis.sock')
    here.let_go()
    assert here.tt_json('show', 'one')['state'] == 'Stopped'


# ------------------------------------------------------------------------------------------------------------- units

KINDS = ('system', 'system-socket', 'user', 'user-socket')


def unit(kind: str, name: str, root: Path) -> str:
    """A recorded unit as it stands on this machine, signed as it was."""
    first, _, rest = (RECORDS / 'units' / kind / name).read_text().partition('\n')
    signed, _, _ = first.partition('sha256:')
    text = filled(rest, root)
    return f'{signed}sha256:{hashlib.sha256(text.encode()).hexdigest()}\n{text}'


def lines(text: str, name: str) -> list[str]:
    return re.findall(rf'^{name}=(.*)$', text, re.M)


_PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': sys.argv[2]}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """A service manager that has what a unit says run, as far as that concerns the program. It is ready then.

    `sock` is the socket that it passes, by the name that the socket's unit has for it.
    """

    def __init__(self, root: Path, text: str, sock: socket.socket | None = None, name: str = '') -> None:
        self._text = text
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.settimeout(PATIENCE)
        self._ear.bind(str(root / f'notify-{os.urandom(2).hex()}'))
        env = {each: os.environ[each] for each in ('HOME', 'TINYTOWN_REDIS_SERVER') if each in os.environ}
        env |= dict(shlex.split(line)[0].split('=', 1) for line in lines(text, 'Environment'))
        env['NOTIFY_SOCKET'] = self._ear.getsockname()
        [command], [cwd] = lines(text, 'ExecStart'), lines(text, 'WorkingDirectory')
        argv, passed = shlex.split(command), [sock.fileno()] if sock else []
        if sock:
            argv = [sys.executable, '-c', _PASS, str(sock.fileno()), name, *argv]
        self.process = subprocess.Popen(argv, env=env, cwd=cwd, pass_fds=passed, stdin=subprocess.DEVNULL)
        self._await('READY=1')

    def _await(self, word: str) -> None:
        """Waits until it is told that word."""
        while word not in self._ear.recv(4096).decode().splitlines():
            pass

    def reload(self) -> None:
        [command] = lines(self._text, 'ExecReload')
        subprocess.run(shlex.split(command.replace('$MAINPID', str(self.process.pid))), check=True)
        self._await('RELOADING=1')
        self._await('READY=1')

    def stop(self) -> int:
        """Ends its main process, as KillMode=mixed has it. The exit status of that."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """Ends it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._ear.close()


@pytest.mark.parametrize('kind', KINDS)
def test_old_units_run_a_town_and_end_it(directory: Path, kind: str) -> None:
    port = free_port()
    place = make_town(directory, name='recorded', townhall={'rest_port': port})
    with ExitStack() as stack:
        stack.callback(place.close)
        keeper = Manager(directory, unit(kind, 'tinytown-recorded.service', directory))
        stack.callback(keeper.kill)
        listener, name = None, ''
        if kind.endswith('-socket'):
            text = unit(kind, 'townhall-recorded.socket', directory)
            assert lines(text, 'ListenStream') == ['127.0.0.1:8787']
            listener, [name] = socket.create_server(('127.0.0.1', port)), lines(text, 'FileDescriptorName')
            stack.callback(listener.close)
        manager = Manager(directory, unit(kind, 'townhall-recorded.service', directory), listener, name)
        stack.callback(manager.kill)
        served = Served(port)
        assert served.post('/v1/agents', {'name': 'one'}).status == 201
        pid = served.get('/v1/agents/one').json['pid']
        assert int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]) == keeper.process.pid
        manager.reload()
        assert served.get('/ready').status == 200
        assert manager.stop() == 0
        assert Path(f'/proc/{pid}/exe').exists(), 'townhall comes and goes without its town'
        assert keeper.stop() == 0
        assert not Path(f'/proc/{pid}/exe').exists()
        with pytest.raises(OSError, match=r'No such file|refused'):
            Talk(directory / '.tt' / 'redis.sock')


class Served(Hall):
    """A townhall that someone else has started."""

    def __init__(self, port: int) -> None:
        self.address, self.port = '127.0.0.1', port


_CTL = '#!/bin/sh\ncase "$*" in *is-active*) echo active;; *Linger*) echo yes;; esac\n'


@pytest.mark.parametrize('kind', ['user', 'user-socket'])
def test_old_units_are_known_replaced_and_removed(directory: Path, tmp_path: Path, kind: str) -> None:
    root = make_town(directory, name='recorded').root
    home = tmp_path / '.config' / 'systemd' / 'user'
    home.mkdir(parents=True)
    for file in (RECORDS / 'units' / kind).iterdir():
        (home / file.name).write_text(unit(kind, file.name, root))
    count = len(list(home.iterdir()))
    for name in ('systemctl', 'loginctl'):
        (tmp_path / name).write_text(_CTL)
        (tmp_path / name).chmod(0o755)

    def service(*words: str) -> str:
        argv = [sys.executable, '-m', 'tinytown.townhall', 'service', *words, '--user', '--town', str(root)]
        return _said(argv, '', HOME=str(tmp_path), PATH=f'{tmp_path}:/usr/bin:/bin')

    assert service('status').count('active, as written') == count
    before = {file.name for file in home.iterdir()}
    service('install', *(['--socket'] if kind.endswith('-socket') else []))
    assert {file.name for file in home.iterdir()} == before
    assert service('status').count('active, as written') == count
    for file in home.glob('*.service'):
        assert lines(file.read_text(), 'WorkingDirectory') == [str(root)]
    service('uninstall')
    assert not list(home.iterdir())
