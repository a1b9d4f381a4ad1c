"""WhatsApp workers: they register, send heartbeats, and report sessions and messages.

Four generations are in use. They differ in the base path (`/api/v1`, `/api`), in the shape of a heartbeat
(flat, under `metrics`, a list of sessions) and in the envelope of events. A worker whose registration fails
keeps running without heartbeats, and it sends each notification once. So the plugin accepts every request
that it can understand, and ignores a gauge that it cannot read.

Contract: docs/contracts/whatsapp.md#responses.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    EMPTY,
    LONGEST_ID,
    Accepted,
    Event,
    Heartbeat,
    Incoming,
    Invalid,
    Receipt,
    Refusal,
    Register,
    Reply,
    Secrets,
    Session,
    SessionSeen,
    Source,
    Unregister,
    WorkerChange,
    WorkerStatus,
    as_value,
    check_id,
    read_json,
    route,
)

_NULL = msgspec.Raw(b"null")
_BELOW_A_WORKER = ("/events", "/sessions/recovery-status", "/sessions-preserved", "/sessions/assigned")
_LARGEST = 2**63 - 1  # the largest integer of a database row
_MOST_COUNTS = 32  # kinds of session status in one heartbeat; eight are known
_LONGEST_TEXT = 1024  # characters of an endpoint or a description; other texts: LONGEST_ID
_STATUSES: dict[str, WorkerStatus] = {status: status for status in get_args(WorkerStatus)}
_STATUS_BY_NAME = {
    **dict.fromkeys(
        ("qr", "qr_code", "qr_ready", "qr_required", "qr_generated", "qr_updated"), "qr_required"
    ),
    **dict.fromkeys(("connected", "ready", "reconnected"), "connected"),
    **dict.fromkeys(("disconnected", "closed", "stopped"), "disconnected"),
    **dict.fromkeys(("logged_out", "logout"), "logged_out"),
    **dict.fromkeys(("error", "failed", "auth_failure"), "error"),
    **dict.fromkeys(("deleted", "removed", "destroyed", "terminated"), "deleted"),
    **{name: name for name in ("created", "initializing", "connecting", "authenticated", "reconnecting")},
}
"""Session status by the event's name without `session_`."""

_MORE_PRECISE = {
    "created": ("initializing", "qr_required", "connecting", "connected"),
    "disconnected": ("logged_out", "reconnecting", "error"),
}
"""Statuses that are more precise than the event's name: if the body has one of them, the relay uses it."""

_OF_SESSIONS = ("session", "status", "state", "connection")
"""Words in the names of events that carry a session's status."""

H = TypeVar("H", bound=Callable[..., Any])


def served(method: str, path: str) -> Callable[[H], H]:
    """Mark a handler below both bases, `/api/v1` and `/api` (docs/contracts/whatsapp.md#generations)."""

    def mark(handler: H) -> H:
        return route(method, f"/api/v1{path}")(route(method, f"/api{path}")(handler))

    return mark


class Registration(msgspec.Struct, rename="camel"):
    """The body of a registration; only the id must be valid."""

    worker_id: str
    endpoint: Any = None
    description: Any = None
    version: Any = None
    environment: Any = None
    max_sessions: Any = None
    status: Any = None


class Unregistration(msgspec.Struct, rename="camel"):
    """The body of `DELETE workers/unregister`."""

    worker_id: str


class Notice(msgspec.Struct, rename="camel"):
    """The body of a session or message event: an envelope if it has `event`, else flat."""

    event: str | None = None
    session_id: str | None = None
    worker_id: str | None = None
    status: Any = None
    phone_number: Any = None
    display_name: Any = None
    timestamp: msgspec.Raw = _NULL
    data: msgspec.Raw = EMPTY


class WhatsApp(
    Source, kind="whatsapp", decompresses=False,
    owns=("/api/v1/workers", "/api/v1/webhooks", "/api/workers", "/api/webhooks"),
):  # fmt: skip
    """WhatsApp workers of every generation; the percent-decoded id in the path identifies the worker."""

    tokens: Secrets
    conflict: Literal["accept", "reject"] = "accept"  # "reject": 409 to a new id at a live worker's endpoint
    recover_sessions: bool = False  # ask workers to restore their sessions after a restart

    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require one of the tokens."""
        incoming.bearer(self.tokens)

    def sign_of_life(self, incoming: Incoming) -> WorkerChange | None:
        """Treat each request to a worker's heartbeat path as a heartbeat, even if its body is invalid."""
        _, _, place = incoming.path.partition("/workers/")
        if place.endswith("/heartbeat"):
            return Heartbeat(worker_id=check_id(incoming.params["worker"]))
        if place == "register":
            return self.register(incoming).worker
        if place == "unregister":
            return self.unregister(incoming).worker
        if incoming.method == "DELETE" and place and not place.endswith(_BELOW_A_WORKER):
            return self.delete(incoming).worker
        return None

    @served("POST", "/workers/register")
    def register(self, incoming: Incoming) -> Accepted:
        """Register an id, or the same id again after a restart."""
        body = incoming.decode(Registration, loose=True)
        worker_id = check_id(body.worker_id, "workerId")
        if worker_id in (".", ".."):
            # Clients and proxies remove these from a path, even percent-encoded: no heartbeat would arrive.
            raise Invalid(field="workerId", issue="clients and proxies remove this id from paths")
        change = Register(
            worker_id=worker_id,
            endpoint=_text(body.endpoint, _LONGEST_TEXT),
            description=_text(body.description, _LONGEST_TEXT),
            version=_text(body.version),
            environment=_text(body.environment),
            max_sessions=_whole(body.max_sessions),
            status=_status(body.status) or "ONLINE",
            reject_conflict=self.conflict == "reject",
            recover=self.recover_sessions,
        )

        def reply(receipt: Receipt) -> dict[str, Any]:
            data = {
                "workerId": worker_id,
                "status": "registered",
                "assignedSessions": (sessions := _assigned(receipt)),
                "message": "Worker registered successfully",
                "recoveryRequired": self.recover_sessions and bool(sessions),
                "assignedSessionCount": len(sessions) if self.recover_sessions else 0,
            }
            return {"success": True, "data": data}

        return Accepted(worker=change, reply=reply)

    @served("PUT", "/workers/{worker:path}/heartbeat")
    def heartbeat(self, incoming: Incoming) -> Accepted:
        """Accept a heartbeat, also from a worker that has never registered."""
        worker_id = check_id(incoming.params["worker"], "workerId")

        def reply(receipt: Receipt) -> dict[str, Any]:
            data = {"workerId": worker_id, "status": "acknowledged", "commands": list(receipt.commands)}
            return {"success": True, "data": data}

        return Accepted(worker=_heartbeat(worker_id, incoming.decode(dict, loose=True)), reply=reply)

    @served("DELETE", "/workers/unregister")
    @served("POST", "/workers/unregister")
    def unregister(self, incoming: Incoming) -> Accepted:
        """Unregister the worker that the body names."""
        return _unregister(incoming.decode(Unregistration, loose=True).worker_id)

    @served("DELETE", "/workers/{worker:path}")
    def delete(self, incoming: Incoming) -> Accepted:
        """Unregister the worker that the path names."""
        return _unregister(incoming.params["worker"])

    @served("POST", "/workers/{worker:path}/events")
    def event(self, incoming: Incoming) -> Accepted:
        """Accept an event of a worker; unlike the webhooks, it must have an envelope."""
        reply = {"success": True, "message": "Event received"}
        notice = incoming.decode(Notice)
        return _accept(incoming, notice, reply, of_session=_is_of_session(notice.event or ""))

    @served("POST", "/webhooks/session-status")
    @served("POST", "/webhooks/session-status/{session}")
    def session_status(self, incoming: Incoming) -> Accepted:
        """Accept a change of a session; a flat body gets its type from its status."""
        notice = incoming.decode(Notice)
        status = notice.status.strip().lower() if isinstance(notice.status, str) else ""
        if not notice.event and not status:
            raise Invalid(field="status", issue="field is required")
        reply = {"success": True, "message": "Session status updated"}
        return _accept(incoming, notice, reply, flat=f"session.{status}", of_session=True)

    @served("POST", "/webhooks/message-status")
    def message_status(self, incoming: Incoming) -> Accepted:
        """Accept the status of a message."""
        reply = {"success": True, "message": "Message status updated"}
        return _accept(incoming, incoming.decode(Notice), reply, flat="message_status")

    @served("POST", "/workers/{worker:path}/sessions/recovery-status")
    def recovery_status(self, incoming: Incoming) -> Accepted:
        """Accept the result of a worker's session recovery."""
        return _accept(incoming, incoming.decode(Notice), _received(incoming), flat="session.recovery_status")

    @served("POST", "/workers/{worker:path}/sessions-preserved")
    def sessions_preserved(self, incoming: Incoming) -> Accepted:
        """Accept the list of sessions that a worker kept at its shutdown."""
        return _accept(incoming, incoming.decode(Notice), _received(incoming), flat="session.preserved")

    @served("GET", "/workers/{worker:path}/sessions/assigned")
    def assigned(self, incoming: Incoming) -> Accepted:
        """Answer with the sessions that the worker reported last or must restore."""
        worker_id = check_id(incoming.params["worker"], "workerId")

        def reply(receipt: Receipt) -> dict[str, Any]:
            return {"success": True, "data": {"workerId": worker_id, "sessions": _assigned(receipt)}}

        return Accepted(asks=worker_id, reply=reply)

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Answer `{"success": false, "error": …, "code": …}`."""
        _ = incoming
        body = {"success": False, "error": refusal.detail, "code": refusal.code.upper()}
        return Reply(status=refusal.status, body=body)

    def samples(self) -> tuple[Incoming, ...]:
        """See `Source.samples`."""
        headers = {"Content-Type": "application/json"}
        one = f"/api/v1/workers/{_SAMPLE_ID}"
        return (
            Incoming.of("POST", "/api/v1/webhooks/session-status", headers, _QR_READY),
            Incoming.of("POST", "/api/v1/workers/register", headers, _REGISTER),
            Incoming.of("PUT", f"{one}/heartbeat", headers, _BEAT, worker=_SAMPLE_ID),
            Incoming.of("DELETE", one, worker=_SAMPLE_ID),
        )


def _unregister(worker_id: str) -> Accepted:
    """Unregister a worker; an unknown worker gets 200 too, because the result is the same."""
    change = Unregister(worker_id=check_id(worker_id, "workerId"))
    return Accepted(worker=change, reply={"success": True, "message": "Worker unregistered successfully"})


def _received(incoming: Incoming) -> dict[str, Any]:
    return {"success": True, "data": {"workerId": incoming.params["worker"], "status": "received"}}


def _accept(
    incoming: Incoming, notice: Notice, reply: dict[str, Any], *, flat: str = "", of_session: bool = False
) -> Accepted:
    """Return an event from an envelope, or from a flat body with the type `flat`."""
    if not notice.event and not flat:
        raise Invalid(field="event", issue="field is required")
    worker_id = incoming.params.get("worker") or notice.worker_id
    session_id = incoming.params.get("session") or notice.session_id
    context: dict[str, Any] = {}
    if worker_id:
        context["worker_id"] = check_id(worker_id, "workerId")
    if session_id:
        context["session_id"] = check_id(session_id, "sessionId")
    if bytes(notice.timestamp) != b"null" and len(bytes(notice.timestamp)) <= LONGEST_ID:
        context["timestamp"] = notice.timestamp
    event = Event(
        type=notice.event or flat,
        subject=session_id or worker_id or None,
        data=as_value(notice.data) if notice.event else msgspec.Raw(incoming.body.strip()),
        context=context,
    )
    seen = _session_in(notice, worker_id, session_id) if of_session else None
    return Accepted(event=event, worker=seen, reply=reply)


def _session_in(notice: Notice, worker_id: str | None, session_id: str | None) -> SessionSeen | None:
    """Return the session in a session's event, or None.

    The event's name decides (`connected`, `session_qr_ready`), because a status beside it may be the previous
    one. If the name contains no status (`session_status`), the status field decides.
    """
    data = _map(notice.data) if notice.event else {}
    status = _text(data.get("status")) or _text(notice.status)
    named = _status_in_name(notice.event or "")
    if named and status.lower() not in (named, *_MORE_PRECISE.get(named, ())):
        status = named
    if not session_id or not status or (notice.event or "").startswith("message"):
        return None
    session = Session(
        id=session_id,
        status=status,
        phone=_text(data.get("phoneNumber")) or _text(notice.phone_number) or None,
        name=_text(data.get("displayName")) or _text(notice.display_name) or None,
        last_activity=_stamp(notice.timestamp),
    )
    return SessionSeen(session=session, worker_id=worker_id or "", at=_at(notice.timestamp))


def _is_of_session(event: str) -> bool:
    """Return whether an event is about a session, by its name: messages and contacts have other statuses."""
    name = event.lower()
    about = "message" not in name and any(word in name for word in _OF_SESSIONS)
    return about or bool(_status_in_name(event))


def _status_in_name(event: str) -> str:
    """Return the session status in an event's name; `""` without a status."""
    name = event.strip().lower().replace("-", "_").replace(".", "_").replace(":", "_")
    return _STATUS_BY_NAME.get(name.removeprefix("session_"), "")


def _map(raw: msgspec.Raw) -> Mapping[str, Any]:
    """Decode an object, `{}` for anything else: a notification is sent once, so it must not be refused."""
    try:
        value = read_json(bytes(raw))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _at(raw: msgspec.Raw) -> str | float | None:
    """Return a timestamp that is text or a number, or None for other values."""
    text = bytes(raw)
    try:
        value = None if text[:1] in (b"{", b"[") else read_json(text)
    except ValueError:
        return None
    return value if type(value) in (str, int, float) else None  # not a bool


def _stamp(raw: msgspec.Raw) -> str | None:
    """Return a timestamp that is text, or None for other values."""
    return _text(_at(raw)) or None


def _heartbeat(worker_id: str, body: Mapping[str, Any]) -> Heartbeat:
    """Return a heartbeat of any generation: gauges flat or in `metrics`, sessions as counts or as a list."""
    metrics = body.get("metrics")
    data = {**metrics, **body} if isinstance(metrics, dict) else body
    counts, sessions = _sessions(data.get("sessions"))
    return Heartbeat(
        worker_id=worker_id,
        status=_status(data.get("status")),
        version=_text(data.get("version")) or None,
        environment=_text(data.get("environment")) or None,
        cpu=_number(data.get("cpuUsage")),
        memory=_number(data.get("memoryUsage")),
        uptime=_number(data.get("uptime")),
        message_count=_whole(data.get("messageCount")),
        counts=counts,
        sessions=sessions,
    )


def _sessions(value: Any) -> tuple[dict[str, int] | None, tuple[Session, ...] | None]:
    """Return a worker's session counts, and its sessions if it lists them."""
    if isinstance(value, dict):
        counts = {
            name: count
            for name, number in value.items()
            if len(name) <= LONGEST_ID and (count := _whole(number)) is not None
        }
        counts.pop("maxSessions", None)  # a limit, not a count
        return dict(list(counts.items())[:_MOST_COUNTS]), None
    if isinstance(value, list):
        read = [_session(item) for item in value if isinstance(item, dict)]
        sessions = tuple([session for session in read if session.id])
        by_status = Counter(session.status.lower() or "unknown" for session in sessions).most_common(
            _MOST_COUNTS
        )
        return {"total": len(sessions), **dict(by_status)}, sessions
    return None, None


def _session(item: Mapping[str, Any]) -> Session:
    return Session(
        id=_text(item.get("sessionId")),
        status=_text(item.get("status")),
        phone=_text(item.get("phoneNumber")) or None,
        name=_text(item.get("displayName")) or None,
        last_activity=_text(item.get("lastActivity")) or None,
    )


def _assigned(receipt: Receipt) -> list[dict[str, str | None]]:
    return [
        {
            "sessionId": session.id,
            "status": session.status,
            "phoneNumber": session.phone,
            "displayName": session.name,
            "lastActivity": session.last_activity,
        }
        for session in (receipt.worker.sessions if receipt.worker else ())
    ]


def _text(value: Any, longest: int = LONGEST_ID) -> str:
    """Return a text, `""` for other values and for a text that is too long."""
    return value if isinstance(value, str) and len(value) <= longest else ""


def _status(value: Any) -> WorkerStatus | None:
    return _STATUSES.get(_text(value).strip().upper())


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) <= _LARGEST else None  # not a bool


def _whole(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _LARGEST else None  # not a bool


_SAMPLE_ID = "hookferry-sample-worker"
"""Worker id of the samples. No real worker has this id, or the endpoint or session of the samples."""

_REGISTER = b"""{
  "workerId": "hookferry-sample-worker",
  "endpoint": "http://hookferry-sample-worker.invalid:8001",
  "maxSessions": 50,
  "description": "Primary worker instance",
  "status": "ONLINE",
  "version": "1.0.0",
  "environment": "PRODUCTION",
  "timestamp": "2024-01-15T10:30:00.000Z"
}"""
_BEAT = b"""{
  "status": "ONLINE",
  "cpuUsage": 45.5,
  "memoryUsage": 67.8,
  "uptime": 3600,
  "messageCount": 1250,
  "sessions": {
    "total": 25,
    "connected": 20,
    "disconnected": 2,
    "qr_required": 2,
    "reconnecting": 1,
    "error": 0
  },
  "timestamp": "2024-01-15T10:30:00.000Z"
}"""
_QR_READY = b"""{
  "event": "qr_ready",
  "sessionId": "hookferry-sample-session",
  "workerId": "hookferry-sample-worker",
  "data": {
    "status": "qr_required",
    "qrCode": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA...",
    "qrString": "1@ABC123XYZ..."
  },
  "timestamp": "2024-01-15T10:30:00.000Z"
}"""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer WhatsApp workers."""
    return [WhatsApp]
