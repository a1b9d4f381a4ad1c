"""Subscription options in the real store: order, expiry, backlog limit, dead-letter destination."""

import asyncio

import pytest
from stores import accept, hooks, ids, make_store

from relay.base.clock import SECOND
from relay.delivery.attempt import overdue
from relay.model import Attempt, Outcome
from relay.routing.router import Router
from relay.routing.subscription import Subscription, SubscriptionOptions
from relay.store import Cancelled


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    yield store
    await store.close()


def route_to(store, *destinations):
    """Route everything except operator events to destinations given as (name, options)."""
    subscriptions = {name: Subscription.of(("shop.*",)) for name, _ in destinations}
    terms = {name: SubscriptionOptions.of(name, **fields) for name, fields in destinations}
    hooks(store).route = Router(subscriptions, terms).route


def ending(delivery, state="delivered", **fields):
    attempt = Attempt(started_at=1, duration_ms=1.0, result="ok", status=200)
    return Outcome(delivery=delivery, attempt=attempt, state=state, **fields)


async def due(store, destination="crm"):
    return [d.id for d in (await store.deliveries.claim(destination, 100, retries=False)).deliveries]


async def states(store):
    rows = await store.queries.find("deliveries", limit=100)
    return [(row["state"], row["reason"]) for row in reversed(rows)]


async def test_deliveries_of_one_key_become_due_one_after_another(store, clock):
    route_to(store, ("crm", {"order_by": "subject"}))
    for subject in ("a", "b", "a", "a"):
        await store.events.append(accept(clock, subject=subject))
    made = await ids(store, "deliveries")
    assert [d.id for d in store.fresh] == made[:2]
    await store.deliveries.settle(ending(store.fresh[0]))
    assert store.news[-1].woken == {"crm"}
    assert await due(store) == [made[2]]


async def test_any_end_of_the_first_delivery_releases_its_key(store, clock):
    route_to(store, ("crm", {"order_by": "subject", "ttl": 60}))
    for _ in range(3):
        await store.events.append(accept(clock))
    await store.deliveries.settle(ending(store.fresh[0], "dead", reason="aborted"))
    [second] = (await store.deliveries.claim("crm", 9, retries=False)).deliveries
    store.deliveries.release([second.id])
    assert (await store.deliveries.cancel([second.id])).ended == 1
    assert await due(store) == (await ids(store, "deliveries"))[2:]


async def test_a_first_delivery_that_waits_for_its_retry_blocks_its_key(store, clock):
    route_to(store, ("crm", {"order_by": "subject"}))
    for _ in range(2):
        await store.events.append(accept(clock))
    later = clock.steady() + 5 * SECOND
    await store.deliveries.settle(ending(store.fresh[0], "pending", next_attempt_at=later))
    assert await due(store) == []


async def test_order_holds_within_one_batch_and_across_batches(store, clock):
    route_to(store, ("crm", {"order_by": "data.k"}))
    bodies = [b'{"k": %d}' % (number % 3) for number in range(30)]
    await asyncio.gather(*(store.events.append(accept(clock, body=body)) for body in bodies))
    assert len(store.fresh) == 3
    seen = []
    waiting = list(store.fresh)
    while waiting:
        delivery = waiting.pop()
        seen.append(delivery.id)
        await store.deliveries.settle(ending(delivery))
        waiting += (await store.deliveries.claim("crm", 9, retries=False)).deliveries
    made = await ids(store, "deliveries")
    assert sorted(seen) == made
    for key in range(3):
        mine = [number for number in map(made.index, seen) if number % 3 == key]
        assert mine == sorted(mine)


async def test_an_event_without_the_value_does_not_wait(store, clock):
    route_to(store, ("crm", {"order_by": "data.k"}))
    for _ in range(2):
        await store.events.append(accept(clock))
    assert [d.id for d in store.fresh] == await ids(store, "deliveries")


async def test_a_delivery_past_its_ttl_expires_even_if_claimed(store, clock):
    route_to(store, ("crm", {"ttl": 60}))
    await store.events.append(accept(clock))
    store.deliveries.release([store.fresh[0].id])
    await store.events.append(accept(clock))
    clock.advance(61)
    assert await store.deliveries.expire() == 2
    assert await store.deliveries.expire() == 0
    assert await states(store) == [("expired", "ttl")] * 2
    assert sorted(store.news[-1].dropped) == await ids(store, "deliveries")
    assert (await store.ledger.audit())["crm"].unaccounted == 0


async def test_a_delivery_in_flight_does_not_expire(store, clock):
    route_to(store, ("crm", {"ttl": 60}))
    await store.events.append(accept(clock))
    assert store.deliveries.begin_attempt(store.fresh[0].id)
    clock.advance(61)
    assert await store.deliveries.expire() == 0
    assert await store.deliveries.settle(ending(store.fresh[0])) is True


async def test_a_newer_event_of_a_type_and_key_expires_the_older(store, clock):
    route_to(store, ("crm", {"latest_by": "subject"}))
    await store.events.append(accept(clock))
    await store.events.append(accept(clock, subject="b"))
    await store.events.append(accept(clock, type="shop.other"))
    await store.events.append(accept(clock))
    assert await states(store) == [
        ("expired", "superseded"), ("pending", None), ("pending", None), ("pending", None),
    ]  # fmt: skip


async def test_of_one_batch_only_the_newest_of_a_key_is_sent(store, clock):
    route_to(store, ("crm", {"latest_by": "subject"}))
    await asyncio.gather(*(store.events.append(accept(clock)) for _ in range(5)))
    rows = await states(store)
    assert rows.count(("pending", None)) == 1
    assert rows[-1] == ("pending", None)
    assert (await store.ledger.audit())["crm"].unaccounted == 0


async def test_a_delivery_in_flight_is_never_superseded(store, clock):
    route_to(store, ("crm", {"latest_by": "subject"}))
    await store.events.append(accept(clock))
    assert store.deliveries.begin_attempt(store.fresh[0].id)
    await store.events.append(accept(clock))
    assert await states(store) == [("pending", None)] * 2
    assert await store.deliveries.settle(ending(store.fresh[0])) is True
    assert (await states(store))[0] == ("delivered", None)


@pytest.mark.parametrize("newer_is_delivered", [True, False])
async def test_a_superseded_delivery_in_flight_is_not_retried(store, clock, newer_is_delivered):
    """Its retry could reach the receiver after the newer event."""
    route_to(store, ("crm", {"latest_by": "subject"}))
    await store.events.append(accept(clock))
    older = store.fresh[0]
    assert store.deliveries.begin_attempt(older.id)
    await store.events.append(accept(clock))
    if newer_is_delivered:
        await store.deliveries.settle(ending(store.fresh[1]))
    outcome = ending(older, "pending", next_attempt_at=clock.steady() + SECOND)
    assert await store.deliveries.settle(outcome) is True
    assert (await states(store))[0] == ("expired", "superseded")
    clock.advance(60)
    assert (await store.deliveries.claim("crm", 9, retries=True)).deliveries == ()
    counts = (await store.ledger.audit())["crm"]
    assert (counts.expired, counts.unaccounted) == (1, 0)


async def test_a_failed_delivery_does_not_delay_a_newer_event_of_its_order_key(store, clock):
    route_to(store, ("crm", {"latest_by": "subject", "order_by": "subject"}))
    await store.events.append(accept(clock))
    assert store.deliveries.begin_attempt(store.fresh[0].id)
    await store.events.append(accept(clock))
    await store.deliveries.settle(ending(store.fresh[0], "pending", next_attempt_at=clock.steady() + SECOND))
    assert await due(store) == (await ids(store, "deliveries"))[1:]


async def test_beyond_max_pending_a_new_delivery_is_dead_and_counted(store, clock):
    route_to(store, ("crm", {"max_pending": 2}))
    await asyncio.gather(*(store.events.append(accept(clock)) for _ in range(4)))
    assert await states(store) == [("pending", None)] * 2 + [("dead", "backlog_full")] * 2
    await store.deliveries.settle(ending(store.fresh[0]))
    await store.events.append(accept(clock))
    counts = (await store.ledger.audit())["crm"]
    assert (counts.created, counts.pending, counts.dead, counts.unaccounted) == (5, 2, 2, 0)


async def test_the_backlog_is_known_again_after_a_restart(store, clock, tmp_path):
    route_to(store, ("crm", {"max_pending": 1}))
    await store.events.append(accept(clock))
    await store.close()
    again = make_store(tmp_path / "relay.db", clock)
    route_to(again, ("crm", {"max_pending": 1}))
    await again.open()
    try:
        await again.events.append(accept(clock))
        assert await states(again) == [("pending", None), ("dead", "backlog_full")]
    finally:
        await again.close()


async def test_a_dead_delivery_goes_to_on_dead_and_raises_an_event(store, clock):
    types = []
    hooks(store).listener = lambda news: (
        types.extend(e.type for e in news.events),
        store.fresh.extend(news.deliveries),
    )
    route_to(store, ("crm", {"on_dead": "spare"}))
    await store.events.append(accept(clock))
    await store.deliveries.settle(ending(store.fresh[0], "dead", reason="exhausted"))
    assert types == ["shop.order", "relay.delivery.dead"]
    first, _ = await ids(store)
    assert [(d.destination, d.event_id) for d in store.fresh] == [("crm", first), ("spare", first)]


async def test_a_dead_delivery_of_an_operator_event_raises_no_event(store, clock):
    hooks(store).route = Router({"ops": Subscription.of(("relay.*", "shop.*"))}).route
    await store.events.append(accept(clock))
    await store.deliveries.settle(ending(store.fresh[0], "dead", reason="exhausted"))
    assert [d.event.type for d in store.fresh] == ["shop.order", "relay.delivery.dead"]
    await store.deliveries.settle(ending(store.fresh[1], "dead", reason="exhausted"))
    assert len(store.fresh) == 2


async def test_the_outcome_decides_for_a_cancelled_delivery_in_flight(store, clock):
    route_to(store, ("crm", {}))
    await store.events.append(accept(clock))
    assert store.deliveries.begin_attempt(store.fresh[0].id)
    assert await store.deliveries.cancel([store.fresh[0].id]) == Cancelled(in_flight=1)
    assert await store.deliveries.settle(ending(store.fresh[0])) is True
    assert await states(store) == [("delivered", None)]


async def test_a_delivery_that_was_superseded_in_flight_is_not_sent_again_after_a_crash(store, clock):
    route_to(store, ("crm", {"latest_by": "subject", "ttl": 60.0}))
    await store.events.append(accept(clock))
    older = store.fresh[0]
    assert store.deliveries.begin_attempt(older.id)
    await store.events.append(accept(clock))
    assert await store.deliveries.expire() == 0
    store.claims.release([each.id for each in store.fresh])  # all that a crash leaves
    claimed = (await store.deliveries.claim("crm", 9, retries=False)).deliveries
    assert [overdue(each, clock.steady()) is not None for each in claimed] == [True, False]
    store.deliveries.release([each.id for each in claimed])
    assert await store.deliveries.expire() == 1
    assert await states(store) == [("expired", "superseded"), ("pending", None)]


@pytest.mark.parametrize("is_cancelled_first", [True, False])
async def test_a_cancelled_and_superseded_delivery_in_flight_is_cancelled(store, clock, is_cancelled_first):
    route_to(store, ("crm", {"latest_by": "subject"}))
    await store.events.append(accept(clock))
    older = store.fresh[0]
    assert store.deliveries.begin_attempt(older.id)
    for is_cancelled in (is_cancelled_first, not is_cancelled_first):
        if is_cancelled:
            assert await store.deliveries.cancel([older.id]) == Cancelled(in_flight=1)
        else:
            await store.events.append(accept(clock))
    store.claims.release([older.id])  # all that a crash leaves
    assert await store.deliveries.expire() == 1
    assert (await states(store))[0] == ("cancelled", "operator")


async def test_a_delivery_that_a_transaction_is_ending_cannot_begin(store, clock):
    route_to(store, ("crm", {}))
    await store.events.append(accept(clock))
    made = store.fresh[0].id
    cancelling = asyncio.ensure_future(store.deliveries.cancel([made]))
    began = []
    while not cancelling.done():
        began.append(store.deliveries.begin_attempt(made) if store.claims._ending else None)
        await asyncio.sleep(0)
    assert (await cancelling).ended == 1
    assert False in began


@pytest.mark.parametrize("path", ["subjects", "data..x", ""])
def test_a_malformed_path_is_refused(path):
    with pytest.raises(ValueError, match="path"):
        SubscriptionOptions.of("crm", order_by=path)
