"""The directory of a town, and `.tt` in it: the one place that spells what `.tt` holds, and who writes it.

`TownDir(root)` names every file of a town but two: the configuration (`config.FILE`), which a person writes, and the
audit, whose place is a setting (`townhall.audit.path`, `.tt/audit.jsonl` unless it is changed).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..config import FILE
from ..errors import UsageError
from ..files import make_directory

NAME: Final = '.tt'


def find(start: Path, given: str | None) -> Path:
    """The root of the town in `given`, or in the nearest directory from `start` upwards. Raises UsageError."""
    if given is not None:
        root = Path(given).expanduser()
        if not (root / FILE).is_file():
            raise UsageError(f'{given} holds no town ({FILE} is missing); make one:  tt init --town {given}')
        return root.resolve()
    start = start.resolve()
    for root in (start, *start.parents):
        if (root / FILE).is_file():
            return root
    raise UsageError(f'not in a town: no {FILE} in {start} or above it; make one:  tt init')


class TownDir:
    """The `.tt` of the town in `root`. Naming a file does not make it."""

    def __init__(self, root: Path) -> None:
        self.path = root / NAME

    def made(self) -> TownDir:
        """This directory, made unless it is there: mode 0700, with the directories in it that everyone expects."""
        make_directory(self.path)
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o700)
        for each in (self.logs, self.redis, self.agents, self.run):
            make_directory(each)
        return self

    # ------------------------------------------------------------------------------------------------------- the town

    @property
    def gitignore(self) -> Path:
        """Keeps `.tt` out of a repository; `tt init` writes it."""
        return self.path / '.gitignore'

    @property
    def identity(self) -> Path:
        """The id of the town, by which its name in Redis is its own; whoever opens the town first writes it."""
        return self.path / 'town-id'

    @property
    def token_key(self) -> Path:
        """The key that the tokens of agents are made with; whoever needs it first writes it."""
        return self.path / 'token-key'

    @property
    def api_key(self) -> Path:
        """The API key of a container that the network reaches; the container's entry point writes it."""
        return self.path / 'api-key'

    @property
    def programs(self) -> Path:
        """Goes first on the PATH of coding CLIs; workers write the `tt` of their installation into it."""
        return self.path / 'bin'

    # ------------------------------------------------------------------------------------- townhalls and the keeper

    @property
    def townhall_log(self) -> Path:
        """What a townhall prints that `tt start` has started."""
        return self.path / 'townhall.log'

    @property
    def run(self) -> Path:
        """What runs here: the notes of townhalls, and the keeper's socket."""
        return self.path / 'run'

    def townhall_note(self, pid: int) -> Path:
        """The process of a townhall and its URL; the townhall writes it, and removes it when it ends."""
        return self.run / f'townhall-{pid}.json'

    def townhall_notes(self) -> list[Path]:
        """The notes of all townhalls of this directory."""
        return sorted(self.run.glob('townhall-*.json'))

    @property
    def keeper_socket(self) -> Path:
        """Where the keeper of the town is asked to start processes; the keeper makes it."""
        return self.run / 'keeper.sock'

    # ------------------------------------------------------------------------------------------------ managed Redis

    @property
    def redis(self) -> Path:
        """The data of the managed Redis, which alone writes there."""
        return self.path / 'redis'

    @property
    def redis_socket(self) -> Path:
        """Where the managed Redis listens, unless this path is too long for a socket."""
        return self.path / 'redis.sock'

    @property
    def redis_elsewhere(self) -> Path:
        """The path of the socket where its own is too long; whoever needs that first writes it."""
        return self.path / 'redis.addr'

    @property
    def redis_start_lock(self) -> Path:
        """Locked by whoever starts the managed Redis, so that of two who come together one does."""
        return self.path / 'redis.lock'

    @property
    def redis_server_lock(self) -> Path:
        """Locked by the managed Redis for as long as it lives; holds its pid."""
        return self.redis / 'server.lock'

    @property
    def redis_log(self) -> Path:
        """What the managed Redis prints."""
        return self.path / 'redis.log'

    # ------------------------------------------------------------------------------------------------------- agents

    @property
    def logs(self) -> Path:
        """The logs of agents, and nothing else: an agent may have any name."""
        return self.path / 'logs'

    def log(self, name: str) -> Path:
        """The log of the agent of that name; its workers write it."""
        return self.logs / f'{name}.log'

    @property
    def agents(self) -> Path:
        """What is kept of agents beside their logs, by their ids."""
        return self.path / 'agents'

    def token(self, agent_id: str) -> Path:
        """The token of an agent's process; each process writes its own over the one before."""
        return self.agents / f'{agent_id}.token'

    def tokens(self) -> Iterator[Path]:
        """The tokens of all agents."""
        return self.agents.glob('*.token')

    def prompt(self, agent_id: str) -> Path:
        """The prompt of an agent's round; its worker writes it."""
        return self.agents / f'{agent_id}.prompt'

    def spool(self, agent_id: str) -> Path:
        """A directory of reports that were not received yet, a file each; an agent's workers write them."""
        return self.agents / f'{agent_id}.spool'

    def process(self, agent_id: str) -> Path:
        """The process of an agent's worker, which writes it, and locks it for as long as it lives."""
        return self.agents / f'{agent_id}.process'

    def processes(self) -> Iterator[Path]:
        """The notes of all workers; the stem of each is the agent's id."""
        return self.agents.glob('*.process')

    def of_agent(self, agent_id: str) -> Iterator[Path]:
        """All that is kept of an agent beside its log."""
        return self.agents.glob(f'{agent_id}.*')
