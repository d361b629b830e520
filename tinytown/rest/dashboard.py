"""The dashboard: one HTML file that carries its style and script, and a policy under which nothing else runs."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from ..http.http1 import Request, Response

_INLINE: Final = re.compile(r'<(style|script)>(.*?)</\1>', re.S)


def dashboard_page() -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The page, and the header fields that it is served with."""
    page = files(__package__).joinpath('dashboard.html').read_text('utf-8')
    return page.encode(), (
        ('Content-Security-Policy', policy(page)),
        ('Referrer-Policy', 'no-referrer'),
        ('Cross-Origin-Opener-Policy', 'same-origin'),
        ('Cross-Origin-Resource-Policy', 'same-origin'),
    )


def policy(page: str) -> str:
    """The Content Security Policy (W3C, level 3) of a page: its own inline style and script, known by their hashes,
    requests to its own origin, and no way to make markup out of text.
    """
    hashes = {name: _hash(source) for name, source in _INLINE.findall(page)}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


_PAGE, _HEADERS = dashboard_page()


def answer(_request: Request) -> Response:
    """GET /. Everyone may have the page; what it shows it asks for with the caller's key."""
    return Response(200, _PAGE, 'text/html; charset=utf-8', _HEADERS)
