"""Why a request does not reach the source that is meant: its path, or its method."""

import difflib
import re
from collections.abc import Iterator, Mapping

from relay.config.schema import SourceConfig
from relay.diagnosis.finding import Finding
from relay.diagnosis.handling import match_of
from relay.errors import Malformed, NotFound
from relay.ingest.routes import Match, Routes, mounts_of

WHERE = "request line"


def find(
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
