"""Two nodes on one PostgreSQL database, in short; `python -m tests.torture.cluster` does it for longer."""

from postgres import database_of, drop_databases, needs_postgres

from torture.cluster import CONCURRENCY, torture


@needs_postgres
async def test_a_killed_and_a_stopped_node_lose_nothing_and_their_lanes_resume(tmp_path):
    toll = await torture(database_of(tmp_path), tmp_path, ("kill", "stop"), seed=1)
    assert toll.faults(2 * CONCURRENCY) == []
    assert len(toll.acknowledged) > 100
    drop_databases()
