"""Assembles a townhall process: listening sockets, HTTP server, REST, MCP, supervisor; and reloads its configuration.

Start with `TownhallProcess.run`. `main` creates a `TownhallProcess`; `prefork` runs its `_serve` in several processes.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import logging
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import config as configuration
from ..auth.access import Access, TokenVerifier, check_start
from ..core import hosts
from ..core.operations import OPERATIONS
from ..core.town import Town, open_town
from ..errors import TownError, UsageError
from ..host import managed_redis, sd_notify, town_secrets
from ..host.townhalls import note_townhall
from ..http.http1 import Request, Response
from ..http.listener import UNIX, Listener, is_passed, open_listeners
from ..http.replies import Answer
from ..http.server import Encrypt, Server
from ..rest.app import Guarded, RestApp
from ..rest.metrics import Meter
from ..settings import Config, RedisSettings, TownhallSettings
from ..state.event_feed import EventFeed
from ..worker.host_orders import HostOrders
from ..worker.supervisor import Supervisor
from .liveness import ChildStatus, LivenessMonitor, Single
from .prefork import Prefork

if TYPE_CHECKING:
    from ..mcp.protocol import McpServer

logger = logging.getLogger('tinytown.townhall')

# Settings that a reload can't change: they would need another socket, another Redis, or other processes.
_FIXED: Final = (
    *('name', 'host', *(f'redis.{name}' for name in RedisSettings.specs), 'retention.events'),
    *('townhall.bind', 'townhall.rest_port', 'townhall.workers', 'townhall.read_only', 'townhall.tls.enabled'),
    *('townhall.mcp_port', 'townhall.mcp.tools', 'townhall.mcp.read_only'),
    *('townhall.audit.path', 'townhall.audit.max_bytes', 'townhall.audit.keep'),
)

# The routes of `mcp.streamable_http`, by method and path. Sessions live in one process, so several serve fewer routes.
MCP_ROUTES_WITHOUT_SESSIONS: Final = (('POST', '/mcp'), ('GET', '/mcp'), ('DELETE', '/mcp'))
MCP_ROUTES: Final = (*MCP_ROUTES_WITHOUT_SESSIONS, ('GET', '/sse'), ('POST', '/messages'))


class TownhallProcess:
    """A townhall, in one process or several.

    `flags` holds the settings from the command line, by path. `mode` is 'rest' or 'mcp-http'.
    """

    def __init__(self, root: Path, config: Config, flags: Mapping[str, Any], mode: str = 'rest') -> None:
        """Opens the listening sockets, then the town, so that a townhall that can't listen starts no Redis.

        Raises UsageError, TownError.
        """
        self._flags = dict(flags)
        self._mode = mode
        settings = config.townhall
        self._verifier, self._encrypt = _verifier(config, check=True), _encryption(config, root)
        self._is_passed = is_passed(os.environ)
        self._listeners = open_listeners(settings.bind, _port(settings, mode), settings.workers, mode)
        self._manager = sd_notify.notifier(os.environ)
        self._host = self._listeners[0].host
        for warning in (*check_start(config, self._host), *town_secrets.exposed(root, config)):
            logger.warning(warning)
        self._url = self._listeners[0].url('https' if self._encrypt else 'http')
        self._note_file: Path | None = None
        try:
            self._open_town(root)
        except BaseException:
            self._remove_socket()
            raise

    def _open_town(self, root: Path) -> None:
        self.town = town = open_town(root, self._flags)
        logger.debug(f'town {town.name} in {town.root}, Redis at {town.redis_url}')
        settings, mode = town.config.townhall, self._mode
        self._access = Access(town, self._verifier)
        self._feed = EventFeed(town.store)
        if settings.mcp.tools or mode != 'rest':
            _ = self.mcp  # created now, so that an unknown tool in the settings fails the start
        self._durability = durability(town)
        self._meter = Meter(len(self._listeners))
        url = self._url if mode == 'rest' else ''
        self._presence = None if settings.read_only else hosts.arrive(town, url)
        town.store.close()  # each thread and process that needs a connection opens its own

    def run(self) -> int:
        """Serves until a signal. Returns the exit status."""
        if self._manager.watchdog_secs:
            faulthandler.enable()  # the watchdog kills with SIGABRT; this logs where each thread hung
        try:
            if len(self._listeners) == 1:
                return self._serve(0)
            count = len(self._listeners)
            self._child_status = ChildStatus(count, self._manager, self._status())
            return Prefork(count, self._serve, self._reload, self._opened, self._close, self._child_status).run()
        finally:
            if self._note_file:
                self._note_file.unlink(missing_ok=True)
            self._remove_socket()

    def _remove_socket(self) -> None:
        if self._url.startswith(UNIX) and not self._is_passed:
            Path(self._url.removeprefix(UNIX)).unlink(missing_ok=True)

    def _opened(self) -> None:
        """Announces that the townhall is open: signals are handled, and clients are served or wait in the backlog."""
        self._note_file = note_townhall(self.town.root, self._url)
        logger.info(self._status())
        logger.info(self._hint())

    def _close(self) -> None:
        """Closes the sockets, so that no client waits in a backlog that nobody serves any longer."""
        for listener in self._listeners:
            listener.server_close()

    def _serve(self, number: int, lifeline: int = -1) -> int:
        """Serves in this process until a signal. Only process 0 runs the supervisor and takes host orders."""
        town = self.town
        table = OPERATIONS if self._mode == 'rest' else ()
        rest = RestApp(town, self._access, self._durability, self._meter, self._feed, table)
        self._meter.begin(number)
        for method, path in MCP_ROUTES if len(self._listeners) == 1 else MCP_ROUTES_WITHOUT_SESSIONS:
            rest.add(method, path, Guarded('mcp', self._answer_mcp))
        if table:
            rest.add('GET', '/', Guarded('dashboard', _dashboard, lambda: True))
        supervisor = Supervisor(town, presence=self._presence)
        orders = HostOrders(town, self._presence) if number == 0 and self._presence else None

        def reload() -> None:
            # With several processes the parent logs the result.
            if self._reload() if lifeline < 0 else self._load_again(log_result=False):
                rest.town = supervisor.town = self.town
                if orders:
                    orders.town = self.town
                server.apply(self._share(), self._encrypt)

        server = Server(
            self._listener(number), rest, town.store, self._share(), self._encrypt, reload, lifeline,
            prepare=lambda: managed_redis.ensure(town.root, town.config), meter=self._meter,
            before_flush=self._access.audit.flush,
        )  # fmt: skip
        rest.probes.is_draining = lambda: server.draining
        if lifeline < 0:
            self._opened()
        self._feed.call_soon = server.call_soon
        if orders:
            supervisor.start()
            orders.start()
        reporter = self._child_status.child(number) if lifeline >= 0 else Single(self._manager, self._status())
        monitor = LivenessMonitor(server, reporter)
        if self._manager:
            monitor.start()
        try:
            gc.freeze()  # objects from start-up live as long as the process, so collections need not scan them
            with self._access.audit.gathering():
                server.serve()
        finally:
            if self._manager:
                monitor.close()
            if orders:
                orders.close()
            supervisor.close()
        return 0

    # Many townhalls never serve MCP, so its modules are imported at the first request.

    @cached_property
    def mcp(self) -> McpServer:
        """The MCP server. Raises UsageError for an unknown tool in the settings."""
        from ..mcp.catalog import Catalog
        from ..mcp.protocol import McpServer

        settings = self.town.config.townhall.mcp
        catalog = Catalog(lambda: self.town, self._feed, settings.tools, settings.read_only)
        return McpServer(catalog, keeps_sessions=len(self._listeners) == 1)

    @cached_property
    def _mcp_handlers(self) -> dict[tuple[str, str], Callable[[Request], Answer]]:
        from ..mcp.streamable_http import McpHttp

        mcp_http = McpHttp(self.mcp, self._access)
        return {(method, path): handle for method, path, handle in mcp_http.routes()}

    def _answer_mcp(self, request: Request) -> Answer:
        return self._mcp_handlers['GET' if request.method == 'HEAD' else request.method, request.path](request)

    def _hint(self) -> str:
        return f'try  {_example(self._url)}' if self._mode == 'rest' else f'MCP clients connect to  {self._url}/mcp'

    def _listener(self, number: int) -> Listener:
        """The listener of process `number`. Closes the other processes' listeners in this one."""
        own = self._listeners[number]
        for listener in self._listeners:
            if listener is not own:
                listener.server_close()
        return own

    def _share(self) -> TownhallSettings:
        """The settings of one process, whose limits on connections and streams are its share of the configured ones."""
        settings = self.town.config.townhall
        count = settings.workers
        limits = settings.limits.but(
            connections=-(-settings.limits.connections // count),
            streams=-(-settings.limits.streams // count),
        )
        return settings.but(limits=limits)

    def _status(self) -> str:
        """The line for the log and for the service manager's status."""
        return f'{self.town.name} is open on {self._url}'

    def _reload(self) -> bool:
        """Loads the configuration again, in the main process, and notifies the service manager."""
        self._manager.reloading()
        try:
            return self._load_again()
        finally:
            self._manager.reloaded()

    def _load_again(self, log_result: bool = True) -> bool:
        """Loads the configuration again and returns True. If it is wrong, changes nothing, and returns False."""
        note: Callable[..., None] = logger.log if log_result else lambda *_, **__: None
        try:
            wanted = configuration.load(self.town.root, self._flags)
            config = self._with_fixed(wanted)
            check_start(config, self._host)
            same = config.townhall.auth == self.town.config.townhall.auth  # then the verifier keeps its fetched keys
            verifier = self._verifier if same else _verifier(config)
            encrypt = _encryption(config, self.town.root)
            town = dataclasses.replace(self.town, config=config)
            self._access.apply(town, verifier)  # in the parent, too, for the children that it forks from now on
        except Exception as e:  # no error in a configuration may end a running townhall
            fault = None if isinstance(e, UsageError) else e
            note(logging.ERROR, f'the configuration was not reloaded, the old one stays in force: {e}', exc_info=fault)
            return False
        self.town, self._verifier, self._encrypt = town, verifier, encrypt
        town_secrets.configure_log(town.root, config)
        late = [path for path in _FIXED if configuration.get(wanted, path) != configuration.get(config, path)]
        needs = f'; {", ".join(late)} must wait for a restart' if late else ''
        note(logging.INFO, f'the configuration was reloaded{needs}')
        return True

    def _with_fixed(self, config: Config) -> Config:
        """`config`, but with the old values of the settings that a reload can't change."""
        sources = {path: self.town.config if path in _FIXED else config for path in configuration.settings()}
        values = {path: configuration.get(source, path) for path, source in sources.items()}
        return configuration.from_values(values, self.town.root)


def _port(settings: TownhallSettings, mode: str) -> int:
    if mode == 'rest':
        return settings.rest_port
    return settings.rest_port + 1 if settings.mcp_port < 0 else settings.mcp_port


def _verifier(config: Config, check: bool = False) -> TokenVerifier | None:
    """The token verifier of auth mode oidc, else None.

    With `check` it asks the issuer at once, which takes seconds if the issuer can't be reached.
    """
    if config.townhall.auth.mode != 'oidc':
        return None
    from ..auth import oidc

    verifier = oidc.OidcVerifier(config.townhall.auth)
    if check and (warning := verifier.check()):
        logger.warning(warning)
    return verifier


def _encryption(config: Config, root: Path) -> Encrypt | None:
    """A function that wraps a connection in TLS; None if TLS is not configured. Raises UsageError."""
    if not config.townhall.tls.enabled:
        if config.townhall.mtls.enabled:
            raise UsageError(
                'townhall.mtls is set, but townhall.tls is not; set cert_path and key_path below [townhall.tls]'
            )
        return None
    from ..http.tls import TlsSocket, server_context  # late: importing ssl costs time and memory

    context = server_context(config.townhall.tls, config.townhall.mtls, root)
    return lambda sock: TlsSocket(sock, context)


def _dashboard(request: Request) -> Response:
    from ..rest import dashboard

    return dashboard.answer(request)


def _example(url: str) -> str:
    if url.startswith(UNIX):
        return f'curl -s --unix-socket {url.removeprefix(UNIX)} http://localhost/v1/status'
    return f'curl -s {url}/v1/status'


def durability(town: Town) -> str:
    """How safe an acknowledged write is: 'always' or 'everysec' (Redis' appendfsync), 'none', or 'unknown'.

    'none' means that Redis writes no append-only file, or may evict keys. A warning is logged then.
    """
    try:
        store = town.store
        persistence = store.call(store.info('persistence')).decode()
        memory = store.call(store.info('memory')).decode()
        safe = 'aof_enabled:1' in persistence and 'maxmemory_policy:noeviction' in memory
        fsync = store.call(store.setting('appendfsync'))[1].decode() if safe else 'none'
    except TownError:
        fsync = 'unknown'  # the Redis user may lack the permission to ask
    if fsync in ('none', 'no'):
        logger.warning('this Redis may lose acknowledged changes; turn on appendonly and noeviction')
        return 'none'
    return str(fsync)
