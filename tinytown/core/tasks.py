"""Tasks: work that is tracked from its assignment to its end."""

from __future__ import annotations

import json
from typing import Literal, NotRequired, TypedDict

from ..errors import Invalid
from ..model import (
    CONDUCTOR_ID,
    AgentRef,
    Assigned,
    Attempt,
    Cursor,
    InState,
    Limit,
    Outcome,
    Task,
    TaskId,
    TaskPage,
    TaskText,
    brief,
    new_id,
    to_json,
)
from ..state.client import Part
from ..state.store import Page, Step, text
from .task_history import Change, Run, runs, with_durations
from .town import Call


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


class History(TypedDict):
    task_id: str
    history: list[Change]
    attempts: list[Run]


class Retried(TypedDict):
    task_id: str
    state: Literal['pending']


def record(call: Call, description: str, tags: list[str]) -> tuple[Part, ...]:
    """A new task, as the scripts take it (new_task in scripts.lua); its id comes first."""
    task_id = new_id()
    head = f'{{"task_id":"{task_id}","description":{to_json(description)}'
    sender = call.by.agent_id or CONDUCTOR_ID
    return (task_id, head, to_json(brief(description)), to_json(tags), sender, call.config.agent.max_attempts)


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
    state: InState | None = None,
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
    held, said = _held(call, attempt), to_json(result)
    reply = yield call.store.finish(task_id, held, 'completed', said, 'null', call.by.agent_id)
    return {'task_id': task_id, 'state': _final(reply)}


def fail(
    call: Call, *, task_id: TaskId, attempt: Attempt | None = None, error: Outcome | None = None
) -> Step[Finished]:
    """Mark a task as failed. An agent gives the attempt it holds; a stale one is refused and changes nothing.

    Without attempt it is an operator's override, and recorded as such. A failed task can be retried.
    """
    held, said = _held(call, attempt), to_json(error)
    reply = yield call.store.finish(task_id, held, 'failed', 'null', said, call.by.agent_id)
    return {'task_id': task_id, 'state': _final(reply)}


def _held(call: Call, attempt: int | None) -> str:
    """The attempt that a report is of, '' for an operator's override. An agent has none: it must say what it holds."""
    if attempt is None and call.by.agent_id:
        detail = 'attempt is missing: an agent gives the one that it holds (TINYTOWN_ATTEMPT)'
        raise Invalid(detail, errors=[{'pointer': '/attempt', 'detail': detail}])
    return str(attempt or '')


def _final(reply: list[bytes]) -> Literal['completed', 'failed']:
    return 'completed' if reply[1] == b'completed' else 'failed'


def release(call: Call, *, task_id: TaskId, attempt: Attempt | None = None) -> Step[Released]:
    """Give a running task back to the backlog, its attempt counted. An agent gives the attempt it holds."""
    yield call.store.release(task_id, _held(call, attempt), call.by.agent_id)
    return {'task_id': task_id, 'state': 'pending'}


def history(call: Call, *, task_id: TaskId) -> Step[History]:
    """Tell why a task is where it is: each change of it, with when, by whom, which attempt and why.

    Beside them its attempts: how long each took, and where in its agent's log it stands.
    """
    joined, *logs = yield call.store.history(task_id)
    changes = with_durations(json.loads(b'[%b]' % joined))
    where = {attempt: text(log) for attempt, log in zip(logs[::2], logs[1::2], strict=True)}
    return {'task_id': task_id, 'history': changes, 'attempts': runs(changes, where)}


def cancel(call: Call, *, task_id: TaskId) -> Step[Cancelled]:
    """Cancel a task that is not finished, wherever it is. A worker that runs it stops within a heartbeat."""
    yield call.store.cancel(task_id)
    return {'task_id': task_id, 'state': 'cancelled'}


def retry(call: Call, *, task_id: TaskId) -> Step[Retried]:
    """Try a failed or cancelled task again: it returns to the backlog with a full set of attempts."""
    yield call.store.retry(task_id)
    return {'task_id': task_id, 'state': 'pending'}
