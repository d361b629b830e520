"""The directory of a town and its `.tt`: every file name in `.tt`, what the file is for and who writes it.

`TownDir(root)` names every file of a town except two: the configuration (`config.FILE`), which a person writes, and the
audit log, whose path is a setting (`townhall.audit.path`, by default `.tt/audit.jsonl`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .. import trust
from ..config import FILE
from ..errors import UsageError
from ..files import make_directory

NAME: Final = trust.DIRECTORY


def find(start: Path, given: str | None, for_owner: bool = False) -> Path:
    """The root of the town in `given` or, if that is None, in the nearest directory from `start` upwards.

    Raises UsageError if there is no town, or if the caller must not believe the nearest one (see `trust`). With
    `for_owner`, root may find a town that its owner may believe: for commands that run and write nothing there.
    """
    if given is not None:
        root = Path(given).expanduser()
        if not (root / FILE).is_file():
            raise UsageError(f'{given} holds no town ({FILE} is missing); make one:  tt init --town {given}')
        return _checked(root.resolve(), for_owner)
    start = start.resolve()
    for root in (start, *start.parents):
        if os.path.lexists(root / FILE) and not (root / FILE).is_dir():
            return _checked(root, for_owner)
    raise UsageError(f'not in a town: no {FILE} in {start} or above it; make one:  tt init')


def _checked(root: Path, for_owner: bool) -> Path:
    trust.check_town(root, trust.owner_for_root(root) if for_owner else None)
    if not (root / FILE).is_file():
        raise UsageError(f'{root / FILE} is not a file; remove it, or make it one')
    return root


class TownDir:
    """The `.tt` of the town in `root`. Its properties are paths; only `create` writes to the disk."""

    def __init__(self, root: Path) -> None:
        self.path = root / NAME

    def create(self) -> TownDir:
        """Creates `.tt` with mode 0700 and the directories in it, unless they exist. Returns itself."""
        make_directory(self.path)
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o700)
        for directory in (self.logs, self.redis, self.agents, self.run):
            make_directory(directory)
        return self

    # ------------------------------------------------------------------------------------------------------- the town

    @property
    def gitignore(self) -> Path:
        """Keeps `.tt` out of a git repository; `tt init` writes it."""
        return self.path / '.gitignore'

    @property
    def identity(self) -> Path:
        """The id that tells this town from another one of the same name in Redis; the first process writes it."""
        return self.path / 'town-id'

    @property
    def token_key(self) -> Path:
        """The key that signs the agents' tokens; the first process that needs it writes it."""
        return self.path / 'token-key'

    @property
    def api_key(self) -> Path:
        """The API key of a townhall in a container; the container's entry point writes it."""
        return self.path / 'api-key'

    @property
    def programs(self) -> Path:
        """The first directory on the PATH of coding CLIs; workers write a `tt` of their installation into it."""
        return self.path / 'bin'

    # ------------------------------------------------------------------------------------ townhalls and the spawner

    @property
    def townhall_log(self) -> Path:
        """The output of a townhall that `tt start` started."""
        return self.path / 'townhall.log'

    @property
    def run(self) -> Path:
        """The notes of running townhalls, and the spawner's socket."""
        return self.path / 'run'

    def townhall_note(self, pid: int) -> Path:
        """A townhall's process and URL; the townhall writes it, and removes it when it ends."""
        return self.run / f'townhall-{pid}.json'

    def townhall_notes(self) -> list[Path]:
        """The notes of all townhalls that run in this directory."""
        return sorted(self.run.glob('townhall-*.json'))

    @property
    def spawner_socket(self) -> Path:
        """Where the spawner listens; it creates the socket. Clients of 0.1.0 know its file name."""
        return self.run / 'keeper.sock'

    # ------------------------------------------------------------------------------------------------ managed Redis

    @property
    def redis(self) -> Path:
        """The data of the managed Redis, which writes it."""
        return self.path / 'redis'

    @property
    def redis_socket(self) -> Path:
        """Where the managed Redis listens, unless this path is too long for a socket's address."""
        return self.path / 'redis.sock'

    @property
    def redis_elsewhere(self) -> Path:
        """Holds the path of the socket if `redis_socket` is too long; the first process that needs it writes it."""
        return self.path / 'redis.addr'

    @property
    def redis_start_lock(self) -> Path:
        """Locked by the process that starts the managed Redis, so that two processes never start it at once."""
        return self.path / 'redis.lock'

    @property
    def redis_server_lock(self) -> Path:
        """Holds the pid of the managed Redis, which keeps it locked until it ends."""
        return self.redis / 'server.lock'

    @property
    def redis_log(self) -> Path:
        """The output of the managed Redis."""
        return self.path / 'redis.log'

    # ------------------------------------------------------------------------------------------------------- agents

    @property
    def logs(self) -> Path:
        """The agents' logs and nothing else, because an agent's name may equal that of any other file."""
        return self.path / 'logs'

    def log(self, name: str) -> Path:
        """An agent's log; its workers write it."""
        return self.logs / f'{name}.log'

    @property
    def agents(self) -> Path:
        """The agents' other files, named by agent id."""
        return self.path / 'agents'

    def token(self, agent_id: str) -> Path:
        """The token of an agent's worker; each new worker overwrites it."""
        return self.agents / f'{agent_id}.token'

    def tokens(self) -> Iterator[Path]:
        """The token files of all agents."""
        return self.agents.glob('*.token')

    def prompt(self, agent_id: str) -> Path:
        """The prompt of an agent's current round; its worker writes it."""
        return self.agents / f'{agent_id}.prompt'

    def spool(self, agent_id: str) -> Path:
        """A directory with an agent's undelivered reports, one file each; its workers write them."""
        return self.agents / f'{agent_id}.spool'

    def process(self, agent_id: str) -> Path:
        """The note of a worker's process; the worker writes it, and keeps it locked until it ends."""
        return self.agents / f'{agent_id}.process'

    def processes(self) -> Iterator[Path]:
        """The notes of all workers; the stem of each file name is the agent's id."""
        return self.agents.glob('*.process')

    def of_agent(self, agent_id: str) -> Iterator[Path]:
        """All files of an agent except its log."""
        return self.agents.glob(f'{agent_id}.*')
