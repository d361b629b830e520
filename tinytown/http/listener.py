"""Where a townhall listens: sockets for an address and a port, or for a path on this machine.

A service manager may have made the socket already (sd_listen_fds(3)): then clients are never refused, but wait in its
backlog while a townhall is started, or started again. Such a socket must be where the settings say.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from ..errors import UsageError

BACKLOG: Final = 1024
UNIX: Final = 'unix:'
_FIRST_PASSED: Final = 3  # the descriptor of the first socket that is passed


def open_sockets(bind: str, port: int, count: int = 1, mode: str = 'rest') -> list[socket.socket]:
    """Listening sockets, one for each of `count` processes, that share the clients of one address.

    `bind` is an address, `localhost`, or unix:/path (which only we may open: mode 0600). Port 0 is a free one. A socket
    that a service manager has passed is taken; of several the one that is named as `mode`. Raises UsageError when it
    can't be listened on, or another one was passed.
    """
    if is_passed(os.environ):
        listener = _passed(os.environ, mode)
        _check_passed(listener, bind, port)
        return [listener, *(listener.dup() for _ in range(count - 1))]
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


def is_passed(environ: Mapping[str, str]) -> bool:
    """Whether a service manager has made the sockets of this very process."""
    return environ.get('LISTEN_PID') == str(os.getpid())


def _passed(environ: MutableMapping[str, str], mode: str) -> socket.socket:
    """The socket that was passed for a mode; what tells of it is removed, so that no child takes it for its own."""
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
    listener = socket.socket(fileno=chosen[0])
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError('the socket that was passed is none that listens; use  ListenStream=  and  Accept=no')
    return listener


def _check_passed(listener: socket.socket, bind: str, port: int) -> None:
    """Refuses a socket that is elsewhere than the settings say: what was checked there was checked for them."""
    if bind.startswith(UNIX):
        wanted = bind
        fits = url_of(listener) == bind
    else:
        address = listener.getsockname()
        family = socket.AF_INET6 if ':' in bind else socket.AF_INET
        host = '127.0.0.1' if bind == 'localhost' else bind
        fits = listener.family == family and address[0] == host and port in (0, address[1])
        wanted = f'{bind}:{port}'
    if not fits:
        raise UsageError(
            f'the socket that was passed is {url_of(listener)}, but townhall.bind and the port say {wanted}; '
            'make them the same:  tt config, or  townhall service install --socket  again'
        )


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
