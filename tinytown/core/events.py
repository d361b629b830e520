"""Events: the changes of the town, in order. A page says where the next one begins.

A page examines a bounded part of the event stream and leaves out the events that its filter refuses. So `next_after` is
the last event that was examined, not the last one shown; and a page may be short, even empty, while there are more.
`rest.sse_events` serves the same events as server-sent events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NotRequired, TypedDict

from ..model import AgentRef, Field, Limit, TaskId, is_uuid
from ..state import event_feed
from ..state.event_feed import Event
from ..state.store import Page, Step, Store, text
from .town import Call, TownEvent

MAX_EXAMINED: Final = 1000  # events that a filtered page examines, even if few of them fit

After = Annotated[
    str,
    Field(
        'Only events after the one with this id; $: only events from now on; absent: all events that are kept',
        r'\$|[0-9]{1,15}(?:-[0-9]{1,15})?',
        'the id of an event, such as 1764000000000-0, or $',
    ),
]
# The types that scripts.lua writes. The first part alone, such as `task`, stands for all types that begin with it.
EventType = Literal[
    'agent', 'agent.draining', 'agent.error', 'agent.idle', 'agent.paused', 'agent.registered', 'agent.removed',
    'agent.restarting', 'agent.started', 'agent.stopped', 'agent.working',
    'backlog', 'backlog.removed',
    'message', 'message.dead_lettered', 'message.dropped', 'message.retried', 'message.sent',
    'task', 'task.assigned', 'task.cancelled', 'task.completed', 'task.created', 'task.dead_lettered',
    'task.deleted', 'task.dropped', 'task.failed', 'task.requeued', 'task.retried', 'task.started',
    'town', 'town.reset',
]  # fmt: skip
EventTypes = Annotated[
    list[EventType],
    Field('Only events of these types, such as task.completed; task means all that begin with task', max_items=32),
]


class EventPage(TypedDict):
    """A page of events, oldest first. Get the next page with after=next_after.

    `more` means that later events exist already. `gap` means that some of the events after the given one are no
    longer kept.
    """

    events: list[TownEvent]
    next_after: str
    more: NotRequired[bool]
    gap: NotRequired[bool]


class LatestEvents(TypedDict):
    events: list[TownEvent]


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects the events that contain all of `parts` and have one of `types` (any type if empty).

    `parts` are pieces of the event's JSON. `types` end with a dot. `name` is such a piece too, in lower case, for the
    name of an agent that was removed.
    """

    parts: tuple[bytes, ...] = ()
    types: tuple[bytes, ...] = ()
    name: bytes = b''

    def fits(self, event: Event) -> bool:
        """Whether the filter selects an event. Values can't imitate `parts`, because quotes in values are escaped."""
        data = event.data
        return (
            all(part in data for part in self.parts)
            and (not self.types or type_of(event).startswith(self.types))
            and (not self.name or self.name in data.lower())
        )


def type_of(event: Event) -> bytes:
    """The type of an event with a dot appended; b'gap.' for a gap."""
    if event.is_gap:
        return b'gap.'
    begin = event.data.index(b'"type":"') + 8
    return event.data[begin : event.data.index(b'"', begin)] + b'.'


def make_filter(agent_id: str, agent: str | None, task: str | None, types: Iterable[str]) -> Filter:
    """The filter for an agent, a task and types. `agent_id` is the id of `agent`, or '' if the agent was removed.

    A removed agent can be given by its name or its full id.
    """
    parts, name = [], b''
    if agent and (agent_id or is_uuid(agent)):
        parts.append(b'"agent_id":"%b"' % (agent_id or agent.lower()).encode())
    elif agent:
        name = b'"agent_name":"%b"' % agent.lower().encode()
    if task:
        parts.append(b'"task_id":"%b"' % task.encode())
    return Filter(tuple(parts), tuple(f'{kind}.'.encode() for kind in types), name)


def find_filter(store: Store, agent: str | None, task: str | None, types: Iterable[str]) -> Step[Filter]:
    """`make_filter`, with the agent's id looked up. Raises Conflict if `agent` is the start of several ids."""
    reply = yield store.events_after('$', 1, agent or '')
    return make_filter(text(reply[2]), agent, task, types)


def list_events(
    call: Call,
    *,
    after: After = '',
    limit: Limit = 500,
    agent: AgentRef | None = None,
    task: TaskId | None = None,
    type: EventTypes = [],  # noqa: B006 (never changed)
) -> Step[Page[EventPage]]:
    """List the events of the town after a given event, oldest first.

    Give next_after as after in the next call: then no event comes twice, and none is missed.
    """
    is_all = not (agent or task or type)
    max_examined = limit + 1 if is_all else MAX_EXAMINED
    gap, newest, agent_id, *rows = yield call.store.events_after(full_id(after), max_examined, agent or '')
    examined = event_feed.events_of(rows)
    fits = make_filter(text(agent_id), agent, task, type).fits
    events = [event for event in examined if fits(event)]
    more, position = len(examined) >= max_examined, examined[-1].id if examined else text(newest)
    if len(events) > limit:
        events, more = events[:limit], True
        position = events[-1].id
    return as_page(events, position, more, bool(gap and after))


def full_id(after: str) -> str:
    """An event id with both its parts: `5` is `5-0`, and '' is `0-0`, the position before all events."""
    return after if '-' in after or after == '$' else f'{after or 0}-0'


def as_page(events: list[Event], position: str, more: bool, gap: bool) -> Page[EventPage]:
    """An EventPage as JSON. `position` is its next_after."""
    data = b','.join(event.data for event in events)
    flags = (b',"more":true' if more else b'') + (b',"gap":true' if gap else b'')
    return Page(b'{"events":[%b],"next_after":"%b"%b}' % (data, position.encode(), flags))


def latest(call: Call, *, agent: AgentRef | None = None, limit: Limit = 50) -> Step[Page[LatestEvents]]:
    """List the latest events of the town, oldest first; with agent, those of one agent among the last 1,000."""
    agent_id, *rows = yield call.store.latest_events(MAX_EXAMINED if agent else limit, agent or '')
    fits = make_filter(text(agent_id), agent, None, ()).fits
    events = [event.data for event in event_feed.events_of(rows) if fits(event)][:limit]
    return Page(b'{"events":[%b]}' % b','.join(reversed(events)))
