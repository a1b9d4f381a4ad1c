"""CPU of one event with its deliveries in each store engine, in the process and in the database server."""

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec

from bench.loop import run
from relay.base.clock import SystemClock
from relay.base.ids import EVENT, new_id
from relay.model import Attempt, Delivery, News, Outcome, StoredEvent, Target
from relay.store import Acceptance, Store
from relay.store.opening import make_store

CLOCK = SystemClock()
BODY = b'{"id":"8b2f","total":45000.00,"items":[' + b",".join(b'{"sku":"A%d"}' % n for n in range(12)) + b"]}"
FAN_OUT = 3
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Cost(msgspec.Struct, frozen=True):
    """One round of one engine: microseconds of CPU per event with its deliveries, and events per second."""

    process: float
    server: float
    rate: float

    @property
    def total(self) -> float:
        """CPU of both."""
        return self.process + self.server


def server_cpu(pids: list[int]) -> float:
    """Return the seconds of CPU that processes of this machine have used so far."""
    used = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        used += int(fields[11]) + int(fields[12])
    return used * _TICK


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[tuple[Store, list[Delivery]]]:
    """Open a store that collects its new deliveries."""
    fresh: list[Delivery] = []

    def listen(news: News) -> None:
        fresh.extend(news.deliveries)

    targets = tuple(Target(f"destination-{number}") for number in range(FAN_OUT))
    store = make_store(url, folder, CLOCK, route=lambda _event: targets, listeners=[listen])
    await store.open()
    try:
        yield store, fresh
    finally:
        await store.close()


async def pids_of(store: Store) -> list[int]:
    """Return the processes of the server of a store."""
    database = getattr(store, "database")  # noqa: B009 - not part of the interface
    if not hasattr(database, "address"):
        return []
    rows = await database.fetch("SELECT pid FROM pg_stat_activity")
    return [pid for (pid,) in rows]


async def measure(url: str, events: int, callers: int) -> Cost:
    """Append events with an idempotency key each, and settle their deliveries, from many callers at once."""
    with TemporaryDirectory() as folder:
        async with opened(url, Path(folder)) as (store, fresh):
            await _work(store, fresh, callers * 4, callers)  # plans, caches, partitions
            pids = await pids_of(store)
            began, process, server = time.perf_counter(), time.process_time(), server_cpu(pids)
            await _work(store, fresh, events, callers)
            seconds, process = time.perf_counter() - began, time.process_time() - process
            server = server_cpu(pids) - server
            ledger = await store.ledger.audit()
            assert all(counts.unaccounted == 0 for counts in ledger.values())
    return Cost(process / events * 1e6, server / events * 1e6, events / seconds)


async def _work(store: Store, fresh: list[Delivery], events: int, callers: int) -> None:
    waiting = iter(range(events))
    settling: set[asyncio.Task[bool]] = set()

    async def call() -> None:
        for _ in waiting:
            await store.events.append(_acceptance())
            while fresh:
                task = asyncio.create_task(store.deliveries.settle(_outcome(fresh.pop())))
                settling.add(task)
                task.add_done_callback(settling.discard)

    await asyncio.gather(*(call() for _ in range(callers)))
    while settling:
        await asyncio.gather(*settling)


def _acceptance() -> Acceptance:
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


def _outcome(delivery: Delivery) -> Outcome:
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.5, result="ok", status=200, answer=b"ok")
    return Outcome(delivery=delivery, attempt=attempt, state="delivered")


async def compare(url: str, rounds: int, events: int, callers: int) -> dict[str, list[Cost]]:
    """Measure both engines in alternating rounds."""
    found: dict[str, list[Cost]] = {"sqlite": [], "postgresql": []}
    for _ in range(rounds):
        for name, each in (("sqlite", "sqlite:relay.db"), ("postgresql", url)):
            found[name].append(await measure(each, events, callers))
    return found


@click.command()
@click.argument("url")
@click.option("--rounds", default=5, show_default=True, help="Rounds per engine.")
@click.option("--events", default=6000, show_default=True, help="Events per round.")
@click.option("--callers", default=64, show_default=True, help="Callers at once.")
def main(url: str, rounds: int, events: int, callers: int) -> None:
    """Compare SQLite with the PostgreSQL database at URL, whose server must run on this machine."""
    found = run(compare(url, rounds, events, callers))
    for name, costs in found.items():
        process, server, rate = (
            statistics.median(getattr(cost, field) for cost in costs)
            for field in ("process", "server", "rate")
        )
        print(f"{name:<11} process {process:6.0f} µs  server {server:6.0f} µs  {rate:7.0f} events/s")
    pairs = list(zip(found["postgresql"], found["sqlite"], strict=True))
    total = statistics.median(ours.total / theirs.total for ours, theirs in pairs)
    process = statistics.median(ours.process / theirs.process for ours, theirs in pairs)
    print(f"PostgreSQL / SQLite: {total:.2f} of the CPU in total, {process:.2f} in the process")


if __name__ == "__main__":
    main(prog_name="python -m bench.engines")
