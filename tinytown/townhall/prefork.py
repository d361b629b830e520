"""Several processes that serve one address, and the parent that starts, watches and ends them.

The parent serves nothing itself. It made the listening sockets and keeps them open, so that clients wait in the backlog
while a child that died is replaced. Each child holds the reading end of a pipe whose writing end only the parent has:
however the parent ends, they notice and end too.
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

SHORT_LIFE_SECS: Final = 1.0  # a child that lives shorter is replaced only after as long
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Prefork:
    """Runs `serve(number, lifeline)` in `count` children until SIGTERM or SIGINT; `reload` takes up a configuration;
    `ready` is called when the children have been started, `stopping` when they have been told to end; `roll` is who of
    them lives: one that hangs is killed, and replaced.

    `lifeline` is a descriptor that reads as ended when the parent is gone. Children drain at SIGTERM, however often it
    comes (a service manager may tell the whole group); a second signal to the parent is passed on as SIGQUIT.
    """

    def __init__(
        self,
        count: int,
        serve: Callable[[int, int], int],
        reload: Callable[[], bool],
        ready: Callable[[], None],
        stopping: Callable[[], None],
        roll: ChildStatus,
    ) -> None:
        self._count = count
        self._serve = serve
        self._reload = reload
        self._ready = ready
        self._stopping = stopping
        self._roll = roll
        self._children: dict[int, tuple[int, float]] = {}  # by pid: its number, and since when
        self._missing: dict[int, float] = {}  # by number: when it is to be started
        self._stops = False
        self._status = 0

    def run(self) -> int:
        """The exit status: 0 if every child ended well after a signal."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        self._lifeline = os.pipe()
        previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._missing = dict.fromkeys(range(self._count), 0.0)
        poll = select.poll()
        poll.register(wake_read, select.POLLIN)
        poll.register(self._roll.descriptor, select.POLLIN)
        try:
            self._start_missing()
            self._ready()
            while self._children or not self._stops:
                self._start_missing()
                poll.poll(100 if self._missing else self._roll.tick_ms)
                for number in _read_all(wake_read):
                    self._on_signal(number)
                self._reap()
                self._look_after(time.monotonic())
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for each in (wake_read, wake_write, *self._lifeline):
                os.close(each)
        return self._status

    def _start_missing(self) -> None:
        for number, when in list(self._missing.items()):
            if time.monotonic() >= when and not self._stops:
                del self._missing[number]
                self._children[self._fork(number)] = (number, time.monotonic())
                self._roll.begin(number, time.monotonic())

    def _look_after(self, now: float) -> None:
        """Hears what the children tell. One whose loop stands still is killed: it holds its share of the clients."""
        self._roll.read(now)
        if self._stops:
            self._roll.stopping()
            return
        hung = self._roll.hung(now)
        for pid, (number, _) in self._children.items():
            if number in hung:
                logger.error(f'process {number} hung for {self._roll.patience:g} s and is killed')
                os.kill(pid, signal.SIGKILL)
                self._roll.end(number)

    def _fork(self, number: int) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # in the child until its server heeds it
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
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
            self._tell(signal.SIGHUP)

    def _stop(self) -> None:
        self._tell(signal.SIGQUIT if self._stops else signal.SIGTERM)
        if not self._stops:
            self._stopping()
        self._stops = True
        self._missing.clear()

    def _tell(self, number: int) -> None:
        for pid in self._children:
            os.kill(pid, number)  # one that has ended is a zombie of ours until `_reap`: the pid is still its own

    def _reap(self) -> None:
        """Notices children that have ended. One that was not told to is replaced, but for a configuration error."""
        for pid, (number, since) in list(self._children.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._children[pid]
            self._roll.end(number)
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
        reap(but=self._children)  # a Redis that was started before the children


def _read_all(descriptor: int) -> Iterator[int]:
    """The bytes that can be read now."""
    with suppress(BlockingIOError):
        while data := os.read(descriptor, 4096):
            yield from data
