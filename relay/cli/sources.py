"""`relay sources`."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.main import Group
from relay.cli.options import json_option, quiet_option
from relay.cli.output import print_fields, print_json, print_page
from relay.config.problems import dotted

COLUMNS = ("name", "plugin", "prefix", "paused")


@click.group(cls=Group)
def sources() -> None:
    """Who sends, and telling them to keep it for a while."""


@sources.command("list")
@quiet_option
@json_option
@daemon_options
def list_(daemon: Daemon, *, as_json: bool, quiet: bool) -> None:
    """List sources.

    Example: relay sources list
    """
    print_page(daemon.get("sources"), COLUMNS, as_json=as_json, quiet=quiet, key="name")


@sources.command()
@click.argument("name")
@json_option
@daemon_options
def show(daemon: Daemon, name: str, *, as_json: bool) -> None:
    """Show a source, its latest event and its settings.

    Example: relay sources show adorn
    """
    answer = daemon.get("sources", name)
    if as_json:
        print_json(answer)
        return
    latest, settings = answer.pop("latest"), answer.pop("settings")
    told = {f"latest_{field}": latest[field] for field in ("id", "type", "received_at")} if latest else {}
    print_fields({**answer, **told, **dict(_keys(settings))})


def _keys(table: Mapping[str, Any], *above: str) -> Iterator[tuple[str, Any]]:
    """Yield each key with its value, those of inner tables by their whole path, as problems name them."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, *above, key)
        else:
            yield dotted((*above, key)), value


def _steering(verb: str, summary: str) -> None:
    @sources.command(verb, help=f"{summary}\n\nExample: relay sources {verb} adorn")
    @click.argument("name")
    @json_option
    @daemon_options
    def steer(daemon: Daemon, name: str, *, as_json: bool) -> None:
        answer = daemon.post("sources", name, verb)
        if as_json:
            print_json(answer)
        else:
            click.echo(f"{name}: {'paused' if answer['paused'] else 'open'}")


_steering("pause", "Answer a source's senders with 503 and Retry-After, so that they keep their events.")
_steering("resume", "Take a paused source's events in again.")
