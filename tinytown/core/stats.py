"""Statistics of a town at one moment, for /metrics, /ready and /api/scaling, and the advice to autoscalers.

`take_stats` reads them in one round trip. Idle times and heartbeat ages come from Redis' clock alone. The results are
only advice: the supervisor decides whether a worker is dead and whose tasks move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from ..model import LIVE
from ..state.store import Step, text
from .town import Town

Recommendation = Literal['scale_up', 'steady', 'scale_down', 'scale_to_zero']
Dispatcher = Literal['running', 'idle', 'stalled', 'unknown']


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of tasks and agents.

    at        when they were taken, RFC 3339
    dead      dead letters
    urgent    urgent messages in the agents' inboxes
    resting   live agents that have been idle for `agent.idle_timeout_secs`
    heard     live agents that are starting, or whose last heartbeat is younger than a lease
    agents    agents by state
    totals    counters since the town began (`state.store` lists them)
    """

    at: str
    backlog: int
    assigned: int
    running: int
    dead: int
    urgent: int
    resting: int
    heard: int
    agents: dict[str, int]
    totals: dict[str, int]

    @property
    def pending(self) -> int:
        """Unfinished tasks that no agent is running."""
        return self.backlog + self.assigned

    @property
    def active(self) -> int:
        """Agents in a live state."""
        return sum(self.agents.get(state, 0) for state in LIVE)


class Scaling(TypedDict):
    """The input of an autoscaler: the answer of GET /api/scaling."""

    town: str
    timestamp: str
    queue_depth: int
    pending_tasks: int
    in_flight_tasks: int
    active_agents: int
    cold_agents: int
    desired_agents: int
    max_agents: int
    scaling_recommendation: Recommendation


def take_stats(town: Town) -> Step[Stats]:
    """The current statistics of a town."""
    settings = town.config.agent
    at, counts, agents, totals = yield town.store.stats(settings.idle_timeout_secs * 1000, settings.lease_secs * 1000)
    backlog, assigned, running, dead, urgent, resting, heard = counts
    by_state = _counts(agents)
    return Stats(text(at), backlog, assigned, running, dead, urgent, resting, heard, by_state, _counts(totals))


def _counts(flat: list[bytes]) -> dict[str, int]:
    return {text(name): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}


def scaling(town: Town) -> Step[Scaling]:
    """How many agents the town needs (one for each unfinished task, at most `max_agents`), and a recommendation."""
    stats = yield from take_stats(town)
    depth, max_agents = stats.pending + stats.running, town.config.max_agents
    desired = min(max_agents, depth)
    return {
        'town': town.name,
        'timestamp': stats.at,
        'queue_depth': depth,
        'pending_tasks': stats.pending,
        'in_flight_tasks': stats.running,
        'active_agents': stats.active,
        'cold_agents': stats.agents.get('Cold', 0),
        'desired_agents': desired,
        'max_agents': max_agents,
        'scaling_recommendation': recommend(desired, stats.active, stats.pending, stats.resting),
    }


def recommend(desired: int, active: int, pending: int, resting: int) -> Recommendation:
    """How to change the number of live agents. `active` is that number; `resting` of them have long been idle."""
    if desired > active:
        return 'scale_up'
    if desired == 0 and resting == active:
        return 'scale_to_zero'
    if desired < active and pending == 0:
        return 'scale_down'
    return 'steady'


def dispatcher(stats: Stats) -> Dispatcher:
    """Whether work makes progress. Idle: no agent has a task. Stalled: agents have tasks, but none sends heartbeats."""
    if not stats.assigned + stats.running:
        return 'idle'
    return 'running' if stats.heard else 'stalled'
