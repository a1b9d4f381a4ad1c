"""Free space of the disk, and the days until the database has filled the disk at its current growth."""

from collections import deque
from pathlib import Path

from relay.base.clock import SECOND, Clock
from relay.metrics import Metrics
from relay.store import DiskSpace

EVERY = 600 * SECOND
"""Microseconds between two samples of the size."""

WINDOW = 86_400 * SECOND
"""Microseconds: the pace is measured over the last day."""

LEAST = 3600 * SECOND
"""Microseconds that the samples must cover; with less, the pace is unknown."""


class DiskForecast:
    """Samples the size of the database file. The log beside the file is left out, because it shrinks again.

    `file` is None for a store without a file on this machine.
    """

    def __init__(self, clock: Clock, metrics: Metrics, file: Path | None) -> None:
        self.space: DiskSpace | None = None  # at the latest check
        self._clock = clock
        self._metrics = metrics
        self._file = file
        self._samples: deque[tuple[int, int]] = deque(maxlen=WINDOW // EVERY + 1)  # steady clock, bytes

    def note(self, space: DiskSpace) -> None:
        """Note the free space, and the size of the file if a sample is due."""
        self.space, now = space, self._clock.steady()
        if self._file is not None and (not self._samples or now - self._samples[-1][0] >= EVERY):
            self._samples.append((now, self._file.stat().st_size))
        days = self.days_left
        self._metrics.disk_free.set(space.free)
        self._metrics.disk_floor.set(space.floor)
        self._metrics.disk_full_in.set(float("inf") if days is None else days * 86_400)

    @property
    def days_left(self) -> float | None:
        """The days until the database has taken up the free space down to `min_free_disk`.

        None: the pace is not known yet, or the database does not grow.
        """
        if self.space is None or not self._samples:
            return None
        (began, before), (ended, size) = self._samples[0], self._samples[-1]
        if ended - began < LEAST or size <= before:
            return None
        room = max(0, self.space.free - self.space.floor)
        return room * (ended - began) / ((size - before) * WINDOW)
