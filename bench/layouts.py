"""Compare two SQLite layouts: deliveries in one table, or a small queue table beside insert-only tables.

One table (today): a row of `deliveries` changes when its delivery is retried and when it ends.
Queue table: `pending_deliveries` claims pending deliveries only; `deliveries`, `ends` and `attempts` are
insert-only. Ending a delivery deletes its queue row and inserts a row into `ends`.

Both files hold the same data. One table runs the store's own statements; the queue table runs prototypes that
go through the same batches and transactions. All figures are CPU time of this process, kernel time included.
"""

import hashlib
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import aiosqlite
import click

from bench.loop import run
from relay.base.clock import SystemClock
from relay.base.ids import EVENT, new_id
from relay.config.schema import WorkerRules
from relay.model import Attempt, Delivery, Outcome, StoredEvent, Target
from relay.store import Acceptance
from relay.store.batch import LEDGER, Batch, Sequences, count_transitions
from relay.store.claims import Claims
from relay.store.dedupe import Key, Keys, identity
from relay.store.opening import no_options
from relay.store.queries import PagedQueries
from relay.store.roster import Roster
from relay.store.rows import (
    ATTEMPT_COLUMNS,
    EVENT_COLUMNS,
    STATS_COLUMNS,
    attempt_row,
    delivery_of,
    event_row,
)
from relay.store.sqlite import commit, event_times, prune
from relay.store.sqlite import queries as stored_lists
from relay.store.sqlite.connection import migrate, open_reader, open_writer
from relay.store.sqlite.database import Database
from relay.store.sqlite.deliveries import claim
from relay.store.sqlite.mark import GIVEN_SQL
from relay.store.sqlite.queries import IndexPath, SqliteReader
from relay.store.sqlite.schema import MIGRATIONS
from relay.store.sqlite.transaction import Transaction, WriterConnection
from relay.store.transitions import end_in_flight

GROUP = 64
"""Events in one commit, and outcomes in one commit."""

GROUPS = 32  # commits of events per round and number of destinations
CLAIMS = 8  # claims per round
CLAIMED = 128  # deliveries in one claim
PAGE = 50  # rows of one list page
PLACES = 40  # pages of each list in a round
DELETED = 100  # events in one transaction of retention, see `prune.COST`
ALLOWED = 1.03
"""Maximum cost of the queue table, as a share of the cost of one table."""

CLOCK = SystemClock()
BODY = b'{"event_type":"member_joined","discord_id":"1","metadata":{"guild_id":"2"}}' + b" " * 131
DIGEST = hashlib.sha256(BODY).digest()
START = 1_700_000_000_000_000  # microseconds since the epoch: the first stored event

# Each event has one delivery to `crm`, which has ended, and one to `erp`, which is pending. Every 5,000th
# pending one goes to `late`. One ended delivery in 100 is dead, one in 200 is expired.
FILL = (
    """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
    INSERT INTO events (id, public_id, source, type, subject, received_at, content_type, sha256, size,
                        context, data_at, data_size, body)
    SELECT i, printf('evt_%08x-%04x-7%03x-8%03x-%012x', i >> 8, i & 255, i % 4096, i % 4095, i), 'shop',
           'shop.t' || (i % 4), 's-' || (i * 7919 % 40000), :start + i * 1000, 'application/json', :digest,
           length(:body), x'7b7d', 0, length(:body), :body
      FROM n
    """,
    """
    INSERT INTO event_times SELECT id >> 10, min(received_at), max(received_at) FROM events GROUP BY 1
    """,
    """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows * 2),
    m AS (SELECT i, (i + 1) / 2 AS event, i % 2 = 0 AS waits FROM n),
    s AS (SELECT i, event, waits, :start + event * 1000 AS at,
                 CASE WHEN waits THEN 'pending' WHEN event % 100 = 5 THEN 'dead'
                      WHEN event % 200 = 9 THEN 'expired' ELSE 'delivered' END AS state
            FROM m)
    INSERT INTO deliveries (id, public_id, event_id, destination, state, reason, attempts, created_at,
                            next_attempt_at, finished_at, last_status)
    SELECT i, printf('dlv_%08x-%04x-7%03x-8%03x-%012x', i >> 8, i & 255, i % 4096, i % 4095, i), event,
           CASE WHEN NOT waits THEN 'crm' WHEN event % 5000 = 7 THEN 'late' ELSE 'erp' END, state,
           CASE WHEN state IN ('dead', 'expired') THEN 'ttl' END, NOT waits, at,
           CASE WHEN waits THEN at END, CASE WHEN NOT waits THEN at + 90000 END,
           CASE state WHEN 'delivered' THEN 200 WHEN 'dead' THEN 500 END
      FROM s
    """,
    """
    INSERT INTO attempts (delivery_id, started_at, duration_ms, result, status, truncated, answer)
    SELECT id, finished_at - 20000, 12.5, CASE state WHEN 'delivered' THEN 'ok' ELSE '5xx' END, last_status,
           0, x'6f6b' FROM deliveries WHERE state IN ('delivered', 'dead') ORDER BY id
    """,
)

# `ends` has the event's id as well, because lists and replays look for lost deliveries by event.
QUEUE_TABLES = """
DROP TABLE deliveries;
CREATE TABLE deliveries (
    id          INTEGER PRIMARY KEY,
    public_id   TEXT    NOT NULL UNIQUE,
    event_id    INTEGER NOT NULL REFERENCES events (id),
    destination TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    replay_of   INTEGER
) STRICT;
CREATE INDEX deliveries_event ON deliveries (event_id);
CREATE INDEX deliveries_destination ON deliveries (destination, id) WHERE id > 0;

CREATE TABLE pending_deliveries (              -- has all columns of a claim: a claim reads only this table
    id              INTEGER PRIMARY KEY,
    public_id       TEXT    NOT NULL,
    event_id        INTEGER NOT NULL,
    destination     TEXT    NOT NULL,
    created_at      INTEGER NOT NULL,
    size            INTEGER NOT NULL,
    replay_of       INTEGER,
    attempts        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at INTEGER,
    order_key       TEXT,
    latest_key      TEXT,
    expires_at      INTEGER,
    on_dead         TEXT,
    last_status     INTEGER,
    last_error      TEXT
) STRICT;
CREATE INDEX pending_first ON pending_deliveries (destination, next_attempt_at, id) WHERE attempts = 0;
CREATE INDEX pending_retry ON pending_deliveries (destination, next_attempt_at, id) WHERE attempts > 0;
CREATE INDEX pending_order ON pending_deliveries (destination, order_key, id) WHERE order_key IS NOT NULL;
CREATE INDEX pending_latest ON pending_deliveries (destination, latest_key, id) WHERE latest_key IS NOT NULL;
CREATE INDEX pending_expiry ON pending_deliveries (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE ends (
    delivery_id INTEGER PRIMARY KEY,
    event_id    INTEGER NOT NULL,
    destination TEXT    NOT NULL,
    state       TEXT    NOT NULL CHECK (state IN ('delivered', 'dead', 'expired', 'cancelled')),
    reason      TEXT,
    attempts    INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    last_status INTEGER,
    last_error  TEXT
) STRICT;
CREATE INDEX ends_lost ON ends (destination, state, delivery_id) WHERE state <> 'delivered';
CREATE INDEX ends_repeat ON ends (state, event_id, destination) WHERE state <> 'delivered';
CREATE INDEX ends_event ON ends (destination, state, event_id) WHERE state <> 'delivered';
"""
COPY = (
    "INSERT INTO events SELECT * FROM other.events",
    "INSERT INTO event_times SELECT * FROM other.event_times",
    """
    INSERT INTO deliveries
    SELECT id, public_id, event_id, destination, created_at, replay_of FROM other.deliveries
    """,
    """
    INSERT INTO pending_deliveries
    SELECT d.id, d.public_id, d.event_id, d.destination, d.created_at, e.size, d.replay_of, d.attempts,
           d.next_attempt_at, d.order_key, d.latest_key, d.expires_at, d.on_dead, d.last_status, d.last_error
      FROM other.deliveries AS d JOIN other.events AS e ON e.id = d.event_id WHERE d.state = 'pending'
    """,
    """
    INSERT INTO ends
    SELECT id, event_id, destination, state, reason, attempts, finished_at, last_status, last_error
      FROM other.deliveries WHERE state <> 'pending'
    """,
    "INSERT INTO attempts SELECT * FROM other.attempts",
)


# The statements of `queries.plan`, `.filters` and `.lists` that mention a state, for the queue table.
QUEUE_EVENT_PATHS = {"state": IndexPath("ends", "state <> 'delivered' AND state = ?", "event_id")}
QUEUE_DELIVERY_PATHS = {
    "destination and state": IndexPath(
        "ends", "destination = ? AND state <> 'delivered' AND state = ?", "delivery_id"
    ),
}
QUEUE_SHORT = {
    "first": "SELECT id FROM pending_deliveries WHERE destination = ? AND attempts = 0 LIMIT ?",
    "retry": "SELECT id FROM pending_deliveries WHERE destination = ? AND attempts > 0 LIMIT ?",
}
_STATES = """
    (SELECT q.id, q.event_id, q.destination, coalesce(x.state, 'pending') AS state
       FROM deliveries AS q LEFT JOIN ends AS x ON x.delivery_id = q.id) AS d
"""
QUEUE_MATCHES = f"""
    SELECT d.event_id, d.id, '', 0, 0, d.destination FROM {_STATES} WHERE d.id IN ({{marks}}) {{conditions}}
"""
QUEUE_HAS_DELIVERY = f"EXISTS (SELECT 1 FROM {_STATES} WHERE d.event_id = e.id {{conditions}})"
QUEUE_EVENT_ROWS = stored_lists.EVENTS_SQL.replace("FROM deliveries AS d", f"FROM {_STATES}")
QUEUE_ROWS = """
    SELECT d.id AS row, d.public_id AS id, v.public_id AS event_id, v.type, d.destination,
           coalesce(x.state, 'pending') AS state, x.reason, coalesce(x.attempts, p.attempts) AS attempts,
           p.next_attempt_at, coalesce(x.last_status, p.last_status) AS last_status,
           coalesce(x.last_error, p.last_error) AS last_error, d.created_at, x.finished_at,
           (SELECT r.public_id FROM deliveries AS r WHERE r.id = d.replay_of) AS replay_of,
           NULL AS group_key
      FROM deliveries AS d CROSS JOIN events AS v ON v.id = d.event_id
      LEFT JOIN ends AS x ON x.delivery_id = d.id
      LEFT JOIN pending_deliveries AS p ON x.delivery_id IS NULL AND p.id = d.id
     WHERE d.id IN ({marks})
"""

LISTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "deliveries": ("deliveries", {}),
    "destination=crm": ("deliveries", {"destination": "crm"}),
    "destination=crm state=delivered": ("deliveries", {"destination": "crm", "state": "delivered"}),
    "destination=crm state=dead": ("deliveries", {"destination": "crm", "state": "dead"}),
    "destination=erp state=pending": ("deliveries", {"destination": "erp", "state": "pending"}),
    "destination=late state=pending": ("deliveries", {"destination": "late", "state": "pending"}),
    "events with counts by state": ("events", {}),
    "events state=dead": ("events", {"state": "dead"}),
}
"""Lists of which pages are read: their kinds and filters."""


OLDEST = stored_lists.EVENT_PATHS["all"].sql(newest_first=False)


class OneTable:
    """Today's layout, and the store's own statements."""

    name = "one table"
    candidates = prune.PAGE_SQL.format(candidates=OLDEST)
    deletable = prune.DELETABLE_SQL
    delete: Sequence[str] = prune.DELETE_SQL

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.rows = rows  # events, and pending deliveries, that the file is filled with
        self.sequences = Sequences(rows, rows * 2)
        self.claims = Claims()
        self.connection: WriterConnection
        self.reader: aiosqlite.Connection
        self._opened: list[aiosqlite.Connection] = []

    async def open(self) -> None:
        """Open the file, and create the tables if it is new."""
        self.connection = await open_writer(self.path, full=True)
        self._opened.append(self.connection)
        await migrate(self.connection, self.path)

    async def open_reader(self) -> None:
        self.reader = await open_reader(self.path)
        self._opened.append(self.reader)

    async def close(self) -> None:
        for connection in self._opened:
            await connection.close()

    def fill(self, database: sqlite3.Connection) -> None:
        """Write the stored events and deliveries."""
        values = {"rows": self.rows, "start": START, "body": BODY, "digest": DIGEST}
        for sql in FILL:
            database.execute(sql, {name: values[name] for name in values if f":{name}" in sql})

    async def write(self, batch: Batch, transaction: Transaction) -> None:
        """Write a batch."""
        await commit.write(batch, transaction, self.claims)

    async def claim(self) -> Sequence[Delivery]:
        """Return pending deliveries, oldest due time first."""
        now = CLOCK.steady()
        return (await claim(self.connection, self.claims, "erp", CLAIMED, retries=False, now=now)).deliveries

    @contextmanager
    def statements(self) -> Iterator[None]:
        """Have the store's lists use the statements of this layout."""
        yield


class QueueTable(OneTable):
    """The layout with a queue table, and prototypes of its statements."""

    name = "queue table"
    candidates = f"""
        SELECT e.id, e.source, e.type, e.received_at,
               1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(x.attempts), 0),
               max(CASE WHEN d.id IS NOT NULL AND x.state IS NULL THEN 9223372036854775807
                        WHEN x.state = 'dead' THEN x.finished_at END)
          FROM ({OLDEST}) AS c JOIN events AS e ON e.id = c.id
          LEFT JOIN deliveries AS d ON d.event_id = c.id LEFT JOIN ends AS x ON x.delivery_id = d.id
         GROUP BY c.id ORDER BY c.id
    """
    deletable = """
        WITH candidate (id, dead) AS (VALUES {values})
        SELECT candidate.id FROM candidate JOIN events AS e ON e.id = candidate.id
         WHERE NOT EXISTS (SELECT 1 FROM deliveries AS d LEFT JOIN ends AS x ON x.delivery_id = d.id
                            WHERE d.event_id = candidate.id
                              AND (x.state IS NULL OR (x.state = 'dead' AND x.finished_at > candidate.dead)))
    """
    delete = (
        """
        WITH deletable (id) AS (VALUES {values})
        DELETE FROM ends WHERE delivery_id IN (
               SELECT id FROM deliveries WHERE event_id IN (SELECT id FROM deletable))
        """,
        *prune.DELETE_SQL,
    )

    def __init__(self, path: Path, rows: int, other: Path) -> None:
        super().__init__(path, rows)
        self._other = other

    async def open(self) -> None:
        await super().open()
        await self.connection.executescript(QUEUE_TABLES)

    def fill(self, database: sqlite3.Connection) -> None:
        """Copy everything from the other file."""
        database.execute("ATTACH ? AS other", (str(self._other),))
        for sql in COPY:
            database.execute(sql)

    async def write(self, batch: Batch, transaction: Transaction) -> None:
        """Write a batch as `commit.write` does.

        The loops over idempotency keys and dead deliveries are included, although there are none.
        """
        batch.add_all_generated()
        if batch.outcomes:
            batch.outcomes = end_in_flight(batch.outcomes, self.claims)
            await _settle(batch, transaction)
        if batch.events:
            transaction.insert("events", EVENT_COLUMNS, [event_row(event) for event in batch.events])
            block = batch.events[0].id >> event_times.SHIFT
            rows = [(block, batch.events[0].received_at, batch.events[-1].received_at)]
            transaction.insert("event_times", "block, first, last", rows, then=event_times.WIDEN)
        if counted := [(*key, *counts) for key, counts in batch.stats.items()]:
            transaction.insert("stats", STATS_COLUMNS, counted, then=commit.ADD_TO_STATS)
        if batch.deliveries:
            _write_deliveries(batch, transaction)
        if batch.keys is not None:
            commit.write_keys(transaction, batch.keys)
        batch.ledger = count_transitions(batch)
        if ledger := [(name, *counts.values()) for name, counts in batch.ledger.items()]:
            columns = f"destination, {', '.join(LEDGER)}"
            transaction.insert("ledger", columns, ledger, then=commit.ADD_TO_LEDGER)

    async def claim(self) -> Sequence[Delivery]:
        """Return pending deliveries as the store does, but without reading their events."""
        rows = await self.connection.execute_fetchall(
            """
            SELECT id, public_id, event_id, destination, attempts, created_at, size, order_key, latest_key,
                   expires_at, on_dead, replay_of
              FROM pending_deliveries
             WHERE destination = ? AND attempts = 0 AND next_attempt_at <= ?
             ORDER BY next_attempt_at, id
             LIMIT ?
            """,
            ("erp", CLOCK.steady(), CLAIMED + self.claims.of("erp")),
        )
        claimed = tuple(delivery_of(tuple(row)) for row in rows if row[0] not in self.claims)[:CLAIMED]
        self.claims.add(claimed)
        return claimed

    @contextmanager
    def statements(self) -> Iterator[None]:
        with (
            patch.dict(stored_lists.EVENT_PATHS, QUEUE_EVENT_PATHS),
            patch.dict(stored_lists.DELIVERY_PATHS, QUEUE_DELIVERY_PATHS),
            patch.dict(stored_lists.SHORT, QUEUE_SHORT),
            patch.object(stored_lists, "DELIVERIES", QUEUE_MATCHES),
            patch.object(stored_lists, "HAS_DELIVERY", QUEUE_HAS_DELIVERY),
            patch.object(stored_lists, "DELIVERIES_SQL", QUEUE_ROWS),
            patch.object(stored_lists, "EVENTS_SQL", QUEUE_EVENT_ROWS),
        ):
            yield


def _write_deliveries(batch: Batch, transaction: Transaction) -> None:
    ordered = [d for d in batch.deliveries if d.order_key is not None]
    latest = [d for d in batch.deliveries if d.latest_key is not None]
    if ordered or latest:
        raise NotImplementedError
    busy: set[tuple[str, str | None]] = set()
    rows, queued = [], []
    for delivery in batch.deliveries:
        rows.append(
            (
                delivery.id, delivery.public_id, delivery.event_id, delivery.destination,
                delivery.created_at, delivery.replay_of,
            )
        )  # fmt: skip
        if delivery.id in batch.ended_early:
            continue
        key = (delivery.destination, delivery.order_key)
        behind = delivery.order_key is not None and key in busy
        busy.add(key)
        queued.append(
            (
                delivery.id, delivery.public_id, delivery.event_id, delivery.destination,
                delivery.created_at, delivery.size, delivery.replay_of, None if behind else batch.steady,
                delivery.order_key, delivery.latest_key, delivery.expires_at, delivery.on_dead,
            )
        )  # fmt: skip
        if not behind:
            batch.due.append(delivery)
    columns = "id, public_id, event_id, destination, created_at, replay_of"
    transaction.insert("deliveries", columns, rows)
    columns = (
        "id, public_id, event_id, destination, created_at, size, replay_of, next_attempt_at, order_key,"
        " latest_key, expires_at, on_dead"
    )
    transaction.insert("pending_deliveries", columns, queued)


async def _settle(batch: Batch, transaction: Transaction) -> None:
    """Move deliveries from the queue to `ends`, if they are still pending. All outcomes here end one."""
    ended = {outcome.delivery.id: outcome for outcome in batch.outcomes}
    found = await transaction.fetch_rows(
        """
        WITH candidate (id) AS (VALUES {values})
        DELETE FROM pending_deliveries WHERE id IN (SELECT id FROM candidate) RETURNING id
        """,
        [(id_,) for id_ in ended],
    )
    batch.settled = frozenset(row[0] for row in found)
    columns = (
        "delivery_id, event_id, destination, state, reason, attempts, finished_at, last_status, last_error"
    )
    rows = []
    for id_ in sorted(batch.settled):
        outcome, attempt = ended[id_], ended[id_].attempt
        delivery = outcome.delivery
        rows.append(
            (
                id_, delivery.event_id, delivery.destination, outcome.state, outcome.reason,
                delivery.attempts + outcome.counts, batch.wall,
                attempt.status if attempt is not None else None,
                attempt.error if attempt is not None else outcome.reason,
            )
        )  # fmt: skip
    transaction.insert("ends", columns, rows)
    attempts = [
        attempt_row(outcome.delivery.id, outcome.attempt)
        for outcome in batch.outcomes
        if outcome.attempt is not None
    ]
    transaction.insert("attempts", ATTEMPT_COLUMNS, attempts)
    dead = [o for o in batch.outcomes if o.state == "dead" and o.delivery.id in batch.settled]
    freed = [o for o in batch.outcomes if o.state != "pending" and o.delivery.order_key is not None]
    if dead or freed:
        raise NotImplementedError


# --- measurements ---


async def begin(layout: OneTable, transaction: Transaction, keys: Sequence[Key], fan_out: int) -> Batch:
    """Return an empty batch that routes each event to `fan_out` destinations."""
    known = Keys()
    if keys:
        await commit.look_up(transaction, known, keys, CLOCK.steady())
    targets = tuple(Target(f"new-{number}") for number in range(fan_out))
    return Batch(
        clock=CLOCK,
        sequences=layout.sequences,
        route=lambda _event: targets,
        resolve=no_options,
        roster=Roster(),
        rules=lambda _source, _worker: WorkerRules(),
        keys=known,
        pending=Counter(),
    )


def acceptances(count: int) -> list[tuple[Acceptance, Key]]:
    """Return requests to store, each with its idempotency key."""
    made = []
    for _ in range(count):
        at = CLOCK.wall()
        name = new_id(EVENT, at)
        event = StoredEvent(
            id=0, public_id=name, source="shop", type="shop.t1", subject=name[-6:], received_at=at, data=BODY,
            context=b"{}", body=BODY, content_type="application/json", sha256=DIGEST,
        )  # fmt: skip
        key = Key("shop", name, identity(event, "/shop"), DIGEST)
        made.append((Acceptance(source="shop", event=event, key=name), key))
    return made


def groups(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[at : at + GROUP] for at in range(0, len(items), GROUP))


async def append(layout: OneTable, fan_out: int) -> tuple[float, list[Delivery]]:
    """Store events in groups; return CPU microseconds per event, and their deliveries."""
    made, deliveries = acceptances(GROUP * GROUPS), []
    began = time.process_time()
    for group in groups(made):
        transaction = Transaction(layout.connection)
        batch = await begin(layout, transaction, [key for _, key in group], fan_out)
        for acceptance, key in group:
            batch.accept(acceptance, key)
        await layout.write(batch, transaction)
        await transaction.commit()
        deliveries += batch.due
    return (time.process_time() - began) / len(made) * 1e6, deliveries


async def settle(layout: OneTable, deliveries: Sequence[Delivery]) -> float:
    """Record one successful attempt of each delivery in groups; return CPU microseconds per delivery."""
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=12.5, result="ok", status=200, answer=b"ok")
    outcomes = [Outcome(delivery=each, attempt=attempt, state="delivered") for each in deliveries]
    began = time.process_time()
    for group in groups(outcomes):
        transaction = Transaction(layout.connection)
        batch = await begin(layout, transaction, (), 0)
        batch.outcomes += group
        await layout.write(batch, transaction)
        await transaction.commit()
        if len(batch.settled) != len(group):
            raise RuntimeError(f"{layout.name}: {len(batch.settled)} of {len(group)} outcomes were recorded")
    return (time.process_time() - began) / len(deliveries) * 1e6


async def backlog(layout: OneTable) -> tuple[float, float]:
    """Claim and settle old deliveries; return CPU microseconds per claim, and per delivery settled."""
    claiming, settling = [], []
    for _ in range(CLAIMS):
        began = time.process_time()
        claimed = await layout.claim()
        claiming.append((time.process_time() - began) * 1e6)
        settling.append(await settle(layout, claimed))
        layout.claims.release(each.id for each in claimed)
    return statistics.median(claiming), statistics.median(settling)


async def page(layout: OneTable, name: str, before: int) -> Sequence[Any]:
    """Return the rows of one page of a list, before a row id; the layout's statements are in place."""
    kind, filters = LISTS[name]
    reader = SqliteReader(Database.reading(layout.path, layout.reader))
    return await PagedQueries(reader).find(kind, limit=PAGE, before=before, **filters)


async def lists(layout: OneTable, name: str) -> float:
    """Read pages of one list, spread over all of it; return CPU microseconds per page."""
    most = layout.rows if LISTS[name][0] == "events" else layout.rows * 2
    with layout.statements():
        began = time.process_time()
        for number in range(PLACES):
            await page(layout, name, most - most * number // PLACES + 1)
        return (time.process_time() - began) / PLACES * 1e6


async def delete(layout: OneTable, after: int, count: int) -> tuple[float, int]:
    """Look for old events and delete them; return CPU microseconds per event, and the last event's id."""
    began, deleted = time.process_time(), 0
    while deleted < count:
        values = (layout.sequences.event + 1, after + 1, DELETED)
        rows = list(await layout.reader.execute_fetchall(layout.candidates, values))
        if not rows:
            break
        candidates = [(row[0], 2**62) for row in rows if row[5] is None]
        transaction = Transaction(layout.connection)
        transaction.run(GIVEN_SQL)
        deletable = await transaction.fetch_rows(layout.deletable, candidates)
        for sql in layout.delete:
            transaction.run_rows(sql, deletable)
        await transaction.commit()
        if len(deletable) != len(rows):
            raise RuntimeError(f"{layout.name}: {len(deletable)} of {len(rows)} events were deleted")
        deleted, after = deleted + len(deletable), rows[-1][0]
    return (time.process_time() - began) / deleted * 1e6, after


async def build(layout: OneTable) -> None:
    """Create and fill the file."""
    await layout.open()
    with closing(sqlite3.connect(layout.path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -250000")
        layout.fill(database)
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await layout.open_reader()


async def same(ours: OneTable, theirs: OneTable) -> None:
    """Check that every list has the same rows in both layouts.

    Raises:
        RuntimeError: they differ, so the figures would compare different work.
    """
    for name in LISTS:
        for before in (ours.rows * 2, ours.rows):
            with ours.statements():
                rows = await page(ours, name, before)
            with theirs.statements():
                same_rows = rows == await page(theirs, name, before)
            if not same_rows:
                raise RuntimeError(f"the list {name!r} differs between the layouts")


Figures = dict[str, tuple[list[float], list[float]]]


async def one_round(layout: OneTable) -> dict[str, float]:
    """Measure everything but retention once."""
    found = {}
    for fan_out in (1, 3):
        appended, deliveries = await append(layout, fan_out)
        settled = await settle(layout, deliveries) * fan_out
        what = f"event with {fan_out} deliver{'y' if fan_out == 1 else 'ies'}"
        found[f"{what}: append"] = appended
        found[f"{what}: settle"] = settled
        found[f"{what}: both"] = appended + settled
    found[f"claim of {CLAIMED}"], found["settle a claimed delivery"] = await backlog(layout)
    for name in LISTS:
        found[f"list: {name}"] = await lists(layout, name)
    found["lists together"] = sum(value for name, value in found.items() if name.startswith("list: "))
    return found


async def measure(folder: Path, rows: int, rounds: int) -> None:
    """Build both files, measure in alternating rounds, and print the table."""
    one = OneTable(folder / "one.db", rows)
    queue = QueueTable(folder / "queue.db", rows, one.path)
    sides = (one, queue)
    try:
        for layout in sides:
            began = time.perf_counter()
            await build(layout)
            taken, size = time.perf_counter() - began, layout.path.stat().st_size / 2**20
            print(f"{layout.name}: filled in {taken:.0f} s, {size:,.1f} MiB", flush=True)
        await same(one, queue)
        report(await alternate(sides, rounds))
    finally:
        for layout in sides:
            await layout.close()


async def alternate(sides: Sequence[OneTable], rounds: int) -> Figures:
    """Measure the layouts in turn; which one begins changes from round to round."""
    figures: Figures = {}

    def note(layout: OneTable, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            figures.setdefault(name, ([], []))[sides.index(layout)].append(value)

    for number in range(rounds + 1):
        for layout in sides if number % 2 else reversed(sides):
            found = await one_round(layout)
            if number:  # the first one warms up
                note(layout, found)
    # Retention deletes all events that the rounds have added.
    after = {layout.name: layout.rows for layout in sides}
    for number in range(rounds):
        for layout in sides if number % 2 else reversed(sides):
            deleting, after[layout.name] = await delete(layout, after[layout.name], GROUP * GROUPS)
            note(layout, {"delete an old event": deleting})
    return figures


def report(figures: Figures) -> None:
    """Print medians and the ratio of each pair of rounds."""
    head = f"{'one table':>12}{'queue table':>14}{'ratio (min-max)':>22}"
    print(f"{'median CPU, microseconds':<40}{head}")
    worse = []
    for name, (ones, queues) in figures.items():
        ratios = [queue / one for one, queue in zip(ones, queues, strict=True)]
        ratio = statistics.median(ratios)
        spread = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:<40}{statistics.median(ones):>12,.0f}{statistics.median(queues):>14,.0f}{spread:>22}")
        if ratio > ALLOWED:
            worse.append(name)
    print(f"more than {ALLOWED - 1:.0%} slower with the queue table: {', '.join(worse) or 'nothing'}")


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, help="Events, and pending deliveries.")
@click.option("--rounds", default=15, show_default=True, help="Rounds per layout.")
def main(rows: int, rounds: int) -> None:
    """Compare one table of deliveries with a queue table beside insert-only tables."""
    with TemporaryDirectory(prefix="bench-") as name:
        print(f"SQLite {sqlite3.sqlite_version}, schema version {len(MIGRATIONS)}, {rows:,} rows", flush=True)
        run(measure(Path(name), rows, rounds))


if __name__ == "__main__":
    main()
