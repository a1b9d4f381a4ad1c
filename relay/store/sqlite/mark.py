"""The high-water mark: a small file beside the database that records the progress of the database.

It is written at most once a second, after commits, and never fsynced, so it may lag behind the database but
is never ahead of it. A database behind its mark has lost committed data: its log was damaged or removed, or
an older file replaced it.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from relay.store.sqlite.wal import open_plain

LONGEST = 4096  # bytes of a mark
GIVEN_SQL = """
    INSERT INTO meta (name, value)
    SELECT 'last event', coalesce(max(id), 0) FROM events WHERE true
     UNION ALL SELECT 'last delivery', coalesce(max(id), 0) FROM deliveries WHERE true
        ON CONFLICT (name) DO UPDATE SET value = max(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER))
"""
"""Runs before every deletion of events, in its transaction, so that their ids are never used again."""

HIGHEST_SQL = """
    SELECT max(coalesce((SELECT max(id) FROM events), 0),
               coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'last event'), 0)),
           max(coalesce((SELECT max(id) FROM deliveries), 0),
               coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'last delivery'), 0)),
           coalesce((SELECT sum(delivered + dead + expired + cancelled) FROM ledger), 0)
"""


class Mark(msgspec.Struct, frozen=True):
    """The highest row ids of a database, and how many deliveries have ended."""

    events: int = 0  # the highest row id ever used
    deliveries: int = 0  # the highest row id ever used
    ended: int = 0  # deliveries that have ended

    def missing(self, mark: "Mark") -> list[str]:
        """Return the rows and ends of deliveries that this mark lacks compared with another one."""
        found = []
        for what in ("events", "deliveries"):
            have, had = getattr(self, what), getattr(mark, what)
            if had > have:
                found.append(f"{what} {have + 1} to {had}")
        if mark.ended > self.ended:
            found.append(f"the ends of {mark.ended - self.ended} deliveries")
        return found


def mark_of(database: Path) -> Path:
    """Return the path of a database's mark."""
    return database.with_name(f"{database.name}.mark")


def read_mark(database: Path) -> Mark:
    """Return a database's mark, an empty one if it is missing or unreadable."""
    with suppress(OSError, msgspec.MsgspecError), open_plain(mark_of(database)) as file:
        return msgspec.json.decode(file.read(LONGEST), type=Mark)
    return Mark()


def write_mark(database: Path, mark: Mark) -> None:
    """Write the mark in place.

    Raises:
        OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(mark_of(database), flags, 0o600)
    try:
        os.pwrite(descriptor, msgspec.json.encode(mark).ljust(127) + b"\n", 0)
    finally:
        os.close(descriptor)


def mark_in(row: Any) -> Mark:
    """Build a mark from the row of `HIGHEST_SQL`."""
    return Mark(*row)
