"""Standard Webhooks signatures, over bytes (https://www.standardwebhooks.com, "Signature scheme").

The signed text is `<webhook-id>.<webhook-timestamp>.<body>`; the signature is its HMAC-SHA256 in base64.
"""

import binascii
import hmac
import re
from collections.abc import Mapping
from typing import Literal

from relay.config.secret import Secret

PREFIX = "whsec_"
TOLERANCE = 300
"""Seconds that a timestamp may be off, in either direction, as the reference libraries have it."""

_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_KEY_BYTES = range(24, 65)  # the specification's bounds


class SignatureError(Exception):
    """A request that is not signed as it should be; `problem` says what to look at."""

    def __init__(self, problem: Literal["headers", "timestamp", "signature"], message: str) -> None:
        super().__init__(message)
        self.problem = problem


class Signer:
    """Signs with every current secret, so that rotating one means adding the next."""

    __slots__ = ("_states",)

    def __init__(self, secrets: tuple[Secret, ...]) -> None:
        """Decode the secrets.

        Raises:
            ValueError: one of them is no key; the message does not hold it.
        """
        # A keyed state is copied per signature: a fifth faster than hmac.digest, which keys it again.
        self._states = tuple(hmac.new(decode_key(secret), digestmod="sha256") for secret in secrets)

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers of one attempt, made at `timestamp` (seconds since the epoch).

        Without secrets there is no `webhook-signature`.
        """
        headers = {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp)}
        if self._states:
            head = f"{webhook_id}.{timestamp}.".encode()
            headers["webhook-signature"] = " ".join([_sign(state, head, body) for state in self._states])
        return headers


def verify(
    secrets: tuple[Secret, ...],
    headers: Mapping[str, str],
    body: bytes,
    now: int,
    tolerance: int = TOLERANCE,
) -> None:
    """Check a signed request at `now` (seconds since the epoch), in constant time per signature.

    Raises:
        SignatureError: a header is missing, the timestamp is off, or no signature fits.
        ValueError: one of the secrets is no key.
    """
    given = {name.lower(): value for name, value in headers.items()}
    missing = [
        name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if not given.get(name)
    ]
    if missing:
        raise SignatureError("headers", f"missing {', '.join(missing)}")
    webhook_id, timestamp = given["webhook-id"], given["webhook-timestamp"]
    if not _TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("timestamp", "webhook-timestamp is not in whole seconds since 1970")
    late = now - int(timestamp)
    if abs(late) > tolerance:
        raise SignatureError(
            "timestamp", f"signed {abs(late)} s {'ago' if late > 0 else 'ahead'}, allowed are {tolerance} s"
        )
    # Header values may hold any surrogate: surrogatepass encodes each of them, and no two alike.
    head = f"{webhook_id}.{timestamp}.".encode("utf-8", "surrogatepass")
    candidates = [text.encode("utf-8", "surrogatepass") for text in given["webhook-signature"].split(" ")]
    fits = False
    for secret in secrets:
        expected = _sign(hmac.new(decode_key(secret), digestmod="sha256"), head, body).encode()
        for candidate in candidates:
            fits |= hmac.compare_digest(expected, candidate)
    if not fits:
        raise SignatureError("signature", "no signature fits: another secret, or the body was changed")


def decode_key(secret: Secret) -> bytes:
    """Return the key in `whsec_<base64>` or bare base64, padded or not.

    Raises:
        ValueError: it is no base64 of 24 to 64 bytes; the message does not hold it.
    """
    text = secret.reveal().removeprefix(PREFIX).rstrip("=")
    try:
        key = binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:  # also binascii.Error, and text that is not ASCII
        key = b""
    if len(key) not in _KEY_BYTES:
        raise ValueError("expected a signing secret: whsec_ and the base64 of 24 to 64 random bytes")
    return key


def _sign(state: hmac.HMAC, head: bytes, body: bytes) -> str:
    mac = state.copy()
    mac.update(head)
    mac.update(body)
    return "v1," + binascii.b2a_base64(mac.digest(), newline=False).decode()
