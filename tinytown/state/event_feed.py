"""The feed: one reader of the town's event stream a process, for all who want to be told what happens.

It starts with the first subscriber and ends with the last. To miss nothing, page first and then join where the pages
ended: `page(store, after)` until a page is not full, then `subscribe(position, deliver)`. Where events are gone
(the stream was trimmed, reset, or began anew) a page says so, and a subscriber is handed an event that is a gap.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..errors import TownError
from .store import Step, Store, text

MOST_KEPT: Final = 1000  # events that a subscriber may be behind when it joins
PAGE: Final = 500
_BLOCK_MS: Final = 1000  # also how long the reader may outlive its last subscriber
_PAUSE_SECS: Final = 0.5

Deliver = Callable[[list['Event']], None]
Unsubscribe = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Event:
    """One change of the town. `data` is its JSON object, as REST shows it; a gap has none: events are missing there."""

    id: str
    data: bytes = b''

    @property
    def is_gap(self) -> bool:
        return not self.data

    @property
    def fields(self) -> dict[str, Any]:
        """id, type, at, and what it concerns: agent_id, agent_name, task_id, …"""
        found: dict[str, Any] = json.loads(self.data) if self.data else {'id': self.id, 'type': 'gap'}
        return found


def order(id: str) -> tuple[int, int]:
    """A stream id as something that can be compared. Raises ValueError."""
    ms, _, seq = id.partition('-')
    return int(ms), int(seq or 0)


def page(store: Store, after: str, most: int = PAGE) -> Step[tuple[list[Event], str]]:
    """The events after an id ('$': none, from now on), and the id to go on after.

    A gap comes first where some are missing. The page is the last one if it holds fewer than `most` events.
    """
    gap, newest, _, *rows = yield store.events_after(after, most)
    found = events_of(rows)
    position = found[-1].id if found else text(newest)
    return ([Event(after)] if gap else []) + found, position


def events_of(rows: list[bytes]) -> list[Event]:
    """The events in a reply of Redis: id, fields, id, fields, …"""
    return [
        Event(text(each), b'{"id":"%b",%b}' % (each, data)) for each, data in zip(rows[::2], rows[1::2], strict=True)
    ]


@dataclass(eq=False, slots=True)
class _Subscriber:
    after: tuple[int, int]
    deliver: Deliver

    def offer(self, events: Iterable[Event]) -> None:
        new = [event for event in events if event.is_gap or order(event.id) > self.after]
        if new:
            self.deliver(new)


class EventFeed:
    """The reader and those who listen to it.

    `call_soon(f)` runs f where subscribers are to be told, on an event loop's thread, say; without it they are told
    on the reader's own.
    """

    def __init__(self, store: Store, call_soon: Callable[[Callable[[], None]], None] = lambda what: what()) -> None:
        self.call_soon = call_soon
        self._store = store
        self._lock = threading.RLock()
        self._subscribers: list[_Subscriber] = []
        self._kept: deque[Event] = deque()
        self._floor = (0, 0)  # the ring holds everything after this id
        self._current: object = None  # stands for the reader that is wanted

    def subscribe(self, position: str, deliver: Deliver) -> Unsubscribe | None:
        """Has events after a position, as `page` gave it, delivered in order, until the returned function is called.

        Those that have arrived already are delivered before this returns. None if that many events have come since
        that the position is not in reach any more: page on, and try again.
        """
        after = order(position)
        with self._lock:
            if self._current is None:
                self._start(position)
            elif after < self._floor:
                return None
            subscriber = _Subscriber(after, deliver)
            subscriber.offer(self._kept)
            self._subscribers.append(subscriber)
        return lambda: self._leave(subscriber)

    def join(self, deliver: Deliver) -> Unsubscribe:
        """As `subscribe`, from now on, whatever was missed: a gap comes first."""
        with self._lock:
            position = self._kept[-1].id if self._kept else '0-0'
            deliver([Event(position)])
            stop = self.subscribe(position, deliver)
        assert stop
        return stop

    def _leave(self, subscriber: _Subscriber) -> None:
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                if not self._subscribers:
                    self._current = None

    def _start(self, position: str) -> None:
        self._kept.clear()
        self._floor = order(position)
        self._current = reader = object()
        threading.Thread(target=self._read, args=(reader, position), name='feed', daemon=True).start()

    def _read(self, reader: object, position: str) -> None:
        """The reader's thread: whatever happens to Redis, it goes on from where it was."""
        pause = threading.Event()
        while reader is self._current:
            try:
                events, position = self._store.run(page(self._store, position))
                if events:
                    self.call_soon(lambda batch=events: self._arrive(reader, batch))  # type: ignore[misc]
                if len(events) < PAGE:
                    self._store.call(self._store.next_event(position, _BLOCK_MS))
            except TownError:
                pause.wait(_PAUSE_SECS)
        self._store.close()

    def _arrive(self, reader: object, events: list[Event]) -> None:
        with self._lock:
            if reader is not self._current:
                return
            if events[0].is_gap:
                self._kept.clear()
                self._floor = (0, 0)
            self._kept.extend(events)
            while len(self._kept) > MOST_KEPT:
                self._floor = order(self._kept.popleft().id)
            for subscriber in list(self._subscribers):
                if events[0].is_gap:
                    subscriber.after = (0, 0)  # the stream may have begun anew, with lower ids
                subscriber.offer(events)
