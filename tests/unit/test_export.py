"""An export contains the same events byte for byte, and an import can be repeated."""

import json

import msgspec
import pytest
from stores import count_rows, end, hooks, ids, make_event, only_sqlite, opened, rows, send
from support import FakeClock

from relay.errors import RelayError
from relay.model import Imported, Selection, Target
from relay.store import events, queries
from relay.store.export import read_line, write_line
from relay.store.sqlite.queries import EXPORTED_SQL


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
        hooks(other).route = lambda event: (Target("archive"),)
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
        {"content_type": 'text/plain;\tname="é"', "traceparent": "é" * 55, "subject": "a\0b"},
    ],
)
def test_a_line_restores_the_same_event(clock, fields):
    event = make_event(clock, **fields)
    line = write_line(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert read_line(line) == event


@pytest.mark.parametrize("body", [b"\0" * 1000, b'"\\\n\t' * 1000, b"\xff" * 1000, b"\x01" * 40 + b"a" * 960])
def test_a_line_is_never_much_longer_than_its_body(clock, body):
    """So that the limit for the lines of an import admits every event of the relay."""
    event = make_event(clock, body, data=b"{}")
    line = write_line(event)
    assert len(line) < 2 * len(body) + 600
    assert read_line(line) == event


def test_line_breaks_of_data_outside_the_body_become_spaces(clock):
    event = make_event(clock, body=b"x", data=b'{"a":\r\n "b\\n"}', context=b'{\n"c": 1}')
    line = write_line(event)
    assert line.count(b"\n") == 1
    found = read_line(line)
    assert (found.data, found.context) == (b'{"a":   "b\\n"}', b'{ "c": 1}')


def test_times_are_written_to_the_microsecond(clock):
    assert json.loads(write_line(make_event(clock)))["received_at"] == "2023-11-14T22:13:20.123456Z"


@pytest.mark.parametrize(
    ("change", "error"),
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
def test_an_invalid_event_is_refused_with_the_reason(clock, change, error):
    line = json.loads(write_line(make_event(clock)))
    with pytest.raises(RelayError, match=error):
        read_line(json.dumps(line | change).encode())


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"\xff", b'{"id":"\\ud800"}', b"[" * 100_000])
def test_a_line_that_is_not_json_is_refused(line):
    with pytest.raises(RelayError, match="not an exported event"):
        read_line(line)


async def test_an_export_contains_the_selection_in_order(store, clock, monkeypatch):
    monkeypatch.setattr(queries, "EXPORT_EVENTS", 3)
    monkeypatch.setattr(queries, "EXPORT_BYTES", 100)
    monkeypatch.setattr("relay.store.queries.selection.PAGE", 5)
    sent = [await send(store, clock, body=b"%d" % n * (60 if n == 4 else 20), data=b"{}") for n in range(8)]
    await send(store, clock, type="till.paid")
    assert [read_line(line).body for line in await export(store, source="shop")] == [e.body for e in sent]


async def test_an_export_contains_deliveries_on_request(store, clock):
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


async def test_an_import_stores_the_same_events_and_can_be_repeated(store, other, clock):
    for number in range(5):
        await send(store, clock, body=b"%d" % number)
    lines = await export(store)
    assert await read_in(other, lines) == [Imported(lines=5, new=5)]
    assert await export(other) == lines
    assert await read_in(other, lines) == [Imported(lines=5, new=0)]
    assert await count_rows(other, "events") == 5


async def test_an_import_creates_deliveries_only_on_request(store, other, clock):
    await send(store, clock)
    lines = await export(store, deliveries=True)
    await read_in(other, lines)
    assert await count_rows(other, "deliveries") == 0
    await other.events.expunge(await ids(other))
    await read_in(other, lines, deliver=True)
    [delivery] = other.fresh
    assert (delivery.destination, delivery.event.public_id) == ("archive", read_line(lines[0]).public_id)
    await read_in(other, lines, deliver=True)
    assert (await other.ledger.audit())["archive"].created == 1


async def test_imported_events_are_not_announced_or_counted_again(store, other, clock):
    await send(store, clock)
    await read_in(other, await export(store), deliver=True)
    assert [list(news.events) for news in other.news] == [[]]
    assert await count_rows(other, "stats") == 0


async def test_events_received_during_an_import_get_their_own_ids(store, other, clock):
    for _ in range(3):
        await send(store, clock)
    await send(other, clock)
    await read_in(other, await export(store))
    event = await send(other, clock)
    known = await ids(other)
    assert len(known) == 5
    assert event.id == known[-1]


async def test_equal_lines_in_one_transaction_are_one_event(store, other, clock):
    await send(store, clock)
    [line] = await export(store)
    assert await read_in(other, [line, line]) == [Imported(lines=2, new=1)]


async def test_an_invalid_line_is_named_and_the_lines_before_it_are_stored(store, other, clock):
    for _ in range(3):
        await send(store, clock)
    one, two, three = await export(store)
    with pytest.raises(RelayError, match="line 3: not an exported event") as caught:
        await read_in(other, [one, two, b"{", three])
    assert caught.value.hint.startswith("2 new events before it are stored")
    assert await count_rows(other, "events") == 2


async def test_an_import_runs_in_small_transactions_and_reports_progress(store, other, clock, monkeypatch):
    monkeypatch.setattr(events, "IMPORT_EVENTS", 2)
    for _ in range(5):
        await send(store, clock)
    steps = await read_in(other, await export(store))
    assert [step.new for step in steps] == [2, 4, 5]


@only_sqlite("plans of its statements")
async def test_deliveries_of_an_export_are_found_without_a_scan(store):
    sql = f"EXPLAIN QUERY PLAN {EXPORTED_SQL.format(marks='?, ?')}"
    steps = [row[3] for row in await rows(store, sql, (1, 2))]
    assert steps[0].startswith("SEARCH deliveries USING INDEX deliveries_event")


def test_a_body_of_text_is_written_as_text(clock):
    line = msgspec.json.decode(write_line(make_event(clock, body=b'{"a": "b"}')))
    assert line["body"] == '{"a": "b"}'
    assert "body_base64" not in line
