"""Metrics: which are served, that they are right with several processes and townhalls, that their number is fixed."""

from __future__ import annotations

import http.client
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tinytown.auth import api_keys
from tinytown.core.operations import OPERATIONS
from tinytown.model import TASK_BOUNDS
from tinytown.rest.health import ROUTES
from tinytown.rest.metrics import HTTP_BOUNDS, PLAIN, Meter, render_metrics
from tinytown.state.store import Command

from ..ground import enlist, redis
from ..support import PATIENCE, REPOSITORY, Hall, Place, Service, make_town, redis_pid
from ..townhall.test_process import children

_SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="[^"\\]*",?)*)\})? (\S+)')


@pytest.fixture(scope='module')
def soil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = make_town(tmp_path_factory.mktemp('m'), max_agents=100)
    place.hall()
    yield place
    place.store.call(Command(None, ('FLUSHALL',)))
    place.close()


class Samples(dict[str, float]):
    """The samples of a scrape by name and labels, written as in the text; a missing sample is 0."""

    def __missing__(self, _key: str) -> float:
        return 0.0

    def __sub__(self, other: Samples) -> Samples:
        return Samples({key: value - other[key] for key, value in self.items()})

    def buckets(self, name: str, labels: str = '') -> dict[str, float]:
        """The buckets of a histogram, by bound."""
        prefix = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
        return {key[len(prefix) : -2]: value for key, value in self.items() if key.startswith(prefix)}


def parse(text: str) -> Samples:
    """Parses Prometheus text 0.0.4, and asserts that it keeps the rules of the format."""
    kinds: dict[str, str] = {}
    documented: set[str] = set()
    found = Samples()
    for line in text.splitlines():
        if line.startswith('# TYPE '):
            _, _, name, kind = line.split(' ')
            assert name not in kinds, f'{name} is declared twice'
            kinds[name] = kind
        elif line.startswith('# HELP '):
            documented.add(line.split(' ')[2])
        elif not line.startswith('#'):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            key = line.rpartition(' ')[0]
            assert key not in found, f'{key} is there twice'
            found[key] = float(match[3])
            family = re.sub(r'_(bucket|sum|count)$', '', match[1])
            assert (family if family in kinds else match[1]) == list(kinds)[-1], 'a sample apart from its family'
    assert set(kinds) == documented
    assert text.endswith('\n')
    _check_histograms(found, {name for name, kind in kinds.items() if kind == 'histogram'})
    return found


def _check_histograms(found: Samples, names: set[str]) -> None:
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    for key, value in found.items():
        match = re.fullmatch(r'(\w+)_bucket\{(.*?),?le="([^"]+)"\}', key)
        if match:
            seen[match[1], match[2]].append(value)
    assert {name for name, _ in seen} <= names
    for (name, labels), values in seen.items():
        braces = f'{{{labels}}}' if labels else ''
        assert values == sorted(values), f'{name}{braces} is not cumulative'
        assert values[-1] == found[f'{name}_count{braces}']
        assert f'{name}_sum{braces}' in found


def scrape(service: Service, **headers: str) -> Samples:
    answer = service.get('/metrics', **headers)
    assert answer.status == 200
    assert answer.headers['content-type'] == 'text/plain; version=0.0.4; charset=utf-8'
    return parse(answer.body.decode())


def until(service: Service, holds: Callable[[Samples], bool]) -> Samples:
    """Scrapes until a condition holds, and returns that scrape."""
    deadline = time.monotonic() + PATIENCE
    while not holds(found := scrape(service)):
        assert time.monotonic() < deadline, found
    return found


def shows(found: Samples, connections: int, streams: int) -> bool:
    """Whether a scrape shows so many, apart from the few connections of the scrapes themselves."""
    others = found['tinytown_http_connections'] - connections
    return 0 <= others <= 4 and found['tinytown_http_streams'] == streams


def requests(operation: str, method: str, status: str = '2xx', part: str = 'count') -> str:
    labels = f'operation="{operation}",method="{method}",status="{status}"'
    return f'tinytown_http_request_duration_seconds_{part}{{{labels}}}'


# ------------------------------------------------------------------------------------------------------------ the town


def test_the_published_metrics_are_correct(ground: Place) -> None:
    worker, idle = enlist(ground, 'worker'), enlist(ground, 'idle')
    for number in range(4):
        ground.do('backlog.add', description=str(number))
    for number in range(3):
        ground.do('task.assign', agent='worker', task=str(number))
    worker.finish(*worker.take())
    worker.round_done()
    worker.take()
    ground.do('message.send', to='idle', message='look', urgent=True)
    ground.do('agent.interrupt', agent='idle')
    enlist(ground, 'gone').depart('Error')
    found = scrape(ground.halls[0])
    for name in ('tinytown_agents_total', 'tinytown_agents'):
        states = {key: value for key, value in found.items() if key.startswith(f'{name}{{') and value}
        assert states == {f'{name}{{state="{state}"}}': 1 for state in ('working', 'paused', 'error')}
    expected = {
        'up': 1, 'ready': 1, 'tasks_pending': 5, 'backlog_tasks': 4, 'tasks_assigned_pending': 1, 'tasks_running': 1,
        'tasks_completed_total': 1, 'urgent_messages': 1, 'tasks_created_total': 7, 'task_attempts_total': 2,
        'messages_sent_total': 1, 'agent_starts_total': 3, 'agent_crashes_total': 1, 'dead_letters': 0,
    }  # fmt: skip
    assert {name: found[f'tinytown_{name}'] for name in expected} == expected
    assert 0 < found['tinytown_redis_latency_seconds'] < 1
    assert idle.show()['urgent_len'] == 1


def test_ended_tasks_and_dead_letters_are_counted(ground: Place) -> None:
    worker = enlist(ground, 'a')
    for _ in range(2):
        ground.do('task.assign', agent='a', task='x')
    worker.finish(*worker.take(), 'failed')
    ground.do('task.cancel', task_id=worker.take()[0])
    poison = ground.do('task.assign', agent='a', task='poison')['task_id']
    worker.die_of(poison)
    found = scrape(ground.halls[0])
    assert (found['tinytown_tasks_failed_total'], found['tinytown_tasks_cancelled_total']) == (1, 1)
    assert found['tinytown_dead_lettered_total{kind="task"}'] == found['tinytown_dead_letters'] == 1
    assert found['tinytown_task_attempts_total'] == 5
    assert found['tinytown_task_requeues_total'] == 2, 'after its first and second attempt, not the last'
    assert found['tinytown_agent_crashes_total'] == 3
    ground.do('deadletter.drop', id=poison)
    found = scrape(ground.halls[0])
    assert (found['tinytown_dead_letters'], found['tinytown_dead_lettered_total{kind="task"}']) == (0, 1)


def test_a_repeated_request_is_counted_once(ground: Place) -> None:
    for _ in range(2):
        ground.do('backlog.add', key='k', description='x')
    assert scrape(ground.halls[0])['tinytown_tasks_created_total'] == 1


def test_waiting_and_running_times_are_counted_in_buckets(ground: Place) -> None:
    worker = enlist(ground, 'a')

    def backdate(task: str, field: str, ms: int) -> None:
        """Sets a time of a task to so long ago."""
        seconds, micros = map(int, redis(ground, 'TIME'))
        then = seconds * 1000 + micros // 1000 - ms
        redis(ground, 'HSET', ground.store.prefix + f'task:{task}'.encode(), field, str(then))

    for wait, run, outcome in (
        (2_000, 20_000, 'completed'),
        (100_000, 90_000_000, 'failed'),
        (-60_000, -60_000, 'completed'),
    ):  # a time in the future counts as 0
        task = ground.do('task.assign', agent='a', task='x')['task_id']
        backdate(task, 'queued', wait)
        worker.take()
        backdate(task, 'started', run)
        worker.finish(task, 1, outcome)
    found = scrape(ground.halls[0])
    waited = found.buckets('tinytown_task_queue_wait_seconds')
    assert list(waited) == [f'{bound:g}' for bound in TASK_BOUNDS] + ['+Inf']
    assert [waited[le] for le in ('0.01', '0.1', '1', '5', '60', '300', '+Inf')] == pytest.approx([1, 1, 1, 2, 2, 3, 3])
    assert found['tinytown_task_queue_wait_seconds_sum'] == pytest.approx(102, abs=2.5)
    ran = found.buckets('tinytown_task_run_seconds', 'outcome="completed"')
    assert [ran[le] for le in ('0.1', '15', '60', '+Inf')] == [1, 1, 2, 2]
    failed = found.buckets('tinytown_task_run_seconds', 'outcome="failed"')
    assert (failed['86400'], failed['+Inf']) == (0, 1)
    assert found['tinytown_task_run_seconds_sum{outcome="failed"}'] == pytest.approx(90_000, abs=30)


def test_the_wait_of_a_requeued_task_starts_again(ground: Place) -> None:
    worker = enlist(ground, 'a')
    ground.do('task.assign', agent='a', task='x')
    task, _ = worker.take()
    redis(ground, 'HSET', ground.store.prefix + f'task:{task}'.encode(), 'queued', '1')
    worker.hello()  # a restarted worker: its task is requeued at its place
    assert worker.take() == (task, 2)
    waited = scrape(ground.halls[0]).buckets('tinytown_task_queue_wait_seconds')
    assert (waited['60'], waited['+Inf']) == (2, 2), 'the second wait starts when the task is requeued'


def test_task_counters_outlive_a_townhall_and_are_the_same_from_every_one(place: Place) -> None:
    halls = [place.hall(), place.hall('--workers', '2')]
    for number in range(5):
        halls[number % 2].post('/v1/backlog', {'description': 'x'})
    place.do('backlog.add', description='without a townhall')
    assert {scrape(hall)['tinytown_tasks_created_total'] for hall in halls} == {6}
    for hall in halls:
        hall.kill()
    assert scrape(place.hall())['tinytown_tasks_created_total'] == 6


# ---------------------------------------------------------------------------------------------------------------- HTTP


def test_requests_are_counted_by_operation_method_and_status_class(ground: Place) -> None:
    hall = ground.halls[0]
    before = scrape(hall)
    for _ in range(3):
        assert hall.post('/v1/backlog', {'description': 'x'}).status == 201
    assert hall.post('/v1/backlog', {}).status == 422
    assert hall.post('/v1/backlog', b'{').status == 400
    assert hall.get('/v1/agents/nobody').status == 404
    assert hall.request('HEAD', '/v1/backlog').status == 200
    assert hall.request('POST', '/v1/agents/conductor/inbox').status == 200
    assert hall.get('/nowhere').status == 404
    assert hall.request('DELETE', '/v1/town').status == 405
    assert hall.talk(b'what is this\r\n\r\n').startswith(b'HTTP/1.1 400')
    new = scrape(hall) - before
    assert {key: value for key, value in new.items() if '_seconds_count{operation' in key and value} == {
        requests('backlog.add', 'POST'): 3,
        requests('backlog.add', 'POST', '4xx'): 2,
        requests('agent.get', 'GET', '4xx'): 1,
        requests('backlog.list', 'HEAD'): 1,
        requests('agent.inbox', 'POST'): 1,
        requests('metrics', 'GET'): 1,
        requests('other', 'other', '4xx'): 3,
    }


def test_the_alerts_use_existing_metrics(ground: Place) -> None:
    named = set(re.findall(r'tinytown_\w+', (REPOSITORY / 'deploy' / 'alerts.yml').read_text()))
    assert len(named) > 8
    assert named <= {re.match(r'\w+', key)[0] for key in scrape(ground.halls[0])}  # type: ignore[index]


def test_a_request_falls_into_the_bucket_of_its_duration() -> None:
    meter = Meter()
    for seconds in (0.0001, 0.0005, 0.0006, 29.0, 31.0):
        meter.observe('task.get', 'GET', 200, seconds)
    found = parse(render_metrics(meter, None, 0.0, 'x'))
    labels = 'operation="task.get",method="GET",status="2xx"'
    buckets = found.buckets('tinytown_http_request_duration_seconds', labels)
    assert list(buckets) == [f'{bound:g}' for bound in HTTP_BOUNDS] + ['+Inf']
    assert [buckets[le] for le in ('0.0005', '0.001', '10', '30', '+Inf')] == [2, 3, 3, 4, 5]
    assert found[requests('task.get', 'GET', part='sum')] == pytest.approx(60.0012)


def test_a_waiting_request_is_counted_with_its_full_duration(ground: Place) -> None:
    hall = ground.halls[0]
    enlist(ground, 'a')
    before = scrape(hall)
    assert hall.post('/v1/agents/a/wait', {'timeout': 1}).json['done'] is False
    new = scrape(hall) - before
    assert new[requests('agent.wait', 'POST')] == 1
    assert 1 <= new[requests('agent.wait', 'POST', part='sum')] < PATIENCE


def test_clients_cannot_create_new_series(ground: Place) -> None:
    hall = ground.halls[0]
    hall.get('/nowhere')
    before = set(scrape(hall))
    for number in range(20):
        assert hall.request(f'METHOD{number}', f'/path{number}').status in (404, 405, 501)
        assert hall.get(f'/v1/agents/agent{number}').status == 404
    new = set(scrape(hall)) - before
    assert len({key for key in new if key.startswith('tinytown_http_request_duration_seconds_count')}) <= 2
    assert not [key for key in new if 'METHOD' in key or 'path' in key or 'agent1' in key]


def test_every_route_has_its_own_series() -> None:
    meter = Meter()
    for op in OPERATIONS:
        meter.observe(op.name, op.method, 200, 0.0)
    for name in (*ROUTES.values(), *PLAIN):
        meter.observe(name, 'GET', 200, 0.0)
    assert not [key for key in parse(render_metrics(meter, None, 0.0, 'x')) if 'other' in key]


def test_request_counts_are_right_with_several_processes_and_after_one_is_replaced(place: Place) -> None:
    hall = place.hall('--workers', '3')
    for _ in range(60):
        assert hall.get('/v1/town').status == 200
    for _ in range(6):
        assert scrape(hall)[requests('town.get', 'GET')] == 60, 'every process shows the sum of all'
    old = children(hall.process.pid)
    os.kill(old[0], signal.SIGKILL)
    until(hall, lambda _found: len(children(hall.process.pid)) == 3 and old[0] not in children(hall.process.pid))
    for _ in range(30):
        assert hall.get('/v1/town').status == 200
    assert scrape(hall)[requests('town.get', 'GET')] == 90


def test_open_connections_and_streams_of_all_processes_are_shown(place: Place) -> None:
    hall = place.hall('--workers', '2')
    with ExitStack() as held:
        for _ in range(10):
            sock = held.enter_context(hall.connect())
            sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
            assert sock.recv(4096)
        for _ in range(4):
            sock = held.enter_context(hall.connect())
            sock.sendall(b'GET /v1/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n')
            assert sock.recv(4096).startswith(b'HTTP/1.1 200')
        until(hall, lambda found: shows(found, 14, 4))
    until(hall, lambda found: shows(found, 0, 0))


def test_counting_a_request_is_cheap() -> None:
    meter = Meter(4)

    def cost(count: Callable[[str, str, int, float], object]) -> float:
        began = time.process_time()
        for _ in range(10_000):
            count('task.assign', 'POST', 201, 0.0007)
        return time.process_time() - began

    def nothing(*_: object) -> None:
        pass

    rounds = [(cost(meter.observe), cost(nothing)) for _ in range(7)]
    least, empty = (min(column) for column in zip(*rounds, strict=True))
    assert least < 25 * empty  # the factor is 6 on an idle machine


def test_a_counter_never_falls_while_requests_run(ground: Place) -> None:
    hall = ground.halls[0]
    stop = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection(hall.address, hall.port, timeout=PATIENCE)
        while not stop.is_set():
            connection.request('GET', '/v1/town')
            connection.getresponse().read()
        connection.close()

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        last = 0.0
        for _ in range(20):
            now = scrape(hall)[requests('town.get', 'GET')]
            assert now >= last
            last = now
        until(hall, lambda found: found[requests('town.get', 'GET')] > last)
    finally:
        stop.set()
        for client in clients:
            client.join()


# ---------------------------------------------------------------------------------------------- without Redis, access


def test_without_redis_the_answer_is_503_with_only_the_known_metrics(place: Place, hall: Hall) -> None:
    assert hall.get('/v1/town').status == 200
    server = redis_pid(place)
    os.kill(server, signal.SIGSTOP)
    try:
        answer = hall.get('/metrics')
    finally:
        os.kill(server, signal.SIGCONT)
    assert answer.status == 503
    text = answer.body.decode()
    assert re.match(r'# tinytown_metrics_error \S.+\n', text)
    found = parse(text)
    assert (found['tinytown_up'], found['tinytown_ready'], found[requests('town.get', 'GET')]) == (1, 0, 1)
    assert not [key for key in found if 'tasks' in key or 'agents' in key], 'an unknown number is not shown as 0'


@pytest.fixture(scope='module')
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hall, dict[str, str], Path]]:
    """A townhall whose metrics need a scope, and API keys by scope."""
    by_scope = {scope: api_keys.generate_key() for scope in ('town.read', 'town.write', 'admin')}
    keys = [{'id': key.id, 'hash': key.hash, 'scopes': [scope]} for scope, key in by_scope.items()]
    settings = {'townhall__auth': {'mode': 'api_key', 'keys': keys}, 'townhall__metrics': {'scope': 'town.read'}}
    place = make_town(tmp_path_factory.mktemp('g'), **settings)
    yield place.hall(), {scope: key.key for scope, key in by_scope.items()}, place.root
    place.close()


def test_metrics_and_scaling_may_need_a_scope(guarded: tuple[Hall, dict[str, str], Path]) -> None:
    hall, keys, root = guarded
    for path, name in (('/metrics', 'metrics'), ('/api/scaling', 'scaling')):
        nobody = hall.get(path)
        assert (nobody.status, nobody.json['code']) == (401, 'unauthorized')
        assert nobody.headers['www-authenticate'].startswith('Bearer')
        assert hall.get(path, Authorization='Bearer tt_x').status == 401
        writer = hall.get(path, X_API_Key=keys['town.write'])
        assert (writer.status, writer.json['code']) == (403, 'insufficient-scope')
        assert writer.json['detail'].startswith(f'{name} needs the scope town.read')
        assert hall.get(path, X_API_Key=keys['town.read']).status == 200
    for scope in ('town.read', 'admin'):
        for _ in range(2):  # the first key check runs on a thread, the second finds the cached result
            assert scrape(hall, Authorization=f'Bearer {keys[scope]}')['tinytown_up'] == 1
    denied = (root / '.tt' / 'audit.denied.jsonl').read_text()
    assert (denied.count('"metrics"'), denied.count('"scaling"')) == (3, 3)


@pytest.mark.parametrize('path', [path for path in ROUTES if path not in ('/metrics', '/api/scaling')])
def test_the_other_probes_need_no_key(guarded: tuple[Hall, dict[str, str], Path], path: str) -> None:
    hall, keys, _ = guarded
    assert hall.get(path).status == 200
    assert hall.get(path, X_API_Key=keys['town.write']).status == 200
    assert hall.request('HEAD', path).body == b''
    answer = hall.post(path)
    assert (answer.status, answer.headers['allow']) == (405, 'GET, HEAD, OPTIONS')


def test_metrics_need_no_key_if_no_scope_is_set(ground: Place) -> None:
    assert scrape(ground.halls[0], Authorization='Bearer whatever')['tinytown_up'] == 1
