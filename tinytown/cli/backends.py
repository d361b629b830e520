"""The two ways by which `tt` reaches a town: `Local` dispatches in this process, `Remote` calls a townhall over REST.

Both run an operation of the table with its arguments. Both can follow events and logs without end: they reconnect
after every failure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol
from urllib.parse import quote, urlencode, urlsplit

from ..core.agent_logs import open_log
from ..core.dispatch import call, encode_answer
from ..core.operations import BY_NAME, Op
from ..core.town import Call, Town
from ..errors import TownError, Unavailable, UsageError
from ..model import Json, Principal

if TYPE_CHECKING:
    from http.client import HTTPConnection  # slow to import, so functions import it when they need it

ANSWER_TIMEOUT: Final = 60.0  # seconds to wait for an answer of a townhall
_SILENCE: Final = 45.0  # seconds without a heartbeat after which a stream counts as broken
_PAUSE: Final = 1.0  # seconds before a broken stream is opened again
_POLL: Final = 0.25  # seconds between two reads of a log
_BLOCK_MS: Final = 10_000  # how long one command to Redis waits for an event

Warn = Callable[[str], None]  # called with a message on each passing failure


class Backend(Protocol):
    """A town as `tt` uses it."""

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        """Calls an operation, and returns its answer. Raises TownError."""
        ...

    def events(self, arguments: dict[str, Any], warn: Warn, /) -> Iterator[Json]:
        """Yields events as they happen. `arguments` are those of events.list.

        Where older events are no longer kept, it yields an event of type gap. Raises TownError if the first call fails.
        """
        ...

    def log(self, arguments: dict[str, Any], warn: Warn, /) -> Iterator[Json]:
        """Yields an agent's log as it grows, in pages (`core.agent_logs.LogPage`). `arguments` are those of agent.logs.

        Raises TownError if the first call fails.
        """
        ...


class Local:
    """Calls operations in this process, as the principal `by`."""

    def __init__(self, town: Town, by: Principal) -> None:
        self.town = town
        self.by = by

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        answer = self.town.store.run(call(self.town, self.by, op, arguments))
        decoded: dict[str, Any] = json.loads(encode_answer(answer))
        return decoded

    def events(self, arguments: dict[str, Any], warn: Warn, /) -> Iterator[Json]:
        store, has_begun = self.town.store, False
        while True:
            try:
                page = self.run(BY_NAME['events.list'], arguments)
                has_begun, arguments = True, arguments | {'after': page['next_after']}
                if page.get('gap'):
                    yield {'type': 'gap'}
                yield from page['events']
                if not page.get('more'):
                    store.call(store.next_event(page['next_after'], _BLOCK_MS))
            except Unavailable as e:
                if not has_begun:
                    raise
                warn(e.detail)
                time.sleep(_PAUSE)

    def log(self, arguments: dict[str, Any], _warn: Warn, /) -> Iterator[Json]:
        page = self.run(BY_NAME['agent.logs'], arguments)
        reader = self.town.store.run(open_log(Call(self.town, self.by), arguments['agent']))
        while True:
            if page['text'] or page.get('truncated'):
                yield page
            if page['next_offset'] == page['size']:
                time.sleep(_POLL)
            page = dict(reader.page(page['next_offset']))


class Remote:
    """Calls operations of the townhall at a URL, with the API key in `key_file` if that is given.

    The constructor raises UsageError for an invalid URL or key.
    """

    def __init__(self, url: str, key_file: str | None) -> None:
        self._url = url.rstrip('/')
        self._host, self._port, self._path, self._secure = parse_url(url)
        self._headers = {'Accept': 'application/json'}
        if key_file:
            self._headers['Authorization'] = f'Bearer {_read_key(Path(key_file))}'

    def run(self, op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
        import http.client

        connection = self._connection(ANSWER_TIMEOUT)
        path, body = _request(op, arguments)
        headers = self._headers | ({'Content-Type': 'application/json'} if body else {})
        try:
            connection.request(op.method, self._path + path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as e:
            raise Unavailable(f"{self._url} can't be reached: {e or type(e).__name__}") from None
        finally:
            connection.close()
        return self._answer(op, status, text)

    def _connection(self, timeout: float) -> HTTPConnection:
        import http.client

        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return make(self._host, self._port, timeout=timeout)

    def events(self, arguments: dict[str, Any], warn: Warn, /) -> Iterator[Json]:
        for sent in self._follow(BY_NAME['events.list'], arguments, warn):
            yield json.loads(sent.data)

    def log(self, arguments: dict[str, Any], warn: Warn, /) -> Iterator[Json]:
        missing: dict[str, Any] = {}  # {'gap': True} or {'truncated': True}, for the next page
        for sent in self._follow(BY_NAME['agent.logs'], arguments, warn):
            if sent.type == 'log':
                yield json.loads(sent.data) | missing
            missing = {sent.type: True} if sent.type != 'log' else {}

    def _follow(self, op: Op, arguments: dict[str, Any], warn: Warn) -> Iterator[SentEvent]:
        """The events of a stream. When the stream breaks, it is opened again after the last event."""
        last, has_begun = '', False
        while True:
            try:
                for sent in self._stream(op, arguments, last):
                    last, has_begun = sent.id, True
                    if sent.data:
                        yield sent
                warn(f'{self._url} ended the stream')
            except Unavailable as e:
                if not has_begun:
                    raise
                warn(e.detail)
            time.sleep(_PAUSE)

    def _stream(self, op: Op, arguments: dict[str, Any], last: str) -> Iterator[SentEvent]:
        """The events of one stream after the id `last`, until it ends.

        Raises Unavailable if a later try may succeed, else TownError.
        """
        import http.client

        path, _ = _request(op, arguments)
        headers = self._headers | {'Accept': 'text/event-stream'} | ({'Last-Event-ID': last} if last else {})
        with closing(self._connection(_SILENCE)) as connection:
            try:
                connection.request('GET', self._path + path, None, headers)
                response = connection.getresponse()
                if response.status in (429, 503):
                    raise Unavailable(f'{self._url} answered {response.status}')
                if response.getheader('Content-Type') != 'text/event-stream':
                    self._answer(op, response.status, response.read())
                    raise TownError(f'{self._url} does not stream; is it a townhall?')
                yield from sent_events(iter(response.readline, b''), last)
            except (OSError, http.client.HTTPException) as e:
                raise Unavailable(f"{self._url} can't be reached: {e or type(e).__name__}") from None

    def _answer(self, op: Op, status: int, text: bytes) -> dict[str, Any]:
        """The answer in a response. Raises TownError for a problem document, and for anything unexpected."""
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and status == 401:
            raise TownError(
                f'{answer.get("detail")}; give a key that is valid there:  --api-key-file F', code='unauthorized'
            )
        if isinstance(answer, dict) and status >= 400:
            detail = str(answer.get('detail', f'{self._url} answered {status}'))
            raise TownError(detail, code=str(answer.get('code', '')))
        if not isinstance(answer, dict) or not answer.keys() >= set(op.output.get('required', ())):
            raise TownError(f'{self._url} answered {status}, but not as a townhall does; is it one?')
        return answer


class SentEvent(NamedTuple):
    """A server-sent event. Without data it only tells the id that the stream has reached."""

    type: str
    id: str
    data: str


def sent_events(lines: Iterable[bytes], last: str) -> Iterator[SentEvent]:
    """Parses the lines of an event stream (HTML standard, 9.2.6). `last` is the id of the event before."""
    kind, data = '', []
    for line in lines:
        name, _, value = line.decode('utf-8', 'replace').rstrip('\r\n').partition(':')
        value = value.removeprefix(' ')
        if name == 'id':
            last = value
        elif name == 'event':
            kind = value
        elif name == 'data':
            data.append(value)
        elif not name and not value and not line.startswith(b':'):
            yield SentEvent(kind or 'message', last, '\n'.join(data))
            kind, data = '', []


def parse_url(url: str) -> tuple[str, int, str, bool]:
    """Splits a base URL into host, port, path, and whether it is https. Raises UsageError."""
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
    """The API key in a file. Raises UsageError."""
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
    query = {name: _in_query(value) for name, value in rest.items()}
    return path + (f'?{urlencode(query)}' if query else ''), None


def _in_query(value: Any) -> str:
    """The text of a value in a query string."""
    if isinstance(value, list):
        return ','.join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
