"""Any sender, described in config.toml alone: its paths, its credentials, and where an event's parts are.

docs/sources.md#generic has the reference of the keys.
"""

from relay.hookspecs import hookimpl
from relay.source import Preset, Source

from .presets import bundled
from .source import Generic


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Return the generic source."""
    return [Generic]


@hookimpl
def relay_presets() -> list[Preset]:
    """Offer the presets in `plugins/presets`."""
    return list(bundled(Generic))
