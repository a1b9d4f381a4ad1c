"""Certificates for receivers, good and bad, made by the openssl command."""

import ssl
import subprocess
from pathlib import Path


class Certificates:
    """A small authority of our own: `good`, `expired`, `wrong_name`, `client`; and one `self_signed`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = folder / "ca.pem"
        self.key = folder / "key.pem"  # of all of them
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem")
        self._self_signed("ca.pem", "/CN=test authority", "basicConstraints=critical,CA:TRUE")
        self._self_signed("self_signed.pem", "/CN=localhost", "subjectAltName=IP:127.0.0.1")
        self._openssl("req", "-new", "-key", "key.pem", "-subj", "/CN=receiver", "-out", "request.pem")
        self._signed("good.pem", "DNS:localhost,IP:127.0.0.1", days=1)
        self._signed("expired.pem", "DNS:localhost,IP:127.0.0.1", days=-1)
        self._signed("wrong_name.pem", "DNS:elsewhere.example", days=1)
        self._signed("client.pem", "DNS:relay.example", days=1)

    def server(self, name: str, *, demanding: bool = False) -> ssl.SSLContext:
        """Return what a receiver with that certificate listens with; `demanding` one of its clients."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path(name), self.key)
        if demanding:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context

    def path(self, name: str) -> Path:
        """Return where a certificate is."""
        return self._folder / f"{name}.pem"

    def _self_signed(self, out: str, subject: str, extension: str) -> None:
        self._openssl(
            "req", "-x509", "-key", "key.pem", "-days", "1", "-subj", subject, "-addext", extension,
            "-out", out,
        )  # fmt: skip

    def _signed(self, out: str, names: str, days: int) -> None:
        (self._folder / "names").write_text(f"subjectAltName={names}\n")
        self._openssl(
            "x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "key.pem", "-CAcreateserial",
            "-days", str(days), "-extfile", "names", "-out", out,
        )  # fmt: skip

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)
