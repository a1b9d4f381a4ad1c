"""`relay status`."""

import sys
from collections.abc import Mapping
from typing import Any

import click

from relay.base.text import Colour, paint, wants_colour
from relay.base.units import render_duration
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.destinations import STATE as DESTINATION_STATE
from relay.cli.endpoint import daemon_options
from relay.cli.main import FAILED, CommandError
from relay.cli.options import json_option
from relay.cli.output import count, print_items, print_json, print_line
from relay.cli.screen import Field, utc_option
from relay.cli.sources import STATE as SOURCE_STATE

_DESTINATION = ("name", "held", "pending", "in_flight", "delivered", "dead")
_SOURCES = (
    screen.text("name", "source", least=24, long="middle"), SOURCE_STATE,
    screen.Column("last_event", "last event", screen.each(screen.ago), right=True),
)  # fmt: skip
_DESTINATIONS = (
    screen.text("name", "destination", least=24, wish=40, long="middle"), DESTINATION_STATE,
    screen.number("pending"), screen.number("dead"),
    screen.Column("last_success", "last success", screen.each(screen.ago), right=True, rank=1),
    screen.number("in_flight", "in flight", rank=2), screen.number("delivered", rank=3),
    screen.text("url_host", "host", least=12, rank=4, long="middle"),
)  # fmt: skip


@click.command()
@utc_option
@json_option
@daemon_options
@click.pass_context
def status(ctx: click.Context, daemon: Daemon, *, as_json: bool) -> None:
    """Show the state of the daemon on one screen.

    Example: relay status

    Problems are listed with the next command for each: at the top on a terminal, on stderr in a pipe. If the
    daemon is not ready, the output shows the reasons and the exit code is 1.
    """
    answer = _gathered(daemon)
    if as_json:
        print_json(answer)
    else:
        _print(answer)
    if not answer["ready"]:
        ctx.exit(FAILED)


def _gathered(daemon: Daemon) -> dict[str, Any]:
    answer = {**daemon.get("status"), "sources": daemon.get("sources")["items"]}
    try:
        answer["destinations"] = daemon.get("destinations")["items"]
    except CommandError:
        if answer["ready"]:
            raise
        answer["destinations"] = None  # the store could not be read since the start
    states: dict[str, int] = {}
    cursor = None
    while True:
        page = daemon.get("workers", limit=500, cursor=cursor)
        for worker in page["items"]:
            states[worker["status"]] = states.get(worker["status"], 0) + 1
        if (cursor := page["next_cursor"]) is None:
            return {**answer, "workers": states}


def _print(answer: dict[str, Any]) -> None:
    if sys.stdout.isatty():
        for line in _lines(answer):
            print_line(line)
        return
    print_line(_head(answer, ", "))
    paused = [source["name"] for source in answer["sources"] if source["paused"]]
    click.echo(count(len(answer["sources"]), "source") + (f", paused: {', '.join(paused)}" if paused else ""))
    click.echo(f"workers: {screen.cell(answer['workers']) or '0'}")
    click.echo(f"backlog: {_backlog(answer)}")
    print_items(_DESTINATION, answer["destinations"] or (), ())
    for problem in answer["problems"]:
        click.echo(f"{_what(problem)}\n  {problem['next']}", err=True)


def _head(answer: dict[str, Any], separator: str) -> str:
    ready = "ready" if answer["ready"] else f"not ready: {', '.join(answer['reasons'])}"
    if wants_colour(sys.stdout):
        ready = paint(ready, "green" if answer["ready"] else "red")
    seconds = answer["uptime_seconds"]
    up = f"up {screen.rough(seconds) if sys.stdout.isatty() else render_duration(seconds)}"
    return separator.join([f"hookferry {answer['version']}", up, ready])


def _backlog(answer: dict[str, Any]) -> str:
    if answer["destinations"] is None:
        return "unknown"
    return count(sum(each["pending"] for each in answer["destinations"]), "delivery")


def _lines(answer: dict[str, Any]) -> list[str]:
    """Return the lines for a terminal: problems with their next commands, figures, sources, destinations."""
    colour, width = wants_colour(sys.stdout), screen.terminal_width()
    states = answer["workers"]
    dead = sum(each["dead"] for each in answer["destinations"] or ())
    backlog = _backlog(answer) + (f"; {screen.number_text(dead)} dead" if dead else "")
    fields = [
        Field("Backlog", backlog, "red" if dead else None),
        Field("Disk", *_disk(answer["disk"])),
        Field("Backup", *_backup(answer["backups"])),
        Field("Workers", screen.cell(states), "red" if "OFFLINE" in states else None),
    ]
    lines = [_head(answer, "  ")]
    for problem in answer["problems"]:
        first, *rest = screen.wrap(screen.one_line(_what(problem)), width - 2)
        lines += ["", paint(f"! {first}", "red") if colour else f"! {first}"]
        lines += [f"  {line}" for line in [*rest, *screen.wrap(problem["next"], width - 2)]]
    lines += ["", *screen.field_lines(fields, width=width, colour=colour)]
    for shape, items in ((_SOURCES, answer["sources"]), (_DESTINATIONS, answer["destinations"])):
        if items:
            lines += ["", *screen.table(shape, items, width=width, colour=colour)]
    return lines


def _disk(disk: dict[str, Any] | None) -> tuple[str, Colour | None]:
    """Return the free space and the days until the disk is full."""
    if disk is None:
        return "", None
    free = f"{screen.size_text(disk['free'])} free in {disk['folder']}"
    if disk["full"]:
        return f"{free}: full, senders get 503", "red"
    days = disk["days_left"]
    return free + ("" if days is None else f", full in {count(round(days), 'day')}"), None


def _backup(backups: dict[str, Any] | None) -> tuple[str, Colour | None]:
    """Return the age of the latest backup, and whether backups fail."""
    if backups is None:
        return "off ([backup] every is not set)", None
    latest = "none yet"
    if backups["last_success"] is not None:
        latest = f"{screen.ago(backups['last_success'])}, {screen.size_text(backups['bytes'] or 0)}"
    text = f"{latest}; {backups['kept']} kept, one every {backups['interval']}"
    if backups["error"] is not None:
        return f"{text}; the last attempt failed: {backups['error']}", "red"
    return (f"{text}; overdue", "red") if backups["overdue"] else (text, None)


def _what(problem: Mapping[str, Any]) -> str:
    """Return a problem, and the other node of the cluster that has it."""
    return f"{problem['what']} (node {problem['node']})" if problem.get("node") else str(problem["what"])
