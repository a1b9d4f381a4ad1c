"""`relay destinations`."""

from typing import Any

import click

from relay.cli.api_client import Daemon, daemon_options
from relay.cli.exit_codes import FAILED
from relay.cli.main import Group
from relay.cli.offline import Offline, reader_options
from relay.cli.options import json_option, quiet_option
from relay.cli.output import print_fields, print_json, print_page

COLUMNS = ("name", "held", "pending", "in_flight", "delivered", "dead", "expired", "cancelled")


@click.group(cls=Group)
def destinations() -> None:
    """Who receives, what is owed, and stopping and going on."""


@destinations.command("list")
@quiet_option
@json_option
@reader_options
def list_(daemon: Daemon | Offline, *, as_json: bool, quiet: bool) -> None:
    """List destinations, with why one is held and its books.

    Example: relay destinations list
    """
    print_page(daemon.get("destinations"), COLUMNS, as_json=as_json, quiet=quiet, key="name")


@destinations.command()
@click.argument("name")
@json_option
@reader_options
def show(daemon: Daemon | Offline, name: str, *, as_json: bool) -> None:
    """Show what a destination is owed, since when, and why it does not move.

    Example: relay destinations show crm
    """
    answer = daemon.get("destinations", name)
    if as_json:
        print_json(answer)
        return
    shown = {
        f"{which}_{field}": one[field] for which in _WHICH if (one := answer[which]) for field in _FIELDS
    }
    print_fields({**{field: value for field, value in answer.items() if field not in _WHICH}, **shown})
    retried = answer["held"] is None and answer["oldest"] is not None and answer["oldest"]["last_error"]
    _advise(name, "retried" if retried else answer["held"])


_WHICH = ("oldest", "latest")
_FIELDS = (
    "id", "type", "state", "created_at", "attempts", "last_status", "last_error", "next_attempt_at"
)  # fmt: skip
_ADVICE = {
    "paused": "`relay destinations resume {name}` goes on",
    "not_in_config": "put it back into config.toml and `relay reload`, or end them:"
    " `relay deliveries cancel --destination {name}`",
    "circuit open": "it does not answer; it is probed, and gets everything once it is back",
    "resting": "it asked for a pause, or its address is refused; it goes on by itself, and"
    " `relay destinations test {name}` asks it now",
    "out of file descriptors": "this machine has no descriptor left for it; raise LimitNOFILE of the service",
    "out of memory": "this machine has no memory left for it; it goes on by itself",
    "retried": "what failed is tried again by the schedule;"
    " `relay deliveries retry --destination {name} --state pending` has it tried now",
    **{
        f"disabled: {reason}": "`relay destinations enable {name}` sends what it is owed"
        for reason in ("gone", "asked", "failing", "operator")
    },
}


def _advise(name: str, held: str | None) -> None:
    """Say what can be done about it."""
    if held in _ADVICE:
        click.echo(_ADVICE[held].format(name=name), err=True)


@destinations.command()
@click.argument("name")
@json_option
@daemon_options
@click.pass_context
def test(ctx: click.Context, daemon: Daemon, name: str, *, as_json: bool) -> None:
    """Send a destination one signed ping, and show its answer and what it took.

    Example: relay destinations test crm

    The request, of type relay.ping, goes the way of a delivery: address guard, TLS, proxy, format,
    signatures. It is sent also while deliveries are held. It is no event and spends no attempt, and what
    comes of it changes nothing. The exit code is 1 unless the answer is a 2xx.
    """
    answer = daemon.post("destinations", name, "test")
    if as_json:
        print_json(answer)
    else:
        _tell(answer)
    if not answer["ok"]:
        ctx.exit(FAILED)


def _tell(answer: dict[str, Any]) -> None:
    took = answer["timing_ms"]
    steps = [f"{step.replace('_', ' ')} {took[step]} ms" for step in _STEPS if took[step] is not None]
    duration = f"{answer['duration_ms']} ms" + (f" ({', '.join(steps)})" if steps else "")
    print_fields(
        {
            **{name: answer[name] for name in ("destination", "id", "status", "error")},
            "duration": duration,
            "signatures": answer["signatures"] or "none: it has no `secrets`",
            "answer": answer["answer"] + ("…" if answer["truncated"] else ""),
            "held": answer["held"],
            "verdict": answer["verdict"],
        }
    )
    if answer["hint"]:
        click.echo(answer["hint"], err=True)


_STEPS = ("dns", "connect", "tls", "first_byte")


def _steering(verb: str, summary: str) -> None:
    @destinations.command(verb, help=f"{summary}\n\nExample: relay destinations {verb} crm")
    @click.argument("name")
    @json_option
    @daemon_options
    def steer(daemon: Daemon, name: str, *, as_json: bool) -> None:
        answer: dict[str, Any] = daemon.post("destinations", name, verb)
        if as_json:
            print_json(answer)
        else:
            click.echo(f"{name}: {answer['held'] or 'open'}")
            if verb in ("resume", "enable"):
                _advise(name, answer["held"])


_steering("pause", "Hold what a destination is owed, until it is resumed.")
_steering("resume", "Go on sending to a paused destination.")
_steering("disable", "Hold what a destination is owed, as after a 410.")
_steering("enable", "Go on sending to a disabled destination, also after a 410.")
