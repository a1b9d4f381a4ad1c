"""Cost of ten thousand workers: CPU per heartbeat at one per worker in 30 s, and sweeps over all workers."""

import asyncio
import re
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from bench.load import put, send
from bench.loop import run
from bench.processes import Server, python
from bench.rounds import Spread
from bench.subject import TOKEN, relay
from relay.base.clock import SECOND
from relay.model import Heartbeat, Register
from relay.store import Acceptance
from relay.store.opening import open_store

WORKERS = 10_000
TARGET = 0.10  # of a core
PACE = WORKERS / 30  # heartbeats a second: each worker one in 30 s
AGENT = 5.0  # seconds after which Node's agent closes an idle connection, even if the server offers more
_FILES = 16_384  # descriptors of a process: every worker may have a connection
_SOURCE = f"""\
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["{TOKEN}"]
workers = {{ offline_after = "1h" }}  # they pause while the other servers are measured
"""
OWN = "one in 30 s, new connections"
HELD = "one in 30 s, connections held for a minute"
PROXIED = "one in 30 s, through a proxy"
BUNCHED = "as fast as possible, kept connections"
BARE = "bare aiohttp handler, new connections"
FLOOR = "protocol without HTTP, new connections"
_PATH = "/api/v1/workers/{}/heartbeat"
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class _Peer(asyncio.Protocol):
    """A client connection: sends a request, and passes the complete response to `answered`."""

    def __init__(self, answered: Callable[["_Peer", bytes], None]) -> None:
        self._received = b""
        self._answered = answered
        self.lost = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports have no base class

    def send(self, request: bytes) -> None:
        self._received = b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        length = _LENGTH.search(self._received, 0, head) if head >= 0 else None
        if length is not None and len(self._received) >= head + 4 + int(length[1]):
            self._answered(self, self._received)

    def connection_lost(self, _error: Exception | None) -> None:
        self.lost.set_result(None)


def _beat(number: int, uptime: int) -> bytes:
    body = (
        b'{"status":"ONLINE","metrics":{"sessions":{"total":25,"connected":20,"disconnected":2,"qr_required":2,'
        b'"reconnecting":1,"error":0,"maxSessions":50},"cpuUsage":45.5,"memoryUsage":67.8,"uptime":%d,'
        b'"messageCount":%d},"timestamp":"2024-01-15T10:30:00.000Z"}' % (uptime, uptime)
    )
    headers = {
        "Accept": "application/json, text/plain, */*",
        "Content-Type": "application/json",
        "Authorization": f"Bearer {TOKEN}",
        "User-Agent": "axios/1.21.1",
        "Accept-Encoding": "gzip, compress, deflate, br",
        "Connection": "keep-alive",
    }  # as axios 1.21 sends them on Node 20
    return put(_PATH.format(f"worker-{number}"), body, headers)


async def _at_their_pace(
    server: Server, uptime: int, *, beats: int = 1, kept: bool = False, held: float = AGENT
) -> None:
    """Send `beats` heartbeats of every worker, one in 30 s.

    Each heartbeat has its own connection, which the worker closes after it was idle for `held` seconds. With
    `kept`, the heartbeats use idle keep-alive connections, as a proxy does.
    """
    loop, began, peers, free = asyncio.get_running_loop(), time.perf_counter(), list[_Peer](), list[_Peer]()
    over, unanswered = loop.create_future(), WORKERS * beats

    def answered(peer: _Peer, answer: bytes) -> None:
        nonlocal unanswered
        unanswered -= 1
        if kept:
            free.append(peer)
        else:
            loop.call_later(held, peer.transport.close)
        if not answer.startswith(b"HTTP/1.1 200") and not over.done():
            over.set_exception(RuntimeError(f"unexpected answer: {answer!r}"))
        elif not unanswered and not over.done():
            over.set_result(None)

    for number in range(WORKERS * beats):
        peer = free.pop() if free else None
        if peer is None or peer.lost.done():
            _, peer = await loop.create_connection(lambda: _Peer(answered), *server.address)
            peers.append(peer)
        beat, worker = divmod(number, WORKERS)
        peer.send(_beat(worker, uptime + 30 * beat))
        await asyncio.sleep(began + number / PACE - time.perf_counter())
    async with asyncio.timeout(30):
        await over
        for peer in free:
            peer.transport.close()
        await asyncio.gather(*(peer.lost for peer in peers))


class _Costs:
    """CPU seconds per heartbeat, of each round, by the name of the measurement."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[float]] = {}

    async def measure(
        self, what: str, server: Server, sending: Coroutine[None, None, None], *, beats: int = 1
    ) -> None:
        """Measure one round."""
        before = server.cpu()
        await sending
        await asyncio.sleep(2.5)  # for the flush, which runs every 2 s
        self._rounds.setdefault(what, []).append((server.cpu() - before) / (WORKERS * beats))

    def of(self, what: str) -> Spread:
        """Return median, minimum and maximum of a measurement."""
        return Spread.of(self._rounds[what])

    def show(self, what: str) -> None:
        """Print a measurement, and its share of a core at the workers' rate."""
        cost = self.of(what)
        spread = f"({cost.least * 1e6:.0f}-{cost.most * 1e6:.0f})"
        print(f"  {what:<48}{cost.median * 1e6:5.0f} us {spread:<10}{cost.median * PACE:6.1%}")


async def heartbeats(rounds: int) -> None:
    """Measure heartbeats of a new daemon and of two simpler servers, in turn."""
    costs = _Costs()
    with TemporaryDirectory(prefix="bench-") as name:
        bare = ("-m", "bench.serve", "handler", _PATH.format("{worker}"))
        async with (
            relay(Path(name), more=_SOURCE) as server,
            python(Path(name) / "bare.log", *bare) as rival,
            python(Path(name) / "floor.log", "-m", "bench.serve", "receiver") as floor,
        ):

            async def crowd(uptime: int) -> None:
                beats = [_beat(number, uptime) for number in range(WORKERS)]
                await send(server.address, *beats, count=WORKERS, connections=64)

            print(
                f"heartbeats of {WORKERS:,} workers: CPU of a heartbeat (min-max of {rounds} rounds),"
                " share of a core at one per worker in 30 s"
            )
            await crowd(0)  # registers all workers
            for uptime in range(1000, 1000 * rounds + 1, 1000):
                # Two of each worker: once a minute, a heartbeat also writes a row of gauges.
                await costs.measure(OWN, server, _at_their_pace(server, uptime, beats=2), beats=2)
                await costs.measure(BARE, rival, _at_their_pace(rival, uptime))
                await costs.measure(FLOOR, floor, _at_their_pace(floor, uptime))
                through = _at_their_pace(server, uptime + 100, beats=2, kept=True)
                await costs.measure(PROXIED, server, through, beats=2)
                await costs.measure(BUNCHED, server, crowd(uptime + 200))
            held = _at_their_pace(server, 1000 * (rounds + 1), held=60)
            await costs.measure(HELD, server, held)
        for what in (OWN, HELD, PROXIED, BUNCHED, BARE, FLOOR):
            costs.show(what)
        met = all(costs.of(what).median * PACE < TARGET for what in (OWN, HELD, PROXIED, BUNCHED))
        ratio = costs.of(OWN).median / costs.of(BARE).median
        print(
            f"  target for the relay: {TARGET:.0%}, {'met' if met else 'missed'}; {ratio:.2f} of bare aiohttp"
        )


class _Clock:
    """A clock that the benchmark sets."""

    def __init__(self) -> None:
        self.now = time.time_ns() // 1000

    def wall(self) -> int:
        return self.now

    def steady(self) -> int:
        return self.now


@asynccontextmanager
async def _ticking() -> AsyncIterator[list[float]]:
    """Measure the longest time for which the event loop was blocked."""
    gaps: list[float] = [0.0]

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            gaps[0] = max(gaps[0], now - last)
            last = now

    task = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    gaps[0] = 0.0
    try:
        yield gaps
    finally:
        task.cancel()


async def sweeps() -> None:
    """Measure sweeps over a store with `WORKERS` workers."""
    clock = _Clock()

    async def measure(what: str, sweep: Callable[[], Awaitable[object]]) -> None:
        async with _ticking() as gaps:
            began = time.perf_counter()
            await sweep()
            took = time.perf_counter() - began
        print(f"  {what:<46}{took * 1e3:8.1f} ms, event loop blocked for at most {gaps[0] * 1e3:.1f} ms")

    with TemporaryDirectory(prefix="bench-") as name:
        async with open_store("sqlite:relay.db", Path(name), clock) as store:
            ids = [f"worker-{number}" for number in range(WORKERS)]
            changes = [Register(worker_id=id_, endpoint=f"http://{id_}:8001") for id_ in ids]
            for at in range(0, WORKERS, 1000):
                some = changes[at : at + 1000]
                await asyncio.gather(
                    *(store.events.append(Acceptance(source="bench", change=c)) for c in some)
                )
            print(f"sweeps over {WORKERS:,} workers")
            for _ in range(3):
                await measure("no worker is silent", store.workers.sweep)
            await measure("deadlines extended, as after a start", lambda: store.workers.sweep(extend=True))
            clock.now += 85 * SECOND
            for id_ in ids[WORKERS // 100 :]:
                await store.events.append(
                    Acceptance(source="bench", change=Heartbeat(worker_id=id_, uptime=1))
                )
            await measure("flush of all heartbeats", store.workers.flush)
            clock.now += 10 * SECOND
            await measure("1 % of the workers are silent", store.workers.sweep)
            clock.now += 95 * SECOND
            await measure("all other workers are silent", store.workers.sweep)


async def main() -> None:
    """Measure sweeps, then heartbeats unless the argument is `sweeps`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES:  # the servers inherit it
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard) if hard > 0 else _FILES, hard))
    await sweeps()
    if sys.argv[1:] != ["sweeps"]:
        await heartbeats(rounds=int(sys.argv[1]) if sys.argv[1:] else 3)


if __name__ == "__main__":
    run(main())
