"""How much came in, per source, type and hour: counted with each event, kept when events are gone."""

from collections.abc import AsyncIterator

import aiosqlite

from relay.base.clock import SECOND
from relay.errors import RelayError
from relay.model import Selection, Stat, StoredEvent
from relay.store.queries.selection import judge
from relay.store.statements import insert
from relay.store.transaction import Transaction

HOUR = 3600 * SECOND
PAGE = 1000

_COLUMNS = "hour, source, type, events, duplicates, bytes"
_ADDING = ", ".join(
    f"{column} = {column} + excluded.{column}" for column in ("events", "duplicates", "bytes")
)
PAGE_SQL = f"""
    SELECT {_COLUMNS} FROM stats
     WHERE hour >= :since AND (hour, source, type) < (:hour, :source, :type)
     ORDER BY hour DESC, source DESC, type DESC LIMIT :page
"""  # noqa: S608 - constants of ours


class Tallies:
    """What one transaction adds: a row per source, type and hour, however many events it has."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str, str], tuple[int, int, int]] = {}

    def add(self, event: StoredEvent, *, duplicate: bool = False) -> None:
        """Count an event, or a request that repeated one."""
        key = (event.received_at - event.received_at % HOUR, event.source, event.type)
        events, duplicates, size = self._found.get(key, (0, 0, 0))
        if duplicate:
            self._found[key] = (events, duplicates + 1, size)
        else:
            self._found[key] = (events + 1, duplicates, size + len(event.body))

    def write(self, transaction: Transaction) -> None:
        """Write it, inside the transaction."""
        if self._found:
            rows = [key + counts for key, counts in self._found.items()]
            then = f"ON CONFLICT (hour, source, type) DO UPDATE SET {_ADDING}"
            insert(transaction, "stats", _COLUMNS, rows, then=then)


class Tallying:
    """The reading verb of the store about what came in."""

    _reader: aiosqlite.Connection

    async def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """See `Store.stats`."""
        if selection.of_deliveries or selection.subject is not None or selection.where is not None:
            raise RelayError(
                "what came in is counted per source, type and hour only", hint="list events instead"
            )
        meant = judge(
            Selection(source=selection.source, type=selection.type, until=selection.until), deliveries=False
        )
        since = selection.since or 0
        hour, source, type_ = after or (2**63 - 1, "", "")
        values = {"since": since - since % HOUR, "hour": hour, "source": source, "type": type_, "page": PAGE}
        while rows := list(await self._reader.execute_fetchall(PAGE_SQL, values)):
            stats = [Stat(*row) for row in rows]
            yield tuple(stat for stat in stats if meant(stat.source, stat.type, None, stat.hour))
            values |= {"hour": stats[-1].hour, "source": stats[-1].source, "type": stats[-1].type}
