"""What a worker keeps in the town's directory: the prompt of its round, the reports that it has yet to deliver, and a
note of its process.

The note is locked for as long as the worker lives. So it is known here, and known to live, whatever its host is called
now, and from other containers that have the same directory.

A report is on disk before it is sent and stays there until it was received. So a result survives its worker:
`core.holders.free` delivers an agent's reports before it frees its tasks, or work that is done would be done again.
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
from ..files import write_atomically
from ..state.store import Step, Store, text
from .processes import (
    Identity,
    Verdict,
    agents_processes,
    hold,
    identify,
    is_beside,
    is_held,
    read_identity,
    this_host,
    verdict,
)
from .town_dir import TownDir


def keep(root: Path, agent_id: str, report: dict[str, Any]) -> Path:
    """Writes a report down: task, attempt, outcome, result, error. Raises OSError."""
    spool = TownDir(root).spool(agent_id)
    spool.mkdir(mode=0o700, exist_ok=True)
    file = spool / f'{report["task"]}-{report["attempt"]}.json'
    write_atomically(file, json.dumps(report), 0o600)
    return file


def waiting(root: Path, agent_id: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The reports that an agent's processes left; one that can't be read is put aside."""
    for file in sorted(TownDir(root).spool(agent_id).glob('*.json')):
        try:
            report = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # someone else has delivered it
        except ValueError:
            file.rename(file.with_suffix('.unreadable'))
        else:
            yield file, report


def deliver(store: Store, report: dict[str, Any]) -> Step[str]:
    """Delivers a report; what came of it, for a log. One that comes too late is refused, and done with all the same."""
    result, error = (json.dumps(report[part], ensure_ascii=False) for part in ('result', 'error'))
    try:
        reply = yield store.finish(report['task'], report['attempt'], report['outcome'], result, error)
    except (Conflict, NotFound) as e:
        return f'task {report["task"]}: report refused: {e.detail}'
    return f'task {report["task"]}: {text(reply[1])}' + (' already' if reply[0] == b'already' else '')


def deliver_all(store: Store, root: Path, agent_id: str) -> Step[None]:
    """Delivers what an agent's processes left; for when none of them runs any more."""
    for file, report in waiting(root, agent_id):
        yield from deliver(store, report)
        file.unlink(missing_ok=True)


def note_process(root: Path, agent_id: str, instance: str) -> None:
    """Notes that this process runs an instance of an agent, until it ends."""
    with suppress(OSError):  # a full disk, or one without locks: less is known of it then
        write_atomically(TownDir(root).process(agent_id), f'{instance} {identify(os.getpid()).line}', 0o600)
        hold(TownDir(root).process(agent_id))


def noted(root: Path, agent_id: str) -> tuple[str, Identity | None]:
    """The instance and process that an agent last ran as in this directory, with the name that this host has now."""
    try:
        instance, _, line = TownDir(root).process(agent_id).read_text().partition(' ')
    except OSError:
        return '', None
    process = read_identity(line)
    return instance, process and replace(process, host=this_host())


def judge(root: Path, agent_id: str, instance: str, process: Identity) -> Verdict:
    """Whether the process of an agent's instance lives; in another namespace of pids its lock tells."""
    if is_beside(process) and noted(root, agent_id)[0] == instance:
        lives = is_held(TownDir(root).process(agent_id))
        return 'unknown' if lives is None else 'alive' if lives else 'dead'
    return verdict(process)


def workers(root: Path) -> dict[str, Identity | None]:
    """The workers of this directory that have processes here, by instance; with the worker's own, if that is noted."""
    found: dict[str, Identity | None] = dict.fromkeys(agents_processes(str(root)))
    for file in TownDir(root).processes():
        instance, process = noted(root, file.stem)
        if process and verdict(process) == 'alive':
            found[instance] = process
    return found


def forget(root: Path, agent_id: str) -> None:
    """Removes what is kept for an agent that is no more."""
    import shutil  # late: it brings every compression

    for path in TownDir(root).of_agent(agent_id):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
