"""The MCP server, independent of the transport: parses requests, runs the protocol's methods over a catalog, replies.

`McpServer.read` parses a message into an `McpRequest`; `McpServer.run` is the step that runs it and returns the reply.
`stdio` and `streamable_http` call these two. `CatalogProtocol` is what a server offers;
the one of a town is `catalog.Catalog`.

The server speaks two generations of the protocol: modern (2026-07-28) and legacy (everything before). They differ in
how a request names its version, in a handful of methods, and in the envelope of a result. The only state between
requests is the `Session` of a legacy client, which holds its subscriptions.
"""

from __future__ import annotations

import logging
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from ..core.dispatch import CallLimits
from ..errors import TownError
from ..model import Json, Principal
from ..state.store import Step
from .jsonrpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    LEGACY,
    META_PREFIX,
    METHOD_NOT_FOUND,
    MODERN,
    RESOURCE_NOT_FOUND,
    Fault,
    Id,
    envelope,
    error_reply,
    object_param,
    string_param,
    unsupported,
)

logger = logging.getLogger('tinytown.mcp')

LEVELS: Final = ('debug', 'info', 'notice', 'warning', 'error', 'critical', 'alert', 'emergency')
_LIST_TTL_MS: Final = 60_000

Cancel = Callable[[], None]
Notify = Callable[[str, Json], None]  # sends a notification: its method and parameters
RunMode = Literal['quick', 'slow', 'stream', 'listen']  # see McpServer.run_mode


# -------------------------------------------------------------------------------------------------- sessions, requests


@dataclass(slots=True)
class Session:
    """State that a client keeps between requests: over stdio, over HTTP+SSE (2024-11-05), in a legacy HTTP session.

    `send` sends a message outside of any request. It may be called from any thread.
    """

    send: Callable[[Json], None]
    revision: str = ''  # as negotiated by `initialize`
    running: dict[Id, McpRequest] = field(default_factory=dict)
    subscriptions: dict[str, Cancel] = field(default_factory=dict)  # by URI

    def end(self) -> None:
        """Ends all subscriptions and cancels all running requests."""
        for unsubscribe in self.subscriptions.values():
            unsubscribe()
        self.subscriptions.clear()
        for request in list(self.running.values()):
            request.cancel()


@dataclass(slots=True)
class McpRequest:
    """One request of a client.

    `send` sends a message ahead of the reply, on the same stream. It may be called from any thread.
    """

    id: Id
    method: str
    params: Json
    by: Principal
    revision: str
    session: Session | None
    send: Callable[[Json], None]
    limits: CallLimits | None = None  # rate limit and audit; None over stdio, where neither applies
    cancelled: bool = False
    refusal: TownError | None = None  # the error with which dispatch refused the call
    on_cancel: Cancel | None = None  # ends the notifications of `subscriptions/listen`

    @property
    def request_id(self) -> str:
        """The request id in the log: over HTTP that of the HTTP request, otherwise the id of the message."""
        return self.limits.request_id if self.limits else str(self.id)

    @property
    def is_modern(self) -> bool:
        return self.revision == MODERN

    @property
    def meta(self) -> Json:
        meta = self.params.get('_meta')
        return meta if isinstance(meta, dict) else {}

    def notify(self, method: str, params: Json) -> None:
        """Sends a notification ahead of the reply, unless the request was cancelled."""
        if not self.cancelled:
            self.send({'jsonrpc': '2.0', 'method': method, 'params': params})

    def progress(self, done: float, total: float, message: str = '') -> None:
        """Sends a progress notification, if the client asked for progress with a `progressToken`."""
        token = self.meta.get('progressToken')
        if isinstance(token, (str, int)) and not isinstance(token, bool):
            text = {'message': message} if message else {}
            self.notify('notifications/progress', {'progressToken': token, 'progress': done, 'total': total, **text})

    def cancel(self) -> None:
        """Cancels the request: the client no longer wants a reply."""
        self.cancelled = True
        if self.on_cancel:
            self.on_cancel()
            self.on_cancel = None


class CatalogProtocol(Protocol):
    """What a server offers. The lists depend on the caller `by`. The steps may raise Fault or TownError."""

    info: Json  # name, title, version
    instructions: str
    capabilities: Json
    page: int  # how many items of a list are on one page

    def tools(self, by: Principal) -> list[Json]: ...
    def resources(self, by: Principal) -> list[Json]: ...
    def templates(self, by: Principal) -> list[Json]: ...
    def prompts(self, by: Principal) -> list[Json]: ...

    def run_mode(self, request: McpRequest, tool: str) -> RunMode:
        """How to run a call of this tool, see `McpServer.run_mode`."""

    def call(self, request: McpRequest, tool: str, arguments: Json) -> Step[Json]: ...
    def read(self, request: McpRequest, uri: str) -> Step[list[Json]]: ...
    def prompt(self, request: McpRequest, name: str, arguments: dict[str, str]) -> Step[Json]: ...
    def complete(self, request: McpRequest, ref: Json, argument: str, value: str) -> Step[list[str]]: ...

    def granted(self, by: Principal, wanted: Json) -> Json:
        """The subset of the `wanted` notifications (as in `subscriptions/listen`) that the caller will receive."""

    def position(self) -> Step[str]:
        """The current end of the town's event stream, for `watch`."""

    def watch(self, position: str, wanted: Json, notify: Notify) -> Cancel:
        """Calls `notify` for every wanted event after a position, until the returned function is called."""


# ------------------------------------------------------------------------------------------------------- the protocol

_LISTS: Final = {
    'tools/list': 'tools',
    'resources/list': 'resources',
    'resources/templates/list': 'templates',
    'prompts/list': 'prompts',
}
_KEYS: Final = {'templates': 'resourceTemplates'}
_MODERN_ONLY: Final = frozenset({'server/discover', 'subscriptions/listen'})


class McpServer:
    """The protocol's methods over a catalog. Legacy clients can only subscribe if the transport `keeps_sessions`."""

    def __init__(self, catalog: CatalogProtocol, keeps_sessions: bool = True) -> None:
        self.catalog = catalog
        self.keeps_sessions = keeps_sessions
        shared: dict[str, Callable[[McpRequest], Step[Json | None]]] = dict.fromkeys(_LISTS, self._list)
        shared |= {'tools/call': self._call, 'resources/read': self._read, 'prompts/get': self._prompt}
        shared |= {'completion/complete': self._complete}
        self._modern = shared | {'server/discover': self._discover, 'subscriptions/listen': self._listen}
        self._legacy = shared | {
            'initialize': self._initialize,
            'ping': self._nothing,
            'logging/setLevel': self._set_level,
            'resources/subscribe': self._subscribe,
            'resources/unsubscribe': self._unsubscribe,
        }

    # -------------------------------------------------------------------------------------------- reading a message

    def read(
        self,
        message: Any,
        by: Principal,
        send: Callable[[Json], None],
        session: Session | None = None,
        revision: str = '',
        check: Callable[[str, Json], None] = lambda _method, _params: None,
        limits: CallLimits | None = None,
    ) -> McpRequest | None:
        """Parses a message into a request. Raises Fault.

        Returns None for a notification, which takes effect here, and for a response, because no request of this server
        waits for one. `revision` is the protocol version named by the transport, '' if it names none. `check(method,
        params)` is called for a modern request; it raises Fault if the HTTP headers do not match the body.
        """
        method, params, message_id = envelope(message)
        if method is None:
            return None
        if message_id is None:
            self._take_notification(method, params, session)
            return None
        try:
            modern = self._modern_revision(method, params, revision, check)
        except Fault as e:
            e.id = message_id
            raise
        effective = modern or revision or (session.revision if session else '') or LEGACY[0]
        return McpRequest(message_id, method, params, by, effective, session, send, limits)

    def _modern_revision(self, method: str, params: Json, revision: str, check: Callable[[str, Json], None]) -> str:
        """The revision that a modern request names, '' for a legacy request (basic/versioning). Raises Fault."""
        meta = params.get('_meta')
        meta = meta if isinstance(meta, dict) else {}
        key = f'{META_PREFIX}protocolVersion'
        if key not in meta and method not in _MODERN_ONLY and revision in ('', *LEGACY):
            return ''
        for required, kind in ((key, str), (f'{META_PREFIX}clientCapabilities', dict)):
            if not isinstance(meta.get(required), kind):
                detail = f'params._meta["{required}"] is missing; every request of {MODERN} needs it'
                raise Fault(INVALID_PARAMS, detail, status=400)
        check(method, params)
        if meta[key] != MODERN:
            raise unsupported(meta[key])
        return MODERN

    def _take_notification(self, method: str, params: Json, session: Session | None) -> None:
        """Acts on a cancellation. Ignores other notifications, and the ids of requests that have ended."""
        request_id = params.get('requestId')
        if method == 'notifications/cancelled' and session and isinstance(request_id, (str, int)):
            request = session.running.get(request_id)
            if request:
                request.cancel()

    # ------------------------------------------------------------------------------------------- answering a request

    def run_mode(self, request: McpRequest) -> RunMode:
        """How the transport must run a request.

        quick   on the event loop or the reading thread
        slow    on a thread of its own
        stream  on a thread of its own; notifications may precede the reply
        listen  quick, but the request stays open and sends notifications until it ends
        """
        if request.method == 'subscriptions/listen':
            return 'listen'
        name = request.params.get('name')
        if request.method == 'tools/call' and isinstance(name, str):
            return self.catalog.run_mode(request, name)
        return 'quick'

    def run(self, request: McpRequest) -> Step[Json | None]:
        """Runs a request and returns the reply: None if the request was cancelled or stays open. Never raises."""
        try:
            method = (self._modern if request.is_modern else self._legacy).get(request.method)
            if method is None:
                raise Fault(METHOD_NOT_FOUND, f'MCP {request.revision} has no method {request.method[:100]!r}')
            result = yield from method(request)
            reply = None if result is None else self._reply(request, result)
        except Fault as e:
            e.id = request.id
            if e.code == RESOURCE_NOT_FOUND and request.is_modern:
                e.code = INVALID_PARAMS
            reply = error_reply(e)
        except TownError as e:
            reply = error_reply(Fault(INTERNAL_ERROR, e.detail, {'code': e.code}, request.id))
        except Exception as e:  # a bug in one method must not end the server
            request_id = request.request_id
            about = {'request_id': request_id, 'principal': request.by.name}
            logger.error(f'request {request_id} failed', exc_info=e, extra=about)
            detail = 'internal error of the server; search its log for the request id'
            reply = error_reply(Fault(INTERNAL_ERROR, detail, {'request_id': request_id}, request.id))
        return None if request.cancelled else reply

    def _reply(self, request: McpRequest, result: Json) -> Json:
        """Wraps a result in the envelope of the request's generation."""
        if request.is_modern:
            caching: Json = {}
            if request.method in _LISTS or request.method == 'resources/read':
                caching = {'ttlMs': _LIST_TTL_MS if request.method in _LISTS else 0, 'cacheScope': 'private'}
            meta = {f'{META_PREFIX}serverInfo': self.catalog.info, **result.get('_meta', {})}
            result = {'resultType': 'complete', **caching, **result, '_meta': meta}
        return {'jsonrpc': '2.0', 'id': request.id, 'result': result}

    def _discover(self, _request: McpRequest) -> Step[Json]:
        yield from ()
        return {
            'supportedVersions': [MODERN],
            'capabilities': self.catalog.capabilities,
            'instructions': self.catalog.instructions,
            'ttlMs': _LIST_TTL_MS,
            'cacheScope': 'public',
        }

    def _initialize(self, request: McpRequest) -> Step[Json]:
        yield from ()
        wanted = request.params.get('protocolVersion')
        if not isinstance(wanted, str):
            raise Fault(INVALID_PARAMS, 'protocolVersion is missing')
        revision = wanted if wanted in LEGACY else LEGACY[0]
        if request.session:
            request.session.revision = revision
        return {
            'protocolVersion': revision,
            'capabilities': self.catalog.capabilities | ({} if self.keeps_sessions else {'resources': {}}),
            'serverInfo': self.catalog.info,
            'instructions': self.catalog.instructions,
        }

    def _nothing(self, _request: McpRequest) -> Step[Json]:
        yield from ()
        return {}

    def _set_level(self, request: McpRequest) -> Step[Json]:
        if request.params.get('level') not in LEVELS:
            raise Fault(INVALID_PARAMS, f'level must be one of {", ".join(LEVELS)}')
        return (yield from self._nothing(request))

    def _list(self, request: McpRequest) -> Step[Json]:
        """One page of a list. The cursor is the offset, encoded because clients must treat cursors as opaque."""
        yield from ()
        kind = _LISTS[request.method]
        items: list[Json] = getattr(self.catalog, kind)(request.by)
        start = _offset(request.params.get('cursor'), len(items))
        end = start + self.catalog.page
        cursor = {'nextCursor': urlsafe_b64encode(b'o%d' % end).decode()} if end < len(items) else {}
        return {_KEYS.get(kind, kind): items[start:end], **cursor}

    def _call(self, request: McpRequest) -> Step[Json]:
        name, arguments = string_param(request.params, 'name'), object_param(request.params, 'arguments')
        return (yield from self.catalog.call(request, name, arguments))

    def _read(self, request: McpRequest) -> Step[Json]:
        return {'contents': (yield from self.catalog.read(request, string_param(request.params, 'uri')))}

    def _prompt(self, request: McpRequest) -> Step[Json]:
        name, arguments = string_param(request.params, 'name'), object_param(request.params, 'arguments')
        if any(not isinstance(value, str) for value in arguments.values()):
            raise Fault(INVALID_PARAMS, 'every argument of a prompt must be a string')
        return (yield from self.catalog.prompt(request, name, arguments))

    def _complete(self, request: McpRequest) -> Step[Json]:
        ref, argument = object_param(request.params, 'ref'), object_param(request.params, 'argument')
        name, value = string_param(argument, 'name'), string_param(argument, 'value')
        values = yield from self.catalog.complete(request, ref, name, value)
        return {'completion': {'values': values[:100], 'total': len(values), 'hasMore': len(values) > 100}}

    # ------------------------------------------------------------------------------------------------ subscriptions

    def _listen(self, request: McpRequest) -> Step[Json | None]:
        """Starts the notifications of a stream. The request stays open; its result is `listen_result`."""
        granted = self.catalog.granted(request.by, _filter(object_param(request.params, 'notifications')))
        tag = {'_meta': {f'{META_PREFIX}subscriptionId': request.id}}
        position = yield from self.catalog.position()
        request.notify('notifications/subscriptions/acknowledged', {'notifications': granted, **tag})
        request.on_cancel = self.catalog.watch(
            position, granted, lambda method, params: request.notify(method, params | tag)
        )
        if request.cancelled:  # before on_cancel was set
            request.cancel()
        return None

    def listen_result(self, request: McpRequest) -> Json:
        """The result of `subscriptions/listen`, sent when the server ends the stream."""
        return self._reply(request, {'_meta': {f'{META_PREFIX}subscriptionId': request.id}})

    def _subscribe(self, request: McpRequest) -> Step[Json]:
        session, uri = request.session, string_param(request.params, 'uri')
        if session is None:
            mend = (
                'send the Mcp-Session-Id that initialize returned'
                if self.keeps_sessions
                else f'a server with several worker processes has none; use subscriptions/listen ({MODERN})'
            )
            raise Fault(INVALID_REQUEST, f'a subscription needs a session: {mend}')
        granted = self.catalog.granted(request.by, {'resourceSubscriptions': [uri]})
        if not granted:
            raise Fault(RESOURCE_NOT_FOUND, f'there is no resource {uri[:200]!r} to subscribe to', {'uri': uri})
        if uri not in session.subscriptions and len(session.subscriptions) >= 100:
            raise Fault(
                INVALID_PARAMS, 'this session has 100 subscriptions already; end one with resources/unsubscribe'
            )
        position = yield from self.catalog.position()
        if uri not in session.subscriptions:
            session.subscriptions[uri] = self.catalog.watch(position, granted, _notifier(session))
        return {}

    def _unsubscribe(self, request: McpRequest) -> Step[Json]:
        uri = string_param(request.params, 'uri')
        unsubscribe = request.session.subscriptions.pop(uri, None) if request.session else None
        if unsubscribe:
            unsubscribe()
        return (yield from self._nothing(request))


def not_batched(request: McpRequest) -> Fault:
    """The error for a modern request inside an array of messages."""
    return Fault(INVALID_REQUEST, f'MCP {request.revision} does not allow arrays of messages', None, request.id)


def _notifier(session: Session) -> Notify:
    return lambda method, params: session.send({'jsonrpc': '2.0', 'method': method, 'params': params})


def _filter(wanted: Json) -> Json:
    """The notifications that a `subscriptions/listen` asks for, with their types checked. Raises Fault."""
    lists = {name: True for name in wanted if name.endswith('ListChanged') and wanted[name] is True}
    uris = wanted.get('resourceSubscriptions', [])
    if not isinstance(uris, list) or any(not isinstance(uri, str) for uri in uris) or len(uris) > 100:
        raise Fault(INVALID_PARAMS, 'resourceSubscriptions must be a list of at most 100 URIs')
    return {**lists, **({'resourceSubscriptions': uris} if uris else {})}


def _offset(cursor: Any, length: int) -> int:
    """The offset in a cursor, for a list of this length. Raises Fault."""
    if cursor is None:
        return 0
    try:
        decoded = urlsafe_b64decode(cursor)
        offset = int(decoded[1:])
        if decoded == b'o%d' % offset and 0 < offset < length:
            return offset
    except (ValueError, TypeError):
        pass
    raise Fault(INVALID_PARAMS, 'cursor must be the nextCursor of the previous page')
