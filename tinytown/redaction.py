"""Secrets that are known by their value, taken out of what is written down and shown.

Which values those are in a town `host/town_secrets.py` tells. The logs of workers go through a `Redactor`.
A value of fewer than SHORTEST bytes is left where it stands: it would be found within ordinary words. A secret in
another form than its own (encoded, or broken over lines) is not recognised. This guards against accidents, not against
a program that means to give a secret away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, unquote_plus

SHORTEST: Final = 8
REDACTED: Final = b'[redacted]'
# In the login of a URL. Where a character of it should have been encoded and is not, all up to the last @ may be it.
_IN_LOGIN: Final = re.compile(r'(?<=://)([^:/?#]*):([^/?#]*)@')
_IN_BROKEN_LOGIN: Final = re.compile(r'((?!unix:)(?:[^:]*://|(?!.*://))[^:/?#]*):(.*)@', re.S)
_IN_QUERY: Final = re.compile(r'(?<=[?&]password=)[^&]*')

Span = tuple[int, int]


class Secrets:
    """Values that are not to be seen."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        found = {value.strip().encode('utf-8', 'surrogateescape') for value in values}
        self._values = [value for value in found if len(value) >= SHORTEST]
        self.longest = max(map(len, self._values), default=0)

    def spans(self, data: bytes) -> list[Span]:
        """Where secrets stand in data: (start, end), in order, those that touch or overlap as one."""
        found: list[Span] = []
        for value in self._values:
            at = data.find(value)
            while at >= 0:
                found.append((at, at + len(value)))
                at = data.find(value, at + 1)
        return _merged(found) if len(found) > 1 else found

    def hide(self, data: bytes) -> bytes:
        """Data with a mark in the place of each secret."""
        parts, done = [], 0
        for start, end in self.spans(data):
            parts += [data[done:start], REDACTED]
            done = end
        return b''.join([*parts, data[done:]]) if parts else data

    def begun(self, data: bytes) -> int:
        """How many bytes at the end of data may be the beginning of a secret."""
        return max((_begun(value, data) for value in self._values), default=0)


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _begun(value: bytes, data: bytes) -> int:
    at = data.find(value[:1], max(len(data) - len(value) + 1, 0))
    while at >= 0:
        if value.startswith(data[at:]):
            return len(data) - at
        at = data.find(value[:1], at + 1)
    return 0


class Redactor:
    """Hides secrets in what comes piece by piece. What may be the beginning of one waits for the next piece."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._waiting = b''

    def feed(self, piece: bytes) -> bytes:
        """What can be written now."""
        data = self._waiting + piece
        cut = len(data) - self._secrets.begun(data)
        for start, end in self._secrets.spans(data):
            if start < cut < end:
                cut = start
        self._waiting = data[cut:]
        return self._secrets.hide(data[:cut])

    def finish(self) -> bytes:
        """What is left when no more comes."""
        data, self._waiting = self._waiting, b''
        return self._secrets.hide(data)


def masked(url: str) -> str:
    """A URL to be shown: *** stands for its password, even if that makes it one that can't be read."""
    url = _IN_QUERY.sub('***', url)
    found = _IN_BROKEN_LOGIN.match(url) or _IN_LOGIN.search(url)
    return f'{url[: found.start(2)]}***{url[found.end(2) :]}' if found else url


def passwords(url: str) -> list[str]:
    """The password in a URL, as it stands there and as it is meant."""
    login = [found[2] for found in (_IN_LOGIN.search(url), _IN_BROKEN_LOGIN.match(url)) if found]
    query = _IN_QUERY.findall(url)
    return [*login, *map(unquote, login), *query, *map(unquote_plus, query)]
