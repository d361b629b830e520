"""Slightly wrong HTTP requests, made from valid ones by mutation. A seed and a number reproduce each of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CRLF: Final = b'\r\n'


@dataclass
class Parts:
    """A request in parts, so that a mutation can change one of them."""

    line: bytes
    fields: list[bytes]
    body: bytes = b''

    def join(self) -> bytes:
        return CRLF.join([self.line, *self.fields, b'', self.body])

    def set(self, name: bytes, *values: bytes) -> None:
        """Replaces a header field with one field per value."""
        kept = [line for line in self.fields if not line.lower().startswith(name.lower() + b':')]
        self.fields = kept + [name + b': ' + value for value in values]


@dataclass(frozen=True)
class Case:
    """What one client sends, in segments. If it `finishes`, it closes its side then. `made_by` names the mutations."""

    number: int
    segments: list[bytes]
    finishes: bool
    made_by: list[str]

    @property
    def data(self) -> bytes:
        return b''.join(self.segments)


# ------------------------------------------------------------------------------------------------------ good requests


def _get(target: bytes, method: bytes = b'GET', *fields: bytes) -> Parts:
    return Parts(method + b' ' + target + b' HTTP/1.1', [b'Host: localhost', *fields])


def _add(text: bytes, *fields: bytes, path: bytes = b'/v1/backlog') -> Parts:
    body = b'{"description":"%b"}' % text
    length = b'Content-Length: %d' % len(body)
    head = [b'Host: localhost', b'Content-Type: application/json', length, *fields]
    return Parts(b'POST ' + path + b' HTTP/1.1', head, body)


def _chunked(text: bytes) -> Parts:
    parts = _add(text)
    parts.set(b'Content-Length')
    parts.set(b'Transfer-Encoding', b'chunked')
    parts.body = b'%x\r\n%b\r\n0\r\n\r\n' % (len(parts.body), parts.body)
    return parts


def _with_request_in_body(text: bytes) -> Parts:
    parts = _add(text)
    parts.body = _add(text + b'-within').join()
    parts.set(b'Content-Length', b'%d' % len(parts.body))
    return parts


GOOD: Final[tuple[Callable[[bytes], Parts], ...]] = (
    *[_add] * 6,
    lambda text: _add(text, b'Expect: 100-continue'),
    lambda text: _add(text, b'Connection: close'),
    lambda text: _add(text, path=b'/nowhere'),
    lambda text: _add(text, path=b'/v1/status'),
    _chunked,
    _with_request_in_body,
    lambda _: _get(b'/health'),
    lambda _: _get(b'/v1/tasks?limit=5'),
    lambda _: _get(b'/v1/town', b'HEAD'),
    lambda _: _get(b'/v1/backlog', b'OPTIONS'),
    lambda _: _get(b'/v1/agents/conductor/inbox', b'POST', b'Content-Length: 0'),
    lambda _: _get(b'/v1/backlog/00000000-0000-4000-8000-000000000000', b'DELETE'),
    lambda _: Parts(b'GET /health HTTP/1.0', [b'Connection: keep-alive']),
)

# --------------------------------------------------------------------------------------------------------- mutations

ODD_BYTES: Final = b'\0\x01\t\n\r\x0b\x1b !"#%&,/:;<>?@[\\]{|}~\x7f\x80\x85\xa0\xc0\xe9\xff0AGZaz'
ENDS: Final = (b'\n', b'\r', b'\n\r', b'\r\r\n', b'\r\n\r\n', b'\r\n ', b'\r\n\t', b' \r\n', b'\0\r\n', b'')
LENGTHS: Final = (
    *(b'', b'+5', b'-1', b'1_0', b'0x10', b'5 5', b'5,5', b'0', b'0, 0', b'1e1', b'\xa05', b'\xd9\xa3', b'5;'),
    *(b'00005', b'9' * 15, b'9' * 16, b'4611686018427387904', b'18446744073709551617', b'1048576', b'1048577', b'"5"'),
    b'5\t',
)  # fmt: skip
CODINGS: Final = (
    *(b'chunked', b'Chunked', b'identity', b'gzip', b'gzip, chunked', b'chunked, chunked', b'xchunked', b'chunked;q=1'),
    *(b'', b'"chunked"', b'\x0bchunked', b'chunked,', b'chunked\0', b'chunked\t'),
)  # fmt: skip
VERSIONS: Final = (
    b'0.9',
    b'1.0',
    b'1.1',
    b'1.2',
    b'1.10',
    b'2.0',
    b'3.0',
    b'01.1',
    b'1,1',
    b'1.1 ',
    b'',
    b'1',
    b'+1.1',
)
TARGETS: Final = (
    *(b'*', b'health', b'http://localhost/health', b'//health', b'/./health', b'/v1/../health', b'/%2e%2e/health'),
    *(b'/health%00', b'/v1%2fstatus', b'/%', b'/health#x', b'/health?', b'/health?a=b', b'/v1/tasks?limit=0', b''),
    *(b'/h\xe9alth', b'/\\health', b'/health ', b'/v1/town', b'/V1/town', b'localhost:80', b'/' + b'a' * 8200),
    b'/%68ealth',
)  # fmt: skip
METHODS: Final = (b'HEAD', b'GET', b'POST', b'PUT', b'OPTIONS', b'get', b'G(T', b'', b'CONNECT', b'TRACE', b'M' * 33)
HOSTS: Final = (
    *(b'', b'localhost:80', b'127.0.0.1', b'[::1]:1', b'evil.example', b'a b', b'user@localhost'),
    *(b'localhost,localhost', b'localhost:x', b'localhost/', b'\xe9', b'LOCALHOST.', b'localhost:123456', b'1.2.3'),
)  # fmt: skip
FIELDS: Final = (
    *(b'X: a', b'X : a', b' X: a', b'\tX: a', b'X', b': a', b'X:', b'X\0: a', b'X: a\0b', b'X: a\rb', b'X: a\nb'),
    *(b'X: \x1b', b'X: \x7f', b'X: \xe9', b'X\xe9: a', b'X(: a', b'X: ' + b'a' * 8190, b'Trailer: X', b'TE: trailers'),
    *(b'Connection: close', b'Connection: keep-alive', b'Connection: x, CLOSE', b'Upgrade: h2c', b'Origin: null'),
    *(b'Origin: http://localhost', b'Expect: 100-continue', b'Expect: a-pony', b'Content-Type: text/plain'),
    b'Content-Type: application/json',
)  # fmt: skip
SIZES: Final = (b'0', b'5', b'g', b'-1', b'0x5', b'5;a=b', b' 5', b'5 ', b'f' * 17, b'', b'00005', b'5\n')


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + bytes([rng.choice(ODD_BYTES)]) * rng.choice((1, 1, 1, 2, 40)) + data[at:]


def _replace(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.choice(ODD_BYTES)]) + data[at + 1 :]


def _remove(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 2, 8)) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    end = at + rng.choice((1, 2, 8, 30))
    return data[:end] + data[at:end] + data[end:]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _line_end(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice([match.start() for match in re.finditer(b'\r\n', data)] or [0])
    return data[:at] + rng.choice(ENDS) + data[at + 2 :]


def _line_ends(_: random.Random, data: bytes) -> bytes:
    return data.replace(b'\r\n', b'\n')


def _blank_lines(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b'\r\n', b'\r\n\r\n', b'\n', b'\r', b' ')) + data


BYTES: Final = (*[_flip, _insert, _replace, _remove] * 2, _repeat, _cut, *[_line_end] * 3, _line_ends, _blank_lines)


def _duplicate_field(rng: random.Random, parts: Parts) -> None:
    parts.fields.insert(rng.randint(0, len(parts.fields)), rng.choice(parts.fields))


def _drop_field(rng: random.Random, parts: Parts) -> None:
    parts.fields.pop(rng.randrange(len(parts.fields)))


def _new_field(rng: random.Random, parts: Parts) -> None:
    parts.fields.insert(rng.randint(0, len(parts.fields)), rng.choice(FIELDS))


def _many_fields(rng: random.Random, parts: Parts) -> None:
    parts.fields += [b'X-%d: %b' % (i, b'a' * rng.choice((1, 200))) for i in range(rng.choice((50, 61, 62, 70, 100)))]


def _spacing(rng: random.Random, parts: Parts) -> None:
    at = rng.randrange(len(parts.fields))
    name, _, value = parts.fields[at].partition(b':')
    ways = (b'%b :%b', b' %b:%b', b'%b:\t%b \t', b'%b:%b\r', b'%b:\r\n %b', b'%b%b', b'%b: :%b')
    parts.fields[at] = rng.choice(ways) % (name, value)


def _letters(rng: random.Random, parts: Parts) -> None:
    at = rng.randrange(len(parts.fields))
    parts.fields[at] = rng.choice((bytes.upper, bytes.lower, bytes.swapcase))(parts.fields[at])


def _length(rng: random.Random, parts: Parts) -> None:
    near = b'%d' % max(len(parts.body) + rng.choice((-9, -2, -1, 1, 2, 9)), 0)
    right = b'%d' % len(parts.body)
    values = rng.choice(((near,), (rng.choice(LENGTHS),), (right, right), (right, near), (near, right)))
    parts.set(rng.choice((b'Content-Length', b'content-length', b'Content-Length ')), *values)


def _coding(rng: random.Random, parts: Parts) -> None:
    parts.set(b'Transfer-Encoding', *rng.sample(CODINGS, rng.choice((1, 1, 1, 2))))
    if rng.random() < 0.5:
        parts.set(b'Content-Length')
    if rng.random() < 0.7:
        size = rng.choice((b'%x' % len(parts.body), *SIZES))
        parts.body = (
            size + CRLF + parts.body + rng.choice((CRLF, b'\n', b'')) + b'0\r\n' + rng.choice((CRLF, b'X: a\r\n\r\n'))
        )


def _host(rng: random.Random, parts: Parts) -> None:
    parts.set(b'Host', *rng.sample(HOSTS, rng.choice((1, 1, 1, 0, 2))))


def _request_line(rng: random.Random, parts: Parts) -> None:
    words = re.split(rb'[ \t]', parts.line)
    at = rng.randrange(min(len(words), 3))
    words[at] = rng.choice((METHODS, TARGETS, [b'HTTP/' + version for version in VERSIONS])[at])
    parts.line = rng.choice((b' ', b' ', b' ', b' ', b'  ', b'\t')).join(words)


def _body(rng: random.Random, parts: Parts) -> None:
    parts.body = rng.choice(
        (b'', b'[]', b'{}', b'{"description":NaN}', parts.body * 2, b'\xef\xbb\xbf' + parts.body, b'[' * 99)
    )
    if rng.random() < 0.7:
        parts.set(b'Content-Length', b'%d' % len(parts.body))


STRUCTURE: Final = (
    *(_duplicate_field, _drop_field, _new_field, _new_field, _many_fields, _spacing, _letters),
    *(_length, _length, _length, _coding, _coding, _host, _request_line, _request_line, _body),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- cases


def make(seed: int, number: int) -> Case:
    """The case with this number. Every task that it adds has a unique text."""
    rng = random.Random(f'{seed} {number}')
    data, made_by = b'', []
    for i in range(rng.choice((1, 1, 2, 2, 3))):
        parts = rng.choice(GOOD)(b'f-%d-%d' % (number, i))
        parts.fields.append(b'X-Request-ID: f-%d-%d' % (number, i))
        for mutation in rng.sample(STRUCTURE, rng.choice((0, 0, 0, 1, 1, 2))):
            if parts.fields:
                mutation(rng, parts)
                made_by.append(mutation.__name__)
        data += parts.join()
    for change in rng.sample(BYTES, rng.choice((0, 0, 0, 1) if made_by else (0, 1, 1, 2))):
        data = change(rng, data) or b'\r\n'
        made_by.append(change.__name__)
    cuts = sorted(rng.sample(range(1, len(data)), min(rng.choice((0, 0, 1, 3)), len(data) - 1)))
    segments = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Case(number, segments, rng.random() < 0.6, made_by)
