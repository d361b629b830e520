"""The stdio transport of MCP: one message a line, only messages on stdout, ends when stdin ends.

Start with `serve`, which `townhall mcp-stdio` calls. The reading thread answers quick requests itself. A request that
waits, or starts and stops processes, gets its own thread, so that a ping is still answered meanwhile. A lock keeps
messages of two threads from mixing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from .. import config as configuration
from ..auth import agent_tokens
from ..core.town import Town, open_town
from ..errors import Unavailable, UsageError
from ..host import managed_redis, town_secrets
from ..model import ALL_SCOPES, LOCAL, READ, Json, Principal
from ..state.event_feed import EventFeed
from ..state.store import Step, Store
from ..worker.supervisor import Supervisor
from .catalog import Catalog
from .jsonrpc import BATCHING, INTERNAL_ERROR, INVALID_REQUEST, Fault, decode, encode_message, error_reply
from .protocol import McpRequest, McpServer, Session, not_batched

MAX_THREADS: Final = 32
_EDGE: Final = 400  # how many bytes at each end of an overlong line are searched for its id
_ID: Final = rb'"id"\s*:\s*(-?[0-9]{1,15}|"[^"\\]{1,100}")\s*'

RunStep = Callable[[Step[Any]], Any]


def _id_of(start: bytes, end: bytes) -> int | str | None:
    """Finds the id of an overlong request in its start or its end.

    A client matches answers to requests by the id, so it would wait forever for an error without one.
    """
    match = re.match(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?' + _ID + b',', start[:_EDGE])
    match = match or re.search(rb',\s*' + _ID + rb'(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*\Z', end)
    if not match:
        return None
    message_id: int | str = json.loads(match[1])
    return message_id


def private_stdout() -> BinaryIO:
    """A stream on the real stdout, for messages only. Anything else that is written to stdout now goes to stderr."""
    stdout = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)
    return stdout


class Stdio:
    """The connection to one client, which acts as the principal `by`.

    `run` runs a step on the calling thread. `max_line` is the limit for a line, in bytes.
    """

    def __init__(
        self, mcp: McpServer, by: Principal, run: RunStep, source: BinaryIO, sink: BinaryIO, max_line: int
    ) -> None:
        self._mcp = mcp
        self._by = by
        self._run = run
        self._source = source
        self._sink = sink
        self._max_line = max_line
        self._lock = threading.Lock()
        self._is_connected = True  # until a write fails
        self._session = Session(self.send)
        self._threads: list[threading.Thread] = []

    def serve(self) -> None:
        """Serves until the input ends, and finishes the requests that were read."""
        try:
            for line in self._lines():
                self._handle_line(line)
            for thread in self._threads:
                thread.join()
        finally:
            self._session.end()

    def _lines(self) -> Iterator[bytes]:
        """The lines of the input without blank lines. An overlong line is answered with an error and skipped."""
        while self._is_connected and (line := self._source.readline(self._max_line + 1)):
            if len(line) > self._max_line and not line.endswith(b'\n'):
                end = line
                while rest := self._source.readline(65536):
                    end = (end + rest)[-_EDGE:]
                    if rest.endswith(b'\n'):
                        break
                detail = f'the line is longer than {self._max_line} bytes'
                self._refuse(Fault(INVALID_REQUEST, detail, None, _id_of(line, end)))
            elif line.strip():
                yield line

    def send(self, message: Any) -> None:
        """Writes a message. May be called from any thread."""
        data = encode_message(message) + b'\n'
        try:
            with self._lock:
                self._sink.write(data)
                self._sink.flush()
        except OSError:
            self._is_connected = False

    def _refuse(self, fault: Fault) -> None:
        self.send(error_reply(fault))

    def _handle_line(self, line: bytes) -> None:
        try:
            message = decode(line)
            if isinstance(message, list):
                self._handle_batch(message)
            else:
                request = self._read(message)
                if request:
                    self._answer(request)
        except Fault as e:
            self._refuse(e)

    def _read(self, message: Any) -> McpRequest | None:
        return self._mcp.read(message, self._by, self.send, self._session)

    def _answer(self, request: McpRequest) -> None:
        mode = self._mcp.run_mode(request)
        if mode != 'quick':
            self._session.running[request.id] = request
        if mode in ('quick', 'listen'):
            self._finish(request, stays_open=mode == 'listen')
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MAX_THREADS:
            del self._session.running[request.id]
            detail = f'{MAX_THREADS} slow requests are already running; try again later'
            raise Fault(INTERNAL_ERROR, detail, None, request.id)
        thread = threading.Thread(target=self._finish, args=(request,), name=f'slow-{request.id}', daemon=True)
        self._threads.append(thread)
        thread.start()

    def _finish(self, request: McpRequest, stays_open: bool = False) -> None:
        reply = self._run(self._mcp.run(request))
        if not stays_open or reply:
            self._session.running.pop(request.id, None)
        if reply:
            self.send(reply)

    def _handle_batch(self, messages: list[Any]) -> None:
        """Answers an array of messages (revision 2025-03-26 only) with an array of replies."""
        if self._session.revision != BATCHING or not messages:
            raise Fault(INVALID_REQUEST, 'a line must hold one message, not an array')
        replies = [reply for message in messages if (reply := self._reply(message))]
        if replies:
            self.send(replies)

    def _reply(self, message: Any) -> Json | None:
        try:
            request = self._read(message)
            if request and request.is_modern:
                raise not_batched(request)
        except Fault as e:
            return error_reply(e)
        reply: Json | None = self._run(self._mcp.run(request)) if request else None
        return reply


class _LazyTown:
    """Opens the town on the first call, so that a client's first request does not wait for Redis.

    If `supervise` is set, it also starts a supervisor for the town's workers.
    """

    def __init__(self, root: Path, flags: dict[str, Any], supervise: bool) -> None:
        self._root = root
        self._flags = flags
        self._lock = threading.Lock()
        self._town: Town | None = None
        self._supervise = supervise
        self._supervisor: Supervisor | None = None

    def __call__(self) -> Town:
        with self._lock:
            if self._town is None:
                try:
                    self._town = open_town(self._root, self._flags)
                except UsageError as e:
                    raise Unavailable(str(e)) from None
                if self._supervise:
                    self._supervisor = Supervisor(self._town)
                    self._supervisor.start()
            return self._town

    def close(self) -> None:
        if self._supervisor:
            self._supervisor.close()


def _caller(town: _LazyTown, read_only: bool) -> Principal:
    """The principal that started this process: the agent in whose run it was started, otherwise a person."""
    person = Principal(LOCAL, ALL_SCOPES)
    by = agent_tokens.acting_principal(town(), person) if os.environ.get('TINYTOWN_AGENT_ID') else person
    return replace(by, scopes=frozenset({READ})) if read_only else by


def serve(root: Path, flags: dict[str, Any]) -> int:
    """Serves the town in `root` over stdio until stdin ends. Returns the exit status. Raises UsageError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = configuration.load(root, flags)
    town_secrets.configure_log(root, config)
    settings = config.townhall
    town = _LazyTown(root, flags, supervise=not settings.read_only)
    store = Store(managed_redis.endpoint(root, config), config.name, config.retention.events)
    catalog = Catalog(town, EventFeed(store), settings.mcp.tools, settings.mcp.read_only)
    try:
        by = _caller(town, settings.read_only)
        Stdio(McpServer(catalog), by, store.run, sys.stdin.buffer, private_stdout(), settings.limits.body_bytes).serve()
    finally:
        town.close()
    return 0
