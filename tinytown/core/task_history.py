"""A task's history as a person reads it: how long each step took, and its attempts one by one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, Literal, NotRequired, TypedDict

RunOutcome = Literal['running', 'completed', 'failed', 'cancelled', 'requeued', 'dead_lettered']
_ENDS: Final[dict[str, RunOutcome]] = {
    'task.completed': 'completed',
    'task.failed': 'failed',
    'task.cancelled': 'cancelled',
    'task.requeued': 'requeued',
    'task.dead_lettered': 'dead_lettered',
}


class Change(TypedDict):
    """One change of a task. `at` is RFC 3339; `secs` the seconds since the one before; `pause` those until it is queued
    again.
    """

    type: str
    at: str
    task_id: str
    secs: NotRequired[float]
    agent_id: NotRequired[str]
    agent_name: NotRequired[str]
    attempt: NotRequired[int]
    why: NotRequired[str]
    pause: NotRequired[int]
    by: NotRequired[str]


class Run(TypedDict):
    """One attempt of a task. Times are RFC 3339, `secs` is how long it took.

    What it said stands in its agent's log from log_from to log_to (bytes, see agent.logs); log_to is null while it
    runs, or if its worker did not live to say.
    """

    attempt: int
    agent_name: str
    started_at: str
    ended_at: str | None
    secs: float | None
    outcome: RunOutcome
    log_from: int | None
    log_to: int | None


def with_durations(changes: Iterable[Change]) -> list[Change]:
    """The changes, each with the seconds since the one before."""
    found: list[Change] = []
    for change in changes:
        if found:
            change['secs'] = _between(found[-1]['at'], change['at'])
        found.append(change)
    return found


def runs(changes: Iterable[Change], logs: Mapping[int, str]) -> list[Run]:
    """The attempts in a history, oldest first; `logs` says where each stands in its log, as from-to or from."""
    found: list[Run] = []
    for change in changes:
        if change['type'] == 'task.started':
            found.append(_begun(change, logs.get(change['attempt'], '')))
        elif found and found[-1]['outcome'] == 'running' and change['type'] in _ENDS:
            found[-1]['ended_at'] = change['at']
            found[-1]['secs'] = _between(found[-1]['started_at'], change['at'])
            found[-1]['outcome'] = _ENDS[change['type']]
    return found


def _begun(change: Change, log: str) -> Run:
    begin, _, end = log.partition('-')
    return {
        'attempt': change['attempt'],
        'agent_name': change['agent_name'],
        'started_at': change['at'],
        'ended_at': None,
        'secs': None,
        'outcome': 'running',
        'log_from': int(begin) if begin else None,
        'log_to': int(end) if end else None,
    }


def _between(earlier: str, later: str) -> float:
    return round((datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds(), 3)
