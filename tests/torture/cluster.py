"""Nodes of a cluster are killed, stopped and frozen under load: nothing acknowledged is lost, all arrives.

Run `python -m tests.torture.cluster --cycles 50`. It starts a PostgreSQL server without fsync.
"""

import asyncio
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import asyncpg
import click
from aiohttp import web
from daemons import HEAD, Daemon, adorn, destination
from postgres import start
from wire import Wire, request

from relay.store.postgres.nodes import Peer, due_to

LEASE = 3.0  # seconds
MARGIN = 2.0  # seconds beyond the lease within which a lane resumes
LANES = tuple(f"d{number}" for number in range(6))
CONCURRENCY = 4
SENDERS = 3
PAUSE = 0.02  # seconds between two events of a sender
ANSWER = 0.01  # seconds until the receiver answers
LOAD = 0.5  # seconds of load before and after an action
DRAIN = 60.0  # seconds for the cluster to deliver what is left

ACTIONS = ("kill", "stop", "freeze")


@dataclass
class Toll:
    """What the actions cost."""

    cycles: int = 0
    acknowledged: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)  # acknowledged, and not in the database
    undelivered: set[tuple[str, str]] = field(default_factory=set)  # destination and event
    unaccounted: int = 0
    most_at_once: int = 0  # requests to one destination
    most_repeated: int = 0  # deliveries made again in one cycle
    longest_pause: float = 0.0  # of a lane, in seconds
    pauses: dict[str, float] = field(default_factory=dict)  # the longest of each action

    def faults(self, limit: int) -> list[str]:
        """Return the promises that were broken; `limit` is how many requests may be in flight at a freeze."""
        found = []
        if self.lost:
            found.append(f"{len(self.lost)} acknowledged events are lost")
        if self.undelivered:
            found.append(f"{len(self.undelivered)} deliveries never arrived")
        if self.unaccounted:
            found.append(f"{self.unaccounted} deliveries are unaccounted for")
        if self.most_at_once > limit:
            found.append(f"{self.most_at_once} requests at once to one destination, more than {limit}")
        if self.most_repeated > CONCURRENCY * len(LANES):
            found.append(f"{self.most_repeated} deliveries were repeated in one cycle")
        if self.longest_pause > LEASE + MARGIN:
            found.append(f"a lane paused for {self.longest_pause:.1f} s, more than {LEASE + MARGIN} s")
        return found

    def __str__(self) -> str:
        pauses = ", ".join(f"{action} {seconds:.2f} s" for action, seconds in sorted(self.pauses.items()))
        return (
            f"{self.cycles} cycles: {len(self.acknowledged)} acknowledged, {len(self.lost)} lost, "
            f"{len(self.undelivered)} undelivered, {self.unaccounted} unaccounted, at most "
            f"{self.most_at_once} at once, at most {self.most_repeated} repeated in a cycle; "
            f"longest pauses: {pauses}"
        )


class Receiver:
    """Receives the deliveries of all lanes; the path of a request is its destination."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # by destination and event
        self.times: dict[str, list[float]] = {name: [] for name in LANES}  # of arrivals
        self.busy: Counter[str] = Counter()
        self.most_at_once = 0

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def repeated(self) -> int:
        """How many arrivals were not the first of their delivery."""
        return self.counts.total() - len(self.counts)

    def longest_pause(self, since: float, until: float) -> float:
        """Return the longest time between two arrivals of a lane, within a span."""
        longest = 0.0
        for times in self.times.values():
            moments = [since, *(moment for moment in times if since < moment < until), until]
            longest = max(longest, *(after - before for before, after in itertools.pairwise(moments)))
        return longest

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        name = request.path.strip("/")
        self.counts[name, request.headers["webhook-id"]] += 1
        self.times[name].append(time.monotonic())
        self.busy[name] += 1
        self.most_at_once = max(self.most_at_once, self.busy[name])
        try:
            await request.read()
            await asyncio.sleep(ANSWER)  # a receiver takes time; nothing is waited for
        finally:
            self.busy[name] -= 1
        return web.Response()


class Cluster:
    """Nodes on one database, and load on all of them."""

    def __init__(self, url: str, folder: Path, count: int, command: Sequence[str] | None = None) -> None:
        self.url = url
        self.acknowledged: set[str] = set()
        self._folder = folder
        self._count = count
        self._options = {} if command is None else {"command": command}
        self.nodes: list[Daemon] = []
        self.out: set[int] = set()  # nodes that the load balancer has noticed to be out
        self._loading = False
        self._sending = 0  # senders that wait for an answer, or will send again
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._life = AsyncExitStack()
        self.receiver = await self._life.enter_async_context(Receiver())
        for number in range(self._count):
            self.nodes.append(self._make(number))
        await asyncio.gather(*(self.run(number) for number in range(self._count)))
        self.database = await asyncpg.connect(self.url)
        self._tasks = [asyncio.create_task(self._send(number)) for number in range(SENDERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.database.close()
        await asyncio.gather(*(node.end() for node in self.nodes))
        await self._life.aclose()

    async def run(self, number: int) -> None:
        """Start a node, and wait until it listens."""
        await self.nodes[number].start()
        await self.nodes[number].ready()

    async def restart(self, number: int) -> None:
        """Start a node again after its process has ended."""
        self.nodes[number] = self._make(number)
        await self.run(number)

    async def balanced(self) -> list[int]:
        """Wait until each lane is on the node that it is due to; returns the nodes that have lanes."""
        async with asyncio.timeout(60):
            while True:
                peers = [
                    Peer(incarnation, name, 60.0, frozenset(LANES))
                    for incarnation, name in await self.database.fetch(
                        "SELECT incarnation::text, name FROM nodes WHERE seen > now() - interval '2 seconds'"
                    )
                ]
                rows = await self.database.fetch(
                    "SELECT name, incarnation::text FROM leases"
                    " WHERE name LIKE 'lane:%' AND until > clock_timestamp()"
                )
                if len(rows) == len(LANES) and len(peers) == self._count:
                    due = {name: due_to(name, peers) for name, _ in rows}
                    if all(peer and peer.incarnation == dict(rows)[name] for name, peer in due.items()):
                        return sorted({int(peer.name[1:]) for peer in due.values() if peer})
                await asyncio.sleep(0.1)

    async def load(self, *, on: bool) -> None:
        """Begin to send events, or end it and wait for the last answers."""
        self._loading = on
        async with asyncio.timeout(30):
            while not on and self._sending:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)

    async def drained(self) -> None:
        """Wait until no delivery is pending."""
        async with asyncio.timeout(DRAIN):
            while await self.database.fetchval("SELECT count(*) FROM owed"):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.1)

    def _make(self, number: int) -> Daemon:
        folder = self._folder / f"node{number}"
        folder.mkdir(exist_ok=True)
        parts = [
            HEAD.format(port=0).replace("[storage]", f'[storage]\nurl = "{self.url}"'),
            f'[cluster]\nenabled = true\nnode = "n{number}"\nlease = "{LEASE:g}s"',
            '[sources.adorn]\nplugin = "adorn"',
        ]
        options = f'concurrency = {CONCURRENCY}\ntimeout = "1s"'
        parts += [destination(name, f"{self.receiver.url}/{name}", options) for name in LANES]
        path = folder / "config.toml"
        path.write_text("\n".join(parts))
        return Daemon(path, **self._options)

    async def _send(self, number: int) -> None:
        """Send events to the nodes in turn; a node that does not answer is left out for a while."""
        for turn in itertools.count(number):
            if not self._loading:
                await asyncio.sleep(0.01)
                continue
            if turn % len(self.nodes) in self.out:
                continue
            node = self.nodes[turn % len(self.nodes)]
            self._sending += 1
            try:
                async with asyncio.timeout(1.0), await Wire.open(node.url) as wire:
                    for _ in range(10):
                        await wire.send(request("POST", "/v1/events", adorn(f"session {turn}")))
                        answer = await wire.answer()
                        if answer.status < 300:
                            self.acknowledged.add(answer.json["event_id"])
                        await asyncio.sleep(PAUSE)
            except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
                await asyncio.sleep(PAUSE)  # killed, stopped or frozen
            finally:
                self._sending -= 1


async def torture(
    url: str,
    folder: Path,
    actions: Sequence[str],
    *,
    seed: int,
    count: int = 2,
    command: Sequence[str] | None = None,
    tell: Callable[[Toll], None] = lambda _toll: None,
) -> Toll:
    """Do these things to nodes under load, one after another, and count what they cost."""
    rand, toll = random.Random(seed), Toll()
    async with Cluster(url, folder, count, command) as cluster:
        receiver, toll.acknowledged = cluster.receiver, cluster.acknowledged
        for toll.cycles, action in enumerate(actions, 1):
            repeated, victim = receiver.repeated, rand.choice(await cluster.balanced())
            await cluster.load(on=True)
            await asyncio.sleep(LOAD)  # load before; nothing is waited for
            began = time.monotonic()
            await _act(cluster, victim, action)
            await asyncio.sleep(LOAD)
            pause = receiver.longest_pause(began, time.monotonic())
            await cluster.load(on=False)
            await cluster.drained()
            toll.pauses[action] = max(pause, toll.pauses.get(action, 0.0))
            toll.longest_pause = max(toll.longest_pause, pause)
            toll.most_repeated = max(toll.most_repeated, receiver.repeated - repeated)
            toll.most_at_once = receiver.most_at_once
            tell(toll)
        await _count(cluster, toll)
    return toll


async def _act(cluster: Cluster, victim: int, action: str) -> None:
    """Do something to a node; returns when its lanes have moved, and the node is back."""
    process = cluster.nodes[victim].process
    cluster.out.add(victim)
    if action == "kill":
        await cluster.nodes[victim].end()
        await asyncio.sleep(LEASE + MARGIN)
        await cluster.restart(victim)
    elif action == "stop":
        await cluster.nodes[victim].stop()
        await asyncio.sleep(MARGIN)
        await cluster.restart(victim)
    else:
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(LEASE + MARGIN)
        process.send_signal(signal.SIGCONT)
    cluster.out.clear()


async def _count(cluster: Cluster, toll: Toll) -> None:
    rows: Sequence[Any] = await cluster.database.fetch("SELECT 'evt_' || public_id::text FROM events")
    stored = {public_id for (public_id,) in rows}
    toll.lost = toll.acknowledged - stored
    own = await cluster.database.fetch("SELECT 'evt_' || public_id::text FROM events WHERE source = 'adorn'")
    wanted = {(name, public_id) for name in LANES for (public_id,) in own}
    toll.undelivered = wanted - cluster.receiver.counts.keys()
    toll.unaccounted = await cluster.database.fetchval(
        """
        SELECT coalesce(sum(abs(created - ended - pending)), 0)::int
          FROM (SELECT destination, sum(created) AS created,
                       sum(delivered + dead + expired + cancelled) AS ended
                  FROM ledger GROUP BY 1) AS l
         CROSS JOIN LATERAL (
               SELECT count(*) AS pending FROM owed AS o WHERE o.destination = l.destination) AS p
        """
    )


@click.command()
@click.option("--cycles", default=50, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--action", type=click.Choice(ACTIONS), help="Only this one instead of all in turn.")
def main(cycles: int, nodes: int, seed: int, action: str | None) -> None:
    """Kill, stop and freeze nodes under load in a loop, and count what that cost."""
    actions = [action or ACTIONS[number % len(ACTIONS)] for number in range(cycles)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # the server runs as another user
        server = start(Path(folder) / "postgres")
        url = server.url("postgres")
        toll = asyncio.run(torture(url, Path(folder), actions, seed=seed, count=nodes, tell=click.echo))
    faults = toll.faults(2 * CONCURRENCY)
    click.echo("; ".join([str(toll), *faults]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
