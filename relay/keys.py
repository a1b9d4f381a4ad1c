"""The text forms of Standard Webhooks keys (specification, "Signature scheme").

| text | key | signatures |
|---|---|---|
| `whsec_…`, or bare base64 | a secret that both sides share | `v1`, HMAC-SHA256 |
| `whsk_…` | the private key of an ed25519 pair | `v1a` |
| `whpk_…` | its public key, enough for a receiver | `v1a`, to verify |

Ed25519 needs the library `cryptography`, which is imported with the first such key.
"""

import binascii
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from relay.config.secrets import Secret
from relay.errors import installing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SHARED, PRIVATE, PUBLIC = "whsec_", "whsk_", "whpk_"

_SHARED_BYTES = range(24, 65)  # the specification's bounds
_BYTES = 32  # of an ed25519 key, either one (RFC 8032 §5.1.5)
_MISSING = f"this kind of key needs the package cryptography: {installing('cryptography')}"


def is_asymmetric(secret: Secret) -> bool:
    """Return whether a key belongs to an ed25519 pair."""
    return secret.reveal().startswith((PRIVATE, PUBLIC))


def shared_key(secret: Secret) -> bytes:
    """Return the key in `whsec_<base64>` or bare base64, padded or not.

    Raises:
        ValueError: it is not base64 of 24 to 64 bytes; the message does not contain it.
    """
    key = _decoded(secret, SHARED)
    if len(key) not in _SHARED_BYTES:
        raise ValueError("expected a signing secret: whsec_ and the base64 of 24 to 64 random bytes")
    return key


def private_key(secret: Secret) -> "Ed25519PrivateKey":
    """Return the key in `whsk_<base64>`, padded or not.

    The specification only says "base64 encoded". The reference server (Svix) writes 64 bytes, the private key
    and then the public one; other tools write only the private key.

    Raises:
        ValueError: it is not a private key, its halves do not match, or `cryptography` is missing; the
            message does not contain the key.
    """
    if secret.reveal().startswith(PUBLIC):
        raise ValueError("a whpk_ key only verifies, at the receiver; to sign, use the whsk_ key of its pair")
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - an extra
    except ImportError:
        raise ValueError(_MISSING) from None
    text = _decoded(secret, PRIVATE)
    if len(text) not in (_BYTES, 2 * _BYTES):
        raise ValueError("expected a signing secret: whsk_ and the base64 of an ed25519 key, 32 or 64 bytes")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(text[:_BYTES])
    if text[_BYTES:] not in (b"", key.public_key().public_bytes_raw()):
        raise ValueError("a damaged whsk_ key: its second half is not the public key of the first")
    return key


def public_key(secret: Secret) -> "Ed25519PublicKey":
    """Return the key in `whpk_<base64>`, padded or not, or the public key of a `whsk_…`.

    Raises:
        ValueError: it is neither of them, or `cryptography` is missing.
    """
    if secret.reveal().startswith(PRIVATE):
        return private_key(secret).public_key()
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - an extra
    except ImportError:
        raise ValueError(_MISSING) from None
    text = _decoded(secret, PUBLIC)
    if len(text) != _BYTES:
        raise ValueError("expected a public key: whpk_ and the base64 of 32 bytes")
    return ed25519.Ed25519PublicKey.from_public_bytes(text)


def has_signed(key: "Ed25519PublicKey", signature: bytes, text: bytes) -> bool:
    """Return whether a signature of a text was made with the private key of this public key."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra, which created the key

    try:
        key.verify(signature, text)
    except InvalidSignature:
        return False
    return True


def ed25519_verifier(text: str) -> Callable[[bytes, bytes], bool]:
    """Return a function of signature and signed bytes that checks the signature by a public key.

    Args:
        text: the 32 bytes of the key (RFC 8032) as hex or base64, or a `whpk_…`.

    Raises:
        ValueError: it is not such a key, or `cryptography` is missing; the message does not contain it.
    """
    text = text.strip()
    is_hex = len(text) == 2 * _BYTES and not text.startswith(PUBLIC)
    try:
        raw = bytes.fromhex(text) if is_hex else _decoded(Secret(text), PUBLIC)
    except ValueError:
        raw = b""
    if len(raw) != _BYTES:
        raise ValueError("expected an ed25519 public key: 32 bytes as hex or base64")
    key = public_key(Secret(PUBLIC + binascii.b2a_base64(raw, newline=False).decode()))
    return partial(has_signed, key)


def ecdsa_verifier(text: str) -> Callable[[bytes, bytes], bool]:
    """Return a function of signature and signed bytes that checks the signature by a public key.

    Signatures are DER (RFC 3279, 2.2.3) over SHA-256.

    Args:
        text: a P-256 key: base64 of a DER SubjectPublicKeyInfo (RFC 5480), or PEM.

    Raises:
        ValueError: it is not such a key, or `cryptography` is missing; the message does not contain it.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - an extra
    except ImportError:
        raise ValueError(_MISSING) from None
    encoded = "".join(line for line in text.splitlines() if not line.startswith("-----"))
    try:
        key = serialization.load_der_public_key(_decoded(Secret(encoded.strip()), ""))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    public = key if isinstance(key, ec.EllipticCurvePublicKey) else None
    if public is None or not isinstance(public.curve, ec.SECP256R1):
        raise ValueError("expected an ECDSA public key on P-256: base64 of DER, or PEM")
    algorithm = ec.ECDSA(hashes.SHA256())

    def is_valid(signature: bytes, message: bytes) -> bool:
        try:
            public.verify(signature, message, algorithm)
        except InvalidSignature:
            return False
        return True

    return is_valid


def _decoded(secret: Secret, prefix: str) -> bytes:
    """Return the bytes of the base64 text after a prefix; no bytes if it is not base64."""
    text = secret.reveal().removeprefix(prefix).rstrip("=")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:  # also binascii.Error, and text that is not ASCII
        return b""
