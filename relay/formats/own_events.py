"""Words about the events that the relay itself creates: for messages that people read."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from relay.base.json_text import read
from relay.base.units import render_duration
from relay.model import OPERATOR_SOURCE, StoredEvent

Level = Literal["good", "info", "warning", "error", "critical"]


class Words(msgspec.Struct, frozen=True):
    """The texts of a message about one event."""

    title: str
    text: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    level: Level | None = None
    command: str = ""  # the next command for the operator
    all_command: str = ""  # the same for all events of this kind
    key: str = ""  # events with the same key are about the same problem
    is_over: bool = False  # the problem with this key is solved


def words_about(event: StoredEvent) -> Words | None:
    """Return the words about an event of the relay or of a worker; None for other events."""
    if event.source == OPERATOR_SOURCE:
        find = _OWN.get(event.type.partition(".")[2])
    else:
        find = _WORKERS.get(event.type.removeprefix(f"{event.source}."))
    if find is None:
        return None
    try:
        return find(event, read(event.data))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None  # a sender's event that has the type of a worker's


def _dead(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    name, attempts = str(data["destination"]), int(data["attempts"])
    last = str(data["last_error"] or "").rstrip(".")
    tried = "The only attempt failed" if attempts == 1 else f"All {attempts} attempts failed"
    texts = {
        "exhausted": f"{tried}: {last}." if last else f"{tried}.",
        "aborted": f"The receiver refused it permanently: {last}.",
        "final_status": f"The receiver refused it permanently: {last}.",
        "corrupt": "Its stored body is damaged.",
    }
    return Words(
        title=f"Delivery to {name} is dead",
        text=texts.get(str(data["reason"]), f"Reason: {data['reason']}."),
        fields=_present(
            ("Event type", data["type"]), ("Event", data["event"]), ("Delivery", data["delivery"])
        ),
        level="error",
        command=f"relay deliveries retry {data['delivery']}",
        all_command=f"relay deliveries retry --destination {name} --state dead",
    )


def _circuit_opened(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    name = str(data["destination"])
    return Words(
        title=f"{name} does not respond",
        text="Its deliveries wait. The relay sends probes until it responds again.",
        fields=_present(("Last error", data["reason"]), ("URL", data["url"])),
        level="error",
        command=f"relay destinations show {name}",
        all_command="relay destinations list",
        key=f"destination/{name}/circuit",
    )


def _recovered(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    name = str(data["destination"])
    return Words(
        title=f"{name} responds again",
        text="Its deliveries are sent again.",
        fields=_present(("URL", data["url"])),
        level="good",
        key=f"destination/{name}/circuit",
        is_over=True,
    )


def _disabled(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    name, reason = str(data["destination"]), str(data["reason"])
    why = {
        "gone": "It responded with 410 Gone.",
        "asked": "It requested that with the header webhook-delivery: disable.",
        "failing": "Every attempt failed for too long.",
    }
    return Words(
        title=f"{name} is disabled",
        text=f"{why.get(reason, f'Reason: {reason}.')} Its deliveries are held until you enable it.",
        fields=_present(("URL", data["url"])),
        level="critical",
        command=f"relay destinations enable {name}",
        all_command="relay destinations list",
        key=f"destination/{name}/disabled",
    )


def _expiring(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    name, left = str(data["destination"]), render_duration(float(data["expires_in_seconds"]))
    return Words(
        title=f"Deliveries to {name} expire soon",
        text=f"It accepts nothing. The first delivery expires in {left}.",
        level="warning",
        command=f"relay destinations show {name}",
        all_command="relay destinations list",
        key=f"destination/{name}/expiring",
    )


def _ping(_: StoredEvent, data: Mapping[str, Any]) -> Words:
    return Words(title=f"Test of {data['destination']}", text=str(data["message"]), level="info")


def _worker(
    title: str, level: Level, *, is_over: bool = False
) -> Callable[[StoredEvent, Mapping[str, Any]], Words]:
    def words(event: StoredEvent, data: Mapping[str, Any]) -> Words:
        worker, reason = data["worker"], str(data["reason"])
        texts = {
            "silent": f"No heartbeat since {worker['last_heartbeat'][:19].replace('T', ' ')} UTC.",
            "reported": "The worker reported this status.",
            "uptime": "Its uptime started again from 0.",
        }
        return Words(
            title=title.format(worker["id"]),
            text=texts.get(reason, ""),
            fields=_present(
                ("Source", event.source),
                ("Version", worker["version"]),
                ("Environment", worker["environment"]),
                ("Description", worker["description"]),
            ),
            level=level,
            command=f"relay workers show {event.source} {worker['id']}" if _is_word(worker["id"]) else "",
            all_command="relay workers list",
            key=f"worker/{event.source}/{worker['id']}",
            is_over=is_over,
        )

    return words


def _is_word(text: str) -> bool:
    """Return whether a worker's id needs no quotes in a shell."""
    return text.isascii() and all(each.isalnum() or each in "-_." for each in text) and text[:1] != "-"


def _present(*fields: tuple[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((label, str(value)) for label, value in fields if value)


_Find = Callable[[StoredEvent, Mapping[str, Any]], Words]

_OWN: Mapping[str, _Find] = {
    "delivery.dead": _dead,
    "deliveries.expiring": _expiring,
    "destination.circuit_opened": _circuit_opened,
    "destination.recovered": _recovered,
    "destination.disabled": _disabled,
    "ping": _ping,
}
"""By the type without `relay.`."""

_WORKERS: Mapping[str, _Find] = {
    "worker.registered": _worker("Worker {} registered", "info"),
    "worker.online": _worker("Worker {} is online again", "good", is_over=True),
    "worker.offline": _worker("Worker {} is offline", "error"),
    "worker.restarted": _worker("Worker {} restarted", "warning"),
    "worker.unregistered": _worker("Worker {} left", "info", is_over=True),
}
"""By the type without the source's name."""
