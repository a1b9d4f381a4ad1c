"""Retention: deletes finished data that is old enough, in transactions too short to delay senders.

Each group of events with a rule (a type, a source, all others) is read in pages. A cursor per group remembers
the end of the last pass, so that a pass reads only events that have become old enough since. Events that
were kept because of their deliveries are read again in the next round.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import aiosqlite
import msgspec

from relay.base.clock import SECOND, Clock
from relay.errors import StorageUnavailableError
from relay.model import Pruned
from relay.store.queries.page import portions
from relay.store.retention_policy import Policy
from relay.store.sqlite.database import Database
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.event_times import FORGET_SQL
from relay.store.sqlite.mark import GIVEN_SQL
from relay.store.sqlite.queries import EVENT_PATHS, SqliteReader
from relay.store.sqlite.transaction import Transaction, WriterConnection
from relay.store.sqlite.writer import SqliteWriter

T = TypeVar("T")

PAGE = 500
"""Candidates of one page."""

COST = 1000
"""Rows and pages of bodies that one transaction deletes, unless a single event costs more."""

SCARCE_COST = 100
"""The same on a full disk, because deleted pages are first written to the log."""

MOST_TYPES = 1000
"""Types of one source that are read separately; with more, all events of the source are read together."""

ROUND = 3600 * SECOND
"""Microseconds after which all old events are read again, also those that were kept before."""

PASS = 45.0  # seconds; the next pass continues
LONGEST_PAUSE = 0.5  # seconds between two transactions
VACUUM_PAGES = 64  # pages that one transaction returns to the disk
VACUUM_STEPS = 100  # of these transactions in one pass
SPARE = 10  # one tenth of the file may stay free

PAGE_SQL = """
    SELECT e.id, e.source, e.type, e.received_at,
           1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(d.attempts), 0),
           max(CASE d.state WHEN 'pending' THEN 9223372036854775807 WHEN 'dead' THEN d.finished_at END)
      FROM ({candidates}) AS c JOIN events AS e ON e.id = c.id LEFT JOIN deliveries AS d ON d.event_id = c.id
     GROUP BY c.id ORDER BY c.id
"""
LAST_SQL = """
    SELECT coalesce((SELECT id - 1 FROM events WHERE received_at > ? ORDER BY received_at LIMIT 1),
                    (SELECT max(id) FROM events), 0)
"""
DELETABLE_SQL = """
    WITH candidate (id, dead) AS (VALUES {values})
    SELECT candidate.id FROM candidate JOIN events AS e ON e.id = candidate.id
     WHERE NOT EXISTS (SELECT 1 FROM deliveries AS d
                        WHERE d.event_id = candidate.id
                          AND (d.state = 'pending' OR (d.state = 'dead' AND d.finished_at > candidate.dead)))
"""
DELETE_SQL = (
    """
    WITH deletable (id) AS (VALUES {values})
    DELETE FROM deliveries WHERE event_id IN (SELECT id FROM deletable)
    """,
    "WITH deletable (id) AS (VALUES {values}) DELETE FROM events WHERE id IN (SELECT id FROM deletable)",
)
ROWS_SQL = {
    "attempts": (
        """
        DELETE FROM attempts WHERE id IN (
               SELECT id FROM attempts WHERE started_at < ? ORDER BY started_at LIMIT ?)
        """,
        COST // 5,  # a stored response takes up to four pages
    ),
    "keys": (
        """
        DELETE FROM dedupe WHERE (source, key, identity) IN (
               SELECT source, key, identity FROM dedupe WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)
        """,
        COST,
    ),
    "stats": (
        """
        DELETE FROM stats WHERE (hour, source, type) IN (
               SELECT hour, source, type FROM stats WHERE hour < ? ORDER BY hour LIMIT ?)
        """,
        COST,
    ),
}


class Group(msgspec.Struct, frozen=True):
    """Events with one rule."""

    kind: str  # of EVENT_PATHS
    name: str  # the full type or the source
    kept: int  # microseconds


class Candidate(msgspec.Struct, frozen=True):
    """An event that may be deleted."""

    id: int
    cost: int  # see COST
    dead: int  # wall clock: the event is kept if one of its deliveries died later


async def delete_events(candidates: Sequence[Candidate], connection: WriterConnection) -> int:
    """Delete, in one transaction, those events that may still be deleted; returns their number.

    Their deliveries and attempts are deleted as well.
    """
    transaction = Transaction(connection)
    transaction.run(GIVEN_SQL)
    deletable = await transaction.fetch_rows(
        DELETABLE_SQL, [(candidate.id, candidate.dead) for candidate in candidates]
    )
    for sql in DELETE_SQL:
        transaction.run_rows(sql, deletable)
    await transaction.commit()
    return len(deletable)


def deletions(candidates: Iterable[Candidate], most: int = COST) -> Iterator[list[Candidate]]:
    """Cut events into portions, each for one transaction."""
    return portions(candidates, most, lambda candidate: candidate.cost)


class Retention:
    """Deletes finished data; each call continues where the previous call ended."""

    def __init__(self, database: Database, clock: Clock, disk: Disk) -> None:
        self._database = database
        self._reader = SqliteReader(database)
        self._clock = clock
        self._disk = disk
        self._cursors: dict[Group, int] = {}
        self._round = 0  # steady clock

    async def prune(self, policy: Policy, seconds: float = PASS) -> Pruned:
        """See `relay.store.Upkeep.prune`."""
        loop = asyncio.get_running_loop()
        deadline, steady = loop.time() + seconds, self._clock.steady()
        now = min(self._clock.wall(), steady)  # so a wall clock that jumped ahead deletes nothing
        if steady - self._round >= ROUND:
            self._cursors.clear()
            self._round = steady
        deleted: Counter[str] = Counter()
        for group in await self._groups(policy):
            async for candidates, more in self._deletable(group, policy, now):
                deleted["events"] += await self._delete(candidates)
                if more and loop.time() > deadline:
                    return _pruned(deleted, done=False)
        before = {"attempts": now - policy.attempts, "keys": steady, "stats": now - policy.stats}
        for name, moment in before.items():
            more = True
            while more:
                count, more = await paced(self._database.writer, partial(_delete_rows, name, moment))
                deleted[name] += count
                if more and loop.time() > deadline:
                    return _pruned(deleted, done=False)
        if deleted["events"]:
            await paced(self._database.writer, _forget_times)
        deleted["pages"] = await self._return_pages(deadline)
        return _pruned(deleted, done=True)

    async def _delete(self, candidates: Sequence[Candidate]) -> int:
        """Delete events; on a full disk in small transactions, the cheapest first."""
        deleted = 0
        scarce = bool(candidates) and self._disk.scarce
        if scarce:
            candidates = sorted(candidates, key=lambda candidate: candidate.cost)
        for some in deletions(candidates, SCARCE_COST if scarce else COST):
            try:
                deleted += await paced(self._database.writer, partial(delete_events, some))
            except StorageUnavailableError:
                if not scarce or self._database.writer.failure is not None:
                    raise
                self._round = 0  # the next pass deletes the large ones, in the space freed by the others
        return deleted

    async def _groups(self, policy: Policy) -> list[Group]:
        groups = []
        for source in policy.by_type:
            # "/" is the character after ".".
            types = await self._reader.types_between(f"{source}.", f"{source}/", MOST_TYPES)
            if len(types) > MOST_TYPES:  # senders choose types, so their number needs a limit
                groups.append(Group("source", source, policy.shortest(source)))
                continue
            rules = ((type_, policy.of_type(source, type_)) for type_ in types)
            groups += [Group("type", type_, rule.events) for type_, rule in rules if rule is not None]
        groups += [Group("source", source, keep.events) for source, keep in policy.sources.items()]
        return [*groups, Group("all", "", policy.default.events)]

    async def _deletable(
        self, group: Group, policy: Policy, now: int
    ) -> AsyncIterator[tuple[list[Candidate], bool]]:
        """Read a group's deletable events in pages that may be empty, and whether more pages follow."""
        [(last,)] = await self._database.reader.execute_fetchall(LAST_SQL, (now - group.kept,))
        sql = PAGE_SQL.format(candidates=EVENT_PATHS[group.kind].sql(newest_first=False))
        name = (group.name,) if group.name else ()
        while True:
            start = self._cursors.get(group, 0) + 1
            rows = list(await self._database.reader.execute_fetchall(sql, (*name, last + 1, start, PAGE)))
            candidates = []
            for id_, source, full_type, received_at, cost, needed in rows:
                keep = policy.of(source, full_type)
                dead = now - keep.dead
                if received_at <= now - keep.events and (needed is None or needed <= dead):
                    candidates.append(Candidate(id_, cost, dead))
            yield candidates, len(rows) == PAGE
            if rows:
                self._cursors[group] = rows[-1][0]
            if len(rows) < PAGE:
                return

    async def _return_pages(self, deadline: float) -> int:
        """Return a portion of the free pages to the disk; returns their number.

        On a full disk all pages are returned, because senders are refused until there is room.
        """
        freed, steps, scarce = 0, 0, self._disk.scarce
        while steps < VACUUM_STEPS or (scarce and asyncio.get_running_loop().time() < deadline):
            steps += 1
            [(free, pages)] = await self._database.reader.execute_fetchall(
                "SELECT freelist_count, page_count FROM pragma_freelist_count, pragma_page_count"
            )
            if free <= (0 if scarce else max(pages // SPARE, VACUUM_PAGES)):
                break
            freed += await paced(self._database.writer, vacuum_some)
        return freed


async def paced(writer: SqliteWriter, function: Callable[[WriterConnection], Awaitable[T]]) -> T:
    """Run one transaction, then pause for the same time, so that others can use the disk."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await writer.call(function)
    await asyncio.sleep(min(loop.time() - began, LONGEST_PAUSE))
    return result


def _pruned(deleted: Counter[str], *, done: bool) -> Pruned:
    counts = {name: deleted[name] for name in ("events", *ROWS_SQL, "pages")}
    return msgspec.convert({**counts, "done": done}, Pruned)


async def _delete_rows(name: str, before: int, connection: aiosqlite.Connection) -> tuple[int, bool]:
    """Delete a batch of rows of a kind; returns their number, and whether more may exist."""
    sql, limit = ROWS_SQL[name]
    async with connection.execute(sql, (before, limit)) as cursor:
        return cursor.rowcount, cursor.rowcount == limit


async def _forget_times(connection: aiosqlite.Connection) -> None:
    """Delete the rows of `event_times` whose events are deleted; at most one per 1,024 deleted events."""
    await connection.execute(FORGET_SQL)


async def vacuum_some(connection: aiosqlite.Connection) -> int:
    """Move the last pages of the file into free pages and shorten the file; returns the pages removed."""
    [(before,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    # The pragma takes one step per page, without columns. Only `executescript` runs all steps.
    await connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
    [(after,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    return int(before) - int(after)
