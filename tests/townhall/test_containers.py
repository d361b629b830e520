"""What the containers are made from, and their entry point as a script; and `tt ping`, which tells their health."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinytown import config
from tinytown.host import managed_redis
from tinytown.host.processes import python, python_path

from ..certificates import SERVER, Authority
from ..proxy import accepts
from ..support import PATIENCE, REPOSITORY, Place, Service, environment, make_town, redis_pid, until

DEPLOY = REPOSITORY / 'deploy'
ENTRY = DEPLOY / 'entrypoint.py'
COMPOSE = yaml.safe_load((DEPLOY / 'compose.yml').read_text())

# ---------------------------------------------------------------------------------------------------------- the images


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile: word and rest, continued lines joined, comments left out."""
    text = re.sub(r'^\s*#.*\n', '', (DEPLOY / name).read_text(), flags=re.M).replace('\\\n', ' ')
    return [
        (word, ' '.join(rest.split())) for word, _, rest in (line.partition(' ') for line in text.splitlines() if line)
    ]


CONTAINERFILES = ['Containerfile', 'Containerfile.worker']


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_an_image_runs_as_a_user_of_its_own_from_a_base_that_is_named_and_says_how_it_is(name: str) -> None:
    found = instructions(name)
    last = len(found) - 1 - [word for word, _ in reversed(found)].index('FROM')
    final = dict(found[last:])
    assert re.fullmatch(r'([1-9]\d{4}):\1', final['USER'])
    for _, base in [each for each in found if each[0] == 'FROM']:
        assert re.match(r'python:\$\{PYTHON\}', base)
    assert re.fullmatch(r'PYTHON=3\.\d+-slim', found[0][1])
    for word in ('ENTRYPOINT', 'CMD'):
        assert isinstance(json.loads(final[word]), list)  # no shell stands between: townhall itself is process 1
    assert isinstance(json.loads(final['HEALTHCHECK'].partition('CMD ')[2]), list)
    assert final['STOPSIGNAL'] == 'SIGTERM'


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_what_an_image_is_made_of_is_there_and_is_given_to_its_build(name: str) -> None:
    ignored = (REPOSITORY / '.dockerignore').read_text().splitlines()
    given = [line[1:] for line in ignored if line.startswith('!')]
    assert '*' in ignored
    for word, rest in instructions(name):
        if word == 'COPY' and not rest.startswith('--from='):
            for source in rest.split()[:-1]:
                assert (REPOSITORY / source).exists()
                assert source in given


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_the_shell_lines_of_an_image_are_shell(name: str) -> None:
    for word, rest in instructions(name):
        if word == 'RUN':
            done = subprocess.run(['sh', '-n', '-c', rest], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ''), rest


def test_a_service_of_the_compose_file_has_no_more_than_it_needs() -> None:
    assert set(COMPOSE['services']) == {'redis', 'townhall', 'worker'}
    for name, service in COMPOSE['services'].items():
        assert service['read_only'] is True, name
        assert service['cap_drop'] == ['ALL']
        assert service['security_opt'] == ['no-new-privileges:true']
        assert service['restart'] == 'unless-stopped'
        for mount in service['volumes']:
            assert mount.split(':')[0] in COMPOSE['volumes']
        for other, how in service.get('depends_on', {}).items():
            assert other in COMPOSE['services']
            assert how == {'condition': 'service_healthy'}
        if 'build' in service:
            assert (DEPLOY / service['build']['context'] / service['build']['dockerfile']).is_file()
            assert 'HEALTHCHECK' in dict(instructions(Path(service['build']['dockerfile']).name))
    assert all(each.startswith('127.0.0.1:') for each in COMPOSE['services']['townhall']['ports'])
    assert not COMPOSE['services']['redis'].get('ports')
    assert COMPOSE['networks']['inside'] == {'internal': True}


def test_a_townhall_finds_the_writes_of_the_redis_in_the_compose_file_safe(directory: Path) -> None:
    """It is started with the same words, by the server that is here."""
    words = [word if word != '/data' else str(directory) for word in COMPOSE['services']['redis']['command'][1:]]
    path = directory / 'r.sock'
    with subprocess.Popen([managed_redis.find_server(), *words, '--port', '0', '--unixsocket', str(path)]) as redis:
        try:
            until(lambda: accepts(path))
            place = make_town(directory, redis={'url': f'unix://{path}'})
            hall = place.hall()
            assert hall.get('/ready').json['durability'] == 'always'
            place.close()
        finally:
            redis.terminate()


def test_the_settings_that_images_and_compose_file_give_are_settings() -> None:
    known = {setting.env for setting in config.settings().values()} | {'TINYTOWN_TOWN', 'TINYTOWN_NAME'}
    given = {name for service in COMPOSE['services'].values() for name in service.get('environment', {})}
    for name in CONTAINERFILES:
        given |= set(re.findall(r'(TINYTOWN_\w+)=', dict(instructions(name))['ENV']))
    assert given <= known
    assert len(given) > 3


# ----------------------------------------------------------------------------------------------------- the entry point


def bare(root: Path, **more: str) -> dict[str, str]:
    """An environment with nothing in it but where the package is, and the volume."""
    return {'PYTHONPATH': python_path(), 'TINYTOWN_TOWN': str(root), 'TINYTOWN_TOWNHALL_REST_PORT': '0'} | more


def enter(root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ENTRY), *words]
    return subprocess.run(
        argv, env=bare(root, **more), cwd='/', capture_output=True, text=True, timeout=PATIENCE, check=False
    )


class Entered(Service):
    """What an entry point became, once it is open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ''
        assert process.stderr
        while not (found := re.search(r'is open on https?://([\d.]+):(\d+)', self.said)):
            line = process.stderr.readline()
            assert line, self.said
            self.said += line
        self.address, self.port = '127.0.0.1', int(found[2])


@contextmanager
def serving(root: Path, *words: str, **more: str) -> Iterator[Entered]:
    argv = [sys.executable, str(ENTRY), *words]
    with subprocess.Popen(argv, env=bare(root, **more), cwd='/', stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Entered(process)
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


@pytest.fixture
def volume(directory: Path) -> Iterator[Path]:
    """An empty one."""
    yield directory
    if (directory / 'tinytown.toml').exists():
        Place(directory).close()


NETWORK = {'TINYTOWN_TOWNHALL_BIND': '0.0.0.0'}  # noqa: S104


def test_an_empty_volume_on_a_network_gets_a_town_and_a_key_that_stays_and_is_never_told(volume: Path) -> None:
    file = volume / '.tt' / 'api-key'
    with serving(volume, **NETWORK, TINYTOWN_NAME='hill') as entered:
        key = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert f'it is in {file}' in entered.said
        assert entered.get('/v1/town').status == 401
        assert entered.get('/v1/town', Authorization=f'Bearer {key}').json['name'] == 'hill'
        told = entered.said
    assert '$argon2id$' in (volume / 'tinytown.toml').read_text()
    with serving(volume, 'townhall', **NETWORK) as entered:
        assert entered.get('/v1/town', X_API_Key=key).status == 200
        told += entered.said
    assert told.count('an API key was created') == 1
    assert key not in told + (volume / 'tinytown.toml').read_text()


def test_an_entry_point_that_died_before_the_key_was_in_force_makes_another(volume: Path) -> None:
    make_town(volume)
    (volume / '.tt').mkdir(mode=0o700)
    (volume / '.tt' / 'api-key').write_text('left over')
    with serving(volume, **NETWORK) as entered:
        key = (volume / '.tt' / 'api-key').read_text().strip()
        assert entered.get('/v1/town', X_API_Key=key).status == 200


@pytest.mark.parametrize(
    ('words', 'more'),
    [(['townhall', '--bind', '127.0.0.1'], NETWORK), ([], {})],
)
def test_no_key_is_made_where_nobody_comes_from_the_network(
    volume: Path, words: list[str], more: dict[str, str]
) -> None:
    with serving(volume, *words, **more) as entered:
        assert entered.get('/v1/town').status == 200
    assert not (volume / '.tt' / 'api-key').exists()


def test_no_key_is_made_where_it_is_said_how_callers_are_known(volume: Path) -> None:
    hashed = json.loads(Place(volume).tt('generate-api-key', '--json').stdout)
    given = {'TINYTOWN_TOWNHALL_AUTH_MODE': 'api_key', 'TINYTOWN_TOWNHALL_AUTH_API_KEY_HASH': hashed['hash']}
    with serving(volume, **NETWORK, **given) as entered:
        assert entered.get('/v1/town', X_API_Key=hashed['key']).status == 200
    assert not (volume / '.tt' / 'api-key').exists()
    refused = enter(volume, **NETWORK, TINYTOWN_TOWNHALL_AUTH_MODE='none')
    assert (refused.returncode, refused.stdout) == (2, '')
    assert re.fullmatch(r'townhall: .*only a loopback address is served.*\n', refused.stderr)


@pytest.mark.parametrize(
    ('words', 'more', 'status', 'says'),
    [
        (['townhall', '--dance'], {}, 2, 'townhall: .*--dance'),
        ([], {'TINYTOWN_TOWNHALL_WORKERS': 'many'}, 2, "townhall: TINYTOWN_TOWNHALL_WORKERS: .*'many'"),
        ([], {'TINYTOWN_NAME': 'No Good'}, 2, "tt: --name: name = 'No Good': it must match"),
        (['worker'], {}, 2, 'townhall: worker: give the name of the agent'),
        (['no-such-command'], {}, 1, 'townhall: .*No such file or directory'),
        ([], {'TINYTOWN_TOWN': '/proc/none'}, 1, 'tt: /proc/none: No such file or directory'),
        ([], {'TINYTOWN_REDIS_URL': 'redis://127.0.0.1:1'}, 1, 'townhall: Redis .*127.0.0.1:1'),
    ],
)
def test_what_can_not_be_started_is_told_in_one_line(
    volume: Path, words: list[str], more: dict[str, str], status: int, says: str
) -> None:
    if words == ['worker']:
        make_town(volume)
    done = enter(volume, *words, **more)
    assert (done.returncode, done.stdout) == (status, ''), done
    assert re.fullmatch(says + r'[^\n]*\n', done.stderr), done.stderr


def test_any_other_command_is_run_as_it_stands(volume: Path) -> None:
    make_town(volume)
    done = enter(volume, sys.executable, '-m', 'tinytown.cli', 'config', 'name')
    assert (done.returncode, done.stdout) == (0, 'test\n')
    assert not (volume / '.tt').exists()


def test_a_worker_of_another_volume_works_for_the_town_and_comes_back_when_it_is_started_again(
    place: Place, directory: Path
) -> None:
    other = directory / 'other'
    other.mkdir()
    given = {'TINYTOWN_REDIS_URL': place.town.redis_url, 'TINYTOWN_NAME': 'test', 'TINYTOWN_HOST': 'worker-1'}
    argv = [sys.executable, str(ENTRY), 'worker', 'w', '--cli', 'demo']
    for number in (1, 2):
        with subprocess.Popen(argv, env=bare(other, **given), stdout=subprocess.DEVNULL, cwd='/') as process:
            place.await_event('agent.started' if number == 1 else 'agent.restarting', agent_name='w')
            task = place.do('task.assign', agent='w', task=f'haiku {number}')['task_id']
            assert place.await_end(task)['result'] == f'demo: done: haiku {number}'
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert place.do('agent.get', agent='w')['state'] == 'Stopped'


def test_an_agent_that_is_there_keeps_its_coding_cli_and_that_is_said(place: Place) -> None:
    make_town(place.root, agent_clis={'other': 'sh -c true'})
    place.do('agent.spawn', name='w')
    place.do('agent.kill', agent='w')
    argv = [sys.executable, str(ENTRY), 'worker', 'w', '--cli']
    for cli, says in (('other', rb"--cli other: 'w' was spawned with demo and keeps it; .*tt prune"), ('demo', b'')):
        with subprocess.Popen([*argv, cli], env=bare(place.root), stderr=subprocess.PIPE, cwd='/') as process:
            until(lambda: process.poll() is not None or f'(pid {process.pid}, ' in place.log('w'))
            assert process.poll() is None
            process.terminate()
            said = process.communicate(timeout=PATIENCE)[1]
        assert re.search(says, said) if says else b'--cli' not in said
        assert place.do('agent.get', agent='w')['cli'] == 'demo'


# ---------------------------------------------------------------------------------------------------------------- ping


def ping(place: Place, *words: str, **more: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, answer and complaint of `tt ping`."""
    done = place.tt('ping', '--json', *words, check=False, **more)
    return done.returncode, json.loads(done.stdout or '{}'), done.stderr


def test_a_townhall_is_asked_whether_it_is_ready(place: Place) -> None:
    status, _, said = ping(place)
    assert (status, said) == (
        1,
        f'tt: no townhall of {place.root} runs on this machine; start it: tt start --town {place.root}\n',
    )
    hall = place.hall()
    url = f'http://127.0.0.1:{hall.port}'
    status, answer, said = ping(place)
    ready = hall.get('/ready').json
    assert (status, said, answer['url'], answer['http_status']) == (0, '', url, 200)
    assert {name for name in ready if ready[name] != answer[name]} <= {'redis_latency_ms'}
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    try:
        status, answer, _ = ping(place)
        assert (status, answer['status'], answer['http_status']) == (1, 'not_ready', 503)
        assert ping(place, '--live')[0] == 0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_townhall_on_a_socket_or_with_a_certificate_for_other_names_is_asked_too(place: Place) -> None:
    pair = Authority(place.root / 'ca').sign('elsewhere', SERVER, alternative='elsewhere')
    tls = {'TINYTOWN_TOWNHALL_TLS_CERT_PATH': str(pair.cert), 'TINYTOWN_TOWNHALL_TLS_KEY_PATH': str(pair.key)}
    for scheme, words, more in (('unix:/', ['--bind', f'unix:{place.root}/s'], {}), ('https://', ['--port', '0'], tls)):
        argv = python('tinytown.townhall', *words)
        with subprocess.Popen(argv, cwd=place.root, env=environment(**more), stderr=subprocess.PIPE) as process:
            assert process.stderr
            try:
                assert b'is open on' in process.stderr.readline()
                status, answer, said = ping(place)
                assert (status, answer['status'], said) == (0, 'ready', '')
                assert answer['url'].startswith(scheme)
            finally:
                process.terminate()
                process.stderr.read()


def test_an_address_where_no_townhall_is_is_told(place: Place) -> None:
    status, _, said = ping(place, '--url', 'http://127.0.0.1:1')
    assert (status, said) == (1, 'tt: http://127.0.0.1:1 can not be reached: [Errno 111] Connection refused\n')
