"""Retention: what has been dealt with for long enough goes, in transactions that senders do not notice.

Candidates are read in pages of each group that has a rule: a type, a source, all the rest; a cursor per
group remembers how far it was, so that a pass looks at what has come of age since. What was kept for its
deliveries is looked at again in the next round.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import aiosqlite
import msgspec

from relay.base.clock import SECOND, Clock
from relay.errors import StorageUnavailableError
from relay.model import Pruned
from relay.store.database import Database
from relay.store.disk import Disk
from relay.store.event_times import FORGET_SQL
from relay.store.mark import GIVEN_SQL
from relay.store.retention_policy import Policy
from relay.store.statements import fetch, run
from relay.store.transaction import Transaction
from relay.store.writer import Writer

T = TypeVar("T")

PAGE = 500
"""Candidates that one page looks at."""

COST = 1000
"""What one transaction deletes at most: rows, and pages of bodies; or a single event that costs more."""

SCARCE_COST = 100
"""The same on a disk without room: what is deleted is overwritten in the log first."""
MOST_TYPES = 1000
"""Types of one source that are looked at one by one; with more, all of its events are looked at in turn."""

ROUND = 3600 * SECOND
"""How often everything that is old enough is looked at again, also what was kept before."""

PASS = 45.0  # seconds after which the rest is left to the next pass
LONGEST_PAUSE = 0.5  # seconds between two transactions
VACUUM_PAGES = 64  # given back to the disk by one transaction
VACUUM_STEPS = 100  # such transactions in one pass
SPARE = 10  # a tenth of the file may be free without being given back

CANDIDATES = {
    "type": """
        SELECT id FROM events WHERE type = :name AND id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
    "source": """
        SELECT id FROM events WHERE source = :name AND id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
    "all": "SELECT id FROM events WHERE id > :after AND id <= :last ORDER BY id LIMIT :page",
}
PAGE_SQL = """
    SELECT e.id, e.source, e.type, e.received_at,
           1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(d.attempts), 0),
           max(CASE d.state WHEN 'pending' THEN 9223372036854775807 WHEN 'dead' THEN d.finished_at END)
      FROM ({candidates}) AS c JOIN events AS e ON e.id = c.id LEFT JOIN deliveries AS d ON d.event_id = c.id
     GROUP BY c.id ORDER BY c.id
"""
TYPES_SQL = """
    WITH RECURSIVE found (type) AS (
         SELECT min(type) FROM events WHERE type >= :first AND type < :end
         UNION ALL
         SELECT (SELECT min(type) FROM events WHERE type > found.type AND type < :end)
           FROM found WHERE found.type IS NOT NULL)
    SELECT type FROM found WHERE type IS NOT NULL LIMIT :most
"""
LAST_SQL = """
    SELECT coalesce((SELECT id - 1 FROM events WHERE received_at > ? ORDER BY received_at LIMIT 1),
                    (SELECT max(id) FROM events), 0)
"""
GOING_SQL = """
    WITH asked (id, dead) AS (VALUES {values})
    SELECT asked.id FROM asked JOIN events AS e ON e.id = asked.id
     WHERE NOT EXISTS (SELECT 1 FROM deliveries AS d
                        WHERE d.event_id = asked.id
                          AND (d.state = 'pending' OR (d.state = 'dead' AND d.finished_at > asked.dead)))
"""
GONE_SQL = (
    "WITH gone (id) AS (VALUES {values}) DELETE FROM deliveries WHERE event_id IN (SELECT id FROM gone)",
    "WITH gone (id) AS (VALUES {values}) DELETE FROM events WHERE id IN (SELECT id FROM gone)",
)
ROWS_SQL = {
    "attempts": (
        """
        DELETE FROM attempts WHERE id IN (
               SELECT id FROM attempts WHERE started_at < ? ORDER BY started_at LIMIT ?)
        """,
        COST // 5,  # an answer takes up to four pages
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
    """Events that one rule is about."""

    kind: str  # of CANDIDATES
    name: str  # the full type or the source
    kept: int  # microseconds


class Victim(msgspec.Struct, frozen=True):
    """An event that may go."""

    id: int
    cost: int  # see COST
    dead: int  # no delivery may have died after this (wall clock)


async def delete_events(victims: Sequence[Victim], connection: aiosqlite.Connection) -> int:
    """Delete, in one transaction, those that may still go, with deliveries and attempts; return how many."""
    transaction = Transaction(connection)
    transaction.run(GIVEN_SQL)
    going = await fetch(transaction, GOING_SQL, [(victim.id, victim.dead) for victim in victims])
    for sql in GONE_SQL:
        run(transaction, sql, going)
    await transaction.commit()
    return len(going)


def portions(victims: Sequence[Victim], most: int = COST) -> list[list[Victim]]:
    """Cut into what one transaction deletes each."""
    found: list[list[Victim]] = []
    cost = most
    for victim in victims:
        if cost + victim.cost > most:
            found.append([])
            cost = 0
        found[-1].append(victim)
        cost += victim.cost
    return found


class Retention:
    """Deletes finished data; remembers how far it came from one call to the next."""

    def __init__(self, database: Database, clock: Clock, disk: Disk) -> None:
        self._database = database
        self._clock = clock
        self._disk = disk
        self._cursors: dict[Group, int] = {}
        self._round = 0  # steady clock

    async def prune(self, policy: Policy, seconds: float = PASS) -> Pruned:
        """See `relay.store.Upkeep.prune`."""
        loop = asyncio.get_running_loop()
        deadline, steady = loop.time() + seconds, self._clock.steady()
        now = min(self._clock.wall(), steady)  # a clock that jumped ahead must not make anything old
        if steady - self._round >= ROUND:
            self._cursors.clear()
            self._round = steady
        gone: Counter[str] = Counter()
        for group in await self._groups(policy):
            async for victims, more in self._victims(group, policy, now):
                gone["events"] += await self._delete(victims)
                if more and loop.time() > deadline:
                    return _pruned(gone, done=False)
        before = {"attempts": now - policy.attempts, "keys": steady, "stats": now - policy.stats}
        for name, moment in before.items():
            more = True
            while more:
                count, more = await paced(self._database.writer, partial(_delete_rows, name, moment))
                gone[name] += count
                if more and loop.time() > deadline:
                    return _pruned(gone, done=False)
        if gone["events"]:
            await paced(self._database.writer, _forget_times)
        gone["pages"] = await self._give_back(deadline)
        return _pruned(gone, done=True)

    async def _delete(self, victims: Sequence[Victim]) -> int:
        """Delete events; on a disk without room in small transactions, the cheap ones first."""
        gone = 0
        scarce = bool(victims) and self._disk.scarce
        if scarce:
            victims = sorted(victims, key=lambda victim: victim.cost)
        for some in portions(victims, SCARCE_COST if scarce else COST):
            try:
                gone += await paced(self._database.writer, partial(delete_events, some))
            except StorageUnavailableError:
                if not scarce or self._database.writer.failure is not None:
                    raise
                self._round = 0  # what was too large goes in the next pass, in the room that others left
        return gone

    async def _groups(self, policy: Policy) -> list[Group]:
        groups = []
        for source in policy.by_type:
            names = {"first": f"{source}.", "end": f"{source}/"}  # "/" comes next after "."
            values = {**names, "most": MOST_TYPES + 1}
            types = list(await self._database.reader.execute_fetchall(TYPES_SQL, values))
            if len(types) > MOST_TYPES:  # senders choose them, so their number must have an end
                groups.append(Group("source", source, policy.shortest(source)))
                continue
            for (full_type,) in types:
                if (keep := policy.of_type(source, full_type)) is not None:
                    groups.append(Group("type", full_type, keep.events))
        groups += [Group("source", source, keep.events) for source, keep in policy.sources.items()]
        return [*groups, Group("all", "", policy.default.events)]

    async def _victims(
        self, group: Group, policy: Policy, now: int
    ) -> AsyncIterator[tuple[list[Victim], bool]]:
        """Read those of a group that may go, in pages that may be empty, and whether more will come."""
        [(last,)] = await self._database.reader.execute_fetchall(LAST_SQL, (now - group.kept,))
        sql = PAGE_SQL.format(candidates=CANDIDATES[group.kind])
        while True:
            after = self._cursors.get(group, 0)
            values = {"name": group.name, "after": after, "last": last, "page": PAGE}
            rows = list(await self._database.reader.execute_fetchall(sql, values))
            victims = []
            for id_, source, full_type, received_at, cost, needed in rows:
                keep = policy.of(source, full_type)
                dead = now - keep.dead
                if received_at <= now - keep.events and (needed is None or needed <= dead):
                    victims.append(Victim(id_, cost, dead))
            yield victims, len(rows) == PAGE
            if rows:
                self._cursors[group] = rows[-1][0]
            if len(rows) < PAGE:
                return

    async def _give_back(self, deadline: float) -> int:
        """Give free pages back to the disk, some at a time; return how many.

        On a disk without room all of them: senders are refused while there is less than the floor.
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


async def paced(writer: Writer, errand: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
    """Run one transaction, and then leave the disk to others for as long."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await writer.errand(errand)
    await asyncio.sleep(min(loop.time() - began, LONGEST_PAUSE))
    return result


def _pruned(gone: Counter[str], *, done: bool) -> Pruned:
    counts = {name: gone[name] for name in ("events", *ROWS_SQL, "pages")}
    return msgspec.convert({**counts, "done": done}, Pruned)


async def _delete_rows(name: str, before: int, connection: aiosqlite.Connection) -> tuple[int, bool]:
    """Delete some rows of a kind; return how many, and whether there may be more."""
    sql, limit = ROWS_SQL[name]
    async with connection.execute(sql, (before, limit)) as cursor:
        return cursor.rowcount, cursor.rowcount == limit


async def _forget_times(connection: aiosqlite.Connection) -> None:
    """Delete what is known of the times of events that are gone; no more than there have been blocks."""
    await connection.execute(FORGET_SQL)


async def vacuum_some(connection: aiosqlite.Connection) -> int:
    """Move the last pages of the file to free ones, and shorten it by them; return by how many."""
    [(before,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    # A step per page, and none of them has a column: only a script is run to its end.
    await connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
    [(after,)] = await connection.execute_fetchall("PRAGMA freelist_count")
    return int(before) - int(after)
