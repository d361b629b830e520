"""The HTTP server core: connections, limits, deadlines, drain.

`http.server` gives the socket and the names of things; its parser, its threads and its lack of limits are replaced.
One thread owns every connection and an event loop (epoll; poll elsewhere). It parses what has arrived whole, starts
the request's step, and hands the step's Redis commands to a `Link`, so that whatever is ready together shares one
write to Redis; it never waits for Redis, nor for a client. Operations that are slow (processes, waiting) run on
threads of their own.

Nothing is dispatched that was not received whole; every request gets one answer; every state has a deadline.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http.server import HTTPServer
from typing import Any, Final, Protocol

from . import wire
from .config import Limits
from .errors import (
    ExpectationFailed,
    HeadTooLarge,
    Internal,
    RequestTimeout,
    TownError,
    Unavailable,
    UriTooLong,
    UsageError,
)
from .http1 import (
    MOST_HEAD,
    MOST_LINE,
    Request,
    Response,
    body_length,
    check_host,
    judge_line,
    parse_head,
    problem,
    render,
)
from .model import rfc3339
from .store import Command, Store

LINGER_SECS: Final = 2.0
MOST_SLOW: Final = 128  # slow operations at once
_REQUEST_ID: Final = re.compile(r'[A-Za-z0-9._-]{1,128}')
_IN, _OUT, _GONE = select.POLLIN, select.POLLOUT, select.POLLERR | select.POLLHUP

Answer = Response | Generator[Command, Any, Response]


class Application(Protocol):
    """What the server serves. `begin` judges a request by its head (raises TownError); `handle` answers it."""

    def begin(self, request: Request) -> None: ...
    def handle(self, request: Request) -> Answer: ...
    def is_slow(self, request: Request) -> bool: ...


# ------------------------------------------------------------------------------------------------------ connections


class Connection:
    """One client. Reads a request, has it answered, and goes on; at most one request is under way."""

    __slots__ = ('_body_at', '_buffer', '_closing', '_deadline', '_judged', '_mask', '_out', '_peer_done', '_request',
                 '_request_end', '_server', 'address', 'is_busy', 'sock')  # fmt: skip

    def __init__(self, sock: socket.socket, address: Any, server: Server) -> None:
        self.sock = sock
        self.address = address
        self._server = server
        self._buffer = bytearray()
        self._judged = 0  # bytes of an unfinished head that were found good
        self._request: Request | None = None  # whose head is read, or which is under way
        self.is_busy = False  # whether it is being answered
        self._body_at = self._request_end = 0
        self._out = b''
        self._closing = False  # to be closed once everything is written
        self._peer_done = False  # the client will send no more
        self._mask = _IN
        self._deadline = time.monotonic() + server.limits.head_secs
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.watch(sock, _IN, self.on_event)
        server.connections.add(self)

    @property
    def is_idle(self) -> bool:
        return self._request is None and not self._buffer and not self._out

    # ------------------------------------------------------------------------------------------------- reading

    def on_event(self, mask: int) -> None:
        if mask & _OUT:
            self._write()
        if mask & _IN and self.sock.fileno() >= 0:
            self._read()
        elif mask & _GONE:
            self.close()

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
            if self.is_busy or self._out:
                self._set_mask(self._mask & ~_IN)
            else:
                self.close()
            return
        if self._closing:
            return  # a rejected client is still sending: discarded until it stops or the time is up
        self._buffer += data
        if self.is_busy:
            if len(self._buffer) > 65536:
                self._set_mask(self._mask & ~_IN)
            return
        self.process()

    def process(self) -> None:
        """Answers whole requests in the buffer until one is under way or more must arrive."""
        try:
            while self._buffer and not self.is_busy and not self._closing and not self._out:
                if self._request is None and not self._take_head():
                    return
                if len(self._buffer) < self._request_end:
                    return
                self._dispatch()
        except TownError as e:
            self.reject(e)
        finally:
            if self._peer_done and not self.is_busy and not self._out:
                self.close()  # what is left in the buffer will never be whole

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
        request.id = given if _REQUEST_ID.fullmatch(given) else os.urandom(8).hex()
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
            raise (
                UriTooLong(f'the request line is over {MOST_LINE} bytes')
                if not self._judged
                else HeadTooLarge(f'a header field is over {MOST_LINE} bytes')
            )
        if len(buffer) > MOST_HEAD:
            raise HeadTooLarge(f'the head is over {MOST_HEAD} bytes')

    def _begin(self, request: Request) -> None:
        """Judges a request by its head. One whose body is here already is refused without closing the connection."""
        expected = request.fields.get(b'expect')
        if expected is not None and expected.lower() != b'100-continue':
            raise ExpectationFailed(f'Expect: {expected[:40]!r} can not be met')
        try:
            check_host(request, self._server.allowed_hosts)
            self._server.application.begin(request)
        except TownError as e:
            if len(self._buffer) < self._request_end:
                raise
            request.target = _Refused(e)
        waits = len(self._buffer) < self._request_end
        self._deadline = time.monotonic() + self._server.limits.body_secs
        if waits and expected and request.minor:
            self._send(b'HTTP/1.1 100 Continue\r\n\r\n')

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

    def reject(self, error: TownError) -> None:
        """Answers what could not be read as a request, and closes: what follows can't be told from a body."""
        request = self._request
        request_id = request.id if request and request.id else os.urandom(8).hex()
        if request is None:
            request = Request('-', '-', '', 1, {}, id=request_id, began=time.monotonic())
        self._request = request
        self._closing = True
        self.answer(request, problem(error, request_id))

    # ------------------------------------------------------------------------------------------------- writing

    def answer(self, request: Request, response: Response) -> None:
        """Sends the answer of the request under way, once; a later one (after a timeout) is dropped."""
        if request.answered or self._request is not request:
            return
        request.answered = True
        self._server.log(request, response, self.address)
        self._request, self.is_busy = None, False
        if self.sock.fileno() < 0:
            return
        if self._closing:
            self._buffer.clear()
        if not request.keeps_alive or self._server.draining:
            self._closing = True
        self._deadline = time.monotonic() + self._server.limits.idle_secs
        try:
            data = render(response, request.id, request.method == 'HEAD', self._closing)
        except ValueError:
            traceback.print_exc()
            data = render(
                problem(Internal('the answer could not be sent'), request.id), request.id, False, self._closing
            )
        self._send(data)
        if not self._closing and not self._out and not self._mask & _IN and not self._peer_done:
            self._set_mask(self._mask | _IN)

    def _send(self, data: bytes) -> None:
        self._out += data
        self._write()

    def _write(self) -> None:
        try:
            sent = self.sock.send(self._out) if self._out else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        self._out = self._out[sent:]
        if self._out:
            if not self._mask & _OUT:
                self._deadline = time.monotonic() + self._server.limits.write_secs
                self._set_mask(_OUT)
            return
        if self._closing or (self._peer_done and not self._buffer):
            self._linger()
        elif self._mask & _OUT:
            self._set_mask(_IN)
            self._deadline = time.monotonic() + self._server.limits.idle_secs
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
        self._set_mask(_IN)

    # ------------------------------------------------------------------------------------------------- ending

    def expire(self, now: float) -> None:
        """Ends what has taken too long: a head or body with 408, an operation with 503, anything else by closing."""
        request = self._request
        if request is not None and self.is_busy:
            if request.deadline and now > request.deadline and not request.answered:
                detail = 'the operation took too long; whether the change was made is not known'
                self._closing = True
                self.answer(request, problem(Unavailable(detail, code='timeout', retry_after=1), request.id))
        elif now > self._deadline:
            if not self._closing and not self._out and (self._buffer or request):
                self.reject(RequestTimeout('the request did not arrive in time'))
            else:
                self.close()

    def close_if_idle(self) -> None:
        if self.is_idle:
            self.close()

    def close(self) -> None:
        if self in self._server.connections:
            self._server.connections.discard(self)
            self._server.unwatch(self.sock)
            self.sock.close()

    def _set_mask(self, mask: int) -> None:
        if mask != self._mask and self.sock.fileno() >= 0:
            self._mask = mask
            self._server.modify(self.sock, mask)


@dataclass(slots=True)
class _Refused:
    """Stands as the target of a request that was refused by its head."""

    error: TownError


# ----------------------------------------------------------------------------------------------------------- server


class Server(HTTPServer):
    """Serves an application on one address until a signal ends it.

    `connections` are those that are open, `draining` says that no more are taken. Raises UsageError when it can't bind.
    """

    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(
        self,
        address: tuple[str, int],
        application: Application,
        store: Store,
        limits: Limits,
        allowed_hosts: frozenset[str] = frozenset(),
        request_timeout: float = 30.0,
        access_log: str = 'text',
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
        self.application = application
        self.limits = limits
        self.allowed_hosts = allowed_hosts
        self.connections: set[Connection] = set()
        self.draining = False
        self._store = store
        self._timeout = request_timeout
        self._access_log = access_log
        self._lines: list[str] = []
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._poll = select.epoll() if hasattr(select, 'epoll') else select.poll()
        self._soon: deque[Callable[[], None]] = deque()
        self._slow = 0
        self._signals = 0
        self._swept = 0.0
        self._paused_until = 0.0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.link = wire.Link(store.address, self.call_soon, self._watch_redis, prepare)
        super().__init__(address, Connection, bind_and_activate=False)  # type: ignore[arg-type]
        try:
            self.server_bind()
            self.server_activate()
        except OSError as e:
            raise UsageError(f'{address[0]}:{address[1]}: {e.strerror}; choose another with --bind or --port') from None

    def server_bind(self) -> None:
        """Binds, without the look-up of our own name that http.server makes here."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    # --------------------------------------------------------------------------------------------------- the loop

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT has drained it; a second one ends it at once. Call on the main thread."""
        self.socket.setblocking(False)
        self.watch(self.socket, _IN, self._accept)
        self._register(self._wake_read, _IN, self._woken)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.link.reconnect()
        try:
            while not self._is_over():
                self._turn()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._end()

    def _turn(self) -> None:
        busy = self._slow or (self.link.is_up and self.link.is_waiting)
        timeout = 0.1 if busy or self.draining or self._paused_until else 1.0
        events = self._poll.poll(timeout if isinstance(self._poll, select.epoll) else timeout * 1000)
        for descriptor, mask in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(mask)
        while self._soon:
            self._soon.popleft()()
        self.link.flush()
        now = time.monotonic()
        if now - self._swept >= (0.1 if busy else 1.0):
            self._sweep(now)
        if self._lines:
            sys.stderr.write(''.join(self._lines))
            sys.stderr.flush()
            self._lines.clear()

    def _sweep(self, now: float) -> None:
        """Ends what is past its deadline."""
        self._swept = now
        self.link.expire(now)
        for connection in list(self.connections):
            connection.expire(now)
        if self._paused_until and now > self._paused_until:
            self._paused_until = 0.0
            self.watch(self.socket, _IN, self._accept)

    def _is_over(self) -> bool:
        if self._signals and not self.draining:
            self._drain()
        if not self.draining:
            return False
        return self._signals > 1 or not self.connections or time.monotonic() > self._drain_until

    def _drain(self) -> None:
        """Takes no more connections; those without a request close, the others once they are answered."""
        self.draining = True
        self._drain_until = time.monotonic() + self.limits.drain_secs
        self.unwatch(self.socket)
        self.socket.close()
        for connection in list(self.connections):
            connection.close_if_idle()

    def _end(self) -> None:
        for connection in list(self.connections):
            connection.close()
        self.link.close()
        self.socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signals += 1

    # ------------------------------------------------------------------------------------------------ descriptors

    def watch(self, sock: socket.socket, mask: int, handler: Callable[[int], None]) -> None:
        self._register(sock.fileno(), mask, handler)

    def _register(self, descriptor: int, mask: int, handler: Callable[[int], None]) -> None:
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, mask)

    def modify(self, sock: socket.socket, mask: int) -> None:
        self._poll.modify(sock.fileno(), mask)

    def unwatch(self, sock: socket.socket) -> None:
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._poll.unregister(sock.fileno())

    def _watch_redis(self, sock: socket.socket | None, want_write: bool) -> None:
        descriptor = self._redis_descriptor
        if sock is None:
            if self._handlers.pop(descriptor, None) is not None:
                self._poll.unregister(descriptor)
        elif sock.fileno() in self._handlers:
            self._poll.modify(sock.fileno(), _IN | _OUT if want_write else _IN)
        else:
            self._redis_descriptor = sock.fileno()
            self._register(sock.fileno(), _IN, lambda _mask: self.link.on_readable())

    _redis_descriptor = -1

    def call_soon(self, what: Callable[[], None]) -> None:
        """Has the loop's thread do something. Any thread may call."""
        self._soon.append(what)
        try:
            os.write(self._wake_write, b'.')
        except (BlockingIOError, OSError):
            pass  # the loop is awake anyway, or over

    def _woken(self, _mask: int) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass

    def _accept(self, _mask: int) -> None:
        for _ in range(64):
            try:
                sock, address = self.get_request()
            except BlockingIOError:
                return
            except OSError:
                self._paused_until = time.monotonic() + 0.1  # out of descriptors, say: clients wait in the backlog
                self.unwatch(self.socket)
                return
            over = len(self.connections) - self.limits.connections
            if over >= 64:
                sock.close()
                continue
            connection = Connection(sock, address, self)
            if over >= 0:
                connection.reject(Unavailable('too many connections', code='too-many-connections', retry_after=1))

    # --------------------------------------------------------------------------------------------------- requests

    def run(self, connection: Connection, request: Request) -> None:
        """Has a request answered: at once, with the replies of Redis, or on a thread of its own if it is slow."""
        try:
            answer = self.application.handle(request)
        except Exception as e:  # a request must not end the server
            connection.answer(request, self._failed(request, e))
            return
        if isinstance(answer, Response):
            connection.answer(request, answer)
        elif self.application.is_slow(request):
            self._run_slow(connection, request, answer)
        else:
            self._advance(connection, request, answer, lambda: next(answer))

    def _advance(
        self,
        connection: Connection,
        request: Request,
        step: Generator[Command, Any, Response],
        go: Callable[[], Command],
    ) -> None:
        """Runs a step to its next command, or to its end."""
        try:
            command = go()
        except StopIteration as end:
            self._finish(connection, request, end.value)
            return
        except Exception as e:  # as above
            self._finish(connection, request, self._failed(request, e))
            return

        def resume(reply: Any) -> None:
            try:
                value = command.result(reply)
            except TownError as e:
                error = e
                self._advance(connection, request, step, lambda: step.throw(error))
            else:
                self._advance(connection, request, step, lambda: step.send(value))

        whole = (lambda: command.pack(self._store, whole=True)) if command.script else None
        self.link.submit(wire.Request(command.pack(self._store), whole, resume))

    def _finish(self, connection: Connection, request: Request, response: Response) -> None:
        connection.answer(request, response)
        connection.process()

    def _run_slow(self, connection: Connection, request: Request, step: Generator[Command, Any, Response]) -> None:
        if self._slow >= MOST_SLOW:
            busy = Unavailable(f'{MOST_SLOW} slow operations are under way', code='busy', retry_after=1)
            connection.answer(request, problem(busy, request.id))
            return
        self._slow += 1
        request.deadline = request.began + self._timeout

        def done(response: Response) -> None:
            self._slow -= 1
            self._finish(connection, request, response)

        def work() -> None:
            try:
                response = self._store.run(step)
            except Exception as e:  # as above
                response = self._failed(request, e)
            finally:
                self._store.close()
            self.call_soon(lambda: done(response))

        threading.Thread(target=work, name=f'slow-{request.id}', daemon=True).start()

    def _failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, TownError):
            return problem(error, request.id)
        print(f'request {request.id} failed:\n{traceback.format_exc()}', file=sys.stderr, flush=True)
        return problem(Internal('this is a fault of the server; its log tells more under the request id'), request.id)

    def log(self, request: Request, response: Response, address: Any) -> None:
        """Notes a request for the access log; the loop writes what has gathered."""
        if self._access_log == 'off':
            return
        took = (time.monotonic() - request.began) * 1000
        peer = address[0] if isinstance(address, tuple) else 'unix'
        now = rfc3339(time.time())
        if self._access_log == 'json':
            record = {'time': now, 'request_id': request.id, 'peer': peer, 'principal': request.caller}
            record |= {'method': request.method, 'path': request.path, 'status': response.status}
            record |= {'ms': round(took, 2), 'bytes': len(response.body)}
            self._lines.append(json.dumps(record) + '\n')
        else:
            self._lines.append(
                f'{now} {peer} {request.method} {request.path} {response.status} {took:.1f}ms {request.id}\n'
            )
