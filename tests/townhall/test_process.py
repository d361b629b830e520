"""Townhall as a server process: several processes, reloads by SIGHUP, unix sockets, late imports."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinytown import config, toml_edit

from ..support import PATIENCE, Hall, Place, environment, make_town, read_all, status_of, until


def children(pid: int) -> list[int]:
    """The serving child processes of a townhall whose parent process is `pid`."""
    pids = []
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if b'townhall' in Path(f'/proc/{child}/cmdline').read_bytes():
                pids.append(int(child))
    return pids


def await_end(pid: int) -> None:
    """Waits until a process has ended that need not be a child of this one."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            assert poll.poll(PATIENCE * 1000), f'{pid} still runs'
        finally:
            os.close(descriptor)


def change(place: Place, **settings: Any) -> None:
    """Changes settings of [townhall] in the town's file; `__` stands for a dot."""
    file = place.root / config.FILE
    text = file.read_text()
    for name, value in settings.items():
        text = toml_edit.change(text, ('townhall', *name.split('__')), value)
    file.write_text(text)


def test_seldom_used_modules_are_not_imported_before_they_are_needed(hall: Hall) -> None:
    rooms = {
        'mcp': ('protocol', 'streamable_http', 'catalog'),
        'rest': ('openapi', 'dashboard'),
        'http': ('tls',),
        'auth': ('oidc',),
        'cli': ('main', 'doctor', 'keys', 'lifecycle', 'ping', 'format', 'follow'),
    }
    late = {f'tinytown.{room}.{module}' for room, modules in rooms.items() for module in modules}
    assert all(importlib.util.find_spec(module) for module in late)
    late |= {'argon2'}
    code = 'import sys, tinytown.townhall.main, tinytown.townhall.process; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True, check=True)
    assert late & set(done.stdout.split()) == set()
    assert [hall.get(path).status for path in ('/', '/openapi.json')] == [200, 200]


# --------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope='module')
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = make_town(tmp_path_factory.mktemp('several'))
    yield made
    made.close()


def test_several_processes_serve_one_port_and_see_one_town(several: Place) -> None:
    hall = several.hall('--workers', '3')
    assert len(children(hall.process.pid)) == 3
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda n: hall.post('/v1/backlog', {'description': f'task {n}'}).status, range(60)))
    assert statuses == [201] * 60
    assert hall.get('/v1/backlog').json['count'] == 60
    inodes = {
        line.split()[9] for line in Path('/proc/net/tcp').read_text().splitlines() if f':{hall.port:04X} ' in line
    }
    assert len(inodes) >= 3


def test_processes_give_different_request_ids(several: Place) -> None:
    hall = several.hall('--workers', '3')
    with ThreadPoolExecutor(8) as pool:
        request_ids = list(pool.map(lambda _: hall.get('/health').headers['x-request-id'], range(100)))
    assert len(set(request_ids)) == 100
    assert len({request_id[:10] for request_id in request_ids}) > 1, 'only one process was asked'


def ask_to_wait(hall: Hall, agent: str, seconds: int) -> socket.socket:
    """A connection on which a request to wait for an agent has been sent."""
    sock = hall.connect()
    body = b'{"timeout":%d}' % seconds
    head = b'POST /v1/agents/%b/wait HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n' % agent.encode()
    sock.sendall(head + b'Content-Length: %d\r\n\r\n' % len(body) + body)
    return sock


def test_sigterm_ends_all_processes_after_they_answered_their_requests(several: Place) -> None:
    hall = several.hall('--workers', '2')
    pids = children(hall.process.pid)
    several.do('agent.spawn', name='waits')
    socks = [ask_to_wait(hall, 'waits', 2) for _ in range(4)]
    hall.process.send_signal(signal.SIGTERM)
    assert [status_of(read_all(sock)) for sock in socks] == [200] * 4
    assert hall.process.wait(PATIENCE) == 0
    for pid in pids:
        await_end(pid)
    for sock in socks:
        sock.close()
    several.do('agent.kill', agent='waits')


def test_a_process_group_that_is_signalled_twice_still_drains(several: Place) -> None:
    hall = several.hall('--workers', '2')
    several.do('agent.spawn', name='lingers')
    with ask_to_wait(hall, 'lingers', 2) as sock:
        for pid in (*children(hall.process.pid), hall.process.pid):  # as a service manager does
            os.kill(pid, signal.SIGTERM)
        assert status_of(read_all(sock)) == 200
    assert hall.process.wait(PATIENCE) == 0
    several.do('agent.kill', agent='lingers')


def test_a_killed_process_is_replaced(several: Place) -> None:
    hall = several.hall('--workers', '2')
    first = children(hall.process.pid)[0]
    os.kill(first, signal.SIGKILL)
    hall.said(r'process \d ended \(status -9\) and is replaced')
    deadline = time.monotonic() + PATIENCE
    while len(children(hall.process.pid)) < 2:
        assert time.monotonic() < deadline
    assert first not in children(hall.process.pid)
    assert {hall.get('/health').status for _ in range(20)} == {200}


def test_the_processes_end_when_their_parent_is_killed(several: Place) -> None:
    hall = several.hall('--workers', '2')
    pids = children(hall.process.pid)
    hall.kill()
    for pid in pids:
        await_end(pid)


def test_a_port_of_another_townhall_is_refused_also_with_several_processes(several: Place) -> None:
    hall = several.hall('--workers', '2')
    argv = [sys.executable, '-m', 'tinytown.townhall', '--town', str(several.root), '--port', str(hall.port)]
    for more in ([], ['--workers', '2']):
        done = subprocess.run(argv + more, env=environment(), capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, '')
        assert 'Address already in use' in done.stderr


def test_the_limits_are_shared_among_the_processes(several: Place) -> None:
    hall = several.hall('--workers', '2', TINYTOWN_TOWNHALL_LIMITS_CONNECTIONS='8')
    held, served = [], 0
    for _ in range(40):
        sock = hall.connect()
        sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
        held.append(sock)
        answer = sock.recv(4096)
        assert status_of(answer) in (200, 503)
        served += status_of(answer) == 200
    for sock in held:
        sock.close()
    assert served == 8


# ---------------------------------------------------------------------------------------------------------- reloading


@pytest.mark.parametrize('flags', [(), ('--workers', '2')])
def test_sighup_reloads_the_configuration(place: Place, flags: tuple[str, ...]) -> None:
    hall = place.hall(*flags)
    assert hall.get('/health', Host='town.example').status == 421
    change(place, allowed_hosts=['town.example'], limits__body_bytes=1024)
    hall.process.send_signal(signal.SIGHUP)
    assert hall.said('was reloaded').count('was reloaded') == 1
    deadline = time.monotonic() + PATIENCE
    while {hall.get('/health', Host='town.example').status for _ in range(40)} != {200}:  # 40 reach all processes
        assert time.monotonic() < deadline
    assert hall.post('/v1/backlog', {'description': 'x' * 2000}).status == 413


def test_a_wrong_configuration_leaves_the_old_one_in_force(place: Place) -> None:
    change(place, allowed_hosts=['town.example'])
    hall = place.hall()
    file = place.root / config.FILE
    right = file.read_text()
    file.write_text(right + '\n[townhal]\nbind = 1\n')
    hall.process.send_signal(signal.SIGHUP)
    assert 'did you mean townhall?' in hall.said(r'was not reloaded, the old one stays in force')
    file.write_text(right)
    assert hall.get('/health', Host='town.example').status == 200


def test_a_replacement_process_starts_with_the_last_reloaded_configuration(place: Place) -> None:
    hall = place.hall('--workers', '2')
    assert hall.get('/v1/status').status == 200
    place.tt('generate-api-key', '--write')
    hall.process.send_signal(signal.SIGHUP)
    hall.said('was reloaded')
    until(lambda: {hall.get('/v1/status').status for _ in range(10)} == {401})
    killed = set(children(hall.process.pid))
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(children(hall.process.pid)) - killed) == 2)
    assert {hall.get('/v1/status').status for _ in range(20)} == {401}


@pytest.mark.parametrize('flags', [(), ('--workers', '2')])
@pytest.mark.parametrize('slip', ['max_agents = ' + '9' * 5000, '[[[', 'x = 1', 'name = "\\ud800"'])
def test_a_reload_of_a_broken_file_does_not_end_a_townhall(place: Place, flags: tuple[str, ...], slip: str) -> None:
    hall = place.hall(*flags)
    file = place.root / config.FILE
    right = file.read_text()
    file.write_text(f'{slip}\n{right}')
    hall.process.send_signal(signal.SIGHUP)
    assert 'Traceback' not in hall.said('the old one stays in force')
    file.write_text(right)
    assert hall.get('/v1/status').status == 200


def test_a_sighup_during_the_start_does_not_end_a_townhall(place: Place) -> None:
    place.town.store.close()
    argv = [sys.executable, '-m', 'tinytown.townhall', '--town', str(place.root), '--port', '0']
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        status = Path(f'/proc/{process.pid}/status')
        until(lambda: int(re.search(r'SigCgt:\s*(\w+)', status.read_text())[1], 16) & 1 << signal.SIGHUP - 1)  # type: ignore[index]
        process.send_signal(signal.SIGHUP)
        assert 'is open on' in process.stderr.readline()
        process.terminate()
        process.communicate()
    assert process.returncode == 0


def test_waiting_requests_leave_threads_for_changes(place: Place) -> None:
    hall = place.hall()
    place.do('agent.spawn', name='waits')
    held = [ask_to_wait(hall, 'waits', 20) for _ in range(70)]
    refused: list[socket.socket] = []
    while len(refused) < 70 - 64:
        [*ready] = select.select([sock for sock in held if sock not in refused], [], [], PATIENCE)[0]
        assert ready
        assert {status_of(sock.recv(4096)) for sock in ready} == {503}
        refused += ready
    assert hall.post('/v1/agents/waits/kill', {'force': True}).status == 200
    assert {status_of(sock.recv(4096)) for sock in held if sock not in refused} == {200}
    for sock in held:
        sock.close()


def test_a_new_key_turns_on_authentication_at_once(place: Place) -> None:
    hall = place.hall()
    assert hall.get('/v1/status').status == 200
    done = place.tt('generate-api-key', '--write').stdout
    assert 'From now on, townhall asks every caller for a key.' in done
    hall.said('was reloaded')
    assert hall.get('/v1/status').status == 401
    key = re.search(r'^key +(\S+)', done, re.M)
    assert key
    assert hall.get('/v1/status', X_API_Key=key[1]).status == 200
    file = place.root / 'key'
    file.write_text(key[1])
    url = f'http://{hall.address}:{hall.port}'
    assert 'give a key that is valid there: --api-key-file F' in place.tt('list', '--url', url, check=False).stderr
    assert place.tt_json('list', '--url', url, '--api-key-file', str(file))['count'] == 0


def test_a_running_townhall_reloads_a_changed_setting(place: Place) -> None:
    hall = place.hall()
    assert (
        'the running townhall reloads its configuration'
        in place.tt('config', 'townhall.allowed_hosts', 'town.example').stdout
    )
    hall.said('was reloaded')
    assert hall.get('/health', Host='town.example').status == 200
    assert 'stay with the Redis that they started with' in place.tt('config', 'redis.url', 'redis://db').stdout
    place.tt('config', 'redis.url', '')


def test_a_reload_names_the_settings_that_need_a_restart(place: Place) -> None:
    hall = place.hall()
    change(place, workers=2, allowed_hosts=['town.example'])
    hall.process.send_signal(signal.SIGHUP)
    hall.said(r'was reloaded; townhall\.workers must wait for a restart')
    assert hall.get('/health', Host='town.example').status == 200


# ------------------------------------------------------------------------------------------------------- unix sockets


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__('localhost', timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def on_socket(place: Place, path: Path, *flags: str) -> subprocess.Popen[str]:
    """A townhall that listens on a unix socket, once it is open."""
    argv = [sys.executable, '-m', 'tinytown.townhall', '--town', str(place.root), '--bind', f'unix:{path}', *flags]
    process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for wanted in (f'test is open on unix:{path}', f'try  curl -s --unix-socket {path} http://localhost/v1/status'):
        time, _, line = process.stderr.readline().partition(' ')
        assert (time[-1:], line) == ('Z', f'townhall: {wanted}\n')
    return process


def end(process: subprocess.Popen[str]) -> str:
    """Ends a townhall by SIGTERM, and returns the rest of its log."""
    process.terminate()
    log = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0
    return log


@pytest.mark.parametrize('flags', [(), ('--workers', '2')])
def test_a_unix_socket_may_be_opened_only_by_its_user(place: Place, tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / 'hall.sock'
    process = on_socket(place, path, *flags)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection = UnixConnection(path)
    for _ in range(2):
        connection.request('GET', '/v1/status')
        assert connection.getresponse().read().startswith(b'{"name": "test"')
    connection.close()
    end(process)
    assert not path.exists()


def test_the_socket_of_a_dead_townhall_is_replaced_and_that_of_a_live_one_is_not(place: Place, tmp_path: Path) -> None:
    path = tmp_path / 'hall.sock'
    process = on_socket(place, path)
    process.kill()
    process.communicate()
    assert path.exists()
    process = on_socket(place, path)
    argv = [sys.executable, '-m', 'tinytown.townhall', '--town', str(place.root), '--bind', f'unix:{path}']
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, 'another server listens on it' in done.stderr) == (2, True)
    end(process)


@pytest.mark.parametrize(
    ('path', 'says'),
    [
        ('relative.sock', 'give an absolute path'),
        ('/proc/version', 'this file is not a socket'),
        ('/nowhere/hall.sock', 'No such file or directory'),
        ('/proc/' + 'x' * 120, 'too long'),
    ],
)
def test_an_unusable_socket_path_is_refused(place: Place, path: str, says: str) -> None:
    argv = [sys.executable, '-m', 'tinytown.townhall', '--town', str(place.root), '--bind', f'unix:{path}']
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, '')
    assert re.fullmatch(rf'townhall: [^\n]*{re.escape(path)}[^\n]*{says}[^\n]*\n', done.stderr), done.stderr


def test_raw_requests_are_answered_on_a_unix_socket(place: Place, tmp_path: Path) -> None:
    path = tmp_path / 'hall.sock'
    process = on_socket(place, path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        assert status_of(read_all(sock)) == 200
    assert re.search(r'unix GET /health 200 ', end(process))
