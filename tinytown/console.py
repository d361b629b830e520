"""Safe output to a terminal: one-line error messages without control characters, on streams that exist.

`tt` and `townhall` use it from start (`ready_streams`) to end (`complain`, `end_streams`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from .errors import TownError, UsageError

# Control characters except tab and newline, marks that reverse the direction of text, lone surrogates.
UNSAFE: Final = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def clean(text: str) -> str:
    """Makes untrusted text safe for a terminal: replaces control characters."""
    return UNSAFE.sub('\ufffd', text)


def ready_streams() -> None:
    """Opens the null device for each closed standard stream; lets stdout and stderr escape what they can't encode.

    Otherwise the next file to be opened would become descriptor 0, 1 or 2.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = sys.stderr or open(2, 'w', encoding='utf-8', closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]


def explain(error: BaseException) -> tuple[str, int]:
    """The one-line message for an error, and its exit status: 2 for a UsageError, else 1."""
    if isinstance(error, UsageError):
        return _line(str(error)), 2
    if isinstance(error, TownError):
        return _line(error.detail), 1
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return _line(f'{error.filename}: {reason}' if error.filename else reason), 1
    import traceback  # late: only bugs need it

    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f'{Path(frame.filename).name}:{frame.lineno}'
    return _line(f'{type(error).__name__} at {place}: {error}; this is a bug, please report it'), 1


def _line(message: str) -> str:
    return clean(' '.join(message.split()))


def complain(program: str, error: BaseException) -> int:
    """Prints the message for an error to stderr. Returns the exit status."""
    message, status = explain(error)
    try:
        print(f'{program}: {message}', file=sys.stderr, flush=True)
    except OSError:
        pass  # stderr has no reader
    return status


def end_streams() -> None:
    """Drops buffered output that can't be written, so that the interpreter doesn't report it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
