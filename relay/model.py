"""The records that all parts share. Times are integers, microseconds UTC (`relay.base.clock`)."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

EMPTY = msgspec.Raw(b"{}")
"""Stands for a map that is absent, `null`, or PHP's empty `[]`."""

OPERATOR_SOURCE = "relay"
"""Source of the relay's own events. Their deliveries never raise others, so nothing loops."""

DeliveryState = Literal["pending", "delivered", "dead", "expired", "cancelled"]
AttemptResult = Literal[
    "ok", "3xx", "4xx", "429", "5xx", "timeout", "connect", "tls", "dns", "blocked", "protocol", "format",
]  # fmt: skip
RESULTS: tuple[str, ...] = get_args(AttemptResult)
WorkerStatus = Literal["ONLINE", "OFFLINE", "MAINTENANCE"]


class StoredEvent(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One accepted event; immutable. The writer stores a copy that has the row id."""

    id: int  # row id: the order of acceptance; 0 before the event is stored
    public_id: str  # evt_ + UUIDv7: the id for senders, receivers and operators
    source: str  # name of the source in config.toml
    type: str  # full type: "<source name>.<type on the wire>"
    subject: str | None  # from the request: shop id, session id, worker id
    received_at: int  # wall clock at the end of the body
    data: bytes  # JSON value: the sender's bytes, never re-encoded
    context: bytes  # JSON object: further facts from the request
    body: bytes  # the whole request body, unchanged
    content_type: str  # of that body
    sha256: bytes  # digest of the body, verified before each delivery
    traceparent: str | None = None  # W3C trace context of the request


ENDED_IN_FLIGHT: Mapping[int, tuple[DeliveryState, str]] = {
    0: ("cancelled", "operator"),
    1: ("expired", "superseded"),
}
"""How deliveries end that were cancelled or superseded during an attempt, by their `Delivery.expires_at`.

If the outcome of the attempt is lost in a crash, the next owner of the lane does not send the delivery again.
"""


def ending_at(expires_at: int) -> tuple[DeliveryState, str]:
    """Return the state and the reason of a delivery that ends because it has reached its `expires_at`."""
    return ENDED_IN_FLIGHT.get(expires_at, ("expired", "ttl"))


class Delivery(msgspec.Struct, kw_only=True, gc=False):
    """One event for one destination, as a lane claims it."""

    id: int  # row id
    public_id: str  # dlv_ + UUIDv7
    event_id: int  # row id of the event
    destination: str  # name of the destination in config.toml
    attempts: int  # finished attempts so far
    created_at: int  # wall clock
    size: int  # bytes of the event's body, for the memory budget
    event: StoredEvent | None = None  # None: loaded when a slot is free
    rendered: dict[str, bytes] | None = None  # request bodies by format; deliveries of one event share them
    request_id: str | None = None  # of the sender's request, for the log; not stored
    order_key: str | None = None  # see `Target`
    latest_key: str | None = None
    expires_at: int | None = None  # steady clock; see also `ENDED_IN_FLIGHT`
    on_dead: str | None = None
    replay_of: int | None = None  # row id of the replayed delivery
    group_key: str | None = None  # see `Grouping`; None: it is sent alone
    slot: int | None = None  # see `relay.base.shards`; None: its destination is not divided into shards
    followers: "tuple[Delivery, ...]" = ()  # claimed deliveries of its group, sent together with it

    @property
    def members(self) -> "tuple[Delivery, ...]":
        """The delivery and its followers."""
        return (self, *self.followers)


class Attempt(msgspec.Struct, kw_only=True, frozen=True):
    """One finished HTTP attempt of one delivery."""

    started_at: int  # wall clock
    duration_ms: float  # from taking the slot to the last byte read
    result: str  # an `AttemptResult`
    status: int | None = None  # HTTP status; None: no response
    error: str | None = None  # one line for the operator
    answer: bytes = b""  # first 16 KiB of the response body
    truncated: bool = False  # whether the response body was longer
    group_id: str | None = None  # id of the message for several deliveries; None: for this one alone
    group_size: int | None = None  # number of these deliveries


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """The effect of an attempt on its delivery: the new state, and the time of the next one while pending."""

    delivery: Delivery
    attempt: Attempt | None  # None: the delivery ended without an attempt (expired in its lane)
    state: DeliveryState
    next_attempt_at: int | None = None  # steady clock; only while pending
    reason: str | None = None  # reason of the end; None: delivered
    counts: bool = True  # False: the attempt is recorded but does not use up the retry schedule


class Grouping(msgspec.Struct, frozen=True):
    """How a delivery waits for others of its destination, so that one message reports all of them."""

    key: str  # deliveries of one (destination, key) are sent together
    wait: int  # microseconds from the first delivery of a group until it is sent
    most: int  # deliveries of a group; a full group is sent at once


class Target(msgspec.Struct, frozen=True):
    """One destination of an event, with the options of its subscription."""

    destination: str
    order_key: str | None = None  # deliveries with the same destination and key are sent one after another
    latest_key: str | None = None  # a newer event with this key supersedes older ones
    ttl: int | None = None  # microseconds from creation to expiry
    max_pending: int | None = None  # with more pending deliveries, a new one is dead at once
    on_dead: str | None = None  # destination that gets the event of a dead delivery
    grouping: Grouping | None = None  # None: deliveries are sent one by one
    is_spread: bool = False  # over the shards of the destination


class Selection(msgspec.Struct, kw_only=True, frozen=True):
    """A filter for events or deliveries; a field that is None matches everything."""

    source: str | None = None
    type: str | None = None  # full type, or a pattern as in a destination's `events`
    subject: str | None = None
    since: int | None = None  # wall clock: received at that time or later
    until: int | None = None  # wall clock: received before
    destination: str | None = None  # events with a delivery to this destination
    state: DeliveryState | None = None  # state of the event's latest delivery to a destination
    where: Any = None  # conditions as in a destination's `where`; validated

    @property
    def of_deliveries(self) -> bool:
        """Whether the filter selects deliveries, not events."""
        return self.destination is not None or self.state is not None


class Chosen(msgspec.Struct, frozen=True):
    """One selected event, without its body."""

    event_id: int  # row id
    size: int  # bytes of the body
    received_at: int
    destinations: tuple[str, ...] = ()  # of the selected deliveries


class Stat(msgspec.Struct, frozen=True):
    """Counts of one event type in one hour."""

    hour: int  # start of the hour, wall clock
    source: str
    type: str
    events: int
    duplicates: int  # requests that repeated a stored event
    bytes: int  # of bodies


class Named(msgspec.Struct, frozen=True):
    """One delivery that an operator selected by its id."""

    id: int  # row id
    state: DeliveryState
    chosen: Chosen


Cause = Literal["secret", "encoding", "bytes", "clock", "scope", "headers", "route", "body", "plugin"]
"""Area of a problem. `secret`: a different secret; `encoding`: another form of the right secret; `bytes`: a
changed body; `scope`: a token without the permission."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One reason for the refusal of a request. Its texts never contain a secret."""

    cause: Cause
    where: str  # a header, the body, or a key of config.toml
    what: str
    do: str  # the advice


class RefusedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A refused request in the form that is stored: tokens are masked."""

    id: str  # ref_ + UUIDv7
    at: int  # wall clock
    source: str | None = None  # None: no source owns the path
    reason: str
    status: int
    problem: str  # one sentence
    field: str = ""  # of the body
    method: str
    target: str  # path and query
    headers: tuple[tuple[str, str], ...]
    remote: str
    size: int = 0  # bytes of the body that arrived
    body: bytes | None = None  # None: the sender was not authenticated, or the body is too large to keep
    findings: tuple[Finding, ...] = ()  # the diagnosis
    retried_at: int | None = None
    event_id: str | None = None  # public id of the event that a retry stored


class Login(msgspec.Struct, frozen=True):
    """A browser's login to the dashboard, or a code that one browser may exchange for a login, once."""

    digest: bytes  # of the cookie or the code; neither is stored
    name: str  # of the operator
    scope: str
    binding: bytes | None  # digest of the cookie or code and the admin token that began it; None: no token
    created_at: int  # wall clock
    seen_at: int  # wall clock: about its latest use


class AuditEntry(msgspec.Struct, frozen=True):
    """One change over the admin API."""

    at: int  # wall clock
    operator: str
    access: str  # how the operator proved the name: "socket", "token", "login" or "proxy"
    remote: str  # address of the client; "" on the socket
    method: str
    path: str
    body: str  # shortened; "" if it may contain a secret
    status: int | None  # of the response; None: the client disconnected before it
    request_id: str
    node: str


class News(msgspec.Struct, frozen=True):
    """The changes of one commit that lanes and plugins need to know."""

    events: Sequence[StoredEvent] = ()
    deliveries: Sequence[Delivery] = ()  # new and due: claimed for their lanes, with their events
    woken: Collection[str] = ()  # destinations with other deliveries that are due now
    dropped: Collection[int] = ()  # deliveries that expired or were cancelled
    ledger: Mapping[str, Mapping[str, int]] = {}  # by destination: deliveries created, and ended by state
    outcomes: Sequence[Outcome] = ()  # recorded attempts, with the new states of their deliveries
    made_due: Collection[str] = ()  # destinations whose deliveries an operator made due now
    later: Mapping[str, int] = {}  # per destination: when the first of its new groups is due (steady clock)


PAUSED_IN_CONFIG = "paused in config.toml"
"""`held` of a destination whose table has `paused = true`; only a reload ends it."""


class DestinationState(msgspec.Struct, kw_only=True, frozen=True):
    """The stored state of a destination, apart from its deliveries."""

    name: str
    paused: bool = False  # by an operator
    paused_until: int | None = None  # steady clock; None: until an operator resumes
    failing_since: int | None = None  # steady clock of the first failure since the last success
    disabled_at: int | None = None  # wall clock; None: enabled
    disabled_reason: str | None = None  # gone (410), asked (by the response's header), failing, operator
    circuit_opened: str | None = None  # reason in the latest event about the circuit; None: closed since

    @property
    def held(self) -> str | None:
        """The stored hold, such as `paused`, which an operator or `paused_until` ends; None: no hold."""
        if self.paused:
            return "paused"
        return None if self.disabled_at is None else f"disabled: {self.disabled_reason}"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that shares the data with others; see `relay.store.Nodes`."""

    name: str
    version: str
    started_at: int  # wall clock
    seen_at: int  # wall clock: its latest renewal
    is_self: bool = False
    lanes: tuple[str, ...] = ()  # destinations whose lanes it owns
    jobs: tuple[str, ...] = ()  # jobs of the cluster that it runs
    destinations: tuple[str, ...] = ()  # in its config
    config: str = ""  # digest of its config, in hexadecimal


class Caution(msgspec.Struct, frozen=True):
    """A risk that does not keep the relay from working."""

    what: str
    next: str  # what to do, or the next command
    is_choice: bool = False  # it follows from a setting that may be intended, so it is not a problem


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a database server at one moment."""

    engine: str  # version of the server
    sizes: Mapping[str, int]  # bytes, by the label of `relay_storage_size_bytes`
    figures: Mapping[str, float]  # see `relay.metrics.Metrics.note_server`
    cautions: tuple[Caution, ...] = ()  # the most severe first


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Periodic work of a plugin; one run at a time."""

    name: str  # unique within its plugin
    every: float  # seconds between runs, and from the start to the first run
    work: Callable[[], Awaitable[None]]
    everywhere: bool = False  # on each node of a cluster, not on one of them


# --- workers: changes that a handler requests, applied in the event's transaction -----------------


class Session(msgspec.Struct, kw_only=True, frozen=True):
    """One session that a worker reports."""

    id: str
    status: str = ""
    phone: str | None = None
    name: str | None = None
    last_activity: str | None = None


class Register(msgspec.Struct, kw_only=True, frozen=True, tag="register"):
    """A worker registers; registering an id again updates its row."""

    worker_id: str
    endpoint: str = ""
    description: str = ""
    version: str = ""
    environment: str = ""
    max_sessions: int | None = None
    status: WorkerStatus = "ONLINE"
    reject_conflict: bool = False  # a new id on a live worker's endpoint: Conflict instead of take-over
    recover: bool = False  # the worker restores its sessions, or those of its previous id
    sessions: tuple[Session, ...] = ()  # sessions to restore; filled in by the store


class Heartbeat(msgspec.Struct, kw_only=True, frozen=True, tag="heartbeat"):
    """A worker is alive; a field that is None was not reported."""

    worker_id: str
    status: WorkerStatus | None = None
    version: str | None = None
    environment: str | None = None
    cpu: float | None = None
    memory: float | None = None
    uptime: float | None = None
    message_count: int | None = None
    counts: Mapping[str, int] | None = None  # sessions by status, as the worker counts them
    sessions: tuple[Session, ...] | None = None  # the full list, for workers that send it


class Unregister(msgspec.Struct, kw_only=True, frozen=True, tag="unregister"):
    """A worker unregisters."""

    worker_id: str


class SessionSeen(msgspec.Struct, kw_only=True, frozen=True, tag="session"):
    """A session changed. Shows that its worker is alive, but is no heartbeat."""

    session: Session
    worker_id: str = ""  # "" means the worker that last reported the session
    at: str | float | None = None  # time of the change as the worker wrote it; None: not reported


WorkerChange = Register | Heartbeat | Unregister | SessionSeen


class Worker(msgspec.Struct, kw_only=True, frozen=True):
    """The registry's row for one (source, worker id)."""

    source: str
    id: str
    endpoint: str = ""
    description: str = ""
    version: str = ""
    environment: str = ""
    max_sessions: int | None = None
    status: WorkerStatus = "ONLINE"
    maintenance: bool = False  # by an operator or a planned window; overrides reported statuses
    maintenance_by: Literal["operator", "config"] | None = None
    maintenance_until: int | None = None  # steady clock; None: until an operator ends it
    maintained_as: str = ""  # the pattern of an operator's maintenance, "SOURCE/PATTERN"; see `rules.Plan`
    exempt_until: int | None = None  # steady clock: an operator ended a planned window for this worker
    registered_at: int = 0  # wall clock
    last_heartbeat: int = 0  # wall clock, for display only
    deadline: int = 0  # steady clock; a worker that is silent beyond it is offline
    last_beat: int = msgspec.field(
        default=0, name="heard"
    )  # steady: last heartbeat since the registration, or 0
    minutes: int = 0  # bits of the minutes in which it was heard, until `last_heartbeat`; see `rules`
    rhythm: int = 0  # usual interval of its heartbeats in microseconds; 0: not known yet
    unregistered_at: int | None = None  # steady clock; late heartbeats do not revive the worker
    leaving: int | None = None  # steady clock of a refused unregister; the next sweep applies it
    beats: int = 0  # heartbeats in time since the worker was offline, up to the required number
    restarts: int = 0  # number of times that its reported uptime decreased
    was_offline: bool = False  # offline at the start of maintenance; `worker.online` is still due
    cpu: float | None = None
    memory: float | None = None
    uptime: float | None = None
    message_count: int | None = None
    counts: Mapping[str, int] = {}
    sessions: tuple[Session, ...] = ()
    recovering: tuple[str, ...] = ()  # ids of sessions to restore that the worker has not listed yet
    fresh: bool = False  # no session list since the relay's request to restore sessions
    changed: Mapping[str, int] = {}  # by session id: wall clock of events since the last list, deletions too


class Command(msgspec.Struct, kw_only=True, frozen=True):
    """A command of an operator for a worker, delivered in the reply to a heartbeat."""

    public_id: str  # cmd_ + UUIDv7
    source: str
    worker_id: str
    body: Mapping[str, Any]  # free JSON with a `type`
    created_at: int  # wall clock
    expires_at: int  # steady clock
    state: Literal["queued", "sent", "expired", "cancelled"] = "queued"
    sent_at: int | None = None  # wall clock; workers do not confirm receipt


class GeneratedEvent(msgspec.Struct, kw_only=True, frozen=True):
    """An event that the relay itself creates, inside a transaction."""

    type: str  # without the source's name
    subject: str | None
    data: Mapping[str, Any]


# --- results of the store --------------------------------------------------------------------------


class Receipt(msgspec.Struct, kw_only=True, frozen=True):
    """The result of storing a request; its effects are durable."""

    event_id: str = ""  # public id; a duplicate gets the first event's id; "": no event
    duplicate: bool = False  # of several events: all of them
    key_conflict: bool = False  # a new event whose idempotency key belongs to another request
    worker: Worker | None = None  # the row after the change, or the requested row
    commands: tuple[Mapping[str, Any], ...] = ()  # queued for the worker; sent in this reply
    sent: tuple[Command, ...] = ()  # the same commands as stored records
    each: tuple["Receipt", ...] = ()  # of a request with several events, in their order


class Pruned(msgspec.Struct, kw_only=True, frozen=True):
    """Numbers of rows that one pass of retention deleted."""

    events: int = 0
    attempts: int = 0  # attempts of deliveries that are kept
    keys: int = 0  # idempotency keys
    stats: int = 0
    pages: int = 0  # database pages returned to the file system
    done: bool = True  # False: more rows are due than one pass may delete


class Expunged(msgspec.Struct, kw_only=True, frozen=True):
    """The result of deleting events on request."""

    events: int  # deleted, with their deliveries and attempts
    cancelled: int  # deliveries that were pending
    left: tuple[int, ...]  # row ids of events with a delivery in flight: not deleted, try again


class Imported(msgspec.Struct, kw_only=True, frozen=True):
    """Progress of an import."""

    lines: int  # imported and durable
    new: int  # of these, events that did not exist before


class Backup(msgspec.Struct, kw_only=True, frozen=True):
    """A verified copy of the database."""

    path: str
    bytes: int
    events: int
    deliveries: int
    seconds: float  # duration


class Compacted(msgspec.Struct, kw_only=True, frozen=True):
    """The result of compacting the database."""

    before: int  # bytes of the file
    after: int
    whole: bool  # False: another reader delays the shrinking of the file


class Measured(msgspec.Struct, kw_only=True, frozen=True):
    """Contents and sizes of a database."""

    path: str  # of the file, or the host and name of the database
    engine: str  # with its version
    version: int  # of the schema
    bytes: int  # of the file or database
    free: int | None = None  # bytes in the file that new data will reuse; None: there is no file
    log: int | None = None  # bytes of the write-ahead log beside it; None: there is no log
    events: int | None  # None: not counted
    oldest: int | None  # time of receipt of the oldest event, wall clock
    newest: int | None
    pending: int  # deliveries


class Check(msgspec.Struct, frozen=True):
    """The result of one check of `relay doctor`."""

    name: str
    ok: bool
    detail: str
    hint: str = ""  # advice; "" if ok


class Claim(msgspec.Struct, frozen=True):
    """The claimed deliveries, and the time at which the destination's next one is due."""

    deliveries: tuple[Delivery, ...]
    next_due: int | None  # steady clock; None: no other delivery is pending


class Counts(msgspec.Struct, kw_only=True, frozen=True):
    """One destination's row of the ledger: `created` equals the sum of all the others."""

    created: int = 0
    delivered: int = 0
    dead: int = 0
    expired: int = 0
    cancelled: int = 0
    pending: int = 0  # `audit` counts it in the table; `totals` derives it

    @property
    def unaccounted(self) -> int:
        """Created minus all the others; 0 unless a delivery was lost."""
        return self.created - self.delivered - self.dead - self.expired - self.cancelled - self.pending


class Outlook(msgspec.Struct, frozen=True):
    """Limits of a destination's pending deliveries: their time to live, and their order."""

    expires_at: int | None  # when the first delivery expires, steady clock; None: never
    keys: int  # order keys with pending deliveries
    longest: int  # pending deliveries of the key with the most
    is_whole: bool  # False: not all were counted, so `keys` and `longest` may be higher


class Backlog(msgspec.Struct, frozen=True):
    """Pending deliveries of one destination."""

    due: int  # how many are due
    oldest: int  # creation time of the oldest pending one (wall)
    row: int  # its row id
