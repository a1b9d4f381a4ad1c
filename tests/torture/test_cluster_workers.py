"""Workers of a cluster of two nodes; `python -m tests.torture.cluster_workers` does it for longer."""

from postgres import database_of, drop_databases, needs_postgres

from torture.cluster_workers import torture


@needs_postgres
async def test_each_change_of_a_worker_is_one_event_while_nodes_and_the_database_are_away(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("torture.cluster_workers.WORKERS", 100)
    fleet = await torture(database_of(tmp_path), tmp_path, ("report", "kill", "away"), seed=1)
    assert fleet.faults == []
    assert fleet.answers > 1000
    drop_databases()
