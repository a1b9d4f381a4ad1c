"""Why a captured delivery does not verify: which of secret, encoding, bytes and clock is another one.

A signature is tried against everything that may have been meant: the destination's secrets and others',
keys read wrongly, the body before somebody rewrote it, ids and times that were mixed up. What fits with
the fewest deviations is what happened.
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
from relay.diagnosis.body_variants import rewrites
from relay.diagnosis.captured import Captured, Finding, Report
from relay.keys import SHARED, has_signed, is_asymmetric, public_key, shared_key
from relay.signing import TOLERANCE

WHERE = "header webhook-signature"
_STRICT = re.compile(r"(v[0-9]+[a-z]*),([A-Za-z0-9+/]+={0,2})")
_LOOSE = re.compile(r"(?:(v[0-9]+[a-z]?|sha256)\s*[,=:]\s*)?([A-Za-z0-9+/_-]{8,}={0,2})")
_LABEL = re.compile(r"(v[0-9]+[a-z]?), ")
_SPACE = re.compile(r"(?<!,) (?!v[0-9])")
_LENGTHS = {32: "v1", 64: "v1a"}  # bytes of HMAC-SHA256 and of ed25519
_WRITTEN = 'take it as it came: "v1," and base64; several with one space between them'


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One signature, decoded in one of the ways that it can be."""

    number: int  # of the signatures in the header, from 1
    version: str  # as it is labelled; "": not at all
    signature: bytes
    finding: Finding | None = None  # what is wrong with how it is written

    @property
    def ed25519(self) -> bool:
        """Whether it has the length of one."""
        return _LENGTHS.get(len(self.signature)) == "v1a"


def candidates_of(text: str) -> tuple[tuple[Candidate, ...], tuple[Finding, ...]]:
    """Return every signature in every way that it may be meant, and what makes it none at all."""
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
    what = "there is no whole signature in it"
    return (), (Finding(cause="encoding", where=WHERE, what=what, do=_WRITTEN),)


def _loosely(text: str) -> Iterator[Candidate]:
    """Yield what other ways of writing signatures give."""
    joined = _LABEL.sub(r"\1,", text.strip("\"'"))
    spaced = _SPACE.sub("+", joined)  # what is a space here was a plus, unless a label follows
    lost = "it has spaces where + was, as web forms read it" if spaced != joined else ""
    for number, match in enumerate(_LOOSE.finditer(spaced), 1):
        for how, signature in _readings(match[2]).items():
            what = f"it is {how}" if how else lost or "it is not written as specified"
            finding = Finding(cause="encoding", where=WHERE, what=what, do=_WRITTEN)
            yield Candidate(number=number, version=match[1] or "", signature=signature, finding=finding)


def _mislabelled(version: str, length: int) -> Finding | None:
    meant = _LENGTHS.get(length, version)
    if meant == version:
        return None
    what = f"it is labelled {version}, and has the {length} bytes of {meant}"
    return Finding(cause="encoding", where=WHERE, what=what, do=f"label it {meant}")


def _cut(candidate: Candidate) -> Finding:
    what = f"it has {len(candidate.signature)} bytes; v1 has 32, v1a has 64"
    do = "was it cut off, in a log or a database? " + _WRITTEN
    return Finding(cause="bytes", where=WHERE, what=what, do=do)


def _readings(text: str) -> dict[str, bytes]:
    """Decode a text in every way that gives the length of a signature."""
    found = {}
    if re.fullmatch(r"(?:[0-9A-Fa-f]{2})+", text):
        found["in hexadecimal, not base64"] = bytes.fromhex(text)
    standard = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    if (decoded := _base64(standard + "=" * (-len(standard) % 4))) is not None:
        urlsafe = set(text) & set("-_")
        found["in the URL-safe alphabet of base64" if urlsafe else ""] = decoded
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
_MOST_DEVIATIONS = 2  # at once: each more makes a large body take seconds more
_SPECIFIED = "webhook-id, webhook-timestamp and the raw body, with dots between them, are what is signed"


class _Key(msgspec.Struct, frozen=True):
    """A key that may have been used."""

    secret: Secret
    name: str  # its key of config.toml
    finding: Finding | None = None  # what would be wrong then
    raw: bytes = b""  # in place of what the secret says

    def signs(self, candidate: Candidate, text: bytes) -> bool:
        if is_asymmetric(self.secret):
            return candidate.ed25519 and has_signed(public_key(self.secret), candidate.signature, text)
        key = self.raw or shared_key(self.secret)
        return hmac.compare_digest(hmac.digest(key, text, "sha256"), candidate.signature)


class _Try(msgspec.Struct, frozen=True):
    """A text that may have been signed, or a part of it."""

    content: bytes
    finding: Finding | None = None


def diagnose(
    captured: Captured, name: str, destinations: Mapping[str, DestinationConfig], now: int
) -> Report:
    """Verify a captured delivery, and say what is another one where it does not.

    Args:
        captured: the request as the receiver got it.
        name: the destination.
        destinations: all of the configuration.
        now: when it was received, seconds since the epoch.
    """
    secrets = destinations[name].secrets
    given = {header: _given(captured, header) for header in NAMES}
    findings = [*captured.findings]
    if not secrets:
        what = "it has none, so what it is sent carries no signature"
        do = 'make one with `echo "whsec_$(openssl rand -base64 32)"`, set it, and give it to the receiver'
        findings.append(Finding(cause="secret", where=f"destinations.{name}.secrets", what=what, do=do))
    findings += _missing(captured)
    findings += _late(given[TIMESTAMP], now)
    if not secrets or not given[SIGNATURE]:
        return Report(findings=tuple(findings))
    candidates, malformed = candidates_of(given[SIGNATURE])
    findings += malformed
    if not candidates:
        return Report(findings=tuple(findings))
    keys, heads = list(_keys(name, destinations)), list(_heads(given, captured.body))
    report = _compare(candidates, keys=keys, heads=heads, bodies=[_Try(captured.body)])
    if report is None:  # only then is it worth rewriting the body, which takes a second per megabyte
        report = _compare(candidates, keys=keys, heads=heads, bodies=list(_bodies(captured.body)))
    if report is None:
        return Report(findings=(*findings, _nothing(name, secrets, candidates)))
    return msgspec.structs.replace(report, findings=(*findings, *report.findings))


def _given(captured: Captured, header: str) -> str:
    """Return what the request has of a header, whatever that is called there."""
    name = header if header in captured.headers else _alias(captured, header)
    return " ".join(captured.headers.getall(name, [])).strip()


def _alias(captured: Captured, header: str) -> str:
    """Find a header that was renamed on its way."""
    ending = f"-{header.partition('-')[2]}"
    names = (name for name in captured.headers if name.lower().endswith(ending))
    return next((name for name in names if "hook" in name.lower() or "svix" in name.lower()), "")


def _missing(captured: Captured) -> Iterator[Finding]:
    for header in NAMES:
        if not captured.headers.get(header, "").strip():
            alias = _alias(captured, header)
            what = f"it is missing; there is {alias}" if alias else "it is missing"
            do = "let the proxy or framework before the receiver pass `webhook-…` headers on"
            yield Finding(cause="headers", where=f"header {header}", what=what, do=do)


def _late(timestamp: str, now: int) -> Iterator[Finding]:
    where = f"header {TIMESTAMP}"
    if not timestamp:
        return
    if not _SECONDS.fullmatch(timestamp):
        units = {_MILLIS: "milliseconds", _MICROS: "microseconds"}
        unit = next((unit for form, unit in units.items() if form.fullmatch(timestamp)), "")
        what = f"it is in {unit}, not seconds" if unit else "it is no number of seconds since 1970"
        do = "take it as it came: seconds since 1970, as text"
        yield Finding(cause="clock", where=where, what=what, do=do)
        return
    late = now - int(timestamp)
    if abs(late) > TOLERANCE:
        way = "before" if late > 0 else "after"
        what = f"signed {render_duration(abs(late))} {way} it was received; receivers allow"
        what += f" {render_duration(TOLERANCE)}"
        do = (
            "say with --at when it was received, if that was not now; else a queue before the receiver holds"
            " it, or its clock is slow or fast: `timedatectl` shows whether it is synchronised"
        )
        yield Finding(cause="clock", where=where, what=what, do=do)


def _compare(
    candidates: Sequence[Candidate], *, keys: Sequence[_Key], heads: Sequence[_Try], bodies: Sequence[_Try]
) -> Report | None:
    """Try all that may have been meant, the fewest deviations first; None: nothing fits."""
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


def _deviations(way: tuple[_Key, _Try, _Try]) -> int:
    return sum(part.finding is not None for part in way)


def _keys(name: str, destinations: Mapping[str, DestinationConfig]) -> Iterator[_Key]:
    """Yield the destination's secrets, these read wrongly, and those of the others."""
    for index, secret in enumerate(destinations[name].secrets):
        key = f"destinations.{name}.secrets[{index}]"
        yield _Key(secret, key)
        if not is_asymmetric(secret):
            text = secret.reveal()
            for words, raw in ((f"{SHARED} included", text), ("as text", text.removeprefix(SHARED))):
                what = f"it was taken as the key {words}: it is base64, and the key is what that decodes to"
                do = "decode the base64 behind whsec_, or use a library of standardwebhooks.com"
                wrong = Finding(cause="encoding", where=key, what=what, do=do)
                yield _Key(secret, key, wrong, raw.encode())
    for other, destination in destinations.items():
        for index, secret in enumerate(destination.secrets if other != name else ()):
            key = f"destinations.{other}.secrets[{index}]"
            what = f'it is signed with {key}, a secret of destination "{other}"'
            do = f"does the receiver of {other} have the same URL? Give this one a secret of {name}"
            finding = Finding(cause="secret", where=f"destinations.{name}.secrets", what=what, do=do)
            yield _Key(secret, key, finding)


def _heads(given: Mapping[str, str], body: bytes) -> Iterator[_Try]:
    """Yield what may stand before the body in the signed text."""
    id_, timestamp = given[ID], given[TIMESTAMP]
    yield _Try(_head(id_, timestamp))
    inner = _id_in(body)
    if inner and inner != id_:
        what = f"{ID} is not the id in the body, with which it is signed"
        do = "pass the header of this very request on; logs and queues must keep the two together"
        yield _Try(_head(inner, timestamp), _headers(ID, what, do) if id_ else None)
    for length, unit in ((13, "milliseconds"), (16, "microseconds")):
        if timestamp.isascii() and timestamp.isdigit() and len(timestamp) == length:
            what, do = f"it is signed in seconds, and stands here in {unit}", "take it as it came"
            yield _Try(_head(id_, timestamp[:10]), _headers(TIMESTAMP, what, do))
    mixed = {
        "id and timestamp are swapped": _head(timestamp, id_),
        "the id is left out": f"{timestamp}.".encode("utf-8", "surrogatepass"),
        "the timestamp is left out": f"{id_}.".encode("utf-8", "surrogatepass"),
        "the body alone is signed": b"",
        "the dots are left out": f"{id_}{timestamp}".encode("utf-8", "surrogatepass"),
    }
    for what, head in mixed.items():
        yield _Try(head, _headers(SIGNATURE, f"in what it signs {what}", f"sign as specified: {_SPECIFIED}"))


def _bodies(body: bytes) -> Iterator[_Try]:
    seen = {body}
    for what, do, other in rewrites(body):
        if other not in seen:
            seen.add(other)
            yield _Try(other, Finding(cause="bytes", where="body", what=what, do=do))
    if body:
        what = "nothing was signed: the body was empty, or read already, when the signature was made"
        do = "sign the body's bytes; a stream can be read only once"
        yield _Try(b"", Finding(cause="bytes", where="body", what=what, do=do))


def _nothing(name: str, secrets: Sequence[Secret], candidates: Sequence[Candidate]) -> Finding:
    """Say that no secret of the configuration fits, whatever was done to the bytes."""
    where = f"header {SIGNATURE}"
    pairs = [secret for secret in secrets if is_asymmetric(secret)]
    if candidates and not pairs and all(candidate.version == "v1a" for candidate in candidates):
        what = "it is an ed25519 signature (v1a) alone, and the destination has no such key"
        do = "set the whsk_ key that signs it, or have the sender sign with a whsec_ secret as well"
        return Finding(cause="secret", where=where, what=what, do=do)
    if candidates and len(pairs) == len(secrets) and all(each.version == "v1" for each in candidates):
        what = "it is an HMAC signature (v1) alone, and the destination has ed25519 keys only"
        do = "set the whsec_ secret that signs it, or have the sender sign with the whsk_ key"
        return Finding(cause="secret", where=where, what=what, do=do)
    own = "the secret" if len(secrets) == 1 else f"one of the {len(secrets)} secrets"
    what = f'neither {own} of destination "{name}" nor another destination\'s fits'
    do = (
        "it was made with a secret that config.toml has not, perhaps a former one: put that back beside the"
        " new one until all receivers have it; or the body was changed beyond recognition: capture it raw"
    )
    return Finding(cause="secret", where=where, what=what, do=do)


def _head(id_: str, timestamp: str) -> bytes:
    return f"{id_}.{timestamp}.".encode("utf-8", "surrogatepass")


def _headers(header: str, what: str, do: str) -> Finding:
    return Finding(cause="headers", where=f"header {header}", what=what, do=do)


def _id_in(body: bytes) -> str:
    """Return the id that the standard format has in its body."""
    try:
        return decode(_identified, body).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


class _Identified(msgspec.Struct):
    id: str


_identified = msgspec.json.Decoder(_Identified)
