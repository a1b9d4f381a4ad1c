"""One request's way: read, verify, understand, make durable, and only then answer."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, cast, get_args

import msgspec

from relay.base.clock import SECOND, Clock
from relay.base.ids import given_id, request_id
from relay.base.text import printable
from relay.errors import (
    REASONS,
    Forbidden,
    KeyConflict,
    Malformed,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PluginFailed,
    RateLimited,
    Refusal,
    StorageDown,
    StorageError,
    StorageUnavailableError,
    Unauthenticated,
    Unavailable,
)
from relay.incoming import Incoming
from relay.ingest.admission import Admission, worker_change_of
from relay.ingest.body import Budget, Hold, Patience, read_body, read_whole
from relay.ingest.dedupe import UnheardReplies, fingerprint
from relay.ingest.event import make_event
from relay.ingest.replies import (
    Response,
    allow_origin,
    answer,
    answer_again,
    ask,
    check_origin,
    health,
    plain,
    preflight,
    refuse,
)
from relay.ingest.request import Request
from relay.ingest.routes import Handle, Match, Mount, Routes
from relay.ingest.sender_address import SenderAddress
from relay.metrics import Metrics
from relay.model import (
    Command,
    Heartbeat,
    Receipt,
    Register,
    StoredEvent,
    WorkerChange,
    WorkerStatus,
)
from relay.process.logs import Sparing, fields
from relay.source import LONGEST_ID, Accepted, Event, Reply, Source, check_length
from relay.store import Acceptance, Store
from relay.workers.rules import ENVIRONMENTS, changes_a_path

log = logging.getLogger("relay.ingest")

_STATUSES = get_args(WorkerStatus)

Told = Callable[[bool], None]
"""Called once an answer was written or could not be, with whether its sender has heard it."""

MOST_BYTES = 32 * 2**20
LONGEST_QUIET = 600.0  # seconds between two log lines of a kind that keeps coming
STORAGE_PAUSE = 1.0  # seconds between tries to queue commands again while nothing can be written
LONGEST_SHOWN = 64  # characters of a sender's own words in the log
LONGEST_KEY = 256  # characters of an idempotency key; of a longer one its digest is stored
LONGEST_READ = 64 * 1024  # bytes of a refused body that is looked into for the log


class Ingest:
    """The public side's one handler."""

    def __init__(
        self,
        *,
        mounts: Iterable[Mount],
        store: Store,
        clock: Clock,
        metrics: Metrics,
        sender_address: SenderAddress,
        patience: Patience,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.mounts: dict[str, Mount] = {}
        self.admission = Admission(clock)
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._meters: dict[str, _Meter] = {}
        self._most_bytes = most_bytes
        self._budget = Budget(most_bytes)
        self._unheard_replies = UnheardReplies(clock)
        self._log = Sparing(log, clock, most=LONGEST_QUIET)
        self._tasks: set[asyncio.Task[None]] = set()
        self.mount(mounts, sender_address, patience)

    def mount(self, mounts: Iterable[Mount], sender_address: SenderAddress, patience: Patience) -> None:
        """Serve these sources from now on, in one step; requests under way end as they began.

        One that was served before stays paused if it is, and its rate buckets are not filled up.
        """
        before, self.mounts = self.mounts, {mount.name: mount for mount in mounts}
        for name, mount in self.mounts.items():
            if name in before:
                mount.paused = before[name].paused
            if name not in self._meters:  # that of a source which is gone stays, for its last requests
                self._meters[name] = _Meter(self._metrics, name)
        self._routes = Routes(tuple(self.mounts.values()))
        self._sender_address = sender_address
        self.patience = patience
        largest = max((mount.config.max_body for mount in self.mounts.values()), default=0)
        self._budget.resize(max(self._most_bytes, 2 * largest))
        self.admission.keep(self.mounts)

    async def handle(self, request: Request) -> Response:
        """Answer one request; everything that goes wrong is said in the source's own envelope."""
        began = self._clock.steady()
        path, _, query = request.target.partition("?")
        incoming = Incoming(method=request.method, path=path, headers=request.headers, query=query)
        mount: Mount | None = None
        match: Match | None = None
        try:
            match = self._routes.find(path, incoming.method)
            mount = match.mount
            incoming.path = path.removeprefix(mount.config.prefix)
            response = await self._serve(request, match, incoming, began)
            exemplar = {"event_id": response.event_id} if response.event_id else None
            self._meters[mount.name].seconds.observe((self._clock.steady() - began) / SECOND, exemplar)
        except Refusal as refusal:
            mount = mount or self._routes.owner(path)
            if mount is None:
                return self._outside(request, path, refusal)
            if isinstance(refusal, NotFound) and match is None:
                self._metrics.unroutable.labels("path").inc()
            incoming.path = path.removeprefix(mount.config.prefix)
            if match is not None and not isinstance(refusal, Unauthenticated | Forbidden):
                beat = self._heed(match, incoming, refusal)
                if beat is not None:
                    await self._bring_back(mount.name, beat)
            response = self._refuse(mount, refusal, incoming, request.remote)
        if mount.config.cors_origins:
            allow_origin(mount.config.cors_origins, request.headers.get("Origin"), response)
        return response

    def _outside(self, request: Request, path: str, refusal: Refusal) -> Response:
        """Answer a request on a path that no source owns."""
        is_health = path == "/health"
        if is_health and request.method in ("GET", "HEAD"):
            return health()
        reason = "method" if is_health else "path"
        self._metrics.unroutable.labels(reason).inc()
        if self._log.is_due(f"unroutable: {reason}"):
            problem = "use GET" if is_health else f"no source owns this path{self._hint(path)}"
            sender = self._sender_address.of(request.remote, request.headers)
            shown = f"{request.method[:LONGEST_SHOWN]} {path[:LONGEST_SHOWN]}"
            self._tell_unroutable(reason, sender, f"{shown}: {problem}")
        return plain(refusal)

    def unroutable(self, reason: str, peer: str | None, problem: str) -> None:
        """Count a sender that was sent away before a request of it could be read."""
        self._metrics.unroutable.labels(reason).inc()
        self._tell_unroutable(reason, peer or "unknown", problem)

    def _tell_unroutable(self, reason: str, sender: str, problem: str) -> None:
        key = f"unroutable: {reason}"
        self._log.info(key, f"{key}: {printable(problem)} ({sender})", reason=reason, remote=sender)

    def _hint(self, path: str) -> str:
        nearest = self._routes.nearest(path)
        return "" if nearest is None else f"; did you mean {nearest}?"

    async def _serve(self, request: Request, match: Match, incoming: Incoming, began: int) -> Response:
        mount = match.mount
        handler = match.handlers.get(incoming.method)
        if handler is None:
            if incoming.method == "OPTIONS" and mount.config.cors_origins:
                return preflight(match.handlers)
            raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))
        if mount.is_open:
            check_origin(mount, incoming)
        late = self.admission.draining  # a body that began before the drain may still end
        incoming.params = match.params
        source = mount.source
        if not source.verify_reads_body:
            ask(source.verify, incoming)  # so that a stranger's body takes no memory
        budget, hold = self._budget, None
        body = read_whole(request, mount.config.max_body, budget)
        if body is None:
            hold = budget.hold(lambda: self._who(request, source))
        try:
            if body is None:
                body = await read_body(request, mount.config.max_body, self.patience, cast("Hold", hold))
            incoming.body = body
            if source.verify_reads_body:
                ask(source.verify, incoming)
            self.admission.check(mount, incoming, late=late)
            return await self._accept(request, mount, handler, incoming, began)
        finally:
            if hold is not None:
                hold.release()
            elif body is not None:
                budget.used -= len(body)

    def _who(self, request: Request, source: Source) -> tuple[str, bool]:
        """Return the sender's address, and whether it has been verified before its body is read."""
        is_known = not source.verify_reads_body and not source.is_open()
        return self._sender_address.of(request.remote, request.headers), is_known

    def overhear(self, request: Request) -> None:
        """Note what the head of a request says of a worker whose connection was turned away."""
        path, _, query = request.target.partition("?")
        with suppress(NotFound, Malformed):
            match = self._routes.find(path, request.method)
            inner = path.removeprefix(match.mount.config.prefix)
            incoming = Incoming(method=request.method, path=inner, headers=request.headers, query=query)
            self._heed(match, incoming, Overloaded())

    def _heed(self, match: Match, incoming: Incoming, refusal: Refusal) -> Heartbeat | None:
        """Note in memory that a worker lives or leaves whose request is refused, but not for a wrong token.

        Returns the heartbeat to store if the worker is OFFLINE and only the request is wrong.
        """
        name, source = match.mount.name, match.mount.source
        if self._store.failure is None and not any(
            self._store.workers.count(name, each) for each in _STATUSES
        ):
            return None  # it has no workers
        incoming.params = match.params
        change: WorkerChange | None = None
        with suppress(Refusal):
            ask(source.verify, incoming)  # it may not have been asked yet; the head is enough for a token
            if type(source).sign_of_life is not Source.sign_of_life:
                change = worker_change_of(source, incoming)
            elif isinstance(refusal, Unavailable | RateLimited) and incoming.method in match.handlers:
                change = getattr(ask(match.handlers[incoming.method], incoming), "worker", None)
        if change is None:
            return None
        status = self._store.workers.note_refused(name, change)
        is_ours = isinstance(refusal, Unavailable | RateLimited)
        return change if status == "OFFLINE" and isinstance(change, Heartbeat) and not is_ours else None

    async def _bring_back(self, source: str, beat: Heartbeat) -> None:
        """Take in the heartbeat of an OFFLINE worker though its request is refused: it is back."""
        with suppress(Refusal):
            receipt = await self._append(Acceptance(source=source, change=beat))
            if receipt.sent:  # they need a reply
                self._take_back(receipt.sent)

    async def _accept(
        self, request: Request, mount: Mount, handler: Handle, incoming: Incoming, began: int
    ) -> Response:
        verbose = log.isEnabledFor(logging.DEBUG)  # once: at `info` this is all that lines cost an event
        accepted = ask(handler, incoming)
        if isinstance(accepted, Reply):
            response = answer(Accepted(reply=accepted), Receipt())
            if verbose:
                answered = Acceptance(source=mount.name, request_id=self._request_id(incoming))
                self._tell(mount, answered, response, began)
            return response
        if not isinstance(accepted, Accepted):
            raise PluginFailed from TypeError(f"a handler returned {type(accepted).__name__}")
        event = accepted.event
        stored = None if event is None else make_event(mount.name, event, incoming, self._clock.wall())
        given = incoming.headers.get("X-Request-Id")
        traced = None if given is None else given_id(given)
        if verbose and traced is None:
            traced = request_id(self._clock.wall())  # log lines of the event's attempts carry it, too
        # The answer is rendered before the append, so that a plugin which cannot do it costs a 500
        # with nothing stored, and leaves only after the commit.
        expected = Receipt() if stored is None else Receipt(event_id=stored.public_id)
        response = answer(accepted, expected)
        key = None if event is None else _key(event, incoming)
        acceptance = Acceptance(
            source=mount.name,
            event=stored,
            key=key,
            path=mount.config.prefix + incoming.path,
            rejects_conflict=mount.config.key_conflict == "reject",
            change=accepted.worker,
            asks=accepted.asks,
            request_id=traced,
        )
        told = None
        if stored is None:
            receipt = await self._append(acceptance)
        else:
            receipt, told = await self._append_once(request, acceptance, stored)
        try:
            self._count(mount, acceptance, receipt)
            if receipt != expected:
                response = answer_again(accepted, receipt, response)
            response.event_id = receipt.event_id
            if verbose:
                self._tell(mount, acceptance, response, began, receipt)
        except BaseException:
            if told is not None:
                told(False)  # noqa: FBT003 - it takes nothing else
            raise
        response.told = told if not receipt.sent else self._sent(receipt.sent, told)
        return response

    def _sent(self, commands: tuple[Command, ...], then: Told | None) -> Told:
        """Return what queues a worker's commands again if its reply did not reach it."""

        def told(heard: bool) -> None:  # noqa: FBT001 - called by the connection, with this alone
            if not heard:
                self._take_back(commands)
            if then is not None:
                then(heard)

        return told

    def _take_back(self, commands: tuple[Command, ...]) -> None:
        """Queue a worker's commands again whose reply did not reach it."""
        task = asyncio.create_task(self._requeue(commands))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _requeue(self, commands: tuple[Command, ...]) -> None:
        while True:
            try:
                await self._store.workers.change(lambda fleet: fleet.requeue(commands))
            except StorageUnavailableError:
                await asyncio.sleep(STORAGE_PAUSE)
            else:
                return

    async def _append_once(
        self, request: Request, acceptance: Acceptance, stored: StoredEvent
    ) -> tuple[Receipt, Told]:
        """Append, unless this repeats a request whose sender hung up before it was answered.

        Returns the receipt, and what must be called with whether the sender has heard the answer.
        """
        echoes, mark = self._unheard_replies, fingerprint(request.target, stored, acceptance.key)
        first = await echoes.first(mark)
        entry = echoes.begin(mark, lambda: request.may_be_gone)
        try:
            if first is None:
                receipt = await self._append(acceptance)
            else:
                receipt = first
                with suppress(Refusal, StorageError):  # only a count: what it repeats is durable
                    await self._store.events.append(
                        Acceptance(source=acceptance.source, event=stored, repeats=first.event_id)
                    )
        except BaseException:
            echoes.end(mark, entry, first, gone=True)
            raise
        return receipt, lambda heard: echoes.end(mark, entry, receipt, gone=not heard)

    async def _append(self, acceptance: Acceptance) -> Receipt:
        change = acceptance.change
        if change is not None and len(change.worker_id) > LONGEST_ID:
            check_length(change.worker_id, "worker_id")
        try:
            return await self._store.events.append(acceptance)
        except StorageUnavailableError as error:
            raise StorageDown from error
        except StorageError as error:
            raise PluginFailed from error

    def _count(self, mount: Mount, acceptance: Acceptance, receipt: Receipt) -> None:
        meter, change = self._meters[mount.name], acceptance.change
        if isinstance(change, Heartbeat):
            meter.heartbeats.inc()
        elif isinstance(change, Register):
            self._wonder(mount, change)
        if acceptance.event is None:
            return
        if receipt.duplicate:
            meter.duplicates.inc()
        else:
            meter.received.inc()
            meter.bytes.inc(len(acceptance.event.body))
            if receipt.key_conflict:
                self._count_conflict(mount, acceptance, receipt)

    def _count_conflict(self, mount: Mount, acceptance: Acceptance, receipt: Receipt) -> None:
        """Count and log an event whose idempotency key another request has had; it is stored all the same."""
        self._meters[mount.name].key_conflicts.inc()
        key = (acceptance.key or "")[:LONGEST_SHOWN]
        self._log.warning(
            f"{mount.name}: key conflict",
            f"{mount.name}: the idempotency key {key!r} was used before for another request; stored as a new"
            f' event. To refuse such requests set [sources.{mount.name}] key_conflict = "reject"',
            source=mount.name,
            event_id=receipt.event_id,
        )

    def _wonder(self, mount: Mount, change: Register) -> None:
        """Warn about an unknown environment, or an id that must be percent-encoded in paths."""
        if odd := changes_a_path(change.worker_id):
            self._log.warning(
                f"{mount.name}: id",
                f"{mount.name}: worker {change.worker_id!r} registered with {odd!r} in its id; its heartbeats"
                " arrive only if its client percent-encodes the id in paths",
                source=mount.name,
                worker_id=change.worker_id,
            )
        if change.environment and change.environment not in ENVIRONMENTS:
            self._log.warning(
                f"{mount.name}: environment",
                f"{mount.name}: worker {change.worker_id!r} registered with the environment"
                f" {change.environment[:LONGEST_SHOWN]!r}, usual are {', '.join(ENVIRONMENTS)}",
                source=mount.name,
                worker_id=change.worker_id,
            )

    def _tell(
        self,
        mount: Mount,
        acceptance: Acceptance,
        response: Response,
        began: int,
        receipt: Receipt | None = None,
    ) -> None:
        """Log at `debug` that a request was accepted, just before the reply is sent."""
        told = fields(
            request_id=acceptance.request_id,
            source=mount.name,
            type=acceptance.event.type if acceptance.event else None,
            event_id=(receipt.event_id or None) if receipt else None,
            status=response.status,
            duration_ms=round((self._clock.steady() - began) / 1000, 1),
        )
        repeated = receipt is not None and receipt.duplicate
        log.debug("%s: %s", mount.name, "accepted again" if repeated else "accepted", extra=told)

    def _request_id(self, incoming: Incoming) -> str:
        return given_id(incoming.headers.get("X-Request-Id")) or request_id(self._clock.wall())

    def _refuse(self, mount: Mount, refusal: Refusal, incoming: Incoming, peer: str | None) -> Response:
        reason = refusal.reason if refusal.reason in REASONS else PluginFailed.reason  # a plugin's own
        self._metrics.rejected.labels(mount.name, reason).inc()
        if isinstance(refusal, KeyConflict):
            self._meters[mount.name].key_conflicts.inc()
        request = self._request_id(incoming)
        if isinstance(refusal, PluginFailed):
            self._metrics.plugin_errors.labels(mount.config.plugin).inc()
            self._fail(mount, incoming, refusal.__cause__, request)
        try:
            response = refuse(mount, refusal, incoming)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything, the sender is answered all the same
            self._fail(mount, incoming, error, request)
            response = plain(refusal)
        what = f"{mount.name}: refused with {response.status}, {reason}"
        if self._log.is_due(what):
            sender = self._sender_address.of(peer, incoming.headers)
            type_ = type_of(incoming)
            of = sender if type_ is None else f"type {type_}, from {sender}"
            self._log.info(
                what,
                printable(f"{what}: {self._described(mount, refusal, incoming)} ({of})"),
                request_id=request,
                source=mount.name,
                type=type_,
                status=response.status,
                reason=reason,
                field=refusal.field or None,
                problem=(refusal.problem if isinstance(refusal, Unauthenticated) else refusal.issue) or None,
                remote=sender,
            )
        return response

    def _described(self, mount: Mount, refusal: Refusal, incoming: Incoming) -> str:
        """Return what is wrong with a refused request."""
        if not isinstance(refusal, NotFound | MethodNotAllowed):
            return refusal.detail
        hint = self._hint(mount.config.prefix + incoming.path) if isinstance(refusal, NotFound) else ""
        return f"{refusal.detail}: {incoming.method} {incoming.path[:LONGEST_SHOWN]}{hint}"

    def _fail(self, mount: Mount, incoming: Incoming, error: BaseException | None, request: str) -> None:
        line = f"{mount.name}: {incoming.method} {incoming.path} failed"
        self._log.error(f"{mount.name}: failed", line, error, request_id=request, source=mount.name)


class _Meter:
    """One source's counters, looked up once: a look-up costs three times what counting does."""

    def __init__(self, metrics: Metrics, source: str) -> None:
        self.received = metrics.received.labels(source)
        self.bytes = metrics.bytes.labels(source)
        self.duplicates = metrics.duplicates.labels(source)
        self.key_conflicts = metrics.key_conflicts.labels(source)
        self.heartbeats = metrics.heartbeats.labels(source)
        self.seconds = metrics.ingest.labels(source)


def _key(event: Event, incoming: Incoming) -> str | None:
    """Return the idempotency key of the handler, or else of the sender; the header names are the field's.

    Raises:
        PluginFailed: the handler names something that is no text.
    """
    key, headers = event.key, incoming.headers
    if not key and ("Idempotency-Key" in headers or "webhook-id" in headers):
        key = incoming.header("Idempotency-Key") or incoming.header("webhook-id")
    if not key:
        return None
    if not isinstance(key, str):
        raise PluginFailed from TypeError(f"a handler returned a key that is {type(key).__name__}, not str")
    text = key.encode("utf-8", "surrogatepass")
    if len(key) > LONGEST_KEY or (event.key and not key.isprintable()):
        return f"sha256:{hashlib.sha256(text).hexdigest()}"
    return key


def type_of(incoming: Incoming) -> str | None:
    """Return what a refused request says of its type, for the log; None where nothing can be read.

    Read are the header and the fields in which senders name it, whatever the source.
    """
    said: Any = incoming.header("X-Event-Type")
    if not said and len(incoming.body) <= LONGEST_READ:
        try:
            body = msgspec.json.decode(incoming.body, type=dict[str, msgspec.Raw])
            names = (name for name in ("event_type", "event", "type", "name") if name in body)
            said = msgspec.json.decode(next((body[name] for name in names), b"null"))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
    return said[:LONGEST_SHOWN] if isinstance(said, str) and said else None
