"""`make chaos`: a town under sabotage, and a ledger that says whether anything was lost, done twice or done wrongly.

Producers add tasks over REST and write down each acknowledgement. Workers run a CLI that notes each of its runs. A
saboteur, seeded, kills and pauses workers, townhall and Redis, and flushes scripts. Then the sabotage ends, the town is
given time to finish, and the sets are compared. Prints the seed and the counts; on a failure the history of what went
wrong, and exits with status 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytown.errors import TownError
from tinytown.processes import marked

from .support import Hall, Place, make_town, redis_pid, shell_cli

AGENTS = 4
POISON_EVERY = 40  # each so many tasks is one whose run kills its own worker


class Campaign:
    """One run: a town, its producers, its saboteur, and the ledger."""

    def __init__(self, root: Path, seed: int, seconds: float) -> None:
        self.random = random.Random(seed)
        self.seconds = seconds
        self.runs = root / 'runs'
        script = (
            f'echo "$TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT start" >> {self.runs}; '
            'grep -q poison && kill -9 $PPID; '
            f'sleep 0.0$(($$ % 9)); echo "$TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT end" >> {self.runs}'
        )
        self.place: Place = make_town(
            root,
            default_cli='chaos',
            agent={'lease_secs': 6, 'restart': 'on-failure', 'restart_cap': 1000, 'retry_backoff_secs': [0, 1]},
            townhall={'access_log': 'off'},
            agent_clis={'chaos': shell_cli(script)},
        )
        self.runs.touch()
        self.halls: list[Hall] = [self.place.hall() for _ in range(2)]
        self.acknowledged: dict[str, str] = {}
        self.sabotage: Counter[str] = Counter()
        self.unknown = 0
        self.over = threading.Event()
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------------------------- producing

    def produce(self, number: int) -> None:
        """Adds tasks until the campaign is over; what is not acknowledged is asked again under the same key."""
        count = 0
        while not self.over.is_set():
            count += 1
            key = f'p{number}-{count}'
            words = 'poison' if count % POISON_EVERY == 0 else f'task {key}'
            if count % 2:
                task = self._insist('/v1/tasks/assign', {'agent': f'w{count % AGENTS}', 'task': words}, key)
            else:
                task = self._insist('/v1/backlog', {'description': words}, key)
            if task:
                with self._lock:
                    assert task not in self.acknowledged.values(), f'{task} was acknowledged for two keys'
                    self.acknowledged[key] = task
            self.over.wait(0.02)

    def _insist(self, path: str, body: dict[str, Any], key: str) -> str:
        """The id of the task once it is acknowledged; '' if it was refused. An unknown outcome is asked again."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                reply = self.halls[hash(key) % len(self.halls)].post(path, body, Idempotency_Key=key)
                if reply.status == 201:
                    return str(reply.json['task_id'])
                if reply.status < 500 and reply.json['code'] != 'in-progress':
                    return ''
            except (OSError, ValueError, http.client.HTTPException):
                pass
            with self._lock:
                self.unknown += 1
            threading.Event().wait(0.1)
        raise AssertionError(f'{key} was not answered for a minute')

    def distribute(self) -> None:
        """Gives the backlog to the agents, again and again."""
        while not self.over.is_set():
            for number in range(AGENTS):
                try:
                    self.halls[0].post('/v1/backlog/assign-all', {'agent': f'w{number}'})
                except (OSError, ValueError):
                    pass
                self.over.wait(0.5)

    # -------------------------------------------------------------------------------------------------- sabotage

    def sabotage_until(self, end: float) -> None:
        """Does something bad every half second or so."""
        deeds = [self.kill_worker, self.pause_worker, self.kill_hall, self.kill_redis, self.pause_redis, self.flush]
        weights = [8, 4, 2, 2, 2, 2]
        while time.monotonic() < end:
            deed = self.random.choices(deeds, weights)[0]
            try:
                deed()
            except (TownError, OSError, TypeError):
                continue
            self.sabotage[deed.__name__] += 1
            self.over.wait(self.random.uniform(0.1, 0.9))

    def _worker_pid(self) -> int:
        agents = [a for a in self.place.do('agent.list')['agents'] if a['pid'] and a['state'] != 'Error']
        return int(self.random.choice(agents)['pid']) if agents else 0

    def kill_worker(self) -> None:
        if pid := self._worker_pid():
            os.kill(pid, signal.SIGKILL)

    def pause_worker(self) -> None:
        """Long enough, at times, for its lease to run out."""
        if pid := self._worker_pid():
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(self.random.choice([0.2, 1, 9]), _continue, [pid]).start()

    def kill_hall(self) -> None:
        index = self.random.randrange(len(self.halls))
        self.halls[index].kill()
        self.halls[index] = self.place.hall()

    def kill_redis(self) -> None:
        os.kill(redis_pid(self.place), signal.SIGKILL)

    def pause_redis(self) -> None:
        pid = redis_pid(self.place)
        os.kill(pid, signal.SIGSTOP)
        try:
            self.over.wait(self.random.uniform(0.05, 1.5))
        finally:
            _continue(pid)

    def flush(self) -> None:
        from tinytown.store import Command

        self.place.store.call(Command(None, ('SCRIPT', 'FLUSH')))


    # -------------------------------------------------------------------------------------------------- judging

    def run(self) -> list[str]:
        """The whole campaign. What is wrong at its end."""
        for number in range(AGENTS):
            self.place.do('agent.spawn', name=f'w{number}')
        threads = [threading.Thread(target=self._guarded, args=(self.produce, number)) for number in range(3)]
        threads.append(threading.Thread(target=self._guarded, args=(self.distribute,)))
        self.failures: list[str] = []
        for thread in threads:
            thread.start()
        self.sabotage_until(time.monotonic() + self.seconds)
        self.over.set()
        for thread in threads:
            thread.join()
        self.settle()
        return self.failures + self.judge()

    def _guarded(self, what: Callable[..., None], *arguments: Any) -> None:
        try:
            what(*arguments)
        except Exception as e:  # a producer that ended early would make the ledger small and the result worthless
            self.failures.append(f'{what.__name__} ended: {e!r}')

    def settle(self, patience: float = 120) -> None:
        """Gives the town time to finish what it has, without sabotage."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                for number in range(AGENTS):
                    self.place.do('backlog.assign_all', agent=f'w{number}')
            except TownError:
                pass
            try:
                counts = self.place.do('town.get_status', deep=True)['tasks']
            except TownError:
                continue
            if not counts['pending'] + counts['assigned'] + counts['running']:
                return
            last = self.place.store.call(self.place.store.last_event())
            self.place.store.call(self.place.store.next_event(last[0][0].decode(), 1000))

    def judge(self) -> list[str]:
        """Compares the ledger with what is in Redis, and each task's history with itself."""
        wrong = []
        tasks = self._all_tasks()
        dead = {letter['id'] for letter in self.place.do('deadletter.list')['dead_letters']}
        for key, task_id in self.acknowledged.items():
            task = tasks.get(task_id)
            if task is None:
                wrong.append(f'lost: {key} {task_id} was acknowledged and is not there')
            elif task['state'] not in ('completed', 'failed'):
                wrong.append(f'stuck: {key} {task_id} is {task["state"]}')
            elif task['state'] == 'failed' and task_id not in dead:
                wrong.append(f'odd: {key} {task_id} failed and is no dead letter: {task["error"]}')
            elif (task['description'] == 'poison') != (task_id in dead) and task['description'] == 'poison':
                wrong.append(f'odd: poison {task_id} is {task["state"]}')
        for task_id in tasks:
            wrong += self._judge_history(task_id)
        starts = Counter(line for line in self.runs.read_text().splitlines() if line.endswith(' start'))
        wrong += [f'twice: {line} ran {count} times' for line, count in starts.items() if count > 1]
        ids = [tuple(map(int, event['id'].split('-'))) for event in self.place.history()]
        if ids != sorted(set(ids)):
            wrong.append('events: ids do not rise')
        self.tasks, self.dead, self.starts = tasks, dead, starts
        return wrong

    def _all_tasks(self) -> dict[str, Any]:
        found, cursor = {}, ''
        while True:
            page = self.place.do('task.list', **({'cursor': cursor} if cursor else {}))
            found |= {task['task_id']: task for task in page['tasks']}
            cursor = page.get('next_cursor', '')
            if not cursor:
                return found

    def _judge_history(self, task_id: str) -> list[str]:
        """Attempts rise, each is started once, and one end is accepted, of the attempt that was running."""
        history = self.place.do('task.history', task_id=task_id)['history']
        started = [event['attempt'] for event in history if event['type'] == 'task.started']
        ends = [event for event in history if event['type'] in ('task.completed', 'task.failed', 'task.dead_lettered')]
        wrong = []
        if started != sorted(set(started)):
            wrong.append('attempts do not rise')
        if len(ends) > 1:
            wrong.append(f'{len(ends)} ends were accepted')
        if ends and ends[0]['type'] == 'task.completed' and ends[0]['attempt'] != started[-1]:
            wrong.append('it was completed by an attempt that was not the last')
        return [f'wrong: {task_id}: {what}: {json.dumps(history)}' for what in wrong]

    def left_behind(self, instances: set[str]) -> list[int]:
        """Processes of workers that are no more."""
        return [pid for instance in instances for pid in marked(instance)]


def _continue(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog='chaos', description=__doc__.split('\n')[0] if __doc__ else '')
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(1 << 31))
    arguments = parser.parse_args()
    print(f'chaos: seed {arguments.seed}, {arguments.seconds:g} s', flush=True)
    with tempfile.TemporaryDirectory(prefix='chaos-') as directory:
        campaign = Campaign(Path(directory), arguments.seed, arguments.seconds)
        try:
            wrong = campaign.run()
        finally:
            campaign.place.close()
        print(f'acknowledged {len(campaign.acknowledged)}, unknown outcomes asked again {campaign.unknown}')
        print(f'sabotage: {dict(campaign.sabotage)}')
        states = Counter(task['state'] for task in campaign.tasks.values())
        print(f'tasks: {dict(states)}, dead letters {len(campaign.dead)}, runs {sum(campaign.starts.values())}')
        print(f'wrong: {len(wrong)} (seed {arguments.seed})')
        for line in wrong[:50]:
            print(f'  {line}')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
