"""One client's connection: reads requests as they arrive, checks them, writes the answers and enforces deadlines.

`Connection` is a state machine that never blocks. The event loop of `server` drives it: `on_event` when the socket is
ready, `answer` when an answer is there, `expire` now and then. A request is dispatched only once all of it has arrived;
every request gets exactly one answer; every state has a deadline.

An answer may also be a stream (`Response.stream`) or come later (`replies.Later`). Both are a `replies.Stream`, and the
server limits how many are open.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from ..errors import ExpectationFailed, HeadTooLarge, RequestTimeout, TownError, Unavailable
from ..settings import LimitSettings
from .http1 import (
    MAX_HEAD,
    MAX_LINE,
    Peer,
    Request,
    Response,
    body_length,
    check_host,
    line_too_long,
    match_line,
    parse_head,
    problem,
    render_response,
)
from .replies import Answer, Later, Loop, Stream

if TYPE_CHECKING:
    from .tls import TlsSocket  # which imports ssl: only where TLS is on

IN: Final = select.POLLIN
OUT: Final = select.POLLOUT
_GONE: Final = select.POLLERR | select.POLLHUP

Sock: TypeAlias = 'socket.socket | TlsSocket'

LINGER_SECS: Final = 2.0
NEWCOMER_SECS: Final = 1.0  # for the first request of a connection that was made just before the server stops
MAX_UNSENT: Final = 1 << 20  # bytes of a stream that may wait for a slow client
_MAX_AHEAD: Final = 65536  # bytes that a client may send ahead (pipelining) while its request is being answered
_REQUEST_ID: Final = re.compile(r'[A-Za-z0-9._-]{1,128}')


class Application(Protocol):
    """What the server serves. `rest.app` implements it.

    `meet` identifies the peer of a new connection. `begin` checks a request by its head, before the body is read
    (raises TownError). `handle` answers it. `refused` is called for a request with a wrong Host or a foreign Origin.
    """

    def meet(self, sock: socket.socket, address: Any) -> Peer: ...
    def refused(self, request: Request, error: TownError) -> None: ...
    def begin(self, request: Request) -> None: ...
    def handle(self, request: Request) -> Answer: ...


class Owner(Loop, Protocol):
    """What a connection needs of its server.

    `streams` counts open streams; `request_ids` yields ids for requests without X-Request-ID.
    """

    application: Application
    limits: LimitSettings
    allowed_hosts: frozenset[str]
    allowed_origins: frozenset[str]
    connections: set[Connection]
    draining: bool
    streams: int
    request_ids: Iterator[str]

    def watch(self, sock: Sock, mask: int, handler: Callable[[int], None]) -> None: ...
    def modify(self, sock: Sock, mask: int) -> None: ...
    def unwatch(self, sock: Sock) -> None: ...
    def run(self, connection: Connection, request: Request) -> None: ...
    def log(self, request: Request, response: Response) -> None: ...
    def turned_away(self, peer: Peer, why: str) -> None: ...


@dataclass(slots=True)
class _Refused:
    """The target of a request that was refused by its head."""

    error: TownError


class Connection:
    """One client's connection. At most one request is under way; further ones wait in the buffer."""

    __slots__ = ('_body_at', '_buffer', '_checked', '_closing', '_deadline', '_is_handshaking', '_is_last',
                 '_is_processing', '_mask', '_out', '_peer_done', '_pending', '_request', '_request_end', '_server',
                 '_was_answered', 'is_busy', 'peer', 'sock', 'stream')  # fmt: skip

    def __init__(self, sock: Sock, peer: Peer, server: Owner) -> None:
        self.sock = sock
        self.peer = peer
        self._is_handshaking = peer.is_tls
        self._server = server
        self._buffer = bytearray()
        self._checked = 0  # bytes of an incomplete head that are checked and valid
        self._request: Request | None = None  # the current one, once its head is read
        self.is_busy = False  # whether the request is being answered
        self.stream: Stream | None = None  # the open stream that answers the request
        self._is_processing = False  # whether `process` is running
        self._body_at = self._request_end = 0  # offsets in the buffer
        self._out = memoryview(b'')  # bytes to write; no request is read before they are written
        self._pending = bytearray()  # bytes of a stream to write after `_out`
        self._closing = False  # whether it is closed, or will be once everything is written
        self._is_last = False  # whether the current or next request is the last one
        self._peer_done = False  # whether the client has closed its side: it will send no more
        self._mask = IN
        self._deadline = time.monotonic() + server.limits.head_secs
        self._was_answered = False
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.watch(sock, IN, self.on_event)
        server.connections.add(self)

    # ------------------------------------------------------------------------------------------------- reading

    def on_event(self, mask: int) -> None:
        """Handles a poll event: continues the handshake, writes, reads or closes."""
        if self._is_handshaking:
            mask = self._handshake()
        if mask & OUT:
            self._write()
        if mask & IN and self.sock.fileno() >= 0:
            self._read()
        elif mask & _GONE:
            self.close()

    def _handshake(self) -> int:
        """Continues the TLS handshake. Returns the events to handle next: 0, or IN once the handshake is complete."""
        assert not isinstance(self.sock, socket.socket)
        try:
            wanted = self.sock.handshake()
        except OSError as e:
            self._server.turned_away(self.peer, self.sock.reason(e))
            self.close()
            return 0
        self._set_mask(wanted or IN)
        if wanted:
            return 0
        self._is_handshaking = False
        self.peer = replace(self.peer, subject=self.sock.subject())
        if self._is_last and self.peer.subject:  # the settings changed during the handshake: see `renew`
            self.close()
            return 0
        return IN

    def _read(self) -> None:
        try:
            data = self.sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not data:
            self._peer_done = True
            if self.stream:
                self.close()  # nearly always the reader has gone away; hardly any reader only closes its sending side
            elif self.is_busy or self._out:
                self._set_mask(self._mask & ~IN)
            else:
                self.close()
            return
        if self._closing:
            return  # a rejected client is still sending: discard it until it stops or the deadline passes
        self._buffer += data
        if not self.is_busy:
            self.process()
        elif len(self._buffer) > _MAX_AHEAD:
            self._set_mask(self._mask & ~IN)

    def process(self) -> None:
        """Dispatches the requests in the buffer, until one is being answered or none is complete."""
        if self._is_processing:
            return  # called again for an answer that was ready at once; the loop below continues
        self._is_processing = True
        try:
            while self._buffer and not self.is_busy and not self._closing and not self._out:
                if self._request is None and not self._take_head():
                    break
                if len(self._buffer) < self._request_end:
                    break
                self._dispatch()
        except Exception as e:  # TownError, or a bug, which must not end the server
            self.reject(e)
        finally:
            self._is_processing = False
        if self.is_busy or self._out or self._closing:
            return
        if self._peer_done:
            self.close()  # the rest of the buffer will never become a complete request
        else:
            self._set_mask(IN)  # the buffer contains no complete request, however much was sent ahead

    def _take_head(self) -> bool:
        """Reads the head of the next request. Returns whether it was complete."""
        buffer = self._buffer
        if not self._checked:
            if buffer.startswith(b'\r\n'):  # one empty line before a request is allowed (RFC 9112, 2.2)
                del buffer[:2]
            self._deadline = min(self._deadline, time.monotonic() + self._server.limits.head_secs)
        end = buffer.find(b'\r\n\r\n', max(self._checked - 4, 0))
        if end < 0:
            self._check_partial_head()
            return False
        if end > MAX_HEAD:
            raise HeadTooLarge(f'the head is over {MAX_HEAD} bytes')
        self._checked = 0
        request = parse_head(bytes(buffer[:end]))
        request.began = time.monotonic()
        given = request.field(b'x-request-id')
        request.id = given if given and _REQUEST_ID.fullmatch(given) else next(self._server.request_ids)
        request.peer = self.peer
        self._request = request
        self._body_at = end + 4
        self._request_end = self._body_at + body_length(request, self._server.limits.body_bytes)
        self._begin(request)
        return True

    def _check_partial_head(self) -> None:
        """Checks each line of an incomplete head once its LF has arrived, so that a bad one is refused at once."""
        buffer = self._buffer
        while (end := buffer.find(b'\n', self._checked)) >= 0:
            line = bytes(buffer[self._checked : end])
            if line != b'\r':
                match_line(line[:-1] if line.endswith(b'\r') else line + b'\n', self._checked == 0)
            self._checked = end + 1
        if len(buffer) - self._checked > MAX_LINE + 2:
            raise line_too_long(self._checked == 0)
        if len(buffer) > MAX_HEAD:
            raise HeadTooLarge(f'the head is over {MAX_HEAD} bytes')

    def _begin(self, request: Request) -> None:
        """Checks a request by its head. Raises TownError, which closes the connection.

        If the body is here already, the connection can stay open: the error is then sent as a normal answer.
        """
        expected = request.fields.get(b'expect')
        if expected is not None and expected.lower() != b'100-continue':
            raise ExpectationFailed(f'Expect: {expected[:40]!r} is not supported; only 100-continue is')
        waits = len(self._buffer) < self._request_end
        try:
            self._check_host(request)
            self._server.application.begin(request)
        except TownError as e:
            if waits:
                raise
            request.target = _Refused(e)
        self._deadline = time.monotonic() + self._server.limits.body_secs
        if waits and expected and request.minor:
            self._send(b'HTTP/1.1 100 Continue\r\n\r\n')

    def _check_host(self, request: Request) -> None:
        try:
            check_host(request, self._server.allowed_hosts, self._server.allowed_origins)
        except TownError as e:
            self._server.application.refused(request, e)
            raise

    def _dispatch(self) -> None:
        request = self._request
        assert request is not None
        request.body = bytes(self._buffer[self._body_at : self._request_end])
        del self._buffer[: self._request_end]
        self.is_busy = True
        self._deadline = float('inf')
        if isinstance(request.target, _Refused):
            self.answer(request, problem(request.target.error, request.id))
        else:
            self._server.run(self, request)

    def reject(self, error: Exception) -> None:
        """Answers with an error and closes: after a bad request nobody can tell where the next one begins."""
        method = 'HEAD' if self._buffer.startswith(b'HEAD ') else '-'  # the answer to HEAD has no body
        number = next(self._server.request_ids)
        unparsed = Request(method, '-', '', 1, {}, id=number, peer=self.peer, began=time.monotonic())
        request = self._request = self._request or unparsed
        self._closing = True
        self.answer(request, self._server.failed(request, error))

    # ------------------------------------------------------------------------------------------------- writing

    def answer(self, request: Request, response: Response) -> None:
        """Sends the answer to the current request. A second answer, after a timeout for example, is dropped."""
        if request.answered or self._request is not request:
            return
        if response.stream and request.method != 'HEAD':
            self._begin_stream(request, response)
            return
        request.answered = True
        self._end_request(request)
        try:
            data = render_response(response, request, self._closing)
        except ValueError as e:
            response = self._server.failed(request, e)
            data = render_response(response, request, self._closing)
        self._server.log(request, response)
        self._conclude(data)

    def _end_request(self, request: Request) -> None:
        self._request, self.is_busy = None, False
        if not request.keeps_alive or self._server.draining or self._is_last:
            self._closing = True
        if self._closing:
            self._buffer.clear()

    def _conclude(self, data: bytes) -> None:
        """Sends the last bytes of an answer and starts the deadline for the next request."""
        if self.sock.fileno() < 0:
            return
        self._deadline = time.monotonic() + self._server.limits.idle_secs
        self._was_answered = True
        self.feed(data)

    def feed(self, data: bytes) -> None:
        """Sends data after the bytes that still wait. Closes the connection if more than MAX_UNSENT bytes wait."""
        if not self._out:
            self._send(data)
            return
        self._pending += data
        if len(self._pending) > MAX_UNSENT:
            self.close()

    def _send(self, data: bytes) -> None:
        self._out = memoryview(data)
        self._write()

    def _write(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        self._out = self._out[sent:]
        if not self._out and self._pending:
            self._out, self._pending = memoryview(bytes(self._pending)), bytearray()
        if self._out:
            if not self._mask & OUT or (self.stream and sent):
                self._deadline = time.monotonic() + self._server.limits.write_secs
                self._set_mask(OUT)
        elif self.stream:
            self._set_mask(IN if len(self._buffer) <= _MAX_AHEAD else 0)
            self.stream.taken()
        elif self._closing or (self._peer_done and not self._buffer):
            self._linger()
        elif self._mask & OUT:
            self._set_mask(IN if len(self._buffer) <= _MAX_AHEAD else 0)
            limits = self._server.limits
            self._deadline = time.monotonic() + (limits.body_secs if self._request else limits.idle_secs)
            self.process()

    def _linger(self) -> None:
        """Closes our side first and discards what the client still sends, for LINGER_SECS.

        Closing both sides with unread input would reset the connection, and the client could lose the answer.
        """
        if self._peer_done:
            self.close()
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._closing = True
        self._deadline = time.monotonic() + LINGER_SECS
        self._set_mask(IN)

    # ------------------------------------------------------------------------------------------------- streams

    def _begin_stream(self, request: Request, response: Response) -> None:
        assert response.stream
        stream = self._open_stream(request, response)
        if stream is None:
            return
        request.answered = True
        if not request.minor:
            # HTTP/1.0 has no chunked coding: closing the connection ends the answer
            request.fields = {**request.fields, b'connection': b'close'}
        self._send(render_response(response, request, not request.keeps_alive))
        self._start(request, response.stream, stream)

    def wait(self, request: Request, later: Later) -> None:
        """Starts an answer that comes later."""
        stream = self._open_stream(request, later)
        if stream is not None:
            request.deadline = time.monotonic() + later.seconds
            self._start(request, later.start, stream)

    def _start(self, request: Request, start: Callable[[Stream], None], stream: Stream) -> None:
        try:
            start(stream)
        except Exception as e:  # a bug must not end the server
            self._server.failed(request, e)
            self.close()

    def _open_stream(self, request: Request, response: Response | Later) -> Stream | None:
        """A new stream. If the server stops or has too many, answers with an error and returns None."""
        server = self._server
        if server.streams >= server.limits.streams or server.draining:
            reason = 'the server is stopping' if server.draining else f'{server.streams} streams are open'
            busy = Unavailable(f'{reason}; try again soon', code='too-many-streams', retry_after=5)
            self.answer(request, problem(busy, request.id))
            return None
        server.streams += 1
        self.stream = Stream(self, server, request, response)
        return self.stream

    def end_stream(self, data: bytes) -> None:
        """Ends a stream with its last bytes and continues with the next request."""
        stream = self._drop_stream()
        self._end_request(stream.request)
        self._conclude(data)
        self.process()

    def end_wait(self, response: Response) -> None:
        """Sends an answer that was to come later and continues with the next request."""
        stream = self._drop_stream()
        self.answer(stream.request, response)
        self.process()

    def _drop_stream(self) -> Stream:
        stream, self.stream = self.stream, None
        assert stream
        self._server.streams -= 1
        if isinstance(stream.response, Response):
            self._server.log(stream.request, stream.response)
        stream.ended()
        return stream

    # ------------------------------------------------------------------------------------------------- ending

    def expire(self, now: float) -> None:
        """Enforces the deadlines: 408 for a head or body, 503 for an operation; anything else is closed.

        Also lets an open stream send its heartbeat and check its credential again.
        """
        if self.stream:
            self.stream.reauthenticate(now)
        request = self._request
        if self.stream and not self._out:
            self.stream.expire(now)
        elif request is not None and self.is_busy and not self.stream:
            if request.deadline and now > request.deadline:
                self._closing = True
                detail = 'the operation took too long; whether the change was made is not known'
                self.answer(request, problem(Unavailable(detail, code='timeout', retry_after=1), request.id))
        elif now > self._deadline:
            if not self._closing and not self._out and (self._buffer or request):
                self.reject(RequestTimeout('the request did not arrive in time'))
            else:
                self.close()

    def wind_down(self) -> None:
        """Called when the server shuts down. Drains, but gives a new client NEWCOMER_SECS to send its first request."""
        if self._was_answered or not self._is_idle:
            self.drain()
        else:
            self._deadline = min(self._deadline, time.monotonic() + NEWCOMER_SECS)

    def drain(self) -> None:
        """Ends the stream, if there is one; closes the connection unless a request has arrived, which is answered."""
        if self.stream:
            self.stream.finish()
        if self._is_idle and not self._is_handshaking:
            self._read()
        if self._is_idle:
            self.close()

    def renew(self) -> None:
        """Makes a client with a certificate connect again, because new settings may no longer accept its certificate.

        A request that has begun to arrive is still answered. During a handshake it is unknown whether the client has a
        certificate, so `_handshake` decides when it is complete.
        """
        if not (self.peer.subject or self._is_handshaking):
            return
        self._is_last = True
        if self._is_handshaking:
            return
        self.drain()
        if self._request is None and not self._buffer:
            self._closing = True

    def break_off(self) -> None:
        """Ends the connection as the server exits. Answers a request under way with 503: its outcome is unknown."""
        if self._request is not None and self.is_busy:
            detail = 'the server was stopped; whether the change was made is not known'
            self.answer(self._request, problem(Unavailable(detail, code='stopped', retry_after=5), self._request.id))
        self.close()

    @property
    def has_unsent(self) -> bool:
        return bool(self._out)

    @property
    def _is_idle(self) -> bool:
        return self._request is None and not (self._buffer or self._out or self._closing)

    def close(self) -> None:
        """Closes at once. A request under way continues, and its answer is dropped."""
        if self.sock.fileno() < 0:
            return
        self._closing = True
        if self.stream:
            self._drop_stream()
        self._server.connections.discard(self)
        self._server.unwatch(self.sock)
        self.sock.close()

    def _set_mask(self, mask: int) -> None:
        if mask != self._mask and self.sock.fileno() >= 0:
            self._mask = mask
            self._server.modify(self.sock, mask)
