"""The files of a town's `.tt`: what is written in place or locked is a regular file of ours, never a link's target."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tinytown.auth.audit import Audit
from tinytown.errors import UsageError
from tinytown.files import make_directory, open_own, write_atomically, write_once
from tinytown.host import managed_redis, report_spool
from tinytown.host.processes import hold, is_held, start_detached
from tinytown.host.town_dir import TownDir
from tinytown.redaction import Secrets
from tinytown.worker.cli_run import RunLog
from tinytown.worker.main import install_tt

from ..support import Place

STRANGER = 54321


@pytest.fixture
def victim(directory: Path) -> Path:
    file = directory / 'victim'
    file.write_text('kept')
    file.chmod(0o600)
    return file


def unchanged(victim: Path) -> bool:
    return victim.read_text() == 'kept' and victim.stat().st_mode & 0o777 == 0o600


OPENED: dict[str, Callable[[Path, TownDir], object]] = {
    'redis.lock': lambda root, _: managed_redis._StartLock(root).__enter__(),
    'redis.log': lambda root, town_dir: start_detached(['true'], root, {}, town_dir.redis_log),
    'townhall.log': lambda root, town_dir: start_detached(['true'], root, {}, town_dir.townhall_log),
    'logs/a.log': lambda _, town_dir: RunLog(town_dir.log('a'), 1000, Secrets([])),
    'agents/a.process': lambda _, town_dir: hold(town_dir.process('a')),
    'town-id': lambda _, town_dir: write_once(town_dir.identity, 'mine'),
    'token-key': lambda _, town_dir: write_once(town_dir.token_key, 'mine'),
    'agents/a.prompt': lambda _, town_dir: open_own(town_dir.prompt('a'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    'audit.jsonl': lambda _, town_dir: Audit(town_dir.path / 'audit.jsonl', 1000),
    'audit.denied.jsonl': lambda _, town_dir: Audit(town_dir.path / 'audit.jsonl', 1000),
}


@pytest.mark.parametrize('kind', ['link', 'dangling link', 'pipe', 'file of a stranger'])
@pytest.mark.parametrize('name', OPENED)
def test_a_file_that_is_not_a_regular_one_of_ours_is_not_opened(
    directory: Path, victim: Path, name: str, kind: str
) -> None:
    town_dir = TownDir(directory).create()
    file = town_dir.path / name
    if kind == 'pipe':
        os.mkfifo(file)
    elif kind == 'file of a stranger':
        file.write_text('theirs')
        os.chown(file, STRANGER, STRANGER)
    else:
        file.symlink_to(victim if kind == 'link' else directory / 'missing')
    before = file.lstat()
    with pytest.raises((OSError, UsageError)) as refused:
        OPENED[name](directory, town_dir)
    assert 'remove it' in str(refused.value)
    assert str(file) in str(refused.value)
    assert unchanged(victim)
    assert not (directory / 'missing').exists()
    after = file.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


def test_the_files_of_a_trusted_town_s_owner_are_opened(directory: Path) -> None:
    file = directory / 'f'
    file.write_text('theirs')
    for path in (file, directory):
        os.chown(path, STRANGER, STRANGER)
    os.close(open_own(file, os.O_RDWR | os.O_TRUNC))
    assert not file.read_text()


def test_an_opened_file_blocks_and_is_not_inherited(directory: Path) -> None:
    descriptor = open_own(directory / 'f', os.O_WRONLY | os.O_CREAT)
    assert os.get_blocking(descriptor)
    assert not os.get_inheritable(descriptor)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)


def test_a_replaced_link_leaves_its_target_alone(directory: Path, victim: Path) -> None:
    link = directory / 'link'
    link.symlink_to(victim)
    write_atomically(link, 'new', 0o600)
    assert unchanged(victim)
    assert (link.is_symlink(), link.read_text(), link.stat().st_mode & 0o777) == (False, 'new', 0o600)


def test_a_lock_that_can_not_be_opened_tells_nothing_of_a_process(directory: Path, victim: Path) -> None:
    (directory / 'note').symlink_to(victim)
    assert is_held(directory / 'note') is None


@pytest.mark.parametrize('name', ['.', 'logs', 'redis', 'agents', 'run'])
def test_a_directory_in_tt_is_not_a_stranger_s_link(directory: Path, name: str) -> None:
    elsewhere, path = directory / 'elsewhere', directory / '.tt' / name
    elsewhere.mkdir(mode=0o755)
    if name != '.':
        (directory / '.tt').mkdir()
    path = directory / '.tt' if name == '.' else path
    path.symlink_to(elsewhere)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(PermissionError, match='remove it'):
        TownDir(directory).create()
    assert elsewhere.stat().st_mode & 0o777 == 0o755
    assert not list(elsewhere.iterdir())
    os.chown(path, 0, 0, follow_symlinks=False)
    TownDir(directory).create()  # a link of ours, to a bigger disk


def test_the_directories_of_a_spool_and_of_programs_are_not_links_of_strangers(directory: Path) -> None:
    town_dir = TownDir(directory).create()
    elsewhere = directory / 'elsewhere'
    elsewhere.mkdir()
    uses: dict[Path, Callable[[], object]] = {
        town_dir.spool('a'): lambda: report_spool.keep(directory, 'a', {'task': 't', 'attempt': 1}),
        town_dir.programs: lambda: install_tt(directory),
    }
    for path, use in uses.items():
        path.symlink_to(elsewhere)
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
        with pytest.raises(PermissionError, match='remove it'):
            use()
    assert not list(elsewhere.iterdir())
    (directory / 'f').touch()
    with pytest.raises(FileExistsError):
        make_directory(directory / 'f')


def test_a_redis_of_a_long_path_is_not_sought_in_a_link_below_tmp(directory: Path) -> None:
    root = directory / ('d' * 100)
    root.mkdir()
    socket = managed_redis.socket_path(root)
    socket.parent.rmdir()
    elsewhere = directory / 'elsewhere'
    elsewhere.mkdir()
    socket.parent.symlink_to(elsewhere)
    try:
        with pytest.raises(UsageError, match='belongs to another user'):
            managed_redis.socket_path(root)
    finally:
        socket.parent.unlink()


def test_a_link_in_tt_ends_the_start_with_one_line(place: Place, victim: Path) -> None:
    (place.root / '.tt').mkdir(exist_ok=True)
    (place.root / '.tt' / 'redis.lock').symlink_to(victim)
    done = place.tt('start', check=False)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith(f'tt: {place.root}/.tt/redis.lock: it is a symbolic link')
    assert done.stderr.count('\n') == 1
    assert unchanged(victim)
