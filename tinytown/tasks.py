"""Tasks: work that is tracked from its assignment to its end."""

from __future__ import annotations

import json
from typing import Literal, NotRequired, TypedDict

from .model import (
    CONDUCTOR_ID,
    AgentRef,
    Assigned,
    Attempt,
    Cursor,
    Limit,
    Outcome,
    Task,
    TaskId,
    TaskPage,
    TaskState,
    TaskText,
    brief,
    new_id,
)
from .store import Page, Step, text
from .town import Call
from .wire import Part


class PendingTask(TypedDict):
    task_id: str
    description: str
    agent_id: str
    agent_name: str


class PendingPage(TypedDict):
    tasks: list[PendingTask]
    count: int
    next_cursor: NotRequired[str]


class Finished(TypedDict):
    task_id: str
    state: Literal['completed', 'failed']


class Cancelled(TypedDict):
    task_id: str
    state: Literal['cancelled']


class Released(TypedDict):
    task_id: str
    state: Literal['pending']


class Change(TypedDict):
    """One change of a task. `at` is RFC 3339; `pause` the seconds until it is queued again."""

    type: str
    at: str
    task_id: str
    agent_id: NotRequired[str]
    agent_name: NotRequired[str]
    attempt: NotRequired[int]
    why: NotRequired[str]
    pause: NotRequired[int]
    by: NotRequired[str]


class History(TypedDict):
    task_id: str
    history: list[Change]


class Retried(TypedDict):
    task_id: str
    state: Literal['pending']


def record(call: Call, description: str, tags: list[str]) -> tuple[Part, ...]:
    """A new task, as the scripts take it (new_task in scripts.lua); its id comes first."""
    task_id = new_id()
    head = f'{{"task_id":"{task_id}","description":{_json(description)}'
    sender = call.by.agent_id or CONDUCTOR_ID
    return (task_id, head, _json(brief(description)), _json(tags), sender, call.config.agent.max_attempts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(',', ':'))


def assigned(reply: list[bytes]) -> Assigned:
    """What a script says of a task that now stands in an inbox."""
    return {'task_id': text(reply[0]), 'agent_id': text(reply[1]), 'agent_name': text(reply[2])}


def listing(key: str, reply: list[bytes]) -> bytes:
    """A page as JSON: its items, the total, and where to go on."""
    count, following, items = reply
    total = int(count)
    after = b',"next_cursor":"%b"' % following if following else b''
    return b'{"%b":[%b],"count":%d%b}' % (key.encode(), items, total, after)


def assign(call: Call, *, agent: AgentRef, task: TaskText) -> Step[Assigned]:
    """Give an agent a new task. It waits in the agent's inbox until its worker takes it, one task a round.

    For work that any agent may do, add it to the backlog instead.
    """
    reply = yield call.store.assign(agent, record(call, task, []))
    return assigned(reply)


def list_pending(call: Call, *, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[PendingPage]]:
    """List the tasks that are assigned and wait in an inbox, oldest first. The backlog is listed apart."""
    reply = yield call.store.pending(limit, cursor)
    return Page(listing('tasks', reply))


def list_tasks(
    call: Call,
    *,
    state: TaskState | None = None,
    agent: AgentRef | None = None,
    limit: Limit = 500,
    cursor: Cursor = '',
) -> Step[Page[TaskPage]]:
    """List tasks, newest first: all, those in one state, those of one agent, or both."""
    reply = yield call.store.tasks(limit, cursor, state or '', agent or '')
    return Page(listing('tasks', reply))


def show(call: Call, *, task_id: TaskId) -> Step[Page[Task]]:
    """Show one task: its state, who has it, which attempt, and what came of it."""
    reply = yield call.store.task(task_id)
    return Page(reply[0])


def complete(
    call: Call, *, task_id: TaskId, attempt: Attempt | None = None, result: Outcome | None = None
) -> Step[Finished]:
    """Mark a task as done. An agent gives the attempt it holds; a stale one is refused and changes nothing.

    Without attempt it is an operator's override, and recorded as such.
    """
    reply = yield call.store.finish(task_id, str(attempt or ''), 'completed', _json(result), 'null')
    return {'task_id': task_id, 'state': _final(reply)}


def fail(
    call: Call, *, task_id: TaskId, attempt: Attempt | None = None, error: Outcome | None = None
) -> Step[Finished]:
    """Mark a task as failed. An agent gives the attempt it holds; a stale one is refused and changes nothing.

    Without attempt it is an operator's override, and recorded as such. A failed task can be retried.
    """
    reply = yield call.store.finish(task_id, str(attempt or ''), 'failed', 'null', _json(error))
    return {'task_id': task_id, 'state': _final(reply)}


def _final(reply: list[bytes]) -> Literal['completed', 'failed']:
    return 'completed' if reply[1] == b'completed' else 'failed'


def release(call: Call, *, task_id: TaskId, attempt: Attempt | None = None) -> Step[Released]:
    """Give a running task back to the backlog, its attempt counted. An agent gives the attempt it holds."""
    yield call.store.release(task_id, str(attempt or ''))
    return {'task_id': task_id, 'state': 'pending'}


def history(call: Call, *, task_id: TaskId) -> Step[Page[History]]:
    """Tell why a task is where it is: each change of it, with when, by whom, which attempt and why."""
    reply = yield call.store.history(task_id)
    return Page(b'{"task_id":"%b","history":[%b]}' % (task_id.encode(), reply[0]))


def cancel(call: Call, *, task_id: TaskId) -> Step[Cancelled]:
    """Cancel a task that is not finished, wherever it is. A worker that runs it stops within a heartbeat."""
    yield call.store.cancel(task_id)
    return {'task_id': task_id, 'state': 'cancelled'}


def retry(call: Call, *, task_id: TaskId) -> Step[Retried]:
    """Try a failed or cancelled task again: it returns to the backlog with a full set of attempts."""
    yield call.store.retry(task_id)
    return {'task_id': task_id, 'state': 'pending'}
