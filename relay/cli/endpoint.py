"""Options that name the daemon or the database file, and commands that send one request."""

import functools
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import relay
from relay.cli.api_client import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    URL_VARIABLE,
    VARIABLE,
    Daemon,
    daemon_at,
)
from relay.cli.completion import completer_of
from relay.cli.main import FAILED, CommandError
from relay.cli.options import FILE, config_option, json_option
from relay.cli.output import print_json
from relay.cli.screen import utc_option
from relay.errors import RelayError

if TYPE_CHECKING:
    from relay.cli.offline import Offline

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a daemon; the command gets a client as its argument `daemon`."""

    @config_option
    @click.option(
        "--socket",
        "socket_file",
        type=FILE,
        help=f"Unix socket of the daemon.  [default: ${VARIABLE}, or from the configuration]",
    )
    @click.option(
        "--url",
        help=f'Admin URL of a remote daemon, such as "http://127.0.0.1:8081".  [default: ${URL_VARIABLE}]',
    )
    @click.option(
        "--token-file",
        type=FILE,
        help="With a URL: file that contains an admin token."
        f"  [default: ${TOKEN_FILE_VARIABLE}, or the token in ${TOKEN_VARIABLE}]",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        config: Path | None,
        socket_file: Path | None,
        url: str | None,
        token_file: Path | None,
        **options: Any,
    ) -> Any:
        daemon = daemon_at(config, socket_file, url, token_file)
        try:
            return command(*args, daemon=daemon, **options)
        except (LookupError, TypeError, AttributeError) as error:
            if (version := _other_version(daemon)) is None:
                raise
            raise CommandError(
                f"the daemon is hookferry {version}, this command is {relay.__version__}:"
                " the command does not understand the daemon's response",
                hint="restart the daemon after an upgrade, or use the command of the daemon's version;"
                " --json prints the response unchanged",
            ) from error

    return wrapped


def _other_version(daemon: Daemon) -> str | None:
    """Return the version of a daemon if it differs from that of this command."""
    version: str | None = None
    with suppress(RelayError, LookupError, TypeError):
        version = daemon.get("status")["version"]
    return None if version == relay.__version__ else version


def reader_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `daemon_options` and `--offline`; `daemon` may then be an `Offline`."""
    online = daemon_options(command)

    @click.option("--offline", is_flag=True, help="Read the database itself; no daemon needed.")
    @functools.wraps(online)
    def wrapped(*args: Any, offline: bool, config: Path | None, url: str | None, **options: Any) -> Any:
        if not offline:
            return online(*args, config=config, url=url, **options)
        if url is not None:
            raise click.UsageError("--offline reads a local file and cannot be used with --url")
        from relay.cli.offline import Offline, tables_of  # noqa: PLC0415 - other commands start faster

        del options["socket_file"], options["token_file"]
        return command(*args, daemon=Offline(tables_of(config)), **options)

    return wrapped


def endpoint(
    route: str,
    *,
    offline: bool = False,
    body: Callable[..., object] | None = None,
    succeeded: Callable[[Any], bool] | None = None,
    asks_more: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a command that sends one request.

    Args:
        route: method and path below `/api/`, such as "POST sources/{name}/pause". Each placeholder becomes
            an argument of the command. A test compares the route with the OpenAPI document.
        offline: add `--offline`, for a GET that `Offline` can answer.
        body: returns the JSON body from the command's arguments and options.
        succeeded: returns whether the exit code for a response is 0 (True) or 1.
        asks_more: the function also gets the `daemon`, for requests whose responses `--json` does not print.

    The decorated function prints the response for people. It gets the response and the command's arguments.
    With `--json` the response itself is printed instead.
    """
    method, _, path = route.partition(" ")
    names = _PLACEHOLDER.findall(path)

    def decorate(show: Callable[..., None]) -> Callable[..., None]:
        own = show.__dict__.pop("__click_params__", [])

        @functools.wraps(show)
        def command(*, daemon: "Daemon | Offline", as_json: bool, **arguments: Any) -> None:
            segments = [part.format_map(arguments) for part in path.split("/")]
            if method == "DELETE" and isinstance(daemon, Daemon):
                answer = daemon.delete(*segments)
            elif method != "GET" and isinstance(daemon, Daemon):
                answer = daemon.post(*segments, body=body(**arguments) if body else None)
            else:
                answer = daemon.get(*segments)
            if as_json:
                print_json(answer)
            else:
                show(answer, **arguments, **({"daemon": daemon} if asks_more else {}))
            if succeeded is not None and not succeeded(answer):
                click.get_current_context().exit(FAILED)

        wrapped = json_option((reader_options if offline else daemon_options)(command))
        if method == "GET":
            wrapped = utc_option(wrapped)
        wrapped.__dict__["__click_params__"] += own  # help lists the command's own options first
        for name in reversed(names):
            wrapped = click.argument(name, shell_complete=completer_of(route, name))(wrapped)
        wrapped.__dict__["route"] = route
        return wrapped

    return decorate


def route_of(command: click.Command) -> str | None:
    """Return the route that a command declares, or None."""
    route: str | None = getattr(command.callback, "route", None)
    return route
