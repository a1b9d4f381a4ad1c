"""Clocks that a test sets, and waiting for a condition."""

import asyncio
import os
import re
from datetime import datetime, timedelta
from pathlib import Path

from apscheduler.schedulers import base

from relay.base.clock import SECOND, SystemClock
from relay.jobs import scheduler as scheduler_module


class FakeClock:
    """A clock that only the test moves; wall and steady time are equal."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND

    def wall(self) -> int:
        return self.now

    def steady(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


class SteppedClock(SystemClock):
    """The machine's clocks, with a wall time that the test can shift; APScheduler reads it, too."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.by = timedelta()
        clock = self

        class Moment(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + clock.by

        for place in (base, scheduler_module):
            monkeypatch.setattr(place, "datetime", Moment)
        monkeypatch.setattr(scheduler_module, "CHECK_EVERY", 0.02)

    def wall(self):
        return super().wall() + int(self.by.total_seconds() * SECOND)


def is_roomy(folder):
    """Return whether a folder in memory has room for the files of all tests, and programs may start there."""
    try:
        volume, memory = os.statvfs(folder), Path("/proc/meminfo").read_text()
    except OSError:
        return False
    available = re.search(r"MemAvailable: +(\d+) kB", memory)
    room = min(volume.f_bavail * volume.f_frsize, int(available[1]) * 1024 // 2 if available else 0)
    return room >= 4 * 2**30 and not volume.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK)


async def until(condition, seconds=60.0):
    """Wait until `condition()` is true and return its value; fail after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (result := condition()):
        assert asyncio.get_running_loop().time() < deadline, "the condition was not true in time"
        await asyncio.sleep(0.005)
    return result
