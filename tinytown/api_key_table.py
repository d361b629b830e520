"""The table of keys in a configuration: what an entry must be, and how one is added, changed and removed.

Each entry is a [[townhall.auth.keys]] with id, hash, scopes, and if one likes expires and note.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, get_args

from .model import Scope
from .toml_edit import Statement, statements, to_toml, with_value

KEYS_TABLE: Final = ('townhall', 'auth', 'keys')
ID_PATTERN: Final = r'[0-9a-f]{8}'
_FIELDS: Final = ('id', 'hash', 'scopes', 'expires', 'note')

# ----------------------------------------------------------------------------------------------------------- checking


def scopes_violation(value: Any) -> str:
    """What is wrong with a list of scopes; '' if nothing is. An empty one is taken for a slip: it allows nothing."""
    fits = isinstance(value, list) and value and all(scope in get_args(Scope) for scope in value)
    return '' if fits else f'give a list of one or more of {", ".join(get_args(Scope))}'


def violation(value: Any) -> str:
    """What is wrong with the table of keys: of which key, and what. No hash is shown."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return 'write [[townhall.auth.keys]] above the settings of each key'
    seen = set()
    for number, key in enumerate(value, 1):
        name = key.get('id')
        if not isinstance(name, str) or not re.fullmatch(ID_PATTERN, name):
            return f'key {number}: id = {name!r}: give the 8 digits that stand in the key, after tt_'
        if name in seen:
            return f"key '{name}' stands there twice; remove one"
        seen.add(name)
        if wrong := _key_violation(key):
            return f"key '{name}': {wrong}"
    return ''


def _key_violation(key: dict[str, Any]) -> str:
    unknown = sorted(key.keys() - set(_FIELDS))
    if unknown:
        return f'{unknown[0]} is not known; there are {", ".join(_FIELDS)}'
    if not isinstance(key.get('hash'), str):
        return 'hash is missing: the text that begins with $argon2id$'
    if wrong := scopes_violation(key.get('scopes')):
        return f'scopes: {wrong}'
    if not isinstance(key.get('note', ''), str):
        return 'note: give a text in quotes'
    return '' if expiry(key) is not None else f'expires = {key["expires"]}: give a time as 2027-01-31T12:00:00Z'


def expiry(key: Mapping[str, Any]) -> float | None:
    """When a key ends, in seconds since the epoch (infinity: never); None for what is no time."""
    given = key.get('expires', math.inf)
    try:
        if isinstance(given, str):
            given = datetime.fromisoformat(given)
        if isinstance(given, datetime):
            return given.timestamp() if given.tzinfo else None
    except (ValueError, OverflowError):
        return None
    return given if given == math.inf else None


def with_text_time(key: dict[str, Any]) -> dict[str, Any]:
    """A key whose expiry, if TOML has read it as a time, is text again."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in key.items()}


# ------------------------------------------------------------------------------------------------------------ writing


def written(key: Mapping[str, Any]) -> str:
    """An entry as a file holds it."""
    lines = [f'{name} = {to_toml(key[name])}\n' for name in _FIELDS if name in key]
    return f'[[{".".join(KEYS_TABLE)}]]\n{"".join(lines)}'


def added(source: str, key: Mapping[str, Any]) -> str:
    """The text of a configuration file with one key more, at its end."""
    newline = '\r\n' if '\r\n' in source else '\n'
    gap = '' if not source or source.endswith('\n') else newline
    return source + gap + ('\n' + written(key)).replace('\n', newline)


def rekeyed(source: str, key_id: str, text: str) -> str:
    """The text with another hash for a key. Every other byte stays as it is."""
    for each in _entry(source, key_id):
        if each.path == (*KEYS_TABLE, 'hash'):
            return source[: each.start] + with_value(each.text, to_toml(text)) + source[each.end :]
    return source


def removed(source: str, key_id: str) -> str:
    """The text without a key, nor the blank line above it. Every other byte stays as it is."""
    found = _entry(source, key_id)
    if not found:
        return source
    all_of_them = list(statements(source))
    above = all_of_them[all_of_them.index(found[0]) - 1] if found[0].start else found[0]
    start = above.start if above.kind == 'blank' else found[0].start
    return source[:start] + source[found[-1].end :]


def _entry(source: str, key_id: str) -> list[Statement]:
    """The statements of a key's table, header first, up to its last value; none if it is written in another way."""
    entry: list[Statement] = []
    for each in [*statements(source), None]:
        if each is None or each.kind == 'header':
            if any(_is_id(one, key_id) for one in entry):
                last = max(i for i, one in enumerate(entry) if one.kind == 'value')
                return entry[: last + 1]
            entry = [each] if each and each.path == KEYS_TABLE else []
        elif entry:
            entry.append(each)
    return []


def _is_id(statement: Statement, key_id: str) -> bool:
    return statement.path == (*KEYS_TABLE, 'id') and list(tomllib.loads(statement.text).values()) == [key_id]
