"""`make bundle`: one tarball that installs Townhall on a Linux machine without a network.

It holds the wheel, those of all that it needs for every Python it runs on, pip, and install.sh. Which wheels these are,
to the byte, says wheels.sha256 (as sha256sum reads it). They come from --wheels DIR, and nothing is downloaded; without
that, those that are not in build/wheels are downloaded into it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from dist import REPOSITORY, Member, build_wheel, moment

CACHE: Final = REPOSITORY / 'build' / 'wheels'
LOCK: Final = REPOSITORY / 'deploy' / 'wheels.sha256'
BESIDE: Final = ('LICENSE', 'deploy/install.sh', 'docs/install.md')


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--wheels', type=Path, metavar='DIR', help='where the wheels are; nothing is downloaded then')
    options.add_argument('--machine', default=os.uname().machine, help='x86_64 or aarch64 (default: that of this one)')
    options.add_argument('--out', type=Path, metavar='DIR', default=REPOSITORY / 'dist')
    arguments = options.parse_args()
    made = build(arguments.out, arguments.machine, arguments.wheels)
    print(f'{made}: {made.stat().st_size:,} bytes')


def build(out: Path, machine: str, wheels: Path | None = None) -> Path:
    """Builds the tarball for a machine into a directory. Raises SystemExit for a wheel that is missing or another."""
    wanted = locked(machine)
    if wheels is None:
        for name in wanted:
            if not (CACHE / name).exists():
                _download(name)
    found = [_checked((wheels or CACHE) / name, digest) for name, digest in wanted.items()]
    with tempfile.TemporaryDirectory() as directory:
        ours = build_wheel(Path(directory))
        version = ours.name.split('-')[1]
        members = [Member(f'wheels/{file.name}', file.read_bytes()) for file in (ours, *found)]
    members += [_beside(REPOSITORY / name) for name in BESIDE]
    members += [Member('version', f'{version}\n'.encode())]
    sums = ''.join(f'{hashlib.sha256(each.data).hexdigest()}  {each.name}\n' for each in sorted(members))
    members += [Member('SHA256SUMS', sums.encode())]
    out.mkdir(parents=True, exist_ok=True)
    return _write(out / f'townhall-{version}-linux-{machine}.tar.gz', f'townhall-{version}', members)


def locked(machine: str) -> dict[str, str]:
    """The wheels for a machine, by name, with their SHA-256. Raises SystemExit where there are none for it."""
    lines = (line.split() for line in LOCK.read_text().splitlines())
    found = {name: digest for digest, name in lines if name.endswith(('-any.whl', f'_{machine}.whl'))}
    if not any(name.endswith(f'_{machine}.whl') for name in found):
        sys.exit(f'{LOCK} names no wheels for {machine}')
    return found


def _checked(file: Path, digest: str) -> Path:
    if not file.exists():
        sys.exit(f'{file} is missing; download it there, or leave --wheels out')
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        sys.exit(f'{file} is another file than {LOCK} says; remove it')
    return file


def _download(name: str) -> None:
    """Has pip download one wheel, for whatever machine and Python its name says (PEP 427)."""
    package, version, python, abi, platforms = name.removesuffix('.whl').split('-')
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps']
    command += ['--only-binary', ':all:', '--dest', str(CACHE)]
    if abi != 'none':
        command += ['--implementation', 'cp', '--abi', abi, '--python-version', f'3.{max(int(python[3:]), 11)}']
    for platform in platforms.split('.'):
        command += ['--platform', platform]
    subprocess.run([*command, f'{package}=={version}'], check=True)


def _beside(file: Path) -> Member:
    return Member(file.name, file.read_bytes(), executable=file.suffix == '.sh')


def _write(file: Path, top: str, members: list[Member]) -> Path:
    draft = file.with_suffix('.new')
    with (
        open(draft, 'wb') as opened,
        gzip.GzipFile('', 'wb', 9, opened, mtime=moment()) as packed,
        tarfile.open(fileobj=packed, mode='w', format=tarfile.USTAR_FORMAT) as archive,
    ):
        for member in sorted(members):
            info = tarfile.TarInfo(f'{top}/{member.name}')
            info.size, info.mode, info.mtime = len(member.data), member.mode, moment()
            archive.addfile(info, io.BytesIO(member.data))
    return draft.replace(file)


if __name__ == '__main__':
    main()
