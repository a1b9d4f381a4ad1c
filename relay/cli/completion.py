"""`relay completion`."""

import click
from click.shell_completion import get_completion_class

from relay.cli.options import OneOf


@click.command()
@click.argument("shell", type=OneOf(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete this command.

    \b
    Example: eval "$(relay completion bash)"
    """  # noqa: D301 - click's mark for a paragraph that is not wrapped
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has these three
    program = ctx.find_root().info_name or "relay"
    variable = f"_{program.upper()}_COMPLETE"
    click.echo(kind(ctx.find_root().command, {}, program, variable).source())
