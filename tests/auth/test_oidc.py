"""OpenID Connect: which tokens are accepted, keys that change, issuers that are down or wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from tinytown.auth import oidc
from tinytown.auth.oidc import OidcVerifier
from tinytown.errors import Forbidden, TownError, Unauthorized, Unavailable, UsageError
from tinytown.model import ALL_SCOPES, Principal
from tinytown.settings import AuthSettings

from ..support import PATIENCE, environment
from ..tokens import Issuer, Signer, base64url, issuing

RSA, EC, ED = Signer.rsa('one'), Signer.ec('two'), Signer.ed('three')
STRANGER, WEAK = Signer.rsa('one'), Signer.rsa('weak', 1024)


@dataclass
class Clock:
    """A clock that only the test moves: seconds since 1970, and monotonic seconds."""

    passed: float = 0.0
    began: float = field(default_factory=time.time)

    def time(self) -> float:
        return self.began + self.passed

    def ticks(self) -> float:
        return self.passed


@pytest.fixture(scope='module')
def shared() -> Iterator[Issuer]:
    """An issuer that no test changes."""
    with issuing(RSA, EC, ED, WEAK) as issuer:
        yield issuer


@pytest.fixture(scope='module')
def verifier(shared: Issuer) -> OidcVerifier:
    """A verifier with the keys of `shared`, which never become old."""
    made = OidcVerifier(auth(shared), ticks=lambda: 0.0)
    assert made.check() == ''
    return made


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An issuer that a test may change."""
    with issuing(EC) as issuer:
        yield issuer


def auth(issuer: Issuer, **more: Any) -> AuthSettings:
    return AuthSettings(mode='oidc', issuer=issuer.url, audience='town').but(**more)


def refusal(verifier: OidcVerifier, token: str) -> str:
    """The detail with which both `known` and `verify` refuse a bad token."""
    details = set()
    for judge in (verifier.known, verifier.verify):
        with pytest.raises(Unauthorized) as raised:
            judge(token)
        details.add(raised.value.detail)
    [detail] = details
    return detail


# ------------------------------------------------------------------------------------------------------- good tokens


@pytest.mark.parametrize('signer', [RSA, EC, ED], ids=lambda signer: signer.algorithm)
def test_a_good_token_names_its_subject_and_its_scopes(shared: Issuer, verifier: OidcVerifier, signer: Signer) -> None:
    token = signer.token(shared.claims(scope='openid town.read town.write', aud=['other', 'town']))
    assert verifier.verify(token) == Principal('oidc:ann', frozenset({'town.read', 'town.write'}))
    assert verifier.known(token) == verifier.verify(token)


@pytest.mark.parametrize('kind', [None, 'JWT', 'jwt', 'AT+JWT', 'application/at+jwt'])
def test_every_usual_type_of_access_token_is_accepted(shared: Issuer, verifier: OidcVerifier, kind: str | None) -> None:
    assert verifier.known(EC.token(shared.claims(), typ=kind))


@pytest.mark.parametrize(
    ('claims', 'scopes'),
    [
        ({'scope': 'town.read'}, 'town.read'),
        ({'scope': 'admin town.write agent.manage'}, 'admin agent.manage town.write'),
        ({'scope': ['town.read', 'admin']}, 'admin town.read'),
        ({'scope': None, 'scp': ['town.read']}, 'town.read'),
        ({'scope': None, 'scp': 'town.read town.write'}, 'town.read town.write'),
        ({'scope': 'town.read', 'scp': ['town.write']}, 'town.read town.write'),
        ({'scope': None}, ''),
        ({'scope': ''}, ''),
        ({'scope': 'town.readx xtown.read TOWN.READ Town.Read town.read.x town town.* * town_read'}, ''),
        ({'scope': 'town.read,admin'}, ''),
        ({'scope': 'town.read\tadmin\nadmin\xa0admin'}, ''),
        ({'scope': ['town.read admin', ['admin'], {'admin': 1}, None]}, ''),
        ({'scope': {'admin': True}}, ''),
        ({'scope': True, 'scp': 1}, ''),
        ({'scope': None, 'scopes': 'admin', 'roles': ['admin'], 'permissions': ['admin']}, ''),
    ],
)
def test_only_our_scopes_count_and_only_if_spelled_exactly(
    shared: Issuer, verifier: OidcVerifier, claims: dict[str, Any], scopes: str
) -> None:
    found = verifier.verify(EC.token(shared.claims(**claims)))
    assert sorted(found.scopes) == sorted(scopes.split())


@pytest.mark.parametrize(
    ('claim', 'claims', 'scopes'),
    [
        ('roles', {'roles': ['town.read'], 'scope': 'admin', 'scp': ['admin']}, 'town.read'),
        ('realm_access.roles', {'realm_access': {'roles': ['town.write', 'x']}}, 'town.write'),
        ('https://example.com/roles', {'https://example.com/roles': 'admin'}, 'admin'),
        ('a.b', {'a.b': ['town.read'], 'a': {'b': ['admin']}}, 'town.read'),
        ('a.b.c', {'a': {'b': ['admin']}}, ''),
        ('a.b', {'a': ['admin'], 'scope': 'admin'}, ''),
        ('', {'': 'admin', 'scope': 'town.read'}, 'town.read'),
    ],
)
def test_a_configured_claim_is_the_only_source_of_scopes(
    shared: Issuer, claim: str, claims: dict[str, Any], scopes: str
) -> None:
    found = OidcVerifier(auth(shared, scope_claim=claim)).verify(EC.token(shared.claims(**claims)))
    assert sorted(found.scopes) == sorted(scopes.split())


def test_a_token_without_a_required_scope_is_forbidden(shared: Issuer) -> None:
    strict = OidcVerifier(auth(shared, required_scopes=['townhall', 'town.read']))
    assert strict.verify(EC.token(shared.claims(scope='town.read townhall'))).scopes == {'town.read'}
    for scope in ('town.read', 'townhall', 'town.read townhallx', 'town.read TOWNHALL', 'admin'):
        for judge in (strict.verify, strict.known):
            with pytest.raises(Forbidden, match=r'lacks the scope town(hall|\.read)') as raised:
                judge(EC.token(shared.claims(scope=scope)))
            assert raised.value.code == 'insufficient-scope'
            assert raised.value.challenge == 'Bearer error="insufficient_scope", scope="townhall town.read"'


def test_a_token_that_names_no_key_is_accepted_if_only_one_key_fits() -> None:
    with issuing(EC) as alone, issuing(EC, Signer.ec('four')) as pair:
        assert OidcVerifier(auth(alone)).verify(EC.token(alone.claims(), kid=None)).name == 'oidc:ann'
        two = OidcVerifier(auth(pair))
        assert two.check() == ''
        assert 'does not name the key' in refusal(two, EC.token(pair.claims(), kid=None))


# ----------------------------------------------------------------------------------------------------- forged tokens


def pieces(token: str) -> list[str]:
    return token.split('.')


def unsigned(issuer: Issuer, algorithm: str) -> str:
    head = base64url(json.dumps({'alg': algorithm, 'kid': 'one', 'typ': 'JWT'}).encode())
    return f'{head}.{base64url(json.dumps(issuer.claims(scope="admin")).encode())}.'


def signed_with_the_public_key(issuer: Issuer, secret: bytes) -> str:
    """A token that a verifier accepts if it trusts the token's algorithm: an HMAC whose secret is the public key."""
    head = base64url(json.dumps({'alg': 'HS256', 'kid': 'one', 'typ': 'JWT'}).encode())
    body = f'{head}.{base64url(json.dumps(issuer.claims(scope="admin")).encode())}'
    return f'{body}.{base64url(hmac.new(secret, body.encode(), hashlib.sha256).digest())}'


def public_pem(signer: Signer) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return signer.private.public_key().public_bytes(serialization.Encoding.PEM, form)


def tampered(issuer: Issuer) -> str:
    head, _, signature = pieces(EC.token(issuer.claims()))
    return f'{head}.{base64url(json.dumps(issuer.claims(scope="admin")).encode())}.{signature}'


def raw(issuer: Issuer, member: str) -> bytes:
    """Claims with one member written by hand."""
    return json.dumps(issuer.claims(exp=None))[:-1].encode() + f', {member}}}'.encode()


def with_header(text: bytes) -> str:
    body = f'{base64url(text)}.{base64url(b"{}")}'
    return f'{body}.{base64url(EC.sign(body.encode()))}'


FORGED: dict[str, tuple[Callable[[Issuer], str], str]] = {
    'algorithm none': (lambda i: unsigned(i, 'none'), 'algorithm is not one of'),
    'algorithm None': (lambda i: unsigned(i, 'None'), 'algorithm is not one of'),
    'no algorithm': (lambda i: EC.token(i.claims(), alg=None), 'algorithm is not one of'),
    'a list as algorithm': (lambda i: EC.token(i.claims(), alg=['ES256']), 'algorithm is not one of'),
    'HMAC with the public key (PEM)': (
        lambda i: signed_with_the_public_key(i, public_pem(RSA)),
        'algorithm is not one of',
    ),
    'HMAC with the public key (JWK)': (
        lambda i: signed_with_the_public_key(i, json.dumps(RSA.jwk()).encode()),
        'algorithm is not one of',
    ),
    'PS256': (lambda i: RSA.token(i.claims(), alg='PS256'), 'algorithm is not one of'),
    'RS512': (lambda i: RSA.token(i.claims(), alg='RS512'), 'algorithm is not one of'),
    'the algorithm of another key': (lambda i: EC.token(i.claims(), kid='one'), 'does not publish'),
    'RSA signature said to be EC': (lambda i: RSA.token(i.claims(), alg='ES256', kid='two'), 'signature is wrong'),
    'a key of another': (lambda i: STRANGER.token(i.claims()), 'signature is wrong'),
    'an unknown key': (lambda i: Signer(STRANGER.private, 'nine').token(i.claims()), 'does not publish'),
    'a key id with a path': (lambda i: EC.token(i.claims(), kid='../../dev/null'), 'does not publish'),
    'a number as key id': (lambda i: EC.token(i.claims(), kid=2), 'it is malformed'),
    'RSA of 1024 bits, published': (lambda i: WEAK.token(i.claims()), 'does not publish'),
    'jku': (lambda i: STRANGER.token(i.claims(), jku=f'{i.url}/evil'), 'signature is wrong'),
    'x5u': (lambda i: STRANGER.token(i.claims(), x5u=f'{i.url}/evil'), 'signature is wrong'),
    'jwk': (lambda i: STRANGER.token(i.claims(), jwk=STRANGER.jwk()), 'signature is wrong'),
    'jwk and no key id': (lambda i: STRANGER.token(i.claims(), jwk=STRANGER.jwk(), kid=None), 'does not publish'),
    'x5c': (lambda i: STRANGER.token(i.claims(), x5c=['MIIB']), 'signature is wrong'),
    'crit': (lambda i: EC.token(i.claims(), crit=['exp']), 'the token is not valid'),
    'crit b64': (lambda i: EC.token(i.claims(), crit=['b64'], b64=True), 'extensions'),
    'b64': (lambda i: EC.token(i.claims(), b64=False), 'the token is not valid'),
    'a logout token': (lambda i: EC.token(i.claims(), typ='logout+jwt'), 'not an access token'),
    'a list as type': (lambda i: EC.token(i.claims(), typ=['JWT']), 'not an access token'),
    'other claims under the signature': (tampered, 'signature is wrong'),
    'no signature': (lambda i: EC.token(i.claims()).rpartition('.')[0] + '.', 'signature is wrong'),
    'a cut signature': (lambda i: ED.token(i.claims())[:-8], 'the token is not valid'),
    'another issuer': (lambda i: EC.token(i.claims(iss='https://evil.example')), 'issuer (iss)'),
    'its issuer with a slash': (lambda i: EC.token(i.claims(iss=i.url + '/')), 'issuer (iss)'),
    'a list of issuers': (lambda i: EC.token(i.claims(iss=[i.url])), 'issuer (iss)'),
    'no issuer': (lambda i: EC.token(i.claims(iss=None)), 'issuer (iss)'),
    'another audience': (lambda i: EC.token(i.claims(aud='other')), 'not for town (aud)'),
    'more than the audience': (lambda i: EC.token(i.claims(aud='towns')), 'not for town (aud)'),
    'audiences in one text': (lambda i: EC.token(i.claims(aud='town other')), 'not for town (aud)'),
    'a list in the audiences': (lambda i: EC.token(i.claims(aud=[['town']])), 'not for town (aud)'),
    'an object as audience': (lambda i: EC.token(i.claims(aud={'town': 1})), 'not for town (aud)'),
    'no audience': (lambda i: EC.token(i.claims(aud=None)), 'not for town (aud)'),
    'expired': (lambda i: EC.token(i.claims(exp=int(time.time()) - 61)), 'has expired'),
    'no expiry': (lambda i: EC.token(i.claims(exp=None)), 'exp is not a time'),
    'expiry as text': (lambda i: EC.token(i.claims(exp=str(int(time.time()) + 300))), 'exp is not a time'),
    'expiry as true': (lambda i: EC.token(i.claims(exp=True)), 'exp is not a time'),
    'expiry as list': (lambda i: EC.token(i.claims(exp=[9999999999])), 'exp is not a time'),
    'expiry below zero': (lambda i: EC.token(i.claims(exp=-1)), 'exp is not a time'),
    'expiry out of range': (lambda i: EC.token(i.claims(exp=1 << 62)), 'exp is not a time'),
    'expiry 1e400': (lambda i: EC.token(raw(i, '"exp": 1e400')), 'exp is not a time'),
    'expiry Infinity': (lambda i: EC.token(raw(i, '"exp": Infinity')), 'exp is not a time'),
    'expiry NaN': (lambda i: EC.token(raw(i, '"exp": NaN')), 'exp is not a time'),
    'expiry of 5000 digits': (lambda i: EC.token(raw(i, f'"exp": {"9" * 5000}')), 'it is malformed'),
    'not yet valid': (lambda i: EC.token(i.claims(nbf=int(time.time()) + 90)), 'its nbf is in the future'),
    'nbf as text': (lambda i: EC.token(i.claims(nbf='0')), 'nbf is not a time'),
    'nbf null': (lambda i: EC.token(raw(i, '"exp": 9999999999, "nbf": null')), 'nbf is not a time'),
    'issued in the future': (lambda i: EC.token(i.claims(iat=int(time.time()) + 90)), 'its iat is in the future'),
    'no subject': (lambda i: EC.token(i.claims(sub=None)), 'subject (sub)'),
    'an empty subject': (lambda i: EC.token(i.claims(sub='')), 'subject (sub)'),
    'a long subject': (lambda i: EC.token(i.claims(sub='s' * 256)), 'subject (sub)'),
    'a subject with a line break': (lambda i: EC.token(i.claims(sub='ann\nroot')), 'subject (sub)'),
    'a subject of confusable letters': (lambda i: EC.token(i.claims(sub='аnn')), 'subject (sub)'),
    'a number as subject': (lambda i: EC.token(i.claims(sub=0)), 'subject (sub)'),
    'claims that are no object': (lambda _: EC.token(b'[1]'), 'it is malformed'),
    'claims that are no JSON': (lambda _: EC.token(b'{'), 'it is malformed'),
    'claims that are no UTF-8': (lambda _: EC.token(b'{"iss": "\xff"}'), 'it is malformed'),
    'claims nested deep': (lambda _: EC.token(b'{"a": ' + b'[' * 5000), 'it is malformed'),
    'a header that is no object': (lambda _: with_header(b'[]'), 'it is malformed'),
    'a header nested deep': (lambda _: with_header(b'[' * 5000), 'it is malformed'),
    'over 8 KiB': (lambda i: EC.token(i.claims(pad='p' * 8192)), 'at most 8192 bytes'),
    'not ASCII': (lambda i: EC.token(i.claims()) + 'é', 'ASCII'),
    'one part': (lambda _: 'abc', 'it is malformed'),
    'two parts': (lambda i: '.'.join(pieces(EC.token(i.claims()))[:2]), 'it is malformed'),
    'four parts': (lambda i: EC.token(i.claims()) + '.e30', 'it is malformed'),
    'five parts (encrypted)': (lambda _: 'e30.e30.e30.e30.e30', 'it is malformed'),
    'empty parts': (lambda _: '..', 'it is malformed'),
    'nothing': (lambda _: '', 'it is malformed'),
    'spaces in it': (lambda i: EC.token(i.claims()).replace('.', '. '), 'it is malformed'),
    'the alphabet of plain base64': (lambda _: 'a+/b.a+/b.a+/b', 'it is malformed'),
}


@pytest.mark.parametrize('name', FORGED)
def test_a_forged_token_is_refused_and_its_urls_are_not_fetched(
    shared: Issuer, verifier: OidcVerifier, name: str
) -> None:
    forge, says = FORGED[name]
    assert says in refusal(verifier, forge(shared))
    assert not [path for path in shared.calls if 'evil' in path]


def test_a_verified_token_with_one_character_changed_is_refused(shared: Issuer, verifier: OidcVerifier) -> None:
    token = ED.token(shared.claims())
    assert verifier.known(token)
    for place in range(0, len(token), 7):
        other = (
            'g' if token[place] in 'ABCDEFGHIJKLMNOP' else 'A'
        )  # the last character has only two significant bits, the upper ones
        with pytest.raises(Unauthorized):
            verifier.verify(token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize(
    ('claims', 'within', 'beyond'),
    [({'exp': -30}, 29.0, 31.0), ({'nbf': 90, 'exp': 900}, 31.0, 29.0), ({'iat': 90, 'exp': 900}, 31.0, 29.0)],
)
def test_the_clocks_may_differ_by_the_configured_seconds(
    shared: Issuer, claims: dict[str, int], within: float, beyond: float
) -> None:
    now = time.time()
    token = EC.token(shared.claims(**{name: now + value for name, value in claims.items()}))
    for moment, passes in ((within, True), (beyond, False)):
        verifier = OidcVerifier(auth(shared), clock=lambda moment=moment: now + moment)  # type: ignore[misc]
        if passes:
            assert verifier.verify(token)
        else:
            with pytest.raises(Unauthorized):
                verifier.verify(token)


def test_a_cached_token_expires(shared: Issuer) -> None:
    clock = Clock()
    verifier = OidcVerifier(auth(shared), clock.time, clock.ticks)
    token = EC.token(shared.claims(exp=int(clock.time()) + 300))
    assert verifier.verify(token) == verifier.known(token)
    clock.passed = 355
    assert verifier.known(token)
    clock.passed = 365
    assert 'has expired' in refusal(verifier, token)


# ---------------------------------------------------------------------------------------------------- keys and issuers


def test_a_token_is_verified_without_waiting_once_its_key_is_known(issuer: Issuer) -> None:
    verifier = OidcVerifier(auth(issuer))
    token = EC.token(issuer.claims())
    assert verifier.known(token) is None
    assert issuer.calls == []
    assert verifier.verify(token) == verifier.known(token)
    assert verifier.known(EC.token(issuer.claims(sub='bob'))) == Principal('oidc:bob', frozenset({'town.read'}))
    assert issuer.calls == ['/.well-known/openid-configuration', '/keys']


def test_a_new_key_is_fetched_when_a_token_names_it_and_a_withdrawn_one_stops_working(issuer: Issuer) -> None:
    clock, new = Clock(), Signer.rsa('new')
    verifier = OidcVerifier(auth(issuer), clock.time, clock.ticks)
    old_token, new_token = EC.token(issuer.claims()), new.token(issuer.claims())
    assert verifier.verify(old_token)
    issuer.keys = [new.jwk()]
    clock.passed += oidc.RETRY_SECS
    assert verifier.known(old_token)
    assert verifier.known(new_token) is None
    assert verifier.verify(new_token)
    assert 'does not publish' in refusal(verifier, old_token)
    assert len(issuer.calls) == 4


def test_a_withdrawn_key_stops_working_when_the_keys_are_old(issuer: Issuer) -> None:
    clock, new = Clock(), Signer.ec('new')
    verifier = OidcVerifier(auth(issuer), clock.time, clock.ticks)
    token = EC.token(issuer.claims(exp=int(time.time()) + 9000))
    assert verifier.verify(token)
    issuer.keys = [new.jwk()]
    clock.passed = oidc.KEY_AGE_SECS - 1
    assert verifier.known(token)
    clock.passed = oidc.KEY_AGE_SECS + 1
    assert verifier.known(token) is None
    for judge in (verifier.verify, verifier.known):
        with pytest.raises(Unauthorized, match='does not publish'):
            judge(token)


def test_the_only_key_may_be_replaced_even_without_a_key_id(issuer: Issuer) -> None:
    clock, new = Clock(), Signer.ec('')
    issuer.keys = [EC.jwk(kid='')]
    verifier = OidcVerifier(auth(issuer), clock.time, clock.ticks)
    assert verifier.verify(EC.token(issuer.claims(), kid=None))
    issuer.keys = [new.jwk()]
    clock.passed = oidc.RETRY_SECS
    assert verifier.verify(new.token(issuer.claims(), kid=None))


def test_a_flood_of_unknown_keys_asks_the_issuer_once_in_retry_secs(issuer: Issuer) -> None:
    clock = Clock()
    verifier = OidcVerifier(auth(issuer, jwks_url=f'{issuer.url}/keys'), clock.time, clock.ticks)
    good = EC.token(issuer.claims())
    assert verifier.verify(good)
    for interval in range(3):
        clock.passed += oidc.RETRY_SECS
        bogus = [Signer(STRANGER.private, f'{interval}-{i}').token(issuer.claims()) for i in range(10)]

        def flood(tokens: list[str] = bogus) -> None:
            for token in tokens:
                with pytest.raises(Unauthorized):
                    verifier.verify(token)

        threads = [threading.Thread(target=flood) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verifier.known(good)
    assert issuer.calls == ['/keys'] * 4


def test_while_the_issuer_hangs_few_threads_wait_and_cached_tokens_are_accepted(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, 'FETCH_SECS', PATIENCE)
    verifier = OidcVerifier(auth(issuer))
    good, bogus = EC.token(issuer.claims()), Signer(STRANGER.private, 'nine').token(issuer.claims())
    assert verifier.verify(good)
    verifier = OidcVerifier(auth(issuer))
    issuer.calls.clear()
    issuer.gate.clear()
    waiting = [threading.Thread(target=pytest.raises, args=(Unauthorized, verifier.verify, bogus)) for _ in range(8)]
    for thread in waiting:
        thread.start()
    refused: Unavailable | None = None
    deadline = time.monotonic() + PATIENCE
    while refused is None and time.monotonic() < deadline:
        try:
            assert verifier.known(bogus) is None
        except Unavailable as e:
            refused = e
    assert refused is not None
    assert (refused.code, refused.retry_after) == ('issuer-unreachable', 1)
    issuer.gate.set()
    for thread in waiting:
        thread.join()
    assert verifier.known(good)
    assert len(issuer.calls) == 2


def test_while_the_issuer_is_down_known_keys_work_and_unknown_ones_are_503(issuer: Issuer) -> None:
    clock, new = Clock(), Signer.ec('new')
    verifier = OidcVerifier(auth(issuer), clock.time, clock.ticks)
    token, other = EC.token(issuer.claims(exp=int(time.time()) + 9000)), new.token(issuer.claims())
    assert verifier.verify(token)
    issuer.status = 500
    clock.passed = oidc.KEY_AGE_SECS + 1
    assert verifier.known(token) is None
    assert verifier.verify(token)
    assert verifier.known(EC.token(issuer.claims(sub='bob', exp=int(time.time()) + 9000)))
    assert verifier.trouble == f'{issuer.url}/.well-known/openid-configuration answered 500'
    for judge in (verifier.known, verifier.verify):
        with pytest.raises(Unavailable) as raised:
            judge(other)
        assert raised.value.retry_after == oidc.RETRY_SECS
        assert issuer.url not in raised.value.detail
    issuer.status, issuer.keys = 200, [EC.jwk(), new.jwk()]
    clock.passed += oidc.RETRY_SECS
    assert verifier.verify(new.token(issuer.claims(exp=int(time.time()) + 9000)))
    assert verifier.trouble == ''


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'status': 302, 'headers': {'Location': '/keys'}}, 'answered 302'),
        ({'status': 404}, 'answered 404'),
        ({'body': b'<html>'}, 'not JSON of at most 262144 bytes'),
        ({'body': b'[' * 100_000}, 'not JSON of at most'),
        ({'body': b'[]'}, 'not a JSON object'),
        ({'body': b'{"keys": "' + b'k' * 300_000 + b'"}'}, 'not JSON of at most'),
        ({'keys': []}, '/keys has no key for RS256, ES256, EdDSA'),
        ({'keys': [WEAK.jwk()]}, 'has no key'),
        ({'keys': [EC.jwk(use='enc')]}, 'has no key'),
        ({'keys': [EC.jwk(key_ops=['sign'])]}, 'has no key'),
        ({'keys': [RSA.jwk(alg='RSA-OAEP')]}, 'has no key'),
        ({'keys': [{'kty': 'oct', 'k': 'c2VjcmV0', 'alg': 'HS256', 'kid': 'one'}]}, 'has no key'),
        ({'keys': [EC.jwk(x='AA'), EC.jwk(crv='P-384'), EC.jwk(y=None), RSA.jwk(e='AQ'), None, 'x', {}]}, 'has no key'),
        ({'discovery': {'jwks_uri': 'http://example.com/keys'}}, 'give an https:// address'),
        ({'discovery': {'jwks_uri': 'file:///etc/passwd'}}, 'give an https:// address'),
        ({'discovery': {'jwks_uri': None}}, 'names no https:// address of keys'),
    ],
)
def test_an_issuer_that_gives_no_keys_is_a_warning_and_tokens_are_503(
    issuer: Issuer, change: dict[str, Any], says: str
) -> None:
    vars(issuer).update(change)
    verifier = OidcVerifier(auth(issuer))
    assert says in verifier.check()
    for judge in (verifier.known, verifier.verify):
        with pytest.raises(Unavailable):
            judge(EC.token(issuer.claims()))


def test_a_damaged_key_does_not_make_the_others_unusable(issuer: Issuer) -> None:
    issuer.keys = [{'kty': 'EC'}, EC.jwk(x='AA'), EC.jwk(), RSA.jwk(use='sig', key_ops=['verify'], alg='RS256')]
    verifier = OidcVerifier(auth(issuer))
    assert verifier.verify(EC.token(issuer.claims()))
    assert verifier.verify(RSA.token(issuer.claims()))


def test_an_issuer_that_answers_too_slowly_or_not_at_all_is_cut_off_at_the_deadline(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, 'FETCH_SECS', 0.4)
    issuer.drips = True
    for _ in ('drips', 'hangs'):
        began = time.monotonic()
        assert 'no complete answer in 0.4 s' in OidcVerifier(auth(issuer)).check()
        assert time.monotonic() - began < 3
        issuer.gate.clear()


def test_an_unreachable_issuer_is_a_warning() -> None:
    with issuing(EC) as gone:
        pass
    assert 'answered 503' in OidcVerifier(auth(gone)).check()


def test_an_issuer_with_another_name_stops_the_start(issuer: Issuer) -> None:
    issuer.discovery = {'issuer': issuer.url + '/'}
    with pytest.raises(UsageError, match='the two must be exactly the same'):
        OidcVerifier(auth(issuer)).check()


def test_discovery_of_an_issuer_with_a_path_and_a_slash_follows_the_standard(issuer: Issuer) -> None:
    issuer.discovery = {'issuer': issuer.url + '/realms/a/'}
    assert OidcVerifier(auth(issuer).but(issuer=issuer.url + '/realms/a/')).check() == ''
    assert issuer.calls[0] == '/realms/a/.well-known/openid-configuration'


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'issuer': ''}, 'townhall.auth.issuer is missing, but townhall.auth.mode is "oidc"; give the URL'),
        ({'audience': ''}, 'townhall.auth.audience is missing'),
        ({'issuer': 'http://id.example.com'}, "townhall.auth.issuer = 'http://id.example.com': give an https://"),
        ({'issuer': 'http://127.0.0.1.example.com'}, 'give an https://'),
        ({'issuer': 'http://localhost.example.com'}, 'give an https://'),
        ({'issuer': 'id.example.com'}, 'give an https://'),
        ({'issuer': 'https://'}, 'give an https://'),
        ({'issuer': 'https://u:p@id.example.com'}, 'give an https://'),
        ({'issuer': 'https://id.example.com#a'}, 'give an https://'),
        ({'issuer': 'https://id.example.com:x'}, 'give an https://'),
        ({'issuer': 'https://[::1'}, 'give an https://'),
        ({'issuer': 'https://id.example.com/?a=b'}, 'an issuer has no query'),
        ({'jwks_url': 'http://id.example.com/keys'}, "townhall.auth.jwks_url = 'http://id.example.com/keys': give"),
        ({'jwks_url': 'ftp://127.0.0.1/keys'}, 'give an https://'),
        ({'required_scopes': ['a b']}, "townhall.auth.required_scopes: 'a b' is not a scope; give words"),
        ({'required_scopes': ['a', 'b"']}, "'b\"' is not a scope"),
    ],
)
def test_unusable_settings_are_refused(given: dict[str, Any], says: str) -> None:
    settings = AuthSettings(mode='oidc', issuer='https://id.example.com', audience='town')
    with pytest.raises(UsageError) as raised:
        OidcVerifier(settings.but(**given))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    'issuer', ['https://id.example.com', 'http://localhost:1/a', 'http://[::1]:1', 'http://127.9.9.9']
)
def test_plain_http_is_accepted_on_this_machine_only(issuer: str) -> None:
    assert OidcVerifier(AuthSettings(mode='oidc', issuer=issuer, audience='town')).trouble


def test_without_the_extra_the_error_says_what_to_install() -> None:
    script = (
        'import sys; sys.modules["jwt"] = None\n'
        'from tinytown.settings import AuthSettings; from tinytown.auth.oidc import OidcVerifier\n'
        'OidcVerifier(AuthSettings(mode="oidc", issuer="https://a.example", audience="b"))'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (
        "UsageError: townhall.auth.mode = 'oidc' needs two more packages; run  pip install 'tinytown[oidc]'"
        in done.stderr
    )


def test_the_packages_of_the_extra_are_not_loaded_without_need() -> None:
    script = 'import sys, tinytown.townhall, tinytown.rest.app, tinytown.auth.oidc; sys.exit("jwt" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', script], env=environment(), timeout=60, check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------- resources


def test_the_cache_of_tokens_is_bounded(shared: Issuer) -> None:
    verifier = OidcVerifier(auth(shared))
    first = ED.token(shared.claims(sub='first'))
    assert verifier.verify(first)
    for i in range(oidc.MAX_CACHED + 10):
        verifier.known(ED.token(shared.claims(sub=f's{i}')))
    assert len(verifier._cache) == oidc.MAX_CACHED
    assert verifier.known(first)


def test_no_error_repeats_a_part_of_the_token(shared: Issuer, verifier: OidcVerifier) -> None:
    for forge, _ in FORGED.values():
        token = forge(shared)
        for judge in (verifier.known, verifier.verify):
            try:
                judge(token)
            except TownError as e:
                said = json.dumps(e.problem())
                assert not [part for part in pieces(token) if len(part) > 8 and part in said]
                assert base64.urlsafe_b64encode(b'ann').decode() not in said


def test_all_scopes_can_be_granted_by_an_issuer(shared: Issuer, verifier: OidcVerifier) -> None:
    assert verifier.verify(EC.token(shared.claims(scope=' '.join(ALL_SCOPES)))).scopes == ALL_SCOPES
