"""Options that several commands have."""

import difflib
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path, readable=False)
"""A path; click's own check would answer one that may not be read as a wrong use, in its own words."""

config_option = click.option(
    "-c",
    "--config",
    type=FILE,
    help="The configuration; else $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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
