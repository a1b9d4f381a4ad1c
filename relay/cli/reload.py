"""`relay reload`."""

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.options import json_option
from relay.cli.output import print_json


@click.command()
@json_option
@daemon_options
def reload(daemon: Daemon, *, as_json: bool) -> None:
    """Have the running relay go by its changed config.toml.

    Example: relay reload && relay destinations list

    All of it, or nothing: a file with problems changes nothing, and neither does a change that only a
    restart can take in. Then the exit code is 1.
    """
    done = daemon.post("reload")
    if as_json:
        print_json(done)
        return
    told = [f"{what} {name}" for what in ("added", "changed", "removed") for name in done[what]]
    click.echo(f"reloaded {done['path']}: {', '.join(told) or 'no changes'}")
    for warning in done["warnings"]:
        click.echo(f"warning: {warning}", err=True)
