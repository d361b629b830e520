"""Operations on tasks: pieces of work that are tracked until they are finished.

`recovery` and `dead_letters` handle tasks that lost their agent or used up their attempts.
"""

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
    """A new task as arguments for the scripts (see new_task in scripts.lua). The task's id comes first."""
    task_id = new_id()
    head = f'{{"task_id":"{task_id}","description":{to_json(description)}'
    sender = call.by.agent_id or CONDUCTOR_ID
    return (task_id, head, to_json(brief(description)), to_json(tags), sender, call.config.agent.max_attempts)


def assigned(reply: list[bytes]) -> Assigned:
    """The answer of an operation that assigned a task, from the script's reply."""
    return {'task_id': text(reply[0]), 'agent_id': text(reply[1]), 'agent_name': text(reply[2])}


def listing(key: str, reply: list[bytes]) -> bytes:
    """A page as JSON: its items under `key`, the total count, and the cursor of the next page if there is one."""
    count, following, items = reply
    total = int(count)
    after = b',"next_cursor":"%b"' % following if following else b''
    return b'{"%b":[%b],"count":%d%b}' % (key.encode(), items, total, after)


def assign(call: Call, *, agent: AgentRef, task: TaskText) -> Step[Assigned]:
    """Assign a new task to an agent. It waits in the agent's inbox; the agent's worker takes one task a round.

    If any agent may do the work, add the task to the backlog instead.
    """
    reply = yield call.store.assign(agent, record(call, task, []))
    return assigned(reply)


def list_pending(call: Call, *, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[PendingPage]]:
    """List the assigned tasks that still wait in an inbox, oldest first. It does not include the backlog."""
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
    """List tasks, newest first; with state or agent, only those in that state or of that agent."""
    reply = yield call.store.tasks(limit, cursor, state or '', agent or '')
    return Page(listing('tasks', reply))


def show(call: Call, *, task_id: TaskId) -> Step[Page[Task]]:
    """Show one task: its state, its agent, its attempt number, and its result or error."""
    reply = yield call.store.task(task_id)
    return Page(reply[0])


def complete(
    call: Call, *, task_id: TaskId, attempt: Attempt | None = None, result: Outcome | None = None
) -> Step[Finished]:
    """Mark a task as completed. An agent must give the number of its attempt; a stale attempt is refused.

    Without attempt, this is an operator's override and is recorded as one.
    """
    held = _held(call, attempt)
    reply = yield call.store.finish(task_id, held, 'completed', to_json(result), 'null', call.by.agent_id)
    return {'task_id': task_id, 'state': _final(reply)}


def fail(
    call: Call, *, task_id: TaskId, attempt: Attempt | None = None, error: Outcome | None = None
) -> Step[Finished]:
    """Mark a task as failed. An agent must give the number of its attempt; a stale attempt is refused.

    Without attempt, this is an operator's override and is recorded as one. A failed task can be retried.
    """
    held = _held(call, attempt)
    reply = yield call.store.finish(task_id, held, 'failed', 'null', to_json(error), call.by.agent_id)
    return {'task_id': task_id, 'state': _final(reply)}


def _held(call: Call, attempt: int | None) -> str:
    """The reported attempt as text, '' for an operator's override. Raises Invalid if an agent gives no attempt."""
    if attempt is None and call.by.agent_id:
        detail = 'attempt is missing: an agent must give the attempt it holds, which is in TINYTOWN_ATTEMPT'
        raise Invalid(detail, errors=[{'pointer': '/attempt', 'detail': detail}])
    return str(attempt or '')


def _final(reply: list[bytes]) -> Literal['completed', 'failed']:
    return 'completed' if reply[1] == b'completed' else 'failed'


def release(call: Call, *, task_id: TaskId, attempt: Attempt | None = None) -> Step[Released]:
    """Return a running task to the backlog. The attempt counts. An agent must give the number of its attempt."""
    yield call.store.release(task_id, _held(call, attempt), call.by.agent_id)
    return {'task_id': task_id, 'state': 'pending'}


def history(call: Call, *, task_id: TaskId) -> Step[History]:
    """Show the history of a task: each change, with its time, caller, attempt and reason.

    The answer also lists the attempts: how long each one took, and which part of its agent's log belongs to it.
    """
    joined, *logs = yield call.store.history(task_id)
    changes = with_durations(json.loads(b'[%b]' % joined))
    where = {attempt: text(log) for attempt, log in zip(logs[::2], logs[1::2], strict=True)}
    return {'task_id': task_id, 'history': changes, 'attempts': runs(changes, where)}


def cancel(call: Call, *, task_id: TaskId) -> Step[Cancelled]:
    """Cancel an unfinished task, wherever it is. If a worker is running it, the run stops within one heartbeat."""
    yield call.store.cancel(task_id)
    return {'task_id': task_id, 'state': 'cancelled'}


def retry(call: Call, *, task_id: TaskId) -> Step[Retried]:
    """Try a failed or cancelled task again: it returns to the backlog and gets max_attempts more attempts."""
    yield call.store.retry(task_id)
    return {'task_id': task_id, 'state': 'pending'}
