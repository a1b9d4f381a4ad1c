"""The last hour and day of sources and destinations, as `/api/history` returns them."""

import pytest

from relay import metrics as metrics_module
from relay.base.clock import SECOND
from relay.jobs.history import LONG, LONG_SLOTS, SLOTS, History, Past, Series, merged, quantile
from relay.metrics import Metrics
from relay.model import RESULTS


class Daemon:
    """Counters that a test changes, and a history that it lets run every ten seconds."""

    def __init__(self, clock):
        self.clock = clock
        self.metrics = Metrics(sources=("shop",), destinations=("crm",))
        self.sources, self.destinations, self.pending = ["shop"], ["crm"], {"crm": 3}
        self.history = History(
            self.metrics,
            clock,
            sources=lambda: self.sources,
            destinations=lambda: self.destinations,
            pending=lambda: self.pending,
        )

    async def run(self, seconds=10):
        self.clock.advance(seconds)
        await self.history.run()

    async def figures(self, kind="sources", **asked):
        [series] = getattr(await self.history.past(**{"minutes": 1, "periods": 6, **asked}), kind)
        return series.figures


@pytest.fixture
async def daemon(clock):
    daemon = Daemon(clock)
    await daemon.run()
    return daemon


async def test_each_slot_has_the_growth_of_the_counters(daemon):
    for count in (1, 0, 4):
        daemon.metrics.received.labels("shop").inc(count)
        daemon.metrics.rejected.labels("shop", "auth").inc(2 * count)
        daemon.metrics.rejected.labels("shop", "invalid").inc(count)
        await daemon.run()
    assert (await daemon.figures()) == {"events": [None] * 3 + [1, 0, 4], "refused": [None] * 3 + [3, 0, 12]}


async def test_a_destination_has_attempts_durations_and_pending_deliveries(daemon):
    for result in ("ok", "ok", "5xx", "timeout"):
        daemon.metrics.attempts.labels("crm", result).inc()
        daemon.metrics.attempt_seconds.labels("crm").observe(0.2)
    await daemon.run()
    daemon.pending = {}
    await daemon.run()
    found = await daemon.figures("destinations", periods=2)
    assert (found["succeeded"], found["failed"], found["pending"]) == ([None, 2], [None, 2], [None, 3])
    found = await daemon.figures("destinations")
    assert found["pending"] == [None] * 4 + [3, 0]
    assert found["p50"][-1] is None  # no attempt
    assert 0.1 < found["p50"][-2] < found["p95"][-2] <= 0.25  # the bucket of 0.2 s


async def test_periods_are_sums_and_the_last_one_ends_at_the_last_slot(daemon):
    for _ in range(12):
        daemon.metrics.received.labels("shop").inc()
        await daemon.run()
    hour = await daemon.history.past(minutes=2, periods=2)
    assert (hour.step, hour.until) == (60.0, daemon.clock.wall())
    assert hour.sources[0].figures["events"] == [6, 6]
    assert (await daemon.history.past(minutes=2, periods=5)).step == 30.0


async def test_the_time_of_a_suspension_is_unknown_not_zero(daemon):
    daemon.metrics.received.labels("shop").inc()
    await daemon.run()
    daemon.metrics.received.labels("shop").inc(5)
    await daemon.run(40)
    assert (await daemon.figures())["events"] == [None, 1, None, None, None, 5]


async def test_an_hour_is_kept_and_no_more(daemon):
    for count in range(SLOTS + 2):
        daemon.metrics.received.labels("shop").inc(count)
        await daemon.run()
    events = (await daemon.figures(minutes=60, periods=SLOTS))["events"]
    assert events == [*map(float, range(2, SLOTS + 2))]
    # 7 periods of 52 slots begin before the hour: the first has only 48.
    periods = (await daemon.figures(minutes=60, periods=7))["events"]
    assert periods == [sum(events[:48]), *(sum(events[at : at + 52]) for at in range(48, SLOTS, 52))]


async def test_removed_names_are_forgotten_and_new_ones_begin_unknown(daemon):
    daemon.metrics.received.labels("shop").inc()
    await daemon.run()
    daemon.sources = ["bot"]
    daemon.metrics.add_source("bot")
    await daemon.run()
    assert (await daemon.figures())["events"] == [None] * 5 + [0]
    daemon.sources = ["shop"]
    await daemon.run()
    assert (await daemon.figures())["events"] == [None] * 5 + [0]


@pytest.mark.parametrize(
    ("share", "buckets", "value"),
    [
        (0.5, [(0.1, 0), (0.2, 10), (float("inf"), 10)], 0.15),
        (0.95, [(0.1, 10), (0.2, 10), (float("inf"), 10)], 0.095),
        (0.95, [(0.1, 0), (0.2, 0), (float("inf"), 10)], 0.2),
        (0.5, [(0.1, 5), (0.2, 10), (float("inf"), 10)], 0.1),
    ],
)
def test_a_quantile_is_interpolated_within_its_bucket(share, buckets, value):
    assert quantile(share, buckets) == pytest.approx(value)


async def test_the_running_slot_counts_if_it_is_asked_for(daemon):
    daemon.metrics.received.labels("shop").inc()
    assert (await daemon.figures())["events"] == (await daemon.figures(running=True))["events"] == [None] * 6
    daemon.clock.advance(2)
    assert (await daemon.figures(running=True))["events"] == [None] * 5 + [1]
    assert (await daemon.figures())["events"] == [None] * 6
    daemon.metrics.received.labels("shop").inc(2)
    assert (await daemon.figures(running=True))["events"] == [None] * 5 + [1]  # read a moment ago
    daemon.clock.advance(1)
    hour = await daemon.history.past(minutes=1, periods=6, running=True)
    assert (hour.until, hour.sources[0].figures["events"]) == (daemon.clock.wall(), [None] * 5 + [3])
    assert hour.destinations[0].figures["pending"][-1] == 3
    await daemon.run(7)
    assert (await daemon.figures())["events"] == [None] * 5 + [3]
    daemon.metrics.received.labels("shop").inc(4)
    daemon.clock.advance(3)
    assert (await daemon.figures(running=True))["events"] == [None] * 4 + [3, 4]


async def test_the_running_slot_does_not_replace_the_oldest_one(daemon):
    for count in range(1, SLOTS + 1):
        daemon.metrics.received.labels("shop").inc(count)
        await daemon.run()
    daemon.metrics.received.labels("shop").inc(5)
    daemon.clock.advance(2)
    asked = {"minutes": 60, "periods": SLOTS}
    assert (await daemon.figures(**asked, running=True))["events"] == [*range(2, SLOTS + 1), 5]
    assert (await daemon.figures(**asked))["events"] == [*range(1, SLOTS + 1)]


async def test_nothing_is_known_of_the_hours_of_a_suspension(daemon):
    for _ in range(3):
        daemon.metrics.received.labels("shop").inc()
        await daemon.run()
    await daemon.run((SLOTS + 7) * 10)
    events = (await daemon.figures(minutes=60, periods=SLOTS))["events"]
    assert events == [None] * (SLOTS - 1) + [0]


async def test_a_run_between_two_slots_adds_none(daemon):
    for seconds in (2, 8, 3, 9):  # an operator runs the job as well
        daemon.metrics.received.labels("shop").inc()
        await daemon.run(seconds)
    assert (await daemon.figures())["events"] == [None] * 4 + [2, 2]


def hour(until, **of_sources):
    series = tuple(Series(name, {"events": values, "p95": values}) for name, values in of_sources.items())
    return Past(until=until * SECOND, step=60.0, sources=series, destinations=())


@pytest.mark.parametrize(
    ("until", "values", "events", "largest"),
    [
        (600, [None, 5, 1], [None, 7, 4], [None, 5, 3]),
        (605, [4, 5, 6], [4, 7, 9], [4, 5, 6]),
        (540, [9, 5, 1], [5, 3, 3], [5, 2, 3]),  # a minute behind: its latest minute is missing
        (660, [9, 5, 1], [None, 11, 8], [None, 9, 5]),
        (0, [9, 5, 1], [None, 2, 3], [None, 2, 3]),
        (9999, [9, 5, 1], [None, 2, 3], [None, 2, 3]),
    ],
)
async def test_histories_of_nodes_are_added_by_time(until, values, events, largest):
    mine = hour(600, shop=[None, 2, 3], only=[1, 1, 1])
    found = await merged([mine, hour(until, shop=values, other=[None, None, None])])
    assert [each.name for each in found.sources] == ["shop", "only", "other"]
    assert found.sources[0].figures == {"events": events, "p95": largest}
    assert found.sources[1].figures["events"] == [1, 1, 1]
    assert (found.until, found.step) == (mine.until, mine.step)
    assert await merged([mine]) is mine


@pytest.mark.parametrize(
    ("names", "sources", "destinations"),
    [
        ({}, ["shop", "till"], ["crm", "erp"]),
        ({"source": "till"}, ["till"], []),
        ({"destination": "erp"}, [], ["erp"]),
        ({"source": "shop", "destination": "crm"}, ["shop"], ["crm"]),
        ({"source": "gone"}, [], []),
    ],
)
async def test_a_name_leaves_out_the_others(daemon, names, sources, destinations):
    daemon.sources, daemon.destinations = ["shop", "till"], ["crm", "erp"]
    await daemon.run()
    found = await daemon.history.past(1, 1, **names)
    assert [each.name for each in found.sources] == sources
    assert [each.name for each in found.destinations] == destinations


async def test_a_day_is_kept_in_long_slots_and_no_more(daemon, monkeypatch):
    monkeypatch.setattr("relay.jobs.history.LONG", 3)
    for count in range((LONG_SLOTS + 1) * 3):
        daemon.metrics.received.labels("shop").inc(count // 3)
        if count % 3 == 1:
            daemon.metrics.attempts.labels("crm", "ok").inc()
            daemon.metrics.attempt_seconds.labels("crm").observe(0.2)
        daemon.pending = {"crm": count % 3}
        await daemon.run()
    past = await daemon.history.past(1440, LONG_SLOTS)
    assert (past.step, past.until) == (30, daemon.clock.wall())
    assert past.sources[0].figures["events"] == [3 * number for number in range(1, LONG_SLOTS + 1)]
    figures = past.destinations[0].figures
    assert (figures["succeeded"], figures["pending"]) == ([1] * LONG_SLOTS, [2] * LONG_SLOTS)
    assert set(figures["p95"]) == {figures["p95"][0]}
    assert 0.1 < figures["p95"][0] <= 0.25
    past = await daemon.history.past(1440, 24)
    assert past.sources[0].figures["events"][-1] == sum(
        3 * number for number in range(LONG_SLOTS - 11, LONG_SLOTS + 1)
    )


async def test_a_day_includes_its_running_slot_only_on_request(daemon):
    for _ in range(LONG + 2):
        daemon.metrics.received.labels("shop").inc()
        await daemon.run()
    asked = {"minutes": 1440, "periods": LONG_SLOTS}
    past = await daemon.history.past(**asked)
    assert (past.step, past.until) == (300, daemon.clock.wall() - 20 * SECOND)
    assert past.sources[0].figures["events"][-2:] == [None, LONG]
    past = await daemon.history.past(**asked, running=True)
    assert (past.until, past.sources[0].figures["events"][-2:]) == (daemon.clock.wall(), [LONG, 2])
    daemon.metrics.received.labels("shop").inc(5)
    daemon.clock.advance(2)
    past = await daemon.history.past(**asked, running=True)
    assert (past.until, past.sources[0].figures["events"][-2:]) == (daemon.clock.wall(), [LONG, 7])
    await daemon.run(8)
    for _ in range(LONG - 3):
        await daemon.run()
    daemon.metrics.received.labels("shop").inc(9)
    daemon.clock.advance(2)  # the running slot begins a long one
    found = (await daemon.figures(**asked, running=True))["events"]
    assert found[-3:] == [LONG, 7, 9]
    assert (await daemon.figures(**asked))["events"][-3:] == [None, LONG, 7]


async def test_a_day_has_a_gap_where_the_machine_was_suspended(daemon):
    for _ in range(3):
        daemon.metrics.received.labels("shop").inc()
        await daemon.run()
    await daemon.run(2 * 3600)
    asked = {"minutes": 1440, "periods": LONG_SLOTS, "running": True}
    events = (await daemon.figures(**asked))["events"]
    assert events[-26:] == [None, 3, *[None] * 23, 0]
    await daemon.run(48 * 3600)
    assert (await daemon.figures(**asked))["events"] == [None] * (LONG_SLOTS - 1) + [0]


async def test_a_reading_has_the_values_of_a_scrape(monkeypatch):
    metrics = Metrics(sources=("shop",), destinations=("crm", "erp"))
    metrics.attempts.labels("crm", "5xx").inc(3)
    metrics.commit_seconds.observe(0.004)
    metrics.lag.set(0.25)
    before = await metrics.read("attempts", "attempt_seconds", "commit_seconds", "lag", "finished")
    for seconds in (0.001, 0.2, 11):
        metrics.attempts.labels("crm", "ok").inc()
        metrics.attempt_seconds.labels("crm").observe(seconds)
    names = ("attempts", "attempt_seconds", "commit_seconds", "lag")
    now = await metrics.read(*names)
    family = {each.name: each for each in metrics.registry.collect()}
    counts = [each.value for each in family["relay_delivery_attempts"].samples]
    assert [*now.row("attempts", "crm"), *now.row("attempts", "erp")] == counts
    assert (sum(now.row("attempts", "crm")), now.row("lag")) == (6, (0.25,))
    *buckets, total = now.row("attempt_seconds", "crm")
    assert (buckets[0], buckets[-1], sum(buckets), total) == (1, 1, 3, 11.201)
    assert now.growth(before, "attempts", "crm") == tuple(3.0 * (each == "ok") for each in RESULTS)
    assert now.growth(before, "attempts", "erp") is None
    assert now.growth(before, "attempts", "gone") is None
    # A later version of prometheus_client may keep its values elsewhere.
    monkeypatch.setattr("relay.metrics._values", metrics_module._collected)
    assert (await metrics.read(*names)).rows == now.rows
