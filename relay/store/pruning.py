"""Retention: deletes finished data that is old enough, in transactions too short to delay senders.

Each group of events with a rule (a type, a source, all others) is read in pages. A cursor per group remembers
the end of the last pass, so that a pass reads only events that have become old enough since. Events that
were kept because of their deliveries are read again in the next round.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import msgspec

from relay.base.clock import SECOND, Clock
from relay.model import Pruned
from relay.store.queries.page import portions
from relay.store.queries.reader import Reader
from relay.store.retention_policy import Policy
from relay.store.writer import Writer

T = TypeVar("T")
C = TypeVar("C")

PAGE = 500
"""Candidates of one page."""

COST = 1000
"""Rows and pages of bodies that one transaction deletes, unless a single event costs more."""

MOST_TYPES = 1000
"""Types of one source that are read separately; with more, all events of the source are read together."""

ROUND = 3600 * SECOND
"""Microseconds after which all old events are read again, also those that were kept before."""

SOON = 120 * SECOND
"""Microseconds. Events that will be old enough only after this time are not read before then."""

PASS = 45.0  # seconds; the next pass continues
LONGEST_PAUSE = 0.5  # seconds between two transactions

ROWS = ("attempts", "keys", "stats")
"""Kinds of rows, other than events, with their own rules."""


class Group(msgspec.Struct, frozen=True):
    """Events with one rule."""

    kind: Literal["all", "source", "type"]  # name of the path to its events
    name: str  # the full type or the source
    kept: int  # microseconds


class Candidate(msgspec.Struct, frozen=True):
    """An event that may be deleted."""

    id: int
    cost: int  # see COST
    dead: int  # wall clock: the event is kept if one of its deliveries died later


def deletions(candidates: Iterable[Candidate], most: int = COST) -> Iterator[list[Candidate]]:
    """Cut events into portions, each for one transaction."""
    return portions(candidates, most, lambda candidate: candidate.cost)


async def paced(writer: Writer[C], function: Callable[[C], Awaitable[T]]) -> T:
    """Run one transaction, then pause for the same time, so that others can use the disk."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await writer.call(function)
    await asyncio.sleep(min(loop.time() - began, LONGEST_PAUSE))
    return result


class Retention(ABC, Generic[C]):
    """Deletes finished data; each call of `prune` continues where the previous call ended."""

    def __init__(self, reader: Reader, clock: Clock) -> None:
        self._reader = reader
        self._clock = clock
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
        await self._begin(policy, now, deleted)
        for group in await self._groups(policy):
            async for candidates, more in self._deletable(group, policy, now):
                deleted["events"] += await self._delete(candidates)
                if more and loop.time() > deadline:
                    return _pruned(deleted, done=False)
        before = {"attempts": now - policy.attempts, "keys": steady, "stats": now - policy.stats}
        for name, moment in before.items():
            more = True
            while more:
                count, more = await paced(self._writer, partial(self._delete_rows, name, moment))
                deleted[name] += count
                if more and loop.time() > deadline:
                    return _pruned(deleted, done=False)
        deleted["pages"] = await self._end(deleted, deadline)
        return _pruned(deleted, done=True)

    async def _groups(self, policy: Policy) -> list[Group]:
        groups: list[Group] = []
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
        last = await self._last(group, now - group.kept)
        while True:
            start = self._cursors.get(group, 0) + 1
            rows = await self._page(group, last + 1, start)
            candidates = []
            for id_, source, full_type, received_at, cost, needed in rows:
                keep = policy.of(source, full_type)
                dead = now - keep.dead
                if received_at <= now - keep.events and (needed is None or needed <= dead):
                    candidates.append(Candidate(id_, cost, dead))
            yield candidates, len(rows) == PAGE
            # The next pass begins with an event that will soon be old enough.
            soon = next(
                (at for at, row in enumerate(rows) if 0 < row[3] - now + group.kept <= SOON), len(rows)
            )
            if soon:
                self._cursors[group] = rows[soon - 1][0]
            if soon < PAGE:
                return

    async def _delete(self, candidates: Sequence[Candidate]) -> int:
        """Delete those events that may still be deleted; returns their number."""
        return sum(
            [await paced(self._writer, partial(self._delete_events, some)) for some in deletions(candidates)]
        )

    @property
    @abstractmethod
    def _writer(self) -> Writer[C]: ...

    async def _begin(self, policy: Policy, now: int, deleted: Counter[str]) -> None:
        """Begin a pass; an engine may delete many events at once, and count them in `deleted`."""

    @abstractmethod
    async def _last(self, group: Group, moment: int) -> int:
        """Return the row id of the last event that may have been received at a moment (wall) or before."""

    @abstractmethod
    async def _page(self, group: Group, end: int, start: int) -> Sequence[tuple[Any, ...]]:
        """Return the first `PAGE` events of a group from `start` to before `end`, in order.

        A row has row id, source, full type, time of receipt, cost, and the time until which the event is
        needed. That is the latest death of its deliveries, a far future for a pending delivery, else None.
        """

    @abstractmethod
    async def _delete_events(self, candidates: Sequence[Candidate], connection: C) -> int:
        """Delete, in one transaction, those events that may still be deleted; returns their number.

        Their deliveries and attempts are deleted as well.
        """

    @abstractmethod
    async def _delete_rows(self, name: str, before: int, connection: C) -> tuple[int, bool]:
        """Delete a batch of rows of a kind of `ROWS`; returns their number, and whether more may exist."""

    @abstractmethod
    async def _end(self, deleted: Counter[str], deadline: float) -> int:
        """End a complete pass; returns the pages that were returned to the file system."""


def _pruned(deleted: Counter[str], *, done: bool) -> Pruned:
    counts = {name: deleted[name] for name in ("events", *ROWS, "pages")}
    return msgspec.convert({**counts, "done": done}, Pruned)
