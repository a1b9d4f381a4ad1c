"""Keeps refused requests for operators, without tokens, and handles a kept request again.

Requests that the sender repeats anyway (429, 503) are not kept. The body is kept only if the sender was
authenticated: otherwise strangers could fill the disk or plant data on it.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import parse_qsl, urlencode

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from relay.base.clock import SECOND, Clock
from relay.base.ids import REFUSED, new_id
from relay.base.rate import TokenBucket
from relay.base.threads import in_thread
from relay.base.units import Rate
from relay.config.schema import RefusedConfig
from relay.config.secrets import Credential, Secret, Secrets, digest
from relay.errors import RateLimited, Refusal, RelayError, Unauthenticated, Unavailable
from relay.ingest.request import Request
from relay.ingest.routes import Mount
from relay.model import Finding, RefusedRequest
from relay.source import Incoming
from relay.store import Refused

log = logging.getLogger("relay.ingest")

EVERY = 1.0
"""Seconds between two writes of refused requests."""

PRUNE_EVERY = 60 * SECOND

MASK = "<token>"

MOST_WAITING = 256
"""Refused requests that wait to be written; further ones are only counted and logged."""

MOST_WAITING_BYTES = 4 * 2**20
"""Bytes of the bodies of these requests."""

DIAGNOSIS_SHARE = 2
"""Bodies are diagnosed only while waiting bodies use at most 1 / `DIAGNOSIS_SHARE` of these bytes."""

RATE = Rate(count=10, seconds=1)
"""Kept requests of verified senders, for each source and reason: a faulty client repeats one mistake."""

STRANGERS = Rate(count=10, seconds=60)
"""Kept requests of strangers, for each source and reason: scanners must not displace those of senders."""

LONGEST_TARGET = 1024  # characters of path and query
LONGEST_HEADER = 1024  # characters of a header's value
MOST_HEADERS = 64
BODY_SHARE = 8
"""A body larger than this share of `max_size` is not kept."""

MOST_DIAGNOSED = 64 * 1024
"""Maximum number of bytes of a body that is diagnosed, because the diagnosis tries variants of the body."""

PATIENCE = 10.0  # seconds to wait for one diagnosis of all waiting requests

_SENSITIVE = re.compile(r"auth|cookie|token|secret|passw|api-?_?key|credential", re.IGNORECASE)
_DROPPED = {"content-length", "transfer-encoding", "connection", "expect", "content-encoding"}
"""Headers that describe the transfer, not the request: a retry has the decompressed body."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A refused request with its tokens and its body, which only the diagnosis gets."""

    source: str | None  # None: no source owns the path
    path: str  # with the source's prefix
    refusal: Refusal
    incoming: Incoming
    is_cut: bool  # whether the body is left out because it is too large


Explain = Callable[[Sequence[Case]], Sequence[tuple[Finding, ...]]]
"""Returns why each request was refused; called in a thread."""


class RefusedRequests:
    """The kept requests, in memory until the next write."""

    every = EVERY

    def __init__(
        self, store: Refused, clock: Clock, *, is_full: Callable[[], bool], explain: Explain | None = None
    ) -> None:
        """Keep nothing yet.

        Args:
            store: keeps the requests.
            clock: of the daemon.
            is_full: returns whether the disk has no room for senders.
            explain: makes the diagnoses; None: no diagnoses.
        """
        self._store = store
        self._clock = clock
        self._is_full = is_full
        self._explain = explain
        self._writing = asyncio.Lock()
        self._config = RefusedConfig()
        self._tokens: frozenset[bytes] = frozenset()  # digests of all configured tokens
        self._waiting: list[tuple[RefusedRequest, Case | None]] = []
        self._bytes = 0
        self._buckets: dict[tuple[str | None, str, bool], TokenBucket] = {}
        self._pruned_at = 0

    def mount(self, mounts: Iterable[Mount], config: RefusedConfig) -> None:
        """Apply a configuration."""
        self._config = config
        self._tokens = frozenset(token for mount in mounts for token in tokens_of(mount.source))
        self._buckets.clear()

    def note(
        self,
        mount: Mount | None,
        request: Request,
        refusal: Refusal,
        status: int,
        *,
        remote: str,
        incoming: Incoming | None = None,
        verified: bool = False,
    ) -> None:
        """Keep a refused request, unless the sender repeats it anyway.

        Args:
            mount: the source; None: no source owns the path.
            request: its head.
            refusal: the reason.
            status: of the response.
            remote: the sender's address.
            incoming: the request as the source saw it, with its body if that was read.
            verified: whether the source had verified the sender.
        """
        config, name = self._config, None if mount is None else mount.name
        if isinstance(refusal, Unavailable | RateLimited) or not config.max_size or self._is_full():
            return
        if (mount is not None and not mount.config.keep_refused) or len(self._waiting) >= MOST_WAITING:
            return
        authenticated, now = verified and mount is not None and not mount.is_open, self._clock.steady()
        key = (name, refusal.reason, authenticated)
        if (bucket := self._buckets.get(key)) is None:
            bucket = TokenBucket(RATE if authenticated else STRANGERS, now, burst=RATE.count)
            self._buckets[key] = bucket
        if bucket.take(now):
            return
        received = b"" if incoming is None else incoming.body
        body = received if authenticated and self._has_room(len(received)) else None
        problem = refusal.detail if not refusal.note else f"{refusal.detail}: {refusal.note}"
        if isinstance(refusal, Unauthenticated):
            problem = f"{problem} ({refusal.problem})"
        wall = self._clock.wall()
        case = self._case(name, request, refusal, incoming)
        self._bytes += max(len(body or b""), 0 if case is None else _size(case.incoming))
        kept = RefusedRequest(
            id=new_id(REFUSED, wall),
            at=wall,
            source=name,
            reason=refusal.reason if mount is not None else "path",
            status=status,
            problem=problem if mount is not None else "no source owns this path",
            field=refusal.field,
            method=request.method,
            target=_clean(self._masked_target(request.target, authenticated=authenticated)),
            headers=self._masked_headers(request.headers),
            remote=remote,
            size=len(received) or request.content_length,
            body=body,
        )
        self._waiting.append((kept, case))

    def _case(
        self, source: str | None, request: Request, refusal: Refusal, incoming: Incoming | None
    ) -> Case | None:
        """Return a request for the diagnosis; None if the daemon makes no diagnoses."""
        if self._explain is None:
            return None
        path = request.target.partition("?")[0]
        if incoming is None:
            incoming = Incoming(method=request.method, path=path, headers=request.headers)
        size = _size(incoming)
        is_cut = size > MOST_DIAGNOSED or self._bytes + size > MOST_WAITING_BYTES // DIAGNOSIS_SHARE
        if is_cut:
            incoming = msgspec.structs.replace(incoming, body=b"", compressed=None)
        _forget_frames(refusal)
        return Case(source=source, path=path, refusal=refusal, incoming=incoming, is_cut=is_cut)

    async def run(self) -> None:
        """Write the waiting requests and delete old ones, as a periodic job."""
        await self._write()
        now = self._clock.steady()
        if now - self._pruned_at >= PRUNE_EVERY:
            self._pruned_at = now
            before = self._clock.wall() - int(self._config.keep * SECOND)
            await self._store.prune(before, int(self._config.max_size))

    async def flush(self) -> None:
        """Write the waiting requests before a list is read or the daemon stops; a failure is only logged."""
        try:
            await self._write()
        except Exception as error:  # noqa: BLE001 - of the database engine, which may have failed altogether
            log.warning("refused requests could not be kept: %s", error)

    async def _write(self) -> None:
        async with self._writing:  # a list that is read meanwhile waits for this diagnosis
            waiting, size = self._waiting, self._bytes
            self._waiting, self._bytes = [], 0
            if not waiting or self._is_full():
                return
            try:
                diagnosed = await self._diagnosed(waiting)
            except asyncio.CancelledError:  # the daemon stops, and writes them before its end
                self._waiting, self._bytes = waiting + self._waiting, size + self._bytes
                raise
            await self._store.add(diagnosed)

    async def _diagnosed(self, waiting: Sequence[tuple[RefusedRequest, Case | None]]) -> list[RefusedRequest]:
        """Return the requests with their findings, or without findings if the diagnosis fails."""
        cases = [case for _, case in waiting if case is not None]
        found: Sequence[tuple[Finding, ...]] = ()
        if self._explain is not None and cases:
            try:
                async with asyncio.timeout(PATIENCE):
                    found = await in_thread("diagnosis", _diagnose, self._explain, cases)
            except TimeoutError:
                self._explain = None
                log.error("the diagnosis of refused requests hangs; restart the daemon to enable it again")  # noqa: TRY400 - the traceback is the timer's
            except Exception:
                log.exception("the diagnosis of refused requests failed")
        findings = iter(found)
        return [
            request if case is None else msgspec.structs.replace(request, findings=next(findings, ()))
            for request, case in waiting
        ]

    def _has_room(self, size: int) -> bool:
        return size <= self._config.max_size // BODY_SHARE and self._bytes + size <= MOST_WAITING_BYTES

    def _is_token(self, value: str) -> bool:
        """Return whether a value is a configured token, alone or after the name of a scheme."""
        parts = {value.strip(), value.strip().rpartition(" ")[2]}
        return any(digest(part.encode("utf-8", "surrogateescape")) in self._tokens for part in parts)

    def _masked_headers(self, headers: CIMultiDictProxy[str]) -> tuple[tuple[str, str], ...]:
        kept = []
        for name, value in list(headers.items())[:MOST_HEADERS]:
            if name.lower() in _DROPPED:
                continue
            is_secret = _SENSITIVE.search(name) or self._is_token(value)
            text = MASK if is_secret else value[:LONGEST_HEADER]
            kept.append((_clean(name), _clean(text)))
        return tuple(kept)

    def _masked_target(self, target: str, *, authenticated: bool) -> str:
        """Return path and query; values of a stranger's query may be misspelt tokens."""
        path, mark, query = target.partition("?")
        if not mark:
            return path[:LONGEST_TARGET]
        fields = []
        for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
            is_secret = not authenticated or _SENSITIVE.search(name) or self._is_token(value)
            fields.append((name, MASK if value and is_secret else value))
        return f"{path}?{urlencode(fields, safe='<>', errors='replace')}"[:LONGEST_TARGET]


def _diagnose(explain: Explain, cases: Sequence[Case]) -> Sequence[tuple[Finding, ...]]:
    try:
        return explain(cases)
    except TimeoutError as error:  # raised by a plugin; the diagnosis itself did not time out
        raise RuntimeError("a plugin timed out") from error


def _size(incoming: Incoming) -> int:
    return len(incoming.body) + len(incoming.compressed or b"")


def _forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception: their frames would keep whole bodies in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _clean(text: str) -> str:
    """Return a text of a head, with invalid UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def tokens_of(source: object) -> Iterable[bytes]:
    """Yield the digests of all tokens and secrets in the settings of a source."""
    for name in getattr(source, "__struct_fields__", ()):
        yield from _digests(getattr(source, name))


def _digests(value: object) -> Iterable[bytes]:
    if isinstance(value, Secret):
        yield digest(value.reveal().strip().encode())
    elif isinstance(value, Credential):
        yield value.digest
    elif isinstance(value, Secrets | tuple | list):
        for each in value:
            yield from _digests(each)
    elif isinstance(value, msgspec.Struct):
        yield from tokens_of(value)


def incoming_of(request: RefusedRequest, prefix: str, params: Mapping[str, str]) -> Incoming:
    """Return a kept request in the form that its source gets.

    Raises:
        RelayError: its body was not kept.
    """
    if request.body is None:
        raise RelayError(
            f"{request.id} was kept without its body: its sender was not authenticated, or it is large",
            hint="let the sender send it again",
        )
    path, _, query = request.target.partition("?")
    return Incoming(
        method=request.method,
        path=path.removeprefix(prefix),
        headers=CIMultiDictProxy(CIMultiDict(request.headers)),
        body=request.body,
        params=params,
        query=query,
        target=request.target,
        received_at=request.at,
        find_remote=lambda: request.remote,
    )
