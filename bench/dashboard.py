"""The dashboard: bytes and time of each page, its cost for senders, and its work in a real browser."""

import asyncio
import gc
import gzip
import json
import re
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from html import unescape
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click
import msgspec
from aiohttp import web

from bench.filling import fill
from bench.load import post, put
from bench.loop import run
from bench.processes import Server, python
from bench.retention import latencies, percentile
from bench.subject import PATH, TOKEN, relay
from relay.app import GC_THRESHOLDS, App
from relay.plugin_loading.loader import load
from relay.ui import app as ui
from relay.ui.page import SCRIPT, STYLE, Screen, Visit

PARTS = ("pages", "tabs", "browser")
ROWS = 50
MOST_SCRIPT, MOST_STYLE, MOST_PAGE, MOST_REQUESTS = 25_000, 12_000, 60_000, 4
"""Targets: bytes without compression, and requests of one page."""

MOST_MARKUP, MOST_BLOCK, MOST_TIME = 0.005, 0.002, 0.060
"""Targets: seconds beyond the API's queries (p99), of one callback of the event loop, and of a page."""

MOST_P99, MOST_CPU = 0.001, 0.02
"""Targets with open tabs: seconds by which senders' 99th percentile rises, and share by which CPU rises."""

MOST_PAINT, MOST_SHARE, MOST_HEAP = 0.150, 0.10, 10_000_000
"""Targets in the browser: seconds to the first paint, share of the main thread, bytes of heap."""

TABS = 10
PACE_TABS, PACE_BROWSER = 500.0, 200.0  # events per second
SECONDS = 10.0  # of one round with or without tabs
SAMPLES = 12  # of the heap, over the whole run
PAINTS = 20  # loads of a page
SLOWEST = 8  # visits that are printed

_CONFIG = f"""\
development = true
state_dir = "."
[server]
listen = "127.0.0.1:0"
[admin]
listen = ""
[storage]
url = "sqlite:{{database}}"
[sources.moddy]
plugin = "moddy"
tokens = ["{TOKEN}"]
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["{TOKEN}"]
"""
_PAUSED = """\
[destinations.{name}]
url = "http://127.0.0.1:9/hook"
events = ["*"]
allow_private = true
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
paused = true
"""
_ASK = """\
{method} {path} HTTP/1.1\r
Host: relay\r
Content-Type: application/json\r
Content-Length: {size}\r
Connection: close\r
\r
{body}"""


# --- pages ------------------------------------------------------------------------------------------------


class Figure(msgspec.Struct):
    """What the visits of one page took, in seconds."""

    size: int = 0
    gzipped: int = 0
    rows: int = 0
    requests: int = 0
    total: list[float] = []
    cpu: list[float] = []  # of the thread with the event loop
    markup: list[float] = []
    blocks: list[float] = []
    collecting: list[float] = []  # the garbage collector's part of a visit


class Meter:
    """Times the screens, the callbacks of the event loop and the garbage collector.

    The time for markup and callbacks is CPU time of the thread, so that other processes do not add to it.
    """

    def __init__(self) -> None:
        self.markup = 0.0
        self.total = self.cpu = 0.0
        self.block = 0.0
        self.collecting = 0.0  # since `begin`
        self.pauses: dict[int, list[float]] = {0: [], 1: [], 2: []}  # of all collections, by generation
        self._collects_since = 0.0

    def begin(self) -> None:
        """Begin a visit."""
        self.block = self.collecting = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the garbage collector, which is set as in `relay serve`; `pages` also freezes."""
        before = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        gc.callbacks.append(self._collection)
        yield
        gc.callbacks.remove(self._collection)
        gc.unfreeze()
        gc.set_threshold(*before)

    def _collection(self, phase: str, info: Mapping[str, int]) -> None:
        """Note a collection; one of `gc.callbacks`."""
        now = time.thread_time()
        if phase == "start":
            self._collects_since = now
        else:
            self.collecting += now - self._collects_since
            self.pauses[info["generation"]].append(now - self._collects_since)

    def screen(self, screen: Screen) -> Screen:
        """Return a screen that notes its time, and its time beyond the API's queries."""

        async def timed(visit: Visit) -> web.Response:
            asked, ask = 0.0, visit.ask

            async def asking(*args: Any, **options: Any) -> Any:
                nonlocal asked
                began = time.thread_time()
                try:
                    return await ask(*args, **options)
                finally:
                    asked += time.thread_time() - began

            visit.ask = asking
            began, cpu = time.perf_counter(), time.thread_time()
            response = await screen(visit)
            self.total = time.perf_counter() - began
            self.cpu = time.thread_time() - cpu
            self.markup = self.cpu - asked
            return response

        return timed

    def callback(self, handle: Callable[[asyncio.Handle], None]) -> Callable[[asyncio.Handle], None]:
        """Return `asyncio.Handle._run`, which notes the longest callback."""

        def timed(this: asyncio.Handle) -> None:
            began = time.thread_time()
            handle(this)
            self.block = max(self.block, time.thread_time() - began)

        return timed


async def fetch(path: Path, target: str, method: str = "GET", body: str = "") -> str:
    """Send a request to the socket of the relay; return the body of a 2xx response.

    Raises:
        RuntimeError: the response has another status.
    """
    reader, writer = await asyncio.open_unix_connection(path, limit=2**20)
    writer.write(_ASK.format(method=method, path=target, size=len(body), body=body).encode())
    text = (await reader.read()).decode()
    writer.close()
    head, _, content = text.partition("\r\n\r\n")
    if not head.startswith("HTTP/1.1 2"):
        raise RuntimeError(f"{method} {target}: {head.partition(chr(13))[0]}")
    return content


async def _addresses(socket: Path, public: str) -> dict[str, str]:
    """Add workers, a refused request and a replay; return the address of each screen, with 50 rows."""
    host, port = public.removeprefix("http://").rsplit(":", 1)
    token = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    raws = [put(f"/api/v1/workers/worker-{n}/heartbeat", b"{}", token) for n in range(ROWS)]
    raws += [post(PATH, b'{"event_type": "member_joined"}', token) for _ in range(ROWS)]
    for raw in raws:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def first(kind: str) -> str:
        async with asyncio.timeout(30):
            while not (  # noqa: ASYNC110 - another task writes them
                items := json.loads(await fetch(socket, f"/api/{kind}"))["items"]
            ):
                await asyncio.sleep(0.1)
        return str(items[0]["id"])

    replay = json.loads(await fetch(socket, "/api/replays", "POST", '{"filter": {"subject": "nobody"}}'))
    values = {
        "/events/{id}": f"/events/{await first('events')}",
        "/deliveries/{id}": f"/deliveries/{await first('deliveries?state=dead')}",
        "/refused/{id}": f"/refused/{await first('refused')}",
        "/replays/{id}": f"/replays/{replay['id']}",
        "/destinations/{name}": "/destinations/erp",
        "/sources/{name}": "/sources/moddy",
        "/workers/{source}/{id:[^/]+}": "/workers/whatsapp/worker-1",
    }
    lists = {each: f"{each}?limit={ROWS}" for each in ("/events", "/deliveries", "/attempts", "/refused")}
    return {path: ({**values, **lists}.get(path) or path) for path in ui.SCREENS}


async def _visit(socket: Path, address: str, meter: Meter, visits: int) -> Figure:
    figure = Figure()
    for number in range(visits + 1):
        meter.begin()
        text = await fetch(socket, f"/ui{address}")
        if number:  # the first visit fills caches
            figure.collecting.append(meter.collecting)
            figure.total.append(meter.total)
            figure.cpu.append(meter.cpu)
            figure.markup.append(meter.markup)
            figure.blocks.append(meter.block)
    figure.size, figure.gzipped = len(text.encode()), len(gzip.compress(text.encode()))
    figure.rows = text.count("<tr>") - text.count("<thead>")
    figure.requests = 1 + len(re.findall(r'<(?:link|script|img)\b[^>]*(?:href|src)="', text))
    return figure


async def pages(database: Path, visits: int) -> None:
    """Measure each page in this process, with a standard event loop, on a filled database."""
    names = ("crm", "audit", "erp", "late", *(f"more-{number}" for number in range(ROWS - 4)))
    config = database.parent / "config.toml"
    config.write_text(
        _CONFIG.format(database=database.name) + "".join(_PAUSED.format(name=name) for name in names)
    )
    meter = Meter()
    screens = {path: meter.screen(screen) for path, screen in ui.SCREENS.items()}
    with (
        patch.object(ui, "SCREENS", screens),
        patch.object(asyncio.Handle, "_run", meter.callback(asyncio.Handle._run)),  # noqa: SLF001 - no other hook times each callback
        meter.watching(),
    ):
        app = App(load(config))
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        life = asyncio.create_task(app.run(ready.set_result))
        await asyncio.wait([life, ready], return_when=asyncio.FIRST_COMPLETED)
        try:
            addresses = ready.result()
            gc.freeze()
            found = {
                path: await _visit(addresses.socket, address, meter, visits)
                for path, address in (await _addresses(addresses.socket, addresses.public)).items()
            }
        finally:
            app.stopping.set()
            await life
    print(f"  script {len(SCRIPT.content):,} bytes{_judge(len(SCRIPT.content) <= MOST_SCRIPT)}", end="; ")
    print(f"style {len(STYLE.content):,} bytes{_judge(len(STYLE.content) <= MOST_STYLE)}")
    print(f"  {'page':<29} rows   bytes    gzip  requests |", end="")
    print(" page, ms: p50    p99    CPU | markup: p50   p99 | block: p50   max")
    for path, each in found.items():
        print(
            f"  {path:<29}{each.rows:>5}{each.size:>8,}{each.gzipped:>8,}{each.requests:>10} |"
            f"{_ms(each.total, 50):>14}{_ms(each.total, 99):>7}{_ms(each.cpu, 50):>7} |"
            f"{_ms(each.markup, 50):>12}{_ms(each.markup, 99):>6} |"
            f"{_ms(each.blocks, 50):>11}{max(each.blocks) * 1e3:>6.1f}"
        )
    markup = [each for figure in found.values() for each in figure.markup]
    print(f"  largest page {max(each.size for each in found.values()):,} bytes", end="")
    print(_judge(max(each.size for each in found.values()) <= MOST_PAGE), end="; ")
    print(f"most requests {max(each.requests for each in found.values())}", end="")
    print(_judge(max(each.requests for each in found.values()) <= MOST_REQUESTS))
    print(f"  markup of all pages, ms: p50 {_ms(markup, 50)}, p99 {_ms(markup, 99)}", end="")
    print(_judge(percentile(markup, 99) <= MOST_MARKUP))
    visits_ = sorted(
        (
            (*pair, path)
            for path, each in found.items()
            for pair in zip(each.markup, each.collecting, strict=True)
        ),
        reverse=True,
    )
    print("  slowest visits, ms of markup, of them for collecting garbage:", end=" ")
    print("; ".join(f"{path} {markup * 1e3:.1f}, {gc_ * 1e3:.1f}" for markup, gc_, path in visits_[:SLOWEST]))
    print(
        "  collections:",
        "; ".join(
            f"generation {number}: {len(pauses)}, at most {max(pauses) * 1e3:.1f} ms"
            for number, pauses in meter.pauses.items()
            if pauses
        )
        or "none",
    )
    slowest = max(statistics.median(each.total) for each in found.values())
    busiest = max(statistics.median(each.cpu) for each in found.values())
    longest = max(statistics.median(each.blocks) for each in found.values())
    print(f"  slowest page (median) {slowest * 1e3:.1f} ms{_judge(slowest <= MOST_TIME)},", end=" ")
    print(f"most CPU of the event loop (median) {busiest * 1e3:.1f} ms", end="; ")
    print(f"longest block (median) {longest * 1e3:.1f} ms{_judge(longest <= MOST_BLOCK)}")


def _ms(figures: list[float], percent: int) -> str:
    return f"{percentile(figures, percent) * 1e3:.1f}"


def _judge(met: bool) -> str:  # noqa: FBT001 - the only argument
    return " (target met)" if met else " (TARGET MISSED)"


# --- tabs -------------------------------------------------------------------------------------------------

_STREAMS = ("Now", "Events", "relay tail")
"""The pages and the command whose streams are measured; only the pages have targets."""


async def _stream_of(socket: Path, name: str) -> str:
    """Return the address of the stream that a page or command opens; each tab of *Events* has its own."""
    if name != "Events":
        return {"Now": "/api/top", "relay tail": "/api/tail"}[name]
    [query] = re.findall('data-tail="([^"]*)"', await fetch(socket, "/ui/events"))
    return f"/api/tail?{unescape(query)}"


class _Reader(asyncio.Protocol):
    """Reads a stream and counts its bytes, with little CPU."""

    received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)


@asynccontextmanager
async def streams(path: Path, name: str, count: int) -> AsyncIterator[None]:
    """Keep streams open, as tabs of a browser or commands do.

    Raises:
        RuntimeError: a stream got nothing.
    """
    loop = asyncio.get_running_loop()
    opened = [await loop.create_unix_connection(_Reader, str(path)) for _ in range(count)]
    for transport, _ in opened:
        target = await _stream_of(path, name)
        transport.write(f"GET {target} HTTP/1.1\r\nHost: relay\r\nAccept: text/event-stream\r\n\r\n".encode())
    try:
        yield
        if not all(reader.received for _, reader in opened):
            raise RuntimeError(f"the stream of {name} sent nothing")
    finally:
        for transport, _ in opened:
            transport.close()


async def tabs(folder: Path, rounds: int) -> None:
    """Measure senders and the relay's CPU without and with open tabs, in alternating rounds."""
    waits: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    async with (
        python(folder / "receiver.log", "-m", "bench.serve", "receiver") as receiver,
        relay(folder, receiver.url) as server,
    ):
        await _round(server, folder, None)
        for _ in range(rounds):
            for name in (None, *_STREAMS):
                found, cost = await _round(server, folder, name)
                waits.setdefault(name or "", []).extend(found)
                costs.setdefault(name or "", []).append(cost)
    alone, cost = percentile(waits[""], 99), statistics.median(costs[""])
    print(f"  {'no tab':<20} p99 {alone * 1e3:.2f} ms, {cost * 1e6:.0f} µs CPU per event")
    for name in _STREAMS:
        rise = percentile(waits[name], 99) - alone
        more = statistics.median(costs[name]) / cost - 1
        has_target = name in _PATHS
        print(
            f"  {f'{TABS} of {name}':<20} p99 {percentile(waits[name], 99) * 1e3:.2f} ms"
            f" ({rise * 1e3:+.2f} ms{_judge(rise <= MOST_P99) if has_target else ''}),"
            f" {statistics.median(costs[name]) * 1e6:.0f} µs CPU per event"
            f" ({more:+.1%}{_judge(more <= MOST_CPU) if has_target else ''})"
        )


async def _round(server: Server, folder: Path, name: str | None) -> tuple[list[float], float]:
    async with streams(folder / "relay.sock", name or "", TABS if name else 0):
        await asyncio.sleep(1)
        cpu, until = server.cpu(), time.perf_counter() + SECONDS
        found = await latencies(server, lambda: time.perf_counter() < until, PACE_TABS)
        return found, (server.cpu() - cpu) / len(found)


# --- the browser ------------------------------------------------------------------------------------------

_PAINT = """() => new Promise((resolve) => {
  const look = () => {
    const [paint] = performance.getEntriesByName("first-contentful-paint");
    if (paint) resolve(paint.startTime); else setTimeout(look, 10);
  };
  look();
})"""
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_WARM = 0.1  # of the run, before the first figure of the heap


async def browser(folder: Path, minutes: float) -> None:
    """Measure first paint, main thread and heap in Chromium, while events arrive."""
    program = shutil.which("chromium")
    if program is None:
        raise click.UsageError("the part `browser` needs chromium")
    playwright = import_module("playwright.async_api").async_playwright
    async with (
        python(folder / "receiver.log", "-m", "bench.serve", "receiver") as receiver,
        relay(folder, receiver.url, admin="127.0.0.1:0") as server,
        playwright() as driver,
    ):
        chromium = await driver.chromium.launch(executable_path=program, args=list(_FLAGS))
        context = await chromium.new_context(viewport={"width": 1440, "height": 900})
        login = json.loads(await fetch(folder / "relay.sock", "/api/logins", "POST", "{}"))
        page = await context.new_page()
        await page.goto(login["url"])
        await page.locator("h1", has_text="Now").wait_for()
        root = login["url"].partition("#")[0]
        await latencies(server, _for(2.0), PACE_BROWSER)  # so that the pages have rows
        for name, path in _PATHS.items():
            paints = []
            for _ in range(PAINTS):
                await page.goto(root + path)
                paints.append(await page.evaluate(_PAINT) / 1e3)
            middle = statistics.median(paints)
            print(f"  {name}: first paint {middle * 1e3:.0f} ms{_judge(middle <= MOST_PAINT)}", end=", ")
            print(f"slowest of {PAINTS}: {max(paints) * 1e3:.0f} ms", flush=True)
        await page.close()
        for name, path in _PATHS.items():
            await _stream(context, server, root + path, name, minutes * 60)
        await chromium.close()


_PATHS = {"Now": "", "Events": "events"}


def _for(seconds: float) -> Callable[[], bool]:
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() < until


async def _stream(context: Any, server: Server, url: str, name: str, seconds: float) -> None:
    page = await context.new_page()
    session = await context.new_cdp_session(page)
    await session.send("Performance.enable")
    await page.goto(url)
    # The page stops counting new events at this number. A high one lets it count during the whole run.
    await page.evaluate(
        "const place = document.querySelector('[data-tail]'); if (place) place.dataset.most = 1e9"
    )

    async def metrics() -> dict[str, float]:
        found = (await session.send("Performance.getMetrics"))["metrics"]
        return {each["name"]: each["value"] for each in found}

    async def heap() -> float:
        await session.send("HeapProfiler.collectGarbage")
        return (await metrics())["JSHeapUsedSize"]

    async def sample() -> tuple[list[float], float, float]:
        await asyncio.sleep(seconds * _WARM)
        before, heaps = await metrics(), []
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds * (1 - _WARM) / SAMPLES)
            heaps.append((await metrics())["JSHeapUsedSize"])
        after = await metrics()
        passed = after["Timestamp"] - before["Timestamp"]
        busy, cpu = (after[name] - before[name] for name in ("TaskDuration", "ThreadTime"))
        return heaps, busy / passed, cpu / passed

    running = asyncio.ensure_future(sample())
    sent = await latencies(server, lambda: not running.done(), PACE_BROWSER)
    heaps, share, cpu = await running
    end = await heap()
    print(f"  {name}: {len(sent):,} events in {seconds:.0f} s: {share:.1%} of the main thread", end="")
    print(f"{_judge(share <= MOST_SHARE)}, {cpu:.1%} as CPU time", end="; ")
    print(f"heap at most {max(heaps) / 1e6:.1f} MB{_judge(max(heaps) <= MOST_HEAP)},", end=" ")
    print(f"{end / 1e6:.1f} MB after a collection", flush=True)
    await page.close()


# --- the command ------------------------------------------------------------------------------------------


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--events", default=1_000_000, show_default=True, help="Events of the part `pages`.")
@click.option("--file", type=click.Path(path_type=Path), help="Keep the database, or use an existing one.")
@click.option("--visits", default=100, show_default=True, help="Visits of each page.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of the part `tabs`.")
@click.option("--minutes", default=2.0, show_default=True, help="Minutes of the part `browser`, per page.")
def main(
    parts: tuple[str, ...], *, events: int, file: Path | None, visits: int, rounds: int, minutes: float
) -> None:
    """Run all parts, or those in the arguments: pages, tabs, browser."""
    wanted = parts or PARTS
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if "pages" in wanted:
            database = (file or folder / "dashboard.db").absolute()
            if not database.exists():
                run(fill(database, events))
            print(f"pages, with {events:,} events", flush=True)
            asyncio.run(pages(database, visits))
        if "tabs" in wanted:
            print(f"{TABS} tabs, {PACE_TABS:.0f} events/s, {rounds} rounds of {SECONDS:.0f} s", flush=True)
            (folder / "tabs").mkdir()
            run(tabs(folder / "tabs", rounds))
        if "browser" in wanted:
            print(f"Chromium, {PACE_BROWSER:.0f} events/s", flush=True)
            (folder / "browser").mkdir()
            run(browser(folder / "browser", minutes))


if __name__ == "__main__":
    main()
