"""The admin API of any node of a cluster shows the whole cluster."""

import asyncio
import json
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import msgspec
import pytest
from commands import Commands
from daemons import Recorder, adorn, destination, running, write_config
from postgres import database_of, drop_databases, maybe_pooled, needs_postgres
from support import until
from test_ui_access import Browser, new_code
from wire import exchange, following, request

from relay.api import history, replays, sources, status, tail, top
from relay.api.events import REPLIES
from relay.base.clock import SECOND
from relay.errors import RelayError
from relay.jobs.history import Past
from relay.store.postgres import leases
from relay.store.postgres import nodes as postgres_nodes

pytestmark = needs_postgres


@pytest.fixture
async def receiver():
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
async def nodes(tmp_path, receiver, monkeypatch):
    """Two nodes that know each other: one with the lane d1 and the jobs, two with d2."""

    def due_to(name, peers):
        ordered = sorted(peers, key=lambda peer: peer.name)
        return ordered[-1 if name == "lane:d2" else 0]

    monkeypatch.setattr(leases, "due_to", due_to)
    monkeypatch.setattr(postgres_nodes, "SETTLE_IN", 0.0)
    url = maybe_pooled(database_of(tmp_path))
    paths = [config(tmp_path / name, url, name, receiver.url) for name in ("one", "two")]
    async with running(paths[0]) as first, running(paths[1]) as second:
        both = (first, second)
        await until(lambda: all(relay.app.store.nodes.figures()["nodes"] == 2 for relay in both))
        await until(lambda: second.app.dispatcher.lanes["d2"].is_owned)
        await until(lambda: all(relay.app.ingest.admission.nodes == 2 for relay in both))
        yield both
    drop_databases()


def config(folder, url, name, receiver):
    folder.mkdir()
    cluster = f'[cluster]\nlease = "3s"\nnode = "{name}"\n'
    source = '[sources.adorn]\nplugin = "adorn"\nrate_limit = "10/h"\n'
    source += '[sources.moddy]\nplugin = "moddy"\ntokens = ["used", "unused"]\n'
    lanes = [destination(f"d{number}", receiver, 'timeout = "60s"') for number in (1, 2)]
    return write_config(folder, source, cluster, *lanes, url=url)


@contextmanager
def silent(relay):
    """Let a node answer no requests of others for a while."""

    async def answer(_names, _other):
        pass

    with patch.object(relay.app.store.nodes._requests, "answer", answer):
        yield


async def lines_of(relay, method, path):
    """Return the lines of JSON of a long answer."""
    answer = await exchange(relay.addresses.socket, request(method, path))
    return answer.status, [json.loads(line) for line in answer.body.splitlines()]


async def test_any_node_shows_the_replies_of_all(nodes, monkeypatch):
    first, second = nodes
    body = json.dumps({"event_type": "sale", "session_id": "s-1"}).encode()
    raw = request("POST", "/v1/events", body, **{"idempotency-key": "once"})
    event = (await first.exchange(raw)).json["event_id"]
    assert (await second.exchange(raw)).json["event_id"] == event
    for relay in nodes:
        shown = await relay.operator("GET", f"/api/events/{event}")
        assert [each["status"] for each in shown["replies"]] == [200, 200]
        assert shown["replies"][0]["received_at"] == shown["received_at"]
    with silent(first):
        shown = await second.operator("GET", f"/api/events/{event}")
        assert [each["received_at"] > shown["received_at"] for each in shown["replies"]] == [True]

    async def of_another_version(_to, _event):
        return [{"code": 200}]

    monkeypatch.setitem(first.app.store.nodes._requests.handlers, REPLIES, of_another_version)
    assert len((await second.operator("GET", f"/api/events/{event}"))["replies"]) == 1


async def test_a_login_at_one_node_is_valid_at_all(nodes):
    first, second = nodes
    code = (await new_code(first))["code"]
    host = "localhost:8081"  # a balancer's
    browser, thief = Browser(second, host), Browser(first, host)
    assert (await browser.log_in(code=code)).status == 200
    assert (await thief.log_in(code=code)).status == 403
    for end in (200, 401):
        for relay in nodes:
            browser.target = relay.addresses.admin
            assert (await browser.send("GET", "/ui/")).status == end
        assert (await browser.send("DELETE", "/ui/login")).status == 200


async def test_any_node_lists_and_runs_the_jobs_of_the_cluster(nodes, monkeypatch):
    leader, other = nodes
    jobs = leader.app.jobs
    before = {past.name: past.runs for past in jobs.all()}["forget"]
    status, [line] = await lines_of(other, "POST", "/api/jobs/forget/run")
    done = line["result"]
    assert (status, done["name"], done["node"], done["error"]) == (200, "forget", "one", None)
    assert done["runs"] == before + 1 == {past.name: past.runs for past in jobs.all()}["forget"]

    shown = {each["name"]: each for each in (await other.operator("GET", "/api/jobs"))["items"]}
    assert (shown["forget"]["node"], shown["forget"]["runs"]) == ("one", done["runs"])
    assert shown["flush"]["node"] is None
    mine = {each["name"]: each for each in (await leader.operator("GET", "/api/jobs"))["items"]}
    assert mine["forget"]["node"] is None

    async def fail():
        raise RelayError("for the test")

    monkeypatch.setitem(jobs._jobs, "forget", msgspec.structs.replace(jobs._jobs["forget"], work=fail))
    _, [line] = await lines_of(other, "POST", "/api/jobs/forget/run")
    assert line["result"]["error"] == "for the test"
    assert (await exchange(other.addresses.socket, request("POST", "/api/jobs/nothing/run"))).status == 404


async def test_any_node_adds_up_the_figures_of_all(nodes, receiver, monkeypatch):
    monkeypatch.setattr(top, "EVERY", 0.4)
    monkeypatch.setattr(top, "FOLLOWED", 1.0)
    first, second = nodes
    receiver.open.clear()
    async with following(first.addresses.socket, "/api/top") as reader:
        _, item = await reader.next()
        two = {"name": "two", "answers": True, "ready": True, "reasons": [], "unable": False}
        assert item["nodes"] == [two]
        for number, relay in enumerate((first, second, second)):
            assert (await relay.exchange(request("POST", "/v1/events", adorn(f"s{number}")))).status == 200
        wanted = [("d1", None, 3, 3), ("d2", None, 3, 3)]
        names = ("name", "held", "in_flight", "pending")
        async with asyncio.timeout(60):
            while [tuple(each[name] for name in names) for each in item["destinations"]] != wanted:
                _, item = await reader.next()
        for relay in nodes:  # a slot of ten seconds ends
            relay.app.history._ran_at -= 10 * SECOND
            await relay.app.history.run()
        found = await first.operator("GET", "/api/history?minutes=1&periods=1")
        assert found["sources"][0] == {"name": "adorn", "events": [3], "refused": [0]}
        assert [(each["name"], each["pending"]) for each in found["destinations"]] == [
            ("d1", [3]),
            ("d2", [3]),
        ]
        assert found["silent"] == []
        found = await first.operator("GET", "/api/history?minutes=1&periods=1&source=adorn")
        assert (found["sources"][0]["events"], found["destinations"]) == ([3], [])
        day = "/api/history?minutes=1440&periods=288&source=adorn&running=1"
        found = await first.operator("GET", day)
        assert (found["step_seconds"], found["sources"][0]["events"][-1], found["unable"]) == (300, 3, [])
        with monkeypatch.context() as patched:

            async def of_another_version(*_args, **_options):
                return Past(until=0, step=80.0, sources=(), destinations=())

            patched.setattr(second.app.history, "past", of_another_version)
            found = await first.operator("GET", day)
            assert (found["sources"][0]["events"][-1], found["unable"]) == (1, ["two"])

        monkeypatch.setattr(history, "PATIENCE", 0.2)
        monkeypatch.setattr(status, "PATIENCE", 0.2)
        with silent(second):
            found = await first.operator("GET", "/api/history?minutes=1&periods=1")
            assert (found["sources"][0]["events"], found["silent"]) == ([1], ["two"])
            async with asyncio.timeout(60):
                while item["nodes"][0]["answers"]:
                    _, item = await reader.next()
            assert [(each["held"], each["in_flight"]) for each in item["destinations"]] == [
                (None, 3),
                ("on another node", 0),
            ]
            problems = (await first.operator("GET", "/api/status"))["problems"]
            assert problems[0]["what"] == "node two does not answer, so its problems are unknown"
        with pytest.MonkeyPatch.context() as patch_second:
            await check_older_version(second, reader, patch_second)
        with pytest.MonkeyPatch.context() as patch_second:
            await check_another_version(first, second, patch_second)
    receiver.open.set()
    await until(second.app.api._top._ticking.done)  # nobody looks any more
    await check_problems(first, second)


async def check_older_version(second, reader, patches):
    """Check the figures while another node runs an older version, with fewer and with other fields."""

    async def of_older_version(_to, _argument):
        return {"events_per_second": 2.5, "former": 1, "destinations": [{"name": "d2", "held": "paused"}]}

    async def of_another_kind(_to, _argument):
        return [2.5]

    handlers = second.app.store.nodes._requests.handlers
    for older, rate, held in ((of_older_version, 2.5, "paused"), (of_another_kind, 0.0, "on another node")):
        patches.setitem(handlers, top.SHOW, older)
        _, item = await reader.next()
        async with asyncio.timeout(60):
            while (item["destinations"][1]["held"], item["nodes"][0]["answers"]) != (held, rate > 0):
                _, item = await reader.next()
        assert item["events_per_second"] == rate
    assert item["nodes"] == [{"name": "two", "answers": False, "ready": None, "reasons": [], "unable": True}]


async def check_another_version(first, second, patches):
    """Check what a node shows while another one runs a version that does not know its requests."""
    for show in (history.SHOW, status.SHOW, sources.SHOW_TOKENS):
        patches.delitem(second.app.store.nodes._requests.handlers, show)
    found = await first.operator("GET", "/api/history?minutes=1&periods=1")
    assert (found["silent"], found["unable"]) == ([], ["two"])
    problems = (await first.operator("GET", "/api/status"))["problems"]
    assert problems[0]["what"] == "node two runs another version, so its problems are unknown"
    assert (await first.operator("GET", "/api/sources/moddy"))["missing"] == ["two"]
    page = await exchange(first.addresses.socket, request("GET", "/ui/"))
    assert b"Another version runs on two: the figures do not include these nodes." in page.body


async def test_any_node_shows_the_use_of_tokens_at_all(nodes, monkeypatch):
    """Otherwise an operator could remove a token whose senders use another node."""
    first, second = nodes
    assert (await first.operator("GET", "/api/sources/moddy"))["tokens"][0]["uses"] == 0
    refused = request("POST", "/internal/event/notify", b"{}", authorization="Bearer used")
    for relay in (first, second, second):
        assert (await relay.exchange(refused)).status == 422
    for relay in nodes:
        shown = await relay.operator("GET", "/api/sources/moddy")
        assert [(each["name"], each["uses"]) for each in shown["tokens"]] == [
            ("tokens[0]", 3),
            ("tokens[1]", 0),
        ]
        assert shown["tokens"][0]["last_used"] is not None
        assert shown["missing"] == []
    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    with silent(second):
        shown = await first.operator("GET", "/api/sources/moddy")
        result = await Commands(first.addresses.socket)("sources", "show", "moddy")
        page = await exchange(first.addresses.socket, request("GET", "/ui/sources/moddy"))
    assert (shown["tokens"][0]["uses"], shown["missing"]) == (1, ["two"])
    assert "no answer from two: the counts do not include their uses" in result.err
    assert b"No answer from two: the counts do not include their uses." in page.body


async def check_problems(first, second):
    """Check that a node shows why another one does not deliver."""
    await first.operator("POST", "/api/destinations/d2/disable")
    there, here = [(await relay.operator("GET", "/api/status"))["problems"] for relay in (second, first)]
    [problem] = [each for each in there if each["kind"] == "destination"]
    assert here == [{**each, "node": "two"} if each == problem else each for each in there]
    for path in ("/api/destinations", "/api/destinations/d2"):
        shown, owned = [await relay.operator("GET", path) for relay in (first, second)]
        shown, owned = (each["items"][1] if "items" in each else each for each in (shown, owned))
        assert shown["held"] == owned["held"] == "disabled: operator"
        assert (shown["disabled_at"], shown["node"]) == (owned["disabled_at"], "two")
    page = await exchange(first.addresses.socket, request("GET", "/ui/"))
    assert b"d2 is disabled (by an operator)" in page.body
    assert b"(node two)" in page.body
    await first.operator("POST", "/api/destinations/d2/enable")


async def send(relay, session):
    answer = await relay.exchange(request("POST", "/v1/events", adorn(session)))
    assert answer.status == 200
    return answer.json["event_id"]


async def check_tail_of_another_version(second, reader):
    """Check that a client gets the name of a node whose version has other streams, and no error."""

    async def of_another_kind(_to, _argument):
        return {"1": ["an item"]}

    async def missing(**wanted):
        async with asyncio.timeout(60):
            while await reader.next() != ("silent", wanted):
                pass

    handlers = second.app.store.nodes._requests.handlers
    for change in ("delitem", "setitem"):
        with pytest.MonkeyPatch.context() as patches:
            more = [of_another_kind] if change == "setitem" else []
            getattr(patches, change)(handlers, tail.COLLECT, *more)
            await missing(nodes=[], unable=["two"])
        await missing(nodes=[], unable=[])


async def test_any_node_follows_the_events_and_attempts_of_all(nodes, monkeypatch):
    monkeypatch.setattr(tail, "COLLECT_EVERY", 0.05)
    first, second = nodes
    before = [await send(relay, f"before {number}") for number, relay in enumerate((first, second))]
    path = "/api/tail?since=1h&payload=1"
    async with (
        following(first.addresses.socket, path) as reader,
        following(first.addresses.socket, "/api/tail?destination=d2") as attempts,
        following(first.addresses.socket, "/api/tail?since=1h&count=1") as numbers,
    ):
        after = [await send(relay, f"after {number}") for number, relay in enumerate((first, second, second))]
        events, tried = [], []
        while len(events) < 5 or len(tried) < 10:
            name, item = await reader.next()
            if name == "event":
                assert json.loads(item["payload"])["session_id"] == item["subject"]
                events.append(item["id"])
            else:
                assert (name, item["result"]) == ("attempt", "ok")
                tried.append((item["delivery_id"], item["destination"]))
        assert sorted(events) == sorted(before + after)
        assert len(set(tried)) == 10
        stored, new = Counter(), Counter()
        while stored + new != Counter(events=5, attempts=10):
            name, item = await numbers.next()
            if name == "count":
                new.update(item)
            else:
                stored[f"{name}s"] += 1
            assert stored + new <= Counter(events=5, attempts=10)
        assert {name for _, name in tried} == {"d1", "d2"}
        found = [await attempts.next() for _ in after]
        assert {(name, item["destination"], item["event_id"]) for name, item in found} == {
            ("attempt", "d2", id_) for id_ in after
        }

        monkeypatch.setattr(tail, "PATIENCE", 0.2)
        with silent(second):
            assert await attempts.next() == ("silent", {"nodes": ["two"], "unable": []})
            assert await reader.next() == ("silent", {"nodes": ["two"], "unable": []})
            late = await send(first, "late")
            finished = {"destination": "d2", "outcome": "delivered"}
            await until(lambda: second.counted("relay_deliveries_finished_total", **finished) == 6)
        assert await attempts.next() == ("silent", {"nodes": [], "unable": []})
        assert (await attempts.next())[1]["event_id"] == late  # it was kept
        while stored + new != Counter(events=6, attempts=12):
            name, item = await numbers.next()
            assert name in {"count", "silent"}
            new.update(item if name == "count" else {})
        assert new["events"]  # at least the late one: the store had been read before
        await check_tail_of_another_version(second, attempts)
    api = second.app.api._tail
    assert api._remote
    monkeypatch.setattr(tail, "FOLLOWED", 0.01)
    await api._collect_here("", {"node": first.app.store.nodes.incarnation, "queries": {}})
    await until(lambda: not api._remote)
    assert api._listen not in second.app.listeners


async def test_any_node_shows_and_cancels_a_replay(nodes, monkeypatch):
    first, second = nodes
    for number in range(3):
        await send(first, f"s{number}")
    body = b'{"filter": {"source": "adorn"}, "rate": "1/m"}'
    answer = await exchange(second.addresses.socket, request("POST", "/api/replays", body))
    assert answer.status == 201, answer
    id_ = answer.json["id"]
    [shown] = (await first.operator("GET", "/api/replays"))["items"]
    assert (shown["id"], shown["state"], shown["node"], shown["count"]) == (id_, "running", "two", 3)
    assert (await first.operator("GET", f"/api/replays/{id_}"))["node"] == "two"
    assert (await second.operator("GET", f"/api/replays/{id_}"))["node"] is None
    answer = await exchange(first.addresses.socket, request("POST", "/api/replays", body))
    same = id_[:8]  # the digits of some years
    assert answer.json["id"].startswith(same)
    answer = await exchange(first.addresses.socket, request("DELETE", f"/api/replays/{same}"))
    assert answer.json["error"]["message"].startswith(f'ambiguous replay id "{same}"; matches: ')
    assert (await first.operator("GET", f"/api/replays/{id_[:-2]}"))["id"] == id_
    assert (await first.operator("DELETE", f"/api/replays/{id_}"))["state"] == "cancelled"
    assert (await second.operator("GET", f"/api/replays/{id_}"))["state"] == "cancelled"
    unknown = request("GET", "/api/replays/rpl_1")
    assert (await exchange(first.addresses.socket, unknown)).status == 404
    monkeypatch.setattr(replays, "PATIENCE", 0.2)
    with silent(second):
        answer = await exchange(first.addresses.socket, unknown)
    assert (answer.status, answer.json["error"]["message"]) == (
        503,
        "cannot show the replay rpl_1: it is not on this node, and two did not answer",
    )


async def test_the_nodes_share_the_rate_limits_and_pauses_of_sources(nodes):
    statuses = [
        (await relay.exchange(request("POST", "/v1/events", adorn(f"{number}")))).status
        for relay in nodes
        for number in range(6)
    ]
    assert statuses == [200] * 5 + [429] + [200] * 5 + [429]
    first, second = nodes
    for verb, here, there in (("pause", first, second), ("resume", second, first), ("pause", first, second)):
        await here.operator("POST", f"/api/sources/adorn/{verb}")
        mount, paused = there.app.ingest.mounts["adorn"], verb == "pause"
        await until(lambda mount=mount, paused=paused: mount.paused == paused)
    answer = await second.exchange(request("POST", "/v1/events", adorn()))
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
