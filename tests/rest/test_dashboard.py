"""The dashboard as it is served: without a key, with its security policy, in one file, in readable colours."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from itertools import product

import pytest

from tinytown.rest import dashboard

from ..auth.test_access import Keyed
from ..support import Hall, Place

PAGE = dashboard.dashboard_page()[0].decode()
TEXT_ON = ('paper', 'raised', 'tint')


@pytest.fixture(scope='module')
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A town whose townhalls need API keys."""
    place = Keyed(tmp_path_factory.mktemp('d')).place
    yield place
    place.close()


@pytest.fixture(scope='module')
def asking(guarded: Place) -> Hall:
    return guarded.hall()


def test_the_page_needs_no_key_but_the_data_does(asking: Hall) -> None:
    reply = asking.get('/')
    assert (reply.status, reply.headers['content-type']) == (200, 'text/html; charset=utf-8')
    assert reply.body.decode() == PAGE
    assert asking.get('/v1/status').status == 401
    assert asking.request('HEAD', '/').headers['content-length'] == str(len(reply.body))
    assert asking.post('/').status == 405


def test_a_townhall_that_serves_only_mcp_has_no_dashboard(guarded: Place) -> None:
    assert guarded.hall('mcp-http').get('/').status == 404


def inline(tag: str) -> str:
    [source] = re.findall(rf'<{tag}>(.*?)</{tag}>', PAGE, re.S)
    return str(source)


def test_the_policy_allows_only_the_inline_script_and_style(asking: Hall) -> None:
    headers = asking.get('/').headers
    policy = dict(part.strip().split(' ', 1) for part in headers['content-security-policy'].split(';'))
    digest = {
        tag: base64.b64encode(hashlib.sha256(inline(tag).encode()).digest()).decode() for tag in ('script', 'style')
    }
    assert policy == {
        'default-src': "'none'",
        'script-src': f"'sha256-{digest['script']}'",
        'style-src': f"'sha256-{digest['style']}'",
        'connect-src': "'self'",
        'img-src': 'data:',
        'base-uri': "'none'",
        'form-action': "'none'",
        'frame-ancestors': "'none'",
        'require-trusted-types-for': "'script'",
        'trusted-types': "'none'",
    }
    assert headers['referrer-policy'] == 'no-referrer'
    assert headers['x-content-type-options'] == 'nosniff'
    assert headers['cache-control'] == 'no-store'


UNWANTED = (
    r'(?<!xmlns=.)https?://', r'\bsrc=', r'@import', r'url\(', r'\bstyle=', r'<[^>]*\son\w+=', r'(inner|outer)HTML',
    'insertAdjacentHTML', r'document\.write', r'\beval\(', 'new Function', 'localStorage', r'document\.cookie',
)  # fmt: skip


@pytest.mark.parametrize('unwanted', UNWANTED)
def test_the_page_loads_nothing_else_and_turns_no_text_into_markup(unwanted: str) -> None:
    assert not re.search(unwanted, PAGE)


def colours() -> dict[str, tuple[str, str]]:
    """The colours of the page by name: (light theme, dark theme)."""
    found = re.findall(r'--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);', PAGE)
    return {name: (light, dark) for name, light, dark in found}


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ('front', 'back', 'least'),
    [(front, back, 4.5) for front, back in product(('ink', 'muted', 'accent', 'danger'), TEXT_ON)]
    + [('on-accent', 'accent', 4.5), ('on-danger', 'danger', 4.5), ('edge', 'paper', 3), ('edge', 'raised', 3)],
)
@pytest.mark.parametrize('theme', [0, 1], ids=['light', 'dark'])
def test_every_colour_has_enough_contrast(front: str, back: str, least: float, theme: int) -> None:
    found = colours()
    assert contrast(found[front][theme], found[back][theme]) >= least


def test_the_style_uses_only_the_named_colours() -> None:
    rest = re.sub(r'--[\w-]+: light-dark\([^;]*;', '', inline('style'))
    assert not re.findall(r'#[0-9a-f]{3,8}\b(?=[^{]*})', rest)
    assert set(re.findall(r'var\(--([\w-]+)\)', rest)) == set(colours())
