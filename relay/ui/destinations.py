"""Destinations: the list, and one with its backlog, its failures and the effect of each change."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from relay.api.words import held_text, hold_advice, order_text, shards_text
from relay.base.units import parse_rate
from relay.config.effective import as_toml, effective_table
from relay.config.schema import DestinationConfig
from relay.config.secrets import Url
from relay.jobs.replay import DEFAULT_RATE
from relay.ui.markup import Content, Markup, tag
from relay.ui.page import Visit
from relay.ui.parts import (
    HOUR,
    NONE,
    Narrow,
    Span,
    action,
    attempt_result,
    charts,
    command,
    duration,
    exact,
    fields,
    in_order,
    number,
    prose,
    sorting,
    span_of,
    spans,
    spark,
    state,
    table,
    when,
)

SECTION = "destinations"
FAILURES = 100
"""Failed attempts that are read to group them."""

NO_DESTINATIONS: Content = [
    "config.toml has no destinations. Add a table ", tag("code", "[destinations.NAME]"), ", then run ",
    command("reload"),
]  # fmt: skip

HEADS = ("Destination", "State", "Pending", "Dead", "Delivered", "Last success", "Host")
_ORDERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "destination": lambda each: each["name"],
    "state": lambda each: (each["held"] is None, each["held"]),
    "pending": lambda each: -each["pending"],
    "dead": lambda each: -each["dead"],
    "delivered": lambda each: -each["delivered"],
    "last success": lambda each: each["last_success"] or "",
}
"""The columns that sort the list; see `relay.ui.parts.in_order`."""

_DEFAULTS = effective_table(DestinationConfig(name="", url=Url("http://localhost")))

_UNTIL_FIXED = ("circuit open", "resting")
"""Holds that a successful test can end."""


async def list_(visit: Visit) -> web.Response:
    """List the destinations of config.toml, and others with pending deliveries."""
    page = await visit.ask("listDestinations")
    items = in_order(visit, page["items"], _ORDERS)
    return visit.page(
        "Destinations",
        sorting(visit, HEADS[:-1]) if len(items) > 1 else None,
        await table(
            visit,
            "Deliveries by state",
            HEADS,
            (_row(visit, each) for each in items),
            numbers=("Pending", "Dead", "Delivered"),
            sorts=_ORDERS,
            narrow=Narrow("State", (), ("Last success", "Host")),
            empty=NO_DESTINATIONS,
        ),
        tag("p", command("destinations", "list")),
        section=SECTION,
    )


def _row(visit: Visit, each: Mapping[str, Any]) -> tuple[Content, ...]:
    name = each["name"]
    return (
        tag("a", name, href=visit.link(SECTION, name)),
        held(visit, each),
        count_link(visit, name, "pending", each["pending"]),
        count_link(visit, name, "dead", each["dead"]),
        count_link(visit, name, "delivered", each["delivered"]),
        when(visit, each["last_success"]),
        each["url_host"] or NONE,
    )


def held(visit: Visit, each: Mapping[str, Any]) -> Content:
    """Return whether deliveries are sent, and if not, why and until when."""
    reason, until = each["held"], each.get("paused_until")
    is_probing = reason is None and each.get("circuit") == "open"
    word = "dead" if is_probing else "delivered" if reason is None else "dead"
    if reason is not None and reason.startswith("paused"):
        word = "expired"
    text = "circuit open, probing" if is_probing else held_text(reason)
    return [state(word, text), [", ends ", when(visit, until)] if until else None]


def count_link(visit: Visit, destination: str, word: str, count: int) -> Markup:
    """Return a number of deliveries as a link to the list of them."""
    address = visit.link("deliveries", destination=destination, state=word)
    live = destination if word == "pending" else None
    return tag(
        "a", number(count), href=address, data_live=live, class_="bad" if word == "dead" and count else None
    )


async def show(visit: Visit) -> web.Response:
    """Show whether a destination gets its deliveries, why not, and the effect of sending them."""
    name = visit.path["name"]
    shown = await visit.ask("showDestination", {"name": name})
    config = (await visit.ask("showConfig"))["config"]["destinations"].get(name)
    span = span_of(visit)
    past = await _past(visit, name, HOUR)
    charted = past if span is HOUR else await _past(visit, name, span)
    failed = await visit.ask(
        "listAttempts",
        query={
            "destination": name,
            "failed": "1",
            "since": span.since,
            "limit": str(FAILURES),
            "answer": "0",
        },
    )
    reason = shown["held"]
    if reason is None and shown["circuit"] == "open":
        reason = "circuit open"
    elif reason is None and shown["oldest"] is not None and shown["oldest"]["last_error"]:
        reason = "retried"
    advice = hold_advice(name, reason)
    return visit.page(
        name,
        tag("p", prose(f"{advice[0].upper()}{advice[1:]}"), class_="summary") if advice else None,
        tag("p", *_actions(visit, shown, config, past), class_="actions"),
        fields(*_facts(visit, shown)),
        tag("h2", "Attempts"),
        spans(visit),
        _history(visit, span, name, charted),
        tag("h2", f"Failures of the last {span.name}"),
        await table(
            visit,
            f"By result, of the newest {FAILURES}" if failed["next_cursor"] else "By result",
            ("Result", "Attempts", "Latest"),
            _failures(visit, span, name, failed["items"]),
            numbers=("Attempts",),
            empty=state("delivered", "No failed attempt."),
        ),
        tag("h2", "Deliveries"),
        tag("p", _forecast(shown, config, past)) if shown["pending"] else None,
        fields(*_limits(visit, shown)),
        await _oldest(visit, shown),
        _settings(name, config),
        tag("p", command("destinations", "show", name)),
        section=SECTION,
        heading=[name, ": ", held(visit, shown)],
    )


def _facts(visit: Visit, shown: Mapping[str, Any]) -> Iterator[tuple[str, Content]]:
    name = shown["name"]
    yield "Host", shown["url_host"] or NONE
    if shown.get("node"):
        yield "Node", shown["node"]
    if shown.get("shards"):
        yield "Shards", shards_text(shown["shards"])
    yield "Events", ", ".join(shown.get("events") or ()) or NONE
    yield "Last success", exact(visit, shown["last_success"])
    if shown.get("failing_since"):
        yield "Failing since", exact(visit, shown["failing_since"])
    if shown.get("disabled_at"):
        yield "Disabled", exact(visit, shown["disabled_at"])
    if shown.get("held_until") and not shown["paused_until"]:
        yield "Next attempt", exact(visit, shown["held_until"])
    if shown["certificate_expires"]:
        yield "Certificate", ["expires ", exact(visit, shown["certificate_expires"])]
    counts = [
        [count_link(visit, name, word, shown[word]), f" {word}"]
        for word in ("pending", "delivered", "dead", "expired", "cancelled")
    ]
    yield "Deliveries", [[each, " · " if each is not counts[-1] else None] for each in counts]
    created = shown["created"]
    ended = sum(shown[word] for word in ("delivered", "dead", "expired", "cancelled"))
    missing = created - ended - shown["pending"]
    proof = state("delivered", "balanced") if not missing else state("dead", f"{missing:+,} unaccounted")
    yield "Ledger", [f"{number(created)} created = ended + pending: ", proof]


def _limits(visit: Visit, shown: Mapping[str, Any]) -> Iterator[tuple[str, Content]]:
    """Yield when the first pending delivery expires, and how many order keys wait."""
    if shown["expires_next"]:
        address = visit.link("deliveries", destination=shown["name"], state="pending")
        yield (
            "Next expiry",
            [exact(visit, shown["expires_next"]), ", ", tag("a", "pending deliveries", href=address)],
        )
    if shown["order"]:
        yield "Order keys", f"{order_text(shown['order'])}; deliveries of one key are sent one after another"


def steering(
    visit: Visit, shown: Mapping[str, Any], takes: str | None = None, *, of: str | None = None
) -> Iterator[Content]:
    """Yield the buttons that apply to the state of a destination in config.toml.

    `takes` is the estimated duration of its backlog, if known; `of` as for `action`.
    """
    name, reason = shown["name"], shown["held"]
    base, waiting = f"POST destinations/{name}", _waiting(shown)
    released = f"{waiting}, in {takes}" if takes and shown["pending"] else waiting
    yield action(
        visit, "Test", "destinations", "test", name, call=f"{base}/test",
        count="one signed ping; it changes nothing", of=of,
    )  # fmt: skip
    if reason in _UNTIL_FIXED:
        yield action(
            visit, "Test and deliver", "destinations", "test", name, "--close-circuit",
            call=f"{base}/test", body={"close_circuit": True},
            count=f"one signed ping; after a 2xx, the {released} are sent, one at a time at first", of=of,
        )  # fmt: skip
    if reason == "paused":
        yield action(
            visit, "Resume", "destinations", "resume", name, call=f"{base}/resume", count=released, of=of
        )
    elif reason is None or not reason.startswith(("paused", "disabled")):
        yield action(
            visit, "Pause", "destinations", "pause", name, call=f"{base}/pause",
            count=f"{waiting}, and later ones; they wait until you resume it", of=of,
        )  # fmt: skip
    if reason is not None and reason.startswith("disabled"):
        yield action(
            visit, "Enable", "destinations", "enable", name, call=f"{base}/enable", count=released, of=of
        )


def _waiting(shown: Mapping[str, Any]) -> str:
    pending = shown["pending"]
    return f"{pending:,} pending {'delivery' if pending == 1 else 'deliveries'}"


def _actions(
    visit: Visit, shown: Mapping[str, Any], config: Mapping[str, Any] | None, past: Mapping[str, Any]
) -> Iterator[Content]:
    """Yield the buttons that apply to the destination's state."""
    name, pending = shown["name"], shown["pending"]
    chosen = {"destination": name, "state": "pending"}
    where = ("--destination", name, "--state", "pending")
    if config is not None:
        yield from steering(visit, shown, _takes(shown, config, past))
    if pending and shown["held"] is None:
        yield action(
            visit, "Retry pending now", "deliveries", "retry", *where,
            call="POST deliveries/retry", body={"filter": chosen}, counts=True,
        )  # fmt: skip
    if shown["dead"] and config is not None:
        yield action(
            visit, "Send dead ones again", "deliveries", "retry", "--destination", name, "--state", "dead",
            call="POST deliveries/retry", body={"filter": {"destination": name, "state": "dead"}},
            count="deliveries that have already been sent again are left out", counts=True,
            rate=DEFAULT_RATE.count,
        )  # fmt: skip
    if pending:
        yield action(
            visit, "Cancel pending", "deliveries", "cancel", *where,
            call="POST deliveries/cancel", body={"filter": chosen}, counts=True, danger=True,
        )  # fmt: skip


async def _past(visit: Visit, name: str, span: Span) -> Mapping[str, Any]:
    """Return the history of a destination, or an empty mapping."""
    found: Sequence[Mapping[str, Any]]
    found = (await visit.ask("history", query=span.query(destination=name)))["destinations"]
    return found[0] if found else {}


def _history(visit: Visit, span: Span, name: str, past: Mapping[str, Any]) -> Markup:
    attempts, parts = visit.link("attempts", destination=name, since=span.since), []
    for key, label, unit, address in (
        ("succeeded", "Successful attempts", "", f"{attempts}&failed=0"),
        ("failed", "Failed attempts", "", f"{attempts}&failed=1"),
        ("p95_ms", "p95 duration", " ms", attempts),
        ("pending", "Pending", "", visit.link("deliveries", destination=name, state="pending")),
    ):
        values = [value for value in past.get(key, ()) if value is not None]
        if unit or key == "pending":
            figure = f"{values[-1]:,.0f}{unit}, at most {max(values):,.0f}{unit}" if values else NONE
        else:
            figure = number(round(sum(values))) if values else NONE
        shown: Sequence[float | None] = past.get(key, ())
        lost = shown if key == "failed" else ()
        link = tag("a", figure, href=address)
        parts.append((label, link, spark([value and 0.0 for value in lost] or shown, label, lost)))
    return charts(span, *parts)


def _failures(
    visit: Visit, span: Span, name: str, attempts: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Content, ...]]:
    """Yield a row for each kind of failure, the most frequent first."""
    counted: Counter[tuple[str, int | None]] = Counter()
    latest: dict[tuple[str, int | None], Mapping[str, Any]] = {}
    for each in attempts:
        kind = (each["result"], each["status"])
        counted[kind] += 1
        latest.setdefault(kind, each)
    for kind, count in counted.most_common():
        status = "none" if kind[1] is None else str(kind[1])
        address = visit.link("attempts", destination=name, result=kind[0], status=status, since=span.since)
        newest = latest[kind]
        yield (
            attempt_result(newest),
            tag("a", number(count), href=address),
            [
                tag("a", newest["type"], href=visit.link("deliveries", newest["delivery_id"])),
                " ",
                when(visit, newest["started_at"]),
            ],
        )


def _forecast(shown: Mapping[str, Any], config: Mapping[str, Any] | None, past: Mapping[str, Any]) -> str:
    """Return how long the backlog takes, from the duration of the latest attempts and the limits."""
    pending = shown["pending"]
    counts = f"{pending:,} pending, {shown['due']:,} due, {shown['in_flight'] or 0:,} in flight."
    takes = _takes(shown, config, past)
    if config is None or takes is None:
        return counts
    each = f"{config['concurrency']} attempts at once and {_quick(past)[-1]:,.0f} ms each"
    limit = f" and at most {config['rate_limit']}" if "rate_limit" in config else ""
    return f"{counts} With {each}{limit}, they take {takes}."


def _takes(shown: Mapping[str, Any], config: Mapping[str, Any] | None, past: Mapping[str, Any]) -> str | None:
    """Return how long the pending deliveries take; None without recent attempts to estimate it from.

    `concurrency`, `rate_limit` and the longest order key each give a lower bound; the highest one counts.
    """
    if config is None or not (quick := _quick(past)):
        return None
    pending, each = shown["pending"], quick[-1] / 1000
    seconds = pending * each / config["concurrency"]
    if "rate_limit" in config:
        rate = parse_rate(config["rate_limit"])
        seconds = max(seconds, pending * rate.seconds / rate.count)
    if shown["order"]:
        seconds = max(seconds, shown["order"]["longest"] * each)
    return f"about {duration(seconds)}" if seconds >= 1 else "less than 1 s"


def _quick(past: Mapping[str, Any]) -> list[float]:
    return [value for value in past.get("p50_ms", ()) if value is not None]


async def _oldest(visit: Visit, shown: Mapping[str, Any]) -> Content:
    rows = [
        (
            tag("a", each["type"], href=visit.link("deliveries", each["id"])),
            which,
            state(each["state"]),
            when(visit, each["created_at"]),
            each["last_error"] or NONE,
        )
        for which, each in (("oldest pending", shown["oldest"]), ("latest", shown["latest"]))
        if each
    ]
    return await table(
        visit,
        "Oldest pending and latest delivery",
        ("Delivery", "Which", "State", "Created", "Last error"),
        rows,
        empty=["No delivery yet. See which events it gets: ", command("destinations", "show", shown["name"])],
    )


def _settings(name: str, config: Mapping[str, Any] | None) -> Content:
    if config is None:
        return tag("p", "It is not in config.toml.")
    own = {key: value for key, value in config.items() if value != _DEFAULTS.get(key)}
    return [
        tag("h2", "Settings that differ from the defaults"),
        _as_text(name, own),
        tag("details", tag("summary", "All settings"), _as_text(name, config)),
    ]


def _as_text(name: str, config: Mapping[str, Any]) -> Markup:
    lines = "\n".join(as_toml({"destinations": {name: config}})).strip()
    return tag("pre", "\n", lines, tabindex=0, aria_label="Settings")
