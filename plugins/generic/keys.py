"""The keys of a generic source."""

from typing import Annotated, Literal

import msgspec

from relay.source import Secret, Source

from . import settings
from .reading import MOST_ITEMS, BodyForm
from .settings import Handshake, Method, ReplySettings, Sample, Template, Verify, check, describe

MOST_EVENTS = MOST_ITEMS
"""The most that `max_events` can be: the relay takes no more events in one request."""


class Keys(Source):
    """`[sources.NAME]` with `plugin = "generic"`. docs/sources.md#generic has the same descriptions."""

    path: Annotated[
        Annotated[str, check(settings.path)] | tuple[Annotated[str, check(settings.path)], ...],
        describe("path of the requests, or a list of paths; `{name}` stands for one segment"),
    ]
    type: Annotated[Template, describe("the event's type, without the source's name")]
    methods: Annotated[tuple[Method, ...], describe("methods of the requests that are events")] = ("POST",)
    secrets: Annotated[
        tuple[Secret, ...],
        describe("the secrets of `verify`. Each one is valid: to rotate a secret, add the next one"),
    ] = ()
    public_keys: Annotated[
        tuple[Annotated[Secret, msgspec.Meta(extra={"literal": True})], ...],
        describe(
            "keys of `ed25519` (hex or base64 of 32 bytes) and `ecdsa` (P-256: base64 of DER, or PEM), as "
            "text or as a secret"
        ),
    ] = ()
    verification: Annotated[
        Literal["none", "bearer", "standard-webhooks"] | Verify | None,
        describe(
            'required: how a sender proves its identity: `"bearer"`, `"standard-webhooks"`, a '
            '[table](#signatures-and-credentials), or `"none"` for no verification'
        ),
    ] = msgspec.field(default=None, name="verify")
    networks: Annotated[
        tuple[Annotated[str, check(settings.network)], ...],
        describe("addresses and networks of the sender; all others get 403"),
    ] = ()
    public_url: Annotated[
        Annotated[str, check(settings.public_url)] | None,
        describe('scheme and host in the sender\'s URL, for `{url}`: `"https://hooks.example.com"`'),
    ] = None
    body: Annotated[
        BodyForm,
        describe(
            '[`"json"`, `"form"`, `"text"`, `"raw"`](#bodies) (bytes, as base64 with their content type), or '
            '`"auto"`: a form by its content type, else JSON'
        ),
    ] = "auto"
    form_field: Annotated[str, describe("the field of a form that contains the body as JSON")] = ""
    first_of_list: Annotated[
        tuple[Annotated[str, check(settings.first_of_list)], ...],
        describe(
            '`"header:NAME"`, `"query:NAME"` or `"form:NAME"`: of several values, the first one is used'
        ),
    ] = ()
    events: Annotated[
        Template, describe("a list in the body, such as `{body:items}`: each item is an [event](#batches)")
    ] = ""
    max_events: Annotated[
        int, msgspec.Meta(ge=1, le=MOST_EVENTS), describe("events of one request; more are answered with 413")
    ] = 1000
    subject: Annotated[Template, describe("what the event is about")] = ""
    key: Annotated[
        Template,
        describe(
            "the [idempotency key](#idempotency-keys). If a part of it is missing, the event has no key"
        ),
    ] = ""
    timestamp: Annotated[Template, describe("the event's time, stored as `context.timestamp`")] = ""
    context: Annotated[dict[str, Template], describe("further fields of `context`")] = msgspec.field(
        default_factory=dict
    )
    data: Annotated[
        Template, describe("the event's data; by default the item of a batch, or the whole body")
    ] = ""
    reply: Annotated[
        ReplySettings | None,
        describe('the [answer](#replies); by default 200 with `{"status": "accepted", "event_id": "…"}`'),
    ] = None
    handshakes: Annotated[
        tuple[Handshake, ...],
        describe(
            "requests that are [answered without an event](#handshakes); the first one that matches is used"
        ),
    ] = ()
    verify_tokens: Annotated[
        tuple[Secret, ...], describe("the values that the `token` of a handshake may have")
    ] = ()
    examples: Annotated[
        tuple[Sample, ...],
        msgspec.Meta(extra={"unlisted": True}),  # see relay.config.effective
        describe("requests that `relay send` sends"),
    ] = msgspec.field(default=(), name="samples")

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return (self.path,) if isinstance(self.path, str) else self.path
