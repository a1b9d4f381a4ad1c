"""Moddy, a Discord bot: it reports the actions of members to its backend, a FastAPI service.

Contract: docs/contracts/moddy.md#responses.
"""

from typing import ClassVar, Literal, get_args

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    EMPTY,
    VERSION,
    Accepted,
    Event,
    Incoming,
    Invalid,
    Malformed,
    PluginFailed,
    Refusal,
    Reply,
    Secrets,
    Source,
    Unauthenticated,
    as_map,
    check_length,
    route,
)

PATH = "/internal/event/notify"
HEALTH = "/internal/health"

Kind = Literal["member_joined", "member_left", "role_updated", "command_used", "message_sent"]


class Notification(msgspec.Struct):
    """The body of an event. Discord ids exceed 2^53, so an integer is a mistake of the client."""

    event_type: Kind
    discord_id: str
    metadata: msgspec.Raw = EMPTY


class Moddy(Source, kind="moddy", owns=("/internal",), decompresses=False):
    """Moddy: `POST /internal/event/notify`, and `GET /internal/health`, which checks the secret."""

    tokens: Secrets

    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require one of the tokens, also for the health check: the bot tests its secret with it."""
        incoming.bearer(self.tokens)

    @route("POST", PATH)
    def notify(self, incoming: Incoming) -> Accepted:
        """Accept one of the five types (docs/contracts/moddy.md#event-types)."""
        body = incoming.decode(Notification)
        check_length(body.discord_id, "discord_id")
        return Accepted(
            event=Event(type=body.event_type, subject=body.discord_id or None, data=_metadata(body.metadata)),
            reply={
                "success": True,
                "message": f"Event {body.event_type} processed successfully",
                "event_received": True,
            },
        )

    @route("GET", HEALTH)
    def health(self, incoming: Incoming) -> Reply:
        """Answer the bot's health check at its start."""
        _ = incoming
        return Reply(
            body={
                "status": "healthy",
                "service": "hookferry",
                "version": VERSION,
                "message": "Backend is running",
            }
        )

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Answer as the bot's backend does: `error` about the sender, `detail` about the request."""
        _ = incoming
        status = refusal.status
        body: dict[str, object] = {"detail": refusal.message}
        match refusal:
            case Unauthenticated(problem="unknown"):
                status, body = 403, {"error": "Invalid internal API secret"}
            case Unauthenticated():
                body = {"error": _AUTHORIZATION[refusal.problem]}
            case Malformed():
                body = {"detail": [_blame("", refusal.message, "json_invalid")]}
            case Invalid():
                status, body = 422, {"detail": [_explain(refusal)]}
            case PluginFailed():
                body = {"detail": "Failed to process event"}
        return Reply(status=status, body=body)

    def samples(self) -> tuple[Incoming, ...]:
        """See `Source.samples`."""
        return (Incoming.of("POST", PATH, {"Content-Type": "application/json"}, _SAMPLE),)


def _metadata(raw: msgspec.Raw) -> msgspec.Raw:
    """Return a map, or an empty one for `null`. A list is an error: only PHP clients send `[]` for a map."""
    if bytes(raw)[:1] == b"[":
        raise Invalid(field="metadata", issue="expected an object")
    return as_map(raw, "metadata")


_AUTHORIZATION = {"missing": "Missing Authorization header", "scheme": "Invalid Authorization format"}
_TYPES = {
    "": ("model_attributes_type", "Input should be a valid dictionary or object to extract fields from"),
    "event_type": ("enum", f"Input should be one of {', '.join(get_args(Kind))}"),
    "discord_id": ("string_type", "Input should be a valid string"),
    "metadata": ("dict_type", "Input should be a valid dictionary"),
}
"""Pydantic's error type and message for each field."""


def _explain(refusal: Invalid) -> dict[str, object]:
    if refusal.issue == "field is required":
        return _blame(refusal.field, "Field required", "missing")
    if refusal.issue.startswith("expected at most"):
        bound = refusal.issue.removeprefix("expected ")
        return _blame(refusal.field, f"String should have {bound}", "string_too_long")
    type_, message = _TYPES.get(refusal.field, ("value_error", refusal.issue))
    return _blame(refusal.field, message, type_)


def _blame(field: str, message: str, type_: str) -> dict[str, object]:
    return {"loc": ["body", field] if field else ["body"], "msg": message, "type": type_}


_SAMPLE = b"""{
  "event_type": "member_joined",
  "discord_id": "123456789012345678",
  "metadata": {
    "guild_id": "987654321098765432",
    "guild_name": "Moddy Server",
    "joined_at": "2024-01-20T15:30:00Z"
  }
}"""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer Moddy."""
    return [Moddy]
