"""Why a source does not take a request: every step of the front door, each looked at by itself."""

from collections.abc import Mapping, Sequence

import msgspec
from multidict import CIMultiDictProxy

from relay.base.units import render_size
from relay.config.schema import SourceConfig
from relay.config.secrets import Credential, Secrets
from relay.config.tokens import Token
from relay.diagnosis import paths
from relay.diagnosis.body import explain_malformed, is_twice_encoded
from relay.diagnosis.captured import Captured
from relay.diagnosis.finding import Finding, Report
from relay.diagnosis.handling import handle
from relay.diagnosis.tokens import explain_bearer, token_of
from relay.errors import Forbidden, Invalid, Malformed, PluginFailed, Refusal, Unauthenticated
from relay.incoming import Incoming
from relay.ingest.event import make_event
from relay.ingest.routes import Match
from relay.source import Accepted


class _Watched(Incoming, frozen=True, kw_only=True, gc=False):
    """A request that remembers which tokens its bearer was looked for among."""

    asked: list[Secrets] = msgspec.field(default_factory=list)

    def bearer(self, tokens: Secrets) -> Credential:
        """See `Incoming.bearer`."""
        self.asked.append(tokens)
        return super().bearer(tokens)


def diagnose(
    captured: Captured, name: str, sources: Mapping[str, SourceConfig], tokens: Sequence[Token]
) -> Report:
    """Judge a request as the source would, and say of every refusal where it comes from.

    Args:
        captured: the request, its path as on the wire.
        name: the source that it is meant for.
        sources: all of the configuration.
        tokens: every secret of the configuration.
    """
    source = sources[name]
    path, query = _split(captured.target or _only_path(source))
    match, inner, findings = (None, "", []) if not path else paths.find(sources, name, path, captured.method)
    if match is not None and (wrong := paths.wrong_method(captured.method, match)):
        findings.append(wrong)
    incoming = _Watched(
        method=captured.method,
        path=inner,
        headers=CIMultiDictProxy(captured.headers),
        body=captured.body,
        params={} if match is None else match.params,
        query=query,
    )
    findings += captured.findings
    findings += _size(source, captured)
    fits, refused = _verify(source, incoming, tokens)
    findings += refused
    report = Report(findings=tuple(findings), fits=fits)
    if match is None or captured.method not in match.handlers or _is_compressed(captured):
        return report
    return _read(source, match, incoming, report)


def _only_path(source: SourceConfig) -> str:
    """Return where a request without a request line was posted to, as far as there is no choice."""
    posted = [path for method, path, _ in source.settings.routes() if method == "POST"]
    return f"{source.prefix}{posted[0]}" if len(posted) == 1 and "{" not in posted[0] else ""


def _split(target: str) -> tuple[str, str]:
    """Return path and query of a request line, also of one that names a whole URL."""
    if "://" in target and not target.startswith("/"):
        target = "/" + target.partition("://")[2].partition("/")[2]
    path, _, query = target.partition("?")
    return path, query


def _is_compressed(captured: Captured) -> bool:
    return captured.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


def _size(source: SourceConfig, captured: Captured) -> list[Finding]:
    findings = []
    if _is_compressed(captured):
        what = "the body is compressed, which the relay never takes"
        do = "have the sender, or the proxy before, send it as it is"
        findings.append(Finding(cause="encoding", where="header Content-Encoding", what=what, do=do))
    if len(captured.body) > source.max_body:
        what = f"{len(captured.body)} bytes, of {render_size(source.max_body)} at most"
        do = f"raise `max_body` in [sources.{source.name}], or have the sender post less"
        findings.append(Finding(cause="body", where="body", what=what, do=do))
    return findings


def _verify(
    source: SourceConfig, incoming: _Watched, tokens: Sequence[Token]
) -> tuple[str | None, list[Finding]]:
    """Ask the source who sends; of a bearer token that it refuses, find out why."""
    try:
        source.settings.verify(incoming)
    except (Unauthenticated, Forbidden) as refusal:
        findings = [
            Finding(cause="plugin", where=f'plugin "{source.plugin}"', what=line, do="see what it documents")
            for line in source.settings.diagnose(incoming)
        ]
        if incoming.asked:
            own, others = _sorted(source, incoming.asked[-1], tokens)
            return None, [explain_bearer(refusal, incoming, own, others), *findings]
        return None, findings or [_refused(source, refusal)]
    except Refusal as refusal:
        return None, [_refused(source, refusal)]
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
        return None, [_failed(source, error)]
    used = [token for token in tokens if token.kind == "source" and token.owner == source.name]
    token = token_of(incoming, used) if incoming.asked else None
    return None if token is None else token.key, []


def _sorted(source: SourceConfig, asked: Secrets, tokens: Sequence[Token]) -> tuple[list[Token], list[Token]]:
    """Tell the tokens that the source has looked among from all others."""
    fields = [
        field for field in source.settings.__struct_fields__ if getattr(source.settings, field) == asked
    ]
    own = [
        token
        for token in tokens
        if token.kind == "source" and token.owner == source.name and token.field in fields
    ]
    return own, [token for token in tokens if token not in own]


def _read(source: SourceConfig, match: Match, incoming: Incoming, report: Report) -> Report:
    """Have the source read the body."""
    finding: Finding
    try:
        accepted = handle(match, incoming)
        if not isinstance(accepted, Accepted) or accepted.event is None:
            return report
        event = make_event(source.name, accepted.event, incoming, 0)
    except Malformed:
        finding = explain_malformed(incoming.body, incoming.header("Content-Type"))
    except Invalid as refusal:
        twice = "; it is JSON that was encoded twice" if is_twice_encoded(incoming.body) else ""
        what, do = f"{refusal.detail}{twice}", f"`relay send {source.name} --list` names samples to compare"
        finding = Finding(cause="body", where="body", what=what, do=do)
    except PluginFailed as refusal:
        finding = _failed(source, refusal.__cause__ or refusal)
    except Refusal as refusal:
        finding = _refused(source, refusal)
    else:
        return msgspec.structs.replace(report, type=event.type, subject=event.subject)
    return msgspec.structs.replace(report, findings=(*report.findings, finding))


def _refused(source: SourceConfig, refusal: Refusal) -> Finding:
    what = f"it refuses with {refusal.status}: {refusal.detail}"
    return Finding(
        cause="plugin", where=f'plugin "{source.plugin}"', what=what, do="see what it asks of its sender"
    )


def _failed(source: SourceConfig, error: BaseException) -> Finding:
    what = f"it failed: {type(error).__name__}: {error}"
    return Finding(cause="plugin", where=f'plugin "{source.plugin}"', what=what, do="mend the plugin")
