"""One PostgreSQL database for two nodes: only the owner of a lane sends and ends its deliveries."""

import asyncio
import itertools
from contextlib import suppress
from functools import partial
from unittest.mock import patch

import asyncpg
import msgspec
import pytest
from postgres import needs_postgres, not_pooled
from postgres_stores import FAULTS_SQL, emptied, listen_url_of, url_of
from support import until

from relay.base.clock import SECOND, SystemClock
from relay.delivery.attempt import overdue
from relay.errors import AlreadyRetried, StorageError
from relay.model import Attempt, DestinationState, GeneratedEvent, Outcome, Target
from relay.store import opening
from relay.store.postgres import backlog, transaction, transitions
from relay.store.postgres.clock import ServerClock
from relay.store.postgres.connection import SHORT, code_of
from relay.store.postgres.deliveries import OVERLAP_EVERY
from relay.store.postgres.events import delete_events as expunge_events
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.prune import delete_events
from relay.store.postgres.rows import micros_of
from relay.store.postgres.writer import PostgresWriter
from relay.store.pruning import Candidate

pytest.importorskip("asyncpg")

from stores import accept, make_event, watch_statements

CLOCK = SystemClock()
NAMES = ("crm", "erp")


class Attendant:
    def __init__(self):
        self.woken = set()

    def wake(self, lanes, *, retries=False):
        self.woken |= {(name, retries) for name in lanes or ("all",)}

    def renew_soon(self):
        pass

    async def answer(self, lane, verb, argument):
        raise StorageError("not in this test")


class Node:
    """A store of a cluster whose ownership the test decides."""

    def __init__(self, url, folder, name, clock=CLOCK):
        self.fresh, self.woken, self.attendant = [], set(), Attendant()
        self.options = {"crm": {}, "erp": {}}
        folder.mkdir(exist_ok=True)
        self.store = opening.make_store(
            url,
            folder,
            clock,
            route=self.route,
            listeners=[self.listen],
            node=name,
            cluster=30.0,
            listen_url=listen_url_of(url),
        )

    def route(self, event):
        return () if event.source == "relay" else tuple(Target(name, **self.options[name]) for name in NAMES)

    def listen(self, news):
        self.fresh += news.deliveries
        self.woken |= news.woken

    async def open(self):
        await self.store.open()
        self.store.nodes.attend(self.attendant)

    async def own(self, *names):
        """Own exactly these lanes."""
        owned = self.store.nodes.owned
        await self.store.nodes.give([name for name in owned if name not in names])
        async with asyncio.timeout(60):
            while set((await self.store.nodes.own(dict.fromkeys(names, 5.0), ())).until) != set(names):
                await self.store.nodes._fetch(  # a free lease may be due to the other node: it is neglected
                    "UPDATE leases SET until = clock_timestamp() - interval '1 minute'"
                    " WHERE until <= clock_timestamp()"
                )

    async def send(self, **fields):
        return (await self.store.events.append(accept(CLOCK, **fields))).event_id

    async def claim(self, name, limit=10):
        return (await self.store.deliveries.claim(name, limit, retries=False)).deliveries

    async def settle(self, delivery, state="delivered"):
        attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="ok", status=200)
        return await self.store.deliveries.settle(Outcome(delivery=delivery, attempt=attempt, state=state))


def hold_commits(node):
    """Let the transactions of a node wait before they commit.

    Returns two events: the first is set when one has written its rows, the second lets it commit.
    """
    writer = node.store.database.writer
    make, written, allowed = writer._transaction, asyncio.Event(), asyncio.Event()

    def held():
        transaction = make()
        commit = transaction.commit

        async def wait_and_commit():
            await transaction.run()
            written.set()
            await allowed.wait()
            await commit()

        transaction.commit = wait_and_commit
        return transaction

    writer._transaction = held
    return written, allowed


async def waits_or_ends(node, task):
    """Wait until a statement in the node's database waits for a lock, or the task has ended."""
    sql = """
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    async with asyncio.timeout(30):
        while not (task.done() or await node.store.database.value(sql)):  # noqa: ASYNC110 - the server knows
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def emptied_databases():
    with emptied():
        yield


@pytest.fixture
async def nodes(tmp_path):
    url = url_of(tmp_path, CLOCK)
    nodes = [Node(url, tmp_path / name, name) for name in ("a", "b")]
    for node in nodes:
        await node.open()
    await nodes[0].own("crm")
    await nodes[1].own("erp")
    await until(lambda: all(node.store.nodes._wake_ups.arrives for node in nodes))
    yield nodes
    for name, counts in (await nodes[0].store.ledger.audit()).items():
        assert counts.unaccounted == 0, name
    for node in nodes:
        await node.store.close()


async def states(node):
    rows = await node.store.queries.find("deliveries", limit=100)
    return {(row["destination"], row["state"], row["reason"]) for row in rows}


@needs_postgres
async def test_a_node_claims_for_its_own_lanes_and_wakes_the_others(nodes):
    first, second = nodes
    await first.send()
    assert [each.destination for each in first.fresh] == ["crm"]
    await until(lambda: second.attendant.woken == {("erp", False)})
    [delivery] = await second.claim("erp")
    assert await second.settle(delivery)
    assert await first.settle(first.fresh[0])


@needs_postgres
async def test_each_node_has_its_own_row_ids(nodes):
    first, second = nodes
    await asyncio.gather(*(node.send() for node in nodes for _ in range(5)))
    rows = await first.store.queries.find("events", limit=100)
    slots = {int(row["id"]) & 255 for row in rows if isinstance(row["id"], int)}
    assert len(rows) == 10
    assert {first.store.nodes.slot, second.store.nodes.slot} == {0, 1}
    assert slots <= {0, 1}


class Behind(SystemClock):
    """The clock of a machine that is five minutes behind."""

    def wall(self):
        return super().wall() - 300 * SECOND

    def steady(self):
        return super().steady() - 300 * SECOND


@needs_postgres
async def test_the_times_of_a_node_whose_clock_is_wrong_are_those_of_the_server(nodes, tmp_path):
    """Row ids contain the time, and deliveries of an order key follow them."""
    behind = Node(url_of(tmp_path, CLOCK), tmp_path / "c", "c", ServerClock(Behind()))
    await behind.open()
    try:
        for node in (nodes[0], behind, nodes[1], behind):
            await node.send()
    finally:
        await behind.store.close()
    for id_, received_at in await nodes[0].store.database.fetch("SELECT id, received_at FROM events"):
        assert abs(micros_of(id_) - CLOCK.wall()) < 60 * SECOND
        assert abs(received_at - CLOCK.wall()) < 60 * SECOND


@needs_postgres
async def test_two_requests_with_one_key_at_two_nodes_are_one_event(nodes):
    for number in range(5):
        ids = await asyncio.gather(*(node.send(key=f"k{number}", subject="s") for node in nodes))
        assert len(set(ids)) == 1
    assert len(await nodes[0].store.queries.find("events", limit=100)) == 5


@needs_postgres
async def test_two_retries_of_one_refused_request_at_two_nodes_are_one_event(nodes):
    acceptances = [msgspec.structs.replace(accept(CLOCK), retry_of="ref_1") for _ in nodes]
    written, allowed = hold_commits(nodes[0])
    retries = [asyncio.ensure_future(nodes[0].store.events.append(acceptances[0]))]
    await asyncio.wait_for(written.wait(), 30)
    retries.append(asyncio.ensure_future(nodes[1].store.events.append(acceptances[1])))
    await waits_or_ends(nodes[0], retries[1])
    allowed.set()
    receipt, error = await asyncio.gather(*retries, return_exceptions=True)
    assert isinstance(error, AlreadyRetried)
    assert error.event_id == receipt.event_id
    assert len(await nodes[0].store.queries.find("events", limit=100)) == 1


@needs_postgres
async def test_the_outcome_of_a_frozen_node_does_not_count(nodes):
    first, second = nodes
    await first.send()
    [held] = first.fresh
    assert first.store.deliveries.begin_attempt(held.id)
    await first.own()  # its lease has ended
    await second.own("crm", "erp")
    [again] = await second.claim("crm")
    assert again.id == held.id
    assert await second.settle(again)
    assert not await first.settle(held)
    [counts] = [each for name, each in (await first.store.ledger.totals()).items() if name == "crm"]
    assert (counts.created, counts.delivered, counts.pending) == (1, 1, 0)


@needs_postgres
@pytest.mark.parametrize("state", ["pending", "dead"])
async def test_a_late_failure_does_not_count_while_the_new_owner_sends(nodes, state):
    first, second = nodes
    await first.send()
    [held] = first.fresh
    assert first.store.deliveries.begin_attempt(held.id)
    await first.own()  # it is frozen during the attempt, and its lease ends
    await second.own("crm", "erp")
    [again] = await second.claim("crm")
    assert second.store.deliveries.begin_attempt(again.id)
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="timeout")
    due = CLOCK.steady() if state == "pending" else None
    late = Outcome(delivery=held, attempt=attempt, state=state, next_attempt_at=due)
    assert not await first.store.deliveries.settle(late)
    assert await second.settle(again)
    assert ("crm", "delivered", None) in await states(first)
    assert len(await first.store.queries.find("attempts", delivery_id=again.public_id)) == 2


@needs_postgres
@pytest.mark.parametrize("is_owned", [True, False])
async def test_a_failure_counts_while_no_other_node_owns_the_lane(nodes, is_owned):
    first, _ = nodes
    await first.send()
    [held] = first.fresh
    if not is_owned:
        await first.own()  # as after an outage of the database
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="timeout")
    failure = Outcome(delivery=held, attempt=attempt, state="pending", next_attempt_at=CLOCK.steady())
    assert await first.store.deliveries.settle(failure)


@needs_postgres
@pytest.mark.parametrize("is_group", [False, True], ids=["one", "group"])
@pytest.mark.parametrize("is_deleted", [False, True], ids=["stored", "deleted"])
async def test_a_late_attempt_stays_only_if_its_event_does(nodes, is_deleted, is_group):
    first, second = nodes
    await first.send()
    [held] = first.fresh
    assert first.store.deliveries.begin_attempt(held.id)
    await first.own()  # it is frozen during the attempt, and its lease ends
    await second.own("crm", "erp")
    for name in NAMES:
        for delivery in await second.claim(name):
            assert await second.settle(delivery)
    if is_deleted:
        expunged = await second.store.events.expunge([held.event_id])
        assert expunged.events == 1
    if is_group:
        attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="ok", status=200, group_id="g")
        outcome = Outcome(delivery=held, attempt=attempt, state="delivered")
        assert await first.store.deliveries.settle_group([outcome], split=False) == frozenset()
    else:
        assert not await first.settle(held)
    attempts = await first.store.database.fetch("SELECT 1 FROM attempts WHERE delivery_id = $1", held.id)
    assert len(attempts) == (0 if is_deleted else 2)
    assert await first.store.database.fetch(FAULTS_SQL) == []


@needs_postgres
@pytest.mark.parametrize("is_retention", [False, True], ids=["operator", "retention"])
async def test_an_attempt_that_is_stored_while_its_event_is_deleted_does_not_stay(nodes, is_retention):
    first, second = nodes
    await first.send()
    [held] = first.fresh
    await first.own()
    await second.own("crm", "erp")
    for name in NAMES:
        for delivery in await second.claim(name):
            assert await second.settle(delivery)
    locked, allowed = asyncio.Event(), asyncio.Event()

    async def delete(connection):
        """Delete the event; wait after its rows are deleted, before the commit."""
        execute = connection.execute

        async def wait_before_commit(sql, *values):
            if sql == "COMMIT":
                locked.set()
                await allowed.wait()
            return await execute(sql, *values)

        with patch.object(connection, "execute", wait_before_commit):
            if is_retention:
                return await delete_events([Candidate(held.event_id, cost=0, dead=0)], connection)
            return len(await expunge_events(connection, [held.event_id]))

    deleting = asyncio.ensure_future(second.store.database.writer.call(delete))
    await asyncio.wait_for(locked.wait(), 30)
    settling = asyncio.ensure_future(first.settle(held))
    await waits_or_ends(first, settling)
    assert await first.store.database.fetch("SELECT 1 FROM attempts WHERE delivery_id = $1", held.id)
    allowed.set()
    assert await deleting == 1
    assert not await settling
    assert await first.store.database.fetch(FAULTS_SQL) == []


@needs_postgres
async def test_a_frozen_node_ends_nothing_and_changes_no_state_of_a_lane_that_it_has_lost(nodes):
    first, second = nodes
    first.options["crm"] = {"ttl": 1}
    await first.send()
    scope = first.store.nodes.scope
    await first.own()
    await second.own("crm", "erp")
    await second.store.deliveries.set_destination(DestinationState(name="crm", paused=True))
    with pytest.raises(StorageError, match="another node delivers to it now"):
        await first.store.deliveries.set_destination(DestinationState(name="crm"))
    with patch.object(PostgresNodes, "scope", scope):  # frozen after it has begun a transaction
        await first.store.deliveries.set_destination(DestinationState(name="crm"))
        assert await first.store.deliveries.expire() == 0
    assert (await first.store.queries.destination_states())["crm"].paused
    assert await second.store.deliveries.expire() == 1


@needs_postgres
async def test_a_change_that_two_owners_report_after_each_other_is_one_event(nodes):
    """The first one has lost the lane during its commit; the second one has not seen its report."""
    first, second = nodes
    opened = DestinationState(name="crm", circuit_opened="HTTP 500")
    event = GeneratedEvent(type="destination.circuit_opened", subject="crm", data={})
    written, allowed = hold_commits(first)
    reports = [asyncio.ensure_future(first.store.deliveries.set_destination(opened, event))]
    await asyncio.wait_for(written.wait(), 30)
    scope = first.store.nodes.scope
    await first.own()
    await second.own("crm", "erp")
    reports.append(asyncio.ensure_future(second.store.deliveries.set_destination(opened, event)))
    await waits_or_ends(second, reports[1])
    allowed.set()
    await asyncio.gather(*reports)
    with patch.object(PostgresNodes, "scope", scope):  # frozen after it has begun another report
        await first.store.deliveries.set_destination(DestinationState(name="crm"), event)
    assert (await second.store.queries.destination_states())["crm"] == opened
    assert len(await second.store.queries.find("events", source="relay")) == 1


@pytest.mark.parametrize("seconds", [0, 2, 10])
@needs_postgres
async def test_deliveries_of_a_commit_that_took_some_time_are_claimed_at_once(nodes, seconds):
    """They are due before the time at which the owner's claims continue."""
    first, second = nodes
    written, allowed = hold_commits(first)
    sending = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    with patch.object(CLOCK, "steady", lambda: SystemClock.steady(CLOCK) + seconds * SECOND):
        assert await second.claim("erp") == ()
        allowed.set()
        await sending
        await until(lambda: ("erp", False) in second.attendant.woken)
        assert len(await second.claim("erp")) == 1


@needs_postgres
async def test_deliveries_that_are_announced_during_a_claim_are_found_by_the_next_one(nodes):
    first, second = nodes
    written, committed = hold_commits(first)
    sending = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    connection = second.store.database.writer.connection
    fetch, fetched, ended = connection.fetch, asyncio.Event(), asyncio.Event()

    async def fetch_and_wait(*args):
        rows = await fetch(*args)
        fetched.set()
        await ended.wait()
        return rows

    with patch.object(connection, "fetch", fetch_and_wait):
        claiming = asyncio.ensure_future(second.claim("erp"))
        await asyncio.wait_for(fetched.wait(), 30)
        committed.set()
        await sending
        await until(lambda: ("erp", False) in second.attendant.woken)
        ended.set()
        assert await claiming == ()
    assert len(await second.claim("erp")) == 1


@needs_postgres
async def test_a_claim_without_a_look_back_asks_for_another_claim_soon(nodes):
    """It finds late deliveries whose announcement was lost."""
    _, second = nodes
    found = [await second.store.deliveries.claim("erp", 10, retries=False) for _ in range(2)]
    assert found[0].next_due is None
    assert 0 < found[1].next_due - CLOCK.steady() <= OVERLAP_EVERY


@needs_postgres
async def test_the_others_look_for_deliveries_that_a_killed_node_has_not_announced(nodes):
    first, second = nodes
    written, allowed = hold_commits(first)
    sending = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    await second.own("erp")
    for _ in range(2):
        assert await second.claim("erp") == ()
    with patch.object(first.store.nodes, "announce"):
        allowed.set()
        await sending
    await first.store.nodes._fetch("UPDATE nodes SET seen = seen - interval '1 minute' WHERE name = 'a'")
    await second.own("erp")
    assert second.attendant.woken == {("all", True)}
    assert len(await second.claim("erp")) == 1


@needs_postgres
async def test_a_lane_that_returns_to_a_node_is_read_from_the_beginning(nodes):
    first, second = nodes
    with patch.object(CLOCK, "steady", lambda: SystemClock.steady(CLOCK) + 10 * SECOND):
        assert await first.claim("crm") == ()
    await first.own()
    await second.own("crm", "erp")
    await second.send()
    second.store.deliveries.release(each.id for each in second.fresh)
    await second.own("erp")
    await first.own("crm")
    assert len(await first.claim("crm")) == 1


@needs_postgres
async def test_a_new_delivery_that_another_node_has_sent_before_its_commit_was_answered_is_not_sent_again(
    nodes,
):
    """The lane has moved to the other node and back meanwhile."""
    first, second = nodes
    commit, committed, allowed = PostgresWriter.commit, asyncio.Event(), asyncio.Event()

    async def commit_and_wait(writer, *args):
        await commit(writer, *args)
        if writer is first.store.database.writer and not committed.is_set():
            committed.set()
            await allowed.wait()

    with patch.object(PostgresWriter, "commit", commit_and_wait):
        sending = asyncio.ensure_future(first.send())
        await asyncio.wait_for(committed.wait(), 30)
        await first.own()
        await second.own("crm", "erp")
        [delivery] = await second.claim("crm")
        assert await second.settle(delivery)
        await second.own("erp")
        await first.own("crm")
        allowed.set()
        await sending
    assert first.fresh == []
    assert "crm" in first.woken
    assert await first.claim("crm") == ()


@needs_postgres
async def test_an_outcome_after_another_nodes_retry_does_not_count(nodes):
    first, second = nodes
    await first.send()
    [held] = first.fresh
    await first.own()
    await second.own("crm", "erp")
    [again] = await second.claim("crm")
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="5xx", status=500)
    later = CLOCK.steady() + 60 * SECOND
    outcome = Outcome(delivery=again, attempt=attempt, state="pending", next_attempt_at=later)
    assert await second.store.deliveries.settle(outcome)
    await second.own("erp")
    await first.own("crm")  # its lane has returned
    assert not await first.settle(held, state="dead")
    late = Outcome(delivery=held, attempt=attempt, state="pending", next_attempt_at=later)
    assert not await first.store.deliveries.settle(late)
    assert ("crm", "pending", None) in await states(first)


@needs_postgres
async def test_only_the_owner_expires_deliveries(nodes):
    first, second = nodes
    first.options["erp"] = {"ttl": 1}
    await first.send()
    await until(lambda: second.attendant.woken)
    assert await first.store.deliveries.expire() == 0
    assert await second.store.deliveries.expire() == 1
    assert ("erp", "expired", "ttl") in await states(first)


@needs_postgres
async def test_the_owner_expires_deliveries_that_an_event_at_another_node_supersedes(nodes):
    first, second = nodes
    first.options["erp"] = {"latest_key": "k"}
    await first.send()
    [flying] = await second.claim("erp")
    assert second.store.deliveries.begin_attempt(flying.id)
    await first.send()
    await first.send()
    assert not {state for name, state, _ in await states(first) if name == "erp"} - {"pending"}
    assert await second.store.deliveries.expire() == 1  # not the one in flight
    assert await second.settle(flying)
    [newest] = await second.claim("erp")
    assert await second.settle(newest)


@needs_postgres
async def test_a_delivery_in_flight_is_not_retried_after_its_owner_has_taken_a_newer_event(nodes):
    """Both are claimed and end before the next search for superseded deliveries."""
    first, second = nodes
    first.options["erp"] = {"latest_key": "k"}
    await first.send()
    [flying] = await second.claim("erp")
    assert second.store.deliveries.begin_attempt(flying.id)
    await first.send()
    [newer] = await second.claim("erp")
    assert await second.settle(newer)
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="5xx", status=500)
    outcome = Outcome(delivery=flying, attempt=attempt, state="pending", next_attempt_at=CLOCK.steady())
    assert await second.store.deliveries.settle(outcome)
    assert ("erp", "expired", "superseded") in await states(first)
    assert not second.store.claims._latest
    assert not second.store.claims._keys


@needs_postgres
async def test_a_cancellation_at_any_node_is_done_by_the_owner(nodes):
    first, second = nodes
    for _ in range(3):
        await first.send()
    [flying, *_] = await second.claim("erp")
    assert second.store.deliveries.begin_attempt(flying.id)
    rows = await first.store.database.fetch("SELECT id FROM owed")
    done = await first.store.deliveries.cancel([row["id"] for row in rows])
    assert (done.ended, done.in_flight) == (5, 1)
    assert await second.settle(flying, state="dead")
    assert {state for _, state, _ in await states(first)} == {"cancelled"}


@needs_postgres
async def test_a_cancellation_during_an_attempt_survives_its_owner(nodes):
    first, second = nodes
    for _ in range(2):
        await first.send()
    for held in first.fresh:
        assert first.store.deliveries.begin_attempt(held.id)
    done = await second.store.deliveries.cancel([first.fresh[0].id])
    assert (done.ended, done.in_flight) == (0, 1)
    assert await second.store.deliveries.expire() == 0  # it belongs to the owner
    await first.own()  # it is killed
    await second.own("crm", "erp")
    claimed = await second.claim("crm")
    assert [overdue(each, CLOCK.steady()) is not None for each in claimed] == [True, False]
    second.store.deliveries.release([each.id for each in claimed])
    assert await second.store.deliveries.expire() == 1  # also while the destination is held
    assert ("crm", "cancelled", "operator") in await states(second)
    assert not await first.settle(first.fresh[0])


@needs_postgres
async def test_retries_that_an_operator_makes_due_wake_the_owner(nodes):
    first, second = nodes
    await first.send()
    [delivery] = await second.claim("erp")
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="5xx", status=500)
    later = CLOCK.steady() + 600 * SECOND
    await second.store.deliveries.settle(
        Outcome(delivery=delivery, attempt=attempt, state="pending", next_attempt_at=later)
    )
    assert await first.store.deliveries.make_due([delivery.id]) == 1
    await until(lambda: ("erp", True) in second.attendant.woken)


@needs_postgres
async def test_an_ordered_key_is_woken_at_the_node_that_owns_its_lane(nodes):
    first, second = nodes
    for node in nodes:
        node.options["erp"] = {"order_key": "k"}
    await first.send()
    await second.send()
    second.attendant.woken.clear()
    [head] = await second.claim("erp")
    assert await second.settle(head)
    [follower] = await second.claim("erp")
    await first.send()
    assert await second.claim("erp") == ()
    assert await second.settle(follower)
    assert len(await second.claim("erp")) == 1


@needs_postgres
@pytest.mark.parametrize("is_end_first", [False, True], ids=["insert-first", "end-first"])
async def test_no_delivery_is_stuck_behind_one_that_ends_at_another_node(nodes, is_end_first):
    """Neither transaction sees the rows of the other, so the second one must wait for the first."""
    first, second = nodes
    for node in nodes:
        node.options["erp"] = {"order_key": "k"}
    await first.send()
    [head] = await second.claim("erp")
    written, allowed = hold_commits(second if is_end_first else first)
    steps = [first.send, lambda: second.settle(head)]
    if is_end_first:
        steps.reverse()
    before = asyncio.ensure_future(steps[0]())
    await asyncio.wait_for(written.wait(), 30)
    after = asyncio.ensure_future(steps[1]())
    await waits_or_ends(first, after)
    allowed.set()
    await asyncio.gather(before, after)
    [follower] = await second.claim("erp")
    assert await second.settle(follower)


@pytest.fixture
def codes(monkeypatch):
    """The SQLSTATEs of failed transactions."""
    found, judge = [], PostgresWriter._judge

    async def note(writer, error):
        found.append(code_of(error))
        return await judge(writer, error)

    monkeypatch.setattr(PostgresWriter, "_judge", note)
    return found


@needs_postgres
async def test_a_node_that_is_suspended_in_a_transaction_stops_the_others_only_for_a_while(
    nodes, monkeypatch
):
    first, second = nodes
    monkeypatch.setattr(transaction, "SHORT", SHORT.replace("5000", "300"))
    for node in nodes:
        node.options["crm"] = {"order_key": "k"}
    written, allowed = hold_commits(first)
    suspended = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    sending = asyncio.ensure_future(second.send())
    await waits_or_ends(second, sending)
    assert not sending.done()  # it waits for the order key
    event_id = await asyncio.wait_for(sending, 30)
    allowed.set()
    with pytest.raises(StorageError):
        await suspended
    [row] = await second.store.queries.find("events", limit=100)
    assert row["id"] == event_id


@needs_postgres
async def test_nodes_that_end_and_add_deliveries_of_the_same_keys_do_not_deadlock(nodes, codes, monkeypatch):
    """Each ends a delivery of its own lane, and adds deliveries of the same key for both lanes."""
    for node in nodes:
        node.options = {name: {"order_key": "k"} for name in NAMES}
    await nodes[0].send()
    heads = [*nodes[0].fresh, *await nodes[1].claim("erp")]
    lock, both_have_locked, locked = transitions._lock, asyncio.Barrier(2), []

    async def lock_and_wait(transaction, changes):
        places = await lock(transaction, changes)
        if transaction not in locked:
            locked.append(transaction)
            with suppress(TimeoutError):  # usual: the other transaction waits for a key of this one
                async with asyncio.timeout(0.2):
                    await both_have_locked.wait()
        return places

    monkeypatch.setattr(transitions, "_lock", lock_and_wait)
    pairs = list(zip(nodes, heads, strict=True))
    await asyncio.gather(*(step for node, head in pairs for step in (node.settle(head), node.send())))
    assert codes == []
    assert len(locked) == 2


@needs_postgres
async def test_nodes_that_race_for_order_keys_near_a_limit_do_not_deadlock(nodes, codes):
    """Their transactions end, add and supersede deliveries of keys in all orders."""
    counters = {name: itertools.count() for name in NAMES}

    def route(event):
        numbers = {name: next(counter) for name, counter in counters.items()} if event.subject else {}
        return [
            Target(name, max_pending=20, order_key=f"{number % 4}", latest_key=f"{number * 7 % 5}")
            for name, number in numbers.items()
        ]

    async def send(node):
        for _ in range(40):
            await node.send()

    async def deliver(node, name):
        while not done.is_set():
            fresh = [each for each in node.fresh if each.destination == name]
            node.fresh.clear()
            await asyncio.gather(*map(node.settle, (*fresh, *await node.claim(name, 5))))
            await node.store.deliveries.expire()

    for node in nodes:
        node.store._committer._route = route
    done = asyncio.Event()
    delivering = [asyncio.create_task(deliver(*pair)) for pair in zip(nodes, NAMES, strict=True)]
    await asyncio.gather(*(send(node) for node in nodes for _ in range(3)))
    done.set()
    await asyncio.gather(*delivering)
    assert "40P01" not in codes
    unused_keys = """
        SELECT count(*) FROM order_keys
         WHERE (destination, order_key) NOT IN (SELECT destination, order_key FROM owed)
    """
    assert await nodes[0].store.database.value(unused_keys) == 0


@needs_postgres
async def test_a_key_at_two_nodes_and_room_that_one_takes_back_do_not_deadlock(nodes, codes):
    """Each commit locks rows of `ledger` before keys, so the second one does not hold the key yet."""
    first, second = nodes
    limit(nodes, 8)
    await second.send()  # gets room for more than one
    writer = first.store.database.writer
    fetch, taken, allowed = writer.connection.fetch, asyncio.Event(), asyncio.Event()

    async def fetch_and_wait(sql, *values, **options):
        rows = await fetch(sql, *values, **options)
        if sql == backlog.TAKE_BACK_SQL:
            taken.set()
            await allowed.wait()
        return rows

    with patch.object(writer.connection, "fetch", fetch_and_wait):
        events = [accept(CLOCK, key=key, subject="s") for key in "klmnopq"]
        sending = asyncio.ensure_future(first.store.events.append_all(events))
        await asyncio.wait_for(taken.wait(), 30)
        again = asyncio.ensure_future(second.send(key="k", subject="s"))
        await waits_or_ends(second, again)
        assert not again.done()
        allowed.set()
        assert await again == (await sending).event_id
    assert "40P01" not in codes


@needs_postgres
async def test_commits_of_two_nodes_do_not_wait_for_each_other(nodes):
    """Both count deliveries of the same destinations and events of the same type."""
    first, second = nodes
    await first.send()
    written, allowed = hold_commits(first)
    held = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    other = asyncio.ensure_future(second.send())
    await waits_or_ends(second, other)
    has_ended = other.done()
    allowed.set()
    await asyncio.gather(held, other)
    assert has_ended


@not_pooled("it hides which process of the server has a session")
@needs_postgres
async def test_a_wake_up_is_not_part_of_the_commit(nodes):
    """PostgreSQL runs commits with NOTIFY one after another, so another session sends it."""
    first, second = nodes
    senders = []
    listener = await asyncpg.connect(first.store.database.address.hosts[0].dsn)
    try:
        await listener.add_listener("relay", lambda _connection, pid, *_: senders.append(pid))
        await first.send()
        await until(lambda: ("erp", False) in second.attendant.woken)
        await listener.execute("SELECT pg_notify('relay', '')")
        await until(lambda: listener.get_server_pid() in senders)
    finally:
        await listener.close()
    writers = {node.store.database.writer.connection.pid for node in nodes}
    assert set(senders) - {listener.get_server_pid()}
    assert not writers & set(senders)


def limit(nodes, most, **options):
    for node in nodes:
        node.options["erp"] = {"max_pending": most, **options}


async def pending(node):
    return await node.store.database.value("SELECT count(*) FROM owed WHERE destination = 'erp'")


async def refused(node):
    return await node.store.database.value("SELECT count(*) FROM ends WHERE reason = 'backlog_full'")


@needs_postgres
@pytest.mark.parametrize("options", [{}, {"order_key": "k"}], ids=["plain", "ordered"])
async def test_the_backlog_limit_is_exact_for_nodes_that_race_to_it(nodes, options):
    """Never more are pending, and none is refused while there is room, also after some have ended."""
    first, second = nodes
    limit(nodes, 40, **options)
    sent = 0
    for waves in (1, 3, 8, 8, 8):
        await asyncio.gather(*(node.send() for node in nodes for _ in range(waves)))
        sent += 2 * waves
        assert (await pending(first), await refused(first)) == (min(40, sent), max(0, sent - 40))
    claimed = [each for each in second.fresh if each.destination == "erp"]
    for delivery in (*claimed, *await second.claim("erp", 40))[:25]:
        assert await second.settle(delivery)
    room = 40 - await pending(first)
    assert room == (1 if options else 25)
    await asyncio.gather(*(node.send() for node in nodes for _ in range(15)))
    assert (await pending(first), await refused(first)) == (40, sent - 40 + 30 - room)


@needs_postgres
async def test_deliveries_that_end_in_the_transaction_that_reaches_the_backlog_limit_are_counted(nodes):
    _, second = nodes
    limit([second], 10)
    await asyncio.gather(*(second.send() for _ in range(10)))
    ended = [each for each in second.fresh if each.destination == "erp"]
    steps = [step for each in ended for step in (second.settle(each), second.send())]
    assert all(await asyncio.gather(*steps))
    assert await pending(second) + await refused(second) == 10


@needs_postgres
async def test_a_node_near_the_backlog_limit_waits_for_the_others(nodes):
    first, second = nodes
    limit(nodes, 3)
    await first.send()
    await second.send()
    written, allowed = hold_commits(first)
    held = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    other = asyncio.ensure_future(second.send())
    await waits_or_ends(second, other)
    allowed.set()
    await asyncio.gather(held, other)
    assert (await pending(first), await refused(first)) == (3, 1)


@needs_postgres
async def test_room_that_a_node_does_not_use_is_taken_back_from_it(nodes):
    """The other node may be using it at that moment, or believe later that it still has it."""
    first, second = nodes
    limit(nodes, 100)
    await first.send()  # gets room for 24 more
    written, allowed = hold_commits(first)
    held = asyncio.ensure_future(first.send())
    await asyncio.wait_for(written.wait(), 30)
    others = asyncio.gather(*(second.send() for _ in range(120)))
    await waits_or_ends(second, others)
    allowed.set()
    await asyncio.gather(held, others)
    assert (await pending(first), await refused(first)) == (100, 22)
    await first.send()
    assert (await pending(first), await refused(first)) == (100, 23)


@needs_postgres
async def test_far_from_the_backlog_limit_no_commit_waits_and_each_is_one_statement(nodes):
    first, second = nodes
    limit(nodes, 1000)
    for node in nodes:
        await node.send()
    statements = await watch_statements(first.store)
    written, allowed = hold_commits(second)
    held = asyncio.ensure_future(second.send())
    await asyncio.wait_for(written.wait(), 30)
    await first.send()
    assert len([text for text in statements if "ledger" in text]) == 1
    assert not [text for text in statements if "BEGIN" in text]
    allowed.set()
    await held


@needs_postgres
async def test_a_lower_backlog_limit_holds_at_once(nodes):
    first = nodes[0]
    limit(nodes, 1000)
    await asyncio.gather(*(node.send() for node in nodes for _ in range(5)))
    limit(nodes, 12)
    await asyncio.gather(*(node.send() for node in nodes for _ in range(5)))
    assert (await pending(first), await refused(first)) == (12, 8)
    limit(nodes, 15)
    await asyncio.gather(*(node.send() for node in nodes for _ in range(5)))
    assert (await pending(first), await refused(first)) == (15, 15)


@needs_postgres
async def test_an_order_key_of_refused_deliveries_is_not_kept(nodes):
    first, _ = nodes
    limit([first], 1, order_key="a")
    await first.send()
    limit([first], 1, order_key="b")
    await first.send()
    assert await first.store.database.value("SELECT count(*) FROM order_keys") == 1


@needs_postgres
@pytest.mark.parametrize("is_retention", [False, True], ids=["operator", "retention"])
async def test_an_event_that_another_node_sends_again_is_not_deleted(nodes, is_retention):
    first, second = nodes
    await first.send()
    for node, name in zip(nodes, NAMES, strict=True):
        for delivery in {each.id: each for each in (*node.fresh, *await node.claim(name))}.values():
            assert delivery.destination != name or await node.settle(delivery)
    [(id_,)] = await first.store.database.fetch("SELECT id FROM events")
    event = (await first.store.events.load([id_]))[id_]
    written, allowed = hold_commits(first)
    repeating = asyncio.ensure_future(first.store.deliveries.repeat([(event, Target("crm"))]))
    await asyncio.wait_for(written.wait(), 30)
    if is_retention:
        delete = partial(delete_events, [Candidate(id_, cost=0, dead=0)])
        deleting = asyncio.ensure_future(second.store.database.writer.call(delete))
    else:
        deleting = asyncio.ensure_future(second.store.events.expunge([id_]))
    await waits_or_ends(second, deleting)
    allowed.set()
    await asyncio.gather(repeating, deleting)
    assert await first.store.events.load([id_])
    assert await first.store.database.value("SELECT count(*) FROM owed") == 1


@needs_postgres
async def test_two_nodes_that_import_the_same_event_store_it_once(nodes):
    first, second = nodes
    written, allowed = hold_commits(first)
    event = make_event(CLOCK)
    importing = asyncio.ensure_future(first.store.events.restore([event]))
    await asyncio.wait_for(written.wait(), 30)
    other = asyncio.ensure_future(second.store.events.restore([event]))
    await waits_or_ends(second, other)
    allowed.set()
    assert await asyncio.gather(importing, other) == [(True,), (False,)]


@needs_postgres
async def test_each_node_keeps_the_times_of_its_own_held_destinations(nodes):
    first, second = nodes
    kept = 30 * 86_400 * SECOND
    await first.store.deliveries.expire_held({"crm"}, kept)
    await second.store.deliveries.expire_held({"erp"}, kept)
    await first.store.deliveries.expire_held({"crm"}, kept)
    rows = await first.store.database.fetch("SELECT destination FROM held ORDER BY 1")
    assert [row["destination"] for row in rows] == ["crm", "erp"]
    await second.store.deliveries.expire_held(set(), kept)
    rows = await first.store.database.fetch("SELECT destination FROM held ORDER BY 1")
    assert [row["destination"] for row in rows] == ["crm"]


@needs_postgres
async def test_a_daemon_alone_and_a_cluster_exclude_each_other(nodes, tmp_path):
    alone = opening.make_store(url_of(tmp_path, CLOCK), tmp_path, CLOCK)
    with pytest.raises(StorageError, match="the nodes of a cluster use this database"):
        await alone.open()


@needs_postgres
async def test_a_cluster_does_not_join_a_daemon_alone(tmp_path):
    alone = opening.make_store(url_of(tmp_path, CLOCK), tmp_path, CLOCK)
    await alone.open()
    try:
        with pytest.raises(StorageError, match="another daemon uses this database"):
            await Node(url_of(tmp_path, CLOCK), tmp_path / "b", "b").open()
        same = Node(url_of(tmp_path, CLOCK), tmp_path, "same")  # as if the other one had been killed
        await same.open()
        await same.store.close()
    finally:
        await alone.close()


@needs_postgres
async def test_the_state_of_a_destination_is_read_by_both(nodes):
    await nodes[1].store.deliveries.set_destination(DestinationState(name="erp", paused=True))
    assert (await nodes[0].store.queries.destination_states())["erp"].paused
