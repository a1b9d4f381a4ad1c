"""`relay check-config` and `relay config`, and the configuration as other commands load it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import click
import msgspec

from relay.cli.main import NOTHING, CommandError, Group, code_of, file_error
from relay.cli.options import FILE, config_option, env_file_option, json_option
from relay.cli.output import count, print_json
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.effective import as_toml, effective, with_origins
from relay.config.installed_service import Given, listen_streams, read_env_file, service_of
from relay.config.json_schema import SCHEMA, Kinds, json_schema
from relay.config.paths import find_config, look_for_config, socket_path
from relay.config.problems import ConfigError, Problem, UnreadableError, check_again, guess
from relay.config.schema import Config, SourceConfig
from relay.config.tables import bind_tables
from relay.errors import RelayError
from relay.plugin_loading.loader import Setup, discover, load
from relay.plugin_loading.offered import Kind
from relay.process.sockets import check_unix_path
from relay.process.state_dir import obstacle
from relay.process.systemd import SOCKET_ADVICE, SOCKET_UNITS, is_same_address

STARTER = Path(__file__).with_name("templates") / "config.toml"


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
    """Report every problem in config.toml.

    Example: relay check-config /etc/relay/config.toml

    Checks FILE, by default the configuration that `relay serve` uses, with its plugins and secrets. If the
    installed service uses this configuration, environment files and credentials come from its unit; run
    by root, the command checks files as the service's user. Warnings do not change the exit code.
    """
    if file is not None and config is not None:
        raise click.UsageError("give either FILE or -c, not both")
    path = find_config(file or config)
    try:
        loaded = load_for_service(path, env_files).config
        _check_state_dir(path, loaded)
    except ConfigError as error:
        _print_problems(path, error, as_json=as_json)
        ctx.exit(code_of(error))
    warnings = (*loaded.warnings, *_ignored_addresses(path, loaded))
    _print_success(path, msgspec.structs.replace(loaded, warnings=warnings), as_json=as_json)


def _check_state_dir(path: Path, config: Config) -> None:
    """Check that the paths of the state directory and of the socket can be used.

    Raises:
        ConfigError: the start of the daemon would fail because of one of them.
    """
    problems = []
    if (found := obstacle(config.state_dir)) is not None:
        problems.append(Problem(str(path), 0, "state_dir", f"{found.message}; {found.hint}"))
    elif service_of(path) is None:  # the service's socket is in its runtime directory
        try:
            check_unix_path(socket_path(config))
        except RelayError as error:
            problems.append(Problem(str(path), 0, "admin.socket", f"{error.message}; {error.hint}"))
    if problems:
        raise ConfigError(problems, hint=check_again(path), warnings=config.warnings)


def _ignored_addresses(path: Path, config: Config) -> Iterator[str]:
    """Yield a warning for each address that an enabled socket unit of the installed service replaces."""
    tables = {"public": ("server", config.server.listen), "admin": ("admin", config.admin.listen)}
    for name, stream in listen_streams().items() if service_of(path) else ():
        table, listen = tables[name]
        if listen and not is_same_address(listen, stream):
            what = f'{table}.listen: "{listen}" has no effect: {SOCKET_UNITS[name]} listens on {stream}'
            yield f"{path}: {what}; {SOCKET_ADVICE[name]}"


def _print_problems(path: Path, error: ConfigError, *, as_json: bool) -> None:
    if as_json:
        problems = [msgspec.structs.asdict(problem) for problem in error.problems]
        print_json({"ok": False, "problems": problems, "warnings": list(error.warnings)})
        return
    click.echo(error.message if error.hint == check_again(path) else str(error), err=True)
    for warning in error.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{count(len(error.problems), 'problem')}; correct and run `relay check-config {path}` again",
        err=True,
    )


def _print_success(path: Path, config: Config, *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "problems": [], "warnings": list(config.warnings)})
        return
    parts = (count(len(config.sources), "source"), count(len(config.destinations), "destination"))
    click.echo(f"{path}: ok ({', '.join(parts)})")
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)


@click.group("config", cls=Group)
def config_() -> None:
    """Show the effective configuration, create a starter file or print the schema."""


@config_.command()
@click.option("--origins", "with_places", is_flag=True, help="Add the file and line of each setting.")
@config_option
@env_file_option
@json_option
def show(config: Path | None, *, env_files: tuple[Path, ...], as_json: bool, with_places: bool) -> None:
    """Show the effective configuration, with every default.

    Example: relay config show -c /etc/relay/config.toml

    Secrets appear as <secret>, so the command works even if you may not read them. Paths are absolute. With
    --origins, a comment on each line has the file and line that set the key, or says "default".
    """
    setup, _ = load_without_secrets(find_config(config), env_files)
    tables = effective(setup.config)
    origins = setup.config.origins
    if as_json:
        print_json({"config": tables, "origins": origins} if with_places else tables)
    elif with_places:
        for line, place in with_origins(tables, origins):
            click.echo(f"{line}  # {place}" if place else line)
    else:
        click.echo("\n".join(as_toml(tables)))


@config_.command()
@click.argument("file", type=FILE, default=Path("config.toml"))
def init(file: Path) -> None:
    """Create a starter config.toml for production.

    Example: relay config init /etc/relay/config.toml

    An existing FILE is not overwritten.
    """
    try:
        with file.open("x") as new:
            new.write(f"#:schema {SCHEMA.as_uri()}\n{STARTER.read_text()}")
    except FileExistsError:
        hint = f"name another file, or check this one: `relay check-config {file}`"
        raise CommandError(f"{file} already exists", hint=hint) from None
    except OSError as error:
        raise file_error(f"cannot write {file}", error, "name another file") from None
    click.echo(f"{file}: written; set its secrets, then run `relay check-config {file}`")


@config_.command()
@click.option("--bundled", is_flag=True, help="Leave out the plugins of your configuration.")
@config_option
def schema(config: Path | None, *, bundled: bool) -> None:
    """Print the JSON Schema of config.toml, for editors.

    Example: relay config schema > config.schema.json

    The schema includes the plugins of your configuration. Editors with TOML support complete keys and mark
    mistakes if the first line of config.toml is "#:schema ./config.schema.json".
    """
    path = None if bundled else look_for_config(config)
    dirs = bind_tables(Binder(read(path), os.environ, lenient=True)).plugins.dirs if path else ()
    offers, _ = discover(dirs)
    print_json(json_schema(kinds_of(offers.kinds.values())))


def kinds_of(kinds: Iterable[Kind]) -> Kinds:
    """Return kinds of source as `json_schema` takes them."""
    return {
        kind.name: (kind.source, frozenset(kind.preset.read().defaults if kind.preset else ()))
        for kind in kinds
    }


def given_of(path: Path, env_files: Sequence[Path]) -> Given:
    """Return the environment and the credentials that the daemon has with this configuration.

    They come from the installed service if it uses this file, else from this process.

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
    """Load a configuration with every secret, with the permissions of the service's user.

    Raises:
        ConfigError: it has problems.
    """
    service = service_of(path)
    try:
        given = given_of(path, env_files)
    except ConfigError as error:
        raise _with_others(error, path) from None
    discover(())  # now, because the service's user may be unable to read this program
    try:
        with service.as_user() if service else nullcontext():
            return load(path, given)
    except UnreadableError as error:
        if service is None or os.geteuid() != 0:
            raise
        hint = f"{service.name} runs as {service.user}: chgrp {service.group} {path} && chmod 640 {path}"
        raise ConfigError(error.problems, hint=hint) from None
    except ConfigError as error:
        raise _unreadable(error.problems, given) or error from None


def _with_others(error: ConfigError, path: Path) -> ConfigError:
    """Return an error about the environment together with the problems of the configuration itself."""
    try:
        load(path, lenient=True)
    except UnreadableError:
        return error
    except ConfigError as more:
        problems = (*error.problems, *more.problems)
        return ConfigError(problems, hint=error.hint, warnings=more.warnings)
    return error


def load_without_secrets(path: Path, env_files: Sequence[Path]) -> tuple[Setup, Given]:
    """Load a configuration; a missing secret becomes `Absent` and is listed in `Setup.absent`.

    Raises:
        ConfigError: it has other problems.
    """
    given = given_of(path, env_files)
    return load(path, given, lenient=True), given


def demand(setup: Setup, given: Given, *keys: str) -> None:
    """Check that no secret is missing at or below these keys, such as "sources.adorn".

    Raises:
        ConfigError: a secret is missing.
    """
    below = tuple(f"{key}{mark}" for key in keys for mark in ".[")
    missing = [problem for problem in setup.absent if problem.key in keys or problem.key.startswith(below)]
    if missing:
        raise _unreadable(missing, given) or ConfigError(missing)


def source_named(name: str, sources: Mapping[str, SourceConfig]) -> SourceConfig:
    """Return a source of the configuration.

    Raises:
        CommandError: the source does not exist.
    """
    if name not in sources:
        hint = f"sources: {', '.join(sources)}" if sources else "config.toml has no sources"
        raise CommandError(f'unknown source "{name}"{guess(name, sources)}', hint=hint, code=NOTHING)
    return sources[name]


def _unreadable(problems: Sequence[Problem], given: Given) -> UnreadableError | None:
    """Return an error that names the files that this user cannot read; None if all are readable."""
    if not given.unreadable:
        return None
    hint = f"this user cannot read {', '.join(given.unreadable)}: run the command as root"
    return UnreadableError(problems, hint=hint)


def _read(file: Path) -> Mapping[str, str]:
    try:
        return read_env_file(file)
    except OSError as error:
        is_denied = isinstance(error, PermissionError)
        hint = "run the command as root" if is_denied else "name another --env-file"
        raise file_error(f"cannot read {file}", error, hint) from None
