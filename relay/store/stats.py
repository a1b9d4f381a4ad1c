"""How much came in, per source, type and hour: counted with each event, kept when events are gone."""

from collections.abc import AsyncIterator

import aiosqlite

from relay.base.clock import SECOND
from relay.errors import RelayError
from relay.model import Selection, Stat
from relay.store.database import Database
from relay.store.queries.selection import judge

HOUR = 3600 * SECOND
PAGE = 1000

COLUMNS = "hour, source, type, events, duplicates, bytes"
PAGE_SQL = f"""
    SELECT {COLUMNS} FROM stats
     WHERE hour >= :since AND (hour, source, type) < (:hour, :source, :type)
     ORDER BY hour DESC, source DESC, type DESC LIMIT :page
"""  # noqa: S608 - constants of ours


class Tallying:
    """The reading verb of the store about what came in."""

    _database: Database

    @property
    def _reader(self) -> aiosqlite.Connection:
        return self._database.reader

    async def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """See `Queries.stats`."""
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
