"""What a plugin may offer. pluggy is asked once, at start-up, by `relay.loader`."""

import pluggy

from relay.formats import Format
from relay.model import Job
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


@hookspec
def relay_jobs() -> list[Job]:  # type: ignore[empty-body]
    """Return periodic work; it runs in the daemon's event loop while the daemon serves."""
