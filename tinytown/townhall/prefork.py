"""Prefork: several processes that serve one address, and the parent that starts, watches and ends them.

The parent serves no requests. It opened the listening sockets and keeps them open, so that clients wait in the backlog
while a dead child is replaced. Each child holds the reading end of a pipe, and only the parent holds the writing end.
Thus children notice when the parent ends in any way, and end too.

`process` uses `Prefork` if `townhall.workers` is above 1.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from .. import log
from ..errors import UsageError
from ..host.processes import reap
from .liveness import ChildStatus

logger = logging.getLogger('tinytown.townhall')

SHORT_LIFE_SECS: Final = 1.0  # a child that ended sooner than this is replaced after a pause of the same length
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Prefork:
    """Runs `serve(number, lifeline)` in `count` child processes until SIGTERM or SIGINT.

    `lifeline` is a descriptor that reads end-of-file once the parent has ended. `reload` loads the configuration at
    SIGHUP; if it returns True, the children reload too. `ready` is called when all children have been started,
    `stopping` when they have been signalled to end. `child_status` finds children that hang: they are killed and
    replaced.

    Children drain at SIGTERM, and ignore further ones, because a service manager may signal the whole process group. A
    second signal to the parent reaches the children as SIGQUIT.
    """

    def __init__(
        self,
        count: int,
        serve: Callable[[int, int], int],
        reload: Callable[[], bool],
        ready: Callable[[], None],
        stopping: Callable[[], None],
        child_status: ChildStatus,
    ) -> None:
        self._count = count
        self._serve = serve
        self._reload = reload
        self._ready = ready
        self._stopping = stopping
        self._child_status = child_status
        self._children: dict[int, tuple[int, float]] = {}  # by pid: number, and when it was started
        self._missing: dict[int, float] = {}  # by number: when to start it
        self._stops = False
        self._status = 0

    def run(self) -> int:
        """Serves until a signal. Returns the exit status: 0 if every child ended cleanly."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        self._lifeline = os.pipe()
        previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._missing = dict.fromkeys(range(self._count), 0.0)
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        poll.register(self._child_status.descriptor, select.POLLIN)
        try:
            self._start_missing()
            self._ready()
            while self._children or not self._stops:
                self._start_missing()
                poll.poll(100 if self._missing else self._child_status.tick_ms)
                for number in _read_all(wake_read):
                    self._on_signal(number)
                self._reap()
                self._check_children(time.monotonic())
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for descriptor in (wake_read, wake_write, *self._lifeline):
                os.close(descriptor)
        return self._status

    def _start_missing(self) -> None:
        for number, when in list(self._missing.items()):
            if time.monotonic() >= when and not self._stops:
                del self._missing[number]
                self._children[self._fork(number)] = (number, time.monotonic())
                self._child_status.begin(number, time.monotonic())

    def _check_children(self, now: float) -> None:
        """Reads the children's signs. Kills a child whose event loop hangs, because its clients get no answer."""
        self._child_status.read(now)
        if self._stops:
            self._child_status.stopping()
            return
        hung = self._child_status.hung(now)
        for pid, (number, _) in self._children.items():
            if number in hung:
                logger.error(f'process {number} hung for {self._child_status.hang_secs:g} s and is killed')
                os.kill(pid, signal.SIGKILL)
                self._child_status.end(number)

    def _fork(self, number: int) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # the child unblocks it once its server handles it
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for handled in _SIGNALS:
                signal.signal(handled, signal.SIG_DFL)
            os.close(self._lifeline[1])
            status = self._serve(number, self._lifeline[0])
        except UsageError as e:
            log.fatal(str(e))
            status = 2
        except BaseException as e:
            logger.error(f'process {number} failed', exc_info=e)
        finally:
            log.flush()
            os._exit(status)

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stop()
        elif number == signal.SIGHUP and self._reload():
            self._signal_children(signal.SIGHUP)

    def _stop(self) -> None:
        self._signal_children(signal.SIGQUIT if self._stops else signal.SIGTERM)
        if not self._stops:
            self._stopping()
        self._stops = True
        self._missing.clear()

    def _signal_children(self, number: int) -> None:
        for pid in self._children:
            os.kill(pid, number)  # a child that has ended stays a zombie until `_reap`, so its pid is not reused yet

    def _reap(self) -> None:
        """Collects children that have ended. One that ended by itself is replaced; a configuration error stops all."""
        for pid, (number, since) in list(self._children.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._children[pid]
            self._child_status.end(number)
            status = os.waitstatus_to_exitcode(code)
            if self._stops:
                self._status = self._status or int(status not in (0, -signal.SIGTERM))
            elif status == 2:
                self._stop()
                self._status = 2
            else:
                now = time.monotonic()
                logger.warning(f'process {number} ended (status {status}) and is replaced')
                self._missing[number] = now + SHORT_LIFE_SECS if now - since < SHORT_LIFE_SECS else now
        reap(but=self._children)  # a Redis that this process started is its child, too


def _read_all(descriptor: int) -> Iterator[int]:
    """All bytes that can be read without blocking."""
    with suppress(BlockingIOError):
        while data := os.read(descriptor, 4096):
            yield from data
