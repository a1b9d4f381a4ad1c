"""Compozy's Events API: external systems trigger workflows by posting named events.

Contract: docs/contracts/compozy.md#responses.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
    read_json,
    route,
)

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing import Resource

PATH = "/api/v1/events"
SCOPE = "events:write"
_LONGEST_ISSUE = 300


class Request(msgspec.Struct):
    """The body of an event."""

    name: str
    payload: msgspec.Raw = EMPTY


class Compozy(Source, kind="compozy", owns=("/api/v1",), dict=True, decompresses=False):
    """Compozy: `POST /api/v1/events`, answered with 202.

    Raises:
        ValueError: a schema cannot be read, is no JSON Schema, or `jsonschema` is not installed.
    """

    tokens: Secrets
    schemas: dict[str, Path] = msgspec.field(default_factory=dict)  # JSON Schemas of payloads, by event name

    def __post_init__(self) -> None:
        """Read the schemas now, so that a broken schema stops the start instead of a request."""
        _ = self.validators

    @cached_property
    def validators(self) -> "Mapping[str, Validator]":
        """The compiled schemas by event name."""
        return {name: _compile(path) for name, path in self.schemas.items()}

    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require a token with the scope to write events."""
        if not incoming.bearer(self.tokens).allows(SCOPE):
            raise Forbidden(f"The token lacks the permission {SCOPE}")

    @route("POST", PATH)
    def send(self, incoming: Incoming) -> Accepted:
        """Accept an event of any name; the payload must satisfy the schema of that name, if one is set."""
        body = incoming.decode(Request)
        if not body.name:
            raise Invalid(field="name", issue="field is required")
        check_type(body.name, "name")
        payload = as_map(body.payload, "payload")
        if validator := self.validators.get(body.name):
            _validate(validator, payload)
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


def _compile(path: Path) -> "Validator":
    """Read a JSON Schema (draft of its `$schema`, else 2020-12); it may contain references to itself only."""
    try:
        from jsonschema import SchemaError, validators  # noqa: PLC0415 - an optional extra
        from referencing import Registry, Resource  # noqa: PLC0415 - comes with jsonschema
        from referencing.exceptions import Unresolvable  # noqa: PLC0415 - likewise
        from referencing.jsonschema import DRAFT202012  # noqa: PLC0415 - likewise
    except ImportError:
        raise ValueError('schemas need jsonschema: pip install "hookferry[schemas]"') from None
    try:
        schema = msgspec.json.decode(path.read_bytes(), type=dict)
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
        resource = Resource.from_contents(schema, default_specification=DRAFT202012)
        registry: Registry[Any] = Registry()  # empty: nothing is fetched from the network
        _follow(resource, registry.resolver_with_root(resource))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON object: {error}") from None
    except SchemaError as error:
        raise ValueError(f"{path}: no JSON Schema: {error.json_path}: {error.message}") from None
    except Unresolvable as error:
        raise ValueError(f"{path}: $ref leads nowhere: {error.ref}") from None
    validator: Validator = kind(schema, registry=registry)
    return validator


def _follow(resource: "Resource[Any]", resolver: Any) -> None:
    """Resolve every reference once, so that a dangling reference fails at start."""
    if isinstance(resource.contents, dict) and "$ref" in resource.contents:
        resolver.lookup(resource.contents["$ref"])
    for part in resource.subresources():
        _follow(part, resolver.in_subresource(part))


def _validate(validator: "Validator", payload: msgspec.Raw) -> None:
    try:
        error = next(validator.iter_errors(read_json(bytes(payload), exact=True)), None)
    except (ValueError, RecursionError):  # numbers beyond any float, thousands of levels
        raise Invalid(field="payload", issue="too deep or too large to check") from None
    if error is not None:
        where = error.json_path.removeprefix("$")
        raise Invalid(field=f"payload{where}"[:_LONGEST_ISSUE], issue=error.message[:_LONGEST_ISSUE])


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
