"""The configuration as commands read it: with what the installed service is given, if it is the service's."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from relay.cli.exit_codes import NOT_ALLOWED, CommandError
from relay.cli.options import FILE
from relay.config.installed_service import Given, read_env_file, service_of
from relay.config.problems import ConfigError, Problem, UnreadableError
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
