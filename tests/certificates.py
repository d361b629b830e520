"""Certificates for tests: a CA that signs and revokes them, and TLS contexts for clients."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
PEM = serialization.Encoding.PEM


def moment(days: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, part) for part in text.split('|') if part])


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, in files."""

    cert: Path
    key: Path
    made: x509.Certificate


@dataclass
class Authority:
    """A CA that writes certificates into a directory. Days count from now; | separates several common names."""

    directory: Path
    title: str = 'authority'
    days: tuple[float, float] = (-400, 400)
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / f'{self.title}.pem'
        made = self._builder(self.title, self.key.public_key(), self.days)
        made = made.add_extension(x509.BasicConstraints(True, None), True)
        self.path.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(PEM))

    def _builder(
        self, title: str, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, days: tuple[float, float]
    ) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(name(title)).issuer_name(name(self.title)).public_key(key)
        made = made.serial_number(x509.random_serial_number())
        return made.not_valid_before(moment(days[0])).not_valid_after(moment(days[1]))

    def sign(
        self,
        title: str,
        usage: ObjectIdentifier | None = None,
        days: tuple[float, float] = (-1, 30),
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
        password: bytes = b'',
        alternative: str = 'localhost',
    ) -> Pair:
        """Makes a certificate and its private key (mode 0600)."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        made = self._builder(title, key.public_key(), days)
        made = made.add_extension(x509.BasicConstraints(False, None), True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(alternative)]), False)
        if usage:
            made = made.add_extension(x509.ExtendedKeyUsage([usage]), False)
        signed = made.sign(self.key, hashes.SHA256())
        stem = f'{signed.serial_number:x}'
        pair = Pair(self.directory / f'{stem}.pem', self.directory / f'{stem}.key', signed)
        pair.cert.write_bytes(signed.public_bytes(PEM))
        closed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        pair.key.touch(0o600)
        pair.key.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, closed))
        return pair

    def revoke(self, *pairs: Pair, days: float = 30) -> Path:
        """Writes a revocation list of these certificates, valid for `days`."""
        made = x509.CertificateRevocationListBuilder().issuer_name(name(self.title))
        made = made.last_update(moment(-2)).next_update(moment(days))
        for pair in pairs:
            entry = x509.RevokedCertificateBuilder().serial_number(pair.made.serial_number)
            made = made.add_revoked_certificate(entry.revocation_date(moment(-2)).build())
        path = self.directory / f'{self.title}-{len(pairs)}-{days}.crl'
        path.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(PEM))
        return path

    def client(self, pair: Pair | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """The TLS context of a client that trusts this CA and may have a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.path)
        if pair:
            context.load_cert_chain(pair.cert, pair.key)
        if version:
            context.set_ciphers('ALL:@SECLEVEL=0')  # allows the old versions, too
            context.minimum_version = context.maximum_version = version
        return context
