"""A proxy in front of Redis, on a unix socket, that breaks a chosen command at a chosen moment.

The moments: the command has *arrived*, and Redis has not received it; it was *executed*, and its reply is held back; it
was *answered*, and its reply was forwarded. At that moment the proxy kills the client's process or closes its
connection.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

import hiredis

from tinytown.state.client import pack
from tinytown.state.store import scripts, text

_MORE: Final = object()


class Fate(NamedTuple):
    """What happens to the client, and at which moment of a command."""

    deed: Literal['kill', 'cut']
    moment: Literal['arrived', 'executed', 'answered']


Judge = Callable[[int, str], Fate | None]
"""Called for every command with the client's pid and the name of the script or Redis command."""


class Proxy:
    """Forwards between clients that connect to `listen` and the Redis at `server`.

    When that Redis ends, the proxy disconnects the clients and stops listening, as a dead server does.
    """

    def __init__(self, listen: Path, server: Path, judge: Judge = lambda _pid, _name: None) -> None:
        self.judge = judge
        self._server = server
        self._names = {script.digest: name for name, script in scripts().items()}
        self._names |= {script.text: name for name, script in scripts().items()}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(128)
        threading.Thread(target=self._accept, name='proxy', daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`; closing alone does not
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name='proxied', daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            with suppress(OSError):
                server.connect(str(self._server))
                _Passage(self, client, server).run()
            if not accepts(self._server):
                self.close()

    def name_of(self, command: list[bytes]) -> str:
        """The name of a command: a script's, or Redis's own."""
        if command[0] in (b'EVALSHA', b'EVAL'):
            return self._names.get(command[1], 'script')
        return text(command[0])


class _Passage:
    """One client's connection, and its own connection to Redis."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._pid = peer(client)
        self._requests, self._replies = (hiredis.Reader(notEnoughData=_MORE) for _ in range(2))
        self._fates: deque[Fate | None] = deque()  # of the commands that await a reply

    def run(self) -> None:
        """Forwards data until either side closes, or a fate ends the connection."""
        ready = select.poll()
        ready.register(self._client, select.POLLIN)
        ready.register(self._server, select.POLLIN)
        while True:
            for descriptor, _ in ready.poll():
                from_client = descriptor == self._client.fileno()
                data = (self._client if from_client else self._server).recv(1 << 16)
                if not data or (self._ask(data) if from_client else self._answer(data)):
                    return

    def _ask(self, data: bytes) -> bool:
        """Forwards commands to Redis. Returns whether the connection ends."""
        self._requests.feed(data)
        while (command := self._requests.gets()) is not _MORE:
            fate = self._proxy.judge(self._pid, self._proxy.name_of(command))
            if fate and fate.moment == 'arrived':
                return self._fulfil(fate)
            self._fates.append(fate)
            self._server.sendall(pack(command))
        return False

    def _answer(self, data: bytes) -> bool:
        """Forwards replies to the client. Data received together with a held-back reply is held back, too."""
        self._replies.feed(data)
        fulfilled = None
        while not fulfilled and self._replies.gets() is not _MORE:
            fulfilled = self._fates.popleft()
        doomed = fulfilled or next((fate for fate in self._fates if fate), None)
        if not (doomed and doomed.moment == 'executed'):
            self._client.sendall(data)
        return fulfilled is not None and self._fulfil(fulfilled)

    def _fulfil(self, fate: Fate) -> bool:
        if fate.deed == 'kill':
            os.kill(self._pid, signal.SIGKILL)
        return True


def peer(sock: socket.socket) -> int:
    """The pid at the other end of a unix socket. For a server's socket, the process that called `listen`."""
    pid: int = struct.unpack('3i', sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def accepts(path: Path) -> int:
    """The pid of the process that listens on a socket, or 0."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return 0
        return peer(probe)
