"""MCP, whatever the transport: JSON-RPC, both generations of the protocol, and their methods over a catalogue.

A message is read (`Mcp.read`) into an `Ask`, which says who asks for what and how; `Mcp.run` is the step that ends in
the reply. Nothing is remembered between two requests but what a legacy client subscribed to (`Session`). The two
generations differ in how a request says its version, in a handful of methods, and in the envelope of a result.
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
    INTERNAL,
    INVALID_PARAMS,
    INVALID_REQUEST,
    LEGACY,
    META_PREFIX,
    MODERN,
    NO_METHOD,
    NO_RESOURCE,
    Fault,
    Id,
    envelope,
    error_reply,
    object_of,
    text_of,
    unsupported,
)

logger = logging.getLogger('tinytown.mcp.protocol')

LEVELS: Final = ('debug', 'info', 'notice', 'warning', 'error', 'critical', 'alert', 'emergency')
_LIST_TTL_MS: Final = 60_000

Cancel = Callable[[], None]
Notify = Callable[[str, Json], None]  # a notification: its method and parameters
Manner = Literal['quick', 'slow', 'stream', 'listen']


# ----------------------------------------------------------------------------------------------- who asks, and for what


@dataclass(slots=True)
class Session:
    """A client's lasting connection, where it has one: stdio, the transport of 2024-11-05, a session of legacy HTTP.

    `send` sends a message that belongs to no request; any thread may call it.
    """

    send: Callable[[Json], None]
    revision: str = ''  # as negotiated by `initialize`
    running: dict[Id, Ask] = field(default_factory=dict)
    watches: dict[str, Cancel] = field(default_factory=dict)  # by URI

    def end(self) -> None:
        """Stops what was to be told, and what is under way."""
        for stop in self.watches.values():
            stop()
        self.watches.clear()
        for ask in list(self.running.values()):
            ask.cancel()


@dataclass(slots=True)
class Ask:
    """A request: what is asked, by whom, and how. `notify` sends a message that goes with the answer, on any thread."""

    id: Id
    method: str
    params: Json
    by: Principal
    revision: str
    session: Session | None
    notify: Callable[[Json], None]
    gate: CallLimits | None = None  # of the door, where calls are limited and recorded
    cancelled: bool = False
    refused: TownError | None = None  # why the door did not let it in
    stop: Cancel | None = None  # ends what goes on after the step

    @property
    def request_id(self) -> str:
        """What it is called in the log: over HTTP the id of the request, else the id of the message."""
        return self.gate.request_id if self.gate else str(self.id)

    @property
    def is_modern(self) -> bool:
        return self.revision == MODERN

    @property
    def meta(self) -> Json:
        found = self.params.get('_meta')
        return found if isinstance(found, dict) else {}

    def tell(self, method: str, params: Json) -> None:
        """Sends a notification beside the answer, unless the client has lost interest."""
        if not self.cancelled:
            self.notify({'jsonrpc': '2.0', 'method': method, 'params': params})

    def progress(self, done: float, total: float, message: str = '') -> None:
        """Tells how far it is, if the client asked to be told."""
        token = self.meta.get('progressToken')
        if isinstance(token, (str, int)) and not isinstance(token, bool):
            said = {'message': message} if message else {}
            self.tell('notifications/progress', {'progressToken': token, 'progress': done, 'total': total, **said})

    def cancel(self) -> None:
        """The client wants no answer any more."""
        self.cancelled = True
        if self.stop:
            self.stop()
            self.stop = None


class CatalogProtocol(Protocol):
    """What a server offers. Lists depend on the caller; a step may raise Fault, or TownError."""

    info: Json  # name, title, version
    instructions: str
    capabilities: Json
    page: int  # items of a list on one page

    def tools(self, by: Principal) -> list[Json]: ...
    def resources(self, by: Principal) -> list[Json]: ...
    def templates(self, by: Principal) -> list[Json]: ...
    def prompts(self, by: Principal) -> list[Json]: ...

    def manner(self, ask: Ask, tool: str) -> Manner:
        """How a call is to be run: at once, on a thread, or on a thread with messages beside its answer."""

    def call(self, ask: Ask, tool: str, arguments: Json) -> Step[Json]: ...
    def read(self, ask: Ask, uri: str) -> Step[list[Json]]: ...
    def prompt(self, ask: Ask, name: str, arguments: dict[str, str]) -> Step[Json]: ...
    def complete(self, ask: Ask, ref: Json, argument: str, value: str) -> Step[list[str]]: ...

    def honoured(self, by: Principal, wanted: Json) -> Json:
        """What of the wanted notifications (as in `subscriptions/listen`) will be sent."""

    def position(self) -> Step[str]:
        """Where the notifications are now."""

    def watch(self, position: str, wanted: Json, tell: Notify) -> Cancel:
        """Tells what happens after a position, until the returned function is called."""


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
    """The protocol over a catalogue. A legacy client can only subscribe where it `keeps_sessions`."""

    def __init__(self, catalogue: CatalogProtocol, keeps_sessions: bool = True) -> None:
        self.catalogue = catalogue
        self.keeps_sessions = keeps_sessions
        shared: dict[str, Callable[[Ask], Step[Json | None]]] = dict.fromkeys(_LISTS, self._list)
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
        notify: Callable[[Json], None],
        session: Session | None = None,
        revision: str = '',
        check: Callable[[str, Json], None] = lambda _method, _params: None,
        gate: CallLimits | None = None,
    ) -> Ask | None:
        """What a message asks; None for a notification, which is heeded, and for a response, which nothing waits for.

        `revision` is what the transport says of it, if it does; `check` judges a modern request by what the transport
        says beside it. Raises Fault.
        """
        method, params, number = envelope(message)
        if method is None:
            return None
        if number is None:
            self._heed(method, params, session)
            return None
        try:
            said = self._version(method, params, revision, check)
        except Fault as e:
            e.id = number
            raise
        spoken = said or revision or (session.revision if session else '') or LEGACY[0]
        return Ask(number, method, params, by, spoken, session, notify, gate)

    def _version(self, method: str, params: Json, revision: str, check: Callable[[str, Json], None]) -> str:
        """The revision of a modern request, '' of a legacy one (basic/versioning). Raises Fault."""
        meta = params.get('_meta')
        meta = meta if isinstance(meta, dict) else {}
        key = f'{META_PREFIX}protocolVersion'
        if key not in meta and method not in _MODERN_ONLY and revision in ('', *LEGACY):
            return ''
        for needed, kind in ((key, str), (f'{META_PREFIX}clientCapabilities', dict)):
            if not isinstance(meta.get(needed), kind):
                what = f'params._meta["{needed}"] is missing; every request of {MODERN} has it'
                raise Fault(INVALID_PARAMS, what, status=400)
        check(method, params)
        if meta[key] != MODERN:
            raise unsupported(meta[key])
        return MODERN

    def _heed(self, method: str, params: Json, session: Session | None) -> None:
        """Takes a notification. Unknown ones, and ids of what is over, are ignored."""
        wanted = params.get('requestId')
        if method == 'notifications/cancelled' and session and isinstance(wanted, (str, int)):
            ask = session.running.get(wanted)
            if ask:
                ask.cancel()

    # ------------------------------------------------------------------------------------------- answering a request

    def manner(self, ask: Ask) -> Manner:
        """How a request is to be run."""
        if ask.method == 'subscriptions/listen':
            return 'listen'
        name = ask.params.get('name')
        return self.catalogue.manner(ask, name) if ask.method == 'tools/call' and isinstance(name, str) else 'quick'

    def run(self, ask: Ask) -> Step[Json | None]:
        """The reply; None if there is none, or none yet. It never raises."""
        try:
            method = (self._modern if ask.is_modern else self._legacy).get(ask.method)
            if method is None:
                raise Fault(NO_METHOD, f'{ask.method[:100]!r} is no method of MCP {ask.revision}')
            result = yield from method(ask)
            reply = None if result is None else self._reply(ask, result)
        except Fault as e:
            e.id = ask.id
            if e.code == NO_RESOURCE and ask.is_modern:
                e.code = INVALID_PARAMS
            reply = error_reply(e)
        except TownError as e:
            reply = error_reply(Fault(INTERNAL, e.detail, {'code': e.code}, ask.id))
        except Exception as e:  # a request must not end the server
            about = {'request_id': ask.request_id, 'principal': ask.by.name}
            logger.error(f'request {ask.request_id} failed', exc_info=e, extra=about)
            what = 'this is a fault of the server; its log tells more under the request id'
            reply = error_reply(Fault(INTERNAL, what, {'request_id': ask.request_id}, ask.id))
        return None if ask.cancelled else reply

    def _reply(self, ask: Ask, result: Json) -> Json:
        """A result in the envelope of its generation."""
        if ask.is_modern:
            caching: Json = {}
            if ask.method in _LISTS or ask.method == 'resources/read':
                caching = {'ttlMs': _LIST_TTL_MS if ask.method in _LISTS else 0, 'cacheScope': 'private'}
            meta = {f'{META_PREFIX}serverInfo': self.catalogue.info, **result.get('_meta', {})}
            result = {'resultType': 'complete', **caching, **result, '_meta': meta}
        return {'jsonrpc': '2.0', 'id': ask.id, 'result': result}

    def _discover(self, _ask: Ask) -> Step[Json]:
        yield from ()
        return {
            'supportedVersions': [MODERN],
            'capabilities': self.catalogue.capabilities,
            'instructions': self.catalogue.instructions,
            'ttlMs': _LIST_TTL_MS,
            'cacheScope': 'public',
        }

    def _initialize(self, ask: Ask) -> Step[Json]:
        yield from ()
        wanted = ask.params.get('protocolVersion')
        if not isinstance(wanted, str):
            raise Fault(INVALID_PARAMS, 'protocolVersion is missing')
        revision = wanted if wanted in LEGACY else LEGACY[0]
        if ask.session:
            ask.session.revision = revision
        return {
            'protocolVersion': revision,
            'capabilities': self.catalogue.capabilities | ({} if self.keeps_sessions else {'resources': {}}),
            'serverInfo': self.catalogue.info,
            'instructions': self.catalogue.instructions,
        }

    def _nothing(self, _ask: Ask) -> Step[Json]:
        yield from ()
        return {}

    def _set_level(self, ask: Ask) -> Step[Json]:
        if ask.params.get('level') not in LEVELS:
            raise Fault(INVALID_PARAMS, f'level must be one of {", ".join(LEVELS)}')
        return (yield from self._nothing(ask))

    def _list(self, ask: Ask) -> Step[Json]:
        """One page of a list. A cursor is opaque: it is the offset, wrapped."""
        yield from ()
        kind = _LISTS[ask.method]
        items: list[Json] = getattr(self.catalogue, kind)(ask.by)
        start = _offset(ask.params.get('cursor'), len(items))
        end = start + self.catalogue.page
        following = {'nextCursor': urlsafe_b64encode(b'o%d' % end).decode()} if end < len(items) else {}
        return {_KEYS.get(kind, kind): items[start:end], **following}

    def _call(self, ask: Ask) -> Step[Json]:
        name, arguments = text_of(ask.params, 'name'), object_of(ask.params, 'arguments')
        return (yield from self.catalogue.call(ask, name, arguments))

    def _read(self, ask: Ask) -> Step[Json]:
        return {'contents': (yield from self.catalogue.read(ask, text_of(ask.params, 'uri')))}

    def _prompt(self, ask: Ask) -> Step[Json]:
        name, arguments = text_of(ask.params, 'name'), object_of(ask.params, 'arguments')
        if any(not isinstance(value, str) for value in arguments.values()):
            raise Fault(INVALID_PARAMS, 'the arguments of a prompt are texts')
        return (yield from self.catalogue.prompt(ask, name, arguments))

    def _complete(self, ask: Ask) -> Step[Json]:
        ref, argument = object_of(ask.params, 'ref'), object_of(ask.params, 'argument')
        name, value = text_of(argument, 'name'), text_of(argument, 'value')
        found = yield from self.catalogue.complete(ask, ref, name, value)
        return {'completion': {'values': found[:100], 'total': len(found), 'hasMore': len(found) > 100}}

    # ------------------------------------------------------------------------------------------------ subscriptions

    def _listen(self, ask: Ask) -> Step[Json | None]:
        """Opens a stream of notifications; there is no result until `farewell`."""
        granted = self.catalogue.honoured(ask.by, _filter(object_of(ask.params, 'notifications')))
        tag = {'_meta': {f'{META_PREFIX}subscriptionId': ask.id}}
        position = yield from self.catalogue.position()
        ask.tell('notifications/subscriptions/acknowledged', {'notifications': granted, **tag})
        ask.stop = self.catalogue.watch(position, granted, lambda method, params: ask.tell(method, params | tag))
        if ask.cancelled:
            ask.cancel()
        return None

    def farewell(self, ask: Ask) -> Json:
        """The result of a `subscriptions/listen` that the server ends."""
        return self._reply(ask, {'_meta': {f'{META_PREFIX}subscriptionId': ask.id}})

    def _subscribe(self, ask: Ask) -> Step[Json]:
        session, uri = ask.session, text_of(ask.params, 'uri')
        if session is None:
            mend = (
                'send the Mcp-Session-Id of initialize'
                if self.keeps_sessions
                else 'this server of several processes has none'
            )
            raise Fault(INVALID_REQUEST, f'a subscription needs a session: {mend}')
        wanted = self.catalogue.honoured(ask.by, {'resourceSubscriptions': [uri]})
        if not wanted:
            raise Fault(NO_RESOURCE, f'there is no resource {uri[:200]!r} to subscribe to', {'uri': uri})
        if uri not in session.watches and len(session.watches) >= 100:
            raise Fault(
                INVALID_PARAMS, 'this session has 100 subscriptions already; end one with resources/unsubscribe'
            )
        position = yield from self.catalogue.position()
        if uri not in session.watches:
            session.watches[uri] = self.catalogue.watch(position, wanted, _teller(session))
        return {}

    def _unsubscribe(self, ask: Ask) -> Step[Json]:
        uri = text_of(ask.params, 'uri')
        stop = ask.session.watches.pop(uri, None) if ask.session else None
        if stop:
            stop()
        return (yield from self._nothing(ask))


def not_batched(ask: Ask) -> Fault:
    """The error for a request of a later revision in an array."""
    return Fault(INVALID_REQUEST, f'MCP {ask.revision} has no arrays of messages', None, ask.id)


def _teller(session: Session) -> Notify:
    return lambda method, params: session.send({'jsonrpc': '2.0', 'method': method, 'params': params})


def _filter(wanted: Json) -> Json:
    """The notifications that a `subscriptions/listen` names, each of the right type."""
    found = {name: True for name in wanted if name.endswith('ListChanged') and wanted[name] is True}
    uris = wanted.get('resourceSubscriptions', [])
    if not isinstance(uris, list) or any(not isinstance(uri, str) for uri in uris) or len(uris) > 100:
        raise Fault(INVALID_PARAMS, 'resourceSubscriptions must be a list of at most 100 URIs')
    return {**found, **({'resourceSubscriptions': uris} if uris else {})}


def _offset(cursor: Any, most: int) -> int:
    if cursor is None:
        return 0
    try:
        plain = urlsafe_b64decode(cursor)
        offset = int(plain[1:])
        if plain == b'o%d' % offset and 0 < offset < most:
            return offset
    except (ValueError, TypeError):
        pass
    raise Fault(INVALID_PARAMS, 'cursor must be the nextCursor of the page before')
