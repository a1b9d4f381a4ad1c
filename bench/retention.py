"""Effect of retention on senders: latency of responses before and during the deletion of 500,000 events."""

import asyncio
import hashlib
import re
import sqlite3
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.loop import run
from bench.processes import Server
from bench.subject import REQUEST, relay
from relay.base.clock import SECOND, SystemClock
from relay.store.opening import open_store

EVENTS = 500_000
PACE = 500.0  # events that arrive per second
CONNECTIONS = 32
QUIET = 50.0  # seconds of the first measurement: retention begins a minute after the start
TARGET = 0.020  # seconds that the 99th percentile may rise by
PATIENCE = 900.0  # seconds until everything is deleted

_AGE = 20 * 86_400 * SECOND  # older than the 14 days of the default
_BODY = b'{"event_type":"member_joined","discord_id":"1","metadata":{"guild_id":"2"}}' + b" " * 131
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :events)"
_FILL = (
    f"""
    {_NUMBERS} INSERT INTO events
    SELECT i, printf('evt_%036d', i), 'moddy', 'moddy.member_joined', '1', :at + i, 'application/json', NULL,
           :digest, length(:body), x'7b7d', 0, 2, NULL, :body FROM n
    """,
    f"""
    {_NUMBERS} INSERT INTO deliveries (id, public_id, event_id, destination, state, attempts, created_at,
                                       finished_at, last_status)
    SELECT i, printf('dlv_%036d', i), i, 'gone', 'delivered', 1, :at + i, :at + i, 200 FROM n
    """,
    f"""
    {_NUMBERS} INSERT INTO attempts (delivery_id, started_at, duration_ms, result, status, truncated, answer)
    SELECT i, :at + i, 1.0, 'ok', 200, 0, x'6f6b' FROM n
    """,
    "INSERT INTO ledger VALUES ('gone', :events, :events, 0, 0, 0)",
)  # of our own constants


async def fill(path: Path, events: int) -> None:
    """Make a database of old events, each delivered at the first attempt."""
    async with open_store(f"sqlite:{path.name}", path.parent, SystemClock()):
        pass  # makes the tables
    values = {
        "events": events,
        "at": time.time_ns() // 1000 - _AGE,
        "body": _BODY,
        "digest": hashlib.sha256(_BODY).digest(),
    }
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        for sql in _FILL:
            database.execute(sql, {k: values[k] for k in values if f":{k}" in sql})
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@asynccontextmanager
async def _connections(
    server: Server,
) -> AsyncIterator[asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    queue: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    writers = []
    for _ in range(CONNECTIONS):
        pair = await asyncio.open_connection(*server.address)
        writers.append(pair[1])
        queue.put_nowait(pair)
    try:
        yield queue
    finally:
        for writer in writers:
            writer.close()


async def latencies(
    server: Server,
    is_running: Callable[[], bool],
    pace: float = PACE,
    requests: Sequence[bytes] = (REQUEST,),
) -> list[float]:
    """Send events at a rate while `is_running()`; return the latency of each response, in seconds.

    Latency counts from the scheduled time of a request, so it includes the wait for a free connection.
    """
    found: list[float] = []

    unsent = cycle(requests)

    async def one(due: float) -> None:
        reader, writer = pair = await queue.get()
        writer.write(next(unsent))
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"unexpected answer: {head!r}")
        await reader.readexactly(int(length[1]))
        found.append(time.perf_counter() - due)
        queue.put_nowait(pair)

    async with _connections(server) as queue, asyncio.TaskGroup() as group:
        due = time.perf_counter()
        while is_running():
            group.create_task(one(due))
            due += 1 / pace
            await asyncio.sleep(due - time.perf_counter())
    return found


async def main(events: int) -> None:
    """Measure responses before retention starts and while it runs."""
    with TemporaryDirectory(prefix="bench-") as name:
        path = Path(name) / "relay.db"
        await fill(path, events)
        print(f"retention of {events:,} events while {PACE:.0f}/s arrive", flush=True)
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:

            def left() -> int:
                """Return the number of old events that are left; they have the lowest ids."""
                [(first,)] = database.execute("SELECT min(id) FROM events").fetchall()
                return max(0, events + 1 - (first or events + 1))

            async with relay(Path(name)) as server:
                until = time.perf_counter() + QUIET
                before = await latencies(server, lambda: time.perf_counter() < until)
                while left() == events:  # noqa: ASYNC110 - another process's progress
                    await asyncio.sleep(0.05)
                began = time.perf_counter()
                during = await latencies(
                    server, lambda: left() > 0 and time.perf_counter() < began + PATIENCE
                )
                took = time.perf_counter() - began
        print_figures("without retention", before)
        print_figures("during retention", during)
        rise = percentile(during, 99) - percentile(before, 99)
        met = "met" if rise <= TARGET and took < PATIENCE else "missed"
        target = f"target {TARGET * 1e3:.0f} ms, {met}"
        print(f"  deleted in {took:.0f} s; the 99th percentile rose by {rise * 1e3:.1f} ms: {target}")


def percentile(figures: list[float], percent: int) -> float:
    """Return a percentile of at least two figures."""
    return statistics.quantiles(figures, n=100)[percent - 1]


def print_figures(what: str, figures: list[float], unit: str = "requests") -> None:
    """Print the percentiles of durations, given in seconds."""
    shares = ", ".join(f"p{percent} {percentile(figures, percent) * 1e3:.1f}" for percent in (50, 90, 99))
    print(f"  {what:<18}{len(figures):>8,} {unit}, ms: {shares}, max {max(figures) * 1e3:.1f}")


if __name__ == "__main__":
    run(main(int(sys.argv[1]) if sys.argv[1:] else EVENTS))
