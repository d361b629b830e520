"""The logs of agents: the output of a worker and its coding CLI, in a file that is rotated when it is full.

A log is two files: NAME is the current one, NAME.1 the one before. A position in a log is an offset: the number of
bytes since the log began, which goes on counting over rotations. The file NAME.at records at which offset each of the
two files begins, by inode. So a reader knows the offsets even if it opens the files in the middle of a rotation.

`worker.cli_run` rotates a log. `rest.sse_logs` and `tt` follow it with a `LogReader`. `read_log` is the operation.
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

MAX_PAGE_BYTES: Final = 262144
_PAGE: Final = 65536  # default size of a page, in bytes
_LINES: Final = 100
_CUT: Final = re.compile(
    rb'(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z'
)  # the incomplete start of a UTF-8 character

# ------------------------------------------------------------------------------------------------------------- files


def rotate(file: Path) -> int:
    """Renames a log to NAME.1 and creates a new one. Returns the new file's descriptor. Raises OSError.

    The offsets are written first, so that a crash at any point leaves files that a reader can place.
    """
    fresh = file.with_name(f'{file.name}.new')
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        with _opened(file) as pieces:
            begins = {piece.inode: piece.begin for piece in pieces[-1:]}
            begins[os.fstat(descriptor).st_ino] = pieces[-1].end if pieces else 0
        write_atomically(_offsets_file(file), json.dumps(begins), 0o600)
        with suppress(FileNotFoundError):
            os.replace(file, _older_file(file))
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


def _older_file(file: Path) -> Path:
    return file.with_name(f'{file.name}.1')


def _offsets_file(file: Path) -> Path:
    return file.with_name(f'{file.name}.at')


@contextmanager
def _opened(file: Path) -> Iterator[list[_Piece]]:
    """The existing files of a log, the older one first. Opens them again if the log is rotated meanwhile."""
    with ExitStack() as stack:
        while True:
            record = _read_offsets(file)
            newer, older = _open(file, stack), _open(_older_file(file), stack)
            is_one = newer is not None and older is not None and newer.inode == older.inode
            if not is_one and _read_offsets(file) == record:
                break
            stack.close()  # the log was rotated meanwhile
        pieces = [piece for piece in (older, newer) if piece]
        _place(pieces, _parse_offsets(record))
        yield pieces


def _open(path: Path, stack: ExitStack) -> _Piece | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    stack.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    return _Piece(descriptor, status.st_ino, status.st_size)


def _read_offsets(file: Path) -> bytes:
    """The content of NAME.at, b'' if there is none. A rotation writes it first, so a change of it shows a rotation."""
    try:
        return _offsets_file(file).read_bytes()
    except OSError:
        return b''


def _parse_offsets(record: bytes) -> dict[str, int]:
    """The offset of each file's first byte, by inode."""
    try:
        begins: dict[str, int] = json.loads(record)
    except ValueError:
        return {}
    return begins


def _place(pieces: list[_Piece], begins: dict[str, int]) -> None:
    """Sets the offset at which each file begins. A file that is not in `begins` is placed next to the other one.

    The older file ends where the newer one begins, even if somebody appended to it or truncated it after the rotation.
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
    """A part of an agent's log. Offsets are bytes since the log began; the next page begins at next_offset.

    `size` is the offset of the log's end now. `gap` means that a rotation deleted the requested part; the page begins
    with the oldest part that is left. `truncated` means that the log ends before the requested offset; the page begins
    at the start of the current file.
    """

    agent: str
    offset: int
    next_offset: int
    size: int
    text: str
    gap: NotRequired[bool]
    truncated: NotRequired[bool]


class LogReader:
    """Reads an agent's log and replaces secrets. Opens the files anew for each page."""

    def __init__(self, agent: str, file: Path, secrets: Secrets) -> None:
        self.agent = agent
        self.file = file
        self._secrets = secrets

    def version(self) -> tuple[int, int]:
        """A cheap value that changes if there may be more to read: inode and size of the current file."""
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size

    def page(self, offset: int, max_bytes: int = _PAGE) -> LogPage:
        """The page that begins at an offset."""
        with _opened(self.file) as pieces:
            first, size = (pieces[0].begin, pieces[-1].end) if pieces else (0, 0)
            newest = pieces[-1].begin if pieces else 0
            start = newest if offset > size else max(offset, first)
            stop, shown = self._show(pieces, start, min(start + max_bytes, size))
        page: LogPage = {'agent': self.agent, 'offset': start, 'next_offset': stop, 'size': size, 'text': shown}
        if offset > size:
            page['truncated'] = True
        elif offset < first:
            page['gap'] = True
        return page

    def tail(self, lines: int, max_bytes: int = MAX_PAGE_BYTES) -> LogPage:
        """The last lines, but at most `max_bytes`. Begins with a whole line if one fits."""
        with _opened(self.file) as pieces:
            size = pieces[-1].end if pieces else 0
            begin, data = _read(pieces, max(size - max_bytes, 0), size)
            at = len(data)
            for _ in range(lines + (data[-1:] == b'\n')):
                at = data.rfind(b'\n', 0, max(at, 0))
            if at < 0 and begin > (pieces[0].begin if pieces else 0):
                at = data.find(b'\n')  # skip the first line, which is incomplete
            stop, shown = self._show(pieces, begin + at + 1, size)
        return {'agent': self.agent, 'offset': begin + at + 1, 'next_offset': stop, 'size': size, 'text': shown}

    def _show(self, pieces: list[_Piece], start: int, stop: int) -> tuple[int, str]:
        """The text between two offsets without secrets, and the offset where it ends.

        It ends before `stop` if a character would be cut there. The bytes on both sides are searched for secrets too,
        so that no part of a secret on the edge is shown. A secret is replaced where it begins.
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
    """The bytes between two offsets as far as they exist, and the offset of the first one."""
    parts: list[bytes] = []
    begin = max(start, pieces[0].begin) if pieces else 0
    for piece in pieces:
        if piece.begin < stop and start < piece.end:
            at = max(start - piece.begin, 0)
            parts.append(os.pread(piece.descriptor, min(stop - piece.begin, piece.size) - at, at))
    return begin, b''.join(parts)


# --------------------------------------------------------------------------------------------------------- operations

Offset = Annotated[
    int, Field('Offset of the first byte to return: bytes since the log began', minimum=0, maximum=999_999_999_999_999)
]
Bytes = Annotated[int, Field('Most bytes to return', minimum=1, maximum=MAX_PAGE_BYTES)]
Lines = Annotated[
    int, Field('How many lines to return from the end; 100 if no offset is given either', minimum=1, maximum=10_000)
]


def open_log(call: Call, agent: str) -> Step[LogReader]:
    """A reader for an agent's log. Raises NotFound for an unknown agent, Conflict if the log is on another host."""
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
    """Show the output of an agent's worker and its coding CLI: the last lines, or the part at an offset.

    The log is kept when the agent is stopped. The history of a task shows the log offsets of its attempts.
    """
    if offset is not None and tail is not None:
        detail = 'give either offset or tail, not both'
        raise Invalid(f'/tail: {detail}', errors=[{'pointer': '/tail', 'detail': detail}])
    reader = yield from open_log(call, agent)
    if offset is None:
        return reader.tail(tail or _LINES, limit or MAX_PAGE_BYTES)
    return reader.page(offset, limit or _PAGE)
