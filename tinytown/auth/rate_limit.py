"""Rate limits: token buckets, the same for one process or several that were forked."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from ..errors import TooManyRequests
from ..model import LOCAL, Principal
from ..settings import RateLimitSettings
from .shared_table import Table

_PLACES: Final = 8192  # callers that are remembered: 256 KiB


class Buckets:
    """Token buckets by name, in memory that forked processes share. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = Table(_PLACES)
        self._clock = clock

    def take(self, name: str, per_minute: float, burst: float, tokens: float = 1.0) -> float:
        """Takes tokens out of a bucket that holds `burst` and is filled by so many a minute.

        0.0 if they were there; else the seconds until they are, and nothing is taken. To take none asks for one.
        """
        now = self._clock()
        need = tokens or 1.0
        wait = 0.0

        def change(level: float, when: float) -> float:
            nonlocal wait
            level = burst if when < 0 else min(level + (now - when) * per_minute / 60, burst)
            if level >= need:
                return level - tokens
            wait = (need - level) * 60 / per_minute
            return level

        self._table.change(name, now, change)
        return wait


class Throttle:
    """The limits of a configuration, in buckets: of reads and of changes, for each caller."""

    def __init__(self, settings: RateLimitSettings, buckets: Buckets) -> None:
        self._settings = settings
        self._buckets = buckets

    def take(self, by: Principal, address: str, changes: bool) -> None:
        """Counts a call. Raises TooManyRequests."""
        settings = self._settings
        if not settings.enabled:
            return
        per_minute = settings.mutating_requests_per_minute if changes else settings.requests_per_minute
        who = by.name if by.name != LOCAL else network(address)
        wait = self._buckets.take(f'{changes} {who}', per_minute, min(settings.burst_size, per_minute))
        if wait:
            kind = 'changes' if changes else 'reads'
            raise TooManyRequests(
                f'{who} may make {per_minute} {kind} a minute; try again in {math.ceil(wait)} s',
                retry_after=math.ceil(wait),
            )


@lru_cache(maxsize=1024)
def network(address: str) -> str:
    """Whom an address stands for: one host, or in IPv6 a /64, which one host may have to itself."""
    try:
        found = ipaddress.ip_address(address.partition('%')[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
