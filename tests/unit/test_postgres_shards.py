"""Deliveries of shards in PostgreSQL: claims read only the deliveries of some slots."""

import pytest
from postgres import needs_postgres
from postgres_stores import emptied
from stores import accept, check_rows, hooks, make_store, rows

from relay.base.clock import SECOND
from relay.base.shards import Shards, slot_of
from relay.model import Attempt, Grouping, Outcome, Target
from relay.store.postgres.shards import ASSIGN_SQL, due_sql, next_sql

pytestmark = needs_postgres


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
