"""Removes known secrets from text that is logged, stored or shown.

`host/town_secrets.py` collects the secret values of a town. Workers' logs pass through a `Redactor`. A value of fewer
than MIN_BYTES bytes is not removed, because it would match within ordinary words. An encoded secret, or one broken over
lines, is not recognised. This protects against accidents, not against a program that leaks a secret on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, unquote_plus

MIN_BYTES: Final = 8
REDACTED: Final = b'[redacted]'
# The password in a URL. If a character in it should have been encoded and is not, it may reach up to the last @.
_IN_LOGIN: Final = re.compile(r'(?<=://)([^:/?#]*):([^/?#]*)@')
_IN_BROKEN_LOGIN: Final = re.compile(r'((?!unix:)(?:[^:]*://|(?!.*://))[^:/?#]*):(.*)@', re.S)
_IN_QUERY: Final = re.compile(r'(?<=[?&]password=)[^&]*')

Span = tuple[int, int]


class Secrets:
    """Secret values, to be found in data."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        encoded = {value.strip().encode('utf-8', 'surrogateescape') for value in values}
        self._values = [value for value in encoded if len(value) >= MIN_BYTES]
        self.longest = max(map(len, self._values), default=0)

    def spans(self, data: bytes) -> list[Span]:
        """The positions of secrets in data as (start, end), in order. Spans that touch or overlap are merged."""
        found: list[Span] = []
        for value in self._values:
            at = data.find(value)
            while at >= 0:
                found.append((at, at + len(value)))
                at = data.find(value, at + 1)
        return _merged(found) if len(found) > 1 else found

    def hide(self, data: bytes) -> bytes:
        """The data with REDACTED in place of each secret."""
        parts, done = [], 0
        for start, end in self.spans(data):
            parts += [data[done:start], REDACTED]
            done = end
        return b''.join([*parts, data[done:]]) if parts else data

    def partial(self, data: bytes) -> int:
        """The number of bytes at the end of data that may be the beginning of a secret."""
        return max((_partial(value, data) for value in self._values), default=0)


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _partial(value: bytes, data: bytes) -> int:
    at = data.find(value[:1], max(len(data) - len(value) + 1, 0))
    while at >= 0:
        if value.startswith(data[at:]):
            return len(data) - at
        at = data.find(value[:1], at + 1)
    return 0


class Redactor:
    """Hides secrets in a stream of pieces. Bytes that may be the beginning of a secret wait for the next piece."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._waiting = b''

    def feed(self, piece: bytes) -> bytes:
        """Takes a piece. Returns the redacted bytes that can be written now."""
        data = self._waiting + piece
        cut = len(data) - self._secrets.partial(data)
        for start, end in self._secrets.spans(data):
            if start < cut < end:
                cut = start
        self._waiting = data[cut:]
        return self._secrets.hide(data[:cut])

    def finish(self) -> bytes:
        """Ends the stream. Returns the redacted rest."""
        data, self._waiting = self._waiting, b''
        return self._secrets.hide(data)


def masked(url: str) -> str:
    """A URL for display: *** replaces its password, even if the URL is malformed."""
    url = _IN_QUERY.sub('***', url)
    login = _IN_BROKEN_LOGIN.match(url) or _IN_LOGIN.search(url)
    return f'{url[: login.start(2)]}***{url[login.end(2) :]}' if login else url


def passwords(url: str) -> list[str]:
    """The passwords in a URL, both as written and percent-decoded."""
    login = [match[2] for match in (_IN_LOGIN.search(url), _IN_BROKEN_LOGIN.match(url)) if match]
    query = _IN_QUERY.findall(url)
    return [*login, *map(unquote, login), *query, *map(unquote_plus, query)]
