"""MCP over HTTP: the Streamable HTTP transport of all its revisions on one path, and the older HTTP+SSE transport.

A modern request stands alone. A legacy client may keep a session, which matters only for what it is told unasked: its
subscriptions, and the stream (GET) on which it hears of them. Requests are served the same without one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qs

from ..auth.access import Access, is_slow
from ..errors import Internal, MethodNotAllowed, NotFound, TownError, Unavailable
from ..http.http1 import Request, Response, problem
from ..http.replies import Answer, Later, Slow, Stream
from ..model import Json, Principal
from ..state.store import Step
from .headers import EVENTS, JSON, accepts, check_accept, check_headers, check_type, says_its_version, status_of
from .jsonrpc import (
    BATCHING,
    INTERNAL,
    INVALID_REQUEST,
    LEGACY,
    MODERN,
    Fault,
    decode,
    encode_message,
    error_reply,
    unsupported,
)
from .protocol import Ask, McpServer, Session, not_batched
from .sessions import Open, Sessions

logger = logging.getLogger('tinytown.mcp.protocol')

PATH: Final = '/mcp'
SSE_PATH: Final = '/sse'
MESSAGES_PATH: Final = '/messages'
THROUGH_THE_DOOR: Final = frozenset({'tools/call', 'resources/read', 'prompts/get'})
_PROVE_SECS: Final = 30.0
_KEEP_ALIVE: Final = b': \n\n'
_UNBUFFERED: Final = (('X-Accel-Buffering', 'no'),)
_SESSION: Final = 'Mcp-Session-Id'

Handle = Callable[[Request, Principal], Answer]


def message_frame(message: Any) -> bytes:
    """A message as a server-sent event."""
    return b'event: message\ndata: %b\n\n' % encode_message(message)


class McpHttp:
    """The protocol on HTTP routes. One of several processes offers no session: the next request may go to another."""

    def __init__(self, mcp: McpServer, access: Access) -> None:
        self._mcp = mcp
        self._access = access
        self._sessions = Sessions() if mcp.keeps_sessions else None

    def routes(self) -> list[tuple[str, str, Callable[[Request], Answer]]]:
        """Method, path and handler of each route. Who calls must have been admitted (`Access.admit`)."""
        found: list[tuple[str, str, Handle]] = [
            ('POST', PATH, self._post),
            ('GET', PATH, self._get),
            ('DELETE', PATH, self._delete),
        ]
        if self._sessions:
            found += [('GET', SSE_PATH, self._open_sse), ('POST', MESSAGES_PATH, self._post_sse)]
        return [(method, path, self._proven(handle)) for method, path, handle in found]

    def _proven(self, handle: Handle) -> Callable[[Request], Answer]:
        """A handler that is called when it is known who calls."""

        def now(request: Request) -> Answer:
            if isinstance(request.by, Principal):
                return _faultless(handle, request, request.by)
            return Later(lambda stream: later(request, stream), lambda: _late(request), _PROVE_SECS)

        def later(request: Request, stream: Stream) -> None:
            def done(by: Principal | None, error: Exception | None) -> None:
                if by is None:
                    stream.answer(_apology(error, request))
                    return
                try:
                    _pass_on(_faultless(handle, request, by), stream)
                except TownError as e:
                    stream.answer(problem(e, request.id))

            stream.run(self._access.prove(request, 'mcp', {}), done, is_slow(request))

        return now

    # -------------------------------------------------------------------------------------------- Streamable HTTP

    def _post(self, request: Request, by: Principal) -> Answer:
        check_type(request)
        check_accept(request, JSON)
        message = decode(request.body)
        revision = request.field(b'mcp-protocol-version')
        if isinstance(message, list):
            return self._post_batch(request, by, message, revision)
        is_known = revision in ('', MODERN, *LEGACY)
        if not is_known and not says_its_version(message):
            raise unsupported(revision)
        session = self._session(request, by)
        channel = _Channel()
        ask = self._mcp.read(
            message, by, channel.send, session,
            revision=(revision or BATCHING) if is_known else MODERN,
            check=lambda method, params: check_headers(request, self._mcp.catalogue.tools(by), method, params),
            gate=self._access.gate(request),
        )  # fmt: skip
        if ask is None:
            return Response(202)
        self._count(request, ask)
        return self._answer(request, ask, channel)

    def _count(self, request: Request, ask: Ask) -> None:
        """Counts what does not come through the door, which counts by itself. Raises TooManyRequests."""
        if ask.method not in THROUGH_THE_DOOR and ask.gate:
            ask.gate.throttle.take(ask.by, request.peer.address, changes=False)

    def _session(self, request: Request, by: Principal) -> Session | None:
        sent = request.field(_SESSION.lower().encode())
        if not sent or not self._sessions or request.field(b'mcp-protocol-version') == MODERN:
            return None
        return self._sessions.find(sent, by.name).session

    def _answer(self, request: Request, ask: Ask, channel: _Channel) -> Answer:
        manner = self._mcp.manner(ask)
        if manner == 'listen':
            check_accept(request, EVENTS)
            return self._listen(ask, channel)
        if manner == 'stream' and accepts(request, EVENTS):
            return self._stream(ask, channel)
        step = self._plain(ask)
        return step if manner == 'quick' else Slow(step, waits=manner == 'stream')

    def _plain(self, ask: Ask) -> Step[Response]:
        reply = yield from self._mcp.run(ask)
        if ask.refused and ask.refused.status in (403, 429):
            return _refusal(ask, reply)
        response = _response(reply, ask.is_modern)
        if ask.method == 'initialize' and self._sessions and response.status == 200:
            response.headers += ((_SESSION, self._sessions.issue()),)
        return response

    def _stream(self, ask: Ask, channel: _Channel) -> Response:
        """Runs a request on a thread; what it tells on the way, and its reply, are events."""

        def start(stream: Stream) -> None:
            if ask.session:
                ask.session.running[ask.id] = ask
            channel.open(stream)
            stream.on_close = close
            stream.run(self._mcp.run(ask), done, slow=True, waits=True)

        def done(reply: Json | None, error: Exception | None) -> None:
            if error:
                reply = error_reply(Fault(INTERNAL, str(error), None, ask.id))
            channel.end(reply)

        def close() -> None:
            if ask.session:
                ask.session.running.pop(ask.id, None)
            if ask.is_modern:
                ask.cancel()  # in earlier revisions a connection that is lost cancels nothing

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _listen(self, ask: Ask, channel: _Channel) -> Response:
        def start(stream: Stream) -> None:
            channel.open(stream)
            stream.on_close = ask.cancel
            stream.run(self._mcp.run(ask), done)

        def done(reply: Json | None, _error: Exception | None) -> None:
            if reply:
                channel.end(reply)

        return Response(
            200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE,
            farewell=message_frame(self._mcp.farewell(ask)),
        )  # fmt: skip

    def _post_batch(self, request: Request, by: Principal, messages: list[Any], revision: str) -> Answer:
        """An array of messages, which revision 2025-03-26 has: the replies come in one array."""
        if revision not in ('', BATCHING) or not messages or len(messages) > 100:
            raise Fault(INVALID_REQUEST, f'an array of 1 to 100 messages is taken in MCP {BATCHING} alone')
        session = self._session(request, by)
        asks: list[Ask | Json | None] = []
        for message in messages:
            try:
                gate = self._access.gate(request)
                ask = self._mcp.read(message, by, lambda _message: None, session, BATCHING, gate=gate)
                if ask and ask.is_modern:
                    raise not_batched(ask)
                if ask:
                    self._count(request, ask)
                asks.append(ask)
            except Fault as e:
                asks.append(error_reply(e))
        is_quick = all(self._mcp.manner(ask) == 'quick' for ask in asks if isinstance(ask, Ask))
        step = self._batch([ask for ask in asks if ask is not None])
        return step if is_quick else Slow(step, waits=True)

    def _batch(self, asks: list[Ask | Json]) -> Step[Response]:
        replies = []
        for ask in asks:
            reply = (yield from self._mcp.run(ask)) if isinstance(ask, Ask) else ask
            if reply:
                replies.append(reply)
        return Response(200, encode_message(replies)) if replies else Response(202)

    def _get(self, request: Request, by: Principal) -> Answer:
        """The stream on which a legacy session hears what it did not ask for."""
        found = self._only_session(request, by)
        check_accept(request, EVENTS)

        def start(stream: Stream) -> None:
            found.attach(stream)
            stream.on_close = lambda: found.detach(stream)

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _delete(self, request: Request, by: Principal) -> Answer:
        found = self._only_session(request, by)
        assert self._sessions
        self._sessions.end(found)
        return Response(204)

    def _only_session(self, request: Request, by: Principal) -> Open:
        """The session of a request that makes no sense without one."""
        sent = request.field(_SESSION.lower().encode())
        if not self._sessions or not sent or request.field(b'mcp-protocol-version') == MODERN:
            raise MethodNotAllowed(f'{request.method} needs the {_SESSION} of a legacy session', allow='OPTIONS, POST')
        return self._sessions.find(sent, by.name)

    # ---------------------------------------------------------------------------------------- HTTP+SSE (2024-11-05)

    def _open_sse(self, _request: Request, by: Principal) -> Answer:
        assert self._sessions
        sessions, found = self._sessions, self._sessions.open(by.name)

        def start(stream: Stream) -> None:
            stream.send(f'event: endpoint\ndata: {MESSAGES_PATH}?session_id={found.id}\n\n'.encode())
            found.attach(stream)
            stream.on_close = lambda: sessions.end(found)

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _post_sse(self, request: Request, by: Principal) -> Answer:
        assert self._sessions
        found = self._sessions.find(parse_qs(request.query).get('session_id', [''])[0], by.name)
        stream = found.stream
        if stream is None:
            raise NotFound('this session has no stream; open one with GET /sse', code='no-such-session')
        check_type(request)
        session = found.session
        try:
            ask = self._mcp.read(decode(request.body), by, session.send, session, gate=self._access.gate(request))
        except Fault as e:
            if e.id is None:
                raise
            session.send(error_reply(e))
            return Response(202)
        if ask:
            self._count(request, ask)
            self._run_sse(ask, session, stream)
        return Response(202)

    def _run_sse(self, ask: Ask, session: Session, stream: Stream) -> None:
        manner = self._mcp.manner(ask)
        session.running[ask.id] = ask

        def done(reply: Json | None, error: Exception | None) -> None:
            if error:
                reply = error_reply(Fault(INTERNAL, str(error), None, ask.id))
            if manner != 'listen' or reply:
                session.running.pop(ask.id, None)
            if reply:
                session.send(reply)

        stream.run(self._mcp.run(ask), done, manner in ('slow', 'stream'), waits=manner == 'stream')


class _Channel:
    """Where a request's messages go: nowhere, until its stream is open."""

    def __init__(self) -> None:
        self._stream: Stream | None = None

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def send(self, message: Json) -> None:
        """Sends a message; any thread may call."""
        stream, data = self._stream, message_frame(message)
        if stream:
            stream.call_soon(lambda: stream.send(data))

    def end(self, reply: Json | None) -> None:
        """Sends the last message after those that were sent before, and ends the stream."""
        stream = self._stream
        assert stream
        if reply:
            self.send(reply)
        stream.call_soon(stream.close)


# ----------------------------------------------------------------------------------------------------------- answers


def _response(reply: Json | None, is_modern: bool) -> Response:
    """A reply with the status that it has over HTTP."""
    if reply is None:
        return Response(202)
    return Response(status_of(reply, is_modern), encode_message(reply))


def _refusal(ask: Ask, reply: Json | None) -> Response:
    """What HTTP has a status for: a scope that is missing, too many calls."""
    assert ask.refused
    headers = problem(ask.refused, '').headers
    said = (
        reply['result']['content'][0]['text'] if reply and 'content' in reply.get('result', {}) else ask.refused.detail
    )
    fault = Fault(INVALID_REQUEST, said, {'code': ask.refused.code}, ask.id)
    return Response(ask.refused.status, encode_message(error_reply(fault)), headers=headers)


def _faultless(handle: Handle, request: Request, by: Principal) -> Answer:
    try:
        return handle(request, by)
    except Fault as e:
        modern = request.field(b'mcp-protocol-version') not in ('', *LEGACY)
        reply = error_reply(e)
        return Response(e.status or status_of(reply, modern), encode_message(reply))


def _pass_on(answer: Answer, stream: Stream) -> None:
    """Gives an answer that was found late."""

    def done(response: Response | None, error: Exception | None) -> None:
        stream.answer(response or _apology(error, stream.request))

    if isinstance(answer, Response):
        stream.answer(answer)
    elif isinstance(answer, Slow):
        stream.run(answer.step, done, slow=True, waits=answer.waits)
    else:
        assert not isinstance(answer, Later)
        stream.run(answer, done)


def _apology(error: Exception | None, request: Request) -> Response:
    """The answer where a step has raised."""
    if isinstance(error, TownError):
        return problem(error, request.id)
    about = {'request_id': request.id, 'principal': request.caller}
    logger.error(f'request {request.id} failed', exc_info=error, extra=about)
    return problem(Internal('this is a fault of the server; its log tells more under the request id'), request.id)


def _late(request: Request) -> Response:
    return problem(Unavailable('it took too long to find out who calls', code='timeout', retry_after=1), request.id)
