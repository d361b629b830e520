"""The `__main__` of townhall.pyz and tt.pyz: unpacks what lies beside it, once, and runs from there.

It is unpacked into a directory of the user's own that is named by the digest of its content. So a running town does not
notice when its .pyz is replaced or removed: what is imported late, and the workers that are started, come from the
version that runs. There libraries and programs are files, as the system wants them, and Python keeps its bytecode.
"""

import os
import sys
from pathlib import Path

MODULE = 'tinytown.townhall'  # the build writes these two
CONTENT = ''
OPEN_TO_OTHERS = 0o022


def main() -> int:
    program = Path(sys.argv[0]).name
    if sys.version_info < (3, 11):  # noqa: UP036
        ours = sys.version.split()[0]
        sys.exit(
            f'{program}: Python 3.11 or newer is needed, this is {ours}; start it with that:  python3.13 {program}'
        )
    try:
        sys.path[0] = str(unpacked(sys.path[0]))
    except OSError as e:
        sys.exit(
            f'{program}: it can not be unpacked: {e}; set XDG_CACHE_HOME to a directory that you alone may write to'
        )
    from importlib import import_module

    return int(import_module(MODULE).main())


def unpacked(archive: str) -> Path:
    """The directory with what is in the archive. Raises OSError of the last place that was tried."""
    error = OSError('there is no place for it')
    for place in places():
        try:
            claim(place)
            if not (place / CONTENT).is_dir():
                unpack(archive, place / CONTENT)
            return place / CONTENT
        except OSError as e:
            error = e
    raise error


# Quoted, because a Python that is too old must come as far as to be told so.
def places() -> 'tuple[Path, Path]':
    """Where it may be unpacked, best first: the user's cache (XDG Base Directory), or a temporary directory."""
    given = Path(os.environ.get('XDG_CACHE_HOME', ''))
    cache = given if given.is_absolute() else Path('~/.cache').expanduser()
    temporary = Path(os.environ.get('TMPDIR') or '/tmp')  # noqa: S108
    return cache / 'tinytown', temporary / f'tinytown-{os.getuid()}'


def claim(place: Path) -> None:
    """Makes a directory, or sees that it is ours alone: what lies in it is run. Raises OSError."""
    place.mkdir(0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & OPEN_TO_OTHERS or place.is_symlink():
        raise PermissionError(f'{place} is open to others')


def unpack(archive: str, directory: Path) -> None:
    """Unpacks it beside its place and moves it there: another process sees all of it or nothing. Raises OSError."""
    import shutil
    import tempfile
    from zipfile import ZipFile

    draft = Path(tempfile.mkdtemp(prefix='new-', dir=directory.parent))  # 0700
    try:
        with ZipFile(archive) as opened:
            for each in opened.infolist():
                if each.filename != '__main__.py':
                    write(draft / each.filename, opened.read(each), each.external_attr >> 16 & 0o777)
        draft.chmod(0o755)  # who may come near it says the directory above: 0700, or what its owner gave it
        try:
            draft.rename(directory)
        except OSError:
            if not directory.is_dir():  # else someone was faster
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(file: Path, data: bytes, mode: int) -> None:
    """Writes a file, and to the disk: after a power failure it is whole, or its directory is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), 'wb') as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


if __name__ == '__main__':
    sys.exit(main())
