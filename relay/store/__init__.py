"""What the relay remembers: the interface that the rest of the house speaks to.

The verbs are coarse, transactional and batched, so that SQLite (one writer, group commit) and a
networked database (round trips, several relays) are fast for the same reason. An implementation may
assume that event ids and bodies are storable as they are; a caller may assume that a verb which
returned is durable, and that one which raised left nothing behind.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from relay.config.schema import WorkerRules
from relay.model import (
    Backup,
    Born,
    Check,
    Chosen,
    Claim,
    Command,
    Compacted,
    DestinationState,
    Expunged,
    Imported,
    Measured,
    Named,
    News,
    Outcome,
    Owed,
    Pruned,
    Receipt,
    Selection,
    Stat,
    StoredEvent,
    Worker,
    WorkerChange,
    WorkerStatus,
)
from relay.store.counts import Backlog, Counts
from relay.store.queries.page import Page
from relay.store.retention_policy import Policy

T = TypeVar("T")
Route = Callable[[StoredEvent], tuple[Owed, ...]]
"""Which destinations an event is owed to; pure, asked inside the event's own transaction."""

Rules = Callable[[str, str], WorkerRules]
"""Which rules hold for a worker, by its source and id; pure, asked inside its own transaction."""

Listener = Callable[[News], None]
"""Told once per commit what lanes must know, before any caller hears of it. New deliveries arrive held,
with their events; a lane without room gives them back by `release`. Must not raise or block."""


OPERATOR_EVENTS = "relay"
"""Source of the relay's own events; their deliveries never raise others, so nothing loops."""


class Acceptance(msgspec.Struct, kw_only=True, gc=False):
    """One accepted request: what to make durable in one transaction."""

    source: str
    event: StoredEvent | None = None
    key: str | None = None  # the same request with it is a duplicate for `DEDUPE_FOR`, see `dedupe.identity`
    path: str = ""  # of the request, without its query; a part of its identity
    rejects_conflict: bool = False  # refuse another request with the key, instead of storing it
    repeats: str | None = None  # public id of the event that it is known to repeat: only counted
    change: WorkerChange | None = None
    asks: str | None = None  # a worker id whose row the receipt shall carry
    request_id: str | None = None  # for the log lines of the event's deliveries; not stored


class FleetChange(Protocol):
    """What operators and jobs may do to workers inside a transaction; keys are (source, worker id)."""

    def forget(self, keys: Iterable[tuple[str, str]]) -> int:
        """Remove workers; return how many there were."""
        ...

    def forget_old(self) -> int:
        """Remove workers that have been offline for longer than their rules keep them."""
        ...

    def maintain(self, key: tuple[str, str], *, on: bool) -> Worker | None:
        """Begin or end maintenance; None: there is no such worker."""
        ...

    def queue(self, command: Command) -> None:
        """Have a command ride in the worker's next heartbeat's reply."""
        ...

    def cancel_command(self, key: tuple[str, str], public_id: str) -> bool:
        """End a queued command; False: it is not queued."""
        ...

    def requeue(self, commands: Iterable[Command]) -> None:
        """Take back what was sent in a reply that could not be written."""
        ...


class Cancelled(msgspec.Struct, frozen=True):
    """What came of cancelling."""

    ended: int = 0
    in_flight: int = 0  # being sent: delivered if that succeeds, cancelled if it fails


class Span(msgspec.Struct, frozen=True):
    """The row ids of the oldest and the newest event that a selection can mean, at one moment."""

    first: int
    last: int


DEDUPE_FOR = 7 * 86_400 * 1_000_000
"""Microseconds for which a key names its first event."""


class Store(Protocol):
    """Everything remembered. One daemon at a time owns it."""

    route: Route
    rules: Rules
    listener: Listener

    @property
    def failure(self) -> str | None:
        """Why nothing can be written at the moment; None while writes work."""
        ...

    async def open(self) -> None:
        """Take possession: migrate, check after an unclean stop, load the registry.

        Raises:
            StorageUnavailableError: the disk is full, or another program holds the file: try again later.
            StorageError: it is of a newer version, damaged, or cannot be opened, and that lasts.
        """
        ...

    async def close(self) -> None:
        """Finish what is queued, mark the stop as clean and let go."""
        ...

    async def append(self, acceptance: Acceptance) -> Receipt:
        """Make a request durable: event, its deliveries and the worker change, or none of them.

        Raises:
            Overloaded: the write queue is full; nothing was queued.
            DiskFull: with it, less than the disk's floor would be free; nothing was queued.
            Conflict: the worker change contradicts the registry.
            KeyConflict: another request has had the key, and the acceptance rejects that.
            StorageUnavailableError: the disk is full, busy or failing; nothing was kept.
            StorageError: this very request could not be stored; others of its batch were.
        """
        ...

    async def claim(self, destination: str, limit: int, *, retries: bool) -> Claim:
        """Hold up to `limit` due deliveries that nobody holds yet, oldest due first, without bodies.

        Those that have been tried before and those that have not are claimed apart.
        """
        ...

    def begin_attempt(self, delivery_id: int) -> bool:
        """Mark a held delivery as being sent; False: it is just being ended otherwise, do not send it."""
        ...

    def release(self, delivery_ids: Iterable[int]) -> None:
        """Give deliveries back without an outcome."""
        ...

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """Read events with their bodies; one that is gone is missing from the answer."""
        ...

    async def settle(self, outcome: Outcome) -> bool:
        """Record an attempt and move its delivery on, if it is still pending; releases the hold.

        Returns whether the delivery was pending, so that the outcome counted.
        """
        ...

    async def expire(self) -> int:
        """End some deliveries past their time to live, held ones too; return how many, 0: none is left.

        Commands that no heartbeat fetched in time end with them.
        """
        ...

    async def expire_held(self, names: Collection[str], kept: int) -> int:
        """End some deliveries that were due for so many microseconds at a destination that took nothing.

        `names` are the destinations that take nothing now; how long they have been doing so is remembered
        from call to call. A day before the first delivery expires, the operator event
        `relay.deliveries.expiring` is raised, once. Returns how many ended, 0: none is left.
        """
        ...

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """End pending deliveries by an operator's will; for one in flight its outcome comes first."""
        ...

    async def hurry(self, delivery_ids: Sequence[int]) -> int:
        """Make retries due now; return how many were not."""
        ...

    async def repeat(self, wishes: Sequence[tuple[StoredEvent, Owed]]) -> tuple[bool, ...]:
        """Owe loaded events once more, in one transaction and as new deliveries in the order given.

        Returns, for each, whether it was: not where the event is gone, nor where it is pending already.
        """
        ...

    async def span(self, selection: Selection) -> Span:
        """Say where the events of a selection lie, so that later ones are left out of it."""
        ...

    def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """Read a selection in order of event id, in pages that may be empty, without bodies."""
        ...

    def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """Read the row ids of a selection's pending deliveries, in pages; one may come twice."""
        ...

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """Find events by public id, with or without `evt_`, shortened while unique; in order of row id.

        Raises:
            UnknownError: there is none of that id.
            RelayError: an id is malformed or short for several, or there are more than 1,000.
        """
        ...

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """Find deliveries likewise."""
        ...

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """Read what came in, in pages that may be empty, the latest hour first; outlives the events.

        The hour in which the selection begins counts in full. `after` is the hour, source and type of the
        one to go on behind.

        Raises:
            RelayError: the selection is by more than source, type and time.
        """
        ...

    def heed(self, source: str, change: WorkerChange) -> WorkerStatus | None:
        """Note that a known worker lives, or wants to leave, though its request was refused.

        Returns the worker's status, which this leaves as it is; None: the worker is unknown or has left.

        At once and in memory: it also works while nothing can be written, and nothing is promised. A worker
        that wants to leave is unregistered by the next sweep that can be stored, unless it is heard again
        more than 10 s later.
        """
        ...

    async def sweep(self, *, hold: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """Mark workers offline that are silent at a moment (steady clock; None: now); return those marked.

        Those that have left, though their request was refused, are unregistered and returned as well.
        Each in one transaction with its event. With `hold`, every deadline is put off first: nobody is
        judged on time the relay itself slept. What was heard before the call counts, however long the
        disk takes for it.
        """
        ...

    async def flush(self) -> None:
        """Write the heartbeats that so far only moved memory; meant for every two seconds."""
        ...

    async def destination_states(self) -> dict[str, DestinationState]:
        """Return what is remembered of each destination: paused, disabled and why."""
        ...

    async def set_destination(self, state: DestinationState, tell: Born | None = None) -> None:
        """Remember a destination's state, and raise an operator event about it in the same transaction."""
        ...

    async def paused_sources(self) -> frozenset[str]:
        """Return the sources that an operator has paused."""
        ...

    async def pause_source(self, name: str, *, paused: bool) -> None:
        """Remember whether a source is paused."""
        ...

    async def backlog(self, now: int) -> dict[str, Backlog]:
        """Return what each destination is owed, those without anything left out; `now` is steady."""
        ...

    async def counts(self) -> dict[str, Counts]:
        """Return ledger and counted pending deliveries per destination, from one snapshot."""
        ...

    async def books(self) -> dict[str, Counts]:
        """Return the ledger per destination; what is pending is not counted, but what it comes to."""
        ...

    def owed(self) -> dict[str, int]:
        """Count the pending deliveries of each destination, from memory."""
        ...

    async def fleet(self, wish: Callable[[FleetChange], T]) -> T:
        """Change workers as an operator or a job wishes, in one transaction."""
        ...

    async def prune(self, policy: Policy, seconds: float = 45.0) -> Pruned:
        """Delete what has been dealt with for as long as a policy says, in small transactions.

        Begins nothing new after so many seconds; the next call goes on from there.
        """
        ...

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """Delete events whatever their age; deliveries still owed are cancelled first.

        An event of which a delivery is in flight stays until that has its outcome: the caller asks again.
        """
        ...

    def expunge_selected(self, selection: Selection, span: Span) -> AsyncIterator[Expunged]:
        """Delete a selection's events likewise; tells page by page, and stops where the caller does."""
        ...

    def export(self, selection: Selection, span: Span, *, deliveries: bool = False) -> AsyncIterator[bytes]:
        """Write a selection's events as lines of JSON (`relay.store.export`), with deliveries if asked."""
        ...

    def read_in(self, lines: AsyncIterable[bytes], *, owe: bool = False) -> AsyncIterator[Imported]:
        """Take in the events of an export, but for those that are there; tells now and then how far it is.

        With `owe`, what is new is delivered by today's routes; without, it is only kept. Deliveries of an
        export are not taken in: they were another store's.

        Raises:
            RelayError: a line is no exported event; what came before it is in.
        """
        ...

    async def restore(self, events: Sequence[StoredEvent], *, owe: bool = False) -> tuple[bool, ...]:
        """Take in events in one transaction; say for each whether it was not there before."""
        ...

    async def backup_lacks(self, folder: Path, *, keep_free: int = 0) -> int:
        """Return how many bytes of room a folder lacks for a backup; 0: there is enough.

        `keep_free` bytes do not count as room if the folder is on the store's own disk.
        """
        ...

    async def backup(self, target: Path, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """Copy everything to a file of mode 0600 while work goes on, and check the copy.

        On the store's own disk, `keep_free` bytes stay free.

        Raises:
            StorageError: the target is there already, there is too little room, or the copy is not sound.
        """
        ...

    async def compact(self) -> Compacted:
        """Give all free room back to the disk, in small transactions."""
        ...

    async def measure(self) -> Measured:
        """Say what there is and what room it takes.

        Raises:
            StorageError: it cannot be read.
        """
        ...

    async def examine(
        self,
        *,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        sources: Collection[str] | None = None,
    ) -> list[Check]:
        """Look for everything that could be wrong; `destinations` and `sources` are those of the config."""
        ...

    async def prune_worker_metrics(self, before: int) -> int:
        """Delete some gauges older than `before` (wall clock); return how many, 0: none is left."""
        ...

    async def prune_worker_commands(self, before: int) -> int:
        """Delete some commands given before (wall clock), but not queued ones; return how many, 0: none."""
        ...

    def census(self, source: str, status: str) -> int:
        """Count a source's workers in a status."""
        ...

    def workers(self) -> tuple[Worker, ...]:
        """Return the registry as it is now."""
        ...

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """Return the rows of `page` that come before a row id."""
        ...

    async def page(self, kind: str, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> Page:
        """List `events`, `deliveries`, `attempts`, `worker_metrics` or `worker_commands`, newest first.

        Filters are those of a `Selection`, and ids; `event_id` and `delivery_id` may be row ids. Looking for
        what is rare has its bound: a page may have fewer rows than asked for, and a cursor all the same.

        Raises:
            RelayError: no such list, it has no such filter, or the cursor is none.
        """
        ...
