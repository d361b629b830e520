"""Records the state that a version leaves behind:  python -m tests.recorded.record CHECKOUT  (with its own .venv).

It works from outside: with the commands `tt` and `townhall`, over HTTP, and by listening to the commands that Redis
gets. Run it with the oldest supported Redis (7.0), because every newer one reads its files. It writes a directory named
by the version:

    town.tar.gz        a town with at least one of everything, in the state after a power failure: its agents had
                       worked, and one had finished a task without reporting it. In text files, `@ROOT@`, `@PYTHON@` and
                       `@CODE@` stand for the town's directory, the interpreter, and the directory of the program
    known.json         the keys of that town, its agents and tasks by their names here, requests with idempotency keys
    answers.json       the answers of its townhall, by path
    settings.json      the output of `tt config`
    metrics.txt        the names of its metrics
    conversation.json  all Redis commands in the life of one worker, with the texts of the scripts. `<agent>`,
                       `<instance>`, `<task>`, `<entry>`, `<town>` and the parts of its process are placeholders
    processes.json     the input of started processes: an order to the keeper (spawner), a worker's charter
    units/             the files that `townhall service install` writes: system and user, with and without a socket

Some values in Redis are changed, so that the records contain nothing of the machine and do not expire: boot ids and
places of processes, the heartbeats of hosts, and the expiry of idempotency keys. The append-only file was rewritten
once, so it does not contain older commands.
"""

from __future__ import annotations

import array
import ast
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .resp import Talk

PATIENCE = 30.0
PLACE = '/srv/town'  # the recorded town's directory, in records that nothing looks up any more
BOOT = '5d1f1f9e-0b6c-4c57-9d1e-6c1b3f0a7e42@@4026531836'  # a made-up boot id
LONG_AGO = '1700000000000'  # ms since the epoch: in the past, whenever the town is opened
READS = (
    *('status', 'status?deep=1', 'town', 'hosts', 'agents', 'agents?open=1', 'tasks', 'tasks/pending', 'backlog'),
    *(f'tasks?state={state}' for state in ('pending', 'assigned', 'running', 'completed', 'failed', 'cancelled')),
    *('deadletter', 'events?limit=200', 'history?limit=50', 'agents/conductor/inbox'),
)
SLOW = 'echo "it takes long"\nexec sleep 3600\n'
TELLER = 'while [ ! -e told ]; do sleep 0.1; done\necho "it is told"\n'
DONE = 'echo "it is done after all"\n'
RELOADED = re.compile('taken up again|was reloaded')  # how a townhall logs that: 0.1.0, later versions


def until(condition: Callable[[], Any]) -> Any:
    """Calls a function until it returns a true value, and returns that."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, condition
        select.select([], [], [], 0.02)
    return result


class Recorder:
    """A town in a scratch directory, and the version that runs it."""

    def __init__(self, checkout: Path, scratch: Path, name: str = 'town') -> None:
        self.checkout = checkout
        self.python = str(checkout / '.venv' / 'bin' / 'python')
        self.scratch = scratch
        self.root = scratch / name
        self.key = ''
        self.url = ''
        self.env = {'PATH': '/usr/bin:/bin', 'HOME': str(scratch), 'LANG': 'C.UTF-8'}
        self.marks = {
            str(self.root): '@ROOT@',
            self.python: '@PYTHON@',
            str(checkout): '@CODE@',
            _boot(): BOOT,
        }

    def run(self, module: str, *words: str, cwd: Path | None = None, ok: bool = True) -> str:
        """Runs a program of that version. Returns its output."""
        done = subprocess.run(
            [self.python, '-m', f'tinytown.{module}', *words], cwd=cwd or self.root, env=self.env, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
        )  # fmt: skip
        assert not ok or done.returncode == 0, (words, done.stderr)
        return done.stdout

    def tt(self, *words: str, cwd: Path | None = None, ok: bool = True) -> Any:
        return json.loads(self.run('cli', *words, '--json', cwd=cwd, ok=ok) or 'null')

    def talk(self) -> Talk:
        return Talk(self.root / '.tt' / 'redis.sock')

    def http(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Sends a request that must succeed. Returns the answer."""
        status, answer = self.request(method, path, body, **headers)
        assert status < 300, (path, answer)
        return json.loads(answer)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE)
        named = {name.replace('_', '-'): value for name, value in headers.items()} | {'X-API-Key': self.key}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, named | ({'Content-Type': 'application/json'} if data else {}))
        response = connection.getresponse()
        answer = response.read().decode()
        connection.close()
        return response.status, answer

    def config(self, **settings: str) -> None:
        """Changes settings one by one, and waits until the running townhall has applied each."""
        log = self.root / '.tt' / 'townhall.log'
        for name, value in settings.items():
            before = len(RELOADED.findall(log.read_text())) if log.exists() else -1
            self.tt('config', name.replace('__', '.'), value)
            until(lambda before=before: before < 0 or len(RELOADED.findall(log.read_text())) > before)  # type: ignore[misc]

    def await_task(self, task: str, state: str) -> None:
        until(lambda: self.tt('task', 'show', task)['state'] == state)

    def await_agent(self, name: str, state: str) -> None:
        until(lambda: self.tt('show', name)['state'] == state)

    def assign(self, agent: str, task: str) -> str:
        return str(self.tt('assign', agent, task)['task_id'])

    def kill(self, agent: str) -> None:
        os.kill(self.tt('show', agent)['pid'], signal.SIGKILL)

    def anonymous(self, text: str) -> str:
        """The text with placeholders for everything that names this machine."""
        for value, mark in self.marks.items():
            text = text.replace(value, mark)
        return text


def _boot() -> str:
    """The machine's boot id. In records, the machine id and the pid namespace follow it."""
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()


# --------------------------------------------------------------------------------------------------------- the town


def make_town(it: Recorder) -> dict[str, Any]:
    """Makes the town, and works in it until a simulated power failure. Returns the content of known.json."""
    it.run(
        'cli', 'init', '--name', 'recorded', '--cli', 'demo', '--host', 'srv', '--town', str(it.root), cwd=it.scratch
    )
    clis = {
        'slow': 'sh slow',
        'teller': 'sh teller',
        'killer': "sh -c 'kill -9 $PPID'",
        'deaf': 'false',
        'gone': './gone',
    }
    it.config(
        retention__finished_tasks_days='36500', agent__max_attempts='2', agent__retry_backoff_secs='0',
        agent__restart='on-failure', townhall__rest_port='0', max_agents='20',
        **{f'agent_clis__{name}': command for name, command in clis.items()},
    )  # fmt: skip
    (it.root / 'slow').write_text(SLOW)
    (it.root / 'teller').write_text(TELLER)
    (it.root / 'gone').write_text('#!/bin/sh\n')
    (it.root / 'gone').chmod(0o755)
    it.key = it.tt('generate-api-key', '--write')['key']
    reader = it.tt('key', 'create', '--scopes', 'town.read', '--note', 'of a dashboard', '--write')['key']
    it.url = it.tt('start')['url']
    known: dict[str, Any] = {'keys': {'admin': it.key, 'reader': reader}, 'tasks': {}}
    it.key = reader
    assert it.request('POST', '/v1/backlog', {'description': 'it may not'})[0] == 403
    it.key = known['keys']['admin']
    _work(it, known['tasks'])
    known['requests'] = _requests(it)
    _delay(it, known['tasks'])
    _cut_power(it, known['tasks'])
    known['agents'] = {agent['name']: agent['id'] for agent in it.tt('list')['agents']}
    return known


def _work(it: Recorder, tasks: dict[str, str]) -> None:
    """Gives the town a past: tasks and agents in every state."""
    for name, cli, more in (
        ('idle', 'demo', {'role_id': 'worker', 'nickname': 'The Idle'}), ('busy', 'slow', {'role_id': 'builder'}),
        ('reporter', 'teller', {}), ('paused', 'demo', {}), ('stopped', 'demo', {}), ('broken', 'gone', {}),
        ('deaf', 'deaf', {}), ('poison', 'killer', {}),
    ):  # fmt: skip
        it.http('POST', '/v1/agents', {'name': name, 'cli': cli, **more})
    (it.root / 'gone').unlink()
    it.assign('broken', 'it can not be run')
    tasks['dead'] = it.assign('poison', 'it ends every worker')
    it.tt('send', 'deaf', 'nobody hears it', '--task')
    for name, agent, what, end in (
        ('completed', 'stopped', 'sort the shelves – „alle“', 'completed'),
        ('last', 'idle', 'water the plants', 'completed'), ('failed', 'stopped', 'fail at once', 'failed'),
        ('retried', 'stopped', 'fail, too', 'failed'),
    ):  # fmt: skip
        tasks[name] = it.assign(agent, what)
        it.await_task(tasks[name], end)
    it.tt('task', 'retry', tasks['retried'])
    it.tt('interrupt', 'paused')
    tasks['assigned'] = it.assign('paused', 'paint the door')
    tasks['cancelled'] = it.assign('paused', 'nobody wants it')
    it.tt('task', 'cancel', tasks['cancelled'])
    for words in (('--query', '--urgent'), ('--task', '--from', 'idle'), ('--info',), ('--ack', '--from', 'idle')):
        it.tt('send', 'paused', f'a message {" ".join(words)}', *words)
    it.tt('send', 'conductor', 'what is to be done?', '--query', '--from', 'idle')
    tasks['tagged'] = it.tt('backlog', 'add', 'sweep the yard', '--tags', 'outside', '--tags', 'dry')['task_id']
    tasks['claimed'] = it.tt('backlog', 'add', 'mend the gate')['task_id']
    it.tt('backlog', 'claim', tasks['claimed'], 'paused')
    it.await_task(tasks['dead'], 'failed')
    until(lambda: it.tt('deadletter', 'list')['count'] == 2)
    it.await_agent('broken', 'Error')
    it.tt('kill', 'poison')
    it.tt('close', 'deaf')
    it.await_agent('deaf', 'Stopped')
    it.tt('interrupt', 'stopped')
    tasks['left'] = it.assign('stopped', 'left in the inbox of one who stopped')
    it.tt('send', 'stopped', 'left, too', '--urgent')
    it.tt('close', 'stopped')
    it.await_agent('stopped', 'Stopped')


def _requests(it: Recorder) -> list[dict[str, Any]]:
    """Sends requests with idempotency keys. Returns them with their answers."""
    requests: list[dict[str, Any]] = []
    for path, body in (
        ('/v1/backlog', {'description': 'asked for once', 'tags': ['once']}),
        ('/v1/messages/send', {'to': 'conductor', 'message': 'said once', 'kind': 'info'}),
        ('/v1/tasks/assign', {'agent': 'paused', 'task': 'given once'}),
    ):
        key = f'once-{len(requests)}'
        status, answer = it.request('POST', path, body, Idempotency_Key=key)
        requests.append({'path': path, 'body': body, 'key': key, 'status': status, 'answer': json.loads(answer)})
    return requests


def _delay(it: Recorder, tasks: dict[str, str]) -> None:
    """Leaves a task in the pause between two attempts, and a crashed agent that waits for its restart."""
    it.config(agent__retry_backoff_secs='86400')
    it.http('POST', '/v1/agents', {'name': 'waits', 'cli': 'slow'})
    tasks['delayed'] = it.assign('waits', 'it waits a day')
    it.await_task(tasks['delayed'], 'running')
    it.kill('waits')
    it.await_agent('waits', 'Error')


def _cut_power(it: Recorder, tasks: dict[str, str]) -> None:
    """Kills all processes at once, in the middle of a task and of a report."""
    tasks['running'] = it.assign('busy', 'it takes long')
    it.await_task(tasks['running'], 'running')
    attic = it.scratch / 'attic'
    redis = f'unix://{it.root}/.tt/redis.sock'
    it.tt('init', '--name', 'recorded', '--redis-url', redis, '--host', 'attic', '--join', '--town', str(attic),
          '--cli', 'demo', cwd=it.scratch)  # fmt: skip
    it.tt('config', 'townhall.rest_port', '0', cwd=attic)
    it.tt('start', cwd=attic)
    it.tt('spawn', 'far', '--host', 'attic')
    for place in (attic, it.root):
        for note in (place / '.tt' / 'run').glob('townhall-*.json'):
            os.kill(json.loads(note.read_text())['pid'], signal.SIGKILL)
    file = it.root / 'tinytown.toml'  # not with `tt config`, which would delete the run files of the killed townhalls
    file.write_text(file.read_text().replace('= [86400]', '= [0]'))
    tasks['reported'] = it.assign('reporter', 'tell of it')
    it.await_task(tasks['reported'], 'running')
    with it.talk() as talk:
        talk.ask('CLIENT', 'PAUSE', 60000, 'WRITE')  # so that Redis does not get the report
        (it.root / 'told').touch()
        until(lambda: list((it.root / '.tt' / 'agents').glob('*.spool/*.json')))
        _end_all(it.scratch, but=b'redis-server')
        until(lambda: len(talk.ask('CLIENT', 'LIST').splitlines()) == 1)
        talk.ask('CLIENT', 'UNPAUSE')
    (it.root / 'slow').write_text(DONE)


def _end_all(directory: Path, but: bytes = b'') -> None:
    """Kills all processes that work below a directory, except those with `but` in their command line."""
    for each in Path('/proc').glob('[0-9]*'):
        try:
            is_ours = (each / 'cwd').readlink().is_relative_to(directory)
            if is_ours and not (but and but in (each / 'cmdline').read_bytes()):
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:
            continue


def settle(it: Recorder) -> None:
    """Replaces values of this machine in Redis, rewrites its append-only file, and adds a few commands to it."""
    with it.talk() as talk:
        prefix = 'tt:{recorded}:'
        for key in talk.ask('KEYS', f'{prefix}agent:*'):
            if talk.ask('TYPE', key) == b'hash':
                for field in ('boot', 'starter'):
                    value = (talk.ask('HGET', key, field) or b'').decode()
                    talk.ask('HSET', key, field, re.sub(rf'{_boot()}@\S*', BOOT, value))
        for key in talk.ask('KEYS', f'{prefix}host:*'):
            for token, value in _pairs(talk.ask('HGETALL', key)) if talk.ask('TYPE', key) == b'hash' else ():
                hall = json.loads(value) | {
                    'heard': LONG_AGO,
                    'place': f'{BOOT.split("@")[0]} pid:[4026531836] {PLACE}',
                }
                talk.ask('HSET', key, token, json.dumps(hall))
        for host in talk.ask('ZRANGE', f'{prefix}hosts', 0, -1):
            talk.ask('ZADD', f'{prefix}hosts', LONG_AGO, host)
        for key in talk.ask('KEYS', f'{prefix}idem:*'):
            talk.ask('PERSIST', key)
        talk.ask('BGREWRITEAOF')
        until(lambda: b'aof_rewrite_in_progress:0' in talk.ask('INFO', 'persistence'))
        until(lambda: b'aof_rewrite_scheduled:0' in talk.ask('INFO', 'persistence'))
    it.tt('backlog', 'add', 'added after the file was rewritten', '--tags', 'late')
    it.tt('send', 'conductor', 'said after the file was rewritten', '--info')


def _pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def ask(it: Recorder, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The answers of a read-only townhall, and the names of its metrics."""
    argv = [it.python, '-m', 'tinytown.townhall', '--read-only', '--port', '0']
    with subprocess.Popen(argv, cwd=it.root, env=it.env, stderr=subprocess.PIPE, text=True) as hall:
        assert hall.stderr
        lines = iter(hall.stderr.readline, '')
        it.url = next(found[0] for line in lines if (found := re.search(r'http://[\d.:]+', line)))
        reads = [f'agents/{name}{part}' for name in known['agents'] for part in ('', '/inbox', '/result')]
        reads += [f'tasks/{task}{part}' for task in known['tasks'].values() for part in ('', '/history')]
        answers = {f'/v1/{path}': it.http('GET', f'/v1/{path}') for path in (*READS, *reads)}
        metrics = re.findall(r'^# TYPE (\S+ \S+)', it.request('GET', '/metrics')[1], re.M)
        hall.terminate()
    return answers, metrics


def pack(it: Recorder, file: Path) -> None:
    """Packs the town into a tar file, without anything that names this machine."""
    with it.talk() as talk:
        pid = int(re.search(rb'process_id:(\d+)', talk.ask('INFO', 'server'))[1])  # type: ignore[index]
        os.kill(pid, signal.SIGKILL)
    unwanted = [*it.marks, str(it.scratch), _boot()]
    with gzip.GzipFile(file, 'wb', mtime=0) as packed, tarfile.open(fileobj=packed, mode='w') as tar:
        for path in sorted(it.root.rglob('*')):
            if path.is_socket() or path.suffix == '.lock':
                continue
            info = tar.gettarinfo(path, str(path.relative_to(it.root)))
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, '', ''
            data = path.read_bytes() if path.is_file() else b''
            if 'redis' not in path.parent.name and 'appendonly' not in path.parent.name:
                data = re.sub(rf'{_boot()}@[^\s"]*'.encode(), BOOT.encode(), data)
                data = it.anonymous(data.decode()).encode()
            for each in unwanted:
                assert each.encode() not in data, (path, each)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------- conversations


def converse(town: Recorder) -> dict[str, Any]:
    """The Redis commands in the life of a worker: it is registered, works on a task and a message, and is closed."""
    town.run('cli', 'init', '--name', 'talk', '--cli', 'demo', '--town', str(town.root), cwd=town.scratch)
    town.tt('status')
    with town.talk() as listener, town.talk() as asks:
        asks.ask('SCRIPT', 'FLUSH')  # so that every script is sent once with its text
        listener.ask('MONITOR')
        agent = town.tt('spawn', 'talker')['agent_id']
        town.tt('interrupt', 'talker')
        town.tt('send', 'talker', 'what is the time?', '--query')
        task = town.assign('talker', 'say it')
        town.tt('resume', 'talker')
        town.await_task(task, 'completed')
        until(lambda: town.tt('show', 'talker')['rounds_completed'] == 1)
        town.tt('close', 'talker')
        town.await_agent('talker', 'Stopped')
        asks.ask('ECHO', 'that is all')
        commands = _monitored(listener)
    names = json.loads(
        subprocess.run([town.python, '-c', _NAMES], env=town.env, capture_output=True, check=True, cwd='/').stdout
    )
    return _conversation(commands, names, agent, task)


_NAMES = 'import json; from tinytown.store import scripts; ' \
         'print(json.dumps({s.digest.decode(): n for n, s in scripts().items()}))'  # fmt: skip


def _monitored(listener: Talk) -> list[list[bytes]]:
    """The commands that MONITOR reports, without those that scripts call."""
    commands = []
    while True:
        line: bytes = listener.next()
        head, _, rest = line.partition(b'] ')
        if head.endswith(b' lua'):
            continue
        commands.append(
            [ast.literal_eval(f'b{word}') for word in re.findall(r'"(?:[^"\\]|\\.)*"', rest.decode('latin-1'))]
        )
        if commands[-1][:1] == [b'ECHO']:
            return commands[:-1]


def _conversation(heard: list[list[bytes]], names: dict[str, str], agent: str, task: str) -> dict[str, Any]:
    """The commands of the worker and its registration, with placeholders for ids, and the texts of their scripts."""
    texts = {hashlib.sha1(parts[1]).hexdigest(): parts[1].decode() for parts in heard if parts[0] == b'EVAL'}  # noqa: S324
    named = [_named([word.decode() for word in parts], names) for parts in heard]
    named = [(name, words) for name, words in named if name in _WORKERS and _is_of(agent, task, words)]
    hello = next(words for name, words in named if name == 'hello')
    starter = next(words for name, words in named if name == 'register')[12]
    marks = {agent: '<agent>', hello[6]: '<instance>', task: '<task>', 'tt:{talk}:': '<town>'}
    process = dict(zip(hello[7:], ('<host>', '<boot>', '<pid>', '<start>'), strict=True)) | {starter: '<starter>'}
    commands: list[dict[str, Any]] = []
    for name, words in named:
        marked = [process.get(word, word) for word in words] if name in ('hello', 'register') else words
        marked = [re.sub(r'^[1-9]\d{12,}-\d+$', '<entry>', word) for word in marked]
        for value, mark in marks.items():
            marked = [word.replace(value, mark) for word in marked]
        if {'name': name, 'words': marked} not in commands[-2:]:  # not a poll, or the text sent after the digest
            commands.append({'name': name, 'words': marked})
    used = {each['name'] for each in commands}
    return {'commands': commands, 'scripts': {names[each]: texts[each] for each in texts if names.get(each) in used}}


def _named(words: list[str], names: dict[str, str]) -> tuple[str, list[str]]:
    """The name of a command or script, and its words; for a script, from its key on."""
    if words[0] not in ('EVAL', 'EVALSHA'):
        return words[0], words
    digest = hashlib.sha1(words[1].encode()).hexdigest() if words[0] == 'EVAL' else words[1]  # noqa: S324
    return names.get(digest, ''), words[3:]


def _is_of(agent: str, task: str, words: list[str]) -> bool:
    """Whether a command concerns an agent's inbox or record, or its task."""
    return any(word == agent or f'{agent}:' in word for word in words) or task in words


_WORKERS = ('register', 'agent', 'hello', 'pickup', 'beat', 'finish', 'round_done', 'depart', 'XREAD')


def started_processes(it: Recorder) -> dict[str, Any]:
    """The order that the keeper gets, and the charter that the new worker gets over the passed descriptor."""
    run = it.root / '.tt' / 'run'
    run.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / 'keeper.sock'))
        listener.listen()
        argv = [it.python, '-m', 'tinytown.cli', 'spawn', 'ordered']
        with subprocess.Popen(argv, cwd=it.root, env=it.env, stderr=subprocess.DEVNULL) as asks:
            client, _ = listener.accept()
            data, ancillary, _, _ = client.recvmsg(65536, socket.CMSG_SPACE(4))
            [worker] = array.array('i', ancillary[0][2])
            order = json.loads(data + _read_all(client))
            client.sendall(json.dumps({'pid': os.getpid()}).encode())
            client.close()
            with socket.socket(fileno=worker) as passed:
                charter = json.loads(_read_all(passed))
                passed.sendall(b'it is only recorded')
            asks.wait()
    (run / 'keeper.sock').unlink()
    order['env'] = {name: value for name, value in order['env'].items() if name.startswith(('TINYTOWN', 'PYTHON'))}
    marks = {charter['agent_id']: '<agent>', charter['instance']: '<instance>'}
    text = it.anonymous(json.dumps({'order': order, 'charter': charter}))
    for value, mark in marks.items():
        text = text.replace(value, mark)
    inputs: dict[str, Any] = json.loads(text)
    return inputs


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


def units(it: Recorder, to: Path) -> None:
    for name, words in (('system', ()), ('user', ('--user',)), ('system-socket', ('--socket',)),
                        ('user-socket', ('--user', '--socket'))):  # fmt: skip
        it.tt('config', 'townhall.rest_port', '8787')
        it.run('townhall', 'service', 'install', '--to', str(to / name), '--path', '/usr/bin:/bin', *words)
        for file in (to / name).iterdir():
            file.write_text(it.anonymous(file.read_text()))


def record(it: Recorder) -> None:
    """Records everything of one version."""
    it.root.mkdir()
    to = it.scratch / it.run('cli', '--version').split()[-1]
    to.mkdir()
    known = make_town(it)
    settle(it)
    answers, metrics = ask(it, known)
    records = {'known': known, 'answers': answers, 'settings': it.tt('config')}
    pack(it, to / 'town.tar.gz')
    units(it, to / 'units')
    talk = Recorder(it.checkout, it.scratch, 'talk')
    records |= {'conversation': converse(talk), 'processes': started_processes(talk)}
    for name, record in records.items():
        parts = [f'{json.dumps(part)}: {json.dumps(value, ensure_ascii=False)}' for part, value in record.items()]
        text = it.anonymous(talk.anonymous('{\n' + ',\n'.join(parts) + '\n}\n'))
        assert str(it.scratch) not in text, name
        (to / f'{name}.json').write_text(text)
    (to / 'metrics.txt').write_text('\n'.join(metrics) + '\n')
    shutil.rmtree(Path(__file__).with_name(to.name), ignore_errors=True)
    shutil.move(to, Path(__file__).parent)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix='rec-', dir='/tmp') as scratch:
        try:
            record(Recorder(Path(sys.argv[1]).resolve(), Path(scratch)))
        finally:
            _end_all(Path(scratch))


if __name__ == '__main__':
    main()
