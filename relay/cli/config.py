"""`relay check-config`."""

from pathlib import Path

import click
import msgspec

from relay.cli.options import config_option, json_option
from relay.cli.output import count, print_json
from relay.config.find import find_config
from relay.config.model import Config
from relay.config.problem import ConfigError
from relay.loader import load


@click.command("check-config")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@config_option
@json_option
@click.pass_context
def check(ctx: click.Context, file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Tell every problem of config.toml at once.

    Checks FILE, or else the configuration that `relay serve` would take, together with its plugins
    and secrets. Warnings do not change the exit code.
    """
    if file is not None and config is not None:
        raise click.UsageError("give either FILE or -c, not both")
    path = find_config(file or config)
    try:
        loaded = load(path).config
    except ConfigError as error:
        _tell_problems(path, error, as_json=as_json)
        ctx.exit(1)
    _tell_success(path, loaded, as_json=as_json)


def _tell_problems(path: Path, error: ConfigError, *, as_json: bool) -> None:
    if as_json:
        problems = [msgspec.structs.asdict(problem) for problem in error.problems]
        print_json({"ok": False, "problems": problems, "warnings": []})
        return
    click.echo(str(error), err=True)
    click.echo(
        f"{count(len(error.problems), 'problem')}; correct and run `relay check-config {path}` again",
        err=True,
    )


def _tell_success(path: Path, config: Config, *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "problems": [], "warnings": list(config.warnings)})
        return
    parts = (count(len(config.sources), "source"), count(len(config.destinations), "destination"))
    click.echo(f"{path}: ok ({', '.join(parts)})")
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)
