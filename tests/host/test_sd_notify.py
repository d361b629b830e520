"""Notifications to a service manager, on a real datagram socket; and the listening sockets that it passes."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinytown.host import sd_notify

from ..support import PATIENCE, REPOSITORY, Place, environment, read_all, redis_pid, status_of, until


class Manager:
    """The notification socket of a service manager. Each message is a dictionary."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind('\0' + address[1:] if address.startswith('@') else address)
        self._sock.settimeout(PATIENCE)

    def hears(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split('=', 1) for line in self._sock.recv(4096).decode().splitlines())

    def hears_of(self, name: str) -> dict[str, str]:
        """The next message that has the field `name`."""
        while name not in (message := self.hears()):
            pass
        return message

    def forget(self) -> None:
        """Drops the messages that have arrived."""
        self._sock.setblocking(False)
        try:
            while True:
                self._sock.recv(4096)
        except BlockingIOError:
            self._sock.settimeout(PATIENCE)

    def silent(self, seconds: float) -> bool:
        """Whether no message arrives for so long."""
        return not select.select([self._sock], [], [], seconds)[0]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=['path', 'abstract'])
def manager(request: pytest.FixtureRequest, directory: Path) -> Iterator[Manager]:
    made = Manager(
        str(directory / 'notify') if request.param == 'path' else f'@tinytown-{directory.name}-{os.getpid()}'
    )
    yield made
    made.close()


@pytest.fixture
def ear(directory: Path) -> Iterator[Manager]:
    made = Manager(str(directory / 'notify'))
    yield made
    made.close()


def test_notifications_go_to_either_kind_of_socket_and_its_address_leaves_the_environment(manager: Manager) -> None:
    environ = {'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '3000000', 'WATCHDOG_PID': str(os.getpid()), 'A': 'b'}
    notifier = sd_notify.notifier(environ)
    assert environ == {'A': 'b'}
    assert (bool(notifier), notifier.watchdog_secs) == (True, 3.0)
    notifier.reloading()  # sends nothing before it is ready
    notifier.ready('open')
    assert manager.hears() == {'READY': '1', 'STATUS': 'open'}
    notifier.reloading()
    message = manager.hears()
    assert message['RELOADING'] == '1'
    assert int(message['MONOTONIC_USEC']) > 0


@pytest.mark.parametrize(
    ('environ', 'watchdog'),
    [
        ({}, 0.0),
        ({'WATCHDOG_USEC': '3000000', 'WATCHDOG_PID': '1'}, 0.0),
        ({'WATCHDOG_USEC': 'soon'}, 0.0),
        ({'WATCHDOG_USEC': '500000'}, 0.5),
    ],
)
def test_a_watchdog_for_another_pid_is_ignored(environ: dict[str, str], watchdog: float) -> None:
    notifier = sd_notify.notifier(environ)
    assert (bool(notifier), notifier.watchdog_secs) == (False, watchdog)
    notifier.ready('no manager receives it')


def test_a_notification_to_a_missing_socket_is_logged_and_raises_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sd_notify.Notifier('/nowhere/notify').ready('open')
    assert "can't notify the service manager of READY=1: No such file" in capfd.readouterr().err


def test_townhall_notifies_that_it_is_ready_reloads_is_alive_and_stops(place: Place, ear: Manager) -> None:
    hall = place.hall(NOTIFY_SOCKET=ear.address, WATCHDOG_USEC='4000000')
    ready = ear.hears()
    assert ready == {'READY': '1', 'STATUS': f'test is open on http://127.0.0.1:{hall.port}'}
    assert ear.hears() == {'WATCHDOG': '1'}
    hall.process.send_signal(signal.SIGHUP)
    assert ear.hears_of('RELOADING')['MONOTONIC_USEC']
    assert ear.hears() == {'READY': '1'}
    with hall.connect() as sock:
        sock.sendall(b'POST /v1/agents/x/wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n')
        hall.process.send_signal(signal.SIGTERM)  # it drains, because the body has not arrived
        assert int(ear.hears_of('STOPPING')['EXTEND_TIMEOUT_USEC']) >= 5_000_000
        assert ear.hears()['WATCHDOG'] == '1', 'the watchdog must not take a drain for a hang'
        sock.sendall(b'{}')
        read_all(sock)
    assert hall.process.wait(PATIENCE) == 0


def test_townhall_sends_no_watchdog_notification_while_redis_hangs(place: Place, ear: Manager) -> None:
    hall = place.hall(NOTIFY_SOCKET=ear.address, WATCHDOG_USEC='4000000')
    ear.hears_of('WATCHDOG')
    server = redis_pid(place)
    os.kill(server, signal.SIGSTOP)
    until(lambda: Path(f'/proc/{server}/stat').read_text().rpartition(')')[2].split()[0] == 'T')
    try:
        assert hall.get('/ready').status == 503  # by then no reply of Redis can still be on its way
        ear.forget()
        assert ear.silent(1.5)
    finally:
        os.kill(server, signal.SIGCONT)
    assert ear.hears_of('WATCHDOG')


def test_the_parent_of_several_processes_notifies_for_all_and_replaces_one_that_hangs(
    place: Place, ear: Manager
) -> None:
    hall = place.hall('--workers', '2', NOTIFY_SOCKET=ear.address, WATCHDOG_USEC='3000000')
    assert ear.hears()['READY'] == '1'
    assert ear.hears() == {'WATCHDOG': '1'}
    children = Path(f'/proc/{hall.process.pid}/task/{hall.process.pid}/children')
    served = [pid for pid in children.read_text().split() if b'townhall' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    os.kill(int(served[0]), signal.SIGSTOP)
    hall.said('process . hung for 1.5 s and is killed')
    ear.forget()
    assert ear.hears_of('WATCHDOG')
    hall.process.send_signal(signal.SIGTERM)
    assert ear.hears_of('STOPPING')
    assert hall.process.wait(PATIENCE) == 0


def test_an_agent_gets_no_variables_of_the_service_manager(place: Place, ear: Manager) -> None:
    place.tt('config', 'agent_clis.env', "sh -c 'env | grep -c -e ^NOTIFY_ -e ^WATCHDOG_ -e ^LISTEN_ || true'")
    hall = place.hall(NOTIFY_SOCKET=ear.address, WATCHDOG_USEC='4000000')
    hall.post('/v1/agents', {'name': 'env', 'cli': 'env'})
    task = hall.post('/v1/tasks/assign', {'agent': 'env', 'task': 'look'}).json['task_id']
    assert place.await_end(task)['result'].strip() == '0'


# ---------------------------------------------------------------------------------------------------- passed sockets

_PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': sys.argv[2], 'LISTEN_FDNAMES': sys.argv[3]}
os.execv(sys.executable, [sys.executable, '-m', 'tinytown.townhall', *sys.argv[4:]])
"""


@contextmanager
def passing(
    listener: socket.socket, *words: str, count: int = 1, names: str = 'rest'
) -> Iterator[subprocess.Popen[str]]:
    """A townhall that gets a listening socket from its service manager."""
    argv = [sys.executable, '-c', _PASS, str(listener.fileno()), str(count), names, *words]
    with subprocess.Popen(
        argv, env=environment(), stderr=subprocess.PIPE, text=True, pass_fds=(listener.fileno(),), cwd=REPOSITORY
    ) as process:
        yield process
        process.terminate()


def listening() -> socket.socket:
    sock = socket.create_server(('127.0.0.1', 0))
    sock.settimeout(PATIENCE)
    return sock


@pytest.mark.parametrize('flags', [(), ('--workers', '2')])
def test_a_client_that_connects_before_townhall_runs_waits_in_the_passed_socket(
    place: Place, flags: tuple[str, ...]
) -> None:
    _ = place.town
    with listening() as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(('127.0.0.1', port), PATIENCE) as early:
            early.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
            with passing(listener, '--town', str(place.root), '--port', str(port), *flags):
                assert status_of(read_all(early)) == 200


@pytest.mark.parametrize(
    ('flags', 'count', 'names', 'says'),
    [
        (
            ('--port', '9'),
            1,
            'rest',
            r'passed socket is http://127.0.0.1:\d+, but townhall.bind and the port say 127.0.0.1:9',
        ),
        (('--bind', '::1', '--port', '0'), 1, 'rest', r'say ::1:0; make them equal'),
        (('--bind', 'unix:/tmp/x.sock'), 1, 'rest', r'say unix:/tmp/x.sock'),
        (('--port', '0'), 2, 'a:b', r'LISTEN_FDS=2: 0 of the passed sockets.*FileDescriptorName=rest'),
        (('--port', '0'), 0, '', r'LISTEN_FDS=0: 0 of the passed sockets'),
    ],
)
def test_a_passed_socket_that_does_not_match_the_settings_is_refused(
    ground: Place, flags: tuple[str, ...], count: int, names: str, says: str
) -> None:
    with (
        listening() as listener,
        passing(listener, '--town', str(ground.root), *flags, count=count, names=names) as hall,
    ):
        assert hall.stderr is not None
        stderr = hall.stderr.read()
        assert re.search(says, stderr), stderr
        assert hall.wait(PATIENCE) == 2
