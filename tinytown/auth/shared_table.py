"""A hash table of fixed size in memory that forked processes share. `rate_limit` keeps its buckets in one."""

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

_NEIGHBOURS: Final = 8  # consecutive places that may hold the record of a name
_RECORD: Final = struct.Struct('=16sdd')  # digest of the name, value, time of its last change

Update = Callable[[float, float], float]


def _nameless_file() -> int:
    """The descriptor of a nameless file, to hold locks on. On Linux it is in memory."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('tinytown')
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Table:
    """Maps names to numbers. Create it before forking; parent and children then share it.

    If the places for a name are full, the least recently changed record is overwritten. The kernel releases the lock of
    a process that dies.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._memory = mmap.mmap(-1, places * _RECORD.size)
        self._salt = os.urandom(16)  # so that clients can't choose names that collide
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
        """Sets the value of a name to `change(value, changed_at)`, in one step for all processes and threads.

        `changed_at` is the `now` of the last change. For a new name, value is 0.0 and changed_at -1.0.
        """
        digest = hashlib.blake2b(name.encode(), digest_size=16, key=self._salt).digest()
        with self._alone():
            at, value, changed_at = self._find(digest)
            _RECORD.pack_into(self._memory, at, digest, change(value, changed_at), now)

    def _find(self, digest: bytes) -> tuple[int, float, float]:
        """(offset, value, changed_at) of a record; for a new name the offset that it may use, 0.0 and -1.0."""
        first = int.from_bytes(digest[:8], 'little')
        oldest, oldest_change = 0, float('inf')
        for i in range(_NEIGHBOURS):
            at = (first + i) % self._places * _RECORD.size
            name_digest, value, changed_at = _RECORD.unpack_from(self._memory, at)
            if name_digest == digest:
                return at, value, changed_at
            if changed_at < oldest_change:
                oldest, oldest_change = at, changed_at
        return oldest, 0.0, -1.0
