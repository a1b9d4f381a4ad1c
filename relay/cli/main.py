"""A group of commands that imports one only when it is asked for, and knows what a misspelt one means."""

import importlib
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Never

import click

import relay
from relay.base.text import printable
from relay.cli.exit_codes import FAILED, INTERRUPTED, NOT_ALLOWED, code_of
from relay.config.problems import guess
from relay.errors import RelayError


class Group(click.Group):
    """A group whose commands may live in modules that are not imported yet."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **options: Any) -> None:
        """Take `lazy`: names of commands, each with its "module:attribute" and its line in `--help`."""
        super().__init__(*args, **options)
        self.lazy = dict(lazy or {})

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: FBT001, FBT002 - click's own signature
        **extra: Any,
    ) -> Any:
        """See `click.Group.main`; an error that no command expected ends in one line and an exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        _open_standard_streams()
        try:
            return super().main(args, prog_name, complete_var, **extra)
        except Exception as error:  # noqa: BLE001 - the last net
            sys.exit(_last_net(error))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group.list_commands`."""
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing its module if need be."""
        if cmd_name in self.lazy:
            module, _, attribute = self.lazy[cmd_name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say which command a misspelt one may mean."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f'there is no command "{args[0]}"{guess(args[0], names)}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        _ = ctx
        rows = [(name, summary) for name, (_, summary) in self.lazy.items()]
        rows += [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what the operator has to know is told in words, never as a traceback."""
        try:
            return super().invoke(ctx)
        except RelayError as error:
            _leave(ctx, str(error), code_of(error))
        except (KeyboardInterrupt, click.Abort):
            _leave(ctx, "interrupted", INTERRUPTED)


def _leave(ctx: click.Context, message: str, code: int) -> Never:
    click.echo(message, err=True)
    ctx.exit(code)


def _open_standard_streams() -> None:
    """Give a process that was started with closed streams (`>&-`) streams that lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open as long as the process


def _last_net(error: Exception) -> int:
    """Print an unexpected error in one line, with the file that has its traceback; return the exit code."""
    code = NOT_ALLOWED if isinstance(error, PermissionError) else FAILED
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    line = f"unexpected error: {what}; details: {_details(error)}; exit code {code}"
    with suppress(OSError):
        click.echo(printable(line).encode("ascii", "backslashreplace").decode(), err=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # the interpreter would try again at its end, and print another traceback
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _details(error: Exception) -> str:
    """Write the traceback to a file that only this user can read, and return its path.

    Without the arguments of the command: they may hold a secret.
    """
    about = f"hookferry {relay.__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    try:
        fd, path = tempfile.mkstemp(prefix="relay-error-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(about + "".join(traceback.format_exception(error)))
    except OSError as failure:
        return f"not written, {failure.strerror or failure}"
    return path
