"""Metrics as Prometheus text: the HTTP requests of all worker processes, and the statistics of the town.

Tasks and agents are counted in Redis, by the same script that changes them. So the numbers stay right with several
townhalls, with the command line, and after a restart. HTTP requests are counted in shared memory, mapped before the
fork. Each worker process has its own row there, so no lock is needed. A process that replaces another continues its
row. `health` serves the text.
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
PLAIN: Final = ('health', 'ready', 'metrics', 'scaling', 'openapi', 'dashboard', 'mcp')  # routes without an operation
OTHER: Final = 'other'  # stands for operations and methods without a series of their own
_SUM: Final = len(HTTP_BOUNDS) + 1  # offset of the sum, after the buckets; the last bucket has no bound
_WIDTH: Final = _SUM + 1
_STATUSES: Final = (2, 3, 4, 5)
_GAUGES: Final = 2  # at the start of each row: connections, streams

Series = tuple[str, str, int]  # operation, method, first digit of the status


def _series() -> Iterator[tuple[str, str]]:
    """Every operation and method with its own series. Their number is fixed, so clients cannot create new series."""
    for op in OPERATIONS:
        methods = [op.method, op.also, 'HEAD' if op.method == 'GET' else '']
        yield from ((op.name, method) for method in methods if method)
    yield from ((name, method) for name in PLAIN for method in ('GET', 'HEAD', 'POST', OTHER))
    yield OTHER, OTHER


class Meter:
    """Counts the requests of a townhall by operation, method and status class, and its connections and streams.

    Create it before the fork. Then each worker process calls `begin` with its number.
    """

    def __init__(self, processes: int = 1) -> None:
        keys = [(name, method, status) for name, method in _series() for status in _STATUSES]
        self._offsets = {key: _GAUGES + i * _WIDTH for i, key in enumerate(keys)}
        size = _GAUGES + len(keys) * _WIDTH
        # A mapping of its own for each process: no two processes write to the same memory page.
        self._rows = [memoryview(mmap.mmap(-1, size * 8)).cast('d')[:size] for _ in range(processes)]
        self._row = self._rows[0]

    def begin(self, number: int) -> None:
        """Selects the row of this process, which has no connections yet."""
        self._row = self._rows[number]
        self.gauge(0, 0)

    def observe(self, operation: str, method: str, status: int, seconds: float) -> None:
        """Counts an answered request, which took so many seconds."""
        offsets, status_class = self._offsets, status // 100
        offset = offsets.get((operation, method, status_class))
        if offset is None:
            offset = offsets.get((operation, OTHER, status_class)) or offsets[OTHER, OTHER, status_class]
        row = self._row
        row[offset + bisect_left(HTTP_BOUNDS, seconds)] += 1.0
        row[offset + _SUM] += seconds

    def gauge(self, connections: int, streams: int) -> None:
        """Sets how many connections and streams this process has now."""
        self._row[0] = connections
        self._row[1] = streams

    def totals(self) -> tuple[int, int, dict[Series, list[float]]]:
        """Sums all processes. Returns (connections, streams, cells of every series that has counted a request).

        The cells of a series are its buckets, not cumulative, and then the sum in seconds.
        """
        summed = [sum(column) for column in zip(*self._rows, strict=True)]
        series = {key: summed[offset : offset + _WIDTH] for key, offset in self._offsets.items()}
        return int(summed[0]), int(summed[1]), {key: cells for key, cells in series.items() if any(cells)}


# --------------------------------------------------------------------------------------------------------- rendering

Sample = tuple[str, float]  # what follows the name of the metric (suffix, labels), and the value


def render_metrics(meter: Meter, stats: Stats | None, latency: float, error: str = '') -> str:
    """All metrics in the Prometheus text format 0.0.4.

    `stats` is None if Redis did not answer, and `error` then says why. `latency` is that of Redis, in seconds.
    """
    lines = [f'# tinytown_metrics_error {" ".join(error.split())}'] if error else []
    lines += _gauge('up', 'Whether this process serves requests', 1)
    lines += _gauge('ready', 'Whether Redis answers', int(stats is not None))
    lines += _metric('build_info', 'gauge', 'The version of Townhall', [(f'{{version="{__version__}"}}', 1)])
    if stats is not None:
        lines += _gauge('redis_latency_seconds', 'How long Redis took to answer for these metrics', latency)
        lines += _of_town(stats)
    lines += _of_http(meter)
    return '\n'.join(lines) + '\n'


def _of_town(stats: Stats) -> Iterator[str]:
    states = [(f'{{state="{state.lower()}"}}', stats.agents.get(state, 0)) for state in get_args(AgentState)]
    yield from _metric('agents_total', 'gauge', 'Agents by state (the older name of tinytown_agents)', states)
    yield from _metric('agents', 'gauge', 'Agents by state', states)
    yield from _gauge('tasks_pending', 'Tasks waiting in the backlog or in an inbox', stats.pending)
    yield from _gauge('backlog_tasks', 'Tasks in the backlog', stats.backlog)
    yield from _gauge('tasks_assigned_pending', 'Tasks in inboxes', stats.assigned)
    yield from _gauge('tasks_running', 'Tasks that a worker has taken', stats.running)
    yield from _gauge('urgent_messages', 'Urgent messages in inboxes of agents', stats.urgent)
    yield from _gauge('dead_letters', 'Dead letters (tasks and messages) waiting for a person', stats.dead)
    for name, event, doc in _COUNTERS:
        yield from _metric(f'{name}_total', 'counter', doc, [('', stats.totals.get(event, 0))])
    dead = [(f'{{kind="{kind}"}}', stats.totals.get(f'{kind}.dead_lettered', 0)) for kind in ('task', 'message')]
    yield from _metric('dead_lettered_total', 'counter', 'Tasks and messages that became dead letters', dead)
    waited = {'': _task_cells(stats, 'wait')}
    doc = 'Time from putting a task into an inbox until its worker took it'
    yield from _histogram('task_queue_wait_seconds', doc, TASK_BOUNDS, waited)
    ran = {f'outcome="{outcome}"': _task_cells(stats, f'run:{outcome}') for outcome in ('completed', 'failed')}
    yield from _histogram('task_run_seconds', 'Time from taking a task until its end', TASK_BOUNDS, ran)


_COUNTERS: Final = (
    ('tasks_created', 'task.created', 'Tasks created'),
    ('tasks_completed', 'task.completed', 'Tasks completed'),
    ('tasks_failed', 'task.failed', 'Tasks reported as failed, without dead letters'),
    ('tasks_cancelled', 'task.cancelled', 'Tasks cancelled'),
    ('task_attempts', 'task.started', 'How often a worker took a task'),
    ('task_requeues', 'task.requeued', 'How often a task was taken from its agent and queued again'),
    ('messages_sent', 'message.sent', 'Messages sent'),
    ('agent_starts', 'agent.started', 'How often a worker started'),
    ('agent_crashes', 'agent.error', 'How often a worker was found dead, or did not start'),
)


def _task_cells(stats: Stats, name: str) -> list[float]:
    """The cells of a histogram that Redis counts: its buckets, and the sum in seconds."""
    counts = [float(stats.totals.get(f'{name}:{i}', 0)) for i in range(1, len(TASK_BOUNDS) + 2)]
    return [*counts, stats.totals.get(f'{name}:ms', 0) / 1000]


def _of_http(meter: Meter) -> Iterator[str]:
    connections, streams, series = meter.totals()
    yield from _gauge('http_connections', 'Open connections, in all processes', connections)
    yield from _gauge('http_streams', 'Open event streams and long polls, in all processes', streams)
    labelled = {
        f'operation="{name}",method="{method}",status="{status_class}xx"': cells
        for (name, method, status_class), cells in series.items()
    }
    doc = 'Time to answer a request, in all processes'
    yield from _histogram('http_request_duration_seconds', doc, HTTP_BOUNDS, labelled)


def _gauge(name: str, doc: str, value: float) -> list[str]:
    return _metric(name, 'gauge', doc, [('', value)])


def _metric(name: str, kind: str, doc: str, samples: Iterable[Sample]) -> list[str]:
    head = [f'# HELP tinytown_{name} {doc}.', f'# TYPE tinytown_{name} {kind}']
    return head + [f'tinytown_{name}{suffix} {_number(value)}' for suffix, value in samples]


def _histogram(name: str, doc: str, bounds: tuple[float, ...], series: dict[str, list[float]]) -> list[str]:
    """A histogram. `series` maps labels to cells: the count of each bucket, then the sum."""
    samples: list[Sample] = []
    for labels, cells in series.items():
        comma, braces = ',' if labels else '', f'{{{labels}}}' if labels else ''
        total = 0.0
        for bound, count in zip((*bounds, float('inf')), cells[:-1], strict=True):
            total += count
            le = '+Inf' if bound == float('inf') else f'{bound:g}'
            samples.append((f'_bucket{{{labels}{comma}le="{le}"}}', total))
        samples += [(f'_sum{braces}', cells[-1]), (f'_count{braces}', total)]
    return _metric(name, 'histogram', doc, samples)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
