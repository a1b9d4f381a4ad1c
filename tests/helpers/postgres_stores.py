"""Databases of PostgreSQL for tests of the store: emptied and used again, because making one takes longer.

Tests read rows by SQL that SQLite's tables need as well. So the schema `seen` has views of the same shape:
a delivery with its state, a ledger without nodes, public ids with their prefixes.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from uuid import UUID

import asyncpg
from postgres import THROUGH_POOLER, database_of, maybe_pooled, name_of, renew_sessions, server

from relay.base.clock import SystemClock
from relay.store.postgres import partitions
from relay.store.postgres.schema import META, MIGRATIONS, PARTITIONED

partitions.AHEAD = 1  # a test rarely lasts for longer; a missing partition is made then

VIEWS = """
CREATE SCHEMA seen;
CREATE VIEW seen.events AS
    SELECT id, 'evt_' || public_id AS public_id, source, type, subject, received_at, content_type,
           traceparent, sha256, size, context, data_at, data_size, data, body
      FROM public.events;
CREATE VIEW seen.deliveries AS
    SELECT d.id, 'dlv_' || d.public_id AS public_id, d.event_id, d.destination,
           coalesce(e.state, 'pending') AS state, e.reason, coalesce(e.attempts, o.attempts) AS attempts,
           d.created_at, o.next_attempt_at, e.finished_at,
           coalesce(e.last_status, o.last_status) AS last_status,
           coalesce(e.last_error, o.last_error) AS last_error, d.order_key, d.latest_key, d.expires_at,
           d.on_dead, d.replay_of, CASE WHEN o.id IS NULL THEN d.group_key ELSE o.group_key END AS group_key
      FROM public.deliveries AS d LEFT JOIN public.ends AS e ON e.delivery_id = d.id
      LEFT JOIN public.owed AS o ON o.id = d.id;
CREATE VIEW seen.ledger AS
    SELECT destination, sum(created)::bigint AS created, sum(delivered)::bigint AS delivered,
           sum(dead)::bigint AS dead, sum(expired)::bigint AS expired, sum(cancelled)::bigint AS cancelled
      FROM public.ledger GROUP BY destination;
CREATE VIEW seen.stats AS
    SELECT hour, source, type, sum(events)::bigint AS events, sum(duplicates)::bigint AS duplicates,
           sum(bytes)::bigint AS bytes
      FROM public.stats GROUP BY hour, source, type;
CREATE VIEW seen.dedupe AS
    SELECT source, key, identity, 'evt_' || event_id AS event_id, expires_at
      FROM public.dedupe WHERE identity <> '';
"""
TABLES = (
    *PARTITIONED, "owed", "order_keys", "ledger", "stats", "dedupe", "repetitions", "held", "destinations",
    "sources", "workers", "worker_metrics", "worker_commands", "leases", "nodes", "requests",
    "refused", "unheard", "logins", "audit",
)  # fmt: skip
EMPTY_SQL = "".join(
    (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity",
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        # A pooler would pass a terminated session to the next test.
        " AND state <> 'idle';" if THROUGH_POOLER else ";",
        *(f"DELETE FROM {table};" for table in TABLES),
    )
)

# A delivery is either pending or has ended, and belongs to an event; nothing else is left. `NOT IN` reads
# each partition once; `NOT EXISTS` may look into each of them for every row.
FAULTS_SQL = """
    SELECT 'delivery', id FROM public.deliveries
     WHERE id NOT IN (SELECT id FROM (SELECT id FROM public.owed
                                       UNION ALL SELECT delivery_id FROM public.ends) AS known
                       GROUP BY id HAVING count(*) = 1)
        OR event_id NOT IN (SELECT id FROM public.events)
     UNION ALL
    SELECT 'pending', id FROM public.owed WHERE id NOT IN (SELECT id FROM public.deliveries)
     UNION ALL
    SELECT 'end', delivery_id FROM public.ends WHERE delivery_id NOT IN (SELECT id FROM public.deliveries)
     UNION ALL
    SELECT 'attempt', id FROM public.attempts WHERE delivery_id NOT IN (SELECT id FROM public.deliveries)
"""

CLOCK = SystemClock()

_free = []  # DSNs of empty databases
_used = {}  # DSN by path
_made = []
_refusing = set()  # names of databases that accept no writes through a pooler


def url_of(path, clock=CLOCK):
    """Return the DSN of the database with a name, which is empty at the first call of a test."""
    if path not in _used:
        _used[path] = _free.pop() if _free else _make(clock)
    return _used[path]


def listen_url_of(url):
    """Return the DSN for notifications beside the pooler of a database; None without a pooler."""
    return server().url(name_of(url)) if "pooler=true" in url else None


def _make(clock):
    url = maybe_pooled(database_of(f"store {len(_made)}"))
    _made.append(url)
    days = partitions.days_from(clock.wall(), 1)
    tables = "".join(partitions._partition(table, day) for table in PARTITIONED for day in days)
    version = f"INSERT INTO meta VALUES ('version', '{len(MIGRATIONS)}');"
    server().run("".join((META, *MIGRATIONS, version, tables, VIEWS)), name_of(url))
    return url


@contextmanager
def emptied():
    """Empty the databases that are taken inside, at the end."""
    before = set(_used)
    yield
    for path in set(_used) - before:
        url = _used.pop(path)
        if name_of(url) in _refusing:  # the test has failed
            refuse_writes_through_pooler(url, now=False)
        server().run(EMPTY_SQL, name_of(url))
        _free.append(url)


def refuse_writes_through_pooler(url, *, now):
    """Let all sessions of a database refuse writes, or accept them: a transaction may get any of them."""
    name = name_of(url)
    server().run(f"ALTER DATABASE {name} SET default_transaction_read_only = {now}")
    renew_sessions()
    if now:
        _refusing.add(name)
    else:
        _refusing.discard(name)


@contextmanager
def closed(path):
    """Let the database with a name accept no connections."""
    name = name_of(_used[path])
    server().run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    renew_sessions()
    try:
        yield
    finally:
        server().run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def run(url, sql, values=(), *, path="seen,public"):
    """Run a statement with SQLite's parameters and literals; returns plain rows."""
    sql = re.sub(r"x'([0-9a-f]*)'", r"'\\x\1'::bytea", sql)
    for number in range(1, len(values) + 1):
        sql = sql.replace("?", f"${number}", 1)
    url = server().url(name_of(url))  # never through a pooler, which takes no settings
    connection = await asyncpg.connect(url, server_settings={"search_path": path}, statement_cache_size=0)
    try:
        return [tuple(map(_plain, row)) for row in await connection.fetch(sql, *values)]
    finally:
        await connection.close()


def read(path, sql):
    """Run a statement in the database with a name, from a test whose event loop is running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run(_used[path], sql)).result()


def _plain(value):
    if isinstance(value, UUID):
        return str(value)
    return int(value) if isinstance(value, Decimal | bool) else value
