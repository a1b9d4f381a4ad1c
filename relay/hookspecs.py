"""What a plugin may offer. pluggy is asked once, at start-up, by `relay.loader`."""

import pluggy

from relay.source import Source

PROJECT = "relay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def relay_sources() -> list[type[Source]]:  # type: ignore[empty-body]
    """Return the kinds of source that this plugin offers."""
