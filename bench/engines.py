"""The stores alone: CPU of one event with its deliveries in SQLite and in PostgreSQL, and in its server."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.loop import run as execute
from bench.postgres import Processes, server
from bench.report import table
from bench.rounds import Comparison, Measured, Plan, alternate_all
from relay.base.clock import SystemClock
from relay.base.ids import EVENT, new_id
from relay.model import Attempt, Delivery, News, Outcome, StoredEvent, Target
from relay.store import Acceptance, Store
from relay.store.opening import make_store

CLOCK = SystemClock()
BODY = b'{"id":"8b2f","total":45000.00,"items":[' + b",".join(b'{"sku":"A%d"}' % n for n in range(12)) + b"]}"
FAN_OUT = 3


@asynccontextmanager
async def opened(
    url: str, folder: Path, *, fan_out: int = FAN_OUT
) -> AsyncIterator[tuple[Store, list[Delivery]]]:
    """Open a store that collects its new deliveries, `fan_out` of each event."""
    fresh: list[Delivery] = []

    def listen(news: News) -> None:
        fresh.extend(news.deliveries)

    targets = tuple(Target(f"destination-{number}") for number in range(fan_out))
    store = make_store(url, folder, CLOCK, route=lambda _event: targets, listeners=[listen])
    await store.open()
    try:
        yield store, fresh
    finally:
        await store.close()


async def measure(url: str, server: Processes | None, events: int, callers: int) -> Measured:
    """Append events with an idempotency key each, and settle their deliveries, from many callers at once."""
    with TemporaryDirectory() as folder:
        async with opened(url, Path(folder)) as (store, fresh):
            await _work(store, fresh, callers * 4, callers)  # plans, caches, partitions

            def used() -> float:
                return 0.0 if server is None else server.cpu()

            began, process, other = time.perf_counter(), time.process_time(), used()
            await _work(store, fresh, events, callers)
            seconds, process, other = (
                time.perf_counter() - began,
                time.process_time() - process,
                used() - other,
            )
            ledger = await store.ledger.audit()
            assert all(counts.unaccounted == 0 for counts in ledger.values())
    return Measured(events=events, seconds=seconds, process=process, server=other)


async def _work(store: Store, fresh: list[Delivery], events: int, callers: int) -> None:
    waiting = iter(range(events))
    settling: set[asyncio.Task[bool]] = set()

    async def call() -> None:
        for _ in waiting:
            await store.events.append(acceptance())
            while fresh:
                task = asyncio.create_task(store.deliveries.settle(outcome(fresh.pop())))
                settling.add(task)
                task.add_done_callback(settling.discard)

    await asyncio.gather(*(call() for _ in range(callers)))
    while settling:
        await asyncio.gather(*settling)


def acceptance() -> Acceptance:
    """Return a new event with an idempotency key."""
    now = CLOCK.wall()
    public_id = new_id(EVENT, now)
    event = StoredEvent(
        id=0,
        public_id=public_id,
        source="shop",
        type="shop.order.created",
        subject="8b2f",
        received_at=now,
        data=BODY,
        context=b"{}",
        body=BODY,
        content_type="application/json",
        sha256=hashlib.sha256(BODY).digest(),
    )
    return Acceptance(source="shop", event=event, key=public_id, path="/in/shop")


def outcome(delivery: Delivery) -> Outcome:
    """Return the success of a delivery."""
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.5, result="ok", status=200, answer=b"ok")
    return Outcome(delivery=delivery, attempt=attempt, state="delivered")


async def run(plan: Plan, url: str | None = None) -> list[Comparison]:
    """Measure both engines; without the URL of a database, on a new server."""
    with server(url) as address:
        processes = await Processes.of(address)
        embedded, served = await alternate_all(
            plan,
            (
                lambda: measure("sqlite:relay.db", None, plan.requests, plan.connections),
                lambda: measure(address, processes, plan.requests, plan.connections),
            ),
        )
    title = f"the store alone: an event with {FAN_OUT} deliveries, appended and settled"
    return compare("store", title, "PostgreSQL", served, embedded, total=1 / 1.25, own=1 / 0.75)


def compare(
    name: str,
    title: str,
    us: str,
    ours: Sequence[Measured],
    embedded: Sequence[Measured],
    *,
    total: float | None = None,
    own: float | None = None,
) -> list[Comparison]:
    """Return two comparisons with SQLite: by the CPU of processes and server, and of the processes alone."""
    return [
        Comparison(
            name=f"{name}-{part}",
            title=f"{title}; CPU of {what}",
            us=us,
            rival="SQLite",
            target=target,
            is_of_cost=True,
            ours=tuple(getattr(each, part) for each in ours),
            theirs=tuple(getattr(each, part) for each in embedded),
        )
        for part, what, target in (
            ("total", "process and database server", total),
            ("own", "the process alone", own),
        )
    ]


@click.command()
@click.argument("url", required=False)
@click.option("--rounds", default=5, show_default=True, help="Rounds per engine.")
@click.option("--events", default=6000, show_default=True, help="Events per round.")
@click.option("--callers", default=64, show_default=True, help="Callers at once.")
def main(url: str | None, rounds: int, events: int, callers: int) -> None:
    """Compare SQLite with PostgreSQL: the database at URL, on this machine, or a server for this run."""
    for comparison in execute(run(Plan(rounds=rounds, requests=events, connections=callers), url)):
        print(table(comparison))


if __name__ == "__main__":
    main(prog_name="python -m bench.engines")
