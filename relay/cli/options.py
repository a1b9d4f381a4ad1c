"""Options that several commands have."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from relay.base.units import parse_rate

FILE = click.Path(path_type=Path, readable=False)
"""A path; click's own check would answer one that may not be read as a wrong use, in its own words."""

config_option = click.option(
    "-c",
    "--config",
    type=FILE,
    help="The configuration; else $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def understood(reader: Callable[[str], object]) -> Callable[..., str | None]:
    """Return a callback that has an option's text read beforehand, and gives it on as it is.

    The relay reads it again; but what nobody understands is a wrong use, whether one runs or not.
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
    "--rate", callback=understood(parse_rate), help='Events at most, such as "20/s".  [default: 100/s]'
)


class OneOf(click.Choice[str]):
    """One of some words; says which one a misspelt one may mean."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.Choice.convert`."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            folded = {str(word).casefold(): str(word) for word in self.choices}
            near = difflib.get_close_matches(str(value).casefold(), folded, n=1)
            meant = f' Did you mean "{folded[near[0]]}"?' if near else ""
            raise click.BadParameter(f"{error.message}{meant}", ctx, param) from None
