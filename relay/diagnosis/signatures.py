"""Reading a `webhook-signature` header, also one that is not written as specified."""

import base64
import binascii
import re
from collections.abc import Iterator

import msgspec

from relay.diagnosis.finding import Finding

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
