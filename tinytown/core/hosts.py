"""Hosts: several machines that share one Redis. A townhall gives the other hosts orders to start and stop processes.

Each townhall sends a heartbeat every second, under the name of its host. A host is silent if none came for
`SILENCE_SECS`.

Only a host itself can start and stop its processes. So other hosts write orders to the host's stream. The script that
writes an order also changes the agent's record, so both agree even if the requester crashes. If a host has several
townhalls, one of them takes the order (`worker.host_orders`). It writes the result to a stream that exists only for
that order, and the requester waits there. An order to start expires when the requester stops waiting. An order to stop
stays until the host takes it.

Only Redis' clock decides what is late or silent. Operations in `agents` and `agent_logs` use this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict
from urllib.parse import urlsplit

from ..errors import Conflict, HostSilent, Internal, TownError, Unavailable, UsageError
from ..host.processes import this_host, this_place
from ..model import new_id
from ..state.client import Part
from ..state.store import Command, Step, Store, text
from .town import Call, Town

SILENCE_SECS: Final = 7  # a townhall without a heartbeat for so long is silent; it sends one every second
PATIENCE_SECS: Final = 15.0  # how long to wait for a start on another host; for a stop, the grace period comes on top
_SILENCE_MS: Final = SILENCE_SECS * 1000
_MARGIN_SECS: Final = 1.0  # the part of a request's timeout that remains for sending the answer


class Host(TypedDict):
    """A host. `silent` means that none of its townhalls sends heartbeats.

    `heard_at` is the time of the last heartbeat (RFC 3339), or null if there was none.
    """

    host: str
    here: bool
    silent: bool
    heard_at: str | None
    townhalls: int
    urls: list[str]
    agents: int


class Hosts(TypedDict):
    hosts: list[Host]
    count: int


# -------------------------------------------------------------------------------------------------------- commands


def take_order(store: Store, presence: Presence, order: str, starter: str) -> Command:
    """Takes an order of this host. `starter` identifies the process that will start the worker."""
    return store.order_take(presence.host, presence.token, order, starter)


def done(store: Store, host: str, order: str, error: TownError | None) -> Command:
    """Reports the result of an order: its error, or None if it was carried out."""
    result = (error.code, error.status, error.detail) if error else ('', 200, '')
    return store.order_done(host, order, *result)


def orders(store: Store, host: str, block_ms: int) -> Command:
    """Reads the orders of a host that no townhall has taken. Waits up to `block_ms` for one. See `fields`."""
    return store.entries(f'host:{host}:orders', '0-0', block_ms, 100)


def fields(reply: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """(id, fields) of each entry in the reply to XREAD."""
    for entry, flat in reply[0][1] if reply else ():
        parts = [text(part) for part in flat]
        yield text(entry), dict(zip(parts[::2], parts[1::2], strict=True))


# -------------------------------------------------------------------------------------------------------- presence


@dataclass(frozen=True, slots=True)
class Presence:
    """A townhall on a host, by its random `token`. `place` is from `place_of`; `url` is '' if it has no REST API."""

    host: str
    token: str
    place: str
    url: str

    def here(self, store: Store) -> Command:
        """Sends a heartbeat. Raises Conflict if a live townhall in another place uses the name of this host."""
        return store.host_here(self.host, self.token, self.place, self.url, _SILENCE_MS)

    def gone(self, store: Store) -> Command:
        """Removes the heartbeat when the townhall ends, so that nobody must wait until it counts as silent."""
        return store.host_gone(self.host, self.token)


def place_of(root: Path) -> str:
    """Identifies a town directory on this machine, unlike directories of the same path elsewhere."""
    return f'{this_place()} {root}'


def claim_host(store: Store, root: Path) -> Command:
    """Checks that the town in `root` may use the name of this host. Raises Conflict as `Presence.here` does."""
    return store.host_name(this_host(), place_of(root), _SILENCE_MS)


def arrive(town: Town, url: str, wait: Callable[[float], None] = time.sleep) -> Presence:
    """Registers a townhall for this host, with a first heartbeat.

    If a townhall in another place uses the host's name, waits until that one is silent, because it may have crashed.
    Raises UsageError if it is still alive then. `wait` takes seconds.
    """
    presence = Presence(this_host(), new_id(), place_of(town.root), url)
    for left in reversed(range(2 * SILENCE_SECS + 2)):
        try:
            town.store.call(presence.here(town.store))
            break
        except Conflict as e:
            if not left:
                raise UsageError(e.detail) from None
        wait(0.5)
    return presence


# ---------------------------------------------------------------------------------------------------------- orders


def is_other_host(host: str) -> bool:
    """Whether `host` is the name of another host. '' is not."""
    return host not in ('', this_host())


def placement(call: Call, host: str) -> tuple[Part, ...]:
    """The script arguments for starting an agent: this host; or another host, the order's timeout, the silence (ms)."""
    if not is_other_host(host):
        return (this_host(),)
    return (host, int(_patience(call, PATIENCE_SECS) * 1000), _SILENCE_MS)


def await_start(call: Call, host: str, order: str, agent: str, agent_id: str) -> Step[None]:
    """Waits until a townhall of `host` has started an agent's worker.

    Raises HostSilent if no townhall took the order; the order is withdrawn then. If the start failed, raises the error
    of the townhall there, which has undone the start. Raises Unavailable if the order was taken but its result did not
    come in time.
    """
    if (yield from _answered(call, host, order, PATIENCE_SECS)):
        return
    if (yield call.store.withdraw(host, order)):
        raise HostSilent(f"No townhall on host '{host}' took the order to start '{agent}', so the order was withdrawn")
    raise _unknown_result(host, 'start', agent, agent_id)


def stop_remote(
    call: Call, host: str, agent: str, name: str, instance: str, why: str, grace: float, to: str
) -> Step[str]:
    """Orders another host to stop an agent, and waits until no process of the agent is left.

    Returns ''. If the host is silent, does not wait and returns the time of its last heartbeat ('never' if there was
    none); the agent is Draining then, and is stopped when a townhall is back. Raises the error of the townhall there,
    Conflict if that instance no longer runs, and Unavailable if the result did not come in time.
    """
    entry, since = map(text, (yield call.store.stop_there(agent, instance, host, why, grace, to, _SILENCE_MS)))
    if not since and not (yield from _answered(call, host, entry, grace + PATIENCE_SECS)):
        raise _unknown_result(host, 'stop', name, agent)
    return since


def _answered(call: Call, host: str, order: str, patience: float) -> Step[bool]:
    """Waits for the result of an order. Returns whether there was one in time. Raises it if it is an error."""
    block_ms = int(_patience(call, patience) * 1000)
    reply = yield call.store.entries(f'host:{host}:answer:{order}', '0-0', block_ms)
    for _, result in fields(reply):
        if result['code']:
            kind = {error.status: error for error in (Unavailable, Conflict)}.get(int(result['status']), Internal)
            raise kind(f"host '{host}': {result['detail']}", code=result['code'])
        return True
    return False


def _patience(call: Call, max_secs: float) -> float:
    """How many seconds a request may wait for another host: at most `max_secs`, and less than its own timeout."""
    return max(min(max_secs, call.config.townhall.request_timeout_ms / 1000 - _MARGIN_SECS), 0.1)


def _unknown_result(host: str, verb: str, agent: str, agent_id: str) -> Unavailable:
    detail = f"Host '{host}' has not reported whether it could {verb} '{agent}' ({agent_id}); check:  tt show {agent}"
    return Unavailable(detail, code='host-unsure', retry_after=5)


# ------------------------------------------------------------------------------------------------------- operations


def list_hosts(call: Call) -> Step[Hosts]:
    """List the hosts of the town: when each last sent a heartbeat, its townhalls, and how many live agents it has."""
    reply = yield call.store.hosts(_SILENCE_MS)
    listed = [_host(row) for row in reply[0]]
    return {'hosts': listed, 'count': len(listed)}


def check_here(call: Call, subject: str, host: str, has_older: bool) -> Step[None]:
    """Refuses a request for something that is on another host, unless that host is silent and an older copy is here.

    `has_older` says whether there is a copy here. Raises Conflict, which names the URL to ask if it is known.
    """
    found = [_host(row) for row in (yield call.store.hosts(_SILENCE_MS, host))[0]]
    if has_older and not any(row['townhalls'] for row in found):
        return
    urls = [url for row in found for url in row['urls'] if not _is_local(url)]
    advice = f'ask its townhall:  tt --url {urls[0]}' if urls else 'ask there'
    raise Conflict(f"{subject} is on host '{host}'; {advice}", code='other-host')


def _host(row: list[bytes]) -> Host:
    name, heard, agents, *urls = map(text, row)
    return {
        'host': name,
        'here': name == this_host(),
        'silent': not urls,
        'heard_at': heard or None,
        'townhalls': len(urls),
        'urls': sorted(url for url in urls if url),
        'agents': int(agents),
    }


def _is_local(url: str) -> bool:
    """Whether a URL works only on its own machine: it has a loopback or wildcard address, or no host."""
    host = urlsplit(url).hostname or ''
    return not host or host in ('0.0.0.0', '::') or host == '::1' or host.startswith('127.')  # noqa: S104
