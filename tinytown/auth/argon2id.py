"""argon2id (RFC 9106): uses the package argon2-cffi, or the bare C library that the one-file build contains.

The build calls the library through its C interface (argon2.h), which works with every Python version; the binding of
argon2-cffi is compiled for one version. `api_keys` uses this module.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..host import bundled

if TYPE_CHECKING:
    from ctypes import CDLL  # at run time it is imported late: it costs memory, and argon2-cffi does not need it

LIBRARY: Final = 'argon2.so'  # its name in the one-file build
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32
_MAX_ENCODED: Final = 256  # bytes; an encoded hash is shorter


def require() -> None:
    """Raises UsageError with what to install if argon2id is not available. Cheap: does not import argon2-cffi."""
    if not _is_installed():
        _library()


def hashed(secret: bytes, passes: int, memory: int) -> str:
    """The encoded hash of a secret ($argon2id$v=19$…). `memory` is in KiB. Raises UsageError."""
    salt = os.urandom(_SALT_BYTES)
    if _is_installed():
        from argon2.low_level import Type, hash_secret

        return hash_secret(secret, salt, passes, memory, 1, _HASH_BYTES, Type.ID).decode()
    from ctypes import create_string_buffer

    text = create_string_buffer(_MAX_ENCODED)
    status = _library().argon2id_hash_encoded(
        passes, memory, 1, secret, len(secret), salt, len(salt), _HASH_BYTES, text, len(text)
    )
    if status:
        raise MemoryError(f'argon2 returned {status}')  # our arguments rule out its other errors
    return text.value.decode()


def matches(secret: bytes, text: str) -> bool:
    """Whether an encoded hash matches a secret. Takes tens of milliseconds; other threads run meanwhile (no GIL)."""
    if _is_installed():
        from argon2.exceptions import InvalidHashError, VerificationError
        from argon2.low_level import Type, verify_secret

        try:
            return verify_secret(text.encode(), secret, Type.ID)
        except (VerificationError, InvalidHashError):
            return False
    return int(_library().argon2id_verify(text.encode(), secret, len(secret))) == 0


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return bool(find_spec('argon2') and find_spec('_argon2_cffi_bindings'))


@lru_cache(maxsize=1)
def _library() -> CDLL:
    """The library of the one-file build. Raises UsageError if this machine can't load it."""
    from ctypes import CDLL

    why = 'this build does not contain it for this machine'
    if file := bundled.find_bundled(LIBRARY):
        try:
            return _declared(CDLL(str(file)))
        except OSError as e:
            why = str(e)
    raise UsageError(f'API keys need argon2: {why}. Install it:  {sys.executable} -m pip install argon2-cffi')


def _declared(library: CDLL) -> CDLL:
    """The library with the argument types of the functions that we call (argon2.h)."""
    from ctypes import c_char_p, c_size_t, c_uint32

    number, size, data = c_uint32, c_size_t, c_char_p
    library.argon2id_hash_encoded.argtypes = (number, number, number, data, size, data, size, size, data, size)
    library.argon2id_verify.argtypes = (data, data, size)
    return library
