"""Writes a database with two weeks of data, by a few SQL statements instead of by requests."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

from relay.base.clock import SystemClock
from relay.store.opening import open_store

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
