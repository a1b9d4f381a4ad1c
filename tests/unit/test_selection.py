"""Selections contain exactly the matching events or deliveries, and are read along an index."""

import pytest
from stores import KINDS, accept, hooks, ids, make_store, numbers, only_sqlite
from stores import rows as read_rows

from bench.lists import Traced, faults
from relay.base.clock import SECOND
from relay.errors import RelayError, UnknownError
from relay.model import Attempt, Outcome, Selection, Target
from relay.store import Span
from relay.store.queries import selection
from relay.store.sqlite.database import Database
from relay.store.sqlite.queries import PENDING_SQL, SqliteReader


@pytest.fixture(params=KINDS)
async def store(request, tmp_path, clock):
    if request.param != "sqlite" and request.node.get_closest_marker("skipif"):
        pytest.skip("looks at the plans of SQLite")
    store = make_store(tmp_path / "relay.db", clock, kind=request.param)
    hooks(store).route = lambda event: () if event.source == "relay" else (Target("crm"), Target("erp"))
    store.fresh = []
    hooks(store).listener = lambda news: store.fresh.extend(news.deliveries)
    await store.open()
    yield store
    await store.close()


async def send(store, clock, type_="shop.order", subject=None, source="shop"):
    clock.advance(1)
    accepted = accept(clock, type=type_, subject=subject, source=source)
    return (await store.events.append(accepted)).event_id


async def end(store, number, state, **fields):
    """End the delivery with a row id, or let it wait for a retry."""
    id_ = (await ids(store, "deliveries"))[number - 1]
    [delivery] = [delivery for delivery in store.fresh if delivery.id == id_]
    attempt = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500)
    await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state=state, **fields))


async def chosen(store, **fields):
    selection = Selection(**fields)
    span = await store.queries.span(selection)
    known = await numbers(store)
    return [
        (known[one.event_id], *one.destinations)
        async for page in store.queries.select(selection, span)
        for one in page
    ]


async def pending(store, **fields):
    known = await numbers(store, "deliveries")
    return [known[one] async for page in store.queries.pending(Selection(**fields)) for one in page]


def order_crm(event):
    return (Target("crm", order_key=event.subject), Target("erp")) if event.source == "shop" else ()


@pytest.fixture
async def shops(store, clock):
    """Store six events of three sources, one second after the other."""
    begun = clock.wall()
    for type_, subject in (("order", "a"), ("order", "b"), ("refund.full", "a"), ("refund.part", None)):
        await send(store, clock, f"shop.{type_}", subject)
    await send(store, clock, "till.order", "a", "till")
    await send(store, clock, "relay.destination.disabled", "crm", "relay")
    return begun


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"source": "relay"}, [6]),
        ({"source": "till"}, [5]),
        ({"type": "shop.order"}, [1, 2]),
        ({"type": "shop.refund.*"}, [3, 4]),
        ({"type": "*.order"}, [1, 2, 5]),
        ({"type": "*"}, [1, 2, 3, 4, 5]),
        ({"type": "relay.*"}, [6]),
        ({"subject": "a"}, [1, 3, 5]),
        ({"subject": "a", "source": "shop", "type": "*.order"}, [1]),
        ({"subject": "nobody"}, []),
        ({"destination": "crm"}, [1, 2, 3, 4, 5]),
        ({"destination": "nowhere"}, []),
    ],
)
async def test_a_selection_matches_all_of_its_fields(store, shops, fields, ids):
    assert [found[0] for found in await chosen(store, **fields)] == ids


@pytest.mark.parametrize(
    ("since", "until", "ids"),
    [(2, None, [2, 3, 4, 5]), (None, 3, [1, 2]), (3, 5, [3, 4]), (7, None, []), (None, 1, [])],
)
async def test_since_is_included_and_until_is_not(store, shops, since, until, ids):
    times = [None if second is None else shops + second * SECOND for second in (since, until)]
    assert [found[0] for found in await chosen(store, since=times[0], until=times[1])] == ids


async def test_a_clock_that_was_set_back_hides_no_event(store, clock):
    await send(store, clock)
    clock.now -= 3600 * SECOND
    early = clock.wall()
    await send(store, clock)
    clock.now += 7200 * SECOND
    late = clock.wall()
    await send(store, clock)
    assert [found[0] for found in await chosen(store, until=late)] == [1, 2]
    assert [found[0] for found in await chosen(store, since=early, until=early + 5 * SECOND)] == [2]


async def test_selected_events_have_the_destinations_of_their_matching_deliveries(store, shops):
    await end(store, 1, "dead", reason="exhausted")
    await end(store, 2, "dead", reason="exhausted")
    await end(store, 5, "dead", reason="exhausted")
    await end(store, 7, "delivered")
    assert await chosen(store, state="dead") == [(1, "crm", "erp"), (3, "crm")]
    assert await chosen(store, state="dead", destination="erp") == [(1, "erp")]
    assert await chosen(store, state="dead", subject="a", type="shop.order") == [(1, "crm", "erp")]
    assert await chosen(store, state="delivered") == [(4, "crm")]
    assert (await chosen(store, state="pending", destination="crm")) == [(2, "crm"), (5, "crm")]


async def test_only_the_latest_delivery_to_a_destination_counts(store, shops):
    await end(store, 1, "dead", reason="exhausted")
    [event] = (await store.events.load((await ids(store))[:1])).values()
    assert await store.deliveries.repeat([(event, Target("crm"))]) == (True,)
    assert await chosen(store, state="dead") == []
    await end(store, len(store.fresh), "dead", reason="exhausted")
    assert await chosen(store, state="dead") == [(1, "crm")]


@pytest.mark.parametrize("fields", [{}, {"type": "shop.refund.*"}, {"destination": "crm"}, {"state": "dead"}])
async def test_small_pages_contain_the_same_events(store, shops, monkeypatch, fields):
    for number in (1, 2, 5, 6, 9):
        await end(store, number, "dead", reason="exhausted")
    whole = await chosen(store, **fields)
    for size in (1, 2, 3):
        monkeypatch.setattr(selection, "PAGE", size)
        assert await chosen(store, **fields) == whole
    assert whole


async def test_events_after_the_span_are_left_out(store, clock, shops):
    span = await store.queries.span(Selection())
    await send(store, clock)
    known = await numbers(store)
    assert (span.first, known[span.last]) == (1, 6)
    assert [known[one.event_id] async for page in store.queries.select(Selection(), span) for one in page][
        -1
    ] == 5


async def test_selections_of_an_empty_store_are_empty(store):
    assert await chosen(store) == []
    assert await pending(store) == []


async def test_pending_deliveries_are_found_in_every_group(store, clock):
    hooks(store).route = order_crm
    for _ in range(3):
        await send(store, clock, subject="a")
    await end(store, 1, "pending", next_attempt_at=clock.steady() + SECOND)
    await end(store, 2, "delivered")
    await end(store, 4, "dead", reason="exhausted")
    assert sorted(await pending(store)) == [1, 3, 5, 6]
    assert await pending(store, destination="crm") == [3, 5, 1]
    assert await pending(store, destination="erp", subject="b") == []


@pytest.mark.parametrize("size", [1, 2])
async def test_small_pages_contain_the_same_pending_deliveries(store, clock, monkeypatch, size):
    hooks(store).route = lambda event: (Target("crm", order_key=event.subject),)
    for number in range(6):
        await send(store, clock, subject=f"{number // 2}")
    for number in (1, 3):
        await end(store, number, "pending", next_attempt_at=clock.steady() + SECOND)
    monkeypatch.setattr(selection, "PAGE", size)
    assert await pending(store) == [2, 4, 6, 5, 1, 3]


async def test_ids_may_lack_their_prefix_and_be_shortened_while_unique(store, clock):
    first = await send(store, clock)
    second = await send(store, clock)
    known = await numbers(store)
    both = second[4:9]
    assert first[4:9] == both
    bare = first[4:].replace("-", "")
    for given in (
        first,
        first[4:],
        first.upper().replace("EVT", "evt"),
        first[:-5],
        first[4:-5],
        bare,
        bare[:-5],
    ):
        assert [known[one.event_id] for one in await store.queries.name_events([given])] == [1]
    named = await store.queries.name_events([second, first, second[4:]])
    assert [known[one.event_id] for one in named] == [1, 2]
    with pytest.raises(RelayError, match=f'ambiguous event id "{both}"; matches: {first}, {second}'):
        await store.queries.name_events([both])


async def test_the_digits_of_ids_find_each_of_them_and_no_shorter_prefix_does(store, clock):
    for _ in range(4):  # in one millisecond
        await store.events.append(accept(clock))
    for kind, find in (("events", store.queries.name_events), ("deliveries", store.queries.name_deliveries)):
        stored = [row["id"] for row in await store.queries.find(kind)]
        for listed in (stored[:1], stored):
            digits = await store.queries.digits_of(kind, listed)
            prefixes = [each[4:].replace("-", "")[:digits] for each in listed]
            assert len(await find(prefixes)) == len(listed)
            with pytest.raises(RelayError, match="ambiguous"):
                await find([each[: digits - 1] for each in prefixes])
    assert await store.queries.digits_of("events", []) == 0


async def test_an_ambiguous_id_lists_its_first_five_candidates(store, clock):
    hooks(store).route = lambda _: (Target("crm"), Target("erp"))
    ids = sorted([await send(store, clock) for _ in range(6)])
    with pytest.raises(RelayError) as raised:
        await store.queries.name_events(["0"])
    assert raised.value.message == f'ambiguous event id "0"; matches: {", ".join(ids[:5])}, …'
    rows = await store.queries.find("deliveries", event_id=ids[0])
    candidates = ", ".join(sorted(f"{row['id']} ({row['destination']})" for row in rows))
    with pytest.raises(RelayError) as raised:  # both were made in the same millisecond
        await store.queries.name_deliveries([rows[0]["id"][4:17].replace("-", "")])
    assert raised.value.message.endswith(f"; matches: {candidates}")


async def test_deliveries_are_found_by_shortened_ids(store, clock):
    await send(store, clock)
    rows = await store.queries.find("deliveries")
    named = await store.queries.name_deliveries([row["id"][4:] for row in rows])
    known, events = await numbers(store, "deliveries"), await numbers(store)
    assert [
        (known[one.id], one.state, events[one.chosen.event_id], *one.chosen.destinations) for one in named
    ] == [
        (1, "pending", 1, "crm"),
        (2, "pending", 1, "erp"),
    ]


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ("evt_00000000", UnknownError, 'unknown event "evt_00000000"'),
        ("dlv_00000000", RelayError, "is not a valid event id"),
        ("", RelayError, "is not a valid event id"),
        ("evt_", RelayError, "is not a valid event id"),
        ("%", RelayError, "is not a valid event id"),
    ],
)
async def test_an_unknown_or_malformed_id_is_refused(store, clock, given, error, why):
    await send(store, clock)
    with pytest.raises(error, match=why):
        await store.queries.name_events([given])


async def test_too_many_ids_are_refused(store):
    with pytest.raises(RelayError, match="1001 ids") as refused:
        await store.queries.name_events(["evt_0"] * 1001)
    assert refused.value.hint == "use a filter instead"


@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({}, "SEARCH events USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"),
        ({"source": "shop"}, "events_source (source=? AND id>? AND id<?)"),
        ({"type": "shop.order"}, "events_type (type=? AND id>? AND id<?)"),
        ({"type": "shop.*"}, "events_type (type=? AND id>? AND id<?)"),
        ({"subject": "a", "type": "shop.order"}, "events_subject (subject=? AND id>? AND id<?)"),
        ({"state": "dead"}, "deliveries_repeat (state=? AND event_id>? AND event_id<?)"),
        (
            {"state": "dead", "destination": "crm"},
            "deliveries_lost (destination=? AND state=? AND event_id>? AND event_id<?)",
        ),
        ({"state": "delivered", "source": "shop"}, "events_source (source=? AND id>? AND id<?)"),
        ({"destination": "crm"}, "deliveries_destination (destination=? AND id>?)"),
        ({"destination": "crm"}, "d USING INDEX deliveries_event (event_id=?)"),
        ({"state": "pending"}, "deliveries_retry (destination=?)"),
    ],
)
@only_sqlite("plans of its statements")
async def test_every_selection_uses_an_index(store, shops, fields, index):
    traced = Traced(store.database.reader)
    reader = SqliteReader(Database.reading(store.path, traced))
    assert [page async for page in selection.select(reader, Selection(**fields), Span(1, 9))]
    plans = await traced.plans()
    assert {sql: faults(plan) for sql, plan in plans.items() if faults(plan)} == {}
    assert any(index in step for plan in plans.values() for step in plan), plans


@pytest.mark.parametrize(
    ("sql", "index"),
    list(zip(PENDING_SQL, ["deliveries_first"] * 2 + ["deliveries_retry"], strict=True)),
)
@only_sqlite("plans of its statements")
async def test_every_group_of_pending_deliveries_uses_an_index_without_sorting(store, sql, index):
    values = {"destination": "crm", "last": 9, "due": 0, "id": 0, "page": 9}
    steps = [row[3] for row in await read_rows(store, f"EXPLAIN QUERY PLAN {sql}", values)]
    assert faults(steps) == []
    assert any(f"INDEX {index} (destination=?" in step for step in steps), steps
