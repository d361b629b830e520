"""`tt generate-api-key` and `tt key`: make, list, rotate and revoke API keys in a town's configuration file.

A running townhall reloads its keys by itself. `_check_reloaded` asks it whether it did, after a key was removed.
`api_key_table` edits the [[townhall.auth.keys]] tables; `auth.api_keys` generates keys and their hashes.
"""

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
from .parser import CommandSpec, acts_here, argument, town_root
from .ping import ask

if TYPE_CHECKING:
    from ..auth.api_keys import ApiKey

_MODE: Final = 'townhall.auth.mode'
_UNITS: Final = {'m': 'minutes', 'h': 'hours', 'd': 'days', 'w': 'weeks'}


def key_commands() -> Iterator[CommandSpec]:
    """The commands that make and manage keys."""
    write = argument('--write', action='store_true', help='add the key to tinytown.toml, and turn authentication on')
    to = argument('--to', metavar='FILE', type=Path, help=_TO)
    yield CommandSpec('access', 'generate-api-key', _GENERATE, _generate, (write, to))
    yield CommandSpec('access', 'auth gen-key', 'The same as generate-api-key', _generate, (write, to))
    entry = (
        argument('--scopes', metavar='LIST', default=READ, help='what it may do, like town.read,town.write'),
        argument('--expires', metavar='WHEN', help='when it expires: 90d, 12h, or a time like 2027-01-31T12:00:00Z'),
        argument('--note', metavar='TEXT', help='what it is for'),
    )
    yield CommandSpec('access', 'key create', 'Make an API key; it is shown once', _create, (*entry, write, to))
    yield CommandSpec('access', 'key list', 'List the keys of this town', _list)
    key = argument('id', metavar='ID', help='id of the key (see tt key list)')
    yield CommandSpec('access', 'key rotate', _ROTATE, _rotate, (key,))
    yield CommandSpec('access', 'key revoke', 'Remove a key; it stops working at once', _revoke, (key,))


_GENERATE: Final = 'Make an API key that may do everything; it is shown once'
_ROTATE: Final = 'Replace a key by a new one with the same id; the old one stops working at once'
_TO: Final = 'write the key into a file (mode 0600) that only you may read, instead of showing it'


def _generate(arguments: argparse.Namespace) -> int:
    return _make(arguments, {'scopes': [ADMIN]})


def _create(arguments: argparse.Namespace) -> int:
    entry: dict[str, Any] = {'scopes': [part.strip() for part in arguments.scopes.split(',')]}
    if wrong := api_key_table.scopes_violation(entry['scopes']):
        raise UsageError(f'--scopes {arguments.scopes}: {wrong}, separated by commas')
    if arguments.expires is not None:
        entry['expires'] = _expiry(arguments.expires)
    if arguments.note is not None:
        entry['note'] = arguments.note
    return _make(arguments, entry)


def _make(arguments: argparse.Namespace, entry: dict[str, Any]) -> int:
    """Makes a key and shows it; with --write also adds it to the configuration, with --to writes it into a file."""
    acts_here(arguments)
    new_key = _new_key()
    entry = {'id': new_key.id, 'hash': new_key.hash} | entry
    if arguments.to:  # before the configuration: a key in force that was never written down would be lost
        write_atomically(arguments.to, f'{new_key.key}\n', 0o600, keep_mode=False, keep_owner=False)
    if not arguments.write:
        paste = [f'To accept it, add to {configuration.FILE}:', '', '[townhall.auth]', 'mode = "api_key"', '']
        return _show(arguments, new_key, '\n'.join([*paste, api_key_table.written(entry).rstrip()]))
    file = town_root(arguments) / configuration.FILE
    with _changing(file) as draft:
        draft.entries.append(entry)
        draft.text = api_key_table.added(draft.text, entry)
        draft.turn_on()
    return _show(arguments, new_key, f'Written to {file}, mode 0600.{draft.advice}')


def _new_key(key_id: str = '') -> ApiKey:
    from ..auth.api_keys import generate_key  # late: other commands do not need it

    return generate_key(key_id)


def _show(arguments: argparse.Namespace, new_key: ApiKey, more: str) -> int:
    file = getattr(arguments, 'to', None)
    key = {'key_file': str(file)} if file else {'key': new_key.key}
    where = f'The key is in {file}, mode 0600.' if file else 'The key is shown only this once.'
    lines = [
        f'id    {new_key.id}',
        *([] if file else [f'key   {new_key.key}']),
        f'hash  {new_key.hash}',
        '',
        more,
        '',
        where,
    ]
    return report(arguments, {'id': new_key.id, **key, 'hash': new_key.hash}, '\n'.join(lines))


def _expiry(given: str) -> str:
    """The value of --expires as a time (RFC 3339). Raises UsageError if it is invalid or in the past."""
    if match := re.fullmatch(r'([1-9][0-9]{0,4})([mhdw])', given):
        ends = datetime.now(UTC) + timedelta(**{_UNITS[match[2]]: int(match[1])})
        return ends.strftime('%Y-%m-%dT%H:%M:%SZ')
    moment = api_key_table.expiry({'expires': given})
    if moment is None:
        raise UsageError(f'--expires {given}: give 90d, 12h, or a time like 2027-01-31T12:00:00Z')
    if moment <= time.time():
        raise UsageError(f'--expires {given}: that time is in the past')
    return given


def _list(arguments: argparse.Namespace) -> int:
    auth = configuration.load(town_root(arguments)).townhall.auth
    keys = [{name: value for name, value in key.items() if name != 'hash'} for key in auth.keys]
    lines = [_line(key) for key in keys]
    if auth.api_key_hash:
        lines.append(f'{"-":8}  {",".join(auth.api_key_scopes)}  (townhall.auth.api_key_hash)')
    if auth.mode != 'api_key':
        lines.append(f'{_MODE} is "{auth.mode}", so townhall does not ask for keys.')
    answer = {'mode': auth.mode, 'keys': keys, 'api_key_hash': bool(auth.api_key_hash)}
    return report(arguments, answer, '\n'.join(lines) or 'There is no key. Make one:  tt key create --write')


def _line(key: dict[str, Any]) -> str:
    parts = [key['id'], ','.join(key['scopes'])]
    if 'expires' in key:
        is_expired = (api_key_table.expiry(key) or 0) <= time.time()
        parts.append(f'{"expired" if is_expired else "until"} {key["expires"]}')
    return '  '.join([*parts, key.get('note', '')]).rstrip()


def _rotate(arguments: argparse.Namespace) -> int:
    file = town_root(arguments) / configuration.FILE
    new_key = _new_key(_known(file, arguments.id))
    with _changing(file) as draft:
        draft.text = api_key_table.rekeyed(draft.text, new_key.id, new_key.hash)
        draft.entries = [key | {'hash': new_key.hash} if key['id'] == new_key.id else key for key in draft.entries]
    _show(arguments, new_key, f'Written to {file}. The old key of this id is no longer accepted.')
    _check_reloaded(file.parent, f'the new key of {new_key.id} is in {file}', 'the old one')
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    file = town_root(arguments) / configuration.FILE
    key_id = _known(file, arguments.id)
    with _changing(file) as draft:
        draft.text = api_key_table.removed(draft.text, key_id)
        draft.entries = [key for key in draft.entries if key['id'] != key_id]
    _check_reloaded(file.parent, f'{key_id} is no longer in {file}', 'it')
    return report(arguments, {'revoked': key_id}, f'Revoked {key_id}. A running townhall refuses it from now on.')


def _check_reloaded(root: Path, done: str, key: str) -> None:
    """Asks each townhall that runs here whether it reloaded its keys. Raises TownError if one still has the old keys.

    The message says what was `done`, and names the `key` that is still accepted.
    """
    for _, url in live_townhalls(root):
        try:
            ready = ask(url, '/ready', is_here=True)[1]
        except TownError as e:
            print(f'tt: cannot tell whether the townhall reloaded its keys: {e.detail}; see its log', file=sys.stderr)
            continue
        if ready.get('keys') == 'old':
            raise TownError(
                f"{done}, but the townhall on {url} STILL LETS {key.upper()} IN: it can't reload its configuration; "
                'see its log and mend the cause, or stop it:  tt stop'
            )


def _known(file: Path, key_id: str) -> str:
    """Returns `key_id` if a key in this file has it, else raises TownError."""
    if key_id not in [key['id'] for key in configuration.read_settings(file).get(configuration.KEYS, [])]:
        raise TownError(f"There is no key '{key_id}' in {file}; see  tt key list")
    return key_id


# ------------------------------------------------------------------------------------------------------------ writing


class _Draft:
    """A change of a configuration file: the new `text`, and the keys and mode that it must result in."""

    def __init__(self, text: str, before: dict[str, Any]) -> None:
        self.text = text
        self.before = before
        self.entries = list(before.get(configuration.KEYS, []))
        self.mode: str | None = before.get(_MODE)
        self.turns_on = False
        self.advice = ''

    def turn_on(self) -> None:
        """Turns on authentication by API key, unless the file sets a mode other than none."""
        if self.mode in (None, 'none'):
            self.mode = 'api_key'
            self.text = change(self.text, ('townhall', 'auth', 'mode'), 'api_key')
            self.turns_on = True

    def is_right(self) -> bool:
        """Whether the text has the wanted keys and mode, and all other settings as before."""
        wanted = self.before | {configuration.KEYS: self.entries, _MODE: self.mode}
        try:
            parsed = configuration.parse(self.text.encode(), 'the draft')
        except UsageError:
            return False
        return {configuration.KEYS: [], _MODE: None} | parsed == wanted


@contextmanager
def _changing(file: Path) -> Iterator[_Draft]:
    """Gives a draft of a configuration file to change, under a lock, and then writes it. Raises UsageError.

    The file stays unchanged if the draft's text does not result in just the wanted change.
    """
    with _lock(file.parent):
        whole = file.read_bytes().decode()
        text = whole.removeprefix('\ufeff')
        draft = _Draft(text, configuration.read_settings(file))
        yield draft
        if not draft.is_right():
            raise UsageError(
                f'{file} was not changed: its keys are not written as [[townhall.auth.keys]]; change it by hand'
            )
        write_atomically(file.resolve(), whole[: len(whole) - len(text)] + draft.text, 0o600, keep_mode=False)
    if draft.turns_on:
        when = 'now on, townhall' if reload_townhalls(file.parent) else 'its next start on, townhall'
        draft.advice = f' From {when} asks every caller for a key.'


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Makes other commands wait, so that only one changes the configuration at a time."""
    descriptor = os.open(TownDir(root).create().path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
