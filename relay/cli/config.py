"""`relay check-config` and `relay config`."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import click
import msgspec

from relay.cli.exit_codes import NOT_ALLOWED, CommandError, code_of
from relay.cli.main import Group
from relay.cli.options import FILE, config_option, json_option
from relay.cli.output import count, print_json
from relay.cli.starter_config import START
from relay.config.effective import as_toml, effective
from relay.config.installed_service import Given, read_env_file, service_of
from relay.config.paths import find_config
from relay.config.problems import ConfigError, Problem, UnreadableError
from relay.config.schema import Config
from relay.plugin_loading.loader import Setup, discover, load

env_file_option = click.option(
    "--env-file",
    "env_files",
    type=FILE,
    multiple=True,
    help="Take environment variables from this file; else from those of the installed service.",
)


def given_of(path: Path, env_files: Sequence[Path]) -> Given:
    """Return the environment and the credentials that the daemon has with this configuration.

    They are those of the installed service if it runs with this file, else those of this process.

    Raises:
        CommandError: an environment file cannot be read.
    """
    named: dict[str, str] = {}
    for file in env_files:
        named |= _read(file)
    service = service_of(path)
    if service is not None:
        return service.given(os.environ, named if env_files else None)
    given = Given(environ={**os.environ, **named})
    return Given(environ=given.environ, place=str(env_files[0])) if env_files else given


def load_for_service(path: Path, env_files: Sequence[Path]) -> Setup:
    """Load a configuration with every secret, its files judged as the user of the service would.

    Raises:
        ConfigError: it has problems.
    """
    given, service = given_of(path, env_files), service_of(path)
    discover(())  # installed and bundled plugins: the service's user need not be able to read this program
    try:
        with service.as_user() if service else nullcontext():
            return load(path, given)
    except UnreadableError as error:
        if service is None or os.geteuid() != 0:
            raise
        hint = f"{service.name} runs as {service.user}: chgrp {service.group} {path} && chmod 640 {path}"
        raise ConfigError(error.problems, hint=hint) from None
    except ConfigError as error:
        raise _denied(error.problems, given) or error from None


def load_without_secrets(path: Path, env_files: Sequence[Path]) -> tuple[Setup, Given]:
    """Load a configuration; secrets that cannot be had are `Absent`, and listed in `Setup.absent`.

    Raises:
        ConfigError: it has other problems.
    """
    given = given_of(path, env_files)
    return load(path, given, lenient=True), given


def demand(setup: Setup, given: Given, *keys: str) -> None:
    """Demand that no secret is absent below these keys, such as "sources.adorn".

    Raises:
        ConfigError: one is.
    """
    missing = [
        problem for problem in setup.absent if problem.key.startswith(tuple(f"{key}." for key in keys))
    ]
    if missing:
        raise _denied(missing, given) or ConfigError(missing)


def _denied(problems: Sequence[Problem], given: Given) -> UnreadableError | None:
    """Blame files that this user may not read, where there are any."""
    if not given.unreadable:
        return None
    hint = f"this user may not read {', '.join(given.unreadable)}: run the command as root"
    return UnreadableError(problems, hint=hint)


def _read(file: Path) -> Mapping[str, str]:
    try:
        return read_env_file(file)
    except PermissionError as error:
        hint = "run the command as root"
        raise CommandError(f"{file} cannot be read: {error.strerror}", hint=hint, code=NOT_ALLOWED) from None
    except OSError as error:
        raise CommandError(
            f"{file} cannot be read: {error.strerror}", hint="name another --env-file"
        ) from None


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
