"""Secrets that are known by their value, taken out of what is written down and shown.

A value of fewer than SHORTEST bytes is left where it stands: it would be found within ordinary words. A secret in
another form than its own (encoded, or broken over lines) is not recognised. This guards against accidents, not against
a program that means to give a secret away.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from . import say
from .clis import key_names
from .settings import Config

SHORTEST: Final = 8
MARK: Final = b'[redacted]'
_PATH: Final = re.compile(r'/[\w./:+-]*')

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
            parts += [data[done:start], MARK]
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


def known(root: Path, config: Config, environ: Mapping[str, str]) -> Secrets:
    """The secrets of a town that this process knows of.

    The keys of the coding CLIs and what `agent.pass_env` names (paths aside), the passwords of Redis (those in files,
    too) and of proxies, and the tokens of agents with the key that they are made with.
    """
    values = [environ.get(name, '') for name in key_names(config)]
    values = [value for value in values if not _PATH.fullmatch(value)]
    urls = [config.redis.url or '', *(value for name, value in environ.items() if name.lower().endswith('_proxy'))]
    for url in urls:
        values += _passwords(url)
    given = config.redis.password_file, config.redis.sentinel_password_file
    ours = [root / Path(name).expanduser() for name in given if name]
    for file in (*ours, root / '.tt' / 'token-key', *(root / '.tt' / 'agents').glob('*.token')):
        with suppress(OSError):
            values.append(file.read_text('utf-8', 'surrogateescape'))
    return Secrets(values)


def ready_log(root: Path, config: Config) -> None:
    """Has this process write its log as a town's settings say, and without its secrets."""
    log = config.townhall.log
    say.configure(log.format, log.level, config.name, known(root, config, os.environ).hide)


def _passwords(url: str) -> list[str]:
    """The password in a URL, as it stands there and as it is meant."""
    try:
        parts = urlsplit(url)
        found = [parts.password or '', *parse_qs(parts.query).get('password', ())]
    except ValueError:
        return []
    return [*found, *map(unquote, found)]
