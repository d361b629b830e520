"""A task's history for people: how long each step took, and the list of its attempts. Pure functions, for `tasks`."""

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
    """One change of a task. `at` is RFC 3339; `secs` are the seconds since the previous change.

    `pause` is the backoff in seconds before the task is queued again.
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
    """One attempt of a task. Times are RFC 3339; `secs` is its duration.

    log_from and log_to are the byte offsets of its output in its agent's log (see agent.logs). log_to is null while the
    attempt runs, or if its worker died before it recorded the end.
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
    """The changes, with `secs` added to all but the first."""
    timed: list[Change] = []
    for change in changes:
        if timed:
            change['secs'] = _between(timed[-1]['at'], change['at'])
        timed.append(change)
    return timed


def runs(changes: Iterable[Change], logs: Mapping[int, str]) -> list[Run]:
    """The attempts in a history, oldest first. `logs` has the log offsets of each attempt, as `from-to` or `from`."""
    attempts: list[Run] = []
    for change in changes:
        if change['type'] == 'task.started':
            attempts.append(_started(change, logs.get(change['attempt'], '')))
        elif attempts and attempts[-1]['outcome'] == 'running' and change['type'] in _ENDS:
            attempts[-1]['ended_at'] = change['at']
            attempts[-1]['secs'] = _between(attempts[-1]['started_at'], change['at'])
            attempts[-1]['outcome'] = _ENDS[change['type']]
    return attempts


def _started(change: Change, log: str) -> Run:
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
