"""The `townhall` command: serves a town."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from typing import Any

from . import __version__
from . import config as configuration
from .errors import TownError, UsageError
from .town import Town
from .usage import Parser, complain, end_streams, open_meant, ready_streams, town_root

MODES = ('rest', 'mcp-stdio', 'mcp-http')


def parser() -> Parser:
    """The command line of `townhall`. --town and --verbose are taken before and after the mode."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        '--town', metavar='DIR', help='the town (default: the nearest directory upwards that holds one)'
    )
    shared.add_argument('--verbose', action='store_true', help='say on which town it acts')
    served = Parser(
        prog='townhall', parents=[shared], description='Townhall, the control plane of a town of AI coding agents.'
    )
    served.add_argument('--version', action='version', version=f'townhall {__version__}')
    served.add_argument('mode', nargs='?', choices=MODES, default='rest', help='what to serve (default: rest)')
    served.add_argument('--bind', metavar='ADDRESS', help='address to listen on (default: townhall.bind, 127.0.0.1)')
    served.add_argument('--port', metavar='N', type=int, help='port to listen on (default: townhall.rest_port, 8787)')
    served.add_argument('--read-only', action='store_true', default=None, help='refuse every change')
    return served


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 stopped cleanly, 1 runtime failure, 2 usage or configuration error."""
    ready_streams()
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 0
    except Exception as e:
        return complain('townhall', e)
    finally:
        end_streams()


def _run(argv: list[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit:
        return 0  # --help or --version was answered; what is wrong is a UsageError
    if arguments.mode != 'rest':
        raise UsageError(f'the mode {arguments.mode} is not there yet; this version serves rest')
    root = town_root(arguments)
    flags: dict[str, Any] = {
        'townhall.bind': arguments.bind,
        'townhall.rest_port': arguments.port,
        'townhall.read_only': arguments.read_only,
    }
    check_bind(configuration.load(root, flags).townhall.bind)  # before anything is started
    return serve(open_meant(arguments, flags))


def check_bind(bind: str) -> None:
    """Start-up rule 1: without authentication only a loopback address is served. Raises UsageError."""
    try:
        loopback = ipaddress.ip_address(bind).is_loopback
    except ValueError:
        loopback = bind == 'localhost'
    if not loopback:
        raise UsageError(
            f'townhall.bind = {bind!r}: townhall.auth.mode is "none", so only a loopback address is served; '
            'use --bind 127.0.0.1 and reach it through ssh -L or a proxy that authenticates'
        )


def serve(town: Town) -> int:
    """Serves REST until a signal ends it. Raises UsageError when it can't listen."""
    settings = town.config.townhall
    from . import redis_server
    from .caretaker import Caretaker
    from .local import note_townhall
    from .rest import Rest
    from .web import Server

    server = Server(
        (settings.bind, settings.rest_port),
        Rest(town, durability(town)),
        town.store,
        settings.limits,
        frozenset(name.lower() for name in settings.allowed_hosts),
        settings.request_timeout_ms / 1000,
        settings.access_log,
        prepare=lambda: redis_server.ensure(town.root, town.config),
    )
    town.store.close()
    host, port = server.server_address[:2]
    base = f'http://[{host!s}]:{port}' if ':' in str(host) else f'http://{host!s}:{port}'
    hint = f'townhall: try  curl -s {base}/v1/status'
    sys.stderr.write(f'townhall: {town.name} is open on {base}\n{hint}\n')  # at once: a reader may go after one line
    sys.stderr.flush()
    note = note_townhall(town.root, base)
    caretaker = Caretaker(town)
    if not settings.read_only:
        caretaker.start()
    try:
        server.serve()
    finally:
        caretaker.close()
        note.unlink(missing_ok=True)
    return 0


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
        print('townhall: this Redis may lose acknowledged changes; turn on appendonly and noeviction', file=sys.stderr)
        return 'none'
    return str(found)


if __name__ == '__main__':
    sys.exit(main())
