"""Decisions about leases, without I/O: which node should hold one, and how many shards a destination has.

The lease of a lane is `lane:DESTINATION`. If a destination is divided into shards, each shard has a separate
lease, `lane:DESTINATION/NUMBER`. The lease of the destination then permits no delivery: the node that holds
it keeps the destination's state and decides about the number of shards. The number in force is stored in the
row of that lease. It is the smallest number in the configs of the live nodes, and changes in two steps: to 0,
so that all shards end their attempts and no node takes a shard, and to the new number when no shard is held.
So no delivery ever belongs to the lanes of two nodes.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from relay.base.clock import SECOND
from relay.base.shards import destination_of
from relay.store import Standing
from relay.store.postgres.clock import SLEW

SETTLE_IN = 30.0
"""Seconds after its start before a node gets lanes from other nodes; `lease` if that is shorter."""

NEGLECTED = 5.0
"""Seconds after which any node takes a free lease, even if another live node should take it."""

ABSENT = 30.0
"""Seconds after which a node with other settings may take a free lease; see `bar`."""

SLOTS = 256
"""Maximum number of live nodes; a row id contains the slot of the node that created it."""

LANE, JOB = "lane:", "job:"

CHANGING = 0
"""The number of shards in force while it changes."""


class Lease(msgspec.Struct, frozen=True):
    """A row of `leases` at one moment."""

    name: str  # `lane:DESTINATION`, `lane:DESTINATION/SHARD` or `job:NAME`
    incarnation: str | None
    epoch: int
    is_held: bool
    free_for: float | None = None  # seconds since it became free; None: it never was held, or is held
    standing: Standing | None = None  # None: never reported
    definition: str | None = None  # settings of the node that held it last, as a digest; None: older version
    place: str | None = None  # the state folder of that node
    gone_for: float = 0.0  # seconds since that node was alive, if the lease is free

    @property
    def shards(self) -> int:
        """The number of shards of its destination in force; 0: it is changing."""
        return 1 if self.standing is None else self.standing.shards

    @property
    def is_shard(self) -> bool:
        """Whether it is the lease of a shard."""
        return "/" in self.name and self.name.startswith(LANE)


class Peer(msgspec.Struct, frozen=True):
    """A live node, this one included."""

    incarnation: str
    name: str
    age: float  # seconds since it started
    destinations: frozenset[str]
    config: str = ""  # digest of its config, in hexadecimal
    shards: Mapping[str, int] | None = {}  # numbers in its config; None: its version has no shards
    definitions: Mapping[str, str] | None = None  # digests by destination, "": jobs; None: older version
    place: str | None = None  # its state folder
    former: Mapping[str, Sequence[str]] = {}  # its definitions before reloads, by the same names
    barred: frozenset[str] = frozenset()  # jobs that it must leave to other nodes
    version: str = ""

    def may_hold(self, name: str) -> bool:
        """Return whether the node can run a lane or a job."""
        if name.startswith(JOB):
            return name not in self.barred
        return destination_of(name.removeprefix(LANE)) in self.destinations

    def has_held(self, lease: Lease) -> bool:
        """Return whether this node, or the one before it in its state folder, had the definition in force."""
        at_place = lease.place is not None and self.place == lease.place
        return at_place or lease.definition in self.former.get(_key(lease.name), ())

    def defines(self, name: str) -> str | None:
        """Return its definition of a lane or of all jobs."""
        return None if self.definitions is None else self.definitions.get(_key(name))

    def wants(self, destination: str) -> int:
        """Return the number of shards in its config."""
        return 1 if self.shards is None else self.shards.get(destination, 1)


class Plan(msgspec.Struct, frozen=True):
    """The leases that one node takes and hands over now."""

    missing: tuple[str, ...]  # names without a row
    take: tuple[str, ...]
    adopt: Mapping[str, int]  # taken by this incarnation, but the server's response was lost; with epochs
    hand_over: str | None  # one held lease that another node should hold


def bar(peers: Sequence[Peer], leases: Iterable[Lease]) -> list[Peer]:
    """Return the peers without the lanes and jobs that they must leave to nodes with the definition in force.

    The node that held the lease last determines the definition in force, and may change it. When no live
    node has it any more, the lease is free for its `_heirs`, and after `ABSENT` for all. So a daemon that was
    started on the wrong database, with destinations of the same names, gets no lease while the nodes of the
    right cluster are restarted. The shards of a destination follow its own lease.
    """
    barred: dict[str, set[str]] = {peer.incarnation: set() for peer in peers}
    for lease in leases:
        if lease.definition is None or lease.is_shard or (lease.free_for or 0.0) > ABSENT:
            continue
        able = [peer for peer in peers if peer.may_hold(lease.name)]
        others = [peer for peer in able if peer.defines(lease.name) not in (None, lease.definition)]
        if len(others) == len(able) and not lease.is_held:  # no node has the definition in force
            heirs = _heirs(lease, able)
            others = [peer for peer in others if peer not in heirs]
        for peer in others:
            if not (lease.is_held and peer.incarnation == lease.incarnation):
                barred[peer.incarnation].add(lease.name)
    return [
        msgspec.structs.replace(
            peer,
            destinations=peer.destinations.difference(
                name.removeprefix(LANE) for name in names if name.startswith(LANE)
            ),
            barred=frozenset(name for name in names if name.startswith(JOB)),
        )
        if (names := barred[peer.incarnation])
        else peer
        for peer in peers
    ]


def _heirs(lease: Lease, able: Sequence[Peer]) -> list[Peer]:
    """Return the nodes that may put another definition into force at once, because an operator changed it.

    The best evidence decides: the node had the definition in force itself; or at least two nodes agree on one
    definition, and no others agree on another; or the node started after the holder of the lease was gone.
    """
    if found := [peer for peer in able if peer.has_held(lease)]:
        return found
    counts = Counter(peer.defines(lease.name) for peer in able)
    found = [peer for peer in able if counts[peer.defines(lease.name)] > 1]
    if len({peer.defines(lease.name) for peer in found}) == 1:
        return found
    return [peer for peer in able if peer.age < lease.gone_for]


def _key(name: str) -> str:
    """Return the key of a lease in the definitions of a node."""
    return "" if name.startswith(JOB) else name.removeprefix(LANE)


def due_to(name: str, peers: Iterable[Peer]) -> Peer | None:
    """Return the node that should hold a lease: the highest hash of name and node (rendezvous hashing).

    So all nodes come to the same result, and a node that joins or leaves moves only its share.
    """
    able = [peer for peer in peers if peer.may_hold(name)]
    return max(able, key=lambda peer: _weight(name, peer.incarnation), default=None)


def spread(destination: str, count: int, peers: Iterable[Peer]) -> list[Peer]:
    """Return the nodes that should hold the shards of a destination, evenly; empty: no node has it.

    Among the nodes with the fewest shards so far, a hash decides.
    """
    able = [peer for peer in peers if destination in peer.destinations and peer.shards is not None]
    owners: list[Peer] = []
    loads = {peer.incarnation: 0 for peer in able}
    for number in range(count if able else 0):
        name = f"{LANE}{destination}/{number}"
        owner = min(able, key=lambda peer: (loads[peer.incarnation], _weight(name, peer.incarnation)))
        loads[owner.incarnation] += 1
        owners.append(owner)
    return owners


def plan(
    me: str,
    held: Mapping[str, int],
    wanted: AbstractSet[str],
    leases: Sequence[Lease],
    peers: Sequence[Peer],
    *,
    settle_in: float = SETTLE_IN,
    shards: Mapping[str, int] = {},
) -> Plan:
    """Decide which leases node `me` takes and hands over.

    `held` has the epochs of the leases that it holds and is not handing over; `wanted` are the names that it
    could hold; `shards` has the numbers in force of the destinations that are divided. Free leases are taken
    at once by the node that they are due to. Held ones move one at a time, and only to a node that has
    settled in.
    """
    owners = {name: spread(name, count, peers) for name, count in shards.items()}

    def due_of(name: str) -> Peer | None:
        destination, _, number = name.removeprefix(LANE).partition("/")
        if name.startswith(LANE) and (some := owners.get(destination)):
            return some[int(number or 0)]
        return due_to(name, peers)

    known = {lease.name: lease for lease in leases}
    take, adopt, movable = [], {}, []
    for name in sorted(wanted):
        lease = known.get(name, Lease(name, None, 0, is_held=False))
        due = due_of(name)
        is_mine = due is None or due.incarnation == me
        if not lease.is_held:
            if is_mine or (lease.free_for is not None and lease.free_for > NEGLECTED):
                take.append(name)
        elif lease.incarnation == me and held.get(name) != lease.epoch:
            adopt[name] = lease.epoch
    for name in sorted(held):
        due = due_of(name)
        if due is not None and due.incarnation != me and due.age >= settle_in:
            movable.append(name)
    return Plan(
        missing=tuple(name for name in sorted(wanted) if name not in known),
        take=tuple(take),
        adopt=adopt,
        hand_over=movable[0] if movable else None,
    )


def in_force(leases: Iterable[Lease]) -> dict[str, int]:
    """Return the number of shards of each destination that is divided, or whose number is changing."""
    return {
        lease.name.removeprefix(LANE): lease.shards
        for lease in leases
        if lease.name.startswith(LANE) and not lease.is_shard and lease.shards != 1
    }


def wanted_shards(destination: str, peers: Iterable[Peer]) -> int:
    """Return the number of shards that a destination should have: the smallest one of all live nodes."""
    return min((peer.wants(destination) for peer in peers if destination in peer.destinations), default=1)


def next_shards(destination: str, now: int, wanted: int, leases: Iterable[Lease]) -> int | None:
    """Return the number of shards to set next; None: nothing can change yet. `now` is the number in force.

    If `now` is 1, only the caller sends to the destination, and must end its attempts first.
    """
    if now == wanted:
        return None
    if now not in (CHANGING, 1):
        return CHANGING
    begin = f"{LANE}{destination}/"
    return None if any(lease.is_held and lease.name.startswith(begin) for lease in leases) else wanted


def length_of(lease: float, timeout: float) -> float:
    """Return the length of a lane's lease in seconds; `timeout` limits one attempt."""
    return max(lease, 2 * timeout)


def trusted_until(asked: int, length: float, timeout: float) -> int:
    """Return the time (steady clock) at which a node stops beginning attempts under a lease.

    `asked` is the time before the request for the lease. The result is at least the `timeout` of an attempt
    before the end of the lease by the server's clock, even if the steady clock is slow by one part in `SLEW`.
    """
    return asked + int((length - timeout) * SECOND) * (SLEW - 1) // SLEW


def free_slot(used: Collection[int]) -> int | None:
    """Return the smallest slot that no node has; None: all are in use."""
    return next((slot for slot in range(SLOTS) if slot not in used), None)


def _weight(name: str, incarnation: str) -> bytes:
    return hashlib.blake2b(f"{name}\n{incarnation}".encode(), digest_size=8).digest()
