"""What a worker keeps in the town's directory: the prompt of its round, and the reports that it has yet to deliver.

A report is on disk before it is sent and stays there until it was received. So a result survives its worker: whoever
frees an agent's tasks delivers its reports first, or work that is done would be done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import write_atomically
from .errors import Conflict, NotFound
from .store import Step, Store, text


def prompt_file(root: Path, agent_id: str) -> Path:
    return root / '.tt' / 'agents' / f'{agent_id}.prompt'


def _spool(root: Path, agent_id: str) -> Path:
    return root / '.tt' / 'agents' / f'{agent_id}.spool'


def keep(root: Path, agent_id: str, report: dict[str, Any]) -> Path:
    """Writes a report down: task, attempt, outcome, result, error. Raises OSError."""
    _spool(root, agent_id).mkdir(mode=0o700, exist_ok=True)
    file = _spool(root, agent_id) / f'{report["task"]}-{report["attempt"]}.json'
    write_atomically(file, json.dumps(report), 0o600)
    return file


def waiting(root: Path, agent_id: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The reports that an agent's processes left; one that can't be read is put aside."""
    for file in sorted(_spool(root, agent_id).glob('*.json')):
        try:
            report = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # someone else has delivered it
        except ValueError:
            file.rename(file.with_suffix('.unreadable'))
        else:
            yield file, report


def deliver(store: Store, report: dict[str, Any], by: str = '') -> Step[str]:
    """Delivers a report; what came of it, for a log. One that comes too late is refused, and done with all the same.

    `by` is who it is from, where the door does not say who asks.
    """
    result, error = (json.dumps(report[part], ensure_ascii=False) for part in ('result', 'error'))
    finish = store.finish(report['task'], report['attempt'], report['outcome'], result, error)
    finish.by = by
    try:
        reply = yield finish
    except (Conflict, NotFound) as e:
        return f'task {report["task"]}: report refused: {e.detail}'
    return f'task {report["task"]}: {text(reply[1])}' + (' already' if reply[0] == b'already' else '')


def deliver_all(store: Store, root: Path, agent_id: str) -> Step[None]:
    """Delivers what an agent's processes left; for when none of them runs any more."""
    for file, report in waiting(root, agent_id):
        yield from deliver(store, report)
        file.unlink(missing_ok=True)


def forget(root: Path, agent_id: str) -> None:
    """Removes what is kept for an agent that is no more."""
    for path in (root / '.tt' / 'agents').glob(f'{agent_id}.*'):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
