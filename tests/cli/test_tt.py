"""The `tt` command: all commands, on a local town and through a townhall; its errors; the processes that it starts."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import argon2
import pytest

from tinytown.auth.api_keys import checksum
from tinytown.cli.main import main
from tinytown.core.operations import BY_NAME, OPERATIONS, Op
from tinytown.host.processes import start_time
from tinytown.model import CONDUCTOR_ID

from ..ground import enlist
from ..support import PATIENCE, Hall, Place, environment, make_town, redis_pid, shell_cli

UNKNOWN = '00000000-0000-4000-8000-000000000000'


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tt = Callable[..., Done]


@pytest.fixture
def tt(capsys: pytest.CaptureFixture[str]) -> Tt:
    """Runs `tt` in this process."""

    def run(*words: str) -> Done:
        capsys.readouterr()
        status = main(list(words))
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run


@pytest.fixture
def here(ground: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty town, whose directory is the working directory."""
    monkeypatch.chdir(ground.root)
    return ground


def child(place: Place, *words: str, **more: Any) -> subprocess.Popen[str]:
    """Starts `tt` as a child process in a town's directory."""
    streams = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    argv = [sys.executable, '-m', 'tinytown.cli', *words]
    return subprocess.Popen(argv, cwd=place.root, env=environment(), text=True, **streams | more)


def assert_refused(done: Done, status: int, says: str) -> None:
    """Checks the exit status, and that there is one matching line on stderr and nothing on stdout."""
    assert (done.status, done.out) == (status, ''), done
    assert re.fullmatch(r'tt: [^\n]+\n', done.err), done.err
    assert re.search(says, done.err), done.err


# ------------------------------------------------------------------------------------------------- every command


def test_help_lists_every_command_on_one_line_with_what_it_does(tt: Tt) -> None:
    done = tt('--help')
    assert done.status == 0
    own = ['init', 'start', 'stop', 'config', 'worker', 'generate-api-key', 'ping']
    for words in [*own, 'auth gen-key', 'task current', *(op.cli for op in OPERATIONS)]:
        assert len(re.findall(rf'^  {words}  +[A-Z].{{8,}}$', done.out, re.M)) == 1, words
    assert max(map(len, done.out.splitlines())) <= 82


@pytest.mark.parametrize('op', OPERATIONS, ids=lambda op: op.cli)
def test_the_help_of_a_command_names_all_its_arguments(tt: Tt, op: Op) -> None:
    done = tt(*op.cli.split(), '--help')
    assert done.status == 0
    for name, parameter in op.parameters.items():
        word = re.sub('(_agent)?_id$', '', name)
        if name in ('kind', 'action'):
            assert all(f'--{value.replace("_", "-")}' in done.out for value in parameter.schema['enum'])
        elif parameter.required:
            assert word.upper() in done.out
        else:
            assert f'--{word.replace("_", "-")}' in done.out


class Town:
    """Runs commands of the table with the global options `way`, and remembers in `used` which operations it ran."""

    def __init__(self, tt: Tt, *way: str) -> None:
        self.tt, self.way, self.used = tt, way, set[str]()

    def op(self, line: str) -> Op:
        """The operation of a command line, which counts as used."""
        op = max((op for op in OPERATIONS if f'{line} '.startswith(f'{op.cli} ')), key=lambda op: len(op.cli))
        self.used.add(op.name)
        return op

    def ask(self, line: str) -> Done:
        """The result of a command that may be refused."""
        self.op(line)
        return self.tt(*self.way, *line.split())

    def __call__(self, line: str, *more: str, status: int = 0) -> Any:
        """The answer of a command, after checking that it has the fields that its operation declares."""
        op = self.op(line)
        done = self.tt(*self.way, *line.split(), *more, '--json')
        assert (done.status, done.err) == (status, ''), done
        answer = done.json
        assert set(op.output['required']) <= set(answer) <= set(op.output['properties'])
        return answer


@pytest.fixture(params=['here', 'through a townhall'])
def town(request: pytest.FixtureRequest, directory: Path, tt: Tt) -> Iterator[Town]:
    place = make_town(directory)
    yield Town(tt, *(('--town', str(directory)) if request.param == 'here' else ('--url', url(place.hall()))))
    place.close()


def url(hall: Hall) -> str:
    return f'http://{hall.address}:{hall.port}'


def test_every_command_of_the_table_works_here_and_through_a_townhall(town: Town) -> None:
    agent = town('spawn a --role worker --nickname Ann --max-rounds 9')['agent_id']
    assert town('interrupt a') == {'status': 'paused', 'agent': 'a'}
    assert [(each['here'], each['agents']) for each in town('hosts')['hosts']] == [(True, 1)]
    task = town('assign a', 'one\ntwo')['task_id']
    assert [(each['task_id'], each['agent_id']) for each in town('pending')['tasks']] == [(task, agent)]
    assert town(f'task cancel {task}')['state'] == 'cancelled'
    assert town(f'task retry {task}')['state'] == 'pending'
    tagged = town('backlog add', 'tag me', '--tags', 'x,y')['task_id']
    assert [each['tags'] for each in town('backlog list')['backlog']] == [[], ['x', 'y']]
    assert town(f'backlog claim {task} {agent[:8]}')['agent_name'] == 'a'
    assert town(f'backlog remove {tagged}')['removed'] is True
    other = town('backlog add three')['task_id']
    assert town('backlog assign-all a')['tasks'] == [other]
    assert town(f'task fail {other} --error', 'no way')['state'] == 'failed'
    assert town(f'task complete {task} --result', 'great work')['state'] == 'completed'
    assert town(f'task show {task}')['result'] == 'great work'
    assert [each['type'] for each in town(f'task why {task}')['history']][-1] == 'task.completed'
    assert_refused(town.ask(f'task release {task}'), 1, 'only a running task')
    assert_refused(town.ask(f'deadletter retry {task}'), 1, 'not among the dead letters')
    assert_refused(town.ask(f'deadletter drop {task}'), 1, 'not among the dead letters')
    assert town('deadletter list')['count'] == 0
    assert town('result a')['task']['task_id'] == task
    assert {each['state'] for each in town('task list --agent a')['tasks']} == {'failed', 'completed'}
    assert [each['task_id'] for each in town('task list --state failed')['tasks']] == [other]
    assert town('send a', 'look here', '--info', '--urgent')['urgent'] is True
    assert town('inbox a')['urgent'] == 1
    assert town('send conductor', 'hello', '--from', 'a', '--query')['to_agent'] == 'conductor'
    [letter] = town('inbox')['messages']
    assert (letter['from'], letter['type'], letter['summary']) == (agent, 'query', 'hello')
    assert town('ack --all')['removed'] == 1
    assert town('wait a --timeout 0', status=124)['done'] is False
    assert town('resume a')['agent'] == 'a'
    assert town('restart a')['status'] == 'restarted'
    assert town('show a')['nickname'] == 'Ann'
    assert [each['name'] for each in town('list --open')['agents']] == ['a']
    assert town('status --deep')['tasks']['completed'] == 1
    assert town('town')['name'] == 'test'
    [ended] = town(f'events --type task.completed --task {task}')['events']
    assert ended['task_id'] == task
    assert town('history --agent a -n 1')['events'][0]['agent_name'] == 'a'
    assert ' is up ' in town('logs a -n 3')['text']
    town('close a')
    assert town('wait a') == {'agent': 'a', 'state': 'Stopped', 'done': True}
    assert town('recover')['recovered'] == 0
    assert town('reclaim --to-backlog')['destination'] == 'backlog'
    assert town('orphans')['action'] == 'list'
    assert town('kill a')['status'] == 'stopped'
    assert town('prune')['agents'] == ['a']
    assert town('reset', '--force')['tasks'] == 2
    assert town.used == set(BY_NAME)


def test_tt_gives_the_same_answers_as_rest(place: Place, hall: Hall, tt: Tt) -> None:
    place.do('agent.spawn', name='a')
    task = place.do('task.assign', agent='a', task='say Größe')['task_id']
    place.await_end(task)
    place.do('agent.kill', agent='a')
    place.do('backlog.add', description='later')
    lines = ['town', 'status', 'list', 'show a', 'result a', 'inbox a', 'pending', 'task list', 'backlog list']
    for line in [*lines, f'task show {task}', 'task list --limit 1 --state completed']:
        results = [
            tt('--town', str(place.root), *line.split(), '--json'),
            tt('--url', url(hall), '--json', *line.split()),
        ]
        op = max((op for op in OPERATIONS if f'{line} '.startswith(f'{op.cli} ')), key=lambda op: len(op.cli))
        path = op.path.format(agent='a', task_id=task) + ('?limit=1&state=completed' if '--limit' in line else '')
        answers = [hall.get(path).json, *(done.json for done in results)]
        for answer in answers:
            for agent in [answer, *answer.get('agents', [])]:
                agent.pop('last_heartbeat', None)
        assert answers[0] == answers[1] == answers[2], line


@pytest.mark.usefixtures('here')
def test_without_json_answers_are_sentences_and_tables(tt: Tt) -> None:
    assert tt('list').out == 'No agents. Start one:  tt spawn NAME\n'
    assert tt('backlog', 'list').out == 'The backlog is empty.\n'
    task = tt('backlog', 'add', 'first line\nsecond line', '--tags', 'x').out.split()[1]
    head, row = tt('backlog', 'list').out.splitlines()
    assert row.index('first line second line') == head.index('DESCRIPTION')
    assert 'description  first line\n             second line\n' in tt('task', 'show', task).out
    assert tt('prune').out == 'Removed 0 agents.\n'
    tt('send', 'conductor', 'x' * 200)
    assert 'x' * 200 in tt('inbox').out
    for _ in range(2):
        tt('backlog', 'add', 'more')
    page = tt('backlog', 'list', '--limit', '2').out
    cursor = re.search(r'There is more; add  --cursor (\S+)\n', page)
    assert cursor
    assert tt('backlog', 'list', '--cursor', cursor[1]).out.count('more') == 1


# --------------------------------------------------------------------------------------------------- which town


def test_global_options_stand_before_or_after_the_command(here: Place, tt: Tt) -> None:
    root = str(here.root)
    lines = ('--json backlog list', 'backlog --json list', 'backlog list --json', f'--town {root} backlog list --json')
    answers = {tt(*line.split()).out for line in lines}
    assert answers == {'{"backlog": [], "count": 0}\n'}
    assert tt('--verbose', 'list').err == tt('list', '--verbose').err
    assert f'town test in {root}, Redis at unix://' in tt('list', '--verbose').err


def test_the_town_is_found_upwards_and_named_by_flag_or_environment(
    here: Place, directory: Path, tt: Tt, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = here.root / 'a' / 'b'
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert tt('town', '--json').json['root'] == str(here.root)
    monkeypatch.chdir(directory)
    assert_refused(tt('list'), 2, f'not in a town.*{directory}.*tt init')
    monkeypatch.setenv('TINYTOWN_TOWN', str(here.root))
    assert tt('town', '--json').json['root'] == str(here.root)
    assert_refused(tt('--town', str(directory), 'list'), 2, f'{directory} holds no town.*tt init --town')
    monkeypatch.chdir(here.root.parent)
    assert tt('--town', here.root.name, 'town', '--json').json['root'] == str(here.root)
    monkeypatch.setenv('TINYTOWN_TOWN', '')
    assert_refused(tt('list'), 2, 'tt init')


def test_a_deleted_working_directory_is_reported_in_one_line(here: Place, directory: Path) -> None:
    script = f'mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m tinytown.cli list'
    for words, status in (([], 1), (['--town', str(here.root)], 0)):
        argv = ['sh', '-c', f'{script} "$@"', 'sh', *words]
        done = subprocess.run(argv, cwd=directory, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert done.stderr == 'tt: No such file or directory\n' * status


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ('line', 'status', 'says'),
    [
        ('', 2, 'COMMAND'),
        ('dance', 2, 'dance'),
        ('list --dance', 2, '--dance'),
        ('list --js', 2, '--js'),
        ('kill', 2, 'AGENT'),
        ('kill nobody', 1, "Agent 'nobody' not found"),
        ('task show', 2, 'TASK is missing'),
        (f'task show {UNKNOWN}', 1, f"Task '{UNKNOWN}' not found"),
        ('task show 7', 2, "TASK: '7' does not fit: a UUID"),
        ('task current', 2, 'tt task current AGENT'),
        ('spawn ../x', 2, r"NAME: '\.\./x' does not fit"),
        ('spawn conductor', 1, "'conductor' can't name an agent"),
        ('spawn a --max-rounds many', 2, "--max-rounds: 'many' is not a whole number"),
        ('spawn a --cli nope', 1, "'nope' is not a coding CLI.*demo"),
        ('list --limit 0', 2, '--limit: 0 is not between 1 and 500'),
        ('task list --state asleep', 2, "--state: 'asleep' is not one of pending"),
        ('send a hi --query --info', 2, 'not allowed with'),
        ('wait a --timeout soon', 2, '--timeout soon: give a whole number of seconds'),
        ('wait a --timeout -1', 2, '--timeout'),
        ('ack', 1, 'exactly one of the two'),
        ('reclaim --cancel', 2, '--cancel goes with --orphan-tasks'),
        ('reclaim --orphan-tasks --to a', 2, '--orphan-tasks goes with one of'),
        ('reclaim --orphan-tasks --to-backlog --delete', 2, '--orphan-tasks goes with one of'),
        ('inbox a --all', 2, '--all shows every mailbox'),
        ('worker nobody', 1, "Agent 'nobody' not found"),
        ('init', 2, 'holds a town already'),
        ('config no.such', 2, 'no.such is not a setting'),
        ('start --url http://x', 2, '--url: this command acts on this machine'),
        ('spawn a --foreground --url http://x', 2, '--url: this command acts on this machine'),
        ('generate-api-key --url http://x', 2, '--url: this command acts on this machine'),
        ('list --town . --url http://x', 2, 'either --town or --url'),
        ('list --api-key-file x', 2, '--api-key-file goes with --url'),
    ],
)
@pytest.mark.usefixtures('here')
def test_a_refused_command_says_why_in_one_line(tt: Tt, line: str, status: int, says: str) -> None:
    assert_refused(tt(*line.split()), status, says)


@pytest.mark.parametrize(
    ('settings', 'status', 'says'),
    [
        ('name = "a', 2, 'tinytown.toml: it is not TOML: .*line 1'),
        ('name = "a"\nx = ' + '[' * 5000, 2, 'tinytown.toml: it is not TOML'),
        ('max_agents = 1', 2, 'name is missing; add name = '),
        ('name = "a"\nmax_agent = 1', 2, 'max_agent is not a setting; did you mean max_agents'),
        ('name = "a"\n[redis]\nurl = "unix:///nowhere/redis.sock"', 1, 'Redis is not there'),
        ('name = "a"\n[redis]\nurl = "http://x"', 2, 'redis.url'),
        ('name = "a"', 2, 'TINYTOWN_REDIS_SERVER: /nowhere is not an executable program'),
    ],
)
def test_a_town_that_can_not_be_opened_says_why(
    directory: Path, tt: Tt, monkeypatch: pytest.MonkeyPatch, settings: str, status: int, says: str
) -> None:
    monkeypatch.setenv('TINYTOWN_REDIS_SERVER', '/nowhere')
    (directory / 'tinytown.toml').write_text(settings + '\n')
    assert_refused(tt('--town', str(directory), 'list'), status, says)


@pytest.mark.parametrize(
    ('address', 'status', 'says'),
    [
        ('http://127.0.0.1:1', 1, r"http://127\.0\.0\.1:1 can't be reached: .*refused"),
        ('127.0.0.1:1', 2, 'give http://HOST:PORT'),
        ('http://', 2, 'give http://HOST:PORT'),
        ('http://127.0.0.1:99999', 2, 'give http://HOST:PORT'),
        ('http://[::1', 2, 'give http://HOST:PORT'),
        ('http://a..b', 2, 'give http://HOST:PORT'),
        ('http://me:secret@127.0.0.1', 2, 'give http://HOST:PORT'),
        ('http://127.0.0.1:1/a b\n', 1, "can't be reached"),
    ],
)
def test_a_url_without_a_townhall_is_reported_in_one_line(tt: Tt, address: str, status: int, says: str) -> None:
    assert_refused(tt('--url', address, 'list'), status, says)


@pytest.mark.parametrize(
    ('status', 'body', 'says'),
    [
        (200, b'{}', 'not as a townhall does; is it one'),
        (200, b'[]', 'is it one'),
        (200, b'"\xff', 'is it one'),
        (302, b'<html>', 'answered 302.*is it one'),
        (404, b'["x"]', 'is it one'),
        (418, b'{"error": 7}', 'answered 418'),
        (0, b'SSH-2.0-x', "can't be reached: .*SSH"),
        (0, b'', "can't be reached: .*closed"),
    ],
)
def test_a_server_that_is_not_a_townhall_is_recognised(tt: Tt, status: int, body: bytes, says: str) -> None:
    head = b'HTTP/1.1 %d X\r\nConnection: close\r\n\r\n' % status if status else b''
    with socket.create_server(('127.0.0.1', 0)) as server:
        answering = threading.Thread(target=answer_once, args=(server, head + body))
        answering.start()
        assert_refused(tt('--url', f'http://127.0.0.1:{server.getsockname()[1]}', 'list'), 1, says)
        answering.join(PATIENCE)


def answer_once(server: socket.socket, data: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(data)


@pytest.mark.parametrize('key', [b'', b'two words', b'a\nb', b'\xff'])
def test_a_key_file_without_exactly_one_key_is_refused(tt: Tt, tmp_path: Path, key: bytes) -> None:
    (tmp_path / 'key').write_bytes(key)
    assert_refused(tt('--url', 'http://x', '--api-key-file', str(tmp_path / 'key'), 'list'), 2, 'must hold one key')
    assert_refused(tt('--url', 'http://x', '--api-key-file', str(tmp_path / 'no'), 'list'), 2, 'No such file')


@pytest.mark.parametrize('line', ['list', '--help', 'backlog list --json'])
def test_a_closed_pipe_is_not_reported_as_an_error(here: Place, line: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = child(here, *line.split(), stdout=writer)
    os.close(writer)
    assert running.communicate(timeout=PATIENCE)[1] == ''
    assert running.returncode in (0, 1)


@pytest.mark.parametrize('redirection', ['>&-', '2>&-', '<&-', '<&- >&- 2>&-'])
def test_tt_runs_with_closed_standard_streams(here: Place, redirection: str) -> None:
    script = f'exec {sys.executable} -m tinytown.cli list {redirection}'
    done = subprocess.run(['sh', '-c', script], cwd=here.root, env=environment(), capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b'')
    assert (done.stdout == b'') == (' >&-' in f' {redirection}')


def test_a_full_disk_is_reported_in_one_line(here: Place) -> None:
    with open('/dev/full', 'w') as full:
        running = child(here, 'list', stdout=full)
        err = running.communicate(timeout=PATIENCE)[1]
    assert (running.returncode, err) == (1, 'tt: No space left on device\n')


def test_an_ascii_terminal_gets_valid_json(here: Place) -> None:
    here.do('backlog.add', description='Größe 🚀 \x9b2J')
    env = environment(PYTHONIOENCODING='ascii')
    argv = [sys.executable, '-m', 'tinytown.cli', 'backlog', 'list']
    for words in ([], ['--json']):
        done = subprocess.run([*argv, *words], cwd=here.root, env=env, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b'')
        assert done.stdout.isascii()
    assert json.loads(done.stdout)['backlog'][0]['description'] == 'Größe 🚀 \x9b2J'


def test_wait_gives_up_with_status_124_after_its_timeout(place: Place, tt: Tt) -> None:
    place.do('agent.spawn', name='a')
    done = tt('--town', str(place.root), 'wait', 'a', '--timeout', '1')
    assert (done.status, done.out) == (124, 'a is Idle.\n')
    commands = place.store.call(place.store.info('commandstats')).decode()
    assert int(re.search(r'cmdstat_xread:calls=(\d+)', commands)[1]) < 20  # type: ignore[index]


# ------------------------------------------------------------------------------------------- inside an agent's run


def test_in_an_agents_run_tt_acts_as_the_agent_and_for_its_attempt(directory: Path) -> None:
    script = (
        'set -e; tt send conductor "I am on it" --query; test "$(tt inbox --json | cut -c1-13)" = \'{"agent": "a"\'; '
        'tt task current >current; tt task complete --result "said it myself"; exit 3'
    )
    place = make_town(directory, agent_clis={'own': shell_cli(script)})
    try:
        agent = place.do('agent.spawn', name='a', cli='own')['agent_id']
        task = place.await_end(place.do('task.assign', agent='a', task='x')['task_id'])
        assert (task['state'], task['result'], task['attempt']) == ('completed', 'said it myself', 1), place.log('a')
        [letter] = place.do('agent.inbox', agent='conductor')['messages']
        assert (letter['from'], letter['type']) == (agent, 'query')
        assert task['task_id'] in (directory / 'current').read_text()
    finally:
        place.close()


def test_a_stale_or_broken_attempt_is_refused(here: Place, tt: Tt, monkeypatch: pytest.MonkeyPatch) -> None:
    task = here.do('backlog.add', description='x')['task_id']
    monkeypatch.setenv('TINYTOWN_TASK_ID', task)
    for attempt, status, says in (('7', 1, 'Attempt 7 of task'), ('soon', 2, '--attempt'), ('', 2, '--attempt')):
        monkeypatch.setenv('TINYTOWN_ATTEMPT', attempt)
        assert_refused(tt('task', 'complete'), status, says)
    monkeypatch.delenv('TINYTOWN_ATTEMPT')
    assert_refused(tt('task', 'fail', '--error', 'x'), 2, '--attempt')
    assert here.do('task.get', task_id=task)['state'] == 'pending'
    other = here.do('backlog.add', description='y')['task_id']
    assert tt('task', 'complete', other, '--json').json['state'] == 'completed'


def test_all_mailboxes_are_shown_at_once(here: Place, tt: Tt) -> None:
    for name in ('a', 'b'):
        enlist(here, name)
    here.do('message.send', to='b', message='hello')
    boxes = tt('inbox', '--all', '--json').json['inboxes']
    assert [(box['agent'], box['total']) for box in boxes] == [('a', 0), ('b', 1), ('conductor', 0)]
    assert 'b: 1 message, 0 urgent\n\n' in tt('inbox', '--all').out


@pytest.mark.parametrize(('flag', 'state'), [('', 'assigned'), ('--to-backlog', 'pending'), ('--cancel', 'cancelled')])
def test_orphaned_tasks_are_listed_returned_cancelled_or_deleted(here: Place, tt: Tt, flag: str, state: str) -> None:
    agent = enlist(here, 'a')
    task = here.do('task.assign', agent='a', task='x')['task_id']
    agent.depart('Error', 'inbox')
    answer = tt('reclaim', '--orphan-tasks', *flag.split(), '--json').json
    assert [orphan['task_id'] for orphan in answer['orphans']] == [task]
    assert here.do('task.get', task_id=task)['state'] == state
    if not flag:
        assert task in tt('reclaim', '--orphan-tasks').out
        assert tt('reclaim', '--orphan-tasks', '--delete').out.endswith('1 task deleted.\n')
        assert tt('task', 'show', task).status == 1


# ------------------------------------------------------------------------------------------------- start and stop


def test_start_keeps_no_stream_of_its_caller_open_and_stop_leaves_no_process(directory: Path, tt: Tt) -> None:
    place = make_town(directory, townhall={'rest_port': 0})
    try:
        started = child(place, 'start', '--json').communicate(
            timeout=PATIENCE
        )  # returns when all writers have closed the pipes
        answer = json.loads(started[0])
        assert answer['started'] is True
        assert tt('--url', answer['url'], 'town', '--json').json['root'] == str(directory)
        again = place.tt('start')
        assert again.stdout == f'test is open already on {answer["url"]}\n'
        place.tt('spawn', 'a')
        worker, redis = place.do('agent.get', agent='a')['pid'], redis_pid(place)
        for pid in (answer['pid'], redis, worker):
            assert open_streams(pid) == []
        assert place.tt('stop').stdout == 'Stopped 1 townhall and 1 worker.\n'
        assert start_time(answer['pid']) == ''
        assert start_time(worker) == ''
        assert place.do('agent.get', agent='a')['state'] == 'Stopped'
        assert place.tt_json('stop', '--redis') == {'townhalls': 0, 'agents': [], 'left': [], 'redis': True}
        assert start_time(redis) == ''
        assert list((directory / '.tt' / 'run').iterdir()) == []
        assert place.tt('stop', '--redis').stdout == 'Stopped 0 townhalls and 0 workers.\n'
    finally:
        place.close()


def open_streams(pid: int) -> list[str]:
    """The standard streams of a process that are pipes or terminals, and so may be those of its caller."""
    streams = [str(Path(f'/proc/{pid}/fd/{number}').readlink()) for number in range(3)]
    return [stream for stream in streams if stream.startswith(('pipe:', '/dev/pts'))]


def test_start_on_a_used_port_says_why(directory: Path, hall: Hall) -> None:
    place = make_town(directory / 'second', townhall={'rest_port': hall.port})
    try:
        done = place.tt('start', check=False)
        assert_refused(Done(done.returncode, done.stdout, done.stderr), 1, f'{hall.port}.*in use.*choose another')
    finally:
        place.close()


def test_stop_in_a_town_that_never_ran_starts_nothing(directory: Path, tt: Tt) -> None:
    make_town(directory)
    run = directory / '.tt' / 'run'
    run.mkdir(parents=True)
    (run / 'townhall-1.json').write_text('[]')
    assert tt('--town', str(directory), 'stop', '--json').json == {
        'townhalls': 0,
        'agents': [],
        'left': [],
        'redis': False,
    }
    assert not (directory / '.tt' / 'redis.sock').exists()


# ------------------------------------------------------------------------------------------------- worker processes


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_worker_in_the_foreground_prints_its_work_until_a_signal(place: Place, number: int) -> None:
    with child(place, 'spawn', 'f', '--foreground') as running:
        await_line(running, 'is up')
        task = place.do('task.assign', agent='f', task='say hello')['task_id']
        await_line(running, 'demo: done: say hello')
        place.await_end(task)
        running.send_signal(number)
        assert running.communicate(timeout=PATIENCE)[1] == ''
        assert running.returncode == 0
    assert place.do('agent.get', agent='f')['state'] == 'Stopped'
    with child(place, 'worker', 'f') as running:
        await_line(running, 'is up')
        done = place.tt('worker', 'f', check=False)
        assert_refused(Done(done.returncode, done.stdout, done.stderr), 1, "Agent 'f' is ")
        busy = place.do('task.assign', agent='f', task='sleep 60')['task_id']
        await_line(running, 'demo: sleeping')
        running.send_signal(number)
        running.communicate(timeout=PATIENCE)
    assert place.do('task.get', task_id=busy)['state'] == 'pending'


def await_line(running: subprocess.Popen[str], says: str) -> None:
    """Reads the output of a process up to a line that holds `says`."""
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if says in line:
            return
    raise AssertionError(f'{says!r} was not printed: {lines} {running.stderr and running.stderr.read()}')


def test_a_worker_goes_on_when_its_output_pipe_is_closed(place: Place) -> None:
    with child(place, 'spawn', 'f', '--foreground') as running:
        await_line(running, 'is up')
        assert running.stdout is not None
        running.stdout.close()
        task = place.do('task.assign', agent='f', task='say hello')['task_id']
        assert place.await_end(task)['state'] == 'completed'
        running.terminate()
        assert running.wait(PATIENCE) == 0, place.log('f')


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize('line', ['generate-api-key', 'auth gen-key'])
def test_a_new_key_fits_its_hash_and_checksum(tt: Tt, line: str) -> None:
    made = tt(*line.split(), '--json').json
    assert set(made) == {'id', 'key', 'hash'}
    assert argon2.PasswordHasher().verify(made['hash'], made['key'])
    assert made['hash'].startswith('$argon2id$v=19$')
    body, _, check = made['key'].rpartition('_')
    assert re.fullmatch(rf'tt_{made["id"]}_[A-Za-z0-9_-]{{43}}', body)
    assert check == checksum(body)
    shown = tt(*line.split()).out
    assert shown.endswith('The key is shown only this once.\n')
    assert made['key'] not in shown


# ------------------------------------------------------------------------------------------------------------ speed


def test_tt_list_imports_no_modules_that_it_does_not_need(here: Place) -> None:
    script = 'import sys; from tinytown.cli.main import main; main(["list"]); print(*sys.modules)'
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=here.root, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded & {'argon2', 'tomli_w', 'http.client', 'http.server', 'secrets', 'difflib'} == set()


@pytest.mark.parametrize(
    ('line', 'built'),
    [
        ('list --town task', ['tt', 'tt list']),
        ('--town task task --json list', ['tt', 'tt task', 'tt task list']),
        ('key create --help', ['tt', 'tt key', 'tt key create']),
    ],
)
def test_a_command_builds_only_its_own_parser(
    ground: Place, tmp_path: Path, tt: Tt, monkeypatch: pytest.MonkeyPatch, line: str, built: list[str]
) -> None:
    (tmp_path / 'task').symlink_to(ground.root)
    monkeypatch.chdir(tmp_path)
    parsers: list[str] = []
    init = argparse.ArgumentParser.__init__

    def record(parser: argparse.ArgumentParser, **settings: Any) -> None:
        init(parser, **settings)
        parsers.append(parser.prog)

    monkeypatch.setattr(argparse.ArgumentParser, '__init__', record)
    assert tt(*line.split()).status == 0
    assert [prog for prog in parsers if prog.startswith('tt')] == built


def test_the_conductor_is_the_sender_of_messages_from_people(here: Place, tt: Tt) -> None:
    tt('send', 'conductor', 'note to self')
    assert here.do('agent.inbox', agent='conductor')['messages'][0]['from'] == CONDUCTOR_ID
