"""Standard Webhooks signatures (https://www.standardwebhooks.com, "Signature scheme").

The signed text is `<webhook-id>.<webhook-timestamp>.<body>`. A signature is `v1,` and the base64 of its
HMAC-SHA256, or `v1a,` and the base64 of its ed25519 signature. A header may contain several, separated by
spaces.
"""

import binascii
import hmac
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from relay.config.secrets import Secret
from relay.keys import has_signed, is_asymmetric, private_key, public_key, shared_key

TOLERANCE = 300
"""Seconds that a timestamp may differ from now, in both directions, as in the reference libraries."""

_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_HMAC, _ED25519 = "v1,", "v1a,"


class SignatureError(Exception):
    """The signature of a request is invalid; `problem` is the part that is wrong."""

    def __init__(self, problem: Literal["headers", "timestamp", "signature"], message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Signer:
    """Signs with every configured secret of both kinds; to rotate a secret, add the next one."""

    __slots__ = ("_signatures",)

    def __init__(self, secrets: tuple[Secret, ...]) -> None:
        """Decode the secrets.

        Raises:
            ValueError: one of them cannot sign; the message does not contain it.
        """
        self._signatures = tuple(map(_signature_of, secrets))

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers of an attempt that begins at `timestamp` (seconds since the epoch).

        Without secrets, `webhook-signature` is missing.
        """
        headers = {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp)}
        if self._signatures:
            head = f"{webhook_id}.{timestamp}.".encode()
            headers["webhook-signature"] = " ".join([sign(head, body) for sign in self._signatures])
        return headers


def verify(
    secrets: tuple[Secret, ...],
    headers: Mapping[str, str],
    body: bytes,
    now: int,
    tolerance: int = TOLERANCE,
) -> None:
    """Verify a signed request at `now` (seconds since the epoch), in constant time per signature.

    A secret is `whsec_…`, or for ed25519 the sender's `whpk_…` (or its `whsk_…`).

    Raises:
        SignatureError: a header is missing, the timestamp is out of range, or no signature fits.
        ValueError: one of the secrets is not a key.
    """
    given = {name.lower(): value for name, value in headers.items()}
    missing = [
        name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if not given.get(name)
    ]
    if missing:
        raise SignatureError("headers", f"missing {', '.join(missing)}")
    webhook_id, timestamp = given["webhook-id"], given["webhook-timestamp"]
    if not _TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("timestamp", "webhook-timestamp is not a whole number of seconds since 1970")
    late = now - int(timestamp)
    if abs(late) > tolerance:
        raise SignatureError(
            "timestamp", f"signed {abs(late)} s {'ago' if late > 0 else 'ahead'}, the limit is {tolerance} s"
        )
    # Header values may contain any surrogate; surrogatepass encodes each one differently.
    head = f"{webhook_id}.{timestamp}.".encode("utf-8", "surrogatepass")
    candidates = [text.encode("utf-8", "surrogatepass") for text in given["webhook-signature"].split(" ")]
    matches = False
    for secret in secrets:
        matches |= (_matches_pair if is_asymmetric(secret) else _matches_shared)(
            secret, candidates, head, body
        )
    if not matches:
        raise SignatureError("signature", "no signature fits: the secret differs, or the body was changed")


def _signature_of(secret: Secret) -> Callable[[bytes, bytes], str]:
    """Return a function that signs head and body with a secret."""
    if is_asymmetric(secret):
        return partial(_sign_by_pair, private_key(secret).sign)
    # Copying a keyed state for each signature is a fifth faster than hmac.digest, which keys it again.
    return partial(_sign, hmac.new(shared_key(secret), digestmod="sha256"))


def _sign(state: hmac.HMAC, head: bytes, body: bytes) -> str:
    mac = state.copy()
    mac.update(head)
    mac.update(body)
    return _HMAC + binascii.b2a_base64(mac.digest(), newline=False).decode()


def _sign_by_pair(sign: Callable[[bytes], bytes], head: bytes, body: bytes) -> str:
    return _ED25519 + binascii.b2a_base64(sign(head + body), newline=False).decode()


def _matches_shared(secret: Secret, candidates: list[bytes], head: bytes, body: bytes) -> bool:
    expected, matches = _signature_of(secret)(head, body).encode(), False
    for candidate in candidates:
        matches |= hmac.compare_digest(expected, candidate)
    return matches


def _matches_pair(secret: Secret, candidates: list[bytes], head: bytes, body: bytes) -> bool:
    key, version = public_key(secret), _ED25519.encode()
    for candidate in candidates:
        if candidate.startswith(version):
            try:
                signature = binascii.a2b_base64(candidate.removeprefix(version), strict_mode=True)
            except binascii.Error:
                continue
            if has_signed(key, signature, head + body):
                return True
    return False
