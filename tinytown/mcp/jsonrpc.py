"""The messages of MCP, which are JSON-RPC 2.0 objects: parsing, encoding, error codes, supported protocol revisions."""

from __future__ import annotations

import json
from typing import Any, Final

from ..model import Json

MODERN: Final = '2026-07-28'
LEGACY: Final = ('2025-11-25', '2025-06-18', '2025-03-26', '2024-11-05')
BATCHING: Final = '2025-03-26'  # the only revision with arrays of messages, and the default without a version header
META_PREFIX: Final = 'io.modelcontextprotocol/'

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
RESOURCE_NOT_FOUND: Final = -32002  # legacy revisions only; the modern one answers INVALID_PARAMS
HEADER_MISMATCH: Final = -32020
MISSING_CAPABILITY: Final = -32021
UNSUPPORTED_VERSION: Final = -32022

Id = str | int


class Fault(Exception):
    """A protocol error.

    `id` is the id of the request, None if it could not be read. `status` is the HTTP status, 0 if it follows from the
    code (`headers.status_of`).
    """

    def __init__(self, code: int, message: str, data: Any = None, id: Id | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data
        self.id = id
        self.status = status


def error_reply(fault: Fault) -> Json:
    """The JSON-RPC error response for a fault."""
    error: Json = {'code': fault.code, 'message': fault.message}
    if fault.data is not None:
        error['data'] = fault.data
    return {'jsonrpc': '2.0', **({} if fault.id is None else {'id': fault.id}), 'error': error}


def encode_message(message: Any) -> bytes:
    """Encodes a message as one line of UTF-8, without the line end."""
    return json.dumps(message, ensure_ascii=False, separators=(',', ':')).encode('utf-8', 'replace')


def decode(data: bytes) -> Any:
    """Parses a message. Raises Fault."""
    try:
        return json.loads(data.decode('utf-8'), parse_constant=_refuse_constant)
    except RecursionError:
        raise Fault(PARSE_ERROR, 'the message is nested too deeply') from None
    except ValueError as e:
        raise Fault(PARSE_ERROR, f'the message is not JSON in UTF-8: {e}') from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not JSON')


def unsupported(version: str) -> Fault:
    """The error for a protocol revision that this server does not support."""
    data = {'supported': [MODERN], 'requested': version}
    return Fault(UNSUPPORTED_VERSION, f'MCP {version[:40]!r} is not supported; use {MODERN}', data)


def envelope(message: Any) -> tuple[str | None, Json, Id | None]:
    """Checks the JSON-RPC envelope of a message, and returns (method, params, id).

    The method is None for a response, the id is None for a notification. Raises Fault.
    """
    if not isinstance(message, dict) or message.get('jsonrpc') != '2.0':
        raise Fault(INVALID_REQUEST, 'a message must be an object with "jsonrpc": "2.0"')
    message_id = message.get('id')
    is_valid_id = isinstance(message_id, (str, int)) and not isinstance(message_id, bool)
    if 'method' not in message and ('result' in message or 'error' in message):
        return None, {}, None
    method, params = message.get('method'), message.get('params', {})
    if 'id' in message and not is_valid_id:
        raise Fault(INVALID_REQUEST, 'id must be a string or a whole number')
    if not isinstance(method, str):
        raise Fault(INVALID_REQUEST, 'method must be a string', id=message_id)
    if not isinstance(params, dict):
        raise Fault(INVALID_PARAMS, 'params must be an object', id=message_id)
    return method, params, message_id


def string_param(params: Json, name: str) -> str:
    """A required string parameter. Raises Fault."""
    value = params.get(name)
    if not isinstance(value, str):
        raise Fault(INVALID_PARAMS, f'{name} must be a string')
    return value


def object_param(params: Json, name: str) -> Json:
    """An optional object parameter, {} if it is missing or null. Raises Fault."""
    value = params.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Fault(INVALID_PARAMS, f'{name} must be an object')
    return value
