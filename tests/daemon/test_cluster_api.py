"""The admin API of any node of a cluster shows the whole cluster."""

import asyncio
import json

import msgspec
import pytest
from daemons import Recorder, adorn, destination, running, write_config
from postgres import database_of, drop_databases, needs_postgres
from stores import KINDS
from support import until
from wire import exchange, following, request

from relay.api import history
from relay.base.clock import SECOND
from relay.errors import RelayError
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

    monkeypatch.setattr(postgres_nodes, "due_to", due_to)
    monkeypatch.setattr(postgres_nodes, "SETTLE_IN", 0.0)
    url = database_of(tmp_path)
    paths = [config(tmp_path / name, url, name, receiver.url) for name in ("one", "two")]
    async with running(paths[0]) as first, running(paths[1]) as second:
        both = (first, second)
        await until(lambda: all(relay.app.store.nodes.figures()["nodes"] == 2 for relay in both))
        await until(lambda: second.app.dispatcher.lanes["d2"].is_owned)
        yield both
    drop_databases()


def config(folder, url, name, receiver):
    folder.mkdir()
    cluster = f'[cluster]\nenabled = true\nlease = "3s"\nnode = "{name}"\n'
    source = '[sources.adorn]\nplugin = "adorn"\n'
    lanes = [destination(f"d{number}", receiver, 'timeout = "1s"') for number in (1, 2)]
    path = write_config(folder, source, cluster, *lanes)
    text = path.read_text()
    old = next((line for line in text.splitlines() if line.startswith('url = "postgres')), None)
    new = f'url = "{url}"'
    assert (old is not None) == (KINDS[0] == "postgres")
    path.write_text(text.replace(old, new) if old else text.replace("[storage]", f"[storage]\n{new}", 1))
    return path


async def lines_of(relay, method, path):
    """Return the lines of JSON of a long answer."""
    answer = await exchange(relay.addresses.socket, request(method, path))
    return answer.status, [json.loads(line) for line in answer.body.splitlines()]


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
    first, second = nodes
    receiver.open.clear()
    async with following(first.addresses.socket, "/api/top") as reader:
        _, item = await reader.next()
        assert item["nodes"] == [{"name": "two", "answers": True, "ready": True, "reasons": []}]
        for number, relay in enumerate((first, second, second)):
            assert (await relay.exchange(request("POST", "/v1/events", adorn(f"s{number}")))).status == 200
        wanted = [("d1", None, 3, 3), ("d2", None, 3, 3)]
        names = ("name", "held", "in_flight", "pending")
        async with asyncio.timeout(30):
            while [tuple(each[name] for name in names) for each in item["destinations"]] != wanted:
                _, item = await reader.next()
        for relay in nodes:  # a slot of ten seconds ends
            relay.app.history._ran_at -= 10 * SECOND
            await relay.app.history.run()
        found = await first.operator("GET", "/api/history?minutes=1&periods=1")
        assert found["sources"] == [{"name": "adorn", "events": [3], "refused": [0]}]
        assert [(each["name"], each["pending"]) for each in found["destinations"]] == [
            ("d1", [3]),
            ("d2", [3]),
        ]
        assert found["silent"] == []

        second.app.store.nodes._attendant = None  # it answers no more
        monkeypatch.setattr(history, "PATIENCE", 0.2)
        found = await first.operator("GET", "/api/history?minutes=1&periods=1")
        assert (found["sources"][0]["events"], found["silent"]) == ([1], ["two"])
        async with asyncio.timeout(30):
            while item["nodes"][0]["answers"]:
                _, item = await reader.next()
        assert [(each["held"], each["in_flight"]) for each in item["destinations"]] == [
            (None, 3),
            ("on another node", 0),
        ]
    second.app.store.nodes._attendant = second.app.owner
    receiver.open.set()
    await until(second.app.api._top._ticking.done)  # nobody looks any more
