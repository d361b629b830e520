"""What a service manager is told (sd_notify(3)): that we are ready, take up a configuration, still live, or stop.

The manager hands us the address of a datagram socket in NOTIFY_SOCKET. `take` removes it from the environment, so that
nothing that is started here speaks in our name. Without one, telling does nothing.
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
_DRAIN_STEP_SECS: Final = 10  # so much more time a stop asks for, each time that it says it is still draining


class Notifier:
    """Speaks to the manager at `address` ('' for none), who wants to hear `alive` within `watchdog_secs` (0: not)."""

    def __init__(self, address: str = '', watchdog_secs: float = 0.0) -> None:
        self._address = '\0' + address[1:] if address.startswith('@') else address
        self.watchdog_secs = watchdog_secs
        self._is_ready = False

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """We serve. `status` is what `systemctl status` shows."""
        self._is_ready = True
        self._tell('READY=1', f'STATUS={status}')

    def alive(self) -> None:
        self._tell('WATCHDOG=1')

    def reloading(self) -> None:
        """A configuration is being taken up; `reloaded` ends that. Nothing is said before we are ready."""
        if self._is_ready:
            self._tell('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')

    def reloaded(self) -> None:
        if self._is_ready:
            self._tell('READY=1')

    def stopping(self) -> None:
        """We stop, and live: to be said again every few seconds while requests are brought to their end."""
        self._tell('STOPPING=1', 'WATCHDOG=1', f'EXTEND_TIMEOUT_USEC={_DRAIN_STEP_SECS * 1_000_000}', 'STATUS=Draining')

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_TIMEOUT)
                sock.sendto('\n'.join(lines).encode(), self._address)
        except OSError as e:  # a manager that does not hear us will act by itself
            logger.warning(f'the service manager can not be told {lines[0]}: {e.strerror or e}')


def notifier(environ: MutableMapping[str, str]) -> Notifier:
    """Whoever manages this process, taken out of its environment. A watchdog for another pid is not ours."""
    address = environ.pop('NOTIFY_SOCKET', '')
    usec, pid = environ.pop('WATCHDOG_USEC', ''), environ.pop('WATCHDOG_PID', '')
    is_ours = usec.isdecimal() and pid in ('', str(os.getpid()))
    return Notifier(address if address[:1] in ('/', '@') else '', int(usec) / 1_000_000 if is_ours else 0.0)
