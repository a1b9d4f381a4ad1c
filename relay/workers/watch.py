"""Applies the deadlines of workers: a worker that is silent beyond its deadline is offline."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase, translate
from functools import lru_cache

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import Config, WorkerRules
from relay.model import Worker
from relay.process.logs import fields
from relay.store import Store

log = logging.getLogger("relay.workers")

SWEEP = "sweep"
"""The job. Its interval depends on the configuration; in a cluster, one node marks silent workers."""

_REMEMBERED = 16_384  # workers whose rules are cached; the patterns are matched again for others


class Rulebook:
    """Finds the rules of a worker: the rules of its source, which the first matching id pattern overrides."""

    def __init__(self, default: WorkerRules, sources: Mapping[str, WorkerRules]) -> None:
        self._default = default
        self._sources = dict(sources)
        self._overrides = {
            name: [(re.compile(translate(pattern)), override) for pattern, override in rules.ids.items()]
            for name, rules in self._sources.items()
        }
        self._cached = lru_cache(maxsize=_REMEMBERED)(self._find)

    @classmethod
    def of_config(cls, config: Config) -> "Rulebook":
        """Return the rules of a configuration."""
        return cls(config.workers, {name: source.workers for name, source in config.sources.items()})

    @property
    def shortest_interval(self) -> float:
        """Seconds between sweeps: the shortest `check_every` of all rules."""
        rules = [self._default, *self._sources.values()]
        overrides = [override.check_every for each in rules for override in each.ids.values()]
        return min([each.check_every for each in rules] + [each for each in overrides if each is not None])

    def of(self, source: str, worker_id: str) -> WorkerRules:
        """Return the rules of one worker; the first matching pattern decides."""
        return self._cached(source, worker_id)

    def adopt(self, other: "Rulebook") -> None:
        """Replace the rules by those of another rulebook."""
        self._default, self._sources = other._default, other._sources  # noqa: SLF001 - the same class
        self._overrides, self._cached = other._overrides, other._cached  # noqa: SLF001 - the same class

    def _find(self, source: str, worker_id: str) -> WorkerRules:
        rules = self._sources.get(source, self._default)
        for pattern, override in self._overrides.get(source, ()):
            if pattern.match(worker_id):
                overrides = {
                    name: value
                    for name, value in msgspec.structs.asdict(override).items()
                    if value is not None
                }
                rules = msgspec.structs.replace(rules, **overrides)
                break
        if rules.maintenance:
            windows = tuple(each for each in rules.maintenance if fnmatchcase(worker_id, each.ids))
            rules = msgspec.structs.replace(rules, maintenance=windows)
        return rules


class Watch:
    """Applies deadlines every `interval` seconds; robust against clock steps and suspended processes."""

    def __init__(self, store: Store, clock: Clock, interval: float) -> None:
        self.interval = interval
        self._store = store
        self._clock = clock
        self._last: int | None = None  # steady clock; None: not yet since the start

    def change_interval(self, interval: float) -> None:
        """Change the interval, in seconds."""
        now = self._clock.steady()
        if self._last is not None and now - self._last <= 3 * self.interval * SECOND:
            self._last = now  # else the shorter interval makes the last sweep look overdue
        self.interval = interval

    async def sweep(self) -> None:
        """Mark silent workers offline. After more than three missed sweeps, extend all deadlines instead.

        A late sweep uses the time at which it was due: heartbeats that arrived while the process was stopped
        are read only before the next sweep.

        In a cluster, one node marks silent workers. Each node unregisters the workers whose unregister
        requests it refused. If a node takes over, the store knows whether another one has swept meanwhile.
        """
        now = self._clock.steady()
        if not self._store.nodes.lead(SWEEP):
            self._last = None
            self._log(await self._store.workers.sweep(at=0))
            return
        self._log_plans(await self._store.workers.follow_plans())
        if self._last is None or now - self._last > 3 * self.interval * SECOND:
            marked = await self._store.workers.sweep(extend=True)
        else:
            in_time = self._last + int(self.interval * SECOND)
            marked = await self._store.workers.sweep(at=min(now, in_time))
        self._log(marked)
        self._last = now

    def _log_plans(self, changed: Iterable[Worker]) -> None:
        """Log the sources whose workers began or ended planned maintenance."""
        numbers = Counter((worker.source, worker.maintenance) for worker in changed)
        for (source, begins), number in numbers.items():
            verb = "began" if begins else "ended"
            log.info("%s: maintenance of %d workers %s", source, number, verb, extra=fields(source=source))

    def _log(self, marked: Iterable[Worker]) -> None:
        """Log the workers that a sweep marked offline or unregistered."""
        for worker in marked:
            ids = fields(source=worker.source, worker_id=worker.id)
            if worker.unregistered_at is None:
                log.warning("%s: worker %s is offline: silent", worker.source, worker.id, extra=ids)
            else:
                line = "%s: worker %s has unregistered; the relay had refused its request"
                log.info(line, worker.source, worker.id, extra=ids)
