"""SQLite, and 1, 2 and 3 nodes on PostgreSQL: throughput, and CPU of daemons and database server."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import asyncpg
import msgspec

from bench import engines
from bench.load import send
from bench.postgres import Processes, server
from bench.processes import Server, python
from bench.rounds import Comparison, Measured, Plan, alternate_all
from bench.subject import TYPES, relay, request

NODES = (1, 2, 3)
REQUESTS = tuple(request(type_=each) for each in TYPES)
LEASE = 5  # seconds; a node that joins gets its share of the lanes after this time
_DEADLINE = 120.0  # seconds for the last delivery of a round to be recorded
_LOOK = 0.02  # seconds between two reads of the ledger, which cost the database server CPU as well
_SETTLED = 3.0  # seconds without a lane that moves
_DESTINATION = """\
[destinations.{type}]
url = "{url}/hook"
events = ["moddy.{type}"]
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
allow_private = true
timeout = "2s"
concurrency = 64
"""


class Ledger(Protocol):
    """Where a side's finished deliveries are counted."""

    async def delivered(self) -> int:
        """Return the number of deliveries that have been delivered so far."""
        ...


class Side(msgspec.Struct, frozen=True):
    """The daemons of one side, each with the same destinations, and their database."""

    daemons: Sequence[Server]
    ledger: Ledger
    database: Processes | None  # None: it is in the daemon

    async def round(self, plan: Plan) -> Measured:
        """Send events to all daemons at once, and wait until the ledger counts them as delivered."""
        count, connections = plan.requests // len(self.daemons), plan.connections // len(self.daemons)
        wanted = await self.ledger.delivered() + count * len(self.daemons)
        daemons, database = self._daemon_cpu(), self._database_cpu()
        sending = [
            send(each.address, *REQUESTS, count=count, connections=connections) for each in self.daemons
        ]
        began = min(await asyncio.gather(*sending))
        async with asyncio.timeout(_DEADLINE):
            while await self.ledger.delivered() < wanted:  # noqa: ASYNC110 - another process's progress
                await asyncio.sleep(_LOOK)
        return Measured(
            events=count * len(self.daemons),
            seconds=time.perf_counter() - began,
            process=self._daemon_cpu() - daemons,
            server=self._database_cpu() - database,
        )

    def _daemon_cpu(self) -> float:
        return sum(each.cpu() for each in self.daemons)

    def _database_cpu(self) -> float:
        return 0.0 if self.database is None else self.database.cpu()


async def run(plan: Plan, nodes: Sequence[int] = NODES, url: str | None = None) -> list[Comparison]:
    """Measure the stores alone, then whole daemons; SQLite is the other side of each comparison.

    `url` is an empty database for one number of nodes; without it, each number has a new server.
    """
    found = await engines.run(plan, url)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        receiver = await stack.enter_async_context(
            python(folder / "receiver.log", "-m", "bench.serve", "receiver")
        )
        sides = [await stack.enter_async_context(_sqlite(folder / "sqlite", receiver.url))]
        for count in nodes:
            side = _postgres(folder / f"nodes-{count}", receiver.url, count, url)
            sides.append(await stack.enter_async_context(side))
        embedded, *clusters = await alternate_all(plan, [partial(each.round, plan) for each in sides])
    for count, rounds in zip(nodes, clusters, strict=True):
        us = f"{count} node{'s' if count > 1 else ''}, PostgreSQL"
        title = "events from the first byte in to the recorded answer of one of five destinations"
        found += engines.compare(f"cluster-{count}", title, us, rounds, embedded)
    return found


# --- sides ---


class _File(msgspec.Struct, frozen=True):
    connection: sqlite3.Connection

    async def delivered(self) -> int:
        """See `Ledger.delivered`."""
        [(count,)] = self.connection.execute("SELECT coalesce(sum(delivered), 0) FROM ledger")
        return int(count)


class _Table(msgspec.Struct, frozen=True):
    connection: asyncpg.Connection

    async def delivered(self) -> int:
        """See `Ledger.delivered`."""
        return int(
            await self.connection.fetchval("SELECT coalesce(sum(delivered), 0)::bigint FROM public.ledger")
        )


@asynccontextmanager
async def _sqlite(folder: Path, receiver: str) -> AsyncIterator[Side]:
    async with relay(_made(folder), more=_destinations(receiver)) as daemon:
        with closing(sqlite3.connect(f"{(folder / 'relay.db').as_uri()}?mode=ro", uri=True)) as reader:
            yield Side([daemon], _File(reader), None)


@asynccontextmanager
async def _postgres(folder: Path, receiver: str, count: int, url: str | None) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        url = stack.enter_context(server(url))
        daemons = []
        for number in range(count):
            more = _destinations(receiver)
            if count > 1:
                more += f'[cluster]\nnode = "{number}"\nlease = "{LEASE}s"\n'
            daemons.append(
                await stack.enter_async_context(
                    relay(_made(folder / str(number)), more=more, storage=f'url = "{url}"')
                )
            )
        connection = await asyncpg.connect(url)
        stack.push_async_callback(connection.close)
        if count > 1:
            await _settled(connection)
        yield Side(daemons, _Table(connection), await Processes.of(url))


async def _settled(connection: asyncpg.Connection) -> None:
    """Wait until each node has its share of the lanes."""
    sql = "SELECT name, epoch FROM leases WHERE name LIKE 'lane:%' ORDER BY name"
    before, since = None, time.monotonic()
    async with asyncio.timeout(_DEADLINE):
        while time.monotonic() - since < LEASE + _SETTLED:
            found = await connection.fetch(sql)
            if found != before:
                before, since = found, time.monotonic()
            await asyncio.sleep(0.5)


def _destinations(receiver: str) -> str:
    return "".join(_DESTINATION.format(type=type_, url=receiver) for type_ in TYPES)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
