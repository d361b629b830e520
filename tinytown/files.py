"""Writes files atomically: a reader sees the old or the new text, even if the writer is killed halfway.

A file that root writes gets the owner of the old file or of the directory, so another user's town stays that user's.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path


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
    return file.read_text()


def write_atomically(file: Path, text: str, mode: int = 0o644, keep_mode: bool = True, keep_owner: bool = True) -> None:
    """Replaces a file in one step: a reader sees the old or the new text.

    Follows a symbolic link. Keeps the mode of an old file unless `keep_mode` is false. If root writes, the file gets
    the owner of the old file, or of the directory, unless `keep_owner` is false.
    """
    file = Path(os.path.realpath(file))
    draft = file.with_name(f'.{file.name}.{os.getpid()}')
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # O_EXCL: never another file
    try:
        with os.fdopen(descriptor, 'w', encoding='utf-8', newline='') as out:
            if keep_owner:
                _copy_owner(descriptor, file if file.exists() else file.parent)
            if keep_mode and file.exists():
                os.fchmod(descriptor, stat.S_IMODE(file.stat().st_mode))
            out.write(text)
            out.flush()
            os.fsync(descriptor)
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def make_directory(directory: Path) -> None:
    """Makes a directory of mode 0700, unless it exists. If root makes it, it gets the owner of its parent directory."""
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _copy_owner(descriptor, directory.parent)
    finally:
        os.close(descriptor)


def _copy_owner(descriptor: int, source: Path) -> None:
    """Gives an open file the owner of `source`, if we are root: another user's town stays that user's."""
    owner = source.stat()
    if os.geteuid() == 0 and owner.st_uid:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
