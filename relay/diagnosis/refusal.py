"""Diagnosis of refused requests, made while the relay still has the whole request."""

import os
from collections.abc import Iterator, Sequence

import msgspec

from relay.base.text import printable
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.schema import Config, SourceConfig
from relay.config.tokens import Token, all_tokens
from relay.diagnosis.body import UNEXPLAINED, explain_malformed, is_twice_encoded
from relay.diagnosis.source_request import WHERE, Watched, failed, find_route, verify, wrong_method
from relay.diagnosis.tokens import explain_scope, token_of
from relay.errors import (
    Forbidden,
    Invalid,
    Malformed,
    MethodNotAllowed,
    NotFound,
    PluginFailed,
    RelayError,
    TooLarge,
    Unauthenticated,
)
from relay.ingest.refused import Case
from relay.ingest.routes import Routes, mounts_of
from relay.model import Finding

LONGEST = 500
"""Maximum number of characters of each text of a finding; a plugin may put a payload into it."""


def explain(cases: Sequence[Case], config: Config) -> list[tuple[Finding, ...]]:
    """Return the findings about each refused request; empty if the reason of the refusal needs no more."""
    tokens: tuple[Token, ...] | None = None
    found = []
    for case in cases:
        if tokens is None and isinstance(case.refusal, Unauthenticated | Forbidden):
            tokens = _tokens(config)
        found.append(tuple(map(_short, _findings(case, config, tokens or ()))))
    return found


def _tokens(config: Config) -> tuple[Token, ...]:
    """Read the configured tokens again, because the daemon keeps only digests; () if that fails."""
    try:
        return all_tokens(Binder(read(config.path), os.environ, lenient=True), config)
    except (RelayError, OSError, LookupError, TypeError, ValueError):
        return ()  # config.toml has changed since the start


def _findings(case: Case, config: Config, tokens: Sequence[Token]) -> Iterator[Finding]:
    source = config.sources.get(case.source or "")
    if source is None:
        yield _unowned(case, config)
        return
    refusal, incoming = case.refusal, case.incoming
    match refusal:
        case Unauthenticated() if not case.is_cut:
            watched = Watched(**{name: getattr(incoming, name) for name in incoming.__struct_fields__})
            yield from verify(source, watched, tokens)[1]
        case Forbidden():
            yield _forbidden(refusal, source, case, tokens)
        case NotFound():
            yield from find_route(config.sources, source.name, case.path, incoming.method)[2]
        case MethodNotAllowed():
            match = Routes(mounts_of({source.name: source})).find(case.path)
            if (finding := wrong_method(incoming.method, match)) is not None:
                yield finding
        case PluginFailed() if refusal.__cause__ is not None:
            yield failed(source, refusal.__cause__)
        case _:
            yield from _of_body(case, source)


def _of_body(case: Case, source: SourceConfig) -> Iterator[Finding]:
    """Yield the findings about the body; none if the reason of the refusal already names the problem."""
    refusal, body = case.refusal, case.incoming.body
    if isinstance(refusal, TooLarge):
        do = f"raise `max_body` in [sources.{source.name}], or have the sender post less"
        yield Finding(cause="body", where="body", what=refusal.detail, do=do)
    elif isinstance(refusal, Malformed) and body:
        finding = explain_malformed(body, case.incoming.header("Content-Type"))
        if finding.what != UNEXPLAINED:
            yield finding
    elif isinstance(refusal, Invalid) and is_twice_encoded(body):
        what, do = "the body is JSON that was encoded twice", "have the sender encode it once"
        yield Finding(cause="body", where="body", what=what, do=do)


def _unowned(case: Case, config: Config) -> Finding:
    """Return the finding about a path that no source owns; it names the most similar path."""
    near = Routes(mounts_of(config.sources)).nearest(case.path)
    if near is None or near == "/health":
        return Finding(
            cause="route", where=WHERE, what="unknown path; no source has a similar one",
            do="compare the sender's address with `relay sources list`",
        )  # fmt: skip
    what = f"unknown path; did you mean {near}?"
    return Finding(cause="route", where=WHERE, what=what, do=f"have the sender post to {near}")


def _forbidden(refusal: Forbidden, source: SourceConfig, case: Case, tokens: Sequence[Token]) -> Finding:
    own = [token for token in tokens if token.kind == "source" and token.owner == source.name]
    return explain_scope(refusal, token_of(case.incoming, own))


def _short(finding: Finding) -> Finding:
    """Return a finding whose texts are one short line each."""
    texts = {name: printable(getattr(finding, name)[:LONGEST]) for name in ("where", "what", "do")}
    return msgspec.structs.replace(finding, **texts)
