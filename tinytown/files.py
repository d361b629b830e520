"""Files of ours on disk: written in one step, so that whoever reads or is killed meanwhile never sees half of one.

What root writes belongs to the owner of what was there: a town of another user stays that user's.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path


def write_once(file: Path, text: str) -> str:
    """What a file of mode 0600 holds, which is `text` if there was none; of two who write both take the first's."""
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
    """Replaces a file in one step, so that a reader sees the old or the new text.

    Follows a symbolic link, and keeps the mode of an old file unless `keep_mode` is false. What root writes belongs to
    the owner of the old file, or of the directory, unless `keep_owner` is false.
    """
    file = Path(os.path.realpath(file))
    draft = file.with_name(f'.{file.name}.{os.getpid()}')
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # no other file is written to, or given
    try:
        with os.fdopen(descriptor, 'w', encoding='utf-8', newline='') as out:
            if keep_owner:
                _give(descriptor, file if file.exists() else file.parent)
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
    """Makes a directory of mode 0700 unless it is there. One that root makes belongs to the owner of that around it."""
    try:
        directory.mkdir(0o700)
    except FileExistsError:
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _give(descriptor, directory.parent)
    finally:
        os.close(descriptor)


def _give(descriptor: int, like: Path) -> None:
    """Has what root has made belong to the owner of another file: a town of another user stays that user's."""
    owner = like.stat()
    if os.geteuid() == 0 and owner.st_uid:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
