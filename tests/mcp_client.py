"""An MCP client for tests, over stdio and over HTTP. It validates every message of the server against the schema."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcp_types import methods
from mcp_types.jsonrpc import jsonrpc_message_adapter

from tinytown.mcp.jsonrpc import LEGACY, META_PREFIX, MODERN
from tinytown.model import Json

from .support import PATIENCE, REPOSITORY, Hall, Reply, environment

META: Json = {f'{META_PREFIX}protocolVersion': MODERN, f'{META_PREFIX}clientCapabilities': {}}
CLIENT: Json = {'name': 'tests', 'version': '1'}


def validate(message: Json, method: str, revision: str) -> None:
    """Validates a message of the server with the models of `mcp-types`, which are generated from the JSON schema.

    `method` is the method of the request that the message answers.
    """
    if set(message) == {'jsonrpc', 'error'}:  # the request's id could not be read; only `mcp-types` demands one
        message = message | {'id': 0}
    jsonrpc_message_adapter.validate_python(message)
    if 'result' in message:
        methods.validate_server_result(method, revision, message['result'])
    elif 'method' in message:
        methods.parse_server_notification(message['method'], revision, message.get('params'))


def with_meta(params: Json | None) -> Json:
    params = dict(params or {})
    return params | {'_meta': META | params.get('_meta', {})}


class Stdio:
    """A `townhall mcp-stdio` process and its client. Every line of the process must be a message of its revision."""

    def __init__(self, root: Path, *flags: str, **more: str) -> None:
        argv = [sys.executable, str(REPOSITORY / 'townhall.py'), 'mcp-stdio', '--town', str(root), *flags]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, env=environment(**more), stdin=pipe, stdout=pipe, stderr=pipe)
        self.notifications: list[Json] = []  # received while waiting for an answer
        self.revision = LEGACY[0]
        self._requests: dict[Any, tuple[str, str]] = {}
        self._number = 0

    def send(self, *messages: Any) -> None:
        """Sends messages, each on a line; bytes are sent as they are."""
        assert self.process.stdin
        for message in messages:
            for part in message if isinstance(message, list) else [message]:
                if isinstance(part, dict) and 'id' in part:
                    self._requests.setdefault(part['id'], (part.get('method', ''), self.revision))
            data = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.process.stdin.write(data + b'\n')
        self.process.stdin.flush()

    def receive(self) -> Any:
        """Reads and validates the next line."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.errors()
        message = json.loads(line)
        for part in message if isinstance(message, list) else [message]:
            method, revision = self._requests.get(part.get('id'), ('', self._revision_of(part)))
            validate(part, method, revision)
        return message

    def _revision_of(self, message: Json) -> str:
        meta = message.get('params', {}).get('_meta', {})
        return MODERN if f'{META_PREFIX}subscriptionId' in meta else self.revision

    def start(self, method: str, params: Json | None = None, modern: bool = False) -> int:
        """Sends a request without waiting for the answer. Returns its id."""
        self._number += 1
        sent = with_meta(params) if modern else params or {}
        self._requests[self._number] = (method, MODERN if modern else self.revision)
        self.send({'jsonrpc': '2.0', 'id': self._number, 'method': method, 'params': sent})
        return self._number

    def answer_to(self, number: int) -> Json:
        """Waits for the answer to a request. Messages that come before it go to `notifications`."""
        while True:
            message: Json = self.receive()
            if message.get('id') == number and 'method' not in message:
                return message
            self.notifications.append(message)

    def ask(self, method: str, params: Json | None = None, modern: bool = False) -> Json:
        return self.answer_to(self.start(method, params, modern))

    def await_notification(self, method: str, **params: Any) -> Json:
        """The next notification with this method and these parameters. Waits for it if it has not been received yet."""
        while True:
            for message in self.notifications:
                if message.get('method') == method and params.items() <= message['params'].items():
                    self.notifications.remove(message)
                    return message
            self.notifications.append(self.receive())

    def initialize(self, revision: str = LEGACY[0]) -> Json:
        """The handshake of a legacy client."""
        self.revision = revision
        reply = self.ask('initialize', {'protocolVersion': revision, 'capabilities': {}, 'clientInfo': CLIENT})
        self.send({'jsonrpc': '2.0', 'method': 'notifications/initialized'})
        return reply

    def call(self, tool: str, modern: bool = False, **arguments: Any) -> Json:
        """The result of a tool."""
        stripped = {name.rstrip('_'): value for name, value in arguments.items()}
        reply = self.ask('tools/call', {'name': tool, 'arguments': stripped}, modern)
        assert 'result' in reply, reply
        result: Json = reply['result']
        return result

    def finish(self) -> tuple[int, bytes]:
        """Closes the input of the process. Returns its exit status and the rest of its output."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        rest = self.process.stdout.read()
        return self.process.wait(PATIENCE), rest

    def errors(self) -> str:
        """Ends the process, and returns its stderr."""
        self.kill()
        return self._errors.decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors = b''
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream
            if stream is self.process.stderr and not stream.closed:
                self._errors = stream.read()
            stream.close()


@contextmanager
def stdio(root: Path, *flags: str, **more: str) -> Iterator[Stdio]:
    client = Stdio(root, *flags, **more)
    try:
        yield client
    finally:
        client.kill()


class Http:
    """A client of a townhall's MCP endpoint."""

    def __init__(self, hall: Hall, revision: str = MODERN, **headers: str) -> None:
        self.hall = hall
        self.revision = revision
        self.headers = {name.replace('_', '-'): value for name, value in headers.items()}

    def head(self, method: str, params: Json) -> dict[str, str]:
        """The headers of a request."""
        headers = {'Content-Type': 'application/json', 'Accept': 'application/json, text/event-stream'}
        headers |= {'MCP-Protocol-Version': self.revision} | self.headers
        if self.revision == MODERN:
            headers['Mcp-Method'] = method
            if name := params.get('name', params.get('uri')):
                headers['Mcp-Name'] = str(name)
        return headers

    def post(self, method: str, params: Json | None = None, id: Any = 1, **headers: str) -> Reply:
        """Sends one request. A header given as '' is left out."""
        params = with_meta(params) if self.revision == MODERN else params or {}
        changed = {name.replace('_', '-').lower(): value for name, value in headers.items()}
        head = {n: v for n, v in self.head(method, params).items() if n.lower() not in changed}
        head |= {name: value for name, value in changed.items() if value}
        message = {'jsonrpc': '2.0', 'id': id, 'method': method, 'params': params}
        reply = self.hall.request('POST', '/mcp', json.dumps(message).encode(), **head)
        if reply.headers.get('content-type') == 'application/json':
            validate(reply.json, method, self.revision)
        return reply

    def call(self, tool: str, **arguments: Any) -> Json:
        """The result of a tool that runs quickly."""
        reply = self.post('tools/call', {'name': tool, 'arguments': arguments})
        assert reply.status == 200, reply
        result: Json = reply.json['result']
        return result

    @contextmanager
    def stream(self, method: str, params: Json | None = None, id: Any = 1) -> Iterator[Events]:
        """Sends a request, and yields the stream that answers it."""
        params = with_meta(params) if self.revision == MODERN else params or {}
        message = {'jsonrpc': '2.0', 'id': id, 'method': method, 'params': params}
        with events(self.hall, 'POST', '/mcp', self.head(method, params), json.dumps(message).encode()) as stream:
            yield stream


class Events:
    """A stream of server-sent events."""

    def __init__(self, response: http.client.HTTPResponse, sock: socket.socket) -> None:
        self.response = response
        self._sock = sock

    def next(self) -> tuple[str, str] | None:
        """The name and data of the next event; None at the end."""
        name, data = 'message', []
        while line := self.response.readline().decode().rstrip('\n'):
            field, _, value = line.partition(': ')
            if field == 'event':
                name = value
            elif field == 'data':
                data.append(value)
        return (name, '\n'.join(data)) if data else None

    def message(self) -> Json:
        """The next message."""
        event = self.next()
        assert event, 'the stream has ended'
        assert event[0] == 'message'
        message: Json = json.loads(event[1])
        return message

    def messages(self) -> list[Json]:
        """All messages until the stream ends."""
        messages = []
        while event := self.next():
            messages.append(json.loads(event[1]))
        return messages


@contextmanager
def events(hall: Hall, method: str, path: str, head: dict[str, str], body: bytes | None = None) -> Iterator[Events]:
    """Opens a stream, and closes it at the end."""
    connection = http.client.HTTPConnection(hall.address, hall.port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, head)
        sock = connection.sock
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers['Content-Type'] == 'text/event-stream'
        assert response.headers['X-Accel-Buffering'] == 'no'
        yield Events(response, sock)
    finally:
        connection.close()


def since(began: float) -> float:
    """Seconds since a moment of the monotonic clock."""
    return time.monotonic() - began
