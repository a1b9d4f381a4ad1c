"""Makes the pictures of docs/images from a daemon with traffic and trouble: `make screenshots`.

The daemon runs in this process, and everything in the pictures has happened to it. Only its clock is moved
forward, so that an hour passes in seconds.
"""

import asyncio
import json
import math
import random
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import ClientSession, web
from browsers import chromium
from daemons import Relay, running, write_config
from playwright.async_api import Browser
from support import until
from wire import exchange, request

from relay.base.clock import SECOND, SystemClock

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PICTURES = {
    "now": "", "events": "events", "event": "events/{event}", "deliveries": "deliveries?state=dead",
    "delivery": "deliveries/{delivery}", "attempts": "attempts?failed=1", "destinations": "destinations",
    "destination": "destinations/erp", "replays": "replays", "replay": "replays/{replay}",
    "sources": "sources", "source": "sources/shop", "refused": "refused", "refusal": "refused/{refusal}",
    "workers": "workers", "worker": "workers/whatsapp/worker-2", "jobs": "jobs", "config": "config",
    "doctor": "doctor", "nodes": "nodes", "audit": "audit", "missing": "events/evt_0",
    "unmatched": "events?type=*.none",
}  # fmt: skip
"""Path of the page of each picture."""

LOOKS = {"desktop-light": (1440, "light"), "desktop-dark": (1440, "dark"),
         "phone-light": (390, "light"), "phone-dark": (390, "dark")}  # fmt: skip
"""Width and colours."""

KEPT = ("now-desktop-light", "now-phone-dark", "event-desktop-light", "destination-desktop-dark")
"""The pictures in docs/images; the others are for those who judge the pages."""

HOUR = 3600
STEP = 10  # seconds between two moves of the clock
BROKEN = HOUR - 14 * 60  # second in which a destination begins to fail
SILENT = HOUR - 9 * 60  # second of the last heartbeat of a worker
PAUSED = HOUR - 4 * 60

CONFIG = """
[cluster]
node = "relay-1"
[sources.shop]
plugin = "lazychat"
tokens = ["shop-secret"]
[sources.adorn]
plugin = "adorn"
[sources.whatsapp]
plugin = "whatsapp"
tokens = ["worker-secret"]
workers = { offline_after = "3m" }
"""
DESTINATION = """
[destinations.{name}]
url = "http://127.0.0.1:{port}/{name}"
events = {events}
allow_private = true
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
{more}
"""
DESTINATIONS = (
    ("crm", '["*"]', ""),
    ("erp", '["shop.order.*"]', "circuit = { failures = 4 }"),
    ("search", '["shop.product.*"]', "retry = { schedule = [] }"),
    ("newsletter", '["shop.order.created"]', ""),
)
TYPES = {"order.created": 9.0, "order.updated": 6.0, "product.updated": 4.0, "product.deleted": 0.4}
"""Types of the shop's events, with their shares."""


class Moved(SystemClock):
    """A clock that is `behind` by microseconds."""

    behind = HOUR * SECOND

    def wall(self) -> int:
        """See `relay.base.clock.Clock`."""
        return super().wall() - self.behind

    def steady(self) -> int:
        """See `relay.base.clock.Clock`."""
        return super().steady() - self.behind


class Receivers:
    """The servers of the destinations: `erp` can break, and `search` does not know each type."""

    def __init__(self) -> None:
        self.is_broken = False
        self._chance = random.Random(1)

    async def answer(self, asked: web.Request) -> web.Response:
        """Answer a delivery."""
        type_ = (await asked.json())["type"]
        await asyncio.sleep(self._chance.uniform(0.002, 0.012))
        if asked.path == "/erp" and self.is_broken:
            return web.json_response({"error": "too many connections to the database"}, status=503)
        if asked.path == "/search" and type_ == "shop.product.deleted":
            return web.json_response({"error": f"unknown type {type_}"}, status=422)
        return web.Response(status=204)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve while entered; yield the port."""
        app = web.Application()
        app.router.add_post("/{name}", self.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()


class Senders:
    """A shop, an application and two workers."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._chance = random.Random(2)
        self._number = 4700  # of the latest order or product

    async def send(self, second: int) -> None:
        """Send the events of one step; the traffic rises and falls."""
        chance, wave = self._chance, 1.5 + math.sin(second / 500)
        for _ in range(round(wave * chance.uniform(0.2, 1.8))):
            self._number += 1
            [kind] = chance.choices(list(TYPES), list(TYPES.values()))
            total = f"{chance.randint(900, 24_000) / 100:.2f}"
            data = {"id": self._number, "total": total, "currency": "EUR", "customer": {"id": 812}}
            headers = {"X-Event-Type": kind, "X-Lazychat-Shop-Id": "1042"}
            await self._shop({"event_type": kind, "event_data": data}, "shop-secret", headers)
        if chance.random() < wave / 2:
            kind = chance.choice(["session.started", "jewelry.selected"])
            session = f"550e8400-e29b-41d4-a716-44665544{chance.randint(0, 99):04}"
            await self._send("POST", "/v1/events", {"event_type": kind, "session_id": session})

    async def register(self, worker: str) -> None:
        """Register a worker."""
        body = {
            "workerId": worker,
            "endpoint": f"http://{worker}:8001",
            "maxSessions": 50,
            "version": "1.4.2",
        }
        await self._send("POST", "/api/workers/register", body, token="worker-secret")

    async def beat(self, worker: str) -> None:
        """Send a heartbeat."""
        sessions = [
            {"sessionId": f"{name}-1", "status": "CONNECTED", "phoneNumber": f"+4915550100{number}"}
            for number, name in enumerate(("support", "orders", "returns"))
        ]
        figures = {"cpuUsage": 31.5, "memoryUsage": 48.2, "uptime": 86_400 * 12}
        body = {"sessions": sessions, "metrics": figures}
        await self._send("PUT", f"/api/workers/{worker}/heartbeat", body, token="worker-secret")

    async def err(self) -> None:
        """Send requests that the daemon must refuse."""
        await self._shop({"event_type": "order.created"}, "former-secret", {}, 401)
        await self._send("POST", "/v1/events", b'{"event_type": "session.started", "session', status=400)
        await self._send("POST", "/v2/webhook", {"type": "invoice.paid"}, status=404)

    async def _shop(self, body: object, token: str, headers: dict[str, str], status: int = 200) -> None:
        path = "/api/woocommerce-plugin/events"
        await self._send("POST", path, body, token=token, headers=headers, status=status)

    async def _send(
        self,
        method: str,
        path: str,
        body: object,
        *,
        token: str = "",
        headers: dict[str, str] | None = None,
        status: int = 200,
    ) -> None:
        given = {"Content-Type": "application/json", **(headers or {})}
        if token:
            given["Authorization"] = f"Bearer {token}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._session.request(method, self._url + path, data=data, headers=given) as response:
            assert response.status == status, await response.text()


@asynccontextmanager
async def scene(folder: Path, step: int = STEP) -> AsyncIterator[Relay]:
    """Run a daemon that has been up for an hour and has trouble; its clock moves by `step` seconds."""
    clock, receivers = Moved(), Receivers()
    async with receivers.listening() as port:
        tables = [
            DESTINATION.format(name=name, port=port, events=events, more=more)
            for name, events, more in DESTINATIONS
        ]
        config = write_config(folder, CONFIG, *tables)
        async with running(config, clock=clock) as relay, ClientSession() as session:
            senders = Senders(session, relay.addresses.public)
            for worker in ("worker-1", "worker-2"):
                await senders.register(worker)
            for second in range(0, HOUR, step):
                receivers.is_broken = second >= BROKEN
                await _pass(relay, senders, second, step)
                clock.behind -= step * SECOND
                for job in ("flush", "sweep", "history"):
                    await relay.app.jobs.run(job)
            await until(lambda: relay.app.dispatcher.lanes["erp"].health.circuit.is_open, 30)
            again = {"filter": {"destination": "search", "state": "dead"}}
            await ask(relay, "POST", "deliveries/retry", again)
            for job in ("activity", "ledger", "history"):
                await relay.app.jobs.run(job)
            traffic = asyncio.create_task(_go_on(senders))
            try:
                yield relay
            finally:
                traffic.cancel()


async def _go_on(senders: Senders) -> None:
    """Send events until cancelled, so that the pictures have current rates."""
    while True:
        await senders.send(HOUR)
        await asyncio.sleep(3)


async def _pass(relay: Relay, senders: Senders, second: int, step: int) -> None:
    """Let one step of the hour pass."""
    await senders.send(second)
    if second % 60 < step:
        await senders.beat("worker-1")
        if second < SILENT:
            await senders.beat("worker-2")
    if second % 1500 < step:
        await senders.err()
    if second <= PAUSED < second + step:
        await ask(relay, "POST", "destinations/newsletter/pause")


async def ask(relay: Relay, method: str, path: str, body: object = None) -> Any:
    """Ask the admin API over the socket."""
    raw = request(method, f"/api/{path}", None if body is None else json.dumps(body).encode())
    return json.loads((await exchange(relay.addresses.socket, raw)).body)


async def take(
    browser: Browser, folder: Path, names: tuple[str, ...] | None = None, step: int = STEP
) -> None:
    """Write the named pictures, or all, into a folder."""
    with TemporaryDirectory() as state:
        async with scene(Path(state), step) as relay:
            await _take(browser, folder, names, relay)


async def _take(browser: Browser, folder: Path, names: tuple[str, ...] | None, relay: Relay) -> None:
    async def first(path: str) -> dict[str, Any]:
        return (await ask(relay, "GET", path))["items"][0]

    ids = {
        "event": (await ask(relay, "GET", "destinations/erp"))["oldest"]["event_id"],
        "delivery": (await first("deliveries?state=dead&limit=1"))["id"],
        "refusal": (await first("refused?reason=auth&limit=1"))["id"],
        "replay": (await first("replays"))["id"],
    }
    for look, (width, scheme) in LOOKS.items():
        wanted = [name for name in PICTURES if names is None or f"{name}-{look}" in names]
        if not wanted:
            continue
        login = await ask(relay, "POST", "logins")
        context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = await context.new_page()
        await page.goto(login["url"])
        await page.locator("h1", has_text="Now").wait_for()
        root = login["url"].partition("#")[0]
        for name in wanted:
            await page.goto(root + PICTURES[name].format(**ids))
            if name == "now":
                rate = page.locator("[data-rate]", has_text=re.compile("[1-9]")).first
                await rate.wait_for(state="attached")  # a phone does not show it
            await page.screenshot(path=folder / f"{name}-{look}.png", full_page=True)
        await context.close()


async def main(folder: Path, names: tuple[str, ...] | None) -> None:
    """Write the named pictures, or all, into a folder, with a new browser."""
    async with chromium() as browser:
        await take(browser, folder, names)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        asyncio.run(main(Path(sys.argv[1]), None))
    else:
        asyncio.run(main(IMAGES, KEPT))
