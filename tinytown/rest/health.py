"""The routes for monitoring, which are not operations: health, readiness, metrics, scaling, the OpenAPI document.

`app` adds them to its routes. `core.stats` counts tasks and agents; `metrics` renders them for Prometheus.
"""

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
}  # path of a GET route → its name in metrics

_GUARDED: Final = ('metrics', 'scaling')  # these show numbers of the town; townhall.metrics.scope may protect them

Reply = Generator[Command, Any, Response]


class HealthRoutes:
    """Answers the monitoring routes.

    `town` returns the town, which changes when the configuration is reloaded. `durability` is what Redis promises:
    always, everysec, none or unknown. `is_draining` says whether the server is shutting down; it is set when the server
    exists.
    """

    def __init__(self, town: Callable[[], Town], access: Access, durability: str, meter: Meter) -> None:
        self.is_draining: Callable[[], bool] = lambda: False
        self._town = town
        self._access = access
        self._durability = durability
        self._meter = meter
        self._began = time.monotonic()

    def is_open(self, name: str) -> bool:
        """Whether a route is open to unauthenticated callers: all, except metrics and scaling if they need a scope."""
        return name not in _GUARDED or not self._town().config.townhall.metrics.scope

    def handle(self, name: str, request: Request) -> Answer:
        """The answer of a route. Unless the route is open, `Access.admit` must have admitted the request before."""
        if name == 'health':
            return Response(200, b'{"status":"ok","uptime_secs":%d}' % (time.monotonic() - self._began))
        if name == 'openapi':
            from . import openapi  # late: rarely requested

            settings = self._town().config.townhall
            return Response(200, openapi.document_bytes(settings.auth.mode, settings.metrics.scope))
        if name in _GUARDED:
            step = self._guarded(name, request)
            return Slow(step) if is_slow(request) else step
        return self._ready()

    def _ready(self) -> Reply:
        report: dict[str, Any] = {'status': 'ready', 'redis': 'connected'}
        start = time.monotonic()
        try:
            counted = yield from stats.take_stats(self._town())
        except TownError as e:
            report = {'status': 'not_ready', 'redis': 'disconnected', 'dispatcher': 'unknown', 'detail': e.detail}
        else:
            report['redis_latency_ms'] = round((time.monotonic() - start) * 1000, 3)
            report['dispatcher'] = stats.dispatcher(counted)
        if self._access.keys_are_old:
            detail = 'the API keys could not be reloaded, the old ones stay in force; the log says why'
            report |= {'keys': 'old', 'detail': detail}
        draining, audit = self.is_draining(), self._access.audit
        if not audit.is_writable():
            detail = f'the audit file {audit.path} cannot be written, so every change is refused'
            report |= {'status': 'not_ready', 'detail': detail}
        if draining:
            report |= {'status': 'not_ready', 'detail': 'this server is shutting down and accepts no new connections'}
        report |= {'town': self._town().name, 'durability': self._durability, 'draining': draining}
        return _readiness(report['status'] == 'ready', encode_answer(report))

    def _guarded(self, name: str, request: Request) -> Reply:
        scope = self._town().config.townhall.metrics.scope
        if scope and request.by is not None:
            by = yield from self._access.prove(request, name, {})
            enter(by, name, scope, {}, self._access.call_limits(request))
        return (yield from self._metrics() if name == 'metrics' else self._scaling())

    def _metrics(self) -> Reply:
        start = time.monotonic()
        counted, error = None, ''
        try:
            counted = yield from stats.take_stats(self._town())
        except TownError as e:
            error = e.detail
        text = render_metrics(self._meter, counted, time.monotonic() - start, error)
        return _readiness(not error, text.encode(), CONTENT_TYPE)

    def _scaling(self) -> Reply:
        return Response(200, encode_answer((yield from stats.scaling(self._town()))))


def _readiness(ready: bool, body: bytes, content_type: str = 'application/json') -> Response:
    return Response(200, body, content_type) if ready else Response(503, body, content_type, (('Retry-After', '1'),))
