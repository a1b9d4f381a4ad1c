"""Leases over PostgreSQL: which node takes a lease, how long it trusts it, and how lanes move."""

import asyncio
from functools import partial

import msgspec
import pytest
from postgres import database_of, drop_databases, needs_postgres
from support import FakeClock, until

from relay.base.clock import SECOND, SystemClock
from relay.config.effective import Digests
from relay.errors import RelayError, StorageError, StorageUnavailableError
from relay.store import Answers, Standing
from relay.store.postgres.clock import SLEW, ServerClock
from relay.store.postgres.leases import (
    ABSENT,
    CHANGING,
    NEGLECTED,
    SETTLE_IN,
    Lease,
    Peer,
    bar,
    due_to,
    free_slot,
    length_of,
    next_shards,
    plan,
    spread,
    trusted_until,
    wanted_shards,
)
from relay.store.postgres.nodes import TAKE_SHARDS_SQL, TAKE_SQL, PostgresNodes
from relay.store.postgres.wakeups import WakeUp

asyncpg = pytest.importorskip("asyncpg")

LANES = frozenset(f"d{number}" for number in range(60))


def peer(incarnation, age=60.0, destinations=LANES):
    return Peer(incarnation, incarnation, age, frozenset(destinations))


def mine(name="lane:d1", *peers):
    """Return the peer that should have a name's lease, and another peer."""
    due = due_to(name, peers).incarnation
    return due, next(each.incarnation for each in peers if each.incarnation != due)


A, B = mine("lane:d1", peer("a"), peer("b"))
"""The node that should own the lane d1, and the other one."""


def test_lanes_are_spread_evenly_and_all_nodes_agree():
    peers = [peer(name) for name in "abc"]
    owners = {name: due_to(f"lane:{name}", peers).incarnation for name in LANES}
    assert owners == {name: due_to(f"lane:{name}", peers[::-1]).incarnation for name in LANES}
    counts = sorted(list(owners.values()).count(name) for name in "abc")
    assert counts[0] >= 10


def test_a_node_that_joins_or_leaves_moves_only_its_share():
    three, two = [peer(name) for name in "abc"], [peer(name) for name in "ab"]
    for name in LANES:
        before, after = due_to(f"lane:{name}", three), due_to(f"lane:{name}", two)
        assert before == after or before.incarnation == "c"


def test_a_lane_is_due_only_to_nodes_that_have_its_destination():
    peers = [peer("a", destinations={"crm"}), peer("b", destinations={"erp"})]
    assert due_to("lane:crm", peers).incarnation == "a"
    assert due_to("lane:erp", peers).incarnation == "b"
    assert due_to("lane:none", peers) is None
    assert {due_to(f"job:{number}", peers).incarnation for number in range(20)} == {"a", "b"}


D1 = "lane:d1"
FREE = Lease(D1, None, 0, is_held=False)
ENDED = Lease(D1, B, 3, is_held=False, free_for=0.5)


def held_by(node, epoch=3):
    return Lease(D1, node, epoch, is_held=True)


@pytest.mark.parametrize(
    ("me", "held", "leases", "ages", "expected"),
    [
        (A, {}, [], (60, 60), {"missing": (D1,), "take": (D1,)}),
        (B, {}, [], (60, 60), {"missing": (D1,)}),
        (A, {}, [FREE], (60, 60), {"take": (D1,)}),
        (A, {}, [FREE], (0, 60), {"take": (D1,)}),  # a new node takes free leases
        (B, {}, [FREE], (60, 60), {}),
        (A, {}, [ENDED], (60, 60), {"take": (D1,)}),
        (B, {}, [ENDED], (60, 60), {}),
        (B, {}, [Lease(D1, A, 3, is_held=False, free_for=NEGLECTED + 1)], (60, 60), {"take": (D1,)}),
        (A, {}, [held_by(B)], (60, 60), {}),  # B hands it over
        (B, {D1: 3}, [held_by(B)], (60, 60), {"hand_over": D1}),
        (B, {D1: 3}, [held_by(B)], (SETTLE_IN - 1, 60), {}),  # A is too new
        (A, {D1: 3}, [held_by(A)], (60, 60), {}),
        (B, {D1: 3}, [held_by(B)], (None, 60), {}),  # A is gone
        (B, {}, [ENDED], (None, 60), {"take": (D1,)}),
        (A, {}, [held_by(A)], (60, 60), {"adopt": {D1: 3}}),  # the response to its request was lost
        (A, {D1: 2}, [held_by(A)], (60, 60), {"adopt": {D1: 3}}),
    ],
)
def test_a_node_takes_keeps_or_hands_over_a_lease(me, held, leases, ages, expected):
    peers = [peer(node, age) for node, age in zip((A, B), ages, strict=True) if age is not None]
    steps = plan(me, held, {D1}, leases, peers)
    found = {
        "missing": steps.missing,
        "take": steps.take,
        "adopt": steps.adopt,
        "hand_over": steps.hand_over,
    }
    assert found == {"missing": (), "take": (), "adopt": {}, "hand_over": None, **expected}


def with_settings(incarnation, settings, place=None, **fields):
    definitions = None if settings is None else {"d1": settings, "": settings}
    return msgspec.structs.replace(peer(incarnation), definitions=definitions, place=place, **fields)


@pytest.mark.parametrize("name", [D1, "job:sweep"])
@pytest.mark.parametrize(
    ("lease", "peers", "able"),
    [
        ({"definition": None}, {"a": "new", "b": "old"}, "ab"),  # never held
        ({"definition": "old", "held": "b"}, {"a": "new", "b": "old"}, "b"),
        ({"definition": "old"}, {"a": "new", "b": "old"}, "b"),
        ({"definition": "old", "free_for": ABSENT - 1}, {"a": "new"}, ""),
        ({"definition": "old", "free_for": ABSENT + 1}, {"a": "new", "c": "newest"}, "ac"),
        ({"definition": "old", "free_for": 1.0, "place": "at a"}, {"a": "new", "c": "newest"}, "a"),
        ({"definition": "old", "free_for": 1.0, "place": "at b"}, {"a": "new", "c": "newest"}, ""),
        ({"definition": "old", "held": "b", "place": "at a"}, {"a": "new", "c": "newest"}, ""),  # b is frozen
        ({"definition": "old"}, {"a": None, "b": "new"}, "a"),  # a has an older version
        ({"definition": "old"}, {"a": "new", "b": "old", "c": "old"}, "bc"),
        ({"definition": "old", "held": "a"}, {"a": "new", "b": "old"}, "ab"),  # a has reloaded its config
    ],
)
def test_only_nodes_with_the_settings_in_force_may_have_a_lease(name, lease, peers, able):
    held = lease.get("held")
    row = Lease(
        name, held or "x", 3, is_held=held is not None, free_for=lease.get("free_for", None if held else 1.0),
        definition=lease["definition"], place=lease.get("place"),
    )  # fmt: skip
    live = [with_settings(node, settings, f"at {node}") for node, settings in peers.items()]
    found = bar(live, [row])
    assert "".join(each.incarnation for each in found if each.may_hold(name)) == able
    assert all(each.may_hold("lane:d2") and each.may_hold("job:other") for each in found)


@pytest.mark.parametrize("name", [D1, "job:sweep"])
@pytest.mark.parametrize(
    ("gone_for", "nodes", "able"),
    [
        (9, {"a": ("new", 60)}, ""),
        (9, {"a": ("new", 60, "older", "old"), "b": ("other", 5)}, "a"),  # a has reloaded its config
        (9, {"a": ("new", 60, "older"), "b": ("other", 60)}, ""),
        (9, {"a": ("new", 60), "b": ("new", 60), "c": ("other", 5)}, "ab"),
        (9, {"a": ("new", 60), "b": ("new", 60), "c": ("other", 60), "d": ("other", 60)}, ""),
        (9, {"a": ("new", 60), "b": ("other", 5)}, "b"),  # b was started afterwards
        (9, {"a": ("new", 60), "b": ("other", 10)}, ""),
        (9, {"a": ("new", 60, "old"), "b": ("old", 60)}, "b"),  # its settings are still in force
    ],
)
def test_an_operators_change_comes_into_force_at_once_when_the_former_settings_are_gone(
    name, gone_for, nodes, able
):
    row = Lease(name, "x", 3, is_held=False, free_for=1.0, definition="old", gone_for=float(gone_for))
    live = [
        with_settings(node, settings, age=float(age), former={"d1": former, "": former})
        for node, (settings, age, *former) in nodes.items()
    ]
    assert "".join(each.incarnation for each in bar(live, [row]) if each.may_hold(name)) == able
    held = msgspec.structs.replace(row, is_held=True, free_for=None, gone_for=0.0)
    mine = {node for node, (settings, *_) in nodes.items() if settings == "old"}
    assert {each.incarnation for each in bar(live, [held]) if each.may_hold(name)} == mine


def test_shards_follow_the_lease_of_their_destination():
    live = [with_settings("a", "new"), with_settings("b", "old")]
    own = Lease(D1, "a", 3, is_held=True, definition="new")  # a has reloaded its config
    shard = Lease(f"{D1}/0", "b", 3, is_held=True, definition="old")
    assert [each.may_hold(f"{D1}/0") for each in bar(live, [own, shard])] == [True, False]


def test_a_node_without_a_destination_does_not_keep_its_settings_in_force():
    live = [with_settings("a", "new"), peer("b", destinations={"d2"})]
    [with_it, _] = bar(live, [Lease(D1, "x", 3, is_held=False, free_for=ABSENT + 1, definition="old")])
    assert with_it.may_hold(D1)


def test_held_leases_move_one_at_a_time():
    names = {f"lane:{name}" for name in LANES}
    leases = [Lease(name, "a", 1, is_held=True) for name in names]
    steps = plan("a", dict.fromkeys(names, 1), names, leases, [peer("a"), peer("b")])
    assert steps.hand_over in names
    assert not steps.take


@pytest.mark.parametrize(
    ("lease", "timeout", "length"), [(30, 15, 30), (30, 5, 30), (30, 60, 120), (5, 15, 30), (5, 1, 5)]
)
def test_an_attempt_that_begins_in_time_ends_before_the_lease(lease, timeout, length):
    assert length_of(lease, timeout) == length
    until = trusted_until(0, length, timeout)
    slowest = 1 - 1 / SLEW  # of the steady clock
    assert 0 < until / SECOND / slowest + timeout <= length


@pytest.mark.parametrize(
    ("used", "slot"), [((), 0), ((0, 1, 3), 2), ((1,), 0), (range(255), 255), (range(256), None)]
)
def test_a_node_takes_the_smallest_free_slot(used, slot):
    assert free_slot(used) == slot


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "nodes", "loads"), [(4, "ab", [2, 2]), (4, "abc", [1, 1, 2]), (2, "abc", [0, 1, 1])]
)
def test_shards_are_spread_evenly_and_all_nodes_agree(count, nodes, loads):
    peers = [peer(name) for name in nodes]
    owners = [owner.name for owner in spread("d1", count, peers)]
    assert owners == [owner.name for owner in spread("d1", count, peers[::-1])]
    assert sorted(map(owners.count, nodes)) == loads


def test_shards_go_only_to_nodes_that_have_the_destination_and_know_shards():
    old = Peer("old", "old", 60.0, LANES, shards=None)
    peers = [peer("a"), old, peer("b", destinations={"erp"})]
    assert {owner.name for owner in spread("d1", 4, peers)} == {"a"}
    assert spread("none", 4, peers) == []


@pytest.mark.parametrize(
    ("wanted", "expected"), [([4, 4], 4), ([4, 2], 2), ([4, 1], 1), ([4, None], 1), ([], 1)]
)
def test_the_smallest_number_of_shards_of_the_live_nodes_counts(wanted, expected):
    peers = [
        Peer(str(n), str(n), 60.0, LANES, shards=None if each is None else {"d1": each})
        for n, each in enumerate(wanted)
    ]
    others = [Peer("other", "other", 60.0, frozenset({"erp"}))]
    assert wanted_shards("d1", [*peers, *others]) == expected


@pytest.mark.parametrize(
    ("now", "wanted", "held", "expected"),
    [
        (1, 1, [], None),
        (1, 4, [], 4),
        (4, 4, ["lane:d1/0"], None),
        (4, 2, ["lane:d1/0"], CHANGING),
        (4, 1, [], CHANGING),
        (CHANGING, 2, ["lane:d1/3"], None),
        (CHANGING, 2, ["lane:d10/3", "lane:d1"], 2),
        (CHANGING, 1, [], 1),
    ],
)
def test_the_number_of_shards_changes_when_no_shard_is_held(now, wanted, held, expected):
    leases = [Lease(name, "a", 1, is_held=True) for name in held]
    assert next_shards("d1", now, wanted, [*leases, Lease("lane:d1/1", "a", 1, is_held=False)]) == expected


# --- with a server --------------------------------------------------------------------------------

TABLES = """
    CREATE TABLE IF NOT EXISTS nodes (
        incarnation uuid PRIMARY KEY, slot int NOT NULL UNIQUE, name text, version text, schema int,
        config_digest bytea, destinations text[], internal_url text, started timestamptz,
        seen timestamptz, shards jsonb, place text, definitions jsonb, former jsonb);
    CREATE TABLE IF NOT EXISTS leases (
        name text PRIMARY KEY, incarnation uuid, epoch bigint NOT NULL DEFAULT 0,
        until timestamptz NOT NULL DEFAULT '-infinity', standing jsonb, definition text,
        place text) WITH (fillfactor = 50);
    CREATE TABLE IF NOT EXISTS requests (
        id uuid PRIMARY KEY, destination text NOT NULL, verb text NOT NULL, argument bytea NOT NULL,
        asked timestamptz NOT NULL DEFAULT clock_timestamp(), taken timestamptz, answered timestamptz,
        answer bytea, error text);
    CREATE TABLE IF NOT EXISTS unheard (
        digest bytea PRIMARY KEY, event_ids text NOT NULL, expires timestamptz NOT NULL);
"""


class Link:
    """A connection that the test can cut: statements fail before or after the server runs them."""

    def __init__(self, connection, cluster):
        self.connection, self.cluster = connection, cluster

    async def fetch(self, sql, *values):
        if self.cluster.cut == "before":
            raise StorageUnavailableError("cut")
        rows = await self.connection.fetch(sql, *values)
        if self.cluster.cut == "after" and self.cluster.cut_sql in sql:
            raise StorageUnavailableError("cut")
        return rows

    async def close(self):
        await self.connection.close()


class Cluster:
    """Nodes on one database, each with a clock that the test controls."""

    def __init__(self, url):
        self.url = url
        self.cut = self.cut_sql = ""
        self.nodes = []

    async def connect(self):
        return Link(await asyncpg.connect(self.url), self)

    async def join(
        self, name="a", lease=30.0, clock=None, lanes=("crm", "erp"), *, place="", settings="", listens=False
    ):
        node = PostgresNodes(
            self.connect,
            clock or FakeClock(),
            name=name,
            lease=lease,
            schema=1,
            listen=partial(asyncpg.connect, self.url) if listens else None,
            place=lambda: place,
            digests=lambda: node.digests,
        )
        node.digests = Digests()
        if settings:
            node.digests = Digests(settings.encode().hex(), settings, dict.fromkeys(lanes, settings))
        node.lanes = dict.fromkeys(lanes, 10.0)
        await node.join()
        self.nodes.append(node)
        return node

    async def run(self, sql, *values):
        connection = await asyncpg.connect(self.url)
        try:
            return await connection.fetch(sql, *values)
        finally:
            await connection.close()

    async def age(self, seconds=60):
        """Make all nodes older, so that lanes may move to them."""
        await self.run("UPDATE nodes SET started = started - $1::float8 * interval '1 second'", seconds)


@pytest.fixture
async def cluster(tmp_path):
    cluster = Cluster(database_of(tmp_path))
    connection = await asyncpg.connect(cluster.url)
    await connection.execute(TABLES)
    await connection.close()
    yield cluster
    cluster.cut = ""
    for node in cluster.nodes:
        await node.close()
    drop_databases()


async def own(node, jobs=("sweep",)):
    return await node.own(node.lanes, jobs)


@needs_postgres
async def test_one_node_takes_everything_and_keeps_it(cluster):
    node = await cluster.join()
    for _ in range(3):
        owned = await own(node)
        assert set(owned.until) == {"crm", "erp"}
    assert node.lead("sweep")
    assert not node.lead("retention")
    assert sorted(node.owned) == ["crm", "erp"]
    epochs = await cluster.run("SELECT epoch FROM leases")
    assert [row["epoch"] for row in epochs] == [1, 1, 1]
    [shown] = await node.all()
    assert (shown.name, shown.is_self, shown.lanes, shown.jobs) == ("a", True, ("crm", "erp"), ("sweep",))
    assert shown.destinations == ("crm", "erp")


@needs_postgres
async def test_the_lanes_of_a_node_that_does_not_answer_are_named_once(cluster):
    node = await cluster.join()
    names = ("lane:crm", "lane:crm/0", "lane:crm/3", "lane:erp", "job:sweep")
    node._note_unanswered([Lease(name, "gone", 1, is_held=True) for name in names])
    [caution] = [each for each in node.cautions() if "does not answer" in each.what]
    assert "these lanes does not answer: crm/0, crm/3, erp; other nodes" in caution.what


async def test_slots_are_unique_and_used_again(cluster):
    nodes = [await cluster.join(name) for name in "abc"]
    assert [node.slot for node in nodes] == [0, 1, 2]
    await nodes[1].leave()
    assert (await cluster.join("d")).slot == 3  # a node that leaves writes until it is closed
    await nodes.pop(1).close()
    assert (await cluster.join("d")).slot == 1
    racing = await asyncio.gather(*(cluster.join("r") for _ in range(6)))
    assert len({node.slot for node in racing} | {0, 1, 2, 3}) == 10


@needs_postgres
async def test_a_loop_of_crashes_does_not_use_up_the_slots(cluster):
    await cluster.run(
        """
        INSERT INTO nodes (incarnation, slot, started, seen)
        SELECT gen_random_uuid(), slot, now(), now() - interval '9 minutes' * (slot >= 100)::int
          FROM generate_series(0, 255) AS slot
        """
    )
    assert (await cluster.join()).slot == 100  # the first one that was not live in the last minute
    await cluster.run(
        "INSERT INTO nodes (incarnation, slot, started, seen)"
        " SELECT gen_random_uuid(), slot, now(), now() FROM generate_series(101, 255) AS slot"
    )
    with pytest.raises(StorageError, match="already has 256 nodes"):
        await cluster.join()


@needs_postgres
async def test_trust_in_a_lease_counts_from_before_the_request(cluster):
    clock = FakeClock()
    node = await cluster.join(clock=clock, lanes=("crm",))
    await own(node)
    fetch = node._connection.fetch

    async def slow(sql, *values):
        rows = await fetch(sql, *values)
        clock.advance(3 * ("UPDATE leases" in sql))
        return rows

    node._connection.fetch = slow
    asked = clock.steady()
    assert (await own(node)).until == {"crm": asked + int(20 * SECOND * (1 - 1 / SLEW))}


@needs_postgres
async def test_a_joining_node_gets_its_share_one_by_one_after_it_has_settled_in(cluster):
    lanes = sorted(LANES)[:12]
    first = await cluster.join("a", lanes=lanes)
    await own(first)
    second = await cluster.join("b", lanes=lanes)
    assert not (await own(second)).until
    assert not (await own(first)).hand_over
    await cluster.age()
    moved = set()
    for _ in range(40):
        owned = await own(first)
        assert len(owned.hand_over) <= 1
        assert owned.hand_over <= owned.until.keys()  # it renews until the attempts have ended
        moved |= owned.hand_over
        await first.give(owned.hand_over)
        taken = await own(second)
        assert taken.until.keys() == moved
    assert 0 < len(moved) < 12
    assert (await own(first)).until.keys() == set(lanes) - moved
    assert (await own(second)).elsewhere == dict.fromkeys(set(lanes) - moved, "a")
    await second.leave()
    await second.give(moved)
    assert (await own(first)).until.keys() == set(lanes)


@needs_postgres
async def test_a_node_takes_over_at_once_from_a_dead_one_with_the_same_state_folder(cluster, caplog):
    dead = await cluster.join("a", place="boot 1 2")
    assert set((await own(dead)).until) == {"crm", "erp"}
    stranger = await cluster.join("b", lanes=("crm",), place="boot 1 3")
    assert not (await own(stranger)).until
    await cluster.run("UPDATE nodes SET seen = seen - interval '6 s' WHERE name = 'a'")
    assert not (await own(stranger)).until
    [caution] = stranger.cautions()
    assert caution.what.startswith(
        "the node that ran these lanes does not answer: crm, erp; other nodes take them"
    )
    await stranger.close()
    cluster.nodes.remove(stranger)
    caplog.clear()
    again = await cluster.join("a", place="boot 1 2")
    assert set((await own(again)).until) == {"crm", "erp"}
    assert again.lead("sweep")
    assert again.cautions() == ()
    assert not (await own(dead)).until  # if it was not dead, it notices
    assert [row["epoch"] for row in await cluster.run("SELECT epoch FROM leases")] == [2, 2, 2]


@needs_postgres
async def test_a_node_with_other_settings_gets_nothing_until_those_in_force_are_gone(cluster, caplog):
    first = await cluster.join("a", lanes=("crm",), settings="old", place="at a")
    assert (await own(first)).until
    stranger = await cluster.join("b", lanes=("crm",), settings="new", place="at b")
    await cluster.age()
    assert not (await own(first)).hand_over
    assert not (await own(stranger)).until
    differs, barred = (caution.what for caution in stranger.cautions())
    assert differs == "nodes with a configuration that differs from this node's: a"
    assert barred == (
        "this node does not deliver to crm and runs no jobs: its settings differ from those of a node that "
        "is running, or that ran less than 30 s ago"
    )
    assert caplog.text.count("this node does not deliver to crm") == 1
    first.digests = Digests("aa", "newest", {"crm": "newest"})  # a reload: the owner's settings are in force
    assert (await own(first)).until
    assert not (await own(stranger)).until
    await first.close()  # a restart with other settings
    cluster.nodes.remove(first)
    assert not (await own(stranger)).until
    again = await cluster.join("a", lanes=("crm",), settings="other", place="at a")
    assert (await own(again)).until
    assert again.lead("sweep")
    await again.close()
    cluster.nodes.remove(again)
    assert not (await own(stranger)).until
    await cluster.run("UPDATE leases SET until = until - interval '31 s'")
    assert (await own(stranger)).until
    assert stranger.cautions() == ()


@needs_postgres
async def test_a_change_of_settings_node_by_node_stops_no_lane(cluster):
    """Reloads and restarts; each restart has a new state folder, as in containers."""
    first = await cluster.join("a", lanes=("crm",), settings="old", place="1")
    second = await cluster.join("b", lanes=("crm",), settings="old", place="2")
    assert (await own(first)).until
    second.digests = Digests("aa", "new", {"crm": "new"})  # a reload
    assert not (await own(second)).until
    await first.close()
    assert (await own(second)).until
    assert second.lead("sweep")

    third = await cluster.join("c", lanes=("crm",), settings="newer", place="3")
    assert not (await own(third)).until
    await second.close()
    assert not (await own(third)).until  # it may be a daemon on the wrong database
    fourth = await cluster.join("d", lanes=("crm",), settings="newer", place="4")
    for node in (fourth, third):
        await own(node)
    assert third.owned + fourth.owned == ["crm"]
    assert third.lead("sweep") != fourth.lead("sweep")

    for node in (third, fourth):
        await node.close()
    last = await cluster.join("e", lanes=("crm",), settings="newest", place="5")
    assert (await own(last)).until
    assert last.lead("sweep")
    cluster.nodes[:] = [last]


@needs_postgres
async def test_a_node_that_crashed_is_gone_since_its_latest_renewal(cluster):
    """A node that was started afterwards takes its lease when it ends."""
    dead = await cluster.join("a", lanes=("crm",), settings="old")
    assert (await own(dead)).until
    await cluster.age(30)
    before = await cluster.join("b", lanes=("crm",), settings="newer")
    await cluster.run("UPDATE nodes SET started = started - interval '16 s' WHERE name = 'b'")
    await cluster.run("UPDATE nodes SET seen = seen - interval '15 s' WHERE name = 'a'")
    after = await cluster.join("c", lanes=("crm",), settings="new")
    await cluster.run("UPDATE leases SET until = clock_timestamp()")
    assert not (await own(before)).until
    assert (await own(after)).until


@needs_postgres
async def test_a_dead_node_is_replaced_when_its_leases_end(cluster):
    first, second = await cluster.join("a", lease=1.0), await cluster.join("b", lease=1.0)
    first.lanes = second.lanes = dict.fromkeys(("crm", "erp"), 0.2)
    await own(first)
    assert not (await own(second)).until.keys() & (await own(first)).until.keys()
    async with asyncio.timeout(60):
        while (await own(second)).until.keys() != {"crm", "erp"}:  # noqa: ASYNC110 - the test is the clock
            await asyncio.sleep(0.1)
    assert [row["epoch"] for row in await cluster.run("SELECT epoch FROM leases WHERE name = 'lane:crm'")]
    owned = await own(first)  # it was only stopped
    assert not owned.until
    assert owned.elsewhere == {"crm": "b", "erp": "b"}


@needs_postgres
async def test_a_node_renews_only_the_epoch_that_it_took(cluster):
    node = await cluster.join(lanes=("crm",))
    await own(node)
    for change in (
        "epoch = epoch + 1",  # it was lost, and taken again by the same incarnation
        "incarnation = gen_random_uuid()",
        "until = clock_timestamp()",
    ):
        await cluster.run(f"UPDATE leases SET {change}, standing = NULL WHERE name = 'lane:crm'")
        await node._renew()
        assert "lane:crm" not in node._held
        assert not node.owned
        await cluster.run("UPDATE leases SET until = '-infinity' WHERE name = 'lane:crm'")
        await own(node)
        assert node.owned == ["crm"]


@needs_postgres
async def test_two_nodes_never_hold_a_lease_at_once_however_they_race(cluster):
    nodes = [await cluster.join(name, lanes=("crm",)) for name in "abcd"]
    await cluster.run("INSERT INTO leases (name) VALUES ('lane:crm')")
    for _ in range(10):
        await cluster.run("UPDATE leases SET until = clock_timestamp() - interval '1 minute'")
        for node in nodes:
            node._held.clear()
            node._trusted.clear()
        owned = await asyncio.gather(*(own(node, ()) for node in nodes))
        assert [len(each.until) for each in owned].count(1) == 1


@needs_postgres
async def test_a_lease_that_another_node_takes_at_the_same_moment_or_holds_is_not_taken(cluster):
    node = await cluster.join(lanes=("crm",))
    await own(node, ())  # makes the row
    await node.give(("crm",))
    arguments = (TAKE_SQL, node.incarnation, ["lane:crm"], [30.0], [None], "")
    other = await asyncpg.connect(cluster.url)
    async with other.transaction():
        await other.execute(
            "UPDATE leases SET incarnation = gen_random_uuid(), epoch = epoch + 1,"
            " until = clock_timestamp() + interval '30 s'"
        )
        taking = asyncio.create_task(node._locked(*arguments))
        waiting = """
            SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'
        """
        async with asyncio.timeout(30):
            while not (taking.done() or await other.fetchval(waiting)):  # noqa: ASYNC110 - the server knows
                await asyncio.sleep(0.01)
    assert not await taking
    assert not await node._locked(*arguments)
    await other.close()


@needs_postgres
async def test_a_lost_response_leaves_no_lease_behind(cluster):
    node = await cluster.join(lanes=("crm",))
    await own(node, ())  # makes the row
    await node.give(("crm",))
    cluster.cut, cluster.cut_sql = "after", "epoch + 1"
    with pytest.raises(StorageUnavailableError):
        await own(node, ())
    assert not node.owned
    cluster.cut = ""
    await own(node, ())
    assert (await own(node, ())).until.keys() == {"crm"}


@needs_postgres
async def test_without_the_database_a_node_trusts_its_leases_until_their_times(cluster):
    clock = FakeClock()
    node = await cluster.join(clock=clock)
    owned = await own(node)
    assert set(owned.until.values()) == {clock.steady() + int(20 * SECOND * (1 - 1 / SLEW))}
    cluster.cut = "before"
    for seconds, leads in ((14, True), (0.3, False)):
        clock.advance(seconds)
        with pytest.raises(StorageUnavailableError):
            await own(node)
        assert (node.lead("sweep"), sorted(node.owned)) == (leads, ["crm", "erp"])
    clock.advance(5)
    assert node.owned == []


@needs_postgres
async def test_a_lane_that_is_handed_over_is_renewed_until_it_is_given(cluster):
    node = await cluster.join(lanes=("crm", "erp"))
    await own(node)
    node.lanes = {"erp": 10.0}  # a reload
    for _ in range(2):
        owned = await own(node)
        assert (owned.until.keys(), owned.hand_over) == ({"crm", "erp"}, {"crm"})
    cluster.cut = "before"
    with pytest.raises(StorageUnavailableError):
        await node.give(("crm",))
    cluster.cut = ""
    assert (await own(node)).hand_over == {"crm"}
    await node.give(("crm",))
    owned = await own(node)
    assert (owned.until.keys(), owned.hand_over) == ({"erp"}, frozenset())


@needs_postgres
async def test_a_node_that_leaves_keeps_its_leases_until_it_gives_them(cluster):
    first, second = await cluster.join("a"), await cluster.join("b")
    await own(first)
    await first.leave()
    assert (await own(first)).until.keys() == {"crm", "erp"}
    assert not (await own(second)).until
    assert [node.name for node in await second.all()] == ["b"]
    await first.give(("crm", "erp"))
    assert (await own(second)).until.keys() == {"crm", "erp"}
    assert first.lead("sweep") != second.lead("sweep")
    await first.close()  # gives its jobs
    await own(second)
    assert second.lead("sweep")


class Attendant:
    """Records the announcements and requests of other nodes."""

    def __init__(self):
        self.woken, self.renewals, self.asked = [], 0, []

    def wake(self, lanes, *, retries=False):
        if lanes is not None:  # not a poll before notifications arrive
            self.woken.append((tuple(lanes), retries))

    def renew_soon(self):
        self.renewals += 1

    async def answer(self, lane, verb, argument):
        self.asked.append((lane, verb, argument))
        return f"{verb} done"

    async def show(self, job, argument):
        return f"shown by {job}"


@needs_postgres
async def test_nodes_wake_and_ask_each_other(cluster):
    first, second = await cluster.join("a", listens=True), await cluster.join("b", listens=True)
    await until(lambda: first._wake_ups.arrives and second._wake_ups.arrives)
    attendant = Attendant()
    first.attend(attendant)
    await own(first)
    second.announce(("crm",))
    await until(lambda: attendant.woken == [(("crm",), False)])
    second.announce(("erp",), retries=True)
    await until(lambda: attendant.woken[1:] == [(("erp",), True)])
    assert await second.ask("crm", "pause", {"until": None}) == "pause done"
    assert attendant.asked == [("crm", "pause", {"until": None})]

    async def cancel(lane, ids):
        return len(ids)

    first.handle("cancel", cancel)
    assert await second.ask("crm", "cancel", [1, 2]) == 2
    await own(second)
    leader = first if first.lead("sweep") else second
    leader.attend(attendant)
    leader.handle("show", attendant.show)
    other = second if leader is first else first
    assert await other.ask_leader("sweep", "show", None) == "shown by job:sweep"
    with pytest.raises(RelayError, match='this node does not support "hide"'):
        await other.ask_leader("sweep", "hide", None)
    assert attendant.renewals == 0
    await second.give(())
    await until(lambda: attendant.renewals == 1)


@needs_postgres
async def test_a_node_asks_all_others_and_names_those_that_do_not_answer(cluster):
    nodes = [await cluster.join(name) for name in "abc"]
    first, second, third = nodes

    async def fail(_to, _argument):
        raise ValueError("for the test")

    for node in (first, second):
        node.attend(Attendant())
    for node in (*nodes, first):
        await own(node)
    assert await first.ask_others("show", None, 0.05) == Answers(silent=("b", "c"))  # no wake-ups: both poll

    async def asked(patience=5.0):
        asking = asyncio.create_task(first.ask_others("show", [1], patience))
        while not asking.done():  # each node looks for requests when it renews its leases
            await own(second)
            await own(third)
        return await asking

    second.handle("show", Attendant().show)
    given = (("b", f"shown by node:{second.incarnation}"),)
    assert await asked(0.5) == Answers(given=given, silent=("c",))
    third.attend(Attendant())
    assert await asked() == Answers(given=given, unable=("c",))  # as if its version were older
    third.handle("show", fail)
    assert await asked() == Answers(given=given, silent=("c",))
    await cluster.run("UPDATE nodes SET version = '0.0.9' WHERE name = 'c'")
    await own(first)
    assert await asked() == Answers(given=given, unable=("c",))  # it does not know the form of the request
    assert await cluster.run("SELECT FROM requests") == []
    with pytest.raises(StorageUnavailableError, match='another node did not answer; "show" was not executed'):
        await first.ask_node("00000000-0000-0000-0000-000000000000", "show", None, 0.1)
    # Its row moves behind the others.
    await cluster.run("UPDATE nodes SET version = version WHERE name = 'b'")
    await own(first)
    cluster.cut = "before"
    assert await first.ask_others("show", None, 5.0) == Answers(silent=("b", "c"))


@needs_postgres
async def test_a_closed_node_does_not_connect_again_for_the_requests_of_others(cluster):
    node = await cluster.join("a")
    node.attend(Attendant())
    await own(node)
    node._answer_requests()
    await node.close()
    cluster.nodes.remove(node)
    node._wake(WakeUp("", is_poll=True))
    assert node._answering.done()
    assert node._connection is None


@needs_postgres
async def test_a_node_that_the_others_forgot_joins_again(cluster, caplog):
    node = await cluster.join()
    await cluster.run("DELETE FROM nodes")
    other = await cluster.join("b")
    assert (other.slot, node.slot) == (0, 0)
    await own(node)
    assert node.slot == 1
    assert "the other nodes had forgotten this node; it joins again" in caplog.messages


@needs_postgres
@pytest.mark.parametrize("end", ["give", "die"])
async def test_a_new_owner_knows_the_standing_that_the_former_one_has_reported(cluster, end):
    first = await cluster.join("a", lanes=("crm",), settings="s")
    second = await cluster.join("b", lanes=("crm",), settings="s")
    await own(first, ())
    standing = {"circuit": "HTTP 500", "is_quiet": False, "probe_at": 5, "probe_wait": 4, "rest_until": 6}
    await first.own(first.lanes, (), {}, {"crm": standing})
    later = {**standing, "rest_until": 7}
    if end == "give":
        await first.leave()
        await first.give(["crm"], {"crm": later})
    else:  # by SIGKILL
        await first.own(first.lanes, (), {}, {"crm": later})
        await cluster.run("UPDATE leases SET until = clock_timestamp() - interval '1 minute'")
        await cluster.run("UPDATE nodes SET seen = seen - interval '1 minute' WHERE name = 'a'")
    assert (await own(second, ())).standing == {"crm": Standing(**later)}
    assert set(second.owned) == {"crm"}
    await cluster.run("UPDATE leases SET definition = 'other', until = clock_timestamp() - interval '1 hour'")
    second._forget("lane:crm")
    assert (await own(second, ())).standing == {}  # of another destination
    assert set(second.owned) == {"crm"}


@needs_postgres
async def test_the_clock_follows_the_server(cluster):
    class Ahead(SystemClock):
        def steady(self):
            return super().steady() + 3600 * SECOND

    clock = ServerClock(Ahead())
    node = await cluster.join(clock=clock)
    await own(node)
    [row] = await cluster.run("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now")
    assert abs(clock.steady() - row["now"]) < 5 * SECOND


@needs_postgres
async def test_a_slow_connect_at_the_start_does_not_set_the_clock(cluster, monkeypatch):
    """The best of several comparisons sets it; from a bad one, it would approach the server's time slowly."""

    class Slow(SystemClock):
        passed = 0

        def steady(self):
            return super().steady() + self.passed

    local, connect = Slow(), cluster.connect

    async def slow_connect():
        local.passed += 10 * SECOND
        return await connect()

    monkeypatch.setattr(cluster, "connect", slow_connect)
    clock = ServerClock(local)
    await cluster.join(clock=clock)
    [row] = await cluster.run("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now")
    assert abs(clock.steady() - row["now"]) < 2 * SECOND
    assert abs(clock.behind) < SECOND // 100  # it has nothing to catch up


# --- shards with a server -------------------------------------------------------------------------


async def divide(node, count, standing=()):
    """Renew with a number of shards in the config; hand over at once what another node should have."""
    shards = {} if count == 1 else {"crm": count}
    owned = await node.own({"crm": 10.0}, (), shards, dict(standing))
    for name in node.to_assign:
        node.note_assigned(name)
    if owned.hand_over:
        await node.give(sorted(owned.hand_over))
    return owned


async def settle(counts, steps=12):
    """Renew all nodes until nothing changes; `counts` has the number of shards in each one's config."""
    for _ in range(steps):
        found = [await divide(node, count) for node, count in counts.items()]
    return found


def numbers(owned):
    return sorted(name for name in owned.until if "/" in name)


@needs_postgres
async def test_shards_are_divided_among_nodes_and_one_of_them_keeps_the_state(cluster):
    a, b = await cluster.join("a", lanes=("crm",)), await cluster.join("b", lanes=("crm",))
    await settle({a: 1, b: 1}, 2)
    await cluster.age()
    found = await settle({a: 4, b: 4})
    assert [each.shards for each in found] == [{"crm": 4}] * 2
    assert sorted(numbers(found[0]) + numbers(found[1])) == [f"crm/{number}" for number in range(4)]
    assert [len(numbers(each)) for each in found] == [2, 2]
    [keeper] = [node for node, each in zip((a, b), found, strict=True) if "crm" in each.until]
    assert keeper.scope.kept - keeper.scope.mine == {"crm"}
    assert "crm/0" in keeper.scope.mine
    lanes = {node.name: node.lanes for node in await a.all()}
    assert sorted(lanes["a"] + lanes["b"]) == [f"crm/{number}" for number in range(4)]
    assert a.figures()["lanes"] == 1

    await divide(
        b, 4, {name: {"in_flight": 3, "circuit": "503", "is_quiet": False} for name in numbers(found[1])}
    )
    shown = (await divide(a, 4)).standing
    assert [(shown[name].in_flight, shown[name].circuit) for name in numbers(found[1])] == [(3, "503")] * 2
    await cluster.run("UPDATE nodes SET seen = seen - interval '1 minute' WHERE name = 'b'")
    await cluster.run("UPDATE leases SET until = clock_timestamp() WHERE incarnation = $1", b.incarnation)
    shown = (await divide(a, 4)).standing
    assert [(shown[name].in_flight, shown[name].circuit) for name in numbers(found[1])] == [(0, "503")] * 2
    assert len(numbers(await divide(a, 4))) == 4


@needs_postgres
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
async def test_nodes_with_different_numbers_of_shards_agree_on_the_smallest_and_then_change(
    cluster, before, after
):
    a, b = await cluster.join("a", lanes=("crm",)), await cluster.join("b", lanes=("crm",))
    await cluster.age()
    for counts in ({a: before, b: before}, {a: after, b: before}, {a: after, b: after}):
        found = await settle(counts)
        least = min(counts.values())
        assert [each.shards.get("crm", 1) for each in found] == [least] * 2
        expected = ["crm"] if least == 1 else [f"crm/{number}" for number in range(least)]
        assert sorted(a.scope.mine | b.scope.mine) == expected
        assert not a.scope.mine & b.scope.mine


@needs_postgres
async def test_a_node_says_why_a_destination_has_fewer_shards_than_in_its_config(cluster):
    a, b = await cluster.join("a", lanes=("crm",)), await cluster.join("b", lanes=("crm",))
    await settle({a: 4, b: 2}, steps=2)
    texts = [[caution.what for caution in node.cautions()] for node in (a, b)]
    why = "crm has 2 shards instead of 4; b has a smaller number in config.toml"
    assert texts == [[why], []]
    a._peers = [*a._peers, Peer("old", "old", 60.0, frozenset({"crm"}), shards=None)]
    [caution] = a.cautions()
    assert caution.what == "crm has 1 shard instead of 4; old runs a version without shards"


@needs_postgres
async def test_a_held_shard_delays_a_change_and_a_node_that_has_missed_it_takes_none(cluster):
    a, b = await cluster.join("a", lanes=("crm",)), await cluster.join("b", lanes=("crm",))
    await cluster.age()
    await settle({a: 4, b: 4})
    [keeper] = [node for node in (a, b) if "crm" in node.scope.kept]
    other = b if keeper is a else a
    held = [name for name in other.scope.mine if "/" in name]
    assert held
    for _ in range(3):  # the other node is frozen: its leases last
        owned = await divide(keeper, 2)
        await cluster.run("UPDATE nodes SET seen = seen - interval '1 minute' WHERE name = $1", other._name)
    assert owned.shards == {"crm": CHANGING}
    assert not keeper.scope.mine
    assert keeper.scope.shards == {"crm": CHANGING}
    await cluster.run("UPDATE leases SET until = clock_timestamp() WHERE name LIKE 'lane:crm/%'")
    for _ in range(3):
        owned = await divide(keeper, 2)
    assert numbers(owned) == ["crm/0", "crm/1"]
    await cluster.run("UPDATE leases SET until = clock_timestamp() WHERE name = 'lane:crm/0'")
    former = (["lane:crm/0", "lane:crm/3"], [30.0, 30.0], ["lane:crm", "lane:crm"], [4, 4])
    assert not await other._locked(TAKE_SHARDS_SQL, other.incarnation, *former)


@needs_postgres
async def test_no_shard_is_taken_while_the_number_is_being_changed(cluster):
    node = await cluster.join("a", lanes=("crm",))
    await settle({node: 4}, 4)
    await node.give(["crm/1"])
    changing = await asyncpg.connect(cluster.url)
    async with changing.transaction():
        await changing.execute("""UPDATE leases SET standing = '{"shards": 0}' WHERE name = 'lane:crm'""")
        taking = asyncio.create_task(
            node._locked(TAKE_SHARDS_SQL, node.incarnation, ["lane:crm/1"], [30.0], ["lane:crm"], [4])
        )
        waiting = """
            SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'
        """
        async with asyncio.timeout(30):
            while not await changing.fetchval(waiting):  # noqa: ASYNC110 - the server knows
                await asyncio.sleep(0.01)
    assert not await taking
    await changing.close()
