"""Time of claims from a PostgreSQL store with a large backlog, while deliveries end and new events arrive."""

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import click

from bench.engines import CLOCK, acceptance, opened, outcome
from bench.loop import run
from bench.postgres import Processes, execute, server
from relay.base.shards import Shards
from relay.model import Delivery
from relay.store import Store
from relay.store.postgres.rows import EPOCH
from relay.store.postgres.shards import SLOT_SQL

TARGET = 0.005
"""Seconds for 99 of 100 claims."""

AT_ONCE = 128  # deliveries of one claim
PARTS = 5  # of the time; each has its own line
NAME = "destination-0"

# Pending deliveries that were due in the last minute, in the order of their row ids.
_PENDING_SQL = f"""
    WITH drawn AS (
         SELECT (({{now}} - {EPOCH}) / 1000 - 3600000 << 22) + i * 256 AS id, i,
                {{now}} - 60000000 + i * 60000000 / {{count}} AS at,
                lpad(to_hex(i), 32, '0')::uuid AS public_id
           FROM generate_series(1, {{count}}::bigint) AS i),
    events AS (
         INSERT INTO events (id, public_id, source, type, subject, received_at, content_type, sha256, size,
                             context, data_at, data_size, body)
         SELECT id, public_id, 'shop', 'shop.order.created', 's', at, 'application/json', '\\\\x00', 2,
                '\\\\x7b7d', 0, 2, '\\\\x7b7d' FROM drawn),
    deliveries AS (
         INSERT INTO deliveries (id, public_id, event_id, destination, created_at)
         SELECT id, public_id, id, '{NAME}', at FROM drawn),
    ledger AS (
         INSERT INTO ledger VALUES (255, '{NAME}', {{count}}, 0, 0, 0, 0))
    INSERT INTO owed (id, public_id, event_id, destination, attempts, created_at, size, next_attempt_at)
    SELECT id, public_id, id, '{NAME}', 0, at, 2, at FROM drawn
"""


async def measure(url: str, pending: int, seconds: float, shards: Shards | None = None) -> bool:
    """Measure without and with an old snapshot; returns whether all parts met the target.

    With `shards`, the deliveries get slots first, and only those of the shards are claimed.
    """
    met = True
    with TemporaryDirectory() as folder:
        async with opened(url, Path(folder), fan_out=1) as (store, fresh):
            await execute(url, _PENDING_SQL.format(now=CLOCK.wall() - 1_000_000, count=pending))
            if shards is not None:
                began = time.perf_counter()
                await execute(url, f"UPDATE owed SET slot = {SLOT_SQL}")
                print(f"slots for all in {time.perf_counter() - began:.0f} s", flush=True)
            await execute(url, "VACUUM ANALYZE")
            server = await Processes.of(url)
            print(f"{pending:,} pending deliveries, {AT_ONCE} in a claim", flush=True)
            met &= await _phase("no snapshot", store, fresh, server, seconds, shards=shards)
            connection = await asyncpg.connect(url)
            try:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    await connection.fetchval("SELECT count(*) FROM events WHERE id = 0")
                    met &= await _phase("a held snapshot", store, fresh, server, seconds, shards=shards)
            finally:
                await connection.close()
            ledger = await store.ledger.audit()
            assert all(counts.unaccounted == 0 for counts in ledger.values())
    return met


async def _phase(
    what: str,
    store: Store,
    fresh: list[Delivery],
    server: Processes,
    seconds: float,
    *,
    shards: Shards | None,
) -> bool:
    """Claim, end as many deliveries, and accept as many new events, which find no room in the lane."""
    met, began = True, time.perf_counter()
    for part in range(1, PARTS + 1):
        taken: list[float] = []
        used: list[float] = []
        while not taken or time.perf_counter() < began + seconds * part / PARTS:
            cpu = time.process_time() + server.cpu()
            now = time.perf_counter()
            claim = await store.deliveries.claim(NAME, AT_ONCE, retries=False, shards=shards)
            taken.append(time.perf_counter() - now)
            used.append(time.process_time() + server.cpu() - cpu)
            await asyncio.gather(
                *(store.events.append(acceptance()) for _ in claim.deliveries),
                *(store.deliveries.settle(outcome(each)) for each in claim.deliveries),
            )
            store.deliveries.release(each.id for each in fresh)
            fresh.clear()
        met &= _percentile(taken, 99) <= TARGET
        figures = ", ".join(
            f"{name} p50 {_percentile(each, 50) * 1e3:.1f} ms, p99 {_percentile(each, 99) * 1e3:.1f} ms"
            for name, each in (("time", taken), ("CPU", used))
        )
        print(f"  {what}, part {part} of {PARTS}: {len(taken)} claims, {figures}", flush=True)
    return met


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100]


@click.command()
@click.argument("url", required=False)
@click.option("--pending", default=1_000_000, show_default=True, help="Pending deliveries.")
@click.option("--seconds", default=30.0, show_default=True, help="Duration without, and with a snapshot.")
@click.option("--half", is_flag=True, help="Claim one of two shards.")
def main(url: str | None, pending: int, seconds: float, *, half: bool) -> None:
    """Time claims in the empty PostgreSQL database at URL, or on a server for this run."""
    shards = Shards(2, frozenset({0})) if half else None
    with server(url) as address:
        met = run(measure(address, pending, seconds, shards))
    print(f"target {TARGET * 1e3:.0f} ms for p99: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main(prog_name="python -m bench.claims")
