"""The listening sockets of a townhall, owned by `http.server`: `open_listeners` makes them.

`HTTPServer` binds, activates, accepts and closes. A `Listener` gives it a longer backlog and spares it a look-up of a
host name; `UnixListener` has a path in place of an address; `PassedListener` takes a socket that a service manager has
made (sd_listen_fds(3)). Then clients are never refused: they wait in its backlog while a townhall starts, or starts
again. The event loop (`web`) serves one listener.
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
_FIRST_PASSED: Final = 3  # the descriptor of the first socket that is passed


class Listener(HTTPServer):
    """Listens on an address and a port from when it is made. Raises OSError.

    `get_request` accepts a connection. The event loop makes a `Connection` of it, so the request handler that
    `socketserver` asks for is never called. Listeners that `shares_port` may bind one port, each for a process.
    """

    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int] | str, family: int = socket.AF_INET, shares_port: bool = False) -> None:
        self.address_family = family
        self.allow_reuse_port = shares_port
        super().__init__(address, BaseRequestHandler)  # type: ignore[arg-type]  # which knows of no paths

    def server_bind(self) -> None:
        """Binds. HTTPServer would look up the name of the host then, and wait for DNS; nobody needs that name."""
        TCPServer.server_bind(self)

    def share_port(self) -> None:
        """Lets further listeners bind this port, too."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    @property
    def host(self) -> str:
        """The address on which it really listens; a path begins with /."""
        address: Any = self.socket.getsockname()
        return str(address if isinstance(address, str) else address[0])

    def url(self, scheme: str = 'http') -> str:
        """How clients name it: http://address:port or unix:/path."""
        if self.socket.family == socket.AF_UNIX:
            return UNIX + self.host
        port = self.socket.getsockname()[1]
        return f'{scheme}://[{self.host}]:{port}' if ':' in self.host else f'{scheme}://{self.host}:{port}'


class UnixListener(Listener):
    """Listens on a path, which only our user may open (mode 0600). Raises OSError, UsageError."""

    allow_reuse_address = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), socket.AF_UNIX)

    def server_bind(self) -> None:
        """Binds in the place of a socket that a dead server has left."""
        mask = os.umask(0o177)
        try:
            _remove_stale(Path(str(self.server_address)))
            super().server_bind()
        finally:
            os.umask(mask)


class PassedListener(Listener):
    """Listens on a socket that a service manager has made, bound and activated."""

    def __init__(self, passed: socket.socket) -> None:
        BaseServer.__init__(self, passed.getsockname(), BaseRequestHandler)  # TCPServer's would make another socket
        self.socket = passed


def open_listeners(bind: str, port: int, count: int = 1, mode: str = 'rest') -> list[Listener]:
    """A listener for each of `count` processes, which share the clients of one address.

    On a TCP port each has a socket of its own, and the kernel spreads the clients; a path and a passed socket have one
    listener for all. `bind` is an address, `localhost`, or unix:/path. Port 0 is a free one. A socket that a service
    manager has passed is taken; of several the one that is named as `mode`. Raises UsageError if nothing can listen
    there, or if the passed socket is elsewhere.
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
        what = getattr(e, 'strerror', None) or e
        raise UsageError(
            f'{bind}:{port}: {what}; choose another: townhall --port N, or tt config townhall.rest_port N'
        ) from None


def _open_tcp(bind: str, port: int, count: int) -> list[Listener]:
    """Listeners on one port. The first binds it alone: listeners that share a port would not notice another server."""
    family = socket.AF_INET6 if ':' in bind else socket.AF_INET
    listeners = [Listener((bind, port), family)]
    try:
        if count > 1:
            listeners[0].share_port()
        port = listeners[0].socket.getsockname()[1]
        for _ in range(count - 1):
            listeners.append(Listener((bind, port), family, shares_port=True))
    except OSError:
        for each in listeners:
            each.server_close()
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
    """Removes a socket that nobody listens on. Raises OSError for one that is in use, UsageError for another file."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f'--bind {UNIX}{path}: there is a file that is no socket; choose another path')
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink()
        return
    raise UsageError(f'--bind {UNIX}{path}: another server listens there; choose another path')


def is_passed(environ: Mapping[str, str]) -> bool:
    """Whether a service manager has made the sockets of this very process."""
    return environ.get('LISTEN_PID') == str(os.getpid())


def _passed(environ: MutableMapping[str, str], mode: str) -> PassedListener:
    """Listens on the socket that was passed for a mode. Clears the variables: no child may take it for its own."""
    del environ['LISTEN_PID']
    count, names = environ.pop('LISTEN_FDS', ''), environ.pop('LISTEN_FDNAMES', '').split(':')
    descriptors = range(_FIRST_PASSED, _FIRST_PASSED + (int(count) if count.isdecimal() else 0))
    fitting = [each for each, name in zip(descriptors, names, strict=False) if name == mode]
    chosen = fitting if len(descriptors) > 1 else list(descriptors)
    if len(chosen) != 1:
        raise UsageError(
            f'LISTEN_FDS={count}: {len(chosen)} of the sockets that were passed are for {mode}; pass one, '
            f'or name one with  FileDescriptorName={mode}'
        )
    os.set_inheritable(chosen[0], False)
    passed = socket.socket(fileno=chosen[0])
    if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError('the socket that was passed is none that listens; use  ListenStream=  and  Accept=no')
    return PassedListener(passed)


def _check_passed(listener: Listener, bind: str, port: int) -> None:
    """Refuses a socket that is elsewhere than the settings say: what was checked there was checked for them."""
    if bind.startswith(UNIX):
        wanted = bind
        fits = listener.url() == bind
    else:
        address = listener.socket.getsockname()
        family = socket.AF_INET6 if ':' in bind else socket.AF_INET
        host = '127.0.0.1' if bind == 'localhost' else bind
        fits = listener.socket.family == family and address[0] == host and port in (0, address[1])
        wanted = f'{bind}:{port}'
    if not fits:
        raise UsageError(
            f'the socket that was passed is {listener.url()}, but townhall.bind and the port say {wanted}; '
            'make them the same:  tt config, or  townhall service install --socket  again'
        )
