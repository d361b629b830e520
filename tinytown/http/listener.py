"""The listening sockets of a townhall. `open_listeners` creates them; each event loop (`server`) serves one.

The stdlib's `HTTPServer` binds, listens, accepts and closes. `Listener` adds a longer backlog and skips a DNS look-up.
`UnixListener` listens on a path. `PassedListener` takes over a socket from a service manager (sd_listen_fds(3)):
clients are never refused then, they wait in its backlog while a townhall starts or restarts.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping, MutableMapping
from http.server import HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, BaseServer, TCPServer
from typing import Any, Final

from ..errors import UsageError

BACKLOG: Final = 1024
UNIX: Final = 'unix:'
_FIRST_PASSED: Final = 3  # SD_LISTEN_FDS_START: the descriptor of the first passed socket


class Listener(HTTPServer):
    """Listens on an address and port as soon as it is created. Raises OSError.

    `get_request` accepts a connection, of which the event loop makes a `Connection`; the request handler that
    `socketserver` requires is never called. Listeners with `shares_port` may bind the same port, one per process.
    """

    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int] | str, family: int = socket.AF_INET, shares_port: bool = False) -> None:
        self.address_family = family
        self.allow_reuse_port = shares_port
        super().__init__(address, BaseRequestHandler)  # type: ignore[arg-type]  # a path, too

    def server_bind(self) -> None:
        """Binds without looking up the host name: HTTPServer would wait for DNS, and nobody needs the name."""
        TCPServer.server_bind(self)

    def share_port(self) -> None:
        """Lets further listeners bind the same port."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    @property
    def host(self) -> str:
        """The address or path it listens on. A path begins with /."""
        address: Any = self.socket.getsockname()
        return str(address if isinstance(address, str) else address[0])

    def url(self, scheme: str = 'http') -> str:
        """The URL for clients: http://address:port or unix:/path."""
        if self.socket.family == socket.AF_UNIX:
            return UNIX + self.host
        port = self.socket.getsockname()[1]
        return f'{scheme}://[{self.host}]:{port}' if ':' in self.host else f'{scheme}://{self.host}:{port}'


class UnixListener(Listener):
    """Listens on a path that only our user may open (mode 0600). Raises OSError, UsageError."""

    allow_reuse_address = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), socket.AF_UNIX)

    def server_bind(self) -> None:
        """Binds, after removing the socket of a dead server."""
        mask = os.umask(0o177)
        try:
            _remove_stale(Path(str(self.server_address)))
            super().server_bind()
        finally:
            os.umask(mask)


class PassedListener(Listener):
    """Listens on a socket that a service manager created and bound."""

    def __init__(self, passed: socket.socket) -> None:
        BaseServer.__init__(self, passed.getsockname(), BaseRequestHandler)  # TCPServer's would create a socket
        self.socket = passed


def open_listeners(bind: str, port: int, count: int = 1, mode: str = 'rest') -> list[Listener]:
    """Opens one listener for each of `count` processes that share the clients of one address.

    On a TCP port, each process has a socket of its own and the kernel spreads the clients. On a path or a passed
    socket, all processes share one listener. `bind` is an address, `localhost`, or unix:/path. Port 0 means any free
    port. A socket from a service manager is used if there is one; among several, the one named `mode`. Raises
    UsageError if the address can't be opened, or if the passed socket has another address.
    """
    if is_passed(os.environ):
        passed = _passed(os.environ, mode)
        _check_passed(passed, bind, port)
        return [passed] * count
    if bind.startswith(UNIX):
        return [_open_unix(Path(bind.removeprefix(UNIX)))] * count
    try:
        return _open_tcp(bind, port, count)
    except (OSError, OverflowError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise UsageError(
            f'{bind}:{port}: {reason}; choose another port: townhall --port N, or tt config townhall.rest_port N'
        ) from None


def _open_tcp(bind: str, port: int, count: int) -> list[Listener]:
    """Listeners on one port. The first binds it exclusively: a shared port would hide that another server is there."""
    family = socket.AF_INET6 if ':' in bind else socket.AF_INET
    listeners = [Listener((bind, port), family)]
    try:
        if count > 1:
            listeners[0].share_port()
        port = listeners[0].socket.getsockname()[1]
        for _ in range(count - 1):
            listeners.append(Listener((bind, port), family, shares_port=True))
    except OSError:
        for listener in listeners:
            listener.server_close()
        raise
    return listeners


def _open_unix(path: Path) -> UnixListener:
    if not path.is_absolute():
        raise UsageError(f'--bind {UNIX}{path}: give an absolute path')
    try:
        return UnixListener(path)
    except OSError as e:
        raise UsageError(f'--bind {UNIX}{path}: {e.strerror or e}; choose another path') from None


def _remove_stale(path: Path) -> None:
    """Removes a socket that no server listens on. Raises UsageError if one does, or if it is not a socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f'--bind {UNIX}{path}: this file is not a socket; choose another path')
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink()
        return
    raise UsageError(f'--bind {UNIX}{path}: another server listens on it; choose another path')


def is_passed(environ: Mapping[str, str]) -> bool:
    """Whether a service manager passed sockets to this process."""
    return environ.get('LISTEN_PID') == str(os.getpid())


def _passed(environ: MutableMapping[str, str], mode: str) -> PassedListener:
    """The listener on the socket passed for a mode. Clears the variables, so that no child process takes the socket."""
    del environ['LISTEN_PID']
    count, names = environ.pop('LISTEN_FDS', ''), environ.pop('LISTEN_FDNAMES', '').split(':')
    descriptors = range(_FIRST_PASSED, _FIRST_PASSED + (int(count) if count.isdecimal() else 0))
    fitting = [descriptor for descriptor, name in zip(descriptors, names, strict=False) if name == mode]
    chosen = fitting if len(descriptors) > 1 else list(descriptors)
    if len(chosen) != 1:
        raise UsageError(
            f'LISTEN_FDS={count}: {len(chosen)} of the passed sockets are for {mode}; pass exactly one, '
            f'or name one with  FileDescriptorName={mode}'
        )
    os.set_inheritable(chosen[0], False)
    passed = socket.socket(fileno=chosen[0])
    if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError('the passed socket does not listen; use  ListenStream=  and  Accept=no')
    return PassedListener(passed)


def _check_passed(listener: Listener, bind: str, port: int) -> None:
    """Raises UsageError if the passed socket has another address than the settings, which were checked for safety."""
    if bind.startswith(UNIX):
        wanted = bind
        is_same = listener.url() == bind
    else:
        address = listener.socket.getsockname()
        family = socket.AF_INET6 if ':' in bind else socket.AF_INET
        host = '127.0.0.1' if bind == 'localhost' else bind
        is_same = listener.socket.family == family and address[0] == host and port in (0, address[1])
        wanted = f'{bind}:{port}'
    if not is_same:
        raise UsageError(
            f'the passed socket is {listener.url()}, but townhall.bind and the port say {wanted}; '
            'make them equal:  tt config, or  townhall service install --socket  again'
        )
