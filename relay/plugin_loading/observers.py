"""Telling plugins what has been stored: after the commit, from a bounded queue, in a thread for each plugin.

A hook may be slow, hang or raise. Neither acknowledgements nor deliveries ever wait for one.
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
from relay.process.logs import Sparing

log = logging.getLogger("relay.plugins")

ROOM = 32 * 2**20
"""Bytes of bodies that may wait for one plugin; what is beyond it is not told, and counted."""

RECORD = 1024
"""Bytes that a record takes beside its body, about."""

T = TypeVar("T")


class Observers:
    """Every plugin that wants to be told something, from `start` to `stop`."""

    def __init__(
        self, observers: Sequence[Observer], *, clock: Clock, metrics: Metrics, room: int = ROOM
    ) -> None:
        self._ears = [_Ear(observer, clock, metrics, room) for observer in observers]

    def start(self) -> None:
        """Begin to tell."""
        for ear in self._ears:
            ear.start()

    def listen(self, news: News) -> None:
        """Take in what one commit stored (see `relay.store.Listener`)."""
        for ear in self._ears:
            ear.hear(news)

    async def stop(self, seconds: float) -> None:
        """Tell what is left, for so long at most; a hook that hangs is left behind with its thread."""
        ends = [asyncio.wrap_future(ear.finish()) for ear in self._ears]
        if ends:
            await asyncio.wait(ends, timeout=seconds)
        for ear in self._ears:
            ear.leave()


class _Ear:
    """One plugin's queue and thread: its hooks are never called at the same time."""

    def __init__(self, observer: Observer, clock: Clock, metrics: Metrics, room: int) -> None:
        self._observer = observer
        self._errors = metrics.plugin_errors.labels(observer.plugin)
        self._log = Sparing(log, clock)
        self._room = room
        self._changed = threading.Condition()
        self._events: list[StoredEvent] = []
        self._outcomes: list[Outcome] = []
        self._size = 0  # bytes, of what waits and of what is being told
        self._count = 0  # records, likewise
        self._stopping = False
        self._end: Future[None] = Future()

    def start(self) -> None:
        # A daemon thread: a hook that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name=f"plugin {self._observer.plugin}", daemon=True).start()

    def hear(self, news: News) -> None:
        """Queue what the plugin wants of it; never waits for more than a few assignments."""
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
            line = f"plugin {self._observer.plugin} is too slow: {count} records were not told"
            self._log.error("too slow", line, None)

    def finish(self) -> Future[None]:
        """Ask for the end, after what is queued; the future is done with it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        return self._end

    def leave(self) -> None:
        """Tell nothing more."""
        with self._changed:
            self._events, self._outcomes = [], []
            left = self._count
        if left:
            log.warning("plugin %s: %d records were not told before the stop", self._observer.plugin, left)

    def _run(self) -> None:
        while self._wait():
            with self._changed:
                events, self._events = self._events, []
                outcomes, self._outcomes = self._outcomes, []
                size, count = self._size, self._count
            self._tell(self._observer.events_stored, events)
            self._tell(self._observer.attempts_recorded, outcomes)
            with self._changed:
                self._size -= size
                self._count -= count
        self._end.set_result(None)

    def _wait(self) -> bool:
        """Wait for something to tell; False: this is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._outcomes or self._stopping)
            return bool(self._events or self._outcomes)

    def _tell(self, hook: Callable[[Sequence[T]], None] | None, records: Sequence[T]) -> None:
        if hook is None or not records:
            return
        try:
            hook(records)
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread unheard
            self._errors.inc()
            self._log.error("failed", f"plugin {self._observer.plugin} failed at being told", error)
