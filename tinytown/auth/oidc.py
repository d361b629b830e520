"""OpenID Connect: tokens of an issuer, verified with the keys that it publishes, and turned into principals.

The loop calls `Verifier.known`, which only computes: it knows the token or its key, or refuses it, or gives None when
the issuer must be asked. Then `Verifier.verify` asks, on a thread that may wait. Keys are fetched when they grow old
and when a token names one that is not known, and never more than once in RETRY_SECS. While the issuer is away the keys
that are known go on. What is checked follows RFC 8725 (best current practice) and RFC 9068 (JWT access tokens).
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

MOST_TOKEN: Final = 8192  # bytes
MOST_CACHED: Final = 1024  # verified tokens
MAX_WAITING_THREADS: Final = 8  # threads that wait for one answer of the issuer
RETRY_SECS: Final = 5.0  # between two times that the issuer is asked
KEY_AGE_SECS: Final = 600.0  # after which keys are asked for again: one that was withdrawn ends then
FETCH_SECS: Final = 5.0  # for the whole of asking
MOST_DOCUMENT: Final = 262_144  # bytes of what an issuer answers
_MOST_KEYS: Final = 100
_MOST_SUBJECT: Final = 255  # OpenID Connect Core 1.0, 2
_LATEST: Final = 253_402_300_800  # seconds: the year 10000; a later date is no date
_RSA_BITS: Final = range(2048, 8193)  # a shorter key is weak, a longer one slow

_ALGORITHMS: Final = {'RSA': 'RS256', 'EC P-256': 'ES256', 'OKP Ed25519': 'EdDSA'}  # by key type and curve
_SCOPE: Final = r'[\x21\x23-\x5b\x5d-\x7e]+'  # RFC 6749, 3.3
_PUBLIC: Final = ('kty', 'n', 'e', 'crv', 'x', 'y')  # what a public key consists of (RFC 7518, 6; RFC 8037)
_TYPES: Final = ('jwt', 'at+jwt', 'application/at+jwt')  # no logout or event token is one for access


class Unreachable(Exception):
    """The issuer gave no keys; the text says why."""


class _UnknownKeyError(Exception):
    """A token is signed with a key that is not known (yet)."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key of the issuer. `material` is PyJWT's."""

    id: str
    algorithm: str
    document: str
    material: Any


# ---------------------------------------------------------------------------------------------------------- verifier


class OidcVerifier:
    """Turns tokens into principals. Any thread may call; `clock` tells seconds since 1970, `ticks` those that pass.

    `trouble` is why the issuer gave no keys when it was last asked; '' if it did.
    Raises UsageError for settings that can't be used, and without the `oidc` extra.
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
        self._lock = threading.Lock()  # over what follows
        self._waiting = 0
        self._cache: dict[bytes, tuple[Principal, float]] = {}  # by digest: the principal, and when its token ends

    def check(self) -> str:
        """Asks the issuer for its keys at the start. A warning if that fails; UsageError if it is another issuer."""
        try:
            self._take(fetch_keys(self._settings))
        except Unreachable as e:
            self._note(str(e))
            return f'the issuer can not be asked ({e}); until it can, tokens are answered 503'
        return ''

    def known(self, token: str) -> Principal | None:
        """The principal of a token, without waiting; None if `verify` must be called, on a thread that may wait.

        Raises what `verify` raises.
        """
        if self._is_old() and not self._flight.locked():
            return None
        try:
            return self._judge(token)
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

        Raises Unauthorized for a token that is not valid, Forbidden for one that lacks a required scope, Unavailable
        for one whose key is not known while the issuer can't be reached.
        """
        if self._is_old():
            self._ask(wait=False)
        try:
            return self._judge(token)
        except _UnknownKeyError:
            self._ask(wait=True)
        try:
            return self._judge(token)
        except _UnknownKeyError:
            raise self._unknown() from None

    def _unknown(self) -> Unauthorized | Unavailable:
        if not self.trouble:
            return _invalid('it is signed with a key that its issuer does not publish')
        retry = max(1, round(self._asked + RETRY_SECS - self._ticks()))
        return Unavailable(
            'the key of the token is not known, and its issuer can not be asked now',
            code='issuer-unreachable',
            retry_after=retry,
        )

    # ----------------------------------------------------------------------------------------------------- keys

    def _may_ask(self) -> bool:
        return self._ticks() - self._asked >= RETRY_SECS

    def _is_old(self) -> bool:
        return bool(self._keys) and self._ticks() - self._fetched >= KEY_AGE_SECS and self._may_ask()

    def _ask(self, wait: bool) -> None:
        """Asks the issuer for its keys, unless another thread has meanwhile, or it was asked a moment ago."""
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
        """Goes on with these keys. What was verified with one that is gone is not known any more."""
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
            raise _invalid('it does not say which key (kid) signed it')
        return fitting[0]

    # ---------------------------------------------------------------------------------------------------- tokens

    def _judge(self, token: str) -> Principal:
        """The principal of a token, with the keys that are known."""
        if len(token) > MOST_TOKEN or not token.isascii():
            raise _invalid(f'it is not ASCII of at most {MOST_TOKEN} bytes')
        digest = hashlib.sha256(token.encode()).digest()
        with self._lock:
            cache, keys = self._cache, self._keys
            known = cache.get(digest)
        if known and self._clock() < known[1]:
            return known[0]
        claims = self._open(token, keys)
        found, ends = self._read(claims)
        with self._lock:
            if len(cache) >= MOST_CACHED:
                del cache[next(iter(cache))]
            cache[digest] = found, ends  # if keys have changed since, this is no longer the cache in use
        return found

    def _open(self, token: str, keys: tuple[Key, ...]) -> dict[str, Any]:
        """The claims of a token whose header and signature are good."""
        import jwt

        try:
            header = self._jws.get_unverified_header(token)
            kid, algorithm = _check_header(header)
            key = self._find(kid, algorithm, keys)
            claims = json.loads(self._jws.decode(token, key.material, algorithms=[algorithm]))
        except jwt.InvalidSignatureError:
            if kid is None:
                raise _UnknownKeyError from None  # the one key may have been replaced
            raise _invalid('its signature is wrong') from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise _invalid('it can not be read') from None
        if not isinstance(claims, dict):
            raise _invalid('it can not be read')
        return claims

    def _read(self, claims: Mapping[str, Any]) -> tuple[Principal, float]:
        """Whom the claims name, and when the token ends."""
        settings = self._settings
        if claims.get('iss') != settings.issuer:
            raise _invalid(f'its issuer (iss) is not {settings.issuer}')
        audience = claims.get('aud')
        if settings.audience not in (audience if isinstance(audience, list) else [audience]):
            raise _invalid(f'it is not for {settings.audience} (aud)')
        ends = self._check_times(claims)
        subject = claims.get('sub')
        if not isinstance(subject, str) or not _is_plain(subject):
            raise _invalid(f'its subject (sub) is not ASCII text of 1 to {_MOST_SUBJECT} characters')
        granted = _granted(claims, settings.scope_claim)
        missing = [scope for scope in settings.required_scopes if scope not in granted]
        if missing:
            wanted = f'Bearer error="insufficient_scope", scope="{" ".join(settings.required_scopes)}"'
            raise Forbidden(f'the token lacks the scope {missing[0]}', code='insufficient-scope', challenge=wanted)
        return Principal(f'oidc:{subject}', frozenset(scope for scope in ALL_SCOPES if scope in granted)), ends

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        now, skew = self._clock(), self._settings.clock_skew_seconds
        ends = _moment(claims, 'exp') + skew
        if now >= ends:
            raise _invalid('it has expired (exp)')
        for name in ('nbf', 'iat'):
            if name in claims and _moment(claims, name) > now + skew:
                raise _invalid(f'it is of the future ({name})')
        return ends


def _invalid(why: str) -> Unauthorized:
    return Unauthorized(f'the token is not valid: {why}', code='invalid-token')


def _check_header(header: Mapping[str, Any]) -> tuple[str | None, str]:
    """The key's id and the algorithm. Where a header says the key is (jku, x5u, jwk, x5c) is never looked at."""
    algorithm, kid, kind = header.get('alg'), header.get('kid'), header.get('typ', 'JWT')
    if algorithm not in _ALGORITHMS.values():
        raise _invalid(f'its algorithm is none of {", ".join(_ALGORITHMS.values())}')
    if 'crit' in header or 'b64' in header:
        raise _invalid('it asks for extensions (crit, b64)')
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _invalid('it is not an access token (typ)')
    return kid, str(algorithm)


def _moment(claims: Mapping[str, Any], name: str) -> float:
    """A time of a token, in seconds since 1970 (NumericDate; RFC 7519, 2)."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LATEST:
        raise _invalid(f'its {name} is not a time')
    return float(value)


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= _MOST_SUBJECT and text.isascii() and text.isprintable()


def _granted(claims: Mapping[str, Any], claim: str) -> set[str]:
    """Every scope in a token: lists, and texts with spaces between (RFC 8693, 4.2)."""
    found: set[str] = set()
    for value in [_look_up(claims, claim)] if claim else [claims.get('scope'), claims.get('scp')]:
        if isinstance(value, str):
            found.update(value.split(' '))
        elif isinstance(value, list):
            found.update(each for each in value if isinstance(each, str))
    return found


def _look_up(claims: Mapping[str, Any], claim: str) -> Any:
    """A claim by its name, which may hold dots, or by a dotted path."""
    if claim in claims:
        return claims[claim]
    value: Any = claims
    for part in claim.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------------------------- settings


def check_settings(settings: AuthSettings) -> None:
    """Raises UsageError for settings with which no token could be verified."""
    for name, given, meant in (
        ('issuer', settings.issuer, 'give the URL that stands in `iss` of its tokens'),
        ('audience', settings.audience, 'give what stands in `aud` of tokens for this town'),
    ):
        if not given:
            raise UsageError(f'townhall.auth.{name} is missing, and townhall.auth.mode is "oidc"; {meant}')
    check_url('townhall.auth.issuer', settings.issuer)
    if '?' in settings.issuer:
        raise UsageError(f'townhall.auth.issuer = {settings.issuer!r}: an issuer has no query; take it away')
    if settings.jwks_url:
        check_url('townhall.auth.jwks_url', settings.jwks_url)
    for scope in settings.required_scopes:
        if not re.fullmatch(_SCOPE, scope):
            raise UsageError(f'townhall.auth.required_scopes: {scope!r} is no scope; give one word without quotes each')


def check_url(name: str, url: str) -> None:
    """Raises UsageError for an address that is not https, or http on this machine."""
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
    """What opens tokens. Raises UsageError without the extra."""
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
    """The keys that the issuer publishes now. Raises Unreachable, and UsageError if it says it is another issuer."""
    deadline = time.monotonic() + FETCH_SECS
    url = settings.jwks_url or _discover(settings.issuer, deadline)
    listed = _get(url, deadline).get('keys')
    found = [_key(each) for each in listed[:_MOST_KEYS]] if isinstance(listed, list) else []
    keys = tuple(key for key in found if key)
    if not keys:
        raise Unreachable(f'{url} has no key for {", ".join(_ALGORITHMS.values())}')
    return keys


def _discover(issuer: str, deadline: float) -> str:
    """Where the issuer's keys are (OpenID Connect Discovery 1.0, 4)."""
    url = issuer.removesuffix('/') + '/.well-known/openid-configuration'
    document = _get(url, deadline)
    if document.get('issuer') != issuer:
        raise UsageError(
            f'townhall.auth.issuer = {issuer!r}: {url} says that it is {document.get("issuer")!r}; '
            'the two must be the same to the letter'
        )
    keys = document.get('jwks_uri')
    if not isinstance(keys, str) or (issuer.startswith('https:') and not keys.startswith('https:')):
        raise Unreachable(f'{url} names no https:// address of keys')
    try:
        check_url('jwks_uri', keys)
    except UsageError as e:
        raise Unreachable(f'{url}: {e}') from None
    return keys


def _key(document: Any) -> Key | None:
    """A key of the issuer's list; None for one that is not for signatures of ours, weak, or damaged."""
    import jwt

    try:
        kind = f'{document["kty"]} {document.get("crv", "")}'.strip()
        algorithm = _ALGORITHMS[kind]
        meant = document.get('use', 'sig') == 'sig' and 'verify' in document.get('key_ops', ['verify'])
        if not meant or document.get('alg', algorithm) != algorithm:
            return None
        public = {name: document[name] for name in _PUBLIC if name in document}
        made = jwt.PyJWK(public, algorithm)
        weak = algorithm == 'RS256' and made.key.key_size not in _RSA_BITS
        return None if weak else Key(str(document.get('kid', '')), algorithm, json.dumps(document), made)
    except Exception:  # of whatever is in a damaged one; the others of the list still count
        return None


def _get(url: str, deadline: float) -> dict[str, Any]:
    """A JSON object from the issuer. No redirect is followed. Raises Unreachable."""
    try:
        status, body = _exchange(url, deadline)
        if status != 200:
            raise Unreachable(f'{url} answered {status}')
        found = json.loads(body)
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as e:
        if time.monotonic() >= deadline:
            raise Unreachable(f'{url}: no whole answer in {FETCH_SECS:g} s') from None
        if isinstance(e, (ValueError, RecursionError)) and not isinstance(e, OSError):
            raise Unreachable(f'{url}: the answer is no JSON of at most {MOST_DOCUMENT} bytes') from None
        raise Unreachable(f'{url}: {e or type(e).__name__}') from None
    if not isinstance(found, dict):
        raise Unreachable(f'{url}: the answer is no JSON object')
    return found


def _exchange(url: str, deadline: float) -> tuple[int, bytes]:
    """Status and body of a GET. A server that drips its answer is cut off at the deadline."""
    parts = urlsplit(url)
    host, is_tls = parts.hostname or '', parts.scheme == 'https'
    left = max(deadline - time.monotonic(), 0.001)
    with socket.create_connection((host, parts.port or (443 if is_tls else 80)), left) as raw:
        sock = raw
        if is_tls:
            sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        end = threading.Timer(deadline - time.monotonic(), _cut_off, (sock,))
        end.daemon = True
        end.start()
        try:
            return _ask(sock, parts.netloc, (parts.path or '/') + (f'?{parts.query}' if parts.query else ''))
        finally:
            end.cancel()
            sock.close()


def _cut_off(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which the other thread is in
    except OSError:
        pass  # it has ended by itself


def _ask(sock: socket.socket, host: str, path: str) -> tuple[int, bytes]:
    if isinstance(sock, ssl.SSLSocket):
        sock.do_handshake()
    connection = http.client.HTTPConnection(host)
    connection.sock = sock
    connection.request(
        'GET', path, headers={'Host': host, 'Accept': 'application/json', 'User-Agent': f'tinytown/{__version__}'}
    )
    response = connection.getresponse()
    body = response.read(MOST_DOCUMENT + 1)
    return response.status, body if len(body) <= MOST_DOCUMENT else b''
