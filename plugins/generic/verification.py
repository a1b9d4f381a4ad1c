"""Credentials of senders: tokens, passwords, keys and Standard Webhooks, compiled at load."""

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from relay.source import (
    Incoming,
    Invalid,
    Secret,
    Secrets,
    SettingError,
    SignatureError,
    Unauthenticated,
    Usage,
    parse_template,
    sign_standard_webhooks,
    verify_standard_webhooks,
)

from .reading import Reader, Reading
from .rendering import compile_text
from .settings import MOST_SIGNATURES, ApiKey, Basic, StandardWebhooks

_SECOND = 1_000_000
_DUMMY = {"webhook-id": "-", "webhook-timestamp": "0", "webhook-signature": "-"}

Items = Callable[[Reading], Sequence[msgspec.Raw]]
"""Returns the items of a batch; one item, the body, if the source reads no batches."""


class Scheme(Protocol):
    """One way to check senders."""

    @property
    def reads_body(self) -> bool:
        """Whether a check needs the body."""

    def check(self, incoming: Incoming) -> None:
        """Accept a request by returning, else raise Unauthenticated."""

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """Yield the faults of a refused request, for `relay verify`; never a secret."""

    def sign(self, incoming: Incoming) -> Incoming:
        """Return a sample with the credentials of the first secret, if this scheme can make them."""


class Nobody:
    """`verify = "none"`: every sender is accepted."""

    reads_body = False

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`."""
        _ = incoming
        yield from ()

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`."""
        return incoming


class BearerToken:
    """`verify = "bearer"`."""

    reads_body = False

    def __init__(self, secrets: Sequence[str], usages: Sequence[Usage]) -> None:
        self._secrets = secrets
        self._tokens = Secrets.of(*(each.strip() for each in secrets), usages=usages)

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""
        incoming.bearer(self._tokens)

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`; `relay verify` explains bearer tokens itself."""
        _ = incoming
        yield from ()

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`."""
        return incoming.with_headers({"Authorization": f"Bearer {self._secrets[0].strip()}"})


class BasicAuth:
    """`verify.basic` (RFC 7617)."""

    reads_body = False

    def __init__(self, settings: Basic, secrets: Sequence[str], usages: Sequence[Usage]) -> None:
        self._pairs = [f"{settings.user}:{secret}" for secret in secrets]
        self._tokens = Secrets.of(*self._pairs, usages=usages)
        self._user = settings.user

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""
        credential = self._tokens.find(self._pair(incoming))
        if credential is None:
            raise Unauthenticated("Wrong user name or password")
        credential.usage.count += 1

    def _pair(self, incoming: Incoming) -> bytes:
        values = incoming.headers.getall("Authorization", [])
        if not values:
            raise Unauthenticated("Missing Authorization header", problem="missing")
        scheme, _, encoded = values[0].strip().partition(" ")
        if len(values) > 1 or scheme.lower() != "basic" or not encoded:
            raise Unauthenticated("Expected one Authorization header with Basic", problem="scheme")
        try:
            return binascii.a2b_base64(encoded.strip(), strict_mode=True)
        except ValueError:
            raise Unauthenticated("The credentials are not base64", problem="scheme") from None

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`."""
        try:
            user, _, password = self._pair(incoming).partition(b":")
        except Unauthenticated as error:
            yield f"header Authorization: {error.message}"
            return
        if user != self._user.encode():
            yield f'the user is not "{self._user}"'
        if self._tokens.find(f"{self._user}:".encode() + password) is not None:
            yield "the password matches"
        elif self._tokens.find(f"{self._user}:".encode() + password.strip()) is not None:
            yield "the password matches without the white space around it"
        else:
            yield f"the password does not match any of the {len(self._pairs)} in `secrets`"

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`."""
        encoded = base64.b64encode(self._pairs[0].encode()).decode()
        return incoming.with_headers({"Authorization": f"Basic {encoded}"})


class Key:
    """`verify.api_key`."""

    def __init__(
        self,
        settings: ApiKey,
        secrets: Sequence[str],
        usages: Sequence[Usage],
        reader: Reader,
        items: Items,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._secrets = secrets
        self._tokens = Secrets.of(*secrets, usages=usages)
        name = settings.header or settings.query or ""
        kind = "header" if settings.header else "query"
        template = parse_template(settings.value if settings.value is not None else f"{{{kind}:{name}}}")
        self.place = settings.value if settings.value is not None else f"{kind} {name}"
        self._get = compile_text(reader, template, complete=True)
        self._items = items if any(each.kind == "item" for each in template.placeholders) else None
        self.reads_body = any(each.kind in ("body", "form", "item") for each in template.placeholders)

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""
        self._check_all(Reading(self._reader, incoming))

    def _check_all(self, reading: Reading) -> None:
        if self._items is None:
            self._check(reading)
            return
        items = self._items(reading)
        if not items:
            raise Unauthenticated("The batch is empty, so it has no key", problem="missing")
        for item in items:
            reading.start_item(item)
            self._check(reading)

    def _check(self, reading: Reading) -> None:
        value = self._get(reading)
        if not value:
            raise Unauthenticated(f"Missing key ({self.place})", problem="missing")
        if not value.startswith(self._settings.prefix):
            raise Unauthenticated(f"The key ({self.place}) is malformed", problem="scheme")
        key = value.removeprefix(self._settings.prefix)
        credential = self._tokens.find(key.encode("utf-8", "surrogateescape"))
        if credential is None:
            raise Unauthenticated("Unknown key")
        credential.usage.count += 1

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`."""
        reading = Reading(self._reader, incoming)
        try:
            self._check_all(reading)
        except Unauthenticated as error:
            yield error.message
            value = "" if self._items is not None else self._get(reading)
            for what, other in (
                ("without the white space around it", value.removeprefix(self._settings.prefix).strip()),
                ("with its prefix: remove `prefix` from config.toml", value),
                ('without `Bearer ` in front: set prefix = "Bearer "', value.removeprefix("Bearer ")),
            ):
                if value and self._tokens.find(other.encode("utf-8", "surrogateescape")) is not None:
                    yield f"the key matches {what}"

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`; a key in the body is part of the sample."""
        key = f"{self._settings.prefix}{self._secrets[0]}"
        if self._settings.header:
            return incoming.with_headers({self._settings.header: key})
        if self._settings.query:
            return incoming.with_query(self._settings.query, key)
        return incoming


class Standard:
    """`verify = "standard-webhooks"`."""

    reads_body = True

    def __init__(self, settings: StandardWebhooks, secrets: Sequence[Secret]) -> None:
        self._prefix = settings.header_prefix
        self._tolerance = int(settings.tolerance)
        self._secrets = tuple(secrets)
        for at, secret in enumerate(secrets):
            try:
                with suppress(SignatureError):
                    verify_standard_webhooks((secret,), _DUMMY, b"", 0)
            except ValueError as error:
                raise SettingError(str(error), "secrets", at) from None

    def _verify(self, incoming: Incoming) -> None:
        headers = {}
        for name in ("id", "timestamp", "signature"):
            values = incoming.headers.getall(f"{self._prefix}{name}", [])
            if len(values) > 1:
                raise Invalid(field=f"header {self._prefix}{name}", issue="was sent more than once")
            headers[f"webhook-{name}"] = values[0] if values else ""
        if headers["webhook-signature"].count(" ") >= MOST_SIGNATURES:
            raise SignatureError("signature", f"more than {MOST_SIGNATURES} signatures")
        now = incoming.received_at // _SECOND
        verify_standard_webhooks(self._secrets, headers, incoming.body, now, self._tolerance)

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""
        try:
            self._verify(incoming)
        except SignatureError as error:
            problem = "missing" if error.problem == "headers" else "unknown"
            raise Unauthenticated(f"Invalid signature: {error}", problem=problem) from None

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`."""
        try:
            self._verify(incoming)
        except SignatureError as error:
            yield str(error).replace("webhook-", self._prefix)
        except Invalid as error:
            yield error.detail

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`."""
        now = incoming.received_at // _SECOND
        id_ = incoming.header(f"{self._prefix}id") or f"msg_{now}"
        try:
            headers = sign_standard_webhooks(self._secrets[:1], id_, now, incoming.body)
        except ValueError:  # a public key
            return incoming
        names = {name: name.replace("webhook-", self._prefix, 1) for name in headers}
        return incoming.with_headers({names[name]: value for name, value in headers.items()})
