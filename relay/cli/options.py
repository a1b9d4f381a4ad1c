"""Options that several commands have."""

from pathlib import Path

import click

config_option = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="The configuration; else $RELAY_CONFIG, ./config.toml or /etc/relay/config.toml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
