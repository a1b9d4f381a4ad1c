"""An event as one line of JSON: what `export` writes and `import` reads, byte for byte the same event.

A body that is text stands as such, any other in base64. The data stands by its place in the body, as in the
database; only where it is not part of it, it stands itself.
"""

import base64
import binascii
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from relay.base.json_text import check, decode
from relay.errors import RelayError
from relay.model import StoredEvent

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_Id = Annotated[str, msgspec.Meta(pattern=r"^evt_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
_Place = Annotated[int, msgspec.Meta(ge=0)]


class DeliveryLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of a delivery; told by an export, never read by an import."""

    id: str
    destination: str
    state: str
    reason: str | None = None
    attempts: int
    created_at: datetime
    finished_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None


class EventLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line."""

    id: _Id
    source: _Text
    type: _Text
    subject: str | None = None
    received_at: Annotated[datetime, msgspec.Meta(tz=True)]
    content_type: Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]*\Z")]
    traceparent: Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]*\Z")] | None = None
    sha256: str  # hexadecimal, of the body
    context: msgspec.Raw
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data_at: _Place | None = None
    data_size: _Place | None = None
    body: str | None = None
    body_base64: str | None = None
    deliveries: list[DeliveryLine] | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(EventLine)


def write_line(event: StoredEvent, deliveries: list[DeliveryLine] | None = None) -> bytes:
    """Return an event as a line, with its newline."""
    at = event.body.find(event.data)
    try:
        text, encoded = event.body.decode(), None
    except UnicodeDecodeError:
        text, encoded = None, base64.b64encode(event.body).decode()
    line = EventLine(
        id=event.public_id,
        source=event.source,
        type=event.type,
        subject=event.subject,
        received_at=moment(event.received_at),
        content_type=event.content_type,
        traceparent=event.traceparent,
        sha256=event.sha256.hex(),
        context=_in_one_line(event.context),
        data=_in_one_line(event.data) if at < 0 else msgspec.UNSET,
        data_at=at if at >= 0 else None,
        data_size=len(event.data) if at >= 0 else None,
        body=text,
        body_base64=encoded,
        deliveries=deliveries,
    )
    return _encode(line) + b"\n"


def read_line(line: bytes) -> StoredEvent:
    """Return the event of a line.

    Raises:
        RelayError: it is none, or the body is not the one that was exported.
    """
    try:
        found = decode(_decoder, line.decode().encode())  # first as text: Raw is not looked into
        body = _body(found)
        data = _data(found, body)
        received_at = (found.received_at - _EPOCH) // _MICROSECOND
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode's are ValueErrors
        raise RelayError(f"not an exported event: {error}", hint="see `relay events export`") from error
    return StoredEvent(
        id=0,
        public_id=found.id,
        source=found.source,
        type=found.type,
        subject=found.subject,
        received_at=received_at,
        data=data,
        context=bytes(found.context),
        body=body,
        content_type=found.content_type,
        sha256=bytes.fromhex(found.sha256),
        traceparent=found.traceparent,
    )


def moment(micros: int) -> datetime:
    """Return microseconds since the epoch as a time, to the microsecond."""
    return _EPOCH + timedelta(microseconds=micros)


def _body(line: EventLine) -> bytes:
    if not line.type.startswith(f"{line.source}."):
        raise ValueError(f"the type {line.type!r} does not begin with the source {line.source!r}")
    if not bytes(line.context).startswith(b"{"):
        raise ValueError("`context` is no object")
    if (line.body is None) == (line.body_base64 is None):
        raise ValueError("it needs either `body` or `body_base64`")
    try:
        coded = line.body_base64 or ""
        body = binascii.a2b_base64(coded, strict_mode=True) if line.body is None else line.body.encode()
    except binascii.Error as error:
        raise ValueError(f"`body_base64`: {error}") from error
    if hashlib.sha256(body).hexdigest() != line.sha256:
        raise ValueError(f"the body of {line.id} is not the one that was exported")
    return body


def _data(line: EventLine, body: bytes) -> bytes:
    if line.data is not msgspec.UNSET:
        return bytes(line.data)
    if line.data_at is None or line.data_size is None or line.data_at + line.data_size > len(body):
        raise ValueError("`data`, or `data_at` and `data_size` within the body, are missing")
    data = body[line.data_at : line.data_at + line.data_size]
    check(data)
    return data


def _in_one_line(json: bytes) -> msgspec.Raw:
    """Write JSON without line breaks, which can only stand between its tokens."""
    return msgspec.Raw(json.replace(b"\n", b" ").replace(b"\r", b" "))
