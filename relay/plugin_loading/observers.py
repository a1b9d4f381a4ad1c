"""Calls plugins' hooks after each commit, from a bounded queue, in one thread per plugin.

A hook may be slow, hang or raise: neither acknowledgements nor deliveries wait for it.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from relay.base.clock import Clock
from relay.metrics import Metrics
from relay.model import News, Outcome, StoredEvent
from relay.plugin_loading.offered import Observer
from relay.process.logs import RateLimitedLog

log = logging.getLogger("relay.plugins")

ROOM = 32 * 2**20
"""Bytes that may be queued for one plugin; further records are dropped and counted."""

RECORD = 1024
"""Approximate bytes of a record without its body."""

T = TypeVar("T")


class Observers:
    """All plugins with hooks for commits, from `start` to `stop`."""

    def __init__(
        self, observers: Sequence[Observer], *, clock: Clock, metrics: Metrics, room: int = ROOM
    ) -> None:
        self._queues = [_Queue(observer, clock, metrics, room) for observer in observers]

    def start(self) -> None:
        """Start the threads."""
        for queue in self._queues:
            queue.start()

    def listen(self, news: News) -> None:
        """Queue the records of one commit (see `relay.store.Listener`)."""
        for queue in self._queues:
            queue.add(news)

    async def stop(self, seconds: float) -> None:
        """Deliver the queued records within `seconds`; a hanging hook's thread is abandoned."""
        ends = [asyncio.wrap_future(queue.finish()) for queue in self._queues]
        if ends:
            await asyncio.wait(ends, timeout=seconds)
        for queue in self._queues:
            queue.leave()


class _Queue:
    """One plugin's queue and thread: its hooks are never called at the same time."""

    def __init__(self, observer: Observer, clock: Clock, metrics: Metrics, room: int) -> None:
        self._observer = observer
        self._errors = metrics.plugin_errors.labels(observer.plugin)
        self._log = RateLimitedLog(log, clock)
        self._room = room
        self._changed = threading.Condition()
        self._events: list[StoredEvent] = []
        self._outcomes: list[Outcome] = []
        self._size = 0  # bytes of queued records and of those in a hook
        self._count = 0  # number of the same records
        self._stopping = False
        self._end: Future[None] = Future()

    def start(self) -> None:
        # A daemon thread, so that a hanging hook cannot keep the process alive.
        threading.Thread(target=self._run, name=f"plugin {self._observer.plugin}", daemon=True).start()

    def add(self, news: News) -> None:
        """Queue the records that the plugin's hooks take; never blocks for long."""
        events = news.events if self._observer.events_stored is not None else ()
        outcomes: Sequence[Outcome] = ()
        if self._observer.attempts_recorded is not None:
            outcomes = [outcome for outcome in news.outcomes if outcome.attempt is not None]
        count = len(events) + len(outcomes)
        if not count:
            return
        size = RECORD * count + sum(len(event.body) for event in events)
        size += sum(outcome.delivery.size for outcome in outcomes)
        with self._changed:
            fits = self._size == 0 or self._size + size <= self._room
            if fits:
                self._events += events
                self._outcomes += outcomes
                self._size += size
                self._count += count
                self._changed.notify()
        if not fits:
            self._errors.inc()
            line = f"plugin {self._observer.plugin} is too slow: {count} records were dropped"
            self._log.error("too slow", line, None)

    def finish(self) -> Future[None]:
        """Ask the thread to end after the queued records; returns a future for its end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        return self._end

    def leave(self) -> None:
        """Drop the queued records."""
        with self._changed:
            self._events, self._outcomes = [], []
            left = self._count
        if left:
            log.warning("plugin %s: %d records were dropped at the stop", self._observer.plugin, left)

    def _run(self) -> None:
        while self._wait():
            with self._changed:
                events, self._events = self._events, []
                outcomes, self._outcomes = self._outcomes, []
                size, count = self._size, self._count
            self._call(self._observer.events_stored, events)
            self._call(self._observer.attempts_recorded, outcomes)
            with self._changed:
                self._size -= size
                self._count -= count
        self._end.set_result(None)

    def _wait(self) -> bool:
        """Wait for records; False: the thread must end."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._outcomes or self._stopping)
            return bool(self._events or self._outcomes)

    def _call(self, hook: Callable[[Sequence[T]], None] | None, records: Sequence[T]) -> None:
        if hook is None or not records:
            return
        try:
            hook(records)
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread silently
            self._errors.inc()
            self._log.error("failed", f"plugin {self._observer.plugin} raised an exception in a hook", error)
