"""Test support: towns in temporary directories, real servers, real clients, and waiting for conditions."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tinytown import config
from tinytown.core.dispatch import call, encode_answer
from tinytown.core.operations import BY_NAME
from tinytown.core.town import Town, open_town
from tinytown.errors import TownError, Unavailable
from tinytown.host import managed_redis
from tinytown.model import ALL_SCOPES, Principal
from tinytown.state.store import Store, text
from tinytown.toml_edit import to_toml

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 20.0  # seconds to wait for something before the test fails
LONG = 3 * PATIENCE  # for what takes ten seconds or so by design, such as a failover
OPERATOR = Principal('operator', ALL_SCOPES)


class Reply(NamedTuple):
    """An HTTP answer. `json` is its decoded body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def environment(**more: str) -> dict[str, str]:
    """Our environment without Tinytown settings, with this checkout importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith('TINYTOWN_')}
    kept['PYTHONPATH'] = str(REPOSITORY)
    if server := os.environ.get('TINYTOWN_REDIS_SERVER'):
        kept['TINYTOWN_REDIS_SERVER'] = server
    return kept | more


@dataclass
class Place:
    """A town in a directory of its own, with helpers for tests."""

    root: Path
    halls: list[Hall] = field(default_factory=list)

    @property
    def town(self) -> Town:
        """The open town. Opening starts its Redis if necessary."""
        if not hasattr(self, '_town'):
            self._town = open_town(self.root)
        return self._town

    @property
    def store(self) -> Store:
        return self.town.store

    def do(self, operation: str, by: Principal = OPERATOR, key: str = '', **arguments: Any) -> Any:
        """Calls an operation through dispatch. Returns its answer. The argument `from` is `from_` here."""
        named = {name.rstrip('_'): value for name, value in arguments.items()}
        return json.loads(encode_answer(self.store.run(call(self.town, by, BY_NAME[operation], named, key))))

    def tt(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs `tt` in the town's directory."""
        done = subprocess.run(
            [sys.executable, '-m', 'tinytown.cli', *words],
            cwd=self.root,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def tt_json(self, *words: str, **more: str) -> Any:
        return json.loads(self.tt(*words, '--json', check=True, **more).stdout)

    def hall(self, *flags: str, **more: str) -> Hall:
        """Starts a townhall on a free port. Returns when it listens."""
        started = Hall(self.root, flags, environment(**more))
        self.halls.append(started)
        return started

    def history(self) -> list[dict[str, Any]]:
        """Every event of the town, oldest first."""
        from tinytown.state.store import Command

        rows = self.store.call(Command(None, ('XRANGE', self.store.prefix + b'events', '-', '+')))
        return [{'id': text(row[0])} | json.loads(b'{' + row[1][1] + b'}') for row in rows]

    def await_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Waits for the first event with this type and these fields. It blocks on the stream instead of polling."""
        deadline = time.monotonic() + PATIENCE
        while True:
            events = self.history()
            for event in events:
                if event['type'] == kind and all(event.get(name) == value for name, value in fields.items()):
                    return event
            left = deadline - time.monotonic()
            assert left > 0, f'no event {kind} {fields} in {PATIENCE} s; there were {[e["type"] for e in events]}'
            self.store.call(self.store.next_event(events[-1]['id'] if events else '0-0', max(int(left * 1000), 1)))

    def await_end(self, task_id: str) -> dict[str, Any]:
        """Waits until a task has ended, through failovers of Redis too. Returns the task."""
        deadline = time.monotonic() + PATIENCE
        state = 'unknown'
        while (left := deadline - time.monotonic()) > 0:
            with suppress(Unavailable):  # a failover has ended our connection; a read may be repeated
                last = self.store.call(self.store.last_event())
                task: dict[str, Any] = self.do('task.get', task_id=task_id)
                state = task['state']
                if state in ('completed', 'failed', 'cancelled'):
                    return task
                self.store.call(self.store.next_event(text(last[0][0]) if last else '0-0', max(int(left * 1000), 1)))
        raise AssertionError(f'task still {state} after {PATIENCE} s: {self.history()}')

    def log(self, agent: str) -> str:
        return (self.root / '.tt' / 'logs' / f'{agent}.log').read_text()

    def let_go(self) -> None:
        """Closes our own connection to the town's Redis, if there is one."""
        if hasattr(self, '_town'):
            self._town.store.close()

    def close(self) -> None:
        """Ends all processes of the town."""
        for hall in self.halls:
            hall.kill()
        self.let_go()
        done = self.tt('stop', '--redis', check=False)
        assert done.returncode == 0, done.stderr or done.stdout


class Service:
    """An HTTP server at `address` and `port`."""

    address: str
    port: int

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Sends one request on a new connection. `body` is sent as JSON, or unchanged if it is bytes."""
        connection = http.client.HTTPConnection(self.address, self.port, timeout=PATIENCE)
        named = {name.replace('_', '-'): value for name, value in headers.items()}
        if body is not None and 'content-type' not in {name.lower() for name in named}:
            named['Content-Type'] = 'application/json'
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, named)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request('GET', path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return self.request('POST', path, body, **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.address, self.port), timeout=PATIENCE)

    def talk(self, data: bytes, finish: bool = True) -> bytes:
        """Sends raw bytes on a new connection. Returns everything received until the server closes it."""
        with self.connect() as sock:
            sock.sendall(data)
            if finish:
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)


FROM_CHECKOUT = (sys.executable, str(REPOSITORY / 'townhall.py'))
_OPEN = r'is open on https?://([\d.]+|\[[\da-f:]+\]):(\d+)'


class Hall(Service):
    """A townhall process. Its stderr goes to `log_file`."""

    def __init__(
        self, root: Path, flags: Iterable[str], env: dict[str, str], program: Iterable[str] = FROM_CHECKOUT
    ) -> None:
        self.log_file = root / f'hall-{len(list(root.glob("hall-*.log")))}-{os.urandom(2).hex()}.log'
        with open(self.log_file, 'wb') as log:
            self.process = subprocess.Popen(
                [*program, '--town', str(root), '--port', '0', *flags],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        found = re.search(_OPEN, self.said(_OPEN))
        assert found
        self.address, self.port = found[1].strip('[]'), int(found[2])

    def said(self, pattern: str) -> str:
        """Waits until the log matches a pattern. Returns the whole log."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self.process.poll() is not None
            text = self.log_file.read_text()
            if re.search(pattern, text):
                return text
            assert not ended, f'townhall ended: {text}'
            assert time.monotonic() < deadline, text
            select.select([], [], [], 0.005)

    def cpu_secs(self) -> float:
        """CPU time used so far, in seconds. Other load on the machine hardly changes it."""
        fields = Path(f'/proc/{self.process.pid}/stat').read_text().rsplit(')', 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Calls a function until it returns a true value, and returns that. It may raise TownError before."""
    deadline = time.monotonic() + patience
    while True:
        fault: object = 'no'
        try:
            if result := condition():
                return result
        except TownError as e:
            fault = e
        assert time.monotonic() < deadline, fault
        select.select([], [], [], 0.01)


def free_port(among: range = range(30000, 32768)) -> int:
    """A free port outside the kernel's ephemeral range and outside the range of `redises`."""
    for port in random.SystemRandom().sample(among, 200):
        with socket.socket() as sock:
            try:
                sock.bind(('127.0.0.1', port))
            except OSError:
                continue
            return port
    raise AssertionError('no port is free')


def read_all(sock: socket.socket) -> bytes:
    """Everything received until the other side closes."""
    parts = []
    while True:
        try:
            part = sock.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b''.join(parts)


def status_of(answer: bytes) -> int:
    """The status code of a raw answer."""
    assert answer.startswith(b'HTTP/1.1 '), answer[:200]
    return int(answer[9:12])


def make_town(root: Path, **settings: Any) -> Place:
    """A town in `root` whose agents run the demo CLI. `settings` are TOML values by top-level name or table."""
    root.mkdir(parents=True, exist_ok=True)
    lines, tables = ['name = "test"', 'default_cli = "demo"'], []
    for name, value in settings.items():
        if isinstance(value, dict):
            tables.append(f'[{name.replace("__", ".")}]')
            tables += [f'{key} = {to_toml(item)}' for key, item in value.items()]
        else:
            lines = [line for line in lines if not line.startswith(f'{name} =')] + [f'{name} = {to_toml(value)}']
    (root / config.FILE).write_text('\n'.join([*lines, *tables]) + '\n')
    return Place(root)


def shell_cli(script: str) -> str:
    """A command line for [agent_clis] that runs a shell script."""
    return f'sh -c {shlex.quote(script)}'


def redis_pid(place: Place) -> int:
    """The pid of a town's managed Redis."""
    info = place.store.call(place.store.info('server')).decode()
    return int(re.search(r'process_id:(\d+)', info)[1])  # type: ignore[index]


def start_redis(place: Place) -> None:
    managed_redis.ensure(place.root, place.town.config)
