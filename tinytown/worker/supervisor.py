"""The caretaker: the part of townhall that frees the work of those who died, and keeps the town within its bounds.

Each townhall has one. Of all of them the one that holds the caretaker's record in Redis looks after the town: leases,
pauses, retention. Of those on a host the one that holds the record of that host looks after the processes there, of
which nothing can be told from elsewhere: it buries the dead, and starts the crashed again.

It judges by what it sees change and not by the time of day: a heartbeat is a counter, and silence is the time, on a
monotonic clock of its own, since that counter last moved. Only silence that it has witnessed counts: after a while in
which it did not look (it was stopped, or Redis was away and nobody could beat) it begins to listen anew. So a clock
that is set by a day, a suspended machine or a task that waits in a queue for hours move nothing.

Verdicts on a worker: *dead*, its process is proven gone: its work moves at once. *lost*, it has not been heard of for a
lease: the task that it holds moves. *quiet*, not heard of for three heartbeats, and *alive*: nothing moves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

from ..core import holders
from ..core.agents import WORKER_START_SECS, start_worker
from ..core.hosts import Presence
from ..core.town import Town
from ..errors import TownError, UsageError
from ..host import report_spool
from ..host.processes import Identity, identify, is_beside, marked, read_identity, reap, stop_tree, this_host, verdict
from ..model import new_id
from ..state.store import Command, text

logger = logging.getLogger('tinytown.worker')

TICK_SECS: Final = 1.0
LONGEST_START: Final = 3 * WORKER_START_SECS  # after which a start is given up, whatever is known of it
TAKE_OVER_SECS: Final = 5.0  # a caretaker that is silent for so long is followed by another
GAP_SECS: Final = 3.0  # between two looks: after a longer one what was seen before tells nothing
RETENTION_SECS: Final = 30.0  # between two looks at what is past its retention
MAX_FORGOTTEN: Final = 200  # finished tasks that one look deletes
SUPERVISOR: Final = 'caretaker'  # as the history of a task names it
_LEFTOVER_GRACE: Final = 1.0  # for what a dead worker has left behind


class Silence:
    """How long each thing's value has stayed the same, by the clock that it is told."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Hashable, float]] = {}

    def look(self, values: Iterable[tuple[Hashable, Hashable]], now: float) -> dict[Any, float]:
        """Seconds of silence of each thing; what is not among `values` is forgotten."""
        fresh: dict[Hashable, tuple[Hashable, float]] = {}
        for thing, value in values:
            before = self._seen.get(thing)
            fresh[thing] = before if before is not None and before[0] == value else (value, now)
        self._seen = fresh
        return {thing: now - since for thing, (_, since) in fresh.items()}


class Supervisor(threading.Thread):
    """Looks after a town and this host once a second until `close`, and says by `presence` that this townhall is there.

    `clock` is monotonic; `start` starts a worker.
    """

    def __init__(
        self,
        town: Town,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[..., None] = start_worker,
        presence: Presence | None = None,
    ) -> None:
        super().__init__(name='caretaker', daemon=True)
        self.town = town
        self._store = town.store.acting_as(SUPERVISOR)
        self._clock = clock
        self._start_worker = start
        self._token = new_id()
        self._presence = presence
        self._rivals: dict[str, tuple[tuple[str, str], float]] = {}  # by what they look after, and since when it is so
        self._duties = (False, False)
        self._forget_at = 0.0
        self._under_way: dict[str, threading.Thread] = {}
        self._said = ''
        self._over = threading.Event()
        self._begin(self._clock())

    def _begin(self, now: float) -> None:
        """Forgets what was seen: silence is counted from here on."""
        self._looked = now
        self._workers, self._leases, self._pauses, self._crashes = (Silence() for _ in range(4))

    def run(self) -> None:
        while not self._over.wait(TICK_SECS):
            self._guard(self._look)
            reap()
        for what in ('', this_host()):  # else another takes over in a while
            self._guard(self._store.call, self._store.care_no_more(self._token, what))
        if self._presence:
            self._guard(self._store.call, self._presence.gone(self._store))
        self._store.close()

    def _look(self) -> None:
        self.tick(self._clock())

    def close(self) -> None:
        """Ends it, and lets another begin at once."""
        self._over.set()
        if self.is_alive():
            self.join(5)

    # -------------------------------------------------------------------------------------------------- one look

    def tick(self, now: float) -> None:
        """One look at the town, and what follows from it. Raises TownError when Redis is away."""
        if self._presence:
            self._store.call(self._presence.here(self._store))
        duties = self._is_mine('', now), self._is_mine(this_host(), now)
        if not any(duties):
            return
        workers, leases, delayed, crashed = self._store.call(self._store.vitals())
        if now - self._looked > GAP_SECS or duties != self._duties:
            self._begin(now)
        self._looked, self._duties = now, duties
        silent = self._judge_workers(workers, now)
        has_town, has_host = duties
        if has_host:
            self._revive_crashed(crashed, now)
        if has_town:
            self._judge_leases(leases, silent, now)
            self._requeue_delayed(delayed, now)
            if now >= self._forget_at:
                self._forget_old(now)

    def _is_mine(self, what: str, now: float) -> bool:
        """Whether this caretaker looks after a host ('': the town); it takes over from one whose count has stopped."""
        rival, since = self._rivals.get(what, (('', ''), 0.0))
        stale = rival if now - since >= TAKE_OVER_SECS else ('', '')
        token, count = map(text, self._store.call(self._store.care(self._token, what, *stale)))
        if token != rival[0]:
            who = 'this caretaker' if token == self._token else 'another caretaker'
            logger.debug(f'{who} looks after {f"host {what}" if what else "the town"}')
        if (token, count) != rival:
            self._rivals[what] = (token, count), now
        return token == self._token

    def _judge_workers(self, rows: list[list[bytes]], now: float) -> dict[str, float]:
        """Buries those who are proven dead, and those who can't come up. The silence of each agent, in seconds."""
        has_town, has_host = self._duties
        workers = [[text(part) for part in row] for row in rows]
        silence = self._workers.look(((row[3], row[8]) for row in workers), now)
        for agent_id, name, state, instance, host, boot, pid, start, _, starter in workers:
            quiet = silence[instance]
            if state == 'Draining' and quiet < LONGEST_START:
                continue  # whoever stops it settles its record
            if pid:
                is_dead = has_host and self._is_dead(agent_id, instance, Identity(host, boot, int(pid), start), quiet)
            else:
                is_dead = (has_town and quiet > LONGEST_START) or (has_host and _is_stillborn(starter, instance))
            if is_dead:
                self._apart(agent_id, self._bury, agent_id, name, instance)
        return {row[0]: silence[row[3]] for row in workers}

    def _is_dead(self, agent_id: str, instance: str, process: Identity, quiet: float) -> bool:
        """Whether a worker is dead. One of an earlier container of this host may not be seen: a lease has to do."""
        found = report_spool.judge(self.town.root, agent_id, instance, process)
        return found == 'dead' or (
            found == 'unknown' and is_beside(process) and quiet >= self.town.config.agent.lease_secs
        )

    def _bury(self, agent_id: str, name: str, instance: str) -> None:
        """Ends what a dead worker has left running, and then frees what it held."""
        stop_tree(None, instance, _LEFTOVER_GRACE)
        ending = self._death(agent_id, instance, 'its process died')
        self._store.run(holders.free(self._store, self.town.root, agent_id, ending))
        logger.info(f"the worker of '{name}' died; what it held is queued again")

    def _death(self, agent_id: str, instance: str, why: str) -> Command:
        """The ending of a process that is no more; by policy the agent is to be started again."""
        settings = self.town.config.agent
        restarts = 0 if settings.restart == 'never' else settings.restart_cap
        return holders.death(self._store, self.town.config, agent_id, instance, why, restarts)

    def _judge_leases(self, rows: list[list[bytes]], silent: dict[str, float], now: float) -> None:
        """Takes a task from a holder that has not been heard of for a lease."""
        lease = self.town.config.agent.lease_secs
        held = [tuple(map(text, row)) for row in rows]
        silence = self._leases.look(((task, (attempt, beats)) for task, attempt, beats, _ in held), now)
        for task, attempt, beats, agent in held:
            if silence[task] >= lease:
                to = 'inbox' if silent.get(agent, lease) < lease else 'backlog'
                pauses = self.town.config.agent.retry_backoff_secs
                quiet = f'its holder has not been heard of for {silence[task]:.0f} s'
                logger.info(f'task {task}, attempt {attempt}: {quiet}; it goes to the {to}', extra={'task_id': task})
                self._store.call(self._store.expire(task, attempt, beats, to, pauses))

    def _requeue_delayed(self, rows: list[list[bytes]], now: float) -> None:
        """Queues the tasks whose pause between two attempts is over."""
        pauses = {text(task): float(pause) for task, pause in rows}
        for task, waited in self._pauses.look(pauses.items(), now).items():
            if waited >= pauses[task]:
                logger.debug(f'task {task} is queued again after a pause of {waited:.0f} s', extra={'task_id': task})
                self._store.call(self._store.due(task))

    def _revive_crashed(self, rows: list[list[bytes]], now: float) -> None:
        """Starts the agents again that crashed here and whose policy says so, after a pause that grows."""
        crashed = {
            text(agent): (text(name), int(crashes))
            for agent, name, crashes, host in rows
            if text(host) in ('', this_host())
        }
        pauses = self.town.config.agent.retry_backoff_secs or [0]
        for agent, waited in self._crashes.look(crashed.items(), now).items():
            name, crashes = crashed[agent]
            if waited >= pauses[min(max(crashes, 1), len(pauses)) - 1]:
                self._apart(agent, self._revive, agent, name)

    def _revive(self, agent_id: str, name: str) -> None:
        """Starts a crashed agent. A start that fails is one more crash, with its pause, and counts for the cap."""
        instance = new_id()
        us = identify(os.getpid()).line
        self._store.call(self._store.restarting(agent_id, self.town.config.max_agents, instance, us, (this_host(),)))
        try:
            self._start_worker(self.town, agent_id, name, instance)
        except Exception:
            stop_tree(None, instance, 0)
            self._store.call(self._death(agent_id, instance, 'its worker did not start'))
            raise
        logger.info(f"'{name}' runs again")

    def _forget_old(self, now: float) -> None:
        """Deletes finished tasks past their retention; a bounded number, and the rest at the next look."""
        age = self.town.config.retention.finished_tasks_days * 86_400_000
        if self._store.call(self._store.forget(age, MAX_FORGOTTEN))[0] < MAX_FORGOTTEN:
            self._forget_at = now + RETENTION_SECS

    # ---------------------------------------------------------------------------------------------------- running

    def _apart(self, key: str, what: Callable[..., None], *arguments: Any) -> None:
        """Does what takes long on a thread of its own, one at a time for each agent."""
        if key in self._under_way and self._under_way[key].is_alive():
            return

        def work() -> None:
            self._guard(what, *arguments)
            self._store.close()

        self._under_way = {agent: thread for agent, thread in self._under_way.items() if thread.is_alive()}
        self._under_way[key] = threading.Thread(target=work, name=f'caretaker-{key}', daemon=True)
        self._under_way[key].start()

    def _guard(self, what: Callable[..., object], *arguments: Any) -> None:
        """Does something that may fail: whatever it is, the caretaker goes on and tries again at its next look."""
        try:
            what(*arguments)
        except (TownError, UsageError) as e:
            self._complain(str(e))
        except Exception as e:
            self._complain(f'a fault of ours: {e!r}', e)

    def _complain(self, what: str, error: Exception | None = None) -> None:
        """Says what is wrong once, and not at every look."""
        if what != self._said:
            self._said = what
            logger.log(logging.ERROR if error else logging.WARNING, what, exc_info=error)


def _is_stillborn(starter: str, instance: str) -> bool:
    """Whether a worker that has not come up can't any more: who was starting it is dead, and it has no process."""
    process = read_identity(starter)
    return process is not None and verdict(process) == 'dead' and not marked(instance)
