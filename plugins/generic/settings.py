"""The keys of a generic source, as records; this module checks each key separately."""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from relay.source import Duration, Incoming, SettingError, parse_path, parse_template

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
MOST_SIGNATURES = 10
"""Signatures in one header: each may cost a check of the whole body, before the sender is known."""

_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%-]*", re.ASCII)  # RFC 3986, 3.3
_NAMED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:path)?\}", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)  # RFC 9110, 5.6.2
_HEX = re.compile(r"[0-9a-fA-F]+", re.ASCII)
_URL = re.compile(
    r"https?://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?", re.ASCII
)
_RUNS = re.compile(r"html|xml|svg|script|ecma", re.IGNORECASE)  # content types that browsers run
_FIRST = re.compile(r"(header|query|form):(.+)")
_OURS = ("connection", "content-length", "transfer-encoding", "content-type")


def check(function: Callable[[Any], Any]) -> msgspec.Meta:
    """Return a note for a field's type: the function checks its value, and raises ValueError."""
    return msgspec.Meta(extra={"check": function})


def describe(text: str) -> msgspec.Meta:
    """Return a note for a field's type: its description in docs/sources.md."""
    return msgspec.Meta(description=text)


def template(text: str) -> str:
    """Check that a text is a template."""
    parse_template(text, {"hmac": str})  # `hmac` is valid in few templates, which is checked later
    return text


def path(text: str) -> str:
    """Check a path of requests: segments, each of them literal or `{name}`."""
    if not text.startswith("/"):
        raise ValueError(f'a path begins with a slash: "/{text}"')
    if text != "/" and text.endswith("/"):
        raise ValueError("a path has no slash at its end")
    if "//" in text:
        raise ValueError("a path has no empty segment")
    for segment in text[1:].split("/"):
        _check_segment(segment)
    names = names_in(text)
    if len(set(names)) < len(names):
        raise ValueError("two segments have the same name")
    if text.count(":path}") > 1:
        raise ValueError("a path may have one {name:path}")
    return text


def _check_segment(segment: str) -> None:
    if _NAMED.fullmatch(segment):
        return
    if "{" in segment or "}" in segment:
        raise ValueError(f'"{segment}": a placeholder is a whole segment, such as {{store}}')
    if not _SEGMENT.fullmatch(segment):
        raise ValueError(f'"{segment}" has a character that must be percent-encoded')
    if segment in (".", ".."):
        raise ValueError(f'clients and proxies remove the segment "{segment}" from a path')


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of a path's segments."""
    return tuple(found[0] for found in _NAMED.findall(text))


def header_name(text: str) -> str:
    """Check the name of a header."""
    if not _TOKEN.fullmatch(text):
        raise ValueError("not a valid header name")
    return text


def not_empty(text: str) -> str:
    """Check that a text has characters."""
    if not text:
        raise ValueError("must not be empty")
    return text


def network(text: str) -> str:
    """Check an address or a network."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError('expected an address or a network such as "192.0.2.0/24"') from None
    return text


def public_url(text: str) -> str:
    """Check the scheme and host that a sender uses."""
    if not _URL.fullmatch(text):
        raise ValueError('expected scheme and host without a path, such as "https://hooks.example.com"')
    return text


def method(text: str) -> str:
    """Check a method of requests."""
    if not _TOKEN.fullmatch(text) or text != text.upper():
        raise ValueError('expected a method such as "POST"')
    if text in ("OPTIONS", "CONNECT", "TRACE"):
        raise ValueError(f"{text} requests contain no event")
    return text


def first_of_list(text: str) -> str:
    """Check a place of which the first value is used."""
    if not _FIRST.fullmatch(text):
        raise ValueError('expected "header:NAME", "query:NAME" or "form:NAME"')
    return text


def body_field(text: str) -> str:
    """Check a path into a body."""
    parse_path(text)
    return text


Template = Annotated[str, check(template)]
HeaderName = Annotated[str, check(header_name)]
Literal_ = Annotated[str, check(not_empty)]
Encoding = Literal["hex", "base64"]
Method = Annotated[str, check(method)]


class Bearer(msgspec.Struct, frozen=True, kw_only=True):
    """`verify = "bearer"`: one of `secrets` is the token of `Authorization: Bearer`."""


class Basic(msgspec.Struct, frozen=True, kw_only=True):
    """`verify.basic`: the user's name; the password is one of `secrets`."""

    user: Annotated[str, describe("the user's name; the password is one of `secrets`")]

    def __post_init__(self) -> None:
        if ":" in self.user:
            raise SettingError("a user's name has no colon (RFC 7617)", "user")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """`verify.api_key`: one of `secrets` is in a header, in the query or in a field of the body."""

    header: Annotated[HeaderName | None, describe("the header with the key")] = None
    query: Annotated[
        Annotated[str, check(not_empty)] | None,
        describe("the query parameter with the key. Proxies log queries: prefer a header"),
    ] = None
    value: Annotated[
        Template | None,
        describe(
            'a template such as `"{body:token}"`; with `{item:…}` each item of a batch must have the key'
        ),
    ] = None
    prefix: Annotated[str, describe("text in front of the key")] = ""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.header, self.query, self.value)) != 1:
            raise ValueError('expected exactly one of header = "NAME", query = "NAME" and value = "TEMPLATE"')


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of every signature."""

    header: Annotated[HeaderName, describe("the header with the signature")]
    prefix: Annotated[str, describe("text in front of each signature, such as `sha256=`")] = ""
    separator: Annotated[
        str,
        describe("text between the items of a list in the header, such as `,`; one matching item is enough"),
    ] = ""
    signed: Annotated[Template, describe("the signed text: a template")] = "{body}"
    timestamp_header: Annotated[HeaderName | None, describe("the header with the time of the signature")] = (
        None
    )
    timestamp_field: Annotated[
        Literal_ | None,
        describe("text in front of the time, if the time is an item of the header's list, such as `t=`"),
    ] = None
    timestamp_unit: Annotated[
        Literal["s", "ms", "rfc3339"],
        describe("how the time is written: `s` or `ms` since 1970, or `rfc3339`"),
    ] = "s"
    tolerance: Annotated[
        Annotated[Duration, msgspec.Meta(gt=0)] | None,
        describe("how much the time may differ from now, in both directions; `5m` if there is a time"),
    ] = None
    body_sha256: Annotated[
        Literal_ | None,
        describe("the query parameter with the hex SHA-256 of the body; `signed` must contain `{url}`"),
    ] = None

    def faults(self) -> list[SettingError]:
        """Return contradictions between the settings, with their keys."""
        wrong: list[SettingError] = []
        sign = parse_template(self.signed)
        kinds = {each.kind for each in sign.placeholders}
        timed = self.timestamp_header or self.timestamp_field
        if not kinds:
            wrong.append(SettingError("the signed text does not depend on the request", "signed"))
        if self.timestamp_header and self.timestamp_field:
            wrong.append(SettingError("give either timestamp_header or timestamp_field", "timestamp_field"))
        if self.timestamp_field and not self.separator:
            wrong.append(
                SettingError('a list needs its separator, such as separator = ","', "timestamp_field")
            )
        if self.timestamp_field and self.timestamp_field == self.prefix:
            wrong.append(
                SettingError("the time and the signatures need different prefixes", "timestamp_field")
            )
        if self.tolerance is not None and not timed:
            text = "a tolerance needs timestamp_header or timestamp_field: where the time of the request is"
            wrong.append(SettingError(text, "tolerance"))
        if timed and not self.signs_time(sign):
            text = "the signed text lacks {timestamp}, so a replayed request could carry any time"
            wrong.append(SettingError(text, "signed"))
        if "timestamp" in kinds and not timed:
            text = "{timestamp} needs timestamp_header or timestamp_field: where the time of the request is"
            wrong.append(SettingError(text, "signed"))
        if self.body_sha256 and "url" not in kinds:
            text = "the signed text lacks {url}, so anybody could change the digest in it"
            wrong.append(SettingError(text, "body_sha256"))
        return wrong

    def signs_time(self, sign: Any) -> bool:
        """Return whether the signed text contains the time."""
        same = (self.timestamp_header or "").lower()
        return any(
            each.kind == "timestamp" or (each.kind == "header" and each.argument.lower() == same)
            for each in sign.placeholders
        )


class Hmac(Signed, frozen=True, kw_only=True):
    """`verify.hmac`: a signature with one of `secrets`."""

    algorithm: Annotated[Literal["sha1", "sha256", "sha512"], describe("the hash of the HMAC")] = "sha256"
    encoding: Annotated[Encoding, describe("how the signature is written")] = "hex"
    key_encoding: Annotated[
        Literal["text", "hex", "base64"],
        describe("how `secrets` are written; `text`: their own bytes are the key"),
    ] = "text"
    key_prefix: Annotated[str, describe("text at the start of each secret; the key is the rest")] = ""


class Ed25519(Signed, frozen=True, kw_only=True):
    """`verify.ed25519`: a signature with the private key of one of `public_keys`."""

    encoding: Annotated[Encoding, describe("how the signature is written")] = "hex"


class Ecdsa(Signed, frozen=True, kw_only=True):
    """`verify.ecdsa`: P-256 with SHA-256; the signature is in DER form."""

    encoding: Annotated[Encoding, describe("how the signature is written")] = "base64"


class StandardWebhooks(msgspec.Struct, frozen=True, kw_only=True):
    """`verify = "standard-webhooks"`: three headers that begin with `header_prefix`."""

    header_prefix: Annotated[HeaderName, describe("the beginning of the three headers' names")] = "webhook-"
    tolerance: Annotated[
        Annotated[Duration, msgspec.Meta(ge=1)],
        describe("how much the time may differ from now, in both directions"),
    ] = 300.0


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """How a sender proves its identity: exactly one of these keys."""

    bearer: Bearer | None = None
    basic: Basic | None = None
    api_key: ApiKey | None = None
    hmac: Hmac | None = None
    ed25519: Ed25519 | None = None
    ecdsa: Ecdsa | None = None
    standard_webhooks: StandardWebhooks | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(self.__struct_fields__)
            raise ValueError(
                f"expected exactly one of {known}; got {' and '.join(given) or 'an empty table'}"
            )

    @property
    def scheme(self) -> Any:
        """The record of the only key."""
        return next(each for name in self.__struct_fields__ if (each := getattr(self, name)) is not None)


def _is_json(value: Any) -> bool:
    """Return whether JSON can express a value of TOML."""
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return (
        value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    )


class ReplySettings(msgspec.Struct, frozen=True, kw_only=True):
    """`reply`: the answer after an accepted request."""

    status: Annotated[int, msgspec.Meta(ge=200, le=299), describe("the HTTP status, 200 to 299")] = 200
    json: Annotated[
        Any, describe("a JSON value; a string in it is a template, a lone placeholder keeps its JSON value")
    ] = None
    text: Annotated[Template | None, describe("text: a template")] = None
    empty: Annotated[bool, describe("whether the reply has no body")] = False
    content_type: Annotated[
        str | None, describe('by default "application/json" or "text/plain; charset=utf-8"')
    ] = None
    headers: Annotated[dict[HeaderName, Template], describe("further headers; values are templates")] = {}

    def faults(self) -> list[SettingError]:
        """Return contradictions between the settings, with their keys."""
        wrong: list[SettingError] = []
        given = [name for name in ("json", "text", "empty") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            wrong.append(SettingError(f"give only one of json, text and empty; got {' and '.join(given)}"))
        if not _is_json(self.json):
            wrong.append(SettingError("dates and infinite numbers are not JSON; write them as text", "json"))
        if self.status in (204, 205) and given != ["empty"]:
            wrong.append(
                SettingError(f"a reply with status {self.status} has no body; add empty = true", "status")
            )
        for name in self.headers:
            if name.lower() in _OURS:
                other = "; use content_type" if name.lower() == "content-type" else ""
                wrong.append(SettingError(f"the relay sets this header itself{other}", "headers", name))
        if self.content_type is not None:
            if (
                not self.content_type
                or not self.content_type.isascii()
                or not self.content_type.isprintable()
            ):
                wrong.append(SettingError("not a valid content type", "content_type"))
            elif _RUNS.search(self.content_type) and "{" in f"{self.text}{self.json}".replace("{{", ""):
                text = (
                    "browsers run this type, and the reply may contain text from a stranger; use text/plain"
                )
                wrong.append(SettingError(text, "content_type"))
        return wrong


class Handshake(msgspec.Struct, frozen=True, kw_only=True):
    """One of `handshakes`: requests that are answered without an event."""

    method: Annotated[Method, describe("the method of the request")]
    when: Annotated[
        dict[Template, str],
        describe(
            'templates with their required values; `"*"`: any value that is not empty. By default, every '
            "request with this method matches"
        ),
    ] = {}
    token: Annotated[
        Template | None, describe("a template that must be one of `verify_tokens`; else the answer is 403")
    ] = None
    verified: Annotated[
        bool, describe("whether the request must pass `verify`; `false`: everybody gets the answer")
    ] = True
    reply: Annotated[ReplySettings, describe("the answer")]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One of `samples`: a documented request without credentials."""

    name: Annotated[str, check(not_empty)]
    method: Method = "POST"
    path: Annotated[str, check(path)] | None = None  # below the prefix; None: the source's first path
    query: str = ""
    headers: dict[HeaderName, str] = {}
    body: str = ""

    def request(self, first_path: str) -> Incoming:
        """Return the request; the value of each `{name}` in a path is the name itself."""
        route = self.path or first_path
        params = {name: name for name in names_in(route)}
        path = _NAMED.sub(lambda found: found[1], route)
        sample = Incoming.of(self.method, path, self.headers, self.body.encode(), **params)
        return msgspec.structs.replace(sample, query=self.query, label=self.name)
