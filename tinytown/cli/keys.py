"""`tt generate-api-key` and `tt key`: API keys in the configuration of a town. A townhall that runs takes them up."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import api_key_table
from .. import config as configuration
from ..errors import TownError, UsageError
from ..files import write_atomically
from ..host.town_dir import TownDir
from ..host.townhalls import live_townhalls, reload_townhalls
from ..model import ADMIN, READ
from ..toml_edit import change
from .lifecycle import report
from .parser import Command, acts_here, argument, town_root
from .ping import ask

if TYPE_CHECKING:
    from ..auth.api_keys import ApiKey

_MODE: Final = 'townhall.auth.mode'
_UNITS: Final = {'m': 'minutes', 'h': 'hours', 'd': 'days', 'w': 'weeks'}


def key_commands() -> Iterator[Command]:
    """What makes and manages keys."""
    write = argument('--write', action='store_true', help='write it into tinytown.toml, and turn keys on')
    to = argument('--to', metavar='FILE', type=Path, help=_TO)
    yield Command('access', 'generate-api-key', _GENERATE, _generate, (write, to))
    yield Command('access', 'auth gen-key', 'The same as generate-api-key', _generate, (write, to))
    entry = (
        argument('--scopes', metavar='LIST', default=READ, help='what it may do, as town.read,town.write'),
        argument('--expires', metavar='WHEN', help='90d, 12h, or a time as 2027-01-31T12:00:00Z'),
        argument('--note', metavar='TEXT', help='what it is for'),
    )
    yield Command('access', 'key create', 'Make an API key; it is shown once', _create, (*entry, write, to))
    yield Command('access', 'key list', 'List the keys of this town', _list)
    key = argument('id', metavar='ID', help='see tt key list')
    yield Command('access', 'key rotate', _ROTATE, _rotate, (key,))
    yield Command('access', 'key revoke', 'Remove a key; it ends at once', _revoke, (key,))


_GENERATE: Final = 'Make an API key that may do everything; it is shown once'
_ROTATE: Final = 'Replace a key by a new one of the same id; the old one ends at once'
_TO: Final = 'write the key into a file (mode 0600) that only you may read, and do not show it'


def _generate(arguments: argparse.Namespace) -> int:
    return _make(arguments, {'scopes': [ADMIN]})


def _create(arguments: argparse.Namespace) -> int:
    entry: dict[str, Any] = {'scopes': [part.strip() for part in arguments.scopes.split(',')]}
    if wrong := api_key_table.scopes_violation(entry['scopes']):
        raise UsageError(f'--scopes {arguments.scopes}: {wrong}, with commas between')
    if arguments.expires is not None:
        entry['expires'] = _expiry(arguments.expires)
    if arguments.note is not None:
        entry['note'] = arguments.note
    return _make(arguments, entry)


def _make(arguments: argparse.Namespace, entry: dict[str, Any]) -> int:
    """Makes a key and shows it, and writes it down if that is asked for."""
    acts_here(arguments)
    made = _new_key()
    entry = {'id': made.id, 'hash': made.hash} | entry
    if arguments.to:  # before it is let in: a key that is in force must be known to somebody
        write_atomically(arguments.to, f'{made.key}\n', 0o600, keep_mode=False, keep_owner=False)
    if not arguments.write:
        paste = [f'To let it in, add to {configuration.FILE}:', '', '[townhall.auth]', 'mode = "api_key"', '']
        return _show(arguments, made, '\n'.join([*paste, api_key_table.written(entry).rstrip()]))
    file = town_root(arguments) / configuration.FILE
    with _changing(file) as draft:
        draft.entries.append(entry)
        draft.text = api_key_table.added(draft.text, entry)
        draft.turn_on()
    return _show(arguments, made, f'Written to {file}, mode 0600.{draft.advice}')


def _new_key(key_id: str = '') -> ApiKey:
    from ..auth.api_keys import generate_key  # late: other commands need none of it

    return generate_key(key_id)


def _show(arguments: argparse.Namespace, made: ApiKey, more: str) -> int:
    file = getattr(arguments, 'to', None)
    key = {'key_file': str(file)} if file else {'key': made.key}
    where = f'The key is in {file}, mode 0600.' if file else 'The key is shown this once.'
    lines = [f'id    {made.id}', *([] if file else [f'key   {made.key}']), f'hash  {made.hash}', '', more, '', where]
    return report(arguments, {'id': made.id, **key, 'hash': made.hash}, '\n'.join(lines))


def _expiry(given: str) -> str:
    """A time as the file holds it. Raises UsageError for none, and for one that is over."""
    if match := re.fullmatch(r'([1-9][0-9]{0,4})([mhdw])', given):
        ends = datetime.now(UTC) + timedelta(**{_UNITS[match[2]]: int(match[1])})
        return ends.strftime('%Y-%m-%dT%H:%M:%SZ')
    moment = api_key_table.expiry({'expires': given})
    if moment is None:
        raise UsageError(f'--expires {given}: give 90d, 12h, or a time as 2027-01-31T12:00:00Z')
    if moment <= time.time():
        raise UsageError(f'--expires {given}: that time is over')
    return given


def _list(arguments: argparse.Namespace) -> int:
    auth = configuration.load(town_root(arguments)).townhall.auth
    keys = [{name: value for name, value in key.items() if name != 'hash'} for key in auth.keys]
    lines = [_line(key) for key in keys]
    if auth.api_key_hash:
        lines.append(f'{"-":8}  {",".join(auth.api_key_scopes)}  (townhall.auth.api_key_hash)')
    if auth.mode != 'api_key':
        lines.append(f'{_MODE} is "{auth.mode}", so no key is asked for.')
    answer = {'mode': auth.mode, 'keys': keys, 'api_key_hash': bool(auth.api_key_hash)}
    return report(arguments, answer, '\n'.join(lines) or 'There is no key. Make one:  tt key create --write')


def _line(key: dict[str, Any]) -> str:
    parts = [key['id'], ','.join(key['scopes'])]
    if 'expires' in key:
        over = (api_key_table.expiry(key) or 0) <= time.time()
        parts.append(f'{"expired" if over else "until"} {key["expires"]}')
    return '  '.join([*parts, key.get('note', '')]).rstrip()


def _rotate(arguments: argparse.Namespace) -> int:
    file = town_root(arguments) / configuration.FILE
    made = _new_key(_known(file, arguments.id))
    with _changing(file) as draft:
        draft.text = api_key_table.rekeyed(draft.text, made.id, made.hash)
        draft.entries = [key | {'hash': made.hash} if key['id'] == made.id else key for key in draft.entries]
    _show(arguments, made, f'Written to {file}. The old key of this id is not taken any more.')
    _check_taken_up(file.parent, f'the new key of {made.id} is in {file}', 'the old one')
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    file = town_root(arguments) / configuration.FILE
    key_id = _known(file, arguments.id)
    with _changing(file) as draft:
        draft.text = api_key_table.removed(draft.text, key_id)
        draft.entries = [key for key in draft.entries if key['id'] != key_id]
    _check_taken_up(file.parent, f'{key_id} is not in {file} any more', 'it')
    return report(arguments, {'revoked': key_id}, f'Revoked {key_id}. A townhall that runs refuses it from now on.')


def _check_taken_up(root: Path, done: str, what: str) -> None:
    """Asks the townhalls that run here. Raises TownError if one still lets in what the configuration does not."""
    for _, url in live_townhalls(root):
        try:
            ready = ask(url, '/ready', is_here=True)[1]
        except TownError as e:
            print(f'tt: whether the townhall took this up is not known: {e.detail}; its log says so', file=sys.stderr)
            continue
        if ready.get('keys') == 'old':
            raise TownError(
                f'{done}, but the townhall on {url} STILL LETS {what.upper()} IN: it can not take up its '
                'configuration; mend what its log says, or end it:  tt stop'
            )


def _known(file: Path, key_id: str) -> str:
    """The id of a key that this file has. Raises TownError."""
    if key_id not in [key['id'] for key in configuration.read_settings(file).get(configuration.KEYS, [])]:
        raise TownError(f"There is no key '{key_id}' in {file}; see  tt key list")
    return key_id


# ------------------------------------------------------------------------------------------------------------ writing


class _Draft:
    """A configuration file that is being changed: its text, and what it is to say then."""

    def __init__(self, text: str, before: dict[str, Any]) -> None:
        self.text = text
        self.before = before
        self.entries = list(before.get(configuration.KEYS, []))
        self.mode: str | None = before.get(_MODE)
        self.turns_on = False
        self.advice = ''

    def turn_on(self) -> None:
        """Has keys asked for, if nothing is."""
        if self.mode in (None, 'none'):
            self.mode = 'api_key'
            self.text = change(self.text, ('townhall', 'auth', 'mode'), 'api_key')
            self.turns_on = True

    def is_right(self) -> bool:
        """Whether the text says what it said before, but for the keys and the mode, and of these what it should."""
        wanted = self.before | {configuration.KEYS: self.entries, _MODE: self.mode}
        try:
            found = configuration.parse(self.text.encode(), 'the draft')
        except UsageError:
            return False
        return {configuration.KEYS: [], _MODE: None} | found == wanted


@contextmanager
def _changing(file: Path) -> Iterator[_Draft]:
    """Changes a configuration file, alone, if the change says just what it should. Raises UsageError."""
    with _lock(file.parent):
        whole = file.read_bytes().decode()
        text = whole.removeprefix('\ufeff')
        draft = _Draft(text, configuration.read_settings(file))
        yield draft
        if not draft.is_right():
            raise UsageError(
                f'{file} is left as it is: its keys are not written as [[townhall.auth.keys]]; change it by hand'
            )
        write_atomically(file, whole[: len(whole) - len(text)] + draft.text, 0o600, keep_mode=False)
    if draft.turns_on:
        when = 'now on, townhall' if reload_townhalls(file.parent) else 'its next start on, townhall'
        draft.advice = f' From {when} asks every caller for a key.'


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Lets one command at a time change the configuration."""
    descriptor = os.open(TownDir(root).create().path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
