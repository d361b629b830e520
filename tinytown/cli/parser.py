"""What the two command lines share: one-line complaints, streams that can be written to, and which town is meant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..core.town import Town, find_town, open_town
from ..errors import TownError, UsageError
from .format import clean


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
    return find_town(Path() if given else Path.cwd(), given)


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
