"""`relay refused`."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from relay.base.text import printable
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.endpoint import daemon_options, endpoint
from relay.cli.main import FAILED, Group
from relay.cli.options import filter_options, json_option, page_options
from relay.cli.output import print_fields, print_json, print_note, print_page
from relay.cli.screen import Field
from relay.cli.selection import gather
from relay.errors import TEMPORARY

COLUMNS = ("at", "id", "source", "reason", "status", "method", "target", "problem")
FINDING = ("cause", "where", "what", "do")
SHAPE = (
    screen.moment("at", "refused"), screen.short_id("id", least=screen.UNIQUE_DIGITS),
    screen.text("source", least=10, long="middle"), screen.word("reason"), screen.number("status"),
    screen.text("problem", least=20),
    screen.text("target", "path", least=16, rank=2, long="middle"),
)  # fmt: skip


@click.group(cls=Group)
def refused() -> None:
    """List, inspect and retry refused requests."""


@refused.command("list")
@filter_options("refused")
@page_options
@daemon_options
def list_(daemon: Daemon, *, as_json: bool, quiet: bool, **query: Any) -> None:
    """List refused requests, newest first.

    Example: relay refused list --source moddy --since 1h

    Requests that are refused with 429 or 503 are not kept, because their senders repeat them. For each
    source and reason, the relay keeps at most ten requests a second from authenticated senders, and ten a
    minute from others; metrics count all of them.
    """
    page = gather(daemon, "refused", **query)
    print_page(page, COLUMNS, SHAPE, as_json=as_json, quiet=quiet)
    if query["reason"] in TEMPORARY:
        print_note(
            "The relay does not keep requests that it refuses for this reason: their senders repeat them."
            " The log names the senders: `journalctl --unit relay.service --grep refused`"
        )


@refused.command()
@endpoint("GET refused/{request}")
def show(answer: Any, **_: str) -> None:
    """Show a refused request with its headers and body.

    Example: relay refused show 01a201eb

    REQUEST is an id, with or without ref_; any unique prefix works. Tokens are masked. The body is kept only
    if the sender was authenticated. The relay made the diagnosis when the request arrived.
    """
    source, findings = answer["source"], answer.pop("findings")
    retried = screen.full_time(answer["retried_at"])
    print_fields(
        answer,
        [
            Field("Request", answer["id"]),
            Field("Refused", screen.full_time(answer["at"])),
            Field("Source", "no source owns this path" if source is None else source),
            Field("Reason", answer["reason"]),
            Field("Status", str(answer["status"])),
            Field("Problem", answer["problem"]),
            Field("Field", answer["field"]),
            Field("Sender", answer["remote"]),
            *_diagnosis(findings),
            Field("Retried", retried if answer["event_id"] is None else f"{retried}: {answer['event_id']}"),
        ],
    )
    if not sys.stdout.isatty():
        for each in findings:
            click.echo("\t".join(("finding", *(printable(each[name]) for name in FINDING))))
    click.echo(f"\n{answer['method']} {printable(answer['target'])}")
    for name, value in answer["headers"]:
        click.echo(f"{printable(name)}: {printable(value)}")
    click.echo()
    if answer["body"] is None:
        click.echo(f"(the body of {answer['size']} bytes was not kept)")
    else:
        click.echo("\n".join(map(printable, answer["body"].split("\n"))))


def _diagnosis(findings: Iterable[Mapping[str, str]]) -> Iterator[Field]:
    for each in findings:
        yield Field("Diagnosis", f"{each['where']}: {each['what']}")
        yield Field("Advice", each["do"])


@refused.command()
@click.argument("requests", metavar="REQUEST...", nargs=-1, required=True)
@json_option
@daemon_options
def retry(daemon: Daemon, requests: tuple[str, ...], *, as_json: bool) -> None:
    """Handle refused requests again, oldest first.

    Example: relay refused retry 01a201eb

    Use it after you have corrected the plugin or the configuration. The source handles the kept request as
    if it had just been sent. An accepted request becomes an event; its sender gets no response. With several
    requests, the exit code is 1 if one of them is not accepted.
    """
    if len(requests) == 1:
        answer = daemon.post("refused", requests[0], "retry")
        items, failed = [answer], 0
    else:
        answer = daemon.post("refused", "retry", body={"ids": list(requests)})
        items, failed = answer["items"], answer["refused"]
    if as_json:
        print_json(answer)
    else:
        for each in items:
            click.echo(_outcome(each))
    if failed:
        click.get_current_context().exit(FAILED)


def _outcome(each: Mapping[str, Any]) -> str:
    if each.get("error"):
        return f"{each['id']}: {printable(each['error'])}"
    stored = "no event" if each["event_id"] is None else f"event {each['event_id']}"
    return f"{each['id']}: accepted, {stored}"
