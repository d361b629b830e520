"""The townhalls that run in a town's directory: each one writes a note in `.tt/run`, for `tt` and other processes.

A townhall keeps its note locked until it ends. The lock shows that it is alive, even from another container.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from .. import config as configuration
from ..files import open_own, write_atomically
from ..settings import Config
from .processes import Identity, hold, identify, is_held, is_in_other_namespace, name_host, stop_one, this_host, verdict
from .town_dir import TownDir


def note_townhall(root: Path, url: str) -> Path:
    """Writes and locks the note of this townhall process, which serves at `url`.

    Returns the file. The caller removes it when the process ends.
    """
    me = identify(os.getpid())
    file = TownDir(root).create().townhall_note(me.pid)
    record = {'host': me.host, 'boot': me.boot, 'pid': me.pid, 'start': me.start, 'url': url}
    write_atomically(file, json.dumps(record), 0o600)
    with suppress(OSError):  # a disk without locks: other containers can't tell whether this townhall is alive
        hold(file)
    return file


def running_townhalls(root: Path) -> list[tuple[Path, Identity, str]]:
    """(note, process, URL) of each townhall of this directory that may still run. Removes the notes of dead ones.

    All of them run on this host, even if it had another name when they started.
    """
    found = []
    for file in TownDir(root).townhall_notes():
        try:
            with os.fdopen(open_own(file, os.O_RDONLY), encoding='utf-8') as opened:
                record = json.loads(opened.read())
            url = record.pop('url')
            process = Identity(**record | {'host': this_host()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # not a note
        if verdict(process) == 'dead' or (is_in_other_namespace(process) and is_held(file) is False):
            file.unlink(missing_ok=True)
        else:
            found.append((file, process, url))
    return found


def reload_townhalls(root: Path) -> int:
    """Sends SIGHUP to the townhalls of this directory, so that they reload the configuration. Returns their number."""
    alive = live_townhalls(root)
    for process, _ in alive:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGHUP)
    return len(alive)


def live_townhalls(root: Path) -> list[tuple[Identity, str]]:
    """(process, URL) of each townhall of this directory that is alive and that this process can signal."""
    name_host(configuration.load(root).host)
    return [(process, url) for _, process, url in running_townhalls(root) if verdict(process) == 'alive']


def stop_townhalls(root: Path, config: Config) -> tuple[int, list[str]]:
    """Stops the townhalls of this directory. Returns how many it stopped, and a message for each that it could not."""
    stopped, errors = 0, []
    for file, process, url in running_townhalls(root):
        stop_one(process, config.townhall.limits.drain_secs + 2)
        if verdict(process) == 'dead':
            file.unlink(missing_ok=True)
            stopped += 1
        else:
            is_unknown = verdict(process) == 'unknown'
            why = 'it is in another container or on another machine' if is_unknown else 'it is still alive'
            errors.append(f'The townhall on {url} (process {process.pid}) could not be stopped: {why}')
    return stopped, errors
