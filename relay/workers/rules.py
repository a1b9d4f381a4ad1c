"""The rules of the worker registry, as pure functions of a row, what came, and the time.

| what comes                                      | what happens                                        |
|-------------------------------------------------|-----------------------------------------------------|
| new id, by register or heartbeat                | `worker.registered`                                 |
| register again while ONLINE                     | no event; the row is updated                        |
| OFFLINE, then heartbeat or register             | `worker.online`                                     |
| silent past its deadline                        | `worker.offline`, reason `silent`                   |
| reports OFFLINE                                 | `worker.offline`, reason `reported`                 |
| reports MAINTENANCE                             | not judged until it reports ONLINE                  |
| DELETE; again; or a heartbeat within 10 s of it | `worker.unregistered`; nothing; nothing             |
| any of these, refused by the relay              | a sign of life; a DELETE counts once it can be stored |
| a new id on an old endpoint, if that identifies | `worker.registered`; the former id gets a beat's time |
| uptime that went back                           | `worker.restarted`                                  |
| operator maintenance                            | wins over reports; not judged                       |

Whoever follows the events hears `offline` and `online` in turn: a worker that was OFFLINE before its
maintenance is `online` when it is ONLINE again, and not `offline` a second time.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

import msgspec

from relay.base.clock import SECOND, instant, rfc3339
from relay.config.schema import WorkerRules
from relay.model import (
    Born,
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
)
"""What of a row is ours alone, and in no event or list."""

ENVIRONMENTS = ("DEVELOPMENT", "STAGING", "TESTING", "PRODUCTION")
"""Documented environments; others occur and are stored (docs/contracts/whatsapp.md#registration)."""

TOMBSTONE = 10 * SECOND
"""How long a heartbeat after an unregistration is ignored (docs/contracts/whatsapp.md#heartbeat)."""

FORMER = 35 * SECOND
"""The shortest deadline of the former id at a re-used endpoint: one 30 s heartbeat and its 5 s timeout."""

_SHARED = re.compile(r"(.*\.)?(localhost(\.localdomain)?|docker\.internal)\.?|127[.0-9]*")
_PRIVATE = tuple(
    ip_network(each)
    for each in (
        "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7",
        "fe80::/10",
    )
)  # fmt: skip

RESTARTED = 5.0
"""Seconds that an uptime must go back to mean a restart: workers round, and read two clocks."""

MOST_SESSIONS = 1000
"""Sessions kept per worker; each is a few dozen bytes in every event about it."""

MOST_DELETED = 32
"""Deleted sessions remembered per worker, so that a late event does not bring them back."""

OVERLAP = 10 * SECOND
"""How much older than a session's event a heartbeat's list may be that arrives after it."""


_CHANGES_A_PATH = re.compile(r"[#?\\]|%[0-9A-Fa-f]{2}|(?:^|(?<=/))\.\.?(?=/|\Z)|^/|//|/\Z")


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """One moment on both scales, microseconds."""

    wall: int
    steady: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a change makes of a row."""

    worker: Worker | None  # the row from now on; None: there is none
    born: tuple[Born, ...] = ()
    quiet: bool = False  # only last-seen and gauges moved: may be flushed later


def apply(row: Worker | None, change: WorkerChange, source: str, now: Now, rules: WorkerRules) -> Step:
    """Apply what a worker said about itself."""
    if isinstance(change, Unregister):
        return _unregister(row, now)
    if isinstance(change, SessionSeen):
        return _see(row, change, now)
    base = row or Worker(source=source, id=change.worker_id, registered_at=now.wall)
    has_left = row is not None and (row.unregistered_at is not None or row.leaving is not None)
    if has_left and row is not None and isinstance(change, Heartbeat) and _has_just_left(row, now):
        return Step(worker=row, quiet=True)
    if row is not None and row.unregistered_at is not None:
        base = Worker(source=source, id=row.id, registered_at=now.wall, maintenance=row.maintenance)
        row = None
    if isinstance(change, Register):
        return _register(row, base, change, now, rules)
    return _heartbeat(row, base, change, now, rules)


def silent(row: Worker, now: Now) -> tuple[Worker, Born] | None:
    """Judge one row: past its deadline it is offline; after a refused unregister it has left.

    Returns the row and the event, None: nothing changes.
    """
    if row.leaving is not None and row.unregistered_at is None:
        after = msgspec.structs.replace(row, status="OFFLINE", unregistered_at=row.leaving, leaving=None)
        return after, _born("unregistered", after, row.status, "requested")
    if row.status != "ONLINE" or row.maintenance or now.steady <= row.deadline:
        return None
    after = msgspec.structs.replace(row, status="OFFLINE")
    return after, _born("offline", after, row.status, "silent")


def heed(row: Worker, change: WorkerChange, now: Now, rules: WorkerRules) -> Worker:
    """Return a row after a request that the relay refused: its worker lives, or is about to leave.

    Nothing is told of it, as nothing may be stored now: `silent` tells of a worker that left.
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
        deadline=_deadline(now, rules),
        heard=now.steady if is_beat else 0,
        rhythm=_rhythm(row, now, rules) if is_beat else row.rhythm,
    )


def hold(row: Worker, now: Now, rules: WorkerRules) -> Worker:
    """Put an ONLINE row's deadline off: after a start or a suspension nobody has been heard yet."""
    if row.status != "ONLINE":
        return row
    patience = max(rules.offline_after, rules.startup_hold)
    return msgspec.structs.replace(row, deadline=now.steady + int(patience * SECOND))


def maintain(row: Worker, now: Now, rules: WorkerRules, *, on: bool) -> Worker:
    """Take a worker into an operator's maintenance, or give it back with its full patience."""
    if on == row.maintenance:
        return row
    status: WorkerStatus = "MAINTENANCE" if on else "OFFLINE" if row.was_offline else "ONLINE"
    return msgspec.structs.replace(
        row,
        maintenance=on,
        status=status,
        was_offline=on and _is_lost(row),
        deadline=_deadline(now, rules),
    )


def former(row: Worker, now: Now, rules: WorkerRules | None = None) -> Worker:
    """Shorten the deadline of an id whose endpoint a new id took; its next heartbeat restores it.

    It has 7/6 of its usual time between heartbeats: in proportion, that is 35 s for every 30 s.
    """
    usual = row.rhythm or _assumed_rhythm(rules or WorkerRules())
    return msgspec.structs.replace(row, deadline=min(row.deadline, now.steady + max(FORMER, usual * 7 // 6)))


def identifies(endpoint: str) -> bool:
    """Return whether two workers at one endpoint are probably the same one.

    Not at loopback or private addresses: in containers, many workers have the same one, or the default.
    """
    if not names_a_place(endpoint):
        return False
    try:
        address = ip_address(_host(endpoint).partition("%")[0])
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not any(mapped in network for network in _PRIVATE)


def names_a_place(endpoint: str) -> bool:
    """Return whether an endpoint is on one machine only; loopback is a different machine for each worker."""
    host = _host(endpoint)
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host != "" and not _SHARED.fullmatch(host)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not (mapped.is_loopback or mapped.is_unspecified)


def _host(endpoint: str) -> str:
    """Return the host of a URL or of host and port; `""`: there is none."""
    try:
        return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    except ValueError:
        return ""


def changes_a_path(worker_id: str) -> str:
    """Return the first part of an id that a client must percent-encode, or its heartbeats go to another path.

    `""`: there is none. A `/` inside an id needs no encoding.

    >>> changes_a_path("rack 1/w-7"), changes_a_path("w#7"), changes_a_path("a/../b"), changes_a_path("50%25")
    ('', '#', '..', '%25')
    """
    found = _CHANGES_A_PATH.search(worker_id)
    return found[0] if found else ""


def shown(row: Worker) -> dict[str, Any]:
    """Return a row as events and operators see it: JSON without what is ours alone, RFC 3339 times."""
    item: dict[str, Any] = msgspec.to_builtins(row)
    for name in INTERNAL:
        del item[name]
    for moment in ("registered_at", "last_heartbeat"):
        item[moment] = rfc3339(item[moment])
    return item


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
        deadline=_deadline(now, rules),
        heard=0,
        leaving=None,
        **given,
    )
    return Step(worker=after, born=_transition(row, after))


def _heartbeat(row: Worker | None, base: Worker, change: Heartbeat, now: Now, rules: WorkerRules) -> Step:
    said: dict[str, Any] = {}
    for name in _SAID:
        if (value := getattr(change, name)) is not None:
            said[name] = value
    if change.sessions is not None:
        said["sessions"] = change.sessions[:MOST_SESSIONS]
        if base.changed:
            said["sessions"], said["changed"] = _reconcile(base, said["sessions"], now)
        if base.recovering:
            said["sessions"], said["recovering"] = _still_recovering(base, said["sessions"])
            said["fresh"] = False
    status, beats = _recovered(base, _status(base, change.status), now, rules)
    restarted = row is not None and _went_back(row.uptime, change.uptime)
    after = msgspec.structs.replace(
        base,
        status=status,
        was_offline=status == "MAINTENANCE" and _is_lost(base),
        beats=beats,
        restarts=base.restarts + restarted,
        last_heartbeat=now.wall,
        deadline=_deadline(now, rules),
        heard=now.steady,
        rhythm=_rhythm(base, now, rules),
        leaving=None,
        **said,
    )
    born = _transition(row, after)
    if restarted:
        born += (_born("restarted", after, row.status if row else None, "uptime"),)
    quiet = row is not None and not restarted and _is_quiet(row, after)
    return Step(worker=after, born=born, quiet=quiet)


def _recovered(row: Worker, status: WorkerStatus, now: Now, rules: WorkerRules) -> tuple[WorkerStatus, int]:
    """Let a silent worker be ONLINE only after `recover_after` heartbeats, each in time after the last."""
    if row.status != "OFFLINE" or status != "ONLINE" or not row.last_heartbeat:
        return status, 0
    beats = row.beats + 1 if now.steady <= row.deadline else 1
    return ("ONLINE", 0) if beats >= rules.recover_after else ("OFFLINE", beats)


def _went_back(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before - RESTARTED


def _see(row: Worker | None, change: SessionSeen, now: Now) -> Step:
    """Keep a worker's sessions current between its heartbeats; an older event changes nothing."""
    if row is None or row.unregistered_at is not None:
        return Step(worker=row, quiet=True)
    session = change.session
    known = {each.id: each for each in row.sessions}
    former = known.get(session.id)
    at = instant(change.at)
    if at is not None:
        at = min(at, now.wall)  # one from the future counts as of its receipt
        if at < min(_as_of(row, session.id, former), now.wall):
            return Step(worker=row, quiet=True)
    if former is not None:
        told = {
            name: value for name in ("status", "phone", "name", "last_activity")
            if (value := getattr(session, name))
        }  # fmt: skip
        session = msgspec.structs.replace(former, **told)
    elif len(known) >= MOST_SESSIONS:
        return Step(worker=row, quiet=True)
    known[session.id] = session
    if session.status.lower() == "deleted":
        del known[session.id]
    changed = row.changed if at is None else _changed(row.changed, session.id, at, known)
    return Step(worker=msgspec.structs.replace(row, sessions=tuple(known.values()), changed=changed))


def _as_of(row: Worker, id_: str, session: Session | None) -> int:
    """Return the time of a session's present state: its last event's, or its last activity in a list."""
    if (at := row.changed.get(id_)) is not None:
        return at
    listed = None if session is None else instant(session.last_activity)
    return 0 if listed is None else min(listed, row.last_heartbeat)


def _changed(changed: Mapping[str, int], id_: str, at: int, known: Mapping[str, Session]) -> dict[str, int]:
    """Note when a session changed; of those that are gone, only the last few stay."""
    after = {**changed, id_: at}
    gone = [each for each in after if each not in known]
    for each in gone[:-MOST_DELETED]:
        del after[each]
    return after


def _reconcile(
    row: Worker, listed: tuple[Session, ...], now: Now
) -> tuple[tuple[Session, ...], dict[str, int]]:
    """Take a heartbeat's list, except for sessions about which a newer event has just arrived."""
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

    They outlast its first list, which a worker sends before it has restored anything, and then every list
    that has more of them than the one before.
    """
    ids = {session.id for session in listed}
    pending = tuple(id_ for id_ in row.recovering if id_ not in ids)
    if not row.fresh and len(pending) == len(row.recovering):
        return listed, ()
    kept = tuple(session for session in row.sessions if session.id in pending)
    return (listed + kept)[:MOST_SESSIONS], pending


_SAID = ("version", "environment", "cpu", "memory", "uptime", "message_count", "counts")


def _is_quiet(before: Worker, after: Worker) -> bool:
    """Whether only last-seen and gauges moved, which a crash may take."""
    return (
        before.status == after.status
        and before.version == after.version
        and before.environment == after.environment
        and before.beats == after.beats
        and before.leaving == after.leaving
        and before.counts == after.counts
        and (before.sessions is after.sessions or _told(before.sessions) == _told(after.sessions))
    )


def _told(sessions: tuple[Session, ...]) -> list[tuple[str | None, ...]]:
    """What of sessions must not be lost: all but when they were last active."""
    return [(session.id, session.status, session.phone, session.name) for session in sessions]


def _unregister(row: Worker | None, now: Now) -> Step:
    if row is None or row.unregistered_at is not None:
        return Step(worker=row, quiet=True)
    after = msgspec.structs.replace(row, status="OFFLINE", unregistered_at=now.steady, leaving=None)
    return Step(worker=after, born=(_born("unregistered", after, row.status, "requested"),))


def _has_just_left(row: Worker, now: Now) -> bool:
    """Whether a heartbeat may overlap the DELETE of its worker, which was taken in or refused."""
    left = row.leaving if row.unregistered_at is None else row.unregistered_at
    # Not a negative time: the steady clock of another run may have been ahead of this one's.
    return left is not None and 0 <= now.steady - left < TOMBSTONE


def _status(row: Worker, reported: WorkerStatus | None) -> WorkerStatus:
    """Which status a row gets from a report; a worker that says nothing about it is up."""
    if row.maintenance:
        return "MAINTENANCE"
    if reported is not None:
        return reported
    return "MAINTENANCE" if row.status == "MAINTENANCE" else "ONLINE"


def _is_lost(row: Worker) -> bool:
    """Whether `offline` was the last that was told of a worker."""
    return row.status == "OFFLINE" or row.was_offline


def _transition(before: Worker | None, after: Worker) -> tuple[Born, ...]:
    if before is None:
        return (_born("registered", after, None, "new"),)
    if after.status == "ONLINE" and _is_lost(before):
        return (_born("online", after, before.status, "heard"),)
    if after.status == "OFFLINE" and not _is_lost(before):
        return (_born("offline", after, before.status, "reported"),)
    return ()


def _rhythm(row: Worker, now: Now, rules: WorkerRules) -> int:
    """Return a worker's usual time between heartbeats, given that one has arrived now.

    A longer gap counts at once, a shorter one by an eighth: one extra heartbeat changes little.
    """
    usual = row.rhythm or _assumed_rhythm(rules)
    if not row.heard or row.status == "OFFLINE" or now.steady < row.heard:
        return usual
    gap = min(now.steady - row.heard, int(rules.offline_after * SECOND))
    return gap if gap >= usual else usual - (usual - gap) // 8


def _assumed_rhythm(rules: WorkerRules) -> int:
    """Return the time between heartbeats that `offline_after` suggests: three may be missed."""
    return int(rules.offline_after * SECOND) // 3


def _deadline(now: Now, rules: WorkerRules) -> int:
    return now.steady + int(rules.offline_after * SECOND)


def _born(what: str, worker: Worker, previous: WorkerStatus | None, reason: str) -> Born:
    data = {"worker": shown(worker), "previous": previous, "reason": reason}
    return Born(type=f"worker.{what}", subject=worker.id, data=data)
