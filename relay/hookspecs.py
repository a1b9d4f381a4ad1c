"""What a plugin may offer. pluggy is asked once, at start-up, by `relay.loader`."""

import pluggy

from relay.formats import Format
from relay.source import Source

PROJECT = "relay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def relay_sources() -> list[type[Source]]:  # type: ignore[empty-body]
    """Return kinds of source: what `plugin = …` of a source may name."""


@hookspec
def relay_formats() -> list[Format]:  # type: ignore[empty-body]
    """Return ways to write an event down: what `format = …` of a destination may name."""
