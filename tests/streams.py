"""A raw client for server-sent events, and helpers that create many events."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from tinytown.model import new_id
from tinytown.state.store import text

from .ground import pipeline
from .support import PATIENCE, Place, Service


class Heard(NamedTuple):
    """One block of a stream. A comment has neither id nor data; neither has a block that only sets `retry`."""

    type: str
    id: str
    data: Any
    raw: bytes


class Listener:
    """A client: a socket, the data read so far, and `last`, the id to resume from."""

    def __init__(self, service: Service, path: str, *fields: str, last: str = '', version: str = '1.1') -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.sock.settimeout(PATIENCE)
        lines = [f'GET {path} HTTP/{version}', 'Host: localhost', 'Accept: text/event-stream', *fields]
        if last:
            lines.append(f'Last-Event-ID: {last}')
        self.last = last
        self._raw, self._body, self._is_over = b'', b'', False
        self._blocks: deque[bytes] = deque()
        try:
            self.sock.connect((service.address, service.port))
            self.sock.sendall('\r\n'.join([*lines, '', '']).encode())
            self.head = self._read_head()
        except BaseException:
            self.sock.close()
            raise
        self._unwrap()

    def _read_head(self) -> bytes:
        while b'\r\n\r\n' not in self._raw:
            part = self.sock.recv(65536)
            if not part:
                raise ConnectionResetError
            self._raw += part
        head, _, self._raw = self._raw.partition(b'\r\n\r\n')
        return head

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def is_chunked(self) -> bool:
        return b'\r\nTransfer-Encoding: chunked\r\n' in self.head + b'\r\n'

    def _more(self) -> None:
        """Reads more data. Raises ConnectionError at the end of the stream."""
        if not self._is_over and (part := self.sock.recv(1 << 20)):
            self._raw += part
        else:
            raise ConnectionResetError
        self._unwrap()

    def _unwrap(self) -> None:
        """Decodes the chunks read so far, and splits them into blocks."""
        if not self.is_chunked:
            self._body, self._raw = self._body + self._raw, b''
        at = 0
        while self.is_chunked and (match := re.compile(rb'([0-9a-f]+)\r\n').match(self._raw, at)):
            end = match.end() + int(match[1], 16)
            if len(self._raw) < end + 2:
                break
            assert self._raw[end : end + 2] == b'\r\n'
            self._body += self._raw[match.end() : end]
            at = end + 2
            self._is_over |= end == match.end()
        self._raw = self._raw[at:]
        *blocks, self._body = self._body.split(b'\n\n')
        self._blocks += blocks

    def block(self) -> Heard:
        """The next block of any kind. Raises ConnectionError at the end of the stream, TimeoutError after PATIENCE."""
        while not self._blocks:
            self._more()
        raw = self._blocks.popleft()
        fields = dict(line.split(': ', 1) for line in raw.decode().split('\n') if not line.startswith(':'))
        self.last = fields.get('id', self.last)
        data = json.loads(fields['data']) if 'data' in fields else None
        return Heard(fields.get('event', ''), fields.get('id', ''), data, raw)

    def event(self) -> Heard:
        """The next block that is an event."""
        while (heard := self.block()).data is None:
            pass
        return heard

    def events(self, count: int) -> list[Heard]:
        return [self.event() for _ in range(count)]

    def ready(self) -> Listener:
        """Waits for the first id. From then on the client misses no event."""
        while not self.block().id:
            pass
        return self

    def rest(self) -> tuple[list[Heard], bool]:
        """All blocks until the end, and whether the chunked body ended properly."""
        found = []
        try:
            while True:
                found.append(self.block())
        except ConnectionError:
            return found, self._is_over

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing arrives for `seconds`."""
        self.sock.settimeout(seconds)
        try:
            return not self.sock.recv(1)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(PATIENCE)

    def close(self) -> None:
        self.sock.close()


Listen = Callable[..., Listener]


def happen_often(place: Place, times: int, count: int) -> threading.Thread:
    """Creates `count` events `times` times, on a thread of its own."""

    def write() -> None:
        for _ in range(times):
            happen(place, count)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def happen(place: Place, count: int, size: int = 0) -> None:
    """Creates events by adding tasks to the backlog. `size` is the length of their creator's name."""
    commands = []
    for i in range(count):
        command = place.store.backlog_add((new_id(), '{"x":"x"', '"x"', '[]', '', 3))
        command.by = f'{i}'.rjust(size, '.')
        commands.append(command)
    for start in range(0, count, 500):
        pipeline(place, commands[start : start + 500])


def ids(place: Place) -> list[str]:
    """The ids of all events in the town's stream."""
    return [event['id'] for event in place.history()]


def trim(place: Place, keep: int) -> None:
    from tinytown.state.store import Command

    place.store.call(Command(None, ('XTRIM', place.store.prefix + b'events', 'MAXLEN', keep)))


def newest(place: Place) -> str:
    found = place.store.call(place.store.last_event())
    return text(found[0][0]) if found else '0-0'


def await_streams(service: Service, count: int) -> None:
    """Waits until the metrics count this number of open streams."""
    deadline = time.monotonic() + PATIENCE
    while f'\ntinytown_http_streams {count}\n' not in (metrics := service.get('/metrics').body.decode()):
        assert time.monotonic() < deadline, re.findall(r'tinytown_http_streams.*', metrics)
