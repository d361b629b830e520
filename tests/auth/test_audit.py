"""The audit: its records, that nothing is changed without it, that it is bounded, and that no line is ever torn."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tinytown import api_key_table, config
from tinytown.auth.api_keys import generate_key
from tinytown.auth.audit import Audit
from tinytown.core.dispatch import AuditSubject
from tinytown.errors import Conflict, Unavailable, UsageError
from tinytown.host import managed_redis
from tinytown.model import ALL_SCOPES, Principal

from ..proxy import Proxy
from ..support import Hall, Place, make_town
from .test_rate_limit import forked

BY = Principal('key:0123abcd', ALL_SCOPES)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def subject(**arguments: Any) -> AuditSubject:
    return AuditSubject('r1', '10.0.0.1', BY, 'task.complete', arguments)


# ---------------------------------------------------------------------------------------------------------- over HTTP


def test_a_change_has_a_begin_and_an_end_line_and_a_read_has_none(place: Place, hall: Hall) -> None:
    assert hall.get('/v1/status').status == 200
    added = hall.post('/v1/backlog', {'description': 'the text of a task', 'tags': ['x']}, X_Request_ID='mine-1')
    task_id = added.json['task_id']
    body = {'attempt': 3, 'result': 'the text of a result'}
    assert hall.post(f'/v1/tasks/{task_id}/complete', body).status == 409
    assert hall.post('/v1/backlog', {'descripton': 'a typo'}).status == 422
    file = place.root / '.tt' / 'audit.jsonl'
    assert file.stat().st_mode & 0o777 == 0o600
    assert 'the text' not in file.read_text()
    first, second, third, fourth = lines(file)
    assert first == {
        'time': first['time'], 'phase': 'begin', 'request_id': 'mine-1', 'address': '127.0.0.1', 'principal': 'local',
        'scopes': sorted(ALL_SCOPES), 'operation': 'backlog.add', 'target': {}, 'attempt': None, 'outcome': None,
    }  # fmt: skip
    assert second == first | {
        'time': second['time'], 'phase': 'end', 'target': {'task_id': task_id}, 'outcome': 'ok'
    }  # fmt: skip
    assert (third['phase'], third['target'], third['attempt']) == ('begin', {'task_id': task_id}, 3)
    assert (fourth['phase'], fourth['outcome']) == ('end', 'stale-attempt')


def test_a_slow_operation_and_an_idempotent_repetition_are_recorded_too(place: Place, hall: Hall) -> None:
    for _ in range(2):
        assert hall.post('/v1/recover', Idempotency_Key='once').status == 200
    assert [(line['phase'], line['outcome']) for line in lines(place.root / '.tt' / 'audit.jsonl')] == [
        ('begin', None), ('end', 'ok'), ('begin', None), ('end', 'ok')
    ]  # fmt: skip


def test_every_refusal_is_one_line(directory: Path) -> None:
    place, made = make_town(directory, townhall__auth={'mode': 'api_key'}), generate_key()
    file = directory / config.FILE
    entry = {'id': made.id, 'hash': made.hash, 'scopes': ['town.read']}
    file.write_text(
        file.read_text() + '\n[townhall.rate_limit]\nrequests_per_minute = 1\n' + api_key_table.written(entry)
    )
    hall = place.hall()
    key = {'X_API_Key': made.key}
    assert hall.post('/v1/agents/backend/kill', {}, **key).status == 403
    assert hall.post('/v1/agents/backend/kill').status == 401
    assert hall.get('/v1/agents/backend', X_API_Key='x').status == 401
    assert [hall.get('/v1/town', **key).status for _ in range(2)] == [200, 429]
    found = lines(directory / '.tt' / 'audit.denied.jsonl')
    assert not lines(directory / '.tt' / 'audit.jsonl')
    place.close()
    who: tuple[str | None, list[str]] = (f'key:{made.id}', ['town.read'])
    nobody: tuple[str | None, list[str]] = (None, [])
    assert [line['phase'] for line in found] == ['denied'] * 4
    assert [
        ((line['principal'], line['scopes']), line['operation'], line['target'], line['outcome']) for line in found
    ] == [
        (who, 'agent.kill', {'agent': 'backend'}, 'insufficient-scope'),
        (nobody, 'agent.kill', {'agent': 'backend'}, 'unauthorized'),
        (nobody, 'agent.get', {'agent': 'backend'}, 'invalid-token'),
        (who, 'town.get', {}, 'too-many-requests'),
    ]


def test_with_a_full_disk_nothing_is_changed_and_readiness_fails(directory: Path) -> None:
    place = make_town(directory, townhall__audit={'path': '/dev/full'})
    hall = place.hall()
    assert hall.get('/ready').status == 200
    answer = hall.post('/v1/backlog', {'description': 'x'})
    assert (answer.status, answer.json['code']) == (503, 'audit-unavailable')
    assert 'No space left on device' in answer.json['detail']
    assert answer.headers['retry-after']
    assert hall.post('/v1/agents', {'name': 'a'}).json['code'] == 'audit-unavailable'
    assert hall.get('/v1/backlog').json['count'] == 0
    ready = hall.get('/ready')
    assert (ready.status, ready.json['status']) == (503, 'not_ready')
    assert 'the audit file /dev/full cannot be written' in ready.json['detail']
    assert [event['type'] for event in place.history()] == []
    place.close()


def test_the_begin_line_of_a_change_is_in_the_file_before_redis_gets_the_change(tmp_path: Path) -> None:
    bed = make_town(tmp_path / 'bed', name='bed')
    proxy = Proxy(tmp_path / 'proxy', managed_redis.socket_path(bed.town.root))
    place = make_town(tmp_path / 'town', redis={'url': f'unix://{tmp_path}/proxy'})
    hall = place.hall()
    early: list[bool] = []

    def judge(_pid: int, name: str) -> None:
        if name == 'backlog_add':
            arrived.append(name)
            begun = (place.root / '.tt' / 'audit.jsonl').read_text().count('"phase":"begin"')
            early.append(begun < len(arrived))

    assert hall.post('/v1/backlog', {'description': 'loads the script into Redis'}).status == 201
    arrived = ['the first']
    proxy.judge = judge
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: add(hall), range(80))) == [201] * 80
    place.close()
    proxy.close()
    bed.close()
    assert early == [False] * 80


def add(hall: Hall) -> int:
    return hall.post('/v1/backlog', {'description': 'x'}).status


def test_changes_begun_in_one_turn_are_refused_together_and_reads_continue(place: Place, hall: Hall) -> None:
    assert add(hall) == 201
    assert hall.get('/health').status == 200  # after this answer the end line of the change is in the file
    file = place.root / '.tt' / 'audit.jsonl'
    file.rename(place.root / 'before')
    file.symlink_to('/dev/full')
    one = b'POST /v1/backlog HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 19\r\n'
    several = (one + b'\r\n{"description":"x"}') * 3 + one + b'Connection: close\r\n\r\n{"description":"x"}'
    with ThreadPoolExecutor(8) as pool:
        answers = b''.join(pool.map(hall.talk, [several] * 8))
    assert answers.count(b'HTTP/1.1 503 ') == answers.count(b'"code": "audit-unavailable"') == 32
    assert answers.count(b'so nothing was changed') == 32
    assert hall.get('/v1/backlog').json['count'] == 1
    assert [event['type'] for event in place.history()] == ['task.created']
    assert hall.get('/ready').status == 503
    file.unlink()
    assert add(hall) == 201
    assert hall.get('/ready').status == 200
    gap, *rest = lines(file)
    assert gap['phase'] == 'gap'
    assert gap['lost'] > 32, 'the begin lines of all changes, and the end lines of those that were refused last'
    assert [line['phase'] for line in rest] == ['begin', 'end']


# ----------------------------------------------------------------------------------------------------------- the file


def test_gathered_lines_are_written_in_order_and_those_of_other_threads_at_once(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 1 << 20)
    with audit.gathering():
        for i in range(100):
            audit.end(audit.begin(subject(task_id=f't{i}')), 'ok')
        assert not file.read_text()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(audit.begin, subject(task_id='other')).result()
        assert [line['target'] for line in lines(file)] == [{'task_id': 'other'}]
        assert audit.flush() is None
        assert audit.flush() is None
        phases = [(line['target']['task_id'], line['phase']) for line in lines(file)[1:]]
        assert phases == [(f't{i}', phase) for i in range(100) for phase in ('begin', 'end')]
        audit.begin(subject(task_id='last'))
    assert lines(file)[-1]['target'] == {'task_id': 'last'}
    audit.begin(subject(task_id='after'))
    assert lines(file)[-1]['target'] == {'task_id': 'after'}


def test_changes_fail_while_their_lines_can_not_be_written(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 1 << 20)
    with audit.gathering():
        record = audit.begin(subject())
        assert audit.flush() is None
        file.unlink()
        file.symlink_to('/dev/full')
        audit.end(record, 'ok')
        assert audit.flush() is None, 'no change waits that could still be refused'
        assert not audit.is_writable()
        with pytest.raises(Unavailable, match='so nothing was changed'):
            audit.begin(subject())
        file.unlink()
        audit.begin(subject())
        assert [line.get('lost') for line in lines(file)] == [2, None]
        file.unlink()
        file.symlink_to('/dev/full')
        for _ in range(100):
            audit.begin(subject())
        refused = audit.flush()
        assert refused
        assert (refused.status, refused.code) == (503, 'audit-unavailable')
        file.unlink()
        assert audit.is_writable()
        assert [line['lost'] for line in lines(file)] == [100]


def test_an_end_line_that_can_not_be_written_is_counted_as_lost_without_an_error(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 1 << 20)
    record = audit.begin(subject(task_id='t1'))
    file.rename(directory / 'away')
    file.symlink_to('/dev/full')
    audit.end(record, 'ok')
    audit.end(record, 'ok')
    audit.denied(subject(), Conflict('no'))
    assert not audit.is_writable()
    with pytest.raises(Unavailable, match='the audit cannot be written'):
        audit.begin(subject())
    file.unlink()
    assert audit.is_writable()
    [gap] = lines(file)
    assert (gap['phase'], gap['lost']) == ('gap', 3)
    audit.begin(subject())
    assert len(lines(file)) == 2


def test_half_a_line_is_removed(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 1 << 20)
    audit.begin(subject())
    size = file.stat().st_size

    def write_beyond() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
        with pytest.raises(Unavailable):
            audit.begin(subject())

    forked(1, write_beyond)
    assert file.stat().st_size == size
    audit.begin(subject())
    assert len(lines(file)) == 2


def test_a_full_file_is_rotated(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 2000)
    for i in range(100):
        audit.begin(subject(task_id=f't{i}'))
    found = lines(directory / 'audit.jsonl.1') + lines(file)
    kept = [line for line in found if line['phase'] == 'begin']
    assert [line['target']['task_id'] for line in kept] == [f't{i}' for i in range(100 - len(kept), 100)]
    assert all(path.stat().st_size <= 2000 for path in directory.iterdir())
    assert {path.name for path in directory.iterdir()} == {'audit.jsonl', 'audit.jsonl.1', 'audit.denied.jsonl'}


def test_the_newest_files_are_kept_and_a_new_one_says_how_much_was_discarded(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 2000, keep=3)
    written, reports, before = 0, 0, 0
    while reports < 2:
        audit.begin(subject(task_id=f't{written}'))
        written += 1
        first = lines(file)[0]
        if first['phase'] == 'discarded' and len(lines(file)) == 2:
            reports += 1
            assert first['bytes'] == before
        before = (directory / 'audit.jsonl.3').stat().st_size if (directory / 'audit.jsonl.3').exists() else 0
    aside = [directory / f'audit.jsonl.{i}' for i in (3, 2, 1)]
    kept = [line for path in [*aside, file] for line in lines(path) if line['phase'] == 'begin']
    assert [line['target']['task_id'] for line in kept] == [f't{i}' for i in range(written - len(kept), written)]
    assert not (directory / 'audit.jsonl.4').exists()
    aside[1].unlink()
    while lines(file)[0]['phase'] == 'discarded':
        audit.begin(subject())
    assert all(path.exists() for path in aside), 'a free number is used, and nothing is discarded'


def test_refusals_fill_their_own_files_and_displace_no_change(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 2000)
    audit.begin(subject(task_id='t1'))
    before = file.read_text()
    for _ in range(100):
        audit.denied(subject(task_id='t2'), Conflict('no'))
    assert file.read_text() == before
    denied = directory / 'audit.denied.jsonl'
    assert {path.name for path in directory.iterdir()} == {file.name, denied.name, f'{denied.name}.1'}
    assert {line['phase'] for line in lines(denied)} == {'discarded', 'denied'}
    assert all(path.stat().st_size <= 2000 for path in directory.iterdir())


def test_a_pipe_receives_changes_and_refusals(directory: Path) -> None:
    pipe = directory / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    audit = Audit(pipe, 1 << 20)
    audit.begin(subject())
    audit.denied(subject(), Conflict('no'))
    found = [json.loads(line)['phase'] for line in os.read(reader, 65536).splitlines()]
    os.close(reader)
    assert found == ['begin', 'denied']
    assert [path.name for path in directory.iterdir()] == ['pipe']


def test_processes_that_share_a_file_lose_and_tear_nothing_when_it_is_rotated(directory: Path) -> None:
    file, each, count = directory / 'audit.jsonl', 400, 4
    Audit(file, 1 << 20).begin(AuditSubject('10000-100', '', BY, 'x', {}))
    most = each * count * file.stat().st_size * 2 // 3  # so that two files are enough for all lines
    file.unlink()
    audit = Audit(file, most)
    ours, theirs = os.pipe()

    def work() -> None:
        os.read(ours, 1)
        for i in range(each):
            audit.begin(AuditSubject(f'{os.getpid()}-{i}', '', BY, 'x', {}))

    os.write(theirs, b'.' * count)
    forked(count, work)
    os.close(ours)
    os.close(theirs)
    old = directory / 'audit.jsonl.1'
    assert old.exists()
    found = [line['request_id'] for path in (old, file) for line in lines(path)]
    assert len(found) == len(set(found)) == each * count
    for pid in {name.partition('-')[0] for name in found}:
        mine = [int(name.partition('-')[2]) for name in found if name.startswith(f'{pid}-')]
        assert mine == sorted(mine)


def test_nobody_writes_while_a_process_may_be_rotating_the_file(directory: Path) -> None:
    audit = Audit(directory / 'audit.jsonl', 1 << 20)
    go, going = os.pipe()
    done, doing = os.pipe()
    child = os.fork()
    if not child:
        os.read(go, 1)
        audit.begin(subject())
        os.write(doing, b'.')
        os._exit(0)
    with audit._changes._alone():
        os.write(going, b'.')
        assert select.select([done], [], [], 0.2)[0] == []
    assert os.read(done, 1) == b'.'
    assert os.waitpid(child, 0)[1] == 0
    for each in (go, going, done, doing):
        os.close(each)


def test_a_file_that_someone_moved_away_is_created_again(directory: Path) -> None:
    file = directory / 'audit.jsonl'
    audit = Audit(file, 1 << 20)
    audit.begin(subject(task_id='t1'))
    file.rename(directory / 'moved')
    audit.begin(subject(task_id='t2'))
    assert [line['target'] for line in lines(file)] == [{'task_id': 't2'}]
    assert len(lines(directory / 'moved')) == 1


def test_a_target_is_a_name_or_an_id_and_never_a_key(directory: Path) -> None:
    file, key = directory / 'audit.jsonl', generate_key().key
    audit = Audit(file, 1 << 20)
    audit.begin(subject(agent=key, name='a b', to=['x'], task_id='t1', id='x' * 64, task='text', **{'from': 'a-b_c'}))
    audit.end(audit.begin(subject()), 'ok', {'task_id': 't2', 'agent_name': key, 'state': 'x'})
    assert key not in file.read_text()
    assert [line['target'] for line in lines(file)] == [{'from': 'a-b_c', 'task_id': 't1'}, {}, {'task_id': 't2'}]


@pytest.mark.parametrize('path', ['no/such/directory/audit', '.'])
def test_an_error_names_an_audit_that_can_not_be_opened(directory: Path, path: str) -> None:
    with pytest.raises(
        UsageError, match=r'^townhall.audit.path: .*; give a path .* without an audit no change is allowed'
    ):
        Audit(directory / path, 65536)
