"""Why a delivery with signatures of Standard Webhooks does not verify: secret, encoding, bytes or clock.

The signature is compared with many combinations: the secrets of this and of other destinations, misread keys,
variants of the body, mixed-up ids and timestamps. The match with the fewest deviations is the diagnosis.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import msgspec

from relay.base.json_text import decode
from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret
from relay.diagnosis.body_variants import body_variants
from relay.diagnosis.captured import Captured, Report
from relay.keys import SHARED, has_signed, is_asymmetric, public_key, shared_key
from relay.model import Finding
from relay.signing import TOLERANCE, Signer

WHERE = "header webhook-signature"
_STRICT = re.compile(r"(v[0-9]+[a-z]*),([A-Za-z0-9+/]+={0,2})")
_LOOSE = re.compile(r"(?:(v[0-9]+[a-z]?|sha256)\s*[,=:]\s*)?([A-Za-z0-9+/_-]{8,}={0,2})")
_LABEL = re.compile(r"(v[0-9]+[a-z]?), ")
_SPACE = re.compile(r"(?<!,) (?!v[0-9])")
_LENGTHS = {32: "v1", 64: "v1a"}  # bytes of HMAC-SHA256 and of ed25519
_WRITTEN = 'verify the unchanged header: "v1," and base64, with one space between signatures'


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One possible reading of a signature."""

    number: int  # position in the header, from 1
    version: str  # its label; "" without a label
    signature: bytes
    finding: Finding | None = None  # the deviation from the specified format

    @property
    def ed25519(self) -> bool:
        """Whether the length is that of an ed25519 signature."""
        return _LENGTHS.get(len(self.signature)) == "v1a"


def candidates_of(text: str) -> tuple[tuple[Candidate, ...], tuple[Finding, ...]]:
    """Return every possible reading of every signature, and findings if no signature is readable."""
    entries = text.split(" ")
    decoded: list[Candidate] = []
    for number, entry in enumerate(entries, 1):
        strict = _STRICT.fullmatch(entry)
        if strict and (signature := _base64(strict[2])) is not None:
            finding = _mislabelled(strict[1], len(signature))
            decoded.append(Candidate(number=number, version=strict[1], signature=signature, finding=finding))
    whole = [one for one in decoded if len(one.signature) in _LENGTHS]
    if whole and all(_STRICT.fullmatch(entry) for entry in entries):
        return tuple(whole), ()
    found = (*whole, *_loosely(text))
    if found:
        return found, ()
    if decoded:
        return (), (_cut(decoded[0]),)
    what = "no complete signature"
    return (), (Finding(cause="encoding", where=WHERE, what=what, do=_WRITTEN),)


def _loosely(text: str) -> Iterator[Candidate]:
    """Yield the readings of signatures in other formats."""
    joined = _LABEL.sub(r"\1,", text.strip("\"'"))
    spaced = _SPACE.sub("+", joined)  # a space was a plus, unless a label follows
    lost = "the signature has spaces instead of +, like a decoded web form" if spaced != joined else ""
    for number, match in enumerate(_LOOSE.finditer(spaced), 1):
        for how, signature in _readings(match[2]).items():
            what = f"the signature is {how}" if how else lost or "the signature has an invalid format"
            finding = Finding(cause="encoding", where=WHERE, what=what, do=_WRITTEN)
            yield Candidate(number=number, version=match[1] or "", signature=signature, finding=finding)


def _mislabelled(version: str, length: int) -> Finding | None:
    expected = _LENGTHS.get(length, version)
    if expected == version:
        return None
    what = f"the label is {version}, but the signature has the {length} bytes of {expected}"
    return Finding(cause="encoding", where=WHERE, what=what, do=f"use the label {expected}")


def _cut(candidate: Candidate) -> Finding:
    what = f"the signature has {len(candidate.signature)} bytes; v1 has 32, v1a has 64"
    do = "check whether a log or a database truncated it; " + _WRITTEN
    return Finding(cause="bytes", where=WHERE, what=what, do=do)


def _readings(text: str) -> dict[str, bytes]:
    """Return every decoding of a text that has the length of a signature."""
    found = {}
    if re.fullmatch(r"(?:[0-9A-Fa-f]{2})+", text):
        found["hexadecimal, not base64"] = bytes.fromhex(text)
    standard = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    if (decoded := _base64(standard + "=" * (-len(standard) % 4))) is not None:
        urlsafe = set(text) & set("-_")
        found["in URL-safe base64" if urlsafe else ""] = decoded
    return {how: signature for how, signature in found.items() if len(signature) in _LENGTHS}


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


ID, TIMESTAMP, SIGNATURE = NAMES = ("webhook-id", "webhook-timestamp", "webhook-signature")

_SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)
_MILLIS = re.compile(r"[0-9]{13}", re.ASCII)
_MICROS = re.compile(r"[0-9]{16}", re.ASCII)
_MOST_DEVIATIONS = 2  # at once; one more costs seconds for a large body
_SPECIFIED = "webhook-id, webhook-timestamp and the raw body, joined by dots"


class _Key(msgspec.Struct, frozen=True):
    """A key that may have signed."""

    secret: Secret
    name: str  # its key in config.toml
    finding: Finding | None = None  # the deviation if this key signed
    raw: bytes = b""  # replaces the secret's own bytes

    def signs(self, candidate: Candidate, text: bytes) -> bool:
        if is_asymmetric(self.secret):
            return candidate.ed25519 and has_signed(public_key(self.secret), candidate.signature, text)
        key = self.raw or shared_key(self.secret)
        return hmac.compare_digest(hmac.digest(key, text, "sha256"), candidate.signature)


class _Part(msgspec.Struct, frozen=True):
    """A part of a text that may have been signed."""

    content: bytes
    finding: Finding | None = None


def diagnose(
    captured: Captured,
    name: str,
    destinations: Mapping[str, DestinationConfig],
    now: int,
    own: Mapping[str, Secret] | None = None,
) -> Report:
    """Verify a captured delivery, and diagnose a signature that does not match.

    Args:
        captured: the request that the receiver got.
        name: the destination.
        destinations: every destination of the configuration.
        now: time of receipt, seconds since the epoch.
        own: the keys that sign, by their key in config.toml; if not given, the destination's `secrets`.
    """
    if own is None:
        own = keys_of(f"destinations.{name}", destinations[name].secrets)
    secrets = tuple(own.values())
    given = {header: _given(captured, header) for header in NAMES}
    findings = [*captured.findings]
    if not secrets:
        what = "no secret is configured, so deliveries carry no signature"
        do = 'create one with `echo "whsec_$(openssl rand -base64 32)"`, add it, and give it to the receiver'
        findings.append(Finding(cause="secret", where=f"destinations.{name}.secrets", what=what, do=do))
    findings += _missing(captured)
    findings += late(given[TIMESTAMP], now, f"header {TIMESTAMP}")
    if not secrets or not given[SIGNATURE]:
        return Report(findings=tuple(findings))
    candidates, malformed = candidates_of(given[SIGNATURE])
    findings += malformed
    if not candidates:
        return Report(findings=tuple(findings))
    keys, heads = list(_keys(own, name, destinations)), list(_heads(given, captured.body))
    report = _compare(candidates, keys=keys, heads=heads, bodies=[_Part(captured.body)])
    if report is None:  # variants of the body cost a second per megabyte, so they come last
        report = _compare(candidates, keys=keys, heads=heads, bodies=list(_bodies(captured.body)))
    if report is None:
        return Report(findings=(*findings, _nothing(name, secrets, candidates)))
    return msgspec.structs.replace(report, findings=(*findings, *report.findings))


def _given(captured: Captured, header: str) -> str:
    """Return the value of a header, also of a renamed one."""
    name = header if header in captured.headers else _alias(captured, header)
    return " ".join(captured.headers.getall(name, [])).strip()


def _alias(captured: Captured, header: str) -> str:
    """Return the name of a header that a proxy or framework renamed, `""` without one."""
    ending = f"-{header.partition('-')[2]}"
    names = (name for name in captured.headers if name.lower().endswith(ending))
    return next((name for name in names if "hook" in name.lower() or "svix" in name.lower()), "")


def _missing(captured: Captured) -> Iterator[Finding]:
    for header in NAMES:
        if not captured.headers.get(header, "").strip():
            alias = _alias(captured, header)
            what = f"missing; the request has {alias}" if alias else "missing"
            do = "let the proxy or framework in front of the receiver pass the `webhook-…` headers"
            yield Finding(cause="headers", where=f"header {header}", what=what, do=do)


def keys_of(place: str, secrets: Sequence[Secret]) -> dict[str, Secret]:
    """Return secrets by their keys in config.toml."""
    return {f"{place}.secrets[{index}]": secret for index, secret in enumerate(secrets)}


def late(timestamp: str, now: int, where: str) -> Iterator[Finding]:
    """Yield the faults of a time (text, seconds since 1970); yield nothing without a time."""
    if not timestamp:
        return
    if not _SECONDS.fullmatch(timestamp):
        units = {_MILLIS: "milliseconds", _MICROS: "microseconds"}
        unit = next((unit for form, unit in units.items() if form.fullmatch(timestamp)), "")
        what = f"the value is in {unit}, not seconds" if unit else "not a number of seconds since 1970"
        do = "verify the unchanged header: seconds since 1970, as text"
        yield Finding(cause="clock", where=where, what=what, do=do)
        return
    late = now - int(timestamp)
    if abs(late) > TOLERANCE:
        way = "before" if late > 0 else "after"
        what = f"signed {render_duration(abs(late))} {way} receipt; receivers allow"
        what += f" {render_duration(TOLERANCE)}"
        do = (
            "for an earlier receipt, give its time with --at; otherwise a queue delays deliveries, or the"
            " receiver's clock is wrong: `timedatectl` shows whether it is synchronised"
        )
        yield Finding(cause="clock", where=where, what=what, do=do)


def _compare(
    candidates: Sequence[Candidate], *, keys: Sequence[_Key], heads: Sequence[_Part], bodies: Sequence[_Part]
) -> Report | None:
    """Return the report of the match with the fewest deviations, or None without a match."""
    ways = [way for way in product(keys, heads, bodies) if _deviations(way) <= _MOST_DEVIATIONS]
    for key, head, body in sorted(ways, key=_deviations):
        for candidate in candidates:
            if key.signs(candidate, head.content + body.content):
                parts = (key.finding, head.finding, body.finding, candidate.finding)
                number = candidate.number if len(candidates) > 1 else None
                return Report(
                    findings=tuple(finding for finding in parts if finding is not None),
                    fits=key.name if key.finding is None else None,
                    signature=number,
                )
    return None


def _deviations(way: tuple[_Key, _Part, _Part]) -> int:
    return sum(part.finding is not None for part in way)


def _keys(
    own: Mapping[str, Secret], name: str, destinations: Mapping[str, DestinationConfig]
) -> Iterator[_Key]:
    """Yield the secrets that sign, misread forms of them, and the secrets of other destinations."""
    for key, secret in own.items():
        yield _Key(secret, key)
        if not is_asymmetric(secret):
            text = secret.reveal()
            for words, raw in ((f"{SHARED} included", text), ("as text", text.removeprefix(SHARED))):
                what = f"the secret was used as the key {words}; the key is the decoded base64"
                do = "decode the base64 after whsec_, or use a library of standardwebhooks.com"
                wrong = Finding(cause="encoding", where=key, what=what, do=do)
                yield _Key(secret, key, wrong, raw.encode())
    for other, destination in destinations.items():
        for key, secret in keys_of(f"destinations.{other}", destination.secrets).items():
            if other == name or not _is_standard(secret):
                continue
            what = f'signed with {key}, a secret of destination "{other}"'
            do = f"check whether both destinations have the same URL; give this receiver a secret of {name}"
            finding = Finding(cause="secret", where=f"destinations.{name}.secrets", what=what, do=do)
            yield _Key(secret, key, finding)


def _is_standard(secret: Secret) -> bool:
    """Return whether a secret is a key of Standard Webhooks; other schemes have other keys."""
    try:
        Signer((secret,))
    except ValueError:
        return False
    return True


def _heads(given: Mapping[str, str], body: bytes) -> Iterator[_Part]:
    """Yield possible texts before the body in the signed text."""
    id_, timestamp = given[ID], given[TIMESTAMP]
    yield _Part(_head(id_, timestamp))
    inner = _id_in(body)
    if inner and inner != id_:
        what = f"{ID} differs from the id in the body; the signature covers the id in the body"
        do = "pass on the header of this request; logs and queues must keep header and body together"
        yield _Part(_head(inner, timestamp), _headers(ID, what, do) if id_ else None)
    for length, unit in ((13, "milliseconds"), (16, "microseconds")):
        if timestamp.isascii() and timestamp.isdigit() and len(timestamp) == length:
            what, do = (
                f"the signed value is in seconds, the header is in {unit}",
                "verify the unchanged header",
            )
            yield _Part(_head(id_, timestamp[:10]), _headers(TIMESTAMP, what, do))
    mixed = {
        "id and timestamp are swapped": _head(timestamp, id_),
        "the id is missing": f"{timestamp}.".encode("utf-8", "surrogatepass"),
        "the timestamp is missing": f"{id_}.".encode("utf-8", "surrogatepass"),
        "id and timestamp are missing": b"",
        "the dots are missing": f"{id_}{timestamp}".encode("utf-8", "surrogatepass"),
    }
    for what, head in mixed.items():
        yield _Part(head, _headers(SIGNATURE, f"in the signed text, {what}", f"sign {_SPECIFIED}"))


def _bodies(body: bytes) -> Iterator[_Part]:
    seen = {body}
    for what, do, other in body_variants(body):
        if other not in seen:
            seen.add(other)
            yield _Part(other, Finding(cause="bytes", where="body", what=what, do=do))
    if body:
        what = "an empty body was signed; the body was missing or had already been read"
        do = "sign the bytes of the body; a stream can be read only once"
        yield _Part(b"", Finding(cause="bytes", where="body", what=what, do=do))


def _nothing(name: str, secrets: Sequence[Secret], candidates: Sequence[Candidate]) -> Finding:
    """Return the finding for a signature that no secret of the configuration matches."""
    where = f"header {SIGNATURE}"
    pairs = [secret for secret in secrets if is_asymmetric(secret)]
    if candidates and not pairs and all(candidate.version == "v1a" for candidate in candidates):
        what = "the only signature is ed25519 (v1a), but the destination has no ed25519 key"
        do = "set the whsk_ key that signs, or have the sender sign with a whsec_ secret too"
        return Finding(cause="secret", where=where, what=what, do=do)
    if candidates and len(pairs) == len(secrets) and all(each.version == "v1" for each in candidates):
        what = "the only signature is HMAC (v1), but the destination has only ed25519 keys"
        do = "set the whsec_ secret that signs, or have the sender sign with the whsk_ key"
        return Finding(cause="secret", where=where, what=what, do=do)
    what = f'no secret of destination "{name}" or of another destination matches'
    do = (
        "the signing secret is not in config.toml; keep the previous secret in addition to the new one"
        " until every receiver has the new one; or the body was changed in an unknown way: capture it raw"
    )
    return Finding(cause="secret", where=where, what=what, do=do)


def _head(id_: str, timestamp: str) -> bytes:
    return f"{id_}.{timestamp}.".encode("utf-8", "surrogatepass")


def _headers(header: str, what: str, do: str) -> Finding:
    return Finding(cause="headers", where=f"header {header}", what=what, do=do)


def _id_in(body: bytes) -> str:
    """Return the id in a body of the standard format, `""` for other bodies."""
    try:
        return decode(_identified, body).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


class _Identified(msgspec.Struct):
    id: str


_identified = msgspec.json.Decoder(_Identified)
