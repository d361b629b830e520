"""Processes: what identifies one, whether it lives, and how a whole tree of them is stopped.

A pid alone identifies nothing, it is used again: a process is its host, the boot it lives in, its pid and the time it
started. A zombie is dead. Of a process in another namespace of pids (a container) its pid tells nothing: a file that it
holds a lock on does. A tree is everything below a process by parentage, and whatever carries its mark in its
environment, which finds those that left their parent or their session. What carries another mark is another tree, even
if it was started from within this one: an agent may start agents, or the town's Redis.
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

from ..model import is_uuid, new_id

Verdict = Literal['alive', 'dead', 'unknown']
HAS_PROC: Final = Path('/proc/self/stat').exists()
GRACE_SECS: Final = 5.0
INSTANCE_VARIABLE: Final = 'TINYTOWN_INSTANCE'  # the environment variable by which a worker's processes are known


@dataclass(frozen=True, slots=True)
class Identity:
    """One process on one host. `boot` is as `this_boot` gives it; `start` its start in the kernel's ticks, or ''."""

    host: str
    boot: str
    pid: int
    start: str

    @property
    def line(self) -> str:
        """It as a line of text, which `read_identity` reads."""
        return f'{self.host} {self.boot} {self.pid} {self.start}'


_named: Final = ['']  # how this process was told to call its host


def name_host(name: str) -> None:
    """Gives this host the name by which this process and others know it; '' for the one that the system has."""
    _named[0] = name


def this_host() -> str:
    return _named[0] or _system_name()


@lru_cache(maxsize=1)
def _system_name() -> str:
    return re.sub(r'[^A-Za-z0-9._-]+', '-', socket.gethostname())


@lru_cache(maxsize=1)
def this_machine() -> str:
    """What tells this machine from others, whatever they are called; '' where nothing does.

    It stands for the id in machine-id(5), which is not to be told as it is.
    """
    found = _first_line('/etc/machine-id') or _first_line('/var/lib/dbus/machine-id')
    return hashlib.sha256(f'tinytown {found}'.encode()).hexdigest()[:16] if found else ''


@lru_cache(maxsize=1)
def this_boot() -> str:
    """Where pids mean something: `boot id@machine@namespace of pids`; each is '' where there is none to be had."""
    return f'{_first_line("/proc/sys/kernel/random/boot_id")}@{this_machine()}@{_this_space()}'


@lru_cache(maxsize=1)
def _this_space() -> str:
    """The namespace of pids that this process is in."""
    try:
        return re.sub(r'\D', '', str(Path('/proc/self/ns/pid').readlink()))
    except OSError:
        return ''


def _parts(boot: str) -> tuple[str, str, str]:
    """Boot id, machine and namespace of what `this_boot` gave; earlier versions wrote less, which is '' then."""
    found = [*boot.split('@'), '', '']
    return found[0], found[1], found[2]


def this_place() -> str:
    """Where processes see each other: the machine (its boot, if it has no id), and the namespace of their pids."""
    boot, machine, space = _parts(this_boot())
    return f'{machine or boot} pid:[{space}]'


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''


def identify(pid: int) -> Identity:
    return Identity(this_host(), this_boot(), pid, start_time(pid))


def read_identity(line: str) -> Identity | None:
    """The process that a line of text stands for; None if it stands for none."""
    parts = line.split(' ', 3)
    return Identity(parts[0], parts[1], int(parts[2]), parts[3]) if len(parts) == 4 and parts[2].isdecimal() else None


def start_time(pid: int) -> str:
    """When a process started (ticks since boot, or ps' date); '' if there is no such process, or it is a zombie."""
    if not HAS_PROC:
        return next((start for _, _, start in _ps('-p', str(pid))), '')
    fields = _stat(pid)
    return fields[19] if fields else ''


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on; [] if there is no such process, or it is dead."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []
    return [] if fields[0] in 'ZX' else fields


def _ps(*which: str) -> list[tuple[int, int, str]]:
    """(pid, parent, start) of the live ones among some processes, as ps tells it; in one language and time zone."""
    found = subprocess.run(
        ['ps', '-o', 'pid=,ppid=,stat=,lstart=', *which],
        capture_output=True,
        text=True,
        check=False,
        env={'PATH': os.environ.get('PATH', os.defpath), 'LC_ALL': 'C', 'TZ': 'UTC'},
    )
    rows = (line.split(None, 3) for line in found.stdout.splitlines())
    return [(int(pid), int(parent), start.strip()) for pid, parent, state, start in rows if state[0] not in 'ZX']


def verdict(identity: Identity) -> Verdict:
    """Whether a process lives. After another boot it is dead.

    Of another host, machine or namespace of pids nothing can be told.
    """
    if identity.host != this_host():
        return 'unknown'
    boot, machine, _ = _parts(identity.boot)
    if boot != _parts(this_boot())[0]:
        return 'unknown' if machine and machine != this_machine() else 'dead'
    if identity.pid <= 0 or not identity.start or is_beside(identity):
        return 'unknown'
    return 'alive' if start_time(identity.pid) == identity.start else 'dead'


def is_beside(identity: Identity) -> bool:
    """Whether a process goes by the name of this host in another namespace of pids: in another container, say."""
    boot, _, space = _parts(identity.boot)
    return identity.host == this_host() and boot == _parts(this_boot())[0] and space not in ('', _this_space())


_held: Final[list[int]] = []  # descriptors that are closed when this process ends


def hold(file: Path) -> None:
    """Locks a file for as long as this process lives, which is seen from each namespace of pids. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    _held.append(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(file: Path) -> bool | None:
    """Whether the process that locked a file lives; None if that can't be told."""
    try:
        with open(file, 'rb') as opened:
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
    """The command that runs a module of ours. The working directory, which agents write to, is not imported from."""
    return [sys.executable, '-P', '-m', module, *arguments]


def python_path() -> str:
    """The PYTHONPATH under which `python` finds what this process found."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH')]))


def start_detached(
    argv: list[str], cwd: Path, env: dict[str, str], log: Path, keep: Iterable[int] = (), mark: str = ''
) -> int:
    """Starts a process in a session of its own, that outlives us and holds none of our standard streams. Its pid.

    `keep` are further descriptors that it inherits. It is marked as a tree of its own: with `mark`, or a new one.
    Raises OSError.
    """
    reap()
    with open(log, 'ab') as out:
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env | {INSTANCE_VARIABLE: mark or new_id()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=tuple(keep),
        )
    child.returncode = 0  # Popen need not wait for it: `reap` does
    with _children_lock:
        _children.add(child.pid)
    return child.pid


def reap(but: Collection[int] = ()) -> None:
    """Collects the exit statuses of children that have ended (each by its pid: others' are not stolen).

    As process 1, of a container, those too that were left to us; all but `but`, for whom someone waits.
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
    """Makes orphaned descendants ours and not init's, so that a tree stays one (Linux; no effect elsewhere)."""
    if sys.platform == 'linux':
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap_orphans(but: Collection[int] = ()) -> None:
    """Collects children that ended, adopted ones too; all but `but`, for which someone waits (Linux, as above)."""
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
    """The mark that a process carries in its environment; '' if none, or it is not to be seen."""
    return _variable(pid, INSTANCE_VARIABLE)


def _variable(pid: int, name: str) -> str:
    """A variable of the environment that a process was started with; '' if it is not there, or not to be seen."""
    try:
        environ = Path(f'/proc/{pid}/environ').read_bytes()
    except OSError:
        return ''
    prefix = f'{name}='.encode()
    found = [entry for entry in environ.split(b'\0') if entry.startswith(prefix)]
    return found[0].removeprefix(prefix).decode('utf-8', 'replace') if found else ''


def agents_processes(town: str) -> dict[str, list[int]]:
    """The processes on this machine that belong to agents of the town in that directory, by the instance they carry."""
    found: dict[str, list[int]] = {}
    for pid in [int(name) for name in os.listdir('/proc') if name.isdigit()] if HAS_PROC else []:
        if _variable(pid, 'TINYTOWN_TOWN') == town and _variable(pid, 'TINYTOWN_AGENT_ID') and start_time(pid):
            found.setdefault(_mark_of(pid), []).append(pid)
    return found


def marked(instance: str) -> list[int]:
    """The pids of processes that carry the mark of a worker's instance in their environment (where /proc tells).

    What is not an instance id marks nothing.
    """
    if not HAS_PROC or not is_uuid(instance):
        return []
    pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _mark_of(pid) == instance]


def tree(root: Identity | None, instance: str, told: Mapping[int, str] | None = None) -> dict[int, str]:
    """The live processes of a tree, with their start times: `root`, what is below it, what carries the mark.

    Those in `told` stay members though they have left it. The process that asks is never one.
    """
    seen = _processes()
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in seen.items():
        children.setdefault(parent, []).append(pid)
    queue = [root.pid] if root is not None and verdict(root) == 'alive' else []
    queue += [pid for pid, start in (told or {}).items() if pid in seen and seen[pid][1] == start]
    queue += marked(instance)
    found: dict[int, str] = {}
    for pid in queue:  # it grows on the way
        if pid > 1 and pid in seen and pid not in found:
            found[pid] = seen[pid][1]
            queue += [child for child in children.get(pid, []) if _mark_of(child) in ('', instance)]
    found.pop(os.getpid(), None)
    return found


def stop_tree(root: Identity | None, instance: str, grace: float = GRACE_SECS) -> list[int]:
    """Ends the tree of a process and of the mark `instance`: TERM, and after `grace` seconds KILL.

    Returns the pids that could not be ended (none, unless they belong to someone else).
    """
    return _end(lambda told: tree(root, instance, told), grace)


def stop_one(process: Identity, grace: float) -> list[int]:
    """As stop_tree, but for that process alone: what it started lives on."""
    return _end(lambda _: {process.pid: process.start} if verdict(process) == 'alive' else {}, grace)


def _end(members: Callable[[dict[int, str]], dict[int, str]], grace: float) -> list[int]:
    """TERM, and after `grace` seconds KILL, for what `members` finds, until it finds none; it is given who was told."""
    deadline = time.monotonic() + grace
    told: dict[int, str] = {}
    while alive := members(told):
        late = time.monotonic() >= deadline
        for pid, start in alive.items():
            if late or told.get(pid) != start:
                _signal(pid, start, signal.SIGKILL if late else signal.SIGTERM)
                told[pid] = start
        if time.monotonic() > deadline + 5:
            return sorted(alive)
        _wait_for_end(alive, 0.05 if late else max(0.01, min(0.25, deadline - time.monotonic())))
    reap()
    return []


def _signal(pid: int, start: str, number: signal.Signals) -> None:
    """Signals that very process: through a pidfd where there is one, so that a reused pid is never hit."""
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
                continue  # out of descriptors: the others, or the time, have to do
            opened.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
        poller.poll(seconds * 1000)
