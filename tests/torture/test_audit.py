"""The oracle of the cluster suite finds broken promises, and excuses only attempts in flight at a fault."""

import random
from types import SimpleNamespace

import asyncpg
import pytest
from postgres import database_of, drop_databases, needs_postgres

from relay.base.clock import SECOND
from torture.audit import (
    UNDELIVERED_SQL,
    Lanes,
    Toll,
    Trail,
    _find_crowds,
    _find_disorder,
    _find_late,
    _find_unexplained,
    pause,
)
from torture.cluster_workers import PATIENCE, Fleet
from torture.nodes import CONCURRENCY, LANES, LATEST, LIMIT, LIMITED, ORDERED, Arrival, Fault, Receiver, Sent

NEAR = 0.1
SLOTS = {"n0": 0, "n1": 1}


def request(node, began, ended=None, *, event="evt_1"):
    return Arrival("crm", event, node, began, began + 0.01 if ended is None else ended)


def attempt(node, started, stored, result="ok", *, event="evt_1"):
    return {
        "destination": "crm", "event_id": event, "slot": SLOTS[node], "started_at": int(started * SECOND),
        "result": result, "stored": stored,
    }  # fmt: skip


def lease(node, began, ended, *, given=False):
    return {
        "lane": "crm", "node": node, "slot": SLOTS[node], "began": began, "ended": ended, "longest": ended,
        "given": given,
    }  # fmt: skip


def judge(arrivals, attempts, leases, *, faults=(), cancelled=()):
    toll, lanes = Toll(), Lanes([], [("crm", 1, 0.0)])
    trail = Trail(arrivals, attempts, leases, lanes, near=NEAR)
    cluster = SimpleNamespace(faults=list(faults), cancelled=dict(cancelled))
    _find_unexplained(cluster, toll, trail, near=NEAR, is_exact=True)
    return toll


FREEZE = Fault("freeze", ("n0",), began=10.0, ended=14.0)
LOST = [lease("n0", 0.0, 13.0), lease("n1", 13.0, 900.0)]
OTHERS = (5, 6)  # hundredths of a second after which other requests of the node began, before it was frozen


@pytest.mark.parametrize(
    ("first", "again", "fault", "expected"),
    [
        pytest.param(
            (request("n0", 9.99), None), (request("n1", 13.1), attempt("n1", 13.1, 13.2)), FREEZE, (0, 0),
            id="in flight when its node was frozen",
        ),
        pytest.param(
            (request("n0", 14.1), attempt("n0", 9.99, 14.2)),
            (request("n1", 13.1), attempt("n1", 13.1, 13.2)),
            FREEZE, (0, 0), id="begun before its node was frozen, and sent after it",
        ),
        pytest.param(
            (request("n0", 9.5), attempt("n0", 9.5, 9.6)), (request("n1", 13.1), attempt("n1", 13.1, 13.2)),
            FREEZE, (0, 1), id="stored before its node was frozen",
        ),
        pytest.param(
            (request("n0", 7.0), None), (request("n1", 13.1), attempt("n1", 13.1, 13.2)), FREEZE, (0, 1),
            id="not stored although its node stored later outcomes",
        ),
        pytest.param(
            (request("n0", 12.5), attempt("n0", 12.5, 13.4)),
            (request("n1", 13.1), attempt("n1", 13.1, 13.2)),
            None, (1, 0), id="not stored when the lease of a busy node ended",
        ),
        pytest.param(
            (request("n0", 12.5), attempt("n0", 12.5, 12.6)),
            (request("n1", 13.1), attempt("n1", 13.1, 13.2)),
            None, (0, 1), id="stored before the lease of a busy node ended",
        ),
        pytest.param(
            (request("n1", 13.1), attempt("n1", 13.1, 13.2)),
            (request("n0", 16.0), attempt("n0", 16.0, 16.1)),
            FREEZE, (0, 1), id="stored by the other node before the first one took the lane again",
        ),
        pytest.param(
            (request("n0", 5.0), attempt("n0", 5.0, 5.2, "5xx")),
            (request("n0", 5.3), attempt("n0", 5.3, 5.4)),
            None, (0, 0), id="a retry",
        ),
        pytest.param(
            (request("n0", 5.0), attempt("n0", 5.0, 5.2)), (request("n0", 5.3), attempt("n0", 5.3, 5.4)),
            None, (0, 1), id="twice by one node",
        ),
        pytest.param(
            (request("n0", 5.0), attempt("n0", 5.0, 5.2)), (request("n0", 5.02), None), None, (0, 1),
            id="twice in one attempt",
        ),
    ],
)  # fmt: skip
def test_only_attempts_in_flight_at_a_fault_or_at_the_end_of_a_lease_may_be_repeated(
    first, again, fault, expected
):
    pairs = [first, again]
    for number in OTHERS:
        began, event = 9.9 + number / 100, f"evt_{number}"
        pairs.append((request("n0", began, event=event), attempt("n0", began, 9.97, event=event)))
    arrivals = sorted((arrival for arrival, _ in pairs), key=lambda each: each.began)
    rows = [row for _, row in pairs if row is not None]
    faults = [] if fault is None else [fault]
    toll = judge(arrivals, rows, [*LOST, lease("n0", 15.0, 900.0)], faults=faults)
    assert toll.repeated == 1
    assert (toll.overtaken, len(toll.unexplained)) == expected, toll.unexplained


def test_an_attempt_made_the_request_that_came_after_its_beginning():
    """Also on a machine so busy that times may differ by two seconds."""
    arrivals = [request("n0", 5.0), request("n1", 5.4), request("n0", 6.6)]
    attempts = [attempt("n1", 5.4, 5.5), attempt("n0", 6.6, 6.7)]
    trail = Trail(arrivals, attempts, LOST, Lanes([], [("crm", 1, 0.0)]), near=2.2)
    [found] = trail.requests.values()
    assert [(each.arrival.began, each.result) for each in found] == [(5.0, None), (5.4, "ok"), (6.6, "ok")]


def test_a_lane_that_was_handed_over_excuses_no_repetition():
    arrivals = [request("n0", 12.5), request("n1", 13.1)]
    attempts = [attempt("n0", 12.5, 13.4), attempt("n1", 13.1, 13.2)]
    leases = [lease("n0", 0.0, 13.0, given=True), lease("n1", 13.0, 900.0)]
    assert len(judge(arrivals, attempts, leases).unexplained) == 1


MOVED = (("n0", 12.5), ("n1", 13.1))


def test_attempts_that_a_stopping_node_has_cancelled_are_excused_as_often_as_it_says():
    """One of two messages with two events each is excused."""
    began = {"evt_1": 12.5, "evt_2": 12.5, "evt_3": 12.6, "evt_4": 12.6}
    arrivals = [
        request(node, at, event=event) for event in began for node, at in (("n0", began[event]), ("n1", 13.1))
    ]
    attempts = [attempt("n1", 13.1, 13.2, event=event) for event in began]
    leases = [lease("n0", 0.0, 13.0, given=True), lease("n1", 13.0, 900.0)]
    toll = judge(arrivals, attempts, leases, cancelled={("n0", "crm"): 1})
    assert (toll.cancelled, len(toll.unexplained)) == (2, 2)


@pytest.mark.parametrize(
    ("node", "moment", "is_late"),
    [("n0", 11.9, False), ("n0", 12.3, True), ("n1", 12.3, True), ("n1", 13.2, False)],
)
def test_no_attempt_may_begin_after_the_deadline_of_its_owner(node, moment, is_late):
    """A lease until 13 s permits attempts with a timeout of 1 s until 12 s; the next one begins at 13 s."""
    toll, cluster = Toll(), SimpleNamespace(receiver=SimpleNamespace(arrivals=[]))
    lanes = Lanes([], [("crm", 1, 0.0)])
    _find_late(cluster, toll, [attempt(node, moment, moment)], LOST, lanes, frozen=[], near=NEAR)
    assert [line.split(" at ")[0] for line in toll.late] == [f"an attempt began for crm by {node}"] * is_late
    assert len([line for line in toll.faults() if line.startswith("without a lease: ")]) == is_late


@pytest.mark.parametrize(
    ("count", "is_frozen", "late"), [(1, False, 1), (CONCURRENCY, True, 0), (9, True, 5)]
)
@pytest.mark.parametrize("members", [1, 2])
def test_only_as_many_requests_as_were_in_flight_may_arrive_late_from_a_frozen_node(
    count, is_frozen, late, members
):
    arrivals = [request("n0", 14.1 + number / 100, event=f"evt_{number} {member}")
                for number in range(count) for member in range(members)]  # fmt: skip
    cluster, toll = SimpleNamespace(receiver=SimpleNamespace(arrivals=arrivals)), Toll()
    lanes = Lanes([], [("crm", 1, 0.0)])
    _find_late(cluster, toll, [], LOST, lanes, frozen=[FREEZE] * is_frozen, near=NEAR)
    assert (len(toll.late), toll.frozen) == (late * members, (count - late) * members)


@pytest.mark.parametrize(
    ("moment", "stalls", "faults", "is_fault"),
    [
        (20.0, [], [], True), (20.0, [(18.0, 19.95)], [], False), (20.0, [(17.0, 19.0)], [], True),
        (14.5, [], [FREEZE], False), (30.0, [], [FREEZE], True),
    ],
)  # fmt: skip
def test_a_destination_may_get_more_requests_at_once_only_after_a_freeze_or_from_a_receiver_that_was_late(
    moment, stalls, faults, is_fault
):
    receiver = SimpleNamespace(crowds=[(moment, "crm", 2 * CONCURRENCY)], stalls=stalls)
    toll = Toll()
    _find_crowds(SimpleNamespace(receiver=receiver), toll, frozen=faults)
    assert bool(toll.crowded) == is_fault
    receiver.crowds = [(moment, "crm", 2 * CONCURRENCY + 1)]
    toll = Toll()
    _find_crowds(SimpleNamespace(receiver=receiver), toll, frozen=faults)
    assert toll.crowded


@pytest.mark.parametrize(("seconds", "is_fault"), [(4.9, False), (5.1, True)])
def test_a_lane_that_pauses_for_longer_than_its_limit_is_a_fault(seconds, is_fault):
    receiver, toll = Receiver(), Toll()
    for name in LANES:
        receiver.times[name] = [10.0, 10.1]
    receiver.times["d1"] = [10.0, 10.0 + seconds]
    cluster = SimpleNamespace(receiver=receiver, lanes_of_all=LANES)
    pause(cluster, toll, Fault("kill", ("n0",), 10.0), 5.0, since=10.0, until=10.2)
    pause(cluster, toll, Fault("kill", ("n0",), 10.0), 5.0, since=10.1, until=10.1 + seconds)
    assert bool(toll.faults()) == is_fault
    assert receiver.longest_wait(["d1"], 10.05) == pytest.approx(seconds - 0.05)


@pytest.mark.parametrize(
    ("moments", "count"),
    [([1.0, 1.1, 1.2], 0), ([1.1, 1.0, 1.2], 1), ([1.0, 1.005, 1.2], 1)],
    ids=["in order", "overtaken", "at once"],
)
def test_the_order_of_a_key_is_kept(moments, count):
    ids = [f"evt_{number}" for number in range(3)]
    sent = [Sent(id_, 0, "key", 0.0, 0.0) for id_ in ids]
    arrivals = [Arrival(ORDERED, id_, "n0", at, at + 0.01) for id_, at in zip(ids, moments, strict=True)]
    arrivals.sort(key=lambda each: each.began)
    cluster, toll = SimpleNamespace(receiver=SimpleNamespace(arrivals=arrivals), sent=sent), Toll()
    _find_disorder(cluster, toll, dict.fromkeys(ids, "key"), dict.fromkeys(ids, 0), frozen=[])
    assert len(toll.disordered) == count


TABLES = """
    CREATE TABLE events (id bigint, public_id uuid DEFAULT gen_random_uuid());
    CREATE TABLE deliveries (id bigint, event_id bigint, destination text, latest_key text);
    CREATE TABLE ends (delivery_id bigint, destination text, state text, reason text, attempts int);
    INSERT INTO events SELECT generate_series(1, 2);
"""


@needs_postgres
@pytest.mark.parametrize(
    ("destination", "end", "newer_key", "is_permitted"),
    [
        (LIMITED, ("dead", "backlog_full", 0), None, True),
        (LIMITED, ("dead", "backlog_full", 1), None, False),
        (LIMITED, ("dead", "exhausted", 5), None, False),
        ("d0", ("dead", "backlog_full", 0), None, False),
        (LATEST, ("expired", "superseded", 0), "key", True),
        (LATEST, ("expired", "superseded", 0), "another key", False),
        (LATEST, ("expired", "held", 0), "key", False),
        ("d0", ("expired", "superseded", 0), "key", False),
    ],
)
async def test_only_a_full_backlog_and_a_newer_event_end_a_delivery_without_success(
    tmp_path, destination, end, newer_key, is_permitted
):
    connection = await asyncpg.connect(database_of(tmp_path))
    try:
        await connection.execute(TABLES)
        insert = "INSERT INTO deliveries VALUES ($1, $1, $2, $3)"
        await connection.executemany(insert, [(1, destination, "key"), (2, destination, newer_key)])
        await connection.execute("INSERT INTO ends VALUES (1, $1, $2, $3, $4)", destination, *end)
        await connection.execute("INSERT INTO ends VALUES (2, $1, 'delivered', NULL, 1)", destination)
        [row] = await connection.fetch(UNDELIVERED_SQL, LIMITED, LATEST)
    finally:
        await connection.close()
        drop_databases()
    assert (row[0], row[2], row[3]) == (destination, f"{end[0]} ({end[1]})", is_permitted)


@pytest.mark.parametrize(
    ("after", "early", "count"),
    [(-0.9, 1.0, 0), (-1.1, 1.0, 1), (-1.1, 3.0, 0), (-3.1, 3.0, 1), (9.1, 3.0, 1)],
)
async def test_a_silent_worker_must_be_marked_at_its_deadline(monkeypatch, after, early, count):
    """Not earlier than unwritten heartbeats of a killed node explain."""

    class Marked:
        nodes = ()

        async def fetch(self, _sql):
            return [("w000", "whatsapp.worker.offline", 100.0 + PATIENCE + after)]

    async def no_sleep(_seconds):
        """Return at once."""

    monkeypatch.setattr("torture.cluster_workers.asyncio.sleep", no_sleep)
    fleet = Fleet(Marked(), random.Random(1), 1)
    fleet._heard["w000"] = 100.0
    await fleet.silence(["w000"], early=early)
    assert len(fleet.faults) == count


BROKEN = [
    {"lost": {"evt_1": 5.0}}, {"keys_twice": 1}, {"missing": 1}, {"undelivered": 1}, {"unaccounted": 1},
    {"failed": {"d0: dead (exhausted)": 1}}, {"most_pending": LIMIT + 1}, {"workers": ["w001"]},
    {"crowded": ["5 at d0"]}, {"disordered": ["key"]}, {"unexplained": ["d0"]}, {"failover": 1.0},
    {"failover": 6.0, "warned": True, "lost": {"evt_1": 5.0}},
]  # fmt: skip


@pytest.mark.parametrize("fields", BROKEN, ids=" ".join)
def test_each_broken_promise_is_a_fault(fields):
    assert len(Toll(**fields).faults()) == 1
    assert Toll().faults() == Toll(failover=4.0, warned=True, lost={"evt_1": 5.0}).faults() == []
