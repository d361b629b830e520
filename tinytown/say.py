"""The log of whatever runs: the one place through which every line goes, to stderr or to the journal.

Text is for people: `TIME PART: MESSAGE`, and the traceback of a fault after it. JSON is one object a line. The journal
is systemd's, by its native protocol, so that fields can be asked for (`journalctl REQUEST_ID=…`).

The log must neither end the service nor hold it up: what can't be written (a full disk, a closed pipe, a reader that
has stopped reading) waits, up to MOST_WAITING bytes; lines beyond that are dropped, and it is told how many.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal, cast, get_args

from .model import rfc3339

Level = Literal['debug', 'info', 'warning', 'error']
Format = Literal['text', 'json', 'journal']
Hide = Callable[[bytes], bytes]
Send = Callable[[bytes | bytearray], int]

MOST_WAITING: Final = 1 << 20
JOURNAL: Final = '/run/systemd/journal/socket'
_ORDER: Final = ('debug', 'info', 'warning', 'error')
_PRIORITIES: Final = {'debug': '7', 'info': '6', 'warning': '4', 'error': '3'}  # of syslog
_RENAMED: Final = {'PART': 'TINYTOWN_PART', 'PRINCIPAL': 'TINYTOWN_PRINCIPAL', 'PATH': 'URL_PATH', 'MS': 'DURATION_MS'}


def say(part: str, message: str, level: Level = 'info', error: BaseException | None = None, **fields: Any) -> None:
    """Writes to the log at once. Any thread may call.

    `part` is who speaks (townhall, http, access, redis, caretaker, mcp); `error` is told with its traceback; `fields`
    (request_id, principal, …) are for the formats that have fields.
    """
    _log.say(part, message, level, error, fields)


def configure(
    format: Format = 'text', level: Level = 'info', town: str = '', hide: Hide = bytes, journal: str = JOURNAL
) -> None:
    """How this process writes its log from now on. `hide` takes secrets out of what is written.

    Also has the faults of threads told in that form.
    """
    _log.format, _log.level, _log.town, _log.hide = format, level, town, hide
    before, _log.journal = _log.journal, _Journal(journal) if format == 'journal' else None
    if before:
        before.close()
    threading.excepthook = _thread_failed


def begin(environ: Mapping[str, str]) -> None:
    """Has the form that the environment says, before the configuration is read: what is wrong with that is told so."""
    said = environ.get('TINYTOWN_TOWNHALL_LOG_FORMAT')
    if said in get_args(Format):
        configure(cast(Format, said))


def is_told(level: Level) -> bool:
    """Whether lines of a level are written: what is costly to find out need not be, otherwise."""
    return _ORDER.index(level) >= _ORDER.index(_log.level)


def as_line(part: str, message: str, **fields: Any) -> str:
    """A line of JSON, for `write`."""
    return _json(part, message, 'info', None, fields)


def write(lines: str) -> None:
    """Writes lines that are ready made to stderr."""
    _log.stderr.write(_log.hide(lines.encode('utf-8', 'backslashreplace')))


def retry() -> None:
    """Tries again to write what waits, if something does."""
    if _log.stderr.waits:
        _log.stderr.write(b'')


def finish(seconds: float = 0.5) -> None:
    """Gives whoever reads the log as long to take what still waits. Called when the process ends."""
    deadline = time.monotonic() + seconds
    while _log.stderr.waits and time.monotonic() < deadline:
        retry()
        time.sleep(0.01)


def last_words(said: str) -> None:
    """Tells why a townhall ends, on stderr: a person or a service manager looks there. One line."""
    if _log.format == 'json':
        say('townhall', said, 'error')
    else:
        write(f'townhall: {said}\n')


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else 'a thread'
    say('townhall', f'{name} failed', 'error', failed.exc_value)


# ------------------------------------------------------------------------------------------------------------- formats


class _Log:
    """Where lines go, and how."""

    def __init__(self) -> None:
        self.format: Format = 'text'
        self.level: Level = 'info'
        self.town = ''
        self.hide: Hide = bytes
        self.journal: _Journal | None = None
        self.stderr = _Stderr()

    def say(self, part: str, message: str, level: Level, error: BaseException | None, fields: dict[str, Any]) -> None:
        if not is_told(level):
            return
        if self.journal and self.journal.send(self._entry(part, message, level, error, fields)):
            return
        render = _json if self.format == 'json' else _text
        write(render(part, message, level, error, fields))

    def _entry(
        self, part: str, message: str, level: Level, error: BaseException | None, fields: dict[str, Any]
    ) -> dict[str, bytes]:
        """The fields of a line in the journal."""
        told = {'message': message, 'priority': _PRIORITIES[level], 'syslog_identifier': 'townhall', 'part': part}
        told |= {'tinytown_town': self.town, 'error': _trace(error)} | fields
        named = {_RENAMED.get(name.upper(), name.upper()): str(value) for name, value in told.items() if value != ''}
        return {name: self.hide(value.encode('utf-8', 'backslashreplace')) for name, value in named.items()}


def _text(part: str, message: str, _level: Level, error: BaseException | None, _fields: dict[str, Any]) -> str:
    shown = message if message.isprintable() else ''.join(map(_visible, message))  # no line can be forged
    return f'{rfc3339(time.time())} {part}: {shown}\n{_trace(error)}'


def _json(part: str, message: str, level: Level, error: BaseException | None, fields: dict[str, Any]) -> str:
    record = {'time': rfc3339(time.time()), 'level': level, 'part': part, 'message': message, **fields}
    return json.dumps(record | ({'error': _trace(error)} if error else {})) + '\n'


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode('unicode_escape').decode()


def _trace(error: BaseException | None) -> str:
    if not error:
        return ''
    import traceback  # late: only faults need it

    return ''.join(traceback.format_exception(error))


# -------------------------------------------------------------------------------------------------------------- stderr


class _Stderr:
    """The standard error, written without waiting for whoever reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: Any = None
        self._send: Send = len
        self._waiting = bytearray()
        self._lost = 0
        os.register_at_fork(after_in_child=self._begin)

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def _begin(self) -> None:
        """In a process that was forked: the lock may have been held, and what waits is the parent's."""
        self._lock = threading.Lock()
        self._waiting, self._lost = bytearray(), 0

    def write(self, data: bytes) -> None:
        """Writes whole lines; what is not taken now waits."""
        with self._lock:
            if self._stream is not sys.stderr:
                self._stream, self._send = sys.stderr, _sender(sys.stderr)
            if not self._waiting:
                data = data[self._sent(data) :]
            if len(self._waiting) + len(data) > MOST_WAITING:
                self._lost += data.count(b'\n')
            else:
                self._waiting += data
            while self._waiting and (sent := self._sent(self._waiting)):
                del self._waiting[:sent]
            if self._lost and not self._waiting:
                lost, self._lost = self._lost, 0
                render = _json if _log.format == 'json' else _text
                what = f'{lost} lines of the log were dropped: nobody took them'
                self._waiting += render('townhall', what, 'warning', None, {}).encode()

    def _sent(self, data: bytes | bytearray) -> int:
        """How many bytes were taken; 0 if none can be now."""
        try:
            return self._send(data) if data else 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            return 0


def _sender(stream: Any) -> Send:
    """What writes to a stream and never waits, but for a disk. It raises OSError where nothing can be written."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):
        return lambda data: _sent_to(stream, data)
    if stat.S_ISREG(mode):
        with suppress(OSError):  # as a shell's  2>FILE  does not: it may be cut short by who rotates it
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        return lambda data: os.write(descriptor, data)
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT)
    try:  # another description of the same pipe or terminal: the flag is ours alone
        ours = os.open(f'/proc/self/fd/{descriptor}', os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # it is another user's, or there is no /proc
        return lambda data: _sent_in_pieces(descriptor, data)
    return lambda data: os.write(ours, data)


def _sent_to(stream: Any, data: bytes | bytearray) -> int:
    """Writes to a stream that is no descriptor."""
    stream.write(data.decode('utf-8', 'backslashreplace'))
    stream.flush()
    return len(data)


def _sent_in_pieces(descriptor: int, data: bytes | bytearray) -> int:
    """Writes as much as a pipe surely has room for, if it has any."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return os.write(descriptor, data[: select.PIPE_BUF]) if poll.poll(0) else 0


# ------------------------------------------------------------------------------------------------------------- journal


class _Journal:
    """The journal of systemd (its native protocol, a datagram an entry)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, fields: dict[str, bytes]) -> bool:
        """Sends an entry. Whether the journal took it."""
        data = b''.join(_field(name.encode(), value) for name, value in fields.items())
        try:
            self._socket.sendto(data, self._path)
        except BlockingIOError:
            return False
        except OSError:  # it is too large for a datagram, or nobody is there
            return self._send_file(data)
        return True

    def close(self) -> None:
        self._socket.close()

    def _send_file(self, data: bytes) -> bool:
        """Sends an entry as a sealed file in memory, as the protocol has it for large ones."""
        try:
            file = os.memfd_create('townhall-log', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError):
            return False
        try:
            with open(file, 'wb', closefd=False) as written:
                written.write(data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, file.to_bytes(4, sys.byteorder))]
            self._socket.sendmsg([], passed, 0, self._path)
        except OSError:
            return False
        finally:
            os.close(file)
        return True


def _field(name: bytes, value: bytes) -> bytes:
    """A field of an entry; a value of several lines stands behind its length."""
    if b'\n' in value:
        return name + b'\n' + len(value).to_bytes(8, 'little') + value + b'\n'
    return name + b'=' + value + b'\n'


_log: Final = _Log()
