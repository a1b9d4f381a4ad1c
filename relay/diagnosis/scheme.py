"""Why a captured delivery with a signature of another scheme than Standard Webhooks does not verify."""

import base64
import binascii
import hmac
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import msgspec

from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret
from relay.config.signatures import SignatureConfig
from relay.diagnosis.body_variants import body_variants
from relay.diagnosis.captured import Captured, Report
from relay.diagnosis.signature import keys_of, late
from relay.keys import SHARED, is_asymmetric
from relay.model import Cause, Finding
from relay.signing import SchemeSigner, key_of

_LENGTHS = {"sha1": 20, "sha256": 32, "sha512": 64}


class _Way(msgspec.Struct, frozen=True):
    """One key, signed text or body, and the deviation if it explains the signature."""

    content: bytes
    finding: Finding | None = None
    name: str = ""  # of a key in config.toml


def diagnose(
    captured: Captured, name: str, destinations: Mapping[str, DestinationConfig], index: int, now: int
) -> Report:
    """Verify the signature of `signatures[index]`; arguments are those of `signature.diagnose`."""
    destination = destinations[name]
    scheme = destination.signatures[index]
    url, where = destination.url.reveal(), f"header {scheme.header}"
    signer = SchemeSigner(scheme, (), method=destination.method, url=url)
    headers = {header.lower(): value for header, value in captured.headers.items()}
    value = headers.get(scheme.header.lower(), "").strip()
    if not value:
        do = f"let the proxy or framework in front of the receiver pass the header {scheme.header}"
        return Report(findings=(Finding(cause="headers", where=where, what="missing", do=do),))
    items = signer.items(value)
    time = signer.time(items, headers)
    findings = [*captured.findings, *_time(scheme, time, now)]
    candidates = [*_signatures(scheme, items)]
    if not candidates:
        what = f"no signature of {scheme.algorithm} in {scheme.encoding}"
        what += f" after {scheme.prefix!r}" if scheme.prefix else ""
        findings.append(_finding("encoding", where, what, "pass on the unchanged header"))
        return Report(findings=tuple(findings))
    keys = [*_keys(scheme, name, destinations, index)]
    id_ = headers.get("webhook-id", "")
    texts = [*_texts(scheme, lambda body: signer.text(id_, time, body))]
    report = None
    for bodies in ([_Way(captured.body)], _bodies(captured.body)):  # variants last: they take long
        report = report or _compare(scheme, candidates, keys, texts, [*bodies])
    if report is None:
        what = f'no secret of destination "{name}" for {scheme.scheme or scheme.header} matches'
        do = (
            "give the receiver the secret that signs, see `signatures` in config.toml; or the body was"
            " changed in an unknown way: capture it raw"
        )
        return Report(findings=(*findings, _finding("secret", where, what, do)))
    return msgspec.structs.replace(report, findings=(*findings, *report.findings))


def _finding(cause: Cause, where: str, what: str, do: str) -> Finding:
    return Finding(cause=cause, where=where, what=what, do=do)


def _time(scheme: SignatureConfig, time: str, now: int) -> Iterator[Finding]:
    """Yield the faults of the time of the attempt."""
    if scheme.timestamp_header is None and scheme.timestamp_field is None:
        return
    where = f"header {scheme.timestamp_header or scheme.header}"
    if not time:
        what = f"no time after {scheme.timestamp_field!r}" if scheme.timestamp_field else "missing"
        yield _finding("headers", where, what, "pass on the unchanged header")
    in_seconds = time[:-3] if scheme.timestamp_unit == "ms" and len(time) > 10 else time  # noqa: PLR2004 - digits of seconds
    yield from late(in_seconds, now, where)


def _signatures(scheme: SignatureConfig, items: Sequence[str]) -> Iterator[_Way]:
    """Yield every signature in the header, with the faults of its form."""
    where = f"header {scheme.header}"
    for item in items:
        text = item.removeprefix(scheme.prefix)
        finding = None
        if scheme.prefix and not item.startswith(scheme.prefix):
            what = f"the signature lacks {scheme.prefix!r}"
            finding = _finding("encoding", where, what, "pass on the unchanged header")
        for encoding, read in (("hex", bytes.fromhex), ("base64", _from_base64)):
            try:
                signature = read(text)
            except ValueError:
                continue
            if len(signature) != _LENGTHS[scheme.algorithm]:
                continue
            if encoding != scheme.encoding:
                what = f"the signature is in {encoding}, not in {scheme.encoding}"
                finding = _finding("encoding", where, what, f"use {scheme.encoding}")
            yield _Way(signature, finding)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None


def _keys(
    scheme: SignatureConfig, name: str, destinations: Mapping[str, DestinationConfig], index: int
) -> Iterator[_Way]:
    """Yield the keys that sign, misread forms of them, and the secrets of other destinations."""
    own = destinations[name]
    place = f"destinations.{name}.signatures[{index}]" if scheme.secrets else f"destinations.{name}"
    for key, secret in keys_of(place, scheme.secrets or own.secrets).items():
        yield _Way(key_of(scheme, secret), name=key)
        for how, misread in _misread(secret):
            do = f"the key of this scheme is the secret as {scheme.key_encoding}, nothing added or removed"
            yield _Way(misread, _finding("encoding", key, f"the secret was used as the key {how}", do), key)
    for other, destination in destinations.items():
        places = {f"destinations.{other}": destination.secrets} | {
            f"destinations.{other}.signatures[{number}]": each.secrets
            for number, each in enumerate(destination.signatures)
        }
        for key, secret in ((k, s) for at, them in places.items() for k, s in keys_of(at, them).items()):
            if not is_asymmetric(secret):
                what = f"signed with {key}"
                do = f"give this receiver the secret in {place}.secrets"
                yield _Way(secret.reveal().encode(), _finding("secret", f"{place}.secrets", what, do), key)


def _misread(secret: Secret) -> Iterator[tuple[str, bytes]]:
    text = secret.reveal()
    yield "with a line break at its end", f"{text}\n".encode()
    if text != text.strip():
        yield "without the spaces around it", text.strip().encode()
    if text.startswith(SHARED):
        yield f"without {SHARED}", text.removeprefix(SHARED).encode()
    try:
        yield "after base64 decoding", _from_base64(text.removeprefix(SHARED))
    except ValueError:
        return


def _texts(
    scheme: SignatureConfig, text: Callable[[bytes], bytes]
) -> Iterator[tuple[Callable[[bytes], bytes], Finding | None]]:
    """Yield the signed text, and other texts that the sender may have signed, as functions of the body."""
    yield text, None
    if scheme.signed != "{body}":
        what, do = "the body alone was signed", f"sign {scheme.signed}"
        yield (lambda body: body), _finding("headers", f"header {scheme.header}", what, do)


def _bodies(body: bytes) -> Iterator[_Way]:
    for what, do, other in body_variants(body):
        yield _Way(other, _finding("bytes", "body", what, do))


def _compare(
    scheme: SignatureConfig,
    candidates: Sequence[_Way],
    keys: Sequence[_Way],
    texts: Sequence[tuple[Callable[[bytes], bytes], Finding | None]],
    bodies: Sequence[_Way],
) -> Report | None:
    """Return the report of the match with the fewest deviations, or None without a match."""
    best: Report | None = None
    for body, (text, finding), key in product(bodies, texts, keys):
        expected = hmac.digest(key.content, text(body.content), scheme.algorithm)
        for candidate in candidates:
            if hmac.compare_digest(expected, candidate.content):
                found = (key.finding, finding, body.finding, candidate.finding)
                findings = tuple(each for each in found if each is not None)
                if best is None or len(findings) < len(best.findings):
                    best = Report(findings=findings, fits=key.name if key.finding is None else None)
    return best
