"""The audit: a file of JSON lines with the caller of every change, and a second file with every refusal.

Strangers can cause a flood of refusals. With two files the flood never displaces the record of a change.

Each change has two lines. `begin` is written before the change; if that fails, nothing is changed. `end` records the
outcome; if that fails, the client still gets its answer, and the readiness check fails until the file is writable
again. A `gap` line then says how many lines were lost. A `begin` without an `end` is a change of unknown outcome. The
`logging` module can't do this: it hides errors such as a full disk.

The event loop gathers its lines (`gathering`) and writes them once a turn (`flush`), before it sends the Redis commands
of that turn. So the `begin` line of every change is in the file before Redis hears of the change, and one write serves
many requests.

Several processes may share a file, because it is opened for appending and each batch of lines is one write. A process
that finds the file full rotates it under a lock, while nobody else writes. A number of old files is kept. When the
oldest one is discarded, a `discarded` line in the new file gives its size.

`core.dispatch` writes the lines of changes, `access` those of refusals.
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
from ..files import open_own
from ..model import Principal, rfc3339
from ..trust import DIRECTORY

# Arguments and results that identify the target of an operation. Texts of tasks and messages are not recorded.
_TARGETS: Final = frozenset({'agent', 'name', 'to', 'from', 'task_id', 'id', 'agent_id', 'message_id'})
_TARGET: Final = re.compile(r'[A-Za-z0-9_-]{1,63}')  # too short for an API key or a token
_BATCH: Final = 64  # lines in one write
_quoted: Final = json.encoder.encode_basestring_ascii


@dataclass(slots=True)
class Record:
    """What the two lines of a change have in common: `common` is JSON without its braces."""

    common: str
    target: dict[str, str]


def _record(subject: AuditSubject) -> Record:
    attempt = subject.arguments.get('attempt')
    return Record(
        f'"request_id":{_quoted(subject.request_id)},"address":{_quoted(subject.address)},{_identity(subject.by)},'
        f'"operation":{_quoted(subject.operation)},"attempt":{attempt if type(attempt) is int else "null"}',
        _targets(subject.arguments),
    )


@lru_cache(maxsize=256)
def _identity(by: Principal | None) -> str:
    name, scopes = (by.name, sorted(by.scopes)) if by else (None, [])
    return json.dumps({'principal': name, 'scopes': scopes}, separators=(',', ':'))[1:-1]


def _targets(values: Mapping[str, Any]) -> dict[str, str]:
    targets = {}
    for name in values:
        if name in _TARGETS:
            value = values[name]
            if isinstance(value, str) and _TARGET.fullmatch(value):
                targets[name] = value
    return targets


class _Journal:
    """An append-only file, rotated before it exceeds `max_bytes`; `keep` old files are kept. Raises OSError."""

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._lost = 0  # lines that no `gap` line reports yet
        self._discarded = 0  # bytes that no `discarded` line reports yet
        self._thread = threading.Lock()
        self._file = self._open()

    def _open(self) -> int:
        """Opens the file. Follows a symbolic link of ours or root's only; below `.tt` only to a device or pipe."""
        flags, file = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, Path(self.path)
        is_link = file.is_symlink()
        leads_to_device = is_link and file.exists() and not file.is_file()
        if DIRECTORY in file.parts and not leads_to_device:
            return open_own(file, flags)
        if not is_link or file.lstat().st_uid not in (os.geteuid(), 0):
            flags |= os.O_NOFOLLOW
        return os.open(file, flags, 0o600)

    @property
    def has_lost(self) -> bool:
        """Whether lines were lost that no `gap` line reports yet."""
        return bool(self._lost)

    def is_regular(self) -> bool:
        """Whether it is a regular file, which can be rotated, rather than a device or pipe."""
        return stat.S_ISREG(os.fstat(self._file).st_mode)

    def lose(self, count: int) -> None:
        """Counts lines as lost."""
        self._lost += count

    def write(self, lines: list[str]) -> None:
        """Appends lines. Counts them as lost and raises OSError if that fails."""
        try:
            with self._alone():
                self._put(''.join(lines).encode())
        except OSError:
            self._lost += len(lines)
            raise

    def is_writable(self) -> bool:
        """Whether no lines are lost, or the `gap` line that reports them can be written now."""
        if self._lost:
            with suppress(OSError), self._alone():
                self._put(b'')
        return not self._lost

    def _put(self, lines: bytes) -> None:
        size = os.fstat(self._file).st_size
        data = self._missing() + lines
        if size and size + len(data) > self._max_bytes:
            self._rotate()
            size = os.fstat(self._file).st_size
            data = self._missing() + lines
        if os.write(self._file, data) != len(data):
            with suppress(OSError):
                os.ftruncate(self._file, size)  # half a line would spoil the next one
            raise OSError(28, 'No space left on device')
        self._lost = self._discarded = 0

    def _missing(self) -> bytes:
        """The `discarded` and `gap` lines that are due: what the files no longer contain, or never did."""
        discarded = f'{{{_now("discarded")},"bytes":{self._discarded}}}\n' if self._discarded else ''
        gap = f'{{{_now("gap")},"lost":{self._lost}}}\n' if self._lost else ''
        return (discarded + gap).encode()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock on the file that the path names now. Raises OSError."""
        with self._thread:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            while not self._is_current():
                self._reopen()  # another process has rotated it; closing the old file has released our lock
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
        """Renames the file and locks a new one. The caller holds the lock on the old one, so nobody else writes."""
        old_paths = [f'{self.path}.{i}' for i in range(1, self._keep + 1)]
        free = next((i for i, path in enumerate(old_paths) if not Path(path).exists()), None)
        if free is None:
            free = self._keep - 1
            discarded = Path(old_paths[free]).stat().st_size
        else:
            discarded = 0
        for i in range(free, 0, -1):
            os.replace(old_paths[i - 1], old_paths[i])
        os.replace(self.path, old_paths[0])
        self._discarded += discarded
        self._reopen()
        fcntl.lockf(self._file, fcntl.LOCK_EX)


class Audit:
    """The audit file at `path`, and the file of refusals beside it. Raises UsageError if they can't be opened.

    Each is rotated before it exceeds `max_bytes`; `keep` old files of each are kept.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int = 1) -> None:
        self._gatherer = 0  # id of the thread whose lines wait for `flush`
        self._waiting: list[str] = []
        self._begun = False  # whether a `begin` is among them
        beside = path.with_name(f'{path.stem}.denied{path.suffix}')
        try:
            self._changes = _Journal(str(path), max_bytes, keep)
            path = beside if self._changes.is_regular() else path  # a device or pipe takes both kinds of line
            self._denials = _Journal(str(path), max_bytes, keep)
        except OSError as e:
            raise UsageError(
                f'townhall.audit.path: {path}: {e.strerror}; give a path that can be written: without an audit no '
                'change is allowed'
            ) from None

    @property
    def path(self) -> str:
        return self._changes.path

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Makes the lines of this thread wait for `flush`, which must be called before their changes are made."""
        self._gatherer = threading.get_ident()
        try:
            yield
        finally:
            self._gatherer = 0
            self.flush()

    @property
    def _gathers(self) -> bool:
        """Whether a line may wait. After a loss none does, so that a failure refuses its change before it begins."""
        return not self._changes.has_lost and threading.get_ident() == self._gatherer

    def flush(self) -> Unavailable | None:
        """Writes the waiting lines. Returns the error for the changes among them if that fails, else None."""
        begun, self._begun = self._begun, False
        waiting, self._waiting = self._waiting, []
        try:
            for i in range(0, len(waiting), _BATCH):
                self._changes.write(waiting[i : i + _BATCH])
        except OSError as e:
            self._changes.lose(len(waiting[i + _BATCH :]))
            return _unavailable(e) if begun else None
        return None

    def begin(self, subject: AuditSubject) -> Record:
        """Records a change that is about to be made. Returns the record for `end`. Raises Unavailable."""
        record = _record(subject)
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

    def end(self, record: Record, outcome: str, answer: Any = None) -> None:
        """Records the outcome of a change: ok, or an error's code. `answer` contains the ids of new records."""
        if isinstance(answer, dict):
            record.target |= _targets(answer)
        line = _line('end', record, outcome)
        if self._gathers:
            self._waiting.append(line)
            return
        with suppress(OSError):
            self._changes.write([line])

    def denied(self, subject: AuditSubject, error: TownError) -> None:
        """Records a refusal."""
        with suppress(OSError):
            self._denials.write([_line('denied', _record(subject), error.code)])

    def is_writable(self) -> bool:
        """Whether changes can be recorded now. Also tries to report lost refusals in their file."""
        self._denials.is_writable()
        return self._changes.is_writable()


def _line(phase: str, record: Record, outcome: str | None) -> str:
    target = ','.join([f'"{name}":"{value}"' for name, value in record.target.items()])  # _TARGET: no escapes needed
    result = _quoted(outcome) if outcome else 'null'
    return f'{{{_now(phase)},{record.common},"target":{{{target}}},"outcome":{result}}}\n'


def _now(phase: str) -> str:
    return f'"time":"{rfc3339(time.time())}","phase":"{phase}"'


def _unavailable(error: OSError) -> Unavailable:
    detail = f'the audit cannot be written ({error.strerror}), so nothing was changed'
    return Unavailable(detail, code='audit-unavailable', retry_after=5)
