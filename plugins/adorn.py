"""Adorn Studio: try-on sessions in jewellery shops, posted without authentication, times or ids.

Contract: docs/contracts/adorn.md#responses.
"""

from typing import ClassVar

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    EMPTY,
    Accepted,
    Event,
    Incoming,
    Invalid,
    Receipt,
    Refusal,
    Reply,
    Secrets,
    Source,
    as_map,
    check_length,
    check_type,
    read_json,
    route,
)

PATH = "/v1/events"
_NULL = msgspec.Raw(b"null")


class Envelope(msgspec.Struct):
    """The fields of every event. Ids of store, seller and device may be numbers, `null` or missing."""

    event_type: str
    session_id: str
    store_id: msgspec.Raw = _NULL
    seller_id: msgspec.Raw = _NULL
    device_id: msgspec.Raw = _NULL
    payload: msgspec.Raw = EMPTY


class Adorn(Source, kind="adorn", owns=("/v1",), decompresses=False):
    """Adorn Studio: `POST /v1/events`. Without tokens it accepts everybody: its clients send none."""

    tokens: Secrets = Secrets()

    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require one of the tokens, if any is configured."""
        if self.tokens:
            incoming.bearer(self.tokens)

    @route("POST", PATH)
    def event(self, incoming: Incoming) -> Accepted:
        """Accept an event of any type. The envelope's type counts; a payload may contain another one."""
        envelope = incoming.decode(Envelope)
        if not envelope.session_id:
            raise Invalid(field="session_id", issue="expected a non-empty string")
        check_length(envelope.session_id, "session_id")
        check_type(envelope.event_type, "event_type")
        return Accepted(
            event=Event(
                type=envelope.event_type,
                subject=envelope.session_id,
                data=as_map(envelope.payload, "payload"),
                context=_context(envelope),
            ),
            reply=_reply,
        )

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Answer `{"status": "error", "message": …}`; for a wrong field, the message is "Invalid <field>"."""
        _ = incoming
        message = f"Invalid {refusal.field}" if refusal.field else refusal.detail
        return Reply(status=refusal.status, body={"status": "error", "message": message})

    def warnings(self) -> tuple[str, ...]:
        """See `Source.warnings`."""
        return () if self.tokens else ("open to everyone who can reach it: it has no tokens",)

    def samples(self) -> tuple[Incoming, ...]:
        """See `Source.samples`."""
        return (Incoming.of("POST", PATH, {"Content-Type": "application/json"}, _SAMPLE),)


def _reply(receipt: Receipt) -> dict[str, str]:
    return {"status": "ok", "event_id": receipt.event_id}


def _context(envelope: Envelope) -> dict[str, msgspec.Raw]:
    """Return the ids of store, seller and device unchanged, without those that are missing."""
    sent = {
        "store_id": envelope.store_id,
        "seller_id": envelope.seller_id,
        "device_id": envelope.device_id,
    }
    for name, value in sent.items():
        check_length(_text(bytes(value)), name)
    return {name: value for name, value in sent.items() if bytes(value) != b"null"}


def _text(value: bytes) -> str:
    """Return the text whose length is checked: a string's characters, else the JSON text."""
    return str(read_json(value)) if value[:1] == b'"' else value.decode()


_SAMPLE = b"""{
  "event_type": "image.shared",
  "session_id": "550e8400-e29b-41d4-a716-446655440000",
  "store_id": "store_1",
  "seller_id": "seller_1",
  "device_id": "ipad_1",
  "payload": {
    "channel": "whatsapp",
    "destination": "+6512345678",
    "jewelry_id": "necklace_11",
    "jewelry_name": "Diamond Cascade Necklace",
    "jeweler_id": "abharana",
    "jeweler_name": "Abharana",
    "share_status": "sent",
    "message_sid": "SM1234567890abcdef",
    "image_url": "https://storage.example.com/images/tryon_abc123.jpg"
  }
}"""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer Adorn Studio."""
    return [Adorn]
