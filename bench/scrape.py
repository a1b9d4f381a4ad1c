"""Duration of a scrape with 50 destinations, without and with load, and its effect on senders."""

import asyncio
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.loop import run
from bench.processes import python
from bench.retention import PACE, latencies, percentile, print_figures
from bench.subject import relay

DESTINATIONS = 50
SCRAPES = 100
EVERY = 0.25  # seconds between two, sixty times as often as Prometheus
TARGET = 0.050  # seconds that a scrape may take

# As Prometheus sends it; the socket has the same handler as the admin listener.
_ASK = b"""\
GET /metrics HTTP/1.1\r
Host: relay\r
Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1\r
Accept-Encoding: gzip\r
Connection: close\r
\r
"""
_IDLE = """\
[destinations.idle{number}]
url = "{url}/hook"
events = ["nobody.*"]
allow_private = true
"""


async def scrapes(path: Path, count: int) -> list[float]:
    """Scrape repeatedly; return the seconds of each scrape, from the connection to the last byte.

    Raises:
        RuntimeError: a response is not a complete scrape.
    """
    found = []
    for _ in range(count):
        began = time.perf_counter()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(_ASK)
        text = await reader.read()
        found.append(time.perf_counter() - began)
        writer.close()
        if not (text.startswith(b"HTTP/1.1 200 ") and text.endswith(b"# EOF\n")):
            raise RuntimeError(f"unexpected answer: {text[:200]!r}")
        await asyncio.sleep(EVERY)
    return found


async def main(count: int) -> None:
    """Measure scrapes and senders, without and with load."""
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with python(folder / "receiver.log", "-m", "bench.serve", "receiver") as receiver:
            idle = "".join(_IDLE.format(number=n, url=receiver.url) for n in range(1, DESTINATIONS))
            async with relay(folder, receiver.url, idle) as server:
                print(f"{count} scrapes of {DESTINATIONS} destinations, {PACE:.0f} events/s", flush=True)
                path, cpu = folder / "relay.sock", server.cpu()
                at_rest = await scrapes(path, count)
                cpu = (server.cpu() - cpu) / count
                quiet = asyncio.ensure_future(asyncio.sleep(count * EVERY))
                before = await latencies(server, lambda: not quiet.done())
                scraping = asyncio.ensure_future(scrapes(path, count))
                during = await latencies(server, lambda: not scraping.done())
                under_load = await scraping
    print_figures("at rest", at_rest, "scrapes")
    print_figures("under load", under_load, "scrapes")
    print_figures("without scrapes", before)
    print_figures("during scrapes", during)
    met = "met" if max(percentile(at_rest, 50), percentile(under_load, 50)) < TARGET else "missed"
    print(
        f"  {cpu * 1e3:.1f} ms CPU per scrape at rest; target for the medians: {TARGET * 1e3:.0f} ms, {met}"
    )


if __name__ == "__main__":
    run(main(int(sys.argv[1]) if sys.argv[1:] else SCRAPES))
