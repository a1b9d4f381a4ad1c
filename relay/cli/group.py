"""A group of commands that imports one only when it is asked for, and knows what a misspelt one means."""

import importlib
from collections.abc import Mapping
from typing import Any, Never

import click

from relay.cli.exits import INTERRUPTED, code_of
from relay.config.problem import guess
from relay.errors import RelayError


class Group(click.Group):
    """A group whose commands may live in modules that are not imported yet."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **options: Any) -> None:
        """Take `lazy`: names of commands, each with its "module:attribute" and its line in `--help`."""
        super().__init__(*args, **options)
        self.lazy = dict(lazy or {})

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
