"""Words for the states and reasons that the API returns as codes, for the command line and the dashboard."""

import base64
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from relay.model import PAUSED_IN_CONFIG

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters other than tabs and line feeds, and those that change the order of text."""

END_REASONS: Mapping[str, str] = {
    "exhausted": "all attempts failed", "final_status": "the response ends the delivery (final_statuses)",
    "aborted": "the receiver refused further attempts", "corrupt": "the stored event is damaged",
    "operator": "by an operator", "ttl": "older than ttl",
    "superseded": "a newer event replaced it (latest_by)",
    "backlog_full": "max_pending was reached", "held": "held for longer than [retention] held",
}  # fmt: skip
"""Why a delivery ended."""

_HELD = {
    "resting": "backing off", "not_in_config": "not in config.toml", "disabled: gone": "disabled (410 Gone)",
    "disabled: asked": "disabled (by the receiver)", "disabled: failing": "disabled (failing for too long)",
    "disabled: operator": "disabled (by an operator)",
}  # fmt: skip


def held_text(held: str | None) -> str:
    """Return the state of a destination in words.

    >>> held_text(None), held_text("resting"), held_text("paused until 2026-01-31T12:00:00.000Z")
    ('delivering', 'backing off', 'paused until 2026-01-31T12:00:00.000Z')
    """
    if held is None:
        return "delivering"
    reason, until, time = held.partition(" until ")
    return f"{_HELD.get(reason, reason)}{until}{time}"


def circuit_text(destination: Mapping[str, Any]) -> str:
    """Return the state of a destination in words; an open circuit also shows while the relay probes.

    >>> circuit_text({"held": None, "circuit": "open"}), circuit_text({"held": None, "circuit": "closed"})
    ('circuit open, probing', 'delivering')
    >>> shards = [{"circuit": "closed"}, {"circuit": "open"}]
    >>> circuit_text({"held": None, "circuit": "open", "shards": shards})
    'circuit open in 1 of 2 shards'
    """
    if destination["held"] is not None or destination["circuit"] != "open":
        return held_text(destination["held"])
    shards = destination.get("shards", ())
    failing = sum(each["circuit"] == "open" for each in shards)
    if not failing or failing == len(shards):
        return "circuit open, probing"
    return f"circuit open in {failing} of {len(shards)} shards"


_ADVICE = {
    "paused": "resume it with `relay destinations resume {name}`",
    PAUSED_IN_CONFIG: "set `paused = false` in its table of config.toml and run `relay reload`",
    "not_in_config": "add it to config.toml and run `relay reload`, or cancel its deliveries:"
    " `relay deliveries cancel --destination {name}`",
    "circuit open": "the destination is failing; the relay probes it, and delivers the backlog when it is up;"
    " after a repair, test it and deliver now: `relay destinations test {name} --close-circuit`",
    "resting": "the destination requested a pause, or its address is refused; deliveries continue afterwards;"
    " to test the destination and deliver now, run `relay destinations test {name} --close-circuit`",
    "out of file descriptors": "this machine has no free file descriptor; raise LimitNOFILE of the service",
    "out of memory": "this machine has no free memory; deliveries continue when memory is free",
    "retried": "failed deliveries are retried on schedule; to retry them now, run"
    " `relay deliveries retry --destination {name} --state pending`",
    **{
        f"disabled: {reason}": "enable it with `relay destinations enable {name}`; it then gets its backlog"
        for reason in ("gone", "asked", "failing", "operator")
    },
}


def hold_advice(name: str, held: str | None) -> str | None:
    """Return how a hold of the destination `name` ends; None if it is not held.

    `held` may also be "retried": not held, but its deliveries fail and wait for their retries.
    """
    advice = None if held is None else _ADVICE.get(held)
    return None if advice is None else advice.format(name=name)


def order_text(order: Mapping[str, Any]) -> str:
    """Return the order keys of a destination with `order_by` in words."""
    keys, longest = order["keys"], order["longest"]
    more, most = ("", "at most") if order["is_whole"] else ("at least ", "at least")
    return f"{more}{keys:,} with pending deliveries, {most} {longest:,} of one key"


def shards_text(shards: Iterable[Mapping[str, Any]]) -> str:
    """Return which node has which shards of a destination, and whose circuit is open.

    >>> rows = [(0, "eu-1", "closed"), (1, "", "closed"), (2, "eu-1", "open")]
    >>> shards_text({"shard": number, "node": node, "circuit": circuit} for number, node, circuit in rows)
    'eu-1: 0, 2 (circuit open); no node: 1'
    """
    nodes: dict[str, list[str]] = {}
    for each in shards:
        state = " (circuit open)" if each["circuit"] == "open" else ""
        nodes.setdefault(each["node"] or "no node", []).append(f"{each['shard']}{state}")
    return "; ".join(f"{node}: {', '.join(numbers)}" for node, numbers in sorted(nodes.items()))


_BARS = {"00": "·", "01": "▄", "10": "▄", "11": "█", "0": "·", "1": "▄"}
"""Bars of two minutes, by the minutes with a heartbeat."""


def heard_bars(minutes: str) -> tuple[str, str]:
    """Return the last hour of a worker as bars of two minutes, oldest first, and in words.

    >>> heard_bars("00011101")
    ('·▄█▄', '4 of 8 minutes with a heartbeat')
    """
    bars = "".join([_BARS[minutes[at : at + 2]] for at in range(0, len(minutes), 2)])
    return bars, f"{minutes.count('1')} of {len(minutes)} minutes with a heartbeat"


def repeated_text(requests: int) -> str:
    """Return how often an event was repeated.

    >>> repeated_text(0), repeated_text(1), repeated_text(1200)
    ('', 'once by its sender', '1,200 times by its sender')
    """
    if not requests:
        return ""
    return "once by its sender" if requests == 1 else f"{requests:,} times by its sender"


def curl_of(request: Mapping[str, Any]) -> str:
    r"""Return a curl command that sends the request of a delivery (`GET /api/deliveries/{id}/request`).

    The sender chooses the body, so it never names a file to curl. A body with control characters is written
    in Base64, because terminals obey or lose them, and a page shows their escapes.

    >>> request = {"method": "POST", "url": "https://x", "headers": {}, "body_base64": None}
    >>> curl_of(request | {"body": "@/etc/passwd"}).split()[-2:]
    ['--data-raw', '@/etc/passwd']
    >>> curl_of(request | {"body": "a\r\n"}).split()[:5]
    ['echo', 'YQ0K', '|', 'base64', '-d']
    """
    body, encoded = request["body"], request["body_base64"]
    if encoded is None and _UNSAFE.search(body):
        encoded = base64.b64encode(body.encode()).decode()
    if encoded is not None:
        body = None
    data = "--data-binary @-" if body is None else f"--data-raw {shlex.quote(body)}"
    lines = [
        f"curl -X {request['method']} {shlex.quote(request['url'])}",
        *(f"-H {shlex.quote(f'{name}: {value}')}" for name, value in request["headers"].items()),
        data,
    ]
    source = "" if encoded is None else f"echo {encoded} | base64 -d | "
    return source + " \\\n  ".join(lines)
