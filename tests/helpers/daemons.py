"""A relay for a test: in this process (`running`), or as a `relay serve` process (`Daemon`)."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import listeners
import msgspec
from aiohttp import web, web_app
from forking import Forked
from stores import KINDS
from wire import Answer, exchange, request

from relay import app as app_module
from relay.app import Addresses, App
from relay.base.clock import Clock
from relay.ingest import server
from relay.model import StoredEvent
from relay.plugin_loading.loader import discover, load
from relay.source import Source

SERVE = (sys.executable, "-c", "from relay.cli import main; main()", "serve")
"""The `relay serve` command of this checkout; it does not depend on PATH."""

HEAD = """\
development = true
state_dir = "state"
[server]
listen = "127.0.0.1:{port}"
shutdown_grace = "5s"
[admin]
listen = "127.0.0.1:0"
[storage]
min_free_disk = "1 MiB"
[log]
format = "json"
"""

PLUGINS = f"""
[plugins]
dirs = ["{Path(__file__).parents[1] / "plugins"}"]
"""

TOKENS = {
    "compozy": '["test-token", { secret = "read-only", scopes = ["events:read"], name = "reader" }]',
    "whatsapp": '["worker-secret-token-12345"]',
}
"""Tokens of the recorded samples in config.toml; other sources have `DEV_TOKEN`."""
DEV_TOKEN = '["dev-token"]'


def bundled_kinds() -> dict[str, type[Source]]:
    """Return the bundled kinds of source that have their own paths: one for each folder of tests/samples."""
    kinds = discover(())[0].kinds
    return {name: kind.source for name, kind in kinds.items() if kind.preset is None and kind.source.owns}


def tables_of_sources() -> str:
    """Return one `[sources.NAME]` table for each bundled kind, with its required tokens."""
    lines = []
    for name, source in bundled_kinds().items():
        lines += [f"[sources.{name}]", f'plugin = "{name}"']
        required = [field.encode_name for field in msgspec.structs.fields(source) if field.required]
        lines += [f"{key} = {TOKENS.get(name, DEV_TOKEN)}" for key in required]
    return "".join(f"{line}\n" for line in lines)


SOURCES = tables_of_sources()
"""One source of each kind, named after its kind, with the tokens of the samples."""


def destination(name: str, url: str, more: str = "") -> str:
    """Render a destination that retries after 0.1 s."""
    return f"""\
[destinations.{name}]
url = "{url}"
events = ["*"]
allow_private = true
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
retry = {{ schedule = ["0.1s", "0.1s", "0.1s", "0.1s"] }}
{more}
"""


def adorn(session: str = "s", **more: Any) -> bytes:
    """Render an event for the source `adorn`, which needs no token; the session is its subject."""
    return json.dumps({"event_type": "session.started", "session_id": session, **more}).encode()


def write_config(folder: Path, *parts: str, port: int = 0, url: str = "") -> Path:
    """Write a config.toml of `HEAD` and these parts; with port 0, the kernel chooses a free port.

    `url` is the database of several nodes; by default, the test's engine has one for each folder.
    """
    path = folder / "config.toml"
    text = "\n".join([HEAD.format(port=port), *parts])
    if url or KINDS[0] == "postgres":
        from postgres_stores import listen_url_of, url_of  # noqa: PLC0415 - needs asyncpg

        keys = f'url = "{url or url_of(folder)}"'
        if url and (listen_url := listen_url_of(url)):
            keys += f'\nlisten_url = "{listen_url}"'
        text = text.replace("[storage]", f"[storage]\n{keys}", 1)
    if listeners.current != "fast":
        text = text.replace("[server]", f'[server]\nimplementation = "{listeners.current}"', 1)
    path.write_text(text)
    return path


# --- in this process ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relay:
    """A running relay in this process."""

    app: App
    addresses: Addresses

    async def exchange(self, raw: bytes, *, bodiless: bool = False) -> Answer:
        """Send one request to the public listener on a new connection."""
        return await exchange(self.addresses.public, raw, bodiless=bodiless)

    async def operator(self, method: str, path: str) -> Any:
        """Ask the admin API on the unix socket, as the `relay` command does."""
        answer = await exchange(self.addresses.socket, request(method, path))
        assert answer.status == HTTPStatus.OK, answer
        return answer.json

    def counted(self, metric: str, **labels: str) -> float:
        """Return the current value of a metric."""
        return self.app.metrics.registry.get_sample_value(metric, labels) or 0.0

    async def rows(self, kind: str = "events", **filters: Any) -> list[dict[str, Any]]:
        """Return all matching rows of a list, oldest first."""
        found: list[dict[str, Any]] = []
        cursor, is_last = None, False
        while not is_last:
            page = await self.app.store.queries.page(kind, limit=500, cursor=cursor, **filters)
            found += page.rows
            cursor, is_last = page.cursor, page.cursor is None
        return found[::-1]

    async def event(self, public_id: str) -> StoredEvent:
        """Return one event with its body."""
        [row] = await self.rows(id=public_id)
        return (await self.app.store.events.load([row["row"]]))[row["row"]]


@asynccontextmanager
async def running(
    config: Path, *, settle: float = 0.0, clock: Clock | None = None, reserve: int = 0
) -> AsyncIterator[Relay]:
    """Run the relay in this process; stop it at the end of the block.

    By default, it stops at once and reserves no space on the disk, which takes time and matters to few tests.
    """
    with patch.object(app_module, "DISK_RESERVE", reserve):
        app = App(load(config), clock)
    ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    life = asyncio.create_task(app.run(ready.set_result))
    await asyncio.wait([life, ready], return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        await life
    with patch.object(server, "SETTLE", settle):
        try:
            yield Relay(app, ready.result())
        finally:
            app.stopping.set()
            await life
            web_app._cached_build_middleware.cache_clear()  # it keeps the last thousand relays in memory


# --- as a process -------------------------------------------------------------------------------------


class Daemon:
    """A `relay serve` process, which the end of the block kills if it still runs.

    It is forked from a Python process that has imported the relay. With `fresh`, it is started as an operator
    starts it.
    """

    def __init__(self, config: Path, command: Sequence[str] = SERVE, *, fresh: bool = False) -> None:
        self.config = config
        self.lines: deque[str] = deque(maxlen=1000)  # the last lines of its log
        self.logged = 0  # bytes
        self.url = ""
        self._command = command
        self._fresh = fresh

    async def __aenter__(self) -> Self:
        await self.start()
        try:
            await self.ready()
        except BaseException:
            await self.end()
            raise
        return self

    async def __aexit__(self, *_) -> None:
        await self.end()

    async def start(self) -> None:
        """Start the process and return at once."""
        environment = {name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"}
        command = (*self._command, "-c", str(self.config))
        self.process: asyncio.subprocess.Process | Forked
        if not self._fresh and Forked.may_run(command):
            self.process = await Forked.start(command, environment)
        else:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
        self._listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    async def ready(self, seconds: float = 30.0) -> None:
        """Wait until its log names the address of the public listener."""
        async with asyncio.timeout(seconds):
            self.url = await asyncio.shield(self._listening)

    async def exit(self, seconds: float = 30.0) -> int:
        """Wait until the process ends, and return its exit code."""
        async with asyncio.timeout(seconds):
            await self._reader
            return await self.process.wait()

    async def operator(self, method: str, path: str) -> Any:
        """Ask the admin API on the unix socket, as the `relay` command does."""
        answer = await exchange(self.config.parent / "state" / "relay.sock", request(method, path))
        assert answer.status == HTTPStatus.OK, answer
        return answer.json

    async def stop(self, seconds: float = 30.0) -> int:
        """Send SIGTERM, as systemd does, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.exit(seconds)

    async def end(self) -> None:
        """Kill the process if it still runs."""
        if self.process.returncode is None:
            self.process.kill()
        await self.exit()

    @property
    def output(self) -> str:
        """The last lines that the process wrote to stderr."""
        return "\n".join(self.lines)

    def resident(self) -> int:
        """Return the resident memory of the process in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            self.logged += len(raw)
            line = raw.decode().rstrip("\n")
            self.lines.append(line)
            if (found := re.search(r"listens on (http://[^\s,\"]+)", line)) and not self._listening.done():
                self._listening.set_result(found[1])
        if not self._listening.done():
            self._listening.set_exception(AssertionError(f"it never listened:\n{self.output}"))
            self._listening.exception()  # marks the exception as retrieved


# --- the service manager ------------------------------------------------------------------------------


class Manager:
    """The systemd side of a notify socket: it reads the daemon's messages."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self._flushes = []
        self.messages = []  # one dictionary per datagram
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def values(self, key):
        """Return all values of a key that have arrived so far, in order."""
        self._flush()
        return [message[key] for message in self.messages if key in message]

    def close(self):
        """Stop listening."""
        self._send("END")
        self._reader.join()
        self.socket.close()

    def _flush(self):
        """Wait until all datagrams sent so far have been read."""
        done = threading.Event()
        self._flushes.append(done)
        self._send("FLUSH")
        assert done.wait(30)

    def _send(self, word):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(word.encode(), self.socket.getsockname())

    def _read(self):
        while (datagram := self.socket.recv(4096).decode()) != "END":
            if datagram == "FLUSH":
                self._flushes.pop(0).set()
            else:
                self.messages.append(dict(line.split("=", 1) for line in datagram.split("\n")))


# --- a receiver ---------------------------------------------------------------------------------------


class Recorder:
    """A receiver that records deliveries and sends the responses that the test sets."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, dict[str, Any]]] = []  # (webhook-id, envelope)
        self.answers: deque[tuple[int, dict[str, str]]] = deque()  # for the next ones, then 200
        self.open = asyncio.Event()  # cleared: requests wait
        self.open.set()
        self.busy = 0
        self.url = ""

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}/hook"
        return self

    async def __aexit__(self, *_) -> None:
        self.open.set()
        await self._runner.cleanup()

    @property
    def ids(self) -> list[str]:
        """The ids of the events that arrived, in order, with repetitions."""
        return [id_ for id_, _ in self.arrived]

    def note(self, event_id: str, body: bytes) -> None:
        """Record a delivery."""
        self.arrived.append((event_id, json.loads(body)))

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        self.note(request.headers["webhook-id"], await request.read())
        status, headers = self.answers.popleft() if self.answers else (200, {})
        self.busy += 1
        try:
            await self.open.wait()
        finally:
            self.busy -= 1
        return web.Response(status=status, headers=headers)
