"""Statements of several rows: one step of SQLite instead of one per row.

SQLite's Python module lets go of the interpreter at every step, so a statement per row would cost a
thread switch per row while requests come in.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from relay.store.rows import Row
from relay.store.transaction import Transaction

ROWS = 64
"""Each count up to this is one cached statement; preparing a new text costs more than it saves."""

MOST_BYTES = 128 * 1024
"""Of large columns in one statement of several rows.

SQLite's Python module keeps what was last bound to each cached statement until it is bound anew: 64 texts
of 64 rows of 400 KB would be 800 MB."""


def insert(
    transaction: Transaction,
    into: str,
    columns: str,
    rows: Sequence[Row],
    *,
    verb: str = "INSERT",
    then: str = "",
) -> None:
    """Have rows inserted; `then` is an `ON CONFLICT` clause. A table's large column is its last one."""
    for chunk in _portions(rows):
        values = _values(len(chunk), len(chunk[0]))
        transaction.run(f"{verb} INTO {into} ({columns}) VALUES {values} {then}", _flat(chunk))


def run(transaction: Transaction, sql: str, rows: Sequence[Row]) -> None:
    """Have a statement run over rows, `{values}` standing for them."""
    for chunk in _chunks(rows):
        transaction.run(sql.format(values=_values(len(chunk), len(chunk[0]))), _flat(chunk))


async def fetch(transaction: Transaction, sql: str, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Run a statement over rows, `{values}` standing for them, and return what it returns."""
    found: list[tuple[Any, ...]] = []
    for chunk in _chunks(rows):
        text = sql.format(values=_values(len(chunk), len(chunk[0])))
        found += await transaction.fetch(text, _flat(chunk))
    return found


def _portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Split rows by count and by the bytes of their last column; a row above `MOST_BYTES` is alone."""
    begin = size = 0
    for at, row in enumerate(rows):
        last = row[-1]
        weight = len(last) if isinstance(last, bytes) else 0
        if at - begin == ROWS or (size + weight > MOST_BYTES and at > begin):
            yield rows[begin:at]
            begin, size = at, 0
        size += weight
    if begin < len(rows):
        yield rows[begin:]


def _chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for at in range(0, len(rows), ROWS):
        yield rows[at : at + ROWS]


def _values(rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return ", ".join([row] * rows)


def _flat(rows: Sequence[Row]) -> list[Any]:
    return [value for row in rows for value in row]
