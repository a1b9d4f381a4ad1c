"""Moves all stored data from one engine to another, while no daemon runs.

Rows keep their order, and get new row ids, because each engine assigns ids differently. Each step is one
transaction of the target, which also stores the position in the source. So an interrupted move continues
where it stopped, and a daemon refuses a target that is not complete.
"""

import time
from array import array
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from relay.base.clock import SECOND
from relay.errors import StorageError
from relay.model import Counts

Row = tuple[Any, ...]

EVENT = (
    "id", "public_id", "source", "type", "subject", "received_at", "content_type", "traceparent", "sha256",
    "size", "context", "data_at", "data_size", "data", "body",
)  # fmt: skip
DELIVERY = (
    "id", "public_id", "event_id", "destination", "state", "reason", "attempts", "created_at",
    "next_attempt_at", "finished_at", "last_status", "last_error", "order_key", "latest_key", "expires_at",
    "on_dead", "replay_of", "group_key", "size",
)  # fmt: skip
ATTEMPT = (
    "id", "delivery_id", "started_at", "duration_ms", "result", "status", "error", "truncated", "group_id",
    "group_size", "answer",
)  # fmt: skip
LARGE = {"events": EVENT, "deliveries": DELIVERY, "attempts": ATTEMPT}
"""Tables that are moved in steps, and the columns of their rows. `size` of a delivery: bytes of the body."""

SMALL: Mapping[str, tuple[str, ...]] = {
    "repetitions": ("event_id", "requests"),
    "ledger": ("destination", "created", "delivered", "dead", "expired", "cancelled"),
    "stats": ("hour", "source", "type", "events", "duplicates", "bytes"),
    "dedupe": ("source", "key", "identity", "event_id", "expires_at"),
    "destinations": (
        "name", "paused", "paused_until", "failing_since", "disabled_at", "disabled_reason", "circuit_opened",
    ),
    "sources": ("name", "paused"),
    "held": ("destination", "since", "warned"),
    "workers": ("source", "id", "status", "last_heartbeat", "deadline", "record"),
    "worker_metrics": (
        "source", "worker_id", "at", "status", "cpu", "memory", "uptime", "message_count", "sessions",
    ),
    "worker_commands": (
        "public_id", "source", "worker_id", "state", "created_at", "expires_at", "sent_at", "body",
    ),
    "refused": (
        "public_id", "at", "source", "reason", "size", "retried_at", "event_id", "head", "body",
    ),
    "audit": (
        "at", "operator", "access", "remote", "method", "path", "body", "status", "request_id", "node",
    ),
}  # fmt: skip
"""Tables that are moved as a whole, each in one transaction. Logins to the dashboard stay behind."""

STEP = 1000  # rows of one step
STEP_BYTES = 8 * 2**20  # bytes of bodies in memory at once, unless one event alone is larger


class Position(msgspec.Struct):
    """The position of a move; the target stores it."""

    source: str  # place of the source
    totals: dict[str, int]  # of the source
    after: dict[str, int] = {}  # by table: the row id in the source of the last row that was moved
    done: list[str] = []  # tables that are complete


class Moved(msgspec.Struct, frozen=True):
    """Progress of a move."""

    table: str
    rows: int
    of: int


class Side(Protocol):
    """The stored data at one end of a move."""

    location: str

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Open the data, and make sure that no daemon uses it.

        Raises:
            StorageError: it cannot be opened, or a daemon uses it.
        """
        ...

    async def totals(self) -> dict[str, int]:
        """Return the number of rows of each table, of deliveries by state, and the bytes of all bodies."""
        ...

    async def audit(self) -> dict[str, Counts]:
        """Return the ledger, with pending deliveries counted in the table."""
        ...

    async def ids(self, table: str) -> "array[int]":
        """Return all row ids of a large table, in order."""
        ...


class Source(Side, Protocol):
    """Reads everything."""

    async def step(self, table: str, after: int, count: int, most: int) -> Sequence[Row]:
        """Return the next rows of a large table: at most `count`, and `most` bytes of bodies."""
        ...

    def rows(self, table: str) -> AsyncIterator[Sequence[Row]]:
        """Read a small table."""
        ...


class Target(Side, Protocol):
    """Writes everything to a new target, or to the target of an interrupted move."""

    async def position(self) -> Position | None:
        """Return the position of the interrupted move; None: nothing was moved yet.

        Raises:
            StorageError: the target has other data.
        """
        ...

    def next_id(self, previous: int, moment: int) -> int:
        """Return a row id above the previous one, for a row with this time (wall clock)."""
        ...

    async def write(self, table: str, rows: Sequence[Row], position: Position) -> None:
        """Write rows of a large table and the position, in one transaction."""
        ...

    async def write_all(self, table: str, rows: AsyncIterator[Sequence[Row]], position: Position) -> None:
        """Replace a small table and write the position, in one transaction."""
        ...

    async def finish(self) -> None:
        """Complete the data, so that a daemon can use it."""
        ...


class Ids:
    """Row ids of a table in the source and in the target, in the same order."""

    def __init__(self, old: "array[int]", new: "array[int]") -> None:
        self._old = old
        self._new = new

    def add(self, old: int, new: int) -> None:
        """Add a row."""
        self._old.append(old)
        self._new.append(new)

    @property
    def last(self) -> int:
        """The highest id in the target."""
        return self._new[-1] if self._new else 0

    def get(self, old: int | None) -> int | None:
        """Return the id of a row in the target; None: it was deleted."""
        if old is None:
            return None
        at = bisect_left(self._old, old)
        return self._new[at] if at < len(self._old) and self._old[at] == old else None


class Move:
    """Moves everything from a source to a target."""

    def __init__(self, source: Source, target: Target) -> None:
        self._source = source
        self._target = target
        self._ids: dict[str, Ids] = {}
        self.is_continued = False

    async def run(self) -> AsyncIterator[Moved]:
        """Move, and yield the progress; at the end, both sides are compared.

        Raises:
            StorageError: a daemon runs, the target has other data, the source has changed since the move
                began, or the sides differ.
        """
        async with self._source.opened(), self._target.opened():
            totals, position = await self._source.totals(), await self._target.position()
            self.is_continued = position is not None
            if position is None:
                position = Position(self._source.location, totals)
            elif (position.source, position.totals) != (self._source.location, totals):
                raise StorageError(
                    f"{self._target.location} has a part of an earlier state of {position.source}",
                    hint="empty the target, then run the command again",
                )
            for table in LARGE:
                async for moved in self._steps(table, position):
                    yield moved
            for table in SMALL:
                yield Moved(table, 0, totals[table])
                if table not in position.done:
                    position.done.append(table)
                    await self._target.write_all(table, self._small(table), position)
            await self._compare(totals)
            await self._target.finish()

    async def _steps(self, table: str, position: Position) -> AsyncIterator[Moved]:
        """Move a large table."""
        after, total = position.after.get(table, 0), position.totals[table]
        old, new = await self._source.ids(table), await self._target.ids(table)
        count = bisect_left(old, after + 1)
        if table == "attempts":
            ids = Ids(array("q"), array("q", new[-1:]))
        elif count != len(new):
            raise StorageError(
                f"{self._target.location}: {table} has {len(new)} rows, the move wrote {count}",
                hint="empty the target, then run the command again",
            )
        else:
            ids = Ids(old[:count], new)
        self._ids[table] = ids
        yield Moved(table, count, total)
        while rows := await self._source.step(table, after, STEP, STEP_BYTES):
            after = rows[-1][0]
            position.after[table] = after
            await self._target.write(table, list(self._renumbered(table, rows, ids)), position)
            count += len(rows)
            yield Moved(table, count, total)

    def _renumbered(self, table: str, rows: Iterable[Row], ids: Ids) -> Iterable[Row]:
        """Return rows with the row ids of the target."""
        # Ids only increase, so one wrong time in the future would move all later ids there.
        now = time.time_ns() // 1000 + 60 * SECOND
        for row in rows:
            if table == "events":
                new = self._target.next_id(ids.last, min(row[5], now))
                ids.add(row[0], new)
                yield (new, *row[1:])
            elif table == "deliveries":
                event, replay_of = self._ids["events"].get(row[2]), self._ids["deliveries"].get(row[16])
                if event is None:
                    raise StorageError(f"{row[1]} belongs to no event", hint="run relay doctor on the source")
                new = self._target.next_id(max(ids.last, event - 1), min(row[7], now))
                ids.add(row[0], new)
                yield (new, row[1], event, *row[3:16], replay_of, *row[17:])
            elif (delivery := self._ids["deliveries"].get(row[1])) is not None:
                new = self._target.next_id(ids.last, min(row[2], now))
                ids.add(row[0], new)
                yield (new, delivery, *row[2:])

    async def _small(self, table: str) -> AsyncIterator[Sequence[Row]]:
        """Read a small table, with the row ids of the target."""
        async for rows in self._source.rows(table):
            if table == "repetitions":
                found = [(self._ids["events"].get(event), requests) for event, requests in rows]
                yield [row for row in found if row[0] is not None]
            else:
                yield rows

    async def _compare(self, totals: Mapping[str, int]) -> None:
        """Compare both sides.

        Raises:
            StorageError: they differ.
        """
        if await self._source.totals() != totals:
            raise StorageError(
                f"{self._source.location} changed during the move",
                hint="stop its daemon, then run the command again",
            )
        moved = await self._target.totals()
        # Attempts and repetitions of deleted events are not moved.
        wrong = [
            f"{name}: {moved[name]} instead of {count}"
            for name, count in totals.items()
            if moved[name] != count and not (name in {"attempts", "repetitions"} and moved[name] < count)
        ]
        before, after = await self._source.audit(), await self._target.audit()
        names = before.keys() | after.keys()
        wrong += [f"ledger of {name}" for name in names if before.get(name) != after.get(name)]
        if wrong:
            raise StorageError(
                f"{self._target.location} differs from the source: {', '.join(sorted(wrong))}",
                hint="please report this as a bug; the source is unchanged",
            )
