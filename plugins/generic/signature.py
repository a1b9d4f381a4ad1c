"""Signatures over a text that depends on the request: HMAC, ed25519 and ECDSA."""

import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from relay.source import (
    Incoming,
    Invalid,
    Placeholder,
    SettingError,
    Unauthenticated,
    Usage,
    ecdsa_verifier,
    ed25519_verifier,
    instant,
    parse_template,
    rfc3339,
    text_of,
)

from .reading import Reader, Reading
from .rendering import text_getter
from .settings import MOST_SIGNATURES, Ecdsa, Ed25519, Hmac, Signed

USUAL_TOLERANCE = 300.0
"""Seconds; as in the reference libraries of Standard Webhooks."""

_SECOND = 1_000_000
_NUMBER = {"s": re.compile(r"[0-9]{1,12}", re.ASCII), "ms": re.compile(r"[0-9]{1,15}", re.ASCII)}
_MICROS = {"s": _SECOND, "ms": 1000}
_HASHES = ("sha256", "sha1", "sha512")

Verifier = Callable[[Sequence[bytes], bytes], bool]
"""Returns whether one of some signatures (without their encoding) belongs to a message."""

Found = Sequence[tuple[bytes, list[str]]]
"""Signatures, each with the settings of `verify` that it would need."""


class Signature:
    """`verify.hmac`, `.ed25519` and `.ecdsa`: a signature over a text that depends on the request."""

    reads_body = True

    def __init__(
        self,
        settings: Signed,
        encoding: str,
        verifiers: Sequence[Verifier],
        usages: Sequence[Usage],
        reader: Reader,
    ) -> None:
        self._settings = settings
        self._usages = usages  # of the keys, in the order of `verifiers`
        self._reader = reader
        self._decode = DECODERS[encoding]
        self._verifiers = verifiers
        self._template = parse_template(settings.signed)
        self._parts = [
            part.encode() if isinstance(part, str) else self._part(reader, part)
            for part in self._template.parts
        ]
        kinds = {(each.kind, each.argument) for each in self._template.placeholders}
        self._covers_body = ("body", "") in kinds
        self._covers_form = ("form", "sorted") in kinds
        self._is_body_alone = settings.signed == "{body}"
        self._is_timed = bool(settings.timestamp_header or settings.timestamp_field)
        tolerance = USUAL_TOLERANCE if settings.tolerance is None else settings.tolerance
        self._tolerance = int(tolerance * _SECOND)

    def _part(self, reader: Reader, placeholder: Placeholder) -> Callable[[Reading], bytes | None]:
        """Return the function that finds a part of the signed text, and returns None if it is missing."""
        kind, name = placeholder.kind, placeholder.argument
        if kind == "body" and not name:
            return lambda reading: reading.incoming.received
        if kind == "timestamp":
            return lambda reading: _encoded(self.sent_time(reading.incoming))
        if kind == "form" and name == "sorted":
            return _sorted_form
        if kind == "header":
            return partial(_header_bytes, name)
        if kind == "url":
            return lambda reading: _encoded(reading.url)
        get = text_getter(reader, placeholder)
        return lambda reading: _encoded(get(reading) or None)

    def sent_time(self, incoming: Incoming) -> str | None:
        """Return the time of a request as sent, or None."""
        if self._settings.timestamp_header:
            return incoming.header(self._settings.timestamp_header) or None
        field = self._settings.timestamp_field or ""
        for item in self._listed(incoming):
            if item.startswith(field):
                return item.removeprefix(field)
        return None

    def _value(self, incoming: Incoming) -> str:
        """Return the header of the signature, `""` if it is missing."""
        name = self._settings.header
        values = incoming.headers.getall(name, ())
        if len(values) > 1:
            raise Invalid(field=f"header {name}", issue="was sent more than once")
        return values[0].strip() if values else ""

    def _listed(self, incoming: Incoming) -> list[str]:
        """Return the items of the header."""
        value, separator = self._value(incoming), self._settings.separator
        if not separator:
            return [value] if value else []
        return [item.strip() for item in value.split(separator)]

    def _candidates(self, incoming: Incoming) -> list[str]:
        """Return the signatures in the header, without their prefix."""
        prefix, timed = self._settings.prefix, self._settings.timestamp_field
        if not self._settings.separator:
            value = self._value(incoming)
            return [value[len(prefix) :]] if value.startswith(prefix) and len(value) > len(prefix) else []
        return [
            item[len(prefix) :]
            for item in self._listed(incoming)
            if item.startswith(prefix) and len(item) > len(prefix) and not (timed and item.startswith(timed))
        ]

    def message(self, reading: Reading) -> bytes:
        """Return the signed text of a request.

        Raises:
            Unauthenticated: a part of it is missing, or the signature does not cover the body.
        """
        if not self._covers_body:
            self._check_coverage(reading)
        found = []
        for part, origin in zip(self._parts, self._template.parts, strict=True):
            value = part if isinstance(part, bytes) else part(reading)
            if value is None:
                raise Unauthenticated(f"The signed text has no {origin}", problem="missing")
            found.append(value)
        return found[0] if len(found) == 1 else b"".join(found)

    def _check_coverage(self, reading: Reading) -> None:
        """Refuse a body that the signed text does not contain."""
        body = reading.incoming.received
        if not body or (self._covers_form and reading.is_urlencoded):
            return
        digests = reading.query.get(self._settings.body_sha256 or "", [])
        if len(digests) != 1 or not hmac.compare_digest(
            hashlib.sha256(body).hexdigest().encode(), digests[0].lower().encode("utf-8", "surrogateescape")
        ):
            raise Unauthenticated("The signature does not cover this body")

    def check(self, incoming: Incoming) -> None:
        """See `Scheme`."""
        candidates = self._candidates(incoming)
        if not candidates:
            header = self._settings.header
            if header not in incoming.headers:
                raise Unauthenticated(f"Missing signature (header {header})", problem="missing")
            raise Unauthenticated("The signature is malformed", problem="scheme")
        if len(candidates) > MOST_SIGNATURES:
            raise Unauthenticated(f"More than {MOST_SIGNATURES} signatures", problem="scheme")
        if self._is_timed:
            self._check_time(incoming)
        is_body = self._is_body_alone
        message = incoming.received if is_body else self.message(Reading(self._reader, incoming))
        signatures = [found for candidate in candidates if (found := self._decode(candidate)) is not None]
        matches = False
        for fits, usage in zip(self._verifiers, self._usages, strict=True):
            if fits(signatures, message):
                matches = True
                usage.count += 1
        if not matches:
            raise Unauthenticated("The signature does not match")

    def _check_time(self, incoming: Incoming) -> None:
        sent = self.sent_time(incoming)
        if sent is None:
            raise Unauthenticated("Missing time of the signature", problem="missing")
        micros = self._micros(sent)
        if micros is None:
            raise Unauthenticated("The time of the signature is malformed", problem="scheme")
        late = incoming.received_at - micros
        if abs(late) > self._tolerance:
            side = "old" if late > 0 else "far in the future"
            raise Unauthenticated(f"The signature is too {side}")

    def _micros(self, sent: str) -> int | None:
        """Convert a time as sent to microseconds since 1970; return None if it is malformed."""
        unit = self._settings.timestamp_unit
        if unit == "rfc3339":
            return None if sent.isdecimal() else instant(sent)
        return int(sent) * _MICROS[unit] if _NUMBER[unit].fullmatch(sent) else None

    def explain(self, incoming: Incoming) -> Iterator[str]:
        """See `Scheme`."""
        reading, settings = Reading(self._reader, incoming), self._settings
        name = settings.header
        try:
            listed, candidates = self._listed(incoming), self._candidates(incoming)
            if not listed:
                yield f"the header {name} is missing"
                return
            if not candidates:
                yield f'no signature in the header {name} begins with "{settings.prefix}"'
                candidates = listed
            if self._is_timed:
                try:
                    self._check_time(incoming)
                except Unauthenticated as error:
                    yield f"{error.message}; the tolerance is {self._tolerance // _SECOND} s"
            try:
                message = self.message(reading)
            except Unauthenticated as error:
                yield error.message
                return
        except Invalid as error:
            yield error.detail
            return
        yield from self._explain(reading, candidates, message)

    def _explain(self, reading: Reading, candidates: list[str], message: bytes) -> Iterator[str]:
        """Yield the keys that would match, with the settings that they need and the text that was signed."""
        signatures = list(self._signatures(candidates))
        found = False
        for what, changed in self._messages(reading, message):
            for key, settings in self._fitting(signatures, changed):
                found = True
                other = f" with {' and '.join(settings)}" if settings else ""
                yield f"{key} matches{other}{what and f': the sender signed {what}'}"
        if not found:
            yield "no configured key matches in any encoding: the sender has another key or signs other bytes"

    def _signatures(self, candidates: list[str]) -> Iterator[tuple[bytes, list[str]]]:
        """Yield the possible readings of the signatures in the header, with the settings that they need."""
        for encoding, decode in DECODERS.items():
            settings = [] if decode is self._decode else [f'encoding = "{encoding}"']
            for text in candidates:
                for prefix in ("", text.partition("=")[0] + "=", text.partition(",")[0] + ","):
                    if text.startswith(prefix) and (signature := decode(text.removeprefix(prefix))):
                        yield signature, [*settings, *([f'prefix = "{prefix}"'] if prefix else [])]

    def _messages(self, reading: Reading, message: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield the signed text and variants of it, each with a description of the change."""
        yield "", message
        body = reading.incoming.received
        for what, changed in (
            ("the body without the line ending that was added to it", body.rstrip(b"\r\n")),
            ("the body with the line ending that was removed from it", body + b"\n"),
            ("the body with other line endings (CRLF)", body.replace(b"\n", b"\r\n")),
            ("the body with other line endings (LF)", body.replace(b"\r\n", b"\n")),
            ("the body before it was parsed and written again", _compact(body)),
        ):
            if self._covers_body and body and changed not in (body, b""):
                yield what, message.replace(body, changed)
        if self._covers_body and message != body:
            yield "the body alone", body
        url = reading.url.encode("utf-8", "surrogateescape")
        if url in message:
            for what, other in (
                ("a URL with http://, unlike `public_url`", b"http://" + url.partition(b"://")[2]),
                ("a URL with https://, unlike `public_url`", b"https://" + url.partition(b"://")[2]),
                ("a URL without its query", url.partition(b"?")[0]),
                ("a URL with a slash at its end", url + b"/"),
            ):
                if other != url:
                    yield what, message.replace(url, other)

    def _fitting(self, signatures: Found, message: bytes) -> Iterator[tuple[str, list[str]]]:
        """Yield the keys that match one of the signatures, with the settings that they need."""
        for at, fits in enumerate(self._verifiers):
            for signature, settings in signatures:
                if fits((signature,), message):
                    yield f"public_keys[{at}]", settings

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`; only the sender has the private keys."""
        return incoming


class AsymmetricSignature(Signature):
    """`verify.ed25519` and `verify.ecdsa`.

    Raises:
        ExceptionGroup: keys that cannot be read, or `cryptography` is not installed.
    """

    def __init__(
        self, settings: Ed25519 | Ecdsa, keys: Sequence[str], usages: Sequence[Usage], reader: Reader
    ) -> None:
        make = ed25519_verifier if isinstance(settings, Ed25519) else ecdsa_verifier
        verifiers, wrong = [], []
        for at, key in enumerate(keys):
            try:
                verifiers.append(partial(_any_fits, make(key)))
            except ValueError as error:
                wrong.append(SettingError(str(error), "public_keys", at))
        if wrong:
            raise ExceptionGroup("wrong public keys", wrong)
        super().__init__(settings, settings.encoding, verifiers, usages, reader)


class HmacSignature(Signature):
    """`verify.hmac`."""

    def __init__(
        self, settings: Hmac, secrets: Sequence[str], usages: Sequence[Usage], reader: Reader
    ) -> None:
        self._hmac = settings
        self._secrets = secrets
        self._states = []
        for at, secret in enumerate(secrets):
            try:
                self._states.append(hmac.new(key_of(secret, settings), digestmod=settings.algorithm))
            except ValueError as error:
                raise SettingError(str(error), "secrets", at) from None
        verifiers = [partial(_fits, state) for state in self._states]
        super().__init__(settings, settings.encoding, verifiers, usages, reader)

    def digest_of(self, value: Any) -> str:
        """Return the HMAC of a text with the first secret, for handshakes."""
        if not self._states:
            raise ValueError("the secret cannot be read here")
        state = self._states[0].copy()
        state.update(text_of(value).encode())
        return _ENCODERS[self._hmac.encoding](state.digest())

    def _fitting(self, signatures: Found, message: bytes) -> Iterator[tuple[str, list[str]]]:
        for at, secret in enumerate(self._secrets):
            for key, settings in _key_variants(secret, self._hmac):
                for algorithm in _HASHES:
                    same = algorithm == self._hmac.algorithm
                    digest = hmac.digest(key, message, algorithm)
                    for signature, others in signatures:
                        if hmac.compare_digest(digest, signature):
                            hash_ = [] if same else [f'algorithm = "{algorithm}"']
                            yield f"secrets[{at}]", [*settings, *hash_, *others]

    def sign(self, incoming: Incoming) -> Incoming:
        """See `Scheme`."""
        settings = self._hmac
        now = incoming.received_at
        time = {"s": str(now // _SECOND), "ms": str(now // 1000), "rfc3339": rfc3339(now)}[
            settings.timestamp_unit
        ]
        if settings.timestamp_header:
            incoming = incoming.with_headers({settings.timestamp_header: time})
        listed = [f"{settings.timestamp_field}{time}"] if settings.timestamp_field else []
        unsigned = (
            incoming.with_headers({settings.header: settings.separator.join(listed)}) if listed else incoming
        )
        state = self._states[0].copy()
        state.update(self.message(Reading(self._reader, unsigned)))
        listed.append(f"{settings.prefix}{_ENCODERS[settings.encoding](state.digest())}")
        return incoming.with_headers({settings.header: settings.separator.join(listed)})


def key_of(secret: str, settings: Hmac) -> bytes:
    """Return the key in a secret.

    Raises:
        ValueError: it does not have the form that the settings name; the message does not contain it.
    """
    prefix, encoding = settings.key_prefix, settings.key_encoding
    if not secret.startswith(prefix):
        raise ValueError(f'the secret does not begin with the key_prefix "{prefix}"')
    text = secret.removeprefix(prefix)
    key = text.encode() if encoding == "text" else DECODERS[encoding](text.strip())
    if not text:
        raise ValueError("the secret has nothing after its key_prefix")
    if not key:
        raise ValueError(
            f'the secret is not {encoding}; with key_encoding = "text" its own bytes are the key'
        )
    return key


def _key_variants(secret: str, settings: Hmac) -> Iterator[tuple[bytes, list[str]]]:
    """Yield a configured secret's key, and other readings of the secret, with the settings that they need."""
    yield key_of(secret, settings), []
    if settings.key_prefix:
        yield secret.encode(), ['key_encoding = "text"', "no key_prefix"]
    bare = secret.removeprefix(settings.key_prefix)
    for encoding, decode in DECODERS.items():
        if encoding != settings.key_encoding and (key := decode(bare.strip())):
            yield key, [f'key_encoding = "{encoding}"']
    if settings.key_encoding != "text":
        yield bare.encode(), ['key_encoding = "text"']
    if bare.strip() != bare:
        yield bare.strip().encode(), ["no white space around it"]


def _fits(state: hmac.HMAC, signatures: Sequence[bytes], message: bytes) -> bool:
    mac = state.copy()  # a fifth faster than keying it again
    mac.update(message)
    digest, matches = mac.digest(), False
    for signature in signatures:
        matches |= hmac.compare_digest(digest, signature)
    return matches


def _any_fits(verifier: Callable[[bytes, bytes], bool], signatures: Sequence[bytes], message: bytes) -> bool:
    return any(verifier(signature, message) for signature in signatures)


def _header_bytes(name: str, reading: Reading) -> bytes | None:
    """Return a header's bytes as sent."""
    values = reading.incoming.headers.getall(name, [])
    if len(values) > 1:
        raise Invalid(field=f"header {name}", issue="was sent more than once")
    return values[0].strip().encode("utf-8", "surrogateescape") or None if values else None


def _sorted_form(reading: Reading) -> bytes:
    """Return each name and value of a form, sorted by name, without separators (Twilio's text)."""
    if not reading.is_urlencoded:
        return b""
    fields = reading.form
    return "".join(name + value for name in sorted(fields) for value in sorted(set(fields[name]))).encode()


def _encoded(text: str | None) -> bytes | None:
    return text.encode("utf-8", "surrogateescape") if text else None


def _unhex(text: str) -> bytes | None:
    try:
        return binascii.unhexlify(text)
    except ValueError:  # also text that is not ASCII
        return None


def _unbase64(text: str) -> bytes | None:
    try:
        return binascii.a2b_base64(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), strict_mode=True)
    except ValueError:
        return None


def _base64(digest: bytes) -> str:
    return binascii.b2a_base64(digest, newline=False).decode()


DECODERS: dict[str, Callable[[str], bytes | None]] = {"hex": _unhex, "base64": _unbase64}
_ENCODERS: dict[str, Callable[[bytes], str]] = {"hex": bytes.hex, "base64": _base64}


def _compact(body: bytes) -> bytes:
    try:
        return json.dumps(json.loads(body), separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return b""
