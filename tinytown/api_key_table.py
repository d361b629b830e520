"""The table of API keys in a configuration file: checks its entries, and adds, changes and removes them in the text.

An entry is a [[townhall.auth.keys]] table with id, hash and scopes; expires and note are optional. `config.py` checks
entries with it, `cli/keys.py` edits them.
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
    """What is wrong with a list of scopes, or ''. An empty list is refused as a mistake, because it allows nothing."""
    is_valid = isinstance(value, list) and value and all(scope in get_args(Scope) for scope in value)
    return '' if is_valid else f'give a list of one or more of {", ".join(get_args(Scope))}'


def violation(value: Any) -> str:
    """What is wrong with the table of keys, or ''. Names the key; never shows a hash."""
    if not isinstance(value, list) or not all(isinstance(key, dict) for key in value):
        return 'write [[townhall.auth.keys]] above the settings of each key'
    seen = set()
    for number, key in enumerate(value, 1):
        key_id = key.get('id')
        if not isinstance(key_id, str) or not re.fullmatch(ID_PATTERN, key_id):
            return f'key {number}: id = {key_id!r}: give the 8 hexadecimal digits that follow tt_ in the key'
        if key_id in seen:
            return f"key '{key_id}' is there twice; remove one"
        seen.add(key_id)
        if wrong := _key_violation(key):
            return f"key '{key_id}': {wrong}"
    return ''


def _key_violation(key: dict[str, Any]) -> str:
    unknown = sorted(key.keys() - set(_FIELDS))
    if unknown:
        return f'{unknown[0]} is not a field of a key; the fields are {", ".join(_FIELDS)}'
    if not isinstance(key.get('hash'), str):
        return 'hash is missing; give the text that begins with $argon2id$'
    if wrong := scopes_violation(key.get('scopes')):
        return f'scopes: {wrong}'
    if not isinstance(key.get('note', ''), str):
        return 'note: give text in quotes'
    return '' if expiry(key) is not None else f'expires = {key["expires"]}: give a time like 2027-01-31T12:00:00Z'


def expiry(key: Mapping[str, Any]) -> float | None:
    """When a key expires, in seconds since the epoch; infinity means never. None if the value is not a valid time."""
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
    """The key with its expiry as text: TOML reads an unquoted time as a datetime."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in key.items()}


# ------------------------------------------------------------------------------------------------------------ writing


def written(key: Mapping[str, Any]) -> str:
    """The text of a key's entry in a configuration file."""
    lines = [f'{name} = {to_toml(key[name])}\n' for name in _FIELDS if name in key]
    return f'[[{".".join(KEYS_TABLE)}]]\n{"".join(lines)}'


def added(source: str, key: Mapping[str, Any]) -> str:
    """The text of a configuration file with a key added at the end."""
    newline = '\r\n' if '\r\n' in source else '\n'
    gap = '' if not source or source.endswith('\n') else newline
    return source + gap + ('\n' + written(key)).replace('\n', newline)


def rekeyed(source: str, key_id: str, hash: str) -> str:
    """The text with a new hash for a key. Every other byte stays as it is."""
    for statement in _entry(source, key_id):
        if statement.path == (*KEYS_TABLE, 'hash'):
            value = with_value(statement.text, to_toml(hash))
            return source[: statement.start] + value + source[statement.end :]
    return source


def removed(source: str, key_id: str) -> str:
    """The text without a key and without the blank line above it. Every other byte stays as it is."""
    entry = _entry(source, key_id)
    if not entry:
        return source
    before = list(statements(source))
    above = before[before.index(entry[0]) - 1] if entry[0].start else entry[0]
    start = above.start if above.kind == 'blank' else entry[0].start
    return source[:start] + source[entry[-1].end :]


def _entry(source: str, key_id: str) -> list[Statement]:
    """The statements of a key's [[table]], from header to last value. Empty if the key is written in another way."""
    entry: list[Statement] = []
    for statement in [*statements(source), None]:
        if statement is None or statement.kind == 'header':
            if any(_is_id(inner, key_id) for inner in entry):
                last = max(i for i, inner in enumerate(entry) if inner.kind == 'value')
                return entry[: last + 1]
            entry = [statement] if statement and statement.path == KEYS_TABLE else []
        elif entry:
            entry.append(statement)
    return []


def _is_id(statement: Statement, key_id: str) -> bool:
    return statement.path == (*KEYS_TABLE, 'id') and list(tomllib.loads(statement.text).values()) == [key_id]
