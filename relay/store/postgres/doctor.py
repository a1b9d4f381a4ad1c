"""Checks of a PostgreSQL database: its data, and the server's settings and state. Only reads."""

from collections.abc import Awaitable, Callable, Collection

import asyncpg
import msgspec

from relay.base.clock import SECOND
from relay.base.units import render_duration, render_size
from relay.errors import StorageError
from relay.model import Check
from relay.store import checks
from relay.store.checks import failed, passed
from relay.store.ledger import counts_of
from relay.store.postgres.connection import Address, Connection, owner_advice, sql_name
from relay.store.postgres.ledger import AUDIT_SQL
from relay.store.postgres.rows import micros_of
from relay.store.postgres.schema import MIGRATIONS, PARTITIONED, problem_of, refuse_unsuitable

OLDEST = 15  # the oldest supported major version
LONG = 300.0  # seconds that one statement of a check may take
OLD_SNAPSHOT = 600  # seconds
DEAD_ROWS = 100_000  # in the queue: more of them than live rows slow claims down
CONNECTIONS = 0.9  # share of `max_connections` in use
SLOT_WAL = 2**30  # bytes that an unused replication slot may keep
SKEW = 5 * SECOND  # difference of the clocks of this machine and of the server
IDLE = 15.0  # seconds after which a node should have taken a free lane
DAYS_AHEAD = 2  # for which partitions must exist; usually there are seven

_REPORT = "please report this as a bug, with a dump of the database"
_RELOAD = "SELECT pg_reload_conf()"
_RESTORE = "restore a backup: see docs/storage.md"

SETTINGS_SQL = """
    SELECT name, setting FROM pg_settings
     WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names',
                    'data_checksums', 'autovacuum', 'max_connections', 'superuser_reserved_connections')
"""
STANDBYS_SQL = """
    SELECT application_name, sync_state, extract(epoch FROM replay_lag)::float8 FROM pg_stat_replication
     WHERE state IS NULL OR state <> 'backup' ORDER BY application_name
"""
SLOTS_SQL = """
    SELECT slot_name, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint FROM pg_replication_slots
     WHERE NOT active AND restart_lsn IS NOT NULL ORDER BY slot_name
"""
TABLES_STATE_SQL = """
    SELECT current_user::text, current_schema()::text, has_schema_privilege(current_schema(), 'CREATE'),
           pg_get_userbyid(relowner)::text, has_table_privilege(meta.oid, 'SELECT')
      FROM (SELECT to_regclass('meta')::oid AS oid) AS meta LEFT JOIN pg_class USING (oid)
"""
CONNECTIONS_SQL = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
TABLES_SQL = """
    SELECT relname, n_live_tup, n_dead_tup FROM pg_stat_user_tables
     WHERE schemaname = current_schema() AND relname IN ('owed', 'ledger', 'stats', 'dedupe', 'workers')
     ORDER BY n_dead_tup DESC
"""
SNAPSHOT_SQL = """
    SELECT 'process ' || pid || coalesce(' of ' || nullif(application_name, ''), ''),
           extract(epoch FROM clock_timestamp() - xact_start)::float8
      FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND xact_start IS NOT NULL
     UNION ALL
    SELECT 'prepared transaction ' || gid, extract(epoch FROM clock_timestamp() - prepared)::float8
      FROM pg_prepared_xacts WHERE database = current_database()
     ORDER BY 2 DESC LIMIT 1
"""
PARTITIONS_SQL = """
    SELECT p.relname, max(right(c.relname, 8)), count(*) FROM pg_inherits AS i
      JOIN pg_class AS p ON p.oid = i.inhparent JOIN pg_class AS c ON c.oid = i.inhrelid
     WHERE p.relnamespace = current_schema()::regnamespace AND p.relname = ANY($1::text[]) GROUP BY p.relname
"""
INVALID_SQL = """
    SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
     WHERE NOT i.indisvalid AND c.relkind = 'i' AND c.relnamespace = current_schema()::regnamespace
"""
NODES_SQL = """
    SELECT name, version, config_digest, shards IS NULL AS lacks_shards,
           EXISTS (SELECT FROM jsonb_each(shards) AS s WHERE s.value > '1') AS wants_shards
      FROM nodes WHERE seen > clock_timestamp() - interval '5 seconds' ORDER BY name, started
"""
FREE_SQL = """
    SELECT substr(l.name, 6) FROM leases AS l
     WHERE l.name LIKE 'lane:%' AND l.until < clock_timestamp() - $1::float8 * interval '1 second'
       AND EXISTS (SELECT FROM nodes WHERE split_part(substr(l.name, 6), '/', 1) = ANY(destinations)
                      AND seen > clock_timestamp() - interval '5 seconds'
                      AND started < clock_timestamp() - $1::float8 * interval '1 second')
       AND (l.name NOT LIKE '%/%' OR EXISTS (  -- a shard with a number that is in force
            SELECT FROM leases AS d
             WHERE d.name = split_part(l.name, '/', 1)
               AND (d.standing ->> 'shards')::int > split_part(l.name, '/', 2)::int))
     ORDER BY l.name
"""
STUCK_SQL = """
    SELECT 'dlv_' || o.public_id FROM owed AS o
     WHERE o.attempts = 0 AND o.next_attempt_at IS NULL
       AND (o.order_key IS NULL OR NOT EXISTS (
            SELECT FROM owed AS earlier
             WHERE earlier.destination = o.destination AND earlier.order_key = o.order_key
               AND earlier.id < o.id))
     ORDER BY o.id
"""
DEAD_SQL = """
    SELECT x.destination, count(*) FROM ends AS x
     WHERE x.state = 'dead' AND NOT EXISTS (
           SELECT FROM deliveries AS later WHERE later.event_id = x.event_id
              AND later.id > x.delivery_id AND later.destination = x.destination)
     GROUP BY x.destination ORDER BY x.destination
"""
BODY_SQL = """
    SELECT 'evt_' || public_id, sha256, size, body FROM events WHERE id >= $1 ORDER BY id LIMIT 1
"""


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """The database to check, and the parts of the configuration that concern it."""

    location: str
    now: int  # wall clock
    destinations: Collection[str] | None = None  # names in the configuration; None: unknown
    sources: Collection[str] | None = None  # the same
    is_in_use: bool = False  # by the daemon that runs the checks


async def examine(examined: Examined, address: Address, connection: Connection) -> list[Check]:
    """Run every check; a check that fails to run is not ok.

    Without tables of the relay, or the right to read them, one result replaces those of the data.
    """
    found = [passed("database", examined.location)]
    without = await without_tables(examined, address, connection)
    for check in CHECKS:
        if without is not None and check not in OF_SERVER:
            found += [without] if check is version else []
            continue
        try:
            found.append(await check(examined, connection))
        except asyncpg.PostgresError as error:
            hint = "run it again, and read the server's log"
            if isinstance(error, asyncpg.InsufficientPrivilegeError):
                hint = f"let the relay's user read statistics: {_grant('pg_monitor', address.user)}"
            found.append(failed(check.__name__, f"the check failed: {error}", hint))
    return found


def _grant(role: str, user: str) -> str:
    return f"GRANT {sql_name(role)} TO {sql_name(user) if user else 'the user of [storage] url'}"


async def without_tables(examined: Examined, address: Address, connection: Connection) -> Check | None:
    """Return why the tables cannot be checked; None if they can."""
    try:
        await refuse_unsuitable(connection, address)
    except StorageError as error:
        return failed("version", error.message, error.hint)
    [(user, schema, can_create, owner, can_read)] = await connection.fetch(TABLES_STATE_SQL)
    detail = hint = ""
    if schema is None:
        detail = "no schema of search_path exists, or this user may not use it"
        hint = f"CREATE SCHEMA … AUTHORIZATION {sql_name(user)}"
    elif owner is None and not can_create:
        detail = f"{user} may not create tables in the schema {schema}"
        hint = owner_advice(address, user)
    elif owner is None and examined.is_in_use:
        detail = "the tables are gone: somebody dropped them, or created the database again"
        hint = "restore a backup, or restart the relay to begin without events"
    elif owner is None:
        return passed("version", "no tables yet: the relay creates them when it starts")
    elif not can_read:
        detail = f"the tables belong to the role {owner}, and {user} may not read them"
        hint = f"name {owner} in [storage] url, or {_grant(owner, user)}"
    elif await connection.value("SELECT EXISTS (SELECT FROM meta WHERE name = 'moving')"):
        detail = "the tables have only a part of the data: a move into them is not complete"
        hint = "run the same `relay db move` again: it continues"
    return failed("version", detail, hint) if detail else None


async def server(_examined: Examined, connection: Connection) -> Check:
    """Check the version of the server, and that it accepts writes."""
    [(version, number, is_standby)] = await connection.fetch(
        "SELECT current_setting('server_version'), current_setting('server_version_num')::int / 10000,"
        " pg_is_in_recovery()"
    )
    if number < OLDEST:
        return failed("server", f"PostgreSQL {version}", f"upgrade the server to {OLDEST} or newer")
    if is_standby:
        detail = f"PostgreSQL {version}, a standby: it accepts no writes"
        return failed("server", detail, "name all hosts in [storage] url: postgresql://db1,db2/relay")
    return passed("server", f"PostgreSQL {version}")


async def version(_examined: Examined, connection: Connection) -> Check:
    """Check the version of the tables."""
    found, least = await versions(connection)
    if (problem := problem_of(found, least)) is not None:
        hint = "use the program that migrated them, or start the relay, which migrates them"
        return failed("version", problem, hint)
    known = len(MIGRATIONS)
    newer = f" of a newer version; this program knows {known} and can use them" if found > known else ""
    return passed("version", f"schema version {found}{newer}")


async def versions(connection: Connection) -> tuple[int, int]:
    """Return the schema version of the tables, and the version that a program must know to use them."""
    meta = dict(map(tuple, await connection.fetch("SELECT name, value FROM meta")))
    return int(meta.get("version", 0)), int(meta.get("least", 1))


async def durability(_examined: Examined, connection: Connection) -> Check:
    """Check the settings on which the durability of a commit depends."""
    settings = await _settings(connection)
    off = [name for name in ("fsync", "full_page_writes") if settings[name] == "off"]
    shown = ", ".join(f"{name} = {settings[name]}" for name in _DURABLE)
    if off:
        hint = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off)
        return failed("durability", f"{shown}: a power failure damages the database", f"{hint}; {_RELOAD}")
    return passed("durability", shown)


async def replication(_examined: Examined, connection: Connection) -> Check:
    """Check standbys: without a synchronous one, a failover loses the latest events."""
    settings = await _settings(connection)
    names = settings["synchronous_standby_names"]
    standbys = await connection.fetch(STANDBYS_SQL)
    if names and any(state is None for _, state, _ in standbys):
        hint = _grant("pg_monitor", "")
        return failed("replication", f"standbys whose details this user cannot see: {len(standbys)}", hint)
    slots = [(name, size) for name, size in await connection.fetch(SLOTS_SQL) if size > SLOT_WAL]
    if slots:
        name, size = slots[0]
        detail = f"the replication slot {name} is not used and keeps {render_size(size)} of WAL"
        return failed(
            "replication", detail, f"SELECT pg_drop_replication_slot('{name}'), or start its standby"
        )
    shown = "; ".join(
        f"{name}: {state or 'async'}" + ("" if lag is None else f", {lag:.1f} s behind")
        for name, state, lag in standbys
    )
    if names and not any(state in {"sync", "quorum"} for _, state, _ in standbys):
        detail = f"no synchronous standby is connected, so commits wait ({names})"
        return failed(
            "replication", detail, "start a standby of synchronous_standby_names, or remove the setting"
        )
    if standbys and not names:
        detail = f"asynchronous standbys: {shown}; a failover to one of them may lose the latest events"
        return failed("replication", detail, "set synchronous_standby_names: see docs/cluster.md")
    return passed("replication", shown or "no standbys")


async def connections(_examined: Examined, connection: Connection) -> Check:
    """Check that the server has free connections."""
    settings = await _settings(connection)
    most = int(settings["max_connections"]) - int(settings["superuser_reserved_connections"])
    used = await connection.value(CONNECTIONS_SQL)
    detail = f"{used} of {most} connections in use"
    if used > CONNECTIONS * most:
        return failed("connections", detail, "raise max_connections, or use a pooler: see docs/storage.md")
    return passed("connections", detail)


async def vacuum(_examined: Examined, connection: Connection) -> Check:
    """Check that rows of small, busy tables are cleaned up."""
    settings = await _settings(connection)
    if settings["autovacuum"] == "off":
        return failed("vacuum", "autovacuum is off", f"ALTER SYSTEM SET autovacuum = on; {_RELOAD}")
    rows = await connection.fetch(TABLES_SQL)
    for name, live, gone in rows:
        if gone > max(DEAD_ROWS, live):
            detail = f"{name} has {gone} dead rows and {live} live ones"
            return failed("vacuum", detail, f"VACUUM {name}; the check `snapshots` shows what may prevent it")
    worst = f"most dead rows: {rows[0][2]} in {rows[0][0]}" if rows else "no statistics yet"
    return passed("vacuum", worst)


async def snapshots(_examined: Examined, connection: Connection) -> Check:
    """Look for old snapshots, which keep dead rows in the queue and so slow down claims."""
    rows = await connection.fetch(SNAPSHOT_SQL)
    if rows and rows[0][1] > OLD_SNAPSHOT:
        what, age = rows[0]
        detail = f"{what} has had a snapshot for {render_duration(round(age))}"
        return failed("snapshots", detail, "end that transaction, or run it on a standby")
    return passed("snapshots", f"no snapshot is older than {render_duration(OLD_SNAPSHOT)}")


async def partitions(_examined: Examined, connection: Connection) -> Check:
    """Check that partitions for the next days exist."""
    rows = {
        table: (last, count) for table, last, count in await connection.fetch(PARTITIONS_SQL, PARTITIONED)
    }
    wanted = await connection.value(
        f"SELECT to_char((now() AT TIME ZONE 'UTC')::date + {DAYS_AHEAD}, 'YYYYMMDD')"
    )
    missing = [table for table in PARTITIONED if table not in rows or rows[table][0] < wanted]
    if missing:
        detail = f"no partitions for {wanted}: {', '.join(missing)}"
        return failed(
            "partitions", detail, "start the relay, which creates them if its user may create tables"
        )
    count = sum(number for _, number in rows.values())
    return passed("partitions", f"{count} partitions, until {min(last for last, _ in rows.values())}")


async def indexes(_examined: Examined, connection: Connection) -> Check:
    """Look for invalid indexes, which the server does not use."""
    if names := [name for (name,) in await connection.fetch(INVALID_SQL)]:
        hint = "; ".join(f"REINDEX INDEX {name}" for name in names)
        return failed("indexes", f"invalid: {', '.join(names)}", hint)
    return passed("indexes", "all indexes are valid")


async def nodes(_examined: Examined, connection: Connection) -> Check:
    """Compare the nodes of a cluster, and look for lanes that none of them runs."""
    rows = await connection.fetch(NODES_SQL)
    if not rows:
        return passed("nodes", "no cluster")
    shown = ", ".join(f"{row['name']} ({row['version']})" for row in rows)
    older = [f"{row['name']} ({row['version']})" for row in rows if row["lacks_shards"]]
    if older and any(row["wants_shards"] for row in rows):
        detail = f"destinations are not divided into shards while older versions run: {', '.join(older)}"
        return failed("nodes", detail, "upgrade these nodes")
    by_digest: dict[bytes, list[str]] = {}
    for row in rows:
        by_digest.setdefault(row["config_digest"], []).append(row["name"])
    if len(by_digest) > 1:
        groups = (f"{digest.hex()[:12]} on {', '.join(names)}" for digest, names in by_digest.items())
        detail = f"nodes with different configurations: {'; '.join(groups)}"
        return failed("nodes", detail, "copy config.toml to all nodes, then run on each: relay reload")
    names = [row["name"] for row in rows]
    if same := sorted({name for name in names if names.count(name) > 1}):
        detail = f"several nodes have the name {', '.join(same)}"
        return failed("nodes", detail, "set [cluster] node to another name on each, then restart them")
    free = [name for (name,) in await connection.fetch(FREE_SQL, IDLE)]
    if free:
        detail = f"no node runs the lanes of {', '.join(free)}, which nodes have configured"
        return failed("nodes", detail, "restart a node that should run them; list the nodes: relay nodes")
    return passed("nodes", shown)


async def conservation(_examined: Examined, connection: Connection) -> Check:
    """Compare the ledger of each destination with the queue."""
    return checks.conservation(counts_of(await connection.fetch(AUDIT_SQL, seconds=LONG)), _REPORT)


async def stuck(_examined: Examined, connection: Connection) -> Check:
    """Look for pending deliveries that never become due."""
    return checks.stuck([id_ for (id_,) in await connection.fetch(STUCK_SQL, seconds=LONG)], _REPORT)


async def dead(_examined: Examined, connection: Connection) -> Check:
    """Count the dead deliveries that were not repeated."""
    return checks.dead([(name, count) for name, count in await connection.fetch(DEAD_SQL, seconds=LONG)])


async def bodies(_examined: Examined, connection: Connection) -> Check:
    """Compare bodies with their digests."""
    ends = (
        "SELECT (SELECT id FROM events ORDER BY id LIMIT 1), (SELECT id FROM events ORDER BY id DESC LIMIT 1)"
    )
    [(first, last)] = await connection.fetch(ends)
    if first is None:
        return passed("bodies", "no events")
    step = max(1, (last - first) // checks.SAMPLE)
    sampled = set()
    for start in (*range(first, last, step), last):
        for id_, digest, size, body in await connection.fetch(BODY_SQL, start, seconds=LONG):
            sampled.add(id_)
            if not checks.is_intact(digest, size, body):
                return failed("bodies", f"the body of {id_} does not match its sha256", _RESTORE)
    return passed("bodies", f"sampled bodies that match their sha256: {len(sampled)}")


async def clock(examined: Examined, connection: Connection) -> Check:
    """Look for events in the future, and compare the clock with the server's."""
    [(latest, theirs)] = await connection.fetch(
        "SELECT (SELECT id FROM events ORDER BY id DESC LIMIT 1),"
        " (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    )
    found = checks.clock(None if latest is None else micros_of(latest), examined.now)
    if found.ok and abs(theirs - examined.now) > SKEW:
        difference = abs(theirs - examined.now) / SECOND
        detail = f"the clocks of this machine and of the server differ by {difference:.0f} s"
        return failed("clock", detail, "synchronize both clocks: timedatectl")
    return found


async def room(_examined: Examined, connection: Connection) -> Check:
    """Return the size of the database; the relay cannot examine the server's disk."""
    [(whole, queue)] = await connection.fetch(
        "SELECT pg_database_size(current_database()), pg_total_relation_size('owed')"
    )
    return passed("room", f"{render_size(whole)}, {render_size(queue)} of it pending deliveries")


async def destinations(examined: Examined, connection: Connection) -> Check:
    """Look for pending deliveries of destinations that are no longer in the configuration."""
    ledger = counts_of(await connection.fetch(AUDIT_SQL, seconds=LONG))
    return checks.destinations(ledger, examined.destinations)


async def sources(examined: Examined, connection: Connection) -> Check:
    """Look for paused sources; their senders are refused."""
    rows = await connection.fetch("SELECT name FROM sources WHERE paused ORDER BY name")
    return checks.sources([name for (name,) in rows], examined.sources)


async def workers(_examined: Examined, connection: Connection) -> Check:
    """Look for workers whose clients must percent-encode the worker id in paths."""
    rows = await connection.fetch("SELECT source, id, status, record FROM workers ORDER BY source, id")
    return checks.workers((source, id_, status, record) for source, id_, status, record in rows)


_DURABLE = ("fsync", "full_page_writes", "synchronous_commit", "data_checksums")

CHECKS: tuple[Callable[[Examined, Connection], Awaitable[Check]], ...] = (
    server, version, durability, replication, connections, vacuum, snapshots, partitions, indexes, nodes,
    conservation, stuck, dead, bodies, clock, room, destinations, sources, workers,
)  # fmt: skip

OF_SERVER = {server, durability, replication, connections, vacuum, snapshots}
"""Checks that read no table of the relay."""


async def _settings(connection: Connection) -> dict[str, str]:
    return dict(map(tuple, await connection.fetch(SETTINGS_SQL)))
