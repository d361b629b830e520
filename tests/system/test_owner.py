"""A town belongs to one user: what root may do in it, and whose what root writes is; and one without name or home."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tinytown.files import write_atomically
from tinytown.host.processes import python

from ..support import PATIENCE, REPOSITORY, environment

OWNER = pwd.getpwnam('daemon')


def as_root(root: Path, *words: str, module: str = 'tinytown.cli') -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python(module, *words),
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def owners(root: Path) -> set[int]:
    return {each.lstat().st_uid for each in (root, *root.rglob('*'))}


@pytest.fixture
def foreign(directory: Path) -> Path:
    """A town that root has made in the directory of another user."""
    os.chown(directory, OWNER.pw_uid, OWNER.pw_gid)
    done = as_root(directory, 'init', '--name', 'theirs', '--cli', 'demo')
    assert done.returncode == 0, done.stderr
    return directory


def test_a_town_that_root_makes_for_another_user_is_that_user_s(foreign: Path) -> None:
    assert owners(foreign) == {OWNER.pw_uid}
    assert (foreign / 'tinytown.toml').stat().st_gid == OWNER.pw_gid


@pytest.mark.parametrize(
    'line', ['start', 'stop --redis', 'spawn a', 'status', 'config default_cli demo', 'key create --write',
             'key revoke 0123abcd', 'townhall', 'townhall mcp-stdio']
)  # fmt: skip
def test_in_the_town_of_another_user_root_starts_and_writes_nothing_and_is_told_how(foreign: Path, line: str) -> None:
    before = sorted(foreign.rglob('*'))
    words, module = line.split(), 'tinytown.cli'
    if words[0] == 'townhall':
        words, module = words[1:], 'tinytown.townhall'
    done = as_root(foreign, *words, module=module)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'belongs to daemon' in done.stderr
    assert done.stderr.endswith('sudo -u daemon …\n')
    assert sorted(foreign.rglob('*')) == before


def test_in_the_town_of_another_user_root_may_ask_how_it_is(foreign: Path) -> None:
    assert 'no townhall of' in as_root(foreign, 'ping').stderr
    done = as_root(foreign, 'service', 'status', module='tinytown.townhall')
    assert 'not installed' in done.stdout
    assert owners(foreign) == {OWNER.pw_uid}


def test_a_file_that_root_replaces_stays_its_owner_s_and_nobody_else_s_file_is_touched(directory: Path) -> None:
    os.chown(directory, OWNER.pw_uid, OWNER.pw_gid)
    file, elsewhere = directory / 'f', directory / 'of-root'
    elsewhere.write_text('kept')
    (directory / f'.f.{os.getpid()}').symlink_to(elsewhere)  # where the draft is written
    write_atomically(file, 'first')
    assert (elsewhere.read_text(), elsewhere.stat().st_uid) == ('kept', 0)
    assert file.stat().st_uid == OWNER.pw_uid
    os.chown(file, 12345, 12345)
    write_atomically(file, 'second')
    assert (file.read_text(), file.stat().st_uid, file.stat().st_gid) == ('second', 12345, 12345)
    write_atomically(file, 'third', keep_owner=False)
    assert file.stat().st_uid == 0


def test_a_user_without_name_and_home_is_served(directory: Path) -> None:
    (directory / 'tinytown.toml').write_text('name = "a"\nredis.url = "unix:///nowhere"\n')
    env = environment(PYTHONDONTWRITEBYTECODE='1')
    del env['HOME']
    argv = ['unshare', '--user', '--map-user=54321', '--map-group=54321', *python('tinytown.townhall', '--verbose')]
    done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert f'settings are from {directory}/tinytown.toml' in done.stderr
    assert done.stderr.splitlines()[-1].startswith('townhall: Redis is not there')


def test_the_one_file_is_unpacked_for_a_user_without_name_and_home(directory: Path) -> None:
    build = [sys.executable, str(REPOSITORY / 'deploy' / 'dist.py'), '--out', str(directory / 'dist')]
    subprocess.run(build, env=environment(), capture_output=True, check=True)
    argv = ['unshare', '--user', '--map-user=54321', '--map-group=54321', os.path.realpath(sys.executable), '-S']
    env = {'TMPDIR': str(directory), 'PATH': os.defpath}
    done = subprocess.run(
        [*argv, str(directory / 'dist' / 'tt.pyz'), '--version'], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout[:3]) == (0, 'tt '), done.stderr
    assert (directory / 'tinytown-54321').is_dir()


@pytest.mark.parametrize(
    ('given', 'says'),
    [('--prefix {0}/p --bin {0}/b', 'this bundle is damaged'), ('--prefix {0}/p', 'HOME is not set; give --prefix')],
)
def test_the_installer_needs_no_home_where_it_is_told_all_places(directory: Path, given: str, says: str) -> None:
    argv = ['unshare', '--user', '--map-user=54321', 'sh', str(REPOSITORY / 'deploy' / 'install.sh')]
    env = {'PATH': os.defpath}
    words = given.format(directory).split()
    done = subprocess.run([*argv, *words], env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith(f'install.sh: {says}')  # the checkout is no bundle
