"""Checks of `relay doctor` about stored data, from rows that an engine has read."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from relay.base.clock import SECOND, rfc3339
from relay.model import Check, Counts
from relay.store.rows import worker_of
from relay.workers.rules import changes_a_path

SAMPLE = 200
"""Events whose bodies are compared with their digests, spread evenly over all events."""

AHEAD = 300 * SECOND
"""Microseconds: an event further in the future means that the clock is or was wrong."""

SHOWN = 5  # ids in one finding


def passed(name: str, detail: str) -> Check:
    """Return the result of a check that found no problem."""
    return Check(name=name, ok=True, detail=detail)


def failed(name: str, detail: str, hint: str) -> Check:
    """Return the result of a check that found a problem."""
    return Check(name=name, ok=False, detail=detail, hint=hint)


def conservation(ledger: Mapping[str, Counts], report: str) -> Check:
    """Compare the ledger of each destination with its pending deliveries; `report` is the advice."""
    wrong = [f"{name} ({counts.unaccounted:+d})" for name, counts in ledger.items() if counts.unaccounted]
    if wrong:
        return failed("conservation", f"deliveries not accounted for: {', '.join(wrong)}", report)
    total = sum(counts.created for counts in ledger.values())
    return passed("conservation", f"deliveries accounted for: {total}")


def stuck(found: Sequence[str], report: str) -> Check:
    """Report pending deliveries that never become due, by their public ids."""
    if found:
        detail = f"deliveries that never become due: {len(found)}, the first is {found[0]}"
        return failed("stuck", detail, report)
    return passed("stuck", "every pending delivery becomes due")


def dead(found: Sequence[tuple[str, int]]) -> Check:
    """Report dead deliveries that were not repeated, by destination."""
    if not found:
        return passed("dead", "no dead deliveries")
    names = ", ".join(f"{name} ({number})" for name, number in found)
    hints = [f"relay deliveries list --destination {found[0][0]} --state dead shows why"]
    hints += [f"relay deliveries retry --destination {name} --state dead" for name, _ in found]
    return failed("dead", f"dead deliveries: {names}", "; ".join(hints))


def sources(paused: Iterable[str], known: Collection[str] | None) -> Check:
    """Report paused sources, whose senders are refused; `known` are those of the configuration."""
    if names := [name for name in paused if known is None or name in known]:
        hint = "; ".join(f"relay sources resume {name}" for name in names)
        return failed("sources", f"paused, their senders get 503: {', '.join(names)}", hint)
    return passed("sources", "no source is paused")


def is_intact(digest: bytes, size: int, body: bytes) -> bool:
    """Return whether a body is unchanged since its receipt; no other check notices a flipped bit."""
    return len(body) == size and hashlib.sha256(body).digest() == digest


def clock(latest: int | None, now: int) -> Check:
    """Report events in the future, from the latest time of receipt and the current time."""
    if latest is not None and latest > now + AHEAD:
        detail = f"the latest event was received at {rfc3339(latest)}, but it is now {rfc3339(now)}"
        return failed("clock", detail, "the machine's clock is wrong or was wrong: timedatectl")
    return passed("clock", rfc3339(now))


def destinations(ledger: Mapping[str, Counts], known: Collection[str] | None) -> Check:
    """Report pending deliveries of destinations that are no longer in the configuration."""
    if known is None:
        return passed("destinations", "the configuration is unknown")
    lost = [
        f"{name} ({counts.pending})"
        for name, counts in ledger.items()
        if counts.pending and name not in known
    ]
    if lost:
        return failed(
            "destinations",
            f"pending deliveries of destinations that are not in config.toml: {', '.join(lost)}",
            "add them to config.toml again, or cancel their deliveries; [retention] held expires them",
        )
    return passed("destinations", "every pending delivery has a configured destination")


def workers(rows: Iterable[tuple[str, str, str, bytes]]) -> Check:
    """Report workers whose clients must percent-encode their ids; rows are source, id, status and record."""
    odd, lost = 0, []
    for source, id_, status, record in rows:
        if (part := changes_a_path(id_)) and worker_of(record).unregistered_at is None:
            odd += 1
            if status == "OFFLINE":
                lost.append(f"{id_!r} of {source} ({part!r})")
    if lost:
        detail = f"OFFLINE workers whose ids need percent-encoding in paths: {', '.join(lost[:SHOWN])}"
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        hint = "percent-encode the ids in their clients or change them; then run relay workers forget"
        return failed("workers", detail + more, hint)
    needing = f"workers whose clients percent-encode their ids: {odd}"
    return passed("workers", needing if odd else "no worker id needs percent-encoding")
