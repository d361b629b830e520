"""`tt ping`: asks a townhall whether it is ready, for scripts and for health checks of containers.

`keys` also uses `ask`, to find whether a townhall reloaded its keys.
"""

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
from .parser import CommandSpec, argument, meant_root

if TYPE_CHECKING:
    from http.client import HTTPConnection  # slow to import, so functions import it when they need it

SECS: Final = 5.0  # timeout of a request
_UNIX: Final = 'unix:'


def ping_command() -> CommandSpec:
    """The command `tt ping`."""
    live = argument('--live', action='store_true', help='only ask whether it answers; Redis may be away')
    return CommandSpec('town', 'ping', 'Ask whether townhall is ready: exit status 0 if it is, else 1', _ping, (live,))


def _ping(arguments: argparse.Namespace) -> int:
    url = getattr(arguments, 'url', None) or _url_of(meant_root(arguments))
    path = '/health' if arguments.live else '/ready'
    status, body = ask(url, path, is_here=not getattr(arguments, 'url', None))
    answer = {'url': url, 'http_status': status, **body}
    sentence = f'{url} is {body.get("status", f"not a townhall: it answered {status}")}'
    report(arguments, answer, f'{sentence}: {body["detail"]}' if 'detail' in body else sentence)
    return 0 if status == 200 else 1


def _url_of(root: Path) -> str:
    """The URL of the town's townhall on this machine. Raises TownError if none runs."""
    townhalls = running_townhalls(root)
    if not townhalls:
        raise TownError(f'no townhall of {root} runs on this machine; start it:  tt start --town {root}')
    return townhalls[-1][2]


def ask(url: str, path: str, is_here: bool) -> tuple[int, dict[str, Any]]:
    """Sends a GET to a townhall. Returns the status and the JSON object of its answer, {} if that is anything else.

    `is_here` means a townhall of this machine, whose certificate need not fit its address. Raises TownError if it can't
    be reached.
    """
    import http.client

    try:
        with closing(_connection(url, is_here)) as connection:
            connection.request('GET', path)
            response = connection.getresponse()
            status, text = response.status, response.read()
    except (OSError, http.client.HTTPException) as e:
        raise TownError(f"{url} can't be reached: {e or type(e).__name__}") from None
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    return status, body if isinstance(body, dict) else {}


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
    if is_here:  # the URL is from a live process, the certificate names other addresses, and nothing secret is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=SECS, context=context)
