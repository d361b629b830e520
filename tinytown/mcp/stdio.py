"""MCP over stdio: one message a line; nothing but messages on stdout; ends with its input.

What is quick is answered by the thread that reads; what works on processes or waits has a thread of its own, so that
a ping is answered meanwhile. Messages are written whole, one at a time.
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
from .jsonrpc import BATCHING, INTERNAL, INVALID_REQUEST, Fault, decode, encode_message, error_reply
from .protocol import Ask, McpServer, Session, not_batched

MOST_THREADS: Final = 32
_EDGE: Final = 400  # bytes at each end of a line that is too long, in which its id is looked for
_ID: Final = rb'"id"\s*:\s*(-?[0-9]{1,15}|"[^"\\]{1,100}")\s*'

RunStep = Callable[[Step[Any]], Any]


def _id_of(start: bytes, end: bytes) -> int | str | None:
    """The id of a request of which only both ends are there; without it its sender would wait for ever."""
    found = re.match(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?' + _ID + b',', start[:_EDGE])
    found = found or re.search(rb',\s*' + _ID + rb'(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*\Z', end)
    if not found:
        return None
    told: int | str = json.loads(found[1])
    return told


def private_stdout() -> BinaryIO:
    """Our stdout, for messages alone: whatever else would be written there goes to stderr from now on."""
    ours = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)
    return ours


class Stdio:
    """One client, who is `by`. `run` runs a step on the calling thread; `most` is the longest line, in bytes."""

    def __init__(
        self, mcp: McpServer, by: Principal, run: RunStep, source: BinaryIO, sink: BinaryIO, most: int
    ) -> None:
        self._mcp = mcp
        self._by = by
        self._run = run
        self._source = source
        self._sink = sink
        self._most = most
        self._lock = threading.Lock()
        self._is_heard = True  # until nobody reads what we write
        self._session = Session(self.send)
        self._threads: list[threading.Thread] = []

    def serve(self) -> None:
        """Answers until its input ends, and what was read by then."""
        try:
            for line in self._lines():
                self._take(line)
            for thread in self._threads:
                thread.join()
        finally:
            self._session.end()

    def _lines(self) -> Iterator[bytes]:
        """The lines of the input; one that is too long is answered and left out, blank ones are left out."""
        while self._is_heard and (line := self._source.readline(self._most + 1)):
            if len(line) > self._most and not line.endswith(b'\n'):
                end = line
                while rest := self._source.readline(65536):
                    end = (end + rest)[-_EDGE:]
                    if rest.endswith(b'\n'):
                        break
                self._refuse(
                    Fault(INVALID_REQUEST, f'a line is longer than {self._most} bytes', None, _id_of(line, end))
                )
            elif line.strip():
                yield line

    def send(self, message: Any) -> None:
        """Writes a message. Any thread may call."""
        data = encode_message(message) + b'\n'
        try:
            with self._lock:
                self._sink.write(data)
                self._sink.flush()
        except OSError:
            self._is_heard = False

    def _refuse(self, fault: Fault) -> None:
        self.send(error_reply(fault))

    def _take(self, line: bytes) -> None:
        try:
            message = decode(line)
            if isinstance(message, list):
                self._take_batch(message)
            else:
                ask = self._read(message)
                if ask:
                    self._answer(ask)
        except Fault as e:
            self._refuse(e)

    def _read(self, message: Any) -> Ask | None:
        return self._mcp.read(message, self._by, self.send, self._session)

    def _answer(self, ask: Ask) -> None:
        manner = self._mcp.manner(ask)
        if manner != 'quick':
            self._session.running[ask.id] = ask
        if manner in ('quick', 'listen'):
            self._finish(ask, manner == 'listen')
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MOST_THREADS:
            del self._session.running[ask.id]
            raise Fault(INTERNAL, f'{MOST_THREADS} slow requests are under way; try again later', None, ask.id)
        thread = threading.Thread(target=self._finish, args=(ask,), name=f'slow-{ask.id}', daemon=True)
        self._threads.append(thread)
        thread.start()

    def _finish(self, ask: Ask, stays: bool = False) -> None:
        reply = self._run(self._mcp.run(ask))
        if not stays or reply:
            self._session.running.pop(ask.id, None)
        if reply:
            self.send(reply)

    def _take_batch(self, messages: list[Any]) -> None:
        """Several messages in one line, which revision 2025-03-26 has: their replies come in one line too."""
        if self._session.revision != BATCHING or not messages:
            raise Fault(INVALID_REQUEST, 'a line holds one message; arrays are not taken')
        replies = [reply for message in messages if (reply := self._reply(message))]
        if replies:
            self.send(replies)

    def _reply(self, message: Any) -> Json | None:
        try:
            ask = self._read(message)
            if ask and ask.is_modern:
                raise not_batched(ask)
        except Fault as e:
            return error_reply(e)
        reply: Json | None = self._run(self._mcp.run(ask)) if ask else None
        return reply


class _Opening:
    """A town that is opened when it is first needed, so that a client's first question need not wait for Redis."""

    def __init__(self, root: Path, flags: dict[str, Any], is_looked_after: bool) -> None:
        self._root = root
        self._flags = flags
        self._lock = threading.Lock()
        self._town: Town | None = None
        self._is_looked_after = is_looked_after
        self._caretaker: Supervisor | None = None

    def __call__(self) -> Town:
        with self._lock:
            if self._town is None:
                try:
                    self._town = open_town(self._root, self._flags)
                except UsageError as e:
                    raise Unavailable(str(e)) from None
                if self._is_looked_after:
                    self._caretaker = Supervisor(self._town)
                    self._caretaker.start()
            return self._town

    def close(self) -> None:
        if self._caretaker:
            self._caretaker.close()


def _caller(town: _Opening, read_only: bool) -> Principal:
    """Whoever started us: a person, or the agent in whose run we are."""
    person = Principal(LOCAL, ALL_SCOPES)
    by = agent_tokens.acting_principal(town(), person) if os.environ.get('TINYTOWN_AGENT_ID') else person
    return replace(by, scopes=frozenset({READ})) if read_only else by


def serve(root: Path, flags: dict[str, Any]) -> int:
    """Serves the town in `root` to whoever started us, until our input ends. The exit status. Raises UsageError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = configuration.load(root, flags)
    town_secrets.ready_log(root, config)
    settings = config.townhall
    town = _Opening(root, flags, not settings.read_only)
    store = Store(managed_redis.address(root, config), config.name, config.retention.events)
    catalogue = Catalog(town, EventFeed(store), settings.mcp.tools, settings.mcp.read_only)
    try:
        by = _caller(town, settings.read_only)
        Stdio(
            McpServer(catalogue), by, store.run, sys.stdin.buffer, private_stdout(), settings.limits.body_bytes
        ).serve()
    finally:
        town.close()
    return 0
