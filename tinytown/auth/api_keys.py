"""API keys: how they are made, what of them is kept, and how one that is shown is checked.

A key is tt_<id>_<43 random characters>_<checksum>. The id finds its hash, the checksum tells a mistyped key, both in
microseconds. Only then comes argon2id, which costs tens of milliseconds and tens of megabytes: never on the event
loop, never more than `MOST_AT_ONCE`, once for all who show the same key at the same time, and never again for a key
that was found good, as long as its hash stands in the configuration.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .. import api_key_table
from ..errors import TooManyRequests, Unavailable, UsageError
from ..model import Principal, Scope
from ..settings import AuthSettings
from . import argon2id
from .argon2id import matches
from .rate_limit import Buckets, network

if TYPE_CHECKING:
    from concurrent.futures import Future

MAX_HASHING: Final = 2  # hashes under way
MAX_WAITING_HASHES: Final = 16  # further ones that may wait for their turn
MOST_KNOWN: Final = 1024
FAILURES: Final = 20  # wrong keys of one address (IPv6: /64) for one id, and then this many a minute
FAILURES_OF_ALL: Final = 200  # the same for one id over all addresses
LONGEST: Final = 512  # characters of a key

_KEY: Final = re.compile(r'(tt_([0-9a-f]{8})_[A-Za-z0-9_-]{43})_([0-9a-f]{8})')
_HASH: Final = re.compile(
    r'\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,9})\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{16,86}'
)

# ------------------------------------------------------------------------------------------------------------- making


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A new key. `key` is shown once and kept nowhere; `hash` (argon2id) is what a configuration holds."""

    id: str
    key: str
    hash: str


def generate_key(key_id: str = '') -> ApiKey:
    """A new key, or a new one for an id.

    Its 256 random bits can't be guessed at any speed, so its hash takes the least that is recommended for argon2id (19
    MiB, two passes: RFC 9106 and OWASP) and not the most that a machine can bear. Raises UsageError where there is no
    argon2.
    """
    key_id = key_id or secrets.token_hex(4)
    body = f'tt_{key_id}_{secrets.token_urlsafe(32)}'
    key = f'{body}_{checksum(body)}'
    return ApiKey(key_id, key, argon2id.hashed(key.encode(), passes=2, memory=19456))


def checksum(body: str) -> str:
    """The last part of a key whose other parts are `body`: 8 hexadecimal digits."""
    return hashlib.sha256(body.encode()).hexdigest()[:8]


def check_hash(text: str, name: str) -> None:
    """Refuses a hash that we did not make and could not bear: m=4194304 takes 4 GiB for each request.

    `name` says of what it is the hash. Raises UsageError.
    """
    match = _HASH.fullmatch(text)
    if not match:
        raise UsageError(f'{name}: the hash is not one of argon2id ($argon2id$v=19$…); make one:  tt generate-api-key')
    memory, passes, lanes = map(int, match.groups())
    if not (8192 <= memory <= 131_072 and 1 <= passes <= 10 and 1 <= lanes <= 4):
        raise UsageError(
            f'{name}: the hash has m={memory},t={passes},p={lanes}; m may be 8192 to 131072, t up to 10, p up to 4; '
            'make one:  tt generate-api-key'
        )


# ----------------------------------------------------------------------------------------------- what is configured


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of the configuration: whose calls it stands for, and until when (seconds since the epoch)."""

    id: str
    hash: str
    principal: Principal
    expires: float = math.inf


class Keyring:
    """The keys of a configuration. Raises UsageError that names the one which can't be used, or what argon2 lacks."""

    def __init__(self, settings: AuthSettings) -> None:
        entries = [_entry(key) for key in settings.keys]
        if settings.api_key_hash:
            scopes = frozenset[Scope](settings.api_key_scopes)
            entries.append(Entry('', settings.api_key_hash, Principal('api-key', scopes)))
        if entries:
            argon2id.require()
        for entry in entries:
            check_hash(
                entry.hash, f"townhall.auth.keys: key '{entry.id}'" if entry.id else 'townhall.auth.api_key_hash'
            )
        self._by_id = {entry.id: entry for entry in entries}
        self._by_hash = {entry.hash: entry for entry in entries}

    def __len__(self) -> int:
        return len(self._by_id)

    def with_hash(self, text: str) -> Entry | None:
        return self._by_hash.get(text)

    def claimed(self, key: str) -> Entry | None:
        """The entry that a key may be of, by its id and checksum. Any other text may be that of `api_key_hash`."""
        match = _KEY.fullmatch(key)
        if not match:
            return self._by_id.get('') if 0 < len(key) <= LONGEST else None
        body, key_id, check = match.groups()
        if not secrets.compare_digest(check, checksum(body)):
            return None
        return self._by_id.get(key_id) or self._by_id.get('')


def _entry(key: dict[str, object]) -> Entry:
    key_id, text, scopes = str(key['id']), str(key['hash']), key['scopes']
    assert isinstance(scopes, list)
    return Entry(key_id, text, Principal(f'key:{key_id}', frozenset(scopes)), api_key_table.expiry(key) or math.inf)


# ----------------------------------------------------------------------------------------------------------- checking


class Checks:
    """What is known of the keys that were shown: those found good, those being hashed, and how often one failed."""

    def __init__(self, failures: Buckets) -> None:
        self._failures = failures
        # With a secret, so that what is kept of a key is of no use to another process.
        self._digests = hashlib.blake2b(digest_size=32, key=os.urandom(32))
        self._known: dict[bytes, str] = {}
        self._under_way: dict[tuple[bytes, str], Future[bool]] = {}
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(MAX_HASHING)

    def _digest(self, key: str) -> bytes:
        hashed = self._digests.copy()
        hashed.update(key.encode())
        return hashed.digest()

    def recall(self, key: str) -> str:
        """The hash that a key was found to fit, '' if it was not. Costs a microsecond."""
        return self._known.get(self._digest(key), '')

    def admit(self, entry: Entry, address: str) -> None:
        """Refuses to look at yet another key for this entry. Raises TooManyRequests, Unavailable."""
        if len(self._under_way) >= MAX_HASHING + MAX_WAITING_HASHES:
            raise Unavailable('too many keys are being checked', code='busy', retry_after=1)
        for whence, bucket, most in _buckets(entry, address):
            wait = self._failures.take(bucket, most, most, 0.0)
            if wait:
                detail = f'too many wrong keys from {whence}; wait, or use one that was found right before'
                raise TooManyRequests(detail, code='too-many-failures', retry_after=math.ceil(wait))

    def verify(self, key: str, entry: Entry, address: str) -> bool:
        """Whether a key is that of an entry. Blocks for the hash. Raises Unavailable."""
        from concurrent.futures import Future  # late: it brings logging

        proof = (self._digest(key), entry.hash)
        with self._lock:
            if self._known.get(proof[0]) == entry.hash:
                return True
            flight = self._under_way.get(proof)
            if flight is None:
                if len(self._under_way) >= MAX_HASHING + MAX_WAITING_HASHES:
                    raise Unavailable('too many keys are being checked', code='busy', retry_after=1)
                mine = self._under_way[proof] = Future[bool]()
        good = flight.result() if flight else self._hash(key, proof, mine)
        if not good:
            for _, bucket, most in _buckets(entry, address):
                self._failures.take(bucket, most, most)
        return good

    def _hash(self, key: str, proof: tuple[bytes, str], flight: Future[bool]) -> bool:
        try:
            with self._turns:
                good = matches(key.encode(), proof[1])
        except BaseException as e:
            flight.set_exception(e)
            raise
        else:
            flight.set_result(good)
        finally:
            with self._lock:
                del self._under_way[proof]
                if flight.exception() is None and flight.result():
                    self._remember(*proof)
        return good

    def _remember(self, digest: bytes, text: str) -> None:
        if len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[digest] = text


def _buckets(entry: Entry, address: str) -> list[tuple[str, str, int]]:
    """Where failures are counted: whence they come, the bucket, and how many it holds and takes in a minute."""
    whence = network(address)
    return [
        (whence or 'this socket', f'failed {entry.id} {whence}', FAILURES),
        ('everywhere for this key', f'failed {entry.id}', FAILURES_OF_ALL),
    ]
