"""The rows of the worker registry: read all of them, and write those of a batch."""

from collections.abc import Sequence
from typing import Any

from relay.store.postgres.connection import Connection
from relay.store.postgres.rows import text
from relay.store.postgres.transaction import Part
from relay.store.roster import Roster
from relay.store.rows import COMMAND_COLUMNS, command_of, worker_of
from relay.store.worker_changes import MEASURE_EVERY

LOAD_SQL = "SELECT record FROM workers ORDER BY last_heartbeat"
QUEUED_SQL = f"SELECT {COMMAND_COLUMNS} FROM worker_commands WHERE state = 'queued'"  # noqa: S608 - constants

WORKERS = Part("""
    new_workers AS (
        INSERT INTO workers AS w (source, id, status, last_heartbeat, deadline, record)
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bytea[])
        ON CONFLICT (source, id)
        DO UPDATE SET version = w.version + 1, status = excluded.status,
                      last_heartbeat = excluded.last_heartbeat, deadline = excluded.deadline,
                      record = excluded.record)
""")

FORGOTTEN = Part("""
    forgotten AS (
        DELETE FROM workers AS w USING unnest($1::text[], $2::text[]) AS f (source, id)
         WHERE w.source = f.source AND w.id = f.id)
""")

# With several nodes, another one may have measured the worker a moment ago.
METRICS = Part(f"""
    new_metrics AS (
        INSERT INTO worker_metrics (source, worker_id, at, status, cpu, memory, uptime, message_count,
                                    sessions)
        SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::float8[], $6::float8[],
                             $7::float8[], $8::bigint[], $9::bytea[])
                      AS f (source, worker_id, at, status, cpu, memory, uptime, message_count, sessions)
         WHERE NOT EXISTS (
               SELECT 1 FROM worker_metrics AS m
                WHERE m.source = f.source AND m.worker_id = f.worker_id
                  AND m.at > f.at - {MEASURE_EVERY * 9 // 10} AND m.at < f.at)
        ON CONFLICT (source, worker_id, at)
        DO UPDATE SET status = excluded.status, cpu = excluded.cpu, memory = excluded.memory,
                      uptime = excluded.uptime, message_count = excluded.message_count,
                      sessions = excluded.sessions)
""")  # noqa: S608 - only constants

COMMANDS = Part("""
    new_commands AS (
        INSERT INTO worker_commands AS c (public_id, source, worker_id, state, created_at, expires_at,
                                          sent_at, body)
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                             $7::bigint[], $8::bytea[])
        ON CONFLICT (public_id)
        DO UPDATE SET state = excluded.state, sent_at = excluded.sent_at, expires_at = excluded.expires_at
         WHERE c.state = 'queued' OR excluded.state = 'queued')
""")


async def load_roster(connection: Connection) -> Roster:
    """Read all workers, and their queued commands."""
    # The worker with the latest heartbeat is last: it gets the sessions that several rows contain.
    workers = await connection.fetch(LOAD_SQL)
    commands = await connection.fetch(QUEUED_SQL)
    return Roster([worker_of(record) for (record,) in workers], [command_of(tuple(row)) for row in commands])


def columns_of(rows: Sequence[tuple[Any, ...]], texts: int) -> list[list[Any]]:
    """Return the columns of rows, the first of which are texts that a sender chooses."""
    columns = list(map(list, zip(*rows, strict=True)))
    return [list(map(text, column)) for column in columns[:texts]] + columns[texts:]
