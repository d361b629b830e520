"""The `__main__` of townhall.pyz and tt.pyz: unpacks what lies beside it, once, and runs from there.

It is unpacked into a directory of the user's own that is named by the digest of its content. So a running town does not
notice when its .pyz is replaced or removed: what is imported late, and the workers that are started, come from the
version that runs. There libraries and programs are files, as the system wants them, and Python keeps its bytecode.
"""

import os
import sys
from errno import EPERM
from pathlib import Path

MODULE = 'tinytown.townhall.main'  # the build writes these two
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
    except (OSError, ValueError) as e:  # ValueError: what zipimport took is no whole archive
        sys.exit(f'{program}: it can not be unpacked: {e}')
    from importlib import import_module

    return int(import_module(MODULE).main())


def unpacked(archive: str) -> Path:
    """The directory with what is in the archive. Raises OSError that says what is wrong with each place, ValueError."""
    failed = []
    for place in places():
        try:
            claim(place)
            if not (place / CONTENT).is_dir():
                unpack(archive, place / CONTENT)
            return place / CONTENT
        except OSError as e:
            failed.append(f'{place}: {e.strerror}')
    raise OSError(f'{"; ".join(failed)}; make room, or set XDG_CACHE_HOME to a directory that you alone may write to')


# Quoted, because a Python that is too old must come as far as to be told so.
def places() -> 'list[Path]':
    """Where it may be unpacked, best first: the user's cache (XDG Base Directory), or a temporary directory."""
    given, home = Path(os.environ.get('XDG_CACHE_HOME', '')), Path(os.path.expanduser('~'))  # noqa: PTH111
    cache = given if given.is_absolute() else home / '.cache'
    temporary = Path(os.environ.get('TMPDIR') or '/tmp')  # noqa: S108
    kept = [cache / 'tinytown'] if cache.is_absolute() else []  # a user without a name or HOME has no home: it stays ~
    return [*kept, temporary / f'tinytown-{os.getuid()}']


def claim(place: Path) -> None:
    """Makes a directory, or sees that it is ours alone: what lies in it is run. Raises OSError."""
    place.mkdir(0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & OPEN_TO_OTHERS or place.is_symlink():
        raise PermissionError(EPERM, 'it is open to others')


def unpack(archive: str, directory: Path) -> None:
    """Unpacks it beside its place and moves it there: another process sees all of it or nothing.

    Raises OSError, and ValueError for an archive that is damaged.
    """
    import shutil
    import tempfile
    import zlib
    from zipfile import BadZipFile, ZipFile

    draft = Path(tempfile.mkdtemp(prefix='new-', dir=directory.parent))  # 0700
    try:
        with ZipFile(archive) as opened:
            for each in opened.infolist():
                if each.filename != '__main__.py':
                    write(draft / each.filename, opened.read(each), each.external_attr >> 16 & 0o777)
        for inner in (each for each in draft.rglob('*') if each.is_dir()):
            inner.chmod(0o755)  # whatever the umask is
        draft.chmod(0o755)  # who may come near it says the directory above: 0700, or what its owner gave it
        try:
            draft.rename(directory)
        except OSError:
            if not directory.is_dir():  # else someone was faster
                raise
    except (BadZipFile, zlib.error) as e:
        raise ValueError(f'{archive} is damaged ({e}); copy it here again') from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(file: Path, data: bytes, mode: int) -> None:
    """Writes a file, and to the disk: after a power failure it is whole, or its directory is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), 'wb') as opened:
        os.fchmod(opened.fileno(), mode)  # whatever the umask is
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


if __name__ == '__main__':
    sys.exit(main())
