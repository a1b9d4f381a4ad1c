"""Replays in the real store: by the current routes, paced, cancellable, and exact to the last delivery."""

import asyncio
import json

import pytest
from stores import accept, change_rows, hooks, ids, make_store
from support import FakeClock, until

from relay.base.clock import SystemClock
from relay.base.units import Rate
from relay.errors import RelayError, StorageUnavailableError, UnknownError
from relay.jobs import replay as replay_module
from relay.jobs.replay import ROUTES, ReplayRequest, Replays, portion
from relay.model import Attempt, Chosen, Outcome, Selection
from relay.routing.router import Router
from relay.routing.subscription import Subscription, SubscriptionOptions
from relay.store.queries import selection

FAST = Rate(1_000_000, 1)
ALL = Selection(since=0)


class Shop:
    """A store whose deliveries end at once, and its replays."""

    def __init__(self, path, clock=None):
        self.clock = clock or SystemClock()
        self.store = make_store(path, self.clock)
        self.fresh = []

    def route(self, **destinations):
        """Set the current destinations, each given as (where, terms)."""
        subscriptions = {
            name: Subscription.of(("shop.*",), where) for name, (where, _) in destinations.items()
        }
        terms = {name: SubscriptionOptions.of(name, **fields) for name, (_, fields) in destinations.items()}
        self.router = Router(subscriptions, terms)
        hooks(self.store).route = self.router.route
        hooks(self.store).listener = lambda news: self.fresh.extend(news.deliveries)
        self.replays = Replays(store=self.store, router=self.router, clock=self.clock)

    async def send(self, number=0, body=None):
        body = json.dumps({"n": number}).encode() if body is None else body
        accepted = accept(self.clock, body=body, subject=f"{number}")
        await self.store.events.append(accepted)
        return accepted.event

    async def end(self, state="delivered", **fields):
        """End every delivery that was created since the last call."""
        ended, self.fresh = self.fresh, []
        attempt = Attempt(started_at=1, duration_ms=1.0, result="ok", status=200)
        outcomes = [Outcome(delivery=d, attempt=attempt, state=state, **fields) for d in ended]
        await asyncio.gather(*(self.store.deliveries.settle(outcome) for outcome in outcomes))
        return ended

    async def run(self, what=ALL, **wish):
        """Replay to the end."""
        replay = await self.replays.start(ReplayRequest(**{"what": what, "rate": FAST, **wish}))
        await until(lambda: replay.ended_at is not None)
        return replay

    async def books(self, name="crm"):
        counts = (await self.store.ledger.audit())[name]
        assert counts.unaccounted == 0
        return {field: n for field in counts.__struct_fields__ if (n := getattr(counts, field))}


@pytest.fixture
async def shop(tmp_path):
    shop = Shop(tmp_path / "relay.db")
    shop.route(crm=(None, {}))
    await shop.store.open()
    yield shop
    await shop.replays.stop()
    await shop.store.close()


def summary(replay):
    return replay.state, replay.total, replay.done, replay.created, replay.skipped


async def test_a_replay_of_many_events_uses_the_current_routes(shop):
    await asyncio.gather(*(shop.send(number) for number in range(1500)))
    await shop.end()
    shop.route(
        odd=([{"data.n": {"in": list(range(1, 1500, 2))}}], {}),
        few=([{"data.n": {"lt": 10}}, {"subject": "1499"}], {}),
    )
    replay = await shop.run()
    assert summary(replay) == ("done", 1500, 1500, 761, 745)
    assert (await shop.books("odd"), await shop.books("few")) == (
        {"created": 750, "pending": 750},
        {"created": 11, "pending": 11},
    )
    assert await shop.books() == {"created": 1500, "delivered": 1500}
    assert [d.event_id for d in shop.fresh] == sorted(d.event_id for d in shop.fresh)


async def test_a_replay_to_one_destination_ignores_its_filter_but_not_its_options(shop):
    for number in range(3):
        await shop.send(number)
    await shop.end()
    shop.route(crm=(None, {}), new=([{"data.n": 99}], {"order_by": "data.n", "ttl": 60.0}))
    replay = await shop.run(to="new")
    assert summary(replay) == ("done", 3, 3, 3, 0)
    assert [(d.destination, d.order_key, d.replay_of) for d in shop.fresh] == [
        ("new", "0", None), ("new", "1", None), ("new", "2", None),
    ]  # fmt: skip
    assert all(d.expires_at is not None for d in shop.fresh)


async def test_selected_deliveries_go_to_their_destinations_or_by_the_current_routes(shop):
    shop.route(crm=(None, {}), erp=(None, {}))
    await shop.send()
    dead, delivered = [d for d in shop.fresh if d.destination == "crm"], shop.fresh[1:]
    shop.fresh = dead
    await shop.end("dead", reason="exhausted")
    shop.fresh = delivered
    await shop.end()
    replay = await shop.run(Selection(state="dead"))
    made = await ids(shop.store, "deliveries")
    assert [(d.destination, d.replay_of) for d in shop.fresh] == [("crm", made[0])]
    assert summary(replay) == ("done", 1, 1, 1, 0)
    await shop.end("dead", reason="exhausted")
    await shop.run(Selection(state="dead"), to=ROUTES)
    made = await ids(shop.store, "deliveries")
    assert [(d.destination, d.replay_of) for d in shop.fresh] == [("crm", made[2]), ("erp", made[1])]


async def test_a_second_replay_repeats_nothing_pending_or_no_longer_dead(shop):
    for number in range(4):
        await shop.send(number)
    await shop.end("dead", reason="exhausted")
    assert summary(await shop.run(Selection(state="dead"))) == ("done", 4, 4, 4, 0)
    assert summary(await shop.run(ALL, to="crm")) == ("done", 4, 4, 0, 4)
    await shop.end()
    assert summary(await shop.run(Selection(state="dead"))) == ("done", 0, 0, 0, 0)
    assert await shop.books() == {"created": 8, "delivered": 4, "dead": 4}


async def test_named_events_are_replayed_in_order_of_acceptance(shop):
    sent = [await shop.send(number) for number in range(3)]
    await shop.end()
    chosen = await shop.store.queries.name_events([sent[2].public_id, sent[0].public_id])
    replay = await shop.run(chosen)
    assert summary(replay) == ("done", 2, 2, 2, 0)
    assert [d.event.public_id for d in shop.fresh] == [sent[0].public_id, sent[2].public_id]
    assert replay.reached == sent[2].received_at


async def test_a_cancelled_replay_has_exact_counts(shop):
    await asyncio.gather(*(shop.send(number) for number in range(2000)))
    await shop.end()
    replay = await shop.replays.start(ReplayRequest(what=ALL, rate=Rate(500, 1)))
    await until(lambda: replay.done > 0)
    assert replay.eta is not None
    await shop.replays.cancel(replay.id)
    state, total, done, created, skipped = summary(replay)
    assert (state, total, created, skipped) == ("cancelled", 2000, done, 0)
    assert 0 < done < 2000
    assert await shop.books() == {"created": 2000 + done, "delivered": 2000, "pending": done}
    assert replay.eta is None
    assert await shop.replays.cancel(replay.id) is replay


async def test_a_replay_keeps_its_rate_and_estimates_its_end(shop):
    await asyncio.gather(*(shop.send(number) for number in range(60)))
    await shop.end()
    began = shop.clock.steady()
    replay = await shop.run(rate=Rate(40, 1))
    took = (shop.clock.steady() - began) / 1_000_000
    assert summary(replay)[:3] == ("done", 60, 60)
    assert 0.4 < took < 5  # a burst of 40, and 20 at 40/s
    assert replay.per_second == pytest.approx(60 / took, rel=0.5)


async def test_events_accepted_during_a_replay_are_not_replayed(shop):
    await asyncio.gather(*(shop.send(number) for number in range(20)))
    await shop.end()
    replay = await shop.replays.start(ReplayRequest(what=ALL, rate=Rate(15, 1)))
    await until(lambda: replay.done > 0)
    await shop.send(99)
    await until(lambda: replay.ended_at is not None)
    assert summary(replay) == ("done", 20, 20, 20, 0)


async def test_a_replay_skips_and_logs_a_damaged_body(shop, caplog):
    sent = [await shop.send(number) for number in range(2)]
    await shop.end()
    first, _ = await ids(shop.store)
    await change_rows(shop.store, f"UPDATE events SET body = x'00' WHERE id = {first}")
    assert summary(await shop.run()) == ("done", 2, 2, 1, 1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"{sent[0].public_id} is not replayed: the stored body does not match its sha256"
    ]


async def test_a_replay_waits_for_a_full_disk_and_continues(shop, monkeypatch):
    monkeypatch.setattr("relay.jobs.replay.STORAGE_PAUSE", 0.01)
    await shop.send()
    await shop.end()
    failures = [StorageUnavailableError("disk full")] * 3
    write = shop.store.deliveries.repeat

    async def fail_at_first(wishes):
        if failures:
            raise failures.pop()
        return await write(wishes)

    monkeypatch.setattr(shop.store.deliveries, "repeat", fail_at_first)
    assert summary(await shop.run()) == ("done", 1, 1, 1, 0)
    assert failures == []


async def test_a_replay_waits_for_events_that_cannot_be_read_and_continues_after_the_last_one(
    shop, monkeypatch
):
    monkeypatch.setattr(replay_module, "STORAGE_PAUSE", 0.01)
    monkeypatch.setattr(selection, "PAGE", 2)
    sent = [await shop.send(number) for number in range(7)]
    await shop.end()
    select, reads = shop.store.queries.select, []

    async def fail_between_pages(*args):
        reads.append(1)
        pages = 0
        async for page in select(*args):
            pages += 1
            if len(reads) in {2, 3} and pages == 2:  # the first read counts
                raise StorageUnavailableError("the server restarts")
            yield page

    monkeypatch.setattr(shop.store.queries, "select", fail_between_pages)
    replay = await shop.run()
    assert len(reads) == 4
    assert (replay.state, replay.done, replay.created) == ("done", 7, 7)
    assert [d.event.public_id for d in shop.fresh] == [event.public_id for event in sent]


async def test_an_unexpected_error_fails_a_replay_visibly(shop, monkeypatch, caplog):
    await shop.send()

    async def fail(_event_ids):
        raise RuntimeError("a bug")

    monkeypatch.setattr(shop.store.events, "load", fail)
    replay = await shop.run()
    assert (replay.state, replay.error) == ("failed", "RuntimeError('a bug')")
    assert f"replay {replay.id} failed" in caplog.text


async def test_a_destination_that_does_not_exist_is_refused_at_once(shop):
    with pytest.raises(UnknownError, match='unknown destination "cmr"') as refused:
        await shop.replays.start(ReplayRequest(what=ALL, to="cmr"))
    assert refused.value.hint == "destinations: crm"


async def test_a_destination_that_left_the_config_gets_no_replay(shop):
    await shop.send()
    await shop.end("dead", reason="exhausted")
    shop.route(other=(None, {}))
    assert summary(await shop.run(Selection(state="dead"))) == ("done", 1, 1, 0, 1)


async def test_running_and_remembered_replays_are_limited(shop, monkeypatch):
    monkeypatch.setattr("relay.jobs.replay.MOST_RUNNING", 2)
    monkeypatch.setattr("relay.jobs.replay.KEPT", 3)
    for number in range(4):
        await shop.send(number)
    slow = [await shop.replays.start(ReplayRequest(what=ALL, rate=Rate(1, 3600))) for _ in range(2)]
    with pytest.raises(RelayError, match="2 replays are running"):
        await shop.replays.start(ReplayRequest(what=ALL))
    await shop.replays.cancel(slow[0].id)
    ended = [await shop.run(Selection(source="nobody")) for _ in range(4)]
    assert shop.replays.all() == [*reversed(ended[1:]), slow[1]]
    last = ended[-1]
    for prefix in (last.id, last.id.removeprefix("rpl_"), last.id[:-1], last.id.replace("-", "").upper()):
        assert shop.replays.get(prefix) is last
    assert await shop.replays.cancel(last.id[:-1]) is last
    with pytest.raises(RelayError, match='ambiguous replay id "0"; matches: rpl_0'):
        shop.replays.get("0")
    for wrong in ("", "rpl_", "nobody"):
        with pytest.raises(UnknownError, match="unknown replay"):
            shop.replays.get(wrong)
    with pytest.raises(UnknownError, match="unknown replay"):
        shop.replays.get(ended[0].id)


async def test_a_stop_ends_replays_and_logs_where_to_continue(shop, caplog):
    await asyncio.gather(*(shop.send(number) for number in range(20)))
    await shop.end()
    replay = await shop.replays.start(ReplayRequest(what=ALL, rate=Rate(5, 1)))
    await until(lambda: replay.done > 0)
    await shop.replays.stop()
    assert replay.state == "cancelled"
    assert (
        f"replay {replay.id} stopped with the daemon; to continue, start a replay with since = 2"
        in caplog.text
    )
    assert await shop.books() == {"created": 20 + replay.done, "delivered": 20, "pending": replay.done}


async def test_a_retry_recreates_ended_deliveries_and_makes_pending_ones_due(shop):
    clock = shop.clock
    shop.route(crm=(None, {}), gone=(None, {}))
    for number in range(3):
        await shop.send(number)
    await shop.end("dead", reason="exhausted")
    await shop.send(3)
    await shop.end("pending", next_attempt_at=clock.steady() + 3_600_000_000)
    shop.route(crm=(None, {}))
    named = await shop.store.queries.name_deliveries(
        [row["id"] for row in await shop.store.queries.find("deliveries")]
    )
    assert [one.state for one in named] == ["dead"] * 6 + ["pending"] * 2
    retried = await shop.replays.retry(named)
    assert (retried.created, retried.hurried, retried.skipped) == (3, 2, 3)
    made = await ids(shop.store, "deliveries")
    assert [(d.destination, d.replay_of) for d in shop.fresh] == [("crm", id_) for id_ in made[0:6:2]]
    assert await shop.books() == {"created": 7, "dead": 3, "pending": 4}
    assert await shop.books("gone") == {"created": 4, "dead": 3, "pending": 1}
    assert len((await shop.store.deliveries.claim("gone", 9, retries=True)).deliveries) == 1


async def test_a_portion_is_bounded_in_events_and_bytes(monkeypatch):
    monkeypatch.setattr(replay_module, "MOST_EVENTS", 4)
    monkeypatch.setattr(replay_module, "MOST_BYTES", 10)
    sizes = [1, 1, 1, 1, 1, 9, 2, 50, 3]
    chosen = [Chosen(number, size, 0) for number, size in enumerate(sizes)]
    portions, at = [], 0
    while found := portion(chosen, at):
        portions.append([one.size for one in found])
        at += len(found)
    assert portions == [[1, 1, 1, 1], [1, 9], [2], [50], [3]]


def test_a_portion_contains_no_more_events_than_the_rate_allows(monkeypatch):
    chosen = [Chosen(number, 1, 0) for number in range(9)]
    tokens = [True] * 3
    assert len(portion(chosen, 2, lambda: bool(tokens) and tokens.pop())) == 3


async def test_a_replay_uses_the_injected_clock(tmp_path):
    clock = FakeClock()
    shop = Shop(tmp_path / "relay.db", clock)
    shop.route(crm=(None, {}))
    await shop.store.open()
    try:
        await shop.send()
        replay = await shop.replays.start(ReplayRequest(what=ALL, rate=Rate(1, 60)))
        await until(lambda: replay.ended_at is not None)
        assert (replay.began_at, replay.ended_at) == (clock.wall(), clock.wall())
        assert replay.per_second == 0.0
    finally:
        await shop.store.close()
