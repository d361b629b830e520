"""The event feed: one thread per process reads the town's event stream for all subscribers.

REST (`rest.sse_events`) and MCP (`mcp.catalog`) subscribe. The reader thread starts with the first subscriber and ends
after the last one.

To miss no event, call `page(store, after)` until a page is not full, and then `subscribe(position, deliver)` with the
position that the last page returned. If events are missing (the stream was trimmed, reset, or began anew), the page
or the subscriber gets a gap: an `Event` without data.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ..errors import TownError
from .store import Step, Store, text

logger = logging.getLogger('tinytown.state')

MAX_KEPT: Final = 1000  # events that a new subscriber may be behind
PAGE: Final = 500  # events
_BLOCK_MS: Final = 1000  # also how long the reader may outlive its last subscriber
_PAUSE_SECS: Final = 0.5  # after an error

Deliver = Callable[[list['Event']], None]
Unsubscribe = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the town. `data` is its JSON object, as REST shows it. A gap has none: events are missing here."""

    id: str
    data: bytes = b''

    @property
    def is_gap(self) -> bool:
        return not self.data

    @property
    def fields(self) -> dict[str, Any]:
        """The parsed JSON object: id, type, at, and the subject: agent_id, agent_name, task_id, …"""
        fields: dict[str, Any] = json.loads(self.data) if self.data else {'id': self.id, 'type': 'gap'}
        return fields


def order(id: str) -> tuple[int, int]:
    """A key that sorts stream ids. Raises ValueError if `id` is not one."""
    ms, _, seq = id.partition('-')
    return int(ms), int(seq or 0)


def page(store: Store, after: str, limit: int = PAGE) -> Step[tuple[list[Event], str]]:
    """Up to `limit` events after an id, and the position to continue from. After '$' there are none: it means now.

    If events are missing after that id, the first event is a gap. A page of fewer than `limit` events is the last one.
    """
    gap, newest, _, *rows = yield store.events_after(after, limit)
    events = events_of(rows)
    position = events[-1].id if events else text(newest)
    return ([Event(after)] if gap else []) + events, position


def events_of(rows: list[bytes]) -> list[Event]:
    """The events in a script's reply: id, fields, id, fields, …"""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [Event(text(id_), b'{"id":"%b",%b}' % (id_, data)) for id_, data in pairs]


@dataclass(eq=False, slots=True)
class _Subscriber:
    after: tuple[int, int]
    deliver: Deliver

    def offer(self, events: Iterable[Event]) -> None:
        new = [event for event in events if event.is_gap or order(event.id) > self.after]
        if new:
            self.deliver(new)


class EventFeed:
    """The reader thread and its subscribers.

    `call_soon(f)` runs f on the thread that delivers events, such as the one of an event loop. Without it, the reader
    thread delivers them.
    """

    def __init__(self, store: Store, call_soon: Callable[[Callable[[], None]], None] = lambda f: f()) -> None:
        self.call_soon = call_soon
        self._store = store
        self._lock = threading.RLock()
        self._subscribers: list[_Subscriber] = []
        self._kept: deque[Event] = deque()
        self._floor = (0, 0)  # `_kept` holds every event after this id
        self._position = '0-0'  # every event up to this one has arrived
        self._current: object = None  # identifies the reader that should run; any other one ends

    def subscribe(self, position: str, deliver: Deliver) -> Unsubscribe | None:
        """Delivers the events after `position`, in order, until the returned function is called.

        Use the position that `page` returned. Events that have already arrived are delivered before this returns.
        Returns None if the position is too old for the events kept here: read more pages, and try again.
        """
        with self._lock:
            if self._current is None:
                self._start(position)
            elif order(position) < self._floor:
                return None
            return self._add(position, deliver)

    def join(self, deliver: Deliver) -> Unsubscribe:
        """As `subscribe`, but from now on, and never None. A gap comes first, for the events that were missed."""
        with self._lock:
            if self._current is None:
                self._start(self._position)
            deliver([Event(self._position)])
            return self._add(self._position, deliver)

    def _add(self, position: str, deliver: Deliver) -> Unsubscribe:
        subscriber = _Subscriber(order(position), deliver)
        subscriber.offer(self._kept)
        self._subscribers.append(subscriber)
        return lambda: self._leave(subscriber)

    def _leave(self, subscriber: _Subscriber) -> None:
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                if not self._subscribers:
                    self._current = None

    def _start(self, position: str) -> None:
        self._kept.clear()
        self._floor, self._position = order(position), position
        self._current = reader = object()
        threading.Thread(target=self._read, args=(reader, position), name='feed', daemon=True).start()

    def _read(self, reader: object, position: str) -> None:
        """The reader thread. After an error it continues from its last position. It logs a bug of ours once."""
        pause, last_bug = threading.Event(), ''
        while reader is self._current:
            try:
                events, next_position = self._store.run(page(self._store, position))
                if events:
                    self.call_soon(partial(self._arrive, reader, events, next_position))
                position = next_position
                if len(events) < PAGE:
                    self._store.call(self._store.next_event(position, _BLOCK_MS))
            except Exception as e:  # whatever went wrong, the thread must keep reading
                if not isinstance(e, TownError) and repr(e) != last_bug:
                    last_bug = repr(e)
                    logger.error(f'internal error: {last_bug}', exc_info=e)
                pause.wait(_PAUSE_SECS)
        self._store.close()

    def _arrive(self, reader: object, events: list[Event], position: str) -> None:
        with self._lock:
            if reader is not self._current:
                return
            self._position = position
            if events[0].is_gap:
                self._kept.clear()
                self._floor = (0, 0)
            self._kept.extend(events)
            while len(self._kept) > MAX_KEPT:
                self._floor = order(self._kept.popleft().id)
            for subscriber in list(self._subscribers):
                if events[0].is_gap:
                    subscriber.after = (0, 0)  # a stream that began anew may have lower ids
                try:
                    subscriber.offer(events)
                except Exception as e:  # a bug in one subscriber must not cost the others their events
                    logger.error(f'internal error: {e!r}', exc_info=e)
