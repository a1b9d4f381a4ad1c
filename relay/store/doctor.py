"""What could be wrong with a database and where it lies; the file is only read, a daemon may be using it."""

import errno
import hashlib
import os
import shlex
import shutil
import sqlite3
import stat
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_size
from relay.model import Check
from relay.store import Stop
from relay.store.connection import OLDEST, has_wal_reset_bug
from relay.store.ledger import AUDIT_SQL, counts_of
from relay.store.losses import WHAT_TO_DO, evidence_of
from relay.store.mark import HIGHEST_SQL, mark_in, read_mark
from relay.store.read_only import opened
from relay.store.rows import worker_of
from relay.store.schema import MIGRATIONS
from relay.store.wal import log_of, read_log
from relay.workers.rules import changes_a_path

SAMPLE = 200
"""Events whose bodies are compared with their digests, evenly over all there are."""

AHEAD = 300 * SECOND
"""An event from further ahead than this says that a clock was wrong, then or now."""

LONG_LOG = 128 * 2**20  # bytes: twice of what the log is cut to
SLOW_FSYNC = 0.1  # seconds
FSYNCS = 5
SHOWN = 5  # ids in one finding
PATIENCE = 1000  # milliseconds that another program's lock is waited for

# What has no due time waits behind an earlier pending one of its key; without one it would wait for ever.
STUCK_SQL = """
    SELECT d.public_id FROM deliveries AS d
     WHERE d.destination = ? AND d.state = 'pending' AND d.attempts = 0 AND d.next_attempt_at IS NULL
       AND (d.order_key IS NULL OR NOT EXISTS (
            SELECT 1 FROM deliveries AS earlier
             WHERE earlier.destination = d.destination AND earlier.order_key = d.order_key
               AND earlier.state = 'pending' AND earlier.id < d.id))
"""
# Of an event's deliveries to a destination the latest counts, as for whoever retries what is dead.
DEAD_SQL = """
    SELECT d.destination, count(*) FROM deliveries AS d
     WHERE d.state = 'dead'
       AND NOT EXISTS (SELECT 1 FROM deliveries AS later
                        WHERE later.event_id = d.event_id AND later.destination = d.destination
                          AND later.id > d.id)
     GROUP BY d.destination ORDER BY d.destination
"""
BODY_SQL = "SELECT public_id, sha256, size, body FROM events WHERE id >= ? ORDER BY id LIMIT 1"

_RESTORE = "stop the relay, keep the file, and put a backup in its place: see docs/storage.md"
_REPORT = "please report this as a bug, with a copy of relay.db"


class Patient(msgspec.Struct, frozen=True, kw_only=True):
    """What is examined, and what is known of it beside the file."""

    path: Path
    now: int  # wall clock
    min_free: int = 0  # bytes
    destinations: Collection[str] | None = None  # that the config has; None: not known
    sources: Collection[str] | None = None  # likewise


def examine(patient: Patient, stop: Stop) -> list[Check]:
    """Make all checks; one that cannot be made is not ok."""
    found = [check(patient) for check in SURROUNDINGS]
    if patient.path.exists() and not patient.path.is_file():
        return [
            *found,
            _ill(
                "open", f"{patient.path} is not a file", "move it away, or name another file in [storage] url"
            ),
        ]
    try:
        with opened(patient.path, stop) as connection:
            connection.execute(f"PRAGMA busy_timeout = {PATIENCE}")
            if locked := _locked(connection):
                return [
                    *found,
                    _ill(
                        "open",
                        f"{patient.path}: {locked}",
                        f"find the program that holds it: fuser -v {patient.path}",
                    ),
                ]
            found += [_careful(check, patient, connection) for check in INSIDE]
    except sqlite3.Error as error:
        found.append(_ill("open", f"{patient.path}: {error}", _RESTORE))
    return found


def database(path: Path, config: Path) -> Check:
    """Name the database; another one beside the config took in events of a relay that was started by hand."""
    other = config.parent / path.name
    if other == path or not other.is_file() or (path.exists() and other.samefile(path)):
        return _well("database", str(path))
    detail = f"{path}; another one, {other}, has what came in while a relay used {config.parent}"
    export = f"STATE_DIRECTORY={config.parent} relay events export --offline -c {config} -o other.jsonl"
    return _ill("database", detail, f"{export}, then relay events import other.jsonl, then delete {other}")


def sqlite(_patient: Patient) -> Check:
    """Look at the linked library."""
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return _ill("sqlite", version, f"use a Python that was built with SQLite {wanted} or newer")
    bug = "; it has the WAL-reset bug: no other program may write the file" if has_wal_reset_bug() else ""
    return _well("sqlite", version + bug)


def permissions(patient: Patient) -> Check:
    """See that nobody else can read what senders sent, and that we can write it."""
    for suffix in ("", "-wal", "-shm"):
        path = patient.path.with_name(patient.path.name + suffix)
        try:
            status = path.stat()
        except FileNotFoundError:
            if suffix:
                continue
            return _ill("permissions", f"there is no {path}", "see [storage] url and state_dir")
        except OSError as error:
            return _ill("permissions", f"{path}: {error.strerror}", "see [storage] url and state_dir")
        if not stat.S_ISREG(status.st_mode):
            return _ill("permissions", f"{path} is not a file", f"move it away: {path}")
        if status.st_mode & 0o077:
            mode = f"{path} has mode {status.st_mode & 0o777:04o}"
            return _ill("permissions", mode, f"chmod 600 {path}")
        if not os.access(path, os.R_OK | os.W_OK):
            return _ill(
                "permissions", f"{path} is not ours to write", f"chown it to the user of the relay: {path}"
            )
    return _well("permissions", "the file is the relay's alone")


def disk(patient: Patient) -> Check:
    """Look for room, for what comes in and for a backup."""
    try:
        free = shutil.disk_usage(patient.path.parent).free
    except OSError as error:
        return _ill("disk", f"{patient.path.parent}: {error.strerror}", "see state_dir in config.toml")
    detail = f"{render_size(free)} free in {patient.path.parent}"
    if free < patient.min_free:
        floor = render_size(patient.min_free)
        return _ill("disk", f"{detail}, min_free_disk is {floor}", "make room, or shorten [retention]")
    return _well("disk", detail)


def fsync(patient: Patient) -> Check:
    """Measure how long a disk takes to keep something: every answer to a sender waits for it."""
    probe = patient.path.with_name(f"{patient.path.name}.fsync")
    taken = []
    try:
        with probe.open("wb", buffering=0) as file:
            for _ in range(FSYNCS):
                began = time.perf_counter()
                file.write(b"\0" * 4096)
                os.fsync(file)
                taken.append(time.perf_counter() - began)
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room on the disk" if no_room else "run it as the user of the relay"
        return _ill("fsync", f"{probe}: {error.strerror}", hint)
    finally:
        with suppress(OSError):  # where it could not be opened, that is what is told
            probe.unlink(missing_ok=True)
    detail = f"{statistics.median(taken) * 1000:.1f} ms"
    if statistics.median(taken) > SLOW_FSYNC:
        return _ill("fsync", detail, "put state_dir on a faster disk; senders wait this long for an answer")
    return _well("fsync", detail)


def losses(patient: Patient) -> Check:
    """Look for what tells of a loss: a damaged log, and the files that a start or a rescue left behind."""
    try:
        log = read_log(log_of(patient.path))
        if log.damaged:  # a relay may just have been at work on it: once more
            log = read_log(log_of(patient.path))
    except OSError as error:
        return _ill("losses", f"{log_of(patient.path)}: {error.strerror}", "run it as the user of the relay")
    if log.damaged:
        detail = f"the log is damaged: {log.commits} transactions behind frame {log.valid} would be dropped"
        return _ill("losses", detail, f"copy relay.db and relay.db-wal before any start; {WHAT_TO_DO}")
    if found := evidence_of(patient.path):
        names = ", ".join(path.name for path in found)
        return _ill("losses", f"data was lost or rescued: {names}", _dealt_with(found))
    return _well("losses", "no sign of any")


def _dealt_with(found: list[Path]) -> str:
    return f"{WHAT_TO_DO}; when it is dealt with: {shlex.join(['rm', *map(str, found)])}"


def history(patient: Patient, connection: sqlite3.Connection) -> Check:
    """Compare how far the database is with its high-water mark."""
    [highest] = map(mark_in, connection.execute(HIGHEST_SQL))
    if missing := highest.missing(read_mark(patient.path)):
        detail = f"the database is older than it was: {', '.join(missing)} are missing"
        return _ill("history", detail, WHAT_TO_DO)
    return _well("history", f"{highest.events} events and {highest.deliveries} deliveries so far")


def version(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look at the version of the tables."""
    [(found,)] = connection.execute("PRAGMA user_version")
    if found != len(MIGRATIONS):
        detail = f"schema version {found}, this program knows {len(MIGRATIONS)}"
        return _ill("version", detail, "use the program that wrote it, or start the relay to migrate it")
    return _well("version", f"schema version {found}")


def integrity(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Have SQLite look at every page, and at every row that points to another."""
    [(verdict,)] = connection.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        return _ill("integrity", str(verdict), _RESTORE)
    if lost := connection.execute("PRAGMA foreign_key_check").fetchmany(1):
        return _ill("integrity", f"a row of {lost[0][0]} points to one of {lost[0][2]} that is gone", _REPORT)
    return _well("integrity", "every page and every reference is sound")


def conservation(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Compare, per destination, the books with the table."""
    books = counts_of(connection.execute(AUDIT_SQL))
    wrong = [f"{name} ({counts.unaccounted:+d})" for name, counts in books.items() if counts.unaccounted]
    if wrong:
        return _ill("conservation", f"not accounted for: {', '.join(wrong)}", _REPORT)
    return _well(
        "conservation", f"{sum(counts.created for counts in books.values())} deliveries accounted for"
    )


def stuck(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look for deliveries that would never become due."""
    names = [name for (name,) in connection.execute("SELECT destination FROM ledger")]
    found = [id_ for name in names for (id_,) in connection.execute(STUCK_SQL, (name,))]
    if found:
        return _ill("stuck", f"{len(found)} deliveries wait for nothing, {found[0]} first", _REPORT)
    return _well("stuck", "every pending delivery is due some time, or waits for one that is")


def dead(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Count the deliveries that were given up and not sent once more since."""
    found = connection.execute(DEAD_SQL).fetchall()
    if not found:
        return _well("dead", "no delivery was given up")
    names = ", ".join(f"{name} ({number})" for name, number in found)
    hints = [f"relay deliveries list --destination {found[0][0]} --state dead says why"]
    hints += [f"relay deliveries retry --destination {name} --state dead" for name, _ in found]
    return _ill("dead", f"given up, and not sent since: {names}", "; ".join(hints))


def sources(patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look for sources whose senders are refused because an operator paused them."""
    known = patient.sources
    paused = [
        name
        for (name,) in connection.execute("SELECT name FROM sources WHERE paused ORDER BY name")
        if known is None or name in known
    ]
    if paused:
        hint = "; ".join(f"relay sources resume {name}" for name in paused)
        return _ill("sources", f"paused, their senders get 503: {', '.join(paused)}", hint)
    return _well("sources", "none is paused")


def bodies(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Compare bodies with the digests that were made when they came: no other check sees a flipped bit."""
    [(first, last)] = connection.execute("SELECT min(id), max(id) FROM events")
    if first is None:
        return _well("bodies", "there are no events")
    step = max(1, (last - first) // SAMPLE)
    looked_at = set()
    for start in (*range(first, last, step), last):
        [(id_, digest, size, body)] = connection.execute(BODY_SQL, (start,))
        looked_at.add(id_)
        if len(body) != size or hashlib.sha256(body).digest() != digest:
            return _ill("bodies", f"the body of {id_} is not the one that came in", _RESTORE)
    return _well("bodies", f"{len(looked_at)} bodies are as they came in")


def clock(patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look for events from the future."""
    [(latest,)] = connection.execute("SELECT max(received_at) FROM events")
    if latest is not None and latest > patient.now + AHEAD:
        detail = f"an event of {rfc3339(latest)} is there, and now it is {rfc3339(patient.now)}"
        return _ill("clock", detail, "the machine's clock was or is wrong: timedatectl")
    return _well("clock", rfc3339(patient.now))


def room(patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look at what the file takes, and at the log beside it."""
    [(pages, size, free, vacuum)] = connection.execute(
        """
        SELECT page_count, page_size, freelist_count, auto_vacuum
          FROM pragma_page_count, pragma_page_size, pragma_freelist_count, pragma_auto_vacuum
        """
    )
    log = patient.path.with_name(f"{patient.path.name}-wal")
    length = log.stat().st_size if log.exists() else 0
    detail = f"{render_size(pages * size)}, {render_size(free * size)} of it free, log {render_size(length)}"
    if length > LONG_LOG:
        return _ill("room", detail, "some program keeps the file open for reading: find it with fuser")
    if vacuum != 2:  # noqa: PLR2004 - SQLite's word for incremental
        return _ill(
            "room", f"{detail}, which is never given back", "restore it from a backup by this program"
        )
    return _well("room", detail)


def destinations(patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look for what is owed to destinations that are not in the config any more."""
    if patient.destinations is None:
        return _well("destinations", "the config was not looked at")
    books = counts_of(connection.execute(AUDIT_SQL))
    lost = [
        f"{name} ({counts.pending})"
        for name, counts in books.items()
        if counts.pending and name not in patient.destinations
    ]
    if lost:
        hint = "put them back into config.toml, or cancel what they are owed; it expires by [retention] held"
        return _ill("destinations", f"owed to what is not in the config: {', '.join(lost)}", hint)
    return _well("destinations", "nothing is owed to a destination that is not in the config")


def workers(_patient: Patient, connection: sqlite3.Connection) -> Check:
    """Look for workers that cannot be heard unless their clients percent-encode ids in paths."""
    rows = connection.execute("SELECT source, id, status, record FROM workers ORDER BY source, id")
    odd, lost = 0, []
    for source, id_, status, record in rows:
        if (part := changes_a_path(id_)) and worker_of(record).unregistered_at is None:
            odd += 1
            if status == "OFFLINE":
                lost.append(f"{id_!r} of {source} ({part!r})")
    if lost:
        detail = f"OFFLINE, and their ids change a path that is not encoded: {', '.join(lost[:SHOWN])}"
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        hint = "have their clients percent-encode the id, or choose another; then relay workers forget"
        return _ill("workers", detail + more, hint)
    needing = f"workers heard under ids that must be percent-encoded: {odd}"
    return _well("workers", needing if odd else "every worker's id can stand in a path")


SURROUNDINGS: tuple[Callable[[Patient], Check], ...] = (sqlite, permissions, disk, fsync, losses)
INSIDE: tuple[Callable[[Patient, sqlite3.Connection], Check], ...] = (
    version, history, integrity, conservation, stuck, dead, bodies, clock, room, destinations, sources,
    workers,
)  # fmt: skip


def _locked(connection: sqlite3.Connection) -> str | None:
    """Say once that another program holds the database, and not at each check."""
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return str(error)
    except sqlite3.Error:
        pass  # each check says what it cannot look at
    return None


def _careful(
    check: Callable[[Patient, sqlite3.Connection], Check], patient: Patient, connection: sqlite3.Connection
) -> Check:
    try:
        return check(patient, connection)
    except sqlite3.Error as error:
        return _ill(check.__name__, f"it could not be looked at: {error}", _RESTORE)


def _well(name: str, detail: str) -> Check:
    return Check(name=name, ok=True, detail=detail)


def _ill(name: str, detail: str, hint: str) -> Check:
    return Check(name=name, ok=False, detail=detail, hint=hint)
