"""SQLite, and 1, 2 and 3 nodes on PostgreSQL: throughput, CPU of daemons and database server, latency."""

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
from bench.retention import latencies, percentile
from bench.rounds import Comparison, Measured, Plan, Round, alternate_all
from bench.subject import TYPES, relay, request
from relay.store.postgres.leases import LANE, Peer, due_to

NODES = (1, 2, 3)
REQUESTS = tuple(request(type_=each) for each in TYPES)
LEASE = 5  # seconds; a node that joins gets its share of the lanes after this time
PACE = 200.0  # events per second while latencies are measured
PACED = 5.0  # seconds of one such round
_DEADLINE = 120.0  # seconds for the last delivery of a round to be recorded
_LOOK = 0.02  # seconds between two reads of the ledger, which cost the database server CPU as well
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


class Paced(msgspec.Struct, frozen=True):
    """One round at a steady rate: lanes on other nodes, and lanes on the node that accepted the event."""

    elsewhere: Round
    here: Round


class Side(msgspec.Struct, frozen=True):
    """The daemons of one side, each with the same destinations, and their database."""

    daemons: Sequence[Server]
    ledger: Ledger
    database: Processes | None  # None: it is in the daemon

    async def round(self, plan: Plan) -> Measured:
        """Send events to all daemons at once, and wait until the ledger counts them as delivered."""
        count, connections = plan.requests // len(self.daemons), plan.connections // len(self.daemons)
        wanted = await self.ledger.delivered() + count * len(self.daemons)
        daemons, main, database = self._daemon_cpu(), self._main_cpu(), self._database_cpu()
        sending = [
            send(each.address, *REQUESTS, count=count, connections=connections) for each in self.daemons
        ]
        began = min(await asyncio.gather(*sending))
        await self._delivered(wanted)
        return Measured(
            events=count * len(self.daemons),
            seconds=time.perf_counter() - began,
            process=self._daemon_cpu() - daemons,
            main=self._main_cpu() - main,
            server=self._database_cpu() - database,
        )

    async def paced(self) -> Paced:
        """Send events at a rate below the machine's limit, and read their latencies from the database."""
        assert isinstance(self.ledger, _Table)
        latest, before = await self.ledger.latest(), await self.ledger.delivered()
        began, cpu = time.perf_counter(), self._daemon_cpu() + self._database_cpu()
        sending = [
            latencies(
                each,
                lambda: time.perf_counter() < began + PACED,
                PACE / len(self.daemons),
                [*REQUESTS[number:], *REQUESTS[:number]],
            )
            for number, each in enumerate(self.daemons)
        ]
        count = sum(map(len, await asyncio.gather(*sending)))
        await self._delivered(before + count)
        seconds, cpu = time.perf_counter() - began, self._daemon_cpu() + self._database_cpu() - cpu
        here, elsewhere = await self.ledger.latencies(latest)
        shares = [
            Round(len(found), seconds, cpu * len(found) / count, percentile(found, 99))
            for found in (elsewhere, here)
        ]
        return Paced(*shares)

    async def _delivered(self, wanted: int) -> None:
        """Wait until the ledger counts `wanted` delivered deliveries."""
        async with asyncio.timeout(_DEADLINE):
            while await self.ledger.delivered() < wanted:  # noqa: ASYNC110 - another process's progress
                await asyncio.sleep(_LOOK)

    def _daemon_cpu(self) -> float:
        return sum(each.cpu() for each in self.daemons)

    def _main_cpu(self) -> float:
        return sum(each.main_thread_cpu() for each in self.daemons)

    def _database_cpu(self) -> float:
        return 0.0 if self.database is None else self.database.cpu()


async def run(plan: Plan, nodes: Sequence[int] = NODES, url: str | None = None) -> list[Comparison]:
    """Measure the stores alone, then whole daemons; SQLite is the baseline.

    Then compare the latency of lanes on other nodes with that of lanes on the node that accepts the event.
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
        shared = [each for each in sides if len(each.daemons) > 1]
        paced = await alternate_all(plan, [each.paced for each in shared])
    for count, rounds in zip(nodes, clusters, strict=True):
        us = f"{count} node{'s' if count > 1 else ''}, PostgreSQL"
        title = "events from the first byte in to the recorded answer of one of five destinations"
        found += engines.compare(f"cluster-{count}", title, us, rounds, embedded)
    found.append(_limit(embedded))
    return found + [_latency(len(side.daemons), each) for side, each in zip(shared, paced, strict=True)]


def _limit(embedded: Sequence[Measured]) -> Comparison:
    """Return the ratio that a node would reach with a store that cost no CPU outside the event loop."""
    return Comparison(
        name="cluster-limit",
        title="the daemon with SQLite, without the thread that runs its statements",
        us="main thread",
        rival="process",
        target=None,
        ours=tuple(each.loop for each in embedded),
        theirs=tuple(each.own for each in embedded),
    )


def _latency(count: int, rounds: Sequence[Paced]) -> Comparison:
    return Comparison(
        name=f"cluster-{count}-latency",
        title=f"{PACE:.0f} events/s at {count} nodes, from acceptance to the recorded answer; CPU in total",
        us="lane on another node",
        rival="lane on the same node",
        target=None,
        ours=tuple(each.elsewhere for each in rounds),
        theirs=tuple(each.here for each in rounds),
    )


# --- sides ---

# The lowest byte of a row id is the slot of the node that accepted the event.
_LATENCY_SQL = """
    SELECT (e.finished_at - d.created_at) / 1000.0::float8, n.slot = d.id & 255
      FROM deliveries AS d
      JOIN ends AS e ON e.delivery_id = d.id
      JOIN leases AS l ON l.name = 'lane:' || d.destination
      JOIN nodes AS n ON n.incarnation = l.incarnation
     WHERE d.created_at > $1
"""


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

    async def latest(self) -> int:
        """Return the time of the latest delivery so far, in microseconds since the Unix epoch."""
        return int(await self.connection.fetchval("SELECT coalesce(max(created_at), 0) FROM deliveries"))

    async def latencies(self, since: int) -> tuple[list[float], list[float]]:
        """Return the latencies of later deliveries in ms: lanes on the accepting node, and on others."""
        rows = await self.connection.fetch(_LATENCY_SQL, since)
        here, elsewhere = [[ms for ms, there in rows if there is one] for one in (True, False)]
        return here, elsewhere


@asynccontextmanager
async def _sqlite(folder: Path, receiver: str) -> AsyncIterator[Side]:
    async with relay(_made(folder), more=_destinations(receiver)) as daemon:
        with closing(sqlite3.connect(f"{(folder / 'relay.db').as_uri()}?mode=ro", uri=True)) as reader:
            yield Side([daemon], _File(reader), None)


@asynccontextmanager
async def _postgres(folder: Path, receiver: str, count: int, url: str | None) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        url = stack.enter_context(server(url))
        starting = []
        for number in range(count):  # concurrently, so that each takes its share of the lanes at its start
            more = _destinations(receiver)
            if count > 1:
                more += f'[cluster]\nnode = "{number}"\nlease = "{LEASE}s"\n'
            starting.append(relay(_made(folder / str(number)), more=more, storage=f'url = "{url}"'))
        daemons = await asyncio.gather(*map(stack.enter_async_context, starting))
        connection = await asyncpg.connect(url)
        stack.push_async_callback(connection.close)
        if count > 1:
            await _settled(connection, count)
        yield Side(daemons, _Table(connection), await Processes.of(url))


async def _settled(connection: asyncpg.Connection, count: int) -> None:
    """Wait until each node has its share of the lanes."""
    live = f"SELECT incarnation::text FROM nodes WHERE seen > clock_timestamp() - interval '{LEASE} seconds'"
    held = "SELECT name, incarnation::text FROM leases WHERE name LIKE 'lane:%' AND until > clock_timestamp()"
    async with asyncio.timeout(_DEADLINE):
        while True:
            peers = [Peer(id_, "", 0.0, frozenset(TYPES)) for (id_,) in await connection.fetch(live)]
            lanes = dict(map(tuple, await connection.fetch(held)))
            due = {name: due_to(name, peers) for name in map(LANE.__add__, TYPES)}
            owners = {name: None if peer is None else peer.incarnation for name, peer in due.items()}
            if len(peers) == count and lanes == owners:
                return
            await asyncio.sleep(0.2)


def _destinations(receiver: str) -> str:
    return "".join(_DESTINATION.format(type=type_, url=receiver) for type_ in TYPES)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
