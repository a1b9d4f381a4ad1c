"""A page of a list, and the cursor that goes on from it."""

import re
from typing import Any

import msgspec

from relay.errors import RelayError

_CURSOR = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?", re.ASCII)


class Page(msgspec.Struct, frozen=True):
    """Some rows of a list, newest first: fewer than asked for, even none, where looking had its bound."""

    rows: list[dict[str, Any]]
    cursor: str | None  # of the next page; None: there is none


class Place(msgspec.Struct, frozen=True, order=True):
    """Where a page begins: everything on it comes before this."""

    key: int  # of what the list is ordered by
    row: int = 0  # row id, among those of one key

    @classmethod
    def of(cls, cursor: str) -> "Place":
        """Read a cursor.

        Raises:
            RelayError: no page ends with such a one.
        """
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            raise RelayError("the cursor is none", hint="expected the next_cursor of the page before")
        return cls(int(match[1]), int(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.key}.{self.row}" if self.row else str(self.key)
