"""`relay attempts`."""

from typing import TYPE_CHECKING, Any

import click

from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.deliveries import RESPONSE
from relay.cli.endpoint import reader_options
from relay.cli.main import Group
from relay.cli.options import filter_options, page_options
from relay.cli.output import print_page
from relay.cli.selection import gather

if TYPE_CHECKING:
    from relay.cli.offline import Offline

COLUMNS = (
    "started_at", "type", "destination", "result", "status", "duration_ms", "error", "delivery_id"
)  # fmt: skip
SHAPE = (
    screen.moment("started_at", "started"),
    screen.short_id("delivery_id", "delivery", least=screen.UNIQUE_DIGITS),
    screen.text("destination", least=14, long="middle"), screen.word("result"),
    screen.Column("duration_ms", "took", screen.each(screen.milliseconds), right=True),
    RESPONSE,
    screen.text("type", least=16, rank=2, long="middle"),
)  # fmt: skip


@click.group(cls=Group)
def attempts() -> None:
    """List attempts at deliveries."""


@attempts.command("list")
@filter_options("attempts")
@click.option("--failed", is_flag=True, help="Only failed attempts.")
@page_options
@reader_options
def list_(daemon: "Daemon | Offline", *, failed: bool, as_json: bool, quiet: bool, **query: Any) -> None:
    """List attempts, newest first.

    Example: relay attempts list --destination crm --failed --since 1h

    An attempt is one HTTP request for a delivery. --json also has the responses, up to 16 KiB each.
    -q prints the ids of the deliveries.
    """
    page = gather(daemon, "attempts", failed=True if failed else None, **query)
    print_page(page, COLUMNS, SHAPE, as_json=as_json, quiet=quiet, key="delivery_id")
