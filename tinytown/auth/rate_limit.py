"""Rate limits: token buckets that all worker processes of a townhall share. `access` makes them."""

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

_BUCKETS: Final = 8192  # kept at once; they take 256 KiB


class Buckets:
    """Token buckets by name, in memory that forked processes share. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = Table(_BUCKETS)
        self._clock = clock

    def take(self, name: str, per_minute: float, burst: float, tokens: float = 1.0) -> float:
        """Takes tokens from a bucket that holds up to `burst` and gains `per_minute` a minute.

        Returns 0.0 on success. If there are too few, takes nothing and returns the seconds until there are enough.
        With `tokens` 0, only checks whether one token is there.
        """
        now = self._clock()
        need = tokens or 1.0
        wait = 0.0

        def change(level: float, changed_at: float) -> float:
            nonlocal wait
            level = burst if changed_at < 0 else min(level + (now - changed_at) * per_minute / 60, burst)
            if level >= need:
                return level - tokens
            wait = (need - level) * 60 / per_minute
            return level

        self._table.change(name, now, change)
        return wait


class Throttle:
    """The configured limits: for each caller one bucket of reads and one of changes."""

    def __init__(self, settings: RateLimitSettings, buckets: Buckets) -> None:
        self._settings = settings
        self._buckets = buckets

    def take(self, by: Principal, address: str, changes: bool) -> None:
        """Counts a call of a principal from an address. Raises TooManyRequests if it exceeds the limit."""
        settings = self._settings
        if not settings.enabled:
            return
        per_minute = settings.mutating_requests_per_minute if changes else settings.requests_per_minute
        caller = by.name if by.name != LOCAL else network(address)
        wait = self._buckets.take(f'{changes} {caller}', per_minute, min(settings.burst_size, per_minute))
        if wait:
            kind = 'changes' if changes else 'reads'
            raise TooManyRequests(
                f'{caller} may make {per_minute} {kind} a minute; try again in {math.ceil(wait)} s',
                retry_after=math.ceil(wait),
            )


@lru_cache(maxsize=1024)
def network(address: str) -> str:
    """The name under which an address is counted: an IPv4 address itself, or the /64 of an IPv6 address.

    A single host often controls a whole /64.
    """
    try:
        parsed = ipaddress.ip_address(address.partition('%')[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
