"""`make bundle`: builds a tarball that installs Townhall on a Linux machine without a network.

It contains the wheel of Townhall, the wheels of its dependencies for every supported Python, pip, and install.sh. The
file wheels.sha256, in the format of sha256sum, pins the wheels. With --wheels DIR they are taken from there and nothing
is downloaded. Otherwise pip downloads the missing ones into build/wheels.
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
    options.add_argument('--wheels', type=Path, metavar='DIR', help='take the wheels from there and download nothing')
    options.add_argument('--machine', default=os.uname().machine, help='x86_64 or aarch64 (default: this machine)')
    options.add_argument('--out', type=Path, metavar='DIR', default=REPOSITORY / 'dist')
    arguments = options.parse_args()
    bundle = build(arguments.out, arguments.machine, arguments.wheels)
    print(f'{bundle}: {bundle.stat().st_size:,} bytes')


def build(out: Path, machine: str, wheels: Path | None = None) -> Path:
    """Builds the tarball for a machine into `out`. Raises SystemExit if a wheel is missing or has another digest."""
    wanted = locked(machine)
    if wheels is None:
        for name in wanted:
            if not (CACHE / name).exists():
                _download(name)
    dependencies = [_checked((wheels or CACHE) / name, digest) for name, digest in wanted.items()]
    with tempfile.TemporaryDirectory() as directory:
        wheel = build_wheel(Path(directory))
        version = wheel.name.split('-')[1]
        members = [Member(f'wheels/{file.name}', file.read_bytes()) for file in (wheel, *dependencies)]
    members += [_beside(REPOSITORY / name) for name in BESIDE]
    members += [Member('version', f'{version}\n'.encode())]
    sums = ''.join(f'{hashlib.sha256(member.data).hexdigest()}  {member.name}\n' for member in sorted(members))
    members += [Member('SHA256SUMS', sums.encode())]
    out.mkdir(parents=True, exist_ok=True)
    return _write(out / f'townhall-{version}-linux-{machine}.tar.gz', f'townhall-{version}', members)


def locked(machine: str) -> dict[str, str]:
    """The SHA-256 of the wheels for a machine, by file name. Raises SystemExit if there are none for it."""
    lines = (line.split() for line in LOCK.read_text().splitlines())
    wheels = {name: digest for digest, name in lines if name.endswith(('-any.whl', f'_{machine}.whl'))}
    if not any(name.endswith(f'_{machine}.whl') for name in wheels):
        sys.exit(f'{LOCK} lists no wheels for {machine}')
    return wheels


def _checked(file: Path, digest: str) -> Path:
    if not file.exists():
        sys.exit(f'{file} is missing; put it there, or run without --wheels')
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        sys.exit(f'{file} does not have the digest in {LOCK}; remove it')
    return file


def _download(name: str) -> None:
    """Downloads one wheel with pip, for the machine and Python in its name (PEP 427)."""
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
