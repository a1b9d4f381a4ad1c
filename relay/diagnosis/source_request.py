"""Why a source refuses a request: path, method, size, token and body, each checked separately."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from multidict import CIMultiDictProxy

from relay.base.clock import SECOND
from relay.base.units import render_size
from relay.config.problems import dotted
from relay.config.schema import SourceConfig
from relay.config.secrets import Credential, Secret, Secrets
from relay.config.tokens import Token
from relay.diagnosis.body import explain_malformed, is_twice_encoded
from relay.diagnosis.captured import Captured, Report
from relay.diagnosis.tokens import explain_token, token_of
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
from relay.ingest.compression import encoding_of, pieces
from relay.ingest.event import make_event
from relay.ingest.routes import Match, Routes, mounts_of
from relay.model import Finding
from relay.source import Accepted, Incoming, Reply

WHERE = "request line"


def find_route(
    sources: Mapping[str, SourceConfig], name: str, path: str, method: str
) -> tuple[Match | None, str, list[Finding]]:
    """Return the route of a source for a path.

    Returns:
        The route of the path or of a similar path, or None; the path of that route below the source's
        prefix; and the findings about the path.
    """
    source = sources[name]
    try:
        match = Routes(mounts_of(sources)).find(path, method)
    except (NotFound, Malformed) as error:
        return _similar(source, path, method, error)
    if match.mount.name == name:
        return match, path.removeprefix(source.prefix), []
    do = f"post to {_listed(source)}, or verify with `--source {match.mount.name}`"
    finding = _finding(f'the path belongs to source "{match.mount.name}"', do)
    return None, path, [finding]


def wrong_method(method: str, match: Match) -> Finding | None:
    """Return a finding if the path does not allow the method."""
    if method in match.handlers:
        return None
    allowed = " or ".join(sorted(match.handlers))
    redirect = "; a redirect turns POST into GET" if method == "GET" else ""
    return _finding(f"{method} is not allowed on this path", f"have the sender use {allowed}{redirect}")


def _similar(
    source: SourceConfig, path: str, method: str, error: Exception
) -> tuple[Match | None, str, list[Finding]]:
    if isinstance(error, Malformed):
        return None, path, [_finding(error.message, "have the sender percent-encode it as UTF-8")]
    for other, what, do in _corrections(source, path):
        try:
            match = match_of(source, other, method)
        except (NotFound, Malformed):
            continue
        return match, other.removeprefix(source.prefix), [_finding(what, do)]
    full = [f"{source.prefix}{route}" for _, route, _ in source.settings.routes()]
    near = difflib.get_close_matches(path, full, n=1)
    suggestion = f', did you mean "{near[0]}"?' if near else ""
    what = f"unknown path{suggestion}"
    return None, path.removeprefix(source.prefix), [_finding(what, f"post to {_listed(source)}")]


def _corrections(source: SourceConfig, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield corrected paths, each with the problem and the advice."""
    yield (
        f"{source.prefix}{path}",
        f"the source's prefix is missing: {source.prefix}",
        f"have the sender post to {source.prefix}{path}",
    )
    yield path.rstrip("/"), "the path has an extra slash at the end", "have the sender remove the slash"
    yield re.sub("//+", "/", path), "the path has a double slash", "have the sender write one slash"
    yield path.lower(), "the path has capital letters", "have the sender write the path in lower case"
    if source.prefix and path.startswith(source.prefix * 2):
        yield (
            path.removeprefix(source.prefix),
            "the path has the source's prefix twice",
            "have the proxy or the sender add it once",
        )
    for _, route, _ in source.settings.routes():
        if path.endswith(f"{source.prefix}{route}"):
            before = path.removesuffix(f"{source.prefix}{route}")
            wanted = f'prefix = "{before}{source.prefix}"'
            yield (
                f"{source.prefix}{route}",
                f'"{before}" precedes the source\'s path',
                f"have the proxy remove it, or set `{wanted}` in [sources.{source.name}]",
            )


def _listed(source: SourceConfig) -> str:
    return ", ".join(sorted({f"{source.prefix}{route}" for _, route, _ in source.settings.routes()}))


def _finding(what: str, do: str) -> Finding:
    return Finding(cause="route", where=WHERE, what=what, do=do)


def match_of(source: SourceConfig, path: str, method: str) -> Match:
    """Return the route of a path; the path includes the source's prefix.

    Raises:
        NotFound: the source does not have this path.
        Malformed: the path is not percent-encoded UTF-8.
    """
    return Routes(mounts_of({source.name: source})).find(path, method)


def handle(match: Match, incoming: Incoming) -> Accepted | Reply:
    """Return the result of a route's handler for a request; the request's path is below the source's prefix.

    Raises:
        Refusal: the source's own, MethodNotAllowed, or PluginFailed, whose cause is the plugin's exception.
    """
    handler = match.handlers.get(incoming.method)
    if handler is None:
        raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))
    request = msgspec.structs.replace(incoming, params=match.params)
    try:
        answer: Any = handler(request)
    except Refusal:
        raise
    except BaseException as error:
        raise PluginFailed from error
    if not isinstance(answer, Accepted | Reply):
        raise PluginFailed from TypeError(f"a handler returned {type(answer).__name__}")
    return answer


class Watched(Incoming, frozen=True, kw_only=True, gc=False):
    """A request that records which tokens the source compares with its bearer token."""

    compared: list[Secrets] = msgspec.field(default_factory=list)

    def bearer(self, tokens: Secrets) -> Credential:
        """Record the tokens; see `Incoming.bearer`."""
        self.compared.append(tokens)
        return super().bearer(tokens)


def diagnose(
    captured: Captured,
    name: str,
    sources: Mapping[str, SourceConfig],
    tokens: Sequence[Token],
    at: int,
) -> Report:
    """Return the report on a request to a source.

    Args:
        captured: the request; its path includes the source's prefix.
        name: the source.
        sources: every source of the configuration.
        tokens: every secret of the configuration.
        at: time of receipt, in seconds since the epoch.
    """
    source = sources[name]
    path, query = _split(captured.target or _only_path(source))
    match, inner, findings = (None, "", []) if not path else find_route(sources, name, path, captured.method)
    if match is not None and (wrong := wrong_method(captured.method, match)):
        findings.append(wrong)
    incoming = Watched(
        method=captured.method,
        path=inner,
        headers=CIMultiDictProxy(captured.headers),
        body=captured.body,
        params={} if match is None else match.params,
        query=query,
        target=f"{path}?{query}" if query else path,
        received_at=at * SECOND,
    )
    findings += captured.findings
    findings += _size(source, captured)
    readable = not _is_compressed(captured)
    if not readable and not findings:
        content, findings = _decompressed(source, captured)
        incoming = msgspec.structs.replace(incoming, body=content, compressed=captured.body)
        readable = not findings
    if match is not None and not findings and (handshake := _handshake(source, incoming)) is not None:
        return handshake
    fits, refused = verify(source, incoming, tokens)
    findings += refused
    because = "" if source.settings.is_open() else "the source accepts these credentials"
    report = Report(findings=tuple(findings), fits=fits, because=because)
    if match is None or captured.method not in match.handlers or not readable:
        return report
    return _read(source, match, incoming, report)


def _only_path(source: SourceConfig) -> str:
    """Return the source's only POST path, `""` if it has several; for a request without a request line."""
    posted = [path for method, path, _ in source.settings.routes() if method == "POST"]
    return f"{source.prefix}{posted[0]}" if len(posted) == 1 and "{" not in posted[0] else ""


def _split(target: str) -> tuple[str, str]:
    """Return path and query of a request target, also of a whole URL."""
    if "://" in target and not target.startswith("/"):
        target = "/" + target.partition("://")[2].partition("/")[2]
    path, _, query = target.partition("?")
    return path, query


def _encoding(captured: Captured) -> str:
    return ", ".join(captured.headers.getall("Content-Encoding", ()))


def _is_compressed(captured: Captured) -> bool:
    return _encoding(captured).strip().lower() not in ("", "identity")


def _size(source: SourceConfig, captured: Captured) -> list[Finding]:
    findings = []
    if _is_compressed(captured) and not source.settings.decompresses:
        what = "the body is compressed; this source does not accept compressed bodies"
        do = "have the sender, or the proxy in front, send it uncompressed"
        findings.append(Finding(cause="encoding", where="header Content-Encoding", what=what, do=do))
    if len(captured.body) > source.max_body:
        what = f"{len(captured.body)} bytes exceed the maximum of {render_size(source.max_body)}"
        do = f"raise `max_body` in [sources.{source.name}], or have the sender post less"
        findings.append(Finding(cause="body", where="body", what=what, do=do))
    return findings


def _decompressed(source: SourceConfig, captured: Captured) -> tuple[bytes, list[Finding]]:
    """Return the content of a compressed body, and the findings if it cannot be decompressed."""
    try:
        encoding = encoding_of(_encoding(captured))
        return b"".join(pieces(captured.body, encoding, source.max_body)), []
    except Refusal as refusal:
        do = "capture the body as it was sent, in binary form, or have the sender send it uncompressed"
        finding = Finding(cause="encoding", where="header Content-Encoding", what=refusal.message, do=do)
        return captured.body, [finding]


def _handshake(source: SourceConfig, incoming: Incoming) -> Report | None:
    """Return the report on a request that the source answers without verifying its sender."""
    try:
        reply = source.settings.handshake(incoming)
    except Refusal as refusal:
        return Report(findings=(_refused(source, refusal),))
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
        return Report(findings=(failed(source, error),))
    if reply is None:
        return None
    return Report(findings=(), because=_without_event(reply))


def _without_event(reply: Reply) -> str:
    return f"the source answers with {reply.status} and creates no event"


def verify(
    source: SourceConfig, incoming: Watched, tokens: Sequence[Token]
) -> tuple[str | None, list[Finding]]:
    """Return the key of the matching token, and the findings about a refused request."""
    try:
        source.settings.verify(incoming)
    except (Unauthenticated, Forbidden) as refusal:
        findings = [
            Finding(
                cause="plugin",
                where=f'plugin "{source.plugin}"',
                what=line,
                do=f"compare [sources.{source.name}] with the sender's settings",
            )
            for line in source.settings.diagnose(incoming)
        ]
        if incoming.compared:
            own, others = _divided(source, incoming.compared[-1], tokens)
            own += _clear_tokens(source, incoming)
            return None, [explain_token(refusal, incoming, own, others), *findings]
        return None, findings or [_refused(source, refusal)]
    except Refusal as refusal:
        return None, [_refused(source, refusal)]
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
        return None, [failed(source, error)]
    used = [token for token in tokens if token.kind == "source" and token.owner == source.name]
    token = token_of(incoming, [*used, *_clear_tokens(source, incoming)]) if incoming.compared else None
    return None if token is None else token.key, []


def _clear_tokens(source: SourceConfig, incoming: Watched) -> list[Token]:
    """Return the clear-text secrets of a source that are in the text it compared last, as tokens."""
    settings, compared = source.settings, incoming.compared[-1]
    return [
        Token(secret=secret, key=dotted(("sources", source.name, key, at)), kind="source", owner=source.name)
        for name, key in zip(settings.__struct_fields__, settings.__struct_encode_fields__, strict=True)
        if isinstance(value := getattr(settings, name), tuple)
        for at, secret in enumerate(value)
        if isinstance(secret, Secret) and compared.find(secret.reveal().strip().encode()) is not None
    ]


def _divided(
    source: SourceConfig, compared: Secrets, tokens: Sequence[Token]
) -> tuple[list[Token], list[Token]]:
    """Return the tokens that the source compared, and all others."""
    fields = [
        field for field in source.settings.__struct_fields__ if getattr(source.settings, field) == compared
    ]
    own = [
        token
        for token in tokens
        if token.kind == "source" and token.owner == source.name and token.field in fields
    ]
    return own, [token for token in tokens if token not in own]


def _read(source: SourceConfig, match: Match, incoming: Incoming, report: Report) -> Report:
    """Return the report with the type of the event, or with a finding about the body."""
    finding: Finding
    try:
        accepted = handle(match, incoming)
        if isinstance(accepted, Reply):
            return msgspec.structs.replace(report, because=_without_event(accepted))
        events = accepted.events or ([] if accepted.event is None else [accepted.event])
        is_item = bool(accepted.events)
        stored = [make_event(match.mount, each, incoming, 0, is_item=is_item) for each in events]
        if not stored:
            return report
    except Malformed:
        finding = explain_malformed(incoming.body, incoming.header("Content-Type"))
    except Invalid as refusal:
        twice = "; the body is JSON that was encoded twice" if is_twice_encoded(incoming.body) else ""
        what, do = f"{refusal.detail}{twice}", f"`relay send {source.name} --list` lists valid samples"
        finding = Finding(cause="body", where="body", what=what, do=do)
    except PluginFailed as refusal:
        finding = failed(source, refusal.__cause__ or refusal)
    except Refusal as refusal:
        finding = _refused(source, refusal)
    else:
        first, more = stored[0], len(stored) - 1
        return msgspec.structs.replace(report, type=first.type, subject=first.subject, more=more)
    return msgspec.structs.replace(report, findings=(*report.findings, finding))


def _refused(source: SourceConfig, refusal: Refusal) -> Finding:
    what = f"refuses with {refusal.status}: {refusal.detail}"
    return Finding(
        cause="plugin", where=f'plugin "{source.plugin}"', what=what, do="see the documentation of the plugin"
    )


def failed(source: SourceConfig, error: BaseException) -> Finding:
    """Return the finding about an exception that a plugin raised."""
    what = f"failed: {type(error).__name__}: {error}"
    return Finding(cause="plugin", where=f'plugin "{source.plugin}"', what=what, do="correct the plugin")
