"""Events of the town over HTTP: as a page, as server-sent events (HTML standard, section 9.2), as a long poll.

Start with `EventStreams`, which `app` calls for GET /v1/events. A stream and a long poll begin with a page that is
dispatched like any operation, so scopes and arguments are checked there. Then they continue with the event feed of the
process (`state.event_feed`). A client that reads slowly gets pages instead, each when it has read the one before, and
returns to the feed when it has caught up. So it misses nothing, and at most one page is buffered for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..auth.access import is_slow
from ..core.dispatch import encode_answer
from ..core.events import Filter, as_page, find_filter, full_id, type_of
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
RETRY: Final = b'retry: 1000\n\n'  # a client reconnects after so many ms
MAX_WAIT_SECS: Final = 25  # limit for a long poll
MAX_EVENTS: Final = 500  # default limit for the events on a page
_ID_EVERY: Final = 100  # after so many unwanted events in a row, the client is sent the id of the last


class Dispatch(Protocol):
    """The part of `RestApp` that streams use."""

    town: Town
    feed: EventFeed

    def read(self, request: Request, op: Op) -> Step[dict[str, Any]]:
        """Authenticates the caller, and reads the arguments. Raises TownError."""
        ...

    def dispatch(self, request: Request, op: Op, arguments: dict[str, Any]) -> Step[Any]:
        """Authenticates the caller, and calls an operation. Raises TownError."""
        ...


def wants_stream(request: Request) -> bool:
    """Whether the Accept field names text/event-stream."""
    for entry in request.field(b'accept').lower().split(','):
        kind, *parameters = (part.strip(' \t') for part in entry.split(';'))
        if kind == 'text/event-stream':
            return not any(part.rstrip('0.') == 'q=' for part in parameters)
    return False


def stream_response(start: Callable[[Stream], None]) -> Response:
    """A response of server-sent events. After it ends, a client resumes with the id of the last event it received."""
    headers = (('X-Accel-Buffering', 'no'), ('Vary', 'Accept'))
    return Response(200, b'', 'text/event-stream', headers, start, HEARTBEAT, RETRY)


def page_response(answer: Any) -> Response:
    """A response with one page, as JSON."""
    return Response(200, encode_answer(answer), headers=(('Vary', 'Accept'),))


def last_event_id(request: Request, parameter: Parameter) -> Any:
    """The value of Last-Event-ID, None if it was not sent. Raises Invalid."""
    sent = request.field(b'last-event-id')
    if not sent:
        return None
    errors: list[dict[str, str]] = []
    value = parameter.check(parameter.read(sent), '/Last-Event-ID', errors)
    if errors:
        raise Invalid(f'Last-Event-ID: {errors[0]["detail"]}', errors=errors)
    return value


def event_frame(event: Event) -> bytes:
    """An event as a server-sent event.

    A gap has no id, so that a client that reconnects before it has caught up is told of the gap again.
    """
    if event.is_gap:
        return b'event: gap\ndata: {"type":"gap","after":"%b"}\n\n' % event.id.encode()
    return b'id: %b\nevent: %b\ndata: %b\n\n' % (event.id.encode(), type_of(event)[:-1], event.data)


# ---------------------------------------------------------------------------------------------------------- following


class EventFollower:
    """Passes the events after a position to `sink`, in order: pages until it has caught up, then the feed.

    `sink` gets the events of `event_feed.page`. The list may be empty; then only `position` has changed.
    """

    def __init__(
        self, stream: Stream, feed: EventFeed, store: Store, position: str, sink: Callable[[list[Event]], None]
    ) -> None:
        self._stream = stream
        self._feed = feed
        self._store = store
        self._sink = sink
        self._unsubscribe: event_feed.Unsubscribe | None = None
        self.position = position
        stream.on_close = self._pause

    def page(self) -> None:
        """Fetches the next page."""
        self._stream.run(event_feed.page(self._store, self.position), self._page_fetched)

    def _page_fetched(self, page: tuple[list[Event], str] | None, _error: Exception | None) -> None:
        if page is None:
            self._stream.finish()  # Redis is unavailable; the client reconnects and resumes
        elif self._stream.is_open:
            events, self.position = page
            self._sink(events)
            self._stream.when_taken(self.page if len(events) >= PAGE else self.join)

    def join(self) -> None:
        """Continues with the feed, or with a page if the feed no longer reaches back to the position."""
        unsubscribe = self._feed.subscribe(self.position, self._arrived)
        if unsubscribe is None:
            self.page()
            return
        self._unsubscribe = unsubscribe
        if not self._stream.is_open or self._stream.is_behind:
            self._fall_back()

    def _arrived(self, events: list[Event]) -> None:
        if not events[-1].is_gap:
            self.position = events[-1].id
        self._sink(events)
        if self._unsubscribe and self._stream.is_behind:
            self._fall_back()

    def _fall_back(self) -> None:
        """Leaves the feed for pages, because the client has not read all that was sent."""
        self._pause()
        self._stream.when_taken(self.page)

    def _pause(self) -> None:
        unsubscribe, self._unsubscribe = self._unsubscribe, None
        if unsubscribe:
            unsubscribe()


class _Frames:
    """Writes the wanted events to a stream.

    A gap at the start is only reported if the client `has_position`, an event to continue after: without one it has
    missed nothing.
    """

    def __init__(self, stream: Stream, wanted: Filter, has_position: bool) -> None:
        self._stream = stream
        self._wanted = wanted
        self._reports_gap = has_position
        self._skipped = 0

    def take(self, events: list[Event]) -> None:
        frames = [
            event_frame(event) for event in events if (self._reports_gap if event.is_gap else self._wanted.fits(event))
        ]
        self._reports_gap = True
        self._skipped = 0 if frames else self._skipped + len(events)
        if self._skipped >= _ID_EVERY:
            self._skipped = 0
            frames = [b'id: %b\n\n' % events[-1].id.encode()]  # so that a client that reconnects need not reread them
        self._stream.send(b''.join(frames))


# --------------------------------------------------------------------------------------------------------- the route


def _wait_parameter(*, wait: WaitSeconds = 0) -> None:
    """Declares the parameter that this route takes in addition to those of its operation."""


_WAITS: Final = re.compile(r'(?:^|&)wait=([0-9]{0,2}[1-9][0-9]?)(?:&|$)')
WAIT: Final = signature(_wait_parameter)[0]


class EventStreams:
    """GET /v1/events in its three forms: page, stream, long poll."""

    def __init__(self, app: Dispatch) -> None:
        self._app = app

    def answer(self, request: Request, op: Op) -> Answer:
        """A stream if Accept asks for one, a long poll if the query has `wait`, otherwise a page."""
        if wants_stream(request):
            step = self._open(request, op)
        elif (waits := _WAITS.search(request.query)) and request.method != 'HEAD':
            return self._wait(request, op, int(waits[1]))
        else:
            step = self._page(request, op)
        return Slow(step) if is_slow(request) else step

    def _read(self, request: Request, op: Op) -> Step[dict[str, Any]]:
        """The arguments of the operation. Validates `wait`, and leaves it out."""
        arguments = yield from self._app.read(request, op)
        wait = {name: WAIT[name].read(arguments.pop(name)) for name in WAIT if name in arguments}
        validate(WAIT, wait)
        return arguments

    def _page(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._read(request, op)
        return page_response((yield from self._app.dispatch(request, op, arguments)))

    def _wanted(self, arguments: dict[str, Any]) -> Step[Filter]:
        """The filter that valid arguments ask for."""
        criteria = arguments.get('agent'), arguments.get('task'), arguments.get('type', ())
        return (yield from find_filter(self._app.town.store, *criteria))

    # --------------------------------------------------------------------------------------------------- streams

    def _open(self, request: Request, op: Op) -> Step[Response]:
        arguments = yield from self._read(request, op)
        resumed = last_event_id(request, op.parameters['after'])
        after = resumed or arguments.get('after', '')
        first = arguments | {'limit': 1} | ({'after': after} if after else {})
        page = yield from self._app.dispatch(request, op, first)
        wanted = yield from self._wanted(arguments)
        position = json.loads(page)['next_after'] if after == '$' else full_id(after)

        def start(stream: Stream) -> None:
            frames = _Frames(stream, wanted, bool(after))
            follower = EventFollower(stream, self._app.feed, self._app.town.store, position, frames.take)
            stream.send(b'%bid: %b\n\n' % (RETRY, position.encode()))
            stream.when_taken(follower.page)

        return stream_response(start)

    # ------------------------------------------------------------------------------------------------- long polls

    def _wait(self, request: Request, op: Op, seconds: int) -> Later:
        poll = _LongPoll(self._app, request.id)

        def start(stream: Stream) -> None:
            stream.run(
                self._first(request, op), lambda first, error: poll.begin(stream, first, error), is_slow(request)
            )

        return Later(start, lambda: poll.page([], False), min(seconds, MAX_WAIT_SECS))

    def _first(self, request: Request, op: Op) -> Step[tuple[dict[str, Any], Filter, int]]:
        """Returns (the first page, the filter for later events, the limit for a page)."""
        arguments = yield from self._read(request, op)
        page = yield from self._app.dispatch(request, op, arguments)
        wanted = yield from self._wanted(arguments)
        return json.loads(page), wanted, arguments.get('limit', MAX_EVENTS)


class _LongPoll:
    """A request that is answered with a page as soon as there is an event on it."""

    def __init__(self, app: Dispatch, request_id: str) -> None:
        self._app = app
        self._request_id = request_id
        self._position = ''
        self._limit = MAX_EVENTS

    def begin(self, stream: Stream, first: tuple[dict[str, Any], Filter, int] | None, error: Exception | None) -> None:
        """Answers with the first page if there is something on it, otherwise waits for events."""
        if first is None:
            stream.fail(error or ValueError('no answer'))
            return
        page, wanted, self._limit = first
        self._position = page['next_after']
        if page['events'] or 'more' in page or 'gap' in page:
            stream.answer(page_response(page))
        elif stream.is_open:
            self._follow(stream, wanted)

    def _follow(self, stream: Stream, wanted: Filter) -> None:
        def take(events: list[Event]) -> None:
            self._position = follower.position
            matching = [event for event in events if not event.is_gap and wanted.fits(event)]
            gap = bool(events) and events[0].is_gap
            if matching or gap:
                stream.answer(self.page(matching, gap))

        follower = EventFollower(stream, self._app.feed, self._app.town.store, self._position, take)
        follower.join()

    def page(self, events: list[Event], gap: bool) -> Response:
        """The response with these events, and the position to continue from."""
        if not self._position:
            return problem(Unavailable('Redis did not answer in time', code='timeout'), self._request_id)
        more = len(events) > self._limit
        events = events[: self._limit]
        return page_response(as_page(events, events[-1].id if more else self._position, more, gap))
