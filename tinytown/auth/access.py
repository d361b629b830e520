"""Authentication: turns the head of a request into a principal, or into a refusal that the audit records.

Start with `Access`, which `rest.app` and `mcp.streamable_http` call for every request. `Access.admit` decides the
simple cases at once, before the body is read: a key that was verified before, a client certificate, a user of this
machine, a key with a wrong checksum or an unknown id. All other credentials need a hash, Redis or the issuer: they
become a `Claim`, which `Access.prove` verifies later in a step. Nothing here hashes or waits on the event loop.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

from .. import config as configuration
from ..core.dispatch import AuditSubject, CallLimits
from ..core.town import Call, Town
from ..errors import BadRequest, Forbidden, TownError, Unauthorized, UsageError
from ..http.http1 import Peer, Request
from ..http.replies import Stream
from ..model import ALL_SCOPES, LOCAL, READ, Principal
from ..settings import AuthSettings, Config
from ..state.store import Step
from . import agent_tokens
from .api_keys import Checks, Entry, Keyring
from .audit import Audit
from .peer_uid import CAN_TELL, own_uids, uid_of
from .rate_limit import Buckets, Throttle

logger = logging.getLogger('tinytown.auth')

CHALLENGE: Final = 'Bearer realm="tinytown"'
_BEARER: Final = re.compile(r'(?i:bearer) +([!-~]+)')


class TokenVerifier(Protocol):
    """Turns the tokens of an issuer into principals. `oidc.OidcVerifier` implements it."""

    def known(self, token: str) -> Principal | None:
        """The principal of a token, without waiting; None if only `verify` can decide. Raises TownError."""
        ...

    def verify(self, token: str) -> Principal:
        """The principal of a token. May wait for another server. Raises TownError."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """A credential that is not verified yet. `prove` raises TownError; if `is_slow`, it must run on its own thread."""

    prove: Callable[[], Step[Principal]]
    is_slow: bool


class Access:
    """Authenticates requests, limits their rate and records refusals. Create it before townhall forks.

    `verifier` is required in mode oidc. Raises UsageError if a key can't be used or the audit can't be written.
    """

    def __init__(self, town: Town, verifier: TokenVerifier | None = None) -> None:
        audit = town.config.townhall.audit
        self.audit = Audit(town.root / audit.path, audit.max_bytes, audit.keep)
        self._agents_key = agent_tokens.key_of(town.root)
        self._buckets = Buckets()
        self._checks = Checks(self._buckets)
        self._is_rechecking = False  # whether a slow recheck of a stream's credential is running
        self.apply(town, verifier)

    def apply(self, town: Town, verifier: TokenVerifier | None = None) -> None:
        """Replaces the configuration, except the path of the audit. Raises UsageError and then changes nothing."""
        config = town.config
        self._keys = WatchedKeyring(town.root, Keyring(config.townhall.auth))
        self._town = town
        self._settings = config.townhall
        self._verifier = verifier
        self._throttle = Throttle(config.townhall.rate_limit, self._buckets)
        self._uids = own_uids()
        self._subjects = {
            name: Principal(f'cert:{_word(name)}', frozenset(scopes))
            for name, scopes in config.townhall.mtls.subjects.items()
        }

    @property
    def keys_are_old(self) -> bool:
        """Whether the configuration is unusable, so that keys which it has revoked may still be accepted."""
        return self._settings.auth.mode == 'api_key' and self._keys.are_old

    # --------------------------------------------------------------------------------------- connections and requests

    def meet(self, sock: socket.socket, address: Any) -> Peer:
        """The peer of a connection that was just accepted."""
        host = address[0] if isinstance(address, tuple) else ''
        return Peer(host, uid_of(sock) if self._settings.auth.mode == 'none' else None)

    def call_limits(self, request: Request) -> CallLimits:
        """The rate limits and the audit that apply to the operations of this request."""
        return CallLimits(self._throttle, self.audit, request.id, request.peer.address)

    def admit(self, request: Request, operation: str, arguments: Mapping[str, Any]) -> None:
        """Sets `request.by` to the principal, or to a `Claim` that `prove` must verify. Raises TownError.

        The audit record of a refusal contains `operation` and `arguments`.
        """
        try:
            caller = self._authenticate(request)
        except TownError as e:
            self.refused(request, operation, arguments, e)
            raise
        request.by = self._limited(caller) if isinstance(caller, Principal) else caller
        request.reauthenticate = self.reauthenticate
        if isinstance(caller, Principal):
            request.caller = caller.name

    def prove(self, request: Request, operation: str, arguments: Mapping[str, Any]) -> Step[Principal]:
        """The principal of an admitted request; verifies its claim if it still has one. Raises TownError."""
        if isinstance(request.by, Principal):
            return request.by
        try:
            proven = yield from request.by.prove()
        except TownError as e:
            self.refused(request, operation, arguments, e)
            raise
        request.by = by = self._limited(proven)
        request.caller = by.name
        return by

    def reauthenticate(self, stream: Stream) -> None:
        """Checks the credential of an open stream again; ends the stream if it was revoked or its scopes changed.

        If the check is impossible now (Redis or the issuer is down), the stream stays open. Only one slow check runs
        at a time, on a thread; it caches its result, so the checks after it are fast.
        """
        if not isinstance(stream.request.by, Principal):
            return  # the first proof is still running
        try:
            caller = self._authenticate(stream.request)
        except TownError as e:
            self._confirm(stream, None, e)
            return
        if isinstance(caller, Principal):
            self._confirm(stream, caller, None)
        elif not caller.is_slow:
            stream.run(caller.prove(), lambda by, error: self._confirm(stream, by, error))
        elif not self._is_rechecking:
            self._is_rechecking = True
            stream.run(caller.prove(), lambda by, error: self._confirm_slowly(stream, by, error), True, True)

    def _confirm_slowly(self, stream: Stream, by: Principal | None, error: Exception | None) -> None:
        self._is_rechecking = False
        self._confirm(stream, by, error)

    def _confirm(self, stream: Stream, by: Principal | None, error: Exception | None) -> None:
        request = stream.request
        if by is not None and self._limited(by) != request.by:
            error = Unauthorized('the scopes of this caller have changed; call again', code='scopes-changed')
        if isinstance(error, TownError) and error.status in (401, 403) and stream.is_open:
            self.refused(request, request.operation, request.values, error)
            stream.refuse(error)

    def refused(self, request: Request, operation: str, arguments: Mapping[str, Any], error: TownError) -> None:
        """Records a refusal in the audit. Gives a 401 its challenge (WWW-Authenticate; RFC 6750, 3)."""
        if error.status == 401:
            error.challenge = error.challenge or f'{CHALLENGE}, error="invalid_token"'
        if error.status in (401, 403, 429):
            self.audit.denied(AuditSubject(request.id, request.peer.address, None, operation, arguments), error)

    def _limited(self, by: Principal) -> Principal:
        """The principal, reduced to the scope town.read if townhall.read_only is set."""
        if not self._settings.read_only or by.scopes <= {READ}:
            return by
        return replace(by, scopes=frozenset({READ} if by.may(READ) else ()))

    # --------------------------------------------------------------------------------------------------- authentication

    def _authenticate(self, request: Request) -> Principal | Claim:
        """The principal of a request, or the claim to verify. Agent tokens are accepted in every mode."""
        mode, peer = self._settings.auth.mode, request.peer
        local = self._by_user(peer.uid) if mode == 'none' else None
        credential = _credential(request, lenient=mode == 'none')
        if credential.startswith(agent_tokens.TOKEN_PREFIX):
            return self._by_agent(credential)
        if local:
            return self._subjects.get(peer.subject, local)
        if credential and mode == 'api_key':
            return self._by_key(credential, peer.address)
        if credential:
            return self._by_token(credential)
        if peer.subject in self._subjects:
            return self._subjects[peer.subject]
        kind = 'an API key' if mode == 'api_key' else 'a token'
        raise Unauthorized(f'send {kind}, as  Authorization: Bearer …', challenge=CHALLENGE)

    def _by_user(self, uid: int | None) -> Principal:
        known = uid in self._uids if uid is not None else not CAN_TELL
        if not known and self._settings.auth.local_users == 'same':
            caller = 'the user of this connection is unknown' if uid is None else f'this connection is of user {uid}'
            raise Forbidden(
                f'{caller}, and this townhall serves only its own user; to serve every user of its machine, run:  '
                'tt config townhall.auth.local_users any',
                code='other-user',
            )
        return _EVERYTHING

    def _by_agent(self, token: str) -> Claim:
        agent_id, instance = agent_tokens.read_token(self._agents_key, token)
        nobody = Call(self._town, Principal('', frozenset()))
        return Claim(lambda: agent_tokens.principal(nobody, agent_id, instance), is_slow=False)

    def _by_key(self, key: str, address: str) -> Principal | Claim:
        ring = self._keys.current()
        entry = ring.with_hash(self._checks.recall(key))
        if entry is not None:
            return _unexpired(entry)
        claimed = ring.claimed(key)
        if claimed is None:
            raise _unknown_key()
        self._checks.admit(claimed, address)
        return Claim(lambda: self._check_key(key, claimed, address), is_slow=True)

    def _check_key(self, key: str, claimed: Entry, address: str) -> Step[Principal]:
        yield from ()
        good = self._checks.verify(key, claimed, address)
        entry = self._keys.current().with_hash(claimed.hash) if good else None
        if entry is None:
            raise _unknown_key()
        return _unexpired(entry)

    def _by_token(self, token: str) -> Principal | Claim:
        verifier = self._verifier
        assert verifier
        known = verifier.known(token)
        return _named(known) if known else Claim(lambda: _check_token(verifier, token), is_slow=True)


def _check_token(verifier: TokenVerifier, token: str) -> Step[Principal]:
    yield from ()
    return _named(verifier.verify(token))


def _named(by: Principal) -> Principal:
    """The principal with spaces in its name escaped: records and Redis keys use a space as their separator."""
    return replace(by, name=_word(by.name)) if ' ' in by.name else by


_EVERYTHING: Final = Principal(LOCAL, ALL_SCOPES)


def is_slow(request: Request) -> bool:
    """Whether `Access.prove` must run on its own thread for this request."""
    return isinstance(request.by, Claim) and request.by.is_slow


def _credential(request: Request, lenient: bool) -> str:
    """The key or token of a request, '' if it has none. If `lenient`, ignores one that can't be read.

    Raises BadRequest, Unauthorized.
    """
    try:
        return _read_credential(request.fields)
    except TownError:
        if lenient:
            return ''
        raise


def _read_credential(fields: Mapping[bytes, bytes]) -> str:
    bearer, key = fields.get(b'authorization'), fields.get(b'x-api-key')
    if bearer is not None and key is not None:
        raise BadRequest('send the key once, either as Authorization: Bearer or as X-API-Key')
    if key is not None:
        return _text(key)
    if bearer is None:
        return ''
    match = _BEARER.fullmatch(_text(bearer))
    if not match:
        raise Unauthorized('send  Authorization: Bearer …; this server knows no other scheme', challenge=CHALLENGE)
    return match[1]


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _unknown_key() from None


def _unknown_key() -> Unauthorized:
    """One answer for a mistyped, unknown, wrong or revoked key, so that it tells an attacker nothing."""
    return Unauthorized('the API key is not valid', code='invalid-token')


def _unexpired(entry: Entry) -> Principal:
    if time.time() >= entry.expires:
        raise Unauthorized('the API key has expired', code='expired')
    return entry.principal


def _word(name: str) -> str:
    """A name with everything percent-encoded that would split it in records and Redis keys."""
    return quote(name, safe="!#$&'()*+,/:;=?@[]-._~")


# ------------------------------------------------------------------------------------------------- current keys

_Version = tuple[int, int, int, int] | None  # of a file: mtime and ctime in ns, size, inode; None if it is missing
_SETTLED: Final = 50_000_000  # ns; a later change of a file is sure to change its timestamps


class WatchedKeyring:
    """The configured keys, read again when a configuration file changes, so that a revoked key is refused at once.

    If the new configuration is wrong, the old keys stay in force and the log says so once.
    """

    def __init__(self, root: Path, ring: Keyring) -> None:
        self._root = root
        self._ring = ring
        self._town_file = str(root / configuration.FILE)
        home = configuration.home()
        self._shared_file = str(home / configuration.USER_FILE) if home else ''
        self._versions: tuple[_Version, _Version] | None = None
        self._fault = ''  # why the last configuration is unusable

    @property
    def are_old(self) -> bool:
        """Whether the keys in force are outdated because the configuration can't be read or is wrong."""
        self.current()
        return self._fault != ''

    def current(self) -> Keyring:
        """The keys in force. Costs two calls of stat."""
        was_missing = self._versions is not None and self._versions[1] is None
        versions = _version(self._town_file), _version(self._shared_file, was_missing)
        if versions != self._versions:
            self._reload()
            self._versions = versions if all(map(_is_settled, versions)) else None
        return self._ring

    def _reload(self) -> None:
        try:
            self._ring = Keyring(configuration.load(self._root).townhall.auth)
            self._fault = ''
        except UsageError as e:
            if str(e) != self._fault:
                self._fault = str(e)
                logger.warning(f'the new keys cannot be used, the old ones stay in force: {e}')


def _version(file: str, was_missing: bool = False) -> _Version:
    if was_missing and not os.access(file, os.F_OK):
        return None  # access costs less than half of the exception below
    try:
        status = os.stat(file)  # noqa: PTH116  at every request, and a Path takes twice as long
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _is_settled(version: _Version) -> bool:
    """Whether any later change must change the timestamps. Within the same clock tick it might not."""
    return version is None or not 0 <= time.time_ns() - max(version[:2]) < _SETTLED


# ------------------------------------------------------------------------------------------------------ start-up rules


def check_start(config: Config, address: str) -> list[str]:
    """Warnings to show before townhall serves on an address (of a socket, or one to be bound).

    Raises UsageError if the address is not safe with these settings, or if a setting would have no effect.
    """
    settings = config.townhall
    auth, stays_here = settings.auth, is_local(address)
    if auth.mode == 'none' and not stays_here:
        raise UsageError(
            f'townhall.bind = {address!r}: townhall.auth.mode is "none", so only a loopback address is served; use '
            '--bind 127.0.0.1, or make an API key:  tt generate-api-key --write'
        )
    _check_in_force(auth)
    if auth.mode == 'api_key' and not len(Keyring(auth)):
        raise UsageError('townhall.auth.mode is "api_key", but there is no key; make one:  tt generate-api-key --write')
    if auth.mode != 'api_key' or stays_here:
        return []
    warnings = [f'API keys on {address}: for a network, townhall.auth.mode = "oidc" is the better choice']
    if not settings.tls.enabled:
        warnings.append(
            f'WARNING: NO TLS on {address}: KEYS AND WORK CROSS THE NETWORK IN CLEAR; set townhall.tls.cert_path and '
            'key_path, or serve on 127.0.0.1 behind a proxy that has TLS'
        )
    return warnings


def _check_in_force(auth: AuthSettings) -> None:
    """Refuses settings that the current mode ignores: their author believes that they protect the town."""
    settings_of = {'api_key': ('api_key_hash', 'keys'), 'oidc': ('issuer', 'audience', 'jwks_url', 'required_scopes')}
    for mode, names in settings_of.items():
        for name in names:
            if getattr(auth, name) and auth.mode != mode:
                raise UsageError(
                    f'townhall.auth.{name} is set, but townhall.auth.mode is "{auth.mode}", so it would have no '
                    f'effect; set mode = "{mode}", or remove it'
                )


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address."""
    if address.startswith(('unix:', '/')) or address == 'localhost':
        return True
    try:
        return ipaddress.ip_address(address.partition('%')[0]).is_loopback
    except ValueError:
        return False
