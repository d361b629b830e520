"""The spawner: the main process of a town that is a service. It starts the town's workers and its Redis.

A service manager assigns every process to the service that started it, by control group. If a townhall started workers
itself, they would live in its sandbox, and would stop with its service or be left over from it. So the town is a
service of its own, and its main process is the spawner. It listens on the socket `.tt/run/keeper.sock`, which only its
own user can reach, and starts processes for townhalls and `tt`. Without a spawner, `start` starts the process itself.
An agent's process gets the spawner's PATH, HOME and coding CLI keys, whichever client asked for it.

At SIGTERM the spawner stops the town: it runs `townhall.shutdown` as a child process. (A stop command of the service
manager could not read the service's credentials.) Meanwhile it continues to serve and to collect exit statuses.

The protocol: a request is JSON with the arguments of `processes.start_detached`; the client then closes its sending
side. The descriptors for the process come with the first bytes (SCM_RIGHTS). The answer is {"pid": 7} or
{"error": "…"}.
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
from ..console import complain
from ..errors import UsageError
from ..settings import Config
from ..trust import check_town
from . import sd_notify
from .processes import python, python_path, reap, start_detached
from .town_dir import TownDir

FD: Final = '{fd}'  # in an argv, stands for the number of the first inherited descriptor
_MAX_FDS: Final = 8
_TIMEOUT: Final = 10.0  # seconds, for a request and for its answer
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def start(
    root: Path, argv: list[str], cwd: Path, env: dict[str, str], log: Path, fds: Sequence[int] = (), mark: str = ''
) -> int:
    """Starts a process of the town in `root`, through the town's spawner if it has one. Returns the pid.

    The arguments are those of `start_detached`. The number of the first of `fds` replaces the word `FD` in argv: a
    descriptor has another number in the spawner. Raises OSError.
    """
    order = {'argv': argv, 'cwd': str(cwd), 'env': env, 'log': str(log), 'mark': mark}
    answer = _ask(root, json.dumps(order).encode(), fds)
    if answer is None:
        return _start(order, fds)
    if 'pid' not in answer:
        raise OSError(f"the town's spawner did not start the process: {answer.get('error')}")
    return int(answer['pid'])


def _start(order: dict[str, Any], fds: Sequence[int]) -> int:
    argv = [str(fds[0]) if word == FD else word for word in order['argv']]
    return start_detached(argv, Path(order['cwd']), order['env'], Path(order['log']), fds, order['mark'])


def _ask(root: Path, request: bytes, fds: Sequence[int]) -> dict[str, Any] | None:
    """Sends a request to the spawner and returns its answer; None if no spawner runs."""
    file = TownDir(root).spawner_socket
    if not file.exists():
        return None
    with socket.socket(socket.AF_UNIX) as sock, _short_path(file) as path:
        sock.settimeout(_TIMEOUT)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None  # a killed spawner leaves its socket
        sent = socket.send_fds(sock, [request], list(fds))
        sock.sendall(request[sent:])
        sock.shutdown(socket.SHUT_WR)
        answer = json.loads(_read_all(sock) or b'{"error": "it closed the connection"}')
        return answer if isinstance(answer, dict) else {}


@contextmanager
def _short_path(file: Path) -> Iterator[str]:
    """Another path of `file` that is short enough for a socket's address, however deep its directory is (Linux)."""
    descriptor = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f'/proc/self/fd/{descriptor}/{file.name}'
    finally:
        os.close(descriptor)


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


# ------------------------------------------------------------------------------------------------------- the process


def main(root: Path) -> int:
    """Serves the town in `root` until SIGTERM or SIGINT, and then stops the town. Returns 0 if no process is left."""
    manager = sd_notify.notifier(os.environ)
    try:
        configuration.take_credentials()
        check_town(root)
    except UsageError as e:
        raise SystemExit(complain('spawner', e)) from None
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    received: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _frame: received.append(number))
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX) as listener:
        _listen(listener, root)
        spawner = _Spawner(root)
        manager.ready('Starts the workers and the Redis of the town')
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        shutdown: subprocess.Popen[bytes] | None = None
        while shutdown is None or shutdown.poll() is None:
            for descriptor, _ in poll.poll():
                if descriptor == wake_read:
                    os.read(wake_read, 4096)
                else:
                    spawner.serve(listener)
            reap()
            if shutdown is None and {signal.SIGTERM, signal.SIGINT} & set(received):
                shutdown = spawner.shut_down()
    TownDir(root).spawner_socket.unlink(missing_ok=True)
    return 1 if shutdown.returncode else 0


def _listen(listener: socket.socket, root: Path) -> None:
    with _short_path(TownDir(root).create().spawner_socket) as path:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise SystemExit(f'spawner: the town in {root} has a spawner already')
        Path(path).unlink(missing_ok=True)
        mask = os.umask(0o177)
        listener.bind(path)
        os.umask(mask)
    listener.listen()


class _Spawner:
    """Starts processes on request, and remembers the last valid configuration for the shutdown of the town."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._config: Config | None = None
        self._reload()

    def _reload(self) -> None:
        """Loads the configuration. Keeps the previous one if it is invalid: no process can have started with that."""
        with suppress(UsageError, OSError):
            self._config = configuration.load(self._root)

    def serve(self, listener: socket.socket) -> None:
        """Answers one request. A bad request or a failed start becomes an error answer and never ends the spawner."""
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(_TIMEOUT)
            descriptors: list[int] = []
            try:
                data, descriptors, _, _ = socket.recv_fds(sock, 65536, _MAX_FDS)
                answer: dict[str, Any] = {'pid': self._start(json.loads(data + _read_all(sock)), descriptors)}
            except Exception as e:
                answer = {'error': str(e)}
            for descriptor in descriptors:
                os.close(descriptor)
            with suppress(OSError):
                sock.sendall(json.dumps(answer).encode())

    def _start(self, order: dict[str, Any], fds: Sequence[int]) -> int:
        self._reload()
        if order['mark'] and self._config:  # only an agent's worker comes with a mark
            order['env'] |= registry.worker_environment(self._config, os.environ)
        return _start(order, fds)

    def shut_down(self) -> subprocess.Popen[bytes]:
        """Starts the process that stops the town. It gets the configuration on stdin: the file may be invalid now."""
        process = subprocess.Popen(
            python('tinytown.townhall.shutdown', str(self._root)),
            env=os.environ | {'PYTHONPATH': python_path()},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin
        with suppress(OSError), process.stdin as stdin:
            stdin.write(json.dumps(self._config and configuration.to_values(self._config)).encode())
        return process


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
