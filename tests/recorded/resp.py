"""A minimal Redis client on a unix socket, to record and to replay conversations."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 30.0


class Refused(Exception):
    """An error reply."""


class Talk:
    """One connection. Parts of a command that are not bytes are sent as text."""

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
        """Sends a command. Returns the reply. Raises Refused for an error reply."""
        encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
        self._sock.sendall(
            b'*%d\r\n' % len(encoded) + b''.join(b'$%d\r\n%b\r\n' % (len(part), part) for part in encoded)
        )
        return self.next()

    def next(self) -> Any:
        """Reads the next reply."""
        line = self._file.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b'-':
            raise Refused(rest.decode())
        if kind == b'+':
            return rest
        if kind == b':':
            return int(rest)
        assert kind in (b'$', b'*'), f'Redis sent {line!r}'
        if int(rest) < 0:
            return None
        if kind == b'*':
            return [self.next() for _ in range(int(rest))]
        return self._file.read(int(rest) + 2)[:-2]
