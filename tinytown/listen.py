"""Where a townhall listens: sockets for an address and a port, or for a path on this machine."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Final

from .errors import UsageError

BACKLOG: Final = 1024
UNIX: Final = 'unix:'


def open_sockets(bind: str, port: int, count: int = 1) -> list[socket.socket]:
    """Listening sockets, one for each of `count` processes, that share the clients of one address.

    `bind` is an address, `localhost`, or unix:/path (which only we may open: mode 0600). Port 0 is a free one. Raises
    UsageError when it can't be listened on.
    """
    if bind.startswith(UNIX):
        listener = _unix_socket(Path(bind.removeprefix(UNIX)))
        return [listener, *(listener.dup() for _ in range(count - 1))]
    family = socket.AF_INET6 if ':' in bind else socket.AF_INET
    try:
        first = _bind(family, bind, port)
        if count == 1:
            sockets = [first]
        else:  # the first one has proven that nobody else listens there, which those that share a port would not notice
            port = first.getsockname()[1]
            first.close()
            sockets = [_bind(family, bind, port, shared=True) for _ in range(count)]
        for each in sockets:
            each.listen(BACKLOG)
    except (OSError, OverflowError) as e:
        what = getattr(e, 'strerror', None) or e
        raise UsageError(
            f'{bind}:{port}: {what}; choose another: townhall --port N, or tt config townhall.rest_port N'
        ) from None
    return sockets


def _bind(family: int, bind: str, port: int, shared: bool = False) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((bind, port))
    except OSError:
        sock.close()
        raise
    return sock


def _unix_socket(path: Path) -> socket.socket:
    """A listening socket at a path. One that a dead server has left is replaced."""
    if not path.is_absolute():
        raise UsageError(f'--bind {UNIX}{path}: give an absolute path')
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        raise UsageError(f'--bind {UNIX}{path}: {e.strerror or e}; choose another path') from None
    finally:
        os.umask(mask)
    return sock


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


def url_of(listener: socket.socket, scheme: str = 'http') -> str:
    """How clients name what a socket listens on: http://address:port or unix:/path."""
    address = listener.getsockname()
    if isinstance(address, str):
        return UNIX + address
    host, port = address[:2]
    return f'{scheme}://[{host}]:{port}' if ':' in host else f'{scheme}://{host}:{port}'


def host_of(listener: socket.socket) -> str:
    """The address on which a socket really listens; a path begins with /."""
    address = listener.getsockname()
    return str(address if isinstance(address, str) else address[0])
