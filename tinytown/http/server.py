"""The HTTP server: an event loop on one thread that accepts clients, runs requests, and drains. See `Server.serve`.

The stdlib's `http.server` owns the listening socket (`listener`). Its parser, threads and missing limits are replaced.
One thread owns the loop (epoll, or poll where there is none) and every connection (`connection`). It starts the step of
a request and hands the step's Redis commands to a `Link`, so that all commands that are ready at once share one write
to Redis. It never waits for Redis or for a client. Slow operations (starting processes, waiting) get their own threads.
"""

from __future__ import annotations

import itertools
import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

from .. import log
from ..errors import Internal, TownError, Unavailable
from ..model import rfc3339
from ..settings import TownhallSettings
from ..state.client import TIMEOUT
from ..state.link import Link, PendingCommand
from ..state.store import Command, Store
from .connection import IN, OUT, Application, Connection, Sock
from .http1 import Peer, Request, Response, problem
from .listener import BACKLOG, Listener
from .replies import Done, Later, Slow

if TYPE_CHECKING:
    from .tls import TlsSocket

logger = logging.getLogger('tinytown.http')

T = TypeVar('T')
Encrypt: TypeAlias = 'Callable[[socket.socket], TlsSocket]'

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_ENOUGH: Final = 8  # commands that are sent before the turn ends, so that Redis works while the rest is read
_AT_ONCE: Final = 64  # connections to accept per turn
MOST_SLOW: Final = 128  # slow operations at a time
_SPARE_DESCRIPTORS: Final = 256  # for Redis, slow operations and files, in addition to connections


class RequestMeter(Protocol):
    """Counts requests and connections; `rest/metrics.py` implements it."""

    def observe(self, operation: str, method: str, status: int, seconds: float) -> None: ...
    def gauge(self, connections: int, streams: int) -> None: ...


class Server:
    """Serves an application to the clients of a listener until a signal ends it.

    `connections` are the open ones; while `draining`, no more are accepted. Create it on the main thread: it handles
    SIGTERM, SIGINT, SIGQUIT and SIGHUP from then on. SIGTERM or SIGINT drains, a second one or SIGQUIT ends it at once;
    SIGHUP calls `reload`. A worker process gets a `lifeline`, a descriptor: when it reads end of file, the process
    drains. `prepare` may restart a dead Redis. `before_flush` is called before commands are sent; if it returns an
    error, they are not sent and fail with it.
    """

    def __init__(
        self,
        listener: Listener,
        application: Application,
        store: Store,
        settings: TownhallSettings,
        encrypt: Encrypt | None = None,
        reload: Callable[[], None] = lambda: None,
        lifeline: int = -1,
        prepare: Callable[[], None] = lambda: None,
        meter: RequestMeter | None = None,
        before_flush: Callable[[], TownError | None] = lambda: None,
    ) -> None:
        self.application = application
        self._listener = listener
        self._meter = meter
        self._before_flush = before_flush
        self.connections: set[Connection] = set()
        self.apply(settings, encrypt)
        self.draining = False
        self.streams = 0
        self.request_ids = _request_ids()
        self._store = store
        self._reload = reload
        self._lifeline = lifeline
        self._lines: list[str] = []
        self._handlers: dict[int, Callable[[int], None]] = {}
        has_epoll = hasattr(select, 'epoll')
        self._poll = select.epoll() if has_epoll else select.poll()
        self._second = 1 if has_epoll else 1000  # in the unit of the timeout of `_poll`
        self._soon: deque[Callable[[], None]] = deque()
        self._slow = 0
        self._stops = self._is_forced = self._reloads = False
        self._swept = 0.0
        self._paused_until = 0.0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.link = Link(store.endpoint, self.call_soon, self._watch_redis, prepare)
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def apply(self, settings: TownhallSettings, encrypt: Encrypt | None = None) -> None:
        """Applies new settings, to open connections as well. `encrypt` applies to new connections only.

        Clients with certificates must reconnect, because their certificates may have been revoked.
        """
        self._encrypt = encrypt
        self.limits = settings.limits
        self.allowed_hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self.allowed_origins = frozenset(settings.cors.allowed_origins)
        self._timeout = settings.request_timeout_ms / 1000
        self._access_log = _access_log(settings)
        for connection in list(self.connections):
            connection.renew()

    # --------------------------------------------------------------------------------------------------- the loop

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT has drained it; a second one ends it at once."""
        _allow_descriptors(self.limits.connections + _SPARE_DESCRIPTORS)
        self._listener.socket.setblocking(False)  # an event loop must not wait in `accept`
        self._register(self._wake_read, IN, self._woken)
        if self._lifeline >= 0:
            self._register(self._lifeline, IN, self._orphaned)
        self.link.reconnect()
        try:
            self._await_redis()
            self.watch(self._listener.socket, IN, self._accept)
            while not self._is_over():
                self._turn()
        finally:
            self._end()

    def _await_redis(self) -> None:
        """Leaves clients in the backlog until Redis is connected or has timed out: no needless 503 at the start."""
        deadline = time.monotonic() + TIMEOUT
        while not self.link.is_up and not self._stops and time.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        is_urgent = self._slow or self.draining or self._paused_until or (self.link.is_up and self.link.is_waiting)
        interval = 0.1 if is_urgent else 1.0
        events = self._poll.poll(interval * self._second)
        for descriptor, mask in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(mask)
                if self.link.unsent >= _ENOUGH:
                    self._send_off()
        while self._soon:
            _safely(self._soon.popleft())
        now = time.monotonic()
        if now - self._swept >= interval:
            self._sweep(now)
        self._send_off()
        if self._meter:
            self._meter.gauge(len(self.connections), self.streams)
        if self._lines:
            log.write(''.join(self._lines))
            self._lines.clear()

    def _send_off(self) -> None:
        """Sends the waiting commands to Redis, after `before_flush` has done what must precede them."""
        while error := self._before_flush():
            self.link.refuse_unsent(error)  # which may let clients send more
        self.link.flush()

    def _sweep(self, now: float) -> None:
        """Ends requests and connections that are past their deadline."""
        self._swept = now
        log.flush(0)
        self.link.expire(now)
        for connection in list(self.connections):
            connection.expire(now)
        if self._paused_until and now > self._paused_until and not self.draining:
            self._paused_until = 0.0
            self.watch(self._listener.socket, IN, self._accept)

    def _is_over(self) -> bool:
        if self._reloads:
            self._reloads = False
            self._reload()
        if self._stops and not self.draining:
            self._drain()
        if not self.draining:
            return False
        return self._is_forced or not self.connections or time.monotonic() > self._drain_until

    def _drain(self) -> None:
        """Accepts no more connections. Idle ones close now, the others after their answer."""
        for _ in range(BACKLOG // _AT_ONCE):
            self._accept(0)  # clients that connected before the signal
        self.draining = True
        self._drain_until = time.monotonic() + self.limits.drain_secs
        self.unwatch(self._listener.socket)
        self._listener.server_close()
        for connection in list(self.connections):
            connection.wind_down()

    def _end(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for connection in list(self.connections):
            connection.break_off()
        self.link.close()
        self._listener.server_close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self._reloads = True
        else:
            self._is_forced |= number == signal.SIGQUIT or (self._stops and self._lifeline < 0)
            self._stops = True

    def _orphaned(self, _mask: int) -> None:
        """Drains, because the process that started us has ended."""
        self._handlers.pop(self._lifeline)
        self._poll.unregister(self._lifeline)
        self._stops = True

    # ------------------------------------------------------------------------------------------------ descriptors

    def watch(self, sock: Sock, mask: int, handler: Callable[[int], None]) -> None:
        self._register(sock.fileno(), mask, handler)

    def _register(self, descriptor: int, mask: int, handler: Callable[[int], None]) -> None:
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, mask)

    def modify(self, sock: Sock, mask: int) -> None:
        self._poll.modify(sock.fileno(), mask)

    def unwatch(self, sock: Sock) -> None:
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

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the loop's thread. May be called from any thread."""
        self._soon.append(callback)
        try:
            os.write(self._wake_write, b'.')
        except (BlockingIOError, OSError):
            pass  # the loop is awake already, or has ended

    def _woken(self, _mask: int) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass

    def _accept(self, _mask: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, address = self._listener.get_request()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:
                self._paused_until = time.monotonic() + 0.1  # no descriptors left, say; clients wait in the backlog
                self.unwatch(self._listener.socket)
                return
            over = len(self.connections) - self.limits.connections
            if over >= (0 if self._encrypt else 64):
                sock.close()
                continue
            try:
                connection = self._welcome(sock, address)
            except OSError:  # the client is gone
                sock.close()
                continue
            if over >= 0:
                connection.reject(Unavailable('too many connections', code='too-many-connections', retry_after=1))

    def _welcome(self, sock: socket.socket, address: Any) -> Connection:
        peer = self.application.meet(sock, address)
        if self._encrypt:
            return Connection(self._encrypt(sock), replace(peer, is_tls=True), self)
        return Connection(sock, peer, self)

    # --------------------------------------------------------------------------------------------------- requests

    def run(self, connection: Connection, request: Request) -> None:
        """Runs a request. It is answered at once, after Redis has replied, on a thread if it is slow, or later."""
        try:
            answer = self.application.handle(request)
        except Exception as e:  # a request must not end the server
            connection.answer(request, self.failed(request, e))
            return
        if isinstance(answer, Response):
            connection.answer(request, answer)
            return
        if isinstance(answer, Later):
            connection.wait(request, answer)
            return

        def done(response: Response | None, error: Exception | None) -> None:
            connection.answer(request, response or self.failed(request, error or ValueError('no answer')))
            connection.process()

        if isinstance(answer, Slow):
            request.deadline = request.began + self._timeout
            self.drive(answer.step, done, slow=True, waits=answer.waits)
        else:
            _Drive(self.link, self._store, answer, done)

    def drive(self, step: Generator[Command, Any, T], done: Done[T], slow: bool = False, waits: bool = False) -> None:
        """Runs a step, on a thread of its own if it is `slow`. Call it on the loop's thread, which also calls `done`.

        A slow step that `waits` or reads gets a thread only while less than half of them are in use, so that it can't
        hold up changes or authentication.
        """
        if slow:
            self._run_slow(step, done, MOST_SLOW // 2 if waits else MOST_SLOW)
        else:
            _Drive(self.link, self._store, step, done)

    def _run_slow(self, step: Generator[Command, Any, T], done: Done[T], limit: int) -> None:
        def work() -> None:
            result, error = None, None
            try:
                result = self._store.run(step)
            except Exception as e:  # a request must not end the server
                error = e
            finally:
                self._store.close()
            self.call_soon(lambda: end(result, error))

        def end(result: T | None, error: Exception | None) -> None:
            self._slow -= 1
            _finish(done, result, error)

        try:
            if self._slow >= limit:
                raise RuntimeError
            threading.Thread(target=work, name='slow', daemon=True).start()
        except RuntimeError:  # also raised by `start`, if the system has no more threads
            done(None, Unavailable(f'{self._slow} slow operations are running', code='busy', retry_after=1))
        else:
            self._slow += 1

    def failed(self, request: Request, error: Exception) -> Response:
        """The answer for a request that raised: the message of a TownError, or for a bug just the request id."""
        if isinstance(error, TownError):
            return problem(error, request.id)
        fields = {'request_id': request.id, 'principal': request.caller}
        logger.error(f'request {request.id} failed', exc_info=error, extra=fields)
        return problem(Internal('internal error of the server; search its log for the request id'), request.id)

    def log(self, request: Request, response: Response) -> None:
        """Counts a request, and adds a line to the access log. The loop writes the lines of a turn together."""
        seconds = time.monotonic() - request.began
        if self._meter:
            self._meter.observe(request.operation, request.method, response.status, seconds)
        if self._access_log == 'off':
            return
        took = seconds * 1000
        peer = request.peer.address or 'unix'
        path = quote(request.path)  # one word, whatever it contains
        if self._access_log == 'text':
            now = rfc3339(time.time())
            self._lines.append(f'{now} {peer} {request.method} {path} {response.status} {took:.1f}ms {request.id}\n')
        else:
            fields: dict[str, Any] = {'request_id': request.id, 'peer': peer, 'principal': request.caller}
            fields |= {'method': request.method, 'path': request.path, 'status': response.status}
            fields |= {'ms': round(took, 2), 'bytes': len(response.body)}
            self._note(f'{request.method} {path} {response.status}', fields)

    def turned_away(self, peer: Peer, why: str) -> None:
        """Adds a line to the access log for a client whose TLS handshake failed."""
        address = peer.address or 'unix'
        if self._access_log == 'text':
            self._lines.append(f'{rfc3339(time.time())} {address} TLS handshake failed: {why}\n')
        elif self._access_log != 'off':
            self._note('TLS handshake failed', {'peer': address, 'tls': why})

    def _note(self, message: str, fields: dict[str, Any]) -> None:
        """Adds an entry to an access log in JSON or in the journal."""
        if self._access_log == 'json':
            self._lines.append(log.json_line('access', message, **fields))
        else:
            log.send('access', message, **fields)


class _Drive(Generic[T]):
    """A step that the loop runs: sends its commands to Redis, and passes its result or exception to `done`."""

    __slots__ = ('_command', '_done', '_link', '_step', '_store')

    def __init__(self, link: Link, store: Store, step: Generator[Command, Any, T], done: Done[T]) -> None:
        self._link = link
        self._store = store
        self._step = step
        self._done = done
        self._go(step.send, None)

    def _go(self, resume: Callable[[Any], Command], value: Any) -> None:
        """Runs the step to its next command, or to its end. `resume` is its `send` or `throw`."""
        try:
            command = self._command = resume(value)
            data = command.pack(self._store)
        except StopIteration as end:
            _finish(self._done, end.value, None)
        except Exception as e:  # a request must not end the server
            _finish(self._done, None, e)
        else:
            self._link.submit(PendingCommand(data, self._whole if command.script else None, self._resume))

    def _resume(self, reply: Any) -> None:
        try:
            value = self._command.result(reply)
        except Exception as e:  # also a reply that no script gives: the step must end, and its request be answered
            self._go(self._step.throw, e)
        else:
            self._go(self._step.send, value)

    def _whole(self) -> bytes:
        """The command with the text of its script, for a Redis that has not loaded it."""
        return self._command.pack(self._store, whole=True)


def _access_log(settings: TownhallSettings) -> str:
    """The format of the access log: text, json, journal or off."""
    if settings.access_log == 'off' or not logger.isEnabledFor(logging.INFO):
        return 'off'
    return 'json' if settings.access_log == 'json' else settings.log.format


def _request_ids() -> Iterator[str]:
    """Ids that no other server gives: a random start and a counter."""
    start = os.urandom(5).hex()
    return (f'{start}{number:06x}' for number in itertools.count())


def _finish(done: Done[T], result: T | None, error: Exception | None) -> None:
    _safely(lambda: done(result, error))


def _safely(callback: Callable[[], None]) -> None:
    """Calls a callback. An exception in it is a bug of ours; it is logged and must not end the server."""
    try:
        callback()
    except Exception as e:
        logger.error(f'internal error: {e!r}', exc_info=e)


def _allow_descriptors(wanted: int) -> None:
    """Raises the limit of open files, often 1,024, to `wanted` or as far as permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
