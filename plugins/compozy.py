"""Compozy's Events API: external systems trigger workflows by posting named events.

Contract: docs/contracts/compozy.md#responses.
"""

from typing import ClassVar

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    EMPTY,
    Accepted,
    Event,
    Forbidden,
    Incoming,
    Invalid,
    Malformed,
    Receipt,
    Refusal,
    Reply,
    Secrets,
    Source,
    as_map,
    check_type,
    route,
)

PATH = "/api/v1/events"
SCOPE = "events:write"


class Request(msgspec.Struct):
    """The body of an event."""

    name: str
    payload: msgspec.Raw = EMPTY


class Compozy(Source, kind="compozy", owns=("/api/v1",), decompresses=False):
    """Compozy: `POST /api/v1/events`, answered with 202."""

    tokens: Secrets

    data_field: ClassVar[str] = "payload"
    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require a token with the scope to write events."""
        if not incoming.bearer(self.tokens).allows(SCOPE):
            raise Forbidden(f"The token lacks the permission {SCOPE}")

    @route("POST", PATH)
    def send(self, incoming: Incoming) -> Accepted:
        """Accept an event of any name."""
        body = incoming.decode(Request)
        if not body.name:
            raise Invalid(field="name", issue="field is required")
        check_type(body.name, "name")
        payload = as_map(body.payload, "payload")
        return Accepted(event=Event(type=body.name, data=payload), reply=_reply)

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Answer with an `error` that always has `code`, `message` and `details`.

        The contract has one code for 400, `validation_error`, so a body that is not JSON has it too
        (docs/contracts/compozy.md#responses).
        """
        _ = incoming
        code, message, details = refusal.code, refusal.message, {}
        if isinstance(refusal, Invalid | Malformed):
            code, message = Invalid.code, "Invalid event format"
            details = {"field": refusal.field or "body", "issue": refusal.issue or refusal.message}
        error = {"code": code, "message": message, "details": details}
        return Reply(status=refusal.status, body={"success": False, "error": error})

    def samples(self) -> tuple[Incoming, ...]:
        """See `Source.samples`."""
        return (Incoming.of("POST", PATH, {"Content-Type": "application/json"}, _SAMPLE),)


def _reply(receipt: Receipt) -> Reply:
    """Answer with the documented keys and, under `data`, the keys that the SDK samples read."""
    event_id, message = receipt.event_id.removeprefix("evt_"), "Event received and queued for processing"
    body = {
        "success": True,
        "message": message,
        "event_id": event_id,
        "data": {"event_id": event_id, "message": message},
    }
    return Reply(status=202, body=body)


_SAMPLE = b"""{
  "name": "user.created",
  "payload": {
    "userId": "user_123",
    "email": "user@example.com"
  }
}"""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer Compozy."""
    return [Compozy]
