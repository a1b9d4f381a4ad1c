"""Requests to the owner of a lane over PostgreSQL: done once, by the owner, and answered."""

import asyncio
from unittest.mock import patch

import pytest
from postgres import database_of, drop_databases, needs_postgres

from relay.errors import RelayError, StorageUnavailableError
from relay.store.postgres import requests
from relay.store.postgres.requests import Requests

asyncpg = pytest.importorskip("asyncpg")

TABLE = """
    CREATE TABLE IF NOT EXISTS requests (
        id uuid PRIMARY KEY, destination text COLLATE "C" NOT NULL, verb text NOT NULL,
        argument bytea NOT NULL, asked timestamptz NOT NULL DEFAULT clock_timestamp(), taken timestamptz,
        answered timestamptz, answer bytea, error text)
"""


class Node:
    """A node that looks for requests whenever another one announces some."""

    def __init__(self, pool, others):
        self.done = []
        self.lanes = set()
        self.requests = Requests(pool.fetch, lambda: [each.wake() for each in others if each is not self])
        self.requests.handlers["pause"] = self.pause
        self.tasks = []

    def wake(self):
        self.tasks.append(asyncio.create_task(self.requests.answer(self.lanes)))

    async def pause(self, destination, argument):
        self.done.append((destination, argument))
        if argument == "refuse":
            raise RelayError("paused in the configuration", hint="reload")
        if argument == "fail":
            raise KeyError("nothing")
        return {"held": "paused"}


@pytest.fixture
async def pool(tmp_path):
    async with asyncpg.create_pool(database_of(tmp_path), min_size=1, max_size=4) as pool:
        await pool.execute(TABLE)
        yield pool
    drop_databases()


@pytest.fixture
async def nodes(pool):
    nodes = []
    nodes += [Node(pool, nodes) for _ in range(3)]
    nodes[1].lanes = {"crm"}
    yield nodes
    for node in nodes:
        await asyncio.gather(*node.tasks)
        await node.requests.stop()


@needs_postgres
async def test_only_the_owner_executes_a_request_and_its_answer_is_returned(pool, nodes):
    assert await nodes[0].requests.ask("crm", "pause", {"until": None}) == {"held": "paused"}
    assert [node.done for node in nodes] == [[], [("crm", {"until": None})], []]
    assert await pool.fetch("SELECT * FROM requests") == []


@needs_postgres
@pytest.mark.parametrize(
    ("argument", "result"),
    [("refuse", "paused in the configuration"), ("fail", "KeyError: 'nothing'")],
)
async def test_a_refusal_comes_back_as_an_error(nodes, argument, result):
    with pytest.raises(RelayError, match=result):
        await nodes[0].requests.ask("crm", "pause", argument)


@needs_postgres
async def test_two_owners_execute_a_request_once(nodes):
    nodes[2].lanes = {"crm"}  # a zombie
    for _ in range(10):
        await nodes[0].requests.ask("crm", "pause", "now")
    assert len(nodes[1].done) + len(nodes[2].done) == 10


@needs_postgres
async def test_without_an_owner_the_request_is_withdrawn(pool, nodes):
    with (
        patch.object(requests, "PATIENCE", 0.2),
        pytest.raises(StorageUnavailableError, match='"pause" was not executed'),
    ):
        await nodes[0].requests.ask("erp", "pause", None)
    assert await pool.fetch("SELECT * FROM requests") == []


@needs_postgres
async def test_an_owner_that_stops_meanwhile_leaves_the_result_unknown(nodes):
    async def hang(_destination, _argument):
        await gate.wait()

    gate = asyncio.Event()
    nodes[1].requests.handlers["pause"] = hang
    with (
        patch.object(requests, "PATIENCE", 0.3),
        pytest.raises(StorageUnavailableError, match='"pause" may still be executed'),
    ):
        await nodes[0].requests.ask("crm", "pause", None)
    gate.set()


@needs_postgres
async def test_requests_of_nodes_that_are_gone_are_deleted(pool, nodes):
    await pool.execute(
        "INSERT INTO requests (id, destination, verb, argument)"
        " VALUES (gen_random_uuid(), 'erp', 'pause', 'null')"
    )
    await nodes[1].requests.clean()
    assert len(await pool.fetch("SELECT * FROM requests")) == 1
    await pool.execute("UPDATE requests SET asked = asked - interval '2 minutes'")
    await nodes[1].requests.clean()
    assert await pool.fetch("SELECT * FROM requests") == []
