"""The stored event of a request."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from enum import Enum

import msgspec

from relay.base.ids import EVENT, new_id
from relay.base.json_text import check, encode, escape
from relay.errors import PluginFailed, Refusal
from relay.ingest.routes import Mount
from relay.model import EMPTY, StoredEvent
from relay.source import Event, Incoming, check_length, check_type

_PLAIN = (str, int, float, bytes, type(None))
_EMPTY = bytes(EMPTY)
_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch  # W3C Trace Context


def make_event(
    mount: Mount, event: Event, incoming: Incoming, now: int, *, is_item: bool = False
) -> StoredEvent:
    """Return the event to store, made of the event that a source's handler read from a request.

    Args:
        mount: the source, with its name in config.toml and its schemas.
        event: the event that the handler returned.
        incoming: the request, with its body.
        now: the wall clock, microseconds.
        is_item: the request has several events, so each one's body is its `data`.

    Raises:
        Invalid: the type is invalid, the subject or content type is longer than 256 characters, or the data
            does not satisfy its schema.
        PluginFailed: `data` or `context` is not exactly one JSON value.
    """
    body, trace = incoming.body, incoming.header("traceparent")
    content_type = incoming.header("Content-Type") or "application/octet-stream"
    try:
        type_, subject = event.type, event.subject
        if not type_.isascii():
            type_ = escape(type_)
        if subject is not None and not subject.isascii():
            subject = escape(subject)
        check_type(type_)
        check_length(event.subject or "", "subject")
        check_length(content_type, "Content-Type")
        data, context = _json(event.data, incoming), _json(event.context, incoming)
        if mount.schemas is not None:
            mount.schemas.check(type_, data)
        if is_item:
            body, content_type = data, "application/json"
    except Refusal:
        raise
    except BaseException as error:
        raise PluginFailed from error
    return StoredEvent(
        id=0,
        public_id=new_id(EVENT, now),
        source=mount.name,
        type=f"{mount.name}.{type_}",
        subject=subject,
        received_at=now,
        data=data,
        context=context,
        body=body,
        content_type=content_type,
        sha256=hashlib.sha256(body).digest(),
        traceparent=trace if trace and _TRACEPARENT(trace) else None,
    )


def _json(value: object, incoming: Incoming) -> bytes:
    """Return the JSON text of a value, which becomes part of the envelope unchanged.

    Raises:
        ValueError: the value is not exactly one JSON value.
    """
    if value is EMPTY:
        return _EMPTY
    if isinstance(value, msgspec.Raw):
        _check(value, incoming)
        return bytes(value)
    _check_inside(value, incoming)
    return encode(value)


def _check(raw: msgspec.Raw, incoming: Incoming) -> None:
    """Check a `Raw` value, unless `Incoming.decode` has checked it as a part of the body."""
    for part in incoming.parts:
        if part is raw:
            return
    check(bytes(raw))


def _check_inside(value: object, incoming: Incoming) -> None:
    """Check every `Raw` inside a value, because the encoder writes them unchanged."""
    inner: Iterable[object]
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, msgspec.Struct):
        inner = (getattr(value, name) for name in value.__struct_fields__)
    elif dataclasses.is_dataclass(value):
        inner = (getattr(value, field.name) for field in dataclasses.fields(value))
    elif isinstance(value, Enum):
        inner = (value.value,)
    else:  # an attrs class, or a value without parts
        inner = [getattr(value, field.name) for field in getattr(value, "__attrs_attrs__", ())]
    for each in inner:
        if isinstance(each, msgspec.Raw):
            _check(each, incoming)
        elif not isinstance(each, _PLAIN):
            _check_inside(each, incoming)
