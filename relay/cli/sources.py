"""`relay sources`."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from relay.cli import screen
from relay.cli.endpoint import endpoint
from relay.cli.main import Group
from relay.cli.options import quiet_option
from relay.cli.output import print_fields, print_items, print_note, print_page
from relay.cli.screen import Field
from relay.config.problems import dotted

COLUMNS = ("name", "plugin", "prefix", "paused")


def _state_text(source: Mapping[str, Any]) -> str:
    return "paused" if source["paused"] else "silent" if source["silent"] else "accepting"


STATE = screen.Column("held", "state", screen.each(str), of=_state_text)
"""The column that shows whether events are accepted, and whether they arrive as often as usual."""

_SHAPE = (
    screen.text("name", least=16, long="middle"), STATE, screen.text("plugin", "kind", least=10),
    screen.text("prefix", "path", least=12, long="middle"),
    screen.Column("last_event", "last event", screen.each(screen.ago), right=True, rank=1),
)  # fmt: skip
_TOKEN = ("name", "uses", "last_used")
_TOKEN_SHAPE = (
    screen.text("name", "token", least=16, long="middle"), screen.number("uses"),
    screen.moment("last_used", "last used"),
)  # fmt: skip


@click.group(
    cls=Group,
    lazy={"add": ("relay.cli.add_source:add", "Add a source to config.toml.")},
)
def sources() -> None:
    """List, add, inspect, pause and resume sources."""


@sources.command("list")
@quiet_option
@endpoint("GET sources")
def list_(answer: Any, *, quiet: bool) -> None:
    """List sources.

    Example: relay sources list
    """
    print_page(answer, COLUMNS, _SHAPE, quiet=quiet, key="name")


@sources.command()
@endpoint("GET sources/{name}")
def show(answer: Any, *, name: str) -> None:
    """Show a source, its latest event, its settings, and the use of its tokens.

    Example: relay sources show adorn

    A token or secret that no sender has used for a long time can be removed from config.toml.
    """
    _ = name
    latest, settings, tokens, missing = map(answer.pop, ("latest", "settings", "tokens", "missing"))
    event = {f"latest_{field}": latest[field] for field in ("id", "type", "received_at")} if latest else {}
    flattened = dict(_flattened(settings))
    shown = [
        Field("Source", answer["name"]),
        Field("Kind", answer["plugin"]),
        Field("Path", answer["prefix"]),
        Field("State", _state_text(answer), screen.colour_of("held", _state_text(answer))),
        Field(
            "Latest event", f"{screen.full_time(latest['received_at'])}, {latest['type']}" if latest else ""
        ),
        Field("", latest["id"] if latest else ""),
        *(
            Field(key, screen.cell(value))
            for key, value in flattened.items()
            if key not in ("plugin", "prefix")
        ),
    ]
    print_fields({**answer, **event, **flattened}, shown)
    if tokens:
        click.echo()
        print_items(_TOKEN, tokens, _TOKEN_SHAPE)
        since = min(each["since"] for each in tokens)
        since = screen.full_time(since) if sys.stdout.isatty() else since
        print_note(f"uses are counted since {since}, the start of the daemon or a later reload")
    if missing:
        print_note(f"no answer from {', '.join(missing)}: the counts do not include their uses")


def _flattened(table: Mapping[str, Any], *above: str) -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a table and of the tables in it, with its value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, *above, key)
        else:
            yield dotted((*above, key)), value


@sources.command()
@endpoint("POST sources/{name}/pause")
def pause(answer: Any, *, name: str) -> None:
    """Pause a source: answer its senders with 503 and Retry-After.

    Example: relay sources pause adorn
    """
    _print_state(answer, name)


@sources.command()
@endpoint("POST sources/{name}/resume")
def resume(answer: Any, *, name: str) -> None:
    """Resume a paused source: accept its events again.

    Example: relay sources resume adorn
    """
    _print_state(answer, name)


def _print_state(answer: Any, name: str) -> None:
    click.echo(f"{name}: {'paused' if answer['paused'] else 'accepting events'}")
