"""Requests and deliveries leave nothing in memory that only the collector of cycles would free."""

import gc
import json
import types
from collections import Counter
from pathlib import Path

import pytest
from daemons import PLUGINS, SOURCES, adorn, destination, running, write_config
from support import until
from torture.memory import MOST, VARIANTS, torture
from wire import Wire, request

from relay.app import GC_THRESHOLDS, App, serve
from relay.plugin_loading.loader import load
from relay.store.sqlite.transaction import MOST_BYTES, ROWS, Transaction

HOUSES = tuple(str(Path(__file__).parents[2] / each) for each in ("relay", "plugins"))
TEXT = "x" * 50_000
BEARER = {"authorization": "Bearer dev-token"}
WORKER = {"authorization": "Bearer worker-secret-token-12345"}
PATH = "/v1/events"


def of_the_relay(thing):
    """Whether an object is an instance of one of the relay's classes, or a frame or coroutine of its code."""
    if isinstance(thing, types.FrameType | types.CoroutineType):
        code = thing.f_code if isinstance(thing, types.FrameType) else thing.cr_code
        return code.co_filename.startswith(HOUSES)
    return type(thing).__module__.partition(".")[0] == "relay"


def weight(thing):
    """Return the length of the longest text or bytes that an object refers to."""
    near = gc.get_referents(thing)
    return max((len(each) for each in near if isinstance(each, bytes | str)), default=0)


async def left_to_the_collector(work):
    """Work with the collector off; return the relay's and the large objects that only it would free."""
    await work()
    gc.collect()
    return await _left(work) and await _left(work)  # a former test's garbage may appear once


async def _left(work):
    gc.disable()
    try:
        await work()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [each for each in gc.garbage if of_the_relay(each) or weight(each) > 10_000]
        return Counter(str(getattr(each, "f_code", type(each).__qualname__)) for each in found)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_serve_excludes_the_objects_of_its_start_from_collections(tmp_path, monkeypatch):
    calls = []

    async def run(_app, on_ready):
        calls.append("start")
        on_ready(None)

    monkeypatch.setattr(App, "run", run)
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    await serve(load(write_config(tmp_path, SOURCES)))
    assert calls == ["start", "freeze"]
    assert gc.get_threshold() == GC_THRESHOLDS


def event(text=TEXT, **headers):
    return request("POST", PATH, adorn("s", payload={"text": text}), **headers)


def notify(text=TEXT, authorization="Bearer dev-token", **more):
    body = {"event_type": "message_sent", "discord_id": "1", "metadata": {"text": text}, **more}
    return request("POST", "/internal/event/notify", json.dumps(body).encode(), authorization=authorization)


def beat(**body):
    return request("PUT", "/api/v1/workers/w/heartbeat", json.dumps(body).encode(), **WORKER)


REQUESTS = {
    "stored": (event(), 200),
    "stored with a key": (event(idempotency_key="k"), 200),
    "wrong token": (notify(authorization="Bearer wrong"), 403),
    "invalid": (notify(discord_id=1), 422),
    "no JSON": (request("POST", PATH, b"{" + TEXT.encode()), 400),
    "wrong method": (request("PUT", PATH, b"{}"), 405),
    "no such path": (request("POST", "/nowhere", b"{}"), 404),
    "too large": (event("x" * 3_000_000), 413),
    "heartbeat": (beat(status="ONLINE", cpuUsage=1.5), 200),
    "heartbeat with news": (beat(sessions=[{"sessionId": TEXT, "status": "CONNECTED"}]), 200),
    "registration": (
        request(
            "POST", "/api/v1/workers/register",
            json.dumps({"workerId": "w", "endpoint": "http://h", "description": TEXT}).encode(), **WORKER,
        ),
        200,
    ),
}  # fmt: skip


@pytest.fixture
async def relay(tmp_path, recorder):
    async with running(write_config(tmp_path, SOURCES, PLUGINS, destination("crm", recorder.url))) as relay:
        yield relay


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_request_leaves_nothing_to_the_garbage_collector(relay, case):
    raw, status = REQUESTS[case]

    async def work():
        for _ in range(5):
            assert (await relay.exchange(raw)).status == status
        await until(lambda: not sum(relay.app.store.ledger.pending().values()))

    assert await left_to_the_collector(work) == {}


async def test_a_sender_that_hangs_up_leaves_nothing_to_the_garbage_collector(relay):
    async def work():
        before = relay.counted("relay_events_received_total", source="adorn")
        for cut in (10, len(event()) // 2):
            async with await Wire.open(relay.addresses.public) as wire:
                await wire.send(event()[:cut])
        async with await Wire.open(relay.addresses.public) as wire:
            await wire.send(event(f"{TEXT}{before}"))
        await until(lambda: relay.counted("relay_events_received_total", source="adorn") > before)
        await until(lambda: not sum(relay.app.store.ledger.pending().values()))

    assert await left_to_the_collector(work) == {}


async def test_a_failed_attempt_leaves_nothing_to_the_garbage_collector(relay, recorder):
    async def work():
        recorder.answers.extend([(503, {}), (302, {"Location": "http://127.0.0.1:1/"}), (400, {})])
        assert (await relay.exchange(event())).status == 200
        await until(lambda: not sum(relay.app.store.ledger.pending().values()))

    assert await left_to_the_collector(work) == {}


async def test_an_attempt_without_a_response_leaves_nothing_to_the_garbage_collector(tmp_path, recorder):
    late = destination("late", recorder.url, 'timeout = "0.2s"\nconnect_timeout = "0.2s"')
    config = write_config(tmp_path, SOURCES, destination("gone", "http://127.0.0.1:1/hook"), late)
    recorder.open.clear()
    async with running(config) as relay:

        async def work():
            assert (await relay.exchange(event())).status == 200
            await until(lambda: not sum(relay.app.store.ledger.pending().values()))

        assert await left_to_the_collector(work) == {}
        assert {row["result"] for row in await relay.rows("attempts")} == {"connect", "timeout"}


class Recording:
    """A connection that notes the most bytes that were bound to each text."""

    def __init__(self):
        self.bound = Counter()
        self.rows = []

    async def run(self, statements):
        for sql, values in statements[1:-1]:  # between BEGIN and COMMIT
            size = sum(len(each) for each in values if isinstance(each, bytes))
            self.bound[sql] = max(self.bound[sql], size)
            self.rows += zip(values[::2], values[1::2], strict=True)


@pytest.mark.parametrize("size", [0, 100, 3000, 70_000, 400_000])
async def test_cached_statements_keep_few_bytes_bound(size):
    """SQLite's Python module keeps the values last bound to each cached statement."""
    recording, rows, whole, half = Recording(), [], bytes(size), bytes(size // 2)
    for count in range(1, 131):
        batch = [(len(rows) + at, whole if at % 5 else half) for at in range(count)]
        transaction = Transaction(recording)
        transaction.insert("events", "id, body", batch)
        await transaction.commit()
        rows += batch
    assert recording.rows == rows
    assert max(recording.bound.values()) <= max(size, MOST_BYTES)
    assert sum(recording.bound.values()) <= ROWS * MOST_BYTES + size


async def test_large_bodies_leave_the_memory_of_the_daemon(tmp_path):
    assert await torture(tmp_path, 800) <= MOST


async def test_the_check_detects_a_relay_that_keeps_bodies(tmp_path):
    assert await torture(tmp_path, 800, VARIANTS["keeps-bodies"]) > MOST
