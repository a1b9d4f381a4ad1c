"""`relay explain`."""

import click

from relay.cli.daemon import Daemon, daemon_options
from relay.cli.options import json_option
from relay.cli.output import print_json, print_table


@click.command()
@click.argument("event")
@json_option
@daemon_options
def explain(daemon: Daemon, event: str, *, as_json: bool) -> None:
    """Say of every destination whether an event goes there.

    Example: relay explain 01a201eb

    Where it does not, the condition that fails is named, and the value on which. Judged by today's
    configuration. EVENT is an id, shortened while unique.
    """
    answer = daemon.get("events", event, "explain")
    if as_json:
        print_json(answer)
        return
    rows = [(each["name"], line) for each in answer["destinations"] for line in each["lines"]]
    print_table(("destination", "why"), rows)
