"""Host orders: a thread of a townhall that carries out what townhalls on other hosts order for this host.

An order says to start or stop a worker here, or to remove an agent's files. The thread blocks on the stream of its
host's orders. Taking an order is one script: it removes the order and records this process as the starter of the
worker. So exactly one of several townhalls on a host carries it out. If that townhall dies before the worker is up, the
supervisor finds a failed start, as it does after any other start. Each order runs in a thread of its own.

`core.hosts` gives the orders and waits for the answers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from ..core import hosts
from ..core.agents import look_up, start_worker, stop_process, undo_restart, undo_spawn
from ..core.hosts import Presence
from ..core.town import Call, Town
from ..errors import Conflict, Internal, NotFound, TownError, Unavailable
from ..host import report_spool
from ..host.processes import identify, stop_tree
from ..model import ALL_SCOPES, Principal
from ..state.store import Step, text

logger = logging.getLogger('tinytown.worker.steward')

HOST_ORDERS: Final = 'steward'  # its principal name in stored records, an interface; so the old name stays
_BLOCK_MS: Final = 5000
_PAUSE_SECS: Final = 1.0  # between attempts to reach Redis
_LEFTOVER_GRACE: Final = 1.0  # seconds, for the processes that a replaced instance left running

Order = dict[str, str]


class HostOrders(threading.Thread):
    """Carries out the orders for the host of `presence`, until `close`. `start` starts a worker."""

    def __init__(self, town: Town, presence: Presence, start: Callable[..., None] = start_worker) -> None:
        super().__init__(name='host-orders', daemon=True)
        self.town = town
        self._presence = presence
        self._start_worker = start
        self._closing = threading.Event()
        self._last_error = ''

    def run(self) -> None:
        while not self._closing.is_set():
            try:
                self.take_orders(_BLOCK_MS)
                self._last_error = ''
            except TownError as e:
                if e.detail != self._last_error:
                    self._last_error = e.detail
                    logger.warning(e.detail)
                self._closing.wait(_PAUSE_SECS)

    def close(self) -> None:
        """Takes no further orders. An order that still runs when the process ends is cut off."""
        self._closing.set()

    def take_orders(self, block_ms: int) -> None:
        """Waits up to `block_ms` for orders and starts a thread for each. Raises TownError if Redis is unreachable."""
        store, host = self.town.store, self._presence.host
        for entry, order in hosts.fields(store.call(hosts.orders(store, host, block_ms))):
            if self._closing.is_set():
                return
            answer = text(store.call(hosts.take_order(store, self._presence, entry, identify(os.getpid()).line))[0])
            if answer != 'gone':
                work = threading.Thread(target=self._carry_out, args=(entry, order, answer), daemon=True)
                work.name = f'host-orders-{order["agent"]}'
                work.start()

    def _carry_out(self, entry: str, order: Order, answer: str) -> None:
        """Carries out an order and writes its result to the stream on which the other host waits.

        `answer` is what `take_order` returned: 'mine'; 'void' if the instance is no longer wanted; 'late' if the other
        host no longer waits for the start.
        """
        store, error = self.town.store, None
        try:
            store.run(self._step(order, answer))
        except TownError as e:
            error = e
        except Exception as e:  # a bug; the other host waits and must get an answer
            error = Internal(f'internal error: {e!r}')
            logger.error(error.detail, exc_info=e)
        try:
            store.call(hosts.done(store, self._presence.host, entry, error))
        except TownError as e:
            logger.warning(f"could not write an order's result: {e.detail}")
        store.close()

    def _step(self, order: Order, answer: str) -> Step[None]:
        by = order['by'] or HOST_ORDERS
        call = Call(self.town, Principal(by, ALL_SCOPES), self.town.store.acting_as(by))
        if order['verb'] == 'forget':
            report_spool.forget(self.town.root, order['agent'])
        elif order['verb'] == 'stop':
            yield from _stop(call, order, answer)
        elif answer == 'void':
            raise Conflict('it was stopped or started again before it could be started', code='stale-instance')
        else:
            yield from self._start(call, order, answer)

    def _start(self, call: Call, order: Order, answer: str) -> Step[None]:
        """Starts a worker. If that fails, removes the agent if it is new, else sets its state to Error."""
        agent, instance = order['agent'], order['instance']
        try:
            if answer == 'late':
                raise Unavailable('the order came too late: the host that gave it no longer waits', code='order-late')
            known = yield from look_up(call, agent)
            self._start_worker(call.town, agent, known.name, instance)
        except TownError:
            yield from (undo_spawn if order['verb'] == 'spawn' else undo_restart)(call, agent, instance)
            raise


def _stop(call: Call, order: Order, answer: str) -> Step[None]:
    """Stops an agent's worker and every process of its instance.

    If the agent no longer runs that instance ('void'), ends only the processes that the instance left running.
    """
    if answer == 'void':
        left: Any = stop_tree(None, order['instance'], _LEFTOVER_GRACE)
        if left:
            raise Internal(f"Processes {left} can't be stopped; they may belong to another user")
        return
    try:
        known = yield from look_up(call, order['agent'])
    except NotFound:
        return
    if known.instance == order['instance']:
        yield from stop_process(call, known, order['why'], float(order['grace']), order['to'])
