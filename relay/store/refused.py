"""Rows of refused requests, for both engines."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.base.ids import REFUSED, dashed
from relay.base.json_text import encode
from relay.config.problems import MOST_MATCHES, ambiguous, shown
from relay.errors import RelayError, UnknownError
from relay.model import RefusedRequest

_SHORT = re.compile(r"[0-9a-f-]{4,36}")
_CURSOR = re.compile(r"[0-9]{1,19}", re.ASCII)
_decoder = msgspec.json.Decoder(RefusedRequest)


def head_of(request: RefusedRequest) -> bytes:
    """Return a request without its body, as JSON."""
    return encode(msgspec.structs.replace(request, body=None))


def size_of(request: RefusedRequest, head: bytes) -> int:
    """Return the size of a request in bytes."""
    return len(head) + (0 if request.body is None else len(request.body))


def request_of(
    head: bytes, body: bytes | None, retried_at: int | None, event_id: str | None
) -> RefusedRequest:
    """Build a request from its row."""
    changes = {"body": body, "retried_at": retried_at, "event_id": event_id}
    return msgspec.structs.replace(_decoder.decode(head), **changes)


def position_of(cursor: str | None) -> int:
    """Return the row id above the rows of a page.

    Raises:
        RelayError: the cursor is invalid.
    """
    if cursor is None:
        return 2**63 - 1
    if not _CURSOR.fullmatch(cursor):
        raise RelayError("invalid cursor", hint="send the next_cursor of the previous page")
    return int(cursor)


MOST_NAMED = MOST_MATCHES + 1
"""Maximum number of rows that are read for a prefix of an id."""


def range_of(given: str) -> tuple[str, str]:
    """Return the range of ids that begin with a shortened id: the first of them, and the first id after them.

    Raises:
        RelayError: it is not an id of a refused request.
    """
    short = given.lower().removeprefix(REFUSED)
    if not _SHORT.fullmatch(short):
        raise RelayError(
            f"{shown(given)} is not a valid id of a refused request", hint=f"they look like {REFUSED}0190…"
        )
    first = REFUSED + dashed(short)
    return first, f"{first}g"  # the letter after all hexadecimal digits


def the_one(given: str, rows: Sequence[Any]) -> Any:
    """Return the only row of a shortened id.

    Raises:
        UnknownError: no row has this id.
        RelayError: several rows match the shortened id.
    """
    if not rows:
        raise UnknownError(
            f"unknown refused request {shown(given)}", hint="`relay refused list` lists refused requests"
        )
    if len(rows) > 1:
        raise ambiguous("refused request", given, (request_of(*row).id for row in rows))
    return rows[0]
