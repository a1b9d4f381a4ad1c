"""Secrets: given by environment, file, systemd credential or, in development, literally. Never printed."""

import hashlib
import hmac
from collections.abc import Iterator, Mapping

import msgspec


class Secret:
    """A value that prints as `<secret>`; `reveal` is for the moment of use only."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the clear text."""
        return self._value

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))


class Absent(Secret):
    """Stands for a secret that cannot be read here, where a command works without it."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        super().__init__("")
        self.why = why  # what is missing


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """One token that a source accepts, as a digest: the clear text is not kept."""

    digest: bytes  # of the token's bytes, see `digest`
    name: str = ""  # for logs; "" where config.toml names none
    scopes: frozenset[str] | None = None  # None: every scope

    def allows(self, scope: str) -> bool:
        """Say whether the token carries that scope."""
        return self.scopes is None or scope in self.scopes


class Secrets:
    """The tokens that a source accepts: several at once, so that rotation is adding one."""

    __slots__ = ("_credentials",)

    def __init__(self, *credentials: Credential) -> None:
        self._credentials = credentials

    @classmethod
    def of(cls, *tokens: str) -> "Secrets":
        """Accept these clear-text tokens with every scope (tests, demo)."""
        return cls(*(Credential(digest=digest(token.encode())) for token in tokens))

    def find(self, token: bytes) -> Credential | None:
        """Return the credential of a presented token, in the same time whether it exists or not."""
        presented, found = digest(token), None
        for credential in self._credentials:
            if hmac.compare_digest(credential.digest, presented):
                found = credential
        return found

    def __iter__(self) -> Iterator[Credential]:
        return iter(self._credentials)

    def __len__(self) -> int:
        return len(self._credentials)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secrets) and self._credentials == other._credentials

    def __hash__(self) -> int:
        return hash(self._credentials)

    def __repr__(self) -> str:
        return f"<{len(self)} secrets>"


def digest(token: bytes) -> bytes:
    """Hash a token: what is compared and kept in memory is never the token itself.

    BLAKE2 is the interpreter's own; the ways of OpenSSL's SHA-256 are long, and every request takes them.
    """
    return hashlib.blake2b(token, digest_size=32).digest()


def holds_secret(value: object) -> bool:
    """Return whether a setting is a secret, or holds one: in a list, a table or a record."""
    if isinstance(value, Secrets):
        return len(value) > 0
    if isinstance(value, msgspec.Struct):
        return any(holds_secret(getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, Mapping):
        return any(holds_secret(each) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds_secret(each) for each in value)
    return isinstance(value, Secret | Credential)
