"""Everything that one transaction will write, gathered in memory first."""

import hashlib
from collections import Counter
from collections.abc import Callable

import msgspec

from relay.base.clock import SECOND, Clock
from relay.base.ids import DELIVERY, EVENT, new_id
from relay.base.json_text import encode
from relay.config.schema import WorkerRules
from relay.errors import KeyConflict
from relay.model import (
    Born,
    Command,
    Delivery,
    DeliveryState,
    DestinationState,
    Outcome,
    Owed,
    Receipt,
    StoredEvent,
    Worker,
)
from relay.store import DEDUPE_FOR, Acceptance, Route
from relay.store.dedupe import Key, Keys
from relay.store.fleet import Fleet
from relay.store.roster import Roster
from relay.store.transaction import Transaction
from relay.workers.rules import Now

HOUR = 3600 * SECOND
STATS_COLUMNS = "hour, source, type, events, duplicates, bytes"
STATS_ADDING = ", ".join(
    f"{column} = {column} + excluded.{column}" for column in ("events", "duplicates", "bytes")
)

Ending = tuple[DeliveryState, str]
"""An end and its reason."""


class Sequences:
    """The next row ids, counted in memory: known before the insert, without asking the database."""

    def __init__(self, event: int, delivery: int) -> None:
        self.event = event
        self.delivery = delivery


class Repeat(msgspec.Struct):
    """An event to be owed once more."""

    event: StoredEvent
    owed: Owed
    done: bool = False  # known once it is written


class Restored(msgspec.Struct):
    """An event of an export, to be taken in."""

    event: StoredEvent
    owe: bool  # by today's routes
    done: bool = False  # known once it is written; False: it was there


class Look(msgspec.Struct, frozen=True):
    """What a look at the destinations found."""

    names: frozenset[str]  # that take nothing at the moment
    kept: int  # microseconds until what is due there expires


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
            then = f"ON CONFLICT (hour, source, type) DO UPDATE SET {STATS_ADDING}"
            transaction.insert("stats", STATS_COLUMNS, rows, then=then)


class Batch:
    """One transaction in the making."""

    def __init__(
        self,
        *,
        clock: Clock,
        sequences: Sequences,
        route: Route,
        roster: Roster,
        rules: Callable[[str, str], WorkerRules],
        keys: Keys,
        pending: Counter[str],
    ) -> None:
        self.steady = clock.steady()
        self.wall = clock.wall()
        self._sequences = sequences
        self._route = route
        self._pending = pending  # by destination, before this batch
        self._added: Counter[str] = Counter()
        self.keys = keys
        self.events: list[StoredEvent] = []
        self.tallies = Tallies()
        self.repetitions: Counter[str] = Counter()  # requests by the public id of the event they repeat
        self.deliveries: list[Delivery] = []
        self.fleet = Fleet(roster, Now(wall=self.wall, steady=self.steady), rules)
        self.outcomes: list[Outcome] = []
        self.states: list[DestinationState] = []
        self.pauses: list[tuple[str, bool]] = []  # source, whether it is paused
        self.stillborn: dict[int, Ending] = {}  # new deliveries that ended at birth
        self.expiring = False  # whether to end what is past its `expires_at`
        self.look: Look | None = None  # whether to end what is held for too long
        self.cancelling: list[int] = []  # deliveries that an operator cancels
        self.hurrying: list[int] = []  # deliveries that an operator makes due
        self.repeating: list[Repeat] = []  # in the order of their events
        self.restoring: list[Restored] = []
        # Known once it is written:
        self.restored: list[StoredEvent] = []
        self.settled: frozenset[int] = frozenset()  # outcomes that found their delivery pending
        self.due: list[Delivery] = []  # new deliveries to go out now
        self.ended: dict[int, tuple[str, Ending]] = {}  # ended without an attempt, with destination
        self.woken: set[str] = set()  # destinations of deliveries that were waiting and are due now
        self.hurried: dict[int, str] = {}  # deliveries that were made due, with destination
        self.unwanted: set[int] = set()  # cancelled ones that are being sent: their outcome comes first

    def accept(self, acceptance: Acceptance, key: Key | None) -> Receipt:
        """Take in one request; `key` is its idempotency key.

        Raises:
            Conflict: the worker change contradicts the registry; nothing was taken in.
            KeyConflict: another request has had the key, and the acceptance rejects that; likewise.
        """
        event = acceptance.event
        first, conflicts = acceptance.repeats, False
        if first is None and key is not None:
            first = self.keys.first(key)
            conflicts = first is None and self.keys.is_used(key)
            if conflicts and acceptance.rejects_conflict:
                raise KeyConflict
        if event is not None and first is not None:
            self.tallies.add(event, duplicate=True)
            self.repetitions[first] += 1
            return Receipt(event_id=first, duplicate=True)
        worker: Worker | None = None
        sent: tuple[Command, ...] = ()
        if acceptance.change is not None:
            worker, sent = self.fleet.change(acceptance.source, acceptance.change)
            self.bear_all()
        elif acceptance.asks is not None:
            worker = self.fleet.asked((acceptance.source, acceptance.asks))
        if event is None:
            commands = tuple({"id": command.public_id, **command.body} for command in sent)
            return Receipt(worker=worker, commands=commands, sent=sent)
        if key is not None:
            self.keys.add(key, event.public_id, self.steady + DEDUPE_FOR)
        self._add(event, acceptance.request_id)
        return Receipt(event_id=event.public_id, key_conflict=conflicts, worker=worker)

    def owe(
        self,
        owed: Owed,
        event_id: int,
        size: int,
        event: StoredEvent | None,
        *,
        replay_of: int | None = None,
        rendered: dict[str, bytes] | None = None,
        request_id: str | None = None,
    ) -> None:
        """Add a delivery; it is dead at once where its destination has `max_pending` deliveries already."""
        self._sequences.delivery += 1
        delivery = Delivery(
            id=self._sequences.delivery,
            public_id=new_id(DELIVERY, self.wall),
            event_id=event_id,
            destination=owed.destination,
            attempts=0,
            created_at=self.wall,
            size=size,
            event=event,
            rendered=rendered,
            request_id=request_id,
            order_key=owed.order_key,
            latest_key=owed.latest_key,
            expires_at=None if owed.ttl is None else self.steady + owed.ttl,
            on_dead=owed.on_dead,
            replay_of=replay_of,
        )
        self.deliveries.append(delivery)
        if owed.max_pending is not None:
            waiting = self._pending[owed.destination] + self._added[owed.destination]
            if waiting >= owed.max_pending:
                self.stillborn[delivery.id] = ("dead", "backlog_full")
                return
        self._added[owed.destination] += 1

    def _add(self, event: StoredEvent, request_id: str | None = None) -> None:
        event = self._numbered(event)
        self.events.append(event)
        self.tallies.add(event)
        self._owe_all(event, request_id)

    def _numbered(self, event: StoredEvent) -> StoredEvent:
        """Return the event with the next row id."""
        self._sequences.event += 1
        return msgspec.structs.replace(event, id=self._sequences.event)

    def _owe_all(self, event: StoredEvent, request_id: str | None = None) -> None:
        """Add a delivery for each destination that subscribes to the event."""
        subscribed = self._route(event)
        rendered: dict[str, bytes] | None = {} if len(subscribed) > 1 else None
        for owed in subscribed:
            self.owe(owed, event.id, len(event.body), event, rendered=rendered, request_id=request_id)

    def put_back(self, restored: Restored) -> None:
        """Take in an event that was accepted once: it is news to nobody, and counted already."""
        event = self._numbered(restored.event)
        self.restored.append(event)
        if restored.owe:
            self._owe_all(event)

    def bear_all(self) -> None:
        """Take in what happened to workers.

        `fleet` does not call back: with a reference to its batch, both would stay in memory, with all bodies,
        until the collector of cycles runs.
        """
        born, self.fleet.born = self.fleet.born, []
        for source, each in born:
            self.bear(source, each)

    def bear(self, source: str, born: Born) -> None:
        """Take in an event that the relay itself gives birth to, routed like any other."""
        body = encode(born.data)
        self._add(
            StoredEvent(
                id=0,
                public_id=new_id(EVENT, self.wall),
                source=source,
                type=f"{source}.{born.type}",
                subject=born.subject,
                received_at=self.wall,
                data=body,
                context=b"{}",
                body=body,
                content_type="application/json",
                sha256=hashlib.sha256(body).digest(),
            )
        )
