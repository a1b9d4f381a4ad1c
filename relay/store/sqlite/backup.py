"""Copies the database while it is in use, and checks the copy."""

import os
import shutil
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from relay.base.units import render_size
from relay.errors import StorageError
from relay.model import Backup
from relay.store import Stop
from relay.store.ledger import counts_of
from relay.store.sqlite.ledger import AUDIT_SQL
from relay.store.sqlite.read_only import opened

SIZE_SQL = """
    SELECT (page_count - freelist_count) * page_size
      FROM pragma_page_count, pragma_page_size, pragma_freelist_count
"""
CHECK_EVERY = 10_000  # instructions of SQLite between two checks of the free space


def back_up(source: Path, target: Path, stop: Stop, *, replace: bool = False, keep_free: int = 0) -> Backup:
    """Copy a database to a file of mode 0600, and check the copy before it gets its name.

    `VACUUM INTO` reads one snapshot, however long that takes, and does not delay senders. On the database's
    own disk, `keep_free` bytes stay free, also while senders write.

    Raises:
        StorageError: the target exists, there is too little room, or the copy is damaged.
    """
    began = time.monotonic()
    _check_target(source, target, replace=replace)
    if lacking := lacks(source, target.parent, stop, keep_free=keep_free):
        free, size = shutil.disk_usage(target.parent).free, _size(source, stop)
        kept = f", and {render_size(keep_free)} must stay free" if keep_free else ""
        raise StorageError(
            f"{target.parent} has {render_size(free)} free, a copy may need {render_size(size)}{kept}",
            hint=f"free {render_size(lacking)} more, or choose another disk",
        )
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)  # left by an interrupted backup
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with opened(source, stop) as connection:
            before = _last(connection)
            guard = _Guard(target.parent, stop, keep_free if _same_disk(source, target.parent) else 0)
            connection.set_progress_handler(guard, CHECK_EVERY)
            try:
                connection.execute("VACUUM INTO ?", (str(part),))
            except sqlite3.OperationalError as error:
                if not guard.short:
                    raise
                raise StorageError(
                    f"the backup stopped: in {target.parent}, {render_size(keep_free)} must stay free",
                    hint="free disk space, or choose another disk",
                ) from error
        events, deliveries = _verify(part, stop, before)
        sync(part)
        part.replace(target)
        sync(target.parent)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{source} could not be backed up to {target}: {error}") from error
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


def _check_target(source: Path, target: Path, *, replace: bool) -> None:
    if not target.parent.is_dir():
        raise StorageError(f"the folder {target.parent} does not exist", hint=f"mkdir -p {target.parent}")
    if target.exists():
        if not target.is_file() or target.samefile(source):
            raise StorageError(f"{target} cannot be a backup of {source}", hint="name another file")
        if not replace:
            raise StorageError(f"{target} already exists", hint="name another file, or add --force")


class _Guard:
    """Interrupts a statement if its caller is gone, or if less space is left than must stay free."""

    def __init__(self, folder: Path, stop: Stop, keep_free: int) -> None:
        self.short = False
        self._folder = folder
        self._stop = stop
        self._keep_free = keep_free

    def __call__(self) -> bool:
        self.short = bool(self._keep_free) and shutil.disk_usage(self._folder).free < self._keep_free
        return self.short or self._stop.is_set()


def lacks(source: Path, folder: Path, stop: Stop, *, keep_free: int = 0) -> int:
    """Return how many bytes a folder lacks for a copy of a database; 0: there is enough room.

    `keep_free` bytes do not count as room if the folder is on the database's own disk.

    Raises:
        StorageError: the database cannot be read.
    """
    free = shutil.disk_usage(folder).free - (keep_free if _same_disk(source, folder) else 0)
    return max(0, _size(source, stop) - free)


def _size(source: Path, stop: Stop) -> int:
    """Return the largest possible size of a copy: with the log's pages, without free pages."""
    try:
        with opened(source, stop) as connection:
            [(size,)] = connection.execute(SIZE_SQL).fetchall()
    except sqlite3.Error as error:
        raise StorageError(f"{source} cannot be read: {error}", hint=f"relay db check {source}") from error
    return int(size)


def _same_disk(source: Path, folder: Path) -> bool:
    return source.stat().st_dev == folder.stat().st_dev


def _verify(part: Path, stop: Stop, before: int) -> tuple[int, int]:
    """Check a copy; returns its numbers of events and deliveries."""
    with opened(part, stop) as copy:
        [(verdict,)] = copy.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise StorageError(f"the copy is damaged: {verdict}", hint="check both disks, and try again")
        if unbalanced := [
            name for name, counts in counts_of(copy.execute(AUDIT_SQL)).items() if counts.unaccounted
        ]:
            raise StorageError(
                f"the ledger of the copy does not balance: {', '.join(unbalanced)}", hint="relay doctor"
            )
        if _last(copy) < before:
            raise StorageError("the copy lacks the latest events", hint="check both disks, and try again")
        [counts] = copy.execute("SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM deliveries)")
        return int(counts[0]), int(counts[1])


def _last(connection: sqlite3.Connection) -> int:
    [(last,)] = connection.execute("SELECT coalesce(max(id), 0) FROM deliveries").fetchall()
    return int(last)


def sync(path: Path) -> None:
    """Fsync a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
