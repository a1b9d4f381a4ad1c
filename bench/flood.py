"""Latency of events while other senders pipeline cheap requests as fast as the relay responds."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from bench.load import put
from bench.loop import run
from bench.processes import Server
from bench.subject import REQUEST, TOKEN, relay

CONNECTIONS = 8
TARGET = 50.0  # ms of an event's p99
_SECONDS = 5.0  # of one measurement
_PAUSE = 0.005  # seconds between a response and the next event
_BLOCK = 2**16  # bytes that a flooding sender writes at once
_SOURCE = f"""\
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["{TOKEN}"]
"""
_BEAT = put(
    "/api/v1/workers/flood/heartbeat",
    b'{"status":"ONLINE","metrics":{"uptime":1},"timestamp":"2024-01-20T15:30:00Z"}',
    {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
)
KINDS = {
    "heartbeats": _BEAT,
    "404s": b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "401s": b"POST /internal/event/notify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
}


class _Flood(asyncio.Protocol):
    """One connection that always has unanswered requests."""

    def __init__(self, request: bytes) -> None:
        self._block = request * (_BLOCK // len(request))
        self._paused = False
        self._transport: asyncio.Transport
        self.answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports have no base class
        self._write()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()

    def _write(self) -> None:
        while not self._paused and not self._transport.is_closing():
            self._transport.write(self._block)

    def data_received(self, data: bytes) -> None:
        self.answers += data.count(b"HTTP/1.1 ")


async def flood(host: str, port: int, kind: str, connections: int) -> None:
    """Flood until the process is terminated; then print the number of responses per second."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: _Flood(KINDS[kind]), host, port) for _ in range(connections)]
    before, began = 0, time.perf_counter()
    print("floods", flush=True)
    while True:
        await asyncio.sleep(1)
        answers, now = sum(protocol.answers for _, protocol in made), time.perf_counter()
        print(f"{(answers - before) / (now - began):.0f}", flush=True)
        before, began = answers, now


@asynccontextmanager
async def flooded(server: Server, kind: str, connections: int) -> AsyncIterator[list[float]]:
    """Flood a server from another process until the block ends.

    Yields a list, which has the responses per second after the block.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.flood", *map(str, server.address), kind, str(connections),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    rates: list[float] = []
    assert process.stdout is not None
    try:
        await process.stdout.readline()
        yield rates
        process.kill()
        rates += [float(line) for line in (await process.stdout.read()).split()]
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


async def events(server: Server, seconds: float) -> list[float]:
    """Send one event after another for `seconds`; return the latencies in milliseconds, sorted."""
    reader, writer = await asyncio.open_connection(*server.address)
    found = []
    try:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.partition(b":")[2]))
            found.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(_PAUSE)
    finally:
        writer.close()
    return sorted(found)


def _row(name: str, delays: list[float], rates: list[float]) -> str:
    p50, p99 = delays[len(delays) // 2], delays[len(delays) * 99 // 100]
    rate = f"{sum(rates) / len(rates):,.0f}" if rates else "-"
    result = "met" if p99 <= TARGET else "missed"
    return f"  {name:<28}{len(delays):>8}{p50:>10.1f}{p99:>10.1f}{delays[-1]:>10.1f}{rate:>14}  {result}"


async def main(seconds: float) -> None:
    """Measure events without a flood, then with each kind of flood, for `seconds` each."""
    print(f"  {'flood':<28}{'events':>8}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}{'responses/s':>14}")
    with TemporaryDirectory(prefix="bench-") as name:
        async with relay(Path(name), more=_SOURCE) as server:
            await events(server, seconds / 5)
            print(_row("none", await events(server, seconds), []), flush=True)
            for kind in KINDS:
                for connections in (1, CONNECTIONS):
                    async with flooded(server, kind, connections) as rates:
                        await asyncio.sleep(min(0.5, seconds))
                        delays = await events(server, seconds)
                    print(_row(f"{kind}, {connections} connections", delays, rates), flush=True)
    print(f"  target for p99: {TARGET:.0f} ms")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [host, port, kind, connections]:
            run(flood(host, int(port), kind, int(connections)))
        case [duration]:
            run(main(float(duration)))
        case _:
            run(main(_SECONDS))
