"""Who calls: from the head of a request to a principal, or a refusal that is on record.

What can be said at once is said before the body is read: a key that was found good before, a client certificate, a
user of this machine; a key whose checksum is wrong or whose id is unknown. The rest is a `Claim`, proven by a step.
Nothing in here ever hashes, or waits for anyone, on the event loop.
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

logger = logging.getLogger('tinytown.auth.api_keys')

CHALLENGE: Final = 'Bearer realm="tinytown"'
_BEARER: Final = re.compile(r'(?i:bearer) +([!-~]+)')


class TokenVerifier(Protocol):
    """Whose tokens a town trusts (`oidc`)."""

    def known(self, token: str) -> Principal | None:
        """Whom a token stands for, without waiting; None if `verify` must say. Raises TownError."""
        ...

    def verify(self, token: str) -> Principal:
        """Whom a token stands for. May ask another server. Raises TownError."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """Who a caller says to be. `prove` raises TownError; a slow one takes a thread of its own."""

    prove: Callable[[], Step[Principal]]
    is_slow: bool


class Access:
    """Who may come in. Made before a townhall forks; `apply` has it take up another configuration.

    `verifier` is there in mode oidc. Raises UsageError for keys that can't be used, and an audit that can't be written.
    """

    def __init__(self, town: Town, verifier: TokenVerifier | None = None) -> None:
        audit = town.config.townhall.audit
        self.audit = Audit(town.root / audit.path, audit.max_bytes, audit.keep)
        self._agents_key = agent_tokens.key_of(town.root)
        self._buckets = Buckets()
        self._checks = Checks(self._buckets)
        self._asks_slowly = False
        self.apply(town, verifier)

    def apply(self, town: Town, verifier: TokenVerifier | None = None) -> None:
        """Takes up a configuration, but for the place of the audit. Raises UsageError, and nothing is changed then."""
        config = town.config
        self._keys = Watched(town.root, Keyring(config.townhall.auth))
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
        """Whether keys are in force that the configuration, which can't be taken up, may have revoked."""
        return self._settings.auth.mode == 'api_key' and self._keys.are_old

    # ------------------------------------------------------------------------------------------------- at the door

    def meet(self, sock: socket.socket, address: Any) -> Peer:
        """Who is at the other end of a connection that was just made."""
        host = address[0] if isinstance(address, tuple) else ''
        return Peer(host, uid_of(sock) if self._settings.auth.mode == 'none' else None)

    def gate(self, request: Request) -> CallLimits:
        """What a call of this request meets in the door."""
        return CallLimits(self._throttle, self.audit, request.id, request.peer.address)

    def admit(self, request: Request, operation: str, arguments: Mapping[str, Any]) -> None:
        """Sets `request.by` to the principal, or to the claim of one. Raises TownError.

        `operation` and `arguments` are for the record of a refusal.
        """
        try:
            found = self._judge(request)
        except TownError as e:
            self.refused(request, operation, arguments, e)
            raise
        request.by = self._limited(found) if isinstance(found, Principal) else found
        request.ask_again = self.ask_again
        if isinstance(found, Principal):
            request.caller = found.name

    def prove(self, request: Request, operation: str, arguments: Mapping[str, Any]) -> Step[Principal]:
        """The principal of a request that was admitted; a claim is proven now. Raises TownError."""
        if isinstance(request.by, Principal):
            return request.by
        try:
            found = yield from request.by.prove()
        except TownError as e:
            self.refused(request, operation, arguments, e)
            raise
        request.by = by = self._limited(found)
        request.caller = by.name
        return by

    def ask_again(self, stream: Stream) -> None:
        """Judges anew who reads a stream, and ends it for one who is no longer let in, or now has other scopes.

        What can't be said now (Redis or the issuer is away) ends nothing. Of proofs that are slow one at a time is
        made, on a thread: it brings what it learned to the next ones.
        """
        if not isinstance(stream.request.by, Principal):
            return  # it is being proven
        try:
            found = self._judge(stream.request)
        except TownError as e:
            self._confirm(stream, None, e)
            return
        if isinstance(found, Principal):
            self._confirm(stream, found, None)
        elif not found.is_slow:
            stream.run(found.prove(), lambda by, error: self._confirm(stream, by, error))
        elif not self._asks_slowly:
            self._asks_slowly = True
            stream.run(found.prove(), lambda by, error: self._confirm_slowly(stream, by, error), True, True)

    def _confirm_slowly(self, stream: Stream, by: Principal | None, error: Exception | None) -> None:
        self._asks_slowly = False
        self._confirm(stream, by, error)

    def _confirm(self, stream: Stream, by: Principal | None, error: Exception | None) -> None:
        request = stream.request
        if by is not None and self._limited(by) != request.by:
            error = Unauthorized('what this caller may do has changed; call again', code='scopes-changed')
        if isinstance(error, TownError) and error.status in (401, 403) and stream.is_open:
            self.refused(request, request.operation, request.values, error)
            stream.refuse(error)

    def refused(self, request: Request, operation: str, arguments: Mapping[str, Any], error: TownError) -> None:
        """Puts a refusal on record, and says how a caller who is not known may be."""
        if error.status == 401:
            error.challenge = error.challenge or f'{CHALLENGE}, error="invalid_token"'
        if error.status in (401, 403, 429):
            self.audit.denied(AuditSubject(request.id, request.peer.address, None, operation, arguments), error)

    def _limited(self, by: Principal) -> Principal:
        """With read_only, a principal that may do no more than read."""
        if not self._settings.read_only or by.scopes <= {READ}:
            return by
        return replace(by, scopes=frozenset({READ} if by.may(READ) else ()))

    # ---------------------------------------------------------------------------------------------------- judging

    def _judge(self, request: Request) -> Principal | Claim:
        mode, peer = self._settings.auth.mode, request.peer
        local = self._by_user(peer.uid) if mode == 'none' else None
        shown = _shown(request, lenient=mode == 'none')
        if shown.startswith(agent_tokens.TOKEN_PREFIX):
            return self._by_agent(shown)
        if local:
            return self._subjects.get(peer.subject, local)
        if shown and mode == 'api_key':
            return self._by_key(shown, peer.address)
        if shown:
            return self._by_token(shown)
        if peer.subject in self._subjects:
            return self._subjects[peer.subject]
        how = 'an API key' if mode == 'api_key' else 'a token'
        raise Unauthorized(f'send {how}, as  Authorization: Bearer …', challenge=CHALLENGE)

    def _by_user(self, uid: int | None) -> Principal:
        known = uid in self._uids if uid is not None else not CAN_TELL
        if not known and self._settings.auth.local_users == 'same':
            who = 'the user of this connection can not be told' if uid is None else f'this connection is of user {uid}'
            raise Forbidden(
                f'{who}, and this townhall serves its own user alone; to let every user of its machine in: '
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
    """A principal whose name is one word: it stands in records, and in keys whose parts are set off by spaces."""
    return replace(by, name=_word(by.name)) if ' ' in by.name else by


_EVERYTHING: Final = Principal(LOCAL, ALL_SCOPES)


def is_slow(request: Request) -> bool:
    """Whether it must be proven on a thread of its own who calls."""
    return isinstance(request.by, Claim) and request.by.is_slow


def _shown(request: Request, lenient: bool) -> str:
    """The key or token that was sent, '' if none was. What can't be read is passed over if that is `lenient`.

    Raises BadRequest, Unauthorized.
    """
    try:
        return _sent(request.fields)
    except TownError:
        if lenient:
            return ''
        raise


def _sent(fields: Mapping[bytes, bytes]) -> str:
    bearer, key = fields.get(b'authorization'), fields.get(b'x-api-key')
    if bearer is not None and key is not None:
        raise BadRequest('send the key once, as Authorization: Bearer or as X-API-Key')
    if key is not None:
        return _text(key)
    if bearer is None:
        return ''
    match = _BEARER.fullmatch(_text(bearer))
    if not match:
        raise Unauthorized('send  Authorization: Bearer …; no other scheme is known here', challenge=CHALLENGE)
    return match[1]


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _unknown_key() from None


def _unknown_key() -> Unauthorized:
    """The same for a mistyped, an unknown, a wrong and a revoked key."""
    return Unauthorized('the API key is not valid', code='invalid-token')


def _unexpired(entry: Entry) -> Principal:
    if time.time() >= entry.expires:
        raise Unauthorized('the API key has expired', code='expired')
    return entry.principal


def _word(name: str) -> str:
    """A name as one word, for records and keys."""
    return quote(name, safe="!#$&'()*+,/:;=?@[]-._~")


# --------------------------------------------------------------------------------------------- the keys as they are now

_Version = tuple[int, int, int, int] | None
_SETTLED: Final = 50_000_000  # ns after which a file's times tell it from the next version of it


class Watched:
    """The keys of the configuration, read again when a file of it has changed: what was revoked is refused at once.

    One that is wrong leaves the old keys in force, and is told once.
    """

    def __init__(self, root: Path, ring: Keyring) -> None:
        self._root = root
        self._ring = ring
        self._town_file = str(root / configuration.FILE)
        home = configuration.home()
        self._shared_file = str(home / configuration.USER_FILE) if home else ''
        self._seen: tuple[_Version, _Version] | None = None
        self._told = ''

    @property
    def are_old(self) -> bool:
        """Whether those in force are not those of the configuration, which can't be read or is wrong."""
        self.current()
        return self._told != ''

    def current(self) -> Keyring:
        """The keys. Costs a look at the times of two files."""
        had_none = self._seen is not None and self._seen[1] is None
        seen = _version(self._town_file), _version(self._shared_file, had_none)
        if seen != self._seen:
            self._read_again()
            self._seen = seen if all(map(_is_settled, seen)) else None
        return self._ring

    def _read_again(self) -> None:
        try:
            self._ring = Keyring(configuration.load(self._root).townhall.auth)
            self._told = ''
        except UsageError as e:
            if str(e) != self._told:
                self._told = str(e)
                logger.warning(f'the keys are not taken up, the old ones stay in force: {e}')


def _version(file: str, was_missing: bool = False) -> _Version:
    if was_missing and not os.access(file, os.F_OK):
        return None  # for less than half of what the error below costs
    try:
        found = os.stat(file)  # noqa: PTH116  at every request: a Path doubles what it costs
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _is_settled(version: _Version) -> bool:
    """Whether a change from now on would show; one within the same tick of the clock might not."""
    return version is None or not 0 <= time.time_ns() - max(version[:2]) < _SETTLED


# ------------------------------------------------------------------------------------------------------ start-up rules


def check_start(config: Config, address: str) -> list[str]:
    """What a person is to be warned of before serving on an address (of a socket, or one to be bound).

    Raises UsageError for what is not safe, or is configured and would not be in force.
    """
    settings = config.townhall
    auth, stays_here = settings.auth, is_local(address)
    if auth.mode == 'none' and not stays_here:
        raise UsageError(
            f'townhall.bind = {address!r}: townhall.auth.mode is "none", so only a loopback address is served; use '
            '--bind 127.0.0.1, or make a key (tt generate-api-key --write)'
        )
    _check_in_force(auth)
    if auth.mode == 'api_key' and not len(Keyring(auth)):
        raise UsageError('townhall.auth.mode is "api_key", and there is no key; make one:  tt generate-api-key --write')
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
    """Refuses settings of a mode that is not on: who wrote them believes that they protect."""
    belongs = {'api_key': ('api_key_hash', 'keys'), 'oidc': ('issuer', 'audience', 'jwks_url', 'required_scopes')}
    for mode, names in belongs.items():
        for name in names:
            if getattr(auth, name) and auth.mode != mode:
                raise UsageError(
                    f'townhall.auth.{name} is set, but townhall.auth.mode is "{auth.mode}", so it would not be in '
                    f'force; set mode = "{mode}", or remove it'
                )


def is_local(address: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if address.startswith(('unix:', '/')) or address == 'localhost':
        return True
    try:
        return ipaddress.ip_address(address.partition('%')[0]).is_loopback
    except ValueError:
        return False
