"""`tt doctor`: it finds and explains processes, records and tasks that do not fit together; --fix mends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinytown.host.processes import INSTANCE_VARIABLE
from tinytown.model import new_id

from ..support import PATIENCE, Place, make_town
from ..worker.test_worker import await_exit


@pytest.fixture
def place(directory: Path) -> Iterator[Place]:
    made = make_town(directory, agent={'lease_secs': 6})
    yield made
    made.close()


def findings(place: Place, *words: str) -> dict[str, Any]:
    """The findings by kind, without `unserved`, which is always found because no townhall runs in these tests."""
    done = place.tt('doctor', '--json', *words, check=False)
    assert done.returncode == 1, done.stderr
    by_kind = {finding['kind']: finding for finding in json.loads(done.stdout)['findings']}
    assert by_kind.pop('unserved')['mended'] is False
    return by_kind


def test_a_served_and_consistent_town_has_no_findings(place: Place) -> None:
    place.hall()
    place.do('agent.spawn', name='a')
    done = place.tt('doctor')
    assert done.stdout == 'Processes, records and tasks fit together.\n'


def test_a_dead_worker_is_found_and_its_task_is_freed(place: Place) -> None:
    place.do('agent.spawn', name='a')
    task = place.do('task.assign', agent='a', task='sleep 60')['task_id']
    place.await_event('task.started', task_id=task)
    pid = place.do('agent.get', agent='a')['pid']
    os.kill(pid, signal.SIGKILL)
    await_exit(pid)
    assert str(pid) in findings(place)['dead worker']['what']
    assert findings(place, '--fix')['dead worker']['mended'] is True
    assert place.do('task.get', task_id=task)['state'] == 'pending'
    assert findings(place) == {}


def test_a_process_of_a_worker_without_a_record_is_found_and_ended(place: Place) -> None:
    env = os.environ | {'TINYTOWN_TOWN': str(place.root), 'TINYTOWN_AGENT_ID': new_id(), INSTANCE_VARIABLE: new_id()}
    with subprocess.Popen(
        [sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE, env=env
    ) as stray:
        assert str(stray.pid) in findings(place)['stray processes']['what']
        assert stray.poll() is None
        assert findings(place, '--fix')['stray processes']['mended'] is True
        assert stray.wait(PATIENCE) == -signal.SIGTERM
    assert findings(place) == {}


def test_tasks_of_a_stopped_agent_are_found_and_returned_to_the_backlog(place: Place) -> None:
    place.do('agent.spawn', name='a')
    place.do('agent.interrupt', agent='a')
    task = place.do('task.assign', agent='a', task='later')['task_id']
    place.do('agent.kill', agent='a')
    assert findings(place)['orphaned tasks']['what'].startswith('1 unfinished')
    assert findings(place, '--fix')['orphaned tasks']['mended'] is True
    assert place.do('task.get', task_id=task)['state'] == 'pending'
