"""One client's connection: reads requests as they arrive, judges them, writes answers, and keeps its deadlines.

A state machine that the server's loop drives: `on_event` when the socket is ready, `answer` when an answer is there,
`expire` now and then. It never waits. Nothing is dispatched that was not received whole; every request gets one
answer; every state has a deadline. An answer may go on (`Stream`) or come later (`Later`): both count as streams, and
have a limit of their own.
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
    MOST_HEAD,
    MOST_LINE,
    Peer,
    Request,
    Response,
    body_length,
    check_host,
    judge_line,
    long_line,
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
NEWCOMER_SECS: Final = 1.0  # for a first request, on a connection made right before the server was told to stop
MOST_UNSENT: Final = 1 << 20  # bytes of an answer that goes on which a client may leave untaken
_MOST_AHEAD: Final = 65536  # bytes that a client may send ahead while its request is under way
_REQUEST_ID: Final = re.compile(r'[A-Za-z0-9._-]{1,128}')


class Application(Protocol):
    """What the server serves.

    `meet` says who is at the other end of a new connection; `begin` judges a request by its head (raises TownError);
    `handle` answers it; `refused` is told of one that came by a wrong name or from a foreign page.
    """

    def meet(self, sock: socket.socket, address: Any) -> Peer: ...
    def refused(self, request: Request, error: TownError) -> None: ...
    def begin(self, request: Request) -> None: ...
    def handle(self, request: Request) -> Answer: ...


class Owner(Loop, Protocol):
    """What a connection needs of its server.

    `streams` counts the answers that go on or come later; `request_ids` are for requests that bring none.
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
    """Stands as the target of a request that was refused by its head."""

    error: TownError


class Connection:
    """One client. Reads a request, has it answered, and goes on; at most one request is under way."""

    __slots__ = ('_body_at', '_buffer', '_closing', '_deadline', '_in_process', '_is_last', '_judged', '_mask', '_out',
                 '_peer_done', '_request', '_request_end', '_server', '_shakes_hands', '_untaken', '_was_answered',
                 'is_busy', 'peer', 'sock', 'stream')  # fmt: skip

    def __init__(self, sock: Sock, peer: Peer, server: Owner) -> None:
        self.sock = sock
        self.peer = peer
        self._shakes_hands = peer.is_tls
        self._server = server
        self._buffer = bytearray()
        self._judged = 0  # bytes of an unfinished head that were found good
        self._request: Request | None = None  # whose head is read, or which is under way
        self.is_busy = False  # whether it is being answered
        self.stream: Stream | None = None  # as which it goes on being answered
        self._in_process = False
        self._body_at = self._request_end = 0
        self._out = memoryview(b'')  # what is still to be written; nothing is read meanwhile
        self._untaken = bytearray()  # of a stream, what comes after that
        self._closing = False  # to be closed once everything is written, or closed
        self._is_last = False  # whether the request that is read, or is next, is the last one
        self._peer_done = False  # the client will send no more
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
        """Reads or writes what can be read or written now."""
        if self._shakes_hands:
            mask = self._shake_hands()
        if mask & OUT:
            self._write()
        if mask & IN and self.sock.fileno() >= 0:
            self._read()
        elif mask & _GONE:
            self.close()

    def _shake_hands(self) -> int:
        """Goes on with a TLS handshake; what is ready then: nothing, or what came with its end."""
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
        self._shakes_hands = False
        self.peer = replace(self.peer, subject=self.sock.subject())
        if self._is_last and self.peer.subject:  # it was judged by settings that have changed meanwhile
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
                self.close()  # a reader that half-closes is rare, one that went away without a reset is not
            elif self.is_busy or self._out:
                self._set_mask(self._mask & ~IN)
            else:
                self.close()
            return
        if self._closing:
            return  # a rejected client is still sending: discarded until it stops or the time is up
        self._buffer += data
        if not self.is_busy:
            self.process()
        elif len(self._buffer) > _MOST_AHEAD:
            self._set_mask(self._mask & ~IN)

    def process(self) -> None:
        """Answers whole requests in the buffer until one is under way or more must arrive."""
        if self._in_process:
            return  # an answer that was there at once; the loop below goes on
        self._in_process = True
        try:
            while self._buffer and not self.is_busy and not self._closing and not self._out:
                if self._request is None and not self._take_head():
                    break
                if len(self._buffer) < self._request_end:
                    break
                self._dispatch()
        except Exception as e:  # a fault of ours must not end the server either
            self.reject(e)
        finally:
            self._in_process = False
        if self.is_busy or self._out or self._closing:
            return
        if self._peer_done:
            self.close()  # what is left in the buffer will never be whole
        else:
            self._set_mask(IN)  # no whole request is left, however much was sent ahead

    def _take_head(self) -> bool:
        """Reads the head of the next request if it is here."""
        buffer = self._buffer
        if not self._judged:
            if buffer.startswith(b'\r\n'):  # an empty line before a request is forgiven (RFC 9112, 2.2)
                del buffer[:2]
            self._deadline = min(self._deadline, time.monotonic() + self._server.limits.head_secs)
        end = buffer.find(b'\r\n\r\n', max(self._judged - 4, 0))
        if end < 0:
            self._judge_partial()
            return False
        if end > MOST_HEAD:
            raise HeadTooLarge(f'the head is over {MOST_HEAD} bytes')
        self._judged = 0
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

    def _judge_partial(self) -> None:
        """Judges each line when its LF has arrived, so that a bad one is answered at once."""
        buffer = self._buffer
        while (end := buffer.find(b'\n', self._judged)) >= 0:
            line = bytes(buffer[self._judged : end])
            if line != b'\r':
                judge_line(line[:-1] if line.endswith(b'\r') else line + b'\n', self._judged == 0)
            self._judged = end + 1
        if len(buffer) - self._judged > MOST_LINE + 2:
            raise long_line(self._judged == 0)
        if len(buffer) > MOST_HEAD:
            raise HeadTooLarge(f'the head is over {MOST_HEAD} bytes')

    def _begin(self, request: Request) -> None:
        """Judges a request by its head. One whose body is here already is refused without closing the connection."""
        expected = request.fields.get(b'expect')
        if expected is not None and expected.lower() != b'100-continue':
            raise ExpectationFailed(f'Expect: {expected[:40]!r} can not be met')
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
        """Answers what is not read as a request, and closes: what follows can't be told from a body."""
        method = 'HEAD' if self._buffer.startswith(b'HEAD ') else '-'  # whose answer has no body
        number = next(self._server.request_ids)
        nobody = Request(method, '-', '', 1, {}, id=number, peer=self.peer, began=time.monotonic())
        request = self._request = self._request or nobody
        self._closing = True
        self.answer(request, self._server.failed(request, error))

    # ------------------------------------------------------------------------------------------------- writing

    def answer(self, request: Request, response: Response) -> None:
        """Sends the answer of the request under way, once; a later one (after a timeout) is dropped."""
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
        """Sends the last bytes of an answer, and turns to the next request."""
        if self.sock.fileno() < 0:
            return
        self._deadline = time.monotonic() + self._server.limits.idle_secs
        self._was_answered = True
        self.feed(data)

    def feed(self, data: bytes) -> None:
        """Sends data after what is still to be written."""
        if not self._out:
            self._send(data)
            return
        self._untaken += data
        if len(self._untaken) > MOST_UNSENT:
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
        if not self._out and self._untaken:
            self._out, self._untaken = memoryview(bytes(self._untaken)), bytearray()
        if self._out:
            if not self._mask & OUT or (self.stream and sent):
                self._deadline = time.monotonic() + self._server.limits.write_secs
                self._set_mask(OUT)
        elif self.stream:
            self._set_mask(IN if len(self._buffer) <= _MOST_AHEAD else 0)
            self.stream.taken()
        elif self._closing or (self._peer_done and not self._buffer):
            self._linger()
        elif self._mask & OUT:
            self._set_mask(IN if len(self._buffer) <= _MOST_AHEAD else 0)
            limits = self._server.limits
            self._deadline = time.monotonic() + (limits.body_secs if self._request else limits.idle_secs)
            self.process()

    def _linger(self) -> None:
        """Closes without a reset: our side first; what the client still sends is dropped for a short while."""
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
            # HTTP/1.0 knows no chunks: the answer ends with the connection
            request.fields = {**request.fields, b'connection': b'close'}
        self._send(render_response(response, request, not request.keeps_alive))
        self._start(request, response.stream, stream)

    def wait(self, request: Request, later: Later) -> None:
        """Has a request answered later."""
        stream = self._open_stream(request, later)
        if stream is not None:
            request.deadline = time.monotonic() + later.seconds
            self._start(request, later.start, stream)

    def _start(self, request: Request, start: Callable[[Stream], None], stream: Stream) -> None:
        try:
            start(stream)
        except Exception as e:  # a fault of ours must not end the server
            self._server.failed(request, e)
            self.close()

    def _open_stream(self, request: Request, response: Response | Later) -> Stream | None:
        """A stream, if there may be one more; else the request is told so."""
        server = self._server
        if server.streams >= server.limits.streams or server.draining:
            what = 'the server stops' if server.draining else f'{server.streams} streams are open'
            busy = Unavailable(f'{what}; ask again soon', code='too-many-streams', retry_after=5)
            self.answer(request, problem(busy, request.id))
            return None
        server.streams += 1
        self.stream = Stream(self, server, request, response)
        return self.stream

    def end_stream(self, data: bytes) -> None:
        """Ends an answer that goes on, with its last bytes."""
        stream = self._drop_stream()
        self._end_request(stream.request)
        self._conclude(data)
        self.process()

    def end_wait(self, response: Response) -> None:
        """Gives the answer that was to come later."""
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
        """Ends what has taken too long: a head or body with 408, an operation with 503, anything else by closing."""
        if self.stream:
            self.stream.ask_again(now)
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
        """The server stops: as `drain`, but who has just come and is about to ask gets a moment for it."""
        if self._was_answered or not self._is_idle:
            self.drain()
        else:
            self._deadline = min(self._deadline, time.monotonic() + NEWCOMER_SECS)

    def drain(self) -> None:
        """The server stops: a request that has arrived is still answered, a connection without one is closed."""
        if self.stream:
            self.stream.finish()
        if self._is_idle and not self._shakes_hands:
            self._read()
        if self._is_idle:
            self.close()

    def renew(self) -> None:
        """Has a client with a certificate connect again, after the answer to what it has begun to say: it may not be
        let in any more. Of one that still shakes hands it is not known yet whether it has one.
        """
        if not (self.peer.subject or self._shakes_hands):
            return
        self._is_last = True
        if self._shakes_hands:
            return
        self.drain()
        if self._request is None and not self._buffer:
            self._closing = True

    def break_off(self) -> None:
        """The server ends now: a request that is still under way is told so, and that its outcome is unknown."""
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
        """Closes at once. A request that is under way goes on; its answer is dropped."""
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
