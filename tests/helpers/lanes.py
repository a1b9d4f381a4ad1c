"""Lanes for a test, with the real store and client, and receivers on loopback that the test controls."""

import asyncio
from collections.abc import Iterable
from contextlib import asynccontextmanager

from aiohttp import web
from stores import accept, hooks

from relay.base.clock import SystemClock
from relay.config.schema import DestinationConfig, RetryConfig
from relay.config.secrets import Secret, Url
from relay.delivery.dispatcher import Dispatcher
from relay.metrics import Metrics
from relay.routing.router import Router

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CLOCK = SystemClock()


class Receiver:
    """Records requests and responds as the test sets."""

    def __init__(self):
        self.requests = []
        self.times = []  # of each request, on the steady clock
        self.answers = []  # (status, headers) for the next ones, then `usual`
        self.usual = (200, {})
        self.gate = asyncio.Event()  # cleared: requests wait
        self.gate.set()
        self.busy = self.most_busy = 0

    @property
    def ids(self):
        """The ids of the events that arrived, in order, with repetitions."""
        return [headers["webhook-id"] for headers, _ in self.requests]

    def answer(self, request_headers, body):
        """Return the next response: (status, headers)."""
        return self.answers.pop(0) if self.answers else self.usual

    async def wait(self):
        """Delay the response until the test allows it."""
        await self.gate.wait()

    async def handle(self, request):
        body = await request.read()
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        self.requests.append((request.headers, body))
        self.times.append(CLOCK.steady())
        status, headers = self.answer(request.headers, body)
        try:
            await self.wait()
        finally:
            self.busy -= 1
        return web.Response(status=status, headers=headers, text="noted")

    @asynccontextmanager
    async def serve(self):
        runner = web.ServerRunner(web.Server(self.handle), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        try:
            yield self
        finally:
            self.gate.set()
            await runner.cleanup()


def destination(name, url, **fields):
    """Return a destination with a secret, quick retries and a timeout of 2 s."""
    defaults = {
        "retry": RetryConfig(schedule=(0.02, 0.02, 0.02, 0.02)),
        "allow_private": True,
        "timeout": 2.0,
    }
    return DestinationConfig(name=name, url=Url(url), secrets=(Secret(SECRET),), **{**defaults, **fields})


def router(destinations: Iterable[DestinationConfig]):
    """Return the daemon's router for these destinations."""
    return Router.of({config.name: config for config in destinations})


def route(destinations: Iterable[DestinationConfig]):
    """Return the daemon's route function for these destinations."""
    return router(destinations).route


@asynccontextmanager
async def dispatcher_for(store, *destinations, own=(), **options):
    """Run a dispatcher for these destinations; events are routed by their `events` and options."""
    hooks(store).route, hooks(store).resolve = router(destinations).route, router(destinations).resolve
    configs = {config.name: config for config in destinations}
    dispatcher = Dispatcher(configs, store=store, clock=CLOCK, metrics=Metrics((), configs), **options)
    hooks(store).listener = dispatcher.listen
    await dispatcher.start(own)
    try:
        yield dispatcher
    finally:
        await dispatcher.stop(2.0)


async def send(store, body=b'{"n":1}', subject="s", type_="shop.order"):
    """Store an event and return its public id."""
    accepted = accept(CLOCK, body, source="shop", type=type_, subject=subject)
    return (await store.events.append(accepted)).event_id


async def send_many(store, count, body=b'{"n":1}', subject="s"):
    """Store `count` events at once and return their public ids in the order of acceptance."""
    return await asyncio.gather(*(send(store, body, subject) for _ in range(count)))


async def ended(store, count=1, destination=None):
    """Wait until `count` deliveries have ended, and return them, oldest first."""

    async def look():
        rows = await store.queries.find("deliveries", limit=1000, destination=destination)
        return [row for row in reversed(rows) if row["state"] != "pending"]

    async with asyncio.timeout(30):
        while len(rows := await look()) < count:  # noqa: ASYNC110 - the store offers nothing to await
            await asyncio.sleep(0.01)
    return rows
