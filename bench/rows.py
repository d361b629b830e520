"""Measures the figures, one function per kind (see ROWS): it takes the Bench and yields rows.

Servers are measured in turn, round by round, so that drift of the machine affects all of them.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from tinytown.auth.api_keys import generate_key
from tinytown.state.store import text

from .load import Ask, Load, Wrong, newcomers, percentile, timed, wrk
from .report import Row, Spread, ratio_row
from .servers import OURS, OURS_TWICE, Server, started
from .stage import AGENTS, BACKLOG, MESSAGES, READER, WRITER, Stage

INBOX: Final = Ask('inbox', 'GET', f'/v1/agents/{READER}/inbox')
ASSIGN: Final = Ask('assign', 'POST', '/v1/tasks/assign', {'agent': WRITER, 'task': 'Make the tests pass'}, 201)
STATUS: Final = Ask('status of 100 agents', 'GET', '/v1/status')
PAGE: Final = Ask('backlog page of 100', 'GET', '/v1/backlog?limit=100')

# The target for our rate, as a multiple of each peer's, by Redis's appendfsync.
TARGETS: Final = {
    'everysec': {'fastapi': 3.0, 'starlette': 1.3, 'aiohttp': 1.2},
    'always': {'starlette': 1.0},
}
TWICE_TARGETS: Final = {'inbox': 1.0, 'assign': 0.8}  # --workers 2 compared with fastify, with everysec
CONNECTIONS, BURST = 64, 256
KEYED: Final = 0.91  # target for the rate with an API key, as a part of the rate without
STEADY: Final = 0.85  # a smaller ratio of two rates is more than noise


@dataclass(frozen=True)
class Plan:
    """How much to measure: rounds, seconds per run, finished tasks in the long history, samples of everything else."""

    rounds: int
    seconds: int
    warm: int
    history: int
    pickups: int
    newcomers: int
    idle: int
    starts: int


LONG: Final = Plan(rounds=5, seconds=2, warm=1, history=100_000, pickups=100, newcomers=1000, idle=1000, starts=7)
SHORT: Final = Plan(rounds=1, seconds=1, warm=0, history=1000, pickups=10, newcomers=100, idle=200, starts=2)


@dataclass(frozen=True)
class Bench:
    stage: Stage
    names: Sequence[str]
    plan: Plan

    def names_of(self, *wanted: str) -> list[str]:
        return [name for name in wanted if name in self.names]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.names if name not in (OURS, OURS_TWICE)]


# ------------------------------------------------------------------------------------------------------------ checks


def check_read(ask: Ask, ports: Mapping[str, int], items: str, count: int) -> int:
    """Checks that all answer the same JSON with `count` items. Returns the shortest body's length. Raises Wrong."""
    answers = {name: ask.send(port) for name, port in ports.items()}
    documents = {name: json.loads(answer) for name, answer in answers.items()}
    first = next(iter(documents.values()))
    for name, document in documents.items():
        if document != first or len(document[items]) != count:
            raise Wrong(f'{ask.path}: {name} answers {document!r:.500}')
    return min(map(len, answers.values()))


def check_assign(stage: Stage, ports: Mapping[str, int]) -> int:
    """Checks that a task from each server is in the inbox. Returns the shortest body's length. Raises Wrong."""
    answers = {name: ASSIGN.send(port) for name, port in ports.items()}
    writer = stage.place.do('agent.get', agent=WRITER)['id']
    queued = {task['task_id']: task for task in stage.place.do('task.list', state='assigned', agent=WRITER)['tasks']}
    for name, answer in answers.items():
        body = json.loads(answer)
        task = queued.pop(body.pop('task_id', ''), {})
        if body != {'agent_id': writer, 'agent_name': WRITER} or task.get('description') != ASSIGN.body['task']:
            raise Wrong(f'{ASSIGN.path}: {name} answers {answer!r}, and the task is {task}')
    return min(map(len, answers.values()))


def check(stage: Stage, ask: Ask, ports: Mapping[str, int]) -> int:
    return check_assign(stage, ports) if ask is ASSIGN else check_read(ask, ports, 'messages', MESSAGES)


def measure(stage: Stage, server: Server, ask: Ask, connections: int, seconds: int, length: int) -> Load:
    """One run against one server. Raises Wrong if answers are too short, or if assigned tasks are missing."""
    before, used = stage.tasks(), server.cpu()
    load = wrk(ask, server.port, connections, seconds)
    load = replace(load, cpu=(server.cpu() - used) / max(load.requests, 1) * 1e6)
    created = stage.tasks() - before
    if load.bytes < load.served * length or created < (load.served if ask.name == ASSIGN.name else 0):
        raise Wrong(f'{server.name}, {ask.name}: {load}; {created} tasks were created; a body has {length} bytes')
    return load


# -------------------------------------------------------------------------------------------------------------- load

Loads = dict[str, list[Load]]


def in_turn(bench: Bench, servers: Mapping[str, Server], ask: Ask, connections: int) -> Loads:
    """The runs of each server. Every run starts from the same state."""
    plan, stage, found = bench.plan, bench.stage, defaultdict(list)
    length = check(stage, ask, {name: server.port for name, server in servers.items()})
    for number in range(-1 if plan.warm else 0, plan.rounds):
        for name, server in servers.items():
            if ask is ASSIGN:
                stage.reset()
            load = measure(stage, server, ask, connections, plan.seconds if number >= 0 else plan.warm, length)
            if number >= 0:
                found[name].append(load)
        progress(f'{ask.name}, {connections} connections, round {number + 1}')
    return dict(found)


def rates(loads: Sequence[Load]) -> list[float]:
    return [load.rate for load in loads]


def throughput(bench: Bench) -> Iterator[Row]:
    """inbox and assign on 64 connections, compared with each peer, for each appendfsync."""
    for policy in TARGETS:
        bench.stage.policy(policy)
        bench.stage.reset()
        with started(bench.names, bench.stage) as servers:
            for ask in (INBOX, ASSIGN):
                yield from _throughput_rows(
                    f'{ask.name}, {policy}', policy, ask, in_turn(bench, servers, ask, CONNECTIONS)
                )


def _throughput_rows(what: str, policy: str, ask: Ask, found: Loads) -> Iterator[Row]:
    figures = {name: [load.figures() for load in loads] for name, loads in found.items()}
    for ours in (OURS, OURS_TWICE):
        if ours not in found:
            continue
        twice = ours == OURS_TWICE
        title = f'{what}, 2 workers' if twice else what
        yield Row(title, f'{statistics.median(rates(found[ours])):,.0f}/s', figures=figures if not twice else {})
        for name in found:
            if name in (OURS, OURS_TWICE):
                continue
            target = TARGETS[policy].get(name)
            if twice:
                target = TWICE_TARGETS[ask.name] if (policy, name) == ('everysec', 'fastify') else None
            yield ratio_row(title, rates(found[ours]), name, rates(found[name]), target)


def burst(bench: Bench) -> Iterator[Row]:
    """p99 on 256 connections, and lost requests."""
    bench.stage.policy('everysec')
    bench.stage.reset()
    with started(bench.names, bench.stage) as servers:
        for ask in (INBOX, ASSIGN):
            for name, loads in in_turn(bench, servers, ask, BURST).items():
                p99 = Spread.of(load.p99 for load in loads)
                lost = sum(load.lost + load.refused for load in loads)
                result = f'{p99.median:.0f} ms, {lost} lost'
                figures = {'p99': p99, 'lost': lost, 'runs': [load.figures() for load in loads]}
                what = f'{ask.name} p99, {BURST} connections'
                if name in (OURS, OURS_TWICE):
                    met = p99.median <= 100 and not lost
                    title = what if name == OURS else f'{what}, 2 workers'
                    yield Row(title, result, target='≤ 100 ms, 0 lost', met=met, figures=figures)
                else:
                    yield Row(what, '', name, result, figures=figures)


def flat(bench: Bench) -> Iterator[Row]:
    """status and a backlog page with a long history of tasks, compared with a short one in the same Redis."""
    plan = bench.plan
    bench.stage.policy('everysec')
    bench.stage.reset()
    with ExitStack() as stack:
        far = stack.enter_context(Stage(bench.stage.url, plan.history))
        near = stack.enter_context(Stage(bench.stage.url, 100))
        for stage in (near, far):
            stage.fill()
        servers = {stage: stack.enter_context(Server(OURS, stage)) for stage in (near, far)}
        for ask, items, count in ((STATUS, 'agents', AGENTS), (PAGE, 'backlog', BACKLOG)):
            found: dict[Stage, list[Load]] = {near: [], far: []}
            for _ in range(plan.rounds):
                for stage, server in servers.items():
                    length = check_read(ask, {OURS: server.port}, items, count)
                    found[stage].append(measure(stage, server, ask, CONNECTIONS, plan.seconds, length))
            progress(ask.name)
            what = f'{ask.name}, {plan.history:,} tasks ended'
            yield ratio_row(what, rates(found[far]), 'townhall, 100 ended', rates(found[near]), STEADY)


# ----------------------------------------------------------------------------------------------------------- clients


def access(bench: Bench) -> Iterator[Row]:
    """inbox and assign with an API key, compared with a townhall that requires none."""
    stage, plan, key = bench.stage, bench.plan, generate_key()
    stage.policy('everysec')
    keyed = {'TINYTOWN_TOWNHALL_AUTH_MODE': 'api_key', 'TINYTOWN_TOWNHALL_AUTH_API_KEY_HASH': key.hash}
    with Server(OURS, stage) as plain, Server(OURS, stage, **keyed) as guarded:
        replace(INBOX, status=401).send(guarded.port)
        for ask in (INBOX, ASSIGN):
            found: dict[Server, list[Load]] = {guarded: [], plain: []}
            for _ in range(plan.rounds):
                for server, request in ((guarded, replace(ask, key=key.key)), (plain, ask)):
                    stage.reset()
                    length = len(request.send(server.port))
                    found[server].append(measure(stage, server, request, CONNECTIONS, plan.seconds, length))
            progress(f'{ask.name} with a key')
            yield ratio_row(f'{ask.name} with an API key', rates(found[guarded]), 'without', rates(found[plain]), KEYED)


def idle(bench: Bench) -> Iterator[Row]:
    """The cost of idle keep-alive connections, and their effect on a new client."""
    bench.stage.reset()
    plan, alone, crowded, sizes, threads = bench.plan, [], [], [], []
    for _ in range(min(plan.rounds, 3)):
        with Server(OURS, bench.stage) as server:
            newcomers(INBOX, server.port, plan.newcomers)  # warm
            alone.append(percentile(newcomers(INBOX, server.port, plan.newcomers), 0.99))
            memory, before = server.memory(), server.threads()
            held = [_kept_alive(server.port) for _ in range(plan.idle)]
            sizes.append((server.memory() - memory) / plan.idle)
            threads.append((server.threads() - before) / plan.idle)
            crowded.append(percentile(newcomers(INBOX, server.port, plan.newcomers), 0.99))
            for connection in held:
                connection.close()
    progress('idle connections')
    size, more = statistics.median(sizes), max(threads)
    yield Row(
        f'an idle connection, of {plan.idle:,}',
        f'{size:,.0f} B, {more:g} threads',
        target='≤ 2,048 B, 0 threads',
        met=size <= 2048 and not more,
        figures={'bytes': sizes, 'threads': threads},
    )
    ratio = Spread.of(new / old for new, old in zip(crowded, alone, strict=True))
    yield Row(
        "a new client's p99 with them open",
        _ms(crowded),
        'without them',
        _ms(alone),
        ratio,
        f'≤ {1 / STEADY:.2f} ×',
        ratio.median <= 1 / STEADY,
    )


def _ms(values: Sequence[float]) -> str:
    return f'{statistics.median(values):.2f} ms'


def _kept_alive(port: int) -> socket.socket:
    """A keep-alive connection that has received an answer."""
    sock = socket.create_connection(('127.0.0.1', port), timeout=10)
    sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
    if not sock.recv(65536).startswith(b'HTTP/1.1 200'):
        raise Wrong('an idle connection was refused')
    return sock


# ------------------------------------------------------------------------------------------------------------ pickup


def pickup(bench: Bench) -> Iterator[Row]:
    """The time from a client's assign to the start of the task in a worker, with every change synced to disk."""
    stage = bench.stage
    stage.policy('always')
    stage.reset()
    with Server(OURS, stage) as server:
        Ask('spawn', 'POST', '/v1/agents', {'name': 'runner', 'cli': 'demo'}, 201).send(server.port)
        connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=10)
        taken = sorted(_one_pickup(stage, connection) for _ in range(bench.plan.pickups))
        connection.close()
        Ask('kill', 'POST', '/v1/agents/runner/kill', {}).send(server.port)
    progress('pickup')
    median, p99 = statistics.median(taken), percentile(taken, 0.99)
    yield Row(
        'pickup: assign → task.started',
        f'{median:.1f} ms, p99 {p99:.1f}',
        target='< 10 ms, p99 < 50',
        met=median < 10 and p99 < 50,
        figures={'ms': taken},
    )


def _one_pickup(stage: Stage, connection: http.client.HTTPConnection) -> float:
    place = stage.place
    while place.do('agent.get', agent='runner')['state'] != 'Idle':
        time.sleep(0.002)
    last = text(place.store.call(place.store.last_event())[0][0])
    body = json.dumps({'agent': 'runner', 'task': 'write a haiku'})
    began = time.perf_counter()
    connection.request('POST', '/v1/tasks/assign', body, {'Content-Type': 'application/json'})
    task = json.loads(connection.getresponse().read())['task_id']
    last = _await(stage, last, 'task.started', task)
    taken = (time.perf_counter() - began) * 1000
    _await(stage, last, 'task.completed', task)
    return taken


def _await(stage: Stage, last: str, kind: str, task: str) -> str:
    """Waits for an event after `last`. Returns its id."""
    store = stage.place.store
    while True:
        found = store.call(store.next_event(last, 10_000))
        if found is None:
            raise Wrong(f'no {kind} for 10 s')
        entry, (_, body) = found[0][1][0]
        last, event = text(entry), json.loads(b'{' + body + b'}')
        if event['type'] == kind and event.get('task_id') == task:
            return last


# -------------------------------------------------------------------------------------------------- starts, commands


def starts(bench: Bench) -> Iterator[Row]:
    """The time from exec to the first 200 with a running Redis, and the memory of an idle server after one answer."""
    bench.stage.reset()
    names = bench.names_of(OURS, 'fastapi', 'fastify')
    took: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.plan.starts):
        for name in names:
            with Server(name, bench.stage) as server:
                took[name].append(server.took * 1000)
                INBOX.send(server.port)
                sizes[name].append(server.memory() / 1e6)
    progress('starts')
    yield from _compared('exec → first 200', 'ms', took, '≤ 250 ms', 250)
    yield from _compared('idle memory', 'MB', sizes, '≤ 40 MB', 40)


def _compared(what: str, unit: str, found: Mapping[str, Sequence[float]], target: str, most: float) -> Iterator[Row]:
    """Our figure with its target, and its ratio to each peer's."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours = f'{medians[OURS]:.0f} {unit}'
    yield Row(what, ours, target=target, met=medians[OURS] <= most, figures=dict(found))
    for name, values in found.items():
        if name != OURS:
            ratio = Spread.of(mine / its for mine, its in zip(found[OURS], values, strict=True))
            yield Row(what, ours, name, f'{medians[name]:.0f} {unit}', ratio)


def commands(bench: Bench) -> Iterator[Row]:
    """The time that `tt list` of 100 agents takes."""
    bench.stage.reset()
    taken = timed(lambda: bench.stage.place.tt('list'), bench.plan.starts)
    median = statistics.median(taken)
    yield Row('tt list', f'{median:.0f} ms', target='≤ 250 ms', met=median <= 250, figures={'ms': taken})


ROWS: Final[dict[str, Callable[[Bench], Iterator[Row]]]] = {
    'throughput': throughput,
    'burst': burst,
    'flat': flat,
    'access': access,
    'idle': idle,
    'pickup': pickup,
    'starts': starts,
    'commands': commands,
}


def progress(step: str) -> None:
    """Prints the step that was just completed."""
    print(f'bench: {step}', file=sys.stderr, flush=True)
