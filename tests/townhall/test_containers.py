"""The container files, the entry point run as a script, and `tt ping`, which is the containers' health check."""

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
from tinytown.trust import VARIABLE

from ..certificates import SERVER, Authority
from ..proxy import accepts
from ..support import PATIENCE, REPOSITORY, Place, Service, environment, make_town, redis_pid, until

DEPLOY = REPOSITORY / 'deploy'
ENTRY = DEPLOY / 'entrypoint.py'
COMPOSE = yaml.safe_load((DEPLOY / 'compose.yml').read_text())

# ---------------------------------------------------------------------------------------------------------- the images


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile as pairs of keyword and arguments, without comments."""
    text = re.sub(r'^\s*#.*\n', '', (DEPLOY / name).read_text(), flags=re.M).replace('\\\n', ' ')
    return [
        (word, ' '.join(rest.split())) for word, _, rest in (line.partition(' ') for line in text.splitlines() if line)
    ]


CONTAINERFILES = ['Containerfile', 'Containerfile.worker']


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_an_image_has_a_fixed_base_a_user_of_its_own_and_a_health_check(name: str) -> None:
    lines = instructions(name)
    last = len(lines) - 1 - [word for word, _ in reversed(lines)].index('FROM')
    final = dict(lines[last:])
    assert re.fullmatch(r'([1-9]\d{4}):\1', final['USER'])
    for base in [rest for word, rest in lines if word == 'FROM']:
        assert re.match(r'python:\$\{PYTHON\}', base)
    assert re.fullmatch(r'PYTHON=3\.\d+-slim', lines[0][1])
    for word in ('ENTRYPOINT', 'CMD'):
        assert isinstance(json.loads(final[word]), list)  # exec form: townhall itself is PID 1, not a shell
    assert isinstance(json.loads(final['HEALTHCHECK'].partition('CMD ')[2]), list)
    assert final['STOPSIGNAL'] == 'SIGTERM'


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_all_files_that_an_image_copies_exist_and_are_not_ignored(name: str) -> None:
    ignored = (REPOSITORY / '.dockerignore').read_text().splitlines()
    included = [line[1:] for line in ignored if line.startswith('!')]
    assert '*' in ignored
    for word, rest in instructions(name):
        if word == 'COPY' and not rest.startswith('--from='):
            for source in rest.split()[:-1]:
                assert (REPOSITORY / source).exists()
                assert source in included


@pytest.mark.parametrize('name', CONTAINERFILES)
def test_the_run_instructions_of_an_image_are_valid_shell(name: str) -> None:
    for word, rest in instructions(name):
        if word == 'RUN':
            done = subprocess.run(['sh', '-n', '-c', rest], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ''), rest


def test_a_service_of_the_compose_file_has_only_the_rights_that_it_needs() -> None:
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
    assert all(port.startswith('127.0.0.1:') for port in COMPOSE['services']['townhall']['ports'])
    assert not COMPOSE['services']['redis'].get('ports')
    assert COMPOSE['networks']['inside'] == {'internal': True}


def test_the_redis_of_the_compose_file_is_reported_as_durable(directory: Path) -> None:
    """This machine's Redis server is started with the arguments of the compose file."""
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


def test_images_and_the_compose_file_set_only_known_settings() -> None:
    known = {setting.env for setting in config.settings().values()} | {'TINYTOWN_TOWN', 'TINYTOWN_NAME', VARIABLE}
    used = {name for service in COMPOSE['services'].values() for name in service.get('environment', {})}
    for name in CONTAINERFILES:
        used |= set(re.findall(r'(TINYTOWN_\w+)=', dict(instructions(name))['ENV']))
    assert used <= known
    assert len(used) > 3


# ----------------------------------------------------------------------------------------------------- the entry point


def bare(root: Path, **more: str) -> dict[str, str]:
    """A minimal environment: the path of the package, the volume as the town's directory, and a free port."""
    return {'PYTHONPATH': python_path(), 'TINYTOWN_TOWN': str(root), 'TINYTOWN_TOWNHALL_REST_PORT': '0'} | more


def enter(root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the entry point until it ends."""
    argv = [sys.executable, str(ENTRY), *words]
    return subprocess.run(
        argv, env=bare(root, **more), cwd='/', capture_output=True, text=True, timeout=PATIENCE, check=False
    )


class Entered(Service):
    """A townhall that the entry point started. Its log up to the line that it is open is in `log`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ''
        assert process.stderr
        while not (match := re.search(r'is open on https?://([\d.]+):(\d+)', self.log)):
            line = process.stderr.readline()
            assert line, self.log
            self.log += line
        self.address, self.port = '127.0.0.1', int(match[2])


@contextmanager
def serving(root: Path, *words: str, **more: str) -> Iterator[Entered]:
    """Runs the entry point until the end of the block, and checks that it ends with status 0."""
    argv = [sys.executable, str(ENTRY), *words]
    with subprocess.Popen(argv, env=bare(root, **more), cwd='/', stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Entered(process)
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


@pytest.fixture
def volume(directory: Path) -> Iterator[Path]:
    """An empty directory that stands for a container's volume."""
    yield directory
    if (directory / 'tinytown.toml').exists():
        Place(directory).close()


NETWORK = {'TINYTOWN_TOWNHALL_BIND': '0.0.0.0'}  # noqa: S104


def test_an_empty_volume_on_a_network_gets_a_town_and_a_lasting_key_that_is_not_logged(volume: Path) -> None:
    file = volume / '.tt' / 'api-key'
    with serving(volume, **NETWORK, TINYTOWN_NAME='hill') as entered:
        key = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert f'it is in {file}' in entered.log
        assert entered.get('/v1/town').status == 401
        assert entered.get('/v1/town', Authorization=f'Bearer {key}').json['name'] == 'hill'
        log = entered.log
    assert '$argon2id$' in (volume / 'tinytown.toml').read_text()
    with serving(volume, 'townhall', **NETWORK) as entered:
        assert entered.get('/v1/town', X_API_Key=key).status == 200
        log += entered.log
    assert log.count('an API key was created') == 1
    assert key not in log + (volume / 'tinytown.toml').read_text()


def test_a_volume_of_another_uid_that_all_may_write_is_trusted(volume: Path) -> None:
    volume.chmod(0o777)
    os.chown(volume, 54321, 54321)
    with serving(volume) as entered:
        assert entered.get('/v1/town').status == 200
        assert Place(volume).tt('status', check=False).returncode == 2
        assert Place(volume).tt('status', TINYTOWN_TRUSTED_TOWNS=str(volume)).returncode == 0
    assert stat.S_IMODE(volume.stat().st_mode) == 0o777
    for file in (volume, *volume.rglob('*')):  # back, for the end of the test
        os.chown(file, 0, 0, follow_symlinks=False)
    volume.chmod(0o700)


def test_an_entry_point_that_died_before_its_key_was_in_force_makes_a_new_one(volume: Path) -> None:
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
def test_no_key_is_made_for_a_townhall_on_loopback(volume: Path, words: list[str], more: dict[str, str]) -> None:
    with serving(volume, *words, **more) as entered:
        assert entered.get('/v1/town').status == 200
    assert not (volume / '.tt' / 'api-key').exists()


def test_no_key_is_made_if_authentication_is_configured(volume: Path) -> None:
    made = json.loads(Place(volume).tt('generate-api-key', '--json').stdout)
    settings = {'TINYTOWN_TOWNHALL_AUTH_MODE': 'api_key', 'TINYTOWN_TOWNHALL_AUTH_API_KEY_HASH': made['hash']}
    with serving(volume, **NETWORK, **settings) as entered:
        assert entered.get('/v1/town', X_API_Key=made['key']).status == 200
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
def test_a_failed_start_is_reported_in_one_line(
    volume: Path, words: list[str], more: dict[str, str], status: int, says: str
) -> None:
    if words == ['worker']:
        make_town(volume)
    done = enter(volume, *words, **more)
    assert (done.returncode, done.stdout) == (status, ''), done
    assert re.fullmatch(says + r'[^\n]*\n', done.stderr), done.stderr


def test_any_other_command_is_run_unchanged(volume: Path) -> None:
    make_town(volume)
    done = enter(volume, sys.executable, '-m', 'tinytown.cli', 'config', 'name')
    assert (done.returncode, done.stdout) == (0, 'test\n')
    assert not (volume / '.tt').exists()


def test_a_worker_on_another_volume_works_for_the_town_and_may_be_restarted(place: Place, directory: Path) -> None:
    other = directory / 'other'
    other.mkdir()
    settings = {'TINYTOWN_REDIS_URL': place.town.redis_url, 'TINYTOWN_NAME': 'test', 'TINYTOWN_HOST': 'worker-1'}
    argv = [sys.executable, str(ENTRY), 'worker', 'w', '--cli', 'demo']
    for number in (1, 2):
        with subprocess.Popen(argv, env=bare(other, **settings), stdout=subprocess.DEVNULL, cwd='/') as process:
            place.await_event('agent.started' if number == 1 else 'agent.restarting', agent_name='w')
            task = place.do('task.assign', agent='w', task=f'haiku {number}')['task_id']
            assert place.await_end(task)['result'] == f'demo: done: haiku {number}'
            process.terminate()
            assert process.wait(PATIENCE) == 0
        assert place.do('agent.get', agent='w')['state'] == 'Stopped'


def test_an_existing_agent_keeps_its_coding_cli_and_a_warning_says_so(place: Place) -> None:
    make_town(place.root, agent_clis={'other': 'sh -c true'})
    place.do('agent.spawn', name='w')
    place.do('agent.kill', agent='w')
    argv = [sys.executable, str(ENTRY), 'worker', 'w', '--cli']
    for cli, says in (('other', rb"--cli other: 'w' was spawned with demo and keeps it; .*tt prune"), ('demo', b'')):
        with subprocess.Popen([*argv, cli], env=bare(place.root), stderr=subprocess.PIPE, cwd='/') as process:
            until(lambda: process.poll() is not None or f'(pid {process.pid}, ' in place.log('w'))
            assert process.poll() is None
            process.terminate()
            stderr = process.communicate(timeout=PATIENCE)[1]
        assert re.search(says, stderr) if says else b'--cli' not in stderr
        assert place.do('agent.get', agent='w')['cli'] == 'demo'


# ---------------------------------------------------------------------------------------------------------------- ping


def ping(place: Place, *words: str, **more: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, answer and stderr of `tt ping`."""
    done = place.tt('ping', '--json', *words, check=False, **more)
    return done.returncode, json.loads(done.stdout or '{}'), done.stderr


def test_ping_tells_whether_a_townhall_is_ready(place: Place) -> None:
    status, _, stderr = ping(place)
    assert (status, stderr) == (
        1,
        f'tt: no townhall of {place.root} runs on this machine; start it: tt start --town {place.root}\n',
    )
    hall = place.hall()
    url = f'http://127.0.0.1:{hall.port}'
    status, answer, stderr = ping(place)
    ready = hall.get('/ready').json
    assert (status, stderr, answer['url'], answer['http_status']) == (0, '', url, 200)
    assert {name for name in ready if ready[name] != answer[name]} <= {'redis_latency_ms'}
    pid = redis_pid(place)
    os.kill(pid, signal.SIGSTOP)
    try:
        status, answer, _ = ping(place)
        assert (status, answer['status'], answer['http_status']) == (1, 'not_ready', 503)
        assert ping(place, '--live')[0] == 0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_ping_reaches_a_unix_socket_and_a_certificate_for_other_names(place: Place) -> None:
    pair = Authority(place.root / 'ca').sign('elsewhere', SERVER, alternative='elsewhere')
    tls = {'TINYTOWN_TOWNHALL_TLS_CERT_PATH': str(pair.cert), 'TINYTOWN_TOWNHALL_TLS_KEY_PATH': str(pair.key)}
    for scheme, words, more in (('unix:/', ['--bind', f'unix:{place.root}/s'], {}), ('https://', ['--port', '0'], tls)):
        argv = python('tinytown.townhall', *words)
        with subprocess.Popen(argv, cwd=place.root, env=environment(**more), stderr=subprocess.PIPE) as process:
            assert process.stderr
            try:
                assert b'is open on' in process.stderr.readline()
                status, answer, stderr = ping(place)
                assert (status, answer['status'], stderr) == (0, 'ready', '')
                assert answer['url'].startswith(scheme)
            finally:
                process.terminate()
                process.stderr.read()


def test_ping_reports_an_address_without_a_townhall(place: Place) -> None:
    status, _, stderr = ping(place, '--url', 'http://127.0.0.1:1')
    assert (status, stderr) == (1, "tt: http://127.0.0.1:1 can't be reached: [Errno 111] Connection refused\n")
