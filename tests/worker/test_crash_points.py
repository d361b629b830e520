"""A worker that is killed, or cut off from Redis, at each command of its loop: nothing is lost and nothing done twice.

Every run has the same scenario: a supervisor restarts an agent with two tasks and a question in its inbox. At one
command the new worker is killed or its connection is cut (`Fate`). The supervisor does the rest. A sample of all
combinations is run by default, and all of them with `CRASH_POINTS=all`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tinytown.core.agents import start_worker
from tinytown.core.town import Town
from tinytown.host import managed_redis
from tinytown.host.processes import identify, marked
from tinytown.state.store import Command, scripts, text
from tinytown.worker.supervisor import Supervisor

from ..ground import check, enlist
from ..proxy import Fate, Proxy
from ..support import LONG, PATIENCE, Place, make_town

# The commands that a worker sends in the scenario. The question comes with the first task, in the same round.
_ROUND = ['pickup', 'beat', 'finish', 'round_done']
SEQUENCE = ['agent', 'hello', *_ROUND, *_ROUND, 'pickup']
PICKUPS, FINISHES = (2, 6), (4, 8)  # of the first and the second task, as indexes in SEQUENCE
MOMENTS = ('arrived', 'executed', 'answered')
FATES = [Fate('kill', moment) for moment in MOMENTS] + [Fate('cut', moment) for moment in MOMENTS[:2]]  # type: ignore[arg-type]
RUNS = [(index, fate, lives) for lives in (1, 2) for index in range(len(SEQUENCE)) for fate in FATES]
CHOSEN = RUNS if os.environ.get('CRASH_POINTS') == 'all' else RUNS[: len(RUNS) // 2 : 3]
CLI = """\
[ "$TINYTOWN_TASK_ID" ] && echo "$TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT" >>runs
grep "^- a question from" >>letters
echo "by attempt $TINYTOWN_ATTEMPT"
"""


def name(run: tuple[int, Fate, int]) -> str:
    index, fate, lives = run
    return f'{index + 1}-{SEQUENCE[index]}-{fate.deed}-{fate.moment}' + ('-twice' if lives == 2 else '')


class Stage:
    """A town whose Redis is behind a proxy, and a supervisor whose clock the test sets."""

    def __init__(self, place: Place, proxy: Proxy) -> None:
        self.place = place
        self.proxy = proxy
        self.commands: list[list[str]] = []  # of each worker; '!' marks a command at which the fault was injected
        self.faults = 0  # how many were injected
        self.instances: list[str] = []
        self.supervisor = Supervisor(place.town, lambda: 0.0, self._start)
        self._pids: list[int] = []

    def _start(self, town: Town, agent_id: str, name: str, instance: str) -> None:
        self.instances.append(instance)
        start_worker(town, agent_id, name, instance)

    def play(self, index: int, fate: Fate | None, lives: int) -> list[str]:
        """Runs the scenario to its end. Injects `fate` at command `index` of the first `lives` workers.

        Returns the ids of the two tasks.
        """
        self.proxy.judge = self._judge(index, fate, lives)
        agent = enlist(self.place, 'w', hello=False)
        me = identify(os.getpid())
        dead = self.place.store.hello(agent.id, agent.instance, me.host, me.boot, 1 << 30, '1')  # no such process
        self.place.store.call(dead)
        tasks = [self.place.do('task.assign', agent='w', task=f'task {n}')['task_id'] for n in (1, 2)]
        self.place.do('message.send', to='w', message='what is the time?', kind='query')
        self.supervise(lambda: self._is_done(tasks))
        return tasks

    def _judge(self, index: int, fate: Fate | None, lives: int) -> Callable[[int, str], Fate | None]:
        def judge(pid: int, name: str) -> Fate | None:
            if pid == os.getpid():
                return None
            if pid not in self._pids:
                self._pids.append(pid)
                self.commands.append([])
            mine = self.commands[self._pids.index(pid)]
            mine.append(name)
            if fate is None or len(mine) != index + 1 or len(self.commands) > lives:
                return None
            self.faults += 1
            mine[-1] += '!'
            return fate

        return judge

    def _is_done(self, tasks: list[str]) -> bool:
        rests = bool(self.commands) and self.commands[-1][-1:] == ['XREAD']
        return rests and {self.place.do('task.get', task_id=task)['state'] for task in tasks} == {'completed'}

    def supervise(self, is_done: Callable[[], bool]) -> None:
        """Lets the supervisor look, one second of its clock at a time, until all is done."""
        deadline = time.monotonic() + LONG
        now, last = 0.0, '0-0'
        while True:
            now += 1
            self.supervisor.tick(now)
            for thread in tuple(self.supervisor._threads.values()):
                thread.join(PATIENCE)
            if is_done():
                return
            assert time.monotonic() < deadline, (self.commands, self.place.history())
            news = self.place.store.call(self.place.store.next_event(last, 50))
            last = text(news[0][1][-1][0]) if news else last

    def clear(self) -> None:
        """Empties the town and ends its worker."""
        self.proxy.judge = lambda _pid, _name: None
        self.place.do('town.reset', force=True)
        for file in ('runs', 'letters'):
            (self.place.root / file).unlink(missing_ok=True)


@pytest.fixture(scope='module')
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, Proxy]]:
    root = tmp_path_factory.mktemp('c')
    bed = make_town(root / 'bed', name='bed')
    proxy = Proxy(root / 'proxy', managed_redis.socket_path(bed.town.root))
    place = make_town(
        root / 'town',
        default_cli='noting',
        redis={'url': f'unix://{root}/proxy'},
        agent={'restart': 'on-failure', 'retry_backoff_secs': [0], 'lease_secs': 3600},  # the test's clock is fast
        agent_clis={'noting': 'sh cli'},
    )
    (place.root / 'cli').write_text(CLI)
    for script in scripts().values():
        place.store.call(Command(None, ('SCRIPT', 'LOAD', script.text)))  # else the first run sends each command twice
    yield place, proxy
    place.close()
    proxy.close()
    bed.close()


@pytest.fixture
def stage(proxied: tuple[Place, Proxy]) -> Iterator[Stage]:
    made = Stage(*proxied)
    yield made
    made.clear()


def lines(place: Place, file: str) -> Counter[str]:
    path = place.root / file
    return Counter(path.read_text().splitlines() if path.exists() else [])


def test_a_worker_in_the_scenario_sends_exactly_the_expected_commands(stage: Stage) -> None:
    stage.play(0, None, 0)
    assert stage.commands[0][: len(SEQUENCE)] == SEQUENCE
    assert stage.commands[0][len(SEQUENCE)] == 'XREAD'


@pytest.mark.parametrize('run', CHOSEN, ids=name)
def test_a_worker_killed_or_cut_off_at_any_command_loses_nothing_and_does_nothing_twice(
    stage: Stage, run: tuple[int, Fate, int]
) -> None:
    index, fate, lives = run
    tasks = stage.play(*run)
    place = stage.place
    check(place)
    runs = lines(place, 'runs')
    assert all(count == 1 for count in runs.values()), runs
    for which, task in enumerate(tasks):
        history = place.do('task.history', task_id=task)['history']
        ends = [event for event in history if event['type'] in ('task.completed', 'task.failed', 'task.dead_lettered')]
        started = [event['attempt'] for event in history if event['type'] == 'task.started']
        assert [event['type'] for event in ends] == ['task.completed'], history
        assert started == list(range(1, len(started) + 1))
        assert ends[0]['attempt'] == started[-1]
        assert place.do('task.get', task_id=task)['result'] == f'by attempt {started[-1]}'
        assert runs[f'{task} {started[-1]}'] == 1
        if lives == 1 and fate.moment != 'answered':  # otherwise the kill races with the worker's next step
            assert len(started) == 1 + is_lost(index, fate, which), history
    delivered = lines(place, 'letters').total()
    assert 1 <= delivered <= 1 + stage.faults
    assert place.do('agent.inbox', agent='w')['total'] == 0
    deaths = stage.faults if fate.deed == 'kill' or index < PICKUPS[0] else 0
    assert 1 <= stage.faults <= lives
    assert len(stage.commands) == len(stage.instances) == 1 + deaths
    assert [marked(instance) for instance in stage.instances[:-1]] == [[]] * (len(stage.instances) - 1)


def is_lost(index: int, fate: Fate, which: int) -> bool:
    """Whether a task's attempt is lost with its worker: the task was taken, and its report was not yet on disk."""
    if fate.deed == 'cut' or index < PICKUPS[which]:
        return False
    was_taken = index > PICKUPS[which] or fate.moment != 'arrived'
    return was_taken and index < FINISHES[which]
