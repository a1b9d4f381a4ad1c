"""`relay reload`."""

import json
from typing import Any

import click

from relay.base.text import printable
from relay.cli.endpoint import endpoint


def _body(*, dry_run: bool) -> dict[str, bool]:
    return {"dry_run": True} if dry_run else {}


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what a reload would change; change nothing.")
@endpoint("POST reload", body=_body)
def reload(answer: Any, *, dry_run: bool) -> None:
    """Reload config.toml in the running daemon.

    Example: relay reload && relay destinations list

    Prints each key whose value changes. The reload applies the whole file or nothing: if the file has a
    problem, or a change needs a restart, nothing changes and the exit code is 1.
    """
    changes = [f"{kind} {name}" for kind in ("added", "changed", "removed") for name in answer[kind]]
    done = "a reload of" if dry_run else "reloaded"
    verb = " would make these changes" if dry_run and changes else ""
    click.echo(f"{done} {answer['path']}{verb}: {', '.join(changes) or 'no changes'}")
    for each in answer["keys"]:
        place = f"{each['table']}: " if each["table"] else ""
        before, after = (_written(each[name]) for name in ("before", "after"))
        change = "the secret differs" if before == after else f"{before} -> {after}"
        origin = f" ({each['place']})" if each["place"] else ""
        click.echo(f"  {printable(place)}{each['key']}: {printable(change + origin)}")
    for warning in answer["warnings"]:
        click.echo(f"warning: {warning}", err=True)


def _written(value: Any) -> str:
    """Return a value as JSON; "not set" for None."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
