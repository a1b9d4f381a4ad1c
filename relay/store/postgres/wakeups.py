"""Wake-ups: a node tells the others which lanes have new deliveries, and receives the same from them.

They are sent after the commit, on a separate connection: PostgreSQL runs the commits of transactions with
NOTIFY one after another, which made 32 writers 9 times slower (pgbench). A lost wake-up costs a poll.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import msgspec

from relay.store.postgres.connection import text_of

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
    since: int = 0  # their earliest due time; claims may have passed it before the commit
    retries: bool = False  # these are retries, too
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
        listen: Callable[[], Awaitable[Notifications]] | None,
        sender: str,
        on_wake_up: Callable[[WakeUp], None],
        *,
        send: Callable[[], Awaitable[Notifications]] | None = None,
    ) -> None:
        """Take functions that connect. With `send`, there is another connection for sending.

        Behind a pooler, notifications can be sent, but not received: without `listen`, this node polls.
        """
        self.arrives = False  # whether notifications arrive
        self.failure: str | None = None  # why they do not arrive, although they should
        self.delay = POLL  # seconds that one takes, or until the next look at the database
        self._connect, self._connect_sender = listen, send
        self._sender = sender
        self._on_wake_up = on_wake_up
        self._connection: Notifications | None = None  # listens, and sends unless there is another
        self._sending: Notifications | None = None
        self._lock = asyncio.Lock()  # held while the connection that sends is made or used
        self._can_send = asyncio.Event()
        self._lanes: dict[bool, dict[str, int]] = {False: {}, True: {}}  # by `WakeUp.retries`, with `since`
        self._leases = self._requests = self._unheard = False
        self._due = asyncio.Event()  # an announcement is waiting
        self._probe = 0  # number of the latest probe
        self._answered = asyncio.Event()  # the latest probe has arrived
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Connect and listen in the background, unless that has begun already."""
        if self._tasks:
            return
        if self._connect is not None:
            self._tasks.append(asyncio.create_task(self._listen(self._connect)))
        if self._connect_sender is not None:
            self._tasks.append(asyncio.create_task(self._keep_sending(self._connect_sender)))
        if self._tasks:
            self._tasks.append(asyncio.create_task(self._send()))
        self._tasks.append(asyncio.create_task(self._poll()))

    async def stop(self) -> None:
        """Send the waiting announcements if possible, and disconnect."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Exception):
            await self._flush()
        for connection in (self._connection, self._sending):
            if connection is not None:
                connection.terminate()

    def announce(
        self,
        lanes: Iterable[str] = (),
        *,
        since: int = 0,
        retries: bool = False,
        leases: bool = False,
        requests: bool = False,
        unheard: bool = False,
    ) -> None:
        """Announce a wake-up to the other nodes, soon and together with other announcements."""
        self._add_lanes(dict.fromkeys(lanes, since), retries=retries)
        self._leases |= leases
        self._requests |= requests
        self._unheard |= unheard
        self._due.set()

    def _add_lanes(self, lanes: Mapping[str, int], *, retries: bool) -> None:
        waiting = self._lanes[retries]
        for name, since in lanes.items():
            waiting[name] = min(since, waiting.get(name, since))

    async def _listen(self, connect: Callable[[], Awaitable[Notifications]]) -> None:
        """Keep a connection that listens, and check that notifications arrive."""
        sends = self._connect_sender is None
        while True:
            lost, why = asyncio.Event(), "the connection was lost"
            try:
                async with self._lock if sends else nullcontext():
                    self._connection = await connect()
                    self._connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    async with asyncio.timeout(TIMEOUT):
                        await self._connection.add_listener(CHANNEL, self._receive)
                if sends:
                    self._can_send.set()
                    self._due.set()
                while not lost.is_set():
                    await self._can_send.wait()
                    await self._check()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(PROBE_EVERY):
                            await lost.wait()
            except Exception as error:  # noqa: BLE001 - after any error, the node polls
                why = text_of(error)
            self._stop_listening(why)
            if sends:
                self._can_send.clear()
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.terminate()
            await asyncio.sleep(RETRY)

    async def _keep_sending(self, connect: Callable[[], Awaitable[Notifications]]) -> None:
        """Keep a connection that only sends."""
        while True:
            lost = asyncio.Event()
            with suppress(Exception):  # the writer reports that the database cannot be reached
                async with self._lock:
                    self._sending = await connect()
                    self._sending.add_termination_listener(lambda _, lost=lost: lost.set())
                self._can_send.set()
                self._due.set()
                await lost.wait()
            self._can_send.clear()
            self._sending = None
            await asyncio.sleep(RETRY)

    def _stop_listening(self, why: str) -> None:
        """Poll from now on."""
        if self.arrives:
            log.warning("PostgreSQL's notifications do not arrive, polling every %g s instead: %s", POLL, why)
        self.arrives, self.failure, self.delay = False, why, POLL

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
            self._stop_listening(f"a test notification was not received within {PROBE_TIMEOUT:g} s")
        else:
            self.arrives, self.failure = True, None
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
        if not self._can_send.is_set():  # sent once it is connected
            return
        lanes, self._lanes = self._lanes, {False: {}, True: {}}
        others = WakeUp(self._sender, leases=self._leases, requests=self._requests, unheard=self._unheard)
        self._leases = self._requests = self._unheard = False
        try:
            for retries, due in lanes.items():
                for names in _portions(sorted(due)):
                    since = min(due[name] for name in names)
                    await self._notify(WakeUp(self._sender, names, since, retries))
            if others != WakeUp(self._sender):
                await self._notify(others)
        except BaseException:  # sent again after the next connect
            for retries, due in lanes.items():
                self._add_lanes(due, retries=retries)
            self._leases |= others.leases
            self._requests |= others.requests
            self._unheard |= others.unheard
            raise

    async def _notify(self, message: WakeUp) -> None:
        payload = msgspec.json.encode(message).decode()
        async with self._lock:
            connection = self._connection if self._connect_sender is None else self._sending
            if connection is None:
                raise ConnectionError("not connected")
            try:
                async with asyncio.timeout(TIMEOUT):
                    await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
            except BaseException:
                connection.terminate()
                raise

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            if not self.arrives:
                self._on_wake_up(WakeUp("", is_poll=True))


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
