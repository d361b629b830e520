"""Operations on dead letters: tasks and messages that used up their attempts (`agent.max_attempts`)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from ..model import UUID_PATTERN, Cursor, Field, Limit
from ..state.store import Page, Step, text
from .tasks import listing
from .town import Call

LetterId = Annotated[str, Field('Id of the task or message', UUID_PATTERN, 'a UUID in lower case')]


class DeadLetter(TypedDict):
    """A task or message that used up its attempts. `text` is the message, or the start of the task's description.

    `died_at` is RFC 3339.
    """

    id: str
    kind: Literal['task', 'message']
    agent_name: str | None
    text: str
    attempts: int
    why: str | None
    died_at: str


class DeadLetterPage(TypedDict):
    dead_letters: list[DeadLetter]
    count: int
    next_cursor: NotRequired[str]


class Settled(TypedDict):
    id: str
    kind: Literal['task', 'message']
    status: Literal['retried', 'dropped']


def list_dead(call: Call, *, limit: Limit = 500, cursor: Cursor = '') -> Step[Page[DeadLetterPage]]:
    """List the tasks and messages that failed after max_attempts attempts, oldest first."""
    reply = yield call.store.deadletter(limit, cursor)
    return Page(listing('dead_letters', reply))


def retry(call: Call, *, id: LetterId) -> Step[Settled]:
    """Give a dead letter max_attempts more attempts: a task returns to the backlog, a message to its inbox."""
    reply = yield call.store.deadletter_retry(id)
    return {'id': id, 'kind': _kind(reply), 'status': 'retried'}


def drop(call: Call, *, id: LetterId) -> Step[Settled]:
    """Remove a dead letter for good: its task stays failed, its message is deleted."""
    reply = yield call.store.deadletter_drop(id)
    return {'id': id, 'kind': _kind(reply), 'status': 'dropped'}


def _kind(reply: list[bytes]) -> Literal['task', 'message']:
    return 'task' if text(reply[0]) == 'task' else 'message'
