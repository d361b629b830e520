"""Serves the dashboard: one HTML file with inline style and script, and a policy that allows no other code."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from ..http.http1 import Request, Response

_INLINE: Final = re.compile(r'<(style|script)>(.*?)</\1>', re.S)


def dashboard_page() -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Returns (page, its header fields)."""
    page = files(__package__).joinpath('dashboard.html').read_text('utf-8')
    return page.encode(), (
        ('Content-Security-Policy', policy(page)),
        ('Referrer-Policy', 'no-referrer'),
        ('Cross-Origin-Opener-Policy', 'same-origin'),
        ('Cross-Origin-Resource-Policy', 'same-origin'),
    )


def policy(page: str) -> str:
    """The Content Security Policy (W3C, level 3) of a page.

    It allows the inline style and script by their hashes, and requests to the page's own origin. Trusted Types forbid
    the script to turn text into markup.
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
    """GET /. Needs no key, because the page holds no data: its script fetches the data with the user's key."""
    return Response(200, _PAGE, 'text/html; charset=utf-8', _HEADERS)
