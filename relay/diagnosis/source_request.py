"""Why a source does not take a request: every step of the front door, each looked at by itself."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from multidict import CIMultiDictProxy

from relay.base.units import render_size
from relay.config.schema import SourceConfig
from relay.config.secrets import Credential, Secrets
from relay.config.tokens import Token
from relay.diagnosis.body import explain_malformed, is_twice_encoded
from relay.diagnosis.captured import Captured, Finding, Report
from relay.diagnosis.tokens import explain_bearer, token_of
from relay.errors import (
    Forbidden,
    Invalid,
    Malformed,
    MethodNotAllowed,
    NotFound,
    PluginFailed,
    Refusal,
    Unauthenticated,
)
from relay.incoming import Incoming
from relay.ingest.event import make_event
from relay.ingest.routes import Match, Routes, mounts_of
from relay.source import Accepted, Reply

WHERE = "request line"


def find_route(
    sources: Mapping[str, SourceConfig], name: str, path: str, method: str
) -> tuple[Match | None, str, list[Finding]]:
    """Find a source's route for a path as on the wire.

    Returns:
        The route, or the one that was probably meant, or None; the path below the source's prefix by
        which it was found; and what is wrong with the path.
    """
    source = sources[name]
    try:
        match = Routes(mounts_of(sources)).find(path, method)
    except (NotFound, Malformed) as error:
        return _meant(source, path, method, error)
    if match.mount.name == name:
        return match, path.removeprefix(source.prefix), []
    do = f"post to {_listed(source)}, or verify it with `--source {match.mount.name}`"
    finding = _finding(f'the path is that of source "{match.mount.name}"', do)
    return None, path, [finding]


def wrong_method(method: str, match: Match) -> Finding | None:
    """Say that a path has other methods."""
    if method in match.handlers:
        return None
    allowed = " or ".join(sorted(match.handlers))
    redirect = "; a redirect turns POST into GET" if method == "GET" else ""
    return _finding(f"{method} is not taken here", f"have the sender use {allowed}{redirect}")


def _meant(
    source: SourceConfig, path: str, method: str, error: Exception
) -> tuple[Match | None, str, list[Finding]]:
    if isinstance(error, Malformed):
        return None, path, [_finding(error.message, "have the sender percent-encode it as UTF-8")]
    for other, what, do in _others(source, path):
        try:
            match = match_of(source, other, method)
        except (NotFound, Malformed):
            continue
        return match, other.removeprefix(source.prefix), [_finding(what, do)]
    full = [f"{source.prefix}{route}" for _, route, _ in source.settings.routes()]
    near = difflib.get_close_matches(path, full, n=1)
    meant = f'; did you mean "{near[0]}"?' if near else ""
    what = f"the source has no such path{meant}"
    return None, path.removeprefix(source.prefix), [_finding(what, f"post to {_listed(source)}")]


def _others(source: SourceConfig, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield paths that may have been meant, with what is wrong then and what to do."""
    yield (
        f"{source.prefix}{path}",
        f"the source's prefix is missing: {source.prefix}",
        f"have the sender post to {source.prefix}{path}",
    )
    yield path.rstrip("/"), "a slash is too much at its end", "have the sender leave it out"
    yield re.sub("//+", "/", path), "two slashes follow each other", "have the sender write one"
    yield path.lower(), "it has capital letters", "have the sender write it in small ones"
    if source.prefix and path.startswith(source.prefix * 2):
        yield (
            path.removeprefix(source.prefix),
            "the source's prefix stands there twice",
            "have the proxy, or the sender, add it once",
        )
    for _, route, _ in source.settings.routes():
        if path.endswith(f"{source.prefix}{route}"):
            before = path.removesuffix(f"{source.prefix}{route}")
            wanted = f'prefix = "{before}{source.prefix}"'
            yield (
                f"{source.prefix}{route}",
                f'"{before}" stands before the source\'s path',
                f"have the proxy take it away, or set `{wanted}` in [sources.{source.name}]",
            )


def _listed(source: SourceConfig) -> str:
    return ", ".join(sorted({f"{source.prefix}{route}" for _, route, _ in source.settings.routes()}))


def _finding(what: str, do: str) -> Finding:
    return Finding(cause="route", where=WHERE, what=what, do=do)


def match_of(source: SourceConfig, path: str, method: str) -> Match:
    """Find the route of a path as on the wire, the source's prefix included.

    Raises:
        NotFound: the source has no such path.
        Malformed: the path is not percent-encoded UTF-8.
    """
    return Routes(mounts_of({source.name: source})).find(path, method)


def handle(match: Match, incoming: Incoming) -> Accepted | Reply:
    """Have the handler of a route read a request, whose path is below the source's prefix.

    Raises:
        Refusal: the source's own; MethodNotAllowed; PluginFailed with what the plugin raised as its cause.
    """
    handler = match.handlers.get(incoming.method)
    if handler is None:
        raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))
    asked = msgspec.structs.replace(incoming, params=match.params)
    try:
        answer: Any = handler(asked)
    except Refusal:
        raise
    except BaseException as error:
        raise PluginFailed from error
    if not isinstance(answer, Accepted | Reply):
        raise PluginFailed from TypeError(f"a handler returned {type(answer).__name__}")
    return answer


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
    match, inner, findings = (None, "", []) if not path else find_route(sources, name, path, captured.method)
    if match is not None and (wrong := wrong_method(captured.method, match)):
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
