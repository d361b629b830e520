"""Compares MCP with an equal server on the official Python SDK: python -m bench.mcp [--calls N].

Both serve the same town to the same client in turns, over stdio and over HTTP, with tools that do the same in Redis.
Cold start is the time from exec to the answer to `server/discover`; memory is resident memory after the calls.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.mcp_client import META
from tests.support import REPOSITORY, environment, make_town

PEER: Final = REPOSITORY / 'bench' / 'peers' / 'with_mcp.py'
TOWNHALL: Final = REPOSITORY / 'townhall.py'
TOOLS: Final[dict[str, dict[str, Any]]] = {'town_get_status': {}, 'backlog_add': {'description': 'x', 'tags': ['y']}}
ROUND: Final = 50

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


def request(method: str, params: dict[str, Any]) -> bytes:
    return json.dumps({'jsonrpc': '2.0', 'id': 1, 'method': method, 'params': params | {'_meta': META}}).encode()


@contextmanager
def over_stdio(name: str, root: Path) -> Iterator[tuple[Ask, int]]:
    """Runs a server as a child process. Yields a function that sends it requests, and its pid."""
    argv = [TOWNHALL, 'mcp-stdio', '--town', root] if name == 'townhall' else [PEER, 'stdio', root]
    command = [sys.executable, *map(str, argv)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    assert process.stdin
    assert process.stdout
    source, sink = process.stdout, process.stdin

    def ask(method: str, params: dict[str, Any]) -> dict[str, Any]:
        sink.write(request(method, params) + b'\n')
        sink.flush()
        reply: dict[str, Any] = json.loads(source.readline())
        return reply

    yield ask, process.pid
    process.kill()
    process.communicate()


@contextmanager
def over_http(name: str, root: Path) -> Iterator[tuple[Ask, int]]:
    """Runs a server on a port. Yields a function that sends it requests on one connection, and its pid."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    argv = [TOWNHALL, 'mcp-http', '--town', root, '--port', port] if name == 'townhall' else [PEER, 'http', root, port]
    command = [sys.executable, *map(str, argv)]
    settings = environment(TINYTOWN_TOWNHALL_ACCESS_LOG='off')
    process = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection('127.0.0.1', port)
    while connection.sock is None:
        try:
            connection.connect()
        except ConnectionRefusedError:
            time.sleep(0.002)

    def ask(method: str, params: dict[str, Any]) -> dict[str, Any]:
        head = {
            'Content-Type': 'application/json',
            'Accept': 'application/json, text/event-stream',
            'MCP-Protocol-Version': '2026-07-28',
            'Mcp-Method': method,
        }
        head |= {'Mcp-Name': params['name']} if 'name' in params else {}
        connection.request('POST', '/mcp', request(method, params), head)
        body = connection.getresponse().read()
        data = body.partition(b'data: ')[2] if body.startswith(b'event') else body
        reply: dict[str, Any] = json.loads(data)
        return reply

    yield ask, process.pid
    connection.close()
    process.kill()
    process.wait()


TRANSPORTS: Final = {'stdio': over_stdio, 'http': over_http}


def measure(ask: Ask, tool: str, count: int) -> list[float]:
    """The round trips of `count` calls of a tool, in ms."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        reply = ask('tools/call', {'name': tool, 'arguments': TOOLS[tool]})
        times.append((time.perf_counter() - began) * 1000)
        assert not reply['result'].get('isError'), reply
    return times


def cold(name: str, transport: str, root: Path) -> float:
    """The time from exec to the first answer, in ms."""
    began = time.perf_counter()
    with TRANSPORTS[transport](name, root) as (ask, _):
        assert ask('server/discover', {})['result']
        return (time.perf_counter() - began) * 1000


def resident(pid: int) -> float:
    """The resident memory of a process, in MB."""
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGESIZE') / 1e6


def compare(transport: str, root: Path, calls: int) -> None:
    names = ('townhall', 'sdk')
    starts = {name: [] for name in names}  # type: dict[str, list[float]]
    for _ in range(7):
        for name in names:
            starts[name].append(cold(name, transport, root))
    open_one = TRANSPORTS[transport]
    with open_one('townhall', root) as (ours, our_pid), open_one('sdk', root) as (theirs, their_pid):
        clients, pids = {'townhall': ours, 'sdk': theirs}, {'townhall': our_pid, 'sdk': their_pid}
        for tool in TOOLS:
            times: dict[str, list[float]] = {name: [] for name in names}
            for name in names:
                measure(clients[name], tool, ROUND)
            for _ in range(calls // ROUND):
                for name in names:
                    times[name] += measure(clients[name], tool, ROUND)
            for name in names:
                median, p99 = statistics.median(times[name]), statistics.quantiles(times[name], n=100)[98]
                print(f'{transport:6} {tool:16} {name:9} median {median:7.3f} ms   p99 {p99:7.3f} ms')
        for name in names:
            start, memory = statistics.median(starts[name]), resident(pids[name])
            print(f'{transport:6} {"cold start":16} {name:9} median {start:7.1f} ms   memory {memory:5.1f} MB')


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m bench.mcp', description=__doc__)
    parser.add_argument('--calls', type=int, default=1000, help='number of calls per tool')
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as directory:
        place = make_town(Path(directory) / 't')
        assert place.town
        try:
            for transport in TRANSPORTS:
                compare(transport, place.root, calls)
        finally:
            place.close()


if __name__ == '__main__':
    main()
