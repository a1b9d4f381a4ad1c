"""Deliveries of shards in PostgreSQL: claims read only the deliveries of some slots."""

import asyncio
from unittest.mock import patch

import pytest
from postgres import needs_postgres
from postgres_stores import emptied, url_of
from stores import accept, check_rows, hooks, make_store, rows
from support import until
from test_postgres_shared import Node, hold_commits, waits_or_ends

from relay.base.clock import SECOND, SystemClock
from relay.base.shards import Shards, slot_of
from relay.errors import StorageError
from relay.model import Attempt, DestinationState, Grouping, Outcome, Target
from relay.store import Cancelled
from relay.store.batch import Scope
from relay.store.postgres import leases
from relay.store.postgres import nodes as nodes_module
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.shards import ASSIGN_SQL, due_sql, next_sql

pytestmark = needs_postgres
CLOCK = SystemClock()


@pytest.fixture(autouse=True)
def databases():
    with emptied():
        yield


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock, kind="postgres")
    store.target = Target("crm", is_spread=True)
    hooks(store).route = lambda event: () if event.source == "relay" else (store.target,)
    await store.open()
    yield store
    for name, counts in (await store.ledger.audit()).items():
        assert counts.unaccounted == 0, name
    await check_rows(store)
    await store.close()


def shards(count, *numbers):
    return Shards(count, frozenset(numbers))


async def fill(store, clock, number):
    """Store events, each due a second after the one before; returns (row id, slot), oldest first."""
    for _ in range(number):
        await store.events.append(accept(clock, b"{}"))
        clock.advance(1)
    stored = await rows(store, "SELECT id, slot FROM owed ORDER BY id")
    store.deliveries.release([id_ for id_, _ in stored])
    return stored


async def claim(store, which, limit=100, *, retries=False):
    found = await store.deliveries.claim("crm", limit, retries=retries, shards=which)
    assert all(which is None or which.covers(each.slot) for each in found.deliveries)
    return [each.id for each in found.deliveries]


async def test_a_claim_reads_only_its_shards_and_all_together_read_everything(store, clock):
    stored = await fill(store, clock, 60)
    assert len({slot for _, slot in stored}) > 10
    found = []
    for number in range(4):
        mine = [id_ for id_, slot in stored if slot % 4 == number]
        assert await claim(store, shards(4, number), 3) == mine[:3]
        assert await claim(store, shards(4, number)) == mine[3:]
        assert await claim(store, shards(4, number)) == []
        found += mine
    assert sorted(found) == [id_ for id_, _ in stored]


async def test_other_shards_are_read_from_the_beginning(store, clock):
    stored = await fill(store, clock, 30)
    assert await claim(store, shards(3, 0)) == [id_ for id_, slot in stored if slot % 3 == 0]
    assert await claim(store, shards(3, 0, 1)) == [id_ for id_, slot in stored if slot % 3 == 1]
    assert await claim(store, shards(3, 0, 1, 2)) == [id_ for id_, slot in stored if slot % 3 == 2]
    assert await claim(store, None) == []


async def test_the_next_due_time_is_of_the_shards(store, clock):
    store.target = Target("crm", is_spread=True, grouping=Grouping("", 60 * SECOND, 100))
    for number in range(10):
        grouping = Grouping(f"key {number}", (60 + number) * SECOND, 100)
        store.target = Target("crm", is_spread=True, grouping=grouping)
        await store.events.append(accept(clock, b"{}"))
    stored = await rows(store, "SELECT slot, min(next_attempt_at) FROM owed GROUP BY 1 ORDER BY 2")
    for which in (shards(2, 0), shards(2, 1), shards(2, 0, 1)):
        found = await store.deliveries.claim("crm", 1, retries=False, shards=which)
        expected = next((due for slot, due in stored if which.covers(slot)), None)
        assert (found.deliveries, found.next_due) == ((), expected)


async def test_retries_are_claimed_by_shard(store, clock):
    stored = await fill(store, clock, 12)
    for delivery in (await store.deliveries.claim("crm", 100, retries=False)).deliveries:
        attempt = Attempt(started_at=1, duration_ms=1.0, result="5xx", status=500)
        due = clock.steady() + SECOND
        await store.deliveries.settle(
            Outcome(delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due)
        )
        store.deliveries.release([delivery.id])
    clock.advance(2)
    for number in range(2):
        mine = [id_ for id_, slot in stored if slot % 2 == number]
        assert sorted(await claim(store, shards(2, number), retries=True)) == mine


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, None),
        ({"order_key": "o", "latest_key": "l"}, "o"),
        ({"order_key": ""}, ""),
        ({"latest_key": "größe"}, "größe"),
        ({"grouping": Grouping("g", SECOND, 5), "latest_key": "l"}, "g"),
    ],
)
async def test_deliveries_without_a_slot_get_the_same_one_later(store, clock, options, key):
    for is_spread in (True, False):
        store.target = Target("crm", is_spread=is_spread, **options)
        await store.events.append(accept(clock, b"{}"))
    assert await claim(store, shards(1, 0)) == []  # the delivery without a slot waits for one
    before = await rows(store, "SELECT id, slot, public_id::text FROM owed ORDER BY id")
    assert [slot is None for _, slot, _ in before][-1]
    last = await store.database.value(ASSIGN_SQL, "crm", 0, 100)
    assert last == before[-1][0]
    assert await store.database.value(ASSIGN_SQL, "crm", 0, 100) is None
    after = await rows(store, "SELECT slot, public_id::text FROM owed ORDER BY id")
    assert [slot for slot, _ in after] == [slot_of(key, public_id) for _, public_id in after]


async def test_assigning_skips_rows_that_are_being_changed(store, clock):
    store.target = Target("crm")
    stored = await fill(store, clock, 3)
    async with store.database.reader() as other, other.transaction():
        await other.fetch("SELECT id FROM owed WHERE id = $1 FOR UPDATE", stored[0][0])
        await store.database.value(ASSIGN_SQL, "crm", 0, 100)
    assert [slot is None for (slot,) in await rows(store, "SELECT slot FROM owed ORDER BY id")] == [
        True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("which", [shards(2, 0), shards(3, 1), shards(2, 0, 1)], ids=["half", "third", "all"])
async def test_a_claim_walks_along_an_index(store, clock, which):
    await fill(store, clock, 3)  # a generic plan for a small table must also be right for a large one

    async def run(sql, *values):
        return await store.database.writer.call(lambda connection: connection.fetch(sql, *values))

    for make, types, values in (
        (due_sql, "text, bigint, bigint, int, int[]", "'crm', 9000000000000000, 0, 10"),
        (next_sql, "text, bigint, int[]", "'crm', 0"),
    ):
        await run(f"PREPARE shard ({types}) AS {make('=', which)}")
        slots = ",".join(map(str, which.slots))
        plan = [line for (line,) in await run(f"EXPLAIN (COSTS OFF) EXECUTE shard ({values}, '{{{slots}}}')")]
        await run("DEALLOCATE shard")
        assert not any("Seq Scan" in line or "->  Sort" in line for line in plan)
        assert any("Merge Append" in line for line in plan) is not which.is_all
        assert sum("Scan using" in line for line in plan) == (1 if which.is_all else len(which.slots))


# --- two nodes ------------------------------------------------------------------------------------


class Sharer(Node):
    """A store of a cluster whose destination `crm` has two shards."""

    def route(self, event):
        return () if event.source == "relay" else (Target("crm", is_spread=True, **self.options["crm"]),)

    async def renew(self):
        owned = await self.store.nodes.own({"crm": 5.0}, (), {"crm": 2})
        if owned.hand_over:
            await self.store.nodes.give(sorted(owned.hand_over))

    @property
    def mine(self):
        return self.store.nodes.scope.mine

    @property
    def keeps(self):
        return "crm" in self.store.nodes.scope.kept

    @property
    def shards(self):
        return Shards(2, frozenset(int(name[-1]) for name in self.mine))

    async def claim(self, name="crm", limit=100):
        return (await self.store.deliveries.claim(name, limit, retries=False, shards=self.shards)).deliveries


@pytest.fixture
async def sharers(tmp_path, monkeypatch):
    """Two nodes with one shard each; the first one keeps the state."""
    monkeypatch.setattr(nodes_module, "SETTLE_IN", 0.0)
    monkeypatch.setattr(leases, "_weight", lambda _name, incarnation: order.index(incarnation))
    url = url_of(tmp_path, CLOCK)
    both = [Sharer(url, tmp_path / name, name) for name in ("a", "b")]
    order = [node.store.nodes.incarnation for node in both]
    for node in both:
        await node.open()
    first, second = both
    async with asyncio.timeout(30):
        while not (first.mine == {"crm/0"} and second.mine == {"crm/1"} and first.keeps > second.keeps):
            for node in both:
                await node.renew()
            await asyncio.sleep(0.05)
    yield both
    assert not any(counts.unaccounted for counts in (await both[0].store.ledger.audit()).values())
    await asyncio.gather(*(node.store.close() for node in both))


async def pending(node):
    return {id_ for (id_,) in await node.store.database.fetch("SELECT id FROM owed")}


async def fill_both(nodes, number=24, **options):
    """Store events in turns; returns the row ids of the deliveries of each node's shard."""
    for count in range(number):
        node = nodes[count % 2]
        node.options["crm"] = options
        await node.send(subject=f"s{count}")
    stored = await nodes[0].store.database.fetch("SELECT id, slot FROM owed ORDER BY id")
    for node in nodes:
        node.store.deliveries.release([id_ for id_, _ in stored])
    return [{id_ for id_, slot in stored if node.shards.covers(slot)} for node in nodes]


async def test_new_deliveries_go_to_the_lanes_of_this_node_and_others_are_announced(sharers):
    for node in sharers:
        mine = await fill_both(sharers)
        assert all(node.shards.covers(each.slot) for each in node.fresh)
        assert node.fresh
    assert all(mine)
    await until(lambda: all(("crm", False) in node.attendant.woken for node in sharers))


async def test_each_node_ends_only_the_deliveries_of_its_shards(sharers):
    first, second = sharers
    ours, theirs = await fill_both(sharers, ttl=0)
    await first.store.deliveries.expire()
    assert await pending(first) == theirs
    await second.store.deliveries.expire()
    assert not await pending(first)

    ours, theirs = await fill_both(sharers)
    await first.store.nodes._fetch("UPDATE leases SET until = until")  # its connection works
    second.store.nodes.attend(second.attendant)
    done = asyncio.create_task(first.store.deliveries.cancel([min(ours), min(theirs)]))
    async with asyncio.timeout(30):
        while not done.done():
            second.store.nodes._answer_requests()
            await asyncio.sleep(0.05)
    assert (await done).ended == 2
    assert await pending(first) == (ours - {min(ours)}) | (theirs - {min(theirs)})


async def test_a_newer_event_supersedes_older_ones_in_any_shard(sharers):
    first, _ = sharers
    for key in ("k1", "k2", "k3", "k4", "k5", "k6"):
        for node in sharers:
            node.options["crm"] = {"latest_key": key}
            await node.send()
    slots = {slot for (slot,) in await first.store.database.fetch("SELECT slot FROM owed")}
    assert len({slot % 2 for slot in slots}) == 2
    for node in sharers:
        await node.store.deliveries.expire()
    rows = await first.store.database.fetch("SELECT latest_key, count(*) FROM owed GROUP BY 1")
    assert [tuple(row) for row in sorted(rows)] == [(f"k{number}", 1) for number in range(1, 7)]


async def test_a_node_that_was_frozen_ends_nothing_of_another_number_of_shards(sharers):
    first, second = sharers
    mine = await fill_both(sharers, ttl=0)
    scope, number = second.store.nodes.scope, min(second.mine)
    await second.store.nodes.give([number])
    with patch.object(PostgresNodes, "scope", scope):  # frozen after it has begun a transaction
        await second.store.deliveries.expire()
        assert await second.store.deliveries.cancel(sorted(mine[1])) == Cancelled(0, len(mine[1]))
    undivided = Scope(frozenset({"crm"}), frozenset({"crm"}), has_orphans=False)
    with patch.object(PostgresNodes, "scope", undivided):  # the keeper, before it has divided the destination
        await first.store.deliveries.expire()
    assert await pending(first) == mine[0] | mine[1]
    second.store.nodes._scope_until = 0
    await second.store.deliveries.cancel([])


async def test_deliveries_that_were_held_for_too_long_expire_by_shard_with_one_warning(sharers):
    first, second = sharers
    ours, theirs = await fill_both(sharers)
    await first.store.database.fetch("UPDATE owed SET next_attempt_at = 1, created_at = 1")
    await first.store.database.fetch("INSERT INTO held (destination, since) VALUES ('crm', 1), ('crm/7', 1)")
    for node in sharers:
        await node.store.deliveries.expire_held(node.mine, 10 * SECOND)
        stored = {name for (name,) in await node.store.database.fetch("SELECT destination FROM held")}
        assert stored >= node.mine
        assert not stored & {"crm", "crm/7"}
    await first.store.database.fetch("UPDATE held SET since = 1")
    assert await first.store.deliveries.expire_held(first.mine, 10 * SECOND) == len(ours)
    assert await pending(first) == theirs
    assert await second.store.deliveries.expire_held(second.mine, 10 * SECOND) == len(theirs)
    [(warnings,)] = await first.store.database.fetch(
        "SELECT count(*) FROM events WHERE type = 'relay.deliveries.expiring'"
    )
    assert warnings == 1
    await second.store.deliveries.expire_held((), 10 * SECOND)
    assert [name for (name,) in await first.store.database.fetch("SELECT destination FROM held")] == list(
        first.mine
    )


async def test_two_nodes_that_warn_of_expiry_at_the_same_moment_warn_once(sharers):
    first, second = sharers
    await fill_both(sharers)
    for node in sharers:
        await node.store.deliveries.expire_held(node.mine, 1000 * SECOND)
    due = CLOCK.steady() - 600 * SECOND
    await first.store.database.fetch("UPDATE owed SET next_attempt_at = $1", due)
    await first.store.database.fetch("UPDATE held SET since = $1", due)
    written, allowed = hold_commits(first)
    warnings = [asyncio.ensure_future(first.store.deliveries.expire_held(first.mine, 1000 * SECOND))]
    await asyncio.wait_for(written.wait(), 30)
    warnings.append(asyncio.ensure_future(second.store.deliveries.expire_held(second.mine, 1000 * SECOND)))
    await waits_or_ends(second, warnings[1])
    allowed.set()
    assert await asyncio.gather(*warnings) == [0, 0]
    sql = "SELECT count(*) FROM events WHERE type = 'relay.deliveries.expiring'"
    assert await first.store.database.value(sql) == 1
    assert await first.store.database.value("SELECT bool_and(warned) FROM held")


async def test_only_the_keeper_changes_the_state_of_the_destination(sharers):
    first, second = sharers
    await first.store.deliveries.set_destination(DestinationState(name="crm", paused=True))
    with pytest.raises(StorageError, match="another node delivers to it now"):
        await second.store.deliveries.set_destination(DestinationState(name="crm"))
    assert (await second.store.queries.destination_states())["crm"].paused


async def test_deliveries_of_a_former_config_get_slots_from_the_keeper(sharers):
    first, second = sharers
    second.route = second.store._committer._route = lambda event: (Target("crm"),)
    await second.send()
    first.store.nodes._assigned.clear()
    async with asyncio.timeout(30):
        while (await first.store.database.value("SELECT slot FROM owed")) is None:
            await first.renew()
            await asyncio.sleep(0.05)
    claimed = [each for node in sharers for each in await node.claim()]
    assert len(claimed) == 1
