"""The limits of one townhall: slow and greedy clients, many clients, no descriptors, a stalled Redis, its shutdown."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from ..raw import GET, HOST, Load, add, connections, descriptors, post, read_answer, texts, timed
from ..support import PATIENCE, REPOSITORY, Hall, Place, make_town, read_all, redis_pid, status_of

STATUS = b'GET /v1/status HTTP/1.1\r\n' + HOST + b'\r\n'


@pytest.fixture(scope='module')
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for the tests of this file that do not change it."""
    made = make_town(tmp_path_factory.mktemp('bounds'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(made.root))
        yield made
        made.close()


@pytest.fixture(scope='module')
def brief(town: Place) -> Hall:
    """A townhall with the shortest deadlines."""
    limits = {'HEAD_SECS': '1', 'BODY_SECS': '1', 'WRITE_SECS': '1', 'IDLE_SECS': '2'}
    return town.hall(**{f'TINYTOWN_TOWNHALL_LIMITS_{name}': value for name, value in limits.items()})


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raises this process's limit of open files to its maximum."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory(hall: Hall) -> int:
    """The resident memory of a townhall, in bytes."""
    fields = dict(line.split(':', 1) for line in Path(f'/proc/{hall.process.pid}/status').read_text().splitlines())
    return int(fields['VmRSS'].split()[0]) * 1024


# -------------------------------------------------------------------------------------------------- slow and greedy


def test_a_client_that_reads_its_answer_in_tiny_pieces_is_cut_off(brief: Hall, town: Place) -> None:
    task = town.do('backlog.add', description='€' * 65536)
    page = b'GET /v1/tasks/%b HTTP/1.1\r\n' % task['task_id'].encode() + HOST + b'\r\n'
    before = descriptors(brief)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect((brief.address, brief.port))
        sock.sendall(page * 100)
        while descriptors(brief) == before:
            sock.recv(512)
        began = time.monotonic()
        while descriptors(brief) > before:
            assert time.monotonic() - began < 9, 'it lives as long as it takes a byte now and then'
            sock.recv(512)


def test_a_slow_stream_of_empty_lines_does_not_keep_a_connection_open(brief: Hall) -> None:
    with brief.connect() as sock:
        sock.sendall(GET)
        assert read_answer(sock).status == 200
        began = time.monotonic()
        with suppress(ConnectionResetError, BrokenPipeError):
            while not select.select([sock], [], [], 0.1)[0]:
                sock.sendall(b'\r\n')
                assert time.monotonic() - began < 9
        assert b'HTTP/1.1 2' not in read_all(sock)


def send_ahead(sock: socket.socket, most: int) -> int:
    """Sends requests until the socket takes no more. Returns the bytes sent; fails if they exceed `most`."""
    sent = 0
    while select.select([], [sock], [], 0.2)[1]:
        sent += sock.send(STATUS * 1000)
        assert sent < most, 'it is read for ever'
    return sent


def test_a_client_that_sends_more_than_it_reads_is_not_read_further(town: Place) -> None:
    greedy = town.hall()
    assert greedy.get('/v1/status').status == 200
    before = memory(greedy)
    with greedy.connect() as sock:
        sock.setblocking(False)
        send_ahead(sock, 32 << 20)
        assert timed(greedy.get, '/health')[1] < 4
        got = 0
        while got < 1 << 20:
            assert select.select([sock], [], [], PATIENCE)[0]
            got += len(sock.recv(65536))
        send_ahead(sock, 4 << 20)
    assert memory(greedy) - before < 8 << 20


def test_memory_is_bounded_by_the_bodies_that_are_arriving(town: Place) -> None:
    loaded = town.hall()
    assert loaded.get('/v1/status').status == 200
    before = memory(loaded)
    with connections(loaded, 30) as socks:
        for sock in socks:
            sock.sendall(post(b' ' * (1 << 20))[:-1])
        assert loaded.get('/v1/status').status == 200
        assert memory(loaded) - before < 30 * ((1 << 20) + 16384) + (4 << 20)
        for sock in socks:
            sock.sendall(b' ')
        assert [read_answer(sock).status for sock in socks] == [400] * 30
    before = memory(loaded)
    with loaded.connect() as sock, suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(post(b' ' * (10 << 20)))
        assert status_of(read_all(sock)) == 413
    assert memory(loaded) - before < 4 << 20


# ------------------------------------------------------------------------------------------------------------- many


@pytest.mark.usefixtures('many_files')
def test_a_thousand_idle_connections_take_little_memory_and_do_not_slow_a_new_client(town: Place) -> None:
    crowded = town.hall()
    with connections(crowded, 10) as first:
        for sock in first:
            sock.sendall(STATUS)
            assert read_answer(sock).status == 200
        before = memory(crowded)
        with connections(crowded, 1000) as held:
            for sock in held:
                sock.sendall(STATUS)
            assert [read_answer(sock).status for sock in held] == [200] * 1000
            each = (memory(crowded) - before) / 1000
            assert each < 16384, f'{each:.0f} bytes a connection'
            times = sorted(timed(crowded.get, '/v1/status')[1] for _ in range(20))
            assert median(times) < 0.5
            began = crowded.cpu_secs()
            quiet = select.poll()  # select.select accepts no descriptor above 1023
            for sock in held:
                quiet.register(sock, select.POLLIN)
            assert quiet.poll(1000) == []
            assert crowded.cpu_secs() - began < 0.3


def test_a_burst_of_connections_over_the_limit_gets_a_503_each(town: Place) -> None:
    small = town.hall(TINYTOWN_TOWNHALL_LIMITS_CONNECTIONS='20')
    with connections(small, 30) as socks:
        for sock in socks:
            sock.sendall(GET)
        found = [read_answer(sock) for sock in socks]
        assert Counter(answer.status for answer in found) == {200: 20, 503: 10}
        assert all(answer.headers['retry-after'] == '1' for answer in found if answer.status == 503)


FEW_FILES = 'import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n'


def test_a_server_that_may_open_few_files_does_not_spin_and_serves_all_clients_in_turn(
    town: Place, tmp_path: Path
) -> None:
    assert town.do('agent.list')['agents'] == []  # starts Redis before the limit applies
    (tmp_path / 'sitecustomize.py').write_text(FEW_FILES)
    poor = town.hall(PYTHONPATH=f'{tmp_path}:{REPOSITORY}')
    with connections(poor, 120) as socks:
        for sock in socks:
            sock.sendall(STATUS)
        waiting, served = set(socks), list[socket.socket]()
        began = poor.cpu_secs()
        while ready := select.select(list(waiting), [], [], 1.0 if served else PATIENCE)[0]:
            for sock in ready:
                assert read_answer(sock).status == 200
                waiting.remove(sock)
                served.append(sock)
            began = poor.cpu_secs()
        assert poor.cpu_secs() - began < 0.3, 'it spins'
        assert len(waiting) > 60, 'it was never out of files'
        served[0].sendall(STATUS)
        assert read_answer(served[0]).status == 200  # an accepted connection is served
        while waiting:
            for sock in served:
                sock.close()
            served = select.select(list(waiting), [], [], PATIENCE)[0]
            assert served, 'nobody is let in where others have left'
            for sock in served:
                assert read_answer(sock).status == 200
                waiting.remove(sock)
    assert poor.get('/v1/status').status == 200


# --------------------------------------------------------------------------------------------------------- shutdown


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_shutdown_under_load_answers_every_accepted_request_and_accepts_no_other(
    place: Place, number: signal.Signals
) -> None:
    ending = place.hall()
    load = Load(ending, 32)
    load.await_flow(500)
    ending.process.send_signal(number)
    assert ending.process.wait(PATIENCE) == 0
    load.stop()
    assert load.broken == []
    assert set(load.statuses.values()) <= {201, 0}
    assert sorted(texts(place)) == sorted(load.acknowledged)


# --------------------------------------------------------------------------------------------------- a stalled Redis


def test_a_stalled_redis_costs_64_clients_one_timeout_together_and_does_not_delay_health(
    place: Place, hall: Hall
) -> None:
    assert hall.get('/v1/status').status == 200
    pid = redis_pid(place)
    with connections(hall, 64) as socks:
        os.kill(pid, signal.SIGSTOP)
        try:
            for i, sock in enumerate(socks):
                sock.sendall(add(f'perhaps {i}') if i % 2 else STATUS)
            began, healthy = time.monotonic(), []
            while not select.select(socks, [], [], 0.02)[0]:
                answer, took = timed(hall.get, '/health')
                assert answer.status == 200
                healthy.append(took)
                assert time.monotonic() - began < 6, 'it waits longer than one timeout'
            found = [read_answer(sock) for sock in socks]
            assert time.monotonic() - began < 8
            assert len(healthy) > 3
            assert median(healthy) < 0.2
            assert {(answer.status, answer.json['code']) for answer in found} == {(503, 'redis-unavailable')}
            assert all(int(answer.headers['retry-after']) >= 1 for answer in found)
            assert all('not known' in answer.json['detail'] for answer in found[1::2])
        finally:
            os.kill(pid, signal.SIGCONT)
        began = time.monotonic()
        while hall.get('/v1/status').status != 200:
            assert time.monotonic() - began < 8
        for sock in socks:
            sock.sendall(STATUS)
        assert [read_answer(sock).status for sock in socks] == [200] * 64
