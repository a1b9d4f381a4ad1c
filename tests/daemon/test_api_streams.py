"""The streams of the admin API: `tail` and `top`."""

import asyncio
import itertools
import json

import pytest
from daemons import SOURCES, Daemon, adorn, destination, running, write_config
from support import until
from wire import Wire, exchange, following, request

from relay.api import stream, tail, top
from relay.api.stream import MOST, MOST_BYTES, Followers, Seam
from relay.base.clock import SECOND
from relay.ingest.handler import MOST_EVENTS

TYPE = "adorn.session.started"


@pytest.fixture
async def relay(tmp_path, recorder):
    other = destination("erp", recorder.url).replace('"*"', '"moddy.*"')
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url), other)
    config.write_text(config.read_text().replace("[admin]", '[admin]\ntokens = ["an-admin-token"]'))
    async with running(config) as relay:
        yield relay


def follow(relay, path):
    return following(relay.addresses.socket, path)


async def send(relay, session="s", **more):
    answer = await relay.exchange(request("POST", "/v1/events", adorn(session, **more)))
    return answer.json["event_id"]


async def send_moddy(relay):
    body = json.dumps({"event_type": "member_joined", "discord_id": "1", "metadata": {}}).encode()
    answer = await relay.exchange(
        request("POST", "/internal/event/notify", body, authorization="Bearer dev-token")
    )
    assert answer.status < 300, answer


async def refused(relay, path):
    answer = await exchange(relay.addresses.socket, request("GET", path))
    return answer.status, answer.json["error"]


async def test_an_event_and_its_attempts_are_streamed(relay, recorder):
    recorder.answers.append((500, {}))
    async with follow(relay, "/api/tail") as reader:
        assert reader.response.headers["Content-Type"].startswith("text/event-stream")
        assert reader.response.headers["Cache-Control"] == "no-store"
        assert reader.comments == [": hookferry"]
        event = await send(relay)
        name, item = await reader.next()
        [row] = (await relay.operator("GET", "/api/events"))["items"]
        del row["duplicate"], row["repetitions"], row["deliveries"]  # an event has neither when it is stored
        assert (name, item) == ("event", row)
        assert reader.ids == [event]
        name, failed = await reader.next()
        [delivery] = (await relay.operator("GET", "/api/deliveries"))["items"]
        assert name == "attempt"
        assert {
            **failed,
            "error": None,
            "duration_ms": None,
            "started_at": None,
            "next_attempt_at": None,
        } == {
            "delivery_id": delivery["id"], "event_id": event, "destination": "crm", "type": TYPE,
            "attempt": 1, "result": "5xx", "status": 500, "error": None, "duration_ms": None,
            "state": "pending", "reason": None, "next_attempt_at": None, "started_at": None,
        }  # fmt: skip
        assert failed["next_attempt_at"] > failed["started_at"] >= row["received_at"]
        _, delivered = await reader.next()
        assert (delivered["attempt"], delivered["result"], delivered["state"]) == (2, "ok", "delivered")
        assert delivered["next_attempt_at"] is None


@pytest.mark.parametrize("parts", [10, 1], ids=["in parts", "at once"])
async def test_stored_items_come_first_and_each_item_comes_once_while_others_arrive(
    relay, recorder, monkeypatch, parts
):
    monkeypatch.setattr(tail, "OVERLAP", -10 * SECOND)  # 5 s, as the timeout of an attempt is added
    monkeypatch.setattr(tail, "CATCH_UP", -60 * SECOND)  # never
    monkeypatch.setattr(tail, "MOST_PARTS", parts)
    monkeypatch.setattr(tail, "MOST_ROWS", 8)  # of a page
    append, numbers = relay.app.store.events.append, itertools.count()

    async def slow_append(*args, **options):
        """Store every tenth event long after its time, as on a busy disk: a part may end in between."""
        await asyncio.sleep(0.1 if next(numbers) % 10 == 0 else 0)
        return await append(*args, **options)

    recorder.answers.append((500, {}))
    sent = [await send(relay, f"before {number}") for number in range(30)]
    await until(
        lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered") == 30
    )

    async def go_on():
        monkeypatch.setattr(relay.app.store.events, "append", slow_append)
        sent.extend([await send(relay, f"after {number}") for number in range(60)])

    before, others = tuple(sent), asyncio.create_task(go_on())
    events, attempts = [], []
    async with follow(relay, "/api/tail?since=1h&payload=1") as reader:
        async with asyncio.timeout(30):
            while len(events) < 90 or len(attempts) < 91:
                name, item = await reader.next()
                if name == "event":
                    assert json.loads(item["payload"])["session_id"] == item["subject"]
                    assert item["payload_truncated"] is False
                    events.append(item["id"])
                else:
                    attempts.append((item["delivery_id"], item["started_at"]))
        await others
        last = await send(relay, "last")
        while (item := await reader.next())[1].get("id") != last:
            assert item[0] == "attempt"
    assert sorted(events) == sorted(sent)
    assert tuple(events[:30]) == before
    assert len(set(attempts)) == len(attempts) == 91


async def test_a_history_has_the_filters_of_the_stream(relay, recorder):
    recorder.answers.append((500, {}))
    await send(relay)
    await until(lambda: recorder.arrived)
    await send_moddy(relay)
    finished = {"outcome": "delivered", "destination": "crm"}
    await until(lambda: relay.counted("relay_deliveries_finished_total", **finished) == 2)
    retried, crm, erp = ("crm", "5xx", None), ("crm", "ok", "delivered"), ("erp", "ok", "delivered")
    moddy = "moddy.member_joined"
    for query, expected in (
        ("since=1h", {TYPE, moddy, retried, crm, erp}),
        ("since=1h&source=moddy", {moddy, crm, erp}),
        ("since=1h&type=moddy.*", {moddy, crm, erp}),
        ("since=1h&destination=crm&type=adorn.*", {retried, crm}),
        ("since=1h&failed=1", {retried}),
        ("since=0001-01-01T00:00:00Z&destination=erp", {erp}),
    ):
        found = set()
        async with follow(relay, f"/api/tail?{query}") as reader:
            while len(found) < len(expected):
                name, item = await reader.next()
                attempt = item.get("destination"), item.get("result"), item.get("state")
                found.add(item["type"] if name == "event" else attempt)
                assert name == "event" or item["attempt"] is None
        assert found == expected, query
    status, error = await refused(relay, "/api/tail?since=noon")
    assert (status, error["message"][:9]) == (400, '"since": ')


async def test_an_event_is_readable_when_it_is_streamed(relay):
    async with follow(relay, "/api/tail") as reader:
        for number in range(5):
            event = await send(relay, f"s{number}")
            while (item := await reader.next())[0] != "event":
                pass
            assert item[1]["id"] == event
            assert (await relay.rows(id=event))[0]["id"] == event


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("source=moddy", {("event", "moddy.member_joined"), ("crm", "ok"), ("erp", "ok")}),
        ("destination=erp", {("erp", "ok")}),
        ("type=adorn.session.*", {("event", TYPE), ("crm", "5xx"), ("crm", "ok")}),
        ("failed=1", {("crm", "5xx")}),
        ("attempts=0", {("event", TYPE), ("event", "moddy.member_joined")}),
        ("failed=1&source=moddy", set()),
        ("type=moddy.member_joined&destination=crm", {("crm", "ok")}),
    ],
)
async def test_a_filter_limits_the_stream(relay, recorder, query, expected):
    async with follow(relay, f"/api/tail?{query}") as reader, follow(relay, "/api/tail") as all_:
        recorder.answers.append((500, {}))
        await send(relay)
        for _ in range(3):
            await all_.next()
        await send_moddy(relay)
        for _ in range(3):
            await all_.next()
        relay.app.api.end_streams()
        item = {
            (item["destination"], item["result"]) if name == "attempt" else (name, item["type"])
            for name, item in await reader.rest()
        }
    assert item == expected


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/tail?source=adron", 404, 'unknown source "adron", did you mean "adorn"?'),
        ("/api/tail?destination=cmr", 404, 'unknown destination "cmr", did you mean "crm"?'),
        ("/api/tail?failed=yes", 400, '"failed": expected 0 or 1, got "yes"'),
        ("/api/tail?attempts=0&failed=1", 400, '"attempts=0" and "failed" exclude each other'),
        ("/api/tail?attempts=0&destination=crm", 400, '"attempts=0" and "destination" exclude each other'),
        ("/api/tail?type=!adorn.*", 400, "no pattern includes"),
        ("/api/tail?state=dead", 400, 'unknown parameter "state"'),
        ("/api/top?source=adorn", 400, 'unknown parameter "source"'),
    ],
)
async def test_an_invalid_query_of_a_stream_is_refused(relay, path, status, message):
    got, error = await refused(relay, path)
    assert got == status
    assert message.replace("'", "").partition(",")[0] in error["message"].replace("'", "")


async def test_a_stream_on_the_listener_needs_a_token(relay):
    answer = await exchange(relay.addresses.admin, request("GET", "/api/tail", host="localhost"))
    assert answer.status == 401
    async with await Wire.open(relay.addresses.admin) as wire:
        await wire.send(request("GET", "/api/top", host="localhost", authorization="Bearer an-admin-token"))
        assert b"text/event-stream" in await wire.reader.readuntil(b"\r\n\r\n")


async def test_too_many_followers_are_refused(relay):
    wires = [await Wire.open(relay.addresses.socket) for _ in range(MOST)]
    for wire in wires:
        await wire.send(request("GET", "/api/tail"))
        await wire.reader.readuntil(b": hookferry\n\n")
    status, error = await refused(relay, "/api/tail")
    assert (status, error["code"]) == (503, "too_many_followers")
    assert "relay tail" in error["hint"]
    for wire in wires:
        await wire.hang_up()
    await until(lambda: not relay.app.api._tail._followers)
    async with follow(relay, "/api/tail"):
        pass


async def test_a_disconnect_is_noticed_on_an_idle_stream(relay):
    async with follow(relay, "/api/tail"):
        assert len(relay.app.api._tail._followers) == 1
    await until(lambda: not relay.app.api._tail._followers)


async def test_an_idle_stream_sends_comments(relay, monkeypatch):
    monkeypatch.setattr(stream, "HEARTBEAT", 0.05)
    monkeypatch.setattr(stream, "CHECK_EVERY", 0.01)
    async with follow(relay, "/api/tail") as reader:
        await reader.response.content.readline()
        assert await reader.response.content.readline() == b": still here\n"


async def test_a_stalled_follower_delays_nobody_and_gets_the_number_of_lost_items(relay, monkeypatch):
    monkeypatch.setattr(relay.app.api._tail._followers, "_room", 3)
    async with await Wire.open(relay.addresses.socket) as slow:
        slow.writer.transport.pause_reading()
        await slow.send(request("GET", "/api/tail"))
        await until(lambda: relay.app.api._tail._followers)
        [follower] = relay.app.api._tail._followers
        async with follow(relay, "/api/tail?source=adorn") as quick:
            subject = "x" * 256
            sent = []
            while follower._lost < 5:  # the kernel's buffer differs between machines
                sent.append(await send(relay, subject))
                while (await quick.next())[0] != "event":
                    pass
        assert follower.writing
        assert len(follower._frames) == 3
        slow.writer.transport.resume_reading()
        text = b""
        async with asyncio.timeout(30):
            while b"event: lost" not in text:
                text = text[-100:] + await slow.reader.read(2**16)


async def test_the_buffer_of_a_follower_is_bounded_in_items_and_bytes():
    followers = Followers(room=3)
    follower = followers.add(None, lambda: None)
    for number in range(5):
        follower.put(b"%d" % number)
    assert follower.take() == b'event: lost\ndata: {"count":2}\n\n234'
    assert follower.take() == b""
    follower.put(b"a" * MOST_BYTES)
    follower.put(b"b")
    assert follower.take() == b'event: lost\ndata: {"count":1}\n\nb'
    follower.put(b"c" * (MOST_BYTES + 1))  # larger than the limit, but alone in the buffer
    assert len(follower.take()) == MOST_BYTES + 1


async def test_the_events_of_the_largest_request_fit_into_a_buffer():
    followers = Followers(tail.ROOM)
    follower = followers.add(None, lambda: None)
    for _ in range(MOST_EVENTS):
        follower.put(b"x" * 400)
    assert follower.take() == b"x" * 400 * MOST_EVENTS


@pytest.mark.parametrize(
    "frames", [[b"1", b"2", b"3"], [b"a" * (MOST_BYTES // 2 + 1)]], ids=["items", "bytes"]
)
async def test_a_buffer_that_fills_is_written_before_the_pause_ends(frames):
    follower = Followers(room=5).add(None, lambda: None)
    follower._pause = 3600
    waiting = asyncio.create_task(follower.gather())
    follower.put(b"x")
    await asyncio.sleep(0)
    assert not waiting.done()
    for each in frames:
        follower.put(each)
    await asyncio.wait_for(waiting, 10)
    follower.take()
    waiting = asyncio.create_task(follower.gather())
    await asyncio.sleep(0)
    assert not waiting.done()
    follower.end()
    await asyncio.wait_for(waiting, 10)


async def test_followers_of_the_same_items_share_the_counts_and_each_gets_its_difference():
    followers = Followers(room=3)
    late = Seam()
    one, two = (
        followers.add("all", lambda: None, counts=True),
        followers.add("all", lambda: None, counts=True),
    )
    [group] = followers.groups
    group.count("events", None, 2)
    assert one.take() == b'event: count\ndata: {"events":2,"attempts":0}\n\n'
    three = followers.add("all", lambda: None, seam=late, counts=True)
    group.count("attempts", "a")  # before the third follower collects
    late.open()
    assert late.takes_stored("b", keep=True)
    for key in ("b", "c"):
        group.count("events", key)
    assert group.compares
    assert three.take() == b'event: count\ndata: {"events":1,"attempts":0}\n\n'
    assert one.take() == b'event: count\ndata: {"events":2,"attempts":1}\n\n'
    assert two.take() == b'event: count\ndata: {"events":4,"attempts":1}\n\n'
    assert one.take() == two.take() == three.take() == b""
    late.close(0)
    await until(lambda: not group.compares)
    group.count("events", None)
    assert three.take() == b'event: count\ndata: {"events":1,"attempts":0}\n\n'
    for each in (one, two, three):
        followers.discard(each)
    assert not followers.groups


async def test_live_items_are_counted_after_the_stored_ones(relay, recorder, monkeypatch):
    monkeypatch.setattr(stream, "COUNT_EVERY", 0.05)
    before = await send(relay)
    finished = {"destination": "crm", "outcome": "delivered"}
    await until(lambda: relay.counted("relay_deliveries_finished_total", **finished) == 1)
    async with (
        follow(relay, "/api/tail?count=1&since=1h") as reader,
        follow(relay, "/api/tail?count=1") as live,
    ):
        found = [await reader.next(), await reader.next()]
        assert {name for name, _ in found} == {"event", "attempt"}
        assert reader.ids == [before]
        for number in range(20):
            await send(relay, f"s{number}")
        for each in (reader, live):
            events = attempts = 0
            while (events, attempts) != (20, 20):
                name, numbers = await each.next()
                assert name == "count"
                assert events <= 20
                assert attempts <= 20
                events += numbers["events"]
                attempts += numbers["attempts"]
    async with follow(relay, "/api/tail?count=1&source=moddy&attempts=0") as reader:
        await send(relay)
        await send_moddy(relay)
        assert await reader.next() == ("count", {"events": 1, "attempts": 0})


async def test_a_stop_ends_all_streams_at_once(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    config.write_text(config.read_text().replace('shutdown_grace = "5s"', 'shutdown_grace = "60s"'))
    socket = tmp_path / "state" / "relay.sock"
    async with Daemon(config) as daemon, await Wire.open(socket) as stuck:
        stuck.writer.transport.pause_reading()
        await stuck.send(request("GET", "/api/tail"))
        async with following(socket, "/api/tail?failed=1") as quiet, following(socket, "/api/top") as screen:
            streams = [asyncio.create_task(reader.rest(120)) for reader in (quiet, screen)]
            async with await Wire.open(daemon.url) as wire:
                for _ in range(1500):  # more than kernel and server buffer for a stalled client
                    await wire.send(request("POST", "/v1/events", adorn("x" * 256)))
                    assert (await wire.answer()).status == 200
            assert await daemon.stop(30) == 0  # half the grace
            item, seen = await asyncio.gather(*streams)  # each has a regular end
            assert item == []
            assert {name for name, _ in seen} <= {"top"}


async def test_a_stream_requested_during_a_stop_is_refused(relay):
    relay.app.api.end_streams()
    for path in ("/api/tail", "/api/top"):
        status, error = await refused(relay, path)
        assert (status, error["code"]) == (503, "draining")


async def test_no_item_is_built_without_followers(relay, monkeypatch):
    made = []
    monkeypatch.setattr("relay.api.tail.frame", lambda *args: made.append(args) or b"x")
    monkeypatch.setattr("relay.api.top.frame", lambda *args: made.append(args) or b"x")
    await send(relay)
    await until(
        lambda: relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")
    )
    assert made == []
    assert relay.app.api._top._ticking is None


async def test_a_snapshot_has_rates_and_states(relay, recorder, monkeypatch):
    monkeypatch.setattr(top, "EVERY", 0.2)
    recorder.open.clear()
    async with follow(relay, "/api/top") as reader:
        for number in range(3):
            await send(relay, f"s{number}")
        await until(lambda: recorder.busy == 3)
        await relay.exchange(
            request("POST", "/api/v1/workers/register", b'{"worker_id": "w", "worker_endpoint": "http://w"}')
        )
        events = 0.0
        while True:
            name, item = await reader.next()
            assert name == "top"
            events += item["events_per_second"]
            [crm, erp] = item["destinations"]
            if events and crm["in_flight"] == 3:
                break
        [source] = [each for each in item["sources"] if each["name"] == "adorn"]
        assert source["paused"] is False
        assert (crm["name"], crm["held"], crm["circuit"], crm["pending"]) == ("crm", None, "closed", 3)
        assert (erp["name"], erp["pending"]) == ("erp", 0)
        assert item["ready"] is True
        assert item["backlog"] == 3
        recorder.open.set()
        delivered = 0.0
        while not delivered:
            _, item = await reader.next()
            delivered = item["delivered_per_second"]
            assert item["destinations"][0]["delivered_per_second"] == delivered
            assert item["failed_per_second"] == 0
        assert item["commit_ms"] > 0
        assert item["loop_lag_ms"] >= 0
    await until(relay.app.api._top._ticking.done)


async def test_a_snapshot_has_held_and_removed_destinations(relay, recorder, monkeypatch):
    monkeypatch.setattr(top, "EVERY", 0.05)
    await relay.operator("POST", "/api/destinations/crm/pause")
    await relay.operator("POST", "/api/sources/moddy/pause")
    await send(relay)
    async with follow(relay, "/api/top") as reader:
        _, item = await reader.next()
    assert item["destinations"][0]["held"] == "paused"
    assert item["destinations"][0]["pending"] == 1
    assert [each["name"] for each in item["sources"] if each["paused"]] == ["moddy"]
