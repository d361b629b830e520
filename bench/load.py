"""Generates load: wrk measures throughput, new clients one after the other measure the cost of a first request."""

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
    """A server gave a wrong answer, so its speed means nothing."""


@dataclass(frozen=True)
class Ask:
    """A request, with an API key or without, and the status to expect."""

    name: str
    method: str
    path: str
    body: Any = None
    status: int = 200
    key: str = ''

    def send(self, port: int) -> bytes:
        """Sends the request on a new connection. Returns the body of the answer. Raises Wrong for another status."""
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
    """The result of one run of wrk. `rate` is answers per second, p50 and p99 are in ms, `bytes` includes heads.

    `refused` counts answers with an error status, `lost` failed connections and unanswered requests. `cpu` is the CPU
    time of the server's processes per answer, in microseconds.
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
    """Sends a request again and again on `connections` for `seconds`. Raises Wrong if wrk is missing or fails."""
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
    """The times that `count` new clients, one after the other, wait for their first answer: in ms, sorted."""
    return timed(lambda: ask.send(port), count)


def timed(call: Callable[[], object], count: int) -> list[float]:
    """The times that `count` calls take: in ms, sorted."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return sorted(taken)


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value below which the fraction `part` (0 to 1) of the values lies."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]
