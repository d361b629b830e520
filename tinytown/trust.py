"""Decides whether the files of a town may be believed: a town's configuration names programs that run as its caller.

The rule: the town's directory, its `tinytown.toml` and its `.tt` belong to the caller or to root, and nobody else may
write to them. A user allows a town that breaks the rule by its path, in `trusted_towns` of `~/.tt/config.toml` or in
TINYTOWN_TRUSTED_TOWNS. The town's own file can't do that. `check_town` is the one check: `host.town_dir.find` calls it
for every command line, and `config.load` for every process that is given a town.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .errors import UsageError

FILE: Final = 'tinytown.toml'
DIRECTORY: Final = '.tt'
USER_FILE: Final = '.tt/config.toml'  # in the home directory: for all towns of a user
SETTING: Final = 'trusted_towns'
VARIABLE: Final = 'TINYTOWN_TRUSTED_TOWNS'


def check_town(root: Path, uid: int | None = None, environ: Mapping[str, str] | None = None) -> None:
    """Raises UsageError unless user `uid` (default: the caller) may believe the town in `root`, or has trusted it."""
    uid = os.geteuid() if uid is None else uid
    environ = os.environ if environ is None else environ
    for path in (root / FILE, root, root / DIRECTORY):
        if (owner := foreign_owner(path, uid)) is not None:
            why = _foreign(root, path, owner, uid)
        elif mode := shared_mode(path):
            why = _shared(root, path, mode)
        else:
            continue
        if not is_trusted(root, uid, environ):
            raise UsageError(why)


def check_user_file(file: Path, uid: int) -> None:
    """Raises UsageError if another user than `uid` and root owns, or may write to, a `~/.tt/config.toml`."""
    for path in (file, file.parent):
        if (owner := foreign_owner(path, uid)) is not None:
            raise UsageError(
                f'{path} belongs to {user_name(owner)}, not to {user_name(uid)}; set HOME to the home directory of '
                f'{user_name(uid)}, as  sudo -H  does'
            )
        if mode := shared_mode(path):
            raise UsageError(f'{path} can be changed by {_writers(path, mode)}; run  chmod {mode} {path}')


def foreign_owner(path: Path, uid: int) -> int | None:
    """The owner of a file or directory if that is neither `uid` nor root, else None. A link and its target count."""
    for status in _statuses(path):
        if status.st_uid not in (uid, 0):
            return status.st_uid
    return None


def shared_mode(path: Path) -> str:
    """The chmod mode that takes a file or directory from other users who may write to it; '' if nobody else may.

    The owner's private group is nobody else: its id is that of the owner, and it has no other members. Distributions
    that give each user such a group set the umask to 002.
    """
    status = next(reversed([*_statuses(path)]), None)
    if status is None:
        return ''
    group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid, status.st_uid)
    other = status.st_mode & stat.S_IWOTH
    return ('g' if group else '') + ('o' if other else '') + '-w' if group or other else ''


def is_trusted(root: Path, uid: int, environ: Mapping[str, str]) -> bool:
    """Whether the user has trusted the town in `root` by its path. Raises UsageError if the user's list is wrong."""
    allowed = [part for part in environ.get(VARIABLE, '').split(os.pathsep) if part]
    trusted = trusted_towns(allowed, VARIABLE)
    if home := environ.get('HOME'):
        file = Path(home, USER_FILE)
        if file.is_file():
            check_user_file(file, uid)
            try:
                given = tomllib.loads(file.read_text('utf-8-sig')).get(SETTING, [])
            except (OSError, ValueError) as e:
                raise UsageError(f'{file}: {e}') from None
            trusted += trusted_towns(given, f'{file}: {SETTING}')
    return os.path.realpath(root) in map(os.path.realpath, trusted)


def trusted_towns(given: Any, source: str) -> list[str]:
    """The directories in a list of trusted towns. Raises UsageError, naming `source`, unless all paths are absolute."""
    if not isinstance(given, list) or not all(isinstance(path, str) for path in given):
        raise UsageError(f'{source}: give a list of directories, as in  {SETTING} = ["/srv/town"]')
    paths = [os.path.expanduser(path) for path in given]  # noqa: PTH111  Path.expanduser raises for a missing home
    if relative := next((path for path in paths if not path.startswith('/')), None):
        raise UsageError(f'{source}: {relative!r} is not an absolute path; give paths that begin with /')
    return paths


def owner_for_root(root: Path) -> int:
    """The user for whom root asks about, or makes, a town in `root`: the owner of that directory. Else the caller."""
    try:
        return os.geteuid() or root.stat().st_uid
    except OSError:
        return os.geteuid()


def user_name(uid: int) -> str:
    """The name of a user, or `uid 54321` if it has none."""
    import pwd  # late: most processes name nobody

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f'uid {uid}'


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """The status of `path` and, if it is a symbolic link, of its target; nothing for what is missing."""
    try:
        status = path.lstat()
        yield status
        if stat.S_ISLNK(status.st_mode):
            yield path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return


def _is_private(gid: int, uid: int) -> bool:
    if gid != uid:
        return False
    import grp  # late: few files are writable for their group

    try:
        return set(grp.getgrgid(gid).gr_mem) <= {user_name(uid)}
    except KeyError:
        return True


def _foreign(root: Path, path: Path, owner: int, uid: int) -> str:
    name = user_name(owner)
    text = f'{path} belongs to {name}, and {user_name(uid)} would run what that user wrote there'
    trust = f'if you trust {name}, add  {SETTING} = ["{root}"]  to ~/{USER_FILE}'
    if uid == 0 and not name.startswith('uid '):
        return f'{text}; {trust}; or run this as that user:  sudo -u {name} …'
    return f'{text}; {trust}; or use a town of your own:  --town DIR  or  tt init'


def _shared(root: Path, path: Path, mode: str) -> str:
    text = f'{path} can be changed by {_writers(path, mode)}'
    if path.stat().st_mode & stat.S_ISVTX:
        return f'{text}; give the town a directory of its own, as in  tt init --town {root / "town"}'
    return f'{text}; run  chmod {mode} {path}'


def _writers(path: Path, mode: str) -> str:
    if 'o' in mode:
        return 'every user of this machine'
    import grp

    gid = path.stat().st_gid
    try:
        return f'the group {grp.getgrgid(gid).gr_name}'
    except KeyError:
        return f'the group {gid}'
