"""Formats that pass on the whole event: its envelope, or the sender's own body."""

from collections.abc import Callable, Sequence
from urllib.parse import quote

import msgspec

from relay.base.clock import rfc3339
from relay.model import StoredEvent

_CONTENT_TYPE_LIMIT = 1000  # characters of a sender's content type that the relay forwards

_encode = msgspec.json.Encoder().encode


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A format. `render` must be pure: the relay renders an event once for all its destinations."""

    name: str  # `format = …` of a destination
    content_type: str | None  # None: the sender's content type
    render: Callable[[StoredEvent], bytes]
    group: Callable[[Sequence[StoredEvent]], bytes] | None = (
        None  # one body for several events, if there is one
    )

    def content_type_of(self, event: StoredEvent) -> str:
        """Return the `content-type` header of a delivery of the event."""
        if self.content_type is not None:
            return self.content_type
        # From the sender: a bad value must not prevent the delivery. A tab is as good as a space there.
        own = event.content_type.replace("\t", " ")
        is_valid = len(own) <= _CONTENT_TYPE_LIMIT and own.isascii() and own.isprintable()
        return own if own and is_valid else "application/octet-stream"


class _Standard(msgspec.Struct):
    """The envelope of Standard Webhooks; its fields are sent in this order."""

    id: str
    type: str
    timestamp: str
    source: str
    subject: str | None
    data: msgspec.Raw  # inserted byte for byte: big integers, 45000.00 and escapes stay as they are
    context: msgspec.Raw


class _CloudEvent(msgspec.Struct, omit_defaults=True):
    """CloudEvents 1.0 as structured JSON. It has no `context`: extension attributes cannot be objects."""

    specversion: str
    id: str
    source: str  # a URI-reference
    type: str
    time: str
    datacontenttype: str
    data: msgspec.Raw
    subject: str | None = None  # the specification forbids null and ""


def _standard(event: StoredEvent) -> bytes:
    return _encode(
        _Standard(
            event.public_id,
            event.type,
            rfc3339(event.received_at),
            event.source,
            event.subject,
            msgspec.Raw(event.data),
            msgspec.Raw(event.context),
        )
    )


def _raw(event: StoredEvent) -> bytes:
    return event.body


def _cloudevents(event: StoredEvent) -> bytes:
    return _encode(
        _CloudEvent(
            specversion="1.0",
            id=event.public_id,
            source=f"/relay/{quote(event.source, safe='')}",
            type=event.type,
            time=rfc3339(event.received_at),
            datacontenttype="application/json",
            data=msgspec.Raw(event.data),
            subject=event.subject or None,
        )
    )


_JSON = "application/json"

ENVELOPES = (
    Format(name="standard", content_type=_JSON, render=_standard),
    Format(name="raw", content_type=None, render=_raw),
    Format(name="cloudevents", content_type="application/cloudevents+json", render=_cloudevents),
)
"""The formats that pass on the whole event."""
