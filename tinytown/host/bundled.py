"""Finds the compiled files of other projects in a one-file build: argon2's library and a Valkey server.

The build stores each file in `native/` beside this package, in a directory named after the platform tag of the wheel
that the file came from (PEP 425, 427, 600, 656): `native/manylinux_2_28_x86_64/valkey-server`. An installation with pip
has no such directory. `managed_redis` and `auth.argon2id` ask here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

NATIVE: Final = Path(__file__).parents[2] / 'native'
_TAG: Final = re.compile(r'(manylinux|musllinux|macosx)_(\d+)_(\d+)_(\w+)')


def find_bundled(name: str, directory: Path = NATIVE) -> Path | None:
    """Returns the file of that name that was built for this machine, or None."""
    candidates = sorted(directory.glob(f'*/{name}'))
    return next((file for file in candidates if fits_platform(file.parent.name)), None)


def fits_platform(tag: str) -> bool:
    """Whether a file with that platform tag runs on this machine: its system, processor, and C library or release."""
    match = _TAG.fullmatch(tag)
    if not match:
        return False
    system, major, minor, machine = match.groups()
    oldest, ours = (int(major), int(minor)), os.uname().machine
    if system == 'macosx':
        return sys.platform == 'darwin' and machine in (ours, 'universal2') and oldest <= _macos()
    if sys.platform != 'linux' or machine != ours:
        return False
    glibc = _glibc()
    return oldest <= glibc if system == 'manylinux' else not any(glibc)


def _glibc() -> tuple[int, int]:
    """The version of glibc; (0, 0) if this system uses another C library, most likely musl."""
    try:
        version = os.confstr('CS_GNU_LIBC_VERSION') or ''
    except (ValueError, OSError):
        return 0, 0
    match = re.fullmatch(r'glibc (\d+)\.(\d+).*', version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _macos() -> tuple[int, int]:
    from platform import mac_ver

    major, _, rest = mac_ver()[0].partition('.')
    return int(major or 0), int(rest.partition('.')[0] or 0)
