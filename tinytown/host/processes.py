"""Processes: what identifies one, whether it is alive, and how to start one and stop a whole tree of them.

The system reuses pids, so a pid alone identifies nothing. An `Identity` is the host, the boot, the pid and the start
time of a process. A zombie counts as dead. In another pid namespace (a container) a pid means nothing; there, a lock on
a file shows that a process is alive (`hold`, `is_held`).

A tree is every descendant of a process, and every process with the tree's mark. The mark is the environment variable
`INSTANCE_VARIABLE`; it also finds processes that left their parent or their session. A process with another mark
belongs to another tree, even if it was started from within this one: an agent may start agents, or the town's Redis.

Start with `verdict` (is it alive?), `start_detached` and `stop_tree`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from ..files import open_own
from ..model import is_uuid, new_id

Verdict = Literal['alive', 'dead', 'unknown']
HAS_PROC: Final = Path('/proc/self/stat').exists()
GRACE_SECS: Final = 5.0
INSTANCE_VARIABLE: Final = 'TINYTOWN_INSTANCE'  # the mark of a worker's processes, in their environment


@dataclass(frozen=True, slots=True)
class Identity:
    """One process on one host. `boot` is the value of `this_boot`, `start` that of `start_time`; both may be ''."""

    host: str
    boot: str
    pid: int
    start: str

    @property
    def line(self) -> str:
        """The identity as a line of text, for `read_identity`."""
        return f'{self.host} {self.boot} {self.pid} {self.start}'


_host_name: Final = ['']  # set by `name_host`


def name_host(name: str) -> None:
    """Sets the name of this host, for this process. '' stands for the system's host name."""
    _host_name[0] = name


def this_host() -> str:
    return _host_name[0] or _system_host_name()


@lru_cache(maxsize=1)
def _system_host_name() -> str:
    return re.sub(r'[^A-Za-z0-9._-]+', '-', socket.gethostname())


@lru_cache(maxsize=1)
def this_machine() -> str:
    """An id of this machine that does not depend on its name; '' if it has none.

    It is a hash of the machine id: machine-id(5) asks that the id itself be kept confidential.
    """
    machine_id = _first_line('/etc/machine-id') or _first_line('/var/lib/dbus/machine-id')
    return hashlib.sha256(f'tinytown {machine_id}'.encode()).hexdigest()[:16] if machine_id else ''


@lru_cache(maxsize=1)
def this_boot() -> str:
    """The scope in which a pid is unique: `boot id@machine@pid namespace`. A part is '' if it is not available."""
    return f'{_first_line("/proc/sys/kernel/random/boot_id")}@{this_machine()}@{_pid_namespace()}'


@lru_cache(maxsize=1)
def _pid_namespace() -> str:
    try:
        return re.sub(r'\D', '', str(Path('/proc/self/ns/pid').readlink()))
    except OSError:
        return ''


def _boot_parts(boot: str) -> tuple[str, str, str]:
    """Splits the value of `this_boot` into boot id, machine and pid namespace. Earlier versions wrote fewer parts."""
    parts = [*boot.split('@'), '', '']
    return parts[0], parts[1], parts[2]


def this_place() -> str:
    """The machine (or its boot, if it has no id) and the pid namespace: processes of one place see each other."""
    boot, machine, namespace = _boot_parts(this_boot())
    return f'{machine or boot} pid:[{namespace}]'


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''


def identify(pid: int) -> Identity:
    return Identity(this_host(), this_boot(), pid, start_time(pid))


def read_identity(line: str) -> Identity | None:
    """Parses the line that `Identity.line` makes. Returns None for any other text."""
    parts = line.split(' ', 3)
    return Identity(parts[0], parts[1], int(parts[2]), parts[3]) if len(parts) == 4 and parts[2].isdecimal() else None


def start_time(pid: int) -> str:
    """When a process started: clock ticks since boot, or a date from ps. '' if it does not exist or is a zombie."""
    if not HAS_PROC:
        return next((start for _, _, start in _ps('-p', str(pid))), '')
    fields = _stat(pid)
    return fields[19] if fields else ''


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third one (the state) on. [] if there is no process or it is a zombie."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []
    return [] if fields[0] in 'ZX' else fields


def _ps(*which: str) -> list[tuple[int, int, str]]:
    """(pid, parent, start) of live processes, from ps with a fixed locale and time zone. `which` selects processes."""
    listing = subprocess.run(
        ['ps', '-o', 'pid=,ppid=,stat=,lstart=', *which],
        capture_output=True,
        text=True,
        check=False,
        env={'PATH': os.environ.get('PATH', os.defpath), 'LC_ALL': 'C', 'TZ': 'UTC'},
    )
    rows = (line.split(None, 3) for line in listing.stdout.splitlines())
    return [(int(pid), int(parent), start.strip()) for pid, parent, state, start in rows if state[0] not in 'ZX']


def verdict(identity: Identity) -> Verdict:
    """Whether a process is alive. A process of an earlier boot of this machine is dead.

    The verdict on a process of another host, machine or pid namespace is 'unknown'.
    """
    if identity.host != this_host():
        return 'unknown'
    boot, machine, _ = _boot_parts(identity.boot)
    if boot != _boot_parts(this_boot())[0]:
        return 'unknown' if machine and machine != this_machine() else 'dead'
    if identity.pid <= 0 or not identity.start or is_in_other_namespace(identity):
        return 'unknown'
    return 'alive' if start_time(identity.pid) == identity.start else 'dead'


def is_in_other_namespace(identity: Identity) -> bool:
    """Whether a process is on this host and boot but in another pid namespace, for example in another container."""
    boot, _, namespace = _boot_parts(identity.boot)
    is_here = identity.host == this_host() and boot == _boot_parts(this_boot())[0]
    return is_here and namespace not in ('', _pid_namespace())


_locks: Final[list[int]] = []  # descriptors; the kernel closes them, and so unlocks, when this process ends


def hold(file: Path) -> None:
    """Locks a file until this process ends. Every pid namespace can see the lock. Raises OSError."""
    descriptor = open_own(file, os.O_RDONLY)
    _locks.append(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(file: Path) -> bool | None:
    """Whether a live process holds the lock on a file. None if the file or its lock can't be examined."""
    try:
        with os.fdopen(open_own(file, os.O_RDONLY), 'rb') as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


# --------------------------------------------------------------------------------------------------------- start

_children: set[int] = set()
_children_lock = threading.Lock()


def python(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this package.

    `-P` keeps the working directory out of the import path, because agents write to it.
    """
    return [sys.executable, '-P', '-m', module, *arguments]


def python_path() -> str:
    """The PYTHONPATH that makes `python` import this same installation."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH')]))


def start_detached(
    argv: list[str], cwd: Path, env: dict[str, str], log: Path, fds: Iterable[int] = (), mark: str = ''
) -> int:
    """Starts a process in a session of its own, which outlives this process. Returns its pid. Raises OSError.

    Its output goes to `log`; it inherits no descriptors but `fds`. It becomes a tree of its own, with `mark` or with a
    new mark.
    """
    reap()
    with os.fdopen(open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 'ab') as out:
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env | {INSTANCE_VARIABLE: mark or new_id()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=tuple(fds),
        )
    child.returncode = 0  # `reap` collects the exit status; this keeps Popen from warning that nobody does
    with _children_lock:
        _children.add(child.pid)
    return child.pid


def reap(but: Collection[int] = ()) -> None:
    """Collects the exit statuses of ended children that `start_detached` started, and of no others.

    As process 1 (of a container) it also collects adopted orphans, except the pids in `but`: another caller waits for
    those.
    """
    with _children_lock:
        for pid in tuple(_children):
            try:
                ended = os.waitpid(pid, os.WNOHANG)[0] == pid
            except ChildProcessError:
                ended = True
            if ended:
                _children.remove(pid)
    if os.getpid() == 1:
        reap_orphans(but)


def become_subreaper() -> None:
    """Makes this process, and not init, adopt its orphaned descendants, so that its tree stays whole (Linux only)."""
    if sys.platform == 'linux':
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap_orphans(but: Collection[int] = ()) -> None:
    """Collects the exit statuses of ended children, adopted orphans included (Linux only).

    Stops at a pid in `but`, because another caller waits for that one.
    """
    if sys.platform != 'linux':
        return
    try:
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in but:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
    except ChildProcessError:
        return


# ---------------------------------------------------------------------------------------------------------- trees


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and start time of every live process, by pid."""
    if not HAS_PROC:
        return {pid: (parent, start) for pid, parent, start in _ps('-ax')}
    stats = {int(name): _stat(int(name)) for name in os.listdir('/proc') if name.isdigit()}
    return {pid: (int(fields[1]), fields[19]) for pid, fields in stats.items() if fields}


def _mark_of(pid: int) -> str:
    """The mark of a process; '' if it has none or this user may not see it."""
    return _variable(pid, INSTANCE_VARIABLE)


def _variable(pid: int, name: str) -> str:
    """A variable of the environment that a process started with; '' if it is not set or this user may not see it."""
    try:
        environ = Path(f'/proc/{pid}/environ').read_bytes()
    except OSError:
        return ''
    prefix = f'{name}='.encode()
    found = [entry for entry in environ.split(b'\0') if entry.startswith(prefix)]
    return found[0].removeprefix(prefix).decode('utf-8', 'replace') if found else ''


def agents_processes(town: str) -> dict[str, list[int]]:
    """The processes on this machine that belong to agents of a town, by their mark. `town` is the town's directory."""
    found: dict[str, list[int]] = {}
    for pid in [int(name) for name in os.listdir('/proc') if name.isdigit()] if HAS_PROC else []:
        if _variable(pid, 'TINYTOWN_TOWN') == town and _variable(pid, 'TINYTOWN_AGENT_ID') and start_time(pid):
            found.setdefault(_mark_of(pid), []).append(pid)
    return found


def marked(instance: str) -> list[int]:
    """The pids of processes with the mark `instance`, without this process.

    Returns [] on a system without /proc, and for a mark that is not a UUID.
    """
    if not HAS_PROC or not is_uuid(instance):
        return []
    pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _mark_of(pid) == instance]


def tree(root: Identity | None, instance: str, earlier: Mapping[int, str] | None = None) -> dict[int, str]:
    """The live processes of a tree: `root`, its descendants, and those with the mark `instance`.

    Returns {pid: start time}. Members of an `earlier` result stay members, even if they have left the tree since. This
    process is never a member.
    """
    seen = _processes()
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in seen.items():
        children.setdefault(parent, []).append(pid)
    queue = [root.pid] if root is not None and verdict(root) == 'alive' else []
    queue += [pid for pid, start in (earlier or {}).items() if pid in seen and seen[pid][1] == start]
    queue += marked(instance)
    found: dict[int, str] = {}
    for pid in queue:  # the loop appends to it
        if pid > 1 and pid in seen and pid not in found:
            found[pid] = seen[pid][1]
            queue += [child for child in children.get(pid, []) if _mark_of(child) in ('', instance)]
    found.pop(os.getpid(), None)
    return found


def stop_tree(root: Identity | None, instance: str, grace: float = GRACE_SECS) -> list[int]:
    """Ends the tree of `root` and of the mark `instance`: SIGTERM, and after `grace` seconds SIGKILL.

    Returns the pids that are still alive after that; most likely they belong to another user.
    """
    return _end(lambda signalled: tree(root, instance, signalled), grace)


def stop_one(process: Identity, grace: float) -> list[int]:
    """Like stop_tree, but ends only that process and none of its descendants."""
    return _end(lambda _: {process.pid: process.start} if verdict(process) == 'alive' else {}, grace)


def _end(members: Callable[[dict[int, str]], dict[int, str]], grace: float) -> list[int]:
    """Sends SIGTERM, and after `grace` seconds SIGKILL, to what `members` returns, until it returns nothing.

    `members` takes the processes that were signalled so far and returns the live ones, both as {pid: start time}.
    """
    deadline = time.monotonic() + grace
    signalled: dict[int, str] = {}
    while alive := members(signalled):
        late = time.monotonic() >= deadline
        for pid, start in alive.items():
            if late or signalled.get(pid) != start:
                _signal(pid, start, signal.SIGKILL if late else signal.SIGTERM)
                signalled[pid] = start
        if time.monotonic() > deadline + 5:
            return sorted(alive)
        _wait_for_end(alive, 0.05 if late else max(0.01, min(0.25, deadline - time.monotonic())))
    reap()
    return []


def _signal(pid: int, start: str, number: signal.Signals) -> None:
    """Signals exactly that process. A pidfd, if the system has one, makes sure that a reused pid is never signalled."""
    try:
        if hasattr(os, 'pidfd_open'):
            descriptor = os.pidfd_open(pid)
            try:
                if start_time(pid) == start:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        elif start_time(pid) == start:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _wait_for_end(alive: Iterable[int], seconds: float) -> None:
    """Waits until one of the processes ends, `seconds` at most."""
    reap()
    with ExitStack() as opened:
        poller = select.poll()
        for pid in alive if hasattr(os, 'pidfd_open') else ():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            except OSError:
                continue  # out of descriptors: the other pidfds or the timeout end the wait
            opened.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
        poller.poll(seconds * 1000)
