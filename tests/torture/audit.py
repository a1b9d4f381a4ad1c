"""What the nodes of a cluster did, compared with what they may do: the promises of docs/cluster.md."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from relay.base.shards import lane_of, slot_of
from relay.store.postgres.rows import micros_of
from torture.nodes import (
    CONCURRENCY,
    LATEST,
    LEASE,
    LIMIT,
    LIMITED,
    ORDERED,
    TIMEOUT,
    Arrival,
    Cluster,
    Fault,
    Sent,
)

MARGIN = 2.0  # seconds beyond the lease within which a lane resumes
NEAR = 0.1  # seconds within which the times of different processes are compared
BREAKS = ("kill", "freeze", "cut", "restart_server", "failover")  # faults that cut attempts off
OVERDUE = 1.1  # seconds by which a node stores an outcome later than its next ones: it pauses after a failure

COMMIT_TIMES = "track_commit_timestamp=on"
"""Setting of the server: `audit` reads when outcomes were stored."""

EVENTS_SQL = "SELECT 'evt_' || public_id::text, source, subject, id FROM events"
MISSING_SQL = """
    SELECT 'evt_' || e.public_id::text, l.name FROM events AS e CROSS JOIN unnest($1::text[]) AS l (name)
     WHERE e.source = 'adorn'
       AND NOT EXISTS (SELECT 1 FROM deliveries AS d WHERE d.event_id = e.id AND d.destination = l.name)
"""
DELIVERIES_SQL = """
    SELECT d.destination, 'evt_' || e.public_id::text
      FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
"""
UNDELIVERED_SQL = """
    SELECT n.destination, 'evt_' || e.public_id::text, n.state || coalesce(' (' || n.reason || ')', ''),
           n.destination = $1 AND n.state = 'dead' AND n.reason = 'backlog_full' AND n.attempts = 0
           OR n.destination = $2 AND n.state = 'expired' AND n.reason = 'superseded'
              AND EXISTS (SELECT 1 FROM deliveries AS l WHERE l.destination = n.destination
                             AND l.latest_key = d.latest_key AND l.event_id > d.event_id)
      FROM ends AS n JOIN deliveries AS d ON d.id = n.delivery_id JOIN events AS e ON e.id = d.event_id
     WHERE n.state <> 'delivered'
"""
"""Deliveries that ended otherwise, and whether `max_pending` or `latest_by` permits that."""

UNACCOUNTED_SQL = """
    SELECT coalesce(sum(abs(coalesce(created, 0) - coalesce(ended, 0) - coalesce(pending, 0))), 0)::int
      FROM (SELECT destination, sum(created) AS created, sum(delivered + dead + expired + cancelled) AS ended
              FROM ledger GROUP BY 1) AS l
      FULL JOIN (SELECT destination, count(*) AS pending FROM owed GROUP BY 1) AS o USING (destination)
"""
CHECK_SQL = """
    SELECT (SELECT count(*) FROM deliveries AS d
             WHERE (SELECT count(*) FROM owed AS o WHERE o.id = d.id)
                 + (SELECT count(*) FROM ends AS e WHERE e.delivery_id = d.id) <> 1)
         + (SELECT abs((SELECT count(*) FROM deliveries) - (SELECT sum(created) FROM ledger)))
         + (SELECT abs((SELECT count(*) FROM ends)
                       - (SELECT sum(delivered + dead + expired + cancelled) FROM ledger)))
"""
ATTEMPTS_SQL = """
    SELECT d.destination, 'evt_' || e.public_id::text AS event_id, (a.id & 255)::int AS slot, a.started_at,
           a.result, CASE WHEN current_setting('track_commit_timestamp')::bool
                          THEN extract(epoch FROM pg_xact_commit_timestamp(a.xmin))::float8 END AS stored
      FROM attempts AS a JOIN deliveries AS d ON d.id = a.delivery_id JOIN events AS e ON e.id = d.event_id
"""
LEASES_SQL = """
    SELECT substr(l.name, 6) AS lane, n.name AS node, n.slot, l.epoch,
           min(extract(epoch FROM l.at))::float8 AS began,
           max(extract(epoch FROM l.until))::float8 AS longest,
           (array_agg(extract(epoch FROM l.until) ORDER BY l.id DESC))[1]::float8 AS ended,
           (array_agg(l.until <= l.at ORDER BY l.id DESC))[1] AS given
      FROM torture_leases AS l JOIN torture_nodes AS n USING (incarnation)
     WHERE l.name LIKE 'lane:%' GROUP BY 1, 2, 3, 4
"""


SLOTS_SQL = """
    SELECT d.destination, 'evt_' || e.public_id::text, d.public_id::text, d.order_key
      FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
"""
SHARDS_SQL = """
    SELECT substr(name, 6), shards, extract(epoch FROM at)::float8 FROM torture_leases
     WHERE name LIKE 'lane:%' AND name NOT LIKE '%/%' ORDER BY id
"""


class Lanes:
    """The lane of each delivery: the number of shards changes, a delivery's slot does not."""

    def __init__(self, deliveries: list[Any], history: list[Any]) -> None:
        self._slots = {(name, event): slot_of(key, id_) for name, event, id_, key in deliveries}
        self._changes: dict[str, list[tuple[float, int]]] = defaultdict(list)  # with the times
        for name, count, at in history:
            # While the number changes, the former shards finish.
            if count and (not self._changes[name] or self._changes[name][-1][1] != count):
                self._changes[name].append((at, count))

    def of(self, destination: str, event_id: str, moment: float, near: float) -> set[str]:
        """Return the lanes that a delivery may have had at about a moment."""
        slot, changes = self._slots.get((destination, event_id)), self._changes[destination]
        ends = [*(at for at, _ in changes[1:]), float("inf")]
        return {
            lane_of(destination, slot, count)
            for (begin, count), end in zip(changes, ends, strict=True)
            if begin - near <= moment <= end + near
        } or {destination}


@dataclass
class Toll:
    """What the faults of a cluster cost."""

    failover: float | None = None  # see `audit`
    warned: bool = False  # the relay warned, before the failover, that events may be lost
    acknowledged: int = 0
    lost: dict[str, float] = field(default_factory=dict)  # acknowledged and not stored, with that time
    raced: int = 0  # idempotency keys sent to two nodes at once
    keys_twice: int = 0  # of them, those that became two events
    missing: int = 0  # deliveries that were not created
    undelivered: int = 0
    unaccounted: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # as `max_pending` and `latest_by` permit
    failed: Counter[str] = field(default_factory=Counter)  # ends of deliveries that nothing permits
    most_pending: int = 0  # deliveries for `LIMITED`
    workers: list[str] = field(default_factory=list)  # see `cluster_workers.Fleet`
    late: list[str] = field(default_factory=list)  # attempts that began without a lease
    frozen: int = 0  # of attempts without a lease, those in flight at a freeze
    crowded: list[str] = field(default_factory=list)  # more than `concurrency` at once
    disordered: list[str] = field(default_factory=list)
    repeated: int = 0
    overtaken: int = 0  # of them, those whose first outcome a busy node had not stored when its lease ended
    cancelled: int = 0  # of them, those that a stopping node has cancelled at the end of `shutdown_grace`
    unexplained: list[str] = field(default_factory=list)  # repetitions of attempts that were not in flight
    most_at_once: int = 0
    pauses: dict[str, tuple[float, float]] = field(default_factory=dict)  # by fault: the longest, the limit
    machine: float = 0.0  # seconds that the machine was too busy for this process

    def faults(self) -> list[str]:
        """Return the promises that were broken."""
        lost = [at for at in self.lost.values() if self.failover is None or at < self.failover]
        found = [
            f"{len(lost)} acknowledged events are lost" * bool(lost),
            f"{self.keys_twice} idempotency keys became two events" * bool(self.keys_twice),
            f"{self.missing} deliveries were not created" * bool(self.missing),
            f"{self.undelivered} deliveries never arrived" * bool(self.undelivered),
            f"{self.unaccounted} deliveries are unaccounted for" * bool(self.unaccounted),
            f"max_pending = {LIMIT}, and {self.most_pending} were pending" * (self.most_pending > LIMIT),
        ]
        found += (f"{count} deliveries to {how}" for how, count in self.failed.items())
        found += (f"workers: {line}" for line in self.workers)
        if self.failover is not None and not self.warned:
            found.append("nothing warned that the standby was asynchronous")
        found += (f"without a lease: {line}" for line in self.late)
        found += (f"too many at once: {line}" for line in self.crowded)
        found += (f"out of order: {line}" for line in self.disordered)
        found += (f"repeated: {line}" for line in self.unexplained)
        for kind, (pause, limit) in self.pauses.items():
            if pause > limit:
                found.append(f"{kind}: a lane paused for {pause:.2f} s, more than {limit:.2f} s")
        return [line for line in found if line]

    @property
    def shown_pauses(self) -> str:
        """The longest pause of a lane during each kind of fault."""
        return ", ".join(f"{kind} {pause:.2f} s" for kind, (pause, _) in sorted(self.pauses.items()))

    @property
    def shown_dropped(self) -> str:
        """The deliveries that ended as `max_pending` and `latest_by` permit."""
        return ", ".join(f"{count} {how}" for how, count in sorted(self.dropped.items())) or "none"

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {len(self.lost)} lost, {self.raced} raced keys, "
            f"{self.undelivered} undelivered, {self.unaccounted} unaccounted, dropped: {self.shown_dropped}, "
            f"{len(self.late)} late and "
            f"{self.frozen} frozen attempts, at most {self.most_at_once} at once, {self.repeated} repeated, "
            f"of them {self.overtaken} overtaken and {self.cancelled} cancelled; "
            f"longest pauses: {self.shown_pauses}; the machine was late by up to {self.machine:.2f} s"
        )


def pause(cluster: Cluster, toll: Toll, fault: Fault, limit: float, *, since: float, until: float) -> None:
    """Note the longest pause of a lane during a fault; the machine's own delays count in addition."""
    longest = cluster.receiver.longest_pause(cluster.lanes_of_all, since, until)
    allowed = limit + 3 * cluster.receiver.lag
    known = toll.pauses.get(fault.kind)
    if known is None or longest - allowed > known[0] - known[1]:
        toll.pauses[fault.kind] = longest, allowed


async def audit(cluster: Cluster, toll: Toll, *, failover: float | None = None) -> None:
    """Compare the database, the receivers and the history of leases, once everything is delivered.

    `failover` is the time from which on an asynchronous standby had nothing: what was acknowledged later may
    be lost.
    """
    receiver = cluster.receiver
    rows = await cluster.fetch(EVENTS_SQL)
    events = {id_: (source, subject) for id_, source, subject, _ in rows}
    row_ids = {id_: row for id_, _, _, row in rows}
    toll.acknowledged = len(cluster.acknowledged)
    at = {sent.event_id: sent.acknowledged for sent in cluster.sent}
    for ids in cluster.raced:
        at |= ids
    toll.lost = {id_: at[id_] for id_ in at.keys() - events.keys()}
    toll.failover = failover
    subjects = Counter(subject for source, subject in events.values() if source == "adorn")
    toll.raced = len(cluster.raced)
    toll.keys_twice = sum(count > 1 for subject, count in subjects.items() if subject.startswith("race "))
    toll.keys_twice += sum(len(ids.keys() & events.keys()) > 1 for ids in cluster.raced)
    toll.missing = len(await cluster.fetch(MISSING_SQL, list(cluster.lanes_of_all)))
    wanted = set(map(tuple, await cluster.fetch(DELIVERIES_SQL)))
    for name, event_id, how, is_permitted in await cluster.fetch(UNDELIVERED_SQL, LIMITED, LATEST):
        if is_permitted and (name != LIMITED or (name, event_id) not in receiver.by_delivery):
            toll.dropped[how] += 1
            wanted.discard((name, event_id))
        else:
            toll.failed[f"{name}: {how}"] += 1
    toll.most_pending = cluster.most_pending
    toll.undelivered = len(wanted - receiver.by_delivery.keys())
    [(unaccounted,)], [(contradictions,)] = (
        await cluster.fetch(UNACCOUNTED_SQL),
        await cluster.fetch(CHECK_SQL),
    )
    toll.unaccounted = unaccounted + int(contradictions)
    toll.most_at_once, toll.machine = receiver.most_at_once, receiver.lag
    frozen = [fault for fault in cluster.faults if fault.kind == "freeze"]
    near = NEAR + receiver.lag
    attempts = await cluster.fetch(ATTEMPTS_SQL)
    leases = await cluster.fetch(LEASES_SQL)
    lanes = Lanes(await cluster.fetch(SLOTS_SQL), await cluster.fetch(SHARDS_SQL))
    if failover is None:  # else the history of the leases has a gap
        _find_late(cluster, toll, attempts, leases, lanes, frozen=frozen, near=near)
    _find_crowds(cluster, toll, frozen=frozen)
    by_id = {id_: subject for id_, (_, subject) in events.items()}
    _find_disorder(cluster, toll, by_id, row_ids, frozen=frozen)
    trail = Trail(receiver.arrivals, attempts, leases, lanes, near=near)
    _find_unexplained(cluster, toll, trail, near=near, is_exact=failover is None)


def _find_crowds(cluster: Cluster, toll: Toll, *, frozen: list[Fault]) -> None:
    """Find more requests at once than a destination permits; each frozen node may send what was in flight.

    If the receiver itself was late by more than the timeout of an attempt, it gets requests that have ended.
    """
    for moment, name, count in cluster.receiver.crowds:
        late = sum(began <= moment <= ended + NEAR for began, ended in cluster.receiver.stalls)
        if count > CONCURRENCY * (1 + late + sum(_around(fault, moment) for fault in frozen)):
            toll.crowded.append(f"{count} at {name} at {moment:.3f}")


def _around(fault: Fault, moment: float) -> bool:
    return fault.began - NEAR <= moment <= fault.ended + LEASE + MARGIN


def _find_late(
    cluster: Cluster,
    toll: Toll,
    attempts: list[Any],
    leases: list[Any],
    lanes: Lanes,
    *,
    frozen: list[Fault],
    near: float,
) -> None:
    """Find attempts that began while their node did not hold the lane, or too late for its lease."""
    by_node, by_slot = defaultdict(list), defaultdict(list)
    for lease in leases:
        by_node[lease["lane"], lease["node"]].append((lease["began"], lease["ended"]))
        # The node's own deadline comes before the end of the latest lease by the timeout of an attempt.
        deadline = min(lease["ended"], lease["longest"] - TIMEOUT)
        by_slot[lease["lane"], lease["slot"]].append((lease["began"], deadline))
    names = {lease["slot"]: lease["node"] for lease in leases}
    found = [
        (arrival.destination, arrival.node, arrival.began, "a request arrived")
        for arrival in cluster.receiver.arrivals
        if not any(
            _within(by_node[lane, arrival.node], arrival.began, near)
            for lane in lanes.of(arrival.destination, arrival.event_id, arrival.began, near)
        )
    ]
    for row in attempts:
        started = row["started_at"] / 1_000_000
        if not any(
            _within(by_slot[lane, row["slot"]], started, NEAR)
            for lane in lanes.of(row["destination"], row["event_id"], started, NEAR)
        ):
            found.append((row["destination"], names.get(row["slot"], "?"), started, "an attempt began"))
    excused: dict[tuple[str, str, float, str], set[float]] = defaultdict(set)  # a message may have members
    for lane, node, moment, what in sorted(found, key=lambda each: each[2]):
        fault = next((each for each in frozen if node in each.nodes and _around(each, moment)), None)
        place = (lane, node, fault.began if fault else 0.0, what)
        excused[place].add(moment)
        if fault is not None and len(excused[place]) <= CONCURRENCY:
            toll.frozen += 1
        else:
            toll.late.append(f"{what} for {lane} by {node} at {moment:.3f}")


def _within(spans: list[tuple[float, float]], moment: float, near: float) -> bool:
    return any(began - near <= moment <= ended + near for began, ended in spans)


def _find_disorder(
    cluster: Cluster,
    toll: Toll,
    subjects: Mapping[str, str | None],
    row_ids: Mapping[str, int],
    *,
    frozen: list[Fault],
) -> None:
    """Find requests of one order key at the same time, and events that overtook an earlier one."""
    first: dict[str, Arrival] = {}
    latest: dict[str | None, Arrival] = {}
    for arrival in cluster.receiver.arrivals:
        if arrival.destination != ORDERED:
            continue
        first.setdefault(arrival.event_id, arrival)
        key = subjects.get(arrival.event_id)
        before = latest.get(key)
        if key is not None and before is not None and before.ended > arrival.began and not any(
            _around(fault, arrival.began) for fault in frozen
        ):  # fmt: skip
            toll.disordered.append(f"two requests of {key} at once, by {before.node} and {arrival.node}")
        latest[key] = arrival
    senders: dict[tuple[int, str], tuple[Sent, Arrival]] = {}
    for sent in cluster.sent:  # a sender sends the next event after the acknowledgement of the one before
        if (arrival := first.get(sent.event_id)) is None:
            continue
        earlier = senders.get((sent.sender, sent.subject))
        if earlier is not None and arrival.began < earlier[1].began:
            places = (_place(*each, row_ids[each[0].event_id]) for each in (earlier, (sent, arrival)))
            toll.disordered.append(f"{sent.subject}: {'; then '.join(places)}")
        senders[sent.sender, sent.subject] = sent, arrival


def _place(sent: Sent, arrival: Arrival, row: int) -> str:
    return (
        f"sent at {sent.at:.3f}, acknowledged at {sent.acknowledged:.3f} with the time"
        f" {micros_of(row) / 1_000_000:.3f} of slot {row & 255}, arrived at {arrival.began:.3f}"
    )


@dataclass
class Request:
    """One request at the receiver, and the attempt that made it."""

    arrival: Arrival
    started: float  # when the attempt began; without a stored outcome, when the request arrived
    result: str | None  # None: its outcome was never stored
    stored: float | None  # when its outcome was committed


class Trail:
    """The requests of each delivery in the order of their attempts, and what the nodes had stored when."""

    def __init__(
        self,
        arrivals: Iterable[Arrival],
        attempts: Sequence[Any],
        leases: Sequence[Any],
        lanes: Lanes,
        *,
        near: float,
    ) -> None:
        self.requests: dict[tuple[str, str], list[Request]] = defaultdict(list)
        self._leases: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self._lanes = lanes
        self._near = near
        nodes: dict[int, set[str]] = defaultdict(set)
        for lease in leases:
            nodes[lease["slot"]].add(lease["node"])
            self._leases[lease["lane"], lease["node"]].append(lease)
        rows: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for row in attempts:
            rows[row["destination"], row["event_id"]].append(row)
        progress: dict[str, list[tuple[float, float]]] = defaultdict(list)
        made: dict[int, Any] = {}  # attempts by the index of their requests
        arrivals = list(arrivals)
        for slack in (NEAR, near):  # on a busy machine, times may differ more; an exact one fits better
            for number, arrival in enumerate(arrivals):
                place = arrival.destination, arrival.event_id
                found = [
                    row
                    for row in rows[place]
                    if arrival.node in nodes[row["slot"]]
                    and row["started_at"] / 1_000_000 <= arrival.began + slack  # frozen: much later
                ]
                if found and number not in made:
                    made[number] = max(found, key=lambda each: each["started_at"])
                    rows[place].remove(made[number])
        for number, arrival in enumerate(arrivals):
            place, row = (arrival.destination, arrival.event_id), made.get(number)
            if row is None:
                self.requests[place].append(Request(arrival, arrival.began, None, None))
                continue
            request = Request(arrival, row["started_at"] / 1_000_000, row["result"], row["stored"])
            self.requests[place].append(request)
            if request.stored is not None:
                progress[arrival.node].append((request.stored, arrival.ended))
        self._stored = {node: sorted(pairs) for node, pairs in progress.items()}
        self._newest = {
            node: list(accumulate((ended for _, ended in pairs), max)) for node, pairs in self._stored.items()
        }
        for requests in self.requests.values():
            requests.sort(key=lambda each: each.started)

    def was_in_flight(self, request: Request, moment: float) -> bool:
        """Return whether a node may not have stored an outcome at a moment.

        Nodes store outcomes in the order in which they get the responses.
        """
        if request.stored is not None and request.stored < moment - self._near:
            return False
        node = request.arrival.node
        number = bisect_right(self._stored.get(node, []), (moment, float("inf")))
        newest = self._newest[node][number - 1] if number else 0.0
        return request.arrival.ended >= newest - OVERDUE - self._near

    def leases_of(self, request: Request, moment: float) -> list[Any]:
        """Return the leases of a request's lane that its node had taken before a moment, oldest first."""
        arrival = request.arrival
        names = self._lanes.of(arrival.destination, arrival.event_id, moment, self._near)
        found = [lease for name in names for lease in self._leases[name, arrival.node]]
        return sorted(
            (each for each in found if each["began"] <= moment + self._near), key=lambda each: each["began"]
        )


def _find_unexplained(cluster: Cluster, toll: Toll, trail: Trail, *, near: float, is_exact: bool) -> None:
    """Find repeated requests whose attempt had not failed, and was not in flight at a loss of the lane.

    An attempt is in flight until its outcome is stored. `is_exact`: the history of the leases has no gap.
    """
    cancelled: dict[tuple[str, str], set[float]] = defaultdict(set)  # a message may have members
    for requests in trail.requests.values():
        toll.repeated += len(requests) - 1
        for first, again in pairwise(requests):
            if first.result not in (None, "ok") and (first.stored or 0.0) <= again.started + near:
                continue  # a retry
            place = first.arrival.node, first.arrival.destination
            taken = trail.leases_of(again, again.started)
            was_known = (
                is_exact and first.stored is not None and taken and taken[-1]["began"] > first.stored + near
            )
            if not was_known and _was_cut_off(cluster, trail, first, near):
                continue
            if not was_known and _was_overtaken(trail, first, again, near):
                toll.overtaken += 1
            elif first.result is None and (
                len(cancelled[place] | {first.arrival.began}) <= cluster.cancelled.get(place, 0)
            ):
                cancelled[place].add(first.arrival.began)
                toll.cancelled += 1
            else:
                toll.unexplained.append(f"{_shown(first)}; again {_shown(again)}")


def _was_cut_off(cluster: Cluster, trail: Trail, request: Request, near: float) -> bool:
    """Return whether an attempt was in flight at a fault of its node."""
    return any(
        fault.kind in BREAKS
        and request.arrival.node in fault.nodes
        and request.started <= fault.ended + near
        and trail.was_in_flight(request, fault.began)
        for fault in cluster.faults
    )


def _was_overtaken(trail: Trail, first: Request, again: Request, near: float) -> bool:
    """Return whether an attempt was in flight when its lease ended: a busy node renews it too late."""
    leases = trail.leases_of(first, first.started)
    if not leases or leases[-1]["given"]:  # a node gives a lane after it has stored all outcomes
        return False
    ended = leases[-1]["ended"]
    return bool(
        first.started <= ended + near and ended <= again.started + near and trail.was_in_flight(first, ended)
    )


def _shown(request: Request) -> str:
    arrival, stored = request.arrival, "never stored"
    if request.result is not None:
        stored = f"stored as {request.result} at {request.stored or 0.0:.3f}"
    return (
        f"{arrival.destination}: {arrival.event_id} by {arrival.node}, began at {request.started:.3f},"
        f" arrived at {arrival.began:.3f}, ended at {arrival.ended:.3f}, {stored}"
    )
