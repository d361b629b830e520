"""Stops a town that runs as a service: stops its townhalls and workers, saves what the workers held, stops its Redis.

The spawner (`host.spawner`) runs this module as a process of its own when systemd stops the service. It does what
`tt stop --redis` does, with two differences:

- Agents that restart on failure (`agent.restart = "on-failure"`) are marked, so that they run again when the town does,
  for example after a reboot.
- It also works if the configuration can no longer be used. The spawner passes the configuration with which it started
  on standard input, as the fallback.
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


def stop_town(root: Path, started: Config | None) -> int:
    """Stops every process of the town on this machine. `started` is the configuration with which they were started.

    Returns the exit status: 0 if no process is left. Raises UsageError, TownError.
    """
    config = _choose_config(root, started)
    name_host(config.host)
    left = stop_townhalls(root, config)[1] + _stop_workers(root, config)
    for failure in left:
        logger.error(failure)
    managed_redis.stop_redis(root)
    return 1 if left else 0


def _choose_config(root: Path, started: Config | None) -> Config:
    """The present configuration; `started` if that can't be used or names another town. Raises UsageError."""
    try:
        present = configuration.load(root)
    except (UsageError, OSError) as e:
        if started is None:
            raise
        logger.warning(f'{e}; the town is stopped by the configuration with which it was started')
        return started
    if started and (present.name, present.host, present.redis) != (started.name, started.host, started.redis):
        return started
    return present


def _stop_workers(root: Path, config: Config) -> list[str]:
    """Stops the workers of this directory that Redis has records of. Returns what failed, a message for each worker."""
    if not config.redis.url and not managed_redis.socket_path(root).exists():
        return []
    managed_redis.ensure(root, config)
    town = Town(root, config, Store(managed_redis.endpoint(root, config), config.name, config.retention.events))
    call = Call(town, Principal('service', ALL_SCOPES))
    restarts = config.agent.restart != 'never'

    def stop_all() -> Step[list[str]]:
        left = []
        for agent in (yield from agents.of_this_directory(call)):
            try:
                yield from agents.stop_process(call, agent, WHY, GRACE_SECS, 'inbox' if restarts else 'backlog')
                if restarts:
                    yield town.store.revive_later(agent.id)
            except TownError as e:
                left.append(e.detail)
        return left

    return town.store.run(stop_all())


def main(root: Path) -> int:
    """Stops the town in `root`. Standard input holds its settings by path (JSON), or null. Returns an exit status."""
    log.configure()
    values = json.load(sys.stdin)
    try:
        return stop_town(root, values and configuration.from_values(values, root))
    except (TownError, UsageError, OSError) as e:
        for instance in agents_processes(str(root)):  # the records can't be read, so the processes alone are ended
            stop_tree(None, instance, GRACE_SECS)
        with suppress(TownError):
            managed_redis.stop_redis(root)
        return complain('townhall', e)


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
