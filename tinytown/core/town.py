"""A town: its directory, its configuration, its state; and what is to be told of it as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from .. import config as configuration
from ..errors import UsageError
from ..files import write_atomically, write_once
from ..host import managed_redis
from ..host.processes import name_host
from ..host.town_dir import TownDir
from ..model import Agent, Cursor, Field, Limit, Principal, new_id
from ..redaction import masked
from ..settings import Config
from ..state.store import Page, Step, Store, text


@dataclass(frozen=True, slots=True)
class Town:
    """One town, opened."""

    root: Path
    config: Config
    store: Store

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def redis_url(self) -> str:
        """Where the state is, without a password."""
        return masked(self.config.redis.url or f'unix://{managed_redis.socket_path(self.root)}')


class Call:
    """What every operation is given: the town, who asks, and the store, which the door binds to them."""

    __slots__ = ('by', 'store', 'town')

    def __init__(self, town: Town, by: Principal, store: Store | None = None) -> None:
        self.town = town
        self.by = by
        self.store = store or town.store

    @property
    def config(self) -> Config:
        return self.town.config


def open_town(root: Path, flags: dict[str, Any] | None = None) -> Town:
    """Opens the town in `root`, starting its managed Redis if that is not running. Raises UsageError, TownError."""
    town = _connect(root, configuration.load(root, flags))
    town.store.call(town.store.open(_identity(root)))
    return town


def join(root: Path, check: Callable[[Town], None]) -> Town:
    """Makes the directory `root` a further host of the town that its Redis holds, if `check` raises nothing.

    Raises UsageError, TownError.
    """
    config = configuration.load(root)
    if not config.redis.url:
        raise UsageError(f'{root / configuration.FILE}: redis.url is not set, by which a further host finds the town')
    town = _connect(root, config)
    owner = text(town.store.call(town.store.open(''))[0])
    check(town)
    write_atomically(TownDir(root).create().identity, f'{owner}\n', 0o600)
    return town


def _connect(root: Path, config: Config) -> Town:
    name_host(config.host)
    managed_redis.ensure(root, config)
    return Town(root, config, Store(managed_redis.endpoint(root, config), config.name, config.retention.events))


def _identity(root: Path) -> str:
    """The id of the town in `root`, made when it is first opened; of two who open it at once both take the first's."""
    return write_once(TownDir(root).create().identity, new_id() + '\n').strip()


# -------------------------------------------------------------------------------------------------------- operations

Deep = Annotated[bool, Field('Also task counts and the latest events')]


class TownInfo(TypedDict):
    name: str
    root: str
    redis_url: str


class TownEvent(TypedDict):
    """One change. Beside these, what it concerns: agent_id, agent_name, task_id, attempt, message_id, by, why."""

    id: str
    type: str
    at: str


class TownStatus(TypedDict):
    name: str
    root: str
    redis_url: str
    agent_count: int
    agents: list[Agent]
    tasks: NotRequired[dict[str, int]]
    recent_events: NotRequired[list[TownEvent]]
    next_cursor: NotRequired[str]


def info(call: Call) -> Step[TownInfo]:
    """Say which town this is: its name, its directory, and where its state is kept."""
    yield from ()
    return _info_of(call.town)


def status(call: Call, *, deep: Deep = False, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[TownStatus]]:
    """Show the town and its agents; with deep, also how many tasks are in each state and the latest events.

    Begin here: it tells who is working on what.
    """
    reply = yield call.store.status(limit, cursor, 20 if deep else 1)
    count, following, agents, tasks, events = reply
    head = json.dumps(_info_of(call.town), ensure_ascii=False)[:-1].encode()
    more = b',"tasks":%b,"recent_events":[%b]' % (tasks, events) if deep else b''
    after = b',"next_cursor":"%b"' % following if following else b''
    return Page(b'%b,"agent_count":%d,"agents":[%b]%b%b}' % (head, count, agents, more, after))


def _info_of(town: Town) -> TownInfo:
    return {'name': town.name, 'root': str(town.root), 'redis_url': town.redis_url}
