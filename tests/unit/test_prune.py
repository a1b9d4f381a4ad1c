"""Retention deletes finished data that is old enough, in transactions that do not delay senders."""

import asyncio
import re
from functools import partial

import pytest
from stores import accept, call_writer, check_rows, hooks, ids, make_store, only_sqlite, set_pragma
from stores import rows as read_rows

from relay.base.clock import SECOND
from relay.config.schema import Retention, SourceRetention
from relay.model import Attempt, Command, Outcome, Target
from relay.store import pruning
from relay.store.retention_policy import Policy
from relay.store.sqlite import event_times, prune
from relay.store.sqlite.queries import EVENT_PATHS, TYPES_SQL

DAY = 86_400.0
POLICY = Policy(Retention())


@pytest.fixture
async def store(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(pruning, "LONGEST_PAUSE", 0)
    store = make_store(tmp_path / "relay.db", clock, durability="normal")
    hooks(store).route = lambda event: () if event.source == "relay" else (Target("crm"),)
    store.fresh, store.sent = [], []

    def listen(news):
        store.fresh.extend(news.deliveries)
        store.sent.extend(event.id for event in news.events)

    hooks(store).listener = listen
    await store.open()
    yield store
    for name, counts in (await store.ledger.audit()).items():
        assert counts.unaccounted == 0, name
    await check_rows(store)
    await store.close()


async def send(store, clock, state="delivered", **fields):
    """Append an event whose delivery gets a state."""
    await store.events.append(accept(clock, **fields))
    if state != "pending":
        attempt = Attempt(started_at=clock.wall(), duration_ms=1.0, result="ok", answer=b"x")
        await store.deliveries.settle(Outcome(delivery=store.fresh[-1], attempt=attempt, state=state))
    return store.fresh[-1].event_id


async def rows(store, table):
    [(count,)] = await read_rows(store, f"SELECT count(*) FROM {table}")
    return count


async def left(store):
    """Return the numbers, from 1, of the events that are still stored, in the order of acceptance."""
    return [store.sent.index(id_) + 1 for id_ in await ids(store)]


async def test_an_old_event_is_deleted_with_its_deliveries_and_attempts(store, clock):
    await send(store, clock)
    clock.advance(14 * DAY - 1)
    await send(store, clock)
    assert (await store.upkeep.prune(POLICY)).events == 0
    clock.advance(1)
    assert (await store.upkeep.prune(POLICY)).events == 1
    assert await left(store) == [2]
    assert (await rows(store, "deliveries"), await rows(store, "attempts")) == (1, 1)
    assert (await store.ledger.audit())["crm"].delivered == 2


async def test_an_event_with_a_pending_delivery_stays_until_an_hour_after_its_end(store, clock):
    await send(store, clock, "pending")
    delivery = store.fresh[-1]
    clock.advance(100 * DAY)
    assert (await store.upkeep.prune(POLICY)).events == 0
    await store.deliveries.settle(Outcome(delivery=delivery, attempt=None, state="delivered"))
    clock.advance(3600)
    assert (await store.upkeep.prune(POLICY)).events == 1


async def test_a_dead_delivery_keeps_its_event_longer(store, clock):
    clock.advance(1)
    await store.events.append(accept(clock))
    clock.advance(20 * DAY)
    await store.deliveries.settle(
        Outcome(delivery=store.fresh[-1], attempt=None, state="dead", reason="exhausted")
    )
    clock.advance(30 * DAY - 1)
    await store.upkeep.prune(POLICY)
    assert await left(store) == [1]  # the operator event about the dead delivery is deleted
    clock.advance(3601)
    await store.upkeep.prune(POLICY)
    assert await left(store) == []


async def test_sources_and_types_have_their_own_retention(store, clock):
    rules = {
        "wa": SourceRetention(events=7 * DAY, types={"qr_*": 3600.0, "audit": 100 * DAY}),
        "bank": SourceRetention(events=50 * DAY),
    }
    policy = Policy(Retention(), rules)
    for full_type in ("shop.order", "wa.qr_ready", "wa.message", "wa.audit", "bank.paid", "wa.qr_ready"):
        await send(store, clock, type=full_type)
    found = []
    for seconds in (3600, 6 * DAY, DAY, 7 * DAY, 36 * DAY, 50 * DAY):
        clock.advance(seconds)
        await store.upkeep.prune(policy)
        found.append(await left(store))
    assert found == [[1, 3, 4, 5], [1, 3, 4, 5], [1, 4, 5], [4, 5], [4], []]


async def test_a_dead_delivery_does_not_extend_the_retention_of_a_type(store, clock):
    await send(store, clock, "dead", type="wa.qr_ready")
    clock.advance(3600)
    policy = Policy(Retention(), {"wa": SourceRetention(types={"qr_ready": 3600.0})})
    assert (await store.upkeep.prune(policy)).events == 1


async def test_an_event_that_is_repeated_before_its_deletion_stays(store, clock):
    number = await send(store, clock)
    clock.advance(15 * DAY)
    candidate = pruning.Candidate(number, 1, clock.wall() - 30 * 86_400 * SECOND)
    [loaded] = (await store.events.load([number])).values()
    assert await store.deliveries.repeat([(loaded, Target("crm"))]) == (True,)
    assert await call_writer(store, partial(store.upkeep._retention._delete_events, [candidate])) == 0
    assert await left(store) == [1]


async def test_a_clock_that_jumps_ahead_makes_nothing_old(store, clock, monkeypatch):
    await send(store, clock, key="k")
    monkeypatch.setattr(clock, "wall", lambda: clock.now + 200 * 365 * 86_400 * SECOND)
    assert (await store.upkeep.prune(POLICY)).events == 0


@only_sqlite("row ids without the time")
async def test_events_from_the_future_do_not_keep_other_events(store, clock, monkeypatch):
    await send(store, clock)
    with monkeypatch.context() as ahead:
        ahead.setattr(clock, "wall", lambda: clock.now + 200 * 365 * 86_400 * SECOND)
        await send(store, clock)
    await send(store, clock)
    clock.advance(15 * DAY)
    await send(store, clock)
    await store.upkeep.prune(POLICY)
    assert await left(store) == [2, 4]


async def test_attempts_keys_and_counts_have_their_own_retention(store, clock):
    await send(store, clock, "pending", key="k")
    delivery = store.fresh[-1]
    for _ in range(3):
        attempt = Attempt(started_at=clock.wall(), duration_ms=1.0, result="5xx")
        await store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state="pending"))
        clock.advance(7 * DAY)
    pruned = await store.upkeep.prune(POLICY)
    assert (pruned.events, pruned.attempts, pruned.keys, pruned.stats) == (0, 1, 1, 0)
    clock.advance(400 * DAY)
    pruned = await store.upkeep.prune(POLICY)
    assert (pruned.attempts, pruned.stats) == (2, 1)
    assert [await rows(store, name) for name in ("events", "attempts", "dedupe", "stats")] == [1, 0, 0, 0]


@only_sqlite("the times of its blocks of events")
async def test_times_and_repetitions_are_deleted_with_their_events(store, clock, monkeypatch):
    monkeypatch.setattr(event_times, "SHIFT", 0)
    monkeypatch.setattr(prune, "FORGET_SQL", event_times.FORGET_SQL.replace("10", "0"))
    await send(store, clock, key="k")
    await store.events.append(accept(clock, key="k"))
    clock.advance(15 * DAY)
    await send(store, clock)
    assert (await rows(store, "event_times"), await rows(store, "repetitions")) == (2, 1)
    assert (await store.upkeep.prune(POLICY)).events == 1
    assert (await rows(store, "event_times"), await rows(store, "repetitions")) == (1, 0)


async def test_counts_outlive_their_events(store, clock):
    await send(store, clock)
    clock.advance(20 * DAY)
    await store.upkeep.prune(POLICY)
    assert (await rows(store, "events"), await rows(store, "stats")) == (0, 1)


@only_sqlite("transactions of its retention")
async def test_many_events_are_deleted_in_small_transactions_between_those_of_senders(store, clock):
    for size, count in ((2, 3000), (2, 2850), (20_000, 150)):
        await asyncio.gather(*(store.events.append(accept(clock, body=b"x" * size)) for _ in range(count)))
    done = [Outcome(delivery=delivery, attempt=None, state="delivered") for delivery in store.fresh]
    await asyncio.gather(*map(store.deliveries.settle, done))
    clock.advance(15 * DAY)
    order, changes, errand = [], [], store.database.writer.call

    async def watched(work):
        before = store.database.connection.total_changes
        result = await errand(work)
        changes.append(store.database.connection.total_changes - before)
        order.append("pruned")
        return result

    await store._file_watch.stop()  # its transactions are not counted here
    store.database.writer.call = watched

    async def senders():
        while order.count("pruned") < 15:
            await store.events.append(accept(clock, type="till.paid"))
            order.append("sent")

    pruned, _ = await asyncio.gather(store.upkeep.prune(POLICY), senders())
    assert (pruned.events, pruned.done) == (6000, True)
    assert max(changes) <= pruning.COST + pruning.PAGE  # rows, with those of the sender in between
    while_both = "".join(each[0] for each in order).rstrip("p")
    assert while_both.count("p") >= 15
    assert "pp" not in while_both
    assert (await store.ledger.audit())["crm"].delivered == 6000


def test_each_page_of_a_body_costs_as_much_as_a_row():
    candidates = [
        pruning.Candidate(number, cost, 0) for number, cost in enumerate([600, 500, 400, 100, 5000, 1])
    ]
    assert [[each.id for each in some] for some in pruning.deletions(candidates)] == [
        [0],
        [1, 2, 3],
        [4],
        [5],
    ]


async def test_a_pass_ends_in_time_and_the_next_one_continues(store, clock):
    await asyncio.gather(*(store.events.append(accept(clock, type="relay.x")) for _ in range(1_200)))
    clock.advance(15 * DAY)
    found = []
    while not found or not found[-1].done:
        found.append(await store.upkeep.prune(POLICY, seconds=-1.0))
        assert len(found) < 10
    assert [each.events for each in found] == [500, 500, 200]
    assert await left(store) == []


@only_sqlite("cursors of its retention")
async def test_kept_events_are_not_read_again_until_the_next_round(store, clock, monkeypatch):
    for _ in range(10):
        await send(store, clock, "pending")
    clock.advance(15 * DAY)
    candidates_read = []
    read = store.database.reader.execute_fetchall

    async def watched(sql, values=()):
        found = list(await read(sql, values))
        candidates_read.extend(found if "e.received_at" in sql else [])
        return found

    monkeypatch.setattr(store.database.reader, "execute_fetchall", watched)
    for _ in range(3):
        await store.upkeep.prune(POLICY)
    assert len(candidates_read) == 10
    clock.advance(3600)
    await store.upkeep.prune(POLICY)
    assert len(candidates_read) == 20


@only_sqlite("transactions of its retention")
async def test_ended_commands_are_deleted_some_at_a_time(store, clock, monkeypatch):
    monkeypatch.setattr("relay.store.sqlite.upkeep.PRUNE_AT_ONCE", 2)
    for number in range(4):
        state = "queued" if number == 1 else "sent"
        command = Command(
            public_id=f"cmd_{number}", source="wa", worker_id="w", body={"type": "restart"},
            created_at=clock.wall(), expires_at=clock.steady() + 2**50, state=state,
        )  # fmt: skip
        await store.workers.change(lambda fleet, command=command: fleet.queue(command))
        clock.advance(1)
    before = clock.wall()
    assert [await store.upkeep.prune_worker_commands(before) for _ in range(3)] == [2, 1, 0]
    assert [row["id"] for row in await store.queries.find("worker_commands")] == ["cmd_1"]


@only_sqlite("pages of its file")
async def test_free_pages_are_returned_when_they_are_a_tenth_of_the_file(store, clock):
    await asyncio.gather(*(store.events.append(accept(clock, body=b"x" * 50_000)) for _ in range(300)))
    size = store.path.stat().st_size
    for delivery in store.fresh:
        await store.deliveries.settle(Outcome(delivery=delivery, attempt=None, state="delivered"))
    clock.advance(15 * DAY)
    pruned = await store.upkeep.prune(POLICY)
    assert pruned.events == 300
    assert pruned.pages > 3000
    await set_pragma(store, "wal_checkpoint(TRUNCATE)")
    assert store.path.stat().st_size < size / 5


@only_sqlite("pages of its file")
async def test_deleted_bodies_are_overwritten(store, clock):
    for number in range(20):
        await send(store, clock, body=b"a secret %d" % number)
    await set_pragma(store, "wal_checkpoint(TRUNCATE)")
    assert b"a secret" in store.path.read_bytes()
    clock.advance(15 * DAY)
    await store.upkeep.prune(POLICY)
    await set_pragma(store, "wal_checkpoint(TRUNCATE)")
    assert b"a secret" not in store.path.read_bytes()


def page_sql(kind):
    return prune.PAGE_SQL.format(candidates=EVENT_PATHS[kind].sql(newest_first=False))


STATEMENTS = {
    "all": (page_sql("all"), (9, 1, 9)),
    "source": (page_sql("source"), ("a", 9, 1, 9)),
    "type": (page_sql("type"), ("a", 9, 1, 9)),
    "types": (TYPES_SQL, {"first": "a.", "end": "a/", "most": 9}),
    "last": (prune.LAST_SQL, (1,)),
    "deletable": (prune.DELETABLE_SQL.format(values="(?, ?)"), (1, 1)),
    **{f"delete {number}": (sql.format(values="(?)"), (1,)) for number, sql in enumerate(prune.DELETE_SQL)},
    **{name: (sql, (1, 1)) for name, (sql, _) in prune.ROWS_SQL.items()},
}


@pytest.mark.parametrize("name", STATEMENTS)
@only_sqlite("plans of its statements")
async def test_no_statement_of_retention_scans_a_table(store, name):
    sql, values = STATEMENTS[name]
    plan = await store.database.connection.execute_fetchall(f"EXPLAIN QUERY PLAN {sql}", values)
    allowed = r"SCAN (candidate|deletable|found|c|\d+ CONSTANT ROWS?|\(subquery-\d+\)|CONSTANT ROW)\b.*"
    steps = [row[3] for row in plan]
    assert any("SEARCH" in step for step in steps)
    wrong = [step for step in steps if step.startswith("SCAN") and not re.fullmatch(allowed, step)]
    assert wrong == []
