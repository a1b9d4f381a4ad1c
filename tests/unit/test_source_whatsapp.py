"""WhatsApp workers: the contents of replies, and heartbeats with odd values."""

import msgspec
import pytest
from samples import sources

from relay.config.schema import SourceConfig
from relay.config.secrets import Secrets
from relay.ingest.routes import Mount, Routes
from relay.model import Receipt, Session, SessionSeen, Worker
from relay.source import Incoming
from relay.sources.whatsapp import WhatsApp

SOURCE = sources()["whatsapp"]
TOKENS = Secrets.of("worker-secret-token-12345")


def beat(body: object, worker: str = "worker-001"):
    """Send a heartbeat."""
    return SOURCE.heartbeat(Incoming.of("PUT", "/", {}, msgspec.json.encode(body), worker=worker))


def register(source: WhatsApp, **body: object):
    """Send a registration."""
    request = Incoming.of("POST", "/", {}, msgspec.json.encode({"workerId": "w"} | body))
    return source.register(request).worker


def test_only_the_reply_to_a_heartbeat_contains_commands():
    commands = ({"type": "restart", "sessionId": "s"},)
    data = beat({}).reply(Receipt(commands=commands))["data"]
    assert data == {"workerId": "worker-001", "status": "acknowledged", "commands": list(commands)}


def test_assigned_sessions_are_those_that_the_worker_last_reported():
    accepted = SOURCE.assigned(Incoming.of("GET", "/", worker="w 1"))
    session = Session(id="s", status="CONNECTED", phone="+62", last_activity="2024-01-15T10:30:00.000Z")
    worker = Worker(source="whatsapp", id="w 1", sessions=(session,))
    assert accepted.asks == "w 1"
    assert accepted.reply(Receipt(worker=worker))["data"]["sessions"] == [
        {
            "sessionId": "s",
            "status": "CONNECTED",
            "phoneNumber": "+62",
            "displayName": None,
            "lastActivity": "2024-01-15T10:30:00.000Z",
        }
    ]


@pytest.mark.parametrize(("conflict", "rejects"), [("accept", False), ("reject", True)])
def test_a_setting_decides_whether_an_endpoint_may_be_reused(conflict, rejects):
    assert register(WhatsApp(tokens=TOKENS, conflict=conflict)).reject_conflict is rejects


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (50, 50),
        (50.0, 50),
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (-1, None),
        (1.5, None),
        (True, None),
        ("50", None),
        ([], None),
        (None, None),
    ],
)
def test_a_count_is_an_integer_within_64_bits(value, count):
    assert register(SOURCE, maxSessions=value).max_sessions == count
    assert beat({"messageCount": value}).worker.message_count == count


@pytest.mark.parametrize(
    ("value", "gauge"),
    [
        (45.5, 45.5),
        (3, 3.0),
        (-2.5, -2.5),
        (10**18, 1e18),
        (10**400, None),
        ("45%", None),
        (False, None),
        ({}, None),
    ],
)
def test_a_gauge_is_a_number_or_left_out(value, gauge):
    for body in ({"cpuUsage": value}, {"metrics": {"cpuUsage": value}}):
        assert beat(body).worker.cpu == gauge


def test_a_flat_gauge_overrides_a_nested_one():
    assert beat({"cpuUsage": 2, "metrics": {"cpuUsage": 1, "uptime": 5}}).worker.cpu == 2.0


@pytest.mark.parametrize("metrics", [None, [], "x", 5])
def test_metrics_of_the_wrong_type_are_ignored(metrics):
    assert beat({"status": "ONLINE", "metrics": metrics}).worker.status == "ONLINE"


@pytest.mark.parametrize(
    "sessions",
    [{f"status{n}": n for n in range(99)}, [{"sessionId": f"{n}", "status": f"{n}"} for n in range(99)]],
)
def test_unknown_session_statuses_are_limited(sessions):
    assert len(beat({"sessions": sessions}).worker.counts) <= 33


@pytest.mark.parametrize(
    ("reported", "status"),
    [
        ("ONLINE", "ONLINE"),
        (" offline ", "OFFLINE"),
        ("Maintenance", "MAINTENANCE"),
        ("busy", None),
        (1, None),
        (None, None),
    ],
)
def test_a_status_is_read_in_any_case_and_an_unknown_one_is_ignored(reported, status):
    assert beat({"status": reported}).worker.status == status
    assert register(SOURCE, status=reported).status == (status or "ONLINE")


def test_a_flat_body_is_kept_whole_and_byte_for_byte():
    body = b'\n{"sessionId": "s",  "status": "Connected", "n": 1.00}\n'
    event = SOURCE.session_status(Incoming.of("POST", "/", {}, body)).event
    assert (event.type, bytes(event.data)) == ("session.connected", body.strip())


def seen(path, body):
    """Return the session in a notification."""
    routes = Routes(
        (Mount(name="whatsapp", source=SOURCE, config=SourceConfig(name="whatsapp", plugin="whatsapp")),)
    )
    match = routes.find(path)
    incoming = Incoming.of("POST", path, {}, msgspec.json.encode(body), **match.params)
    return match.handlers["POST"](incoming).worker


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "/api/v1/webhooks/session-status",
            {"event": "connected", "sessionId": "s1", "workerId": "w",
             "data": {"status": "connected", "phoneNumber": "+62"}, "timestamp": "t"},
            SessionSeen(
                worker_id="w",
                session=Session(id="s1", status="connected", phone="+62", last_activity="t"),
                at="t",
            ),
        ),
        (
            "/api/v1/webhooks/session-status/s1",
            {"status": "QR_REQUIRED", "phoneNumber": None},
            SessionSeen(session=Session(id="s1", status="QR_REQUIRED")),
        ),
        (
            "/api/v1/workers/w/events",
            {"event": "session_status_changed", "sessionId": "s1", "data": {"status": "connected"}},
            SessionSeen(worker_id="w", session=Session(id="s1", status="connected")),
        ),
        (
            "/api/v1/workers/w/events",
            {"event": "message_sent", "sessionId": "s1", "data": {"status": "x"}},
            None,
        ),
        ("/api/v1/webhooks/message-status", {"sessionId": "s1", "status": "delivered"}, None),
        ("/api/v1/workers/w/events", {"event": "worker_started", "data": {"status": "ok"}}, None),
        ("/api/v1/workers/w/events", {"event": "session_deleted", "sessionId": "s1"},
         SessionSeen(session=Session(id="s1", status="deleted"), worker_id="w")),
        ("/api/v1/workers/w/events", {"event": "session_noticed", "sessionId": "s1", "data": [1]}, None),
    ],
)  # fmt: skip
def test_a_session_event_changes_the_session(path, body, expected):
    assert seen(path, body) == expected


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ("session_created", "created"), ("initializing", "initializing"), ("authenticated", "authenticated"),
        ("qr_ready", "qr_required"), ("session_qr_ready", "qr_required"), ("session.qr_ready", "qr_required"),
        ("connected", "connected"), ("session_connected", "connected"), ("SESSION_READY", "connected"),
        ("disconnected", "disconnected"), ("session-disconnected", "disconnected"),
        ("reconnecting", "reconnecting"), ("session_logged_out", "logged_out"), ("auth_failure", "error"),
        ("deleted", "deleted"), ("session_deleted", "deleted"), ("destroyed", "deleted"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("data", [{}, {"status": "initializing_"}, {"phoneNumber": "+62"}, None])
@pytest.mark.parametrize("path", ["/api/v1/webhooks/session-status", "/api/workers/w/events"])
def test_the_name_of_an_event_decides_a_session_s_status(path, event, status, data):
    body = {"event": event, "sessionId": "s1", "workerId": "w", "data": data}
    assert seen(path, body).session.status == status


@pytest.mark.parametrize(
    ("event", "reported", "status"),
    [
        ("session_created", "initializing", "initializing"),
        ("session_created", "INITIALIZING", "INITIALIZING"),
        ("disconnected", "logged_out", "logged_out"), ("disconnected", "connected", "disconnected"),
        ("connected", "CONNECTED", "CONNECTED"), ("session_status", "connected", "connected"),
        ("session_status_changed", "QR_REQUIRED", "QR_REQUIRED"), ("session_updated", "error", "error"),
    ],
)  # fmt: skip
def test_a_status_beside_an_event_name_counts_if_it_agrees_or_is_more_specific(event, reported, status):
    body = {"event": event, "sessionId": "s1", "workerId": "w", "data": {"status": reported}}
    assert seen("/api/v1/webhooks/session-status", body).session.status == status


@pytest.mark.parametrize(
    "event", ["message_sent", "message_failed", "worker_error", "worker_started", "x_connected"]
)
def test_an_unrelated_event_changes_no_session(event):
    assert seen("/api/v1/workers/w/events", {"event": event, "sessionId": "s1", "data": {}}) is None


@pytest.mark.parametrize(
    "event",
    ["message_sent", "incoming_message", "message.status", "session_message_status", "worker_error",
     "contact_update", "chat_deleted", "presence", "group-join"],
)  # fmt: skip
@pytest.mark.parametrize("status", ["delivered", "error", "deleted", "connected"])
def test_a_status_of_another_object_is_not_the_session_s(event, status):
    body = {"event": event, "sessionId": "s1", "data": {"status": status}}
    assert seen("/api/v1/workers/w/events", body) is None


@pytest.mark.parametrize("event", ["session_status", "status_changed", "connection.update", "state"])
def test_with_a_neutral_event_name_the_body_decides_the_status(event):
    for path in ("/api/v1/workers/w/events", "/api/webhooks/session-status"):
        body = {"event": event, "sessionId": "s1", "data": {"status": "connected"}}
        assert seen(path, body).session.status == "connected"


@pytest.mark.parametrize(
    ("timestamp", "at"),
    [("2024-01-15T10:30:00Z", "2024-01-15T10:30:00Z"), (1705314600000, 1705314600000), (1.5, 1.5),
     (True, None), (None, None), ([1], None), ({}, None)],
)  # fmt: skip
def test_a_session_event_has_its_own_time_in_any_format(timestamp, at):
    body = {"status": "CONNECTED", "sessionId": "s1", "timestamp": timestamp}
    assert seen("/api/v1/webhooks/session-status", body).at == at


@pytest.mark.parametrize(("known", "required"), [((), False), ((Session(id="s"), Session(id="t")), True)])
def test_with_recovery_the_reply_to_a_register_has_the_number_of_sessions_to_restore(known, required):
    source = WhatsApp(tokens=TOKENS, recover_sessions=True)
    accepted = source.register(Incoming.of("POST", "/", {}, b'{"workerId": "w"}'))
    assert accepted.worker.recover
    data = accepted.reply(Receipt(worker=Worker(source="whatsapp", id="w", sessions=known)))["data"]
    assert (data["recoveryRequired"], data["assignedSessionCount"]) == (required, len(known))
    assert [each["sessionId"] for each in data["assignedSessions"]] == [each.id for each in known]


def test_the_reply_to_a_second_register_lists_the_former_sessions():
    accepted = SOURCE.register(Incoming.of("POST", "/", {}, b'{"workerId": "w"}'))
    worker = Worker(source="whatsapp", id="w", sessions=(Session(id="s", status="CONNECTED"),))
    data = accepted.reply(Receipt(worker=worker))["data"]
    assert [session["sessionId"] for session in data["assignedSessions"]] == ["s"]
    assert (data["recoveryRequired"], data["assignedSessionCount"]) == (False, 0)
