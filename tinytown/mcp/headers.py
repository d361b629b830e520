"""The headers of MCP over HTTP: what a request accepts and sends, and what a modern one must say twice.

Since 2026-07-28 the headers repeat what stands in the body, so that what is between can route by them; who reads the
body must refuse a request whose headers say something else (basic/transports/streamable-http, Server Validation).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any, Final

from ..http.http1 import Request
from ..model import Json
from .jsonrpc import (
    HEADER_MISMATCH,
    INTERNAL,
    INVALID_REQUEST,
    META_PREFIX,
    NO_METHOD,
    PARSE_ERROR,
    UNSUPPORTED_VERSION,
    Fault,
)

JSON: Final = 'application/json'
EVENTS: Final = 'text/event-stream'
_BASE64: Final = re.compile(r'=\?base64\?(.*)\?=', re.S)
_NUMBER: Final = re.compile(r'-?[0-9]{1,17}(?:\.0+)?')
_NAMED: Final = {'tools/call': 'name', 'prompts/get': 'name', 'resources/read': 'uri'}
_ALWAYS_400: Final = frozenset({PARSE_ERROR, INVALID_REQUEST, HEADER_MISMATCH, UNSUPPORTED_VERSION})


def status_of(reply: Json, is_modern: bool) -> int:
    """The status that a reply has over HTTP. Legacy clients read no error from a body whose status is one."""
    code = reply['error']['code'] if 'error' in reply else None
    if code in _ALWAYS_400:
        return 400
    if not is_modern or code in (None, INTERNAL):
        return 200
    return 404 if code == NO_METHOD else 400


def accepts(request: Request, kind: str) -> bool:
    """Whether Accept allows a media type. Without one, everything is allowed."""
    accept = request.field(b'accept')
    if not accept:
        return True
    main = kind.partition('/')[0]
    for each in accept.lower().split(','):
        name, *parameters = (part.strip() for part in each.split(';'))
        if name in (kind, f'{main}/*', '*/*') and not any(re.fullmatch(r'q=0(\.0*)?', p) for p in parameters):
            return True
    return False


def check_accept(request: Request, kind: str) -> None:
    """Raises Fault where the answer, of that media type, is not wanted."""
    if not accepts(request, kind):
        raise Fault(INVALID_REQUEST, f'the answer is {kind}, which Accept does not allow', status=406)


def check_type(request: Request) -> None:
    """Raises Fault for a body of another media type than JSON."""
    sent = request.field(b'content-type')
    if sent.partition(';')[0].strip().lower() != JSON:
        raise Fault(INVALID_REQUEST, f'the body must be {JSON}; Content-Type is {sent[:60] or "none"}', status=415)


def says_its_version(message: Any) -> bool:
    """Whether a message has the metadata of a modern request."""
    params = message.get('params') if isinstance(message, dict) else None
    meta = params.get('_meta') if isinstance(params, dict) else None
    return isinstance(meta, dict) and f'{META_PREFIX}protocolVersion' in meta


def check_headers(request: Request, tools: Iterable[Json], method: str, params: Json) -> None:
    """Whether the headers of a modern request say what its body says. `tools` are those that the caller may call."""
    _compare(
        'MCP-Protocol-Version', request.field(b'mcp-protocol-version'), params['_meta'][f'{META_PREFIX}protocolVersion']
    )
    _compare('Mcp-Method', request.field(b'mcp-method'), method)
    if method in _NAMED:
        _compare('Mcp-Name', _plain('Mcp-Name', request.field(b'mcp-name')), params.get(_NAMED[method]))
    if method == 'tools/call':
        tool = next((each for each in tools if each['name'] == params.get('name')), None)
        if tool:
            _check_parameters(request, tool['inputSchema'].get('properties', {}), params.get('arguments'))


def _check_parameters(request: Request, properties: Json, arguments: Any) -> None:
    """Mcp-Param-… headers, where a tool's schema asks for them."""
    for name, schema in properties.items():
        if not isinstance(schema, dict) or 'x-mcp-header' not in schema:
            continue
        header = f'Mcp-Param-{schema["x-mcp-header"]}'
        sent = request.fields.get(header.lower().encode())
        value = arguments.get(name) if isinstance(arguments, dict) else None
        if value is not None or sent is not None:
            _compare(header, _plain(header, (sent or b'').decode('latin-1')), _as_header(value))


def _as_header(value: Any) -> str:
    """An argument as its header has it; '' where there is none."""
    if value is None:
        return ''
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(header: str, sent: str) -> str:
    """A header's value, decoded if it is wrapped as Base64. Raises Fault."""
    match = _BASE64.fullmatch(sent)
    if not match:
        return sent
    try:
        return base64.b64decode(match[1], validate=True).decode()
    except (binascii.Error, ValueError):
        raise Fault(HEADER_MISMATCH, f'the header {header} is no Base64 of UTF-8') from None


def _compare(header: str, sent: str, expected: Any) -> None:
    """Raises Fault where a header does not say what the body says; whole numbers may be written in two ways."""
    if sent == expected:
        return
    are_numbers = _NUMBER.fullmatch(sent) and _NUMBER.fullmatch(str(expected))
    if are_numbers and float(sent) == float(expected):
        return
    if not sent:
        raise Fault(HEADER_MISMATCH, f'the header {header} is missing; it must say {str(expected)[:100]!r}')
    raise Fault(HEADER_MISMATCH, f'the header {header} is {sent[:100]!r}, but the body says {str(expected)[:100]!r}')
