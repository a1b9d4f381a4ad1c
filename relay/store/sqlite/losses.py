"""Finds lost data at a start, keeps damaged files for repair, and reports the loss.

The report is a file beside the database. `relay doctor` names it until an operator deletes it.
"""

import logging
import os
import shutil
from pathlib import Path

from relay.base.clock import rfc3339
from relay.errors import StorageError, StorageUnavailableError
from relay.store.sqlite.mark import Mark, read_mark
from relay.store.sqlite.rescue import rescues_of, restore_command, stamp
from relay.store.sqlite.wal import log_of, read_log

log = logging.getLogger("relay.store")

WHAT_TO_DO = "see docs/storage.md, section Losses"


def reports_of(database: Path) -> list[Path]:
    """Return the files beside a database that show a loss: reports, damaged logs, rescue copies."""
    patterns = (f"{database.name}.lost-*", f"{log_of(database).name}.damaged-*")
    reports = [path for pattern in patterns for path in sorted(database.parent.glob(pattern))]
    return reports + rescues_of(database)


def unfinished_of(database: Path) -> Path:
    """Return the file that has the data of a move into a database until the move is complete."""
    return database.with_name(f"{database.name}.moving")


def check_before_open(database: Path, wall: int) -> list[str]:
    """Check the files before SQLite opens them and drops unreadable pages; returns a message for each loss.

    A damaged log is copied first: the dropped pages can only be salvaged from the copy.

    Raises:
        StorageUnavailableError: the log cannot be read at the moment.
        StorageError: a rescue copy is waiting to be restored. A start would ignore its data, and would apply
            a leftover log to a file that it does not belong to. Or a move into the file is not complete, and
            new events in an empty file would prevent its end.
    """
    exists = database.exists()
    if copies := rescues_of(database):
        copy, restore = copies[-1], restore_command(copies[-1], database)
        if exists:
            message = f"{database} was replaced or damaged, and it has a rescue copy: {copy}"
            without = f"use the current file instead, rm -f {log_of(database)} and move the copy elsewhere"
        else:
            message = f"{database} is missing, and it has a rescue copy: {copy}"
            without = "begin with an empty database instead, move the copy elsewhere"
        raise StorageError(message, hint=f"restore it: {restore}; to {without}")
    if not exists:
        if (unfinished := unfinished_of(database)).exists():
            raise StorageError(
                f"{database} is missing, and {unfinished} has the data of an unfinished move",
                hint="run the same `relay db move` again: it continues; to begin with an empty database"
                f" instead, delete {unfinished}",
            )
        return []
    try:
        found = read_log(log_of(database))
    except OSError as error:
        raise StorageUnavailableError(
            f"{log_of(database)} cannot be read: {error.strerror}",
            hint="chown relay.db, relay.db-wal and relay.db-shm to the user of the relay",
        ) from error
    if not found.damaged:
        return []
    what = (
        f"{log_of(database)} is damaged: {found.commits} transactions after frame {found.valid} are dropped"
    )
    copy = log_of(database).with_name(f"{log_of(database).name}.damaged-{stamp(wall)}")
    try:
        _copy(log_of(database), copy)
    except OSError as error:
        return [f"{what}; the log could not be copied: {error.strerror}"]
    return [f"{what}; a copy of the log is {copy}"]


def check_after_open(database: Path, wall: int, highest: Mark, before: list[str]) -> None:
    """Compare an open database with its mark; report missing data and the losses `before` it was opened."""
    found = list(before)
    if missing := highest.missing(read_mark(database)):
        found.append(f"the database is older than its high-water mark: {', '.join(missing)} are missing")
    if not found:
        return
    for what in found:
        log.critical("data was lost: %s; %s", what, WHAT_TO_DO)
    report = database.with_name(f"{database.name}.lost-{stamp(wall)}")
    text = "".join(f"{line}\n" for line in (f"noticed at the start of {rfc3339(wall)}", *found, WHAT_TO_DO))
    try:
        descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        log.error("%s could not be written: %s", report, error.strerror)  # noqa: TRY400 - the message has the reason


def _copy(source: Path, target: Path) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as copy, source.open("rb") as original:
        shutil.copyfileobj(original, copy)
