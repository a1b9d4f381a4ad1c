"""`relay serve --demo`: temporary state, a receiver, the daemon and the samples; no file is left behind."""

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
import msgspec

from relay.app import Addresses, App
from relay.config.schema import Server
from relay.config.secrets import Secret
from relay.demo.story import OFFLINE_AFTER, TOKEN, DemoReceiver, Narrator, Story
from relay.errors import RelayError
from relay.keys import SHARED
from relay.plugin_loading.loader import discover, load
from relay.process.logs import configure
from relay.process.sockets import bind

_TEMPLATE = Path(__file__).with_name("config.toml.template")

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_demo(*, leave: bool) -> int:
    """Send every sample once, then serve until Ctrl-C, or exit at once with `leave`.

    Returns:
        The exit code: with `leave`, 1 if a sample did not arrive or the demo was interrupted.

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
        async with DemoReceiver(secret) as receiver:
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
                problems = await story.run()
                narrator.print_result(story.delivered, problems)
                if not leave:
                    narrator.print_request(at.public, at.socket)
                    await story.watch()
    return int(bool(problems))


@asynccontextmanager
async def _running(app: App) -> AsyncIterator[Addresses]:
    """Run the daemon in this process; yield its addresses when it is ready, and drain it at the end."""
    ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    life = asyncio.create_task(app.run(ready.set_result))
    try:
        await asyncio.wait((life, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            yield ready.result()
    finally:
        app.stopping.set()
        await life


def write_config(folder: Path, *, listen: str, receiver: str, secret: Secret) -> Path:
    """Write the demo's config.toml, readable only by its owner, and return its path."""
    file = folder / "config.toml"
    file.touch(mode=0o600)
    file.write_text(
        _TEMPLATE.read_text().format(
            listen=listen,
            offline_after=OFFLINE_AFTER,
            sources=_tables_of_sources(),
            receiver=receiver,
            secret=secret.reveal(),
        )
    )
    return file


def _tables_of_sources() -> str:
    """Return a table for each bundled kind of source that has its own paths, with its required secrets."""
    lines = []
    for kind in discover(())[0].kinds.values():
        if kind.door == "bundled" and kind.preset is None and kind.source.owns:
            lines += [f"[sources.{kind.name}]", f'plugin = "{kind.name}"']
            fields = msgspec.structs.fields(kind.source)
            lines += [f'{field.encode_name} = ["{TOKEN}"]' for field in fields if field.required]
    return "".join(f"{line}\n" for line in lines)


def choose_listen(preferred: str = Server().listen, *, leave: bool = False) -> str:
    """Return the default address, or a free port if it is in use or `leave` is set."""
    free = "127.0.0.1:0"
    if leave:
        return free
    try:
        bind(preferred, "[server] listen").close()
    except RelayError:
        return free
    return preferred
