"""`relay workers`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from relay.base.units import parse_duration
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.completion import complete
from relay.cli.endpoint import daemon_options, endpoint
from relay.cli.main import Group, OneOf
from relay.cli.options import checked, filter_options, json_option, page_options
from relay.cli.output import print_fields, print_items, print_json, print_page
from relay.cli.screen import Field
from relay.cli.selection import confirm, yes_option

COLUMNS = ("id", "source", "status", "last_heartbeat", "session_count", "version", "environment", "endpoint")
_SHAPE = (
    screen.text("id", "worker", least=24, long="middle"), screen.text("source", least=8, long="middle"),
    screen.word("status"), screen.moment("last_heartbeat", "last seen"),
    screen.number("session_count", "sessions", rank=1), screen.text("version", least=6, rank=2),
    screen.text("environment", least=6, rank=3), screen.text("endpoint", least=12, rank=4, long="middle"),
)  # fmt: skip
_SESSIONS = ("id", "status", "phone", "name")
_COMMANDS = ("id", "state", "created_at", "sent_at", "command")
_TABLES: Mapping[str, tuple[Sequence[str], Sequence[screen.Column]]] = {
    "sessions": (
        _SESSIONS,
        (
            screen.text("id", "session", least=16, long="middle"), screen.word("status"),
            screen.text("phone", least=8), screen.text("name", least=10),
        ),
    ),
    "commands": (
        _COMMANDS,
        (
            screen.moment("created_at", "created"), screen.short_id("id", "command"),
            screen.word("state"), screen.moment("sent_at", "sent"),
            screen.text("command", "fields", least=16, long="wrap"),
        ),
    ),
}  # fmt: skip


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
    print_page(daemon.get("workers", **query), COLUMNS, _SHAPE, as_json=as_json, quiet=quiet)


@workers.command()
@endpoint("GET workers/{source}/{worker}")
def show(answer: Any, **_: str) -> None:
    """Show a worker, its sessions and its commands.

    Example: relay workers show whatsapp worker-001
    """
    hidden = {"metrics", *_TABLES}
    fields = {name: value for name, value in answer.items() if name not in hidden}
    print_fields(fields, _fields(answer))
    for name, (columns, shape) in _TABLES.items():
        if answer[name]:
            click.echo()
            items = [{column: _text(each[column]) for column in columns} for each in answer[name]]
            print_items(columns, items, shape)


def _fields(worker: Mapping[str, Any]) -> list[Field]:
    limit = worker["max_sessions"]
    sessions = screen.cell(worker["session_count"]) + ("" if limit is None else f" of {limit}")
    gauges = (("CPU", "cpu"), ("Memory", "memory"), ("Messages", "message_count"))
    uptime = worker["uptime"]
    return [
        Field("Worker", worker["id"]),
        Field("Source", worker["source"]),
        Field("Description", worker["description"]),
        Field("Status", worker["status"], screen.colour_of("status", worker["status"])),
        Field("Last seen", screen.full_time(worker["last_heartbeat"])),
        Field("Registered", screen.full_time(worker["registered_at"])),
        Field("Endpoint", worker["endpoint"]),
        Field("Version", worker["version"]),
        Field("Environment", worker["environment"]),
        Field("Sessions", sessions),
        Field("Reported", screen.cell(worker["counts"])),
        Field("Restarts", screen.number_text(worker["restarts"])),
        Field("Uptime", "" if uptime is None else screen.rough(uptime)),
        *(Field(label, screen.cell(worker[name])) for label, name in gauges),
    ]


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
