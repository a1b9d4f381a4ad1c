"""`relay reload`."""

from typing import Any

import click

from relay.cli.endpoint import endpoint


@click.command()
@endpoint("POST reload")
def reload(answer: Any) -> None:
    """Reload config.toml in the running daemon.

    Example: relay reload && relay destinations list

    The reload applies the whole file or nothing. A file with problems changes nothing, and neither does
    a change that needs a restart; the exit code is then 1.
    """
    changes = [f"{kind} {name}" for kind in ("added", "changed", "removed") for name in answer[kind]]
    click.echo(f"reloaded {answer['path']}: {', '.join(changes) or 'no changes'}")
    for warning in answer["warnings"]:
        click.echo(f"warning: {warning}", err=True)
