"""The HTTP transports of MCP: Streamable HTTP (all revisions, on /mcp) and the older HTTP+SSE (/sse and /messages).

Start with `McpHttp.routes`; `townhall.process` adds them to the REST server. Modern requests are stateless. A legacy
client may keep a session, but only subscriptions and their notification stream (GET /mcp) depend on it: requests are
served the same without one.
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
from .headers import EVENTS, JSON, accepts, check_accept, check_headers, check_type, names_version, status_of
from .jsonrpc import (
    BATCHING,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    LEGACY,
    MODERN,
    Fault,
    decode,
    encode_message,
    error_reply,
    unsupported,
)
from .protocol import McpRequest, McpServer, Session, not_batched
from .sessions import HttpSession, Sessions

logger = logging.getLogger('tinytown.mcp')

PATH: Final = '/mcp'
SSE_PATH: Final = '/sse'
MESSAGES_PATH: Final = '/messages'
DISPATCHED: Final = frozenset({'tools/call', 'resources/read', 'prompts/get'})  # run operations, and are counted there
_AUTH_SECS: Final = 30.0  # deadline for authenticating the caller
_KEEP_ALIVE: Final = b': \n\n'
_UNBUFFERED: Final = (('X-Accel-Buffering', 'no'),)
_SESSION: Final = 'Mcp-Session-Id'

Handle = Callable[[Request, Principal], Answer]


def message_frame(message: Any) -> bytes:
    """A message as a server-sent event."""
    return b'event: message\ndata: %b\n\n' % encode_message(message)


class McpHttp:
    """The MCP server on HTTP routes.

    With several worker processes there are no sessions, because the next request may reach another process.
    """

    def __init__(self, mcp: McpServer, access: Access) -> None:
        self._mcp = mcp
        self._access = access
        self._sessions = Sessions() if mcp.keeps_sessions else None

    def routes(self) -> list[tuple[str, str, Callable[[Request], Answer]]]:
        """Method, path and handler of each route. `Access.admit` must have admitted a request before its handler."""
        routes: list[tuple[str, str, Handle]] = [
            ('POST', PATH, self._post),
            ('GET', PATH, self._get),
            ('DELETE', PATH, self._delete),
        ]
        if self._sessions:
            routes += [('GET', SSE_PATH, self._open_sse), ('POST', MESSAGES_PATH, self._post_sse)]
        return [(method, path, self._authenticated(handle)) for method, path, handle in routes]

    def _authenticated(self, handle: Handle) -> Callable[[Request], Answer]:
        """Wraps a handler so that it runs once the caller is authenticated, which may take a step."""

        def now(request: Request) -> Answer:
            if isinstance(request.by, Principal):
                return _handle(handle, request, request.by)
            return Later(lambda stream: later(request, stream), lambda: _auth_timeout(request), _AUTH_SECS)

        def later(request: Request, stream: Stream) -> None:
            def done(by: Principal | None, error: Exception | None) -> None:
                if by is None:
                    stream.answer(_error_response(error, request))
                    return
                try:
                    _forward(_handle(handle, request, by), stream)
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
        if not is_known and not names_version(message):
            raise unsupported(revision)
        session = self._session(request, by)
        channel = _Channel()
        mcp_request = self._mcp.read(
            message, by, channel.send, session,
            revision=(revision or BATCHING) if is_known else MODERN,
            check=lambda method, params: check_headers(request, self._mcp.catalog.tools(by), method, params),
            limits=self._access.call_limits(request),
        )  # fmt: skip
        if mcp_request is None:
            return Response(202)
        self._count(request, mcp_request)
        return self._answer(request, mcp_request, channel)

    def _count(self, request: Request, mcp_request: McpRequest) -> None:
        """Applies the rate limit to requests that run no operation. Raises TooManyRequests."""
        if mcp_request.method not in DISPATCHED and mcp_request.limits:
            mcp_request.limits.throttle.take(mcp_request.by, request.peer.address, changes=False)

    def _session(self, request: Request, by: Principal) -> Session | None:
        """The session of a legacy request, None if it has none. Raises NotFound."""
        sent = request.field(_SESSION.lower().encode())
        if not sent or not self._sessions or request.field(b'mcp-protocol-version') == MODERN:
            return None
        return self._sessions.find(sent, by.name).session

    def _answer(self, request: Request, mcp_request: McpRequest, channel: _Channel) -> Answer:
        mode = self._mcp.run_mode(mcp_request)
        if mode == 'listen':
            check_accept(request, EVENTS)
            return self._listen(mcp_request, channel)
        if mode == 'stream' and accepts(request, EVENTS):
            return self._stream(mcp_request, channel)
        step = self._plain(mcp_request)
        return step if mode == 'quick' else Slow(step, waits=mode == 'stream')

    def _plain(self, mcp_request: McpRequest) -> Step[Response]:
        reply = yield from self._mcp.run(mcp_request)
        if mcp_request.refusal and mcp_request.refusal.status in (403, 429):
            return _refusal(mcp_request, reply)
        response = _response(reply, mcp_request.is_modern)
        if mcp_request.method == 'initialize' and self._sessions and response.status == 200:
            response.headers += ((_SESSION, self._sessions.issue()),)
        return response

    def _stream(self, mcp_request: McpRequest, channel: _Channel) -> Response:
        """Runs a request on a thread, and sends its notifications and its reply as server-sent events."""

        def start(stream: Stream) -> None:
            if mcp_request.session:
                mcp_request.session.running[mcp_request.id] = mcp_request
            channel.open(stream)
            stream.on_close = close
            stream.run(self._mcp.run(mcp_request), done, slow=True, waits=True)

        def done(reply: Json | None, error: Exception | None) -> None:
            if error:
                reply = error_reply(Fault(INTERNAL_ERROR, str(error), None, mcp_request.id))
            channel.end(reply)

        def close() -> None:
            if mcp_request.session:
                mcp_request.session.running.pop(mcp_request.id, None)
            if mcp_request.is_modern:
                mcp_request.cancel()  # in legacy revisions a lost connection does not cancel the request

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _listen(self, mcp_request: McpRequest, channel: _Channel) -> Response:
        def start(stream: Stream) -> None:
            channel.open(stream)
            stream.on_close = mcp_request.cancel
            stream.run(self._mcp.run(mcp_request), done)

        def done(reply: Json | None, _error: Exception | None) -> None:
            if reply:
                channel.end(reply)

        return Response(
            200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE,
            farewell=message_frame(self._mcp.listen_result(mcp_request)),
        )  # fmt: skip

    def _post_batch(self, request: Request, by: Principal, messages: list[Any], revision: str) -> Answer:
        """Answers an array of messages (revision 2025-03-26 only) with an array of replies."""
        if revision not in ('', BATCHING) or not messages or len(messages) > 100:
            raise Fault(INVALID_REQUEST, f'send one message; only MCP {BATCHING} allows an array, of 1 to 100 messages')
        session = self._session(request, by)
        entries: list[McpRequest | Json | None] = []  # a request, an error reply, or nothing for a notification
        for message in messages:
            try:
                limits = self._access.call_limits(request)
                mcp_request = self._mcp.read(message, by, lambda _message: None, session, BATCHING, limits=limits)
                if mcp_request and mcp_request.is_modern:
                    raise not_batched(mcp_request)
                if mcp_request:
                    self._count(request, mcp_request)
                entries.append(mcp_request)
            except Fault as e:
                entries.append(error_reply(e))
        is_quick = all(self._mcp.run_mode(entry) == 'quick' for entry in entries if isinstance(entry, McpRequest))
        step = self._batch([entry for entry in entries if entry is not None])
        return step if is_quick else Slow(step, waits=True)

    def _batch(self, entries: list[McpRequest | Json]) -> Step[Response]:
        """Runs the requests of an array in order. Error replies pass through."""
        replies = []
        for entry in entries:
            reply = (yield from self._mcp.run(entry)) if isinstance(entry, McpRequest) else entry
            if reply:
                replies.append(reply)
        return Response(200, encode_message(replies)) if replies else Response(202)

    def _get(self, request: Request, by: Principal) -> Answer:
        """Opens the notification stream of a legacy session."""
        http_session = self._required_session(request, by)
        check_accept(request, EVENTS)

        def start(stream: Stream) -> None:
            http_session.attach(stream)
            stream.on_close = lambda: http_session.detach(stream)

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _delete(self, request: Request, by: Principal) -> Answer:
        http_session = self._required_session(request, by)
        assert self._sessions
        self._sessions.end(http_session)
        return Response(204)

    def _required_session(self, request: Request, by: Principal) -> HttpSession:
        """The session of a GET or DELETE request. Raises MethodNotAllowed without one, NotFound if it has ended."""
        sent = request.field(_SESSION.lower().encode())
        if not self._sessions or not sent or request.field(b'mcp-protocol-version') == MODERN:
            detail = f'{request.method} needs the header {_SESSION} of a legacy session'
            raise MethodNotAllowed(detail, allow='OPTIONS, POST')
        return self._sessions.find(sent, by.name)

    # ---------------------------------------------------------------------------------------- HTTP+SSE (2024-11-05)

    def _open_sse(self, _request: Request, by: Principal) -> Answer:
        assert self._sessions
        sessions, http_session = self._sessions, self._sessions.open(by.name)

        def start(stream: Stream) -> None:
            stream.send(f'event: endpoint\ndata: {MESSAGES_PATH}?session_id={http_session.id}\n\n'.encode())
            http_session.attach(stream)
            stream.on_close = lambda: sessions.end(http_session)

        return Response(200, content_type=EVENTS, headers=_UNBUFFERED, stream=start, heartbeat=_KEEP_ALIVE)

    def _post_sse(self, request: Request, by: Principal) -> Answer:
        assert self._sessions
        http_session = self._sessions.find(parse_qs(request.query).get('session_id', [''])[0], by.name)
        stream = http_session.stream
        if stream is None:
            raise NotFound('this session has no stream; open one with GET /sse', code='no-such-session')
        check_type(request)
        session = http_session.session
        limits = self._access.call_limits(request)
        try:
            mcp_request = self._mcp.read(decode(request.body), by, session.send, session, limits=limits)
        except Fault as e:
            if e.id is None:
                raise
            session.send(error_reply(e))
            return Response(202)
        if mcp_request:
            self._count(request, mcp_request)
            self._run_sse(mcp_request, session, stream)
        return Response(202)

    def _run_sse(self, mcp_request: McpRequest, session: Session, stream: Stream) -> None:
        mode = self._mcp.run_mode(mcp_request)
        session.running[mcp_request.id] = mcp_request

        def done(reply: Json | None, error: Exception | None) -> None:
            if error:
                reply = error_reply(Fault(INTERNAL_ERROR, str(error), None, mcp_request.id))
            if mode != 'listen' or reply:
                session.running.pop(mcp_request.id, None)
            if reply:
                session.send(reply)

        stream.run(self._mcp.run(mcp_request), done, mode in ('slow', 'stream'), waits=mode == 'stream')


class _Channel:
    """Sends the messages of a request to its stream. Drops them while the stream is not open."""

    def __init__(self) -> None:
        self._stream: Stream | None = None

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def send(self, message: Json) -> None:
        """Sends a message. May be called from any thread."""
        stream, data = self._stream, message_frame(message)
        if stream:
            stream.call_soon(lambda: stream.send(data))

    def end(self, reply: Json | None) -> None:
        """Sends the reply after all earlier messages, and ends the stream."""
        stream = self._stream
        assert stream
        if reply:
            self.send(reply)
        stream.call_soon(stream.close)


# ----------------------------------------------------------------------------------------------------------- answers


def _response(reply: Json | None, is_modern: bool) -> Response:
    """The HTTP response for a reply: 202 without one."""
    if reply is None:
        return Response(202)
    return Response(status_of(reply, is_modern), encode_message(reply))


def _refusal(mcp_request: McpRequest, reply: Json | None) -> Response:
    """The response for a refusal that has its own HTTP status: a missing scope (403), too many requests (429)."""
    error = mcp_request.refusal
    assert error
    headers = problem(error, '').headers
    is_tool_result = reply and 'content' in reply.get('result', {})
    text = reply['result']['content'][0]['text'] if reply and is_tool_result else error.detail
    fault = Fault(INVALID_REQUEST, text, {'code': error.code}, mcp_request.id)
    return Response(error.status, encode_message(error_reply(fault)), headers=headers)


def _handle(handle: Handle, request: Request, by: Principal) -> Answer:
    """Calls a handler, and answers a Fault with an error reply. Raises TownError."""
    try:
        return handle(request, by)
    except Fault as e:
        modern = request.field(b'mcp-protocol-version') not in ('', *LEGACY)
        reply = error_reply(e)
        return Response(e.status or status_of(reply, modern), encode_message(reply))


def _forward(answer: Answer, stream: Stream) -> None:
    """Gives the answer of a handler to a request that was answered with `Later`."""

    def done(response: Response | None, error: Exception | None) -> None:
        stream.answer(response or _error_response(error, stream.request))

    if isinstance(answer, Response):
        stream.answer(answer)
    elif isinstance(answer, Slow):
        stream.run(answer.step, done, slow=True, waits=answer.waits)
    else:
        assert not isinstance(answer, Later)
        stream.run(answer, done)


def _error_response(error: Exception | None, request: Request) -> Response:
    """The response for an exception of a step: a problem document (RFC 9457)."""
    if isinstance(error, TownError):
        return problem(error, request.id)
    about = {'request_id': request.id, 'principal': request.caller}
    logger.error(f'request {request.id} failed', exc_info=error, extra=about)
    return problem(Internal('internal error of the server; search its log for the request id'), request.id)


def _auth_timeout(request: Request) -> Response:
    detail = f'the caller could not be authenticated within {_AUTH_SECS:.0f} seconds; try again'
    return problem(Unavailable(detail, code='timeout', retry_after=1), request.id)
