"""`relay check-config` and `relay config`."""

from pathlib import Path

import click
import msgspec

from relay.cli.configured import env_file_option, load_for_service, load_without_secrets
from relay.cli.exit_codes import CommandError, code_of
from relay.cli.main import Group
from relay.cli.options import FILE, config_option, json_option
from relay.cli.output import count, print_json
from relay.cli.starter_config import START
from relay.config.effective import as_toml, effective
from relay.config.paths import find_config
from relay.config.problems import ConfigError
from relay.config.schema import Config


@click.command("check-config")
@click.argument("file", required=False, type=FILE)
@config_option
@env_file_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    file: Path | None,
    config: Path | None,
    *,
    env_files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Tell every problem of config.toml at once.

    Example: relay check-config /etc/relay/config.toml

    Checks FILE, or else the configuration that `relay serve` would take, together with its plugins
    and secrets. For the configuration of the installed service, environment files and credentials are
    those of its unit, and root checks files as the service's user would. Warnings do not change the
    exit code.
    """
    if file is not None and config is not None:
        raise click.UsageError("give either FILE or -c, not both")
    path = find_config(file or config)
    try:
        loaded = load_for_service(path, env_files).config
    except ConfigError as error:
        _tell_problems(path, error, as_json=as_json)
        ctx.exit(code_of(error))
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


@click.group("config", cls=Group)
def config_() -> None:
    """What the configuration comes to, and a first one."""


@config_.command()
@config_option
@env_file_option
@json_option
def show(config: Path | None, *, env_files: tuple[Path, ...], as_json: bool) -> None:
    """Show what the configuration comes to, every default included.

    Example: relay config show -c /etc/relay/config.toml

    Secrets are shown as <secret> and do not have to be readable; paths are those that the relay uses.
    """
    setup, _ = load_without_secrets(find_config(config), env_files)
    tables = effective(setup.config)
    if as_json:
        print_json(tables)
    else:
        click.echo("\n".join(as_toml(tables)))


@config_.command()
@click.argument("file", type=FILE, default=Path("config.toml"))
def init(file: Path) -> None:
    """Write a config.toml for production to start from.

    Example: relay config init /etc/relay/config.toml

    FILE must not be there yet.
    """
    try:
        with file.open("x") as new:
            new.write(START)
    except FileExistsError:
        hint = f"`relay check-config {file}` checks it; name another file"
        raise CommandError(f"{file} is there already", hint=hint) from None
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}", hint="name another file") from None
    click.echo(f"{file}: written; set its secrets, then run `relay check-config {file}`")
