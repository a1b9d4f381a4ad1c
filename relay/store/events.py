"""Accepted events: append and import them through the writer. An engine adds loads and deletions."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Sequence

from relay.errors import RelayError, StorageUnavailableError
from relay.model import OPERATOR_SOURCE, Expunged, Imported, Receipt, Selection, StoredEvent
from relay.store import EVENT_BYTES, Acceptance, Queries, Span
from relay.store.batch import Batch, Restored
from relay.store.dedupe import KEY_ALONE, Key, identity
from relay.store.export import read_line
from relay.store.workers import StoredWorkers
from relay.store.writer import HasWriter, Job

IMPORT_EVENTS = 100
"""Events that one transaction imports, so that senders' events are not delayed by it."""

IMPORT_BYTES = 8 * 2**20
"""Bytes of bodies of an import in memory at once, unless one event alone is larger."""


class StoredEvents(ABC):
    """`relay.store.Events` without loads and deletions."""

    def __init__(
        self,
        database: HasWriter,
        *,
        queries: Queries,
        workers: StoredWorkers,
    ) -> None:
        self._database = database
        self._queries = queries
        self._workers = workers

    async def append(self, acceptance: Acceptance) -> Receipt:
        """See `Events.append`."""
        if (
            acceptance.change is not None
            and (receipt := self._workers.apply_in_memory(acceptance)) is not None
        ):
            return receipt
        event = acceptance.event
        key = _key_of(acceptance) if acceptance.key else None
        job: Job[Receipt] = Job(
            lambda batch: batch.accept(acceptance, key),
            size=len(event.body) if event is not None else 0,
            keys=() if key is None else (key,),
        )
        if acceptance.retry_of is not None:
            _make_retry(job, acceptance.retry_of)
        if acceptance.change is not None:
            return await self._workers.submit(acceptance.source, acceptance.change, job)
        return await self._database.writer.submit(job, bounded=True)

    async def append_all(self, acceptances: Sequence[Acceptance]) -> Receipt:
        """See `Events.append_all`."""
        keys = [_key_of(each) for each in acceptances]
        job: Job[Receipt] = Job(
            lambda batch: batch.accept_all(acceptances, keys),
            size=sum(
                EVENT_BYTES + len(each.event.body) + len(each.event.context)
                for each in acceptances
                if each.event is not None
            ),
            keys=keys,
        )
        if (retry_of := acceptances[0].retry_of) is not None:
            _make_retry(job, retry_of)
        return await self._database.writer.submit(job, bounded=True)

    @abstractmethod
    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Events.load`."""

    async def pause_source(self, name: str, *, paused: bool) -> None:
        """See `Events.pause_source`."""
        await self._database.writer.submit(Job(lambda batch: batch.pauses.append((name, paused))))

    async def restore(self, events: Sequence[StoredEvent], *, deliver: bool = False) -> tuple[bool, ...]:
        """See `Events.restore`."""
        if not self._database.writer.has_room(sum(len(event.body) for event in events)):
            raise StorageUnavailableError(
                "less than min_free_disk would be free", hint="free disk space, and import again"
            )
        restoring = [Restored(event, deliver) for event in events]

        def apply_(batch: Batch) -> tuple[bool, ...]:
            batch.to_restore += restoring
            return ()

        job = Job(apply_, finish=lambda _batch, _none: tuple(each.done for each in restoring))
        return await self._database.writer.submit(job)

    async def import_lines(
        self, lines: AsyncIterable[bytes], *, deliver: bool = False
    ) -> AsyncIterator[Imported]:
        """See `Events.import_lines`."""
        count, new, size = 0, 0, 0
        waiting: list[StoredEvent] = []
        async for line in lines:
            try:
                event = read_line(line)
            except RelayError as error:
                new += sum(await self.restore(waiting, deliver=deliver))
                raise RelayError(
                    f"line {count + 1}: {error.message}",
                    hint=f"{new} new events before it are stored; correct the line and import the file again"
                    " (stored events are skipped)",
                ) from error
            count, size = count + 1, size + len(event.body)
            waiting.append(event)
            if len(waiting) >= IMPORT_EVENTS or size >= IMPORT_BYTES:
                new += sum(await self.restore(waiting, deliver=deliver))
                waiting, size = [], 0
                yield Imported(lines=count, new=new)
        new += sum(await self.restore(waiting, deliver=deliver))
        yield Imported(lines=count, new=new)

    @abstractmethod
    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """See `Events.expunge`."""

    async def expunge_selected(self, selection: Selection, span: Span) -> AsyncIterator[Expunged]:
        """See `Events.expunge_selected`."""
        async for page in self._queries.select(selection, span):
            yield await self.expunge([chosen.event_id for chosen in page])


def _make_retry(job: Job[Receipt], refused_id: str) -> None:
    """Let a job fail if a refused request became an event before.

    The id of the request is an idempotency key, so that of two nodes that retry it, one stores an event.
    Senders cannot use this key, because no source has the name in it.
    """
    key, accept = Key(OPERATOR_SOURCE, refused_id, KEY_ALONE, KEY_ALONE), job.apply
    job.apply = lambda batch: batch.accept_retry(key, accept)
    job.keys = (*job.keys, key)


def _key_of(acceptance: Acceptance) -> Key | None:
    """Return the idempotency key of an event, or None."""
    event = acceptance.event
    if event is None or not acceptance.key:
        return None
    if acceptance.is_key_alone:
        return Key(acceptance.source, acceptance.key, KEY_ALONE, KEY_ALONE)
    return Key(
        acceptance.source,
        acceptance.key,
        identity(event, acceptance.path),
        event.sha256,
        is_exclusive=acceptance.rejects_conflict,
    )
