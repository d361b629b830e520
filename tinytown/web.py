"""The HTTP server: one thread, an event loop, and what it does with whole requests; drain.

`http.server` gives the socket and the names of things; its parser, its threads and its lack of limits are replaced.
One thread owns every connection (`connection`) and the loop (epoll; poll elsewhere). It starts a request's step, and
hands the step's Redis commands to a `Link`, so that whatever is ready together shares one write to Redis; it never
waits for Redis, nor for a client. Operations that are slow (processes, waiting) run on threads of their own.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from http.server import HTTPServer
from typing import Any, Final
from urllib.parse import quote

from . import wire
from .config import Limits
from .connection import IN, OUT, Application, Connection
from .errors import Internal, TownError, Unavailable, UsageError
from .http1 import Request, Response, problem
from .model import rfc3339
from .store import Command, Store

MOST_SLOW: Final = 128  # slow operations at once
_SPARE_DESCRIPTORS: Final = 256  # beside connections: Redis, slow operations, files


class Server(HTTPServer):
    """Serves an application on one address until a signal ends it.

    `connections` are those that are open, `draining` says that no more are taken. Made on the main thread: from then on
    SIGTERM and SIGINT are its own. Raises UsageError when it can't bind.
    """

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
        has_epoll = hasattr(select, 'epoll')
        self._poll = select.epoll() if has_epoll else select.poll()
        self._second = 1 if has_epoll else 1000  # in the unit of its timeout
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
            raise UsageError(
                f'{address[0]}:{address[1]}: {e.strerror}; choose another: tt config townhall.rest_port N'
            ) from None
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def server_bind(self) -> None:
        """Binds, without the look-up of our own name that http.server makes here."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    # --------------------------------------------------------------------------------------------------- the loop

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT has drained it; a second one ends it at once."""
        _allow_descriptors(self.limits.connections + _SPARE_DESCRIPTORS)
        self.socket.setblocking(False)
        self._register(self._wake_read, IN, self._woken)
        self.link.reconnect()
        try:
            self._await_redis()
            self.watch(self.socket, IN, self._accept)
            while not self._is_over():
                self._turn()
        finally:
            self._end()

    def _await_redis(self) -> None:
        """Leaves clients in the backlog until Redis is connected, or was given its time: no needless 503 at start."""
        deadline = time.monotonic() + wire.TIMEOUT
        while not self.link.is_up and not self._signals and time.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        hurries = self._slow or self.draining or self._paused_until or (self.link.is_up and self.link.is_waiting)
        interval = 0.1 if hurries else 1.0
        events = self._poll.poll(interval * self._second)
        for descriptor, mask in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(mask)
        while self._soon:
            self._soon.popleft()()
        self.link.flush()
        now = time.monotonic()
        if now - self._swept >= interval:
            self._sweep(now)
        if self._lines:
            _say(''.join(self._lines))
            self._lines.clear()

    def _sweep(self, now: float) -> None:
        """Ends what is past its deadline."""
        self._swept = now
        self.link.expire(now)
        for connection in list(self.connections):
            connection.expire(now)
        if self._paused_until and now > self._paused_until and not self.draining:
            self._paused_until = 0.0
            self.watch(self.socket, IN, self._accept)

    def _is_over(self) -> bool:
        if self._signals and not self.draining:
            self._drain()
        if not self.draining:
            return False
        return self._signals > 1 or not self.connections or time.monotonic() > self._drain_until

    def _drain(self) -> None:
        """Takes no more connections; those without a request close, the others once they are answered."""
        self._accept(0)  # who came before the signal
        self.draining = True
        self._drain_until = time.monotonic() + self.limits.drain_secs
        self.unwatch(self.socket)
        self.socket.close()
        for connection in list(self.connections):
            connection.drain()

    def _end(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for connection in list(self.connections):
            connection.break_off()
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
            self._poll.modify(sock.fileno(), IN | OUT if want_write else IN)
        else:
            self._redis_descriptor = sock.fileno()
            self._register(sock.fileno(), IN, lambda _mask: self.link.on_readable())

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
            except ConnectionAbortedError:
                continue
            except OSError:
                self._paused_until = time.monotonic() + 0.1  # out of descriptors, say: clients wait in the backlog
                self.unwatch(self.socket)
                return
            over = len(self.connections) - self.limits.connections
            if over >= 64:
                sock.close()
                continue
            try:
                connection = Connection(sock, address, self)
            except OSError:  # gone already
                sock.close()
                continue
            if over >= 0:
                connection.reject(Unavailable('too many connections', code='too-many-connections', retry_after=1))

    # --------------------------------------------------------------------------------------------------- requests

    def run(self, connection: Connection, request: Request) -> None:
        """Has a request answered: at once, with the replies of Redis, or on a thread of its own if it is slow."""
        try:
            answer = self.application.handle(request)
        except Exception as e:  # a request must not end the server
            connection.answer(request, self.failed(request, e))
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
            data = command.pack(self._store)
        except StopIteration as end:
            self._finish(connection, request, end.value)
            return
        except Exception as e:  # as above
            self._finish(connection, request, self.failed(request, e))
            return

        def send(reply: Any) -> Command:
            try:
                value = command.result(reply)
            except TownError as e:
                return step.throw(e)
            return step.send(value)

        def resume(reply: Any) -> None:
            self._advance(connection, request, step, lambda: send(reply))

        whole = (lambda: command.pack(self._store, whole=True)) if command.script else None
        self.link.submit(wire.Request(data, whole, resume))

    def _finish(self, connection: Connection, request: Request, response: Response) -> None:
        connection.answer(request, response)
        connection.process()

    def _run_slow(self, connection: Connection, request: Request, step: Generator[Command, Any, Response]) -> None:
        def work() -> None:
            try:
                response = self._store.run(step)
            except Exception as e:  # as above
                response = self.failed(request, e)
            finally:
                self._store.close()
            self.call_soon(lambda: done(response))

        def done(response: Response) -> None:
            self._slow -= 1
            self._finish(connection, request, response)

        try:
            if self._slow >= MOST_SLOW:
                raise RuntimeError
            threading.Thread(target=work, name=f'slow-{request.id}', daemon=True).start()
        except RuntimeError:  # also of the machine, when it has no more threads
            busy = Unavailable(f'{self._slow} slow operations are under way', code='busy', retry_after=1)
            connection.answer(request, problem(busy, request.id))
        else:
            self._slow += 1
            request.deadline = request.began + self._timeout

    def failed(self, request: Request, error: Exception) -> Response:
        """The answer for a request that raised: what a TownError says; for a fault of ours no more than its id."""
        if isinstance(error, TownError):
            return problem(error, request.id)
        _say(f'request {request.id} failed:\n{"".join(traceback.format_exception(error))}')
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
            path = quote(request.path)  # one word, whatever it holds
            self._lines.append(f'{now} {peer} {request.method} {path} {response.status} {took:.1f}ms {request.id}\n')


def _say(text: str) -> None:
    """Writes to the log. One that can't be written (a full disk, a closed pipe) must not end the service."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass


def _allow_descriptors(wanted: int) -> None:
    """Raises our limit of open files, often 1,024, as far as we may and need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
