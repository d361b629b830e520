"""`make chaos`: runs a town under sabotage and checks that nothing was lost, done twice or done wrongly.

Producers create tasks and send messages over REST, and record every acknowledgement in a ledger. Workers run a CLI that
records each of its runs. Some tasks leave processes behind; "poison" tasks kill their own worker. A saboteur with a
seeded random generator kills and pauses workers, CLIs, townhalls and Redis, drops replies, cuts connections and flushes
scripts. Then the town gets time to finish, and the ledger is compared with the state of the town.

Prints the seed, the counts and the times. On a failure it also prints what is wrong, with the history of the task, and
the directory of the town, and exits with status 1. Start with `campaign`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from tinytown.errors import TownError
from tinytown.host import managed_redis
from tinytown.host.processes import INSTANCE_VARIABLE
from tinytown.state.store import Command, text

from .proxy import Fate, Proxy, accepts
from .support import Hall, Place, make_town

AGENTS = 4
PRODUCERS = 3
MAX_WAITING = 60  # tasks and messages; producers pause while more of them wait, so that the town can finish soon
LEASE_SECS = 6
ATTEMPTS = 3
MAX_REQUEUE_SECS = LEASE_SECS + 25  # lease + 5 s is the promise while townhall and Redis run; both are killed here
EVENTS = 'task.completed', 'task.failed', 'task.dead_lettered', 'task.cancelled'
CLI = r"""
prompt=$(cat)
[ "$TINYTOWN_TASK_ID" ] && echo "start $TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT" >>runs
printf '%s\n' "$prompt" | sed -n 's/^- .*a question from .*: letter \([^ ]*\)$/\1/p' >>letters
case $prompt in
*'## Task

poison'*) kill -9 $PPID; sleep 900 ;;
*'## Task

litter'*) setsid sleep 900 & setsid sh -c 'trap "" TERM; sleep 900' >/dev/null 2>&1 & ;;
esac
sleep 0.$(($$ % 3))$(($$ % 10))
[ "$TINYTOWN_TASK_ID" ] && echo "end $TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT" >>runs
echo "by attempt $TINYTOWN_ATTEMPT"
"""


class Order(NamedTuple):
    """A producer's request, and the id in its acknowledgement ('' if the request was refused)."""

    path: str
    body: dict[str, Any]
    id: str


@dataclass
class Ledger:
    """What was requested and acknowledged, what was sabotaged, and what was observed."""

    orders: dict[str, Order] = field(default_factory=dict)  # by idempotency key
    retries: int = 0  # requests sent again because their outcome was unknown
    repeated: int = 0  # acknowledged requests sent once more on purpose
    wrong: list[str] = field(default_factory=list)
    deeds: Counter[str] = field(default_factory=Counter)
    worker_kills: list[tuple[float, str]] = field(default_factory=list)  # time, agent
    cli_kills: set[str] = field(default_factory=set)  # 'task attempt'
    outages: list[float] = field(default_factory=list)  # seconds from kill -9 of Redis to ready
    events: list[str] = field(default_factory=list)  # the ids that a subscriber received
    marks: set[str] = field(default_factory=set)  # of processes; see `host.processes`

    def acknowledged(self, path: str) -> dict[str, str]:
        """The acknowledged orders for paths that start with `path`: {idempotency key: id}."""
        return {key: order.id for key, order in self.orders.items() if order.id and order.path.startswith(path)}


class Process(NamedTuple):
    """A process of the town."""

    pid: int
    parent: int
    argv: list[str]
    environ: dict[str, str]

    @property
    def agent(self) -> str:
        """The name of the agent whose worker it is; '' if it is not a worker."""
        return self.argv[4] if self.argv[2:4] == ['-m', 'tinytown.worker'] else ''


def processes(root: Path, marks: set[str]) -> Iterator[Process]:
    """The live processes whose working directory is below `root`, and those with one of the marks."""
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            fields = (entry / 'stat').read_text().rpartition(')')[2].split()
            inside = (entry / 'cwd').readlink().is_relative_to(root)
            words = [part.decode('utf-8', 'replace') for part in (entry / 'cmdline').read_bytes().split(b'\0')]
            pairs = (entry / 'environ').read_text('utf-8', 'replace').split('\0')
        except OSError:
            continue
        environ = dict(pair.split('=', 1) for pair in pairs if '=' in pair)
        if fields[0] not in 'ZX' and (inside or environ.get(INSTANCE_VARIABLE) in marks):
            yield Process(int(entry.name), int(fields[1]), words, environ)


class Town:
    """The town of a campaign: two townhalls, some agents, and a proxy on the socket of the managed Redis.

    Every restarted Redis creates its socket anew; a thread then puts a new proxy in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place: Place = make_town(
            root,
            default_cli='chaos',
            agent={
                'lease_secs': LEASE_SECS,
                'max_attempts': ATTEMPTS,
                'restart': 'on-failure',
                'restart_cap': 1_000_000,
                'retry_backoff_secs': [0, 1],
            },
            townhall={'access_log': 'off'},
            retention={'events': 10_000_000},
            agent_clis={'chaos': 'sh cli'},
        )
        (root / 'cli').write_text(CLI)
        for name in ('runs', 'letters'):
            (root / name).touch()
        self.socket = managed_redis.socket_path(self.place.town.root)
        self.halls: list[Hall] = []
        self._fates: list[Fate] = []
        self._proxy: Proxy | None = None
        self._over = threading.Event()
        self._take_place()
        self._watcher = threading.Thread(target=self._watch, name='watcher', daemon=True)
        self._watcher.start()

    def open_hall(self) -> Hall:
        """Starts a townhall. Tries again when the sabotage makes the start fail."""
        for _ in range(20):
            with suppress(AssertionError):
                return self.place.hall()
        raise AssertionError('no townhall could be opened')

    def doom(self, fate: Fate) -> None:
        """Injects a fault into the next command of any client."""
        self._fates.append(fate)

    def _judge(self, pid: int, _name: str) -> Fate | None:
        return self._fates.pop() if self._fates and pid != os.getpid() else None

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            with suppress(OSError):
                self._take_place()

    def _take_place(self) -> None:
        """Puts a proxy on the socket of a new Redis. The rename is atomic: Redis or the proxy listens there always."""
        if accepts(self.socket) in (0, os.getpid()):
            return
        if self._proxy:
            self._proxy.close()
        real, new = self.socket.with_name('real.sock'), self.socket.with_name('proxy.sock')
        for path in (real, new):
            path.unlink(missing_ok=True)
        os.link(self.socket, real)
        self._proxy = Proxy(new, real, self._judge)
        new.rename(self.socket)

    def redis_pid(self) -> int:
        return accepts(self.socket.with_name('real.sock'))

    def close(self) -> str:
        """Stops the town as a user does. Returns the error output of `tt stop`."""
        self._over.set()
        self._watcher.join()
        for hall in self.place.halls:
            hall.kill()
        errors = self.place.tt('stop', '--redis', check=False).stderr
        self.place.store.close()
        if self._proxy:
            self._proxy.close()
        return errors


# ----------------------------------------------------------------------------------------------------------- producing


class Producers:
    """The clients of the town, each in a thread, until `over` is set."""

    def __init__(self, town: Town, ledger: Ledger, seed: int, over: threading.Event) -> None:
        self._town, self._ledger, self._seed, self._over = town, ledger, seed, over
        self._room = threading.Event()
        self._threads = [self._thread(self._produce, number) for number in range(PRODUCERS)]
        self._threads += [self._thread(self._distribute), self._thread(self._follow_events)]

    def _thread(self, function: Callable[..., None], *arguments: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as e:  # if a producer ended unnoticed, the ledger would be small and the result worthless
                self._ledger.wrong.append(f'driver: {function.__name__} ended: {e!r}')

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _produce(self, number: int) -> None:
        """Sends requests. Repeats some acknowledged ones with the same idempotency key: their ids must be the same."""
        choice = random.Random(f'{self._seed} producer {number}')
        count = 0
        while not self._over.wait(choice.uniform(0, 0.4)):
            if not self._room.wait(0.1):
                continue
            count += 1
            key = f'p{number}-{count}'
            agent = f'w{choice.randrange(AGENTS)}'
            kind = choice.choices(('work', 'litter', 'poison', 'letter'), (80, 2, 0.8, 15))[0]
            path = '/v1/backlog'
            body: dict[str, Any] = {'description': f'{kind} {key}'}
            if kind == 'letter':
                urgent = choice.random() < 0.3
                path = '/v1/messages/send'
                body = {'to': agent, 'message': f'letter {key}', 'kind': 'query', 'urgent': urgent}
            elif choice.random() < 0.7:
                path, body = '/v1/tasks/assign', {'agent': agent, 'task': f'{kind} {key}'}
            order = Order(path, body, self._insist(path, body, key, choice))
            self._ledger.orders[key] = order
            if order.id and choice.random() < 0.1:
                self._ledger.repeated += 1
                second = self._insist(path, body, key, choice)
                if second != order.id:
                    self._ledger.wrong.append(f'double: {key} was acknowledged as {order.id} and as {second}')

    def _insist(self, path: str, body: dict[str, Any], key: str, choice: random.Random) -> str:
        """Sends a request to either townhall, again and again until its outcome is known.

        Returns the acknowledged id, or '' if the request was refused.
        """
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                reply = choice.choice(self._town.halls).post(path, body, Idempotency_Key=key)
                if reply.status == 201:
                    return str(reply.json.get('task_id') or reply.json['message_id'])
                if 400 <= reply.status < 500:
                    if reply.json['code'] != 'agent-not-accepting':
                        self._ledger.wrong.append(f'driver: {key} was refused: {reply.json}')
                    return ''
            except (OSError, ValueError, http.client.HTTPException):
                pass
            self._ledger.retries += 1
            self._over.wait(0.05)
        raise AssertionError(f'{key} was not answered for a minute')

    def _distribute(self) -> None:
        """Assigns the backlog to the agents, again and again. Pauses the producers while too much waits."""
        number = 0
        while not self._over.wait(0.2):
            number += 1
            hall = self._town.halls[number % 2]
            with suppress(OSError, ValueError, http.client.HTTPException):
                hall.post('/v1/backlog/assign-all', {'agent': f'w{number % AGENTS}'})
                status = hall.get('/v1/status')
                if status.status == 200:
                    waits = sum(agent['inbox_len'] + agent['urgent_len'] for agent in status.json['agents'])
                    (self._room.set if waits < MAX_WAITING else self._room.clear)()

    def _follow_events(self) -> None:
        """Reads the stream of events, and checks that the ids increase."""
        store = self._town.place.store
        seen = self._ledger.events
        while not self._over.is_set():
            last = seen[-1] if seen else '0-0'
            with suppress(TownError):
                reply = store.call(Command(None, ('XREAD', 'COUNT', 1000, 'STREAMS', store.prefix + b'events', last)))
                new = [text(entry) for entry, _ in reply[0][1]] if reply else []
                if [last, *new] != sorted({last, *new}, key=_numbers):
                    self._ledger.wrong.append(f'events: after {last} came {new}')
                seen += new
            self._over.wait(0.05)


def _numbers(event_id: str) -> list[int]:
    return [int(part) for part in event_id.split('-')]


# ------------------------------------------------------------------------------------------------------------ sabotage


class Saboteur:
    """Injects faults at random; the seed decides which ones, when and where."""

    DEEDS: Final = {  # by weight
        'kill_worker': 8,
        'pause_worker': 4,
        'kill_cli': 3,
        'kill_townhall': 2,
        'pause_townhall': 1,
        'kill_redis': 2,
        'pause_redis': 2,
        'drop_reply': 6,
        'cut_connection': 3,
        'flush_scripts': 2,
    }

    def __init__(self, town: Town, ledger: Ledger, seed: int) -> None:
        self._town, self._ledger = town, ledger
        self._choice = random.Random(f'{seed} saboteur')
        self._pauses: list[threading.Timer] = []
        self._waits: list[threading.Thread] = []

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        idle = threading.Event()
        while time.monotonic() < end:
            deed = self._choice.choices(list(self.DEEDS), list(self.DEEDS.values()))[0]
            with suppress(TownError, ProcessLookupError):
                if getattr(self, f'_{deed}')():
                    self._ledger.deeds[deed] += 1
            idle.wait(self._choice.uniform(0.05, 0.7))
        for thread in self._pauses + self._waits:
            thread.join()

    def _pick(self, fits: Callable[[Process], object]) -> Process | None:
        """Picks one of the processes that fit. Records the marks of all processes."""
        running = list(processes(self._town.root, set()))
        self._ledger.marks |= {process.environ.get(INSTANCE_VARIABLE, '') for process in running} - {''}
        workers = {process.pid for process in running if process.agent}
        fitting = sorted(
            # a child of a worker looks like a worker between fork and exec
            (process for process in running if fits(process) and not (process.agent and process.parent in workers)),
            key=lambda process: process.pid,
        )
        return self._choice.choice(fitting) if fitting else None

    def _kill_worker(self) -> bool:
        if process := self._pick(lambda process: process.agent):
            self._ledger.worker_kills.append((time.time(), process.agent))
            os.kill(process.pid, signal.SIGKILL)
        return process is not None

    def _pause_worker(self) -> bool:
        """Pauses a worker, sometimes for so long that its lease expires."""
        process = self._pick(lambda process: process.agent)
        return process is not None and self._pause(process.pid, self._choice.choice([0.2, 1, LEASE_SECS + 3]))

    def _kill_cli(self) -> bool:
        process = self._pick(lambda process: not process.agent and 'TINYTOWN_TASK_ID' in process.environ)
        if process:
            self._ledger.cli_kills.add(f'{process.environ["TINYTOWN_TASK_ID"]} {process.environ["TINYTOWN_ATTEMPT"]}')
            os.kill(process.pid, signal.SIGKILL)
        return process is not None

    def _kill_townhall(self) -> bool:
        index = self._choice.randrange(2)
        self._town.halls[index].kill()
        self._town.halls[index] = self._town.open_hall()
        return True

    def _pause_townhall(self) -> bool:
        """Pauses a townhall, sometimes for so long that the other one's supervisor takes over."""
        return self._pause(self._choice.choice(self._town.halls).process.pid, self._choice.choice([0.5, 7]))

    def _kill_redis(self) -> bool:
        pid = self._town.redis_pid()
        if pid:
            os.kill(pid, signal.SIGKILL)
            self._waits.append(threading.Thread(target=self._time_outage, args=(time.monotonic(),)))
            self._waits[-1].start()
        return pid != 0

    def _time_outage(self, began: float) -> None:
        """Records the time until a townhall answers that it is ready."""
        idle = threading.Event()
        while time.monotonic() - began < 60:
            idle.wait(0.01)
            for hall in self._town.halls:
                with suppress(OSError, http.client.HTTPException):
                    if hall.get('/ready').status == 200:
                        self._ledger.outages.append(time.monotonic() - began)
                        return
        self._ledger.wrong.append('stuck: Redis was not ready a minute after it was killed')

    def _pause_redis(self) -> bool:
        pid = self._town.redis_pid()
        return pid != 0 and self._pause(pid, self._choice.uniform(0.05, 2.5))

    def _drop_reply(self) -> bool:
        self._town.doom(Fate('cut', 'executed'))
        return True

    def _cut_connection(self) -> bool:
        self._town.doom(Fate('cut', 'arrived'))
        return True

    def _flush_scripts(self) -> bool:
        self._town.place.store.call(Command(None, ('SCRIPT', 'FLUSH')))
        return True

    def _pause(self, pid: int, seconds: float) -> bool:
        def go_on() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        os.kill(pid, signal.SIGSTOP)
        self._pauses.append(threading.Timer(seconds, go_on))
        self._pauses[-1].start()
        return True


# ------------------------------------------------------------------------------------------------------------- judging


class Verdict:
    """The final state, from Redis, from the CLI's records and from the process table; compared with the ledger."""

    def __init__(self, town: Town, ledger: Ledger) -> None:
        self._town, self._ledger = town, ledger
        self.wrong = ledger.wrong
        self.tasks: dict[str, dict[str, Any]] = {}
        self.requeues: list[float] = []

    def settle(self, patience: float = 180) -> None:
        """Waits, after the sabotage, until the town has finished its work and its processes have ended."""
        began = time.monotonic()
        deadline = began + patience
        idle = threading.Event()
        while self._is_busy() and time.monotonic() < deadline:
            idle.wait(0.3)
        self.settled = time.monotonic() - began
        self._left_behind = self._leftovers()
        while self._left_behind and time.monotonic() < deadline:  # a replaced worker ends after its round
            idle.wait(0.3)
            self._left_behind = self._leftovers()

    def _is_busy(self) -> bool:
        place = self._town.place
        try:
            for number in range(AGENTS):
                with suppress(TownError):
                    place.do('backlog.assign_all', agent=f'w{number}')
            status = place.do('town.get_status', deep=True)
        except TownError:
            return True
        waits = sum(agent['inbox_len'] + agent['urgent_len'] for agent in status['agents'])
        at_rest = all(agent['state'] == 'Idle' for agent in status['agents'])
        open_tasks = sum(status['tasks'][state] for state in ('pending', 'assigned', 'running'))
        return bool(waits or not at_rest or open_tasks)

    def _leftovers(self) -> list[str]:
        """The processes of the town except its agents' workers and its Redis."""
        known = {agent['pid'] for agent in self._town.place.do('agent.list')['agents']} | {self._town.redis_pid()}
        running = processes(self._town.root, self._ledger.marks)
        return [f'{process.pid} {" ".join(process.argv)}' for process in running if process.pid not in known]

    def judge(self) -> None:
        """Compares the state of the town with the ledger. Adds what is wrong to the ledger."""
        place = self._town.place
        self.tasks = {task['task_id']: task for task in self._all('task.list', 'tasks')}
        self.dead = {letter['id']: letter for letter in self._all('deadletter.list', 'dead_letters')}
        self.history = self._history()
        self.runs = Counter((self._town.root / 'runs').read_text().splitlines())
        self._judge_acknowledged()
        self._judge_messages()
        by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in self.history:
            if 'task_id' in event:
                by_task[event['task_id']].append(event)
        for task_id in self.tasks:
            self._judge_task(task_id, by_task[task_id])
        self.wrong += [f'twice: {line} ran {count} times' for line, count in self.runs.items() if count > 1]
        missing = set(self._ledger.events) - {event['id'] for event in self.history}
        self.wrong += [f'events: {each} was received and is gone' for each in sorted(missing)]
        self.wrong += [f'left behind: {line}' for line in self._left_behind]
        for agent in place.do('agent.list')['agents']:
            if agent['state'] != 'Idle':
                self.wrong.append(f'stuck: {agent["name"]} is {agent["state"]}')
        self._time_requeues(by_task)

    def _all(self, operation: str, name: str) -> Iterator[dict[str, Any]]:
        """All items of a paginated operation."""
        cursor: dict[str, Any] = {}
        while True:
            page = self._town.place.do(operation, **cursor)
            yield from page[name]
            if 'next_cursor' not in page:
                return
            cursor = {'cursor': page['next_cursor']}

    def _history(self) -> list[dict[str, Any]]:
        """Every event of the town."""
        store, events = self._town.place.store, []
        start = '-'
        while rows := store.call(Command(None, ('XRANGE', store.prefix + b'events', start, '+', 'COUNT', 5000))):
            events += [{'id': text(row[0])} | json.loads(b'{' + row[1][1] + b'}') for row in rows]
            start = f'({events[-1]["id"]}'
        return events

    def _judge_acknowledged(self) -> None:
        """Every acknowledged task exists exactly once, and no other task exists."""
        present = Counter(task['description'].split()[1] for task in self.tasks.values())
        acknowledged = self._ledger.acknowledged('/v1/tasks') | self._ledger.acknowledged('/v1/backlog')
        for key, task_id in acknowledged.items():
            if task_id not in self.tasks:
                self.wrong.append(f'lost: {key} {task_id} was acknowledged and is not there')
        for key, count in present.items():
            if count > 1:
                self.wrong.append(f'double: {key} is there {count} times')
            if key not in acknowledged:
                self.wrong.append(f'wrong: {key} is there and was not acknowledged')

    def _judge_messages(self) -> None:
        """Every acknowledged message was read in a round or is a dead letter."""
        read = set((self._town.root / 'letters').read_text().splitlines())
        for key, message_id in self._ledger.acknowledged('/v1/messages').items():
            if key not in read and message_id not in self.dead:
                self.wrong.append(f'lost: message {key} {message_id} was acknowledged and nobody read it')

    def _judge_task(self, task_id: str, history: list[dict[str, Any]]) -> None:
        """A task has exactly one end, by its last attempt; its attempts are 1, 2, 3; a dead letter used all of them."""
        task, wrong = self.tasks[task_id], []
        kind = task['description'].split()[0]
        started = [event['attempt'] for event in history if event['type'] == 'task.started']
        ends = [event for event in history if event['type'] in EVENTS]
        current = f'{task_id} {started[-1]}' if started else ''
        if started != list(range(1, len(started) + 1)):
            wrong.append('its attempts are not 1, 2, 3')
        if len(ends) != 1:
            wrong.append(f'{len(ends)} ends were accepted')
        elif ends[0]['attempt'] != started[-1]:
            wrong.append('it was ended by an attempt that was not the last')
        if task['state'] == 'completed':
            if kind == 'poison' or self.runs[f'end {current}'] != 1 or task['result'] != f'by attempt {started[-1]}':
                wrong.append(f'it was completed without a successful run: {task["result"]}')
        elif task['state'] != 'failed':
            wrong.append(f'it is {task["state"]}')
        elif task_id in self.dead:
            if len(started) != ATTEMPTS:
                wrong.append(f'it became a dead letter after {len(started)} attempts')
        elif current not in self._ledger.cli_kills:
            wrong.append(f'it failed by itself: {task["error"]}')
        self.wrong += [f'wrong: {task["description"]}: {fault}: {json.dumps(history)}' for fault in wrong]

    def _time_requeues(self, by_task: dict[str, list[dict[str, Any]]]) -> None:
        """Measures the time from each kill -9 of a worker that held a task to the event that freed the task."""
        held: dict[str, list[tuple[float, float]]] = defaultdict(list)  # by agent: start and end of holding a task
        for history in by_task.values():
            for event, following in pairwise(history):
                if event['type'] == 'task.started' and following['type'] in ('task.requeued', 'task.dead_lettered'):
                    held[event['agent_name']].append((_when(event), _when(following)))
        for when, agent in self._ledger.worker_kills:
            spans = sorted(held[agent])
            index = bisect_right(spans, (when, 0.0)) - 1
            if index >= 0 and spans[index][1] > when:
                self.requeues.append(spans[index][1] - when)
        if self.requeues and max(self.requeues) > MAX_REQUEUE_SECS:
            self.wrong.append(f'late: a task was freed {max(self.requeues):.1f} s after its worker was killed')


def _when(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event['at']).timestamp()


# ------------------------------------------------------------------------------------------------------------ campaign


def campaign(root: Path, seed: int, seconds: float) -> list[str]:
    """Runs a campaign in a new town in `root` and prints its numbers. Returns what was wrong."""
    town, ledger = Town(root), Ledger()
    try:
        town.halls = [town.open_hall(), town.open_hall()]
        for number in range(AGENTS):
            town.place.do('agent.spawn', name=f'w{number}')
        over = threading.Event()
        producers = Producers(town, ledger, seed, over)
        Saboteur(town, ledger, seed).work(seconds)
        over.set()
        producers.join()
        verdict = Verdict(town, ledger)
        verdict.settle()
        verdict.judge()
    finally:
        errors = town.close()
    ledger.wrong += [f'tt stop: {errors}'] if errors else []
    left = [f'{process.pid} {" ".join(process.argv)}' for process in processes(root, ledger.marks)]
    ledger.wrong += [f'left behind by tt stop: {line}' for line in left]
    print_numbers(ledger, verdict)
    return ledger.wrong


def print_numbers(ledger: Ledger, verdict: Verdict) -> None:
    """Prints the numbers of a campaign."""
    letters = ledger.acknowledged('/v1/messages')
    acknowledged = sum(bool(order.id) for order in ledger.orders.values())
    states = Counter(task['state'] for task in verdict.tasks.values())
    poison = [task for task in verdict.tasks.values() if task['description'].startswith('poison')]
    attempts = sum(line.startswith('start ') for line in verdict.runs)
    kinds = Counter(re.split(r'\W', line)[0] for line in ledger.wrong)
    print(f'acknowledged  {acknowledged} ({len(letters)} messages); refused {len(ledger.orders) - acknowledged}')
    print(f'              sent again: outcome unknown {ledger.retries}, on purpose {ledger.repeated}')
    print(f'sabotage      {", ".join(f"{deed} {count}" for deed, count in sorted(ledger.deeds.items()))}')
    print(f'tasks         {dict(states)}, dead letters {len(verdict.dead)}, poison {len(poison)}, runs {attempts}')
    print(f'settled       {verdict.settled:.1f} s after the sabotage')
    print(f'requeued      {_spread(verdict.requeues)} after kill -9 of the worker that held it')
    print(f'ready         {_spread(ledger.outages)} after kill -9 of Redis')
    print(f'lost {kinds["lost"]}, double {kinds["double"] + kinds["twice"]}, wrong {len(ledger.wrong)}', flush=True)


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return 'never'
    return f'{len(seconds)} times, median {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s,'


def main() -> int:
    parser = argparse.ArgumentParser(prog='chaos', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--seconds', type=float, default=60, help='how long the sabotage goes on (default: 60)')
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(1 << 31), help='default: a new one')
    arguments = parser.parse_args()
    print(f'chaos         seed {arguments.seed}, {arguments.seconds:g} s of sabotage', flush=True)
    root = Path(tempfile.mkdtemp(prefix='chaos-')).resolve()
    wrong = campaign(root, arguments.seed, arguments.seconds)
    if not wrong:
        shutil.rmtree(root)
        return 0
    for line in wrong[:50]:
        print(f'  {line}')
    print(f'seed {arguments.seed}; the town is kept in {root}')
    return 1


if __name__ == '__main__':
    sys.exit(main())
