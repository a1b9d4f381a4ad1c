"""Stores for tests, and builders of events, acceptances and outcomes."""

import hashlib
import os
import weakref
from contextlib import asynccontextmanager

from relay.base.ids import EVENT, new_id
from relay.model import Attempt, Outcome, StoredEvent, Target
from relay.store import Acceptance, opening

KINDS = tuple(os.environ.get("RELAY_TEST_STORES", "sqlite").split(","))
"""Engines that the tests of the store's contract run against."""

_HOOKS = weakref.WeakKeyDictionary()


class Hooks:
    """What a test's store calls. A test may change it at any time, unlike the daemon."""

    def __init__(self):
        self.route = opening.no_route
        self.resolve = opening.no_options
        self.rules = opening.default_rules
        self.listener = lambda _news: None

    def call_route(self, event):
        return self.route(event)

    def call_resolve(self, destination, event):
        return self.resolve(destination, event)

    def call_rules(self, source, worker_id):
        return self.rules(source, worker_id)

    def call_listener(self, news):
        self.listener(news)


def make_store(path, clock, *, kind=KINDS[0], on_fatal=lambda _why: None, **options):
    """Make a store of an engine; `hooks(store)` are the functions that it calls."""
    called = Hooks()
    store = opening.make_store(
        f"{kind}:{path.name}",
        path.parent,
        clock,
        route=called.call_route,
        resolve=called.call_resolve,
        rules=called.call_rules,
        listeners=[called.call_listener],
        on_fatal=on_fatal,
        **options,
    )
    _HOOKS[store] = called
    return store


def hooks(store):
    """Return the functions that a store of `make_store` calls."""
    return _HOOKS[store]


async def rows(store, sql, values=()):
    """Read rows behind the store's back."""
    return [tuple(row) for row in await store.database.reader.execute_fetchall(sql, values)]


async def change_rows(store, sql, values=()):
    """Change rows behind the store's back, with its writer's own connection."""
    await store.database.connection.execute(sql, values)


async def set_pragma(store, text):
    """Set a PRAGMA on the connection of the store's writer, such as `query_only = ON`."""
    await store.database.connection.execute(f"PRAGMA {text}")


async def call_writer(store, function):
    """Run a function on the writer's connection, in turn with the store's transactions."""
    return await store.database.writer.call(function)


def queued(store):
    """Return the number of requests that wait for a commit."""
    return len(store.database.writer._jobs)


def fail_writes(store, why):
    """Let the store act as if writes failed for a reason; None: they work again."""
    store.database.writer._set_failure(why)


@asynccontextmanager
async def opened(path, clock):
    """Open a store with two destinations; at the end, check its ledger and its foreign keys."""
    store = make_store(path, clock)
    hooks(store).route = lambda event: () if event.source == "relay" else (Target("crm"), Target("erp"))
    store.fresh, store.news = [], []

    def listen(news):
        store.news.append(news)
        store.fresh.extend(news.deliveries)

    hooks(store).listener = listen
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    assert not await store.database.reader.execute_fetchall("PRAGMA foreign_key_check")
    await store.close()


def make_event(clock=None, body=b'{"n": 1}', **fields):
    """Build an event; without a clock, its id and time are fixed."""
    public_id, now = "evt_018bcfe5-6800-7000-8000-000000000001", 1_700_000_000_123_456
    if clock is not None:
        public_id, now = new_id(EVENT, clock.wall()), clock.wall()
    full_type = fields.get("type", "shop.order")
    return StoredEvent(
        **{
            "id": 0,
            "public_id": public_id,
            "source": full_type.partition(".")[0],
            "type": full_type,
            "subject": "a",
            "received_at": now,
            "data": body,
            "context": b"{}",
            "body": body,
            "content_type": "application/json",
            "sha256": hashlib.sha256(body).digest(),
            **fields,
        }
    )


def accept(clock, body=b'{"n": 1}', *, key=None, change=None, **fields):
    """Build the acceptance of one event."""
    event = make_event(clock, body, **fields)
    return Acceptance(source=event.source, event=event, key=key, change=change)


async def send(store, clock, *, key=None, **fields):
    """Append one event and return the stored event."""
    accepted = accept(clock, key=key, **fields)
    await store.events.append(accepted)
    event = accepted.event
    stored = (each for news in reversed(store.news) for each in news.events)
    return next((each for each in stored if each.public_id == event.public_id), event)


async def end(store, event, state="delivered", destination=None):
    """End the deliveries of an event, or only the one to `destination`."""
    for delivery in store.fresh:
        if delivery.event_id == event.id and destination in (None, delivery.destination):
            attempt = Attempt(started_at=event.received_at, duration_ms=1.0, result="ok", status=200)
            await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state=state))


async def ids(store):
    """Return the row ids of all events."""
    return [
        row[0] for row in await store.database.reader.execute_fetchall("SELECT id FROM events ORDER BY id")
    ]


async def count_rows(store, table):
    [(count,)] = await store.database.reader.execute_fetchall(f"SELECT count(*) FROM {table}")
    return count
