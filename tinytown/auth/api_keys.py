"""API keys: generates them, reads their hashes from the configuration (`Keyring`) and verifies them (`Checks`).

A key is tt_<id>_<43 random characters>_<checksum>. Its id finds the hash and its checksum detects a typing error, both
in microseconds. The argon2id hash comes last because it costs tens of milliseconds and tens of megabytes. Hashes are
never computed on the event loop, and at most `MAX_HASHING` at a time. Clients that send the same key at the same time
share one computation. A verified key is remembered and accepted as long as the configuration contains its hash.
`access` decides when to verify.
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

MAX_HASHING: Final = 2  # hashes that are computed at once
MAX_WAITING_HASHES: Final = 16  # hashes that may wait for their turn
MAX_KNOWN: Final = 1024  # verified keys that are remembered
FAILURES: Final = 20  # wrong keys from one address (IPv6: /64) for one id: a burst of so many, then so many a minute
FAILURES_OF_ALL: Final = 200  # the same for one id from all addresses together
MAX_KEY: Final = 512  # characters of a key

_KEY: Final = re.compile(r'(tt_([0-9a-f]{8})_[A-Za-z0-9_-]{43})_([0-9a-f]{8})')
_HASH: Final = re.compile(
    r'\$argon2id\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,9})\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{16,86}'
)

# --------------------------------------------------------------------------------------------------------- generating


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A new key. `key` is shown once and stored nowhere; `hash` (argon2id) goes into the configuration."""

    id: str
    key: str
    hash: str


def generate_key(key_id: str = '') -> ApiKey:
    """A new key, with a random id unless `key_id` is given. Raises UsageError if argon2 is not installed.

    Nobody can guess 256 random bits, however fast the hash. So the hash uses OWASP's minimum for argon2id (19 MiB, two
    passes), which keeps it cheap to verify.
    """
    key_id = key_id or secrets.token_hex(4)
    body = f'tt_{key_id}_{secrets.token_urlsafe(32)}'
    key = f'{body}_{checksum(body)}'
    return ApiKey(key_id, key, argon2id.hashed(key.encode(), passes=2, memory=19456))


def checksum(body: str) -> str:
    """The last part of a key, 8 hexadecimal digits. `body` is the key up to the underscore before it."""
    return hashlib.sha256(body.encode()).hexdigest()[:8]


def check_hash(text: str, name: str) -> None:
    """Raises UsageError if a hash is malformed or too expensive: m=4194304 would take 4 GiB for each request.

    `name` is the setting for the error message.
    """
    match = _HASH.fullmatch(text)
    if not match:
        raise UsageError(f'{name}: the hash is not an argon2id hash ($argon2id$v=19$…); make one:  tt generate-api-key')
    memory, passes, lanes = map(int, match.groups())
    if not (8192 <= memory <= 131_072 and 1 <= passes <= 10 and 1 <= lanes <= 4):
        raise UsageError(
            f'{name}: the hash has m={memory},t={passes},p={lanes}; allowed are m from 8192 to 131072, t from 1 to 10 '
            'and p from 1 to 4; make one:  tt generate-api-key'
        )


# ------------------------------------------------------------------------------------------------- configured keys


@dataclass(frozen=True, slots=True)
class Entry:
    """A configured key: its principal, and when it expires (seconds since 1970). `id` is '' for `api_key_hash`."""

    id: str
    hash: str
    principal: Principal
    expires: float = math.inf


class Keyring:
    """The keys of a configuration.

    Raises UsageError if a key can't be used, with the name of the key, or if argon2 is not installed.
    """

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
        """The entry that a key claims by its id; None if there is none or the checksum is wrong.

        The key of `api_key_hash` may be any text, so a text in another format claims that entry.
        """
        match = _KEY.fullmatch(key)
        if not match:
            return self._by_id.get('') if 0 < len(key) <= MAX_KEY else None
        body, key_id, check = match.groups()
        if not secrets.compare_digest(check, checksum(body)):
            return None
        return self._by_id.get(key_id) or self._by_id.get('')


def _entry(key: dict[str, object]) -> Entry:
    key_id, text, scopes = str(key['id']), str(key['hash']), key['scopes']
    assert isinstance(scopes, list)
    return Entry(key_id, text, Principal(f'key:{key_id}', frozenset(scopes)), api_key_table.expiry(key) or math.inf)


# ---------------------------------------------------------------------------------------------------------- verifying


class Checks:
    """Verifies keys. Remembers verified keys, shares hashes in progress and counts failures. Safe to use in threads."""

    def __init__(self, failures: Buckets) -> None:
        self._failures = failures
        # Keyed with a random secret: a leaked digest is useless for testing guesses of a key.
        self._digests = hashlib.blake2b(digest_size=32, key=os.urandom(32))
        self._known: dict[bytes, str] = {}  # verified keys: the hash by the key's digest
        self._under_way: dict[tuple[bytes, str], Future[bool]] = {}  # by digest and hash
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(MAX_HASHING)

    def _digest(self, key: str) -> bytes:
        hashed = self._digests.copy()
        hashed.update(key.encode())
        return hashed.digest()

    def recall(self, key: str) -> str:
        """The hash that a key was verified against, '' if it was not. Costs a microsecond."""
        return self._known.get(self._digest(key), '')

    def admit(self, entry: Entry, address: str) -> None:
        """Raises TooManyRequests or Unavailable if no further key may be verified against this entry now."""
        if len(self._under_way) >= MAX_HASHING + MAX_WAITING_HASHES:
            raise Unavailable('too many keys are being checked', code='busy', retry_after=1)
        for source, bucket, limit in _buckets(entry, address):
            wait = self._failures.take(bucket, limit, limit, 0.0)
            if wait:
                detail = f'too many wrong keys from {source}; wait, or use a key that has already been accepted'
                raise TooManyRequests(detail, code='too-many-failures', retry_after=math.ceil(wait))

    def verify(self, key: str, entry: Entry, address: str) -> bool:
        """Whether a key matches the hash of an entry. Blocks while it is hashed. Raises Unavailable."""
        from concurrent.futures import Future  # late: it imports logging

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
            for _, bucket, limit in _buckets(entry, address):
                self._failures.take(bucket, limit, limit)
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
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[digest] = text


def _buckets(entry: Entry, address: str) -> list[tuple[str, str, int]]:
    """The buckets that count failures, each as (source for messages, name, burst and failures a minute)."""
    source = network(address)
    return [
        (source or 'this socket', f'failed {entry.id} {source}', FAILURES),
        ('everywhere for this key', f'failed {entry.id}', FAILURES_OF_ALL),
    ]
