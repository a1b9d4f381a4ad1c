"""Which source, and which of its handlers, a path belongs to."""

from collections.abc import Callable, Mapping
from urllib.parse import unquote

import msgspec

from relay.config.model import SourceConfig
from relay.errors import Malformed, NotFound
from relay.incoming import Incoming
from relay.source import Accepted, Reply, Source

Handle = Callable[[Incoming], Accepted | Reply]


class Mount(msgspec.Struct, kw_only=True, eq=False):
    """One configured source, ready to be asked."""

    name: str
    source: Source
    config: SourceConfig
    paused: bool = False


def mounts_of(sources: Mapping[str, SourceConfig]) -> tuple[Mount, ...]:
    """Return the configured sources, to be mounted."""
    return tuple(Mount(name=name, source=each.settings, config=each) for name, each in sources.items())


class Match(msgspec.Struct, frozen=True):
    """A path that exists: its handlers by method, and what stood for the placeholders."""

    mount: Mount
    handlers: Mapping[str, Handle]
    params: Mapping[str, str]


class _Pattern(msgspec.Struct, frozen=True):
    segments: tuple[str, ...]  # of the template; placeholders as "{name}"
    match: Match

    def fit(self, segments: list[str]) -> Mapping[str, str] | None:
        params = {}
        for template, segment in zip(self.segments, segments, strict=True):
            if template.startswith("{"):
                params[template[1:-1]] = segment
            elif template != segment:
                return None
        return params


class Routes:
    """All paths of all sources; literal paths are one look-up."""

    def __init__(self, mounts: tuple[Mount, ...]) -> None:
        self._literal: dict[str, Match] = {}
        self._patterns: dict[int, list[_Pattern]] = {}
        self._owners: list[tuple[str, Mount]] = []
        for mount in mounts:
            self._mount(mount)
        self._owners.sort(key=lambda owner: len(owner[0]), reverse=True)
        for patterns in self._patterns.values():  # the more literal segments, the earlier
            patterns.sort(key=lambda pattern: sum(s.startswith("{") for s in pattern.segments))

    def _mount(self, mount: Mount) -> None:
        prefix = mount.config.prefix
        self._owners += [(prefix + owned, mount) for owned in mount.source.owns]
        paths: dict[str, dict[str, Handle]] = {}
        for method, path, name in mount.source.routes():
            paths.setdefault(prefix + path, {})[method] = getattr(mount.source, name)
        for path, handlers in paths.items():
            match = Match(mount, handlers, {})
            if "{" in path:
                segments = tuple(path.split("/"))
                self._patterns.setdefault(len(segments), []).append(_Pattern(segments, match))
            else:
                self._literal[path] = match

    def find(self, path: str) -> Match:
        """Return the match of a raw path (percent-encoded, no query).

        Raises:
            NotFound: no source has that path.
            Malformed: a segment is not percent-encoded UTF-8.
        """
        match = self._literal.get(path)
        if match is not None:
            return match
        segments = path.split("/")
        for pattern in self._patterns.get(len(segments), ()):
            params = pattern.fit(segments)
            if params is not None:
                decoded = {name: _decode(value) for name, value in params.items()}
                return Match(pattern.match.mount, pattern.match.handlers, decoded)
        raise NotFound

    def owner(self, path: str) -> Mount | None:
        """Return the source whose envelope errors on this path take: the longest owned prefix wins."""
        for prefix, mount in self._owners:
            if path == prefix or path.startswith(f"{prefix}/"):
                return mount
        return None


def _decode(segment: str) -> str:
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise Malformed("The path is not valid UTF-8") from None
