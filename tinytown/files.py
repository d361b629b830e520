"""Opens and writes files: never through another user's symbolic link, and never half of a text.

`open_own` opens every file in a town's `.tt` that is written in place, or locked. `write_atomically` replaces a file: a
reader sees the old or the new text, even if the writer is killed halfway.

A file that root writes gets the owner of the old file or of the directory, so another user's town stays that user's.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path


def open_own(file: Path, flags: int, mode: int = 0o600) -> int:
    """Opens a file in a town's `.tt` and returns its descriptor. Takes what `os.open` takes.

    Raises OSError, and changes nothing, unless it is a regular file that belongs to us, root or the directory's owner.
    """
    kept = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(file, kept | os.O_NONBLOCK, mode)  # opening a named pipe would block
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise _not_regular(file) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(file)
        if status.st_uid not in (os.geteuid(), 0, file.parent.stat().st_uid):
            raise PermissionError(errno.EPERM, 'it belongs to another user; remove it', str(file))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
        os.set_blocking(descriptor, not flags & os.O_NONBLOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _not_regular(file: Path) -> OSError:
    return OSError(errno.ELOOP, 'it is a symbolic link or no regular file, and is not opened; remove it', str(file))


def write_once(file: Path, text: str) -> str:
    """The content of a file. If there is none, writes `text` to it first (mode 0600).

    If two processes write at once, both get the text of the first.
    """
    if not file.exists():
        draft = file.with_name(f'{file.name}.{os.getpid()}.{threading.get_ident()}')
        write_atomically(draft, text, 0o600)
        try:
            os.link(draft, file)
        except FileExistsError:
            pass
        draft.unlink()
    with os.fdopen(open_own(file, os.O_RDONLY), encoding='utf-8') as opened:
        return opened.read()


def write_atomically(file: Path, text: str, mode: int = 0o644, keep_mode: bool = True, keep_owner: bool = True) -> None:
    """Replaces a file in one step: a reader sees the old or the new text.

    Replaces a symbolic link, and never writes through it; a caller that means the link's target resolves it. Keeps the
    mode of an old file unless `keep_mode` is false. If root writes, the file gets the owner of the old file, or of the
    directory, unless `keep_owner` is false.
    """
    old = _regular(file)
    draft = file.with_name(f'.{file.name}.{os.getpid()}')
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # O_EXCL: never another file
    try:
        with os.fdopen(descriptor, 'w', encoding='utf-8', newline='') as out:
            if keep_owner:
                _copy_owner(descriptor, old or file.parent.stat())
            if keep_mode and old:
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            out.write(text)
            out.flush()
            os.fsync(descriptor)
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _regular(file: Path) -> os.stat_result | None:
    """The status of a regular file; None if there is none, or anything else, such as a symbolic link."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def make_directory(directory: Path) -> None:
    """Makes a directory of mode 0700, unless it exists. If root makes it, it gets the owner of its parent directory.

    Raises OSError if what exists is no directory, or if it belongs to a stranger. A symbolic link must be ours, or
    belong to the owner of its target.
    """
    parent = directory.parent.stat()
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        link, status = directory.lstat(), directory.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise
        us = os.geteuid(), 0
        if status.st_uid not in (*us, parent.st_uid) or link.st_uid not in (*us, status.st_uid):
            raise PermissionError(errno.EPERM, 'it belongs to another user; remove it', str(directory)) from None
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _copy_owner(descriptor, parent)
    finally:
        os.close(descriptor)


def _copy_owner(descriptor: int, owner: os.stat_result) -> None:
    """Gives an open file the owner of another one, if we are root: another user's town stays that user's."""
    if os.geteuid() == 0 and owner.st_uid:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
