"""Delivery to one destination, from the first byte to the recorded response, compared with a proxy."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.load import send
from bench.processes import Server, python
from bench.rounds import Comparison, Plan, Round, alternate
from bench.subject import PATH, REQUEST, relay

_DEADLINE = 120.0  # seconds for the last delivery of a round to be recorded


async def run(plan: Plan) -> list[Comparison]:
    """Measure the relay and the proxy."""
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with python(folder / "receiver.log", "-m", "bench.serve", "receiver") as receiver:
            rival = ("-m", "bench.serve", "proxy", PATH, f"{receiver.url}/hook")
            async with (
                relay(folder, receiver.url) as ours,
                python(folder / "bare.log", *rival) as theirs,
            ):
                mine, others = await alternate(
                    plan,
                    lambda: relay_round(plan, ours, folder / "relay.db"),
                    lambda: _proxy_round(plan, theirs),
                )
    return [
        Comparison(
            name="relay",
            title="events from the first byte in to the recorded answer of one destination",
            rival="bare aiohttp proxy",
            target=0.75,
            ours=mine,
            theirs=others,
        )
    ]


async def relay_round(plan: Plan, server: Server, database: Path) -> Round:
    """Send events, then wait until the ledger counts them as delivered, read here from the database file."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as reader:
        wanted = _delivered(reader) + plan.requests
        cpu = server.cpu()
        began = await send(server.address, REQUEST, count=plan.requests, connections=plan.connections)
        async with asyncio.timeout(_DEADLINE):
            while _delivered(reader) < wanted:  # noqa: ASYNC110 - another process's progress
                await asyncio.sleep(0.002)
        seconds, cpu = time.perf_counter() - began, server.cpu() - cpu
        return Round(plan.requests, seconds, cpu, _p99(reader, plan.requests))


async def _proxy_round(plan: Plan, server: Server) -> Round:
    cpu = server.cpu()
    began = await send(server.address, REQUEST, count=plan.requests, connections=plan.connections)
    return Round(plan.requests, time.perf_counter() - began, server.cpu() - cpu)


def _delivered(database: sqlite3.Connection) -> int:
    row = database.execute("SELECT delivered FROM ledger WHERE destination = 'bench'").fetchone()
    return int(row[0]) if row else 0


def _p99(database: sqlite3.Connection, newest: int) -> float:
    """Return the 99th percentile of the latest deliveries' time from creation to recorded response, in ms."""
    rows = database.execute(
        """
        SELECT finished_at - created_at FROM deliveries
         WHERE destination = 'bench' AND state = 'delivered' ORDER BY id DESC LIMIT ?
        """,
        (newest,),
    )
    delays = sorted(row[0] for row in rows)
    return float(delays[len(delays) * 99 // 100]) / 1000
