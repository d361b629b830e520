"""Events: what has happened in the town, in order, and from where to go on.

A page is cut from the stream, and what is not wanted is left out of it: so `next_after` is the last event that was
looked at, not the last that is shown, and a page may be short, even empty, while there is more.
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

MOST_EXAMINED: Final = 1000  # events that one page looks at, however few of them are wanted

After = Annotated[
    str,
    Field(
        'The id of an event: only what came after it; $: nothing yet, to go on from now; absent: all that is kept',
        r'\$|[0-9]{1,15}(?:-[0-9]{1,15})?',
        'the id of an event, as 1764000000000-0, or $',
    ),
]
# What scripts.lua writes, and the first part for all of them.
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
    Field('Only events of these types, as task.completed, or its first part for all of them, as task', max_items=32),
]


class EventPage(TypedDict):
    """A page of events, oldest first. Go on with after=next_after.

    `more`: there are later ones already. `gap`: some that came after the given one are not kept any more.
    """

    events: list[TownEvent]
    next_after: str
    more: NotRequired[bool]
    gap: NotRequired[bool]


class LatestEvents(TypedDict):
    events: list[TownEvent]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are wanted: those that hold all of `parts` (as they stand in the event), and are of one of `types`.

    `name` is that of an agent which has no record any more, in lower case.
    """

    parts: tuple[bytes, ...] = ()
    types: tuple[bytes, ...] = ()
    name: bytes = b''

    def fits(self, event: Event) -> bool:
        """Whether an event is wanted. A quote within a value is escaped, so that a part can't be found in a value."""
        data = event.data
        return (
            all(part in data for part in self.parts)
            and (not self.types or type_of(event).startswith(self.types))
            and (not self.name or self.name in data.lower())
        )


def type_of(event: Event) -> bytes:
    """The type of an event, with a dot at its end; b'gap.' for a gap."""
    if event.is_gap:
        return b'gap.'
    begin = event.data.index(b'"type":"') + 8
    return event.data[begin : event.data.index(b'"', begin)] + b'.'


def wanted(found: str, agent: str | None, task: str | None, types: Iterable[str]) -> Filter:
    """The filter for an agent, a task and types. `found` is the id of that agent, '' if it is gone.

    One that is gone is known by its name, and by its whole id.
    """
    parts, name = [], b''
    if agent and (found or is_uuid(agent)):
        parts.append(b'"agent_id":"%b"' % (found or agent.lower()).encode())
    elif agent:
        name = b'"agent_name":"%b"' % agent.lower().encode()
    if task:
        parts.append(b'"task_id":"%b"' % task.encode())
    return Filter(tuple(parts), tuple(f'{each}.'.encode() for each in types), name)


def choose(store: Store, agent: str | None, task: str | None, types: Iterable[str]) -> Step[Filter]:
    """As `wanted`, with a look for the agent. Raises Conflict for the start of more than one id."""
    reply = yield store.events_after('$', 1, agent or '')
    return wanted(text(reply[2]), agent, task, types)


def list_events(
    call: Call,
    *,
    after: After = '',
    limit: Limit = 500,
    agent: AgentRef | None = None,
    task: TaskId | None = None,
    type: EventTypes = [],  # noqa: B006 (never changed)
) -> Step[Page[EventPage]]:
    """Tell what has happened in the town after an event, oldest first.

    Remember next_after, and give it as after the next time: no event is told twice, and none is missed.
    """
    is_all = not (agent or task or type)
    most = limit + 1 if is_all else MOST_EXAMINED
    gap, newest, found, *rows = yield call.store.events_after(whole(after), most, agent or '')
    examined = event_feed.events_of(rows)
    fits = wanted(text(found), agent, task, type).fits
    events = [event for event in examined if fits(event)]
    more, position = len(examined) >= most, examined[-1].id if examined else text(newest)
    if len(events) > limit:
        events, more = events[:limit], True
        position = events[-1].id
    return as_page(events, position, more, bool(gap and after))


def whole(after: str) -> str:
    """An id with both its parts."""
    return after if '-' in after or after == '$' else f'{after or 0}-0'


def as_page(events: list[Event], position: str, more: bool, gap: bool) -> Page[EventPage]:
    """A page as JSON."""
    told = b','.join(event.data for event in events)
    said = (b',"more":true' if more else b'') + (b',"gap":true' if gap else b'')
    return Page(b'{"events":[%b],"next_after":"%b"%b}' % (told, position.encode(), said))


def latest(call: Call, *, agent: AgentRef | None = None, limit: Limit = 50) -> Step[Page[LatestEvents]]:
    """Tell what has happened last in the town, or to one agent, oldest first. It looks at the last 1,000 events."""
    found, *rows = yield call.store.latest_events(MOST_EXAMINED if agent else limit, agent or '')
    fits = wanted(text(found), agent, None, ()).fits
    events = [event.data for event in event_feed.events_of(rows) if fits(event)][:limit]
    return Page(b'{"events":[%b]}' % b','.join(reversed(events)))
