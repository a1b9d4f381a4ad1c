"""Why a captured delivery does not verify, by every scheme of its destination's `signatures`."""

from collections.abc import Mapping

import msgspec
from multidict import CIMultiDict

from relay.config.schema import DestinationConfig
from relay.config.signatures import DEFAULT
from relay.diagnosis import scheme, signature
from relay.diagnosis.captured import Captured, Report
from relay.model import Finding

_SVIX, _STANDARD = "svix-", "webhook-"


def diagnose(
    captured: Captured, name: str, destinations: Mapping[str, DestinationConfig], now: int
) -> Report:
    """Verify a captured delivery by each scheme; arguments are those of `signature.diagnose`.

    If the request has a signature of one scheme, the absence of another is only a note: the request may be
    older than the configuration, and its receiver checks one of them.
    """
    schemes = destinations[name].signatures
    if schemes in (DEFAULT, ()):
        return signature.diagnose(captured, name, destinations, now)
    is_present = [bool(captured.headers.get(each.header, "").strip()) for each in schemes]
    findings: list[Finding] = []
    reports = []
    for index, each in enumerate(schemes):
        if any(is_present) and not is_present[index]:
            captured.notes += (f"the request has no header {each.header}",)
            continue
        reports.append(_by_scheme(captured, name, destinations, index, now))
        findings += reports[-1].findings
    fits = [report.fits for report in reports if report.fits is not None]
    number = next((report.signature for report in reports if report.signature), None)
    return Report(findings=tuple(dict.fromkeys(findings)), fits=", ".join(fits) or None, signature=number)


def _by_scheme(
    captured: Captured, name: str, destinations: Mapping[str, DestinationConfig], index: int, now: int
) -> Report:
    each = destinations[name].signatures[index]
    if not each.is_standard:
        return scheme.diagnose(captured, name, destinations, index, now)
    own = None
    if each.secrets:
        own = signature.keys_of(f"destinations.{name}.signatures[{index}]", each.secrets)
    if each.scheme == "standard":
        return signature.diagnose(captured, name, destinations, now, own)
    report = signature.diagnose(_renamed(captured), name, destinations, now, own)
    return msgspec.structs.replace(report, findings=tuple(map(_as_svix, report.findings)))


def _renamed(captured: Captured) -> Captured:
    """Return a request with Svix's headers under the names of Standard Webhooks."""
    headers: CIMultiDict[str] = CIMultiDict()
    for header, value in captured.headers.items():
        if header.lower().startswith(_SVIX):
            headers.add(_STANDARD + header[len(_SVIX) :], value)
        elif not header.lower().startswith(_STANDARD):
            headers.add(header, value)
    return msgspec.structs.replace(captured, headers=headers)


def _as_svix(finding: Finding) -> Finding:
    texts = {
        key: getattr(finding, key).replace(_STANDARD, _SVIX).replace(f"`{_STANDARD}…`", f"`{_SVIX}…`")
        for key in ("where", "what", "do")
    }
    return msgspec.structs.replace(finding, **texts)
