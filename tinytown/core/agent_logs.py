"""The logs of agents: what a worker and its coding CLI say, kept in a file that is put aside once when it is full.

A place in a log is told by its offset: bytes since the log began, however often it was put aside. Where each of the two
files begins is written beside them, by inode, so that a reader can tell whatever moment it comes in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, NotRequired, TypedDict

from ..errors import Invalid
from ..files import write_atomically
from ..host import town_secrets
from ..host.town_dir import TownDir
from ..model import AgentRef, Field
from ..redaction import REDACTED, Secrets
from ..state.store import Step, text
from . import hosts
from .town import Call

MAX_PAGE_BYTES: Final = 262144  # bytes of one page
_PAGE: Final = 65536
_LINES: Final = 100
_CUT: Final = re.compile(
    rb'(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z'
)  # part of a character

# ------------------------------------------------------------------------------------------------------------- files


def rotate(file: Path) -> int:
    """Puts a log aside as NAME.1 and begins a new one: its descriptor. Raises OSError."""
    fresh = file.with_name(f'{file.name}.new')
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        with _opened(file) as pieces:
            begins = {piece.inode: piece.begin for piece in pieces[-1:]}
            begins[os.fstat(descriptor).st_ino] = pieces[-1].end if pieces else 0
        write_atomically(_beside(file), json.dumps(begins), 0o600)
        with suppress(FileNotFoundError):
            os.replace(file, _aside(file))
        os.replace(fresh, file)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def begin_of(file: Path) -> int:
    """The offset of the first byte of a log's current file."""
    with _opened(file) as pieces:
        return pieces[-1].begin if pieces else 0


@dataclass(slots=True)
class _Piece:
    """One of the two files of a log. `begin` is the offset of its first byte."""

    descriptor: int
    inode: int
    size: int
    begin: int = 0

    @property
    def end(self) -> int:
        return self.begin + self.size


def _aside(file: Path) -> Path:
    return file.with_name(f'{file.name}.1')


def _beside(file: Path) -> Path:
    return file.with_name(f'{file.name}.at')


@contextmanager
def _opened(file: Path) -> Iterator[list[_Piece]]:
    """The files of a log that are there, the older one first, as they were at one moment."""
    with ExitStack() as stack:
        while True:
            record = _record(file)
            newer, older = _open(file, stack), _open(_aside(file), stack)
            is_one = newer is not None and older is not None and newer.inode == older.inode
            if not is_one and _record(file) == record:
                break
            stack.close()  # it was put aside meanwhile
        pieces = [piece for piece in (older, newer) if piece]
        _place(pieces, _begins(record))
        yield pieces


def _open(path: Path, stack: ExitStack) -> _Piece | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    stack.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    return _Piece(descriptor, status.st_ino, status.st_size)


def _record(file: Path) -> bytes:
    """What is written beside a log; b'' if nothing is. Putting it aside begins with writing this."""
    try:
        return _beside(file).read_bytes()
    except OSError:
        return b''


def _begins(record: bytes) -> dict[str, int]:
    try:
        found: dict[str, int] = json.loads(record)
    except ValueError:
        return {}
    return found


def _place(pieces: list[_Piece], begins: dict[str, int]) -> None:
    """Gives each file the offset at which it begins. One that is not on record follows the other, or precedes it.

    What was added to the older one, or cut from it, after it was put aside is left out of account.
    """
    end = 0
    for piece in pieces:
        piece.begin = begins.get(str(piece.inode), end)
        end = piece.end
    if len(pieces) == 2:
        older, newer = pieces
        older.size = min(older.size, newer.begin - older.begin)
        older.begin = newer.begin - older.size


# ----------------------------------------------------------------------------------------------------------- reading


class LogPage(TypedDict):
    """A part of an agent's log. Offsets are bytes since the log began; go on at next_offset.

    `size` is where the log ends now. `gap`: what was asked for is not kept any more, and the page begins with the
    oldest that is. `truncated`: the log ends before the offset that was asked for, so the page begins anew.
    """

    agent: str
    offset: int
    next_offset: int
    size: int
    text: str
    gap: NotRequired[bool]
    truncated: NotRequired[bool]


class LogReader:
    """Reads an agent's log, with secrets hidden."""

    def __init__(self, agent: str, file: Path, secrets: Secrets) -> None:
        self.agent = agent
        self.file = file
        self._secrets = secrets

    def version(self) -> tuple[int, int]:
        """Something cheap to get, which is another one when there is more to read."""
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size

    def page(self, offset: int, most: int = _PAGE) -> LogPage:
        """The page at an offset."""
        with _opened(self.file) as pieces:
            first, size = (pieces[0].begin, pieces[-1].end) if pieces else (0, 0)
            newest = pieces[-1].begin if pieces else 0
            start = newest if offset > size else max(offset, first)
            stop, shown = self._show(pieces, start, min(start + most, size))
        page: LogPage = {'agent': self.agent, 'offset': start, 'next_offset': stop, 'size': size, 'text': shown}
        if offset > size:
            page['truncated'] = True
        elif offset < first:
            page['gap'] = True
        return page

    def tail(self, lines: int, most: int = MAX_PAGE_BYTES) -> LogPage:
        """The last lines, as far as they go into so many bytes."""
        with _opened(self.file) as pieces:
            size = pieces[-1].end if pieces else 0
            begin, data = _read(pieces, max(size - most, 0), size)
            at = len(data)
            for _ in range(lines + (data[-1:] == b'\n')):
                at = data.rfind(b'\n', 0, max(at, 0))
            if at < 0 and begin > (pieces[0].begin if pieces else 0):
                at = data.find(b'\n')  # the first of them is cut
            stop, shown = self._show(pieces, begin + at + 1, size)
        return {'agent': self.agent, 'offset': begin + at + 1, 'next_offset': stop, 'size': size, 'text': shown}

    def _show(self, pieces: list[_Piece], start: int, stop: int) -> tuple[int, str]:
        """The text between two offsets, and where it really ends: not within a character, if it can be helped.

        What stands around is looked at too, so that no part of a secret is shown that lies on the edge.
        """
        begin, data = _read(pieces, start - self._secrets.longest, stop + self._secrets.longest)
        cut = _CUT.search(data, max(stop - begin - 3, start - begin), stop - begin)
        if cut and cut.start() > start - begin:
            stop = begin + cut.start()
        parts, done = [], start - begin
        for span in self._secrets.spans(data):
            if span[1] > done and span[0] < stop - begin:
                parts += [data[done : max(span[0], done)], REDACTED if span[0] >= start - begin else b'']
                done = span[1]
        parts.append(data[done : max(stop - begin, done)])
        return stop, b''.join(parts).decode('utf-8', 'replace')


def _read(pieces: list[_Piece], start: int, stop: int) -> tuple[int, bytes]:
    """What is there between two offsets, and the offset at which it begins."""
    parts: list[bytes] = []
    begin = max(start, pieces[0].begin) if pieces else 0
    for piece in pieces:
        if piece.begin < stop and start < piece.end:
            at = max(start - piece.begin, 0)
            parts.append(os.pread(piece.descriptor, min(stop - piece.begin, piece.size) - at, at))
    return begin, b''.join(parts)


# --------------------------------------------------------------------------------------------------------- operations

Offset = Annotated[
    int, Field('From which byte on, counted from the beginning of the log', minimum=0, maximum=999_999_999_999_999)
]
Bytes = Annotated[int, Field('Most bytes to return', minimum=1, maximum=MAX_PAGE_BYTES)]
Lines = Annotated[int, Field('The last so many lines; 100 if no offset is given either', minimum=1, maximum=10_000)]


def open_log(call: Call, agent: str) -> Step[LogReader]:
    """The log of an agent. Raises NotFound for an unknown one, and Conflict for one whose log is on another host."""
    found = yield call.store.agent(agent)
    name, host = text(found[1]), text(found[5] or b'')
    file = TownDir(call.town.root).log(name)
    if hosts.is_other_host(host):
        yield from hosts.check_here(call, f"The log of '{name}'", host, file.exists())
    return LogReader(name, file, town_secrets.known_secrets(call.town.root, call.config, os.environ))


def read_log(
    call: Call,
    *,
    agent: AgentRef,
    offset: Offset | None = None,
    limit: Bytes | None = None,
    tail: Lines | None = None,
) -> Step[LogPage]:
    """Show what an agent's worker and its coding CLI have said: the last lines, or the part at an offset.

    It is there when the agent is stopped, too. The history of a task tells at which offsets its attempts stand.
    """
    if offset is not None and tail is not None:
        detail = 'give an offset, or the number of lines at the end, not both'
        raise Invalid(f'/tail: {detail}', errors=[{'pointer': '/tail', 'detail': detail}])
    reader = yield from open_log(call, agent)
    if offset is None:
        return reader.tail(tail or _LINES, limit or MAX_PAGE_BYTES)
    return reader.page(offset, limit or _PAGE)
