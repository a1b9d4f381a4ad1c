"""Readiness with its reasons, and settings of config.toml in the whole relay."""

import asyncio
import platform
import re

import aiohttp
import pytest
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from stores import KINDS, close_connections, fail_writes, make_store, only_sqlite
from support import until
from wire import Wire, exchange, request

from relay import __version__
from relay.app import App
from relay.base.clock import SystemClock
from relay.plugin_loading.loader import load


async def ready(relay):
    answer = await exchange(relay.addresses.admin, request("GET", "/ready"))
    body = answer.json
    if KINDS[0] == "postgres":  # the server of the tests does not sync
        body["warnings"] = [text for text in body["warnings"] if "fsync" not in text]
    return answer.status, body


def post(session):
    return request("POST", "/v1/events", body=adorn(session))


async def test_a_running_relay_is_ready(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        status, body = await ready(relay)
        # The tests' PostgreSQL server runs without fsync, which is worth a warning.
        assert body.pop("warnings") == [] or KINDS[0] == "postgres"
        assert (status, body) == (200, {"ready": True, "reasons": []})


async def test_a_starting_relay_is_not_ready(tmp_path, monkeypatch):
    app = App(load(write_config(tmp_path, SOURCES)))
    asked, go_on, check = asyncio.Event(), asyncio.Event(), app.ledger_check.check

    async def slow():
        asked.set()
        await go_on.wait()
        await check()

    monkeypatch.setattr(app.ledger_check, "check", slow)
    life = asyncio.create_task(app.run())
    try:
        await asked.wait()
        door = tmp_path / "state" / "relay.sock"
        answer = await exchange(door, request("GET", "/ready"))
        assert (answer.status, answer.json["reasons"]) == (503, ["starting"])
        assert (await exchange(door, request("GET", "/health"))).status == 200
        go_on.set()
        await until(lambda: app.health.phase is None)
        assert (await exchange(door, request("GET", "/ready"))).status == 200
    finally:
        go_on.set()
        app.stopping.set()
        await life


async def test_a_draining_relay_is_not_ready(tmp_path):
    async with (
        running(write_config(tmp_path, SOURCES)) as relay,
        await Wire.open(relay.addresses.public) as wire,
    ):
        whole = post("late")
        await wire.send(whole[:-1])
        await until(lambda: relay.app.ingest._budget.used)
        relay.app.stopping.set()
        await until(lambda: relay.app.health.phase == "draining")
        status, body = await ready(relay)
        assert (status, body["ready"], body["reasons"]) == (503, False, ["draining"])
        await wire.send(whole[-1:])
        assert (await wire.answer()).status == 200


@only_sqlite("the free space for its file")
async def test_a_full_disk_is_a_reason_until_there_is_room(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        relay.app.store.disk.free = lambda: 0
        await until(lambda: relay.app.ingest.admission.disk_full)
        status, body = await ready(relay)
        assert (status, body["reasons"]) == (503, ["less free space than min_free_disk"])
        del relay.app.store.disk.free
        await until(lambda: not relay.app.ingest.admission.disk_full)
        assert (await ready(relay))[0] == 200


async def test_a_store_that_cannot_write_is_a_reason(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        fail_writes(relay.app.store, "disk I/O error")
        [reason] = (await ready(relay))[1]["reasons"]
        assert reason.startswith("the store cannot write: ")
        assert reason.endswith("disk I/O error")
        fail_writes(relay.app.store, None)


async def test_order_by_keeps_the_order_from_request_to_receiver(tmp_path):
    async with Recorder() as receiver:
        receiver.answers.extend([(500, {})] * 3)
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url, 'order_by = "subject"'))
        async with running(config) as relay:
            answers = [await relay.exchange(post("one")) for _ in range(5)]
            sent = [answer.json["event_id"] for answer in answers]
            await until(lambda: set(receiver.ids) == set(sent))
    firsts = list(dict.fromkeys(receiver.ids))
    assert firsts == sent
    assert receiver.ids[:4] == [sent[0]] * 4


async def test_a_ttl_expires_held_deliveries(tmp_path):
    async with Recorder() as receiver:
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url, 'ttl = "0.2s"'))
        async with running(config) as relay:
            await relay.operator("POST", "/api/destinations/crm/pause")
            await relay.exchange(post("one"))

            async def state():
                return [row["state"] for row in await relay.rows("deliveries")]

            async with asyncio.timeout(30):
                while await state() != ["expired"]:  # noqa: ASYNC110 - the store has no event to await
                    await asyncio.sleep(0.02)
            assert relay.counted("relay_deliveries_finished_total", destination="crm", outcome="expired") == 1
    assert receiver.arrived == []


async def test_operator_events_reach_destinations_that_name_them(tmp_path):
    async with Recorder() as ops, Recorder() as receiver:
        receiver.answers.append((410, {}))
        watcher = destination("ops", ops.url).replace('events = ["*"]', 'events = ["relay.*"]')
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url), watcher)
        async with running(config) as relay:
            await relay.exchange(post("one"))
            await until(lambda: ops.arrived)
    [(_, reported)] = ops.arrived
    assert reported["type"] == "relay.destination.disabled"
    assert reported["data"]["reason"] == "gone"
    assert len(receiver.arrived) == 1


@pytest.mark.parametrize("stand_in", ['on_dead = "crm"', 'on_dead = "spare"'])
async def test_circular_on_dead_destinations_stop_the_start(tmp_path, stand_in):
    spare = destination("spare", "http://127.0.0.1:9/x", 'on_dead = "crm"')
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x", stand_in), spare)
    with pytest.raises(Exception, match="forms a cycle: crm -> "):
        async with running(config):
            raise AssertionError("it started")


async def test_an_unexpected_error_of_the_writer_stops_the_daemon(tmp_path):
    died = []
    store = make_store(tmp_path / "relay.db", SystemClock(), on_fatal=died.append)
    await store.open()
    store.database.writer._take = None
    append = asyncio.ensure_future(store.workers.sweep())
    await until(lambda: died)
    assert "the writer failed" in died[0]
    append.cancel()
    await close_connections(store)


async def test_nobody_learns_versions_without_a_token(tmp_path):
    """Except from `/metrics`, which is only on the admin listener."""
    secrets = {platform.python_version(), aiohttp.__version__, __version__}
    async with running(write_config(tmp_path, SOURCES)) as relay:
        public, admin = relay.addresses.public, relay.addresses.admin
        for url in (public, admin):
            for path in ("/health", "/ready", "/nowhere", "/api/status", "/api/tail", "/v1/events"):
                answer = await exchange(url, request("GET", path, host="localhost"))
                assert "server" not in answer.headers, (url, path)
                shown = f"{answer.headers} {answer.body.decode()}"
                assert not [version for version in secrets if version in shown], (url, path)
        assert (await exchange(admin, request("GET", "/health"))).json == {"status": "ok"}
        metrics = await exchange(admin, request("GET", "/metrics"))
        assert "server" not in metrics.headers


MALFORMED = {
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20) + b"\r\n\r\n",
    "words": b"hello there\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a bad chunk": b"POST /api/reload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


async def test_bytes_that_are_not_http_get_the_error_of_the_api_without_versions(tmp_path, caplog):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        for what, raw in MALFORMED.items():
            for url in (relay.addresses.admin, relay.addresses.socket):
                answer = await exchange(url, raw)
                assert answer.status in (400, 401), what  # the token is missing before the chunk is bad
                assert "server" not in answer.headers, what
                assert answer.headers["x-request-id"].startswith("req_"), what
                if answer.status == 400:
                    error = answer.json["error"]
                    assert error["code"] == "bad_request", what
                    assert error["message"].startswith(("the request is not valid HTTP", "invalid body")), (
                        what
                    )
                assert not set(re.findall(r"aiohttp|Python|Bad status|0x", answer.body.decode())), what
        answer = await exchange(relay.addresses.admin, request("GET", "/health"))
        assert answer.status == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
