"""What the two command lines share: a parser that complains in one line, and which town is meant."""

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
    """Complains in one line, by UsageError, and has the command exit with status 2. Options are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see {self.prog} --help)')


Argument = Callable[[Parser], object]


class Command(NamedTuple):
    """A command of `tt`: the topic of the help that it belongs to, the words after `tt`, what it does and takes."""

    topic: str
    words: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    takes: tuple[Argument, ...] = ()


def argument(*names: str, **settings: Any) -> Argument:
    """An argument of a command, in the words of `add_argument`."""
    return lambda parser: parser.add_argument(*names, **settings)


def acts_here(arguments: argparse.Namespace) -> None:
    """Refuses what only goes with commands that act on a town. Raises UsageError."""
    if getattr(arguments, 'url', None):
        raise UsageError('--url: this command acts on this machine and not through a townhall; leave --url out')


def town_root(arguments: argparse.Namespace) -> Path:
    """The town that is meant, for a command that may write or start something there. Raises UsageError."""
    root = meant_root(arguments)
    _refuse_root(root)
    return root


def meant_root(arguments: argparse.Namespace) -> Path:
    """The town of --town, of TINYTOWN_TOWN, or of the nearest directory upwards. Raises UsageError."""
    acts_here(arguments)
    given = getattr(arguments, 'town', None) or os.environ.get('TINYTOWN_TOWN') or None
    return find(Path() if given else Path.cwd(), given)


def _refuse_root(root: Path) -> None:
    """Refuses root in the town of another user of this machine, who could not use what root starts or writes there.

    A number without a name, as in a container that a directory is mounted into, is nobody who could be locked out.
    """
    owner = root.stat().st_uid
    if os.geteuid() or not owner:
        return
    import pwd

    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        return
    raise UsageError(
        f'{root} belongs to {name}, who could not use what root starts or writes there; run this as that user:  '
        f'sudo -u {name} …'
    )


def open_meant(arguments: argparse.Namespace, flags: dict[str, Any] | None = None) -> Town:
    """Opens the town that a command line means; with --verbose it says which. Raises UsageError, TownError."""
    town = open_town(town_root(arguments), flags)
    note(arguments, f'town {town.name} in {town.root}, Redis at {town.redis_url}')
    return town


def note(arguments: argparse.Namespace, what: str) -> None:
    """Says on stderr what --verbose asks for."""
    if getattr(arguments, 'verbose', False):
        print(clean(what), file=sys.stderr)
