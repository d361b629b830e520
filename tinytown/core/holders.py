"""What an agent holds when its process is gone, and how it is freed: the one place that keeps the order.

The supervisor (a process found dead), `recover`, a stop and a worker that leaves all call `free`. They differ in the
`ending` alone:

`death(…)`          The process died. An attempt of its task has failed: it is made again after a pause, and after the
                    last one the task becomes a dead letter. The agent is in Error, or is started again. Only if it was
                    being stopped, its task goes back and it is Stopped.
`store.depart(…)`   The process was stopped, or leaves by itself. Its task goes back with its attempt counted, and never
                    becomes a dead letter: that somebody stopped an agent says nothing of the task.

Others free what is held without `free`, because no report can wait here:
- A worker that did not come up has run nothing (`agents.unmake`, `agents.put_down`, a start by the supervisor). One
  whose CLI can't be run has delivered the reports of its earlier rounds.
- An agent that is given up on another host, or in another container, may live on. It delivers its reports itself, and
  they are refused.
- A holder whose lease ends is only silent, and loses that task alone (`expire`).
- A new process of an agent delivers what earlier ones left before its `hello`, which queues their task again: it waits
  for Redis as long as that takes.
"""

from __future__ import annotations

from pathlib import Path

from ..host import report_spool
from ..settings import Config
from ..state.store import Command, Step, Store


def free(store: Store, root: Path, agent_id: str, ending: Command) -> Step[None]:
    """Delivers the reports that an agent's processes left here, and then frees what they held, by `ending`.

    In this order, or work that is done would be done again. No process of the agent may run any more but this one.
    """
    yield from report_spool.deliver_all(store, root, agent_id)
    yield ending


def death(store: Store, config: Config, agent_id: str, instance: str, why: str, restarts: int = 0) -> Command:
    """The ending of a process that died; after `restarts` deaths in a row the agent is not started again (0: never)."""
    return store.died(agent_id, instance, why, config.agent.retry_backoff_secs, restarts)
