"""The programs that the relay is compared with: minimal aiohttp servers that store nothing."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import ClientSession, TCPConnector, web

_ANSWER = {"success": True, "message": "Event processed successfully", "event_received": True}
_TARGET = web.AppKey("target", str)
_SESSION = web.AppKey("session", ClientSession)


async def _take(request: web.Request) -> web.Response:
    await request.json()
    return web.json_response(_ANSWER)


async def _pass_on(request: web.Request) -> web.Response:
    await request.json()
    body = await request.read()
    headers = {"Content-Type": request.content_type}
    async with request.app[_SESSION].post(request.app[_TARGET], data=body, headers=headers) as answer:
        await answer.read()
    return web.json_response(_ANSWER, status=answer.status)


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        app[_SESSION] = session
        yield


def handler(path: str) -> web.Application:
    """Respond to every event; store nothing."""
    app = web.Application()
    app.router.add_route("*", path, _take)
    return app


def proxy(path: str, target: str) -> web.Application:
    """Forward every event to `target`, and respond after the response of `target`."""
    app = web.Application()
    app[_TARGET] = target
    app.cleanup_ctx.append(_session)
    app.router.add_post(path, _pass_on)
    return app


async def serve(app: web.Application) -> None:
    """Serve until the process is ended."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"listens on http://{host}:{port}", flush=True)
    await asyncio.Event().wait()
