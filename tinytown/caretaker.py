"""The caretaker: the part of townhall that frees the work of those who died, and keeps the town within its bounds.

Each townhall has one; one of them, the one that holds the caretaker's record in Redis, acts. It judges by what it sees
change and not by the time of day: a heartbeat is a counter, and silence is the time, on a monotonic clock of its own,
since that counter last moved. So a clock that is set by a day, a suspended machine or a task that waits in a queue for
hours move nothing.

Verdicts on a worker: *dead*, its process is proven gone: its work moves at once. *lost*, it has not been heard of for a
lease: the task that it holds moves. *quiet*, not heard of for three heartbeats, and *alive*: nothing moves.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

from . import reports
from .agents import START_SECS, revive, start_worker
from .errors import TownError
from .model import ALL_SCOPES, Principal, new_id
from .processes import Identity, reap, stop_tree, this_host, verdict
from .store import Step, text
from .town import Call, Town

TICK_SECS: Final = 1.0
TAKE_OVER_SECS: Final = 5.0  # a caretaker that is silent for so long is followed by another
RETENTION_SECS: Final = 30.0  # between two looks at what is past its retention
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


class Caretaker(threading.Thread):
    """Looks after a town once a second until `close`. `clock` is monotonic; `start` starts a worker."""

    def __init__(
        self, town: Town, clock: Callable[[], float] = time.monotonic, start: Callable[..., None] = start_worker
    ) -> None:
        super().__init__(name='caretaker', daemon=True)
        self.town = town
        self._call = Call(town, Principal('caretaker', ALL_SCOPES))
        self._clock = clock
        self._start_worker = start
        self._token = new_id()
        self._rival = ('', '')
        self._rivals, self._workers, self._leases, self._pauses, self._errors = (Silence() for _ in range(5))
        self._under_way: set[str] = set()
        self._forgot = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(TICK_SECS):
            try:
                self.tick(self._clock())
            except TownError as e:
                self._say(e.detail)
            reap()
        try:
            self._run(self._one(self.town.store.care_no_more(self._token)))
        except TownError:
            pass  # another takes over after TAKE_OVER_SECS
        self.town.store.close()

    def close(self) -> None:
        """Ends it, and lets another begin at once."""
        self._over.set()
        if self.is_alive():
            self.join(5)

    # -------------------------------------------------------------------------------------------------- one look

    def tick(self, now: float) -> None:
        """One look at the town, and what follows from it. Raises TownError when Redis is away."""
        if not self._is_mine(now):
            return
        workers, leases, delayed, crashed = self._run(self._one(self.town.store.vitals()))
        silent = self._judge_workers(workers, now)
        self._judge_leases(leases, silent, now)
        self._requeue_delayed(delayed, now)
        self._revive_crashed(crashed, now)
        if now - self._forgot > RETENTION_SECS:
            self._forgot = now
            self._forget_old()

    def _is_mine(self, now: float) -> bool:
        """Whether this caretaker is the one that acts; it takes over from one whose count has stopped."""
        silence = self._rivals.look([self._rival], now).get(self._rival[0], 0.0)
        stale = self._rival if silence >= TAKE_OVER_SECS else ('', '')
        token, count = map(text, self._run(self._one(self.town.store.care(self._token, *stale))))
        self._rival = (token, count)
        return token == self._token

    def _judge_workers(self, rows: list[list[bytes]], now: float) -> dict[str, float]:
        """Buries those who are proven dead, and those who never came up. The silence of each agent, in seconds."""
        workers = [[text(part) for part in row] for row in rows]
        silence = self._workers.look([(row[3] or row[0], row[8]) for row in workers], now)
        by_agent = {}
        for agent_id, name, state, instance, host, boot, pid, start, _ in workers:
            quiet = silence[instance or agent_id]
            by_agent[agent_id] = quiet
            process = Identity(host, boot, int(pid or 0), start)
            settling = state == 'Draining' and quiet < 3 * START_SECS  # whoever stops it settles its record
            stillborn = not pid and quiet > 3 * START_SECS
            if (stillborn or (pid and verdict(process) == 'dead')) and not settling:
                self._apart(agent_id, self._bury, agent_id, name, state, instance)
        return by_agent

    def _bury(self, agent_id: str, name: str, state: str, instance: str) -> None:
        """Ends what a dead worker has left running, and then frees what it held."""
        stop_tree(None, instance, _LEFTOVER_GRACE)
        self._run(reports.deliver_all(self.town.store, self.town.root, agent_id))  # finished work is not done again
        settings = self.town.config.agent
        closing = state == 'Draining'
        end = 'Stopped' if closing else 'Error'
        again = 0 if closing or settings.restart == 'never' else settings.restart_cap
        died = self.town.store.died(agent_id, instance, end, 'its process died', settings.retry_backoff_secs, again)
        self._run(self._one(died))
        self._say(f"the worker of '{name}' died; what it held is queued again")

    def _judge_leases(self, rows: list[list[bytes]], silent: dict[str, float], now: float) -> None:
        """Takes a task from a holder that has not been heard of for a lease."""
        lease = self.town.config.agent.lease_secs
        held = {text(task): (text(count), text(agent)) for task, count, agent in rows}
        for task, quiet in self._leases.look(((task, count) for task, (count, _) in held.items()), now).items():
            if quiet >= lease:
                count, agent = held[task]
                to = 'inbox' if silent.get(agent, lease) < lease else 'backlog'
                pauses = self.town.config.agent.retry_backoff_secs
                self._run(self._one(self.town.store.expire(task, count, to, pauses)))

    def _requeue_delayed(self, rows: list[list[bytes]], now: float) -> None:
        """Queues the tasks whose pause between two attempts is over."""
        pauses = {text(task): float(pause) for task, pause in rows}
        for task, waited in self._pauses.look(pauses.items(), now).items():
            if waited >= pauses[task]:
                self._run(self._one(self.town.store.due(task)))

    def _revive_crashed(self, rows: list[list[bytes]], now: float) -> None:
        """Starts the agents again that crashed here and whose policy says so, after a pause that grows."""
        crashed = {
            text(agent): (text(name), int(crashes)) for agent, name, crashes, host in rows if text(host) == this_host()
        }
        pauses = self.town.config.agent.retry_backoff_secs or [0]
        for agent, waited in self._errors.look(crashed.items(), now).items():
            name, crashes = crashed[agent]
            if waited >= pauses[min(crashes, len(pauses)) - 1]:
                self._apart(agent, self._revive, agent, name)

    def _revive(self, agent_id: str, name: str) -> None:
        self._run(revive(self._call, agent_id, name, self._start_worker))
        self._say(f"'{name}' runs again")

    def _forget_old(self) -> None:
        """Deletes finished tasks past their retention, a bounded number at a time."""
        age = self.town.config.retention.finished_tasks_days * 86_400_000
        while self._run(self._one(self.town.store.forget(age, 200)))[0] == 200 and not self._over.is_set():
            pass

    # ---------------------------------------------------------------------------------------------------- running

    def _apart(self, key: str, what: Callable[..., None], *arguments: Any) -> None:
        """Does what takes long on a thread of its own, once at a time for each agent."""
        if key in self._under_way:
            return
        self._under_way.add(key)

        def work() -> None:
            try:
                what(*arguments)
            except TownError as e:
                self._say(e.detail)
            finally:
                self.town.store.close()
                self._under_way.discard(key)

        threading.Thread(target=work, name=f'caretaker-{key}', daemon=True).start()

    def _run(self, step: Step[Any]) -> Any:
        return self.town.store.run(step)

    def _one(self, command: Any) -> Step[Any]:
        command.by = self._call.by.name
        return (yield command)

    def _say(self, what: str) -> None:
        print(f'caretaker: {what}', file=sys.stderr, flush=True)
