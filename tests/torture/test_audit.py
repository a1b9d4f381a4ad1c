"""The oracle of the cluster suite: which repeated requests it excuses, and which it reports."""

from types import SimpleNamespace

import pytest

from relay.base.clock import SECOND
from torture.audit import Lanes, Toll, Trail, _find_unexplained
from torture.nodes import Arrival, Fault

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
    return {"lane": "crm", "node": node, "slot": SLOTS[node], "began": began, "ended": ended, "given": given}


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


def test_a_lane_that_was_handed_over_excuses_no_repetition():
    arrivals = [request("n0", 12.5), request("n1", 13.1)]
    attempts = [attempt("n0", 12.5, 13.4), attempt("n1", 13.1, 13.2)]
    leases = [lease("n0", 0.0, 13.0, given=True), lease("n1", 13.0, 900.0)]
    assert len(judge(arrivals, attempts, leases).unexplained) == 1


MOVED = (("n0", 12.5), ("n1", 13.1))


def test_attempts_that_a_stopping_node_has_cancelled_are_excused_as_often_as_it_says():
    arrivals = [
        request(node, at, event=event)
        for event in ("evt_1", "evt_2")
        for node, at in (("n0", 12.5), ("n1", 13.1))
    ]
    attempts = [attempt("n1", 13.1, 13.2, event=event) for event in ("evt_1", "evt_2")]
    leases = [lease("n0", 0.0, 13.0, given=True), lease("n1", 13.0, 900.0)]
    toll = judge(arrivals, attempts, leases, cancelled={("n0", "crm"): 1})
    assert (toll.cancelled, len(toll.unexplained)) == (1, 1)
