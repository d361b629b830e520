"""The town under test: one Redis, 100 agents (records without processes), an inbox of 10, a backlog of 100."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from tests.ground import redis
from tests.support import make_town
from tinytown.host import managed_redis
from tinytown.model import CONDUCTOR_ID, new_id
from tinytown.state.client import RedisConnection
from tinytown.state.store import Command, scripts

AGENTS, MESSAGES, BACKLOG = 100, 10, 100
READER, WRITER = 'agent-001', 'agent-002'
_BATCH = 500  # commands per write


class Stage:
    """A town in a directory of its own. It starts a Redis, unless `url` is that of another stage."""

    def __init__(self, url: str = '', finished: int = 0) -> None:
        self.root = Path(tempfile.mkdtemp(prefix='bench'))
        self.finished = finished
        shared = {'redis': {'url': url}} if url else {}
        quiet = {'access_log': 'off'}
        self.place = make_town(self.root, name=self.root.name, max_agents=1000, townhall=quiet, **shared)
        self._owns_redis = not url
        redis(self.place, 'CONFIG', 'SET', 'auto-aof-rewrite-percentage', 0)  # no rewrite during a measurement
        for script in scripts().values():
            redis(self.place, 'SCRIPT', 'LOAD', script.text)
        self._settings()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._owns_redis:
            managed_redis.stop_redis(self.root)
        self.place.store.close()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def url(self) -> str:
        return f'unix://{managed_redis.socket_path(self.root)}'

    def _settings(self) -> None:
        """Writes the settings for the peers: socket, key names and scripts of this town."""
        store = self.place.store
        sock = str(managed_redis.socket_path(self.root))
        values = {'socket': sock, 'prefix': store.prefix.decode(), 'events': store.events}
        values |= {'conductor': CONDUCTOR_ID} | {name: scripts()[name].text.decode() for name in ('inbox', 'assign')}
        self.settings = self.root / 'peer.json'
        self.settings.write_text(json.dumps(values))

    # ----------------------------------------------------------------------------------------------------- state

    def policy(self, appendfsync: str) -> None:
        """Sets appendfsync: everysec or always."""
        redis(self.place, 'CONFIG', 'SET', 'appendfsync', appendfsync)

    def reset(self) -> None:
        """Restores the initial state, with a short append-only file. Empties the whole Redis."""
        redis(self.place, 'FLUSHALL')
        redis(self.place, 'BGREWRITEAOF')
        while b'aof_rewrite_in_progress:1' in self.place.store.call(self.place.store.info('persistence')):
            time.sleep(0.01)
        self.fill()

    def fill(self) -> None:
        store = self.place.store
        store.call(store.open((self.root / '.tt' / 'town-id').read_text().strip()))
        self._run(command for number in range(AGENTS) for command in self._agent(f'agent-{number:03}'))
        rest = (
            '","type":"info","summary":"Please look at the failing tests in the parser first, and say what you find."}'
        )
        self._run(store.send(READER, '', 'n', new_id(), rest, 'info') for _ in range(MESSAGES))
        self._run(store.backlog_add(_task(f'Item {number} of the backlog')) for number in range(BACKLOG))
        self._run(command for number in range(self.finished) for command in self._finished(number))

    def _agent(self, name: str) -> tuple[Command, Command]:
        """An agent whose worker claims to run on another machine, so that its absence is not noticed here."""
        store, agent, instance = self.place.store, new_id(), new_id()
        record = {'id': agent, 'name': name, 'nickname': None, 'role_id': 'worker', 'parent_agent_id': None}
        head = json.dumps(record | {'spawn_mode': 'fresh', 'cli': 'demo'}, separators=(',', ':'))[:-1]
        born = store.register(agent, name, head, 1000, 0, instance)
        return born, store.hello(agent, instance, 'elsewhere', 'boot', 7, '1')

    def _finished(self, number: int) -> tuple[Command, Command]:
        task = _task(f'Task {number} of the past')
        return self.place.store.backlog_add(task), self.place.store.finish(task[0], '', 'completed', '"done"', 'null')

    def tasks(self) -> int:
        """The number of tasks."""
        return int(redis(self.place, 'ZCARD', self.place.store.prefix + b'tasks'))

    def _run(self, commands: Iterable[Command]) -> None:
        """Runs many commands, with one write per batch."""
        connection = self.place.store.endpoint.open(timeout=60)
        try:
            batch: list[Command] = []
            for command in commands:
                batch.append(command)
                if len(batch) == _BATCH:
                    self._send(connection, batch)
                    batch = []
            self._send(connection, batch)
        finally:
            connection.close()

    def _send(self, connection: RedisConnection, batch: list[Command]) -> None:
        connection.redis.send_packed_command([command.pack(self.place.store) for command in batch])
        for command in batch:
            command.result(connection.redis.read_response(True))


def _task(description: str) -> tuple[str, str, str, str, str, int]:
    task = new_id()
    head = json.dumps({'task_id': task, 'description': description}, separators=(',', ':'))[:-1]
    return task, head, json.dumps(description), '["tests"]', CONDUCTOR_ID, 3
