"""What a person at a terminal is told: one-line complaints, clean of what would steer it, on streams that are there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from .errors import TownError, UsageError

# Controls but tab and newline, marks that turn the direction of text around, lone surrogates.
STEERING: Final = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def clean(text: str) -> str:
    """A text from elsewhere, without what would steer a terminal."""
    return STEERING.sub('\ufffd', text)


def ready_streams() -> None:
    """Gives a command that was started without standard streams the null device, so that no file takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = sys.stderr or open(2, 'w', encoding='utf-8', closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]


def explain(error: BaseException) -> tuple[str, int]:
    """What a person is told of an error, in one line, and the exit status that goes with it."""
    if isinstance(error, UsageError):
        return _line(str(error)), 2
    if isinstance(error, TownError):
        return _line(error.detail), 1
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return _line(f'{error.filename}: {what}' if error.filename else what), 1
    import traceback  # late: only faults need it

    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f'{Path(where.filename).name}:{where.lineno}'
    return _line(f'{type(error).__name__} at {place}: {error}; this is a bug, please report it'), 1


def _line(said: str) -> str:
    return clean(' '.join(said.split()))


def complain(program: str, error: BaseException) -> int:
    """Tells a person of an error on stderr. The exit status."""
    said, status = explain(error)
    try:
        print(f'{program}: {said}', file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads it
    return status


def end_streams() -> None:
    """Drops what can't be written any more, so that the interpreter doesn't complain of it at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
