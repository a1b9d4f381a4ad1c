"""`relay workers`."""

import json
from typing import Any

import click

from relay.base.units import parse_duration
from relay.cli.api_client import Daemon
from relay.cli.completion import complete
from relay.cli.endpoint import daemon_options, endpoint
from relay.cli.main import Group, OneOf
from relay.cli.options import checked, filter_options, json_option, page_options
from relay.cli.output import print_fields, print_json, print_page, print_table
from relay.cli.selection import confirm, yes_option

COLUMNS = ("id", "source", "status", "last_heartbeat", "session_count", "version", "environment", "endpoint")
_TABLES = {
    "sessions": ("id", "status", "phone", "name"),
    "commands": ("id", "state", "created_at", "sent_at", "command"),
}


@click.group(cls=Group)
def workers() -> None:
    """Inspect workers and send them commands."""


@workers.command("list")
@filter_options("workers")
@page_options
@daemon_options
def list_(daemon: Daemon, *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List workers.

    Example: relay workers list --status OFFLINE
    """
    print_page(daemon.get("workers", **query), COLUMNS, as_json=as_json, quiet=quiet)


@workers.command()
@endpoint("GET workers/{source}/{worker}")
def show(answer: Any, **_: str) -> None:
    """Show a worker, its sessions and its commands.

    Example: relay workers show whatsapp worker-001
    """
    hidden = {"metrics", *_TABLES}
    print_fields({name: value for name, value in answer.items() if name not in hidden})
    for name, columns in _TABLES.items():
        if answer[name]:
            click.echo()
            print_table(columns, [[_text(each[column]) for column in columns] for each in answer[name]])


@workers.command()
@click.argument("source", shell_complete=complete("source"))
@click.argument("worker", shell_complete=complete("worker"))
@yes_option
@json_option
@daemon_options
def forget(daemon: Daemon, source: str, worker: str, *, yes: bool, as_json: bool) -> None:
    """Remove a worker from the registry; its next heartbeat registers it again.

    Example: relay workers forget whatsapp worker-001
    """
    daemon.get("workers", source, worker)  # fails before the question if the worker does not exist
    confirm(f"Forget 1 worker, {worker}?", yes=yes)
    answer = daemon.delete("workers", source, worker)
    print_json(answer) if as_json else click.echo(f"{worker}: forgotten")


@workers.command()
@endpoint("POST workers/{source}/{worker}/maintenance", body=lambda state, **_: {"on": state == "on"})
@click.argument("state", metavar="STATE", type=OneOf(("on", "off")))
def maintenance(answer: Any, *, worker: str, **_: str) -> None:
    """Start or end a worker's maintenance. A worker in maintenance is never reported offline.

    Example: relay workers maintenance whatsapp worker-001 on

    STATE is on or off.
    """
    click.echo(f"{worker}: {answer['status']}")


def _command(type_: str, more: dict[str, Any], ttl: str, **_: str) -> dict[str, Any]:
    return {"command": {**more, "type": type_}, "ttl": ttl}


def _object(_context: click.Context, _option: click.Parameter, text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"invalid JSON: {error}", param_hint="JSON") from None
    if not isinstance(value, dict):
        raise click.BadParameter('expected an object such as {"reason": "update"}', param_hint="JSON")
    return value


@workers.command()
@endpoint("POST workers/{source}/{worker}/commands", body=_command)
@click.argument("type_", metavar="TYPE")
@click.argument("more", metavar="[JSON]", required=False, callback=_object)
@click.option(
    "--ttl",
    default="10m",
    show_default=True,
    callback=checked(parse_duration),
    help="Discard the command if no heartbeat arrives within this time.",
)
def command(answer: Any, **_: Any) -> None:
    """Send a worker a command, in the response to its next heartbeat.

    Example: relay workers command whatsapp worker-001 restart '{"reason": "update"}'

    JSON is an object with more fields of the command.
    """
    click.echo(f"{answer['id']}: {answer['state']}")


def _text(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, dict) else str(value)
