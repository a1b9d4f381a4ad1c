"""A copy of the database while it is in use, and proof that it is one."""

import os
import shutil
import sqlite3
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from relay.errors import StorageError
from relay.model import Backup
from relay.store.apart import Stop, apart, opened
from relay.store.balance import COUNTS_SQL, balance
from relay.units import render_size


def back_up(source: Path, target: Path, stop: Stop, *, replace: bool = False) -> Backup:
    """Copy a database to a file of mode 0600, and check the copy before it gets its name.

    `VACUUM INTO` reads one snapshot, however long it takes; senders do not notice.

    Raises:
        StorageError: the target is there already, there is too little room, or the copy is not sound.
    """
    began = time.monotonic()
    _check_target(source, target, replace=replace)
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a backup that was cut short
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with opened(source, stop) as connection:
            before = _last(connection)
            connection.execute("VACUUM INTO ?", (str(part),))
        events, deliveries = _verify(part, stop, before)
        _sync(part)
        part.replace(target)
        _sync(target.parent)
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
        raise StorageError(f"there is no folder {target.parent}", hint=f"mkdir -p {target.parent}")
    if target.exists():
        if not target.is_file() or target.samefile(source):
            raise StorageError(f"{target} cannot be a backup of {source}", hint="name another file")
        if not replace:
            raise StorageError(f"{target} is there already", hint="name another file, or say --force")
    needed, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(
            f"{target.parent} has {render_size(free)} free, a copy may take {render_size(needed)}",
            hint="make room, or name another disk",
        )


def _verify(part: Path, stop: Stop, before: int) -> tuple[int, int]:
    """Check a copy as if it had to be restored; return how many events and deliveries it has."""
    with opened(part, stop) as copy:
        [(verdict,)] = copy.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise StorageError(f"the copy is damaged: {verdict}", hint="check both disks, and try again")
        if unbalanced := [
            name for name, counts in balance(copy.execute(COUNTS_SQL)).items() if counts.unaccounted
        ]:
            raise StorageError(f"the copy does not balance: {', '.join(unbalanced)}", hint="relay doctor")
        if _last(copy) < before:
            raise StorageError("the copy lacks the latest events", hint="check both disks, and try again")
        [counts] = copy.execute("SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM deliveries)")
        return int(counts[0]), int(counts[1])


def _last(connection: sqlite3.Connection) -> int:
    [(last,)] = connection.execute("SELECT coalesce(max(id), 0) FROM deliveries").fetchall()
    return int(last)


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BackingUp:
    """The store's verb."""

    path: Path

    async def backup(self, target: Path, *, replace: bool = False) -> Backup:
        """See `Store.backup`."""
        return await apart(partial(back_up, self.path, target, replace=replace))
