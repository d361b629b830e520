"""The `townhall` command: reads its command line, loads the configuration, and serves a town.

It hands over to `process` (REST and MCP over HTTP), `mcp.stdio` (mode mcp-stdio) or `systemd` (`townhall service`).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

from .. import __version__, log
from .. import config as configuration
from ..cli.parser import Parser, town_root
from ..console import end_streams, explain, ready_streams

logger = logging.getLogger('tinytown.townhall')

MODES = ('rest', 'mcp-stdio', 'mcp-http')


def townhall_parser() -> Parser:
    """The parser of `townhall`'s command line, `townhall service` aside (see `systemd`)."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        '--town', metavar='DIR', help='directory of the town (default: the nearest one upwards that holds a town)'
    )
    shared.add_argument('--verbose', action='store_true', help='log more, like townhall.log.level = "debug"')
    parser = Parser(
        prog='townhall',
        parents=[shared],
        description='Townhall, the control plane of a town of AI coding agents.',
        epilog='To run a town under systemd, see townhall service --help.',
    )
    parser.add_argument('--version', action='version', version=f'townhall {__version__}')
    parser.add_argument('mode', nargs='?', choices=MODES, default='rest', help='what to serve (default: rest)')
    parser.add_argument(
        '--bind', metavar='ADDRESS', help='address, or unix:/path, to listen on (default: townhall.bind, 127.0.0.1)'
    )
    parser.add_argument(
        '--port',
        metavar='N',
        type=int,
        help='port to listen on (default: townhall.rest_port, 8787; mcp-http: mcp_port, 8788)',
    )
    parser.add_argument(
        '--workers', metavar='N', type=int, help='number of processes that serve (default: townhall.workers, 1)'
    )
    parser.add_argument('--read-only', action='store_true', default=None, help='refuse all changes')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Exit status: 0 stopped cleanly, 1 runtime failure, 2 usage or configuration error."""
    ready_streams()
    log.configure_from_environment(os.environ)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 0
    except Exception as e:
        message, status = explain(e)
        log.fatal(message)
        return status
    finally:
        end_streams()


def _run(argv: list[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ['service']:
        from . import systemd  # late: only `townhall service` needs it

        return systemd.run(words[1:])
    configuration.take_credentials()
    try:
        arguments = townhall_parser().parse_args(argv)
    except SystemExit:
        return 0  # argparse answered --help or --version; errors raise UsageError instead
    root = town_root(arguments)
    if arguments.mode == 'mcp-stdio':
        from ..mcp.stdio import serve

        return serve(root, {'townhall.read_only': arguments.read_only, 'townhall.log.level': _level(arguments)})
    signal.signal(signal.SIGHUP, lambda *_: None)  # until the server, which reloads, handles it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # without a handler, PID 1 in a container ignores it
    flags: dict[str, Any] = {
        'townhall.bind': arguments.bind,
        'townhall.rest_port' if arguments.mode == 'rest' else 'townhall.mcp_port': arguments.port,
        'townhall.workers': arguments.workers,
        'townhall.read_only': arguments.read_only,
        'townhall.log.level': _level(arguments),
    }
    from ..auth.access import check_start  # late: --help and usage errors do not need these modules
    from ..host import town_secrets
    from .process import TownhallProcess

    config = configuration.load(root, flags)
    town_secrets.configure_log(root, config)
    logger.debug(f'settings are from {", ".join(configuration.sources(root, flags))}')
    check_start(config, config.townhall.bind)  # before any socket or process is opened
    return TownhallProcess(root, config, flags, arguments.mode).run()


def _level(arguments: argparse.Namespace) -> str | None:
    """The log level that --verbose asks for; None without it."""
    return 'debug' if getattr(arguments, 'verbose', False) else None


if __name__ == '__main__':
    sys.exit(main())
