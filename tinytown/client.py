"""Two ways for `tt` to reach a town: through the door in this process, or over REST. Both take a row and arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

from .errors import TownError, Unavailable, UsageError
from .model import Principal
from .operations import Op, call, encode
from .town import Town


class Backend(Protocol):
    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]: ...


class Local:
    """The town itself, as `by`."""

    def __init__(self, town: Town, by: Principal) -> None:
        self.town = town
        self.by = by

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer of an operation. Raises TownError."""
        answer = self.town.store.run(call(self.town, self.by, op, arguments))
        found: dict[str, Any] = json.loads(encode(answer))
        return found


class Remote:
    """A townhall at a URL, with an API key if it asks for one. Raises UsageError for a URL that can't be used."""

    def __init__(self, url: str, key_file: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname:
            raise UsageError(f'--url {url}: give http://HOST:PORT or https://HOST:PORT')
        self._parts = parts
        self._headers = {'Accept': 'application/json'}
        if key_file:
            try:
                key = Path(key_file).read_text().strip()
            except OSError as e:
                raise UsageError(f'--api-key-file {key_file}: {e.strerror}') from None
            self._headers['Authorization'] = f'Bearer {key}'

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer of an operation. Raises TownError."""
        import http.client

        secure = self._parts.scheme == 'https'
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = make(self._parts.hostname or '', self._parts.port, timeout=60)
        path, body = _request(op, arguments)
        headers = self._headers | ({'Content-Type': 'application/json'} if body else {})
        try:
            connection.request(op.method, self._parts.path.rstrip('/') + path, body, headers)
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise Unavailable(f'{self._parts.geturl()} can not be reached: {e}') from None
        finally:
            connection.close()
        return _answer(response.status, text)


def _request(op: Op, arguments: dict[str, Any]) -> tuple[str, bytes | None]:
    """The path (with query) and body that carry the arguments of an operation."""
    rest = dict(arguments)
    path = op.path
    for name in op.placeholders:
        path = path.replace(f'{{{name}}}', quote(str(rest.pop(name)), safe=''))
    if op.method == 'POST':
        return path, json.dumps(rest).encode() if rest else None
    query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in rest.items()}
    return path + (f'?{urlencode(query)}' if query else ''), None


def _answer(status: int, text: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        raise TownError(f'the server answered {status} and no JSON; is it a townhall?') from None
    if status >= 400:
        raise TownError(str(found.get('detail', status)), code=str(found.get('code', '')))
    return found
