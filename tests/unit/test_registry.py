"""The rules of the worker registry, as the table at its head lists them."""

import msgspec
import pytest

from relay.base.clock import SECOND, rfc3339
from relay.config.maintenance import MaintenanceWindow
from relay.config.schema import WorkerRules
from relay.model import Heartbeat, Register, Session, SessionSeen, Unregister, Worker, WorkerChange
from relay.workers.rules import (
    FORMER,
    INTERNAL,
    MOST_DELETED,
    MOST_SESSIONS,
    OVERLAP,
    TOMBSTONE,
    Now,
    Plan,
    Step,
    apply,
    extend_deadline,
    follow_plan,
    former,
    heard_minutes,
    maintain,
    names_one_machine,
    note_refused,
    patterns_of,
    shown,
    silent,
)

RULES = WorkerRules(offline_after=90.0, startup_hold=120.0)
WALL, STEADY = 1_705_314_600_000_000, 5_000 * SECOND


def at(seconds: float) -> Now:
    """Return the time this number of seconds after the start of the test; the clocks differ on purpose."""
    return Now(wall=WALL + int(seconds * SECOND), steady=STEADY + int(seconds * SECOND))


def applied(row: Worker | None, change: WorkerChange, seconds: float = 0) -> Step:
    """Apply one change."""
    return apply(row, change, "whatsapp", at(seconds), RULES)


def types(step: Step) -> list[str]:
    """List the events that a step created."""
    return [generated.type for generated in step.generated]


REGISTER = Register(worker_id="w", endpoint="http://w:8001", version="1.0.0", max_sessions=50)
BEAT = Heartbeat(worker_id="w")
ONLINE = applied(None, REGISTER).worker
OFFLINE = msgspec.structs.replace(ONLINE, status="OFFLINE")
RESTING = msgspec.structs.replace(ONLINE, status="MAINTENANCE")
SERVICED = msgspec.structs.replace(RESTING, maintenance=True)
LOST = msgspec.structs.replace(RESTING, was_offline=True)
GONE = applied(ONLINE, Unregister(worker_id="w")).worker


def report(status: str) -> Heartbeat:
    """Build a heartbeat with a status."""
    return Heartbeat(worker_id="w", status=status)


@pytest.mark.parametrize(
    ("row", "change", "seconds", "status", "events"),
    [
        (None, REGISTER, 0, "ONLINE", ["worker.registered"]),
        (None, BEAT, 0, "ONLINE", ["worker.registered"]),
        (None, report("OFFLINE"), 0, "OFFLINE", ["worker.registered"]),
        (ONLINE, REGISTER, 5, "ONLINE", []),
        (ONLINE, BEAT, 5, "ONLINE", []),
        (ONLINE, report("OFFLINE"), 5, "OFFLINE", ["worker.offline"]),
        (ONLINE, report("MAINTENANCE"), 5, "MAINTENANCE", []),
        (OFFLINE, BEAT, 5, "ONLINE", ["worker.online"]),
        (OFFLINE, REGISTER, 5, "ONLINE", ["worker.online"]),
        (OFFLINE, report("OFFLINE"), 5, "OFFLINE", []),
        (OFFLINE, report("MAINTENANCE"), 5, "MAINTENANCE", []),
        (RESTING, BEAT, 5, "MAINTENANCE", []),
        (RESTING, report("ONLINE"), 5, "ONLINE", []),
        (RESTING, REGISTER, 5, "ONLINE", []),
        (RESTING, report("OFFLINE"), 5, "OFFLINE", ["worker.offline"]),
        (LOST, report("ONLINE"), 5, "ONLINE", ["worker.online"]),
        (LOST, report("OFFLINE"), 5, "OFFLINE", []),
        (LOST, BEAT, 5, "MAINTENANCE", []),
        (SERVICED, report("ONLINE"), 5, "MAINTENANCE", []),
        (SERVICED, report("OFFLINE"), 5, "MAINTENANCE", []),
        (SERVICED, REGISTER, 5, "MAINTENANCE", []),
        (ONLINE, Unregister(worker_id="w"), 5, "OFFLINE", ["worker.unregistered"]),
        (GONE, Unregister(worker_id="w"), 5, "OFFLINE", []),
        (GONE, BEAT, 9.9, "OFFLINE", []),
        (GONE, BEAT, 10, "ONLINE", ["worker.registered"]),
        (GONE, REGISTER, 1, "ONLINE", ["worker.registered"]),
    ],
)
def test_each_request_has_its_documented_effect_in_each_state(row, change, seconds, status, events):
    step = applied(row, change, seconds)
    assert (step.worker.status, types(step)) == (status, events)


def test_an_unregister_of_an_unknown_worker_changes_nothing():
    assert applied(None, Unregister(worker_id="w")) == Step(worker=None, quiet=True)


def test_a_registration_fills_the_row():
    assert (
        Worker(
            source="whatsapp",
            id="w",
            endpoint="http://w:8001",
            version="1.0.0",
            max_sessions=50,
            registered_at=WALL,
            last_heartbeat=WALL,
            minutes=1,
            deadline=STEADY + 90 * SECOND,
        )
        == ONLINE
    )


def test_registering_again_updates_the_row_but_not_registered_at():
    row = applied(ONLINE, Register(worker_id="w", endpoint="http://w:8002", version="2.0.0"), 60).worker
    assert (row.endpoint, row.version, row.registered_at) == ("http://w:8002", "2.0.0", WALL)
    assert (row.last_heartbeat, row.deadline) == (WALL + 60 * SECOND, STEADY + 150 * SECOND)


def test_a_worker_that_returns_after_its_unregister_is_new():
    row = applied(GONE, REGISTER, 60).worker
    assert (row.unregistered_at, row.registered_at) == (None, WALL + 60 * SECOND)


def test_a_late_heartbeat_after_an_unregister_changes_nothing():
    assert applied(GONE, BEAT, 5) == Step(worker=GONE, quiet=True)
    assert TOMBSTONE == 10 * SECOND


def test_a_heartbeat_changes_only_the_fields_that_it_reports():
    beat = Heartbeat(
        worker_id="w", cpu=45.5, memory=67.8, uptime=3600.0, message_count=1250, counts={"total": 25}
    )
    row = applied(ONLINE, beat, 30).worker
    assert (row.cpu, row.memory, row.uptime, row.message_count, row.counts) == (
        45.5,
        67.8,
        3600.0,
        1250,
        {"total": 25},
    )
    assert (row.endpoint, row.version, row.max_sessions) == ("http://w:8001", "1.0.0", 50)
    later = applied(row, BEAT, 60).worker
    assert (later.cpu, later.counts, later.last_heartbeat) == (45.5, {"total": 25}, WALL + 60 * SECOND)


def listed(status: str = "CONNECTED", last_activity: str = "10:30") -> Heartbeat:
    """Build a heartbeat with a list of one session."""
    session = Session(id="s", status=status, last_activity=last_activity)
    return Heartbeat(worker_id="w", sessions=(session,))


@pytest.mark.parametrize(
    ("first", "second", "quiet"),
    [
        (BEAT, BEAT, True),
        (BEAT, Heartbeat(worker_id="w", cpu=99.0, memory=1.0, uptime=7.0, message_count=5), True),
        (listed(), listed(last_activity="10:31"), True),
        (listed(), listed(status="DISCONNECTED"), False),
        (listed(), Heartbeat(worker_id="w", sessions=()), False),
        (BEAT, Heartbeat(worker_id="w", counts={"total": 1}), False),
        (BEAT, Heartbeat(worker_id="w", version="2.0.0"), False),
        (BEAT, Heartbeat(worker_id="w", environment="TEST"), False),
        (BEAT, report("OFFLINE"), False),
        (report("OFFLINE"), BEAT, False),
        (report("MAINTENANCE"), BEAT, True),
    ],
)
def test_a_heartbeat_is_quiet_if_only_its_time_and_gauges_change(first, second, quiet):
    row = applied(ONLINE, first, 30).worker
    assert applied(row, second, 60).quiet is quiet


@pytest.mark.parametrize("change", [REGISTER, BEAT])
def test_the_first_heartbeat_of_a_worker_is_never_quiet(change):
    assert applied(None, change).quiet is False


@pytest.mark.parametrize(
    ("row", "seconds", "marked"),
    [
        (ONLINE, 90, False),
        (ONLINE, 90.1, True),
        (OFFLINE, 1000, False),
        (RESTING, 1000, False),
        (SERVICED, 1000, False),
        (msgspec.structs.replace(ONLINE, maintenance=True), 1000, False),
        (GONE, 1000, False),
    ],
)
def test_only_an_online_worker_past_its_deadline_is_marked_offline(row, seconds, marked):
    assert (silent(row, at(seconds)) is not None) is marked


def test_a_worker_goes_offline_once_with_reason_and_previous_status():
    after, generated = silent(ONLINE, at(91))
    assert silent(after, at(200)) is None
    assert (generated.type, generated.subject) == ("worker.offline", "w")
    assert (generated.data["previous"], generated.data["reason"]) == ("ONLINE", "silent")


@pytest.mark.parametrize(
    ("row", "change", "previous", "reason"),
    [
        (None, REGISTER, None, "new"),
        (OFFLINE, BEAT, "OFFLINE", "heard"),
        (ONLINE, report("OFFLINE"), "ONLINE", "reported"),
        (RESTING, Unregister(worker_id="w"), "MAINTENANCE", "requested"),
    ],
)
def test_an_event_has_the_row_the_previous_status_and_the_reason(row, change, previous, reason):
    step = applied(row, change)
    [generated] = step.generated
    assert (generated.subject, generated.data["previous"], generated.data["reason"]) == (
        "w",
        previous,
        reason,
    )
    assert generated.data["worker"]["status"] == step.worker.status


def test_the_row_in_an_event_has_no_internal_fields():
    [generated] = applied(None, REGISTER).generated
    row = msgspec.json.decode(msgspec.json.encode(generated.data))["worker"]
    assert row.keys() == set(Worker.__struct_encode_fields__) - set(INTERNAL)
    assert (row["registered_at"], row["last_heartbeat"]) == ("2024-01-15T10:30:00.000Z",) * 2


def test_a_former_id_has_35_seconds_left_until_its_next_heartbeat():
    row = former(ONLINE, at(0))
    assert (row.deadline, FORMER) == (STEADY + 35 * SECOND, 35 * SECOND)
    assert former(ONLINE, at(80)).deadline == ONLINE.deadline
    assert applied(row, BEAT, 30).worker.deadline == STEADY + 120 * SECOND


@pytest.mark.parametrize("rules", [RULES, WorkerRules(offline_after=120.0, startup_hold=5.0)])
def test_after_a_start_an_online_worker_has_the_longer_deadline(rules):
    assert extend_deadline(ONLINE, at(500), rules).deadline == STEADY + 620 * SECOND


@pytest.mark.parametrize("row", [OFFLINE, RESTING, GONE])
def test_after_a_start_other_workers_keep_their_deadlines(row):
    assert extend_deadline(row, at(500), RULES) == row


PATIENT = WorkerRules(offline_after=90.0, recover_after=3)


def test_a_silent_worker_is_online_only_after_enough_heartbeats_in_time():
    row, statuses = OFFLINE, []
    for seconds in (200, 230, 260):
        step = apply(row, BEAT, "whatsapp", at(seconds), PATIENT)
        row = step.worker
        statuses.append((row.status, types(step)))
    assert statuses == [("OFFLINE", []), ("OFFLINE", []), ("ONLINE", ["worker.online"])]
    assert row.beats == 0


def test_a_late_heartbeat_restarts_the_count_of_recovery():
    row = apply(OFFLINE, BEAT, "whatsapp", at(200), PATIENT).worker
    row = apply(row, BEAT, "whatsapp", at(400), PATIENT).worker
    assert (row.status, row.beats) == ("OFFLINE", 1)


def test_a_register_recovers_without_further_heartbeats():
    assert apply(OFFLINE, REGISTER, "whatsapp", at(200), PATIENT).worker.status == "ONLINE"


@pytest.mark.parametrize(
    ("before", "after", "restarted"),
    [(3600, 5, True), (3600, 3630, False), (3600, 3596, False), (None, 5, False), (3600, None, False)],
)
def test_a_decreased_uptime_is_a_restart(before, after, restarted):
    row = msgspec.structs.replace(ONLINE, uptime=before)
    step = applied(row, Heartbeat(worker_id="w", uptime=after), 30)
    assert (types(step) == ["worker.restarted"]) is restarted
    assert step.worker.restarts == restarted
    assert step.quiet is not restarted


def test_a_session_event_keeps_the_registry_current_without_a_heartbeat():
    one = applied(ONLINE, SessionSeen(session=Session(id="s1", status="qr_required", phone="+62")), 5)
    two = applied(one.worker, SessionSeen(session=Session(id="s1", status="connected")), 10)
    assert two.worker.sessions == (Session(id="s1", status="connected", phone="+62"),)
    assert (two.worker.last_heartbeat, types(two), two.quiet) == (ONLINE.last_heartbeat, [], False)


def listing(*ids):
    return Heartbeat(worker_id="w", sessions=tuple(Session(id=id_) for id_ in ids))


@pytest.mark.parametrize(
    ("lists", "left"),
    [
        ([()], "abc"),
        ([(), ()], ""),
        ([("a",)], "abc"),
        ([(), ("a",)], "abc"),
        ([(), ("a",), ("a", "b"), ("a", "b", "c")], "abc"),
        ([(), ("a",), ("a",)], "a"),
        ([("a", "b", "c"), ("a",)], "a"),
        ([("d",), ("d",)], "d"),
    ],
)
def test_sessions_to_restore_stay_while_each_list_contains_more_of_them(lists, left):
    known = tuple(Session(id=id_) for id_ in "abc")
    change = msgspec.structs.replace(REGISTER, recover=True, sessions=known)
    for before in (None, ONLINE, OFFLINE, GONE):
        row = applied(before, change).worker
        for number, ids in enumerate(lists, 1):
            row = applied(row, listing(*ids), 30 * number).worker
        assert sorted(statuses(row)) == list(left)
        assert not {"recovering", "fresh"} & shown(row).keys()


def test_a_worker_without_former_sessions_has_none_to_restore():
    row = applied(ONLINE, listing("a"), 5).worker
    row = applied(row, msgspec.structs.replace(REGISTER, recover=True), 10).worker
    assert (row.sessions, row.recovering, row.fresh) == ((), (), False)


@pytest.mark.parametrize(
    ("endpoint", "names"),
    [
        ("http://10.0.0.7:8001", True), ("http://worker-1:8001", True), ("https://w.example/x", True),
        ("worker-1:8001", True), ("http://[fd00::1]:8001", True), ("http://192.168.0.3", True),
        ("http://localhost:8001", False), ("localhost:8001", False), ("http://LOCALHOST", False),
        ("http://127.0.0.1:8001", False), ("http://127.1:8001", False), ("http://[::1]:8001", False),
        ("http://[::ffff:127.0.0.1]:8001", False), ("http://0.0.0.0:8001", False), ("http://[::]:1", False),
        ("http://app.localhost", False), ("http://localhost.localdomain:1", False), ("127.0.0.1", False),
        ("", False), ("http://", False), ("http://[broken", False),
    ],
)  # fmt: skip
def test_a_loopback_endpoint_names_no_machine(endpoint, names):
    assert names_one_machine(endpoint) is names


@pytest.mark.parametrize("row", [None, GONE])
def test_a_session_of_an_unknown_worker_creates_no_worker(row):
    step = applied(row, SessionSeen(session=Session(id="s1", status="connected")), 60)
    assert (step.worker, step.generated) == (row, ())


def test_the_sessions_of_one_worker_are_limited():
    many = tuple(Session(id=str(number)) for number in range(MOST_SESSIONS + 5))
    row = applied(ONLINE, Heartbeat(worker_id="w", sessions=many)).worker
    assert len(row.sessions) == MOST_SESSIONS
    assert applied(row, SessionSeen(session=Session(id="new"))).worker == row


def iso(seconds):
    return rfc3339(WALL + int(seconds * SECOND))


def turned(status, reported, id_="s1"):
    """Build a session's event that was made this number of seconds after the start of the test."""
    written = reported if isinstance(reported, str | None) else iso(reported)
    return SessionSeen(
        session=Session(id=id_, status=status, last_activity=written), worker_id="w", at=written
    )


def statuses(row):
    return {session.id: session.status for session in row.sessions}


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (turned("connected", 10), turned("connecting", 9.999), "connected"),
        (turned("connected", 10), turned("disconnected", 10), "disconnected"),
        (turned("connected", 10), turned("disconnected", 11), "disconnected"),
        (turned("connected", 10), turned("disconnected", None), "disconnected"),
        (turned("connected", None), turned("disconnected", 5), "disconnected"),
        (turned("connected", "soon"), turned("disconnected", 5), "disconnected"),
        (turned("connected", 86_400), turned("disconnected", 86_401), "disconnected"),
        (turned("connected", 86_400), turned("disconnected", 86_399), "disconnected"),
        (turned("connected", 86_400), turned("disconnected", 25), "disconnected"),
        (turned("connected", 86_400), turned("disconnected", 19), "connected"),
    ],
)  # fmt: skip
def test_an_older_event_changes_no_session_and_a_future_time_counts_as_now(first, second, status):
    row = applied(ONLINE, first, 20).worker
    step = applied(row, second, 30)
    assert statuses(step.worker) == {"s1": status}
    assert step.quiet is (status == "connected")


def test_a_deleted_session_is_not_revived_by_an_older_event():
    row = applied(ONLINE, turned("connected", 1), 1).worker
    row = applied(row, turned("deleted", 5), 5).worker
    assert applied(row, turned("disconnected", 4), 6).worker.sessions == ()
    assert statuses(applied(row, turned("created", 7), 7).worker) == {"s1": "created"}


def test_only_the_last_deleted_sessions_are_remembered_and_none_is_shown():
    row = ONLINE
    for number in range(MOST_DELETED + 10):
        row = applied(row, turned("connected", number, str(number)), number).worker
        row = applied(row, turned("deleted", number, str(number)), number).worker
    assert len(row.changed) == MOST_DELETED
    assert "changed" not in shown(row)


@pytest.mark.parametrize(
    ("listed", "reported", "status"),
    [(5, 10, "connected"), (10, 10, "LISTED"), (11, 10, "LISTED"), (None, 10, "LISTED"), (5, None, "LISTED")],
)
def test_an_older_list_does_not_undo_a_newer_event(listed, reported, status):
    row = applied(ONLINE, turned("connected", reported), 10).worker
    activity = None if listed is None else iso(listed)
    beat = Heartbeat(worker_id="w", sessions=(Session(id="s1", status="LISTED", last_activity=activity),))
    assert statuses(applied(row, beat, 11).worker) == {"s1": status}
    later = applied(row, beat, 10 + OVERLAP / SECOND).worker
    assert (statuses(later), later.changed) == ({"s1": "LISTED"}, {})  # at the next one the list decides


def test_an_older_list_does_not_revive_a_deleted_session():
    row = applied(ONLINE, turned("deleted", 10), 10).worker
    beat = Heartbeat(worker_id="w", sessions=(Session(id="s1", status="X", last_activity=iso(9)),))
    assert applied(row, beat, 11).worker.sessions == ()
    assert statuses(applied(row, beat, 30).worker) == {"s1": "X"}


def test_an_event_older_than_the_listed_activity_is_ignored():
    beat = Heartbeat(worker_id="w", sessions=(Session(id="s1", status="ON", last_activity=iso(5)),))
    row = applied(ONLINE, beat, 10).worker
    assert statuses(applied(row, turned("OLD", 4), 11).worker) == {"s1": "ON"}
    assert statuses(applied(row, turned("NEW", 5), 11).worker) == {"s1": "NEW"}
    ahead = Heartbeat(worker_id="w", sessions=(Session(id="s1", status="ON", last_activity=iso(86_400)),))
    row = applied(ONLINE, ahead, 10).worker
    assert statuses(applied(row, turned("NEW", 10), 11).worker) == {"s1": "NEW"}


def test_a_clock_that_was_set_back_freezes_no_session():
    row = applied(ONLINE, turned("connected", 7200), 7200).worker
    assert statuses(applied(row, turned("disconnected", 10), 10).worker) == {"s1": "disconnected"}


def test_a_worker_offline_before_maintenance_raises_online_after_it():
    row = maintain(OFFLINE, at(5), RULES, on=True)
    row = applied(row, BEAT, 30).worker
    assert row.status == "MAINTENANCE"
    row = maintain(row, at(40), RULES, on=False)
    assert row.status == "OFFLINE"
    assert types(applied(row, BEAT, 60)) == ["worker.online"]


@pytest.mark.parametrize("change", [REGISTER, BEAT])
def test_maintenance_outlasts_an_unregister_and_a_new_registration(change):
    row = maintain(ONLINE, at(5), RULES, on=True)
    row = applied(row, Unregister(worker_id="w"), 10).worker
    step = applied(row, change, 30)
    assert (step.worker.status, types(step)) == ("MAINTENANCE", ["worker.registered"])


def plan(row, seconds, rules=RULES, patterns=None):
    """Follow the plans for a worker; the clocks differ, as everywhere."""
    return follow_plan(row, at(seconds), rules, {} if patterns is None else patterns)


def pattern_of(*rows, seconds=10):
    return patterns_of(rows, at(seconds))


HOUR = STEADY + 3600 * SECOND
BY_PATTERN = maintain(ONLINE, at(5), RULES, on=True, plan=Plan("operator", HOUR, "whatsapp/w*"))
LATER = msgspec.structs.replace(ONLINE, id="w2")
WINDOW = MaintenanceWindow(ids="w*", start="10:30", end="11:30")  # the test begins at 10:30
PLANNED = WorkerRules(offline_after=90.0, maintenance=(WINDOW,))


def test_maintenance_with_an_end_ends_by_itself_and_gives_a_new_deadline():
    row = maintain(ONLINE, at(5), RULES, on=True, plan=Plan("operator", HOUR))
    assert (shown(row)["maintenance_by"], shown(row)["maintenance_until"]) == ("operator", rfc3339(HOUR))
    assert plan(row, 3599) is row
    assert silent(row, at(3599)) is None
    row = plan(row, 3600)
    assert (row.status, row.maintenance, row.deadline) == ("ONLINE", False, at(3690).steady)
    assert (shown(row)["maintenance_by"], shown(row)["maintenance_until"]) == (None, None)
    assert silent(row, at(3690)) is None
    assert silent(row, at(3691)) is not None


def test_an_operator_s_pattern_includes_workers_that_come_later():
    patterns = pattern_of(ONLINE, BY_PATTERN)
    assert patterns == {"whatsapp/w*": HOUR}
    row = plan(LATER, 10, patterns=patterns)
    assert (row.status, row.maintenance_until, row.maintained_as) == ("MAINTENANCE", HOUR, "whatsapp/w*")
    assert pattern_of(row) == patterns  # also without the first worker
    for other in ({"source": "adorn"}, {"id": "x"}):
        other_row = msgspec.structs.replace(LATER, **other)
        assert plan(other_row, 10, patterns=patterns) is other_row
    assert pattern_of(BY_PATTERN, seconds=3600) == {}


def test_one_worker_leaves_the_maintenance_of_a_pattern():
    row = maintain(BY_PATTERN, at(10), RULES, on=False)
    assert plan(row, 20, patterns=pattern_of(BY_PATTERN)) is row
    assert plan(row, 20, patterns={"*/w": HOUR}).maintenance  # another pattern
    again = maintain(row, at(30), RULES, on=True, plan=Plan("operator", HOUR, "whatsapp/w*"))
    ended = maintain(again, at(40), RULES, on=False, plan=Plan("operator", None, "whatsapp/w*"))
    assert plan(ended, 50, patterns={"whatsapp/w*": HOUR}).maintenance  # the whole pattern ended and began


def test_a_planned_window_begins_and_ends_by_the_clock():
    row = plan(ONLINE, 10, PLANNED)
    assert (row.status, row.maintenance_by, row.maintenance_until) == ("MAINTENANCE", "config", HOUR)
    assert plan(row, 3599, PLANNED) is row
    assert not plan(row, 3600, PLANNED).maintenance
    assert plan(row, 20, RULES).status == "ONLINE"  # a reload removed the window
    assert plan(OFFLINE, 10, PLANNED).was_offline
    assert applied(row, report("OFFLINE"), 20).generated == ()
    assert plan(GONE, 10, PLANNED) is GONE


def test_an_operator_ends_a_planned_window_for_a_worker():
    row = maintain(plan(ONLINE, 10, PLANNED), at(20), PLANNED, on=False)
    assert plan(row, 3599, PLANNED) is row
    tomorrow = 86_400 + 10
    assert plan(row, tomorrow, PLANNED).maintenance


def test_maintenance_by_an_operator_continues_in_and_after_a_window():
    row = maintain(ONLINE, at(5), PLANNED, on=True)
    assert plan(row, 10, PLANNED) is row
    assert plan(row, 4000, PLANNED) is row
    short = maintain(ONLINE, at(5), PLANNED, on=True, plan=Plan("operator", at(100).steady))
    row = plan(short, 100, PLANNED)  # the window continues
    assert (row.maintenance_by, row.maintenance_until, row.status) == ("config", HOUR, "MAINTENANCE")


def test_an_unregistered_worker_keeps_its_maintenance_until_the_end():
    row = applied(BY_PATTERN, Unregister(worker_id="w"), 10).worker
    assert applied(row, REGISTER, 30).worker.maintenance_until == HOUR
    row = plan(row, 3600)
    assert (row.maintenance, row.status, row.unregistered_at is None) == (False, "OFFLINE", False)


def test_an_unregister_in_the_future_hides_no_heartbeat():
    assert applied(GONE, BEAT, -86_400).worker.status == "ONLINE"


def test_a_deleted_session_is_forgotten():
    row = applied(ONLINE, SessionSeen(session=Session(id="s1", status="connected"))).worker
    assert applied(row, SessionSeen(session=Session(id="s1", status="deleted"))).worker.sessions == ()


@pytest.mark.parametrize(
    ("beats", "now", "heard"),
    [
        ((0,), 0, "1"),
        ((0,), 59 * 60, "1" + "0" * 59),
        ((0,), 60 * 60, ""),
        ((0, 20, 40, 70, 190), 190, "1101"),
        ((0, 1e9), 1e9, "1"),
        ((300, 0), 300, "100000"),  # the clock was set back
    ],
)
def test_a_row_has_the_minutes_in_which_the_worker_was_heard(beats, now, heard):
    row = None
    for seconds in beats:
        row = applied(row, BEAT, seconds).worker
    assert heard_minutes(row, at(now).wall) == heard.rjust(60, "0")


def test_registrations_and_refused_heartbeats_count_as_heard():
    row = note_refused(ONLINE, BEAT, at(120), RULES)
    assert heard_minutes(row, at(120).wall).endswith("0101")
