"""Events over HTTP beyond a page: server-sent events (the HTML standard, 9.2), and a page that waits for an event.

Both begin with a page through the door, where it is decided who may see what, and go on from there with the one feed of
the process. A client that takes slowly is given pages as it takes them, and the feed again once it has caught up: it is
never more than a page behind in our memory, and misses nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..auth.access import is_slow
from ..core.dispatch import encode_answer
from ..core.events import Filter, as_page, choose, type_of, whole
from ..core.operations import Op
from ..core.town import Town
from ..errors import Invalid, Unavailable
from ..http.http1 import Request, Response, problem
from ..http.replies import Answer, Later, Slow, Stream
from ..model import WaitSeconds
from ..schema import Parameter, signature, validate
from ..state import event_feed
from ..state.event_feed import PAGE, Event, EventFeed
from ..state.store import Step, Store

HEARTBEAT: Final = b': \n\n'
RETRY: Final = b'retry: 1000\n\n'  # ms until a client that lost its stream comes back
MOST_SECS: Final = 25  # that a page may wait
MOST_SHOWN: Final = 500  # events on a page
_MANY: Final = 100  # events that went by unwanted, after which a client is told how far it is


class Door(Protocol):
    """What a stream needs of the REST front end."""

    town: Town
    feed: EventFeed

    def read(self, request: Request, op: Op) -> Step[dict[str, Any]]:
        """The arguments of a request, once it is known who calls. Raises TownError."""
        ...

    def ask(self, request: Request, op: Op, arguments: dict[str, Any]) -> Step[Any]:
        """What an operation gives, through the door. Raises TownError."""
        ...


def wants_stream(request: Request) -> bool:
    """Whether the Accept field names text/event-stream."""
    for each in request.field(b'accept').lower().split(','):
        kind, *parameters = (part.strip(' \t') for part in each.split(';'))
        if kind == 'text/event-stream':
            return not any(part.rstrip('0.') == 'q=' for part in parameters)
    return False


def stream_response(start: Callable[[Stream], None]) -> Response:
    """A response of server-sent events. Who comes back after it ended resumes by the id of the last one."""
    headers = (('X-Accel-Buffering', 'no'), ('Vary', 'Accept'))
    return Response(200, b'', 'text/event-stream', headers, start, HEARTBEAT, RETRY)


def page_response(answer: Any) -> Response:
    """The same as a page of JSON."""
    return Response(200, encode_answer(answer), headers=(('Vary', 'Accept'),))


def last_event_id(request: Request, parameter: Parameter) -> Any:
    """The value of Last-Event-ID, None if it was not sent. Raises Invalid."""
    given = request.field(b'last-event-id')
    if not given:
        return None
    errors: list[dict[str, str]] = []
    value = parameter.check(parameter.read(given), '/Last-Event-ID', errors)
    if errors:
        raise Invalid(f'Last-Event-ID: {errors[0]["detail"]}', errors=errors)
    return value


def event_frame(event: Event) -> bytes:
    """An event on the wire. A gap has no id: who comes back without having caught up is to learn of it again."""
    if event.is_gap:
        return b'event: gap\ndata: {"type":"gap","after":"%b"}\n\n' % event.id.encode()
    return b'id: %b\nevent: %b\ndata: %b\n\n' % (event.id.encode(), type_of(event)[:-1], event.data)


# ---------------------------------------------------------------------------------------------------------- following


class EventFollower:
    """Gives the events after a position to `sink`, in order: pages until it has caught up, then the feed.

    `sink` is given what `page` in feed.py gives, and may be given nothing: then only the position has moved.
    """

    def __init__(
        self, stream: Stream, changes: EventFeed, store: Store, position: str, sink: Callable[[list[Event]], None]
    ) -> None:
        self._stream = stream
        self._feed = changes
        self._store = store
        self._sink = sink
        self._leave: event_feed.Unsubscribe | None = None
        self.position = position
        stream.on_close = self._pause

    def page(self) -> None:
        """Fetches the next page."""
        self._stream.run(event_feed.page(self._store, self.position), self._paged)

    def _paged(self, found: tuple[list[Event], str] | None, _error: Exception | None) -> None:
        if found is None:
            self._stream.finish()  # Redis is away; the client comes back, and resumes
        elif self._stream.is_open:
            events, self.position = found
            self._sink(events)
            self._stream.when_taken(self.page if len(events) >= PAGE else self.join)

    def join(self) -> None:
        """Goes on with the feed."""
        leave = self._feed.subscribe(self.position, self._arrived)
        if leave is None:
            self.page()
            return
        self._leave = leave
        if not self._stream.is_open or self._stream.is_behind:
            self._fall_back()

    def _arrived(self, events: list[Event]) -> None:
        if not events[-1].is_gap:
            self.position = events[-1].id
        self._sink(events)
        if self._leave and self._stream.is_behind:
            self._fall_back()

    def _fall_back(self) -> None:
        self._pause()
        self._stream.when_taken(self.page)

    def _pause(self) -> None:
        leave, self._leave = self._leave, None
        if leave:
            leave()


class _Frames:
    """Writes the wanted events on a stream. A gap at the very beginning is none to who has asked for no event."""

    def __init__(self, stream: Stream, wanted: Filter, has_asked: bool) -> None:
        self._stream = stream
        self._wanted = wanted
        self._tells_gap = has_asked
        self._passed = 0

    def take(self, events: list[Event]) -> None:
        told = [
            event_frame(event) for event in events if (self._tells_gap if event.is_gap else self._wanted.fits(event))
        ]
        self._tells_gap = True
        self._passed = 0 if told else self._passed + len(events)
        if self._passed >= _MANY:
            self._passed = 0
            told = [b'id: %b\n\n' % events[-1].id.encode()]  # so that who comes back need not begin further up
        self._stream.send(b''.join(told))


# --------------------------------------------------------------------------------------------------------- the route


def _wait_parameter(*, wait: WaitSeconds = 0) -> None:
    """How long to wait for an event where there is none."""


_WAITS: Final = re.compile(r'(?:^|&)wait=([0-9]{0,2}[1-9][0-9]?)(?:&|$)')
WAIT: Final = signature(_wait_parameter)[0]  # which this route takes beside the operation's own


class EventStreams:
    """GET /v1/events in its three forms."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def answer(self, request: Request, op: Op) -> Answer:
        """A page, a page that waits, or a stream."""
        if wants_stream(request):
            step = self._open(request, op)
        elif (waits := _WAITS.search(request.query)) and request.method != 'HEAD':
            return self._wait(request, op, int(waits[1]))
        else:
            step = self._page(request, op)
        return Slow(step) if is_slow(request) else step

    def _read(self, request: Request, op: Op) -> Step[dict[str, Any]]:
        """The arguments of the operation; `wait` is looked at, and left out."""
        arguments = yield from self._door.read(request, op)
        given = {name: WAIT[name].read(arguments.pop(name)) for name in WAIT if name in arguments}
        validate(WAIT, given)
        return arguments

    def _page(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._read(request, op)
        return page_response((yield from self._door.ask(request, op, arguments)))

    def _wanted(self, arguments: dict[str, Any]) -> Step[Filter]:
        """What is wanted, by arguments that were found good."""
        given = arguments.get('agent'), arguments.get('task'), arguments.get('type', ())
        return (yield from choose(self._door.town.store, *given))

    # --------------------------------------------------------------------------------------------------- streams

    def _open(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._read(request, op)
        resumed = last_event_id(request, op.parameters['after'])
        after = resumed or arguments.get('after', '')
        page = yield from self._door.ask(request, op, arguments | {'limit': 1} | ({'after': after} if after else {}))
        wanted = yield from self._wanted(arguments)
        position = json.loads(page)['next_after'] if after == '$' else whole(after)

        def start(stream: Stream) -> None:
            frames = _Frames(stream, wanted, bool(after))
            follower = EventFollower(stream, self._door.feed, self._door.town.store, position, frames.take)
            stream.send(b'%bid: %b\n\n' % (RETRY, position.encode()))
            stream.when_taken(follower.page)

        return stream_response(start)

    # ------------------------------------------------------------------------------------------------- long polls

    def _wait(self, request: Request, op: Op, seconds: int) -> Later:
        poll = _Poll(self._door, request.id)

        def start(stream: Stream) -> None:
            stream.run(
                self._first(request, op), lambda found, error: poll.begin(stream, found, error), is_slow(request)
            )

        return Later(start, lambda: poll.page([], False), min(seconds, MOST_SECS))

    def _first(self, request: Request, op: Op) -> Step[tuple[dict[str, Any], Filter, int]]:
        """A first page, what is wanted after it, and at most how much of that."""
        arguments = yield from self._read(request, op)
        page = yield from self._door.ask(request, op, arguments)
        wanted = yield from self._wanted(arguments)
        return json.loads(page), wanted, arguments.get('limit', MOST_SHOWN)


class _Poll:
    """A page that waits until there is something on it."""

    def __init__(self, door: Door, request_id: str) -> None:
        self._door = door
        self._request_id = request_id
        self._position = ''
        self._most = MOST_SHOWN

    def begin(self, stream: Stream, found: tuple[dict[str, Any], Filter, int] | None, error: Exception | None) -> None:
        """Takes the first page: the answer, if there is something on it."""
        if found is None:
            stream.fail(error or ValueError('no answer'))
            return
        page, wanted, self._most = found
        self._position = page['next_after']
        if page['events'] or 'more' in page or 'gap' in page:
            stream.answer(page_response(page))
        elif stream.is_open:
            self._follow(stream, wanted)

    def _follow(self, stream: Stream, wanted: Filter) -> None:
        def take(events: list[Event]) -> None:
            self._position = follower.position
            told = [event for event in events if not event.is_gap and wanted.fits(event)]
            gap = bool(events) and events[0].is_gap
            if told or gap:
                stream.answer(self.page(told, gap))

        follower = EventFollower(stream, self._door.feed, self._door.town.store, self._position, take)
        follower.join()

    def page(self, events: list[Event], gap: bool) -> Response:
        """What has come, and from where to go on."""
        if not self._position:
            return problem(Unavailable('Redis has not answered in time', code='timeout'), self._request_id)
        more = len(events) > self._most
        events = events[: self._most]
        return page_response(as_page(events, events[-1].id if more else self._position, more, gap))
