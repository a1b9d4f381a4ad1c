"""Three nodes on one PostgreSQL database, in short; `python -m tests.torture.cluster` does it for longer."""

from postgres import needs_postgres

from torture.cluster import mixed, server_in, torture


@needs_postgres
async def test_nodes_that_fail_lose_nothing_and_their_lanes_resume(monkeypatch):
    monkeypatch.setattr("torture.nodes.PAUSE", 0.1)  # less load
    with server_in("torture") as (server, folder):
        toll = await torture(server, folder, ("storm", "cut", "divide", "restart-server", "upgrade"))
    assert toll.faults() == []
    assert toll.acknowledged > 100
    assert toll.raced > 3


@needs_postgres
async def test_faults_that_overlap_lose_nothing_in_lanes_of_any_kind(monkeypatch):
    monkeypatch.setattr("torture.nodes.PAUSE", 0.1)  # less load
    told = []
    with server_in("mixed") as (server, folder):
        toll = await mixed(server, folder, 6.0, seed=40, tell=told.append)
    assert toll.faults() == []
    assert "restart-server and freeze n1" in " ".join(told)
    assert toll.acknowledged > 100
    assert toll.dropped.keys() == {"dead (backlog_full)", "expired (superseded)"}
