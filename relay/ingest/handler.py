"""The public listener's request handler: verify, read, interpret, store, and only then answer."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec

from relay.base.clock import SECOND, Clock
from relay.base.ids import REQUEST, given_id, new_id
from relay.config.schema import RefusedConfig
from relay.errors import (
    Forbidden,
    Invalid,
    Malformed,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PluginFailed,
    Refusal,
    StorageDown,
    StorageError,
    StorageUnavailableError,
    TooLarge,
    Unauthenticated,
    UnsupportedEncoding,
)
from relay.ingest.admission import Admission, check_change
from relay.ingest.body import SMALL, Budget, Extra, Hold, Patience, read_body
from relay.ingest.compression import decompress, encoding_of
from relay.ingest.dedupe import Entry, Fingerprint, UnheardReplies, fingerprint, fingerprint_all
from relay.ingest.event import make_event
from relay.ingest.refusals import LONGEST_SHOWN, Refusals, request_id_of
from relay.ingest.refused import Explain, RefusedRequests, incoming_of
from relay.ingest.replies import (
    MOST_REPLIED,
    MOST_REPLIES,
    REFUSING,
    OnHeard,
    RecentReplies,
    Response,
    Sent,
    allow_origin,
    answer,
    answer_again,
    ask,
    check_origin,
    preflight,
)
from relay.ingest.request import Request
from relay.ingest.routes import Handle, Match, Mount, Routes
from relay.ingest.sender_address import SenderAddress
from relay.ingest.token_use import TokenUses
from relay.ingest.worker_requests import WorkerRequests
from relay.metrics import Metrics
from relay.model import (
    Heartbeat,
    Receipt,
    RefusedRequest,
    Register,
)
from relay.process.logs import RateLimitedLog, fields
from relay.source import LONGEST_ID, Accepted, Event, Incoming, Reply, check_length
from relay.store import EVENT_BYTES, Acceptance, Store

log = logging.getLogger("relay.ingest")

MOST_BYTES = 32 * 2**20
LONGEST_QUIET = 600.0  # longest pause in seconds between two log lines with the same key
LONGEST_KEY = 256  # characters of an idempotency key; a longer key is stored as its digest
MOST_EVENTS = 5000  # of one request; its transaction delays the commits of others
MOST_SHARED = 100  # events of one request for which the reply is remembered
MOST_COPIES = 4  # all data and contexts of such a request, as a multiple of `max_body`
TURN = 0.001  # seconds of one turn of the event loop that such a request may use before it is stored


class _Call(msgspec.Struct):
    """The state of one request in the handler."""

    request: Request | None  # None: a kept request, which an operator retries
    began: int  # steady clock
    match: Match
    incoming: Incoming
    verified: bool = False  # whether the source has verified the sender
    retry_of: str | None = None  # id of the kept request


class Ingest:
    """Answers every request to the public listener."""

    def __init__(
        self,
        *,
        mounts: Iterable[Mount],
        store: Store,
        clock: Clock,
        metrics: Metrics,
        sender_address: SenderAddress,
        patience: Patience,
        token_uses: TokenUses | None = None,
        refused: RefusedConfig | None = None,
        explain: Explain | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.mounts: dict[str, Mount] = {}
        self.admission = Admission(clock)
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self.counters: dict[str, Counters] = {}  # by source
        self.token_uses = token_uses or TokenUses(metrics, clock)
        self._most_bytes = most_bytes
        self._budget = Budget(most_bytes)
        self._unheard_replies = UnheardReplies(clock, store.nodes.replies)
        self.replies = RecentReplies()
        self._log = RateLimitedLog(log, clock, most=LONGEST_QUIET)
        self._refusals = Refusals(clock, metrics, self._log)
        self._workers = WorkerRequests(store, self._log)
        self.refused = RefusedRequests(
            store.refused, clock, is_full=lambda: self.admission.disk_full, explain=explain
        )
        self.mount(mounts, sender_address, patience, refused)

    def mount(
        self,
        mounts: Iterable[Mount],
        sender_address: SenderAddress,
        patience: Patience,
        refused: RefusedConfig | None = None,
    ) -> None:
        """Replace the sources in one step; requests under way keep the sources that they began with.

        A source that exists before and after stays paused if it is paused, and keeps its rate buckets.
        """
        before, self.mounts = self.mounts, {mount.name: mount for mount in mounts}
        for name, mount in self.mounts.items():
            if name in before:
                mount.paused = before[name].paused
            if name not in self.counters:  # a removed source keeps its counters for its last requests
                self.counters[name] = Counters(self._metrics, name)
        self._routes = Routes(tuple(self.mounts.values()))
        self._sender_address = sender_address
        self._refusals.mount(self._routes, sender_address)
        self.patience = patience
        largest = max((mount.config.max_body for mount in self.mounts.values()), default=0)
        self._budget.resize(max(self._most_bytes, 2 * largest))
        self.admission.keep(self.mounts)
        self.token_uses.adopt(self.mounts.values())
        self.refused.mount(self.mounts.values(), refused or RefusedConfig())

    async def handle(self, request: Request) -> Response:
        """Answer one request; the source renders every error in its envelope."""
        began = self._clock.steady()
        path, _, query = request.target.partition("?")
        call: _Call | None = None
        try:
            match = self._routes.literal.get(path) or self._routes.find(path, request.method)
            mount = match.mount
            incoming = Incoming(
                method=request.method,
                path=path.removeprefix(mount.config.prefix),
                headers=request.headers,
                params=match.params,
                query=query,
                target=request.target,
                received_at=self._clock.wall(),
                find_remote=lambda: self._sender_address.of(request.remote, request.headers),
            )
            call = _Call(request, began, match, incoming)
            response = await self._serve(call, request)
            duration, exemplar, counters = self._clock.steady() - began, None, self.counters[mount.name]
            if id_ := response.event_id:
                noted = self.replies.recent
                sent = Sent(call.incoming.received_at, response.status, duration)
                noted[id_] = (sent,) if id_ not in noted else (*noted[id_][: MOST_REPLIES - 1], sent)
                if len(noted) >= MOST_REPLIED:
                    self.replies.drop_older()
                # Only for the slowest events of each second: an exemplar costs as much as an observation.
                if duration > counters.slowest or began >= counters.slowest_until:
                    counters.slowest, counters.slowest_until = duration, began + SECOND
                    exemplar = {"event_id": id_}
            counters.seconds.observe(duration / SECOND, exemplar)
        except Refusal as refusal:
            if call is None:
                owner = self._routes.owner(path)
                if owner is None:
                    return self._answer_unowned(request, path, refusal)
                mount = owner
                if isinstance(refusal, NotFound):
                    self._metrics.unroutable.labels("path").inc()
                inner = path.removeprefix(mount.config.prefix)
                incoming = Incoming(method=request.method, path=inner, headers=request.headers, query=query)
            else:
                mount, incoming = call.match.mount, call.incoming
                if not isinstance(refusal, Unauthenticated | Forbidden):
                    await self._workers.note_sign_of_life(call.match, incoming, refusal)
            response = self._refusals.answer(mount, refusal, incoming, request.remote)
            self.refused.note(
                mount,
                request,
                refusal,
                response.status,
                remote=self._sender_address.of(request.remote, request.headers),
                incoming=incoming,
                verified=call is not None and call.verified,
            )
        if mount.config.cors_origins:
            allow_origin(mount.config.cors_origins, request.headers.get("Origin"), response)
        return response

    def overhear(self, request: Request) -> None:
        """Note the sign of life in a request whose connection was turned away."""
        with suppress(NotFound, Malformed):
            match = self._routes.find(request.target.partition("?")[0], request.method)
            self._workers.overhear(match, request)

    def unroutable(self, reason: str, peer: str | None, problem: str) -> None:
        """Count and log a sender that was turned away before the relay could read a request."""
        self._refusals.note_unroutable(reason, peer, problem)

    async def retry(self, kept: RefusedRequest) -> Response:
        """Handle a kept request as if its sender had just been verified, and return the source's reply.

        Raises:
            AlreadyRetried: it became an event before, on this node or on another one.
            Refusal: it is refused again.
            RelayError: it cannot be handled again.
        """
        match = self._routes.find(kept.target.partition("?")[0], kept.method)
        mount, handler = match.mount, match.handlers.get(kept.method)
        if mount.name != kept.source or handler is None:
            raise NotFound(f"{kept.source} no longer has a route for {kept.method} on this path")
        incoming = incoming_of(kept, mount.config.prefix, match.params)
        call = _Call(None, self._clock.steady(), match, incoming, retry_of=kept.id)
        return await self._accept(call, handler)

    def _answer_unowned(self, request: Request, path: str, refusal: Refusal) -> Response:
        """Answer and keep a request on a path that no source owns."""
        response = self._refusals.answer_unowned(request, path, refusal)
        if response.status in REFUSING:
            remote = self._sender_address.of(request.remote, request.headers)
            self.refused.note(None, request, refusal, response.status, remote=remote)
        return response

    async def _serve(self, call: _Call, request: Request) -> Response:
        """Verify the sender, read the body, and let the source handle the request."""
        match, incoming = call.match, call.incoming
        mount, admission, budget = match.mount, self.admission, self._budget
        config = mount.config
        handler = match.handlers.get(incoming.method)
        if handler is None:
            return _answer_other_method(match, incoming)
        if mount.is_screened:
            _screen(mount, incoming)
        is_late = admission.draining  # a body that began to arrive before the drain may still end
        # Before the body, if the head is enough: a stranger's body takes no memory.
        if not mount.needs_body and (response := _verify(call)) is not None:
            return self._log_answered(call, response)
        hold: Hold | None = None
        body = _read_whole(request, config.max_body, budget)
        try:
            if body is None:
                hold = budget.hold(lambda: self._sender_of(request, mount))
                incoming = await self._read(request, mount, incoming, hold)
            else:
                incoming = msgspec.structs.replace(incoming, body=body, received_at=self._clock.wall())
            call.incoming = incoming
            if mount.needs_body and (response := _verify(call)) is not None:
                return self._log_answered(call, response)
            if is_late or admission.disk_full or mount.paused or config.rate_limit is not None:
                admission.check(mount, incoming, late=is_late)
            return await self._accept(call, handler)
        finally:
            if hold is not None:
                hold.release()
            elif body is not None:
                budget.used -= len(body)

    async def _read(self, request: Request, mount: Mount, incoming: Incoming, hold: Hold) -> Incoming:
        """Read a large, slow or compressed body; raises as `read_body` and `decompress`."""
        header = ", ".join(request.headers.getall("Content-Encoding", ()))
        limit = mount.config.max_body
        encoding = encoding_of(header) if mount.source.decompresses else _no_encoding(header)
        body = received = await read_body(request, limit, self.patience, hold)
        if encoding:
            body = await decompress(received, encoding, limit, hold)
        return msgspec.structs.replace(
            incoming,
            body=body,
            compressed=received if encoding else None,
            received_at=self._clock.wall(),
        )

    async def _accept(self, call: _Call, handler: Handle) -> Response:
        """Call the source's handler for a verified request, store the result, and return the reply."""
        incoming, mount = call.incoming, call.match.mount
        verbose = log.isEnabledFor(logging.DEBUG)  # once: at `info`, log lines cost nothing else
        accepted = ask(handler, incoming)
        if not isinstance(accepted, Accepted) or accepted.events:
            return await self._accept_other(call, accepted)
        event, change, headers = accepted.event, accepted.worker, incoming.headers
        if change is not None and mount.checks_changes:
            change = check_change(change)
        stored = None if event is None else make_event(mount, event, incoming, incoming.received_at)
        given = headers.get("X-Request-Id")
        traced = None if given is None else given_id(given)
        if verbose and traced is None:
            traced = new_id(REQUEST, self._clock.wall())  # log lines of the event's attempts carry it, too
        # The reply is rendered before the append: if the plugin fails, the sender gets a 500 and nothing is
        # stored. It is sent after the commit.
        expected = Receipt() if stored is None else Receipt(event_id=stored.public_id)
        response = answer(accepted, expected)
        key: str | None = None
        if event is not None and (event.key or "Idempotency-Key" in headers or "webhook-id" in headers):
            key = _key(event, incoming)
        acceptance = Acceptance(
            source=mount.name,
            event=stored,
            key=key,
            path=mount.config.prefix + incoming.path,
            is_key_alone=mount.config.key_conflict == "duplicate",
            rejects_conflict=mount.config.key_conflict == "reject",
            change=change,
            returns_worker=accepted.asks,
            request_id=traced,
            retry_of=call.retry_of,
        )
        receipt, on_heard = await self._append(acceptance, call.request)
        try:
            self._count(mount, acceptance, receipt)
            if receipt != expected:
                response = answer_again(accepted, receipt, response)
            response.event_id = receipt.event_id
            if verbose:
                self._log_accepted(call, acceptance, response, receipt)
        except BaseException:
            if on_heard is not None:
                on_heard(False)  # noqa: FBT003 - it takes nothing else
            raise
        if receipt.sent:
            on_heard = self._workers.requeue_unheard(receipt.sent, on_heard)
        response.on_heard = on_heard
        return response

    async def _accept_other(self, call: _Call, accepted: object) -> Response:
        """Return the reply to a request without an event, or store the events of a request with several."""
        if isinstance(accepted, Accepted):
            return await self._accept_all(call, accepted)
        if not isinstance(accepted, Reply):
            raise PluginFailed from TypeError(f"a handler returned {type(accepted).__name__}")
        return self._log_answered(call, answer(Accepted(reply=accepted), Receipt()))

    async def _accept_all(self, call: _Call, accepted: Accepted) -> Response:
        """Store the events of one request in one transaction, and return the reply."""
        incoming, mount, events = call.incoming, call.match.mount, accepted.events
        if accepted.event is not None or accepted.worker is not None:
            raise PluginFailed from TypeError(
                "a handler returned `events` together with an event or a worker"
            )
        if not isinstance(events, Sequence):
            raise PluginFailed from TypeError(f"a handler returned `events` as {type(events).__name__}")
        if len(events) > MOST_EVENTS:
            raise TooLarge(f"More than {MOST_EVENTS:,} events in one request")
        verbose = log.isEnabledFor(logging.DEBUG)
        request_id = given_id(incoming.headers.get("X-Request-Id"))
        if verbose and request_id is None:
            request_id = request_id_of(self._clock, incoming)
        has = len(incoming.body) + (0 if incoming.compressed is None else len(incoming.compressed))
        extra = Extra(self._budget, has)
        try:
            acceptances = await _acceptances_of(call, events, extra, request_id)
            each = tuple([Receipt(event_id=a.event.public_id) for a in acceptances if a.event is not None])
            expected = Receipt(event_id=each[0].event_id, each=each)
            response = answer(accepted, expected)
            receipt, on_heard = await self._append(acceptances[0], call.request, incoming, acceptances)
        finally:
            extra.release()
        try:
            for acceptance, own in zip(acceptances, receipt.each, strict=True):
                self._count(mount, acceptance, own)
                if verbose:
                    self._log_accepted(call, acceptance, response, own)
            if receipt != expected:
                response = answer_again(accepted, receipt, response)
            response.event_id = receipt.event_id
            sent = Sent(incoming.received_at, response.status, self._clock.steady() - call.began)
            self.replies.note([own.event_id for own in receipt.each[1:MOST_SHARED]], sent)
        except BaseException:
            if on_heard is not None:
                on_heard(False)  # noqa: FBT003 - it takes nothing else
            raise
        response.on_heard = on_heard
        return response

    async def _append(
        self,
        acceptance: Acceptance,
        request: Request | None = None,
        incoming: Incoming | None = None,
        batch: Sequence[Acceptance] = (),
    ) -> tuple[Receipt, OnHeard | None]:
        """Store an acceptance, unless its event repeats a request whose sender disconnected too early.

        A request with several events is its `batch` of acceptances, of which `acceptance` is the first.

        Returns:
            The receipt; and for an event a function that must be called once it is known whether the sender
            has received the answer.
        """
        event, change, replies = acceptance.event, acceptance.change, self._unheard_replies
        if change is not None and len(change.worker_id) > LONGEST_ID:
            check_length(change.worker_id, "worker_id")
        first: Receipt | None = None
        entry = None
        if event is not None and request is not None:
            if incoming is None:
                mark = fingerprint(request.target, event, acceptance.key)
            else:
                mark = fingerprint_all(request.target, incoming.body, batch)
            first = await replies.first(mark)
            entry = replies.begin(mark, lambda: request.may_be_gone)
        try:
            if first is None:
                receipt = await (
                    self._store.events.append_all(batch) if batch else self._store.events.append(acceptance)
                )
            else:
                receipt = first
                with suppress(Refusal, StorageError):  # only a count: the events that it repeats are durable
                    await self._store.events.append_all(
                        [
                            Acceptance(source=each.source, event=each.event, repeats=of.event_id)
                            for each, of in zip(batch or [acceptance], first.each or [first], strict=True)
                        ]
                    )
        except BaseException as error:
            if entry is not None:
                replies.end(mark, entry, first, gone=True)
            if isinstance(error, StorageUnavailableError):
                raise StorageDown from error
            if isinstance(error, StorageError):
                raise PluginFailed from error
            raise
        if entry is None:
            return receipt, None
        end, received_at = replies.end, acceptance.event.received_at if acceptance.event else 0
        return (
            receipt,
            lambda heard: (
                end(mark, entry, receipt, gone=False)
                if heard
                else self._end_unheard(mark, entry, receipt, received_at)
            ),
        )

    def _end_unheard(self, mark: Fingerprint, entry: Entry, receipt: Receipt, received_at: int) -> None:
        """Note the end of a request whose sender did not receive the reply."""
        self._unheard_replies.end(mark, entry, receipt, gone=True)
        self.replies.lose([each.event_id for each in receipt.each] or [receipt.event_id], received_at)

    def _sender_of(self, request: Request, mount: Mount) -> tuple[str, bool]:
        """Return the sender's address, and whether the sender is verified before its body is read."""
        is_known = not mount.needs_body and not mount.is_open
        return self._sender_address.of(request.remote, request.headers), is_known

    def _count(self, mount: Mount, acceptance: Acceptance, receipt: Receipt) -> None:
        """Count an accepted request, and warn about an odd one."""
        counters, change = self.counters[mount.name], acceptance.change
        if isinstance(change, Heartbeat):
            counters.heartbeats.inc()
        elif isinstance(change, Register):
            self._workers.warn_of_odd(mount, change)
        if acceptance.event is None:
            return
        if receipt.duplicate:
            counters.duplicates.inc()
            return
        counters.received.inc()
        counters.last_event = acceptance.event.received_at
        counters.bytes.inc(len(acceptance.event.body))
        if receipt.key_conflict:
            counters.key_conflicts.inc()
            key = (acceptance.key or "")[:LONGEST_SHOWN]
            self._log.warning(
                f"{mount.name}: key conflict",
                f"{mount.name}: the idempotency key {key!r} was used before for another request; stored as a"
                f' new event. To refuse such requests set [sources.{mount.name}] key_conflict = "reject"',
                source=mount.name,
                event_id=receipt.event_id,
            )

    def _log_answered(self, call: _Call, response: Response) -> Response:
        """Log a request that stores nothing, at level debug, and return its response."""
        if log.isEnabledFor(logging.DEBUG):
            request_id = request_id_of(self._clock, call.incoming)
            answered = Acceptance(source=call.match.mount.name, request_id=request_id)
            self._log_accepted(call, answered, response)
        return response

    def _log_accepted(
        self, call: _Call, acceptance: Acceptance, response: Response, receipt: Receipt | None = None
    ) -> None:
        """Log an accepted request at level debug, just before its answer is sent."""
        described = fields(
            request_id=acceptance.request_id or request_id_of(self._clock, call.incoming),
            source=acceptance.source,
            type=acceptance.event.type if acceptance.event else None,
            event_id=(receipt.event_id or None) if receipt else None,
            status=response.status,
            duration_ms=round((self._clock.steady() - call.began) / 1000, 1),
        )
        is_repeated = receipt is not None and receipt.duplicate
        log.debug(
            "%s: %s", acceptance.source, "accepted again" if is_repeated else "accepted", extra=described
        )


class Counters:
    """One source's metrics, looked up once: a look-up costs three times as much as counting."""

    def __init__(self, metrics: Metrics, source: str) -> None:
        self.received = metrics.received.labels(source)
        self.bytes = metrics.bytes.labels(source)
        self.duplicates = metrics.duplicates.labels(source)
        self.key_conflicts = metrics.key_conflicts.labels(source)
        self.heartbeats = metrics.heartbeats.labels(source)
        self.seconds = metrics.ingest.labels(source)
        self.slowest = self.slowest_until = 0  # of the latest exemplar; microseconds, steady clock
        self.last_event: int | None = None  # time of the latest event since the start, wall clock


def _answer_other_method(match: Match, incoming: Incoming) -> Response:
    """Answer a browser's preflight.

    Raises:
        MethodNotAllowed: the request is not a preflight, or the source has no `cors_origins`.
    """
    if incoming.method == "OPTIONS" and match.mount.config.cors_origins:
        return preflight(match.handlers)
    raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))


def _screen(mount: Mount, incoming: Incoming) -> None:
    """Check the head of a request to a source that accepts every sender or checks heads in its own code."""
    check_origin(mount, incoming)
    ask(mount.source.screen, incoming)


def _verify(call: _Call) -> Response | None:
    """Check the sender; returns the response to a handshake, which needs no verified sender."""
    mount, incoming = call.match.mount, call.incoming
    if mount.has_handshake:
        reply = ask(mount.source.handshake, incoming)
        if isinstance(reply, Reply):
            return answer(Accepted(reply=reply), Receipt())
        if reply is not None:
            raise PluginFailed from TypeError(f"a handshake returned {type(reply).__name__}")
    ask(mount.source.verify, incoming)
    call.verified = True
    return None


def _key(event: Event, incoming: Incoming | None) -> str | None:
    """Return the idempotency key: the source handler's, else the `Idempotency-Key` or `webhook-id` header.

    A header belongs to the whole request, so it is not used for a request with several events.

    Raises:
        PluginFailed: the handler's key is not text.
    """
    key = event.key
    if not key and incoming is not None:
        key = incoming.header("Idempotency-Key") or incoming.header("webhook-id")
    if not key:
        return None
    if not isinstance(key, str):
        raise PluginFailed from TypeError(f"a handler returned a key that is {type(key).__name__}, not str")
    text = key.encode("utf-8", "surrogatepass")
    if len(key) > LONGEST_KEY or (event.key and not key.isprintable()):
        return f"sha256:{hashlib.sha256(text).hexdigest()}"
    return key


async def _acceptances_of(
    call: _Call, events: Sequence[Event], extra: Extra, request_id: str | None
) -> list[Acceptance]:
    """Return the acceptances of a request with several events; `extra` reserves the memory that they take.

    Yields to other requests after each millisecond.

    Raises:
        TooLarge: the events are larger together than the relay stores at once.
        Overloaded: other requests use the memory.
        Invalid: an event is invalid; `field` has its position.
        PluginFailed: as `make_event`.
    """
    mount, incoming = call.match.mount, call.incoming
    acceptances, size, most = [], 0, MOST_COPIES * mount.config.max_body
    due = time.monotonic() + TURN
    for at, event in enumerate(events):
        try:
            stored = make_event(mount, event, incoming, incoming.received_at, is_item=True)
        except Invalid as refusal:
            refusal.field = f"events[{at}]{'.' if refusal.field else ''}{refusal.field}"
            raise
        needed = len(stored.data) + len(stored.context)
        size += needed
        if size > most:
            raise TooLarge("The events of this request are too large in total")
        extra.take(needed + EVENT_BYTES)
        acceptances.append(
            Acceptance(
                source=mount.name,
                event=stored,
                key=_key(event, None) if event.key else None,
                path=mount.config.prefix + incoming.path,
                is_key_alone=mount.config.key_conflict == "duplicate",
                rejects_conflict=mount.config.key_conflict == "reject",
                request_id=request_id,
                retry_of=call.retry_of if at == 0 else None,
            )
        )
        if time.monotonic() > due:
            await asyncio.sleep(0)
            due = time.monotonic() + TURN
    return acceptances


def _no_encoding(header: str) -> str:
    """Raise UnsupportedEncoding for every `Content-Encoding` but identity."""
    if header.strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding
    return ""


def _read_whole(request: Request, limit: int, budget: Budget) -> bytes | None:
    """Return a small body that arrived with its head (the usual case), or None if `read_body` must read it.

    Its length is added to `budget.used`, and the caller must subtract it again.

    Raises:
        TooLarge, Overloaded: as `read_body`.
    """
    content, headers = request.content, request.headers
    if "Content-Encoding" in headers or not content.is_eof() or content.total_bytes > SMALL:
        return None
    if content.exception() is not None:
        return None
    body: bytes = content.read_nowait()
    if len(body) > limit or (not body and request.content_length > limit):  # the parser skips 2**64 - 1
        raise TooLarge
    if budget.used + len(body) > budget.limit:
        raise Overloaded
    budget.used += len(body)
    return body
