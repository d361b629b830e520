"""Edits TOML files that people wrote: changes one setting or table and leaves every other byte as it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import UsageError


def to_toml(value: Any) -> str:
    """A value in TOML syntax, on one line."""
    if isinstance(value, list):
        return f'[{", ".join(map(to_toml, value))}]'
    if isinstance(value, dict):
        return f'{{{", ".join(f"{_dotted([name])} = {to_toml(item)}" for name, item in value.items())}}}'
    import tomli_w

    return tomli_w.dumps({'v': value}).removeprefix('v = ').rstrip('\n')


def change(source: str, path: tuple[str, ...], value: Any) -> str:
    """The text of a configuration file with one setting changed or added. Every other character stays as it is.

    `source` must be valid TOML. Raises UsageError if the setting is in an inline table, { … }.
    """
    mark = '\ufeff' if source.startswith('\ufeff') else ''
    text = source.removeprefix(mark)
    found = list(statements(text))
    for each in found:
        if each.kind == 'value' and each.path == path:
            return mark + text[: each.start] + with_value(each.text, to_toml(value)) + text[each.end :]
        if each.kind == 'value' and each.path == path[: len(each.path)]:
            raise UsageError(f'{".".join(each.path)} = {{ … }}: this table is written in braces; change it by hand')
    at, line = _addition(found, path, to_toml(value))
    newline = '\r\n' if '\r\n' in text else '\n'
    gap = newline if at and text[at - 1] != '\n' else ''
    return mark + text[:at] + gap + line.replace('\n', newline) + text[at:]


def _addition(statements: list[Statement], path: tuple[str, ...], value: str) -> tuple[int, str]:
    """The offset at which to insert a new setting, and the text to insert.

    It goes after the comment that shows it, else after the last setting or the header of its table, else into a new
    table at the end.
    """
    table, end = path[:-1], statements[-1].end if statements else 0
    at, line = (0 if not table else -1), f'{_dotted(path[-1:])} = {value}\n'
    for each in statements:
        if each.kind == 'comment' and each.table == table and each.shows == path[-1]:
            return each.end, line
        if (each.kind == 'value' and each.path[:-1] == each.table == table) or (
            each.kind == 'header' and each.path == table
        ):
            at = each.end
        elif each.kind == 'value' and each.path[: len(table)] == table and len(each.table) < len(table):
            at, line = each.end, f'{_dotted(path[len(each.table) :])} = {value}\n'
    return (at, line) if at >= 0 else (end, f'\n[{_dotted(table)}]\n{line}')


@dataclass(frozen=True, slots=True)
class Statement:
    """A piece of a TOML file: one line, or all lines of one value. `start` and `end` are offsets in the file.

    `path` is the full path of a value or header, `table` the path of the table around it. `shows` is the key in a
    comment like `# key = value`.
    """

    kind: Literal['header', 'value', 'comment', 'blank']
    text: str
    start: int
    end: int
    table: tuple[str, ...]
    path: tuple[str, ...] = ()
    shows: str = ''


_KEY: Final = r'(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\')'
_KEYS: Final = re.compile(rf'[ \t]*({_KEY}(?:[ \t]*\.[ \t]*{_KEY})*)[ \t]*=[ \t]*')
_HEADER: Final = re.compile(rf'[ \t]*\[+[ \t]*({_KEY}(?:[ \t]*\.[ \t]*{_KEY})*)')
_SHOWN: Final = re.compile(r'[ \t]*#[ \t]*([A-Za-z0-9_-]+)[ \t]*=')


def statements(source: str) -> Iterator[Statement]:
    """The statements of a TOML text, which must be valid."""
    lines = re.findall(r'[^\n]*\n|[^\n]+', source)
    table: tuple[str, ...] = ()
    start = i = 0
    while i < len(lines):
        text = lines[i]
        i += 1
        while not _is_toml(text) and i < len(lines):  # a value over several lines
            text += lines[i]
            i += 1
        end = start + len(text)
        if not text.strip():
            yield Statement('blank', text, start, end, table)
        elif text.lstrip().startswith('#'):
            shown = _SHOWN.match(text)
            yield Statement('comment', text, start, end, table, shows=shown[1] if shown else '')
        elif header := _HEADER.match(text):
            table = _path(header[1])
            yield Statement('header', text, start, end, table, table)
        elif keys := _KEYS.match(text):
            yield Statement('value', text, start, end, table, table + _path(keys[1]))
        start = end


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _path(keys: str) -> tuple[str, ...]:
    """The names in a dotted key."""
    node, names = tomllib.loads(f'{keys} = 0'), []
    while isinstance(node, dict):
        [(name, node)] = node.items()
        names.append(name)
    return tuple(names)


def _dotted(names: Iterable[str]) -> str:
    return '.'.join(name if re.fullmatch(r'[A-Za-z0-9_-]+', name) else to_toml(name) for name in names)


def with_value(statement: str, value: str) -> str:
    """A `key = value` statement with a new value. Spaces, a trailing comment and the line end stay."""
    keys = _KEYS.match(statement)
    assert keys
    for match in re.finditer(r'[ \t]*(?:#|\r?\n|\Z)', statement[keys.end() :]):
        if _is_toml(statement[: keys.end() + match.start()]):
            return statement[: keys.end()] + value + statement[keys.end() + match.start() :]
    raise AssertionError(f'{statement!r} is not a statement')
