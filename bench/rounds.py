"""Alternating rounds of two sides, so that other load on the machine affects both equally."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    rounds: int = 7  # per side, after a discarded one
    requests: int = 4000  # per round
    connections: int = 128


class Round(msgspec.Struct, frozen=True):
    """One round of one side."""

    events: int
    seconds: float  # from the first byte out to the end of the last event
    cpu: float  # seconds of the server under test
    p99: float | None = None  # ms from acceptance to recorded answer; one event in 100 took longer

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds

    @property
    def cost(self) -> float:
        """Microseconds of CPU per event."""
        return self.cpu / self.events * 1e6


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One round of a store or of daemons whose database is a server: seconds of CPU of both."""

    events: int
    seconds: float
    process: float
    server: float  # 0: the database is in the process
    main: float = 0.0  # the main threads of the processes, if measured

    @property
    def own(self) -> Round:
        """The round with the CPU of the process alone."""
        return Round(self.events, self.seconds, self.process)

    @property
    def loop(self) -> Round:
        """The round with the CPU of the main threads alone."""
        return Round(self.events, self.seconds, self.main)

    @property
    def total(self) -> Round:
        """The round with the CPU of both."""
        return Round(self.events, self.seconds, self.process + self.server)


class Spread(msgspec.Struct, frozen=True):
    """Median, minimum and maximum of several figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        return cls(statistics.median(figures), min(figures), max(figures))


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The rounds of the relay and of the other side. A ratio of 1 means that both are equal."""

    name: str
    title: str
    rival: str
    us: str = "relay"
    target: float | None  # the smallest acceptable ratio of rates, and of p99; None: only shown
    is_of_cost: bool = False  # whether the target is one of CPU per event, not of rates
    ours: tuple[Round, ...]
    theirs: tuple[Round, ...]

    def rates(self) -> tuple[Spread, Spread, Spread]:
        """Return events per second of both sides, and the ratio within each pair."""
        ratios = [o.rate / t.rate for o, t in zip(self.ours, self.theirs, strict=True)]
        return _spread(self.ours, "rate"), _spread(self.theirs, "rate"), Spread.of(ratios)

    def costs(self) -> tuple[Spread, Spread, Spread]:
        """Return CPU microseconds per event, and the inverse ratio, so that a higher one is better."""
        return self._less_is_more("cost")

    def delays(self) -> tuple[Spread, Spread, Spread] | None:
        """Return the p99 in milliseconds and the inverse ratio; None unless both sides have one."""
        if any(each.p99 is None for each in (*self.ours, *self.theirs)):
            return None
        return self._less_is_more("p99")

    def _less_is_more(self, figure: str) -> tuple[Spread, Spread, Spread]:
        pairs = zip(self.ours, self.theirs, strict=True)
        ratios = [getattr(their, figure) / getattr(our, figure) for our, their in pairs]
        return _spread(self.ours, figure), _spread(self.theirs, figure), Spread.of(ratios)


Side = Callable[[], Awaitable[Round]]


async def alternate(plan: Plan, ours: Side, theirs: Side) -> tuple[tuple[Round, ...], tuple[Round, ...]]:
    """Warm up both sides, then measure them in turn; the side that begins changes from pair to pair."""
    mine, others = await alternate_all(plan, (ours, theirs))
    return mine, others


async def alternate_all(plan: Plan, sides: Sequence[Callable[[], Awaitable[T]]]) -> list[tuple[T, ...]]:
    """Warm up all sides, then measure them in turn; each turn begins with another side."""
    for side in sides:
        await side()
    found: list[list[T]] = [[] for _ in sides]
    for number in range(plan.rounds):
        for at in range(len(sides)):
            chosen = (number + at) % len(sides)
            found[chosen].append(await sides[chosen]())
    return [tuple(each) for each in found]


def _spread(rounds: Sequence[Round], figure: str) -> Spread:
    return Spread.of([getattr(each, figure) for each in rounds])
