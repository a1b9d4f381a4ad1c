"""Lists return exactly the matching rows in order, page by page; each uses an index and has a budget."""

import itertools
from collections import Counter

import pytest
from stores import ids, make_event, only_sqlite, opened, send
from stores import rows as read_rows

from bench.filling import END, fill
from bench.lists import OPTIONS, deep, faults, filter_sets, open_traced
from relay.api.query_params import filters_of
from relay.api.views import list_items
from relay.base.clock import SECOND
from relay.errors import RelayError
from relay.model import Attempt, Outcome, Selection, Target
from relay.routing.subscription import Patterns
from relay.store import Acceptance
from relay.store.queries import page as pages
from relay.store.queries import plan
from relay.store.queries.filters import FILTERS
from relay.store.sqlite import event_times

EVENTS = 500
"""Events of the filled store: enough for several pages, and few enough for hundreds of queries."""


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    import asyncio  # noqa: PLC0415 - a fixture of the module has no loop

    path = tmp_path_factory.mktemp("filled") / "relay.db"
    asyncio.run(fill(path, EVENTS))
    return path


async def rows(store):
    """Return all deliveries with their events as tuples."""
    return await store.traced.execute_fetchall(
        """
        SELECT e.id, e.public_id, e.source, e.type, e.subject, e.received_at, d.id, d.public_id,
               d.destination, d.state
          FROM events AS e JOIN deliveries AS d ON d.event_id = e.id ORDER BY e.id, d.id
        """
    )


def expected(kind, filters, found):
    """Return the ids of a list by comparing every row, newest first."""
    times_ = {"2h": END - 7200 * SECOND, "10d": END - 10 * 86400 * SECOND, "13d": END - 13 * 86400 * SECOND}
    wanted = {name: times_.get(value, value) for name, value in filters.items()}
    to, state = wanted.pop("destination", None), wanted.pop("state", None)
    selection = Selection(**wanted)
    patterns = None if selection.type is None else Patterns((selection.type,))
    fits = [
        row
        for row in found
        if to in (None, row[8])
        and state in (None, row[9])
        and selection.source in (None, row[2])
        and (patterns is None or patterns.matches(row[3]))
        and selection.subject in (None, row[4])
        and (selection.since is None or row[5] >= selection.since)
        and (selection.until is None or row[5] < selection.until)
    ]
    if kind == "events":
        return list(dict.fromkeys(row[1] for row in reversed(fits)))
    return [row[7] for row in sorted(fits, key=lambda row: (row[0], row[6]), reverse=True)]


async def whole(store, kind, filters, limit=50, most=2000):
    """Return the ids of all pages of a list."""
    found, cursor = [], None
    for _ in range(most):
        page = await list_items(
            store,
            kind,
            limit=limit,
            cursor=cursor,
            filters=filters,
            now=END,
            sources=["shop", "till", "nobody"],
            destinations=["nobody"],
        )
        found += [each["id"] for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found
    raise AssertionError("no end")


@pytest.mark.parametrize("kind", ["events", "deliveries"])
async def test_every_query_returns_all_matching_rows_in_order(file, kind):
    async with open_traced(file) as store:
        found = await rows(store)
        for filters in filter_sets(kind):
            assert await whole(store, kind, filters, limit=200) == expected(kind, filters, found), filters


@pytest.mark.parametrize("kind", ["events", "deliveries"])
async def test_pages_that_reach_their_budget_return_the_same_rows(file, kind, monkeypatch):
    for name, value in {"MOST_CANDIDATES": 300, "STEP": 120}.items():
        monkeypatch.setattr(pages, name, value)
    few = {"PROBED": 20, "MOST_LISTED": 10, "MOST_TERMS": 6, "TYPES_AT_ONCE": 3, "TYPES_SECONDS": -1}
    for name, value in few.items():
        monkeypatch.setattr(plan, name, value)
    async with open_traced(file) as store:
        found = await rows(store)
        for filters in itertools.islice(filter_sets(kind), 0, None, 7):
            assert await whole(store, kind, filters, limit=37) == expected(kind, filters, found), filters


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("few", [True, False])
async def test_no_query_scans_or_sorts_a_table(file, kind, few, monkeypatch):
    """`few`: a plan may sort a short list of rows in memory."""
    if not few:
        monkeypatch.setattr(plan, "MOST_LISTED", 1)
    async with open_traced(file) as store:
        for filters, cursor in itertools.product(filter_sets(kind), (None, deep(kind, EVENTS))):
            await store.list(kind, cursor, filters)
        plans = await store.traced.plans()
    assert {sql: faults(plan) for sql, plan in plans.items() if faults(plan)} == {}
    assert len(plans) > 3


def test_faults_finds_a_scan_and_a_sort():
    assert faults(["SCAN e", "SEARCH e USING INDEX x (y=?)", "USE TEMP B-TREE FOR ORDER BY"]) == [
        "SCAN e",
        "USE TEMP B-TREE FOR ORDER BY",
    ]


async def test_a_page_ends_at_its_budget_and_its_cursor_continues(file, monkeypatch):
    for name, value in {"MOST_CANDIDATES": 200, "SECONDS": 60.0}.items():
        monkeypatch.setattr(pages, name, value)
    wanted = {"where": '{"data.n": 4}'}
    async with open_traced(file) as store:
        first = await store.list("events", None, wanted)
        assert first == {"items": [], "next_cursor": str(EVENTS - 199), "id_digits": 0}
        assert len(await whole(store, "events", wanted)) == 1
        assert len(await whole(store, "deliveries", wanted)) == 3


async def test_a_page_ends_when_its_time_is_used_up(file, monkeypatch):
    monkeypatch.setattr(pages, "SECONDS", 0.0)
    async with open_traced(file) as store:
        first = await store.list("events", None, {"where": '{"data.n": 4}'})
    assert (first["items"], first["next_cursor"]) == ([], str(EVENTS - 49))


async def test_where_works_together_with_other_filters(file):
    async with open_traced(file) as store:
        found = await whole(store, "events", {"where": '{"data.total": {"lt": 2}}', "source": "adorn"})
        assert found
        page = await store.list("events", None, {"where": '{"source": "adorn", "data.total": 1}'})
        assert {each["id"] for each in page["items"]} <= set(found)


TIMES = (100, 300, 200, 400)
"""Times of receipt in the order of acceptance; the clock was set back once."""


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, [400, 200, 300, 100]),
        ({"since": 200}, [400, 200, 300]),
        ({"until": 300}, [200, 100]),
        ({"since": 300, "until": 301}, [300]),
        ({"since": 500}, []),
        ({"since": 101, "before": 4}, [200, 300]),
    ],
)
async def test_since_is_included_and_until_is_not(store, clock, filters, found):
    for at in TIMES:
        await send(store, clock, received_at=at)
    if "before" in filters:  # the number of a row, from 1
        filters = {**filters, "before": (await ids(store))[filters["before"] - 1]}
    assert [row["received_at"] for row in await store.queries.find("events", **filters)] == found


@only_sqlite("the times of its blocks of events")
async def test_times_narrow_a_search_to_blocks_of_events(store, clock, monkeypatch):
    monkeypatch.setattr(event_times, "SHIFT", 1)
    for at in (100, 200, 300, 200, 500, 600):
        await send(store, clock, received_at=at)
    span = await event_times.span(store.database.reader, 250, 301)
    assert (span.first, span.last) == (2, 5)
    span = await event_times.span(store.database.reader, 150, None)
    assert (span.first, span.last) == (2, 7)
    assert await event_times.span(store.database.reader, 700, None) is None
    assert await event_times.span(store.database.reader, None, 100) is None


async def test_an_imported_event_is_found_by_its_own_time(store, clock):
    for _ in range(2):
        await send(store, clock)
    old = make_event(clock, received_at=clock.wall() - 86400 * SECOND)
    await store.events.restore([old])
    found = await store.queries.find("events", until=clock.wall() - 3600 * SECOND)
    assert [row["id"] for row in found] == [old.public_id]


async def test_the_latest_delivery_of_an_event_to_a_destination_counts(store, clock):
    event = await send(store, clock)
    crm = next(each for each in store.fresh if each.destination == "crm")
    attempt = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500)
    await store.deliveries.settle(Outcome(delivery=crm, attempt=attempt, state="dead", reason="exhausted"))
    assert len(await store.queries.find("events", state="dead", destination="crm")) == 1
    assert await store.queries.find("events", state="dead", destination="erp") == []
    assert await store.deliveries.repeat(
        [((await store.events.load([event.id]))[event.id], Target("crm"))]
    ) == (True,)
    assert await store.queries.find("events", state="dead") == []
    assert [row["state"] for row in await store.queries.find("deliveries", state="dead")] == ["dead"]


async def test_deliveries_are_sorted_by_their_ids_or_by_the_ids_of_filtered_events(store, clock):
    first, second = await send(store, clock), await send(store, clock)
    await end_all(store)
    await store.deliveries.repeat([(first, Target("crm"))])
    plain = [row["event_id"] for row in await store.queries.find("deliveries", destination="crm")]
    assert plain == [first.public_id, second.public_id, first.public_id]
    by_event = [
        row["event_id"] for row in await store.queries.find("deliveries", destination="crm", source="shop")
    ]
    assert by_event == [second.public_id, first.public_id, first.public_id]


async def end_all(store):
    attempt = Attempt(started_at=1, duration_ms=1.0, result="ok", status=200)
    for delivery in list(store.fresh):
        await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state="delivered"))


async def test_attempts_are_filtered_by_status(store, clock):
    await send(store, clock)
    for delivery, status in zip(list(store.fresh), (503, None), strict=True):
        result = "connect" if status is None else "5xx"
        attempt = Attempt(started_at=1, duration_ms=1.0, result=result, status=status)
        await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state="dead"))
    for status, results in ((503, ["5xx"]), (0, ["connect"]), (500, [])):
        rows = await store.queries.find("attempts", status=status)
        assert [row["result"] for row in rows] == results


async def test_the_filters_of_delivery_and_event_must_both_match(store, clock):
    events = [await send(store, clock) for _ in range(2)]
    await end_all(store)
    delivery = next(each for each in store.fresh if each.event_id == events[0].id)
    for event, found in ((events[0], [delivery.public_id]), (events[1], [])):
        rows = await store.queries.find("deliveries", id=delivery.public_id, event_id=event.public_id)
        assert [row["id"] for row in rows] == found
        attempts = await store.queries.find(
            "attempts", delivery_id=delivery.public_id, event_id=event.public_id, result="ok"
        )
        assert [row["delivery_id"] for row in attempts] == found


@pytest.mark.parametrize("most", [1, 10_000])
async def test_attempts_are_sorted_by_their_start_with_every_plan(file, monkeypatch, most):
    monkeypatch.setattr(plan, "MOST_LISTED", most)
    monkeypatch.setattr(pages, "MOST_CANDIDATES", 400)
    async with open_traced(file) as store:
        stored = await store.traced.execute_fetchall(
            "SELECT a.started_at, a.id, d.destination, a.result, d.event_id FROM attempts AS a"
            " JOIN deliveries AS d ON d.id = a.delivery_id ORDER BY 1 DESC, 2 DESC"
        )
        since = END - 10 * 86400 * SECOND
        event = max((row[4] for row in stored), key=[row[4] for row in stored].count)
        cases = itertools.product((None, "late", "crm"), (None, "5xx"), (None, True), (None, since))
        for to, result, failed, after, of in [
            *((*case, None) for case in cases),
            (None, None, None, None, event),
        ]:
            expected_ids = [
                row[1]
                for row in stored
                if to in (None, row[2])
                and result in (None, row[3])
                and failed in (None, row[3] != "ok")
                and (after is None or row[0] >= after)
                and of in (None, row[4])
            ]
            found, cursor, more = [], None, True
            while more:
                page = await store.queries.page(
                    "attempts", limit=150, cursor=cursor, destination=to, result=result, failed=failed,
                    since=after, event_id=of,
                )  # fmt: skip
                found += [row["row"] for row in page.rows]
                cursor = page.cursor
                more = cursor is not None
            assert found == expected_ids, (to, result, failed, after, of)


async def test_a_page_may_end_within_the_deliveries_of_an_event(store, clock):
    for _ in range(3):
        await send(store, clock)
    found, cursor = [], None
    while True:
        page = await store.queries.page("deliveries", limit=1, cursor=cursor, source="shop")
        found += [(row["event_id"], row["destination"]) for row in page.rows]
        cursor = page.cursor
        if cursor is None:
            break
    assert len(found) == len(set(found)) == 6


async def test_a_repeated_event_is_listed_as_duplicate(store, clock):
    first = make_event(clock)
    other = await send(store, clock)
    for event in (first, make_event(clock), make_event(clock)):
        await store.events.append(Acceptance(source="shop", event=event, key="k"))
    again = make_event(clock)
    receipt = await store.events.append(Acceptance(source="shop", event=again, repeats=other.public_id))
    assert (receipt.event_id, receipt.duplicate) == (other.public_id, True)
    await send(store, clock, key="other")
    rows = {row["id"]: row for row in await store.queries.find("events")}
    assert Counter(row["duplicate"] for row in rows.values()) == {0: 1, 1: 2}
    assert rows[first.public_id]["repetitions"] == 2
    assert rows[other.public_id]["repetitions"] == 1
    assert sum(row["repetitions"] for row in rows.values()) == 3
    loaded = await store.queries.load([rows[first.public_id]["row"], 2**62])
    assert {id_: event.body for id_, event in loaded.items()} == {rows[first.public_id]["row"]: first.body}


async def test_a_duplicate_of_a_deleted_event_is_only_counted(store, clock):
    event = await send(store, clock, key="k")
    await store.events.expunge([event.id])
    receipt = await store.events.append(Acceptance(source="shop", event=make_event(clock), key="k"))
    assert (receipt.event_id, receipt.duplicate) == (event.public_id, True)
    assert await read_rows(store, "SELECT * FROM repetitions") == []


@pytest.mark.parametrize("kind", FILTERS)
async def test_an_unknown_filter_is_refused_and_the_error_lists_the_known_ones(store, kind):
    with pytest.raises(RelayError, match="unknown filter 'colour' of") as refused:
        await store.queries.find(kind, colour="red")
    assert refused.value.hint == f"filters: {', '.join(FILTERS[kind])}"


@pytest.mark.parametrize("cursor", ["-1", "x", "", "1.", "1.2.3", "9" * 30, "9" * 19, f"1.{2**63}"])
async def test_an_invalid_cursor_is_refused(store, cursor):
    with pytest.raises(RelayError, match="cursor"):
        await store.queries.page("events", cursor=cursor)


@pytest.mark.parametrize("kind", ["events", "deliveries", "attempts"])
def test_the_api_offers_the_filters_that_the_store_has(kind):
    assert {each.name for each in filters_of(kind)} == set(FILTERS[kind])


def test_every_field_of_a_selection_is_a_filter_of_events_and_deliveries():
    assert set(FILTERS["events"]) == {"id", *Selection.__struct_fields__}
    assert set(FILTERS["deliveries"]) == {"id", "event_id", "replayed", *Selection.__struct_fields__}
