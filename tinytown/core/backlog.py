"""Operations on the backlog: the queue of tasks that are not yet assigned to an agent."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from ..model import AgentRef, Assigned, Cursor, Limit, Tags, TaskId, TaskText
from ..state.store import Page, Step, text
from .tasks import assigned, listing, record
from .town import Call

MAX_ASSIGNED = 200  # one script moves them, and it blocks Redis for 28 µs a task


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
    """List the tasks in the backlog, oldest first. They wait until an agent claims them."""
    reply = yield call.store.backlog(limit, cursor)
    return Page(listing('backlog', reply))


def add(call: Call, *, description: TaskText, tags: Tags = []) -> Step[Added]:  # noqa: B006 (never changed)
    """Add a task to the backlog, to be assigned to any agent later."""
    reply = yield call.store.backlog_add(record(call, description, tags))
    return {'task_id': text(reply[0]), 'description': description}


def claim(call: Call, *, task_id: TaskId, agent: AgentRef) -> Step[Assigned]:
    """Assign a task from the backlog to an agent. If several callers claim it, one gets it, the others get an error."""
    reply = yield call.store.claim(task_id, agent)
    return assigned(reply)


def assign_all(call: Call, *, agent: AgentRef) -> Step[AssignedAll]:
    """Assign the whole backlog to one agent: the oldest 200 tasks a call, so call again if there are more."""
    reply = yield call.store.assign_all(agent, MAX_ASSIGNED)
    return {'assigned': len(reply[0]), 'tasks': [text(task) for task in reply[0]]}


def remove(call: Call, *, task_id: TaskId) -> Step[Removed]:
    """Delete a task from the backlog for good. To keep a record of it, cancel it instead."""
    yield call.store.backlog_remove(task_id)
    return {'removed': True, 'task_id': task_id}
