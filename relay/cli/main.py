"""The `relay` command: its subcommands, each imported when it runs, their exit codes and errors."""

import difflib
import importlib
import io
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Never

import click
from click.shell_completion import get_completion_class

import relay
from relay.base.text import printable
from relay.config.problems import UnreadableError, guess
from relay.errors import RelayError

FAILED = 1  # the operation failed, or a check found problems
UNREACHABLE = 3  # the daemon does not answer
NOTHING = 4  # nothing found
NOT_ALLOWED = 5
BATCH = 6  # part of a batch failed
CONFIG = 78  # `relay serve`: config.toml is invalid, so a restart does not help (EX_CONFIG)
INTERRUPTED = 130  # Ctrl-C, the code that shells use

EXIT_CODES = {
    0: "done",
    FAILED: "failed, or found problems",
    2: "invalid option or argument",
    UNREACHABLE: "cannot connect to the daemon",
    NOTHING: "not found",
    NOT_ALLOWED: "not permitted",
    BATCH: "partly done: some items were skipped",
    CONFIG: "`relay serve` only: the configuration is invalid, so a restart does not help"
    " (`check-config` exits with 1)",
    INTERRUPTED: "interrupted by Ctrl-C",
}
"""The meaning of each exit code, as in docs/cli.md and in the man pages."""


class CommandError(RelayError):
    """A command failed; `code` is its exit code."""

    def __init__(self, message: str, *, hint: str = "", code: int = FAILED) -> None:
        super().__init__(message, hint=hint)
        self.code = code


def file_error(what: str, error: OSError, hint: str) -> CommandError:
    """Return the error for a file that cannot be read or written; `what` is like "cannot write FILE"."""
    code = NOT_ALLOWED if isinstance(error, PermissionError) else FAILED
    return CommandError(f"{what}: {error.strerror}", hint=hint, code=code)


def code_of(error: RelayError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, CommandError):
        return error.code
    return NOT_ALLOWED if isinstance(error, UnreadableError) else FAILED


class Group(click.Group):
    """A group of commands. A lazy command's module is imported only when that command runs."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **options: Any) -> None:
        """Take `lazy`: command names, each with its "module:attribute" and its line in `--help`."""
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
        """Run the command line; an unexpected error ends in one line and an exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        _open_standard_streams()
        try:
            return super().main(args, prog_name, complete_var, **extra)
        except Exception as error:  # noqa: BLE001 - any other error ends here
            sys.exit(_report_unexpected(error))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; imports its module if necessary."""
        if cmd_name in self.lazy:
            module, _, attribute = self.lazy[cmd_name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name; suggest one for a misspelt name."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f'unknown command "{args[0]}"{guess(args[0], names)}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without an import."""
        _ = ctx
        rows = [(name, summary) for name, (_, summary) in self.lazy.items()]
        rows += [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; print an expected error as a message and a hint, without a traceback."""
        try:
            return super().invoke(ctx)
        except RelayError as error:
            _fail(ctx, str(error), code_of(error))
        except (KeyboardInterrupt, click.Abort):
            _fail(ctx, "interrupted", INTERRUPTED)


class OneOf(click.Choice[str]):
    """One of a fixed set of words; suggests one for a misspelt word."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the chosen word."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            folded = {str(word).casefold(): str(word) for word in self.choices}
            near = difflib.get_close_matches(str(value).casefold(), folded, n=1)
            suggestion = f' Did you mean "{folded[near[0]]}"?' if near else ""
            raise click.BadParameter(f"{error.message}{suggestion}", ctx, param) from None


class Number(click.IntRange):
    """The type of an option that takes a whole number in a range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            ends = f"of at least {self.min}" if self.max is None else f"from {self.min} to {self.max}"
            self.fail(f'expected a number {ends}, got "{value}"', param, ctx)


COMMANDS = {
    "check-config": ("relay.cli.config:check", "Report every problem in config.toml."),
    "config": (
        "relay.cli.config:config_",
        "Show the effective configuration, create a starter file or print the schema.",
    ),
    "init": (
        "relay.cli.init:init",
        "Set up a relay: config.toml, secrets and, for a service, its unit.",
    ),
    "serve": ("relay.cli.serve:serve", "Run the daemon until SIGTERM or Ctrl-C."),
    "reload": ("relay.cli.reload:reload", "Reload config.toml in the running daemon."),
    "events": ("relay.cli.events:events", "List, inspect, replay, export, import and delete events."),
    "attempts": ("relay.cli.attempts:attempts", "List attempts at deliveries."),
    "deliveries": ("relay.cli.deliveries:deliveries", "List, inspect, retry and cancel deliveries."),
    "destinations": (
        "relay.cli.destinations:destinations",
        "List, inspect, test, pause, resume, disable and enable destinations.",
    ),
    "sources": ("relay.cli.sources:sources", "List, add, inspect, pause and resume sources."),
    "replays": ("relay.cli.replays:replays", "List, inspect and cancel replays."),
    "refused": ("relay.cli.refused:refused", "List, inspect and retry refused requests."),
    "workers": ("relay.cli.workers:workers", "Inspect workers and send them commands."),
    "stats": ("relay.cli.stats:stats", "Count received events per hour, source and type."),
    "jobs": ("relay.cli.jobs:jobs", "List and run periodic jobs."),
    "ui": ("relay.cli.ui:ui", "Open the dashboard in a browser."),
    "audit": ("relay.cli.audit:audit", "List changes that operators made, newest first."),
    "nodes": ("relay.cli.nodes:nodes", "List the nodes that share the database, and their lanes."),
    "status": ("relay.cli.status:status", "Show the state of the daemon on one screen."),
    "top": ("relay.cli.top:top", "Live dashboard, refreshed every second."),
    "tail": ("relay.cli.tail:tail", "Follow events and attempts as they happen."),
    "explain": ("relay.cli.explain:explain", "Show which destinations an event goes to, and why."),
    "verify": (
        "relay.cli.verify:verify",
        "Diagnose a token or signature that does not match: secret, encoding, bytes or clock.",
    ),
    "send": ("relay.cli.send:send", "Send a sample event through the public listener."),
    "listen": (
        "relay.cli.listen:listen",
        "Run a local receiver that verifies signatures and prints requests.",
    ),
    "doctor": ("relay.cli.doctor:doctor", "Check database, disk, clock, backlog, jobs and backups."),
    "db": ("relay.cli.db:db", "Inspect, back up, check, compact and move the database."),
    "completion": ("relay.cli.main:completion", "Print a shell completion script."),
    "plugins": ("relay.cli.plugins:plugins", "List plugins and create a new one."),
}
"""Every command: its module and attribute, and its line in `relay --help`, which imports no command."""


@click.group(cls=Group, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(relay.__version__, message="hookferry %(version)s")
def main() -> None:
    """Receive webhooks, store them, and deliver them to your destinations."""


@click.command()
@click.argument("shell", type=OneOf(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell completion script.

    \b
    Example: eval "$(relay completion bash)"
    """  # noqa: D301 - click's mark for a paragraph that is not wrapped
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click supports these three shells
    program = ctx.find_root().info_name or "relay"
    variable = f"_{program.upper()}_COMPLETE"
    source = kind(ctx.find_root().command, {}, program, variable).source()
    # Worker ids and descriptions may have commas; click's function for fish would cut them there.
    click.echo(source.replace('string split ","', 'string split --max 1 ","'))


def _fail(ctx: click.Context, message: str, code: int) -> Never:
    click.echo(message, err=True)
    ctx.exit(code)


def _open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the caller closed (`>&-`).

    Output streams with another encoding than UTF-8 escape characters that they cannot write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - open as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def _report_unexpected(error: Exception) -> int:
    """Print an unexpected error in one line, with the file that has its traceback; return the exit code."""
    code = NOT_ALLOWED if isinstance(error, PermissionError) else FAILED
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    line = f"unexpected error: {what}; details: {_details(error)}; exit code {code}"
    with suppress(OSError):
        click.echo(printable(line).encode("ascii", "backslashreplace").decode(), err=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # the interpreter flushes again at exit, and would print a second traceback
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _details(error: Exception) -> str:
    """Write the traceback to a file that only this user can read, and return its path.

    The file does not contain the command's arguments, because they may contain a secret.
    """
    about = f"hookferry {relay.__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    try:
        fd, path = tempfile.mkstemp(prefix="relay-error-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(about + "".join(traceback.format_exception(error)))
    except OSError as failure:
        return f"not written, {failure.strerror or failure}"
    return path
