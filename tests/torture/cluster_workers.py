"""Heartbeats of 200 workers hop between the nodes of a cluster, while nodes and the database are away.

Each change of a worker's status must be one event, no worker that sends heartbeats may be marked offline, and
a silent one must be, within its deadline and the time that docs/cluster.md allows. Run
`python -m tests.torture.cluster_workers --cycles 20`.
"""

import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import asyncpg
import click
from daemons import HEAD, Daemon
from postgres import start
from wire import exchange, request

WORKERS = 200
LEASE = 3.0  # seconds
EVERY = 2.0  # seconds between two heartbeats of a worker
PATIENCE = 6.0  # `offline_after`, and `startup_hold`
CHECK_EVERY = 1.0
GRACE = CHECK_EVERY + 4.0  # two flushes
SETTLE = 10.0  # seconds in which the nodes connect again, see relay.store.postgres.workers
SLACK = 4.0  # seconds for a busy machine
TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}

ACTIONS = ("report", "silence", "kill", "freeze", "cut", "away")

SOURCE = f"""
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["worker-secret-token-12345"]
[sources.whatsapp.workers]
offline_after = "{PATIENCE:g}s"
startup_hold = "{PATIENCE:g}s"
check_every = "{CHECK_EVERY:g}s"
"""

CONFIG = f"""
[cluster]
node = "n%d"
lease = "{LEASE:g}s"
{SOURCE}"""

EVENTS_SQL = """
    SELECT subject, type, received_at / 1e6::float8 AS at FROM events
     WHERE source = 'whatsapp' AND subject IS NOT NULL ORDER BY id
"""


class Line:
    """The network between a node and the database, which can be cut."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._there = parts.hostname, parts.port
        self._url = url
        self._open = asyncio.Event()  # cleared: nothing is forwarded
        self._open.set()
        self._refuses = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._url.replace(f":{urlsplit(self._url).port}/", f":{port}/")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self, *, silently: bool = False) -> None:
        """Close all connections and refuse new ones; silently: forward nothing."""
        if silently:
            self._open.clear()
            return
        self._refuses = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Forward again."""
        self._refuses = False
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        there = None
        with suppress(OSError):
            if not self._refuses:
                from_there, there = await asyncio.open_connection(*self._there)
                self._writers.add(there)
                await asyncio.gather(self._forward(reader, there), self._forward(from_there, writer))
        for each in (writer, there):
            if each is not None:
                self._writers.discard(each)
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.transport.abort()


class Cluster:
    """Nodes on one database, each behind a separate line."""

    def __init__(self, url: str, folder: Path, count: int) -> None:
        self.url = url
        self._folder = folder
        self._lines = [Line(url) for _ in range(count)]
        self.nodes: list[Daemon] = []

    async def __aenter__(self) -> Self:
        self._life = AsyncExitStack()
        for number, line in enumerate(self._lines):
            await self._life.enter_async_context(line)
            self.nodes.append(self._make(number))
        self.database = await asyncpg.connect(self.url)
        await asyncio.gather(*(self.run(number) for number in range(len(self.nodes))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.database.close()
        await asyncio.gather(*(node.end() for node in self.nodes))
        await self._life.aclose()

    async def run(self, number: int) -> None:
        """Start a node, and wait until it listens."""
        await self.nodes[number].start()
        await self.nodes[number].ready()

    async def kill(self, number: int) -> None:
        """Kill a node, and start it again after its lease."""
        await self.nodes[number].end()
        await asyncio.sleep(LEASE + 1)
        self.nodes[number] = self._make(number)
        await self.run(number)

    async def freeze(self, number: int) -> None:
        """Stop a node for longer than its lease."""
        self.nodes[number].process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(LEASE + 3)
        self.nodes[number].process.send_signal(signal.SIGCONT)

    async def cut(self, numbers: Collection[int], seconds: float, *, silently: bool = False) -> None:
        """Separate nodes from the database."""
        for number in numbers:
            self._lines[number].cut(silently=silently)
        await asyncio.sleep(seconds)
        for number in numbers:
            self._lines[number].mend()

    async def fetch(self, sql: str) -> list[Any]:
        """Run a statement."""
        return list(await self.database.fetch(sql))

    async def sweeper(self) -> int:
        """Return the node that marks silent workers."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            name = await self.database.fetchval(
                "SELECT n.name FROM leases AS l JOIN nodes AS n USING (incarnation)"
                " WHERE l.name = 'job:sweep' AND l.until > clock_timestamp()"
            )
            if name is not None:
                return int(name[1:])
            await asyncio.sleep(0.1)
        rows = await self.database.fetch("SELECT *, clock_timestamp() - until AS free_for FROM leases")
        lines = [*map(str, rows), *(node.output[-3000:] for node in self.nodes)]
        raise AssertionError("no node runs the job sweep:\n" + "\n".join(lines))

    def _make(self, number: int) -> Daemon:
        folder = self._folder / f"node{number}"
        folder.mkdir(exist_ok=True)
        head = HEAD.format(port=0).replace("[storage]", f'[storage]\nurl = "{self._lines[number].url}"')
        path = folder / "config.toml"
        path.write_text(head + CONFIG % number)
        return Daemon(path)


class Nodes(Protocol):
    """The nodes to which a fleet sends, and their database."""

    nodes: list[Daemon]

    async def fetch(self, sql: str) -> list[Any]:
        """Run a statement."""


class Fleet:
    """Workers that send each heartbeat to another node, and the events that the relay must create."""

    def __init__(self, cluster: Nodes, rand: random.Random, count: int) -> None:
        self._cluster = cluster
        self._rand = rand
        self.expected: dict[str, list[str]] = {f"w{number:03d}": [] for number in range(count)}
        self.faults: list[str] = []
        self.latest = 0.0  # seconds after its deadline at which a silent worker was marked, at most
        self.answers = self.refused = 0  # of heartbeats
        self._silent: set[str] = set()
        self._heard: dict[str, float] = {}  # when the latest answered heartbeat was sent
        self._gaps: dict[str, list[str]] = {}  # long times between answers, for messages
        self._tasks: list[asyncio.Task[None]] = []
        self._began = time.time()

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(self._register(worker) for worker in self.expected))
        self._tasks = [asyncio.create_task(self._live(worker)) for worker in self.expected]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def choose(self, count: int) -> list[str]:
        """Choose workers that send heartbeats now."""
        return self._rand.sample(sorted(self.expected.keys() - self._silent), count)

    def __str__(self) -> str:
        seconds = self._age(time.time())
        return f"{seconds} s, {self.answers} heartbeats, {self.refused} refused, {self.faults}"

    async def report(self, workers: Collection[str], status: str) -> None:
        """Let workers report a status at all nodes at once."""
        self._silent.update(workers)  # no other heartbeat meanwhile
        for worker in workers:
            await self._ask_all(self._beat(worker, status))
            self.expected[worker].append(status.lower())
        if status == "ONLINE":
            self._silent.difference_update(workers)

    async def silence(self, workers: Collection[str], late: float = 0.0, early: float = 1.0) -> None:
        """Let workers fall silent, and wait until each is marked; `late` is the time beyond the usual one.

        Up to `early` seconds before its deadline, a worker may be marked whose latest heartbeat was lost with
        a killed node: nodes write heartbeats every 2 s.
        """
        self._silent.update(workers)
        await asyncio.sleep(1.5)  # requests under way end
        allowed = GRACE + SLACK + late
        marks = await self._until_marked(workers, "offline", PATIENCE + allowed + 30)
        for worker in workers if marks else ():
            self.expected[worker].append("offline")
            after = marks[worker][1] - self._heard[worker] - PATIENCE
            self.latest = max(self.latest, after)
            if not -early < after < allowed:
                self.faults.append(f"{worker} was marked {after:.1f} s after its deadline, not {allowed:g} s")

    async def revive(self, workers: Collection[str]) -> None:
        """Let silent workers send heartbeats again."""
        for worker in workers:
            self.expected[worker].append("online")
        self._silent.difference_update(workers)
        await self._until_marked(workers, "online", 30.0)
        await asyncio.sleep(2 * EVERY)  # further events would be wrong; nothing is waited for

    async def check(self) -> None:
        """Compare all events with the expected ones."""
        found: dict[str, list[tuple[str, float]]] = {worker: [] for worker in self.expected}
        for subject, type_, at in await self._cluster.fetch(EVENTS_SQL):
            found[subject].append((type_.removeprefix("whatsapp.worker."), at))
        for worker, events in self.expected.items():
            if [event for event, _ in found[worker]] != events:
                told = ", ".join(f"{event} at {self._age(at)}" for event, at in found[worker])
                gaps = ", ".join(self._gaps.get(worker, ()))
                self.faults.append(f"{worker}: {told}; expected {', '.join(events)}; gaps: {gaps}")

    def _age(self, moment: float) -> str:
        """Return a moment in seconds since the start."""
        return f"{moment - self._began:.1f}"

    async def _until_marked(
        self, workers: Collection[str], status: str, seconds: float
    ) -> dict[str, tuple[str, float]]:
        """Wait until the latest event of these workers is a status; returns all latest events, or nothing."""
        missing, marks = set(workers), await self._marks()
        try:
            async with asyncio.timeout(seconds):
                while missing := {each for each in workers if marks.get(each, ("", 0.0))[0] != status}:
                    await asyncio.sleep(0.2)
                    marks = await self._marks()
        except TimeoutError:
            self.faults.append(f"never {status}: {sorted(missing)}")
            return {}
        return marks

    async def _marks(self) -> dict[str, tuple[str, float]]:
        """Return the latest event of each worker, and its time."""
        rows = await self._cluster.fetch(EVENTS_SQL)
        return {subject: (type_.removeprefix("whatsapp.worker."), at) for subject, type_, at in rows}

    async def _register(self, worker: str) -> None:
        body = {"workerId": worker, "endpoint": "http://localhost:8001", "status": "ONLINE"}
        path, self._heard[worker] = "/api/v1/workers/register", time.time()
        await self._ask_all(request("POST", path, body=json.dumps(body).encode(), **TOKEN))
        self.expected[worker].append("registered")

    async def _live(self, worker: str) -> None:
        await asyncio.sleep(self._rand.random() * EVERY)
        while True:
            if worker not in self._silent:
                began = time.time()
                if await self._ask_any(self._beat(worker)):
                    if (gap := began - self._heard.get(worker, began)) > PATIENCE / 2:
                        self._gaps.setdefault(worker, []).append(f"{gap:.1f} s until {self._age(began)}")
                    self._heard[worker] = began
            await asyncio.sleep(EVERY)

    def _beat(self, worker: str, status: str = "ONLINE") -> bytes:
        age = int(time.time() - self._began)
        body = {"status": status, "cpuUsage": self._rand.random(), "uptime": age, "messageCount": age}
        path = f"/api/v1/workers/{worker}/heartbeat"
        return request("PUT", path, body=json.dumps(body).encode(), **TOKEN)

    async def _ask_all(self, raw: bytes) -> None:
        """Send a request to all nodes at once, while all of them work."""
        asked = [self._ask(node, raw, 30.0) for node in self._cluster.nodes]
        if not any(await asyncio.gather(*asked)):
            self.faults.append("no node answered")

    async def _ask_any(self, raw: bytes) -> bool:
        """Send a request to one node, and to the others if it does not accept it, as a balancer does."""
        for node in self._rand.sample(self._cluster.nodes, len(self._cluster.nodes)):
            if await self._ask(node, raw):
                self.answers += 1
                return True
        self.refused += 1
        return False

    async def _ask(self, node: Daemon, raw: bytes, seconds: float = 1.0) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return (await exchange(node.url, raw)).status == HTTPStatus.OK
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            return False


async def torture(
    url: str,
    folder: Path,
    actions: Sequence[str],
    *,
    seed: int,
    count: int = 2,
    report: Callable[[str], None] = lambda _line: None,
) -> Fleet:
    """Run these actions while 200 workers send heartbeats; returns the fleet with its faults."""
    rand = random.Random(seed)
    async with Cluster(url, folder, count) as cluster, Fleet(cluster, rand, WORKERS) as fleet:
        await asyncio.sleep(2 * EVERY)
        for number, action in enumerate(actions, 1):
            silent = fleet.choose(10)
            await _act(action, cluster, fleet, silent, rand)
            await fleet.revive([] if action == "report" else silent)
            report(f"{number} {action}: {fleet.answers} heartbeats, {fleet.refused} refused, {fleet.faults}")
        await fleet.check()
    return fleet


async def _act(action: str, cluster: Cluster, fleet: Fleet, silent: list[str], rand: random.Random) -> None:
    """Run one action while ten workers fall silent."""
    everyone = range(len(cluster.nodes))
    victim = rand.choice([await cluster.sweeper(), rand.choice(everyone)])
    work, late = [], 0.0
    if action == "report":
        for status in ("OFFLINE", "ONLINE"):
            await fleet.report(silent, status)
        return
    if action in {"kill", "freeze"}:
        work = [cluster.kill(victim) if action == "kill" else cluster.freeze(victim)]
        late = LEASE + 4.0 + LEASE  # the lease of the job, and that of the heartbeats
    elif action == "cut":
        seconds = LEASE + 3
        work = [cluster.cut([victim], seconds, silently=rand.random() < 1 / 2)]
        late = seconds + SETTLE + PATIENCE
    elif action == "away":
        seconds = rand.choice((3.0, 12.0))
        work = [cluster.cut(everyone, seconds, silently=rand.random() < 1 / 2)]
        late = seconds + SETTLE + PATIENCE + LEASE
    await asyncio.gather(fleet.silence(silent, late), *work)


@click.command()
@click.option("--cycles", default=18, show_default=True)
@click.option("--nodes", default=3, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--action", type=click.Choice(ACTIONS), help="Only this one instead of all in turn.")
def main(cycles: int, nodes: int, seed: int, action: str | None) -> None:
    """Let workers hop between nodes that are away in turn, and compare all events about them."""
    actions = [action or ACTIONS[number % len(ACTIONS)] for number in range(cycles)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # the server runs as another user
        server = start(Path(folder) / "postgres")
        fleet = asyncio.run(
            torture(server.url("postgres"), Path(folder), actions, seed=seed, count=nodes, report=click.echo)
        )
    marked = f"silent workers were marked at most {fleet.latest:.1f} s after their deadlines"
    click.echo("; ".join([f"{fleet.answers} heartbeats", marked, *fleet.faults]))
    sys.exit(1 if fleet.faults else 0)


if __name__ == "__main__":
    main()
