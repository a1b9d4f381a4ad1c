"""Reads the worker registry from PostgreSQL at the start."""

from relay.store.postgres.connection import Connection
from relay.store.roster import Roster
from relay.store.rows import COMMAND_COLUMNS, command_of, worker_of


async def load_roster(connection: Connection) -> Roster:
    """Read all workers, and the commands that wait for them."""
    # The worker with the latest heartbeat is last: it gets the sessions that several rows contain.
    workers = await connection.fetch("SELECT record FROM workers ORDER BY last_heartbeat")
    commands = await connection.fetch(
        f"SELECT {COMMAND_COLUMNS} FROM worker_commands WHERE state = 'queued'"  # noqa: S608 - constants
    )
    return Roster([worker_of(record) for (record,) in workers], [command_of(tuple(row)) for row in commands])
