"""Idempotency keys: the request that used a key, and the time until which its repetition is a duplicate.

The key alone does not make a duplicate, unless the source's settings demand it. Some clients count from 1
after each start or use a constant, so they send different requests with one key. Each of these requests is an
event.
"""

import hashlib

import msgspec

from relay.model import StoredEvent

NewKey = tuple[str, str, bytes, str, int]
"""Source, key, identity of the request, public id of the event, end of the validity (steady)."""

SIZE = 20
"""Bytes of an identity. Rows of version 2 have the body's digest (32 bytes) instead."""

KEY_ALONE = bytes(SIZE)
"""The identity of every request to a source whose keys alone make a duplicate."""


class Key(msgspec.Struct, frozen=True):
    """The idempotency key of one request."""

    source: str
    text: str
    identity: bytes  # of the request
    body: bytes  # sha256 of its body
    is_exclusive: bool = False  # the source refuses different requests with the key


class Keys:
    """The keys that a transaction has looked up, and the keys that it adds."""

    def __init__(self) -> None:
        self._first: dict[
            tuple[str, str, bytes], str
        ] = {}  # public id of the event, by source, key, identity
        self._used: set[tuple[str, str]] = set()  # source and key, used by any request
        self.new: list[NewKey] = []
        self.exclusive: set[tuple[str, str]] = set()  # source and key of the new ones that are exclusive

    def note(self, source: str, text: str, identity: bytes, first: str | None, *, is_used: bool) -> None:
        """Note the result of the look-up of a request: its event, and whether any request used its key."""
        if first is not None:
            self._first[source, text, identity] = first
        if is_used:
            self._used.add((source, text))

    def first(self, key: Key) -> str | None:
        """Return the public id of the event that the same request created; None: the request is new."""
        return self._first.get((key.source, key.text, key.identity))

    def is_used(self, key: Key) -> bool:
        """Return whether any request has used the key."""
        return (key.source, key.text) in self._used

    def add(self, key: Key, event_id: str, expires_at: int) -> None:
        """Add the key of a new event."""
        self._first[key.source, key.text, key.identity] = event_id
        self._used.add((key.source, key.text))
        if key.is_exclusive:
            self.exclusive.add((key.source, key.text))
        self.new.append((key.source, key.text, key.identity, event_id, expires_at))


def identity(event: StoredEvent, path: str) -> bytes:
    """Return a digest of a request: its path and body, and the fields that the source reads.

    It contains neither the token, which may be rotated between two tries, nor the context, which may contain
    the time of sending.
    """
    texts = (path, event.type, event.subject or "")
    digest = hashlib.blake2b(digest_size=SIZE)
    for part in (*(text.encode("utf-8", "surrogatepass") for text in texts), event.sha256, event.data):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()
