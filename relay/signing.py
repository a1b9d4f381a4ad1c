"""Signatures of deliveries: Standard Webhooks, and the schemes that `signatures` of a destination names.

In Standard Webhooks (https://www.standardwebhooks.com, "Signature scheme"), the signed text is
`<webhook-id>.<webhook-timestamp>.<body>`. A signature is `v1,` and the base64 of its HMAC-SHA256, or `v1a,`
and the base64 of its ed25519 signature. A header may contain several, separated by spaces.
"""

import binascii
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

from relay.base.template import parse
from relay.config.secrets import Secret
from relay.config.signatures import DEFAULT, SignatureConfig
from relay.keys import has_signed, is_asymmetric, private_key, public_key, shared_key

TOLERANCE = 300
"""Seconds that a timestamp may differ from now, in both directions, as in the reference libraries."""

_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_HMAC, _ED25519 = "v1,", "v1a,"
_NAMES = ("id", "timestamp", "signature")  # of headers, without their prefix

NO_MATCH = "no signature matches: the secret differs, or the body was changed"


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
            ValueError: a secret cannot sign; the message does not contain the secret.
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


class SchemeSigner:
    """Signs by one scheme other than Standard Webhooks."""

    def __init__(self, scheme: SignatureConfig, secrets: Sequence[Secret], *, method: str, url: str) -> None:
        """Prepare the scheme's own secrets, else `secrets`.

        Raises:
            ValueError: a secret is not a key; the message does not contain it.
        """
        self.scheme = scheme
        self.parts: list[str] = []  # of the signed text: literals, which begin with "=", and kinds
        for part in parse(scheme.signed).parts:
            self.parts.append(f"={part}" if isinstance(part, str) else part.kind)
        self._fixed = {"method": method.encode(), "url": url.encode()}
        self._states = [
            hmac.new(key_of(scheme, secret), digestmod=scheme.algorithm)
            for secret in scheme.secrets or secrets
        ]

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers of an attempt, as `Signer.headers` does."""
        scheme = self.scheme
        time = str(timestamp * 1000 if scheme.timestamp_unit == "ms" else timestamp)
        text = self.text(webhook_id, time, body)
        items = [] if scheme.timestamp_field is None else [scheme.timestamp_field + time]
        for state in self._states:
            mac = state.copy()
            mac.update(text)
            items.append(scheme.prefix + encoded(mac.digest(), scheme.encoding))
        headers = {scheme.header: scheme.separator.join(items)}
        if scheme.timestamp_header is not None:
            headers[scheme.timestamp_header] = time
        return headers

    def verify(self, headers: Mapping[str, str], body: bytes, now: int, tolerance: int = TOLERANCE) -> None:
        """Verify a signed request; arguments and errors are those of the function `verify`."""
        given = {name.lower(): value for name, value in headers.items()}
        scheme = self.scheme
        if not (value := given.get(scheme.header.lower(), "").strip()):
            raise SignatureError("headers", f"missing {scheme.header}")
        items = self.items(value)
        time = self.time(items, given)
        if scheme.timestamp_header is not None or scheme.timestamp_field is not None:
            _check_time(time, now, tolerance, milliseconds=scheme.timestamp_unit == "ms")
        text, matches = self.text(given.get("webhook-id", ""), time, body), False
        for state in self._states:
            mac = state.copy()
            mac.update(text)
            expected = (scheme.prefix + encoded(mac.digest(), scheme.encoding)).encode()
            for item in items:
                matches |= hmac.compare_digest(expected, item.encode("utf-8", "surrogatepass"))
        if not matches:
            raise SignatureError("signature", NO_MATCH)

    def items(self, value: str) -> list[str]:
        """Return the parts of the signature's header."""
        parts = value.split(self.scheme.separator) if self.scheme.separator else [value]
        return [part.strip() for part in parts]

    def time(self, items: Sequence[str], headers: Mapping[str, str]) -> str:
        """Return the time of a request as text, `""` without one; names in `headers` are lower-case."""
        scheme = self.scheme
        if scheme.timestamp_header is not None:
            return headers.get(scheme.timestamp_header.lower(), "").strip()
        field = scheme.timestamp_field
        return next((item[len(field) :] for item in items if field and item.startswith(field)), "")

    def text(self, webhook_id: str, time: str, body: bytes) -> bytes:
        """Return the signed text; `time` is as in the header."""
        values = {
            **self._fixed,
            "id": webhook_id.encode("utf-8", "surrogatepass"),
            "timestamp": time.encode("utf-8", "surrogatepass"),
            "body": body,
        }
        return b"".join([part[1:].encode() if part[0] == "=" else values[part] for part in self.parts])


class SvixSigner:
    """Signs as Standard Webhooks does, with Svix's header names (docs.svix.com, "Verifying payloads")."""

    def __init__(self, secrets: tuple[Secret, ...]) -> None:
        self._signer = Signer(secrets)

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers of an attempt, as `Signer.headers` does."""
        headers = self._signer.headers(webhook_id, timestamp, body)
        return {name.replace("webhook-", "svix-"): value for name, value in headers.items()}


class Signers:
    """Signs by several schemes, side by side."""

    def __init__(self, signers: Sequence["Signer | SvixSigner | SchemeSigner"]) -> None:
        self._signers = signers

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers of an attempt, as `Signer.headers` does."""
        headers: dict[str, str] = {}
        for signer in self._signers:
            headers |= signer.headers(webhook_id, timestamp, body)
        return headers


def signer_of(
    signatures: tuple[SignatureConfig, ...], secrets: tuple[Secret, ...], *, method: str, url: str
) -> Signer | Signers:
    """Return the signer of a destination's deliveries.

    Every scheme sends `webhook-id` and `webhook-timestamp`, so that receivers can find duplicates.

    Raises:
        ValueError: a secret is not a key of its scheme; the message does not contain it.
    """
    if signatures == DEFAULT:
        return Signer(secrets)
    by_name = {each.scheme: each for each in signatures}
    standard = by_name.get("standard")
    signers: list[Signer | SvixSigner | SchemeSigner] = [
        Signer(() if standard is None else standard.secrets or secrets)
    ]
    for scheme in signatures:
        if scheme.scheme == "svix":
            signers.append(SvixSigner(scheme.secrets or secrets))
        elif not scheme.is_standard:
            signers.append(SchemeSigner(scheme, secrets, method=method, url=url))
    return Signers(signers)


def key_of(scheme: SignatureConfig, secret: Secret) -> bytes:
    """Return the key that a secret is in a scheme other than Standard Webhooks.

    Raises:
        ValueError: it is not in the scheme's `key_encoding`, or the private key of a pair; the message does
            not contain it.
    """
    text = secret.reveal()
    if is_asymmetric(secret):
        raise ValueError("an ed25519 key signs Standard Webhooks only; this scheme needs a shared secret")
    try:
        if scheme.key_encoding == "hex":
            return bytes.fromhex(text)
        if scheme.key_encoding == "base64":
            return binascii.a2b_base64(text.encode(), strict_mode=True)
    except ValueError:
        raise ValueError(f"the secret is not {scheme.key_encoding}, which `key_encoding` requires") from None
    return text.encode()


def check_key(scheme: SignatureConfig, secret: Secret) -> None:
    """Check that a secret can sign by a scheme.

    Raises:
        ValueError: the secret cannot sign by this scheme; the message does not contain the secret.
    """
    if scheme.is_standard:
        Signer((secret,))
    elif not key_of(scheme, secret):
        raise ValueError("the secret is empty")


def encoded(signature: bytes, encoding: str) -> str:
    """Return a signature as text: `hex` or `base64`."""
    if encoding == "hex":
        return signature.hex()
    return binascii.b2a_base64(signature, newline=False).decode()


def sign_standard_webhooks(
    secrets: Sequence[Secret], webhook_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """Return the headers that sign a request with each secret (seconds since 1970); raises as `Signer`."""
    return Signer(tuple(secrets)).headers(webhook_id, timestamp, body)


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
        SignatureError: a header is missing, the timestamp is out of range, or no signature matches.
        ValueError: one of the secrets is not a key.
    """
    given = {name.lower(): value for name, value in headers.items()}
    missing = [
        name for name in ("webhook-id", "webhook-timestamp", "webhook-signature") if not given.get(name)
    ]
    if missing:
        raise SignatureError("headers", f"missing {', '.join(missing)}")
    webhook_id, timestamp = given["webhook-id"], given["webhook-timestamp"]
    _check_time(timestamp, now, tolerance, name="webhook-timestamp")
    # Header values may contain any surrogate; surrogatepass encodes each one differently.
    head = f"{webhook_id}.{timestamp}.".encode("utf-8", "surrogatepass")
    candidates = [text.encode("utf-8", "surrogatepass") for text in given["webhook-signature"].split(" ")]
    matches = False
    for secret in secrets:
        if (_matches_pair if is_asymmetric(secret) else _matches_shared)(secret, candidates, head, body):
            matches = True
            secret.usage.count += 1
    if not matches:
        raise SignatureError("signature", NO_MATCH)


def verifier_of(
    scheme: SignatureConfig, secrets: tuple[Secret, ...]
) -> Callable[[Mapping[str, str], bytes, int], None]:
    """Return a function of headers, body and time (seconds since 1970) that raises as `verify` does.

    Raises:
        ValueError: one of the secrets is not a key of the scheme.
    """
    if not scheme.is_standard:
        return SchemeSigner(scheme, secrets, method="", url="").verify
    with suppress(SignatureError):  # a secret that is not a key raises ValueError
        verify(secrets, {"webhook-id": "-", "webhook-timestamp": "0", "webhook-signature": "-"}, b"", 0)
    if scheme.scheme == "standard":
        return partial(verify, secrets)

    def verify_svix(headers: Mapping[str, str], body: bytes, now: int) -> None:
        lower = {name.lower(): value for name, value in headers.items()}
        try:
            verify(secrets, {f"webhook-{name}": lower.get(f"svix-{name}", "") for name in _NAMES}, body, now)
        except SignatureError as error:
            raise SignatureError(error.problem, str(error).replace("webhook-", "svix-")) from None

    return verify_svix


def _check_time(
    timestamp: str, now: int, tolerance: int, *, name: str = "the time", milliseconds: bool = False
) -> None:
    """Raise SignatureError unless a time is a number and close to `now`."""
    unit = "milliseconds" if milliseconds else "seconds"
    if not _TIMESTAMP.fullmatch(timestamp[:-3] if milliseconds else timestamp):
        raise SignatureError("timestamp", f"{name} is not a whole number of {unit} since 1970")
    late = now - int(timestamp[:-3] if milliseconds else timestamp)
    if abs(late) > tolerance:
        raise SignatureError(
            "timestamp", f"signed {abs(late)} s {'ago' if late > 0 else 'ahead'}, the limit is {tolerance} s"
        )


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
