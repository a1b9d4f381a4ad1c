"""Transitions of pending deliveries in PostgreSQL that need more than one statement.

Deliveries expire (past their time to live, superseded, or held for too long), are cancelled, are made due,
and are repeated as new deliveries. When a delivery of an order key ends, the next one of the key becomes due.

The rows of `order_keys` are locks. A transaction that adds or ends a delivery of a key first changes the
key's row. It reads the key's deliveries in a later statement, which sees the commits of other transactions.
In one statement, the end of a delivery would not see a delivery that is being inserted after it, and that
delivery would wait for ever.

Nodes that lock keys in different orders would wait for each other until the server ends one of the
transactions, after a second. So a transaction that changes keys in several steps locks all of them first, in
sorted order, and before any other row (`lock_keys`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from relay.base.shards import Shards, destination_of
from relay.model import Delivery
from relay.store.batch import Batch, Ending, HeldDestinations, Scope
from relay.store.claims import Claims
from relay.store.postgres.rows import text, uuid_of
from relay.store.postgres.transaction import Transaction
from relay.store.transitions import (
    CANCELLED,
    EXPIRE_AT_ONCE,
    HELD_AT_ONCE,
    MARKS,
    SUPERSEDED,
    Pending,
    Reported,
    add_reports,
    by_ending,
    group_times,
    held_changes,
    is_warning_due,
    supersede,
    warn_of_expiry,
)

Key = tuple[str, str | None]
"""Destination and order key."""

LOCK_SQL = """
    INSERT INTO order_keys AS k (destination, order_key, pending)
    SELECT * FROM unnest($1::text[], $2::text[], $3::int[])
    ON CONFLICT (destination, order_key) DO UPDATE SET pending = k.pending + excluded.pending
"""
BUSY_SQL = """
    SELECT k.destination, k.order_key FROM unnest($1::text[], $2::text[]) AS k (destination, order_key)
     WHERE EXISTS (SELECT 1 FROM owed AS o WHERE o.destination = k.destination AND o.order_key = k.order_key)
"""
HELD_SQL = """
    INSERT INTO held (destination, since) SELECT name, $2 FROM unnest($1::text[]) AS n (name)
        ON CONFLICT DO NOTHING
"""
WARNING_LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry warning'))"
REPORTED_SQL = """
    INSERT INTO destinations AS d (name) SELECT * FROM unnest($1::text[]) AS n (name)
        ON CONFLICT (name) DO UPDATE SET name = excluded.name
    RETURNING name, disabled_at IS NOT NULL, circuit_opened IS NOT NULL, EXISTS (
              SELECT FROM leases AS l WHERE l.name = 'lane:' || d.name
                 AND l.incarnation <> $2::uuid AND l.until > clock_timestamp())
"""
FREE_SQL = """
    UPDATE owed SET next_attempt_at = $3
     WHERE next_attempt_at IS NULL AND id IN (
           SELECT (SELECT min(o.id) FROM owed AS o
                    WHERE o.destination = k.destination AND o.order_key = k.order_key)
             FROM unnest($1::text[], $2::text[]) AS k (destination, order_key))
    RETURNING destination
"""
FORGET_SQL = """
    DELETE FROM order_keys AS k USING unnest($1::text[], $2::text[]) AS f (destination, order_key)
     WHERE k.destination = f.destination AND k.order_key = f.order_key AND k.pending <= 0
"""
# A node that was suspended must not end deliveries that another node may be sending. It may use a former
# number of shards: then it does not hold the lease of its shard, or the destination has been divided since.
END_SQL = """
    WITH gone AS (
         DELETE FROM owed AS o USING unnest($1::bigint[], $6::text[]) AS e (id, lane)
          WHERE o.id = e.id
            AND CASE WHEN strpos(e.lane, '/') = 0 THEN NOT EXISTS (
                     SELECT FROM leases AS l WHERE l.name = 'lane:' || e.lane AND l.until > clock_timestamp()
                        AND (l.incarnation <> $5::uuid OR coalesce((l.standing ->> 'shards')::int, 1) <> 1))
                ELSE EXISTS (
                     SELECT FROM leases AS l WHERE l.name = 'lane:' || e.lane
                        AND l.incarnation = $5::uuid AND l.until > clock_timestamp()) END
         RETURNING o.id, o.event_id, o.destination, o.attempts, o.last_status, o.last_error)
    INSERT INTO ends (delivery_id, event_id, destination, state, reason, attempts, finished_at, last_status,
                      last_error)
    SELECT id, event_id, destination, $2, $3, attempts, $4, last_status, last_error FROM gone
    RETURNING delivery_id
"""
EXPIRED_SQL = """
    SELECT id, destination, order_key, slot, expires_at FROM owed
     WHERE expires_at <= $1
       AND ($3::bool OR destination = ANY($4::text[]) OR ($5::bool AND destination <> ALL($6::text[]))
            OR (destination, coalesce(slot, 0)) IN (SELECT * FROM unnest($7::text[], $8::int[])))
     ORDER BY expires_at LIMIT $2
"""
SUPERSEDED_SQL = """
    SELECT o.id, o.destination, o.order_key, o.slot FROM owed AS o
     WHERE o.destination = ANY($1::text[]) AND o.latest_key IS NOT NULL
       AND (o.destination <> ALL($3::text[])
            OR (o.destination, coalesce(o.slot, 0)) IN (SELECT * FROM unnest($3::text[], $4::int[])))
       AND EXISTS (SELECT 1 FROM owed AS n
                    WHERE n.destination = o.destination AND n.latest_key = o.latest_key
                      AND (n.event_id, n.id) > (o.event_id, o.id))
     LIMIT $2
"""
MARK_SQL = """
    UPDATE owed SET expires_at = $2 WHERE id = ANY($1::bigint[]) AND (expires_at IS NULL OR expires_at > $2)
"""
CHOSEN_SQL = "SELECT id, destination, order_key, slot FROM owed WHERE id = ANY($1::bigint[])"
LATEST_SQL = """
    SELECT o.id, o.destination, o.order_key, o.latest_key, o.event_id, o.slot
      FROM unnest($1::text[], $2::text[]) AS w (destination, latest_key)
      JOIN owed AS o USING (destination, latest_key)
"""
LATEST_KEYS_SQL = """
    SELECT DISTINCT destination, order_key
      FROM unnest($1::text[], $2::text[]) AS w (destination, latest_key)
      JOIN owed AS o USING (destination, latest_key)
     WHERE o.order_key IS NOT NULL
"""
GROUPS_SQL = """
    SELECT g.destination, g.group_key, count(*), min(o.next_attempt_at)
      FROM unnest($1::text[], $2::text[]) AS g (destination, group_key)
      JOIN owed AS o USING (destination, group_key)
     WHERE o.attempts = 0 AND o.next_attempt_at > $3
     GROUP BY 1, 2
"""
FILLED_SQL = """
    UPDATE owed AS o SET next_attempt_at = $3
      FROM unnest($1::text[], $2::text[]) AS g (destination, group_key)
     WHERE o.destination = g.destination AND o.group_key = g.group_key AND o.attempts = 0
       AND o.next_attempt_at > $3
"""
MAKE_DUE_SQL = """
    UPDATE owed SET next_attempt_at = $2 WHERE id = ANY($1::bigint[]) AND next_attempt_at > $2
    RETURNING id, destination
"""
REPEAT_SQL = """
    SELECT c.event_id, c.destination,
           (SELECT max(d.id) FROM deliveries AS d
             WHERE d.event_id = c.event_id AND d.destination = c.destination)
      FROM unnest($1::bigint[], $2::text[]) AS c (event_id, destination)
      JOIN events AS e ON e.id = c.event_id
     WHERE NOT EXISTS (SELECT 1 FROM owed AS o
                        WHERE o.event_id = c.event_id AND o.destination = c.destination)
       FOR KEY SHARE OF e  -- so that retention does not drop the event meanwhile
"""
IMPORT_LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry import'))"
"""Serializes imports, so that two nodes which import the same event do not store it twice."""

STORED_SQL = "SELECT public_id FROM events WHERE public_id = ANY($1::uuid[])"

# A delivery that waits behind an earlier one of its order key has no due time; its creation time counts.
# Waiting deliveries end first, so that the end of an earlier one does not make them due.
WAITING_SQL = """
    SELECT id, destination, order_key, slot FROM (
           SELECT id, destination, order_key, slot, created_at FROM owed
            WHERE destination = $1 AND attempts = 0 AND next_attempt_at IS NULL
              AND ($4::int[] IS NULL OR coalesce(slot, 0) = ANY($4))
            ORDER BY id LIMIT $3) AS w
     WHERE created_at <= $2
"""
DUE_SQL = """
    SELECT id, destination, order_key, slot FROM owed
     WHERE destination = $1 AND attempts {share} 0 AND next_attempt_at <= $2
       AND ($4::int[] IS NULL OR coalesce(slot, 0) = ANY($4))
     ORDER BY next_attempt_at, id LIMIT $3
"""
# With `id IN (SELECT …)`, the server would read the whole table at each start.
AHEAD_SQL = """
    UPDATE owed SET next_attempt_at = $1
     WHERE next_attempt_at > $1
       AND ((id > $3 AND created_at > $2)
            OR id = ANY(ARRAY(SELECT delivery_id FROM attempts WHERE id > $3 AND started_at > $2)))
    RETURNING id
"""
FIRST_SQL = """
    SELECT min(next_attempt_at) FROM owed
     WHERE destination = $1 AND attempts {share} 0 AND ($2::int[] IS NULL OR coalesce(slot, 0) = ANY($2))
"""
SHARES = ("=", ">")  # first attempts and retries, as the partial indexes have them


class Requested(NamedTuple):
    """The pending deliveries that a batch may end on request: id, destination, order key and slot."""

    overdue: Sequence[Any] = ()  # with `expires_at`, which they have reached
    superseded: Sequence[Any] = ()
    to_cancel: Sequence[Any] = ()


NOTHING = Requested()


def is_requested(batch: Batch) -> bool:
    """Return whether an operator or a periodic job requests changes of deliveries."""
    return bool(
        batch.expire_overdue
        or batch.held
        or batch.to_cancel
        or batch.to_make_due
        or batch.to_repeat
        or batch.to_restore
    )


def has_options(delivery: Delivery) -> bool:
    """Return whether a new delivery has columns in addition to those that every delivery has."""
    return (
        delivery.order_key is not None
        or delivery.latest_key is not None
        or delivery.expires_at is not None
        or delivery.on_dead is not None
        or delivery.replay_of is not None
        or delivery.group_key is not None
        or delivery.slot is not None
    )


def waits_for_others(delivery: Delivery) -> bool:
    """Return whether stored deliveries decide about a new one."""
    return delivery.order_key is not None or delivery.latest_key is not None or delivery.group_key is not None


async def after_outcomes(batch: Batch, transaction: Transaction) -> None:
    """Make followers of ended deliveries due, and split groups."""
    if batch.ungrouped:
        await transaction.fetch(
            "UPDATE owed SET group_key = NULL WHERE id = ANY($1::bigint[])", list(batch.ungrouped)
        )
    await free(
        batch,
        transaction,
        [
            (outcome.delivery.destination, outcome.delivery.order_key)
            for outcome in batch.outcomes
            if outcome.state != "pending"
            and outcome.delivery.order_key is not None
            and outcome.delivery.id in batch.settled
        ],
    )


async def find_requested(batch: Batch, transaction: Transaction) -> Requested:
    """Read the deliveries that operators or periodic jobs want to end; call it before `lock_keys`."""
    overdue: Sequence[Any] = ()
    superseded: Sequence[Any] = ()
    to_cancel: Sequence[Any] = ()
    if batch.expire_overdue:
        scope = batch.scope or Scope(frozenset(), frozenset(), has_orphans=False)
        mine = sorted(scope.mine)
        overdue = await transaction.fetch(
            EXPIRED_SQL, batch.steady, EXPIRE_AT_ONCE, batch.scope is None, mine, scope.has_orphans,
            sorted(scope.known), *scope.slots,
        )  # fmt: skip
        if mine:  # a single daemon ends them when it stores the newer event
            names = sorted(set(map(destination_of, mine)))
            superseded = await transaction.fetch(SUPERSEDED_SQL, names, EXPIRE_AT_ONCE, *scope.slots)
    if batch.to_cancel:
        rows = await transaction.fetch(CHOSEN_SQL, list(dict.fromkeys(batch.to_cancel)))
        to_cancel = [row for row in rows if _ends_here(batch, row["destination"], row["slot"])]
    if batch.to_restore and batch.scope is not None:
        await transaction.fetch(IMPORT_LOCK_SQL)
    return Requested(overdue, superseded, to_cancel)


async def write_requested(
    batch: Batch, transaction: Transaction, claims: Claims, requested: Requested
) -> None:
    """Write the changes of deliveries that operators and periodic jobs request."""
    if batch.expire_overdue:
        for ending, overdue in by_ending(requested.overdue).items():
            await end(batch, transaction, claims, overdue, ending)
        older = [row for row in requested.superseded if row["id"] not in batch.ended]
        await end(batch, transaction, claims, older, SUPERSEDED)
    if batch.held is not None:
        await _expire_held(batch, transaction, claims, batch.held)
    if batch.to_cancel:
        over = {o.delivery.id for o in batch.outcomes if o.state != "pending"} & batch.settled
        rows = [row for row in requested.to_cancel if row["id"] not in over]
        await end(batch, transaction, claims, rows, CANCELLED)
        batch.cancelled_in_flight = {row["id"] for row in rows} - batch.ended.keys()
    if batch.to_make_due:
        made_due = await transaction.fetch(MAKE_DUE_SQL, batch.to_make_due, batch.steady)
        batch.made_due = dict(made_due)
    if batch.to_repeat:
        await _repeat(batch, transaction)
    if batch.to_restore:
        await _restore(batch, transaction)


def _ends_here(batch: Batch, destination: str, slot: int | None) -> bool:
    """Return whether this node may end a delivery without an attempt."""
    return batch.scope is None or batch.scope.covers(destination, slot)


def _lane_of(batch: Batch, pending: Pending) -> str:
    """Return the lane whose lease permits to end a delivery."""
    name, slot, scope = pending.destination, pending.slot, batch.scope
    return name if scope is None or not scope.owns(name, slot) else scope.lane_of(name, slot)


async def end(
    batch: Batch, transaction: Transaction, claims: Claims, rows: Iterable[Any], ending: Ending
) -> None:
    """End pending deliveries (id, destination, order key, slot) without an attempt, except those in flight.

    A delivery whose outcome this transaction has written is no longer in flight. Those in flight that are
    cancelled or superseded are marked, because their outcomes may be lost with this node.
    """
    candidates = {row[0]: Pending(*row) for row in rows}
    chosen = sorted(id_ for id_ in candidates if id_ in batch.settled or claims.end(id_))
    in_flight = sorted(candidates.keys() - set(chosen))
    if ending == SUPERSEDED:
        batch.superseded_in_flight.update(in_flight)
    if in_flight and ending in MARKS:
        await transaction.fetch(MARK_SQL, in_flight, MARKS[ending])
    if not chosen:
        return
    state, reason = ending
    lanes = [_lane_of(batch, candidates[id_]) for id_ in chosen]
    gone = await transaction.fetch(END_SQL, chosen, state, reason, batch.wall, batch.incarnation, lanes)
    ended = [candidates[id_] for (id_,) in gone]
    batch.ended.update({each.id: (each.destination, ending) for each in ended})
    await free(
        batch,
        transaction,
        [(each.destination, each.order_key) for each in ended if each.order_key is not None],
    )


async def report_changes(batch: Batch, transaction: Transaction) -> None:
    """Add the operator events about the states of destinations; call it before any other row is locked.

    The rows stay locked until the commit, so that the next owner of a lane knows what this node has reported.
    A node that has lost the lane meanwhile reports nothing.
    """
    names = sorted({state.name for state, _ in batch.reports})
    rows = await transaction.fetch(REPORTED_SQL, names, batch.incarnation)
    mine = {row[0] for row in rows if not row[3]}
    batch.reports = [(state, event) for state, event in batch.reports if state.name in mine]
    add_reports(batch, {row[0]: Reported(row[1], row[2]) for row in rows})


async def free(batch: Batch, transaction: Transaction, keys: Sequence[Key]) -> None:
    """Make the next delivery of each order key due after an earlier one has ended."""
    if not keys:
        return
    places = await _lock(transaction, Counter({key: -count for key, count in Counter(keys).items()}))
    rows = await transaction.fetch(FREE_SQL, *places, batch.steady)
    batch.woken.update(destination for (destination,) in rows)
    await transaction.fetch(FORGET_SQL, *places)


async def _lock(transaction: Transaction, changes: Counter[Key]) -> tuple[list[str], list[str | None]]:
    """Lock order keys in sorted order and change their numbers of pending deliveries; returns the columns."""
    rows = sorted((name, text(key), change) for (name, key), change in changes.items())
    names, keys, counts = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    await transaction.fetch(LOCK_SQL, names, keys, counts)
    places = set(zip(names, keys, strict=True))
    transaction.locked |= places
    transaction.reserved -= places
    return names, keys


async def lock_keys(
    batch: Batch, transaction: Transaction, requested: Requested = NOTHING, *, is_near: bool
) -> None:
    """Lock all order keys of a batch at once if its steps would lock them one after another.

    `is_near`: the lock for `max_pending` follows, and its holder must not wait for keys. The keys of
    deliveries that a later step adds, for example for an event about a dead delivery, are not known yet.
    """
    new = [d for d in batch.deliveries if d.order_key is not None]
    ended = [o.delivery for o in batch.outcomes if o.state != "pending" and o.delivery.order_key is not None]
    repeated = [each.target for each in batch.to_repeat if each.target.order_key is not None]
    steps: list[set[Key]] = [{(d.destination, text(d.order_key)) for d in some} for some in (new, ended)]
    steps.append({(target.destination, text(target.order_key)) for target in repeated})
    steps += [{(row[1], row[2]) for row in rows if row[2] is not None} for rows in requested]
    if latest := [d for d in new if d.latest_key is not None]:
        rows = await transaction.fetch(LATEST_KEYS_SQL, *_latest_places(latest))
        steps.append({(name, key) for name, key in rows})
    if is_near or sum(map(bool, steps)) > 1:
        await _reserve(transaction, set[Key]().union(*steps))


async def lock_new_keys(batch: Batch, transaction: Transaction) -> None:
    """Lock the order keys of new deliveries, unless they are already locked."""
    await _reserve(
        transaction, {(d.destination, text(d.order_key)) for d in batch.deliveries if d.order_key is not None}
    )


async def _reserve(transaction: Transaction, keys: set[Key]) -> None:
    if keys := keys - transaction.locked:
        await _lock(transaction, Counter(dict.fromkeys(keys, 0)))
        transaction.reserved |= keys


async def forget_reserved(transaction: Transaction) -> None:
    """Delete the rows of locked order keys without a delivery; call it before the commit."""
    if transaction.reserved:
        keys = sorted(transaction.reserved)
        await transaction.fetch(FORGET_SQL, [name for name, _ in keys], [key for _, key in keys])


async def due_times(batch: Batch, transaction: Transaction, claims: Claims) -> dict[int, int]:
    """Return when new deliveries are due; one that waits behind another of its key is missing.

    New deliveries may supersede older ones, stored and in this batch.
    """
    for each in batch.deliveries:
        each.order_key, each.latest_key = text(each.order_key), text(each.latest_key)
        each.group_key, each.on_dead = text(each.group_key), text(each.on_dead)
    if latest := [d for d in batch.deliveries if d.latest_key is not None]:
        await _supersede(batch, transaction, claims, latest)
    pending = [d for d in batch.deliveries if d.id not in batch.ended_early]
    busy: set[Key] = set()
    ordered: Counter[Key] = Counter((d.destination, d.order_key) for d in pending if d.order_key is not None)
    if ordered:
        places = await _lock(transaction, ordered)
        busy = {(name, key) for name, key in await transaction.fetch(BUSY_SQL, *places)}
    times = await _group_times(batch, transaction) if batch.groupings else {}
    due: dict[int, int] = {}
    for delivery in pending:
        key = (delivery.destination, delivery.order_key)
        behind = delivery.order_key is not None and key in busy
        busy.add(key)
        if behind:
            continue
        at = times.get(delivery.id)
        due[delivery.id] = batch.steady if at is None else at
        if at is None:
            batch.due.append(delivery)
        else:
            batch.later[delivery.destination] = min(at, batch.later.get(delivery.destination, at))
    return due


async def _supersede(
    batch: Batch, transaction: Transaction, claims: Claims, deliveries: Sequence[Delivery]
) -> None:
    new = [d for d in deliveries if d.id not in batch.ended_early]
    pending = await transaction.fetch(LATEST_SQL, *_latest_places(new))
    # The owner of the lane ends all other older deliveries within a second: they may be in flight, or another
    # node may have added them since this transaction locked its keys.
    older = [
        each
        for each in supersede(batch, new, pending)
        if _ends_here(batch, each.destination, each.slot)
        and (batch.scope is None or each.order_key is None or each[1:3] in transaction.locked)
    ]
    await end(batch, transaction, claims, older, SUPERSEDED)


def _latest_places(deliveries: Iterable[Delivery]) -> tuple[list[str], list[str]]:
    places = sorted({(d.destination, text(d.latest_key) or "") for d in deliveries})
    return [name for name, _ in places], [key for _, key in places]


async def _group_times(batch: Batch, transaction: Transaction) -> dict[int, int]:
    wanted = [d for d in batch.deliveries if d.id in batch.groupings and d.id not in batch.ended_early]
    places = sorted({(d.destination, d.group_key or "") for d in wanted})
    if not places:
        return {}
    columns = [name for name, _ in places], [key for _, key in places]
    waiting = await transaction.fetch(GROUPS_SQL, *columns, batch.steady)
    times, full = group_times(batch, wanted, waiting)
    if full:
        names, keys = [name for name, _ in full], [key for _, key in full]
        await transaction.fetch(FILLED_SQL, names, keys, batch.steady)
    return times


async def _expire_held(
    batch: Batch, transaction: Transaction, claims: Claims, held: HeldDestinations
) -> None:
    """Expire deliveries of destinations that accept nothing; the rows of shards have the names of lanes."""
    rows = await transaction.fetch("SELECT destination, since, warned FROM held")
    changes = held_changes(batch, held, {name: (since, warned) for name, since, warned in rows})
    if changes.gone:
        await transaction.fetch("DELETE FROM held WHERE destination = ANY($1::text[])", changes.gone)
    if changes.new:
        await transaction.fetch(HELD_SQL, changes.new, batch.steady)
    warnings = {
        lane: seconds
        for lane, since in changes.to_warn.items()
        if (seconds := await _seconds_to_expiry(batch, transaction, lane, held.kept, since)) is not None
    }
    if warnings:
        await _warn_of_expiry(batch, transaction, warnings, held.kept)
    for name in changes.to_expire:
        await _expire_destination(batch, transaction, claims, name, changes.before)


async def _warn_of_expiry(
    batch: Batch, transaction: Transaction, warnings: Mapping[str, int], kept: int
) -> None:
    """Warn once for all shards of a destination; `warnings` has the seconds until deliveries of lanes expire.

    Other nodes own the other shards, and may warn at the same moment, so one node after another decides.
    """
    await transaction.fetch(WARNING_LOCK_SQL)
    warned = await transaction.fetch("SELECT destination FROM held WHERE warned")
    warned_of = {destination_of(name) for (name,) in warned}
    for lane, seconds in warnings.items():
        if (name := destination_of(lane)) not in warned_of:
            warned_of.add(name)
            warn_of_expiry(batch, name, seconds, kept)
    sql = "UPDATE held SET warned = true WHERE destination = ANY($1::text[])"
    await transaction.fetch(sql, list(warnings))


def _part_of(batch: Batch, lane: str) -> tuple[str, tuple[int, ...] | None]:
    """Return the destination and the slots of a lane; None: all slots."""
    name, _, number = lane.partition("/")
    if not number or batch.scope is None:
        return name, None
    return name, Shards(batch.scope.shards.get(name, 1), frozenset({int(number)})).slots


async def _seconds_to_expiry(
    batch: Batch, transaction: Transaction, lane: str, kept: int, since: int
) -> int | None:
    """Return the seconds until the first delivery expires, if an operator must know now; otherwise None."""
    name, slots = _part_of(batch, lane)
    found = [(await transaction.fetch(FIRST_SQL.format(share=share), name, slots))[0][0] for share in SHARES]
    first = min((due for due in found if due is not None), default=None)
    return is_warning_due(batch, since, kept, first)


async def _expire_destination(
    batch: Batch, transaction: Transaction, claims: Claims, lane: str, before: int
) -> None:
    name, slots = _part_of(batch, lane)
    rows: list[asyncpg.Record] = await transaction.fetch(WAITING_SQL, name, before, HELD_AT_ONCE, slots)
    if not rows:
        for share in SHARES:
            rows += await transaction.fetch(DUE_SQL.format(share=share), name, before, HELD_AT_ONCE, slots)
    await end(batch, transaction, claims, rows, ("expired", "held"))


async def _repeat(batch: Batch, transaction: Transaction) -> None:
    """Create new deliveries of events, unless the event was deleted or one of its deliveries is pending."""
    rows = await transaction.fetch(
        REPEAT_SQL,
        [each.event.id for each in batch.to_repeat],
        [each.target.destination for each in batch.to_repeat],
    )
    latest = {(event_id, name): delivery_id for event_id, name, delivery_id in rows}
    for each in batch.to_repeat:
        key = (each.event.id, each.target.destination)
        each.done = key in latest
        if each.done:
            size = len(each.event.body)
            batch.add_delivery(each.target, each.event.id, size, each.event, replay_of=latest.pop(key))


async def _restore(batch: Batch, transaction: Transaction) -> None:
    """Add the events of an export that are not stored yet."""
    rows = await transaction.fetch(STORED_SQL, [uuid_of(each.event.public_id) for each in batch.to_restore])
    known = {f"evt_{uuid}" for (uuid,) in rows}
    for each in batch.to_restore:
        each.done = each.event.public_id not in known
        if each.done:
            known.add(each.event.public_id)
            batch.put_back(each)
