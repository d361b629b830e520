"""The commands of `tt` that run until Ctrl-C: following events and logs, and watching the town (`status`, `top`)."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from ..console import clean
from ..core.operations import BY_NAME
from ..errors import TownError, UsageError
from ..model import Json
from .backends import Backend
from .format import as_json, cut, event_line, format_answer
from .lifecycle import report, wants_json
from .top import full_screen, top

_UNITS: Final = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
_REFRESH: Final = 1.0  # seconds after which a screen is refreshed even without an event
_GATHER: Final = 0.1  # seconds to gather events before a refresh
_PAGE: Final = 500  # events that `tt events` shows by default

Arguments = dict[str, Any]


def since(text: str, now: float) -> str:
    """The event id that stands for an age before `now` (10m, 2h) or for a time (RFC 3339). Raises UsageError."""
    if match := re.fullmatch(r'([0-9]{1,6})([smhd])', text):
        moment = now - int(match[1]) * _UNITS[match[2]]
    else:
        try:
            moment = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise UsageError(
                f'--since {text}: give an age like 10m or 2h, or a time like 2026-11-21T10:00:00Z'
            ) from None
    return f'{max(int(moment * 1000), 0)}-0'


def warner() -> Callable[[str], None]:
    """A function that prints warnings on stderr. It leaves out a warning that equals the one before."""
    last = ''

    def warn(message: str) -> None:
        nonlocal last
        if message != last:
            print(f'tt: {clean(message)}; trying again', file=sys.stderr, flush=True)
        last = message

    return warn


def read_events(town: Backend, filters: Arguments) -> Json:
    """A full page of events. It may take several calls: an answer may hold fewer events although there are more."""
    limit = filters.get('limit', _PAGE)
    answer = town.run(BY_NAME['events.list'], filters)
    while answer.get('more') and len(answer['events']) < limit:
        rest = {'after': answer['next_after'], 'limit': limit - len(answer['events'])}
        page = town.run(BY_NAME['events.list'], filters | rest)
        answer = answer | page | {'events': answer['events'] + page['events'], 'more': page.get('more', False)}
    return answer


def follow_events(arguments: argparse.Namespace, town: Backend, filters: Arguments) -> int:
    """`tt events -f`: prints a line for each event, from now on or after --after or --since; --count limits them."""
    left = filters.pop('limit', None)
    for event in town.events({'after': '$'} | filters, warner()):
        _print(as_json(event, _is_ascii()) if wants_json(arguments) else event_line(event))
        if left is not None and event['type'] != 'gap':
            left -= 1
            if not left:
                break
    return 0


def follow_log(arguments: argparse.Namespace, town: Backend, where: Arguments) -> int:
    """`tt logs -f`: prints the log of an agent, and goes on as it grows. `where` holds arguments of agent.logs."""
    for page in town.log(where, warner()):
        if wants_json(arguments):
            _print(as_json(page, _is_ascii()))
            continue
        for flag, note in (('gap', 'a part of the log is no longer kept'), ('truncated', 'the log starts again')):
            if page.get(flag):
                print(f'tt: {note}', file=sys.stderr, flush=True)
        sys.stdout.write(clean(page['text']))
        sys.stdout.flush()
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + '\n')
    sys.stdout.flush()


def _is_ascii() -> bool:
    """Whether stdout may be unable to show characters beyond ASCII."""
    return sys.stdout.encoding.lower() not in ('utf-8', 'utf8')


# ----------------------------------------------------------------------------------------------------------- screens


def watch_status(arguments: argparse.Namespace, town: Backend, wanted: Arguments) -> int:
    """`tt status --watch`: shows the status, and refreshes it at each event. `wanted` is for town.get_status."""
    op = BY_NAME['town.get_status']

    def draw(answer: Json, columns: int, lines: int) -> list[str]:
        return [cut(line, columns) for line in format_answer(op.name, answer, _colour()).split('\n')[:lines]]

    return _watch(arguments, town, wanted, draw)


def watch_top(arguments: argparse.Namespace, town: Backend) -> int:
    """`tt top`: shows the agents, what they do, and the latest events."""

    def draw(answer: Json, columns: int, lines: int) -> list[str]:
        screen = top(answer, time.time(), columns, lines)
        return screen if _colour() else [re.sub(r'\x1b\[\d*m', '', line) for line in screen]

    return _watch(arguments, town, {'deep': True}, draw)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR')


def _watch(
    arguments: argparse.Namespace, town: Backend, wanted: Arguments, draw: Callable[[Json, int, int], list[str]]
) -> int:
    """Shows a status until the user leaves. `draw` makes lines from an answer, the columns and the lines there are."""
    op = BY_NAME['town.get_status']
    answer = town.run(op, wanted)
    if not sys.stdout.isatty() or wants_json(arguments):
        print('tt: stdout is not a terminal, so this is shown only once', file=sys.stderr)
        return report(arguments, answer, '' if wants_json(arguments) else '\n'.join(draw(answer, 10_000, 10_000)))
    with full_screen() as screen:
        pulse = _pulse(town)
        warning = ''
        while True:
            columns, lines = screen.size()
            content = draw(answer, columns, lines - 1)
            screen.show([*content, cut(warning, columns)] if warning else content)
            if not screen.wait(pulse, _REFRESH):
                return 0
            time.sleep(_GATHER)
            try:
                answer, warning = town.run(op, wanted), ''
            except TownError as e:
                warning = f'tt: {clean(e.detail)}; trying again'


def _pulse(town: Backend) -> int:
    """Starts a thread that listens for events. Returns a descriptor that becomes readable at each event."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while True:
            try:
                for _ in town.events({'after': '$'}, lambda _warning: None):
                    try:
                        os.write(writer, b'.')
                    except BlockingIOError:
                        pass  # the pipe is full, so it is readable anyway
            except TownError:
                time.sleep(_REFRESH)

    threading.Thread(target=listen, name='pulse', daemon=True).start()
    return reader
