"""A conversation with a Redis on a unix socket, in bytes: what a record of one is made with and played back by."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 30.0


class Refused(Exception):
    """An error reply."""


class Talk:
    """One connection. A part that is no bytes is sent as its text."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        try:
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise
        self._file = self._sock.makefile('rb')

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._sock.close()

    def ask(self, *parts: bytes | str | int) -> Any:
        """The reply to a command. Raises Refused."""
        said = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
        self._sock.sendall(b'*%d\r\n' % len(said) + b''.join(b'$%d\r\n%b\r\n' % (len(part), part) for part in said))
        return self.next()

    def next(self) -> Any:
        """What comes next."""
        line = self._file.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b'-':
            raise Refused(rest.decode())
        if kind == b'+':
            return rest
        if kind == b':':
            return int(rest)
        assert kind in (b'$', b'*'), f'Redis said {line!r}'
        if int(rest) < 0:
            return None
        if kind == b'*':
            return [self.next() for _ in range(int(rest))]
        return self._file.read(int(rest) + 2)[:-2]
