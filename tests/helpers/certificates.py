"""Valid and invalid certificates for receivers and clients."""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)
HERE = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


class Certificates:
    """A CA with certificates `good`, `brief`, `expired`, `wrong_name`, `client`; and one `self_signed`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / "ca.pem"
        self.key = folder / "key.pem"  # the key of all certificates
        self.key.write_bytes(self.private(serialization.NoEncryption()))
        self._make("ca", issuer="ca", is_authority=True)
        self._make("self_signed", HERE, issuer="self_signed")
        self._make("good", HERE)
        self._make("brief", HERE, ends=DAY / 2)
        self._make("expired", HERE, ends=-DAY)
        self._make("wrong_name", [x509.DNSName("elsewhere.example")])
        self._make("client", [x509.DNSName("relay.example")])

    def server(self, name: str, *, demanding: bool = False) -> ssl.SSLContext:
        """Return a TLS context for a receiver; with `demanding`, clients must show a certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path(name), self.key)
        if demanding:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context

    def path(self, name: str) -> Path:
        """Return the path of a certificate."""
        return self._folder / f"{name}.pem"

    def ends(self, name: str) -> int:
        """Return the time at which a certificate expires, in microseconds since the epoch."""
        certificate = x509.load_pem_x509_certificate(self.path(name).read_bytes())
        return int(certificate.not_valid_after_utc.timestamp()) * 1_000_000

    def private(self, encryption: serialization.KeySerializationEncryption) -> bytes:
        """Return the key as PEM, encrypted or not."""
        return private_pem(self._key, encryption)

    def _make(self, name, names=(), *, issuer="ca", ends=DAY, is_authority=False) -> None:
        now, key = datetime.now(UTC), self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(issuer))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        self.path(name).write_bytes(made.public_bytes(serialization.Encoding.PEM))


def private_pem(key, encryption: serialization.KeySerializationEncryption | None = None) -> bytes:
    """Return a private key as PEM, encrypted or not."""
    encryption = encryption or serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
