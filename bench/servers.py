"""The servers to measure. A `Server` starts one as a process, waits until it is ready, and ends it."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from tests.support import environment

from . import install
from .load import Ask, Wrong
from .stage import Stage

OURS, OURS_TWICE = 'townhall', 'townhall --workers 2'
PYTHON_PEERS = ('fastapi', 'starlette', 'aiohttp')
NAMES = (OURS, OURS_TWICE, *PYTHON_PEERS, 'fastify')
HEALTH = Ask('health', 'GET', '/health')
START_SECS = 20.0
_PEERS = Path(__file__).parent / 'peers'


@lru_cache
def missing(name: str) -> str:
    """Why a server can't run here, or ''. Installs the dependencies of a peer."""
    if name in PYTHON_PEERS:
        return install.python_peers()
    if name == 'fastify':
        return install.node_peer()
    if name == OURS_TWICE:
        done = subprocess.run([*_townhall(), '--help'], env=environment(), capture_output=True, text=True, check=True)
        return '' if '--workers' in done.stdout else 'townhall has no --workers yet'
    return ''


def _townhall() -> list[str]:
    return [sys.executable, '-m', 'tinytown.townhall']


def _command(name: str, stage: Stage, port: int) -> list[str]:
    if name in (OURS, OURS_TWICE):
        return [*_townhall(), *name.split()[1:], '--town', str(stage.root), '--port', str(port)]
    if name in PYTHON_PEERS:
        return [str(install.PYTHON), str(_PEERS / f'with_{name}.py'), str(port), str(stage.settings)]
    return [shutil.which('node') or 'node', str(_PEERS / f'with_{name}.cjs'), str(port), str(stage.settings)]


class Server:
    """A running server on a stage. `took` is the time from exec to its first 200, in seconds.

    `variables` are added to its environment.
    """

    def __init__(self, name: str, stage: Stage, **variables: str) -> None:
        self.name = name
        self.port = _free_port()
        self._log = stage.root / f'{name.replace(" ", "-")}.log'
        env = environment(NODE_PATH=str(install.NODE_MODULES), NODE_ENV='production', **variables)
        with open(self._log, 'ab') as log:
            began = time.perf_counter()
            self._process = subprocess.Popen(
                _command(name, stage, self.port), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._await(began + START_SECS)
        except BaseException:
            self.close()
            raise
        self.took = time.perf_counter() - began

    def _await(self, deadline: float) -> None:
        while True:
            try:
                HEALTH.send(self.port)
                return
            except (OSError, http.client.HTTPException):
                if self._process.poll() is not None or time.perf_counter() > deadline:
                    raise Wrong(f'{self.name} did not start: {self._log.read_text()[-600:]}') from None
            time.sleep(0.002)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # ------------------------------------------------------------------------------------------------- resource usage

    def memory(self) -> int:
        """Resident memory in bytes. With child processes, shared pages are counted once."""
        processes = self._processes()
        return sum(_memory(pid, 'Rss' if len(processes) == 1 else 'Pss') for pid in processes)

    def cpu(self) -> float:
        """CPU time used so far, in seconds."""
        ticks = 0
        for pid in self._processes():
            fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf('SC_CLK_TCK')

    def threads(self) -> int:
        return sum(len(os.listdir(f'/proc/{pid}/task')) for pid in self._processes())

    def _processes(self) -> list[int]:
        pids = [self._process.pid]
        for pid in pids:  # the list grows while we iterate
            for thread in Path(f'/proc/{pid}/task').iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                    pids += map(int, (thread / 'children').read_text().split())
        return pids


def _memory(pid: int, kind: str) -> int:
    """Rss or Pss of a process, in bytes."""
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{kind}:')) * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(names: Iterable[str], stage: Stage) -> Iterator[dict[str, Server]]:
    """Runs several servers at once. Yields them by name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Server(name, stage)) for name in names}
