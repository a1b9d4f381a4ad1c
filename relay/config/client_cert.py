"""The client certificate for destinations that require mutual TLS."""

import ssl
from pathlib import Path
from typing import Annotated

import msgspec

from relay.config.problems import unreadable
from relay.config.secrets import Secret

# OpenSSL's reasons for a key that does not match: of the same type, and of another type.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


class ClientCert(msgspec.Struct, frozen=True, kw_only=True):
    """`client_cert = {…}` of a destination."""

    cert: Annotated[
        Path, msgspec.Meta(description="the certificate, followed by the intermediate certificates")
    ]  # PEM: the certificate, then the intermediate certificates
    key: Annotated[
        Path | None,
        msgspec.Meta(
            description="the private key; if this key is not set, the private key is in the file of the "
            "certificate"
        ),
    ] = None  # PEM; None: the key is in the file `cert`
    password: Annotated[
        Secret | None, msgspec.Meta(description="a secret with the password of an encrypted private key")
    ] = None  # for an encrypted key

    def load_into(self, context: ssl.SSLContext) -> None:
        """Load the certificate into a TLS context.

        Raises:
            ValueError: a file cannot be read or used; names the file, never the password.
        """
        key = self.key or self.cert
        for path in (self.cert, key):
            try:
                path.open("rb").close()
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {unreadable(path, error)}") from None
        password = _Password(self.password)
        try:
            # load_cert_chain does not say which of the two files is invalid; this checks the certificate.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self.cert)
        except ssl.SSLError:
            raise ValueError(f"{self.cert} has no certificate in PEM form") from None
        try:
            context.load_cert_chain(self.cert, key, password)
        except (ssl.SSLError, ValueError) as error:  # ValueError: a password longer than OpenSSL takes
            raise ValueError(self._trouble(key, password, getattr(error, "reason", None))) from None

    def _trouble(self, key: Path, password: "_Password", reason: str | None) -> str:
        if reason in _MISMATCHES:
            return f"the key in {key} does not match the certificate in {self.cert}"
        if password.asked:
            advice = "`password` does not decrypt it" if self.password else "set `password`"
            return f"the key in {key} is encrypted; {advice}"
        if reason is None:
            return f"{key} has no private key in PEM form"
        return f"{self.cert} cannot be used: {reason.replace('_', ' ').lower()}"


class _Password:
    """Passes the password to OpenSSL without a prompt, and records whether OpenSSL requested it."""

    def __init__(self, secret: Secret | None) -> None:
        self._secret = secret
        self.asked = False

    def __call__(self) -> str:
        self.asked = True
        return self._secret.reveal() if self._secret else ""
