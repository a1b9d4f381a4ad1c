"""`relay replays`."""

from collections.abc import Mapping
from typing import Any

import click

from relay.base.units import render_duration
from relay.cli import screen
from relay.cli.endpoint import endpoint
from relay.cli.main import Group
from relay.cli.options import quiet_option
from relay.cli.output import pace, print_fields, print_page
from relay.cli.screen import Field
from relay.cli.selection import continuation, progress_of

COLUMNS = (
    "id", "state", "done", "count", "created", "skipped", "to", "rate", "began_at", "ended_at", "error",
)  # fmt: skip


def _left(seconds: float | None) -> str:
    return "" if seconds is None else render_duration(round(seconds))


_SHAPE = (
    screen.moment("began_at", "began"), screen.short_id("id", least=screen.UNIQUE_DIGITS),
    screen.word("state"), screen.number("done"), screen.number("count", "of"),
    screen.number("skipped", rank=2), screen.text("to", least=10, long="middle"),
    screen.Column("eta_seconds", "left", screen.each(_left), rank=1, right=True),
    screen.text("error", least=16, long="wrap"),
)  # fmt: skip
_NODE = screen.text("node", "runs on", least=8, long="middle")


@click.group(cls=Group)
def replays() -> None:
    """List, inspect and cancel replays."""


@replays.command("list")
@quiet_option
@endpoint("GET replays")
def list_(answer: Any, *, quiet: bool) -> None:
    """List the replays since the daemon started, newest first.

    Example: relay replays list

    `relay events replay` starts a replay, and so does `relay deliveries retry` with a filter.
    """
    is_cluster = any(replay.get("node") for replay in answer["items"])
    columns, shape = ((*COLUMNS, "node"), (*_SHAPE, _NODE)) if is_cluster else (COLUMNS, _SHAPE)
    print_page(answer, columns, shape, quiet=quiet)


@replays.command()
@endpoint("GET replays/{replay}")
def show(answer: Any, **_: str) -> None:
    """Show a replay and its progress.

    Example: relay replays show 01a201eb

    REPLAY is an id, with or without rpl_; any unique prefix works. For a replay that was cancelled or
    failed, the output shows the `--since` to continue with.
    """
    print_fields(
        answer,
        [
            Field("Replay", answer["id"]),
            Field("State", answer["state"], screen.colour_of("state", answer["state"])),
            Field("Error", answer["error"] or ""),
            Field("Progress", f"{progress_of(answer)}, {pace(answer['per_second'], answer['eta_seconds'])}"),
            Field("Created", screen.cell(answer["created"])),
            Field("Skipped", screen.cell(answer["skipped"])),
            Field("To", answer["to"] or ""),
            Field("Runs on", answer.get("node") or ""),
            Field("Rate", f"at most {answer['rate']}"),
            Field("Began", screen.full_time(answer["began_at"])),
            Field("Ended", screen.full_time(answer["ended_at"])),
            Field("Continue", _continuation(answer)),
        ],
    )


@replays.command()
@endpoint("DELETE replays/{replay}")
def cancel(answer: Any, **_: str) -> None:
    """Cancel a replay.

    Example: relay replays cancel 01a201eb

    The deliveries that it already created stay. An ended replay does not change.
    """
    click.echo(f"{answer['state']}: {progress_of(answer)}")
    if hint := _continuation(answer):
        click.echo(hint)


def _continuation(replay: Mapping[str, Any]) -> str:
    return continuation(replay) if replay["state"] in ("cancelled", "cancelling", "failed") else ""
