"""Options and filters that several commands share."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from relay.api.query_params import ListFilter, filters_of
from relay.base.clock import SystemClock
from relay.base.units import parse_rate
from relay.cli.completion import complete
from relay.cli.main import Number, OneOf, file_error
from relay.cli.screen import utc_option
from relay.routing.condition_text import read_conditions

COMPLETED = ("source", "destination", "event", "delivery", "type")
"""Filters whose values the daemon completes."""

FILE = click.Path(path_type=Path, readable=False)
"""A path. Commands report an unreadable file themselves, because click would exit with 2."""

config_option = click.option(
    "-c",
    "--config",
    type=FILE,
    help="Configuration file.  [default: $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml]",
)
env_file_option = click.option(
    "--env-file",
    "env_files",
    type=FILE,
    multiple=True,
    help="Read environment variables from this file.  [default: the files of the installed service]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print only ids or names.")


def checked(reader: Callable[[str], object]) -> Callable[..., str | None]:
    """Return a callback that validates an option's text with `reader`, and returns the text unchanged.

    The daemon validates it too. This check makes an invalid value a usage error even without a daemon.
    """

    def check(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
        if text is not None:
            try:
                reader(text)
            except ValueError as error:
                raise click.BadParameter(str(error)) from None
        return text

    return check


rate_option = click.option(
    "--rate", callback=checked(parse_rate), help='Maximum rate, such as "20/s".  [default: 100/s]'
)

_WHERE = (
    'Condition on the event, such as "data.sale_made=true". Operators: = != < <= > >=, ~ (pattern);'
    " a path alone tests that the value exists. Repeatable."
)


def filter_options(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds the filters of a list (`relay.api.query_params`) to a command."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(filters_of(kind)):
            if each.name == "where":
                command = click.option("--where", multiple=True, callback=_where, help=_WHERE)(command)
            elif each.option is not None:
                type_ = OneOf(each.choices) if each.choices else str
                reader = None if each.reader is None else checked(partial(_read, each))
                command = click.option(
                    f"--{each.option}", each.name, type=type_, callback=reader, help=each.help,
                    shell_complete=complete(each.option) if each.option in COMPLETED else None,
                )(command)  # fmt: skip
        return command

    return give


def _read(filter_: ListFilter, text: str) -> object:
    return filter_.read(text, SystemClock().wall())


def page_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every list to a command."""
    command = utc_option(quiet_option(json_option(command)))
    command = click.option("--cursor", help="Show the page after this cursor.")(command)
    return click.option(
        "--limit", type=Number(1, 500), default=50, show_default=True, help="Maximum number of rows."
    )(command)


def _where(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> dict[str, Any] | None:
    try:
        return read_conditions(texts)
    except ValueError as error:
        examples = "data.sale_made=true, data.total>=100, type!=adorn.a, subject~s-*, data.note"
        raise click.BadParameter(f"{error}; examples: {examples}", param_hint="--where") from None


def read_data(data: str, option: str = "--data") -> bytes:
    """Return the content that an option names: `@FILE`, or `@-` or `-` for standard input.

    Raises:
        BadParameter: the value has another form, or the file cannot be read.
    """
    name = data.removeprefix("@")
    if name == "-":
        return sys.stdin.buffer.read()
    if name == data:
        file = "body.json" if set(data) & set("{[\n") else data  # the value looks like a body
        raise click.BadParameter(f"expected @FILE or -, as in {option} @{file}", param_hint=option)
    return read_file(Path(name), option)


def read_file(file: Path, option: str) -> bytes:
    """Return the content of a file that an option names.

    Raises:
        BadParameter: the file cannot be read.
        CommandError: this user may not read it.
    """
    try:
        return file.read_bytes()
    except PermissionError as error:
        raise file_error(f"cannot read {file}", error, "make the file readable for this user") from None
    except OSError as error:
        raise click.BadParameter(f"cannot read {file}: {error.strerror}", param_hint=option) from None


def check_argument(url: str) -> str:
    """Return the URL of a PostgreSQL database from the command line, after a check.

    Raises:
        click.BadParameter: it cannot be used, or has a password, which other users would see.
    """
    from relay.config.validators import has_password, postgres_options  # noqa: PLC0415 - few commands need it

    try:
        postgres_options(url)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if has_password(url):
        raise click.BadParameter(
            "the URL contains a password, which other users see among the running processes; "
            "put it into PGPASSWORD or ~/.pgpass"
        )
    return url
