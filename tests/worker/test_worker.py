"""Workers: real worker processes, the outcomes of their tasks, and what remains when they end."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tinytown.errors import TownError
from tinytown.host import report_spool
from tinytown.host.processes import GRACE_SECS, identify, start_time, verdict
from tinytown.model import CONDUCTOR_ID, new_id

from ..support import PATIENCE, Hall, Place, environment, make_town, redis_pid, shell_cli, start_redis, until

CLIS = {
    'runs': shell_cli('sed -n "s/^RUN //p" >script.$$; exec sh script.$$ </dev/null'),  # a task's text is a script
    'cat': 'cat',
    'file': "sh -c 'cat $0; echo $$ >up; read word <down' {prompt_file}",
    'stdin': shell_cli('cat; echo $$ >up; read word <down'),
    'literal': "printf %s '$(touch pwned); `touch pwned`' '*'",
    'own': './own-cli --flag',
}
GATE = 'echo $$ >up; read word <down; echo "$word"'  # a script that writes its pid to `Gate` and waits for its `go`
LEASE = 6
BEAT = LEASE / 3  # seconds between two heartbeats


class Gate:
    """Named pipes between a CLI and a test.

    The CLI writes its pid to `up` and waits for a line on `down`. A CLI that reads `never` waits for ever.
    """

    def __init__(self, root: Path) -> None:
        for name in ('up', 'down', 'never'):
            os.mkfifo(root / name)
        self._up, self._down = (os.open(root / name, os.O_RDWR) for name in ('up', 'down'))
        self._received = b''

    def pid(self) -> int:
        """Waits for the next pid that a CLI writes."""
        while b'\n' not in self._received:
            assert select.select([self._up], [], [], PATIENCE)[0], 'the CLI wrote no pid'
            self._received += os.read(self._up, 4096)
        line, _, self._received = self._received.partition(b'\n')
        return int(line)

    def go(self, word: str = 'done') -> None:
        os.write(self._down, word.encode() + b'\n')

    def close(self) -> None:
        os.close(self._up)
        os.close(self._down)


@pytest.fixture(scope='module')
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for all tests of this module; tests use it through `place`."""
    made = make_town(
        tmp_path_factory.mktemp('w'),
        max_agents=4,
        agent={'lease_secs': LEASE, 'pass_env': ['PYTHONHOME'], 'role_scopes': {'lead': ['agent.manage']}},
        retention={'log_bytes': 65536},
        agent_clis=CLIS,
    )
    yield made
    made.close()


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    """The town. After the test its agents, tasks, events, logs and files are deleted."""
    assert shared.town
    yield shared
    for hall in shared.halls:
        hall.kill()
    shared.halls.clear()
    shared.do('town.reset', force=True)
    logs = shared.root / '.tt' / 'logs'
    for file in (*shared.root.iterdir(), *logs.iterdir()):
        if file.name not in ('.tt', 'tinytown.toml'):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.fixture
def gate(place: Place) -> Iterator[Gate]:
    made = Gate(place.root)
    yield made
    made.close()


def spawn(place: Place, name: str = 'w', cli: str = 'runs', **more: Any) -> int:
    """Spawns an agent. Returns the pid of its worker."""
    place.do('agent.spawn', name=name, cli=cli, **more)
    return worker_pid(place, name)


def worker_pid(place: Place, name: str = 'w') -> int:
    pid: int = place.do('agent.get', agent=name)['pid']
    return pid


def give(place: Place, script: str, name: str = 'w') -> str:
    task_id: str = place.do('task.assign', agent=name, task=f'RUN {script}')['task_id']
    return task_id


def task(place: Place, task_id: str) -> dict[str, Any]:
    found: dict[str, Any] = place.do('task.get', task_id=task_id)
    return found


def agent(place: Place, name: str = 'w') -> dict[str, Any]:
    found: dict[str, Any] = place.do('agent.get', agent=name)
    return found


def await_exit(pid: int) -> None:
    """Waits until a process has ended, or is a zombie."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE)[0], f'process {pid} still runs'
    finally:
        os.close(descriptor)


def is_gone(pid: int) -> bool:
    return start_time(pid) == ''


def when(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event['at']).timestamp()


def await_rest(place: Place) -> None:
    """Waits until the town's only worker blocks on its inbox."""
    until(lambda: b'\nblocked_clients:1\r' in place.store.call(place.store.info('clients')))


def await_idle(place: Place, name: str = 'w') -> None:
    """Waits until an agent's round is over: its worker then logs nothing until it takes new work."""
    until(lambda: agent(place, name)['state'] == 'Idle')


def command_lines() -> Iterator[bytes]:
    """The command line of each process."""
    for directory in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):
            yield (directory / 'cmdline').read_bytes()


# ----------------------------------------------------------------------------------------------------------- rounds


def test_spawn_answers_once_the_worker_runs(hall: Hall, place: Place) -> None:
    spawned = hall.post('/v1/agents', {'name': 'w', 'cli': 'cat', 'role_id': 'worker', 'nickname': 'Wanda'})
    found = hall.get('/v1/agents/w').json
    assert spawned.status == 201
    assert spawned.json == {
        'agent_id': found['id'],
        'name': 'w',
        'cli': 'cat',
        'role_id': 'worker',
        'nickname': 'Wanda',
        'parent_agent_id': None,
    }
    assert found['state'] == 'Idle'
    assert verdict(identify(found['pid'])) == 'alive'
    assert place.log('w').count('is up') == 1


def test_a_task_is_taken_at_once_by_a_worker_that_does_not_poll(place: Place) -> None:
    def calls() -> int:
        stats = place.store.call(place.store.info('commandstats')).decode()
        return sum(map(int, re.findall(r'cmdstat_(?:evalsha|xread|eval):calls=(\d+)', stats)))

    spawn(place)
    await_rest(place)
    began, before = time.monotonic(), calls()
    assert place.store.call(place.store.next_event(place.history()[-1]['id'], 3000)) is None  # three idle seconds
    made, beats = calls() - before, (time.monotonic() - began) // BEAT + 1
    assert made <= 3 * beats + 2, 'three commands for each heartbeat, and two of this test'
    waited = []
    for _ in range(4):  # the machine may be busy during some of them
        await_rest(place)
        task_id = give(place, 'echo quick')
        assert place.await_end(task_id)['result'] == 'quick'
        given, taken = (place.await_event(f'task.{step}', task_id=task_id) for step in ('assigned', 'started'))
        waited.append(when(taken) - when(given))
    assert min(waited) < 0.5


@pytest.mark.parametrize('cli', ['stdin', 'file'])
def test_a_cli_reads_its_prompt_and_no_command_line_shows_it(place: Place, gate: Gate, cli: str) -> None:
    spawn(place, cli=cli)
    task_id = give(place, 'the secret of the-blue-door')
    gate.pid()
    shown = list(command_lines())
    gate.go()
    assert not [argv for argv in shown if b'the-blue-door' in argv]
    assert 'the secret of the-blue-door' in place.await_end(task_id)['result']


def test_a_cli_gets_its_own_variables_and_none_of_townhalls_secrets(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('DATABASE_PASSWORD', 'hunter2-hunter2')
    monkeypatch.setenv('TINYTOWN_REDIS_URL', '')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-for-the-cli')
    worker = spawn(place)
    task_id = give(place, GATE)
    cli = gate.pid()
    seen = [Path(f'/proc/{pid}/environ').read_bytes() for pid in (worker, cli)]
    gate.go()
    assert not [environ for environ in seen if b'hunter2' in environ or b'TINYTOWN_REDIS' in environ]
    env = dict(entry.decode().split('=', 1) for entry in seen[1].split(b'\0') if entry)
    assert env['OPENAI_API_KEY'] == 'sk-for-the-cli'
    assert env['PATH'].split(':')[0] == str(place.root / '.tt' / 'bin')
    assert env.pop('TINYTOWN_INSTANCE')
    assert {name: value for name, value in env.items() if name.startswith('TINYTOWN_')} == {
        'TINYTOWN_TOWN': str(place.root),
        'TINYTOWN_AGENT_ID': agent(place)['id'],
        'TINYTOWN_AGENT_NAME': 'w',
        'TINYTOWN_TASK_ID': task_id,
        'TINYTOWN_ATTEMPT': '1',
    }


def test_no_shell_interprets_a_task_or_a_command_line(place: Place) -> None:
    text = '$(touch pwned); `touch pwned` && touch pwned > pwned | "touch" \'pwned\' \\ * ~ \t{prompt_file}'
    spawn(place, 'a', 'cat')
    spawn(place, 'b', 'literal')
    first = place.do('task.assign', agent='a', task=text)['task_id']
    second = place.do('task.assign', agent='b', task=text)['task_id']
    assert text in place.await_end(first)['result']
    assert place.await_end(second)['result'] == '$(touch pwned); `touch pwned`*'
    assert not (place.root / 'pwned').exists()


def test_the_exit_status_and_output_of_a_run_decide_the_outcome_of_its_task(place: Place) -> None:
    cases = {
        'yes é | tr -d "\\n" | head -c 200000; echo; echo end': (
            'completed',
            f'{"é" * 16384}\n[… 134469 bytes are left out here …]\n{"é" * 16381}\nend',
            None,
        ),
        'echo out; echo err >&2': ('completed', 'out', None),
        'echo out; echo bad >&2; exit 3': ('failed', None, 'exit status 3: bad'),
        'echo only; exit 4': ('failed', None, 'exit status 4: only'),
        'true': ('completed', '', None),  # three failures in a row would pause the agent
        'tt task complete --result mine; exit 3': ('completed', 'mine', None),
        'echo again': ('completed', 'again', None),
        'exit 5': ('failed', None, 'exit status 5'),
        'printf "\\033[1mbold\\033[0m 1%%\\r100%%"': ('completed', '100%', None),
        'tt task fail --error stuck': ('failed', None, 'stuck'),
    }
    spawn(place)
    given = {script: give(place, script) for script in cases}
    ended = {script: place.await_end(task_id) for script, task_id in given.items()}
    assert {s: (t['state'], t['result'], t['error']) for s, t in ended.items()} == cases
    assert all('echo out' not in line for line in place.log('w').splitlines() if 'tinytown:' in line)
    assert 'bad\n' in place.log('w')
    assert agent(place)['tasks_completed'] == 6


def test_workers_do_not_import_python_files_from_the_towns_directory(place: Place) -> None:
    for name in ('json.py', 'redis.py', 'tinytown/__init__.py', 'select.py'):
        (place.root / name).parent.mkdir(exist_ok=True)
        (place.root / name).write_text('raise SystemExit("a file of the town was imported")')
    spawn(place)
    assert place.await_end(give(place, 'tt task complete --result fine'))['result'] == 'fine'


def test_a_full_log_is_rotated(place: Place) -> None:
    spawn(place)
    logs = place.root / '.tt' / 'logs'

    def both_logs() -> str:
        await_idle(place)
        return (logs / 'w.log.1').read_text() + place.log('w')  # the last line may have caused a rotation

    place.await_end(give(place, 'yes line | head -c 300000; echo the last'))
    assert 'the last' in both_logs()
    assert 0 < (logs / 'w.log').stat().st_size <= 65536
    assert 0 < (logs / 'w.log.1').stat().st_size <= 65536
    (logs / 'w.log').unlink()  # a person may do that; the work must go on
    assert place.await_end(give(place, 'yes line | head -c 300000; echo more'))['state'] == 'completed'
    assert 'more' in both_logs()


# --------------------------------------------------------------------------------------------------------- steering


def test_interrupt_resume_and_close_take_effect_between_rounds(place: Place, gate: Gate) -> None:
    spawn(place)
    first, second, third = (give(place, GATE) for _ in range(3))
    gate.pid()
    assert place.do('agent.interrupt', agent='w') == {'status': 'paused', 'agent': 'w'}
    gate.go()
    assert place.await_end(first)['state'] == 'completed'
    assert place.do('agent.resume', agent='w')['status'] == 'idle'
    gate.pid()
    assert place.do('agent.close', agent='w')['status'] == 'draining'
    gate.go()
    assert place.await_end(second)['state'] == 'completed'
    stopped = place.await_event('agent.stopped')
    ended = place.await_event('task.completed', task_id=second)
    assert when(stopped) - when(ended) < BEAT, 'it does not wait for a heartbeat'
    resumed = next(e['id'] for e in place.history() if e['type'] in ('agent.idle', 'agent.working'))
    assert place.await_event('task.started', task_id=second)['id'] > resumed
    assert task(place, third)['state'] == 'assigned'


def test_closing_an_idle_agent_stops_it_at_once_and_wait_returns(place: Place) -> None:
    pid = spawn(place)
    assert place.do('agent.wait', agent='w', timeout=0) == {'agent': 'w', 'state': 'Idle', 'done': False}

    def wait() -> Any:
        try:
            return place.do('agent.wait', agent='w', timeout=20)
        finally:
            place.store.close()

    await_rest(place)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait)
        place.do('agent.close', agent='w')
        assert waiting.result() == {'agent': 'w', 'state': 'Stopped', 'done': True}
    await_exit(pid)
    assert when(place.await_event('agent.stopped')) - when(place.await_event('agent.draining')) < 0.75 * BEAT


def test_max_rounds_stops_a_worker_and_leaves_the_rest_queued(place: Place, gate: Gate) -> None:
    spawn(place, max_rounds=2)
    tasks = [give(place, script) for script in (GATE, 'true', 'true')]
    gate.pid()
    gate.go()
    place.await_event('agent.stopped')
    assert [task(place, each)['state'] for each in tasks] == ['completed', 'completed', 'assigned']


def test_a_query_starts_a_round_and_information_waits_for_one(place: Place, gate: Gate) -> None:
    spawn(place, cli='stdin')
    place.do('message.send', to='w', message='the sky is blue', kind='info')
    place.do('message.send', to='w', message='all is well', kind='ack')
    place.do('message.send', to='w', message='what colour is the sky?', kind='query')
    gate.pid()
    assert place.do('agent.inbox', agent='w')['total'] == 3, 'messages are acknowledged at the end of the round'
    place.do('agent.close', agent='w')
    gate.go()
    place.await_event('agent.stopped')
    assert place.do('agent.inbox', agent='w')['total'] == 0
    assert agent(place)['rounds_completed'] == 1
    log = place.log('w')
    assert 'a question from' in log
    assert 'the sky is blue' in log
    assert '1 received.' in log


# ----------------------------------------------------------------------------------------------------------- ending

# Three children that write their pids to `up` and ignore SIGTERM: one in a session of its own, one that also has an
# empty environment (so no mark), and a plain one.
STUBBORN = (
    "trap '' TERM; "
    "setsid sh -c 'echo $$ >up; while :; do read word <never; done' & "
    "env -i PATH=$PATH setsid sh -c 'echo $$ >up; while :; do read word <never; done' & "
    "sh -c 'echo $$ >up; while :; do read word <never; done' & "
)


@pytest.mark.parametrize('force', [False, True])
def test_kill_leaves_no_process_and_returns_the_task(place: Place, gate: Gate, force: bool) -> None:
    worker = spawn(place)
    task_id = give(place, STUBBORN + 'echo $$ >up; while :; do wait; done')
    pids = [gate.pid() for _ in range(4)]
    began = time.monotonic()
    assert place.do('agent.kill', agent='w', force=force) == {'status': 'stopped', 'agent': 'w'}
    assert [pid for pid in (worker, *pids) if not is_gone(pid)] == []
    assert (time.monotonic() - began < GRACE_SECS) is force, 'only without force is there a grace period'
    found = task(place, task_id)
    assert (found['state'], found['attempt'], found['agent_id']) == ('pending', 1, None)
    assert (agent(place)['state'], agent(place)['pid']) == ('Stopped', None)


def test_kill_and_restart_of_an_idle_agent_never_race_with_its_own_end(place: Place) -> None:
    spawn(place)
    for _ in range(6):
        assert place.do('agent.kill', agent='w')['status'] == 'stopped'
        assert place.do('agent.restart', agent='w')['status'] == 'restarted'


def test_processes_that_a_run_leaves_behind_are_ended(place: Place, gate: Gate) -> None:
    spawn(place)
    task_id = give(place, STUBBORN.replace("trap '' TERM; ", '') + 'read word <down')
    pids = [gate.pid() for _ in range(3)]
    gate.go()
    assert place.await_end(task_id)['state'] == 'completed'
    for pid in pids:
        await_exit(pid)


def test_endless_output_of_a_process_left_behind_does_not_delay_the_end_of_a_run(place: Place, gate: Gate) -> None:
    spawn(place)
    task_id = give(place, 'setsid yes & echo $! >up; exit 0')
    pid = gate.pid()
    assert place.await_end(task_id)['state'] == 'completed'
    await_exit(pid)


def test_an_agent_that_another_agent_spawned_survives_the_death_of_that_agent(place: Place) -> None:
    parent = spawn(place, role_id='lead')
    task_id = give(place, 'tt spawn child --cli cat --parent w')
    assert place.await_end(task_id)['state'] == 'completed', place.log('w')
    place.await_end(give(place, 'true'))  # one more round, which cleans up after the first
    child = worker_pid(place, 'child')
    assert verdict(identify(child)) == 'alive'
    place.do('agent.kill', agent='w', force=True)
    assert is_gone(parent)
    assert verdict(identify(child)) == 'alive'


def test_cancelling_a_task_ends_its_run_within_a_heartbeat(place: Place, gate: Gate) -> None:
    spawn(place)
    task_id = give(place, 'echo $$ >up; exec yes')  # its output never ends
    pid = gate.pid()
    assert place.do('task.cancel', task_id=task_id)['state'] == 'cancelled'
    await_exit(pid)
    assert place.await_end(give(place, 'echo next'))['result'] == 'next'
    assert task(place, task_id)['state'] == 'cancelled'


def test_restart_keeps_the_tasks_of_an_agent(place: Place, gate: Gate) -> None:
    worker = spawn(place)
    first, second = give(place, GATE), give(place, GATE)
    cli = gate.pid()
    assert place.do('agent.restart', agent='w') == {'status': 'restarted', 'agent': 'w'}
    assert is_gone(worker)
    assert is_gone(cli)
    for task_id, attempt in ((first, 2), (second, 1)):
        gate.pid()
        gate.go()
        assert place.await_end(task_id)['attempt'] == attempt
    assert agent(place)['restarts'] == 1


def test_a_worker_that_gets_sigterm_gives_its_task_back(place: Place, gate: Gate) -> None:
    worker = spawn(place)
    task_id = give(place, GATE)
    cli = gate.pid()
    os.kill(worker, signal.SIGTERM)
    place.await_event('agent.stopped')
    assert is_gone(cli)
    assert (task(place, task_id)['state'], task(place, task_id)['attempt']) == ('pending', 1)
    await_exit(worker)


def test_recover_frees_the_tasks_of_a_dead_worker_and_ends_its_processes(place: Place, gate: Gate) -> None:
    spawn(place, 'healthy', 'cat')
    worker = spawn(place)
    running, waiting = give(place, GATE), give(place, GATE)
    cli = gate.pid()
    os.kill(worker, signal.SIGKILL)
    await_exit(worker)
    assert place.do('recovery.recover_agents') == {'checked': 2, 'recovered': 1, 'agents': ['w']}
    assert is_gone(cli)
    assert [task(place, each)['state'] for each in (running, waiting)] == ['pending', 'assigned']
    assert place.do('recovery.recover_agents')['recovered'] == 0
    assert agent(place)['state'] == 'Error'
    assert agent(place, 'healthy')['state'] == 'Idle'


def test_a_cli_that_was_removed_puts_the_agent_in_error_and_its_task_stays_queued(place: Place) -> None:
    own = place.root / 'own-cli'
    own.write_text('#!/bin/sh\necho own "$@"\n')
    own.chmod(0o755)
    spawn(place, cli='own')
    assert place.await_end(give(place, ''))['result'] == 'own --flag'
    own.unlink()
    task_id = give(place, '')
    place.await_event('agent.error')
    assert task(place, task_id)['state'] == 'assigned'
    assert 'own-cli' in next(e['why'] for e in place.history() if e['type'] == 'agent.error')


# ----------------------------------------------------------------------------------------------------------- faults


def test_a_report_is_delivered_once_redis_is_back(place: Place, gate: Gate) -> None:
    spawn(place)
    task_id = give(place, GATE)
    cli = gate.pid()
    redis = redis_pid(place)
    os.kill(redis, signal.SIGKILL)
    await_exit(redis)
    gate.go('made while Redis was away')
    await_exit(cli)
    start_redis(place)
    found = place.await_end(task_id)
    assert (found['state'], found['attempt'], found['result']) == ('completed', 1, 'made while Redis was away')
    until(lambda: not list((place.root / '.tt' / 'agents').glob('*.spool/*')))


@pytest.mark.parametrize('verb', ['recovery.recover_agents', 'agent.restart', 'agent.kill'])
def test_a_dead_workers_report_is_delivered_before_its_task_is_freed(place: Place, gate: Gate, verb: str) -> None:
    worker = spawn(place)
    task_id = give(place, GATE)
    gate.pid()
    report = {'task': task_id, 'attempt': '1', 'outcome': 'completed', 'result': 'kept', 'error': None}
    report_spool.keep(place.root, agent(place)['id'], report)
    os.kill(worker, signal.SIGKILL)
    await_exit(worker)
    if verb == 'recovery.recover_agents':
        place.do(verb)
    else:
        place.do(verb, agent='w')
    found = task(place, task_id)
    assert (found['state'], found['attempt'], found['result']) == ('completed', 1, 'kept')


def test_of_two_workers_of_one_agent_the_older_one_ends(place: Place, gate: Gate) -> None:
    older = spawn(place)
    task_id = give(place, GATE)
    cli = gate.pid()
    found = agent(place)
    instance = place.store.call(place.store.agent('w'))[4].decode()
    place.store.call(place.store.depart(found['id'], instance, 'Stopped', 'taken for dead', 'inbox'))
    place.do('agent.restart', agent='w')
    gate.pid()
    await_exit(cli)
    await_exit(older)
    gate.go('by the newer')
    ended = place.await_end(task_id)
    assert (ended['attempt'], ended['result']) == (2, 'by the newer')
    assert worker_pid(place) != older


def test_stopping_a_foreground_worker_leaves_the_redis_that_it_started(place: Place) -> None:
    place.tt('stop', '--redis')
    with subprocess.Popen(
        [sys.executable, '-m', 'tinytown.cli', 'spawn', 'w', '--cli', 'runs', '--foreground'],
        cwd=place.root,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as foreground:
        assert foreground.stdout
        assert b'is up' in foreground.stdout.readline()
        redis = redis_pid(place)
        assert place.await_end(give(place, 'echo here'))['result'] == 'here'
        place.do('agent.kill', agent='w')
        assert foreground.wait(PATIENCE) == 0
    assert redis_pid(place) == redis


# --------------------------------------------------------------------------------------------------------- spawning


def test_exactly_one_of_twenty_spawns_with_the_same_name_succeeds(hall: Hall) -> None:
    names = ['same', 'SAME', 'Same', 'sAme'] * 5
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda name: hall.post('/v1/agents', {'name': name, 'cli': 'cat'}), names))
    assert sorted(reply.status for reply in replies) == [201] + [409] * 19
    assert {reply.json['code'] for reply in replies if reply.status == 409} == {'name-taken'}
    agents = hall.get('/v1/agents').json
    assert agents['count'] == 1
    assert verdict(identify(agents['agents'][0]['pid'])) == 'alive'


BAD_NAMES = ['', '../x', 'a/b', 'a b', 'a\nb', 'a\0b', 'a*', 'tt:{x}', '-x', '_x', 'é', 'a' * 64, 'a\n', '\u202ea']
RESERVED = ['conductor', 'Supervisor', CONDUCTOR_ID, new_id()]


def test_an_invalid_spawn_is_refused_with_the_reason(place: Place) -> None:
    def refusal(**arguments: Any) -> TownError:
        with pytest.raises(TownError) as caught:
            place.do('agent.spawn', **arguments)
        return caught.value

    for name in (*BAD_NAMES, *RESERVED):
        refused = refusal(name=name, cli='cat')
        assert (refused.status, refused.errors and refused.errors[0]['pointer']) == (422, '/name'), name
    unknown = refusal(name='w', cli='nonesuch')
    assert unknown.status == 422
    assert all(name in unknown.detail for name in ("'nonesuch'", 'claude', 'codex-mini', 'demo', 'runs'))
    missing = refusal(name='w', cli='own')
    assert missing.status == 422
    assert "program './own-cli' is not installed" in missing.detail
    assert refusal(name='w', cli='cat', parent_agent_id='nobody').status == 404
    assert place.do('agent.list')['count'] == 0
    for i in range(4):
        spawn(place, 'n' * 62 + str(i), 'cat')
    full = refusal(name='w', cli='cat')
    assert (full.status, full.code) == (409, 'max-agents')


def test_the_error_for_a_cli_that_is_not_installed_says_how_to_install_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.town
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(TownError, match='npm install -g @anthropic-ai/claude-code') as caught:
        place.do('agent.spawn', name='w', cli='claude')
    assert caught.value.status == 422


def test_a_spawn_whose_worker_does_not_start_is_undone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn(place, 'stopped', 'cat')
    place.do('agent.kill', agent='stopped')
    monkeypatch.setenv('PYTHONHOME', '/nowhere')  # the interpreter ends before it reads its settings
    with pytest.raises(TownError, match="The worker of 'w' did not start") as caught:
        place.do('agent.spawn', name='w', cli='cat')
    assert (caught.value.status, caught.value.code) == (503, 'spawn-failed')
    with pytest.raises(TownError):
        place.do('agent.restart', agent='stopped')
    monkeypatch.delenv('PYTHONHOME')
    agents = place.do('agent.list')['agents']
    assert [(each['name'], each['state']) for each in agents] == [('stopped', 'Error')]
    spawn(place, 'w', 'cat')


def test_workers_start_in_a_process_with_thousands_of_open_descriptors(place: Place) -> None:
    assert place.town
    place.do('agent.list')
    opened = [os.dup(0) for _ in range(1100)]
    try:
        assert verdict(identify(spawn(place, 'w', 'cat'))) == 'alive'
        place.do('agent.kill', agent='w')
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_pruning_an_agent_removes_its_files(place: Place) -> None:
    spawn(place, 'w')
    spawn(place, 'other')
    for name in ('w', 'other'):
        place.await_end(give(place, 'true', name))
    place.do('agent.kill', agent='w')
    assert place.do('agent.prune') == {'removed': 1, 'agents': ['w']}
    other = agent(place, 'other')['id']
    assert {file.name.split('.')[0] for file in (place.root / '.tt' / 'agents').iterdir()} == {other}
