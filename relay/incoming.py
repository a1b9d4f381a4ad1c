"""One request as a source gets it: bytes and headers, without objects of a web framework."""

from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from relay.base.json_text import decode, salvage
from relay.config.secrets import Credential, Secrets
from relay.errors import Invalid, Malformed, Unauthenticated

T = TypeVar("T")
_decoders: dict[type, msgspec.json.Decoder[object]] = {}

LARGE = 4096
"""Bytes; the parts of a larger body are remembered, because parsing them again would take long."""


class Incoming(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request.

    Header values may hold surrogates (bytes that were no UTF-8): never store or log them raw;
    `header` gives a clean one.
    """

    method: str
    path: str  # percent-encoded as sent, without the source's prefix and the query
    headers: CIMultiDictProxy[str]  # names are case-insensitive
    body: bytes = b""  # empty until the body has been read
    params: Mapping[str, str] = {}  # values of the route's placeholders, percent-decoded
    query: str = ""  # raw query string; never logged
    parts: tuple[msgspec.Raw, ...] = ()  # fields of a large decoded body that are known to be valid JSON

    @classmethod
    def of(
        cls,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        **params: str,
    ) -> "Incoming":
        """Return a request from plain values, for tests and samples."""
        return cls(
            method=method,
            path=path,
            headers=CIMultiDictProxy(CIMultiDict(headers or {})),
            body=body,
            params=params,
        )

    def header(self, name: str) -> str:
        """Return a header's trimmed value; `""` if it is absent or contains surrogates."""
        value = self.headers.get(name, "").strip()
        return value if value.isascii() or _storable(value) else ""

    def decode(self, type_: type[T], *, loose: bool = False) -> T:
        """Decode the JSON body into a msgspec type; `loose`: also a body that is not quite JSON.

        Strings show a lone surrogate as its escape (`relay.base.json_text`); `Raw` keeps the sender's bytes.

        Raises:
            Malformed: the body is no JSON in valid UTF-8, or nested too deeply.
            Invalid: a field is missing or of the wrong type; `field` names it.
        """
        decoder = _decoders.get(type_)
        if decoder is None:
            decoder = _decoders[type_] = msgspec.json.Decoder(type_)
        try:
            self.body.decode()  # msgspec does not check Raw and unknown fields
            try:
                value = decoder.decode(self.body)
            except msgspec.DecodeError:
                value = decode(decoder, self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if loose:
                with suppress(ValueError, RecursionError):
                    return decode(decoder, salvage(self.body))  # type: ignore[return-value]
            if isinstance(error, msgspec.ValidationError):
                field, issue = _field_and_issue(str(error))
                raise Invalid(field=field, issue=issue) from None
            raise Malformed from None
        if len(self.body) > LARGE and isinstance(value, msgspec.Struct):
            fields = [getattr(value, name) for name in value.__struct_fields__]
            parts = tuple([field for field in fields if isinstance(field, msgspec.Raw)])
            msgspec.structs.force_setattr(self, "parts", parts)  # a cache: it changes no result
        return value  # type: ignore[return-value]

    def bearer(self, tokens: Secrets) -> Credential:
        """Return the credential of the request's bearer token.

        The scheme is read in any case, the token is trimmed and compared in constant time as bytes.

        Raises:
            Unauthenticated: `problem` is `missing`, `scheme` (not Bearer, or two headers) or `unknown`.
        """
        values = self.headers.getall("Authorization", [])
        if not values:
            raise Unauthenticated(problem="missing")
        scheme, _, token = values[0].strip().partition(" ")
        token = token.strip()
        if len(values) > 1 or scheme.lower() != "bearer" or not token:
            raise Unauthenticated(problem="scheme")
        credential = tokens.find(token.encode("utf-8", "surrogateescape"))
        if credential is None:
            raise Unauthenticated(problem="unknown")
        return credential


def _storable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _field_and_issue(message: str) -> tuple[str, str]:
    """Split msgspec's "Expected `str`, got `int` - at `$.discord_id`" into field and issue."""
    issue, _, where = message.partition(" - at ")
    field = where.strip("`").removeprefix("$").removeprefix(".")
    if issue.startswith("Object missing required field"):
        missing = issue.split("`")[1]
        return (f"{field}.{missing}" if field else missing), "field is required"
    return field, issue[:1].lower() + issue[1:]
