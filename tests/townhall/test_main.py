"""The `townhall` command: its modes and flags, how it finds its town, what it refuses, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tinytown import __version__

from ..support import PATIENCE, REPOSITORY, Hall, Place, environment, make_town, redis_pid

SCRIPT = REPOSITORY / 'townhall.py'


def run(*words: str, cwd: Path, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the script without PYTHONPATH, so that it must find the package itself."""
    env = environment(**more)
    del env['PYTHONPATH']
    argv = [sys.executable, str(script), *words]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)


@contextmanager
def serving(
    *words: str, cwd: Path, script: Path = SCRIPT, **streams: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs a townhall during the block, and ends it by SIGTERM. Gives the process and the URL from its log."""
    argv = [sys.executable, str(script), *words]
    env = environment()
    del env['PYTHONPATH']
    with subprocess.Popen(
        argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **streams
    ) as process:
        assert process.stderr is not None
        log = ''
        while not (match := re.search(r'is open on (\S+)\n', log)):
            line = process.stderr.readline()
            assert line, log
            log += line
        try:
            yield process, match[1]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def get(url: str, body: Any = None) -> Any:
    """The JSON answer to a GET, or to a POST if there is a `body`."""
    base, _, path = url.removeprefix('http://').partition('/')
    connection = http.client.HTTPConnection(base, timeout=PATIENCE)
    try:
        if body is None:
            connection.request('GET', f'/{path}')
        else:
            connection.request('POST', f'/{path}', json.dumps(body), {'Content-Type': 'application/json'})
        response = connection.getresponse()
        assert response.status < 400
        return json.load(response)
    finally:
        connection.close()


def assert_refused(done: subprocess.CompletedProcess[str], status: int, says: str) -> None:
    """Checks the exit status, and that there is one matching line on stderr and nothing on stdout."""
    assert (done.returncode, done.stdout) == (status, ''), done
    assert re.fullmatch(r'townhall: [^\n]+\n', done.stderr), done.stderr
    assert re.search(says, done.stderr), done.stderr


def test_it_shows_its_version_and_its_modes(directory: Path) -> None:
    assert run('--version', cwd=directory).stdout == f'townhall {__version__}\n'
    shown = run('--help', cwd=directory)
    assert shown.returncode == 0
    for word in (
        'rest',
        'mcp-stdio',
        'mcp-http',
        '--bind',
        '--port',
        '--town',
        '--verbose',
        '--read-only',
        '--version',
    ):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        ('mcp-stdio', 'not in a town.*tt init'),
        ('mcp-http --port 1', 'not in a town.*tt init'),
        ('', 'not in a town.*tt init'),
        ('rest --town .', 'holds no town.*tt init --town'),
        ('dance', "invalid choice: 'dance'"),
        ('--port many', "invalid int value: 'many'"),
        ('--dance', '--dance'),
        ('--verb', '--verb'),
    ],
)
def test_a_wrong_command_line_is_reported_in_one_line(directory: Path, line: str, says: str) -> None:
    assert_refused(run(*line.split(), cwd=directory), 2, says)


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        ('--bind 0.0.0.0', r"townhall\.bind = '0\.0\.0\.0': townhall\.auth\.mode is .none.*--bind 127\.0\.0\.1"),
        ('--bind ::', 'only a loopback address'),
        ('--bind example.org', 'only a loopback address'),
        ('--port 65536', 'townhall.rest_port = 65536: give 0 to 65535'),
        ('--port -1', 'townhall.rest_port = -1: give 0 to 65535'),
    ],
)
def test_a_refused_start_starts_no_redis(directory: Path, line: str, says: str) -> None:
    make_town(directory)
    assert_refused(run(*line.split(), cwd=directory), 2, says)
    assert not (directory / '.tt').exists()


def test_an_unsafe_bind_in_the_file_or_the_environment_is_refused_too(directory: Path) -> None:
    make_town(directory)
    assert_refused(run(cwd=directory, TINYTOWN_TOWNHALL_BIND='::'), 2, 'only a loopback address')
    make_town(directory, townhall={'bind': '::'})
    assert_refused(run('rest', cwd=directory), 2, 'only a loopback address')


@pytest.mark.parametrize(
    ('settings', 'status', 'says'),
    [
        ('name = "a', 2, 'it is not TOML'),
        ('name = "a"', 2, 'TINYTOWN_REDIS_SERVER: /nowhere'),
        ('name = "a"\nredis.url = "unix:///nowhere"', 1, 'Redis is not there'),
    ],
)
def test_a_town_that_can_not_be_opened_says_why(directory: Path, settings: str, status: int, says: str) -> None:
    (directory / 'tinytown.toml').write_text(settings)
    assert_refused(run(cwd=directory, TINYTOWN_REDIS_SERVER='/nowhere'), status, says)


def test_a_port_that_is_taken_is_refused_before_a_redis_is_started(directory: Path, hall: Hall) -> None:
    other = make_town(directory / 'other')
    says = f'127.0.0.1:{hall.port}: .*in use; choose another'
    assert_refused(run('--port', str(hall.port), cwd=other.root), 2, says)
    assert not (other.root / '.tt').exists()


def test_a_socket_of_a_town_that_can_not_be_opened_is_removed(directory: Path) -> None:
    make_town(directory)
    path = directory / 'socket'
    done = run('--bind', f'unix:{path}', cwd=directory, TINYTOWN_REDIS_SERVER='/nowhere')
    assert_refused(done, 2, 'TINYTOWN_REDIS_SERVER: /nowhere')
    assert not path.exists()


@pytest.mark.parametrize(('settings', 'more'), [('name = 7', {}), ('name = "a"', {'WORKERS': 'x'})])
def test_a_configuration_error_is_logged_in_the_format_that_the_environment_sets(
    directory: Path, settings: str, more: dict[str, str]
) -> None:
    (directory / 'tinytown.toml').write_text(settings)
    variables = {f'TINYTOWN_TOWNHALL_{name}': value for name, value in ({'LOG_FORMAT': 'json'} | more).items()}
    done = run(**variables, cwd=directory)  # type: ignore[arg-type]
    line = json.loads(done.stderr)
    assert (done.returncode, line['level'], line['part']) == (2, 'error', 'townhall')


@pytest.mark.parametrize(
    'line',
    ['--port 0', 'rest --port 0 --town {root}', '--town {root} --verbose rest --port 0', '--port 0 rest --verbose'],
)
def test_it_serves_the_town_of_its_directory_or_of_the_flag(place: Place, directory: Path, line: str) -> None:
    inside = directory / 'a' / 'b'
    inside.mkdir(parents=True)
    cwd = inside if '{root}' not in line else Path('/')
    with serving(*line.format(root=directory).split(), cwd=cwd) as (process, url):
        assert get(f'{url}/v1/town')['root'] == str(place.root)
        note = directory / '.tt' / 'run' / f'townhall-{process.pid}.json'
        assert json.loads(note.read_text())['url'] == url
    assert process.returncode == 0
    assert not note.exists()


def test_verbose_logs_which_town_it_serves(place: Place) -> None:
    sources, town, *_ = place.hall('--verbose').said('is open on').splitlines()
    assert re.fullmatch(rf'\S+Z townhall: settings are from {place.root}/tinytown.toml, .*', sources)
    assert re.fullmatch(rf'\S+Z townhall: town test in {place.root}, Redis at unix://{place.root}/.tt/redis.sock', town)


def test_it_works_through_a_symbolic_link(place: Place, tmp_path: Path) -> None:
    link = tmp_path / 'bin' / 'townhall'
    link.parent.mkdir()
    link.symlink_to(SCRIPT)
    assert run('--version', cwd=tmp_path, script=link).stdout == f'townhall {__version__}\n'
    with serving('--port', '0', cwd=place.root, script=link) as (_, url):
        assert get(f'{url}/health')['status'] == 'ok'
        assert get(f'{url}/ready')['status'] == 'ready'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_all_its_streams_are_closed(directory: Path, number: int) -> None:
    place = make_town(directory)
    try:
        with serving('--port', '0', cwd=directory, stdout=subprocess.PIPE) as (process, url):
            assert get(f'{url}/v1/agents', {'name': 'a'})['name'] == 'a'
            process.send_signal(number)
            out, _ = process.communicate(timeout=PATIENCE)  # returns when all writers have closed the pipes
            assert (process.returncode, out) == (0, '')
        assert place.do('agent.get', agent='a')['state'] == 'Idle'
        assert Path(f'/proc/{redis_pid(place)}').exists()
    finally:
        place.close()


def test_it_goes_on_when_its_log_pipe_is_closed(place: Place) -> None:
    with serving('--port', '0', cwd=place.root) as (process, url):
        assert process.stderr is not None
        process.stderr.close()
        for _ in range(3):
            assert get(f'{url}/health')['status'] == 'ok'
        process.terminate()
        assert process.wait(PATIENCE) == 0


def await_note(process: subprocess.Popen[bytes], directory: Path) -> Any:
    """Waits for the note file of a townhall, and returns the URL in it."""
    deadline = time.monotonic() + PATIENCE
    while not (notes := sorted(directory.glob('townhall-*.json'))):
        assert time.monotonic() < deadline
        with pytest.raises(subprocess.TimeoutExpired):  # it must not end
            process.wait(0.02)
    return json.loads(notes[0].read_text())['url']


def test_it_needs_no_standard_streams(place: Place) -> None:
    script = f'exec {sys.executable} {SCRIPT} --port 0 <&- >&- 2>&-'
    with subprocess.Popen(['sh', '-c', script], cwd=place.root, env=environment()) as process:
        url = await_note(process, place.root / '.tt' / 'run')
        assert get(f'{url}/v1/status')['agent_count'] == 0
        streams = {os.path.realpath(f'/proc/{process.pid}/fd/{number}') for number in range(3)}
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert streams == {'/dev/null'}


def test_read_only_refuses_changes(place: Place) -> None:
    with serving('--port', '0', '--read-only', cwd=place.root) as (_, url):
        done = place.tt('--url', url, 'backlog', 'add', 'x', check=False)
        assert done.returncode == 1
        assert 'town.write' in done.stderr
        assert place.tt('--url', url, 'backlog', 'list').stdout == 'The backlog is empty.\n'


def test_the_script_names_a_package_that_its_python_lacks() -> None:
    argv = [sys.executable, '-I', '-S', str(SCRIPT), '--version']  # -S: without site-packages
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r'townhall: this Python has no package \w+; .*make setup.*\n', done.stderr)
