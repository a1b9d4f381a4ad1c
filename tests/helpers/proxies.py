"""A reverse proxy in front of the admin listener."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientError, ClientSession, web


@asynccontextmanager
async def proxy_at(path: str, relay) -> AsyncIterator[str]:
    """Run a reverse proxy that serves the admin listener below a path; yield its URL.

    It passes on the Host header, and each part of a response at once. It answers 502 without the relay.
    """

    async def forward(request: web.Request) -> web.StreamResponse:
        target = relay.addresses.admin + request.raw_path.removeprefix(path)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        body = await request.read()
        try:
            async with session.request(request.method, target, headers=headers, data=body or None) as answer:
                dropped = ("content-length", "transfer-encoding", "connection")
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in dropped}
                response = web.StreamResponse(status=answer.status, headers=kept)
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                return response
        except ClientError as error:
            return web.Response(status=502, text=str(error))

    app = web.Application()
    app.router.add_route("*", f"{path}/{{rest:.*}}", forward)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(auto_decompress=False) as session:
        try:
            yield "http://{}:{}".format(*runner.addresses[0])
        finally:
            await runner.cleanup()
