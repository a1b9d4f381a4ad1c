"""`relay workers`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from relay.api.words import heard_bars
from relay.base.units import parse_duration, parse_time_span
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.completion import complete
from relay.cli.endpoint import daemon_options, endpoint
from relay.cli.main import Group, OneOf
from relay.cli.options import checked, filter_options, json_option, page_options
from relay.cli.output import count, print_fields, print_items, print_json, print_page, time_text
from relay.cli.screen import Field
from relay.cli.selection import confirm, yes_option

COLUMNS = (
    "id",
    "source",
    "status",
    "last_heartbeat",
    "session_count",
    "version",
    "environment",
    "endpoint",
    "maintenance_until",
)
_SHAPE = (
    screen.text("id", "worker", least=24, long="middle"), screen.text("source", least=8, long="middle"),
    screen.word("status"), screen.moment("last_heartbeat", "last seen"),
    screen.moment("maintenance_until", "until", rank=2),
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
        Field("Maintenance", _maintenance_text(worker)),
        Field("Last seen", screen.full_time(worker["last_heartbeat"])),
        Field("Last hour", " ".join(heard_bars(worker["heard_minutes"]))),
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


def _maintenance_text(worker: Mapping[str, Any]) -> str:
    """Return who started a worker's maintenance and when it ends."""
    if not worker["maintenance"]:
        return ""
    who = "planned in config.toml" if worker["maintenance_by"] == "config" else "by an operator"
    until = worker["maintenance_until"]
    return (
        f"{who}, until {screen.full_time(until)}"
        if until
        else f"{who}, until `relay workers maintenance … off`"
    )


_SWITCH = ("on", "off")


@workers.command()
@click.argument("source", required=False, shell_complete=complete("source"))
@click.argument("worker", required=False, shell_complete=complete("worker"))
@click.argument("state", metavar="[on|off]", required=False, type=OneOf(_SWITCH))
@click.option(
    "--pattern", help='All workers whose ids match, such as "batch-*", also those that register later.'
)
@click.option(
    "--for", "for_", metavar="DURATION", callback=checked(parse_time_span),
    help='End the maintenance after this time, such as "2h".  [default: until `off`]',
)  # fmt: skip
@json_option
@daemon_options
def maintenance(
    daemon: Daemon,
    source: str | None,
    worker: str | None,
    state: str | None,
    *,
    pattern: str | None,
    for_: str | None,
    as_json: bool,
) -> None:
    """Start or end maintenance of workers, during which they are never reported offline.

    Example: relay workers maintenance --pattern "batch-*" --for 2h

    Select one worker by SOURCE and WORKER, or all whose ids match --pattern, optionally of one SOURCE only.
    With --pattern or --for, `on` may be left out. Maintenance survives restarts of workers and of the daemon.
    Planned windows are in config.toml: `maintenance` of `[workers]`.
    """
    words = [word for word in (source, worker, state) if word is not None]
    given = words.pop() if words and words[-1] in _SWITCH else None
    if len(words) != 2 and pattern is None:  # noqa: PLR2004 - source and worker
        raise click.UsageError("name a SOURCE and a WORKER, or --pattern")
    if len(words) > 1 and pattern is not None:
        raise click.UsageError("--pattern names workers of one SOURCE or of all; leave out WORKER")
    if given is None and pattern is None and for_ is None:
        raise click.UsageError("write on or off, or a duration with --for")
    if given == "off" and for_ is not None:
        raise click.UsageError("--for needs on: it sets the end of the maintenance")
    body = {"on": given != "off"} | ({} if for_ is None else {"for": for_})
    if pattern is None:
        answer = daemon.post("workers", *words, "maintenance", body=body)
    else:
        of = {"source": words[0]} if words else {}
        answer = daemon.post("workers", "maintenance", body={**body, **of, "pattern": pattern})
    if as_json:
        print_json(answer)
        return
    until = f" until {time_text(answer['maintenance_until'])}" if answer["maintenance_until"] else ""
    if pattern is None:
        click.echo(f"{words[1]}: {answer['status']}{until}")
    else:
        state_ = "in maintenance" if body["on"] else "out of maintenance"
        click.echo(f"{count(answer['workers'], 'worker')} {state_}{until}")


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
