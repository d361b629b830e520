"""The audit: a file of JSON lines that tells of every change who asked for it; one beside it, of every refusal.

They are two so that a flood of refusals, which strangers can send, never displaces the record of a change.

`begin` is written before a change is made: if that fails nothing is done. `end` says what came of it: if that fails the
answer stands, and readiness ends until the file can be written again; a `gap` line then says how many were lost. A
`begin` without an `end` is a change whose outcome nobody knows. `logging` is of no use here: it swallows a full disk.

The event loop's own lines wait until the end of its turn, and are written at once before the commands of that turn are
sent: no change is under way whose `begin` is not in the file, and a write serves many requests.

Lines are one write to a file opened for appending, so several processes may share it; a lock on it makes the one that
finds it full put it aside while nobody writes. A number of those is kept; where the oldest one is discarded, a
`discarded` line in the new file says of how many bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ..core.dispatch import AuditSubject
from ..errors import TownError, Unavailable, UsageError
from ..model import Principal, rfc3339

# Arguments and results that say on what an operation acts. Texts of tasks and messages are not among them.
_TARGETS: Final = frozenset({'agent', 'name', 'to', 'from', 'task_id', 'id', 'agent_id', 'message_id'})
_TARGET: Final = re.compile(r'[A-Za-z0-9_-]{1,63}')  # too short for a key of ours
_AT_ONCE: Final = 64  # lines in one write
_quoted: Final = json.encoder.encode_basestring_ascii


@dataclass(slots=True)
class Record:
    """What the two lines of a change have in common: JSON without its braces, and on what it acts."""

    common: str
    target: dict[str, str]


def _record(visit: AuditSubject) -> Record:
    attempt = visit.arguments.get('attempt')
    return Record(
        f'"request_id":{_quoted(visit.request_id)},"address":{_quoted(visit.address)},{_identity(visit.by)},'
        f'"operation":{_quoted(visit.operation)},"attempt":{attempt if type(attempt) is int else "null"}',
        _targets(visit.arguments),
    )


@lru_cache(maxsize=256)
def _identity(by: Principal | None) -> str:
    name, scopes = (by.name, sorted(by.scopes)) if by else (None, [])
    return json.dumps({'principal': name, 'scopes': scopes}, separators=(',', ':'))[1:-1]


def _targets(found: Mapping[str, Any]) -> dict[str, str]:
    told = {}
    for name in found:
        if name in _TARGETS:
            value = found[name]
            if isinstance(value, str) and _TARGET.fullmatch(value):
                told[name] = value
    return told


class _Journal:
    """A file that lines are added to, put aside once it has `most` bytes; `keep` of those are kept. Raises OSError."""

    def __init__(self, path: str, most: int, keep: int) -> None:
        self.path = path
        self._most = most
        self._keep = keep
        self._lost = 0
        self._discarded = 0  # bytes that no line has told of yet
        self._thread = threading.Lock()
        self._file = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600)

    @property
    def has_lost(self) -> bool:
        """Whether there are lines that could not be written, and that the file does not tell of yet."""
        return bool(self._lost)

    def is_regular(self) -> bool:
        """Whether it is a file that can be put aside, and no device or pipe."""
        return stat.S_ISREG(os.fstat(self._file).st_mode)

    def lose(self, count: int) -> None:
        """Counts lines that nobody tried to write."""
        self._lost += count

    def write(self, lines: list[str]) -> None:
        """Raises OSError, and counts the lines as lost then."""
        try:
            with self._alone():
                self._put(''.join(lines).encode())
        except OSError:
            self._lost += len(lines)
            raise

    def is_writable(self) -> bool:
        """Whether the last line could be written, or a line can be now that says how many could not."""
        if self._lost:
            with suppress(OSError), self._alone():
                self._put(b'')
        return not self._lost

    def _put(self, lines: bytes) -> None:
        size = os.fstat(self._file).st_size
        data = self._missing() + lines
        if size and size + len(data) > self._most:
            self._rotate()
            size = os.fstat(self._file).st_size
            data = self._missing() + lines
        if os.write(self._file, data) != len(data):
            with suppress(OSError):
                os.ftruncate(self._file, size)  # half a line would spoil the next one
            raise OSError(28, 'No space left on device')
        self._lost = self._discarded = 0

    def _missing(self) -> bytes:
        """Lines that tell of what is not in the files any more, or never was."""
        discarded = f'{{{_now("discarded")},"bytes":{self._discarded}}}\n' if self._discarded else ''
        gap = f'{{{_now("gap")},"lost":{self._lost}}}\n' if self._lost else ''
        return (discarded + gap).encode()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock on the file that stands at the path now. Raises OSError."""
        with self._thread:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            while not self._is_current():
                self._reopen()  # another process has put it aside; closing it has ended our lock
                fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _is_current(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))  # noqa: PTH116  at every line
        return False

    def _reopen(self) -> None:
        new = self._open()
        os.close(self._file)
        self._file = new

    def _rotate(self) -> None:
        """Puts the file aside and takes the lock on a new one, before which nobody else can write to it."""
        aside = [f'{self.path}.{i}' for i in range(1, self._keep + 1)]
        free = next((i for i, path in enumerate(aside) if not Path(path).exists()), None)
        if free is None:
            free = self._keep - 1
            discarded = Path(aside[free]).stat().st_size
        else:
            discarded = 0
        for i in range(free, 0, -1):
            os.replace(aside[i - 1], aside[i])
        os.replace(self.path, aside[0])
        self._discarded += discarded
        self._reopen()
        fcntl.lockf(self._file, fcntl.LOCK_EX)


class Audit:
    """The audit file at `path`, and that of refusals beside it. Raises UsageError when they can't be opened.

    Each is put aside once it has `most` bytes; `keep` of those are kept.
    """

    def __init__(self, path: Path, most: int, keep: int = 1) -> None:
        self._gatherer = 0  # the thread whose lines wait for `flush`
        self._waiting: list[str] = []
        self._begun = False  # whether a `begin` is among them
        beside = path.with_name(f'{path.stem}.denied{path.suffix}')
        try:
            self._changes = _Journal(str(path), most, keep)
            path = beside if self._changes.is_regular() else path  # beside a device or pipe there is no place
            self._denials = _Journal(str(path), most, keep)
        except OSError as e:
            raise UsageError(
                f'townhall.audit.path: {path}: {e.strerror}; nothing is changed without an audit'
            ) from None

    @property
    def path(self) -> str:
        return self._changes.path

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """For as long as it lasts the lines of this thread wait for `flush`, which must come before their effects."""
        self._gatherer = threading.get_ident()
        try:
            yield
        finally:
            self._gatherer = 0
            self.flush()

    @property
    def _gathers(self) -> bool:
        """Whether a line may wait. None does after one was lost, so that a change is refused before it is begun."""
        return not self._changes.has_lost and threading.get_ident() == self._gatherer

    def flush(self) -> Unavailable | None:
        """Writes the lines that wait. The error for changes that wait with them, if they could not be written."""
        begun, self._begun = self._begun, False
        waiting, self._waiting = self._waiting, []
        try:
            for i in range(0, len(waiting), _AT_ONCE):
                self._changes.write(waiting[i : i + _AT_ONCE])
        except OSError as e:
            self._changes.lose(len(waiting[i + _AT_ONCE :]))
            return _unavailable(e) if begun else None
        return None

    def begin(self, visit: AuditSubject) -> Record:
        """Writes down what is about to be done; the record that `end` takes. Raises Unavailable."""
        record = _record(visit)
        line = _line('begin', record, None)
        if self._gathers:
            self._waiting.append(line)
            self._begun = True
            return record
        try:
            self._changes.write([line])
        except OSError as e:
            raise _unavailable(e) from None
        return record

    def end(self, record: Record, outcome: str, made: Any = None) -> None:
        """Writes down what came of it: ok, or the code of an error. `made` is the answer, which names what is new."""
        if isinstance(made, dict):
            record.target |= _targets(made)
        line = _line('end', record, outcome)
        if self._gathers:
            self._waiting.append(line)
            return
        with suppress(OSError):
            self._changes.write([line])

    def denied(self, visit: AuditSubject, error: TownError) -> None:
        """Writes down that a caller was refused."""
        with suppress(OSError):
            self._denials.write([_line('denied', _record(visit), error.code)])

    def is_writable(self) -> bool:
        """Whether changes can be written down now. Also tries to tell of refusals that could not be."""
        self._denials.is_writable()
        return self._changes.is_writable()


def _line(phase: str, record: Record, outcome: str | None) -> str:
    target = ','.join([f'"{name}":"{value}"' for name, value in record.target.items()])  # of plain characters, all
    came = _quoted(outcome) if outcome else 'null'
    return f'{{{_now(phase)},{record.common},"target":{{{target}}},"outcome":{came}}}\n'


def _now(phase: str) -> str:
    return f'"time":"{rfc3339(time.time())}","phase":"{phase}"'


def _unavailable(error: OSError) -> Unavailable:
    detail = f'the audit can not be written ({error.strerror}), so nothing was changed'
    return Unavailable(detail, code='audit-unavailable', retry_after=5)
