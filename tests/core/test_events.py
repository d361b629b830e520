"""Events: pages, waiting pages, and streams. None of them misses or repeats an event, whatever breaks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tinytown.errors import Conflict, Invalid
from tinytown.model import CONDUCTOR_ID, Principal, new_id
from tinytown.state.store import Command

from ..ground import enlist, redis
from ..raw import HOST, read_answer
from ..streams import Listen, Listener, await_streams, happen, happen_often, ids, newest, trim
from ..support import OPERATOR, PATIENCE, REPOSITORY, Hall, Place, make_town, read_all, redis_pid, start_redis
from ..worker.test_worker import await_exit

ALL = '/v1/events?after=0-0'
NOW = '/v1/events?after=$'


@pytest.fixture(scope='module')
def open_hall(soil: Place) -> Iterator[Hall]:
    """A townhall for all tests of this module, with low limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(soil.root))
        made = soil.hall(TINYTOWN_TOWNHALL_LIMITS_STREAMS='20', TINYTOWN_TOWNHALL_LIMITS_WRITE_SECS='2')
        yield made
        made.kill()


@pytest.fixture
def hall(ground: Place, open_hall: Hall) -> Hall:
    assert ground
    return open_hall


# ------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize('limit', [1, 7, 500])
def test_pages_list_every_event_once_and_in_order(ground: Place, limit: int) -> None:
    happen(ground, 40)
    received: list[str] = []
    start: dict[str, Any] = {}
    while True:
        page = ground.do('events.list', limit=limit, **start)
        received += [event['id'] for event in page['events']]
        assert len(page['events']) <= limit
        assert 'gap' not in page
        start = {'after': page['next_after']}
        if not page.get('more'):
            break
    assert received == ids(ground)
    assert ground.do('events.list', **start) == {'events': [], 'next_after': received[-1]}


def test_a_page_from_now_on_is_empty_and_gives_the_newest_id(ground: Place) -> None:
    assert ground.do('events.list', after='$') == {'events': [], 'next_after': '0-0'}
    happen(ground, 3)
    now = newest(ground)
    assert ground.do('events.list', after='$') == {'events': [], 'next_after': now}
    happen(ground, 1)
    assert len(ground.do('events.list', after=now)['events']) == 1
    assert len(ground.do('events.list', after=now.partition('-')[0])['events']) >= 1  # an id without its second part


def test_events_are_filtered_by_agent_task_and_type(ground: Place) -> None:
    agents = [enlist(ground, name) for name in ('Backend', 'other')]
    tasks = [ground.do('task.assign', agent=agent.name, task='x')['task_id'] for agent in agents]
    ground.do('message.send', to='conductor', message='hello')

    def received(**wanted: Any) -> list[str]:
        return [event['type'] for event in ground.do('events.list', **wanted)['events']]

    mine = ['agent.registered', 'agent.started', 'task.assigned']
    for ref in ('Backend', 'BACKEND', agents[0].id, agents[0].id[:8]):
        assert received(agent=ref) == mine
        assert [event['type'] for event in ground.do('events.latest', agent=ref)['events']] == mine
    assert received(agent='conductor') == received(agent=CONDUCTOR_ID) == ['message.sent']
    assert received(task=tasks[1]) == ['task.created', 'task.assigned']
    assert received(type=['task']) == ['task.created', 'task.assigned'] * 2
    assert received(type=['task.assigned', 'message.sent']) == ['task.assigned', 'task.assigned', 'message.sent']
    assert received(type=['town']) == received(agent='nobody') == received(task=new_id()) == []
    assert received(agent='other', type=['task'], task=tasks[1]) == ['task.assigned']


def test_the_events_of_a_removed_agent_are_found_by_its_name_and_by_its_id(ground: Place) -> None:
    agent = enlist(ground, 'Gone')
    agent.depart()
    ground.do('agent.prune')
    kinds = ['agent.registered', 'agent.started', 'agent.stopped', 'agent.removed']
    for ref in ('gone', 'GONE', agent.id):
        assert [event['type'] for event in ground.do('events.list', agent=ref)['events']] == kinds


def test_text_from_a_caller_is_not_taken_for_a_field_of_an_event(ground: Place) -> None:
    victim, task = enlist(ground, 'a'), new_id()
    forged = Principal(f'"agent_id":"{victim.id}","task_id":"{task}","type":"town.reset"', OPERATOR.scopes)
    before = newest(ground)
    ground.do('backlog.add', by=forged, description='x')
    for wanted in ({'agent': 'a'}, {'task': task}, {'type': ['town']}):
        assert ground.do('events.list', after=before, **wanted)['events'] == []


def test_a_page_of_rare_events_continues_after_the_last_examined_event(ground: Place) -> None:
    happen(ground, 2500)
    enlist(ground, 'rare')
    after, pages = '0-0', []
    while True:
        page = ground.do('events.list', after=after, agent='rare')
        pages.append(len(page['events']))
        after = page['next_after']
        if not page.get('more'):
            break
    assert pages == [0, 0, 2]
    assert after == newest(ground)


def test_the_latest_events_are_listed_oldest_first(ground: Place) -> None:
    happen(ground, 60)
    assert [event['id'] for event in ground.do('events.latest')['events']] == ids(ground)[-50:]
    assert [event['id'] for event in ground.do('events.latest', limit=2)['events']] == ids(ground)[-2:]


@pytest.mark.parametrize('what', ['trimmed', 'emptied', 'reset', 'flushed'])
def test_a_page_reports_a_gap_if_events_were_deleted(ground: Place, what: str) -> None:
    happen(ground, 20)
    known = ids(ground)[4]
    if what == 'reset':
        ground.do('town.reset', force=True)
    elif what == 'flushed':  # as after the loss of Redis' files: the client knows a later id than Redis has
        redis(ground, 'DEL', ground.store.prefix + b'events')
        known = '9' * 14 + '-0'
        happen(ground, 2)
    else:
        trim(ground, 8 if what == 'trimmed' else 0)
    page = ground.do('events.list', after=known)
    assert page['gap'] is True
    assert [event['id'] for event in page['events']] == ids(ground)
    assert 'gap' not in ground.do('events.list', after=page['next_after'])
    assert 'gap' not in ground.do('events.list')
    if what == 'trimmed':
        assert 'gap' not in ground.do('events.list', after=ids(ground)[0])


@pytest.mark.parametrize(
    'wrong', [{'after': 'x'}, {'after': '1-2-3'}, {'limit': 0}, {'type': ['*']}, {'task': 'x'}, {'agent': '../x'}]
)
def test_invalid_arguments_are_refused(ground: Place, wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        ground.do('events.list', **wrong)


def test_the_start_of_two_ids_is_ambiguous(ground: Place) -> None:
    for _ in range(2):
        redis(ground, 'ZADD', ground.store.prefix + b'ids', '0', f'abcd{new_id()[4:]}')
    with pytest.raises(Conflict):
        ground.do('events.list', agent='abcd')


# -------------------------------------------------------------------------------------------------------- the stream


def test_a_stream_has_exactly_these_bytes_of_server_sent_events(ground: Place, hall: Hall, listen: Listen) -> None:
    happen(ground, 1)
    listener = listen(hall, ALL)
    assert listener.status == 200
    assert b'\r\nContent-Type: text/event-stream\r\n' in listener.head
    assert b'\r\nCache-Control: no-store\r\n' in listener.head
    assert b'\r\nContent-Length' not in listener.head
    assert [listener.block().raw for _ in range(2)] == [b'retry: 1000', b'id: 0-0']
    [event] = ground.do('events.list')['events']
    heard = listener.block()
    assert heard.raw.startswith(f'id: {event["id"]}\nevent: task.created\ndata: {{'.encode())
    assert (heard.data, heard.raw.count(b'\n')) == (event, 2)


@pytest.mark.parametrize(
    ('accept', 'streams'),
    [
        ('text/event-stream', True),
        ('application/json, TEXT/Event-Stream;q=0.5', True),
        ('text/event-stream;q=0', False),
        ('text/event-stream ; q=0.000', False),
        ('text/*', False),
        ('*/*', False),
        ('application/json', False),
        ('', False),
    ],
)
def test_the_accept_header_decides_whether_the_answer_is_a_stream(hall: Hall, accept: str, streams: bool) -> None:
    with hall.connect() as sock:
        sock.sendall(b'HEAD /v1/events HTTP/1.1\r\n' + HOST + f'Accept: {accept}\r\nConnection: close\r\n\r\n'.encode())
        head = read_all(sock)
    assert head.startswith(b'HTTP/1.1 200 ')
    assert (b'text/event-stream' in head) is streams
    assert b'\r\nVary: Accept\r\n' in head
    assert head.endswith(b'\r\n\r\n')


def test_an_http_1_0_client_gets_a_stream_without_chunks(ground: Place, hall: Hall, listen: Listen) -> None:
    listener = listen(hall, NOW, 'Connection: keep-alive', version='1.0').ready()
    assert not listener.is_chunked
    assert b'\r\nConnection: close' in listener.head
    happen(ground, 2)
    assert [heard.id for heard in listener.events(2)] == ids(ground)


def test_a_head_request_for_a_stream_keeps_the_connection_usable(hall: Hall) -> None:
    with hall.connect() as sock:
        sock.sendall(b'HEAD /v1/events HTTP/1.1\r\nAccept: text/event-stream\r\n' + HOST + b'\r\n')
        assert b'text/event-stream' in sock.recv(65536)
        sock.sendall(b'GET /health HTTP/1.1\r\n' + HOST + b'\r\n')
        assert read_answer(sock).status == 200


def test_a_filtered_stream_still_reports_its_position(ground: Place, hall: Hall, listen: Listen) -> None:
    listener = listen(hall, f'{NOW}&type=agent').ready()
    happen(ground, 250)
    heard = listener.block()
    assert (heard.data, heard.type) == (None, '')
    assert heard.id in ids(ground)[99:]
    enlist(ground, 'a')
    assert [each.type for each in listener.events(2)] == ['agent.registered', 'agent.started']
    assert listener.is_quiet(0.1)


def test_last_event_id_takes_precedence_over_the_query(ground: Place, hall: Hall, listen: Listen) -> None:
    happen(ground, 5)
    third = ids(ground)[2]
    listener = listen(hall, NOW, last=third)
    assert [heard.id for heard in listener.events(2)] == ids(ground)[3:]
    answer = hall.get('/v1/events', Accept='text/event-stream', Last_Event_ID='nonsense')
    assert (answer.status, answer.json['errors'][0]['pointer']) == (422, '/Last-Event-ID')


def test_a_client_that_resumes_after_deleted_events_gets_a_gap_first(ground: Place, hall: Hall, listen: Listen) -> None:
    happen(ground, 10)
    known = ids(ground)[1]
    trim(ground, 4)
    listener = listen(hall, NOW, last=known)
    gap = listener.event()
    assert (gap.type, gap.id, gap.data) == ('gap', '', {'type': 'gap', 'after': known})
    assert [heard.id for heard in listener.events(4)] == ids(ground)
    fresh = listen(hall, '/v1/events')
    assert fresh.event().type == 'task.created'  # a client without a last id has missed nothing


def test_a_reset_of_the_town_reaches_open_streams(ground: Place, hall: Hall, listen: Listen) -> None:
    happen(ground, 3)
    listener = listen(hall, NOW).ready()
    happen(ground, 1)
    listener.event()
    ground.do('town.reset', force=True)
    assert [heard.type for heard in listener.events(2)] == ['gap', 'town.reset']
    happen(ground, 1)
    assert listener.event().id == newest(ground)


def test_streams_that_join_at_any_moment_miss_nothing(ground: Place, hall: Hall, listen: Listen) -> None:
    happen(ground, 700)  # more than one page
    began = [listen(hall, ALL), listen(hall, NOW).ready()]
    writer = happen_often(ground, 30, 50)
    joined = [listen(hall, ALL) for _ in range(10)]
    first = began[1].event().id
    writer.join()
    everything = ids(ground)
    assert len(everything) == 2200
    for listener in (began[0], *joined):
        assert [heard.id for heard in listener.events(2200)] == everything
    assert [heard.id for heard in began[1].events(1499)] == everything[701:]
    assert first == everything[700]
    assert all(listener.is_quiet(0.01) for listener in (*began, *joined))


class Follower(threading.Thread):
    """A client that reconnects whenever its stream ends, until it has received `count` events."""

    def __init__(self, service: Any, count: int, path: str = ALL) -> None:
        super().__init__(daemon=True)
        self._service, self._count, self._path = service, count, path
        self.heard: list[str] = []
        self.gaps = 0
        self.visits = threading.Semaphore(0)  # released once for each stream it got

    def run(self) -> None:
        last, deadline = '', time.monotonic() + 4 * PATIENCE
        while len(self.heard) < self._count and time.monotonic() < deadline:
            try:
                listener = Listener(self._service, self._path, last=last)
            except OSError:
                time.sleep(0.05)  # no townhall is listening
                continue
            if listener.status != 200:
                listener.close()
                time.sleep(0.05)  # Redis is not reachable
                continue
            self.visits.release()
            try:
                while len(self.heard) < self._count:
                    event = listener.event()
                    self.gaps += event.type == 'gap'
                    self.heard += [event.id] if event.id else []
            except OSError:
                pass
            last = listener.last
            listener.close()


def restart_redis(place: Place) -> None:
    """Kills Redis and starts it again."""
    server = redis_pid(place)
    os.kill(server, signal.SIGKILL)
    await_exit(server)
    place.store.close()
    start_redis(place)


def test_ten_thousand_events_are_heard_once_each_over_kills_of_townhall_and_of_redis(place: Place) -> None:
    hall = place.hall()
    assert place.store
    readers = [Follower(hall, 10_000), Follower(hall, 10_000)]
    for reader in readers:
        reader.start()
    for part in range(10):
        happen(place, 1000)
        if part in (2, 5):
            for reader in readers:
                assert reader.visits.acquire(timeout=PATIENCE), 'it has not reconnected'
            hall.kill()
            hall = place.hall('--port', str(hall.port))
        if part == 7:
            restart_redis(place)
    everything = ids(place)
    for reader in readers:
        reader.join(4 * PATIENCE)
        assert reader.heard == everything
        assert (reader.visits.acquire(blocking=False), reader.gaps) == (True, 0)
    assert len(everything) == 10_000


def test_a_stream_survives_a_restart_of_redis(place: Place, listen: Listen) -> None:
    hall = place.hall()
    happen(place, 5)
    listener = listen(hall, ALL)
    assert len(listener.events(5)) == 5
    restart_redis(place)
    happen(place, 5)
    assert [heard.id for heard in listener.events(5)] == ids(place)[5:]


# ----------------------------------------------------------------------------------------------------- slow, or gone


def test_a_slow_reader_misses_nothing_and_holds_up_nobody(place: Place, listen: Listen) -> None:
    hall = place.hall()
    happen(place, 3000, size=2000)
    live = listen(hall, NOW).ready()
    happen(place, 1000, size=2000)  # with the others 9 MB, more than all buffers on the way
    assert len(live.events(1000)) == 1000
    resident = memory(hall)
    listener = listen(hall, ALL)
    happen(place, 1000, size=2000)
    assert len(live.events(1000)) == 1000  # other streams are not held up
    assert memory(hall) - resident < 8 << 20
    assert [heard.id for heard in listener.events(5000)] == ids(place)
    happen(place, 1)
    assert listener.event().id == live.event().id == newest(place)
    for each in (listener, live):
        each.close()


def memory(hall: Hall) -> int:
    """The resident memory of a townhall, in bytes."""
    status = Path(f'/proc/{hall.process.pid}/status').read_text()
    return int(status.split('VmRSS:')[1].split()[0]) * 1024


def test_a_reader_that_reads_nothing_is_cut_off_and_resumes_where_it_was(
    ground: Place, hall: Hall, listen: Listen
) -> None:
    happen(ground, 4000, size=2000)
    listener = listen(hall, ALL)
    assert listener.status == 200  # so the stream is counted
    await_streams(hall, 0)  # after write_secs
    before = [heard.id for heard in listener.rest()[0] if heard.data]
    assert 0 < len(before) < 4000
    again = listen(hall, ALL, last=listener.last)
    assert before + [heard.id for heard in again.events(4000 - len(before))] == ids(ground)


def test_a_client_that_sends_on_a_stream_is_not_read_without_limit(ground: Place, hall: Hall, listen: Listen) -> None:
    listener = listen(hall, NOW).ready()
    listener.sock.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < 64 << 20:
            sent += listener.sock.send(b'x' * (1 << 20))
            happen(ground, 1)
    assert sent < 32 << 20
    listener.sock.settimeout(PATIENCE)
    assert listener.event().type == 'task.created'
    listener.close()
    happen(ground, 1)  # the client's machine answers this with a reset
    await_streams(hall, 0)


@pytest.mark.parametrize('how', ['close', 'reset', 'half'])
def test_streams_of_vanished_clients_are_released(ground: Place, hall: Hall, how: str, listen: Listen) -> None:
    listeners = [listen(hall, path).ready() for path in (NOW, ALL) for _ in range(10)]
    refused = hall.get('/v1/events?after=$&wait=1')
    assert (refused.status, refused.json['code'], refused.headers['retry-after']) == (503, 'too-many-streams', '5')
    assert listen(hall, NOW).status == 503
    assert hall.get('/v1/events').status == 200  # a page is not a stream
    for listener in listeners:
        if how == 'reset':
            listener.sock.setsockopt(1, 13, b'\x01\0\0\0\0\0\0\0')  # SO_LINGER: close with a reset
        if how == 'half':
            listener.sock.shutdown(1)
        else:
            listener.close()
    await_streams(hall, 0)
    happen(ground, 10)
    again = [listen(hall, NOW).ready() for _ in range(20)]
    happen(ground, 1)
    assert {listener.event().id for listener in again} == {newest(ground)}
    for listener in (*again, *listeners):
        listener.close()
    await_streams(hall, 0)


def test_a_hundred_idle_streams_do_not_slow_requests_down(place: Place, listen: Listen) -> None:
    hall = place.hall()
    assert place.store

    def slowest() -> float:
        times = []
        with hall.connect() as sock:
            for _ in range(200):
                began = time.monotonic()
                sock.sendall(b'GET /v1/backlog HTTP/1.1\r\n' + HOST + b'\r\n')
                assert read_answer(sock).status == 200
                times.append(time.monotonic() - began)
        return sorted(times)[-10]

    alone = slowest()
    with ExitStack() as stack:
        listeners = [listen(hall, NOW).ready() for _ in range(100)]
        for listener in listeners:
            stack.callback(listener.close)
        assert min(slowest() for _ in range(3)) < 10 * alone + 0.05
        happen(place, 1)
        assert {listener.event().id for listener in listeners} == {newest(place)}


def test_an_idle_stream_has_a_heartbeat(place: Place, listen: Listen) -> None:
    """The townhall imports a module that sets a short heartbeat."""
    (place.root / 'sitecustomize.py').write_text('import tinytown.http.replies as s\ns.HEARTBEAT_SECS = 0.1\n')
    path = f'{REPOSITORY}{os.pathsep}{place.root}'
    hall = place.hall(PYTHONPATH=path)
    listener = listen(hall, NOW).ready()
    assert [listener.block().raw for _ in range(2)] == [b': ', b': ']
    happen(place, 1)
    assert listener.event().id == newest(place)


# ------------------------------------------------------------------------------------------------- waiting pages


def test_a_waiting_page_answers_at_the_first_event_that_fits(ground: Place, hall: Hall) -> None:
    now = newest(ground)
    with hall.connect() as sock:
        sock.sendall(f'GET /v1/events?after={now}&wait=25&type=agent HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode())
        await_streams(hall, 1)
        happen(ground, 3)
        agent = enlist(ground, 'a')
        page = read_answer(sock)
        assert page.status == 200
        assert page.json['events'][0]['agent_id'] == agent.id
        assert page.json['next_after'] in ids(ground)[3:]
        sock.sendall(b'GET /health HTTP/1.1\r\n' + HOST + b'\r\n')  # the connection stays open
        assert read_answer(sock).status == 200
    await_streams(hall, 0)


def test_a_chain_of_waiting_pages_gets_every_event_once(ground: Place, hall: Hall) -> None:
    happen(ground, 10)
    writer = happen_often(ground, 40, 7)
    after, received = '0-0', list[str]()
    while len(received) < 290:
        page = hall.get(f'/v1/events?after={after}&wait=15&limit=20').json
        received += [event['id'] for event in page['events']]
        after = page['next_after']
        assert 0 < len(page['events']) <= 20
    writer.join()
    assert received == ids(ground)


def test_a_waiting_page_that_times_out_reports_its_position(ground: Place, hall: Hall) -> None:
    began = time.monotonic()
    with hall.connect() as sock:
        sock.sendall(b'GET /v1/events?after=$&wait=3&type=agent HTTP/1.1\r\n' + HOST + b'\r\n')
        await_streams(hall, 1)
        happen(ground, 3)
        assert read_answer(sock).json == {'events': [], 'next_after': newest(ground)}
    assert 3 <= time.monotonic() - began < 15


def test_a_page_does_not_wait_if_it_has_events_or_a_gap(ground: Place, hall: Hall) -> None:
    happen(ground, 20)
    known = ids(ground)[2]
    assert len(hall.get(f'/v1/events?after={known}&wait=25').json['events']) == 17
    trim(ground, 0)
    assert hall.get(f'/v1/events?after={known}&wait=25').json['gap'] is True
    assert hall.get('/v1/events?after=$&wait=0').json['events'] == []


def test_pipelined_requests_are_answered_after_a_waiting_page(ground: Place, hall: Hall) -> None:
    with hall.connect() as sock:
        waits = b'GET /v1/events?after=$&wait=20 HTTP/1.1\r\n' + HOST + b'\r\n'
        sock.sendall(waits + b'GET /health HTTP/1.1\r\n' + HOST + b'\r\n')
        await_streams(hall, 1)
        happen(ground, 1)
        answers = b''
        while b'uptime_secs' not in answers:
            answers += sock.recv(65536)
    assert answers.index(b'"next_after"') < answers.index(b'uptime_secs')


@pytest.mark.parametrize('wait', ['26', '-1', 'x', '1.5', '', '999', '5&wait=5'])
def test_an_invalid_wait_is_refused(hall: Hall, wait: str) -> None:
    answer = hall.get(f'/v1/events?after=$&wait={wait}')
    assert answer.status == (400 if '&' in wait else 422)
    if answer.status == 422:
        assert answer.json['errors'][0]['pointer'] == '/wait'
    await_streams(hall, 0)


def test_a_client_that_stops_waiting_frees_its_place(ground: Place, hall: Hall) -> None:
    for _ in range(20):
        with hall.connect() as sock:
            sock.sendall(b'GET /v1/events?after=$&wait=25 HTTP/1.1\r\n' + HOST + b'\r\n')
    await_streams(hall, 0)
    happen(ground, 1)
    assert hall.get('/health').status == 200


def test_a_waiting_page_without_redis_is_refused(place: Place, listen: Listen) -> None:
    hall = place.hall()
    server = redis_pid(place)
    os.kill(server, signal.SIGSTOP)
    try:
        assert hall.get('/v1/events?after=$&wait=1').status == 503
        assert listen(hall, NOW).status == 503
    finally:
        os.kill(server, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------- shutdown, access


def test_a_townhall_that_stops_ends_its_streams_and_answers_waiting_pages(place: Place, listen: Listen) -> None:
    hall = place.hall()
    happen(place, 1)
    chunked, plain = listen(hall, NOW).ready(), listen(hall, NOW, version='1.0').ready()
    with hall.connect() as sock:
        sock.sendall(b'GET /v1/events?after=$&wait=25 HTTP/1.1\r\n' + HOST + b'\r\n')
        await_streams(hall, 3)
        began = time.monotonic()
        hall.process.send_signal(signal.SIGTERM)
        for listener, is_chunked in ((chunked, True), (plain, False)):
            blocks, ended_well = listener.rest()
            assert [block.raw for block in blocks] == [b'retry: 1000']
            assert ended_well is is_chunked
            listener.close()
        assert read_answer(sock).json == {'events': [], 'next_after': newest(place)}
    assert hall.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 8


def test_every_worker_process_streams_all_events(place: Place, listen: Listen) -> None:
    hall = place.hall('--workers', '2')
    assert place.store
    listeners = [listen(hall, NOW).ready() for _ in range(12)]
    happen(place, 500)
    for listener in listeners:
        assert [heard.id for heard in listener.events(500)] == ids(place)
        listener.close()


@pytest.mark.parametrize('path', ['/v1/events', '/v1/events?wait=1', '/v1/agents/x/logs'])
def test_streams_require_the_read_scope(directory: Path, path: str, listen: Listen) -> None:
    place = make_town(directory)
    keys = {
        scopes: place.tt_json('key', 'create', '--scopes', scopes, '--write') for scopes in ('town.read', 'town.write')
    }
    try:
        hall = place.hall()
        assert listen(hall, path).status == 401
        assert listen(hall, path, f'X-API-Key: {keys["town.read"]["key"]}x').status == 401
        assert listen(hall, path, f'X-API-Key: {keys["town.write"]["key"]}').status == 403
        for _ in range(2):  # the second time, the key is cached
            found = listen(hall, path, f'X-API-Key: {keys["town.read"]["key"]}').status
            assert found == (404 if 'logs' in path else 200)
    finally:
        place.close()


def test_events_of_many_towns_on_one_redis_do_not_mix(ground: Place, hall: Hall, listen: Listen) -> None:
    listener = listen(hall, NOW).ready()
    redis(ground, 'XADD', 'tt:{other}:events', '*', 'j', '"type":"town.reset"')
    happen(ground, 1)
    assert listener.event().id == newest(ground)


def test_a_script_that_redis_lost_is_loaded_again(ground: Place, hall: Hall, listen: Listen) -> None:
    ground.store.call(Command(None, ('SCRIPT', 'FLUSH')))
    happen(ground, 2)
    assert len(listen(hall, ALL).events(2)) == 2
