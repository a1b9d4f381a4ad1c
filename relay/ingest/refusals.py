"""Refused requests: counted, logged, and answered in the envelope of the source or in the relay's own."""

from typing import Any

import msgspec

from relay.base.clock import Clock
from relay.base.ids import REQUEST, given_id, new_id
from relay.base.text import printable
from relay.errors import (
    REASONS,
    KeyConflict,
    MethodNotAllowed,
    NotFound,
    PluginFailed,
    Refusal,
    Unauthenticated,
)
from relay.ingest.replies import Response, health, plain, refuse
from relay.ingest.request import Request
from relay.ingest.routes import Mount, Routes
from relay.ingest.sender_address import SenderAddress
from relay.metrics import Metrics
from relay.process.logs import RateLimitedLog
from relay.source import Incoming

LONGEST_SHOWN = 64  # characters of a sender's text in the log
LONGEST_READ = 64 * 1024  # bytes; a larger refused body is not searched for its type


class Refusals:
    """Answers requests that the relay or a source refuses."""

    def __init__(self, clock: Clock, metrics: Metrics, log: RateLimitedLog) -> None:
        self._clock = clock
        self._metrics = metrics
        self._log = log

    def mount(self, routes: Routes, sender_address: SenderAddress) -> None:
        """Replace the routes, which are compared with unknown paths."""
        self._routes = routes
        self._sender_address = sender_address

    def answer(self, mount: Mount, refusal: Refusal, incoming: Incoming, peer: str | None) -> Response:
        """Count and log a refused request, and render the source's answer."""
        reason = refusal.reason if refusal.reason in REASONS else PluginFailed.reason  # a plugin's own class
        self._metrics.rejected.labels(mount.name, reason).inc()
        if isinstance(refusal, KeyConflict):
            self._metrics.key_conflicts.labels(mount.name).inc()
        request = request_id_of(self._clock, incoming)
        if isinstance(refusal, PluginFailed):
            self._metrics.plugin_errors.labels(mount.config.plugin).inc()
            self._log_failure(mount, incoming, refusal.__cause__, request)
        try:
            response = refuse(mount, refusal, incoming)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything; the sender gets an answer
            self._log_failure(mount, incoming, error, request)
            response = plain(refusal)
        what = f"{mount.name}: refused with {response.status}, {reason}"
        if self._log.is_due(what):
            sender = self._sender_address.of(peer, incoming.headers)
            type_ = type_of(incoming)
            of = sender if type_ is None else f"type {type_}, from {sender}"
            self._log.info(
                what,
                printable(f"{what}: {self._problem_of(mount, refusal, incoming)} ({of})"),
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

    def _problem_of(self, mount: Mount, refusal: Refusal, incoming: Incoming) -> str:
        """Return the fault of a refused request."""
        if not isinstance(refusal, NotFound | MethodNotAllowed):
            return f"{refusal.detail}: {refusal.note}" if refusal.note else refusal.detail
        hint = self._hint(mount.config.prefix + incoming.path) if isinstance(refusal, NotFound) else ""
        return f"{refusal.detail}: {incoming.method} {incoming.path[:LONGEST_SHOWN]}{hint}"

    def _log_failure(
        self, mount: Mount, incoming: Incoming, error: BaseException | None, request: str
    ) -> None:
        line = f"{mount.name}: {incoming.method} {incoming.path} failed"
        self._log.error(f"{mount.name}: failed", line, error, request_id=request, source=mount.name)

    def answer_unowned(self, request: Request, path: str, refusal: Refusal) -> Response:
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
            self._log_unroutable(reason, sender, f"{shown}: {problem}")
        return plain(refusal)

    def note_unroutable(self, reason: str, peer: str | None, problem: str) -> None:
        """Count and log a sender that was turned away before the relay could read a request."""
        self._metrics.unroutable.labels(reason).inc()
        self._log_unroutable(reason, peer or "unknown", problem)

    def _log_unroutable(self, reason: str, sender: str, problem: str) -> None:
        key = f"unroutable: {reason}"
        self._log.info(key, f"{key}: {printable(problem)} ({sender})", reason=reason, remote=sender)

    def _hint(self, path: str) -> str:
        nearest = self._routes.nearest(path)
        return "" if nearest is None else f"; did you mean {nearest}?"


def request_id_of(clock: Clock, incoming: Incoming) -> str:
    """Return the id of a request: the sender's own, else a new one."""
    return given_id(incoming.headers.get("X-Request-Id")) or new_id(REQUEST, clock.wall())


def type_of(incoming: Incoming) -> str | None:
    """Return the event type of a refused request, for the log; None if it has no readable type.

    For every source, this reads the header and the fields in which known senders write the type.
    """
    found: Any = incoming.header("X-Event-Type")
    if not found and len(incoming.body) <= LONGEST_READ:
        try:
            body = msgspec.json.decode(incoming.body, type=dict[str, msgspec.Raw])
            names = (name for name in ("event_type", "event", "type", "name") if name in body)
            found = msgspec.json.decode(next((body[name] for name in names), b"null"))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
    return found[:LONGEST_SHOWN] if isinstance(found, str) and found else None
