"""`relay explain`."""

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.options import json_option
from relay.cli.output import print_json, print_table


@click.command()
@click.argument("event", required=False)
@click.option("--source", help="Judge a body that this source's sender would post; no relay need run.")
@click.option(
    "--data", help="With --source: the body: @FILE, or @- or - for the standard input; else a sample."
)
@click.option(
    "--type", "type_", help="With --source: sent like this sample, one of `relay send SOURCE --list`."
)
@click.option("--path", help="With --source: to this path, where the source has several.")
@click.option("--header", "headers", multiple=True, help='With --source: with this header, "NAME: VALUE".')
@json_option
@daemon_options
@click.pass_context
def explain(
    ctx: click.Context,
    daemon: Daemon,
    event: str | None,
    *,
    source: str | None,
    data: str | None,
    type_: str | None,
    path: str | None,
    headers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say of every destination whether an event goes there.

    Example: relay explain --source adorn --data @body.json

    Where it does not, the condition that fails is named, and the value on which; where it does, which
    answers are retried. EVENT is the id of a
    stored event, shortened while unique: the running relay judges it by what holds now. With --source,
    a body is judged by config.toml, as the source's plugin reads it; its token is not asked for, and
    nothing is sent or stored.
    """
    if (event is None) == (source is None):
        raise click.UsageError("name a stored EVENT, or a --source whose sender would post --data @FILE")
    if source is not None:
        # Plugins load only here: judging a stored event must start fast without them.
        from relay.cli.offline_explain import Wish, judge  # noqa: PLC0415 - see above

        answer = judge(ctx.params["config"], source, Wish(data, type_, path, headers))
    elif data is not None or type_ is not None or path is not None or headers:
        raise click.UsageError("--data, --type, --path and --header go with --source")
    else:
        answer = daemon.get("events", str(event), "explain")
    if as_json:
        print_json(answer)
        return
    rows = [(each["name"], line) for each in answer["destinations"] for line in each["lines"]]
    print_table(("destination", "why"), rows)
    for each in answer["destinations"]:
        if each["retries"] is not None:
            click.echo(f"{each['name']}: {each['retries']}", err=True)
