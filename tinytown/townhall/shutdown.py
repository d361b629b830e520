"""How a town that is a service comes to a standstill: its workers end, what they held is kept, and Redis is closed.

That is `tt stop --redis`, with two differences. Agents that are to be started again when they fail
(`agent.restart = "on-failure"`) are noted for it, and run again when the town does, after a reboot, say. And it is done
even if the configuration can't be used any more, by the one that the keeper knows, and tells on standard input.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from .. import config as configuration
from .. import log
from ..console import complain
from ..core import agents
from ..core.town import Call, Town
from ..errors import TownError, UsageError
from ..host import managed_redis
from ..host.processes import GRACE_SECS, agents_processes, name_host, stop_tree
from ..host.townhalls import stop_townhalls
from ..model import ALL_SCOPES, Principal
from ..settings import Config
from ..state.store import Step, Store

logger = logging.getLogger('tinytown.townhall')

WHY: Final = 'the town was stopped'


def stop_town(root: Path, began: Config | None) -> int:
    """Ends what runs of the town on this machine. `began` is the configuration with which that was started.

    The exit status: 0 if nothing is left. Raises UsageError, TownError.
    """
    config = _in_force(root, began)
    name_host(config.host)
    left = stop_townhalls(root, config)[1] + _stop_workers(root, config)
    for what in left:
        logger.error(what)
    managed_redis.stop_redis(root)
    return 1 if left else 0


def _in_force(root: Path, began: Config | None) -> Config:
    """The configuration of now, unless it can't be used or is about another town. Raises UsageError."""
    try:
        now = configuration.load(root)
    except (UsageError, OSError) as e:
        if began is None:
            raise
        logger.warning(f'{e}; the town is stopped by the configuration that was in force before')
        return began
    if began and (now.name, now.host, now.redis) != (began.name, began.host, began.redis):
        return began
    return now


def _stop_workers(root: Path, config: Config) -> list[str]:
    """Stops the workers of this directory, if the Redis is there that tells of them. What could not be, and why."""
    if not config.redis.url and not managed_redis.socket_path(root).exists():
        return []
    managed_redis.ensure(root, config)
    town = Town(root, config, Store(managed_redis.endpoint(root, config), config.name, config.retention.events))
    call = Call(town, Principal('service', ALL_SCOPES))
    comes_back = config.agent.restart != 'never'

    def stop_all() -> Step[list[str]]:
        left = []
        for found in (yield from agents.of_this_directory(call)):
            try:
                yield from agents.stop_process(call, found, WHY, GRACE_SECS, 'inbox' if comes_back else 'backlog')
                if comes_back:
                    yield town.store.revive_later(found.id)
            except TownError as e:
                left.append(e.detail)
        return left

    return town.store.run(stop_all())


def main(root: Path) -> int:
    """The exit status, as that of a command."""
    log.configure()
    told = json.load(sys.stdin)
    try:
        return stop_town(root, told and configuration.from_values(told, root))
    except (TownError, UsageError, OSError) as e:
        for instance in agents_processes(str(root)):  # no record tells of them, but they are told to end
            stop_tree(None, instance, GRACE_SECS)
        with suppress(TownError):
            managed_redis.stop_redis(root)
        return complain('townhall', e)


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
