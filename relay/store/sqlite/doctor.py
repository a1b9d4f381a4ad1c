"""Checks of a database file and its surroundings. The file is only read, so a daemon may be using it."""

import errno
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

from relay.base.units import render_size
from relay.model import Check
from relay.store import Stop, checks
from relay.store.checks import failed, passed
from relay.store.ledger import counts_of
from relay.store.sqlite.connection import OLDEST, has_wal_reset_bug
from relay.store.sqlite.disk import COPIES, OVERHEAD
from relay.store.sqlite.ledger import AUDIT_SQL
from relay.store.sqlite.losses import WHAT_TO_DO, reports_of
from relay.store.sqlite.mark import HIGHEST_SQL, mark_in, read_mark
from relay.store.sqlite.queries import LATEST
from relay.store.sqlite.read_only import opened
from relay.store.sqlite.schema import MIGRATIONS
from relay.store.sqlite.wal import log_of, read_log

LARGE = 2**20  # bytes of a request for which the disk must have room
LONG_LOG = 128 * 2**20  # bytes: twice the size to which checkpoints cut the log
SLOW_FSYNC = 0.1  # seconds
FSYNCS = 5
LOCK_TIMEOUT = 1000  # milliseconds for another program's lock

# A delivery without a due time waits for an earlier pending one of its key; without an earlier one, it is
# stuck.
STUCK_SQL = """
    SELECT d.public_id FROM deliveries AS d
     WHERE d.destination = ? AND d.state = 'pending' AND d.attempts = 0 AND d.next_attempt_at IS NULL
       AND (d.order_key IS NULL OR NOT EXISTS (
            SELECT 1 FROM deliveries AS earlier
             WHERE earlier.destination = d.destination AND earlier.order_key = d.order_key
               AND earlier.state = 'pending' AND earlier.id < d.id))
"""
DEAD_SQL = f"""
    SELECT d.destination, count(*) FROM deliveries AS d
     WHERE d.state = 'dead' AND {LATEST} GROUP BY d.destination ORDER BY d.destination
"""  # noqa: S608 - constants
BODY_SQL = "SELECT public_id, sha256, size, body FROM events WHERE id >= ? ORDER BY id LIMIT 1"

_RESTORE = "stop the relay, keep the file, and restore a backup: see docs/storage.md"
_REPORT = "please report this as a bug, with a copy of relay.db"


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """The database to check, and the parts of the configuration that concern it."""

    path: Path
    now: int  # wall clock
    min_free: int = 0  # bytes
    destinations: Collection[str] | None = None  # names in the configuration; None: unknown
    sources: Collection[str] | None = None  # the same
    config: Path | None = None  # config.toml; None: do not look for a second database beside it


def examine(examined: Examined, stop: Stop) -> list[Check]:
    """Run every check; a check that fails to run is not ok."""
    found = [] if examined.config is None else [database(examined.path, examined.config)]
    found += [check(examined) for check in SURROUNDINGS]
    if examined.path.exists() and not examined.path.is_file():
        return [
            *found,
            failed(
                "open",
                f"{examined.path} is not a file",
                "move it away, or name another file in [storage] url",
            ),
        ]
    try:
        with opened(examined.path, stop) as connection:
            connection.execute(f"PRAGMA busy_timeout = {LOCK_TIMEOUT}")
            if locked := _locked(connection):
                return [
                    *found,
                    failed(
                        "open",
                        f"{examined.path}: {locked}",
                        f"find the program that locks it: fuser -v {examined.path}",
                    ),
                ]
            found += [_run(check, examined, connection) for check in INSIDE]
    except sqlite3.Error as error:
        found.append(failed("open", f"{examined.path}: {error}", _RESTORE))
    return found


def database(path: Path, config: Path) -> Check:
    """Name the database, and look for a second one beside config.toml, left by a relay started in a shell."""
    other = config.parent / path.name
    if other == path or not other.is_file() or (path.exists() and other.samefile(path)):
        return passed("database", str(path))
    detail = f"{path}; another database, {other}, has the events of a relay that used {config.parent}"
    export = f"STATE_DIRECTORY={config.parent} relay events export --offline -c {config} -o other.jsonl"
    return failed("database", detail, f"{export}, then relay events import other.jsonl, then delete {other}")


def sqlite(_examined: Examined) -> Check:
    """Check the version of the linked library."""
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return failed("sqlite", version, f"use a Python that was built with SQLite {wanted} or newer")
    bug = (
        "; this version has the WAL-reset bug: no other program may write to the file"
        if has_wal_reset_bug()
        else ""
    )
    return passed("sqlite", version + bug)


def permissions(examined: Examined) -> Check:
    """Check that the relay's user can write the files, and that no other user can read them."""
    for suffix in ("", "-wal", "-shm"):
        path = examined.path.with_name(examined.path.name + suffix)
        try:
            status = path.stat()
        except FileNotFoundError:
            if suffix:
                continue
            return failed("permissions", f"{path} does not exist", "see [storage] url and state_dir")
        except OSError as error:
            return failed("permissions", f"{path}: {error.strerror}", "see [storage] url and state_dir")
        if not stat.S_ISREG(status.st_mode):
            return failed("permissions", f"{path} is not a file", f"move it away: {path}")
        if status.st_mode & 0o077:
            mode = f"{path} has mode {status.st_mode & 0o777:04o}"
            return failed("permissions", mode, f"chmod 600 {path}")
        if not os.access(path, os.R_OK | os.W_OK):
            return failed(
                "permissions", f"{path} is not writable", f"chown it to the user of the relay: {path}"
            )
    return passed("permissions", "only the relay's user can read the files")


def disk(examined: Examined) -> Check:
    """Check the free space for new events and for a backup."""
    try:
        free = shutil.disk_usage(examined.path.parent).free
    except OSError as error:
        return failed("disk", f"{examined.path.parent}: {error.strerror}", "see state_dir in config.toml")
    folder = examined.path.parent
    detail, floor = f"{render_size(free)} free in {folder}", render_size(examined.min_free)
    hint = (
        f"find out what uses the space: df -h {folder}, relay db status; delete other programs' files, or "
        "shorten [retention] and run: relay reload && relay jobs run retention"
    )
    if free < examined.min_free:
        return failed("disk", f"{detail}, min_free_disk is {floor}", hint)
    if free < examined.min_free + COPIES * LARGE + OVERHEAD:
        what = f"{detail}, min_free_disk is {floor}: no room for a request of {render_size(LARGE)}"
        return failed("disk", what, hint)
    return passed("disk", detail)


def fsync(examined: Examined) -> Check:
    """Measure the duration of a write to disk; every reply to a sender waits for one."""
    probe = examined.path.with_name(f"{examined.path.name}.fsync")
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
        hint = "free disk space" if no_room else "run the command as the user of the relay"
        return failed("fsync", f"{probe}: {error.strerror}", hint)
    finally:
        with suppress(OSError):  # a file that could not be opened is reported above
            probe.unlink(missing_ok=True)
    detail = f"{statistics.median(taken) * 1000:.1f} ms"
    if statistics.median(taken) > SLOW_FSYNC:
        return failed("fsync", detail, "put state_dir on a faster disk; senders wait this long for a reply")
    return passed("fsync", detail)


def losses(examined: Examined) -> Check:
    """Look for signs of lost data: a damaged log, and files that a start or a rescue left behind."""
    try:
        log = read_log(log_of(examined.path))
        if log.damaged:  # the daemon may have been writing it: read it once more
            log = read_log(log_of(examined.path))
    except OSError as error:
        return failed(
            "losses", f"{log_of(examined.path)}: {error.strerror}", "run the command as the user of the relay"
        )
    if log.damaged:
        detail = f"the log is damaged: {log.commits} transactions after frame {log.valid} would be dropped"
        return failed("losses", detail, f"copy relay.db and relay.db-wal before the next start; {WHAT_TO_DO}")
    if found := reports_of(examined.path):
        names = ", ".join(path.name for path in found)
        return failed("losses", f"data was lost or rescued: {names}", _afterwards(found))
    return passed("losses", "no sign of lost data")


def _afterwards(found: list[Path]) -> str:
    return f"{WHAT_TO_DO}; afterwards: {shlex.join(['rm', *map(str, found)])}"


def history(examined: Examined, connection: sqlite3.Connection) -> Check:
    """Compare the database with its high-water mark."""
    [highest] = map(mark_in, connection.execute(HIGHEST_SQL))
    if missing := highest.missing(read_mark(examined.path)):
        detail = f"the database is older than its high-water mark: {', '.join(missing)} are missing"
        return failed("history", detail, WHAT_TO_DO)
    return passed("history", f"{highest.events} events and {highest.deliveries} deliveries so far")


def version(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Check the version of the tables."""
    [(found,)] = connection.execute("PRAGMA user_version")
    if found != len(MIGRATIONS):
        detail = f"schema version {found}, this program knows {len(MIGRATIONS)}"
        return failed("version", detail, "use the program that wrote it, or start the relay to migrate it")
    return passed("version", f"schema version {found}")


def integrity(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Let SQLite check every page and every reference between rows."""
    [(verdict,)] = connection.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        return failed("integrity", str(verdict), _RESTORE)
    for table, _, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchmany(1):
        return failed("integrity", f"a row of {table} refers to a missing row of {parent}", _REPORT)
    return passed("integrity", "all pages and references are intact")


def conservation(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Compare the ledger of each destination with the table."""
    return checks.conservation(counts_of(connection.execute(AUDIT_SQL)), _REPORT)


def stuck(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Look for pending deliveries that never become due."""
    names = [name for (name,) in connection.execute("SELECT destination FROM ledger")]
    return checks.stuck([id_ for name in names for (id_,) in connection.execute(STUCK_SQL, (name,))], _REPORT)


def dead(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Count the dead deliveries that were not repeated."""
    return checks.dead(connection.execute(DEAD_SQL).fetchall())


def sources(examined: Examined, connection: sqlite3.Connection) -> Check:
    """Look for paused sources; their senders are refused."""
    rows = connection.execute("SELECT name FROM sources WHERE paused ORDER BY name")
    return checks.sources([name for (name,) in rows], examined.sources)


def bodies(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Compare bodies with their digests."""
    [(first, last)] = connection.execute("SELECT min(id), max(id) FROM events")
    if first is None:
        return passed("bodies", "no events")
    step = max(1, (last - first) // checks.SAMPLE)
    sampled = set()
    for start in (*range(first, last, step), last):
        [(id_, digest, size, body)] = connection.execute(BODY_SQL, (start,))
        sampled.add(id_)
        if not checks.is_intact(digest, size, body):
            return failed("bodies", f"the body of {id_} does not match its sha256", _RESTORE)
    return passed("bodies", f"sampled bodies that match their sha256: {len(sampled)}")


def clock(examined: Examined, connection: sqlite3.Connection) -> Check:
    """Look for events in the future."""
    [(latest,)] = connection.execute("SELECT max(received_at) FROM events")
    return checks.clock(latest, examined.now)


def room(examined: Examined, connection: sqlite3.Connection) -> Check:
    """Check the sizes of the file and of its log."""
    [(pages, size, free, vacuum)] = connection.execute(
        """
        SELECT page_count, page_size, freelist_count, auto_vacuum
          FROM pragma_page_count, pragma_page_size, pragma_freelist_count, pragma_auto_vacuum
        """
    )
    log = examined.path.with_name(f"{examined.path.name}-wal")
    length = log.stat().st_size if log.exists() else 0
    detail = f"{render_size(pages * size)}, {render_size(free * size)} of it free, log {render_size(length)}"
    if length > LONG_LOG:
        return failed(
            "room", detail, "find the program that keeps the file open for reading: fuser -v relay.db"
        )
    if vacuum != 2:  # noqa: PLR2004 - incremental
        return failed(
            "room",
            f"{detail}; free pages are never returned to the disk",
            "restore a backup that this program made",
        )
    return passed("room", detail)


def destinations(examined: Examined, connection: sqlite3.Connection) -> Check:
    """Look for pending deliveries of destinations that are no longer in the configuration."""
    return checks.destinations(counts_of(connection.execute(AUDIT_SQL)), examined.destinations)


def workers(_examined: Examined, connection: sqlite3.Connection) -> Check:
    """Look for workers whose clients must percent-encode the worker id in paths."""
    rows = connection.execute("SELECT source, id, status, record FROM workers ORDER BY source, id")
    return checks.workers(rows)


SURROUNDINGS: tuple[Callable[[Examined], Check], ...] = (sqlite, permissions, disk, fsync, losses)
INSIDE: tuple[Callable[[Examined, sqlite3.Connection], Check], ...] = (
    version, history, integrity, conservation, stuck, dead, bodies, clock, room, destinations, sources,
    workers,
)  # fmt: skip


def _locked(connection: sqlite3.Connection) -> str | None:
    """Return the error if another program locks the database: one check reports it instead of all."""
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return str(error)
    except sqlite3.Error:
        pass  # each check reports the data that it cannot read
    return None


def _run(
    check: Callable[[Examined, sqlite3.Connection], Check], examined: Examined, connection: sqlite3.Connection
) -> Check:
    try:
        return check(examined, connection)
    except sqlite3.Error as error:
        return failed(check.__name__, f"the check failed: {error}", _RESTORE)
