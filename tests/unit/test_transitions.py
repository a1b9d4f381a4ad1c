"""Changes that operators make to deliveries: cancel, make due, repeat. The ledger balances after each."""

import asyncio

import pytest
from stores import KINDS, accept, change_rows, hooks, ids, is_postgres, make_store, refuse_writes
from support import until

from relay.base.clock import SECOND
from relay.errors import StorageUnavailableError
from relay.model import Attempt, Outcome, Target
from relay.store import Cancelled


@pytest.fixture(params=KINDS)
async def store(request, tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock, kind=request.param)
    owe(store, Target("crm"))
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    await store.close()


def owe(store, *owed):
    hooks(store).route = lambda event: () if event.source == "relay" else owed


async def send(store, clock):
    """Append one event and return the delivery that was made for it."""
    await store.events.append(accept(clock, b"{}"))
    return store.fresh[-1]


def ending(delivery, state="delivered", **fields):
    attempt = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500)
    return Outcome(delivery=delivery, attempt=attempt, state=state, **fields)


async def states(store):
    return [
        (row["state"], row["reason"]) for row in reversed(await store.queries.find("deliveries", limit=500))
    ]


async def books(store, name="crm"):
    counts = (await store.ledger.audit())[name]
    return {field: n for field in counts.__struct_fields__ if (n := getattr(counts, field))}


async def event(store, number):
    """Load an event by its place in the order of acceptance, from 1."""
    id_ = (await ids(store))[number - 1]
    return (await store.events.load([id_]))[id_]


async def again(store, number=1, *owed):
    event_ = await event(store, number)
    return await store.deliveries.repeat([(event_, each) for each in owed or (Target("crm"),)])


# --- cancel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ({"state": "delivered"}, ("delivered", None)),
        ({"state": "pending", "next_attempt_at": 1}, ("cancelled", "operator")),
        ({"state": "pending", "next_attempt_at": 1, "counts": False}, ("cancelled", "operator")),
        ({"state": "dead", "reason": "exhausted"}, ("cancelled", "operator")),
    ],
)
async def test_a_delivery_in_flight_is_cancelled_unless_its_attempt_succeeds(store, clock, outcome, state):
    delivery = await send(store, clock)
    assert store.deliveries.begin_attempt(delivery.id)
    assert await store.deliveries.cancel([delivery.id]) == Cancelled(in_flight=1)
    assert await states(store) == [("pending", None)]
    assert await store.deliveries.settle(ending(delivery, **outcome))
    assert await states(store) == [state]
    assert await books(store) == {"created": 1, state[0]: 1}
    assert len(await store.queries.find("attempts")) == 1


async def test_a_cancelled_delivery_that_would_be_dead_raises_no_event(store, clock):
    owe(store, Target("crm", on_dead="spare"))
    delivery = await send(store, clock)
    store.deliveries.begin_attempt(delivery.id)
    await store.deliveries.cancel([delivery.id])
    await store.deliveries.settle(ending(delivery, "dead", reason="exhausted"))
    assert [event.type for news in store.news for event in news.events] == ["shop.order"]
    assert await states(store) == [("cancelled", "operator")]


async def test_a_cancellation_and_an_outcome_in_one_transaction_end_the_delivery_once(store, clock):
    delivery = await send(store, clock)
    store.deliveries.begin_attempt(delivery.id)
    results = await asyncio.gather(
        store.deliveries.settle(ending(delivery, "pending", next_attempt_at=clock.steady())),
        store.deliveries.cancel([delivery.id]),
    )
    assert results == [True, Cancelled(ended=1)]
    assert await states(store) == [("cancelled", "operator")]
    assert (await store.deliveries.claim("crm", 9, retries=True)).deliveries == ()


async def test_a_cancelled_delivery_released_without_an_outcome_is_cancelled(store, clock):
    delivery = await send(store, clock)
    store.deliveries.begin_attempt(delivery.id)
    await store.deliveries.cancel([delivery.id])
    store.deliveries.release([delivery.id])
    await until(lambda: delivery.id in store.news[-1].dropped)
    assert await states(store) == [("cancelled", "operator")]


async def test_a_cancelled_delivery_whose_attempt_a_stop_cut_off_is_cancelled(store, clock, tmp_path):
    delivery = await send(store, clock)
    store.deliveries.begin_attempt(delivery.id)
    await store.deliveries.cancel([delivery.id])
    await store.close()
    await store.open()
    assert await states(store) == [("cancelled", "operator")]


async def test_a_failed_cancellation_leaves_nothing_behind(store, clock):
    delivery = await send(store, clock)
    store.deliveries.begin_attempt(delivery.id)
    await refuse_writes(store, now=True)
    results = await asyncio.gather(
        store.deliveries.cancel([delivery.id]),
        store.events.append(accept(clock, b"x" * 4_000_000)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [StorageUnavailableError] * 2
    await refuse_writes(store, now=False)
    await until(lambda: store.failure is None)
    await store.deliveries.settle(ending(delivery, "pending", next_attempt_at=clock.steady()))
    assert await states(store) == [("pending", None)]


async def test_more_are_cancelled_at_once_than_sqlite_takes_values(store, clock):
    for _ in range(20):
        await send(store, clock)
    many = [*await ids(store, "deliveries"), *range(1000, 41_000)]
    assert await store.deliveries.cancel(many) == Cancelled(ended=20)
    assert await books(store) == {"created": 20, "cancelled": 20}


async def test_cancelling_and_retrying_do_not_change_ended_deliveries(store, clock):
    delivery = await send(store, clock)
    await store.deliveries.settle(ending(delivery))
    assert await store.deliveries.cancel([delivery.id, 99]) == Cancelled()
    assert await store.deliveries.make_due([delivery.id, 99]) == 0
    assert await states(store) == [("delivered", None)]


# --- make due --------------------------------------------------------------------------------------------


async def test_a_retry_made_due_is_due_now_and_its_lane_is_notified(store, clock):
    delivery = await send(store, clock)
    await store.deliveries.settle(ending(delivery, "pending", next_attempt_at=clock.steady() + 3600 * SECOND))
    assert await store.deliveries.make_due([delivery.id, delivery.id]) == 1
    assert store.news[-1].made_due == {"crm"}
    [claimed] = (await store.deliveries.claim("crm", 9, retries=True)).deliveries
    assert (claimed.id, claimed.attempts) == (delivery.id, 1)


async def test_a_delivery_that_waits_for_its_order_key_cannot_be_made_due(store, clock):
    owe(store, Target("crm", order_key="a"))
    await send(store, clock)
    await send(store, clock)
    assert await store.deliveries.make_due(await ids(store, "deliveries")) == 0
    assert (await store.deliveries.claim("crm", 9, retries=False)).deliveries == ()


# --- repeat -------------------------------------------------------------------------------------------


async def test_a_repeated_event_gets_a_new_delivery_that_refers_to_the_latest(store, clock):
    await store.deliveries.settle(ending(await send(store, clock)))
    assert await again(store) == (True,)
    repeated = store.fresh[-1]
    [first, second], [event_id] = await ids(store, "deliveries"), await ids(store)
    assert (repeated.id, repeated.event_id, repeated.replay_of) == (second, event_id, first)
    assert repeated.attempts == 0
    assert repeated.event.body == b"{}"
    await store.deliveries.settle(ending(repeated, "dead", reason="aborted"))
    assert await again(store) == (True,)
    assert store.fresh[-1].replay_of == second
    rows = await store.queries.find("deliveries")
    assert [row["replay_of"] for row in rows] == [rows[1]["id"], rows[2]["id"], None]
    assert await books(store) == {"created": 3, "delivered": 1, "dead": 1, "pending": 1}


async def test_a_destination_that_never_had_the_event_gets_a_first_delivery(store, clock):
    await send(store, clock)
    assert await again(store, 1, Target("new"), Target("crm")) == (True, False)
    assert (store.fresh[-1].destination, store.fresh[-1].replay_of) == ("new", None)
    assert await books(store, "new") == {"created": 1, "pending": 1}


async def test_a_pending_delivery_is_not_repeated(store, clock):
    await store.deliveries.settle(ending(await send(store, clock)))
    twice = await asyncio.gather(again(store), again(store))
    assert sorted(twice) == [(False,), (True,)]
    assert await again(store, 1, Target("crm"), Target("crm")) == (False, False)
    assert await books(store) == {"created": 2, "delivered": 1, "pending": 1}


async def test_a_deleted_event_is_skipped_when_events_are_repeated(store, clock):
    for _ in range(2):
        await store.deliveries.settle(ending(await send(store, clock)))
    events = [await event(store, 1), await event(store, 2)]
    first = (await ids(store, "deliveries"))[0]
    tables = {
        "attempts WHERE delivery_id": first,
        "deliveries WHERE id": first,
        "events WHERE id": events[0].id,
    }
    if is_postgres(store):
        tables["ends WHERE delivery_id"] = first
    for table, id_ in tables.items():
        await change_rows(store, f"DELETE FROM {table} = {id_}")
    try:
        repeated = await store.deliveries.repeat([(each, Target("crm")) for each in events])
    finally:
        await change_rows(store, "UPDATE ledger SET created = created - 1, delivered = delivered - 1")
    assert repeated == (False, True)
    assert store.fresh[-1].event_id == events[1].id


async def test_a_repeated_delivery_has_the_options_of_the_request(store, clock):
    await store.deliveries.settle(ending(await send(store, clock)))
    await again(store, 1, Target("crm", order_key="k", ttl=60 * SECOND, on_dead="spare"))
    repeated = store.fresh[-1]
    assert (repeated.order_key, repeated.on_dead) == ("k", "spare")
    assert repeated.expires_at == clock.steady() + 60 * SECOND


async def test_repeated_deliveries_of_one_order_key_are_sent_in_order(store, clock):
    for _ in range(3):
        await store.deliveries.settle(ending(await send(store, clock)))
    events = [await event(store, number) for number in (1, 2, 3)]
    await store.deliveries.repeat([(each, Target("crm", order_key="k")) for each in events])
    for number in (1, 2, 3):
        repeated = (
            store.fresh[-1]
            if number == 1
            else (await store.deliveries.claim("crm", 9, retries=False)).deliveries[0]
        )
        assert repeated.event_id == events[number - 1].id
        assert (await store.deliveries.claim("crm", 9, retries=False)).deliveries == ()
        await store.deliveries.settle(ending(repeated))


async def test_beyond_max_pending_a_repeated_delivery_is_dead_and_counted(store, clock):
    await store.deliveries.settle(ending(await send(store, clock)))
    await send(store, clock)
    assert await again(store, 1, Target("crm", max_pending=1)) == (True,)
    assert await books(store) == {"created": 3, "delivered": 1, "dead": 1, "pending": 1}


@pytest.mark.parametrize(("number", "newest"), [(1, 2), (3, 3)])
async def test_with_latest_by_the_newest_event_stays_whichever_is_repeated(store, clock, number, newest):
    for _ in range(3):
        await store.deliveries.settle(ending(await send(store, clock)))
    await again(store, 2, Target("crm", latest_key="k"))
    await again(store, number, Target("crm", latest_key="k"))
    [pending] = await store.queries.find("deliveries", state="pending")
    [found] = await store.queries.find("events", id=pending["event_id"])
    assert found["row"] == (await ids(store))[newest - 1]


async def test_of_events_repeated_together_only_the_newest_of_a_key_is_sent(store, clock):
    for _ in range(3):
        await store.deliveries.settle(ending(await send(store, clock)))
    events = [await event(store, number) for number in (3, 1, 2)]
    await store.deliveries.repeat([(each, Target("crm", latest_key="k")) for each in events])
    assert (await states(store))[3:] == [("pending", None)] + [("expired", "superseded")] * 2
