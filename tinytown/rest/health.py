"""What machines ask of a townhall and is no operation: health, readiness, metrics, scaling, the OpenAPI document."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, Final

from ..auth.access import Access, is_slow
from ..core import stats
from ..core.dispatch import encode_answer, enter
from ..core.town import Town
from ..errors import TownError
from ..http.http1 import Request, Response
from ..http.replies import Answer, Slow
from ..state.store import Command
from .metrics import CONTENT_TYPE, Meter, render_metrics

ROUTES: Final = {
    '/health': 'health',
    '/healthz': 'health',
    '/ready': 'ready',
    '/readyz': 'ready',
    '/metrics': 'metrics',
    '/api/scaling': 'scaling',
    '/openapi.json': 'openapi',
}  # all GET: the path, and the name under which it is counted

_NUMBERS: Final = ('metrics', 'scaling')

Reply = Generator[Command, Any, Response]


class HealthRoutes:
    """Answers them for a town, which `town` gives. `is_draining`, set once there is a server, says that it stops."""

    def __init__(self, town: Callable[[], Town], access: Access, durability: str, meter: Meter) -> None:
        self.is_draining: Callable[[], bool] = lambda: False
        self._town = town
        self._access = access
        self._durability = durability
        self._meter = meter
        self._began = time.monotonic()

    def is_open(self, name: str) -> bool:
        """Whether a probe answers callers who are not known: all but the town's numbers, if a scope is set for them."""
        return name not in _NUMBERS or not self._town().config.townhall.metrics.scope

    def handle(self, name: str, request: Request) -> Answer:
        """The answer of a probe. Who calls must have been admitted where it is not open."""
        if name == 'health':
            return Response(200, b'{"status":"ok","uptime_secs":%d}' % (time.monotonic() - self._began))
        if name == 'openapi':
            from . import openapi  # late: few ask for it

            settings = self._town().config.townhall
            return Response(200, openapi.document_bytes(settings.auth.mode, settings.metrics.scope))
        if name in _NUMBERS:
            step = self._guarded(name, request)
            return Slow(step) if is_slow(request) else step
        return self._ready()

    def _ready(self) -> Reply:
        found: dict[str, Any] = {'status': 'ready', 'redis': 'connected'}
        began = time.monotonic()
        try:
            counted = yield from stats.take_census(self._town())
        except TownError as e:
            found = {'status': 'not_ready', 'redis': 'disconnected', 'dispatcher': 'unknown', 'detail': e.detail}
        else:
            found['redis_latency_ms'] = round((time.monotonic() - began) * 1000, 3)
            found['dispatcher'] = stats.dispatcher(counted)
        if self._access.keys_are_old:
            found |= {'keys': 'old', 'detail': 'the keys are not taken up, old ones stay in force; the log says why'}
        draining, audit = self.is_draining(), self._access.audit
        if not audit.is_writable():
            detail = f'the audit can not be written ({audit.path}), so every change is refused'
            found |= {'status': 'not_ready', 'detail': detail}
        if draining:
            found |= {'status': 'not_ready', 'detail': 'this server stops; it takes no new connections'}
        found |= {'town': self._town().name, 'durability': self._durability, 'draining': draining}
        return _readiness(found['status'] == 'ready', encode_answer(found))

    def _guarded(self, name: str, request: Request) -> Reply:
        scope = self._town().config.townhall.metrics.scope
        if scope and request.by is not None:
            by = yield from self._access.prove(request, name, {})
            enter(by, name, scope, {}, self._access.gate(request))
        return (yield from self._metrics() if name == 'metrics' else self._scaling())

    def _metrics(self) -> Reply:
        began = time.monotonic()
        counted, error = None, ''
        try:
            counted = yield from stats.take_census(self._town())
        except TownError as e:
            error = e.detail
        text = render_metrics(self._meter, counted, time.monotonic() - began, error)
        return _readiness(not error, text.encode(), CONTENT_TYPE)

    def _scaling(self) -> Reply:
        return Response(200, encode_answer((yield from stats.scaling(self._town()))))


def _readiness(ready: bool, body: bytes, content_type: str = 'application/json') -> Response:
    return Response(200, body, content_type) if ready else Response(503, body, content_type, (('Retry-After', '1'),))
