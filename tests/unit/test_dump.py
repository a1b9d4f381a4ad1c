"""Exported lines are the events themselves, and an import may be run again."""

import json

import msgspec
import pytest
from stores import count_rows, end, hooks, ids, make_event, opened, rows, send
from support import FakeClock

from relay.errors import RelayError
from relay.model import Imported, Owed, Selection
from relay.store import events, queries
from relay.store.export import DELIVERIES_SQL, read_line, write_line


@pytest.fixture
def clock():
    clock = FakeClock()
    clock.now += 123_456
    return clock


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        yield store


@pytest.fixture
async def other(tmp_path, clock):
    async with opened(tmp_path / "other.db", clock) as other:
        hooks(other).route = lambda event: (Owed("archive"),)
        yield other


async def export(store, deliveries=False, **fields):
    selection = Selection(**fields)
    span = await store.queries.span(selection)
    return [line async for line in store.queries.export(selection, span, deliveries=deliveries)]


async def read_in(store, lines, **options):
    async def given():
        for line in lines:
            yield line

    return [step async for step in store.events.import_lines(given(), **options)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"body": b'{\n "a": {"n": 45000.00,\r\n "big": 12345678901234567890123}}'},
        {"body": b'{\n "a": {"n": 45000.00,\r\n "b": 1}}', "data": b'{"n": 45000.00,\r\n "b": 1}'},
        {"body": b'{"d": {"n": 45000.00}}', "data": b'{"n": 45000.00}'},
        {"body": b"x=1&y=2", "data": b'{"x":"1"}'},
        {"body": b"\xff\xfe\x00", "data": b"{}", "content_type": "application/octet-stream"},
        {"body": b"", "data": b"{}"},
        {"body": "ü€😀\u2028 \\u0000".encode(), "data": b"{}", "subject": "Zoë"},
        {"subject": None, "traceparent": "00-ab-cd-01", "context": b'{"a": [1, 2.50]}'},
    ],
)
def test_a_line_holds_the_very_event(clock, fields):
    event = make_event(clock, **fields)
    line = write_line(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert read_line(line) == event


def test_line_breaks_of_data_that_is_no_part_of_the_body_become_spaces(clock):
    event = make_event(clock, body=b"x", data=b'{"a":\r\n "b\\n"}', context=b'{\n"c": 1}')
    line = write_line(event)
    assert line.count(b"\n") == 1
    found = read_line(line)
    assert (found.data, found.context) == (b'{"a":   "b\\n"}', b'{ "c": 1}')


def test_times_are_exact_and_readable(clock):
    assert json.loads(write_line(make_event(clock)))["received_at"] == "2023-11-14T22:13:20.123456Z"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"body": "other"}, "the body of evt_.* does not match its sha256"),
        ({"id": "evt_1"}, r"regex .* at `\$.id`|Expected `str` matching regex"),
        ({"id": None}, "not an exported event"),
        ({"type": "till.paid"}, "does not begin with the source 'shop'"),
        ({"context": []}, "`context` is not an object"),
        ({"body": None}, "expected either `body` or `body_base64`"),
        ({"body_base64": "eA=="}, "expected either `body` or `body_base64`"),
        ({"body": None, "body_base64": "?"}, "`body_base64`: "),
        ({"data_at": 5, "data_size": 10}, "expected `data`, or `data_at` and `data_size` within the body"),
        ({"data_at": 1, "data_size": 2}, "not an exported event"),
        ({"data_at": -1}, "not an exported event"),
        ({"received_at": "2023-11-14T22:13:20"}, "not an exported event"),
        ({"content_type": "text/plain\r\nx: y"}, "not an exported event"),
        ({"traceparent": "a\nb"}, "not an exported event"),
        ({"source": "sh\x00op"}, "not an exported event"),
    ],
)
def test_what_is_no_event_is_refused_with_what_is_wrong(clock, change, complaint):
    line = json.loads(write_line(make_event(clock)))
    with pytest.raises(RelayError, match=complaint):
        read_line(json.dumps(line | change).encode())


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"\xff", b'{"id":"\\ud800"}', b"[" * 100_000])
def test_what_is_no_line_of_json_is_refused(line):
    with pytest.raises(RelayError, match="not an exported event"):
        read_line(line)


async def test_an_export_holds_the_selection_in_order_whatever_its_portions(store, clock, monkeypatch):
    monkeypatch.setattr(queries, "EXPORT_EVENTS", 3)
    monkeypatch.setattr(queries, "EXPORT_BYTES", 100)
    monkeypatch.setattr("relay.store.queries.selection.PAGE", 5)
    sent = [await send(store, clock, body=b"%d" % n * (60 if n == 4 else 20), data=b"{}") for n in range(8)]
    await send(store, clock, type="till.paid")
    assert [read_line(line).body for line in await export(store, source="shop")] == [e.body for e in sent]


async def test_an_export_tells_what_became_of_deliveries_where_asked(store, clock):
    event = await send(store, clock)
    await end(store, event, "delivered", "crm")
    [line] = await export(store, deliveries=True)
    crm, erp = json.loads(line)["deliveries"]
    assert (crm["destination"], crm["state"], crm["attempts"], crm["last_status"]) == (
        "crm",
        "delivered",
        1,
        200,
    )
    assert (erp["destination"], erp["state"], "finished_at" in erp) == ("erp", "pending", False)
    assert "deliveries" not in json.loads((await export(store))[0])
    assert read_line(line).public_id == event.public_id


async def test_an_import_is_the_same_events_and_may_be_repeated(store, other, clock):
    for number in range(5):
        await send(store, clock, body=b"%d" % number)
    lines = await export(store)
    assert await read_in(other, lines) == [Imported(lines=5, new=5)]
    assert await export(other) == lines
    assert await read_in(other, lines) == [Imported(lines=5, new=0)]
    assert await count_rows(other, "events") == 5


async def test_an_import_owes_nothing_unless_asked(store, other, clock):
    await send(store, clock)
    lines = await export(store, deliveries=True)
    await read_in(other, lines)
    assert await count_rows(other, "deliveries") == 0
    await other.events.expunge(await ids(other))
    await read_in(other, lines, owe=True)
    [delivery] = other.fresh
    assert (delivery.destination, delivery.event.public_id) == ("archive", read_line(lines[0]).public_id)
    await read_in(other, lines, owe=True)
    assert (await other.ledger.audit())["archive"].created == 1


async def test_imported_events_are_no_news_and_are_not_counted_again(store, other, clock):
    await send(store, clock)
    await read_in(other, await export(store), owe=True)
    assert [list(news.events) for news in other.news] == [[]]
    assert await count_rows(other, "stats") == 0


async def test_events_that_come_in_meanwhile_get_ids_of_their_own(store, other, clock):
    for _ in range(3):
        await send(store, clock)
    await send(other, clock)
    await read_in(other, await export(store))
    event = await send(other, clock)
    assert await ids(other) == [1, 2, 3, 4, 5]
    assert event.id == 5


async def test_twins_within_one_portion_are_one_event(store, other, clock):
    await send(store, clock)
    [line] = await export(store)
    assert await read_in(other, [line, line]) == [Imported(lines=2, new=1)]


async def test_a_bad_line_is_named_and_what_came_before_is_in(store, other, clock):
    for _ in range(3):
        await send(store, clock)
    one, two, three = await export(store)
    with pytest.raises(RelayError, match="line 3: not an exported event") as caught:
        await read_in(other, [one, two, b"{", three])
    assert caught.value.hint.startswith("2 events before it are in")
    assert await count_rows(other, "events") == 2


async def test_an_import_goes_in_portions_and_tells_how_far_it_is(store, other, clock, monkeypatch):
    monkeypatch.setattr(events, "IMPORT_EVENTS", 2)
    for _ in range(5):
        await send(store, clock)
    steps = await read_in(other, await export(store))
    assert [step.new for step in steps] == [2, 4, 5]


async def test_deliveries_of_an_export_are_found_without_a_scan(store):
    sql = f"EXPLAIN QUERY PLAN {DELIVERIES_SQL.format(marks='?, ?')}"
    steps = [row[3] for row in await rows(store, sql, (1, 2))]
    assert steps[0].startswith("SEARCH deliveries USING INDEX deliveries_event")


def test_the_body_is_read_as_the_text_that_it_is(clock):
    line = msgspec.json.decode(write_line(make_event(clock, body=b'{"a": "b"}')))
    assert line["body"] == '{"a": "b"}'
    assert "body_base64" not in line
