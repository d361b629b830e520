"""HTTP/1.1 syntax (RFC 9110, 9112): parses heads of requests, renders responses, and errors as problem documents.

Parsing is strict wherever a lenient parser and a proxy could read the same bytes differently (request smuggling). A
malformed request is refused with a TownError of the right status, and `connection`, which uses this module, closes the
connection. Start with `parse_head` and `render_response`.
"""

from __future__ import annotations

import ipaddress
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from ..errors import (
    BadRequest,
    Forbidden,
    HeadTooLarge,
    LengthRequired,
    Misdirected,
    NotImplemented501,
    TooLarge,
    TownError,
    UriTooLong,
    VersionNotSupported,
)

MAX_LINE: Final = 8192  # bytes of a request line or field line
MAX_HEAD: Final = 16384  # bytes
MAX_FIELDS: Final = 64

# ---------------------------------------------------------------------------------------------- requests and answers


@dataclass(frozen=True, slots=True)
class Peer:
    """What a connection itself tells about its client.

    `address` is '' on a unix socket. `uid` is the client's user on this machine, None if unknown. `subject` is the name
    in a verified client certificate, '' without one.
    """

    address: str = ''
    uid: int | None = None
    subject: str = ''
    is_tls: bool = False


@dataclass(slots=True)
class Request:
    """One request. The names in `fields` are lower-case; `target` is the target of the matching route."""

    method: str
    path: str
    query: str
    minor: int  # of HTTP/1.x
    fields: Mapping[bytes, bytes]
    body: bytes = b''
    id: str = ''
    target: Any = None
    operation: str = ''  # the name under which metrics count it
    values: Mapping[str, str] = field(default_factory=dict)  # of the path's placeholders
    peer: Peer = Peer()
    caller: str = ''  # name of the principal, for the logs
    cors: str = ''  # an allowed foreign origin, whose pages may read the answer
    by: Any = None  # the Principal, or a Claim that is still to be verified
    reauthenticate: Callable[[Any], None] | None = None  # checks the credential again for an open stream
    began: float = 0.0  # monotonic seconds, as is `deadline`
    answered: bool = False
    deadline: float = 0.0  # of the operation; 0.0: none

    def field(self, name: bytes) -> str:
        """A header field as text; '' if it was not sent."""
        return self.fields.get(name, b'').decode('latin-1')

    @property
    def keeps_alive(self) -> bool:
        connection = self.fields.get(b'connection')
        if connection is None:
            return self.minor == 1
        options = {option.strip(b' \t') for option in connection.lower().split(b',')}
        return b'close' not in options and (self.minor == 1 or b'keep-alive' in options)


@dataclass(slots=True)
class Response:
    """One answer. `render_response` checks header names and values.

    A stream has a `stream` function, which is called with its `replies.Stream` once the head is sent. While the stream
    is silent, `heartbeat` is sent every 15 s; `farewell` is sent when the server stops.
    """

    status: int = 200
    body: bytes = b''
    content_type: str = 'application/json'
    headers: tuple[tuple[str, str], ...] = ()
    stream: Callable[[Any], None] | None = None
    heartbeat: bytes = b''
    farewell: bytes = b''


def problem(error: TownError, request_id: str) -> Response:
    """An error as a problem document (RFC 9457)."""
    headers = []
    if error.retry_after is not None or error.status in (429, 503):
        headers.append(('Retry-After', str(error.retry_after or 1)))
    if error.allow:
        headers.append(('Allow', error.allow))
    if error.challenge:
        headers.append(('WWW-Authenticate', error.challenge))
    body = json.dumps(error.problem(request_id), ensure_ascii=False).encode('utf-8', 'replace')
    return Response(error.status, body, 'application/problem+json', tuple(headers))


_STATUS_LINES: Final = {status.value: f'HTTP/1.1 {status.value} {status.phrase}\r\n'.encode() for status in HTTPStatus}
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE: Final = re.compile(r'[\t\x20-\x7e]*')
_date: tuple[int, bytes] = (0, b'')


def _date_field() -> bytes:
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, f'Date: {formatdate(now, usegmt=True)}\r\n'.encode())
    return _date[1]


def render_response(response: Response, request: Request, close: bool) -> bytes:
    """The bytes of an answer to a request. Raises ValueError for a header that could inject further lines."""
    parts = [
        b'%b%bX-Request-ID: %b\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n'
        % (_STATUS_LINES[response.status], _date_field(), request.id.encode())
    ]
    if response.status not in (202, 204) or response.body:
        parts.append(b'Content-Type: %b\r\n' % response.content_type.encode())
    if response.stream:
        parts.append(b'Transfer-Encoding: chunked\r\n' if request.minor else b'')
    elif response.status != 204:
        parts.append(b'Content-Length: %d\r\n' % len(response.body))
    if request.cors:
        parts.append(b'Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n' % request.cors.encode())
        parts.append(b'Access-Control-Expose-Headers: %b\r\n' % _EXPOSED_HEADERS)
    for name, value in response.headers:
        if not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise ValueError(f'{name!r}: {value!r} is not a header field')
        parts.append(f'{name}: {value}\r\n'.encode())
    if close:
        parts.append(b'Connection: close\r\n\r\n')
    else:
        parts.append(b'\r\n' if request.minor else b'Connection: keep-alive\r\n\r\n')
    if request.method != 'HEAD' and response.status != 204:
        parts.append(response.body)
    return b''.join(parts)


# --------------------------------------------------------------------------------------------------------- parsing

_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (/[\x21-\x7e]*) HTTP/1\.([01])")
_OTHER_VERSION: Final = re.compile(rb'\S+ \S+ HTTP/([0-9])\.[0-9]')
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_CONTROL: Final = re.compile(r'[\x00-\x1f\x7f]')
_LENGTH: Final = re.compile(rb'[0-9]{1,15}')
_ONCE: Final = frozenset(
    {b'host', b'content-length', b'content-type', b'transfer-encoding', b'expect', b'origin'}
    | {b'authorization', b'x-api-key', b'idempotency-key', b'x-request-id'}
)


def match_line(line: bytes, first: bool) -> re.Match[bytes]:
    """The parts of a request line (if `first`) or field line, given without its CRLF. Raises TownError."""
    if len(line) > MAX_LINE:
        raise line_too_long(first)
    match = (_REQUEST_LINE if first else _FIELD).fullmatch(line)
    if match:
        return match
    if not first:
        name = line.partition(b':')[0][:40]  # the value may be a secret
        raise BadRequest(f'the line that begins {name!r} is not a header field (name, colon, printable value, CRLF)')
    version = _OTHER_VERSION.fullmatch(line)
    if version and version[1] not in (b'0', b'1'):
        raise VersionNotSupported('this server speaks HTTP/1.1')
    raise BadRequest(f'{line[:60]!r} is not a request line (METHOD /path HTTP/1.1)')


def line_too_long(first: bool) -> TownError:
    """The error for a line of a head that is too long."""
    if first:
        return UriTooLong(f'the request line is over {MAX_LINE} bytes')
    return HeadTooLarge(f'a header field is over {MAX_LINE} bytes')


def parse_head(head: bytes) -> Request:
    """A request from its head, given without the blank line. Raises TownError. Parsed heads are cached."""
    if len(head) > _MAX_CACHED_HEAD or b'session_id=' in head:
        return Request(*_read_head(head))
    parts = _SECRET.split(head)  # the text before the first secret, then name, value and following text of each
    if len(parts) == 1:
        return Request(*_cached_head(head))
    if len(parts) > 4 or head.count(b'\n') > MAX_FIELDS:
        return Request(*_read_head(head))  # several secrets, perhaps with one name; or too many fields
    method, path, query, minor, fields = _cached_head(parts[0] + parts[3])
    return Request(method, path, query, minor, {**fields, parts[1].lower(): parts[2].strip(b' \t')})


_Head = tuple[str, str, str, int, Mapping[bytes, bytes]]  # method, path, query, minor version, fields


def _read_head(head: bytes) -> _Head:
    lines = head.split(b'\r\n')
    match = match_line(lines[0], True)
    if len(lines) - 1 > MAX_FIELDS:
        raise HeadTooLarge(f'the request has more than {MAX_FIELDS} header fields')
    fields: dict[bytes, bytes] = {}
    for line in lines[1:]:
        parts = match_line(line, False)
        name, value = parts[1].lower(), parts[2].strip(b' \t')
        if name in fields:
            if name in _ONCE:
                raise BadRequest(f'the header field {name.decode()} was sent more than once; send it once')
            value = fields[name] + b', ' + value
        fields[name] = value
    path, _, query = match[2].partition(b'?')
    return match[1].decode(), _decode_path(path), query.decode(), int(match[3]), fields


# A client tends to send the same head again and again, so parsed heads are cached. Credentials never enter the cache:
# `parse_head` takes their fields out first, and bypasses the cache if the URL contains a session id (MCP 2024-11-05).
# A malformed credential field does not match here; it stays in the head, which is then refused and not cached.
_SECRET: Final = re.compile(
    rb'\r\n((?i:authorization|x-api-key|mcp-session-id|cookie)):([\t\x20-\x7e\x80-\xff]*)(?=\r\n|\Z)'
)
_MAX_CACHED_HEAD: Final = 1024  # bytes
_cached_head: Final = lru_cache(maxsize=128)(_read_head)


def _decode_path(raw: bytes) -> str:
    """The percent-decoded path. Raises BadRequest if a proxy could read the path differently."""
    decoded = raw
    if b'%' in raw:
        if re.search(rb'%(?![0-9A-Fa-f]{2})|%00|%2[fF]', raw):
            raise BadRequest('the path contains an invalid escape, %00 or %2F')
        decoded = unquote_to_bytes(raw)
    if b'//' in decoded or b'\\' in decoded or b'/./' in decoded + b'/' or b'/../' in decoded + b'/':
        raise BadRequest('the path contains an empty segment, a dot segment or a backslash')
    try:
        path = decoded.decode()
    except UnicodeDecodeError:
        raise BadRequest('the path is not UTF-8') from None
    if decoded is not raw and _CONTROL.search(path):  # without escapes, _REQUEST_LINE has excluded them
        raise BadRequest('the path contains a control character')
    return path


def body_length(request: Request, max_bytes: int) -> int:
    """The number of bytes of body that follow the head. Raises TownError if it is ambiguous or over `max_bytes`."""
    length = request.fields.get(b'content-length')
    coding = request.fields.get(b'transfer-encoding')
    if coding is not None:
        if length is not None:
            raise BadRequest('send Content-Length or Transfer-Encoding, not both')
        if coding.lower() == b'chunked':
            raise LengthRequired('send the body with a Content-Length; Transfer-Encoding: chunked is not supported')
        raise NotImplemented501(f'the transfer coding {coding[:40]!r} is not supported; send a Content-Length')
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise BadRequest(f'Content-Length {length[:40]!r} is not a number of bytes')
    if int(length) > max_bytes:
        raise TooLarge(f'the body has {int(length)} bytes; at most {max_bytes} are allowed')
    return int(length)


def check_host(request: Request, allowed: frozenset[str], origins: frozenset[str] = frozenset()) -> None:
    """Refuses a Host that is not an IP address, localhost or one of `allowed`, and an Origin of another site.

    The check of Host prevents DNS rebinding, which needs a name. Pages of `origins` may call us from elsewhere and read
    the answers (CORS; Fetch standard, 3.2). Raises BadRequest, Misdirected, Forbidden.
    """
    host = request.field(b'host')
    if b'host' not in request.fields:
        if request.minor:
            raise BadRequest('the header field Host is missing; HTTP/1.1 requires it')
    elif not _is_allowed_host(host, allowed):
        raise Misdirected(f'{host[:100]!r} is not a name of this server; add it to townhall.allowed_hosts')
    origin = request.field(b'origin')
    if b'origin' in request.fields and origin not in (f'http://{host}', f'https://{host}'):
        if origin not in origins:
            detail = f'the origin {origin[:100]!r} is not allowed; add it to townhall.cors.allowed_origins'
            raise Forbidden(detail, code='foreign-origin')
        request.cors = origin


def options(request: Request, allow: str) -> Response:
    """The answer to OPTIONS for a path with the methods `allow`. A CORS preflight also gets the CORS headers."""
    headers = [('Allow', allow)]
    if request.cors and b'access-control-request-method' in request.fields:
        headers.append(('Access-Control-Allow-Methods', allow))
        headers.append(('Access-Control-Allow-Headers', _ALLOWED_HEADERS))
        headers.append(('Access-Control-Max-Age', '600'))
    return Response(204, headers=tuple(headers))


# Header fields that pages of other origins may send, or read, beyond those that CORS always allows.
_ALLOWED_HEADERS: Final = (
    'Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key, X-Request-ID, '
    'MCP-Protocol-Version, MCP-Session-Id, Mcp-Method, Mcp-Name'
)
_EXPOSED_HEADERS: Final = b'X-Request-ID, Retry-After, Allow, WWW-Authenticate, MCP-Session-Id'


_HOST: Final = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?')
_known_hosts: dict[tuple[str, frozenset[str]], bool] = {}


def _is_allowed_host(host: str, allowed: frozenset[str]) -> bool:
    key = (host, allowed)
    if key not in _known_hosts:
        if len(_known_hosts) > 1024:
            _known_hosts.clear()
        _known_hosts[key] = _check_host_value(host, allowed)
    return _known_hosts[key]


def _check_host_value(host: str, allowed: frozenset[str]) -> bool:
    match = _HOST.fullmatch(host)
    if not match:
        raise BadRequest(f'Host {host[:100]!r} is not HOST or HOST:PORT')
    name = match[1].lower().rstrip('.')
    if name == 'localhost' or name in allowed:
        return True
    try:
        ipaddress.ip_address(name.strip('[]'))
    except ValueError:
        return False
    return True
