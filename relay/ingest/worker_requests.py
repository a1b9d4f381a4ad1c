"""Signs of life and lost replies of workers, in addition to the changes that their requests make."""

import asyncio
from contextlib import suppress
from typing import get_args

from relay.errors import Overloaded, RateLimited, Refusal, StorageError, StorageUnavailableError, Unavailable
from relay.ingest.admission import check_change, worker_change_of
from relay.ingest.refusals import LONGEST_SHOWN
from relay.ingest.replies import OnHeard, ask
from relay.ingest.request import Request
from relay.ingest.routes import Match, Mount
from relay.model import Command, Heartbeat, Register, WorkerChange, WorkerStatus
from relay.process.logs import RateLimitedLog
from relay.source import Incoming, Source, check_length
from relay.store import Acceptance, Store
from relay.workers.rules import ENVIRONMENTS, changes_a_path

STORAGE_PAUSE = 1.0  # seconds between attempts to requeue commands while the storage is unavailable

_STATUSES = get_args(WorkerStatus)


class WorkerRequests:
    """Records signs of life in refused requests, and queues the commands of a lost reply again."""

    def __init__(self, store: Store, log: RateLimitedLog) -> None:
        self._store = store
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    def overhear(self, match: Match, request: Request) -> None:
        """Note the sign of life in a request whose connection was turned away."""
        path, _, query = request.target.partition("?")
        incoming = Incoming(
            method=request.method,
            path=path.removeprefix(match.mount.config.prefix),
            headers=request.headers,
            params=match.params,
            query=query,
        )
        self._note_refused(match, incoming, Overloaded())

    async def note_sign_of_life(self, match: Match, incoming: Incoming, refusal: Refusal) -> None:
        """Record that the worker of a refused request is alive or unregisters.

        A heartbeat of an OFFLINE worker is stored if the relay refused it only because of its body.
        """
        change = self._note_refused(match, incoming, refusal)
        if change is not None:
            with suppress(Refusal, StorageError):
                check_length(change.worker_id, "worker_id")
                receipt = await self._store.events.append(Acceptance(source=match.mount.name, change=change))
                if receipt.sent:  # commands need a reply that carries them
                    self._requeue(receipt.sent)

    def _note_refused(self, match: Match, incoming: Incoming, refusal: Refusal) -> Heartbeat | None:
        """Note in memory that a refused request's worker is alive or unregisters, unless the token is wrong.

        Returns the heartbeat of an OFFLINE worker, to be stored, if the request itself caused the refusal.
        """
        name, source, workers = match.mount.name, match.mount.source, self._store.workers
        if self._store.failure is None and not any(workers.count(name, each) for each in _STATUSES):
            return None  # the source has no workers
        change: WorkerChange | None = None
        with suppress(Refusal):
            ask(source.verify, incoming)  # it may not have run yet; for a token, the head is enough
            if type(source).sign_of_life is not Source.sign_of_life:
                change = worker_change_of(match.mount, incoming)
            elif isinstance(refusal, Unavailable | RateLimited) and incoming.method in match.handlers:
                change = getattr(ask(match.handlers[incoming.method], incoming), "worker", None)
                if change is not None and match.mount.checks_changes:
                    change = check_change(change)
        if change is None:
            return None
        status = workers.note_refused(name, change)
        is_ours = isinstance(refusal, Unavailable | RateLimited)
        return change if status == "OFFLINE" and isinstance(change, Heartbeat) and not is_ours else None

    def requeue_unheard(self, commands: tuple[Command, ...], then: OnHeard | None) -> OnHeard:
        """Return a function that queues a worker's commands again if the worker did not receive its reply."""

        def on_heard(heard: bool) -> None:  # noqa: FBT001 - called by the connection, with this alone
            if not heard:
                self._requeue(commands)
            if then is not None:
                then(heard)

        return on_heard

    def _requeue(self, commands: tuple[Command, ...]) -> None:
        """Queue a worker's commands again, in the background and until the storage takes them."""

        async def requeue() -> None:
            while True:
                try:
                    await self._store.workers.change(lambda fleet: fleet.requeue(commands))
                except StorageUnavailableError:
                    await asyncio.sleep(STORAGE_PAUSE)
                else:
                    return

        task = asyncio.create_task(requeue())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def warn_of_odd(self, mount: Mount, change: Register) -> None:
        """Warn about a worker's id that must be percent-encoded in paths, or its unknown environment."""
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
                f" {change.environment[:LONGEST_SHOWN]!r}; the usual values are {', '.join(ENVIRONMENTS)}",
                source=mount.name,
                worker_id=change.worker_id,
            )
