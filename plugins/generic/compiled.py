"""A generic source's settings, compiled into functions of a request."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.source import (
    EMPTY,
    Accepted,
    Event,
    Forbidden,
    Incoming,
    Invalid,
    Receipt,
    Reply,
    Secrets,
    TooLarge,
    parse_template,
)

from .checks import check_settings
from .keys import Keys
from .reading import Reader, Reading, first_items
from .rendering import compile_text, compile_value, place_of
from .replies import Answer, Greeting
from .settings import ApiKey, Basic, Bearer, Ecdsa, Ed25519, Hmac, StandardWebhooks
from .signature import AsymmetricSignature, HmacSignature, Signature
from .verification import BasicAuth, BearerToken, Key, Nobody, Scheme, Standard

_SHORT = {"bearer": Bearer(), "standard-webhooks": StandardWebhooks()}
_NULL = b"null"
_NULL_VALUE = msgspec.Raw(_NULL)


class Compiled:
    """The functions of one source."""

    def __init__(self, settings: Keys) -> None:
        """Check and compile.

        Raises:
            ExceptionGroup: contains every fault, with its keys.
        """
        self._settings = settings
        verify = settings.verification
        self._given = _SHORT.get(verify) if isinstance(verify, str) else verify and verify.scheme
        check_settings(settings, self._given)
        self.reader = Reader(
            body=settings.body,
            form_field=settings.form_field,
            public_url=settings.public_url or "",
            first_of_list=settings.first_of_list,
        )
        self._networks = [ipaddress.ip_network(each, strict=False) for each in settings.networks]
        self.scheme = self._scheme()
        if isinstance(self.scheme, Signature):
            self.reader.sent_time = self.scheme.sent_time
        self._compile()

    def _scheme(self) -> Scheme:
        settings, given, reader = self._settings, self._given, self.reader
        # A secret that a lenient command could not read is empty: it must not accept an empty credential.
        known = [secret for secret in settings.secrets if secret.reveal()]
        secrets, usages = [secret.reveal() for secret in known], [secret.usage for secret in known]
        scheme: Scheme = Nobody()
        match given:
            case Bearer():
                scheme = BearerToken(secrets, usages)
            case Basic():
                scheme = BasicAuth(given, secrets, usages)
            case ApiKey():
                scheme = Key(given, secrets, usages, reader, self.items)
            case Hmac():
                scheme = HmacSignature(given, secrets, usages, reader)
            case Ed25519() | Ecdsa():
                keys = [key for key in settings.public_keys if key.reveal()]
                public, usages = [key.reveal() for key in keys], [key.usage for key in keys]
                scheme = AsymmetricSignature(given, public, usages, reader)
            case StandardWebhooks():
                scheme = Standard(given, known)
        return scheme

    def _compile(self) -> None:
        settings, reader = self._settings, self.reader
        self._type_places = [place_of(each) for each in parse_template(settings.type).placeholders]
        self._type = compile_text(reader, parse_template(settings.type))
        self._subject = compile_text(reader, parse_template(settings.subject)) if settings.subject else None
        self._key = (
            compile_text(reader, parse_template(settings.key), complete=True) if settings.key else None
        )
        self._data = compile_value(reader, parse_template(settings.data)) if settings.data else None
        context = {
            **settings.context,
            "timestamp": settings.timestamp or settings.context.get("timestamp", ""),
        }
        self._context = [
            (name, compile_value(reader, parse_template(text))) for name, text in context.items() if text
        ]
        self._events = compile_value(reader, parse_template(settings.events)) if settings.events else None
        self._reply = None if settings.reply is None else Answer(reader, settings.reply, {})
        verify_tokens = [each for each in settings.verify_tokens if each.reveal()]
        self._tokens = Secrets.of(
            *(each.reveal() for each in verify_tokens), usages=[each.usage for each in verify_tokens]
        )
        filters = {"hmac": self.scheme.digest_of} if isinstance(self.scheme, HmacSignature) else {}
        greetings = [Greeting(reader, each, filters) for each in settings.handshakes]
        self.early = [each for each in greetings if not each.verified]
        self.late = [each for each in greetings if each.verified]
        self.needs_body = self.scheme.reads_body or any(each.names_body for each in self.early)

    def check_network(self, incoming: Incoming) -> None:
        """Check that the sender's address is in one of the networks, if any are configured.

        Raises:
            Forbidden: the address is in none of them, or is unknown.
        """
        if not self._networks:
            return
        try:
            address = ipaddress.ip_address(incoming.remote)
        except ValueError:
            raise Forbidden("The sender's address is unknown, and only some networks are permitted") from None
        address = getattr(address, "ipv4_mapped", None) or address
        if not any(address in network for network in self._networks):
            raise Forbidden("The sender's address is not in the permitted networks")

    def greet(self, greetings: Sequence[Greeting], incoming: Incoming) -> Reply | None:
        """Return the reply to a handshake, or None for any other request.

        Raises:
            Forbidden: its token is wrong.
        """
        reading: Reading | None = None
        for each in greetings:
            if each.method == incoming.method:
                reading = reading or Reading(self.reader, incoming)
                if each.fits(reading):
                    return each.reply(reading, self._tokens)
        return None

    def accept(self, incoming: Incoming) -> Accepted | Reply:
        """Return the events of a request, and the reply.

        Raises:
            Malformed: the body is not valid.
            Invalid: a part of an event is missing or wrong.
            TooLarge: the request has too many events.
        """
        reading = Reading(self.reader, incoming)
        reading.read()  # so that a broken body is refused even if no template uses it
        if self._events is None:
            return Accepted(event=self._event(reading), reply=self._reply_to(reading))
        events = [self._item_event(reading, at, item) for at, item in enumerate(self.items(reading))]
        reply = self._reply_to(reading)
        if events:
            return Accepted(events=events, reply=reply)
        empty = reply(Receipt()) if callable(reply) else reply
        return empty if isinstance(empty, Reply) else Reply(body=empty)

    def items(self, reading: Reading) -> list[msgspec.Raw]:
        """Return the items of a batch; the body itself if the source reads no batches.

        Raises:
            Invalid: there is no list.
            TooLarge: the list has too many items.
        """
        events = self._events
        if events is None:
            return [] if reading.raw is None else [reading.raw]
        found = events(reading)
        text = bytes(found) if isinstance(found, msgspec.Raw) else b""
        if text[:1] != b"[":
            issue = "field is required" if text in (b"", _NULL) else "expected a list"
            raise Invalid(field=self._batch_place, issue=issue)
        most = self._settings.max_events
        try:
            return first_items(text, most, all_of_them=True)
        except msgspec.ValidationError:
            raise TooLarge(f"The body has more than {most} events") from None

    def _item_event(self, reading: Reading, at: int, item: msgspec.Raw) -> Event:
        reading.start_item(item)
        try:
            return self._event(reading)
        except Invalid as error:
            place = f"{self._batch_place}.{at}"
            field = f"{place}: {error.field}" if error.field else place
            raise Invalid(error.message, field=field, issue=error.issue) from None

    @property
    def _batch_place(self) -> str:
        lone = parse_template(self._settings.events).lone
        return "body" if lone is None else place_of(lone)

    def _event(self, reading: Reading) -> Event:
        type_ = self._type(reading)
        if not type_.strip():
            raise Invalid(
                "Invalid event type", field="type", issue=f"missing: {', '.join(self._type_places)}"
            )
        data: Any
        if self._data is not None:
            data = self._data(reading)
            if data is None:
                raise Invalid(field=self._data_place, issue="field is required")
        else:
            data = reading.whole
        context: Any = EMPTY
        if self._context:
            context = {}
            for name, get in self._context:
                value = get(reading)
                if value and value != _NULL_VALUE:
                    context[name] = value
        key = self._key(reading) if self._key is not None else ""
        return Event(
            type=type_,
            subject=self._subject(reading) or None if self._subject is not None else None,
            data=data,
            context=context,
            key=key if key.strip() else None,
        )

    @property
    def _data_place(self) -> str:
        placeholders = parse_template(self._settings.data).placeholders
        return ", ".join(place_of(each) for each in placeholders) or "data"

    def _reply_to(self, reading: Reading) -> Any:
        answer = self._reply
        if answer is None:
            return _accepted
        if not answer.names_event:
            return answer.of(reading)
        if answer.names_request:
            answer.of(reading)  # so that a value that does not fit is a 400, before anything is stored

        def reply(receipt: Receipt) -> Reply:
            reading.event_id = receipt.event_id
            return answer.of(reading)

        return reply


def _accepted(receipt: Receipt) -> dict[str, str]:
    return {"status": "accepted", "event_id": receipt.event_id}
