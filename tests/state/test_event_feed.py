"""The event feed: each subscriber gets every event once and in order, and a gap for missing ones."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from queue import Queue

import pytest

from tinytown.state import event_feed
from tinytown.state.event_feed import Event, EventFeed
from tinytown.state.store import Command

from ..support import PATIENCE, Place, redis_pid, start_redis
from ..worker.test_worker import await_exit


class Listener:
    """A subscriber that keeps its events in a queue. Without a position it joins the feed."""

    def __init__(self, feed: EventFeed, position: str = '') -> None:
        self.heard: Queue[Event] = Queue()
        stop = feed.subscribe(position, self.deliver) if position else feed.join(self.deliver)
        assert stop
        self.stop = stop

    def deliver(self, events: list[Event]) -> None:
        for event in events:
            self.heard.put(event)

    def next(self) -> Event:
        return self.heard.get(timeout=PATIENCE)

    def types(self, count: int) -> list[str]:
        return [self.next().fields['type'] for _ in range(count)]


@pytest.fixture
def source(ground: Place) -> Iterator[EventFeed]:
    feed = EventFeed(ground.store)
    yield feed
    for subscriber in list(feed._subscribers):
        feed._leave(subscriber)


def here(place: Place) -> str:
    """The current position in the event stream."""
    return place.store.run(event_feed.page(place.store, '$'))[1]


def add(place: Place, *names: str) -> list[str]:
    return [place.do('backlog.add', description=name)['task_id'] for name in names]


def test_a_page_has_the_events_after_a_position_and_the_position_to_continue_from(ground: Place) -> None:
    start = here(ground)
    tasks = add(ground, 'a', 'b', 'c')
    events, position = ground.store.run(event_feed.page(ground.store, start, 2))
    assert [event.fields['task_id'] for event in events] == tasks[:2]
    assert position == events[-1].id
    events, position = ground.store.run(event_feed.page(ground.store, position, 2))
    assert [event.fields['task_id'] for event in events] == tasks[2:]
    assert ground.store.run(event_feed.page(ground.store, position, 2)) == ([], position)
    assert events[0].fields['id'] == events[0].id


@pytest.mark.parametrize('after', ['0-0', '1-1'])
def test_a_page_from_before_the_first_event_has_all_events(ground: Place, after: str) -> None:
    tasks = add(ground, 'a', 'b')
    events, _ = ground.store.run(event_feed.page(ground.store, after))
    assert [event.fields['task_id'] for event in events] == tasks


def test_a_page_begins_with_a_gap_if_events_were_trimmed_or_deleted(ground: Place) -> None:
    add(ground, 'a')
    old = here(ground)
    add(ground, 'b', 'c')
    key = ground.store.prefix + b'events'
    ground.store.call(Command(None, ('XTRIM', key, 'MAXLEN', 1)))
    events, _ = ground.store.run(event_feed.page(ground.store, old))
    assert [event.is_gap for event in events] == [True, False]
    ground.store.call(Command(None, ('XTRIM', key, 'MAXLEN', 0)))
    [gap], position = ground.store.run(event_feed.page(ground.store, old))
    assert gap.is_gap
    assert ground.store.run(event_feed.page(ground.store, position)) == ([], position)
    ground.store.call(Command(None, ('DEL', key)))
    [gap], position = ground.store.run(event_feed.page(ground.store, old))
    assert (gap.is_gap, position) == (True, '0-0')
    assert ground.store.run(event_feed.page(ground.store, '$')) == ([], '0-0')


def test_a_page_begins_with_a_gap_if_the_stream_began_anew_with_lower_ids(ground: Place) -> None:
    [task] = add(ground, 'a')
    later = f'{int(time.time() * 1000) + 100_000}-0'
    events, position = ground.store.run(event_feed.page(ground.store, later))
    assert [event.is_gap for event in events] == [True, False]
    assert events[1].fields['task_id'] == task
    assert position == here(ground)


def test_each_subscriber_gets_all_events_after_its_position_once_and_in_order(ground: Place, source: EventFeed) -> None:
    first = Listener(source, here(ground))
    a = add(ground, *'abc')
    assert [first.next().fields['task_id'] for _ in a] == a
    middle = here(ground)
    b = add(ground, *'defg')
    second = Listener(source, middle)
    assert [second.next().fields['task_id'] for _ in b] == b
    assert [first.next().fields['task_id'] for _ in b] == b
    assert first.heard.empty()


def test_a_position_older_than_the_kept_events_is_refused_and_joining_begins_with_a_gap(
    ground: Place, source: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, 'MAX_KEPT', 3)
    start = here(ground)
    first = Listener(source, start)
    add(ground, *'abcdef')
    first.types(6)
    assert source.subscribe(start, first.deliver) is None
    late: Queue[Event] = Queue()
    stop = source.join(lambda events: late.put(events[0]))
    assert late.get(timeout=PATIENCE).is_gap
    add(ground, 'g')
    assert late.get(timeout=PATIENCE).fields['type'] == 'task.created'
    stop()


def test_joining_a_feed_that_has_no_event_yet_begins_with_a_gap(ground: Place, source: EventFeed) -> None:
    add(ground, 'a')
    first, late = Listener(source, here(ground)), Listener(source)
    assert late.next().is_gap
    [task] = add(ground, 'b')
    assert [listener.next().fields['task_id'] for listener in (first, late)] == [task, task]


def test_a_subscriber_that_joins_after_the_stream_began_anew_gets_its_lower_ids(
    ground: Place, source: EventFeed
) -> None:
    ground.store.call(Command(None, ('DEL', ground.store.prefix + b'events')))
    first = Listener(source, f'{int(time.time() * 1000) + 100_000}-0')
    assert first.next().is_gap
    late = Listener(source)
    [task] = add(ground, 'a')
    assert first.next().fields['task_id'] == task
    while (event := late.next()).is_gap:
        pass
    assert event.fields['task_id'] == task


def test_a_reset_of_the_town_is_a_gap_followed_by_the_reset_event(ground: Place, source: EventFeed) -> None:
    add(ground, 'a')
    listener = Listener(source, here(ground))
    add(ground, 'b')
    assert listener.types(1) == ['task.created']
    ground.do('town.reset', force=True)
    heard: list[str] = []
    while not heard or heard[-1] != 'town.reset':
        heard += listener.types(1)
    assert 'gap' in heard
    add(ground, 'c')
    assert listener.types(1) == ['task.created']


def test_the_reader_ends_with_the_last_subscriber_and_starts_again_with_the_next(
    ground: Place, source: EventFeed
) -> None:
    before = set(threading.enumerate())
    first, second = Listener(source, here(ground)), Listener(source, here(ground))
    [reader] = set(threading.enumerate()) - before
    first.stop()
    add(ground, 'a')
    assert second.types(1) == ['task.created']
    second.stop()
    second.stop()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    third = Listener(source, here(ground))
    add(ground, 'b')
    assert third.types(1) == ['task.created']
    assert first.heard.empty()


def test_the_feed_continues_after_redis_was_killed(place: Place) -> None:
    source = EventFeed(place.store)
    listener = Listener(source, here(place))
    add(place, 'a')
    assert listener.types(1) == ['task.created']
    server = redis_pid(place)
    os.kill(server, signal.SIGKILL)
    await_exit(server)
    start_redis(place)
    [task] = add(place, 'b')
    assert listener.next().fields['task_id'] == task
    listener.stop()


def test_a_subscriber_that_fails_costs_no_other_its_events(ground: Place, source: EventFeed) -> None:
    def fail(events: list[Event]) -> None:
        raise ValueError(events)

    start = here(ground)
    assert source.subscribe(start, fail)
    listener = Listener(source, start)
    for name in 'ab':
        [task] = add(ground, name)
        assert listener.next().fields['task_id'] == task


def test_events_that_could_not_be_passed_on_are_passed_on_later(ground: Place, source: EventFeed) -> None:
    def fail_once(_: object) -> None:
        source.call_soon = call_soon
        raise OSError('closed')

    call_soon, source.call_soon = source.call_soon, fail_once
    listener = Listener(source, here(ground))
    tasks = add(ground, 'a', 'b')
    assert [listener.next().fields['task_id'] for _ in tasks] == tasks


def test_events_are_delivered_through_call_soon(ground: Place) -> None:
    queue: Queue[object] = Queue()
    source = EventFeed(ground.store, queue.put)
    listener = Listener(source, here(ground))
    add(ground, 'a')
    deliver = queue.get(timeout=PATIENCE)
    assert listener.heard.empty()
    assert callable(deliver)
    deliver()
    assert listener.types(1) == ['task.created']
    listener.stop()
