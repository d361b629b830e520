"""A town that systemd runs: units, restarts, the watchdog, the socket; in a machine of its own within this one."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ..support import PATIENCE, Place, make_town
from .lab import Lab

TOWN, HALL, SOCKET = 'tinytown-test.service', 'townhall-test.service', 'townhall-test.socket'
OVERRIDES = f'/etc/systemd/system/{HALL}.d'


@pytest.fixture(scope='module')
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp('lab'))
    yield made
    made.close()


@pytest.fixture
def served(lab: Lab, directory: Path) -> Iterator[Served]:
    """A town that systemd runs. It is removed in the end."""
    made = Served(lab, directory)
    yield made
    made.place.let_go()  # to open it would start a Redis outside of the lab
    lab.run('rm', '-rf', OVERRIDES)
    lab.service('uninstall', '--town', str(directory), '--force')
    assert lab.run('pgrep', '-f', str(directory), check=False).stdout == ''


class Served:
    """A town with its townhall on a unix socket, which is reached from outside of the machine."""

    def __init__(self, lab: Lab, root: Path) -> None:
        self.lab = lab
        self.path = root / 'hall.sock'
        self.place: Place = make_town(root, townhall={'bind': f'unix:{self.path}'}, agent={'restart': 'on-failure'})

    def install(self, *words: str) -> str:
        return self.lab.service('install', '--town', str(self.place.root), *words).stdout

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """A request. What is refused fails."""
        connection = http.client.HTTPConnection('localhost')
        connection.sock = socket.socket(socket.AF_UNIX)
        with closing(connection):
            connection.sock.settimeout(PATIENCE)
            connection.sock.connect(str(self.path))
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {'Content-Type': 'application/json'} | headers)
            answer = connection.getresponse()
            read = json.loads(answer.read())
        assert answer.status < 400, read
        return read

    def spawn(self, name: str = 'back') -> None:
        self.ask('POST', '/v1/agents', {'name': name})

    def pid(self, unit: str, what: str) -> int:
        """The process of a unit whose command line has a word."""
        found = [pid for pid, command in self.lab.members(unit).items() if what in command]
        assert len(found) == 1, self.lab.members(unit)
        return found[0]

    def main_pid(self, unit: str = HALL) -> int:
        return int(self.lab.show(unit, 'MainPID'))

    def override(self, *lines: str) -> None:
        """Changes the townhall's unit as `systemctl edit` does."""
        text = '\\n'.join(['[Service]', *lines])
        self.lab.run('sh', '-c', f'mkdir -p {OVERRIDES}; printf "{text}\\n" > {OVERRIDES}/test.conf')
        self.lab.ctl('daemon-reload')


def test_workers_and_redis_live_in_the_town_and_outlive_a_restart_of_townhall(served: Served) -> None:
    lab = served.lab
    served.install()
    assert 'is open on unix:' in lab.show(HALL, 'StatusText')
    served.spawn()
    worker, redis = served.pid(TOWN, 'tinytown.worker'), served.pid(TOWN, '--appendonly')
    assert list(lab.members(HALL)) == [served.main_pid()]
    before = served.main_pid()
    lab.ctl('restart', HALL)
    lab.kill(signal.SIGKILL, served.main_pid())
    lab.await_value(HALL, 'NRestarts', '1')
    lab.await_value(HALL, 'ActiveState', 'active')
    assert served.main_pid() != before
    assert (served.pid(TOWN, 'tinytown.worker'), served.pid(TOWN, '--appendonly')) == (worker, redis)
    task = served.ask('POST', '/v1/tasks/assign', {'agent': 'back', 'task': 'go on'})['task_id']
    assert served.place.await_end(task)['state'] == 'completed'
    assert not re.search(r'left-?over|remains running', lab.journal('-u', TOWN, '-u', HALL))


@pytest.mark.parametrize('line', ['', 'nonsense = 3'], ids=['right', 'wrong'])
def test_a_stop_of_the_town_ends_all_of_it_and_a_start_brings_its_agents_back(
    served: Served, tmp_path: Path, line: str
) -> None:
    """With credentials, and whatever has become of the configuration."""
    lab, file = served.lab, served.place.root / 'tinytown.toml'
    before = file.read_text()
    (tmp_path / 'key').write_text('secret')
    served.install('--credential', f'ANTHROPIC_API_KEY={tmp_path}/key')
    served.spawn()
    served.place.let_go()
    file.write_text(f'{line}\n{before}')
    lab.ctl('stop', TOWN)
    file.write_text(before)
    assert [lab.show(unit, 'ActiveState') for unit in (TOWN, HALL)] == ['inactive'] * 2, lab.journal('-u', TOWN)
    assert [lab.show(unit, 'Result') for unit in (TOWN, HALL)] == ['success'] * 2
    assert lab.run('pgrep', '-f', str(served.place.root), check=False).stdout == ''
    lab.ctl('start', TOWN, HALL)
    served.place.await_event('agent.restarting', agent_name='back')
    served.place.await_event('agent.started', agent_name='back')
    assert 'back' in ' '.join(lab.members(TOWN).values())
    kinds = [event['type'] for event in served.place.history()]
    assert 'agent.stopped' in kinds, 'it was ended in good order: told, or by itself when it was to drain'
    assert 'agent.error' not in kinds


def test_a_keeper_that_is_killed_comes_back_with_the_town(served: Served) -> None:
    lab = served.lab
    served.install()
    served.spawn()
    old = served.main_pid()
    lab.kill(signal.SIGKILL, served.main_pid(TOWN))
    lab.await_value(TOWN, 'NRestarts', '1')
    lab.await_value(TOWN, 'ActiveState', 'active')
    lab.await_value(HALL, 'StatusText', '.*is open.*')
    assert served.main_pid() != old
    served.place.await_event('agent.restarting', agent_name='back')


def test_a_reload_takes_up_the_configuration_and_a_wrong_one_changes_nothing(served: Served) -> None:
    lab, file = served.lab, served.place.root / 'tinytown.toml'
    served.install()
    before = file.read_text()
    for line, says in (('max_agents = 77', 'was reloaded'), ('max_agents = "x"', 'was not reloaded')):
        file.write_text(f'{line}\n{before}')
        lab.ctl('reload', HALL)
        deadline = time.monotonic() + PATIENCE
        while says not in lab.journal('-u', HALL):
            assert time.monotonic() < deadline
    assert (lab.show(HALL, 'ActiveState'), lab.show(HALL, 'NRestarts')) == ('active', '0')
    file.write_text(before)


def test_a_townhall_that_hangs_is_ended_by_the_watchdog_and_started_again(served: Served) -> None:
    lab = served.lab
    served.install()
    served.override('WatchdogSec=5')
    lab.ctl('restart', HALL)
    lab.kill(signal.SIGSTOP, served.main_pid())
    lab.await_value(HALL, 'NRestarts', '1')
    lab.await_value(HALL, 'ActiveState', 'active')
    assert 'Watchdog timeout' in lab.journal('-u', HALL)
    assert served.ask('GET', '/v1/town')['name'] == 'test'


def test_the_watchdog_is_fed_only_while_redis_answers(served: Served) -> None:
    lab = served.lab
    served.install()
    served.override('WatchdogSec=5', 'Environment=PYTHONFAULTHANDLER=')
    lab.ctl('restart', HALL)
    redis = served.pid(TOWN, '--appendonly')
    lab.kill(signal.SIGSTOP, redis)
    lab.await_value(HALL, 'NRestarts', '[1-9]')
    lab.kill(signal.SIGCONT, redis)
    lab.await_value(HALL, 'ActiveState', 'active')
    assert 'Current thread' in lab.journal('-u', HALL), 'it tells where its threads were'
    assert served.ask('GET', '/ready')['status'] == 'ready'
    assert served.pid(TOWN, '--appendonly') == redis


def test_one_of_several_processes_that_hangs_is_replaced_and_the_others_serve_on(served: Served) -> None:
    lab = served.lab
    served.install()
    served.override('WatchdogSec=8', 'Environment=TINYTOWN_TOWNHALL_WORKERS=2')
    lab.ctl('restart', HALL)
    parent, children = served.main_pid(), set(lab.members(HALL)) - {served.main_pid()}
    assert len(children) == 2
    lab.kill(signal.SIGSTOP, hung := max(children))
    deadline = time.monotonic() + PATIENCE
    while hung in lab.members(HALL) or len(lab.members(HALL)) < 3:
        assert time.monotonic() < deadline, lab.journal('-u', HALL)
    assert 'hung for 4 s and is killed' in lab.journal('-u', HALL)
    assert (served.main_pid(), lab.show(HALL, 'NRestarts')) == (parent, '0')
    assert lab.show(HALL, 'ActiveState') == 'active'


def test_with_a_socket_no_client_is_refused_over_a_restart(served: Served) -> None:
    lab = served.lab
    served.install('--socket')
    assert lab.show(SOCKET, 'ActiveState') == 'active'
    failed: list[Exception] = []
    over = threading.Event()
    count = [0]

    def call() -> None:
        while not over.is_set() and not failed:
            try:
                served.ask('GET', '/health')
                count[0] += 1
            except Exception as e:
                failed.append(e)

    clients = [threading.Thread(target=call) for _ in range(3)]

    def more(answers: int) -> None:
        wanted, deadline = count[0] + answers, time.monotonic() + PATIENCE
        while count[0] < wanted and not failed:
            assert time.monotonic() < deadline, count
            over.wait(0.01)

    for client in clients:
        client.start()
    try:
        more(10)
        lab.ctl('restart', HALL)
        lab.ctl('restart', HALL)
        lab.kill(signal.SIGTERM, served.main_pid())
        lab.await_value(HALL, 'ActiveState', 'inactive|active')
        served.ask('GET', '/v1/status')
        more(10)
    finally:
        over.set()
    for client in clients:
        client.join()
    assert failed == []
    lab.ctl('stop', TOWN)
    lab.await_value(SOCKET, 'ActiveState', 'inactive')  # a client must not start the town again


def test_keys_come_from_files_that_the_units_do_not_show(served: Served, tmp_path: Path) -> None:
    key, most = tmp_path / 'key', tmp_path / 'most'
    key.write_text('sk-0123456789\n')
    most.write_text('1\n')
    served.install('--credential', f'ANTHROPIC_API_KEY={key}', '--credential', f'max_agents={most}')
    lab = served.lab
    worker_cli = 'test ${#ANTHROPIC_API_KEY} = 13'
    served.place.tt('config', 'agent_clis.probe', f"sh -c '{worker_cli}'")
    lab.ctl('restart', HALL)
    served.ask('POST', '/v1/agents', {'name': 'probe', 'cli': 'probe'})
    task = served.ask('POST', '/v1/tasks/assign', {'agent': 'probe', 'task': 'have a key'})['task_id']
    ended = served.place.await_end(task)
    assert ended['state'] == 'completed', (ended, served.place.log('probe'))
    with pytest.raises(AssertionError, match='raise max_agents'):
        served.spawn('second')
    assert 'sk-0123' not in lab.ctl('cat', TOWN, HALL) + lab.ctl('show', HALL)


def test_a_socket_is_given_to_a_service_that_runs_and_taken_again(served: Served) -> None:
    lab = served.lab
    for words, state in (((), 'inactive'), (('--socket',), 'active'), ((), 'inactive')):
        served.install(*words)
        assert [lab.show(unit, 'ActiveState') for unit in (TOWN, HALL, SOCKET)] == ['active', 'active', state]
        assert served.ask('GET', '/v1/town')['name'] == 'test'


def test_what_is_below_run_and_tmp_is_there_again_after_a_boot(lab: Lab, directory: Path) -> None:
    root = directory / ('deep' * 25)
    place = make_town(root, townhall={'bind': 'unix:/run/test-hall/hall.sock'})
    for _ in range(2):
        lab.service('install', '--town', str(root))
        short = Path((root / '.tt' / 'redis.addr').read_text().strip()).parent
        lab.ctl('stop', TOWN)
        lab.run('rm', '-rf', '/run/test-hall', str(short))
        lab.ctl('start', TOWN, HALL)
        assert 'is open on' in lab.show(HALL, 'StatusText')
    lab.service('uninstall', '--town', str(root))
    place.close()
    short.rmdir()


def test_a_town_of_a_user_who_can_not_read_it_or_has_no_name_is_refused(lab: Lab, tmp_path: Path) -> None:
    closed = tmp_path / 'closed'
    closed.mkdir(mode=0o700)
    root = make_town(closed / 'town').root
    for uid, says in ((65534, "the town's owner, can't run it: /"), (54321, 'belongs to uid 54321, which has no name')):
        os.chown(root, uid, -1)
        done = lab.service('install', '--town', str(root), check=False)
        assert (done.returncode, says in done.stderr) == (2, True), done


def test_a_key_is_proven_in_the_sandbox(served: Served) -> None:
    file = served.place.root / 'key'
    served.place.tt('generate-api-key', '--write', '--to', str(file))
    served.install()
    assert served.ask('GET', '/v1/town', Authorization=f'Bearer {file.read_text().strip()}')['name'] == 'test'


def test_a_configuration_that_is_wrong_is_not_tried_again(served: Served) -> None:
    lab = served.lab
    served.install()
    served.override('Environment=TINYTOWN_TOWNHALL_BIND=0.0.0.0')
    assert lab.run('systemctl', 'restart', HALL, check=False).returncode != 0
    assert (lab.show(HALL, 'ActiveState'), lab.show(HALL, 'ExecMainStatus')) == ('failed', '2')
    assert lab.show(TOWN, 'ActiveState') == 'active', 'the agents work on'


def test_the_service_manager_of_a_user_runs_a_town_too(lab: Lab, directory: Path) -> None:
    lab.ctl('start', 'user-manager.service')
    place = make_town(directory, townhall={'bind': f'unix:{directory}/hall.sock'})
    said = lab.service('install', '--user', '--town', str(directory)).stdout
    assert 'loginctl enable-linger root' in said
    assert 'active, as written' in lab.service('status', '--user', '--town', str(directory)).stdout
    assert lab.show(HALL, 'ActiveState', '--user') == 'active'
    served = Served.__new__(Served)
    served.lab, served.place, served.path = lab, place, directory / 'hall.sock'
    served.spawn()
    assert 'tinytown.worker' in ' '.join(lab.members(TOWN, '--user').values())
    lab.ctl('stop', 'user-manager.service')
    assert lab.run('pgrep', '-f', str(directory), check=False).stdout == ''
    shutil.rmtree(lab.home / '.config')


@pytest.mark.parametrize('name', ['a b', '50%', 'q"t', 'dollar$HOME', 'back\\slash', 'semi;colon'])
def test_a_town_runs_in_a_directory_of_any_name(lab: Lab, directory: Path, name: str) -> None:
    served = Served(lab, directory / name)
    served.install()
    assert served.ask('GET', '/v1/town')['root'] == str(directory / name)
    assert lab.show(HALL, 'ActiveState') == 'active'
    served.place.let_go()
    lab.service('uninstall', '--town', str(directory / name))


def test_what_the_document_says_works(lab: Lab, directory: Path) -> None:
    """Its commands, but for lingering: there is no logind here."""
    project, secrets = directory / 'my-project', directory / 'secrets'
    make_town(project, townhall={'bind': f'unix:{directory}/hall.sock'})
    secrets.mkdir()
    (directory / 'townhall').write_text(f'#!/bin/sh\nexec {sys.executable} -m tinytown.townhall "$@"\n')
    (directory / 'townhall').chmod(0o755)
    for name, text in (('redis-url', f'unix://{directory}/redis.sock'), ('tls.key', 'x'), ('anthropic-key', 'x')):
        (secrets / name).write_text(text)
    document = (Path(__file__).parents[2] / 'docs' / 'service.md').read_text()
    blocks = re.findall(r'<!-- needs: systemd -->\n```sh\n(.*?)```', document, re.S)
    assert len(blocks) == 4
    lab.ctl('start', 'user-manager.service')
    for block in blocks:
        script = re.sub(r'^sudo |^loginctl.*$|#.*', '', block, flags=re.M)
        script = re.sub(r'/srv/my-project|~/src/my-project', str(project), script)
        script = script.replace('/etc/townhall', str(secrets)).replace('./units', str(directory / 'units'))
        script = script.replace('install', 'install --no-start') if 'redis.url' in block else script
        lab.run('bash', '-ec', script, PATH=f'{directory}:{os.environ["PATH"]}')
        user = ['--user'] if '--user' in block else []
        if '--to ' not in block:
            expected = 3 if 'redis.url' in block else 0  # there is no such Redis
            assert lab.service('status', '--town', str(project), *user, check=False).returncode == expected
            lab.service('uninstall', '--town', str(project), *user)
    lab.ctl('stop', 'user-manager.service')


def test_the_units_are_clean_and_their_exposure_is_what_the_document_says(lab: Lab, directory: Path) -> None:
    make_town(directory)
    units = directory / 'units'
    lab.service('install', '--town', str(directory), '--to', str(units), '--socket')
    document = (Path(__file__).parents[2] / 'docs' / 'service.md').read_text()
    for unit in (TOWN, HALL, SOCKET):
        done = subprocess.run(
            ['systemd-analyze', 'verify', str(units / unit)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, '')
        if unit != SOCKET:
            argv = ['systemd-analyze', 'security', '--offline=true', str(units / unit)]
            said = subprocess.run(argv, capture_output=True, text=True, check=False, env={'LANG': 'C.UTF-8'}).stdout
            level = re.search(r'exposure level for \S+: ([\d.]+)', said)
            assert level
            assert f'`{unit.replace("test", "NAME")}` | {level[1]} |' in document
