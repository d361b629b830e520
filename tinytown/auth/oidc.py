"""OpenID Connect: verifies the tokens of an issuer with its published keys and turns them into principals.

`access` calls `OidcVerifier.known` on the event loop. It only computes: it returns the principal, refuses the token, or
returns None if the issuer must be asked for keys. In that case `OidcVerifier.verify` asks, on a thread that may wait.

Keys are fetched when they are old and when a token names an unknown one, but at most once in RETRY_SECS. While the
issuer is down, the known keys stay valid. The checks follow RFC 8725 (JWT best current practices) and RFC 9068 (JWT
access tokens).
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from .. import __version__
from ..errors import Forbidden, Unauthorized, Unavailable, UsageError
from ..model import ALL_SCOPES, Principal
from ..settings import AuthSettings

MAX_TOKEN: Final = 8192  # bytes
MAX_CACHED: Final = 1024  # verified tokens
MAX_WAITING_THREADS: Final = 8  # threads that wait for one answer of the issuer
RETRY_SECS: Final = 5.0  # least time between two requests to the issuer
KEY_AGE_SECS: Final = 600.0  # age at which keys are fetched again, so that a withdrawn key stops working
FETCH_SECS: Final = 5.0  # deadline for fetching the keys, discovery included
MAX_DOCUMENT: Final = 262_144  # bytes of an answer of the issuer
_MAX_KEYS: Final = 100
_MAX_SUBJECT: Final = 255  # characters (OpenID Connect Core 1.0, 2)
_LATEST: Final = 253_402_300_800  # seconds since 1970: the year 10000
_RSA_BITS: Final = range(2048, 8193)  # a shorter key is weak, a longer one slow

_ALGORITHMS: Final = {'RSA': 'RS256', 'EC P-256': 'ES256', 'OKP Ed25519': 'EdDSA'}  # by key type and curve
_SCOPE: Final = r'[\x21\x23-\x5b\x5d-\x7e]+'  # RFC 6749, 3.3
_PUBLIC: Final = ('kty', 'n', 'e', 'crv', 'x', 'y')  # the members of a public key (RFC 7518, 6; RFC 8037)
_TYPES: Final = ('jwt', 'at+jwt', 'application/at+jwt')  # of access tokens, as opposed to logout or event tokens


class Unreachable(Exception):
    """The issuer gave no keys. The text says why."""


class _UnknownKeyError(Exception):
    """A token is signed with a key that we do not know, or not yet."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key of the issuer. `document` is its JSON as published, `material` PyJWT's key object."""

    id: str
    algorithm: str
    document: str
    material: Any


# ---------------------------------------------------------------------------------------------------------- verifier


class OidcVerifier:
    """Turns tokens into principals. Any thread may call it.

    `clock` returns seconds since 1970, `ticks` monotonic seconds. `trouble` says why the last request for keys failed;
    '' if it succeeded. Raises UsageError if the settings are unusable or the `oidc` extra is not installed.
    """

    def __init__(
        self,
        settings: AuthSettings,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        check_settings(settings)
        self._settings = settings
        self._clock = clock
        self._ticks = ticks
        self._jws = _jws()
        self._keys: tuple[Key, ...] = ()
        self._fetched = self._asked = float('-inf')
        self._asks = 0
        self.trouble = 'it was not asked yet'
        self._flight = threading.Lock()  # held while the issuer is asked
        self._lock = threading.Lock()  # guards _waiting, _cache and _keys
        self._waiting = 0  # threads in `_ask`
        self._cache: dict[bytes, tuple[Principal, float]] = {}  # by token digest: the principal and the token's expiry

    def check(self) -> str:
        """Fetches the keys at start-up. Returns a warning if the issuer can't be reached, else ''.

        Raises UsageError if the server at `townhall.auth.issuer` says that it is another issuer.
        """
        try:
            self._take(fetch_keys(self._settings))
        except Unreachable as e:
            self._note(str(e))
            return f'the issuer cannot be reached ({e}); until it can, requests with its tokens are answered 503'
        return ''

    def known(self, token: str) -> Principal | None:
        """The principal of a token, without waiting. None if only `verify` can decide, on a thread that may wait.

        Raises the errors of `verify`.
        """
        if self._is_old() and not self._flight.locked():
            return None
        try:
            return self._principal(token)
        except _UnknownKeyError:
            if not self._flight.locked() and not self._may_ask():
                raise self._unknown() from None
            if self._waiting >= MAX_WAITING_THREADS:
                raise Unavailable(
                    'the issuer is being asked for its keys', code='issuer-unreachable', retry_after=1
                ) from None
            return None

    def verify(self, token: str) -> Principal:
        """The principal of a token. May wait FETCH_SECS for the issuer.

        Raises Unauthorized if the token is not valid, Forbidden if it lacks a required scope, and Unavailable if its
        key is unknown and the issuer can't be reached.
        """
        if self._is_old():
            self._ask(wait=False)
        try:
            return self._principal(token)
        except _UnknownKeyError:
            self._ask(wait=True)
        try:
            return self._principal(token)
        except _UnknownKeyError:
            raise self._unknown() from None

    def _unknown(self) -> Unauthorized | Unavailable:
        if not self.trouble:
            return _invalid('it is signed with a key that its issuer does not publish')
        retry_after = max(1, round(self._asked + RETRY_SECS - self._ticks()))
        return Unavailable(
            'the key of the token is unknown here, and its issuer cannot be reached now',
            code='issuer-unreachable',
            retry_after=retry_after,
        )

    # ----------------------------------------------------------------------------------------------------- keys

    def _may_ask(self) -> bool:
        return self._ticks() - self._asked >= RETRY_SECS

    def _is_old(self) -> bool:
        return bool(self._keys) and self._ticks() - self._fetched >= KEY_AGE_SECS and self._may_ask()

    def _ask(self, wait: bool) -> None:
        """Fetches the keys, unless another thread has done so meanwhile or the last request is too recent.

        If another thread is fetching, waits for it if `wait` is set, else returns at once.
        """
        asks = self._asks
        with self._lock:
            self._waiting += 1
        try:
            if self._flight.acquire(blocking=wait):
                try:
                    if asks == self._asks and self._may_ask():
                        self._fetch()
                finally:
                    self._flight.release()
        finally:
            with self._lock:
                self._waiting -= 1

    def _fetch(self) -> None:
        try:
            self._take(fetch_keys(self._settings))
        except (Unreachable, UsageError) as e:
            self._note(str(e))

    def _note(self, trouble: str) -> None:
        self.trouble = trouble
        self._asked = self._ticks()
        self._asks += 1

    def _take(self, keys: tuple[Key, ...]) -> None:
        """Replaces the keys. If they have changed, forgets verified tokens: the key of one may be withdrawn."""
        with self._lock:
            if [key.document for key in keys] != [key.document for key in self._keys]:
                self._cache = {}
            self._keys = keys
        self._note('')
        self._fetched = self._asked

    def _find(self, kid: str | None, algorithm: str, keys: tuple[Key, ...]) -> Key:
        fitting = [key for key in keys if key.algorithm == algorithm and kid in (None, key.id)]
        if not fitting:
            raise _UnknownKeyError
        if kid is None and len(fitting) > 1:
            raise _invalid('it does not name the key (kid) that signed it')
        return fitting[0]

    # ---------------------------------------------------------------------------------------------------- tokens

    def _principal(self, token: str) -> Principal:
        """The principal of a token, verified with the keys we have. Raises _UnknownKeyError if they are not enough."""
        if len(token) > MAX_TOKEN or not token.isascii():
            raise _invalid(f'it is not ASCII of at most {MAX_TOKEN} bytes')
        digest = hashlib.sha256(token.encode()).digest()
        with self._lock:
            cache, keys = self._cache, self._keys
            known = cache.get(digest)
        if known and self._clock() < known[1]:
            return known[0]
        claims = self._verified_claims(token, keys)
        by, expires = self._read(claims)
        with self._lock:
            if len(cache) >= MAX_CACHED:
                del cache[next(iter(cache))]
            cache[digest] = by, expires  # if the keys have changed since, this cache is no longer in use
        return by

    def _verified_claims(self, token: str, keys: tuple[Key, ...]) -> dict[str, Any]:
        """The claims of a token, once its header and signature are verified."""
        import jwt

        try:
            header = self._jws.get_unverified_header(token)
            kid, algorithm = _check_header(header)
            key = self._find(kid, algorithm, keys)
            claims = json.loads(self._jws.decode(token, key.material, algorithms=[algorithm]))
        except jwt.InvalidSignatureError:
            if kid is None:
                raise _UnknownKeyError from None  # the issuer may have replaced its only key
            raise _invalid('its signature is wrong') from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise _invalid('it is malformed') from None
        if not isinstance(claims, dict):
            raise _invalid('it is malformed')
        return claims

    def _read(self, claims: Mapping[str, Any]) -> tuple[Principal, float]:
        """The principal of verified claims, and when the token expires, clock skew included (seconds since 1970)."""
        settings = self._settings
        if claims.get('iss') != settings.issuer:
            raise _invalid(f'its issuer (iss) is not {settings.issuer}')
        audience = claims.get('aud')
        if settings.audience not in (audience if isinstance(audience, list) else [audience]):
            raise _invalid(f'it is not for {settings.audience} (aud)')
        expires = self._check_times(claims)
        subject = claims.get('sub')
        if not isinstance(subject, str) or not _is_plain(subject):
            raise _invalid(f'its subject (sub) is not ASCII text of 1 to {_MAX_SUBJECT} characters')
        granted = _granted(claims, settings.scope_claim)
        missing = [scope for scope in settings.required_scopes if scope not in granted]
        if missing:
            wanted = f'Bearer error="insufficient_scope", scope="{" ".join(settings.required_scopes)}"'
            raise Forbidden(f'the token lacks the scope {missing[0]}', code='insufficient-scope', challenge=wanted)
        return Principal(f'oidc:{subject}', frozenset(scope for scope in ALL_SCOPES if scope in granted)), expires

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        now, skew = self._clock(), self._settings.clock_skew_seconds
        expires = _time_claim(claims, 'exp') + skew
        if now >= expires:
            raise _invalid('it has expired (exp)')
        for name in ('nbf', 'iat'):
            if name in claims and _time_claim(claims, name) > now + skew:
                raise _invalid(f'its {name} is in the future')
        return expires


def _invalid(why: str) -> Unauthorized:
    return Unauthorized(f'the token is not valid: {why}', code='invalid-token')


def _check_header(header: Mapping[str, Any]) -> tuple[str | None, str]:
    """(key id, algorithm) of a token's header. Keys that the header itself offers (jku, x5u, jwk, x5c) are ignored."""
    algorithm, kid, kind = header.get('alg'), header.get('kid'), header.get('typ', 'JWT')
    if algorithm not in _ALGORITHMS.values():
        raise _invalid(f'its algorithm is not one of {", ".join(_ALGORITHMS.values())}')
    if 'crit' in header or 'b64' in header:
        raise _invalid('it requires extensions (crit, b64)')
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _invalid('it is not an access token (typ)')
    return kid, str(algorithm)


def _time_claim(claims: Mapping[str, Any], name: str) -> float:
    """A claim that is a time, in seconds since 1970 (NumericDate; RFC 7519, 2)."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LATEST:
        raise _invalid(f'its {name} is not a time')
    return float(value)


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= _MAX_SUBJECT and text.isascii() and text.isprintable()


def _granted(claims: Mapping[str, Any], claim: str) -> set[str]:
    """Every scope in a token. A claim may be a list or a text with spaces between the scopes (RFC 8693, 4.2)."""
    scopes: set[str] = set()
    for value in [_look_up(claims, claim)] if claim else [claims.get('scope'), claims.get('scp')]:
        if isinstance(value, str):
            scopes.update(value.split(' '))
        elif isinstance(value, list):
            scopes.update(scope for scope in value if isinstance(scope, str))
    return scopes


def _look_up(claims: Mapping[str, Any], claim: str) -> Any:
    """A claim by its name, which may contain dots, else by a dotted path of nested names."""
    if claim in claims:
        return claims[claim]
    value: Any = claims
    for part in claim.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------------------------- settings


def check_settings(settings: AuthSettings) -> None:
    """Raises UsageError if no token could be verified with these settings."""
    for name, value, mend in (
        ('issuer', settings.issuer, 'give the URL in the claim `iss` of its tokens'),
        ('audience', settings.audience, 'give the claim `aud` of tokens for this town'),
    ):
        if not value:
            raise UsageError(f'townhall.auth.{name} is missing, but townhall.auth.mode is "oidc"; {mend}')
    check_url('townhall.auth.issuer', settings.issuer)
    if '?' in settings.issuer:
        raise UsageError(f'townhall.auth.issuer = {settings.issuer!r}: an issuer has no query; remove it')
    if settings.jwks_url:
        check_url('townhall.auth.jwks_url', settings.jwks_url)
    for scope in settings.required_scopes:
        if not re.fullmatch(_SCOPE, scope):
            raise UsageError(
                f'townhall.auth.required_scopes: {scope!r} is not a scope; give words without spaces or quotes'
            )


def check_url(name: str, url: str) -> None:
    """Raises UsageError unless a URL is https, or http on this machine. `name` is the setting for the message."""
    try:
        parts = urlsplit(url)
        secure = parts.scheme == 'https' or (parts.scheme == 'http' and _is_loopback(parts.hostname or ''))
        good = secure and parts.hostname and parts.port != 0 and not ('@' in parts.netloc or '#' in url)
    except ValueError:
        good = False
    if not good or not url.isascii() or ' ' in url:
        raise UsageError(f'{name} = {url!r}: give an https:// address (http:// only on this machine)')


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def _jws() -> Any:
    """PyJWT's decoder of signed tokens. Raises UsageError if the `oidc` extra is not installed."""
    try:
        import cryptography.exceptions  # noqa: F401
        import jwt
    except ImportError:
        raise UsageError(
            "townhall.auth.mode = 'oidc' needs two more packages; run  pip install 'tinytown[oidc]'"
        ) from None
    return jwt.PyJWS(algorithms=list(_ALGORITHMS.values()))


# ---------------------------------------------------------------------------------------------------------- fetching


def fetch_keys(settings: AuthSettings) -> tuple[Key, ...]:
    """The usable keys that the issuer publishes. Raises Unreachable; UsageError if it says it is another issuer."""
    deadline = time.monotonic() + FETCH_SECS
    url = settings.jwks_url or _discover(settings.issuer, deadline)
    documents = _get(url, deadline).get('keys')
    usable = [_key(document) for document in documents[:_MAX_KEYS]] if isinstance(documents, list) else []
    keys = tuple(key for key in usable if key)
    if not keys:
        raise Unreachable(f'{url} has no key for {", ".join(_ALGORITHMS.values())}')
    return keys


def _discover(issuer: str, deadline: float) -> str:
    """The URL of the issuer's keys (OpenID Connect Discovery 1.0, 4)."""
    url = issuer.removesuffix('/') + '/.well-known/openid-configuration'
    document = _get(url, deadline)
    if document.get('issuer') != issuer:
        raise UsageError(
            f'townhall.auth.issuer = {issuer!r}: {url} names the issuer {document.get("issuer")!r}; '
            'the two must be exactly the same'
        )
    keys_url = document.get('jwks_uri')
    if not isinstance(keys_url, str) or (issuer.startswith('https:') and not keys_url.startswith('https:')):
        raise Unreachable(f'{url} names no https:// address of keys')
    try:
        check_url('jwks_uri', keys_url)
    except UsageError as e:
        raise Unreachable(f'{url}: {e}') from None
    return keys_url


def _key(document: Any) -> Key | None:
    """A key (JWK; RFC 7517) of the issuer. None if it is damaged or weak, or not for verifying with our algorithms."""
    import jwt

    try:
        kind = f'{document["kty"]} {document.get("crv", "")}'.strip()
        algorithm = _ALGORITHMS[kind]
        verifies = document.get('use', 'sig') == 'sig' and 'verify' in document.get('key_ops', ['verify'])
        if not verifies or document.get('alg', algorithm) != algorithm:
            return None
        public = {name: document[name] for name in _PUBLIC if name in document}
        material = jwt.PyJWK(public, algorithm)
        bad_size = algorithm == 'RS256' and material.key.key_size not in _RSA_BITS
        return None if bad_size else Key(str(document.get('kid', '')), algorithm, json.dumps(document), material)
    except Exception:  # a damaged document may raise anything; the other keys are still usable
        return None


def _get(url: str, deadline: float) -> dict[str, Any]:
    """A JSON object from the issuer. Redirects are not followed. Raises Unreachable."""
    try:
        status, body = _exchange(url, deadline)
        if status != 200:
            raise Unreachable(f'{url} answered {status}')
        document = json.loads(body)
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as e:
        if time.monotonic() >= deadline:
            raise Unreachable(f'{url}: no complete answer in {FETCH_SECS:g} s') from None
        if isinstance(e, (ValueError, RecursionError)) and not isinstance(e, OSError):
            raise Unreachable(f'{url}: the answer is not JSON of at most {MAX_DOCUMENT} bytes') from None
        raise Unreachable(f'{url}: {e or type(e).__name__}') from None
    if not isinstance(document, dict):
        raise Unreachable(f'{url}: the answer is not a JSON object')
    return document


def _exchange(url: str, deadline: float) -> tuple[int, bytes]:
    """(status, body) of a GET. A timer cuts the connection at the deadline, even if the server sends byte by byte."""
    parts = urlsplit(url)
    host, is_tls = parts.hostname or '', parts.scheme == 'https'
    left = max(deadline - time.monotonic(), 0.001)
    with socket.create_connection((host, parts.port or (443 if is_tls else 80)), left) as raw:
        sock = raw
        if is_tls:
            sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        timer = threading.Timer(deadline - time.monotonic(), _cut_off, (sock,))
        timer.daemon = True
        timer.start()
        try:
            return _request(sock, parts.netloc, (parts.path or '/') + (f'?{parts.query}' if parts.query else ''))
        finally:
            timer.cancel()
            sock.close()


def _cut_off(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # bypasses TLS, which the other thread is using
    except OSError:
        pass  # the connection has ended by itself


def _request(sock: socket.socket, host: str, path: str) -> tuple[int, bytes]:
    if isinstance(sock, ssl.SSLSocket):
        sock.do_handshake()
    connection = http.client.HTTPConnection(host)
    connection.sock = sock
    connection.request(
        'GET', path, headers={'Host': host, 'Accept': 'application/json', 'User-Agent': f'tinytown/{__version__}'}
    )
    response = connection.getresponse()
    body = response.read(MAX_DOCUMENT + 1)
    return response.status, body if len(body) <= MAX_DOCUMENT else b''
