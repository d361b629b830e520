"""Whose towns `tt` and `townhall` believe: another user's files are named and refused, and nothing in them is used."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tinytown import config
from tinytown.errors import UsageError
from tinytown.host.processes import python
from tinytown.trust import check_town

from ..support import PATIENCE, environment

STRANGER = 54321  # has no name, and owns nothing else
US = ('root', 'another user')
EVIL = """
name = "evil"
default_cli = "evil"
[agent_clis]
evil = "sh -c 'touch {0}/pwned'"
[townhall]
rest_port = 0
audit.path = "{0}/created"
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def run(
    cwd: Path, *words: str, us: str = 'root', module: str = 'tinytown.cli', umask: int = 0o022, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs `tt` as root or, in a user namespace, as a user for whom root's files are their own, STRANGER's nobody's."""
    other = [] if us == 'root' else ['unshare', '--user', '--map-user=12345', '--map-group=12345']
    return subprocess.run(
        [*other, *python(module, *words)],
        cwd=cwd,
        env=environment(PYTHONDONTWRITEBYTECODE='1', **more),
        umask=umask,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def own(path: Path, uid: int = STRANGER) -> None:
    """Gives a directory and all in it to a user."""
    for file in (path, *path.rglob('*')):
        os.chown(file, uid, uid, follow_symlinks=False)


def tree(path: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.lstat().st_mode) for file in path.rglob('*'))


@pytest.fixture
def shared(directory: Path) -> Path:
    """A directory like /tmp, in which a stranger has put a town; its `.tt` has a link to a file of ours."""
    place = directory / 'tmp'
    place.mkdir()
    place.chmod(0o1777)
    victim = directory / 'victim'
    victim.write_text('kept')
    victim.chmod(0o600)
    (place / 'tinytown.toml').write_text(EVIL.format(directory))
    (place / '.tt').mkdir()
    for name in ('redis.lock', 'redis.log', 'townhall.log', 'town-id', 'token-key', 'redis.addr'):
        (place / '.tt' / name).symlink_to(victim)
    for file in (place / 'tinytown.toml', place / '.tt'):
        own(file)
    (place / 'work').mkdir()
    return place


@pytest.mark.parametrize('us', US)
@pytest.mark.parametrize(
    'line', ['status', 'start', 'stop --redis', 'spawn a', 'worker a', 'config', 'config default_cli demo', 'ping',
             'doctor --fix', 'key create --write', 'events -f', 'logs a', 'townhall', 'townhall mcp-stdio',
             'townhall mcp-http', 'townhall service install', 'tinytown.host.spawner']
)  # fmt: skip
def test_a_town_that_a_stranger_put_above_us_is_named_and_refused(shared: Path, line: str, us: str) -> None:
    before = tree(shared.parent)
    words, module = line.split(), 'tinytown.cli'
    if words[0] == 'townhall':
        words, module = words[1:], 'tinytown.townhall'
    elif words[0] == 'tinytown.host.spawner':
        words, module = [str(shared)], words[0]
    done = run(shared / 'work', *words, us=us, module=module)
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    assert done.stderr.count('\n') == 1
    owner = f'uid {STRANGER}' if us == 'root' else 'nobody'
    assert f'{shared}/tinytown.toml belongs to {owner}, and ' in done.stderr
    assert f'trusted_towns = ["{shared}"]' in done.stderr
    assert tree(shared.parent) == before
    assert (shared.parent / 'victim').read_text() == 'kept'


@pytest.mark.parametrize('us', US)
def test_a_town_that_is_named_is_checked_like_one_that_is_found(shared: Path, us: str) -> None:
    by_variable = run(shared / 'work', 'status', us=us, TINYTOWN_TOWN=str(shared))
    for done in (by_variable, run(shared / 'work', 'status', '--town', str(shared), us=us)):
        assert (done.returncode, done.stdout) == (2, '')
        assert 'tinytown.toml belongs to ' in done.stderr


def test_below_a_stranger_s_town_one_may_make_a_town_of_one_s_own(shared: Path) -> None:
    done = run(shared / 'work', 'init', '--cli', 'demo')
    assert done.returncode == 0, done.stderr
    note = f'tt: note: every user of this machine may write to {shared}, above this town, and add files there\n'
    assert done.stderr == note
    assert run(shared / 'work', 'config', 'name').stdout == 'work\n'


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.fixture
def town(directory: Path) -> Path:
    directory.chmod(0o755)
    assert run(directory, 'init', '--name', 'ours', '--cli', 'demo').returncode == 0
    return directory


@pytest.mark.parametrize('name', ['.', 'tinytown.toml', '.tt'])
def test_each_of_directory_file_and_tt_must_be_ours(town: Path, name: str) -> None:
    os.chown(town / name, STRANGER, STRANGER)
    for uid in (0, 12345):
        with pytest.raises(UsageError, match=f'^{(town / name)} belongs to uid 54321, '):
            check_town(town, uid, {})
        with pytest.raises(UsageError, match=f'^{(town / name)} belongs to uid 54321, '):
            config.load(town, environ={}, uid=uid)
    check_town(town, STRANGER, {})


def test_what_root_owns_and_root_alone_may_write_is_believed_by_all(town: Path) -> None:
    check_town(town, STRANGER, {})


@pytest.mark.parametrize('name', ['.', 'tinytown.toml', '.tt'])
@pytest.mark.parametrize(
    ('mode', 'says'), [(0o702, 'every user of this machine; run  chmod o-w '),
                       (0o720, 'the group 7777; run  chmod g-w '),
                       (0o777, 'every user of this machine; run  chmod go-w ')]
)  # fmt: skip
def test_nobody_else_may_write_to_any_of_them(town: Path, name: str, mode: int, says: str) -> None:
    path = town / name
    os.chown(path, -1, 7777)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f'^{path} can be changed by {says}{path}$'):
        check_town(town, 0, {})
    check_town(town, 0, {'TINYTOWN_TRUSTED_TOWNS': str(town)})


def test_the_private_group_of_the_owner_may_write(town: Path) -> None:
    own(town)
    for path in (town, town / 'tinytown.toml', town / '.tt'):
        path.chmod(path.stat().st_mode | 0o020)
    check_town(town, STRANGER, {})
    os.chown(town, STRANGER, 100)
    with pytest.raises(UsageError, match='can be changed by the group '):
        check_town(town, STRANGER, {})


def test_a_link_is_believed_if_it_and_its_target_are_ours(town: Path) -> None:
    file, target = town / 'tinytown.toml', town / 'dotfiles.toml'
    file.rename(target)
    file.symlink_to(target)
    check_town(town, 0, {})
    os.chown(file, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(UsageError, match='toml belongs to uid 54321'):
        check_town(town, 0, {})
    os.chown(file, 0, 0, follow_symlinks=False)
    os.chown(target, STRANGER, STRANGER)
    with pytest.raises(UsageError, match='toml belongs to uid 54321'):
        check_town(town, 0, {})


def test_a_link_or_pipe_that_a_stranger_put_above_us_is_not_skipped(shared: Path) -> None:
    file = shared / 'tinytown.toml'
    file.unlink()
    file.symlink_to('/nowhere')
    os.chown(file, STRANGER, STRANGER, follow_symlinks=False)
    assert 'belongs to uid 54321' in run(shared / 'work', 'status').stderr
    file.unlink()
    os.mkfifo(file)
    own(file)
    assert 'belongs to uid 54321' in run(shared / 'work', 'status').stderr


# --------------------------------------------------------------------------------------------------------- exceptions


def test_a_user_trusts_a_town_in_the_environment_or_in_the_own_global_file(town: Path, tmp_path: Path) -> None:
    own(town)
    alias = tmp_path / 'alias'
    alias.symlink_to(town)
    home = tmp_path / 'home'
    (home / '.tt').mkdir(parents=True)
    file = home / '.tt' / 'config.toml'
    ask = ('config', 'name')
    assert run(town, *ask).returncode == 2
    assert run(town, *ask, TINYTOWN_TRUSTED_TOWNS=f'/elsewhere:{alias}').stdout == 'ours\n'
    assert run(town, *ask, TINYTOWN_TRUSTED_TOWNS=f'{town.parent}:{town}/x').returncode == 2
    relative = run(town, *ask, TINYTOWN_TRUSTED_TOWNS='.')
    assert "TINYTOWN_TRUSTED_TOWNS: '.' is not an absolute path" in relative.stderr
    file.write_text(f'max_agents = 7\ntrusted_towns = ["{town}"]\n')
    assert run(town, *ask, HOME=str(home)).stdout == 'ours\n'
    assert run(town, 'config', 'max_agents', HOME=str(home)).stdout == '7\n'
    file.write_text('trusted_towns = "/"\n')
    assert 'trusted_towns: give a list of directories' in run(town, *ask, HOME=str(home)).stderr


def test_a_town_can_not_vouch_for_itself(town: Path) -> None:
    file = town / 'tinytown.toml'
    file.write_text(f'name = "a"\ntrusted_towns = ["{town}"]\n')
    done = run(town, 'status')
    assert done.returncode == 2
    assert "a town can't vouch for itself; move trusted_towns to ~/.tt/config.toml" in done.stderr
    own(town)
    assert 'belongs to uid 54321' in run(town, 'status').stderr


@pytest.mark.parametrize('name', ['.tt', '.tt/config.toml'])
def test_the_global_file_of_another_user_is_not_believed(town: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / '.tt').mkdir()
    (tmp_path / '.tt' / 'config.toml').write_text(f'trusted_towns = ["{town}"]\n')
    os.chown(tmp_path / name, STRANGER, STRANGER)
    for owner in (0, STRANGER):
        own(town, owner)
        done = run(town, 'status', HOME=str(tmp_path))
        assert (done.returncode, done.stdout) == (2, '')
        assert f'{tmp_path / name} belongs to uid 54321, not to root; set HOME' in done.stderr
    os.chown(tmp_path / name, 0, 0)
    (tmp_path / name).chmod(0o777)
    done = run(town, 'status', HOME=str(tmp_path))
    assert f'{tmp_path / name} can be changed by every user of this machine; run chmod o-w ' in done.stderr


# ---------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize('umask', [0o000, 0o002, 0o022, 0o077])
def test_what_init_makes_others_can_not_write_whatever_the_umask_is(directory: Path, umask: int) -> None:
    root = directory / 'new' / 'town'
    done = run(directory, 'init', '--town', str(root), '--cli', 'demo', umask=umask)
    assert done.returncode == 0, done.stderr
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root.parent, root, root / 'tinytown.toml')}
    assert modes == {
        root.parent: 0o755 & ~umask, root: 0o755 & ~umask, root / 'tinytown.toml': 0o644 & ~umask
    }  # fmt: skip
    assert run(root, 'config', 'name').stdout == 'town\n'


def test_init_takes_a_directory_of_ours_from_others_and_says_so(directory: Path) -> None:
    root = directory / 'town'
    root.mkdir()
    root.chmod(0o777)
    os.chown(root, 0, 7777)
    done = run(root, 'init')
    assert done.returncode == 0
    assert f'tt: others could change {root}; did  chmod go-w {root}\n' in done.stderr
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_init_makes_no_town_in_a_sticky_directory_nor_over_a_link(directory: Path) -> None:
    root, victim = directory / 'tmp', directory / 'victim'
    root.mkdir()
    root.chmod(0o1777)
    done = run(root, 'init')
    assert (done.returncode, done.stdout) == (2, '')
    assert f'{root} can be changed by every user of this machine; give the town a directory of its own' in done.stderr
    assert stat.S_IMODE(root.stat().st_mode) == 0o1777
    root.chmod(0o755)
    (root / 'tinytown.toml').symlink_to(victim)
    assert 'holds a town already' in run(root, 'init').stderr
    assert not victim.exists()


@pytest.mark.parametrize('name', ['.tt', '.tt/logs', '.tt/.gitignore'])
def test_init_of_root_in_a_stranger_s_directory_follows_none_of_their_links(directory: Path, name: str) -> None:
    root, ours = directory / 'theirs', directory / 'ours'
    root.mkdir()
    ours.mkdir(mode=0o755)
    (ours / 'file').write_text('kept')
    if name != '.tt':
        (root / '.tt').mkdir()
    (root / name).symlink_to(ours / 'file' if 'git' in name else ours)
    own(root)
    before = tree(ours), ours.stat().st_mode, ours.stat().st_uid
    run(root, 'init')
    assert (tree(ours), ours.stat().st_mode, ours.stat().st_uid) == before
    assert (ours / 'file').read_text() == 'kept'
