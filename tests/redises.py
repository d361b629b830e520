"""Redis servers on loopback: a single one, a master with replicas and sentinels, and a Cluster."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from tinytown.host import managed_redis
from tinytown.state.endpoints import Login, RedisServer, Tls
from tinytown.state.store import text

from .support import LONG, PATIENCE, until

HOST = '127.0.0.1'


def _ports() -> tuple[int, int]:
    """A free port, and the port 10,000 above it for the cluster bus. Both are outside the kernel's ephemeral range."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            port = 10000 + int.from_bytes(os.urandom(4)) % 10000
            try:
                first.bind((HOST, port))
                second.bind((HOST, port + 10000))
            except OSError:
                continue
            return port, port + 10000


class Node:
    """A server process. `options` are lines of its configuration file."""

    def __init__(
        self, directory: Path, options: Iterable[str], server: RedisServer, mode: tuple[str, ...] = ()
    ) -> None:
        self.port, self.bus = _ports()
        self.directory = directory / str(self.port)
        self.directory.mkdir(parents=True)
        self.server = server.at((HOST, self.port))
        ports = [f'port {self.port}'] if not server.tls else ['port 0', f'tls-port {self.port}']
        self.options = [*ports, f'bind {HOST}', f'dir {self.directory}', *options]
        self._mode = mode
        (self.directory / 'conf').write_text('\n'.join(self.options) + '\n')
        self.start()

    @property
    def place(self) -> str:
        return f'{HOST}:{self.port}'

    def start(self) -> None:
        program = str(managed_redis.find_server())
        with open(self.directory / 'log', 'ab') as log:
            command = [program, str(self.directory / 'conf'), *self._mode]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            until(lambda: self._is_there() and self.ask('PING') == b'PONG')
        except BaseException:
            self.kill()
            raise

    def _is_there(self) -> bool:
        assert self.process.poll() is None, (self.directory / 'log').read_text()
        return True

    def ask(self, *parts: bytes | str | int) -> Any:
        """Sends a command on a new connection. Returns the reply."""
        connection = self.server.open(PATIENCE)
        try:
            return connection.ask(*parts, timeout=PATIENCE)
        finally:
            connection.close()

    def info(self, name: str) -> str:
        """A field of INFO, or '' if there is none."""
        for line in text(self.ask('INFO', 'everything')).splitlines():
            if line.startswith(f'{name}:'):
                return line.partition(':')[2]
        return ''

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def stop(self) -> None:
        """Freezes the process with SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)


class Nodes:
    """A group of servers that end together. `options` are for all of them; `login` and `tls` are for the clients."""

    def __init__(self, directory: Path, *options: str, login: Login = Login(), tls: Tls | None = None) -> None:
        self.directory = directory
        self.options = ['appendonly yes', 'appendfsync always', 'repl-diskless-sync-delay 0', *options]
        self.server = RedisServer(login=login, tls=tls)
        self.all: list[Node] = []

    def __enter__(self) -> Any:
        try:
            self.begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def begin(self) -> None:
        """Starts the first servers of the group."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for node in self.all:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
                node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, *options: str) -> Node:
        """Starts another server."""
        self.all.append(Node(self.directory, [*self.options, *options], self.server))
        return self.all[-1]


class Sentinels(Nodes):
    """A master with two replicas, and three sentinels that watch it under the name `main`."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        login: Login = Login(),
        tls: Tls | None = None,
        watch: Iterable[str] = (),
    ) -> None:
        super().__init__(directory, *options, login=login, tls=tls)
        self._watch = [line for line in options if line.startswith('tls-')] + list(watch)

    def begin(self) -> None:
        master = self.add()
        self.data = [master, *(self.add(f'replicaof {HOST} {master.port}') for _ in range(2))]
        until(lambda: master.info('connected_slaves') == '2' and all(map(self._is_synced, self.data[1:])), LONG)
        lines = [
            f'sentinel monitor main {HOST} {master.port} 2',
            'sentinel down-after-milliseconds main 2000',
            'sentinel failover-timeout main 5000',
            *self._watch,
        ]
        endpoint = RedisServer(tls=self.server.tls)
        for _ in range(3):
            self.all.append(Node(self.directory, lines, endpoint, ('--sentinel',)))
        self.sentinels = self.all[3:]
        until(lambda: all(self._known(each, b'num-other-sentinels') == b'2' for each in self.sentinels), LONG)
        until(lambda: all(self._linked(each) == [b'ok'] * 2 for each in self.sentinels), LONG)

    @staticmethod
    def _is_synced(node: Node) -> bool:
        return node.info('master_link_status') == 'up'

    @staticmethod
    def _known(sentinel: Node, name: bytes) -> bytes:
        found = sentinel.ask('SENTINEL', 'MASTER', 'main')
        value: bytes = dict(zip(found[::2], found[1::2], strict=True))[name]
        return value

    @staticmethod
    def _linked(sentinel: Node) -> list[bytes]:
        """The link to the master as each replica reports it. A replica without a report is never promoted."""
        found = sentinel.ask('SENTINEL', 'REPLICAS', 'main')
        return [dict(zip(each[::2], each[1::2], strict=True))[b'master-link-status'] for each in found]

    @property
    def url(self) -> str:
        return 'redis+sentinel://' + ','.join(each.place for each in self.sentinels) + '/main'

    def named(self) -> int:
        """The master's port according to a sentinel."""
        return int(self.sentinels[0].ask('SENTINEL', 'get-master-addr-by-name', 'main')[1])

    def master(self) -> Node:
        """The running server that reports to be the master."""
        return next(node for node in self.data if node.process.poll() is None and node.ask('ROLE')[0] == b'master')


class Cluster(Nodes):
    """Three masters with a third of the slots each, and a replica of the master of `slot`."""

    def __init__(self, directory: Path, slot: int) -> None:
        quick = 'cluster-node-timeout 1000', 'cluster-replica-validity-factor 0'
        super().__init__(directory, 'cluster-enabled yes', 'cluster-config-file nodes', *quick)
        self._slot = slot

    def begin(self) -> None:
        self.masters = [self.add() for _ in range(3)]
        bounds = (0, 5461, 10923, 16384)
        for i, node in enumerate(self.masters):
            node.ask('CLUSTER', 'ADDSLOTSRANGE', bounds[i], bounds[i + 1] - 1)
        self.home = self.masters[next(i for i in range(3) if self._slot < bounds[i + 1])]
        self.replica = self.add()
        until(self._have_met, LONG)
        until(lambda: self.replica.ask('CLUSTER', 'REPLICATE', self.id_of(self.home)) == b'OK', LONG)
        until(lambda: self.replica.info('master_link_status') == 'up', LONG)
        until(lambda: all('state:ok' in text(each.ask('CLUSTER', 'INFO')) for each in self.all), LONG)

    def _have_met(self) -> bool:
        """Whether every server knows all others by id. If not, repeats CLUSTER MEET, which may time out."""
        ids = {self.id_of(each) for each in self.all}
        known = [{line.split()[0] for line in text(each.ask('CLUSTER', 'NODES')).splitlines()} for each in self.all]
        if all(ids <= each for each in known):
            return True
        for node in self.all[1:]:
            self.all[0].ask('CLUSTER', 'MEET', HOST, node.port, node.bus)
        select.select([], [], [], 0.2)
        return False

    @staticmethod
    def id_of(node: Node) -> str:
        return text(node.ask('CLUSTER', 'MYID'))

    @property
    def url(self) -> str:
        return 'redis+cluster://' + ','.join(each.place for each in self.masters)
