"""What a body would become and where it would go, by config.toml alone; for `relay explain --source`."""

import time
from pathlib import Path
from typing import Any

import click
from multidict import CIMultiDict

from relay.cli.config import load_without_secrets
from relay.cli.exit_codes import FAILED, NOTHING, CommandError
from relay.cli.samples import choose, fits, read_data, samples_of, source_named
from relay.config.paths import find_config
from relay.config.schema import SourceConfig
from relay.diagnosis.handling import handle, match_of
from relay.errors import MethodNotAllowed, NotFound, PluginFailed, Refusal
from relay.incoming import Incoming
from relay.ingest.event import make_event
from relay.model import StoredEvent
from relay.routing.router import Router, explained
from relay.source import Reply


class Wish:
    """How a body would be posted, as the options say it."""

    def __init__(
        self, data: str | None, type_: str | None, path: str | None, headers: tuple[str, ...]
    ) -> None:
        self.body = None if data is None else read_data(data)
        self.type = type_
        self.path = path
        self.headers = dict(map(_header, headers))


def judge(config: Path | None, name: str, wish: Wish) -> dict[str, Any]:
    """Answer as the API does of a stored event; `id` is null."""
    setup = load_without_secrets(find_config(config), ())[0].config
    source = source_named(name, setup.sources)
    event = _event(source, wish)
    return {
        "id": None,
        "type": event.type,
        "destinations": explained(Router.of(setup.destinations), event, setup.destinations),
    }


def _event(source: SourceConfig, wish: Wish) -> StoredEvent:
    """Have the source's handler read the body."""
    incoming = _posted(source, wish)
    wire = source.prefix + incoming.path
    try:
        accepted = handle(match_of(source, wire, incoming.method), incoming)
        if not isinstance(accepted, Reply) and accepted.event is not None:
            return make_event(source.name, accepted.event, incoming, time.time_ns() // 1000)
    except Refusal as refusal:
        raise CommandError(
            f"{incoming.method} {wire} would be refused with {refusal.status}: {_why(refusal)}",
            hint=_advice(source, refusal),
            code=FAILED,
        ) from refusal
    hint = "what workers do becomes events of its own; judge a stored one: relay explain EVENT"
    raise CommandError(f"{incoming.method} {wire} makes no event by itself", hint=hint, code=NOTHING)


def _posted(source: SourceConfig, wish: Wish) -> Incoming:
    """Return the request that the options describe, its path below the source's prefix."""
    samples = samples_of(source)
    if wish.type is not None or (samples and wish.path is None):
        sample = choose(samples, source.name, wish.type)
    else:
        sample = _bare(source, _path(source, wish.path))
    path = sample.path if wish.path is None else _path(source, wish.path)
    headers = CIMultiDict(sample.headers)
    headers.update(wish.headers)
    return Incoming.of(sample.method, path, headers, sample.body if wish.body is None else wish.body)


def _path(source: SourceConfig, given: str | None) -> str:
    """Return a path below the source's prefix: the one that is given, or else the only one there is."""
    if given is not None:
        return given.partition("?")[0].removeprefix(source.prefix)
    paths: list[str] = sorted({path for _, path, _ in source.settings.routes()})
    if len(paths) != 1 or "{" in paths[0]:
        routes = ", ".join(source.prefix + path for path in paths)
        raise click.UsageError(f"say which way it would be posted: --path; there are {routes}")
    return paths[0]


def _bare(source: SourceConfig, path: str) -> Incoming:
    """Return an empty request to a path, by the method that it has there."""
    methods = sorted(method for method, route, _ in source.settings.routes() if fits(route, path))
    method = "POST" if "POST" in methods or not methods else methods[0]
    return Incoming.of(method, path, {"Content-Type": "application/json"})


def _why(refusal: Refusal) -> str:
    cause = refusal.__cause__
    if isinstance(refusal, PluginFailed) and cause is not None:
        return f"the plugin failed: {type(cause).__name__}: {cause}"
    return refusal.detail


def _advice(source: SourceConfig, refusal: Refusal) -> str:
    if isinstance(refusal, NotFound | MethodNotAllowed):
        routes = sorted(f"{method} {source.prefix}{path}" for method, path, _ in source.settings.routes())
        return f"there are {', '.join(routes)}"
    return f"`relay send {source.name} --list` names samples of what it takes"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter('expected "NAME: VALUE"', param_hint="--header")
    return name.strip(), value.strip()
