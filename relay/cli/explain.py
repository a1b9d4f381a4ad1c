"""`relay explain`."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relay.api.words import held_text
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.completion import complete
from relay.cli.endpoint import daemon_options
from relay.cli.main import FAILED, NOTHING, CommandError
from relay.cli.options import json_option, read_data
from relay.cli.output import count, print_items, print_json, print_note
from relay.config.paths import find_config
from relay.config.schema import SourceConfig
from relay.errors import MethodNotAllowed, NotFound, PluginFailed, Refusal

if TYPE_CHECKING:
    from relay.model import StoredEvent
    from relay.source import Incoming

_SHAPE = (
    screen.text("name", "destination", least=16, long="middle"),
    screen.text("why", least=30, wish=50, long="wrap"),
)


@click.command()
@click.argument("event", required=False, shell_complete=complete("event"))
@click.option(
    "--source", shell_complete=complete("source"),
    help="Explain a request to this source instead of a stored event; no daemon needed.",
)  # fmt: skip
@click.option(
    "--data",
    help="With --source: read the body from @FILE, or from standard input with -.  [default: a sample]",
)
@click.option(
    "--type", "type_", help="With --source: base the request on this sample of `relay send SOURCE --list`."
)
@click.option("--path", help="With --source: path of the request, for a source with several paths.")
@click.option("--header", "headers", multiple=True, help='With --source: add a header, "NAME: VALUE".')
@json_option
@daemon_options
@click.pass_context
def explain(
    ctx: click.Context,
    daemon: Daemon,
    event: str | None,
    *,
    source: str | None,
    data: str | None,
    type_: str | None,
    path: str | None,
    headers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show which destinations an event goes to, and why.

    Example: relay explain --source adorn --data @body.json

    For each destination that does not get the event, the output shows the condition that failed and the
    event's value. For each destination that gets it, the output shows whether deliveries wait now, the
    effects of grouping, order and expiry, and which responses are retried. EVENT is the id of a stored event
    (any unique prefix works); the daemon evaluates its running configuration. With --source, this command
    evaluates config.toml and the source's plugin; it checks no token, sends nothing and stores nothing.
    """
    if (event is None) == (source is None):
        raise click.UsageError("give either the id of a stored EVENT or --source")
    if source is not None:
        body = None if data is None else read_data(data)
        answer = _explained(
            ctx.params["config"],
            source,
            body=body,
            type_=type_,
            path=path,
            headers=dict(map(_header, headers)),
        )
    elif data is not None or type_ is not None or path is not None or headers:
        raise click.UsageError("--data, --type, --path and --header need --source")
    else:
        answer = daemon.get("events", str(event), "explain")
    if as_json:
        print_json(answer)
        return
    print_items(("name", "why"), list(_lines(answer["destinations"])), _SHAPE)
    if not sys.stdout.isatty():  # on a terminal, the table contains them
        for each in answer["destinations"]:
            for line in _notes(each):
                click.echo(f"{each['name']}: {line}", err=True)
    if more := answer.get("more"):
        print_note(f"the request has {count(more, 'more event')}; only the first one is explained")


def _lines(destinations: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table; on a terminal, only the first row of a destination has its name."""
    is_terminal = sys.stdout.isatty()
    for each in destinations:
        lines = [*each["lines"], *(_notes(each) if is_terminal else [])]
        for number, line in enumerate(lines):
            yield {"name": "" if is_terminal and number else each["name"], "why": line}


def _notes(destination: Mapping[str, Any]) -> Iterator[str]:
    """Yield how a destination that gets the event handles its delivery."""
    if (held := destination["held"]) is not None:
        yield f"held now ({held_text(held)}); sent when the hold ends"
    yield from destination["options"]
    if destination["retries"] is not None:
        yield destination["retries"]


def _explained(
    config: Path | None,
    name: str,
    *,
    body: bytes | None,
    type_: str | None,
    path: str | None,
    headers: dict[str, str],
) -> dict[str, Any]:
    """Return the explanation of a request that was not sent, in the format of the API.

    `id` is None, and `more` is the number of further events, if the request has any.
    """
    # Imported here, because a stored event needs neither plugins nor routes and must be explained fast.
    from relay.cli.config import load_without_secrets, source_named  # noqa: PLC0415 - see above
    from relay.routing.router import Router, explained  # noqa: PLC0415 - see above

    setup = load_without_secrets(find_config(config), ())[0].config
    source = source_named(name, setup.sources)
    event, more = _event(source, _request(source, body=body, type_=type_, path=path, headers=headers))
    return {
        "id": None,
        "type": event.type,
        **({"more": more} if more else {}),
        "destinations": explained(Router.of(setup.destinations), event, setup.destinations),
    }


def _request(
    source: SourceConfig, *, body: bytes | None, type_: str | None, path: str | None, headers: dict[str, str]
) -> "Incoming":
    """Return the request that the options describe; its path is below the source's prefix."""
    import msgspec  # noqa: PLC0415 - see `_explained`

    from relay.cli.send import choose, samples_of  # noqa: PLC0415 - see `_explained`
    from relay.demo.samples import fits  # noqa: PLC0415 - see `_explained`
    from relay.source import Incoming  # noqa: PLC0415 - see `_explained`

    samples = samples_of(source)
    if type_ is not None or (samples and path is None):
        sample = choose(samples, source.name, type_)
    else:
        route = _path(source, path)[0]
        methods = sorted(method for method, other, _ in source.settings.routes() if fits(other, route))
        method = "POST" if "POST" in methods or not methods else methods[0]
        sample = Incoming.of(method, route, {"Content-Type": "application/json"})
    own, query = (sample.path, sample.query) if path is None else _path(source, path)
    return msgspec.structs.replace(
        sample.with_headers(headers),
        path=own,
        query=query,
        target=f"{source.prefix}{own}{query and f'?{query}'}",
        body=sample.body if body is None else body,
        received_at=time.time_ns() // 1000,
    )


def _path(source: SourceConfig, given: str | None) -> tuple[str, str]:
    """Return the given path, or the source's only path, below the source's prefix; and the query."""
    if given is not None:
        path, _, query = given.partition("?")
        return path.removeprefix(source.prefix), query
    paths: list[str] = sorted({path for _, path, _ in source.settings.routes()})
    if len(paths) != 1 or "{" in paths[0]:
        routes = ", ".join(source.prefix + path for path in paths)
        raise click.UsageError(f"source {source.name} has several paths; choose one with --path: {routes}")
    return paths[0], ""


def _event(source: SourceConfig, incoming: "Incoming") -> "tuple[StoredEvent, int]":
    """Return the first event that the source's handler creates from a request, and the number of others."""
    from relay.diagnosis.source_request import handle, match_of  # noqa: PLC0415 - see `_explained`
    from relay.ingest.event import make_event  # noqa: PLC0415 - see `_explained`
    from relay.source import Reply  # noqa: PLC0415 - see `_explained`

    line = f"{incoming.method} {source.prefix}{incoming.path}"
    try:
        match = match_of(source, source.prefix + incoming.path, incoming.method)
        accepted = handle(match, incoming)
        if not isinstance(accepted, Reply):
            events = accepted.events or ([] if accepted.event is None else [accepted.event])
            if events:
                is_item, now = accepted.event is None, incoming.received_at
                stored = make_event(match.mount, events[0], incoming, now, is_item=is_item)
                return stored, len(events) - 1
    except Refusal as refusal:
        raise CommandError(
            f"{line} would be refused with {refusal.status}: {_reason(refusal)}",
            hint=_advice(source, refusal),
            code=FAILED,
        ) from refusal
    hint = "the relay creates events of workers itself; explain a stored one: relay explain EVENT"
    raise CommandError(f"{line} creates no event", hint=hint, code=NOTHING)


def _reason(refusal: Refusal) -> str:
    cause = refusal.__cause__
    if isinstance(refusal, PluginFailed) and cause is not None:
        return f"the plugin failed: {type(cause).__name__}: {cause}"
    return refusal.detail


def _advice(source: SourceConfig, refusal: Refusal) -> str:
    if isinstance(refusal, NotFound | MethodNotAllowed):
        routes = sorted(f"{method} {source.prefix}{path}" for method, path, _ in source.settings.routes())
        return f"the source's routes: {', '.join(routes)}"
    return f"`relay send {source.name} --list` lists valid samples"


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter('expected "NAME: VALUE"', param_hint="--header")
    return name.strip(), value.strip()
