"""`townhall service`: the units that it writes, its calls of systemctl, what it refuses; credentials; the spawner."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinytown import config
from tinytown.errors import UsageError
from tinytown.host import spawner
from tinytown.host.processes import identify, reap, stop_tree, verdict
from tinytown.townhall import systemd_units

from ..host.test_sd_notify import Manager
from ..support import PATIENCE, Place, environment, make_town, redis_pid

_CTL = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *is-active*) echo "${ACTIVE:-active}";;
  *Linger*) echo "$LINGER";;
  *"start $FAILS"*) echo "Job for it failed" >&2; exit 1;;
esac
"""


class Machine:
    """A town, and fake commands systemctl and loginctl that record their calls."""

    def __init__(self, root: Path, place: Path) -> None:
        self.place = make_town(root)
        self.units = place / 'home' / '.config' / 'systemd' / 'user'
        self._calls, self._bin = place / 'calls', place / 'bin'
        self._bin.mkdir()
        for name in ('systemctl', 'loginctl'):
            (self._bin / name).write_text(_CTL)
            (self._bin / name).chmod(0o755)
        self._home = place / 'home'

    def service(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs `townhall service`. `more` are variables; those of `_CTL` set what systemctl answers."""
        env = {'CALLS': str(self._calls), 'LINGER': 'yes', 'FAILS': 'nothing', 'HOME': str(self._home)}
        env |= {'PATH': f'{self._bin}:/usr/bin:/bin'} | more
        argv = [sys.executable, '-m', 'tinytown.townhall', 'service', *words]
        return subprocess.run(argv, env=environment(**env), cwd=self.place.root, capture_output=True, text=True,
                              timeout=PATIENCE, check=False)  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def machine(directory: Path, tmp_path: Path) -> Machine:
    return Machine(directory, tmp_path)


def test_units_of_a_user_are_written_started_shown_and_removed(machine: Machine) -> None:
    done = machine.service('install', '--user', LINGER='no')
    assert done.returncode == 0, done.stderr
    user = pwd.getpwuid(os.getuid()).pw_name
    assert f'does not start at boot; mend that:  loginctl enable-linger {user}' in done.stdout
    town, hall = machine.units / 'tinytown-test.service', machine.units / 'townhall-test.service'
    assert 'WantedBy=default.target' in town.read_text()
    assert 'User=' not in town.read_text() + hall.read_text()
    assert machine.calls[-3:] == [
        'systemctl --user daemon-reload',
        'systemctl --user enable --now tinytown-test.service',
        'systemctl --user start townhall-test.service',
    ]
    shown = machine.service('status', '--user')
    assert (shown.returncode, shown.stdout.count('active, as written')) == (0, 2)
    assert machine.service('uninstall', '--user').returncode == 0
    assert 'systemctl --user disable --now tinytown-test.service' in machine.calls
    assert list(machine.units.iterdir()) == []
    assert machine.service('status', '--user').returncode == 3
    again = machine.service('uninstall', '--user')
    assert (again.returncode, 'has no units of test' in again.stderr) == (1, True)


def test_a_unit_that_was_changed_by_hand_is_kept_without_force(machine: Machine) -> None:
    assert machine.service('install', '--user', '--no-start').returncode == 0
    assert not any(call.startswith('systemctl') for call in machine.calls)
    hall = machine.units / 'townhall-test.service'
    changed = hall.read_text().replace('WatchdogSec=90', 'WatchdogSec=9')
    hall.write_text(changed)
    for command in ('install', 'uninstall'):
        done = machine.service(command, '--user')
        assert (done.returncode, 'was changed by hand' in done.stderr) == (1, True)
    assert 'changed by hand' in machine.service('status', '--user').stdout
    assert hall.read_text() == changed
    assert machine.service('install', '--user', '--no-start', '--force').returncode == 0
    assert 'WatchdogSec=90' in hall.read_text()


def test_two_towns_of_the_same_name_do_not_overwrite_each_others_units(machine: Machine, tmp_path: Path) -> None:
    other = make_town(tmp_path / 'other').root
    assert machine.service('install', '--user', '--no-start').returncode == 0
    done = machine.service('install', '--user', '--no-start', '--town', str(other))
    assert f'is for the town in {machine.place.root}; give --name' in done.stderr
    assert machine.service('install', '--user', '--no-start', '--town', str(other), '--name', 'two').returncode == 0
    assert len(list(machine.units.iterdir())) == 4


def test_a_failure_of_systemctl_is_reported(machine: Machine) -> None:
    done = machine.service('install', '--user', FAILS='townhall-test')
    assert done.returncode == 1
    assert 'systemctl --user start townhall-test.service failed: Job for it failed' in done.stderr
    done = machine.service('install', '--user', PATH='/nowhere')
    assert (done.returncode, 'there is no systemctl here' in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ('words', 'says'),
    [
        (('install', '--credential', 'redis.url'), 'give SETTING=FILE with the absolute path'),
        (('install', '--credential', 'redis.uri=/etc/hostname'), 'did you mean redis.url'),
        (('install', '--name', 'No Name'), '--name'),
        (('install', '--town', '/nowhere'), 'holds no town'),
        (('remove',), 'invalid choice'),
        ((), 'COMMAND'),
    ],
)
def test_a_wrong_command_line_is_reported(machine: Machine, words: tuple[str, ...], says: str) -> None:
    done = machine.service(*words, *(['--user'] if words else []))
    assert (done.returncode, says in done.stderr) == (2, True), done
    assert not machine.units.exists()


def test_units_hold_absolute_paths_and_credentials_and_a_missing_cli_is_warned_of(
    machine: Machine, tmp_path: Path
) -> None:
    machine.place.tt('config', 'default_cli', 'codex')
    secret = tmp_path / 'secret'
    secret.write_text('x')
    done = machine.service(
        'install', '--to', str(tmp_path / 'to'), '--path', '/opt/a:relative:/opt/a:/opt/b 50%',
        '--credential', f'redis.url={secret}', '--credential', f'townhall.tls.key_path={secret}',
    )  # fmt: skip
    assert "'codex' (default_cli) is not on the PATH" in done.stdout
    text = (tmp_path / 'to' / 'townhall-test.service').read_text()
    assert 'Environment="PATH=/opt/a:/opt/b 50%%"' in text
    assert f'LoadCredential=TINYTOWN_REDIS_URL:{secret}' in text
    assert 'Environment=TINYTOWN_TOWNHALL_TLS_KEY_PATH=%d/townhall-tls-key_path' in text
    assert f'ExecStart={sys.executable} -P -m tinytown.townhall rest --town {machine.place.root}\n' in text
    assert machine.calls == []


@pytest.mark.parametrize('name', ['a b', '50%', 'q"t', 'dollar$HOME', 'back\\slash', 'semi;colon'])
def test_a_town_may_lie_in_a_directory_of_any_name(machine: Machine, tmp_path: Path, name: str) -> None:
    root = make_town(tmp_path / name).root
    to = tmp_path / 'to'
    assert machine.service('install', '--town', str(root), '--to', str(to), '--path', f'{root}:/bin').returncode == 0
    text = (to / 'tinytown-test.service').read_text()
    assert systemd_units.is_ours(text)
    assert f'WorkingDirectory={str(root).replace("%", "%%")}\n' in text


def test_a_socket_unit_listens_where_townhall_is_configured_to(machine: Machine, tmp_path: Path) -> None:
    to = tmp_path / 'to'
    sock = to / 'townhall-test.socket'
    for bind, stream in (('localhost', '127.0.0.1:8787'), ('::1', '[::1]:8787'), ('unix:/run/x.sock', '/run/x.sock')):
        make_town(machine.place.root, townhall={'bind': bind})
        done = machine.service('install', '--to', str(to), '--socket', TINYTOWN_TOWNHALL_BIND='192.0.2.1')
        assert done.returncode == 0, done.stderr
        assert f'ListenStream={stream}\n' in sock.read_text()
    assert 'SocketMode=0600' in sock.read_text()
    written = sock.read_text()
    sock.write_text(written.replace('0600', '0660'))
    done = machine.service('install', '--to', str(to))
    assert (done.returncode, 'townhall-test.socket was changed by hand' in done.stderr) == (1, True)
    sock.write_text(written)
    assert machine.service('install', '--to', str(to)).returncode == 0
    assert not sock.exists(), 'install without --socket removes it'
    make_town(machine.place.root, townhall={'rest_port': 0})
    done = machine.service('install', '--to', str(to), '--socket')
    assert (done.returncode, 'rest_port is 0' in done.stderr) == (2, True)


def test_a_removed_socket_unit_is_stopped_and_a_new_one_gets_the_port(machine: Machine) -> None:
    def calls(*words: str) -> list[str]:
        before = len(machine.calls)
        assert machine.service(*words, '--user', ACTIVE='inactive').returncode == 0
        return [call.removeprefix('systemctl --user ') for call in machine.calls[before:] if 'loginctl' not in call]

    added = calls('install', '--socket')
    assert added.index('stop townhall-test.service') < added.index('enable --now tinytown-test.service')
    assert calls('install')[:2] == ['stop townhall-test.socket', 'daemon-reload']
    calls('install', '--socket')
    assert 'stop tinytown-test.service townhall-test.service townhall-test.socket' in calls('uninstall')


def test_directories_that_townhall_writes_to_exist_or_are_created_by_systemd(machine: Machine, tmp_path: Path) -> None:
    to = tmp_path / 'to'
    make_town(machine.place.root, townhall={'bind': 'unix:/run/tinytown-of-a-test/hall.sock'})
    assert machine.service('install', '--to', str(to)).returncode == 0
    text = (to / 'townhall-test.service').read_text()
    assert 'RuntimeDirectory=tinytown-of-a-test\nRuntimeDirectoryPreserve=yes\n' in text
    missing = tmp_path / 'an audit'
    make_town(machine.place.root, townhall__audit={'path': f'{missing}/audit.jsonl'})
    done = machine.service('install', '--to', str(to))
    assert (done.returncode, f"make it: sudo install -d -o root '{missing}'" in done.stderr) == (2, True)
    missing.mkdir()
    assert machine.service('install', '--to', str(to)).returncode == 0
    assert f'ReadWritePaths="-{missing}"\n' in (to / 'townhall-test.service').read_text()


def test_writing_units_changes_nothing_in_a_town_whose_path_is_too_long_for_a_socket(
    machine: Machine, tmp_path: Path
) -> None:
    root, to = make_town(tmp_path / ('deep' * 25)).root, tmp_path / 'to'
    assert machine.service('install', '--town', str(root), '--to', str(to)).returncode == 0
    assert [file.name for file in root.iterdir()] == ['tinytown.toml']
    assert 'ReadWritePaths=-/tmp\n' in (to / 'townhall-test.service').read_text()


# --------------------------------------------------------------------------------------------------------- credentials


def test_settings_may_come_from_credentials_of_a_service_manager(tmp_path: Path) -> None:
    for name, text in (('TINYTOWN_MAX_AGENTS', '7\n'), ('A_KEY', 'k'), ('not-a-variable', 'x'), ('OWN', 'file')):
        (tmp_path / name).write_text(text)
    environ = {'CREDENTIALS_DIRECTORY': str(tmp_path), 'OWN': 'environment', config.EXPECTED: 'A_KEY not-a-variable'}
    config.take_credentials(environ)
    assert {name: environ.get(name) for name in ('TINYTOWN_MAX_AGENTS', 'A_KEY', 'not-a-variable', 'OWN')} == {
        'TINYTOWN_MAX_AGENTS': '7',
        'A_KEY': 'k',
        'not-a-variable': None,
        'OWN': 'environment',
    }


def test_a_missing_or_binary_credential_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='credential GONE is missing'):
        config.take_credentials({'CREDENTIALS_DIRECTORY': str(tmp_path), config.EXPECTED: 'GONE'})
    with pytest.raises(UsageError, match='credential GONE is missing'):
        config.take_credentials({config.EXPECTED: 'GONE'})
    (tmp_path / 'BAD').write_bytes(b'\xff')
    with pytest.raises(UsageError, match=r'credential .*BAD'):
        config.take_credentials({'CREDENTIALS_DIRECTORY': str(tmp_path)})


# --------------------------------------------------------------------------------------------------------- the spawner


@pytest.fixture
def spawner_process(place: Place, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The spawner of the town `place`, once it is ready."""
    manager = Manager(str(directory / 'notify'))
    argv = [sys.executable, '-m', 'tinytown.host.spawner', str(place.root)]
    env = environment(NOTIFY_SOCKET=manager.address, ANTHROPIC_API_KEY='of the spawner')
    with subprocess.Popen(argv, env=env) as process:
        assert manager.hears()['READY'] == '1'
        manager.close()
        yield process
        process.terminate()


def parent(pid: int) -> int:
    """The pid of a process's parent."""
    return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


def test_the_spawner_starts_every_process_of_the_town_for_tt_and_for_townhall(
    place: Place, spawner_process: subprocess.Popen[bytes]
) -> None:
    place.tt('spawn', 'one', ANTHROPIC_API_KEY='of the caller', OPENAI_API_KEY='of the caller')
    hall = place.hall()
    hall.post('/v1/agents', {'name': 'two'})
    agents = [place.do('agent.get', agent=name) for name in ('one', 'two')]
    assert [agent['state'] for agent in agents] == ['Idle', 'Idle']
    assert [parent(agent['pid']) for agent in agents] == [spawner_process.pid] * 2
    assert parent(redis_pid(place)) == spawner_process.pid
    environs = [Path(f'/proc/{agent["pid"]}/environ').read_bytes().split(b'\0') for agent in agents]
    assert all(b'ANTHROPIC_API_KEY=of the spawner' in environ for environ in environs), "not the caller's"
    assert b'OPENAI_API_KEY=of the caller' in environs[0]


@pytest.mark.parametrize('line', ['agent.restart = "on-failure"', 'nonsense = 3', '['])
def test_a_stopped_spawner_stops_the_town_cleanly_even_if_the_configuration_is_broken(
    place: Place, spawner_process: subprocess.Popen[bytes], line: str
) -> None:
    place.tt('spawn', 'one')
    redis = identify(redis_pid(place))
    place.store.close()
    file = place.root / 'tinytown.toml'
    before = file.read_text()
    file.write_text(f'{line}\n{before}')
    spawner_process.terminate()
    assert spawner_process.wait(PATIENCE) == 0
    assert not (place.root / '.tt' / 'run' / 'keeper.sock').exists()
    assert verdict(redis) == 'dead'
    file.write_text(before)
    shown = place.tt_json('show', 'one')
    assert shown['state'] == 'Stopped'
    assert place.history()[-1]['type'] != 'agent.error'


def test_a_second_spawner_is_refused_and_a_killed_one_is_not_needed(
    place: Place, spawner_process: subprocess.Popen[bytes]
) -> None:
    second = subprocess.run(
        [sys.executable, '-m', 'tinytown.host.spawner', str(place.root)],
        env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert (second.returncode, 'has a spawner already' in second.stderr) == (1, True)
    spawner_process.send_signal(signal.SIGKILL)
    spawner_process.wait()
    pid = spawner.start(place.root, ['sleep', '60'], place.root, dict(os.environ), place.root / 'log')
    assert parent(pid) == os.getpid()
    stop_tree(identify(pid), '', 0)
    reap()


def test_the_spawner_reports_what_it_can_not_start_and_goes_on(
    place: Place, spawner_process: subprocess.Popen[bytes]
) -> None:
    del spawner_process
    with pytest.raises(OSError, match='No such file or directory'):
        spawner.start(place.root, ['/nowhere/program'], place.root, {}, place.root / 'log')
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(place.root / '.tt' / 'run' / 'keeper.sock'))
        sock.sendall(b'nonsense')
        sock.shutdown(socket.SHUT_WR)
        assert 'error' in json.loads(sock.recv(4096))
    reader, writer = socket.socketpair()
    with reader, writer:
        argv = [sys.executable, '-c', 'import os, sys; os.write(int(sys.argv[1]), b"hello")', spawner.FD]
        spawner.start(place.root, argv, place.root, dict(os.environ), place.root / 'log', [writer.fileno()])
        writer.close()
        reader.settimeout(PATIENCE)
        assert reader.recv(16) == b'hello'
        assert reader.recv(16) == b'', 'the spawner must close its copy of the descriptor'
