"""Workers in the running relay: commands, maintenance, gauges, and the API for operators."""

import asyncio
import json
from urllib.parse import quote

import pytest
import pytest_asyncio
from daemons import SOURCES, running, write_config
from stores import call_writer, fail_writes, queued
from support import until
from wire import Wire, exchange, request

from relay.errors import StorageUnavailableError
from relay.ingest import worker_requests
from relay.model import Heartbeat
from relay.store import Acceptance

TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}


@pytest.fixture
async def relay(tmp_path, clock):
    async with running(write_config(tmp_path, SOURCES), clock=clock) as relay:
        yield relay


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    """A relay for tests that other workers do not disturb."""
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES)) as relay:
        yield relay


on_shared_loop = pytest.mark.asyncio(loop_scope="module")


def beat(worker="w1", **body):
    path = f"/api/v1/workers/{quote(worker, safe='')}/heartbeat"
    return request("PUT", path, body=json.dumps(body).encode(), **TOKEN)


def register(worker="w1", **body):
    raw = json.dumps({"workerId": worker, **body}).encode()
    return request("POST", "/api/v1/workers/register", body=raw, **TOKEN)


async def ask(relay, method, path, body=None):
    """Ask the admin API, and return status and JSON."""
    raw = None if body is None else json.dumps(body).encode()
    answer = await exchange(relay.addresses.socket, request(method, f"/api/workers{path}", body=raw))
    return answer.status, answer.json


async def worker(relay, id_="w1"):
    return (await ask(relay, "GET", f"/whatsapp/{quote(id_, safe='')}"))[1]


async def types(relay):
    return [row["type"].removeprefix("whatsapp.worker.") for row in await relay.rows()]


async def test_the_reply_to_the_next_heartbeat_contains_a_command_once(relay):
    await relay.exchange(beat())
    status, queued = await ask(
        relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "restart", "n": 1}}
    )
    assert (status, queued["state"]) == (201, "queued")
    first, second = await relay.exchange(beat()), await relay.exchange(beat())
    assert first.json["data"]["commands"] == [{"id": queued["id"], "type": "restart", "n": 1}]
    assert second.json["data"]["commands"] == []
    [command] = (await worker(relay))["commands"]
    assert (command["state"], command["command"]) == ("sent", {"type": "restart", "n": 1})
    assert command["sent_at"] is not None


async def test_commands_are_sent_in_their_order(relay):
    await relay.exchange(beat())
    for number in range(25):
        await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "t", "n": number}})
    replies = [await relay.exchange(beat()) for _ in range(2)]
    numbers = [[c["n"] for c in reply.json["data"]["commands"]] for reply in replies]
    assert numbers == [list(range(20)), list(range(20, 25))]


@pytest.mark.parametrize("failures", [0, 2])
async def test_a_command_in_a_reply_that_cannot_be_written_is_queued_again(relay, monkeypatch, failures):
    monkeypatch.setattr(worker_requests, "STORAGE_PAUSE", 0.01)
    fleet, failing = relay.app.store.workers.change, [StorageUnavailableError("the disk is full")] * failures

    async def fail_at_first(wish):
        if failing:
            raise failing.pop()
        return await fleet(wish)

    await relay.exchange(beat())
    await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "restart"}})
    monkeypatch.setattr(relay.app.store.workers, "change", fail_at_first)
    wire = await Wire.open(relay.addresses.public)
    # The writer is held until the worker is gone, so that nobody receives the reply.
    holds, held = asyncio.Event(), asyncio.Event()

    async def hold(_connection):
        holds.set()
        await held.wait()

    blocked = asyncio.ensure_future(call_writer(relay.app.store, hold))
    await holds.wait()
    await wire.send(beat())
    await until(lambda: queued(relay.app.store))
    await wire.hang_up()
    await relay.exchange(request("GET", "/health"))  # everything before it has been handled then
    held.set()
    await blocked
    async with asyncio.timeout(30):
        while not (commands := (await relay.exchange(beat())).json["data"]["commands"]):
            pass
    assert commands[0]["type"] == "restart"


async def test_a_command_without_a_heartbeat_expires(relay, clock):
    await relay.exchange(beat())
    await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "restart"}, "ttl": "1m"})
    clock.advance(61)
    assert (await relay.exchange(beat())).json["data"]["commands"] == []
    await relay.app.store.deliveries.expire()
    assert (await worker(relay))["commands"][0]["state"] == "expired"


async def test_a_queued_command_can_be_cancelled_but_not_a_sent_one(relay):
    await relay.exchange(beat())
    ids = []
    for _ in range(2):
        _, queued = await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "x"}})
        ids.append(queued["id"])
    assert (await ask(relay, "DELETE", f"/whatsapp/w1/commands/{ids[0]}"))[0] == 200
    assert [c["id"] for c in (await relay.exchange(beat())).json["data"]["commands"]] == [ids[1]]
    assert (await ask(relay, "DELETE", f"/whatsapp/w1/commands/{ids[1]}"))[0] == 404


@pytest.mark.parametrize(
    "body", [{}, {"command": "restart"}, {"command": {}}, {"command": {"type": "x"}, "ttl": "soon"}, [1]]
)
@on_shared_loop
async def test_an_invalid_command_is_refused_with_a_hint(shared, body):
    await shared.exchange(beat())
    status, reply = await ask(shared, "POST", "/whatsapp/w1/commands", body)
    assert status == 400
    assert reply["error"]["message"]


@pytest.mark.parametrize("action", ["commands", "maintenance"])
@pytest.mark.parametrize("body", [{}, [1], {"command": {"type": "x"}, "on": True}])
@on_shared_loop
async def test_an_unknown_worker_gets_404_with_any_body(shared, action, body):
    status, answer = await ask(shared, "POST", f"/whatsapp/nobody/{action}", body)
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert 'unknown worker "nobody"' in answer["error"]["message"]


async def test_queued_commands_survive_a_restart(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        await relay.exchange(beat())
        await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "restart"}})
    async with running(config) as relay:
        assert len((await relay.exchange(beat())).json["data"]["commands"]) == 1


async def test_maintenance_by_a_pattern_or_a_window_survives_a_restart_and_ends_by_itself(tmp_path, clock):
    # The clock begins on 2023-11-14 at 22:13:20 UTC.
    window = '{ ids = "planned-*", days = ["tue"], start = "23:00", end = "01:00", zone = "Europe/Berlin" }'
    config = write_config(tmp_path, SOURCES, f"[workers]\nmaintenance = [{window}]")
    async with running(config, clock=clock) as relay:
        for each in ("batch-1", "planned-1", "w1"):
            await relay.exchange(beat(each))
        _, done = await ask(relay, "POST", "/maintenance", {"on": True, "pattern": "batch-*", "for": "2h"})
        assert done == {"workers": 1, "maintenance_until": "2023-11-15T00:13:20.000Z"}
        await relay.exchange(beat("batch-2"))
        await relay.app.state.watch.sweep()
        statuses = {row.id: row.status for row in relay.app.store.workers.all()}
        assert statuses == dict.fromkeys(("batch-1", "batch-2", "planned-1"), "MAINTENANCE") | {
            "w1": "ONLINE"
        }
        shown = await worker(relay, "planned-1")
        assert (shown["maintenance_by"], shown["maintenance_until"]) == ("config", "2023-11-15T00:00:00.000Z")
    async with running(config, clock=clock) as relay:
        clock.advance(108 * 60)  # the window has ended
        await relay.app.state.watch.sweep()
        assert (await worker(relay, "planned-1"))["status"] == "ONLINE"
        assert (await worker(relay, "batch-2"))["status"] == "MAINTENANCE"
        clock.advance(900)
        await relay.app.state.watch.sweep()
        assert (await worker(relay, "batch-2"))["status"] == "ONLINE"
        assert set(await types(relay)) == {"registered"}  # nothing was reported offline


async def test_maintenance_overrides_reports_and_silence(relay, clock):
    await relay.exchange(beat(status="ONLINE"))
    assert (await ask(relay, "POST", "/whatsapp/w1/maintenance", {"on": True}))[1]["status"] == "MAINTENANCE"
    await relay.exchange(beat(status="ONLINE"))
    clock.advance(1000)
    await relay.app.store.workers.sweep()
    assert (await worker(relay))["status"] == "MAINTENANCE"
    assert (await ask(relay, "POST", "/whatsapp/w1/maintenance", {"on": False}))[1]["status"] == "ONLINE"
    clock.advance(91)
    await relay.app.store.workers.sweep()
    assert (await worker(relay))["status"] == "OFFLINE"
    assert await types(relay) == ["registered", "offline"]


async def test_a_forgotten_worker_is_new_at_its_next_heartbeat(relay):
    await relay.exchange(beat())
    assert (await ask(relay, "DELETE", "/whatsapp/w1"))[0] == 200
    assert (await ask(relay, "GET", "/whatsapp/w1"))[0] == 404
    await relay.exchange(beat())
    assert await types(relay) == ["registered", "registered"]


async def test_workers_offline_for_long_are_forgotten(relay, clock):
    await relay.exchange(beat("old"))
    clock.advance(100)
    await relay.app.store.workers.sweep()
    await relay.exchange(beat("young"))
    clock.advance(30 * 86_400)
    await relay.app._forget_workers()
    assert [w.id for w in relay.app.store.workers.all()] == ["young"]


async def test_gauges_are_kept_once_a_minute_and_pruned(relay, clock):
    for _ in range(6):
        await relay.exchange(beat(cpuUsage=5.5, uptime=1, sessions={"total": 2}))
        await relay.app.store.workers.flush()
        clock.advance(30)
    rows = (await worker(relay))["metrics"]
    assert [row["cpu"] for row in rows] == [5.5] * 3
    assert rows[0]["sessions"] == {"total": 2}
    clock.advance(8 * 86_400)
    await relay.app._forget_workers()
    assert (await worker(relay))["metrics"] == []


async def test_a_session_event_changes_the_registry_at_once(relay):
    await relay.exchange(beat(sessions=[{"sessionId": "s1", "status": "CONNECTING"}]))
    body = json.dumps({"sessionId": "s1", "status": "CONNECTED", "phoneNumber": "+62"}).encode()
    await relay.exchange(request("POST", "/api/v1/webhooks/session-status", body=body, **TOKEN))
    [session] = (await worker(relay))["sessions"]
    assert (session["status"], session["phone"]) == ("CONNECTED", "+62")


async def test_an_event_without_a_worker_belongs_to_the_worker_of_its_session(relay):
    for id_ in ("w1", "w2"):
        await relay.exchange(beat(id_))
    waiting = []
    release = await held(relay)  # heartbeat and event come in one transaction

    async def send(raw):
        waiting.append(asyncio.ensure_future(relay.exchange(raw)))
        await until(lambda: queued(relay.app.store) >= len(waiting))

    await send(beat("w1", sessions=[{"sessionId": "s1", "status": "QR_REQUIRED"}]))
    await send(beat("w2", sessions=[{"sessionId": "s1", "status": "QR_REQUIRED"}]))
    body = json.dumps({"sessionId": "s1", "status": "CONNECTED"}).encode()
    await send(request("POST", "/api/v1/webhooks/session-status", body=body, **TOKEN))
    await release()
    await asyncio.gather(*waiting)
    sessions = {id_: (await worker(relay, id_))["sessions"][0]["status"] for id_ in ("w1", "w2")}
    assert sessions == {"w1": "QR_REQUIRED", "w2": "CONNECTED"}


async def test_after_a_restart_a_session_belongs_to_the_worker_with_the_latest_heartbeat(tmp_path, clock):
    config = write_config(tmp_path, SOURCES)
    async with running(config, clock=clock) as relay:
        for id_ in ("z-old", "a-new"):  # against the order of their ids
            await relay.exchange(beat(id_, sessions=[{"sessionId": "s1", "status": "QR_REQUIRED"}]))
            clock.advance(1)
    async with running(config, clock=clock) as relay:
        body = json.dumps({"sessionId": "s1", "status": "CONNECTED"}).encode()
        await relay.exchange(request("POST", "/api/v1/webhooks/session-status", body=body, **TOKEN))
        sessions = {id_: (await worker(relay, id_))["sessions"][0]["status"] for id_ in ("z-old", "a-new")}
        assert sessions == {"z-old": "QR_REQUIRED", "a-new": "CONNECTED"}


V1_EVENTS = ("session_created", "qr_ready", "connected", "disconnected", "reconnecting", "connected")


async def test_the_session_of_a_v1_worker_follows_its_event_names(relay, clock):
    await relay.exchange(register())
    seen = []
    for event in (*V1_EVENTS, "session_deleted"):
        clock.advance(1)
        body = {
            "event": event,
            "sessionId": "s1",
            "workerId": "w1",
            "data": {},
            "timestamp": clock.wall() // 1000,
        }
        path = "/api/v1/workers/w1/events" if "session" in event else "/api/v1/webhooks/session-status"
        await relay.exchange(request("POST", path, body=json.dumps(body).encode(), **TOKEN))
        seen += [session["status"] for session in (await worker(relay))["sessions"]]
    assert seen == ["created", "qr_required", "connected", "disconnected", "reconnecting", "connected"]
    assert (await worker(relay))["sessions"] == []


async def test_a_restart_of_a_worker_is_an_event(relay):
    for uptime in (3600, 3630, 4):
        await relay.exchange(beat(uptime=uptime))
    assert await types(relay) == ["registered", "restarted"]


async def test_the_list_is_filtered_and_odd_ids_are_found(relay):
    odd = "büro 7/östlich"
    await relay.exchange(beat(odd, version="2"))
    await relay.exchange(beat("w1", version="1"))
    assert (await worker(relay, odd))["id"] == odd
    listed = (await ask(relay, "GET", "?version=2"))[1]["items"]
    assert [item["id"] for item in listed] == [odd]
    assert (await ask(relay, "GET", "?verson=2"))[0] == 400


ODD_IDS = [
    "a#b",
    "a?b",
    "a%2Fb",
    "a%",
    "..a",
    "a/../b",
    "a\\b",
    "/a",
    "a/",
    "a//b",
    "a+b c",
    "{worker}",
    "a/b",
    "ü",
]


@pytest.mark.parametrize("base", ["/api/v1", "/api"])
@pytest.mark.parametrize("id_", ["rack/w7", "a/b/c", "a/heartbeat", "x/sessions", "http://host:1/w"])
async def test_a_worker_id_with_plain_slashes_works_in_every_request(relay, clock, base, id_):
    raw = f"{base}/workers/{id_}"
    await relay.exchange(register(id_))
    for _ in range(4):
        clock.advance(60)
        assert (await relay.exchange(request("PUT", f"{raw}/heartbeat", b"{}", **TOKEN))).json == {
            "success": True,
            "data": {"workerId": id_, "status": "acknowledged", "commands": []},
        }
        assert await relay.app.store.workers.sweep() == ()
    asked = await relay.exchange(request("GET", f"{raw}/sessions/assigned", **TOKEN))
    assert asked.json["data"]["workerId"] == id_
    for path, body in (
        ("events", b'{"event": "worker_stopping"}'),
        ("sessions-preserved", b"{}"),
        ("sessions/recovery-status", b"{}"),
    ):
        assert (await relay.exchange(request("POST", f"{raw}/{path}", body, **TOKEN))).status == 200
    assert {row["subject"] for row in await relay.rows()} == {id_}
    if not id_.endswith("/heartbeat"):  # DELETE …/a/heartbeat is a known path with another method
        assert (await relay.exchange(request("DELETE", raw, **TOKEN))).status == 200
        assert (await types(relay))[-1] == "unregistered"


@pytest.mark.parametrize("id_", ODD_IDS)
@on_shared_loop
async def test_an_odd_worker_id_in_percent_encoding_is_the_same_worker_in_every_request(shared, id_):
    others = {w.id for w in shared.app.store.workers.all()}
    assert (await shared.exchange(register(id_))).status == 200
    assert (await shared.exchange(beat(id_))).json["data"]["workerId"] == id_
    assert {w.id for w in shared.app.store.workers.all()} - others == {id_}
    assert (await worker(shared, id_))["id"] == id_
    path = f"/api/v1/workers/{quote(id_, safe='')}"
    assert (await shared.exchange(request("DELETE", path, **TOKEN))).status == 200
    rows = await shared.rows(subject=id_)
    assert [row["type"].rpartition(".")[2] for row in rows] == ["registered", "unregistered"]


@pytest.mark.parametrize("id_", [".", ".."])
@on_shared_loop
async def test_an_id_that_no_path_can_contain_is_refused_at_registration(shared, id_):
    answer = await shared.exchange(register(id_))
    assert (answer.status, answer.json["code"]) == (400, "VALIDATION_ERROR")
    assert answer.json["error"] == "workerId: clients and proxies remove this id from paths"
    assert id_ not in {worker.id for worker in shared.app.store.workers.all()}


@pytest.mark.parametrize(
    ("id_", "part"),
    [
        ("a#b", "#"), ("a?b", "?"), ("a%2Fb", "%2F"), ("a\\b", "\\"), ("a/../b", ".."), ("./a", "."),
        ("/a", "/"), ("a/", "/"), ("a//b", "//"),
        ("a/b", ""), ("a%", ""), ("..a", ""), ("a.", ""), ("a b", ""), ("ü", ""), ("a.b/c..d", ""),
    ],
)  # fmt: skip
async def test_an_id_that_changes_a_path_is_logged_at_registration(relay, caplog, id_, part):
    await relay.exchange(register(id_))
    logged = [message for message in caplog.messages if "percent-encodes" in message]
    line = (
        f"whatsapp: worker {id_!r} registered with {part!r} in its id; its heartbeats"
        " arrive only if its client percent-encodes the id in paths"
    )
    assert logged == [line] * bool(part)


RECOVERING = SOURCES + "recover_sessions = true\n"
PLACE = "http://10.1.2.3:8001"


@pytest.fixture
async def recovering(tmp_path, clock):
    async with running(write_config(tmp_path, RECOVERING), clock=clock) as relay:
        yield relay


async def restored(relay, worker="w1", endpoint=PLACE):
    """Register a worker; check that all answers agree, and return the sessions that it must restore."""
    data = (await relay.exchange(register(worker, endpoint=endpoint))).json["data"]
    ids = [session["sessionId"] for session in data["assignedSessions"]]
    assert (data["recoveryRequired"], data["assignedSessionCount"]) == (bool(ids), len(ids))
    assert await assigned(relay, worker) == ids
    return ids


async def assigned(relay, worker):
    raw = request("GET", f"/api/v1/workers/{worker}/sessions/assigned", **TOKEN)
    return [session["sessionId"] for session in (await relay.exchange(raw)).json["data"]["sessions"]]


def listing(worker, *ids):
    return beat(worker, sessions=[{"sessionId": id_, "status": "CONNECTED"} for id_ in ids])


async def leave(relay, worker):
    await relay.exchange(request("DELETE", f"/api/v1/workers/{worker}", **TOKEN))


async def fall_silent(relay, clock):
    clock.advance(91)
    await relay.app.store.workers.sweep()


async def test_a_worker_that_restarts_under_its_id_gets_its_sessions(recovering, clock):
    assert await restored(recovering) == []
    await recovering.exchange(listing("w1", "s1", "s2"))
    assert await restored(recovering) == ["s1", "s2"]  # still ONLINE: it crashed and came back at once
    await fall_silent(recovering, clock)
    assert await restored(recovering) == ["s1", "s2"]
    await leave(recovering, "w1")
    assert await restored(recovering) == ["s1", "s2"]


async def test_sessions_to_restore_outlast_an_empty_list_and_a_restart(tmp_path, clock):
    config = write_config(tmp_path, RECOVERING)
    async with running(config, clock=clock) as relay:
        await restored(relay)
        await relay.exchange(listing("w1", "s1"))
        await restored(relay)
    async with running(config, clock=clock) as relay:
        await relay.exchange(listing("w1"))
        assert await assigned(relay, "w1") == ["s1"]
        assert [s["id"] for s in (await worker(relay))["sessions"]] == ["s1"]
        await relay.exchange(listing("w1"))
        assert await assigned(relay, "w1") == []


@pytest.mark.parametrize("ends", [fall_silent, lambda relay, _clock: leave(relay, "w1")])
async def test_a_new_id_at_the_endpoint_of_an_offline_worker_gets_its_sessions(recovering, clock, ends):
    await restored(recovering)
    await recovering.exchange(listing("w1", "s1", "s2"))
    await ends(recovering, clock)
    assert await restored(recovering, "w2") == ["s1", "s2"]
    assert await assigned(recovering, "w1") == []
    assert await restored(recovering, "w3") == []  # they are w2's now, which is alive
    registered = next(row for row in await recovering.rows() if row["subject"] == "w2")
    [event] = (await recovering.app.store.events.load([registered["row"]])).values()
    assert [s["id"] for s in json.loads(event.data)["worker"]["sessions"]] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("http://localhost:8001", "http://localhost:8001"),
        ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
        (PLACE, "http://10.1.2.4:8001"),
        ("", ""),
    ],
)
async def test_a_new_id_elsewhere_or_on_loopback_gets_no_sessions(recovering, clock, first, second):
    await restored(recovering, "w1", first)
    await recovering.exchange(listing("w1", "s1"))
    await fall_silent(recovering, clock)
    assert await restored(recovering, "w2", second) == []
    assert await assigned(recovering, "w1") == ["s1"]


async def test_a_new_id_gets_no_sessions_of_an_online_worker(recovering):
    await restored(recovering)
    await recovering.exchange(listing("w1", "s1"))
    assert await restored(recovering, "w2") == []


async def test_a_session_that_another_live_worker_lists_is_never_restored(recovering, clock):
    await restored(recovering)
    await recovering.exchange(listing("w1", "s1", "s2", "s3"))
    await fall_silent(recovering, clock)
    await recovering.exchange(listing("elsewhere", "s1"))
    await recovering.exchange(listing("resting", "s2"))
    await ask(recovering, "POST", "/whatsapp/resting/maintenance", {"on": True})
    await recovering.exchange(listing("w1b", "s9"))
    assert await restored(recovering) == ["s3"]
    await recovering.exchange(listing("elsewhere", "s1", "s3"))  # moved before w1 restored it
    assert await assigned(recovering, "w1") == []
    await fall_silent(recovering, clock)
    assert await restored(recovering) == ["s3"]  # the other one is OFFLINE as well


async def test_a_session_of_several_workers_is_never_restored_while_one_is_online(recovering, clock):
    await recovering.exchange(listing("elsewhere", "s1"))
    await restored(recovering)
    await recovering.exchange(listing("w1", "s1"))  # it is w1's in the index now
    assert await restored(recovering) == []
    await recovering.exchange(listing("elsewhere"))
    await recovering.exchange(listing("w1", "s1"))
    assert await restored(recovering) == ["s1"]


async def test_two_workers_at_one_endpoint_have_one_successor_each(recovering, clock):
    for id_, session in (("a", "s1"), ("b", "s2")):
        await restored(recovering, id_)
        await recovering.exchange(listing(id_, session))
        clock.advance(1)
    await fall_silent(recovering, clock)
    assert [await restored(recovering, id_) for id_ in ("c", "d", "e")] == [["s2"], ["s1"], []]


async def test_two_new_ids_in_one_transaction_do_not_get_the_same_sessions(recovering, clock):
    await restored(recovering)
    await recovering.exchange(listing("w1", "s1"))
    await fall_silent(recovering, clock)
    release = await held(recovering)
    waiting = []
    for id_ in ("w2", "w3"):
        waiting.append(asyncio.ensure_future(recovering.exchange(register(id_, endpoint=PLACE))))
        await until(lambda: queued(recovering.app.store) >= len(waiting))
    await release()
    replies = [(await each).json["data"]["assignedSessionCount"] for each in waiting]
    assert replies == [1, 0]


async def test_a_refused_new_worker_gets_no_sessions(tmp_path, clock):
    config = write_config(tmp_path, RECOVERING + 'conflict = "reject"\n')
    async with running(config, clock=clock) as relay:
        await restored(relay)
        await relay.exchange(listing("w1", "s1"))
        await fall_silent(relay, clock)
        await relay.exchange(register("w2", endpoint=PLACE))
        await relay.exchange(beat("w1"))  # heard again, without its sessions
        await fall_silent(relay, clock)
        await relay.exchange(beat("w1", status="ONLINE"))
        assert (await relay.exchange(register("w3", endpoint=PLACE))).status == 409
        assert await assigned(relay, "w2") == ["s1"]


async def test_without_the_setting_no_worker_restores_sessions(relay, clock):
    await relay.exchange(register(endpoint=PLACE))
    await relay.exchange(listing("w1", "s1"))
    await fall_silent(relay, clock)
    for id_ in ("w1", "w2"):
        data = (await relay.exchange(register(id_, endpoint=PLACE))).json["data"]
        assert (data["recoveryRequired"], data["assignedSessionCount"]) == (False, 0)
    await relay.exchange(listing("w1"))
    assert await assigned(relay, "w1") == []


async def test_samples_change_no_existing_worker(relay, clock):
    """The documented samples would: their ids, session and endpoint are workers' defaults."""
    body = {"workerId": "worker-001", "endpoint": "http://localhost:8001"}
    await relay.exchange(request("POST", "/api/v1/workers/register", json.dumps(body).encode(), **TOKEN))
    await relay.exchange(beat("worker-001", sessions=[{"sessionId": "user123-session1", "status": "X"}]))
    before = await worker(relay, "worker-001")
    clock.advance(60)
    for sample in relay.app.config.sources["whatsapp"].settings.samples():
        raw = request(sample.method, sample.path, sample.body or None, **TOKEN)
        assert (await relay.exchange(raw)).status == 200
    heard = before["heard_minutes"][1:] + "0"  # a minute has passed
    assert await worker(relay, "worker-001") == {**before, "heard_minutes": heard}
    clock.advance(29)  # later than its former id's deadline, had a sample taken over its endpoint
    assert await relay.app.store.workers.sweep() == ()
    assert [w.id for w in relay.app.store.workers.all() if w.unregistered_at is None] == ["worker-001"]


async def test_the_cursor_of_the_list_continues_by_source_and_id(relay):
    ids = ["a", "b/c", "d e", "z", "ü"]
    for id_ in reversed(ids):
        await relay.exchange(beat(id_))
    found, cursor = [], ""
    while cursor is not None:
        page = (await ask(relay, "GET", f"?limit=2&cursor={quote(cursor, safe='')}"))[1]
        found += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert found == ids


@pytest.mark.parametrize("limit", ["0", "-1", "x", "", "1_0"])
@on_shared_loop
async def test_an_invalid_limit_is_refused(shared, limit):
    assert (await ask(shared, "GET", f"?limit={limit}"))[0] == 400


async def held(relay):
    """Hold the writer, as a slow disk does; return the function that releases it."""
    began, go = asyncio.Event(), asyncio.Event()

    async def hold(_connection):
        began.set()
        await go.wait()

    asking = asyncio.ensure_future(call_writer(relay.app.store, hold))
    await began.wait()

    async def release():
        go.set()
        await asking

    return release


async def test_heartbeats_that_wait_behind_a_sweep_on_a_slow_disk_count(relay, clock):
    await relay.exchange(beat(status="ONLINE"))
    release = await held(relay)
    clock.advance(89)
    sweep = asyncio.ensure_future(relay.app.store.workers.sweep())
    await until(lambda: queued(relay.app.store))
    waiting = asyncio.ensure_future(relay.exchange(beat(version="2")))  # not quiet: it needs the disk
    await until(lambda: queued(relay.app.store) >= 2)
    clock.advance(60)
    await release()
    assert await sweep == ()
    assert (await waiting).status == 200
    assert await types(relay) == ["registered"]


async def test_a_heartbeat_during_the_write_of_its_worker_is_not_lost(relay, clock):
    await relay.exchange(beat(sessions=[{"sessionId": "s1", "status": "A"}]))
    release = await held(relay)
    clock.advance(60)
    event = json.dumps({"sessionId": "s1", "status": "B", "workerId": "w1"}).encode()
    changes = [
        request("POST", "/api/v1/webhooks/session-status", body=event, **TOKEN),
        beat(sessions=[{"sessionId": "s1", "status": "A"}]),
    ]
    waiting = []
    for raw in changes:
        waiting.append(asyncio.ensure_future(relay.exchange(raw)))
        await until(lambda: queued(relay.app.store) >= len(waiting))
    await release()
    await asyncio.gather(*waiting)
    shown = await worker(relay)
    assert shown["sessions"][0]["status"] == "A"
    clock.advance(89)
    assert await relay.app.store.workers.sweep() == ()


async def test_two_reports_on_a_slow_disk_keep_their_order(relay):
    await relay.exchange(beat(status="ONLINE"))
    release = await held(relay)
    waiting = []
    for status in ("OFFLINE", "ONLINE"):
        waiting.append(asyncio.ensure_future(relay.exchange(beat(status=status))))
        await until(lambda: queued(relay.app.store) >= len(waiting))
    await release()
    await asyncio.gather(*waiting)
    assert await types(relay) == ["registered", "offline", "online"]


async def test_a_heartbeat_that_cannot_be_stored_keeps_its_worker_online(relay, clock):
    await relay.exchange(beat())
    clock.advance(80)
    fail_writes(relay.app.store, "the disk is full")
    assert (await relay.exchange(beat(version="2"))).status == 503
    fail_writes(relay.app.store, None)
    clock.advance(80)
    assert await relay.app.store.workers.sweep() == ()
    assert (await worker(relay))["version"] == ""


async def test_many_workers_that_go_silent_raise_one_event_each(relay, clock):
    for number in range(300):
        await relay.app.store.events.append(
            Acceptance(source="whatsapp", change=Heartbeat(worker_id=f"w{number}"))
        )
    clock.advance(91)
    assert len(await relay.app.store.workers.sweep()) == 300
    assert await relay.app.store.workers.sweep() == ()
    events = await relay.rows()
    offline = [row["subject"] for row in events if row["type"] == "whatsapp.worker.offline"]
    assert sorted(offline) == sorted(f"w{number}" for number in range(300))


async def test_metrics_count_workers_and_changes_by_status(relay, clock):
    def counted():
        statuses = ("ONLINE", "OFFLINE", "MAINTENANCE")
        of = [relay.counted("relay_workers", source="whatsapp", status=status) for status in statuses]
        to = [
            relay.counted("relay_worker_transitions_total", source="whatsapp", to=status)
            for status in statuses
        ]
        return of, to

    assert counted() == ([0, 0, 0], [0, 0, 0])
    for id_ in ("w1", "w2", "w3"):
        await relay.exchange(beat(id_))
    assert counted() == ([3, 0, 0], [3, 0, 0])
    await ask(relay, "POST", "/whatsapp/w1/maintenance", {"on": True})
    clock.advance(91)
    await relay.exchange(beat("w2"))
    await relay.app.store.workers.sweep()
    assert counted() == ([1, 1, 1], [3, 1, 1])
    await relay.exchange(request("DELETE", "/api/v1/workers/w3", **TOKEN))
    await ask(relay, "DELETE", "/whatsapp/w2")
    assert counted() == ([0, 0, 1], [3, 1, 1])


async def test_the_counts_of_workers_are_right_after_a_start(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with running(config) as relay:
        await relay.exchange(beat())
    async with running(config) as relay:
        assert relay.counted("relay_workers", source="whatsapp", status="ONLINE") == 1
        assert relay.counted("relay_worker_transitions_total", source="whatsapp", to="ONLINE") == 0


@pytest.mark.parametrize(("environment", "is_logged"), [("TEST", True), ("PRODUCTION", False), (None, False)])
async def test_an_unusual_environment_is_stored_and_logged(relay, caplog, environment, is_logged):
    body = {"workerId": "w1", "endpoint": "http://w1", "environment": environment}
    raw = request("POST", "/api/v1/workers/register", body=json.dumps(body).encode(), **TOKEN)
    assert (await relay.exchange(raw)).status == 200
    assert (await worker(relay))["environment"] == (environment or "")
    line = (
        "whatsapp: worker 'w1' registered with the environment 'TEST';"
        " the usual values are DEVELOPMENT, STAGING, TESTING, PRODUCTION"
    )
    assert [message for message in caplog.messages if "environment" in message] == [line] * is_logged


async def test_only_ended_commands_are_pruned(relay, clock):
    await relay.exchange(beat())
    await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "sent"}})
    await relay.exchange(beat())
    await ask(relay, "POST", "/whatsapp/w1/commands", {"command": {"type": "queued"}, "ttl": "30d"})
    clock.advance(8 * 86_400)
    await relay.app._forget_workers()
    assert [c["command"]["type"] for c in (await worker(relay))["commands"]] == ["queued"]
