"""TLS on the server's side: a context made from the settings, and a non-blocking socket for the event loop.

Start with `server_context`. It checks the certificate with a handshake in memory, so that one which clients would
refuse stops the start. OpenSSL verifies client certificates against the configured authorities; it also refuses a
certificate whose extended key usage lacks clientAuth. `connection` uses `TlsSocket`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import BadRequest, UsageError
from ..settings import MtlsSettings, TlsSettings
from .http1 import Request, problem, render_response

_RECORD: Final = 16384  # the most bytes that one TLS record carries (RFC 8446, 5.1)
_ROUNDS: Final = 4  # of the handshake in memory; TLS 1.3 needs two
_PLAIN_CHUNK: Final = 65536
_REASONS: Final = {
    'KEY_VALUES_MISMATCH': 'is not the key of the certificate {cert}; give a certificate and its own key',
    'EE_KEY_TOO_SMALL': 'has a key that is too short to be safe; make a new one, with at least RSA 2048 or P-256',
}

# ----------------------------------------------------------------------------------------------------------- context


def server_context(tls: TlsSettings, mtls: MtlsSettings, root: Path) -> ssl.SSLContext:
    """A context for the server: TLS 1.2 and 1.3, ALPN http/1.1, client certificates according to `mtls`.

    Relative paths start at `root`. Raises UsageError, with the file and what to do, if a file is missing or unreadable,
    the key does not match or other users can read it, or the certificate is not valid now or not for servers.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(['http/1.1'])
    cert = _file(root, 'townhall.tls.cert_path', tls.cert_path)
    key = _file(root, 'townhall.tls.key_path', tls.key_path)
    _check_private(key)
    _load_pair(context, cert, key)
    _try_handshake(context, cert)
    if mtls.enabled:
        _request_client_certificates(context, mtls, root)
    return context


def _file(root: Path, setting: str, path: str) -> Path:
    """The file of a setting. Raises UsageError if it can't be read."""
    if not path:
        raise UsageError(f'{setting} is missing; give the path of a PEM file')
    file = root / path
    try:
        file.read_bytes()
    except OSError as e:
        raise UsageError(f'{setting} = {path!r}: {file}: {e.strerror}; give the path of a PEM file') from None
    return file


def _check_private(key: Path) -> None:
    if key.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(f'{key}: every user of this machine can read this private key; run  chmod o-rwx {key}')


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def password() -> str:
        raise UsageError(f'{key}: the key is encrypted; decrypt it:  openssl pkey -in {key} -out plain.key')

    _check_pem(cert, b'CERTIFICATE-----', 'a certificate')
    _check_pem(key, b'PRIVATE KEY-----', 'a private key')
    try:
        context.load_cert_chain(cert, key, password)
    except ssl.SSLError as e:
        file = cert if e.reason == 'EE_KEY_TOO_SMALL' else key
        reason = _REASONS.get(e.reason or '', 'cannot be used with the certificate {cert}: ' + _reason(e))
        raise UsageError(f'{file} {reason.format(cert=cert)}') from None


def _check_pem(file: Path, mark: bytes, content: str) -> None:
    if mark not in file.read_bytes():
        raise UsageError(f'{file} does not contain {content}; give a PEM file (text that begins with -----BEGIN)')


def _try_handshake(context: ssl.SSLContext, cert: Path) -> None:
    """Makes a handshake in memory, with a client that trusts only this certificate: checks its dates and purpose."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.load_verify_locations(cert)
        sides = (client.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True))
        for _ in range(_ROUNDS):
            for side in sides:
                _continue_handshake(side)
    except ssl.SSLCertVerificationError as e:
        raise UsageError(f'{cert}: clients would refuse it: {e.verify_message}; get a new certificate') from None
    except ssl.SSLError as e:
        raise UsageError(f'{cert}: it cannot be used: {_reason(e)}') from None


def _continue_handshake(side: ssl.SSLObject) -> None:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        pass


def _request_client_certificates(context: ssl.SSLContext, mtls: MtlsSettings, root: Path) -> None:
    authorities = _file(root, 'townhall.mtls.ca_path', mtls.ca_path)
    _load_trusted(context, authorities, 'x509_ca', 'certificate of an authority')
    now = time.time()
    if all(ssl.cert_time_to_seconds(str(authority['notAfter'])) < now for authority in context.get_ca_certs()):
        raise UsageError(f'{authorities}: every authority in it has expired; give those that sign your clients now')
    context.verify_mode = ssl.CERT_REQUIRED if mtls.required else ssl.CERT_OPTIONAL
    if mtls.crl_path:
        revoked = _file(root, 'townhall.mtls.crl_path', mtls.crl_path)
        _load_trusted(context, revoked, 'crl', 'certificate revocation list')
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_trusted(context: ssl.SSLContext, file: Path, kind: str, content: str) -> None:
    """Loads authorities or revocation lists. `kind` is their key in cert_store_stats."""
    before = context.cert_store_stats()[kind]
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as e:
        raise UsageError(f'{file} contains no {content} that can be read ({_reason(e)}); give one in PEM') from None
    if context.cert_store_stats()[kind] == before:
        raise UsageError(f'{file} contains no {content}; give one in PEM')


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's reason code in words, without the source location."""
    return (error.reason or str(error)).replace('_', ' ').lower()


# ----------------------------------------------------------------------------------------------- client certificates


def subject(certificate: Mapping[str, Any] | None) -> str:
    """The name in a verified certificate (as from getpeercert): the common name, else the first alternative name.

    '' if there is no certificate, if it has several common names, or if the name is not printable text of at most 255
    characters.
    """
    if not certificate:
        return ''
    names = [value for part in certificate.get('subject', ()) for key, value in part if key == 'commonName']
    names = names or [value for _, value in certificate.get('subjectAltName', ())][:1]
    return names[0] if len(names) == 1 and names[0].isprintable() and len(names[0]) <= 255 else ''


# ------------------------------------------------------------------------------------------------------------ socket


class TlsSocket:
    """The server's side of a TLS connection, with the methods of a non-blocking socket.

    First call `handshake` until it returns 0. After a BlockingIOError of `send`, the next `send` must begin with the
    same bytes, because a part of them may be on the wire. Every method may raise OSError, if the peer has gone or
    violates TLS; `reason` puts such an error in words.
    """

    __slots__ = ('_clock', '_is_ready', '_tls', 'family')

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, clock: Callable[[], float] = time.time) -> None:
        sock.setblocking(False)
        self._clock = clock
        self.family = sock.family
        self._is_ready = False  # whether data is encrypted: the handshake is complete, and `shutdown` was not called
        self._tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def handshake(self) -> int:
        """Continues the handshake. Returns the event to wait for (POLLIN or POLLOUT), or 0 once it is complete.

        Raises OSError if it fails. A client that speaks plain HTTP gets an answer in plain HTTP first.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except ssl.SSLError as e:
            if e.reason == 'HTTP_REQUEST':
                self._answer_plainly()
            raise
        if self._tls.session_reused:
            self._check_expiry()
        self._is_ready = True
        return 0

    def _check_expiry(self) -> None:
        """Refuses an expired client certificate. OpenSSL does not verify it again when a session is resumed."""
        certificate = self._tls.getpeercert()
        if certificate and ssl.cert_time_to_seconds(str(certificate['notAfter'])) <= self._clock():
            raise OSError(errno.EACCES, 'client certificate: it has expired since its session began')

    @staticmethod
    def reason(error: OSError) -> str:
        """Why a handshake failed, in words for the log."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f'client certificate: {error.verify_message}'
        return _reason(error) if isinstance(error, ssl.SSLError) else error.strerror or type(error).__name__

    def _answer_plainly(self) -> None:
        """Refuses a plain HTTP request. Reads it first, because closing a socket with unread input resets it."""
        try:
            while len(socket.socket.recv(self._tls, _PLAIN_CHUNK)) == _PLAIN_CHUNK:
                pass
        except OSError:
            pass
        try:
            socket.socket.send(self._tls, _plain_answer())
            socket.socket.shutdown(self._tls, socket.SHUT_WR)
        except OSError:
            pass

    def subject(self) -> str:
        """The name in the client's certificate, '' without one. Call it after the handshake."""
        return subject(self._tls.getpeercert())

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes, b'' at the end. Raises BlockingIOError if there are none yet.

        With a `size` of at least one TLS record (16,384) no decrypted bytes stay behind (`pending` is 0), so polling
        the socket is enough. After `shutdown` the bytes are no longer decrypted: discard them.
        """
        if not self._is_ready:
            return socket.socket.recv(self._tls, size)
        try:
            return self._tls.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def pending(self) -> int:
        """The number of bytes that are decrypted but not yet returned by `recv`."""
        return self._tls.pending()

    def send(self, data: bytes | memoryview) -> int:
        """Sends as much as possible now. Returns the number of bytes; raises BlockingIOError if it is none."""
        view, sent = memoryview(data), 0
        while sent < len(view):
            try:
                sent += self._tls.send(view[sent : sent + _RECORD])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if sent:
                    break
                raise BlockingIOError from None
        return sent

    def shutdown(self, how: int) -> None:
        """Sends close_notify (RFC 8446, 6.1), then shuts the socket down."""
        self._send_close_notify()
        socket.socket.shutdown(self._tls, how)

    def close(self) -> None:
        self._send_close_notify()
        self._tls.close()

    def _send_close_notify(self) -> None:
        """Sends close_notify if possible, without waiting for the client's."""
        if self._is_ready:
            self._is_ready = False
            try:
                self._tls.unwrap()
            except (OSError, ValueError):  # the client has not answered yet, has gone, or has closed first
                pass

    def fileno(self) -> int:
        return self._tls.fileno()

    def setblocking(self, flag: bool) -> None:
        self._tls.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._tls.setsockopt(level, option, value)


def _plain_answer() -> bytes:
    error = BadRequest('this port speaks HTTPS; use https:// in the address', code='tls-required')
    request = Request('-', '-', '', 1, {}, id=os.urandom(8).hex())
    return render_response(problem(error, request.id), request, True)
