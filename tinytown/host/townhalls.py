"""The townhalls that run in a town's directory: each notes itself in `.tt/run`; whoever needs them reads the notes.

A note is locked for as long as its townhall lives, which tells of one in another container, too.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from .. import config as configuration
from ..files import write_atomically
from ..settings import Config
from .processes import Identity, hold, identify, is_beside, is_held, name_host, stop_one, this_host, verdict
from .town_dir import TownDir


def note_townhall(root: Path, url: str) -> Path:
    """Writes down that this process serves the town at `url`. The file, to be removed when it ends."""
    me = identify(os.getpid())
    file = TownDir(root).made().townhall_note(me.pid)
    record = {'host': me.host, 'boot': me.boot, 'pid': me.pid, 'start': me.start, 'url': url}
    write_atomically(file, json.dumps(record), 0o600)
    with suppress(OSError):  # a disk without locks: less is known of it in other containers
        hold(file)
    return file


def running_townhalls(root: Path) -> list[tuple[Path, Identity, str]]:
    """(file, process, URL) of the townhalls that have written themselves down and may still run.

    They are this directory's, and so this host's, though it may have been called otherwise when they began.
    """
    found = []
    for file in TownDir(root).townhall_notes():
        try:
            record = json.loads(file.read_text())
            url = record.pop('url')
            process = Identity(**record | {'host': this_host()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # it is not one of ours
        if verdict(process) == 'dead' or (is_beside(process) and is_held(file) is False):
            file.unlink(missing_ok=True)
        else:
            found.append((file, process, url))
    return found


def tell_townhalls(root: Path) -> int:
    """Has the townhalls of this town that run on this machine take up the configuration. How many there are."""
    alive = live_townhalls(root)
    for process, _ in alive:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGHUP)
    return len(alive)


def live_townhalls(root: Path) -> list[tuple[Identity, str]]:
    """(process, URL) of the townhalls of this town that run on this machine."""
    name_host(configuration.load(root).host)
    return [(process, url) for _, process, url in running_townhalls(root) if verdict(process) == 'alive']


def stop_townhalls(root: Path, config: Config) -> tuple[int, list[str]]:
    """Stops the townhalls of this directory: how many, and which could not be."""
    stopped, left = 0, []
    for file, process, url in running_townhalls(root):
        stop_one(process, config.townhall.limits.drain_secs + 2)
        if verdict(process) == 'dead':
            file.unlink(missing_ok=True)
            stopped += 1
        else:
            why = 'it is in another container or on another machine' if verdict(process) == 'unknown' else 'it lives on'
            left.append(f'The townhall on {url} (process {process.pid}) could not be stopped: {why}')
    return stopped, left
