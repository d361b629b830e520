"""The logs of agents: read by range, by lines and as they grow; put aside; without the secrets that a town knows of."""

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


def everything(log: LogReader, most: int, offset: int = 0) -> str:
    """All of a log from an offset, page by page."""
    parts = []
    while True:
        page = log.page(offset, most)
        parts.append(page['text'])
        assert page['next_offset'] > offset or page['next_offset'] == page['size']
        offset = page['next_offset']
        if offset == page['size']:
            return ''.join(parts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / 'a.log'


# ---------------------------------------------------------------------------------------------------------- secrets


def test_secrets_are_hidden_wherever_they_stand() -> None:
    secrets = Secrets([KEY, 'short', f'{KEY}-longer', 'xyzwabcd', 'abcdefgh', ' padded!!\n', ''])
    assert secrets.hide(f'a {KEY}b'.encode()) == b'a [redacted]b'
    assert secrets.hide(f'{KEY}{KEY}'.encode()) == REDACTED
    assert secrets.hide(f'{KEY}-longer.'.encode()) == b'[redacted].'
    assert secrets.hide(b'-xyzwabcdefgh-') == b'-[redacted]-'  # one ends where the other has begun
    assert secrets.hide(b'short padded!!') == b'short [redacted]'
    assert secrets.hide(KEY[:-1].encode()) == KEY[:-1].encode()


@pytest.mark.parametrize('seed', range(30))
def test_a_secret_is_hidden_however_it_is_cut_into_pieces(seed: int) -> None:
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


def test_what_can_be_no_secret_is_not_held_back() -> None:
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
        agent=AgentSettings(pass_env=['MY_TOKEN', 'JAVA_HOME']),
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
    """A town whose CLI prints the secrets that it is given."""
    monkeypatch.setenv('ANTHROPIC_API_KEY', KEY)
    monkeypatch.setenv('MY_TOKEN', 'my-own-token')
    monkeypatch.setenv('TINY', '1234567')
    made = make_town(
        directory,
        default_cli='leaky',
        agent={'pass_env': ['MY_TOKEN', 'TINY', 'FAIL']},
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
    assert 'err [redacted] 1234567\n' in log  # a short one is left: it would be found in ordinary words
    leaky.do('agent.kill', agent='a')  # from here on nobody writes
    stored = b''.join(path.read_bytes() for path in leaky.root.rglob('*') if path.is_file() and path.suffix != '.token')
    assert KEY.encode() not in stored
    assert b'my-own-token' not in stored
    (leaky.root / '.tt' / 'logs' / 'a.log').write_text(f'from before: {KEY}\n')
    assert leaky.do('agent.logs', agent='a')['text'] == 'from before: [redacted]\n'


def test_no_page_shows_a_part_of_a_secret_that_lies_on_its_edge(file: Path) -> None:
    file.write_text(f'one {KEY} two {KEY}{KEY}\n')
    size = file.stat().st_size
    log = reader(file, KEY)
    for most in range(1, size + 1):
        text = everything(log, most)
        assert re.sub(r'(\[redacted\])+', '*', text) == 'one * two *\n'
    for start in range(size):
        for piece in (KEY[i : i + 3] for i in range(len(KEY) - 2)):
            assert piece not in log.page(start, 10)['text']


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize('most', [1, 2, 3, 4, 5, 7, 64])
def test_pages_of_any_size_give_the_text_whole(file: Path, most: int) -> None:
    said = 'Zwölf €uro, 日本, 🐟🐟\n' * 3
    file.write_text(said)
    text = everything(reader(file), most)
    assert text == said if most >= 4 else '\n' in text  # less than a character can't be shown


def test_bytes_that_are_no_text_are_replaced(file: Path) -> None:
    file.write_bytes(b'a\xff\xc3\x28b\xe2\x82')
    for most in (1, 3, 100):
        text = everything(reader(file), most)
        assert (text[0], text.replace('\ufffd', '')) == ('a', 'a(b')


@pytest.mark.parametrize('text', ['', 'one', 'one\n', 'one\ntwo', 'one\ntwo\n', '\n\n\n', 'é\n' * 200])
@pytest.mark.parametrize('lines', [1, 2, 3, 150])
def test_the_last_lines_are_those_that_tail_gives(file: Path, text: str, lines: int) -> None:
    file.write_text(text)
    page = reader(file).tail(lines)
    assert page['text'] == ''.join(text.splitlines(keepends=True)[-lines:])
    assert page['next_offset'] == page['size'] == file.stat().st_size
    assert page['offset'] == file.stat().st_size - len(page['text'].encode())


def test_the_last_lines_begin_with_a_whole_one_however_many_bytes_are_taken(file: Path) -> None:
    file.write_text(''.join(f'line {i}\n' for i in range(1000)))
    page = reader(file).tail(1000, 25)
    assert page['text'] == 'line 998\nline 999\n'


def test_a_log_that_is_not_there_is_empty(file: Path) -> None:
    assert reader(file).page(0) == reader(file).tail(5) == {
        'agent': 'a', 'offset': 0, 'next_offset': 0, 'size': 0, 'text': '',
    }  # fmt: skip


def test_offsets_go_on_over_files_that_are_put_aside(file: Path) -> None:
    log = RunLog(file, 100, NOTHING)
    said = [f'this is line {i:03}' for i in range(40)]  # 17 bytes each with its end
    for i, line in enumerate(said):
        assert log.offset == i * 17
        log.line(line)
    found = reader(file)
    kept = 5 + 40 % 5  # five to a file, and the one before
    page = found.page(0, MAX_PAGE_BYTES)
    assert page['gap'] is True
    assert page['text'].splitlines() == said[page['offset'] // 17 :]
    assert (page['offset'] % 17, len(page['text'].splitlines()) >= kept) == (0, True)
    assert found.page(37 * 17, 17)['text'] == 'this is line 037\n'
    assert found.tail(8)['text'].splitlines() == said[-8:]
    again = RunLog(file, 100, NOTHING)  # as another process of the agent has it
    assert again.offset == 40 * 17
    again.line('more')
    assert everything(found, 5, 39 * 17) == 'this is line 039\nmore\n'


@pytest.mark.parametrize('left', ['nothing', 'only the old', 'only the new', 'no record'])
def test_a_log_goes_on_whatever_was_deleted_of_it(file: Path, left: str) -> None:
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


def test_a_log_is_read_while_it_is_put_aside_over_and_over(file: Path) -> None:
    log = RunLog(file, 2000, NOTHING)
    over = threading.Event()

    def write() -> None:
        for i in range(4000):
            log.line(f'{i:07}')
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    found, offset, told = reader(file), 0, list[str]()
    while True:
        ended = over.is_set()
        page = found.page(offset)
        assert 'truncated' not in page
        if 'gap' in page:
            assert page['offset'] > offset
        assert page['next_offset'] % 8 == 0
        told += page['text'].split()
        offset = page['next_offset']
        if ended and offset == page['size']:
            break
    writer.join()
    numbers = [int(each) for each in told]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 3999
    assert offset == 32000


def test_a_log_that_was_emptied_begins_anew(file: Path) -> None:
    file.write_text('much was said here\n')
    offset = reader(file).page(0)['next_offset']
    file.write_text('new\n')
    page = reader(file).page(offset)
    assert (page['truncated'], page['offset'], page['text']) == (True, 0, 'new\n')


# ------------------------------------------------------------------------------------------------------ the operation


def write_log(place: Place, agent: str, text: str) -> Path:
    file = place.root / '.tt' / 'logs' / f'{agent}.log'
    for beside in ('.1', '.at'):
        file.with_name(file.name + beside).unlink(missing_ok=True)
    file.write_text(text)
    return file


def test_a_log_is_there_by_any_name_of_its_agent_and_when_that_is_stopped(ground: Place) -> None:
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
def test_who_is_no_agent_has_no_log(ground: Place, ref: str) -> None:
    write_log(ground, 'nobody', 'of one that was removed\n')
    with pytest.raises(NotFound):
        ground.do('agent.logs', agent=ref)


def test_the_log_of_an_agent_on_another_machine_is_asked_for_there(ground: Place) -> None:
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
def test_arguments_that_make_no_sense_are_refused(ground: Place, wrong: dict[str, Any]) -> None:
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


def test_a_log_is_followed_as_it_grows_is_put_aside_and_is_emptied(ground: Place, hall: Hall, listen: Listen) -> None:
    file = write_log(ground, 'a', f'before {KEY}\n')
    log = RunLog(file, 60, NOTHING)
    listener = listen(hall, FOLLOW)
    first = listener.event()
    assert (first.type, first.id, first.data['text']) == ('log', '25', 'before [redacted]\n')
    assert (first.data['offset'], first.data['next_offset']) == (0, 25)
    said = ''
    for i in range(9):
        log.line(f'line {i}')  # the third and the eleventh put the file aside
        while f'line {i}\n' not in said:
            heard = listener.event()
            assert heard.type == 'log'
            assert heard.data['next_offset'] == int(heard.id)
            said += heard.data['text']
    assert said == ''.join(f'line {i}\n' for i in range(9))
    resumed = listen(hall, '/v1/agents/a/logs?tail=1', last=str(25 + 3 * 7)).event()
    assert resumed.data['text'] == ''.join(f'line {i}\n' for i in range(3, 9))
    os.truncate(file, 0)
    cut = listener.event()
    assert (cut.type, cut.id) == ('truncated', '')
    assert listener.event().data['text'] == ''
    log.line('anew')
    assert listener.event().data['text'] == 'anew\n'


def test_who_comes_back_after_its_part_of_the_log_is_gone_is_told(ground: Place, hall: Hall, listen: Listen) -> None:
    file = write_log(ground, 'a', '')
    log = RunLog(file, 60, NOTHING)
    for i in range(30):
        log.line(f'line {i}')
    listener = listen(hall, FOLLOW, last='7')
    gap, part = listener.event(), listener.event()
    assert (gap.type, gap.data['offset']) == ('gap', part.data['offset'])
    assert part.data['text'].endswith('line 29\n')


def test_a_long_log_is_sent_as_it_is_taken_and_whole(ground: Place, hall: Hall, listen: Listen) -> None:
    said = ''.join(f'{i:07}\n' for i in range(400_000))
    write_log(ground, 'a', said)
    fast, slow = listen(hall, FOLLOW), listen(hall, FOLLOW)
    for listener in (fast, slow):
        parts = list[str]()
        while sum(map(len, parts)) < len(said):
            try:
                parts.append(listener.event().data['text'])
            except ConnectionError:  # it was cut off while it took nothing
                listener = listen(hall, FOLLOW, last=listener.last)
        assert ''.join(parts) == said


def test_a_follower_of_an_unknown_agent_is_refused(ground: Place, hall: Hall, listen: Listen) -> None:
    write_log(ground, 'a', '')
    assert listen(hall, '/v1/agents/nobody/logs').status == 404
    assert hall.get('/v1/agents/a/logs', Accept='text/event-stream', Last_Event_ID='x').status == 422
    assert hall.get('/v1/agents/a/logs?offset=x', Accept='text/event-stream').status == 422
    with hall.connect() as sock:
        sock.sendall(b'HEAD /v1/agents/a/logs HTTP/1.0\r\nAccept: text/event-stream\r\n' + HOST + b'\r\n')
        assert b'text/event-stream' in sock.recv(65536)
    await_streams(hall, 0)


def test_followers_that_go_are_forgotten_and_others_served(ground: Place, hall: Hall, listen: Listen) -> None:
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


def test_the_history_of_a_task_tells_what_each_attempt_said(directory: Path) -> None:
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
        told = place.do('task.history', task_id=task)
        assert [run['outcome'] for run in told['attempts']] == ['failed', 'completed']
        for run in told['attempts']:
            length = run['log_to'] - run['log_from']
            said = place.do('agent.logs', agent='a', offset=run['log_from'], limit=length)['text']
            assert f'attempt {run["attempt"]} of {task}\n' in said
            assert said.count('attempt 1 of') + said.count('attempt 2 of') == 1
            assert said.splitlines()[-1].endswith(f'task {task}: {run["outcome"]}')
            assert 0 <= run['secs'] < 20
        assert all('secs' in change for change in told['history'][1:])
        shown = place.tt('task', 'why', task).stdout
        [command, _] = re.findall(r'tt (logs a --offset \d+ --limit \d+)', shown)
        assert f'attempt 1 of {task}' in place.tt(*command.split()).stdout
    finally:
        place.close()


def test_an_attempt_whose_worker_is_killed_has_a_log_without_an_end(ground: Place) -> None:
    agent = enlist(ground, 'a')
    task = ground.do('task.assign', agent='a', task='x')['task_id']
    ground.store.call(ground.store.pickup(agent.id, agent.instance, 10, 3, 120))
    [run] = ground.do('task.history', task_id=task)['attempts']
    assert (run['outcome'], run['log_from'], run['log_to'], run['ended_at']) == ('running', 120, None, None)
    ground.store.call(ground.store.pickup(agent.id, agent.instance, 10, 3, 200))  # the reply was lost, say
    agent.depart()
    [run] = ground.do('task.history', task_id=task)['attempts']
    assert (run['outcome'], run['log_from'], run['log_to']) == ('requeued', 120, None)


def test_the_end_of_a_run_may_be_told_twice_and_of_a_task_that_is_gone(ground: Place) -> None:
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
    found = {'type': f'task.{kind}', 'at': f'2026-11-21T10:00:{seconds:06.3f}Z', 'task_id': 't', **more}
    result: Change = json.loads(json.dumps(found))
    return result


def test_attempts_are_read_out_of_a_history() -> None:
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
    found = runs(history, {1: '10-20', 3: '30'})
    assert [(run['attempt'], run['agent_name'], run['outcome'], run['secs']) for run in found] == [
        (1, 'a', 'requeued', 2.25),
        (2, 'b', 'cancelled', 4),
        (3, 'b', 'running', None),
    ]
    assert [(run['log_from'], run['log_to']) for run in found] == [(10, 20), (None, None), (30, None)]
