"""Decisions about pending deliveries that are the same for every engine.

An engine reads rows, asks for the decision, and writes it in the same transaction.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from relay.base.clock import SECOND
from relay.model import ENDED_IN_FLIGHT, OPERATOR_SOURCE, Delivery, GeneratedEvent, Outcome, Target, ending_at
from relay.store.batch import Batch, Ending, HeldDestinations
from relay.store.claims import Claims

log = logging.getLogger("relay.store")

EXPIRE_AT_ONCE = 1000
"""Deliveries that one transaction expires; the next transaction follows at once."""

HELD_AT_ONCE = 500
"""Held deliveries that one transaction ends for a destination: waiting, first attempts and retries each."""

AHEAD = 60 * SECOND
"""Microseconds by which stored times may be later than now. A later one shows that the clock was wrong before
this start; then the due times of its deliveries are wrong as well, perhaps by years."""

NOTICE = 86_400 * SECOND
"""Microseconds between the warning to the operator and the first delivery that expires."""

CANCELLED: Ending = ("cancelled", "operator")
SUPERSEDED: Ending = ("expired", "superseded")

MARKS: Mapping[Ending, int] = {ending: mark for mark, ending in ENDED_IN_FLIGHT.items()}
"""`expires_at` of the deliveries in flight that are to end so."""

Place = tuple[str, str | None]
"""Destination and the key of a group or of `latest_by`."""


class Pending(NamedTuple):
    """The columns of a pending delivery that are needed to end it."""

    id: int
    destination: str
    order_key: str | None
    slot: int | None = None  # see `relay.base.shards`


class Reported(NamedTuple):
    """The part of a destination's state whose changes operators hear of."""

    is_disabled: bool
    is_open: bool  # its circuit


class GroupTimes(NamedTuple):
    """When the new deliveries of groups are due."""

    times: dict[int, int]  # by row id
    full: Sequence[Place]  # groups whose stored deliveries are due now


class HeldChanges(NamedTuple):
    """Changes of the destinations, or of their shards, that accept nothing. All times are steady."""

    gone: Sequence[str]  # they accept deliveries again
    new: Sequence[str]
    to_warn: Mapping[str, int]  # destinations that may need a warning, and when each stopped accepting
    to_expire: Sequence[str]
    before: int  # deliveries of `to_expire` that were due before expire


def add_reports(batch: Batch, stored: Mapping[str, Reported]) -> None:
    """Add the operator events about destinations whose stored state does not show the change already.

    `stored` has the states before this batch.
    """
    known = dict(stored)
    for state, event in batch.reports:
        before = known.get(state.name, Reported(is_disabled=False, is_open=False))
        after = Reported(state.disabled_at is not None, state.circuit_opened is not None)
        if after != before:
            batch.add_generated(OPERATOR_SOURCE, event)
        known[state.name] = after


def end_in_flight(outcomes: Iterable[Outcome], claims: Claims) -> list[Outcome]:
    """Return the outcomes; deliveries that were cancelled or superseded during their attempt end.

    A retry of a superseded delivery could reach the receiver after the newer event.
    """
    return [_ended_in_flight(outcome, claims) for outcome in outcomes]


def _ended_in_flight(outcome: Outcome, claims: Claims) -> Outcome:
    id_, state = outcome.delivery.id, outcome.state
    if state != "delivered" and id_ in claims.cancelled:
        return msgspec.structs.replace(outcome, state="cancelled", reason="operator", next_attempt_at=None)
    if state == "pending" and id_ in claims.superseded:
        ended, reason = SUPERSEDED
        return msgspec.structs.replace(outcome, state=ended, reason=reason, next_attempt_at=None)
    return outcome


def handle_dead(batch: Batch, dead: Sequence[Outcome]) -> None:
    """Raise an operator event for each dead delivery, and deliver its event to the `on_dead` destination."""
    for outcome in dead:
        delivery = outcome.delivery
        if (name := delivery.on_dead) is not None:
            options = None if delivery.event is None else batch.resolve(name, delivery.event)
            target = Target(
                name,
                grouping=None if options is None else options.grouping,
                is_spread=options is not None and options.is_spread,
            )
            batch.add_delivery(target, delivery.event_id, delivery.size, delivery.event)
        if delivery.event is None or delivery.event.source != OPERATOR_SOURCE:
            batch.add_generated(OPERATOR_SOURCE, _dead_event(outcome))


def _dead_event(outcome: Outcome) -> GeneratedEvent:
    delivery, attempt = outcome.delivery, outcome.attempt
    event = delivery.event
    return GeneratedEvent(
        type="delivery.dead",
        subject=delivery.destination,
        data={
            "delivery": delivery.public_id,
            "event": event.public_id if event is not None else None,
            "type": event.type if event is not None else None,
            "destination": delivery.destination,
            "reason": outcome.reason,
            "attempts": delivery.attempts + outcome.counts,
            "last_status": attempt.status if attempt is not None else None,
            "last_error": attempt.error if attempt is not None else None,
        },
    )


def supersede(batch: Batch, deliveries: Sequence[Delivery], pending: Sequence[Any]) -> list[Pending]:
    """Expire new deliveries that a newer event supersedes; returns the stored ones that are superseded.

    `pending` has row id, destination, order key, latest key, event and, if there are nodes, slot of the
    stored deliveries of the same keys. Events are compared, not deliveries: a replay of an old event does not
    supersede a newer event.
    """
    ages = [((d.destination, d.latest_key), (d.event_id, d.id)) for d in deliveries]
    ages += [((name, key), (event_id, id_)) for id_, name, _, key, event_id, *_ in pending]
    newest: dict[Place, tuple[int, int]] = {}
    for key, age in ages:
        newest[key] = max(age, newest.get(key, age))
    for d in deliveries:
        if newest[d.destination, d.latest_key] > (d.event_id, d.id):
            batch.ended_early[d.id] = SUPERSEDED
    return [
        Pending(id_, name, order_key, *slot)
        for id_, name, order_key, key, event_id, *slot in pending
        if newest[name, key] > (event_id, id_)
    ]


def by_ending(overdue: Iterable[Any]) -> dict[Ending, list[tuple[Any, ...]]]:
    """Group rows by how their deliveries end; the last column, `expires_at`, decides, and is removed."""
    found: dict[Ending, list[tuple[Any, ...]]] = {}
    for row in overdue:
        *columns, expires_at = row
        found.setdefault(ending_at(expires_at), []).append(tuple(columns))
    return found


def group_times(batch: Batch, deliveries: Sequence[Delivery], waiting: Sequence[Any]) -> GroupTimes:
    """Return when each new delivery is due: together with a waiting group, or with a new one.

    The first delivery of a group begins its wait, and all have the same due time. A group that is due
    already, because it is in flight or its destination is held, takes no more. A full group is due at once.
    `waiting` has destination, group key, number of deliveries and due time of the groups that wait.
    """
    groups = {(name, key): (count, due) for name, key, count, due in waiting}
    times: dict[int, int] = {}
    members: dict[Place, list[int]] = {}
    full: dict[Place, None] = {}
    for delivery in deliveries:
        grouping, place = batch.groupings[delivery.id], (delivery.destination, delivery.group_key)
        count, due = groups.get(place, (0, batch.steady + grouping.wait))
        times[delivery.id] = due
        members.setdefault(place, []).append(delivery.id)
        groups[place] = (count + 1, due)
        if count + 1 >= grouping.most:
            times.update(dict.fromkeys(members.pop(place), batch.steady))
            del groups[place]
            full[place] = None
    return GroupTimes(times, list(full))


def held_changes(batch: Batch, held: HeldDestinations, known: Mapping[str, tuple[int, bool]]) -> HeldChanges:
    """Decide about the destinations that accept nothing: their deliveries expire a day after a warning.

    `known` has the stored ones, each with the time at which it stopped accepting, and whether the operator
    was warned. The time is stored so that a restart does not extend the period. Destinations of other nodes
    stay unchanged.
    """
    before, notice = batch.steady - held.kept, min(NOTICE, held.kept // 2)
    scope, since = batch.scope, {name: known[name][0] for name in sorted(held.names & known.keys())}
    return HeldChanges(
        gone=[each for each in sorted(known.keys() - held.names) if scope is None or scope.covers_lane(each)],
        new=sorted(held.names - known.keys()),
        to_warn={name: at for name, at in since.items() if not known[name][1] and at <= before + notice},
        to_expire=[name for name, at in since.items() if at <= before],
        before=before,
    )


def is_warning_due(batch: Batch, since: int, kept: int, first: int | None) -> int | None:
    """Return the seconds until held deliveries expire if the operator must be warned now; None: not yet.

    `since` is when the destination stopped accepting, `first` the due time of its oldest delivery.
    """
    if first is None or max(first, since) > batch.steady - kept + min(NOTICE, kept // 2):
        return None
    return max(0, max(first, since) + kept - batch.steady) // SECOND


def report_ahead(count: int) -> None:
    """Log that deliveries from a time when the clock was ahead are due now."""
    if count:
        log.warning("the clock was ahead when %d deliveries were stored or tried: they are due now", count)


def warn_of_expiry(batch: Batch, destination: str, seconds: int, kept: int) -> None:
    """Raise the operator event `relay.deliveries.expiring`."""
    data = {"destination": destination, "expires_in_seconds": seconds, "held": kept // SECOND}
    event = GeneratedEvent(type="deliveries.expiring", subject=destination, data=data)
    batch.add_generated(OPERATOR_SOURCE, event)
