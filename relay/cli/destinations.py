"""`relay destinations`."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from relay.api.words import circuit_text, held_text, hold_advice, order_text, shards_text
from relay.base.units import parse_time_span
from relay.cli import screen
from relay.cli.api_client import Daemon
from relay.cli.endpoint import endpoint
from relay.cli.main import Group
from relay.cli.options import checked, quiet_option
from relay.cli.output import print_fields, print_items, print_note, print_page, time_text
from relay.cli.screen import Field

if TYPE_CHECKING:
    from relay.cli.offline import Offline

COLUMNS = ("name", "held", "pending", "in_flight", "delivered", "dead", "expired", "cancelled")


def _paused_text(destination: Mapping[str, Any]) -> str:
    """Return the state of a destination, and when its pause ends."""
    until = destination["paused_until"]
    [ends] = screen.clock_times([until])
    return circuit_text(destination) + (f" until {ends}" if until else "")


def state_text(destination: Mapping[str, Any]) -> str:
    """Return the state of a destination, and when its pause ends or the next attempt is made."""
    until = destination.get("held_until")
    next_ = f"; next attempt {screen.due(until)}" if until and not destination["paused_until"] else ""
    return _paused_text(destination) + next_


STATE = screen.Column("held", "state", screen.each(str), of=_paused_text)
"""The column that shows whether deliveries are sent, and if not, why."""

_SHAPE = (
    screen.text("name", least=24, wish=40, long="middle"), STATE, screen.number("pending"),
    screen.number("in_flight", "in flight", rank=1), screen.number("delivered"), screen.number("dead"),
    screen.number("expired", rank=4), screen.number("cancelled", rank=5),
    screen.Column("last_success", "last success", screen.each(screen.ago), right=True, rank=2),
    screen.text("url_host", "host", least=12, rank=3, long="middle"),
)  # fmt: skip

_DELIVERIES = ("oldest", "latest")
_FIELDS = (
    "id", "type", "state", "created_at", "attempts", "last_status", "last_error", "next_attempt_at"
)  # fmt: skip
_DELIVERY_SHAPE = (
    screen.word("which", "delivery"), screen.moment("created_at", "created"),
    screen.short_id("id", least=screen.UNIQUE_DIGITS), screen.word("state"),
    screen.number("attempts", "tries"), screen.last_result(rank=1),
    screen.text("type", least=16, rank=2, long="middle"),
    screen.Column("next_attempt_at", "next try", screen.each(screen.due), rank=3),
)  # fmt: skip
_STEPS = ("dns", "connect", "tls", "first_byte")


@click.group(cls=Group)
def destinations() -> None:
    """List, inspect, test, pause, resume, disable and enable destinations."""


@destinations.command("list")
@quiet_option
@endpoint("GET destinations", offline=True)
def list_(answer: Any, *, quiet: bool) -> None:
    """List destinations with their delivery counts.

    Example: relay destinations list

    The column STATE shows whether a destination gets its deliveries, and if not, why; in JSON, the field is
    `held`.
    """
    print_page(answer, COLUMNS, _SHAPE, quiet=quiet, key="name")


@destinations.command()
@endpoint("GET destinations/{name}", offline=True)
def show(answer: Any, *, name: str) -> None:
    """Show a destination's backlog, its oldest delivery, and why deliveries wait.

    Example: relay destinations show crm
    """
    deliveries = {
        f"{which}_{field}": found[field]
        for which in _DELIVERIES
        if (found := answer[which])
        for field in _FIELDS
    }
    fields = {key: value for key, value in answer.items() if key not in _DELIVERIES}
    print_fields({**fields, **deliveries}, _fields(answer))
    if sys.stdout.isatty():
        _print_deliveries(answer)
    held = answer["held"] or ("circuit open" if answer["circuit"] == "open" else None)  # it may be probing
    retried = held is None and answer["oldest"] is not None and answer["oldest"]["last_error"]
    _print_advice(name, "retried" if retried else held)


@destinations.command()
@endpoint(
    "POST destinations/{name}/test",
    body=lambda close_circuit, **_: {"close_circuit": close_circuit},
    succeeded=lambda answer: answer["ok"],
)
@click.option("--close-circuit", is_flag=True, help="After a 2xx, close the circuit and deliver the backlog.")
def test(answer: Any, *, name: str, close_circuit: bool) -> None:
    """Send a destination one signed ping, and show its response and timing.

    Example: relay destinations test crm

    The request has the type relay.ping and passes through every step of a delivery: address check, TLS,
    proxy, format and signatures. The relay sends it even while deliveries are held. The ping creates no
    event and does not count as an attempt. The exit code is 1 unless the response is a 2xx.

    --close-circuit: if the response is a 2xx, deliveries start at once, one at a time at first and then more.
    The relay does not wait for its next probe or for the end of a pause that the receiver requested. A pause
    by an operator stays, and so does a disabled state. Without this option the ping changes nothing.
    """
    timing = answer["timing_ms"]
    steps = [f"{step.replace('_', ' ')} {timing[step]} ms" for step in _STEPS if timing[step] is not None]
    print_fields(
        {
            **{field: answer[field] for field in ("destination", "id", "status", "error")},
            "duration": f"{answer['duration_ms']} ms" + (f" ({', '.join(steps)})" if steps else ""),
            "signatures": answer["signatures"] or "unsigned: the destination has no `secrets`",
            "answer": answer["answer"] + ("…" if answer["truncated"] else ""),
            "held": answer["held"],
            "result": answer["verdict"],
        }
    )
    if answer["hint"]:
        print_note(answer["hint"])
    elif close_circuit and answer["ok"]:
        _print_closed(answer, name)
    elif answer["ok"]:
        _print_advice(name, answer["held"])


@destinations.command()
@endpoint(
    "POST destinations/{name}/pause",
    body=lambda for_, **_: {} if for_ is None else {"for": for_},
)
@click.option(
    "--for", "for_", metavar="DURATION", callback=checked(parse_time_span),
    help='End the pause after this time, such as "1h".  [default: when you resume it]',
)  # fmt: skip
def pause(answer: Any, *, name: str, **_: Any) -> None:
    """Pause a destination: hold its deliveries until you resume it, or for some time.

    Example: relay destinations pause crm --for 1h

    The pause and its end survive a restart of the daemon. A second pause replaces the first one.
    """
    _print_state(answer, name)


@destinations.command()
@endpoint("POST destinations/{name}/resume")
def resume(answer: Any, *, name: str) -> None:
    """Resume deliveries to a paused destination.

    Example: relay destinations resume crm

    A destination with `paused = true` in config.toml stays paused: change the file and run `relay reload`.
    """
    _print_state(answer, name)
    _print_advice(name, answer["held"])


@destinations.command()
@endpoint("POST destinations/{name}/disable")
def disable(answer: Any, *, name: str) -> None:
    """Disable a destination and hold its deliveries, as after a 410.

    Example: relay destinations disable crm
    """
    _print_state(answer, name)


@destinations.command()
@endpoint("POST destinations/{name}/enable")
def enable(answer: Any, *, name: str) -> None:
    """Enable a disabled destination, also after a 410; its held deliveries are sent.

    Example: relay destinations enable crm
    """
    _print_state(answer, name)
    _print_advice(name, answer["held"])


def _fields(shown: Mapping[str, Any]) -> list[Field]:
    in_flight = shown["in_flight"]
    backlog = [
        f"{screen.number_text(shown['pending'])} pending",
        f"{screen.number_text(shown['due'])} due",
        *([] if in_flight is None else [f"{screen.number_text(in_flight)} in flight"]),
    ]
    ended = [
        f"{screen.number_text(shown[state])} {state}"
        for state in ("delivered", "dead", "expired", "cancelled")
    ]
    return [
        Field("Destination", shown["name"]),
        Field("Host", shown.get("url_host") or ""),
        Field("State", state_text(shown), screen.colour_of("held", circuit_text(shown))),
        Field("Failing since", screen.full_time(shown.get("failing_since"))),
        Field("Disabled at", screen.full_time(shown.get("disabled_at"))),
        Field("Last success", screen.full_time(shown.get("last_success"))),
        Field("Last error", _last_error(shown)),
        Field("Certificate", _expiry(shown.get("certificate_expires"))),
        Field("Events", screen.cell(shown.get("events"))),
        *([Field("Shards", shards_text(shown["shards"]))] if "shards" in shown else []),
        Field("Backlog", ", ".join(backlog)),
        Field("Next expiry", screen.full_time(shown.get("expires_next"))),
        Field("Order keys", order_text(shown["order"]) if shown.get("order") else ""),
        Field("Deliveries", ", ".join(ended), "red" if shown["dead"] else None),
    ]


def _last_error(shown: Mapping[str, Any]) -> str:
    error, at = (screen.cell(shown.get(name)) for name in ("last_error", "last_error_at"))
    return f"{error} ({screen.distance(at)})" if error and at else error


def _expiry(expires: str | None) -> str:
    return "" if expires is None else f"expires {screen.full_time(expires)}"


def _print_deliveries(shown: Mapping[str, Any]) -> None:
    """Print the oldest pending and the latest delivery."""
    found = {
        noun: shown[key] for key, noun in (("oldest", "oldest pending"), ("latest", "latest")) if shown[key]
    }
    if not found:
        return
    click.echo()
    print_items((), [{"which": noun, **each} for noun, each in found.items()], _DELIVERY_SHAPE)


def print_holds(daemon: "Daemon | Offline", name: str | None = None) -> None:
    """Print why pending deliveries are not sent now, for one destination or for all."""
    for each in holds(daemon):
        if each["pending"] and name in (None, each["name"]):
            print_note(f"{each['name']} is held: {state_text(each)}")
            _print_advice(each["name"], each["held"])


def holds(daemon: "Daemon | Offline") -> list[dict[str, Any]]:
    """Return the destinations that are held."""
    return [each for each in daemon.get("destinations")["items"] if each["held"]]


def _print_closed(answer: Any, name: str) -> None:
    """Print the changes that a successful test with `--close-circuit` made."""
    if not answer["circuit_closed"]:
        print_note("the circuit was not open; nothing was changed")
    elif not answer["held"]:
        print_note(
            "circuit closed; due deliveries are sent, one at a time at first. To send those that wait for a"
            f" retry too, run `relay deliveries retry --destination {name} --state pending`"
        )
    if answer["held"]:
        print_note(f"{name} is still held: {held_text(answer['held'])}")
        _print_advice(name, answer["held"])


def _print_state(answer: Any, name: str) -> None:
    until = f" until {time_text(answer['paused_until'])}" if answer["paused_until"] else ""
    held = held_text(answer["held"]) if sys.stdout.isatty() else answer["held"] or "delivering"
    click.echo(f"{name}: {held}{until}")


def _print_advice(name: str, held: str | None) -> None:
    """Print how a hold ends."""
    if advice := hold_advice(name, held):
        print_note(advice)
