"""The timeline of an event, from its sender to every destination, including those that do not get it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from relay.api.words import END_REASONS, held_text, repeated_text
from relay.ui.markup import Content, Markup, maker, tag
from relay.ui.page import Visit
from relay.ui.parts import action, attempt_result, clock, duration, state, took, when

MOST_ATTEMPTS = 60
"""Maximum number of attempts in a timeline; the page of a delivery has more."""

MOST_WAYS = 50
"""Maximum number of destinations with deliveries; those without success come first."""

MOST_REPEATS = 5
"""Maximum number of deliveries per destination; the latest ones are shown."""

OPEN_STEPS = 5
"""At most this number of steps is open at first, if the destination has not received the event."""

MOST_NAMED = 3
"""Up to this number, destinations without a matching pattern have a line each; more share one line."""

MINUTE = 60
"""Seconds below which a duration is shown with milliseconds."""

NOT_SENT = "not sent"


async def line_of(
    visit: Visit,
    event: Mapping[str, Any],
    matches: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
) -> Markup:
    """Return the timeline of an event; other tasks run between the destinations.

    Args:
        visit: the request for the page.
        event: as `GET /api/events/{id}` returns it.
        matches: `destinations` of the explanation: whether and why each destination gets it.
        attempts: of all its deliveries, latest first.
    """
    ways: list[Markup] = []
    for each in _ways(visit, event, matches, attempts):
        ways.append(each)
        await visit.turns.give()
    sent = len({each["destination"] for each in event["owed"]})
    all_ = len({each["destination"] for each in event["owed"]} | {each["name"] for each in matches})
    title = f"Goes to {sent} of {all_} destinations" if all_ else "config.toml has no destinations"
    ways_ = tag("ol", ways, class_="ways", role="list") if ways else None
    fan = tag("li", tag("strong", title), ways_, class_="fan")
    return tag("ol", *_arrival(visit, event), fan, class_="line", role="list")


def _arrival(visit: Visit, event: Mapping[str, Any]) -> Iterator[Content]:
    """Yield the steps between the sender and the store."""
    at = event["received_at"]
    source = tag("a", event["source"], href=visit.link("events", source=event["source"]))
    yield tag("li", tag("strong", "Received"), " ", clock(at), " by ", source)
    created = [each["created_at"] for each in event["owed"] if each["replay_of"] is None]
    if created:
        yield tag("li", tag("strong", "Stored"), " ", clock(min(created), at))
    first = [each for each in event["replies"] if each["received_at"] == at]
    others = [each for each in event["replies"] if each["received_at"] != at]
    if first:
        yield tag("li", tag("strong", "Answered"), " ", reply(first[0]))
    if event["repetitions"]:
        steps = [tag("li", clock(each["received_at"], at), " ", reply(each)) for each in others]
        yield tag(
            "li", tag("strong", "Repeated"), f" {repeated_text(event['repetitions'])}, answered with this id",
            tag("ol", steps) if steps else None,
        )  # fmt: skip


def reply(sent: Mapping[str, Any]) -> Content:
    """Return the status and the duration of a reply, and whether the sender received it."""
    text = f"HTTP {sent['status']} in {took(sent['duration_ms'])}"
    if sent["heard"]:
        return state("delivered", text)
    return [state("expired", text), "; the sender had disconnected"]


def _ways(
    visit: Visit,
    event: Mapping[str, Any],
    matches: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
) -> Iterator[Markup]:
    """Yield a line for each destination, first for those with a delivery."""
    deliveries: dict[str, list[Mapping[str, Any]]] = {}
    for each in reversed(event["owed"]):  # oldest first
        deliveries.setdefault(each["destination"], []).append(each)
    own: dict[str, list[Mapping[str, Any]]] = {}
    for attempt in reversed(attempts):
        own.setdefault(attempt["delivery_id"], []).append(attempt)
    holds = {each["name"]: each["held"] for each in matches}
    most = max(1, MOST_ATTEMPTS // max(1, len(event["owed"])))
    names = list(deliveries)
    if len(names) > MOST_WAYS:
        names.sort(key=lambda name: deliveries[name][-1]["state"] == "delivered")
    for name in names[:MOST_WAYS]:
        yield _sent(visit, deliveries[name], own, holds.get(name, "not_in_config"), most)
    if len(names) > MOST_WAYS:
        to = tag("span", f"{len(names) - MOST_WAYS:,} others", class_="to")
        link = visit.link("deliveries", event_id=event["id"])
        yield tag("li", to, tag("a", "all deliveries of this event", href=link))
    rest = [each for each in matches if each["name"] not in deliveries]
    for each in rest:
        if each["reason"] not in _BY_TYPE:
            yield _not_sent(visit, event["id"], each)
    yield from _other_types(visit, event, [each for each in rest if each["reason"] in _BY_TYPE])


_BY_TYPE = ("no_pattern", "taken_away")


def _sent(
    visit: Visit,
    deliveries: Sequence[Mapping[str, Any]],
    attempts: Mapping[str, Sequence[Mapping[str, Any]]],
    held: str | None,
    most: int,
) -> Markup:
    """Return the line of a destination.

    Args:
        visit: the request for the page.
        deliveries: to the destination, oldest first.
        attempts: by the id of the delivery, oldest first.
        held: why the destination is held, as in the explanation of the event.
        most: the number of attempts of each delivery to show.
    """
    latest, since = deliveries[-1], deliveries[0]["created_at"]
    name = latest["destination"]
    own = attempts.get(latest["id"], ())
    steps: list[Markup] = []
    for each in deliveries[-MOST_REPEATS:]:
        link = visit.link("deliveries", each["id"])
        if each is not deliveries[0]:
            steps.append(tag("li", clock(each["created_at"], since), " ", tag("a", "sent again", href=link)))
        made = attempts.get(each["id"], ())
        if len(made) > most:
            steps.append(tag("li", tag("a", f"{len(made) - most:,} earlier attempts", href=link)))
        steps += steps_of(visit, each, made[-most:], since, is_held=held is not None)
    is_plain = len(steps) == 1 and latest["state"] == "delivered"
    is_open = latest["state"] != "delivered" and len(steps) <= OPEN_STEPS
    return _way(
        _to(name, href=visit.link("destinations", name)),
        tag("a", state(latest["state"]), href=visit.link("deliveries", latest["id"])),
        _how(*_join(_outcome(visit, latest, own, held))),
        _actions(*changes_of(visit, latest, of=name)),
        tag("details", _summary(deliveries, own), tag("ol", steps), open=is_open)
        if steps and not is_plain
        else None,
    )


_way, _to = maker("li"), maker("a", class_="to")
_how, _actions = maker("span", class_="how"), maker("span", class_="actions")


def _summary(deliveries: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the line above the steps of a destination, which has these attempts of the latest delivery."""
    noun = "attempt" if len(attempts) == 1 else "attempts"
    return tag("summary", f"{len(attempts)} {noun}" + ("" if len(deliveries) == 1 else ", sent again"))


def changes_of(visit: Visit, delivery: Mapping[str, Any], *, of: str | None = None) -> Iterator[Content]:
    """Yield the buttons that change one delivery; `of` as for `action`."""
    id_, pending = delivery["id"], delivery["state"] == "pending"
    yield action(
        visit, "Send now" if pending else "Send again", "deliveries", "retry", id_,
        call="POST deliveries/retry", body={"ids": [id_]}, count="1 delivery", of=of,
    )  # fmt: skip
    if pending:
        yield action(
            visit, "Cancel", "deliveries", "cancel", id_,
            call="POST deliveries/cancel", body={"ids": [id_]}, count="1 delivery", danger=True, of=of,
        )  # fmt: skip


def _outcome(
    visit: Visit,
    delivery: Mapping[str, Any],
    attempts: Sequence[Mapping[str, Any]],
    held: str | None,
) -> Iterator[Content]:
    """Yield how the latest delivery to a destination ended, or what it waits for."""
    since, is_first = delivery["created_at"], delivery["replay_of"] is None
    if attempts:
        last = attempts[-1]
        result = last["error"] or f"HTTP {last['status']}"
        yield f"{nth(len(attempts))} attempt: {result} in {took(last['duration_ms'])}"
    elif delivery["last_error"]:
        yield delivery["last_error"]
    elif delivery["state"] == "pending":
        yield "no attempt yet"
    if delivery["state"] == "pending":
        yield from _waits(visit, delivery, held)
    elif delivery["reason"]:
        yield END_REASONS.get(delivery["reason"], delivery["reason"])
    if delivery["state"] == "dead" and held is not None and held.startswith("disabled"):
        yield tag("strong", f"the destination is {held_text(held)}", class_="bad")
    if delivery["finished_at"]:
        yield clock(delivery["finished_at"], since)
    if delivery["state"] == "delivered":
        word = "receipt" if is_first else "it was sent again"
        yield f"{_between(since, delivery['finished_at'])} after {word}"


def _between(start: str, end: str) -> str:
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    return took(1000 * max(0.0, seconds)) if seconds < MINUTE else duration(seconds)


def _waits(visit: Visit, delivery: Mapping[str, Any], held: str | None) -> Iterator[Content]:
    """Yield what a pending delivery waits for."""
    if held is not None:
        reason, _, until = held.partition(" until ")
        word = ", next probe " if reason == "circuit open" else " until "
        end = [word, clock(until, delivery["created_at"])] if until else None
        yield [tag("strong", held_text(reason), class_="warn"), end]
    if delivery["next_attempt_at"] is None:
        yield "waits for an earlier delivery of its order key"
    elif held is None:
        yield ["next ", when(visit, delivery["next_attempt_at"])]


def _join(parts: Iterable[Content]) -> Iterator[Content]:
    for number, part in enumerate(parts):
        if number:
            yield " · "
        yield part


def created(delivery: Mapping[str, Any]) -> Markup:
    """Return the first step of a delivery."""
    word = "Created" if delivery["replay_of"] is None else "Sent again"
    return tag("li", clock(delivery["created_at"]), " ", word)


def steps_of(
    visit: Visit,
    delivery: Mapping[str, Any],
    attempts: Sequence[Mapping[str, Any]],
    since: str,
    *,
    is_held: bool = False,
) -> Iterator[Markup]:
    """Yield the steps of a delivery in order: its attempts, and its end unless an attempt ended it.

    Args:
        visit: the request for the page.
        delivery: as in a list.
        attempts: of the delivery, oldest first.
        since: times of the same day are shown without the date.
        is_held: whether the destination is held; then the time of the next attempt is unknown.
    """
    for each in attempts:
        yield tag(
            "li", clock(each["started_at"], since), " ", attempt_result(each),
            f" in {took(each['duration_ms'])}", _group(each),
        )  # fmt: skip
    if delivery["reason"]:
        reason = END_REASONS.get(delivery["reason"], delivery["reason"])
        ended = state(delivery["state"], f"{delivery['state']}: {reason}")
        yield tag("li", clock(delivery["finished_at"], since), " ", ended)
    elif delivery["next_attempt_at"] and not is_held:
        at = delivery["next_attempt_at"]
        yield tag("li", clock(at, since), " ", state("pending", "next attempt"), " ", when(visit, at))


def _group(attempt: Mapping[str, Any]) -> str | None:
    size = attempt["group_size"]
    return None if size is None else f", in one message with {size - 1:,} other deliveries"


def _not_sent(visit: Visit, event: str, match: Mapping[str, Any]) -> Markup:
    """Return the line of a destination that does not get the event, with the condition that failed."""
    name = match["name"]
    lines: Content = [tag("div", each.removeprefix("no: ")) for each in match["lines"]]
    again: Content = None
    if match["matches"]:
        lines = "matches the event now, but did not when the event arrived"
        again = action(
            visit, "Send", "events", "replay", event, "--to", name,
            call="POST replays", body={"events": [event], "to": name}, count="1 event",
        )  # fmt: skip
    return tag(
        "li",
        tag("a", name, href=visit.link("destinations", name), class_="to"),
        state("", NOT_SENT),
        tag("span", lines, class_="how"),
        tag("span", again, class_="actions") if again else None,
    )


def _other_types(
    visit: Visit, event: Mapping[str, Any], matches: Sequence[Mapping[str, Any]]
) -> Iterator[Markup]:
    """Yield the lines of destinations that subscribe to other types."""
    if len(matches) <= MOST_NAMED:
        yield from (_not_sent(visit, event["id"], each) for each in matches)
        return
    names = [
        [", " if number else None, tag("a", each["name"], href=visit.link("destinations", each["name"]))]
        for number, each in enumerate(matches)
    ]
    summary = tag("summary", "subscribe to other types")
    to = tag("span", f"{len(matches):,} others", class_="to")
    yield tag("li", to, state("", NOT_SENT), tag("details", summary, names, class_="how"))


def nth(number: int) -> str:
    """Return an ordinal.

    >>> nth(1), nth(2), nth(3), nth(11), nth(22)
    ('1st', '2nd', '3rd', '11th', '22nd')
    """
    teens = number % 100 in (11, 12, 13)
    return f"{number:,}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
