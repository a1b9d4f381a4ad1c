"""`relay status`."""

import sys
from typing import Any

import click

from relay.base.text import paint, wants_colour
from relay.base.units import render_duration
from relay.cli.api_client import Daemon
from relay.cli.endpoint import daemon_options
from relay.cli.main import FAILED
from relay.cli.options import json_option
from relay.cli.output import count, print_json, print_line, print_table
from relay.cli.screen import cell

_DESTINATION = ("name", "held", "pending", "in_flight", "delivered", "dead")


@click.command()
@json_option
@daemon_options
@click.pass_context
def status(ctx: click.Context, daemon: Daemon, *, as_json: bool) -> None:
    """Show the state of the daemon on one screen.

    Example: relay status

    While the daemon is not ready, the output has the reasons and the exit code is 1.
    """
    answer = _gathered(daemon)
    if as_json:
        print_json(answer)
    else:
        _print(answer)
    if not answer["ready"]:
        ctx.exit(FAILED)


def _gathered(daemon: Daemon) -> dict[str, Any]:
    answer = {
        **daemon.get("status"),
        "sources": daemon.get("sources")["items"],
        "destinations": daemon.get("destinations")["items"],
    }
    states: dict[str, int] = {}
    cursor = None
    while True:
        page = daemon.get("workers", limit=500, cursor=cursor)
        for worker in page["items"]:
            states[worker["status"]] = states.get(worker["status"], 0) + 1
        if (cursor := page["next_cursor"]) is None:
            return {**answer, "workers": states}


def _print(answer: dict[str, Any]) -> None:
    ready = "ready" if answer["ready"] else f"not ready: {', '.join(answer['reasons'])}"
    if wants_colour(sys.stdout):
        ready = paint(ready, "green" if answer["ready"] else "red")
    print_line(f"hookferry {answer['version']}, up {render_duration(answer['uptime_seconds'])}, {ready}")
    paused = [source["name"] for source in answer["sources"] if source["paused"]]
    click.echo(count(len(answer["sources"]), "source") + (f", paused: {', '.join(paused)}" if paused else ""))
    click.echo(f"workers: {cell(answer['workers']) or '0'}")
    backlog = sum(each["pending"] for each in answer["destinations"])
    click.echo(f"backlog: {count(backlog, 'delivery')}")
    rows = [[cell(each[name]) for name in _DESTINATION] for each in answer["destinations"]]
    if rows:
        print_table([name.replace("_", " ") for name in _DESTINATION], rows)
