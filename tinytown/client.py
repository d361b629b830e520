"""Two ways for `tt` to reach a town: through the door in this process, or over REST. Both take a row and arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote, urlencode, urlsplit

from .errors import TownError, Unavailable, UsageError
from .model import Principal
from .operations import Op, call, encode
from .town import Town

TIMEOUT: Final = 60.0  # seconds for an answer of a townhall


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
    """A townhall at a URL, with an API key if it asks for one. Raises UsageError for a bad URL or key."""

    def __init__(self, url: str, key_file: str | None) -> None:
        self._url = url.rstrip('/')
        self._host, self._port, self._path, self._secure = _parse(url)
        self._headers = {'Accept': 'application/json'}
        if key_file:
            self._headers['Authorization'] = f'Bearer {_read_key(Path(key_file))}'

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer of an operation. Raises TownError."""
        import http.client

        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=TIMEOUT)
        path, body = _request(op, arguments)
        headers = self._headers | ({'Content-Type': 'application/json'} if body else {})
        try:
            connection.request(op.method, self._path + path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as e:
            raise Unavailable(f'{self._url} can not be reached: {e or type(e).__name__}') from None
        finally:
            connection.close()
        return self._answer(op, status, text)

    def _answer(self, op: Op, status: int, text: bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and status >= 400:
            raise TownError(str(found.get('detail', f'{self._url} answered {status}')), code=str(found.get('code', '')))
        if not isinstance(found, dict) or not found.keys() >= set(op.output.get('required', ())):
            raise TownError(f'{self._url} answered {status} and not what a townhall answers; is it one?')
        return found


def _parse(url: str) -> tuple[str, int, str, bool]:
    """(host, port, path, whether it is TLS) of a base URL. Raises UsageError."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or '').encode('idna').decode(), parts.port
    except ValueError:
        host = ''
    if not host or parts.scheme not in ('http', 'https') or parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f'--url {url}: give http://HOST:PORT or https://HOST:PORT')
    secure = parts.scheme == 'https'
    return host, port or (443 if secure else 80), quote(parts.path.rstrip('/'), safe='/%'), secure


def _read_key(file: Path) -> str:
    try:
        key = file.read_text('ascii').strip()
    except OSError as e:
        raise UsageError(f'--api-key-file {file}: {e.strerror}') from None
    except UnicodeDecodeError:
        key = ''
    if not key.isprintable() or not key or ' ' in key:
        raise UsageError(f'--api-key-file {file}: it must hold one key and nothing else')
    return key


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
