"""`tt ping`: whether a townhall is ready, for scripts and for the health checks of containers and service managers."""

from __future__ import annotations

import argparse
import json
import socket
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import TownError
from ..host.townhalls import running_townhalls
from .backends import parse_url
from .lifecycle import report
from .parser import Command, argument, meant_root

if TYPE_CHECKING:
    from http.client import HTTPConnection  # which takes long to import

SECS: Final = 5.0  # for an answer
_UNIX: Final = 'unix:'


def ping_command() -> Command:
    """What asks a townhall how it is."""
    live = argument('--live', action='store_true', help='only whether it answers; Redis may be away')
    return Command('town', 'ping', 'Ask whether townhall is ready: exit status 0 if it is, else 1', _ping, (live,))


def _ping(arguments: argparse.Namespace) -> int:
    url = getattr(arguments, 'url', None) or _url_of(meant_root(arguments))
    path = '/health' if arguments.live else '/ready'
    status, found = ask(url, path, is_here=not getattr(arguments, 'url', None))
    answer = {'url': url, 'http_status': status, **found}
    said = f'{url} is {found.get("status", f"not a townhall: it answered {status}")}'
    report(arguments, answer, f'{said}: {found["detail"]}' if 'detail' in found else said)
    return 0 if status == 200 else 1


def _url_of(root: Path) -> str:
    """Where the townhall of a town listens on this machine. Raises TownError."""
    found = running_townhalls(root)
    if not found:
        raise TownError(f'no townhall of {root} runs on this machine; start it:  tt start --town {root}')
    return found[-1][2]


def ask(url: str, path: str, is_here: bool) -> tuple[int, dict[str, Any]]:
    """The status and the JSON object that a townhall answers with. Raises TownError when it does not."""
    import http.client

    try:
        with closing(_connection(url, is_here)) as connection:
            connection.request('GET', path)
            response = connection.getresponse()
            status, text = response.status, response.read()
    except (OSError, http.client.HTTPException) as e:
        raise TownError(f'{url} can not be reached: {e or type(e).__name__}') from None
    try:
        found = json.loads(text)
    except ValueError:
        found = {}
    return status, found if isinstance(found, dict) else {}


def _connection(url: str, is_here: bool) -> HTTPConnection:
    import http.client

    if url.startswith(_UNIX):
        connection = http.client.HTTPConnection('localhost', timeout=SECS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(SECS)
        connection.sock.connect(url.removeprefix(_UNIX))
        return connection
    host, port, _, is_secure = parse_url(url)
    if not is_secure:
        return http.client.HTTPConnection(host, port, timeout=SECS)
    import ssl

    context = ssl.create_default_context()
    if is_here:  # it is known by its process, its certificate is for other names, and nothing secret is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=SECS, context=context)
