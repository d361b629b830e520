"""CORS: pages of other origins are refused, except those of the origins in the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tinytown.config import load
from tinytown.errors import UsageError

from ..support import Hall, Place, make_town

PAGE = 'https://page.example'


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = make_town(tmp_path_factory.mktemp('cors'), townhall__cors={'allowed_origins': [PAGE]})
    yield place
    place.close()


@pytest.fixture(scope='module')
def hall(place: Place) -> Hall:
    return place.hall()


def test_a_listed_origin_may_read_answers_and_errors(hall: Hall) -> None:
    for path, status in (('/v1/status', 200), ('/v1/agents/nobody', 404), ('/health', 200)):
        answer = hall.get(path, Origin=PAGE)
        assert answer.status == status
        assert answer.headers['access-control-allow-origin'] == PAGE
        assert answer.headers['vary'] == 'Origin'
        assert 'X-Request-ID' in answer.headers['access-control-expose-headers']
        assert 'access-control-allow-credentials' not in answer.headers


def test_a_preflight_answer_lists_methods_and_headers(hall: Hall) -> None:
    headers = {
        'Origin': PAGE,
        'Access_Control_Request_Method': 'POST',
        'Access_Control_Request_Headers': 'content-type',
    }
    answer = hall.request('OPTIONS', '/v1/backlog', **headers)
    assert (answer.status, answer.body) == (204, b'')
    assert 'POST' in answer.headers['access-control-allow-methods'].split(', ')
    assert {'Authorization', 'Content-Type', 'Idempotency-Key'} <= set(
        answer.headers['access-control-allow-headers'].split(', ')
    )


@pytest.mark.parametrize(
    'origin',
    ['http://page.example', 'https://page.example:444', 'https://page.example.evil', 'null', 'https://PAGE.example'],
)
def test_any_other_origin_is_refused_and_the_refusal_is_audited(hall: Hall, place: Place, origin: str) -> None:
    for method, path in (
        ('GET', '/v1/status'),
        ('POST', '/v1/backlog'),
        ('OPTIONS', '/v1/backlog'),
        ('GET', '/health'),
    ):
        answer = hall.request(method, path, Origin=origin)
        assert (answer.status, answer.json['code']) == (403, 'foreign-origin')
        assert 'access-control-allow-origin' not in answer.headers
    last = json.loads((place.root / '.tt/audit.denied.jsonl').read_text().splitlines()[-1])
    assert last['outcome'] == 'foreign-origin'


def test_the_origin_of_the_server_itself_need_not_be_listed(hall: Hall) -> None:
    answer = hall.get('/v1/status', Origin=f'http://127.0.0.1:{hall.port}')
    assert answer.status == 200
    assert 'access-control-allow-origin' not in answer.headers


@pytest.mark.parametrize('origin', ['*', 'page.example', 'https://page.example/', 'https://*.example', 'file://x'])
def test_an_invalid_origin_in_the_setting_is_refused_at_the_start(place: Place, origin: str) -> None:
    with pytest.raises(UsageError, match='must match'):
        load(place.root, environ={'TINYTOWN_TOWNHALL_CORS_ALLOWED_ORIGINS': origin})
