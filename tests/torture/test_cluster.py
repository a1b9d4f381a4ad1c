"""Three nodes on one PostgreSQL database, in short; `python -m tests.torture.cluster` does it for longer."""

from postgres import needs_postgres

from torture.cluster import server_in, torture


@needs_postgres
async def test_nodes_that_fail_lose_nothing_and_their_lanes_resume(monkeypatch):
    monkeypatch.setattr("torture.nodes.PAUSE", 0.1)  # less load
    with server_in("torture") as (server, folder):
        toll = await torture(server, folder, ("storm", "cut", "divide", "restart-server", "upgrade"))
    assert toll.faults() == []
    assert toll.acknowledged > 100
    assert toll.raced > 3
