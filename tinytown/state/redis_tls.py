"""TLS towards Redis. Imported only by those whose `redis.url` wants it: ssl costs time and memory."""

from __future__ import annotations

import ssl
from pathlib import Path


class TlsSocket(ssl.SSLSocket):
    """A client's socket that says BlockingIOError where a plain one would, so that an event loop need not know.

    With a size of 16,384 (a record) or more `recv` leaves nothing decrypted behind: the next event tells of the rest.
    What `send` could not send must be given to it again at the beginning of the next: it may be half on its way.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: object, flags: int = 0) -> int:
        try:
            return super().send(data, flags)  # type: ignore[arg-type]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


def client_context(ca: Path | None, cert: Path | None, key: Path | None, check_hostname: bool) -> ssl.SSLContext:
    """TLS 1.2 or newer; without a `ca` the machine's authorities count. Raises OSError (ssl.SSLError is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_hostname
    if ca:
        context.load_verify_locations(ca)
    else:
        context.load_default_certs()
    if cert:
        context.load_cert_chain(cert, key, password='')  # an encrypted key is an error, and no question on the terminal
    return context
