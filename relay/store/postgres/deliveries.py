"""Claims of due deliveries in PostgreSQL, and outcomes that do not count there."""

import logging
from collections.abc import Iterable, Sequence

from relay.base.clock import SECOND, Clock
from relay.base.shards import Shards
from relay.errors import StorageError
from relay.model import Claim, Delivery, DestinationState, GeneratedEvent, Outcome
from relay.store import Cancelled
from relay.store.claims import Claims
from relay.store.deliveries import StoredDeliveries
from relay.store.postgres.connection import Connection, Database
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.rows import CLAIM_COLUMNS, delivery_of, text
from relay.store.postgres.shards import due_sql, next_sql

log = logging.getLogger("relay.store")

OVERLAP = 5 * SECOND
"""Microseconds before the cursor that a claim reads again, because a commit may come late: of another node,
or of the outcome before a retry."""

OVERLAP_EVERY = SECOND
"""Microseconds between two claims of first attempts that read `OVERLAP`: they read past all deliveries that
ended in that time.

Claims between them find late commits by the announcements of other nodes. A claim that finds no more
deliveries asks for another claim with `OVERLAP`, in case an announcement was lost.
"""

CANCEL = "cancel deliveries"
"""The verb of a node's request to the owner of a lane."""

FROM_BEGINNING = 30 * SECOND
"""Microseconds after which a claim ignores its cursor once, in case all other triggers fail."""

DUE_SQL = f"""
    SELECT {CLAIM_COLUMNS}, next_attempt_at FROM owed
     WHERE destination = $1 AND attempts {{share}} 0 AND next_attempt_at <= $2 AND next_attempt_at > $3
     ORDER BY next_attempt_at, id
     LIMIT $4
"""  # noqa: S608 - only constants
NEXT_SQL = """
    SELECT next_attempt_at FROM owed
     WHERE destination = $1 AND attempts {share} 0 AND next_attempt_at > $2
     ORDER BY next_attempt_at LIMIT 1
"""
DESTINATIONS_SQL = "SELECT id, destination, slot FROM owed WHERE id = ANY($1::bigint[])"
FOLLOWERS_SQL = f"""
    SELECT {CLAIM_COLUMNS} FROM owed
     WHERE destination = $1 AND group_key = $2 AND attempts {{share}} 0 AND next_attempt_at <= $3
     ORDER BY next_attempt_at, id
     LIMIT $4
"""  # noqa: S608 - only constants


# Whoever deletes an event locks it first, so it either sees the new attempt or is done before this lock.
STORED_SQL = "SELECT id FROM events WHERE id = ANY($1::bigint[]) AND id BETWEEN $2 AND $3 FOR KEY SHARE"
ORPHANS_SQL = "DELETE FROM attempts WHERE delivery_id = ANY($1::bigint[])"


class PostgresDeliveries(StoredDeliveries):
    """`relay.store.Deliveries` over PostgreSQL.

    A claim begins where the last one of its destination ended. From the beginning, it would walk over the
    index entries of all deliveries that have ended, which stay there while any old snapshot is open.
    """

    def __init__(
        self, database: Database, claims: Claims, clock: Clock, nodes: PostgresNodes | None = None
    ) -> None:
        super().__init__(database, claims)
        self._postgres = database
        self._clock = clock
        self._nodes = nodes  # None: this daemon uses the database alone
        if nodes is not None:
            nodes.handle(CANCEL, self._cancel_here)
            nodes.on_due = self._read_since
        # By destination and whether retries: due time, when the beginning was read.
        self._cursors: dict[tuple[str, bool], tuple[int, int]] = {}
        self._floors: dict[
            tuple[str, bool], int
        ] = {}  # due times from which the next claims read, if before the cursor
        self._looked_back: dict[str, int] = {}  # when a claim of first attempts began before the cursor
        self._shards: dict[str, Shards | None] = {}  # of the latest claims
        self._passed: dict[tuple[str, bool], dict[int, int]] = {}  # due times of claimed ones that claims saw

    async def claim(
        self, destination: str, limit: int, *, retries: bool, together: int = 1, shards: Shards | None = None
    ) -> Claim:
        """See `Deliveries.claim`."""
        if self._shards.get(destination) != shards:
            self._shards[destination] = shards
            self.forget_cursor(destination)

        async def claim_due(connection: Connection) -> Claim:
            claimed: list[Delivery] = []
            floor = self._floors.pop((destination, retries), None)
            try:
                return await self._claim(
                    connection,
                    destination,
                    limit,
                    claimed,
                    shards,
                    retries=retries,
                    together=together,
                    floor=floor,
                )
            except BaseException:  # the caller will not get them
                self.release(each.id for delivery in claimed for each in delivery.members)
                if floor is not None:
                    self._read_from((destination, retries), floor)
                raise

        return await self._database.writer.call(claim_due)

    def release(self, delivery_ids: Iterable[int]) -> None:
        """See `Deliveries.release`; the next claim finds them again.

        It begins before those that a claim has passed. No claim has passed a new delivery that a lane without
        room releases at once.
        """
        ids = tuple(delivery_ids)
        for id_ in ids:
            name = self._claims.destination_of(id_)
            for key in () if name is None else ((name, False), (name, True)):
                due = self._passed.get(key, {}).pop(id_, None)
                if due is not None:
                    self._read_from(key, due)
        super().release(ids)

    def note_retry(self, outcome: Outcome) -> None:
        """Let the next claim find a delivery that an outcome made due: claims may have passed this time.

        The time of a retry counts from the end of the attempt, and the outcome is stored later.
        """
        delivery = outcome.delivery
        if outcome.next_attempt_at is not None:
            key = delivery.destination, delivery.attempts + outcome.counts > 0
            self._read_from(key, outcome.next_attempt_at)

    def forget_cursor(self, destination: str) -> None:
        """Let the next claims of a destination begin with its oldest delivery."""
        self._read_since((destination,), 0, retries=True)

    def _read_since(self, lanes: Iterable[str], since: int, *, retries: bool) -> None:
        """See `OnDue`."""
        for name in lanes:
            self._read_from((name, False), since)
            if retries:
                self._read_from((name, True), since)

    def _read_from(self, key: tuple[str, bool], due: int) -> None:
        """Let the next claim read from a due time on, even if another claim is in progress."""
        self._floors[key] = min(due, self._floors.get(key, due))

    async def settle(self, outcome: Outcome) -> bool:
        """See `Deliveries.settle`."""
        counted = await super().settle(outcome)
        if not counted:
            await self._delete_orphans((outcome,))
        return counted

    async def settle_group(self, outcomes: Sequence[Outcome], *, split: bool) -> frozenset[int]:
        """See `Deliveries.settle_group`."""
        counted = await super().settle_group(outcomes, split=split)
        if refused := [outcome for outcome in outcomes if outcome.delivery.id not in counted]:
            await self._delete_orphans(refused)
        return counted

    async def _delete_orphans(self, refused: Sequence[Outcome]) -> None:
        """Delete the attempts of outcomes that came after their event was deleted.

        Another node had ended the delivery. A check in the statement of the commit would cost every commit.
        """
        events = {outcome.delivery.id: outcome.delivery.event_id for outcome in refused}
        ids = list(set(events.values()))

        async def delete(connection: Connection) -> None:
            async with connection.transaction():
                stored = {id_ for (id_,) in await connection.fetch(STORED_SQL, ids, min(ids), max(ids))}
                if orphans := [id_ for id_, event_id in events.items() if event_id not in stored]:
                    await connection.execute(ORPHANS_SQL, orphans)

        try:
            await self._database.writer.call(delete)
        except Exception as error:  # noqa: BLE001 - the caller must not repeat the outcome
            log.warning("attempts of deleted events stay until retention deletes them: %s", error)

    async def set_destination(self, state: DestinationState, event: GeneratedEvent | None = None) -> None:
        """See `Deliveries.set_destination`; an attempt of a former owner may end late."""
        if self._nodes is not None and state.name not in self._nodes.scope.kept:
            raise StorageError(f"{state.name}: another node delivers to it now", hint="try again")
        await super().set_destination(state, event)

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """See `Deliveries.cancel`; the owner of a lane cancels its deliveries, because it sends them."""
        if self._nodes is None:
            return await super().cancel(delivery_ids)
        scope = self._nodes.scope
        others: dict[str, list[int]] = {}
        for id_, name, slot in await self._postgres.fetch(DESTINATIONS_SQL, list(delivery_ids)):
            if not scope.covers(name, slot):
                others.setdefault(scope.lane_of(name, slot) or name, []).append(id_)
        elsewhere = {id_ for ids in others.values() for id_ in ids}
        done = await super().cancel([id_ for id_ in delivery_ids if id_ not in elsewhere])
        ended, in_flight = done.ended, done.in_flight
        for name, ids in others.items():
            answer = await self._nodes.ask(name, CANCEL, ids)
            ended, in_flight = ended + answer["ended"], in_flight + answer["in_flight"]
        return Cancelled(ended, in_flight)

    async def _cancel_here(self, _destination: str, delivery_ids: list[int]) -> dict[str, int]:
        """Cancel deliveries of a lane of this node, for an operator who uses another node."""
        done = await super().cancel(delivery_ids)
        return {"ended": done.ended, "in_flight": done.in_flight}

    def _begin(self, destination: str, cursor: int, now: int, *, retries: bool) -> int:
        """Return the due time after which a claim reads: the cursor, or earlier for late commits."""
        if retries:  # an outcome may be stored after the due time of its retry
            return max(cursor - OVERLAP, 0)
        if self._nodes is None or now - self._looked_back.get(destination, 0) < OVERLAP_EVERY:
            return cursor
        self._looked_back[destination] = now
        return max(cursor - OVERLAP, 0)

    async def _claim(
        self,
        connection: Connection,
        destination: str,
        limit: int,
        claimed: list[Delivery],
        shards: Shards | None,
        *,
        retries: bool,
        together: int,
        floor: int | None,
    ) -> Claim:
        now, share = self._clock.steady(), ">" if retries else "="
        key = destination, retries
        cursor, began = self._cursors.get(key, (0, now))
        if now - began >= FROM_BEGINNING:
            cursor, began = 0, now
        begin = self._begin(destination, cursor, now, retries=retries)
        if floor is not None:
            begin = max(min(begin, floor - 1), 0)
        most = limit + self._claims.of(destination)
        slots = () if shards is None else (shards.slots,)
        sql = DUE_SQL.format(share=share) if shards is None else due_sql(share, shards)
        rows = await connection.fetch(sql, destination, now, begin, most, *slots)
        for row in rows:
            if len(claimed) == limit:
                break
            if row["id"] in self._claims:
                continue
            delivery = delivery_of(tuple(row)[:-1])
            self._claims.add((delivery,))
            claimed.append(delivery)
            if together > 1 and delivery.group_key is not None:
                latest = now if retries else 2**62
                others = await connection.fetch(
                    FOLLOWERS_SQL.format(share=share), destination, text(delivery.group_key), latest,
                    together + self._claims.of(destination),
                )  # fmt: skip
                delivery.followers = self._claims.choose_followers(
                    delivery, map(delivery_of, others), together
                )
                self._claims.add(delivery.followers)
        seen = self._passed.get(key, {})
        seen |= {row["id"]: row["next_attempt_at"] for row in rows}
        self._passed[key] = {id_: due for id_, due in seen.items() if id_ in self._claims}
        if len(claimed) == limit or len(rows) == most:
            last = claimed[-1].id if claimed else 0
            passed = next((row["next_attempt_at"] - 1 for row in rows if row["id"] == last), begin)
            self._cursors[key] = (passed, began)  # others may have the same due time
            return Claim(tuple(claimed), now)
        self._cursors[key] = (now - 1, began)  # others may become due at this moment
        sql = NEXT_SQL.format(share=share) if shards is None else next_sql(share, shards)
        due = await connection.value(sql, destination, now, *slots)
        if not retries and (latest := self._looked_back.get(destination, now)) < now:
            due = latest + OVERLAP_EVERY if due is None else min(due, latest + OVERLAP_EVERY)
        return Claim(tuple(claimed), due)
