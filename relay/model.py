"""The nouns: what the relay remembers and passes around. Times are microseconds UTC (`relay.base.clock`)."""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

EMPTY = msgspec.Raw(b"{}")
"""What an absent, `null` or PHP-style `[]` map becomes."""

DeliveryState = Literal["pending", "delivered", "dead", "expired", "cancelled"]
WorkerStatus = Literal["ONLINE", "OFFLINE", "MAINTENANCE"]


class StoredEvent(msgspec.Struct, kw_only=True, gc=False):
    """One thing that happened, as accepted; never changes once it is stored."""

    id: int  # row id: the order of acceptance; 0 until the writer gives it one
    public_id: str  # evt_ + UUIDv7, what senders, receivers and operators see
    source: str  # name of the source in config.toml
    type: str  # full type: "<source name>.<type on the wire>"
    subject: str | None  # what it is about, from the wire: shop id, session id, worker id
    received_at: int  # wall clock when the body had been read
    data: bytes  # JSON object or value: the sender's own bytes, never re-encoded
    context: bytes  # JSON object: what the sender said about the circumstances
    body: bytes  # the whole request body as it came
    content_type: str  # of that body
    sha256: bytes  # digest of the body, verified again before it is forwarded
    traceparent: str | None = None  # W3C trace context, if one came in
    rendered: dict[str, bytes] | None = None  # bodies by format, while in memory; never stored
    request_id: str | None = None  # of the request that brought it, for the log; likewise


class Delivery(msgspec.Struct, kw_only=True, gc=False):
    """One event owed to one destination, as a lane holds it."""

    id: int  # row id
    public_id: str  # dlv_ + UUIDv7
    event_id: int  # row id of the event
    destination: str  # name of the destination in config.toml
    attempts: int  # finished attempts so far
    created_at: int  # when it came into being
    size: int  # bytes of the event's body, for the budget of bodies held in memory
    event: StoredEvent | None = None  # None: to be loaded when a slot frees
    order_key: str | None = None  # see `Owed`
    latest_key: str | None = None
    expires_at: int | None = None  # steady clock
    on_dead: str | None = None
    replay_of: int | None = None  # row id of the delivery that this one repeats


class Attempt(msgspec.Struct, kw_only=True, frozen=True):
    """One HTTP try of one delivery, as it ended."""

    started_at: int  # wall clock
    duration_ms: float  # from taking the slot to the last byte we wanted
    result: str  # closed label, one of `relay.delivery.http.result.RESULTS`
    status: int | None = None  # HTTP status, None when there was no answer
    error: str | None = None  # one line for the operator
    answer: bytes = b""  # first 16 KiB of the answer's body
    truncated: bool = False  # whether there was more of it


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """What an attempt means for its delivery: the new state and, while pending, when to try again."""

    delivery: Delivery
    attempt: Attempt | None  # None: it ended without one (expired in its lane's window)
    state: DeliveryState
    next_attempt_at: int | None = None  # steady clock; only while pending
    reason: str | None = None  # why it ended, unless delivered
    counts: bool = True  # False: the attempt is recorded but spends none of the schedule


class Owed(msgspec.Struct, frozen=True):
    """One destination that an event must reach, and on which terms."""

    destination: str
    order_key: str | None = None  # those of one (destination, key) go out one after another
    latest_key: str | None = None  # a newer one of that key makes the older pointless
    ttl: int | None = None  # microseconds from creation to expiry
    max_pending: int | None = None  # beyond so many pending ones the new one is dead at once
    on_dead: str | None = None  # destination that a dead one's event is handed to


class Selection(msgspec.Struct, kw_only=True, frozen=True):
    """Which events an operator means, or which deliveries of them; None: any."""

    source: str | None = None
    type: str | None = None  # full type, or a pattern as destinations have them
    subject: str | None = None
    since: int | None = None  # wall clock: received then or later
    until: int | None = None  # received before
    destination: str | None = None  # owed to it, and as the next field says
    state: DeliveryState | None = None  # of the latest delivery of an event to a destination
    where: Any = None  # conditions over the envelope, as `where` of a destination has them; valid

    @property
    def of_deliveries(self) -> bool:
        """Whether it is deliveries that are chosen, rather than events."""
        return self.destination is not None or self.state is not None


class Chosen(msgspec.Struct, frozen=True):
    """One event that was selected, without its body."""

    event_id: int  # row id
    size: int  # bytes of the body
    received_at: int
    destinations: tuple[str, ...] = ()  # of the deliveries that were selected


class Stat(msgspec.Struct, frozen=True):
    """What came in of one type within one hour."""

    hour: int  # its beginning, wall clock
    source: str
    type: str
    events: int
    duplicates: int  # requests that repeated a stored event
    bytes: int  # of bodies


class Named(msgspec.Struct, frozen=True):
    """One delivery that an operator named."""

    id: int  # row id
    state: DeliveryState
    chosen: Chosen


class News(msgspec.Struct, frozen=True):
    """What one commit changed that lanes and plugins must know."""

    events: Sequence[StoredEvent] = ()
    deliveries: Sequence[Delivery] = ()  # new and due: held for their lanes, with their events
    woken: Collection[str] = ()  # destinations that have something else due now
    dropped: Collection[int] = ()  # deliveries that ended without an attempt: expired, cancelled
    books: Mapping[str, Mapping[str, int]] = {}  # per destination: how many were created, ended how
    outcomes: Sequence[Outcome] = ()  # recorded, and their deliveries moved on
    hurried: Collection[str] = ()  # destinations whose retries an operator made due
    turned: Sequence[tuple[str, WorkerStatus]] = ()  # workers of another status than before: source, status


class DestinationState(msgspec.Struct, kw_only=True, frozen=True):
    """What the store remembers of a destination beside its deliveries."""

    name: str
    paused: bool = False  # by an operator
    failing_since: int | None = None  # steady clock of the first failure since the last success
    disabled_at: int | None = None  # wall clock; None: enabled
    disabled_reason: str | None = None  # gone (410), asked (by header), failing, operator

    @property
    def held(self) -> str | None:
        """Why nothing is sent until an operator lets it; None: for no reason that would be stored."""
        if self.paused:
            return "paused"
        return None if self.disabled_at is None else f"disabled: {self.disabled_reason}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Periodic work that a plugin asks for, one run at a time."""

    name: str  # unique within its plugin
    every: float  # seconds from one run to the next; the first comes so long after the start
    work: Callable[[], Awaitable[None]]


# --- workers: what a handler may ask for, applied in the event's own transaction ------------------


class Session(msgspec.Struct, kw_only=True, frozen=True):
    """One session that a worker reports."""

    id: str
    status: str = ""
    phone: str | None = None
    name: str | None = None
    last_activity: str | None = None


class Register(msgspec.Struct, kw_only=True, frozen=True, tag="register"):
    """A worker announces itself; registering an id again updates its row."""

    worker_id: str
    endpoint: str = ""
    description: str = ""
    version: str = ""
    environment: str = ""
    max_sessions: int | None = None
    status: WorkerStatus = "ONLINE"
    reject_conflict: bool = False  # a new id on a live worker's endpoint: Conflict instead of take-over
    recover: bool = False  # have it restore its sessions, or those of its former id
    sessions: tuple[Session, ...] = ()  # the sessions to restore; the store finds them


class Heartbeat(msgspec.Struct, kw_only=True, frozen=True, tag="heartbeat"):
    """A worker is alive; `None` means that it did not say."""

    worker_id: str
    status: WorkerStatus | None = None
    version: str | None = None
    environment: str | None = None
    cpu: float | None = None
    memory: float | None = None
    uptime: float | None = None
    message_count: int | None = None
    counts: Mapping[str, int] | None = None  # sessions by status, as the worker counts them
    sessions: tuple[Session, ...] | None = None  # the list form


class Unregister(msgspec.Struct, kw_only=True, frozen=True, tag="unregister"):
    """A worker says goodbye."""

    worker_id: str


class SessionSeen(msgspec.Struct, kw_only=True, frozen=True, tag="session"):
    """A session changed; a sign of its worker's life, but no heartbeat."""

    session: Session
    worker_id: str = ""  # "": the worker that last reported the session
    at: str | float | None = None  # when it changed, as the worker wrote it; None: it did not say


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
    maintenance: bool = False  # set by an operator; wins over reports
    registered_at: int = 0  # wall clock
    last_heartbeat: int = 0  # wall clock, for display only
    deadline: int = 0  # steady clock; silent past it means offline
    heard: int = 0  # steady clock of the last heartbeat since it registered; 0: none
    rhythm: int = 0  # microseconds that usually pass between its heartbeats; 0: not known yet
    unregistered_at: int | None = None  # steady clock; a tombstone against overlapping heartbeats
    leaving: int | None = None  # steady clock of a refused unregister; a sweep carries it out
    beats: int = 0  # heartbeats in time since it was offline, until they are enough
    restarts: int = 0  # how often its uptime went back
    was_offline: bool = False  # when its maintenance began: nobody has been told yet that it is back
    cpu: float | None = None
    memory: float | None = None
    uptime: float | None = None
    message_count: int | None = None
    counts: Mapping[str, int] = {}
    sessions: tuple[Session, ...] = ()
    recovering: tuple[str, ...] = ()  # ids of sessions that it is to restore and has not listed yet
    fresh: bool = False  # it has sent no list since it was told to restore sessions
    changed: Mapping[str, int] = {}  # wall clock, by session id: of events since the list, deleted ones too


class Command(msgspec.Struct, kw_only=True, frozen=True):
    """What an operator wants a worker to do; it rides in the reply to a heartbeat."""

    public_id: str  # cmd_ + UUIDv7
    source: str
    worker_id: str
    body: Mapping[str, Any]  # free JSON with a `type`
    created_at: int  # wall clock
    expires_at: int  # steady clock
    state: Literal["queued", "sent", "expired", "cancelled"] = "queued"
    sent_at: int | None = None  # wall clock; proves no receipt: the worker says nothing of it


class Born(msgspec.Struct, kw_only=True, frozen=True):
    """An event that the relay itself gives birth to, inside a transaction."""

    type: str  # without the source's name
    subject: str | None
    data: Mapping[str, Any]


# --- the store's answers --------------------------------------------------------------------------


class Receipt(msgspec.Struct, kw_only=True, frozen=True):
    """What the store gives back once a request's effects are durable."""

    event_id: str = ""  # public id; of the first one for a duplicate; "" when there was no event
    duplicate: bool = False
    key_conflict: bool = False  # a new event, whose idempotency key another request has had
    worker: Worker | None = None  # the row after the change, or the one that was asked about
    commands: tuple[Mapping[str, Any], ...] = ()  # queued for the worker, riding in this reply
    sent: tuple[Command, ...] = ()  # the same, as the store keeps them


class Pruned(msgspec.Struct, kw_only=True, frozen=True):
    """What a pass of retention deleted."""

    events: int = 0
    attempts: int = 0  # of deliveries that stay
    keys: int = 0  # that duplicates are known by
    stats: int = 0
    pages: int = 0  # given back to the disk
    done: bool = True  # False: there was more than one pass may take


class Expunged(msgspec.Struct, kw_only=True, frozen=True):
    """What an operator's deletion came to."""

    events: int  # gone, with deliveries and attempts
    cancelled: int  # deliveries that were still owed
    left: tuple[int, ...]  # row ids of events that something is just being sent of; ask again


class Imported(msgspec.Struct, kw_only=True, frozen=True):
    """How far an import has come."""

    lines: int  # read and durable
    new: int  # of which the events were not there before


class Backup(msgspec.Struct, kw_only=True, frozen=True):
    """A copy of the store that has been checked."""

    path: str
    bytes: int
    events: int
    deliveries: int
    seconds: float  # that it took


class Compacted(msgspec.Struct, kw_only=True, frozen=True):
    """What giving free room back came to."""

    before: int  # bytes of the file
    after: int
    whole: bool  # False: a reader was in the way, the file shrinks a little later


class Measured(msgspec.Struct, kw_only=True, frozen=True):
    """What a database holds, and what room that takes."""

    path: str
    version: int  # of its tables
    bytes: int  # of the file
    free: int  # of these: to be used again before the file grows
    log: int  # bytes of the write-ahead log beside it
    events: int
    oldest: int | None  # when the first of them came in; wall clock
    newest: int | None
    pending: int  # deliveries that are owed


class Check(msgspec.Struct, frozen=True):
    """One thing that a doctor looked at."""

    name: str
    ok: bool
    detail: str
    hint: str = ""  # what to do, where it is not ok


class Claim(msgspec.Struct, frozen=True):
    """Deliveries that the caller now holds, and when the next one of that destination is due."""

    deliveries: tuple[Delivery, ...]
    next_due: int | None  # steady clock; None: nothing else is pending
