"""The contract of a source: a frozen record of settings with methods that are pure functions of a request."""

import hmac
import unicodedata
from binascii import a2b_base64, a2b_hex
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlencode

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from relay import __version__
from relay.base.clock import instant, rfc3339
from relay.base.forms import MULTIPART, multipart_fields, urlencoded_fields
from relay.base.json_path import parse_path
from relay.base.json_text import check as check_json
from relay.base.json_text import decode as decode_json
from relay.base.json_text import read as read_json
from relay.base.json_text import salvage
from relay.base.template import FILTERS, Placeholder, Takes, Template, text_of
from relay.base.template import parse as parse_template
from relay.base.units import Duration, Rate, Size
from relay.config.problems import SettingError
from relay.config.secrets import Credential, Secret, Secrets, Usage, holds_secret
from relay.errors import (
    BodyTimeout,
    Conflict,
    Forbidden,
    Invalid,
    KeyConflict,
    Malformed,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PluginFailed,
    RateLimited,
    Refusal,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from relay.keys import ecdsa_verifier, ed25519_verifier
from relay.model import (
    EMPTY,
    Heartbeat,
    Receipt,
    Register,
    Session,
    SessionSeen,
    Unregister,
    WorkerChange,
    WorkerStatus,
)
from relay.signing import SignatureError, sign_standard_webhooks
from relay.signing import verify as verify_standard_webhooks

__all__ = [
    "EMPTY", "FILTERS", "LONGEST_ID", "VERSION", "Accepted", "BodyTimeout", "Conflict", "Duration", "Event",
    "Forbidden", "Guide", "Heartbeat", "Incoming", "Invalid", "KeyConflict", "Malformed", "MethodNotAllowed",
    "NotFound", "Overloaded", "Placeholder", "PluginFailed", "Preset", "Rate", "RateLimited", "Receipt",
    "Refusal", "Register", "Reply", "Rules", "Secret", "Secrets", "Session", "SessionSeen", "SettingError",
    "SignatureError", "Size", "Source", "Takes", "Template", "TooLarge", "Unauthenticated", "Unavailable",
    "Unregister", "Usage", "WorkerChange", "WorkerStatus", "as_json", "as_map", "as_value", "check_id",
    "check_length", "check_type", "decode_json", "ecdsa_verifier", "ed25519_verifier", "instant",
    "parse_path", "parse_template", "read_json", "rfc3339", "route", "sign_standard_webhooks", "text_of",
    "verify_standard_webhooks",
]  # fmt: skip


VERSION = __version__
"""The relay's version, for replies that contain it."""


T = TypeVar("T")
_decoders: dict[type, msgspec.json.Decoder[object]] = {}

MOST_FIELDS = 1000
"""Fields of a form or a query."""

LARGE = 4096
"""Bytes; the parts of a larger body are remembered, because parsing them again would take long."""


def _unknown() -> str:
    return "unknown"


class Incoming(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request.

    Header values may hold surrogates (bytes that were not UTF-8): never store or log them raw;
    `header` gives a clean one.
    """

    method: str
    path: str  # percent-encoded as sent, without the source's prefix and the query
    headers: CIMultiDictProxy[str]  # names are case-insensitive
    body: bytes = b""  # empty until the body has been read
    params: Mapping[str, str] = {}  # values of the route's placeholders, percent-decoded
    query: str = ""  # raw query string; never logged
    parts: tuple[msgspec.Raw, ...] = ()  # fields of a large decoded body that are known to be valid JSON
    label: str = ""  # of a sample, for `relay send NAME --list`; without it, its event's type
    target: str = ""  # path and query as sent, with the source's prefix; "" of a sample
    received_at: int = 0  # time of the body's arrival, until then of the head's; microseconds UTC
    compressed: bytes | None = None  # the body as received, if it was compressed
    find_remote: Callable[[], str] = _unknown  # called by `remote` when needed, because it costs CPU

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

    @property
    def remote(self) -> str:
        """The sender's address, as trusted proxies report it; `"unknown"` for unix sockets and samples."""
        return self.find_remote()

    @property
    def received(self) -> bytes:
        """The body as received, which signatures cover; `body` is its content if it was compressed."""
        return self.body if self.compressed is None else self.compressed

    def header(self, name: str) -> str:
        """Return a header's trimmed value; `""` if it is absent or contains surrogates."""
        value = self.headers.get(name, "").strip()
        return value if value.isascii() or _storable(value) else ""

    def decode(self, type_: type[T], *, loose: bool = False) -> T:
        """Decode the JSON body into a msgspec type; `loose`: accept almost-valid JSON, too.

        Strings show a lone surrogate as its escape (`relay.base.json_text`); `Raw` keeps the sender's bytes.

        Raises:
            Malformed: the body is not JSON in valid UTF-8, or is nested too deeply.
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
                value = decode_json(decoder, self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if loose:
                with suppress(ValueError, RecursionError):
                    return decode_json(decoder, salvage(self.body))  # type: ignore[return-value]
            if isinstance(error, msgspec.ValidationError):
                field, issue = _field_and_issue(str(error))
                raise Invalid(field=field, issue=issue) from None
            if self.body.startswith(BOM_UTF8):
                raise Malformed(note="it begins with a byte order mark") from None
            raise Malformed from None
        if len(self.body) > LARGE and isinstance(value, msgspec.Struct):
            fields = [getattr(value, name) for name in value.__struct_fields__]
            parts = tuple([field for field in fields if isinstance(field, msgspec.Raw)])
            msgspec.structs.force_setattr(self, "parts", parts)  # a cache: it changes no result
        return value  # type: ignore[return-value]

    def query_fields(self, limit: int = MOST_FIELDS) -> list[tuple[str, str]]:
        """Return names and values of the query, decoded, in their order.

        Raises:
            Invalid: it is not percent-encoded UTF-8, or has more than `limit` fields.
        """
        try:
            return urlencoded_fields(self.query, limit)
        except ValueError as error:
            raise Invalid(field="query", issue=_issue(error)) from None

    def form_fields(self, limit: int = MOST_FIELDS) -> list[tuple[str, str]]:
        """Return names and values of a form in the body, decoded, in their order; without files.

        The content type decides whether the body is a multipart form or URL-encoded.

        Raises:
            Malformed: it is not such a form, a value is not UTF-8, or there are more than `limit` fields.
        """
        content_type = self.header("Content-Type")
        try:
            if content_type.partition(";")[0].strip().lower() == MULTIPART:
                return multipart_fields(self.body, content_type, limit)
            return urlencoded_fields(self.body.decode(), limit)
        except ValueError as error:
            raise Malformed(f"The body is not a valid form: {_issue(error)}") from None

    def with_headers(self, headers: Mapping[str, str]) -> "Incoming":
        """Return the request with these headers set, for `sign`."""
        changed = CIMultiDict(self.headers)
        changed.update(headers)
        return msgspec.structs.replace(self, headers=CIMultiDictProxy(changed))

    def with_query(self, name: str, value: str) -> "Incoming":
        """Return the request with one more query parameter, for `sign`."""
        query = f"{self.query}&{urlencode({name: value})}".removeprefix("&")
        target = f"{self.target.partition('?')[0]}?{query}"
        return msgspec.structs.replace(self, query=query, target=target)

    def hmac(
        self,
        secrets: Sequence[Secret],
        header: str,
        *,
        algorithm: Literal["sha256", "sha1", "sha512"] = "sha256",
        encoding: Literal["hex", "base64"] = "hex",
        prefix: str = "",
        signed: bytes | None = None,
    ) -> None:
        """Check an HMAC in a header, in constant time per secret; any of the secrets may match.

        Args:
            secrets: their UTF-8 text is the key.
            header: name of the header.
            algorithm: hash function.
            encoding: form of the HMAC in the header.
            prefix: text before it, such as `sha256=`.
            signed: the signed bytes; the body as received without it.

        Raises:
            Unauthenticated: the header is missing (`missing`) or malformed (`scheme`), or no secret matches
            (`unknown`).
        """
        values = self.headers.getall(header, [])
        if not values:
            raise Unauthenticated(f"Missing signature (header {header})", problem="missing")
        text, digest = values[0].strip(), b""
        if len(values) == 1 and text.startswith(prefix):
            with suppress(ValueError):
                given = text.removeprefix(prefix).encode("ascii")
                digest = a2b_hex(given) if encoding == "hex" else a2b_base64(given, strict_mode=True)
        if not digest:
            raise Unauthenticated(f"The header {header} is malformed", problem="scheme")
        message, fits = self.received if signed is None else signed, False
        for secret in secrets:
            if hmac.compare_digest(hmac.digest(secret.reveal().encode(), message, algorithm), digest):
                fits = True
                secret.usage.count += 1
        if not fits:
            raise Unauthenticated("The signature does not match")

    def basic(self, passwords: Secrets, user: str) -> Credential:
        """Return the credential of the request's basic authentication (RFC 7617).

        Raises:
            Unauthenticated: as `bearer`.
        """
        values = self.headers.getall("Authorization", [])
        if not values:
            raise Unauthenticated(problem="missing")
        scheme, _, given = values[0].strip().partition(" ")
        if len(values) > 1 or scheme.lower() != "basic":
            raise Unauthenticated(problem="scheme")
        try:
            name, _, password = a2b_base64(given.strip().encode("ascii"), strict_mode=True).partition(b":")
        except ValueError:
            raise Unauthenticated("The credentials are not base64", problem="scheme") from None
        credential = passwords.find(password)
        if not hmac.compare_digest(name, user.encode()) or credential is None:
            raise Unauthenticated("Wrong user name or password")
        credential.usage.count += 1
        return credential

    def api_key(self, keys: Secrets, header: str) -> Credential:
        """Return the credential of a key in a header.

        Raises:
            Unauthenticated: as `bearer`.
        """
        values = self.headers.getall(header, [])
        if not values:
            raise Unauthenticated(f"Missing key (header {header})", problem="missing")
        if len(values) > 1:
            raise Unauthenticated(f"The header {header} was sent twice", problem="scheme")
        credential = keys.find(values[0].strip().encode("utf-8", "surrogateescape"))
        if credential is None:
            raise Unauthenticated("Unknown key")
        credential.usage.count += 1
        return credential

    def check_time(self, sent: float, tolerance: float = 300.0) -> None:
        """Check that a signed time (seconds since 1970) is at most `tolerance` seconds away.

        Raises:
            Unauthenticated: it is not.
        """
        late = self.received_at / 1_000_000 - sent
        if not abs(late) <= tolerance:
            raise Unauthenticated(f"The signature is too {'old' if late > 0 else 'far in the future'}")

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
        credential.usage.count += 1
        return credential


def _issue(error: ValueError) -> str:
    return "expected UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


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


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event, as a source's handler read it from a request."""

    type: str  # 1 to 200 printable characters, without the source's name
    subject: str | None = None  # at most 256 characters
    data: Any = EMPTY  # msgspec.Raw keeps the sender's own bytes; anything else is encoded
    context: Any = EMPTY
    key: str | None = None  # idempotency key: the same request with it is a duplicate for 7 days, per source


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply: a status and a body.

    A body of `bytes` is sent unchanged, `b""` without a content type. If `content_type` is set, a `str` is
    sent as UTF-8 text. Every other value is rendered as JSON.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = {}
    content_type: str | None = None  # None: application/json


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted request: the data to store, and the reply to send afterwards."""

    reply: Any  # a Reply, a value for a 200, or a function that takes the Receipt and returns either
    event: Event | None = None  # None: a heartbeat, a query, or `events`
    events: Sequence[Event] = ()  # several events of one request, stored together; then `event` is None
    worker: WorkerChange | None = None  # applied in the event's transaction
    asks: str | None = None  # id of a worker whose row the receipt must contain


SPANNING = ":path}"
"""The end of a placeholder that may stand for several segments, see `route`."""

_LONGEST_TYPE = 200
LONGEST_ID = 256

Handler = Callable[[Any, Incoming], Accepted | Reply]
H = TypeVar("H", bound=Handler)


def route(method: str, path: str) -> Callable[[H], H]:
    """Mark a method as the handler of a path; `{name}` matches one segment, whose value is in `params`.

    Literal segments have priority over placeholders. One method may have several routes. `{name:path}` stands
    for one segment, and for several if no other route fits: for senders that do not encode a `/`.
    """
    if path.count(SPANNING) > 1:
        raise ValueError(f"{path}: a path may have one {{name:path}}")

    def mark(handler: H) -> H:
        routes = getattr(handler, "__routes__", ())
        handler.__routes__ = ((method, path), *routes)  # type: ignore[attr-defined]
        return handler

    return mark


class _SourceMeta(msgspec.StructMeta):
    """Allows `class Moddy(Source, kind="moddy", owns=("/internal",))`."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        kind: str = "",
        owns: tuple[str, ...] = (),
        decompresses: bool = True,
        **options: Any,
    ) -> Any:
        cls: Any = super().__new__(
            mcls, name, bases, namespace, **{"frozen": True, "kw_only": True, **options}
        )
        cls.kind, cls.owns, cls.decompresses = kind, owns, decompresses
        return cls


class Source(msgspec.Struct, metaclass=_SourceMeta):
    """One kind of sender. Fields are its keys in `[sources.NAME]`; methods see one request each.

    A subclass names its `kind` (the `plugin = …` of config.toml) and the path prefixes that it `owns`. Its
    `refuse` renders every error below these prefixes, also the errors that the relay itself raises.
    """

    kind: ClassVar[str] = ""
    owns: ClassVar[tuple[str, ...]] = ()
    data_field: ClassVar[str] = "data"
    """The sender's name for an event's data, in refusals of data that does not satisfy a schema."""
    decompresses: ClassVar[bool] = True
    """Whether the relay accepts gzip and deflate; `class Name(Source, decompresses=False)` turns that off."""
    verify_reads_body: ClassVar[bool] = True
    """Whether `verify` needs the body. False: it is called before the body is read, with an empty body.
    The relay then refuses strangers before they use memory, and reserves memory for verified senders."""

    def owned(self) -> tuple[str, ...]:
        """Return the path prefixes that this instance owns: `owns`, unless they depend on its settings."""
        return self.owns

    def routes(self) -> tuple[tuple[str, str, str], ...]:
        """Return (method, path, name of the handler) for each `@route`, in no particular order.

        A source whose paths depend on its settings overrides this.
        """
        return _routes_of(type(self))

    def needs_body(self) -> bool:
        """Return whether `verify` needs the body: `verify_reads_body`, unless it depends on the settings."""
        return self.verify_reads_body

    def screen(self, incoming: Incoming) -> None:
        """Check the head of a request on a known route, before everything else, such as `incoming.remote`.

        The relay calls it only where a source overrides it.

        Raises:
            Forbidden: this sender may not send at all.
        """

    def handshake(self, incoming: Incoming) -> Reply | None:
        """Return the reply to a request that needs no verified sender, None for every other request.

        Some senders test a URL before they share a secret, such as with a GET that expects a value back. The
        relay calls this before `verify`, only where a source overrides it, with the body if `needs_body`.
        """

    def verify(self, incoming: Incoming) -> None:
        """Check the sender.

        The body is available, unless `verify_reads_body` is False: set that if the head is enough.

        Raises:
            Unauthenticated: no token or an unknown one.
            Forbidden: the token is known, but does not permit this.
        """

    def is_open(self) -> bool:
        """Return whether everybody who can reach the source can send, because no setting is a secret.

        Any web page can make its visitors' browsers send to such a source. So a request with an `Origin`
        header is refused with 403, unless that origin is in `cors_origins`. A source that checks senders
        in another way overrides this.
        """
        return not holds_secret(self)

    def sign_of_life(self, incoming: Incoming) -> WorkerChange | None:
        """Return the worker change in a refused request: the worker is alive or unregisters.

        The relay calls this for verified requests on known routes: when the relay or the handler refuses the
        request, and before the source's `rate_limit`, which then counts per worker. `incoming.body` may be
        empty or unreadable; an exception counts as None. If a source does not override this, the relay calls
        the handlers instead, but only for requests that it refuses after it has read the body.
        """
        _ = incoming
        return None

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Render any refusal in the sender's own envelope; `incoming` may have no body yet."""
        _ = incoming
        error = {"code": refusal.code, "message": refusal.detail}
        if refusal.note:
            error["message"] += f": {refusal.note}"
        return Reply(status=refusal.status, body={"error": error})

    def diagnose(self, incoming: Incoming) -> tuple[str, ...]:
        """Return reasons why `verify` refuses a request, apart from its bearer token.

        `relay verify` and the daemon, in a thread, call it only for refused requests. A source that
        checks signatures names the secret, encoding or bytes that would match; it never returns a secret.
        """
        _ = incoming
        return ()

    @classmethod
    def merged(cls, preset: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
        """Return the table of a source with the defaults of a preset, which the table's own keys replace."""
        return {**preset, **table}

    def warnings(self) -> tuple[str, ...]:
        """Return warnings about the settings for the operator; they are logged at start."""
        return ()

    def samples(self) -> tuple[Incoming, ...]:
        """Return documented requests without credentials; `--demo` and `relay send` send them."""
        return ()

    def sign(self, incoming: Incoming) -> Incoming:
        """Return a sample with credentials, for `relay send`; `target` and `received_at` are set.

        If the source has the setting `tokens`, `relay send` adds a bearer token, so this method need not.
        """
        return incoming


@cache
def _routes_of(cls: type[Source]) -> tuple[tuple[str, str, str], ...]:
    """Return (method, path, name of the handler) for each `@route` of a class; the same at every call."""
    found = []
    for name in dir(cls):
        for method, path in getattr(getattr(cls, name), "__routes__", ()):
            found.append((method, path, name))
    return tuple(found)


class Guide(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the source of a preset is set up, for `relay sources add`."""

    title: str  # the sender
    docs: str  # URL of its documentation
    secret: str  # describes the secret in the sender's words
    default_path: str  # the path to which senders post, unless `path` sets another
    steps: tuple[str, ...]  # for the sender's user interface; with {url}, {secret} and {verify_token}
    verify_token: str = ""  # describes the token of a handshake


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a preset."""

    guide: Guide
    defaults: Mapping[str, Any]  # keys of `[sources.NAME]`, as config.toml has them


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """Named defaults for a kind of source: `plugin = NAME` selects the kind with these defaults."""

    name: str
    source: type[Source]
    read: Callable[[], Rules]  # called when a source has this preset
    file: str = ""  # where the preset is described; shown in lists


def as_value(raw: msgspec.Raw) -> msgspec.Raw:
    """Return a JSON value unchanged; absent, `null` and PHP's empty `[]` become `{}`."""
    text = bytes(raw)
    if not text or text == b"null" or (text[:1] == b"[" and not text[1:-1].strip()):
        return EMPTY
    return raw


def as_map(raw: msgspec.Raw, field: str = "") -> msgspec.Raw:
    """Return a JSON map unchanged; absent, `null` and PHP's empty `[]` become `{}`.

    Raises:
        Invalid: it is another JSON value; names `field`.
    """
    value = as_value(raw)
    if bytes(value)[:1] != b"{":
        raise Invalid(field=field, issue="expected an object")
    return value


def as_json(text: str | bytes, field: str = "") -> msgspec.Raw:
    """Return a text that holds JSON, such as a field of a form, as a value for `data` or `context`.

    Raises:
        Invalid: it is not exactly one JSON value; names `field`.
    """
    try:
        encoded = text.encode() if isinstance(text, str) else text
        check_json(encoded)
    except (ValueError, RecursionError):  # msgspec's and Unicode's are ValueErrors
        raise Invalid(field=field, issue="expected JSON") from None
    return msgspec.Raw(encoded)


def check_type(type_: str, field: str = "") -> None:
    """Check that an event's type, as sent, has 1 to 200 printable characters.

    Raises:
        Invalid: it does not; names `field`.
    """
    if not type_ or len(type_) > _LONGEST_TYPE or not type_.isprintable():
        issue = f"expected 1 to {_LONGEST_TYPE} printable characters"
        raise Invalid("Invalid event type", field=field, issue=issue)


def check_length(text: str, field: str = "") -> str:
    """Return a text that is stored beside the body, such as a subject, if it has at most 256 characters.

    Raises:
        Invalid: it is longer; names `field`.
    """
    if len(text) > LONGEST_ID:
        raise Invalid(field=field, issue=f"expected at most {LONGEST_ID} characters")
    return text


def check_id(id_: str, field: str = "") -> str:
    """Return an id if it has 1 to 256 Unicode characters without control characters and surrogates.

    Raises:
        Invalid: it does not; names `field`.
    """
    fits = 0 < len(id_) <= LONGEST_ID
    if not fits or not (id_.isprintable() or _clean(id_)):
        issue = f"expected 1 to {LONGEST_ID} characters without control characters"
        raise Invalid(field=field, issue=issue)
    return id_


def _clean(text: str) -> bool:
    return all(unicodedata.category(character) not in {"Cc", "Cs"} for character in text)
