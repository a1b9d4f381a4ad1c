"""Writes two weeks of data into a database, by a few SQL statements instead of by requests."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from relay.base.clock import SystemClock
from relay.store.opening import open_store
from relay.store.postgres.connection import connect, read_url
from relay.store.postgres.partitions import make_partitions
from relay.store.postgres.rows import EPOCH

DAY = 86_400_000_000
END = 1_800_000_000_000_000
"""Time of its last event, microseconds since the epoch."""

_SPAN = 14 * DAY
_BODY = '{"n":%d,"sale":%s,"total":%d,"note":"%s"}'
_STATEMENTS = (
    # Four sources are active; most events belong to a fifth, which stopped two days ago.
    """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :events),
    drawn AS (
        SELECT i, CASE WHEN i * 7 < :events * 6 AND i % 10 < 9 THEN 'shop'
                       WHEN i % 4 = 0 THEN 'adorn' WHEN i % 4 = 1 THEN 'moddy'
                       WHEN i % 1000 = 2 THEN 'till' ELSE 'whatsapp' END AS source,
               CASE WHEN i % 50 = 0 THEN NULL WHEN i % 10 = 3 THEN 'busy'
                    ELSE 's-' || (i * 7919 % 40000) END AS subject,
               printf(:body, i, CASE WHEN i % 97 = 0 THEN 'true' ELSE 'false' END, i % 100,
                      CASE WHEN i % 100 = 0 THEN printf('%.*c', 5000, 'x') ELSE printf('%.*c', 120, 'x') END)
               AS body
          FROM n)
    INSERT INTO events (id, public_id, source, type, subject, received_at, content_type, sha256, size,
                        context, data_at, data_size, body)
    SELECT i, printf('evt_%08x-%04x-7%03x-8%03x-%012x', i >> 8, i & 255, i % 4096, i % 4095, i), source,
           source || '.t' || (i / 4 % 4), subject, :begin + :span / :events * i, 'application/json', :digest,
           length(body), x'7b7d', 0, length(body), CAST(body AS BLOB)
      FROM drawn
    """,
    # Each event has deliveries to three destinations; a fourth destination has only the first five hundred.
    """
    INSERT INTO deliveries (id, public_id, event_id, destination, state, reason, attempts, created_at,
                            next_attempt_at, finished_at, last_status)
    SELECT id * 3 + n - 2,
           printf('dlv_%08x-%04x-7%03x-8%03x-%012x', id >> 8, id & 255, id % 4096, n, id * 3 + n),
           id, CASE WHEN id <= 500 AND n = 1 THEN 'late' ELSE name END,
           state, CASE WHEN state IN ('dead', 'expired', 'cancelled') THEN 'ttl' END,
           CASE WHEN state = 'pending' AND id % 5 < 4 THEN 0 WHEN state = 'dead' THEN 2 ELSE 1 END,
           received_at + 1000, CASE WHEN state = 'pending' THEN received_at END,
           CASE WHEN state <> 'pending' THEN received_at + 90000 END,
           CASE WHEN state = 'delivered' THEN 200 WHEN state = 'dead' THEN 500 END
      FROM (SELECT e.id, e.received_at, d.n, d.name,
                   CASE WHEN d.n = 2 AND (e.id * 10 > :events * 7 OR e.id % 400 = 1) THEN 'pending'
                        WHEN d.n = 0 AND e.id % 2000 = 0 THEN 'pending'
                        WHEN (e.id + d.n) % 100 = 5 AND e.id * 3 < :events * 2 THEN 'dead'
                        WHEN (e.id + d.n) % 200 = 9 THEN 'expired'
                        WHEN e.id * 50 < :events AND (e.id + d.n) % 7 = 1 THEN 'cancelled'
                        ELSE 'delivered' END AS state
              FROM events AS e
              JOIN (SELECT 0 AS n, 'crm' AS name UNION ALL SELECT 1, 'audit' UNION ALL SELECT 2, 'erp') AS d
             ORDER BY e.id, d.n)
    """,
    """
    INSERT INTO attempts (delivery_id, started_at, duration_ms, result, status, truncated, answer)
    SELECT id, finished_at - 20000, 12.5, CASE state WHEN 'delivered' THEN 'ok' ELSE '5xx' END, last_status,
           0, x'6f6b' FROM deliveries WHERE state IN ('delivered', 'dead') ORDER BY id
    """,
    """
    INSERT INTO ledger
    SELECT destination, count(*), sum(state = 'delivered'), sum(state = 'dead'), sum(state = 'expired'),
           sum(state = 'cancelled') FROM deliveries GROUP BY destination
    """,
    """
    INSERT INTO event_times SELECT id >> 10, min(received_at), max(received_at) FROM events GROUP BY 1
    """,
    "INSERT INTO repetitions SELECT id, 1 FROM events WHERE id % 1000 = 0",
    """
    INSERT INTO stats
    SELECT received_at - received_at % 3600000000, source, type, count(*), 0, sum(size)
      FROM events GROUP BY 1, 2, 3
    """,
)


# The same data. Row ids carry the time: events 2 ms after a whole one, so that none has the id of another.
_SERVED = (
    """
    INSERT INTO events (id, public_id, source, type, subject, received_at, content_type, sha256, size,
                        context, data_at, data_size, body)
    SELECT ((at - {epoch}) / 1000 << 22) + (i % 16000) * 256,
           format('%s-%s-7%s-8%s-%s', lpad(to_hex(i >> 8), 8, '0'), lpad(to_hex(i & 255), 4, '0'),
                  lpad(to_hex(i % 4096), 3, '0'), lpad(to_hex(i % 4095), 3, '0'),
                  lpad(to_hex(i), 12, '0'))::uuid,
           source, source || '.t' || (i / 4 % 4), subject, at, 'application/json', '\\x00', length(body),
           '\\x7b7d', 0, length(body), convert_to(body, 'UTF8')
      FROM (SELECT i, {begin} + {span} / {events} * i AS at,
                   CASE WHEN i * 7 < {events} * 6 AND i % 10 < 9 THEN 'shop'
                        WHEN i % 4 = 0 THEN 'adorn' WHEN i % 4 = 1 THEN 'moddy'
                        WHEN i % 1000 = 2 THEN 'till' ELSE 'whatsapp' END AS source,
                   CASE WHEN i % 50 = 0 THEN NULL WHEN i % 10 = 3 THEN 'busy'
                        ELSE 's-' || (i * 7919 % 40000) END AS subject,
                   format('{{"n":%s,"sale":%s,"total":%s,"note":"%s"}}', i,
                          CASE WHEN i % 97 = 0 THEN 'true' ELSE 'false' END, i % 100,
                          repeat('x', CASE WHEN i % 100 = 0 THEN 5000 ELSE 120 END)) AS body
              FROM generate_series(1, {events}::bigint) AS i) AS drawn
    """,
    """
    CREATE UNLOGGED TABLE drawn AS
    SELECT e.id + 4194304 + n * 256 AS id, e.id AS event_id, e.received_at, e.size, i, n,
           CASE WHEN i <= 500 AND n = 1 THEN 'late' ELSE (ARRAY['crm', 'audit', 'erp'])[n + 1] END AS name,
           CASE WHEN n = 2 AND (i * 10 > {events} * 7 OR i % 400 = 1) THEN 'pending'
                WHEN n = 0 AND i % 2000 = 0 THEN 'pending'
                WHEN (i + n) % 100 = 5 AND i * 3 < {events} * 2 THEN 'dead'
                WHEN (i + n) % 200 = 9 THEN 'expired'
                WHEN i * 50 < {events} AND (i + n) % 7 = 1 THEN 'cancelled'
                ELSE 'delivered' END AS state
      FROM (SELECT id, received_at, size, (received_at - {begin}) / ({span} / {events}) AS i
              FROM events) AS e, generate_series(0, 2) AS n
    """,
    """
    INSERT INTO deliveries (id, public_id, event_id, destination, created_at)
    SELECT id, format('%s-%s-7%s-8%s-%s', lpad(to_hex(i >> 8), 8, '0'), lpad(to_hex(i & 255), 4, '0'),
                      lpad(to_hex(i % 4096), 3, '0'), lpad(to_hex(n), 3, '0'),
                      lpad(to_hex(i * 3 + n), 12, '0'))::uuid, event_id, name, received_at + 1000
      FROM drawn
    """,
    """
    INSERT INTO ends (delivery_id, event_id, destination, state, reason, attempts, finished_at, last_status)
    SELECT id, event_id, name, state, CASE WHEN state <> 'delivered' THEN 'ttl' END,
           CASE state WHEN 'dead' THEN 2 ELSE 1 END, received_at + 90000,
           CASE state WHEN 'delivered' THEN 200 WHEN 'dead' THEN 500 END
      FROM drawn WHERE state <> 'pending'
    """,
    """
    INSERT INTO owed (id, public_id, event_id, destination, attempts, created_at, size, next_attempt_at)
    SELECT d.id, d.public_id, d.event_id, d.destination, CASE WHEN i % 5 < 4 THEN 0 ELSE 1 END, d.created_at,
           w.size, w.received_at
      FROM drawn AS w JOIN deliveries AS d ON d.id = w.id WHERE w.state = 'pending'
    """,
    """
    INSERT INTO attempts (id, delivery_id, started_at, duration_ms, result, status, truncated, answer)
    SELECT id + (70::bigint << 22), id, received_at + 70000, 12.5,
           CASE state WHEN 'delivered' THEN 'ok' ELSE '5xx' END,
           CASE state WHEN 'delivered' THEN 200 WHEN 'dead' THEN 500 END, false, '\\x6f6b'
      FROM drawn WHERE state IN ('delivered', 'dead')
    """,
    """
    INSERT INTO ledger (slot, destination, created, delivered, dead, expired, cancelled)
    SELECT 0, name, count(*), count(*) FILTER (WHERE state = 'delivered'),
           count(*) FILTER (WHERE state = 'dead'), count(*) FILTER (WHERE state = 'expired'),
           count(*) FILTER (WHERE state = 'cancelled') FROM drawn GROUP BY name
    """,
    "INSERT INTO repetitions SELECT event_id, 1 FROM drawn WHERE n = 0 AND i % 1000 = 0",
    """
    INSERT INTO stats (slot, hour, source, type, events, duplicates, bytes)
    SELECT 0, received_at - received_at % 3600000000, source, type, count(*), 0, sum(size)
      FROM events GROUP BY 2, 3, 4
    """,
    "DROP TABLE drawn",
)


async def fill_served(url: str, events: int) -> None:
    """Fill an empty PostgreSQL database with the same data."""
    with TemporaryDirectory() as folder:
        async with open_store(url, Path(folder), SystemClock()):
            pass  # makes the tables
    connection = await connect(read_url(url), writes=False)
    try:
        await make_partitions(connection, END - _SPAN, ahead=_SPAN // DAY + 1)
        values = {"events": events, "begin": END - _SPAN, "span": _SPAN, "epoch": EPOCH}
        for sql in _SERVED:
            await connection.execute(sql.format(**values), seconds=1800)
        await connection.execute("VACUUM ANALYZE", seconds=1800)
    finally:
        await connection.close()


async def fill(path: Path, events: int) -> None:
    """Create a database with `events` events, three deliveries for each, and an attempt for most of them."""
    async with open_store(f"sqlite:{path.name}", path.parent, SystemClock()):
        pass  # makes the tables
    values = {
        "events": events,
        "begin": END - _SPAN,
        "span": _SPAN,
        "body": _BODY,
        "digest": hashlib.sha256(b"").digest(),
    }
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -500000")
        for sql in _STATEMENTS:
            database.execute(sql, {name: value for name, value in values.items() if f":{name}" in sql})
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
