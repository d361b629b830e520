"""Memory that forked processes share: a table of a fixed size whose records are changed by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_NEIGHBOURS: Final = 8  # places in which the record of a name may stand
_RECORD: Final = struct.Struct('=16sdd')  # digest of the name, a value, when it was changed

Update = Callable[[float, float], float]


def _nameless_file() -> int:
    """A descriptor to hold locks on. Linux needs no disk for it."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('tinytown')
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Table:
    """Names with a number each. Made before the fork; whoever has it shares it.

    The oldest record gives way where there is no room. Locks are the kernel's, held by a process: they end with it.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._memory = mmap.mmap(-1, places * _RECORD.size)
        self._salt = os.urandom(16)  # nobody outside can choose names that meet in one place
        self._file = _nameless_file()
        self._thread = threading.Lock()
        weakref.finalize(self, os.close, self._file)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._thread:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def change(self, name: str, now: float, change: Update) -> None:
        """Sets the value of a name to `change(value, when)`; both are 0 and -1 for a name that is not there."""
        digest = hashlib.blake2b(name.encode(), digest_size=16, key=self._salt).digest()
        with self._alone():
            at, value, when = self._find(digest)
            _RECORD.pack_into(self._memory, at, digest, change(value, when), now)

    def _find(self, digest: bytes) -> tuple[int, float, float]:
        """(offset, value, when) of a record, or where a new one goes."""
        first = int.from_bytes(digest[:8], 'little')
        oldest, age = 0, float('inf')
        for i in range(_NEIGHBOURS):
            at = (first + i) % self._places * _RECORD.size
            found, value, when = _RECORD.unpack_from(self._memory, at)
            if found == digest:
                return at, value, when
            if when < age:
                oldest, age = at, when
        return oldest, 0.0, -1.0
