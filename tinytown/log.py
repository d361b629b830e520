"""Writes the log of a process: handlers and formatters for the stdlib's `logging`. Start reading at `configure`.

A module's logger is named by its room: `logging.getLogger('tinytown.http')`. Fields (request_id, principal, …) go into
`extra`, an exception into `exc_info`. There are three formats. Text is for people: `TIME PART: MESSAGE`, followed by
the traceback of an exception. JSON is one object per line. Journal sends to systemd's journal over its native protocol,
so that fields can be searched (`journalctl REQUEST_ID=…`).

Logging never blocks the service and never ends it. Lines that can't be written now (full disk, closed pipe, stopped
reader) are buffered, up to MAX_BUFFERED bytes. Lines beyond that are dropped, and the log says how many.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal, cast, get_args

from .model import rfc3339

Level = Literal['debug', 'info', 'warning', 'error']
Format = Literal['text', 'json', 'journal']
Hide = Callable[[bytes], bytes]
Send = Callable[[bytes | bytearray], int]

MAX_BUFFERED: Final = 1 << 20
JOURNAL: Final = '/run/systemd/journal/socket'
_FLUSH_SECS: Final = 0.5  # how long the end of the process waits for the reader to take buffered lines

# PART is the last word of a logger's name, and of a library's the first; these loggers are the exceptions.
_PARTS: Final = {
    'tinytown.state': 'redis',
    'tinytown.host': 'notify',
    'tinytown.auth': 'townhall',
    'tinytown.worker': 'caretaker',
}
_RENAMED: Final = {'PART': 'TINYTOWN_PART', 'PRINCIPAL': 'TINYTOWN_PRINCIPAL', 'PATH': 'URL_PATH', 'MS': 'DURATION_MS'}
_PRIORITIES: Final = {'debug': '7', 'info': '6', 'warning': '4', 'error': '3'}  # syslog's
_OWN: Final = frozenset({*vars(logging.makeLogRecord({})), 'message', 'asctime'})  # all others came with `extra`

_logger: Final = logging.getLogger('tinytown.townhall')


def configure(
    format: Format = 'text', level: Level = 'info', town: str = '', hide: Hide = bytes, journal: str = JOURNAL
) -> None:
    """Sets how this process writes its log from now on. `hide` removes secrets from the bytes to be written.

    Warnings of libraries and exceptions in threads are logged the same way. Nothing else writes to stderr, because that
    could block.
    """
    global _handler
    _stderr.setFormatter(JsonFormatter() if format == 'json' else TextFormatter())
    _stderr.hide = hide
    before, _handler = _handler, JournalHandler(journal, town, hide, _stderr) if format == 'journal' else _stderr
    root = logging.getLogger()
    root.addHandler(_handler)  # first, so that no line of another thread is lost in between
    if before is not _handler:
        root.removeHandler(before)
        before.close()
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger('tinytown').setLevel(number)
    logging.raiseExceptions = False
    logging.lastResort = _stderr  # for a library's logger that has no handler and does not propagate
    threading.excepthook = _thread_failed


def configure_from_environment(environ: Mapping[str, str]) -> None:
    """Sets the format from the environment, so that errors in the configuration are logged in it, too."""
    wanted = environ.get('TINYTOWN_TOWNHALL_LOG_FORMAT')
    configure(cast(Format, wanted) if wanted in get_args(Format) else 'text')


# The access log has a line per request. It bypasses `logging`, whose records would cost more than everything else.


def write(lines: str) -> None:
    """Writes formatted lines to stderr."""
    _stderr.write(lines)


def json_line(part: str, message: str, **fields: Any) -> str:
    """A line of level info in the format of JsonFormatter, for `write`."""
    return _json(time.time(), 'info', part, message, fields) + '\n'


def send(part: str, message: str, **fields: Any) -> None:
    """Sends a line of level info to the journal, or to stderr if there is no journal or it is full."""
    if not isinstance(_handler, JournalHandler) or not _handler.send('info', part, message, fields):
        write(_text(time.time(), part, message) + '\n')


def flush(seconds: float = _FLUSH_SECS) -> None:
    """Writes the buffered lines, waiting up to `seconds` for the reader; 0 tries once."""
    _stderr.flush(seconds)


def fatal(message: str) -> None:
    """Writes the reason why a townhall ends, in one line, to stderr, where people and service managers look."""
    if isinstance(_stderr.formatter, JsonFormatter):
        _logger.error(message)
    else:
        write(f'townhall: {message}\n')


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else 'a thread'
    _logger.error(f'{name} failed', exc_info=failure.exc_value)


# ------------------------------------------------------------------------------------------------------------- formats


class TextFormatter(logging.Formatter):
    """`TIME PART: MESSAGE`, followed by the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = _text(record.created, _part(record.name), record.getMessage())
        return f'{line}\n{_trace(record)}'.removesuffix('\n')


class JsonFormatter(logging.Formatter):
    """One object, with the fields of `extra` and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if trace := _trace(record):
            fields['error'] = trace
        return _json(record.created, _level(record.levelno), _part(record.name), record.getMessage(), fields)


def _text(created: float, part: str, message: str) -> str:
    shown = message if message.isprintable() else ''.join(map(_escape, message))  # so that no message can forge a line
    return f'{rfc3339(created)} {part}: {shown}'


def _json(created: float, level: str, part: str, message: str, fields: dict[str, Any]) -> str:
    line = {'time': rfc3339(created), 'level': level, 'part': part, 'message': message, **fields}
    return json.dumps(line, default=str)


def _part(name: str) -> str:
    """The PART in the lines of a logger."""
    if name in _PARTS:
        return _PARTS[name]
    first, _, rest = name.partition('.')
    return rest.rpartition('.')[2] if first == 'tinytown' and rest else first


def _level(number: int) -> Level:
    """Our level for a number: libraries may use levels between the four."""
    if number >= logging.ERROR:
        return 'error'
    if number >= logging.WARNING:
        return 'warning'
    return 'info' if number >= logging.INFO else 'debug'


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _trace(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    return ''.join(traceback.format_exception(error)) if error else ''


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode('unicode_escape').decode()


# -------------------------------------------------------------------------------------------------------------- stderr


class StderrHandler(logging.Handler):
    """Writes lines to stderr without waiting for its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(TextFormatter())
        self.hide: Hide = bytes
        self._stream: Any = None
        self._send: Send = len
        self._buffer = bytearray()
        self._dropped = 0  # lines
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Empties the buffer of a forked child: the parent writes those lines. `logging` itself renews the lock."""
        self._buffer, self._dropped = bytearray(), 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record) + '\n')
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Logs that a line can't be formatted, because its arguments do not fit its message."""
        with suppress(Exception):
            self.write(self._warning(f'a line of {record.name} can not be formatted: {record.msg!r}'))

    def write(self, lines: str) -> None:
        """Writes whole lines. Bytes that the reader does not take now are buffered."""
        data = self.hide(lines.encode('utf-8', 'backslashreplace'))
        self.acquire()
        try:
            self._write(data)
        finally:
            self.release()

    def flush(self, seconds: float = _FLUSH_SECS) -> None:
        """Writes the buffered lines, for up to `seconds`. `logging` calls it when the process ends."""
        deadline = time.monotonic() + seconds
        while self._buffer:
            self.write('')
            if time.monotonic() >= deadline:
                return
            time.sleep(0.01)

    def _write(self, data: bytes) -> None:
        if self._stream is not sys.stderr:
            self._stream, self._send = sys.stderr, _sender(sys.stderr)
        if not self._buffer:
            data = data[self._sent(data) :]
        if len(self._buffer) + len(data) > MAX_BUFFERED:
            self._dropped += data.count(b'\n')
        else:
            self._buffer += data
        while self._buffer and (sent := self._sent(self._buffer)):
            del self._buffer[:sent]
        if self._dropped and not self._buffer:
            dropped, self._dropped = self._dropped, 0
            self._buffer += self._warning(f'{dropped} lines of the log were dropped: stderr did not take them').encode()

    def _warning(self, message: str) -> str:
        """A line about the log itself."""
        fields = {'name': _logger.name, 'levelno': logging.WARNING, 'msg': message}
        return self.format(logging.makeLogRecord(fields)) + '\n'

    def _sent(self, data: bytes | bytearray) -> int:
        """Sends what the stream takes now. Returns the number of bytes, 0 if it takes none."""
        try:
            return self._send(data) if data else 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            return 0


def _sender(stream: Any) -> Send:
    """A function that writes to a stream without blocking, except on a disk. It raises OSError if it can't write."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):
        return lambda data: _sent_to(stream, data)
    if stat.S_ISREG(mode):
        with suppress(OSError):  # a shell's  2>FILE  does not append, and log rotation may truncate the file
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        return lambda data: os.write(descriptor, data)
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT)
    try:  # a second open file description of the pipe or terminal, so that O_NONBLOCK affects nobody else
        own = os.open(f'/proc/self/fd/{descriptor}', os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # another user's terminal, or no /proc
        return lambda data: _sent_in_pieces(descriptor, data)
    return lambda data: os.write(own, data)


def _sent_to(stream: Any, data: bytes | bytearray) -> int:
    """Writes to a stream that has no descriptor."""
    stream.write(data.decode('utf-8', 'backslashreplace'))
    stream.flush()
    return len(data)


def _sent_in_pieces(descriptor: int, data: bytes | bytearray) -> int:
    """Writes at most PIPE_BUF bytes, which a writable pipe takes without blocking; nothing if it is not writable."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return os.write(descriptor, data[: select.PIPE_BUF]) if poll.poll(0) else 0


# ------------------------------------------------------------------------------------------------------------- journal


class JournalHandler(logging.Handler):
    """Sends entries to systemd's journal by its native protocol, one datagram per entry.

    `fallback` handles the entries that the journal does not take.
    """

    def __init__(self, path: str, town: str, hide: Hide, fallback: StderrHandler) -> None:
        super().__init__()
        self._path = path
        self._town = town
        self._hide = hide
        self._fallback = fallback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level, part, trace = _level(record.levelno), _part(record.name), _trace(record)
            is_taken = self.send(level, part, record.getMessage(), {'error': trace, **_fields(record)})
        except Exception:
            self._fallback.handleError(record)
        else:
            if not is_taken:
                self._fallback.handle(record)

    def close(self) -> None:
        super().close()
        self._socket.close()

    def send(self, level: Level, part: str, message: str, fields: dict[str, Any]) -> bool:
        """Sends an entry, leaving out empty fields. Returns whether the journal took it."""
        values = {'message': message, 'priority': _PRIORITIES[level], 'syslog_identifier': 'townhall', 'part': part}
        values |= {'tinytown_town': self._town, **fields}
        named = {_RENAMED.get(name.upper(), name.upper()): str(value) for name, value in values.items() if value != ''}
        encoded = {name: self._hide(value.encode('utf-8', 'backslashreplace')) for name, value in named.items()}
        return self._send(b''.join(_field(name.encode(), value) for name, value in encoded.items()))

    def _send(self, data: bytes) -> bool:
        try:
            self._socket.sendto(data, self._path)
        except BlockingIOError:
            return False
        except OSError:  # too large for a datagram, or no journal
            return self._send_file(data)
        return True

    def _send_file(self, data: bytes) -> bool:
        """Sends an entry as a sealed memory file, the protocol's way for large entries."""
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
    """A field of an entry. The length precedes a value of several lines."""
    if b'\n' in value:
        return name + b'\n' + len(value).to_bytes(8, 'little') + value + b'\n'
    return name + b'=' + value + b'\n'


_stderr: Final = StderrHandler()
_handler: StderrHandler | JournalHandler = _stderr  # the one that `configure` gave to `logging`
