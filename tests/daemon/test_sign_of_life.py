"""A refused request of a worker is a sign of life: no worker is offline because the relay refuses."""

import asyncio
import json
from contextlib import ExitStack, contextmanager
from itertools import count, product

import pytest
import pytest_asyncio
from daemons import SOURCES, running, write_config
from stores import break_disk, locked_database, only_sqlite, rows_of
from support import FakeClock, until
from wire import Wire, exchange, request

from relay.base.clock import SECOND
from relay.config.schema import WorkerRules
from relay.errors import StorageUnavailableError
from relay.ingest import admission
from relay.ingest.body import Patience
from relay.ingest.server import Server
from relay.model import Heartbeat, Register, Session, SessionSeen, Unregister, Worker
from relay.process.sockets import bind, url
from relay.store import Acceptance, writer
from relay.workers.rules import Now, apply, note_refused, silent

TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}
BASES = ("/api/v1", "/api")
CARELESS = """
from relay.hookspecs import hookimpl
from relay.source import Accepted, Heartbeat, Source, Unregister, route

class Fleet(Source, kind="fleet", owns=("/fleet",)):
    @route("PUT", "/fleet/{worker}")
    def beat(self, incoming):
        return Accepted(worker=Heartbeat(worker_id=incoming.params["worker"]), reply={})

    @route("DELETE", "/fleet/{worker}")
    def leave(self, incoming):
        return Accepted(worker=Unregister(worker_id=incoming.params["worker"]), reply={})

@hookimpl
def relay_sources():
    return [Fleet]
"""


def beat(worker="w1", base="/api/v1", body=None, **report):
    body = json.dumps(report).encode() if body is None else body
    return request("PUT", f"{base}/workers/{worker}/heartbeat", body, **TOKEN)


def register(worker="w1", base="/api/v1"):
    body = json.dumps({"workerId": worker, "endpoint": f"http://{worker}.example"}).encode()
    return request("POST", f"{base}/workers/register", body, **TOKEN)


def delete(worker="w1", base="/api/v1"):
    return request("DELETE", f"{base}/workers/{worker}", **TOKEN)


def farewell(worker="w1", base="/api/v1", method="DELETE"):
    body = json.dumps({"workerId": worker, "endpoint": "x"}).encode()
    return request(method, f"{base}/workers/unregister", body, **TOKEN)


LEAVING = [
    delete(), delete(base="/api"), farewell(), farewell(base="/api"), farewell(method="POST"),
    request("DELETE", "/api/v1/workers/w1", b"{}", **TOKEN),
]  # fmt: skip


@pytest.fixture
def config(tmp_path, listener):
    return write_config(tmp_path, SOURCES)


@pytest.fixture
async def relay(config, clock):
    async with running(config, clock=clock) as relay:
        yield relay


class Shared:
    """A relay that many tests share, because each start costs more than a test.

    Each test gets an instance with two workers. The test calls them w1 and w2; their ids are different ones
    of the same length.
    """

    def __init__(self, relay, clock, numbers):
        self.relay, self.app, self.clock = relay, relay.app, clock
        self.ids = {name: f"{next(numbers):02x}" for name in ("w1", "w2")}

    def named(self, raw):
        for name, id_ in self.ids.items():
            raw = raw.replace(name.encode(), id_.encode())
        return raw

    async def exchange(self, raw):
        return await self.relay.exchange(self.named(raw))

    async def types(self):
        rows = [row for row in await self.relay.rows() if row["subject"] in self.ids.values()]
        return [row["type"].removeprefix("whatsapp.worker.") for row in rows]

    async def sweep(self):
        return self._own(await sweep(self.relay))

    def workers(self):
        return self._own(self.app.store.workers.all())

    def _own(self, workers):
        return {name: worker for worker in workers for name, id_ in self.ids.items() if worker.id == id_}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared_relay(tmp_path_factory, listener):
    clock = FakeClock()
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES), clock=clock) as relay:
        relay.app.jobs.stop()  # its sweeps would mark workers before those of a test
        yield relay, clock, count(16)


@pytest.fixture
def shared(shared_relay):
    return Shared(*shared_relay)


on_shared_loop = pytest.mark.asyncio(loop_scope="module")


@contextmanager
def paused(relay):
    relay.app.ingest.mounts["whatsapp"].paused = True
    try:
        yield
    finally:
        relay.app.ingest.mounts["whatsapp"].paused = False


@contextmanager
def draining(relay):
    relay.app.ingest.admission.draining = True
    try:
        yield
    finally:
        relay.app.ingest.admission.draining = False


@contextmanager
def out_of_bytes(relay):
    budget = relay.app.ingest._budget
    limit, budget.limit = budget.limit, -1
    try:
        yield
    finally:
        budget.limit = limit


@contextmanager
def full_queue(_relay, patch):
    with patch.context() as now:
        now.setattr(writer, "MAX_JOBS", 0)
        yield


@contextmanager
def failing_disk(relay, patch):
    """Fail each COMMIT as a broken disk does."""
    with patch.context() as now:
        now.setattr(writer, "PROBE_EVERY", 0.01)
        break_disk(relay.app.store, now)
        yield


async def types(relay):
    return [row["type"].removeprefix("whatsapp.worker.") for row in await relay.rows()]


async def sweep(relay):
    return await relay.app.store.workers.sweep()


@pytest.mark.parametrize(
    ("cause", "call"),
    [
        *product((paused, draining), (beat, register)),
        (out_of_bytes, beat),  # the body names the worker, and is not read then
    ],
)
@pytest.mark.parametrize("base", BASES)
@on_shared_loop
async def test_a_refused_request_keeps_a_worker_alive(shared, cause, call, base):
    for worker in ("w1", "w2"):
        assert (await shared.exchange(register(worker))).status == 200
        assert (await shared.exchange(beat(worker))).status == 200
    marked = []
    with cause(shared):
        for second in range(0, 600, 10):
            shared.clock.advance(10)
            if second % 30 == 0:
                answer = await shared.exchange(call("w1", base))
                assert (answer.status, answer.json["success"]) == (503, False)
            marked += await shared.sweep()
    assert marked == ["w2"]  # a worker without requests is offline
    assert (await shared.exchange(beat())).status == 200
    shared.clock.advance(89)
    assert await shared.sweep() == {}
    assert await shared.types() == ["registered", "registered", "offline"]


@pytest.mark.parametrize("cause", [failing_disk, full_queue])
async def test_a_request_that_cannot_be_stored_keeps_a_worker_alive(relay, clock, monkeypatch, cause):
    assert (await relay.exchange(register())).status == 200
    with cause(relay, monkeypatch):
        for second in range(0, 600, 30):
            clock.advance(30)
            answer = await relay.exchange(register() if second % 60 else beat(version=f"{second}"))
            assert answer.status == 503
    await until(lambda: relay.app.store.failure is None)
    assert await sweep(relay) == ()
    [row] = relay.app.store.workers.all()
    assert (row.status, row.last_heartbeat) == ("ONLINE", clock.wall())
    assert (await relay.exchange(beat())).status == 200
    assert await types(relay) == ["registered"]


@only_sqlite("the free space for its file")
async def test_a_disk_below_its_floor_marks_no_worker_offline(config, clock):
    async with running(config, clock=clock) as relay:
        await relay.exchange(register())
    floor = config.read_text().replace('min_free_disk = "1 MiB"', 'min_free_disk = "4000000 GiB"')
    config.write_text(floor)
    async with running(config, clock=clock) as relay:
        await until(lambda: relay.app.ingest.admission.disk_full)
        for _ in range(10):
            clock.advance(60)
            answer = await relay.exchange(register())
            assert (answer.status, answer.json["error"]) == (503, "Out of disk space")
            assert await sweep(relay) == ()
        assert (await relay.exchange(delete())).status == 503
        assert len(await sweep(relay)) == 1
        assert await types(relay) == ["registered", "unregistered"]


async def test_the_effect_of_a_refused_request_is_stored_soon(config, relay, clock):
    await relay.exchange(register())
    relay.app.ingest.mounts["whatsapp"].paused = True
    clock.advance(60)
    assert (await relay.exchange(beat())).status == 503
    await relay.app.store.workers.flush()
    assert rows_of(config, "SELECT last_heartbeat FROM workers") == [(clock.wall(),)]


async def test_a_request_beyond_the_limit_of_connections_keeps_a_worker_alive(relay, clock):
    await relay.exchange(register())
    sock = bind("127.0.0.1:0", "listen")
    ingest = relay.app.ingest
    server = Server(
        ingest.handle,
        implementation=relay.app.listener,
        max_connections=1,
        overhear=ingest.overhear,
    )
    await server.listen(sock)
    wrong = beat().replace(b"worker-secret-token-12345", b"another")
    try:
        async with await Wire.open(url(sock)) as busy:
            await busy.send(beat()[:-1])
            await until(lambda: server.under_way == 1)
            for raw, is_heard in ((wrong, False), (b"GET /nowhere HTTP/1.1\r\n\r\n", False), (beat(), True)):
                clock.advance(60)
                before = relay.app.store.workers.all()[0].last_heartbeat
                answer = await exchange(url(sock), raw)
                assert (answer.status, answer.json["error"]["code"]) == (503, "overload")
                await until(lambda: len(server._turned_away) == 0)
                assert (relay.app.store.workers.all()[0].last_heartbeat > before) is is_heard
    finally:
        await server.close(grace=0.1)


# --- unregistering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", LEAVING, ids=lambda raw: raw.split(b" HTTP")[0].decode() + str(len(raw)))
@pytest.mark.parametrize("cause", [paused, draining])
@on_shared_loop
async def test_a_refused_unregister_unregisters_the_worker_without_an_offline_event(shared, cause, call):
    shared.clock.advance(1000)
    await shared.sweep()  # the workers of other tests
    offline = shared.app.store.workers.count("whatsapp", "OFFLINE")
    await shared.exchange(register())
    with cause(shared):
        assert (await shared.exchange(call)).status == 503
        shared.clock.advance(5)
        assert (await shared.exchange(beat())).status == 503  # was on its way before
        gone = (await shared.sweep())["w1"]
    assert (gone.status, gone.unregistered_at) == ("OFFLINE", shared.clock.steady() - 5 * SECOND)
    shared.clock.advance(1000)
    assert await shared.sweep() == {}
    assert await shared.types() == ["registered", "unregistered"]
    assert shared.app.store.workers.count("whatsapp", "OFFLINE") == offline
    assert (await shared.exchange(call)).status == 200  # again: nothing
    assert (await shared.exchange(beat())).status == 200
    assert await shared.types() == ["registered", "unregistered", "registered"]


async def test_an_unregister_during_a_disk_failure_is_stored_afterwards(relay, clock, monkeypatch):
    await relay.exchange(register())
    with failing_disk(relay, monkeypatch):
        assert (await relay.exchange(delete())).status == 503
        clock.advance(1000)
        with pytest.raises(StorageUnavailableError):
            await sweep(relay)
        assert await types(relay) == ["registered"]
    await until(lambda: relay.app.store.failure is None)
    assert [worker.id for worker in await sweep(relay)] == ["w1"]
    assert await types(relay) == ["registered", "unregistered"]


@pytest.mark.parametrize(("call", "after"), [(beat, 11), (register, 1)])
@pytest.mark.parametrize("refused", [True, False])
async def test_a_heartbeat_after_a_refused_unregister_keeps_the_worker(relay, clock, call, after, refused):
    await relay.exchange(register())
    relay.app.ingest.mounts["whatsapp"].paused = True
    await relay.exchange(delete())
    clock.advance(after)
    relay.app.ingest.mounts["whatsapp"].paused = refused
    assert (await relay.exchange(call())).status == (503 if refused else 200)
    assert await sweep(relay) == ()
    assert await types(relay) == ["registered"]


async def test_a_heartbeat_that_overlaps_a_refused_unregister_does_not_keep_the_worker(relay, clock):
    await relay.exchange(register())
    relay.app.ingest.mounts["whatsapp"].paused = True
    await relay.exchange(delete())
    relay.app.ingest.mounts["whatsapp"].paused = False
    clock.advance(9)
    assert (await relay.exchange(beat())).status == 200
    assert len(await sweep(relay)) == 1
    assert await types(relay) == ["registered", "unregistered"]


async def test_workers_that_stop_together_with_the_relay_raise_no_offline_event(config, clock):
    async with running(config, clock=clock) as relay:
        await relay.exchange(register())
        with draining(relay):
            assert (await relay.exchange(delete())).status == 503
    clock.advance(1000)
    async with running(config, clock=clock) as relay:
        clock.advance(1000)
        assert await sweep(relay) == ()
        assert await types(relay) == ["registered", "unregistered"]


@only_sqlite("a copy of its file")
async def test_a_refused_unregister_outlasts_a_crash_once_it_has_been_flushed(config, clock, tmp_path):
    async with running(config, clock=clock) as relay:
        await relay.exchange(register())
        relay.app.ingest.mounts["whatsapp"].paused = True
        await relay.exchange(delete())
        await relay.app.store.workers.flush()
        state = (config.parent / "state" / "relay.db").read_bytes()
        log = (config.parent / "state" / "relay.db-wal").read_bytes()
    (tmp_path / "crashed" / "state").mkdir(parents=True)
    (tmp_path / "crashed" / "state" / "relay.db").write_bytes(state)
    (tmp_path / "crashed" / "state" / "relay.db-wal").write_bytes(log)
    async with running(write_config(tmp_path / "crashed", SOURCES), clock=clock) as relay:
        await sweep(relay)
        assert await types(relay) == ["registered", "unregistered"]


@pytest.mark.parametrize("again", [None, beat, register])
async def test_an_unregister_before_the_store_is_open_is_stored_afterwards(config, clock, again):
    async with running(config, clock=clock) as relay:
        for worker in ("w1", "w2"):
            assert (await relay.exchange(register(worker))).status == 200
    with ExitStack() as locked:
        locked.enter_context(locked_database(config))
        async with running(config, clock=clock) as relay:
            for raw in (delete("w1"), beat("w2"), *([again("w1")] if again else [])):
                assert (await relay.exchange(raw)).status == 503
            locked.close()
            await until(lambda: relay.app.store.opened)
            await sweep(relay)  # the start's own sweep may have reported it already
            gone = [row["subject"] for row in await relay.rows() if row["type"].endswith(".unregistered")]
            assert gone == ([] if again is register else ["w1"])  # a heartbeat so soon was on its way before
            clock.advance(60)
            assert await sweep(relay) == ()


# --- requests that count ------------------------------------------------------------------------------

DEEP = b'{"a":' * 5000
ODD = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "broken": b'{"status": "ONL',
    "NaN": b'{"cpuUsage":NaN}',
    "no UTF-8": b'{"note":"\xff"}',
    "a mark": b"\xef\xbb\xbf{}",
    "half an emoji": b'{"note":"\\ud83d"}',
    "deep": DEEP,
    "a large number": b'{"messageCount":1e400}',
    "a long number": b'{"messageCount":' + b"9" * 5000 + b"}",
    "a form": b"status=ONLINE",
    "sessions of nonsense": b'{"sessions":[[],{"sessionId":{}},5]}',
}


READABLE = [
    b'{"status":"MAINTENANCE","cpuUsage":%b}' % odd
    for odd in (
        b"NaN",
        b"-Infinity",
        b'"\xff"',
        b'"\\ud83d"',
        b'"\n"',
        b"1e400",
        b"9" * 5000,
        b'"\xed\xa0\xbd"',
    )
]


@pytest.mark.parametrize("body", [*READABLE, b"\xef\xbb\xbf" + READABLE[0]], ids=lambda body: repr(body[:60]))
@on_shared_loop
async def test_the_readable_part_of_an_odd_heartbeat_counts(shared, body):
    assert (await shared.exchange(beat(body=body))).status == 200
    worker = shared.workers()["w1"]
    assert (worker.status, worker.cpu) == ("MAINTENANCE", None)


@pytest.mark.parametrize("odd", [b"NaN", b'"\xff"', b'"\\ud83d"', b"1e400"])
@on_shared_loop
async def test_odd_register_and_unregister_requests_are_accepted(shared, odd):
    body = b'{"workerId":"w1","endpoint":"http://w1.example","maxSessions":%b}' % odd
    for method, path in (("POST", "register"), ("DELETE", "unregister")):
        assert (await shared.exchange(request(method, f"/api/workers/{path}", body, **TOKEN))).status == 200
    assert await shared.types() == ["registered", "unregistered"]


async def kept(shared, raw, statuses):
    """Return whether a request keeps the worker w1 alive."""
    await shared.exchange(beat())
    shared.clock.advance(80)
    answer = await shared.exchange(raw)
    assert answer.status in statuses, answer
    shared.clock.advance(80)
    return not await shared.sweep()


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
@on_shared_loop
async def test_a_heartbeat_counts_with_any_body(shared, body):
    assert await kept(shared, beat(body=body), (200, 400))
    assert await shared.types() == ["registered"]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("PUT", "/api/v1/workers/w1/heartbeat", b"{}", content_encoding="gzip", **TOKEN), 415),
        (request("PUT", "/api/v1/workers/w1/heartbeat", content_length="99999999", **TOKEN), 413),
        (request("PUT", "/api/workers/w1/heartbeat", b"x" * 2**21 + b"x", **TOKEN), 413),
        (request("POST", "/api/v1/workers/w1/heartbeat", b"{}", **TOKEN), 405),
        (request("GET", "/api/v1/workers/w1/heartbeat", **TOKEN), 405),
    ],
)
@on_shared_loop
async def test_a_heartbeat_counts_with_any_reply(shared, raw, status):
    assert await kept(shared, raw, (status,))


@pytest.mark.parametrize(
    "raw",
    [
        beat(body=b"{"), beat(body=b"[]"), beat(body=b""), beat(base="/api", body=b"\x00"),
        request("PUT", "/api/v1/workers/w1/heartbeat", b"{}", content_encoding="gzip", **TOKEN),
        request("PUT", "/api/v1/workers/w1/heartbeat", content_length="99999999", **TOKEN),
        request("GET", "/api/v1/workers/w1/heartbeat", **TOKEN),
    ],
)  # fmt: skip
@on_shared_loop
async def test_a_heartbeat_with_any_body_brings_an_offline_worker_back(shared, raw):
    await shared.exchange(beat())
    shared.clock.advance(100)
    await shared.sweep()
    queue = request("POST", "/api/workers/whatsapp/w1/commands", b'{"command":{"type":"restart"}}')
    command = (await exchange(shared.relay.addresses.socket, shared.named(queue))).json["id"]
    assert (await shared.exchange(raw)).status >= 400
    assert await shared.types() == ["registered", "offline", "online"]
    async with asyncio.timeout(30):
        while not (commands := (await shared.exchange(beat())).json["data"]["commands"]):
            pass
    assert commands == [{"id": command, "type": "restart"}]


async def test_a_heartbeat_to_a_paused_source_brings_no_worker_back(relay, clock):
    await relay.exchange(beat())
    clock.advance(100)
    await sweep(relay)
    with paused(relay):
        assert (await relay.exchange(beat(body=b"{"))).status == 503
    assert await types(relay) == ["registered", "offline"]


async def test_unreadable_heartbeats_count_towards_recover_after(tmp_path, clock):
    rules = "[workers]\nrecover_after = 3\n"
    async with running(write_config(tmp_path, SOURCES, rules), clock=clock) as relay:
        await relay.exchange(beat())
        clock.advance(100)
        await sweep(relay)
        for number in range(3):
            assert (await types(relay))[-1] == "offline", number
            clock.advance(30)
            assert (await relay.exchange(beat(body=b"{"))).status == 400
        assert (await types(relay))[-1] == "online"


@on_shared_loop
async def test_a_heartbeat_without_its_announced_body_counts(shared, monkeypatch):
    monkeypatch.setattr(shared.app.ingest, "patience", Patience(0.05))
    raw = request("PUT", "/api/v1/workers/w1/heartbeat", content_length="5", **TOKEN)
    assert await kept(shared, raw, (408,))


async def test_a_heartbeat_that_is_cut_short_counts(relay, clock):
    await relay.exchange(beat())
    clock.advance(80)
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(request("PUT", "/api/v1/workers/w1/heartbeat", content_length="5", **TOKEN) + b"{")
    await until(lambda: relay.app.store.workers.all()[0].last_heartbeat == clock.wall())
    clock.advance(80)
    assert await sweep(relay) == ()


@pytest.mark.parametrize(
    ("raw", "statuses"),
    [
        (beat().replace(b"worker-secret-token-12345", b"another"), (401,)),
        (beat().replace(b"Authorization", b"X-Authorization"), (401,)),
        (beat("w2", body=b"{"), (400,)),
        (request("POST", "/api/v1/workers/w1/events", b"{", **TOKEN), (400,)),
        (request("DELETE", "/api/v1/workers/w1/events", **TOKEN), (200, 405)),
        (request("PUT", "/api/v1/workers/w1/heartbeat/", b"{}", **TOKEN), (404,)),
    ],
)
@on_shared_loop
async def test_no_other_refused_request_counts_as_a_heartbeat(shared, raw, statuses):
    assert not await kept(shared, raw, statuses)


async def test_a_refused_request_creates_no_worker(relay):
    await relay.exchange(beat("known"))
    relay.app.ingest.mounts["whatsapp"].paused = True
    for raw in (beat("w1"), register("w1"), delete("w1"), beat("x" * 300), beat("w1", body=b"{")):
        assert (await relay.exchange(raw)).status in (400, 503)
    assert [worker.id for worker in relay.app.store.workers.all()] == ["known"]


async def test_without_sign_of_life_the_relay_uses_the_handlers(tmp_path, clock):
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "fleet.py").write_text(CARELESS)
    more = '[plugins]\ndirs = ["plugins.d"]\n[sources.fleet]\nplugin = "fleet"\n'
    async with running(write_config(tmp_path, more), clock=clock) as relay:
        for worker in ("a", "b", "c"):
            await relay.exchange(request("PUT", f"/fleet/{worker}", b"{}"))
        relay.app.ingest.mounts["fleet"].paused = True
        clock.advance(80)
        assert (await relay.exchange(request("PUT", "/fleet/a", b"{}"))).status == 503
        assert (await relay.exchange(request("DELETE", "/fleet/b"))).status == 503
        clock.advance(80)
        found = {worker.id: worker.unregistered_at is None for worker in await sweep(relay)}
        assert found == {"b": False, "c": True}


# --- rates --------------------------------------------------------------------------------------------


@pytest.fixture
async def limited(tmp_path, clock):
    text = SOURCES.replace('plugin = "whatsapp"\n', 'plugin = "whatsapp"\nrate_limit = "6/m"\n')
    async with running(write_config(tmp_path, text), clock=clock) as relay:
        yield relay


async def statuses(relay, *raws):
    return [(await relay.exchange(raw)).status for raw in raws]


async def test_a_worker_that_floods_delays_no_other_and_stays_online(limited, clock):
    storm = await statuses(limited, *[beat("storm")] * 50)
    assert storm == [200] * 6 + [429] * 44
    assert await statuses(limited, register("w1"), beat("w1"), beat("w2"), delete("w2")) == [200] * 4
    event = request("POST", "/api/v1/webhooks/message-status", b'{"sessionId":"s"}', **TOKEN)
    assert await statuses(limited, *[event] * 7) == [200] * 6 + [429]  # events have the token's own rate
    for _ in range(20):
        clock.advance(30)
        answers = await statuses(limited, *[beat("storm")] * 10, beat("w1"))
        assert answers[-1] == 200
        assert await sweep(limited) == ()


async def test_all_workers_of_a_token_share_a_rate_limit(limited):
    answers = await statuses(limited, *(beat(f"w{number}") for number in range(100)))
    assert answers == [200] * 60 + [429] * 40


async def test_the_number_of_remembered_rate_limits_is_bounded(limited, clock, monkeypatch):
    monkeypatch.setattr(admission, "MOST_BUCKETS", 20)
    for number in range(60):
        await limited.exchange(beat(f"w{number}"))
    assert len(limited.app.ingest.admission._workers) == 20


# --- the rules ----------------------------------------------------------------------------------------

RULES = WorkerRules()
ROW = Worker(source="s", id="w", last_heartbeat=1, deadline=90 * SECOND)


def at(seconds):
    return Now(wall=seconds * SECOND, steady=seconds * SECOND)


@pytest.mark.parametrize("status", ["ONLINE", "OFFLINE", "MAINTENANCE"])
def test_a_refused_request_changes_no_status(status):
    row = Worker(source="s", id="w", status=status, deadline=5)
    for change in (Heartbeat(worker_id="w", status="OFFLINE"), Register(worker_id="w")):
        after = note_refused(row, change, at(100), RULES)
        assert (after.status, after.deadline, after.last_heartbeat) == (status, 190 * SECOND, 100 * SECOND)
    assert note_refused(row, SessionSeen(worker_id="w", session=Session(id="s")), at(100), RULES) is row


def test_an_unregistered_worker_ignores_refused_requests():
    gone = Worker(source="s", id="w", unregistered_at=1)
    for change in (Heartbeat(worker_id="w"), Register(worker_id="w"), Unregister(worker_id="w")):
        assert note_refused(gone, change, at(100), RULES) is gone


@pytest.mark.parametrize("status", ["ONLINE", "OFFLINE", "MAINTENANCE"])
def test_a_refused_unregister_raises_one_event(status):
    row = note_refused(Worker(source="s", id="w", status=status), Unregister(worker_id="w"), at(5), RULES)
    after, generated = silent(row, at(0))
    assert (generated.type, after.unregistered_at, generated.data["reason"]) == (
        "worker.unregistered",
        5 * SECOND,
        "requested",
    )
    assert "leaving" not in generated.data["worker"]
    assert silent(after, at(1000)) is None


def test_refused_and_accepted_unregisters_together_raise_one_event():
    row = note_refused(ROW, Unregister(worker_id="w"), at(5), RULES)
    row = note_refused(row, Unregister(worker_id="w"), at(6), RULES)
    step = apply(row, Unregister(worker_id="w"), "s", at(7), RULES)
    assert [generated.type for generated in step.generated] == ["worker.unregistered"]
    assert silent(step.worker, at(1000)) is None


async def test_a_refused_request_while_a_worker_s_row_is_written_is_not_lost(relay, clock):
    store = relay.app.store
    for worker in ("w1", "w2", "w3"):
        await relay.exchange(register(worker))
    begun, go = asyncio.Event(), asyncio.Event()
    committer = store._committer
    write = committer.write

    async def slow(transaction, batch):
        begun.set()
        await go.wait()
        await write(transaction, batch)

    committer.write = slow
    changes = [Heartbeat(worker_id=worker, version="2") for worker in ("w1", "w2", "w3")]
    waiting = [
        asyncio.ensure_future(store.events.append(Acceptance(source="whatsapp", change=change)))
        for change in changes
    ]
    await begun.wait()
    clock.advance(80)
    store.workers.note_refused("whatsapp", Heartbeat(worker_id="w1"))
    store.workers.note_refused("whatsapp", Unregister(worker_id="w2"))
    go.set()
    await asyncio.gather(*waiting)
    committer.write = write
    clock.advance(80)
    found = {worker.id: worker.unregistered_at is None for worker in await sweep(relay)}
    assert found == {"w2": False, "w3": True}
    assert {worker.version for worker in store.workers.all()} == {"2"}
