"""`relay serve --demo --nodes N`: nodes on one PostgreSQL database, of which one is killed under load."""

import asyncio
import base64
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import msgspec

from relay import __version__
from relay.config.secrets import Secret
from relay.demo.keeper import kept
from relay.demo.receiver import Received, Receiver
from relay.errors import RelayError, StorageError, installing
from relay.keys import SHARED
from relay.store import Stop
from relay.store.opening import offline_store

LANES = ("billing", "chat", "crm", "erp", "mail", "search")
RATE = 40.0  # events per second
WARM_UP = 3.0  # seconds under load before the node is killed
AFTERWARDS = 2.0  # seconds under load after the node came back
STEADY = 4.0  # seconds without a change of lanes: longer than a lease, after which a new node gets lanes
STUBBORN = 20.0  # seconds to wait for lanes on several nodes; afterwards, one node has all of them by chance
PATIENCE = 60.0  # seconds for each step
LONGEST = 600.0  # seconds until the demo ends by itself
ENVIRONMENT = "RELAY_DEMO_STORAGE"

INHERITED = (
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "STATE_DIRECTORY", "RUNTIME_DIRECTORY",
)  # fmt: skip
"""Variables of systemd that a node must not use."""

CONFIG = """\
development = true
state_dir = "."
[server]
listen = "127.0.0.1:{port}"
shutdown_grace = "5s"
[admin]
listen = "127.0.0.1:{admin}"
[log]
level = "error"
[storage]
url = {{ env = "{environment}" }}
[cluster]
node = "{name}"
lease = "3s"
[sources.adorn]
plugin = "adorn"
"""
DESTINATION = """\
[destinations.{name}]
url = "{url}/{name}"
secrets = ["{secret}"]
allow_private = true
timeout = "1s"
retry = {{ schedule = ["0.2s", "0.5s", "1s", "2s", "5s"] }}
"""
CODE = """\
from relay.demo.keeper import end_with_the_demo
end_with_the_demo()
from relay.cli import main
main()
"""
SERVE = ("-c", CODE, "serve", "--force", "-c")


class _Subject(msgspec.Struct):
    subject: str


class Arrivals:
    """Counts the deliveries that the receiver got, by destination and subject of the event."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.invalid = 0  # with an invalid signature
        self.longest: dict[str, float] = dict.fromkeys(LANES, 0.0)  # seconds between two deliveries
        self._latest: dict[str, float] = {}
        self._decoder = msgspec.json.Decoder(_Subject)

    def receive(self, received: Received) -> None:
        """Count one request; called in a thread."""
        lane, now = received.path.strip("/"), time.monotonic()
        self.invalid += received.problem is not None
        self.counts[lane, self._decoder.decode(received.body).subject] += 1
        self.longest[lane] = max(self.longest.get(lane, 0.0), now - self._latest.get(lane, now))
        self._latest[lane] = now


class Node:
    """A daemon in a separate process."""

    def __init__(self, name: str, folder: Path, url: str, destinations: str, pipe: int) -> None:
        """Take the `pipe` that ends with the demo; see `relay.demo.keeper`."""
        self.name = name
        self.public, self.admin = _free_port(), _free_port()
        self.process: asyncio.subprocess.Process | None = None
        self._pipe = pipe
        self._environment = {**os.environ, ENVIRONMENT: url}
        for inherited in INHERITED:
            self._environment.pop(inherited, None)
        folder.mkdir(mode=0o700)
        self.config = folder / "config.toml"
        self.config.touch(mode=0o600)
        head = CONFIG.format(port=self.public, admin=self.admin, name=name, environment=ENVIRONMENT)
        self.config.write_text(head + destinations)

    async def start(self) -> None:
        """Start the process; it is ready later."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *SERVE, str(self.config), env=self._environment, stdin=self._pipe,
            start_new_session=True,
        )  # fmt: skip

    async def end(self, number: signal.Signals) -> None:
        """Send a signal and wait until the process has ended."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            try:
                async with asyncio.timeout(PATIENCE / 4):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()

    @property
    def has_ended(self) -> bool:
        """Whether the process is not running."""
        return self.process is None or self.process.returncode is not None


class ClusterDemo:
    """The steps of the demo: load, a kill, a takeover, the return of the node, and the count."""

    def __init__(self, nodes: list[Node], arrivals: Arrivals, session: aiohttp.ClientSession) -> None:
        self._nodes = nodes
        self._arrivals = arrivals
        self._session = session
        self._began = time.monotonic()
        self._acknowledged: list[str] = []  # subjects
        self._refused = 0  # attempts of the sender that another node then accepted
        self._is_sending = True

    @property
    def _age(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"{self._age:6.1f} s  {text}", flush=True)

    async def run(self) -> list[str]:
        """Run the steps; return the problems."""
        everyone = {node.name for node in self._nodes}
        owners = await self._until(
            lambda names, owners: (
                names == everyone and (len(set(owners.values())) > 1 or self._age > STUBBORN)
            ),
            steady=1.5,
        )
        self.say(f"lanes: {_shown(owners)}")
        sender = asyncio.create_task(self._send())
        try:
            await asyncio.sleep(WARM_UP)
            await self._kill_one()
            await asyncio.sleep(AFTERWARDS)
        finally:
            self._is_sending = False
            await sender
        return await self._count()

    async def _kill_one(self) -> None:
        _, owners = await self._state()
        [(name, _)] = Counter(owners.values()).most_common(1)
        node = next(node for node in self._nodes if node.name == name)
        lost = sorted(lane for lane, owner in owners.items() if owner == name)
        await node.end(signal.SIGKILL)
        killed = time.monotonic()
        self.say(f"killed {name} with SIGKILL; it ran {', '.join(lost)}")
        owners = await self._until(lambda _, owners: all(owners[lane] != name for lane in lost))
        self.say(f"other nodes took over after {time.monotonic() - killed:.1f} s: {_shown(owners)}")
        await node.start()
        owners = await self._until(lambda names, _: name in names, steady=STEADY)
        self.say(f"{name} is back: {_shown(owners)}")

    async def _count(self) -> list[str]:
        """Wait until everything that was acknowledged has arrived, and print the result."""
        expected = {(lane, subject) for lane in LANES for subject in self._acknowledged}
        self.say(
            f"{len(self._acknowledged)} events were acknowledged; waiting for the rest of their deliveries"
        )
        deadline = time.monotonic() + PATIENCE
        while (  # noqa: ASYNC110 - deliveries arrive in another thread
            missing := expected - self._arrivals.counts.keys()
        ) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        doubled = sum(count - 1 for count in self._arrivals.counts.values())
        pause = max(self._arrivals.longest.values())
        self.say(
            f"acknowledged {len(self._acknowledged)} events, delivered {len(expected) - len(missing)} of "
            f"{len(expected)} deliveries, lost {len(missing)}"
        )
        self.say(
            f"in flight during the kill, so sent twice: {doubled}; longest pause of a lane: {pause:.1f} s"
        )
        problems = [f"{len(missing)} deliveries are missing"] if missing else []
        if self._arrivals.invalid:
            problems.append(f"{self._arrivals.invalid} deliveries had an invalid signature")
        if not self._acknowledged:
            problems.append("no node acknowledged an event")
        if not problems:
            self.say("nothing was lost")
        return problems

    async def _send(self) -> None:
        """Send events to the nodes in turn, as a load balancer does: the next one if a node fails."""
        number, pause = 0, 1 / RATE
        while self._is_sending:
            subject = f"session-{number}"
            body = json.dumps({"event_type": "session.started", "session_id": subject})
            for attempt in range(100):
                node = self._nodes[(number + attempt) % len(self._nodes)]
                if await self._post(node, body, subject):
                    self._acknowledged.append(subject)
                    break
                self._refused += 1
                await asyncio.sleep(0.02)
            number += 1
            await asyncio.sleep(pause)

    async def _post(self, node: Node, body: str, key: str) -> bool:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        url = f"http://127.0.0.1:{node.public}/v1/events"
        try:
            async with self._session.post(url, data=body, headers=headers) as response:
                return response.ok
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _state(self) -> tuple[set[str], dict[str, str]]:
        """Return the live nodes, and the node that runs each lane, as the first node that answers knows."""
        for node in self._nodes:
            connector = aiohttp.UnixConnector(f"{node.config.parent}/relay.sock")
            with suppress(aiohttp.ClientError, TimeoutError):
                async with (
                    _session(connector) as session,
                    session.get("http://localhost/api/nodes") as response,
                ):
                    if response.ok:
                        items: list[dict[str, Any]] = (await response.json())["items"]
                        owners = {lane: item["name"] for item in items for lane in item["lanes"]}
                        return {item["name"] for item in items}, owners
        return set(), {}

    async def _until(
        self, condition: Callable[[set[str], dict[str, str]], bool], *, steady: float = 0.0
    ) -> dict[str, str]:
        """Wait until nodes and owners fulfil a condition, and return the owners.

        All lanes must have an owner, and keep it for `steady` seconds.

        Raises:
            RelayError: that did not happen in time, or no node runs any more.
        """
        now = time.monotonic()
        deadline, since = now + PATIENCE, now
        latest: dict[str, str] = {}
        while True:
            names, owners = await self._state()
            now = time.monotonic()
            if owners != latest or not (owners.keys() >= set(LANES) and condition(names, owners)):
                since, latest = now, owners
            if now - since >= steady and owners.keys() >= set(LANES) and condition(names, owners):
                return owners
            if now > deadline or all(node.has_ended for node in self._nodes):
                raise RelayError(f"the demo failed: {_shown(owners) or 'no node runs'}")
            await asyncio.sleep(0.1)

    async def wait(self) -> None:
        """Let the operator try more, for a limited time."""
        self.say(f"the cluster runs for {LONGEST / 60:.0f} more minutes; Ctrl-C ends it. Try:")
        for node in self._nodes:
            pid = node.process.pid if node.process else 0
            print(f"  {node.name}: relay nodes -c {node.config}    kill -9 {pid}", flush=True)
        await asyncio.sleep(LONGEST)


async def run_cluster_demo(count: int, storage: str | None, *, leave: bool) -> int:
    """Run the demo with this number of nodes until Ctrl-C, or with `leave` until its last step.

    Returns the exit code: 1 if something was lost, or with `leave` if the demo was interrupted.

    Raises:
        RelayError: a server or a node does not start, or the database is not empty.
    """
    if find_spec("asyncpg") is None:
        hint = f"install it: {installing('asyncpg')}"
        raise RelayError("the demo of a cluster needs the package asyncpg", hint=hint)
    demo = asyncio.create_task(_demo(count, storage, leave=leave))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, demo.cancel)
    await asyncio.wait([demo])
    return int(leave) if demo.cancelled() else demo.result()


async def _demo(count: int, storage: str | None, *, leave: bool) -> int:
    if storage is None:
        print("starting a temporary PostgreSQL server", flush=True)
    else:
        await asyncio.to_thread(_refuse_used, storage)
    async with AsyncExitStack() as life:
        keeper = await life.enter_async_context(kept(with_server=storage is None))
        for removed in keeper.removed:
            print(f"removed {removed}, left by an earlier demo", flush=True)
        url, folder = storage or keeper.url, Path(keeper.folder)
        key = Secret(SHARED + base64.b64encode(secrets.token_bytes(32)).decode())
        arrivals = Arrivals()
        receiver = Receiver((key,), arrivals.receive)
        Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        life.callback(receiver.server_close)
        life.callback(receiver.shutdown)
        tables = "".join(
            DESTINATION.format(name=name, url=receiver.url, secret=key.reveal()) for name in LANES
        )
        names = [f"node-{number}" for number in range(1, count + 1)]
        nodes = [Node(name, folder / name, url, tables, keeper.pipe) for name in names]
        session = await life.enter_async_context(_session())
        await life.enter_async_context(_running(nodes))
        print(f"hookferry {__version__}: {count} nodes on one PostgreSQL database", flush=True)
        for node in nodes:
            print(f"  {node.name}  http://127.0.0.1:{node.public}, admin port {node.admin}", flush=True)
        demo = ClusterDemo(nodes, arrivals, session)
        problems = await demo.run()
        for problem in problems:
            demo.say(f"PROBLEM: {problem}")
        if not leave:
            await demo.wait()
    return int(bool(problems))


@asynccontextmanager
async def _running(nodes: list[Node]) -> AsyncIterator[None]:
    async with AsyncExitStack() as life:
        for node in nodes:
            await node.start()
            life.push_async_callback(node.end, signal.SIGTERM)
        yield
        await asyncio.gather(*(node.end(signal.SIGTERM) for node in nodes))


def _session(connector: aiohttp.BaseConnector | None = None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=3.0))


def _refuse_used(url: str) -> None:
    """Check that a database has no tables of a relay, because the nodes of the demo would join it.

    Raises:
        RelayError: the database has such tables.
    """
    try:
        offline_store(url, Path()).measure(Stop())
    except StorageError as error:
        if "no tables yet" in error.message:
            return
        raise
    raise RelayError("the database already has tables of a relay", hint="name an empty database")


def _shown(owners: dict[str, str]) -> str:
    """Render the lanes of each node."""
    lanes: dict[str, list[str]] = {}
    for lane, owner in sorted(owners.items()):
        lanes.setdefault(owner, []).append(lane)
    return "; ".join(f"{owner}: {', '.join(names)}" for owner, names in sorted(lanes.items()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
