"""`relay workers`."""

import json
from typing import Any

import click

from relay.base.units import parse_duration
from relay.cli.api_client import Daemon, daemon_options
from relay.cli.main import Group
from relay.cli.options import OneOf, filter_options, json_option, page_options, understood
from relay.cli.output import print_fields, print_json, print_page, print_table
from relay.cli.selection import confirm, yes_option

COLUMNS = ("id", "source", "status", "last_heartbeat", "session_count", "version", "environment", "endpoint")
_COMMANDS = ("id", "state", "created_at", "sent_at", "command")


@click.group(cls=Group)
def workers() -> None:
    """Who sends heartbeats, and telling them something."""


@workers.command("list")
@filter_options("source", "status", "version", "environment")
@page_options
@daemon_options
def list_(daemon: Daemon, *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List workers.

    Example: relay workers list --status OFFLINE
    """
    print_page(daemon.get("workers", **query), COLUMNS, as_json=as_json, quiet=quiet)


@workers.command()
@click.argument("source")
@click.argument("id_", metavar="WORKER")
@json_option
@daemon_options
def show(daemon: Daemon, source: str, id_: str, *, as_json: bool) -> None:
    """Show a worker, its sessions and what it was told.

    Example: relay workers show whatsapp worker-001
    """
    answer = daemon.get("workers", source, id_)
    if as_json:
        print_json(answer)
        return
    hidden = {"metrics", "sessions", "commands"}
    print_fields({name: value for name, value in answer.items() if name not in hidden})
    for name, columns in (("sessions", ("id", "status", "phone", "name")), ("commands", _COMMANDS)):
        if answer[name]:
            click.echo()
            print_table(columns, [[_text(each[column]) for column in columns] for each in answer[name]])


@workers.command()
@click.argument("source")
@click.argument("id_", metavar="WORKER")
@yes_option
@json_option
@daemon_options
def forget(daemon: Daemon, source: str, id_: str, *, yes: bool, as_json: bool) -> None:
    """Remove a worker from the registry; its next heartbeat registers it anew.

    Example: relay workers forget whatsapp worker-001
    """
    daemon.get("workers", source, id_)  # what is not there need not be asked about
    confirm(f"Forget 1 worker, {id_}?", yes=yes)
    answer = daemon.delete("workers", source, id_)
    print_json(answer) if as_json else click.echo(f"{id_}: forgotten")


@workers.command()
@click.argument("source")
@click.argument("id_", metavar="WORKER")
@click.argument("state", type=OneOf(("on", "off")))
@json_option
@daemon_options
def maintenance(daemon: Daemon, source: str, id_: str, state: str, *, as_json: bool) -> None:
    """Begin or end a worker's maintenance: it is not judged by its silence.

    Example: relay workers maintenance whatsapp worker-001 on
    """
    answer = daemon.post("workers", source, id_, "maintenance", body={"on": state == "on"})
    print_json(answer) if as_json else click.echo(f"{id_}: {answer['status']}")


@workers.command()
@click.argument("source")
@click.argument("id_", metavar="WORKER")
@click.argument("type_", metavar="TYPE")
@click.argument("more", metavar="[JSON]", required=False)
@click.option(
    "--ttl",
    default="10m",
    show_default=True,
    callback=understood(parse_duration),
    help="How long it may wait for a heartbeat.",
)
@json_option
@daemon_options
def command(
    daemon: Daemon, source: str, id_: str, type_: str, more: str | None, *, ttl: str, as_json: bool
) -> None:
    """Tell a worker something, in the reply to its next heartbeat.

    Example: relay workers command whatsapp worker-001 restart '{"reason": "update"}'
    """
    answer = daemon.post(
        "workers", source, id_, "commands", body={"command": {**_object(more), "type": type_}, "ttl": ttl}
    )
    print_json(answer) if as_json else click.echo(f"{answer['id']}: {answer['state']}")


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"no JSON: {error}", param_hint="JSON") from None
    if not isinstance(value, dict):
        raise click.BadParameter('expected an object such as {"reason": "update"}', param_hint="JSON")
    return value


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, dict) else str(value)
