"""What a plugin may offer. pluggy is asked once, at start-up, by `relay.plugin_loading.loader`."""

from collections.abc import Sequence

import pluggy

from relay.formats import Format
from relay.model import Job, Outcome, StoredEvent
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


@hookspec
def relay_events_stored(events: Sequence[StoredEvent]) -> None:
    """Take note of events that have been stored, in the order of their acceptance."""


@hookspec
def relay_attempts_recorded(outcomes: Sequence[Outcome]) -> None:
    """Take note of attempts that have been recorded, and of what they mean for their deliveries."""
