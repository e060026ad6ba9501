"""Certificate authorities for the tests, and their certificates in files as a service reads them."""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from laps.security.tls import TlsFiles

HERE = ("localhost", "127.0.0.1")
GATEWAY = "spiffe://laps/gateway"
WORKER = "spiffe://laps/worker"
_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs what it is asked to."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        # Authorities of one name would be taken for one another.
        name = f"laps tests {secrets.token_hex(4)}"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key.public_key(), expired=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(Encoding.PEM)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, expired: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _DAY)
            .not_valid_after(now - _DAY if expired else now + _DAY)
        )

    def issue(self, *names: str, expired: bool = False) -> tuple[bytes, bytes]:
        """Certificate and key for DNS names, addresses and URIs, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(x509.Name([]), key.public_key(), expired=expired)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate.public_bytes(Encoding.PEM), private

    def write(self, folder: Path, *names: str, trusted: bytes = b"", expired: bool = False) -> TlsFiles:
        """A new certificate in `folder`, over the one before. `trusted`: the authorities it comes with, if
        others than this one."""
        certificate, key = self.issue(*names, expired=expired)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"cert.pem": certificate, "key.pem": key, "ca.pem": trusted or self.pem}
        for name, content in contents.items():
            fresh = folder / f".{name}"
            fresh.write_bytes(content)
            fresh.replace(folder / name)
        return TlsFiles(*(str(folder / name) for name in contents))


def _general_name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
