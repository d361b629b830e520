"""The steward of a host: the part of a townhall that carries out what others order for this host.

It blocks on the orders of its host. It takes one in the step that removes it and that writes this process down as the
one who starts the worker: so of several townhalls on a host one carries it out, and should that die, the caretaker
finds a worker that never came up, as after any start. What it has taken is done on a thread of its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from ..core import hosts
from ..core.agents import look_up, put_down, start_worker, stop_process, unmake
from ..core.hosts import Presence
from ..core.town import Call, Town
from ..errors import Conflict, Internal, NotFound, TownError, Unavailable
from ..host import report_spool
from ..host.processes import identify, stop_tree
from ..model import ALL_SCOPES, Principal
from ..state.store import Step, text

logger = logging.getLogger('tinytown.worker.steward')

HOST_ORDERS: Final = 'steward'
_BLOCK_MS: Final = 5000
_PAUSE_SECS: Final = 1.0  # while Redis is away
_LEFTOVER_GRACE: Final = 1.0  # for what an instance has left that is not wanted any more

Order = dict[str, str]


class HostOrders(threading.Thread):
    """Carries out the orders for the host of `presence` until `close`; `start` starts a worker."""

    def __init__(self, town: Town, presence: Presence, start: Callable[..., None] = start_worker) -> None:
        super().__init__(name='steward', daemon=True)
        self.town = town
        self._presence = presence
        self._start_worker = start
        self._over = threading.Event()
        self._said = ''

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self.look(_BLOCK_MS)
                self._said = ''
            except TownError as e:
                if e.detail != self._said:
                    self._said = e.detail
                    logger.warning(e.detail)
                self._over.wait(_PAUSE_SECS)

    def close(self) -> None:
        """Takes no further order. What it has taken ends with the process."""
        self._over.set()

    def look(self, block_ms: int) -> None:
        """Waits for orders, so long, and takes those that there are. Raises TownError when Redis is away."""
        store, host = self.town.store, self._presence.host
        for entry, order in hosts.fields(store.call(hosts.orders(store, host, block_ms))):
            if self._over.is_set():
                return
            answer = text(store.call(hosts.take_order(store, self._presence, entry, identify(os.getpid()).line))[0])
            if answer != 'gone':
                work = threading.Thread(target=self._carry_out, args=(entry, order, answer), daemon=True)
                work.name = f'steward-{order["agent"]}'
                work.start()

    def _carry_out(self, entry: str, order: Order, answer: str) -> None:
        """Does what an order says, and tells what came of it. `answer` is that of its taking."""
        store, error = self.town.store, None
        try:
            store.run(self._step(order, answer))
        except TownError as e:
            error = e
        except Exception as e:  # whatever it is: the one who waits is told
            error = Internal(f'a fault of ours: {e!r}')
            logger.error(error.detail, exc_info=e)
        try:
            store.call(hosts.done(store, self._presence.host, entry, error))
        except TownError as e:
            logger.warning(f'could not say what came of an order: {e.detail}')
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
        """Starts a worker. What does not start is undone: a new agent is forgotten, another one is in Error."""
        agent, instance = order['agent'], order['instance']
        try:
            if answer == 'late':
                raise Unavailable('the order came too late: whoever gave it has given up', code='order-late')
            found = yield from look_up(call, agent)
            self._start_worker(call.town, agent, found.name, instance)
        except TownError:
            yield from (unmake if order['verb'] == 'spawn' else put_down)(call, agent, instance)
            raise


def _stop(call: Call, order: Order, answer: str) -> Step[None]:
    """Ends every process of an instance; of one that its agent has given up, what it has left behind."""
    if answer == 'void':
        left: Any = stop_tree(None, order['instance'], _LEFTOVER_GRACE)
        if left:
            raise Internal(f"Processes {left} can't be stopped; they may belong to another user")
        return
    try:
        found = yield from look_up(call, order['agent'])
    except NotFound:
        return
    if found.instance == order['instance']:
        yield from stop_process(call, found, order['why'], float(order['grace']), order['to'])
