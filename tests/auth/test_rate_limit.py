"""Rate limits: the buckets, in one process and in several, and the answers to clients."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tinytown import api_key_table, config
from tinytown.auth.api_keys import generate_key
from tinytown.auth.rate_limit import Buckets, Throttle, network
from tinytown.auth.shared_table import Table
from tinytown.errors import TooManyRequests
from tinytown.model import ALL_SCOPES, LOCAL, Principal
from tinytown.settings import RateLimitSettings

from ..support import PATIENCE, Hall, Place, make_town

ALICE, BOB, ANYONE = (Principal(name, ALL_SCOPES) for name in ('alice', 'bob', LOCAL))

# ------------------------------------------------------------------------------------------------------------ buckets


def test_a_bucket_gives_its_burst_and_what_it_gains_over_time() -> None:
    now = [5.0]
    buckets = Buckets(lambda: now[0])
    assert [buckets.take('a', 60, 3) for _ in range(4)] == [0, 0, 0, 1]
    assert buckets.take('b', 60, 3) == 0
    now[0] += 0.25
    assert buckets.take('a', 60, 3) == pytest.approx(0.75)
    now[0] += 0.75
    assert buckets.take('a', 60, 3) == 0
    now[0] += 1000
    assert [buckets.take('a', 60, 3) for _ in range(4)] == [0, 0, 0, 1]


def test_checking_a_bucket_takes_nothing() -> None:
    buckets = Buckets(lambda: 1.0)
    assert [buckets.take('a', 60, 1, 0.0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take('a', 60, 1) == 0
    assert buckets.take('a', 60, 1, 0.0) == 1


def test_in_a_full_table_a_new_name_replaces_the_oldest() -> None:
    table, now = Table(64), 0.0
    for i in range(1000):
        now += 1
        table.change(f'name {i}', now, lambda _value, _when: 7.0)
    assert value_of(table, 'name 999') == 7
    assert value_of(table, 'name 0') == 0


def value_of(table: Table, name: str) -> float:
    found: list[float] = []

    def look(value: float, _when: float) -> float:
        found.append(value)
        return value

    table.change(name, 2000.0, look)
    return found[0]


def forked(count: int, work: Any) -> None:
    """Runs `work` in `count` processes at once, and waits for them."""
    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            try:
                work()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


def test_forked_processes_share_one_bucket_and_lose_no_change() -> None:
    buckets, table = Buckets(lambda: 1.0), Table(64)

    def work() -> None:
        for _ in range(500):
            buckets.take('all', 60, 10_000)
            table.change('count', 1.0, lambda value, _when: value + 1)

    forked(4, work)
    assert value_of(table, 'count') == 2000
    left = sum(buckets.take('all', 60, 10_000) == 0 for _ in range(8001))
    assert left == 8000


def test_the_lock_of_a_dead_process_is_released() -> None:
    table = Table(64)
    forked(1, lambda: table.change('a', 1.0, lambda _value, _when: os._exit(0)))
    assert value_of(table, 'a') == 0


def test_threads_of_a_process_change_the_table_one_after_the_other() -> None:
    table, inside, other_is_done, early = Table(64), threading.Event(), threading.Event(), []

    def slow(value: float, _when: float) -> float:
        inside.set()
        early.append(other_is_done.wait(0.2))
        return value + 1

    def other() -> None:
        inside.wait(PATIENCE)
        table.change('count', 1.0, lambda value, _when: value + 1)
        other_is_done.set()

    threads = [threading.Thread(target=other), threading.Thread(target=table.change, args=('count', 1.0, slow))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert early == [False]
    assert value_of(table, 'count') == 2


# ------------------------------------------------------------------------------------------------------------- limits


def throttle(now: list[float], **settings: Any) -> Throttle:
    return Throttle(RateLimitSettings(enabled=True, **settings), Buckets(lambda: now[0]))


def test_reads_and_changes_are_counted_separately_for_each_caller() -> None:
    limits = throttle([1.0], requests_per_minute=60, burst_size=2, mutating_requests_per_minute=1)
    for by in (ALICE, BOB):
        for _ in range(2):
            limits.take(by, '10.0.0.1', False)
        limits.take(by, '10.0.0.1', True)
        for changes, kind in ((False, '60 reads'), (True, '1 changes')):
            with pytest.raises(TooManyRequests, match=f'{by.name} may make {kind} a minute'):
                limits.take(by, '10.0.0.2', changes)


def test_the_time_to_wait_is_in_whole_seconds() -> None:
    limits = throttle([1.0], mutating_requests_per_minute=7)
    for _ in range(7):
        limits.take(ALICE, 'a', True)
    with pytest.raises(TooManyRequests) as raised:
        limits.take(ALICE, 'a', True)
    assert raised.value.retry_after == 9


def test_nothing_is_limited_by_default() -> None:
    limits = Throttle(RateLimitSettings(), Buckets())
    for _ in range(1000):
        limits.take(ALICE, 'a', True)


@pytest.mark.parametrize(
    ('text', 'enabled'),
    [('', False), ('[townhall.rate_limit]', True), ('[townhall.rate_limit]\nburst_size = 5', True),
     ('[townhall.rate_limit]\nenabled = false\nburst_size = 5', False)],
)  # fmt: skip
def test_the_presence_of_the_table_turns_limits_on(text: str, enabled: bool) -> None:
    found = config.from_values(config.parse(text.encode(), 'x') | {'name': 'x'}, Path()).townhall.rate_limit
    assert found.enabled == enabled
    assert (found.requests_per_minute, found.mutating_requests_per_minute) == (600, 120)
    assert found.burst_size == (5 if 'burst' in text else 100)


@pytest.mark.parametrize(
    ('one', 'other', 'alike'),
    [
        ('10.0.0.1', '10.0.0.1', True),
        ('10.0.0.1', '10.0.0.2', False),
        ('10.0.0.1', '::ffff:10.0.0.1', True),
        ('2001:db8::1', '2001:db8::ffff:0:1', True),
        ('2001:db8::1', '2001:db8:0:1::1', False),
        ('fe80::1%eth0', 'fe80::2%eth1', True),
        ('', '', True),
    ],
)
def test_an_anonymous_caller_is_counted_by_address_or_network(one: str, other: str, alike: bool) -> None:
    assert (network(one) == network(other)) == alike
    limits = throttle([1.0], burst_size=1)
    limits.take(ANYONE, one, False)
    if alike:
        with pytest.raises(TooManyRequests):
            limits.take(ANYONE, other, False)
    else:
        limits.take(ANYONE, other, False)


# ---------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def limited(directory: Any) -> Any:
    made = make_town(directory, townhall__rate_limit={'requests_per_minute': 4, 'mutating_requests_per_minute': 2})
    yield made
    made.close()


def spent(hall: Hall, most: int, changes: bool, **headers: str) -> int:
    """The number of calls before the first 429."""
    for count in range(most + 1):
        answer = hall.post('/v1/recover', **headers) if changes else hall.get('/v1/town', **headers)
        if answer.status == 429:
            assert (answer.json['code'], answer.json['status']) == ('too-many-requests', 429)
            assert 1 <= int(answer.headers['retry-after']) <= 30
            return count
        assert answer.status == 200
    raise AssertionError(f'{most + 1} calls and no 429')


@pytest.mark.parametrize('workers', ['1', '3'])
def test_the_limit_is_the_same_for_any_number_of_processes_and_a_reload_refills_no_bucket(
    limited: Place, workers: str
) -> None:
    hall = limited.hall('--workers', workers)
    assert spent(hall, 4, changes=False) == 4
    assert spent(hall, 2, changes=True) == 2
    hall.process.send_signal(signal.SIGHUP)
    wait_for_log(hall, 'the configuration was reloaded')
    assert [hall.get('/v1/town').status for _ in range(6)] == [429] * 6
    assert [hall.post('/v1/recover').status for _ in range(3)] == [429] * 3
    for path in ('/health', '/ready', '/metrics'):
        assert [hall.get(path).status for _ in range(8)] == [200] * 8


def wait_for_log(hall: Hall, text: str) -> None:
    """Waits until the log of the townhall contains a text. Another process copies the log, so this polls the file."""
    ends = time.monotonic() + PATIENCE
    while text not in hall.log_file.read_text():
        assert time.monotonic() < ends, f'{text!r} is not in the log'
        hall.get('/health')


def test_each_key_has_its_own_limits(limited: Place) -> None:
    one, two = generate_key(), generate_key()
    file = limited.root / config.FILE
    keys = [api_key_table.written({'id': made.id, 'hash': made.hash, 'scopes': ['admin']}) for made in (one, two)]
    file.write_text(file.read_text() + '\n[townhall.auth]\nmode = "api_key"\n' + ''.join(keys))
    hall = limited.hall()
    for made in (one, two):
        assert spent(hall, 4, changes=False, X_API_Key=made.key) == 4
        assert spent(hall, 2, changes=True, X_API_Key=made.key) == 2
