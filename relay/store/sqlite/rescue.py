"""Copies a database whose file was removed: its open connections can still read everything."""

import errno
import os
import shlex
import sqlite3
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import aiosqlite

from relay.base.clock import SECOND
from relay.errors import StorageError, StorageUnavailableError
from relay.model import Backup
from relay.store import Stop
from relay.store.sqlite.backup import sync
from relay.store.sqlite.mark import HIGHEST_SQL, Mark, mark_in
from relay.store.sqlite.read_only import in_thread, opened
from relay.store.sqlite.wal import log_of

_NAME = "rescue"


def rescues_of(database: Path) -> list[Path]:
    """Return the rescue copies beside a database, the oldest first."""
    return sorted(database.parent.glob(f"{database.name}.{_NAME}-*"))


def stamp(wall: int) -> str:
    """Format a wall-clock time for a file name."""
    return datetime.fromtimestamp(wall // SECOND, UTC).strftime("%Y%m%dT%H%M%SZ")


async def rescue(connection: aiosqlite.Connection, database: Path, wall: int, mark: Mark) -> Backup:
    """Copy the data of an open connection to a new file of mode 0600 beside the database, and check the copy.

    The folder is created again if it is missing. `mark` is the progress of the database before the copy.

    Raises:
        StorageUnavailableError: there is no room for it at the moment.
        StorageError: the copy could not be made, is damaged, or is behind the mark.
    """
    began = time.monotonic()
    target = database.with_name(f"{database.name}.{_NAME}-{stamp(wall)}")
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        await connection.execute(
            "PRAGMA query_only = OFF"
        )  # with it, SQLite does not even create another file
        await connection.execute("VACUUM INTO ?", (str(part),))
        events, deliveries = await in_thread(lambda stop: _finish(part, target, mark, stop))
    except (OSError, aiosqlite.Error) as error:
        kind = StorageUnavailableError if _lacks_room(error) else StorageError
        raise kind(f"{database} could not be rescued to {target}: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return Backup(
        path=str(target),
        bytes=target.stat().st_size,
        events=events,
        deliveries=deliveries,
        seconds=time.monotonic() - began,
    )


def _lacks_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _finish(part: Path, target: Path, mark: Mark, stop: Stop) -> tuple[int, int]:
    """Check a copy and give it its name; returns its numbers of events and deliveries."""
    with opened(part, stop) as copy:
        [(verdict,)] = copy.execute("PRAGMA quick_check(1)").fetchall()
        [row] = copy.execute(HIGHEST_SQL).fetchall()
        [counts] = copy.execute("SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM deliveries)")
    if verdict != "ok":
        raise StorageError(f"the copy is damaged: {verdict}", hint="restore a backup: docs/storage.md")
    if missing := mark_in(row).missing(mark):
        raise StorageError(f"the copy lacks {', '.join(missing)}", hint="restore a backup: docs/storage.md")
    sync(part)
    part.replace(target)
    sync(target.parent)
    return int(counts[0]), int(counts[1])


def restore_command(copy: Path, database: Path) -> str:
    """Return the shell command that replaces a database by a copy while no relay runs."""
    log = str(log_of(database))
    names = [log, f"{log.removesuffix('-wal')}-shm"]
    steps = [["rm", "-f", *names]]
    if database.exists():
        steps.append(["mv", str(database), f"{database}.replaced"])
    steps.append(["mv", str(copy), str(database)])
    return " && ".join(shlex.join(step) for step in steps)
