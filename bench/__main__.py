"""The command line: python -m bench [--short] [--only NAME] [--rows KIND] [--out FILE]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.support import REPOSITORY

from .load import Wrong
from .report import Row, machine, table, write
from .rows import LONG, ROWS, SHORT, Bench
from .servers import NAMES, OURS, missing
from .stage import Stage


def main() -> int:
    """Measures, prints a table, writes JSON. Exits with 1 if a server gave a wrong answer."""
    parser = argparse.ArgumentParser(prog='python -m bench', description=__doc__)
    parser.add_argument('--short', action='store_true', help='one round of one second, and smaller counts')
    parser.add_argument('--only', action='append', choices=NAMES, help='measure this server (may be repeated)')
    parser.add_argument('--rows', action='append', choices=list(ROWS), help='measure this (may be repeated)')
    parser.add_argument(
        '--out', type=Path, default=REPOSITORY / 'bench' / 'results.json', help='the JSON file to write'
    )
    arguments = parser.parse_args()
    names = _present(arguments.only or NAMES)
    rows: list[Row] = []
    host = machine()
    if host['busy'] > 0.5:
        print(f'bench: {host["busy"]} other processes are running; the figures will mean little', file=sys.stderr)
    try:
        with Stage() as stage:
            bench = Bench(stage, names, SHORT if arguments.short else LONG)
            for kind in arguments.rows or ROWS:
                rows += ROWS[kind](bench)
    except Wrong as e:
        print(f'bench: {e}', file=sys.stderr)
        return 1
    write(arguments.out, rows, host)
    print(f'{host["date"]}, {host["cpu"]}, {host["cores"]} cores; {arguments.out}\n\n{table(rows)}')
    return 0


def _present(wanted: list[str] | tuple[str, ...]) -> list[str]:
    """Townhall and those wanted servers that can run here. Prints why the others can't."""
    present = []
    for name in NAMES:
        if name != OURS and name not in wanted:
            continue
        if reason := missing(name):
            print(f'bench: {name} is not measured: {reason}', file=sys.stderr)
        else:
            present.append(name)
    return present


if __name__ == '__main__':
    sys.exit(main())
