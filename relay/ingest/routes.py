"""Routes: from a path to its source and the source's handlers."""

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import itemgetter
from urllib.parse import unquote

import msgspec

from relay.config.schema import SourceConfig
from relay.errors import Malformed, NotFound, Refusal
from relay.schemas import Schemas
from relay.source import SPANNING, Accepted, Incoming, Reply, Source

_SEVERAL = "([^/](?:.*[^/])?)"  # segments, of which neither the first nor the last is empty

_BUNDLED = "relay.sources."  # package of the bundled sources

LONGEST_COMPARED = 200  # characters of an unknown path that are compared with known paths

Handle = Callable[[Incoming], Accepted | Reply]


class Mount(msgspec.Struct, kw_only=True, eq=False):
    """One configured source with its state at run time."""

    name: str
    source: Source
    config: SourceConfig
    paused: bool = False
    is_open: bool = False  # see `Source.is_open`
    needs_body: bool = True  # see `Source.needs_body`
    is_screened: bool = True  # the head is checked before everything else
    has_handshake: bool = True  # see `Source.handshake`
    checks_changes: bool = True  # check types of worker changes; mypy has checked those of bundled sources
    schemas: Schemas | None = None  # None: no schemas are configured

    def __post_init__(self) -> None:
        source = self.source
        self.is_open, self.needs_body = source.is_open(), source.needs_body()
        self.is_screened = self.is_open or type(source).screen is not Source.screen
        self.schemas = self.config.compiled
        self.checks_changes = not type(source).__module__.startswith(_BUNDLED)
        self.has_handshake = type(source).handshake is not Source.handshake


def mounts_of(sources: Mapping[str, SourceConfig]) -> tuple[Mount, ...]:
    """Return a mount for each configured source."""
    return tuple(Mount(name=name, source=each.settings, config=each) for name, each in sources.items())


class Match(msgspec.Struct, frozen=True):
    """An existing path: its handlers by method, and the values of its placeholders."""

    mount: Mount
    handlers: Mapping[str, Handle]
    params: Mapping[str, str]


class _Shape:
    """Templates of one length with placeholders in the same places; one look-up finds the template."""

    def __init__(self, segments: list[str]) -> None:
        self.places = _places(segments)
        self.literals = itemgetter(*(at for at in range(len(segments)) if at not in self.places))
        self.matches: dict[str | tuple[str, ...], tuple[Match, tuple[str, ...]]] = {}  # with names of params

    def add(self, segments: list[str], match: Match) -> None:
        """Add a template; the first of two equal templates wins."""
        names = tuple(_name(segments[place]) for place in self.places)
        self.matches.setdefault(self.literals(segments), (match, names))


class _Span(msgspec.Struct, frozen=True):
    """A template with a `{name:path}`; it is tried only if no other template fits."""

    pattern: re.Pattern[str]
    literals: int  # characters; of two fitting templates, the one with more wins
    names: tuple[str, ...]
    match: Match


class Routes:
    """All paths of all sources; a literal path takes one look-up."""

    def __init__(self, mounts: tuple[Mount, ...]) -> None:
        self.literal: dict[str, Match] = {}  # paths without placeholders
        self._shapes: dict[int, list[_Shape]] = {}  # by number of segments
        self._spans: list[_Span] = []
        self._owners: list[tuple[str, Mount]] = []
        self._paths = ["/health"]
        for mount in mounts:
            self._mount(mount)
        self._owners.sort(key=lambda owner: len(owner[0]), reverse=True)
        for shapes in self._shapes.values():  # more literal segments first
            shapes.sort(key=lambda shape: len(shape.places))
        self._spans.sort(key=lambda span: span.literals, reverse=True)

    def _mount(self, mount: Mount) -> None:
        prefix = mount.config.prefix
        self._owners += [(prefix + owned, mount) for owned in mount.source.owned()]
        paths: dict[str, dict[str, Handle]] = {}
        for method, path, name in mount.source.routes():
            paths.setdefault(prefix + path, {})[method] = getattr(mount.source, name)
        self._paths += paths
        for path, handlers in paths.items():
            match = Match(mount, handlers, {})
            if "{" in path:
                segments = path.split("/")
                self._shape(segments).add(segments, match)
                if SPANNING in path:
                    self._spans.append(_span(segments, match))
            else:
                self.literal[path] = match

    def _shape(self, segments: list[str]) -> _Shape:
        shapes = self._shapes.setdefault(len(segments), [])
        for shape in shapes:
            if shape.places == _places(segments):
                return shape
        shapes.append(_Shape(segments))
        return shapes[-1]

    def find(self, path: str, method: str = "") -> Match:
        """Return the match of a raw path (percent-encoded, no query).

        A `{name:path}` matches several segments only if its route has the method (`""`: any method), so that
        a path of several segments with a wrong method is unknown.

        Raises:
            NotFound: no source has this path.
            Malformed: a segment is not percent-encoded UTF-8.
        """
        match = self.literal.get(path)
        if match is not None:
            return match
        segments = path.split("/")
        for shape in self._shapes.get(len(segments), ()):
            found = shape.matches.get(shape.literals(segments))
            if found is not None:
                match, names = found
                values = [_decode(segments[place]) for place in shape.places]
                return Match(match.mount, match.handlers, dict(zip(names, values, strict=True)))
        for span in self._spans:
            if method and method not in span.match.handlers:
                continue
            if fitting := span.pattern.fullmatch(path):
                values = [_decode(value) for value in fitting.groups()]
                params = dict(zip(span.names, values, strict=True))
                return Match(span.match.mount, span.match.handlers, params)
        raise NotFound

    def nearest(self, path: str) -> str | None:
        """Return the known path that is most similar to an unknown one, if any."""
        tidy = re.sub("/{2,}", "/", path[:LONGEST_COMPARED]).rstrip("/")
        with suppress(Refusal):
            self.find(tidy)
            return tidy
        return next(iter(difflib.get_close_matches(tidy, self._paths, 1)), None)

    def owner(self, path: str) -> Mount | None:
        """Return the source that renders errors on this path; the longest owned prefix wins."""
        for prefix, mount in self._owners:
            if path == prefix or path.startswith(f"{prefix}/"):
                return mount
        return None


def _places(segments: list[str]) -> tuple[int, ...]:
    return tuple(place for place, segment in enumerate(segments) if segment.startswith("{"))


def _name(segment: str) -> str:
    return segment[1:-1].removesuffix(":path")


def _span(segments: list[str], match: Match) -> _Span:
    parts, names, literals = [], [], 0
    for segment in segments:
        if segment.startswith("{"):
            names.append(_name(segment))
            parts.append(_SEVERAL if segment.endswith(SPANNING) else "([^/]*)")
        else:
            literals += len(segment)
            parts.append(re.escape(segment))
    return _Span(re.compile("/".join(parts)), literals, tuple(names), match)


def _decode(segment: str) -> str:
    if "%" not in segment:
        return segment
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise Malformed("The path is not valid UTF-8") from None
