"""The listening sockets: each is made once, by `http.server`, and none to be thrown away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tinytown.errors import UsageError
from tinytown.http.listener import Listener, open_listeners

from ..support import PATIENCE, environment

# Prints what making listeners asks of the system. An audit hook sees every socket, and stays for good.
WATCHED = """
import os, sys
from http.server import HTTPServer
from tinytown.http.listener import open_listeners
bind, count, passed = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if passed:
    os.dup2(int(passed[0]), 3)
    os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}
seen = []
sys.addaudithook(lambda event, _: seen.append(event))
listeners = open_listeners(bind, 0, count)
assert all(isinstance(each, HTTPServer) for each in listeners)
print(len(listeners), len(set(listeners)), seen.count('socket.__new__'), seen.count('socket.gethostbyaddr'))
"""


def made(*argv: str, fds: tuple[int, ...] = ()) -> list[int]:
    """How many listeners there are, how many different ones, for how many sockets and look-ups of a name."""
    command = [sys.executable, '-c', WATCHED, *argv]
    done = subprocess.run(
        command, env=environment(), pass_fds=fds, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize('bind', ['127.0.0.1', '::1'])
@pytest.mark.parametrize('count', [1, 3])
def test_a_port_costs_a_socket_for_each_process_and_no_look_up(bind: str, count: int) -> None:
    assert made(bind, str(count)) == [count, count, count, 0]


def test_processes_share_the_one_socket_of_a_path(directory: Path) -> None:
    assert made(f'unix:{directory}/hall.sock', '3') == [3, 1, 1, 0]


def test_processes_share_the_one_socket_that_was_passed() -> None:
    with socket.create_server(('127.0.0.1', 0)) as passed:
        number = os.dup(passed.fileno())
        try:
            assert made('127.0.0.1', '2', str(number), fds=(number,)) == [2, 1, 1, 0]
        finally:
            os.close(number)


@pytest.mark.parametrize('count', [1, 2])
def test_an_address_that_another_server_shares_is_not_joined(count: int) -> None:
    first = open_listeners('127.0.0.1', 0, 2)
    try:
        with pytest.raises(UsageError, match='in use; choose another'):
            open_listeners('127.0.0.1', first[0].socket.getsockname()[1], count)
    finally:
        for each in first:
            each.server_close()


def test_the_kernel_spreads_clients_over_the_listeners_of_a_port() -> None:
    listeners = open_listeners('127.0.0.1', 0, 3)
    address = listeners[0].socket.getsockname()
    clients = [socket.create_connection(address, PATIENCE) for _ in range(120)]
    counts = [accepted(each) for each in listeners]
    for client in clients:
        client.close()
    for listener in listeners:
        listener.server_close()
    assert sum(counts) == 120
    assert min(counts) > 0


def accepted(listener: Listener) -> int:
    """How many clients wait in its backlog."""
    listener.socket.setblocking(False)
    count = 0
    while True:
        try:
            listener.get_request()[0].close()
        except BlockingIOError:
            return count
        count += 1
