"""Fuzzing: requests that are nearly right, compared with the h11 package. We must never serve what h11 refuses. We must
serve what h11 accepts exactly as it was sent, or refuse it for one of the reasons in REFUSED and PERHAPS.

The environment variable FUZZ sets the number of cases, FUZZ_SEED the seed of the generator.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import h11
import pytest

from tinytown.core.operations import OPERATIONS

from ..mutations import Case, make
from ..raw import texts
from ..support import Hall, Place, Reply

COUNT: Final = int(os.environ.get('FUZZ') or 300)
SEED: Final = int(os.environ.get('FUZZ_SEED') or 1)
AT_ONCE: Final = 150  # connections of a batch
BATCHES: Final = 4  # at once, because a batch mostly waits for deadlines
DEADLINE: Final = 4  # seconds; even on a slow machine a client sends everything within them
IN_TIME: Final = 30.0  # seconds for a batch, of which the deadline takes DEADLINE and lingering 2

# ------------------------------------------------------------------------------------------------ how h11 reads it


@dataclass
class Seen:
    """A request as h11 reads it, and the bytes of its head."""

    method: str
    target: bytes
    minor: bytes
    fields: list[tuple[bytes, bytes]]
    head: bytes
    blank_lines: int = 0  # before it
    has_host: bool = True
    body: bytes = b''

    def all(self, name: bytes) -> list[bytes]:
        return [value for each, value in self.fields if each == name]

    def one(self, name: bytes) -> bytes:
        return b', '.join(self.all(name))

    @cached_property
    def path(self) -> bytes:
        return unquote_to_bytes(self.target.partition(b'?')[0])

    @property
    def closes(self) -> bool:
        options = {option.strip() for option in self.one(b'connection').lower().split(b',')}
        return b'close' in options or (self.minor == b'1.0' and b'keep-alive' not in options)


@dataclass
class Reading:
    """The requests of a client. `ends_well` is false if the last one is refused or cut off (a HEAD: `ends_in_head`)."""

    requests: list[Seen]
    ends_well: bool = True
    ends_in_head: bool = False


def read(data: bytes) -> Reading:
    found = Reading([])
    while data:
        rest = re.sub(rb'\A(\r\n)+', b'', data)  # we allow empty lines before a request (RFC 9112, 2.2), h11 does not
        try:
            request, left = read_one(rest)
        except h11.RemoteProtocolError:
            return Reading(found.requests, False, rest.startswith(b'HEAD '))
        if request is None:
            return Reading(found.requests, not rest, rest.startswith(b'HEAD '))
        request.blank_lines = (len(data) - len(rest)) // 2
        found.requests.append(request)
        data = left if not request.closes else b''
    return found


def read_one(data: bytes, has_host: bool = True) -> tuple[Seen | None, bytes]:
    """(first request or None if it is incomplete, the bytes after it). Raises RemoteProtocolError."""
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(data)
    try:
        head = parser.next_event()
    except h11.RemoteProtocolError as e:
        if 'Missing mandatory Host' not in str(e):
            raise
        return read_one(re.sub(rb'\r?\n', b'\r\nHost: localhost\r\n', data, count=1), False)  # we answer it and go on
    if not isinstance(head, h11.Request):
        return None, b''
    raw = data[: len(data) - len(parser.trailing_data[0])]
    version, fields = bytes(head.http_version), list(head.headers)
    seen = Seen(head.method.decode(), bytes(head.target), version, fields, raw, has_host=has_host)
    while isinstance(event := parser.next_event(), h11.Data):
        seen.body += event.data
    if not isinstance(event, h11.EndOfMessage):
        return None, b''
    return seen, bytes(parser.trailing_data[0])


# ------------------------------------------------------------------------------------- what only we refuse

ONCE: Final = (b'host', b'content-length', b'content-type', b'transfer-encoding', b'expect', b'origin', b'x-request-id')
PLAIN: Final = ('/health', '/healthz', '/ready', '/readyz', '/metrics')
ROUTES: Final = [
    *((re.sub(r'\{\w+\}', '[^/]+', op.path), {op.method, op.also}) for op in OPERATIONS),
    *((path, {'GET'}) for path in PLAIN),
]


def methods(request: Seen) -> set[str]:
    """The methods of a request's path; empty if there is no such path."""
    path = request.path.decode('utf-8', 'replace')
    found = {method for pattern, there in ROUTES if re.fullmatch(pattern, path) for method in there if method}
    return found | {'OPTIONS'} | ({'HEAD'} if 'GET' in found else set()) if found else found


def ambiguous(request: Seen) -> bool:
    raw = request.target.partition(b'?')[0]
    segments = request.path.split(b'/')[1:]
    return bool(
        re.search(rb'%(?![0-9A-Fa-f]{2})|%2[fF]', raw)
        or re.search(rb'[\x00-\x1f\x7f\\]', request.path)
        or {b'.', b'..'} & set(segments)
        or b'' in segments[:-1]
        or request.path.decode('utf-8', 'replace').encode() != request.path
    )


def is_json(request: Seen) -> bool:
    return request.one(b'content-type').partition(b';')[0].strip().lower() == b'application/json'


def host(request: Seen) -> str:
    return request.one(b'host').decode('latin-1')


def origin(request: Seen) -> str:
    return request.one(b'origin').decode('latin-1')


def query(request: Seen) -> bool:
    return b'?' in request.target


HOST_PORT: Final = re.compile(r'(\[[\da-f:.]+\]|[\w.-]+)(:\d{0,5})?', re.A | re.I)
FOREIGN: Final = re.compile(r'(?!localhost\.?(:|$))([\w.-]*[a-z][\w.-]*(:\d*)?|1\.2\.3)', re.A | re.I)


# The known differences: (status, name, condition). A request that meets a condition must be refused with its status.
REFUSED: Final[tuple[tuple[int, str, Callable[[Seen], object]], ...]] = (
    (400, 'a line that is folded, or not ended by CRLF', lambda r: re.search(rb'(?<!\r)\n|\r(?!\n)|\n[ \t]', r.head)),
    (400, 'a control character', lambda r: re.search(rb'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', r.head)),
    (400, 'a method over 32 characters', lambda r: len(r.method) > 32),
    (400, 'not origin-form', lambda r: not r.target.startswith(b'/')),
    (400, 'a path with two readings', ambiguous),
    (400, 'HTTP/1.2, HTTP/0.9', lambda r: r.minor not in (b'1.0', b'1.1') and r.minor[:1] in b'01'),
    (505, 'another HTTP', lambda r: r.minor[:1] not in b'01'),
    (400, 'a field twice that may stand once', lambda r: any(len(r.all(name)) > 1 for name in ONCE)),
    (400, 'two lengths', lambda r: len(lengths(r)) > 1),
    (400, 'Content-Length in other digits', lambda r: any(not re.fullmatch(rb'\d{1,15}', v) for v in lengths(r))),
    (400, 'both framings', lambda r: r.all(b'transfer-encoding') and lengths(r)),
    (411, 'chunked', lambda r: r.all(b'transfer-encoding')),
    (413, 'over the cap', lambda r: len(r.body) > 1 << 20),
    (414, 'a request line over 8 KiB', lambda r: len(r.head.partition(b'\r\n')[0]) > 8192),
    (431, 'a field over 8 KiB', lambda r: max(map(len, r.head.split(b'\r\n')[1:]), default=0) > 8192),
    (431, 'a head over 16 KiB', lambda r: len(r.head) > 16384 + 4),
    (431, 'over 64 fields', lambda r: len(r.head.split(b'\r\n')) - 3 > 64),
    (417, 'another expectation', lambda r: r.one(b'expect').lower() not in (b'', b'100-continue')),
    (417, 'an empty expectation', lambda r: r.all(b'expect') == [b'']),
    (400, 'no host at all', lambda r: not r.has_host),
    (400, 'no HOST:PORT', lambda r: r.all(b'host') and not HOST_PORT.fullmatch(host(r))),
    (421, 'a foreign host', lambda r: FOREIGN.fullmatch(host(r))),
    (403, 'a foreign origin', lambda r: r.all(b'origin') and origin(r) not in (f'http://{host(r)}', f'https://{host(r)}')),
    (404, 'no such path', lambda r: not methods(r)),
    (405, 'no such method', lambda r: methods(r) and r.method not in methods(r)),
    (415, 'a body that is not JSON', lambda r: r.method == 'POST' and r.body and not is_json(r) and not query(r)),
)  # fmt: skip
# Conditions that this file does not model in full: a request that meets one may be served or refused.
PERHAPS: Final[tuple[tuple[int, str, Callable[[Seen], object]], ...]] = (
    (400, 'what JSON, or a query, may be; a body where there is none', lambda r: r.body or query(r)),
    (422, 'arguments that do not fit', lambda r: r.body or query(r) or r.method == 'POST' or '{' in template(r)),
    (415, 'parameters of the type', lambda r: b';' in r.one(b'content-type')),
    (404, 'a thing that is not there', lambda r: '{' in template(r)),
    (421, 'a host that is nearly an address', lambda r: not host(r).startswith('localhost')),
)  # fmt: skip
BEFORE_ITS_BODY: Final = frozenset({400, 403, 404, 405, 408, 411, 413, 414, 417, 421, 431, 501, 505})


def lengths(request: Seen) -> list[bytes]:
    """The Content-Lengths as sent; h11 merges two equal ones."""
    return [value.strip(b' \t') for value in re.findall(rb'(?im)^content-length:([^\r\n]*)', request.head)]


def template(request: Seen) -> str:
    """The route of a request, with its placeholders."""
    path = request.path.decode('utf-8', 'replace')
    found = [op.path for op in OPERATIONS if re.fullmatch(re.sub(r'\{\w+\}', '[^/]+', op.path), path)]
    return ''.join(found)


def statuses(rules: tuple[tuple[int, str, Callable[[Seen], object]], ...], request: Seen) -> set[int]:
    return {status for status, _, holds in rules if holds(request)}


# ----------------------------------------------------------------------------------------------------------- comparing


def parse(raw: bytes, reading: Reading) -> Iterator[Reply]:
    """The answers that the server sent, without the interim answers (100) that the client asked for."""
    seen = reading.requests
    to_head = [request.method == 'HEAD' for request in seen] + [reading.ends_in_head] * (not reading.ends_well)
    is_clear = all(request.blank_lines < 2 for request in seen) and not reading.ends_in_head
    asked = sum(request.one(b'expect').lower() == b'100-continue' for request in seen) + (not reading.ends_well)
    interim = b'HTTP/1.1 100 Continue\r\n\r\n'
    while raw:
        if raw.startswith(interim) and asked:
            raw, asked = raw[len(interim) :], asked - 1
            continue
        head, blank, raw = raw.partition(b'\r\n\r\n')
        lines = head.decode().split('\r\n')
        assert blank, 'the head of an answer is cut off'
        assert re.fullmatch(r'HTTP/1\.1 [2-5]\d\d [A-Za-z -]+', lines[0])
        fields = {name.lower(): value for name, value in (line.split(': ', 1) for line in lines[1:])}
        is_bare = to_head and to_head.pop(0) and (is_clear or not raw.startswith(b'{'))
        length = 0 if is_bare else int(fields.get('content-length', 0))
        assert len(raw) >= length, 'the body of an answer is cut off'
        yield Reply(int(lines[0][9:12]), fields, raw[:length])
        raw = raw[length:]


def judge(case: Case, raw: bytes) -> list[str]:
    """Raises AssertionError for a wrong answer. Returns the texts of the tasks that were added."""
    reading = read(case.data)
    seen = reading.requests
    answers = list(parse(raw, reading))
    assert len(answers) <= len(seen) + (not reading.ends_well), f'{len(answers)} answers to {len(seen)} requests'
    assert not [early for early in answers[:-1] if is_last(early)], 'an answer after the last one'
    if len(answers) < len(seen) or not (reading.ends_well or case.finishes):
        assert answers and is_last(answers[-1]), 'a request without an answer'  # noqa: PT018
    for answer in answers:
        if answer.status >= 400 and answer.body:
            assert answer.headers['content-type'] == 'application/problem+json'
            assert answer.json['status'] == answer.status
    for extra in answers[len(seen) :]:
        assert extra.status in BEFORE_ITS_BODY, f'{extra.status} for a request that h11 refuses'
    return [text for pair in zip(seen, answers, strict=False) for text in compare(*pair)]


def is_last(answer: Reply) -> bool:
    return answer.headers.get('connection') == 'close'


def compare(request: Seen, answer: Reply) -> list[str]:
    """Raises AssertionError unless the answer belongs to the request and has a right status. Returns added texts."""
    given = request.one(b'x-request-id').decode('latin-1')
    if not (answer.status >= 400 and is_last(answer)) and re.fullmatch(r'[\w.-]{1,128}', given, re.A):
        assert answer.headers['x-request-id'] == given
    required = statuses(REFUSED, request)
    allowed = required or statuses(PERHAPS, request) | {200, 201, 204}
    if request.blank_lines > 1:
        allowed |= {400}  # if the blank lines arrived together
    assert answer.status in allowed, f'{answer.status} instead of one of {allowed}'
    if answer.status != 201:
        return []
    assert json.loads(request.body)['description'] == answer.json['description']
    return [answer.json['description']]


# ------------------------------------------------------------------------------------------------------------- sending


@dataclass
class Client:
    """One case on its connection."""

    case: Case
    sock: socket.socket
    got: bytes = b''

    def send(self, number: int) -> None:
        """Sends the segment of that number, if there is one, and closes our side after the last."""
        segments = self.case.segments
        if number < len(segments):
            self.sock.sendall(segments[number])
        if number == len(segments) - 1 and self.case.finishes:
            self.sock.shutdown(socket.SHUT_WR)


def play(hall: Hall, cases: list[Case]) -> dict[int, bytes]:
    """The server's answer to each case, by its number. All are sent concurrently, one segment of each at a time."""
    got: dict[int, bytes] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        clients = [Client(case, stack.enter_context(hall.connect())) for case in cases]
        for client in clients:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(client.sock, selectors.EVENT_READ, client)

        def receive(seconds: float) -> None:
            for key, _ in selector.select(seconds):
                part = key.data.sock.recv(65536)
                key.data.got += part
                if not part:
                    selector.unregister(key.data.sock)
                    got[key.data.case.number] = key.data.got

        for number in range(max(len(case.segments) for case in cases)):
            for client in clients:
                client.send(number)
            for _ in range(3):
                receive(0.01)  # the server has read that far
        deadline = time.monotonic() + IN_TIME
        while left := selector.get_map():
            late = [key.data.case for key in left.values()]
            assert time.monotonic() < deadline, f'FUZZ_SEED={SEED}: not closed in time: {late[:5]}'
            receive(0.1)
    return got


def described(case: Case, raw: bytes) -> str:
    seen = [(request.method, request.target, request.body) for request in read(case.data).requests]
    return (
        f'\nFUZZ_SEED={SEED}, case {case.number} by {case.made_by}, closes its side: {case.finishes}'
        f'\nsent: {case.segments!r}\nh11 takes: {str(seen)[:500]}\nanswered: {str(raw)[:2000]}'
    )


def test_no_request_that_h11_refuses_is_served_and_every_other_gets_the_right_status(place: Place) -> None:
    limits = dict.fromkeys(('HEAD_SECS', 'BODY_SECS', 'IDLE_SECS'), str(DEADLINE))
    hall = place.hall(**{f'TINYTOWN_TOWNHALL_LIMITS_{name}': value for name, value in limits.items()})
    print(f'FUZZ_SEED={SEED} FUZZ={COUNT}')
    added: Counter[str] = Counter()
    wrong, outcomes = [], Counter[Any]()
    cases = [make(SEED, number) for number in range(COUNT)]
    batches = [cases[first : first + AT_ONCE] for first in range(0, COUNT, AT_ONCE)]
    with ThreadPoolExecutor(BATCHES) as pool:
        played = list(pool.map(lambda batch: play(hall, batch), batches))
    for number, raw in ((number, raw) for got in played for number, raw in got.items()):
        try:
            added.update(judge(cases[number], raw))
        except AssertionError as e:
            wrong.append(f'{e}{described(cases[number], raw)}')
        outcomes.update(re.findall(rb'^HTTP/1.1 (\d+)', raw, re.M))
    print(sorted(outcomes.items()))
    assert not wrong, f'{len(wrong)} are wrong, the first of them:\n' + '\n'.join(wrong[:5])
    assert outcomes[b'201'] > COUNT / 15, 'too few were good to prove anything'
    assert Counter(texts(place)) == added, 'the backlog differs from the acknowledged tasks'


@pytest.mark.parametrize('number', range(20))
def test_a_case_can_be_reproduced_from_its_seed_and_number(number: int) -> None:
    assert make(SEED, number) == make(SEED, number)
    assert make(SEED, number) != make(SEED + 1, number)
