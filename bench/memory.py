"""`python -m bench.memory`: resident memory of the daemon after many large events, stored and delivered."""

import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.load import post, send
from bench.loop import run
from bench.processes import python
from bench.subject import PATH, TOKEN, relay

ROWS = ((10_000, 10_000), (4_000, 100_000), (1_500, 400_000))
"""Events, and bytes of each body."""

TARGET = 200  # MB of resident memory after each row
CONNECTIONS = 16
_HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}


def body(size: int) -> bytes:
    """Build an event of Moddy with `size` bytes of JSON."""
    head, tail = b'{"event_type":"message_sent","discord_id":"1","metadata":{"text":"', b'"}}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def resident(pid: int) -> tuple[float, float]:
    """Return the current and the peak resident memory of a process, in MB (10**6 bytes)."""
    status = Path(f"/proc/{pid}/status").read_text()
    now, most = (re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0] for name in ("VmRSS", "VmHWM"))
    return int(now) * 1024 / 1e6, int(most) * 1024 / 1e6


async def measure(events: int, size: int) -> tuple[float, float, float]:
    """Send events to a new daemon; return its memory afterwards, the peak, and CPU µs per event."""
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with (
            python(folder / "receiver.log", "-m", "bench.serve", "receiver") as receiver,
            relay(folder, receiver.url) as server,
        ):
            began = server.cpu()
            await send(
                server.address, post(PATH, body(size), _HEADERS), count=events, connections=CONNECTIONS
            )
            after, most = resident(server.pid)
            return after, most, (server.cpu() - began) / events * 1e6


async def main(scale: float) -> None:
    """Measure and print each row; `scale` shortens them all."""
    print(f"resident memory after large events, {CONNECTIONS} senders, one destination")
    met = True
    for events, size in ROWS:
        count = max(1, int(events * scale))
        began = time.perf_counter()
        after, most, cost = await measure(count, size)
        met &= after <= TARGET
        print(
            f"  {count:>6,} x {size / 1000:>3.0f} KB  {after:>5.0f} MB, peak {most:>5.0f} MB,"
            f" {cost:>6.0f} us CPU per event, {count / (time.perf_counter() - began):>6,.0f}/s",
            flush=True,
        )
    print(f"target {TARGET} MB after each row: {'met' if met else 'missed'}")


if __name__ == "__main__":
    run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
