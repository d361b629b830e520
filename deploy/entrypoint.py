#!/usr/bin/env python3
"""The entry point of the containers: prepares the volume, then becomes the command, as process 1.

    townhall [OPTION …]      serves the town in $TINYTOWN_TOWN, which is created if there is none
    worker NAME [OPTION …]   runs the worker of an agent; a new agent is spawned with the options of `tt spawn` and
                             keeps them
    COMMAND …                any other command is run unchanged

If a townhall would be reachable from the network without authentication, an API key is created: its hash goes into the
town's configuration, the key into .tt/api-key on the volume (mode 0600). The log names that file, never the key.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from tinytown import config as configuration
from tinytown import log
from tinytown.auth.access import is_local
from tinytown.cli.main import build_parser
from tinytown.console import explain
from tinytown.core import agents, recovery
from tinytown.core.town import Call, open_town
from tinytown.errors import NotFound, TownError, UsageError
from tinytown.host import town_secrets
from tinytown.host.processes import python
from tinytown.host.town_dir import TownDir
from tinytown.model import ALL_SCOPES, Principal
from tinytown.townhall.main import townhall_parser
from tinytown.trust import VARIABLE

logger = logging.getLogger('tinytown.townhall')


def main(words: list[str]) -> NoReturn:
    """Becomes the command. Exits with 2 if the configuration is invalid, 1 if the volume or Redis is not usable."""
    log.configure_from_environment(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which process 1 ignores by default
    root = Path(os.environ.get('TINYTOWN_TOWN') or '/town')
    os.environ['TINYTOWN_TOWN'] = str(root)
    trusted = [os.environ.get(VARIABLE, ''), str(root.absolute())]  # the operator chose the volume, whoever owns it
    os.environ[VARIABLE] = os.pathsep.join(filter(None, trusted))
    command, *rest = words or ['townhall']
    try:
        if command == 'townhall':
            ready_town(root)
            ready_key(root, rest)
            become(python('tinytown.townhall', *rest))
        if command == 'worker':
            ready_town(root, '--join')
            become(python('tinytown.cli', *worker(root, rest)))
        become(words)
    except (TownError, UsageError, OSError) as e:
        message, status = explain(e)
        log.fatal(message)
        raise SystemExit(status) from None


def become(argv: list[str]) -> NoReturn:
    os.execvp(argv[0], argv)  # noqa: S606


def tt(*words: str) -> None:
    """Runs a `tt` command. If it fails, exits with its status; it has printed the reason."""
    done = subprocess.run(python('tinytown.cli', *words), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def ready_town(root: Path, *join: str) -> None:
    """Creates the town on an empty volume."""
    if not (root / configuration.FILE).exists():
        tt('init', '--town', str(root), '--name', os.environ.get('TINYTOWN_NAME') or 'town', *join)


def ready_key(root: Path, words: list[str]) -> None:
    """Creates an API key if the network reaches us and authentication is not configured. Raises UsageError."""
    flags = {'townhall.bind': townhall_parser().parse_args(words).bind}
    config = configuration.load(root, flags)
    town_secrets.configure_log(root, config)
    is_chosen = config.townhall.auth.mode != 'none' or 'TINYTOWN_TOWNHALL_AUTH_MODE' in os.environ
    if is_chosen or is_local(config.townhall.bind):
        return
    file = TownDir(root).api_key
    tt('generate-api-key', '--write', '--to', str(file), '--town', str(root))
    logger.warning(f'the network reaches {config.townhall.bind}, so an API key was created; it is in {file}')


def worker(root: Path, words: list[str]) -> list[str]:
    """The `tt` command that runs the worker of an agent in this container. Raises UsageError, TownError."""
    if not words:
        raise UsageError('worker: give the name of the agent, as in  worker NAME --cli claude')
    name, *options = words
    call = Call(open_town(root), Principal('entry point', ALL_SCOPES))
    requested = build_parser().parse_args(['spawn', name, *options])
    try:
        agent = json.loads(call.store.run(agents.look_up(call, name)).json)
    except NotFound:
        return ['spawn', name, '--foreground', *options]
    for option, field in (('cli', 'cli'), ('role', 'role_id'), ('nickname', 'nickname')):
        wanted = getattr(requested, field)
        if wanted not in (None, agent[field]):
            logger.warning(
                f"--{option} {wanted}: '{name}' was spawned with {agent[field] or 'none'} and keeps it; to change it, "
                'stop this container, forget the stopped agents (tt prune), and start it again'
            )
    call.store.run(recovery.recover(call))  # what the worker of an earlier, killed container held
    call.store.run(recovery.free_if_silent(call, name, time.sleep))
    return ['worker', name]


if __name__ == '__main__':
    main(sys.argv[1:])
