"""Daemons on one PostgreSQL database under load, for `tests.torture.cluster`: receivers, senders, faults.

Receivers note the node that sent each request. Triggers in the database note who held which lease until when,
so an audit can compare both.
"""

import asyncio
import itertools
import json
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg
from aiohttp import web
from daemons import HEAD, SERVE, Daemon, adorn, destination
from wire import Wire, exchange, request

from torture.cluster_workers import SOURCE

LEASE = 3.0  # seconds
TIMEOUT = 1.0  # seconds of an attempt; a node stops beginning attempts that long before a lease ends
PLAIN = ("d0", "d1", "d2", "d3")
ORDERED, DRIFT = "ordered", "drift"
LANES = (*PLAIN, ORDERED)  # of every node; the last node has `DRIFT` in addition
DIVIDED = (PLAIN[-1], ORDERED)  # into shards
LATEST, GROUPED, LIMITED = "latest", "grouped", "limited"
LIMIT = 30  # `max_pending` of `LIMITED`; less than the events of a takeover
MIXED = {  # further lanes, of nodes whose setup is mixed
    LATEST: 'latest_by = "subject"',
    GROUPED: 'group_by = "subject"\ngroup_wait = "0.3s"\ngroup_max = 5\nformat = "members"',
    LIMITED: f"max_pending = {LIMIT}",
}
FLEET = f"""
[plugins]
dirs = ["{Path(__file__).with_name("plugins")}"]
{SOURCE}"""
CONCURRENCY = 4
SENDERS = 3
KEYS = 4  # order keys that all senders share
PAUSE = 0.04  # seconds between two events of a sender
BACKLOG = 100  # events that have not arrived in order; with more, a busy machine would never catch up
MAX_PENDING = 100_000  # never reached
ANSWER = 0.01  # seconds until the receiver answers
TICK = 0.02  # seconds between two looks at how late the event loop is

READY = request("GET", "/ready")
CANCELLED = re.compile(r"(\w+): cancelled (\d+) attempts; they will be repeated")

HISTORY = """
CREATE TABLE torture_leases (id bigserial, name text, incarnation uuid, epoch bigint, until timestamptz,
                             shards int, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE torture_nodes (incarnation uuid, slot int, name text);
CREATE FUNCTION torture_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO torture_leases (name, incarnation, epoch, until, shards)
    VALUES (NEW.name, NEW.incarnation, NEW.epoch, NEW.until, coalesce((NEW.standing ->> 'shards')::int, 1));
    RETURN NULL;
END $$;
CREATE FUNCTION torture_node() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO torture_nodes VALUES (NEW.incarnation, NEW.slot, NEW.name);
    RETURN NULL;
END $$;
CREATE TRIGGER torture AFTER UPDATE ON leases FOR EACH ROW EXECUTE FUNCTION torture_lease();
CREATE TRIGGER torture AFTER INSERT ON nodes FOR EACH ROW EXECUTE FUNCTION torture_node();
INSERT INTO torture_nodes SELECT incarnation, slot, name FROM nodes;
INSERT INTO torture_leases (name, incarnation, epoch, until, shards, at)
SELECT name, incarnation, epoch, until, coalesce((standing ->> 'shards')::int, 1),
       clock_timestamp() - interval '1 minute' FROM leases;
"""


PENDING_SQL = """
    SELECT destination, attempts, count(*), min(id) AS first, min(slot) AS slot, min(order_key) AS order_key,
           min(next_attempt_at) / 1e6 - extract(epoch FROM clock_timestamp()) AS due_in,
           min(last_error) AS error
      FROM owed GROUP BY 1, 2
"""


@dataclass
class Arrival:
    """One request at the receiver; times are seconds since the Unix epoch."""

    destination: str
    event_id: str
    node: str
    began: float
    ended: float = float("inf")


@dataclass
class Sent:
    """One event that was acknowledged."""

    event_id: str
    sender: int
    subject: str
    at: float  # when it was sent; seconds since the Unix epoch
    acknowledged: float


@dataclass
class Fault:
    """One fault of nodes."""

    kind: str
    nodes: tuple[str, ...]
    began: float
    ended: float = float("inf")
    out: bool = False  # whether the load balancer noticed


class Receiver:
    """Receives the deliveries of all lanes; the path of a request is its destination."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.by_delivery: dict[tuple[str, str], list[Arrival]] = defaultdict(list)
        self.arrived: Counter[str] = Counter()  # events by destination
        self.times: dict[str, list[float]] = defaultdict(list)  # by destination
        self.busy: dict[str, set[int]] = defaultdict(set)  # indexes of arrivals
        self.crowds: list[tuple[float, str, int]] = []  # more requests at once than `concurrency`
        self.most_at_once = 0
        self.lag = 0.0  # the most that this event loop was late
        self.stalls: list[tuple[float, float]] = []  # when it was late by more than `TIMEOUT`

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        await self._runner.cleanup()

    def longest_pause(self, names: Sequence[str], since: float, until: float) -> float:
        """Return the longest time between two arrivals of a lane, within a span."""
        longest = 0.0
        for name in names:
            moments = [since, *(moment for moment in self.times[name] if since < moment < until), until]
            longest = max(longest, *(after - before for before, after in itertools.pairwise(moments)))
        return longest

    def longest_wait(self, names: Sequence[str], since: float) -> float:
        """Return the longest time without an arrival of a lane, from a moment until its last arrival."""
        waits = [0.0]
        for name in names:
            moments = [since, *(moment for moment in self.times[name] if moment > since)]
            waits += (after - before for before, after in itertools.pairwise(moments))
        return max(waits)

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        name, now = request.path.strip("/"), time.time()
        ids = json.loads(await request.read()) if name == GROUPED else [request.headers["webhook-id"]]
        number, arrivals = len(self.arrivals), []
        for id_ in ids:
            arrival = Arrival(name, id_, request.headers["x-node"], now)
            requests = self.by_delivery[name, id_]
            requests.append(arrival)
            arrivals.append(arrival)
            self.arrived[name] += len(requests) == 1
        self.arrivals += arrivals
        self.times[name].append(now)
        busy = self.busy[name]
        busy.add(number)
        self.most_at_once = max(self.most_at_once, len(busy))
        if len(busy) > CONCURRENCY:
            self.crowds.append((now, name, len(busy)))
        try:
            await request.read()
            await asyncio.sleep(ANSWER)  # a receiver takes time; nothing is waited for
        finally:
            busy.discard(number)
            for arrival in arrivals:
                arrival.ended = time.time()
        return web.Response()

    async def _tick(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK)
            late = time.monotonic() - before - TICK
            self.lag = max(self.lag, late)
            if late > TIMEOUT:
                self.stalls.append((time.time() - late, time.time()))


class Proxy:
    """A TCP proxy in front of the server, which a test can silence: connections stay open, nothing passes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = parts.hostname, parts.port
        self._parts = parts
        self.passes = asyncio.Event()
        self.passes.set()
        self.is_deaf = False  # whether it closes connections that listen for notifications
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._parts._replace(netloc=f"{self._parts.username}@127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.passes.set()
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.passes.wait()
        try:
            there, onward = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, onward}
        both = [self._pipe(reader, onward), self._pipe(there, writer)]
        await asyncio.gather(*both)
        self._writers -= {writer, onward}

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                await self.passes.wait()
                if self.is_deaf and b"LISTEN" in data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Setup:
    """The settings of a node for its next start."""

    ahead: float = 0.0  # seconds that its machine's clock is wrong
    version: str = "-"  # other than the program's
    url: str = ""  # of the database
    drifts: bool = False  # whether its config has one destination more
    shards: int = 3  # of the destinations in `DIVIDED`
    revision: int = 0  # of the settings of its destinations
    is_mixed: bool = False  # whether it has the lanes in `MIXED`, and workers
    more: str = ""  # lines of config.toml

    @property
    def command(self) -> Sequence[str]:
        """The command without `-c`."""
        if not self.ahead and self.version == "-":
            return SERVE
        odd = str(Path(__file__).with_name("odd_relay.py"))
        return (sys.executable, odd, f"{self.ahead:g}", self.version, "serve")


class Cluster:
    """Nodes on one database, and load on all of them."""

    def __init__(self, url: str, folder: Path, setups: Sequence[Setup]) -> None:
        self.url = url
        self.setups = setups
        self.sent: list[Sent] = []
        self.raced: list[dict[str, float]] = []  # ids of two nodes for one idempotency key, with their times
        self.faults: list[Fault] = []
        self.refused = 0  # requests that were not acknowledged
        self.cancelled: Counter[tuple[str, str]] = Counter()  # attempts by node and destination, at its stop
        self.out: set[int] = set()  # nodes that the load balancer has noticed to be out
        self.lanes_of_all = (*LANES, *(MIXED if setups[0].is_mixed else ()))  # without shards
        self.most_pending = 0  # deliveries for `LIMITED`
        self.nodes: list[Daemon] = []
        self._folder = folder
        self._loading = False
        self._sending = 0  # senders that wait for an answer, or will send again
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._life = AsyncExitStack()
        self.receiver = await self._life.enter_async_context(Receiver())
        self.nodes = [self._make(number) for number in range(len(self.setups))]
        await self.run(0)
        await self.execute(HISTORY)
        await asyncio.gather(*(self.run(number) for number in range(1, len(self.nodes))))
        self._tasks = [asyncio.create_task(self._send(number)) for number in range(SENDERS)]
        self._tasks += map(asyncio.create_task, (self._race(), self._watch()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(node.end() for node in self.nodes))
        await self._life.aclose()

    @property
    def acknowledged(self) -> set[str]:
        """The ids of all acknowledged events."""
        return {sent.event_id for sent in self.sent}.union(*self.raced)

    @property
    def behind(self) -> int:
        """The number of acknowledged events that have not arrived in order yet."""
        return len(self.sent) + len(self.raced) - self.receiver.arrived[ORDERED]

    async def run(self, number: int) -> None:
        """Start a node, and wait until it listens."""
        await self.nodes[number].start()
        await self.nodes[number].ready()

    async def restart(self, number: int) -> None:
        """Start a node again after its process has ended."""
        self.out.add(number)
        former, self.nodes[number] = self.nodes[number], self._make(number)
        for name, count in CANCELLED.findall(former.output):
            self.cancelled[f"n{number}", name] += int(count)
        self.nodes[number].url = former.url  # until it listens, senders are refused there
        await self.run(number)
        self.out.discard(number)

    def replace_state(self, number: int) -> None:
        """Let a node start with a new state folder; the former one stays, so the new one differs from it."""
        state = self.nodes[number].config.parent / "state"
        state.rename(state.with_name(f"state before {self.setups[number].revision}"))

    def signal(self, number: int, name: signal.Signals) -> None:
        """Send a signal to a node."""
        self.nodes[number].process.send_signal(name)

    async def fetch(self, sql: str, *values: Any) -> list[Any]:
        """Run a statement on a new connection, because the server may have changed; wait while it is down."""
        async with asyncio.timeout(60):
            while True:
                with suppress(OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError):
                    connection = await asyncpg.connect(self.url, target_session_attrs="read-write")
                    try:
                        return list(await connection.fetch(sql, *values))
                    finally:
                        await connection.close()
                await asyncio.sleep(0.1)

    async def execute(self, sql: str) -> None:
        """Run several statements."""
        connection = await asyncpg.connect(self.url, target_session_attrs="read-write")
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    async def is_ready(self, number: int) -> bool:
        """Return whether a node is ready, as the load balancer asks it."""
        answer = await exchange(self.nodes[number].config.parent / "state" / "relay.sock", READY)
        return answer.status == HTTPStatus.OK

    async def owners(self) -> dict[str, str]:
        """Return the name of the node that holds each lane."""
        rows = await self.fetch(
            "SELECT substr(l.name, 6), n.name FROM leases AS l JOIN nodes AS n USING (incarnation)"
            " WHERE l.name LIKE 'lane:%' AND until > clock_timestamp()"
        )
        return dict(map(tuple, rows))

    async def lanes(self) -> set[str]:
        """Return the lanes that send, of the destinations that every node has."""
        rows = await self.fetch(
            "SELECT substr(name, 6), coalesce((standing ->> 'shards')::int, 1) FROM leases"
            " WHERE substr(name, 6) = ANY($1::text[])",
            list(self.lanes_of_all),
        )
        return {
            lane
            for name, count in rows
            for lane in ([name] if count == 1 else [f"{name}/{number}" for number in range(max(count, 1))])
        }

    async def change(self, number: int, *, shards: int, seconds: float = 60.0) -> None:
        """Let a node use another number of shards, by a reload; the database may be away for a while."""
        self.setups[number].shards = shards
        self._write(number)
        socket = self.nodes[number].config.parent / "state" / "relay.sock"
        deadline = time.monotonic() + seconds
        while (answer := await exchange(socket, request("POST", "/api/reload"))).status != HTTPStatus.OK:
            assert answer.status == HTTPStatus.SERVICE_UNAVAILABLE, answer
            assert time.monotonic() < deadline, answer
            await asyncio.sleep(0.2)

    async def until_owned(self, by: Sequence[int], seconds: float = 60.0) -> None:
        """Wait until these nodes own the lanes that every node has."""
        wanted = {f"n{number}" for number in by}
        async with asyncio.timeout(seconds):
            while not await self._are_owned(wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def until_divided(self, count: int, seconds: float = 60.0) -> None:
        """Wait until the destinations in `DIVIDED` have a number of shards."""
        async with asyncio.timeout(seconds):
            wanted = len(self.lanes_of_all) + len(DIVIDED) * (count - 1)
            while len(await self.lanes()) != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def _are_owned(self, wanted: set[str]) -> bool:
        lanes, owners = await self.lanes(), await self.owners()
        return len(lanes) >= len(self.lanes_of_all) and {owners.get(lane) for lane in lanes} <= wanted

    async def load(self, *, on: bool) -> None:
        """Begin to send events, or stop and wait for the last answers."""
        self._loading = on
        for task in self._tasks:
            if task.done():  # a sender never ends by itself
                await task
        async with asyncio.timeout(60):
            while not on and self._sending:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)

    async def drained(self, seconds: float = 300.0) -> None:
        """Wait until no delivery is pending."""
        deadline = time.monotonic() + seconds
        while (await self.fetch("SELECT count(*) FROM owed"))[0][0]:
            if time.monotonic() > deadline:
                raise AssertionError(await self._pending())
            await asyncio.sleep(0.1)

    async def _pending(self) -> str:
        """Describe the deliveries that are pending, and the nodes."""
        lines = [f"pending: {dict(row)}" for row in await self.fetch(PENDING_SQL)]
        lines += [f"lane {lane}: {node}" for lane, node in sorted((await self.owners()).items())]
        lines += [f"{node.config}: {node.output[-3000:]}" for node in self.nodes]
        return "\n".join(lines)

    def begin(self, kind: str, *numbers: int, out: bool) -> Fault:
        """Note that a fault begins; with `out`, the load balancer notices."""
        fault = Fault(kind, tuple(f"n{number}" for number in numbers), time.time(), out=out)
        self.faults.append(fault)
        self.out |= set(numbers) if out else set()
        return fault

    def end(self, fault: Fault) -> None:
        """Note that a fault ends, and let the load balancer use the nodes again."""
        fault.ended = time.time()
        self.out -= {int(name[1:]) for name in fault.nodes} if fault.out else set()

    def _make(self, number: int) -> Daemon:
        return Daemon(self._write(number), self.setups[number].command)

    def _write(self, number: int) -> Path:
        """Write the config of a node."""
        setup = self.setups[number]
        folder = self._folder / f"node{number}"
        folder.mkdir(exist_ok=True)
        parts = [
            HEAD.format(port=0).replace("[storage]", f'[storage]\nurl = "{setup.url or self.url}"'),
            f'[cluster]\nnode = "n{number}"\nlease = "{LEASE:g}s"',
            '[sources.adorn]\nplugin = "adorn"',
            FLEET if setup.is_mixed else "",
            setup.more,
        ]
        options = (
            f'concurrency = {CONCURRENCY}\ntimeout = "{TIMEOUT:g}s"\nheaders = {{ x-node = "n{number}" }}'
        )
        for name in (*self.lanes_of_all, DRIFT) if setup.drifts else self.lanes_of_all:
            more = '\norder_by = "subject"' if name == ORDERED else ""
            more += f"\n{MIXED[name]}" if name in MIXED else ""
            more += f"\nmax_pending = {MAX_PENDING + setup.revision}" if name != LIMITED else ""
            more += f"\nshards = {setup.shards}" if name in DIVIDED and setup.shards > 1 else ""
            parts.append(destination(name, f"{self.receiver.url}/{name}", options + more))
        path = folder / "config.toml"
        path.write_text("\n".join(parts))
        return path

    async def _send(self, number: int) -> None:
        """Send events to the nodes in turn; a node that does not answer is left out for a while."""
        for turn in itertools.count(number):
            node = turn % len(self.nodes)
            if not self._loading or node in self.out:
                await asyncio.sleep(0.01)
                continue
            self._sending += 1
            try:
                async with asyncio.timeout(2.0), await Wire.open(self.nodes[node].url) as wire:
                    for step in range(8):
                        subject, at = f"key {(number + step) % KEYS}", time.time()
                        # Equal bytes would repeat an event whose sender has disconnected.
                        body = adorn(subject, number=f"{number} {turn} {step}")
                        await wire.send(request("POST", "/v1/events", body))
                        answer = await wire.answer()
                        if answer.status < 300:
                            id_ = answer.json["event_id"]
                            self.sent.append(Sent(id_, number, subject, at, time.time()))
                        else:
                            self.refused += 1
                        await asyncio.sleep(PAUSE if self.behind < BACKLOG else 10 * PAUSE)
            except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
                await asyncio.sleep(PAUSE)  # killed, stopped or frozen
            finally:
                self._sending -= 1

    async def _race(self) -> None:
        """Send a request with one idempotency key to two nodes at once, again and again."""
        for turn in itertools.count():
            usable = [number for number in range(len(self.nodes)) if number not in self.out]
            if not self._loading or len(usable) < 2:
                await asyncio.sleep(0.01)
                continue
            body, key = adorn(f"race {turn}"), f"race {turn}"
            raw = request("POST", "/v1/events", body, idempotency_key=key)
            self._sending += 1
            try:
                pair = usable[turn % len(usable)], usable[(turn + 1) % len(usable)]
                found = await asyncio.gather(*(self._ask(number, raw) for number in pair))
                if not all(found):  # the sender tries again elsewhere
                    found.append(await self._ask((turn + 2) % len(self.nodes), raw))
                self.raced.append({id_: time.time() for id_ in found if id_})
                await asyncio.sleep(2 * PAUSE)
            finally:
                self._sending -= 1

    async def _watch(self) -> None:
        """Note how many deliveries of `LIMITED` are pending."""
        while LIMITED in self.lanes_of_all:
            [(count,)] = await self.fetch("SELECT count(*) FROM owed WHERE destination = $1", LIMITED)
            self.most_pending = max(self.most_pending, count)
            await asyncio.sleep(0.2)

    async def _ask(self, number: int, raw: bytes) -> str:
        """Send one request; returns the id of the event if it is acknowledged."""
        try:
            async with asyncio.timeout(2.0), await Wire.open(self.nodes[number].url) as wire:
                await wire.send(raw)
                answer = await wire.answer()
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            return ""
        return str(answer.json["event_id"]) if answer.status < 300 else ""
