"""Hosts: several machines that share one Redis, and what one of them asks of another.

Each townhall says every second that it is there, under the name of its host. What only that host can do, to start and
to stop processes there, is an order in a stream of it, written in the one step that changes the agent's record: who
asked may die, the record and the order agree. Of several townhalls on a host one takes the order (`steward`), and says
in a stream of its own what came of it, on which the one who asked waits. An order to start is given up with the one
who asked; an order to stop stays until the host takes it. Redis' clock alone has a say in what is late or silent.
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

SILENCE_SECS: Final = 7  # after which a townhall is silent; each says once a second that it is there
PATIENCE_SECS: Final = 15.0  # for a start on another host; for a stop, beside the grace
_SILENCE_MS: Final = SILENCE_SECS * 1000
_MARGIN_SECS: Final = 1.0  # of the time for a request, for the answer


class Host(TypedDict):
    """A host. `silent`: no townhall of it is heard of; `heard_at` is when one was last (RFC 3339; null: never)."""

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
    """Takes an order of this host; what is to be started is started by the process `starter`."""
    return store.order_take(presence.host, presence.token, order, starter)


def done(store: Store, host: str, order: str, error: TownError | None) -> Command:
    """Says what came of an order: None if it was carried out."""
    said = (error.code, error.status, error.detail) if error else ('', 200, '')
    return store.order_done(host, order, *said)


def orders(store: Store, host: str, block_ms: int) -> Command:
    """The orders of a host that nobody has taken, as a stream gives them."""
    return store.entries(f'host:{host}:orders', '0-0', block_ms, 100)


def fields(reply: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """(id, fields) of each entry of a stream's reply."""
    for entry, flat in reply[0][1] if reply else ():
        named = [text(part) for part in flat]
        yield text(entry), dict(zip(named[::2], named[1::2], strict=True))


# -------------------------------------------------------------------------------------------------------- presence


@dataclass(frozen=True, slots=True)
class Presence:
    """A townhall on a host. `place` tells the directory and machine from others; `url` is '' if it serves no REST."""

    host: str
    token: str
    place: str
    url: str

    def here(self, store: Store) -> Command:
        """Says that it is there. Refused if a townhall in another place goes by the name of this host."""
        return store.host_here(self.host, self.token, self.place, self.url, _SILENCE_MS)

    def gone(self, store: Store) -> Command:
        return store.host_gone(self.host, self.token)


def place_of(root: Path) -> str:
    """What tells the town in that directory of this machine from those elsewhere."""
    return f'{this_place()} {root}'


def claim_host(store: Store, root: Path) -> Command:
    """Whether the town in `root` may go by the name of this host. Refused as `Presence.here` is."""
    return store.host_name(this_host(), place_of(root), _SILENCE_MS)


def arrive(town: Town, url: str, wait: Callable[[float], None] = time.sleep) -> Presence:
    """Makes this host one that a townhall serves. One that went by its name, and died, is waited for.

    Raises UsageError when a living townhall in another place goes by the name of this host.
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


# ---------------------------------------------------------------------------------------------------------- asking


def is_other_host(host: str) -> bool:
    """Whether that is another host than this one; '' is none."""
    return host not in ('', this_host())


def where(call: Call, host: str) -> tuple[Part, ...]:
    """What the scripts are told of where an agent is to start: its host, and for an order their two times in ms."""
    if not is_other_host(host):
        return (this_host(),)
    return (host, int(_patience(call, PATIENCE_SECS) * 1000), _SILENCE_MS)


def await_start(call: Call, host: str, order: str, agent: str, agent_id: str) -> Step[None]:
    """Waits until a townhall of that host has started an agent's worker.

    Raises HostSilent if none took the order, and none will; what the townhall there said, which has undone it then; and
    Unavailable if that took the order and has not said what came of it.
    """
    if (yield from _answered(call, host, order, PATIENCE_SECS)):
        return
    if (yield call.store.withdraw(host, order)):
        raise HostSilent(f"No townhall of host '{host}' took the order to start '{agent}', so it was withdrawn")
    raise _unsure(host, 'start', agent, agent_id)


def stop_remote(
    call: Call, host: str, agent: str, name: str, instance: str, why: str, grace: float, to: str
) -> Step[str]:
    """Has an agent stopped on another host, and waits until no process of it is left.

    Gives '', or since when that host is silent: the agent is Draining then, and stopped when a townhall is there again.
    Raises what the townhall there said, Conflict if that instance runs no more, and Unavailable if it said nothing.
    """
    entry, since = map(text, (yield call.store.stop_there(agent, instance, host, why, grace, to, _SILENCE_MS)))
    if not since and not (yield from _answered(call, host, entry, grace + PATIENCE_SECS)):
        raise _unsure(host, 'stop', name, agent)
    return since


def _answered(call: Call, host: str, order: str, patience: float) -> Step[bool]:
    """Waits for what came of an order. Says whether anything was told. Raises it, if that is an error."""
    block_ms = int(_patience(call, patience) * 1000)
    reply = yield call.store.entries(f'host:{host}:answer:{order}', '0-0', block_ms)
    for _, said in fields(reply):
        if said['code']:
            kind = {each.status: each for each in (Unavailable, Conflict)}.get(int(said['status']), Internal)
            raise kind(f"host '{host}': {said['detail']}", code=said['code'])
        return True
    return False


def _patience(call: Call, most: float) -> float:
    """Seconds that a request may wait for another host."""
    return max(min(most, call.config.townhall.request_timeout_ms / 1000 - _MARGIN_SECS), 0.1)


def _unsure(host: str, verb: str, agent: str, agent_id: str) -> Unavailable:
    detail = (
        f"Host '{host}' is to {verb} '{agent}' ({agent_id}) and has not said what came of it; look:  tt show {agent}"
    )
    return Unavailable(detail, code='host-unsure', retry_after=5)


# ------------------------------------------------------------------------------------------------------- operations


def list_hosts(call: Call) -> Step[Hosts]:
    """List the hosts of the town: which of them are heard of, their townhalls, and how many live agents each has."""
    found = yield call.store.hosts(_SILENCE_MS)
    listed = [_host(row) for row in found[0]]
    return {'hosts': listed, 'count': len(listed)}


def check_here(call: Call, what: str, host: str, has_older: bool) -> Step[None]:
    """Sees to it that something of another host is asked for there; while that is silent, what is here has to do.

    `has_older` says whether there is such a thing here. Raises Conflict, which says where to ask, if that is known.
    """
    found = [_host(row) for row in (yield call.store.hosts(_SILENCE_MS, host))[0]]
    if has_older and not any(each['townhalls'] for each in found):
        return
    urls = [url for each in found for url in each['urls'] if not _is_of_one_machine(url)]
    whom = f'ask its townhall:  tt --url {urls[0]}' if urls else 'ask there'
    raise Conflict(f"{what} is on host '{host}'; {whom}", code='other-host')


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


def _is_of_one_machine(url: str) -> bool:
    """Whether an URL means another server on each machine, or none."""
    host = urlsplit(url).hostname or ''
    return not host or host in ('0.0.0.0', '::') or host == '::1' or host.startswith('127.')  # noqa: S104
