"""Asking before much is changed: only where somebody can answer."""

import sys

import click

from relay.cli.exit_codes import CommandError

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless the operator said yes beforehand.

    Raises:
        UsageError: nobody can be asked, as the input is no terminal.
        CommandError: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Add --yes to say so; the input is no terminal to ask on.")
    if not click.confirm(question):
        raise CommandError("nothing was changed")
