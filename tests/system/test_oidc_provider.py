"""Tokens of a real, certified OpenID provider (npm's oidc-provider), started here on loopback."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tinytown.auth import oidc
from tinytown.auth.oidc import OidcVerifier
from tinytown.errors import Forbidden, Unauthorized, Unavailable
from tinytown.model import Principal
from tinytown.settings import AuthSettings

from ..support import PATIENCE, Place, environment, free_port, make_town
from ..tokens import Signer

PACKAGE = 'oidc-provider@9'
TO_JWK: dict[str, Any] = {'RS256': RSAAlgorithm.to_jwk, 'ES256': ECAlgorithm.to_jwk, 'EdDSA': OKPAlgorithm.to_jwk}


@pytest.fixture(scope='session')
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the provider in it."""
    assert shutil.which('npm'), 'these tests need node and npm'
    place = tmp_path_factory.mktemp('provider')
    quiet = ('--silent', '--no-audit', '--no-fund', '--prefer-offline')
    subprocess.run(['npm', 'install', *quiet, '--prefix', '.', PACKAGE], cwd=place, check=True, timeout=300)
    shutil.copy(Path(__file__).with_name('provider.mjs'), place)
    return place


@dataclass
class Provider:
    """A provider that runs."""

    url: str

    @property
    def port(self) -> int:
        return urllib.parse.urlsplit(self.url).port or 0

    def token(self, scope: str = 'town.read', resource: str = 'urn:town') -> str:
        """An access token, as a client gets one (RFC 6749, 4.4)."""
        form = {'grant_type': 'client_credentials', 'client_id': 'ci', 'client_secret': 'not-a-secret'}
        data = urllib.parse.urlencode(form | {'scope': scope, 'resource': resource})
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=PATIENCE)
        connection.request('POST', '/token', data, {'Content-Type': 'application/x-www-form-urlencoded'})
        answer = json.load(connection.getresponse())
        connection.close()
        assert 'access_token' in answer, answer
        return str(answer['access_token'])


@contextmanager
def providing(packages: Path, *signers: Signer, port: int = 0) -> Iterator[Provider]:
    """A provider with these keys, which signs with the first."""
    keys = [
        TO_JWK[each.algorithm](each.private, as_dict=True) | {'kid': each.kid, 'alg': each.algorithm, 'use': 'sig'}
        for each in signers
    ]
    for key in keys:
        key.pop('key_ops', None)
    argv = ['node', 'provider.mjs', str(port), json.dumps({'keys': keys})]
    started = subprocess.Popen(
        argv, cwd=packages, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with started:
        assert started.stdout is not None
        ready = started.stdout.readline().split()
        try:
            assert ready[:1] == ['ready']
            yield Provider(ready[1])
        finally:
            started.kill()


def auth(provider: Provider, *required: str) -> AuthSettings:
    return AuthSettings(mode='oidc', issuer=provider.url, audience='urn:town', required_scopes=list(required))


@pytest.mark.parametrize(
    'signer', [Signer.rsa('r'), Signer.ec('e'), Signer.ed('d')], ids=lambda signer: signer.algorithm
)
def test_its_tokens_give_the_scopes_that_were_asked_for(packages: Path, signer: Signer) -> None:
    with providing(packages, signer) as provider:
        verifier = OidcVerifier(auth(provider))
        assert verifier.check() == ''
        found = verifier.known(provider.token('town.read town.write'))
        assert found is not None
        assert found == Principal('oidc:ci', frozenset({'town.read', 'town.write'}))
        near = verifier.known(provider.token('town.readx'))
        assert near is not None
        assert near.scopes == frozenset()
        with pytest.raises(Unauthorized, match=r'not for urn:town \(aud\)'):
            verifier.known(provider.token('admin', 'urn:other'))
        with pytest.raises(Unauthorized, match='it is malformed'):
            verifier.known(provider.token('admin', 'urn:opaque'))
        with pytest.raises(Forbidden, match=r'lacks the scope town\.write'):
            OidcVerifier(auth(provider, 'town.write')).verify(provider.token('town.read'))


def test_its_keys_may_change_and_it_may_be_away(packages: Path) -> None:
    now = 1000.0
    old, new = Signer.rsa('old'), Signer.ec('new')
    with providing(packages, old, port=free_port()) as provider:
        verifier = OidcVerifier(auth(provider), ticks=lambda: now)
        token = provider.token()
        assert verifier.verify(token)
    now += oidc.KEY_AGE_SECS + oidc.RETRY_SECS
    assert verifier.verify(token)
    assert verifier.trouble
    with providing(packages, new, old, port=provider.port) as provider:
        changed = provider.token()
        with pytest.raises(Unavailable):
            verifier.known(changed)
        now += oidc.RETRY_SECS
        assert verifier.known(token) is None
        assert verifier.verify(changed)
        assert verifier.known(token)
        assert verifier.trouble == ''
    with providing(packages, new, port=provider.port) as provider:
        now += oidc.KEY_AGE_SECS
        assert verifier.verify(changed)
        with pytest.raises(Unauthorized, match='does not publish'):
            verifier.known(token)


def test_a_townhall_lets_its_tokens_in_and_nothing_else(packages: Path, place: Place) -> None:
    with providing(packages, Signer.ec('e')) as provider:
        auth = {'mode': 'oidc', 'issuer': provider.url, 'audience': 'urn:town', 'required_scopes': ['town.read']}
        make_town(place.root, townhall__auth=auth)
        hall = place.hall()

        def spawn(scope: str, resource: str = 'urn:town') -> tuple[int, str]:
            reply = hall.post('/v1/agents', {'name': 'a'}, Authorization=f'Bearer {provider.token(scope, resource)}')
            return reply.status, reply.json.get('code', '')

        assert spawn('town.read') == (403, 'insufficient-scope')
        assert spawn('agent.manage') == (403, 'insufficient-scope')
        assert spawn('town.read agent.manage', 'urn:other') == (401, 'invalid-token')
        assert spawn('town.read agent.manage', 'urn:opaque') == (401, 'invalid-token')
        assert spawn('town.read agent.manage') == (201, '')
        assert hall.get('/v1/agents/a', Authorization=f'Bearer {provider.token()}').status == 200
        assert hall.get('/v1/agents/a').status == 401
