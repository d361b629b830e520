"""The census of a town: what it holds and has done at one moment, and what follows from that for those who watch it.

One round trip. How long an agent has been idle, and when a worker was last heard of, is told by the clock of Redis
alone. Nothing but advice follows from it; who is dead, and whose work moves, is the caretaker's to judge.
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
    """`at` is RFC 3339, `agents` counts them by state, `totals` what ever happened (see `store`).

    `resting` are the live agents that have been idle for `agent.idle_timeout_secs`, `heard` those that were heard of
    within a lease.
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
        """Tasks that nobody works on yet."""
        return self.backlog + self.assigned

    @property
    def active(self) -> int:
        """Agents in a live state."""
        return sum(self.agents.get(state, 0) for state in LIVE)


class Scaling(TypedDict):
    """What an autoscaler goes by, as published."""

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


def take_census(town: Town) -> Step[Stats]:
    """The census of a town, now."""
    settings = town.config.agent
    at, counts, agents, totals = yield town.store.census(settings.idle_timeout_secs * 1000, settings.lease_secs * 1000)
    backlog, assigned, running, dead, urgent, resting, heard = counts
    by_state = _counts(agents)
    return Stats(text(at), backlog, assigned, running, dead, urgent, resting, heard, by_state, _counts(totals))


def _counts(flat: list[bytes]) -> dict[str, int]:
    return {text(name): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}


def scaling(town: Town) -> Step[Scaling]:
    """How many agents a town could use, and what to do about it."""
    census = yield from take_census(town)
    depth, most = census.pending + census.running, town.config.max_agents
    desired = min(most, depth)
    return {
        'town': town.name,
        'timestamp': census.at,
        'queue_depth': depth,
        'pending_tasks': census.pending,
        'in_flight_tasks': census.running,
        'active_agents': census.active,
        'cold_agents': census.agents.get('Cold', 0),
        'desired_agents': desired,
        'max_agents': most,
        'scaling_recommendation': recommend(desired, census.active, census.pending, census.resting),
    }


def recommend(desired: int, active: int, pending: int, resting: int) -> Recommendation:
    """What to do about the number of live agents, of which so many are at rest."""
    if desired > active:
        return 'scale_up'
    if desired == 0 and resting == active:
        return 'scale_to_zero'
    if desired < active and pending == 0:
        return 'scale_down'
    return 'steady'


def dispatcher(census: Stats) -> Dispatcher:
    """Whether work gets on: idle, there is none with an agent; stalled, there is, and no worker is heard of."""
    if not census.assigned + census.running:
        return 'idle'
    return 'running' if census.heard else 'stalled'
