"""The keys of Standard Webhooks as they are written (its specification, "Signature scheme").

| written | is | signatures |
|---|---|---|
| `whsec_…`, or bare base64 | a secret that both sides have | `v1`, HMAC-SHA256 |
| `whsk_…` | the private key of an ed25519 pair | `v1a` |
| `whpk_…` | its public key, all that a receiver needs | `v1a`, to verify |

Ed25519 is the library `cryptography`'s, which is imported when the first such key is met.
"""

import binascii
from typing import TYPE_CHECKING

from relay.config.secrets import Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SHARED, PRIVATE, PUBLIC = "whsec_", "whsk_", "whpk_"

_SHARED_BYTES = range(24, 65)  # the specification's bounds
_BYTES = 32  # of an ed25519 key, either one (RFC 8032 §5.1.5)
_MISSING = 'ed25519 keys need the library cryptography: pip install "hookferry[ed25519]"'


def is_asymmetric(secret: Secret) -> bool:
    """Say whether a key is one of an ed25519 pair."""
    return secret.reveal().startswith((PRIVATE, PUBLIC))


def shared_key(secret: Secret) -> bytes:
    """Return the key in `whsec_<base64>` or bare base64, padded or not.

    Raises:
        ValueError: it is no base64 of 24 to 64 bytes; the message does not hold it.
    """
    key = _decoded(secret, SHARED)
    if len(key) not in _SHARED_BYTES:
        raise ValueError("expected a signing secret: whsec_ and the base64 of 24 to 64 random bytes")
    return key


def private_key(secret: Secret) -> "Ed25519PrivateKey":
    """Return the key in `whsk_<base64>`, padded or not.

    The specification says no more than "base64 encoded"; the reference server (Svix) writes 64 bytes, the
    private key and behind it the public one. Other tools write the private key alone.

    Raises:
        ValueError: it is no such key, its halves do not belong together, or `cryptography` is missing;
            the message does not hold it.
    """
    if secret.reveal().startswith(PUBLIC):
        raise ValueError("a whpk_ key is for the receiver, to verify; sign with the whsk_ key of its pair")
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
    """Return the key in `whpk_<base64>`, padded or not, or the public one of a `whsk_…`.

    Raises:
        ValueError: it is no such key, or `cryptography` is missing.
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
    """Say whether a signature of a text is that of a key's owner."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra; the key came from it

    try:
        key.verify(signature, text)
    except InvalidSignature:
        return False
    return True


def _decoded(secret: Secret, prefix: str) -> bytes:
    """Return what stands in base64 behind a prefix, nothing where it is none."""
    text = secret.reveal().removeprefix(prefix).rstrip("=")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:  # also binascii.Error, and text that is not ASCII
        return b""
