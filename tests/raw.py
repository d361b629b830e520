"""Raw HTTP: requests as bytes, and a parser for the answers."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .support import PATIENCE, Hall, Place, Reply, Service

T = TypeVar('T')

HOST = b'Host: localhost\r\n'
GET = b'GET /health HTTP/1.1\r\n' + HOST + b'\r\n'


def post(body: bytes, *fields: bytes, path: bytes = b'/v1/backlog') -> bytes:
    """A POST as bytes, with a correct Content-Length."""
    head = [b'POST ' + path + b' HTTP/1.1', b'Host: localhost', b'Content-Type: application/json', *fields]
    return b'\r\n'.join([*head, b'Content-Length: %d' % len(body), b'', body])


def add(text: str, *fields: bytes) -> bytes:
    """A request that adds a task to the backlog."""
    return post(b'{"description":"%b"}' % text.encode(), *fields)


def answers(raw: bytes, *, to_head: bool = False) -> list[Reply]:
    """Parses all answers that a server sent, and checks their lengths."""
    found = []
    while raw:
        head, blank, raw = raw.partition(b'\r\n\r\n')
        assert blank, head
        lines = head.decode().split('\r\n')
        assert re.fullmatch(r'HTTP/1\.1 [1-5]\d\d [A-Za-z -]+', lines[0])
        fields = {name.lower(): value for name, value in (line.split(': ', 1) for line in lines[1:])}
        length = 0 if to_head else int(fields.get('content-length', 0))
        assert len(raw) >= length, 'the answer is cut off'
        found.append(Reply(int(lines[0][9:12]), fields, raw[:length]))
        raw = raw[length:]
    return found


def read_answer(sock: socket.socket) -> Reply:
    """Reads the next answer from a connection."""
    raw = b''
    while b'\r\n\r\n' not in raw:
        part = sock.recv(65536)
        assert part, f'closed after {raw!r}'
        raw += part
    length = int((re.search(rb'(?i)Content-Length: (\d+)', raw) or [b'', b'0'])[1])
    while len(raw) < raw.index(b'\r\n\r\n') + 4 + length:
        raw += sock.recv(65536)
    return answers(raw)[0]


def backlog(hall: Hall) -> list[str]:
    return [task['description'] for task in hall.get('/v1/backlog').json['backlog']]


@contextmanager
def connections(hall: Service, count: int) -> Iterator[list[socket.socket]]:
    """Opens many connections, and closes them afterwards."""
    with ExitStack() as stack:
        yield [stack.enter_context(hall.connect()) for _ in range(count)]


def descriptors(hall: Hall) -> int:
    """The number of TCP sockets that a townhall has open. Its Redis connections are unix sockets, and not counted."""
    tcp = {line.split()[9] for line in Path('/proc/net/tcp').read_text().splitlines()[1:]}
    directory = Path(f'/proc/{hall.process.pid}/fd')
    links = []
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            links.append(str((directory / name).readlink()))
    return sum(link.startswith('socket:[') and link[8:-1] in tcp for link in links)


def await_descriptors(hall: Hall, most: int) -> None:
    """Waits until the server has at most `most` TCP sockets open. Checks that it still answers in the meantime."""
    deadline = time.monotonic() + PATIENCE
    while descriptors(hall) > most:
        assert hall.get('/health').status in (200, 503)  # 503 while closed connections still count
        assert time.monotonic() < deadline, f'{descriptors(hall)} descriptors are open, not {most}'


def timed(talk: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Calls a function. Returns its result and the time it took, in seconds."""
    began = time.monotonic()
    return talk(*arguments), time.monotonic() - began


class Load:
    """Clients that add tasks on keep-alive connections until `stop` is called or the port is closed.

    `statuses` maps the text of each task to the status of its answer, or 0 if the connection was closed without one.
    `broken` lists truncated answers.
    """

    def __init__(self, front: Service, clients: int) -> None:
        self.statuses: dict[str, int] = {}
        self.broken: list[bytes] = []
        self._front = front
        self._stop = threading.Event()
        self._flows = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), name=f'load-{i}') for i in range(clients)]
        for thread in self._threads:
            thread.start()

    def await_flow(self, answers: int) -> None:
        """Waits for this number of further answers."""
        self._wanted = len(self.statuses) + answers
        self._flows.clear()
        assert self._flows.wait(PATIENCE), f'{len(self.statuses)} answers, not {self._wanted}'

    _wanted = 1 << 62

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    @property
    def acknowledged(self) -> set[str]:
        return {text for text, status in self.statuses.items() if status == 201}

    def _run(self, client: int) -> None:
        texts = (f'load-{client}-{i}' for i in itertools.count())
        with suppress(ConnectionRefusedError):
            while not self._stop.is_set():
                with self._front.connect() as sock:
                    while not self._stop.is_set() and self._add(sock, next(texts)):
                        pass

    def _add(self, sock: socket.socket, text: str) -> bool:
        """Adds one task. Returns whether the connection can be used again."""
        raw = b''
        with suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(add(text))
            while not is_whole(raw) and (part := sock.recv(65536)):
                raw += part
        if raw and not is_whole(raw):
            self.broken.append(raw)
            return False
        answer = answers(raw)[0] if raw else None
        self.statuses[text] = answer.status if answer else 0
        if len(self.statuses) >= self._wanted:
            self._flows.set()
        return answer is not None and answer.headers.get('connection') != 'close'


def is_whole(raw: bytes) -> bool:
    """Whether an answer has arrived with all of its body."""
    found = re.search(rb'(?i)\r\nContent-Length: (\d+)\r\n', raw)
    return found is not None and b'\r\n\r\n' in raw and len(raw) >= raw.index(b'\r\n\r\n') + 4 + int(found[1])


def texts(place: Place) -> list[str]:
    """The texts of all tasks in the backlog."""
    page = place.do('backlog.list')
    found = list(page['backlog'])
    while 'next_cursor' in page:
        page = place.do('backlog.list', cursor=page['next_cursor'])
        found += page['backlog']
    return [task['description'] for task in found]
