"""The keeper of a town: the process below which a service manager keeps a town's workers and its Redis.

A service manager counts every process to the service that started it, by control group. What a townhall starts itself
would be stopped with it, or be left over when it is started again, and would live in its sandbox. So the town is a
service of its own whose main process is a keeper. It does one thing: it starts processes for whoever of the same user
asks on the socket `.tt/run/keeper.sock` (a townhall, `tt`). Where no keeper listens, who asks starts them itself.
What is started for an agent has the keeper's variables (its PATH, its HOME, keys of coding CLIs), whoever asks.

In the end it has the town brought to a standstill (standstill.py), below itself: a command that the service manager
runs at a stop could not read the service's credentials. Meanwhile it goes on, for ends are to be collected.

A request is JSON with what `processes.start_detached` takes, up to the end of the sender's side, and with its first
bytes, as SCM_RIGHTS, the descriptors that the process inherits. The answer is {"pid": 7} or {"error": "…"}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from .. import config as configuration
from ..clis import registry
from ..errors import UsageError
from ..settings import Config
from . import sd_notify
from .processes import python, python_path, reap, start_detached
from .town_dir import TownDir

FD: Final = '{fd}'  # in an argv: the number of the first descriptor that is kept
_MOST_KEPT: Final = 8
_TIMEOUT: Final = 10.0  # seconds for a request, and for its answer
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def start(
    root: Path, argv: list[str], cwd: Path, env: dict[str, str], log: Path, keep: Sequence[int] = (), mark: str = ''
) -> int:
    """Starts a process of the town in `root` as `start_detached` does, by its keeper if it has one. Its pid.

    The word `FD` in argv stands for the number of the first one of `keep`, which is another one there. Raises OSError.
    """
    order = {'argv': argv, 'cwd': str(cwd), 'env': env, 'log': str(log), 'mark': mark}
    answer = _ask(root, json.dumps(order).encode(), keep)
    if answer is None:
        return _start(order, keep)
    if 'pid' not in answer:
        raise OSError(f'the keeper of the town did not start it: {answer.get("error")}')
    return int(answer['pid'])


def _start(order: dict[str, Any], keep: Sequence[int]) -> int:
    argv = [str(keep[0]) if word == FD else word for word in order['argv']]
    return start_detached(argv, Path(order['cwd']), order['env'], Path(order['log']), keep, order['mark'])


def _ask(root: Path, request: bytes, keep: Sequence[int]) -> dict[str, Any] | None:
    """The keeper's answer; None if there is no keeper."""
    place = TownDir(root).keeper_socket
    if not place.exists():
        return None
    with socket.socket(socket.AF_UNIX) as sock, _short(place) as path:
        sock.settimeout(_TIMEOUT)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None  # it was killed, and its socket is left
        sent = socket.send_fds(sock, [request], list(keep))
        sock.sendall(request[sent:])
        sock.shutdown(socket.SHUT_WR)
        answer = json.loads(_read_all(sock) or b'{"error": "it went away"}')
        return answer if isinstance(answer, dict) else {}


@contextmanager
def _short(place: Path) -> Iterator[str]:
    """A path for a socket in `place` that is short enough for one, wherever the directory is (Linux)."""
    descriptor = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f'/proc/self/fd/{descriptor}/{place.name}'
    finally:
        os.close(descriptor)


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


# ------------------------------------------------------------------------------------------------------- the process


def main(root: Path) -> int:
    """Keeps the town in `root` until SIGTERM or SIGINT, and ends it then. The exit status: 0 if nothing is left."""
    manager = sd_notify.notifier(os.environ)
    try:
        configuration.take_credentials()
    except UsageError as e:
        raise SystemExit(f'keeper: {e}') from None
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    told: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _frame: told.append(number))
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as listener:
        _listen(listener, root)
        keeper = _Keeper(root)
        manager.ready('Keeps the workers and the Redis of the town')
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        ending: subprocess.Popen[bytes] | None = None
        while ending is None or ending.poll() is None:
            for descriptor, _ in poll.poll():
                if descriptor == wake_read:
                    os.read(wake_read, 4096)
                else:
                    keeper.serve(listener)
            reap()
            if ending is None and {signal.SIGTERM, signal.SIGINT} & set(told):
                ending = keeper.end()
    TownDir(root).keeper_socket.unlink(missing_ok=True)
    return 1 if ending.returncode else 0


def _listen(listener: socket.socket, root: Path) -> None:
    with _short(TownDir(root).made().keeper_socket) as path:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise SystemExit(f'keeper: the town in {root} has a keeper already')
        Path(path).unlink(missing_ok=True)
        mask = os.umask(0o177)
        listener.bind(path)
        os.umask(mask)
    listener.listen()


class _Keeper:
    """Starts what is asked for, and knows the configuration with which that was started."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._config: Config | None = None
        self._look()

    def _look(self) -> None:
        """Takes the configuration of now. Of one that can't be used nothing was started: the one before stays."""
        with suppress(UsageError, OSError):
            self._config = configuration.load(self._root)

    def serve(self, listener: socket.socket) -> None:
        """Answers one request. Whatever is wrong with it, the keeper goes on."""
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(_TIMEOUT)
            descriptors: list[int] = []
            try:
                data, descriptors, _, _ = socket.recv_fds(sock, 65536, _MOST_KEPT)
                answer: dict[str, Any] = {'pid': self._start(json.loads(data + _read_all(sock)), descriptors)}
            except Exception as e:
                answer = {'error': str(e)}
            for descriptor in descriptors:
                os.close(descriptor)
            with suppress(OSError):
                sock.sendall(json.dumps(answer).encode())

    def _start(self, order: dict[str, Any], keep: Sequence[int]) -> int:
        self._look()
        if order['mark'] and self._config:  # what is marked is an agent's
            order['env'] |= registry.environment(self._config, os.environ)
        return _start(order, keep)

    def end(self) -> subprocess.Popen[bytes]:
        """Has the town brought to a standstill, by a process that is told the configuration: the file may be wrong."""
        process = subprocess.Popen(
            python('tinytown.townhall.shutdown', str(self._root)),
            env=os.environ | {'PYTHONPATH': python_path()},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin
        with suppress(OSError), process.stdin as told:
            told.write(json.dumps(self._config and configuration.as_told(self._config)).encode())
        return process


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
