"""Figures and cautions about a PostgreSQL server, read often: each statement takes a few milliseconds."""

from collections.abc import Iterator, Mapping

import asyncpg

from relay.base.clock import SECOND
from relay.base.units import render_duration, render_size
from relay.model import Caution, Observed
from relay.store.postgres.connection import Connection
from relay.store.postgres.doctor import CONNECTIONS, OLD_SNAPSHOT, SKEW, SNAPSHOT_SQL

LAGGING_BYTES = 64 * 2**20
"""WAL that a standby may lack before the relay warns about it."""

LAGGING_SECONDS = 30.0

SERVER_SQL = """
    SELECT current_setting('server_version') AS version,
           current_setting('fsync') = 'on' AND current_setting('full_page_writes') = 'on' AS survives,
           current_setting('synchronous_standby_names') AS synchronous,
           pg_database_size(current_database()) AS whole, pg_total_relation_size('owed') AS queue,
           (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = 'owed'::regclass) AS dead_rows,
           (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')
           / (current_setting('max_connections')::float8
              - current_setting('superuser_reserved_connections')::int) AS connections,
           (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now
"""
STANDBYS_SQL = """
    SELECT sync_state, pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)::float8 AS missing,
           extract(epoch FROM flush_lag)::float8 AS delay
      FROM pg_stat_replication WHERE state IS NULL OR state <> 'backup'
"""


async def observe(connection: Connection, now: int) -> Observed:
    """Return the figures and cautions of the server; `now` is the wall clock of this machine."""
    [server] = await connection.fetch(SERVER_SQL)
    standbys = await connection.fetch(STANDBYS_SQL)
    snapshots = await connection.fetch(SNAPSHOT_SQL)
    # Without pg_monitor, the details of standbys are NULL, but a standby without any name to wait for is
    # asynchronous.
    is_sync = [row["sync_state"] in {"sync", "quorum"} for row in standbys]
    figures = {
        "standbys_sync": float(sum(is_sync)),
        "standbys_async": float(len(is_sync) - sum(is_sync)),
        "standby_lag": max((row["missing"] or 0.0 for row in standbys), default=0.0),
        "standby_delay": max((row["delay"] or 0.0 for row in standbys), default=0.0),
        "oldest_snapshot": snapshots[0][1] if snapshots else 0.0,
        "dead_rows": float(server["dead_rows"] or 0),
        "connections": server["connections"],
        "clock_offset": (server["now"] - now) / SECOND,
    }
    return Observed(
        engine=server["version"],
        sizes={"database": server["whole"], "pending": server["queue"]},
        figures=figures,
        cautions=tuple(_cautions(server, figures, [row["sync_state"] for row in standbys])),
    )


def _cautions(
    server: asyncpg.Record, figures: Mapping[str, float], states: list[str | None]
) -> Iterator[Caution]:
    """Yield the cautions about the server, the most severe first."""
    if not server["survives"]:
        yield Caution(
            "fsync or full_page_writes of the PostgreSQL server is off: a power failure damages the database",
            "relay doctor",
        )
    lag = render_size(round(figures["standby_lag"]))
    if server["synchronous"]:
        if None not in states and not figures["standbys_sync"]:
            yield Caution(
                "no synchronous standby of the PostgreSQL server is connected, so commits wait",
                "relay doctor",
            )
    elif states:
        yield Caution(
            f"all standbys of the PostgreSQL server are asynchronous ({lag} behind): a failover to a standby "
            "may lose the latest events",
            "set synchronous_standby_names: see docs/cluster.md",
            is_choice=True,
        )
    if figures["standby_lag"] > LAGGING_BYTES or figures["standby_delay"] > LAGGING_SECONDS:
        yield Caution(f"a standby of the PostgreSQL server is {lag} of WAL behind", "relay doctor")
    if figures["oldest_snapshot"] > OLD_SNAPSHOT:
        age = render_duration(round(figures["oldest_snapshot"]))
        yield Caution(
            f"a transaction of the PostgreSQL server has had a snapshot for {age}: it slows down the queue",
            "relay doctor",
        )
    if figures["connections"] > CONNECTIONS:
        yield Caution(
            f"{figures['connections']:.0%} of the connections of the PostgreSQL server are in use",
            "relay doctor",
        )
    if abs(figures["clock_offset"]) * SECOND > SKEW:
        yield Caution(
            f"the clocks of this machine and of the PostgreSQL server differ by "
            f"{abs(figures['clock_offset']):.0f} s",
            "synchronize both: timedatectl",
        )
