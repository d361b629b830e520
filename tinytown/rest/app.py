"""The REST application: the table of operations over HTTP, and the few routes beside it.

The HTTP server calls `RestApp.begin` when it has read the head of a request, and `RestApp.handle` when it has read the
body. The functions at the end read the arguments of an operation from path, query and body.
"""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl

from ..auth.access import Access, is_slow
from ..core.dispatch import call, encode_answer
from ..core.operations import OPERATIONS, Op
from ..core.town import Town
from ..errors import BadRequest, Invalid, TownError, UnsupportedMediaType
from ..http.http1 import Peer, Request, Response, options
from ..http.replies import Answer, Slow
from ..http.router import Router
from ..model import Principal
from ..schema import Parameter
from ..state.event_feed import EventFeed
from ..state.store import Command
from .health import ROUTES, HealthRoutes
from .metrics import Meter
from .sse_events import EventStreams
from .sse_logs import LogStreams

MAX_DEPTH: Final = 32  # how deep the JSON of a body may nest
_IDEMPOTENCY_KEY: Final = re.compile(r'[\x21-\x7e]{1,255}')

Plain = Callable[[Request], Answer]


@dataclass(frozen=True, slots=True)
class Guarded:
    """A route that is not an operation. The caller must authenticate, unless `is_open()`.

    `name` stands for the route in metrics and in the audit record of a refusal.
    """

    name: str
    handle: Plain
    is_open: Callable[[], bool] = lambda: False


class RestApp:
    """The application of a `tinytown.http.server.Server`, for one town. An empty `table` leaves out all operations."""

    def __init__(
        self,
        town: Town,
        access: Access,
        durability: str,
        meter: Meter,
        feed: EventFeed,
        table: Collection[Op] = OPERATIONS,
    ) -> None:
        self.town = town
        self.access = access
        self.feed = feed
        self._streams: dict[str, EventStreams | LogStreams] = {
            'events.list': EventStreams(self),
            'agent.logs': LogStreams(self),
        }
        self.probes = HealthRoutes(lambda: self.town, access, durability, meter)
        self._router: Router[Op | Guarded] = Router()
        for op in table:
            for method in (op.method, op.also):
                if method:
                    self._router.add(method, op.path, op)
        for path, name in ROUTES.items():
            if table or name != 'openapi':  # the OpenAPI document describes the table
                handle, is_open = partial(self.probes.handle, name), partial(self.probes.is_open, name)
                self.add('GET', path, Guarded(name, handle, is_open))

    def add(self, method: str, path: str, target: Guarded) -> None:
        """Adds a route."""
        self._router.add(method, path, target)

    # ------------------------------------------------------------------------------------------ called by the server

    def meet(self, sock: socket.socket, address: Any) -> Peer:
        """Identifies the peer of a new connection."""
        return self.access.meet(sock, address)

    def refused(self, request: Request, error: TownError) -> None:
        """Writes an audit record for a request that was refused before its route was known."""
        self.access.refused(request, '', {}, error)

    def begin(self, request: Request) -> None:
        """Finds the route of a request, and admits its caller.

        Raises NotFound, MethodNotAllowed, and what `Access.admit` raises.
        """
        if request.method == 'OPTIONS':
            request.target = options(request, self._router.allow(request.path))
            return
        request.target, request.values = self._router.match(request.method, request.path)
        target = request.target
        request.operation = target.name
        if isinstance(target, Op) or not target.is_open():
            self.access.admit(request, target.name, request.values)

    def handle(self, request: Request) -> Answer:
        """The answer to a request after `begin`. Its steps raise TownError."""
        target = request.target
        if isinstance(target, Op):
            if target.name in self._streams:
                return self._streams[target.name].answer(request, target)
            step = self._operate(request, target)
            if is_slow(request):
                return Slow(step)
            return Slow(step, waits=not target.changes) if target.slow else step
        if isinstance(target, Guarded):
            return target.handle(request)
        response: Response = target
        return response

    # ------------------------------------------------------------------------------------------------- operations

    def _operate(self, request: Request, op: Op) -> Generator[Command, Any, Response]:
        by = request.by
        if not isinstance(by, Principal):
            by = yield from self.access.prove(request, op.name, request.values)
        key = request.field(b'idempotency-key')
        if b'idempotency-key' in request.fields and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise BadRequest('Idempotency-Key must be 1 to 255 printable ASCII characters without spaces')
        answer = yield from call(self.town, by, op, read_arguments(request, op), key, self.access.call_limits(request))
        return Response(op.status, encode_answer(answer))

    def read(self, request: Request, op: Op) -> Generator[Command, Any, dict[str, Any]]:
        """Authenticates the caller, and reads the arguments. Raises TownError."""
        yield from self.access.prove(request, op.name, request.values)
        return read_arguments(request, op)

    def dispatch(self, request: Request, op: Op, arguments: dict[str, Any]) -> Generator[Command, Any, Any]:
        """Authenticates the caller, and calls an operation with `dispatch.call`. Raises TownError."""
        by = yield from self.access.prove(request, op.name, request.values)
        return (yield from call(self.town, by, op, arguments, limits=self.access.call_limits(request)))


# --------------------------------------------------------------------------------------------------------- arguments


def read_arguments(request: Request, op: Op) -> dict[str, Any]:
    """The arguments of an operation, from path, query and body. `dispatch.call` validates them later.

    Raises BadRequest, UnsupportedMediaType, Invalid.
    """
    arguments: dict[str, Any] = {}
    if request.method == 'POST':
        if request.query:
            raise Invalid('send the arguments of POST in the body, not in the query', code='query-not-taken')
        arguments = read_body(request)
    else:
        if request.body:
            detail = f'send the arguments of {request.method} in the query, not in the body'
            raise BadRequest(detail, code='body-not-taken')
        arguments = read_query(request.query, op.parameters)
    for name, value in request.values.items():
        if name in arguments:
            error = {'pointer': f'/{name}', 'detail': 'is already given in the path'}
            raise Invalid(f'/{name}: is already given in the path', errors=[error])
        arguments[name] = value
    return arguments


def read_query(query: str, parameters: dict[str, Parameter]) -> dict[str, Any]:
    """The arguments in a query string, each converted by its parameter. Raises BadRequest, Invalid."""
    if not query:
        return {}
    arguments: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors='strict', max_num_fields=64)
    except (ValueError, UnicodeDecodeError):
        raise BadRequest('the query is not UTF-8, or has more than 64 fields') from None
    for name, text in pairs:
        if name in arguments:
            raise BadRequest(f'{name[:60]!r} is in the query twice')
        arguments[name] = parameters[name].read(text) if name in parameters else text
    return arguments


def read_body(request: Request) -> dict[str, Any]:
    """The JSON object in a body, {} for an empty body. Raises BadRequest, UnsupportedMediaType, Invalid."""
    if not request.body:
        return {}
    kind, _, parameters = request.field(b'content-type').partition(';')
    charset = parameters.strip(' \t').lower().replace('"', '')
    if kind.strip(' \t').lower() != 'application/json' or charset not in ('', 'charset=utf-8'):
        sent = request.field(b'content-type')[:60] or 'none'
        raise UnsupportedMediaType(f'the body must be application/json in UTF-8; Content-Type is {sent}')
    value = parse_json(request.body)
    if not isinstance(value, dict):
        raise Invalid('the body must be a JSON object', errors=[{'pointer': '', 'detail': 'must be an object'}])
    return value


def parse_json(data: bytes) -> Any:
    """Parses JSON strictly: RFC 8259 within the limits of I-JSON (RFC 7493). Raises BadRequest.

    Refuses a byte order mark, duplicate names, lone surrogates, NaN and infinities, numbers out of range, and nesting
    deeper than MAX_DEPTH.
    """
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise BadRequest(f'the body is not UTF-8 (byte {e.start})', code='malformed-json') from None
    if text.startswith('\ufeff'):
        raise BadRequest('the body starts with a byte order mark', code='malformed-json')
    if _depth(text) > MAX_DEPTH:
        raise BadRequest(f'the body is nested more than {MAX_DEPTH} levels deep', code='malformed-json')
    try:
        value = _decoder.decode(text)
        if '\\u' in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise BadRequest('the body contains half of a surrogate pair', code='malformed-json') from None
    except json.JSONDecodeError as e:
        raise BadRequest(
            f'the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})', code='malformed-json'
        ) from None
    except ValueError as e:
        raise BadRequest(f'the body is not acceptable JSON: {e}', code='malformed-json') from None


_BRACKETS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.S)


def _depth(text: str) -> int:
    """How deep brackets nest outside of strings. Counted before parsing, because the parser recurses."""
    if text.count('[') + text.count('{') <= MAX_DEPTH:
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
    members = dict(pairs)
    if len(members) != len(pairs):
        [(duplicate, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'{duplicate[:60]!r} is twice in one object')
    return members


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
