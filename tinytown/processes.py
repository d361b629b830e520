"""Processes: what identifies one, whether it lives, and how a whole tree of them is stopped.

A pid alone identifies nothing, it is used again: a process is its host, the boot it lives in, its pid and the time it
started. A zombie is dead. A tree is everything below a process by parentage, and whatever carries its mark in its
environment, which finds those that left their parent or their session.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from .model import is_uuid

Verdict = Literal['alive', 'dead', 'unknown']
HAS_PROC: Final = Path('/proc/self/stat').exists()
GRACE_SECS: Final = 5.0
MARK: Final = 'TINYTOWN_INSTANCE'  # the environment variable by which a worker's processes are known


@dataclass(frozen=True, slots=True)
class Identity:
    """One process on one host in one boot. `start` is its start time in the kernel's ticks, '' if unknown."""

    host: str
    boot: str
    pid: int
    start: str


@lru_cache(maxsize=1)
def this_host() -> str:
    return socket.gethostname()


@lru_cache(maxsize=1)
def this_boot() -> str:
    """The id of this boot of the machine; '' where there is none to be had."""
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        return ''


def identify(pid: int) -> Identity:
    return Identity(this_host(), this_boot(), pid, start_time(pid))


def start_time(pid: int) -> str:
    """When a process started (ticks since boot, or ps' date); '' if there is no such process, or it is a zombie."""
    if not HAS_PROC:
        found = subprocess.run(['ps', '-o', 'lstart=', '-p', str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip()
    fields = _stat(pid)
    return '' if not fields or fields[0] in 'ZX' else fields[19]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on; [] if there is no such process."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []


def verdict(identity: Identity) -> Verdict:
    """Whether a process lives. Of another host nothing can be told; after another boot it is dead."""
    if identity.host != this_host():
        return 'unknown'
    if identity.boot != this_boot():
        return 'dead'
    if identity.pid <= 0:
        return 'unknown'
    return 'alive' if start_time(identity.pid) == identity.start else 'dead'


# --------------------------------------------------------------------------------------------------------- start

_children: list[subprocess.Popen[bytes]] = []


def start_detached(argv: list[str], cwd: Path, env: dict[str, str], log: Path, keep: Iterable[int] = ()) -> int:
    """Starts a process in a session of its own, that outlives us and holds none of our standard streams. Its pid.

    `keep` are further descriptors that it inherits. Raises OSError.
    """
    reap()
    with open(log, 'ab') as out:
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=tuple(keep),
        )
    _children.append(child)
    return child.pid


def reap() -> None:
    """Collects the exit statuses of children that have ended (each by its pid: others' are not stolen)."""
    _children[:] = [child for child in _children if child.poll() is None]


def become_subreaper() -> None:
    """Makes orphaned descendants ours and not init's, so that a tree stays one (Linux; no effect elsewhere)."""
    if sys.platform == 'linux':
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap_orphans() -> bool:
    """Collects children that ended, adopted ones too; only where no other child is waited for. Whether any is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


# ---------------------------------------------------------------------------------------------------------- trees


def descendants(root: int) -> list[int]:
    """The pids below a process, parents first."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _parents() -> list[tuple[int, int]]:
    if HAS_PROC:
        stats = ((int(name), _stat(int(name))) for name in os.listdir('/proc') if name.isdigit())
        return [(pid, int(fields[1])) for pid, fields in stats if fields]
    listing = subprocess.run(['ps', '-axo', 'pid=,ppid='], capture_output=True, text=True, check=False).stdout
    return [(int(a), int(b)) for a, b in (line.split() for line in listing.splitlines())]


def marked(instance: str) -> list[int]:
    """The pids of processes that carry the mark of a worker's instance in their environment (where /proc tells).

    What is not an instance id marks nothing.
    """
    if not HAS_PROC or not is_uuid(instance):
        return []
    wanted, found = f'\0{MARK}={instance}\0'.encode(), []
    for name in os.listdir('/proc'):
        if name.isdigit() and int(name) != os.getpid():
            try:
                environ = Path(f'/proc/{name}/environ').read_bytes()
            except OSError:
                continue
            if wanted in b'\0' + environ + b'\0':
                found.append(int(name))
    return found


def stop_tree(root: Identity | None, instance: str = '', grace: float = GRACE_SECS) -> list[int]:
    """Ends a process, all below it, and all that carry the mark of `instance`: TERM, after `grace` seconds KILL.

    Returns the pids that could not be ended (none, unless they belong to someone else).
    """
    return _end(lambda told: _members(root, instance, told), grace)


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


def _members(root: Identity | None, instance: str, told: dict[int, str]) -> dict[int, str]:
    """The live members of a tree, root first, with their start times; those told before stay members."""
    pids = list(told) + marked(instance)
    if root is not None and verdict(root) == 'alive':
        pids = [root.pid, *descendants(root.pid), *pids]
    for pid in list(pids):
        pids += descendants(pid)
    starts = {pid: start_time(pid) for pid in dict.fromkeys(pids) if pid not in (0, 1, os.getpid())}
    return {pid: start for pid, start in starts.items() if start and told.get(pid, start) == start}


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


def _wait_for_end(alive: dict[int, str], seconds: float) -> None:
    """Waits until one of the processes ends, `seconds` at most."""
    reap()
    if not hasattr(os, 'pidfd_open'):
        time.sleep(seconds)
        return
    import select

    poller = select.poll()
    opened = []
    for pid in alive:
        try:
            opened.append(os.pidfd_open(pid))
        except OSError:
            continue
        poller.register(opened[-1], select.POLLIN)
    if len(opened) == len(alive):
        poller.poll(seconds * 1000)
    for descriptor in opened:
        os.close(descriptor)
