"""The header fields of MCP over HTTP: content negotiation, and the headers that must match the body.

Since revision 2026-07-28 some headers repeat values of the body, so that proxies can route by them. A server must
refuse a request whose headers and body disagree (basic/transports/streamable-http, Server Validation). Used by
`streamable_http`.
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
    INTERNAL_ERROR,
    INVALID_REQUEST,
    META_PREFIX,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    UNSUPPORTED_VERSION,
    Fault,
)

JSON: Final = 'application/json'
EVENTS: Final = 'text/event-stream'
_BASE64: Final = re.compile(r'=\?base64\?(.*)\?=', re.S)
_NUMBER: Final = re.compile(r'-?[0-9]{1,17}(?:\.0+)?')
_NAME_PARAMS: Final = {'tools/call': 'name', 'prompts/get': 'name', 'resources/read': 'uri'}  # repeated in Mcp-Name
_ALWAYS_400: Final = frozenset({PARSE_ERROR, INVALID_REQUEST, HEADER_MISMATCH, UNSUPPORTED_VERSION})


def status_of(reply: Json, is_modern: bool) -> int:
    """The HTTP status for a reply.

    Legacy clients do not read the body of an HTTP error, so most of their error replies are sent with status 200.
    """
    code = reply['error']['code'] if 'error' in reply else None
    if code in _ALWAYS_400:
        return 400
    if not is_modern or code in (None, INTERNAL_ERROR):
        return 200
    return 404 if code == METHOD_NOT_FOUND else 400


def accepts(request: Request, kind: str) -> bool:
    """Whether the Accept field allows a media type. Without the field, every type is allowed (RFC 9110)."""
    accept = request.field(b'accept')
    if not accept:
        return True
    main = kind.partition('/')[0]
    for entry in accept.lower().split(','):
        name, *parameters = (part.strip() for part in entry.split(';'))
        if name in (kind, f'{main}/*', '*/*') and not any(re.fullmatch(r'q=0(\.0*)?', p) for p in parameters):
            return True
    return False


def check_accept(request: Request, kind: str) -> None:
    """Raises Fault (HTTP status 406) if the Accept field excludes `kind`, the media type of the answer."""
    if not accepts(request, kind):
        raise Fault(INVALID_REQUEST, f'the answer is {kind}, but the Accept header does not allow it', status=406)


def check_type(request: Request) -> None:
    """Raises Fault (HTTP status 415) if the body is not declared as JSON."""
    sent = request.field(b'content-type')
    if sent.partition(';')[0].strip().lower() != JSON:
        raise Fault(INVALID_REQUEST, f'the body must be {JSON}; Content-Type is {sent[:60] or "none"}', status=415)


def names_version(message: Any) -> bool:
    """Whether the body of a message names its protocol version, as only modern requests do."""
    params = message.get('params') if isinstance(message, dict) else None
    meta = params.get('_meta') if isinstance(params, dict) else None
    return isinstance(meta, dict) and f'{META_PREFIX}protocolVersion' in meta


def check_headers(request: Request, tools: Iterable[Json], method: str, params: Json) -> None:
    """Raises Fault if a header of a modern request does not match the body.

    `tools` are the tools that the caller may call; their schemas say which arguments are repeated in a header.
    """
    _compare(
        'MCP-Protocol-Version', request.field(b'mcp-protocol-version'), params['_meta'][f'{META_PREFIX}protocolVersion']
    )
    _compare('Mcp-Method', request.field(b'mcp-method'), method)
    if method in _NAME_PARAMS:
        _compare('Mcp-Name', _decode('Mcp-Name', request.field(b'mcp-name')), params.get(_NAME_PARAMS[method]))
    if method == 'tools/call':
        tool = next((tool for tool in tools if tool['name'] == params.get('name')), None)
        if tool:
            _check_parameters(request, tool['inputSchema'].get('properties', {}), params.get('arguments'))


def _check_parameters(request: Request, properties: Json, arguments: Any) -> None:
    """Checks the Mcp-Param-… headers that a tool's schema asks for with `x-mcp-header`."""
    for name, schema in properties.items():
        if not isinstance(schema, dict) or 'x-mcp-header' not in schema:
            continue
        header = f'Mcp-Param-{schema["x-mcp-header"]}'
        sent = request.fields.get(header.lower().encode())
        value = arguments.get(name) if isinstance(arguments, dict) else None
        if value is not None or sent is not None:
            _compare(header, _decode(header, (sent or b'').decode('latin-1')), _as_header(value))


def _as_header(value: Any) -> str:
    """The text of an argument in its header; '' for null."""
    if value is None:
        return ''
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decode(header: str, sent: str) -> str:
    """The value of a header; `=?base64?…?=` is decoded. Raises Fault."""
    match = _BASE64.fullmatch(sent)
    if not match:
        return sent
    try:
        return base64.b64decode(match[1], validate=True).decode()
    except (binascii.Error, ValueError):
        raise Fault(HEADER_MISMATCH, f'the header {header} is {sent[:100]!r}, which is not UTF-8 in Base64') from None


def _compare(header: str, sent: str, expected: Any) -> None:
    """Raises Fault if a header differs from the body. A whole number may be written in two ways: 7 and 7.0."""
    if sent == expected:
        return
    are_numbers = _NUMBER.fullmatch(sent) and _NUMBER.fullmatch(str(expected))
    if are_numbers and float(sent) == float(expected):
        return
    if not sent:
        raise Fault(HEADER_MISMATCH, f'the header {header} is missing; it must be {str(expected)[:100]!r}')
    raise Fault(HEADER_MISMATCH, f'the header {header} is {sent[:100]!r}, but the body says {str(expected)[:100]!r}')
