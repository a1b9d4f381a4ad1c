"""Faults of a cluster under load: nothing acknowledged is lost, all arrives, no node sends without a lease.

Run `python -m tests.torture.cluster --cycles 50` for all cases in turn, or with the name of a case. With
`--mixed --minutes 15 --seed 7`, random faults overlap, with all kinds of lanes and with workers. Each run
starts a separate PostgreSQL server, without fsync. `tests.torture.failover` has the cases with a standby.
"""

import asyncio
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Self

import click
from postgres import Server, start

from torture.audit import COMMIT_TIMES, MARGIN, Toll, audit, pause
from torture.cluster_workers import Fleet
from torture.nodes import LEASE, Cluster, Proxy, Setup

LOAD = 0.5  # seconds of load before and after a fault
DOWN = 1.0  # seconds for which the server is down
SKEW = 300.0  # seconds that the clocks of nodes are wrong
POLLED = 2.0  # seconds for which a lane may pause that gets no notifications
NEWER = "99.0.0"

HOLD = 0.2, 2 * LEASE  # seconds that a fault lasts in a mixed run: nodes lose their leases, or just not
REST = 0.0, 4.0  # seconds between faults in a mixed run
BOTH = 0.4  # the part of the faults that come in pairs
LEAST = 2  # faults, or pairs, even if they take longer than a mixed run should
WORKERS = 30  # of a mixed run
UNWRITTEN = 3.0  # seconds; see `Fleet.silence`: a busy node writes heartbeats up to 2 s late
RECOVERED = 120.0  # seconds until a silent worker is marked, whatever happens meanwhile


class Torture:
    """Three nodes: one behind a proxy; two with wrong clocks; one with an additional destination."""

    def __init__(self, server: Server, folder: Path, *, seed: int = 1, is_mixed: bool = False) -> None:
        self.server = server
        self.toll = Toll()
        self.proxied = 1  # number of the node behind the proxy
        self._folder = folder
        self._seed = seed
        self._random = random.Random(seed)
        self._is_mixed = is_mixed
        self._hold = 0.0  # seconds that a fault lasts in a mixed run
        self._is_noticed = True  # whether the load balancer notices a fault in a mixed run
        self._locks = [asyncio.Lock() for _ in range(3)]  # of nodes whose process a fault changes

    async def __aenter__(self) -> Self:
        self._life = AsyncExitStack()
        url = self.server.url("postgres")
        self.proxy = await self._life.enter_async_context(Proxy(url))
        self._setups = [Setup(), Setup(ahead=SKEW, url=self.proxy.url), Setup(ahead=-SKEW, drifts=True)]
        for setup in self._setups:
            setup.is_mixed = self._is_mixed
        cluster = Cluster(url, self._folder, self._setups)
        self.cluster = await self._life.enter_async_context(cluster)
        await self.cluster.load(on=True)
        await self.cluster.until_owned(range(3))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.proxy.passes.set()
        await self._life.aclose()

    async def finish(self) -> Toll:
        """End the load, wait until everything has arrived, and return the findings."""
        await self.cluster.load(on=False)
        began = time.time()
        await self.cluster.drained()
        # A lane must not wait for its next poll of the database.
        allowed = LEASE + MARGIN + 3 * self.cluster.receiver.lag
        longest = self.cluster.receiver.longest_wait(self.cluster.lanes_of_all, began)
        self.toll.pauses["end of the load"] = longest, allowed
        await audit(self.cluster, self.toll)
        return self.toll

    async def mix(self, seconds: float, tell: Callable[[str], None]) -> None:
        """Cause random faults for some time, sometimes two at once, while workers hop between the nodes.

        The seed alone determines which faults come, and for how long.
        """
        began = time.monotonic()
        async with (
            Fleet(self.cluster, random.Random(self._seed), WORKERS) as fleet,
            asyncio.TaskGroup() as tasks,
        ):
            is_over = asyncio.Event()
            flickering = tasks.create_task(self._flicker(fleet, is_over))
            for number in itertools.count():
                if number >= LEAST and time.monotonic() > began + seconds:
                    break
                names = self._random.sample(MIXED, 2 if self._random.random() < BOTH else 1)
                victims = self._random.sample(range(3), len(names))
                self._hold, self._is_noticed = self._random.uniform(*HOLD), self._random.random() < 1 / 2
                shown = (
                    f"{name} n{victim}" if name in OF_A_NODE else name
                    for name, victim in zip(names, victims, strict=True)
                )
                tell(f"{time.monotonic() - began:6.1f} s: {' and '.join(shown)}, for {self._hold:.1f} s")
                async with asyncio.TaskGroup() as both:
                    for name, victim in zip(names, victims, strict=True):
                        both.create_task(CASES[name](self, *[victim] * (name in OF_A_NODE)))
                await asyncio.sleep(self._random.uniform(*REST))
            await self.cluster.until_divided(self._setups[0].shards)
            await self.cluster.until_owned(range(3))
            for number in range(3):
                assert await self._becomes_ready(number, expected=True)
            is_over.set()
            await flickering
            await fleet.check()
        self.toll.workers = fleet.faults
        tell(f"{WORKERS} workers: {fleet}")

    async def _flicker(self, fleet: Fleet, is_over: asyncio.Event) -> None:
        """Let workers fall silent and send heartbeats again."""
        while not is_over.is_set():
            silent = fleet.choose(WORKERS // 5)
            await fleet.silence(silent, RECOVERED, UNWRITTEN)
            await fleet.revive(silent)

    async def kill(self, victim: int | None = None) -> None:
        """Kill a node with signal 9, and start it again after the others have taken its lanes."""
        victim = await self._victim() if victim is None else victim
        async with self._locks[victim]:
            async with self._fault("kill", victim, limit=LEASE + MARGIN):
                await self.cluster.nodes[victim].end()
                await self._hold_until_owned(self._others(victim))
            await self.cluster.restart(victim)

    async def stop(self, victim: int | None = None) -> None:
        """Stop a node as systemd does, and start it again."""
        victim = await self._victim() if victim is None else victim
        async with self._locks[victim]:
            async with self._fault("stop", victim, limit=MARGIN):
                await self.cluster.nodes[victim].stop()
                await self._hold_until_owned(self._others(victim))
            await self.cluster.restart(victim)

    async def freeze(self, victim: int | None = None) -> None:
        """Stop a node with SIGSTOP until the others have its lanes; then it is a zombie."""
        victim = await self._victim() if victim is None else victim
        async with self._locks[victim], self._fault("freeze", victim, limit=LEASE + MARGIN):
            self.cluster.signal(victim, signal.SIGSTOP)
            try:
                await self._hold_until_owned(self._others(victim))
            finally:
                self.cluster.signal(victim, signal.SIGCONT)

    async def cut(self) -> None:
        """Cut a node off from the database, silently, until the others have its lanes."""
        if not self._is_mixed and f"n{self.proxied}" not in (await self.cluster.owners()).values():
            await self.storm()
        async with self._fault("cut", self.proxied, limit=LEASE + MARGIN):
            self.proxy.passes.clear()
            try:
                await self._hold_until_owned(self._others(self.proxied))
                assert self._is_mixed or await self._becomes_ready(self.proxied, expected=False)
            finally:
                self.proxy.passes.set()
        assert self._is_mixed or await self._becomes_ready(self.proxied, expected=True)

    async def deafen(self) -> None:
        """Let no notifications of other nodes reach a node; it polls the database instead."""
        async with self._fault("deafen", self.proxied, limit=POLLED, out=False):
            self.proxy.is_deaf = True
            pids = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_notify%'"
            await self.cluster.fetch(f"{pids} AND pid <> pg_backend_pid()")
            await asyncio.sleep(self._hold or 2 * POLLED)  # load; nothing is waited for
        self.proxy.is_deaf = False

    async def restart_server(self) -> None:
        """Kill PostgreSQL without a checkpoint, and start it again."""
        numbers = range(len(self.cluster.nodes))
        async with self._fault("restart_server", *numbers, limit=LEASE + MARGIN, out=False) as began:
            await asyncio.to_thread(self.server.crash)
            await asyncio.sleep(self._hold or DOWN)  # it is down; nothing is waited for
            await asyncio.to_thread(self.server.restart)
            began()
            if not self._is_mixed:
                await self.cluster.until_owned(numbers)

    async def upgrade(self) -> None:
        """Restart the nodes one after another with a newer version, whose schema is newer as well.

        As in containers, their state folders are new. The settings of all destinations change, too.
        """
        for number in range(len(self.cluster.nodes)):
            async with self._locks[number]:
                async with self._fault("upgrade", number, limit=MARGIN):
                    await self.cluster.nodes[number].stop()
                    self._setups[number].version = NEWER
                    self._setups[number].revision += 1
                    self.cluster.replace_state(number)
                await self.cluster.restart(number)
                assert await self._becomes_ready(number, expected=True)
            sql = "SELECT version FROM nodes WHERE name = $1 ORDER BY started DESC LIMIT 1"
            [(version,)] = await self.cluster.fetch(sql, f"n{number}")
            assert version == NEWER

    async def storm(self) -> None:
        """Kill one node and freeze another at the same time, and let the third work alone."""
        killed, frozen = 0, 2
        async with (
            self._fault("freeze", frozen, limit=2 * LEASE + MARGIN),
            self._fault("kill", killed, limit=2 * LEASE + MARGIN),
        ):
            self.cluster.signal(frozen, signal.SIGSTOP)
            try:
                await self.cluster.nodes[killed].end()
                await self.cluster.until_owned((self.proxied,))
            finally:
                self.cluster.signal(frozen, signal.SIGCONT)
        await self.cluster.restart(killed)

    async def divide(self) -> None:
        """Change the number of shards in the configs of the nodes, one after another."""
        former = self._setups[0].shards
        count = {3: 2, 2: 4, 4: 1, 1: 3}[former]
        numbers = range(len(self.cluster.nodes))
        async with self._fault("divide", limit=2 * MARGIN, out=False):
            for number in numbers:
                async with self._locks[number]:
                    await self.cluster.change(number, shards=count)
                await asyncio.sleep(LOAD)  # the configs differ for a while; nothing is waited for
            if not self._is_mixed:
                await self.cluster.until_divided(count)
                await self.cluster.until_owned(numbers)

    async def _hold_until_owned(self, by: Sequence[int]) -> None:
        """Wait until these nodes own the lanes; in a mixed run, for a random time."""
        if self._is_mixed:
            await asyncio.sleep(self._hold)
        else:
            await self.cluster.until_owned(by)

    async def _becomes_ready(self, number: int, *, expected: bool) -> bool:
        """Wait until a node is ready, or is not."""
        async with asyncio.timeout(30):
            while await self.cluster.is_ready(number) != expected:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        return True

    def _others(self, victim: int) -> list[int]:
        return [number for number in range(len(self.cluster.nodes)) if number != victim]

    async def _victim(self) -> int:
        """Choose a node that sends to destinations of all nodes."""
        lanes, owners = await self.cluster.lanes(), await self.cluster.owners()
        names = sorted({owner for lane, owner in owners.items() if lane in lanes})
        return int(self._random.choice(names)[1:])

    @asynccontextmanager
    async def _fault(
        self, kind: str, *numbers: int, limit: float, out: bool = True
    ) -> AsyncIterator[Callable[[], None]]:
        """Load, then a fault of nodes, then load; notes the longest pause of a lane.

        The pause counts from the beginning, or from the latest call of the function. With `out`, the load
        balancer has noticed that the nodes are out.
        """
        cluster = self.cluster
        if self._is_mixed:
            fault = cluster.begin(kind, *numbers, out=out and self._is_noticed)
            yield lambda: None
            cluster.end(fault)
            return
        await asyncio.sleep(LOAD)  # load before; nothing is waited for
        fault = cluster.begin(kind, *numbers, out=out)
        since = fault.began

        def count_from_now() -> None:
            nonlocal since
            since = time.time()

        yield count_from_now
        cluster.end(fault)
        await asyncio.sleep(LOAD)
        pause(cluster, self.toll, fault, limit, since=since, until=time.time())


CASES: dict[str, Callable[..., Awaitable[None]]] = {
    "kill": Torture.kill,
    "stop": Torture.stop,
    "freeze": Torture.freeze,
    "cut": Torture.cut,
    "deafen": Torture.deafen,
    "restart-server": Torture.restart_server,
    "upgrade": Torture.upgrade,
    "storm": Torture.storm,
    "divide": Torture.divide,
}
OF_A_NODE = ("kill", "stop", "freeze")
MIXED = [case for case in CASES if case != "storm"]


@contextmanager
def server_in(name: str) -> Iterator[tuple[Server, Path]]:
    """Run a server that may crash, in a new folder; yields it with that folder."""
    with tempfile.TemporaryDirectory(prefix=f"relay-{name}-") as folder:
        Path(folder).chmod(0o711)  # the server runs as another user
        server = start(Path(folder) / "postgres", settings=(COMMIT_TIMES,), keep=True)
        try:
            yield server, Path(folder)
        finally:
            with suppress(FileNotFoundError):  # a case that failed may leave it down
                server.crash()


async def torture(
    server: Server,
    folder: Path,
    cases: Sequence[str],
    *,
    seed: int = 1,
    tell: Callable[[str, Toll], None] = lambda _case, _toll: None,
) -> Toll:
    """Cause these faults of nodes under load, one after another, and return the findings."""
    async with Torture(server, folder, seed=seed) as torture:
        for case in cases:
            await CASES[case](torture)
            tell(case, torture.toll)
        return await torture.finish()


async def mixed(
    server: Server,
    folder: Path,
    seconds: float,
    *,
    seed: int,
    tell: Callable[[str], None] = lambda _line: None,
) -> Toll:
    """Cause random faults, some at the same time, under load of all kinds, and return the findings."""
    async with Torture(server, folder, seed=seed, is_mixed=True) as torture:
        await torture.mix(seconds, tell)
        return await torture.finish()


@click.command()
@click.argument("case", type=click.Choice(list(CASES)), required=False)
@click.option("--cycles", default=50, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--mixed", "is_mixed", is_flag=True, help="Random faults that overlap, instead of cycles.")
@click.option("--minutes", default=15.0, show_default=True, help="The time of a mixed run.")
def main(case: str | None, cycles: int, seed: int, *, is_mixed: bool, minutes: float) -> None:
    """Cause faults of the nodes of a cluster under load, in a loop, and print the findings.

    Without CASE, all cases in turn.
    """
    names = list(CASES)
    cases = [case or names[number % len(names)] for number in range(cycles)]

    def tell(case: str, toll: Toll) -> None:
        click.echo(f"{case}: longest pauses: {toll.shown_pauses}")

    with server_in("torture") as (server, folder):
        if is_mixed:
            click.echo(f"seed {seed}")
            work = mixed(server, folder, 60 * minutes, seed=seed, tell=click.echo)
        else:
            work = torture(server, folder, cases, seed=seed, tell=tell)
        toll = asyncio.run(work)
    faults = toll.faults()
    click.echo("\n".join([str(toll), *faults]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
