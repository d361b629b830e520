"""Load: wrk for throughput, and new clients one after the other for what the first request of each costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name('load.lua')


class Wrong(Exception):
    """A server did not do what was asked of it, so that its speed means nothing."""


@dataclass(frozen=True)
class Ask:
    """A request, with an API key or none, and the status of its answer."""

    name: str
    method: str
    path: str
    body: Any = None
    status: int = 200
    key: str = ''

    def send(self, port: int) -> bytes:
        """The body of the answer, on a connection of its own. Raises Wrong."""
        connection = HTTPConnection('127.0.0.1', port, timeout=10)
        try:
            headers = {'Content-Type': 'application/json'} if self.body else {}
            if self.key:
                headers['Authorization'] = f'Bearer {self.key}'
            connection.request(self.method, self.path, json.dumps(self.body) if self.body else None, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != self.status:
            raise Wrong(f'{self.method} {self.path}: {response.status} {data[:300]!r}')
        return data


@dataclass(frozen=True)
class Load:
    """What one run of wrk found. `rate` is answers a second, p50 and p99 are milliseconds; bytes counts heads too.

    `refused` are answers with an error status, `lost` are connections that failed or requests without an answer;
    `cpu` is what the server's processes used for one answer, in microseconds.
    """

    requests: int
    seconds: float
    bytes: int
    p50: float
    p99: float
    refused: int
    lost: int
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        return self.served / self.seconds

    @property
    def served(self) -> int:
        return self.requests - self.refused

    def figures(self) -> dict[str, float]:
        return asdict(self) | {'rate': self.rate}


def wrk(ask: Ask, port: int, connections: int, seconds: int) -> Load:
    """Asks for `seconds` on so many connections at once. Raises Wrong if wrk is not there or fails."""
    if not (program := shutil.which('wrk')):
        raise Wrong('wrk is needed:  apt install wrk')
    arguments = [ask.method, json.dumps(ask.body) if ask.body else '', ask.key]
    command = [program, '-t1', f'-c{connections}', f'-d{seconds}', '-s', str(_SCRIPT)]
    command += [f'http://127.0.0.1:{port}{ask.path}', '--', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
    if done.returncode:
        raise Wrong(f'wrk failed: {done.stderr or done.stdout}')
    return Load(**json.loads(done.stdout.strip().splitlines()[-1]))


def newcomers(ask: Ask, port: int, count: int) -> list[float]:
    """How long so many new clients wait for their first answer, one after the other, in milliseconds, sorted."""
    return timed(lambda: ask.send(port), count)


def timed(what: Callable[[], object], count: int) -> list[float]:
    """How long each of so many calls takes, in milliseconds, sorted."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        what()
        taken.append((time.perf_counter() - began) * 1000)
    return sorted(taken)


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]
