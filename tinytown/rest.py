"""REST: the operations table over HTTP, and the few plain routes beside it (health, readiness, metrics)."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, Final
from urllib.parse import parse_qsl

from .connection import Answer
from .errors import BadRequest, Invalid, TownError, UnsupportedMediaType
from .http1 import Request, Response
from .model import ALL_SCOPES, READ, Principal
from .operations import TABLE, Op, call, encode
from .router import Router
from .schema import Parameter
from .store import Command
from .town import Town

MOST_DEPTH: Final = 32
_IDEMPOTENCY_KEY: Final = re.compile(r'[\x21-\x7e]{1,255}')

Plain = Callable[[Request], Answer]


class Rest:
    """The application that `web.Server` serves for a town."""

    def __init__(self, town: Town, durability: str = 'unknown') -> None:
        self.town = town
        self._durability = durability
        self._began = time.monotonic()
        self._local = Principal('local', frozenset({READ}) if town.config.townhall.read_only else ALL_SCOPES)
        self._router: Router[Op | Plain] = Router()
        for op in TABLE:
            for method in (op.method, op.also):
                if method:
                    self._router.add(method, op.path, op)
        for path, plain in self._plain().items():
            self._router.add('GET', path, plain)

    def _plain(self) -> dict[str, Plain]:
        return {
            '/health': self._health,
            '/healthz': self._health,
            '/ready': self._ready,
            '/readyz': self._ready,
            '/metrics': self._metrics,
        }

    # -------------------------------------------------------------------------------------- what the server asks

    def begin(self, request: Request) -> None:
        """Finds the route, and who calls. Raises NotFound, MethodNotAllowed."""
        if request.method == 'OPTIONS':
            request.target = Response(204, headers=(('Allow', self._router.allow(request.path)),))
            return
        request.target, request.values = self._router.match(request.method, request.path)
        request.caller = self._local.name

    def is_slow(self, request: Request) -> bool:
        return isinstance(request.target, Op) and request.target.slow

    def handle(self, request: Request) -> Answer:
        target = request.target
        if isinstance(target, Op):
            return self._operate(request, target)
        return target if isinstance(target, Response) else target(request)

    # ------------------------------------------------------------------------------------------------- operations

    def _operate(self, request: Request, op: Op) -> Generator[Command, Any, Response]:
        key = request.field(b'idempotency-key')
        if b'idempotency-key' in request.fields and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise BadRequest('Idempotency-Key must be 1 to 255 printable ASCII characters without spaces')
        arguments = read_arguments(request, op)
        answer = yield from call(self.town, self._local, op, arguments, key)
        return Response(op.status, encode(answer))

    # -------------------------------------------------------------------------------------------------- plain routes

    def _health(self, _request: Request) -> Response:
        return Response(200, b'{"status":"ok","uptime_secs":%d}' % (time.monotonic() - self._began))

    def _ready(self, _request: Request) -> Generator[Command, Any, Response]:
        found: dict[str, Any] = {'status': 'ready', 'redis': 'connected'}
        began = time.monotonic()
        try:
            yield self.town.store.ping()
        except TownError as e:
            found = {'status': 'not_ready', 'redis': 'disconnected', 'dispatcher': 'unknown', 'detail': e.detail}
        else:
            found |= {'redis_latency_ms': round((time.monotonic() - began) * 1000, 3), 'dispatcher': 'idle'}
        found |= {'town': self.town.name, 'durability': self._durability}
        return _readiness(found['status'] == 'ready', encode(found))

    def _metrics(self, _request: Request) -> Generator[Command, Any, Response]:
        try:
            yield self.town.store.ping()
            ready = 1
        except TownError:
            ready = 0
        text = (
            '# HELP tinytown_up Whether this process serves.\n# TYPE tinytown_up gauge\ntinytown_up 1\n'
            '# HELP tinytown_ready Whether Redis answers.\n# TYPE tinytown_ready gauge\n'
            f'tinytown_ready {ready}\n'
        )
        return _readiness(bool(ready), text.encode(), 'text/plain; version=0.0.4; charset=utf-8')


def _readiness(ready: bool, body: bytes, content_type: str = 'application/json') -> Response:
    return Response(200, body, content_type) if ready else Response(503, body, content_type, (('Retry-After', '1'),))


# --------------------------------------------------------------------------------------------------------- arguments


def read_arguments(request: Request, op: Op) -> dict[str, Any]:
    """The arguments of an operation from path, query and body; the door validates them.

    Raises BadRequest, UnsupportedMediaType, Invalid.
    """
    arguments: dict[str, Any] = {}
    if request.method == 'POST':
        if request.query:
            raise Invalid('POST takes its arguments in the body, not in the query', code='query-not-taken')
        arguments = read_body(request)
    else:
        if request.body:
            raise BadRequest(f'{request.method} takes its arguments in the query; send no body', code='body-not-taken')
        arguments = read_query(request.query, op.parameters)
    for name, value in request.values.items():
        if name in arguments:
            pointer = {'pointer': f'/{name}', 'detail': 'stands in the path already'}
            raise Invalid(f'/{name}: stands in the path already', errors=[pointer])
        arguments[name] = value
    return arguments


def read_query(query: str, parameters: dict[str, Parameter]) -> dict[str, Any]:
    """The arguments in a query string. Each name may stand once."""
    if not query:
        return {}
    arguments: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors='strict', max_num_fields=64)
    except (ValueError, UnicodeDecodeError):
        raise BadRequest('the query is not UTF-8, or has over 64 fields') from None
    for name, text in pairs:
        if name in arguments:
            raise BadRequest(f'{name[:60]!r} stands in the query twice')
        arguments[name] = parameters[name].read(text) if name in parameters else text
    return arguments


def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a body; an empty body is an empty one."""
    if not request.body:
        return {}
    kind, _, parameters = request.field(b'content-type').partition(';')
    charset = parameters.strip().lower().replace('"', '')
    if kind.strip().lower() != 'application/json' or charset not in ('', 'charset=utf-8'):
        sent = request.field(b'content-type')[:60] or 'none'
        raise UnsupportedMediaType(f'the body must be application/json in UTF-8; Content-Type is {sent}')
    value = parse_json(request.body)
    if not isinstance(value, dict):
        raise Invalid('the body must be a JSON object', errors=[{'pointer': '', 'detail': 'must be an object'}])
    return value


def parse_json(data: bytes) -> Any:
    """A JSON text, strictly: UTF-8 without BOM, no duplicate names, lone surrogates, NaN or infinities, depth bounded.

    Raises BadRequest.
    """
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise BadRequest(f'the body is not UTF-8 (byte {e.start})', code='malformed-json') from None
    if text.startswith('\ufeff'):
        raise BadRequest('the body starts with a byte order mark', code='malformed-json')
    if _depth(text) > MOST_DEPTH:
        raise BadRequest(f'the body is nested more than {MOST_DEPTH} deep', code='malformed-json')
    try:
        value = _decoder.decode(text)
        if '\\u' in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise BadRequest('the body holds half of a surrogate pair', code='malformed-json') from None
    except json.JSONDecodeError as e:
        raise BadRequest(
            f'the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})', code='malformed-json'
        ) from None
    except ValueError as e:
        raise BadRequest(f'the body is not JSON that can be taken: {e}', code='malformed-json') from None


_BRACKETS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.S)


def _depth(text: str) -> int:
    """How deep brackets nest outside of strings; counted before parsing, which would recurse."""
    if text.count('[') + text.count('{') <= MOST_DEPTH:
        return 0
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        token = match.group()
        if token in '[{':
            depth += 1
            deepest = max(deepest, depth)
        elif token in ']}':
            depth -= 1
    return deepest


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'{twice[:60]!r} stands twice in an object')
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip('-')) > 20:
        raise ValueError(f'{digits[:20]}… has too many digits')
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if number in (float('inf'), float('-inf')):
        raise ValueError(f'{digits[:40]} is out of range')
    return number


def _constant(name: str) -> None:
    raise ValueError(f'{name} is not JSON')


_decoder: Final = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
