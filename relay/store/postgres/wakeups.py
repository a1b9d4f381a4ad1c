"""Wake-ups: a node tells the others which lanes have new deliveries, and receives the same from them.

They are sent after the commit, on a separate connection: PostgreSQL runs the commits of transactions with
NOTIFY one after another, which made 32 writers 9 times slower (pgbench). A lost wake-up costs a poll.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import msgspec

log = logging.getLogger("relay.store")

CHANNEL = "relay"
PAUSE = 0.02  # seconds between two notifications of a node
POLL = 0.25  # seconds between polls of the database while notifications do not arrive
PROBE_EVERY = 2.0  # seconds between checks whether notifications arrive; a silent network is noticed by them
PROBE_TIMEOUT = 2.0
TIMEOUT = 5.0  # seconds of one statement
RETRY = 1.0  # seconds until the next attempt to connect
MOST_BYTES = 7000
"""Bytes of names in one notification; PostgreSQL allows 8,000 for the payload."""


class WakeUp(msgspec.Struct, frozen=True, omit_defaults=True):
    """The announcement of another node."""

    sender: str  # incarnation
    lanes: tuple[str, ...] = ()  # destinations with deliveries that are due now
    retries: bool = False  # these are retries, too
    late: bool = False  # their commit took so long that they were due several seconds ago
    leases: bool = False  # a lease may be free
    requests: bool = False  # a request of an operator waits for the owner of a lane
    unheard: bool = False  # a reply did not reach its sender, which may repeat its request elsewhere
    is_poll: bool = False  # not announced: notifications do not arrive, so anything may have happened
    probe: int = 0  # sent by a node to itself


class Notifications(Protocol):
    """A connection of asyncpg, as far as wake-ups use it."""

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        """Listen on a channel."""
        ...

    async def execute(self, query: str, *args: Any) -> str:
        """Run a statement."""
        ...

    def add_termination_listener(self, callback: Callable[..., None]) -> None:
        """Call a function when the connection is lost."""
        ...

    def terminate(self) -> None:
        """Close the connection at once."""
        ...


class WakeUps:
    """Sends and receives wake-ups, until `stop`."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Notifications]] | None,
        sender: str,
        on_wake_up: Callable[[WakeUp], None],
    ) -> None:
        """Take a function that connects; None: a pooler is in between, so this node only polls.

        Behind a pooler, a probe may arrive by chance, on the session that happens to listen.
        """
        self.arrives = False  # whether notifications arrive
        self.fails = False  # whether they should arrive, but do not
        self.delay = POLL  # seconds that one takes, or until the next look at the database
        self._connect = connect
        self._sender = sender
        self._on_wake_up = on_wake_up
        self._connection: Notifications | None = None
        self._lock = asyncio.Lock()  # held while the connection is made or used
        self._lanes: dict[bool, set[str]] = {False: set(), True: set()}  # to announce; by `WakeUp.retries`
        self._leases = self._requests = self._unheard = self._late = False
        self._due = asyncio.Event()  # an announcement is waiting
        self._probe = 0  # number of the latest probe
        self._answered = asyncio.Event()  # the latest probe has arrived
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Connect and listen in the background."""
        if self._connect is not None:
            self._tasks = [asyncio.create_task(work) for work in (self._listen(self._connect), self._send())]
        self._tasks.append(asyncio.create_task(self._poll()))

    async def stop(self) -> None:
        """Send the waiting announcements if possible, and disconnect."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Exception):
            await self._flush()
        self._disconnect()

    def announce(
        self,
        lanes: Iterable[str] = (),
        *,
        retries: bool = False,
        leases: bool = False,
        requests: bool = False,
        unheard: bool = False,
        late: bool = False,
    ) -> None:
        """Announce a wake-up to the other nodes, soon and together with other announcements."""
        self._lanes[retries].update(lanes)
        self._leases |= leases
        self._requests |= requests
        self._unheard |= unheard
        self._late |= late
        if self._connect is not None:
            self._due.set()

    async def _listen(self, connect: Callable[[], Awaitable[Notifications]]) -> None:
        """Keep a connection that listens, and check that notifications arrive."""
        while True:
            lost = asyncio.Event()
            try:
                async with self._lock:
                    self._connection = await connect()
                    self._connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    async with asyncio.timeout(TIMEOUT):
                        await self._connection.add_listener(CHANNEL, self._receive)
                self._due.set()
                while not lost.is_set():
                    await self._check()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(PROBE_EVERY):
                            await lost.wait()
            except Exception as error:  # noqa: BLE001 - after any error, the node polls
                log.debug("wake-ups do not arrive: %s", error)
            self.arrives, self.delay = False, POLL
            self._disconnect()
            await asyncio.sleep(RETRY)

    async def _check(self) -> None:
        """Send a probe to this node. A pooler in transaction mode lets no notification through."""
        self._probe += 1
        self._answered.clear()
        sent = asyncio.get_running_loop().time()
        await self._notify(WakeUp(self._sender, probe=self._probe))
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self._answered.wait()
        except TimeoutError:
            if self.arrives:
                log.warning("PostgreSQL's notifications do not arrive; polling every %g s instead", POLL)
            self.arrives, self.fails, self.delay = False, True, POLL
        else:
            self.arrives, self.fails = True, False
            self.delay = asyncio.get_running_loop().time() - sent

    def _receive(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        try:
            heard = msgspec.json.decode(payload, type=WakeUp)
        except msgspec.DecodeError:
            log.debug("a notification on the channel %s is not from a relay", CHANNEL)
            return
        if heard.sender == self._sender:
            if heard.probe == self._probe:
                self._answered.set()
        elif not heard.probe:
            self._on_wake_up(heard)

    async def _send(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            with suppress(Exception):  # the next poll of the database replaces it
                await self._flush()
            await asyncio.sleep(PAUSE)

    async def _flush(self) -> None:
        if self._connection is None:  # sent once it is connected
            return
        lanes, self._lanes = self._lanes, {False: set(), True: set()}
        late, self._late = self._late, False
        others = WakeUp(self._sender, leases=self._leases, requests=self._requests, unheard=self._unheard)
        self._leases = self._requests = self._unheard = False
        try:
            for retries, names in lanes.items():
                for portion in _portions(sorted(names)):
                    await self._notify(WakeUp(self._sender, portion, retries, late))
            if others != WakeUp(self._sender):
                await self._notify(others)
        except BaseException:  # sent again after the next connect
            for retries, names in lanes.items():
                self._lanes[retries] |= names
            self._leases |= others.leases
            self._requests |= others.requests
            self._unheard |= others.unheard
            self._late |= late
            raise

    async def _notify(self, message: WakeUp) -> None:
        payload = msgspec.json.encode(message).decode()
        async with self._lock, asyncio.timeout(TIMEOUT):
            if self._connection is None:
                raise ConnectionError("not connected")
            await self._connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            if not self.arrives:
                self._on_wake_up(WakeUp("", is_poll=True))

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


def _portions(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Divide names into portions that fit into one notification each."""
    portion: list[str] = []
    size = 0
    for name in names:
        size += len(name) + 3
        if size > MOST_BYTES:
            yield tuple(portion)
            portion, size = [], len(name) + 3
        portion.append(name)
    if portion:
        yield tuple(portion)
