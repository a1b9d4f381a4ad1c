"""Exported events: one line of JSON each, from which an import restores the same event byte for byte.

A body is written as text, or in base64 if it is not UTF-8 or has many control characters. The data is written
as its place in the body, as in the database, or in full if it is not part of the body.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec

from relay.base.json_text import check, decode
from relay.errors import RelayError
from relay.model import StoredEvent

DELIVERY_FIELDS = (
    "event_id, public_id, destination, state, reason, attempts, created_at, finished_at, last_status,"
    " last_error"
)
"""Columns of a delivery in an export."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_Id = Annotated[str, msgspec.Meta(pattern=r"^evt_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
_Header = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*\Z")]  # as senders may send it
_Place = Annotated[int, msgspec.Meta(ge=0)]


class DeliveryLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A delivery of an exported event; imports ignore it."""

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
    """The fields of an exported event."""

    id: _Id
    source: _Text
    type: _Text
    subject: str | None = None
    received_at: Annotated[datetime, msgspec.Meta(tz=True)]
    content_type: _Header
    traceparent: _Header | None = None
    sha256: str  # hexadecimal, of the body
    context: msgspec.Raw
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    data_at: _Place | None = None
    data_size: _Place | None = None
    body: str | None = None
    body_base64: str | None = None
    deliveries: list[DeliveryLine] | None = None


_LONG_ESCAPES = bytes({*range(0x20), 0x7F} - {*b"\b\t\n\f\r"})  # six bytes each in JSON
MOST_ESCAPES = 0.05
"""Maximum share of these bytes in a body that is written as text."""

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(EventLine)


def write_line(event: StoredEvent, deliveries: list[DeliveryLine] | None = None) -> bytes:
    """Return the line of an event, with its newline."""
    at = event.body.find(event.data)
    text, encoded = _text_of(event.body), None
    if text is None:
        encoded = base64.b64encode(event.body).decode()
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


def _text_of(body: bytes) -> str | None:
    """Return a body as text; None: it must be written in base64."""
    if len(body) - len(body.translate(None, _LONG_ESCAPES)) > MOST_ESCAPES * len(body):
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def read_line(line: bytes) -> StoredEvent:
    """Return the event of a line.

    Raises:
        RelayError: the line is not an exported event, or the body does not match its digest.
    """
    try:
        found = decode(_decoder, line.decode().encode())  # as text first, because Raw fields are not decoded
        body = _body_of(found)
        data = _data_of(found, body)
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


def lines_of(rows: Iterable[Sequence[Any]]) -> dict[int, list[DeliveryLine]]:
    """Return the deliveries of each event, by its row id, from rows in the order of `DELIVERY_FIELDS`."""
    found: dict[int, list[DeliveryLine]] = {}
    for event_id, id_, destination, state, reason, attempts, created, finished, status, error in rows:
        line = DeliveryLine(
            id=id_,
            destination=destination,
            state=state,
            reason=reason,
            attempts=attempts,
            created_at=moment(created),
            finished_at=None if finished is None else moment(finished),
            last_status=status,
            last_error=error,
        )
        found.setdefault(event_id, []).append(line)
    return found


def moment(micros: int) -> datetime:
    """Return microseconds since the epoch as a time."""
    return _EPOCH + timedelta(microseconds=micros)


def _body_of(line: EventLine) -> bytes:
    if not line.type.startswith(f"{line.source}."):
        raise ValueError(f"the type {line.type!r} does not begin with the source {line.source!r}")
    if not bytes(line.context).startswith(b"{"):
        raise ValueError("`context` is not an object")
    if (line.body is None) == (line.body_base64 is None):
        raise ValueError("expected either `body` or `body_base64`")
    try:
        coded = line.body_base64 or ""
        body = binascii.a2b_base64(coded, strict_mode=True) if line.body is None else line.body.encode()
    except binascii.Error as error:
        raise ValueError(f"`body_base64`: {error}") from error
    if hashlib.sha256(body).hexdigest() != line.sha256:
        raise ValueError(f"the body of {line.id} does not match its sha256")
    return body


def _data_of(line: EventLine, body: bytes) -> bytes:
    if line.data is not msgspec.UNSET:
        return bytes(line.data)
    if line.data_at is None or line.data_size is None or line.data_at + line.data_size > len(body):
        raise ValueError("expected `data`, or `data_at` and `data_size` within the body")
    data = body[line.data_at : line.data_at + line.data_size]
    check(data)
    return data


def _in_one_line(json: bytes) -> msgspec.Raw:
    """Replace the line breaks of JSON, which only occur between its tokens."""
    return msgspec.Raw(json.replace(b"\n", b" ").replace(b"\r", b" "))
