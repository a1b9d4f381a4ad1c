"""The hooks that a plugin may implement. `relay.plugin_loading.loader` calls pluggy once, at the start."""

from collections.abc import Sequence

import pluggy

from relay.formats import Format
from relay.model import Job, Outcome, StoredEvent
from relay.source import Preset, Source

PROJECT = "relay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def relay_sources() -> list[type[Source]]:  # type: ignore[empty-body]
    """Return kinds of source, for `plugin = …` of a source."""


@hookspec
def relay_presets() -> list[Preset]:  # type: ignore[empty-body]
    """Return presets: named defaults for the settings of a kind of source."""


@hookspec
def relay_formats() -> list[Format]:  # type: ignore[empty-body]
    """Return formats of request bodies, for `format = …` of a destination."""


@hookspec
def relay_jobs() -> list[Job]:  # type: ignore[empty-body]
    """Return periodic work; it runs in the daemon's event loop while the daemon serves."""


@hookspec
def relay_events_stored(events: Sequence[StoredEvent]) -> None:
    """Receive stored events, in the order of acceptance."""


@hookspec
def relay_attempts_recorded(outcomes: Sequence[Outcome]) -> None:
    """Receive recorded attempts, with the new states of their deliveries."""
