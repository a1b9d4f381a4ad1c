"""The bundled presets: a TOML file each, read when a source has it."""

import tomllib
from functools import cache, partial
from pathlib import Path

import msgspec

from relay.source import Guide, Preset, Rules, Source

FOLDER = Path(__file__).parents[1] / "presets"


@cache  # so that a configuration that is loaded twice is equal
def bundled(source: type[Source]) -> tuple[Preset, ...]:
    """Return the presets of the generic source."""
    return tuple(
        Preset(name=file.stem, source=source, read=partial(read, file), file=str(file))
        for file in sorted(FOLDER.glob("*.toml"))
    )


def read(file: Path) -> Rules:
    """Return the content of a preset's file.

    Raises:
        OSError, ValueError: the file cannot be read, or is not a preset.
    """
    defaults = tomllib.loads(file.read_text("utf-8"))
    guide = msgspec.convert(defaults.pop("preset", None), Guide)
    return Rules(guide=guide, defaults={"path": guide.default_path, **defaults})
