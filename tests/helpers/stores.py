"""A store whose events are owed to two destinations, and what tests of its upkeep do with it."""

import hashlib
from contextlib import asynccontextmanager

from relay.base.ids import event_id
from relay.model import Attempt, Outcome, Owed, StoredEvent
from relay.store import Acceptance
from relay.store.sqlite import SqliteStore


@asynccontextmanager
async def opened(path, clock):
    """Open a store; at the end its books must balance and no row may point to one that is gone."""
    store = SqliteStore(path, clock)
    store.route = lambda event: () if event.source == "relay" else (Owed("crm"), Owed("erp"))
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    store.listener = listen
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    assert not await store.database.reader.execute_fetchall("PRAGMA foreign_key_check")
    await store.close()


def make_event(clock, body=b'{"n": 1}', **fields):
    full_type = fields.get("type", "shop.order")
    return StoredEvent(
        **{
            "id": 0,
            "public_id": event_id(clock.wall()),
            "source": full_type.partition(".")[0],
            "type": full_type,
            "subject": "a",
            "received_at": clock.wall(),
            "data": body,
            "context": b"{}",
            "body": body,
            "content_type": "application/json",
            "sha256": hashlib.sha256(body).digest(),
            **fields,
        }
    )


async def send(store, clock, *, key=None, **fields):
    """Append one event; return it as it was stored."""
    event = make_event(clock, **fields)
    await store.events.append(Acceptance(source=event.source, event=event, key=key))
    stored = (each for news in reversed(store.news) for each in news.events)
    return next((each for each in stored if each.public_id == event.public_id), event)


async def end(store, event, state="delivered", destination=None):
    """End an event's deliveries, or the one to a destination."""
    for delivery in store.fresh:
        if delivery.event_id == event.id and destination in (None, delivery.destination):
            attempt = Attempt(started_at=event.received_at, duration_ms=1.0, result="ok", status=200)
            await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state=state))


async def ids(store):
    """Return the row ids of all events."""
    return [
        row[0] for row in await store.database.reader.execute_fetchall("SELECT id FROM events ORDER BY id")
    ]


async def rows(store, table):
    [(count,)] = await store.database.reader.execute_fetchall(f"SELECT count(*) FROM {table}")
    return count
