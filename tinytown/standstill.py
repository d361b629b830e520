"""How a town that is a service comes to a standstill: its workers end, what they held is kept, and Redis is closed.

That is `tt stop --redis`, with one difference: agents that are to be started again when they fail
(`agent.restart = "on-failure"`) are noted for it, and run again when the town does, after a reboot, say.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from . import agents, redis_server
from . import config as configuration
from .errors import TownError, UsageError
from .local import running_townhalls
from .model import ALL_SCOPES, LIVE, Principal
from .processes import GRACE_SECS, name_host, stop_one, this_host
from .say import say
from .settings import Config
from .store import Step, text
from .town import Call, open_town
from .usage import complain

WHY: Final = 'the town was stopped'


def stop(root: Path) -> int:
    """Ends what runs of the town on this machine. The exit status: 0 if nothing is left."""
    configuration.take_credentials()
    config = configuration.load(root)
    name_host(config.host)
    for file, process, _ in running_townhalls(root):
        stop_one(process, config.townhall.limits.drain_secs + 2)
        file.unlink(missing_ok=True)
    left = _stop_workers(root, config)
    for what in left:
        say('townhall', what, 'error')
    redis_server.stop(root, config)
    return 1 if left else 0


def _stop_workers(root: Path, config: Config) -> list[str]:
    """Stops the workers of this host, if the Redis is there that tells of them. What could not be stopped, and why."""
    if not config.redis.url and not redis_server.socket_path(root).exists():
        return []
    town = open_town(root)
    call = Call(town, Principal('service', ALL_SCOPES))
    comes_back = config.agent.restart != 'never'

    def stop_all() -> Step[list[str]]:
        left = []
        for row in (yield town.store.evidence(LIVE))[1]:
            try:
                found = yield from agents.look_up(call, text(row[0]))
                if found.process.host in ('', this_host()):
                    yield from agents.stop_process(call, found, WHY, GRACE_SECS, 'inbox' if comes_back else 'backlog')
                    if comes_back:
                        yield town.store.revive_later(found.id)
            except TownError as e:
                left.append(e.detail)
        return left

    return town.store.run(stop_all())


def main(root: Path) -> int:
    """The exit status, as that of a command."""
    try:
        return stop(root)
    except (TownError, UsageError, OSError) as e:
        return complain('townhall', e)


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
