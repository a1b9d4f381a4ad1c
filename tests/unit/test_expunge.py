"""Operators delete events: pending deliveries are cancelled first, and the ledger balances."""

import pytest
from stores import count_rows, end, ids, only_sqlite, opened, rows, send

from relay.model import Expunged, Outcome, Selection
from relay.store.sqlite import events


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


async def selected(store, **fields):
    selection = Selection(**fields)
    return [
        one async for one in store.events.expunge_selected(selection, await store.queries.span(selection))
    ]


async def test_an_event_is_deleted_with_its_deliveries_and_attempts(store, clock):
    event, other = await send(store, clock), await send(store, clock)
    await end(store, event)
    assert await store.events.expunge([event.id]) == Expunged(events=1, cancelled=0, left=())
    assert await ids(store) == [other.id]
    assert (await count_rows(store, "deliveries"), await count_rows(store, "attempts")) == (2, 0)


async def test_pending_deliveries_are_cancelled_first_and_lanes_are_notified(store, clock):
    event = await send(store, clock)
    await end(store, event, "dead", "erp")
    pending = [delivery.id for delivery in store.fresh if delivery.destination == "crm"]
    store.news.clear()
    assert await store.events.expunge([event.id]) == Expunged(events=1, cancelled=1, left=())
    assert [list(news.dropped) for news in store.news] == [pending]
    counts = await store.ledger.audit()
    assert (counts["crm"].created, counts["crm"].cancelled) == (1, 1)
    assert (counts["erp"].created, counts["erp"].dead) == (1, 1)


async def test_an_event_stays_while_a_delivery_is_in_flight(store, clock):
    event = await send(store, clock)
    [crm, _] = store.fresh
    assert store.deliveries.begin_attempt(crm.id)
    assert await store.events.expunge([event.id]) == Expunged(events=0, cancelled=1, left=(event.id,))
    await store.deliveries.settle(
        Outcome(delivery=crm, attempt=None, state="pending", next_attempt_at=clock.steady())
    )
    assert await store.events.expunge([event.id]) == Expunged(events=1, cancelled=0, left=())
    assert (await store.ledger.audit())["crm"].cancelled == 1


async def test_deleting_a_deleted_event_does_nothing(store):
    assert await store.events.expunge([1, 2, 3]) == Expunged(events=0, cancelled=0, left=())


async def test_only_the_events_of_a_subject_are_deleted(store, clock):
    sent = [await send(store, clock, subject=subject) for subject in ("a", "b", "a", None)]
    [done] = await selected(store, subject="a")
    assert (done.events, done.cancelled) == (2, 4)
    assert await ids(store) == [sent[1].id, sent[3].id]


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"type": "shop.*"}, [3]),
        ({"source": "till"}, [1, 2]),
        ({"destination": "crm", "state": "dead"}, [1, 3]),
        ({}, []),
    ],
)
async def test_a_selection_is_deleted(store, clock, fields, left):
    sent = [await send(store, clock, type=type_) for type_ in ("shop.order", "shop.refund", "till.paid")]
    await end(store, store.fresh[2].event, "dead", "crm")
    [(event,)] = await rows(store, "SELECT id FROM events WHERE source = 'relay'")
    await selected(store, **fields)
    assert await ids(store) == [
        *(sent[number - 1].id for number in left),
        event,
    ]  # deleting it needs its source or type


async def test_a_large_selection_is_deleted_page_by_page(store, clock, monkeypatch):
    monkeypatch.setattr("relay.store.queries.selection.PAGE", 7)
    monkeypatch.setattr(events, "EXPUNGE_EVENTS", 3)
    for _ in range(20):
        await send(store, clock)
    steps = await selected(store, source="shop")
    assert [step.events for step in steps if step.events] == [7, 7, 6]
    assert await ids(store) == []
    assert (await store.ledger.audit())["erp"].cancelled == 20


async def test_counts_and_idempotency_keys_outlive_deleted_events(store, clock):
    event = await send(store, clock, key="k")
    await store.events.expunge([event.id])
    assert await count_rows(store, "stats") == 1
    again = await send(store, clock, key="k")
    assert again.id == 0
    assert await ids(store) == []


@pytest.mark.parametrize("sql", [events.PENDING_SQL, events.COST_SQL])
@only_sqlite("plans of its statements")
async def test_deletions_scan_no_table(store, sql):
    plan = await rows(store, f"EXPLAIN QUERY PLAN {sql.format(marks='?, ?')}", (1, 2))
    steps = [row[3] for row in plan]
    assert any(step.startswith("SEARCH") for step in steps)
    assert not any(step.startswith("SCAN") for step in steps), steps
