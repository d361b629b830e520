"""The logs of agents: redaction of secrets, reading by offset and by lines, rotation, and following a growing log."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinytown.core.agent_logs import MAX_PAGE_BYTES, LogReader
from tinytown.core.task_history import Change, runs, with_durations
from tinytown.errors import Conflict, Invalid, NotFound
from tinytown.host.town_secrets import known_secrets
from tinytown.redaction import REDACTED, Redactor, Secrets
from tinytown.settings import AgentSettings, Config, RedisSettings
from tinytown.worker.cli_run import RunLog

from ..ground import enlist, redis
from ..raw import HOST
from ..streams import Listen, await_streams
from ..support import Hall, Place, make_town, shell_cli

KEY = 'sk-ant-0123456789'
NOTHING = Secrets()


def reader(file: Path, *secrets: str) -> LogReader:
    return LogReader('a', file, Secrets(secrets))


def everything(log: LogReader, max_bytes: int, offset: int = 0) -> str:
    """The text of a log from an offset to its end, read page by page."""
    parts = []
    while True:
        page = log.page(offset, max_bytes)
        parts.append(page['text'])
        assert page['next_offset'] > offset or page['next_offset'] == page['size']
        offset = page['next_offset']
        if offset == page['size']:
            return ''.join(parts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / 'a.log'


# ---------------------------------------------------------------------------------------------------------- secrets


def test_secrets_are_hidden_at_any_position() -> None:
    secrets = Secrets([KEY, 'short', f'{KEY}-longer', 'xyzwabcd', 'abcdefgh', ' padded!!\n', ''])
    assert secrets.hide(f'a {KEY}b'.encode()) == b'a [redacted]b'
    assert secrets.hide(f'{KEY}{KEY}'.encode()) == REDACTED
    assert secrets.hide(f'{KEY}-longer.'.encode()) == b'[redacted].'
    assert secrets.hide(b'-xyzwabcdefgh-') == b'-[redacted]-'  # the two overlap
    assert secrets.hide(b'short padded!!') == b'short [redacted]'
    assert secrets.hide(KEY[:-1].encode()) == KEY[:-1].encode()


@pytest.mark.parametrize('seed', range(30))
def test_a_secret_is_hidden_even_if_it_arrives_in_pieces(seed: int) -> None:
    chance = random.Random(seed)
    values = [''.join(chance.choices('ab', k=chance.randint(8, 12))) for _ in range(3)]
    data = ''.join(chance.choice([*values, 'a', 'b', 'ab', '\n', '-']) for _ in range(60)).encode()
    redactor, out = Redactor(Secrets(values)), b''
    at = 0
    while at < len(data):
        size = chance.randint(1, 9)
        out += redactor.feed(data[at : at + size])
        at += size
    out += redactor.finish()
    assert not any(value.encode() in out for value in values)
    assert collapsed(out) == collapsed(Secrets(values).hide(data))


def collapsed(data: bytes) -> bytes:
    return re.sub(rb'(\[redacted\])+', REDACTED, data)


def test_text_that_cannot_be_part_of_a_secret_is_not_held_back() -> None:
    redactor = Redactor(Secrets([KEY]))
    assert redactor.feed(b'working on sk-') == b'working on '
    assert redactor.feed(b'etches\n') == b'sk-etches\n'
    assert redactor.finish() == b''


def test_a_town_knows_the_secrets_of_its_workers_its_redis_and_its_agents(tmp_path: Path) -> None:
    (tmp_path / '.tt' / 'agents').mkdir(parents=True)
    (tmp_path / '.tt' / 'agents' / 'x.token').write_text('tta_token\n')
    (tmp_path / '.tt' / 'token-key').write_text('0123456789abcdef')
    config = Config(
        name='t',
        agent=AgentSettings(secret_env=['MY_TOKEN', 'JAVA_HOME']),
        redis=RedisSettings(url='redis://user:pass%2F[word@host/0?password=in-the-query'),
    )
    environ = {
        'ANTHROPIC_API_KEY': KEY,
        'MY_TOKEN': 'my-own-token',
        'JAVA_HOME': '/usr/lib/jvm/java-17',
        'HTTPS_PROXY': 'http://me:proxy-pass@proxy:3128',
        'HOME': '/srv/somebody',
        'OTHER': 'not-passed-on',
    }
    secrets = known_secrets(tmp_path, config, environ)
    hidden = [
        KEY,
        'my-own-token',
        'pass%2F[word',
        'pass/[word',
        'in-the-query',
        'proxy-pass',
        'tta_token',
        '0123456789abcdef',
    ]
    for value in hidden:
        assert secrets.hide(value.encode()) == REDACTED
    for value in ('/usr/lib/jvm/java-17', '/srv/somebody', 'not-passed-on'):
        assert secrets.hide(value.encode()) == value.encode()


HALVES = """
printf '%s' "start ${ANTHROPIC_API_KEY%??????}"; sleep 0.2
printf '%s\\n' "${ANTHROPIC_API_KEY#???????????} end"
printf '%s\\n' "err $MY_TOKEN $TINY" >&2
[ "$FAIL" ] && exit 1; exit 0
"""


@pytest.fixture
def leaky(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A town whose coding CLI prints the secrets in its environment."""
    monkeypatch.setenv('ANTHROPIC_API_KEY', KEY)
    monkeypatch.setenv('MY_TOKEN', 'my-own-token')
    monkeypatch.setenv('TINY', '1234567')
    made = make_town(
        directory,
        default_cli='leaky',
        agent={'secret_env': ['MY_TOKEN', 'TINY', 'FAIL']},
        agent_clis={'leaky': shell_cli(HALVES)},
    )
    yield made
    made.close()


@pytest.mark.parametrize('fails', [False, True])
def test_a_secret_that_a_cli_prints_is_neither_stored_nor_served(
    leaky: Place, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setenv('FAIL', 'yes' if fails else '')
    leaky.do('agent.spawn', name='a')
    task = leaky.await_end(leaky.do('task.assign', agent='a', task='x')['task_id'])
    assert task['state'] == ('failed' if fails else 'completed')
    assert (task['error'] if fails else task['result']).endswith(
        'err [redacted] 1234567' if fails else 'start [redacted] end'
    )
    log = leaky.log('a')
    assert 'start [redacted] end\n' in log
    assert 'err [redacted] 1234567\n' in log  # a short value is not hidden, because it occurs in ordinary text
    leaky.do('agent.kill', agent='a')  # so that nobody writes any longer
    stored = b''.join(path.read_bytes() for path in leaky.root.rglob('*') if path.is_file() and path.suffix != '.token')
    assert KEY.encode() not in stored
    assert b'my-own-token' not in stored
    (leaky.root / '.tt' / 'logs' / 'a.log').write_text(f'from before: {KEY}\n')
    assert leaky.do('agent.logs', agent='a')['text'] == 'from before: [redacted]\n'


def test_no_page_shows_a_part_of_a_secret_on_its_edge(file: Path) -> None:
    file.write_text(f'one {KEY} two {KEY}{KEY}\n')
    size = file.stat().st_size
    log = reader(file, KEY)
    for max_bytes in range(1, size + 1):
        text = everything(log, max_bytes)
        assert re.sub(r'(\[redacted\])+', '*', text) == 'one * two *\n'
    for start in range(size):
        for piece in (KEY[i : i + 3] for i in range(len(KEY) - 2)):
            assert piece not in log.page(start, 10)['text']


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize('max_bytes', [1, 2, 3, 4, 5, 7, 64])
def test_pages_of_any_size_give_the_complete_text(file: Path, max_bytes: int) -> None:
    content = 'Zwölf €uro, 日本, 🐟🐟\n' * 3
    file.write_text(content)
    text = everything(reader(file), max_bytes)
    assert text == content if max_bytes >= 4 else '\n' in text  # a page smaller than a character can't show it


def test_invalid_utf_8_is_replaced(file: Path) -> None:
    file.write_bytes(b'a\xff\xc3\x28b\xe2\x82')
    for max_bytes in (1, 3, 100):
        text = everything(reader(file), max_bytes)
        assert (text[0], text.replace('\ufffd', '')) == ('a', 'a(b')


@pytest.mark.parametrize('text', ['', 'one', 'one\n', 'one\ntwo', 'one\ntwo\n', '\n\n\n', 'é\n' * 200])
@pytest.mark.parametrize('lines', [1, 2, 3, 150])
def test_tail_gives_the_last_lines(file: Path, text: str, lines: int) -> None:
    file.write_text(text)
    page = reader(file).tail(lines)
    assert page['text'] == ''.join(text.splitlines(keepends=True)[-lines:])
    assert page['next_offset'] == page['size'] == file.stat().st_size
    assert page['offset'] == file.stat().st_size - len(page['text'].encode())


def test_a_tail_of_limited_size_begins_with_a_whole_line(file: Path) -> None:
    file.write_text(''.join(f'line {i}\n' for i in range(1000)))
    page = reader(file).tail(1000, 25)
    assert page['text'] == 'line 998\nline 999\n'


def test_a_missing_log_is_empty(file: Path) -> None:
    assert reader(file).page(0) == reader(file).tail(5) == {
        'agent': 'a', 'offset': 0, 'next_offset': 0, 'size': 0, 'text': '',
    }  # fmt: skip


def test_offsets_go_on_counting_over_rotations(file: Path) -> None:
    log = RunLog(file, 100, NOTHING)
    lines = [f'this is line {i:03}' for i in range(40)]  # 17 bytes each with the newline
    for i, line in enumerate(lines):
        assert log.offset == i * 17
        log.line(line)
    log_reader = reader(file)
    kept = 5 + 40 % 5  # five lines a file, and the rotated file
    page = log_reader.page(0, MAX_PAGE_BYTES)
    assert page['gap'] is True
    assert page['text'].splitlines() == lines[page['offset'] // 17 :]
    assert (page['offset'] % 17, len(page['text'].splitlines()) >= kept) == (0, True)
    assert log_reader.page(37 * 17, 17)['text'] == 'this is line 037\n'
    assert log_reader.tail(8)['text'].splitlines() == lines[-8:]
    reopened = RunLog(file, 100, NOTHING)  # as the agent's next process opens it
    assert reopened.offset == 40 * 17
    reopened.line('more')
    assert everything(log_reader, 5, 39 * 17) == 'this is line 039\nmore\n'


@pytest.mark.parametrize('left', ['nothing', 'only the old', 'only the new', 'no record'])
def test_a_log_goes_on_after_any_of_its_files_was_deleted(file: Path, left: str) -> None:
    log = RunLog(file, 50, NOTHING)
    for i in range(9):
        log.line(f'line {i}')
    for path in (file, file.with_name('a.log.1'), file.with_name('a.log.at')):
        if (
            left == 'nothing' or {'only the old': '.1', 'only the new': '.log', 'no record': ''}[left] != path.suffix
        ) and (left != 'no record' or path.suffix == '.at'):
            path.unlink()
    for i in range(20):
        log.line(f'more {i}')
    assert reader(file).tail(3)['text'] == 'more 17\nmore 18\nmore 19\n'
    assert everything(reader(file), 10, reader(file).tail(1)['offset']) == 'more 19\n'


def test_a_log_is_read_correctly_while_it_is_rotated_again_and_again(file: Path) -> None:
    log = RunLog(file, 2000, NOTHING)
    over = threading.Event()

    def write() -> None:
        for i in range(4000):
            log.line(f'{i:07}')
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    log_reader, offset, received = reader(file), 0, list[str]()
    while True:
        ended = over.is_set()
        page = log_reader.page(offset)
        assert 'truncated' not in page
        if 'gap' in page:
            assert page['offset'] > offset
        assert page['next_offset'] % 8 == 0
        received += page['text'].split()
        offset = page['next_offset']
        if ended and offset == page['size']:
            break
    writer.join()
    numbers = [int(each) for each in received]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 3999
    assert offset == 32000


def test_a_truncated_log_is_read_from_its_start(file: Path) -> None:
    file.write_text('a longer text\n')
    offset = reader(file).page(0)['next_offset']
    file.write_text('new\n')
    page = reader(file).page(offset)
    assert (page['truncated'], page['offset'], page['text']) == (True, 0, 'new\n')


# ------------------------------------------------------------------------------------------------------ the operation


def write_log(place: Place, agent: str, text: str) -> Path:
    file = place.root / '.tt' / 'logs' / f'{agent}.log'
    for suffix in ('.1', '.at'):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    file.write_text(text)
    return file


def test_a_log_is_found_by_name_or_id_even_if_its_agent_is_stopped(ground: Place) -> None:
    agent = enlist(ground, 'Backend')
    write_log(ground, 'Backend', 'one\ntwo\nthree\n')
    agent.depart()
    for ref in ('backend', agent.id, agent.id[:6]):
        assert ground.do('agent.logs', agent=ref, tail=1) == {
            'agent': 'Backend', 'offset': 8, 'next_offset': 14, 'size': 14, 'text': 'three\n',
        }  # fmt: skip
    assert ground.do('agent.logs', agent='backend', offset=4, limit=4)['text'] == 'two\n'
    assert ground.do('agent.logs', agent='backend')['text'] == 'one\ntwo\nthree\n'


def test_a_page_of_a_log_is_bounded(ground: Place) -> None:
    enlist(ground, 'a')
    write_log(ground, 'a', 'x' * 99 + '\n' + 'y\n' * (1 << 20))
    assert len(ground.do('agent.logs', agent='a', offset=0)['text']) == 65536
    assert len(ground.do('agent.logs', agent='a', offset=0, limit=MAX_PAGE_BYTES)['text']) == MAX_PAGE_BYTES
    assert len(ground.do('agent.logs', agent='a')['text']) == 200
    assert len(ground.do('agent.logs', agent='a', tail=10_000)['text']) == 20_000


@pytest.mark.parametrize('ref', ['nobody', 'conductor', '00000000-0000-0000-0000-000000000001'])
def test_the_log_of_an_unknown_agent_is_not_found(ground: Place, ref: str) -> None:
    write_log(ground, 'nobody', 'of one that was removed\n')
    with pytest.raises(NotFound):
        ground.do('agent.logs', agent=ref)


def test_the_log_of_an_agent_on_another_host_is_refused_with_the_name_of_the_host(ground: Place) -> None:
    enlist(ground, 'far').hello()
    with pytest.raises(Conflict, match="is on host 'host'; ask there"):
        ground.do('agent.logs', agent='far')


@pytest.mark.parametrize(
    'wrong',
    [
        {'offset': -1},
        {'offset': 0, 'tail': 1},
        {'limit': MAX_PAGE_BYTES + 1},
        {'limit': 0},
        {'tail': 0},
        {'tail': 10_001},
        {'x': 1},
    ],
)
def test_invalid_arguments_are_refused(ground: Place, wrong: dict[str, Any]) -> None:
    enlist(ground, 'a')
    with pytest.raises(Invalid):
        ground.do('agent.logs', agent='a', **wrong)


# ---------------------------------------------------------------------------------------------------------- following


@pytest.fixture(scope='module')
def open_hall(soil: Place) -> Iterator[Hall]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(soil.root))
        made = soil.hall(ANTHROPIC_API_KEY=KEY, TINYTOWN_TOWNHALL_LIMITS_WRITE_SECS='1')
        yield made
        made.kill()


@pytest.fixture
def hall(ground: Place, open_hall: Hall) -> Hall:
    enlist(ground, 'a')
    return open_hall


FOLLOW = '/v1/agents/a/logs?offset=0'


def test_a_follower_gets_a_log_as_it_grows_is_rotated_and_is_truncated(
    ground: Place, hall: Hall, listen: Listen
) -> None:
    file = write_log(ground, 'a', f'before {KEY}\n')
    log = RunLog(file, 60, NOTHING)
    listener = listen(hall, FOLLOW)
    first = listener.event()
    assert (first.type, first.id, first.data['text']) == ('log', '25', 'before [redacted]\n')
    assert (first.data['offset'], first.data['next_offset']) == (0, 25)
    received = ''
    for i in range(9):
        log.line(f'line {i}')  # the log is rotated meanwhile
        while f'line {i}\n' not in received:
            heard = listener.event()
            assert heard.type == 'log'
            assert heard.data['next_offset'] == int(heard.id)
            received += heard.data['text']
    assert received == ''.join(f'line {i}\n' for i in range(9))
    resumed = listen(hall, '/v1/agents/a/logs?tail=1', last=str(25 + 3 * 7)).event()
    assert resumed.data['text'] == ''.join(f'line {i}\n' for i in range(3, 9))
    os.truncate(file, 0)
    cut = listener.event()
    assert (cut.type, cut.id) == ('truncated', '')
    assert listener.event().data['text'] == ''
    log.line('anew')
    assert listener.event().data['text'] == 'anew\n'


def test_a_follower_that_resumes_after_a_deleted_part_gets_a_gap_event(
    ground: Place, hall: Hall, listen: Listen
) -> None:
    file = write_log(ground, 'a', '')
    log = RunLog(file, 60, NOTHING)
    for i in range(30):
        log.line(f'line {i}')
    listener = listen(hall, FOLLOW, last='7')
    gap, part = listener.event(), listener.event()
    assert (gap.type, gap.data['offset']) == ('gap', part.data['offset'])
    assert part.data['text'].endswith('line 29\n')


def test_a_long_log_reaches_fast_and_slow_followers_completely(ground: Place, hall: Hall, listen: Listen) -> None:
    content = ''.join(f'{i:07}\n' for i in range(400_000))
    write_log(ground, 'a', content)
    fast, slow = listen(hall, FOLLOW), listen(hall, FOLLOW)
    for listener in (fast, slow):
        parts = list[str]()
        while sum(map(len, parts)) < len(content):
            try:
                parts.append(listener.event().data['text'])
            except ConnectionError:  # the server cut it off because it read nothing
                listener = listen(hall, FOLLOW, last=listener.last)
        assert ''.join(parts) == content


def test_a_follower_of_an_unknown_agent_is_refused(ground: Place, hall: Hall, listen: Listen) -> None:
    write_log(ground, 'a', '')
    assert listen(hall, '/v1/agents/nobody/logs').status == 404
    assert hall.get('/v1/agents/a/logs', Accept='text/event-stream', Last_Event_ID='x').status == 422
    assert hall.get('/v1/agents/a/logs?offset=x', Accept='text/event-stream').status == 422
    with hall.connect() as sock:
        sock.sendall(b'HEAD /v1/agents/a/logs HTTP/1.0\r\nAccept: text/event-stream\r\n' + HOST + b'\r\n')
        assert b'text/event-stream' in sock.recv(65536)
    await_streams(hall, 0)


def test_followers_that_disconnect_make_room_for_others(ground: Place, hall: Hall, listen: Listen) -> None:
    file = write_log(ground, 'a', 'begin\n')
    for _ in range(2):
        listeners = [listen(hall, FOLLOW) for _ in range(10)]
        for listener in listeners:
            assert listener.event().data['text'].startswith('begin\n')
        with file.open('a') as out:
            out.write('more\n')
        assert {listener.event().data['text'] for listener in listeners} == {'more\n'}
        for listener in listeners:
            listener.close()
        await_streams(hall, 0)


# ------------------------------------------------------------------------------------------------ a task's history


def test_the_history_of_a_task_gives_the_log_offsets_of_each_attempt(directory: Path) -> None:
    script = 'echo "attempt $TINYTOWN_ATTEMPT of $TINYTOWN_TASK_ID"; [ "$TINYTOWN_ATTEMPT" = 2 ]'
    place = make_town(directory, default_cli='twice', agent_clis={'twice': shell_cli(script)})
    try:
        place.do('agent.spawn', name='a')
        task = place.do('task.assign', agent='a', task='x')['task_id']
        assert place.await_end(task)['state'] == 'failed'
        place.do('task.retry', task_id=task)
        place.do('backlog.claim', task_id=task, agent='a')
        assert place.await_end(task)['state'] == 'completed'
        place.do('agent.close', agent='a')
        place.do('agent.wait', agent='a', timeout=20)
        answer = place.do('task.history', task_id=task)
        assert [run['outcome'] for run in answer['attempts']] == ['failed', 'completed']
        for run in answer['attempts']:
            length = run['log_to'] - run['log_from']
            output = place.do('agent.logs', agent='a', offset=run['log_from'], limit=length)['text']
            assert f'attempt {run["attempt"]} of {task}\n' in output
            assert output.count('attempt 1 of') + output.count('attempt 2 of') == 1
            assert output.splitlines()[-1].endswith(f'task {task}: {run["outcome"]}')
            assert 0 <= run['secs'] < 20
        assert all('secs' in change for change in answer['history'][1:])
        shown = place.tt('task', 'why', task).stdout
        [command, _] = re.findall(r'tt (logs a --offset \d+ --limit \d+)', shown)
        assert f'attempt 1 of {task}' in place.tt(*command.split()).stdout
    finally:
        place.close()


def test_an_attempt_whose_worker_was_killed_has_no_end_offset(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    ground.store.call(ground.store.pickup(agent.id, agent.instance, 10, 3, 120))
    [run] = ground.do('task.history', task_id=task)['attempts']
    assert (run['outcome'], run['log_from'], run['log_to'], run['ended_at']) == ('running', 120, None, None)
    ground.store.call(ground.store.pickup(agent.id, agent.instance, 10, 3, 200))  # as if the first reply was lost
    agent.depart()
    [run] = ground.do('task.history', task_id=task)['attempts']
    assert (run['outcome'], run['log_from'], run['log_to']) == ('requeued', 120, None)


def test_the_end_of_a_run_can_be_reported_twice_and_after_its_task_was_deleted(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    ground.store.call(ground.store.pickup(agent.id, agent.instance, 10, 3, 5))
    agent.finish(task, 1)
    for end in (9, 99):
        ground.store.call(ground.store.round_done(agent.id, agent.instance, (), (task, 1, end)))
    [run] = ground.do('task.history', task_id=task)['attempts']
    assert (run['log_from'], run['log_to']) == (5, 9)
    ground.store.call(ground.store.forget(-1000, 10))
    ground.store.call(ground.store.round_done(agent.id, agent.instance, (), (task, 1, 9)))
    assert redis(ground, 'EXISTS', ground.store.prefix + f'task:{task}'.encode()) == 0


def change(kind: str, seconds: float, **more: Any) -> Change:
    fields = {'type': f'task.{kind}', 'at': f'2026-11-21T10:00:{seconds:06.3f}Z', 'task_id': 't', **more}
    result: Change = json.loads(json.dumps(fields))
    return result


def test_attempts_are_derived_from_a_history() -> None:
    history = [
        change('created', 0),
        change('assigned', 1.5),
        change('started', 2, agent_name='a', attempt=1),
        change('requeued', 4.25, attempt=1),
        change('started', 5, agent_name='b', attempt=2),
        change('cancelled', 9),
        change('retried', 10),
        change('started', 11, agent_name='b', attempt=3),
    ]
    assert [each.get('secs') for each in with_durations(history)] == [None, 1.5, 0.5, 2.25, 0.75, 4, 1, 1]
    attempts = runs(history, {1: '10-20', 3: '30'})
    assert [(run['attempt'], run['agent_name'], run['outcome'], run['secs']) for run in attempts] == [
        (1, 'a', 'requeued', 2.25),
        (2, 'b', 'cancelled', 4),
        (3, 'b', 'running', None),
    ]
    assert [(run['log_from'], run['log_to']) for run in attempts] == [(10, 20), (None, None), (30, None)]
