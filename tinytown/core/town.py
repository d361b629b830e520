"""A town (its directory, configuration and store), and the operations that describe it as a whole.

`open_town` is the way in for every program. Operations get a `Call` from `dispatch`.
"""

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
from ..trust import owner_for_root


@dataclass(frozen=True, slots=True)
class Town:
    """An open town: its directory, its configuration, and the store that holds its state."""

    root: Path
    config: Config
    store: Store

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def redis_url(self) -> str:
        """The URL of the town's Redis, with the password masked."""
        return masked(self.config.redis.url or f'unix://{managed_redis.socket_path(self.root)}')


class Call:
    """The first argument of every operation: the town, the caller, and a store that stamps the caller on changes.

    `dispatch` binds the store to the caller. Without a `store`, the town's own is used and changes name no caller.
    """

    __slots__ = ('by', 'store', 'town')

    def __init__(self, town: Town, by: Principal, store: Store | None = None) -> None:
        self.town = town
        self.by = by
        self.store = store or town.store

    @property
    def config(self) -> Config:
        return self.town.config


def open_town(root: Path, flags: dict[str, Any] | None = None) -> Town:
    """Opens the town in `root`, and starts its managed Redis if it is not running. Raises UsageError, TownError."""
    town = _connect(root, configuration.load(root, flags))
    town.store.call(town.store.open(_identity(root)))
    return town


def join(root: Path, check: Callable[[Town], None]) -> Town:
    """Makes the directory `root` another host of the town in the Redis that its configuration names.

    `check` is called with the town before anything is written; if it raises, `root` does not join. Raises UsageError,
    TownError.
    """
    config = configuration.load(root, uid=owner_for_root(root))
    if not config.redis.url:
        raise UsageError(
            f'{root / configuration.FILE}: redis.url is not set; a host that joins needs it to find the town'
        )
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
    """The id of the town in `root`, created on first opening. Processes that open it at once get the same id."""
    return write_once(TownDir(root).create().identity, new_id() + '\n').strip()


# -------------------------------------------------------------------------------------------------------- operations

Deep = Annotated[bool, Field('Include task counts by state, and the latest events')]


class TownInfo(TypedDict):
    name: str
    root: str
    redis_url: str


class TownEvent(TypedDict):
    """One event. Depending on its type it also has agent_id, agent_name, task_id, attempt, message_id, by or why."""

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
    """Show which town this is: its name, its directory, and the Redis that stores its state."""
    yield from ()
    return _info_of(call.town)


def status(call: Call, *, deep: Deep = False, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[TownStatus]]:
    """Show the town and its agents; with deep, also how many tasks are in each state, and the latest events.

    Start here: it shows which agent is working on which task.
    """
    reply = yield call.store.status(limit, cursor, 20 if deep else 1)
    count, following, agents, tasks, events = reply
    head = json.dumps(_info_of(call.town), ensure_ascii=False)[:-1].encode()
    more = b',"tasks":%b,"recent_events":[%b]' % (tasks, events) if deep else b''
    after = b',"next_cursor":"%b"' % following if following else b''
    return Page(b'%b,"agent_count":%d,"agents":[%b]%b%b}' % (head, count, agents, more, after))


def _info_of(town: Town) -> TownInfo:
    return {'name': town.name, 'root': str(town.root), 'redis_url': town.redis_url}
