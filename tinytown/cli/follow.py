"""The commands of `tt` that go on: events and logs as they come, the town as it is now. Ctrl-C ends them."""

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
from .top import taken, top

_UNITS: Final = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
_PULSE: Final = 1.0  # seconds after which a screen is looked at anew without an event
_PAGE: Final = 500  # events that `tt events` shows
_REST: Final = 0.1  # seconds for which events are gathered before that

Arguments = dict[str, Any]


def since(given: str, now: float) -> str:
    """The stream id after which events are at most so old (10m, 2h), or of that time (RFC 3339). Raises UsageError."""
    if match := re.fullmatch(r'([0-9]{1,6})([smhd])', given):
        moment = now - int(match[1]) * _UNITS[match[2]]
    else:
        try:
            moment = datetime.fromisoformat(given).timestamp()
        except (ValueError, OverflowError, OSError):
            raise UsageError(f'--since {given}: give an age as 10m or 2h, or a time as 2026-11-21T10:00:00Z') from None
    return f'{max(int(moment * 1000), 0)}-0'


def complainer() -> Callable[[str], None]:
    """Tells of trouble on stderr, but not of the same twice in a row."""
    last = ''

    def tell(what: str) -> None:
        nonlocal last
        if what != last:
            print(f'tt: {clean(what)}; trying again', file=sys.stderr, flush=True)
        last = what

    return tell


def read_events(town: Backend, given: Arguments) -> Json:
    """A full page of events, although a page through the door may be short while there is more."""
    limit = given.get('limit', _PAGE)
    answer = town.run(BY_NAME['events.list'], given)
    while answer.get('more') and len(answer['events']) < limit:
        rest = {'after': answer['next_after'], 'limit': limit - len(answer['events'])}
        page = town.run(BY_NAME['events.list'], given | rest)
        answer = answer | page | {'events': answer['events'] + page['events'], 'more': page.get('more', False)}
    return answer


def follow_events(arguments: argparse.Namespace, town: Backend, given: Arguments) -> int:
    """`tt events -f`: a line an event. It begins now, or where --after or --since says; --count ends it."""
    left = given.pop('limit', None)
    for event in town.events({'after': '$'} | given, complainer()):
        _print(as_json(event, _is_plain()) if wants_json(arguments) else event_line(event))
        if left is not None and event['type'] != 'gap':
            left -= 1
            if not left:
                break
    return 0


def follow_log(arguments: argparse.Namespace, town: Backend, given: Arguments) -> int:
    """`tt logs -f`: what there is, and what comes."""
    for part in town.log(given, complainer()):
        if wants_json(arguments):
            _print(as_json(part, _is_plain()))
            continue
        for name, said in (('gap', 'a part of the log is not kept any more'), ('truncated', 'the log begins anew')):
            if part.get(name):
                print(f'tt: {said}', file=sys.stderr, flush=True)
        sys.stdout.write(clean(part['text']))
        sys.stdout.flush()
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + '\n')
    sys.stdout.flush()


def _is_plain() -> bool:
    return sys.stdout.encoding.lower() not in ('utf-8', 'utf8')


# ----------------------------------------------------------------------------------------------------------- screens


def watch_status(arguments: argparse.Namespace, town: Backend, given: Arguments) -> int:
    """`tt status --watch`: the status, drawn anew when something happens."""
    op = BY_NAME['town.get_status']

    def draw(answer: Json, columns: int, lines: int) -> list[str]:
        return [cut(line, columns) for line in format_answer(op.name, answer, _colour()).split('\n')[:lines]]

    return _watch(arguments, town, given, draw)


def watch_top(arguments: argparse.Namespace, town: Backend) -> int:
    """`tt top`: the agents and what they do, and the latest events."""

    def draw(answer: Json, columns: int, lines: int) -> list[str]:
        drawn = top(answer, time.time(), columns, lines)
        return drawn if _colour() else [re.sub(r'\x1b\[\d*m', '', line) for line in drawn]

    return _watch(arguments, town, {'deep': True}, draw)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR')


def _watch(
    arguments: argparse.Namespace, town: Backend, given: Arguments, draw: Callable[[Json, int, int], list[str]]
) -> int:
    op = BY_NAME['town.get_status']
    answer = town.run(op, given)
    if not sys.stdout.isatty() or wants_json(arguments):
        print('tt: this is no terminal, so it is shown once', file=sys.stderr)
        return report(arguments, answer, '' if wants_json(arguments) else '\n'.join(draw(answer, 10_000, 10_000)))
    with taken() as screen:
        pulse = _pulse(town)
        trouble = ''
        while True:
            columns, lines = screen.size()
            shown = draw(answer, columns, lines - 1)
            screen.show([*shown, cut(trouble, columns)] if trouble else shown)
            if not screen.wait(pulse, _PULSE):
                return 0
            time.sleep(_REST)
            try:
                answer, trouble = town.run(op, given), ''
            except TownError as e:
                trouble = f'tt: {clean(e.detail)}; trying again'


def _pulse(town: Backend) -> int:
    """A descriptor that can be read from when something has happened."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while True:
            try:
                for _ in town.events({'after': '$'}, lambda _trouble: None):
                    try:
                        os.write(writer, b'.')
                    except BlockingIOError:
                        pass  # it is full of pulses
            except TownError:
                time.sleep(_PULSE)

    threading.Thread(target=listen, name='pulse', daemon=True).start()
    return reader
