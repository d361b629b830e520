"""Metrics: what happens on HTTP, counted for all processes of a townhall, and the town's census, as Prometheus text.

Everything about tasks and agents is counted in Redis, in the step that changes them: it is right whoever made the
change, with several townhalls, and after a restart. Requests are counted in memory that was mapped before the fork:
each process has a row of its own, so nothing is locked, and one that takes the place of another goes on in its row.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final, get_args

from .. import __version__
from ..core.operations import OPERATIONS
from ..core.stats import Stats
from ..model import TASK_BOUNDS, AgentState

CONTENT_TYPE: Final = 'text/plain; version=0.0.4; charset=utf-8'
HTTP_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PLAIN: Final = ('health', 'ready', 'metrics', 'scaling', 'openapi', 'dashboard', 'mcp')  # served beside the table
OTHER: Final = 'other'  # an operation or method that has no row of its own
_SUM: Final = len(HTTP_BOUNDS) + 1  # after the buckets, of which the last one has no bound
_WIDTH: Final = _SUM + 1
_STATUSES: Final = (2, 3, 4, 5)
_GAUGES: Final = 2  # of each process: connections, streams

Series = tuple[str, str, int]  # operation, method, first digit of the status


def _rows() -> Iterator[tuple[str, str]]:
    """Every operation and method that is counted apart: a fixed number, whatever clients send."""
    for op in OPERATIONS:
        methods = [op.method, op.also, 'HEAD' if op.method == 'GET' else '']
        yield from ((op.name, method) for method in methods if method)
    yield from ((name, method) for name in PLAIN for method in ('GET', 'HEAD', 'POST', OTHER))
    yield OTHER, OTHER


class Meter:
    """The requests of a townhall by operation, method and class of status; its connections and streams.

    Made before the fork; each process calls `begin` with its number.
    """

    def __init__(self, processes: int = 1) -> None:
        keys = [(name, method, status) for name, method in _rows() for status in _STATUSES]
        self._places = {key: _GAUGES + i * _WIDTH for i, key in enumerate(keys)}
        self._size = _GAUGES + len(keys) * _WIDTH
        self._rows = [
            memoryview(mmap.mmap(-1, self._size * 8)).cast('d')[
                : self._size
            ]  # a page or more: nobody writes to another's
            for _ in range(processes)
        ]
        self._row = self._rows[0]

    def begin(self, number: int) -> None:
        """This process is the one of that number. It has no connections yet."""
        self._row = self._rows[number]
        self.gauge(0, 0)

    def observe(self, operation: str, method: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        places, kind = self._places, status // 100
        at = places.get((operation, method, kind))
        if at is None:
            at = places.get((operation, OTHER, kind)) or places[OTHER, OTHER, kind]
        row = self._row
        row[at + bisect_left(HTTP_BOUNDS, seconds)] += 1.0
        row[at + _SUM] += seconds

    def gauge(self, connections: int, streams: int) -> None:
        """Notes how many connections and streams this process has."""
        self._row[0] = connections
        self._row[1] = streams

    def totals(self) -> tuple[int, int, dict[Series, list[float]]]:
        """(connections, streams, by series that was ever seen: the buckets, each by itself, and the sum)."""
        summed = [sum(column) for column in zip(*self._rows, strict=True)]
        found = {key: summed[at : at + _WIDTH] for key, at in self._places.items()}
        return int(summed[0]), int(summed[1]), {key: cells for key, cells in found.items() if any(cells)}


# --------------------------------------------------------------------------------------------------------- rendering

Sample = tuple[str, float]  # what follows the name of the metric, and the value


def render_metrics(meter: Meter, census: Stats | None, latency: float, error: str = '') -> str:
    """Prometheus text 0.0.4. `latency` is that of Redis, in seconds; without a census `error` says why."""
    lines = [f'# tinytown_metrics_error {" ".join(error.split())}'] if error else []
    lines += _gauge('up', 'Whether this process serves', 1)
    lines += _gauge('ready', 'Whether Redis answers', int(census is not None))
    lines += _metric('build_info', 'gauge', 'The version that serves', [(f'{{version="{__version__}"}}', 1)])
    if census is not None:
        lines += _gauge('redis_latency_seconds', 'How long Redis took to answer for these metrics', latency)
        lines += _of_town(census)
    lines += _of_http(meter)
    return '\n'.join(lines) + '\n'


def _of_town(census: Stats) -> Iterator[str]:
    states = [(f'{{state="{state.lower()}"}}', census.agents.get(state, 0)) for state in get_args(AgentState)]
    yield from _metric('agents_total', 'gauge', 'Agents by state (the older name of tinytown_agents)', states)
    yield from _metric('agents', 'gauge', 'Agents by state', states)
    yield from _gauge('tasks_pending', 'Tasks that wait, in the backlog or in an inbox', census.pending)
    yield from _gauge('backlog_tasks', 'Tasks in the backlog', census.backlog)
    yield from _gauge('tasks_assigned_pending', 'Tasks in inboxes', census.assigned)
    yield from _gauge('tasks_running', 'Tasks that a worker has taken', census.running)
    yield from _gauge('urgent_messages', 'Urgent messages in inboxes of agents', census.urgent)
    yield from _gauge('dead_letters', 'Tasks and messages that were given up and wait for a person', census.dead)
    for name, event, what in _COUNTERS:
        yield from _metric(f'{name}_total', 'counter', what, [('', census.totals.get(event, 0))])
    given_up = [(f'{{kind="{kind}"}}', census.totals.get(f'{kind}.dead_lettered', 0)) for kind in ('task', 'message')]
    yield from _metric('dead_lettered_total', 'counter', 'Tasks and messages that were ever given up', given_up)
    waited = {'': _task_cells(census, 'wait')}
    what = 'From when a task was put into an inbox until its worker took it'
    yield from _histogram('task_queue_wait_seconds', what, TASK_BOUNDS, waited)
    ran = {f'outcome="{outcome}"': _task_cells(census, f'run:{outcome}') for outcome in ('completed', 'failed')}
    yield from _histogram('task_run_seconds', 'From when a task was taken until its end', TASK_BOUNDS, ran)


_COUNTERS: Final = (
    ('tasks_created', 'task.created', 'Tasks that were ever given to the town'),
    ('tasks_completed', 'task.completed', 'Tasks that ended well'),
    ('tasks_failed', 'task.failed', 'Tasks that were reported as failed (dead letters apart)'),
    ('tasks_cancelled', 'task.cancelled', 'Tasks that were cancelled'),
    ('task_attempts', 'task.started', 'How often a task was taken by a worker'),
    ('task_requeues', 'task.requeued', 'How often a task was taken from its agent and queued again'),
    ('messages_sent', 'message.sent', 'Messages that were sent'),
    ('agent_starts', 'agent.started', 'How often a worker came up'),
    ('agent_crashes', 'agent.error', 'How often a worker was found dead, or did not start'),
)


def _task_cells(census: Stats, name: str) -> list[float]:
    counts = [float(census.totals.get(f'{name}:{i}', 0)) for i in range(1, len(TASK_BOUNDS) + 2)]
    return [*counts, census.totals.get(f'{name}:ms', 0) / 1000]


def _of_http(meter: Meter) -> Iterator[str]:
    connections, streams, series = meter.totals()
    yield from _gauge('http_connections', 'Open connections, in all processes', connections)
    yield from _gauge('http_streams', 'Clients of answers that go on: event streams, long polls', streams)
    named = {
        f'operation="{name}",method="{how}",status="{kind}xx"': cells for (name, how, kind), cells in series.items()
    }
    what = 'How long requests took, in all processes'
    yield from _histogram('http_request_duration_seconds', what, HTTP_BOUNDS, named)


def _gauge(name: str, what: str, value: float) -> list[str]:
    return _metric(name, 'gauge', what, [('', value)])


def _metric(name: str, kind: str, what: str, samples: Iterable[Sample]) -> list[str]:
    head = [f'# HELP tinytown_{name} {what}.', f'# TYPE tinytown_{name} {kind}']
    return head + [f'tinytown_{name}{labels} {_number(value)}' for labels, value in samples]


def _histogram(name: str, what: str, bounds: tuple[float, ...], series: dict[str, list[float]]) -> list[str]:
    """`series` maps labels to what fell into each bucket, and the sum."""
    samples: list[Sample] = []
    for labels, cells in series.items():
        comma, braces = ',' if labels else '', f'{{{labels}}}' if labels else ''
        seen = 0.0
        for bound, count in zip((*bounds, float('inf')), cells[:-1], strict=True):
            seen += count
            le = '+Inf' if bound == float('inf') else f'{bound:g}'
            samples.append((f'_bucket{{{labels}{comma}le="{le}"}}', seen))
        samples += [(f'_sum{braces}', cells[-1]), (f'_count{braces}', seen)]
    return _metric(name, 'histogram', what, samples)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
