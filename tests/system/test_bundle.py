"""`make bundle`: the tarball installs and starts on a machine without a network, is upgraded, and says what it can't.

All of it runs in a network namespace that has only its own loopback, with an empty environment, by the system's sh.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinytown import __version__

from ..support import PATIENCE, REPOSITORY

TOP = f'townhall-{__version__}'
PYTHON = os.path.realpath(sys.executable)
# Turns the loopback of a new namespace on (netdevice(7)), and becomes a program in it.
ONLINE = (
    'import fcntl, os, socket, struct, sys; s = socket.socket(); '
    "fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 1 | 64)); os.execvp(sys.argv[1], sys.argv[1:])"
)
NO_ROUTE = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"


class Machine:
    """One without a network: programs run in a namespace of their own, with nothing in their environment but PATH."""

    def __init__(self, root: Path, tarball: Path) -> None:
        self.root = root
        self.prefix, self.bin, self.town = root / 'opt', root / 'bin', root / 'town'
        subprocess.run(['tar', '-xzf', tarball], cwd=root, check=True)
        self.bundle = root / TOP

    def run(self, *command: str, check: bool = True, stdin: str = '') -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ['unshare', '-rn', PYTHON, '-c', ONLINE, *command],
            cwd=self.root,
            env={'PATH': os.defpath},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def install(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        where = ('--prefix', str(self.prefix), '--bin', str(self.bin), '--python', PYTHON)
        return self.run('sh', f'{self.bundle}/install.sh', *where, *flags, check=check)

    def releases(self) -> set[str]:
        return {each.name for each in (self.prefix / 'releases').iterdir()}

    def renew(self, what: str) -> None:
        """Makes another version of the bundle out of this one."""
        (self.bundle / 'news').write_text(what)
        sums = self.bundle / 'SHA256SUMS'
        kept = [line for line in sums.read_text().splitlines() if not line.endswith('  news')]
        sums.write_text('\n'.join([*kept, f'{hashlib.sha256(what.encode()).hexdigest()}  news']) + '\n')


@pytest.fixture(scope='module')
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('dist')
    command = [sys.executable, str(REPOSITORY / 'deploy' / 'bundle.py'), '--out', str(out)]
    subprocess.run(command, check=True, timeout=600)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope='module')
def machine(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine on which it is installed."""
    made = Machine(tmp_path_factory.mktemp('m'), tarball)
    made.install()
    return made


@pytest.fixture
def plain(directory: Path, tarball: Path) -> Iterator[Machine]:
    """A machine on which it is not installed."""
    made = Machine(directory, tarball)
    yield made
    shutil.rmtree(made.root)


# From the tarball to the first answer, as an operator would do it; `now` is in seconds.
FROM_NOTHING = f"""
set -eu
now() {{ date +%s.%N; }}
began=$(now)
tar -xzf "$1" -C "$2"
sh "$2/{TOP}/install.sh" --prefix "$2/opt" --bin "$2/bin" --python "$3" >/dev/null
installed=$(now)
mkdir "$2/town"
cd "$2/town"
"$2/bin/tt" init --name town --cli demo >/dev/null
"$2/bin/townhall" --port 8787 2>/dev/null &
until "$3" -c 'import sys, urllib.request as u; print(u.urlopen("http://127.0.0.1:8787/health").status)' 2>/dev/null
do sleep 0.01; done
answered=$(now)
"$2/bin/tt" spawn backend >/dev/null
"$2/bin/tt" assign backend 'write a haiku' >/dev/null
until "$2/bin/tt" result backend | grep haiku; do :; done
"$2/bin/tt" generate-api-key | grep argon2id
grep VmRSS "/proc/$!/status"
"$2/bin/tt" stop --redis
echo "seconds: $began $installed $answered"
"""


def test_it_installs_and_serves_on_a_machine_with_no_route_anywhere(tarball: Path, directory: Path) -> None:
    machine = Machine(directory, tarball)
    shutil.rmtree(machine.bundle)
    assert 'Network is unreachable' in machine.run(PYTHON, '-c', NO_ROUTE, check=False).stderr
    done = machine.run('sh', '-s', str(tarball), str(directory), PYTHON, stdin=FROM_NOTHING)
    assert done.stdout.startswith('200\n')
    assert 'demo: done: write a haiku' in done.stdout
    assert 'Stopped 1 townhall, 1 worker and Redis.' in done.stdout
    began, installed, answered = map(float, done.stdout.split('seconds: ')[1].split())
    print(f'{tarball.name}: {tarball.stat().st_size:,} bytes; installed after {installed - began:.1f} s, ', end='')
    print(f'the first 200 after {answered - began:.1f} s;', *re.findall(r'VmRSS.*', done.stdout))


def test_what_install_md_says_can_be_done_so(tarball: Path, directory: Path) -> None:
    page = (REPOSITORY / 'docs' / 'install.md').read_text()
    blocks = re.findall(r'^<!-- needs: bundle -->\n```sh\n(.*?)^```$', page, re.M | re.S)
    subprocess.run([sys.executable, str(REPOSITORY / 'deploy' / 'dist.py'), '--out', str(tarball.parent)], check=True)
    (directory / 'dist').symlink_to(tarball.parent)
    env = {
        'PATH': f'{Path(PYTHON).parent}:{os.defpath}',
        'HOME': str(directory),
        'PIP_NO_INDEX': '1',  # pip has what a network would bring
        'PIP_FIND_LINKS': str(REPOSITORY / 'build' / 'wheels'),
    }
    command = ['unshare', '-rn', PYTHON, '-c', ONLINE, 'bash', '-ec', '\n'.join(blocks)]
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f'tt {__version__}\n') == 2
    assert '"status":"ok"' in done.stdout.replace(' ', '')
    assert {each.name for each in directory.iterdir()} == {'dist', 'bin', 'town', '.cache', TOP}
    assert not any((directory / 'bin').iterdir())


def test_the_same_input_gives_the_same_tarball(tarball: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / 'deploy' / 'bundle.py'), '--out', str(tmp_path)]
    subprocess.run([*command, '--wheels', str(REPOSITORY / 'build' / 'wheels')], check=True, timeout=300, umask=0o077)
    assert (tmp_path / tarball.name).read_bytes() == tarball.read_bytes()


@pytest.mark.usefixtures('tarball')  # with which the right ones are there
def test_a_wheel_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / 'deploy' / 'bundle.py'), '--out', str(tmp_path / 'out')]
    for harm, says in (('missing', 'is missing'), ('another', 'does not have the digest in')):
        wheels = shutil.copytree(REPOSITORY / 'build' / 'wheels', tmp_path / harm)
        (tomli_w,) = wheels.glob('tomli_w-*.whl')
        tomli_w.unlink()
        if harm == 'another':
            tomli_w.write_bytes(b'another')
        done = subprocess.run([*command, '--wheels', str(wheels)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f'{tomli_w} {says}' in done.stderr


def test_once_installed_installing_it_changes_nothing(machine: Machine) -> None:
    def seen() -> dict[str, int]:
        return {str(each): each.lstat().st_mtime_ns for each in [*machine.prefix.rglob('*'), *machine.bin.iterdir()]}

    before = seen()
    assert f'Townhall {__version__} is in {machine.prefix}' in machine.install().stdout
    assert seen() == before


def test_an_installation_that_was_interrupted_is_done_again(machine: Machine) -> None:
    release = (machine.prefix / 'current').resolve()
    (release / 'complete').unlink()
    (release / 'bin' / 'tt').unlink()
    (release / 'bin' / 'python').unlink()
    machine.install()
    assert machine.run(str(machine.bin / 'tt'), '--version').stdout == f'tt {__version__}\n'


@pytest.mark.parametrize(
    ('harm', 'flags', 'says'),
    [
        ('none', ['--wrong'], '--wrong is not known; see '),
        ('none', ['--prefix'], '--prefix needs a value'),
        ('none', ['--prefix', '/a b'], 'no spaces'),
        ('none', ['--python', '/bin/false'], '/bin/false is not a Python 3.11 to 3.14'),
        ('damaged', [], 'this bundle is damaged; copy it here again'),
        ('taken', [], 'bin/tt exists and does not belong to '),
    ],
)
def test_what_it_can_not_do_it_says_and_changes_nothing(plain: Machine, harm: str, flags: list[str], says: str) -> None:
    if harm == 'damaged':
        next((plain.bundle / 'wheels').glob('tomli_w-*')).write_bytes(b'')
    if harm == 'taken':
        plain.bin.mkdir()
        (plain.bin / 'tt').write_text('of someone else')
    before = sorted(plain.root.rglob('*'))
    done = plain.install(*flags, check=False)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('install.sh: ')
    assert says in done.stderr
    assert sorted(plain.root.rglob('*')) == before


def test_service_is_handed_to_townhall(machine: Machine) -> None:
    done = machine.install('--service', '--town', '/nowhere', check=False)
    assert done.returncode == 2
    assert '/nowhere' in done.stderr


def test_its_help_is_its_head(machine: Machine) -> None:
    shown = machine.run('sh', f'{machine.bundle}/install.sh', '--help').stdout
    for flag in ('--prefix', '--bin', '--python', '--service'):
        assert flag in shown
    assert '#' not in shown
    assert 'set -eu' not in shown


def test_an_upgrade_leaves_what_runs_alone_and_removes_what_nobody_uses(machine: Machine) -> None:
    (first,) = machine.releases()
    python = machine.prefix / 'releases' / first / 'bin' / 'python'
    with subprocess.Popen([python, '-c', 'input()'], stdin=subprocess.PIPE) as running:
        machine.renew('second')
        machine.install()
        assert (machine.prefix / 'current').resolve().name != first
        assert len(machine.releases()) == 2
        machine.renew('third')
        machine.install()
        assert len(machine.releases()) == 3
        assert first in machine.releases()
        running.communicate(b'\n', timeout=PATIENCE)
    machine.renew('fourth')
    machine.install()
    assert len(machine.releases()) == 2
    assert first not in machine.releases()
    assert machine.run(str(machine.bin / 'townhall'), '--version').stdout == f'townhall {__version__}\n'
