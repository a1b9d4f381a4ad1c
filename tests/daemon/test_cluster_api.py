"""The admin API of any node of a cluster shows the whole cluster."""

import json

import msgspec
import pytest
from daemons import Recorder, destination, running, write_config
from postgres import database_of, drop_databases, needs_postgres
from stores import KINDS
from support import until
from wire import exchange, request

from relay.errors import RelayError

pytestmark = needs_postgres


@pytest.fixture
async def receiver():
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
async def nodes(tmp_path, receiver):
    """Two nodes that know each other, each with a lane."""
    url = database_of(tmp_path)
    paths = [config(tmp_path / name, url, name, receiver.url) for name in ("one", "two")]
    async with running(paths[0]) as first, running(paths[1]) as second:
        both = (first, second)
        await until(lambda: all(relay.app.store.nodes.figures()["nodes"] == 2 for relay in both))
        yield both
    drop_databases()


def config(folder, url, name, receiver):
    folder.mkdir()
    cluster = f'[cluster]\nenabled = true\nlease = "3s"\nnode = "{name}"\n'
    source = '[sources.adorn]\nplugin = "adorn"\n'
    lanes = [destination(f"d{number}", receiver, 'timeout = "1s"') for number in range(6)]
    path = write_config(folder, source, cluster, *lanes)
    text = path.read_text()
    old = next((line for line in text.splitlines() if line.startswith('url = "postgres')), None)
    new = f'url = "{url}"'
    assert (old is not None) == (KINDS[0] == "postgres")
    path.write_text(text.replace(old, new) if old else text.replace("[storage]", f"[storage]\n{new}", 1))
    return path


def leads(relay, job):
    return relay.app.store.nodes.lead(job)


def split(nodes, job):
    """Return the node that leads a job, and the other one."""
    first, second = nodes
    return (first, second) if leads(first, job) else (second, first)


async def lines_of(relay, method, path):
    """Return the lines of JSON of a long answer."""
    answer = await exchange(relay.addresses.socket, request(method, path))
    return answer.status, [json.loads(line) for line in answer.body.splitlines()]


async def test_any_node_lists_and_runs_the_jobs_of_the_cluster(nodes, monkeypatch):
    leader, other = split(nodes, "forget")
    name = "one" if leader is nodes[0] else "two"
    jobs = leader.app.jobs
    before = {past.name: past.runs for past in jobs.all()}["forget"]
    status, [line] = await lines_of(other, "POST", "/api/jobs/forget/run")
    done = line["result"]
    assert (status, done["name"], done["node"], done["error"]) == (200, "forget", name, None)
    assert done["runs"] == before + 1 == {past.name: past.runs for past in jobs.all()}["forget"]

    shown = {each["name"]: each for each in (await other.operator("GET", "/api/jobs"))["items"]}
    assert (shown["forget"]["node"], shown["forget"]["runs"]) == (name, done["runs"])
    assert shown["flush"]["node"] is None
    mine = {each["name"]: each for each in (await leader.operator("GET", "/api/jobs"))["items"]}
    assert mine["forget"]["node"] is None

    async def fail():
        raise RelayError("for the test")

    monkeypatch.setitem(jobs._jobs, "forget", msgspec.structs.replace(jobs._jobs["forget"], work=fail))
    _, [line] = await lines_of(other, "POST", "/api/jobs/forget/run")
    assert line["result"]["error"] == "for the test"
    assert (await exchange(other.addresses.socket, request("POST", "/api/jobs/nothing/run"))).status == 404
