"""The router: which route matches a path, and with which values of its placeholders."""

from __future__ import annotations

import pytest

from tinytown.errors import MethodNotAllowed, NotFound
from tinytown.http.router import Router


@pytest.fixture
def router() -> Router[str]:
    made: Router[str] = Router()
    for method, path in (
        ('GET', '/agents'),
        ('GET', '/agents/{agent}'),
        ('POST', '/agents/prune'),
        ('GET', '/agents/{agent}/inbox'),
        ('GET', '/{kind}/all/inbox'),
        ('POST', '/tasks/{task_id}/parts/{part}'),
        ('DELETE', '/tasks/{id}/parts/{number}'),
    ):
        made.add(method, path, f'{method} {path}')
    return made


@pytest.mark.parametrize(
    ('method', 'path', 'target', 'values'),
    [
        ('GET', '/agents', '/agents', {}),
        ('HEAD', '/agents/a', '/agents/{agent}', {'agent': 'a'}),
        ('POST', '/agents/prune', '/agents/prune', {}),
        ('GET', '/agents/prune', '/agents/{agent}', {'agent': 'prune'}),
        ('GET', '/agents/{}', '/agents/{agent}', {'agent': '{}'}),
        ('GET', '/agents/all/inbox', '/agents/{agent}/inbox', {'agent': 'all'}),
        ('GET', '/towns/all/inbox', '/{kind}/all/inbox', {'kind': 'towns'}),
        ('POST', '/tasks/1/parts/2', '/tasks/{task_id}/parts/{part}', {'task_id': '1', 'part': '2'}),
        ('DELETE', '/tasks/1/parts/2', '/tasks/{id}/parts/{number}', {'id': '1', 'number': '2'}),
    ],
)
def test_a_path_matches_one_route_and_an_exact_one_wins(
    router: Router[str], method: str, path: str, target: str, values: dict[str, str]
) -> None:
    routed = 'GET' if method == 'HEAD' else method
    assert router.match(method, path) == (f'{routed} {target}', values)


@pytest.mark.parametrize('path', ['/', '', '/agent', '/agents/', '/agents//inbox', '/agents/a/b', '/{}/x', '/tasks/1'])
def test_a_path_without_a_route_is_not_found(router: Router[str], path: str) -> None:
    with pytest.raises(NotFound):
        router.match('GET', path)
    with pytest.raises(NotFound):
        router.allow(path)


@pytest.mark.parametrize(
    ('path', 'allowed'),
    [
        ('/agents', 'GET, HEAD, OPTIONS'),
        ('/agents/prune', 'GET, HEAD, OPTIONS, POST'),
        ('/tasks/1/parts/2', 'DELETE, OPTIONS, POST'),
    ],
)
def test_a_wrong_method_gets_the_methods_of_every_matching_route(router: Router[str], path: str, allowed: str) -> None:
    assert router.allow(path) == allowed
    with pytest.raises(MethodNotAllowed) as caught:
        router.match('PUT', path)
    assert caught.value.allow == allowed
