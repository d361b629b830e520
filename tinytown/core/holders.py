"""Frees the task that an agent holds when its process has ended. `free` keeps the order: reports first.

The supervisor (when it finds a process dead), `recovery.recover`, `agents.stop_process` and a worker that exits call
`free`. They differ only in the `ending`:

`death(…)`          The process died, so the attempt of its task failed. The task is queued again after a pause; after
                    its last attempt it becomes a dead letter. The agent is in Error, or is started again. But if the
                    agent was already being stopped, its task is requeued as below and the agent is Stopped.
`store.depart(…)`   The process was stopped or exited by itself. Its task is requeued, and the attempt counts. The task
                    never becomes a dead letter here: stopping an agent says nothing about its task.

Some places free a task without `free`:
- A worker that did not start has run nothing, so it has no reports (`agents.undo_spawn`, `agents.undo_restart`, a
  start by the supervisor). A worker whose CLI can't be run has delivered the reports of its earlier rounds.
- An agent that is abandoned on another host, or in another container, may still run. It delivers its own reports, and
  they are refused.
- If a lease expires, the holder is only silent, and loses just that task (`expire`).
- A new process of an agent delivers the reports of earlier ones before its `hello`, which requeues their task. It waits
  for Redis as long as that takes.
"""

from __future__ import annotations

from pathlib import Path

from ..host import report_spool
from ..settings import Config
from ..state.store import Command, Step, Store


def free(store: Store, root: Path, agent_id: str, ending: Command) -> Step[None]:
    """Delivers the reports that an agent's processes left in `root`, then runs `ending`, which frees their task.

    In the other order, finished work would be done again. No process of the agent may still run, except the caller.
    """
    yield from report_spool.deliver_all(store, root, agent_id)
    yield ending


def death(store: Store, config: Config, agent_id: str, instance: str, why: str, restarts: int = 0) -> Command:
    """The `ending` for a process that died. The agent is restarted up to `restarts` times in a row (0: never)."""
    return store.died(agent_id, instance, why, config.agent.retry_backoff_secs, restarts)
