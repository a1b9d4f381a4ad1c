"""The changes of one transaction, collected in memory before they are written."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from relay.base.clock import Clock
from relay.base.ids import DELIVERY, EVENT, new_id
from relay.base.json_text import encode
from relay.base.shards import SLOTS, lane_of, slot_of
from relay.config.schema import WorkerRules
from relay.errors import AlreadyRetried, KeyConflict
from relay.model import (
    Command,
    Delivery,
    DeliveryState,
    DestinationState,
    GeneratedEvent,
    Grouping,
    Outcome,
    Receipt,
    StoredEvent,
    Target,
    Worker,
)
from relay.store import DEDUPE_FOR, HOUR, Acceptance, Resolve, Route
from relay.store.dedupe import Key, Keys
from relay.store.roster import Roster
from relay.store.worker_changes import StoredWorkerChanges
from relay.workers.rules import Now

LEDGER = ("created", "delivered", "dead", "expired", "cancelled")
"""Columns of the ledger."""

Ending = tuple[DeliveryState, str]
"""The state in which a delivery ends, and the reason."""


class Sequences:
    """Counters of row ids in memory, so that an id is known before its row is inserted."""

    def __init__(self, event: int, delivery: int, step: int = 1) -> None:
        self.event = event
        self.delivery = delivery
        self.step = step  # between two ids


class Repeat(msgspec.Struct):
    """A new delivery of a stored event, as an operator requests it."""

    event: StoredEvent
    target: Target
    done: bool = False  # set by the write


class Restored(msgspec.Struct):
    """An event of an export."""

    event: StoredEvent
    deliver: bool  # create deliveries by the current routes
    done: bool = False  # set by the write; False: the event was stored already


class Scope(msgspec.Struct, frozen=True):
    """The lanes whose pending deliveries this node may end: only owners know the attempts in flight."""

    mine: frozenset[str]  # owned lanes; for a destination with shards, the owned shards
    known: frozenset[str]  # destinations in the config of a node
    has_orphans: bool  # whether this node also ends the deliveries of destinations that no node knows
    kept: frozenset[str] = frozenset()  # destinations whose state this node keeps
    shards: Mapping[str, int] = {}  # numbers in force of destinations that are divided; 0: it is changing
    epochs: Mapping[str, int] = {}  # of the leases of the owned lanes

    def owns(self, destination: str, slot: int | None) -> bool:
        """Return whether a delivery belongs to a lane of this node."""
        return self.lane_of(destination, slot) in self.mine

    def covers(self, destination: str, slot: int | None = None) -> bool:
        """Return whether this node may end a delivery."""
        return self.owns(destination, slot) or self._is_orphan(destination)

    def covers_lane(self, lane: str) -> bool:
        """Return whether this node may end the deliveries of a lane, which may no longer exist."""
        name, _, number = lane.partition("/")
        count = self.shards.get(name, 1)
        is_lane = int(number) < count if number else count == 1
        if is_lane:
            return lane in self.mine or self._is_orphan(name)
        return self.lane_of(name, 0) in self.mine

    def _is_orphan(self, destination: str) -> bool:
        return self.has_orphans and destination not in self.known

    def lane_of(self, destination: str, slot: int | None) -> str:
        """Return the lane of a delivery; empty while the number of shards changes."""
        count = self.shards.get(destination, 1)
        return lane_of(destination, slot, count) if count else ""

    @property
    def whole(self) -> frozenset[str]:
        """The destinations of which all lanes are owned."""
        return self.mine | {
            name
            for name, count in self.shards.items()
            if count and all(f"{name}/{number}" in self.mine for number in range(count))
        }

    @property
    def slots(self) -> tuple[list[str], list[int]]:
        """Destinations and slots of the owned shards, as two columns; deliveries without a slot have 0."""
        rows = [
            (name, slot)
            for name, count in self.shards.items()
            for slot in range(SLOTS if count else 0)
            if f"{name}/{slot % count}" in self.mine
        ]
        return [name for name, _ in rows], [slot for _, slot in rows]


class HeldDestinations(msgspec.Struct, frozen=True):
    """The destinations that accept nothing now, and how long their deliveries are kept."""

    names: frozenset[str]
    kept: int  # microseconds


class Batch:
    """Collects the changes of one transaction."""

    def __init__(
        self,
        *,
        clock: Clock,
        sequences: Sequences,
        route: Route,
        resolve: Resolve,
        roster: Roster,
        rules: Callable[[str, str], WorkerRules],
        keys: Keys | None,
        pending: Counter[str],
    ) -> None:
        self.steady = clock.steady()
        self.wall = clock.wall()
        self._sequences = sequences
        self._route = route
        self.resolve = resolve
        self._pending = pending  # pending deliveries by destination, before this batch
        self._added: Counter[str] = Counter()
        self.keys = keys  # None: no request of the batch has a key
        self.events: list[StoredEvent] = []
        self.stats: dict[tuple[int, str, str], tuple[int, int, int]] = {}  # see `count`
        self.repetitions: Counter[str] = Counter()  # requests by the public id of the event they repeat
        self.deliveries: list[Delivery] = []
        self.limits: dict[str, int] = {}  # `max_pending` of the destinations of new deliveries
        self.unlimited: set[int] = set()  # new deliveries that `limits` does not apply to
        self._roster = roster
        self._rules = rules
        self.worker_changes: StoredWorkerChanges | None = None
        self.groupings: dict[int, Grouping] = {}  # of new deliveries that wait for others
        self.outcomes: list[Outcome] = []
        self.with_groups = False  # whether an outcome belongs to a message for several deliveries
        self.ungrouped: list[int] = []  # deliveries that are sent alone from now on
        self.states: list[DestinationState] = []
        self.reports: list[tuple[DestinationState, GeneratedEvent]] = []  # events about these states
        self.pauses: list[tuple[str, bool]] = []  # source, whether it is paused
        self.retried: dict[str, str] = {}  # ids of refused requests, and of the events that they became
        self.ended_early: dict[int, Ending] = {}  # new deliveries that end when they are created
        self.expire_overdue = False  # whether to expire deliveries past their `expires_at`
        self.held: HeldDestinations | None = None  # if set, expire deliveries that were held for too long
        self.to_cancel: list[int] = []  # row ids of deliveries, on an operator's request
        self.to_make_due: list[int] = []  # row ids of retries, on an operator's request
        self.to_repeat: list[Repeat] = []  # in the order of their events
        self.to_restore: list[Restored] = []
        # Set by the write:
        self.ledger: dict[str, dict[str, int]] = {}  # changes of the ledger, by destination and column
        self.restored: list[StoredEvent] = []
        self.attempt_ids: list[int] = []  # row ids of the attempts, if the engine chooses them
        self.settled: frozenset[int] = frozenset()  # outcomes that found their delivery pending
        self.due: list[Delivery] = []  # new deliveries that are due now
        self.later: dict[str, int] = {}  # see `News.later`
        self.ended: dict[int, tuple[str, Ending]] = {}  # ends without an attempt, with the destination
        self.woken: set[str] = set()  # destinations of deliveries that were waiting and are due now
        self.made_due: dict[int, str] = {}  # destinations of the deliveries that an operator made due
        self.scope: Scope | None = None  # None: this node ends all deliveries
        self.incarnation: str | None = None  # of this node; None: no other node uses the database
        self.checked: set[str] = set()  # destinations with a ceiling, see postgres/backlog.py
        self.cancelled_in_flight: set[int] = set()  # cancelled during an attempt, whose outcome decides
        self.superseded_in_flight: set[int] = set()  # in flight when a newer event of `latest_by` arrived

    @property
    def workers(self) -> StoredWorkerChanges:
        """The changes to workers."""
        if self.worker_changes is None:
            now = Now(wall=self.wall, steady=self.steady)
            self.worker_changes = StoredWorkerChanges(self._roster, now, self._rules)
        return self.worker_changes

    def accept(self, acceptance: Acceptance, key: Key | None) -> Receipt:
        """Add a request; `key` is its idempotency key.

        Raises:
            Conflict: the worker change contradicts the registry; nothing was added.
            KeyConflict: another request has used the key, and the acceptance rejects that; nothing was added.
        """
        event = acceptance.event
        first, conflicts = acceptance.repeats, False
        if first is None and key is not None and self.keys is not None:
            first = self.keys.first(key)
            conflicts = first is None and self.keys.is_used(key)
            if conflicts and acceptance.rejects_conflict:
                raise KeyConflict
        if event is not None and first is not None:
            self.count(event, is_duplicate=True)
            self.repetitions[first] += 1
            return Receipt(event_id=first, duplicate=True)
        worker: Worker | None = None
        sent: tuple[Command, ...] = ()
        if acceptance.change is not None:
            worker, sent = self.workers.change(acceptance.source, acceptance.change)
            self.add_all_generated()
        elif acceptance.returns_worker is not None:
            worker = self.workers.to_report((acceptance.source, acceptance.returns_worker))
        if event is None:
            commands = tuple({"id": command.public_id, **command.body} for command in sent)
            return Receipt(worker=worker, commands=commands, sent=sent)
        if key is not None and self.keys is not None:
            self.keys.add(key, event.public_id, self.steady + DEDUPE_FOR)
        self._add(event, request_id=acceptance.request_id)
        return Receipt(event_id=event.public_id, key_conflict=conflicts, worker=worker)

    def accept_all(self, acceptances: Sequence[Acceptance], keys: Sequence[Key | None]) -> Receipt:
        """Add the events of one request; `keys` has the idempotency key of each.

        Raises:
            KeyConflict: as `accept`, also if two events of the request have one key; nothing was added.
        """
        mine: dict[tuple[str, str], bytes] = {}  # identity of each key's request, in this request
        for acceptance, key in zip(acceptances, keys, strict=True):
            if key is None or self.keys is None or not acceptance.rejects_conflict:
                continue
            known = mine.setdefault((key.source, key.text), key.identity) == key.identity
            if not known or (self.keys.first(key) is None and self.keys.is_used(key)):
                raise KeyConflict
        receipts = tuple(map(self.accept, acceptances, keys))
        return Receipt(
            event_id=receipts[0].event_id,
            duplicate=all(receipt.duplicate for receipt in receipts),
            each=receipts,
        )

    def accept_retry(self, key: Key, accept: Callable[["Batch"], Receipt]) -> Receipt:
        """Add a refused request that an operator retries; `key` has its id.

        Raises:
            AlreadyRetried: it became an event before; nothing was added.
            Refusal: as `accept`.
        """
        assert self.keys is not None  # noqa: S101 - the job has a key
        if (first := self.keys.first(key)) is not None:
            raise AlreadyRetried(first)
        receipt = accept(self)
        if receipt.event_id:
            self.keys.add(key, receipt.event_id, self.steady + DEDUPE_FOR)
            self.retried[key.text] = receipt.event_id
        return receipt

    def add_delivery(
        self,
        target: Target,
        event_id: int,
        size: int,
        event: StoredEvent | None,
        *,
        replay_of: int | None = None,
        rendered: dict[str, bytes] | None = None,
        request_id: str | None = None,
    ) -> None:
        """Add a delivery; it is dead at once if its destination already has `max_pending` deliveries."""
        self._sequences.delivery += self._sequences.step
        delivery = Delivery(
            id=self._sequences.delivery,
            public_id=new_id(DELIVERY, self.wall),
            event_id=event_id,
            destination=target.destination,
            attempts=0,
            created_at=self.wall,
            size=size,
            event=event,
            rendered=rendered,
            request_id=request_id,
            order_key=target.order_key,
            latest_key=target.latest_key,
            expires_at=None if target.ttl is None else self.steady + target.ttl,
            on_dead=target.on_dead,
            replay_of=replay_of,
        )
        self.deliveries.append(delivery)
        if target.grouping is not None:
            delivery.group_key = target.grouping.key
            self.groupings[delivery.id] = target.grouping
        if target.is_spread:
            keys = (delivery.order_key, delivery.group_key, delivery.latest_key)
            delivery.slot = slot_of(next((k for k in keys if k is not None), None), delivery.public_id)
        if target.max_pending is None:
            self.unlimited.add(delivery.id)
        else:
            self.limits[target.destination] = target.max_pending
            waiting = self._pending[target.destination] + self._added[target.destination]
            if waiting >= target.max_pending:
                self.ended_early[delivery.id] = ("dead", "backlog_full")
                return
        self._added[target.destination] += 1

    def new_counts(self) -> Counter[str]:
        """Return the number of new deliveries by destination."""
        if not self.ended_early:
            return self._added
        return Counter(delivery.destination for delivery in self.deliveries)

    def count(self, event: StoredEvent, *, is_duplicate: bool = False) -> None:
        """Count an accepted event, or a request that repeated one, for its hour, source and type."""
        key = (event.received_at - event.received_at % HOUR, event.source, event.type)
        events, duplicates, size = self.stats.get(key, (0, 0, 0))
        if is_duplicate:
            self.stats[key] = (events, duplicates + 1, size)
        else:
            self.stats[key] = (events + 1, duplicates, size + len(event.body))

    def _add(
        self,
        event: StoredEvent,
        *,
        request_id: str | None = None,
        is_restored: bool = False,
        is_routed: bool = True,
    ) -> None:
        """Add an event under the next row id, and a delivery for each destination that subscribes to it.

        A restored event is neither counted nor passed to listeners: that happened when it was accepted.
        """
        self._sequences.event += self._sequences.step
        event = msgspec.structs.replace(event, id=self._sequences.event)
        if is_restored:
            self.restored.append(event)
        else:
            self.events.append(event)
            self.count(event)
        if is_routed:
            subscribed = self._route(event)
            rendered: dict[str, bytes] | None = {} if len(subscribed) > 1 else None
            for target in subscribed:
                self.add_delivery(
                    target, event.id, len(event.body), event, rendered=rendered, request_id=request_id
                )

    def put_back(self, restored: Restored) -> None:
        """Add an event of an export."""
        self._add(restored.event, is_restored=True, is_routed=restored.deliver)

    def add_all_generated(self) -> None:
        """Add the events about workers that the worker changes made.

        The worker changes have no reference to their batch: in a reference cycle, both would stay in memory
        with all bodies until the garbage collector runs.
        """
        generated, self.workers.generated = self.workers.generated, []
        for source, each in generated:
            self.add_generated(source, each)

    def add_generated(self, source: str, generated: GeneratedEvent) -> None:
        """Add an event that the relay itself raises; it is routed like any other."""
        body = encode(generated.data)
        self._add(
            StoredEvent(
                id=0,
                public_id=new_id(EVENT, self.wall),
                source=source,
                type=f"{source}.{generated.type}",
                subject=generated.subject,
                received_at=self.wall,
                data=body,
                context=b"{}",
                body=body,
                content_type="application/json",
                sha256=hashlib.sha256(body).digest(),
            )
        )


def count_transitions(batch: Batch) -> dict[str, dict[str, int]]:
    """Count, per destination, the deliveries that a written batch created and ended."""
    changes = [(delivery.destination, "created") for delivery in batch.deliveries]
    changes += [
        (each.destination, batch.ended_early[each.id][0])
        for each in batch.deliveries
        if each.id in batch.ended_early
    ]
    changes += [
        (outcome.delivery.destination, outcome.state)
        for outcome in batch.outcomes
        if outcome.state != "pending" and outcome.delivery.id in batch.settled
    ]
    changes += [(destination, state) for destination, (state, _) in batch.ended.values()]
    found: dict[str, dict[str, int]] = {}
    for destination, column in changes:
        if destination not in found:
            found[destination] = dict.fromkeys(LEDGER, 0)
        found[destination][column] += 1
    return found
