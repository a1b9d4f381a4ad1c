"""The interface of the store: everything that the relay remembers.

A `Store` has parts: `events`, `deliveries`, `workers`, `queries`, `ledger`, `upkeep` and `nodes`. Callers
share transactions, so SQLite (one writer, group commit) and a networked database (round trips) are fast for
the same reason. A method that returns has made its change durable; a method that raises has changed nothing.
Times are microseconds: `wall` for display, `steady` for deadlines (see `relay.base.clock`).
"""

import threading
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from relay.base.clock import SECOND
from relay.base.shards import Shards
from relay.config.schema import WorkerRules
from relay.errors import StorageError
from relay.model import (
    AuditEntry,
    Backlog,
    Backup,
    Caution,
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
    Login,
    Measured,
    Named,
    News,
    Node,
    Observed,
    Outcome,
    Outlook,
    Pruned,
    Receipt,
    RefusedRequest,
    Selection,
    Stat,
    StoredEvent,
    Target,
    Worker,
    WorkerChange,
    WorkerStatus,
)
from relay.store.retention_policy import Policy
from relay.workers.rules import Plan

T = TypeVar("T")
Route = Callable[[StoredEvent], tuple[Target, ...]]
"""Returns the deliveries that an event needs. Pure; called inside the event's transaction."""

Resolve = Callable[[str, StoredEvent], Target | None]
"""Returns the options of one destination for an event; None: it is not in the config. Pure, as `Route`."""

Rules = Callable[[str, str], WorkerRules]
"""Returns the rules of a worker by its source and id. Pure; called inside the worker's transaction."""

Listener = Callable[[News], None]
"""Called once after each commit, before any caller gets its result. Must not raise or block.

New deliveries are already claimed for their lanes, with their events; a lane without room releases them.
"""

DEDUPE_FOR = 7 * 86_400 * 1_000_000
"""Microseconds for which an idempotency key is remembered."""

HOUR = 3600 * SECOND
"""Microseconds of the period that one count of events covers."""

EVENT_BYTES = 2048
"""Bytes that each of several events of one request takes until it is durable, besides its data and context.

That is the memory of its records, measured with one delivery. Its rows on the disk are smaller.
"""

FOREVER = 2**62
"""A time (steady clock) after every deadline."""


class Acceptance(msgspec.Struct, kw_only=True, gc=False):
    """One accepted request: everything that one transaction must make durable."""

    source: str
    event: StoredEvent | None = None
    key: str | None = None  # idempotency key; the same request with it is a duplicate for `DEDUPE_FOR`
    path: str = ""  # path of the request without its query; part of the request's identity
    is_key_alone: bool = False  # the key alone makes a duplicate, even if the rest of the request differs
    rejects_conflict: bool = False  # refuse a different request with the same key instead of storing it
    repeats: str | None = None  # public id of the event that this request repeats: it is only counted
    change: WorkerChange | None = None
    returns_worker: str | None = None  # id of a worker whose row the receipt contains
    request_id: str | None = None  # for the log lines of the event's deliveries; not stored
    retry_of: str | None = None  # id of the refused request that an operator retries


class Cancelled(msgspec.Struct, frozen=True):
    """Result of a cancellation."""

    ended: int = 0
    in_flight: int = 0  # attempt under way: delivered if it succeeds, cancelled if it fails


class Page(msgspec.Struct, frozen=True):
    """Rows of a list, newest first. Fewer than requested, even zero, if the search reached its budget."""

    rows: list[dict[str, Any]]
    cursor: str | None  # position of the next page; None: this is the last page


class Span(msgspec.Struct, frozen=True):
    """Row ids of the oldest and the newest event that a selection can contain at one moment."""

    first: int
    last: int


class Stop(threading.Event):
    """Set when the caller no longer waits for work on the stored data; the work then stops."""


class Events(Protocol):
    """Accepted events: append, load, import and delete them."""

    async def append(self, acceptance: Acceptance) -> Receipt:
        """Make a request durable in one transaction: its event, the event's deliveries and the worker change.

        Raises:
            Overloaded: the write queue is full; nothing was queued.
            DiskFull: less than the disk's floor would stay free; nothing was queued.
            Conflict: the worker change contradicts the registry.
            KeyConflict: a different request has used the key, and the acceptance rejects such requests.
            AlreadyRetried: `retry_of` became an event before, on this node or on another one.
            StorageUnavailableError: the disk is full, busy or failing; nothing was kept.
            StorageError: this request could not be stored; other requests of its transaction were stored.
        """
        ...

    async def append_all(self, acceptances: Sequence[Acceptance]) -> Receipt:
        """Make the events of one request durable in one transaction; raises as `append`.

        Each event has its own idempotency key; duplicates are not stored again. The
        receipt names the first event and has the receipts of all in `each`. The first acceptance may have a
        `retry_of`, which is then that of the whole request.
        """
        ...

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """Read events with their bodies by row id; deleted events are missing from the result."""
        ...

    async def pause_source(self, name: str, *, paused: bool) -> None:
        """Store whether a source is paused."""
        ...

    def import_lines(self, lines: AsyncIterable[bytes], *, deliver: bool = False) -> AsyncIterator[Imported]:
        """Store the events of an export that are not stored yet; yields the progress.

        With `deliver`, new events are delivered by the current routes. Deliveries in the export are ignored.

        Raises:
            RelayError: a line is not an exported event; the events before it are stored.
        """
        ...

    async def restore(self, events: Sequence[StoredEvent], *, deliver: bool = False) -> tuple[bool, ...]:
        """Store exported events in one transaction; returns for each whether it was new."""
        ...

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """Delete events of any age; their pending deliveries are cancelled first.

        An event with a delivery in flight is not deleted; call again after the attempt.
        """
        ...

    def expunge_selected(self, selection: Selection, span: Span) -> AsyncIterator[Expunged]:
        """Delete a selection's events in the same way, page by page, while the caller iterates."""
        ...


class Deliveries(Protocol):
    """Pending deliveries: claim, settle, expire, cancel and repeat them.

    Claims are in memory: one process owns the deliveries of a destination (see `Nodes`). A crash releases
    every claim.
    """

    async def claim(
        self, destination: str, limit: int, *, retries: bool, together: int = 1, shards: Shards | None = None
    ) -> Claim:
        """Claim up to `limit` unclaimed due deliveries, oldest due time first, without bodies.

        First attempts and retries are claimed separately, so that neither can starve the other. Each delivery
        of a group has others of its group as followers, so that up to `together` are sent at once.
        With `shards`, the claim is limited to these shards; None: the destination is not divided.
        """
        ...

    def begin_attempt(self, delivery_id: int) -> bool:
        """Mark a claimed delivery as in flight; False: a transaction is ending it, do not send it."""
        ...

    def release(self, delivery_ids: Iterable[int]) -> None:
        """Release the claims of deliveries without an outcome."""
        ...

    async def settle(self, outcome: Outcome) -> bool:
        """Record an attempt, change its delivery's state and release the claim.

        Returns whether the delivery was still pending, so that the outcome counted.
        """
        ...

    async def settle_group(self, outcomes: Sequence[Outcome], *, split: bool) -> frozenset[int]:
        """Record one attempt at several deliveries in one transaction, and release their claims.

        With `split`, each of them is sent alone from now on. Returns the row ids of those that were still
        pending.
        """
        ...

    async def expire(self) -> int:
        """Expire a batch of overdue worker commands and of deliveries past their time to live, even claimed.

        Only deliveries of lanes that this node owns expire. Returns the number of expired deliveries; 0 at
        the end.
        """
        ...

    async def expire_held(self, names: Collection[str], kept: int) -> int:
        """Expire a batch of deliveries whose destination has accepted nothing for `kept` microseconds.

        `names` are the destinations that accept nothing now; the store remembers since when. A day before
        the first delivery expires, the operator event `relay.deliveries.expiring` is raised once. Returns
        the number of expired deliveries; 0 at the end.
        """
        ...

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """Cancel pending deliveries for an operator; for a delivery in flight, the outcome decides."""
        ...

    async def make_due(self, delivery_ids: Sequence[int]) -> int:
        """Make retries due now. Returns the number of retries that had a later due time."""
        ...

    async def repeat(self, requests: Sequence[tuple[StoredEvent, Target]]) -> tuple[bool, ...]:
        """Create new deliveries of loaded events in one transaction, in the given order.

        Returns for each request whether a delivery was created. No delivery is created if the event was
        deleted or if one of its deliveries to the destination is pending.
        """
        ...

    async def set_destination(self, state: DestinationState, event: GeneratedEvent | None = None) -> None:
        """Store a destination's state and, in the same transaction, an operator event about it.

        The event is about the beginning or the end of `disabled_at` or `circuit_opened`. It is left out if
        the stored state shows that change already, so that each change has one event.
        """
        ...


class WorkerChanges(Protocol):
    """Changes by operators and jobs to workers inside one transaction; keys are (source, worker id)."""

    def forget(self, keys: Iterable[tuple[str, str]]) -> int:
        """Remove workers; returns how many existed."""
        ...

    def forget_old(self) -> int:
        """Remove workers that have been offline for longer than their rules keep them."""
        ...

    def maintain(self, key: tuple[str, str], *, on: bool, plan: Plan | None = None) -> Worker | None:
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
        """Return the current row of every worker."""
        ...

    def count(self, source: str, status: str) -> int:
        """Count a source's workers with a status."""
        ...

    def queued(self, source: str, worker_id: str) -> int:
        """Count the commands that wait for a worker's next heartbeat."""
        ...

    async def change(self, request: Callable[[WorkerChanges], T]) -> T:
        """Change workers in one transaction, for an operator or a job."""
        ...

    def note_refused(self, source: str, change: WorkerChange) -> WorkerStatus | None:
        """Note that a known worker is alive, or unregisters, although its request was refused.

        Returns the worker's unchanged status; None: the worker is unknown or unregistered. The note is kept
        in memory only, so this works while writes fail, and a crash may lose it. The next stored sweep
        applies a noted unregister request, unless the worker sends another request more than 10 s later.
        """
        ...

    async def sweep(self, *, extend: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """Mark all workers offline whose deadline had passed at a time (steady; None: now); returns them.

        Workers whose unregister request was refused are unregistered and returned as well. Each change is in
        one transaction with its event. With `extend`, every deadline is extended first, so that time in which
        the relay itself was stopped counts against no worker; a node of a cluster extends them only if no
        other node ran meanwhile. Requests that arrived before the call count, even if the disk takes
        long to store them.
        """
        ...

    async def follow_plans(self) -> tuple[Worker, ...]:
        """Begin and end planned maintenance; returns the rows that changed. Call it before each sweep."""
        ...

    async def flush(self) -> None:
        """Write the heartbeats that are only in memory so far; call it every two seconds."""
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

        Filters are the fields of a `Selection`, and ids; `event_id` and `delivery_id` may be row ids.
        For deliveries, `replayed` selects those that a later delivery sends again, or the others. A
        search has a budget: a page may have fewer rows than `limit` and still have a cursor.

        Raises:
            RelayError: the list or the filter does not exist, or the cursor is invalid.
        """
        ...

    async def span(self, selection: Selection) -> Span:
        """Return the row ids between which a selection's events lie now; later events are left out."""
        ...

    def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """Read a selection in the order of row ids, without bodies, in pages that may be empty."""
        ...

    def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """Read the row ids of a selection's pending deliveries in pages; an id may occur twice."""
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

    async def digits_of(self, kind: Literal["events", "deliveries"], ids: Iterable[str]) -> int:
        """Return how many hex digits, from the first on, tell each of these public ids from all stored ones.

        On PostgreSQL, an id that was imported long after its time may be overlooked.
        """
        ...

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """Read counts of accepted events, latest hour first, in pages that may be empty.

        Counts are kept for longer than events. The hour in which the selection begins counts in full.
        `after` is the hour, source and type of the last row that was already read.

        Raises:
            RelayError: the selection filters by more than source, type and time.
        """
        ...

    def export(self, selection: Selection, span: Span, *, deliveries: bool = False) -> AsyncIterator[bytes]:
        """Write a selection's events as lines of JSON, with their deliveries on request."""
        ...

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """Read events by row id, without a check of their bodies; deleted events are missing."""
        ...

    async def destination_states(self) -> dict[str, DestinationState]:
        """Return the stored state of each destination: paused, disabled and why."""
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

    async def backlog_of(self, name: str, now: int, start: int | None = None) -> Backlog | None:
        """Return the backlog of one destination, None if nothing is pending; `now` is steady.

        With `start`, the row of the oldest delivery of an earlier backlog, it takes about the same time for a
        long backlog as for a short one.
        """
        ...

    async def outlook_of(self, name: str, row: int) -> Outlook:
        """Return the limits of a destination's pending deliveries.

        It reads at most `relay.store.ledger.MOST_EXPIRING` and `MOST_KEYS` rows. `row` is the row id of the
        oldest pending delivery: its expiry counts if the rows that were read contain no delivery of the
        destination.
        """
        ...


class Refused(Protocol):
    """Refused requests, so that an operator can inspect and retry them."""

    async def add(self, requests: Sequence[RefusedRequest]) -> None:
        """Store requests in one transaction."""
        ...

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        source: str | None = None,
        reason: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[tuple[RefusedRequest, ...], str | None]:
        """List requests without their bodies, newest first; also returns the cursor of the next page.

        Raises:
            RelayError: the cursor is invalid.
        """
        ...

    async def named(self, given: str) -> RefusedRequest:
        """Return a request with its body, by its id or a unique prefix of it.

        Raises:
            UnknownError: no request has that id.
            RelayError: the id is malformed or ambiguous.
        """
        ...

    async def note_retry(self, id_: str, at: int) -> None:
        """Store when a request was retried (wall clock), unless it became an event meanwhile.

        `Events.append` notes a retry that creates an event.
        """
        ...

    async def prune(self, before: int, most_bytes: int) -> int:
        """Delete requests from before `before` (wall), and the oldest beyond `most_bytes` in total.

        Returns their number.
        """
        ...


class Logins(Protocol):
    """Logins to the dashboard, and the codes that begin them. Nodes share them."""

    async def add(self, login: Login, *, before: int, most: int) -> None:
        """Store a login or a code.

        Deletes those that were last used before `before` (wall clock), and the oldest beyond `most` in all.
        """
        ...

    async def find(self, digest: bytes) -> Login | None:
        """Return a login or a code."""
        ...

    async def take(self, digest: bytes) -> Login | None:
        """Delete and return a login or a code; of several callers, one gets it."""
        ...

    async def note_use(self, digest: bytes, at: int) -> None:
        """Store when a login was used (wall clock)."""
        ...

    async def clear(self) -> int:
        """Delete all logins and codes; returns their number."""
        ...


class Audit(Protocol):
    """The audit trail: the latest changes over the admin API."""

    async def add(self, entry: AuditEntry, most: int) -> None:
        """Store an entry, and delete the oldest ones beyond `most`."""
        ...

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        operator: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[tuple[AuditEntry, ...], str | None]:
        """List entries, newest first; also returns the cursor of the next page.

        Raises:
            RelayError: the cursor is invalid.
        """
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
    lacking: int = 0  # bytes that the latest refused request needs above the floor; 0: requests fit


class Upkeep(Protocol):
    """Retention, backups, checks and sizes."""

    async def check_disk(self) -> DiskSpace | None:
        """Read the free space; writes the reserve file again if there is room for it.

        Returns None if the data is not on a disk of this machine; a full disk then refuses commits.
        """
        ...

    async def prune(self, policy: Policy, seconds: float = 45.0) -> Pruned:
        """Delete finished data that is older than a policy keeps it, in small transactions.

        Begins no new step after `seconds`; the next call continues there.
        """
        ...

    async def prune_worker_metrics(self, before: int) -> int:
        """Delete a batch of worker metrics older than `before` (wall); returns the number, 0 at the end."""
        ...

    async def prune_worker_commands(self, before: int) -> int:
        """Delete a batch of ended commands from before `before` (wall); returns the number, 0 at the end."""
        ...

    async def missing_space(self, folder: Path, *, keep_free: int = 0) -> int:
        """Return how many bytes a folder lacks for a backup; 0: there is enough room.

        `keep_free` bytes do not count as room if the folder is on the store's own disk.
        """
        ...

    async def backup(self, target: Path, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """Copy everything to a file of mode 0600 while the relay works, and check the copy.

        On the store's own disk, `keep_free` bytes stay free.

        Raises:
            StorageError: the target exists, there is too little room, or the copy is damaged.
        """
        ...

    async def compact(self) -> Compacted:
        """Return all free space to the disk, in small transactions."""
        ...

    async def measure(self, *, counts: bool = True) -> Measured:
        """Return the number of stored events and deliveries, and the space that they take.

        Counting the events of a large database takes long; `counts=False` leaves it out.

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
        config: Path | None = None,
    ) -> list[Check]:
        """Run every check.

        `destinations` and `sources` are the configured names; None: unknown. `config` is config.toml, beside
        which a second database may exist; None: do not look for it.
        """
        ...

    async def observe(self) -> Observed | None:
        """Return figures and cautions about the database server; None: SQLite, which has no server."""
        ...


class Standing(msgspec.Struct, frozen=True):
    """The state of a lane as its owner reports it to the other nodes."""

    shards: int = 1  # number of shards of a destination; 0: the number is changing
    in_flight: int = 0  # attempts of a shard
    circuit: str | None = None  # why the circuit breaker is open; None: it is closed
    is_quiet: bool = False  # deliveries of the relay's own events opened it: report no further event
    probe_at: int | None = None  # when the open circuit allows the next probe (steady clock)
    probe_wait: int = 0  # the wait before that probe, which doubles after each failed probe (microseconds)
    rest_until: int = 0  # end of the pause that the receiver requested (steady clock)


class Ownership(msgspec.Struct, frozen=True):
    """The lanes of this node. Other nodes own the other lanes, or will take them.

    A destination that is divided has a lane per shard, such as `crm/0`. The lane `crm` then sends nothing:
    its owner keeps the state of the destination.
    """

    until: Mapping[str, int]  # owned lanes; no attempt may begin at this time or later (steady clock)
    elsewhere: Mapping[str, str] = {}  # other lanes: name of the node that owns it; "" if no node owns it
    hand_over: frozenset[str] = frozenset()  # owned, but due to another node: end the attempts, then `give`
    shards: Mapping[str, int] = {}  # numbers in force of destinations that are divided; 0: it is changing
    standing: Mapping[str, Standing] = {}  # of the lanes, as their latest owners have reported it


class SharedReplies(Protocol):
    """Replies of all nodes that did not reach their senders, for a minute; by the digest of the request."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __contains__(self, digest: bytes) -> bool:
        """Return whether a node has shared such a reply; another one may have taken it meanwhile."""
        ...

    def share(self, digest: bytes, ids: Sequence[str]) -> None:
        """Share a reply, in the background; `ids` are the public ids of the request's events."""
        ...

    async def take(self, digest: bytes) -> tuple[str, ...]:
        """Remove a reply, and return the ids of its events; empty: no node has it any more.

        Raises:
            StorageError: the database does not answer.
        """
        ...


class Answers(msgspec.Struct, frozen=True):
    """The answers of the other live nodes to one request."""

    given: tuple[tuple[str, Any], ...] = ()  # name of a node, and its answer
    silent: tuple[str, ...] = ()  # names of the nodes that did not answer in time, or failed
    unable: tuple[str, ...] = ()  # names of the nodes whose version does not know the request or its form

    def read(self, kind: type[T]) -> tuple[list[tuple[str, T]], tuple[str, ...]]:
        """Return the answers as objects of a type, and the names of nodes of another version.

        An answer of another type counts as an answer of another version.
        """
        found, unable = [], list(self.unable)
        for name, answer in self.given:
            try:
                found.append((name, msgspec.convert(answer, kind)))
            except msgspec.ValidationError:
                unable.append(name)
        return found, tuple(unable)


class Nodes(Protocol):
    """The nodes: daemons that share the data. Each lane, and each job of the cluster, runs on one node."""

    @property
    def incarnation(self) -> str:
        """The random id of this node, new at each start; empty if this node is alone."""
        ...

    @property
    def alone(self) -> bool:
        """Whether no other node can share the data, so that this node owns everything without asking."""
        ...

    @property
    def replies(self) -> SharedReplies | None:
        """The replies that did not reach their senders; None: this node is alone, and keeps them itself."""
        ...

    async def own(
        self,
        lanes: Mapping[str, float],
        jobs: Collection[str],
        shards: Mapping[str, int] = {},
        standing: Mapping[str, Mapping[str, Any]] = {},
    ) -> Ownership:
        """Renew the leases of this node and take free ones that are due to it; call it once a second.

        `lanes` are the destinations in the config, with the timeout of an attempt in seconds; `jobs` are the
        jobs of the cluster. `shards` has the numbers of shards in the config, `standing` the fields of
        `Standing` to report, by lane. A node owns a lane until its time, even if it cannot reach the
        database.

        Raises:
            StorageError: the database does not answer; earlier results stay valid until their times.
        """
        ...

    def attend(self, attendant: "Attendant") -> None:
        """Set the object that gets the announcements of other nodes; call it before the first `own`."""
        ...

    async def ask(self, lane: str, verb: str, argument: Any) -> Any:
        """Let the node that owns a lane execute an operator's request, and return its answer.

        Raises:
            StorageUnavailableError: no node has answered in time.
            RelayError: the owner refused.
        """
        ...

    async def ask_leader(self, job: str, verb: str, argument: Any) -> Any:
        """Let the node that leads a job of the cluster execute a request, and return its answer.

        Raises:
            StorageUnavailableError: no node has answered in time.
            RelayError: the leader refused.
        """
        ...

    async def ask_node(self, incarnation: str, verb: str, argument: Any, patience: float) -> Any:
        """Let one node execute a request, and return its answer; wait at most `patience` seconds.

        Raises:
            StorageUnavailableError: the node has not answered in time.
            RelayError: the node refused.
        """
        ...

    async def ask_others(self, verb: str, argument: Any, patience: float) -> Answers:
        """Let every other live node execute a request, and return their answers.

        Waits at most `patience` seconds. If the database does not answer, every node counts as silent.
        """
        ...

    def handle(self, verb: str, handle: Callable[[str, Any], Awaitable[Any]]) -> None:
        """Set the function that executes a kind of request of other nodes.

        It gets the lane, `job:NAME` or `node:INCARNATION` that the request is for, and the argument; both the
        argument and its result are JSON values. The attendant executes the other kinds.
        """
        ...

    async def give(self, lanes: Collection[str], standing: Mapping[str, Mapping[str, Any]] = {}) -> None:
        """Let other nodes take lanes; call it after the outcomes of their attempts are stored.

        `standing` has the fields of `Standing` to report, by lane.
        """
        ...

    def report_soon(self) -> None:
        """Let `own` be called at once, because the standing of a lane has changed."""
        ...

    def lead(self, job: str) -> bool:
        """Return whether a job of the cluster runs on this node."""
        ...

    async def all(self) -> tuple[Node, ...]:
        """Return the nodes that have renewed their leases recently, in order of name."""
        ...

    def figures(self) -> Mapping[str, float]:
        """Return the state of the cluster as this node knows it; see `Metrics.watch_cluster`."""
        ...

    def cautions(self) -> tuple[Caution, ...]:
        """Return the cautions about the cluster; see `relay.model.Caution`."""
        ...

    async def leave(self) -> None:
        """Stop taking lanes, and let other nodes plan without this one, before the last attempts end."""
        ...


class Attendant(Protocol):
    """Gets the announcements and requests of other nodes. A node that is alone never calls it."""

    def wake(self, lanes: Collection[str] | None, *, retries: bool = False) -> None:
        """Look for due deliveries of those lanes that this node owns; None: of all its lanes."""
        ...

    def renew_soon(self) -> None:
        """Call `Nodes.own` at once: a lane may be free."""
        ...

    async def answer(self, lane: str, verb: str, argument: Any) -> Any:
        """Execute a request that an operator sent to another node; return the answer as JSON values.

        Raises:
            RelayError: it cannot be done.
        """
        ...


class StoredData(Protocol):
    """Read-only access to stored data, whether or not a daemon has it open."""

    @property
    def queries(self) -> Queries:
        """Lists, selections, exports."""
        ...

    @property
    def ledger(self) -> LedgerReads:
        """Counts of deliveries."""
        ...


class OfflineStore(Protocol):
    """Stored data without a daemon: read, check and copy it. Never changes the data."""

    def read(self) -> AbstractAsyncContextManager[StoredData]:
        """Open the data for reading, whether or not its daemon runs; leaves no file behind.

        Raises:
            StorageError: the data does not exist, cannot be read, or has tables of another version.
        """
        ...

    def measure(self, stop: Stop) -> Measured:
        """See `Upkeep.measure`; ends early once `stop` is set."""
        ...

    def examine(
        self,
        stop: Stop,
        *,
        now: int,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        config: Path | None = None,
    ) -> list[Check]:
        """See `Upkeep.examine`; `now` is wall clock."""
        ...

    def back_up(self, target: Path, stop: Stop, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """See `Upkeep.backup`; ends early once `stop` is set."""
        ...


class Store(Protocol):
    """All stored data. One daemon at a time owns it."""

    location: str  # where the data is, for messages
    opened: bool

    @property
    def stopped_at(self) -> int:
        """When a relay last used the data, wall clock; 0: never, or not known before `open`.

        A file shows it only before `open`, a server only after it.
        """
        ...

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
    def refused(self) -> Refused:
        """Refused requests."""
        ...

    @property
    def logins(self) -> Logins:
        """Logins to the dashboard."""
        ...

    @property
    def audit(self) -> Audit:
        """The audit trail."""
        ...

    @property
    def upkeep(self) -> Upkeep:
        """Retention, backups, checks."""
        ...

    @property
    def nodes(self) -> Nodes:
        """The nodes that share the data."""
        ...

    @property
    def failure(self) -> str | None:
        """Why writes fail now; None while they work."""
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
        """The files that hold the data, by the label of `relay_storage_size_bytes`; empty: PostgreSQL."""
        ...

    def explain(self, error: Exception) -> StorageError | None:
        """Return the error to show an operator for an exception of the engine; None for other exceptions."""
        ...

    async def open(self) -> None:
        """Open the data: migrate it, check it after an unclean stop, load the worker registry.

        Raises:
            StorageUnavailableError: the disk is full or another program holds the file; try again later.
            StorageError: the file is damaged, of a newer version or cannot be opened; do not try again.
        """
        ...

    async def close(self) -> None:
        """Finish queued work, record that the stop was clean, and close all files."""
        ...
