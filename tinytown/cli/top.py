"""`tt top`: the lines that it shows (`top`, a pure function), and the terminal in full-screen mode (`full_screen`).

`follow` uses both, and refreshes the screen at each event.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import FrameType
from typing import Any, Final, NoReturn

from .format import JsonObject, cleaned, counted, cut, elsewhere, event_line, state

_COLUMNS: Final = (('AGENT', 16), ('STATE', 8), ('CLI', 8), ('DONE', 5), ('INBOX', 6), ('BEAT', 5), ('NOW', 0))
_ENTER: Final = '\x1b[?1049h\x1b[?25l'  # the alternate screen, without a cursor
_LEAVE: Final = '\x1b[?25h\x1b[?1049l'


def top(answer: JsonObject, now: float, columns: int, lines: int) -> list[str]:
    """The lines of `tt top`: agents, and below them the latest events, cut to `columns` and `lines`.

    `answer` is that of town.get_status with deep. `now` is in seconds since the epoch.
    """
    answer = cleaned(answer)
    agents = [_agent(agent, now) for agent in answer['agents']]
    shown = [_summary(answer), '', _row([name for name, _ in _COLUMNS]), *(agents or ['No agents.'])]
    if len(shown) > lines:
        hidden = len(shown) - lines + 1
        shown = [*shown[: lines - 1], f'… {counted(hidden, "more agent")}']
    room = lines - len(shown) - 1
    if room > 0:
        shown += ['', *(event_line(event) for event in answer['recent_events'][:room])]
    return [cut(line, columns) for line in shown]


def _summary(answer: JsonObject) -> str:
    working = sum(agent['state'] == 'Working' for agent in answer['agents'])
    tasks = ', '.join(f'{count} {name}' for name, count in answer['tasks'].items() if count) or 'none'
    return f'{answer["name"]}: {counted(answer["agent_count"], "agent")}, {working} working; tasks: {tasks}'


def _agent(agent: JsonObject, now: float) -> str:
    urgent = f'+{agent["urgent_len"]}' if agent['urgent_len'] else ''
    return _row(
        [
            agent['name'],
            state(agent['state']),
            agent['cli'],
            str(agent['tasks_completed']),
            f'{agent["inbox_len"]}{urgent}',
            _age(agent['last_heartbeat'], now),
            (agent['current_scope'] or '-') + (f' (on {host})' if (host := elsewhere(agent)) else ''),
        ]
    )


def _age(at: str | None, now: float) -> str:
    """The time since `at` (RFC 3339), in seconds; from 100 s in minutes, from 100 minutes in hours."""
    if at is None:
        return '-'
    seconds = max(int(now - datetime.fromisoformat(at).timestamp()), 0)
    return f'{seconds}s' if seconds < 100 else f'{seconds // 60}m' if seconds < 6000 else f'{seconds // 3600}h'


def _row(cells: list[str]) -> str:
    return '  '.join(
        cut(cell, width, pad=True) if width else cell for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- terminal


class Screen:
    """The terminal in full-screen mode. Overwrites lines in place, so that nothing flickers."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    @staticmethod
    def size() -> tuple[int, int]:
        """The present number of columns and lines; 80 and 24 if the terminal does not report them."""
        size = os.get_terminal_size(sys.stdout.fileno())
        return size.columns or 80, size.lines or 24

    def show(self, lines: list[str]) -> None:
        """Shows exactly these lines."""
        if lines == self._shown:
            return
        self._shown = lines
        sys.stdout.write('\x1b[H' + '\x1b[K\n'.join(lines) + '\x1b[K\x1b[J')
        sys.stdout.flush()

    def redraw(self) -> None:
        """Makes the next `show` draw even unchanged lines, for a terminal whose size has changed."""
        self._shown = []

    def wait(self, pulse: int, seconds: float) -> bool:
        """Waits at most `seconds` for data on the descriptor `pulse` or for a key. Returns False if the user leaves."""
        inputs = [pulse, sys.stdin.fileno()] if sys.stdin.isatty() else [pulse]
        ready, _, _ = select.select(inputs, [], [], seconds)
        if pulse in ready:
            with suppress(BlockingIOError):
                os.read(pulse, 65536)
        if sys.stdin.fileno() not in ready:
            return True
        keys = os.read(sys.stdin.fileno(), 64).lower()
        return bool(keys) and b'q' not in keys


@contextmanager
def full_screen() -> Iterator[Screen]:
    """Switches the terminal to full-screen mode, and always restores it, at SIGTERM and SIGHUP too."""
    screen = Screen()
    handlers = {signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda _number, _frame: screen.redraw())}
    handlers |= {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    modes = _without_echo()
    sys.stdout.write(_ENTER)
    try:
        yield screen
    finally:
        with suppress(OSError):
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
        if modes:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _without_echo() -> list[Any] | None:
    """Lets keys be read as they are pressed, and not echoed. Returns the previous modes; None without a terminal."""
    if not sys.stdin.isatty():
        return None
    before = termios.tcgetattr(sys.stdin)
    modes = termios.tcgetattr(sys.stdin)
    modes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
    return before
