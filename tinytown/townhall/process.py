"""What a townhall process is made of: listening sockets, the server, REST, the caretaker; and how it is reloaded."""

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

# What a running townhall can't change: it would need another socket, another Redis, or other processes.
_FIXED: Final = (
    *('name', 'host', *(f'redis.{name}' for name in RedisSettings.specs), 'retention.events'),
    *('townhall.bind', 'townhall.rest_port', 'townhall.workers', 'townhall.read_only', 'townhall.tls.enabled'),
    *('townhall.mcp_port', 'townhall.mcp.tools', 'townhall.mcp.read_only'),
    *('townhall.audit.path', 'townhall.audit.max_bytes', 'townhall.audit.keep'),
)

# What `mcp_http` serves, by method and path.
MCP_ROUTES_WITHOUT_SESSIONS: Final = (('POST', '/mcp'), ('GET', '/mcp'), ('DELETE', '/mcp'))
MCP_ROUTES: Final = (*MCP_ROUTES_WITHOUT_SESSIONS, ('GET', '/sse'), ('POST', '/messages'))


class TownhallProcess:
    """A townhall, in one process or several. `flags` are settings, by path, that the command line gave."""

    def __init__(self, root: Path, config: Config, flags: Mapping[str, Any], mode: str = 'rest') -> None:
        """Opens its sockets, and then the town: one that can't listen starts no Redis. Raises UsageError, TownError."""
        self._flags = dict(flags)
        self._mode = mode
        settings = config.townhall
        self._verifier, self._encrypt = _verifier(config, ask=True), _encryption(config, root)
        self._is_passed = is_passed(os.environ)
        self._listeners = open_listeners(settings.bind, _port(settings, mode), settings.workers, mode)
        self._manager = sd_notify.notifier(os.environ)
        self._host = self._listeners[0].host
        for warning in (*check_start(config, self._host), *town_secrets.exposed(root, config)):
            logger.warning(warning)
        self._url = self._listeners[0].url('https' if self._encrypt else 'http')
        self._note: Path | None = None
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
            _ = self.mcp  # made now: a tool that is none is told at the start
        self._durability = durability(town)
        self._meter = Meter(len(self._listeners))
        url = self._url if mode == 'rest' else ''
        self._presence = None if settings.read_only else hosts.arrive(town, url)
        town.store.close()  # it is opened anew by each thread and process that needs it

    def run(self) -> int:
        """Serves until a signal ends it. The exit status."""
        if self._manager.watchdog_secs:
            faulthandler.enable()  # a watchdog ends us with SIGABRT: then the log tells where each thread hung
        try:
            if len(self._listeners) == 1:
                return self._serve(0)
            self._roll = ChildStatus(len(self._listeners), self._manager, self._status())
            count = len(self._listeners)
            return Prefork(count, self._serve, self._reload, self._open, self._close, self._roll).run()
        finally:
            if self._note:
                self._note.unlink(missing_ok=True)
            self._remove_socket()

    def _remove_socket(self) -> None:
        if self._url.startswith(UNIX) and not self._is_passed:
            Path(self._url.removeprefix(UNIX)).unlink(missing_ok=True)

    def _open(self) -> None:
        """Tells that it is open: signals are heeded, and clients are served or wait in the backlog."""
        self._note = note_townhall(self.town.root, self._url)
        logger.info(self._status())
        logger.info(self._hint())

    def _close(self) -> None:
        """Lets no client into a backlog that nobody serves any more."""
        for each in self._listeners:
            each.server_close()

    def _serve(self, number: int, lifeline: int = -1) -> int:
        """Serves in this process. The first of several has the caretaker."""
        town = self.town
        table = OPERATIONS if self._mode == 'rest' else ()
        rest = RestApp(town, self._access, self._durability, self._meter, self._feed, table)
        self._meter.begin(number)
        for method, path in MCP_ROUTES if len(self._listeners) == 1 else MCP_ROUTES_WITHOUT_SESSIONS:
            rest.add(method, path, Guarded('mcp', self._answer_mcp))
        if table:
            rest.add('GET', '/', Guarded('dashboard', _dashboard, lambda: True))
        caretaker = Supervisor(town, presence=self._presence)
        steward = HostOrders(town, self._presence) if number == 0 and self._presence else None

        def reload() -> None:
            if self._reload() if lifeline < 0 else self._take_up(tell=False):
                rest.town = caretaker.town = self.town
                if steward:
                    steward.town = self.town
                server.apply(self._share(), self._encrypt)

        server = Server(
            self._listener(number), rest, town.store, self._share(), self._encrypt, reload, lifeline,
            prepare=lambda: managed_redis.ensure(town.root, town.config), meter=self._meter,
            before_flush=self._access.audit.flush,
        )  # fmt: skip
        rest.probes.is_draining = lambda: server.draining
        if lifeline < 0:
            self._open()
        self._feed.call_soon = server.call_soon
        if steward:
            caretaker.start()
            steward.start()
        vitals = LivenessMonitor(
            server, self._roll.child(number) if lifeline >= 0 else Single(self._manager, self._status())
        )
        if self._manager:
            vitals.start()
        try:
            gc.freeze()  # what is here now stays, and need not be looked through for garbage
            with self._access.audit.gathering():
                server.serve()
        finally:
            if self._manager:
                vitals.close()
            if steward:
                steward.close()
            caretaker.close()
        return 0

    # What many townhalls never serve is imported when it is asked for.

    @cached_property
    def mcp(self) -> McpServer:
        """The MCP front end. Raises UsageError for a tool in the settings that is none."""
        from ..mcp.catalog import Catalog
        from ..mcp.protocol import McpServer

        settings = self.town.config.townhall.mcp
        offered = Catalog(lambda: self.town, self._feed, settings.tools, settings.read_only)
        return McpServer(offered, keeps_sessions=len(self._listeners) == 1)

    @cached_property
    def _mcp_handlers(self) -> dict[tuple[str, str], Callable[[Request], Answer]]:
        from ..mcp.streamable_http import McpHttp

        served = McpHttp(self.mcp, self._access)
        return {(method, path): handle for method, path, handle in served.routes()}

    def _answer_mcp(self, request: Request) -> Answer:
        return self._mcp_handlers['GET' if request.method == 'HEAD' else request.method, request.path](request)

    def _hint(self) -> str:
        return f'try  {_example(self._url)}' if self._mode == 'rest' else f'MCP clients take  {self._url}/mcp'

    def _listener(self, number: int) -> Listener:
        """The listener of one process; the others' are closed in it."""
        ours = self._listeners[number]
        for each in self._listeners:
            if each is not ours:
                each.server_close()
        return ours

    def _share(self) -> TownhallSettings:
        """The settings of one process: of what is limited, its share."""
        settings = self.town.config.townhall
        count = settings.workers
        limits = settings.limits.but(
            connections=-(-settings.limits.connections // count),
            streams=-(-settings.limits.streams // count),
        )
        return settings.but(limits=limits)

    def _status(self) -> str:
        """What a service manager shows."""
        return f'{self.town.name} is open on {self._url}'

    def _reload(self) -> bool:
        """Takes up the configuration in the process that a service manager knows, which is told of it."""
        self._manager.reloading()
        try:
            return self._take_up()
        finally:
            self._manager.reloaded()

    def _take_up(self, tell: bool = True) -> bool:
        """Loads the configuration again. One that is wrong changes nothing, and is told."""
        note: Callable[..., None] = logger.log if tell else lambda *_, **__: None  # of several the parent tells
        try:
            wanted = configuration.load(self.town.root, self._flags)
            config = self._with_fixed(wanted)
            check_start(config, self._host)
            same = config.townhall.auth == self.town.config.townhall.auth  # then the keys that it knows stay
            verifier = self._verifier if same else _verifier(config)
            encrypt = _encryption(config, self.town.root)
            town = dataclasses.replace(self.town, config=config)
            self._access.apply(town, verifier)  # in the parent, too: what it forks from now on begins with this
        except Exception as e:  # whatever is wrong with it, what is in force stays
            fault = None if isinstance(e, UsageError) else e
            note(logging.ERROR, f'the configuration is not taken up, the old one stays in force: {e}', exc_info=fault)
            return False
        self.town, self._verifier, self._encrypt = town, verifier, encrypt
        town_secrets.configure_log(town.root, config)
        late = [path for path in _FIXED if configuration.get(wanted, path) != configuration.get(config, path)]
        needs = f'; {", ".join(late)} must wait for a restart' if late else ''
        note(logging.INFO, f'the configuration was taken up again{needs}')
        return True

    def _with_fixed(self, config: Config) -> Config:
        """A configuration with the old values of what can't be changed."""
        sources = {path: self.town.config if path in _FIXED else config for path in configuration.settings()}
        values = {path: configuration.get(source, path) for path, source in sources.items()}
        return configuration.from_values(values, self.town.root)


def _port(settings: TownhallSettings, mode: str) -> int:
    if mode == 'rest':
        return settings.rest_port
    return settings.rest_port + 1 if settings.mcp_port < 0 else settings.mcp_port


def _verifier(config: Config, ask: bool = False) -> TokenVerifier | None:
    """Whoever can say whose a token is, in mode oidc. To `ask` its issuer now takes seconds if that is away."""
    if config.townhall.auth.mode != 'oidc':
        return None
    from ..auth import oidc

    made = oidc.OidcVerifier(config.townhall.auth)
    if ask and (warning := made.check()):
        logger.warning(warning)
    return made


def _encryption(config: Config, root: Path) -> Encrypt | None:
    """What makes a connection one of TLS, if that is configured."""
    if not config.townhall.tls.enabled:
        if config.townhall.mtls.enabled:
            raise UsageError(
                'townhall.mtls is set, but townhall.tls is not; set cert_path and key_path below [townhall.tls]'
            )
        return None
    from ..http.tls import TlsSocket, server_context  # late: ssl costs time and memory

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
    """How safe an acknowledged write is: always, everysec, or none (no append-only file, or an evicting policy)."""
    try:
        store = town.store
        persistence = store.call(store.info('persistence')).decode()
        memory = store.call(store.info('memory')).decode()
        safe = 'aof_enabled:1' in persistence and 'maxmemory_policy:noeviction' in memory
        found = store.call(store.setting('appendfsync'))[1].decode() if safe else 'none'
    except TownError:
        found = 'unknown'  # we may not be allowed to ask
    if found in ('none', 'no'):
        logger.warning('this Redis may lose acknowledged changes; turn on appendonly and noeviction')
        return 'none'
    return str(found)
