"""What many tests lean on: a clock under their hand, and waiting for a thing itself."""

import asyncio
from datetime import datetime, timedelta

from apscheduler.schedulers import base

from relay.base.clock import SECOND, SystemClock
from relay.jobs import scheduler as scheduler_module


class FakeClock:
    """Both scales under the test's hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND

    def wall(self) -> int:
        return self.now

    def steady(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


class SteppedClock(SystemClock):
    """The machine's clocks, the wall's put forward or back by the test; APScheduler reads it, too."""

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
        monkeypatch.setattr(scheduler_module, "LOOK_EVERY", 0.02)

    def wall(self):
        return super().wall() + int(self.by.total_seconds() * SECOND)


async def until(condition, seconds=30.0):
    """Wait until `condition()` is true, and fail when it is not within `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (result := condition()):
        assert asyncio.get_running_loop().time() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)
    return result
