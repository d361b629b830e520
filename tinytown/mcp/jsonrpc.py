"""The messages of MCP: JSON-RPC 2.0, one JSON object each; the codes of errors; the revisions that are spoken here."""

from __future__ import annotations

import json
from typing import Any, Final

from ..model import Json

MODERN: Final = '2026-07-28'
LEGACY: Final = ('2025-11-25', '2025-06-18', '2025-03-26', '2024-11-05')
BATCHING: Final = '2025-03-26'  # the one revision with arrays of messages; and what a client without a header speaks
META_PREFIX: Final = 'io.modelcontextprotocol/'

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
NO_METHOD: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL: Final = -32603
NO_RESOURCE: Final = -32002  # legacy; INVALID_PARAMS since
HEADER_MISMATCH: Final = -32020
MISSING_CAPABILITY: Final = -32021
UNSUPPORTED_VERSION: Final = -32022

Id = str | int


class Fault(Exception):
    """A protocol error. `id` is that of the request, where it could be read; `status` of HTTP, if not the code's."""

    def __init__(self, code: int, message: str, data: Any = None, id: Id | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data
        self.id = id
        self.status = status


def error_reply(fault: Fault) -> Json:
    """A fault as a message."""
    error: Json = {'code': fault.code, 'message': fault.message}
    if fault.data is not None:
        error['data'] = fault.data
    return {'jsonrpc': '2.0', **({} if fault.id is None else {'id': fault.id}), 'error': error}


def encode_message(message: Any) -> bytes:
    """A message as it is sent: one line of UTF-8."""
    return json.dumps(message, ensure_ascii=False, separators=(',', ':')).encode('utf-8', 'replace')


def decode(data: bytes) -> Any:
    """A message as it was sent. Raises Fault."""
    try:
        return json.loads(data.decode('utf-8'), parse_constant=_refuse_constant)
    except RecursionError:
        raise Fault(PARSE_ERROR, 'this is nested too deep') from None
    except ValueError as e:
        raise Fault(PARSE_ERROR, f'this is not JSON in UTF-8: {e}') from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not JSON')


def unsupported(version: str) -> Fault:
    """The error for a revision that is not spoken here."""
    data = {'supported': [MODERN], 'requested': version}
    return Fault(UNSUPPORTED_VERSION, f'MCP {version[:40]!r} is not spoken here; {MODERN} is', data)


def envelope(message: Any) -> tuple[str | None, Json, Id | None]:
    """Method, parameters and id of a JSON-RPC message; the method is None for a response. Raises Fault."""
    if not isinstance(message, dict) or message.get('jsonrpc') != '2.0':
        raise Fault(INVALID_REQUEST, 'a message is an object with "jsonrpc": "2.0"')
    number = message.get('id')
    readable = isinstance(number, (str, int)) and not isinstance(number, bool)
    if 'method' not in message and ('result' in message or 'error' in message):
        return None, {}, None
    method, params = message.get('method'), message.get('params', {})
    if 'id' in message and not readable:
        raise Fault(INVALID_REQUEST, 'id must be a text or a whole number')
    if not isinstance(method, str):
        raise Fault(INVALID_REQUEST, 'method must be a text', id=number)
    if not isinstance(params, dict):
        raise Fault(INVALID_PARAMS, 'params must be an object', id=number)
    return method, params, number


def text_of(params: Json, name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str):
        raise Fault(INVALID_PARAMS, f'{name} must be a text')
    return value


def object_of(params: Json, name: str) -> Json:
    value = params.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Fault(INVALID_PARAMS, f'{name} must be an object')
    return value
