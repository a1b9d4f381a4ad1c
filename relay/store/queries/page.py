"""Pages of lists: their cursors, and the budget that bounds the search for the rows of one page.

A page checks a limited number of candidates, for a limited time. Then it ends with the rows that it found,
and its cursor continues after the last candidate. So no page takes long with any filters, and no read
transaction is longer than one step of the search.
"""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

import msgspec

from relay.errors import RelayError

T = TypeVar("T")

MOST_CANDIDATES = 10_000
"""Candidates that one page checks."""

SECONDS = 0.025
"""Time for one page; a step that has begun is finished."""

STEP = 500  # candidates that one statement checks
BODY_STEP = 100  # the same if their bodies are read
FIRST_STEP = 50  # candidates of the first step, even if a page has fewer rows

_CURSOR = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,19}))?", re.ASCII)
_LARGEST = 2**63 - 1


class Cursor(msgspec.Struct, frozen=True, order=True):
    """A position in a list: a page contains rows before it."""

    key: int  # value by which the list is sorted
    row: int = 0  # row id, where several rows have the same key; 0: the key is the row id

    @classmethod
    def read(cls, text: str) -> "Cursor":
        """Read a cursor.

        Raises:
            RelayError: it is invalid.
        """
        match = _CURSOR.fullmatch(text)
        if match is None or max(int(part) for part in match.groups("0")) > _LARGEST:
            raise RelayError("invalid cursor", hint="send the next_cursor of the previous page")
        return cls(int(match[1]), int(match[2] or 0))

    @property
    def id(self) -> int:
        """Row id at this position."""
        return self.row or self.key

    def __str__(self) -> str:
        return f"{self.key}.{self.row}" if self.row else str(self.key)


TOP = Cursor(_LARGEST)
"""Every row is before this position."""


class Step(msgspec.Struct, frozen=True):
    """Result of one step of a search."""

    found: list[Cursor]  # positions of matching rows, in order
    next: Cursor | None  # start of the next step; None: no candidate is left
    candidates: int  # number of checked candidates


class PageBudget:
    """The remaining number of candidates and the remaining time for the search of one page."""

    def __init__(self, *, reads_bodies: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = MOST_CANDIDATES
        self._step = BODY_STEP if reads_bodies else STEP
        self._deadline = self._loop.time() + SECONDS

    def next_step(self, wanted: int) -> int:
        """Return the number of candidates for the next step."""
        return min(max(wanted, FIRST_STEP), self._step, self._left)

    def spend(self, candidates: int) -> bool:
        """Subtract the candidates of a step; return whether the budget is used up."""
        self._left -= candidates
        return self._left <= 0 or self._loop.time() >= self._deadline


async def search(
    step: Callable[[Cursor, int], Awaitable[Step]], limit: int, cursor: Cursor, budget: PageBudget
) -> tuple[list[Cursor], Cursor | None]:
    """Repeat steps until `limit` rows are found, no candidate is left or the budget is used up.

    Returns the positions of the rows, and the cursor of the next page.
    """
    found: list[Cursor] = []
    count = limit
    while True:
        count = budget.next_step(count)
        result = await step(cursor, count)
        found += result.found
        if len(found) >= limit:
            return found[:limit], found[limit - 1]
        if result.next is None or budget.spend(result.candidates):
            return found, result.next
        cursor, count = result.next, count * 4


def portions(
    items: Iterable[T], most: int, weight: Callable[[T], int], count: int = sys.maxsize
) -> Iterator[list[T]]:
    """Cut items into portions of at most `count` items and `most` weight; a heavier item is alone."""
    portion: list[T] = []
    total = 0
    for item in items:
        added = weight(item)
        if portion and (len(portion) == count or total + added > most):
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += added
    if portion:
        yield portion
