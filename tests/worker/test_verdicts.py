"""What an agent does after a run that its coding CLI, its provider or the machine has cut short.

The CLIs here are scripts named like the real programs; they replay what those printed (`tests/recorded/clis`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support import Place, make_town

RECORDED = Path(__file__).parents[1] / 'recorded' / 'clis'


class Double:
    """A stand-in for `claude`, whose next run replays a recorded one."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._script = place.root / 'bin' / 'claude'
        self._script.parent.mkdir()
        self.replays('done', 0)

    def replays(self, case: str, status: int) -> None:
        self.runs(f'cat {shlex.quote(str(RECORDED / f"claude-{case}.out"))}; exit {status}')

    def runs(self, commands: str) -> None:
        new = self._script.with_name('new')
        new.write_text(f'#!/bin/sh\ncat >/dev/null\n{commands}\n')
        new.chmod(0o755)
        new.replace(self._script)

    def assign(self, text: str) -> str:
        task_id: str = self.place.do('task.assign', agent='ann', task=text)['task_id']
        return task_id

    def task(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.place.do('task.get', task_id=task_id)
        return found

    def agent(self) -> dict[str, Any]:
        found: dict[str, Any] = self.place.do('agent.get', agent='ann')
        return found


@pytest.fixture
def double(directory: Path) -> Iterator[Double]:
    """A town whose CLI is the stand-in."""
    command = './bin/claude --print --output-format stream-json'
    place = make_town(directory, agent={'max_attempts': 2, 'retry_backoff_secs': [0]}, agent_clis={'claude': command})
    made = Double(place)
    yield made
    place.close()


def test_a_usage_limit_pauses_the_agent_and_fails_no_task(double: Double) -> None:
    double.replays('usage', 1)
    double.place.do('agent.spawn', name='ann', cli='claude')
    tasks = [double.assign(f'task {i}') for i in range(3)]
    paused = double.place.await_event('agent.paused')
    assert paused['why'] == 'limited: API Error: Request rejected (429) · You have reached your usage limit'
    agent = double.agent()
    assert (agent['state'], agent['trouble']) == ('Paused', paused['why'])
    assert agent['resumes_at'] > agent['last_heartbeat']
    assert [double.task(task)['state'] for task in tasks] == ['assigned'] * 3
    assert ' UTC: limited: API Error' in double.place.tt('list').stdout

    for _ in range(3):  # more often than max_attempts allows: a limit is not an attempt
        seen = len([event for event in double.place.history() if event['type'] == 'agent.paused'])
        double.place.do('agent.resume', agent='ann')
        while len([event for event in double.place.history() if event['type'] == 'agent.paused']) == seen:
            double.place.store.call(double.place.store.next_event(double.place.history()[-1]['id'], 1000))
    double.replays('done', 0)
    double.place.do('agent.resume', agent='ann')
    ended = [double.place.await_end(task) for task in tasks]
    assert [(task['state'], task['result']) for task in ended] == [('completed', 'the answer is 42')] * 3
    assert 'trouble' not in double.agent()


def test_a_pause_ends_by_itself(double: Double) -> None:
    event = '{"type":"rate_limit_event","rate_limit_info":{"status":"rejected","resetsAt":1}}'
    double.runs(
        f'test -e again && exec cat {RECORDED}/claude-done.out; touch again; echo {shlex.quote(event)}; '
        f'cat {RECORDED}/claude-usage.out; exit 1'
    )
    double.place.do('agent.spawn', name='ann', cli='claude')
    task = double.assign('one')
    double.place.await_event('agent.idle', why='its pause is over')
    assert double.place.await_end(task)['state'] == 'completed'


@pytest.mark.parametrize(('case', 'words'), [('401', 'Invalid API key'), ('credit', 'Credit balance is too low')])
def test_a_refused_key_puts_the_agent_in_error_and_leaves_its_inbox_alone(
    double: Double, case: str, words: str
) -> None:
    double.replays(case, 1)
    double.place.do('agent.spawn', name='ann', cli='claude')
    tasks = [double.assign(f'task {i}') for i in range(3)]
    assert words in double.place.await_event('agent.error')['why']
    agent = double.agent()
    assert agent['state'] == 'Error'
    assert words in agent['trouble']
    assert [double.task(task)['state'] for task in tasks] == ['assigned'] * 3
    double.replays('done', 0)
    double.place.do('agent.restart', agent='ann')
    assert [double.place.await_end(task)['state'] for task in tasks] == ['completed'] * 3


def test_an_unknown_option_puts_the_agent_in_error(double: Double) -> None:
    double.runs('echo "error: unknown option \'--prnt\'" >&2; exit 1')
    double.place.do('agent.spawn', name='ann', cli='claude')
    task = double.assign('one')
    assert "unknown option '--prnt'" in double.place.await_event('agent.error')['why']
    assert double.task(task)['state'] == 'assigned'


def test_quick_failures_in_a_row_stop_the_agent_before_they_drain_its_queue(double: Double) -> None:
    double.runs('echo "it does not work" >&2; exit 1')
    double.place.do('agent.spawn', name='ann', cli='claude')
    tasks = [double.assign(f'task {i}') for i in range(8)]
    assert 'it does not work' in double.place.await_event('agent.paused')['why']
    states = [double.task(task)['state'] for task in tasks]
    assert states == ['failed'] * 3 + ['assigned'] * 5


def test_a_cli_that_a_signal_ended_is_tried_again_as_often_as_a_task_may_be(double: Double) -> None:
    double.runs('kill -9 $$')
    double.place.do('agent.spawn', name='ann', cli='claude')
    task = double.assign('one')
    double.place.await_event('task.requeued', task_id=task)
    double.place.do('agent.resume', agent='ann')
    ended = double.place.await_end(task)
    assert (ended['state'], ended['dead_letter'], ended['attempt']) == ('failed', True, 2)
    assert 'ended by signal 9' in ended['error']


def test_a_run_gets_no_other_providers_key(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('ANTHROPIC_API_KEY', 'ANTHROPIC_BASE_URL', 'OPENAI_API_KEY', 'GEMINI_API_KEY'):
        monkeypatch.setenv(name, 'a value of 20 letters')
    double.runs('env >seen; cat ' + str(RECORDED / 'claude-done.out'))
    double.place.do('agent.spawn', name='ann', cli='claude')
    double.place.await_end(double.assign('one'))
    seen = {line.partition('=')[0] for line in (double.place.root / 'seen').read_text().splitlines()}
    assert {'ANTHROPIC_API_KEY', 'ANTHROPIC_BASE_URL', 'CLAUDE_CODE_MAX_RETRIES'} <= seen
    assert not {'OPENAI_API_KEY', 'GEMINI_API_KEY'} & seen


def test_a_reason_of_any_length_stays_short_in_records_and_events(double: Double) -> None:
    line = '{"type":"result","is_error":true,"result":"usage limit reached %0200000d"}'
    double.runs(f"printf '{line}\\n' 1; exit 1")
    double.place.do('agent.spawn', name='ann', cli='claude')
    double.assign('one')
    assert len(double.place.await_event('agent.paused')['why']) < 600
    assert len(double.agent()['trouble']) < 600
