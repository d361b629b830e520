"""Towns, units and running processes of version 0.1.0 continue to work.

`recorded/record.py` describes the records. The tests use them from outside: with commands, over HTTP and on sockets.
They know modules only by the names under which 0.1.0 starts them.
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
    """A recorded text with the paths of this machine in place of its marks."""
    for mark, value in (('@ROOT@', str(root)), ('@PYTHON@', sys.executable), ('@CODE@', str(REPOSITORY))):
        text = text.replace(mark, value)
    return text


# ---------------------------------------------------------------------------------------------------------- the town

KNOWN = recorded('known')
AGENTS, TASKS = KNOWN['agents'], KNOWN['tasks']
ADMIN = {'X_API_Key': KNOWN['keys']['admin']}


@pytest.fixture
def old(directory: Path) -> Iterator[Place]:
    """The recorded town, unpacked: the state after a power failure, with no process running."""
    subprocess.run(['tar', '-xzf', RECORDS / 'town.tar.gz', '-C', directory], check=True)
    for file in directory.rglob('*'):
        if file.is_file() and (data := file.read_bytes()) and b'@' in data and 'appendonly' not in file.name:
            file.write_text(filled(data.decode(), directory))
    place = Place(directory)
    yield place
    place.close()


def lacks(before: Any, now: Any, where: str = '') -> list[str]:
    """The fields of an earlier answer that are missing or different now. New fields are allowed."""
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


def test_every_recorded_answer_of_an_old_town_is_still_given(old: Place) -> None:
    hall = old.hall('--read-only')
    answers = json.loads(filled(json.dumps(recorded('answers')), old.root))
    for path, before in answers.items():
        reply = hall.get(path, **ADMIN)
        assert reply.status == 200, (path, reply)
        assert lacks(before, reply.json) == [], path
    metrics = re.findall(r'^# TYPE (\S+ \S+)', hall.get('/metrics', **ADMIN).body.decode(), re.M)
    assert set((RECORDS / 'metrics.txt').read_text().splitlines()) <= set(metrics)
    assert lacks(recorded('settings'), old.tt_json('config')) == []


def test_keys_and_tokens_of_an_old_town_are_still_valid(old: Place) -> None:
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
    """A client with the admin key of the recorded town."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def get(self, path: str) -> Any:
        reply = self._hall.get(f'/v1/{path}', **ADMIN)
        assert reply.status == 200, reply
        return reply.json

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self._hall.post(f'/v1/{path}', body, **ADMIN, **headers)

    def await_end(self, task: str) -> Any:
        """Waits until a task has ended. Returns the task."""
        until(lambda: self.get(f'tasks/{task}')['state'] in ('completed', 'failed', 'cancelled'))
        return self.get(f'tasks/{task}')

    def changes(self, task: str) -> list[str]:
        return [change['type'].removeprefix('task.') for change in self.get(f'tasks/{task}/history')['history']]


def test_an_old_town_goes_on_where_its_power_was_cut(old: Place) -> None:
    before = (old.root / '.tt' / 'audit.jsonl').read_text()
    hall = old.hall()
    caller = Caller(hall)
    reported = caller.await_end(TASKS['reported'])
    assert (reported['state'], reported['attempt']) == ('completed', 1), 'it was done already and is not repeated'
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
    assert caller.get(f'tasks/{TASKS["delayed"]}')['state'] == 'assigned', 'its pause is a day'
    _use_over_http(caller)
    after = (old.root / '.tt' / 'audit.jsonl').read_text()
    assert after.startswith(before)
    assert '"operation":"agent.spawn"' in after.removeprefix(before)
    _use_by_command(old, hall)


def _use_over_http(caller: Caller) -> None:
    """Uses an old town over HTTP: repeated requests, new agents and tasks, dead letters."""
    for request in KNOWN['requests']:
        path = request['path'].removeprefix('/v1/')
        again = caller.post(path, request['body'], Idempotency_Key=request['key'])
        assert (again.status, again.json) == (request['status'], request['answer']), 'it is not done twice'
        other = caller.post(path, request['body'] | {'agent': 'idle'}, Idempotency_Key=request['key'])
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


def _use_by_command(old: Place, hall: Hall) -> None:
    """Uses an old town with `tt`: changes its configuration, and stops it."""
    file = old.root / 'tinytown.toml'
    before = file.read_text().splitlines()
    old.tt('config', 'max_agents', '21')
    assert file.read_text().splitlines() == [
        'max_agents = 21' if line == 'max_agents = 20' else line for line in before
    ]
    hall.said('was reloaded')
    [note] = [json.loads(each.read_text()) for each in (old.root / '.tt' / 'run').glob('townhall-*.json')]
    assert note['pid'] == hall.process.pid, 'the run file of the old townhall is gone'
    assert {'host', 'boot', 'pid', 'start', 'url'} <= note.keys(), 'an old tt finds it by these'
    assert {key['id'] for key in old.tt_json('key', 'list')['keys']} == {key[3:11] for key in KNOWN['keys'].values()}
    stopped = old.tt_json('stop', '--redis')
    assert (stopped['townhalls'], stopped['left'], stopped['redis']) == (1, [], True)
    assert {'busy', 'fresh', 'idle', 'paused', 'reporter', 'stopped'} <= set(stopped['agents'])
    assert hall.process.wait(PATIENCE) == 0
    with pytest.raises(OSError, match=r'No such file|refused'):
        Talk(old.root / '.tt' / 'redis.sock')


def test_the_programs_that_an_old_worker_starts_are_at_their_old_paths(old: Place) -> None:
    run = {'TINYTOWN_TOWN': str(old.root), 'TINYTOWN_AGENT_ID': AGENTS['idle'], 'TINYTOWN_AGENT_NAME': 'idle'}
    tt = [str(old.root / '.tt' / 'bin' / 'tt')]
    assert 'paint the door' in _output([*tt, 'pending'], '', **run)
    _output([*tt, 'send', 'conductor', 'from within'], '', **run)
    last = json.loads(_output([*tt, 'inbox', 'conductor', '--json'], '', **run))['messages'][-1]
    assert (last['from'], last['summary']) == (AGENTS['idle'], 'from within')
    prompt = (old.root / '.tt' / 'agents' / f'{AGENTS["idle"]}.prompt').read_text()
    for demo in (['-I', str(REPOSITORY / 'tinytown' / 'demo.py')], ['-P', '-m', 'tinytown.demo']):
        assert _output([sys.executable, *demo], prompt) == 'demo: done: water the plants\n'


def _output(argv: list[str], stdin: str, **more: str) -> str:
    done = subprocess.run(argv, env=environment(**more), input=stdin, cwd='/', capture_output=True, text=True,
                          timeout=PATIENCE, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- workers


class OldWorker:
    """A worker of 0.1.0 that still runs: replays its recorded Redis commands, with the texts of its scripts."""

    def __init__(self, place: Place, **named: str) -> None:
        record = recorded('conversation')
        self._commands, self._scripts = record['commands'], record['scripts']
        self._named = {'town': 'tt:{test}:', 'agent': AGENT, 'instance': INSTANCE, 'starter': ''} | named
        self._redis = place.root / '.tt' / 'redis.sock'

    def say(self, name: str, number: int = 0, **named: str) -> list[Any]:
        """Sends the command with this name and number. Returns the reply without its leading 1 (success)."""
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


def test_an_old_worker_registers_works_and_departs_in_a_new_town(place: Place, hall: Hall) -> None:
    worker = OldWorker(place, **FAR)
    assert worker.say('register')[0] == AGENT.encode()
    agent_id, _, record, state, instance, *_ = worker.say('agent')
    assert (agent_id, json.loads(record)['cli'], state, instance) == (
        AGENT.encode(),
        'demo',
        b'Starting',
        INSTANCE.encode(),
    )
    assert worker.say('hello') == [b'0'], 'no limit of rounds'
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
    assert len(worker.say('XREAD')) == 3, 'control, tasks, messages'
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
    ids = {'task': task, 'entry': entry.decode()}
    assert worker.say('beat', 2, **ids) == [b'Working', []], 'it has not lost its task'
    assert hall.get(f'/v1/tasks/{task}').json['state'] == 'running'
    assert worker.say('finish', **ids) == [b'done', b'completed']
    assert worker.say('finish', **ids) == [b'already', b'completed']
    assert worker.say('round_done', **ids) == [b'Idle', 1]
    assert hall.get(f'/v1/tasks/{task}').json['result'] == 'demo: done: say it'
    assert hall.get('/v1/agents/talker/inbox').json['total'] == 0
    assert hall.post('/v1/agents/talker/close').status == 200
    assert worker.say('pickup', 4)[:2] == [b'rest', b'Draining']
    assert worker.say('depart') == [[]], 'nothing is requeued'
    shown = hall.get('/v1/agents/talker').json
    assert (shown['state'], shown['rounds_completed'], shown['tasks_completed']) == ('Stopped', 1, 1)
    kinds = [event['type'] for event in hall.get('/v1/events?limit=500').json['events']]
    ours = ['agent.registered', 'agent.started', 'task.started', 'task.completed', 'agent.stopped']
    assert [kind for kind in kinds if kind in ours] == ours


def test_an_old_worker_learns_that_it_lost_its_task(place: Place, hall: Hall) -> None:
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
    """A town whose host has the name that the old processes use."""
    town = make_town(directory, host='here')
    yield town
    town.close()


def settings() -> dict[str, Any]:
    """The settings of a town, in the form in which processes of 0.1.0 pass them on."""
    values: dict[str, Any] = recorded('processes')['charter']['settings']
    return values | {'name': 'test', 'host': 'here', 'default_cli': 'demo'}


def order(place: Place) -> dict[str, Any]:
    """An order of 0.1.0 to the keeper (spawner): the process to start."""
    text = json.dumps(recorded('processes')['order']).replace('<agent>', AGENT).replace('<instance>', INSTANCE)
    filled_in: dict[str, Any] = json.loads(filled(text, place.root))
    return filled_in


def start(order: dict[str, Any], descriptors: list[int]) -> int:
    """Starts a process as 0.1.0 does, directly or in the keeper. Returns its pid."""
    with open(order['log'], 'ab') as log:
        process = subprocess.Popen(
            [str(descriptors[0]) if word == '{fd}' else word for word in order['argv']],
            cwd=order['cwd'],
            env=environment(**order['env']) | {'TINYTOWN_INSTANCE': order['mark']},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=descriptors,
        )
    threading.Thread(target=process.wait, daemon=True).start()
    return process.pid


def order_start(order: dict[str, Any], descriptors: list[int]) -> int:
    """Orders the keeper of a town to start a process, as 0.1.0 does. Returns its pid."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(f'{order["cwd"]}/.tt/run/keeper.sock')
        socket.send_fds(sock, [json.dumps(order).encode()], descriptors)
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
def test_an_old_townhall_that_still_runs_can_start_workers(here: Place, by_keeper: bool) -> None:
    with ExitStack() as stack:
        if by_keeper:
            keeper = Manager(here.root, unit('user', 'tinytown-recorded.service', here.root))
            stack.callback(keeper.kill)
            stack.callback(keeper.stop)
        hall = here.hall()
        OldWorker(here, host='here').say('register')
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = (order_start if by_keeper else start)(order(here), [theirs.fileno()])
            theirs.close()
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


def test_an_old_keeper_that_still_runs_gets_orders_in_its_format(here: Place) -> None:
    orders: list[dict[str, Any]] = []

    def keep() -> None:
        client, _ = listener.accept()
        with client:
            data, descriptors, _, _ = socket.recv_fds(client, 65536, 8)
            orders.append(json.loads(data + read_all(client)))
            client.sendall(json.dumps({'pid': start(orders[0], descriptors)}).encode())
            for descriptor in descriptors:
                os.close(descriptor)

    _ = here.town  # starts its Redis
    (here.root / '.tt' / 'run').mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.root / '.tt' / 'run' / 'keeper.sock'))
        listener.listen()
        thread = threading.Thread(target=keep)
        thread.start()
        here.tt('spawn', 'ordered')
        thread.join(PATIENCE)
    assert orders[0].keys() == recorded('processes')['order'].keys()
    assert here.tt_json('show', 'ordered')['state'] == 'Idle'


def test_an_old_keeper_that_ends_shuts_its_town_down(here: Place) -> None:
    here.tt('spawn', 'one')
    pid = here.tt_json('show', 'one')['pid']
    _output([sys.executable, '-P', '-m', 'tinytown.standstill', str(here.root)], json.dumps(settings()))
    assert not Path(f'/proc/{pid}/exe').exists()
    with pytest.raises(OSError, match=r'No such file|refused'):
        Talk(here.root / '.tt' / 'redis.sock')
    here.let_go()
    assert here.tt_json('show', 'one')['state'] == 'Stopped'


# ------------------------------------------------------------------------------------------------------------- units

KINDS = ('system', 'system-socket', 'user', 'user-socket')


def unit(kind: str, name: str, root: Path) -> str:
    """A recorded unit with the paths of this machine, and a matching signature."""
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
    """A stand-in for systemd: runs the program of a unit, and waits until it is ready.

    `sock` is a listening socket to pass on, `name` its FileDescriptorName.
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
        """Waits for a notification (sd_notify)."""
        while word not in self._ear.recv(4096).decode().splitlines():
            pass

    def reload(self) -> None:
        [command] = lines(self._text, 'ExecReload')
        subprocess.run(shlex.split(command.replace('$MAINPID', str(self.process.pid))), check=True)
        self._await('RELOADING=1')
        self._await('READY=1')

    def stop(self) -> int:
        """Terminates the main process, as with KillMode=mixed. Returns its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """Kills it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._ear.close()


@pytest.mark.parametrize('kind', KINDS)
def test_old_units_run_a_town_and_shut_it_down(directory: Path, kind: str) -> None:
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
        assert Path(f'/proc/{pid}/exe').exists(), 'a townhall ends without its town'
        assert keeper.stop() == 0
        assert not Path(f'/proc/{pid}/exe').exists()
        with pytest.raises(OSError, match=r'No such file|refused'):
            Talk(directory / '.tt' / 'redis.sock')


class Served(Hall):
    """A townhall that the test did not start itself."""

    def __init__(self, port: int) -> None:
        self.address, self.port = '127.0.0.1', port


_CTL = '#!/bin/sh\ncase "$*" in *is-active*) echo active;; *Linger*) echo yes;; esac\n'


@pytest.mark.parametrize('kind', ['user', 'user-socket'])
def test_old_units_are_recognized_replaced_and_removed(directory: Path, tmp_path: Path, kind: str) -> None:
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
        return _output(argv, '', HOME=str(tmp_path), PATH=f'{tmp_path}:/usr/bin:/bin')

    assert service('status').count('active, as written') == count
    before = {file.name for file in home.iterdir()}
    service('install', *(['--socket'] if kind.endswith('-socket') else []))
    assert {file.name for file in home.iterdir()} == before
    assert service('status').count('active, as written') == count
    for file in home.glob('*.service'):
        assert lines(file.read_text(), 'WorkingDirectory') == [str(root)]
    service('uninstall')
    assert not list(home.iterdir())
