"""The log: its formats, request ids, levels, and readers that stop reading."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tinytown import log

from .support import PATIENCE, REPOSITORY, Hall, Place, environment, redis_pid

STATE = logging.getLogger('tinytown.state')  # its part is redis
HTTP = logging.getLogger('tinytown.http')


def fail() -> Exception:
    """An exception with a traceback."""
    try:
        raise ZeroDivisionError('of ours')
    except ZeroDivisionError as e:
        return e


# ------------------------------------------------------------------------------------------------------------- formats


def test_a_text_line_stays_one_line_whatever_the_message_contains(capsys: pytest.CaptureFixture[str]) -> None:
    STATE.info('gone\n2026-01-01 townhall: forged\x1b[2J\x85', extra={'request_id': 'unseen'})
    HTTP.error('request r1 failed', exc_info=fail())
    first, second, *trace = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r'\S+Z redis: gone\\n2026-01-01 townhall: forged\\x1b\[2J\\x85', first)
    assert re.fullmatch(r'\S+Z http: request r1 failed', second)
    assert (trace[0], trace[-1]) == ('Traceback (most recent call last):', 'ZeroDivisionError: of ours')


def test_a_json_line_is_one_object_with_the_traceback_in_a_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # pytest's handlers fail on a lone surrogate
    log.configure('json')
    HTTP.error('failed\nx \ud800', exc_info=fail(), extra={'request_id': 'r1', 'status': 500})
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z', line.pop('time'))
    assert line.pop('error').endswith('ZeroDivisionError: of ours\n')
    assert line == {
        'level': 'error', 'part': 'http', 'message': 'failed\nx \ud800', 'request_id': 'r1', 'status': 500
    }  # fmt: skip


def entry(data: bytes) -> dict[str, str]:
    """The fields of a journal entry in the native protocol."""
    found = {}
    while data:
        line, _, data = data.partition(b'\n')
        name, is_short, value = line.partition(b'=')
        if not is_short:
            length = int.from_bytes(data[:8], 'little')
            value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert end == b'\n'
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def journal(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(directory / 'journal'))
        bound.settimeout(PATIENCE)
        yield bound


def test_the_journal_gets_searchable_fields(journal: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure('journal', town='hill', journal=journal.getsockname())
    fields = {'request_id': 'r1', 'principal': 'me', 'path': '/v1', 'ms': 1.5, 'none': ''}
    logging.getLogger('tinytown.worker').warning('two\nlines', extra=fields)
    assert entry(journal.recv(1 << 16)) == {
        'MESSAGE': 'two\nlines', 'PRIORITY': '4', 'SYSLOG_IDENTIFIER': 'townhall', 'TINYTOWN_PART': 'caretaker',
        'TINYTOWN_TOWN': 'hill', 'REQUEST_ID': 'r1', 'TINYTOWN_PRINCIPAL': 'me', 'URL_PATH': '/v1',
        'DURATION_MS': '1.5',
    }  # fmt: skip
    HTTP.error('failed', exc_info=fail())
    assert entry(journal.recv(1 << 16))['ERROR'].endswith('ZeroDivisionError: of ours\n')
    assert capsys.readouterr().err == ''


def test_an_entry_too_large_for_a_datagram_is_sent_as_a_sealed_file(journal: socket.socket) -> None:
    log.configure('journal', journal=journal.getsockname())
    HTTP.info('x' * 3_000_000)
    data, [file], *_ = socket.recv_fds(journal, 1 << 16, 1)
    with open(file, 'rb') as sent:
        assert (data, len(entry(os.pread(file, 1 << 23, 0))['MESSAGE'])) == (b'', 3_000_000)
        with pytest.raises(OSError, match='Operation not permitted'):
            os.pwrite(sent.fileno(), b'y', 0)


def test_without_a_journal_lines_go_to_stderr(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure('journal', journal=str(directory / 'none'))
    STATE.info('connected')
    assert re.fullmatch(r'\S+Z redis: connected\n', capsys.readouterr().err)


def test_a_full_journal_does_not_block(journal: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure('journal', journal=journal.getsockname())
    for i in range(2000):
        STATE.info(f'line {i}')
    assert 'line 1999' in capsys.readouterr().err
    assert entry(journal.recv(1 << 16))['MESSAGE'] == 'line 0'


def test_an_exception_in_a_thread_is_logged_in_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure('json')
    thread = threading.Thread(target=lambda: 1 / 0, name='idle hands')
    thread.start()
    thread.join()
    line = json.loads(capsys.readouterr().err)
    assert (line['message'], line['level']) == ('idle hands failed', 'error')
    assert 'ZeroDivisionError' in line['error']


@pytest.mark.parametrize(
    ('name', 'part'),
    [
        ('tinytown.townhall', 'townhall'), ('tinytown.http', 'http'),
        ('tinytown.state', 'redis'), ('tinytown.host', 'notify'), ('tinytown.auth', 'townhall'),
        ('tinytown.worker', 'caretaker'), ('tinytown.worker.steward', 'steward'), ('tinytown.mcp', 'mcp'),
        ('jwt.api_jwk', 'jwt'),
    ],
)  # fmt: skip
def test_a_line_names_the_part_of_its_logger(name: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(name).warning('here')
    assert re.fullmatch(rf'\S+Z {part}: here\n', capsys.readouterr().err)


@pytest.mark.parametrize('level', get_args(log.Level))
def test_libraries_log_from_warning_on_and_never_below_our_level(
    level: log.Level, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure(level=level)
    for name in ('tinytown.http', 'library'):
        for word in (*get_args(log.Level), 'critical'):
            getattr(logging.getLogger(name), word)(word)
    lines = [line.split(' ', 1)[1] for line in capsys.readouterr().err.splitlines()]
    all_levels = [*get_args(log.Level), 'critical']
    ours, theirs = all_levels[all_levels.index(level) :], all_levels[max(all_levels.index(level), 2) :]
    assert lines == [f'http: {word}' for word in ours] + [f'library: {word}' for word in theirs]


def test_other_levels_of_a_library_are_mapped_to_the_nearest_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure('json')
    logging.getLogger('library').critical('worse', extra={'where': Path('/x')})
    line = json.loads(capsys.readouterr().err)
    assert (line['level'], line['part'], line['message'], line['where']) == ('error', 'library', 'worse', '/x')


def test_a_library_logger_that_does_not_propagate_is_logged_in_the_same_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lonely = logging.getLogger('lonely')
    lonely.propagate = False
    lonely.warning('help')
    assert re.fullmatch(r'\S+Z lonely: help\n', capsys.readouterr().err)


@pytest.mark.parametrize('format', get_args(log.Format))
def test_a_message_with_wrong_arguments_is_reported_in_one_line(
    format: log.Format, journal: socket.socket, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # pytest's handlers would fail the test
    log.configure(format, journal=journal.getsockname())
    logging.getLogger('library').warning('%d pieces', 'many')
    [line] = capsys.readouterr().err.splitlines()
    assert "a line of library can not be formatted: '%d pieces'" in line


def test_an_access_line_goes_to_stderr_if_the_journal_does_not_take_it(
    journal: socket.socket, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure('journal', journal=journal.getsockname())
    log.send('access', 'GET /v1 200', path='/v1', tls='')
    assert entry(journal.recv(1 << 16)) == {
        'MESSAGE': 'GET /v1 200', 'PRIORITY': '6', 'SYSLOG_IDENTIFIER': 'townhall', 'TINYTOWN_PART': 'access',
        'URL_PATH': '/v1',
    }  # fmt: skip
    assert capsys.readouterr().err == ''
    log.configure('journal', journal=str(directory / 'none'))
    log.send('access', 'GET /\x1b 200')
    assert re.fullmatch(r'\S+Z access: GET /\\x1b 200\n', capsys.readouterr().err)


def test_reconfiguring_the_log_does_not_duplicate_lines(
    journal: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    formats: list[log.Format] = ['json', 'journal', 'text', 'journal', 'text']
    for each in formats:
        log.configure(each, journal=journal.getsockname())
    STATE.info('once')
    assert re.fullmatch(r'\S+Z redis: once\n', capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------- slow readers

STALLED = """
import logging, os, resource, signal, sys
from tinytown import log
log.configure()
logger = logging.getLogger('tinytown.state')
LINE = 'x' * 4000
if sys.argv[1] == 'foreign':  # a pipe that only another user can open
    os.fchmod(2, 0)
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
for i in range(400):
    logger.info(f'{i} {LINE}')
print('done', flush=True)
sys.stdin.readline()
log.flush(20)
logger.info('the end')
"""


@pytest.mark.parametrize('whose', ['ours', 'foreign', 'socket'])
def test_a_stopped_reader_does_not_block_and_loses_only_whole_lines(whose: str) -> None:
    """When it reads again, it gets the buffered lines and the number of dropped ones."""
    ours, theirs = socket.socketpair() if whose == 'socket' else (None, None)
    argv = [sys.executable, '-c', STALLED, whose]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, env=environment(), stdin=pipe, stdout=pipe, stderr=theirs.fileno() if theirs else pipe
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b'done\n'
        process.stdin.close()
        if ours and theirs:
            theirs.close()
            with ours, ours.makefile('rb') as reader:
                output = reader.read()
        else:
            assert process.stderr
            output = process.stderr.read()
    lines = output.decode().splitlines()
    matches = [re.fullmatch(r'\S+Z redis: (\d+) x{4000}', line) for line in lines]
    numbers = [int(match[1]) for match in matches if match]
    assert numbers == list(range(len(numbers)))
    assert log.MAX_BUFFERED < len(output) < log.MAX_BUFFERED + 300_000  # the capacity of a pipe or socket
    dropped = [
        re.fullmatch(r'\S+Z townhall: (\d+) lines of the log were dropped: stderr did not take them', x) for x in lines
    ]
    assert [int(match[1]) for match in dropped if match] == [400 - len(numbers)]
    assert lines[-1].endswith('redis: the end')


def test_buffered_lines_are_flushed_at_exit_if_the_reader_continues_in_time() -> None:
    """`logging` flushes its handlers when the interpreter ends."""
    script = f"""
import logging
from tinytown import log
log.configure()
logging.getLogger('tinytown.state').info('x' * {3 * (1 << 18)})
print(flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, '-c', script], env=environment(), stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.readline()  # the pipe is full by now, and most of the line is buffered
        output = process.communicate(timeout=PATIENCE)[1]
    assert output.endswith(b'x' * (3 * (1 << 18)) + b'\n')


def test_a_forked_child_does_not_write_the_buffered_lines_of_its_parent() -> None:
    script = """
import logging, os
from tinytown import log
log.configure()
logger = logging.getLogger('tinytown.state')
for i in range(40):
    logger.info(f'{i} ' + 'x' * 4000)
if child := os.fork():
    print(flush=True)
    os.waitpid(child, 0)
    log.flush(20)
else:
    logger.info('child')
    log.flush(20)
    os._exit(0)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, '-c', script], env=environment(), stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.readline()
        output = process.communicate(timeout=PATIENCE)[1].decode()
    assert sorted(map(int, re.findall(r' (\d+) x{4}', output))) == list(range(40))
    assert output.count('redis: child\n') == 1


def test_lines_buffered_by_a_full_disk_are_written_when_there_is_room(tmp_path: Path) -> None:
    script = """
import logging, resource
from tinytown import log
log.configure()
logger = logging.getLogger('tinytown.state')
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
for i in range(9):
    logger.info(f'line {i}')
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
logger.info('line 9')
"""
    with open(tmp_path / 'log', 'wb') as written:
        subprocess.run([sys.executable, '-c', script], env=environment(), stderr=written, check=True)
    text = (tmp_path / 'log').read_text()
    assert re.findall(r'^\S+Z redis: line (\d)$', text, re.M) == list('0123456789')


def test_a_truncated_log_file_continues_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / 'log'
    with open(file, 'w') as written:  # without O_APPEND, as a shell opens it
        monkeypatch.setattr(sys, 'stderr', written)
        STATE.info('line 1')
        os.truncate(file, 0)
        STATE.info('line 2')
    assert re.fullmatch(r'\S+Z redis: line 2\n', file.read_text())


def test_a_townhall_serves_even_if_nobody_reads_its_log(place: Place) -> None:
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), '--port', '0']
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rsplit(b':', 1)[1])
        with socket.create_connection(('127.0.0.1', port), timeout=PATIENCE) as sock:
            reader = sock.makefile('rb')
            for _ in range(80):
                sock.sendall(b'GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n' % (b'x' * 2000))
                assert reader.readline() == b'HTTP/1.1 404 Not Found\r\n'
                length = 0
                while (line := reader.readline()) != b'\r\n':
                    length = int(line.split()[1]) if line.lower().startswith(b'content-length') else length
                reader.read(length)
        process.terminate()
        assert process.wait(PATIENCE) == 0


# --------------------------------------------------------------------------------------------------------- a townhall


def lines_of(hall: Hall) -> list[dict[str, Any]]:
    """The lines of a townhall's log, which must all be JSON objects."""
    return [json.loads(line) for line in hall.log_file.read_text().splitlines()]


@pytest.mark.parametrize('workers', ['1', '2'])
def test_with_json_every_line_of_a_townhall_is_json(place: Place, workers: str) -> None:
    served = place.hall('--workers', workers, '--verbose', TINYTOWN_TOWNHALL_LOG_FORMAT='json')
    served.get('/v1/town')
    served.get('/nowhere', X_Request_ID='mine')
    (place.root / 'tinytown.toml').write_text('name = 7\n')
    served.process.send_signal(signal.SIGHUP)
    served.said('was not reloaded')
    (place.root / 'tinytown.toml').write_text('name = "test"\n')
    served.process.terminate()
    served.process.wait(PATIENCE)
    lines = lines_of(served)
    assert {'townhall', 'redis', 'access'} <= {line['part'] for line in lines}
    assert all(line.keys() >= {'time', 'level', 'part', 'message'} for line in lines)
    [refused] = [line for line in lines if line['part'] == 'access' and line['status'] == 404]
    assert (refused['request_id'], refused['message']) == ('mine', 'GET /nowhere 404')
    [wrong] = [line for line in lines if 'was not reloaded' in line['message']]
    assert wrong['level'] == 'error'


def test_why_it_can_not_start_is_told_in_json_too(place: Place, hall: Hall) -> None:
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), '--port', str(hall.port)]
    env = environment(TINYTOWN_TOWNHALL_LOG_FORMAT='json')
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    last = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, last['level']) == (2, 'error')
    assert 'in use; choose another' in last['message']
    hall.kill()
    (place.root / 'tinytown.toml').write_text('name = "test"\n[townhall]\nbind = "0.0.0.0"\nlog.format = "json"\n')
    started = place.tt('start', check=False)
    assert (started.returncode, started.stderr.split('.')[0]) == (1, 'tt: townhall')
    assert 'only a loopback address is served' in started.stderr


MCP = {
    'jsonrpc': '2.0', 'id': 1, 'method': 'tools/call',
    'params': {'name': 'agent_kill', 'arguments': {'agent': 'nobody'}},
}  # fmt: skip


@pytest.mark.parametrize(
    ('path', 'body', 'status'), [('/v1/agents/nobody/kill', None, 404), ('/mcp', MCP, 200)], ids=['rest', 'mcp']
)
def test_the_request_id_is_in_the_answer_the_audit_log_and_the_access_log(
    place: Place, path: str, body: Any, status: int
) -> None:
    served = place.hall(TINYTOWN_TOWNHALL_LOG_FORMAT='json')
    sent = {'Accept': 'application/json, text/event-stream'}
    for given in ('a.Request_1', None):
        more = sent | ({'X-Request-ID': given} if given else {})
        answer = served.post(path, body, **more)
        number = answer.headers['x-request-id']
        assert (answer.status, number == given or not given) == (status, True)
        if status >= 400:
            assert answer.json['request_id'] == number
        served.said(re.escape(f'"request_id": "{number}"') + r'.*\n')
        [line] = [line for line in lines_of(served) if line.get('request_id') == number]
        assert (line['part'], line['path'], line['status'], line['principal']) == ('access', path, status, 'local')
        audit = [json.loads(each) for each in (place.root / '.tt' / 'audit.jsonl').read_text().splitlines()]
        phases = [each['phase'] for each in audit if each['request_id'] == number]
        assert phases == ['begin', 'end']


def test_known_secrets_are_redacted_from_the_log(place: Place) -> None:
    served = place.hall(OPENAI_API_KEY='sk-verysecret', TINYTOWN_TOWNHALL_LOG_FORMAT='json')
    served.get('/v1/town/sk-verysecret')
    assert '/v1/town/[redacted]' in served.said('redacted')
    assert 'verysecret' not in served.log_file.read_text()


def test_the_level_filters_lines_and_can_be_changed_at_runtime(place: Place) -> None:
    served = place.hall()

    def is_logged(number: str) -> bool:
        served.get('/v1/town', X_Request_ID=number)
        served.get('/v1/town')  # once this is answered, the line of the first request would be in the log
        return number in served.log_file.read_text()

    assert is_logged('first')
    for level, wanted in (('warning', False), ('debug', True)):
        place.tt('config', 'townhall.log.level', level)
        deadline = time.monotonic() + PATIENCE
        while is_logged(os.urandom(8).hex()) != wanted:
            assert time.monotonic() < deadline, level
    assert served.said('').count('was reloaded') == 1  # its level is below warning


def test_losing_and_regaining_redis_is_logged(place: Place) -> None:
    served = place.hall()
    assert served.get('/v1/status').status == 200  # by now it is connected
    os.kill(redis_pid(place), signal.SIGKILL)
    served.said(r'(?m)^\S+Z redis: ')
    served.said('redis: connected')
