"""TLS of the server: a context from the settings, and a socket for a loop that never waits.

What is configured is checked before it is used, with a handshake against ourselves: what a client would refuse stops
the start. Client certificates are verified by OpenSSL against the given authorities; one whose extended key usage
lacks clientAuth is refused there too.
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
_ROUNDS: Final = 4  # of a handshake in memory; TLS 1.3 needs two
_PLAIN_CHUNK: Final = 65536
_REASONS: Final = {
    'KEY_VALUES_MISMATCH': 'is not the key of the certificate {cert}; give the two that belong together',
    'EE_KEY_TOO_SMALL': 'has a key that is too short to be safe; have one made with RSA 2048 or P-256 at least',
}

# ----------------------------------------------------------------------------------------------------------- context


def server_context(tls: TlsSettings, mtls: MtlsSettings, root: Path) -> ssl.SSLContext:
    """A context for the server's side: TLS 1.2 and 1.3, HTTP/1.1, client certificates as `mtls` says.

    Relative paths start at `root`. Raises UsageError that names the file and the mend: one that is missing, a key that
    does not match or that others can read, a certificate that is not valid now or not for servers, an authority or
    revocation list that can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(['http/1.1'])
    cert = _file(root, 'townhall.tls.cert_path', tls.cert_path)
    key = _file(root, 'townhall.tls.key_path', tls.key_path)
    _check_private(key)
    _load_pair(context, cert, key)
    _shake_own_hand(context, cert)
    if mtls.enabled:
        _ask_for_certificates(context, mtls, root)
    return context


def _file(root: Path, path: str, given: str) -> Path:
    """A configured file that can be read."""
    if not given:
        raise UsageError(f'{path} is missing; give the path of a PEM file')
    file = root / given
    try:
        file.read_bytes()
    except OSError as e:
        raise UsageError(f'{path} = {given!r}: {file}: {e.strerror}; give the path of a PEM file') from None
    return file


def _check_private(key: Path) -> None:
    if key.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(f'{key}: every user of this machine can read this private key; run  chmod o-rwx {key}')


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def ask() -> str:
        raise UsageError(f'{key}: the key is encrypted; decrypt it:  openssl pkey -in {key} -out plain.key')

    _try_pem(cert, b'CERTIFICATE-----', 'holds no certificate')
    _try_pem(key, b'PRIVATE KEY-----', 'holds no private key')
    try:
        context.load_cert_chain(cert, key, ask)
    except ssl.SSLError as e:
        about = cert if e.reason == 'EE_KEY_TOO_SMALL' else key
        says = _REASONS.get(e.reason or '', 'can not be used with the certificate {cert}: ' + _reason(e))
        raise UsageError(f'{about} {says.format(cert=cert)}') from None


def _try_pem(file: Path, mark: bytes, lacks: str) -> None:
    if mark not in file.read_bytes():
        raise UsageError(f'{file} {lacks}; give a file in PEM (text that begins with -----BEGIN)')


def _shake_own_hand(context: ssl.SSLContext, cert: Path) -> None:
    """A handshake in memory, with a client that trusts this certificate and nothing else: its dates and its purpose."""
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname = False
    asking.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        asking.load_verify_locations(cert)
        sides = (asking.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True))
        for _ in range(_ROUNDS):
            for side in sides:
                _step(side)
    except ssl.SSLCertVerificationError as e:
        raise UsageError(f'{cert}: clients would refuse it: {e.verify_message}; have a new one made') from None
    except ssl.SSLError as e:
        raise UsageError(f'{cert}: it can not be used: {_reason(e)}') from None


def _step(side: ssl.SSLObject) -> None:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        pass


def _ask_for_certificates(context: ssl.SSLContext, mtls: MtlsSettings, root: Path) -> None:
    authorities = _file(root, 'townhall.mtls.ca_path', mtls.ca_path)
    _load_trusted(context, authorities, 'x509_ca', 'no certificate of an authority')
    now = time.time()
    if all(ssl.cert_time_to_seconds(str(each['notAfter'])) < now for each in context.get_ca_certs()):
        raise UsageError(f'{authorities}: every authority in it has expired; give those that sign your clients now')
    context.verify_mode = ssl.CERT_REQUIRED if mtls.required else ssl.CERT_OPTIONAL
    if mtls.crl_path:
        revoked = _file(root, 'townhall.mtls.crl_path', mtls.crl_path)
        _load_trusted(context, revoked, 'crl', 'no certificate revocation list')
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_trusted(context: ssl.SSLContext, file: Path, kind: str, lacks: str) -> None:
    before = context.cert_store_stats()[kind]
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as e:
        raise UsageError(f'{file}: it holds {lacks} that can be read ({_reason(e)}); give one in PEM') from None
    if context.cert_store_stats()[kind] == before:
        raise UsageError(f'{file}: it holds {lacks}; give one in PEM')


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's own words, without where in its source they stand."""
    return (error.reason or str(error)).replace('_', ' ').lower()


# ----------------------------------------------------------------------------------------------- client certificates


def subject(certificate: Mapping[str, Any] | None) -> str:
    """Whom a verified certificate (as getpeercert gives it) names: the common name, else the first alternative name.

    '' without a certificate, and where that name is no printable text of at most 255 characters, or is not one.
    """
    if not certificate:
        return ''
    names = [value for part in certificate.get('subject', ()) for key, value in part if key == 'commonName']
    names = names or [value for _, value in certificate.get('subjectAltName', ())][:1]
    return names[0] if len(names) == 1 and names[0].isprintable() and len(names[0]) <= 255 else ''


# ------------------------------------------------------------------------------------------------------------ socket


class TlsSocket:
    """The server's side of a TLS connection, with the methods of a socket that does not block.

    Call `handshake` until it gives 0, waiting for what it gives meanwhile. After a BlockingIOError of `send` the next
    one must begin with the same bytes, because they may be half on the wire. Every method may raise OSError: the peer
    is gone, or does not keep to TLS; `reason` says it in words.
    """

    __slots__ = ('_clock', '_is_ready', '_tls', 'family')

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, clock: Callable[[], float] = time.time) -> None:
        sock.setblocking(False)
        self._clock = clock
        self.family = sock.family
        self._is_ready = False  # whether what is sent and received is encrypted
        self._tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def handshake(self) -> int:
        """Goes on with the handshake: POLLIN or POLLOUT to wait for, or 0 when it is done.

        Raises OSError when it failed. A client that speaks plain HTTP is told so before.
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
            self._check_again()
        self._is_ready = True
        return 0

    def _check_again(self) -> None:
        """OpenSSL does not verify the certificate of a session that goes on, which may be over meanwhile."""
        certificate = self._tls.getpeercert()
        if certificate and ssl.cert_time_to_seconds(str(certificate['notAfter'])) <= self._clock():
            raise OSError(errno.EACCES, 'client certificate: it has expired since its session began')

    @staticmethod
    def reason(error: OSError) -> str:
        """Why a handshake failed, in words: for the log."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f'client certificate: {error.verify_message}'
        return _reason(error) if isinstance(error, ssl.SSLError) else error.strerror or type(error).__name__

    def _answer_plainly(self) -> None:
        """Refuses a plain request, which is taken from the socket first, lest closing it resets the connection."""
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
        """Whom the client's certificate names, '' without one; after the handshake."""
        return subject(self._tls.getpeercert())

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes, b'' at the end; BlockingIOError when there are none.

        With a size of 16,384 or more nothing is left in memory (`pending` is 0), so the next event tells of the rest.
        After `shutdown` what comes is not decrypted any more: it is only good to be dropped.
        """
        if not self._is_ready:
            return socket.socket.recv(self._tls, size)
        try:
            return self._tls.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def pending(self) -> int:
        """How many bytes are decrypted and not yet received."""
        return self._tls.pending()

    def send(self, data: bytes | memoryview) -> int:
        """Sends what can be sent now, and gives how much it was; BlockingIOError when it is nothing."""
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
        """Tells the client that no more will come (close_notify; RFC 8446, 6.1), and then shuts the socket down."""
        self._take_leave()
        socket.socket.shutdown(self._tls, how)

    def close(self) -> None:
        self._take_leave()
        self._tls.close()

    def _take_leave(self) -> None:
        """Sends close_notify if that is possible now; the client's own is not waited for."""
        if self._is_ready:
            self._is_ready = False
            try:
                self._tls.unwrap()
            except (OSError, ValueError):  # it has not answered, or is gone, or was the first to leave
                pass

    def fileno(self) -> int:
        return self._tls.fileno()

    def setblocking(self, flag: bool) -> None:
        self._tls.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._tls.setsockopt(level, option, value)


def _plain_answer() -> bytes:
    error = BadRequest('this port speaks HTTPS; write https:// in the address', code='tls-required')
    request = Request('-', '-', '', 1, {}, id=os.urandom(8).hex())
    return render_response(problem(error, request.id), request, True)
