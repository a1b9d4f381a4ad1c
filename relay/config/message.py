"""`message = {…}` of a destination: the parts of an event that a chat, push or paging service shows."""

from typing import Annotated, Literal

import msgspec

from relay.config.secrets import Secret

LITERAL = msgspec.Meta(extra={"literal": True})
"""Marks a secret that may be plain text."""


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class MessageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`message = {…}` of a destination; relay.formats compiles the templates."""

    title: Annotated[str | None, _help("a [template](messages.md#templates) for the title")] = None
    text: Annotated[str | None, _help("a template for the text below the title")] = None
    fields: Annotated[
        dict[str, str] | None,
        _help('labels and templates of the fields: `{ "Order" = "{data.order.id}" }`; `{}`: no fields'),
    ] = None
    link: Annotated[
        str | None,
        _help("a template for the URL that the message leads to; values are percent-encoded in it"),
    ] = None
    chat_id: Annotated[
        Annotated[Secret, LITERAL] | None, _help("`telegram`: the chat or channel, such as `-1001234567890`")
    ] = None
    thread_id: Annotated[
        int | None, msgspec.Meta(ge=1), _help("`telegram`: the topic, if the chat is a forum")
    ] = None
    topic: Annotated[
        Annotated[Secret, LITERAL] | None,
        _help("`ntfy`: the topic; everyone who knows its name can read its messages"),
    ] = None
    priority: Annotated[
        int | None,
        msgspec.Meta(ge=1, le=5),
        _help("`ntfy`: from 1 to 5; by default, it depends on the event type"),
    ] = None
    tags: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=50)], ...] | None,
        _help("`ntfy`: tags; ntfy shows some of them as emoji"),
    ] = None
    routing_key: Annotated[
        Annotated[Secret, LITERAL] | None,
        _help("`pagerduty`: the integration key of a service, 32 characters"),
    ] = None
    severity: Annotated[
        Literal["critical", "error", "warning", "info"] | None,
        _help(
            "`pagerduty`: `critical`, `error`, `warning` or `info`; by default, it depends on the event type"
        ),
    ] = None
    dedup_key: Annotated[
        str | None,
        _help(
            "`pagerduty`: a template; events with the same value share an alert; by default, each has its own"
        ),
    ] = None


FORMATS = ("slack", "discord", "teams", "telegram", "ntfy", "pagerduty")
"""The message formats. Their services verify no signatures."""

COMMON = ("title", "text", "fields", "link")
"""Keys of `message` that every message format has."""
