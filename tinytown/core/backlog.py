"""The backlog: tasks that no agent has yet."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from ..model import AgentRef, Assigned, Cursor, Limit, Tags, TaskId, TaskText
from ..state.store import Page, Step, text
from .tasks import assigned, listing, record
from .town import Call

MAX_ASSIGNED = 200  # 28 µs a task blocks the server


class BacklogTask(TypedDict):
    task_id: str
    description: str
    tags: list[str]


class BacklogPage(TypedDict):
    backlog: list[BacklogTask]
    count: int
    next_cursor: NotRequired[str]


class Added(TypedDict):
    task_id: str
    description: str


class AssignedAll(TypedDict):
    assigned: int
    tasks: list[str]


class Removed(TypedDict):
    removed: bool
    task_id: str


def list_backlog(call: Call, *, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[BacklogPage]]:
    """List the tasks that wait for someone to claim them, oldest first."""
    reply = yield call.store.backlog(limit, cursor)
    return Page(listing('backlog', reply))


def add(call: Call, *, description: TaskText, tags: Tags = []) -> Step[Added]:  # noqa: B006 (never changed)
    """Add a task to the backlog, for whichever agent it is given to later."""
    reply = yield call.store.backlog_add(record(call, description, tags))
    return {'task_id': text(reply[0]), 'description': description}


def claim(call: Call, *, task_id: TaskId, agent: AgentRef) -> Step[Assigned]:
    """Give a task of the backlog to an agent. Of many who claim one task exactly one gets it; the others are told."""
    reply = yield call.store.claim(task_id, agent)
    return assigned(reply)


def assign_all(call: Call, *, agent: AgentRef) -> Step[AssignedAll]:
    """Give the whole backlog to one agent: its oldest 200 tasks (call again for more)."""
    reply = yield call.store.assign_all(agent, MAX_ASSIGNED)
    return {'assigned': len(reply[0]), 'tasks': [text(task) for task in reply[0]]}


def remove(call: Call, *, task_id: TaskId) -> Step[Removed]:
    """Delete a task from the backlog for good. To keep a record of it, cancel it instead."""
    yield call.store.backlog_remove(task_id)
    return {'removed': True, 'task_id': task_id}
