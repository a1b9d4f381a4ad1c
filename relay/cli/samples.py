"""A source of the configuration and the requests that its plugin documents, as commands name them."""

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from relay.cli.exit_codes import NOTHING, CommandError
from relay.config.problems import guess
from relay.config.schema import SourceConfig
from relay.incoming import Incoming
from relay.source import Accepted


def source_named(name: str, sources: Mapping[str, SourceConfig]) -> SourceConfig:
    """Return a source of the configuration.

    Raises:
        CommandError: there is no such one.
    """
    if name not in sources:
        hint = f"there are {', '.join(sources) or 'none'}"
        raise CommandError(f'no source "{name}"{guess(name, sources)}', hint=hint, code=NOTHING)
    return sources[name]


def samples_of(source: SourceConfig) -> dict[str, Incoming]:
    """Return the documented requests of a source by the type of their event, paths below its prefix."""
    return {_type_of(source, sample): sample for sample in source.settings.samples()}


def choose(samples: Mapping[str, Incoming], source: str, type_: str | None) -> Incoming:
    """Return the sample of a type, or without one the first.

    Raises:
        CommandError: there is none.
    """
    if not samples:
        raise CommandError(f'the plugin of source "{source}" has no samples', code=NOTHING)
    if type_ is None:
        return next(iter(samples.values()))
    if type_ not in samples:
        hint = f"there are {', '.join(samples)}"
        raise CommandError(f'no sample "{type_}"{guess(type_, samples)}', hint=hint, code=NOTHING)
    return samples[type_]


def fits(template: str, path: str) -> bool:
    """Say whether a path is one of a route's."""
    here, there = template.split("/"), path.split("/")
    return len(here) == len(there) and all(
        one.startswith("{") or one == other for one, other in zip(here, there, strict=True)
    )


def read_data(data: str, option: str = "--data") -> bytes:
    """Read what an option names: `@FILE`, or `@-` or `-` for the standard input.

    Raises:
        BadParameter: it is written otherwise, or the file cannot be read.
    """
    name = data.removeprefix("@")
    if name == "-":
        return sys.stdin.buffer.read()
    if name == data:
        file = "body.json" if set(data) & set("{[\n") else data  # it is the body itself that was typed
        raise click.BadParameter(f"expected @FILE or -, as in {option} @{file}", param_hint=option)
    return read_file(Path(name), option)


def read_file(file: Path, option: str) -> bytes:
    """Read a file that an option names.

    Raises:
        BadParameter: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise click.BadParameter(f"{file} cannot be read: {error.strerror}", param_hint=option) from None


def _type_of(source: SourceConfig, sample: Incoming) -> str:
    """Return the type of a sample's event; of one that has none, what it does to a worker."""
    for method, template, handler in source.settings.routes():
        if method == sample.method and fits(template, sample.path):
            accepted = getattr(source.settings, handler)(sample)
            if isinstance(accepted, Accepted):
                if accepted.event is not None:
                    return accepted.event.type
                if accepted.worker is not None:
                    return accepted.worker.__class__.__name__.lower()
    return f"{sample.method} {sample.path}"
