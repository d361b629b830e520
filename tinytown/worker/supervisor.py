"""The supervisor: it frees the work of dead workers, restarts crashed agents, and deletes what is past its retention.

Every townhall runs a supervisor, a thread that looks at the town once a second (`tick`). Two kinds of duty exist, and
each has one supervisor in charge of it, chosen by a record in Redis:

- The town: leases, the pauses between attempts, retention. One supervisor of the whole town is in charge.
- A host: the processes on it, which only that host can examine. Of the supervisors on a host, one is in charge: it ends
  what dead workers left running, frees their work, and restarts crashed agents.

The supervisor never compares times of day. Each heartbeat increments a counter. The silence of a worker is the time
since its counter last changed, on the supervisor's monotonic clock. Only silence that the supervisor has observed
counts: after a gap between its looks (its process was stopped, or Redis was unreachable, so that no worker could send
heartbeats) it starts to measure anew. So neither a changed clock nor a suspended machine nor a task that waits in a
queue for hours has any effect.

A worker whose process is proven dead loses all that it holds at once. A worker that is silent for a lease loses the
task that it runs. Shorter silence has no effect.
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
from ..host.processes import (
    Identity,
    identify,
    is_in_other_namespace,
    marked,
    read_identity,
    reap,
    stop_tree,
    this_host,
    verdict,
)
from ..model import new_id
from ..state.store import Command, text

logger = logging.getLogger('tinytown.worker')

TICK_SECS: Final = 1.0
MAX_START_SECS: Final = 3 * WORKER_START_SECS  # a worker that is not up by then counts as dead
TAKE_OVER_SECS: Final = 5.0  # after so much silence of the supervisor in charge, another one takes over
GAP_SECS: Final = 3.0  # after a longer pause between two looks, earlier observations are void
RETENTION_SECS: Final = 30.0  # between two deletions of old tasks
MAX_DELETED: Final = 200  # tasks that one deletion removes
SUPERVISOR: Final = 'caretaker'  # its principal name in stored records, an interface; so the old name stays
_LEFTOVER_GRACE: Final = 1.0  # seconds, for the processes that a dead worker left running


class Silence:
    """Measures for how long the value of each key has stayed the same."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Hashable, float]] = {}

    def update(self, values: Iterable[tuple[Hashable, Hashable]], now: float) -> dict[Any, float]:
        """Takes the present (key, value) pairs. Returns the seconds since each value changed; forgets other keys."""
        fresh: dict[Hashable, tuple[Hashable, float]] = {}
        for key, value in values:
            before = self._seen.get(key)
            fresh[key] = before if before is not None and before[0] == value else (value, now)
        self._seen = fresh
        return {key: now - since for key, (_, since) in fresh.items()}


class Supervisor(threading.Thread):
    """Watches over a town and this host, once a second until `close`.

    `clock` returns monotonic seconds; `start` starts a worker. With `presence`, the thread also announces every second
    that this townhall serves its host.
    """

    def __init__(
        self,
        town: Town,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[..., None] = start_worker,
        presence: Presence | None = None,
    ) -> None:
        super().__init__(name='supervisor', daemon=True)
        self.town = town
        self._store = town.store.acting_as(SUPERVISOR)
        self._clock = clock
        self._start_worker = start
        self._token = new_id()
        self._presence = presence
        # By host ('': the town): token and count of the supervisor in charge, and since when the count is the same.
        self._leaders: dict[str, tuple[tuple[str, str], float]] = {}
        self._duties = (False, False)  # whether it is in charge of the town, and of this host
        self._delete_at = 0.0
        self._threads: dict[str, threading.Thread] = {}  # by agent
        self._last_complaint = ''
        self._closing = threading.Event()
        self._forget_observations(self._clock())

    def _forget_observations(self, now: float) -> None:
        """Starts to measure all silence anew."""
        self._last_tick = now
        self._workers, self._leases, self._pauses, self._crashes = (Silence() for _ in range(4))

    def run(self) -> None:
        while not self._closing.wait(TICK_SECS):
            self._guard(self._tick_now)
            reap()
        for host in ('', this_host()):  # so that another supervisor takes over without waiting for TAKE_OVER_SECS
            self._guard(self._store.call, self._store.resign_supervisor(self._token, host))
        if self._presence:
            self._guard(self._store.call, self._presence.gone(self._store))
        self._store.close()

    def _tick_now(self) -> None:
        self.tick(self._clock())

    def close(self) -> None:
        """Stops the thread. Another supervisor can take over at once."""
        self._closing.set()
        if self.is_alive():
            self.join(5)

    # -------------------------------------------------------------------------------------------------- one look

    def tick(self, now: float) -> None:
        """Looks at the town once, at the clock's time `now`, and acts. Raises TownError if Redis is unreachable."""
        if self._presence:
            self._store.call(self._presence.here(self._store))
        duties = self._is_in_charge('', now), self._is_in_charge(this_host(), now)
        if not any(duties):
            return
        workers, leases, delayed, crashed = self._store.call(self._store.liveness())
        if now - self._last_tick > GAP_SECS or duties != self._duties:
            self._forget_observations(now)
        self._last_tick, self._duties = now, duties
        silence = self._check_workers(workers, now)
        has_town, has_host = duties
        if has_host:
            self._restart_crashed(crashed, now)
        if has_town:
            self._check_leases(leases, silence, now)
            self._requeue_delayed(delayed, now)
            if now >= self._delete_at:
                self._delete_old(now)

    def _is_in_charge(self, host: str, now: float) -> bool:
        """Whether this supervisor is in charge of a host ('': the town).

        The supervisor in charge increments a count in Redis with each look. If the count of another one has not changed
        for TAKE_OVER_SECS, this one takes over.
        """
        last, since = self._leaders.get(host, (('', ''), 0.0))
        stale = last if now - since >= TAKE_OVER_SECS else ('', '')
        token, count = map(text, self._store.call(self._store.elect_supervisor(self._token, host, *stale)))
        if token != last[0]:
            whose = "this townhall's" if token == self._token else "another townhall's"
            logger.debug(f'{whose} supervisor is in charge of {f"host {host}" if host else "the town"}')
        if (token, count) != last:
            self._leaders[host] = (token, count), now
        return token == self._token

    def _check_workers(self, rows: list[list[bytes]], now: float) -> dict[str, float]:
        """Frees what dead workers and failed starts hold. Returns the silence of each agent in seconds."""
        has_town, has_host = self._duties
        workers = [[text(part) for part in row] for row in rows]
        silence = self._workers.update(((row[3], row[8]) for row in workers), now)
        for agent_id, name, state, instance, host, boot, pid, start, _, starter in workers:
            quiet = silence[instance]
            if state == 'Draining' and quiet < MAX_START_SECS:
                continue  # the process that stops the agent updates its record
            if pid:
                is_dead = has_host and self._is_dead(agent_id, instance, Identity(host, boot, int(pid), start), quiet)
            else:
                is_dead = (has_town and quiet > MAX_START_SECS) or (has_host and _start_failed(starter, instance))
            if is_dead:
                self._run_in_thread(agent_id, self._free_dead, agent_id, name, instance)
        return {row[0]: silence[row[3]] for row in workers}

    def _is_dead(self, agent_id: str, instance: str, process: Identity, quiet: float) -> bool:
        """Whether a worker of this host is dead.

        In another container of this host its process may be invisible; there, silence for a lease counts as death.
        """
        judged = report_spool.judge(self.town.root, agent_id, instance, process)
        return judged == 'dead' or (
            judged == 'unknown' and is_in_other_namespace(process) and quiet >= self.town.config.agent.lease_secs
        )

    def _free_dead(self, agent_id: str, name: str, instance: str) -> None:
        """Ends the processes that a dead worker left running, and then frees what it held."""
        stop_tree(None, instance, _LEFTOVER_GRACE)
        ending = self._death(agent_id, instance, 'its process died')
        self._store.run(holders.free(self._store, self.town.root, agent_id, ending))
        logger.info(f"the worker of '{name}' died; what it held is queued again")

    def _death(self, agent_id: str, instance: str, why: str) -> Command:
        """The command that records a death. It schedules a restart of the agent if `agent.restart` says so."""
        settings = self.town.config.agent
        restarts = 0 if settings.restart == 'never' else settings.restart_cap
        return holders.death(self._store, self.town.config, agent_id, instance, why, restarts)

    def _check_leases(self, rows: list[list[bytes]], agent_silence: dict[str, float], now: float) -> None:
        """Takes each task whose lease has expired from its holder.

        The task goes to the inbox of that agent if the agent still sends heartbeats, else to the backlog.
        """
        lease = self.town.config.agent.lease_secs
        held = [tuple(map(text, row)) for row in rows]
        silence = self._leases.update(((task, (attempt, beats)) for task, attempt, beats, _ in held), now)
        for task, attempt, beats, agent in held:
            if silence[task] >= lease:
                to = 'inbox' if agent_silence.get(agent, lease) < lease else 'backlog'
                pauses = self.town.config.agent.retry_backoff_secs
                quiet = f'no heartbeat from its holder for {silence[task]:.0f} s'
                logger.info(f'task {task}, attempt {attempt}: {quiet}; it goes to the {to}', extra={'task_id': task})
                self._store.call(self._store.expire(task, attempt, beats, to, pauses))

    def _requeue_delayed(self, rows: list[list[bytes]], now: float) -> None:
        """Requeues the tasks whose pause between two attempts is over."""
        pauses = {text(task): float(pause) for task, pause in rows}
        for task, waited in self._pauses.update(pauses.items(), now).items():
            if waited >= pauses[task]:
                logger.debug(f'task {task} is queued again after a pause of {waited:.0f} s', extra={'task_id': task})
                self._store.call(self._store.due(task))

    def _restart_crashed(self, rows: list[list[bytes]], now: float) -> None:
        """Restarts the crashed agents of this host that are scheduled for it, each after a backoff."""
        crashed = {
            text(agent): (text(name), int(crashes))
            for agent, name, crashes, host in rows
            if text(host) in ('', this_host())
        }
        pauses = self.town.config.agent.retry_backoff_secs or [0]
        for agent, waited in self._crashes.update(crashed.items(), now).items():
            name, crashes = crashed[agent]
            if waited >= pauses[min(max(crashes, 1), len(pauses)) - 1]:
                self._run_in_thread(agent, self._restart, agent, name)

    def _restart(self, agent_id: str, name: str) -> None:
        """Starts the worker of a crashed agent. A failed start is one more crash: it has its backoff and its cap."""
        instance = new_id()
        starter = identify(os.getpid()).line
        most = self.town.config.max_agents
        self._store.call(self._store.restarting(agent_id, most, instance, starter, (this_host(),)))
        try:
            self._start_worker(self.town, agent_id, name, instance)
        except Exception:
            stop_tree(None, instance, 0)
            self._store.call(self._death(agent_id, instance, 'its worker did not start'))
            raise
        logger.info(f"'{name}' runs again")

    def _delete_old(self, now: float) -> None:
        """Deletes finished tasks past their retention, at most MAX_DELETED; the next look deletes more."""
        age = self.town.config.retention.finished_tasks_days * 86_400_000
        if self._store.call(self._store.forget(age, MAX_DELETED))[0] < MAX_DELETED:
            self._delete_at = now + RETENTION_SECS

    # ---------------------------------------------------------------------------------------------------- running

    def _run_in_thread(self, agent_id: str, function: Callable[..., None], *arguments: Any) -> None:
        """Runs a slow function in a thread. Does nothing if the previous one for that agent is still running."""
        if agent_id in self._threads and self._threads[agent_id].is_alive():
            return

        def work() -> None:
            self._guard(function, *arguments)
            self._store.close()

        self._threads = {agent: thread for agent, thread in self._threads.items() if thread.is_alive()}
        self._threads[agent_id] = threading.Thread(target=work, name=f'supervisor-{agent_id}', daemon=True)
        self._threads[agent_id].start()

    def _guard(self, function: Callable[..., object], *arguments: Any) -> None:
        """Calls a function and logs any exception: the supervisor must not end, and tries again at its next look."""
        try:
            function(*arguments)
        except (TownError, UsageError) as e:
            self._complain(str(e))
        except Exception as e:
            self._complain(f'internal error: {e!r}', e)

    def _complain(self, message: str, error: Exception | None = None) -> None:
        """Logs a message, unless it is the same as the last one: a lasting fault would repeat it every second."""
        if message != self._last_complaint:
            self._last_complaint = message
            logger.log(logging.ERROR if error else logging.WARNING, message, exc_info=error)


def _start_failed(starter: str, instance: str) -> bool:
    """Whether a worker that is not up can never come up: the process that starts it is dead, and it has no process."""
    process = read_identity(starter)
    return process is not None and verdict(process) == 'dead' and not marked(instance)
