"""`relay plugins`."""

import os
from pathlib import Path

import click

from relay.cli.group import Group
from relay.cli.options import config_option, json_option
from relay.cli.output import print_json, print_table
from relay.config.bind import Binder
from relay.config.document import read
from relay.config.find import look_for_config
from relay.config.problem import ConfigError
from relay.config.tables import bind_tables
from relay.loader import discover


@click.group(cls=Group)
def plugins() -> None:
    """What plugins are there, and where they come from."""


@plugins.command("list")
@config_option
@json_option
def list_(config: Path | None, *, as_json: bool) -> None:
    """List what plugins offer: kinds of source, formats, jobs, and the hooks that they are told by.

    Example: relay plugins list -c /etc/relay/config.toml

    Reads `[plugins] dirs` of the configuration; without one, there are the installed and the bundled plugins.
    """
    path = look_for_config(config)
    dirs = bind_tables(Binder(read(path), os.environ)).plugins.dirs if path else ()
    offers, problems = discover(dirs)
    found = [offering.shown() for offering in offers.listed()]
    if as_json:
        print_json(found)
    else:
        print_table(("name", "offer", "door", "version", "file"), [list(row.values()) for row in found])
    if problems:
        raise ConfigError(problems)
