"""A worker's files in the town's directory: a spool of undelivered reports, and a note of its process.

The spool: the worker writes a report to disk before it sends it, and removes the file once Redis has the report. So a
result survives its worker. `core.holders.free` delivers an agent's reports before it frees the agent's tasks;
otherwise finished work would be done again.

The note: it holds the agent's instance and process, and the worker locks it until it ends. The lock shows that the
worker is alive, even if its host was renamed since or the worker runs in another container with the same directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Conflict, NotFound
from ..files import make_directory, write_atomically
from ..state.store import Step, Store, text
from .processes import (
    Identity,
    Verdict,
    agents_processes,
    hold,
    identify,
    is_held,
    is_in_other_namespace,
    read_identity,
    this_host,
    verdict,
)
from .town_dir import TownDir


def keep(root: Path, agent_id: str, report: dict[str, Any]) -> Path:
    """Writes a report to the spool: task, attempt, outcome, result, error. Returns its file. Raises OSError."""
    spool = TownDir(root).spool(agent_id)
    make_directory(spool)
    file = spool / f'{report["task"]}-{report["attempt"]}.json'
    write_atomically(file, json.dumps(report), 0o600)
    return file


def waiting(root: Path, agent_id: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The undelivered reports of an agent, each with its file. Renames a file that can't be parsed to `.unreadable`."""
    for file in sorted(TownDir(root).spool(agent_id).glob('*.json')):
        try:
            report = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # another process has delivered it
        except ValueError:
            file.rename(file.with_suffix('.unreadable'))
        else:
            yield file, report


def deliver(store: Store, report: dict[str, Any]) -> Step[str]:
    """Delivers a report. Returns a line for the log: the task's new state, or why the report was refused.

    A report that comes too late is refused. It counts as delivered all the same: it would be refused every time.
    """
    result, error = (json.dumps(report[part], ensure_ascii=False) for part in ('result', 'error'))
    try:
        reply = yield store.finish(report['task'], report['attempt'], report['outcome'], result, error)
    except (Conflict, NotFound) as e:
        return f'task {report["task"]}: report refused: {e.detail}'
    return f'task {report["task"]}: {text(reply[1])}' + (' already' if reply[0] == b'already' else '')


def deliver_all(store: Store, root: Path, agent_id: str) -> Step[None]:
    """Delivers and removes the reports in an agent's spool. No process of the agent may run any more."""
    for file, report in waiting(root, agent_id):
        yield from deliver(store, report)
        file.unlink(missing_ok=True)


def note_process(root: Path, agent_id: str, instance: str) -> None:
    """Writes the note that this process runs an instance of an agent, and locks it until this process ends."""
    with suppress(OSError):  # a full disk or one without locks: the worker runs, but other containers can't judge it
        write_atomically(TownDir(root).process(agent_id), f'{instance} {identify(os.getpid()).line}', 0o600)
        hold(TownDir(root).process(agent_id))


def noted(root: Path, agent_id: str) -> tuple[str, Identity | None]:
    """Reads an agent's note: its last instance and process here, under this host's present name. ('', None) without."""
    try:
        instance, _, line = TownDir(root).process(agent_id).read_text().partition(' ')
    except OSError:
        return '', None
    process = read_identity(line)
    return instance, process and replace(process, host=this_host())


def judge(root: Path, agent_id: str, instance: str, process: Identity) -> Verdict:
    """Whether the process of an agent's instance is alive. In another pid namespace, the lock on its note decides."""
    if is_in_other_namespace(process) and noted(root, agent_id)[0] == instance:
        held = is_held(TownDir(root).process(agent_id))
        return 'unknown' if held is None else 'alive' if held else 'dead'
    return verdict(process)


def workers(root: Path) -> dict[str, Identity | None]:
    """The instances of this town that have processes on this machine; each with its worker's process, if noted."""
    found: dict[str, Identity | None] = dict.fromkeys(agents_processes(str(root)))
    for file in TownDir(root).processes():
        instance, process = noted(root, file.stem)
        if process and verdict(process) == 'alive':
            found[instance] = process
    return found


def forget(root: Path, agent_id: str) -> None:
    """Removes every file of a deleted agent, except its log."""
    import shutil  # late: it imports every compression module

    for path in TownDir(root).of_agent(agent_id):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
