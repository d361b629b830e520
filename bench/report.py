"""The report: one row per figure, printed as an aligned table and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinytown import __version__
from tinytown.host import managed_redis

from . import install

HEADINGS = ('what', 'compared with', 'townhall', 'the other', 'min', 'ratio', 'max', 'target', '')


@dataclass(frozen=True)
class Spread:
    """The minimum, median and maximum over the rounds."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1])


@dataclass(frozen=True)
class Row:
    """Our figure, the one it is compared with, and whether the median meets the target (None: there is no target)."""

    what: str
    ours: str
    beside: str = ''
    other: str = ''
    ratio: Spread | None = None
    target: str = ''
    met: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        ratio = self.ratio
        spread = (
            ('', '', '') if ratio is None else tuple(f'{each:.2f}' for each in (ratio.least, ratio.median, ratio.most))
        )
        met = {True: 'met', False: 'MISSED', None: ''}[self.met]
        return (self.what, self.beside, self.ours, self.other, *spread, self.target, met)


def ratio_row(what: str, ours: Sequence[float], beside: str, other: Sequence[float], at_least: float | None) -> Row:
    """Compares the rates of Townhall with those of another server, round by round."""
    ratio = Spread.of(mine / its for mine, its in zip(ours, other, strict=True))
    target = '' if at_least is None else f'≥ {at_least:g} ×'
    met = None if at_least is None else ratio.median >= at_least
    return Row(what, _rate(ours), beside, _rate(other), ratio, target, met)


def _rate(values: Sequence[float]) -> str:
    return f'{statistics.median(values):,.0f}/s'


def table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = {0, 1, 7, 8}
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if column in texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def machine() -> dict[str, Any]:
    """The machine and the versions that were measured."""
    cpu = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.M)
    return {
        'date': datetime.now(UTC).strftime('%Y-%m-%d'),
        'cpu': cpu[1] if cpu else platform.machine(),
        'cores': os.cpu_count(),
        'busy': round(os.getloadavg()[0], 2),  # load average of the last minute, before the servers start
        'system': platform.platform(),
        'versions': {
            'townhall': __version__,
            'python': platform.python_version(),
            'node': _output('node', '--version'),
            'redis-server': _output(str(managed_redis.find_server()), '--version'),
            **install.versions(),
        },
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ''
    return done.stdout.strip()


def write(file: Path, rows: Sequence[Row], host: dict[str, Any]) -> None:
    file.write_text(json.dumps(host | {'rows': [asdict(row) for row in rows]}, indent=1, ensure_ascii=False) + '\n')
