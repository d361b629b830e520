"""API keys: how they are made and what of them is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A new key. `key` is shown once and kept nowhere; `hash` (argon2id) is what a configuration holds."""

    id: str
    key: str
    hash: str


def generate_key() -> ApiKey:
    """A new key: tt_<id>_<43 random characters>_<checksum>; the checksum tells a mistyped key without hashing it."""
    import secrets

    from argon2 import PasswordHasher

    key_id = secrets.token_hex(4)
    body = f'tt_{key_id}_{secrets.token_urlsafe(32)}'
    key = f'{body}_{checksum(body)}'
    return ApiKey(key_id, key, PasswordHasher().hash(key))


def checksum(body: str) -> str:
    """The last part of a key whose other parts are `body`: 8 hexadecimal digits."""
    import hashlib

    return hashlib.sha256(body.encode()).hexdigest()[:8]
