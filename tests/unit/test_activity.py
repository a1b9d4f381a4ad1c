"""Latest events and successes, usual gaps between events, and silent sources."""

import os
from types import SimpleNamespace

import pytest
from stores import accept, change_rows, end, is_postgres, make_store, opened, send

from relay.base.clock import SECOND
from relay.delivery.http.http_client import Certificate
from relay.jobs.activity import DAYS, PATIENCE, Activity, Rhythm, Slots
from relay.metrics import Metrics
from relay.store.queries import page

HOUR, DAY = 3600, 86_400
WEEK = 7 * 24  # hours


def slots(text):
    """Return slots: one character per period, `1` with an event, `.` without."""
    made = Slots(1000)
    for each in text:
        made.add(active=each == "1")
    return made


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("", 0),
        ("1", 0),
        ("...1...", 0),
        ("11", 1),
        ("1..1", 3),
        ("..1..1...............", 3),  # neither before the first event nor after the last
        ("1" * 24, 1),
        (("11111111" + "." * 16) * 10 + "1", 17),  # the nights are usual
        ("1" * 400 + "." * 10 + "1" * 100, 1),  # one failure is not
        ("1" * 100 + "." * 60 + "1", 61),  # but a long silence of a new source is
        ("1.1.1.1....1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1.1", 5),
    ],
)
def test_the_usual_gap_is_the_longest_that_is_not_rare(text, gap):
    assert slots(text).usual_gap() == gap


def test_slots_remember_the_latest_periods_only():
    made = Slots(5)
    for active in (True, True, False, False, False):
        made.add(active=active)
    assert (made.bits, made.empty, made.span) == (0b11, 3, 2)
    made.add(active=True)
    assert (made.bits, made.empty) == (0b10001, 0)
    for _ in range(10**6):
        made.add(active=False)
    made.add(active=True)
    assert (made.bits, made.empty) == (1, 0)


def rhythm(hours, minutes=""):
    made = Rhythm()
    for each in hours:
        made.hours.add(active=each == "1")
    for each in minutes:
        made.add_minute(active=each == "1")
    made.measure()
    return made


DAILY = ("1" + "." * 23) * 14
OFFICE = (("." * 9 + "1" * 9 + "." * 6) * 5 + "." * 48) * 2 + "." * 9 + "1"


@pytest.mark.parametrize(
    ("hours", "minutes", "seconds"),
    [
        ("", "", 0),
        ("1" * WEEK, "", HOUR),
        ("1" * (WEEK - 1), "", 0),  # a week is needed, as weekends may differ
        ("1" + "." * WEEK + "1", "", 0),  # two events are no rhythm
        (DAILY, "", 24 * HOUR),
        (OFFICE, "", (48 + 6 + 9 + 1) * HOUR),
        ("1" * WEEK, "1" * 1440, 300),
        ("1" * WEEK, "1" * 1439, HOUR),  # the minutes of a day are needed
        ("1" * WEEK, ("1" + "." * 19) * 80, 20 * 60),
        (DAILY, "1" * 1440, 24 * HOUR),
    ],
)
def test_a_source_has_a_usual_gap_once_there_are_enough_events(hours, minutes, seconds):
    assert rhythm(hours, minutes).usual_gap == seconds


def test_an_hour_is_sixty_minutes_in_which_the_relay_accepted_events():
    made = rhythm("", "." * 59 + "1" + "." * 60 + "1")
    assert (made.hours.bits, made.hours.empty, made.silence) == (1, 1, 0)


class World:
    """The parts of the relay that the job reads, and a clock that moves minute by minute."""

    def __init__(self, store, clock, *, sources=("shop",), destinations=("crm",)):
        self.store, self.clock, self.accepts, self.metrics = store, clock, True, Metrics()
        self.counters = {name: SimpleNamespace(last_event=None) for name in sources}
        self.mounts = {name: SimpleNamespace(paused=False) for name in sources}
        self.lanes = {name: SimpleNamespace(last_success=None, certificate=None) for name in destinations}
        self.activity = Activity(store, self, self, self.metrics, clock, accepts=lambda: self.accepts)

    async def pass_minutes(self, text):
        """Let minutes pass: `1` with an event of each source, `.` without."""
        for each in text:
            self.clock.advance(60)
            if each == "1":
                for counter in self.counters.values():
                    counter.last_event = self.clock.wall()
            await self.activity.run()

    def gauge(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


async def history(store, clock, hours):
    """Store events: one in each hour marked `1`, the last one now."""
    clock.advance(-(len(hours) - 1) * HOUR)
    past = []
    for each in hours[:-1]:
        if each == "1":
            past.append(accept(clock))
        clock.advance(HOUR)
    await store.events.append_all(past)
    await send(store, clock)


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


async def test_silence_is_found_and_ends_with_an_event(store, clock):
    await history(store, clock, "1" * (WEEK + 2))
    world = World(store, clock)
    activity, labels = world.activity, {"source": "shop"}
    assert (activity.last_event("shop"), activity.usual_gap("shop")) == (None, 0)
    await activity.run()
    received = clock.wall()
    assert (activity.last_event("shop"), activity.usual_gap("shop")) == (received, HOUR)
    await world.pass_minutes("." * 60 * PATIENCE)
    assert not activity.is_silent("shop")
    await world.pass_minutes(".")
    assert activity.is_silent("shop")
    assert world.gauge("relay_source_last_event_timestamp_seconds", **labels) == received / SECOND
    assert world.gauge("relay_source_silence_seconds", **labels) == PATIENCE * HOUR + 60
    assert world.gauge("relay_source_usual_gap_seconds", **labels) == HOUR
    world.counters["shop"].last_event = clock.wall()
    assert not activity.is_silent("shop")  # at once, not only with the next run
    assert world.gauge("relay_source_silence_seconds", **labels) == 0
    await world.pass_minutes("1" + "." * 60)
    assert activity.silence("shop") == HOUR


async def test_time_in_which_no_event_could_be_accepted_does_not_count_as_silence(store, clock):
    await history(store, clock, "1" * (WEEK + 2))
    world = World(store, clock)
    await world.pass_minutes("." * 100)
    world.accepts = False
    await world.pass_minutes("." * 1000)
    world.accepts = True
    clock.advance(30 * DAY)  # the machine was suspended
    await world.pass_minutes("." * 50)
    assert world.activity.silence("shop") == 150 * 60
    for _ in range(5):  # an operator's runs
        await world.activity.run()
    assert world.activity.silence("shop") == 150 * 60


async def test_a_paused_source_is_never_silent(store, clock):
    await history(store, clock, "1" * (WEEK + 2))
    world = World(store, clock)
    await world.pass_minutes("." * 200)
    assert world.activity.is_silent("shop")
    world.mounts["shop"].paused = True
    assert not world.activity.is_silent("shop")
    assert world.gauge("relay_source_usual_gap_seconds", source="shop") == 0
    await world.pass_minutes("." * 200)
    world.mounts["shop"].paused = False
    assert not world.activity.is_silent("shop")
    await world.pass_minutes("." * 181)
    assert world.activity.is_silent("shop")


async def test_a_restart_remembers_silence_but_not_its_own_downtime(tmp_path, clock):
    path = tmp_path / "relay.db"
    async with opened(path, clock) as store:
        await history(store, clock, "1" * (WEEK + 2))
    received = clock.wall()
    stopped_at = received + 2 * HOUR * SECOND
    for file in tmp_path.iterdir():
        os.utime(file, ns=(stopped_at * 1000,) * 2)
    clock.advance(10 * HOUR)
    store = make_store(path, clock)
    if is_postgres(store):
        await change_rows(store, f"UPDATE leases SET until = to_timestamp({stopped_at / SECOND})")
    world = World(store, clock)
    await store.open()
    await world.pass_minutes(".")
    assert (world.activity.last_event("shop"), world.activity.silence("shop")) == (received, 2 * HOUR)
    await world.pass_minutes("." * 61)
    assert world.activity.is_silent("shop")
    await store.close()


async def test_old_events_and_those_of_other_sources_do_not_count(store, clock):
    await history(store, clock, "1" * (WEEK + 2))
    clock.advance((DAYS - 5) * DAY)
    world = World(store, clock, sources=("shop", "empty"))
    await world.activity.run()
    assert world.activity.usual_gap("shop") == 0  # five days of two weeks are left
    assert world.activity.last_event("empty") is None
    assert world.gauge("relay_source_last_event_timestamp_seconds", source="empty") == 0


async def test_the_latest_success_is_read_from_the_store_also_below_a_backlog(store, clock, monkeypatch):
    monkeypatch.setattr(page, "MOST_CANDIDATES", 5)  # of one page
    for _ in range(3):
        event = await send(store, clock)
        clock.advance(10)
        await end(store, event, destination="crm")
    [row] = await store.queries.find("deliveries", destination="crm", limit=1)
    delivered = row["finished_at"]
    for _ in range(20):
        await send(store, clock)
    clock.advance(DAY)
    world = World(store, clock, destinations=("crm", "erp"))
    await world.activity.run()
    assert world.activity.last_success("crm") == delivered
    assert world.activity.last_success("erp") is None
    name = "relay_destination_last_success_timestamp_seconds"
    assert world.gauge(name, destination="crm") == delivered / SECOND
    assert world.gauge(name, destination="erp") == 0
    world.lanes["crm"].last_success = clock.wall()
    assert world.gauge(name, destination="crm") == clock.wall() / SECOND


async def test_a_removed_source_and_destination_lose_their_series(store, clock):
    world = World(store, clock)
    await world.activity.run()
    world.lanes["crm"].certificate = Certificate(2 * SECOND, 5 * SECOND)
    expiry = "relay_destination_certificate_expiry_timestamp_seconds"
    assert world.gauge(expiry, destination="crm") == 5
    assert world.gauge("relay_destination_certificate_lifetime_seconds", destination="crm") == 3
    world.mounts.clear()
    world.lanes.clear()
    await world.activity.run()
    assert world.gauge(expiry, destination="crm") is None
    assert world.gauge("relay_source_usual_gap_seconds", source="shop") is None


async def test_with_other_nodes_their_events_and_successes_count(store, clock):
    await history(store, clock, "1" * (WEEK + 2))
    shared = SimpleNamespace(
        nodes=SimpleNamespace(alone=False), queries=store.queries, ledger=store.ledger, stopped_at=0
    )
    world = World(shared, clock)
    world.lanes["crm"].is_owned = False
    await world.pass_minutes("." * 10)
    assert (world.activity.silence("shop"), world.activity.last_success("crm")) == (9 * 60, None)
    event = await send(store, clock)  # on another node
    await end(store, event, destination="crm")
    await world.pass_minutes(".")
    assert world.activity.silence("shop") == 0
    assert world.activity.last_event("shop") == event.received_at
    assert world.activity.last_success("crm") is not None
