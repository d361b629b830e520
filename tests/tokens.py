"""A token issuer on loopback, and a signer for valid and forged tokens."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b'=').decode()


@dataclass
class Signer:
    """A private key, and the kid under which its public key is published."""

    private: Private
    kid: str

    @classmethod
    def rsa(cls, kid: str, bits: int = 2048) -> Signer:
        return cls(rsa.generate_private_key(65537, bits), kid)

    @classmethod
    def ec(cls, kid: str) -> Signer:
        return cls(ec.generate_private_key(ec.SECP256R1()), kid)

    @classmethod
    def ed(cls, kid: str) -> Signer:
        return cls(ed25519.Ed25519PrivateKey.generate(), kid)

    @property
    def algorithm(self) -> str:
        if isinstance(self.private, rsa.RSAPrivateKey):
            return 'RS256'
        return 'ES256' if isinstance(self.private, ec.EllipticCurvePrivateKey) else 'EdDSA'

    def jwk(self, **more: Any) -> dict[str, Any]:
        """The public key as a JWK."""
        jwk: dict[str, Any]
        if isinstance(self.private, rsa.RSAPrivateKey):
            jwk = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        elif isinstance(self.private, ec.EllipticCurvePrivateKey):
            jwk = ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        else:
            jwk = OKPAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        jwk.pop('key_ops', None)
        return jwk | {'kid': self.kid} | more

    def sign(self, data: bytes) -> bytes:
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(data, padding.PKCS1v15(), hashes.SHA256())
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(data)
        r, s = decode_dss_signature(self.private.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, 'big') + s.to_bytes(32, 'big')

    def token(self, claims: dict[str, Any] | bytes, **header: Any) -> str:
        """A signed token. Header members that are None are left out. `claims` in bytes are signed unchanged."""
        head = {'alg': self.algorithm, 'kid': self.kid, 'typ': 'at+jwt'} | header
        payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
        kept = {name: value for name, value in head.items() if value is not None}
        body = f'{base64url(json.dumps(kept).encode())}.{base64url(payload)}'
        return f'{body}.{base64url(self.sign(body.encode()))}'


@dataclass
class Issuer:
    """An issuer over HTTP. A test changes its fields to make it rotate keys, fail, or lie.

    `calls` lists the requested paths. Answers wait until `gate` is set.
    """

    url: str = ''
    keys: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    drips: bool = False
    gate: threading.Event = field(default_factory=threading.Event)

    def claims(self, **more: Any) -> dict[str, Any]:
        """The claims of a valid token. Claims that are None are left out."""
        now = int(time.time())
        claims = {'iss': self.url, 'aud': 'town', 'sub': 'ann', 'iat': now, 'exp': now + 300, 'scope': 'town.read'}
        return {name: value for name, value in (claims | more).items() if value is not None}

    def answer(self, path: str) -> bytes:
        if self.body is not None:
            return self.body
        document = {'issuer': self.url, 'jwks_uri': f'{self.url}/keys'} | self.discovery
        return json.dumps(document if 'openid' in path else {'keys': self.keys}).encode()


@contextmanager
def issuing(*signers: Signer) -> Iterator[Issuer]:
    """Runs an issuer that publishes the keys of these signers."""
    issuer = Issuer(keys=[signer.jwk() for signer in signers])
    issuer.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.calls.append(self.path)
            issuer.gate.wait(20)
            body = issuer.answer(self.path)
            self.send_response(issuer.status)
            for name, value in issuer.headers.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            try:
                self.write(body)
            except OSError:
                pass  # the client is gone

        def write(self, body: bytes) -> None:
            for part in [body[i : i + 1] for i in range(len(body))] if issuer.drips else [body]:
                self.wfile.write(part)
                if issuer.drips:
                    threading.Event().wait(0.05)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(('127.0.0.1', 0), Handler) as server:
        issuer.url = f'http://127.0.0.1:{server.server_address[1]}'
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        try:
            yield issuer
        finally:
            issuer.gate.set()
            server.shutdown()
            thread.join()
