"""Rows of workers in SQLite: read at the start, written by each transaction that changes them."""

import aiosqlite

from relay.store.roster import Roster
from relay.store.rows import (
    COMMAND_COLUMNS,
    MEASUREMENT_COLUMNS,
    WORKER_COLUMNS,
    command_of,
    command_row,
    measurement_row,
    worker_of,
    worker_row,
)
from relay.store.sqlite.transaction import Transaction
from relay.store.worker_changes import StoredWorkerChanges


async def load_roster(connection: aiosqlite.Connection) -> Roster:
    """Read all workers, and the commands that wait for them."""
    # The worker with the latest heartbeat is last: it gets the sessions that several rows contain.
    workers = await connection.execute_fetchall("SELECT record FROM workers ORDER BY last_heartbeat")
    commands = await connection.execute_fetchall(
        f"SELECT {COMMAND_COLUMNS} FROM worker_commands WHERE state = 'queued'"  # noqa: S608 - constants
    )
    return Roster([worker_of(record) for (record,) in workers], [command_of(tuple(row)) for row in commands])


def write_workers(changes: StoredWorkerChanges, transaction: Transaction, wall: int) -> None:
    """Write all changes to workers inside the transaction; `wall` is its time."""
    workers = {**changes.seen, **changes.workers}
    if rows := [worker_row(w) for key, w in workers.items() if key not in changes.forgotten]:
        transaction.insert("workers", WORKER_COLUMNS, rows, verb="REPLACE")
    if changes.measured:
        rows = [measurement_row(worker, wall) for worker in changes.measured.values()]
        transaction.insert("worker_metrics", MEASUREMENT_COLUMNS, rows, verb="REPLACE")
    if changes.commands:
        rows = [command_row(command) for command in changes.commands.values()]
        transaction.insert("worker_commands", COMMAND_COLUMNS, rows, verb="REPLACE")
    for key in changes.forgotten:
        transaction.run("DELETE FROM workers WHERE source = ? AND id = ?", key)
