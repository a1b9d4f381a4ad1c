"""What is kept of a request: its event, as the store takes it."""

import hashlib

import msgspec

from relay.errors import PluginFailed, Refusal
from relay.ids import event_id, given_id
from relay.incoming import Incoming
from relay.jsontext import encode, escape
from relay.model import StoredEvent
from relay.source import Event, check_type

TRACEPARENT = 55  # characters of a W3C traceparent, version 00


def record(source: str, event: Event, incoming: Incoming, now: int) -> StoredEvent:
    """Return what a source's handler read out of a request, to be stored under the source's name.

    Args:
        source: the source's name in config.toml.
        event: what the handler returned.
        incoming: the request, with its body.
        now: the wall clock, microseconds.

    Raises:
        Invalid: the type is none.
        PluginFailed: `data` or `context` is no JSON.
    """
    body, trace = incoming.body, incoming.header("traceparent")
    request = incoming.headers.get("X-Request-Id")
    try:
        type_ = escape(event.type)
        subject = None if event.subject is None else escape(event.subject)
        check_type(type_)
        data, context = _json(event.data), _json(event.context)
    except Refusal:
        raise
    except Exception as error:
        raise PluginFailed from error
    return StoredEvent(
        id=0,
        public_id=event_id(now),
        source=source,
        type=f"{source}.{type_}",
        subject=subject,
        received_at=now,
        data=data,
        context=context,
        body=body,
        content_type=incoming.header("Content-Type") or "application/octet-stream",
        sha256=hashlib.sha256(body).digest(),
        traceparent=trace if len(trace) == TRACEPARENT else None,
        request_id=None if request is None else given_id(request),
    )


def _json(value: object) -> bytes:
    return bytes(value) if isinstance(value, msgspec.Raw) else encode(value)
