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
    """Measures, prints a table, writes JSON. Exit status 1: a server did not do what was asked of it."""
    parser = argparse.ArgumentParser(prog='python -m bench', description=__doc__)
    parser.add_argument('--short', action='store_true', help='one round of one second, and less of everything')
    parser.add_argument('--only', action='append', choices=NAMES, help='a server to measure (may be repeated)')
    parser.add_argument('--rows', action='append', choices=list(ROWS), help='what to measure (may be repeated)')
    parser.add_argument('--out', type=Path, default=REPOSITORY / 'bench' / 'results.json', help='where the JSON goes')
    arguments = parser.parse_args()
    names = _present(arguments.only or NAMES)
    rows: list[Row] = []
    about = machine()
    if about['busy'] > 0.5:
        print(f'bench: {about["busy"]} processes are running already; the figures will tell little', file=sys.stderr)
    try:
        with Stage() as stage:
            bench = Bench(stage, names, SHORT if arguments.short else LONG)
            for kind in arguments.rows or ROWS:
                rows += ROWS[kind](bench)
    except Wrong as e:
        print(f'bench: {e}', file=sys.stderr)
        return 1
    write(arguments.out, rows, about)
    print(f'{about["date"]}, {about["cpu"]}, {about["cores"]} cores; {arguments.out}\n\n{table(rows)}')
    return 0


def _present(wanted: list[str] | tuple[str, ...]) -> list[str]:
    """Ours, and those of the wanted servers that can be run here; the others are named."""
    found = []
    for name in NAMES:
        if name != OURS and name not in wanted:
            continue
        if why := missing(name):
            print(f'bench: {name} is not measured: {why}', file=sys.stderr)
        else:
            found.append(name)
    return found


if __name__ == '__main__':
    sys.exit(main())
