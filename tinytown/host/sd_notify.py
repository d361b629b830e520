"""Notifications to a service manager (sd_notify(3)): the process is ready, reloads, is alive, or stops.

The manager passes the address of a datagram socket in NOTIFY_SOCKET. `notifier` removes it from the environment, so
that no child process can send notifications in our name. Without a manager, every method does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

logger = logging.getLogger('tinytown.host')

_TIMEOUT: Final = 0.5  # seconds for the manager to take a datagram
_DRAIN_STEP_SECS: Final = 10  # by how much each `stopping` extends the manager's timeout


class Notifier:
    """Notifies the manager at `address` ('': there is none).

    The manager expects `alive` at least every `watchdog_secs` seconds; 0 means that it has no watchdog.
    """

    def __init__(self, address: str = '', watchdog_secs: float = 0.0) -> None:
        self._address = '\0' + address[1:] if address.startswith('@') else address
        self.watchdog_secs = watchdog_secs
        self._is_ready = False

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The process serves. `systemctl status` shows `status`."""
        self._is_ready = True
        self._send('READY=1', f'STATUS={status}')

    def alive(self) -> None:
        self._send('WATCHDOG=1')

    def reloading(self) -> None:
        """The process reloads its configuration, until `reloaded`. Sends nothing before `ready`."""
        if self._is_ready:
            self._send('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')

    def reloaded(self) -> None:
        if self._is_ready:
            self._send('READY=1')

    def stopping(self) -> None:
        """The process stops. Call it again every few seconds while requests drain: it extends the timeout."""
        self._send('STOPPING=1', 'WATCHDOG=1', f'EXTEND_TIMEOUT_USEC={_DRAIN_STEP_SECS * 1_000_000}', 'STATUS=Draining')

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_TIMEOUT)
                sock.sendto('\n'.join(lines).encode(), self._address)
        except OSError as e:  # not fatal: a manager that misses a notification acts by its own timeouts
            logger.warning(f"can't notify the service manager of {lines[0]}: {e.strerror or e}")


def notifier(environ: MutableMapping[str, str]) -> Notifier:
    """Removes the manager's variables from the environment and returns its Notifier. Ignores another pid's watchdog."""
    address = environ.pop('NOTIFY_SOCKET', '')
    usec, pid = environ.pop('WATCHDOG_USEC', ''), environ.pop('WATCHDOG_PID', '')
    is_ours = usec.isdecimal() and pid in ('', str(os.getpid()))
    return Notifier(address if address[:1] in ('/', '@') else '', int(usec) / 1_000_000 if is_ours else 0.0)
