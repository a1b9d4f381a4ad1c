"""Formats: how an event is rendered as the body of a delivery."""

import re
from collections.abc import Callable, Mapping
from urllib.parse import quote

import msgspec

from relay.base.clock import rfc3339
from relay.model import EMPTY, StoredEvent

SLACK_LIMIT = 4000
"""Characters of `text`. Slack splits longer messages, which breaks the code block with the data."""

DISCORD_LIMIT = 2000
"""Characters of `content`. Discord answers longer messages with 400."""

_CONTENT_TYPE_LIMIT = 1000  # characters of a sender's content type that the relay forwards
_HEADLINE_LIMIT = 200  # characters of a subject in a headline

_encode = msgspec.json.Encoder().encode


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A format. `render` must be pure: the relay renders an event once for all its destinations."""

    name: str  # `format = …` of a destination
    content_type: str | None  # None: the sender's content type
    render: Callable[[StoredEvent], bytes]

    def content_type_of(self, event: StoredEvent) -> str:
        """Return the `content-type` header of a delivery of the event."""
        if self.content_type is not None:
            return self.content_type
        own = event.content_type  # from the sender: a bad value must not prevent the delivery
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


def _slack(event: StoredEvent) -> bytes:
    return _encode({"text": _message(event, SLACK_LIMIT, _escape_slack)})


def _discord(event: StoredEvent) -> bytes:
    no_mentions: dict[str, list[str]] = {"parse": []}  # a sender's @everyone must notify no one
    return _encode({"content": _message(event, DISCORD_LIMIT, str), "allowed_mentions": no_mentions})


def _message(event: StoredEvent, limit: int, escape: Callable[[str], str]) -> str:
    """Return a headline and the data, if any, in a code block: at most `limit` characters."""
    about = f" about {_code(event.subject)}" if event.subject else ""
    headline = escape(
        f"{_code(event.type)}{about} at {rfc3339(event.received_at)} ({_code(event.public_id)})"
    )
    if event.data == bytes(EMPTY):
        return headline
    opening, closing, more = "\n```\n", "\n```", "…"
    room = limit - _length(headline + opening + closing + more)
    # A character has at most four bytes, so these bytes exceed the limit; the rest need not be decoded.
    data = event.data[: 4 * limit].decode("utf-8", "ignore").replace("```", "'''")
    text = escape(data)
    if _length(text) > room:
        text = re.sub(r"&[a-z]*\Z", "", _cut(text, room)) + more  # removes an incomplete &amp;
    return headline + opening + text + closing


def _code(text: str) -> str:
    """Return a sender's text as one line of code, which can contain neither formatting nor mentions."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line if len(line) <= _HEADLINE_LIMIT else line[: _HEADLINE_LIMIT - 1] + '…'}`"


def _escape_slack(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _length(text: str) -> int:
    """Return the number of UTF-16 units: both services may count a character beyond the BMP as two."""
    return len(text.encode("utf-16-le")) // 2


def _cut(text: str, units: int) -> str:
    return text.encode("utf-16-le")[: 2 * units].decode("utf-16-le", "ignore")


_JSON = "application/json"

FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        Format(name="standard", content_type=_JSON, render=_standard),
        Format(name="raw", content_type=None, render=_raw),
        Format(name="cloudevents", content_type="application/cloudevents+json", render=_cloudevents),
        Format(name="slack", content_type=_JSON, render=_slack),
        Format(name="discord", content_type=_JSON, render=_discord),
    )
}
"""Every format by its name in config.toml."""
