"""The demo's life: temporary state, a receiver, the daemon itself, the story, and nothing left behind."""

import asyncio
import base64
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

from relay.app import Addresses, App
from relay.config.secrets import Secret
from relay.demo.narrator import Narrator
from relay.demo.receiver import Receiver
from relay.demo.setting import choose_listen, write_config
from relay.demo.story import Story
from relay.keys import SHARED
from relay.plugin_loading.loader import load
from relay.process.logs import configure

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_demo(*, leave: bool) -> int:
    """Show everything once, then keep serving until Ctrl-C, or with `leave` end after the samples.

    Returns:
        The exit code: 1 if, with `leave`, something did not arrive or the demo was interrupted.

    Raises:
        RelayError: the daemon could not start.
    """
    demo = asyncio.create_task(_demo(Narrator(sys.stdout, os.environ), leave=leave))
    for number in _ENDINGS:
        asyncio.get_running_loop().add_signal_handler(number, demo.cancel)
    await asyncio.wait([demo])
    if demo.cancelled():
        return int(leave)
    return demo.result()


async def _demo(narrator: Narrator, *, leave: bool) -> int:
    secret = Secret(SHARED + base64.b64encode(secrets.token_bytes(32)).decode())
    with TemporaryDirectory(prefix="hookferry-demo-") as name:
        folder = Path(name)
        async with Receiver(secret) as receiver:
            file = write_config(
                folder,
                listen=choose_listen(leave=leave),
                receiver=receiver.url,
                secret=secret,
            )
            setup = load(file)
            config = setup.config
            configure(config.log.level, config.log.format, under_systemd=False)
            async with _running(App(setup)) as at, aiohttp.ClientSession() as session:
                narrator.open(relay=at.public, admin=at.admin or "", receiver=receiver.url, folder=folder)
                story = Story(session, narrator, receiver.arrivals, config, at.public)
                problems = await story.tell()
                narrator.conclude(story.delivered, problems)
                if not leave:
                    narrator.invite(at.public)
                    await story.watch()
    return int(bool(problems))


@asynccontextmanager
async def _running(app: App) -> AsyncIterator[Addresses]:
    """Run the daemon beside us, from being ready to the end of its drain."""
    ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    life = asyncio.create_task(app.run(ready.set_result))
    try:
        await asyncio.wait((life, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            yield ready.result()
    finally:
        app.stopping.set()
        await life
