"""Deliveries that no receiver accepts: the operator is warned, they expire, and the ledger balances."""

import msgspec
import pytest
from stores import accept, hooks, is_postgres, make_store, only_sqlite
from stores import rows as read_rows

from relay.base.clock import SECOND
from relay.model import Attempt, Outcome, Target
from relay.store.postgres import transitions as postgres_transitions
from relay.store.sqlite import transitions

DAY = 86_400.0
KEPT = int(30 * DAY * SECOND)


def make(path, clock):
    store = make_store(path, clock)
    hooks(store).route = lambda event: (
        (Target("ops"),)
        if event.source == "relay"
        else (Target("crm", order_key=event.subject), Target("erp"))
    )
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    return store


@pytest.fixture
async def store(tmp_path, clock):
    store = make(tmp_path / "relay.db", clock)
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    await store.close()


async def send(store, clock, subject=None):
    await store.events.append(accept(clock, subject=subject))


async def fail(store, clock, destination, seconds):
    """Have the latest delivery to a destination wait for a retry."""
    delivery = [each for each in store.fresh if each.destination == destination][-1]
    attempt = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500)
    due = clock.steady() + int(seconds * SECOND)
    await store.deliveries.settle(
        Outcome(delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due)
    )


async def look(store, *names, kept=KEPT):
    """Expire overdue deliveries as the daemon does; return their number."""
    count = 0
    while some := await store.deliveries.expire_held(names, kept):
        count += some
    return count


async def states(store, destination):
    rows = await store.queries.find("deliveries", destination=destination, limit=500)
    return [(row["state"], row["reason"]) for row in reversed(rows)]


def warnings(store):
    return [
        (event.subject, msgspec.json.decode(event.body))
        for news in store.news
        for event in news.events
        if event.type == "relay.deliveries.expiring"
    ]


async def test_only_deliveries_held_for_the_whole_time_expire(store, clock):
    await look(store, "crm")
    await send(store, clock)
    clock.advance(30 * DAY - 1)
    assert await look(store, "crm") == 0
    clock.advance(1)
    assert await look(store, "crm") == 1
    assert await states(store, "crm") == [("expired", "held")]
    assert await states(store, "erp") == [("pending", None)]
    assert (await store.ledger.audit())["crm"].expired == 1


async def test_a_delivery_in_between_restarts_the_time_of_holding(store, clock):
    await send(store, clock)
    await look(store, "crm")
    clock.advance(20 * DAY)
    await look(store)
    await look(store, "crm")
    clock.advance(29 * DAY)
    assert await look(store, "crm") == 0
    clock.advance(DAY)
    assert await look(store, "crm") == 1


async def test_a_retry_is_held_from_its_due_time_on(store, clock):
    await send(store, clock)
    await look(store, "crm")
    await fail(store, clock, "crm", 5 * DAY)
    clock.advance(30 * DAY)
    assert await look(store, "crm") == 0
    clock.advance(5 * DAY)
    assert await look(store, "crm") == 1


async def test_an_ordered_delivery_that_waits_expires_by_its_creation_time(store, clock):
    for _ in range(3):
        await send(store, clock, "a")
    await look(store, "crm")
    clock.advance(20 * DAY)
    await send(store, clock, "a")
    clock.advance(10 * DAY)
    store.news.clear()
    assert await look(store, "crm") == 3
    assert [state for state, _ in await states(store, "crm")] == ["expired"] * 3 + ["pending"]
    assert [news.woken for news in store.news if news.woken] == [{"crm"}]


async def test_the_operator_is_warned_once_a_day_before(store, clock):
    await send(store, clock)
    await look(store, "crm")
    clock.advance(29 * DAY - 1)
    await look(store, "crm")
    assert warnings(store) == []
    clock.advance(1)
    for _ in range(3):
        await look(store, "crm")
        clock.advance(60)
    data = {"destination": "crm", "expires_in_seconds": 86_400, "held": 30 * 86_400}
    assert warnings(store) == [("crm", data)]
    await look(store)
    await look(store, "crm")
    clock.advance(29 * DAY)
    await look(store, "crm")
    assert len(warnings(store)) == 2


async def test_there_is_no_warning_long_before_a_delivery_expires(store, clock):
    await look(store, "crm", "erp")
    clock.advance(40 * DAY)
    await look(store, "crm", "erp")
    await send(store, clock)
    clock.advance(28 * DAY)
    await look(store, "crm", "erp")
    assert warnings(store) == []
    clock.advance(DAY)
    await look(store, "crm", "erp")
    assert [subject for subject, _ in warnings(store)] == ["crm", "erp"]


async def test_with_a_short_limit_the_warning_comes_half_way(store, clock):
    kept = 3600 * SECOND
    await send(store, clock)
    await look(store, "crm", kept=kept)
    clock.advance(1799)
    await look(store, "crm", kept=kept)
    assert warnings(store) == []
    clock.advance(1)
    await look(store, "crm", kept=kept)
    assert len(warnings(store)) == 1


async def test_a_restart_does_not_restart_the_time_of_holding(tmp_path, store, clock):
    await send(store, clock)
    await look(store, "crm")
    clock.advance(29 * DAY)
    await look(store, "crm")
    await store.close()
    clock.advance(DAY)
    again = make(tmp_path / "relay.db", clock)
    await again.open()
    assert await look(again, "crm") == 1
    assert warnings(again) == []
    await again.close()
    await store.open()


async def test_a_delivery_in_flight_does_not_expire_while_held(store, clock):
    await send(store, clock)
    await look(store, "crm")
    [delivery] = [each for each in store.fresh if each.destination == "crm"]
    assert store.deliveries.begin_attempt(delivery.id)
    clock.advance(31 * DAY)
    assert await look(store, "crm") == 0
    await store.deliveries.settle(Outcome(delivery=delivery, attempt=None, state="delivered"))
    assert await states(store, "crm") == [("delivered", None)]


async def test_many_expire_in_small_transactions(store, clock, monkeypatch):
    module = postgres_transitions if is_postgres(store) else transitions
    monkeypatch.setattr(module, "HELD_AT_ONCE", 10)
    for number in range(25):
        await send(store, clock)
        if number % 2:
            await fail(store, clock, "crm", 0)
    await look(store, "crm")
    clock.advance(31 * DAY)
    store.news.clear()
    assert await look(store, "crm") == 25
    assert [len(news.dropped) for news in store.news if news.dropped] == [20, 5]


@only_sqlite("plans of its statements")
@pytest.mark.parametrize(
    ("sql", "values"),
    [
        (transitions.WAITING_SQL, ("crm", 1, 1)),
        *[(transitions.DUE_SQL.format(share=share), ("crm", 1, 1)) for share in transitions.SHARES],
        *[(transitions.FIRST_SQL.format(share=share), ("crm",)) for share in transitions.SHARES],
    ],
)
async def test_the_search_for_held_deliveries_scans_no_table(store, sql, values):
    plan = [row[3] for row in await read_rows(store, f"EXPLAIN QUERY PLAN {sql}", values)]
    assert any("SEARCH deliveries USING" in step and "INDEX deliveries_" in step for step in plan), plan
    assert not any("SCAN deliveries" in step or "TEMP B-TREE" in step for step in plan), plan
