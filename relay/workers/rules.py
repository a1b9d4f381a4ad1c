"""The rules of the worker registry: pure functions of a row, an input and the time.

| input                                           | effect                                              |
|-------------------------------------------------|-----------------------------------------------------|
| register or heartbeat with a new id             | `worker.registered`                                 |
| register again while ONLINE                     | no event; the row is updated                        |
| heartbeat or register while OFFLINE             | `worker.online`                                     |
| no request before the deadline                  | `worker.offline`, reason `silent`                   |
| heartbeat or register with status OFFLINE       | `worker.offline`, reason `reported`                 |
| heartbeat or register with status MAINTENANCE   | no deadline until it reports ONLINE                 |
| DELETE                                          | `worker.unregistered`                               |
| a second DELETE, or a heartbeat within 10 s     | nothing                                             |
| any of these, refused by the relay              | the worker is alive; a DELETE is stored later       |
| a new id at the endpoint of another worker      | `worker.registered`; short deadline for the old id, |
|                                                 | unless many workers may share such an endpoint      |
| decreased uptime                                | `worker.restarted`                                  |
| maintenance by an operator or a planned window  | overrides reports; no deadline                      |

`offline` and `online` events alternate: a worker that was OFFLINE before its maintenance gets `online` when
it is ONLINE again, and no second `offline`.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from relay.base.clock import SECOND, instant, rfc3339
from relay.config.schema import WorkerRules
from relay.model import (
    GeneratedEvent,
    Heartbeat,
    Register,
    Session,
    SessionSeen,
    Unregister,
    Worker,
    WorkerChange,
    WorkerStatus,
)

INTERNAL = (
    "deadline",
    "heard",
    "rhythm",
    "unregistered_at",
    "beats",
    "was_offline",
    "leaving",
    "changed",
    "recovering",
    "fresh",
    "maintained_as",
    "exempt_until",
    "minutes",
)
"""Fields that no event and no list contains."""

_MAINTENANCE = ("maintenance", "maintenance_by", "maintenance_until", "maintained_as", "exempt_until")
"""Fields that a worker keeps when it unregisters."""

ENVIRONMENTS = ("DEVELOPMENT", "STAGING", "TESTING", "PRODUCTION")
"""Documented environments; others occur and are stored (docs/contracts/whatsapp.md#registration)."""

TOMBSTONE = 10 * SECOND
"""Time after an unregistration in which heartbeats are ignored (docs/contracts/whatsapp.md#heartbeat)."""

FORMER = 35 * SECOND
"""The shortest deadline of the old id at a reused endpoint: interval (30 s) and request timeout (5 s)."""

_SHARED = re.compile(r"(.*\.)?(localhost(\.localdomain)?|docker\.internal)\.?|127[.0-9]*")
_PRIVATE = tuple(
    ip_network(each)
    for each in (
        "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7",
        "fe80::/10",
    )
)  # fmt: skip

RESTARTED = 5.0
"""Seconds by which an uptime must decrease to count as a restart: workers round it, and use two clocks."""

MOST_SESSIONS = 1000
"""Maximum sessions per worker; each adds a few dozen bytes to every event about the worker."""

MOST_DELETED = 32
"""Deleted sessions kept per worker, so that a late event does not revive them."""

OVERLAP = 10 * SECOND
"""Microseconds by which a session list that arrives after a session's event may be older than the event."""


_MINUTE = 60 * SECOND
HEARD_MINUTES = 60
"""Minutes for which each worker's row has a bit."""

_CHANGES_A_PATH = re.compile(r"[#?\\]|%[0-9A-Fa-f]{2}|(?:^|(?<=/))\.\.?(?=/|\Z)|^/|//|/\Z")


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """One point in time on both clocks, microseconds."""

    wall: int
    steady: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a change."""

    worker: Worker | None  # the new row; None: no row
    generated: tuple[GeneratedEvent, ...] = ()
    quiet: bool = False  # only the heartbeat's time and gauges changed, so the row may be written later


def apply(row: Worker | None, change: WorkerChange, source: str, now: Now, rules: WorkerRules) -> Step:
    """Apply a worker's request to its row."""
    if isinstance(change, Unregister):
        return _unregister(row, now)
    if isinstance(change, SessionSeen):
        return _update_session(row, change, now)
    base = row or Worker(source=source, id=change.worker_id, registered_at=now.wall)
    has_left = row is not None and (row.unregistered_at is not None or row.leaving is not None)
    if has_left and row is not None and isinstance(change, Heartbeat) and _has_just_left(row, now):
        return Step(worker=row, quiet=True)
    if row is not None and row.unregistered_at is not None:
        kept = {name: getattr(row, name) for name in _MAINTENANCE}
        base = Worker(source=source, id=row.id, registered_at=now.wall, **kept)
        row = None
    if isinstance(change, Register):
        return _register(row, base, change, now, rules)
    return _heartbeat(row, base, change, now, rules)


def silent(row: Worker, now: Now) -> tuple[Worker, GeneratedEvent] | None:
    """Return the new row and the event of a worker past its deadline, or None if nothing changes.

    A worker whose unregister request was refused is unregistered.
    """
    if row.leaving is not None and row.unregistered_at is None:
        after = msgspec.structs.replace(row, status="OFFLINE", unregistered_at=row.leaving, leaving=None)
        return after, _generate("unregistered", after, row.status, "requested")
    if row.status != "ONLINE" or row.maintenance or now.steady <= row.deadline:
        return None
    after = msgspec.structs.replace(row, status="OFFLINE")
    return after, _generate("offline", after, row.status, "silent")


def note_refused(row: Worker, change: WorkerChange, now: Now, rules: WorkerRules) -> Worker:
    """Return a row after a request that the relay refused: its worker is alive, or unregisters.

    Creates no event, because nothing can be stored now; `silent` creates the event of an unregistered worker.
    """
    if row.unregistered_at is not None or isinstance(change, SessionSeen):
        return row
    if isinstance(change, Unregister):
        return msgspec.structs.replace(row, leaving=now.steady)
    if isinstance(change, Heartbeat) and _has_just_left(row, now):
        return row
    is_beat = isinstance(change, Heartbeat)
    return msgspec.structs.replace(
        row,
        leaving=None,
        last_heartbeat=now.wall,
        minutes=_minutes(row, now),
        deadline=_deadline(now, rules),
        last_beat=now.steady if is_beat else 0,
        rhythm=_rhythm(row, now, rules) if is_beat else row.rhythm,
    )


def extend_deadline(row: Worker, now: Now, rules: WorkerRules) -> Worker:
    """Extend the deadline of an ONLINE row after a start or suspension, when no heartbeat could arrive."""
    if row.status != "ONLINE":
        return row
    patience = max(rules.offline_after, rules.startup_hold)
    return msgspec.structs.replace(row, deadline=now.steady + int(patience * SECOND))


class Plan(msgspec.Struct, frozen=True):
    """A maintenance that a worker should be in: of a window in config.toml, or of an operator's pattern."""

    by: Literal["operator", "config"]
    until: int | None  # steady clock; None: until an operator ends it
    pattern: str = ""  # of an operator: "SOURCE/PATTERN", with the source "*" for all


def maintain(row: Worker, now: Now, rules: WorkerRules, *, on: bool, plan: Plan | None = None) -> Worker:
    """Start or end a worker's maintenance; both give it a new deadline.

    `plan` has its starter and its end; by default an operator starts it, without an end. If an operator ends
    a planned maintenance, or that of a pattern for one worker, it does not start again for this worker.
    """
    plan = plan or Plan("operator", None)
    if not on:
        if not row.maintenance:
            return row
        ended = msgspec.structs.replace(
            row,
            maintenance=False,
            maintenance_by=None,
            maintenance_until=None,
            maintained_as="" if plan.pattern == row.maintained_as else row.maintained_as,
            exempt_until=row.maintenance_until if row.maintenance_by == "config" else None,
        )
        if row.unregistered_at is not None:
            return ended
        status: WorkerStatus = "OFFLINE" if row.was_offline else "ONLINE"
        return msgspec.structs.replace(
            ended, status=status, was_offline=False, deadline=_deadline(now, rules)
        )
    begun = msgspec.structs.replace(
        row,
        maintenance=True,
        maintenance_by=plan.by,
        maintenance_until=plan.until,
        maintained_as=plan.pattern,
        exempt_until=None,
    )
    if row.maintenance:
        return begun
    return msgspec.structs.replace(
        begun, status="MAINTENANCE", was_offline=_is_lost(row), deadline=_deadline(now, rules)
    )


def patterns_of(rows: Iterable[Worker], now: Now) -> dict[str, int | None]:
    """Return the patterns of operators that are in force, each with its end (steady clock, None: no end).

    Workers that an operator's pattern put into maintenance remember it, also for workers that register later.
    """
    return {
        row.maintained_as: row.maintenance_until
        for row in rows
        if row.maintained_as and row.maintenance and not _is_over(row, now)
    }


def follow_plan(row: Worker, now: Now, rules: WorkerRules, patterns: Mapping[str, int | None]) -> Worker:
    """Return a row after its planned maintenance began, changed or ended; the same row if nothing changes."""
    if not row.maintenance and row.unregistered_at is not None:
        return row
    plan = _plan_of(row, now, rules, patterns)
    if not row.maintenance:
        return row if plan is None else maintain(row, now, rules, on=True, plan=plan)
    if row.maintenance_by == "config":
        if plan is None:
            return _without_exemption(maintain(row, now, rules, on=False))
        same = plan.by == "config" and abs((plan.until or 0) - (row.maintenance_until or 0)) < SECOND
        return row if same else maintain(row, now, rules, on=True, plan=plan)
    if not _is_over(row, now):
        return row
    ended = _without_exemption(maintain(row, now, rules, on=False))
    return ended if plan is None else maintain(row, now, rules, on=True, plan=plan)


def _plan_of(row: Worker, now: Now, rules: WorkerRules, patterns: Mapping[str, int | None]) -> Plan | None:
    """Return the maintenance that a worker should be in now, unless an operator ended it for this worker."""
    for pattern, until in patterns.items():
        if pattern != row.maintained_as and matches(pattern, row):
            return Plan("operator", until, pattern)
    if row.exempt_until is not None and now.steady < row.exempt_until:
        return None
    ends = [end for each in rules.maintenance if (end := each.open_until(now.wall)) is not None]
    return Plan("config", now.steady + max(ends) - now.wall) if ends else None


def matches(pattern: str, row: Worker) -> bool:
    """Return whether an operator's pattern, "SOURCE/PATTERN", matches a worker."""
    source, _, ids = pattern.partition("/")
    return source in ("*", row.source) and fnmatchcase(row.id, ids)


def _is_over(row: Worker, now: Now) -> bool:
    return row.maintenance_until is not None and row.maintenance_until <= now.steady


def _without_exemption(row: Worker) -> Worker:
    return msgspec.structs.replace(row, exempt_until=None, maintained_as="")


def former(row: Worker, now: Now, rules: WorkerRules | None = None) -> Worker:
    """Shorten the deadline of an id whose endpoint a new id uses; its next heartbeat restores it.

    The new deadline is 7/6 of the id's usual interval: 35 s for an interval of 30 s.
    """
    usual = row.rhythm or _assumed_rhythm(rules or WorkerRules())
    return msgspec.structs.replace(row, deadline=min(row.deadline, now.steady + max(FORMER, usual * 7 // 6)))


def identifies_worker(endpoint: str) -> bool:
    """Return whether two ids at this endpoint are probably the same worker.

    False for loopback and private addresses: in containers, many workers use the same or the default one.
    """
    if not names_one_machine(endpoint):
        return False
    try:
        address = ip_address(_host(endpoint).partition("%")[0])
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not any(mapped in network for network in _PRIVATE)


def names_one_machine(endpoint: str) -> bool:
    """Return whether an endpoint names one machine; a loopback address means each worker's own machine."""
    host = _host(endpoint)
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host != "" and not _SHARED.fullmatch(host)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not (mapped.is_loopback or mapped.is_unspecified)


def _host(endpoint: str) -> str:
    """Return the host of a URL or of `host:port`; `""` without a host."""
    try:
        return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    except ValueError:
        return ""


def changes_a_path(worker_id: str) -> str:
    """Return the first part of an id that changes the path of its heartbeats unless the client encodes it.

    `""` if no part does. A `/` inside an id needs no encoding.

    >>> changes_a_path("rack 1/w-7"), changes_a_path("w#7"), changes_a_path("a/../b"), changes_a_path("50%25")
    ('', '#', '..', '%25')
    """
    found = _CHANGES_A_PATH.search(worker_id)
    return found[0] if found else ""


def shown(row: Worker) -> dict[str, Any]:
    """Return a row as events and the API show it: without the internal fields, and with RFC 3339 times."""
    item: dict[str, Any] = msgspec.to_builtins(row)
    for name in INTERNAL:
        del item[name]
    for moment in ("registered_at", "last_heartbeat"):
        item[moment] = rfc3339(item[moment])
    if row.maintenance:
        item["maintenance_by"] = row.maintenance_by or "operator"
        item["maintenance_until"] = row.maintenance_until and rfc3339(row.maintenance_until)
    return item


def heard_minutes(row: Worker, wall: int) -> str:
    """Return a character for each of the last `HEARD_MINUTES` minutes, oldest first: 1 if it was heard."""
    return f"{_moved(row, wall):0{HEARD_MINUTES}b}"


def _minutes(row: Worker, now: Now) -> int:
    """Return the bits of the minutes in which a worker was heard, after a sign of life."""
    return _moved(row, now.wall) | 1


def _moved(row: Worker, wall: int) -> int:
    """Return the bits of the minutes until a time (wall clock); the current minute is bit 0."""
    passed = max(0, wall // _MINUTE - row.last_heartbeat // _MINUTE)
    if passed >= HEARD_MINUTES:  # a shift by years of minutes would take much memory
        return 0
    return row.minutes << passed & (1 << HEARD_MINUTES) - 1


def _register(row: Worker | None, base: Worker, change: Register, now: Now, rules: WorkerRules) -> Step:
    status = _status(base, change.status)
    given: dict[str, Any] = {}
    if change.recover:
        ids = tuple(session.id for session in change.sessions)
        given = {"sessions": change.sessions, "recovering": ids, "fresh": bool(ids)}
    after = msgspec.structs.replace(
        base,
        endpoint=change.endpoint,
        description=change.description,
        version=change.version,
        environment=change.environment,
        max_sessions=change.max_sessions,
        status=status,
        was_offline=status == "MAINTENANCE" and _is_lost(base),
        last_heartbeat=now.wall,
        minutes=_minutes(base, now),
        deadline=_deadline(now, rules),
        last_beat=0,
        leaving=None,
        **given,
    )
    return Step(worker=after, generated=_transition(row, after))


def _heartbeat(row: Worker | None, base: Worker, change: Heartbeat, now: Now, rules: WorkerRules) -> Step:
    reported: dict[str, Any] = {}
    for name in _REPORTED:
        if (value := getattr(change, name)) is not None:
            reported[name] = value
    if change.sessions is not None:
        reported["sessions"] = change.sessions[:MOST_SESSIONS]
        if base.changed:
            reported["sessions"], reported["changed"] = _reconcile(base, reported["sessions"], now)
        if base.recovering:
            reported["sessions"], reported["recovering"] = _still_recovering(base, reported["sessions"])
            reported["fresh"] = False
    status, beats = _recovered(base, _status(base, change.status), now, rules)
    restarted = row is not None and _went_back(row.uptime, change.uptime)
    after = msgspec.structs.replace(
        base,
        status=status,
        was_offline=status == "MAINTENANCE" and _is_lost(base),
        beats=beats,
        restarts=base.restarts + restarted,
        last_heartbeat=now.wall,
        minutes=_minutes(base, now),
        deadline=_deadline(now, rules),
        last_beat=now.steady,
        rhythm=_rhythm(base, now, rules),
        leaving=None,
        **reported,
    )
    generated = _transition(row, after)
    if restarted:
        generated += (_generate("restarted", after, row.status if row else None, "uptime"),)
    quiet = row is not None and not restarted and _is_quiet(row, after)
    return Step(worker=after, generated=generated, quiet=quiet)


def _recovered(row: Worker, status: WorkerStatus, now: Now, rules: WorkerRules) -> tuple[WorkerStatus, int]:
    """Return the status and the number of heartbeats while OFFLINE; ONLINE after `recover_after` of them."""
    if row.status != "OFFLINE" or status != "ONLINE" or not row.last_heartbeat:
        return status, 0
    beats = row.beats + 1 if now.steady <= row.deadline else 1
    return ("ONLINE", 0) if beats >= rules.recover_after else ("OFFLINE", beats)


def _went_back(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before - RESTARTED


def _update_session(row: Worker | None, change: SessionSeen, now: Now) -> Step:
    """Update a worker's sessions between heartbeats; an event older than the session's state is ignored."""
    if row is None or row.unregistered_at is not None:
        return Step(worker=row, quiet=True)
    session = change.session
    known = {each.id: each for each in row.sessions}
    former = known.get(session.id)
    at = instant(change.at)
    if at is not None:
        at = min(at, now.wall)  # a time in the future counts as now
        if at < min(_as_of(row, session.id, former), now.wall):
            return Step(worker=row, quiet=True)
    if former is not None:
        reported = {
            name: value for name in ("status", "phone", "name", "last_activity")
            if (value := getattr(session, name))
        }  # fmt: skip
        session = msgspec.structs.replace(former, **reported)
    elif len(known) >= MOST_SESSIONS:
        return Step(worker=row, quiet=True)
    known[session.id] = session
    if session.status.lower() == "deleted":
        del known[session.id]
    changed = row.changed if at is None else _changed(row.changed, session.id, at, known)
    return Step(worker=msgspec.structs.replace(row, sessions=tuple(known.values()), changed=changed))


def _as_of(row: Worker, id_: str, session: Session | None) -> int:
    """Return the time of a session's current state: its last event, or its last activity in a list."""
    if (at := row.changed.get(id_)) is not None:
        return at
    listed = None if session is None else instant(session.last_activity)
    return 0 if listed is None else min(listed, row.last_heartbeat)


def _changed(changed: Mapping[str, int], id_: str, at: int, known: Mapping[str, Session]) -> dict[str, int]:
    """Record the time of a session's change; keep only the last few deleted sessions."""
    after = {**changed, id_: at}
    gone = [each for each in after if each not in known]
    for each in gone[:-MOST_DELETED]:
        del after[each]
    return after


def _reconcile(
    row: Worker, listed: tuple[Session, ...], now: Now
) -> tuple[tuple[Session, ...], dict[str, int]]:
    """Merge a heartbeat's session list; recent events about a session override an older list."""
    recent = {id_: at for id_, at in row.changed.items() if 0 <= now.wall - at < OVERLAP}
    known = {each.id: each for each in row.sessions} if recent else {}
    sessions, kept = [], {}
    for session in listed:
        at, activity = recent.get(session.id), instant(session.last_activity)
        if at is None or activity is None or activity >= at:
            sessions.append(session)
            continue
        kept[session.id] = at
        if session.id in known:
            sessions.append(msgspec.structs.replace(session, status=known[session.id].status))
    return tuple(sessions), kept


def _still_recovering(
    row: Worker, listed: tuple[Session, ...]
) -> tuple[tuple[Session, ...], tuple[str, ...]]:
    """Keep the sessions that a worker is restoring and does not list yet.

    They survive its first list, which a worker sends before it restores anything, and every later list that
    contains more of them than the one before.
    """
    ids = {session.id for session in listed}
    pending = tuple(id_ for id_ in row.recovering if id_ not in ids)
    if not row.fresh and len(pending) == len(row.recovering):
        return listed, ()
    kept = tuple(session for session in row.sessions if session.id in pending)
    return (listed + kept)[:MOST_SESSIONS], pending


_REPORTED = ("version", "environment", "cpu", "memory", "uptime", "message_count", "counts")


def _is_quiet(before: Worker, after: Worker) -> bool:
    """Return whether only the heartbeat's time and gauges changed, which a crash may lose."""
    return (
        before.status == after.status
        and before.version == after.version
        and before.environment == after.environment
        and before.beats == after.beats
        and before.leaving == after.leaving
        and before.counts == after.counts
        and (
            before.sessions is after.sessions
            or _durable_fields(before.sessions) == _durable_fields(after.sessions)
        )
    )


def _durable_fields(sessions: tuple[Session, ...]) -> list[tuple[str | None, ...]]:
    """Return the session fields that must not be lost: all except the last activity."""
    return [(session.id, session.status, session.phone, session.name) for session in sessions]


def _unregister(row: Worker | None, now: Now) -> Step:
    if row is None or row.unregistered_at is not None:
        return Step(worker=row, quiet=True)
    after = msgspec.structs.replace(row, status="OFFLINE", unregistered_at=now.steady, leaving=None)
    return Step(worker=after, generated=(_generate("unregistered", after, row.status, "requested"),))


def _has_just_left(row: Worker, now: Now) -> bool:
    """Return whether a heartbeat may have crossed its worker's DELETE, accepted or refused."""
    left = row.leaving if row.unregistered_at is None else row.unregistered_at
    # Never negative: the steady clock of an earlier run may have been ahead.
    return left is not None and 0 <= now.steady - left < TOMBSTONE


def _status(row: Worker, reported: WorkerStatus | None) -> WorkerStatus:
    """Return the status after a report; without a reported status, the worker is ONLINE."""
    if row.maintenance:
        return "MAINTENANCE"
    if reported is not None:
        return reported
    return "MAINTENANCE" if row.status == "MAINTENANCE" else "ONLINE"


def _is_lost(row: Worker) -> bool:
    """Return whether `offline` was the last status event of a worker."""
    return row.status == "OFFLINE" or row.was_offline


def _transition(before: Worker | None, after: Worker) -> tuple[GeneratedEvent, ...]:
    if before is None:
        return (_generate("registered", after, None, "new"),)
    if after.status == "ONLINE" and _is_lost(before):
        return (_generate("online", after, before.status, "heard"),)
    if after.status == "OFFLINE" and not _is_lost(before):
        return (_generate("offline", after, before.status, "reported"),)
    return ()


def _rhythm(row: Worker, now: Now, rules: WorkerRules) -> int:
    """Return a worker's usual interval after a heartbeat that arrives now, in microseconds.

    A longer interval counts at once, a shorter one by an eighth, so that an extra heartbeat changes little.
    """
    usual = row.rhythm or _assumed_rhythm(rules)
    if not row.last_beat or row.status == "OFFLINE" or now.steady < row.last_beat:
        return usual
    gap = min(now.steady - row.last_beat, int(rules.offline_after * SECOND))
    return gap if gap >= usual else usual - (usual - gap) // 8


def _assumed_rhythm(rules: WorkerRules) -> int:
    """Return the interval that `offline_after` suggests: a third of it."""
    return int(rules.offline_after * SECOND) // 3


def _deadline(now: Now, rules: WorkerRules) -> int:
    return now.steady + int(rules.offline_after * SECOND)


def _generate(what: str, worker: Worker, previous: WorkerStatus | None, reason: str) -> GeneratedEvent:
    data = {"worker": shown(worker), "previous": previous, "reason": reason}
    return GeneratedEvent(type=f"worker.{what}", subject=worker.id, data=data)
