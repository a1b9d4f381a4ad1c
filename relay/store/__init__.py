"""The store: everything the relay remembers. This module is the interface that the rest of the code uses.

A `Store` has parts: `events`, `deliveries`, `workers`, `queries`, `ledger` and `upkeep`. Callers share
transactions, so SQLite (one writer, group commit) and a networked database (round trips) are fast for the
same reason. When a method returns, its change is durable; when it raises, nothing of it was kept.
Times are microseconds: `wall` for display, `steady` for deadlines (see `relay.base.clock`).
"""

import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from relay.config.schema import WorkerRules
from relay.errors import StorageError
from relay.model import (
    Backlog,
    Backup,
    Check,
    Chosen,
    Claim,
    Command,
    Compacted,
    Counts,
    DestinationState,
    Expunged,
    GeneratedEvent,
    Imported,
    Measured,
    Named,
    News,
    Outcome,
    Pruned,
    Receipt,
    Selection,
    Stat,
    StoredEvent,
    Target,
    Worker,
    WorkerChange,
    WorkerStatus,
)
from relay.store.retention_policy import Policy

T = TypeVar("T")
Route = Callable[[StoredEvent], tuple[Target, ...]]
"""Returns the deliveries that an event needs. Pure; called inside the event's transaction."""

Rules = Callable[[str, str], WorkerRules]
"""Returns the rules of a worker by its source and id. Pure; called inside the worker's transaction."""

Listener = Callable[[News], None]
"""Called once after each commit, before any caller hears of it. Must not raise or block.

New deliveries are already claimed for their lanes and carry their events; a lane without room releases them.
"""

DEDUPE_FOR = 7 * 86_400 * 1_000_000
"""Microseconds for which an idempotency key names its first event."""


class Acceptance(msgspec.Struct, kw_only=True, gc=False):
    """One accepted request: everything to make durable in one transaction."""

    source: str
    event: StoredEvent | None = None
    key: str | None = None  # idempotency key; the same request with it is a duplicate for `DEDUPE_FOR`
    path: str = ""  # path of the request without its query; part of the request's identity
    is_key_alone: bool = False  # the key alone makes a duplicate, whatever else differs
    rejects_conflict: bool = False  # refuse a different request with the same key instead of storing it
    repeats: str | None = None  # public id of the event that the request is known to repeat: only counted
    change: WorkerChange | None = None
    asks: str | None = None  # id of a worker whose row the receipt must carry
    request_id: str | None = None  # for the log lines of the event's deliveries; not stored


class Cancelled(msgspec.Struct, frozen=True):
    """Result of a cancellation."""

    ended: int = 0
    in_flight: int = 0  # attempt under way: delivered if it succeeds, cancelled if it fails


class Page(msgspec.Struct, frozen=True):
    """Rows of a list, newest first. Fewer than requested, even zero, if the search reached its budget."""

    rows: list[dict[str, Any]]
    cursor: str | None  # of the next page; None: this is the last page


class Span(msgspec.Struct, frozen=True):
    """Row ids of the oldest and the newest event that a selection can contain at one moment."""

    first: int
    last: int


class Stop(threading.Event):
    """Set when nobody waits any longer for work on a database file."""


class Events(Protocol):
    """Accepted events: taking them in, reading them back, deleting them."""

    async def append(self, acceptance: Acceptance) -> Receipt:
        """Make a request durable: its event, the event's deliveries and the worker change, or none of them.

        Raises:
            Overloaded: the write queue is full; nothing was queued.
            DiskFull: less than the disk's floor would stay free; nothing was queued.
            Conflict: the worker change contradicts the registry.
            KeyConflict: a different request has used the key, and the acceptance rejects that.
            StorageUnavailableError: the disk is full, busy or failing; nothing was kept.
            StorageError: this request could not be stored; others of its transaction were.
        """
        ...

    async def append_all(self, acceptances: Sequence[Acceptance]) -> Receipt:
        """Make the events of one request durable, all or none of them; raises as `append`.

        Each event's own idempotency key decides whether it is a duplicate, which is not stored again. The
        receipt names the first event and has the receipts of all in `each`.
        """
        ...

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """Read events with their bodies by row id; deleted events are missing from the result."""
        ...

    async def pause_source(self, name: str, *, paused: bool) -> None:
        """Remember whether a source is paused."""
        ...

    def import_lines(self, lines: AsyncIterable[bytes], *, owe: bool = False) -> AsyncIterator[Imported]:
        """Store the events of an export that are not stored yet; yields progress now and then.

        With `owe`, new events are delivered by the current routes. Deliveries in the export are ignored.

        Raises:
            RelayError: a line is not an exported event; the events before it are stored.
        """
        ...

    async def restore(self, events: Sequence[StoredEvent], *, owe: bool = False) -> tuple[bool, ...]:
        """Store exported events in one transaction; returns for each whether it was new."""
        ...

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """Delete events of any age; their pending deliveries are cancelled first.

        An event with a delivery in flight stays until that attempt ends: the caller asks again.
        """
        ...

    def expunge_selected(self, selection: Selection, span: Span) -> AsyncIterator[Expunged]:
        """Delete a selection's events in the same way, page by page; stops when the caller stops."""
        ...


class Deliveries(Protocol):
    """Pending deliveries: claiming them, recording attempts, ending and repeating them.

    Claims are in memory: one process owns the deliveries of a destination. A crash releases every claim.
    """

    async def claim(self, destination: str, limit: int, *, retries: bool) -> Claim:
        """Claim up to `limit` due deliveries that nobody has claimed, oldest due time first, without bodies.

        First attempts and retries are claimed separately, so that neither can starve the other.
        """
        ...

    def begin_attempt(self, delivery_id: int) -> bool:
        """Mark a claimed delivery as in flight; False: a transaction is ending it, do not send it."""
        ...

    def release(self, delivery_ids: Iterable[int]) -> None:
        """Give claimed deliveries back without an outcome."""
        ...

    async def settle(self, outcome: Outcome) -> bool:
        """Record an attempt, change its delivery's state and release the claim.

        Returns whether the delivery was still pending, so that the outcome counted.
        """
        ...

    async def expire(self) -> int:
        """End some deliveries past their time to live, claimed ones too; returns how many, 0: all are ended.

        Worker commands past their expiry end with them.
        """
        ...

    async def expire_held(self, names: Collection[str], kept: int) -> int:
        """End some deliveries that were due for `kept` microseconds at a destination that accepts nothing.

        `names` are the destinations that accept nothing now; the store remembers since when. A day before
        the first delivery expires, the operator event `relay.deliveries.expiring` is raised once. Returns
        how many ended, 0: all are ended.
        """
        ...

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """End pending deliveries for an operator; an attempt in flight ends first."""
        ...

    async def hurry(self, delivery_ids: Sequence[int]) -> int:
        """Make retries due now; returns how many were not due."""
        ...

    async def repeat(self, wishes: Sequence[tuple[StoredEvent, Target]]) -> tuple[bool, ...]:
        """Create new deliveries of loaded events in one transaction, in the given order.

        Returns for each whether it was created: not if the event is gone or a delivery is already pending.
        """
        ...

    async def set_destination(self, state: DestinationState, tell: GeneratedEvent | None = None) -> None:
        """Remember a destination's state and raise an operator event about it in the same transaction."""
        ...


class WorkerChanges(Protocol):
    """Changes by operators and jobs to workers inside one transaction; keys are (source, worker id)."""

    def forget(self, keys: Iterable[tuple[str, str]]) -> int:
        """Remove workers; returns how many existed."""
        ...

    def forget_old(self) -> int:
        """Remove workers that have been offline for longer than their rules keep them."""
        ...

    def maintain(self, key: tuple[str, str], *, on: bool) -> Worker | None:
        """Begin or end maintenance; None: the worker is unknown."""
        ...

    def queue(self, command: Command) -> None:
        """Send a command with the reply to the worker's next heartbeat."""
        ...

    def cancel_command(self, key: tuple[str, str], public_id: str) -> bool:
        """End a queued command; False: it is not queued."""
        ...

    def requeue(self, commands: Iterable[Command]) -> None:
        """Queue commands again whose reply could not be written."""
        ...


class Workers(Protocol):
    """The worker registry. Reads are answered from memory."""

    def all(self) -> tuple[Worker, ...]:
        """Return every worker as it is now."""
        ...

    def count(self, source: str, status: str) -> int:
        """Count a source's workers with a status."""
        ...

    async def change(self, request: Callable[[WorkerChanges], T]) -> T:
        """Change workers in one transaction, for an operator or a job."""
        ...

    def note_refused(self, source: str, change: WorkerChange) -> WorkerStatus | None:
        """Note that a known worker is alive, or wants to leave, although its request was refused.

        Returns the worker's unchanged status; None: the worker is unknown or has left. Works in memory, also
        while nothing can be written, and promises nothing. The next sweep that can be stored unregisters a
        worker that wants to leave, unless the worker is heard again more than 10 s later.
        """
        ...

    async def sweep(self, *, hold: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """Mark workers offline that were silent at a moment (steady; None: now); returns the marked workers.

        Workers that left with a refused request are unregistered and returned as well. Each change is one
        transaction with its event. With `hold`, every deadline is put off first, so that nobody is judged by
        time for which the relay itself was stopped. Requests that came before the call count, however long
        the disk takes to store them.
        """
        ...

    async def flush(self) -> None:
        """Write the heartbeats that only changed memory; call it every two seconds."""
        ...


class Queries(Protocol):
    """Reads: lists, selections, exports. A query never delays the writer."""

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """Return the rows of `page` that come before a row id."""
        ...

    async def page(self, kind: str, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> Page:
        """List `events`, `deliveries`, `attempts`, `worker_metrics` or `worker_commands`, newest first.

        Filters are the fields of a `Selection`, and ids; `event_id` and `delivery_id` may be row ids. A
        search has a budget: a page may have fewer rows than `limit` and a cursor nevertheless.

        Raises:
            RelayError: the list or the filter does not exist, or the cursor is invalid.
        """
        ...

    async def span(self, selection: Selection) -> Span:
        """Return the row ids between which a selection's events lie now; later events are left out."""
        ...

    def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """Read a selection in order of row id, without bodies, in pages that may be empty."""
        ...

    def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """Read the row ids of a selection's pending deliveries in pages; an id may come twice."""
        ...

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """Find events by public id, with or without `evt_`, shortened while unique; in order of row id.

        Raises:
            UnknownError: no event has that id.
            RelayError: an id is malformed or ambiguous, or there are more than 1,000.
        """
        ...

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """Find deliveries by public id in the same way."""
        ...

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """Read counts of accepted events, latest hour first, in pages that may be empty.

        Counts outlive their events. The hour in which the selection begins counts in full. `after` is the
        hour, source and type behind which to continue.

        Raises:
            RelayError: the selection filters by more than source, type and time.
        """
        ...

    def export(self, selection: Selection, span: Span, *, deliveries: bool = False) -> AsyncIterator[bytes]:
        """Write a selection's events as lines of JSON, with their deliveries on request."""
        ...

    async def destination_states(self) -> dict[str, DestinationState]:
        """Return the remembered state of each destination: paused, disabled and why."""
        ...

    async def paused_sources(self) -> frozenset[str]:
        """Return the names of the sources that an operator has paused."""
        ...


class LedgerReads(Protocol):
    """Counts of deliveries per destination: created = delivered + dead + expired + cancelled + pending."""

    async def totals(self) -> dict[str, Counts]:
        """Return the ledger; `pending` is derived from the other columns."""
        ...

    async def audit(self) -> dict[str, Counts]:
        """Return the ledger with pending deliveries counted in the table, both from one snapshot."""
        ...

    async def backlog(self, now: int) -> dict[str, Backlog]:
        """Return the backlog of each destination that has pending deliveries; `now` is steady."""
        ...


class Ledger(LedgerReads, Protocol):
    """The ledger of the open store."""

    def pending(self) -> dict[str, int]:
        """Return the number of pending deliveries of each destination that has any, from memory."""
        ...


class DiskSpace(msgspec.Struct, frozen=True):
    """Free space of the disk that holds the data."""

    folder: Path
    free: int  # bytes
    floor: int  # bytes that senders leave free
    is_full: bool  # whether senders must be refused


class Upkeep(Protocol):
    """Retention, backups, checks and sizes."""

    async def check_disk(self) -> DiskSpace:
        """Read the free space; restores the reserve once there is room for it."""
        ...

    async def prune(self, policy: Policy, seconds: float = 45.0) -> Pruned:
        """Delete finished data that is older than a policy keeps it, in small transactions.

        Starts nothing new after `seconds`; the next call continues there.
        """
        ...

    async def prune_worker_metrics(self, before: int) -> int:
        """Delete some worker metrics older than `before` (wall); returns how many, 0 when none is left."""
        ...

    async def prune_worker_commands(self, before: int) -> int:
        """Delete some ended worker commands created before (wall); returns how many, 0 when none is left."""
        ...

    async def missing_space(self, folder: Path, *, keep_free: int = 0) -> int:
        """Return how many bytes a folder lacks for a backup; 0: there is enough room.

        `keep_free` bytes do not count as room if the folder is on the store's own disk.
        """
        ...

    async def backup(self, target: Path, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """Copy everything to a file of mode 0600 while work goes on, and check the copy.

        On the store's own disk, `keep_free` bytes stay free.

        Raises:
            StorageError: the target exists, there is too little room, or the copy is damaged.
        """
        ...

    async def compact(self) -> Compacted:
        """Return all free space to the disk, in small transactions."""
        ...

    async def measure(self) -> Measured:
        """Return what the store holds and how much space it takes.

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
        """Run every check; `destinations` and `sources` are the configured names, None: unknown."""
        ...


class StoredData(Protocol):
    """What can be read of a store, open or not: the offline commands need no more."""

    @property
    def queries(self) -> Queries:
        """Lists, selections, exports."""
        ...

    @property
    def ledger(self) -> LedgerReads:
        """Counts of deliveries."""
        ...


class Store(Protocol):
    """Everything remembered. One daemon at a time owns it."""

    location: str  # where the data is, for people
    opened: bool

    @property
    def events(self) -> Events:
        """Accepted events."""
        ...

    @property
    def deliveries(self) -> Deliveries:
        """Pending deliveries."""
        ...

    @property
    def workers(self) -> Workers:
        """The worker registry."""
        ...

    @property
    def queries(self) -> Queries:
        """Lists, selections, exports."""
        ...

    @property
    def ledger(self) -> Ledger:
        """Counts of deliveries."""
        ...

    @property
    def upkeep(self) -> Upkeep:
        """Retention, backups, checks."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be written now; None while writes work."""
        ...

    @property
    def busy(self) -> float:
        """Seconds that the write under way has taken so far; 0 while nothing is written."""
        ...

    @property
    def unsaved(self) -> bool:
        """Whether the files were removed or damaged and no copy of the committed data could be made."""
        ...

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that hold the data, by the label of `relay_store_bytes`."""
        ...

    def explain(self, error: Exception) -> StorageError | None:
        """Return what to tell an operator about an error of the engine; None: another kind of error."""
        ...

    async def open(self) -> None:
        """Take possession: migrate, check after an unclean stop, load the registry.

        Raises:
            StorageUnavailableError: the disk is full or another program holds the file; try again later.
            StorageError: the file is damaged, of a newer version or cannot be opened; do not try again.
        """
        ...

    async def close(self) -> None:
        """Finish queued work, mark the stop as clean and let go."""
        ...
