"""One run of a coding CLI: its process, its output in a bounded log, and its outcome.

`worker.main` starts a `CliRun` for each round and writes everything to one `RunLog`.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..clis import readers
from ..clis.outcome import Outcome
from ..clis.registry import Cli
from ..core import agent_logs
from ..files import open_own
from ..host.processes import GRACE_SECS, identify, stop_tree
from ..redaction import Redactor, Secrets

_PIPE_BYTES: Final = 65536  # the default capacity of a pipe on Linux
_MAX_FINAL_READS: Final = 16  # reads after the CLI has ended: 1 MiB, the most that Linux lets a user enlarge a pipe to


class RunLog:
    """An agent's log file. At `max_bytes` it is rotated: the file becomes NAME.1 and replaces the previous NAME.1.

    `line` hides secrets; a caller of `write` must have hidden them. `echo` copies the log to standard output.
    """

    def __init__(self, file: Path, max_bytes: int, secrets: Secrets, echo: bool = False) -> None:
        self.secrets = secrets
        self._file = file
        self._max_bytes = max_bytes
        self._echo = echo
        self._open(open_own(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    def _open(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._begin = agent_logs.begin_of(self._file)

    @property
    def offset(self) -> int:
        """The end of the log in bytes since its first line, including the rotated parts."""
        return self._begin + os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        """Appends. A full disk, or a closed standard output, must not end the work."""
        if not data:
            return
        if self._size + len(data) > self._max_bytes:
            with suppress(OSError):
                self._rotate()
        with suppress(OSError):
            os.write(self._descriptor, data)
        self._size += len(data)
        if self._echo:
            try:
                os.write(1, data)  # unbuffered, so no rest is left whose flush fails when the process ends
            except OSError:
                self._echo = False

    def line(self, text: str) -> None:
        self.write(self.secrets.hide(text.encode('utf-8', 'replace')) + b'\n')

    def _rotate(self) -> None:
        old = self._descriptor
        self._open(agent_logs.rotate(self._file))
        for output in (1, 2):  # a detached worker's own output goes to the same file
            with suppress(OSError):
                if os.path.samestat(os.fstat(output), os.fstat(old)):
                    os.dup2(self._descriptor, output)
        os.close(old)


class CliRun:
    """A run of `cli` in `cwd`, with the prompt on its standard input or in `prompt_file`. Raises OSError.

    `wake` is a descriptor. When it becomes readable, `wait` calls its callback at once.
    """

    def __init__(
        self, cli: Cli, prompt: str, prompt_file: Path, cwd: Path, env: dict[str, str], log: RunLog, wake: int
    ) -> None:
        descriptor = open_own(prompt_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(descriptor, 'w', encoding='utf-8') as out:
            out.write(prompt)
        with open(os.devnull if cli.takes_file else prompt_file, 'rb') as stdin:
            self._process = subprocess.Popen(
                cli.command(prompt_file),
                cwd=cwd,
                env=env,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._log = log
        self._reader = readers.reader(cli.output)
        self._began = time.monotonic()
        self._redactors: dict[int, Redactor] = {}
        self.seconds = 0.0  # how long it ran, once it has ended
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, selectors.EVENT_READ)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdout, self._stderr = self._process.stdout.fileno(), self._process.stderr.fileno()
        for descriptor in (self._stdout, self._stderr):
            os.set_blocking(descriptor, False)
            self._redactors[descriptor] = Redactor(log.secrets)
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._pidfd = os.pidfd_open(self._process.pid) if hasattr(os, 'pidfd_open') else -1
        if self._pidfd >= 0:
            self._selector.register(self._pidfd, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of the CLI, negative for a signal; None while it runs."""
        return self._process.returncode

    def wait(self, should_stop: Callable[[], bool], seconds: float) -> bool:
        """Waits for the CLI to end, and calls `should_stop` every `seconds`. Returns whether the CLI ended by itself.

        When `should_stop` returns true, returns False at once; the CLI still runs.
        """
        due = time.monotonic() + seconds
        while self._process.poll() is None:
            pause = max(due - time.monotonic(), 0)
            if self._pidfd < 0:
                pause = min(pause, 0.2)
            for key, _ in self._selector.select(pause):
                if key.fd == self._wake:
                    due = 0.0
                elif key.fd != self._pidfd:
                    self._read(key.fd)
            if time.monotonic() >= due:
                if should_stop():
                    return False
                due = time.monotonic() + seconds
        self._close()
        return True

    def _read(self, descriptor: int) -> bool:
        """Copies available output to the log. Returns whether there was any."""
        try:
            data = os.read(descriptor, _PIPE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(descriptor)
            return False
        self._keep(descriptor, self._redactors[descriptor].feed(data))
        return True

    def _keep(self, descriptor: int, data: bytes) -> None:
        feed = self._reader.feed if descriptor == self._stdout else self._reader.feed_stderr
        self._log.write(feed(data))

    def stop(self, instance: str) -> None:
        """Ends the CLI and all processes that it started."""
        stop_tree(identify(self._process.pid), instance, GRACE_SECS)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        """Reads the rest of the output and closes everything.

        A process that the CLI left running may keep the pipe open and write without end, so the reads are limited.
        """
        for descriptor in (self._stdout, self._stderr):
            for _ in range(_MAX_FINAL_READS):
                if descriptor not in self._selector.get_map() or not self._read(descriptor):
                    break
            self._keep(descriptor, self._redactors[descriptor].finish())
        self._log.write(self._reader.finish())
        self.seconds = time.monotonic() - self._began
        self._selector.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream
            stream.close()

    def outcome(self) -> Outcome:
        """How the run ended, from its exit status and what it printed. Secrets in the texts are hidden."""
        outcome = self._reader.outcome(self._process.returncode, time.time())
        return outcome._replace(result=self._hidden(outcome.result), error=self._hidden(outcome.error))

    def _hidden(self, text: str | None) -> str | None:
        """A text without secrets: one that was escaped in JSON has passed the redactor."""
        return text and self._log.secrets.hide(text.encode('utf-8', 'replace')).decode('utf-8', 'replace')
