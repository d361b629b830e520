"""The `__main__` of townhall.pyz and tt.pyz: unpacks the archive once, and runs the unpacked program.

The archive is unpacked into a directory of the user, named by the digest of its content. A running town does not notice
when its .pyz is replaced or removed: late imports and new workers come from the unpacked version. Unpacked, libraries
and programs are files, which the system needs to load them, and Python can cache its bytecode.
"""

import os
import sys
from errno import EPERM
from pathlib import Path

MODULE = 'tinytown.townhall.main'  # the build sets MODULE and CONTENT
CONTENT = ''
OPEN_TO_OTHERS = 0o022


def main() -> int:
    program = Path(sys.argv[0]).name
    if sys.version_info < (3, 11):  # noqa: UP036
        ours = sys.version.split()[0]
        sys.exit(
            f'{program}: Python 3.11 or newer is needed, this is {ours}; start it with another:  python3.13 {program}'
        )
    try:
        sys.path[0] = str(unpacked(sys.path[0]))
    except (OSError, ValueError) as e:  # ValueError: the archive is damaged
        sys.exit(f'{program}: unpacking failed: {e}')
    from importlib import import_module

    return int(import_module(MODULE).main())


def unpacked(archive: str) -> Path:
    """The directory with the unpacked archive. Raises OSError that names every place that failed; ValueError."""
    failed = []
    for place in places():
        try:
            claim(place)
            if not (place / CONTENT).is_dir():
                unpack(archive, place / CONTENT)
            return place / CONTENT
        except OSError as e:
            failed.append(f'{place}: {e.strerror}')
    raise OSError(f'{"; ".join(failed)}; make room, or set XDG_CACHE_HOME to a directory that only you can write to')


# The annotation is quoted, so that a Python that is too old gets as far as the message above.
def places() -> 'list[Path]':
    """Where to unpack, best first: the user's cache (XDG Base Directory), or a temporary directory."""
    given, home = Path(os.environ.get('XDG_CACHE_HOME', '')), Path(os.path.expanduser('~'))  # noqa: PTH111
    cache = given if given.is_absolute() else home / '.cache'
    temporary = Path(os.environ.get('TMPDIR') or '/tmp')  # noqa: S108
    kept = [cache / 'tinytown'] if cache.is_absolute() else []  # without HOME and a user name, ~ stays ~
    return [*kept, temporary / f'tinytown-{os.getuid()}']


def claim(place: Path) -> None:
    """Makes a directory, or checks that only we can write to it, because we run its files. Raises OSError."""
    place.mkdir(0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & OPEN_TO_OTHERS or place.is_symlink():
        raise PermissionError(EPERM, 'other users can write to it')


def unpack(archive: str, directory: Path) -> None:
    """Unpacks next to `directory`, then renames: another process sees all of it or nothing.

    Raises OSError, or ValueError if the archive is damaged.
    """
    import shutil
    import tempfile
    import zlib
    from zipfile import BadZipFile, ZipFile

    draft = Path(tempfile.mkdtemp(prefix='new-', dir=directory.parent))  # 0700
    try:
        with ZipFile(archive) as opened:
            for info in opened.infolist():
                if info.filename != '__main__.py':
                    write(draft / info.filename, opened.read(info), info.external_attr >> 16 & 0o777)
        for inner in (path for path in draft.rglob('*') if path.is_dir()):
            inner.chmod(0o755)  # whatever the umask is
        draft.chmod(0o755)  # the directory above controls access: 0700, or as its owner set it
        try:
            draft.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster
                raise
    except (BadZipFile, zlib.error) as e:
        raise ValueError(f'{archive} is damaged ({e}); copy it here again') from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(file: Path, data: bytes, mode: int) -> None:
    """Writes a file and syncs it: after a power failure it is complete, or its directory does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), 'wb') as opened:
        os.fchmod(opened.fileno(), mode)  # whatever the umask is
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


if __name__ == '__main__':
    sys.exit(main())
