"""What the command lines of `tt` and `townhall` share: the argument parser, `Command`, and how a town is found."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..console import clean
from ..core.town import Town, open_town
from ..errors import UsageError
from ..host.town_dir import find


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError (one line, exit status 2), and takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see {self.prog} --help)')


Argument = Callable[[Parser], object]


class CommandSpec(NamedTuple):
    """A command of `tt`."""

    topic: str  # the heading that it is listed under in `tt --help`, a key of `main._TOPICS`
    words: str  # the words after `tt`, such as 'task list'
    summary: str
    run: Callable[[argparse.Namespace], int]  # returns the exit status
    takes: tuple[Argument, ...] = ()  # what adds its arguments to its parser


def argument(*names: str, **settings: Any) -> Argument:
    """An argument of a command. Takes what `ArgumentParser.add_argument` takes."""
    return lambda parser: parser.add_argument(*names, **settings)


def acts_here(arguments: argparse.Namespace) -> None:
    """Refuses --url, for a command that acts on this machine. Raises UsageError."""
    if getattr(arguments, 'url', None):
        raise UsageError('--url: this command acts on this machine and not through a townhall; leave --url out')


def town_root(arguments: argparse.Namespace) -> Path:
    """The town's directory, for a command that may write or start something there. Raises UsageError."""
    return _find(arguments, for_owner=False)


def meant_root(arguments: argparse.Namespace) -> Path:
    """The town's directory, for a command that only asks. Root may ask about another user's town. Raises UsageError."""
    return _find(arguments, for_owner=True)


def _find(arguments: argparse.Namespace, for_owner: bool) -> Path:
    """The town's directory: from --town, else from TINYTOWN_TOWN, else the nearest one upwards. Raises UsageError."""
    acts_here(arguments)
    given = getattr(arguments, 'town', None) or os.environ.get('TINYTOWN_TOWN') or None
    return find(Path() if given else Path.cwd(), given, for_owner)


def open_meant(arguments: argparse.Namespace, flags: dict[str, Any] | None = None) -> Town:
    """Opens the town of a command line; --verbose shows which one it is. Raises UsageError, TownError."""
    town = open_town(town_root(arguments), flags)
    note(arguments, f'town {town.name} in {town.root}, Redis at {town.redis_url}')
    return town


def note(arguments: argparse.Namespace, message: str) -> None:
    """Prints a message on stderr if --verbose was given."""
    if getattr(arguments, 'verbose', False):
        print(clean(message), file=sys.stderr)
