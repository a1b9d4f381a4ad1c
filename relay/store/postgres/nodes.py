"""Nodes over PostgreSQL: leases determine which node runs each lane and each job of the cluster.

A lease is a row. It names the incarnation (a random id, new at each start) of the node that holds it until a
time, by the server's clock; its epoch grows by one whenever it changes hands. A node renews exactly the pairs
of name and epoch that it took, so it never renews what it has lost.
"""

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from relay import __version__
from relay.base.clock import SECOND, Clock
from relay.base.shards import destination_of
from relay.config.effective import Digests
from relay.errors import StorageError
from relay.model import Caution, Node
from relay.store import Answers, Attendant, Ownership, Standing
from relay.store.batch import Scope
from relay.store.postgres.clock import ServerClock
from relay.store.postgres.leases import (
    ABSENT,
    CHANGING,
    JOB,
    LANE,
    SETTLE_IN,
    SLOTS,
    Lease,
    Peer,
    bar,
    free_slot,
    in_force,
    length_of,
    next_shards,
    plan,
    trusted_until,
    wanted_shards,
)
from relay.store.postgres.replies import Replies
from relay.store.postgres.requests import NODE, Handle, Requests
from relay.store.postgres.wakeups import POLL, Notifications, WakeUp, WakeUps

log = logging.getLogger("relay.store")

LIVE = 5.0
"""Seconds after its latest renewal for which a node counts as live, or the length of a lease if shorter."""

FORGET_AFTER = 3600.0
"""Seconds without a renewal after which a node's row is deleted and its slot is used again."""

LEFT = FORGET_AFTER / 2
"""Seconds by which a node that leaves backdates its row, so that others plan without it at once."""

CROWDED = 60.0
"""The same while all slots are in use, for example after a loop of crashes."""

FORMER = 4
"""Maximum number of former definitions of a lane that a node publishes."""

COMPARISONS = 5
"""Comparisons of the clocks at the start; the one with the shortest round trip counts."""

NOW_SQL = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now"

ASSIGN_EVERY = 60 * SECOND
"""Microseconds between two searches for deliveries of a divided destination without a slot."""

ORPHANS = "retention"
"""The job whose node ends the deliveries of destinations that no node has in its config."""


# --- the rows -------------------------------------------------------------------------------------

JOIN_SQL = """
    INSERT INTO nodes (incarnation, slot, name, version, schema, config_digest, destinations, internal_url,
                       started, seen, shards, definitions, place, former)
    VALUES ($1::uuid, $2, $3, $4, $5, $6, $7::text[], NULL, clock_timestamp(), clock_timestamp(),
            $8::text::jsonb, $9::text::jsonb, nullif($10, ''), $11::text::jsonb)
        ON CONFLICT DO NOTHING
"""

SUCCEED_SQL = """
    WITH dead AS (
        UPDATE nodes SET place = NULL,
               seen = least(seen, clock_timestamp() - $3::float8 * interval '1 second')
         WHERE place = $2 AND incarnation <> $1::uuid
        RETURNING incarnation
    )
    UPDATE leases AS l SET until = clock_timestamp()
      FROM dead WHERE l.incarnation = dead.incarnation AND l.until > clock_timestamp()
    RETURNING l.name
"""

FORGET_SQL = "DELETE FROM nodes WHERE seen < clock_timestamp() - $1::float8 * interval '1 second'"

SEEN_SQL = """
    UPDATE nodes SET seen = clock_timestamp(), destinations = $2::text[], config_digest = $3,
                     shards = $4::text::jsonb, definitions = $5::text::jsonb, former = $6::text::jsonb
     WHERE incarnation = $1::uuid
    RETURNING slot
"""

LEAVE_SQL = """
    UPDATE nodes SET seen = least(seen, clock_timestamp() - $2::float8 * interval '1 second')
     WHERE incarnation = $1::uuid
"""

RENEW_SQL = """
    UPDATE leases AS l
       SET until = clock_timestamp() + h.length * interval '1 second', definition = h.definition,
           standing = CASE WHEN h.standing IS NULL THEN l.standing
                           ELSE coalesce(l.standing, '{}') || h.standing::jsonb END
      FROM unnest($2::text[], $3::bigint[], $4::float8[], $5::text[], $6::text[])
           AS h (name, epoch, length, standing, definition)
     WHERE l.name = h.name AND l.epoch = h.epoch AND l.incarnation = $1::uuid AND l.until > clock_timestamp()
    RETURNING l.name
"""

TAKE_SQL = """
    WITH free AS MATERIALIZED (
        SELECT name FROM leases WHERE name = ANY($2::text[]) AND until <= clock_timestamp()
         ORDER BY name FOR UPDATE SKIP LOCKED
    )
    UPDATE leases AS l
       SET incarnation = $1::uuid, epoch = l.epoch + 1, definition = h.definition, place = nullif($5, ''),
           until = clock_timestamp() + h.length * interval '1 second'
      FROM free JOIN unnest($2::text[], $3::float8[], $4::text[]) AS h (name, length, definition) USING (name)
     WHERE l.name = free.name
    RETURNING l.name, l.epoch
"""

# A shard is free only as long as the number of shards is in force. Whoever changes it waits for this lock.
TAKE_SHARDS_SQL = """
    WITH valid AS MATERIALIZED (
        SELECT g.name FROM leases AS g
          JOIN (SELECT DISTINCT * FROM unnest($4::text[], $5::int[])) AS s (name, shards) USING (name)
         WHERE (g.standing ->> 'shards')::int = s.shards ORDER BY g.name FOR SHARE OF g
    ),
    free AS MATERIALIZED (
        SELECT l.name, h.length
          FROM unnest($2::text[], $3::float8[], $4::text[]) AS h (name, length, lane)
          JOIN valid ON valid.name = h.lane
          JOIN leases AS l ON l.name = h.name
         WHERE l.until <= clock_timestamp()
         ORDER BY l.name FOR UPDATE OF l SKIP LOCKED
    )
    UPDATE leases AS l
       SET incarnation = $1::uuid, epoch = l.epoch + 1, standing = l.standing - 'in_flight',
           until = clock_timestamp() + free.length * interval '1 second'
      FROM free WHERE l.name = free.name
    RETURNING l.name, l.epoch
"""

DIVIDE_SQL = """
    UPDATE leases SET standing = coalesce(standing, '{}') || jsonb_build_object('shards', $4::int)
     WHERE name = $2 AND epoch = $3 AND incarnation = $1::uuid AND until > clock_timestamp()
    RETURNING name
"""

GIVE_SQL = """
    UPDATE leases AS l
       SET until = clock_timestamp(),
           standing = CASE WHEN h.standing IS NULL THEN l.standing
                           ELSE coalesce(l.standing, '{}') || h.standing::jsonb END
      FROM unnest($2::text[], $3::bigint[], $4::text[]) AS h (name, epoch, standing)
     WHERE l.name = h.name AND l.epoch = h.epoch AND l.incarnation = $1::uuid AND l.until > clock_timestamp()
"""

# A node that has left or was replaced has a `seen` long before the end of its leases.
LEASES_SQL = """
    SELECT name, incarnation::text, epoch, until > clock_timestamp() AS is_held,
           CASE WHEN until <= clock_timestamp() AND until > '-infinity'
                THEN extract(epoch FROM clock_timestamp() - least(until, (
                     SELECT n.seen FROM nodes AS n
                      WHERE n.incarnation = l.incarnation
                        AND n.seen > clock_timestamp() - $1::float8 * interval '1 second')))::float8
                ELSE 0 END AS gone_for,
           CASE WHEN until <= clock_timestamp() AND until > '-infinity'
                THEN extract(epoch FROM clock_timestamp() - until)::float8 END AS free_for,
           CASE WHEN name LIKE 'lane:%' THEN standing::text END AS standing, definition, place
      FROM leases AS l
"""

PEERS_SQL = """
    SELECT incarnation::text, name, destinations, encode(config_digest, 'hex') AS config,
           extract(epoch FROM clock_timestamp() - started)::float8 AS age, shards::text AS shards,
           definitions::text AS definitions, place, former::text AS former, version
      FROM nodes WHERE seen > clock_timestamp() - $1::float8 * interval '1 second'
     ORDER BY name, started
"""

NODES_SQL = """
    SELECT incarnation::text, name, version, (extract(epoch FROM started) * 1000000)::bigint AS started_at,
           (extract(epoch FROM seen) * 1000000)::bigint AS seen_at, destinations,
           encode(config_digest, 'hex') AS config
      FROM nodes WHERE seen > clock_timestamp() - $1::float8 * interval '1 second'
     ORDER BY name, started
"""


class OnDue(Protocol):
    """Gets the lanes for which other nodes have stored deliveries."""

    def __call__(self, lanes: Iterable[str], since: int, *, retries: bool) -> None:
        """Let the next claims of these destinations read from the due time `since`; 0: all deliveries.

        With `retries`, retries as well as first attempts.
        """
        ...


class Rows(Protocol):
    """A connection. A failing statement raises StorageError; every one ends within a few seconds."""

    async def fetch(self, sql: str, *values: Any) -> Sequence[Any]:
        """Run a statement; returns its rows, with columns by name."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class PostgresNodes:
    """`relay.store.Nodes` over PostgreSQL, on a connection that nothing else uses."""

    alone = False

    def __init__(
        self,
        connect: Callable[[], Awaitable[Rows]],
        clock: Clock,
        *,
        name: str,
        lease: float,
        schema: int,
        digests: Callable[[], Digests] = Digests,
        listen: Callable[[], Awaitable[Notifications]] | None = None,
        send: Callable[[], Awaitable[Notifications]] | None = None,
        place: Callable[[], str] = str,
    ) -> None:
        """Take the length of a `lease` in seconds, and functions.

        `place` returns the id of the state folder, which this process has locked; "": unknown. `digests`
        returns those of the config; `listen` and `send` connect for notifications, see `WakeUps`.
        """
        self.incarnation = str(uuid.uuid4())
        self.slot = 0  # after `join`
        self._connect = connect
        self._connection: Rows | None = None
        self._clock = clock
        self._name = name or socket.gethostname()
        self._lease = lease
        self._live = min(LIVE, lease)
        self._schema = schema
        self._digests = digests
        self._definitions: Mapping[str, str] = {}  # of the latest renewal, by destination; "": jobs
        self._former: dict[str, list[str]] = {}  # earlier definitions, oldest first
        self._place = place
        self._lanes: Mapping[str, float] = {}  # with timeouts in seconds
        self._wanted: Mapping[str, int] = {}  # numbers of shards in the config
        self._standing: Mapping[str, Mapping[str, Any]] = {}  # of this node's lanes
        self._shards: dict[str, int] = {}  # numbers of shards in force, by destination; 1 is left out
        self._dividing: dict[str, int] = {}  # of own lanes whose attempts must end before they are divided
        self._assigned: dict[str, int] = {}  # destinations whose deliveries have slots, since (steady clock)
        self._held: dict[str, int] = {}  # epochs by name
        self._handing_over: set[str] = set()
        self._trusted: dict[str, int] = {}  # by name; steady clock
        self._known: frozenset[str] = frozenset()  # destinations in the config of a live node
        self._scope = Scope(frozenset(), frozenset(), has_orphans=False)
        self._scope_until = 0  # steady clock
        self._peers: Sequence[Peer] = ()  # the live nodes at the latest renewal
        self._barred: frozenset[str] = frozenset()  # names of leases that it leaves to other nodes
        self._unanswered: tuple[str, ...] = ()  # lanes of a node that does not answer
        self._renewed_at = clock.steady()
        self._lock = asyncio.Lock()  # held while the connection is used
        self._has_left = False
        self._is_closing = False
        self.on_due: OnDue = _ignore
        self._attendant: Attendant | None = None
        self._wake_ups: WakeUps | None = None  # None: no notifications are received
        if listen is not None or send is not None:
            self._wake_ups = WakeUps(listen, self.incarnation, self._wake, send=send)
        self._requests = Requests(self._locked, lambda: self.announce(requests=True))
        self._answering: asyncio.Task[None] | None = None
        self.replies = Replies(self._locked, lambda: self.announce(unheard=True))

    async def join(self) -> None:
        """Become a node: compare the clocks, and take a slot.

        Raises:
            StorageError: the database does not answer, or there are 256 nodes.
        """
        async with self._lock:
            await self._compare_clocks(COMPARISONS)
            await self._join()
            self._renewed_at = self._clock.steady()
        if self._wake_ups is not None:
            self._wake_ups.start()

    def attend(self, attendant: Attendant) -> None:
        """See `Nodes.attend`."""
        self._attendant = attendant

    def handle(self, verb: str, handle: Handle) -> None:
        """See `Nodes.handle`."""
        self._requests.handlers[verb] = handle

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
        """Announce new work in the database to the other nodes, soon; see `WakeUp`."""
        if self._wake_ups is not None:
            self._wake_ups.announce(
                lanes, since=since, retries=retries, leases=leases, requests=requests, unheard=unheard
            )

    async def ask(self, lane: str, verb: str, argument: Any) -> Any:
        """See `Nodes.ask`."""
        return await self._requests.ask(lane, verb, argument)

    async def ask_leader(self, job: str, verb: str, argument: Any) -> Any:
        """See `Nodes.ask_leader`."""
        return await self._requests.ask(_job(job), verb, argument)

    async def ask_node(self, incarnation: str, verb: str, argument: Any, patience: float) -> Any:
        """See `Nodes.ask_node`."""
        return await self._requests.ask(NODE + incarnation, verb, argument, patience)

    async def ask_others(self, verb: str, argument: Any, patience: float) -> Answers:
        """See `Nodes.ask_others`."""
        others = [peer for peer in self._peers if peer.incarnation != self.incarnation]
        if not others:
            return Answers()
        try:
            outcomes = await self._requests.ask_all(
                [NODE + peer.incarnation for peer in others], verb, argument, patience
            )
        except StorageError as error:
            log.debug("cannot ask the other nodes: %s", error)
            return Answers(silent=tuple(peer.name for peer in others))
        given, silent, unable = [], [], []
        for peer, outcome in zip(others, outcomes, strict=True):
            if not outcome.is_answered:
                silent.append(peer.name)
            elif outcome.error is None:
                given.append((peer.name, outcome.answer))
            elif outcome.is_unsupported or peer.version != __version__:
                unable.append(peer.name)  # a request of this version may have a form that it does not know
            else:
                silent.append(peer.name)
        return Answers(tuple(given), tuple(silent), tuple(unable))

    async def own(
        self,
        lanes: Mapping[str, float],
        jobs: Collection[str],
        shards: Mapping[str, int] = {},
        standing: Mapping[str, Mapping[str, Any]] = {},
    ) -> Ownership:
        """See `Nodes.own`."""
        self._lanes, self._wanted, self._standing = dict(lanes), dict(shards), standing
        async with self._lock:
            await self._compare_clocks()
            if not self._has_left:
                await self._be_seen()
            await self._renew()
            leases = [_lease_of(row) for row in await self._fetch(LEASES_SQL, LEFT)]
            peers = [_peer_of(row) for row in await self._fetch(PEERS_SQL, self._live)]
            self._shards = in_force(leases)
            if not self._has_left:
                await self._divide(leases, peers)
                await self._follow(leases, peers, {*map(_lane, lanes), *map(_job, jobs)})
            self._known = frozenset().union(*(peer.destinations for peer in peers))
            await self.replies.refresh(self._fetch)
            self._scope_until = 0
            gone = {peer.incarnation for peer in self._peers} - {peer.incarnation for peer in peers}
            self._peers, self._renewed_at = peers, self._clock.steady()
            self._note_unanswered(leases)
        if gone:
            self._search_own_lanes()
        self._answer_requests()
        return self._ownership(leases, peers)

    async def give(self, lanes: Collection[str], standing: Mapping[str, Mapping[str, Any]] = {}) -> None:
        """See `Nodes.give`; a lane that is being divided stays with this node."""
        async with self._lock:
            self._standing = {**self._standing, **standing}
            divided = self._dividing.keys() & set(lanes)
            for name in divided:
                await self._set_shards(name, self._dividing.pop(name))
            given = [_lane(name) for name in lanes if name not in divided]
            await self._give([name for name in given if name in self._held])
            self._scope_until = 0
        self.announce(leases=True)
        if divided and self._attendant is not None:
            self._attendant.renew_soon()

    def report_soon(self) -> None:
        """See `Nodes.report_soon`."""
        if self._attendant is not None:
            self._attendant.renew_soon()

    def lead(self, job: str) -> bool:
        """See `Nodes.lead`."""
        return self._trusted.get(_job(job), 0) > self._clock.steady()

    @property
    def scope(self) -> Scope:
        """The lanes whose deliveries this node ends now."""
        now = self._clock.steady()
        if now >= self._scope_until:
            owned = frozenset(self.owned)
            self._scope = Scope(
                frozenset(filter(self._sends, owned)),
                self._known,
                self.lead(ORPHANS),
                owned,
                dict(self._shards),
                {name: self._held.get(_lane(name), 0) for name in owned},
            )
            self._scope_until = min((until for until in self._trusted.values() if until > now), default=now)
        return self._scope

    @property
    def owned(self) -> list[str]:
        """The lanes that this node owns now, including those that it is handing over."""
        now = self._clock.steady()
        return [
            name.removeprefix(LANE)
            for name, until in self._trusted.items()
            if until > now and name.startswith(LANE)
        ]

    @property
    def count(self) -> int:
        """The number of live nodes at the latest renewal, at least 1."""
        return max(1, len(self._peers))

    async def all(self) -> tuple[Node, ...]:
        """See `Nodes.all`."""
        async with self._lock:
            rows = await self._fetch(NODES_SQL, self._live)
            leases = await self._fetch(LEASES_SQL, LEFT)
        held: dict[str, list[str]] = {}
        found = list(map(_lease_of, leases))
        divided = {_lane(name) for name in in_force(found)}
        for lease in found:
            if lease.is_held and lease.incarnation is not None and lease.name not in divided:
                held.setdefault(lease.incarnation, []).append(lease.name)
        return tuple(
            Node(
                name=row["name"],
                version=row["version"],
                started_at=row["started_at"],
                seen_at=row["seen_at"],
                is_self=row["incarnation"] == self.incarnation,
                lanes=_of_kind(LANE, held.get(row["incarnation"], ())),
                jobs=_of_kind(JOB, held.get(row["incarnation"], ())),
                destinations=tuple(row["destinations"]),
                config=row["config"] or "",
            )
            for row in rows
        )

    def figures(self) -> Mapping[str, float]:
        """See `Nodes.figures`."""
        return {
            "nodes": len(self._peers),
            "lanes": len(set(map(destination_of, self.scope.mine))),
            "renewal_age": max(0, self._clock.steady() - self._renewed_at) / SECOND,
            "config_differs": float(bool(self._differing())),
            "wakeup_delay": 0.0 if self._wake_ups is None else self._wake_ups.delay,
        }

    def cautions(self) -> tuple[Caution, ...]:
        """See `Nodes.cautions`."""
        found = []
        if names := self._differing():
            shown = ", ".join(names)
            found.append(
                Caution(f"nodes with a configuration that differs from this node's: {shown}", "relay nodes")
            )
        found += [Caution(text, "relay nodes") for text in self._fewer_shards()]
        if self._barred:
            found.append(Caution(self._barred_text(), "relay nodes"))
        if self._unanswered:
            found.append(Caution(self._unanswered_text(), "relay nodes"))
        if self._wake_ups is not None and (why := self._wake_ups.failure) is not None:
            found.append(
                Caution(
                    f"notifications of PostgreSQL do not arrive ({why}), so deliveries that another node "
                    f"accepted start up to {POLL:g} s later",
                    "relay doctor",
                )
            )
        return tuple(found)

    def _fewer_shards(self) -> Iterable[str]:
        """Yield why a destination has fewer shards than in this node's config."""
        for name, wanted in sorted(self._wanted.items()):
            peers = [peer for peer in self._peers if name in peer.destinations and peer.wants(name) < wanted]
            if not peers:
                continue
            count = min(peer.wants(name) for peer in peers)
            lowest = [peer for peer in peers if peer.wants(name) == count]
            older = [peer.name for peer in lowest if peer.shards is None]
            names = ", ".join(older or (peer.name for peer in lowest))
            one = len(older or lowest) == 1
            why = f"{'has' if one else 'have'} a smaller number in config.toml"
            if older:
                why = f"{'runs' if one else 'run'} a version without shards"
            shards = "shard" if count == 1 else "shards"
            yield f"{name} has {count} {shards} instead of {wanted}; {names} {why}"

    def _note_unanswered(self, leases: Iterable[Lease]) -> None:
        """Note the lanes whose node does not answer: no node runs them until their leases end."""
        live = {self.incarnation, *(peer.incarnation for peer in self._peers)}
        names = (lease.name for lease in leases if lease.is_held and lease.incarnation not in live)
        lanes = _of_kind(LANE, names)
        divided = {name.partition("/")[0] for name in lanes if "/" in name}
        former, self._unanswered = self._unanswered, tuple(name for name in lanes if name not in divided)
        if set(self._unanswered) - set(former):
            log.warning("%s", self._unanswered_text())

    def _unanswered_text(self) -> str:
        longest = max(self._length(_lane(name)) for name in self._unanswered)
        return (
            f"the node that ran these lanes does not answer: {', '.join(self._unanswered)}; other nodes "
            f"take them over when its leases end, after at most {longest:g} s"
        )

    def _note_barred(self, wanted: AbstractSet[str], peers: Sequence[Peer]) -> None:
        """Note the lanes and jobs that this node leaves to others; see `bar`."""
        me = next((peer for peer in peers if peer.incarnation == self.incarnation), None)
        former, self._barred = (
            self._barred,
            frozenset(
                name for name in wanted - self._held.keys() if me is not None and not me.may_hold(name)
            ),
        )
        if self._barred - former:
            log.warning("%s", self._barred_text())

    def _barred_text(self) -> str:
        lanes = _of_kind(LANE, self._barred)
        shown = [f"does not deliver to {', '.join(lanes)}"] if lanes else []
        shown += ["runs no jobs"] if len(lanes) < len(self._barred) else []
        return (
            f"this node {' and '.join(shown)}: its settings differ from those of a node that is running, or "
            f"that ran less than {ABSENT:g} s ago"
        )

    def _differing(self) -> list[str]:
        """Return the names of live nodes whose config differs from this node's."""
        mine = self._digests().whole
        return sorted(
            peer.name for peer in self._peers if peer.incarnation != self.incarnation and peer.config != mine
        )

    async def leave(self) -> None:
        """See `Nodes.leave`."""
        self._has_left = True
        async with self._lock:
            # The row stays until `close`: this node uses its slot, and flushes heartbeats, until then.
            await self._fetch(LEAVE_SQL, self.incarnation, LEFT)

    async def close(self) -> None:
        """Give everything that is still held, and close the connection; after the last attempt has ended."""
        self._is_closing = True
        if self._answering is not None:  # afterwards, it would connect again
            await asyncio.wait([self._answering], timeout=LIVE)
            self._answering.cancel()
        await self._requests.stop()
        await self.replies.stop()
        async with self._lock:
            with suppress(StorageError):  # the leases expire
                await self._give(list(self._held))
                await self._fetch("DELETE FROM nodes WHERE incarnation = $1::uuid", self.incarnation)
            await self._disconnect()
        if self._wake_ups is not None:
            self.announce(leases=True)
            await self._wake_ups.stop()

    def _wake(self, heard: WakeUp) -> None:
        """Handle the announcement of another node."""
        if self._is_closing:
            return
        if heard.unheard or heard.is_poll:
            self.replies.refresh_soon()
        attendant = self._attendant
        if attendant is None:
            return
        if heard.lanes:
            self.on_due(heard.lanes, heard.since, retries=heard.retries)
        if heard.lanes or heard.is_poll:
            attendant.wake(None if heard.is_poll else heard.lanes, retries=heard.retries)
        if heard.leases:
            attendant.renew_soon()
        if heard.requests or heard.is_poll:
            self._answer_requests()

    def _search_own_lanes(self) -> None:
        """Look for all due deliveries: a node that is gone may have stored some without announcing them."""
        self.on_due(map(destination_of, self.owned), 0, retries=True)
        if self._attendant is not None:
            self._attendant.wake(None, retries=True)

    def _answer_requests(self) -> None:
        """Look for requests to this node, in the background."""
        if not self._is_closing and (self._answering is None or self._answering.done()):
            self._answering = asyncio.create_task(self._answer_all())

    async def _answer_all(self) -> None:
        if self._attendant is None:
            return
        try:
            jobs = [
                name for name in self._trusted if name.startswith(JOB) and self.lead(name.removeprefix(JOB))
            ]
            mine = [*self.owned, *jobs, NODE + self.incarnation]
            await self._requests.answer(mine, self._attendant.answer)
            await self._requests.clean()
        except Exception as error:  # noqa: BLE001 - the asking nodes notice the missing answer
            log.debug("cannot look for requests of other nodes: %s", error)

    async def _locked(self, sql: str, *values: Any) -> Sequence[Any]:
        async with self._lock:
            return await self._fetch(sql, *values)

    async def _fetch(self, sql: str, *values: Any) -> Sequence[Any]:
        try:
            if self._connection is None:
                self._connection = await self._connect()
            return await self._connection.fetch(sql, *values)
        except BaseException:
            await self._disconnect()
            raise

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                await connection.close()

    async def _compare_clocks(self, times: int = 1) -> None:
        """Compare the clocks; the comparison with the shortest round trip counts.

        The first one includes the time of a connect. If it set the clock, the error would last for a while.
        """
        if not isinstance(self._clock, ServerClock):
            return
        found = []
        for _ in range(times):
            sent = self._clock.local()
            [row] = await self._fetch(NOW_SQL)
            found.append((sent, self._clock.local(), row["now"]))
        self._clock.compare(*min(found, key=lambda each: each[1] - each[0]))

    async def _join(self) -> None:
        while True:
            for age in (FORGET_AFTER, CROWDED):
                await self._fetch(FORGET_SQL, age)
                slot = free_slot({row["slot"] for row in await self._fetch("SELECT slot FROM nodes")})
                if slot is not None:
                    break
            else:
                raise StorageError(f"the cluster already has {SLOTS} nodes", hint="stop a node")
            destinations, digests = sorted(self._lanes), self._digests()
            definitions, former = self._define(digests)
            await self._fetch(
                JOIN_SQL,
                self.incarnation,
                slot,
                self._name,
                __version__,
                self._schema,
                bytes.fromhex(digests.whole),
                destinations,
                msgspec.json.encode(self._wanted).decode(),
                definitions,
                self._place(),
                former,
            )
            rows = await self._fetch("SELECT slot FROM nodes WHERE incarnation = $1::uuid", self.incarnation)
            if rows:  # else another node was faster
                self.slot = rows[0]["slot"]
                await self._succeed()
                return

    def _define(self, digests: Digests) -> tuple[str | None, str]:
        """Return this node's current and former definitions as JSON; see `Peer`."""
        found = {**digests.destinations, "": digests.jobs} if digests.whole else {}
        for name, before in self._definitions.items():
            if found.get(name, before) != before:  # reloaded
                kept = self._former.setdefault(name, [])
                kept[:] = [*(each for each in kept if each != before), before][-FORMER:]
        for name in self._former.keys() - found.keys():
            del self._former[name]
        self._definitions = found
        return msgspec.json.encode(found).decode() if found else None, msgspec.json.encode(
            self._former
        ).decode()

    async def _succeed(self) -> None:
        """End the leases of a former node with the same state folder, which ended without giving them up."""
        rows = await self._fetch(SUCCEED_SQL, self.incarnation, self._place(), LEFT)
        if names := _of_kind(LANE, (row["name"] for row in rows)):
            log.info(
                "an earlier process of this node ended without handing over its lanes; now free: %s",
                ", ".join(names),
            )

    async def _be_seen(self) -> None:
        shards, digests = msgspec.json.encode(self._wanted).decode(), self._digests()
        rows = await self._fetch(
            SEEN_SQL,
            self.incarnation,
            sorted(self._lanes),
            bytes.fromhex(digests.whole),
            shards,
            *self._define(digests),
        )
        if not rows:  # this process was stopped for so long that the others have forgotten it
            log.warning("the other nodes had forgotten this node; it joins again")
            await self._join()

    async def _renew(self) -> None:
        """Renew the leases that this node holds; forget those that it has lost."""
        names = sorted(self._held)
        if not names:
            return
        asked = self._clock.steady()
        lengths = [self._length(name) for name in names]
        epochs = [self._held[name] for name in names]
        standing = list(map(self._reported, names))
        definitions = list(map(self._definition, names))
        rows = await self._fetch(RENEW_SQL, self.incarnation, names, epochs, lengths, standing, definitions)
        renewed = {row["name"] for row in rows}
        for name in names:
            if name in renewed:
                self._trust(name, asked)
            else:
                self._forget(name)

    @property
    def to_assign(self) -> list[str]:
        """The destinations whose deliveries need slots, because this node divides them or has divided them.

        Nodes store deliveries with slots only if their config divides the destination. So a delivery that a
        node with a former config stores late may have no slot.
        """
        now = self._clock.steady()
        return [
            name
            for name in self._divisible
            if self._is_trusted(_lane(name))
            and (name in self._shards or wanted_shards(name, self._peers) > 1)
            and now - self._assigned.get(name, -ASSIGN_EVERY) >= ASSIGN_EVERY
        ]

    @property
    def _divisible(self) -> list[str]:
        """The destinations in the config that are divided now, or have several shards in the config."""
        return [name for name in self._wanted.keys() | self._shards.keys() if name in self._lanes]

    def note_assigned(self, destination: str) -> None:
        """Note that the deliveries of a destination have slots."""
        self._assigned[destination] = self._clock.steady()

    async def _divide(self, leases: Sequence[Lease], peers: Sequence[Peer]) -> None:
        """Change the numbers of shards of destinations whose leases this node holds, as far as possible."""
        self._dividing.clear()
        for name in self._divisible:
            if not self._is_trusted(_lane(name)) or _lane(name) in self._handing_over:
                continue
            now = self._shards.get(name, 1)
            count = next_shards(name, now, wanted_shards(name, peers), leases)
            if now != 1 and count is not None:
                await self._set_shards(name, count)
            elif count is not None and name in self._assigned:
                self._dividing[name] = count  # by `give`, after the last attempt
            elif now == count is None:
                self._assigned.pop(name, None)

    async def _set_shards(self, destination: str, count: int) -> None:
        """Store the number of shards of a destination, unless another node holds its lease now."""
        name = _lane(destination)
        if await self._fetch(DIVIDE_SQL, self.incarnation, name, self._held.get(name, -1), count):
            log.info("%s: %s", destination, _divided(count))
            self._shards[destination] = count
            if count == 1:
                del self._shards[destination]
            elif count != CHANGING:  # deliveries may have come without a slot meanwhile
                self._assigned.pop(destination, None)
            self.announce(leases=True)

    async def _follow(self, leases: Sequence[Lease], peers: Sequence[Peer], wanted: AbstractSet[str]) -> None:
        """Take and hand over leases."""
        shards = {name: count for name, count in self._shards.items() if name in self._lanes}
        for name, count in shards.items():
            wanted |= {_lane(f"{name}/{number}") for number in range(count)}
        self._handing_over |= {name for name in self._held.keys() - wanted if name.startswith(LANE)}
        wanted -= self._handing_over
        peers = bar(peers, leases)
        self._note_barred(wanted, peers)
        wanted -= self._barred
        fixed = {_lane(name) for name, count in shards.items() if count == CHANGING}
        fixed |= set(map(_lane, self._dividing))
        held = {name: epoch for name, epoch in self._held.items() if name in wanted and name not in fixed}
        steps = plan(
            self.incarnation,
            held,
            wanted,
            leases,
            peers,
            settle_in=min(SETTLE_IN, self._lease),
            shards=shards,
        )
        if (moving := steps.hand_over) is not None:
            if moving.startswith(LANE):
                self._handing_over.add(moving)
            else:  # a job's run may end after the lease begins elsewhere: jobs tolerate that
                await self._give([moving])
        self._held.update(steps.adopt)
        if steps.missing:
            await self._fetch(
                "INSERT INTO leases (name) SELECT unnest($1::text[]) ON CONFLICT (name) DO NOTHING",
                list(steps.missing),
            )
        of_shards = [name for name in steps.take if name.startswith(LANE) and "/" in name]
        if others := [name for name in steps.take if name not in of_shards]:
            await self._take(TAKE_SQL, others, list(map(self._definition, others)), self._place())
        if of_shards:
            lanes = [destination_of(name) for name in of_shards]
            counts = [shards[lane.removeprefix(LANE)] for lane in lanes]
            await self._take(TAKE_SHARDS_SQL, of_shards, lanes, counts)

    async def _take(self, sql: str, names: list[str], *more: Any) -> None:
        asked = self._clock.steady()
        lengths = [self._length(name) for name in names]
        rows = await self._fetch(sql, self.incarnation, names, lengths, *more)
        for row in rows:
            self._held[row["name"]] = row["epoch"]
            self._trust(row["name"], asked)
        taken = _of_kind(LANE, (row["name"] for row in rows))
        self.on_due(map(destination_of, taken), 0, retries=True)

    async def _give(self, names: Sequence[str]) -> None:
        if names:
            epochs = [self._held[name] for name in names]
            for name in names:
                self._trusted.pop(name, None)
            standing = list(map(self._reported, names))
            await self._fetch(GIVE_SQL, self.incarnation, list(names), epochs, standing)
            for name in names:
                self._forget(name)

    def _ownership(self, leases: Sequence[Lease], peers: Sequence[Peer]) -> Ownership:
        names = {peer.incarnation: peer.name for peer in peers}
        return Ownership(
            until={
                name.removeprefix(LANE): until
                for name, until in self._trusted.items()
                if name.startswith(LANE)
            },
            elsewhere={
                lease.name.removeprefix(LANE): names.get(lease.incarnation or "", "")
                for lease in leases
                if lease.is_held and lease.incarnation != self.incarnation and lease.name.startswith(LANE)
            },
            hand_over=frozenset(name.removeprefix(LANE) for name in self._handing_over)
            | self._dividing.keys(),
            shards=dict(self._shards),
            standing={
                lease.name.removeprefix(LANE): standing
                for lease in leases
                if lease.name.startswith(LANE) and (standing := self._standing_of(lease)) is not None
            },
        )

    def _standing_of(self, lease: Lease) -> Standing | None:
        """Return the report of a lane's current or previous owner.

        The failures and pauses of a destination with other settings do not count.
        """
        if lease.standing is None or lease.is_held:
            return lease.standing
        if not lease.is_shard and lease.definition not in (None, self._definition(lease.name)):
            return None
        return msgspec.structs.replace(lease.standing, in_flight=0)

    def _reported(self, name: str) -> str | None:
        """Return the report about a lane of this node, as JSON; None: unchanged."""
        standing = self._standing.get(name.removeprefix(LANE))
        return None if standing is None else msgspec.json.encode(standing).decode()

    def _is_trusted(self, name: str) -> bool:
        return self._trusted.get(name, 0) > self._clock.steady()

    def _sends(self, lane: str) -> bool:
        """Return whether a lane sends, with the number of shards in force."""
        name, _, number = lane.partition("/")
        count = self._shards.get(name, 1)
        return int(number) < count if number else count == 1

    def _trust(self, name: str, asked: int) -> None:
        self._trusted[name] = trusted_until(asked, self._length(name), self._timeout(name))

    def _forget(self, name: str) -> None:
        self._held.pop(name, None)
        self._trusted.pop(name, None)
        self._handing_over.discard(name)

    def _length(self, name: str) -> float:
        return length_of(self._lease, self._timeout(name))

    def _definition(self, name: str) -> str | None:
        """Return the digest of this node's settings of a lane or of all jobs."""
        digests = self._digests()
        found = digests.jobs if name.startswith(JOB) else digests.destinations.get(name.removeprefix(LANE))
        return found or None

    def _timeout(self, name: str) -> float:
        """Return how many seconds before its end a lease counts as lost."""
        if name.startswith(JOB):
            return self._lease / 2
        return self._lanes.get(destination_of(name.removeprefix(LANE)), self._lease / 2)


def _ignore(lanes: Iterable[str], since: int, *, retries: bool) -> None:
    """Ignore lanes: the store does not claim deliveries."""


def _lane(destination: str) -> str:
    return LANE + destination


def _job(name: str) -> str:
    return JOB + name


def _divided(count: int) -> str:
    if count == CHANGING:
        return "the number of its shards changes; its attempts in flight end first"
    return "no longer divided into shards" if count == 1 else f"divided into {count} shards"


def _lease_of(row: Any) -> Lease:
    given = row["standing"]
    standing = None if given is None else msgspec.json.decode(given, type=Standing)
    return Lease(
        row["name"],
        row["incarnation"],
        row["epoch"],
        row["is_held"],
        row["free_for"],
        standing,
        row["definition"],
        row["place"],
        row["gone_for"],
    )


def _peer_of(row: Any) -> Peer:
    return Peer(
        row["incarnation"],
        row["name"],
        row["age"],
        frozenset(row["destinations"]),
        row["config"],
        None if row["shards"] is None else msgspec.json.decode(row["shards"], type=dict[str, int]),
        None if row["definitions"] is None else msgspec.json.decode(row["definitions"], type=dict[str, str]),
        row["place"],
        {} if row["former"] is None else msgspec.json.decode(row["former"], type=dict[str, list[str]]),
        version=row["version"],
    )


def _of_kind(kind: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(name.removeprefix(kind) for name in names if name.startswith(kind)))
